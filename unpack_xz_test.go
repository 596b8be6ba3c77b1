// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// unxzAll unpacks an xz stream in reads of n bytes.
func unxzAll(b []byte, n int) ([]byte, error) {
	in := newInput(bytes.NewReader(b), 0, 4<<10)
	in.section(int64(len(b)))
	u, err := newUnpacker("xz", in, unpackLimits{dict: 16 << 20})
	var out []byte
	for buf := make([]byte, n); err == nil; {
		var k int
		k, err = u.Read(buf)
		out = append(out, buf[:k]...)
	}
	if err == io.EOF && in.offset() == int64(len(b)) {
		return out, nil
	}
	return out, fmt.Errorf("at %d of %d: %w", in.offset(), len(b), err)
}

// What the xz program and the library write, with every kind of property and chunk.
func TestLZMA(t *testing.T) {
	t.Parallel()
	for name, data := range inflateSamples() {
		packed := map[string][]byte{
			"library":       xzipped(t, data, xz.WriterConfig{DictCap: 1 << 16}),
			"small blocks":  xzipped(t, data, xz.WriterConfig{DictCap: minDict, BlockSize: 5000}),
			"other numbers": xzipped(t, data, xz.WriterConfig{Properties: &lzma.Properties{LC: 0, LP: 4, PB: 0}}),
		}
		if _, err := exec.LookPath("xz"); err == nil {
			for _, lzma2 := range []string{"preset=0,dict=4KiB", "preset=6", "preset=9e,dict=8MiB",
				"preset=6,lc=4,lp=0,pb=4", "preset=6,lc=1,lp=3,pb=1"} {
				packed[lzma2] = piped(t, data, "xz", "-zc", "--lzma2="+lzma2)
			}
		}
		for how, b := range packed {
			for _, n := range []int{1 << 20, 1000, 7} {
				if n == 7 && len(data) > 150<<10 && !exhaustive() {
					continue
				}
				if got, err := unxzAll(b, n); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%s, %s, reads of %d: %d of %d bytes, %v", name, how, n, len(got), len(data), err)
				}
			}
		}
	}
}

// corpus lists the files of other programs' tests that rig/corpus.sh has put aside.
func corpus(t testing.TB, pattern string) []string {
	t.Helper()
	list, err := filepath.Glob("out/corpus/" + pattern)
	if err != nil || len(list) == 0 {
		t.Skipf("needs out/corpus/%s: make corpus gets it", pattern)
	}
	return list
}

// The files that XZ Utils tests its decoder with. What is good unpacks to what xz makes of it, what is bad is refused,
// but for a check that the manifest's SHA-256 stands for; a check that is not known is not looked at.
func TestXZUtilsFiles(t *testing.T) {
	needTool(t, "xz")
	good := 0
	for _, path := range corpus(t, "xz/*.xz") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(path)
		for _, n := range []int{1 << 20, 3} {
			got, err := unxzAll(b, n)
			switch {
			case strings.HasPrefix(name, "good-"):
				if want := piped(t, b, "xz", "-dc"); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v; xz gives %d", name, len(got), err, len(want))
				}
				good++
			case name == "unsupported-check.xz", name == "bad-1-check-crc64.xz", name == "bad-1-check-sha256.xz":
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
			case err == nil:
				t.Errorf("%s: accepted", name)
			}
		}
	}
	if good < 40 {
		t.Errorf("%d good files, want 20 at least", good/2)
	}
}

// Streams after one another, empty ones too, and padding between and behind them.
func TestXZStreams(t *testing.T) {
	data := testImage(4, 1<<20)[:30000]
	one := xzipped(t, data, xz.WriterConfig{DictCap: 1 << 16, CheckSum: xz.CRC32})
	two := xzipped(t, data, xz.WriterConfig{DictCap: minDict, CheckSum: xz.SHA256, BlockSize: 5000})
	none := xzipped(t, nil, xz.WriterConfig{})
	zeros := make([]byte, 1<<20)
	for name, c := range map[string]struct {
		b    []byte
		n    int // times the data
		want string
	}{
		"two":                   {slices.Concat(one, two), 2, ""},
		"empty ones":            {slices.Concat(none, none, one, none, two, none), 2, ""},
		"padding":               {slices.Concat(one, zeros[:4], two, zeros[:8], none, zeros), 2, ""},
		"padding of 3":          {slices.Concat(one, zeros[:3]), 1, "by fours"},
		"padding of 5":          {slices.Concat(one, zeros[:5]), 1, "by fours"},
		"padding of 6, another": {slices.Concat(one, zeros[:6], one), 1, "by fours"},
		"padding before":        {slices.Concat(zeros[:4], one), 0, "not xz data"},
		"no padding":            {slices.Concat(one, zeros[:8], []byte("1234")), 1, "unexpected EOF"},
		"no stream":             {slices.Concat(one, zeros[:4], []byte("123456789012")), 1, "stream header"},
		"cut off":               {slices.Concat(one, two[:len(two)-1]), 2, "unexpected EOF"},
		"cut off in a header":   {slices.Concat(one, two[:7]), 1, "unexpected EOF"},
	} {
		for _, n := range []int{1 << 20, 1000} {
			got, err := unxzAll(c.b, n)
			if !bytes.Equal(got, bytes.Repeat(data, c.n)) || (err == nil) != (c.want == "") || err != nil &&
				!strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %d bytes, %v; want %d and an error with %q", name, len(got), err, c.n*len(data), c.want)
			}
		}
	}
}

