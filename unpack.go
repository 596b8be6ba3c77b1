// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// restartPoint is a place where decompression can be entered again.
type restartPoint struct {
	Kind  string // none, gzip, xz
	File  int64  // offset in the artifact of the next stored byte
	Out   int64  // offset in the data tar of what it decodes to
	Fresh bool   // a gzip member or an xz block starts here: nothing before it is needed
	Check byte   // xz: the integrity check that the stream header named
}

// unpacker decompresses one section of the input. Read gives io.EOF only where the
// compressed data ends as it must. restart gives the latest point at or before what Read
// has given.
type unpacker interface {
	io.Reader
	restart() (restartPoint, bool)
	close()
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
	if magic := compressionMagic[kind]; !bytes.HasPrefix(head, []byte(magic)) {
		return nil, fmt.Errorf("not %s data, as its name says: starts with % x, want % x", kind, head, magic)
	}
	switch kind {
	case "none":
		return &stored{in: in}, nil
	case "gzip":
		return newGunzip(in, restartPoint{Fresh: true}, nil), nil
	case "xz":
		return &unxz{in: in, lim: lim, index: sha256.New()}, nil
	case "zstd":
		return newUnzstd(in, lim)
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
		return newGunzip(in, p, window), nil
	case "xz":
		z := &unxz{in: in, lim: lim, index: sha256.New(), out: p.Out, resumed: true}
		return z, z.setCheck(p.Check)
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

func (s *stored) close() {}

// gzipWindow is how far back deflate can refer (RFC 1951, 2).
const gzipWindow = 32 << 10

// flateInput watches what compress/flate reads, to find the places where the compressed
// data is aligned to a byte: an empty stored block, 00 00 ff ff. flate reads single bytes by
// ReadByte, the four bytes LEN, NLEN of a stored block in one Read, and then its content by
// further Reads (compress/flate/inflate.go, dataBlock and copyData). It never reads ahead.
type flateInput struct {
	*input
	content int   // bytes of a stored block's content still to be read
	mark    int64 // offset in the file after the latest empty stored block; 0: none
}

func (f *flateInput) Read(p []byte) (int, error) {
	if f.content > 0 {
		n, err := f.input.Read(p)
		f.content -= n
		return n, err
	}
	n, err := io.ReadFull(f.input, p)
	if n == 4 {
		f.content = int(binary.LittleEndian.Uint16(p))
		if f.content == 0 {
			f.mark = f.offset()
		}
	}
	return n, err
}

// gunzip unpacks gzip members (RFC 1952) one after the other. It does not use
// compress/gzip, which cannot be entered in the middle of a member.
type gunzip struct {
	in      flateInput
	fl      io.ReadCloser
	member  bool   // inside a member
	whole   bool   // the member was seen from its start, so that its trailer can be checked
	crc     uint32 // of the member so far
	size    uint32 // of the member so far, modulo 2^32
	out     int64  // offset in the tar of the next byte that fl gives
	err     error
	buf     []byte // one window, for reads that are shorter
	rest    []byte // in buf, unpacked and not yet read
	members int    // read to their end
	now     restartPoint
	coming  restartPoint // a point that rest ends at; Kind "" when none
}

func newGunzip(in *input, p restartPoint, window []byte) *gunzip {
	g := &gunzip{in: flateInput{input: in}, buf: make([]byte, gzipWindow), out: p.Out, now: p, member: !p.Fresh}
	g.fl = flate.NewReaderDict(&g.in, window)
	return g
}

func (g *gunzip) Read(p []byte) (n int, err error) {
	if len(g.rest) == 0 && len(p) >= gzipWindow {
		n, err = g.unpack(p)
	} else {
		if len(g.rest) == 0 {
			if n, err = g.unpack(g.buf); n == 0 {
				return 0, err
			}
			g.rest = g.buf[:n]
		}
		n = copy(p, g.rest)
		g.rest = g.rest[n:]
		err = nil
	}
	if g.coming.Kind != "" && g.coming.Out <= g.out-int64(len(g.rest)) {
		g.now, g.coming = g.coming, restartPoint{}
	}
	return n, err
}

// unpack fills p, of at least one window, with what one Read of flate gives.
func (g *gunzip) unpack(p []byte) (n int, err error) {
	for n == 0 && g.err == nil {
		if !g.member {
			if g.err = g.nextMember(); g.err != nil {
				break
			}
		}
		g.in.mark = 0
		n, err = g.fl.Read(p)
		g.note(n, err)
		if g.whole {
			g.crc = crc32.Update(g.crc, crc32.IEEETable, p[:n])
		}
		g.size += uint32(n)
		g.out += int64(n)
		if err == io.EOF {
			err = g.trailer()
		}
		g.err = err
	}
	if n > 0 {
		return n, nil
	}
	return 0, g.err
}

// note keeps the restart point that a Read of n bytes came by. At an empty stored block
// flate gives out all that it has unpacked, in one Read since p holds a window. If nothing
// was left to give it reads on, and what it then gives comes after the point. The empty
// block that ends a member is no point: the trailer follows it.
func (g *gunzip) note(n int, err error) {
	if g.in.mark == 0 || err != nil && err != io.EOF {
		return
	}
	p := restartPoint{Kind: "gzip", File: g.in.mark, Out: g.out}
	if g.in.offset() == g.in.mark {
		if err == io.EOF {
			return
		}
		p.Out += int64(n)
	}
	g.coming = p
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
	if _, err := io.CopyN(io.Discard, g.in.input, int64(skip)); err != nil {
		return noEOF(err)
	}
	for _, f := range []byte{fname, fcomment} {
		for c := byte(1); flags&f != 0 && c != 0; {
			if c, err = g.in.ReadByte(); err != nil {
				return noEOF(err)
			}
		}
	}
	if flags&fhcrc != 0 {
		if _, err := io.CopyN(io.Discard, g.in.input, 2); err != nil {
			return noEOF(err)
		}
	}
	g.member, g.whole, g.crc, g.size = true, true, 0, 0
	if g.members > 0 {
		g.coming = restartPoint{Kind: "gzip", File: at, Out: g.out, Fresh: true}
	}
	return g.fl.(flate.Resetter).Reset(&g.in, nil)
}

// trailer checks a member's CRC-32 and size. Of a member that was entered in the middle
// neither is known; there the hash of the whole payload is the proof.
func (g *gunzip) trailer() error {
	var t [8]byte
	if _, err := io.ReadFull(g.in.input, t[:]); err != nil {
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
func (g *gunzip) close()                        {}

// noEOF is for an end that comes too early.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// unzstd pipes the section through a zstd program, there being no decoder in here.
type unzstd struct {
	in   *input
	cmd  *exec.Cmd
	out  io.ReadCloser
	says bytes.Buffer
	done bool
	err  error
}

func newUnzstd(in *input, lim unpackLimits) (unpacker, error) {
	path, err := exec.LookPath("zstd")
	if err != nil {
		return nil, withHint(refuse("zstd data, and there is no zstd program: %w", err),
			"write the artifact again with mender-artifact … --compression gzip, or with mendlet pack")
	}
	z := &unzstd{in: in, cmd: exec.Command(path, "-dcq", fmt.Sprintf("--memory=%dKB", lim.dict>>10))}
	z.cmd.Stdin = in
	z.cmd.Stderr = &z.says // -q: one line at most
	// A terminal's interrupt is for this process, which ends the child itself.
	z.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// How long to wait, once the child is gone, for a Read of the input that hangs.
	z.cmd.WaitDelay = 5 * time.Second
	if z.out, err = z.cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	if err := z.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%q: %w", path, err)
	}
	return z, nil
}

func (z *unzstd) Read(p []byte) (int, error) {
	if z.done {
		return 0, z.err
	}
	n, err := z.out.Read(p)
	if err == io.EOF {
		z.done = true
		if z.err = z.cmd.Wait(); z.err == nil {
			z.err = io.EOF
		} else {
			z.err = fmt.Errorf("%q: %w: %s", z.cmd.Path, z.err, strings.TrimSpace(z.says.String()))
		}
		err = z.err
	}
	return n, err
}

func (z *unzstd) restart() (restartPoint, bool) { return restartPoint{}, false }

func (z *unzstd) close() {
	if !z.done {
		z.done, z.err = true, os.ErrClosed
		z.cmd.Process.Kill()
		z.cmd.Wait()
	}
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
