// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"time"
)

const (
	// blockSize is the unit of comparing and writing in bytes. Most block drivers take no
	// larger request at once, and erase blocks of managed flash are a multiple of it.
	blockSize = 512 << 10

	// headSize is how much of a slot is zeroed at the start and written last, so that a slot
	// under construction has no file system that a bootloader or a mount could take for
	// whole. The superblocks of squashfs (0), ext4, f2fs, erofs (1 KiB) and btrfs (64 KiB)
	// lie within.
	headSize = 128 << 10

	// syncEvery bounds the dirty data in the page cache: a board with little memory must not
	// stall for minutes in one sync at the end, and progress should be what is on the medium.
	syncEvery = 8 << 20

	// keepAfter is when a checkpoint is kept though little has come since the last: on a
	// slow network a few MiB are many minutes.
	keepAfter = 30 * time.Second

	blocksInFlight = 2 // between the stages; with one for comparing this is all the memory, whatever the size of the image
)

// slotWriter writes one image to one slot and proves that it is there.
type slotWriter struct {
	dst        storage
	name       string // of the slot, letter and device, for messages
	size       int64  // of the image
	opt        writeOptions
	sequential bool                        // UBI volume: no reading while writing, no going back, the kernel guards it
	checkpoint func(checkpoint) error      // journals one; nil: none are wanted
	mark       func() (restartPoint, bool) // asks the source for a point to go on from
	halt       func()                      // ends a Read of the source that may wait for ever; nil: none does

	buffers [][]byte
	head    []byte     // what the start of the slot will hold, kept back
	in      digest     // of the image, as far as it has come in
	dirty   int64      // bytes in the page cache since the last sync
	last    checkpoint // the latest there could be
	kept    int64      // offset of the latest that was kept
	keptAt  time.Time
	done    int64 // of the image, in place
	stats   writeStats

	readRate float64 // of the slot, in bytes a second; 0: not known yet
}

// writeOptions are what a person or a test may choose. Sizes are in bytes, multiples of
// directAlign.
type writeOptions struct {
	writeAll    bool // do not compare with what is there
	noReadBack  bool
	progress    func(headway)
	block, head int64
	syncEvery   int64
	keepEvery   int64         // bytes of the image between two checkpoints, and four times that
	keepPause   time.Duration // if this has not passed
	readAhead   int           // of the artifact; 0: inputBuffer
	gap         int64         // between runs of a delta that are fetched as one; 0: as measured
}

func defaultWriteOptions() writeOptions {
	return writeOptions{block: blockSize, head: headSize, syncEvery: syncEvery, keepEvery: 8 << 20, keepPause: time.Second}
}

// writeStats says what an install cost, in bytes.
type writeStats struct{ Written, Same int64 }

// block is a piece of the image on its way through the stages. The same few are used again
// and again.
type block struct {
	buf    []byte
	data   []byte // what of buf is in use
	off    int64
	marked bool // from is valid: the image can be read again from there
	from   restartPoint
	same   bool        // it is in the slot already
	hashed chan uint32 // the CRC-32C of the image up to its end
}

// writeBody takes the image from src to the slot in one pass:
//
//	src ── read, decompress ──▶ compare with the slot ──▶ writeBody
//	 ▲                    └───▶ hash ───────────────────────┤
//	 └───────────────────── free blocks ────────────────────┘
//
// Each stage is a goroutine of its own, so that decompression, hashing, reading and writing
// go on at the same time; all have ended when it returns. start is behind the head, or where an earlier run got to.
func (w *slotWriter) writeBody(ctx context.Context, src io.Reader, start int64) error {
	free := make(chan *block, blocksInFlight)
	for i := range blocksInFlight {
		free <- &block{buf: w.buffer(i), hashed: make(chan uint32, 1)}
	}
	inner, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	compared := w.compareBlocks(inner, w.readBlocks(inner, stop, src, start, free))
	whole := false
	// Nothing of ours goes on with the source or the slot when this is left: both are about to be closed.
	defer func() {
		if byItself := inner.Err() != nil && ctx.Err() == nil; !whole && !byItself && w.halt != nil {
			w.halt()
		}
		stop(nil)
		for range compared {
		}
	}()
	err := w.takeBlocks(inner, compared, free, start)
	whole = err == nil
	return err
}

