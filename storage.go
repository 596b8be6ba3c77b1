// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// storage is what durable things are written through: a slot, a copy of the boot
// environment, the journal. Behind it is a file or device, or the disk of the power-cut
// simulator. Whoever opens one closes it.
type storage interface {
	io.ReaderAt
	io.WriterAt
	// Sync returns when all that was written is durable. After an error the state of
	// the data is unknown and stays so: the kernel reports a lost write once only
	// (fsync(2), NOTES), so the caller must not retry Sync and believe it.
	Sync() error
	// Size is in bytes: of the device, or of the file at the time of opening.
	Size() int64
	Close() error
}

// openMode says what a storage is opened for.
type openMode int

const (
	openRead  openMode = iota
	openWrite          // an existing file or device, for reading and writing
	// as openWrite, and a block device is claimed: EBUSY while it is mounted or claimed (open(2), O_EXCL)
	openSlot
)

// headway is how far the writing of an image has come. All sizes are in bytes.
type headway struct {
	phase       phase
	done, total int64   // of the phase
	written     int64   // to the slot, by this run; what it held already was not
	later       int64   // to be read back when this phase is over
	fetched     int64   // by a delta so far; 0: all of it is
	readRate    float64 // at which the slot was read, in bytes a second; 0: not known
}

// phase is what goes on with the bytes of an image.
type phase string

const (
	phaseScan     phase = "scan"  // looking for what of the image the other slot holds
	phaseCheck    phase = "check" // reading what the slot holds already
	phaseWrite    phase = "write"
	phaseReadBack phase = "read-back"
)

// device is the storage of a real file or block device.
type device struct {
	f      *os.File
	size   int64
	direct bool // O_DIRECT is on
}

// Size in bytes of the device node or file behind f. BLKGETSIZE64 is from linux/fs.h; its
// number encodes the size of size_t, hence the two forms.
func sizeOf(f *os.File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if st.Mode()&os.ModeDevice == 0 || st.Mode()&os.ModeCharDevice != 0 {
		return st.Size(), nil
	}
	var n uint64
	if err := ioctl(f, blkGetSize64, unsafe.Pointer(&n)); err != nil {
		return 0, fmt.Errorf("size of %q: BLKGETSIZE64: %w", f.Name(), err)
	}
	return int64(n), nil
}

const wordSize = unsafe.Sizeof(uintptr(0))

