// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"hash/crc32"
	"hash/crc64"
	"io"
)

// xzWriter puts LZMA2 data into an xz file: one stream of blocks, without sizes in their headers, and with CRC64. The
// numbers in comments are sections of the xz file format, 1.2.1.
type xzWriter struct {
	w     io.Writer
	block int64 // bytes of data in each, but for the last

	lzma   io.WriteCloser // of the block under way; nil: none is
	stored *countWriter   // what it is compressed to
	size   int64          // bytes of data in it so far
	crc    uint64         // of these
	index  []byte         // records of the blocks before
	blocks uint64
}

const (
	packDict = 4 << 20    // bytes; see packBlock
	xzDict   = 20         // the same, as 2 << (20/2 + 11) bytes (5.3.1)
	xzFlags  = "\x00\x04" // CRC64 (2.1.1.2)
)

func newXZWriter(w io.Writer, block int64) (*xzWriter, error) {
	_, err := w.Write(withCRC("\xfd7zXZ\x00", []byte(xzFlags)))
	return &xzWriter{w: w, block: block}, err
}

// withCRC gives front, b, and the CRC32 of b.
func withCRC(front string, b []byte) []byte {
	return binary.LittleEndian.AppendUint32(append([]byte(front), b...), crc32.ChecksumIEEE(b))
}

func (z *xzWriter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		if z.lzma == nil {
			if err := z.begin(); err != nil {
				return done, err
			}
		}
		part := p[done:min(int64(len(p)), int64(done)+z.block-z.size)]
		n, err := z.lzma.Write(part)
		done += n
		z.size += int64(n)
		z.crc = crc64.Update(z.crc, crc64.MakeTable(crc64.ECMA), part[:n])
		if err == nil && z.size == z.block {
			err = z.end()
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// begin writes the header of a block: its size, of one filter, LZMA2 with one byte of properties (3.1).
func (z *xzWriter) begin() error {
	_, err := z.w.Write(withCRC("", []byte{2, 0, 0x21, 1, xzDict, 0, 0, 0}))
	if err != nil {
		return err
	}
	z.stored, z.size, z.crc = &countWriter{w: z.w}, 0, 0
	z.lzma, err = newLZMA(z.stored, packDict)
	return err
}

// end pads a block, writes its check, and keeps what the index will say of it (3.3, 3.4, 4.3).
func (z *xzWriter) end() error {
	if err := z.lzma.Close(); err != nil {
		return err
	}
	z.lzma = nil
	tail := make([]byte, -z.stored.n&3)
	_, err := z.w.Write(binary.LittleEndian.AppendUint64(tail, z.crc))
	z.index = binary.AppendUvarint(z.index, uint64(12+z.stored.n+8))
	z.index = binary.AppendUvarint(z.index, uint64(z.size))
	z.blocks++
	return err
}

// Close ends the stream, with at least one block, and leaves w open.
func (z *xzWriter) Close() error {
	if z.lzma == nil && z.blocks == 0 {
		if err := z.begin(); err != nil {
			return err
		}
	}
	if z.lzma != nil {
		if err := z.end(); err != nil {
			return err
		}
	}
	index := append(binary.AppendUvarint([]byte{0}, z.blocks), z.index...) // 4
	index = withCRC("", append(index, make([]byte, -len(index)&3)...))
	foot := binary.LittleEndian.AppendUint32(nil, uint32(len(index)/4-1)) // 2.1.2
	foot = append(foot, xzFlags...)
	index = binary.LittleEndian.AppendUint32(index, crc32.ChecksumIEEE(foot))
	_, err := z.w.Write(append(append(index, foot...), "YZ"...))
	return err
}

// countWriter counts the bytes of the output.
type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
