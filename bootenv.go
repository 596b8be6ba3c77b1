// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
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
type bootEnv interface {
	vars() (map[string]string, error) // the whole environment
	set(vars []envVar) error          // one change of all of them; an empty value unsets
	String() string                   // for people
}

type envVar struct{ name, value string }

// envOpen opens a device or file; openStorage, or the power-cut simulator's.
type envOpen = func(path string, how openMode) (storage, error)

// Sizes of one copy of a U-Boot environment, in bytes: it has a header of 4 or 5; the
// largest seen in the field are 256 KiB.
const (
	envSizeMin = 5
	envSizeMax = 1 << 20
)

// envCopy is one line of fw_env.config: where a copy of the environment lies.
type envCopy struct {
	path   string
	offset int64 // in bytes; negative: from the end
	size   int64 // in bytes, header included
}

func (c envCopy) String() string { return fmt.Sprintf("%q at %#x", c.path, c.offset) }

// parseEnvConfig reads a fw_env.config of one or two lines DEVICE OFFSET SIZE [SECTORSIZE
// [SECTORS [LOCK]]]. The numbers are as scanf's %lli and %lx read them in U-Boot's
// tools/env/fw_env.c: the offset with 0x, in octal with 0, else in decimal; the others
// always in hexadecimal. Unlike those tools it does not skip a line it cannot read.
func parseEnvConfig(file string, text []byte) ([]envCopy, error) {
	var copies []envCopy
	n := 0
	for line := range strings.SplitSeq(string(text), "\n") {
		n++
		f := strings.Fields(line)
		if i := slices.IndexFunc(f, func(s string) bool { return s[0] == '#' }); i >= 0 {
			f = f[:i]
		}
		if len(f) == 0 {
			continue
		}
		c, err := parseEnvLine(f)
		if err != nil {
			return nil, refuse("%q, line %d: %w", file, n, err)
		}
		copies = append(copies, c)
	}
	switch {
	case len(copies) == 0:
		return nil, refuse("%q: no line DEVICE OFFSET SIZE", file)
	case len(copies) > 2:
		return nil, refuse("%q: got %d copies of the environment, want 1 or 2", file, len(copies))
	case len(copies) == 2 && copies[0].size != copies[1].size:
		return nil, refuse("%q: got copies of %#x and %#x bytes, want them equal", file, copies[0].size, copies[1].size)
	}
	return copies, nil
}

func parseEnvLine(f []string) (envCopy, error) {
	c := envCopy{path: f[0]}
	if len(f) < 3 || len(f) > 6 {
		return c, fmt.Errorf("got %q, want DEVICE OFFSET SIZE [SECTORSIZE [SECTORS]]", strings.Join(f, " "))
	}
	digits := strings.TrimLeft(f[1], "+-")
	var err error
	c.offset, err = strconv.ParseInt(f[1], 0, 64)
	if err != nil || strings.Contains(digits, "_") || len(digits) > 1 && strings.Contains("bBoO", digits[1:2]) {
		return c, fmt.Errorf("offset %q: want a number such as 0x400000, 4194304 or -0x4000", f[1])
	}
	for i, what := range []string{"size", "sector size", "number of sectors", "lock"}[:len(f)-2] {
		v, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(f[i+2]), "0x"), 16, 32)
		if err != nil {
			return c, fmt.Errorf("%s %q: want a hexadecimal number such as 0x4000", what, f[i+2])
		}
		if i == 0 {
			c.size = int64(v)
		}
	}
	if c.size < envSizeMin || c.size > envSizeMax {
		return c, fmt.Errorf("size %#x: want %#x to %#x bytes", c.size, envSizeMin, envSizeMax)
	}
	return c, nil
}

// locate gives the offset from the start of the device.
func (c envCopy) locate(deviceSize int64) (int64, error) {
	off := c.offset
	if off < 0 {
		off += deviceSize
	}
	if off < 0 || off > deviceSize-c.size {
		return 0, refuse("boot environment: %v: %#x bytes do not fit, the device ends at %#x", c, c.size, deviceSize)
	}
	return off, nil
}

// isCharDevice tells a raw MTD device or a UBI volume, from its node or, where there is no
// node, from its name. These need erasing and the skipping of bad blocks.
func (c envCopy) isCharDevice() bool {
	if st, err := os.Stat(c.path); err == nil {
		return st.Mode()&os.ModeCharDevice != 0
	}
	for _, p := range []string{"mtd", "ubi"} {
		if strings.HasPrefix(c.path, "/dev/"+p) && !strings.HasPrefix(c.path, "/dev/"+p+"block") {
			return true
		}
	}
	return false
}

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
	config   string // path, for messages
	copies   []envCopy
	open     envOpen
	lg       *logger
	sysBlock string    // /sys/class/block
	lockFile string    // of U-Boot's tools and libubootenv
	warned   [2]string // what was already said about each copy
}

