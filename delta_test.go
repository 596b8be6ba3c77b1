// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"
	"unsafe"
)

// cutPoints splits p and gives the lengths of its chunks.
func cutPoints(tb testing.TB, average int64, p []byte) []int {
	tb.Helper()
	c := newChunker(average)
	var cuts []int
	at := 0
	err := c.split(bytes.NewReader(p), make([]byte, c.max+100), func(q []byte) error {
		if !bytes.Equal(q, p[at:at+len(q)]) {
			tb.Fatalf("the chunk at %d has other bytes", at)
		}
		at += len(q)
		cuts = append(cuts, len(q))
		return nil
	})
	if err != nil || at != len(p) {
		tb.Fatalf("split: got %d of %d bytes, %v", at, len(p), err)
	}
	return cuts
}

// noise is the same for ever: the ChaCha8 generator of the standard library is specified.
func noise(seed byte, n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// TestGoldenCuts pins where chunks end. These values never change: indexes of artifacts that were made before and those
// that devices keep are of no use otherwise.
func TestGoldenCuts(t *testing.T) {
	t.Parallel()
	p := append(noise(1, 3<<20), make([]byte, 1<<20)...)
	p = append(p, noise(2, 2<<20)...)
	for average, want := range map[int64]string{
		16 << 10: "237e61f2458d780b",
		32 << 10: "e627d9730a98ea85",
		64 << 10: "c70f3e28fff8d676",
	} {
		h := sha256.New()
		for _, n := range cutPoints(t, average, p) {
			fmt.Fprintf(h, "%d\n", n)
		}
		if got := fmt.Sprintf("%x", h.Sum(nil)[:8]); got != want {
			t.Errorf("average %d: lengths have the sum %s, want %s", average, got, want)
		}
	}
	c := newChunker(defaultAverage)
	if c.gear[0] != 0xcb87aca5 || c.gear[255] != 0xb7d2f10c {
		t.Errorf("gear: got %#x … %#x, want 0xcb87aca5 … 0xb7d2f10c", c.gear[0], c.gear[255])
	}
}

// slowCuts cuts as doc/delta.md says it, byte for byte.
func slowCuts(average int, p []byte) []int {
	c := newChunker(int64(average))
	var cuts []int
	for len(p) > 0 {
		n := len(p)
		for at := average / 4; at < min(len(p), 4*average); at++ {
			hash := uint32(0)
			for _, b := range p[at-32 : at] {
				hash = hash*2 + c.gear[b]
			}
			limit := uint32(1 << 30 / average)
			if at > average {
				limit *= 16
			}
			if hash < limit {
				n = at
				break
			}
		}
		n = min(n, 4*average)
		cuts = append(cuts, n)
		p = p[n:]
	}
	return cuts
}

func TestChunker(t *testing.T) {
	t.Parallel()
	for _, average := range []int{16 << 10, 32 << 10, 64 << 10} {
		for _, size := range []int{0, 1, 31, average / 4, average/4 + 1, average, average + 3, 4 * average, 300<<10 + 13} {
			p := noise(byte(size), size)
			cuts := cutPoints(t, int64(average), p)
			if want := slowCuts(average, p); !slices.Equal(cuts, want) {
				t.Fatalf("average %d, %d bytes: got %v, want %v", average, size, cuts, want)
			}
			for i, n := range cuts {
				if n > 4*average || n < average/4 && i < len(cuts)-1 {
					t.Errorf("average %d, %d bytes: a chunk of %d", average, size, n)
				}
			}
		}
		for _, b := range []byte{0, 0x55, 0xff} { // a slot that was erased has few long chunks
			p := bytes.Repeat([]byte{b}, 32*average)
			if cuts := cutPoints(t, int64(average), p); len(cuts) != 8 {
				t.Errorf("average %d, bytes %#x: got %d chunks, want 8", average, b, len(cuts))
			}
		}
		if n := len(cutPoints(t, int64(average), noise(9, 8<<20))); n*average < 6<<20 || n*average > 9<<20 {
			t.Errorf("average %d: got %d chunks of 8 MiB", average, n)
		}
	}
}

// TestChunkerTurns has hashes between the two thresholds and below both at the shortest chunk, around the average, and
// at the longest chunk, where few of random bytes have them.
func TestChunkerTurns(t *testing.T) {
	t.Parallel()
	const average = 16 << 10
	c := newChunker(average)
	p := noise(6, 1<<20)
	var between, below []int // places behind a window of such a hash
	for hash, at := uint32(0), 0; at < len(p); at++ {
		if hash = hash<<1 + c.gear[p[at]]; at < 4*average || len(p)-at < 5*average {
			continue
		}
		switch {
		case hash < c.before:
			below = append(below, at+1)
		case hash < c.behind:
			between = append(between, at+1)
		}
	}
	if len(between) == 0 || len(below) == 0 {
		t.Fatalf("got %d and %d places", len(between), len(below))
	}
	for _, at := range []int{between[0], below[0]} {
		for _, turn := range []int{average / 4, average, 4 * average} {
			for d := -1; d <= 1; d++ {
				q := p[at-turn+d:]
				if got, want := c.next(q), slowCuts(average, q[:5*average])[0]; got != want {
					t.Errorf("place %d, %d before the turn at %d: got a chunk of %d, want %d", at, d, turn, got, want)
				}
			}
		}
	}
}

// TestChunkerResync changes a large image in one place: but for a few chunks there, all are the same.
func TestChunkerResync(t *testing.T) {
	t.Parallel()
	old := noise(5, 8<<20)
	c := newChunker(defaultAverage)
	have := map[string]bool{}
	note := func(p []byte) error { have[string(p)] = true; return nil }
	if err := c.split(bytes.NewReader(old), make([]byte, 512<<10), note); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string][]byte{
		"a byte put in":  slices.Concat(old[:3<<20], []byte{1}, old[3<<20:]),
		"100 bytes less": slices.Concat(old[:3<<20], old[3<<20+100:]),
		"one changed":    slices.Concat(old[:3<<20], []byte{^old[3<<20]}, old[3<<20+1:]),
		"begins later":   old[12345:],
	} {
		missing := 0
		miss := func(q []byte) error {
			if !have[string(q)] {
				missing += len(q)
			}
			return nil
		}
		if err := c.split(bytes.NewReader(p), make([]byte, c.max), miss); err != nil {
			t.Fatal(err)
		}
		if missing > 4*c.max {
			t.Errorf("%s: %d bytes are in new chunks", name, missing)
		}
	}
}

