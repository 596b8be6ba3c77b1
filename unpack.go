// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strconv"
	"strings"
)

// restartPoint is a place where decompression can be entered again.
type restartPoint struct {
	Kind  string // none, gzip, xz, zstd
	File  int64  // offset in the artifact of the next stored byte
	Bit   byte   `json:",omitempty"` // gzip: bits of that byte that belong to what comes before, 0 to 7
	Out   int64  // offset in the data tar of what it decodes to
	Fresh bool   // a gzip member, an xz block or a zstd frame starts here: nothing before it is needed
	Check byte   // xz: the integrity check that the stream header named
}

// unpacker decompresses one section of the input. Read gives io.EOF only where the
// compressed data ends as it must. restart gives the latest point at or before what Read
// has given.
type unpacker interface {
	io.Reader
	restart() (restartPoint, bool)
}

// unpackLimits bound what compressed data may ask for, in bytes.
type unpackLimits struct {
	dict int64 // largest dictionary
	out  int64 // what comes out is cut off here, so that no larger dictionary is of use; 0: not known
}

var compressionMagic = map[string]string{
	"gzip": "\x1f\x8b",
	"xz":   "\xfd7zXZ\x00",
	"zstd": "\x28\xb5\x2f\xfd",
}

// compressionOf tells the compression from a member's name; ok is false for a name that is
// not stem or stem with a known suffix.
func compressionOf(name, stem string) (kind string, ok bool) {
	suffix, ok := strings.CutPrefix(name, stem)
	if !ok {
		return "", false
	}
	kind, ok = map[string]string{"": "none", ".gz": "gzip", ".xz": "xz", ".zst": "zstd"}[suffix]
	return kind, ok
}

// newUnpacker decompresses the section that in is fenced to.
func newUnpacker(kind string, in *input, lim unpackLimits) (unpacker, error) {
	head, err := in.peek(6)
	if err != nil {
		return nil, err
	}
	if magic := compressionMagic[kind]; !bytes.HasPrefix(head, []byte(magic)) && !(kind == "zstd" && skippable(head)) {
		return nil, fmt.Errorf("not %s data, as its name says: starts with % x, want % x", kind, head, magic)
	}
	switch kind {
	case "none":
		return &stored{in: in}, nil
	case "gzip":
		return newGunzip(in, restartPoint{Fresh: true}, nil)
	case "xz":
		return &unxz{in: in, lim: lim, index: sha256.New()}, nil
	case "zstd":
		return &unzstd{in: in, lim: lim}, nil
	}
	return nil, fmt.Errorf("compression %q is not known", kind)
}

// resumeUnpacker goes on at p, where in stands. window is what comes before p.Out in the
// tar, 32 KiB of it, needed by gzip only.
func resumeUnpacker(in *input, p restartPoint, window []byte, lim unpackLimits) (unpacker, error) {
	switch p.Kind {
	case "none":
		return &stored{in: in, out: p.Out}, nil
	case "gzip":
		if !p.Fresh && len(window) < gzipWindow {
			return nil, fmt.Errorf("resuming gzip: got %d bytes of what comes before, want %d", len(window), gzipWindow)
		}
		return newGunzip(in, p, window)
	case "xz":
		z := &unxz{in: in, lim: lim, index: sha256.New(), out: p.Out, resumed: true}
		return z, z.setCheck(p.Check)
	case "zstd":
		return &unzstd{in: in, lim: lim, out: p.Out}, nil
	}
	return nil, fmt.Errorf("resuming %q data is not possible", p.Kind)
}

// stored is the unpacker of uncompressed data.
type stored struct {
	in  *input
	out int64
}

func (s *stored) Read(p []byte) (int, error) {
	n, err := s.in.Read(p)
	s.out += int64(n)
	return n, err
}

func (s *stored) restart() (restartPoint, bool) {
	return restartPoint{Kind: "none", File: s.in.offset(), Out: s.out, Fresh: true}, true
}

// gzipWindow is how far back deflate can refer (RFC 1951, 2).
const gzipWindow = 32 << 10

// gunzip unpacks gzip members (RFC 1952) one after the other. It can be entered at a member
// and at each block within.
type gunzip struct {
	in      *input
	fl      *inflater
	member  bool   // inside a member
	whole   bool   // the member was seen from its start, so that its trailer can be checked
	start   int64  // offset in the tar of the member's first byte; -1 if not whole
	crc     uint32 // of the member so far
	size    uint32 // of the member so far, modulo 2^32
	members int    // read to their end
	err     error
	now     restartPoint
	coming  restartPoint // a point in what is unpacked and not yet read; Kind "" when none
}

