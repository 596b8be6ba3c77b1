// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// The remote terminal: a shell behind a pseudo terminal (pty(7)), as a session of its own (credentials(7)), of
// which nothing is left when the session with the server ends.

// The status of a message about a shell: int64, as peers look at the width.
const shellNormal, shellError, shellControl = int64(1), int64(2), int64(3)

const (
	maxShellOutput = 4 << 10   // bytes of one message, which is as much as one read of a terminal gives
	maxShellInput  = 256 << 10 // bytes that may wait for a shell that does not read
	shellPing      = 60 * time.Second
	shellPong      = 65 * time.Second       // to answer in
	shellGrace     = 2 * time.Second        // from SIGHUP to SIGKILL
	maxShellRest   = 64 << 10               // bytes that are read after the shell's end, more than a terminal holds
	shellRest      = 100 * time.Millisecond // without output then: other programs may have the terminal open
	shellLast      = 10 * time.Second       // for SIGKILL to work: a process in the middle of a system call outlives it
)

// terminalOptions is what all terminals have in common.
type terminalOptions struct {
	shell         string   // absolute; "": /bin/sh
	args          []string // of the shell; nil: it is told to be a login shell as login(1) does it, by its name
	user          string   // whose shell it is; "": that of the user who we are
	width, height uint16   // of a terminal that does not tell; 0: 80, 40
	etc           string   // where passwd and group are; "": /etc
}

func (o *terminalOptions) path() string { return cmp.Or(o.shell, "/bin/sh") }

// check refuses a shell or a user that are not there, and a device without pseudo terminals.
func (o *terminalOptions) check() error {
	shell := o.path()
	st, err := os.Stat(shell)
	switch {
	case !filepath.IsAbs(shell):
		err = errors.New("not an absolute path")
	case err == nil && !isProgram(st):
		err = errors.New("no program")
	case err == nil:
		err = startableFile(shell)
	}
	if err != nil {
		return refuse("shell %q: %w", shell, err)
	}
	if _, err := findAccount(o.etc, o.user); err != nil {
		return refuse("%w", err)
	}
	master, tty, err := openTerminal()
	if err != nil {
		return withHint(refuse("%w", err), "mkdir -p /dev/pts; mount -t devpts devpts /dev/pts")
	}
	return errors.Join(tty.Close(), master.Close())
}

