// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ulikunitz/xz/lzma"
)

// inputBuffer is what is read ahead of an artifact, in bytes: large enough that system calls
// do not count, small enough for a board with 24 MiB.
const inputBuffer = 256 << 10

// input reads an artifact through one buffer and knows its place in the file. It can be
// fenced in to a section, the bytes of one member, at whose end it gives io.EOF.
type input struct {
	r      io.Reader
	buf    []byte
	pos    int   // next byte, in buf
	lim    int   // end, in buf, of what may be read: of the section or of what is buffered
	end    int   // end of what is buffered
	base   int64 // offset in the file of buf[0]
	stop   int64 // offset in the file of the section's end
	err    error // of r, not yet given to anyone
	failed error // of r, other than io.EOF, given to the reader above
}

// newInput reads from r, whose first byte is at offset off of the file.
func newInput(r io.Reader, off int64, size int) *input {
	return &input{r: r, buf: make([]byte, size), base: off, stop: math.MaxInt64}
}

func (in *input) offset() int64 { return in.base + int64(in.pos) }

// section ends the readable bytes n bytes from here; n < 0 lifts the fence.
func (in *input) section(n int64) {
	in.stop = math.MaxInt64
	if n >= 0 && n < math.MaxInt64-in.offset() {
		in.stop = in.offset() + n
	}
	in.lim = int(min(int64(in.end), in.stop-in.base))
}

// more reads once into the free part of the buffer. The end of r inside a section is
// io.ErrUnexpectedEOF.
func (in *input) more() error {
	for range 100 {
		if in.err != nil {
			return in.fail(in.err)
		}
		n, err := in.r.Read(in.buf[in.end:])
		in.end += n
		in.err = err
		if n > 0 {
			in.lim = int(min(int64(in.end), in.stop-in.base))
			return nil
		}
	}
	return in.fail(io.ErrNoProgress)
}

func (in *input) fail(err error) error {
	if err != io.EOF {
		in.failed = err
		return err
	}
	if in.stop != math.MaxInt64 {
		return io.ErrUnexpectedEOF
	}
	return io.EOF
}

// fill makes at least one byte readable.
func (in *input) fill() error {
	if in.pos < in.lim {
		return nil
	}
	if in.offset() >= in.stop {
		return io.EOF
	}
	in.base += int64(in.pos)
	in.pos, in.lim, in.end = 0, 0, 0
	return in.more()
}

func (in *input) ReadByte() (byte, error) {
	if in.pos >= in.lim {
		if err := in.fill(); err != nil {
			return 0, err
		}
	}
	c := in.buf[in.pos]
	in.pos++
	return c, nil
}

// Read fills large p past the buffer, so that an uncompressed payload is not copied.
func (in *input) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if in.pos >= in.lim && len(p) >= len(in.buf) && in.err == nil && in.offset() < in.stop {
		in.base += int64(in.pos)
		in.pos, in.lim, in.end = 0, 0, 0
		n, err := in.r.Read(p[:min(int64(len(p)), in.stop-in.base)])
		in.base += int64(n)
		if in.err = err; n > 0 {
			return n, nil
		}
	}
	if err := in.fill(); err != nil {
		return 0, err
	}
	n := copy(p, in.buf[in.pos:in.lim])
	in.pos += n
	return n, nil
}

// peek gives the next n bytes without consuming them, or as many as the section has.
func (in *input) peek(n int) ([]byte, error) {
	for in.lim-in.pos < n && in.base+int64(in.lim) < in.stop {
		copy(in.buf, in.buf[in.pos:in.end])
		in.base += int64(in.pos)
		in.pos, in.lim, in.end = 0, in.lim-in.pos, in.end-in.pos
		if err := in.more(); err == io.EOF {
			break
		} else if err != nil {
			return nil, err
		}
	}
	return in.buf[in.pos:min(in.lim, in.pos+n)], nil
}