func newGunzip(in *input, p restartPoint, window []byte) (*gunzip, error) {
	fl, err := newInflater(in, p.Bit, window, p.Out)
	return &gunzip{in: in, fl: fl, now: p, member: !p.Fresh, start: -1}, err
}

func (g *gunzip) Read(p []byte) (int, error) {
	for g.err == nil && len(g.fl.pending()) == 0 {
		g.err = g.unpack()
	}
	if g.err != nil { // what was unpacked before it is not to be trusted
		return 0, g.err
	}
	n := copy(p, g.fl.pending())
	g.fl.begin += n
	if left := int64(len(g.fl.pending())); g.coming.Kind != "" && g.coming.Out <= g.fl.total-left {
		g.now, g.coming = g.coming, restartPoint{}
	}
	return n, nil
}

// unpack gets some more of a member, or gets past what is between two.
func (g *gunzip) unpack() error {
	if !g.member {
		return g.nextMember()
	}
	switch err := g.fl.more(); {
	case err == io.EOF:
		return g.trailer()
	case err == errDeflate:
		return fmt.Errorf("offset %d: %w", g.in.offset(), err)
	case err != nil:
		return err
	}
	if g.whole {
		g.crc = crc32.Update(g.crc, crc32.IEEETable, g.fl.pending())
	}
	g.size += uint32(len(g.fl.pending()))
	if f := g.fl; f.blockAt > g.start { // at its start a member is entered by its header
		g.coming = restartPoint{Kind: "gzip", File: f.block, Bit: f.bit, Out: f.blockAt}
	}
	return nil
}

// nextMember reads a member's header; io.EOF at the end of the section.
func (g *gunzip) nextMember() error {
	at := g.in.offset()
	head, err := g.in.peek(10)
	if err != nil {
		return err
	}
	if len(head) == 0 && g.members > 0 {
		return io.EOF
	}
	const fhcrc, fextra, fname, fcomment, reserved = 2, 4, 8, 16, 0xe0 // RFC 1952, 2.3.1
	if len(head) < 10 || head[0] != 0x1f || head[1] != 0x8b || head[2] != 8 || head[3]&reserved != 0 {
		return fmt.Errorf("offset %d: got % x, want a gzip header or the end", at, head)
	}
	flags := head[3]
	skip := 10
	if flags&fextra != 0 {
		if head, err = g.in.need(12); err != nil {
			return err
		}
		skip = 12 + int(binary.LittleEndian.Uint16(head[10:]))
	}
	if err := g.in.skip(int64(skip)); err != nil {
		return err
	}
	for _, f := range []byte{fname, fcomment} {
		for c := byte(1); flags&f != 0 && c != 0; {
			if c, err = g.in.ReadByte(); err != nil {
				return noEOF(err)
			}
		}
	}
	if flags&fhcrc != 0 {
		if err := g.in.skip(2); err != nil {
			return err
		}
	}
	g.member, g.whole, g.crc, g.size, g.start = true, true, 0, 0, g.fl.total
	if g.members > 0 {
		g.coming = restartPoint{Kind: "gzip", File: at, Out: g.start, Fresh: true}
	}
	g.fl.reset()
	return nil
}

// trailer checks a member's CRC-32 and size. Of a member that was entered in the middle
// neither is known; there the hash of the whole payload is the proof.
func (g *gunzip) trailer() error {
	var t [8]byte
	if _, err := io.ReadFull(g.in, t[:]); err != nil {
		return noEOF(err)
	}
	g.member = false
	g.members++
	crc, size := binary.LittleEndian.Uint32(t[:]), binary.LittleEndian.Uint32(t[4:])
	if g.whole && (crc != g.crc || size != g.size) {
		return fmt.Errorf("offset %d: gzip trailer has CRC %08x, size %d; the data has %08x, %d",
			g.in.offset()-8, crc, size, g.crc, g.size)
	}
	return nil
}

func (g *gunzip) restart() (restartPoint, bool) { return g.now, g.now.Kind != "" }

// noEOF is for an end that comes too early.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func allZero(p []byte) bool {
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// defaultDictLimit is 64 MiB, which mender-artifact's xz needs, or half of the memory that
// the kernel says is available (proc(5), meminfo), whichever is less.
func defaultDictLimit() int64 {
	limit := int64(64 << 20)
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return limit
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "MemAvailable:" {
			if kb, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				limit = min(limit, kb<<10/2)
			}
		}
	}
	return limit
}
