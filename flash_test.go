// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
)

// Small sizes, so that the borders between blocks are met with little data.
var smallOptions = writeOptions{block: 16384, head: 4096, syncEvery: 2 * 16384}

func newWriter(dst storage, img []byte, opt writeOptions) *slotWriter {
	return &slotWriter{dst: dst, name: "B", size: int64(len(img)), opt: opt}
}

// flash does with a writer what an install does.
func (w *slotWriter) flash(ctx context.Context, src io.Reader) error {
	if err := errors.Join(w.takeHead(src), w.invalidate()); err != nil {
		return err
	}
	if err := w.writeBody(ctx, src, int64(len(w.head))); err != nil {
		return err
	}
	if err := w.verifyReadback(ctx); err != nil {
		return err
	}
	return w.finish()
}

// testBlocks is a slot image of n bytes in which no block equals another.
func testBlocks(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8) ^ byte(i>>15)*37 | 1
	}
	return b
}

func writerSizes(o writeOptions) []int64 {
	b, h := o.block, o.head
	return []int64{1, 511, 512, h - 1, h, h + 1, b - 1, b, b + 1, 2*b - 1, 2 * b, 2*b + 1, 3*b + 5}
}

func TestWriterSizes(t *testing.T) {
	for _, o := range []writeOptions{smallOptions, defaultWriteOptions()} {
		for _, n := range writerSizes(o) {
			for _, all := range []bool{false, true} {
				t.Run(fmt.Sprintf("%d of %d,all=%v", n, o.block, all), func(t *testing.T) {
					img := testBlocks(int(n))
					d := &memDisk{data: bytes.Repeat([]byte{0xee}, int(n)+777)}
					if n > o.block { // the second block is there already
						copy(d.data[o.block:min(n, 2*o.block)], img[o.block:])
					}
					o.writeAll = all
					w := newWriter(d, img, o)
					if err := w.flash(t.Context(), bytes.NewReader(img)); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(d.data[:n], img) {
						t.Error("the image is not what was written")
					}
					if len(bytes.Trim(d.data[n:], "\xee")) > 0 {
						t.Error("bytes behind the image changed")
					}
					same := int64(0)
					if n > o.block && !all {
						same = min(n, 2*o.block) - o.block
					}
					if want := (writeStats{Written: n - same, Same: same}); w.stats != want {
						t.Errorf("got %+v, want %+v", w.stats, want)
					}
				})
			}
		}
	}
}

// All is read back, so that a write which landed elsewhere as well is found.
func TestWriterProof(t *testing.T) {
	img := testBlocks(5*16384 + 100)
	d := &memDisk{data: bytes.Clone(img)}
	d.data[4*16384] ^= 1
	w, src := newWriter(d, img, smallOptions), bytes.NewReader(img)
	if err := errors.Join(w.takeHead(src), w.invalidate(), w.writeBody(t.Context(), src, 4096)); err != nil {
		t.Fatal(err)
	}
	if err, sum := w.verifyReadback(t.Context()), w.sum(); err != nil || sum != sha256.Sum256(img) {
		t.Errorf("got %x, %v, want %x", sum, err, sha256.Sum256(img))
	}
	d.data[2*16384] ^= 1
	var target *targetError
	if err := w.verifyReadback(t.Context()); err == nil || errors.As(err, &target) {
		t.Errorf("a block that has changed behind the comparison: %v", err)
	}
	d.syncErr = syscall.EIO
	if err := w.verifyReadback(t.Context()); !errors.As(err, &target) {
		t.Errorf("a sync that fails: got %v, after which no other attempt may be made", err)
	}
}

// hangs gives bytes up to a place, and then waits until it is halted.
type hangs struct {
	io.Reader
	waits, halted chan struct{}
	gone          bool // not guarded: so the race detector sees a reader that goes on
}

func (h *hangs) Read(p []byte) (int, error) {
	if n, err := h.Reader.Read(p); err != io.EOF {
		return n, err
	}
	close(h.waits)
	<-h.halted
	h.gone = true
	return 0, errors.New("halted")
}

