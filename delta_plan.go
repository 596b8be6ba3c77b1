// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import "sort"

// What of an image is on the device already, and in which runs the rest is fetched. Nothing here reads or fetches: the
// same plan tells a publisher what a device would do.

// deltaSource is where a chunk can be had without the network.
type deltaSource int

const (
	fromRunning deltaSource = iota // the slot that is not written to
	fromIdle                       // the one that is, ahead of the writer
)

// Where a chunk comes from, in one number: an offset in a source, or this.
const notFound = -1

// deltaPlan says for each chunk of an image where its bytes come from. Besides the index it takes 12 bytes for a chunk
// while sources are looked through, then 8. Once it is settled it does not change.
type deltaPlan struct {
	x     *deltaIndex
	from  []int64  // by chunk: offset<<1 | source, or notFound
	order []uint32 // the chunks by their sums; nil once settled
	whole bool     // all is fetched, in one run
}

func newDeltaPlan(x *deltaIndex) *deltaPlan {
	p := &deltaPlan{x: x, from: make([]int64, len(x.chunks)), order: make([]uint32, len(x.chunks))}
	for i := range x.chunks {
		p.from[i], p.order[i] = notFound, uint32(i)
	}
	sort.Sort(p)
	return p
}

// The chunks by their sums.
func (p *deltaPlan) Len() int { return len(p.order) }

func (p *deltaPlan) Less(i, j int) bool { return p.sum(i) < p.sum(j) }

func (p *deltaPlan) Swap(i, j int) { p.order[i], p.order[j] = p.order[j], p.order[i] }

func (p *deltaPlan) sum(i int) uint64 { return p.x.chunks[p.order[i]].sum }

// found takes down that c is at offset at of a source. The running slot is preferred; of several places in the idle one
// the last counts, which is the best if they come in order.
func (p *deltaPlan) found(s deltaSource, c chunk, at int64) {
	if c.zero() {
		return
	}
	lo, hi := 0, len(p.order)
	for lo < hi {
		if m := (lo + hi) / 2; p.sum(m) < c.sum {
			lo = m + 1
		} else {
			hi = m
		}
	}
	for i := lo; i < len(p.order) && p.sum(i) == c.sum; i++ {
		n := p.order[i]
		if p.x.chunks[n].size == c.size && (p.from[n] < 0 || s == fromIdle && p.from[n]&1 == int64(fromIdle)) {
			p.from[n] = at<<1 | int64(s)
		}
	}
}

// source gives where chunk i comes from; ok is false for one of zeros and one that is fetched.
//
//go:noinline
func (p *deltaPlan) source(i int) (s deltaSource, at int64, ok bool) {
	f := p.from[i]
	return deltaSource(f & 1), f >> 1, f >= 0 && !p.x.chunks[i].zero()
}

// forget drops what was found in a source.
func (p *deltaPlan) forget(s deltaSource) {
	for i, f := range p.from {
		if f >= 0 && f&1 == int64(s) {
			p.from[i] = notFound
		}
	}
}

// settle ends the search. What the idle slot has counts only where the writer, which begins at byte start of the image
// and follows behind the reader, cannot have been when its chunk is read.
func (p *deltaPlan) settle(start int64) {
	p.order = nil
	pos := int64(0)
	for i := range p.x.chunks {
		if s, at, ok := p.source(i); ok && s == fromIdle && at < max(pos, start) {
			p.from[i] = notFound
		}
		pos += int64(p.x.chunks[i].size)
	}
}

// missing tells a chunk that has to be fetched; the one behind the last stands for the end of the data, which always
// is.
//
//go:noinline
func (p *deltaPlan) missing(i int) bool {
	return p.whole || i == len(p.x.chunks) || p.from[i] < 0 && !p.x.chunks[i].zero()
}

// deltaRun is what one request gets: the members of the chunks from first up to end, where the one behind the last
// chunk is the end of the data, bytes off up to upto of the data member.
type deltaRun struct {
	first, end int
	off, upto  int64
}

