// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"io"
	"math/rand"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// inflateAll unpacks one stream; rest is what it left of the input.
func inflateAll(r io.Reader) (out []byte, rest int64, err error) {
	in := newInput(r, 0, 4<<10)
	f, err := newInflater(in, 0, nil, 0)
	for err == nil {
		err = f.more()
		out = append(out, f.pending()...)
		f.begin = f.end
	}
	if err == io.EOF {
		err = nil
	}
	at := in.offset()
	n, _ := io.Copy(io.Discard, in)
	if int64(len(out)) != f.total || at < 0 {
		panic("wrong count")
	}
	return out, n, err
}

// compress/flate is what the decoder is held against.
func flateAll(b []byte) (out []byte, rest int64, err error) {
	r := bytes.NewReader(b)
	out, err = io.ReadAll(flate.NewReader(r))
	return out, int64(r.Len()), err
}

func deflated(t testing.TB, b []byte, level int) []byte {
	t.Helper()
	return written(t, b, func(w io.Writer) (io.WriteCloser, error) { return flate.NewWriter(w, level) })
}

// inflateSamples are data that bring out every kind of block and code.
func inflateSamples() map[string][]byte {
	rng := rand.New(rand.NewSource(5))
	noise := make([]byte, 300<<10)
	rng.Read(noise)
	skewed := make([]byte, 200<<10) // codes of all lengths
	for i := range skewed {
		skewed[i] = byte(min(rng.ExpFloat64()*8, 255))
	}
	far := slices.Concat(noise[:300], make([]byte, 32768-300), noise[:300], noise[:31<<10], noise[:300])
	var runs []byte // distances from 1 to 9
	for i := 1; i < 10; i++ {
		runs = append(runs, bytes.Repeat(noise[:i], 3000)...)
	}
	return map[string][]byte{"empty": nil, "byte": {7}, "noise": noise, "skewed": skewed, "far": far, "runs": runs,
		"zeros": make([]byte, 1<<20), "text": bytes.Repeat([]byte("It is the same again, and again. "), 9000),
		"image": testImage(4, 1<<20)}
}

func TestInflate(t *testing.T) {
	t.Parallel()
	for name, data := range inflateSamples() {
		for _, level := range []int{flate.HuffmanOnly, 0, 1, 6, 9} {
			b := append(deflated(t, data, level), "trailer!"...)
			for _, r := range []io.Reader{bytes.NewReader(b), iotest.OneByteReader(bytes.NewReader(b)),
				iotest.DataErrReader(bytes.NewReader(b))} {
				if got, rest, err := inflateAll(r); err != nil || rest != 8 || !bytes.Equal(got, data) {
					t.Fatalf("%s, level %d: %d of %d bytes, %d left behind it, %v", name, level, len(got), len(data),
						rest, err)
				}
			}
			for cut := len(b) - 9; cut > 0; cut -= 1 + cut/7 {
				if _, _, err := inflateAll(bytes.NewReader(b[:cut])); err != io.ErrUnexpectedEOF && err != errDeflate {
					t.Fatalf("%s, level %d: cut off at %d of %d: %v", name, level, cut, len(b), err)
				}
			}
		}
	}
}

// Blocks of all kinds after one another, each with codes of its own or those of before.
func TestInflateMixedBlocks(t *testing.T) {
	samples := inflateSamples()
	var packed, want bytes.Buffer
	w, err := flate.NewWriter(&packed, 6)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"byte", "byte", "skewed", "byte", "noise", "byte", "byte", "text", "skewed", "byte",
		"zeros", "byte"} {
		part := samples[name][:min(len(samples[name]), 40000)]
		want.Write(part)
		w.Write(part)
		w.Flush()
	}
	w.Close()
	packed.WriteString("trailer!")
	if got, rest, err := inflateAll(&packed); err != nil || rest != 8 || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%d of %d bytes, %d left behind it, %v", len(got), want.Len(), rest, err)
	}
}

// A million blocks that hold nothing, of ten bits each, cost no more than their bits.
func TestInflateEmptyBlocks(t *testing.T) {
	block := []byte{0x02, 0x08, 0x20, 0x80, 0x00} // 010 0000000, four times
	b := append(bytes.Repeat(block, 250_000), 0x03, 0, 't', 'r', 'a', 'i', 'l', 'e', 'r', '!')
	sameAsFlate(t, "empty blocks", b)
}

// After an error nothing more is given, though something was unpacked before it.
func TestGunzipError(t *testing.T) {
	b := gzipped(t, testImage(4, 1<<20), 6, 1<<20, 0)
	in := newInput(bytes.NewReader(b), 0, 4<<10)
	in.section(int64(len(b) - 60))
	in.r = bytes.NewReader(b[:len(b)-60])
	g, err := newUnpacker("gzip", in, unpackLimits{})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100<<10)
	for err == nil {
		_, err = g.Read(buf)
	}
	if n, again := g.Read(buf); n != 0 || again != err {
		t.Errorf("after %v: %d bytes, %v", err, n, again)
	}
}

// Streams that no compressor writes: what compress/flate refuses is refused, too.
func TestInflateDamaged(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewSource(6))
	for name, data := range inflateSamples() {
		b := append(deflated(t, data[:min(len(data), 20000)], 6), make([]byte, 16)...)
		for range 300 {
			bad := slices.Clone(b)
			for range 1 + rng.Intn(3) {
				bad[rng.Intn(min(len(b), 1+rng.Intn(len(b))))] ^= 1 << rng.Intn(8)
			}
			sameAsFlate(t, name, bad)
		}
	}
}

