// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What cannot be read, written or locked now: nothing is decided, and nothing waits for ever.

// unreadDisk is a disk of which openings and reads fail, as long as fails says so.
type unreadDisk struct {
	*memDisk
	fails func(off int64) error // off is below 0 for an opening
}

func (d *unreadDisk) open(string, openMode) (storage, error) {
	if err := d.fails(-1); err != nil {
		return nil, &os.PathError{Op: "open", Path: "disk", Err: err}
	}
	return d, nil
}

func (d *unreadDisk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.fails(off); err != nil {
		return 0, &os.PathError{Op: "read", Path: "disk", Err: err}
	}
	return d.memDisk.ReadAt(p, off)
}

// unreadable makes the copies of twoCopies, of which the second is current, unreadable: at off, n times.
func unreadable(off int64, errno syscall.Errno, n int) (*unreadDisk, *nativeEnv) {
	d, env := twoCopies(envBytes(testEnvSize, 7, 0, "upgrade_available=0", "a=stale"),
		envBytes(testEnvSize, 8, 0, "upgrade_available=1", "a=new"))
	f := &unreadDisk{memDisk: d, fails: func(at int64) error {
		if at != off || n == 0 {
			return nil
		}
		n--
		return errno
	}}
	env.open = f.open
	return f, env
}

// A copy that cannot be read is tried again, and then nothing is known: least of all that the value
// which the stale copy has is there already.
func TestEnvUnreadable(t *testing.T) {
	for _, off := range []int64{-1, 0x400, 0x2400} {
		for _, errno := range []syscall.Errno{syscall.EIO, syscall.EMFILE, syscall.ENOMEM} {
			_, env := unreadable(off, errno, len(envReads))
			if got, err := env.vars(t.Context()); err != nil || got["a"] != "new" {
				t.Errorf("%v at %#x, and then it can be read: got %v, %v", errno, off, got, err)
			}
			d, env := unreadable(off, errno, -1)
			before := slices.Clone(d.data)
			for what, err := range map[string]error{
				"set":   env.set(t.Context(), []envVar{{"upgrade_available", "0"}}),
				"check": env.check(t.Context(), []envVar{{"upgrade_available", "0"}}),
				"print": envCommand(t.Context(), []string{"print"}, env, &bytes.Buffer{}),
				"env":   envCommand(t.Context(), []string{"set", "upgrade_available=0"}, env, &bytes.Buffer{}),
			} {
				var touched *envChangeError
				if exitCode(err) != exitTempFail || !errors.Is(err, errno) || errors.As(err, &touched) {
					t.Errorf("%s, %v at %#x: got %v, exit code %d", what, errno, off, err, exitCode(err))
				}
				if off > 0 && (!strings.Contains(err.Error(), "may be the newer one") || hintOf(err) == "") {
					t.Errorf("%s, %v at %#x: got %v, hint %q", what, errno, off, err, hintOf(err))
				}
			}
			if d.writes != 0 || !bytes.Equal(d.data, before) {
				t.Errorf("%v at %#x: something was written", errno, off)
			}
		}
	}
	// Told to end, it does not try again.
	ctx, stop := context.WithCancel(t.Context())
	stop()
	_, env := unreadable(0x2400, syscall.EIO, -1)
	if _, err := env.vars(ctx); exitCode(err) != exitTempFail || !errors.Is(err, context.Canceled) {
		t.Errorf("told to end: got %v", err)
	}
}

// The program by its other names, too, and it ends with 1 as they do.
func TestFwCommandUnreadable(t *testing.T) {
	for _, words := range [][]string{{"fw_printenv", "a"}, {"fw_setenv", "a", "b"}} {
		d, env := unreadable(0x2400, syscall.EIO, -1)
		open := func(*config, *logger) (bootEnv, error) { return env, nil }
		var out, errs bytes.Buffer
		code := fwCommand(t.Context(), words[0], words[1:], defaultConfig(paths{}), open, &out, &out, &errs, newLogger(&errs))
		if code != exitFailed || out.Len() > 0 || d.writes > 0 || !strings.Contains(errs.String(), "input/output error") {
			t.Errorf("%q: got %d, %q, %q, %d writes", words, code, &out, &errs, d.writes)
		}
	}
}

