// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ulikunitz/xz"
)

// restartCases are data members of every kind, with how many restart points at least they
// have for 1.3 MB; the first four and last four are resumed from.
var restartCases = []struct {
	name, suffix string
	points       int
	compress     func(t testing.TB, b []byte) []byte
}{
	{"none", "", 20, func(_ testing.TB, b []byte) []byte { return b }},
	{"gzip flushed", ".gz", 12, func(t testing.TB, b []byte) []byte { return gzipped(t, b, 6, len(b), 100<<10) }},
	{"gzip flushed at windows", ".gz", 18, func(t testing.TB,
		b []byte) []byte {
		return gzipped(t, b, 6, len(b), 64<<10)
	}},
	{"gzip stored", ".gz", 11, func(t testing.TB, b []byte) []byte { return gzipped(t, b, 0, len(b), 100<<10) }},
	{"gzip huffman only", ".gz", 11, func(t testing.TB,
		b []byte) []byte {
		return gzipped(t, b, gzip.HuffmanOnly, len(b), 100<<10)
	}},
	{"gzip members", ".gz", 12, func(t testing.TB, b []byte) []byte { return gzipped(t, b, 6, 100<<10, 0) }},
	{"gzip members flushed", ".gz", 18, func(t testing.TB,
		b []byte) []byte {
		return gzipped(t, b, 1, 300<<10, 64<<10)
	}},
	{"gzip members, zeros", ".gz", 12, func(t testing.TB, b []byte) []byte {
		return append(gzipped(t, b, 6, 100<<10, 0), make([]byte, 300<<10)...)
	}},
	{"gzip not flushed", ".gz", 4, func(t testing.TB, b []byte) []byte { return gzipped(t, b, 6, len(b), 0) }},
	{"gzip program", ".gz", 4, func(t testing.TB, b []byte) []byte { return piped(t, b, "gzip", "-9") }},
	{"xz blocks", ".xz", 9, func(t testing.TB, b []byte) []byte {
		return xzipped(t, b, xz.WriterConfig{DictCap: 64 << 10, BlockSize: 128 << 10})
	}},
	{"xz blocks, no check", ".xz", 9, func(t testing.TB, b []byte) []byte {
		return xzipped(t, b, xz.WriterConfig{DictCap: 256 << 10, BlockSize: 128 << 10, NoCheckSum: true})
	}},
	{"xz blocks, SHA-256", ".xz", 4, func(t testing.TB, b []byte) []byte {
		return xzipped(t, b, xz.WriterConfig{DictCap: 4096, BlockSize: 256 << 10, CheckSum: xz.SHA256})
	}},
	{"xz one block", ".xz", 0, func(t testing.TB, b []byte) []byte {
		return xzipped(t, b,
			xz.WriterConfig{CheckSum: xz.CRC32})
	}},
	{"xz program, sizes in headers", ".xz", 12, func(t testing.TB, b []byte) []byte {
		return piped(t, b, "xz", "-zc", "-T2", "--block-size=100KiB", "--check=crc32")
	}},
	{"xz streams", ".xz", 12, func(t testing.TB, b []byte) (packed []byte) {
		for part := range slices.Chunk(b, 100<<10) {
			packed = slices.Concat(packed, xzipped(t, part, xz.WriterConfig{DictCap: 64 << 10}), make([]byte, 8))
		}
		return packed
	}},
	{"xz streams of blocks", ".xz", 12, func(t testing.TB, b []byte) (packed []byte) {
		for part := range slices.Chunk(b, 500<<10) {
			packed = append(packed, xzipped(t, part, xz.WriterConfig{DictCap: 64 << 10, BlockSize: 100 << 10})...)
		}
		return packed
	}},
	{"xz program, filters", ".xz", 12, func(t testing.TB, b []byte) []byte {
		return piped(t, b, "xz", "-zc", "-T2", "--block-size=100KiB", "--x86", "--delta=dist=3", "--lzma2=preset=1")
	}},
	{"xz program, noise", ".xz", 0, func(t testing.TB, b []byte) []byte { return piped(t, b, "xz", "-zc", "-0") }},
	{"zstd frames", ".zst", 12, func(t testing.TB, b []byte) (packed []byte) {
		for part := range slices.Chunk(b, 100<<10) {
			packed = append(packed, piped(t, part, "zstd", "-qc")...)
		}
		return packed
	}},
	{"zstd one frame", ".zst", 0, func(t testing.TB, b []byte) []byte { return piped(t, b, "zstd", "-qc") }},
}

// restartImage has the marker's own bytes in it, stored as they are by some compressors.
func restartImage() []byte {
	b := testImage(7, 1300*1000+77)
	copy(b[200<<10:], bytes.Repeat([]byte("\x00\x00\xff\xff"), 30<<10))
	return b
}