// TestChunkerReads gives the image in pieces of other sizes, and in the end an error.
func TestChunkerReads(t *testing.T) {
	t.Parallel()
	p := noise(4, 300<<10)
	c := newChunker(16 << 10)
	want := cutPoints(t, 16<<10, p)
	var got []int
	note := func(q []byte) error { got = append(got, len(q)); return nil }
	if err := c.split(iotest.HalfReader(bytes.NewReader(p)), make([]byte, 2*c.max), note); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	r := io.MultiReader(bytes.NewReader(p), iotest.ErrReader(syscall.EIO))
	if err := c.split(r, make([]byte, 2*c.max), note); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want EIO", err)
	}
	if err := c.split(bytes.NewReader(p), make([]byte, c.max), func([]byte) error { return io.EOF }); err != io.EOF {
		t.Errorf("got %v, want what the function gave", err)
	}
}

// testIndex describes n bytes of noise with zeros in their middle, as if each chunk were stored in 60 bytes or, if it
// has fewer, plain.
func testIndex(average int64, n int) *deltaIndex {
	p := append(noise(7, n/2), make([]byte, n-n/2)...)
	x := &deltaIndex{average: average, imageSize: int64(n), head: 99}
	for c := newChunker(average); len(p) > 0; {
		k := describe(p[:c.next(p)])
		if k.stored = 60; k.size <= k.stored {
			k.stored = k.size + 5
		}
		x.end += int64(k.stored)
		x.chunks = append(x.chunks, k)
		p = p[k.size:]
	}
	raw := x.encode()
	x.first = 99 + int64(len(raw)) + int64(deltaMembers(int64(len(raw))))*26 + 10
	x.end += x.first
	return x
}