// Dictionaries that grow from block to block: the limit is for all of them together.
func TestLZMAGrowingDictionary(t *testing.T) {
	z := &unxz{lim: unpackLimits{dict: 32 << 20}, wantOut: -1}
	inUse := func() int64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	runtime.GC() // of other tests
	before := inUse()
	for _, size := range []int64{28 << 20, 30 << 20, 32 << 20} {
		must(t, z.needDict(size))
		if n := inUse() - before; n > 40<<20 {
			t.Errorf("%d bytes in use with a dictionary of %d", n, size)
		}
	}
	if err := z.needDict(33 << 20); exitCode(err) != exitRefused {
		t.Errorf("beyond the limit: %v", err)
	}
}

// What is damaged between the headers is found, by the decoder or at last by the check.
func TestLZMADamaged(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewSource(7))
	for name, data := range inflateSamples() {
		data = data[:min(len(data), 20000)]
		b := xzipped(t, data, xz.WriterConfig{DictCap: 1 << 16, CheckSum: xz.CRC32})
		wrong, back := slices.Clone(b), int(binary.LittleEndian.Uint32(b[len(b)-8:])) // size of the index
		if wrong[len(b)-12-(back+1)*4-1] ^= 1; len(data) > 0 {
			if _, err := unxzAll(wrong, 3000); err == nil || !strings.Contains(err.Error(), "check is") {
				t.Errorf("%s: wrong CRC-32: %v", name, err)
			}
		}
		for range 200 {
			bad := slices.Clone(b)
			bad[rng.Intn(len(b))] ^= 1 << rng.Intn(8)
			// What changes nothing, such as properties that no symbol depends on, may pass.
			if got, err := unxzAll(bad, 3000); err == nil && !bytes.Equal(got, data) {
				t.Fatalf("%s: accepted", name)
			}
		}
		for cut := len(b) - 1; cut > 0; cut -= 1 + cut/9 {
			if _, err := unxzAll(b[:cut], 3000); err == nil {
				t.Fatalf("%s: cut off at %d of %d: accepted", name, cut, len(b))
			}
		}
	}
}

// lzma2All unpacks bare LZMA2 data.
func lzma2All(b []byte) (out []byte, rest int, err error) {
	in := newInput(bytes.NewReader(b), 0, 4<<10)
	d := &lzmaDecoder{dict: make([]byte, 1<<16), packed: make([]byte, 0, maxPacked)}
	buf := make([]byte, 5000)
	for first := true; err == nil; first = false {
		if err = d.chunk(in, first); err != nil {
			break
		}
		for d.left > 0 && err == nil {
			var n int
			n, err = d.read(in, buf)
			out = append(out, buf[:n]...)
		}
	}
	if err == io.EOF {
		err = nil
	}
	return out, len(b) - int(in.offset()), err
}

// FuzzLZMA holds the decoder against the library's. That one does not look whether the range
// decoder has come out even, so it may take what is refused here.
func FuzzLZMA(f *testing.F) {
	for _, data := range inflateSamples() {
		f.Add(written(f, data[:min(len(data), 3000)], func(w io.Writer) (io.WriteCloser, error) {
			return lzma.Writer2Config{DictCap: 1 << 16}.NewWriter2(w)
		}))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, rest, err := lzma2All(b)
		if err != nil {
			return
		}
		r := bytes.NewReader(b)
		z, err := lzma.Reader2Config{DictCap: 1 << 16}.NewReader2(r)
		var want []byte
		if err == nil {
			want, err = io.ReadAll(z)
		}
		if err != nil || !bytes.Equal(got, want) || rest != r.Len() {
			t.Fatalf("got %d bytes and %d left, the library %d and %d, %v", len(got), rest, len(want), r.Len(), err)
		}
	})
}

func BenchmarkLZMA(b *testing.B) {
	data := testImage(4, 4<<20)
	packed := xzipped(b, data, xz.WriterConfig{DictCap: packDict, CheckSum: xz.CRC64})
	benchAgainst(b, "xz", packed, len(data), func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) })
}

// The xz library allocates what a dictionary asks for; the limit comes first (field case 9).
func TestXZDictionaryLimit(t *testing.T) {
	b := fixture(t, "rootfs-xz.mender")
	_, _, err := readAll(b, artifactOptions{dictLimit: 32 << 20})
	if exitCode(err) != exitRefused || !strings.Contains(err.Error(), "67108864") ||
		!strings.Contains(err.Error(), "33554432") || hintOf(err) == "" {
		t.Errorf("got %v (hint %q), want a refusal with both numbers", err, hintOf(err))
	}
	if _, _, err := readAll(b, artifactOptions{dictLimit: 64 << 20}); err != nil {
		t.Error(err)
	}
	for code, want := range map[byte]int64{0: 4096, 1: 6144, 30: 128 << 20, 28: 64 << 20, 39: 3 << 30, 40: 1<<32 - 1} {
		if got := xzDictSize(code); got != want {
			t.Errorf("xzDictSize(%d) = %d, want %d", code, got, want)
		}
	}
	if l := defaultDictLimit(); l <= 0 || l > 64<<20 {
		t.Errorf("default limit %d", l)
	}
}