// envImage is one copy as it was read.
type envImage struct {
	raw []byte
	off int64 // from the start of the device
	bad error // why it is not valid, nil if it is
}

func newNativeEnv(config string, copies []envCopy, open envOpen, lg *logger) *nativeEnv {
	return &nativeEnv{config: config, copies: copies, open: open, lg: lg,
		sysBlock: "/sys/class/block", lockFile: "/var/lock/fw_printenv.lock"}
}

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

// read reads one copy. An error is one in the configuration; a copy that cannot be read is
// a bad copy, as it is to U-Boot.
func (e *nativeEnv) read(c envCopy) (img envImage, err error) {
	s, err := e.open(c.path, openRead)
	if err != nil {
		img.bad = err
		return img, nil
	}
	defer s.Close()
	if img.off, err = c.locate(s.Size()); err != nil {
		return img, err
	}
	img.raw = make([]byte, c.size)
	if n, err := s.ReadAt(img.raw, img.off); n < len(img.raw) {
		img.bad = fmt.Errorf("got %d of %d bytes: %w", n, len(img.raw), err)
		return img, nil
	}
	img.bad = checkEnvImage(img.raw, e.header())
	return img, nil
}

// load reads all copies and says which is current. It warns once about a bad one.
func (e *nativeEnv) load() (imgs []envImage, cur int, err error) {
	var why []error
	for i, c := range e.copies {
		img, err := e.read(c)
		if err != nil {
			return nil, 0, err
		}
		if img.bad != nil {
			why = append(why, fmt.Errorf("%v: %w", c, img.bad))
		} else {
			cur = i
		}
		imgs = append(imgs, img)
	}
	if len(imgs) == 2 && sameDevice(e.copies[0].path, e.copies[1].path) &&
		imgs[0].raw != nil && imgs[1].raw != nil && max(imgs[0].off-imgs[1].off, imgs[1].off-imgs[0].off) < e.copies[0].size {
		return nil, 0, refuse("%q: the two copies of %#x bytes, at %#x and %#x of %q, overlap",
			e.config, e.copies[0].size, imgs[0].off, imgs[1].off, e.copies[0].path)
	}
	switch {
	case len(why) == len(imgs) && errors.Is(why[0], fs.ErrPermission):
		return nil, 0, withHint(refuse("boot environment: %w", why[0]), "only root may read it; run as root")
	case len(why) == len(imgs):
		return nil, 0, withHint(refuse("boot environment: no valid copy: %w", errors.Join(why...)),
			"compare %q with the boot loader's configuration; if they agree, have the boot loader save its environment (saveenv), or write one with mkenvimage", e.config)
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

func (e *nativeEnv) vars() (map[string]string, error) {
	unlock, err := e.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	imgs, cur, err := e.load()
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

func (e *nativeEnv) set(vars []envVar) error {
	if err := checkEnvVars(vars); err != nil {
		return err
	}
	unlock, err := e.lock()
	if err != nil {
		return err
	}
	defer unlock()
	imgs, cur, err := e.load()
	if err != nil {
		return err
	}
	old := imgs[cur].raw
	entries, err := parseEnv(old[e.header():])
	if err != nil {
		return err
	}
	changed := changeEnv(entries, vars)
	if slices.Equal(changed, entries) {
		return nil
	}
	img := make([]byte, len(old))
	pad := byte(0)
	if len(imgs) == 1 && old[len(old)-1] == 0xff {
		pad = 0xff // else the padding would be part of what changes
	}
	if err := formatEnv(img[e.header():], changed, pad); err != nil {
		return err
	}
	if len(imgs) == 2 {
		img[4] = old[4] + 1
	}
	binary.LittleEndian.PutUint32(img, crc32.ChecksumIEEE(img[e.header():]))
	if len(imgs) == 1 {
		return e.replace(e.copies[0], img, differEnd(old, img), "this is the only copy, and the boot loader may find no valid environment now")
	}
	other := e.copies[cur]
	return e.replace(e.copies[1-cur], img, len(img), fmt.Sprintf("the other copy, %v, was not touched and is valid", other))
}

// differEnd is the offset behind the last byte that differs.
func differEnd(a, b []byte) int {
	n := len(a)
	for n > 0 && a[n-1] == b[n-1] {
		n--
	}
	return n
}

// replace writes the first n bytes of img over copy c and makes sure of all of it. after is
// what a person should know when that fails.
func (e *nativeEnv) replace(c envCopy, img []byte, n int, after string) error {
	protect, err := e.unprotect(c.path)
	if err != nil {
		return err
	}
	defer protect()
	s, err := e.open(c.path, openWrite)
	if err != nil {
		err = fmt.Errorf("boot environment: %v: %w", c, err)
		if errors.Is(err, fs.ErrNotExist) {
			err = withHint(err, "missing files are not made here; if it should be one: truncate -s %d %q", c.size, c.path)
		}
		return err
	}
	off, err := c.locate(s.Size())
	if err == nil {
		err = writeEnvCopy(s, img, n, off)
		if err != nil {
			err = fmt.Errorf("boot environment: %q at %#x: %w; %s", c.path, off, err, after)
		}
	}
	if cerr := s.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("boot environment: %q at %#x: %w; %s", c.path, off, cerr, after)
	}
	return err
}

// writeEnvCopy writes, syncs and reads back. The sync is what the atomic change rests on:
// whoever called set may rely on the new environment, and a later change may overwrite the
// other copy, only when this one is durable (fdatasync(2)). The read-back goes past the page
// cache, which would only give back what was meant to be written.
func writeEnvCopy(s storage, img []byte, n int, off int64) error {
	if _, err := s.WriteAt(img[:n], off); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if err := s.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	got := make([]byte, len(img))
	if err := readUncached(s, got, off); err != nil {
		return fmt.Errorf("read-back: %w", err)
	}
	if n := differEnd(got, img); n > 0 {
		return fmt.Errorf("read-back: what was written is not what is there (last difference at byte %#x of %#x)", n-1, len(img))
	}
	return nil
}

// unprotect makes an eMMC boot partition writable for as long as it takes (Linux,
// Documentation/driver-api/mmc/mmc-dev-parts.rst). What it gives back undoes that.
func (e *nativeEnv) unprotect(device string) (protect func(), err error) {
	protect = func() {}
	if p, err := filepath.EvalSymlinks(device); err == nil {
		device = p
	}
	name := filepath.Base(device)
	if ok, _ := path.Match("mmcblk[0-9]*boot[0-9]", name); !ok {
		return protect, nil
	}
	file := filepath.Join(e.sysBlock, name, "force_ro")
	was, err := os.ReadFile(file)
	if err != nil || strings.TrimSpace(string(was)) != "1" {
		return protect, nil // if it is read-only all the same, the write will say so
	}
	if err := os.WriteFile(file, []byte("0"), 0); err != nil {
		return protect, fmt.Errorf("boot environment: unlock %q: %w", device, err)
	}
	return func() {
		if err := os.WriteFile(file, []byte("1"), 0); err != nil {
			e.lg.warnf("boot environment: lock %q again: %v", device, err)
		}
	}, nil
}

// Time that another program may hold the environment before mendlet gives up.
const (
	envLockTries = 200
	envLockWait  = 50 * time.Millisecond
)

// lock keeps others from changing the environment between reading and writing: by the file
// that U-Boot's tools and libubootenv lock, or, where there is no place for it, by the device
// itself. A simulated disk needs no lock.
func (e *nativeEnv) lock() (unlock func(), err error) {
	s, err := e.open(e.copies[0].path, openRead)
	if err != nil {
		return func() {}, nil // no first copy; load says so
	}
	d, ok := s.(*device)
	if !ok {
		s.Close()
		return func() {}, nil
	}
	f := d.f
	if l, err := openLockFile(e.lockFile); err == nil {
		f.Close()
		f = l
	}
	for range envLockTries {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
			return func() { f.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			break
		}
		time.Sleep(envLockWait)
	}
	f.Close()
	return nil, tryLater("boot environment: %q is locked by another program: %w", f.Name(), err)
}

// openLockFile does not follow a link: the directory may be writable for all. O_CREATE only
// where it must be: fs.protected_regular forbids it on another user's file there (proc(5)).
func openLockFile(file string) (*os.File, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = os.OpenFile(file, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o666)
	}
	return f, err
}

func readEnvConfig(file string) ([]envCopy, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, refuse("boot environment: %w", err)
	}
	return parseEnvConfig(file, text)
}

func charDevice(copies []envCopy) string {
	for _, c := range copies {
		if c.isCharDevice() {
			return c.path
		}
	}
	return ""
}

func canOpenAny(copies []envCopy, open envOpen) bool {
	for _, c := range copies {
		if s, err := open(c.path, openRead); err == nil {
			s.Close()
			return true
		} else if !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}
