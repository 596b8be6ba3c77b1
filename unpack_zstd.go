// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"runtime/debug"
)

// Zstandard. The decoder is our own for its speed, and because the standard library has one for sections of ELF files
// alone, which takes twice the time (BenchmarkZstd holds one against the other).

// unzstd unpacks zstd frames (RFC 8878) one after the other. It can be entered at each of them. The
// window's size is known before it is allocated, and one buffer serves all frames.
type unzstd struct {
	in     *input
	lim    unpackLimits
	out    int64 // bytes given in all, from wherever the caller counts
	latest restartPoint
	err    error

	frames   int  // read to their end
	inside   bool // a frame
	last     bool // the block before was the frame's last
	summed   bool // a checksum follows the frame
	sized    bool
	size     uint64 // of what the frame unpacks to by its header, if sized
	total    uint64 // unpacked of the frame
	maxBlock int    // the largest block that the frame may have, packed or not

	// What the frame unpacks to goes into buf round and round, each block in one piece. Before a
	// block that might not fit behind end it goes on at 0; what a match can still refer to is then
	// in buf[:o] and, before that, at the end of buf[:oldEnd].
	buf        []byte
	window     int // how far back a match may refer
	oldEnd     int
	begin, end int // in buf: what was unpacked and not given yet

	reps   [3]uint32   // the last three offsets
	fse    [3]fseTable // codes of literal lengths, offsets and match lengths
	weight fseTable    // code of the weights in a Huffman tree
	tree   bool        // the frame has had a Huffman tree
	huff   [1 << huffBits]uint16

	// Slack before and behind is for loads of eight bytes at either end of a part. What they fetch
	// beyond it is not used, or found out when a part does not end where it must.
	packed [zstdSlack + zstdBlock + zstdSlack]byte
	lits   [zstdBlock + zstdSlack]byte
}

const (
	zstdBlock = 128 << 10 // the largest block there can be (RFC 8878, 3.1.1.2.4)
	zstdSlack = 32        // copies by sixteens write up to 15 bytes too many
	huffBits  = 11        // the longest Huffman code (4.2.1)
)

var errZstd = errors.New("zstd data is damaged")

// skippable tells a frame of data for someone else by its first bytes (3.1.2).
//
//go:noinline
func skippable(head []byte) bool {
	return len(head) >= 4 && binary.LittleEndian.Uint32(head)&^15 == 0x184d2a50
}

func (z *unzstd) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for z.err == nil && z.begin == z.end {
		z.err = z.advance()
	}
	if z.err != nil {
		return 0, z.err
	}
	n := copy(p, z.buf[z.begin:z.end])
	z.begin += n
	z.out += int64(n)
	return n, nil
}

func (z *unzstd) latestRestart() (restartPoint, bool) { return z.latest, z.latest.Kind != "" }

// advance reads one block, or what is between two frames; io.EOF at the end of the section.
func (z *unzstd) advance() (err error) {
	at := z.in.offset()
	switch {
	case !z.inside:
		err = z.frame()
	case z.last:
		err = z.frameEnd()
	default:
		err = z.nextBlock()
	}
	if err == errZstd {
		err = fmt.Errorf("offset %d: %w", at, err)
	}
	return err
}

