// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"math/rand"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ulikunitz/xz"
)

// codeOf makes what looks like a program to each filter: its opcodes, half of them at their alignment, between random
// bytes and those that addresses begin with.
func codeOf(n int) []byte {
	rng := rand.New(rand.NewSource(11))
	b := make([]byte, n)
	rng.Read(b)
	for i := 0; i+16 < n; i += 1 + rng.Intn(12) {
		switch at := i &^ rng.Intn(4); rng.Intn(9) {
		case 0, 1:
			b[i] = 0xe8 | b[i]&1 // x86
			b[i+4] = -(b[i+4] & 1)
		case 2:
			b[at+3] = 0xeb // ARM
		case 3:
			b[at+1], b[at+3] = 0xf0|b[at+1]&7, 0xf8|b[at+3]&7 // Thumb
		case 4:
			b[at], b[at+3] = 0x48|b[at]&3, b[at+3]&^3|1 // PowerPC
		case 5:
			b[at], b[at+1] = 0x40, b[at+1]&0x3f // SPARC
		case 6:
			b[at+3] = 0x94 | b[at+3]&3 // ARM64
			if rng.Intn(2) == 0 {
				b[at+2], b[at+3] = -(b[at+2] & 1), 0x90|b[at+3]&0x60
			}
		case 7: // RISC-V
			if b[at] = 0xef; rng.Intn(2) == 0 {
				b[at], b[at+1] = 0x97, b[at+1]&0xf0|5
				b[at+4], b[at+6] = b[at+4]|3, b[at+6]&^0x0f|2
				b[at+5] = b[at+5]&0x7f | 0x80
			}
		case 8: // IA-64
			bundle := b[i&^15:][:16]
			bundle[0] = bundle[0]&^31 | 0x16
			bundle[5] = bundle[5]&^0x1c | 5<<3
		}
	}
	return b
}

var xzFilterNames = strings.Fields("delta=dist=1 delta=dist=256 delta=dist=4 x86 powerpc ia64 arm armthumb sparc arm64")

// What the xz program filters, alone, one after the other, and in several blocks, each of which begins anew.
func TestXZFilters(t *testing.T) {
	t.Parallel()
	needTool(t, "xz")
	code := codeOf(200_000)
	switch {
	case testing.Short():
		code = code[:20_000]
	case !exhaustive():
		code = code[:70_000] // more than a block of any of these
	}
	var ways []string
	for _, name := range xzFilterNames {
		ways = append(ways, "--"+name)
		if !strings.HasPrefix(name, "delta") {
			ways = append(ways, "--"+name+"=start=65536", "--"+name+"=start=4294934528")
		}
	}
	ways = append(ways, "--x86 --delta=dist=3", "--delta=dist=3 --x86", "--arm64 --x86 --ia64",
		"--ia64 --delta=dist=7 --armthumb",
		"--x86 --block-size=50001", "--powerpc --delta=dist=9 --block-size=1", "--arm --block-size=65537 -T2")
	for _, way := range ways {
		data := code
		if strings.Contains(way, "size=1") && !strings.Contains(way, "size=1.") {
			data = code[:300]
		}
		args := append([]string{"xz", "-zc", "--check=crc32"}, strings.Fields(way)...)
		packed := piped(t, data, append(args, "--lzma2=preset=0")...)
		for _, n := range []int{1 << 20, 1000, 7} {
			if got, err := unxzAll(packed, n); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%s, reads of %d: %d of %d bytes, %v", way, n, len(got), len(data), err)
			}
		}
	}
}

// The filter for RISC-V is younger than most xz programs. The file is what XZ Utils 5.8.1 makes of codeOf(3000) with
// --check=crc32 --riscv=start=4294934530 --lzma2=preset=0.
func TestXZFilterRISCV(t *testing.T) {
	packed, err := os.ReadFile("testdata/unpack/riscv.xz")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1 << 20, 7} {
		if got, err := unxzAll(packed, n); err != nil || !bytes.Equal(got, codeOf(3000)) {
			t.Errorf("reads of %d: %d bytes, %v", n, len(got), err)
		}
	}
}

// xzStart is a stream header without a check, and a block header of those flags and fields.
func xzStart(flags byte, fields ...byte) []byte {
	b := binary.LittleEndian.AppendUint32([]byte("\xfd7zXZ\x00\x00\x00"), crc32.ChecksumIEEE([]byte{0, 0}))
	h := append([]byte{0, flags}, fields...)
	h = append(h, make([]byte, -len(h)&3)...)
	h[0] = byte(len(h) / 4)
	return slices.Concat(b, binary.LittleEndian.AppendUint32(h, crc32.ChecksumIEEE(h)))
}