// takeBlocks writes what comes out of the stages before it.
func (w *slotWriter) takeBlocks(ctx context.Context, compared <-chan *block, free chan<- *block, start int64) error {
	w.keptAt, w.done = time.Now(), start
	w.report(phaseWrite, start, w.size)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case b, more := <-compared:
			if !more || ctx.Err() != nil {
				return w.park(context.Cause(ctx))
			}
			if err := w.writeBlock(b); err != nil {
				return &targetError{err}
			}
			free <- b
		case <-tick.C: // a source that stalls may do so until the power goes
			if w.checkpointDue() {
				if err := w.keepCheckpoint(); err != nil {
					return &targetError{err}
				}
			}
			w.report(phaseWrite, w.done, w.size)
		case <-ctx.Done(): // not waiting for a source that may never give another byte
			return w.park(context.Cause(ctx))
		}
	}
}

// buffer is the writer's i-th block of memory. Writing and reading back do not happen at
// the same time and share them.
//
//go:noinline
func (w *slotWriter) buffer(i int) []byte {
	for len(w.buffers) <= i {
		w.buffers = append(w.buffers, alignedBuffer(int(w.opt.block)))
	}
	return w.buffers[i]
}

// targetError is one of the slot or the journal. The source is not to blame.
type targetError struct{ error }

func (e *targetError) Unwrap() error { return e.error }

// readBlocks fills free blocks from src; they end at multiples of the block size.
func (w *slotWriter) readBlocks(ctx context.Context, stop context.CancelCauseFunc, src io.Reader, off int64,
	free <-chan *block) <-chan *block {
	out, hash, hashed := make(chan *block), make(chan *block, blocksInFlight), make(chan struct{})
	go func() {
		w.hashBlocks(hash)
		close(hashed)
	}()
	go func() {
		defer close(out)
		defer func() {
			close(hash)
			<-hashed
		}()
		for off < w.size {
			var b *block
			select {
			case b = <-free:
			case <-ctx.Done():
				return
			}
			b.data, b.off = b.buf[:min(w.opt.block-off%w.opt.block, w.size-off)], off
			if _, err := io.ReadFull(src, b.data); err != nil {
				stop(noEOF(err))
				return
			}
			off += int64(len(b.data))
			if b.marked = w.checkpoint != nil; b.marked {
				b.from, b.marked = w.mark()
			}
			hash <- b // does not wait: there are no more blocks than have room
			select {
			case out <- b:
			case <-ctx.Done():
				return
			}
		}
		// The source checks at its end what stands behind the image.
		if n, err := io.ReadFull(src, make([]byte, 1)); n > 0 {
			stop(fmt.Errorf("the image goes on after its %d bytes", w.size))
		} else if err != io.EOF {
			stop(err)
		}
	}()
	return out
}

// hashBlocks sums up what comes in.
func (w *slotWriter) hashBlocks(in <-chan *block) {
	for b := range in {
		w.in.Write(b.data)
		b.hashed <- w.in.crc
	}
}

// compareBlocks finds out which blocks are there already.
func (w *slotWriter) compareBlocks(ctx context.Context, in <-chan *block) <-chan *block {
	out, old := make(chan *block), w.buffer(blocksInFlight)
	go func() {
		defer close(out)
		for b := range in {
			// Of a block that differs its first bytes nearly always do; the rest need not be read then.
			some := min(directAlign, len(b.data))
			b.same = !w.opt.writeAll && !w.sequential && w.equal(b, old, 0, some) && w.equal(b, old, some, len(b.data))
			select {
			case out <- b:
			case <-ctx.Done():
			}
		}
	}()
	return out
}

// equal compares a part of a block with the slot. What cannot be read is written: that may mend
// it, and the read-back will tell.
func (w *slotWriter) equal(b *block, old []byte, from, to int) bool {
	n, _ := w.dst.ReadAt(old[from:to], b.off+int64(from))
	return bytes.Equal(old[from:from+n], b.data[from:to])
}

// writeBlock writes one block where it differs from what is there.
func (w *slotWriter) writeBlock(b *block) error {
	if b.same {
		w.stats.Same += int64(len(b.data))
	} else {
		if _, err := w.dst.WriteAt(b.data, b.off); err != nil {
			return fmt.Errorf("writing slot %s at %d: %w", w.name, b.off, err)
		}
		w.stats.Written += int64(len(b.data))
		if !direct(w.dst) {
			w.dirty += int64(len(b.data))
		}
	}
	check := <-b.hashed
	if w.dirty >= w.opt.syncEvery {
		if err := w.sync(); err != nil {
			return err
		}
	}
	w.done = b.off + int64(len(b.data))
	w.report(phaseWrite, w.done, w.size)
	if b.marked {
		w.last = checkpoint{Offset: b.off + int64(len(b.data)), Total: w.size, Check: check, From: b.from}
	}
	if b.marked && w.checkpointDue() {
		return w.keepCheckpoint()
	}
	return nil
}