// frame reads a frame's header (3.1.1.1), or skips a frame.
func (z *unzstd) frame() error {
	at := z.in.offset()
	h, err := z.in.peek(18) // the longest header
	switch {
	case err != nil:
		return err
	case len(h) == 0 && z.frames > 0:
		return io.EOF
	case skippable(h):
		if len(h) < 8 {
			return io.ErrUnexpectedEOF
		}
		z.frames++
		return z.in.skip(8 + int64(binary.LittleEndian.Uint32(h[4:])))
	case len(h) >= 4 && string(h[:4]) != compressionMagic["zstd"]:
		return fmt.Errorf("offset %d: got % x, want a zstd frame or the end", at, h[:4])
	case len(h) < 5:
		return io.ErrUnexpectedEOF
	case h[4]&8 != 0:
		return fmt.Errorf("offset %d: zstd frame header %02x has its reserved bit set", at, h[4])
	}
	flags := h[4]
	single := flags & 0x20 >> 5
	sizes := [4]int{int(single), 2, 4, 8}[flags>>6]
	ids := [4]int{0, 1, 2, 4}[flags&3]
	n := 5 + int(1-single) + ids + sizes
	if len(h) < n {
		return io.ErrUnexpectedEOF
	}
	id, window := littleEndian(h[n-sizes-ids:n-sizes]), uint64(0)
	if id != 0 {
		return withHint(refuse("offset %d: zstd data made with dictionary %d, want data made without one", at, id),
			"write the artifact again and give zstd no dictionary")
	}
	z.size, z.sized = littleEndian(h[n-sizes:n]), sizes > 0
	if sizes == 2 {
		z.size += 256
	}
	if window = z.size; single == 0 {
		window = 1 << (10 + h[5]>>3)
		window += window / 8 * uint64(h[5]&7)
	}
	z.in.pos += n
	z.latest = restartPoint{Kind: "zstd", File: at, Out: z.out, Fresh: true}
	z.inside, z.last, z.summed, z.total = true, false, flags&4 != 0, 0
	z.maxBlock = int(min(window, zstdBlock))
	z.reps, z.tree = [3]uint32{1, 4, 8}, false
	for i := range z.fse {
		z.fse[i].kind = fseNone
	}
	z.oldEnd, z.begin, z.end = 0, 0, 0
	return z.needWindow(window)
}

// littleEndian decodes up to eight bytes.
func littleEndian(b []byte) (v uint64) {
	for i, c := range b {
		v |= uint64(c) << (8 * i)
	}
	return v
}

// needWindow sees that the buffer is enough for a window of n bytes, or for as much as can be of use.
func (z *unzstd) needWindow(n uint64) error {
	if z.lim.out > 0 {
		n = min(n, uint64(z.lim.out))
	}
	if z.sized {
		n = min(n, z.size)
	}
	if n > uint64(z.lim.dict) {
		return withHint(refuse("zstd window of %d bytes wanted, limit here is %d bytes", n, z.lim.dict),
			"write the artifact again with --compression gzip, "+
				"or with a smaller window (zstd without --long and --ultra)")
	}
	z.window = int(n)
	if len(z.buf) < z.window+zstdBlock+2*zstdSlack {
		size := int(roomFor(max(int64(n), 1<<10), z.lim.dict))
		if z.buf != nil {
			z.buf = nil
			debug.FreeOSMemory() // the limit is for all of them together
		}
		z.buf = make([]byte, size+zstdBlock+2*zstdSlack)
	}
	return nil
}

// frameEnd checks the size of what was unpacked, and skips the checksum (3.1.1). That would be work for nothing: each
// file that an artifact holds must have the SHA-256 of the manifest, and what is around the files is checked to the
// byte (tarStream).
func (z *unzstd) frameEnd() error {
	if z.sized && z.total != z.size {
		return fmt.Errorf("offset %d: zstd frame unpacks to %d bytes, its header says %d",
			z.in.offset(), z.total, z.size)
	}
	if z.summed {
		if err := z.in.skip(4); err != nil {
			return err
		}
	}
	z.inside = false
	z.frames++
	return nil
}

