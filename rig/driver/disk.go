// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"math/rand"
	"os"
	"sync"
)

// The disk's layout, in bytes, as build.sh and uboot/common.config have it.
const (
	sector   = 512
	envSize  = 0x20000
	envA     = 0x800000
	envB     = 0x1000000
	slotSize = 32 << 20
	slotA    = 32 << 20
	dataAt   = slotA + 2*slotSize
)

// An op is a write or a cache flush as the guest's disk controller saw it.
type op struct {
	off   int64
	data  []byte
	fua   bool
	flush bool // off and data are empty
}

// region says what part of the disk an op touches.
func (o op) region() string {
	end := o.off + int64(len(o.data))
	switch {
	case o.flush:
		return "flush"
	case o.off < envA+envSize && end > envA, o.off < envB+envSize && end > envB:
		return "env"
	case o.off >= dataAt:
		return "data"
	case end > slotA:
		return "slot"
	}
	return "other"
}

// lossMode says what a power cut does with writes that were acknowledged but neither flushed
// nor written with FUA.
type lossMode string

const (
	keepAll  lossMode = "keep"   // a write-through disk: every acknowledged write survives
	loseAll  lossMode = "lose"   // nothing since the last flush survives
	prefix   lossMode = "prefix" // the first few of them survive, in order
	anything lossMode = "random" // each survives or not
)

// disk is a block device with a volatile write cache: what the guest has not flushed is held in
// memory and may be lost when the power is cut.
type disk struct {
	mu       sync.Mutex
	f        *os.File
	size     int64
	pending  []op
	log      []op
	keepLog  bool
	through  bool // every acknowledged write is durable, as on an SD card
	dead     bool
	counts   map[string]int // by region, and "write" for all of them
	cutWhat  string
	cutAfter int
	cut      chan struct{}
	inflight op
}

func openDisk(path string) (*disk, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &disk{f: f, size: st.Size(), counts: map[string]int{}, cut: make(chan struct{})}, nil
}

// cutAt cuts the power at the k-th op from now that is of the region, or at the k-th write if
// what is "write". That op is not acknowledged. The channel closes then.
func (d *disk) cutAt(what string, k int) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutWhat, d.cutAfter = what, k
	return d.cut
}

// counted returns how many ops there were so far, by region.
func (d *disk) counted() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := map[string]int{}
	for k, v := range d.counts {
		c[k] = v
	}
	return c
}

// arrive counts an op and says whether the device still has power to do it.
func (d *disk) arrive(o op) bool {
	if d.dead {
		return false
	}
	r := o.region()
	d.counts[r]++
	if !o.flush {
		d.counts["write"]++
	}
	if d.cutAfter > 0 && (d.cutWhat == r || d.cutWhat == "write" && !o.flush) {
		if d.cutAfter--; d.cutAfter == 0 {
			d.inflight, d.dead = o, true
			close(d.cut)
			return false
		}
	}
	if d.keepLog {
		d.log = append(d.log, o)
	}
	return true
}

func (d *disk) write(o op) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.arrive(o) {
		return false
	}
	if !o.fua && !d.through {
		d.pending = append(d.pending, o)
		return true
	}
	d.pending = trim(d.pending, o) // older unflushed data for the same sectors is void
	return d.store(o) == nil
}

func (d *disk) flush() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.arrive(op{flush: true}) {
		return false
	}
	err := d.store(d.pending...)
	d.pending = nil
	return err == nil
}

func (d *disk) store(ops ...op) error {
	for _, o := range ops {
		if _, err := d.f.WriteAt(o.data, o.off); err != nil {
			fmt.Fprintln(os.Stderr, "rig:", err)
			return err
		}
	}
	return nil
}

// powerless waits for ever, as a device without power leaves its host without an answer. QEMU is
// about to be killed.
func powerless() { select {} }

func (d *disk) read(p []byte, off int64) error {
	d.mu.Lock()
	if d.dead {
		d.mu.Unlock()
		powerless()
	}
	defer d.mu.Unlock()
	if _, err := d.f.ReadAt(p, off); err != nil && err != io.EOF {
		return err
	}
	overlay(p, off, d.pending)
	return nil
}

// powerCut ends the device: what survives of the volatile cache reaches the file, the rest is
// gone. It says what there was.
func (d *disk) powerCut(mode lossMode, rng *rand.Rand) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	alive := survivors(d.pending, d.inflight, mode, rng)
	what := fmt.Sprintf("%d writes unflushed (%s)", len(d.pending), mode)
	d.pending = nil
	if err := d.store(alive...); err != nil {
		return what, err
	}
	return what, d.f.Close()
}

// close is an orderly end: everything is written.
func (d *disk) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	if err := d.store(d.pending...); err != nil {
		return err
	}
	return d.f.Close()
}

// survivors picks the unflushed writes that outlive a power cut, and tears the write during which
// it fell at a sector.
func survivors(pending []op, inflight op, mode lossMode, rng *rand.Rand) []op {
	var out []op
	switch mode {
	case keepAll:
		out = append(out, pending...)
	case prefix:
		out = append(out, pending[:rng.Intn(len(pending)+1)]...)
	case anything:
		for _, o := range pending {
			if rng.Intn(2) == 0 {
				out = append(out, o)
			}
		}
	}
	all := len(inflight.data) / sector
	if rng.Intn(2) == 0 { // half of them early: an environment's text is in its first sectors
		all = min(all, 16)
	}
	if n := rng.Intn(all+1) * sector; n > 0 {
		out = append(out, op{off: inflight.off, data: inflight.data[:n]})
	}
	return out
}

// trim takes what o overwrites out of the ops.
func trim(ops []op, o op) []op {
	lo, hi := o.off, o.off+int64(len(o.data))
	var out []op
	for _, p := range ops {
		a, b := p.off, p.off+int64(len(p.data))
		if b <= lo || a >= hi {
			out = append(out, p)
			continue
		}
		if a < lo {
			out = append(out, op{off: a, data: p.data[:lo-a]})
		}
		if b > hi {
			out = append(out, op{off: hi, data: p.data[hi-a:]})
		}
	}
	return out
}

// overlay lays the ops over p, which was read at off.
func overlay(p []byte, off int64, ops []op) {
	for _, o := range ops {
		lo, hi := max(off, o.off), min(off+int64(len(p)), o.off+int64(len(o.data)))
		if lo < hi {
			copy(p[lo-off:hi-off], o.data[lo-o.off:hi-o.off])
		}
	}
}