// After a change all copies are read, and the one written must be the one that the boot loader takes.
func TestEnvConfirm(t *testing.T) {
	d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), envBytes(testEnvSize, 7, 0, "a=0"))
	d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) {
		copy(d.data[0x400:], envBytes(testEnvSize, 10, 0, "a=other")) // somebody who takes no lock
		return copy(d.data[off:], p), nil
	}
	err := env.set(t.Context(), []envVar{{"a", "2"}})
	var touched *envChangeError
	wantErr(t, err, "the boot loader will take", `"disk" at 0x400`)
	if !errors.As(err, &touched) || exitCode(err) != exitFailed {
		t.Errorf("got %T, exit code %d", err, exitCode(err))
	}
	// A change that cannot be read back may be there: the next try finds out, and writes nothing then.
	d, env = twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), envBytes(testEnvSize, 7, 0, "a=0"))
	f := &unreadDisk{memDisk: d, fails: func(int64) error {
		if d.writes > 0 {
			return syscall.EIO
		}
		return nil
	}}
	env.open = f.open
	err = env.set(t.Context(), []envVar{{"a", "2"}})
	if !errors.As(err, &touched) || exitCode(err) != exitTempFail {
		t.Errorf("cannot be read back: got %v", err)
	}
	f.fails = func(int64) error { return nil }
	if err := env.set(t.Context(), []envVar{{"a", "2"}}); err != nil || d.writes != 1 {
		t.Errorf("again: got %v, %d writes", err, d.writes)
	}
}

// What is there already is made durable before it is called done: the sync of the change may have failed.
func TestEnvSettles(t *testing.T) {
	d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), envBytes(testEnvSize, 7, 0, "a=0"))
	if err := env.set(t.Context(), []envVar{{"a", "1"}}); err != nil || d.writes != 0 || d.syncs != 1 {
		t.Errorf("got %v, %d writes and %d syncs, want a sync", err, d.writes, d.syncs)
	}
	d.syncErr = syscall.EIO
	var touched *envChangeError
	if err := env.set(t.Context(), []envVar{{"a", "1"}}); exitCode(err) != exitTempFail || errors.As(err, &touched) {
		t.Errorf("sync fails: got %v", err)
	}
}

// A device that is not there is no damaged environment, for which a new one would be the cure. A file beside
// one that is there was never made.
func TestEnvNotThere(t *testing.T) {
	dir := t.TempDir()
	a, gone := filepath.Join(dir, "a"), filepath.Join(dir, "gone")
	writeFile(t, a, string(envBytes(testEnvSize, 8, 0, "a=1")))
	for _, c := range []struct {
		copies []envCopy
		want   string
	}{
		{[]envCopy{{gone, 0, testEnvSize}}, gone},
		{[]envCopy{{gone, 0, testEnvSize}, {gone + "2", 0, testEnvSize}}, gone},
		{[]envCopy{{a, 0, testEnvSize}, {"/dev/mmcblk77", 0, testEnvSize}}, "/dev/mmcblk77"},
		{[]envCopy{{"/dev/mmcblk77", 0, testEnvSize}, {a, 0, testEnvSize}}, "/dev/mmcblk77"},
		{[]envCopy{{a, 0, testEnvSize}, {dir, 0, testEnvSize}}, dir},
	} {
		env := testNative("fw.config", c.copies, openStorage)
		_, err := env.vars(t.Context())
		wantErr(t, err, `"fw.config" names`, c.want)
		if h := hintOf(err); exitCode(err) != exitRefused || strings.Contains(h, "saveenv") ||
			!strings.Contains(h, "do not write a new one") {
			t.Errorf("%v: exit code %d, hint %q", c.copies, exitCode(err), h)
		}
	}
	env := testNative("fw.config", []envCopy{{a, 0, testEnvSize}, {gone, 0, testEnvSize}}, openStorage)
	writeFile(t, a, string(envBytes(testEnvSize, 8, 0, "a=1")[:4])+"\x08"+string(envBytes(testEnvSize, 8, 0, "a=1")[5:]))
	if got, err := env.vars(t.Context()); err != nil || got["a"] != "1" {
		t.Errorf("the second file was never made: got %v, %v", got, err)
	}
	for what, err := range map[string]error{"set": env.set(t.Context(), []envVar{{"a", "2"}}),
		"check": env.check(t.Context(), []envVar{{"a", "2"}})} {
		if wantErr(t, err, gone); exitCode(err) != exitRefused || !strings.Contains(hintOf(err), "truncate") {
			t.Errorf("%s: exit code %d, hint %q", what, exitCode(err), hintOf(err))
		}
	}
	if _, err := os.Stat(gone); err == nil {
		t.Error("it was made")
	}
}