// openTerminal makes a pseudo terminal. Where there is no devpts, it is mounted.
func openTerminal() (master, tty *os.File, err error) {
	const flag = os.O_RDWR | syscall.O_NOCTTY
	if master, err = os.OpenFile("/dev/ptmx", flag, 0); err != nil {
		if _, serr := os.Stat("/dev/pts/ptmx"); serr != nil && os.Geteuid() == 0 {
			os.Mkdir("/dev/pts", 0o755)
			merr := syscall.Mount("devpts", "/dev/pts", "devpts", syscall.MS_NOSUID|syscall.MS_NOEXEC,
				"mode=0620,ptmxmode=0666")
			if merr != nil {
				return nil, nil, fmt.Errorf("no pseudo terminal: %w; mount devpts on /dev/pts: %w", err, merr)
			}
		}
		if master, err = os.OpenFile("/dev/pts/ptmx", flag, 0); err != nil {
			return nil, nil, fmt.Errorf("no pseudo terminal: %w", err)
		}
	}
	// Not os.OpenFile, which would make it nonblocking for the shell as well.
	var number, fd, unlocked = uint32(0), -1, int32(0)
	if err = ioctl(master, syscall.TIOCSPTLCK, unsafe.Pointer(&unlocked)); err == nil {
		err = ioctl(master, syscall.TIOCGPTN, unsafe.Pointer(&number))
	}
	name := "/dev/pts/" + strconv.Itoa(int(number))
	if err == nil {
		fd, err = openat(-1, name, name, flag, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, fmt.Errorf("pseudo terminal: %w", err)
	}
	return master, os.NewFile(uintptr(fd), name), nil
}

// terminal is the handler of a session with a shell.
type terminal struct {
	s           *peerSession
	o           *terminalOptions
	grace       time.Duration // see shellGrace
	user        string
	pid         int // of the shell, and with that of its session; 0: there is none. Not reaped before the end
	master      *os.File
	in, out     atomic.Int64  // bytes
	status      atomic.Int64  // that the end will have
	life, typed chan struct{} // something came from the user; there is input. Each holds one
	over, ended chan struct{} // closed by close; closed when the shell has ended, which is how
	how         error
	work        sync.WaitGroup // the goroutines

	mu    sync.Mutex
	input []byte // that the shell has not been given yet; mu
}

func newTerminal(s *peerSession, o *terminalOptions) peerHandler {
	return &terminal{s: s, o: o, grace: shellGrace, life: make(chan struct{}, 1), typed: make(chan struct{}, 1),
		over: make(chan struct{}), ended: make(chan struct{})}
}

func (t *terminal) send(typ string, status int64, body []byte) error {
	return t.s.send(&peerMessage{proto: protoShell, typ: typ, props: map[string]any{"status": status}, body: body})
}

func (t *terminal) receive(m *peerMessage) {
	wake(t.life)
	switch {
	case m.typ == "new" && t.pid != 0:
		t.send("new", shellError, []byte("failed to start shell: shell is already running"))
	case m.typ == "new":
		if err := t.start(m); err != nil {
			err = fmt.Errorf("failed to start shell: %w", err)
			t.send("new", shellError, []byte(err.Error()))
			t.s.end(err)
			return
		}
		t.send("new", shellNormal, []byte("Shell started"))
		for _, f := range []func(){t.read, t.wait, t.write, t.watch} {
			t.work.Go(f)
		}
	case !slices.Contains([]string{"shell", "stop", "resize", "pong"}, m.typ):
		t.send(m.typ, shellError, fmt.Appendf(nil, "unknown message protocol and type: %d/%s", m.proto, m.typ))
		if t.pid == 0 {
			t.s.end(fmt.Errorf("unknown message type %q", m.typ))
		}
	case t.pid == 0:
		if m.typ == "shell" || m.typ == "stop" {
			t.send(m.typ, shellError, []byte("session not found"))
		}
		t.s.end(fmt.Errorf("%q without a shell", m.typ))
	case m.typ == "shell":
		t.in.Add(int64(len(m.body)))
		t.mu.Lock()
		defer t.mu.Unlock()
		if len(t.input)+len(m.body) > maxShellInput && len(t.input) > 0 {
			t.s.end(fmt.Errorf("more than %d bytes of input that the shell does not read", len(t.input)))
			return
		}
		t.input = append(t.input, m.body...)
		wake(t.typed)
	case m.typ == "resize":
		t.resize(m, 0, 0)
	case m.typ == "stop":
		if len(m.body) < 100 && m.props["status"] == shellError { // the server's words
			t.s.end(fmt.Errorf("stopped: %q", m.body))
			return
		}
		t.status.Store(shellNormal)
		t.s.end(errors.New("stopped by the user"))
	}
}

// resize tells the terminal its size: that in m, if it has one, else this one; 0 leaves it as it is.
func (t *terminal) resize(m *peerMessage, width, height uint16) error {
	w, _ := m.props["terminal_width"].(int64)
	h, _ := m.props["terminal_height"].(int64)
	if w > 0 && h > 0 && w <= 0xffff && h <= 0xffff {
		width, height = uint16(w), uint16(h)
	}
	if width == 0 || height == 0 {
		return nil
	}
	size := [4]uint16{height, width} // struct winsize of asm-generic/termios.h; pixels are not known
	return ioctl(t.master, syscall.TIOCSWINSZ, unsafe.Pointer(&size))
}

// start starts the shell.
func (t *terminal) start(m *peerMessage) error {
	a, err := findAccount(t.o.etc, t.o.user)
	if err != nil {
		return err
	}
	master, tty, err := openTerminal()
	if err != nil {
		return err
	}
	defer tty.Close()
	t.master, t.user = master, a.name
	shell := t.o.path()
	argv := append([]string{filepath.Base(shell)}, t.o.args...)
	if len(argv) == 2 && argv[1] == "--login" || t.o.args == nil { // which not all shells know
		argv = []string{"-" + argv[0]}
	}
	env := []string{"HOME=" + a.home, "USER=" + a.name, "LOGNAME=" + a.name, "SHELL=" + shell,
		"TERM=xterm-256color", "PATH=" + os.Getenv("PATH")}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "LANG") || strings.HasPrefix(v, "LC_") || strings.HasPrefix(v, "TZ=") {
			env = append(env, v)
		}
	}
	sys := &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if os.Geteuid() == 0 && a.known {
		sys.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
		err = tty.Chown(int(a.uid), -1)
	}
	if err == nil {
		err = t.resize(m, cmp.Or(t.o.width, 80), cmp.Or(t.o.height, 40))
	}
	if err == nil {
		var mode syscall.Termios // UTF-8 is what all users of the server have: erase characters, not bytes
		if err = ioctl(tty, syscall.TCGETS, unsafe.Pointer(&mode)); err == nil {
			mode.Iflag |= 0x4000                                      // IUTF8 of asm-generic/termbits.h
			err = ioctl(tty, syscall.TCGETS+1, unsafe.Pointer(&mode)) // TCSETS, of MIPS as well
		}
	}
	if err == nil { // a home may be missing, or closed to its owner
		attr := &syscall.ProcAttr{Dir: a.home, Env: env, Sys: sys, Files: []uintptr{tty.Fd(), tty.Fd(), tty.Fd()}}
		if t.pid, err = syscall.ForkExec(shell, argv, attr); err != nil {
			attr.Dir = "/"
			t.pid, err = syscall.ForkExec(shell, argv, attr)
		}
	}
	if err != nil {
		t.pid = 0
		master.Close()
		return fmt.Errorf("%q: %w", shell, whyNotStarted(shell, err))
	}
	return nil
}

