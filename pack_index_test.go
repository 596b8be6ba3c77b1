// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
)

// runIndex is the verb with these words.
func runIndex(t *testing.T, words ...string) (code int, out, errs string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	none := writeTemp(t, "mender.conf", []byte("{}"))
	words = append([]string{"mendlet", "-c", none, "-b", none, "index"}, words...)
	code = runProgram(t.Context(), words, strings.NewReader(""), &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

// TestIndexVerb says of old versions of all kinds what a device would fetch.
func TestIndexVerb(t *testing.T) {
	t.Parallel()
	image := deltaImage(1, 3<<20)
	img := writeTemp(t, "rootfs.img", image)
	pack := func(file string, more ...string) string {
		return writeTemp(t, "a.mender", packed(t, append(more, "-n", "rel", "-c", "dev", "-f", file)...))
	}
	made := pack(img, "--delta=16k")
	old := slices.Concat(image[:1<<20], noise(3, 50<<10), image[1<<20+100<<10:])
	oldImage := writeTemp(t, "old.img", old)
	other := writeTemp(t, "other.img", noise(2, 1<<20))
	olds := []string{img, oldImage, pack(oldImage), pack(oldImage, "--delta=64k"), pack(oldImage, "--compression", "xz"),
		pack(oldImage, "--compression", "none"), other}
	code, out, errs := runIndex(t, append([]string{"--json", made}, olds...)...)
	if code != exitOK || errs != "" {
		t.Fatalf("exit code %d, %s", code, errs)
	}
	var r indexReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	x, info := storedIndex(t, readFileOrNil(made))
	if r.Name != "rel" || r.Size > int64(len(readFileOrNil(made))) || r.Size < x.end || r.Delta.Size != info.Size ||
		r.Delta.Average != 16<<10 || r.Delta.Chunks != len(x.chunks) || len(r.Old) != len(olds) {
		t.Fatalf("got %+v, %+v", r, r.Delta)
	}
	for i, c := range r.Old {
		if c.File != olds[i] || math.Abs(c.Percent-100*float64(c.Bytes)/float64(r.Size)) > 0.1 {
			t.Errorf("got %+v for %s", c, olds[i])
		}
	}
	same, changed, whole := r.Old[0], r.Old[1], r.Old[6]
	if head := r.Size - x.end; same.Missing != 0 || same.Bytes < info.Size || same.Bytes > info.Size+head+1000 ||
		same.Requests != 2 || same.Zeros < 200<<10 {
		t.Errorf("of the same image: got %+v", same)
	}
	if changed.Missing < 100<<10 || changed.Missing > 300<<10 || changed.Requests != 3 || changed.Whole {
		t.Errorf("of a changed image: got %+v", changed)
	}
	for _, c := range r.Old[2:6] {
		if c.File = changed.File; c != changed {
			t.Errorf("of the same in an artifact: got %+v, want %+v", c, changed)
		}
	}
	if !whole.Whole || whole.Bytes != r.Size || whole.Requests != 1 || whole.Percent != 100 {
		t.Errorf("of another image: got %+v", whole)
	}
	_, out, _ = runIndex(t, made, oldImage, other)
	want := fmt.Sprintf("rel: %s, %d chunks of 16 KiB on average, index of %d bytes\n"+
		"from %q: %d bytes, %.1f %%, in 3 requests\nfrom %q: %d bytes, 100.0 %%, the whole\n", mega(r.Size), len(x.chunks),
		info.Size, oldImage, changed.Bytes, changed.Percent, other, r.Size)
	if out != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

// TestIndexLimits lets a build fail.
func TestIndexLimits(t *testing.T) {
	t.Parallel()
	img := writeTemp(t, "rootfs.img", noise(1, 1<<20))
	made := writeTemp(t, "a.mender", packed(t, "--delta=16k", "-n", "rel", "-c", "dev", "-f", img))
	half := writeTemp(t, "half.img", noise(1, 1<<20)[:600<<10])
	for _, c := range []struct {
		limit, old string
		code       int
	}{
		{"--max-percent=10", img, exitOK}, {"--max-percent=0.1", img, exitFailed}, {"--max-percent=10", half, exitFailed},
		{"--max-percent=60", half, exitOK}, {"--max-bytes=100000", half, exitFailed}, {"--max-bytes=900000", half, exitOK},
	} {
		code, out, errs := runIndex(t, c.limit, made, c.old)
		if code != c.code || !strings.Contains(out, c.old) || (code != exitOK) != strings.Contains(errs, "want at most") {
			t.Errorf("%s: exit code %d, want %d; %s%s", c.limit, code, c.code, out, errs)
		}
	}
}

func TestIndexRefusals(t *testing.T) {
	t.Parallel()
	img := writeTemp(t, "rootfs.img", noise(1, 1<<20))
	module := writeTemp(t, "module.mender", packed(t, "-T", "mod", "-n", "rel", "-c", "dev", "-f", img))
	made := packed(t, "--delta", "-n", "rel", "-c", "dev", "-f", img)
	good := writeTemp(t, "a.mender", made)
	cut := writeTemp(t, "cut.mender", made[:len(made)/2])
	x, _ := storedIndex(t, made)
	bad := writeTemp(t, "bad.mender", bytes.Replace(made, x.encode(), noise(1, len(x.encode())), 1))
	plain := writeTemp(t, "plain.mender", packed(t, "-n", "rel", "-c", "dev", "-f", img))
	packed := writeTemp(t, "rootfs.gz", []byte("\x1f\x8b\x08\x00"+strings.Repeat("x", 1000)))
	for _, c := range []struct {
		words []string
		code  int
		says  string
	}{
		{[]string{good}, exitUsage, "words"},
		{nil, exitUsage, "words"},
		{[]string{plain, img}, exitFailed, "no index"},
		{[]string{module, img}, exitFailed, "no index"},
		{[]string{img, img}, exitRefused, "not a Mender artifact"},
		{[]string{bad, img}, exitRefused, "sha256"},
		{[]string{good, cut}, exitRefused, "cut off"},
		{[]string{good, module}, exitFailed, "want rootfs-image"},
		{[]string{good, packed}, exitFailed, "compressed with gzip"},
		{[]string{good, "/nowhere"}, exitFailed, "/nowhere"},
	} {
		if code, _, errs := runIndex(t, c.words...); code != c.code || !strings.Contains(errs, c.says) {
			t.Errorf("%q: got exit code %d and %s, want %d and %q", c.words, code, errs, c.code, c.says)
		}
	}
}

// TestPackDeltaMenderClient has Debian's mender-client 3.4.0 install a delta artifact: the slot holds the image, byte
// for byte.
func TestPackDeltaMenderClient(t *testing.T) {
	b := newMenderBoard(t)
	root := b.root("release-2")
	copy(root[1<<20:], testImage(1, 1<<20))
	img := writeTemp(t, "rootfs.img", root)
	made := b.dir + "/delta.mender"
	b.want(0, "", "pack", "--delta=16k", "-n", "release-2", "-c", "qemu", "-f", img, "-o", made)
	b.mender("install", made)
	if got := readFileOrNil(b.slots["3"]); !bytes.HasPrefix(got, root) {
		t.Errorf("slot B has %d bytes, which are not the image of %d", len(got), len(root))
	}
}
