// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
)

// What a tar may ask for.
const (
	maxMembers = 1000     // in one tar
	maxTail    = 16 << 20 // bytes of zeros behind it
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

// tarStream reads the members of one tar. archive/tar parses the headers; the data is read
// straight from below, and the end, with which archive/tar is lenient, is checked here.
type tarStream struct {
	name    string
	r       counter
	left    int64 // bytes of the current member that were not read yet
	limit   int64 // for the whole tar, in bytes; 0: none
	members int
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

// Records of a pax header (POSIX pax, extended header) that do not change what a member is.
// size is for files of 8 GiB and more.
var paxAllowed = map[string]bool{"size": true, "uid": true, "gid": true, "uname": true, "gname": true, "mtime": true, "atime": true, "ctime": true}

// header parses the member header that starts with block.
func (t *tarStream) header(block *[512]byte) (*tar.Header, error) {
	if c := block[156]; c != '0' && c != 0 && c != 'x' {
		return nil, fmt.Errorf("member %q of tar type %q: want a plain file", bytes.TrimRight(block[:100], "\x00"), c)
	}
	h, err := tar.NewReader(io.MultiReader(bytes.NewReader(block[:]), &t.r)).Next()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	if h.Typeflag != tar.TypeReg || h.Size < 0 {
		return nil, fmt.Errorf("member %q of tar type %q and size %d: want a plain file", h.Name, h.Typeflag, h.Size)
	}
	for k := range h.PAXRecords {
		if !paxAllowed[k] {
			return nil, fmt.Errorf("member %q: pax record %q is not allowed", h.Name, k)
		}
	}
	return h, nil
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

func allZero(p []byte) bool { return bytes.Count(p, []byte{0}) == len(p) }
