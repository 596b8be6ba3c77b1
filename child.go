// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
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
// gets our environment, /dev/null as its input, none of our descriptors (all are opened
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
	lg      *logger
}

// prepareProcess sets what children inherit and what cannot be set for a child alone
// without a race between threads: the umask, and a PATH where there is none, as in an
// initramfs. It must run once, before anything else.
func prepareProcess() {
	syscall.Umask(0o022)
	if os.Getenv("PATH") == "" {
		os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
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
	cmd.WaitDelay = c.grace
	if c.grace == 0 {
		cmd.WaitDelay = killDelay
	}
	stdout := &lineLog{lg: c.lg, level: c.level, prefix: c.prefix + " (stdout): "}
	stderr := &lineLog{lg: c.lg, level: c.level, prefix: c.prefix + " (stderr): "}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if c.answer != nil {
		cmd.Stdout = c.answer
	}
	err := cmd.Run()
	stdout.flush()
	stderr.flush()
	if errors.Is(err, exec.ErrWaitDelay) {
		c.lg.log(c.level+1, "%s: ended, but a process it started holds its output open", c.what)
		err = nil
	}
	if err == nil {
		return nil
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
			l.end()
		}
		p = rest
	}
	return n, nil
}

func (l *lineLog) end() {
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
		l.end()
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