// need is peek for bytes that must be there.
func (in *input) need(n int) ([]byte, error) {
	p, err := in.peek(n)
	if err == nil && len(p) < n {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}

// restartPoint is a place where decompression can be entered again.
type restartPoint struct {
	Kind  string // none, gzip, xz
	File  int64  // offset in the artifact of the next stored byte
	Out   int64  // offset in the data tar of what it decodes to
	Fresh bool   // a gzip member or an xz block starts here: nothing before it is needed
	Check byte   // xz: the integrity check that the stream header named
}

// unpacker decompresses one section of the input. Read gives io.EOF only where the
// compressed data ends as it must. restart gives the latest point at or before what Read
// has given.
type unpacker interface {
	io.Reader
	restart() (restartPoint, bool)
	close()
}

// unpackLimits bound what compressed data may ask for, in bytes.
type unpackLimits struct {
	dict int64 // largest dictionary
	out  int64 // what comes out is cut off here, so that no larger dictionary is of use; 0: not known
}

var compressionMagic = map[string]string{
	"gzip": "\x1f\x8b",
	"xz":   "\xfd7zXZ\x00",
	"zstd": "\x28\xb5\x2f\xfd",
}

// compressionOf tells the compression from a member's name; ok is false for a name that is
// not stem or stem with a known suffix.
func compressionOf(name, stem string) (kind string, ok bool) {
	suffix, ok := strings.CutPrefix(name, stem)
	if !ok {
		return "", false
	}
	kind, ok = map[string]string{"": "none", ".gz": "gzip", ".xz": "xz", ".zst": "zstd"}[suffix]
	return kind, ok
}

// newUnpacker decompresses the section that in is fenced to.
func newUnpacker(kind string, in *input, lim unpackLimits) (unpacker, error) {
	head, err := in.peek(6)
	if err != nil {
		return nil, err
	}
	if magic := compressionMagic[kind]; !bytes.HasPrefix(head, []byte(magic)) {
		return nil, fmt.Errorf("not %s data, as its name says: starts with % x, want % x", kind, head, magic)
	}
	switch kind {
	case "none":
		return &stored{in: in}, nil
	case "gzip":
		return newGunzip(in, restartPoint{Fresh: true}, nil), nil
	case "xz":
		return &unxz{in: in, lim: lim, index: sha256.New()}, nil
	case "zstd":
		return newUnzstd(in, lim)
	}
	return nil, fmt.Errorf("compression %q is not known", kind)
}

// resumeUnpacker goes on at p, where in stands. window is what comes before p.Out in the
// tar, 32 KiB of it, needed by gzip only.
func resumeUnpacker(in *input, p restartPoint, window []byte, lim unpackLimits) (unpacker, error) {
	switch p.Kind {
	case "none":
		return &stored{in: in, out: p.Out}, nil
	case "gzip":
		if !p.Fresh && len(window) < gzipWindow {
			return nil, fmt.Errorf("resuming gzip: got %d bytes of what comes before, want %d", len(window), gzipWindow)
		}
		return newGunzip(in, p, window), nil
	case "xz":
		z := &unxz{in: in, lim: lim, index: sha256.New(), out: p.Out, resumed: true}
		return z, z.setCheck(p.Check)
	}
	return nil, fmt.Errorf("resuming %q data is not possible", p.Kind)
}

// stored is the unpacker of uncompressed data.
type stored struct {
	in  *input
	out int64
}

func (s *stored) Read(p []byte) (int, error) {
	n, err := s.in.Read(p)
	s.out += int64(n)
	return n, err
}

func (s *stored) restart() (restartPoint, bool) {
	return restartPoint{Kind: "none", File: s.in.offset(), Out: s.out, Fresh: true}, true
}

func (s *stored) close() {}

// gzipWindow is how far back deflate can refer (RFC 1951, 2).
const gzipWindow = 32 << 10

// flateInput watches what compress/flate reads, to find the places where the compressed
// data is aligned to a byte: an empty stored block, 00 00 ff ff. flate reads single bytes by
// ReadByte, the four bytes LEN, NLEN of a stored block in one Read, and then its content by
// further Reads (compress/flate/inflate.go, dataBlock and copyData). It never reads ahead.
type flateInput struct {
	*input
	content int   // bytes of a stored block's content still to be read
	mark    int64 // offset in the file after the latest empty stored block; 0: none
}

func (f *flateInput) Read(p []byte) (int, error) {
	if f.content > 0 {
		n, err := f.input.Read(p)
		f.content -= n
		return n, err
	}
	n, err := io.ReadFull(f.input, p)
	if n == 4 {
		f.content = int(binary.LittleEndian.Uint16(p))
		if f.content == 0 {
			f.mark = f.offset()
		}
	}
	return n, err
}

// gunzip unpacks gzip members (RFC 1952) one after the other. It does not use
// compress/gzip, which cannot be entered in the middle of a member.
type gunzip struct {
	in      flateInput
	fl      io.ReadCloser
	member  bool   // inside a member
	whole   bool   // the member was seen from its start, so that its trailer can be checked
	crc     uint32 // of the member so far
	size    uint32 // of the member so far, modulo 2^32
	out     int64  // offset in the tar of the next byte that fl gives
	err     error
	buf     []byte // one window, for reads that are shorter
	rest    []byte // in buf, unpacked and not yet read
	members int    // read to their end
	now     restartPoint
	coming  restartPoint // a point that rest ends at; Kind "" when none
}

func newGunzip(in *input, p restartPoint, window []byte) *gunzip {
	g := &gunzip{in: flateInput{input: in}, buf: make([]byte, gzipWindow), out: p.Out, now: p, member: !p.Fresh}
	g.fl = flate.NewReaderDict(&g.in, window)
	return g
}

func (g *gunzip) Read(p []byte) (n int, err error) {
	if len(g.rest) == 0 && len(p) >= gzipWindow {
		n, err = g.unpack(p)
	} else {
		if len(g.rest) == 0 {
			if n, err = g.unpack(g.buf); n == 0 {
				return 0, err
			}
			g.rest = g.buf[:n]
		}
		n = copy(p, g.rest)
		g.rest = g.rest[n:]
		err = nil
	}
	if g.coming.Kind != "" && g.coming.Out <= g.out-int64(len(g.rest)) {
		g.now, g.coming = g.coming, restartPoint{}
	}
	return n, err
}

// unpack fills p, of at least one window, with what one Read of flate gives.
func (g *gunzip) unpack(p []byte) (n int, err error) {
	for n == 0 && g.err == nil {
		if !g.member {
			if g.err = g.nextMember(); g.err != nil {
				break
			}
		}
		g.in.mark = 0
		n, err = g.fl.Read(p)
		g.note(n, err)
		if g.whole {
			g.crc = crc32.Update(g.crc, crc32.IEEETable, p[:n])
		}
		g.size += uint32(n)
		g.out += int64(n)
		if err == io.EOF {
			err = g.trailer()
		}
		g.err = err
	}
	if n > 0 {
		return n, nil
	}
	return 0, g.err
}

// note keeps the restart point that a Read of n bytes came by. At an empty stored block
// flate gives out all that it has unpacked, in one Read since p holds a window. If nothing
// was left to give it reads on, and what it then gives comes after the point. The empty
// block that ends a member is no point: the trailer follows it.
func (g *gunzip) note(n int, err error) {
	if g.in.mark == 0 || err != nil && err != io.EOF {
		return
	}
	p := restartPoint{Kind: "gzip", File: g.in.mark, Out: g.out}
	if g.in.offset() == g.in.mark {
		if err == io.EOF {
			return
		}
		p.Out += int64(n)
	}
	g.coming = p
}

// nextMember reads a member's header; io.EOF at the end of the section.
func (g *gunzip) nextMember() error {
	at := g.in.offset()
	head, err := g.in.peek(10)
	if err != nil {
		return err
	}
	if len(head) == 0 && g.members > 0 {
		return io.EOF
	}
	const fhcrc, fextra, fname, fcomment, reserved = 2, 4, 8, 16, 0xe0 // RFC 1952, 2.3.1
	if len(head) < 10 || head[0] != 0x1f || head[1] != 0x8b || head[2] != 8 || head[3]&reserved != 0 {
		return fmt.Errorf("offset %d: got % x, want a gzip header or the end", at, head)
	}
	flags := head[3]
	skip := 10
	if flags&fextra != 0 {
		if head, err = g.in.need(12); err != nil {
			return err
		}
		skip = 12 + int(binary.LittleEndian.Uint16(head[10:]))
	}
	if _, err := io.CopyN(io.Discard, g.in.input, int64(skip)); err != nil {
		return noEOF(err)
	}
	for _, f := range []byte{fname, fcomment} {
		for c := byte(1); flags&f != 0 && c != 0; {
			if c, err = g.in.ReadByte(); err != nil {
				return noEOF(err)
			}
		}
	}
	if flags&fhcrc != 0 {
		if _, err := io.CopyN(io.Discard, g.in.input, 2); err != nil {
			return noEOF(err)
		}
	}
	g.member, g.whole, g.crc, g.size = true, true, 0, 0
	if g.members > 0 {
		g.coming = restartPoint{Kind: "gzip", File: at, Out: g.out, Fresh: true}
	}
	return g.fl.(flate.Resetter).Reset(&g.in, nil)
}

// trailer checks a member's CRC-32 and size. Of a member that was entered in the middle
// neither is known; there the hash of the whole payload is the proof.
func (g *gunzip) trailer() error {
	var t [8]byte
	if _, err := io.ReadFull(g.in.input, t[:]); err != nil {
		return noEOF(err)
	}
	g.member = false
	g.members++
	crc, size := binary.LittleEndian.Uint32(t[:]), binary.LittleEndian.Uint32(t[4:])
	if g.whole && (crc != g.crc || size != g.size) {
		return fmt.Errorf("offset %d: gzip trailer has CRC %08x, size %d; the data has %08x, %d",
			g.in.offset()-8, crc, size, g.crc, g.size)
	}
	return nil
}

func (g *gunzip) restart() (restartPoint, bool) { return g.now, g.now.Kind != "" }
func (g *gunzip) close()                        {}

// noEOF is for an end that comes too early.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// unxz unpacks one xz stream (The .xz File Format 1.2.1). Container and checks are done
// here and only LZMA2 by the library: so the dictionary's size is known before it is
// allocated, one dictionary serves all blocks, and a block can be entered by itself. The
// blocks' LZMA2 data, each of which starts with a dictionary reset, is given to one
// lzma.Reader2 as if it were one sequence of chunks; the zero byte between is left out.
type unxz struct {
	in      *input
	lim     unpackLimits
	lz      *lzma.Reader2
	dict    int64 // bytes that lz has for its dictionary
	check   byte
	sum     hash.Hash // of the block, nil when the stream has none
	started bool      // the stream header was read
	resumed bool      // the stream was entered at a block
	inBlock bool
	first   bool  // the next chunk is the block's first
	chunk   int   // bytes of the current chunk still to come
	header  int64 // size of the block's header
	packed  int64 // offset in the file of the block's data
	block   int64 // bytes unpacked of this block
	wantIn  int64 // size of the block's data by its header, or -1
	wantOut int64 // size of what it unpacks to by its header, or -1
	index   hash.Hash
	blocks  uint64 // blocks that index holds
	out     int64
	now     restartPoint
	err     error
}

func (z *unxz) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for z.err == nil && z.chunk == 0 {
		z.err = z.advance()
	}
	if z.err != nil {
		return 0, z.err
	}
	n, err := z.lz.Read(p[:min(len(p), z.chunk)])
	z.chunk -= n
	z.block += int64(n)
	z.out += int64(n)
	if z.sum != nil {
		z.sum.Write(p[:n])
	}
	if err != nil {
		z.err = fmt.Errorf("offset %d: %w", z.in.offset(), noEOF(err))
	}
	return n, nil
}

