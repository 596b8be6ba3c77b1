// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"context"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// inProcess runs the verb in this process, with waits of a millisecond, against a relay. stop ends it and waits.
func inProcess(t *testing.T, f *connectFlags, log io.Writer) (r *relay, stop func()) {
	b := newVerbBoard(t)
	r = newRelay(t)
	b.server = r.testServer
	b.setup()
	o := newOptions()
	o.fallback, o.paths = b.dir+"/none", paths{b.dir + "/etc", b.dir + "/share", b.dir + "/var"}
	a, err := newApp(o, newLogger(log), strings.NewReader(""), io.Discard, urlSource)
	must(t, err)
	a.m.sleep = func(ctx context.Context, _ time.Duration) error { return sleepContext(ctx, time.Millisecond) }
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.connect(ctx, a) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("connect: %v", err)
		}
	})
	t.Cleanup(stop)
	return r, stop
}

// holdings counts what this process has: descriptors, child processes, goroutines.
func holdings() [3]int {
	fds, _ := os.ReadDir("/proc/self/fd")
	return [3]int{len(fds), len(children()), runtime.NumGoroutine()}
}

// children are the numbers of this process's, those included that have ended and were not waited for.
func children() (list []string) {
	paths, _ := filepath.Glob("/proc/self/task/*/children")
	for _, path := range paths {
		list = append(list, strings.Fields(look(path))...)
	}
	return list
}

// settles waits until this process holds no more than it did; what others close takes a moment.
func settles(t *testing.T, before [3]int) {
	t.Helper()
	var now [3]int
	for end := time.Now().Add(relayGuard); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		now = holdings()
		if now[0] <= before[0] && now[1] <= before[1] && now[2] <= before[2] {
			t.Logf("%d descriptors, %d children, %d goroutines, as before: %d", now[0], now[1], now[2], before)
			return
		}
	}
	stacks := make([]byte, 1<<20)
	t.Errorf("got %d descriptors, %d children (%q), %d goroutines, want %d\n%s", now[0], now[1], children(), now[2],
		before, stacks[:runtime.Stack(stacks, true)])
}

// marked tells whether a process with this word on its command line runs.
func marked(word string) bool {
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	return slices.ContainsFunc(paths, func(p string) bool { return strings.Contains(string(readFileOrNil(p)), word) })
}

// 500 connections that end in all ways, with a shell on each, leave nothing behind.
func TestConnections500(t *testing.T) {
	onlyExhaustive(t, "500 connections")
	r, stop := inProcess(t, &connectFlags{terminal: true, retry: true}, io.Discard)
	var before [3]int
	for n := range 500 {
		id := r.device()
		if n == 3 { // connections to the relay and files that are opened once
			before = holdings()
		}
		r.at.Lock()
		l, links := r.devices[id], r.links
		r.at.Unlock()
		if n > 3 {
			u := r.user("user-1")
			u.say(protoShell, "new", nil, nil)
			u.reply("new")
		}
		switch n % 5 {
		case 0:
			l.Close()
		case 1:
			l.end(1011, "sorry")
		case 2:
			l.Write([]byte{0x82, 0x81, 1, 2, 3, 4, 5}) // masked
		case 3:
			l.send(frameBinary, []byte{0xc1})
		case 4:
			l.Conn.(interface{ SetLinger(int) error }).SetLinger(0)
			l.Close()
		}
		r.until("the next connection", func() bool { return r.links > links && len(r.devices) == 1 })
	}
	r.until("the end of all sessions", func() bool { return len(r.sessions) == 0 })
	settles(t, before)
	stop()
	settles(t, before)
}

// 500 sessions that end in all ways leave nothing behind, be it a process that wants to stay.
func TestSessions500(t *testing.T) {
	onlyExhaustive(t, "500 sessions, some of which take two seconds to end")
	r, stop := inProcess(t, &connectFlags{terminal: true}, io.Discard)
	r.device()
	before := holdings()
	word := fmt.Sprintf("%d.%06d", 100000+os.Getpid(), rand.Intn(1e6)) // seconds of sleep
	var wg sync.WaitGroup
	for worker := range 6 {
		wg.Go(func() {
			for n := worker; n < 500; n += 6 {
				killedSession(t, r, fmt.Sprintf("user-%d", worker), n, word)
			}
		})
	}
	wg.Wait()
	r.until("the end of all sessions", func() bool { return len(r.sessions) == 0 })
	settles(t, before)
	if marked(word) {
		t.Errorf("a process %q is left", "sleep "+word)
	}
	stop()
	settles(t, before)
}

// killedSession is a terminal that ends in one of some ways.
func killedSession(t *testing.T, r *relay, user string, n int, word string) {
	u := r.user(user)
	defer func() { u.drop(io.EOF) }()
	for { // the last one of the user may be ending
		u.say(protoShell, "new", map[string]any{"terminal_width": 80, "terminal_height": 24}, nil)
		m := u.reply("new")
		if m.props["status"] == int64(1) {
			break
		}
		if text := string(m.body); !strings.Contains(text, "too many open sessions") &&
			!strings.Contains(text, "takes no more") { // some are ending
			t.Errorf("%s: got %q", user, text)
			return
		}
		u.drop(io.EOF)
		u = r.user(user)
	}
	line := "sleep " + word + " & echo re''ady\n"
	if n%20 == 0 {
		line = "(trap '' HUP TERM INT; sleep " + word + "; sleep " + word + ") & echo re''ady\n"
	}
	u.say(protoShell, "shell", nil, []byte(line))
	said := ""
	u.hear("ready", func(m *peerMessage) bool {
		said += string(m.body)
		return strings.Contains(said, "ready")
	})
	switch n % 5 {
	case 0: // its user vanishes
	case 1:
		u.say(protoShell, "stop", nil, nil)
		u.reply("stop")
	case 2:
		u.say(protoShell, "shell", nil, []byte("exit 3\n"))
		u.reply("stop")
	case 3:
		u.say(protoShell, "shell", nil, []byte("kill -9 $$\n"))
		u.reply("stop")
	case 4:
		u.say(protoControl, "close", nil, nil)
		u.reply("stop")
	}
}