func TestDeltaIndexRoundTrip(t *testing.T) {
	t.Parallel()
	for _, average := range []int64{16 << 10, 32 << 10, 64 << 10} {
		for _, n := range []int{1, 100, 16 << 10, 1<<20 + 5, 4 << 20} {
			x := testIndex(average, n)
			raw := x.encode()
			got, err := parseDeltaIndex(raw, x.info(raw), int64(n))
			if err != nil {
				t.Fatalf("average %d, %d bytes: %v", average, n, err)
			}
			if !reflect.DeepEqual(got, x) {
				t.Errorf("average %d, %d bytes: got %+v, want %+v", average, n, got, x)
			}
		}
	}
}

// TestDeltaIndexGolden pins the bytes of an index.
func TestDeltaIndexGolden(t *testing.T) {
	t.Parallel()
	a := describe([]byte("mendlet"))
	z := describe(make([]byte, 9000))
	a.size, a.stored, z.stored = 8192, 300, 9005
	x := &deltaIndex{average: 32 << 10, imageSize: 17192, head: 77, chunks: []chunk{a, z}}
	// The numbers of bits, as doc/delta.md names them, from the lowest bit of the first byte on.
	sum := sha256.Sum256([]byte("mendlet"))
	all, at := new(big.Int), uint(0)
	for _, f := range []struct {
		v uint64
		n uint
	}{
		{binary.BigEndian.Uint64(sum[:]) >> 16, 48}, {8191, 17}, {0, 1}, {300, 17}, {0, 48}, {8999, 17}, {1, 1},
	} {
		all.Or(all, new(big.Int).Lsh(new(big.Int).SetUint64(f.v), at))
		at += f.n
	}
	packed := all.FillBytes(make([]byte, (at+7)/8))
	slices.Reverse(packed)
	const want = "4d584432" + "808002" + "a88601" + "02" + "4d"
	if got := fmt.Sprintf("%x", x.encode()); got != fmt.Sprintf("%s%x", want, packed) {
		t.Errorf("got %s, want %s%x", got, want, packed)
	}
	if got := fmt.Sprintf("%x", packed[:6]); got != "ed85f31dbd13" {
		t.Errorf("got %s", got)
	}
}

// TestDeltaIndexDamage cuts an index off everywhere and changes each of its bits. With its sum, the first thing that is
// held against it, made right again, it is refused or says something that adds up; nothing panics.
func TestDeltaIndexDamage(t *testing.T) {
	t.Parallel()
	x := testIndex(16<<10, 200<<10)
	raw := x.encode()
	if _, err := parseDeltaIndex(append(raw[:len(raw):len(raw)], 0), x.info(raw), x.imageSize); err == nil {
		t.Error("a byte more was taken")
	}
	for n := range raw {
		cut := raw[:n]
		if _, err := parseDeltaIndex(cut, x.info(raw), x.imageSize); err == nil {
			t.Fatalf("cut off at %d: taken", n)
		}
		if _, err := parseDeltaIndex(cut, x.info(cut), x.imageSize); err == nil {
			t.Fatalf("cut off at %d, with its own sum: taken", n)
		}
		for bit := range 8 {
			bad := bytes.Clone(raw)
			bad[n] ^= 1 << bit
			if _, err := parseDeltaIndex(bad, x.info(raw), x.imageSize); err == nil {
				t.Fatalf("bit %d of byte %d: taken", bit, n)
			}
			checkIndex(t, bad, x.imageSize)
		}
	}
}

// checkIndex parses raw with a sum that is right: what is taken adds up and has this one encoding.
func checkIndex(t *testing.T, raw []byte, imageSize int64) {
	t.Helper()
	info := new(deltaIndex).info(raw)
	x, err := parseDeltaIndex(raw, info, imageSize)
	if err != nil {
		return
	}
	image, at := int64(0), x.head+int64(len(raw))+26*int64(info.Members)+10
	if at != x.first {
		t.Fatalf("%x: chunks begin at %d, want %d", raw, x.first, at)
	}
	for i := range x.chunks {
		c := &x.chunks[i]
		if c.size == 0 || int64(c.size) > 4*x.average || int64(c.size) < x.average/4 && i < len(x.chunks)-1 || c.stored < 6 {
			t.Fatalf("%x: chunk %d: %+v", raw, i, *c)
		}
		image, at = image+int64(c.size), at+int64(c.stored)
	}
	if image != x.imageSize || image != imageSize || at != x.end {
		t.Fatalf("%x: %d bytes of the image, %d stored, want %d, %d", raw, image, at, imageSize, x.end)
	}
	if again := x.encode(); !bytes.Equal(again, raw) {
		t.Fatalf("%x: is %x when it is encoded again", raw, again)
	}
}