// advance reads what is between two chunks: headers, ends of blocks, the index. io.EOF when
// the stream is complete.
func (z *unxz) advance() error {
	switch {
	case !z.started && !z.resumed:
		return z.streamHeader()
	case !z.inBlock:
		head, err := z.in.need(1)
		if err != nil {
			return err
		}
		if head[0] == 0 {
			return z.streamEnd()
		}
		return z.blockHeader((int(head[0]) + 1) * 4)
	}
	return z.nextChunk()
}

func (z *unxz) streamHeader() error {
	var h [12]byte
	if _, err := io.ReadFull(z.in, h[:]); err != nil {
		return noEOF(err)
	}
	if string(h[:6]) != compressionMagic["xz"] || h[6] != 0 || crc32.ChecksumIEEE(h[6:8]) != binary.LittleEndian.Uint32(h[8:]) {
		return fmt.Errorf("offset %d: xz stream header % x is damaged", z.in.offset()-12, h)
	}
	z.started = true
	return z.setCheck(h[7])
}

// setCheck takes the check IDs of section 2.1.1.2 that xz itself writes.
func (z *unxz) setCheck(id byte) error {
	switch z.check = id; id {
	case 0:
	case 1:
		z.sum = crc32.NewIEEE()
	case 4:
		z.sum = crc64.New(crc64.MakeTable(crc64.ECMA))
	case 10:
		z.sum = sha256.New()
	default:
		return fmt.Errorf("xz integrity check %d is not known; want none, CRC32, CRC64 or SHA-256", id)
	}
	return nil
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
	if h[1]&0x3f != 0 {
		return bad("want the one filter LZMA2 and no other")
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
		v, err := binary.ReadUvarint(r)
		if err != nil || v > math.MaxInt64 {
			return bad("size out of range")
		}
		*f.to = int64(v)
	}
	var filter [3]byte
	if _, err := io.ReadFull(r, filter[:]); err != nil || filter[0] != 0x21 || filter[1] != 1 || filter[2] > 40 {
		return bad("want the one filter LZMA2 and no other")
	}
	if pad := h[n-4-r.Len() : n-4]; !allZero(pad) {
		return bad("padding is not zero")
	}
	z.now = restartPoint{Kind: "xz", File: at, Out: z.out, Fresh: true, Check: z.check}
	z.inBlock, z.first, z.block, z.header, z.packed = true, true, 0, int64(n), z.in.offset()
	if z.sum != nil {
		z.sum.Reset()
	}
	return z.needDict(xzDictSize(filter[2]))
}

