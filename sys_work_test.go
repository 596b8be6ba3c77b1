// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// workKinds are artifacts that make each loop of the readers go round as often as so many bytes can: of each kind
// one of about n bytes. Most are refused, at their end. What they unpack to is zeros, which may follow a tar.
func workKinds(t testing.TB) map[string]func(n int) []byte {
	fill := func(n int, head []byte, parts ...[]byte) []byte {
		b := slices.Clone(head)
		for i := 0; len(b) < n; i++ {
			b = append(b, parts[i%len(parts)]...)
		}
		return b
	}
	kinds := map[string]func(n int) []byte{}
	data := func(name, suffix string, f func(n int) []byte) {
		kinds[name] = func(n int) []byte {
			k := newKit("mod", tarMember{name: "a"})
			k.data = func([]byte) (string, []byte) { return "data/0000.tar" + suffix, f(n) }
			return k.build(t)
		}
	}
	repeated := func(name, suffix string, head []byte, parts ...[]byte) {
		data(name, suffix, func(n int) []byte { return fill(n, head, parts...) })
	}
	tarWork(data)
	gzipWork(t, data, repeated)
	xzWork(t, data, repeated)
	zstdWork(data, repeated)
	headerWork(t, kinds)
	return kinds
}

// packedTar is what gzip makes of make(k), with k so that it is about n bytes.
func packedTar(n int, make func(k int) []byte) []byte {
	packed := func(k int) []byte {
		var out bytes.Buffer
		w, _ := gzip.NewWriterLevel(&out, 1)
		w.Write(make(k))
		w.Close()
		return out.Bytes()
	}
	const some = 256
	return packed(some * n / len(packed(some)))
}

func tarWork(data func(name, suffix string, f func(n int) []byte)) {
	file := tarBlock('0', "a", 0, "")
	data("tar: a chain of pax headers", ".gz", func(n int) []byte {
		x := paxBlock('x', paxRecord("comment", strings.Repeat("c", 1<<19)))
		return packedTar(n, func(k int) []byte { return slices.Concat(bytes.Repeat(x, k/16), file) })
	})
	data("tar: pax headers of many members", ".gz", func(n int) []byte {
		x := slices.Concat(paxBlock('g'), paxBlock('x', paxRecord("comment", strings.Repeat("c", 900))), file)
		return packedTar(n, func(k int) []byte { return bytes.Repeat(x, k) })
	})
	data("tar: short pax records", "", func(n int) []byte {
		return paxBlock('x', strings.Repeat("5 a=\n", n/5))
	})
	data("tar: zeros behind it", ".gz", func(n int) []byte {
		return packedTar(n, func(k int) []byte { return make([]byte, k<<10) })
	})
	data("tar: a file of zeros", ".gz", func(n int) []byte {
		return packedTar(n, func(k int) []byte { return append(tarBlock('0', "a", 1<<40, ""), make([]byte, k<<10)...) })
	})
}

// bitString writes bits, the lowest first, from numbers that are each followed by their width.
func bitString(list ...uint) (b []byte) {
	n := uint(0)
	for i := 0; i < len(list); i += 2 {
		for k := range list[i+1] {
			if n%8 == 0 {
				b = append(b, 0)
			}
			b[n/8] |= byte(list[i]>>k&1) << (n % 8)
			n++
		}
	}
	return b
}

