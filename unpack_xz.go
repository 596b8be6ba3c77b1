// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"runtime/debug"
)

// Xz and LZMA2. The decoder is our own for its speed: that of github.com/ulikunitz/xz takes twice the time, and
// allocates for each match (BenchmarkLZMA holds one against the other).

// unxz unpacks xz streams (The .xz File Format 1.2.1) one after the other, and the padding between and behind them. A
// dictionary's size is known before it is allocated, one serves all blocks, and a block can be entered by itself.
type unxz struct {
	in  *input
	lim unpackLimits
	out int64 // bytes given in all, from wherever the caller counts
	err error

	streams  int  // read to their end
	inStream bool // the stream header was read, or is known
	partial  bool // the stream was entered at a block: those before are not known
	check    byte
	index    hash.Hash // of the sizes of the stream's blocks
	blocks   uint64    // blocks that index holds

	inBlock    bool
	first      bool  // the next chunk is the block's first
	chunksOver bool  // the block's last chunk was read
	headerSize int64 // of the block's header, bytes
	dataAt     int64 // offset in the file of the block's data
	unpacked   int64 // bytes of this block given
	wantIn     int64 // size of the block's data by its header, or -1
	wantOut    int64 // size of what it unpacks to by its header, or -1
	crc        uint32
	lzma       *lzmaDecoder
	filters    xzFilters

	latest restartPoint
}

func (z *unxz) Read(p []byte) (int, error) {
	for len(p) > 0 && z.err == nil {
		n := 0
		switch {
		case z.filters.ready() > 0:
			n = z.filters.read(p)
		case z.lzma == nil || z.lzma.left == 0:
			z.err = z.advance()
		case len(z.filters.list) > 0:
			z.err = z.damaged(z.filters.fill(func(p []byte) (int, error) { return z.lzma.read(z.in, p) }))
		default:
			n, z.err = z.lzma.read(z.in, p)
			z.err = z.damaged(z.err)
		}
		if n > 0 {
			z.unpacked += int64(n)
			z.out += int64(n)
			if z.check == xzCRC32 {
				z.crc = crc32.Update(z.crc, crc32.IEEETable, p[:n])
			}
			return n, nil
		}
	}
	return 0, z.err
}

// damaged adds the place to an error of the LZMA decoder.
func (z *unxz) damaged(err error) error {
	if err == errLZMA {
		err = fmt.Errorf("offset %d: %w", z.in.offset(), err)
	}
	return err
}

// advance reads what is between two chunks: headers, ends of blocks, indexes, padding. io.EOF at the end of the
// section.
func (z *unxz) advance() error {
	switch {
	case !z.inStream:
		return z.nextStream()
	case !z.inBlock:
		head, err := z.in.need(1)
		if err != nil {
			return err
		}
		if head[0] == 0 {
			return z.streamEnd()
		}
		return z.blockHeader((int(head[0]) + 1) * 4)
	case z.chunksOver:
		return z.blockEnd()
	}
	err := z.lzma.chunk(z.in, z.first)
	if z.first = false; err == io.EOF {
		z.chunksOver = true
		z.filters.run(true)
		return nil
	}
	return z.damaged(err)
}

// nextStream reads a stream header (section 2.1.1), or four bytes of the padding that may follow a stream (2.2).
func (z *unxz) nextStream() error {
	at := z.in.offset()
	h, err := z.in.peek(12)
	switch {
	case err != nil:
		return err
	case z.streams > 0 && len(h) == 0:
		return io.EOF
	case z.streams > 0 && len(h) >= 4 && allZero(h[:4]):
		return z.in.skip(4)
	case z.streams > 0 && h[0] == 0:
		return fmt.Errorf("offset %d: xz stream padding: got % x, want zero bytes by fours", at, h[:min(len(h), 4)])
	case len(h) < 12:
		return io.ErrUnexpectedEOF
	case string(h[:6]) != compressionMagic["xz"] || h[6] != 0 ||
		crc32.ChecksumIEEE(h[6:8]) != binary.LittleEndian.Uint32(h[8:]):
		return fmt.Errorf("offset %d: xz stream header % x is damaged", at, h)
	}
	z.inStream, z.partial, z.blocks = true, false, 0
	z.index.Reset()
	check := h[7]
	z.in.pos += 12
	return z.setCheck(check)
}

