// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// The names of Mender's boot environment contract.
const (
	varBootPart    = "mender_boot_part"
	varBootPartHex = "mender_boot_part_hex"
	varUpgrade     = "upgrade_available"
	varBootcount   = "bootcount"
	varCanaryCheck = "mender_check_saveenv_canary"
	varCanary      = "mender_saveenv_canary"
)

// bootEnv is the set of variables that the boot loader and the system share: which slot to
// boot, and whether that is a trial.
//
// What cannot be read, or is locked, is an error with exit code 75, and nothing was changed. A
// *envChangeError comes from set once a write has begun.
type bootEnv interface {
	vars(ctx context.Context) (map[string]string, error) // the whole environment
	// set makes one change of all of them; an empty value unsets. It returns when what the boot
	// loader will find has been read back.
	set(ctx context.Context, vars []envVar) error
	// check says what set would refuse, as far as that can be known without a change: whether the
	// variables fit in, and whether the places of the environment can be written.
	check(ctx context.Context, vars []envVar) error
	String() string // for people
}

type envVar struct{ name, value string }

// envChangeError is one from which on the boot environment may be another one than before.
type envChangeError struct{ error }

func (e *envChangeError) Unwrap() error { return e.error }

// nativeEnv is a U-Boot environment on block devices or in files, in one copy or two.
//
// A copy is a CRC-32 of the data in the byte order of the processor (here little-endian),
// with two copies also a flags byte, then the data: strings NAME=VALUE, each ended by a NUL,
// the last one by two; the rest is padding (U-Boot, include/env_internal.h, environment_s).
//
// With two copies a change is atomic: it goes to the copy that is not current. With one it
// cannot be: a cut in the middle of the write leaves no valid copy. All that can be done
// then is to write no more than from the CRC to the last byte that changes, which for a
// small environment is one sector.
type nativeEnv struct {
	*envConfig
	*envHost
	warned [2]string // what was already said about each copy
}

// envImage is one copy as it was read.
type envImage struct {
	raw []byte
	off int64 // from the start of the device
	bad error // why it is not valid, nil if it is
}

func newNativeEnv(c *envConfig, h *envHost) *nativeEnv { return &nativeEnv{envConfig: c, envHost: h} }

func (e *nativeEnv) String() string {
	s := "native, " + e.copies[0].String()
	if len(e.copies) == 1 {
		return s
	}
	if e.copies[0].path == e.copies[1].path {
		return s + fmt.Sprintf(" and %#x", e.copies[1].offset)
	}
	return s + " and " + e.copies[1].String()
}

// header is the size in bytes of what is before the data.
func (e *nativeEnv) header() int {
	if len(e.copies) == 2 {
		return 5
	}
	return 4
}

// checkEnvImage tells why a copy is not valid.
func checkEnvImage(raw []byte, header int) error {
	sum := func(h int) uint32 { return crc32.ChecksumIEEE(raw[h:]) }
	got := binary.LittleEndian.Uint32(raw)
	switch {
	case got == sum(header):
		return nil
	case binary.BigEndian.Uint32(raw) == sum(header):
		return errors.New("its CRC is big-endian: it was written for another processor")
	case len(bytes.Trim(raw, "\x00")) == 0, len(bytes.Trim(raw, "\xff")) == 0:
		return fmt.Errorf("it was never written: all bytes are %#x", raw[0])
	case header == 4 && got == sum(5):
		return errors.New("it is one of two redundant copies, but fw_env.config has only one line")
	case header == 5 && got == sum(4):
		return errors.New("it is a single copy without flags byte, but fw_env.config has two lines")
	}
	return fmt.Errorf("CRC: got %#08x, computed %#08x", got, sum(header))
}

// newerCopy chooses between two valid copies as U-Boot does for all but NOR flash: flags
// count up and wrap from 255 to 0, and the first copy wins a draw (U-Boot, env/common.c,
// env_import_redund).
func newerCopy(first, second byte) int {
	switch {
	case first == 255 && second == 0:
		return 1
	case first == 0 && second == 255:
		return 0
	case second > first:
		return 1
	}
	return 0
}

// read reads one copy from its medium; what the page cache has of it may not be there yet.
func (e *nativeEnv) read(ctx context.Context, c envCopy) (img envImage, err error) {
	err = e.again(ctx, func() error {
		s, err := e.open(c.path, openRead)
		if err != nil {
			return err
		}
		defer s.Close()
		if img.off, err = c.locate(s.Size()); err != nil {
			return err
		}
		img.raw = make([]byte, c.size)
		if err := readUncached(s, img.raw, img.off); err != nil {
			return fmt.Errorf("%v: %w", c, err)
		}
		return nil
	})
	if err == nil {
		img.bad = checkEnvImage(img.raw, e.header())
	}
	return img, err
}

