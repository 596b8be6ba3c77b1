// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

// builtProgram is the program as it is shipped: the test's own binary would count its tests.
func builtProgram(t testing.TB) string {
	path := filepath.Join(t.TempDir(), "mendlet")
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "nethttpomithttp2", "-ldflags", "-s -w", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("needs a Go toolchain: %v: %s", err, out)
	}
	return path
}

// boardFiles makes a board in dir: two slots, a boot environment, a mender.conf.
func boardFiles(t testing.TB, dir string, slotSize int64, conf string) {
	env := readFileOrNil("testdata/demo-env.img")
	for name, text := range map[string]string{
		"env":           string(env),
		"fw_env.config": envOf(dir, simEnvSize),
		"device_type":   "device_type=sim\n",
		"mender.conf": fmt.Sprintf(`{"RootfsPartA": "%s/p2", "RootfsPartB": "%s/p3", "FwEnvConfig": "%s/fw_env.config",
			"DeviceTypeFile": "%s/device_type", "BootEnv": "native", "RetryDownloadCount": 1 %s}`, dir, dir, dir, dir, conf),
		"none": "{}",
		"lock": "",
		"p2":   "old",
		"p3":   "junk",
	} {
		writeFile(t, filepath.Join(dir, name), text)
	}
	for _, p := range []string{"p2", "p3"} {
		if err := os.Truncate(filepath.Join(dir, p), slotSize); err != nil {
			t.Fatal(err)
		}
	}
}

// bigImage makes a sparse file of n bytes with a piece of noise in each MiB.
func bigImage(t testing.TB, n int64) string {
	path := filepath.Join(t.TempDir(), "root.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	noise := make([]byte, 60<<10)
	rand.New(rand.NewSource(8)).Read(noise)
	for off := int64(0); off < n && err == nil; off += 1 << 20 {
		_, err = f.WriteAt(noise[:32<<10+off>>20%28<<10], off)
	}
	if err == nil {
		err = f.Truncate(n)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func fastDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "mendlet-chain") // syncs on a disk would cost most of the time
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// readFileOrNil is for a file that a tool may or may not have written.
func readFileOrNil(path string) []byte {
	b, _ := os.ReadFile(path)
	return b
}

func writeTemp(t testing.TB, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func putScript(t *testing.T, dir, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// As in dir.write: until its exec, a child of a parallel test has what is open now, and a script that somebody has
	// open for writing cannot be run.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func writeScript(t *testing.T, path, body string, mode os.FileMode) {
	t.Helper()
	putScript(t, filepath.Dir(path), filepath.Base(path), "#!/bin/sh\n"+body+"\n", 0o600)
	must(t, os.Chmod(path, mode))
}

// forked has what this process has open of path open until the test ends, as a child would that is forked now and does
// not come to its exec.
func forked(t *testing.T, path string) {
	t.Helper()
	n := 0
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && to == path {
			old, _ := strconv.Atoi(filepath.Base(fd))
			kept, err := syscall.Dup(old)
			must(t, err)
			t.Cleanup(func() { syscall.Close(kept) })
			n++
		}
	}
	if n == 0 {
		t.Fatalf("%q is not open", path)
	}
}

// look gives the contents of a file, "" when there is none.
func look(path string) string {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err.Error()
	}
	return string(text)
}

// changeJournal changes what the journal in ds says.
func changeJournal(t testing.TB, ds string, change func(*record)) {
	t.Helper()
	j, rec, err := openJournal(ds, nil)
	must(t, err)
	change(rec)
	must(t, j.save(rec))
	must(t, j.close())
}

// envOf is a fw_env.config for two copies in DIR/env, in the form that can name a lock file: boards beside each other
// are not to wait for that of this machine.
func envOf(dir string, size int) string {
	return fmt.Sprintf("uboot:\n  size: %#x\n  lockfile: %s/lock\n  devices:\n    - path: %[2]s/env\n      offset: 0\n"+
		"    - path: %[2]s/env\n      offset: %[1]d\n", size, dir)
}