// xzDictSize decodes a dictionary size, 0 to 40 (section 5.3.1), to bytes.
func xzDictSize(b byte) int64 {
	if b == 40 {
		return math.MaxUint32
	}
	return int64(2|b&1) << (b/2 + 11)
}

// needDict sees that lz has a dictionary of n bytes, or of as many as can be of use.
func (z *unxz) needDict(n int64) error {
	use := n
	if z.lim.out > 0 {
		use = min(use, z.lim.out)
	}
	if z.wantOut >= 0 {
		use = min(use, z.wantOut)
	}
	if use = max(use, lzma.MinDictCap); use > z.lim.dict {
		return withHint(refuse("xz dictionary of %d bytes wanted, limit here is %d bytes", use, z.lim.dict),
			"write the artifact again with --compression gzip, or with a smaller dictionary (mendlet pack --compression xz)")
	}
	if use > z.dict {
		z.lz, z.dict = nil, use
	}
	return nil
}

// nextChunk looks at the header of an LZMA2 chunk, which lz then reads.
func (z *unxz) nextChunk() error {
	h, err := z.in.need(3)
	if err != nil {
		return err
	}
	first := z.first
	z.first = false
	size := (int(h[1])<<8 | int(h[2])) + 1
	switch c := h[0]; {
	case c == 0:
		return z.blockEnd()
	case c >= 0x80:
		size += int(c&0x1f) << 16
	case c > 2:
		return fmt.Errorf("offset %d: LZMA2 control byte %#x", z.in.offset(), c)
	}
	if first && h[0] != 1 && h[0] < 0xe0 {
		return fmt.Errorf("offset %d: xz block does not start with a dictionary reset", z.in.offset())
	}
	z.chunk = size
	if z.lz == nil {
		z.lz, err = lzma.Reader2Config{DictCap: int(z.dict)}.NewReader2(z.in)
	}
	return err
}