// load reads all copies and says which is current. It warns once about a bad one. A copy that
// cannot be read is not a bad one: it may be the newer, and without it nothing is known.
func (e *nativeEnv) load(ctx context.Context) (imgs []envImage, cur int, err error) {
	var why []error
	for i, c := range e.copies {
		img, err := e.read(ctx, c)
		if errors.Is(err, fs.ErrNotExist) && e.besideOther(i) {
			img.bad, err = err, nil
		}
		if err != nil {
			return nil, 0, e.unread(c, err)
		}
		if img.bad != nil {
			why = append(why, fmt.Errorf("%v: %w", c, img.bad))
		} else {
			cur = i
		}
		imgs = append(imgs, img)
	}
	if len(imgs) == 2 && sameDevice(e.copies[0].path, e.copies[1].path) &&
		max(imgs[0].off-imgs[1].off, imgs[1].off-imgs[0].off) < e.copies[0].size {
		return nil, 0, refuse("%q: the two copies of %#x bytes, at %#x and %#x of %q, overlap",
			e.file, e.copies[0].size, imgs[0].off, imgs[1].off, e.copies[0].path)
	}
	switch {
	case len(why) == len(imgs):
		return nil, 0, withHint(refuse("boot environment: no valid copy: %w", errors.Join(why...)), "compare %q with the "+
			"boot loader's configuration; if they agree, have the boot loader save its environment (saveenv), "+
			"or write one with mkenvimage", e.file)
	case len(why) == 1:
		bad := 1 - cur
		if text := why[0].Error(); e.warned[bad] != text {
			e.warned[bad] = text
			e.lg.warnf("boot environment: copy %d of 2 is not valid and will be replaced by the next change: %s", bad+1, text)
		}
	case len(imgs) == 2:
		cur = newerCopy(imgs[0].raw[4], imgs[1].raw[4])
	}
	return imgs, cur, nil
}

// besideOther: copy i should be a file in the folder where the other copy is one. If it is not
// there, then to the boot loader neither.
func (e *nativeEnv) besideOther(i int) bool {
	if len(e.copies) < 2 || !sameFolder(e.copies[0], e.copies[1]) {
		return false
	}
	_, err := os.Stat(e.copies[1-i].path)
	return err == nil
}

// unread says of a copy why nothing is known without it.
func (e *nativeEnv) unread(c envCopy, err error) error {
	switch code := exitCode(err); {
	case code == exitTempFail && len(e.copies) == 2:
		return withHint(tryLater("boot environment: a copy cannot be read, and may be the newer one: %w", err),
			"the kernel's log may say why; if its medium is failing for good, so that it has to be replaced, "+
				"the environment has to be made anew there")
	case code == exitTempFail:
		return tryLater("boot environment: %w", err)
	case code == exitRefused:
		return err
	case errors.Is(err, fs.ErrPermission):
		return withHint(refuse("boot environment: %w", err), "only root may read it; run as root")
	}
	return notThere(e.file, c.path, err)
}

func sameDevice(a, b string) bool {
	if a == b {
		return true
	}
	sa, err := os.Stat(a)
	if err != nil {
		return false
	}
	sb, err := os.Stat(b)
	if err != nil {
		return false
	}
	ta, oka := sa.Sys().(*syscall.Stat_t)
	tb, okb := sb.Sys().(*syscall.Stat_t)
	isBlock := sa.Mode()&sb.Mode()&os.ModeDevice != 0
	return os.SameFile(sa, sb) || oka && okb && isBlock && ta.Rdev == tb.Rdev
}

// parseEnv splits the data of a copy into its strings, as they are: a string without "="
// is kept, though U-Boot's import skips it, and so is a name that comes twice, of which
// U-Boot takes the last.
func parseEnv(data []byte) ([]string, error) {
	var entries []string
	for len(data) > 0 && data[0] != 0 {
		i := bytes.IndexByte(data, 0)
		if i < 0 {
			return nil, refuse("boot environment: variable %.40q has no end", data)
		}
		entries = append(entries, string(data[:i]))
		data = data[i+1:]
	}
	if len(data) == 0 {
		return nil, refuse("boot environment: its data has no end (two zero bytes)")
	}
	return entries, nil
}

