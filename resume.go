// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// source is where an artifact comes from: a file, a URL, a deployment, standard input.
type source struct {
	name string
	// open gives the bytes from off on, and tells what they are of. For off above 0, want
	// is what the first bytes were of; errChanged: it is not that any more. Standard input
	// can be opened once, at 0.
	open func(ctx context.Context, off int64, want sourceID) (io.ReadCloser, sourceID, error)
	once bool // cannot be opened again
	id   sourceID
	in   io.ReadCloser // what was opened last
}

// errChanged: other bytes stand where those of before stood. What was fetched is of no use.
var errChanged = errors.New("the artifact at the source has changed")

// errStartOver: what an interrupted install left cannot be gone on with.
var errStartOver = errors.New("the install starts over")

// from opens the source at off; the reader before it is closed.
func (s *source) from(ctx context.Context, off int64) (io.Reader, error) {
	s.close()
	r, id, err := s.open(ctx, off, s.id)
	if err != nil {
		return nil, err
	}
	s.in, s.id = r, id
	return r, nil
}

func (s *source) close() {
	if s.in != nil {
		s.in.Close()
		s.in = nil
	}
}

// source finds what a person named.
func (a *app) source(name string) *source {
	switch {
	case name == "-":
		return &source{name: name, once: true, open: func(context.Context, int64, sourceID) (io.ReadCloser, sourceID, error) {
			return io.NopCloser(a.in), sourceID{Name: name, Size: -1}, nil
		}}
	case isURL(name):
		return a.urlSource(name)
	}
	return &source{name: name, open: func(_ context.Context, off int64, want sourceID) (io.ReadCloser, sourceID, error) {
		return openFile(name, off, want)
	}}
}

func isURL(name string) bool {
	return strings.HasPrefix(name, "http://") || strings.HasPrefix(name, "https://")
}

func openFile(name string, off int64, want sourceID) (io.ReadCloser, sourceID, error) {
	f, err := os.Open(name)
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

// goOn takes up an interrupted write: it returns the offset in the image to go on from, with
// w as it was there, or 0 when there is nothing to go on from.
//
// What is trusted is little. The artifact is the same one, because its manifest is (the
// flow drops the checkpoint otherwise); that the slot still holds what was written is
// checked by hashing it; and at the end the whole image is read back in any case.
func (r *rootfs) goOn(ctx context.Context, w *slotWriter, a *artifact) (int64, error) {
	c := r.u.Checkpoint
	switch {
	case c == nil:
		if r.u.Tries > 1 {
			r.lg.warnf("no place is known where to go on: the artifact is read again from its start, which costs network traffic but no writes")
		}
		return 0, nil
	case !r.again() || w.sequential:
		return 0, nil
	case c.Slot != w.name, c.Total != w.size, c.Offset < min(r.opt.head, w.size), c.Offset > w.size, c.From.File < 0, c.From.Bit > 7:
		r.lg.warnf("the journal tells of a write of %d bytes to slot %q, and this one is of %d to %q: the install starts over", c.Total, c.Slot, w.size, w.name)
		return 0, nil
	case c.Source.Size != r.src.id.Size || c.Source.Tag != r.src.id.Tag:
		r.lg.warnf("the artifact's file is another one than before: the install starts over")
		return 0, nil
	}
	if err := r.reenter(ctx, w, a, c); err != nil {
		if ctx.Err() != nil || exitCode(err) == exitTempFail {
			return 0, err
		}
		return 0, fmt.Errorf("%w: %w", errStartOver, err)
	}
	r.lg.infof("going on at %s of %s", mega(c.Offset), mega(c.Total))
	return c.Offset, nil
}

func (r *rootfs) reenter(ctx context.Context, w *slotWriter, a *artifact, c *checkpoint) error {
	// The head is not in the slot yet; it is at the start of the payload, which has to be
	// fetched for header and signature anyway.
	if err := w.takeHead(r.file.unhashed()); err != nil {
		return err
	}
	r.src.close() // it would only send on while the slot is being hashed
	if err := w.proveStart(ctx, c); err != nil {
		return err
	}
	var window []byte
	if !c.From.Fresh {
		end := c.From.Out - r.file.TarOffset
		if end < gzipWindow || end > c.Offset {
			return fmt.Errorf("the journal names byte %d of %d as a place to go on from", end, c.Offset)
		}
		window = make([]byte, gzipWindow)
		if _, err := w.dst.ReadAt(window, end-gzipWindow); err != nil {
			return err
		}
		if behind := int64(len(w.head)) - (end - gzipWindow); behind > 0 {
			copy(window, w.head[int64(len(w.head))-behind:])
		}
	}
	in, err := r.src.from(ctx, c.From.File)
	if err != nil {
		return err
	}
	r.file, err = a.resumePayload(c.From, window, in, r.file.Name, c.Offset)
	return err
}

// proveStart checks that the slot still holds the image up to the checkpoint. That tells
// accidents; what tells all is the SHA-256 of the whole at the end.
func (w *slotWriter) proveStart(ctx context.Context, c *checkpoint) error {
	if err := w.hashSlot(ctx, &w.in, int64(len(w.head)), c.Offset); err != nil {
		return err
	}
	if w.in.crc != c.Check {
		return fmt.Errorf("slot %q does not hold what was written: something else wrote to it", w.name)
	}
	w.kept = c.Offset
	return nil
}

// keepCheckpoint journals how far the write has come.
func (r *rootfs) keepCheckpoint(c checkpoint) error {
	c.Slot, c.Source = r.to.path, r.src.id
	r.u.Checkpoint = &c
	return r.save()
}