// ioctl calls the request on f's descriptor. arg is a pointer until the system call itself,
// because a stack, and what lies on it, may move at any call before.
func ioctl(f *os.File, req uintptr, arg unsafe.Pointer) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno syscall.Errno
	if err := c.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, req, uintptr(arg))
	}); err != nil {
		return err
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// openStorage opens what exists: it never creates anything, because opening a missing node
// for writing in a devtmpfs would make a regular file there and swallow an image.
func openStorage(path string, how openMode) (storage, error) {
	flag := os.O_RDONLY
	if how != openRead {
		flag = os.O_RDWR
	}
	if how == openSlot {
		if st, err := os.Stat(path); err == nil && st.Mode()&os.ModeDevice != 0 {
			flag |= syscall.O_EXCL
		}
	}
	f, err := openPlain(path, flag, 0)
	if err != nil {
		return nil, err
	}
	n, err := sizeOf(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	d := &device{f: f, size: n}
	if how == openSlot {
		// A whole image would only push everything else out of the page cache; dirty pages
		// would stall a small board; and what is compared and read back shall come from the
		// medium.
		d.setDirect(true)
	}
	return d, nil
}

// errNotPlain: something stands where a file or a block device should.
var errNotPlain = errors.New("neither a file nor a block device")

// openPlain opens a regular file or a block device, and never waits: opening a named pipe
// waits for its other end (fifo(7)), and anyone who may write to a directory can put one there.
func openPlain(path string, flag int, mode os.FileMode) (*os.File, error) {
	// Drivers take O_NONBLOCK for leave to open without a medium (open(2), NOTES).
	if st, err := os.Stat(path); err != nil || st.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		flag |= syscall.O_NONBLOCK
	}
	f, err := os.OpenFile(path, flag, mode)
	if err != nil {
		return nil, err
	}
	if _, err := checkPlain(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// checkPlain wants a regular file or a block device, and gives what stat(2) says of it.
func checkPlain(f *os.File) (any, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() && st.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		return nil, &os.PathError{Op: "open", Path: f.Name(), Err: errNotPlain}
	}
	return st.Sys(), nil
}

// readPlain is os.ReadFile for a file in a place where others may have put something else.
func readPlain(path string) ([]byte, error) { return readClose(openPlain(path, os.O_RDONLY, 0)) }

// uninterrupted calls a system call until it has not been interrupted by a signal.
//
//go:noinline
func uninterrupted(op, path string, f func() error) error {
	for {
		switch err := f(); err {
		case syscall.EINTR:
		case nil:
			return nil
		default:
			return &os.PathError{Op: op, Path: path, Err: err}
		}
	}
}

// readClose reads what has just been opened, whole.
func readClose(f *os.File, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// namesIn are those in the directory at path, sorted bytewise. After an error they are those that came before it.
func namesIn(path string) ([]string, error) { return namesClose(os.Open(path)) }

func namesClose(f *os.File, err error) ([]string, error) {
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	sort.Strings(names)
	return names, err
}

// danglingLink finds the link on the way to path, if there is one, that leads to nothing; target
// is what it says.
func danglingLink(path string) (link, target string) {
	for p := filepath.Clean(path); ; p = filepath.Dir(p) {
		if target, err := os.Readlink(p); err == nil {
			if _, err := os.Stat(p); errors.Is(err, os.ErrNotExist) {
				return p, target
			}
		}
		if p == filepath.Dir(p) {
			return "", ""
		}
	}
}

// fullness says, in words that follow the name of path, in what way its file system is full; "" if
// it is not, or nobody knows. A file system without inodes of a fixed number has none (statfs(2)).
func fullness(path string) string {
	st, err := fileSystem(path)
	free := st.Bfree * uint64(st.Bsize)
	switch {
	case err != nil:
		return ""
	case st.Files > 0 && st.Ffree == 0:
		return "is on a file system that can hold no more files (no inodes left, see df -i)"
	case free < 1<<20:
		return fmt.Sprintf("is on a file system that is full (%d bytes left, see df)", free)
	}
	return ""
}

// noExec tells whether nothing can be run from where path is, or will be made.
//
//go:noinline
func noExec(path string) bool {
	const stNoExec = 8 // ST_NOEXEC of linux/statfs.h
	st, err := fileSystem(path)
	return err == nil && st.Flags&stNoExec != 0
}

// fileSystem is what statfs(2) says of the place where path is, or will be made.
func fileSystem(path string) (st syscall.Statfs_t, err error) {
	err = syscall.Statfs(path, &st)
	for ; err == syscall.ENOENT && path != filepath.Dir(path); err = syscall.Statfs(path, &st) {
		path = filepath.Dir(path)
	}
	return st, err
}

// waitingFile is a file that a person named. It may be a pipe, for whose other end opening and reading wait,
// until ctx ends.
type waitingFile struct {
	*os.File
	ctx  context.Context
	stop func() bool
}

func openWaiting(ctx context.Context, path string) (*waitingFile, error) {
	var f *os.File
	var err error
	done := make(chan struct{})
	go func() {
		f, err = os.Open(path)
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		return nil, context.Cause(ctx) // and with that the process, and what still waits in it
	}
	if err != nil {
		return nil, err
	}
	// Files have no deadline, and need none.
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
	return &waitingFile{f, ctx, stop}, nil
}

func (w *waitingFile) Read(p []byte) (int, error) {
	n, err := w.File.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = context.Cause(w.ctx)
	}
	return n, err
}

func (w *waitingFile) Close() error {
	w.stop()
	return w.File.Close()
}

// lockPause is the time between two tries to get a lock that another process has.
const lockPause = 50 * time.Millisecond

// errLocked: another process has the lock.
var errLocked = errors.New("another program has it locked")

// flock takes f for this process alone, until funlock; the kernel releases it when the process
// ends, however it ends (flock(2)). For a lock that another has it waits up to the given time, or
// until ctx ends.
func flock(ctx context.Context, f *os.File, wait time.Duration, sleep sleeper) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	for ; ; wait -= lockPause {
		cerr := c.Control(func(fd uintptr) {
			for err = syscall.EINTR; err == syscall.EINTR; {
				err = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB)
			}
		})
		switch {
		case cerr != nil:
			return cerr
		case err == nil:
			return nil
		case err != syscall.EWOULDBLOCK:
			return &os.PathError{Op: "flock", Path: f.Name(), Err: err}
		case wait <= 0:
			return fmt.Errorf("%q: %w", f.Name(), errLocked)
		}
		if err := sleep(ctx, lockPause); err != nil {
			return err
		}
	}
}

