// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"math"

	"github.com/ulikunitz/xz/lzma"
)

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
