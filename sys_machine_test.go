// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// The program on machines as they are: roots on overlays, environments that cannot be written, traps in
// the way, journals that were lost.

// A trial boot that the journal knows nothing of is explained, with what to do, and nothing changes.
func TestStrayTrial(t *testing.T) {
	for running, want := range map[string]string{
		"B":    "At the next boot the bootloader goes back to slot A",
		"none": "At the next boot the bootloader goes back to slot A",
		"A":    "The next boot tries it",
	} {
		b := newImageBoard(t)
		b.running = running
		b.setEnv(t, map[string]string{varBootPart: "3", varBootPartHex: "3", varUpgrade: "1"})
		for _, verb := range []string{"commit", "rollback", "resume"} {
			if _, errs := b.must(t, exitNothing, verb); !strings.Contains(errs, "the journal knows of no update") ||
				!strings.Contains(errs, want) || !strings.Contains(errs, "env set") {
				t.Errorf("%s runs, %s: got %q, want %q", running, verb, errs, want)
			}
		}
		if out, _ := b.must(t, exitOK, "status"); !strings.Contains(out, want) {
			t.Errorf("%s runs, status: got %q, want %q", running, out, want)
		}
		var r report
		out, _ := b.must(t, exitOK, "status", "--json")
		if err := json.Unmarshal([]byte(out), &r); err != nil || !strings.Contains(r.Next, want) {
			t.Errorf("%s runs: got %q, %v", running, r.Next, err)
		}
		if v := b.env(t); v[varUpgrade] != "1" || v[varBootPart] != "3" {
			t.Errorf("%s runs: the environment changed: %v", running, v)
		}
		// What it says to do is what helps.
		_, after, _ := strings.Cut(out, "mendlet env set ")
		b.must(t, exitOK, append([]string{"env", "set"},
			strings.Fields(strings.TrimSpace(strings.SplitN(after, `"`, 2)[0]))...)...)
		part := map[bool]string{true: "2", false: "3"}[running == "A"]
		if v := b.env(t); v[varUpgrade] != "0" || v[varBootPart] != part || v[varBootPartHex] != part {
			t.Errorf("%s runs: after the advice: %v", running, v)
		}
		if out, errs := b.must(t, exitNothing, "commit"); strings.Contains(errs, "journal") {
			t.Errorf("%s runs: after the advice: %q %q", running, out, errs)
		}
	}
	// With an update in the journal there is nothing stray.
	b := newImageBoard(t)
	b.must(t, exitOK, "install", b.pack(t, "release-2", testBlocks(900000)))
	if out, errs := b.must(t, exitOK, "status"); strings.Contains(out+errs, "knows of no update") {
		t.Errorf("got %q, %q", out, errs)
	}
}

// A datastore in memory is told before it matters.
func TestDatastoreInMemory(t *testing.T) {
	var st syscall.Statfs_t
	const tmpfsMagic = 0x01021994 // linux/magic.h
	if err := syscall.Statfs("/dev/shm", &st); err != nil || st.Type != tmpfsMagic {
		t.Skip("needs a tmpfs on /dev/shm")
	}
	b := newImageBoard(t)
	ds, err := os.MkdirTemp("/dev/shm", "mendlet-ds")
	if err != nil {
		t.Skip("needs to write to /dev/shm: ", err)
	}
	defer os.RemoveAll(ds)
	writeFile(t, ds+"/device_type", "device_type=testboard\n")
	art := b.pack(t, "release-2", testBlocks(900000))
	for _, words := range [][]string{{"status"}, {"plan", art}, {"install", art}} {
		out, errs := b.must(t, exitOK, append([]string{"-d", ds}, words...)...)
		if text := out + errs; !strings.Contains(text, ds) ||
			!strings.Contains(text, "may not outlive a reboot: \"/dev/shm\" is in memory (tmpfs)") {
			t.Errorf("%q: got %q", words, text)
		}
		if out, errs := b.must(t, exitOK, "status"); strings.Contains(out+errs, "outlive") {
			t.Errorf("a datastore on disk: got %q", out+errs)
		}
	}
}

// Named pipes in the place of the lock and of files that are read: nothing waits for their other end.
func TestPipesInTheWay(t *testing.T) {
	b := newImageBoard(t)
	lock := filepath.Join(b.dir, "lock")
	must(t, os.Remove(lock))
	must(t, syscall.Mkfifo(lock, 0o666))
	art := b.pack(t, "release-2", testBlocks(900000))
	ends := func(want int, words ...string) {
		t.Helper()
		out, err := b.process(t, words...).CombinedOutput()
		if got := exitStatus(err); got != want {
			t.Errorf("%q: exit %d, want %d: %s", words, got, want, out)
		}
	}
	for _, words := range [][]string{{"status"}, {"env", "print"}, {"env", "set", "x=y"}, {"plan", art},
		{"install", art}} {
		ends(exitOK, words...)
	}
	b.reboot(t)
	ends(exitOK, "commit")
	for _, name := range []string{"env", "fw_env.config", "ds/mendlet.state", "ds/device_type"} {
		path := filepath.Join(b.dir, name)
		must(t, os.Rename(path, path+".away"))
		must(t, syscall.Mkfifo(path, 0o666))
		if out, err := b.process(t, "install", art).CombinedOutput(); exitStatus(err) == exitOK ||
			!strings.Contains(string(out), path) {
			t.Errorf("%s: %v, %s", name, err, out)
		}
		must(t, os.Remove(path))
		must(t, os.Rename(path+".away", path))
	}
	ends(exitFailed, "status", "-L", lock)
}

