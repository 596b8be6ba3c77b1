// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Debian's mender-client 3.4.0 begins an update, and this program ends it: as real as it gets without a machine
// that reboots.

// menderBoard is a loopBoard on which Mender's client runs in a root that is the slot which is booted.
type menderBoard struct{ *loopBoard }

func newMenderBoard(t *testing.T) *menderBoard {
	for _, tool := range []string{"mender", "fw_setenv", "mke2fs", "chroot"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	b := &menderBoard{newLoopBoard(t)}
	b.server.autoAccept = true
	must(t, os.WriteFile(b.slots["2"], b.root("release-1"), 0))
	must(t, os.WriteFile(b.dir+"/etc/artifact_info", []byte("artifact_name=release-1\n"), 0o644))
	b.boot()
	return b
}

// root is a file system with its name in the bytes before it, by which the boot loader of loopBoard knows it.
func (b *menderBoard) root(name string) []byte {
	b.t.Helper()
	img := filepath.Join(b.dir, "root.ext2")
	must(b.t, os.WriteFile(img, make([]byte, 3<<20), 0o600))
	if out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext2", img).CombinedOutput(); err != nil {
		b.t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	text, err := os.ReadFile(img)
	must(b.t, err)
	copy(text, name+"\n")
	return text
}

// image makes the artifact of a root, in the file that it returns, and in bytes.
func (b *menderBoard) image(name string) (string, []byte) {
	b.t.Helper()
	img := filepath.Join(b.dir, "image")
	must(b.t, os.WriteFile(img, b.root(name), 0o600))
	made := filepath.Join(b.dir, name+".mender")
	b.want(0, "", "pack", "-n", name, "-c", "qemu", "-f", img, "-o", made)
	text, err := os.ReadFile(made)
	must(b.t, err)
	return made, text
}

// menderRoot mounts slot $2 as a root with the machine's programs and the board's directories in it, and runs the
// client there. That knows the slots by nodes of their names only.
const menderRoot = `d=$1 r=$1/mounted n=$1/nodes
	mkdir -p "$r" "$n"
	mount -t tmpfs tmpfs "$n"
	for x in null zero random urandom; do cp -a /dev/$x "$n"; done
	for p in 2 3; do cp -aL "$d/mmcblk0p$p" "$n/mmcblk0p$p"; done
	mount "$n/${2##*/}" "$r"
	shift 2
	for x in usr proc sys run tmp; do mkdir -p "$r/$x"; mount --rbind /$x "$r/$x"; done
	for x in bin sbin lib lib64; do if [ -L /$x ]; then ln -sf usr/$x "$r/"; fi; done
	mkdir -p "$r/etc/mender" "$r/var/lib/mender" "$r/dev"
	mount --bind "$n" "$r/dev" # where the board's directory may be
	mkdir -p "$r$d"
	mount --rbind "$d" "$r$d"
	mount --bind "$d/share" "$r/usr/share/mender"
	mount --bind "$d/var" "$r/var/lib/mender"
	cp "$d/fw_env.config" "$r/etc/"
	cp "$d/etc/artifact_info" "$r/etc/mender/"
	sed -e "s,$d/mmc,$n/mmc," -e '1s/{/{"UpdatePollIntervalSeconds":1,"InventoryPollIntervalSeconds":1,/' \
		-e '1s/{/{"RetryPollIntervalSeconds":1,/' \
		"$d/etc/mender.conf" > "$r/etc/mender/mender.conf"
	exec chroot "$r" mender --no-syslog "$@"`

// mender runs that client, until it ends or "reboots".
func (b *menderBoard) mender(words ...string) string {
	b.t.Helper()
	ctx, stop := context.WithTimeout(b.t.Context(), 2*time.Minute)
	defer stop()
	slot := b.slots[map[string]string{"A": "2", "B": "3"}[b.booted]]
	cmd := exec.CommandContext(ctx, "unshare", slices.Concat([]string{"-m", "sh", "-ec", menderRoot, "sh", b.dir, slot},
		words)...)
	cmd.Env = append(os.Environ(), "PATH="+b.dir+"/bin:"+os.Getenv("PATH"),
		"DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent")
	for i, e := range cmd.Env {
		if strings.HasPrefix(e, "MENDER_") {
			cmd.Env[i] = "X=" // the directories are its own
		}
	}
	out, _ := cmd.CombinedOutput()
	b.t.Logf("mender %s: %v\n%s", strings.Join(words, " "), cmd.ProcessState, out)
	if ctx.Err() != nil {
		b.t.Fatalf("mender %s did not end", words)
	}
	return string(out)
}

// keeps checks that the store is the same after f.
func (b *menderBoard) keeps(f func()) {
	b.t.Helper()
	before := readFileOrNil(b.dir + "/var/" + menderStoreFile)
	lock, err := os.Stat(b.dir + "/var/" + menderStoreLock)
	must(b.t, err)
	f()
	if len(before) == 0 || !bytes.Equal(before, readFileOrNil(b.dir+"/var/"+menderStoreFile)) {
		b.t.Error("the store was changed")
	}
	if now, err := os.Stat(b.dir + "/var/" + menderStoreLock); err != nil || !now.ModTime().Equal(lock.ModTime()) {
		b.t.Error("the lock file was touched")
	}
}

// verdict checks how the update ended.
func (b *menderBoard) verdict(result, name string) {
	b.t.Helper()
	rec, err := peekJournal(b.dir+"/var", newLogger(&bytes.Buffer{}))
	must(b.t, err)
	if rec.Update != nil || rec.Last == nil || rec.Last.Result != result || rec.Provides["artifact_name"] != name {
		b.t.Errorf("got %+v, %+v, want %s, with %s", rec, rec.Last, result, name)
	}
	env, err := os.ReadFile(b.dir + "/env")
	must(b.t, err)
	if vars, _ := readSimEnv(env); vars["upgrade_available"] != "0" {
		b.t.Error("upgrade_available is not 0")
	}
}

func TestMenderImageStandalone(t *testing.T) {
	b := newMenderBoard(t)
	file, _ := b.image("release-2")
	b.mender("install", file)
	b.keeps(func() {
		b.run(exitFailed, "commit") // before the reboot
		if name := b.boot(); name != "release-2" {
			t.Fatalf("%s booted", name)
		}
		if out := b.run(0, "status"); !strings.Contains(out, "taken over from Mender's client") {
			t.Error("status does not say it")
		}
		b.run(0, "commit")
		b.verdict("committed", "release-2")
	})
	b.mender("show-artifact") // going back: its store is still one
}

func TestMenderImageThatDoesNotBoot(t *testing.T) {
	b := newMenderBoard(t)
	file, _ := b.image("broken")
	b.mender("install", file)
	if name := b.boot(); name != "release-1" {
		t.Fatalf("%s booted", name)
	}
	b.keeps(func() {
		b.run(exitFailed, "commit")
		b.verdict("rolled-back", "release-1")
	})
}

func TestMenderModuleStandalone(t *testing.T) {
	for verb, want := range map[string][2]string{"commit": {"committed", "app-2"},
		"rollback": {"rolled-back", "release-1"}} {
		t.Run(verb, func(t *testing.T) {
			b := newMenderBoard(t)
			must(t, os.WriteFile(b.dir+"/app.mender", b.artifact("app-2", "good"), 0o600))
			b.mender("install", b.dir+"/app.mender")
			b.keeps(func() {
				b.run(0, verb)
				b.verdict(want[0], want[1])
			})
		})
	}
}

// There, back, and there again: Mender's client goes on with its own store, and mendlet says that it has.
func TestMenderThereAndBack(t *testing.T) {
	b := newMenderBoard(t)
	for _, name := range []string{"app-2", "app-3", "app-4"} {
		must(t, os.WriteFile(b.dir+"/"+name+".mender", b.artifact(name, "good"), 0o600))
	}
	b.mender("install", b.dir+"/app-2.mender")
	b.keeps(func() {
		b.run(0, "commit")
		b.verdict("committed", "app-2")
	})
	b.mender("rollback") // of what is the state of things by its store
	b.mender("install", b.dir+"/app-3.mender")
	b.mender("commit")
	if out := b.mender("show-artifact"); !strings.HasSuffix(strings.TrimSpace(out), "app-3") {
		t.Fatalf("Mender's client has %q", out)
	}
	b.keeps(func() {
		if out := b.run(0, "status"); !strings.Contains(out, `its artifact is "app-3"`) {
			t.Error("status does not say that its store is newer")
		}
		b.run(0, "install", b.dir+"/app-4.mender")
		b.run(0, "commit")
		b.verdict("committed", "app-4")
	})
	b.mender("install", b.dir+"/app-2.mender") // and again it waits for somebody to commit it
	b.keeps(func() {
		b.run(0, "commit")
		b.verdict("committed", "app-2")
	})
}

func TestMenderImageDeployed(t *testing.T) {
	for name, want := range map[string][3]string{"release-2": {"committed", "release-2", "success"},
		"broken": {"rolled-back", "release-1", "failure"}} {
		t.Run(name, func(t *testing.T) {
			b := newMenderBoard(t)
			_, artifact := b.image(name)
			dep := b.server.deploy("d-1", name, []string{"qemu"}, artifact)
			b.mender("daemon") // until it reboots
			b.boot()
			code := 0
			if want[2] == "failure" {
				code = exitFailed
			}
			b.keeps(func() {
				b.run(code, "run")
				b.verdict(want[0], want[1])
				b.run(0, "run")
			})
			b.heardOnce(dep, want[2])
		})
	}
}

// heardOnce checks that the server heard the verdict, and no other.
func (b *menderBoard) heardOnce(dep *testDeployment, want string) {
	b.t.Helper()
	statuses, final, logs := b.server.history(dep)
	n := 0
	for _, s := range statuses {
		if s == "success" || s == "failure" {
			n++
		}
	}
	if final != want || n != 1 {
		b.t.Errorf("the server heard %v, want %s once", statuses, want)
	}
	if want == "failure" && len(logs) == 0 {
		b.t.Error("the server got no log")
	}
}

// The power goes in the module's install.
func TestMenderModuleCutShort(t *testing.T) {
	b := newMenderBoard(t)
	writeScript(t, b.dir+"/share/modules/v3/testmod", `echo "$1" >> "`+b.dir+`/calls"
		case "$1" in
		ArtifactInstall) kill -9 $PPID; sleep 1 ;;
		SupportsRollback) echo Yes ;;
		esac`, 0o755)
	dep := b.server.deploy("d-1", "app-2", []string{"qemu"}, b.artifact("app-2", "good"))
	b.mender("daemon")
	must(t, os.Remove(b.dir+"/calls"))
	b.keeps(func() {
		b.run(exitFailed, "run")
		b.verdict("rolled-back", "release-1")
	})
	b.heardOnce(dep, "failure")
	if got := strings.Join(strings.Fields(string(readFileOrNil(b.dir+"/calls"))), " "); !strings.Contains(got,
		"ArtifactRollback") ||
		!strings.HasSuffix(got, "Cleanup") || strings.Contains(got, "Install") {
		t.Errorf("the module was called for %s", got)
	}
}