// funlock closes f, and gives its lock up first: to close it alone would leave that to a child which another goroutine
// forks meanwhile, until its exec, and who comes next would find it taken (flock(2), DESCRIPTION).
//
//go:noinline
func funlock(f *os.File) error {
	syscall.Flock(int(f.Fd()), syscall.LOCK_UN)
	return f.Close()
}

func (d *device) Size() int64 { return d.size }

//go:noinline
func (d *device) Close() error { return d.f.Close() }

// ReadAt with direct I/O takes what is not aligned by way of a buffer that is.
func (d *device) ReadAt(p []byte, off int64) (int, error) {
	if d.direct && !aligned(p, off) {
		lo := off &^ (directAlign - 1)
		skip := int(off - lo)
		buf := alignedBuffer((skip + len(p) + directAlign - 1) &^ (directAlign - 1))
		n, err := d.ReadAt(buf, lo)
		n = copy(p, buf[min(skip, n):n])
		if n == len(p) {
			err = nil
		}
		return n, err
	}
	n, err := d.f.ReadAt(p, off)
	if n == 0 && d.refusesDirect(err) {
		return d.f.ReadAt(p, off)
	}
	return n, err
}

// WriteAt with direct I/O writes what is not aligned, such as the last bytes of an image,
// through the page cache; Sync takes care of both.
func (d *device) WriteAt(p []byte, off int64) (int, error) {
	if !d.direct {
		return d.f.WriteAt(p, off)
	}
	n := 0
	if body := p[:len(p)&^(directAlign-1)]; len(body) > 0 && aligned(body, off) {
		var err error
		if n, err = d.f.WriteAt(body, off); err != nil && !d.refusesDirect(err) {
			return n, err
		}
	}
	if n == len(p) {
		return n, nil
	}
	if d.direct && d.setDirect(false) {
		defer d.setDirect(true)
	}
	m, err := d.f.WriteAt(p[n:], off+int64(n))
	return n + m, err
}

// refusesDirect tells EINVAL, with which a file system that took O_DIRECT at fcntl may
// refuse it at the first use, and turns it off.
func (d *device) refusesDirect(err error) bool {
	return d.direct && errors.Is(err, syscall.EINVAL) && d.setDirect(false)
}

// Sync: fdatasync is enough, since size and place of the data do not change on a device,
// and where they do on a file fdatasync writes them too (fdatasync(2)).
func (d *device) Sync() error {
	c, err := d.f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := c.Control(func(fd uintptr) {
		for {
			if err = syscall.Fdatasync(int(fd)); err != syscall.EINTR {
				return
			}
		}
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return &os.PathError{Op: "fdatasync", Path: d.f.Name(), Err: err}
	}
	return nil
}

// directAlign is the alignment of buffers, offsets and lengths that every block device
// accepts with O_DIRECT (open(2): the logical block size; 4096 is the largest in use).
const directAlign = 4096

// alignedBuffer returns n bytes whose address is a multiple of directAlign.
//
//go:noinline
func alignedBuffer(n int) []byte {
	b := make([]byte, n+directAlign)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (directAlign - 1)
	return b[skip : skip+n : skip+n]
}

func aligned(p []byte, off int64) bool {
	return (uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p))))|uint64(len(p))|uint64(off))%directAlign == 0
}

