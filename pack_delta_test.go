// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// deltaImage is an image of n bytes with zeros in its middle.
func deltaImage(seed int64, n int) []byte {
	p := testImage(seed, n)
	clear(p[n/2 : n/2+n/8])
	return p
}

// dataMember is the data of an artifact as it is stored.
func dataMember(t testing.TB, artifact []byte) []byte {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(artifact))
	for {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(h.Name, "data/") {
			data, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			return data
		}
	}
}

// nextMember reads one gzip member with the standard library: what it holds, its extra field, its length.
func nextMember(t testing.TB, data []byte) (body, extra []byte, stored int) {
	t.Helper()
	from := bytes.NewReader(data)
	r := bufio.NewReaderSize(from, 16)
	z, err := gzip.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	z.Multistream(false)
	if body, err = io.ReadAll(z); err != nil {
		t.Fatal(err)
	}
	return body, z.Extra, len(data) - from.Len() - r.Buffered()
}

// storedIndex finds the index of a delta artifact as doc/delta.md says.
func storedIndex(t testing.TB, artifact []byte) (*deltaIndex, *deltaInfo) {
	t.Helper()
	a, files, err := readAll(artifact, artifactOptions{})
	if err != nil {
		t.Fatal(err)
	}
	info, err := parseDeltaInfo(a.MetaData)
	if err != nil || info == nil {
		t.Fatalf("meta-data %s: got %v, %v", a.MetaData, info, err)
	}
	data := dataMember(t, artifact)
	_, _, at := nextMember(t, data)
	var raw []byte
	for range info.Members {
		body, extra, n := nextMember(t, data[at:])
		at += n
		if len(body) > 0 || len(extra) < 4 || string(extra[:2]) != "MX" ||
			int(binary.LittleEndian.Uint16(extra[2:])) != len(extra)-4 {
			t.Fatalf("got %d bytes, extra field %.20q", len(body), extra)
		}
		raw = append(raw, extra[4:]...)
	}
	for _, image := range files {
		x, err := parseDeltaIndex(raw, info, int64(len(image)))
		if err != nil {
			t.Fatal(err)
		}
		if x.first != int64(at)+imageHead {
			t.Errorf("the image begins at %d, want %d", x.first-imageHead, at)
		}
		return x, info
	}
	t.Fatal("no file")
	return nil, nil
}