// xzCRC32 is a check ID (section 2.1.1.2).
const xzCRC32 = 1

// setCheck takes a check ID. CRC-32 is verified, which costs nothing. CRC-64 would be a tenth of
// all the work for nothing: each file that an artifact holds must have the SHA-256 of
// the manifest, and what is around the files is checked to the byte (tarStream). So other checks, those that have
// only a number so far, too, are skipped.
func (z *unxz) setCheck(id byte) error {
	if id > 15 {
		return fmt.Errorf("xz integrity check %d, want 0 to 15", id)
	}
	z.check = id
	return nil
}

// checkSize is the size of a check in bytes (section 2.1.1.2).
func (z *unxz) checkSize() int {
	if z.check == 0 {
		return 0
	}
	return 4 << ((z.check - 1) / 3)
}

// blockHeader reads a header of n bytes, 8 to 1024 (section 3.1).
func (z *unxz) blockHeader(n int) error {
	at := z.in.offset()
	h := make([]byte, n)
	if _, err := io.ReadFull(z.in, h); err != nil {
		return noEOF(err)
	}
	bad := func(what string) error { return fmt.Errorf("offset %d: xz block header: %s", at, what) }
	if crc32.ChecksumIEEE(h[:n-4]) != binary.LittleEndian.Uint32(h[n-4:]) {
		return bad("CRC is wrong")
	}
	if h[1]&0x3c != 0 {
		return bad("has reserved bits set")
	}
	r := bytes.NewReader(h[2 : n-4])
	z.wantIn, z.wantOut = -1, -1
	for _, f := range []struct {
		flag byte
		to   *int64
	}{{0x40, &z.wantIn}, {0x80, &z.wantOut}} {
		if h[1]&f.flag == 0 {
			continue
		}
		v, err := xzNumber(r)
		if err != nil || v > math.MaxInt64-2048 || v == 0 && f.flag == 0x40 {
			return bad("size out of range")
		}
		*f.to = int64(v)
	}
	z.filters.reset()
	for range h[1] & 3 {
		if err := z.addFilter(r); err != nil {
			return withHint(refuse("offset %d: xz block header: %w", at, err),
				"write the artifact again with LZMA2 alone, as xz does without other filters")
		}
	}
	var last [3]byte
	if _, err := io.ReadFull(r, last[:]); err != nil || last[0] != 0x21 || last[1] != 1 || last[2] > 40 {
		return bad("want LZMA2 as the last filter")
	}
	if pad := h[n-4-r.Len() : n-4]; !allZero(pad) {
		return bad("padding is not zero")
	}
	z.latest = restartPoint{Kind: "xz", File: at, Out: z.out, Fresh: true, Check: z.check}
	z.inBlock, z.first, z.chunksOver, z.unpacked, z.crc = true, true, false, 0, 0
	z.headerSize, z.dataAt = int64(n), z.in.offset()
	return z.needDict(xzDictSize(last[2]))
}

// addFilter reads a filter before the last one: its number, the size of its properties, and these (section 3.1.5).
func (z *unxz) addFilter(r *bytes.Reader) error {
	id, err1 := xzNumber(r)
	size, err2 := xzNumber(r)
	if err1 != nil || err2 != nil || size > uint64(r.Len()) {
		return errors.New("ends within a filter")
	}
	properties := make([]byte, size)
	r.Read(properties)
	return z.filters.add(id, properties)
}

// xzNumber reads an integer of one to nine bytes (section 1.2).
func xzNumber(r io.ByteReader) (v uint64, err error) {
	for i := range 9 {
		c, err := r.ReadByte()
		if err != nil {
			return 0, noEOF(err)
		}
		if v |= uint64(c&0x7f) << (7 * i); c < 0x80 {
			if c == 0 && i > 0 {
				break // one byte less would have done
			}
			return v, nil
		}
	}
	return 0, errors.New("integer is damaged")
}

// xzDictSize decodes a dictionary size, 0 to 40 (section 5.3.1), to bytes.
func xzDictSize(b byte) int64 {
	if b == 40 {
		return math.MaxUint32
	}
	return int64(2|b&1) << (b/2 + 11)
}

// minDict is the smallest dictionary, in bytes (section 5.3.1).
const minDict = 4096