// A user who does not read, or a socket that is not read: the program waits, and with that who writes, and the memory
// stays as it was.
func TestUserDoesNotRead(t *testing.T) {
	onlyExhaustive(t, "waits until nothing moves")
	const much = 200 << 20
	connect := func(t *testing.T, u *relayUser, serve func(c net.Conn)) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			if c, err := l.Accept(); err == nil {
				t.Cleanup(func() { c.Close() })
				serve(c)
			}
		}()
		u.say(protoForward, "new", map[string]any{"connection_id": "1"}, packMap("remote_host", "127.0.0.1",
			"remote_port", l.Addr().(*net.TCPAddr).Port, "protocol", "tcp"))
	}
	// Each says what of all that could be got rid of.
	for name, begin := range map[string]func(t *testing.T, b *connectBoard, u *relayUser) (gone func() int64){
		"terminal": func(t *testing.T, b *connectBoard, u *relayUser) func() int64 {
			u.say(protoShell, "new", nil, nil)
			u.say(protoShell, "shell", nil, fmt.Appendf(nil, "head -c %d /dev/zero; touch %s\n", much, b.dir+"/marker"))
			return func() int64 {
				_, err := os.Stat(b.dir + "/marker")
				return map[bool]int64{true: much}[err == nil]
			}
		},
		"files": func(t *testing.T, b *connectBoard, u *relayUser) func() int64 {
			writeFile(t, b.dir+"/big", "")
			must(t, os.Truncate(b.dir+"/big", much))
			u.say(protoFile, "get_file", nil, packMap("path", b.dir+"/big"))
			return func() (n int64) {
				fmt.Sscanf(look(fmt.Sprintf("/proc/%d/io", b.cmd.Process.Pid)), "rchar: %d", &n)
				return n
			}
		},
		"ports": func(t *testing.T, _ *connectBoard, u *relayUser) func() int64 {
			var n atomic.Int64
			connect(t, u, func(c net.Conn) {
				for part := make([]byte, 64<<10); n.Load() < much; n.Add(int64(len(part))) {
					if _, err := c.Write(part); err != nil {
						return
					}
				}
			})
			return n.Load
		},
		"ports, the other way": func(t *testing.T, _ *connectBoard, u *relayUser) func() int64 {
			connect(t, u, func(net.Conn) {})
			for range much >> 14 {
				u.say(protoForward, "forward", map[string]any{"connection_id": "1"}, make([]byte, 16<<10))
			}
			return func() int64 { return 0 }
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newConnectBoard(t, "", "--terminal", "--files", "/", "--forward", "127.0.0.1:1")
			bound := int64(8 << 20)
			if strings.Contains(name, "other") {
				bound = (maxInbox + maxForwardHeld) * maxPeerSessions // of a user who minds no answer
			}
			b.doesNotRead(t, much, bound, begin)
		})
	}
}

// doesNotRead holds the relay at the first answer to what the user begins: it takes nothing from the device any more.
func (b *connectBoard) doesNotRead(t *testing.T, much, bound int64,
	begin func(t *testing.T, b *connectBoard, u *relayUser) (gone func() int64)) {
	u := b.user("user-1")
	u.say(protoControl, "open", nil, packMap("versions", []any{1}))
	u.reply("accept")
	pid := b.cmd.Process.Pid
	before := highWater(pid)
	hold, held := make(chan struct{}), make(chan struct{}, 1)
	b.at.Lock()
	for _, s := range b.sessions {
		s.take = func(*peerMessage, []byte) {
			wake(held)
			<-hold
		}
	}
	b.at.Unlock()
	defer close(hold)
	gone := begin(t, b, u)
	<-held
	for last, same := int64(-1), 0; same < 50; time.Sleep(20 * time.Millisecond) { // until nothing moves
		if now := cpuTime(t, pid); now != last {
			last, same = now, 0
		} else {
			same++
		}
	}
	grown, n := highWater(pid)-before, gone()
	t.Logf("%d KiB resident before, grown by %d KiB; %d bytes gone", before>>10, grown>>10, n)
	if grown > bound {
		t.Errorf("grown by %d bytes, want %d at most", grown, bound)
	}
	if n >= much/2 {
		t.Errorf("%d bytes found their way, though nobody read", n)
	}
	u.drop(io.EOF)
}

// cpuTime is what a process has had of the processors, in nanoseconds (proc_pid_schedstat).
func cpuTime(t testing.TB, pid int) (sum int64) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	must(t, err)
	for _, path := range tasks {
		var ns int64
		fmt.Sscan(look(path), &ns)
		sum += ns
	}
	return sum
}
