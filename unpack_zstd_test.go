// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// unzstdAll unpacks what r gives, size bytes of zstd data, in reads of n bytes; most is the most to be unpacked.
func unzstdAll(r io.Reader, size, n, most int, lim unpackLimits) ([]byte, error) {
	in := newInput(r, 0, 4<<10)
	in.section(int64(size))
	u, err := newUnpacker("zstd", in, lim)
	var out []byte
	for buf := make([]byte, n); err == nil && len(out) < most; {
		var k int
		k, err = u.Read(buf)
		out = append(out, buf[:k]...)
	}
	if err == io.EOF && in.offset() != int64(size) {
		return out, fmt.Errorf("the end at %d of %d", in.offset(), size)
	}
	if err == io.EOF {
		err = nil
	}
	return out, err
}

func unzstdBytes(b []byte) ([]byte, error) {
	return unzstdAll(bytes.NewReader(b), len(b), 1<<16, 1<<30, unpackLimits{dict: 64 << 20})
}

// libraryZstd gives what the standard library unpacks from b, which it does for sections of ELF files alone (debug/elf;
// ELF gABI, "Section Compression"): b is made to be one. Unlike ours it looks at checksums.
func libraryZstd(t testing.TB, b []byte) io.Reader {
	t.Helper()
	le := binary.LittleEndian
	header, chdr := make([]byte, 64), make([]byte, 24)
	copy(header, "\x7fELF\x02\x01\x01")
	for at, v := range map[int]uint16{16: 1, 18: 62, 20: 1, 40: 64, 52: 64, 58: 64, 60: 2} { // two sections, at 64
		le.PutUint16(header[at:], v)
	}
	section := make([]byte, 128)
	le.PutUint32(section[64+4:], uint32(elf.SHT_PROGBITS))
	le.PutUint64(section[64+8:], uint64(elf.SHF_COMPRESSED))
	le.PutUint64(section[64+24:], 64+128)
	le.PutUint64(section[64+32:], uint64(len(chdr)+len(b)))
	le.PutUint32(chdr, uint32(elf.COMPRESS_ZSTD))
	f, err := elf.NewFile(bytes.NewReader(slices.Concat(header, section, chdr, b)))
	if err != nil {
		t.Fatal(err)
	}
	return f.Sections[1].Open()
}

func zstdSamples() map[string][]byte {
	samples := inflateSamples()
	rng := rand.New(rand.NewSource(8))
	image := samples["image"]
	for _, n := range []int{5, 255, 256, 257, 1 << 16, 1<<16 + 256, 128<<10 - 1, 128 << 10, 128<<10 + 1, 256<<10 + 1} {
		samples[fmt.Sprint("first ", n)] = image[:n]
	}
	// Matches from nearly as far back as a window of 1 KiB to 1 MiB reaches.
	var far []byte
	for window := 1 << 10; window <= 1<<20; window <<= 1 {
		for _, n := range []int{window - 9, window, window + 1} {
			piece := image[rng.Intn(len(image)-100):][:100]
			far = slices.Concat(far, piece, bytes.Repeat([]byte{byte(n)}, n-len(piece)), piece)
		}
	}
	samples["borders"] = far
	if program, err := os.ReadFile(os.Args[0]); err == nil {
		samples["program"] = program[len(program)/3:][:2<<20]
	}
	return samples
}

// What the zstd program writes.
func TestZstd(t *testing.T) {
	t.Parallel()
	needTool(t, "zstd")
	ways := []string{"--fast=5", "-1", "-3 --no-check", "-5 --zstd=wlog=10", "-7", "-9 --zstd=wlog=14",
		"-13 --zstd=wlog=17", "-19 --zstd=wlog=18",
		"--ultra -22 --long=26", "-3 --no-content-size", "-3 --format=zstd --no-compress-literals",
		"-1 --target-compressed-block-size=1500"}
	if testing.Short() {
		ways = ways[2:5]
	}
	for name, data := range zstdSamples() {
		path := writeTemp(t, "data", data)
		for _, way := range ways {
			if strings.Contains(way, "-19") && name == "program" || strings.Contains(way, "-22") && name != "borders" {
				continue // a second each
			}
			large := len(data) > 1<<20 && !exhaustive()
			if large && !strings.Contains(way, "log=") {
				continue // what they are for are the borders of windows
			}
			args := strings.Fields("zstd -qcT1 " + way)
			packed := map[string][]byte{"pipe": piped(t, data, args...)}
			if !strings.Contains(way, "--no-content-size") && (name == "image" || len(data) < 1000) {
				packed["file"] = piped(t, nil, append(args, path)...)
			}
			for from, b := range packed {
				for _, n := range []int{1 << 20, 1009} {
					if large && n < 1<<20 {
						continue
					}
					if got, err := unzstdAll(bytes.NewReader(b), len(b), n, 1<<30,
						unpackLimits{dict: 64 << 20}); err != nil || !bytes.Equal(got, data) {
						t.Fatalf("%s, %s from a %s, reads of %d: %d of %d bytes, %v", name, way, from, n, len(got),
							len(data), err)
					}
				}
			}
		}
	}
}

