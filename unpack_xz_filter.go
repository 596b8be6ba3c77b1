// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/bits"
)

// The filters that may stand before LZMA2 in xz (The .xz File Format 1.2.1, 5.3.2 and 5.3.3): a difference to earlier
// bytes, and addresses of jumps which compressing programs make absolute, so that the same target looks the same from
// everywhere. What exactly that does for each processor is not written down; liblzma (src/liblzma/simple) defines it.
const (
	xzDelta = 3 + iota
	xzX86
	xzPowerPC
	xzIA64
	xzARM
	xzThumb
	xzSPARC
	xzARM64
	xzRISCV
)

// xzAlign has the bytes by which a filter's start may go, from xzX86 on.
var xzAlign = [...]uint32{1, 4, 16, 4, 2, 4, 4, 2}

// xzFilter undoes one filter.
type xzFilter struct {
	id   byte
	pos  uint32 // address of the next byte
	done int    // in xzFilters.buf: the next byte
	dist byte   // delta: how far back, less one
	past [256]byte
	mask uint32 // x86: which of the bytes before may be of a jump, the latest lowest
}

// xzFilters are those of a block. What LZMA2 gives is put into buf, where each filter in turn goes over it as far as it
// can: the last few bytes may be the beginning of an instruction.
type xzFilters struct {
	list       []xzFilter // in the order of unpacking
	buf        []byte
	begin, end int // in buf: not given yet; of what LZMA2 gave
}

const xzFilterRoom = 16 << 10

func (c *xzFilters) reset() { c.list, c.begin, c.end = c.list[:0], 0, 0 }

// add takes a filter of a block header by its number and its properties.
func (c *xzFilters) add(id uint64, p []byte) error {
	f := xzFilter{id: byte(id)}
	switch {
	case id == xzDelta && len(p) == 1:
		f.dist = p[0]
	case id > xzDelta && id <= xzRISCV && len(p) == 0:
	case id > xzDelta && id <= xzRISCV && len(p) == 4:
		if f.pos = le32(p); f.pos%xzAlign[id-xzX86] != 0 {
			return fmt.Errorf("start of filter %#x at %d is not aligned", id, f.pos)
		}
	default:
		return fmt.Errorf("filter %#x with %d bytes of properties is not known", id, len(p))
	}
	c.list = append([]xzFilter{f}, c.list...)
	if c.buf == nil {
		c.buf = make([]byte, xzFilterRoom)
	}
	return nil
}

// ready tells how many bytes have passed all filters.
func (c *xzFilters) ready() int {
	if len(c.list) == 0 {
		return 0
	}
	return c.list[len(c.list)-1].done - c.begin
}

func (c *xzFilters) read(p []byte) int {
	n := copy(p, c.buf[c.begin:c.begin+c.ready()])
	c.begin += n
	return n
}

// fill gets some more of what LZMA2 unpacks when nothing is ready.
func (c *xzFilters) fill(unpack func(p []byte) (int, error)) error {
	for i := range c.list {
		c.list[i].done -= c.begin
	}
	c.begin, c.end = 0, copy(c.buf, c.buf[c.begin:c.end])
	n, err := unpack(c.buf[c.end:])
	c.end += n
	c.run(false)
	return err
}

// run filters what can be. At the end of the block the rest stays as it is: there is no instruction in it.
func (c *xzFilters) run(last bool) {
	end := c.end
	for i := range c.list {
		f := &c.list[i]
		n := f.undo(c.buf[f.done:end])
		f.pos += uint32(n)
		if f.done += n; last {
			f.done = end
		}
		end = f.done
	}
}

// undo filters b in place and tells how far it came.
func (f *xzFilter) undo(b []byte) int {
	switch f.id {
	case xzDelta:
		for i := range b {
			at := byte(f.pos) + byte(i)
			b[i] += f.past[at-f.dist-1]
			f.past[at] = b[i]
		}
		return len(b)
	case xzX86:
		return f.undoX86(b)
	case xzIA64:
		return f.undoIA64(b)
	case xzThumb:
		return f.undoThumb(b)
	case xzRISCV:
		return f.undoRISCV(b)
	}
	n := 0
	for ; n+4 <= len(b); n += 4 {
		putLE32(b[n:], f.undoWord(le32(b[n:]), f.pos+uint32(n)))
	}
	return n
}

// undoWord is for processors whose instructions are words. Two of them have the highest byte first.
func (f *xzFilter) undoWord(v, pc uint32) uint32 {
	turned := bits.ReverseBytes32(v)
	switch {
	case f.id == xzARM && v>>24 == 0xeb: // BL
		return v&^0xffffff | (v-(pc+8)>>2)&0xffffff
	case f.id == xzPowerPC && turned&0xfc000003 == 0x48000001: // BL
		return bits.ReverseBytes32(turned&0xfc000003 | (turned-pc)&0x3fffffc)
	case f.id == xzSPARC && (turned>>22 == 0x100 || turned>>22 == 0x1ff): // CALL, of which 23 bits are of use
		to := turned - pc>>2
		return bits.ReverseBytes32(0x40000000 | -(to>>22&1)<<22&0x3fffffff | to&0x3fffff)
	case f.id == xzARM64 && v>>26 == 0x25: // BL
		return 0x94000000 | (v-pc>>2)&0x3ffffff
	case f.id == xzARM64 && v&0x9f000000 == 0x90000000: // ADRP, within 512 MiB
		to := v>>29&3 | v>>3&0x1ffffc
		if (to+0x20000)&0x1c0000 != 0 {
			return v
		}
		to -= pc >> 12
		return v&0x9000001f | to&3<<29 | to&0x3fffc<<3 | -(to&0x20000)&0xe00000
	}
	return v
}