// TestPackDelta makes delta artifacts: the same bytes each time, the image as it was, the same tar as without an index,
// and an index that is true of each member.
func TestPackDelta(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		arg     string
		average int64
		image   []byte
	}{
		{"--delta", 32 << 10, deltaImage(1, 1<<20+777)},
		{"--delta=16k", 16 << 10, deltaImage(2, 300<<10)},
		{"--delta=32k", 32 << 10, []byte("x")},
		{"--delta=64k", 64 << 10, make([]byte, 1<<20)},
		{"--delta=64k", 64 << 10, noise(3, 600<<10+1)},
		{"--delta", 32 << 10, nil},
		{"--delta", 16 << 10, append([]byte("hsqs"), noise(4, 300<<10)...)},
		{"--delta", 16 << 10, slices.Concat(make([]byte, 1024), []byte("\xe2\xe1\xf5\xe0"), noise(5, 300<<10))},
		{"--delta=32k", 32 << 10, append([]byte("hsqs"), noise(6, 300<<10)...)},
	} {
		img := writeTemp(t, "rootfs.img", c.image)
		args := []string{"-n", "rel", "-c", "dev", "-f", img}
		made := packed(t, append(args, c.arg)...)
		if !bytes.Equal(made, packed(t, append(args, c.arg)...)) {
			t.Errorf("%s: the same input gave other bytes", c.arg)
		}
		x, _ := storedIndex(t, made)
		if x.average != c.average {
			t.Errorf("%s: got an average of %d", c.arg, x.average)
		}
		data, tarBytes := dataMember(t, made), []byte(nil)
		head, _, n := nextMember(t, data)
		if int64(n) != x.head || len(head) != 512 {
			t.Errorf("%s: first member of %d, with %d bytes", c.arg, n, len(head))
		}
		image, _, whole := nextMember(t, data[x.first-imageHead:])
		if !bytes.Equal(image, c.image) || int(x.end+imageTail-x.first+imageHead) != whole {
			t.Errorf("%s: %d bytes of an image in %d, want %d in %d", c.arg, len(image), whole, len(c.image), x.end)
		}
		at, from := x.first, 0
		for i, want := range x.chunks {
			// With an empty last block in the place of the next chunk, each one is a stream of its own behind its window.
			part := slices.Concat(data[at:at+int64(want.stored)], []byte{3, 0})
			in := bytes.NewReader(part)
			body, err := io.ReadAll(flate.NewReaderDict(in, c.image[max(from-32<<10, 0):from]))
			if err != nil || in.Len() > 0 || !bytes.HasPrefix(c.image[from:], body) {
				t.Fatalf("%s: chunk %d: %v, %d bytes left", c.arg, i, err, in.Len())
			}
			got := describe(body)
			if got.stored = want.stored; got != want || want.stored > want.size+10 {
				t.Fatalf("%s: chunk %d is %+v, the index says %+v", c.arg, i, got, want)
			}
			at, from = at+int64(want.stored), from+len(body)
		}
		rest := c.image[from:]
		tail, _, n := nextMember(t, data[at+imageTail:])
		if at += imageTail; at != x.end+imageTail || int(at)+n != len(data) || len(rest) > 0 {
			t.Errorf("%s: the last member begins at %d and has %d bytes of %d, want %d", c.arg, at, n, len(data), x.end)
		}
		tarBytes = slices.Concat(head, c.image, tail)
		plain, _, _ := nextMember(t, dataMember(t, packed(t, args...)))
		if !bytes.Equal(tarBytes, plain) {
			t.Errorf("%s: the tar is another one than without --delta", c.arg)
		}
	}
}

// TestPackDeltaMetaData keeps what the user has in the meta-data.
func TestPackDeltaMetaData(t *testing.T) {
	t.Parallel()
	img := writeTemp(t, "rootfs.img", deltaImage(1, 100<<10))
	args := []string{"--delta", "-n", "rel", "-c", "dev", "-f", img, "-m"}
	meta := writeTemp(t, "meta", []byte(`{"z": [1, "<"], "a": {"b": null}}`))
	a, _, err := readAll(packed(t, append(args, meta)...), artifactOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got := string(a.MetaData)
	if !strings.HasPrefix(got, `{"a":{"b":null},"mendlet_delta":{"version":2,"members":1,"size":`) ||
		!strings.HasSuffix(got, `"},"z":[1,"\u003c"]}`) {
		t.Errorf("got %s", got)
	}
	taken := writeTemp(t, "taken", []byte(`{"mendlet_delta": 1}`))
	if err := packCommand(append(args, taken, "-o", "-"), io.Discard, nil); err == nil {
		t.Error("meta-data with a mendlet_delta of its own was taken")
	}
}

func TestPackDeltaUsage(t *testing.T) {
	t.Parallel()
	img := writeTemp(t, "rootfs.img", deltaImage(1, 100<<10))
	for _, args := range []string{
		"--delta --compression xz", "--delta --compression none", "--delta=8k", "--delta=false", "--delta=", "--delta -T mod",
	} {
		words := append(strings.Fields(args), "-n", "rel", "-c", "dev", "-f", img, "-o", "-")
		if err := packCommand(words, io.Discard, nil); exitCode(err) != exitUsage {
			t.Errorf("%s: got %v, want a usage error", args, err)
		}
	}
	words := []string{"--delta", "--bootstrap", "-n", "rel", "-c", "dev", "-o", "-"}
	if err := packCommand(words, io.Discard, nil); exitCode(err) != exitUsage {
		t.Errorf("bootstrap: got %v, want a usage error", err)
	}
}

// TestPackDeltaErrors: an error of the image and one of the output end it, at whichever chunk they come.
func TestPackDeltaErrors(t *testing.T) {
	t.Parallel()
	image := deltaImage(1, 2<<20)
	bad := errors.New("bad")
	for _, n := range []int{0, 1, 300 << 10, 1 << 20} {
		r := io.MultiReader(bytes.NewReader(image[:n]), iotest.ErrReader(bad))
		if err := (&packedDelta{average: minAverage}).write(io.Discard, r, make([]byte, 512)); !errors.Is(err, bad) {
			t.Errorf("image ends with an error at %d: got %v", n, err)
		}
		w := &fullWriter{left: n / 16, err: bad}
		err := (&packedDelta{average: minAverage}).write(w, bytes.NewReader(image), make([]byte, 512))
		if !errors.Is(err, bad) {
			t.Errorf("output full at %d: got %v", n/16, err)
		}
	}
}

// fullWriter takes left bytes more.
type fullWriter struct {
	left int
	err  error
}

func (w *fullWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, w.err
	}
	return len(p), nil
}

