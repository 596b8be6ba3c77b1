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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
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
	held bool          // send blocks until the session has ended
	lost bool          // send fails
	slow func()        // before each message
}

func newTermPeer(t *testing.T, o *terminalOptions) *termPeer {
	p := &termPeer{t: t, more: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancelCause(context.Background())
	s := &peerSession{id: "1", user: "u", ctx: ctx, send: p.take,
		lg: &logger{sinks: []logSink{func(_ logLevel, msg string) { t.Error(msg) }}}}
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
	p.h.grace = 50 * time.Millisecond
	t.Cleanup(func() {
		s.end(errors.New("end of test"))
		p.gone.Wait()
	})
	return p
}

func (p *termPeer) take(m *peerMessage) error {
	p.mu.Lock()
	held, slow := p.held, p.slow
	p.mu.Unlock()
	if held {
		wake(p.more)
		<-p.h.s.ctx.Done()
	}
	if slow != nil {
		slow()
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

// lose ends the session as a lost link does: nothing can be sent any more.
func (p *termPeer) lose(why error) {
	p.mu.Lock()
	p.lost = true
	p.mu.Unlock()
	p.h.s.end(why)
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
			if name == "dash" {
				o.args = []string{"--login"} // which dash does not know
			}
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
			p.types("stty -a | tr ' ' '\\n' | grep -x iutf8; echo \"<$?>\"\n") // which erases characters, not bytes
			p.sees("<0>")
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
	count := 20
	if exhaustive() {
		count = 500
	}
	fds := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(list)
	}
	endTerminals(t, 1) // so that what is made once is there
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
			p.lose(errors.New("link lost"))
		case 3:
			p.h.s.end(errors.New("the time is up"))
		}
	}
	for _, p := range peers {
		p.ended()
	}
}

// Jobs in the background hear of the end, stopped ones too; a daemon stays.
func TestTerminalJobs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := newTermPeer(t, &terminalOptions{args: []string{"-mc", `d=$0
		job() { sh -c "trap 'echo >$d/$1.end; exit' HUP; echo >$d/$1; $2; while :; do sleep 0.01; done" & }
		job a :; job b 'kill -STOP $$'; setsid sh -c 'echo $$ > '$d/pid'; exec sleep 1000'
		until [ -s $d/a ] && [ -s $d/pid ] && grep -q ') T ' /proc/$!/stat; do sleep 0.01; done; echo ready; read x`,
		dir}})
	p.h.grace = shellLast // that they are asked for
	p.open()
	p.sees("ready")
	p.types("\n")
	p.ended()
	for _, name := range []string{"a", "b"} {
		if _, err := os.Stat(filepath.Join(dir, name+".end")); err != nil {
			t.Error(err)
		}
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(readFileOrNil(dir + "/pid"))))
	must(t, err)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
}

// What the shell wrote at last comes over a slow link as well, though others have its terminal open.
func TestTerminalLastWords(t *testing.T) {
	t.Parallel()
	p := newTermPeer(t, &terminalOptions{args: []string{"-mc", "sleep 1000 & stty -onlcr; read x; seq 1500; exit 3"}})
	p.open()
	p.mu.Lock()
	p.slow = func() { <-p.h.ended }
	p.mu.Unlock()
	p.types("\n")
	p.until("the last line", func() bool { return bytes.HasSuffix(p.out.Bytes(), []byte("\n1500\n")) })
	if status, text := p.answer("stop"); status != shellNormal || text != "shell ended: exit code 3" {
		t.Errorf("stop: got %v %q", status, text)
	}
	p.ended()
}

// A user who does not read makes the shell wait, and the end comes all the same.
func TestTerminalUnread(t *testing.T) {
	t.Parallel()
	p := newTermPeer(t, &terminalOptions{args: []string{"-c", "read x; exec yes"}})
	p.open()
	p.mu.Lock()
	p.held = true
	p.mu.Unlock()
	p.types("\n")
	p.until("output", func() bool { return p.h.out.Load() > 0 })
	p.lose(errors.New("link lost"))
	p.ended()
	if n := p.h.out.Load(); n > 2*maxShellOutput { // one message that waits, and what was read when it was let go
		t.Errorf("%d bytes of output were read, want %d at most", n, 2*maxShellOutput)
	}
}