func TestXZBlockHeaders(t *testing.T) {
	t.Parallel()
	end := []byte{0, 0, 0, 0} // of an empty block
	lzma2 := []byte{0x21, 1, 0}
	for name, c := range map[string]struct {
		b    []byte
		want string
	}{
		"plain": {xzStart(0, lzma2...), "unexpected EOF"},
		"three filters": {xzStart(3, append([]byte{4, 0, 3, 1, 9, 11, 4, 2, 0, 0, 0}, lzma2...)...),
			"unexpected EOF"},
		"sizes":         {xzStart(0xc0, append([]byte{1, 0}, lzma2...)...), "unexpected EOF"},
		"reserved bits": {xzStart(4, lzma2...), "reserved"},
		"filter 12": {xzStart(1, append([]byte{12, 0}, lzma2...)...),
			"filter 0xc with 0 bytes of properties is not known"},
		"filter of four bytes": {xzStart(1, append([]byte{0x80, 0x80, 0x80, 0x01, 0}, lzma2...)...),
			"filter 0x200000 "},
		"delta of no distance": {xzStart(1, append([]byte{3, 0}, lzma2...)...), "filter 0x3 with 0 bytes"},
		"x86 of one byte":      {xzStart(1, append([]byte{4, 1, 0}, lzma2...)...), "filter 0x4 with 1 bytes"},
		"start cut off":        {xzStart(2, 3, 1, 0, 4, 4, 0), "ends within a filter"},
		"start of ARM64":       {xzStart(1, append([]byte{10, 4, 2, 0, 0, 0}, lzma2...)...), "not aligned"},
		"start of RISC-V":      {xzStart(1, append([]byte{11, 4, 1, 0, 0, 0}, lzma2...)...), "not aligned"},
		"delta last":           {xzStart(0, 3, 1, 0), "want LZMA2 as the last filter"},
		"LZMA2 twice":          {xzStart(1, append([]byte{0x21, 1, 0}, lzma2...)...), "filter 0x21"},
		"dictionary of 41":     {xzStart(0, 0x21, 1, 41), "want LZMA2 as the last filter"},
		"number of ten bytes": {xzStart(0x40, append([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
			lzma2...)...), "size out of range"},
		"number with a zero": {xzStart(0x80, append([]byte{0x81, 0}, lzma2...)...), "size out of range"},
		"no data":            {xzStart(0x40, append([]byte{0}, lzma2...)...), "size out of range"},
		"data of 2^63-1": {xzStart(0x40, append([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\x7f"), lzma2...)...),
			"size out of range"},
		"padding": {xzStart(0, 0x21, 1, 0, 1), "padding is not zero"},
		"more data than stated": {slices.Concat(xzStart(0x40, append([]byte{2}, lzma2...)...), end),
			"has 1 bytes for 0; its header says 2"},
	} {
		_, err := unxzAll(c.b, 100)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, c.want)
		}
		if strings.HasPrefix(c.want, "filter") && (exitCode(err) != exitRefused || hintOf(err) == "") {
			t.Errorf("%s: %v, hint %q", name, err, hintOf(err))
		}
	}
}

// FuzzXZFilters holds filters that get their data in pieces against the same that get all of it at once.
func FuzzXZFilters(f *testing.F) {
	for id := range uint16(9) {
		f.Add(id+xzDelta, uint32(0), byte(5), codeOf(1000))
		f.Add(id+xzDelta+0x640, uint32(0xfffffff0), byte(1), codeOf(300))
	}
	f.Fuzz(func(t *testing.T, ids uint16, start uint32, piece byte, b []byte) {
		undone := func(size int) (out []byte) {
			var c xzFilters
			for i := ids; i > 0; i >>= 4 {
				p := binary.LittleEndian.AppendUint32(nil, start&^15)
				if i&15 == xzDelta {
					p = p[1:2]
				}
				if c.add(uint64(i&15), p) != nil {
					return nil
				}
			}
			buf := make([]byte, 1000)
			for in := b; len(c.list) > 0; {
				for c.ready() > 0 {
					out = append(out, buf[:c.read(buf)]...)
				}
				if len(in) == 0 {
					break
				}
				c.fill(func(p []byte) (int, error) {
					n := copy(p, in[:min(size, len(in))])
					in = in[n:]
					return n, nil
				})
			}
			for c.run(true); c.ready() > 0; {
				out = append(out, buf[:c.read(buf)]...)
			}
			return out
		}
		if all, some := undone(1<<20), undone(int(piece)+1); !bytes.Equal(all, some) {
			t.Fatalf("%d bytes at once, %d by %d", len(all), len(some), int(piece)+1)
		}
	})
}

// FuzzXZ looks for what goes wrong in itself. What comes out must not depend on how it is read. The CRCs of the first
// two headers are made right.
func FuzzXZ(f *testing.F) {
	data := inflateSamples()["image"][:3000]
	for _, c := range []xz.WriterConfig{{}, {NoCheckSum: true}, {DictCap: minDict, BlockSize: 1000, CheckSum: xz.CRC32}} {
		b := xzipped(f, data, c)
		f.Add(b)
		f.Add(slices.Concat(b, make([]byte, 8), b))
	}
	if riscv := readFileOrNil("testdata/unpack/riscv.xz"); riscv != nil {
		f.Add(riscv)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if b = slices.Clone(b); len(b) < 16 {
			return
		}
		binary.LittleEndian.PutUint32(b[8:], crc32.ChecksumIEEE(b[6:8]))
		if end := 12 + int(b[12])*4; end+4 <= len(b) {
			binary.LittleEndian.PutUint32(b[end:], crc32.ChecksumIEEE(b[12:end]))
		}
		const most = 1 << 20
		read := func(r io.Reader, n int) (out []byte, err error) {
			in := newInput(r, 0, 4<<10)
			in.section(int64(len(b)))
			u, err := newUnpacker("xz", in, unpackLimits{dict: 1 << 20})
			for buf := make([]byte, n); err == nil && len(out) < most; {
				k := 0
				k, err = u.Read(buf)
				out = append(out, buf[:k]...)
			}
			return out, err
		}
		want, wantErr := read(bytes.NewReader(b), 1<<16)
		got, err := read(iotest.OneByteReader(bytes.NewReader(b)), 1013)
		// Of what is damaged, a larger read gives nothing where a smaller one gives what comes before.
		n := min(len(got), len(want))
		if !bytes.Equal(got[:n], want[:n]) || len(want) < most && (err == io.EOF) != (wantErr == io.EOF) ||
			wantErr == io.EOF && len(got) != len(want) {
			t.Fatalf("byte by byte %d bytes, %v; at once %d, %v", len(got), err, len(want), wantErr)
		}
	})
}