// report says how far a phase has come.
func (w *slotWriter) report(p phase, done, total int64) {
	if w.opt.progress == nil {
		return
	}
	h := headway{phase: p, done: done, total: total, written: w.stats.Written, readRate: w.readRate}
	if p == phaseWrite && !w.opt.noReadBack {
		h.later = w.size - int64(len(w.head))
	}
	w.opt.progress(h)
}

// checkpointDue: a checkpoint costs two syncs, so a fast install keeps fewer of them; a slow download
// keeps one though little has come.
func (w *slotWriter) checkpointDue() bool {
	far, since := w.last.Offset-w.kept, time.Since(w.keptAt)
	return far >= w.opt.keepEvery && (since >= w.opt.keepPause || far >= 4*w.opt.keepEvery) || far > 0 &&
		since >= keepAfter
}

// keepCheckpoint hands the latest checkpoint on. It promises that all before it is durable, also
// what was found to be there already: that may be in the page cache only, left by a run
// that was killed.
func (w *slotWriter) keepCheckpoint() error {
	if err := w.sync(); err != nil {
		return err
	}
	w.kept, w.keptAt = w.last.Offset, time.Now()
	return w.checkpoint(w.last)
}

// park keeps the latest checkpoint of a write that ends early.
func (w *slotWriter) park(cause error) error {
	if cause == nil || w.last.Offset <= w.kept {
		return cause
	}
	return errors.Join(cause, w.keepCheckpoint())
}

func (w *slotWriter) sync() error {
	if err := w.dst.Sync(); err != nil {
		return fmt.Errorf("syncing slot %s: %w", w.name, err)
	}
	w.dirty = 0
	return nil
}

// takeHead reads what the start of the slot will hold, and keeps it back.
func (w *slotWriter) takeHead(src io.Reader) error {
	w.in = digest{sha: sha256.New()}
	if w.sequential {
		return nil
	}
	w.head = alignedBuffer(int(min(w.opt.head, w.size)))
	if _, err := io.ReadFull(src, w.head); err != nil {
		return noEOF(err)
	}
	w.in.Write(w.head)
	return nil
}

// alreadyInstalled tells whether the image whose head was taken and whose SHA-256 is sum is in the slot
// already, durably. The slot is read as a whole only if it starts with that head, where file
// systems say when they were made and what is free in them.
func (w *slotWriter) alreadyInstalled(ctx context.Context, sum [sha256.Size]byte) (bool, error) {
	if w.sequential || w.opt.writeAll || w.opt.noReadBack {
		return false, nil
	}
	old, begun := w.buffer(0)[:len(w.head)], time.Now()
	n, _ := w.dst.ReadAt(old, 0)
	w.readAtRate(int64(n), begun)
	if !bytes.Equal(old[:n], w.head) {
		return false, nil
	}
	// An earlier writer's data may be in a cache yet. That it got lost is told once only (fsync(2)):
	// what the cache says is not to be believed after that.
	if err := w.sync(); err != nil {
		return false, &targetError{err}
	}
	back := digest{sha: sha256.New()}
	err := w.hashSlot(ctx, phaseCheck, &back, 0, w.size) // what cannot be read is written
	return err == nil && [sha256.Size]byte(back.sha.Sum(nil)) == sum, nil
}

// readAtRate takes down how fast n bytes of the slot were read. What is little is hardly more than
// the time to get there.
func (w *slotWriter) readAtRate(n int64, begun time.Time) {
	if d := time.Since(begun).Seconds(); d > 0 && n >= headSize {
		w.readRate = float64(n) / d
	}
}

// invalidate zeroes the head of the slot, durably, before any other byte of it changes and
// again when what was written turns out wrong.
func (w *slotWriter) invalidate() error {
	if w.sequential {
		return nil
	}
	if _, err := w.dst.WriteAt(alignedBuffer(len(w.head)), 0); err != nil {
		return fmt.Errorf("writing slot %s at 0: %w", w.name, err)
	}
	return w.sync()
}

// sum is the SHA-256 of the image that has come in. What an earlier run wrote counts as the slot
// gives it.
func (w *slotWriter) sum() [sha256.Size]byte { return [sha256.Size]byte(w.in.sha.Sum(nil)) }