// When a slot fails, or the program is told to end, while the source says nothing, then nobody reads source or slot
// any more by the time that is known.
func TestWriterEndsWhole(t *testing.T) {
	img := testBlocks(3 * 16384)
	for _, want := range []error{syscall.EIO, errAborted} {
		ctx, stop := context.WithCancelCause(t.Context())
		src := &hangs{Reader: bytes.NewReader(img[:16384+100]), waits: make(chan struct{}), halted: make(chan struct{})}
		d := &memDisk{data: make([]byte, len(img))}
		w := newWriter(d, img, smallOptions)
		w.halt = func() { close(src.halted) }
		if err := errors.Join(w.takeHead(src), w.invalidate()); err != nil {
			t.Fatal(err)
		}
		d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) {
			<-src.waits
			if want == errAborted {
				stop(want)
				return len(p), nil
			}
			return 0, want
		}
		if err := w.writeBody(ctx, src, 4096); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
		if !src.gone {
			t.Errorf("%v: the source is still being read", want)
		}
		stop(nil)
	}
}

// readFar remembers the furthest offset of its reads.
type readFar struct {
	*memDisk
	far int64
}

func (r *readFar) ReadAt(p []byte, off int64) (int, error) {
	r.far = max(r.far, off)
	return r.memDisk.ReadAt(p, off)
}

// What makes an image count as there already, and what does not.
func TestWriterHolds(t *testing.T) {
	img := testBlocks(5*16384 + 100)
	sum := sha256.Sum256(img)
	for name, c := range map[string]struct {
		change func(*slotWriter, *memDisk)
		want   bool
		reads  bool // the whole slot
		err    error
	}{
		"all there":       {func(*slotWriter, *memDisk) {}, true, true, nil},
		"more behind it":  {func(_ *slotWriter, d *memDisk) { d.data = append(d.data, "more"...) }, true, true, nil},
		"another head":    {func(_ *slotWriter, d *memDisk) { d.data[4095] ^= 1 }, false, false, nil},
		"another end":     {func(_ *slotWriter, d *memDisk) { d.data[len(d.data)-1] ^= 1 }, false, true, nil},
		"too short":       {func(_ *slotWriter, d *memDisk) { d.data = d.data[:len(d.data)-1] }, false, true, nil},
		"write all":       {func(w *slotWriter, _ *memDisk) { w.opt.writeAll = true }, false, false, nil},
		"no reading back": {func(w *slotWriter, _ *memDisk) { w.opt.noReadBack = true }, false, false, nil},
		"UBI volume":      {func(w *slotWriter, _ *memDisk) { w.sequential = true }, false, false, nil},
		"sync fails":      {func(_ *slotWriter, d *memDisk) { d.syncErr = syscall.EIO }, false, false, syscall.EIO},
	} {
		t.Run(name, func(t *testing.T) {
			d := &memDisk{data: bytes.Clone(img)}
			d.onWrite = func(*memDisk, []byte, int64) (int, error) {
				t.Error("something was written")
				return 0, syscall.EIO
			}
			r := &readFar{memDisk: d}
			w := newWriter(r, img, smallOptions)
			c.change(w, d)
			if err := w.takeHead(bytes.NewReader(img)); err != nil {
				t.Fatal(err)
			}
			got, err := w.alreadyInstalled(t.Context(), sum)
			if got != c.want || r.far > 0 != c.reads || !errors.Is(err, c.err) {
				t.Errorf("got %v, %v, read up to %d; want %v, %v, all read: %v", got, err, r.far, c.want, c.err, c.reads)
			}
		})
	}
}

// The bootloader must never find a whole head before a whole image, and dirty data is
// bounded: the order of writes and syncs.
func TestWriterOrder(t *testing.T) {
	img := testBlocks(7*16384 + 100)
	d := &recorder{memDisk: memDisk{data: make([]byte, len(img))}}
	if err := newWriter(d, img, smallOptions).flash(t.Context(), bytes.NewReader(img)); err != nil {
		t.Fatal(err)
	}
	want := []string{"write 0+4096 zero", "sync", "write 4096+12288", "write 16384+16384", "write 32768+16384", "sync",
		"write 49152+16384", "write 65536+16384", "sync", "write 81920+16384", "write 98304+16384", "sync",
		"write 114688+100", "sync",
		"write 0+4096", "sync"}
	if !slices.Equal(d.log, want) {
		t.Errorf("got  %q\nwant %q", d.log, want)
	}
}

type recorder struct {
	memDisk
	log []string
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	l := fmt.Sprintf("write %d+%d", off, len(p))
	if len(bytes.Trim(p, "\x00")) == 0 {
		l += " zero"
	}
	r.log = append(r.log, l)
	return r.memDisk.WriteAt(p, off)
}

