// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Limits of what one call of a program may leave behind in logs, which are on flash and are
// sent to a server. What comes above is read and dropped, so that the program does not block.
const (
	maxOutputLine = 4 << 10   // bytes of one line; the rest of the line is dropped
	maxOutput     = 256 << 10 // bytes of one stream of one call, prefixes included
	killDelay     = 10 * time.Second
)

// child is one call of a program that is not ours: an update module or a script. It
// gets our environment, /dev/null or in as its input, none of our other descriptors (all are opened
// close-on-exec) and a process group of its own.
type child struct {
	what    string // names the call in errors and logs
	path    string // absolute
	args    []string
	dir     string
	timeout time.Duration // of the whole call
	grace   time.Duration // from SIGTERM to SIGKILL, and for output after the end; 0: killDelay
	prefix  string        // of each line of output in the log, before " (stdout): "
	level   logLevel      // of these lines; of what is to be said of them, one more
	answer  *answer       // where standard output goes instead of the log, or nil
	in      *os.File      // or nil
	alone   bool          // nothing of its process group outlives it
	lg      *logger
}

var errChildTime = errors.New("time is up")

// runChild runs c to its end. When the time is up or ctx is done, the process group gets
// SIGTERM, and SIGKILL as soon as the program has ended and nobody holds its output, at the
// latest after c.grace. A process left behind that keeps the output open delays a normal
// end by c.grace, not more. Time is monotonic: a change of the clock does not count. The
// error wraps *exec.ExitError where the program has ended by itself.
func runChild(ctx context.Context, c child) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, errChildTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.path, c.args...)
	cmd.Dir = c.dir
	// A module must not go on by itself while the next run of ours takes its work back.
	// The signal comes when the thread that forked ends (prctl(2), PR_SET_PDEATHSIG).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	if c.in != nil {
		cmd.Stdin = c.in
	}
	cmd.WaitDelay = c.grace
	if c.grace == 0 {
		cmd.WaitDelay = killDelay
	}
	stdout := &lineLog{lg: c.lg, level: c.level, prefix: c.prefix + " (stdout): "}
	stderr := &lineLog{lg: c.lg, level: c.level, prefix: c.prefix + " (stderr): "}
	var out io.Writer = stdout
	if c.answer != nil {
		out = c.answer
	}
	err := runPiped(cmd, out, stderr)
	if c.alone && cmd.Process != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	stdout.flush()
	stderr.flush()
	if errors.Is(err, exec.ErrWaitDelay) {
		c.lg.log(c.level+1, "%s: ended, but a process it started holds its output open", c.what)
		err = nil
	}
	if err == nil {
		return nil
	}
	if cmd.Process == nil {
		err = whyNotStarted(c.path, err)
	}
	if ctx.Err() == nil || cmd.Process == nil {
		return fmt.Errorf("%s: %w", c.what, err)
	}
	// The group can outlive its leader. No other group can have this number as long as
	// one of its processes lives.
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	// %v: how it ended under our signals is no answer of the program.
	if cause := context.Cause(ctx); cause != errChildTime {
		return fmt.Errorf("%s: stopped (%v): %w", c.what, err, cause)
	}
	return fmt.Errorf("%s: stopped (%v): not done after %v", c.what, err, c.timeout)
}

// idly calls f with the lowest priority for processors and disks, which children that it runs inherit. The thread ends
// with it, as not everybody may raise its priority again.
func idly(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()                   // for good
		const whoProcess, classIdle = 1, 3 << 13 // linux/ioprio.h
		syscall.Setpriority(syscall.PRIO_PROCESS, 0, 19)
		syscall.Syscall(syscall.SYS_IOPRIO_SET, whoProcess, 0, classIdle)
		f()
	}()
	<-done
}