// nextBlock unpacks a block (3.1.1.2), to nothing if it is damaged.
func (z *unzstd) nextBlock() error {
	at := z.in.offset()
	h, err := z.in.need(3)
	if err != nil {
		return err
	}
	kind, size := h[0]>>1&3, int(littleEndian(h)>>3)
	z.last = h[0]&1 == 1
	z.in.pos += 3
	if size > z.maxBlock {
		return fmt.Errorf("offset %d: zstd block of %d bytes, want at most %d", at, size, z.maxBlock)
	}
	if z.end+z.maxBlock > len(z.buf)-zstdSlack {
		z.oldEnd, z.begin, z.end = z.end, 0, 0
	}
	room := z.maxBlock
	if z.sized {
		room = int(min(uint64(room), z.size-z.total))
	}
	begin, end := z.end, z.end+size
	if kind < 2 && size > room {
		return fmt.Errorf("offset %d: zstd frame unpacks to at least %d bytes, its header says %d",
			at, z.total+uint64(size), z.size)
	}
	switch kind {
	case 0: // stored
		_, err = io.ReadFull(z.in, z.buf[begin:end])
	case 1: // one byte over and over
		var c byte
		c, err = z.in.ReadByte()
		fillBytes(z.buf[begin:end], c)
	case 2:
		if _, err = io.ReadFull(z.in, z.packed[zstdSlack:zstdSlack+size]); err == nil {
			end, err = z.unpack(zstdSlack+size, begin+room)
		}
	default:
		err = errZstd
	}
	if err != nil {
		return noEOF(err)
	}
	z.end = end
	z.total += uint64(end - begin)
	return nil
}

func fillBytes(b []byte, c byte) {
	if len(b) > 0 {
		b[0] = c
	}
	for n := 1; n < len(b); n *= 2 {
		copy(b[n:], b[:n])
	}
}

// unpack unpacks the compressed block z.packed[zstdSlack:end] to z.buf[z.end:limit] and tells how far
// that went (3.1.1.3).
func (z *unzstd) unpack(end, limit int) (int, error) {
	lits, n, p, err := z.literals(end)
	if err != nil || p >= end {
		return 0, errZstd
	}
	count := int(z.packed[p])
	switch p++; {
	case count == 255:
		count, p = int(binary.LittleEndian.Uint16(z.packed[p:]))+0x7f00, p+2
	case count >= 128:
		count, p = (count-128)<<8+int(z.packed[p]), p+1
	}
	o, used := z.end, 0
	if count > 0 {
		if p, err = z.codes(p, end); err != nil {
			return 0, err
		}
		if o, used, err = z.sequences(count, p, end, lits, n, limit); err != nil {
			return 0, err
		}
	} else if p != end {
		return 0, errZstd
	}
	if n-used > limit-o {
		return 0, errZstd
	}
	return o + copy(z.buf[o:], lits[used:n]), nil
}

// literals unpacks the first part of a block (3.1.1.3.1), which begins in z.packed where the block does. The n
// literals have slack behind them; p is where the next part begins.
func (z *unzstd) literals(end int) (lits []byte, n, p int, err error) {
	p = zstdSlack
	h := le64(z.packed[p:])
	kind, form := h&3, h>>2&3
	if kind < 2 {
		switch form {
		case 1:
			n, p = int(h>>4&0xfff), p+2
		case 3:
			n, p = int(h>>4&0xfffff), p+3
		default:
			n, p = int(h>>3&0x1f), p+1
		}
		if n > z.maxBlock || kind == 0 && n > end-p {
			return nil, 0, 0, errZstd
		}
		if kind == 0 {
			return z.packed[p:], n, p + n, nil
		}
		fillBytes(z.lits[:n], z.packed[p])
		return z.lits[:], n, p + 1, nil
	}
	width := [4]uint{10, 10, 14, 18}[form]
	n = int(h >> 4 & (1<<width - 1))
	size := int(h >> (4 + width) & (1<<width - 1))
	p += int(4+2*width+7) / 8
	if n > z.maxBlock || size > end-p {
		return nil, 0, 0, errZstd
	}
	if end = p + size; kind == 2 {
		if p, err = z.huffTree(p, end); err != nil {
			return nil, 0, 0, err
		}
	} else if !z.tree {
		return nil, 0, 0, errZstd
	}
	if form == 0 {
		err = z.stream(z.lits[:n], p, end)
	} else {
		err = z.streams(z.lits[:n], p, end)
	}
	return z.lits[:], n, end, err
}