// A pipe in the place of an artifact is waited for, before and after it has another end, until a signal comes.
func TestSignalWhileWaitingForPipe(t *testing.T) {
	t.Parallel()
	for _, sent := range []int{-1, 0, 700, 300000} {
		b := newImageBoard(t)
		text, err := os.ReadFile(b.pack(t, "release-2", testBlocks(900000)))
		must(t, err)
		pipe := filepath.Join(b.dir, "pipe")
		must(t, syscall.Mkfifo(pipe, 0o600))
		cmd, _, lines := b.start(t, "install", pipe)
		if sent < 0 {
			waitLocked(t, cmd.Process)
		} else {
			w, err := os.OpenFile(pipe, os.O_WRONLY, 0) // when it has been opened there
			must(t, err)
			defer w.Close()
			_, err = w.Write(text[:sent])
			must(t, err)
		}
		must(t, cmd.Process.Signal(syscall.SIGTERM))
		for lines.Scan() {
		}
		if code := exitStatus(cmd.Wait()); code != exitTempFail {
			t.Errorf("%d bytes sent: exit %d, want %d", sent, code, exitTempFail)
		}
	}
}

// inNamespace runs a script in a mount namespace of its own, as root. 77: it cannot be had here.
func inNamespace(t *testing.T, script string, env ...string) (code int, out string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	needTool(t, "unshare")
	cmd := exec.Command("unshare", "-m", "sh", "-c", "mount --make-rprivate / || exit 77\n"+script)
	cmd.Env = append(os.Environ(), env...)
	text, err := cmd.CombinedOutput()
	if code = exitStatus(err); code == 77 {
		t.Skipf("needs to mount: %s", text)
	}
	if err != nil && code == 0 {
		t.Fatal(err)
	}
	return code, string(text)
}

// An environment that can be read and not written is refused before the slot is touched: on a file system that is
// mounted read-only, and on a device that is.
func TestEnvironmentReadOnly(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(900000))
	before, _ := os.ReadFile(b.b)
	program, err := os.Executable() // see TestMain
	must(t, err)
	args := strings.Join(b.args(t)[1:], " ")
	try := func(what, script string) {
		t.Helper()
		code, out := inNamespace(t, script+`
for verb in plan install; do $PROGRAM $ARGS $verb $ART; echo "$verb: $?"; done; exit 0`,
			"MENDLET_TEST_PROGRAM=1", "PROGRAM="+program, "ARGS="+args, "ART="+art, "DIR="+b.dir)
		if code != 0 || !strings.Contains(out, "plan: 3\n") || !strings.Contains(out, "install: 3\n") ||
			strings.Count(out, "cannot be written")+strings.Count(out, "is read-only") < 2 {
			t.Errorf("%s: exit %d: %s", what, code, out)
		}
		if after, _ := os.ReadFile(b.b); !bytes.Equal(before, after) {
			t.Errorf("%s: the slot was written", what)
		}
	}
	try("read-only mount", `mkdir $DIR/boot && mount -t tmpfs none $DIR/boot || exit 77
cp $DIR/env $DIR/boot && mount -o remount,ro $DIR/boot || exit 77
printf '%s 0 0x1000\n%s 0x1000 0x1000\n' $DIR/boot/env $DIR/boot/env >$DIR/fw_env.config`)
	needTool(t, "losetup")
	loop := attach(t, filepath.Join(b.dir, "env"), "-r")
	writeFile(t, filepath.Join(b.dir, "fw_env.config"), fmt.Sprintf("%s 0 0x1000\n%s 0x1000 0x1000\n", loop, loop))
	try("read-only device", "")
}