// blockEnd reads the zero byte, padding and check, and enters the block's sizes for the
// index (sections 3.3, 3.4, 4.3).
func (z *unxz) blockEnd() error {
	z.inBlock = false
	size := z.in.offset() + 1 - z.packed
	if z.wantIn >= 0 && size != z.wantIn || z.wantOut >= 0 && z.block != z.wantOut {
		return fmt.Errorf("offset %d: xz block has %d bytes for %d; its header says %d for %d",
			z.in.offset(), size, z.block, z.wantIn, z.wantOut)
	}
	var sum []byte
	if z.sum != nil {
		sum = z.sum.Sum(nil)
		if len(sum) <= 8 { // CRCs are stored in little-endian order
			for i, j := 0, len(sum)-1; i < j; i, j = i+1, j-1 {
				sum[i], sum[j] = sum[j], sum[i]
			}
		}
	}
	pad := int(-size & 3)
	end := make([]byte, 1+pad+len(sum))
	if _, err := io.ReadFull(z.in, end); err != nil {
		return noEOF(err)
	}
	if !allZero(end[:1+pad]) || !bytes.Equal(end[1+pad:], sum) {
		return fmt.Errorf("offset %d: xz block check is %x, the data has %x", z.in.offset(), end[1+pad:], sum)
	}
	z.record(z.index, uint64(z.header+size)+uint64(len(sum)), uint64(z.block))
	z.blocks++
	return nil
}

func (z *unxz) record(h hash.Hash, unpadded, size uint64) {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], unpadded)
	binary.LittleEndian.PutUint64(b[8:], size)
	h.Write(b[:])
}

// crcBytes is the byte reader of an index: it counts and sums what it reads.
type crcBytes struct {
	in  *input
	n   int64
	crc uint32
}