func TestZstdLevels(t *testing.T) {
	t.Parallel()
	needTool(t, "zstd")
	for level := 1; level <= 19; level++ {
		for _, name := range []string{"image", "skewed"} {
			data := inflateSamples()[name]
			b := piped(t, data, "zstd", "-qc", fmt.Sprint("-", level))
			if got, err := unzstdBytes(b); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%s, level %d: %d of %d bytes, %v", name, level, len(got), len(data), err)
			}
		}
	}
}

// Frames after one another, of all sizes of windows, and skippable ones before, between and behind.
func TestZstdFrames(t *testing.T) {
	t.Parallel()
	needTool(t, "zstd")
	skip := slices.Concat([]byte("\x5f\x2a\x4d\x18\x88\x13\x00\x00"), make([]byte, 5000))
	none := []byte("\x50\x2a\x4d\x18\x00\x00\x00\x00")
	packed, want := slices.Concat(skip, none), []byte(nil)
	var starts []restartPoint
	samples := inflateSamples()
	for _, name := range []string{"byte", "image", "empty", "skewed", "image", "text", "noise", "far"} {
		starts = append(starts, restartPoint{Kind: "zstd", File: int64(len(packed)), Out: int64(len(want)),
			Fresh: true})
		packed = slices.Concat(packed, piped(t, samples[name], "zstd", "-qc"), skip, none)
		want = append(want, samples[name]...)
	}
	for _, n := range []int{1, 1000, 1 << 20} {
		if got, err := unzstdAll(iotest.HalfReader(bytes.NewReader(packed)), len(packed), n, 1<<30,
			unpackLimits{dict: 64 << 20}); err != nil || !bytes.Equal(got, want) {
			t.Errorf("reads of %d: %d of %d bytes, %v", n, len(got), len(want), err)
		}
	}

	// Each frame can be entered, and is told before anything behind it was given.
	in := newInput(bytes.NewReader(packed), 0, 4<<10)
	in.section(int64(len(packed)))
	u, err := newUnpacker("zstd", in, unpackLimits{dict: 64 << 20})
	var seen []restartPoint
	given := int64(0)
	for buf := make([]byte, 10_000); err == nil; {
		var n int
		n, err = u.Read(buf)
		if p, ok := u.latestRestart(); ok && !slices.Contains(seen, p) {
			if seen = append(seen, p); p.Out > given {
				t.Errorf("%+v is told at %d", p, given)
			}
		}
		given += int64(n)
	}
	for _, p := range starts {
		// An empty frame is passed in the same Read as the start of the next one.
		if told := slices.Contains(seen, p); !told && p != starts[2] || !told && len(seen) < len(starts)-1 {
			t.Errorf("%+v: not told", p)
		}
		in := newInput(bytes.NewReader(packed[p.File:]), p.File, 4<<10)
		in.section(int64(len(packed)) - p.File)
		u, err := resumeUnpacker(in, p, nil, unpackLimits{dict: 64 << 20})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(u); err != nil || !bytes.Equal(got, want[p.Out:]) {
			t.Errorf("entered at %+v: %d of %d bytes, %v", p, len(got), len(want)-int(p.Out), err)
		}
		if last, _ := u.latestRestart(); last != starts[len(starts)-1] {
			t.Errorf("entered at %+v: the last point is %+v, want %+v", p, last, starts[len(starts)-1])
		}
	}
	// Where no frame begins, a place that was told is wrong.
	in = newInput(bytes.NewReader(nil), 100, 4<<10)
	in.section(0)
	u, err = resumeUnpacker(in, restartPoint{Kind: "zstd", File: 100, Fresh: true}, nil, unpackLimits{dict: 64 << 20})
	if err == nil {
		_, err = u.Read(make([]byte, 10))
	}
	if err != io.ErrUnexpectedEOF {
		t.Errorf("entered at the end: %v", err)
	}
}