// needDict sees that there is a dictionary of n bytes, or of as many as can be of use.
func (z *unxz) needDict(n int64) error {
	use := n
	if z.lim.out > 0 {
		use = min(use, z.lim.out)
	}
	if z.wantOut >= 0 {
		use = min(use, z.wantOut)
	}
	if use = max(use, minDict); use > z.lim.dict {
		return withHint(refuse("xz dictionary of %d bytes wanted, limit here is %d bytes", use, z.lim.dict),
			"write the artifact again with --compression gzip, "+
				"or with a smaller dictionary (mendlet pack --compression xz)")
	}
	if z.lzma == nil {
		z.lzma = &lzmaDecoder{packed: make([]byte, 0, maxPacked)}
	}
	if d := z.lzma; use > int64(len(d.dict)) {
		if d.dict != nil {
			d.dict = nil
			debug.FreeOSMemory() // the limit is for all of them together
		}
		d.dict, d.next = make([]byte, roomFor(use, z.lim.dict)), 0
	}
	return nil
}

// blockEnd reads padding and check behind the zero byte that ends the chunks, and enters the block's sizes for the
// index (sections 3.3, 3.4, 4.3).
func (z *unxz) blockEnd() error {
	z.inBlock = false
	size := z.in.offset() - z.dataAt
	if z.wantIn >= 0 && size != z.wantIn || z.wantOut >= 0 && z.unpacked != z.wantOut {
		return fmt.Errorf("offset %d: xz block has %d bytes for %d; its header says %d for %d",
			z.in.offset(), size, z.unpacked, z.wantIn, z.wantOut)
	}
	var buf [3 + 64]byte
	pad := int(-size & 3)
	end := buf[:pad+z.checkSize()]
	if _, err := io.ReadFull(z.in, end); err != nil {
		return noEOF(err)
	}
	if !allZero(end[:pad]) {
		return fmt.Errorf("offset %d: padding of the xz block is not zero", z.in.offset())
	}
	if z.check == xzCRC32 && binary.LittleEndian.Uint32(end[pad:]) != z.crc {
		return fmt.Errorf("offset %d: xz block check is %x, the data has %08x", z.in.offset(), end[pad:], z.crc)
	}
	recordBlock(z.index, uint64(z.headerSize+size)+uint64(z.checkSize()), uint64(z.unpacked))
	z.blocks++
	return nil
}

// recordBlock sums up the two sizes of a block that an index has.
func recordBlock(h hash.Hash, unpadded, size uint64) {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], unpadded)
	binary.LittleEndian.PutUint64(b[8:], size)
	h.Write(b[:])
}

// crcBytes is the byte reader of an index: it counts and sums what it reads.
type crcBytes struct {
	in  *input
	n   int64
	crc uint32 // all bits the other way round
}

func (c *crcBytes) ReadByte() (byte, error) {
	b, err := c.in.ReadByte()
	if err == nil {
		c.n++
		c.crc = crc32.IEEETable[byte(c.crc)^b] ^ c.crc>>8
	}
	return b, err
}

// streamEnd reads index and footer (section 4 and 2.1.2) and compares the index with the
// blocks that were read. A stream that was entered at a block knows its last ones only.
func (z *unxz) streamEnd() error {
	at := z.in.offset()
	r := &crcBytes{in: z.in, crc: math.MaxUint32}
	bad := func(what string) error { return fmt.Errorf("offset %d: xz index: %s", at, what) }
	r.ReadByte()
	count, err := xzNumber(r)
	if err == nil && (count < z.blocks || count > z.blocks && !z.partial) {
		return bad(fmt.Sprintf("%d blocks, got %d", count, z.blocks))
	}
	got := sha256.New()
	for i := uint64(0); err == nil && i < count; i++ {
		var unpadded, size uint64
		if unpadded, err = xzNumber(r); err == nil {
			size, err = xzNumber(r)
		}
		if i >= count-z.blocks {
			recordBlock(got, unpadded, size)
		}
	}
	for err == nil && r.n%4 != 0 {
		var b byte
		if b, err = r.ReadByte(); b != 0 {
			return bad("padding is not zero")
		}
	}
	var t [16]byte // CRC of the index, footer
	if err == nil {
		_, err = io.ReadFull(z.in, t[:])
	}
	if err != nil {
		return fmt.Errorf("offset %d: xz index: %w", at, noEOF(err))
	}
	le := binary.LittleEndian
	switch {
	case le.Uint32(t[:]) != ^r.crc:
		return bad("CRC is wrong")
	case !bytes.Equal(got.Sum(nil), z.index.Sum(nil)):
		return bad("does not fit the blocks")
	case le.Uint32(t[4:]) != crc32.ChecksumIEEE(t[8:14]),
		int64(le.Uint32(t[8:])) != (r.n+4)/4-1, t[12] != 0, t[13] != z.check, t[14] != 'Y', t[15] != 'Z':
		return bad("footer is wrong")
	}
	z.inStream = false
	z.streams++
	return nil
}

