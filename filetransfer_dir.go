// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// The directory whose files users of the server get and put. A path that they name is walked by the kernel in one
// call which cannot leave it, and what has been opened is what is looked at: a name may mean something else a moment
// later. A put is there whole, or not at all.

const (
	fileSyncAfter = 8 << 20   // bytes written until the medium has to have them, so that the last of it is not long
	fileBuffer    = 32 << 10  // bytes that are written at once
	fileLookAfter = 256 << 10 // bytes written until the free space is looked at again
	fileFloor     = 16 << 20  // bytes of a file system that are left free; a 32nd of it, where that is less
	putPrefix     = ".mendlet-put-"
)

// fileLimits are the keys of Limits.FileTransfer in mender-connect.conf.
type fileLimits struct {
	Chroot                                    string
	FollowSymLinks, AllowOverwrite, AllowSuid bool
	OwnerPut, GroupPut, Umask                 string // "": as the user asks; Umask is octal
	OwnerGet, GroupGet                        []string
	MaxFileSize                               uint64 // bytes; 0: any
	Counters                                  struct {
		MaxBytesTxPerMinute, MaxBytesRxPerMinute uint64 // of all sessions; 0: any
	}
}

// fileOptions are what all sessions have in common.
type fileOptions struct {
	root string // the directory
	fileLimits
	etc      string      // where passwd and group are; "": /etc
	mode     uint32      // that Umask leaves
	byHand   atomic.Bool // the kernel has no openat2, or something keeps it from us
	rx, tx   byteRate
	swapping sync.Mutex // from the last look at what is replaced until it is
}

// check refuses (exit code 3) what makes no sense on this device.
func (o *fileOptions) check() error {
	abs, err := filepath.Abs(o.root)
	o.root = abs
	if err == nil {
		var d *dir
		if d, err = openDir(abs); err == nil {
			d.Close()
		}
	}
	if o.Umask != "" && err == nil {
		mask, merr := strconv.ParseUint(o.Umask, 8, 9)
		if o.mode = 0o777 &^ uint32(mask); merr != nil {
			err = fmt.Errorf("got %q as Umask, want octal digits up to 777", o.Umask)
		}
	}
	for i, name := range []string{o.OwnerPut, o.GroupPut} {
		if _, nerr := o.number(i, name); name != "" && err == nil && nerr != nil {
			err = fmt.Errorf("%s %q: %w", [2]string{"OwnerPut", "GroupPut"}[i], name, nerr)
		}
	}
	if err != nil {
		return refuse("files: %w", err)
	}
	return nil
}

// number is that of a user (kind 0) or a group (1). A number stands for itself.
func (o *fileOptions) number(kind int, name string) (uint32, error) {
	e, err := accountEntry(filepath.Join(cmp.Or(o.etc, "/etc"), [2]string{"passwd", "group"}[kind]), 0, name)
	if err == nil && len(e) > 2 {
		name = e[2]
	}
	n, nerr := strconv.ParseUint(name, 10, 32)
	if nerr != nil {
		return 0, cmp.Or(err, nerr)
	}
	return uint32(n), nil
}

// owned is an error (403) if a file does not belong to one of the users, or not to one of the groups. Without any it
// may be anybody's. Who is not known has no files.
func (o *fileOptions) owned(st os.FileInfo, path string, users, groups []string) error {
	sys := st.Sys().(*syscall.Stat_t)
	for kind, names := range [][]string{users, groups} {
		if len(names) > 0 && !slices.ContainsFunc(names, func(name string) bool {
			id, err := o.number(kind, name)
			return err == nil && id == [2]uint32{sys.Uid, sys.Gid}[kind]
		}) {
			return peerErrorf(http.StatusForbidden, "%q is of user %d, group %d: only files of %q are offered", path, sys.Uid,
				sys.Gid, names)
		}
	}
	return nil
}

