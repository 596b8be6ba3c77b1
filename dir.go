// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"
)

// dir is a directory that is held open. What is done in it goes by its descriptor, so it stays in that
// directory whatever becomes of the way that led there. Names are single: no slash. A link in the place
// of one is not followed; those of whom it is a feature call follow, or sub. Whoever opens one closes it.
type dir struct {
	fd   int
	path string // as it was opened: for messages, and for programs, which are given paths
}

// openPath is O_PATH: the descriptor stands for the name itself, link or not (open(2)).
const openPath = 0x200000

// openDir opens the directory path. Links on the way are whose who named the path.
//
//go:noinline
func openDir(path string) (*dir, error) {
	return dirAt(atCwd, path, path, 0)
}

// atCwd is AT_FDCWD of linux/fcntl.h.
const atCwd = -100

func dirAt(fd int, name, path string, flag int) (*dir, error) {
	fd, err := openat(fd, name, path, syscall.O_RDONLY|syscall.O_DIRECTORY|flag, 0)
	if err != nil {
		return nil, err
	}
	return &dir{fd, path}, nil
}

// makeDir opens the directory path and makes it first, with all above it, if it is missing.
func makeDir(path string) (*dir, error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, err
	}
	return openDir(path)
}

// Close may be called again: the number of the descriptor may be another's by then.
//
//go:noinline
func (d *dir) Close() error {
	fd := d.fd
	if d.fd = -1; fd < 0 {
		return os.ErrClosed
	}
	return syscall.Close(fd)
}

// in is the path of a name, for messages and programs.
//
//go:noinline
func (d *dir) in(name string) string { return filepath.Join(d.path, name) }

func openat(at int, name, path string, flag int, mode os.FileMode) (fd int, err error) {
	err = uninterrupted("open", path, func() (err error) {
		fd, err = syscall.Openat(at, name, flag|syscall.O_CLOEXEC, uint32(mode.Perm()))
		return err
	})
	return fd, err
}

// openAny opens whatever name is, but for a link (ELOOP).
func (d *dir) openAny(name string, flag int, mode os.FileMode) (*os.File, error) {
	if name == "" || name == ".." || strings.Contains(name, "/") { // never, but it would lead elsewhere
		return nil, &os.PathError{Op: "open", Path: d.in(name), Err: syscall.EINVAL}
	}
	fd, err := openat(d.fd, name, d.in(name), flag|syscall.O_NOFOLLOW, mode)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), d.in(name)), nil
}

// open opens a regular file or block device, and never waits. What is to be written must have this one
// name: with another, it is somebody's who has not put it here.
func (d *dir) open(name string, flag int, mode os.FileMode) (*os.File, error) {
	f, err := d.openAny(name, flag|syscall.O_NONBLOCK, mode)
	if err != nil {
		return nil, err
	}
	st, err := checkPlain(f)
	if sys, ok := st.(*syscall.Stat_t); err == nil && ok && flag&(os.O_WRONLY|os.O_RDWR) != 0 && sys.Nlink > 1 {
		err = fmt.Errorf("%q is a file of %d names: want one", f.Name(), sys.Nlink)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// follow opens name, which may be a link, as open does. What is opened is where the link led when it was
// read: it is not looked at twice. One that leads nowhere is not as if there were nothing: what it stands
// for may be on a medium that is not there yet.
func (d *dir) follow(name string, flag int, mode os.FileMode) (*os.File, error) {
	f, err := d.open(name, flag, mode)
	if !errors.Is(err, syscall.ELOOP) {
		return f, err
	}
	to, err := d.link(name)
	if err != nil {
		return nil, err
	}
	if f, err = openPlain(to, flag&^os.O_CREATE, 0); errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%q is a link to %q, which is not there", d.in(name), to)
	}
	return f, err
}

// link gives the path to which the link name leads. It has to be a link of root's or of ours: one that
// another user put there may be a trap.
func (d *dir) link(name string) (string, error) {
	fd, err := openat(d.fd, name, d.in(name), openPath|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer syscall.Close(fd)
	if err := checkOwner(fd, d.in(name)); err != nil {
		return "", err
	}
	buf := make([]byte, 4096) // PATH_MAX of linux/limits.h
	none := []byte{0}         // the link itself (readlinkat(2))
	n, _, errno := syscall.Syscall6(syscall.SYS_READLINKAT, uintptr(fd), uintptr(unsafe.Pointer(&none[0])),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0)
	if errno != 0 {
		return "", &os.PathError{Op: "readlink", Path: d.in(name), Err: errno}
	}
	to := string(buf[:n])
	if !strings.HasPrefix(to, "/") {
		to = d.in(to)
	}
	return to, nil
}

// checkOwner wants root's or ours.
func checkOwner(fd int, path string) error {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "fstat", Path: path, Err: err}
	}
	if us := os.Geteuid(); st.Uid != 0 && int(st.Uid) != us {
		return withHint(fmt.Errorf("%q belongs to user %d, neither to root nor to %d who runs this", path, st.Uid, us),
			"remove it, or chown it if it is right")
	}
	return nil
}