func (z *unxz) latestRestart() (restartPoint, bool) { return z.latest, z.latest.Kind != "" }

// lzmaDecoder unpacks the chunks of LZMA2 (LZMA specification, lzma-specification.txt of the LZMA
// SDK; The .xz File Format 1.2.1, 5.3.1).
type lzmaDecoder struct {
	dict  []byte // the last bytes unpacked, round and round
	next  int    // in dict: where the next byte goes
	total int64  // bytes unpacked since the last reset of the dictionary

	packed []byte // of the chunk, as far as it has come: all of it
	pos    int    // in packed: the next byte
	rng    uint32 // the range decoder
	code   uint32

	left    int // bytes of the chunk that are still to be unpacked
	pending int // of these, bytes of a match that did not fit
	stored  bool
	state   uint32
	reps    [4]uint32 // the last four distances, less one
	lc      uint32
	lpMask  uint32
	pbMask  uint32
	needs   byte // the least control byte that the next chunk of LZMA data may have
	probs   [lzmaProbs]uint16
}

// Where the probabilities of each kind stand. There are 12 states and at most 16 states of the
// position.
const (
	lzmaIsMatch    = 0
	lzmaIsRep      = lzmaIsMatch + 12<<4
	lzmaIsRepG0    = lzmaIsRep + 12
	lzmaIsRepG1    = lzmaIsRepG0 + 12
	lzmaIsRepG2    = lzmaIsRepG1 + 12
	lzmaIsRep0Long = lzmaIsRepG2 + 12
	lzmaSlot       = lzmaIsRep0Long + 12<<4 // four trees of 6 bits
	lzmaSpecial    = lzmaSlot + 4<<6        // the trees of the lower bits of distances below 128
	lzmaAlign      = lzmaSpecial + 128
	lzmaLen        = lzmaAlign + 16
	lzmaRepLen     = lzmaLen + lzmaLenSize
	lzmaLiteral    = lzmaRepLen + lzmaLenSize
	lzmaProbs      = lzmaLiteral + 0x300<<4

	// Within lzmaLen and lzmaRepLen, behind two choices.
	lzmaLenLow  = 2
	lzmaLenMid  = lzmaLenLow + 16<<3
	lzmaLenHigh = lzmaLenMid + 16<<3
	lzmaLenSize = lzmaLenHigh + 1<<8
)

// maxPacked is the largest chunk of LZMA data, in bytes; 16 bits hold it less one.
const maxPacked = 1 << 16

var errLZMA = errors.New("LZMA data is damaged")

// chunk reads the header of a chunk and, of LZMA data, all the rest; io.EOF at the byte that ends
// the chunks. first: a block of xz begins, and so must the dictionary.
func (d *lzmaDecoder) chunk(in *input, first bool) error {
	var h [6]byte
	if _, err := io.ReadFull(in, h[:1]); err != nil {
		return noEOF(err)
	}
	control := h[0]
	if control == 0 {
		return io.EOF
	}
	if first {
		d.needs = 0xe0
	}
	if control < 0x80 && (control > 2 || first && control != 1) || control >= 0x80 && control < d.needs {
		return errLZMA
	}
	if control == 1 || control >= 0xe0 {
		d.total = 0
	}
	if d.stored = control < 0x80; d.stored {
		if control == 1 {
			d.needs = 0xc0
		}
		if _, err := io.ReadFull(in, h[1:3]); err != nil {
			return noEOF(err)
		}
		d.left = int(binary.BigEndian.Uint16(h[1:])) + 1
		return nil
	}
	d.needs = 0x80
	n := 5
	if control >= 0xc0 {
		n = 6
	}
	if _, err := io.ReadFull(in, h[1:n]); err != nil {
		return noEOF(err)
	}
	if control >= 0xc0 {
		if err := d.properties(h[5]); err != nil {
			return err
		}
	}
	if control >= 0xa0 {
		d.reset()
	}
	d.left = int(control&0x1f)<<16 + int(binary.BigEndian.Uint16(h[1:])) + 1
	d.packed = d.packed[:int(binary.BigEndian.Uint16(h[3:]))+1]
	if _, err := io.ReadFull(in, d.packed); err != nil {
		return noEOF(err)
	}
	if len(d.packed) < 5 || d.packed[0] != 0 {
		return errLZMA
	}
	d.rng, d.code, d.pos = 0xffffffff, binary.BigEndian.Uint32(d.packed[1:]), 5
	return nil
}