func gzipWork(t testing.TB, data func(string, string, func(int) []byte), repeated func(string, string, []byte,
	...[]byte)) {
	head := []byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x00")
	none := gzipped(t, []byte{0}, 9, 1, 0)
	repeated("gzip: members", ".gz", nil, none)
	repeated("gzip: stored blocks of nothing", ".gz", head, []byte{0, 0, 0, 0xff, 0xff})
	repeated("gzip: stored blocks of a byte", ".gz", head, []byte{0, 1, 0, 0xfe, 0xff, 0})
	repeated("gzip: fixed blocks of nothing", ".gz", head, []byte{0x02, 0x08, 0x20, 0x80, 0x00})
	// Codes of no symbol but the end's: 256 times no length, one of 1, and none of distances. Eight of them end at
	// a byte.
	var block []uint
	for range 8 {
		block = append(block, 0|2<<1, 3, 0, 5, 0, 5, 14, 4)
		for _, s := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1} {
			block = append(block, map[int]uint{18: 1, 0: 2, 1: 2}[s], 3)
		}
		block = append(block, 0, 1, 127, 7, 0, 1, 118-11, 7, 3, 2, 1, 2, 0, 1)
	}
	repeated("gzip: blocks with codes of their own", ".gz", head, bitString(block...))
	repeated("gzip: zeros behind it", ".gz", none, []byte{0})
	data("gzip: a long name", ".gz", func(n int) []byte {
		return slices.Concat(head[:3], []byte{8}, head[4:], bytes.Repeat([]byte("n"), n), []byte{0, 3, 0})
	})
}

var xzNoCheck = xz.WriterConfig{NoCheckSum: true}

func xzWork(t testing.TB, data func(string, string, func(int) []byte), repeated func(string, string, []byte,
	...[]byte)) {
	start := func(flags byte, fields ...byte) (stream, block []byte) {
		b := xzStart(flags, fields...)
		return b[:12], b[12:]
	}
	stream, plain := start(0, 0x21, 1, 0)
	empty := slices.Concat(plain, make([]byte, 4))
	repeated("xz: blocks of nothing", ".xz", stream, empty)
	_, filtered := start(3, 4, 0, 5, 0, 3, 1, 200, 0x21, 1, 0)
	repeated("xz: blocks of nothing with filters", ".xz", stream, filtered, make([]byte, 4))
	data("xz: dictionaries that grow", ".xz", func(n int) []byte {
		b := slices.Clone(stream)
		for size := minDict + 1; len(b) < n; size++ {
			_, block := start(0x80, append(binary.AppendUvarint(nil, uint64(size)), 0x21, 1, 28)...)
			zeros := written(t, make([]byte, size), func(w io.Writer) (io.WriteCloser, error) {
				return lzma.Writer2Config{DictCap: 1 << 16}.NewWriter2(w)
			})
			b = slices.Concat(b, block, zeros, make([]byte, -len(zeros)&3))
		}
		return b
	})
	// A chunk that sets all probabilities anew, for one byte.
	repeated("xz: chunks with properties of their own", ".xz", slices.Concat(stream, plain),
		[]byte{0xe0, 0, 0, 0, 5, 4, 0, 0, 0, 0, 0, 0})
	repeated("xz: streams of nothing", ".xz", nil, xzipped(t, nil, xzNoCheck))
	repeated("xz: padding", ".xz", xzipped(t, nil, xzNoCheck), make([]byte, 4))
	data("xz: an index of many blocks", ".xz", func(n int) []byte {
		count := n / 20
		index := binary.AppendUvarint([]byte{0}, uint64(count))
		index = append(index, bytes.Repeat([]byte{13, 0}, count)...)
		index = append(index, make([]byte, -len(index)&3)...)
		index = binary.LittleEndian.AppendUint32(index, crc32.ChecksumIEEE(index))
		footer := binary.LittleEndian.AppendUint32(nil, uint32(len(index)/4-1))
		footer = append(footer, 0, 0)
		return slices.Concat(stream, bytes.Repeat(empty, count), index,
			binary.LittleEndian.AppendUint32(nil, crc32.ChecksumIEEE(footer)), footer, []byte("YZ"))
	})
}