// formatEnv is the reverse of parseEnv: it fills data.
func formatEnv(data []byte, entries []string, pad byte) error {
	need := 1
	for _, s := range entries {
		need += len(s) + 1
	}
	if need > len(data) {
		return refuse("boot environment: full: got %d bytes of variables, there is room for %d", need, len(data))
	}
	p := data
	for _, s := range entries {
		n := copy(p, s)
		p[n] = 0
		p = p[n+1:]
	}
	p[0] = 0
	for i := range p[1:] {
		p[1+i] = pad
	}
	return nil
}

// changeEnv applies vars to entries. What it does not name stays, in its order.
func changeEnv(entries []string, vars []envVar) []string {
	entries = slices.Clone(entries)
	for _, v := range vars {
		is := func(s string) bool { n, _, ok := strings.Cut(s, "="); return ok && n == v.name }
		i := slices.IndexFunc(entries, is)
		if v.value == "" {
			entries = slices.DeleteFunc(entries, is)
			continue
		}
		s := v.name + "=" + v.value
		if i < 0 {
			entries = append(entries, s)
			continue
		}
		entries[i] = s
		entries = append(entries[:i+1], slices.DeleteFunc(entries[i+1:], is)...)
	}
	return entries
}

// checkEnvVars refuses what cannot be stored, or not be read back by the usual tools.
func checkEnvVars(vars []envVar) error {
	for _, v := range vars {
		if v.name == "" || strings.ContainsAny(v.name, "=\x00\n\r\t ") {
			return refuse("boot environment: variable name %q: want one without blanks, line ends, NUL and =", v.name)
		}
		if strings.ContainsAny(v.value, "\x00\n\r") {
			return refuse("boot environment: value %q of %q: want one without line ends and NUL", v.value, v.name)
		}
	}
	return nil
}

func (e *nativeEnv) vars(ctx context.Context) (map[string]string, error) {
	unlock, err := e.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	imgs, cur, err := e.load(ctx)
	if err != nil {
		return nil, err
	}
	entries, err := parseEnv(imgs[cur].raw[e.header():])
	if err != nil {
		return nil, err
	}
	m := map[string]string{}
	for _, s := range entries {
		if name, value, ok := strings.Cut(s, "="); ok {
			m[name] = value
		}
	}
	return m, nil
}

// changed is the image of a copy with vars in it that follows on old; nil: they are there.
func (e *nativeEnv) changed(old []byte, vars []envVar) ([]byte, error) {
	if err := checkEnvVars(vars); err != nil {
		return nil, err
	}
	for _, v := range vars {
		if e.writable != nil && !listed(e.writable, v.name) {
			return nil, withHint(refuse("boot environment: %q is not among what %q lists as writable for %q",
				v.name, e.file, e.name), "the boot loader would not take it; add it to the writelist there "+
				"and to CONFIG_ENV_FLAGS_LIST_STATIC of the boot loader")
		}
	}
	entries, err := parseEnv(old[e.header():])
	if err != nil {
		return nil, err
	}
	after := changeEnv(entries, vars)
	if slices.Equal(after, entries) {
		return nil, nil
	}
	img := make([]byte, len(old))
	pad := byte(0)
	if len(e.copies) == 1 && old[len(old)-1] == 0xff {
		pad = 0xff // else the padding would be part of what changes
	}
	if err := formatEnv(img[e.header():], after, pad); err != nil {
		return nil, err
	}
	if len(e.copies) == 2 {
		img[4] = old[4] + 1
	}
	binary.LittleEndian.PutUint32(img, crc32.ChecksumIEEE(img[e.header():]))
	return img, nil
}

func (e *nativeEnv) set(ctx context.Context, vars []envVar) error {
	unlock, err := e.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	imgs, cur, err := e.load(ctx)
	if err != nil {
		return err
	}
	old := imgs[cur].raw
	img, err := e.changed(old, vars)
	switch {
	case err != nil:
		return err
	case img == nil:
		return e.settle(e.copies[cur])
	case len(imgs) == 1:
		err = e.replace(e.copies[0], img, differEnd(old, img))
	default:
		cur = 1 - cur
		err = e.replace(e.copies[cur], img, len(img))
	}
	if err == nil {
		err = e.confirm(ctx, cur, img)
	}
	var touched *envChangeError
	if !errors.As(err, &touched) {
		return err
	}
	if len(imgs) == 1 {
		return fmt.Errorf("%w; this is the only copy, and the boot loader may find no valid environment now", err)
	}
	err = fmt.Errorf("%w; the other copy, %v, was not touched and is valid", err, e.copies[1-cur])
	// Where that is what the boot loader would take, nothing has happened, and it may be tried again.
	if now, at, lerr := e.load(ctx); lerr == nil && bytes.Equal(now[at].raw, old) {
		return tryLater("%w", err)
	}
	return err
}