// properties sets lc, lp and pb, of which LZMA2 wants lc + lp to be 4 at most.
func (d *lzmaDecoder) properties(b byte) error {
	lc, lp, pb := uint32(b%9), uint32(b/9%5), uint32(b/45)
	if pb > 4 || lc+lp > 4 {
		return errLZMA
	}
	d.lc, d.lpMask, d.pbMask = lc, 1<<lp-1, 1<<pb-1
	return nil
}

func (d *lzmaDecoder) reset() {
	d.state, d.reps = 0, [4]uint32{}
	for i := range d.probs {
		d.probs[i] = 1 << 10
	}
}

// read unpacks some of the chunk; it gives at least one byte unless p is empty or the chunk over.
func (d *lzmaDecoder) read(in *input, p []byte) (int, error) {
	if d.next == len(d.dict) {
		d.next = 0
	}
	begin := d.next
	n := min(len(p), d.left, len(d.dict)-begin)
	if d.stored {
		if _, err := io.ReadFull(in, d.dict[begin:begin+n]); err != nil {
			return 0, noEOF(err)
		}
		d.next += n
	} else if err := d.unpack(begin + n); err != nil {
		return 0, err
	}
	d.total += int64(n)
	if d.left -= n; d.left == 0 && !d.stored {
		if err := d.finish(); err != nil {
			return 0, err
		}
	}
	return copy(p, d.dict[begin:d.next]), nil
}

// finish checks that the end of a chunk's output is that of its input.
func (d *lzmaDecoder) finish() error {
	if d.rng < 1<<24 {
		if d.pos >= len(d.packed) {
			return errLZMA
		}
		d.code = d.code<<8 | uint32(d.packed[d.pos])
		d.pos++
	}
	if d.pos != len(d.packed) || d.code != 0 || d.pending != 0 {
		return errLZMA
	}
	return nil
}

// bit decodes one bit by the probability at index i. What is in registers in the loops that call
// it is handed through, and the bits of literals, which are most, are decoded there.
func (d *lzmaDecoder) bit(i int, rng, code uint32, pos int) (uint32, uint32, uint32, int) {
	if rng < 1<<24 {
		if pos >= len(d.packed) {
			return 0, rng, code, pos + 1
		}
		rng, code = rng<<8, code<<8|uint32(d.packed[pos])
		pos++
	}
	p := uint32(d.probs[i])
	if bound := (rng >> 11) * p; code < bound {
		d.probs[i] = uint16(p + (2048-p)>>5)
		return 0, bound, code, pos
	} else {
		d.probs[i] = uint16(p - p>>5)
		return 1, rng - bound, code - bound, pos
	}
}

// tree decodes a number of n bits, the highest first.
func (d *lzmaDecoder) tree(base int, n uint, rng, code uint32, pos int) (uint32, uint32, uint32, int) {
	packed, m := d.packed, uint32(1)
	for range n {
		if rng < 1<<24 {
			if pos >= len(packed) {
				return 0, rng, code, pos + 1
			}
			rng, code = rng<<8, code<<8|uint32(packed[pos])
			pos++
		}
		prob := &d.probs[base+int(m)]
		p := uint32(*prob)
		if bound := (rng >> 11) * p; code < bound {
			*prob = uint16(p + (2048-p)>>5)
			rng, m = bound, m<<1
		} else {
			*prob = uint16(p - p>>5)
			rng, code, m = rng-bound, code-bound, m<<1|1
		}
	}
	return m - 1<<n, rng, code, pos
}

