// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// A link is a slow line between two network namespaces: two TUN devices, and packets that are carried from one to
// the other at a rate, after a delay. netem does the same, where the kernel has it; this counts, too, what arrives.
type link struct {
	perByte time.Duration // of either direction
	delay   time.Duration // one way
	queue   time.Duration // what waits longer than this is dropped, as by the router before a line

	mu      sync.Mutex
	waiting int       // packets on the way
	last    time.Time // when one came or went
	down    int64     // TCP payload that has arrived at the client, bytes
	opened  int       // connections
}

// linkMain carries packets until it is killed. At SIGUSR1 it waits until the line is silent, writes what has arrived
// since the last time into the file, "BYTES CONNECTIONS", and begins at zero.
func linkMain(args []string) error {
	fl := flag.NewFlagSet("link", flag.ContinueOnError)
	rate := fl.Int64("rate", 10_000_000, "bits a second")
	rtt := fl.Duration("rtt", 50*time.Millisecond, "round trip")
	server := fl.String("server", "", "name of the server's device")
	client := fl.String("client", "", "name of the client's device")
	stat := fl.String("stat", "", "file that is written at SIGUSR1, and now")
	if err := fl.Parse(args); err != nil {
		return err
	}
	l := &link{perByte: time.Duration(8e9 / *rate), delay: *rtt / 2, queue: 100 * time.Millisecond}
	s, err := openTun(*server)
	if err != nil {
		return err
	}
	c, err := openTun(*client)
	if err != nil {
		return err
	}
	usr1 := make(chan os.Signal, 1)
	signal.Notify(usr1, syscall.SIGUSR1)
	failed := make(chan error, 2)
	go func() { failed <- l.carry(s, c, true) }()
	go func() { failed <- l.carry(c, s, false) }()
	for {
		if err := os.WriteFile(*stat+".new", []byte(l.report()), 0o644); err != nil {
			return err
		}
		if err := os.Rename(*stat+".new", *stat); err != nil {
			return err
		}
		select {
		case err := <-failed:
			return err
		case <-usr1:
			for !l.silent() {
				time.Sleep(l.delay)
			}
		}
	}
}

func (l *link) silent() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.waiting == 0 && time.Since(l.last) > 6*l.delay
}

func (l *link) report() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := fmt.Sprintf("%d %d\n", l.down, l.opened)
	l.down, l.opened = 0, 0
	return s
}

// carry is one direction; down is that to the client.
func (l *link) carry(from, to *os.File, down bool) error {
	type packet struct {
		data []byte
		at   time.Time
	}
	line := make(chan packet, 4096)
	defer close(line)
	go func() {
		for p := range line {
			time.Sleep(time.Until(p.at))
			to.Write(p.data) // a device that is down loses packets, as a line does
			l.arrived(p.data, down)
		}
	}()
	var free time.Time // when the line has sent all that it was given
	for buf := make([]byte, 65536); ; {
		n, err := from.Read(buf)
		if err != nil {
			return fmt.Errorf("%s: %w", from.Name(), err)
		}
		now := time.Now()
		if free.Before(now) {
			free = now
		}
		if free.Sub(now) > l.queue {
			continue
		}
		free = free.Add(time.Duration(n) * l.perByte)
		l.mu.Lock()
		l.waiting++
		l.mu.Unlock()
		line <- packet{append([]byte(nil), buf[:n]...), free.Add(l.delay)}
	}
}

func (l *link) arrived(p []byte, down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting--
	l.last = time.Now()
	n, syn := payload(p)
	if down {
		l.down += int64(n)
		if syn {
			l.opened++
		}
	}
}

// payload is how much of an IPv4 packet is TCP's payload (RFC 791, RFC 9293), and whether it opens a connection; of
// other packets it is nothing.
func payload(p []byte) (n int, syn bool) {
	if len(p) < 20 || p[0]>>4 != 4 || p[9] != syscall.IPPROTO_TCP {
		return 0, false
	}
	header, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
	if total > len(p) || total < header+20 {
		return 0, false
	}
	return max(0, total-header-int(p[header+12]>>4)*4), p[header+13]&2 != 0
}

// openTun makes a TUN device of packets without a header of their own (Documentation/networking/tuntap.rst). It lives
// as long as the file is open, in whichever namespace it is put.
func openTun(name string) (*os.File, error) {
	fd, err := syscall.Open("/dev/net/tun", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	var req [40]byte // struct ifreq: name, flags
	copy(req[:15], name)
	binary.NativeEndian.PutUint16(req[16:], syscall.IFF_TUN|syscall.IFF_NO_PI)
	_, _, no := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.TUNSETIFF, uintptr(unsafe.Pointer(&req)))
	if no != 0 {
		syscall.Close(fd)
		return nil, fmt.Errorf("device %q: %w", name, no)
	}
	return os.NewFile(uintptr(fd), name), nil
}