// read takes what the shell writes to the user, and sees its end. While the link is busy it does not read, and
// then the shell waits.
func (t *terminal) read() {
	buf := make([]byte, maxShellOutput)
	for rest := -1; rest < maxShellRest; { // bytes since the end of the shell; -1: it has not ended
		n, err := t.master.Read(buf)
		t.out.Add(int64(n))
		if n > 0 && t.send("shell", shellNormal, buf[:n]) != nil {
			return // over
		}
		if rest < 0 && errors.Is(err, os.ErrDeadlineExceeded) { // see wait
			<-t.ended
			rest, err = 0, nil
		}
		if err != nil { // EIO: nobody else has the terminal open
			break
		}
		if rest >= 0 {
			rest += n
			t.master.SetReadDeadline(time.Now().Add(shellRest))
		}
	}
	<-t.ended
	t.status.Store(shellNormal)
	t.s.end(t.how)
}

// wait waits for the end of the shell. It does not reap: until then no other process, and with that no other session,
// gets the number.
func (t *terminal) wait() {
	var info [32]int32   // siginfo_t of asm-generic/siginfo.h, which has 128 bytes
	at := 2 + wordSize/4 // where the parts of SIGCHLD are: pid, uid, status
	for errno := syscall.EINTR; errno == syscall.EINTR; {
		_, _, errno = syscall.Syscall6(syscall.SYS_WAITID, 1 /* P_PID */, uintptr(t.pid),
			uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOWAIT, 0, 0)
	}
	status := info[at+2]
	t.how = fmt.Errorf("shell ended: exit code %d", status)
	if info[1]|info[2] != 1 { // errno, which is 0, and code, on MIPS the other way round: not CLD_EXITED
		t.how = fmt.Errorf("shell ended by signal %d (%v)", status, syscall.Signal(status))
	}
	t.master.SetReadDeadline(time.Now()) // for read to learn of it
	close(t.ended)
}