// The files that zstd tests itself with: frames that are good, frames that are bad where there are such, and data that
// once were packed wrongly.
func TestZstdGoldenFiles(t *testing.T) {
	needTool(t, "zstd")
	for _, path := range corpus(t, "zstd/golden-*/*") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		switch filepath.Base(filepath.Dir(path)) {
		case "golden-decompression":
			want, wantErr := io.ReadAll(libraryZstd(t, b)) // an error for a count of no sequences in two bytes
			if got, err := unzstdBytes(b); err != nil || wantErr == nil && !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes, %v; the library: %d, %v", path, len(got), err, len(want), wantErr)
			}
		case "golden-decompression-errors":
			if _, err := unzstdBytes(b); err == nil {
				t.Errorf("%s: accepted", path)
			}
		case "golden-compression":
			for _, level := range []string{"-1", "-5", "-19"} {
				if got, err := unzstdBytes(piped(t, b, "zstd", "-qc", level)); err != nil || !bytes.Equal(got, b) {
					t.Errorf("%s, %s: %d of %d bytes, %v", path, level, len(got), len(b), err)
				}
			}
		}
	}
}

func TestPzstd(t *testing.T) {
	needTool(t, "pzstd")
	data := bytes.Repeat(inflateSamples()["image"], 5)
	b := piped(t, nil, "pzstd", "-qc", "-1", "-p4", writeTemp(t, "data", data))
	if got, err := unzstdBytes(b); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
	}
}

// A window is refused before there is memory for it, unless less is of use.
func TestZstdWindow(t *testing.T) {
	header := func(window byte) []byte { return []byte{0x28, 0xb5, 0x2f, 0xfd, 0, window, 1, 0, 0} }
	for _, c := range []struct {
		b    []byte
		lim  unpackLimits
		want string
	}{
		{header(17 << 3), unpackLimits{dict: 128 << 20}, ""},
		{header(17 << 3), unpackLimits{dict: 64 << 20}, "134217728 bytes wanted, limit here is 67108864"},
		{header(16<<3 | 1), unpackLimits{dict: 64 << 20}, "75497472 bytes wanted"},
		{header(31<<3 | 7), unpackLimits{dict: 64 << 20}, "4123168604160 bytes wanted"},
		{header(31<<3 | 7), unpackLimits{dict: 64 << 20, out: 1 << 20}, ""},
		{[]byte("\x28\xb5\x2f\xfd\xe0\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00\x00"), unpackLimits{dict: 64 << 20},
			"18446744073709551615 bytes wanted"},
		{[]byte("\x28\xb5\x2f\xfd\x80\xff\x00\x00\x00\x00\x01\x00\x00"), unpackLimits{dict: 64 << 20}, ""},
		// a content of no size
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got, err := unzstdAll(bytes.NewReader(c.b), len(c.b), 100, 100, c.lim)
		runtime.ReadMemStats(&after)
		if len(got) > 0 || c.want == "" && err != nil {
			t.Errorf("% x: %d bytes, %v", c.b, len(got), err)
		} else if c.want != "" && (exitCode(err) != exitRefused || !strings.Contains(err.Error(), c.want) ||
			hintOf(err) == "" || after.TotalAlloc-before.TotalAlloc > 1<<20) {
			t.Errorf("% x: %v, hint %q, want %q; %d bytes allocated", c.b, err, hintOf(err), c.want,
				after.TotalAlloc-before.TotalAlloc)
		}
	}
	needTool(t, "zstd")
	b := piped(t, []byte("text"), "zstd", "-qc", "--long=27")
	if _, err := unzstdBytes(b); exitCode(err) != exitRefused || !strings.Contains(err.Error(), "134217728") ||
		!strings.Contains(err.Error(), "67108864") {
		t.Errorf("--long=27: %v", err)
	}
}

// Windows that grow from frame to frame: the limit is for all of them together, and few of them get memory of their
// own.
func TestZstdGrowingWindow(t *testing.T) {
	z := &unzstd{lim: unpackLimits{dict: 32 << 20}}
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	before, made := m.HeapAlloc, 0
	for n := uint64(28 << 20); n <= 32<<20; n += 1 << 14 {
		had := len(z.buf)
		must(t, z.needWindow(n))
		if len(z.buf) < int(n)+zstdBlock+2*zstdSlack {
			t.Fatalf("a buffer of %d bytes for a window of %d", len(z.buf), n)
		}
		if len(z.buf) != had {
			made++
			if runtime.ReadMemStats(&m); m.HeapAlloc-before > 34<<20 {
				t.Errorf("%d bytes in use with a window of %d", m.HeapAlloc-before, n)
			}
		}
	}
	if made > 4 || len(z.buf) > 33<<20 {
		t.Errorf("%d buffers, the last of %d bytes", made, len(z.buf))
	}
}