// huffTree reads the weights of a Huffman code (4.2.1) and makes its table.
func (z *unzstd) huffTree(p, end int) (int, error) {
	if p >= end {
		return 0, errZstd
	}
	var weights [256]uint8
	n, size := 0, int(z.packed[p])
	if size >= 128 {
		n = size - 127
		size = (n + 1) / 2
	}
	if p++; size > end-p {
		return 0, errZstd
	}
	for i := range n {
		weights[i] = z.packed[p+i/2] >> (4 * (^i & 1)) & 15
	}
	if n == 0 {
		var err error
		if n, err = z.weights(&weights, p, p+size); err != nil {
			return 0, err
		}
	}
	return p + size, z.makeHuff(&weights, n)
}

// makeHuff fills the table of a Huffman code from n weights and the last one, which makes the sum of all 2^(weight-1) a
// power of two (4.2.1.3). The table's index is what comes next, the next bit highest; an entry is the symbol and, in
// the low byte, the bits of its code.
func (z *unzstd) makeHuff(weights *[256]uint8, n int) error {
	var count, place [huffBits + 2]int
	sum := 0
	for _, w := range weights[:n] {
		if w > huffBits {
			return errZstd
		}
		count[w]++
		sum += 1 << w >> 1
	}
	longest := bits.Len(uint(sum))
	rest := 1<<longest - sum
	if sum == 0 || longest > huffBits || rest&(rest-1) != 0 {
		return errZstd
	}
	weights[n] = uint8(bits.Len(uint(rest)))
	count[weights[n]]++
	if count[1] < 2 { // the longest codes come in pairs
		return errZstd
	}
	for w := 1; w <= longest; w++ {
		place[w+1] = place[w] + count[w]<<(w-1)<<(huffBits-longest)
	}
	for sym, w := range weights[:n+1] {
		if w > 0 {
			e, from := uint16(sym<<8|longest+1-int(w)), place[w]
			place[w] += 1 << (w - 1) << (huffBits - longest)
			for i := from; i < place[w]; i++ {
				z.huff[i] = e
			}
		}
	}
	z.tree = true
	return nil
}

// weights unpacks those of a Huffman code from an FSE code with two states that take turns (4.2.1.2). Which ends where
// a state has no bits left to be followed by another.
func (z *unzstd) weights(w *[256]uint8, p, end int) (n int, err error) {
	t := &z.weight
	if p, err = z.fseCode(t, p, end, 6, nil, 12); err != nil {
		return 0, err
	}
	at, ok := z.lastBit(p, end)
	if at -= 2 * int(t.log); !ok || at < p*8 {
		return 0, errZstd
	}
	one := t.entry[z.bitsAt(at+int(t.log), t.log)]
	two := t.entry[z.bitsAt(at, t.log)]
	for ; n < 254; n++ {
		w[n] = uint8(one >> 32)
		more := uint(one & 0xff)
		if at -= int(more); at < p*8 {
			w[n+1] = uint8(two >> 32)
			return n + 2, nil
		}
		one, two = two, t.entry[(one>>16+z.bitsAt(at, more))&511]
	}
	return 0, errZstd
}

// lastBit finds the one bit that ends a stream which is read backwards (4.1): the bits before it are the data.
func (z *unzstd) lastBit(p, end int) (int, bool) {
	if end <= p || z.packed[end-1] == 0 {
		return 0, false
	}
	return end*8 - 9 + bits.Len8(z.packed[end-1]), true
}

// bitsAt gives up to 32 bits from bit at of the block on, or zeros if that is not in it.
func (z *unzstd) bitsAt(at int, n uint) uint64 {
	if at < 0 || at/8 > len(z.packed)-8 {
		return 0
	}
	return le64(z.packed[at/8:]) >> (at & 7) & (1<<n - 1)
}