func (r *recorder) Sync() error { r.log = append(r.log, "sync"); return r.memDisk.Sync() }

// A source that fails leaves a slot that cannot boot and an error that says why.
func TestWriterSourceFails(t *testing.T) {
	img := testBlocks(6*16384 + 9)
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		src  io.Reader
		want error
		text string
	}{
		"ends early":    {bytes.NewReader(img[:50000]), io.ErrUnexpectedEOF, ""},
		"ends at once":  {bytes.NewReader(nil), io.ErrUnexpectedEOF, ""},
		"fails":         {io.MultiReader(bytes.NewReader(img[:50000]), iotest.ErrReader(broken)), broken, ""},
		"fails at end":  {io.MultiReader(bytes.NewReader(img), iotest.ErrReader(broken)), broken, ""},
		"goes on":       {io.MultiReader(bytes.NewReader(img), strings.NewReader("x")), nil, "goes on after its 98313 bytes"},
		"one at a time": {iotest.OneByteReader(iotest.TimeoutReader(bytes.NewReader(img))), iotest.ErrTimeout, ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := &memDisk{data: bytes.Clone(img)}
			err := newWriter(d, img, smallOptions).flash(t.Context(), c.src)
			if err == nil || !errors.Is(err, c.want) && c.want != nil || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v %q", err, c.want, c.text)
			}
			if len(bytes.Trim(d.data[:4096], "\x00")) > 0 {
				t.Error("the head is not zero")
			}
		})
	}
}