// settle makes durable what is there already: of a change whose sync failed, or was cut off, the
// medium may have it in a cache only.
func (e *nativeEnv) settle(c envCopy) error {
	s, err := e.open(c.path, openRead)
	if err != nil {
		return tryLater("boot environment: %v: %w", c, err)
	}
	defer s.Close()
	if err := s.Sync(); err != nil {
		return tryLater("boot environment: %v: sync: %w", c, err)
	}
	return nil
}

// confirm reads all copies again, past the page cache, and wants the one that the boot loader will take
// to be img, in the place of copy i.
func (e *nativeEnv) confirm(ctx context.Context, i int, img []byte) error {
	c := e.copies[i]
	imgs, cur, err := e.load(ctx)
	switch {
	case err != nil:
		return &envChangeError{fmt.Errorf("boot environment: %v: read-back: %w", c, err)}
	case !bytes.Equal(imgs[i].raw, img):
		return &envChangeError{fmt.Errorf("boot environment: %v: read-back: what was written is not what is there "+
			"(last difference at byte %#x of %#x)", c, differEnd(imgs[i].raw, img)-1, len(img))}
	case cur != i:
		return &envChangeError{fmt.Errorf("boot environment: %v: what was written is there, but the boot loader "+
			"will take %v", c, e.copies[cur])}
	}
	return nil
}

func (e *nativeEnv) check(ctx context.Context, vars []envVar) error {
	unlock, err := e.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	imgs, cur, err := e.load(ctx)
	if err != nil {
		return err
	}
	if _, err := e.changed(imgs[cur].raw, vars); err != nil {
		return err
	}
	for _, c := range e.copies { // changes go to one and the other in turn
		if err := e.again(ctx, func() error { return e.checkWritable(c) }); err != nil {
			return err
		}
	}
	return nil
}

// checkWritable opens a copy for writing. A block device that is read-only may be opened, too.
func (e *nativeEnv) checkWritable(c envCopy) error {
	if err := e.writeProtected(c.path); err != nil {
		return err
	}
	s, err := e.open(c.path, openWrite)
	if err != nil {
		return cannotWrite(c, err)
	}
	return s.Close()
}

// cannotWrite says what to do about a copy that does not open for writing.
func cannotWrite(c envCopy, err error) error {
	text := "boot environment: %v cannot be written: %w"
	switch {
	case mayPass(err):
		return tryLater(text, c, err)
	case errors.Is(err, syscall.EROFS):
		return withHint(refuse(text, c, err), "its file system is mounted read-only; it has to be writable "+
			"for an update, mount -o remount,rw does that")
	case errors.Is(err, fs.ErrNotExist):
		return withHint(refuse(text, c, err), "missing files are not made here; if it should be one: "+
			"truncate -s %d %q", c.offset+c.size, c.path)
	case os.Geteuid() != 0:
		return withHint(refuse(text, c, err), "only root may; run as root")
	}
	return refuse(text, c, err)
}

// differEnd is the offset behind the last byte that differs.
func differEnd(a, b []byte) int {
	n := len(a)
	for n > 0 && a[n-1] == b[n-1] {
		n--
	}
	return n
}

// replace writes the first n bytes of img over copy c, and syncs. The sync is what the atomic change
// rests on: whoever called set may rely on the new environment, and a later change may overwrite
// the other copy, only when this one is durable (fdatasync(2)).
func (e *nativeEnv) replace(c envCopy, img []byte, n int) error {
	protect, err := e.unprotect(c.path)
	if err != nil {
		return err
	}
	defer protect()
	s, err := e.open(c.path, openWrite)
	if err != nil {
		return cannotWrite(c, err)
	}
	off, err := c.locate(s.Size())
	if err != nil {
		s.Close()
		return err
	}
	what := "write"
	if _, err = s.WriteAt(img[:n], off); err == nil {
		what, err = "sync", s.Sync()
	}
	if cerr := s.Close(); err == nil && cerr != nil {
		what, err = "close", cerr
	}
	if err != nil {
		return &envChangeError{fmt.Errorf("boot environment: %q at %#x: %s: %w", c.path, off, what, err)}
	}
	return nil
}

