// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"
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
		"more than 1 MiB":  {slices.Concat(paxBlock('x', much, much), file), "", "pax records of 2097150 bytes"},
		"in three headers": {slices.Concat(half, file, half, file, half, file), abc, "want at most 1048576 in all"},
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

// A tar is written as archive/tar writes it, to the byte, and read as it was meant.
func TestTarWriter(t *testing.T) {
	long := strings.Repeat("n", 90)
	for _, name := range []string{"a", "headers/0000/type-info", long + long[:10], long + long[:11], long + long,
		long + long + long[:76], "scripts/" + long + "01", "scripts/" + long + "012", "scripts/" + long + long[:11],
		"scripts/ArtifactInstall_Enter_00_é", "scripts/" + long + "é" + long, "é\xff" + long, "é",
		strings.Repeat("d", 155) + "/" + long, strings.Repeat("d", 156) + "/" + long, "d/e/f/" + long + "0"} {
		for _, size := range []int64{0, 1, 511, 512, 513, 1<<33 - 1, 1 << 33, 1 << 40} {
			for _, mtime := range []int64{0, 1, 1<<33 - 1, 1 << 33, -1} {
				var got, want bytes.Buffer
				w := tarWriter{&got, mtime}
				head := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600,
					ModTime: time.Unix(mtime, 0)}
				lib := tar.NewWriter(&want)
				body := bytes.Repeat([]byte("x"), int(min(size, 1000)))
				err := errors.Join(w.header(name, size), lib.WriteHeader(head))
				if size < 1000 {
					got.Reset()
					_, werr := lib.Write(body)
					err = errors.Join(err, w.add(name, size, bytes.NewReader(body)), w.close(), werr, lib.Close())
				}
				if err != nil || !bytes.Equal(got.Bytes(), want.Bytes()) {
					t.Fatalf("%q, %d bytes, %d: %v\n%.1200q\nwant\n%.1200q", name, size, mtime, err, &got, &want)
				}
				if size >= 1000 || len(name) > maxPath {
					continue
				}
				list, err := tarMembers(&got)
				if err != nil || !slices.Equal(list, []string{fmt.Sprintf("%q %d %x", name, size, body)}) {
					t.Fatalf("read %q, %v", list, err)
				}
			}
		}
	}
	for n, body := range []string{"ab", "abcd"} {
		w := tarWriter{io.Discard, 0}
		if err := w.add("a", 3, strings.NewReader(body)); err == nil || !strings.Contains(err.Error(), "it changed") {
			t.Errorf("%d: %v", n, err)
		}
	}
}

// resealed is a header with other bytes at some offset, and the checksum for it.
func resealed(b []byte, at int, text string) []byte {
	h := [512]byte(b)
	copy(h[at:], text)
	return append(slices.Clone(seal(&h)), b[512:]...)
}

// Headers of each kind: what archive/tar takes of them is taken, and is the same to both.
func TestTarKinds(t *testing.T) {
	file := tarBlock('0', "a", 3, "abc")
	name := strings.Repeat("n", 100)
	gnu := resealed(file, 257, "ustar  \x00")
	star := resealed(resealed(file, 508, "tar\x00"), 345, strings.Repeat("p", 131)+"00000000000 00000000000 ")
	v7 := resealed(resealed(file, 257, "\x00\x00\x00\x00\x00\x00\x00\x00"), 345, "no prefix")
	for what, c := range map[string]struct {
		b    []byte
		want string // the members; "": an error
	}{
		"plain":     {file, `"a" 3 616263`},
		"full name": {resealed(file, 0, name), `"` + name + `" 3 616263`},
		"prefix":    {resealed(file, 345, "p/q"), `"p/q/a" 3 616263`},
		"full prefix": {resealed(file, 345, strings.Repeat("p", 155)),
			`"` + strings.Repeat("p", 155) + `/a" 3 616263`},
		"star":                  {star, `"` + strings.Repeat("p", 131) + `/a" 3 616263`},
		"star's time":           {resealed(star, 476, "x"), ""},
		"the oldest":            {v7, `"a" 3 616263`},
		"the oldest, a folder":  {resealed(resealed(v7, 0, "a/"), 156, "\x00"), ""},
		"the oldest, a file":    {resealed(v7, 156, "\x00"), `"a" 3 616263`},
		"GNU":                   {gnu, `"a" 3 616263`},
		"GNU, times":            {resealed(gnu, 345, "00000000001\x0000000000002\x00"), `"a" 3 616263`},
		"GNU, no times":         {resealed(gnu, 345, "p/q"), ""},
		"GNU, size":             {resealed(gnu, 124, "\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03"), `"a" 3 616263`},
		"GNU, time before 1970": {resealed(gnu, 136, strings.Repeat("\xff", 12)), `"a" 3 616263`},
		"GNU, size below 0":     {resealed(gnu, 124, strings.Repeat("\xff", 12)), ""},
		"GNU, size of 2^63":     {resealed(gnu, 124, "\x80\x00\x00\x00\x80\x00\x00\x00\x00\x00\x00\x00"), ""},
		"GNU, size of 2^64":     {resealed(gnu, 124, "\x80\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x03"), ""},
		"blanks":                {resealed(file, 124, "         3  "), `"a" 3 616263`},
		"no size":               {resealed(tarBlock('0', "a", 0, ""), 124, "            "), `"a" 0 `},
		"size of no octals":     {resealed(file, 124, "00000000009\x00"), ""},
		"size of two":           {resealed(file, 124, "0000003 004\x00"), ""},
		"size and sign":         {resealed(file, 124, "-0000000003\x00"), ""},
		"size and underline":    {resealed(file, 124, "0_000000003\x00"), ""},
		"mode":                  {resealed(file, 100, "rw"), ""},
		"owner":                 {resealed(file, 108, "root"), ""},
		"group":                 {resealed(file, 116, "root"), ""},
		"time":                  {resealed(file, 136, "now"), ""},
		"device":                {resealed(file, 329, "sda"), ""},
		"partition":             {resealed(file, 337, "sda"), ""},
		"other folder":          {resealed(file, 0, "a/"), `"a/" 3 616263`},
		"checksum of none":      {slices.Concat(file[:148], []byte("        "), file[156:]), ""},
		"another byte":          {slices.Concat([]byte("b"), file[1:]), ""},
	} {
		b := append(slices.Clone(c.b), tarEnd...)
		list, err := tarMembers(bytes.NewReader(b))
		if got := strings.Join(list, ""); got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %s, %v; want %s", what, got, err, c.want)
		}
		if err != nil {
			continue
		}
		if other, err := libraryMembers(bytes.NewReader(b)); err != nil || !slices.Equal(list, other) {
			t.Errorf("%s: %s, the library: %s, %v", what, list, other, err)
		}
	}
	signed := resealed(file, 0, "é")
	h := [512]byte(signed)
	_, sum := tarSum(&h)
	copy(signed[148:], fmt.Sprintf("%06o", sum))
	if list, err := tarMembers(bytes.NewReader(append(signed, tarEnd...))); err != nil || len(list) != 1 {
		t.Errorf("signed checksum: %q, %v", list, err)
	}
}