// A shell that does not read is given no more than may wait.
func TestTerminalUnreadInput(t *testing.T) {
	t.Parallel()
	p := newTermPeer(t, &terminalOptions{args: []string{"-c", "stty raw -echo; echo ready; sleep 1000"}})
	p.open()
	p.sees("ready")
	part, sent := strings.Repeat("x", 4096), 0
	for ; p.h.s.ctx.Err() == nil && sent < 4<<20; sent += len(part) {
		p.types("%s", part)
	}
	if err := p.ended(); !strings.Contains(err.Error(), "input that the shell does not read") {
		t.Errorf("after %d bytes: got %v", sent, err)
	}
	if n := cap(p.h.input); n > 2*maxShellInput {
		t.Errorf("%d bytes wait", n)
	}
	if status, text := p.answer("stop"); status != shellError || text != p.why.Error() {
		t.Errorf("stop: got %v %q", status, text)
	}
}

// The user is asked for a sign of life each minute, and has 65 seconds to give one.
func TestTerminalPing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		var pings []time.Duration
		over := make(chan error, 1)
		var h *terminal
		h = newTerminal(&peerSession{send: func(m *peerMessage) error {
			pings = append(pings, time.Since(begin))
			if m.typ != "ping" || m.proto != protoShell || m.props["timeout"] != int64(65) ||
				m.props["status"] != int64(3) {
				t.Errorf("got %v", m)
			}
			if len(pings) < 5 { // the answer to the fifth is missing, but that to the fourth comes after it
				time.AfterFunc(64*time.Second, func() { wake(h.life) })
			}
			return nil
		}, end: func(why error) { over <- why }}, &terminalOptions{}).(*terminal)
		h.watch()
		t.Log(<-over)
		if n, age := len(pings), time.Since(begin); n != 7 || pings[6] != 7*time.Minute ||
			age != 6*time.Minute+65*time.Second {
			t.Errorf("got pings at %v, end after %v", pings, age)
		}
	})
}

// A shell of another user has the rights of that user, and the terminal is the user's.
func TestTerminalUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	etc, closed := t.TempDir(), t.TempDir()
	must(t, os.Chmod(closed, 0o700))
	must(t, os.WriteFile(etc+"/passwd", fmt.Appendf(nil, "root:x:0:0::/root:/bin/sh\n"+
		"guest:x:54321:54322::%s:/bin/false\n", closed), 0o644))
	must(t, os.WriteFile(etc+"/group", []byte("a:x:7:\nb:x:54323:x,guest\n\nc:x:y:guest\nd:x:54324:guest"), 0o644))
	o := &terminalOptions{user: "guest", etc: etc, args: []string{"-c",
		`id -u; id -g; id -G; pwd; echo "$HOME"; echo own > "$(tty)"; id -u > /root/x || echo refused; read x`}}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	p := newTermPeer(t, o)
	p.open()
	said, want := p.sees("refused"), "54321\r\n54322\r\n54322 54323 54324\r\n/\r\n"+closed+"\r\nown\r\n"
	if !strings.HasPrefix(said, want) {
		t.Errorf("got %q, want %q", said, want)
	}
}

// Who may have a shell.
func TestTerminalAccounts(t *testing.T) {
	t.Parallel()
	me := os.Geteuid()
	etc := t.TempDir()
	find := func(name string) string {
		a, err := findAccount(etc, name)
		if err != nil {
			return strings.ReplaceAll(err.Error(), etc, "ETC")
		}
		return fmt.Sprint(*a)
	}
	check := func(name, want string) {
		t.Helper()
		if got := find(name); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
	if me == 0 {
		check("", "{root / 0 0 [] false}")
		check("root", "{root / 0 0 [] false}")
	} else {
		check("", fmt.Sprintf("{%d / %d %d [] false}", me, me, os.Getegid()))
	}
	check("guest", `user "guest": open ETC/passwd: no such file or directory`)
	must(t, os.WriteFile(etc+"/passwd", fmt.Appendf(nil, "short:x:1:1\nbig:x:4294967296:1:::\nneg:x:1:-1:::\n:x:5:5:::\n"+
		"me:x:%d:77:Me:/home/me:/bin/x\nother:x:%d:1:::/\n", me, me+1), 0o644))
	must(t, os.WriteFile(etc+"/group", []byte("a:x:8:you,me\nb:x:9:notme\nc:x:10:me:\n"), 0o644))
	check("me", fmt.Sprintf("{me /home/me %d 77 [8] true}", me))
	check("", fmt.Sprintf("{me /home/me %d 77 [8] true}", me))
	check("root", `user "root": not in "ETC/passwd"`)
	check("short", `user "short": 4 fields in "ETC/passwd", want 7`)
	check("big", `user "big" in "ETC/passwd": strconv.ParseUint: parsing "4294967296": value out of range`)
	check("neg", `user "neg" in "ETC/passwd": strconv.ParseUint: parsing "-1": invalid syntax`)
	if me != 0 {
		check("other", `user "other": only root can start a shell of another user`)
	}
}

// What is not there is refused before anything is offered.
func TestTerminalCheck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/plain", []byte("#!/bin/sh\n"), 0o644))
	must(t, os.WriteFile(dir+"/broken", []byte("#!/nowhere/sh\n"), 0o755))
	for _, o := range []*terminalOptions{{shell: "sh"}, {shell: dir}, {shell: dir + "/none"}, {shell: dir + "/plain"},
		{shell: dir + "/broken"}, {user: "nobody", etc: dir}} {
		if err := o.check(); exitCode(err) != exitRefused {
			t.Errorf("%v: got %v, want a refusal", *o, err)
		} else {
			t.Log(err)
		}
	}
}

