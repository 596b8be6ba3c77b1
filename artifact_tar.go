// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
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

// tarStream reads the members of one tar. archive/tar parses the headers of plain files; the data is read
// straight from below, and what archive/tar is lenient with, extended headers and the end, is checked here.
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
func (t *tarStream) all(h *tar.Header, limit int64) ([]byte, error) {
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
func (t *tarStream) next() (*tar.Header, error) {
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
// for all that follows, each once (POSIX pax). archive/tar sees the plain one alone, as it would follow any chain.
func (t *tarStream) header(block *[512]byte) (*tar.Header, error) {
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
	if c := block[156]; c != '0' && c != 0 {
		return nil, writeAgain("member %q of tar type %q: want a plain file", bytes.TrimRight(block[:100], "\x00"), c)
	}
	h, err := tar.NewReader(bytes.NewReader(block[:])).Next()
	if err != nil {
		return nil, noEOF(err)
	}
	if global.path != "" || global.size != "" {
		return nil, writeAgain("member %q: pax records of a size or a name that are for all members", h.Name)
	}
	if own.path != "" {
		h.Name = own.path
	}
	if own.size != "" {
		n, err := strconv.ParseUint(own.size, 10, 63)
		if err != nil {
			return nil, fmt.Errorf("member %q: pax record with a size of %q, want a number", h.Name, own.size)
		}
		h.Size = int64(n)
	}
	if h.Typeflag != tar.TypeReg || h.Size < 0 {
		return nil, fmt.Errorf("member %q of tar type %q and size %d: want a plain file", h.Name, h.Typeflag, h.Size)
	}
	return h, nil
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
	size, err := extendedSize(block)
	if err != nil {
		return err
	}
	if t.pax += size; t.pax > maxPax {
		return writeAgain("pax records of %d bytes up to here, want at most %d", t.pax, maxPax)
	}
	records := make([]byte, (size+511)&^511)
	if err := t.full(records); err != nil {
		return err
	}
	if err := r.parse(records[:size]); err != nil {
		return err
	}
	return t.full(block[:])
}

// extendedSize checks the header of an extended header and gives the size of its records, in bytes (POSIX ustar).
//
//go:noinline
func extendedSize(block *[512]byte) (int64, error) {
	octal := func(b []byte) (int64, bool) {
		n, err := strconv.ParseUint(strings.Trim(string(b), " \x00"), 8, 63)
		return int64(n), err == nil
	}
	sum := int64(8 * ' ') // in place of the checksum itself
	for i, c := range block {
		if i < 148 || i >= 156 {
			sum += int64(c)
		}
	}
	if want, ok := octal(block[148:156]); !ok || want != sum {
		return 0, fmt.Errorf("checksum of the extended header is %q, its bytes have %o", block[148:156], sum)
	}
	size, ok := octal(block[124:136])
	if !ok {
		return 0, fmt.Errorf("size of the extended header is %q, want octal digits", block[124:136])
	}
	return size, nil
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