// huffStream is a stream of Huffman codes, read backwards. The next bit is the highest of bits; the
// lowest one that is set tells how many have been used.
type huffStream struct {
	bits uint64
	pos  int // in packed: what bits was loaded from
	from int // in packed: where the stream begins
}

func (z *unzstd) openStream(p, end int) (huffStream, bool) {
	at, ok := z.lastBit(p, end)
	if !ok {
		return huffStream{}, false
	}
	return huffStream{(le64(z.packed[end-8:]) | 1) << (end*8 - at), end - 8, p}, true
}

// stream unpacks one stream of Huffman codes.
func (z *unzstd) stream(to []byte, p, end int) error {
	s, ok := z.openStream(p, end)
	if !ok {
		return errZstd
	}
	return z.drain(s, to)
}

// drain unpacks all that a stream still has, which must be as much as fits.
func (z *unzstd) drain(s huffStream, to []byte) error {
	b, pos := s.bits, s.pos
	for len(to) > 0 {
		used := bits.TrailingZeros64(b)
		if pos -= used >> 3; pos < s.from-8 {
			return errZstd
		}
		b = (le64(z.packed[pos:]) | 1) << (used & 7)
		n := min(len(to), 5)
		for i := range to[:n] {
			e := z.huff[b>>(64-huffBits)]
			b <<= e & 63
			to[i] = byte(e >> 8)
		}
		to = to[n:]
	}
	if pos*8+64-bits.TrailingZeros64(b) != s.from*8 {
		return errZstd
	}
	return nil
}

// streams unpacks four streams of Huffman codes, the sizes of three of which come first (3.1.1.3.1.6).
func (z *unzstd) streams(to []byte, p, end int) error {
	part := (len(to) + 3) / 4
	if end-p < 6 || len(to) < 6 {
		return errZstd
	}
	var s [4]huffStream
	begin := p + 6
	for i := range s {
		next := end
		if i < 3 {
			next = begin + int(binary.LittleEndian.Uint16(z.packed[p+2*i:]))
		}
		ok := next <= end
		if ok {
			s[i], ok = z.openStream(begin, next)
		}
		if !ok {
			return errZstd
		}
		begin = next
	}
	done := z.fourStreams(&s, to, part)
	for i := range s {
		if err := z.drain(s[i], to[i*part+done:min((i+1)*part, len(to))]); err != nil {
			return err
		}
	}
	return nil
}

// fourStreams is the loop that most literals pass through: five of each stream at a time, since of the 64 bits
// loaded at most 7 are used already. It ends before any stream's input or room does.
func (z *unzstd) fourStreams(s *[4]huffStream, to []byte, part int) int {
	t, packed := &z.huff, &z.packed
	b0, b1, b2, b3 := s[0].bits, s[1].bits, s[2].bits, s[3].bits
	p0, p1, p2, p3 := s[0].pos, s[1].pos, s[2].pos, s[3].pos
	to0, to1, to2, to3 := to[:part], to[part:2*part], to[2*part:3*part], to[3*part:]
	i := 0
	for {
		rounds := min(p0-s[0].from, p1-s[1].from, p2-s[2].from, p3-s[3].from) / 7
		if rounds = min(rounds, (len(to3)-i)/5); rounds <= 0 {
			break
		}
		for range rounds {
			n0, n1 := bits.TrailingZeros64(b0), bits.TrailingZeros64(b1)
			n2, n3 := bits.TrailingZeros64(b2), bits.TrailingZeros64(b3)
			p0, p1, p2, p3 = p0-n0>>3, p1-n1>>3, p2-n2>>3, p3-n3>>3
			b0 = (le64(packed[p0:]) | 1) << (n0 & 7)
			b1 = (le64(packed[p1:]) | 1) << (n1 & 7)
			b2 = (le64(packed[p2:]) | 1) << (n2 & 7)
			b3 = (le64(packed[p3:]) | 1) << (n3 & 7)
			o0, o1, o2, o3 := (*[5]byte)(to0[i:]), (*[5]byte)(to1[i:]), (*[5]byte)(to2[i:]), (*[5]byte)(to3[i:])
			for j := range 5 {
				e0, e1, e2, e3 := t[b0>>(64-huffBits)], t[b1>>(64-huffBits)], t[b2>>(64-huffBits)], t[b3>>(64-huffBits)]
				b0, b1, b2, b3 = b0<<(e0&63), b1<<(e1&63), b2<<(e2&63), b3<<(e3&63)
				o0[j], o1[j], o2[j], o3[j] = byte(e0>>8), byte(e1>>8), byte(e2>>8), byte(e3>>8)
			}
			i += 5
		}
	}
	s[0].bits, s[1].bits, s[2].bits, s[3].bits = b0, b1, b2, b3
	s[0].pos, s[1].pos, s[2].pos, s[3].pos = p0, p1, p2, p3
	return i
}