func TestWriterSlowSources(t *testing.T) {
	img := testBlocks(2*16384 + 9)
	for name, src := range map[string]io.Reader{
		"halves":        iotest.HalfReader(bytes.NewReader(img)),
		"bytes":         iotest.OneByteReader(bytes.NewReader(img)),
		"data with EOF": iotest.DataErrReader(bytes.NewReader(img)),
	} {
		d := &memDisk{data: make([]byte, len(img))}
		if err := newWriter(d, img, smallOptions).flash(t.Context(), src); err != nil || !bytes.Equal(d.data, img) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// SIGTERM while a source gives nothing any more: the writer does not wait for it.
func TestWriterCancelled(t *testing.T) {
	img := testBlocks(6 * 16384)
	ctx, cancel := context.WithCancel(t.Context())
	r, pw := io.Pipe()
	go func() {
		pw.Write(img[:40000])
		cancel()
	}()
	d := &memDisk{data: bytes.Clone(img)}
	w := newWriter(d, img, smallOptions)
	w.halt = func() { r.Close() }
	if err := w.flash(ctx, r); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if len(bytes.Trim(d.data[:4096], "\x00")) > 0 {
		t.Error("the head is not zero")
	}
}

// Cancelled in the read-back, the slot stays without its head.
func TestReadBackCancelled(t *testing.T) {
	img := testBlocks(6 * 16384)
	ctx, cancel := context.WithCancel(t.Context())
	d := &faultyDisk{memDisk: memDisk{data: bytes.Clone(img)}, fault: func(string) error { return nil }}
	d.reads = func(int64) error { cancel(); return nil }
	o := smallOptions
	o.writeAll = true // reads are those of the read-back
	if err := newWriter(d, img, o).flash(ctx, bytes.NewReader(img)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if len(bytes.Trim(d.data[:4096], "\x00")) > 0 || !bytes.Equal(d.data[4096:], img[4096:]) {
		t.Error("not all is there but the head")
	}
}

// field case 23 (mender-flash ignores the last fsync): every error counts, and says where.
func TestWriterDeviceErrors(t *testing.T) {
	img := testBlocks(3 * 16384)
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC, syscall.ENXIO} {
		for k := 1; ; k++ {
			op, hit := 0, false
			d := &faultyDisk{memDisk: memDisk{data: make([]byte, len(img))}}
			d.fault = func(what string) error {
				if op++; op != k {
					return nil
				}
				hit = true
				return &os.PathError{Op: what, Path: "slot", Err: errno}
			}
			err := newWriter(d, img, smallOptions).flash(t.Context(), bytes.NewReader(img))
			if !hit {
				if err != nil || k < 8 {
					t.Errorf("%d operations, then %v", k, err)
				}
				break
			}
			if !errors.Is(err, errno) || !strings.Contains(err.Error(), "slot B") {
				t.Errorf("operation %d: got %v, want %v", k, err, errno)
			}
			if strings.Contains(err.Error(), "write slot") && !strings.Contains(err.Error(), "slot B at ") {
				t.Errorf("operation %d: no offset in %v", k, err)
			}
		}
	}
}

// faultyDisk asks before each write and sync, and each read of the read-back.
type faultyDisk struct {
	memDisk
	fault func(what string) error
	reads func(off int64) error
}

func (d *faultyDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.fault("write"); err != nil {
		return 0, err
	}
	return d.memDisk.WriteAt(p, off)
}

func (d *faultyDisk) Sync() error { return d.fault("sync") }

func (d *faultyDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.reads != nil {
		if err := d.reads(off); err != nil {
			return 0, err
		}
	}
	return d.memDisk.ReadAt(p, off)
}

// A block that cannot be read for comparing is written, which may mend it; one that cannot
// be read back fails the install (field case 23).
func TestWriterReadErrors(t *testing.T) {
	img := testBlocks(4 * 16384)
	for name, c := range map[string]struct {
		bad     []int64 // the read-back's blocks begin behind the head, as does the second look at a block
		want    error
		written int64 // the blocks and, if they are mended, the head
	}{"mended": {[]int64{2 * 16384}, nil, 16384 + 4096},
		"stays": {[]int64{2 * 16384, 4096 + 16384}, syscall.EIO, 2 * 16384}} {
		d := &faultyDisk{memDisk: memDisk{data: bytes.Clone(img)}, fault: func(string) error { return nil }}
		d.reads = func(off int64) error {
			if slices.Contains(c.bad, off) {
				return &os.PathError{Op: "read", Path: "slot", Err: syscall.EIO}
			}
			return nil
		}
		w := newWriter(d, img, smallOptions)
		err := w.flash(t.Context(), bytes.NewReader(img))
		if !errors.Is(err, c.want) || c.want != nil && !strings.Contains(err.Error(), "back at 20480") {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
		if w.stats.Written != c.written {
			t.Errorf("%s: wrote %d bytes, want %d", name, w.stats.Written, c.written)
		}
	}
}

// field case 24: a write that succeeds and puts something else on the medium. The slot must
// not stay bootable.
func TestReadBackFindsWrongContent(t *testing.T) {
	img := testBlocks(3*16384 + 7)
	for _, at := range []int64{0, 4095, 4096, 16384, int64(len(img)) - 1} {
		for _, noReadBack := range []bool{false, true} {
			d := &memDisk{data: make([]byte, len(img))}
			d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) {
				n := copy(d.data[off:], p)
				if off <= at && at < off+int64(n) && len(bytes.Trim(p, "\x00")) > 0 {
					d.data[at] ^= 1
				}
				return n, nil
			}
			o := smallOptions
			o.noReadBack = noReadBack
			err := newWriter(d, img, o).flash(t.Context(), bytes.NewReader(img))
			if noReadBack {
				if err != nil {
					t.Errorf("--no-read-back: %v", err)
				}
				continue
			}
			if err == nil || !strings.Contains(err.Error(), " back ") {
				t.Errorf("byte %d: got %v", at, err)
			}
			if len(bytes.Trim(d.data[:4096], "\x00")) > 0 {
				t.Errorf("byte %d: the slot stays bootable", at)
			}
		}
	}
}

// fileStorage is a real file of n bytes on the file system of the temporary directory.
func fileStorage(t testing.TB, n int) (*device, string) {
	t.Helper()
	path := writeTemp(t, "p3", make([]byte, n))
	st, err := openStorage(path, openSlot)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st.(*device), path
}

// Direct I/O takes whole sectors; images and files end anywhere.
func TestReadBackOddSizes(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 511, 4095, 4096, 4097, 16384, 16385, 20992, 3*16384 + 5} {
		for _, behind := range []int{0, 1, 512, 10000} {
			img := testBlocks(size)
			d, path := fileStorage(t, size+behind)
			if err := newWriter(d, img, smallOptions).flash(t.Context(), bytes.NewReader(img)); err != nil {
				t.Errorf("%d bytes in %d: %v", size, size+behind, err)
			}
			if got, _ := os.ReadFile(path); !bytes.Equal(got[:size], img) || len(got) != size+behind {
				t.Errorf("%d bytes in %d: wrong content", size, size+behind)
			}
		}
	}
}

func TestReadBackEndsEarly(t *testing.T) {
	img := testBlocks(40000)
	d, path := fileStorage(t, len(img))
	w := newWriter(d, img, smallOptions)
	if err := os.Truncate(path, 39999); err != nil {
		t.Fatal(err)
	}
	if err := w.verifyReadback(t.Context()); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v, want %v", err, io.ErrUnexpectedEOF)
	}
}

