// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// termPeer is the user of a terminal: it keeps what the handler sends, and ends the session as the connection does.
type termPeer struct {
	t    *testing.T
	h    *terminal
	gone sync.WaitGroup
	mu   sync.Mutex
	got  []peerMessage
	out  bytes.Buffer
	more chan struct{} // something came
	why  error         // the session has ended
	held chan struct{} // not nil: send blocks until it is closed
	lost bool
}

func newTermPeer(t *testing.T, o *terminalOptions) *termPeer {
	p := &termPeer{t: t, more: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancelCause(context.Background())
	s := &peerSession{id: "1", user: "u", ctx: ctx, send: p.take, lg: &logger{}}
	var once sync.Once
	p.gone.Add(1)
	s.end = func(why error) {
		once.Do(func() {
			cancel(why)
			go func() {
				defer p.gone.Done()
				p.h.close(why)
				p.mu.Lock()
				p.why = why
				p.mu.Unlock()
				wake(p.more)
			}()
		})
	}
	p.h = newTerminal(s, o).(*terminal)
	p.h.grace = 200 * time.Millisecond
	t.Cleanup(func() {
		s.end(errors.New("end of test"))
		p.gone.Wait()
	})
	return p
}

func (p *termPeer) take(m *peerMessage) error {
	p.mu.Lock()
	held := p.held
	p.mu.Unlock()
	if held != nil {
		<-held
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lost {
		return errors.New("link lost")
	}
	if m.typ == "shell" && m.props["status"] == shellNormal {
		p.out.Write(m.body)
	} else {
		m.body = bytes.Clone(m.body)
		p.got = append(p.got, *m)
	}
	wake(p.more)
	return nil
}

// until waits until the state is as wanted; what: for the message when it does not come.
func (p *termPeer) until(what string, f func() bool) {
	p.t.Helper()
	late := time.After(20 * time.Second)
	for {
		p.mu.Lock()
		ok := f()
		p.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-p.more:
		case <-late:
			p.mu.Lock()
			defer p.mu.Unlock()
			p.t.Fatalf("waited for %s: messages %v, end %v, output %q", what, p.got, p.why, tail(p.out.Bytes()))
		}
	}
}

func tail(b []byte) []byte { return b[max(0, len(b)-2000):] }

// sees waits for text in the output that came since it saw the last.
func (p *termPeer) sees(text string) (before string) {
	p.t.Helper()
	p.until(fmt.Sprintf("%q", text), func() bool {
		b, _, ok := bytes.Cut(p.out.Bytes(), []byte(text))
		if ok {
			before = string(b)
			p.out.Next(len(b) + len(text))
		}
		return ok
	})
	return before
}

func (p *termPeer) msg(typ string, props map[string]any, body string) {
	m := &peerMessage{proto: protoShell, typ: typ, props: props}
	if body != "" {
		m.body = []byte(body)
	}
	p.h.receive(m)
}

func (p *termPeer) types(format string, args ...any) {
	p.msg("shell", nil, fmt.Sprintf(format, args...))
}

// answer waits for the last message of the type, and gives its status and text.
func (p *termPeer) answer(typ string) (status any, text string) {
	p.t.Helper()
	p.until(typ, func() bool {
		for i, m := range p.got {
			if m.typ == typ {
				status, text = m.props["status"], string(m.body)
				p.got = append(p.got[:i], p.got[i+1:]...)
				return true
			}
		}
		return false
	})
	return status, text
}

func (p *termPeer) open() {
	p.t.Helper()
	p.msg("new", nil, "")
	if status, text := p.answer("new"); status != shellNormal || text != "Shell started" {
		p.t.Fatalf("new: got %v %q", status, text)
	}
}

// ended waits for the end of the session, of which nothing is left then.
func (p *termPeer) ended() error {
	p.t.Helper()
	p.until("the end", func() bool { return p.why != nil })
	if p.h.pid == 0 { // there was no shell
		return p.why
	}
	if list := sessionProcesses(p.h.pid); len(list) > 0 {
		p.t.Errorf("processes %v are left", list)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", p.h.pid)); err == nil {
		p.t.Errorf("shell %d is left", p.h.pid)
	}
	return p.why
}

// terminalShells are the shells of this machine.
func terminalShells(t *testing.T) map[string]string {
	list := map[string]string{}
	for _, name := range []string{"dash", "bash"} {
		if path, err := exec.LookPath(name); err == nil {
			list[name] = path
		}
	}
	if box, err := exec.LookPath("busybox"); err == nil {
		list["busybox"] = filepath.Join(t.TempDir(), "ash")
		must(t, os.Symlink(box, list["busybox"]))
	}
	return list
}

// A shell as somebody who logs in finds it, with its size from the beginning, until it ends by itself.
func TestTerminalShells(t *testing.T) {
	t.Parallel()
	etc, home := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(home+"/.profile", []byte("PS1='> '\n"), 0o644))
	must(t, os.WriteFile(etc+"/passwd", fmt.Appendf(nil, "#\nx:x\nowner:x:%d:%d:O:%s:/none\n", os.Geteuid(),
		os.Getegid(), home), 0o644))
	for name, shell := range terminalShells(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := &terminalOptions{shell: shell, etc: etc, width: 111, height: 22}
			if err := o.check(); err != nil {
				t.Fatal(err)
			}
			p := newTermPeer(t, o)
			p.open()
			p.sees("> ") // .profile was read: a login shell
			p.types("stty size; pwd; env; echo $0 end\n")
			p.sees("end\r\n")
			said := p.sees("end\r\n")
			for _, want := range []string{"22 111\r\n", home + "\r\n", "HOME=" + home + "\r\n", "USER=owner\r\n",
				"LOGNAME=owner\r\n", "SHELL=" + shell + "\r\n", "TERM=xterm-256color\r\n",
				"PATH=/", "-" + filepath.Base(shell) + " "} {
				if !strings.Contains(said, want) {
					t.Errorf("got %q, want %q in it", said, want)
				}
			}
			p.msg("resize", map[string]any{"terminal_width": int64(200), "terminal_height": int64(50)}, "")
			p.msg("resize", map[string]any{"terminal_width": int64(70000), "terminal_height": int64(50)}, "")
			p.msg("resize", map[string]any{"terminal_width": int64(7)}, "")
			p.types("stty size\n")
			p.sees("50 200\r\n")
			p.types("exit 7\n")
			if status, text := p.answer("stop"); status != shellNormal || text != "shell ended: exit code 7" {
				t.Errorf("stop: got %v %q", status, text)
			}
			if err := p.ended(); err.Error() != "shell ended: exit code 7" {
				t.Errorf("got %v", err)
			}
			if !strings.HasPrefix(p.h.summary(), `terminal of user "owner", `) {
				t.Error(p.h.summary())
			}
		})
	}
}