func zstdWork(data func(string, string, func(int) []byte), repeated func(string, string, []byte, ...[]byte)) {
	last := zstdBlockOf(0, 0, true)
	repeated("zstd: frames of nothing", ".zst", nil, zstdFrame(last))
	repeated("zstd: frames to skip", ".zst", nil, []byte("\x50\x2a\x4d\x18\x00\x00\x00\x00"))
	repeated("zstd: blocks of nothing", ".zst", zstdFrame(), zstdBlockOf(0, 0, false))
	repeated("zstd: blocks of a byte", ".zst", zstdFrame(), zstdBlockOf(1, 1, false, []byte{0}))
	data("zstd: windows that grow", ".zst", func(n int) (b []byte) {
		for size := 1000; len(b) < n; size++ {
			b = binary.LittleEndian.AppendUint32(append(b, "\x28\xb5\x2f\xfd\x80\x80"...), uint32(size))
			b = append(b, zstdBlockOf(1, size, true, []byte{0})...)
		}
		return b
	})
	// The default codes and others in turn, so that each block has all tables made. Both are three literals and a
	// match.
	sequence := func(parts ...[]byte) []byte {
		body := slices.Concat(append([][]byte{[]byte("\x18\x00\x00\x00\x01")}, parts...)...)
		return zstdBlockOf(2, len(body), false, body)
	}
	repeated("zstd: codes", ".zst", zstdFrame(), sequence([]byte("\x54\x03\x02\x00"), backBits(2, 2)),
		sequence([]byte{0}, backBits(append(zstdStates(3, 2, 0), 2, 2)...)))
	tree := []byte("\x82\x11\x10")
	h := uint32(2) | 2<<4 | uint32(len(tree)+1)<<14
	literals := slices.Concat(binary.LittleEndian.AppendUint32(nil, h)[:3], tree, backBits(0, 2, 0, 2), []byte{0})
	repeated("zstd: Huffman trees", ".zst", zstdFrame(), zstdBlockOf(2, len(literals), false, literals))
}