// loopDevice gives a loop device over a new file of n bytes.
func loopDevice(t testing.TB, n int64, args ...string) (node, file string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: losetup")
	}
	needTool(t, "losetup")
	file = filepath.Join(t.TempDir(), "loop.img")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, n); err != nil {
		t.Fatal(err)
	}
	return attach(t, file, args...), file
}

// attach makes a loop device of the file. Its number is not 2, which is slot A's on many boards.
func attach(t testing.TB, file string, args ...string) string {
	t.Helper()
	for {
		out, err := exec.Command("losetup", append(args, "-f", "--show", file)...).CombinedOutput()
		if err != nil {
			t.Skipf("needs a loop device: %v: %s", err, out)
		}
		node := strings.TrimSpace(string(out))
		t.Cleanup(func() { exec.Command("losetup", "-d", node).Run() })
		if node != "/dev/loop2" {
			return node
		}
	}
}

// The end of a device whose size is a multiple of 512 but not of 4096.
func TestWriterFillsDevice(t *testing.T) {
	for _, size := range []int64{1<<20 + 512, 64 << 10, 3*16384 + 7*512} {
		node, file := loopDevice(t, size)
		img := testBlocks(int(size))
		st, err := openStorage(node, openSlot)
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		if st.Size() != size {
			t.Errorf("size %d, want %d", st.Size(), size)
		}
		if err := newWriter(st, img, smallOptions).flash(t.Context(), bytes.NewReader(img)); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
		if got, _ := os.ReadFile(file); !bytes.Equal(got, img) {
			t.Errorf("%d bytes: wrong content", size)
		}
		if err := newWriter(st, append(img, 0), smallOptions).flash(t.Context(),
			bytes.NewReader(append(img, 0))); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("one byte more: got %v, want %v", err, syscall.ENOSPC)
		}
	}
}

// fwup#138, katl#132, field case 24: the page cache holds what was sent, the medium
// something else.
func TestReadBackPastPageCache(t *testing.T) {
	node, file := loopDevice(t, 1<<20)
	st, err := openStorage(node, openSlot)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	img := testBlocks(500000)
	w := newWriter(st, img, smallOptions)
	if err := w.flash(t.Context(), bytes.NewReader(img)); err != nil {
		t.Fatal(err)
	}
	through, err := openStorage(node, openRead)
	if err != nil {
		t.Fatal(err)
	}
	defer through.Close()
	if _, err := through.ReadAt(make([]byte, len(img)), 0); err != nil { // into the cache
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0}, 300001); err != nil {
		t.Fatal(err)
	}
	cached := make([]byte, 1)
	if _, err := through.ReadAt(cached, 300001); err != nil || cached[0] != img[300001] {
		t.Skip("the loop device does not cache: nothing to be fooled by")
	}
	if err := w.verifyReadback(t.Context()); err == nil {
		t.Error("the read-back believed the page cache")
	}
	if err := readUncached(through, cached, 300001); err != nil || cached[0] != 0 {
		t.Errorf("readUncached gives %d, %v", cached[0], err)
	}
}

// bigDisk claims any size and keeps what is written beyond 4 GiB.
type bigDisk struct {
	size, base int64
	data       []byte
}

func (d *bigDisk) at(off int64, n int) ([]byte, error) {
	if off < d.base || off+int64(n) > d.base+int64(len(d.data)) {
		return nil, fmt.Errorf("%d bytes at %d", n, off)
	}
	return d.data[off-d.base:][:n], nil
}

func (d *bigDisk) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > d.size {
		p = p[:d.size-off]
	}
	b, err := d.at(off, len(p))
	return copy(p, b), err
}

func (d *bigDisk) WriteAt(p []byte, off int64) (int, error) {
	b, err := d.at(off, len(p))
	return copy(b, p), err
}

func (d *bigDisk) Sync() error  { return nil }
func (d *bigDisk) Size() int64  { return d.size }
func (d *bigDisk) Close() error { return nil }