// byteRate counts bytes against a limit of bytes in a minute.
type byteRate struct {
	mu   sync.Mutex
	used float64 // of the limit; it comes back evenly
	at   time.Time
}

// take is an error (429) if the limit was reached before these bytes. Limit 0: there is none.
func (r *byteRate) take(n int, limit uint64) error {
	if limit == 0 {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	r.used = max(0, r.used-now.Sub(r.at).Minutes()*float64(limit))
	if r.at = now; r.used >= float64(limit) {
		return peerErrorf(http.StatusTooManyRequests, "more than %d bytes in a minute", limit)
	}
	r.used += float64(n)
	return nil
}

// fits is an error (413) if a file of so many bytes is too large.
func (o *fileOptions) fits(n int64) error {
	if o.MaxFileSize > 0 && n > 0 && uint64(n) > o.MaxFileSize {
		return peerErrorf(http.StatusRequestEntityTooLarge, "%d bytes, of %d that a file may have", n, o.MaxFileSize)
	}
	return nil
}

var fileCodes = map[syscall.Errno]int{
	syscall.ENOENT: http.StatusNotFound, syscall.ENOTDIR: http.StatusNotFound,
	syscall.EACCES: http.StatusForbidden, syscall.EPERM: http.StatusForbidden, syscall.EROFS: http.StatusForbidden,
	syscall.ELOOP: http.StatusForbidden, syscall.EXDEV: http.StatusForbidden,
	syscall.EISDIR: http.StatusConflict, syscall.ETXTBSY: http.StatusConflict, syscall.EBUSY: http.StatusConflict,
	syscall.EFBIG:  http.StatusRequestEntityTooLarge,
	syscall.ENOSPC: http.StatusInsufficientStorage, syscall.EDQUOT: http.StatusInsufficientStorage,
	syscall.EINVAL: http.StatusBadRequest, syscall.ENAMETOOLONG: http.StatusBadRequest,
}

// explainFile gives an error a code, and words where those of the kernel say little.
func explainFile(err error) *peerError {
	var known *peerError
	if errors.As(err, &known) {
		return known
	}
	var errno syscall.Errno
	switch errors.As(err, &errno); errno {
	case syscall.ELOOP:
		err = fmt.Errorf("%w: a symbolic link is on the way, and is not followed", err)
	case syscall.EXDEV:
		err = fmt.Errorf("%w: a symbolic link leads out of what is offered", err)
	}
	return &peerError{cmp.Or(fileCodes[errno], http.StatusInternalServerError), err}
}

// below gives the path below root that an absolute one of the device means; "." is root itself.
func (o *fileOptions) below(path string) (string, error) {
	rel, below := strings.CutPrefix(filepath.Clean(path)+"/", strings.TrimSuffix(o.root, "/")+"/")
	switch {
	case !filepath.IsAbs(path) || strings.Contains(path, "\x00"):
		return "", peerErrorf(http.StatusBadRequest, "path %q: want an absolute one", path)
	case slices.Contains(strings.Split(path, "/"), ".."):
		return "", peerErrorf(http.StatusForbidden, "path %q: \"..\" is not allowed", path)
	case !below:
		return "", peerErrorf(http.StatusForbidden, "path %q: only files below %q are offered", path, o.root)
	}
	return cmp.Or(strings.TrimSuffix(rel, "/"), "."), nil
}

// open opens what is at a path below root, and nothing else: openat2(2). The caller closes it. A link is followed only
// where that is allowed; one of the last name is opened itself with openPath.
func (o *fileOptions) open(rel string, flag int) (*os.File, error) {
	const noMagic, noLinks, beneath, inRoot = 0x02, 0x04, 0x08, 0x10 // RESOLVE_* of linux/openat2.h
	root, err := openDir(o.root)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	name := root.in(rel)
	if flag&syscall.O_DIRECTORY != 0 { // else a link as the last name would be "no directory"
		rel += "/."
	}
	text, err := syscall.BytePtrFromString(rel)
	if err != nil {
		return nil, err
	}
	if flag |= syscall.O_CLOEXEC | syscall.O_NOFOLLOW; flag&openPath == 0 {
		flag |= syscall.O_LARGEFILE | syscall.O_NONBLOCK
	}
	how := [3]uint64{uint64(flag), 0, noMagic | noLinks | beneath} // struct open_how
	if o.FollowSymLinks {
		how[0], how[2] = uint64(flag&^syscall.O_NOFOLLOW), noMagic|beneath
		if o.root == "/" { // out of which no link leads, though one may begin there
			how[2] = noMagic | inRoot
		}
	}
	number := map[string]uintptr{"mips": 4437, "mipsle": 4437, "mips64": 5437, "mips64le": 5437}[runtime.GOARCH]
	for try := 0; !o.byHand.Load(); try++ {
		fd, _, errno := syscall.Syscall6(cmp.Or(number, 437), uintptr(root.fd), uintptr(unsafe.Pointer(text)),
			uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
		switch {
		case errno == syscall.ENOSYS || errno == syscall.EPERM: // the other by a filter of system calls
			o.byHand.Store(true)
		case errno == syscall.EINTR, errno == syscall.EAGAIN && try < 100: // something was renamed meanwhile
		case errno != 0:
			return nil, &os.PathError{Op: "open", Path: name, Err: errno}
		default:
			return os.NewFile(fd, name), nil
		}
	}
	fd, err := o.walk(root, rel, flag)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// walk is open for kernels before 5.6: one name after the other, of which none but the last may be a link. Where all is
// offered and links are followed, there is nothing that one could lead out of.
func (o *fileOptions) walk(root *dir, rel string, flag int) (int, error) {
	name, names := root.in(rel), strings.Split(rel, "/")
	if o.FollowSymLinks && o.root == "/" {
		return openat(root.fd, rel, name, flag&^syscall.O_NOFOLLOW, 0)
	}
	at := root.fd
	for i, n := range names {
		how, last := openPath|syscall.O_NOFOLLOW, i == len(names)-1
		if last {
			how = flag
		}
		fd, err := openat(at, n, name, how, 0)
		if at != root.fd {
			syscall.Close(at)
		}
		if at = fd; err != nil {
			return -1, err
		}
		var st syscall.Stat_t
		if err = syscall.Fstat(fd, &st); err == nil && !last && st.Mode&syscall.S_IFMT == syscall.S_IFLNK {
			err = syscall.ELOOP
		}
		if err != nil {
			syscall.Close(fd)
			return -1, &os.PathError{Op: "open", Path: name, Err: err}
		}
	}
	return at, nil
}

// look gives what is at a path, without opening it: to open a device may do something.
func (o *fileOptions) look(path string) (rel string, st os.FileInfo, err error) {
	if rel, err = o.below(path); err != nil {
		return "", nil, err
	}
	f, err := o.open(rel, openPath)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	if st, err = f.Stat(); err == nil {
		err = o.owned(st, path, o.OwnerGet, o.GroupGet)
	}
	return rel, st, err
}

// get opens a file to read it, and gives its size.
func (o *fileOptions) get(path string) (*os.File, int64, error) {
	rel, st, err := o.look(path)
	if err == nil && !st.Mode().IsRegular() {
		err = peerErrorf(http.StatusForbidden, "%q is no regular file (%s)", path, st.Mode())
	}
	if err != nil {
		return nil, 0, err
	}
	f, err := o.open(rel, os.O_RDONLY)
	if err != nil {
		return nil, 0, err
	}
	now, err := f.Stat()
	if err == nil && !os.SameFile(st, now) {
		err = peerErrorf(http.StatusConflict, "%q: another file has taken its place", path)
	}
	if err == nil {
		err = o.fits(now.Size())
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, now.Size(), nil
}

// filePut is a file on its way from the user: one beside its place, until it is whole.
type filePut struct {
	o                *fileOptions
	d                *dir
	name, tmp        string
	f                *os.File
	w                *bufio.Writer // to it
	uid, gid, mode   int64         // that the user asks for; -1: any
	size             int64         // that was announced; -1: none
	off              int64         // bytes so far
	unseen, unsynced int           // of them since the last look at the free space, since the last sync
	unacked          int           // chunks
}

// begin finds the place for a put in what the user asks for, and makes the file beside it. drop it after an error, too.
func (p *filePut) begin(path string, body map[string]any) error {
	for i, to := range []*int64{&p.uid, &p.gid, &p.mode, &p.size} {
		name := [...]string{"uid", "gid", "mode", "size"}[i]
		top := [...]int64{1<<32 - 2, 1<<32 - 2, 1<<32 - 1, 1<<63 - 1}[i]
		v := field(body, name)
		if n, ok := v.(int64); v == nil {
			*to = -1
		} else if *to = n; !ok || n < 0 || n > top {
			return peerErrorf(http.StatusBadRequest, "%s: want a number from 0 to %d", name, top)
		}
	}
	rel, err := p.o.below(path)
	if err == nil {
		err = p.o.fits(p.size)
	}
	if err == nil {
		err = p.o.rx.take(0, p.o.Counters.MaxBytesRxPerMinute)
	}
	if err == nil {
		err = p.enter(filepath.Dir(rel), filepath.Base(rel))
	}
	if err != nil {
		return err
	}
	src, _ := field(body, "src_path").(string)
	if st, err := p.there(); err == nil && st != nil && st.IsDir() && src != "" {
		if err := p.enter(rel, filepath.Base(src)); err != nil {
			return err
		}
	}
	if _, err = p.replaced(); err == nil {
		err = p.space(max(0, p.size))
	}
	if err == nil {
		err = p.create()
	}
	return err
}

// enter goes into a directory below root.
func (p *filePut) enter(rel, name string) error {
	p.drop()
	f, err := p.o.open(rel, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer f.Close()
	p.name = name
	p.d, err = dirAt(int(f.Fd()), ".", f.Name(), 0)
	return err
}

// drop ends a put of which nothing is left.
func (p *filePut) drop() {
	if p.f != nil {
		p.f.Truncate(0) // a child of ours that has not begun its program yet has it open, too
		p.f.Close()
		p.d.remove(p.tmp)
	}
	if p.d != nil {
		p.d.Close()
	}
}

// there is what has the name already; nil: nothing.
func (p *filePut) there() (os.FileInfo, error) {
	f, err := p.d.openAny(p.name, openPath, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Stat()
}

// replaced gives the file that the put takes the place of, if there is one and that may be.
func (p *filePut) replaced() (*syscall.Stat_t, error) {
	st, err := p.there()
	if st == nil || err != nil {
		return nil, err
	}
	path := p.d.in(p.name)
	switch {
	case st.IsDir():
		return nil, peerErrorf(http.StatusConflict, "%q is a directory", path)
	case !st.Mode().IsRegular():
		return nil, peerErrorf(http.StatusForbidden, "%q is no regular file (%s)", path, st.Mode())
	case !p.o.AllowOverwrite:
		return nil, peerErrorf(http.StatusConflict, "%q is there, and may not be overwritten", path)
	}
	return st.Sys().(*syscall.Stat_t), p.o.owned(st, path, strings.Fields(p.o.OwnerPut), strings.Fields(p.o.GroupPut))
}

// space is an error (507) if n bytes more would leave the file system too little. One without a size has none.
func (p *filePut) space(n int64) error {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(p.d.fd, &st); err != nil || st.Blocks == 0 {
		return err
	}
	floor := min(fileFloor, st.Blocks*uint64(st.Bsize)/32)
	if free := st.Bfree * uint64(st.Bsize); free < floor || free-floor < uint64(n) {
		return peerErrorf(http.StatusInsufficientStorage,
			"the file system of %q has %d bytes left, of which %d are kept free", p.d.path, free, floor)
	}
	return nil
}

// create makes the file beside. What a power cut has left of others is removed: nobody has it locked.
func (p *filePut) create() error {
	p.o.swapping.Lock()
	defer p.o.swapping.Unlock()
	names, err := p.d.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, putPrefix) {
			continue
		}
		f, err := p.d.open(name, os.O_RDONLY, 0)
		if err != nil {
			continue
		}
		if checkOwner(int(f.Fd()), f.Name()) == nil && flock(context.Background(), f, 0, nil) == nil {
			p.d.remove(name)
		}
		f.Close()
	}
	var salt [8]byte
	rand.Read(salt[:])
	p.tmp = fmt.Sprintf("%s%x", putPrefix, salt)
	if p.f, err = p.d.open(p.tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return err
	}
	p.w = bufio.NewWriterSize(p.f, fileBuffer)
	return flock(context.Background(), p.f, 0, nil)
}

// write appends b.
func (p *filePut) write(b []byte) error {
	if p.unseen += len(b); p.unseen >= fileLookAfter {
		p.unseen = 0
		if err := p.space(int64(len(b))); err != nil {
			return err
		}
	}
	n, err := p.w.Write(b)
	p.off += int64(n)
	if p.unsynced += n; err == nil && p.unsynced >= fileSyncAfter {
		p.unsynced = 0
		err = p.sync()
	}
	return err
}

// sync has the medium have all that was written.
func (p *filePut) sync() error {
	if err := p.w.Flush(); err != nil {
		return err
	}
	return p.f.Sync()
}

// land puts the file, which is whole, into its place.
func (p *filePut) land() error {
	p.o.swapping.Lock()
	defer p.o.swapping.Unlock()
	old, err := p.replaced()
	if err == nil {
		err = p.own(old)
	}
	if err == nil {
		err = p.sync()
	}
	if err == nil {
		err = p.f.Close()
	}
	if err == nil {
		err = p.d.rename(p.tmp, p.name)
	}
	if err == nil {
		err = p.d.sync()
	}
	if err == nil {
		p.d.Close()
	}
	return err
}

// own gives the file its owner, group and mode: those of the limits, else those asked for, else those of the file that
// it takes the place of, else 0644. The bits above the permissions have to be allowed.
func (p *filePut) own(old *syscall.Stat_t) error {
	var fs syscall.Statfs_t
	err := syscall.Fstatfs(p.d.fd, &fs)
	if t := uint32(fs.Type); err != nil || t == 0x4d44 || t == 0x2011bab0 { // FAT and exFAT know of none
		return err
	}
	ids, mode := [2]int64{p.uid, p.gid}, uint32(0o644)
	if old != nil {
		ids, mode = [2]int64{int64(old.Uid), int64(old.Gid)}, old.Mode
	}
	for i, asked := range []int64{p.uid, p.gid} {
		if asked >= 0 {
			ids[i] = asked
		}
		if name := [2]string{p.o.OwnerPut, p.o.GroupPut}[i]; name != "" {
			id, err := p.o.number(i, name)
			if err != nil {
				return peerErrorf(http.StatusForbidden, "%q: %w", name, err)
			}
			ids[i] = int64(id)
		}
	}
	if p.mode >= 0 {
		mode = uint32(p.mode)
	}
	if p.o.Umask != "" {
		mode = p.o.mode
	}
	if mode &= 0o7777; !p.o.AllowSuid {
		mode &= 0o777
	}
	if err := p.f.Chown(int(ids[0]), int(ids[1])); err != nil {
		return err
	}
	// Not os.File.Chmod, which has the bits above the permissions elsewhere.
	return uninterrupted("chmod", p.f.Name(), func() error { return syscall.Fchmod(int(p.f.Fd()), mode) })
}