// backBits writes numbers, each followed by its width in bits, so that a stream that is read backwards gives them
// in this order.
func backBits(list ...uint) []byte {
	b := []byte{0}
	n := uint(0)
	put := func(bit uint) {
		if n == 8 {
			b, n = append(b, 0), 0
		}
		b[len(b)-1] |= byte(bit << n)
		n++
	}
	for i := len(list) - 2; i >= 0; i -= 2 {
		for k := range list[i+1] {
			put(list[i] >> k & 1)
		}
	}
	put(1)
	return b
}

// zstdFrame makes a frame with a window of 1 KiB and no size.
func zstdFrame(blocks ...[]byte) []byte {
	return slices.Concat([]byte("\x28\xb5\x2f\xfd\x00\x00"), slices.Concat(blocks...))
}

func zstdBlockOf(kind, size int, last bool, body ...[]byte) []byte {
	h := size<<3 | kind<<1
	if last {
		h |= 1
	}
	return slices.Concat([]byte{byte(h), byte(h >> 8), byte(h >> 16)}, slices.Concat(body...))
}

// zstdPacked makes the frame of one compressed block.
func zstdPacked(parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	return zstdFrame(zstdBlockOf(2, len(body), true, body))
}

// Frames that the zstd program never writes. What is taken here the program must take, too; where it takes more, why is
// said beside it.
func TestZstdByHand(t *testing.T) {
	t.Parallel()
	abc := []byte("\x18abc")              // three literals as they are
	rle := func(ll, of, ml byte) []byte { // one sequence; codes of one symbol each
		return []byte{1, 0x54, ll, of, ml}
	}
	x := func(s string) []byte {
		b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	head, end, bad := x("28b52ffd"), x("010000"), "damaged"
	// A tree of four symbols of two bits: three weights of 1 and the one that follows. Codes 00 to 11 are a to d
	// when these have the numbers 0 to 3.
	tree := x("82 11 10")
	huff := func(kind, form, size int, body ...[]byte) []byte {
		b := slices.Concat(body...)
		h := uint64(kind|form<<2) | uint64(size)<<4 | uint64(len(b))<<14
		return slices.Concat(binary.LittleEndian.AppendUint64(nil, h)[:3], b)
	}
	one := backBits(2, 2, 0, 2) // 2 0
	for name, c := range map[string]struct {
		b    []byte
		want string // what it unpacks to
		err  string
	}{
		"raw": {zstdFrame(zstdBlockOf(0, 3, false, []byte("abc")), zstdBlockOf(0, 2, true,
			[]byte("de"))), "abcde", ""},
		"run": {zstdFrame(zstdBlockOf(1, 5, false, []byte("a")), zstdBlockOf(1, 0, false,
			[]byte("a")), zstdBlockOf(1, 1, true, []byte("b"))), "aaaaab", ""},
		"empty blocks": {zstdFrame(bytes.Repeat(zstdBlockOf(0, 0, false), 10_000), end), "", ""},
		"empty frames": {bytes.Repeat(zstdFrame(end), 10_000), "", ""},
		"too long raw": {zstdFrame(zstdBlockOf(0, 1025, true, make([]byte, 1025))), "",
			"block of 1025 bytes, want at most 1024"},
		"too long run":   {zstdFrame(zstdBlockOf(1, 1025, true, []byte("a"))), "", "block of 1025 bytes"},
		"reserved block": {zstdFrame(zstdBlockOf(3, 0, true)), "", bad},
		"reserved bit":   {slices.Concat(head, x("0800"), end), "", "reserved bit"},
		"unused bit":     {slices.Concat(head, x("1000"), end), "", ""},
		"dictionary 0":   {slices.Concat(head, x("030000000000"), end), "", ""},
		"dictionary":     {slices.Concat(head, x("02000201"), end), "", "dictionary 258"},
		"size 1":         {slices.Concat(head, x("2003"), zstdBlockOf(0, 3, true, []byte("abc"))), "abc", ""},
		"size 2": {slices.Concat(head, x("40000200"), end), "",
			"unpacks to 0 bytes, its header says 258"},
		"size 4": {slices.Concat(head, x("a003000000"), zstdBlockOf(1, 3, true, []byte("z"))), "zzz",
			""},
		"size 8": {slices.Concat(head, x("e00300000000000000"), zstdBlockOf(1, 3, true, []byte("z"))),
			"zzz", ""},
		"size too small": {slices.Concat(head, x("800002000000"), zstdBlockOf(0, 3, true, []byte("abc"))), "",
			"at least 3 bytes, its header says 2"},
		"size too small, coded": {slices.Concat(head, x("800002000000"), zstdPacked(abc, x("00"))[6:]), "", bad},
		"size too large": {slices.Concat(head, x("800004000000"), zstdBlockOf(0, 3, true, []byte("abc"))),
			"abc", "unpacks to 3 bytes, its header says 4"},
		"checksum":        {slices.Concat(head, x("0400"), end, x("99e9d851")), "", ""},
		"wrong checksum":  {slices.Concat(head, x("0400"), end, x("98e9d851")), "", ""}, // nobody looks
		"half a checksum": {slices.Concat(head, x("0400"), end, x("99e9")), "", "unexpected EOF"},
		"trailer": {slices.Concat(zstdFrame(end), []byte("abcdef")), "",
			"got 61 62 63 64, want a zstd frame or the end"},
		"skippable only": {x("502a4d18 02000000 ffff"), "", ""},

		"literals":               {zstdPacked(abc, x("00")), "abc", ""},
		"literals, two bytes":    {zstdPacked(x("3400 616263"), x("00")), "abc", ""},
		"literals, three bytes":  {zstdPacked(x("3c0000 616263"), x("00")), "abc", ""},
		"run of literals":        {zstdPacked(x("19 61"), x("00")), "aaa", ""},
		"no sequences and more":  {zstdPacked(abc, x("0000")), "", bad},
		"no sequences, nor said": {zstdPacked(abc), "", bad},
		"literals beyond":        {zstdPacked(x("20 616263")), "", bad},
		"literals too many":      {zstdPacked(x("5d4000 61"), x("00")), "", bad},
		"nothing":                {zstdPacked(nil), "", bad},
		"treeless, no tree":      {zstdPacked(huff(3, 0, 2, one), x("00")), "", bad},
		"huffman":                {zstdPacked(huff(2, 0, 2, tree, one), x("00")), "\x02\x00", ""},
		"huffman, too short":     {zstdPacked(huff(2, 0, 3, tree, one), x("00")), "", bad},
		"huffman, too long":      {zstdPacked(huff(2, 0, 1, tree, one), x("00")), "", bad},
		"huffman, no last bit":   {zstdPacked(huff(2, 0, 2, tree, x("1200")), x("00")), "", bad},
		"huffman, no stream":     {zstdPacked(huff(2, 0, 0, tree), x("00")), "", bad},
		"tree beyond":            {zstdPacked(huff(2, 0, 2, x("ff11")), x("00")), "", bad},
		"tree of weight 12":      {zstdPacked(huff(2, 0, 2, x("81 c1"), one), x("00")), "", bad},
		"tree of no weight":      {zstdPacked(huff(2, 0, 2, x("81 00"), one), x("00")), "", bad},
		"tree not complete":      {zstdPacked(huff(2, 0, 2, x("81 31"), one), x("00")), "", bad},
		"tree without longest":   {zstdPacked(huff(2, 0, 2, x("81 22"), backBits(0, 2, 1, 2)), x("00")), "", bad},
		"treeless": {zstdFrame(zstdBlockOf(2, len(huff(2, 0, 2, tree, one))+1, false, huff(2, 0, 2, tree, one),
			x("00")),
			zstdBlockOf(2, len(huff(3, 0, 2, one))+1, true, huff(3, 0, 2, one), x("00"))), "\x02\x00\x02\x00", ""},
		"treeless, other frame": {slices.Concat(zstdPacked(huff(2, 0, 2, tree, one), x("00")),
			zstdPacked(huff(3, 0, 2, one), x("00"))), "\x02\x00", bad},
		"four streams": {zstdPacked(huff(2, 1, 6, tree, x("010001000100"), one[:1], one[:1], one[:1],
			x("01")), x("00")), "\x02\x00\x02\x00\x02\x00", ""},
		"four streams of five": {zstdPacked(huff(2, 1, 5, tree, x("010001000100"), one[:1], one[:1], x("05"),
			x("01")), x("00")), "", bad},
		"four streams, beyond": {zstdPacked(huff(2, 1, 6, tree, x("010001000f00"), one, one, one, x("01")), x("00")),
			"", bad},

		"sequence":            {zstdPacked(abc, rle(3, 2, 0), backBits(2, 2)), "abcabc", ""},
		"offset beyond":       {zstdPacked(abc, rle(3, 2, 0), backBits(3, 2)), "", bad},
		"last offset":         {zstdPacked(abc, rle(3, 0, 0), backBits()), "abcccc", ""},
		"last offset but one": {zstdPacked(abc, rle(3, 1, 0), backBits(0, 1)), "", bad}, // 4
		"offset of 0":         {zstdPacked(abc, rle(0, 1, 0), backBits(1, 1)), "", bad},
		"literals short":      {zstdPacked(abc, rle(4, 0, 0), backBits()), "", bad},
		"match of 259":        {zstdPacked(abc, rle(3, 0, 44), backBits(0, 8)), "abc" + strings.Repeat("c", 259), ""},
		"match of 1021": {zstdPacked(abc, rle(3, 0, 45), backBits(506, 9)), "abc" + strings.Repeat("c", 1021),
			""},
		"match too long": {zstdPacked(abc, rle(3, 0, 45), backBits(507, 9)), "", bad},
		// a byte more than a block may have
		"bits left":        {zstdPacked(abc, rle(3, 2, 0), backBits(2, 2, 0, 1)), "", bad},
		"bits missing":     {zstdPacked(abc, rle(3, 2, 0), backBits(1, 1)), "", bad},
		"bits far missing": {zstdPacked(x("850c61"), x("80c8 54 01 02 00"), backBits(0, 8)), "", bad},
		// 400 wanted
		"no bits":           {zstdPacked(abc, rle(3, 0, 0)), "", bad},
		"no symbols":        {zstdPacked(abc, x("01 54 03")), "", bad},
		"literal length 36": {zstdPacked(abc, rle(36, 0, 0), backBits()), "", bad},
		"offset code 32":    {zstdPacked(abc, rle(3, 32, 0), backBits(0, 32)), "", bad},
		"offset code 31":    {zstdPacked(abc, rle(3, 31, 0), backBits(1<<31-1, 31)), "", bad},
		"match length 53":   {zstdPacked(abc, rle(3, 0, 53), backBits()), "", bad},
		"reserved mode":     {zstdPacked(abc, x("01 55 03 00 00"), backBits()), "", bad},
		// zstd 1.5.4 does not look
		"repeated, none before": {zstdPacked(abc, x("01 d4 00 00"), backBits()), "", bad},
		"repeated, other frame": {slices.Concat(zstdPacked(abc, rle(3, 2, 0), backBits(2, 2)), zstdPacked(abc,
			x("01 fc"), backBits(2, 2))), "abcabc", bad},
		"repeated": {zstdFrame(zstdBlockOf(2, 10, false, abc, rle(3, 2, 0), backBits(2, 2)), zstdBlockOf(2, 7, true,
			abc, x("01 fc"), backBits(2, 2))),
			"abcabcabcabc", ""},
		"accuracy of 10": {zstdPacked(abc, x("01 94 05ffffff"), backBits()), "", bad},
		"counts beyond":  {zstdPacked(abc, x("01 94 00")), "", bad},
		"symbols beyond": {zstdPacked(abc, x("01 94 10 fcffffffffffff"), backBits()), "", bad},
		"256 sequences":  {zstdPacked(x("00"), x("8100 54 00 00 00"), backBits()), "", bad},
	} {
		got, err := unzstdBytes(c.b)
		if string(got) != c.want || (err == nil) != (c.err == "") || err != nil &&
			!strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v; want %q and an error with %q", name, got, err, c.want, c.err)
		}
		if _, err := exec.LookPath("zstd"); err == nil && c.err == "" && name != "wrong checksum" {
			cmd := exec.Command("zstd", "-dcq")
			cmd.Stdin = bytes.NewReader(c.b)
			if out, err := cmd.Output(); err != nil || string(out) != c.want {
				t.Errorf("%s: the zstd program: %q, %v", name, out, err)
			}
		}
	}
}