// undoThumb is for BL in two halfwords of 11 bits each.
func (f *xzFilter) undoThumb(b []byte) int {
	n := 0
	for ; n+4 <= len(b); n += 2 {
		v := le32(b[n:])
		if v&0xf800f800 != 0xf800f000 {
			continue
		}
		to := v&0x7ff<<11 | v>>16&0x7ff
		to -= (f.pos + uint32(n) + 4) >> 1
		putLE32(b[n:], 0xf800f000|to>>11&0x7ff|to&0x7ff<<16)
		n += 2
	}
	return n
}

// xzBranches tells by the template of a bundle which of its three instructions may be branches, the first lowest.
const xzBranches = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
	"\x04\x04\x06\x06\x00\x00\x07\x07\x04\x04\x00\x00\x04\x04\x00\x00"

// undoIA64 is for bundles of 16 bytes: a template of 5 bits and three instructions of 41.
func (f *xzFilter) undoIA64(b []byte) int {
	n := 0
	for ; n+16 <= len(b); n += 16 {
		for slot := range 3 {
			if xzBranches[b[n]&31]>>slot&1 == 0 {
				continue
			}
			bit := 5 + 41*slot
			at, shift := b[n+bit/8:], bit%8
			all := uint64(le32(at)) | uint64(at[4])<<32 | uint64(at[5])<<40
			v := all >> shift
			if v>>37&15 != 5 || v>>9&7 != 0 {
				continue
			}
			to := uint32(v>>13&0xfffff|v>>36&1<<20) - (f.pos+uint32(n))>>4
			v = v&^(0x8fffff<<13) | uint64(to&0xfffff)<<13 | uint64(to&0x100000)<<16
			all = all&(1<<shift-1) | v<<shift
			putLE32(at, uint32(all))
			at[4], at[5] = byte(all>>32), byte(all>>40)
		}
	}
	return n
}

// undoX86 is for CALL and JMP of 32 bits that go less than 16 MiB: the highest byte of their address is 00 or ff. What
// mask knows of the four bytes before keeps addresses from being taken for jumps.
func (f *xzFilter) undoX86(b []byte) int {
	near := func(c byte) bool { return c == 0 || c == 0xff }
	n, before, mask := 0, -1, f.mask
	for ; n+5 <= len(b); n++ {
		if b[n]&0xfe != 0xe8 {
			continue
		}
		mask = mask << (n - before - 1) & 7
		before = n
		// Of the bytes of the address, this one is what the jump before would have as its highest.
		inner := bits.Len32(mask)
		if mask&(mask-1) != 0 || inner > 0 && near(b[n+4-inner]) || !near(b[n+4]) {
			mask = mask<<1 | 1
			continue
		}
		pc := f.pos + uint32(n) + 5
		to := le32(b[n+1:]) - pc
		if low := 8 * (4 - inner); inner > 0 && near(byte(to>>(low-8))) {
			to = to ^ (1<<low - 1) - pc
		}
		putLE32(b[n+1:], to&0xffffff|-(to>>24&1)<<24)
		n += 4
	}
	f.mask = mask << (n - before - 1) & 7
	return n
}

// undoRISCV is for JAL to x1 and x5, and for AUIPC with the instruction that uses its result.
func (f *xzFilter) undoRISCV(b []byte) int {
	n := 0
	for ; n+8 <= len(b); n += 2 {
		v, pc := le32(b[n:]), f.pos+uint32(n)
		if v&0xdff == 0xef {
			to := v&0xf000<<5 | v>>7&0x1fe00 | v>>23&0x1fe
			to -= pc
			putLE32(b[n:], v&0xfff|to&0xff000|to<<9&0x100000|to<<20&0x7fe00000|to<<11&0x80000000)
			n += 2
		}
		if v&0x7f != 0x17 {
			continue
		}
		next := le32(b[n+4:])
		if v&0xe80 != 0 { // a pair as it was, which looks like one that was changed
			if (v<<8^(next-3))&0xf8003 != 0 {
				n += 4
				continue
			}
			v, next = 0x117|next<<12, v&^0xfff+next>>20
		} else {
			register := v >> 27
			if (v-0x3117)<<18 >= register&0x1d {
				n += 2
				continue
			}
			to := bits.ReverseBytes32(next) - pc
			v, next = 0x17|register<<7|(to+0x800)&^0xfff, v>>12|to<<20
		}
		putLE32(b[n:], v)
		putLE32(b[n+4:], next)
		n += 6
	}
	return n
}

// le32 and putLE32 are encoding/binary's, as le64 is.
func le32(b []byte) uint32 {
	_ = b[3]
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

func putLE32(b []byte, v uint32) {
	_ = b[3]
	b[0] = byte(v)
	b[1] = byte(v >> 8)
	b[2] = byte(v >> 16)
	b[3] = byte(v >> 24)
}