// fseTable is a code of finite state entropy (4.1). An entry is a state: in the low byte the bits to be added
// to what is in bits 16 to 31, for the next state; above that the bits to be added to the upper half, for
// what the state's symbol stands for.
type fseTable struct {
	kind  byte
	log   uint
	entry [1 << 9]uint64
}

const (
	fseNone    = iota // none in this frame so far
	fseDefault        // that of every frame
	fseOther
)

// The three kinds of symbols of a sequence: literal lengths, offsets, match lengths (3.1.1.3.2.1.1, 3.1.1.3.2.2).
// Each code's base is that of the code before and as much as the extra bits of that can add.
var fseKinds = [3]struct {
	codes  []uint64
	most   uint // the largest table
	log    uint // of the default
	counts []int16
}{
	{fseCodes(0, 16, 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16), 9, 6,
		[]int16{4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1,
			-1, -1, -1, -1}},
	{fseCodes(1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
		27, 28, 29, 30, 31), 8, 5,
		[]int16{1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1}},
	{fseCodes(3, 32, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16), 9, 6,
		[]int16{1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
			1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1}},
}

// fseCodes makes entries, first of as many codes without extra bits as plain says.
//
//go:noinline
func fseCodes(base uint64, plain int, extra ...uint64) []uint64 {
	codes := make([]uint64, plain+len(extra))
	copy(codes[plain:], extra)
	for i, n := range codes {
		codes[i] = base<<32 | n<<8
		base += 1 << n
	}
	return codes
}

// codes reads which codes the sequences are in, and those that are new (3.1.1.3.2.1).
func (z *unzstd) codes(p, end int) (int, error) {
	if p >= end || z.packed[p]&3 != 0 {
		return 0, errZstd
	}
	modes := z.packed[p]
	p++
	for i := range z.fse {
		t, k := &z.fse[i], &fseKinds[i]
		switch modes >> (6 - 2*i) & 3 {
		case 0:
			if t.kind != fseDefault {
				t.make(k.log, k.counts, k.codes)
				t.kind = fseDefault
			}
		case 1: // one symbol
			if p >= end || int(z.packed[p]) >= len(k.codes) {
				return 0, errZstd
			}
			t.kind, t.log, t.entry[0] = fseOther, 0, k.codes[z.packed[p]]
			p++
		case 2:
			var err error
			if p, err = z.fseCode(t, p, end, k.most, k.codes, len(k.codes)); err != nil {
				return 0, err
			}
			t.kind = fseOther
		default: // as before
			if t.kind == fseNone {
				return 0, errZstd
			}
		}
	}
	return p, nil
}