// A root on an overlay whose lower layer, a slot, is not to be seen: root= says which slot runs, so a commit before the
// reboot is refused, and upgrade_available stays; without it an install is refused.
func TestOverlayRoot(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	for _, tool := range []string{"unshare", "losetup", "mkfs.ext4", "chroot", "mknod"} {
		needTool(t, tool)
	}
	b := newImageBoard(t)
	dir := b.dir
	art := b.pack(t, "release-2", testBlocks(900000))
	for _, p := range []string{b.a, b.b} {
		must(t, os.Truncate(p, 40<<20))
	}
	runTool(t, "", "mkfs.ext4", "-q", "-F", b.a)
	a, bb := attach(t, b.a), attach(t, b.b)
	writeFile(t, dir+"/mender.conf", `{"RootfsPartA":"/dev/mmcblk0p2","RootfsPartB":"/dev/mmcblk0p3"}`)
	writeFile(t, dir+"/fw", "/boot/env 0 0x1000\n/boot/env 0x1000 0x1000\n")
	writeFile(t, dir+"/cmdline", "root=/dev/mmcblk0p2 ro overlayroot=tmpfs\n")
	writeFile(t, dir+"/none", "quiet\n")
	code, out := inNamespace(t, `
cd $DIR && mkdir low up mnt && mount $A low || exit 77
(cd low && mkdir -p dev proc sys bin boot etc/mender var/lib/mender media/ro) || exit 1
cp $PROGRAM low/bin/mendlet; cp $ART low/a.mender; cp env low/boot/env
cp fw low/etc/fw_env.config; cp mender.conf low/etc/mender
echo device_type=testboard >low/var/lib/mender/device_type
mount -o remount,ro low && mount -t tmpfs none up && mkdir up/u up/w &&
mount -t overlay overlay -o lowerdir=$DIR/low,upperdir=$DIR/up/u,workdir=$DIR/up/w mnt || exit 77
mount -t tmpfs none mnt/dev && mknod mnt/dev/null c 1 3 &&
mknod mnt/dev/mmcblk0p2 b 7 ${A#/dev/loop} && mknod mnt/dev/mmcblk0p3 b 7 ${B#/dev/loop} &&
mount -t proc none mnt/proc && mount -t sysfs none mnt/sys || exit 77
m() { chroot mnt /bin/mendlet "$@" 2>&1; echo "$1: $?"; }
mount --bind none mnt/proc/cmdline && m install /a.mender && umount mnt/proc/cmdline
mount --bind cmdline mnt/proc/cmdline
m install /a.mender; m status; m commit; m env print upgrade_available
umount mnt/proc/cmdline; mount --bind none mnt/proc/cmdline; m commit; m env print upgrade_available
mount --bind low mnt/media/ro && m status; exit 0`, "DIR="+dir, "A="+a, "B="+bb, "PROGRAM="+builtProgram(t), "ART="+art, "MENDER_CONF_DIR=",
		"MENDER_DATA_DIR=")
	if code != 0 {
		t.Fatalf("exit %d: %s", code, out)
	}
	for _, want := range []string{"install: 3\n", "install: 0\n", "running A", "commit: 1\n", "commit: 3\n",
		"may not outlive a reboot"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if n := strings.Count(out, "upgrade_available=1\n"); n < 2 || strings.Contains(out, "upgrade_available=0\n") {
		t.Errorf("the trial did not stay one:\n%s", out)
	}
	if last := out[strings.LastIndex(out, "slots:"):]; !strings.Contains(last, "running A") ||
		!strings.Contains(last, "mounted at all: slot A") {
		t.Errorf("with the slot in sight: %s", last)
	}
}

// Two disks with the same table: neither the tag nor the link says which one is meant.
func TestCopyOfDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: losetup")
	}
	needTool(t, "sgdisk")
	needTool(t, "partx")
	disk := filepath.Join(t.TempDir(), "disk")
	writeFile(t, disk, "")
	must(t, os.Truncate(disk, 8<<20))
	const uuid = "0fc63daf-8483-4772-8e79-3d69d8477d01"
	runTool(t, "", "sgdisk", "-n", "1:2048:4095", "-u", "1:"+uuid, disk)
	add := func(file string) (node string) {
		loop := attach(t, file)
		if out, err := exec.Command("partx", "-a", loop).CombinedOutput(); err != nil {
			t.Skipf("needs partitions on loop devices: %v: %s", err, out)
		}
		t.Cleanup(func() { exec.Command("partx", "-d", loop).Run() })
		if _, err := os.Stat(loop + "p1"); err != nil {
			t.Skip("needs nodes of partitions: ", err)
		}
		return loop + "p1"
	}
	m := newMachine("")
	node := add(disk)
	link := filepath.Join("/dev/disk/by-partuuid", uuid)
	if _, err := os.Lstat(link); errors.Is(err, os.ErrNotExist) && os.MkdirAll(filepath.Dir(link), 0o755) == nil &&
		os.Symlink(node, link) == nil {
		t.Cleanup(func() { os.Remove(link); os.Remove(filepath.Dir(link)) }) // the folder only if it is empty
	}
	for _, name := range []string{"PARTUUID=" + uuid, link} {
		if got, err := m.resolveDevice(name); err != nil || got != node {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, node)
		}
	}
	image, err := os.ReadFile(disk)
	must(t, err)
	add(writeTemp(t, "copy", image))
	for _, name := range []string{"PARTUUID=" + uuid, link} {
		if got, err := m.resolveDevice(name); exitCode(err) != exitRefused || !strings.Contains(err.Error(), "ambiguous") {
			t.Errorf("with a copy of the disk, %s: got %q, %v", name, got, err)
		}
	}
}