// lowTree decodes a number of n bits, the lowest first.
func (d *lzmaDecoder) lowTree(base int, n uint, rng, code uint32, pos int) (uint32, uint32, uint32, int) {
	m, sum := 1, uint32(0)
	for i := range n {
		var b uint32
		b, rng, code, pos = d.bit(base+m, rng, code, pos)
		m = m<<1 | int(b)
		sum |= b << i
	}
	return sum, rng, code, pos
}

// length decodes the length of a match, less two.
func (d *lzmaDecoder) length(base int, posState uint32, rng, code uint32, pos int) (uint32, uint32, uint32, int) {
	b, rng, code, pos := d.bit(base, rng, code, pos)
	if b == 0 {
		return d.tree(base+lzmaLenLow+int(posState)<<3, 3, rng, code, pos)
	}
	b, rng, code, pos = d.bit(base+1, rng, code, pos)
	if b == 0 {
		n, rng, code, pos := d.tree(base+lzmaLenMid+int(posState)<<3, 3, rng, code, pos)
		return n + 8, rng, code, pos
	}
	n, rng, code, pos := d.tree(base+lzmaLenHigh, 8, rng, code, pos)
	return n + 16, rng, code, pos
}

// distance decodes the distance of a match of that length, less two, as it is kept: less one.
func (d *lzmaDecoder) distance(length uint32, rng, code uint32, pos int) (uint32, uint32, uint32, int) {
	slot, rng, code, pos := d.tree(lzmaSlot+int(min(length, 3))<<6, 6, rng, code, pos)
	if slot < 4 {
		return slot, rng, code, pos
	}
	n := uint(slot>>1 - 1)
	dist := (2 | slot&1) << n
	var low uint32
	if slot < 14 {
		low, rng, code, pos = d.lowTree(lzmaSpecial+int(dist-slot), n, rng, code, pos)
		return dist + low, rng, code, pos
	}
	for range n - 4 { // bits that are as likely 0 as 1
		if rng < 1<<24 {
			if pos >= len(d.packed) {
				return 0, rng, code, pos + 1
			}
			rng, code = rng<<8, code<<8|uint32(d.packed[pos])
			pos++
		}
		rng >>= 1
		b := 1 - (code-rng)>>31 // 1 if code is not below rng: it is below twice that
		code -= rng & -b
		low = low<<1 | b
	}
	dist += low << 4
	low, rng, code, pos = d.lowTree(lzmaAlign, 4, rng, code, pos)
	return dist + low, rng, code, pos
}

// unpack fills the dictionary up to limit. An index of the input that is beyond its end shows
// that it was too short.
func (d *lzmaDecoder) unpack(limit int) error {
	begin := d.next
	if n := min(d.pending, limit-d.next); n > 0 {
		d.repeat(d.next, n)
		d.next, d.pending = d.next+n, d.pending-n
	}
	rng, code, pos, o, state := d.rng, d.code, d.pos, d.next, d.state
	var b, length uint32
	for o < limit {
		total := d.total + int64(o-begin)
		posState := uint32(total) & d.pbMask
		b, rng, code, pos = d.bit(lzmaIsMatch+int(state<<4+posState), rng, code, pos)
		if b == 0 {
			var c uint32
			if base := d.literalBase(o, total); state < 7 {
				c, rng, code, pos = d.tree(base, 8, rng, code, pos)
			} else {
				c, rng, code, pos = d.mismatch(base, d.back(o), rng, code, pos)
			}
			d.dict[o] = byte(c)
			o++
			state -= min(state, 3+3*(state/10)) // 0 to 3 become 0, 4 to 9 lose 3, 10 and 11 lose 6
			continue
		}
		literal := state < 7 // the symbol before was one
		b, rng, code, pos = d.bit(lzmaIsRep+int(state), rng, code, pos)
		if b == 0 {
			length, rng, code, pos = d.length(lzmaLen, posState, rng, code, pos)
			d.reps[3], d.reps[2], d.reps[1] = d.reps[2], d.reps[1], d.reps[0]
			d.reps[0], rng, code, pos = d.distance(length, rng, code, pos)
			length, state = length+2, afterMatch(literal, 7)
		} else if b, rng, code, pos = d.choose(state, posState, rng, code, pos); b == 0 {
			length, state = 1, afterMatch(literal, 9)
		} else {
			length, rng, code, pos = d.length(lzmaRepLen, posState, rng, code, pos)
			length, state = length+2, afterMatch(literal, 8)
		}
		if int64(d.reps[0]) >= min(total, int64(len(d.dict))) {
			return errLZMA
		}
		n := min(int(length), limit-o)
		d.repeat(o, n)
		o, d.pending = o+n, int(length)-n
	}
	if pos > len(d.packed) {
		return errLZMA
	}
	d.rng, d.code, d.pos, d.next, d.state = rng, code, pos, o, state
	return nil
}