// zstdStates gives states of the default codes for codes of a literal length, an offset and a match length, each with
// its bits.
func zstdStates(codes ...int) (list []uint) {
	for i, code := range codes {
		var table fseTable
		k := &fseKinds[i]
		table.make(k.log, k.counts, k.codes)
		at := slices.IndexFunc(table.entry[:], func(e uint64) bool { return e>>32 == k.codes[code]>>32 })
		list = append(list, uint(at), k.log)
	}
	return list
}

// A sequence of 47 extra bits and 17 of the states that follow is more than what is loaded at its beginning.
func TestZstdLongSequence(t *testing.T) {
	first, second := zstdStates(35, 16, 51), zstdStates(0, 2, 0)
	second = slices.Concat(second[:2], second[4:], second[2:4]) // offsets come last here
	for v := range uint(4) {
		body := slices.Concat([]byte("\x0d\x00\x10x\x02\x00"),
			backBits(slices.Concat(first, []uint{v, 16, 5, 15, 0, 16}, second, []uint{2, 2})...))
		b := slices.Concat([]byte("\x28\xb5\x2f\xfd\x00\x38"), zstdBlockOf(2, len(body), true, body))
		if got, err := unzstdBytes(b); err != nil || len(got) != 65536+32776+3 {
			t.Errorf("%d: %d bytes, %v", v, len(got), err)
		}
	}
}