// What set would refuse is known before, and nothing changes by asking.
func TestEnvCheck(t *testing.T) {
	d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), envBytes(testEnvSize, 7, 0, "a=0"))
	before := slices.Clone(d.data)
	if err := env.check(t.Context(), []envVar{{"a", "2"}}); err != nil {
		t.Errorf("got %v", err)
	}
	if err := env.check(t.Context(), []envVar{{"b", strings.Repeat("x", testEnvSize)}}); exitCode(err) != exitRefused {
		t.Errorf("full: got %v", err)
	}
	open := env.open
	for errno, want := range map[syscall.Errno]int{syscall.EROFS: exitRefused, syscall.EACCES: exitRefused,
		syscall.EPERM: exitRefused, syscall.ENFILE: exitTempFail} {
		env.open = func(path string, how openMode) (storage, error) {
			if how != openRead {
				return nil, &os.PathError{Op: "open", Path: path, Err: errno}
			}
			return open(path, how)
		}
		for what, err := range map[string]error{"check": env.check(t.Context(), nil),
			"set": env.set(t.Context(), []envVar{{"a", "2"}})} {
			if wantErr(t, err, "cannot be written", errno.Error()); exitCode(err) != want {
				t.Errorf("%s, %v: exit code %d, want %d", what, errno, exitCode(err), want)
			}
		}
	}
	if d.writes != 0 || d.syncs != 0 || !bytes.Equal(d.data, before) {
		t.Errorf("something was written")
	}
}

// The kernel takes a read-only block device to be opened for writing; sysfs tells. The protection of an eMMC boot
// partition is taken off for a change, if it can be (Linux, Documentation/ABI/testing/sysfs-block and
// driver-api/mmc/mmc-dev-parts.rst).
func TestEnvWriteProtected(t *testing.T) {
	const boot, disk = "mmcblk2boot1", "mmcblk2"
	for _, c := range []struct {
		name, device, want string
		files              map[string]string
	}{
		{"writable", disk, "", map[string]string{"ro": "0\n"}},
		{"no sysfs", disk, "", nil},
		{"read-only", disk, "is read-only", map[string]string{"ro": "1\n"}},
		{"locked, as it comes", boot, "", map[string]string{"ro": "1\n", "force_ro": "1\n",
			"ro_lock_until_next_power_on": "0\n"}},
		{"unlocked", boot, "", map[string]string{"ro": "0\n", "force_ro": "0\n"}},
		{"locked for this power cycle", boot, "until it loses power",
			map[string]string{"ro": "1\n", "force_ro": "1\n", "ro_lock_until_next_power_on": "1\n"}},
		{"locked for good", boot, "for good", map[string]string{"ro": "1\n", "force_ro": "1\n",
			"ro_lock_until_next_power_on": "2\n"}},
		{"another reason", boot, "is read-only", map[string]string{"ro": "1\n", "force_ro": "0\n"}},
		{"force_ro of another kind of device", disk, "is read-only", map[string]string{"ro": "1\n", "force_ro": "1\n"}},
	} {
		d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), envBytes(testEnvSize, 7, 0, "a=0"))
		env.root = t.TempDir()
		dir := filepath.Join(env.root, "sys/class/block", c.device)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range c.files {
			writeFile(t, filepath.Join(dir, name), text)
		}
		for i := range env.copies {
			env.copies[i].path = "/dev/" + c.device
		}
		err := env.check(t.Context(), []envVar{{"a", "2"}})
		if (err == nil) != (c.want == "") || err != nil &&
			(!strings.Contains(err.Error(), c.want) || exitCode(err) != exitRefused) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
		for name, text := range c.files {
			if got, _ := os.ReadFile(filepath.Join(dir, name)); string(got) != text {
				t.Errorf("%s: %s became %q", c.name, name, got)
			}
		}
		if d.writes != 0 {
			t.Errorf("%s: something was written", c.name)
		}
	}
}

