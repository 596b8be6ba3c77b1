// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// startTied starts a program that is killed when this one ends, also where a test panics and no clean-up runs. That
// signal comes already when the thread ends that forked (prctl(2), PR_SET_PDEATHSIG), so it is kept as long. What Wait
// gives comes over the channel.
func startTied(cmd *exec.Cmd) (<-chan error, error) {
	started, ended := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		err := cmd.Start()
		if started <- err; err == nil {
			ended <- cmd.Wait()
		}
	}()
	return ended, <-started
}

func TestStartTied(t *testing.T) {
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	must(t, err)
	ended, err := startTied(cmd)
	must(t, err)
	for range 50 {
		idly(func() {}) // ends a thread
	}
	in.Close()
	if err := <-ended; err != nil {
		t.Errorf("cat: %v", err)
	}
}

// board is a device on image files that runs slot A.
type board struct {
	t   *testing.T
	dir string
}

func newBoard(t *testing.T, slotSize int64, conf string) *board {
	b := &board{t, fastDir(t)}
	boardFiles(t, b.dir, slotSize, conf)
	return b
}

// process is a running mendlet.
type process struct {
	*exec.Cmd
	b    *board
	out  bytes.Buffer // of both, so that a failed test shows them in order
	done chan struct{}
}

func (b *board) start(args ...string) *process {
	b.t.Helper()
	self, err := os.Executable()
	if err != nil {
		b.t.Fatal(err)
	}
	p := &process{b: b, done: make(chan struct{})}
	p.Cmd = exec.Command(self, append([]string{"-c", b.dir + "/mender.conf", "-b", b.dir + "/none", "-d",
		b.dir}, args...)...)
	p.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=1", "MENDER_DATA_DIR="+b.dir+"/share", "MENDER_CONF_DIR="+b.dir)
	p.Stdout, p.Stderr = &p.out, &p.out
	if err := p.Start(); err != nil {
		b.t.Fatal(err)
	}
	go func() {
		p.Wait()
		close(p.done)
	}()
	return p
}

// end waits for the process and gives its exit code, -1 when it was killed.
func (p *process) end() (exit int, said string) {
	<-p.done
	p.b.t.Logf("%s: exit code %d\n%s", strings.Join(p.Args[7:], " "), p.ProcessState.ExitCode(), &p.out)
	return p.ProcessState.ExitCode(), p.out.String()
}

func (b *board) mendlet(args ...string) (exit int, said string) {
	b.t.Helper()
	return b.start(args...).end()
}

func (b *board) peek() *record {
	rec, err := peekJournal(b.dir, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return rec
}

// once signals the process as soon as cond holds; it reports false if the process had ended
// before.
func (p *process) once(sig syscall.Signal, cond func(*update) bool) bool {
	for {
		select {
		case <-p.done:
			return false
		default:
		}
		if u := p.b.peek().Update; u != nil && cond(u) {
			p.Process.Signal(sig)
			<-p.done
			return true
		}
		time.Sleep(time.Millisecond) // the journal is looked at, not waited for: it belongs to another process
	}
}

// holds checks that slot B has the image and the boot environment points to it.
func (b *board) holds(image []byte) {
	b.t.Helper()
	got := readFileOrNil(filepath.Join(b.dir, "p3"))
	if len(got) < len(image) || !bytes.Equal(got[:len(image)], image) {
		b.t.Error("slot B does not hold the image")
	}
	vars, _ := readSimEnv(readFileOrNil(filepath.Join(b.dir, "env")))
	if vars["mender_boot_part"] != "3" || vars["upgrade_available"] != "1" {
		b.t.Errorf("boot environment: got %v, want slot 3 to be tried", vars)
	}
}

// gate serves one file and counts; it can stop at a byte of it.
type gate struct {
	mu     sync.Mutex
	body   []byte
	etag   string
	stop   int64  // byte behind which nothing is sent; 0: none
	late   bool   // stop only what does not begin at byte 0
	how    string // hang or drop
	broken bool   // after a drop: nothing is served any more
	sent   int64
	starts []int64 // where requests began
}

func (g *gate) set(stop int64, how string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stop, g.how, g.broken = stop, how, false
}

// replace puts something else behind the same URL.
func (g *gate) replace(body []byte, etag string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.body, g.etag = body, etag
}

func (g *gate) serve(w http.ResponseWriter, r *http.Request) {
	var from int64
	fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
	g.mu.Lock()
	body, etag, broken := g.body, g.etag, g.broken
	g.starts = append(g.starts, from)
	g.mu.Unlock()
	if broken {
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("ETag", etag)
	http.ServeContent(&gateWriter{w, r.Context(), g, from, from}, r, "", time.Unix(1700000000, 0), bytes.NewReader(body))
}

type gateWriter struct {
	http.ResponseWriter
	ctx context.Context
	g   *gate

	begin, off int64
}

func (w *gateWriter) Write(p []byte) (int, error) {
	w.g.mu.Lock()
	stop, how := w.g.stop, w.g.how
	if w.g.late && w.begin == 0 {
		stop = 0
	}
	w.g.mu.Unlock()
	n := len(p)
	if stop > 0 {
		n = int(max(0, min(int64(n), stop-w.off)))
	}
	n, err := w.ResponseWriter.Write(p[:n])
	w.off += int64(n)
	w.g.mu.Lock()
	w.g.sent += int64(n)
	w.g.broken = w.g.broken || err == nil && n < len(p) && how == "drop"
	w.g.mu.Unlock()
	if err != nil || n == len(p) {
		return n, err
	}
	w.ResponseWriter.(http.Flusher).Flush()
	if how == "hang" {
		<-w.ctx.Done()
	}
	panic(http.ErrAbortHandler)
}

// resumed gives the place of the last request, and all bytes sent.
func (g *gate) resumed() (last, sent int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.starts[len(g.starts)-1], g.sent
}

// interrupted checks what a process left that was stopped at a place behind byte at.
func (b *board) interrupted(a realArtifact, at int64) {
	b.t.Helper()
	u := b.peek().Update
	switch {
	case u == nil || u.Step != stepDownload:
		b.t.Fatalf("the journal says %+v, want a download in progress", u)
	case a.restart && (u.Checkpoint == nil || u.Checkpoint.Offset < at):
		b.t.Fatalf("checkpoint %+v, want one at %d or behind", u.Checkpoint, at)
	case !a.restart && u.Checkpoint != nil:
		b.t.Fatalf("checkpoint %+v, want none", u.Checkpoint)
	}
}

func (b *board) journal(change func(*record)) {
	changeJournal(b.t, b.dir, change)
}