// TestPackDeltaStock gives delta artifacts to programs that know nothing of them: each takes them, and the image is the
// same byte for byte.
func TestPackDeltaStock(t *testing.T) {
	t.Parallel()
	image := deltaImage(4, 2<<20+100)
	img := writeTemp(t, "rootfs.img", image)
	_, key := newKeys(t)
	private, public := keyPair(t, "PRIVATE KEY", key)
	path := writeTemp(t, "a.mender", packed(t, "--delta=16k", "-n", "rel", "-c", "dev", "-f", img, "-k", private))
	data := writeTemp(t, "0000.tar.gz", dataMember(t, readFileOrNil(path)))
	for name, c := range map[string]struct {
		tool, script string // $1 is the artifact, $2 its data member, $3 the public key
	}{
		"validate": {"mender-artifact", `mender-artifact validate -k "$3" "$1" >&2; cat ` + img},
		"read":     {"mender-artifact", `mender-artifact read -k "$3" "$1" >&2; cat ` + img},
		"dump":     {"mender-artifact", `cd "$(dirname "$1")"; mender-artifact dump --files d "$1" >&2; cat d/rootfs.img`},
		"gzip":     {"gzip", `gzip -t "$2"; gzip -dc "$2" | tar xO`},
		"bsdtar":   {"bsdtar", `bsdtar xOf "$1" data/0000.tar.gz | bsdtar xOf -`},
		"busybox":  {"busybox", `busybox tar xOf "$1" data/0000.tar.gz | busybox gunzip -c | busybox tar xO`},
		"python3": {"python3", `python3 -c 'import sys, tarfile
sys.stdout.buffer.write(tarfile.open(sys.argv[1]).extractfile("rootfs.img").read())' "$2"`},
	} {
		t.Run(name, func(t *testing.T) {
			needTool(t, c.tool)
			cmd := exec.Command("sh", "-ec", c.script, "sh", path, data, public)
			var errs bytes.Buffer
			cmd.Stderr = &errs
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v\n%s", err, &errs)
			}
			if !bytes.Equal(out, image) {
				t.Errorf("got %d bytes, which are not the image of %d\n%s", len(out), len(image), &errs)
			}
		})
	}
}

// TestPackDeltaSize: a delta artifact costs a device that reads all of it little more.
func TestPackDeltaSize(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("/proc/self/exe") // megabytes of code and tables
	if err != nil {
		t.Skip(err)
	}
	img := writeTemp(t, "rootfs.img", text[:min(len(text), 2<<20)])
	args := []string{"-n", "rel", "-c", "dev", "-f", img}
	plain, delta := len(packed(t, args...)), len(packed(t, append(args, "--delta")...))
	t.Logf("%d bytes with --delta, %d without", delta, plain)
	if delta > plain*106/100 {
		t.Errorf("got %d bytes with --delta and %d without: %+.1f %%, want at most 6", delta, plain,
			100*float64(delta-plain)/float64(plain))
	}
}

