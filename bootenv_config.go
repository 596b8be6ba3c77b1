// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Sizes of one copy of a U-Boot environment, in bytes: it has a header of 4 or 5; the
// largest seen in the field are 256 KiB.
const (
	envSizeMin = 5
	envSizeMax = 1 << 20
)

// envHost is what the boot environment needs of the machine that it belongs to.
type envHost struct {
	open    func(path string, how openMode) (storage, error) // openStorage, or the power-cut simulator's
	resolve func(name string) (string, error)                // the node of a PARTUUID= and the like
	root    string                                           // before /sys, /proc and /var; "" is the real one
	sleep   sleeper
	lg      *logger
}

// envReads are the waits before another try to read what could not be read.
var envReads = []time.Duration{50 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second}

// again does something until it works, the error is not one that may pass, or it has been tried often
// enough. The last error comes back, with exit code 75 if it may pass.
func (h *envHost) again(ctx context.Context, do func() error) error {
	for _, wait := range envReads {
		err := do()
		if !mayPass(err) {
			return err
		}
		h.lg.warnf("boot environment: %v; trying again", err)
		if err := h.sleep(ctx, wait); err != nil {
			return tryLater("interrupted: %w", err)
		}
	}
	err := do()
	if mayPass(err) {
		err = tryLater("%w", err)
	}
	return err
}

// envCopy says where a copy of the environment lies.
type envCopy struct {
	path   string
	offset int64 // in bytes; negative: from the end
	size   int64 // in bytes, header included
}

//go:noinline
func (c envCopy) String() string { return fmt.Sprintf("%q at %#x", c.path, c.offset) }

// envConfig is what a fw_env.config says of one environment.
type envConfig struct {
	file     string // its path, for messages
	name     string // of the environment, where the file has several; "" otherwise
	copies   []envCopy
	lockFile string   // "": that of U-Boot's tools
	writable []string // names that the boot loader takes from there; nil: all
}

// readEnvConfig reads file, in U-Boot's form or in libubootenv's, and finds the nodes of what it
// names. Where it describes several environments it takes the one called name, or the one that the
// boot loader has named in the device tree, or the first, as libubootenv does.
func readEnvConfig(file, name string, h *envHost) (*envConfig, error) {
	text, err := readPlain(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, describeEnv(refuse("boot environment: %w", err), file)
	}
	if err != nil {
		return nil, refuseUnlessPassing(err, "boot environment: %w", err)
	}
	cfg, err := chooseEnv(file, text, name, h)
	if err != nil {
		return nil, err
	}
	for i, c := range cfg.copies {
		if c.isCharDevice() {
			continue // which the tools look up
		}
		path, err := h.resolve(c.path)
		if err != nil {
			return nil, notThere(file, c.path, err)
		}
		cfg.copies[i].path = path
	}
	return cfg, nil
}

// describeEnv is err with what to do where there is no fw_env.config.
//
//go:noinline
func describeEnv(err error, file string) error {
	return withHint(err, "write %q with a line DEVICE OFFSET SIZE for each copy of the U-Boot environment, "+
		"or set FwEnvConfig or BootEnv in the configuration", file)
}

// errNotThere: what fw_env.config names does not exist.
var errNotThere = errors.New("is not to be had")

// notThere is for a place of the environment that does not exist: nothing is wrong with what is there.
func notThere(file, name string, err error) error {
	hinted := hintOf(err) != ""
	err = refuseUnlessPassing(err, "boot environment: %q names %q, which %w: %w", file, name, errNotThere, err)
	if hinted {
		return err
	}
	return withHint(err, "correct %q, or see to it that the device is found and its file system mounted; "+
		"the environment itself may be good, so do not write a new one", file)
}

// chosenEnv is the property in which the boot loader says which environment it has.
const chosenEnv = "/proc/device-tree/chosen/u-boot,env-config"