// field case 7: offsets beyond 4 GiB, where a 32-bit number would wrap.
func TestWriterBeyond4GiB(t *testing.T) {
	const size, start int64 = 5<<30 + 12345, 5<<30 - 2<<20
	d := &bigDisk{size: size, base: start, data: make([]byte, size-start)}
	img := testBlocks(int(size - start))
	w := &slotWriter{dst: d, name: "B", size: size, opt: defaultWriteOptions()}
	var last int64
	w.opt.progress = func(h headway) {
		if last = h.done; h.total != size || h.phase == phaseWrite && h.later != size || h.written > int64(len(img)) {
			t.Errorf("got %+v, want a total of %d", h, size)
		}
	}
	if err := w.writeBody(t.Context(), bytes.NewReader(img), start); err != nil {
		t.Fatal(err)
	}
	if last != size || !bytes.Equal(d.data, img) {
		t.Errorf("done %d of %d, content equal: %v", last, int64(size), bytes.Equal(d.data, img))
	}
	var back bytes.Buffer
	if err := w.hashSlot(t.Context(), phaseReadBack, &back, 5<<30, size); err != nil ||
		!bytes.Equal(back.Bytes(), img[2<<20:]) {
		t.Errorf("reading back beyond 4 GiB: %v", err)
	}
	r := &rootfs{to: &slot{path: "slot"}, file: &payloadFile{Name: "x", Size: size},
		m: &machine{open: func(string, openMode) (storage, error) { return &bigDisk{size: 1<<32 + 100}, nil }}}
	if _, err := r.checkSize(); exitCode(err) != exitRefused ||
		!strings.Contains(err.Error(), "5368721465 bytes, the slot 4294967396") {
		t.Errorf("too small: %v", err)
	}
}

// A checkpoint stands for bytes that are durable, and a later run goes on from it.
func TestWriterCheckpoints(t *testing.T) {
	img := testBlocks(9*16384 + 77)
	d := &recorder{memDisk: memDisk{data: make([]byte, len(img))}}
	var kept []checkpoint
	opt := smallOptions
	opt.keepEvery = 3 * 16384
	w := newWriter(d, img, opt)
	w.mark = func() (restartPoint, bool) { return restartPoint{Kind: "none"}, true }
	w.checkpoint = func(c checkpoint) error {
		if d.log[len(d.log)-1] != "sync" {
			t.Errorf("checkpoint at %d before its bytes are durable: %q", c.Offset, d.log)
		}
		kept = append(kept, c)
		return nil
	}
	if err := w.flash(t.Context(), bytes.NewReader(img)); err != nil {
		t.Fatal(err)
	}
	if len(kept) != 3 || kept[1].Offset != 6*16384 || kept[1].Total != int64(len(img)) || kept[1].From.Kind != "none" {
		t.Fatalf("checkpoints %+v", kept)
	}
	for _, c := range kept {
		if want := crc32.Checksum(img[:c.Offset], castagnoli); c.Check != want {
			t.Errorf("at %d: CRC %08x, want %08x", c.Offset, c.Check, want)
		}
		again := newWriter(&memDisk{data: append(make([]byte, 4096), d.data[4096:]...)}, img, opt)
		if err := errors.Join(again.takeHead(bytes.NewReader(img)), again.verifyPrefix(t.Context(), &c)); err != nil {
			t.Fatal(err)
		}
		if err := again.writeBody(t.Context(), bytes.NewReader(img[c.Offset:]), c.Offset); err != nil {
			t.Fatal(err)
		}
		if err, sum := again.verifyReadback(t.Context()), again.sum(); err != nil || sum != sha256.Sum256(img) {
			t.Errorf("from %d: %x, %v", c.Offset, sum, err)
		}
	}
	d.data[0], w.kept = 0, 0
	w.checkpoint = func(checkpoint) error { return syscall.ENOSPC }
	if err := w.flash(t.Context(), bytes.NewReader(img)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a checkpoint that fails: got %v", err)
	}
}

// What came since the last checkpoint is not lost when the source fails.
func TestWriterParks(t *testing.T) {
	img := testBlocks(9 * 16384)
	opt := smallOptions
	opt.keepEvery = 1 << 40
	d := &recorder{memDisk: memDisk{data: make([]byte, len(img))}}
	w := newWriter(d, img, opt)
	w.mark = func() (restartPoint, bool) { return restartPoint{}, true }
	var at int64
	w.checkpoint = func(c checkpoint) error {
		at = c.Offset
		if d.log[len(d.log)-1] != "sync" {
			t.Error("kept before it is durable")
		}
		return nil
	}
	r, pw := io.Pipe()
	broken := errors.New("broken")
	w.opt.progress = func(h headway) {
		if h.done == 4*16384 {
			go pw.CloseWithError(broken)
		}
	}
	go pw.Write(img[:4*16384+100])
	if err := w.flash(t.Context(), r); !errors.Is(err, broken) || at != 4*16384 {
		t.Errorf("got %v, kept %d", err, at)
	}
}

