// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Gzip and deflate. The decoder is our own for its speed: compress/flate, which fetches its input byte by byte through
// an interface, takes twice the time (BenchmarkInflate holds one against the other).

// gunzip unpacks gzip members (RFC 1952) one after the other. It can be entered at a member
// and at each block within.
type gunzip struct {
	in        *input
	inflate   *inflater
	member    bool   // inside a member
	fromStart bool   // the member was seen from its start, so that its trailer can be checked
	start     int64  // offset in the tar of the member's first byte; -1 if not fromStart
	crc       uint32 // of the member so far
	size      uint32 // of the member so far, modulo 2^32
	members   int    // read to their end
	err       error
	latest    restartPoint
	extra     func(n int64) error // reads the n bytes of a member's extra field; nil: nobody wants them
	upcoming  restartPoint        // a point in what is unpacked and not yet read; Kind "" when none
}

func newGunzip(in *input, p restartPoint, window []byte) (*gunzip, error) {
	f, err := newInflater(in, p.Bit, window, p.Out)
	return &gunzip{in: in, inflate: f, latest: p, member: !p.Fresh, start: -1}, err
}

func (g *gunzip) Read(p []byte) (int, error) {
	for g.err == nil && len(g.inflate.pending()) == 0 {
		g.err = g.unpack()
	}
	if g.err != nil { // what was unpacked before it is not to be trusted
		return 0, g.err
	}
	n := copy(p, g.inflate.pending())
	g.inflate.begin += n
	if left := int64(len(g.inflate.pending())); g.upcoming.Kind != "" && g.upcoming.Out <= g.inflate.total-left {
		g.latest, g.upcoming = g.upcoming, restartPoint{}
	}
	return n, nil
}

// unpack gets some more of a member, or gets past what is between two.
func (g *gunzip) unpack() error {
	if !g.member {
		return g.nextMember()
	}
	switch err := g.inflate.more(); {
	case err == io.EOF:
		return g.trailer()
	case err == errDeflate:
		return fmt.Errorf("offset %d: %w", g.in.offset(), err)
	case err != nil:
		return err
	}
	if g.fromStart {
		g.crc = crc32.Update(g.crc, crc32.IEEETable, g.inflate.pending())
	}
	g.size += uint32(len(g.inflate.pending()))
	if f := g.inflate; f.blockAt > g.start { // at its start a member is entered by its header
		g.upcoming = restartPoint{Kind: "gzip", File: f.block, Bit: f.bit, Out: f.blockAt}
	}
	return nil
}

// nextMember reads a member's header; io.EOF at the end of the section.
func (g *gunzip) nextMember() error {
	at := g.in.offset()
	head, err := g.in.peek(10)
	if err != nil {
		return err
	}
	if g.members > 0 && (len(head) == 0 || head[0] == 0) {
		return g.zeros()
	}
	const fhcrc, fextra, fname, fcomment, reserved = 2, 4, 8, 16, 0xe0 // RFC 1952, 2.3.1
	if len(head) < 10 || head[0] != 0x1f || head[1] != 0x8b || head[2] != 8 || head[3]&reserved != 0 {
		return fmt.Errorf("offset %d: got % x, want a gzip header or the end", at, head)
	}
	flags := head[3]
	if err := g.in.skip(10); err != nil {
		return err
	}
	if flags&fextra != 0 {
		if err := g.extraField(); err != nil {
			return err
		}
	}
	for _, f := range []byte{fname, fcomment} {
		for c := byte(1); flags&f != 0 && c != 0; {
			if c, err = g.in.ReadByte(); err != nil {
				return noEOF(err)
			}
		}
	}
	if flags&fhcrc != 0 {
		if err := g.in.skip(2); err != nil {
			return err
		}
	}
	g.member, g.fromStart, g.crc, g.size, g.start = true, true, 0, 0, g.inflate.total
	if g.members > 0 {
		g.upcoming = restartPoint{Kind: "gzip", File: at, Out: g.start, Fresh: true}
	}
	g.inflate.reset()
	return nil
}