// setDirect turns O_DIRECT on or off on the descriptor that is already open (fcntl(2),
// F_SETFL), so that what is read back comes from the medium and not from the page cache,
// and still from the very file that was written. It reports whether that took effect; a
// file system without direct I/O (tmpfs) has no medium to ask.
func (d *device) setDirect(on bool) bool {
	c, err := d.f.SyscallConn()
	if err != nil {
		return false
	}
	var errno syscall.Errno
	if err := c.Control(func(fd uintptr) {
		fl, _, e := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_GETFL, 0)
		if errno = e; e != 0 {
			return
		}
		fl &^= syscall.O_DIRECT
		if on {
			fl |= syscall.O_DIRECT
		}
		_, _, errno = syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_SETFL, fl)
	}); err != nil || errno != 0 {
		return false
	}
	d.direct = on
	return true
}

// direct tells whether a storage works past the page cache all the time.
func direct(s storage) bool {
	d, ok := s.(*device)
	return ok && d.direct
}

// readUncached fills p from off, past the page cache where the storage has one. It gives
// back io.ErrUnexpectedEOF when the storage ends before p is full.
func readUncached(s storage, p []byte, off int64) error {
	if d, ok := s.(*device); ok && !d.direct && d.setDirect(true) {
		defer d.setDirect(false)
	}
	if n, err := s.ReadAt(p, off); n < len(p) {
		return noEOF(err)
	}
	return nil
}

// ioctl request numbers: direction, size of the argument, type, number.
var (
	blkGetSize64 = ioctlNumber(ioctlRead, wordSize, 0x12, 114) // BLKGETSIZE64, linux/fs.h
	ubiVolUpdate = ioctlNumber(ioctlWrite, 8, 'O', 0)          // UBI_IOCVOLUP, mtd/ubi-user.h
)

// Directions as asm-generic/ioctl.h has them.
const ioctlWrite, ioctlRead = 1, 2

// ioctlNumber puts a request together. MIPS has three bits for the direction, in which reading
// is the same and writing is 4 (arch/mips/include/uapi/asm/ioctl.h).
func ioctlNumber(direction, size, kind, number uintptr) uintptr {
	shift := 30
	if strings.HasPrefix(runtime.GOARCH, "mips") {
		shift, direction = 29, direction&ioctlRead|direction&ioctlWrite<<2
	}
	return direction<<shift | size<<16 | kind<<8 | number
}

// ubiVolume is the storage of a UBI volume under update. UBI marks the volume as being
// updated until all announced bytes have come, in order; a volume cut off in between cannot
// be opened, which is all the protection that the zeroed head gives elsewhere
// (Documentation/driver-api/mtd, mtd/ubi-user.h: UBI_IOCVOLUP).
type ubiVolume struct {
	*device
	next int64
}

// openUBI opens a volume and, for writing, announces an image of size bytes. From then on
// the old content is gone.
func openUBI(path string, size int64) (*ubiVolume, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := ioctl(f, ubiVolUpdate, unsafe.Pointer(&size)); err != nil {
		f.Close()
		return nil, fmt.Errorf("UBI_IOCVOLUP on %q: %w", path, err)
	}
	return &ubiVolume{device: &device{f: f, size: size}}, nil
}

// WriteAt writes the next bytes of the volume; UBI knows no other place.
func (u *ubiVolume) WriteAt(p []byte, off int64) (int, error) {
	if off != u.next {
		return 0, &os.PathError{Op: "write", Path: u.f.Name(), Err: syscall.ESPIPE}
	}
	n, err := u.f.Write(p)
	u.next += int64(n)
	return n, err
}

// Sync has nothing to do: UBI writes are synchronous (UBI FAQ, "Is UBI write-back?").
func (u *ubiVolume) Sync() error { return nil }

// markByte is far behind the end of any file here, and nothing else has a lock on it.
const markByte = 1 << 40

// lockMark does what fcntl(2) does with the lock of markByte, by which others see what a process does meanwhile: how
// is F_SETLK or F_GETLK. It is a lock of the process and not of the open file, so that the kernel says whose it is,
// and gives it up with the process.
func lockMark(f *os.File, how int, kind int16) (*syscall.Flock_t, error) {
	lock := &syscall.Flock_t{Type: kind, Whence: io.SeekStart, Start: markByte, Len: 1}
	err := uninterrupted("lock", f.Name(), func() error { return syscall.FcntlFlock(f.Fd(), how, lock) })
	return lock, err
}
