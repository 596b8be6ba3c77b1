// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// planOf makes an index of chunks that are stored in as many bytes as given, 0 for one of zeros.
func planOf(stored ...uint32) *deltaPlan {
	x := &deltaIndex{average: minAverage, first: 1000}
	x.end = x.first
	for i, n := range stored {
		c := chunk{sum: uint64(i + 1), size: 100, stored: max(n, minMember)}
		if n == 0 {
			c.sum = 0
		}
		x.chunks = append(x.chunks, c)
		x.end += int64(c.stored)
	}
	return newDeltaPlan(x)
}

func allRuns(p *deltaPlan, gap int64) (runs []deltaRun) {
	for i, off := 0, p.x.first; ; {
		r, ok := p.run(i, len(p.x.chunks)+1, off, gap)
		if !ok {
			return runs
		}
		runs = append(runs, r)
		i, off = r.end, r.upto
	}
}

func TestDeltaRuns(t *testing.T) {
	p := planOf(50, 50, 0, 60, 70, 80, 90, 0)
	for _, n := range []uint64{1, 4, 6} {
		p.found(fromRunning, chunk{sum: n, size: 100}, int64(n))
	}
	p.found(fromRunning, chunk{sum: 2, size: 99}, 7) // of another size
	p.settle(0)
	for _, c := range []struct {
		gap  int64
		want []deltaRun
	}{
		{0, []deltaRun{{1, 2, 1050, 1100}, {4, 5, 1180, 1250}, {6, 7, 1330, 1420}, {8, 9, 1440, 1440}}},
		{20, []deltaRun{{1, 2, 1050, 1100}, {4, 5, 1180, 1250}, {6, 9, 1330, 1440}}},
		{79, []deltaRun{{1, 2, 1050, 1100}, {4, 5, 1180, 1250}, {6, 9, 1330, 1440}}},
		{80, []deltaRun{{1, 9, 1050, 1440}}},
	} {
		got := allRuns(p, c.gap)
		if len(got) != len(c.want) {
			t.Errorf("gap %d: got %v, want %v", c.gap, got, c.want)
			continue
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("gap %d: got %v, want %v", c.gap, got, c.want)
			}
		}
	}
	if got, want := p.cost(20), (deltaCost{Fetch: 1000 + 50 + 70 + 110, Whole: 1440, Requests: 3, Missing: 300,
		Running: 300, Zeros: 200}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if r, ok := p.run(0, 6, p.x.first, 1000); !ok || r != (deltaRun{1, 5, 1050, 1250}) {
		t.Errorf("of the first six: got %v", r)
	}
	if r, ok := p.run(2, 4, 1100, 1000); ok {
		t.Errorf("of what is there: got %v", r)
	}
	p.whole = true
	if got := allRuns(p, 0); len(got) != 1 || got[0] != (deltaRun{0, 9, 1000, 1440}) {
		t.Errorf("whole: got %v", got)
	}
}

// What the idle slot has is good only ahead of the writer.
func TestDeltaIdleAheadOfTheWriter(t *testing.T) {
	for _, c := range []struct {
		at, start int64
		want      bool
	}{{99, 0, false}, {100, 0, true}, {5000, 0, true}, {149, 150, false}, {150, 150, true}} {
		p := planOf(50, 50, 50)
		p.found(fromIdle, chunk{sum: 2, size: 100}, c.at)
		p.settle(c.start)
		if _, at, ok := p.source(1); ok != c.want || ok && at != c.at {
			t.Errorf("at %d with the writer at %d: got %v, want %v", c.at, c.start, ok, c.want)
		}
	}
	p := planOf(50)
	p.found(fromIdle, chunk{sum: 1, size: 100}, 3)
	p.found(fromIdle, chunk{sum: 1, size: 100}, 9)
	p.found(fromRunning, chunk{sum: 1, size: 100}, 1)
	if s, at, _ := p.source(0); s != fromIdle || at != 9 {
		t.Errorf("got source %d at %d, want the idle slot's last place", s, at)
	}
	p.forget(fromIdle)
	if _, _, ok := p.source(0); ok {
		t.Error("a source is not forgotten")
	}
}