// extraField reads the extra field of a member (RFC 1952, 2.3.1.1).
func (g *gunzip) extraField() error {
	size, err := g.in.need(2)
	if err != nil {
		return err
	}
	n := int64(binary.LittleEndian.Uint16(size))
	g.in.pos += 2
	if g.extra == nil {
		return g.in.skip(n)
	}
	return g.extra(n)
}

// zeros reads past those that may be behind the last member, as gzip does (gzip(1), -d), to the end of the section.
func (g *gunzip) zeros() error {
	for {
		if err := g.in.fill(); err != nil {
			return err
		}
		if rest := g.in.buf[g.in.pos:g.in.lim]; !allZero(rest) {
			return fmt.Errorf("offset %d: data between zero bytes behind the last gzip member", g.in.offset())
		}
		g.in.pos = g.in.lim
	}
}

// trailer checks a member's CRC-32 and size. Of a member that was entered in the middle
// neither is known; there the hash of the whole payload is the proof.
func (g *gunzip) trailer() error {
	var t [8]byte
	if _, err := io.ReadFull(g.in, t[:]); err != nil {
		return noEOF(err)
	}
	g.member = false
	g.members++
	crc, size := binary.LittleEndian.Uint32(t[:]), binary.LittleEndian.Uint32(t[4:])
	if g.fromStart && (crc != g.crc || size != g.size) {
		return fmt.Errorf("offset %d: gzip trailer has CRC %08x, size %d; the data has %08x, %d",
			g.in.offset()-8, crc, size, g.crc, g.size)
	}
	return nil
}

func (g *gunzip) latestRestart() (restartPoint, bool) { return g.latest, g.latest.Kind != "" }

// inflater unpacks deflate data (RFC 1951). It tells where each block begins, which is where an interrupted install
// goes on.
type inflater struct {
	in    *input
	bits  uint64 // fetched from in and not used yet, the next one lowest; zero above n
	n     uint   // how many of bits are valid
	buf   []byte // what was unpacked: at least a window of it, and room for more
	low   int    // in buf: from here on it may be referred to
	begin int    // in buf: not given out yet
	end   int    // in buf: of what is unpacked
	total int64  // bytes unpacked, from wherever the caller counts

	block   int64 // offset in the file of the byte in which the latest block begins
	bit     uint8 // bits of that byte that belong to the block before, 0 to 7
	blockAt int64 // total at that place
	state   inflateState
	last    bool // the block is the stream's last
	left    int  // of a stored block, bytes
	fixed   bool // the tables are those of fixed codes

	lit  [1 << 13]uint32 // codes of literals and lengths: the first level, then what it links to
	dist [1 << 12]uint32 // the same of distances; while a header is read, of the lengths of codes
}

type inflateState byte

const (
	atBlock  inflateState = iota // before a block header
	inStored                     // in a block without compression
	inCoded                      // in a block of Huffman codes
	atEnd                        // behind the last block
)

// Entries of the code tables. The low four bits are the bits of the code (at the second level:
// without those that led there), the next four the extra bits to be added to the base in the
// upper half. A literal is its own base. A link's base is where its second level starts,
// and its extra bits choose the entry there.
const (
	codeLiteral = 1 << (8 + iota)
	codeLink
	codeEnd // of the block
	codeBad // no such code
)

const (
	litBits  = 11 // that the first level of a table looks at
	distBits = 8

	inflateRoom = 64 << 10 // bytes that are unpacked at once
	maxMatch    = 258
	// What one round of symbols writes at most: two literals, or one and a match, and seven
	// bytes too many, since matches are copied by eights.
	inflateSlack = 2 + maxMatch + 7
	// What one round reads at most, twice eight bytes.
	inflateAhead = 16
)

var errDeflate = errors.New("deflate data is damaged")

// The bases and extra bits of lengths and distances (RFC 1951, 3.2.5).
var lengthCodes, distCodes = extraCodes(257, 31, 3, 4), extraCodes(0, 32, 1, 2)

