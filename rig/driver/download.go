// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// fileServer serves files and counts what it sends of those whose name is slow, which it
// sends slowly, so that what is under way to the device is little.
type fileServer struct {
	files http.Handler

	mu      sync.Mutex
	slow    string
	sent    int64 // bytes of the slow file, in all
	reached int64 // end of what was sent of it so far
	lost    int64 // most that was sent twice because of one cut
	from    int64 // where this life went on, 0: at the start
	left    int64 // bytes until cut is closed
	cut     chan struct{}
}

const slowRate = 1500 << 10 // bytes per second

func (s *fileServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	slow := s.slow != "" && strings.HasSuffix(r.URL.Path, s.slow)
	s.mu.Unlock()
	if slow {
		off := rangeStart(r)
		s.begin(off)
		w = &slowWriter{ResponseWriter: w, s: s, off: off}
	}
	s.files.ServeHTTP(w, r)
}

func rangeStart(r *http.Request) (off int64) {
	fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &off)
	return off
}

type slowWriter struct {
	http.ResponseWriter
	s   *fileServer
	off int64 // in the file, of the next byte
}

func (w *slowWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		var k int
		k, err = w.ResponseWriter.Write(p[:min(len(p), 32<<10)])
		w.s.count(w.off, int64(k))
		w.off += int64(k)
		n, p = n+k, p[k:]
		time.Sleep(time.Duration(k) * time.Second / slowRate)
	}
	return n, err
}

// begin notes where a life goes on; the start of the file is asked for each time, too, for
// header and signature.
func (s *fileServer) begin(off int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if off > 0 && s.from == 0 {
		s.from = off
		s.lost = max(s.lost, s.reached-off)
	}
}

func (s *fileServer) count(off, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent += n
	s.reached = max(s.reached, off+n)
	if s.left -= n; s.left <= 0 && s.cut != nil {
		close(s.cut)
		s.cut = nil
	}
}

// cutAfter returns a channel that closes when n more bytes were sent.
func (s *fileServer) cutAfter(n int64) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := make(chan struct{})
	s.left, s.cut, s.from = n, c, 0
	return c
}

// What one cut may cost in bytes: a checkpoint interval, five blocks, twice the distance of two
// points where gzip can be entered, the start of the file, and what is in the buffers of two
// kernels and QEMU.
const lostPerCut = 8<<20 + 5<<19 + 2<<20 + 1<<20 + 1<<20

// downloads cuts the power n times while one artifact is being downloaded. Some lives are
// long enough to leave a checkpoint, most are not.
func downloads(d *device, n int) error {
	const file = "vbig.mender"
	st, err := os.Stat(filepath.Join(d.out, file))
	if err != nil {
		return err
	}
	if err := d.on(); err != nil {
		return err
	}
	d.files.slow = file
	if err := d.vm.send("updater update " + d.url + file); err != nil {
		return err
	}
	for i := 1; i <= n; i++ {
		after := 1<<20 + d.rng.Int63n(5<<19)
		if i == 1 || i == 4 {
			after = 10<<20 + d.rng.Int63n(1<<20)
		}
		if err := d.cutDownload(i, after); err != nil {
			return err
		}
	}
	d.files.cutAfter(1 << 40)
	text, err := d.waitUp(updateLimit, nil)
	if err == nil {
		err = d.settled(text)
	}
	if err == nil && d.version != "big" {
		err = fmt.Errorf("version %s runs, want big", d.version)
	}
	if err == nil {
		err = d.verdict("big", "committed")
	}
	if err != nil {
		return fmt.Errorf("after %d cuts: %w", n, err)
	}
	sent, bound := d.files.sent, st.Size()+int64(n)*lostPerCut
	d.say("%d cuts in a row: %d bytes sent for an artifact of %d; at most %d were sent again for a cut", n, sent, st.Size(), d.files.lost)
	if sent > bound || d.files.lost > lostPerCut {
		return fmt.Errorf("%d bytes sent, want %d at most, and %d for one cut", sent, bound, int64(lostPerCut))
	}
	return d.off()
}

func (d *device) cutDownload(i int, after int64) error {
	text, err := d.waitUp(updateLimit, d.files.cutAfter(after))
	if err == nil {
		return fmt.Errorf("the download ended before cut %d", i)
	}
	if !errors.Is(err, errCut) {
		return err
	}
	d.vm.kill()
	mode := []lossMode{keepAll, loseAll, prefix, anything}[d.rng.Intn(4)]
	lost, err := d.vm.disk.powerCut(mode, d.rng)
	if err != nil {
		return err
	}
	d.files.mu.Lock()
	from, reached := d.files.from, d.files.reached
	d.files.mu.Unlock()
	d.say("cut %d after %d more bytes: went on at %d, the furthest is %d, %q: %s", i, after, from, reached, lastStep(text), lost)
	if err := d.checkEnv(); err != nil {
		return fmt.Errorf("after cut %d: %w", i, err)
	}
	return d.start()
}