// run is the first one of chunks i up to limit, where the member of chunk i begins at off; ok is false if nothing of
// them is missing. Runs with at most gap bytes between them are one.
func (p *deltaPlan) run(i, limit int, off, gap int64) (r deltaRun, ok bool) {
	for ; i < limit && !p.missing(i); i++ {
		off += int64(p.x.chunks[i].stored)
	}
	r = deltaRun{i, i, off, off}
	for between := int64(0); i < limit && between <= gap; i++ {
		n := int64(0)
		if i < len(p.x.chunks) {
			n = int64(p.x.chunks[i].stored)
		}
		off, between = off+n, between+n
		if p.missing(i) {
			r.end, r.upto, between = i+1, off, 0
		}
	}
	return r, r.end > r.first
}

// deltaCost is what a plan comes to, in bytes.
type deltaCost struct {
	Fetch    int64 `json:"fetch"`    // stored, index and gaps included, but not what is before and behind the image's data
	Whole    int64 `json:"whole"`    // stored, all that there is in the same sense
	Requests int   `json:"requests"` // besides the one for the header
	Missing  int64 `json:"missing"`  // of the image, fetched
	Running  int64 `json:"running"`  // of the image, from the running slot
	Idle     int64 `json:"idle"`     // and from the idle one
	Zeros    int64 `json:"zeros"`
}

// cost of the image from chunk 0 on, with such a gap.
func (p *deltaPlan) cost(gap int64) (c deltaCost) {
	n := len(p.x.chunks)
	head := p.x.first
	c.Fetch, c.Whole = head, p.x.end
	for i, off := 0, head; ; c.Requests++ {
		r, ok := p.run(i, n+1, off, gap)
		if !ok {
			break
		}
		c.Fetch += r.upto - r.off
		i, off = r.end, r.upto
	}
	for i := range p.x.chunks {
		size := int64(p.x.chunks[i].size)
		switch s, _, ok := p.source(i); {
		case p.x.chunks[i].zero():
			c.Zeros += size
		case !ok || p.whole:
			c.Missing += size
		case s == fromIdle:
			c.Idle += size
		default:
			c.Running += size
		}
	}
	return c
}

// What counts until something is known of the line, in bytes; and of what is stored, how many per cent may be missing.
const gapUnknown, wholePercent = 16 << 10, 70

// decide says what the plan costs, and whether so much is missing that one request for all is better.
func (p *deltaPlan) decide(gap int64) (c deltaCost, whole bool) {
	c = p.cost(gap)
	return c, c.Fetch*100 > c.Whole*wholePercent
}

// deltaScan finds the chunks of what is written to it, an old image or a slot.
type deltaScan struct {
	plan *deltaPlan
	src  deltaSource
	c    *chunker
	at   int64 // of buf in the source
	buf  []byte
}

func newDeltaScan(p *deltaPlan, s deltaSource) *deltaScan {
	return &deltaScan{plan: p, src: s, c: newChunker(p.x.average)}
}

// Write takes the next bytes.
func (d *deltaScan) Write(p []byte) (int, error) {
	d.buf = append(d.buf, p...)
	d.cut(d.c.max)
	return len(p), nil
}

// cut takes chunks off the front of what is there, as long as that is need bytes or more.
func (d *deltaScan) cut(need int) {
	from := 0
	for from < len(d.buf) && len(d.buf)-from >= need {
		n := d.c.next(d.buf[from:])
		d.plan.found(d.src, describe(d.buf[from:from+n]), d.at)
		from, d.at = from+n, d.at+int64(n)
	}
	d.buf = d.buf[:copy(d.buf, d.buf[from:])]
}

// end cuts what is left, where the source ends. jump goes on at offset at, where what is between cannot be read.
func (d *deltaScan) end() { d.cut(1) }

func (d *deltaScan) jump(at int64) { d.at, d.buf = at, d.buf[:0] }
