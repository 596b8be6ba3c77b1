// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
)

// tarBlock is the header of a member and what belongs to it, padded.
func tarBlock(kind byte, name string, size int64, body string) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000600\x000000000\x000000000\x00"+fmt.Sprintf("%011o",
		size)+"\x0000000000000\x00        "+string(kind))
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(b, body+strings.Repeat("\x00", -len(body)&511)...)
}

// paxBlock is an extended header of those records.
func paxBlock(kind byte, records ...string) []byte {
	body := strings.Join(records, "")
	return tarBlock(kind, "pax", int64(len(body)), body)
}

// paxRecord is one record; its length counts itself.
func paxRecord(key, value string) string {
	n := len(key) + len(value) + 3
	for n < len(fmt.Sprint(n))+len(key)+len(value)+3 {
		n++
	}
	return fmt.Sprintf("%d %s=%s\n", n, key, value)
}

var tarEnd = make([]byte, 1024)

// tarMembers reads a tar to its end: names, sizes and contents of its members.
func tarMembers(r io.Reader) (list []string, err error) {
	t := &tarStream{name: "test", r: counter{r: r}}
	for {
		h, err := t.next()
		if err == io.EOF {
			return list, nil
		}
		if err != nil {
			return list, err
		}
		body, err := io.ReadAll(t)
		if err != nil {
			return list, err
		}
		list = append(list, fmt.Sprintf("%q %d %x", h.Name, h.Size, body))
	}
}

// libraryMembers is the same, of archive/tar.
func libraryMembers(r io.Reader) (list []string, err error) {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			return list, nil
		}
		if err != nil {
			return list, err
		}
		body, err := io.ReadAll(t)
		if err != nil {
			return list, err
		}
		if h.Typeflag != tar.TypeXGlobalHeader {
			list = append(list, fmt.Sprintf("%q %d %x", h.Name, h.Size, body))
		}
	}
}

// Extended headers: what other readers take is taken, as long as it leaves a member what it is.
func TestPax(t *testing.T) {
	file := tarBlock('0', "a", 3, "abc")
	const abc = `"a" 3 616263`
	much := paxRecord("SCHILY.xattr.user.x", strings.Repeat("v", maxPax-30))
	half := paxBlock('x', paxRecord("comment", strings.Repeat("c", maxPax/2)))
	sum := slices.Clone(paxBlock('x', paxRecord("comment", "c")))
	sum[150] ^= 1
	for name, c := range map[string]struct {
		b    []byte
		want string // the members
		err  string
	}{
		"times and owners": {slices.Concat(paxBlock('x', paxRecord("mtime", "5.5"), paxRecord("uid", "7")), file),
			abc, ""},
		"attributes": {slices.Concat(paxBlock('x', paxRecord("RHT.security.selinux", "u:r:t\x00"),
			paxRecord("LIBARCHIVE.creationtime", "1"), paxRecord("SCHILY.dev", "1")), file), abc, ""},
		"a comment for all": {slices.Concat(paxBlock('g', paxRecord("comment", "c")), file, file), abc + abc, ""},
		"both": {slices.Concat(paxBlock('g', paxRecord("comment", "c")), paxBlock('x',
			paxRecord("mtime", "1")), file), abc, ""},
		"none":  {slices.Concat(paxBlock('x'), file), abc, ""},
		"1 MiB": {slices.Concat(paxBlock('x', much), file), abc, ""},
		"name":  {slices.Concat(paxBlock('x', paxRecord("path", "b")), file), `"b" 3 616263`, ""},
		"size": {slices.Concat(paxBlock('x', paxRecord("size", "2")), tarBlock('0', "a", 0, "ab")),
			`"a" 2 6162`, ""},
		"empty values": {slices.Concat(paxBlock('x', paxRecord("size", ""), paxRecord("path", ""),
			paxRecord("linkpath", "")), file), abc, ""},
		"more than 1 MiB":  {slices.Concat(paxBlock('x', much, much), file), "", "pax records of 2097"},
		"in three headers": {slices.Concat(half, file, half, file, half, file), abc, "want at most 1048576"},
		"a chain": {slices.Concat(paxBlock('x', paxRecord("mtime", "5")), paxBlock('x',
			paxRecord("mtime", "6")), file), "", "tar type 'x'"},
		"a chain of none": {slices.Concat(paxBlock('x'), paxBlock('x'), file), "", "tar type 'x'"},
		"a chain for all": {slices.Concat(paxBlock('g'), paxBlock('g'), file), "", "tar type 'g'"},
		"a chain of both": {slices.Concat(paxBlock('x'), paxBlock('g'), paxBlock('x'), file), "", "tar type 'x'"},
		"name for all":    {slices.Concat(paxBlock('g', paxRecord("path", "b")), file), "", "for all members"},
		"size for all":    {slices.Concat(paxBlock('g', paxRecord("size", "3")), file), "", "for all members"},
		"two names": {slices.Concat(paxBlock('x', paxRecord("path", "b"), paxRecord("path", "c")), file),
			"", "not allowed"},
		"two sizes": {slices.Concat(paxBlock('x', paxRecord("size", "3"), paxRecord("size", "4")), file),
			"", "not allowed"},
		"sparse": {slices.Concat(paxBlock('x', paxRecord("GNU.sparse.major", "1")), file), "",
			"not allowed"},
		"link": {slices.Concat(paxBlock('x', paxRecord("linkpath", "/etc/passwd")), file), "",
			"not allowed"},
		"size of no number": {slices.Concat(paxBlock('x', paxRecord("size", "0x3")), file), "", "want a number"},
		"size below 0":      {slices.Concat(paxBlock('x', paxRecord("size", "-3")), file), "", "want a number"},
		"size of 2^63": {slices.Concat(paxBlock('x', paxRecord("size", "9223372036854775808")), file), "",
			"want a number"},
		"a zero in a name": {slices.Concat(paxBlock('x', paxRecord("path", "b\x00c")), file), "", "not allowed"},
		"long name": {slices.Concat(paxBlock('x', paxRecord("path", strings.Repeat("n", maxPath+1))), file),
			"", "not allowed"},
		"length too large":   {slices.Concat(paxBlock('x', "9 a=b\n"), file), "", "damaged"},
		"length too small":   {slices.Concat(paxBlock('x', "2 a=b\n"), file), "", "damaged"},
		"length of 0":        {slices.Concat(paxBlock('x', "0 a=b\n"), file), "", "damaged"},
		"length with a sign": {slices.Concat(paxBlock('x', "+7 a=b\n"), file), "", "damaged"},
		"length too long":    {slices.Concat(paxBlock('x', "00000000000000000000006 a=b\n"), file), "", "damaged"},
		"no length":          {slices.Concat(paxBlock('x', "a=b\n"), file), "", "damaged"},
		"no line feed":       {slices.Concat(paxBlock('x', "6 a=bc"), file), "", "damaged"},
		"no value":           {slices.Concat(paxBlock('x', "5 ab\n"), file), "", "no value"},
		"wrong checksum":     {slices.Concat(sum, file), "", "checksum"},
		"size of its own":    {slices.Concat(tarBlock('x', "pax", -1, ""), file), "", "want octal digits"},
		"nothing behind it":  {paxBlock('x', paxRecord("mtime", "1")), "", "unexpected EOF"},
		"the end behind it":  {slices.Concat(paxBlock('x', paxRecord("mtime", "1")), tarEnd), "", "header"},
		"cut off in it":      {paxBlock('x', much)[:5000], "", "unexpected EOF"},
		"name of GNU's kind": {slices.Concat(tarBlock('L', "././@LongLink", 2, "b\x00"), file), "", "tar type 'L'"},
		"a link behind it": {slices.Concat(paxBlock('x', paxRecord("mtime", "1")), tarBlock('2', "a", 0, "")), "",
			"tar type '2'"},
		"a pipe for all": {slices.Concat(paxBlock('g', paxRecord("mtime", "1")), tarBlock('6', "a", 0, "")), "",
			"tar type '6'"},
		"a link's name, size": {slices.Concat(paxBlock('x', paxRecord("linkpath", ""), paxRecord("size", "3")), file),
			abc, ""},
	} {
		b := c.b
		if !strings.Contains(c.err, "EOF") {
			b = append(b, tarEnd...)
		}
		list, err := tarMembers(bytes.NewReader(b))
		if got := strings.Join(list, ""); got != c.want || (err == nil) != (c.err == "") || err != nil &&
			!strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %s, %v; want %s and an error with %q", name, got, err, c.want, c.err)
		}
		if c.err == "" {
			if other, err := libraryMembers(bytes.NewReader(b)); err != nil || !slices.Equal(list, other) {
				t.Errorf("%s: %s, the library: %s, %v", name, list, other, err)
			}
		}
	}
}