// A match in a later block may go back to the first byte of its frame and no further, and no further than the window.
func TestZstdOffsets(t *testing.T) {
	block := func(offset, run int) []byte { // a match of three bytes behind run literals
		code := uint(bits.Len(uint(offset+3))) - 1
		body := slices.Concat([]byte{byte(run << 3)}, make([]byte, run), []byte{1, 0x54, byte(run), byte(code), 0},
			backBits(uint(offset+3)-1<<code, code))
		return zstdBlockOf(2, len(body), true, body)
	}
	one := zstdBlockOf(1, 1000, false, []byte("x"))
	before := zstdFrame(bytes.Repeat(zstdBlockOf(1, 1000, false, []byte("y")), 300), zstdBlockOf(1, 0, true,
		[]byte("y")))
	for _, c := range []struct {
		blocks, offset, run int
		good                bool
	}{{1, 1000, 0, true}, {1, 1001, 0, false}, {1, 1001, 1, true}, {1, 1002, 1, false},
		{2, 1024, 0, true}, {2, 1025, 0, false}, {2, 1025, 1, false}, {300, 1024, 5, true}, {300, 1025, 5, false}} {
		b := slices.Concat(before, zstdFrame(slices.Concat(bytes.Repeat(one, c.blocks), block(c.offset, c.run))))
		if got, err := unzstdBytes(b); c.good != (err == nil) || c.good && len(got) != 300_000+c.blocks*1000+c.run+3 {
			t.Errorf("%+v: %d bytes, %v", c, len(got), err)
		}
	}
}