// runPiped is cmd.Run, and hands on what comes to standard output and error in the order in which it was
// written. cmd.WaitDelay is the longest time for that after the end, or from the call of cmd.Cancel.
func runPiped(cmd *exec.Cmd, stdout, stderr io.Writer) error {
	p, err := newPipes(stdout, stderr)
	if err != nil {
		return err
	}
	defer p.close()
	cmd.Stdout, cmd.Stderr = p.write[0], p.write[1]
	var stopped time.Time
	cancel := cmd.Cancel
	cmd.Cancel = func() error {
		stopped = time.Now()
		return cancel()
	}
	err = cmd.Start()
	for _, f := range p.write { // the end of what the child writes is then the end for us
		f.Close()
	}
	if err != nil {
		return err
	}
	read := make(chan error, 1)
	go func() { read <- p.run() }()
	err = cmd.Wait()
	if stopped.IsZero() {
		stopped = time.Now()
	}
	p.ready.SetReadDeadline(stopped.Add(cmd.WaitDelay))
	rerr := <-read
	if errors.Is(rerr, os.ErrDeadlineExceeded) {
		rerr = exec.ErrWaitDelay
	}
	return cmp.Or(err, rerr)
}

// pipes are those of a child's standard output and error, read in the order of its writes. Each holds one
// write and no more (O_DIRECT of pipe(2), and the smallest size), so that the next one to the same waits
// until this one is read; and epoll tells, with EPOLLET, in which order the two have got theirs: it keeps
// a queue (fs/eventpoll.c: ep_poll_callback appends to rdllist).
type pipes struct {
	ready  *os.File // the epoll instance
	read   [2]int
	write  [2]*os.File
	to     [2]io.Writer
	single bool // each pipe holds one write
	buf    []byte
}

func newPipes(stdout, stderr io.Writer) (p *pipes, err error) {
	p = &pipes{to: [2]io.Writer{stdout, stderr}, single: true, read: [2]int{-1, -1}, buf: make([]byte, os.Getpagesize())}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	ep, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	syscall.SetNonblock(ep, true) // as a file of package os that has deadlines
	p.ready = os.NewFile(uintptr(ep), "epoll")
	for i := range p.read {
		var fd [2]int
		if err := syscall.Pipe2(fd[:], syscall.O_CLOEXEC|syscall.O_DIRECT); err != nil { // Linux before 3.4
			p.single = false
			if err := syscall.Pipe2(fd[:], syscall.O_CLOEXEC); err != nil {
				return nil, os.NewSyscallError("pipe2", err)
			}
		}
		p.read[i], p.write[i] = fd[0], os.NewFile(uintptr(fd[1]), "pipe")
		syscall.SetNonblock(fd[0], true)
		const setPipeSize = 1031 // F_SETPIPE_SZ of linux/fcntl.h
		if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd[0]), setPipeSize, 1); errno != 0 {
			p.single = false
		}
		event := syscall.EpollEvent{Events: syscall.EPOLLIN | edgeTriggered, Fd: int32(i)}
		if err := syscall.EpollCtl(ep, syscall.EPOLL_CTL_ADD, fd[0], &event); err != nil {
			return nil, os.NewSyscallError("epoll_ctl", err)
		}
	}
	return p, nil
}

const edgeTriggered = 1 << 31 // EPOLLET of linux/eventpoll.h

func (p *pipes) close() {
	for _, f := range []*os.File{p.ready, p.write[0], p.write[1]} {
		f.Close() // which takes nil, and what is closed
	}
	for _, fd := range p.read {
		syscall.Close(fd)
	}
}

// run reads both pipes to their ends.
func (p *pipes) run() error {
	c, err := p.ready.SyscallConn()
	if err != nil {
		return err
	}
	for open := len(p.read); open > 0; {
		var events [2]syscall.EpollEvent
		n := 0
		if rerr := c.Read(func(fd uintptr) bool {
			n, err = syscall.EpollWait(int(fd), events[:], 0)
			return n > 0 || err != nil && err != syscall.EINTR
		}); rerr != nil {
			return rerr
		}
		if err != nil {
			return os.NewSyscallError("epoll_wait", err)
		}
		for _, e := range events[:n] {
			ended, err := p.take(e)
			if err != nil {
				return err
			}
			if ended {
				open--
			}
		}
	}
	return nil
}

// take reads what an event is about, and tells the end.
func (p *pipes) take(e syscall.EpollEvent) (ended bool, err error) {
	for {
		n, err := syscall.Read(p.read[e.Fd], p.buf)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			return false, nil
		case err != nil:
			return false, os.NewSyscallError("read", err)
		case n == 0:
			return true, nil
		}
		p.to[e.Fd].Write(p.buf[:n])
		if p.single && e.Events&syscall.EPOLLHUP == 0 {
			return false, nil // what is there now came later than what the other pipe may hold
		}
	}
}