// extraCodes makes entries for n symbols after first unused ones. The base of the first is
// base; every so-many-th symbol, beginning with the second group, takes one extra bit more.
func extraCodes(first, n, base, group int) []uint32 {
	codes := make([]uint32, first+n)
	for i := range n {
		extra := max(i/group-1, 0)
		codes[first+i] = uint32(base<<16 | extra<<4)
		base += 1 << extra
	}
	for i := range first {
		codes[i] = uint32(i<<16 | codeLiteral)
	}
	if first > 0 {
		codes[256] = codeEnd
		codes[285] = maxMatch << 16
		codes[286], codes[287] = codeBad, codeBad
	} else {
		codes[30], codes[31] = codeBad, codeBad
	}
	return codes
}

// newInflater starts at the byte where in stands, of which the first bit bits belong to
// something else. window is what was unpacked before, and total how much that is in all.
func newInflater(in *input, bit uint8, window []byte, total int64) (*inflater, error) {
	f := &inflater{in: in, buf: make([]byte, gzipWindow+inflateRoom+inflateSlack), total: total}
	f.end = copy(f.buf, window)
	f.begin = f.end
	if bit > 0 {
		c, err := in.ReadByte()
		if err != nil {
			return nil, noEOF(err)
		}
		f.bits, f.n = uint64(c>>(bit&7)), 8-uint(bit&7)
	}
	return f, nil
}

// reset begins another stream, which cannot refer to this one.
func (f *inflater) reset() {
	f.low, f.state = f.end, atBlock
	f.bits, f.n = 0, 0
}

// pending is what was unpacked and has not been taken.
func (f *inflater) pending() []byte { return f.buf[f.begin:f.end] }

// more unpacks at least one byte when nothing is pending, and no more than the buffer holds;
// io.EOF after the last block. Whole bytes behind that block stay in the input.
func (f *inflater) more() error {
	f.slide()
	for f.begin == f.end {
		if err := f.step(); err != nil {
			return err
		}
	}
	return nil
}

// slide makes room in the buffer once all of it was taken. Not each time: a block may hold one byte, and the window is
// 32 KiB.
func (f *inflater) slide() {
	if f.begin == f.end && f.end > gzipWindow+inflateRoom/2 {
		moved := f.end - gzipWindow
		copy(f.buf, f.buf[moved:f.end])
		f.low, f.begin, f.end = max(f.low-moved, 0), gzipWindow, gzipWindow
	}
}

// step gets on within a block, or to the next one; io.EOF after the last one.
func (f *inflater) step() (err error) {
	switch f.state {
	case atBlock:
		err = f.header()
	case inStored:
		err = f.stored()
	case inCoded:
		err = f.coded()
	case atEnd:
		return io.EOF
	}
	return noEOF(err)
}

// follow takes p as what was unpacked last, so that what comes may refer to it.
func (f *inflater) follow(p []byte) {
	p = p[max(len(p)-gzipWindow, 0):]
	f.slide()
	f.end += copy(f.buf[f.end:], p)
	f.begin = f.end
}

// segment unpacks blocks to data, which they fill, and which begin and end with a byte, n of them.
func (f *inflater) segment(in *input, data []byte, n int64) error {
	f.in, f.state, f.bits, f.n = in, atBlock, 0, 0
	end := in.offset() + n
	for len(data) > 0 {
		if err := f.more(); err != nil {
			return noEOF(err)
		}
		k := copy(data, f.pending())
		f.begin += k
		data = data[k:]
	}
	for f.begin == f.end && (f.state != atBlock || in.offset() < end) {
		if err := f.step(); err != nil {
			return noEOF(err)
		}
	}
	if f.begin < f.end || f.n > 0 || in.offset() != end {
		return errDeflate
	}
	return nil
}

// giveBack returns whole bytes to the input, so that its offset is that of the next bit.
func (f *inflater) giveBack() {
	f.in.pos -= int(f.n >> 3)
	f.n &= 7
	f.bits &= 1<<f.n - 1
}