// verifyReadback reads the whole image back past the page cache: what counts is what the medium gives,
// not what was sent to it. The head is not there yet and counts as what it will be. A CRC-32C
// tells whether it is the same, as what came in is known by its SHA-256.
func (w *slotWriter) verifyReadback(ctx context.Context) error {
	// What is in the page cache or in the cache of the device is not on the medium. After a failure
	// it must not be started over: the cache would have what the medium lacks.
	if err := w.sync(); err != nil {
		return &targetError{err}
	}
	if w.opt.noReadBack {
		return nil
	}
	var back digest
	back.Write(w.head)
	if err := w.hashSlot(ctx, phaseReadBack, &back, int64(len(w.head)), w.size); err != nil {
		return err
	}
	if back.crc != w.in.crc {
		return withHint(fmt.Errorf("slot %s reads back with CRC %08x, want %08x: what was written is not what is there",
			w.name, back.crc, w.in.crc),
			"the storage is failing, or something else writes to it; nothing was switched over")
	}
	return nil
}

// finish writes the head, now that all the rest is proven, and proves that, too.
func (w *slotWriter) finish() error {
	if len(w.head) == 0 {
		return nil
	}
	if _, err := w.dst.WriteAt(w.head, 0); err != nil {
		return fmt.Errorf("writing slot %s at 0: %w", w.name, err)
	}
	w.stats.Written += int64(len(w.head))
	if err := w.sync(); err != nil { // the caller flips the boot environment next
		return err
	}
	back := alignedBuffer(len(w.head))
	if n, err := w.dst.ReadAt(back, 0); n < len(back) {
		return errors.Join(fmt.Errorf("reading slot %s back at 0: %w", w.name, noEOF(err)), w.invalidate())
	}
	if !w.opt.noReadBack && !bytes.Equal(back, w.head) {
		return errors.Join(fmt.Errorf("slot %s: its first %d bytes read back differently from what was written: the "+
			"storage is failing", w.name, len(back)), w.invalidate())
	}
	return nil
}

// digest is what is known of a run of bytes: a CRC-32C, which tells accidents and costs next
// to nothing, and where it is wanted SHA-256.
type digest struct {
	crc uint32
	sha hash.Hash
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (d *digest) Write(p []byte) (int, error) {
	d.crc = crc32.Update(d.crc, castagnoli, p)
	if d.sha != nil {
		d.sha.Write(p)
	}
	return len(p), nil
}

// hashSlot hashes the bytes of the slot from off, a multiple of directAlign, to end, past
// the page cache. The next block is read while the last is being hashed.
func (w *slotWriter) hashSlot(ctx context.Context, p phase, h io.Writer, off, end int64) error {
	type piece struct {
		data []byte
		err  error
	}
	begun, first, done := time.Now(), off, off
	w.report(p, off, end)
	pieces, free := make(chan piece), make(chan []byte, 2)
	free <- w.buffer(0)
	free <- w.buffer(1)
	go func() {
		defer close(pieces)
		for ; off < end && ctx.Err() == nil; off += w.opt.block {
			buf := <-free
			n := min(w.opt.block, end-off)
			if got, err := w.dst.ReadAt(buf[:n], off); got < int(n) {
				pieces <- piece{err: fmt.Errorf("reading slot %s back at %d: %w", w.name, off, noEOF(err))}
				return
			}
			pieces <- piece{data: buf[:n]}
		}
	}()
	var failed error
	for piece := range pieces {
		if piece.err != nil {
			failed = piece.err
			continue
		}
		h.Write(piece.data)
		done += int64(len(piece.data))
		w.report(p, done, end)
		free <- piece.data[:w.opt.block]
	}
	w.readAtRate(done-first, begun)
	if failed == nil {
		failed = context.Cause(ctx)
	}
	return failed
}

// verifyPrefix checks that the slot still holds the image up to the checkpoint. That tells
// accidents; what tells all is the SHA-256 of the whole at the end.
func (w *slotWriter) verifyPrefix(ctx context.Context, c *checkpoint) error {
	if err := w.hashSlot(ctx, phaseCheck, &w.in, int64(len(w.head)), c.Offset); err != nil {
		return err
	}
	if w.in.crc != c.Check {
		return fmt.Errorf("slot %s does not hold what was written: something else wrote to it", w.name)
	}
	w.kept = c.Offset
	return nil
}