// TestDeltaIndexLies has indexes of the right sum that cannot be true.
func TestDeltaIndexLies(t *testing.T) {
	t.Parallel()
	for name, lie := range map[string]func(x *deltaIndex){
		"average of 8 KiB":    func(x *deltaIndex) { x.average = 8 << 10 },
		"average of 48 KiB":   func(x *deltaIndex) { x.average = 48 << 10 },
		"average of 128 KiB":  func(x *deltaIndex) { x.average = 128 << 10 },
		"average of 0":        func(x *deltaIndex) { x.average = 0 },
		"another image size":  func(x *deltaIndex) { x.imageSize++ },
		"a head of nothing":   func(x *deltaIndex) { x.head = 0 },
		"a head of 1 GiB":     func(x *deltaIndex) { x.head = 1 << 30 },
		"a chunk too few":     func(x *deltaIndex) { x.chunks = x.chunks[1:] },
		"a chunk too many":    func(x *deltaIndex) { x.chunks = append(x.chunks, x.chunks[0]) },
		"no chunks":           func(x *deltaIndex) { x.chunks = nil },
		"a chunk of no bytes": func(x *deltaIndex) { x.chunks[1].size = 0 },
		"a small chunk": func(x *deltaIndex) {
			x.chunks[0].size, x.chunks[1].size = 1, x.chunks[0].size+x.chunks[1].size-1
		},
		"a large chunk":       func(x *deltaIndex) { x.chunks[1].size = 64<<10 + 1 },
		"stored in few bytes": func(x *deltaIndex) { x.chunks[2].stored = 5 },
		"stored in none":      func(x *deltaIndex) { x.chunks[2].stored = 0 },
		"stored in as many":   func(x *deltaIndex) { x.chunks[2].stored = x.chunks[2].size },
		"stored in more":      func(x *deltaIndex) { x.chunks[2].stored = x.chunks[2].size + 1 },
		"stored in 4 GiB":     func(x *deltaIndex) { x.chunks[2].stored = 1<<32 - 1 },
	} {
		x := testIndex(16<<10, 400<<10)
		lie(x)
		raw := x.encode()
		if _, err := parseDeltaIndex(raw, x.info(raw), 400<<10); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	// As many chunks as a number can say: refused before memory is taken for them.
	raw := binary.AppendUvarint([]byte(deltaMagic), 16<<10)
	for _, n := range []uint64{1 << 40, 1 << 21, 99} {
		raw = binary.AppendUvarint(raw, n)
	}
	if _, err := parseDeltaIndex(raw, new(deltaIndex).info(raw), 1<<40); err == nil {
		t.Error("2 Mi chunks in 20 bytes: taken")
	}
	x := testIndex(16<<10, 400<<10)
	good := x.encode()
	for name, bad := range map[string][]byte{
		"a number with a zero at its end": bytes.Replace(good, []byte{99}, []byte{99 | 0x80, 0}, 1), // x.head
		"a byte more":                     append(bytes.Clone(good), 0),
	} {
		if _, err := parseDeltaIndex(bad, x.info(bad), x.imageSize); err == nil || bytes.Equal(bad, good) {
			t.Errorf("%s: taken", name)
		}
	}
}

// TestDeltaIndexMemory holds an index of 1 GiB at the default average, as it came and parsed, to 1 MiB.
func TestDeltaIndexMemory(t *testing.T) {
	t.Parallel()
	x := &deltaIndex{average: defaultAverage, imageSize: 1 << 30, head: 99}
	for range 1 << 15 {
		x.chunks = append(x.chunks, chunk{sum: 1 << 40, size: 32 << 10, stored: 12345})
	}
	raw := x.encode()
	got, err := parseDeltaIndex(raw, x.info(raw), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(raw) + cap(got.chunks)*int(unsafe.Sizeof(got.chunks[0])); n > 1<<20 {
		t.Errorf("got %d bytes, %d of them the index, want at most 1 MiB", n, len(raw))
	}
}

func TestDeltaInfo(t *testing.T) {
	t.Parallel()
	sum := strings.Repeat("0a", 32)
	object := func(version, members, size, sum string) string {
		return fmt.Sprintf(`{"a":1,"mendlet_delta":{"version":%s,"members":%s,"size":%s,"sha256":"%s"}}`,
			version, members, size, sum)
	}
	for _, c := range []struct {
		meta string
		want string // "none", "refused", or the size
	}{
		{object("2", "1", "65000", sum), "65000"},
		{object("2", "2", "65001", sum), "65001"},
		{object("2", "65", "4194304", sum), "4194304"},
		{object("2", "65", "4194305", sum), "refused"},
		{object("2", "1", "65001", sum), "refused"},
		{object("2", "0", "0", sum), "refused"},
		{object("2", "-1", "-65000", sum), "refused"},
		{object("2", "1", "3", sum), "refused"},
		{object("0", "1", "65000", sum), "refused"},
		{object("1", "1", "65000", sum), "refused"},
		{object("-1", "1", "65000", sum), "refused"},
		{object("2", "1", "65000", sum[2:]), "refused"},
		{object("2", "1", "65000", strings.Repeat("0g", 32)), "refused"},
		{object("2", `"x"`, "65000", sum), "refused"},
		{object("3", `"x"`, "65000", sum), "none"},
		{`{"mendlet_delta":{"version":3}}`, "none"},
		{`{"mendlet_delta":[]}`, "refused"},
		{`{"mendlet_delta":null}`, "refused"},
		{`{"MENDLET_DELTA":{"version":1}}`, "none"},
		{`{"a":1}`, "none"}, {`[1]`, "none"}, {`"x"`, "none"}, {"", "none"}, {"{", "none"}, {"null", "none"},
	} {
		info, err := parseDeltaInfo(json.RawMessage(c.meta))
		got := "none"
		switch {
		case err != nil:
			got = "refused"
		case info != nil:
			got = fmt.Sprint(info.Size)
		}
		if got != c.want {
			t.Errorf("%s: got %s, %v, want %s", c.meta, got, err, c.want)
		}
	}
}

func FuzzDeltaIndex(f *testing.F) {
	x := testIndex(16<<10, 200<<10)
	f.Add(x.encode(), x.imageSize)
	x = testIndex(64<<10, 1)
	f.Add(x.encode(), x.imageSize)
	f.Add([]byte(deltaMagic), int64(0))
	f.Fuzz(func(t *testing.T, raw []byte, imageSize int64) { checkIndex(t, raw, imageSize) })
}

// BenchmarkGear says what cutting takes, and what a scan of a slot does (cutting and all SHA-256), as ratios to SHA-256
// alone and to coreutils' sha256sum in the same run, of the processor's time: others may use it, too.
func BenchmarkGear(b *testing.B) {
	p := noise(1, 128<<20)
	c := newChunker(defaultAverage)
	buf := make([]byte, 512<<10)
	best := func(f func()) time.Duration {
		best := time.Hour
		for range 5 {
			var from, to syscall.Rusage
			syscall.Getrusage(syscall.RUSAGE_SELF, &from)
			f()
			syscall.Getrusage(syscall.RUSAGE_SELF, &to)
			best = min(best, time.Duration(to.Utime.Nano()-from.Utime.Nano()))
		}
		return best
	}
	split := func(f func(q []byte)) func() {
		return func() { c.split(bytes.NewReader(p), buf, func(q []byte) error { f(q); return nil }) }
	}
	file := writeTemp(b, "slot", p)
	for b.Loop() {
		sum := best(func() { sha256.Sum256(p) })
		cut := best(split(func([]byte) {}))
		scan := best(split(func(q []byte) { chunkSum(q) }))
		b.ReportMetric(float64(cut)/float64(sum), "gear/sha256")
		b.ReportMetric(float64(scan)/float64(sum), "scan/sha256")
		b.ReportMetric(float64(len(p))/1e6/scan.Seconds(), "scan-MB/s")
		if cmd := exec.Command("sha256sum", file); cmd.Run() == nil {
			b.ReportMetric(float64(scan)/float64(cmd.ProcessState.UserTime()), "scan/sha256sum")
		}
	}
}