// fill makes n bits valid, 0 to 32.
func (f *inflater) fill(n uint) error {
	for f.n < n {
		c, err := f.in.ReadByte()
		if err != nil {
			return err
		}
		f.bits |= uint64(c) << f.n
		f.n += 8
	}
	return nil
}

// take reads n bits, 0 to 32.
func (f *inflater) take(n uint) (uint32, error) {
	if err := f.fill(n); err != nil {
		return 0, err
	}
	v := uint32(f.bits & (1<<n - 1))
	f.bits >>= n
	f.n -= n
	return v, nil
}

// header reads the start of a block (RFC 1951, 3.2.3).
func (f *inflater) header() error {
	f.block, f.bit, f.blockAt = f.in.offset(), 0, f.total
	if f.n > 0 {
		f.block, f.bit = f.block-1, uint8(8-f.n)
	}
	h, err := f.take(3)
	if err != nil {
		return err
	}
	f.last = h&1 == 1
	switch h >> 1 {
	case 0:
		f.bits, f.n = 0, 0 // to the end of the byte
		size, err := f.take(32)
		if err != nil {
			return err
		}
		if size&0xffff != ^size>>16 {
			return errDeflate
		}
		f.left, f.state = int(size&0xffff), inStored
	case 1:
		f.state = inCoded
		return f.fixedCodes()
	case 2:
		f.state = inCoded
		return f.dynamicCodes()
	default:
		return errDeflate
	}
	return nil
}

// blockEnd is called behind the last symbol of a block.
func (f *inflater) blockEnd() {
	if f.state = atBlock; f.last {
		f.state = atEnd
		f.bits, f.n = 0, 0
	}
}

func (f *inflater) stored() error {
	if f.left == 0 {
		f.blockEnd()
		return nil
	}
	n, err := f.in.Read(f.buf[f.end:min(f.end+f.left, gzipWindow+inflateRoom)])
	f.end += n
	f.total += int64(n)
	f.left -= n
	if n > 0 {
		return nil // an error that stays comes again
	}
	return err
}

// fixedCodes makes the codes that need no description (RFC 1951, 3.2.6), unless they are there:
// a block of them may have ten bits.
func (f *inflater) fixedCodes() error {
	if f.fixed {
		return nil
	}
	f.fixed = true
	var lens [288]uint8
	for i := range lens {
		switch {
		case i < 144, i >= 280:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		default:
			lens[i] = 7
		}
	}
	if err := makeCodes(f.lit[:], litBits, lens[:], lengthCodes); err != nil {
		return err
	}
	for i := range lens[:32] {
		lens[i] = 5
	}
	return makeCodes(f.dist[:], distBits, lens[:32], distCodes)
}

// dynamicCodes reads the codes of a block: lengths of codes, themselves in a code (RFC 1951, 3.2.7).
func (f *inflater) dynamicCodes() error {
	f.fixed = false
	h, err := f.take(14)
	if err != nil {
		return err
	}
	nlit, ndist, nlen := int(h&31)+257, int(h>>5&31)+1, int(h>>10)+4
	if nlit > 286 || ndist > 30 {
		return errDeflate
	}
	var lens [286 + 30]uint8
	for _, i := range []byte{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}[:nlen] {
		n, err := f.take(3)
		if err != nil {
			return err
		}
		lens[i] = uint8(n)
	}
	if err := makeCodes(f.dist[:], distBits, lens[:19], lengthCodes); err != nil { // lent for a moment
		return err
	}
	clear(lens[:19])
	if err := f.codeLengths(lens[:nlit+ndist]); err != nil {
		return err
	}
	if err := makeCodes(f.lit[:], litBits, lens[:nlit], lengthCodes); err != nil {
		return err
	}
	f.giveBack()
	return makeCodes(f.dist[:], distBits, lens[nlit:nlit+ndist], distCodes)
}