func sameAsFlate(t *testing.T, name string, b []byte) {
	t.Helper()
	want, wantRest, wantErr := flateAll(b)
	got, rest, err := inflateAll(bytes.NewReader(b))
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%s: %v, compress/flate: %v", name, err, wantErr)
	}
	if err == nil && (!bytes.Equal(got, want) || rest != wantRest) {
		t.Fatalf("%s: got %d bytes and %d left, compress/flate %d and %d", name, len(got), rest, len(want), wantRest)
	}
}

// FuzzInflate holds the decoder against compress/flate. The zeros are for the trailer that
// follows in gzip.
func FuzzInflate(f *testing.F) {
	for _, data := range inflateSamples() {
		for _, level := range []int{flate.HuffmanOnly, 0, 6} {
			f.Add(deflated(f, data[:min(len(data), 3000)], level))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		sameAsFlate(t, "fuzz", append(slices.Clone(b), make([]byte, 16)...))
	})
}

// A stream can be entered at each block, wherever in a byte that begins, and not otherwise.
func TestInflateFromBlock(t *testing.T) {
	t.Parallel()
	data := testImage(4, 4<<20)
	b := append(deflated(t, data, 6), make([]byte, 8)...)
	f, err := newInflater(newInput(bytes.NewReader(b), 0, 4<<10), 0, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	seen, within := 0, map[uint8]bool{}
	for err == nil {
		before := f.blockAt
		if err = f.more(); err == nil && f.blockAt > before && f.blockAt >= gzipWindow {
			seen++
			within[f.bit] = true
			at := f.blockAt
			g, err := newInflater(newInput(bytes.NewReader(b[f.block:]), f.block, 4<<10), f.bit,
				data[at-gzipWindow:at], at)
			if err != nil {
				t.Fatal(err)
			}
			var rest []byte
			for err == nil {
				err = g.more()
				rest = append(rest, g.pending()...)
				g.begin = g.end
			}
			if err != io.EOF || !bytes.Equal(rest, data[at:]) {
				t.Fatalf("entered at %d, bit %d: %d bytes, want %d: %v", f.block, f.bit, len(rest), len(data)-int(at),
					err)
			}
		}
		f.begin = f.end
	}
	if seen < 5 || len(within) < 3 {
		t.Errorf("%d blocks, at %d different bits: too few to show anything", seen, len(within))
	}
}

func BenchmarkInflate(b *testing.B) {
	data := testImage(4, 4<<20)
	benchAgainst(b, "gzip", gzipped(b, data, 6, len(data), 0), len(data), func(r io.Reader) (io.Reader, error) {
		return gzip.NewReader(r)
	})
}

// Zeros behind the last member are read past, to the end, and nothing else.
func TestGzipZeros(t *testing.T) {
	data := testImage(5, 3000)
	b := gzipped(t, data, 6, 1000, 0)
	for name, c := range map[string]struct {
		tail []byte
		want string
	}{
		"none":           {nil, ""},
		"one":            {make([]byte, 1), ""},
		"many":           {make([]byte, 100_000), ""},
		"a byte behind":  {append(make([]byte, 100), 1), "data between zero bytes"},
		"another member": {append(make([]byte, 512), b...), "data between zero bytes"},
		"other data":     {[]byte("x"), "want a gzip header or the end"},
	} {
		all := slices.Concat(b, c.tail)
		in := newInput(bytes.NewReader(all), 0, 4<<10)
		in.section(int64(len(all)))
		u, err := newUnpacker("gzip", in, unpackLimits{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(u)
		if !bytes.Equal(got, data) || (err == nil) != (c.want == "") || err != nil &&
			!strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %d bytes, %v; want an error with %q", name, len(got), err, c.want)
		}
	}
}

// Blocks of one byte each do not have the window of 32 KiB moved for each of them.
func TestInflateMoves(t *testing.T) {
	block := []byte{0, 1, 0, 0xfe, 0xff, 'x'}
	b := slices.Concat(bytes.Repeat(block, 100_000), []byte{3, 0}, make([]byte, 16))
	f, err := newInflater(newInput(bytes.NewReader(b), 0, 4<<10), 0, nil, 0)
	moves := 0
	for at := 0; err == nil; at = f.end {
		if err = f.more(); f.end < at {
			moves++
		}
		f.begin = f.end
	}
	if err != io.EOF || f.total != 100_000 || moves > 100_000/(inflateRoom/2) {
		t.Errorf("%d bytes, %d moves, %v", f.total, moves, err)
	}
}

// A gzip header may have all the optional fields of RFC 1952, 2.3; the program of that name writes a name at most.
func TestGzipHeaderFields(t *testing.T) {
	data := testImage(5, 3000)
	b := gzipped(t, data, 6, len(data), 0) // with all but a CRC of the header, which is its last field
	b[3] |= 2
	b = slices.Insert(b, 10+len("\x04\x00\x00\x00\xff\xffname\x00comment\x00"), 0x12, 0x34)
	in := newInput(bytes.NewReader(b), 0, 4<<10)
	in.section(int64(len(b)))
	u, err := newUnpacker("gzip", in, unpackLimits{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(u); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
	}
}
