// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Every fixture, made by mender-artifact, by every way of reading it.
func TestFixturesThroughProgram(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"rootfs-gzip", "rootfs-xz", "rootfs-zstd", "rootfs-depends", "rootfs-scripts",
		"rootfs-signed-rsa", "rootfs-signed-ecdsa",
		"bootstrap", "module-augmented", "module-no-files", "module-scripts-signed", "module-two-files"} {
		t.Run(name, func(t *testing.T) {
			b := newImageBoard(t)
			path := fixtures + name + ".mender"
			if err := os.Truncate(b.b, 4<<20); err != nil {
				t.Fatal(err)
			}
			if key := map[string]string{"rootfs-signed-rsa": "rsa.pub", "rootfs-signed-ecdsa": "ec.pub"}[name]; key != "" {
				b.conf["ArtifactVerifyKeys"] = []string{fixtures + "other.pub", fixtures + key}
			}
			if name == "module-augmented" { // with header-augment, which no client of today takes
				b.must(t, exitRefused, "show", path)
				return
			}
			out, errs := b.must(t, exitOK, "show", path, "--json")
			if !json.Valid([]byte(out)) || errs != "" && name != "module-scripts-signed" {
				t.Errorf("show: %q, %q", out, errs)
			}
			want := exitOK
			if strings.HasPrefix(name, "module") {
				want = exitRefused // there is no such module
			}
			if name == "rootfs-depends" {
				b.must(t, exitRefused, "plan", path)
				b.must(t, exitRefused, "install", path)
				b.provides(t, fixture(t, name+".mender"))
			}
			b.must(t, want, "plan", path)
			b.must(t, want, "install", path)
			if want == exitOK && strings.HasPrefix(name, "rootfs") {
				_, files, err := readAll(fixture(t, name+".mender"), artifactOptions{})
				if err != nil {
					t.Fatal(err)
				}
				b.slotHolds(t, b.b, files["rootfs.img"])
				b.reboot(t)
				b.must(t, exitOK, "commit")
				if out, _ := b.must(t, exitOK, "show-artifact"); out != "release-2\n" {
					t.Errorf("got %q", out)
				}
			}
			if strings.Contains(name, "signed") && want == exitOK {
				b.conf["ArtifactVerifyKeys"] = []string{fixtures + "other.pub"}
				b.must(t, exitRefused, "install", path)
				b.must(t, exitRefused, "install", fixtures+"rootfs-gzip.mender")
				b.conf["ArtifactVerifyKeys"] = []string{"/nowhere.pub"}
				if code, _, _ := b.do(t, "", "install", path); code == exitOK {
					t.Error("installed with a key that cannot be loaded")
				}
			}
		})
	}
}

// Artifacts that Debian's mender-artifact makes on the spot.
func TestMadeByMenderArtifact(t *testing.T) {
	t.Parallel()
	needTool(t, "mender-artifact")
	r, e := newKeys(t)
	rsaKey, rsaPub := keyPair(t, "RSA PRIVATE KEY", r)
	ecKey, ecPub := keyPair(t, "EC PRIVATE KEY", e)
	img := testImage(3, 900001)
	for i, comp := range []string{"none", "gzip", "lzma"} {
		for _, key := range []string{"", rsaKey, ecKey} {
			b := newImageBoard(t)
			path := filepath.Join(b.dir, "made.mender")
			script := filepath.Join(b.dir, "ArtifactInstall_Enter_01_say")
			ran := filepath.Join(b.dir, "ran")
			writeFile(t, script, "#!/bin/sh\necho yes >"+ran+"\n")
			args := []string{"--compression", comp, "write", "rootfs-image", "-n", "made", "-t", "testboard", "-f",
				writeTemp(t, "rootfs.ext4", img), "-o", path, "-s", script}
			if key != "" {
				args = append(args, "-k", key)
				b.conf["ArtifactVerifyKey"] = map[string]string{rsaKey: rsaPub, ecKey: ecPub}[key]
			}
			runTool(t, "", "mender-artifact", args...)
			b.must(t, exitOK, "install", path)
			b.slotHolds(t, b.b, img)
			if text, _ := os.ReadFile(ran); string(text) != "yes\n" {
				t.Errorf("%s: the script did not run", comp)
			}
			b.reboot(t)
			b.must(t, exitOK, "commit")
			if i == 0 && key == rsaKey { // signed with a key that is not configured
				b.conf["ArtifactVerifyKey"] = ecPub
				b.must(t, exitRefused, "install", path)
			}
		}
	}
}

