// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"math/bits"
	"strings"
	"time"
)

// inputBuffer is what is read ahead of an artifact, in bytes: large enough that system calls
// do not count, small enough for a board with 24 MiB.
const inputBuffer = 256 << 10

// input reads an artifact through one buffer and knows its place in the file. It can be
// fenced in to a section, the bytes of one member, at whose end it gives io.EOF.
type input struct {
	r      io.Reader
	buf    []byte
	pos    int   // next byte, in buf
	lim    int   // end, in buf, of what may be read: of the section or of what is buffered
	end    int   // end of what is buffered
	base   int64 // offset in the file of buf[0]
	stop   int64 // offset in the file of the section's end
	err    error // of r, not yet given to anyone
	failed error // of r, other than io.EOF, given to the reader above
}

// newInput reads from r, whose first byte is at offset off of the file.
//
//go:noinline
func newInput(r io.Reader, off int64, size int) *input {
	return &input{r: r, buf: make([]byte, size), base: off, stop: math.MaxInt64}
}

//go:noinline
func (in *input) offset() int64 { return in.base + int64(in.pos) }

// section ends the readable bytes n bytes from here; n < 0 lifts the fence.
//
//go:noinline
func (in *input) section(n int64) {
	in.stop = math.MaxInt64
	if n >= 0 && n < math.MaxInt64-in.offset() {
		in.stop = in.offset() + n
	}
	in.lim = int(min(int64(in.end), in.stop-in.base))
}

// more reads once into the free part of the buffer. The end of r inside a section is
// io.ErrUnexpectedEOF.
func (in *input) more() error {
	for range 100 {
		if in.err != nil {
			return in.fail(in.err)
		}
		n, err := in.r.Read(in.buf[in.end:])
		in.end += n
		in.err = err
		if n > 0 {
			in.lim = int(min(int64(in.end), in.stop-in.base))
			return nil
		}
	}
	return in.fail(io.ErrNoProgress)
}

func (in *input) fail(err error) error {
	if err != io.EOF {
		in.failed = err
		return err
	}
	if in.stop != math.MaxInt64 {
		return io.ErrUnexpectedEOF
	}
	return io.EOF
}

// fill makes at least one byte readable.
func (in *input) fill() error {
	if in.pos < in.lim {
		return nil
	}
	if in.offset() >= in.stop {
		return io.EOF
	}
	in.base += int64(in.pos)
	in.pos, in.lim, in.end = 0, 0, 0
	return in.more()
}

func (in *input) ReadByte() (byte, error) {
	if in.pos >= in.lim {
		if err := in.fill(); err != nil {
			return 0, err
		}
	}
	c := in.buf[in.pos]
	in.pos++
	return c, nil
}

// Read fills large p past the buffer, so that an uncompressed payload is not copied.
func (in *input) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if in.pos >= in.lim && len(p) >= len(in.buf) && in.err == nil && in.offset() < in.stop {
		in.base += int64(in.pos)
		in.pos, in.lim, in.end = 0, 0, 0
		n, err := in.r.Read(p[:min(int64(len(p)), in.stop-in.base)])
		in.base += int64(n)
		if in.err = err; n > 0 {
			return n, nil
		}
	}
	if err := in.fill(); err != nil {
		return 0, err
	}
	n := copy(p, in.buf[in.pos:in.lim])
	in.pos += n
	return n, nil
}

// skip gets past n bytes, which must be there.
func (in *input) skip(n int64) error {
	for n > 0 {
		if err := in.fill(); err != nil {
			return noEOF(err)
		}
		k := int(min(n, int64(in.lim-in.pos)))
		in.pos += k
		n -= int64(k)
	}
	return nil
}

// peek gives the next n bytes without consuming them, or as many as the section has.
func (in *input) peek(n int) ([]byte, error) {
	for in.lim-in.pos < n && in.base+int64(in.lim) < in.stop {
		copy(in.buf, in.buf[in.pos:in.end])
		in.base += int64(in.pos)
		in.pos, in.lim, in.end = 0, in.lim-in.pos, in.end-in.pos
		if err := in.more(); err == io.EOF {
			break
		} else if err != nil {
			return nil, err
		}
	}
	return in.buf[in.pos:min(in.lim, in.pos+n)], nil
}