// fseCode reads how often each of at most n symbols comes (4.1.1) and makes the table of that.
func (z *unzstd) fseCode(t *fseTable, p, end int, most uint, codes []uint64, n int) (int, error) {
	at := p * 8
	log := uint(z.bitsAt(at, 4)) + 5
	if at += 4; log > most {
		return 0, errZstd
	}
	var counts [64]int16
	sym := 0
	for left := 1 << log; left > 0; sym++ {
		if sym >= n || at > end*8 {
			return 0, errZstd
		}
		// A number from 0 to left+1; the small ones save a bit.
		width := uint(bits.Len(uint(left + 1)))
		small := 1<<width - 2 - left
		v := int(z.bitsAt(at, width))
		at += int(width)
		if half := 1 << (width - 1); v&(half-1) < small {
			v &= half - 1
			at--
		} else if v >= half {
			v -= small
		}
		counts[sym] = int16(v - 1)
		left -= max(v-1, 1-v)
		for more := 3; v == 1 && more == 3; sym += more { // how many more do not come
			if sym >= n {
				return 0, errZstd
			}
			more = int(z.bitsAt(at, 2))
			at += 2
		}
	}
	if p = (at + 7) / 8; p > end {
		return 0, errZstd
	}
	t.make(log, counts[:sym], codes)
	return p, nil
}

// make fills the table (4.1.1). The counts, of which -1 is for less than one, must have the table's size as their sum.
// Without codes a symbol stands for itself.
func (t *fseTable) make(log uint, counts []int16, codes []uint64) {
	size := 1 << log
	var next [64]uint
	high := size - 1
	for sym, n := range counts {
		next[sym] = uint(n)
		if n < 0 {
			next[sym] = 1
			t.entry[high&511] = uint64(sym)
			high--
		}
	}
	at := 0
	for sym, n := range counts {
		for range n {
			t.entry[at&511] = uint64(sym)
			for at = (at + size>>1 + size>>3 + 3) & (size - 1); at > high; {
				at = (at + size>>1 + size>>3 + 3) & (size - 1)
			}
		}
	}
	t.log = log
	for i := range t.entry[:size] {
		sym := t.entry[i]
		state := next[sym&63]
		next[sym&63]++
		n := log + 1 - uint(bits.Len(state))
		t.entry[i] = sym << 32
		if codes != nil {
			t.entry[i] = codes[sym]
		}
		t.entry[i] |= uint64(state<<n-uint(size))<<16 | uint64(n)
	}
}

var lowBits = func() (m [32]uint32) {
	for i := range m {
		m[i] = 1<<i - 1
	}
	return m
}()

// states reads the first states of the three codes from the end of a stream of sequences, and gives the bit before
// them.
func (z *unzstd) states(p, end int) (at int, state [3]uint64, ok bool) {
	if at, ok = z.lastBit(p, end); !ok {
		return at, state, false
	}
	for i := range z.fse {
		t := &z.fse[i]
		at -= int(t.log)
		state[i] = t.entry[z.bitsAt(at, t.log)&511]
	}
	return at, state, at >= p*8
}