// write gives the shell what the user types.
func (t *terminal) write() {
	for {
		select {
		case <-t.over:
			return
		case <-t.typed:
		}
		t.mu.Lock()
		p := t.input
		t.input = nil
		t.mu.Unlock()
		if _, err := t.master.Write(p); err != nil {
			return
		}
	}
}

// watch asks now and then whether the user is still there.
func (t *terminal) watch() {
	tick := time.NewTicker(shellPing)
	defer tick.Stop()
	var late <-chan time.Time
	for {
		select {
		case <-t.over:
			return
		case <-t.life:
			late = nil
		case <-late:
			t.s.end(fmt.Errorf("nothing came from the user for %v after a ping", shellPong))
			return
		case <-tick.C:
			t.s.send(&peerMessage{proto: protoShell, typ: "ping",
				props: map[string]any{"timeout": int64(shellPong / time.Second), "status": shellControl}})
			if late == nil {
				late = time.After(shellPong)
			}
		}
	}
}

func (t *terminal) close(why error) {
	if t.pid == 0 {
		return
	}
	status := cmp.Or(t.status.Load(), shellError) // before the shell ends by what we do
	close(t.over)
	t.master.Close() // SIGHUP to the shell and what is in the foreground (pty(7))
	t.work.Go(func() { t.send("stop", status, fmt.Append(nil, why)) })
	left := endProcesses(t.pid, t.grace)
	syscall.Kill(-t.pid, syscall.SIGKILL) // where there is no /proc to find more
	finish := func() {
		t.work.Wait()
		uninterrupted("wait for", t.o.path(), func() error {
			_, err := syscall.Wait4(t.pid, nil, 0, nil)
			return err
		})
	}
	if len(left) > 0 {
		t.s.lg.warnf("terminal of user %q: processes %d of it do not end", t.user, left)
		go finish()
	} else {
		finish()
	}
}

// endProcesses ends the processes of a session, whatever process group they are in: each gets SIGHUP, and after the
// grace SIGKILL until none is left. Those that did not end with that are returned. What made itself a session of its
// own, as daemons do, stays.
func endProcesses(session int, grace time.Duration) (left []int) {
	none, start := 0, time.Now()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		if left = sessionProcesses(session); len(left) > 0 {
			none = -1
		}
		none++ // 2: a process may have forked and ended while we looked
		age := time.Since(start)
		if none == 2 || age > grace+shellLast {
			return left
		}
		for _, pid := range left {
			switch {
			case age >= grace:
				syscall.Kill(pid, syscall.SIGKILL)
			case pause == time.Millisecond: // the first time
				syscall.Kill(pid, syscall.SIGHUP)
			}
		}
		time.Sleep(pause)
	}
}

// sessionProcesses are the processes of a session that have not ended (proc_pid_stat(5)).
func sessionProcesses(session int) (list []int) {
	found, _ := namesIn("/proc")
	for _, p := range found {
		stat, _ := os.ReadFile("/proc/" + p + "/stat") // fails for one that just ended
		text := string(stat)
		e := strings.Fields(text[strings.LastIndexByte(text, ')')+1:]) // from field 3; the name before may be any
		if len(e) < 18 || e[3] != strconv.Itoa(session) || e[17] == "1" && (e[0] == "Z" || e[0] == "X") {
			continue // dead, if it has no other thread
		}
		if pid, err := strconv.Atoi(p); err == nil {
			list = append(list, pid)
		}
	}
	return list
}

func (t *terminal) summary() string {
	return fmt.Sprintf("terminal of user %q, %d bytes in, %d bytes out", t.user, t.in.Load(), t.out.Load())
}