// codeLengths reads the lengths of all codes by the code that is in f.dist.
func (f *inflater) codeLengths(lens []uint8) error {
	for i := 0; i < len(lens); {
		if err := f.fill(7); err != nil { // the longest code; so many there are in any case, as a trailer follows
			return err
		}
		e := f.dist[f.bits&(1<<distBits-1)]
		if e&codeLiteral == 0 {
			return errDeflate
		}
		f.bits >>= e & 15
		f.n -= uint(e & 15)
		value, times := uint8(0), uint32(1)
		var err error
		switch sym := e >> 16; sym {
		case 16:
			if i == 0 {
				return errDeflate
			}
			value = lens[i-1]
			times, err = f.take(2)
			times += 3
		case 17:
			times, err = f.take(3)
			times += 3
		case 18:
			times, err = f.take(7)
			times += 11
		default:
			value = uint8(sym)
		}
		if err != nil {
			return err
		}
		if int(times) > len(lens)-i {
			return errDeflate
		}
		for range times {
			lens[i] = value
			i++
		}
	}
	return nil
}

// makeCodes fills a table from the lengths of the codes of all symbols, 0 to 15 bits, 0 for a
// symbol that does not occur (RFC 1951, 3.2.2). As with compress/flate and zlib the codes
// must be complete, but for a single one of one bit, or none.
func makeCodes(table []uint32, first uint, lens []uint8, symbols []uint32) error {
	var count, next [16]int
	longest := uint(0)
	for _, n := range lens {
		count[n]++
		longest = max(longest, uint(n))
	}
	count[0] = 0
	code := 0
	for n := uint(1); n <= longest; n++ {
		code = (code + count[n-1]) << 1
		next[n] = code
		if code+count[n] > 1<<n {
			return errDeflate
		}
	}
	if used := next[longest] + count[longest]; longest > 0 && used != 1<<longest && !(longest == 1 && used == 1) {
		return errDeflate
	}
	for i := range table[:1<<first] {
		table[i] = codeBad
	}
	second := max(longest, first) - first // bits of the second level
	free := 1 << first
	for sym, n := range lens {
		if n == 0 {
			continue
		}
		at, n := reverseBits(next[n], uint(n)), uint(n)
		next[n]++
		e, level, step := symbols[sym]|uint32(n), table[:1<<first], 1<<n
		if n > first {
			link := &table[at&(1<<first-1)]
			if *link == codeBad {
				*link = uint32(free<<16) | codeLink | uint32(second<<4) | uint32(first)
				free += 1 << second
			}
			start := int(*link >> 16)
			level = table[start : start+1<<second]
			e, at, step = symbols[sym]|uint32(n-first), at>>first, 1<<(n-first)
		}
		for ; at < len(level); at += step {
			level[at] = e
		}
	}
	return nil
}

// reverseBits of a code of n bits: codes are packed from their highest bit on, all else from
// the lowest.
func reverseBits(code int, n uint) int {
	r := 0
	for range n {
		r = r<<1 | code&1
		code >>= 1
	}
	return r
}

