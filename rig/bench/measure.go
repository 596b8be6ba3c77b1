// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// measured is what one run took.
type measured struct {
	wall  float64 // seconds until the program ended and a further fsync of the device returned
	cpu   float64 // seconds, user and system, of the program and what it started
	rss   float64 // bytes; see watch
	wrote int64   // bytes that reached the block device

	conns, bytes int64 // of a poll: connections, and what went over them both ways
}

// command runs a program and everything that it starts. A service that does the work is
// measured with it.
func command(cmd *exec.Cmd, service *exec.Cmd, after func() error) (measured, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return measured{}, err
	}
	pids := []int{cmd.Process.Pid}
	if service != nil {
		pids = append(pids, service.Process.Pid)
	}
	stop := watch(pids)
	err := cmd.Wait()
	if err == nil && after != nil {
		err = after()
	}
	m := measured{wall: time.Since(begin).Seconds(), rss: stop()}
	if err != nil {
		return m, fmt.Errorf("%w: %s", err, lastLines(out.String(), 3))
	}
	m.addUsage(cmd.ProcessState)
	if service != nil {
		service.Process.Signal(syscall.SIGTERM)
		service.Wait()
		m.addUsage(service.ProcessState)
	}
	return m, nil
}

// measureMain runs a program and prints its time in seconds and its memory in bytes.
func measureMain(args []string) error {
	if len(args) == 0 {
		return errors.New("no program to measure")
	}
	m, err := command(exec.Command(args[0], args[1:]...), nil, nil)
	if err == nil {
		fmt.Printf("%.1f %.0f\n", m.wall, m.rss)
	}
	return err
}

func (m *measured) addUsage(s *os.ProcessState) {
	m.cpu += (s.UserTime() + s.SystemTime()).Seconds()
}

// watch looks at the largest resident set that each of the processes has had 200 times a second
// (VmHWM, proc(5); what wait4 says of a program begins with the memory of this one, which started
// it), and adds up the memory of the processes and their children 20 times a second: what they
// share is counted once (PSS). The function that it gives ends that and says the peak.
func watch(pids []int) (stop func() float64) {
	done := make(chan bool)
	peak := 0.0
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(5 * time.Millisecond)
		defer t.Stop()
		for n := 1; ; n++ {
			for _, p := range pids {
				peak = max(peak, field(fmt.Sprintf("/proc/%d/status", p), "VmHWM:"))
			}
			if n%10 == 0 {
				sum := 0.0
				for _, p := range pids {
					sum += treePSS(p)
				}
				peak = max(peak, sum)
			}
			select {
			case <-done:
				return
			case <-t.C:
			}
		}
	})
	return func() float64 { close(done); wg.Wait(); return peak }
}

func treePSS(pid int) float64 {
	dir := fmt.Sprintf("/proc/%d/", pid)
	sum := field(dir+"smaps_rollup", "Pss:")
	lists, _ := filepath.Glob(dir + "task/*/children")
	for _, l := range lists {
		c, _ := os.ReadFile(l)
		for _, f := range strings.Fields(string(c)) {
			if n, err := strconv.Atoi(f); err == nil {
				sum += treePSS(n)
			}
		}
	}
	return sum
}

// field reads a line of KiB from a file of proc, in bytes; 0 where a process has just ended.
func field(file, name string) float64 {
	s, _ := os.ReadFile(file)
	for line := range strings.Lines(string(s)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			kib, _ := strconv.ParseFloat(f[1], 64)
			return kib * 1024
		}
	}
	return 0
}

// install puts the slot into its previous state, lets the peer work, and checks what it did.
func (b *bench) install(p *peer, r row) (measured, error) {
	from := b.other
	if r.same {
		from = b.image
	}
	if err := b.fill(from); err != nil {
		return measured{}, err
	}
	cmd, service, err := p.start(r)
	if err != nil {
		return measured{}, err
	}
	before, err := b.written()
	if err != nil {
		return measured{}, err
	}
	m, err := command(cmd, service, b.flush)
	if service != nil && service.ProcessState == nil {
		service.Process.Kill()
		service.Wait()
	}
	if err != nil {
		return m, err
	}
	after, err := b.written()
	if err != nil {
		return m, err
	}
	m.wrote = after - before
	return m, b.verify()
}