// Whatever stands in the place of the lock file, which every user may put there, nothing waits for it.
func TestEnvLockTraps(t *testing.T) {
	for name, trap := range map[string]func(path string) error{
		"a named pipe":       func(p string) error { return syscall.Mkfifo(p, 0o666) },
		"a folder":           func(p string) error { return os.Mkdir(p, 0o755) },
		"a link":             func(p string) error { return os.Symlink("/etc/passwd", p) },
		"a link to nothing":  func(p string) error { return os.Symlink(p+"2", p) },
		"a character device": func(p string) error { return os.Symlink("/dev/zero", p) },
		"no place for it":    func(p string) error { return os.RemoveAll(filepath.Dir(p)) },
	} {
		dir := t.TempDir()
		img, lock := filepath.Join(dir, "env"), filepath.Join(dir, "lock/fw")
		writeFile(t, img, string(envBytes(testEnvSize, -1, 0, "a=1")))
		if err := errors.Join(os.Mkdir(filepath.Dir(lock), 0o777), trap(lock)); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		env := testNative("c", []envCopy{{img, 0, testEnvSize}}, openStorage)
		env.lockFile, env.lg = lock, newLogger(&log)
		if err := env.set(t.Context(), []envVar{{"a", "2"}}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if told := strings.Contains(log.String(), lock); told == (name == "no place for it") {
			t.Errorf("%s: got %q", name, &log)
		}
		// The device is locked instead.
		held, err := os.Open(img)
		if err != nil {
			t.Fatal(err)
		}
		if err := flock(t.Context(), held, 0, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := env.vars(t.Context()); exitCode(err) != exitTempFail {
			t.Errorf("%s, device locked: got %v", name, err)
		}
		held.Close()
		if _, err := os.Stat(lock + "2"); err == nil {
			t.Errorf("%s: the link was followed", name)
		}
	}
}

// A lock that another program has is waited for: ten seconds, and no longer than until a signal comes.
func TestEnvLockHeld(t *testing.T) {
	dir := t.TempDir()
	img, lock := filepath.Join(dir, "env"), filepath.Join(dir, "lock")
	writeFile(t, img, string(envBytes(testEnvSize, -1, 0, "a=1")))
	writeFile(t, lock, "")
	held, err := os.Open(lock)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := flock(t.Context(), held, 0, nil); err != nil {
		t.Fatal(err)
	}
	env := testNative("c", []envCopy{{img, 0, testEnvSize}}, openStorage)
	env.lockFile = lock
	var slept time.Duration
	env.sleep = func(ctx context.Context, d time.Duration) error { slept += d; return ctx.Err() }
	for what, err := range map[string]error{"set": env.set(t.Context(), []envVar{{"a", "2"}}),
		"check": env.check(t.Context(), nil)} {
		if wantErr(t, err, lock, "locked"); exitCode(err) != exitTempFail {
			t.Errorf("%s: exit code %d", what, exitCode(err))
		}
	}
	if slept != 2*envLockWait {
		t.Errorf("waited for %v, want twice %v", slept, envLockWait)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	stop(errors.New("a signal"))
	env.sleep = sleepContext
	if _, err := env.vars(ctx); exitCode(err) != exitTempFail || !strings.Contains(fmt.Sprint(err), "a signal") {
		t.Errorf("told to end: got %v", err)
	}
}

// A tool that fails, or finds no copy, is asked again: it does not tell what may pass. What it cannot be asked to
// write is known before.
func TestEnvToolsUnreadable(t *testing.T) {
	fails := "n=$(($(cat \"$state.n\" 2>/dev/null) + 0)); echo $((n + 1)) >\"$state.n\"; [ $n -ge %d ] || { %s; }\n"
	open := func(print string) (bootEnv, string) {
		dir := fakeTools(t, map[string]string{"fw_printenv": print + printScript, "fw_setenv": equalScript})
		writeFile(t, dir+"/state", "a=1\nmender_uboot_separator=1\n")
		writeFile(t, dir+"/none", dir+"/state 0 0x1000\n")
		env, err := openBootEnv(&config{BootEnv: "fw_setenv", FwEnvConfig: dir + "/none"}, testHost(openStorage))
		must(t, err)
		return env, dir
	}
	for says, want := range map[string]int{
		"echo Input/output error >&2; exit 1":               exitTempFail,
		"echo 'Cannot read environment, using default' >&2": exitRefused,
	} {
		env, _ := open(fmt.Sprintf(fails, len(envReads), says))
		if got, err := env.vars(t.Context()); err != nil || got["a"] != "1" {
			t.Errorf("%s, a few times: got %v, %v", says, got, err)
		}
		env, dir := open(fmt.Sprintf(fails, 1000, says))
		for what, err := range map[string]error{"set": env.set(t.Context(), []envVar{{"a", "2"}}),
			"check": env.check(t.Context(), nil)} {
			var touched *envChangeError
			if exitCode(err) != want || errors.As(err, &touched) {
				t.Errorf("%s, %s: got %v, exit code %d, want %d", says, what, err, exitCode(err), want)
			}
		}
		if calls, _ := os.ReadFile(dir + "/calls"); strings.Contains(string(calls), "fw_setenv") {
			t.Errorf("%s: it was written", says)
		}
	}
	// Told to end, nobody waits for a tool that waits for its lock.
	ctx, stop := context.WithCancel(t.Context())
	env, dir := open("mkfifo \"$state.w\"; read -r x <\"$state.w\"\n")
	go func() {
		for _, err := os.Stat(dir + "/state.w"); err != nil; _, err = os.Stat(dir + "/state.w") {
		}
		stop()
	}()
	if _, err := env.vars(ctx); exitCode(err) != exitTempFail || !errors.Is(err, context.Canceled) {
		t.Errorf("told to end: got %v", err)
	}
	// A tool that is missing, and a device that cannot be written (sysfs has no such file for root either).
	dir = fakeTools(t, map[string]string{"fw_printenv": printScript})
	if _, err := openBootEnv(&config{BootEnv: "fw_setenv", FwEnvConfig: dir + "/none"},
		testHost(openStorage)); exitCode(err) != exitRefused {
		t.Errorf("no fw_setenv: got %v", err)
	}
	const seqnum = "/sys/kernel/uevent_seqnum"
	if f, err := os.OpenFile(seqnum, os.O_RDWR, 0); err == nil {
		f.Close()
		t.Skip("needs a file that nobody may write: ", seqnum)
	}
	_, dir = open("")
	writeFile(t, dir+"/none", seqnum+" 0 0x1000\n")
	env, err := openBootEnv(&config{BootEnv: "fw_setenv", FwEnvConfig: dir + "/none"}, testHost(openStorage))
	must(t, err)
	if err := env.check(t.Context(), nil); exitCode(err) != exitRefused || !strings.Contains(err.Error(), seqnum) {
		t.Errorf("a device that cannot be written: got %v", err)
	}
}