func (c *crcBytes) ReadByte() (byte, error) {
	b, err := c.in.ReadByte()
	if err == nil {
		c.n++
		c.crc = crc32.Update(c.crc, crc32.IEEETable, []byte{b})
	}
	return b, err
}

// streamEnd reads index and footer (section 4 and 2.1.2) and compares the index with the
// blocks that were read. A stream that was entered at a block knows its last ones only.
func (z *unxz) streamEnd() error {
	at := z.in.offset()
	r := &crcBytes{in: z.in}
	bad := func(what string) error { return fmt.Errorf("offset %d: xz index: %s", at, what) }
	r.ReadByte()
	count, err := binary.ReadUvarint(r)
	if err != nil || count < z.blocks || count > z.blocks && !z.resumed {
		return bad(fmt.Sprintf("%d blocks, got %d", count, z.blocks))
	}
	got := sha256.New()
	for i := range count {
		unpadded, err1 := binary.ReadUvarint(r)
		size, err2 := binary.ReadUvarint(r)
		if err1 != nil || err2 != nil {
			return bad("damaged")
		}
		if i >= count-z.blocks {
			z.record(got, unpadded, size)
		}
	}
	for r.n%4 != 0 {
		if b, err := r.ReadByte(); err != nil || b != 0 {
			return bad("padding is not zero")
		}
	}
	var t [16]byte // CRC of the index, footer
	if _, err := io.ReadFull(z.in, t[:]); err != nil {
		return noEOF(err)
	}
	le := binary.LittleEndian
	switch {
	case le.Uint32(t[:]) != r.crc:
		return bad("CRC is wrong")
	case !bytes.Equal(got.Sum(nil), z.index.Sum(nil)):
		return bad("does not fit the blocks")
	case le.Uint32(t[4:]) != crc32.ChecksumIEEE(t[8:14]),
		int64(le.Uint32(t[8:])) != (r.n+4)/4-1, t[12] != 0, t[13] != z.check, t[14] != 'Y', t[15] != 'Z':
		return bad("footer is wrong")
	}
	return io.EOF
}

func (z *unxz) restart() (restartPoint, bool) { return z.now, z.now.Kind != "" }
func (z *unxz) close()                        {}

// unzstd pipes the section through a zstd program, there being no decoder in here.
type unzstd struct {
	in   *input
	cmd  *exec.Cmd
	out  io.ReadCloser
	says bytes.Buffer
	done bool
	err  error
}

func newUnzstd(in *input, lim unpackLimits) (unpacker, error) {
	path, err := exec.LookPath("zstd")
	if err != nil {
		return nil, withHint(refuse("zstd data, and there is no zstd program: %w", err),
			"write the artifact again with mender-artifact … --compression gzip, or with mendlet pack")
	}
	z := &unzstd{in: in, cmd: exec.Command(path, "-dcq", fmt.Sprintf("--memory=%dKB", lim.dict>>10))}
	z.cmd.Stdin = in
	z.cmd.Stderr = &z.says // -q: one line at most
	// A terminal's interrupt is for this process, which ends the child itself.
	z.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// How long to wait, once the child is gone, for a Read of the input that hangs.
	z.cmd.WaitDelay = 5 * time.Second
	if z.out, err = z.cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	if err := z.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%q: %w", path, err)
	}
	return z, nil
}

func (z *unzstd) Read(p []byte) (int, error) {
	if z.done {
		return 0, z.err
	}
	n, err := z.out.Read(p)
	if err == io.EOF {
		z.done = true
		if z.err = z.cmd.Wait(); z.err == nil {
			z.err = io.EOF
		} else {
			z.err = fmt.Errorf("%q: %w: %s", z.cmd.Path, z.err, strings.TrimSpace(z.says.String()))
		}
		err = z.err
	}
	return n, err
}

func (z *unzstd) restart() (restartPoint, bool) { return restartPoint{}, false }

func (z *unzstd) close() {
	if !z.done {
		z.done, z.err = true, os.ErrClosed
		z.cmd.Process.Kill()
		z.cmd.Wait()
	}
}

func allZero(p []byte) bool {
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// defaultDictLimit is 64 MiB, which mender-artifact's xz needs, or half of the memory that
// the kernel says is available (proc(5), meminfo), whichever is less.
func defaultDictLimit() int64 {
	limit := int64(64 << 20)
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return limit
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "MemAvailable:" {
			if kb, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				limit = min(limit, kb<<10/2)
			}
		}
	}
	return limit
}