// zstdSmall is a stream of two frames, with checksums unless args say otherwise, that has every kind of part.
func zstdSmall(t testing.TB, args ...string) (data, packed []byte) {
	samples := inflateSamples()
	data = samples["skewed"][:1500]
	for i := range 100 {
		data = slices.Concat(data, samples["text"][:i%13], samples["noise"][i:i+i%3], samples["skewed"][i*7:i*8])
	}
	args = append([]string{"zstd", "-qc"}, args...)
	return slices.Concat(data, data[:700]),
		slices.Concat(piped(t, nil, append(args, "-19", writeTemp(t, "data", data))...),
			piped(t, data[:700], append(args, "--zstd=wlog=10")...))
}

func TestZstdCutOff(t *testing.T) {
	t.Parallel()
	data, b := zstdSmall(t)
	ends := 0
	for cut := range b {
		got, err := unzstdBytes(b[:cut])
		if err == nil {
			ends++ // between the two frames
		}
		if !bytes.HasPrefix(data, got) || err == nil && len(got) != len(data)-700 || err != nil && cut >= 6 &&
			err != io.ErrUnexpectedEOF {
			t.Fatalf("cut off at %d of %d: %d bytes, %v", cut, len(b), len(got), err)
		}
		// The file ends there, and its section does not.
		if _, err := unzstdAll(bytes.NewReader(b[:cut]), len(b), 1000, 1<<20,
			unpackLimits{dict: 1 << 20}); err != io.ErrUnexpectedEOF {
			t.Fatalf("file cut off at %d of %d: %v", cut, len(b), err)
		}
	}
	if ends != 1 {
		t.Errorf("%d ends taken, want 1", ends)
	}
}

// What is damaged is refused, or it is another stream: one that the standard library takes for the same.
func TestZstdDamaged(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewSource(9))
	_, small := zstdSmall(t, "--no-check")
	accepted := 0
	check := func(bad []byte) {
		got, err := unzstdBytes(bad)
		if err != nil {
			return
		}
		accepted++
		if want, err := io.ReadAll(libraryZstd(t, bad)); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes; the library: %d, %v", len(got), len(want), err)
		}
	}
	for i := range small {
		for _, bits := range []byte{1 << (i % 8), 0x10, 0xff} {
			bad := slices.Clone(small)
			bad[i] ^= bits
			check(bad)
		}
	}
	for _, data := range inflateSamples() {
		b := piped(t, data, "zstd", "-qc", "--no-check", "--zstd=wlog=16")
		for range 100 {
			bad := slices.Clone(b)
			for range 1 + rng.Intn(3) {
				bad[rng.Intn(min(len(b), 1+rng.Intn(len(b))))] ^= 1 << rng.Intn(8)
			}
			check(bad)
		}
	}
	if accepted < 100 {
		t.Errorf("%d streams accepted: too few to show anything", accepted)
	}
}