// sequentialDisk refuses what a UBI volume under update does (ubi cdev.c: -EBUSY for reads).
type sequentialDisk struct {
	recorder
	size int64
	next int64
}

func (d *sequentialDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.next < d.size {
		return 0, syscall.EBUSY
	}
	return d.recorder.ReadAt(p, off)
}

func (d *sequentialDisk) WriteAt(p []byte, off int64) (int, error) {
	if off != d.next {
		return 0, syscall.ESPIPE
	}
	d.next += int64(len(p))
	return d.recorder.WriteAt(p, off)
}

func TestWriterSequential(t *testing.T) {
	img := testBlocks(3*16384 + 5)
	d := &sequentialDisk{size: int64(len(img)), recorder: recorder{memDisk: memDisk{data: make([]byte, 5*16384)}}}
	w := newWriter(d, img, smallOptions)
	w.sequential = true
	if err := w.flash(t.Context(), bytes.NewReader(img)); err != nil || !bytes.HasPrefix(d.data, img) {
		t.Errorf("%v, %q", err, d.log)
	}
	d.next = 0
	d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) { return len(p), nil } // loses all
	clear(d.data)
	if err := w.flash(t.Context(), bytes.NewReader(img)); err == nil {
		t.Error("wrong content not found")
	}
}

func TestUBIVolumeIsSequential(t *testing.T) {
	d, path := fileStorage(t, 100)
	d.setDirect(false) // as a UBI volume is opened
	u := &ubiVolume{device: d}
	for _, c := range []struct {
		off  int64
		text string
		want error
	}{{5, "xx", syscall.ESPIPE}, {0, "hello", nil}, {0, "hello", syscall.ESPIPE}, {5, " you", nil}} {
		if _, err := u.WriteAt([]byte(c.text), c.off); !errors.Is(err, c.want) {
			t.Errorf("write at %d: got %v, want %v", c.off, err, c.want)
		}
	}
	if got, _ := os.ReadFile(path); !bytes.HasPrefix(got, []byte("hello you\x00")) || u.Sync() != nil {
		t.Errorf("got %q", got)
	}
	if _, err := openUBI(path, 100); !errors.Is(err, syscall.ENOTTY) {
		t.Errorf("a file is no UBI volume: got %v", err)
	}
}

// Buffers are fixed: nothing is allocated for a block.
func TestWriterMemory(t *testing.T) {
	allocs := func(blocks int) uint64 {
		img := testBlocks(blocks * 16384)
		d := &memDisk{data: make([]byte, len(img))}
		w := newWriter(d, img, smallOptions)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if err := w.flash(t.Context(), bytes.NewReader(img)); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		return after.Mallocs - before.Mallocs
	}
	allocs(4)
	if few, many := allocs(10), allocs(1010); many > few+500 {
		t.Errorf("%d allocations for 10 blocks, %d for 1010", few, many)
	}
}

func benchWriter(b *testing.B, opt writeOptions, body func(w *slotWriter, img []byte) error) {
	img := testBlocks(32 << 20)
	d, _ := fileStorage(b, len(img))
	if _, err := d.WriteAt(img, 0); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(img)))
	b.ReportAllocs()
	for b.Loop() {
		if err := body(newWriter(d, img, opt), img); err != nil {
			b.Fatal(err)
		}
	}
}

// Allocations are those of a whole install: six buffers, two for the read-back.
func BenchmarkSlotWriter(b *testing.B) {
	for name, all := range map[string]bool{"differs": true, "same": false} {
		b.Run(name, func(b *testing.B) {
			o := defaultWriteOptions()
			o.writeAll, o.noReadBack = all, true
			benchWriter(b, o, func(w *slotWriter, img []byte) error {
				return w.flash(context.Background(), bytes.NewReader(img))
			})
		})
	}
}

func BenchmarkReadBack(b *testing.B) {
	benchWriter(b, defaultWriteOptions(), func(w *slotWriter, _ []byte) error {
		return w.hashSlot(context.Background(), phaseCheck, &digest{sha: sha256.New()}, 0, w.size)
	})
}
