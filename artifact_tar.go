// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"unicode/utf8"
)

// What a tar may ask for.
const (
	maxMembers = 1000     // in one tar
	maxTail    = 16 << 20 // bytes of zeros behind it
	maxPax     = 1 << 20  // bytes of records in all its extended headers together
	maxPath    = 256      // bytes of a name in such a record: as many as fit without one
)

// counter counts what is read through it.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// tarFile is what the header of a plain file says.
type tarFile struct {
	Name string
	Size int64 // bytes
}

// tarStream reads the members of one tar. It takes no other headers than archive/tar would, which the tests hold it
// against, and fewer: plain files only, no chains of extended headers, nothing behind the end.
type tarStream struct {
	name    string
	r       counter
	left    int64 // bytes of the current member that were not read yet
	limit   int64 // for the whole tar, in bytes; 0: none
	members int
	pax     int64 // bytes of records so far
}

// Read gives the current member's data.
func (t *tarStream) Read(p []byte) (int, error) {
	if t.left == 0 {
		return 0, io.EOF
	}
	n, err := t.r.Read(p[:min(int64(len(p)), t.left)])
	t.left -= int64(n)
	if n > 0 {
		// The error, if it is one that stays, comes again.
		return n, nil
	}
	return 0, noEOF(err)
}

// all reads the current member whole.
func (t *tarStream) all(h *tarFile, limit int64) ([]byte, error) {
	if h.Size > limit {
		return nil, fmt.Errorf("%s: member %q has %d bytes, at most %d are allowed", t.name, h.Name, h.Size, limit)
	}
	b, err := io.ReadAll(t)
	if err != nil {
		return nil, fmt.Errorf("%s: member %q: %w", t.name, h.Name, err)
	}
	return b, nil
}

// next gives the header of the next member, a plain file; io.EOF when the tar has ended with
// the end-of-archive marker and nothing but zeros follows.
func (t *tarStream) next() (*tarFile, error) {
	if t.left > 0 {
		return nil, fmt.Errorf("%s: %d bytes of a member were not read", t.name, t.left)
	}
	var block [512]byte
	pad := block[:-t.r.n&511]
	if err := t.full(pad); err != nil {
		return nil, err
	}
	if !allZero(pad) {
		return nil, fmt.Errorf("%s: padding before offset %d is not zero", t.name, t.r.n)
	}
	at := t.r.n
	if err := t.full(block[:]); err != nil {
		return nil, err
	}
	if allZero(block[:]) {
		return nil, t.tail()
	}
	h, err := t.header(&block)
	if err != nil {
		return nil, fmt.Errorf("%s: header at offset %d: %w", t.name, at, err)
	}
	t.members++
	t.left = h.Size
	if t.members > maxMembers || t.limit > 0 && h.Size > t.limit-t.r.n {
		return nil, fmt.Errorf("%s: more than %d members or %d bytes", t.name, maxMembers, t.limit)
	}
	return h, nil
}

// full fills b; the tar must not end here.
func (t *tarStream) full(b []byte) error {
	if _, err := io.ReadFull(&t.r, b); err != nil {
		return fmt.Errorf("%s: no end-of-archive marker up to offset %d: %w", t.name, t.r.n, noEOF(err))
	}
	return nil
}

// header parses the header that starts with block: that of a plain file, before which an extended one may stand and one
// for all that follows, each once (POSIX pax).
func (t *tarStream) header(block *[512]byte) (*tarFile, error) {
	var own, global paxRecords
	for !own.seen && block[156] == 'x' || !global.seen && block[156] == 'g' {
		r := &own
		if block[156] == 'g' {
			r = &global
		}
		if err := t.extended(block, r); err != nil {
			return nil, err
		}
	}
	name := tarText(block[:100])
	if c := block[156]; c != '0' && c != 0 || c == 0 && strings.HasSuffix(name, "/") {
		return nil, writeAgain("member %q of tar type %q: want a plain file", name, c)
	}
	prefix, err := checkFields(block)
	if err != nil {
		return nil, err
	}
	if prefix != "" {
		name = prefix + "/" + name
	}
	size, err := headerSize(block)
	if err != nil {
		return nil, err
	}
	if global.path != "" || global.size != "" {
		return nil, writeAgain("member %q: pax records of a size or a name that are for all members", name)
	}
	if own.path != "" {
		name = own.path
	}
	if own.size != "" {
		n, err := strconv.ParseUint(own.size, 10, 63)
		if err != nil {
			return nil, fmt.Errorf("member %q: pax record with a size of %q, want a number", name, own.size)
		}
		size = int64(n)
	}
	return &tarFile{name, size}, nil
}

