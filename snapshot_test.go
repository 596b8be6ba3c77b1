// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// mounted is a file system on a loop device, and the datastore on another.
type mounted struct {
	t                  *testing.T
	dir, device, point string
}

func newMounted(t *testing.T) *mounted {
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	for _, tool := range []string{"losetup", "mkfs.ext4", "mount", "dumpe2fs", "debugfs", "e2fsck"} {
		needTool(t, tool)
	}
	d := &mounted{t: t, dir: fastDir(t)}
	d.point = filepath.Join(d.dir, "mnt")
	image := filepath.Join(d.dir, "image")
	must(t, os.Mkdir(d.point, 0o755))
	writeFile(t, filepath.Join(d.dir, "mender.conf"), "{}")
	writeFile(t, image, "")
	must(t, os.Truncate(image, 16<<20+3*512))
	d.run("mkfs.ext4", "-q", "-F", image)
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		t.Skipf("no loop device: %v: %s", err, out)
	}
	d.device = strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "--detach", d.device).Run() })
	d.run("mount", d.device, d.point)
	t.Cleanup(func() {
		d.fs(fiThaw)
		exec.Command("umount", "--lazy", d.point).Run()
	})
	return d
}

func (d *mounted) run(words ...string) string {
	d.t.Helper()
	cmd := exec.Command(words[0], words[1:]...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		d.t.Fatalf("%q: %v: %s%s", words, err, out, errs.String())
	}
	return string(out)
}

// fs asks the kernel to freeze or thaw.
func (d *mounted) fs(request uintptr) error {
	f, err := os.Open(d.point)
	must(d.t, err)
	defer f.Close()
	return ioctl(f, request, nil)
}

func (d *mounted) command(words ...string) *exec.Cmd {
	self, err := os.Executable()
	must(d.t, err)
	conf := filepath.Join(d.dir, "mender.conf")
	cmd := exec.Command(self, append([]string{"-c", conf, "-b", conf, "-d", d.dir, "snapshot"}, words...)...)
	cmd.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=1")
	return cmd
}

// dump is a whole one.
func (d *mounted) dump(words ...string) []byte {
	d.t.Helper()
	cmd := d.command(append([]string{"dump"}, words...)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil || strings.Contains(errs.String(), "warning") {
		d.t.Fatalf("%q: %v: %s", words, err, errs.String())
	}
	if err := d.fs(fiThaw); err == nil {
		d.t.Errorf("%q: the file system is frozen still", words)
	}
	return out
}

// holds wants a clean file system, which one that is written to is not, with this content of the file.
func (d *mounted) holds(image []byte, name string, want []byte) {
	d.t.Helper()
	if size, err := os.Stat(filepath.Join(d.dir, "image")); err != nil || size.Size() != int64(len(image)) {
		d.t.Fatalf("got %d bytes, want %d", len(image), size.Size())
	}
	path := filepath.Join(d.dir, "dumped")
	must(d.t, os.WriteFile(path, image, 0o644))
	if head := d.run("dumpe2fs", "-h", path); strings.Contains(head, "needs_recovery") {
		d.t.Errorf("the copy is of a file system in use:\n%s", head)
	}
	d.run("e2fsck", "-fn", path)
	if got := d.run("debugfs", "-R", "cat "+name, path); got != string(want) {
		d.t.Errorf("%s: got %d bytes, %.20q, want %.20q", name, len(got), got, want)
	}
}

// What is written before is in the copy, whether it was synced or not, and in a second copy, too.
func TestSnapshotDump(t *testing.T) {
	onlyExhaustive(t, "dumps of all kinds")
	d := newMounted(t)
	path := filepath.Join(d.point, "file")
	for i, words := range [][]string{{"--source", d.point}, {"--source", d.device, "-C", "none"},
		{"--source", d.point, "--compression", "gzip"}} {
		text := bytes.Repeat([]byte{byte('a' + i)}, 64<<10)
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644) // in place
		must(t, err)
		_, err = f.Write(text)
		must(t, err)
		must(t, f.Close())
		out := d.dump(words...)
		if words[len(words)-1] == "gzip" {
			z, err := gzip.NewReader(bytes.NewReader(out))
			must(t, err)
			out, err = io.ReadAll(z)
			must(t, err)
		}
		d.holds(out, "file", text)
	}
	d.run("umount", d.point)
	if out := d.dump("--source", d.device); !bytes.Equal(out, readFileOrNil(filepath.Join(d.dir, "image"))) {
		t.Error("what is not mounted came out with a difference")
	}
}