type seenPoint struct {
	p    restartPoint
	read int // bytes of the file read when it was the latest
}

// pointsOf reads the payload file in pieces of n bytes and lists the restart points, each
// with how much was read just before the next one came. It checks that they are in order.
func pointsOf(t *testing.T, a *artifact, f *payloadFile, n int) []seenPoint {
	t.Helper()
	var seen []seenPoint
	buf := make([]byte, n)
	for read := 0; ; {
		k, err := io.ReadFull(f, buf)
		read += k
		if p, ok := a.latestRestart(); ok {
			if p.Out > f.TarOffset+int64(read) {
				t.Fatalf("point %+v is after the %d bytes read", p, read)
			}
			if len(seen) == 0 || p != seen[len(seen)-1].p {
				seen = append(seen, seenPoint{p: p})
			}
			seen[len(seen)-1].read = read
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return seen
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// resumeAt opens the artifact anew, reads a little of the file and goes on from s.
func resumeAt(b []byte, image []byte, s seenPoint) ([]byte, error) {
	a, err := openArtifact(bytes.NewReader(b), artifactOptions{})
	if err != nil {
		return nil, err
	}
	f, err := a.nextFile()
	if err == nil {
		_, err = io.CopyN(io.Discard, f, 100)
	}
	if err != nil {
		return nil, err
	}
	at := s.p.Out - f.TarOffset
	var window []byte
	if !s.p.Fresh {
		window = image[at-gzipWindow : at]
	}
	// One byte reads and data with the error are both legal for a reader.
	r := iotest.DataErrReader(bytes.NewReader(b[s.p.File:]))
	if f, err = a.resumePayload(s.p, window, r, f.Name, int64(s.read)); err != nil {
		return nil, err
	}
	rest, err := io.ReadAll(f.unhashed())
	if err != nil {
		return rest, err
	}
	if err := f.verify(sha256.Sum256(append(slices.Clone(image[:s.read]), rest...))); err != nil {
		return rest, err
	}
	if _, err := a.nextFile(); err != io.EOF {
		return rest, errors.Join(errors.New("after the file"), err)
	}
	return rest, nil
}

func TestRestart(t *testing.T) {
	t.Parallel()
	image := restartImage()
	for _, c := range restartCases {
		t.Run(c.name, func(t *testing.T) {
			k := newKit("mod", tarMember{name: "image", body: image})
			k.data = func(b []byte) (string, []byte) { return "data/0000.tar" + c.suffix, c.compress(t, b) }
			b := k.build(t)
			for _, n := range []int{len(image), 1000, 40000} {
				a, err := openArtifact(bytes.NewReader(b), artifactOptions{})
				if err != nil {
					t.Fatal(err)
				}
				f, err := a.nextFile()
				if err != nil {
					t.Fatal(err)
				}
				seen := pointsOf(t, a, f, n)
				if n < len(image) && len(seen) < c.points {
					t.Errorf("reading by %d bytes: %d restart points, want %d", n, len(seen), c.points)
				}
				if len(seen) > 8 {
					seen = append(seen[:4], seen[len(seen)-4:]...)
				}
				for _, s := range seen {
					rest, err := resumeAt(b, image, s)
					if err != nil || !bytes.Equal(rest, image[s.read:]) {
						t.Fatalf("reading by %d bytes: resumed at %+v: %v", n, s, err)
					}
				}
			}
		})
	}
}

// What mender-artifact and pack write has a point in every MiB of the tar, or in every block of xz.
func TestRestartPointsOfRealArtifacts(t *testing.T) {
	t.Parallel()
	img := writeTemp(t, "rootfs.img", testImage(9, 4<<20+99999))
	bigger := writeTemp(t, "bigger.img", slices.Concat(make([]byte, 12<<20), testImage(9, 1<<18)))
	made := t.TempDir() + "/made.mender"
	for name, b := range map[string][]byte{
		"fixture": fixture(t, "rootfs-gzip.mender"),
		"pack":    packed(t, "-n", "r", "-c", "d", "-f", img),
		"pack xz": packed(t, "-n", "r", "-c", "d", "-f", bigger, "--compression", "xz"),
		"mender-artifact": func() []byte {
			if _, err := exec.LookPath("mender-artifact"); err != nil {
				return nil
			}
			out, err := exec.Command("mender-artifact", "write", "rootfs-image", "-n", "r", "-t", "d", "-f", img,
				"-o", made).CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			return readFileOrNil(made)
		}(),
	} {
		if b == nil {
			continue
		}
		_, files, err := readAll(b, artifactOptions{})
		if err != nil {
			t.Fatal(err)
		}
		a, _ := openArtifact(bytes.NewReader(b), artifactOptions{})
		f, _ := a.nextFile()
		step := int64(packFlush)
		if strings.HasSuffix(name, "xz") {
			step = packBlock
		}
		image := files[f.Name]
		seen := pointsOf(t, a, f, 100000)
		last := int64(0)
		for _, s := range append(seen, seenPoint{p: restartPoint{Out: f.Size}}) {
			if s.p.Out-last > step {
				t.Errorf("%s: no point between %d and %d", name, last, s.p.Out)
			}
			last = s.p.Out
		}
		for _, s := range seen {
			if rest, err := resumeAt(b, image, s); err != nil || !bytes.Equal(rest, image[s.read:]) {
				t.Errorf("%s: resumed at %+v: %v", name, s, err)
			}
		}
	}
}

// A resumed stream is checked to its end as any other, and a wrong window or a changed
// artifact (field case 12) cannot pass.
func TestResumeRefuses(t *testing.T) {
	t.Parallel()
	image := restartImage()
	for _, c := range restartCases {
		if !slices.Contains([]string{"none", "gzip flushed", "gzip members", "gzip members, zeros",
			"xz blocks", "xz streams of blocks"}, c.name) {
			continue
		}
		k := newKit("mod", tarMember{name: "image", body: image})
		k.data = func(b []byte) (string, []byte) { return "data/0000.tar" + c.suffix, c.compress(t, b) }
		b := k.build(t)
		a, _ := openArtifact(bytes.NewReader(b), artifactOptions{})
		f, _ := a.nextFile()
		seen := pointsOf(t, a, f, 50000)
		s := seen[len(seen)/2]
		if _, err := resumeAt(b, image, s); err != nil {
			t.Fatal(err)
		}
		for cut := len(b) - 1; cut > int(s.p.File); cut -= 1 + (len(b)-cut)/2 {
			if _, err := resumeAt(b[:cut], image, s); err == nil {
				t.Fatalf("%s: cut off at %d of %d: accepted", c.name, cut, len(b))
			}
		}
		if _, err := resumeAt(append(slices.Clone(b), 1), image, s); err == nil {
			t.Errorf("%s: byte after the end: accepted", c.name)
		}
		for off := int(s.p.File); off < len(b); off += 1 + (len(b)-int(s.p.File))/10 {
			bad := slices.Clone(b)
			bad[off] ^= 0x20
			rest, err := resumeAt(bad, image, s)
			if err == nil && !bytes.Equal(rest, image[s.read:]) {
				t.Fatalf("%s: byte %d changed: accepted", c.name, off)
			}
		}
		other := slices.Clone(image)
		clear(other[:s.read])
		if rest, err := resumeAt(b, other, s); err == nil {
			t.Errorf("%s: wrong window accepted, got right bytes: %v", c.name, bytes.Equal(rest, image[s.read:]))
		}
	}
}

// A reader that fails is not an artifact that is wrong.
func TestReadErrorIsPassedOn(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken pipe")
	for _, name := range []string{"rootfs-gzip", "rootfs-xz", "rootfs-zstd", "module-no-files"} {
		b := fixture(t, name+".mender")
		for cut := 0; cut < len(b); cut += 1 + len(b)/12 {
			a, err := openArtifact(io.MultiReader(bytes.NewReader(b[:cut]), iotest.ErrReader(broken)),
				artifactOptions{})
			for err == nil {
				var f *payloadFile
				if f, err = a.nextFile(); err == nil {
					_, err = io.Copy(io.Discard, f)
				}
			}
			if !errors.Is(err, broken) || exitCode(err) != exitFailed {
				t.Fatalf("%s, read error at %d: %v, exit code %d", name, cut, err, exitCode(err))
			}
		}
	}
}

func BenchmarkUnpack(b *testing.B) {
	image := testImage(3, 8<<20)
	img := writeTemp(b, "rootfs.img", image)
	for _, kind := range []string{"none", "gzip", "xz"} {
		art := packed(b, "-n", "r", "-c", "d", "-f", img, "--compression", kind)
		b.Run(kind, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(image)))
			buf := make([]byte, 1<<20)
			for b.Loop() {
				a, err := openArtifact(struct{ io.Reader }{bytes.NewReader(art)}, artifactOptions{dictLimit: 64 << 20})
				if err != nil {
					b.Fatal(err)
				}
				f, err := a.nextFile()
				if err != nil {
					b.Fatal(err)
				}
				for r := f.unhashed(); err == nil; {
					_, err = r.Read(buf)
				}
				if err != io.EOF {
					b.Fatal(err)
				}
			}
		})
	}
}