// afterMatch is the state after a match (7), a repeated one (8) or a repeated byte (9), which
// tells whether a literal came before.
func afterMatch(literal bool, state uint32) uint32 {
	switch {
	case literal:
		return state
	case state == 7:
		return 10
	}
	return 11
}

// literalBase is where the probabilities of a literal are that goes to o.
func (d *lzmaDecoder) literalBase(o int, total int64) int {
	var before byte
	if total > 0 {
		if before = d.dict[len(d.dict)-1]; o > 0 {
			before = d.dict[o-1]
		}
	}
	return lzmaLiteral + 0x300*int((uint32(total)&d.lpMask)<<d.lc+uint32(before)>>(8-d.lc))
}

// back is the byte that stands where the last match would go on.
func (d *lzmaDecoder) back(o int) byte {
	at := o - int(d.reps[0]) - 1
	if at < 0 {
		at += len(d.dict)
	}
	return d.dict[at]
}

// mismatch decodes a literal that follows a match and so is likely not to be like.
func (d *lzmaDecoder) mismatch(base int, like byte, rng, code uint32, pos int) (uint32, uint32, uint32, int) {
	packed, probs := d.packed, d.probs[base:base+0x300]
	m, half, bits := uint32(1), uint32(0x100), uint32(like)
	for m < 0x100 {
		if rng < 1<<24 {
			if pos >= len(packed) {
				return 0, rng, code, pos + 1
			}
			rng, code = rng<<8, code<<8|uint32(packed[pos])
			pos++
		}
		bits <<= 1
		expect := bits & half
		prob := &probs[half+expect+m]
		p := uint32(*prob)
		if bound := (rng >> 11) * p; code < bound {
			*prob = uint16(p + (2048-p)>>5)
			rng, m, half = bound, m<<1, half&^expect
		} else {
			*prob = uint16(p - p>>5)
			rng, code, m, half = rng-bound, code-bound, m<<1|1, half&expect
		}
	}
	return m & 0xff, rng, code, pos
}

// choose decodes which of the last distances comes again, and puts it in front; 0 where it is
// for one byte only.
func (d *lzmaDecoder) choose(state, posState, rng, code uint32, pos int) (uint32, uint32, uint32, int) {
	b, rng, code, pos := d.bit(lzmaIsRepG0+int(state), rng, code, pos)
	if b == 0 {
		return d.bit(lzmaIsRep0Long+int(state<<4+posState), rng, code, pos)
	}
	which := 1
	b, rng, code, pos = d.bit(lzmaIsRepG1+int(state), rng, code, pos)
	if b == 1 {
		b, rng, code, pos = d.bit(lzmaIsRepG2+int(state), rng, code, pos)
		which = 2 + int(b)
	}
	rep := d.reps[which]
	copy(d.reps[1:which+1], d.reps[:which])
	d.reps[0] = rep
	return 1, rng, code, pos
}

// repeat copies the n bytes at the last distance to o. Only their place in the dictionary may wrap.
func (d *lzmaDecoder) repeat(o, n int) {
	from := o - int(d.reps[0]) - 1
	if from < 0 {
		from += len(d.dict)
		k := copy(d.dict[o:o+n], d.dict[from:])
		o, n, from = o+k, n-k, 0
	}
	if n <= o-from {
		copy(d.dict[o:o+n], d.dict[from:])
		return
	}
	to, by := d.dict[o:o+n], d.dict[from:o+n]
	for i := range to {
		to[i] = by[i]
	}
}