// checkFields checks the numbers that say nothing of a member's data (mode, owners, times, devices) and gives the front
// of a long name. Besides POSIX ustar there is star's kind, with two times in the place of the end of that name, GNU's,
// with both times and no such name, and the oldest, which ends before all these.
func checkFields(block *[512]byte) (prefix string, err error) {
	fields := [][2]int{{100, 108}, {108, 116}, {116, 124}, {136, 148}}
	device := [][2]int{{329, 337}, {337, 345}}
	switch magic := string(block[257:265]); {
	case magic == "ustar  \x00":
		for _, at := range []int{345, 357} {
			if block[at] != 0 {
				fields = append(fields, [2]int{at, at + 12})
			}
		}
		fields = append(fields, device...)
	case magic[:6] == "ustar\x00" && string(block[508:]) == "tar\x00":
		prefix = tarText(block[345:476])
		fields = append(append(fields, device...), [2]int{476, 488}, [2]int{488, 500})
	case magic[:6] == "ustar\x00":
		prefix = tarText(block[345:500])
		fields = append(fields, device...)
	}
	for _, f := range fields {
		if _, ok := tarNumber(block[f[0]:f[1]]); !ok {
			return "", fmt.Errorf("bytes %d to %d are %q, want octal digits", f[0], f[1], block[f[0]:f[1]])
		}
	}
	return prefix, nil
}

// tarText is the text of a field, which a zero byte ends if it is not full.
func tarText(field []byte) string {
	text, _, _ := bytes.Cut(field, []byte{0})
	return string(text)
}

// tarNumber reads a number in octal digits with blanks and zero bytes around them; nothing at all is 0. A first byte of
// 0x80 and more begins the form of GNU, two's complement in big endian less its first bit.
func tarNumber(field []byte) (n int64, ok bool) {
	if field[0] >= 0x80 {
		n = int64(int8(field[0]<<1) >> 1)
		for _, c := range field[1:] {
			if n>>55 != 0 && n>>55 != -1 {
				return 0, false
			}
			n = n<<8 | int64(c)
		}
		return n, true
	}
	digits := tarText(bytes.Trim(field, " \x00"))
	u, err := strconv.ParseUint("0"+digits, 8, 63)
	return int64(u), err == nil
}

// tarSum is the checksum of a header, in which the checksum itself counts as blanks. Some writers take the bytes for
// signed ones.
func tarSum(block *[512]byte) (sum, signed int64) {
	for i, c := range block {
		if i >= 148 && i < 156 {
			c = ' '
		}
		sum += int64(c)
		signed += int64(int8(c))
	}
	return sum, signed
}

// headerSize checks the checksum of a header and gives the size of what follows it, in bytes.
//
//go:noinline
func headerSize(block *[512]byte) (int64, error) {
	sum, signed := tarSum(block)
	if want, ok := tarNumber(block[148:156]); !ok || want != sum && want != signed {
		return 0, fmt.Errorf("the checksum is %q, its bytes have %o", block[148:156], sum)
	}
	size, ok := tarNumber(block[124:136])
	if !ok || size < 0 {
		return 0, fmt.Errorf("the size is %q, want octal digits", block[124:136])
	}
	return size, nil
}

// writeAgain refuses a tar that its writer could have written otherwise.
func writeAgain(format string, args ...any) error {
	return withHint(refuse(format, args...), "write the artifact again with mendlet pack or mender-artifact")
}

// paxRecords are those records of an extended header that say what its member is. Others (times, owners, attributes,
// comments) are read past.
type paxRecords struct {
	seen       bool
	path, size string // "": the header that follows says it
}

// extended reads the extended header that starts with block, and then the next header into block.
func (t *tarStream) extended(block *[512]byte, r *paxRecords) error {
	size, err := headerSize(block)
	if err != nil {
		return fmt.Errorf("extended header: %w", err)
	}
	if size > maxPax-t.pax {
		return writeAgain("pax records of %d bytes after %d others, want at most %d in all", size, t.pax, maxPax)
	}
	t.pax += size
	records := make([]byte, (size+511)&^511)
	if err := t.full(records); err != nil {
		return err
	}
	if err := r.parse(records[:size]); err != nil {
		return err
	}
	return t.full(block[:])
}

// parse takes lines of "LENGTH KEY=VALUE", of which LENGTH counts all bytes (POSIX pax, extended header). An empty
// value takes nothing. size is for files of 8 GiB and more.
func (r *paxRecords) parse(b []byte) error {
	r.seen = true
	for len(b) > 0 {
		digits, _, _ := bytes.Cut(b[:min(len(b), 8)], []byte(" "))
		length, err := strconv.ParseUint(string(digits), 10, 31)
		n := int(length)
		if err != nil || n < len(digits)+2 || n > len(b) || b[n-1] != '\n' {
			return fmt.Errorf("pax record %q is damaged", clip(b))
		}
		key, value, ok := bytes.Cut(b[len(digits)+1:n-1], []byte("="))
		b = b[n:]
		switch k := string(key); {
		case !ok:
			return fmt.Errorf("pax record %q has no value", clip(key))
		case len(value) == 0:
		case k == "path" && r.path == "" && len(value) <= maxPath && bytes.IndexByte(value, 0) < 0:
			r.path = string(value)
		case k == "size" && r.size == "" && len(value) < 20:
			r.size = string(value)
		case k == "path", k == "size", k == "linkpath", k == "SCHILY.realsize", k == "SUN.holesdata",
			strings.HasPrefix(k, "GNU.sparse."): // twice, or not that of a plain file
			return writeAgain("pax record %q with value %q is not allowed", clip(key), clip(value))
		}
	}
	return nil
}

