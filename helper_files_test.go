// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
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
		"fw_env.config": fmt.Sprintf("%s/env 0x0 %#x\n%s/env %#x %#x\n", dir, simEnvSize, dir, simEnvSize, simEnvSize),
		"device_type":   "device_type=sim\n",
		"mender.conf": fmt.Sprintf(`{"RootfsPartA": "%s/p2", "RootfsPartB": "%s/p3", "FwEnvConfig": "%s/fw_env.config",
			"DeviceTypeFile": "%s/device_type", "BootEnv": "native", "RetryDownloadCount": 1 %s}`, dir, dir, dir, dir, conf),
		"none": "{}",
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
