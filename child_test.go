// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// childLog is a logger that keeps what it is told. onLine, if not nil, sees each line.
type childLog struct {
	logger
	mu     sync.Mutex
	lines  []string
	onLine func(string)
}

func newChildLog() *childLog {
	l := &childLog{}
	l.sinks = []logSink{func(_ logLevel, msg string) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.lines = append(l.lines, msg)
		if l.onLine != nil {
			l.onLine(msg)
		}
	}}
	return l
}

func (l *childLog) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n") + "\n"
}

// shell is a call of sh with a script. Two minutes are for ever.
func shell(lg *logger, script string) child {
	return child{what: "test", path: "/bin/sh", args: []string{"-c", script}, dir: "/",
		timeout: 2 * time.Minute, prefix: "out", lg: lg}
}

func TestChildSurroundings(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	t.Setenv("PATH", "")
	t.Setenv("MENDLET_TEST", "kept as it is")
	prepareProcess()
	ours, err := os.Create(filepath.Join(t.TempDir(), "ours"))
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	t.Setenv("OURS", ours.Name())
	lg := newChildLog()
	err = runChild(t.Context(), shell(&lg.logger, `
		readlink /proc/$$/fd/0
		readlink /proc/$$/fd/* | grep "$OURS"
		umask
		echo "$MENDLET_TEST"
		pwd
		read -r _ _ _ _ group _ </proc/$$/stat; [ $group = $$ ] && echo leader
		printf 'no line feed' >&2`))
	if err != nil {
		t.Fatal(err)
	}
	got := slices.Sorted(slices.Values(lg.lines))
	want := []string{"out (stderr): no line feed", "out (stdout): /", "out (stdout): /dev/null",
		"out (stdout): 0022", "out (stdout): kept as it is", "out (stdout): leader"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestChildExit(t *testing.T) {
	var exit *exec.ExitError
	if err := runChild(t.Context(), shell(nil, "exit 21")); !errors.As(err, &exit) || exit.ExitCode() != 21 {
		t.Errorf("got %v, want exit status 21", err)
	}
	if err := runChild(t.Context(), shell(nil, "kill -9 $$")); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("got %v, want signal: killed", err)
	}
	missing := shell(nil, "")
	missing.path = "/nonexistent/program"
	if err := runChild(t.Context(), missing); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want not exist", err)
	}
}

// A script that answers SIGTERM with exit 21 does not thereby ask to be called again.
func TestChildTimeout(t *testing.T) {
	c := shell(nil, "trap 'exit 21' TERM; while :; do sleep 0.01; done")
	c.timeout = 50 * time.Millisecond
	err := runChild(t.Context(), c)
	var exit *exec.ExitError
	if err == nil || errors.As(err, &exit) || !strings.Contains(err.Error(), "not done after 50ms") {
		t.Errorf("got %v, want a time-out that is no exit status", err)
	}
}

// A grandchild that ignores SIGTERM is killed with the group. It holds a named pipe open,
// so that its end is the end of file for us.
func TestChildKillsGroup(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "alive")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	alive, err := os.OpenFile(fifo, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Close()
	cause := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	lg := newChildLog()
	lg.onLine = func(line string) {
		if strings.HasSuffix(line, "ready") {
			cancel(cause)
		}
	}
	c := shell(&lg.logger, `trap "" TERM; exec 3>"`+fifo+`"; (echo ready; exec sleep 1000) & wait`)
	c.grace = 50 * time.Millisecond
	if err := runChild(ctx, c); !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
	if _, err := alive.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("got %v, want end of file", err)
	}
}

// A daemon that keeps the output open must not hold us up, nor be killed.
func TestChildLeavesDaemon(t *testing.T) {
	lg := newChildLog()
	c := shell(&lg.logger, "sleep 1000 & echo $!")
	c.grace = 200 * time.Millisecond
	if err := runChild(t.Context(), c); err != nil {
		t.Error(err)
	}
	line, _, _ := strings.Cut(lg.text(), "\n")
	pid, err := strconv.Atoi(strings.TrimPrefix(line, "out (stdout): "))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Errorf("the daemon: %v", err)
	}
}

func TestChildOutputIsBounded(t *testing.T) {
	lg := newChildLog()
	err := runChild(t.Context(), shell(&lg.logger, `
		head -c 20000000 /dev/zero | tr '\0' x
		yes | head -n 1000000
		echo the end >&2`))
	if err != nil {
		t.Fatal(err)
	}
	text := lg.text()
	if len(text) > maxOutput+maxOutputLine {
		t.Errorf("got %d bytes of log, want at most %d", len(text), maxOutput+maxOutputLine)
	}
	if n := strings.Count(text, "the rest is not logged"); n != 1 {
		t.Errorf("got %d notices, want 1", n)
	}
	if n := len(lg.lines[0]); n > maxOutputLine+100 {
		t.Errorf("got a line of %d bytes", n)
	}
	if !strings.Contains(text, "out (stderr): the end\n") {
		t.Error("the limit of stdout must not silence stderr")
	}
}

// A child that never ends its output is stopped by the time-out.
func TestChildEndlessOutput(t *testing.T) {
	c := shell(nil, "yes")
	c.timeout = 50 * time.Millisecond
	if err := runChild(t.Context(), c); err == nil {
		t.Error("got no error")
	}
}

// What a child says on standard output and on standard error comes in the order in which it was said.
func TestChildOutputInOrder(t *testing.T) {
	t.Parallel()
	lg := newChildLog()
	err := runChild(t.Context(), shell(&lg.logger, `
		i=0
		while [ $i -lt 2000 ]; do
			case $((i * 7 % 5)) in
			0 | 3) echo $i ;;
			1) echo $i >/dev/stderr ;;
			*) echo $i >&2 ;;
			esac
			i=$((i + 1))
		done
		printf "the "; echo aside >&2; printf "end"`))
	must(t, err)
	if n := len(lg.lines); n != 2002 {
		t.Fatalf("got %d lines, want 2002", n)
	}
	for i, line := range lg.lines[:2000] {
		kind := "stderr"
		if k := i * 7 % 5; k == 0 || k == 3 {
			kind = "stdout"
		}
		if want := fmt.Sprintf("out (%s): %d", kind, i); line != want {
			t.Fatalf("line %d: got %q, want %q", i, line, want)
		}
	}
	if got := lg.lines[2000:]; !slices.Equal(got, []string{"out (stderr): aside", "out (stdout): the end"}) {
		t.Errorf("got %q", got)
	}
}