// An artifact whose payload file has a MiB of records before it is read, and gone on with, as any other.
func TestPaxBeforePayload(t *testing.T) {
	image := restartImage()
	k := newKit("mod", tarMember{name: "image", body: image, head: func(h *tar.Header) {
		h.Format = tar.FormatPAX
		h.PAXRecords = map[string]string{"SCHILY.xattr.user.x": strings.Repeat("v", 900<<10), "mtime": "7.25"}
	}})
	k.data = func(b []byte) (string, []byte) { return "data/0000.tar.gz", gzipped(t, b, 6, len(b), 100<<10) }
	b := k.build(t)
	a, err := openArtifact(bytes.NewReader(b), artifactOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f, err := a.nextFile()
	if err != nil || f.TarOffset < 900<<10 {
		t.Fatal(f, err)
	}
	seen := pointsOf(t, a, f, 50000)
	if len(seen) < 10 {
		t.Errorf("%d restart points", len(seen))
	}
	for _, s := range seen {
		if rest, err := resumeAt(b, image, s); err != nil || !bytes.Equal(rest, image[s.read:]) {
			t.Fatalf("resumed at %+v: %v", s, err)
		}
	}
}

// FuzzTar holds the reader against archive/tar: what is taken must be the same to both.
func FuzzTar(f *testing.F) {
	file := tarBlock('0', "a", 3, "abc")
	f.Add(slices.Concat(file, file, tarEnd))
	f.Add(slices.Concat(paxBlock('x', paxRecord("mtime", "5.5"), paxRecord("path", "b"), paxRecord("size", "3")),
		file, tarEnd))
	f.Add(slices.Concat(paxBlock('g', paxRecord("comment", "c")), file, paxBlock('x', paxRecord("comment", "c")),
		file, tarEnd))
	f.Add(makeTar(f, []tarMember{{name: "a"}, {name: "b/" + strings.Repeat("c", 150), body: []byte("x")}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := tarMembers(bytes.NewReader(b))
		if err != nil || slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, `/" `) }) {
			return // archive/tar takes a name that ends in a slash for a directory
		}
		want, err := libraryMembers(bytes.NewReader(b)) // an error may be for records that are read past here
		if !slices.Equal(got[:min(len(got), len(want))], want) || err == nil && len(got) != len(want) {
			t.Fatalf("got %q, the library %q, %v", got, want, err)
		}
	})
}