// need is peek for bytes that must be there.
func (in *input) need(n int) ([]byte, error) {
	p, err := in.peek(n)
	if err == nil && len(p) < n {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}

// jump goes on at offset off with what comes next: r has left out what is between.
//
//go:noinline
func (in *input) jump(off int64) { in.base += off - in.offset() }

// gzipWindow is how far back deflate can refer in bytes (RFC 1951, 2), so what must be known of
// the data before a point that is not fresh.
const gzipWindow = 32 << 10

// unpacker decompresses one section of the input. Read gives io.EOF only where the
// compressed data ends as it must. latestRestart gives the latest point at or before
// what Read has given.
type unpacker interface {
	io.Reader
	latestRestart() (restartPoint, bool)
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

// roomFor rounds the n bytes of a dictionary or window up to a power of two or one and a half of that, but not
// beyond the limit: of such sizes there are few, so that data which wants more and more cannot have new memory each
// time.
func roomFor(n, limit int64) int64 {
	room := int64(1) << bits.Len64(uint64(n-1))
	if less := room / 4 * 3; less >= n {
		room = less
	}
	return min(room, limit)
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

// source is where an artifact comes from: a file, a URL, a deployment, standard input.
type source struct {
	// open gives the bytes from off on, and tells what they are of. For off above 0, want
	// is what the first bytes were of; errChanged: it is not that any more. Standard input
	// can be opened once, at 0.
	open func(ctx context.Context, off int64, want sourceID) (io.ReadCloser, sourceID, error)
	// span gives a reader for parts of what open has told to be id; nil: there are no parts to be had.
	span  func(ctx context.Context, id sourceID) (spanReader, error)
	whole bool // open has found out that there are no parts
	once  bool // cannot be opened again
	id    sourceID
	in    io.ReadCloser // what was opened last
	stop  func()        // ends its context; nil: nothing was opened yet

	manifest string // SHA-256 that the artifact's has to have, hex; "": any

	mixed   bool // what came may be of two files: the server has told of it in two ways
	doubted bool
}

// spanReader reads parts of an artifact, one after the other, over one connection as long as that lasts. It is for one
// goroutine at a time, and outlives no context that it was made with. It is never silently wrong: what comes is of the
// place and the file that were asked for, as far as a server tells. After an error it is only good to be closed.
type spanReader interface {
	io.ReadCloser // io.EOF behind the last byte of the span, and before the first span; Close ends the connection
	// span aims the next Reads at the bytes from off up to, but not including, end, and returns when an answer has
	// begun; so how long that takes, but for the first one, is the round trip. What is left of the span before it
	// costs the connection. Errors, as of Read: errChanged: another file has come to stand there; errNoRanges: the
	// server, or one in between, does not give parts, and has been asked again where it did before; else as of
	// any download, which has been tried again and under new links.
	span(off, end int64) error
}

// doubtful tells once whether bad bytes from here are no proof that the artifact is bad.
func (s *source) doubtful() bool {
	yes := s.mixed && !s.doubted
	s.doubted = s.doubted || yes
	return yes
}

// from opens the source at off; the reader before it is closed.
func (s *source) from(ctx context.Context, off int64) (io.Reader, error) {
	s.close()
	ctx, s.stop = context.WithCancel(ctx)
	r, id, err := s.open(ctx, off, s.id)
	if err != nil {
		s.stop()
		return nil, err
	}
	s.in, s.id = r, id
	return r, nil
}

// want tells a download, which is one that is asked for piece by piece, that nothing from byte end on is wanted yet;
// it gives how many more requests that takes.
func (s *source) want(end int64) int64 {
	if in, ok := s.in.(interface{ want(int64) int64 }); ok {
		return in.want(end)
	}
	return 0
}

// halt gives an error to whoever waits for bytes of the source. It may be called from any goroutine.
func (s *source) halt() {
	if s.stop != nil {
		s.stop()
	}
}

//go:noinline
func (s *source) close() {
	if s.in != nil {
		s.in.Close()
		s.stop()
		s.in = nil
	}
}

func openFile(ctx context.Context, name string, off int64, want sourceID) (io.ReadCloser, sourceID, error) {
	f, err := openWaiting(ctx, name)
	if err != nil {
		return nil, sourceID{}, err
	}
	st, err := f.Stat()
	if err == nil && st.IsDir() {
		err = fmt.Errorf("%q is a directory, want an artifact file", name)
	}
	var id sourceID
	if err == nil {
		id = sourceID{Name: name, Size: st.Size(), Tag: st.ModTime().UTC().Format(time.RFC3339Nano)}
		if off > 0 && id != want {
			err = fmt.Errorf("%q: %w", name, errChanged)
		}
	}
	if err == nil && off > 0 { // not needed for a pipe, which cannot
		_, err = f.Seek(off, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, sourceID{}, err
	}
	return f, id, nil
}

// patientReader is standard input, which may wait for ever, until the program is told to end.
type patientReader struct {
	ctx context.Context
	src io.Reader
	buf []byte // not the caller's, as a read that is given up may still fill it
}

// patient makes in wait no longer than ctx lasts, too.
func patient(ctx context.Context, in io.Reader) io.Reader {
	if r, ok := in.(*patientReader); ok { // its context is one that ctx is of
		in = r.src
	}
	return &patientReader{ctx: ctx, src: in}
}

func (r *patientReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	if r.buf == nil {
		r.buf = make([]byte, 64<<10)
	}
	var n int
	var err error
	done := make(chan struct{})
	go func() {
		n, err = r.src.Read(r.buf[:min(len(p), len(r.buf))])
		close(done)
	}()
	select {
	case <-done:
		return copy(p, r.buf[:n]), err
	case <-r.ctx.Done():
		return 0, context.Cause(r.ctx)
	}
}

// sourceID tells one file from another that has come to stand in its place.
type sourceID struct {
	Name string `json:"name"` // path, or URL without its query, which may hold a signature
	Size int64  `json:"size"` // bytes; -1 if not known
	Tag  string `json:"tag"`  // ETag, Last-Modified or the time of the last change
}

// restartPoint is a place where decompression can be entered again.
type restartPoint struct {
	Kind  string // none, gzip, xz, zstd
	File  int64  // offset in the artifact of the next stored byte
	Bit   byte   `json:",omitempty"` // gzip: bits of that byte that belong to what comes before, 0 to 7
	Out   int64  // offset in the data tar of what it decodes to
	Fresh bool   // a gzip member, an xz block or a zstd frame starts here: nothing before it is needed
	Check byte   // xz: the integrity check that the stream header named
}