// TestShowDelta prints an index that is true, and says of any other one what is wrong; the artifact is good in any
// case.
func TestShowDelta(t *testing.T) {
	t.Parallel()
	img := writeTemp(t, "rootfs.img", deltaImage(1, 1<<20))
	made := packed(t, "--delta=16k", "-n", "rel", "-c", "dev", "-f", img)
	x, info := storedIndex(t, made)
	raw := x.encode()
	lie := *x
	lie.chunks = slices.Clone(x.chunks)
	lie.chunks[1].sum++
	longer := *x
	longer.chunks = slices.Clone(x.chunks)
	longer.chunks[0].stored++
	damaged := bytes.Clone(raw)
	damaged[0] ^= 1
	for name, c := range map[string]struct {
		raw  []byte
		info *deltaInfo
		want string // "": the figures
	}{
		"true":              {raw, info, ""},
		"damaged":           {damaged, info, "sha256"},
		"damaged and known": {damaged, x.info(damaged), "delta index"},
		"a lie":             {lie.encode(), x.info(lie.encode()), "chunk 1 is another one"},
		"other lengths":     {longer.encode(), x.info(longer.encode()), ""}, // found by who goes there
		"no such version":   {raw, &deltaInfo{Version: 2}, "mendlet_delta in meta-data"},
	} {
		a, err := openArtifact(bytes.NewReader(bytes.Replace(made, raw, c.raw, 1)), artifactOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if a.MetaData, err = (&packedDelta{info: c.info}).addInfo(nil); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := showCommand(a, false, &out); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		want := fmt.Sprintf("%d chunks of 16 KiB on average, index of %d bytes\n", len(x.chunks), len(raw))
		if c.want != "" {
			want = "no use: "
		}
		if _, line, _ := strings.Cut(out.String(), "\ndelta:         "); !strings.HasPrefix(line, want) ||
			!strings.Contains(line, c.want) {
			t.Errorf("%s: got %q, want %q and %q", name, line, want, c.want)
		}
	}
	var out bytes.Buffer
	a, _, err := readAll(packed(t, "-n", "rel", "-c", "dev", "-f", img), artifactOptions{})
	if err != nil || a.MetaData != nil {
		t.Fatal(a, err)
	}
	plain := packed(t, "-n", "rel", "-c", "dev", "-f", img)
	if a, err = openArtifact(bytes.NewReader(plain), artifactOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := showCommand(a, false, &out); err != nil || strings.Contains(out.String(), "delta:") {
		t.Errorf("without an index: %v, %s", err, &out)
	}
}

// TestDeltaInstallsAsGzip installs one from a file, in the recovery build, too: the index is passed over.
func TestDeltaInstallsAsGzip(t *testing.T) {
	t.Parallel()
	b := newImageBoard(t)
	image := deltaImage(1, 900<<10)
	img := writeTemp(t, "rootfs.img", image)
	made := packed(t, "--delta=16k", "-n", "release-2", "-c", "testboard", "-f", img)
	b.must(t, exitOK, "install", writeTemp(t, "a.mender", made))
	if got := readFileOrNil(b.b); !bytes.HasPrefix(got, image) {
		t.Error("slot B does not have the image")
	}
	damaged := bytes.Clone(made)
	x, _ := storedIndex(t, made)
	raw := x.encode()
	damaged[bytes.Index(made, raw)+len(raw)/2] ^= 1 // of no concern to one who reads all
	b = newImageBoard(t)
	b.must(t, exitOK, "install", writeTemp(t, "a.mender", damaged))
	if got := readFileOrNil(b.b); !bytes.HasPrefix(got, image) {
		t.Error("damaged index: slot B does not have the image")
	}
}
