// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"
)

// vm is a running QEMU with its serial console on pipes and its disk served by this process.
type vm struct {
	cmd   *exec.Cmd
	disk  *disk
	l     net.Listener
	in    io.Writer
	mu    sync.Mutex
	text  []byte // what the console printed
	pos   int    // what wait has gone past
	news  chan struct{}
	gone  chan struct{}
	start time.Time
}

var errCut = errors.New("the power was cut")

// startVM must be called on a locked thread: the parent-death signal, which leaves no QEMU behind,
// follows the thread.
func startVM(out, diskPath, bus string, keepLog bool, console io.Writer) (*vm, error) {
	d, err := openDisk(diskPath)
	if err != nil {
		return nil, err
	}
	d.keepLog, d.through = keepLog, bus == "sd"
	dir, err := os.MkdirTemp("", "rig")
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", filepath.Join(dir, "nbd"))
	if err != nil {
		return nil, err
	}
	go d.serve(l)
	args := []string{"-M", "virt", "-cpu", "cortex-a53", "-m", "256", "-display", "none", "-monitor", "none",
		"-serial", "stdio", "-bios", filepath.Join(out, "u-boot.bin"),
		"-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=",
		"-blockdev", "driver=nbd,node-name=d0,server.type=unix,server.path=" + l.Addr().String()}
	if bus == "sd" {
		args = append(args, "-device", "sdhci-pci", "-device", "sd-card,drive=d0")
	} else {
		args = append(args, "-device", "virtio-blk-pci,drive=d0")
	}
	v := &vm{cmd: exec.Command("qemu-system-aarch64", args...), disk: d, l: l,
		news: make(chan struct{}, 1), gone: make(chan struct{}), start: time.Now()}
	v.cmd.Stderr = os.Stderr
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err1 := v.cmd.StdinPipe()
	stdout, err2 := v.cmd.StdoutPipe()
	if err := errors.Join(err1, err2, v.cmd.Start()); err != nil {
		return nil, err
	}
	v.in = stdin
	go func() {
		io.Copy(io.MultiWriter(console, v), stdout)
		v.cmd.Wait()
		os.RemoveAll(dir)
		close(v.gone)
	}()
	return v, nil
}

// Write takes what the console prints.
func (v *vm) Write(p []byte) (int, error) {
	v.mu.Lock()
	v.text = append(v.text, p...)
	v.mu.Unlock()
	select {
	case v.news <- struct{}{}:
	default:
	}
	return len(p), nil
}

// wait waits for the pattern in what the console has printed since the last match, and returns
// that text up to the end of the match. It ends early with errCut when the channel closes.
func (v *vm) wait(re string, limit time.Duration, cut <-chan struct{}) (string, error) {
	r := regexp.MustCompile(re)
	end := time.After(limit)
	for {
		v.mu.Lock()
		text := v.text[v.pos:]
		m := r.FindIndex(text)
		if m != nil {
			v.pos += m[1]
		}
		v.mu.Unlock()
		if m != nil {
			return string(text[:m[1]]), nil
		}
		select {
		case <-v.news:
		case <-cut:
			return string(text), errCut
		case <-v.gone:
			return "", fmt.Errorf("qemu ended while waiting for %q; console:\n%s", re, tail(text))
		case <-end:
			return "", fmt.Errorf("nothing like %q for %v; console:\n%s", re, limit, tail(text))
		}
	}
}

func tail(b []byte) []byte { return bytes.TrimSpace(b[max(0, len(b)-3000):]) }

func (v *vm) send(s string) error {
	_, err := io.WriteString(v.in, s+"\n")
	return err
}

// kill is the power cut as far as QEMU is concerned: it dies by SIGKILL.
func (v *vm) kill() {
	v.cmd.Process.Kill()
	<-v.gone
	v.l.Close()
}

// powerOff is an orderly end.
func (v *vm) powerOff() error {
	if err := v.send("sync; poweroff -f"); err != nil {
		return err
	}
	select {
	case <-v.gone:
	case <-time.After(30 * time.Second):
		v.kill()
		return errors.New("the device did not power off")
	}
	v.l.Close()
	return v.disk.close()
}