// Nothing is frozen that has to be written to, and what cannot be dumped is refused.
func TestSnapshotRefuses(t *testing.T) {
	d := newMounted(t)
	onIt := filepath.Join(d.point, "out")
	for _, c := range []struct {
		words []string
		exit  int
		want  string
	}{
		{[]string{"dump", "--source", d.point}, exitRefused, "the standard output is on the device to be dumped"},
		{[]string{"dump", "--source", d.device}, exitRefused, "the standard output is on the device to be dumped"},
		{[]string{"dump", "--source", "/proc"}, exitRefused, "without a device of its own"},
		{[]string{"dump", "--source", d.dir + "/image"}, exitRefused, "want a directory or a block device"},
		{[]string{"dump", "--source", "/dev/null"}, exitRefused, "want a directory or a block device"},
		{[]string{"dump", "--source", d.dir + "/none"}, exitFailed, "no such file"},
		{[]string{"dump", "--source", d.point, "-d", d.point}, exitRefused, "the datastore is on the device to be dumped"},
		{[]string{"dump", "--source", d.point, "-L", d.point + "/log"}, exitRefused, "the log file is on the device"},
		{[]string{"dump", "--source", d.point, "-C", "lzma"}, exitUsage, "want none or gzip"},
		{[]string{"bogus"}, exitUsage, "want dump"},
		{nil, exitUsage, "got 0 words"},
	} {
		cmd := d.command(c.words...)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		if strings.Contains(c.want, "standard output") {
			f, err := os.Create(onIt)
			must(t, err)
			defer f.Close()
			cmd.Stdout = f
		}
		err := cmd.Run()
		if exitStatus(err) != c.exit || !strings.Contains(errs.String(), c.want) {
			t.Errorf("%q: got exit %d, %q, want %d, %q", c.words, exitStatus(err), errs.String(), c.exit, c.want)
		}
	}
	if len(readFileOrNil(onIt)) > 0 {
		t.Error("something was written")
	}
}

// begin begins a dump that nobody reads further than its first byte.
func (d *mounted) begin() (cmd *exec.Cmd, out io.ReadCloser, child int) {
	d.t.Helper()
	cmd = d.command("dump", "--source", d.point)
	out, err := cmd.StdoutPipe()
	must(d.t, err)
	must(d.t, cmd.Start())
	d.t.Cleanup(func() { cmd.Process.Kill() })
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		d.t.Fatal(err)
	}
	if err := d.fs(fiFreeze); err != syscall.EBUSY {
		d.t.Errorf("got %v from FIFREEZE, want it to be frozen", err)
	}
	names, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", cmd.Process.Pid))
	must(d.t, err)
	for _, name := range names {
		for _, pid := range strings.Fields(string(readFileOrNil(name))) {
			if child, _ = strconv.Atoi(pid); child != 0 {
				return cmd, out, child
			}
		}
	}
	d.t.Fatalf("no child in %q", names)
	return nil, nil, 0
}

// writable waits until the file system takes a write.
func (d *mounted) writable(when string) {
	d.t.Helper()
	done := make(chan error, 1)
	go func() { done <- os.WriteFile(filepath.Join(d.point, "w"), []byte(when), 0o644) }()
	select {
	case err := <-done:
		must(d.t, err)
	case <-time.After(freezePatience / 3 * 2): // less than what would thaw without all this; nothing takes as long
		d.t.Errorf("%s: the file system stays frozen", when)
		d.fs(fiThaw)
		<-done
	}
}

// Whatever ends a dump thaws: a signal, the death of the program, of its child, and a reader that has gone or sleeps.
func TestSnapshotThaws(t *testing.T) {
	onlyExhaustive(t, "every way in which a dump can end early")
	d := newMounted(t)
	cmd, _, _ := d.begin()
	must(t, cmd.Process.Kill())
	d.writable("killed")
	cmd.Wait()

	cmd, out, _ := d.begin()
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	d.writable("told to end while nobody reads")
	io.Copy(io.Discard, out)
	if err := cmd.Wait(); exitStatus(err) != exitTempFail {
		t.Errorf("told to end: got exit %d, want %d", exitStatus(err), exitTempFail)
	}

	cmd, out, child := d.begin()
	must(t, syscall.Kill(child, syscall.SIGKILL))
	d.writable("child killed while nobody reads")
	io.Copy(io.Discard, out)
	if err := cmd.Wait(); exitStatus(err) != exitFailed {
		t.Errorf("without its child: got exit %d, want %d", exitStatus(err), exitFailed)
	}
	d.writable("child killed")

	cmd, out, _ = d.begin()
	out.Close()
	if err := cmd.Wait(); exitStatus(err) != exitFailed {
		t.Errorf("without a reader: got exit %d, want %d", exitStatus(err), exitFailed)
	}
	d.writable("without a reader")

	dir, err := os.Open(d.point)
	must(t, err)
	defer dir.Close()
	silent, peer := net.Pipe()
	defer peer.Close()
	var reply bytes.Buffer
	if code := guardFrozen(dir, silent, &reply, time.Millisecond); code != exitFailed || reply.String() != frozen {
		t.Errorf("without progress: got exit %d, %q", code, reply.String())
	}
	d.writable("without progress")

	must(t, d.fs(fiFreeze)) // somebody else did
	if code := guardFrozen(dir, silent, &reply, time.Millisecond); code != exitFailed {
		t.Errorf("frozen by another: got exit %d, want %d", code, exitFailed)
	}
	cmd = d.command("dump", "--source", d.point)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Run(); err != nil || !strings.Contains(errs.String(), "is not frozen: FIFREEZE: ") {
		t.Errorf("frozen by another: %v: %s", err, errs.String())
	}
	must(t, d.fs(fiThaw)) // it is frozen still, and who did it has to thaw
}