// After an error nothing more is given, and an error of the reader is passed on.
func TestZstdError(t *testing.T) {
	b := zstdFrame(zstdBlockOf(0, 3, false, []byte("abc")), zstdBlockOf(2, 5, true, []byte("\x18abc\x01")))
	in := newInput(bytes.NewReader(b), 0, 4<<10)
	in.section(int64(len(b)))
	u, err := newUnpacker("zstd", in, unpackLimits{dict: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := u.Read(buf); n != 3 || err != nil {
		t.Errorf("before the error: %d bytes, %v", n, err)
	}
	for range 2 {
		if n, err := u.Read(buf); n != 0 || err == nil || err.Error() != "offset 12: zstd data is damaged" {
			t.Errorf("got %d bytes, %v", n, err)
		}
	}
	broken := errors.New("broken pipe")
	for cut := 6; cut < len(b); cut++ {
		if _, err := unzstdAll(io.MultiReader(bytes.NewReader(b[:cut]), iotest.ErrReader(broken)), len(b), 100, 100,
			unpackLimits{dict: 1 << 20}); err != broken {
			t.Errorf("read error at %d: %v", cut, err)
		}
	}
}

// However many frames and blocks there are, memory is taken once.
func TestZstdAllocs(t *testing.T) {
	needTool(t, "zstd")
	frame := slices.Concat([]byte("\x5f\x2a\x4d\x18\x08\x00\x00\x00saysmore"), piped(t, testImage(4, 1<<20)[:30000],
		"zstd", "-qc", "--zstd=wlog=14"))
	allocs := func(frames int) float64 {
		b := bytes.Repeat(frame, frames)
		buf := make([]byte, 1<<16)
		return testing.AllocsPerRun(5, func() {
			in := newInput(bytes.NewReader(b), 0, 4<<10)
			in.section(int64(len(b)))
			u, err := newUnpacker("zstd", in, unpackLimits{dict: 1 << 20})
			for err == nil {
				_, err = u.Read(buf)
			}
			if err != io.EOF {
				t.Fatal(err)
			}
		})
	}
	if few, many := allocs(2), allocs(100); many > few {
		t.Errorf("%v allocations for 100 frames, %v for 2", many, few)
	}
}

// FuzzZstd holds the decoder against the standard library's, which may refuse a checksum, or a damage that this one
// does not see. What comes out must not depend on how it is read.
func FuzzZstd(f *testing.F) {
	if _, err := exec.LookPath("zstd"); err == nil {
		for _, data := range inflateSamples() {
			data = data[:min(len(data), 3000)]
			for _, level := range []string{"-1", "-19"} {
				b := piped(f, data, "zstd", "-qc", level)
				if got, err := unzstdBytes(b); err != nil || !bytes.Equal(got, data) {
					f.Fatalf("%d of %d bytes, %v", len(got), len(data), err)
				}
				f.Add(b)
			}
		}
	}
	f.Add(zstdFrame(zstdBlockOf(2, 11, true, []byte("\x18abc\x01\x54\x03\x02\x00\x06"))))
	f.Fuzz(func(t *testing.T, b []byte) {
		const most = 1 << 20 // a few bytes may stand for much
		lim := unpackLimits{dict: 1 << 20}
		want, wantErr := unzstdAll(bytes.NewReader(b), len(b), 1<<17, most, lim)
		got, err := unzstdAll(iotest.OneByteReader(bytes.NewReader(b)), len(b), 1013, len(want)+1, lim)
		if len(want) >= most {
			got, err = got[:min(len(got), len(want))], wantErr
		}
		if !bytes.Equal(got, want) || fmt.Sprint(err) != fmt.Sprint(wantErr) {
			t.Fatalf("byte by byte %d bytes, %v; at once %d, %v", len(got), err, len(want), wantErr)
		}
		other, err := io.ReadAll(io.LimitReader(libraryZstd(t, b), most))
		if n := min(len(other), len(want)); err == nil && (!bytes.Equal(other[:n], want[:n]) || wantErr == nil &&
			len(other) != min(len(want), most)) {
			t.Fatalf("%d bytes, %v; the library: %d", len(want), wantErr, len(other))
		}
	})
}

func BenchmarkZstd(b *testing.B) {
	needTool(b, "zstd")
	data := testImage(4, 4<<20)
	for _, level := range []string{"-3", "-19"} {
		packed := piped(b, data, "zstd", "-qc", "--no-check", level)
		b.Run("level"+level, func(b *testing.B) {
			benchAgainst(b, "zstd", packed, len(data), func(io.Reader) (io.Reader,
				error) {
				return libraryZstd(b, packed), nil
			})
		})
	}
}