// sub opens the directory name, which may be a link. It has to belong to root or to us: in another's
// nothing stays as we leave it.
func (d *dir) sub(name string) (*dir, error) {
	s, err := dirAt(d.fd, name, d.in(name), syscall.O_NOFOLLOW)
	if errors.Is(err, syscall.ENOTDIR) { // what O_DIRECTORY makes of a link
		to, lerr := d.link(name)
		if lerr != nil && !errors.Is(lerr, syscall.EINVAL) && !errors.Is(lerr, syscall.ENOENT) {
			return nil, lerr
		}
		if lerr == nil {
			s, err = openDir(to)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := checkOwner(s.fd, s.path); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// mkdir makes a directory that was not there. Its name is durable after sync.
//
//go:noinline
func (d *dir) mkdir(name string) error {
	return uninterrupted("mkdir", d.in(name), func() error { return syscall.Mkdirat(d.fd, name, 0o700) })
}

// way opens the directory that the names lead to, one below the other, for the caller to close; create:
// what is missing is made, durably.
func (d *dir) way(create bool, names ...string) (*dir, error) {
	at := d
	for _, name := range names {
		var err error
		if create {
			if err = at.mkdir(name); err == nil {
				err = at.sync()
			}
		}
		var next *dir
		if err == nil || errors.Is(err, syscall.EEXIST) {
			next, err = at.sub(name)
		}
		if at != d {
			at.Close()
		}
		if err != nil {
			return nil, err
		}
		at = next
	}
	return at, nil
}

// names are those in the directory, sorted bytewise.
func (d *dir) names() ([]string, error) {
	fd, err := openat(d.fd, ".", d.path, syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return namesClose(os.NewFile(uintptr(fd), d.path), nil)
}

const atRemoveDir = 0x200 // AT_REMOVEDIR of linux/fcntl.h

func (d *dir) unlink(name string, flag uintptr) error {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	return uninterrupted("unlink", d.in(name), func() error {
		if _, _, errno := syscall.Syscall(syscall.SYS_UNLINKAT, uintptr(d.fd), uintptr(unsafe.Pointer(p)), flag); errno != 0 {
			return errno
		}
		return nil
	})
}

// remove removes a name that is no directory.
//
//go:noinline
func (d *dir) remove(name string) error { return d.unlink(name, 0) }

// removeAll removes whatever name is, with all that is in it; links are removed and not followed. It is
// no error if there is nothing.
func (d *dir) removeAll(name string) error {
	err := d.unlink(name, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	// unlink(2): the one of Linux, the other of POSIX.
	if !errors.Is(err, syscall.EISDIR) && !errors.Is(err, syscall.EPERM) {
		return err
	}
	s, serr := dirAt(d.fd, name, d.in(name), syscall.O_NOFOLLOW)
	if serr != nil {
		return errors.Join(err, serr)
	}
	names, err := s.names()
	for _, n := range names {
		err = errors.Join(err, s.removeAll(n))
	}
	s.Close()
	if err != nil {
		return err
	}
	return d.unlink(name, atRemoveDir)
}

// rename gives a name another one in the same directory, and replaces what had that.
func (d *dir) rename(from, to string) error {
	return uninterrupted("rename", d.in(from), func() error { return syscall.Renameat(d.fd, from, d.fd, to) })
}

func (d *dir) mkfifo(name string) error {
	return uninterrupted("mkfifo", d.in(name), func() error {
		return syscall.Mknodat(d.fd, name, syscall.S_IFIFO|0o600, 0)
	})
}

// sync makes names that were created, renamed or removed here durable: fsync of a file says nothing
// about its directory entry (fsync(2), DESCRIPTION).
//
//go:noinline
func (d *dir) sync() error {
	return uninterrupted("fsync", d.path, func() error { return syscall.Fsync(d.fd) })
}

// write puts data under name with the given mode, atomically and durably: a temporary file beside it,
// fsync before the rename (else a crash may leave an empty file under the new name: ext4's delayed
// allocation), then fsync of the directory.
func (d *dir) write(name string, data []byte, mode os.FileMode) error {
	tmp := name + ".tmp"
	if err := d.remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// A child that another goroutine forks now would hold the descriptor until its exec, and
	// if this file is a script, running it would fail with ETXTBSY.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	f, err := d.open(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer d.remove(tmp)
	err = f.Chmod(mode)
	if err == nil {
		_, err = f.Write(data)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = d.rename(tmp, name)
	}
	if err != nil {
		return err
	}
	return d.sync()
}

// readOwn reads a file of the datastore, past links and whatever else somebody may have put there.
//
//go:noinline
func readOwn(path string) ([]byte, error) {
	d, err := openDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return readClose(d.open(filepath.Base(path), os.O_RDONLY, 0))
}

// writeFileDurably is write for a path.
func writeFileDurably(path string, data []byte, mode os.FileMode) error {
	d, err := openDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.write(filepath.Base(path), data, mode)
}