func chooseEnv(file string, text []byte, name string, h *envHost) (*envConfig, error) {
	if !isEnvYAML(text) {
		if name != "" {
			return nil, refuse("%q has lines DEVICE OFFSET SIZE and no environments by name, want %q", file, name)
		}
		copies, err := parseEnvConfig(file, text)
		return &envConfig{file: file, copies: copies}, err
	}
	all, err := parseEnvYAML(file, string(text))
	if err != nil {
		return nil, err
	}
	from := "the one asked for"
	if name == "" {
		chosen, _ := readPlain(h.root + chosenEnv)
		name = before(string(chosen), "\x00")
		from = "the one that the boot loader names in the device tree"
	}
	if name == "" {
		return all[0], nil
	}
	i := slices.IndexFunc(all, func(c *envConfig) bool { return c.name == name })
	if i < 0 {
		var names []string
		for _, c := range all {
			names = append(names, c.name)
		}
		return nil, refuse("%q: got the environments %q, want %s, %q", file, names, from, name)
	}
	return all[i], nil
}

// parseEnvConfig reads a fw_env.config of one or two lines DEVICE OFFSET SIZE [SECTORSIZE
// [SECTORS [LOCK]]]. The numbers are as scanf's %lli and %lx read them in U-Boot's
// tools/env/fw_env.c: the offset with 0x, in octal with 0, else in decimal; the others
// always in hexadecimal. Unlike those tools it does not skip a line it cannot read.
func parseEnvConfig(file string, text []byte) ([]envCopy, error) {
	var copies []envCopy
	n := 0
	for _, line := range strings.Split(string(text), "\n") {
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
	var err error
	if c.offset, err = parseEnvNumber("offset", f[1]); err != nil {
		return c, err
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
	return c, checkEnvSize(c.size)
}

// parseEnvNumber takes what C does: hexadecimal with 0x, octal with 0, else decimal.
func parseEnvNumber(what, s string) (int64, error) {
	digits := strings.TrimLeft(s, "+-")
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil || strings.Contains(digits, "_") || len(digits) > 1 && strings.Contains("bBoO", digits[1:2]) {
		return 0, fmt.Errorf("%s %q: want a number such as 0x400000, 4194304 or -0x4000", what, s)
	}
	return n, nil
}

//go:noinline
func checkEnvSize(n int64) error {
	if n < envSizeMin || n > envSizeMax {
		return fmt.Errorf("size %#x: want %#x to %#x bytes", n, envSizeMin, envSizeMax)
	}
	return nil
}

// libubootenv's form of fw_env.config (docs/fw_env_config.md there), for several environments:
//
//	uboot:
//	  size : 0x4000
//	  lockfile : /var/lock/fw_printenv.lock
//	  writelist:
//	    - mender_boot_part:sw
//	  devices:
//	    - path : /dev/mmcblk0
//	      offset : 0x400000
//	      sectorsize : 0x200
//	      disablelock : yes
//
// That is YAML, of which nothing else is taken here: mappings and lists by indentation, plain or
// quoted values of one line, comments.

// isEnvYAML tells that form from lines DEVICE OFFSET SIZE: its first line is a key.
func isEnvYAML(text []byte) bool {
	for _, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(cutComment(line))
		if line != "" {
			return strings.HasSuffix(line, ":") || strings.HasPrefix(line, "---") || strings.ContainsAny(line[:1], "%{")
		}
	}
	return false
}

// cutComment takes a comment off, which begins the line or stands behind a blank.
func cutComment(line string) string {
	for i := range len(line) {
		if line[i] == '#' && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t') {
			return line[:i]
		}
	}
	return line
}

// yamlLine is a line KEY: VALUE, "- VALUE", or "- KEY: VALUE".
type yamlLine struct {
	indent, at int  // columns of its first letter, and of the key, to which lines below may be aligned
	item       bool // it begins an entry of a list
	key, value string
}