func headerWork(t testing.TB, kinds map[string]func(n int) []byte) {
	member := func(name string, i int, body func(n int) string) {
		kinds[name] = func(n int) []byte {
			k := newKit("mod", tarMember{name: "a"})
			k.header[i].body = []byte(body(n))
			return k.build(t)
		}
	}
	const info = `{"payloads":[{"type":"mod"}],"artifact_provides":{"artifact_name":"rel"},` +
		`"artifact_depends":{"device_type":["dev"`
	member("JSON: deep", 2, func(n int) string {
		return strings.Repeat(`{"a":`, n/10) + "1" + strings.Repeat("}",
			n/10)
	})
	member("JSON: the same key", 2, func(n int) string { return "{" + strings.Repeat(`"a":1,`, n/6) + `"b":2}` })
	member("JSON: device types", 0, func(n int) string { return info + strings.Repeat(`,""`, n/3) + "]}}" })
	member("JSON: payloads", 0, func(n int) string { return `{"payloads":[{}` + strings.Repeat(`,{}`, n/3) + "]}" })
	keys := func(n int, format string) string {
		var b strings.Builder
		for i := 0; b.Len() < n; i++ {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	member("JSON: provides", 1, func(n int) string {
		return `{"type":"mod","artifact_provides":{` + keys(n, `"k%d":"",`) + `"z":""}}`
	})
	member("JSON: depends", 1, func(n int) string {
		return `{"type":"mod","artifact_depends":{` + keys(n, `"k%d":["a"],`) + `"z":""}}`
	})
	member("JSON: clears", 1, func(n int) string {
		return `{"type":"mod","clears_artifact_provides":[` + keys(n, `"k%d",`) + `"z"]}`
	})
	kinds["scripts"] = func(n int) []byte {
		k := newKit("mod", tarMember{name: "a"})
		for i := range n / 1024 {
			k.header = slices.Insert(k.header, 1,
				tarMember{name: fmt.Sprintf("scripts/ArtifactInstall_Enter_00_%d", i)})
		}
		return k.build(t)
	}
	kinds["payload files"] = func(n int) []byte {
		k := newKit("mod")
		for i := range n / 700 {
			k.files = append(k.files, tarMember{name: fmt.Sprintf("f%d", i)})
		}
		return k.build(t)
	}
	kinds["manifest"] = func(n int) []byte {
		k := newKit("mod", tarMember{name: "a"})
		k.manifest = func(lines []string) []string {
			for i := range min(n/80, maxMembers-10) {
				lines = append(lines, fmt.Sprintf("%064x  data/0000/f%d\n", i, i))
			}
			return lines
		}
		return k.build(t)
	}
}

// What is allocated for an artifact is bounded by its size, but for the dictionary and what the program has in any
// case.
func TestWorkAllocates(t *testing.T) {
	for name, kind := range workKinds(t) {
		b := kind(100_000)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		readAll(b, artifactOptions{dictLimit: 8 << 20})
		runtime.ReadMemStats(&after)
		if n := after.NumForcedGC - before.NumForcedGC; n > 40 {
			t.Errorf("%s: %d garbage collections asked for", name, n)
		}
		// Dictionaries are of sizes that grow by half or a third, so all together less than four times the last.
		if n := after.TotalAlloc - before.TotalAlloc; n > 4*8<<20+2<<20+100*uint64(len(b)) {
			t.Errorf("%s: %d bytes allocated for %d", name, n, len(b))
		} else {
			t.Logf("%-40s %9d bytes allocated for %7d", name, n, len(b))
		}
	}
}

// What is done for an artifact is bounded by its size: the statements that "show" goes through are counted, by a
// program that was built to count them.
func TestWorkPerByte(t *testing.T) {
	onlyExhaustive(t, "builds the program anew")
	needTool(t, "go")
	dir := t.TempDir()
	program := dir + "/mendlet"
	build := exec.Command("go", "build", "-cover", "-covermode=count", "-o", program,
		"-coverpkg=mendlet,encoding/json,encoding/hex", ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	steps := func(b []byte) int { return statements(t, program, b) }
	always := steps(newKit("mod", tarMember{name: "a"}).build(t))
	const n = 30_000
	for name, kind := range workKinds(t) {
		one, four := kind(n), kind(4*n)
		few, many := steps(one)-always, steps(four)-always
		t.Logf("%-40s %6.1f statements for each of %d bytes, %6.1f of %d", name,
			float64(few)/float64(len(one)), len(one), float64(many)/float64(len(four)), len(four))
		// The most has LZMA2, where 12 bytes may set all probabilities of the decoder anew.
		if many > 1500*len(four) {
			t.Errorf("%s: %d statements for %d bytes", name, many, len(four))
		}
		// Not more for each byte because there are more of them.
		if growth := float64(len(four)) / float64(len(one)); float64(many) > 1.3*growth*float64(max(few, 100_000)) {
			t.Errorf("%s: %d statements for %d bytes, %d for %d", name, few, len(one), many, len(four))
		}
	}
}

// statements runs the program over an artifact and adds up how often each block of statements was entered.
func statements(t *testing.T, program string, artifact []byte) (sum int) {
	t.Helper()
	counts := t.TempDir()
	cmd := exec.Command(program, "show", writeTemp(t, "work.mender", artifact))
	cmd.Env = append(os.Environ(), "GOCOVERDIR="+counts)
	if out, err := cmd.CombinedOutput(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != exitRefused {
			t.Fatalf("%v: %s", err, out)
		}
	}
	text := counts + "/text"
	if out, err := exec.Command("go", "tool", "covdata", "textfmt", "-i="+counts,
		"-o="+text).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for line := range strings.Lines(string(readFileOrNil(text))) {
		if f := strings.Fields(line); len(f) == 3 {
			size, _ := strconv.Atoi(f[1])
			times, _ := strconv.Atoi(f[2])
			sum += size * times
		}
	}
	if sum == 0 {
		t.Fatalf("nothing counted in %s", filepath.Base(counts))
	}
	return sum
}