// A whole install onto a loop device, as root.
func TestInstallOnLoopDevice(t *testing.T) {
	node, file := loopDevice(t, 4<<20)
	b := newImageBoard(t)
	b.b = node
	num := strings.TrimPrefix(node, "/dev/loop")
	if num == "2" {
		t.Skip("needs another loop device than that of the number 2")
	}
	img := testImage(8, 3<<20+513)
	art := b.pack(t, "release-2", img)
	b.must(t, exitOK, "install", art)
	b.slotHolds(t, node, img)
	if v := b.env(t); v[varBootPart] != num || v[varUpgrade] != "1" {
		t.Errorf("environment %v", v)
	}
	b.must(t, exitOK, "rollback")
	// The same content again: nothing is written.
	_, errs := b.must(t, exitOK, "install", art)
	if want := fmt.Sprintf("of which 0 written and %d already there", len(img)); !strings.Contains(errs, want) {
		t.Errorf("got %q, want %q", errs, want)
	}
	b.must(t, exitOK, "rollback")
	_, errs = b.must(t, exitOK, "install", "--write-all", "--no-read-back", art)
	if want := fmt.Sprintf("of which %d written and 0 already there", len(img)); !strings.Contains(errs, want) {
		t.Errorf("--write-all: got %q, want %q", errs, want)
	}
	b.must(t, exitOK, "rollback")

	refused := func(what string) {
		t.Helper()
		for _, verb := range []string{"plan", "install"} {
			out, errs := b.must(t, exitRefused, verb, art)
			if !strings.Contains(out+errs, what) { // plan says it on stdout
				t.Errorf("%s: got %q, %q, want %q", verb, out, errs, what)
			}
		}
		if v := b.env(t); v[varUpgrade] != "0" || v[varBootPart] != "2" {
			t.Errorf("%s: environment %v", what, v)
		}
	}
	t.Run("mounted", func(t *testing.T) {
		needTool(t, "mkfs.ext4")
		if out, err := exec.Command("mkfs.ext4", "-q", node).CombinedOutput(); err != nil {
			t.Skipf("needs mkfs.ext4: %v: %s", err, out)
		}
		dir := t.TempDir()
		if out, err := exec.Command("mount", node, dir).CombinedOutput(); err != nil {
			t.Skipf("needs mount: %v: %s", err, out)
		}
		defer exec.Command("umount", dir).Run()
		before, _ := os.ReadFile(file)
		refused("is mounted on")
		after, _ := os.ReadFile(file)
		if !bytes.Equal(before, after) {
			t.Error("a mounted target was written")
		}
	})
	t.Run("busy", func(t *testing.T) {
		f, err := os.OpenFile(node, os.O_RDWR|syscall.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		refused("is busy")
	})
	t.Run("too small", func(t *testing.T) {
		big := b.pack(t, "release-9", testBlocks(4<<20+1))
		out, errs := b.must(t, exitRefused, "install", big)
		if !strings.Contains(errs, "is too small: the image has 4194305 bytes, the slot 4194304: no space left on device") {
			t.Errorf("got %q %q", out, errs)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		ro := attach(t, file, "-r")
		saved := b.b
		b.b = ro
		refused("is read-only")
		b.b = saved
	})
	t.Run("missing", func(t *testing.T) {
		saved := b.b
		b.b = "/dev/mendlet-test-missing9"
		refused("does not exist")
		if _, err := os.Lstat(b.b); err == nil {
			os.Remove(b.b)
			t.Error("a file was made in /dev")
		}
		b.b = saved
	})
	t.Run("a file in /dev", func(t *testing.T) {
		saved := b.b
		b.b = "/dev/mendlet-test-file9"
		writeFile(t, b.b, "left behind by cat")
		defer os.Remove(b.b)
		refused("is not a device")
		b.b = saved
	})
}

// SIGTERM ends an install from standard input with 75, and the next one goes ahead.
func TestSignalWhileInstalling(t *testing.T) {
	t.Parallel()
	b := newImageBoard(t)
	img := testBlocks(900000)
	if err := os.Truncate(b.b, 8<<20); err != nil {
		t.Fatal(err)
	}
	big := testImage(4, 6<<20)
	art, err := os.ReadFile(b.pack(t, "release-2", big))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		sig  os.Signal
		sent int
	}{"payload": {syscall.SIGTERM, 4 << 20}, "payload, SIGINT": {syscall.SIGINT, 4 << 20},
		"header": {syscall.SIGTERM, 700}, "nothing": {syscall.SIGTERM, 0}} {
		t.Run(name, func(t *testing.T) {
			cmd, in, lines := b.start(t, "install", "-l", "debug", "--progress", "lines", "-")
			if _, err := in.Write(art[:c.sent]); err != nil {
				t.Fatal(err)
			}
			if c.sent > 10000 {
				waitLine(t, lines, "written") // a line of progress
			} else {
				waitLocked(t, cmd.Process)
			}
			if err := cmd.Process.Signal(c.sig); err != nil {
				t.Fatal(err)
			}
			for lines.Scan() {
			}
			if code := exitStatus(cmd.Wait()); code != exitTempFail {
				t.Errorf("exit %d, want %d", code, exitTempFail)
			}
			if v := b.env(t); v[varUpgrade] != "0" || v[varBootPart] != "2" {
				t.Errorf("environment %v", v)
			}
			b.must(t, exitOK, "status")
		})
	}
	b.must(t, exitOK, "install", b.pack(t, "release-3", img))
	b.slotHolds(t, b.b, img)
}

// waitLocked waits until a process holds its journal. It asks the kernel (proc_locks(5));
// to try the lock could make the process find it taken.
func waitLocked(t *testing.T, p *os.Process) {
	t.Helper()
	holds := regexp.MustCompile(fmt.Sprintf(`(?m)FLOCK +ADVISORY +WRITE %d `, p.Pid))
	for {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			t.Skip("needs /proc/locks: ", err)
		}
		if holds.Match(locks) {
			return
		}
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid)); err != nil || bytes.Contains(stat, []byte(") Z ")) {
			t.Fatalf("the process has ended: %v %s", err, stat)
		}
	}
}