// parseYAMLLine takes a line that is not empty.
func parseYAMLLine(line string) (yamlLine, error) {
	line = strings.TrimRight(line, " \t\r")
	rest := strings.TrimLeft(line, " ")
	l := yamlLine{indent: len(line) - len(rest)}
	if after, ok := strings.CutPrefix(rest, "-"); ok && (after == "" || after[0] == ' ') {
		l.item = true
		rest = strings.TrimLeft(after, " ")
	}
	l.at = len(line) - len(rest)
	switch {
	case strings.ContainsAny(line, "\t"):
		return l, fmt.Errorf("a tab, want blanks")
	case rest == "" || strings.ContainsAny(rest[:1], "{}[]&*!|>%@`?,-"):
		return l, fmt.Errorf("got %q, want KEY: VALUE or an entry of a list", strings.TrimSpace(line))
	}
	l.value = rest
	if i := strings.Index(rest+" ", ": "); i >= 0 && rest[0] != '"' && rest[0] != '\'' {
		l.key, l.value = strings.TrimRight(rest[:i], " "), strings.TrimLeft(strings.TrimPrefix(rest[i:], ":"), " ")
	}
	var err error
	l.value, err = unquoteYAML(l.value)
	return l, err
}

// unquoteYAML takes the quotes off, between which nothing may need another reading.
func unquoteYAML(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	if q := s[0]; q == '"' || q == '\'' {
		in := s[1:]
		if n := len(in) - 1; n >= 0 && in[n] == q && !strings.ContainsAny(in[:n], `"'\`) {
			return in[:n], nil
		}
		return "", fmt.Errorf("value %s: want quotes around all of it and none within", s)
	}
	if strings.ContainsAny(s[:1], "{}[]&*!|>%@`") || strings.Contains(s, ": ") {
		return "", fmt.Errorf("value %q: want one word or path", s)
	}
	return s, nil
}

// envYAML reads the lines one by one.
type envYAML struct {
	all     []*envConfig
	keys    int      // indentation of the keys of an environment
	list    string   // devices or writelist, while in it
	dash    int      // indentation of its entries
	at      int      // indentation of the keys of a device
	size    int64    // of the environment
	seen    []string // keys of the environment
	devSeen []string // keys of the device
}

func parseEnvYAML(file, text string) ([]*envConfig, error) {
	y := &envYAML{}
	n := 0
	for _, line := range strings.Split(text, "\n") {
		n++
		line = cutComment(line)
		if t := strings.TrimSpace(line); t == "" || t == "---" && len(y.all) == 0 {
			continue
		}
		l, err := parseYAMLLine(line)
		if err == nil {
			err = y.take(file, l)
		}
		if err != nil {
			return nil, withHint(refuse("%q, line %d: %w", file, n, err),
				"of YAML this file may have what libubootenv's documentation shows of it")
		}
	}
	if err := y.finish(); err != nil {
		return nil, refuse("%q: %w", file, err)
	}
	if len(y.all) == 0 {
		return nil, refuse("%q: no environment in it", file)
	}
	return y.all, nil
}

func (y *envYAML) take(file string, l yamlLine) error {
	switch {
	case l.indent == 0:
		if err := y.finish(); err != nil {
			return err
		}
		return y.begin(file, l)
	case len(y.all) == 0:
		return fmt.Errorf("got %q, want the name of an environment first", l.key+l.value)
	case y.keys == 0 && !l.item:
		y.keys = l.indent
	}
	if l.item && y.list != "" && y.dash == 0 {
		y.dash = l.indent
	}
	switch {
	case l.item && y.list == "writelist" && l.indent == y.dash && y.dash >= y.keys:
		return y.entry(l)
	case l.item && y.list == "devices" && l.indent == y.dash && y.dash >= y.keys:
		c := y.all[len(y.all)-1]
		c.copies = append(c.copies, envCopy{})
		y.devSeen, y.at = nil, l.at
		return y.device(l)
	case !l.item && y.list == "devices" && l.indent == y.at && y.dash > 0:
		return y.device(l)
	case !l.item && l.indent == y.keys:
		y.list = ""
		return y.key(l)
	}
	return fmt.Errorf("got %q at column %d: its indentation fits nothing before it", l.key+l.value, l.indent+1)
}

// begin takes the name of an environment.
func (y *envYAML) begin(file string, l yamlLine) error {
	if l.item || l.key == "" || l.value != "" {
		return fmt.Errorf("got %q, want the name of an environment and a colon", l.key+l.value)
	}
	if slices.ContainsFunc(y.all, func(c *envConfig) bool { return c.name == l.key }) {
		return fmt.Errorf("environment %q comes twice", l.key)
	}
	*y = envYAML{all: append(y.all, &envConfig{file: file, name: l.key})}
	return nil
}

// once is an error for a key that is not one of those, or comes again.
func once(seen *[]string, l yamlLine, keys ...string) error {
	switch {
	case !listed(keys, l.key):
		return fmt.Errorf("got %q, want one of %s", l.key+l.value, strings.Join(keys, ", "))
	case listed(*seen, l.key):
		return fmt.Errorf("%s comes twice", l.key)
	}
	*seen = append(*seen, l.key)
	return nil
}

// key takes one of an environment.
func (y *envYAML) key(l yamlLine) error {
	if err := once(&y.seen, l, "size", "lockfile", "writelist", "devices"); err != nil {
		return err
	}
	c := y.all[len(y.all)-1]
	if isList := l.key == "writelist" || l.key == "devices"; isList != (l.value == "") {
		want := map[bool]string{true: "a list below it", false: "a value"}[isList]
		return fmt.Errorf("%s: got %q, want %s", l.key, l.value, want)
	}
	var err error
	switch l.key {
	case "size":
		if y.size, err = parseEnvNumber("size", l.value); err == nil {
			err = checkEnvSize(y.size)
		}
	case "lockfile":
		c.lockFile = l.value
	default:
		y.list, y.dash, y.at = l.key, 0, 0
	}
	return err
}

// entry takes NAME:FLAGS of a list of what the boot loader imports. What is read-only there or can be
// written once is refused by libubootenv, so it is not for us to write either.
func (y *envYAML) entry(l yamlLine) error {
	c := y.all[len(y.all)-1]
	name, flags, ok := strings.Cut(l.value, ":")
	if l.key != "" || !ok || name == "" || flags == "" {
		return fmt.Errorf("writelist: got %q, want NAME:FLAGS", l.key+l.value)
	}
	if c.writable == nil {
		c.writable = []string{}
	}
	if !strings.ContainsAny(flags, "ro") {
		c.writable = append(c.writable, name)
	}
	return nil
}

// device takes a key of a device. Sector size and lock concern MTD only.
func (y *envYAML) device(l yamlLine) error {
	if err := once(&y.devSeen, l, "path", "offset", "sectorsize", "disablelock", "unlock"); err != nil {
		return err
	}
	c := y.all[len(y.all)-1]
	d := &c.copies[len(c.copies)-1]
	var err error
	switch l.key {
	case "path":
		if d.path = l.value; d.path == "" {
			err = fmt.Errorf("path: got none")
		}
	case "offset":
		d.offset, err = parseEnvNumber("offset", l.value)
	case "sectorsize":
		_, err = parseEnvNumber("sectorsize", l.value)
	}
	return err
}

// finish checks the environment that has been read.
func (y *envYAML) finish() error {
	if len(y.all) == 0 {
		return nil
	}
	c := y.all[len(y.all)-1]
	switch {
	case y.size == 0:
		return fmt.Errorf("environment %q: size is missing", c.name)
	case len(c.copies) < 1 || len(c.copies) > 2:
		return fmt.Errorf("environment %q: got %d devices, want 1 or 2", c.name, len(c.copies))
	}
	for i := range c.copies {
		if c.copies[i].size = y.size; c.copies[i].path == "" {
			return fmt.Errorf("environment %q: device %d: path is missing", c.name, i+1)
		}
	}
	return nil
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

//go:noinline
func charDevice(copies []envCopy) string {
	for _, c := range copies {
		if c.isCharDevice() {
			return c.path
		}
	}
	return ""
}

// sameFolder: both are files beside each other, so that one cannot be away with its medium.
func sameFolder(a, b envCopy) bool {
	dir := filepath.Dir(a.path)
	return dir == filepath.Dir(b.path) && dir != "/dev" && !strings.HasPrefix(dir, "/dev/")
}