// Where /dev is as an initramfs may have it, without devpts, that is mounted; or it is said what to do.
func TestTerminalDevpts(t *testing.T) {
	if why := os.Getenv("MENDLET_TEST_DEVPTS"); why != "" {
		_, err := os.Stat("/dev/pts/0")
		if why == "refused" {
			if cerr := (&terminalOptions{}).check(); exitCode(cerr) != exitRefused || !strings.Contains(cerr.Error(),
				"mount devpts on /dev/pts") || hintOf(cerr) != "mkdir -p /dev/pts; mount -t devpts devpts /dev/pts" {
				t.Errorf("got %v, hint %q", cerr, hintOf(cerr))
			}
			return
		}
		if err == nil {
			t.Fatal("there is a devpts")
		}
		p := newTermPeer(t, &terminalOptions{args: []string{"-c", "tty"}})
		p.open()
		p.sees("/dev/pts/0")
		p.ended()
		return
	}
	t.Parallel()
	self, err := os.Executable()
	must(t, err)
	if err := exec.Command("unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt").Run(); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	for what, made := range map[string]string{"nothing": ":", "ptmx": "mknod /dev/ptmx c 5 2",
		"a folder": "mkdir /dev/pts", "refused": "touch /dev/pts"} {
		cmd := exec.Command("unshare", "-m", "sh", "-c", "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && "+made+
			` && exec "$0" "$@"`, self, "-test.run", "^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "MENDLET_TEST_DEVPTS="+what)
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("PASS: "+t.Name())) {
			t.Errorf("%s in /dev: %v\n%s", what, err, out)
		}
	}
}

// An editor for the whole screen, where there is nothing but busybox, follows the size of the terminal.
func TestTerminalEditor(t *testing.T) {
	t.Parallel()
	box, err := exec.LookPath("busybox")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs busybox and root")
	}
	root := t.TempDir()
	must(t, os.Mkdir(root+"/bin", 0o755))
	program, err := os.ReadFile(box)
	must(t, err)
	must(t, os.WriteFile(root+"/bin/busybox", program, 0o755))
	if err := exec.Command("chroot", root, "/bin/busybox", "vi", "--help").Run(); err != nil {
		t.Skipf("busybox alone does not run: %v", err)
	}
	p := newTermPeer(t, &terminalOptions{shell: box, args: []string{"chroot", root, "/bin/busybox", "sh"}, height: 22})
	p.msg("new", map[string]any{"terminal_width": int64(80), "terminal_height": int64(22)}, "")
	p.answer("new")
	p.types("busybox vi /text\n")
	p.sees("\x1b[22;1H") // the line for the status
	p.types("i")
	p.msg("resize", map[string]any{"terminal_width": int64(100), "terminal_height": int64(47)}, "")
	p.sees("\x1b[47;1H")
	p.types("gr\u00fc\u00dfe")
	p.sees("gr\u00fc\u00dfe")
	p.types("\x1b") // alone: else busybox waits for more of a key
	p.sees("[Modified]")
	p.types(":wq\r")
	p.sees("1L, 8C")
	p.types("exit\n")
	p.ended()
	if text, err := os.ReadFile(root + "/text"); string(text) != "gr\u00fc\u00dfe\n" {
		t.Errorf("got %q, %v", text, err)
	}
}