// What a shell is given and gives comes as it is: all bytes, many of them, and with back-pressure.
func TestTerminalBytes(t *testing.T) {
	t.Parallel()
	p := newTermPeer(t, &terminalOptions{args: []string{"-c", "stty raw -echo; printf ready; exec cat"}})
	p.open()
	p.sees("ready")
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	var sent bytes.Buffer
	for i := range 512 {
		m := append(bytes.Repeat([]byte{byte(i)}, i%7), all...)
		sent.Write(m)
		p.types("%s", m)
		if i%64 == 63 { // no more than may wait
			p.until("all that was sent", func() bool { return p.out.Len() >= sent.Len() })
		}
	}
	p.mu.Lock()
	if !bytes.Equal(p.out.Bytes(), sent.Bytes()) {
		t.Errorf("got %d other bytes, want %d", p.out.Len(), sent.Len())
	}
	p.mu.Unlock()
	p.msg("stop", nil, "\x80") // an empty map
	if status, text := p.answer("stop"); status != shellNormal || text != "stopped by the user" {
		t.Errorf("stop: got %v %q", status, text)
	}
	p.ended()
}

// Messages that have no place get the answer that the peers know.
func TestTerminalMessages(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ typ, want string }{
		{"shell", "session not found"}, {"stop", "session not found"}, {"foo", "unknown message protocol and type: 1/foo"},
		{"pong", ""}, {"resize", ""},
	} {
		p := newTermPeer(t, &terminalOptions{})
		p.msg(c.typ, nil, "")
		p.ended()
		if c.want == "" {
			if len(p.got) > 0 {
				t.Errorf("%s: got %v, want no answer", c.typ, p.got)
			}
		} else if status, text := p.answer(c.typ); status != shellError || text != c.want {
			t.Errorf("%s: got %v %q, want %q", c.typ, status, text, c.want)
		}
	}
	p := newTermPeer(t, &terminalOptions{})
	p.open()
	p.msg("new", nil, "")
	if status, text := p.answer("new"); status != shellError ||
		text != "failed to start shell: shell is already running" {
		t.Errorf("second new: got %v %q", status, text)
	}
	p.msg("", nil, "")
	p.answer("")
	p.msg("stop", map[string]any{"status": int64(2)}, "user disconnected")
	if status, text := p.answer("stop"); status != shellError || text != `stopped: "user disconnected"` {
		t.Errorf("stop: got %v %q", status, text)
	}
	p.ended()
	p = newTermPeer(t, &terminalOptions{shell: "/nowhere/sh"})
	p.msg("new", nil, "")
	if status, text := p.answer("new"); status != shellError || !strings.Contains(text, `"/nowhere/sh"`) {
		t.Errorf("no shell: got %v %q", status, text)
	}
	p.ended()
}

// Nothing is left of a session, even of what does not want to end.
func TestTerminalLeavesNothing(t *testing.T) {
	if sessionProcesses(os.Getpid()) == nil && os.Getuid() != 0 {
		t.Log("processes of others are not seen")
	}
	count := 20
	if exhaustive() {
		count = 500
	}
	fds := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(list)
	}
	// (first), so that what is made once is there
	endTerminals(t, 1)
	before, routines := fds(), runtime.NumGoroutine()
	for done := 0; done < count; done += 10 {
		endTerminals(t, 10)
	}
	if n := fds(); n > before {
		t.Errorf("%d descriptors, before %d", n, before)
	}
	if n := runtime.NumGoroutine(); n > routines {
		t.Errorf("%d goroutines, before %d", n, routines)
	}
}

// endTerminals has n terminals with processes that ignore SIGHUP, some in process groups of their own, stopped or
// writing without end, and ends them in every way.
func endTerminals(t *testing.T, n int) {
	var peers []*termPeer
	for range n {
		p := newTermPeer(t, &terminalOptions{args: []string{"-mc",
			"trap '' HUP TERM; sleep 1000 & sleep 1000 | cat & sh -c 'kill -STOP $$; :' & (sleep 1000 &)\n" +
				"echo ready; read x"}})
		peers = append(peers, p)
		p.open()
	}
	for i, p := range peers {
		p.sees("ready")
		if i%2 == 0 {
			p.types("\n")
		}
	}
	for i, p := range peers {
		switch i % 4 {
		case 0, 1:
			p.msg("stop", nil, "")
		case 2:
			p.h.s.end(errors.New("link lost"))
		}
	}
	for i, p := range peers {
		if i%4 == 3 {
			p.h.s.end(errors.New("the time is up"))
		}
		p.ended()
	}
}
