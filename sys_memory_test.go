// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// peakLimit is what the program may need in all, in bytes, for artifacts in gzip or
// uncompressed: a board of 24 MiB has to have room for it.
const peakLimit = 16 << 20

// peak runs the program and gives the largest resident set that the kernel has seen (proc(5),
// VmHWM), in bytes. What wait4 says would count the parent, too.
func peak(t testing.TB, program string, args ...string) int64 {
	cmd := exec.Command(program, args...)
	errw := &strings.Builder{}
	cmd.Stderr = errw
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- cmd.Wait() }()
	most := int64(0)
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("%v\n%s", err, errw)
			}
			return most
		default:
		}
		most = max(most, highWater(cmd.Process.Pid))
	}
}

func highWater(pid int) int64 {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if kb, ok := strings.CutPrefix(s.Text(), "VmHWM:"); ok {
			n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(kb), " kB"), 10, 64)
			return n << 10
		}
	}
	return 0
}

func installPeak(t testing.TB, program, compression string, size int64) int64 {
	img := bigImage(t, size)
	artifact := filepath.Join(t.TempDir(), "a.mender")
	if err := packCommand([]string{"-n", "new", "-c", "sim", "-f", img, "--compression", compression, "-o", artifact},
		io.Discard, nil); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	boardFiles(t, dir, size, "")
	return peak(t, program, "-c", dir+"/mender.conf", "-b", dir+"/none", "-d", dir, "--running", "A", "install", artifact)
}

func TestPeakMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("short: builds the program and installs 128 MiB")
	}
	t.Parallel()
	program := builtProgram(t)
	for _, compression := range []string{"none", "gzip"} {
		most := installPeak(t, program, compression, 128<<20)
		t.Logf("%s: %.1f MiB", compression, float64(most)/(1<<20))
		if most > peakLimit {
			t.Errorf("%s: %d bytes resident at most, want %d", compression, most, peakLimit)
		}
	}
}

func BenchmarkMemory(b *testing.B) {
	program := builtProgram(b)
	for _, compression := range []string{"none", "gzip", "xz"} {
		b.Run(compression, func(b *testing.B) {
			for b.Loop() {
				b.ReportMetric(float64(installPeak(b, program, compression, 128<<20))/(1<<20), "MiB-peak")
			}
		})
	}
}