// tail reads on after the first zero block: another must follow, and then only zeros.
func (t *tarStream) tail() error {
	buf := make([]byte, 4096)
	if err := t.full(buf[:512]); err != nil {
		return err
	}
	for n, size := 512, int64(0); ; size += int64(n) {
		if !allZero(buf[:n]) || size > maxTail {
			return fmt.Errorf("%s: data after the end, before offset %d", t.name, t.r.n)
		}
		var err error
		if n, err = t.r.Read(buf); err == io.EOF && n == 0 {
			return io.EOF
		} else if err != nil && err != io.EOF {
			return err
		}
	}
}

// tarWriter writes plain files of root, mode 0600, as a tar.
type tarWriter struct {
	w     io.Writer
	mtime int64 // of all members, in seconds since 1970
}

// add writes one member of size bytes, which r must have.
func (t *tarWriter) add(name string, size int64, r io.Reader) error {
	if err := t.header(name, size); err != nil {
		return err
	}
	n, err := io.Copy(t.w, io.LimitReader(r, size+1))
	if err == nil && n != size {
		err = changedSize(name, n, size)
	}
	if err == nil {
		_, err = t.w.Write(make([]byte, -size&511))
	}
	return err
}

//go:noinline
func changedSize(name string, got, want int64) error {
	return fmt.Errorf("%q: got %d bytes, want %d: it changed while it was read", name, got, want)
}

// close writes the end-of-archive marker.
func (t *tarWriter) close() error {
	_, err := t.w.Write(make([]byte, 1024))
	return err
}

// header writes a header of POSIX ustar, before it an extended one for what has no room in that. A name of more than
// 100 bytes is split at its last slash, if that is enough.
func (t *tarWriter) header(name string, size int64) error {
	front, base := path.Split(name)
	prefix := strings.TrimSuffix(front, "/")
	ascii := strings.Map(func(r rune) rune { // -1: left out
		if r >= utf8.RuneSelf {
			return -1
		}
		return r
	}, name)
	long := len(name) > 100 || ascii != name
	if !long {
		prefix, base = "", name
	}
	if ascii != name || long && (prefix == "" || len(prefix) > 155 || len(base) > 100) ||
		!fitsOctal(12, size) || !fitsOctal(12, t.mtime) {
		if err := t.extended(front, ascii, long, name, size); err != nil {
			return err
		}
		prefix, base = "", ascii
	}
	h := tarHead('0', base, 0o600, size, t.mtime)
	putOctal(h[329:337], 0) // device numbers
	putOctal(h[337:345], 0)
	copy(h[345:], prefix)
	_, err := t.w.Write(seal(h))
	return err
}

// extended writes an extended header: records, in the order of their keys.
func (t *tarWriter) extended(front, ascii string, long bool, name string, size int64) error {
	text := ""
	record := func(needed bool, key, value string) {
		n := len(key) + len(value) + len("  =\n") // one digit at least
		for n < len(key)+len(value)+len(" =\n")+len(strconv.Itoa(n)) {
			n++
		}
		if needed {
			text += fmt.Sprintf("%d %s=%s\n", n, key, value)
		}
	}
	record(!fitsOctal(12, t.mtime), "mtime", strconv.FormatInt(t.mtime, 10))
	record(long, "path", name)
	record(!fitsOctal(12, size), "size", strconv.FormatInt(size, 10))
	h := tarHead('x', path.Join(front, "PaxHeaders.0", path.Base(ascii)), 0, int64(len(text)), 0)
	_, err := fmt.Fprintf(t.w, "%s%s%s", seal(h), text, make([]byte, -len(text)&511))
	return err
}

// tarHead makes a header, to be sealed. Numbers that have no room are 0.
func tarHead(kind byte, name string, mode, size, mtime int64) *[512]byte {
	var h [512]byte
	copy(h[:100], name)
	putOctal(h[100:108], mode)
	putOctal(h[108:116], 0) // owner
	putOctal(h[116:124], 0)
	putOctal(h[124:136], size)
	putOctal(h[136:148], mtime)
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	return &h
}

// seal gives a header its checksum.
func seal(h *[512]byte) []byte {
	sum, _ := tarSum(h)
	putOctal(h[148:155], sum)
	h[155] = ' '
	return h[:]
}

// putOctal fills a field, of zeros so far, but for the zero byte that ends it.
func putOctal(field []byte, n int64) {
	if !fitsOctal(len(field), n) {
		n = 0
	}
	copy(field, fmt.Sprintf("%0*o", len(field)-1, n))
}

func fitsOctal(width int, n int64) bool { return n >= 0 && n>>(3*(width-1)) == 0 }