// sequences unpacks as many sequences as n says and does them (3.1.1.3.2, 3.1.1.4): copies some literals to buf and
// then a match. It tells how far buf and the literals are used then.
//
// w holds 64 bits of the stream, which is read backwards; the lowest left of these are not used yet. A sequence begins
// with 57 or more. Its extra bits are up to 31, 16 and 16, for the next states it takes up to 9, 8 and 9. Two times
// 16 are for more than a block may have, so that it is enough to load once within a sequence.
func (z *unzstd) sequences(n, p, end int, lits []byte, nlits, limit int) (o, l int, err error) {
	at, state, ok := z.states(p, end)
	if !ok {
		return 0, 0, errZstd
	}
	buf, packed, window := z.buf, &z.packed, uint32(z.window)
	llTable, ofTable, mlTable := &z.fse[0].entry, &z.fse[1].entry, &z.fse[2].entry
	ll, of, ml := state[0], state[1], state[2]
	rep0, rep1, rep2 := z.reps[0], z.reps[1], z.reps[2]
	pos, left := (at+7)/8-8, uint(at-(at+7)/8*8+64)
	for o = z.end; ; {
		pos, left = pos-int((64-left)>>3), left+(64-left)&^7
		if pos < p-8 {
			return 0, 0, errZstd
		}
		w := le64(packed[pos:])
		extra := uint8((ll + of + ml) >> 8)
		nof, nml, nll := uint(of>>8&31), uint(ml>>8&31), uint(ll>>8&31)
		left -= nof
		offset := uint32(of>>32) + uint32(w>>(left&63))&lowBits[nof]
		if extra > 57-26 {
			pos, left = pos-int((64-left)>>3), left+(64-left)&^7
			w = le64(packed[pos:])
		}
		left -= nml
		match := int(ml>>32) + int(uint32(w>>(left&63))&lowBits[nml])
		left -= nll
		run := int(ll>>32) + int(uint32(w>>(left&63))&lowBits[nll])
		if n--; n > 0 {
			k := uint(ll & 31)
			left -= k
			ll = llTable[(uint32(ll>>16)+uint32(w>>(left&63))&lowBits[k])&511]
			k = uint(ml & 31)
			left -= k
			ml = mlTable[(uint32(ml>>16)+uint32(w>>(left&63))&lowBits[k])&511]
			k = uint(of & 31)
			left -= k
			of = ofTable[(uint32(of>>16)+uint32(w>>(left&63))&lowBits[k])&511]
		}

		if offset > 3 {
			offset -= 3
			rep0, rep1, rep2 = offset, rep0, rep1
		} else {
			if run == 0 {
				offset++
			}
			offset, rep0, rep1, rep2 = repeatOffset(offset, rep0, rep1, rep2)
		}
		if run > nlits-l || run+match > limit-o || offset-1 >= window {
			return 0, 0, errZstd
		}
		copyRun(buf, o, lits, l, run)
		o, l = o+run, l+run
		from := o - int(offset)
		switch {
		case from < 0:
			if !z.copyOld(o, from, match) {
				return 0, 0, errZstd
			}
		case offset < 16:
			copyMatch(buf, o, from, match)
		case match <= 16:
			copy16(buf, o, buf, from)
		case match <= int(offset):
			copy(buf[o:o+match], buf[from:])
		default:
			for i := 0; i < match; i += 16 {
				copy16(buf, o+i, buf, from+i)
			}
		}
		if o += match; n == 0 {
			break
		}
	}
	if pos*8+int(left) != p*8 {
		return 0, 0, errZstd
	}
	z.reps = [3]uint32{rep0, rep1, rep2}
	return o, l, nil
}

// repeatOffset takes one of the last offsets by its number (3.1.1.5), which is one higher where no literals come before
// the match, and puts it in front.
func repeatOffset(number, rep0, rep1, rep2 uint32) (offset, first, second, third uint32) {
	switch number {
	case 1:
		return rep0, rep0, rep1, rep2
	case 2:
		return rep1, rep1, rep0, rep2
	case 3:
		return rep2, rep2, rep0, rep1
	}
	return rep0 - 1, rep0 - 1, rep0, rep1
}

// copy16 copies 16 bytes, of which those that are too many do not count.
func copy16(to []byte, o int, by []byte, from int) {
	t, f := to[o:o+16], by[from:from+16]
	a, b := le64(f), le64(f[8:])
	putLE64(t, a)
	putLE64(t[8:], b)
}

// copyRun copies literals, of which there mostly are few.
func copyRun(to []byte, o int, lits []byte, l, n int) {
	if copy16(to, o, lits, l); n > 16 {
		copy(to[o+16:o+n], lits[l+16:])
	}
}

// copyOld copies a match to o that begins before the start of buf, which is at its last end.
func (z *unzstd) copyOld(o, from, length int) bool {
	if from += z.oldEnd; from < 0 {
		return false
	}
	n := copy(z.buf[o:o+length], z.buf[from:z.oldEnd])
	copyMatch(z.buf, o+n, 0, length-n)
	return true
}