// coded unpacks symbols of a block until it ends or the buffer is full.
func (f *inflater) coded() error {
	var tail [2 * inflateAhead]byte
	for f.state == inCoded && f.end <= len(f.buf)-inflateSlack {
		src, err := f.in.peek(inflateAhead)
		if err != nil {
			return err
		}
		there := len(src)
		if there < inflateAhead { // the end of the data: zeros behind it, which must not be used
			clear(tail[copy(tail[:], src):])
			src = tail[:there+inflateAhead]
		} else {
			src = f.in.buf[f.in.pos:f.in.lim]
			there = len(src)
		}
		begun := f.end
		used, ended, err := f.symbols(src)
		f.total += int64(f.end - begun)
		if used-int(f.n>>3) > there {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		f.in.pos += used
		f.giveBack()
		if ended {
			f.blockEnd()
		}
	}
	return nil
}

// symbols is the loop that every byte passes through. It ends with the block, or when less than
// a round's input or room is left, and tells how many bytes of src it has fetched.
//
// At the start of a round the bits are filled up to at least 56: two codes of at most 11 bits for
// the first level of the table, and of a length at most 9 more of both levels and extra bits.
// A distance has at most 28.
func (f *inflater) symbols(src []byte) (used int, ended bool, err error) {
	lit, dist, buf := &f.lit, &f.dist, f.buf
	bits, n, pos, o := f.bits, f.n, 0, f.end
loop:
	for pos <= len(src)-inflateAhead && o <= len(buf)-inflateSlack {
		// Bits above n are those of src[pos:] already and stay the same.
		bits |= le64(src[pos:]) << (n & 63)
		pos += int((63 - n) >> 3)
		n |= 56
		e := lit[bits&(1<<litBits-1)]
		if e&codeLiteral != 0 {
			bits >>= e & 15
			n -= uint(e & 15)
			buf[o] = byte(e >> 16)
			o++
			if e = lit[bits&(1<<litBits-1)]; e&codeLiteral != 0 {
				bits >>= e & 15
				n -= uint(e & 15)
				buf[o] = byte(e >> 16)
				o++
				continue
			}
		}
		bits >>= e & 15
		n -= uint(e & 15)
		if e&(codeLink|codeEnd|codeBad) != 0 {
			if e&codeLink != 0 {
				e = lit[(uint64(e>>16)+bits&(1<<(e>>4&15)-1))&(1<<13-1)]
				bits >>= e & 15
				n -= uint(e & 15)
			}
			switch {
			case e&codeLiteral != 0:
				buf[o] = byte(e >> 16)
				o++
				continue
			case e&codeEnd != 0:
				ended = true
				break loop
			case e&codeBad != 0:
				err = errDeflate
				break loop
			}
		}
		extra := e >> 4 & 15
		length := int(e>>16) + int(bits&(1<<extra-1))
		bits >>= extra
		n -= uint(extra)

		bits |= le64(src[pos:]) << (n & 63)
		pos += int((63 - n) >> 3)
		n |= 56
		d := dist[bits&(1<<distBits-1)]
		if d&codeLink != 0 {
			bits >>= distBits
			n -= distBits
			d = dist[(uint64(d>>16)+bits&(1<<(d>>4&15)-1))&(1<<12-1)]
		}
		if d&codeBad != 0 {
			err = errDeflate
			break
		}
		bits >>= d & 15
		n -= uint(d & 15)
		extra = d >> 4 & 15
		from := o - int(d>>16) - int(bits&(1<<extra-1))
		bits >>= extra
		n -= uint(extra)
		if from < f.low {
			err = errDeflate
			break
		}
		copyMatch(buf, o, from, length)
		o += length
	}
	f.bits, f.n, f.end = bits&(1<<n-1), n, o
	return pos, ended, err
}

// copyMatch copies length bytes within buf from an earlier place, which may overlap, and up to
// seven more, which do not count.
func copyMatch(buf []byte, to, from, length int) {
	switch to - from {
	case 1: // a run of one byte
		v := uint64(buf[from]) * 0x0101010101010101
		for i := 0; i < length; i += 8 {
			putLE64(buf[to+i:], v)
		}
	case 2, 3, 4, 5, 6, 7:
		for i := range length {
			buf[to+i] = buf[from+i]
		}
	default:
		for i := 0; i < length; i += 8 {
			putLE64(buf[to+i:], le64(buf[from+i:]))
		}
	}
}

// le64 and putLE64 are those of encoding/binary, which is compiled without inlining as it serves so many others.
func le64(b []byte) uint64 {
	_ = b[7]
	return uint64(b[0]) | uint64(b[1])<<8 | uint64(b[2])<<16 | uint64(b[3])<<24 |
		uint64(b[4])<<32 | uint64(b[5])<<40 | uint64(b[6])<<48 | uint64(b[7])<<56
}

func putLE64(b []byte, v uint64) {
	_ = b[7]
	b[0] = byte(v)
	b[1] = byte(v >> 8)
	b[2] = byte(v >> 16)
	b[3] = byte(v >> 24)
	b[4] = byte(v >> 32)
	b[5] = byte(v >> 40)
	b[6] = byte(v >> 48)
	b[7] = byte(v >> 56)
}