// sysBlock is the folder of a block device in sysfs, and whether it is an eMMC boot partition.
func (e *nativeEnv) sysBlock(device string) (dir string, boot bool) {
	if p, err := filepath.EvalSymlinks(device); err == nil {
		device = p
	}
	name := filepath.Base(device)
	boot, _ = filepath.Match("mmcblk[0-9]*boot[0-9]", name)
	return filepath.Join(e.root, "/sys/class/block", name), boot
}

// sysFlag is a file of sysfs with a number in it; "" where it cannot be read.
func sysFlag(dir, name string) string {
	text, _ := readPlain(filepath.Join(dir, name))
	return strings.TrimSpace(string(text))
}

// writeProtected is an error for a block device that the kernel does not write to, unless that is the
// protection of an eMMC boot partition, which replace takes off.
func (e *nativeEnv) writeProtected(device string) error {
	dir, boot := e.sysBlock(device)
	switch sysFlag(dir, "ro_lock_until_next_power_on") {
	case "1":
		return withHint(refuse("boot environment: %q is write-protected until it loses power", device),
			"whoever protects it at each boot has to leave that out")
	case "2":
		return refuse("boot environment: %q is write-protected for good", device)
	}
	switch {
	case sysFlag(dir, "ro") != "1":
		return nil
	case !boot || sysFlag(dir, "force_ro") != "1":
		return refuse("boot environment: %q is read-only", device)
	}
	f, err := os.OpenFile(filepath.Join(dir, "force_ro"), os.O_WRONLY, 0)
	if err != nil {
		return withHint(refuseUnlessPassing(err, "boot environment: %q is read-only: %w", device, err),
			"echo 0 >%q must be possible", filepath.Join(dir, "force_ro"))
	}
	return f.Close()
}

// unprotect makes an eMMC boot partition writable for as long as it takes (Linux,
// Documentation/driver-api/mmc/mmc-dev-parts.rst). What it gives back undoes that.
func (e *nativeEnv) unprotect(device string) (protect func(), err error) {
	dir, boot := e.sysBlock(device)
	if !boot || sysFlag(dir, "force_ro") != "1" {
		return func() {}, nil // if it is read-only all the same, the write will say so
	}
	file := filepath.Join(dir, "force_ro")
	if err := os.WriteFile(file, []byte("0"), 0); err != nil {
		return nil, refuseUnlessPassing(err, "boot environment: unlock %q: %w", device, err)
	}
	return func() {
		if err := os.WriteFile(file, []byte("1"), 0); err != nil {
			e.lg.warnf("boot environment: lock %q again: %v", device, err)
		}
	}, nil
}

// envLockWait is how long another program may hold the environment before mendlet gives up.
const envLockWait = 10 * time.Second

// lock keeps others from changing the environment between reading and writing: by the file
// that U-Boot's tools and libubootenv lock, or, where there is no place for it, by the device
// itself. A simulated disk needs no lock.
func (e *nativeEnv) lock(ctx context.Context) (unlock func(), err error) {
	var f *os.File
	err = e.again(ctx, func() (err error) {
		f, err = e.openLock()
		return err
	})
	if err != nil {
		return nil, tryLater("boot environment: no lock: %w", err)
	}
	if f == nil {
		return func() {}, nil
	}
	if err = flock(ctx, f, envLockWait, e.sleep); err != nil {
		f.Close()
		return nil, tryLater("boot environment: %w", err)
	}
	return func() { funlock(f) }, nil
}

// openLock opens what is to be locked; nil: nothing.
func (e *nativeEnv) openLock() (*os.File, error) {
	s, err := e.open(e.copies[0].path, openRead)
	if mayPass(err) {
		return nil, err
	}
	d, ok := s.(*device)
	if !ok { // no first copy, of which load says so; or no real one
		if err == nil {
			s.Close()
		}
		return nil, nil
	}
	name := e.lockFile
	if name == "" {
		name = e.root + "/var/lock/fw_printenv.lock"
	}
	l, err := openLockFile(name)
	switch {
	case err == nil:
		d.Close()
		return l, nil
	case mayPass(err):
		d.Close()
		return nil, err
	case errors.Is(err, errNotPlain), errors.Is(err, syscall.ELOOP):
		e.lg.warnf("boot environment: in the place of the lock file is something else, the device is locked instead: %v", err)
	}
	return d.f, nil
}

// openLockFile neither follows a link nor waits: the directory may be writable for all. O_CREATE only
// where it must be: fs.protected_regular forbids it on another user's file there (proc(5)).
func openLockFile(file string) (*os.File, error) {
	f, err := openPlain(file, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = openPlain(file, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o666)
	}
	return f, err
}