// An old image is found again, shifted and in parts.
func TestDeltaScan(t *testing.T) {
	old := simImage(5, 1<<20)
	image := bytes.Join([][]byte{simImage(6, 70001), old[:400000], []byte("xyz"), old[400000:]}, nil)
	x := &deltaIndex{average: minAverage, imageSize: int64(len(image))}
	c := newChunker(minAverage)
	for p := image; len(p) > 0; {
		n := c.next(p)
		ch := describe(p[:n])
		ch.stored = uint32(n) + minMember
		x.chunks, p = append(x.chunks, ch), p[n:]
	}
	for _, piece := range []int{len(old), 1000, 131072} {
		p := newDeltaPlan(x)
		s := newDeltaScan(p, fromRunning)
		for off := 0; off < len(old); off += piece {
			s.Write(old[off:min(off+piece, len(old))])
		}
		s.end()
		p.settle(0)
		pos, found := 0, 0
		for i, ch := range x.chunks {
			if _, at, ok := p.source(i); ok {
				found += int(ch.size)
				if !bytes.Equal(old[at:at+int64(ch.size)], image[pos:pos+int(ch.size)]) {
					t.Fatalf("chunk %d at %d is not what is in the old image at %d", i, pos, at)
				}
			}
			pos += int(ch.size)
		}
		if missing := len(image) - found; missing > 70004+3*64<<10 {
			t.Errorf("pieces of %d: %d bytes missing", piece, missing)
		}
		if got := p.cost(0); got.Running != int64(found) || got.Missing != int64(len(image)-found) {
			t.Errorf("got %+v, want %d found", got, found)
		}
	}
}

// Runs cover what is missing and never overlap, lie within the data, and come to an end, whatever was found.
func FuzzDeltaPlan(f *testing.F) {
	f.Add([]byte{50, 0, 60, 70}, []byte{1, 0, 0, 9}, int64(30), int64(100))
	f.Add([]byte{0}, []byte{}, int64(0), int64(0))
	f.Fuzz(func(t *testing.T, stored, found []byte, gap, start int64) {
		if len(stored) > 1000 || gap < 0 {
			return
		}
		var sizes []uint32
		for _, n := range stored {
			sizes = append(sizes, uint32(n))
		}
		p := planOf(sizes...)
		for ; len(found) >= 4; found = found[4:] {
			p.found(deltaSource(found[0]&1), chunk{sum: uint64(found[1]), size: 100 - uint32(found[0]>>7)},
				int64(binary.LittleEndian.Uint16(found[2:])))
		}
		p.settle(start)
		p.whole = start&7 == 7
		i, off := 0, p.x.first
		for _, r := range allRuns(p, gap) {
			if r.first < i || r.end <= r.first || r.off < off || r.upto < r.off || r.upto > p.x.end {
				t.Fatalf("run %+v behind chunk %d at %d", r, i, off)
			}
			for ; i < r.first; i++ {
				if p.missing(i) {
					t.Fatalf("chunk %d is missing and not fetched", i)
				}
				off += int64(p.x.chunks[i].stored)
			}
			if off != r.off {
				t.Fatalf("run %+v: its first chunk is at %d", r, off)
			}
			if i, off = r.end, r.upto; !p.missing(r.first) || !p.missing(r.end-1) {
				t.Fatalf("run %+v begins or ends with what is there", r)
			}
		}
		if i != len(stored)+1 {
			t.Fatalf("ends at chunk %d of %d", i, len(stored))
		}
		if c := p.cost(gap); c.Fetch > c.Whole || c.Missing+c.Running+c.Idle+c.Zeros != int64(100*len(stored)) {
			t.Fatalf("%+v", c)
		}
		pos := int64(0)
		for i := range p.x.chunks {
			if s, at, ok := p.source(i); ok && s == fromIdle && at < max(pos, start) {
				t.Fatalf("chunk %d at %d comes from %d, with the writer at %d", i, pos, at, start)
			}
			pos += 100
		}
	})
}
