// SPDX-License-Identifier: Apache-2.0

package main

// Rules of what is said, and where:
//
//   - stdout is for data that a program may read, stderr for people.
//   - One event, one line. No colour, no cursor movement, unless stderr is a terminal and
//     the line is the progress bar.
//   - What comes from outside (artifacts, servers, configuration, programs) forges no line and no
//     colour: the logger escapes what is not visible; on stdout printf quotes a string that has
//     such, and printJSON escapes it.
//   - Lines start with "mendlet: ". Messages have no capital and no full stop at the end.
//   - A message names the thing it is about in quotes and says what was got and what was
//     wanted. Where a person can do something about it, a second line starts with "hint: ".
//   - Logs may go to the kernel's ring buffer or to syslog instead, for a device whose only
//     console is a serial line read later.

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf16"
	"unsafe"
)

// outside is a string that may hold anything. %s gives it plain, %q quoted.
type outside string

func (s outside) Format(f fmt.State, verb rune) {
	text := plain(string(s))
	if verb == 'q' {
		text = quote(string(s))
	}
	fmt.Fprintf(f, fmt.FormatString(f, 's'), text)
}

// printf prints to stdout. Strings among args are taken for ones from outside.
func printf(w io.Writer, format string, args ...any) error {
	for i, a := range args {
		if s, ok := a.(string); ok {
			args[i] = outside(s)
		}
	}
	_, err := fmt.Fprintf(w, format, args...)
	return err
}

// printJSON prints v, with all of it escaped that is not visible: encoding/json leaves some controls
// and what changes the direction of text.
func printJSON(w io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", visibleJSON(text))
	return err
}

func visibleJSON(text []byte) []byte {
	var b []byte
	for _, r := range string(text) {
		if s := string(r); r == '\n' || visible(s) == s {
			b = append(b, s...)
			continue
		}
		for _, u := range utf16.Encode([]rune{r}) {
			b = fmt.Appendf(b, `\u%04x`, u)
		}
	}
	return b
}

// syslogSeverity maps a level to the severities of RFC 5424, 6.2.1.
func syslogSeverity(level logLevel) int {
	return [...]int{7, 7, 6, 4, 3, 2}[level]
}

// kmsgSink writes to the kernel's ring buffer. Each record must be one write and is cut at
// 976 bytes, the kernel's LOG_LINE_MAX; the kernel may drop records when they come fast
// (printk_devkmsg), so this is never the only trace of a verdict: the journal is.
func kmsgSink() (logSink, error) {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	return func(level logLevel, msg string) {
		line := fmt.Sprintf("<%d>mendlet: %s", syslogSeverity(level), msg)
		f.WriteString(line[:min(len(line), 976)] + "\n")
	}, nil
}

// syslogSink sends RFC 3164 lines to the local syslog socket, facility daemon (3). It uses
// the system calls, since package net alone would be a fifth of a recovery build. A line is
// dropped rather than waiting for a syslogd that hangs.
func syslogSink() (logSink, error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	to := &syscall.SockaddrUnix{Name: "/dev/log"}
	if err := syscall.Connect(fd, to); err != nil {
		syscall.Close(fd)
		return nil, fmt.Errorf("syslog socket %q: %w", to.Name, err)
	}
	return func(level logLevel, msg string) {
		fmt.Fprintf(rawWriter(fd), "<%d>mendlet[%d]: %s", 3<<3|syslogSeverity(level), os.Getpid(), msg)
	}, nil
}

// rawWriter writes to a descriptor, one system call a write.
type rawWriter int

func (w rawWriter) Write(p []byte) (int, error) { return syscall.Write(int(w), p) }

// progress shows how far an install is: a bar on a terminal, a line each 10 % or 30 s
// without one, or JSON lines on stdout for a program. Times are monotonic.
type progress struct {
	mu    sync.Mutex
	mode  string // bar, lines, json, none
	w     io.Writer
	lg    *logger
	begun time.Time
	first int64 // where this run began: not 0 when it goes on from a checkpoint
	shown time.Time
	tenth int64
}

// newProgress gives what the writer calls; nil where nothing is to be shown. bar: a terminal may
// have one. out is where a program reads JSON.
func newProgress(mode string, quiet, bar bool, out io.Writer, lg *logger) func(done, total int64) {
	p := &progress{mode: mode, w: os.Stderr, lg: lg, first: -1, tenth: -1}
	switch {
	case p.mode == "json":
		p.w = out
	case quiet || p.mode == "none":
		return nil
	case p.mode == "":
		if p.mode = "lines"; bar && isTerminal(os.Stderr) {
			p.mode = "bar"
		}
	}
	return p.update
}

// isTerminal tells one on which a line can be written over.
func isTerminal(f *os.File) bool {
	var t syscall.Termios
	return ioctl(f, syscall.TCGETS, unsafe.Pointer(&t)) == nil && os.Getenv("TERM") != "dumb"
}

// update takes bytes done and in all.
func (p *progress) update(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.first < 0 {
		p.begun, p.shown, p.first = now, now, done
	}
	tenth := done * 10 / max(total, 1)
	last := done == total
	due := tenth != p.tenth && tenth > 0 || now.Sub(p.shown) >= 30*time.Second
	if p.mode == "bar" || p.mode == "json" {
		due = now.Sub(p.shown) >= 200*time.Millisecond
	}
	if !due && !last {
		return
	}
	p.shown, p.tenth = now, tenth
	rate, left := p.speed(now, done, total)
	switch p.mode {
	case "json":
		line, _ := json.Marshal(map[string]any{"event": "progress", "done": done, "total": total, "bytes_per_second": int64(rate), "seconds_left": int64(left.Seconds())})
		fmt.Fprintf(p.w, "%s\n", line)
	case "bar":
		n := int(done * 30 / max(total, 1))
		fmt.Fprintf(p.w, "\r[%-30s] %3d %% %s of %s, %.1f MB/s, %s left ", strings.Repeat("#", n), done*100/max(total, 1), mega(done), mega(total), rate/1e6, left)
		if last {
			fmt.Fprintln(p.w)
		}
	default:
		p.lg.infof("%d %%: %s of %s written, %.1f MB/s, %s left", done*100/max(total, 1), mega(done), mega(total), rate/1e6, left)
	}
}

func (p *progress) speed(now time.Time, done, total int64) (rate float64, left time.Duration) {
	if d := now.Sub(p.begun).Seconds(); d > 0 {
		rate = float64(done-p.first) / d
	}
	if rate > 0 {
		left = time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second)
	}
	return rate, left
}