// field case 29 (rauc#1676): two at once, and one killed while it holds the lock.
func TestTwoAtOnce(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(900000))
	text, err := os.ReadFile(art)
	if err != nil {
		t.Fatal(err)
	}
	cmd, in, _ := b.start(t, "install", "-")
	if _, err := in.Write(text[:500000]); err != nil {
		t.Fatal(err)
	}
	waitLocked(t, cmd.Process)
	for _, words := range [][]string{{"install", art}, {"commit"}, {"rollback"}, {"resume"}} {
		if _, errs := b.must(t, exitTempFail, words...); !strings.Contains(errs, "another mendlet is running") {
			t.Errorf("%q: %q", words, errs)
		}
	}
	// Those that only read go on.
	b.must(t, exitOK, "status")
	b.must(t, exitOK, "show-artifact")
	b.must(t, exitOK, "show-provides")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	b.must(t, exitOK, "install", art)
	b.slotHolds(t, b.b, testBlocks(900000))
}

// stdout that nobody reads is an error and no death by SIGPIPE.
func TestStdoutClosed(t *testing.T) {
	b := newImageBoard(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	cmd := b.process(t, "install", b.pack(t, "release-2", testBlocks(1000)))
	cmd.Stdout = w
	if err := cmd.Run(); err != nil {
		t.Errorf("got %v", err)
	}
	w.Close()
	if v := b.env(t); v[varUpgrade] != "1" {
		t.Error("the install did not finish")
	}
}

// A script that could not be started, or a module, is refused before anything is written, and by plan.
func TestUnstartableIsRefused(t *testing.T) {
	b := newImageBoard(t)
	b.surroundings(t)
	img := testBlocks(512 << 10)
	module := filepath.Join(b.dir, "data/modules/v3/app")
	for _, c := range unstartable {
		script := writeTemp(t, "ArtifactInstall_Enter_00_x", []byte(c.text))
		arts := []string{b.pack(t, "scripted", img, "-s", script), b.pack(t, "app", img, "-T", "app")}
		must(t, os.MkdirAll(filepath.Dir(module), 0o755))
		must(t, os.WriteFile(module, []byte(c.text), 0o755))
		for _, art := range arts {
			for _, verb := range []string{"plan", "install"} {
				code, out, errs := b.do(t, "", verb, art)
				quoted := strings.Trim(strconv.Quote(c.says), `"`) // in plan's text
				if code != exitRefused || !strings.Contains(out+errs, c.says) && !strings.Contains(out+errs, quoted) {
					t.Errorf("%s of %s with %q: exit code %d, %q, %q", verb, filepath.Base(art), c.text, code, out, errs)
				}
			}
		}
	}
	b.slotHolds(t, b.b, oldImage())
	if v := b.env(t); v[varBootPart] != "2" || v[varUpgrade] != "0" {
		t.Errorf("environment %v", v)
	}
}

// No artifacts that are accepted keep the next one out.
func TestProvidesCannotFillTheJournal(t *testing.T) {
	t.Parallel()
	b := newImageBoard(t)
	for i := range 12 {
		args := []string{"--bootstrap", "-n", fmt.Sprint("evil-", i), "-c", "testboard",
			"-o", b.dir + "/evil.mender", "--clears-provides", "nothing"}
		for k := range 10 {
			args = append(args, "-p", fmt.Sprintf("evil-%d-%d:%s", i, k, strings.Repeat("v", 2500>>(i/2))))
		}
		must(t, packCommand(args, io.Discard, nil))
		if code, _, errs := b.do(t, "", "install", b.dir+"/evil.mender"); code != exitOK && code != exitRefused {
			t.Fatalf("artifact %d: exit code %d, %s", i, code, errs)
		}
	}
	b.must(t, exitOK, "install", b.pack(t, "release-2", testBlocks(512<<10)))
	b.reboot(t)
	b.must(t, exitOK, "commit")
	b.must(t, exitOK, "install", b.pack(t, "sweep", testBlocks(256<<10), "--clears-provides", "*"))
	b.reboot(t)
	b.must(t, exitOK, "commit")
	out, _ := b.must(t, exitOK, "show-provides")
	if strings.Contains(out, "evil") || !strings.Contains(out, "artifact_name=sweep") {
		t.Errorf("got %s", out)
	}
}
