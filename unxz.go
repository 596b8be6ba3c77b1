// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"runtime/debug"
)

// unxz unpacks one xz stream (The .xz File Format 1.2.1). The dictionary's size is known before
// it is allocated, one dictionary serves all blocks, and a block can be entered by itself.
type unxz struct {
	in      *input
	lim     unpackLimits
	lz      *lzmaDecoder
	check   byte
	crc     uint32 // of the block
	started bool   // the stream header was read
	resumed bool   // the stream was entered at a block
	inBlock bool
	first   bool  // the next chunk is the block's first
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
	for z.err == nil && (z.lz == nil || z.lz.left == 0) {
		z.err = z.advance()
	}
	if z.err != nil {
		return 0, z.err
	}
	n, err := z.lz.read(z.in, p)
	z.block += int64(n)
	z.out += int64(n)
	if z.check == xzCRC32 {
		z.crc = crc32.Update(z.crc, crc32.IEEETable, p[:n])
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
	err := z.lz.chunk(z.in, z.first)
	if z.first = false; err == io.EOF {
		return z.blockEnd()
	}
	if err == errLZMA {
		err = fmt.Errorf("offset %d: %w", z.in.offset(), err)
	}
	return err
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

// xzCRC32 is a check ID, and xzCheckSize has the sizes of those that xz writes, in bytes: none,
// CRC-32, CRC-64, SHA-256 (section 2.1.1.2).
const xzCRC32 = 1

var xzCheckSize = map[byte]int{0: 0, xzCRC32: 4, 4: 8, 10: 32}

// setCheck takes a check ID. CRC-32 is verified, which costs nothing. CRC-64 would be a tenth of
// all the work for nothing: each file that an artifact holds must have the SHA-256 of
// the manifest, and what is around the files is checked to the byte (tarStream).
func (z *unxz) setCheck(id byte) error {
	if _, ok := xzCheckSize[id]; !ok {
		return fmt.Errorf("xz integrity check %d is not known; want none, CRC32, CRC64 or SHA-256", id)
	}
	z.check = id
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
	z.crc = 0
	return z.needDict(xzDictSize(filter[2]))
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

// needDict sees that lz has a dictionary of n bytes, or of as many as can be of use.
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
			"write the artifact again with --compression gzip, or with a smaller dictionary (mendlet pack --compression xz)")
	}
	if z.lz != nil && use > int64(len(z.lz.dict)) {
		z.lz = nil
		debug.FreeOSMemory() // the limit is for all of them together
	}
	if z.lz == nil {
		z.lz = newLZMA(int(use))
	}
	return nil
}

// blockEnd reads padding and check behind the zero byte that ends the chunks, and enters the block's sizes for the
// index (sections 3.3, 3.4, 4.3).
func (z *unxz) blockEnd() error {
	z.inBlock = false
	size := z.in.offset() - z.packed
	if z.wantIn >= 0 && size != z.wantIn || z.wantOut >= 0 && z.block != z.wantOut {
		return fmt.Errorf("offset %d: xz block has %d bytes for %d; its header says %d for %d",
			z.in.offset(), size, z.block, z.wantIn, z.wantOut)
	}
	var buf [3 + sha256.Size]byte
	pad := int(-size & 3)
	end := buf[:pad+xzCheckSize[z.check]]
	if _, err := io.ReadFull(z.in, end); err != nil {
		return noEOF(err)
	}
	if !allZero(end[:pad]) {
		return fmt.Errorf("offset %d: padding of the xz block is not zero", z.in.offset())
	}
	if z.check == xzCRC32 && binary.LittleEndian.Uint32(end[pad:]) != z.crc {
		return fmt.Errorf("offset %d: xz block check is %x, the data has %08x", z.in.offset(), end[pad:], z.crc)
	}
	z.record(z.index, uint64(z.header+size)+uint64(xzCheckSize[z.check]), uint64(z.block))
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