// sshDevice is a sshd on loopback whose sessions have the device's names in their PATH.
func (d *mounted) sshDevice() (port int, options []string) {
	d.t.Helper()
	self, err := os.Executable()
	must(d.t, err)
	must(d.t, os.MkdirAll("/run/sshd", 0o755)) // where it gives up its rights
	bin := filepath.Join(d.dir, "bin")
	must(d.t, os.Mkdir(bin, 0o755))
	named := filepath.Join(d.dir, "mender")
	must(d.t, os.Symlink(self, named))
	// The root of this machine is none to freeze.
	program := fmt.Sprintf("#!/bin/sh\n[ \"$1\" != snapshot ] || set -- \"$@\" --source %s\n"+
		"MENDLET_TEST_PROGRAM=1 exec %s -c %[3]s/mender.conf -b %[3]s/mender.conf -d %[3]s \"$@\"\n", d.point, named, d.dir)
	must(d.t, os.WriteFile(filepath.Join(bin, "mender"), []byte(program), 0o755))
	for _, key := range []string{"host", "user"} {
		d.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(d.dir, key))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(d.t, err)
	port = l.Addr().(*net.TCPAddr).Port
	conf := filepath.Join(d.dir, "sshd_config")
	writeFile(d.t, conf, fmt.Sprintf("HostKey %[1]s/host\n"+
		"AuthorizedKeysFile %[1]s/user.pub\nStrictModes no\nPidFile none\n"+
		"PermitRootLogin prohibit-password\nUsePAM no\nListenAddress 127.0.0.1:%[2]d\n"+
		"SetEnv PATH=%[1]s/bin:/usr/sbin:/usr/bin:/sbin:/bin\n", d.dir, port))
	sshd, err := exec.LookPath("sshd")
	must(d.t, err)
	l.Close()
	var said bytes.Buffer
	cmd := exec.Command(sshd, "-D", "-e", "-f", conf)
	cmd.Stderr = &said
	must(d.t, cmd.Start())
	d.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if d.t.Failed() {
			d.t.Logf("sshd said:\n%s", said.String())
		}
	})
	for end := time.Now().Add(time.Minute); ; {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(end) {
			d.t.Fatalf("sshd: %v", err)
		}
	}
	options = []string{"-F", "none", "-i", filepath.Join(d.dir, "user"), "-o", "StrictHostKeyChecking=no",
		"-o", "BatchMode=yes",
		"-o", "UserKnownHostsFile=" + filepath.Join(d.dir, "known"), "-o", "LogLevel=ERROR", "-o", "IdentitiesOnly=yes"}
	return port, options
}

// Debian's mender-artifact makes an artifact of this device's file system, by ssh.
func TestSnapshotBySSH(t *testing.T) {
	d := newMounted(t)
	for _, tool := range []string{"mender-artifact", "ssh", "sshd", "ssh-keygen", "which"} {
		needTool(t, tool)
	}
	text := bytes.Repeat([]byte("over ssh"), 8<<10)
	must(t, os.WriteFile(filepath.Join(d.point, "file"), text, 0o644))
	port, options := d.sshDevice()
	artifact := filepath.Join(d.dir, "a.mender")
	words := []string{"write", "rootfs-image", "-t", "board", "-n", "release-9", "-o", artifact,
		"-f", "ssh://root@127.0.0.1:" + strconv.Itoa(port)}
	for _, o := range options {
		words = append(words, "-S", o)
	}
	d.run(append([]string{"mender-artifact"}, words...)...)
	a, files, err := readAll(readFileOrNil(artifact), artifactOptions{})
	must(t, err)
	if a.Name != "release-9" || len(files) != 1 {
		t.Fatalf("got artifact %q with %d files", a.Name, len(files))
	}
	for _, image := range files {
		d.holds(image, "file", text)
	}
	d.writable("after a dump by ssh")
}
