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

// rateWindow is how far back a rate looks: long enough that one slow write does not show, short
// enough that a line that gets faster or stops does.
const rateWindow = 10 * time.Second

// progress shows how far an install is: a bar on a terminal, a line each 10 % (and second) or 30 s
// without one, or JSON lines on stdout for a program. Times are monotonic.
type progress struct {
	mu      sync.Mutex
	mode    string // bar, lines, json, none
	w       io.Writer
	lg      *logger
	now     func() time.Time
	phase   phase
	samples []progressSample // of the phase, the last rateWindow of it
	shown   time.Time
	tenth   int64
	drawn   int // letters of the bar that stands on the terminal
}

type progressSample struct {
	at   time.Time
	done int64
}

// newProgress gives what the writer calls; nil where nothing is to be shown. bar: a terminal may
// have one. out is where a program reads JSON.
func newProgress(mode string, quiet, bar bool, out io.Writer, lg *logger) func(headway) {
	p := &progress{mode: mode, w: os.Stderr, lg: lg, now: time.Now}
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
	if p.mode == "bar" && lg != nil {
		lg.before = p.endLine
	}
	return p.update
}

// isTerminal tells one on which a line can be written over.
func isTerminal(f *os.File) bool {
	var t syscall.Termios
	return ioctl(f, syscall.TCGETS, unsafe.Pointer(&t)) == nil && os.Getenv("TERM") != "dumb"
}

// update shows h if it is time to.
func (p *progress) update(h headway) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now, begins := p.now(), h.phase != p.phase
	if begins {
		p.phase, p.samples, p.shown, p.tenth = h.phase, nil, now, h.done*10/max(h.total, 1)
	}
	p.sample(now, h.done)
	tenth, last := h.done*10/max(h.total, 1), h.done == h.total && !begins
	var due bool
	switch p.mode {
	case "lines":
		// A phase that only reads is told as it begins, and then if it takes long.
		since := now.Sub(p.shown)
		due = since >= 30*time.Second || h.phase == phaseWrite && (tenth > p.tenth && since >= time.Second || last)
		if begins && h.phase != phaseWrite {
			p.lg.passf("%s: %s", h.phase, mega(h.total-h.done))
		}
	default:
		due = begins || last || now.Sub(p.shown) >= 200*time.Millisecond
	}
	if !due {
		return
	}
	p.shown, p.tenth = now, tenth
	rate, left, known := p.speed(h)
	total, pace := max(h.total, 1), p.pace(rate, left, known)
	switch p.mode {
	case "json":
		e := map[string]any{"event": "progress", "phase": h.phase, "done": h.done, "total": h.total, "written": h.written,
			"bytes_per_second": int64(rate), "seconds_left": nil}
		if h.fetched > 0 {
			e["fetched"] = h.fetched
		}
		if known {
			e["seconds_left"] = int64(left.Seconds())
		}
		printEvent(p.w, e)
	case "bar":
		const width = 16
		bar := strings.Repeat("#", int(h.done*width/total))
		line := fmt.Sprintf("%s [%-*s] %3d %% %s%s", h.phase, width, bar, h.done*100/total, megaOf(h.done, h.total), pace)
		fmt.Fprintf(p.w, "\r%-*s", p.drawn, line)
		if p.drawn = len(line); last {
			p.newLine()
		}
	default:
		p.lg.passf("%s: %d %%, %s%s%s", h.phase, h.done*100/total, megaOf(h.done, h.total), writtenOf(h), pace)
	}
}

// endLine leaves a bar standing, for a line of the log that comes next.
func (p *progress) endLine() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drawn > 0 {
		p.newLine()
	}
}

func (p *progress) newLine() {
	fmt.Fprintln(p.w)
	p.drawn = 0
}

// megaOf is "21.0 of 50.0 MB".
func megaOf(done, total int64) string {
	return strings.TrimSuffix(mega(done), " MB") + " of " + mega(total)
}

// writtenOf says how much of what is in place this run wrote.
func writtenOf(h headway) string {
	if h.phase != phaseWrite {
		return ""
	}
	text := fmt.Sprintf(", %s written", mega(h.written))
	if h.fetched > 0 {
		text += fmt.Sprintf(", %s fetched", mega(h.fetched))
	}
	return text
}

// pace is the rate and the time left, as far as there is something to say of them.
func (p *progress) pace(rate float64, left time.Duration, known bool) string {
	switch {
	case known:
		return fmt.Sprintf(", %.1f MB/s, %s left", rate/1e6, left)
	case len(p.samples) > 1:
		return ", stalled"
	}
	return ""
}

// sample takes down where the phase is, twice a second at most, and forgets what is long ago.
func (p *progress) sample(now time.Time, done int64) {
	if n := len(p.samples); n > 1 && now.Sub(p.samples[n-2].at) < rateWindow/20 {
		p.samples[n-1] = progressSample{now, done}
	} else {
		p.samples = append(p.samples, progressSample{now, done})
	}
	for len(p.samples) > 2 && now.Sub(p.samples[1].at) >= rateWindow {
		p.samples = p.samples[1:]
	}
}

// speed is that of the last rateWindow, in bytes a second. The time left is for all that is to come,
// what is to be read back as fast as the slot was read before; it is not known where nothing moves.
func (p *progress) speed(h headway) (rate float64, left time.Duration, known bool) {
	first, last := p.samples[0], p.samples[len(p.samples)-1]
	if d := last.at.Sub(first.at).Seconds(); d > 0 {
		rate = float64(last.done-first.done) / d
	}
	if rate <= 0 {
		return 0, 0, false
	}
	seconds := float64(h.total-h.done) / rate
	if h.later > 0 && h.readRate > 0 {
		seconds += float64(h.later) / h.readRate
	} else {
		seconds += float64(h.later) / rate
	}
	const longest = 1e9 // more is no time to tell, and would not fit
	return rate, time.Duration(min(seconds, longest) * float64(time.Second)).Round(time.Second), true
}

// printEvent prints a line of JSON for a program that follows.
func printEvent(w io.Writer, e map[string]any) error {
	text, err := json.Marshal(e)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", visibleJSON(text))
	return err
}