// fill writes a file to the slot, and leaves nothing dirty and nothing cached of the device.
func (b *bench) fill(from string) error {
	_, err := output("dd", "if="+from, "of="+b.slotB, "bs=4M", "oflag=direct", "conv=fsync,notrunc")
	if err != nil {
		return err
	}
	return b.dropCache()
}

// BLKFLSBUF of linux/fs.h.
const blkFlsBuf = 0x1261

func (b *bench) dropCache() error {
	f, err := os.OpenFile(b.slotB, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), blkFlsBuf, 0); errno != 0 {
		return fmt.Errorf("BLKFLSBUF of %q: %w", b.slotB, errno)
	}
	return nil
}

func (b *bench) flush() error {
	f, err := os.OpenFile(b.slotB, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// verify reads the slot past what the updater left in the cache.
func (b *bench) verify() error {
	if err := b.dropCache(); err != nil {
		return err
	}
	f, err := os.Open(b.slotB)
	if err != nil {
		return err
	}
	defer f.Close()
	sum, n, err := sumOf(io.LimitReader(f, b.size))
	if err != nil {
		return err
	}
	if sum != b.sum || n != b.size {
		return fmt.Errorf("the slot does not have the image: %d bytes with SHA-256 %x, want %d with %x", n, sum, b.size, b.sum)
	}
	return nil
}

func sumOf(r io.Reader) (sum [32]byte, n int64, err error) {
	h := sha256.New()
	n, err = io.CopyBuffer(h, r, make([]byte, 1<<20))
	return [32]byte(h.Sum(nil)), n, err
}

// written is the 7th field of the device's stat: sectors of 512 bytes (Documentation/block/stat.rst).
func (b *bench) written() (int64, error) {
	name := "/sys/block/" + filepath.Base(b.slotB) + "/stat"
	s, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(s))
	if len(f) < 7 {
		return 0, fmt.Errorf("%q: got %d fields, want 7 or more", name, len(f))
	}
	n, err := strconv.ParseInt(f[6], 10, 64)
	return n * 512, err
}

// floor is what no updater that is built of the same parts can get below.
type floor struct {
	name string
	arg  []string
}

func (b *bench) floors() []floor {
	return []floor{
		{"sha256sum of the image", []string{"sha256sum", b.image}},
		{"dd conv=fsync to the slot", []string{"dd", "if=" + b.image, "of=" + b.slotB, "bs=1M", "conv=fsync,notrunc"}},
		{"gzip -dc, to nowhere", []string{"gzip", "-dc", b.payload("gzip")}},
		{"xz -dc, to nowhere", []string{"xz", "-dc", b.payload("xz")}},
		{"zstd -dc, to nowhere", []string{"zstd", "-dcq", b.payload("zstd")}},
	}
}

func (f floor) measure(b *bench) (measured, error) {
	if f.arg[0] == "dd" {
		if err := b.fill(b.other); err != nil {
			return measured{}, err
		}
	}
	cmd := exec.Command(f.arg[0], f.arg[1:]...)
	begin := time.Now()
	if err := cmd.Run(); err != nil { // output to nowhere
		return measured{}, err
	}
	m := measured{wall: time.Since(begin).Seconds()}
	m.addUsage(cmd.ProcessState)
	return m, nil
}

func output(name string, arg ...string) (string, error) {
	cmd := exec.Command(name, arg...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(name), err, lastLines(string(out), 3))
	}
	return string(out), nil
}

func lastLines(s string, n int) string {
	l := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(l[max(0, len(l)-n):], " | ")
}