// isProgram tells a file that may be run.
//
//go:noinline
func isProgram(st os.FileInfo) bool { return st.Mode().IsRegular() && st.Mode()&0o111 != 0 }

var errNoInterpreter = errors.New("is not there, or is no program")

// startable says why execve(2) would not start a file that begins with head; nil: it would, or that
// cannot be seen. The kernel looks at 256 bytes (BINPRM_BUF_SIZE of linux/binfmts.h).
func startable(head []byte) error {
	head = head[:min(len(head), 256)]
	text, script := bytes.CutPrefix(head, []byte("#!"))
	line, _, _ := bytes.Cut(text, []byte("\n"))
	words := strings.Fields(string(line))
	switch {
	case bytes.HasPrefix(head, []byte("\x7fELF")):
		return nil
	case bytes.HasPrefix(head, []byte("\xef\xbb\xbf#!")):
		return withHint(errors.New("begins with a byte order mark, where #! should stand first"),
			"save it as UTF-8 without that mark")
	case !script || len(words) == 0:
		return withHint(errors.New("has no #! line, which names the interpreter"), "begin it with a line #!/bin/sh")
	case bytes.HasSuffix(line, []byte("\r")):
		return withHint(fmt.Errorf("has DOS line ends: its #! line is %q", "#!"+string(line)),
			`sed -i 's/\r$//' FILE takes them out`)
	}
	if st, err := os.Stat(words[0]); err != nil || !isProgram(st) {
		return fmt.Errorf("its interpreter %q %w", words[0], errNoInterpreter)
	}
	if filepath.Base(words[0]) == "env" && len(words) == 2 {
		if _, err := exec.LookPath(words[1]); err != nil {
			return fmt.Errorf("its interpreter %q %w", words[1], errNoInterpreter)
		}
	}
	return nil
}

// startableFile is startable for a program that is there. One that cannot be read may still be started.
func startableFile(path string) error {
	head := make([]byte, 256)
	f, err := openPlain(path, os.O_RDONLY, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	n, err := io.ReadFull(f, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil
	}
	if noExec(path) {
		return withHint(errors.New("is on a file system that is mounted noexec"), "mount it without noexec")
	}
	return startable(head[:n])
}

// whyNotStarted finds out what an error of execve(2) is about: that of a missing interpreter is the same
// as that of a missing program.
func whyNotStarted(path string, err error) error {
	if _, serr := os.Stat(path); serr != nil {
		return err
	}
	why := startableFile(path)
	switch {
	case why != nil:
	case errors.Is(err, syscall.ENOEXEC):
		why = errors.New("is a program for another kind of machine")
	case errors.Is(err, syscall.ENOENT):
		why = errors.New("its loader, the interpreter of a program that is linked dynamically, is not there")
	default:
		return err
	}
	return fmt.Errorf("%w (%w)", why, err)
}

// lineLog logs what is written to it, line by line and bounded.
type lineLog struct {
	lg     *logger
	level  logLevel
	prefix string
	line   []byte // begun and not yet ended
	logged int    // bytes so far
}

func (l *lineLog) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		part, rest, ended := bytes.Cut(p, []byte("\n"))
		l.line = append(l.line, part[:min(len(part), maxOutputLine-len(l.line))]...)
		if ended {
			l.logLine()
		}
		p = rest
	}
	return n, nil
}

func (l *lineLog) logLine() {
	fits := l.logged <= maxOutput
	l.logged = min(l.logged+len(l.prefix)+len(l.line)+1, maxOutput+1)
	if l.logged <= maxOutput {
		l.lg.log(l.level, "%s%s", l.prefix, l.line)
	} else if fits {
		l.lg.log(l.level+1, "%smore than %d bytes; the rest is not logged", l.prefix, maxOutput)
	}
	l.line = l.line[:0]
}

// flush logs a last line that has no line feed.
func (l *lineLog) flush() {
	if len(l.line) > 0 {
		l.logLine()
	}
}

// answer keeps the beginning of what is written to it.
type answer struct {
	max  int // bytes
	text []byte
	over bool // there was more
}

func (a *answer) Write(p []byte) (int, error) {
	keep := min(len(p), a.max-len(a.text))
	a.text, a.over = append(a.text, p[:keep]...), a.over || keep < len(p)
	return len(p), nil
}
