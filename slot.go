// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf16"
)

// machine is the computer that the program runs on, as far as tests put another in its place.
type machine struct {
	root    string // before /proc, /sys and /dev; "" is the real one
	running string // --running: A, B, none, or "" to find out
	open    func(path string, how openMode) (storage, error)
}

// newMachine is the real one.
func newMachine(running string) *machine { return &machine{running: running, open: openStorage} }

func (m *machine) path(name string) string { return m.root + name }

// slot is one of the two root partitions.
type slot struct {
	letter string // A or B
	path   string // device node or image file
	num    int    // partition number that the boot environment calls it by
	ubi    bool
}

func (s *slot) String() string { return fmt.Sprintf("%s (%s)", s.letter, s.path) }

// slots is what is known about the pair.
type slots struct {
	a, b    *slot
	running *slot    // nil: none of them runs (initramfs, recovery system, --running none)
	why     []string // one line for each source: mounted root, command line, boot environment
}

func (s *slots) byNum(n string) *slot {
	for _, x := range []*slot{s.a, s.b} {
		if strconv.Itoa(x.num) == n {
			return x
		}
	}
	return nil
}

func (s *slots) other(x *slot) *slot {
	if x == s.a {
		return s.b
	}
	return s.a
}

// findSlots resolves RootfsPartA and RootfsPartB and finds out which one runs.
func findSlots(c *config, m *machine, env map[string]string) (*slots, error) {
	s := &slots{}
	for _, x := range []struct {
		letter, key, conf string
		to                **slot
	}{{"A", "RootfsPartA", c.RootfsPartA, &s.a}, {"B", "RootfsPartB", c.RootfsPartB, &s.b}} {
		if x.conf == "" {
			return nil, withHint(refuse("%s is not set in the configuration", x.key),
				"set RootfsPartA and RootfsPartB to the two root partitions in %q", m.path(filepath.Join(c.paths.conf, "mender.conf")))
		}
		one, err := m.resolveSlot(x.letter, x.conf)
		if err != nil {
			return nil, refuse("%s %q: %w", x.key, x.conf, err)
		}
		*x.to = one
	}
	if s.a.path == s.b.path || s.a.num == s.b.num {
		return nil, refuse("slots %s and %s are the same or have the same number", s.a, s.b)
	}
	return s, s.findRunning(m, env)
}

// resolveSlot turns what the configuration says into a node and a partition number, which
// is what the path ends in (spec: the trailing decimal digits).
func (m *machine) resolveSlot(letter, conf string) (*slot, error) {
	path, err := m.resolveDevice(conf)
	if err != nil {
		return nil, err
	}
	digits := path[len(strings.TrimRight(path, "0123456789")):]
	num, err := strconv.Atoi(digits)
	if err != nil {
		return nil, fmt.Errorf("%q does not end in a partition number", path)
	}
	ubi, err := filepath.Match("ubi[0-9]*_[0-9]*", filepath.Base(path))
	return &slot{letter: letter, path: path, num: num, ubi: ubi}, err
}

// resolveDevice finds the node for one of the forms of a root= or RootfsPart value. Names
// by partition UUID or label are looked up in sysfs and in the partition table itself, so
// that neither udev nor findfs is needed. Other links are kept as they are: a device-mapper
// name is stable where the dm-N that it leads to is not.
func (m *machine) resolveDevice(name string) (string, error) {
	for _, p := range []struct{ prefix, tag string }{
		{"/dev/disk/by-partuuid/", "PARTUUID="}, {"/dev/disk/by-partlabel/", "PARTLABEL="},
	} {
		if v, ok := strings.CutPrefix(name, p.prefix); ok {
			if path, err := filepath.EvalSymlinks(m.path(name)); err == nil {
				return path, nil
			}
			name = p.tag + unescapeUdev(v)
		}
	}
	switch {
	case name == "/dev/root", strings.HasPrefix(name, "/dev/disk/"):
		if path, err := filepath.EvalSymlinks(m.path(name)); err == nil && path != m.path(name) {
			return path, nil
		}
		if name == "/dev/root" {
			return m.nodeOfRoot()
		}
		return "", fmt.Errorf("no such link, and nothing here to make it: use PARTUUID=, PARTLABEL= or the node's own name")
	case strings.HasPrefix(name, "PARTUUID="), strings.HasPrefix(name, "PARTLABEL="):
		return m.findPartition(name)
	case strings.HasPrefix(strings.TrimPrefix(name, "/dev/"), "ubi"):
		return m.resolveUBI(strings.TrimPrefix(name, "/dev/"))
	case inDev(name):
		return m.path(name), nil
	}
	return name, nil
}

// unescapeUdev undoes the \x20 form in which udev writes blanks and slashes into names.
func unescapeUdev(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if n, err := strconv.ParseUint(s[min(i+2, len(s)):min(i+4, len(s))], 16, 8); s[i] == '\\' && strings.HasPrefix(s[i:], `\x`) && err == nil {
			b.WriteByte(byte(n))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// resolveUBI takes ubi0_1, and ubi0:name or ubi:name (of device 0) as the kernel's root= has
// it. A ubiblock device is the read-only view of the volume of its numbers.
func (m *machine) resolveUBI(name string) (string, error) {
	dev, vol, ok := strings.Cut(name, ":")
	if !ok {
		return m.path("/dev/" + strings.Replace(name, "ubiblock", "ubi", 1)), nil
	}
	if dev == "ubi" {
		dev = "ubi0"
	}
	dirs, _ := filepath.Glob(m.path("/sys/class/ubi/" + dev + "_*"))
	for _, d := range dirs {
		if got, err := os.ReadFile(filepath.Join(d, "name")); err == nil && strings.TrimSpace(string(got)) == vol {
			return m.path("/dev/" + filepath.Base(d)), nil
		}
	}
	return "", fmt.Errorf("no UBI volume %q on %s", vol, dev)
}

// findPartition looks for "PARTUUID=…" or "PARTLABEL=…" among all block devices: first in
// the uevent file (PARTNAME; PARTUUID since Linux 6.11), then in the disk's table.
func (m *machine) findPartition(tag string) (string, error) {
	kind, want, _ := strings.Cut(tag, "=")
	dirs, err := os.ReadDir(m.path("/sys/class/block"))
	if err != nil {
		return "", fmt.Errorf("looking for %s: %w", tag, err)
	}
	var found []string
	for _, d := range dirs {
		ue := m.uevent("/sys/class/block/" + d.Name())
		if ue["DEVTYPE"] != "partition" {
			continue
		}
		uuid, label := ue["PARTUUID"], ue["PARTNAME"]
		if uuid == "" && kind == "PARTUUID" {
			uuid, label = m.partitionIDs(d.Name())
		}
		if kind == "PARTUUID" && strings.EqualFold(uuid, want) || kind == "PARTLABEL" && label == want {
			found = append(found, m.path("/dev/"+ue["DEVNAME"]))
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("no partition has %s", tag)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%s is ambiguous: %s", tag, strings.Join(found, ", "))
}

// uevent reads the NAME=value lines of a device's directory in sysfs.
func (m *machine) uevent(dir string) map[string]string {
	text, err := os.ReadFile(m.path(dir + "/uevent"))
	if err != nil {
		return nil
	}
	vars := map[string]string{}
	for line := range strings.SplitSeq(string(text), "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			vars[k] = v
		}
	}
	return vars
}

// partitionIDs reads UUID and label of a partition from the table of the disk it is on.
func (m *machine) partitionIDs(name string) (uuid, label string) {
	dir, err := filepath.EvalSymlinks(m.path("/sys/class/block/" + name))
	if err != nil {
		return "", ""
	}
	num := m.sysInt(filepath.Join(dir, "partition"))
	disk := filepath.Dir(dir)
	sector := m.sysInt(filepath.Join(disk, "queue/logical_block_size"))
	st, err := m.open(m.path("/dev/"+filepath.Base(disk)), openRead)
	if err != nil {
		return "", ""
	}
	defer st.Close()
	return readPartitionIDs(st, num, int64(sector))
}

func (m *machine) sysInt(path string) int {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return n
}

// readPartitionIDs knows GPT (UEFI 2.10, 5.3) and MBR disk signatures, from which the
// kernel makes SSSSSSSS-PP (block/partitions/msdos.c).
func readPartitionIDs(st storage, num int, sector int64) (uuid, label string) {
	if sector < 512 || sector > 65536 || num < 1 {
		return "", ""
	}
	head := make([]byte, 512)
	if _, err := st.ReadAt(head, sector); err != nil || string(head[:8]) != "EFI PART" {
		if _, err := st.ReadAt(head, 0); err == nil && head[510] == 0x55 && head[511] == 0xaa {
			return fmt.Sprintf("%08x-%02x", binary.LittleEndian.Uint32(head[440:]), num), ""
		}
		return "", ""
	}
	first := int64(binary.LittleEndian.Uint64(head[72:]))
	count, size := binary.LittleEndian.Uint32(head[80:]), binary.LittleEndian.Uint32(head[84:])
	if uint32(num) > count || size < 128 || size > 4096 || first < 2 || first > 1<<40 {
		return "", ""
	}
	e := make([]byte, 128)
	if _, err := st.ReadAt(e, first*sector+int64(num-1)*int64(size)); err != nil {
		return "", ""
	}
	le, g := binary.LittleEndian, e[16:32]
	uuid = fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(g), le.Uint16(g[4:]), le.Uint16(g[6:]), g[8:10], g[10:16])
	var u16 []uint16
	for b := e[56:128]; len(b) > 0 && (b[0] != 0 || b[1] != 0); b = b[2:] {
		u16 = append(u16, le.Uint16(b))
	}
	return uuid, string(utf16.Decode(u16))
}

// mount is a line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
type mount struct{ dev, point, fstype, source string }

func (m *machine) mounts() ([]mount, error) {
	text, err := os.ReadFile(m.path("/proc/self/mountinfo"))
	if err != nil {
		return nil, err
	}
	var all []mount
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		before, after, ok := strings.Cut(string(line), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if ok && len(f) >= 5 && len(g) >= 2 {
			all = append(all, mount{dev: f[2], point: f[4], fstype: g[0], source: g[1]})
		}
	}
	return all, nil
}

// rootMount is the mount that / is now: the last line for it, as later ones cover earlier.
func (m *machine) rootMount() (mount, error) {
	all, err := m.mounts()
	if err != nil {
		return mount{}, err
	}
	var root mount
	for _, x := range all {
		if x.point == "/" {
			root = x
		}
	}
	if root.dev == "" {
		return mount{}, errors.New("no line for / in /proc/self/mountinfo")
	}
	return root, nil
}

// nodeOfRoot is the device node of the mounted root, for a configuration that says /dev/root.
func (m *machine) nodeOfRoot() (string, error) {
	r, err := m.rootMount()
	if err != nil {
		return "", err
	}
	name := m.uevent("/sys/dev/block/" + r.dev)["DEVNAME"]
	if name == "" {
		return "", fmt.Errorf("the mounted root is on %s (%s), which is no block device", r.source, r.dev)
	}
	return m.path("/dev/" + name), nil
}

// deviceNumber of a block or character device node as "major:minor"; "" for anything else.
func deviceNumber(path string) string {
	st, err := os.Stat(path)
	if err != nil || st.Mode()&os.ModeDevice == 0 {
		return ""
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	dev := uint64(sys.Rdev)
	// makedev(3): glibc and the kernel's new encoding.
	return fmt.Sprintf("%d:%d", dev>>8&0xfff|dev>>32&^0xfff, dev&0xff|dev>>12&0xffffff00)
}

// is tells whether the device of a mount or of root= is this slot.
func (s *slot) is(m *machine, x mount) bool {
	if s.ubi {
		src, err := m.resolveDevice(x.source)
		return err == nil && src == s.path
	}
	num := deviceNumber(s.path)
	if strings.HasPrefix(x.dev, "0:") { // btrfs has a device number of its own
		return num != "" && num == deviceNumber(m.path(x.source))
	}
	return num != "" && num == x.dev
}

// ramRoot are the file systems of a system that runs from memory: an initramfs, a recovery
// system, a live system. None of the two slots is then the running one.
var ramRoot = map[string]bool{"rootfs": true, "tmpfs": true, "ramfs": true, "overlay": true}

// findRunning puts the three sources together. Mounted root and boot environment must
// agree; root= of the command line speaks where the mounted root is neither slot.
func (s *slots) findRunning(m *machine, env map[string]string) error {
	byEnv := s.byNum(env["mender_boot_part"])
	s.why = append(s.why, fmt.Sprintf("boot environment: mender_boot_part=%s is %s", env["mender_boot_part"], nameOf(byEnv)))
	switch strings.ToLower(m.running) {
	case "a", "b":
		s.running = map[string]*slot{"a": s.a, "b": s.b}[strings.ToLower(m.running)]
		s.why = append(s.why, "--running says "+nameOf(s.running))
		return nil
	case "none":
		s.why = append(s.why, "--running says that neither runs")
		return nil
	}
	root, err := m.rootMount()
	if err != nil {
		return refuse("which slot runs: %w", err)
	}
	byRoot, byCmd := s.match(m, root), s.fromCmdline(m)
	s.why = append(s.why, fmt.Sprintf("mounted root: %s (%s, %s) is %s", root.source, root.dev, root.fstype, nameOf(byRoot)),
		fmt.Sprintf("kernel command line: %s is %s", m.rootArg(), nameOf(byCmd)))
	switch {
	case byRoot != nil:
		s.running = byRoot
	case ramRoot[root.fstype]:
		return nil
	case byCmd != nil:
		s.running = byCmd
	default:
		return withHint(refuse("which slot runs: the mounted root is neither RootfsPartA nor RootfsPartB (%s)", strings.Join(s.why, "; ")),
			"set RootfsPartA and RootfsPartB to the two root partitions, or say --running A, B or none")
	}
	return nil
}

func nameOf(s *slot) string {
	if s == nil {
		return "neither slot"
	}
	return "slot " + s.String()
}

func (s *slots) match(m *machine, x mount) *slot {
	for _, one := range []*slot{s.a, s.b} {
		if one.is(m, x) {
			return one
		}
	}
	return nil
}

// rootArg is the last root= of the kernel command line, as the kernel takes it.
func (m *machine) rootArg() string {
	text, _ := os.ReadFile(m.path("/proc/cmdline"))
	arg := "root= not given"
	for _, w := range strings.Fields(string(text)) {
		if strings.HasPrefix(w, "root=") {
			arg = w
		}
	}
	return arg
}

func (s *slots) fromCmdline(m *machine) *slot {
	name, ok := strings.CutPrefix(m.rootArg(), "root=")
	if !ok {
		return nil
	}
	path, err := m.resolveDevice(name)
	if err != nil {
		return nil
	}
	for _, one := range []*slot{s.a, s.b} {
		if num := deviceNumber(path); one.path == path || num != "" && num == deviceNumber(one.path) {
			return one
		}
	}
	return nil
}

// agree refuses when the boot environment names another slot than the one that runs. That
// is right only between the flip and the boot that follows, which callers know about.
func (s *slots) agree(env map[string]string) error {
	byEnv := s.byNum(env["mender_boot_part"])
	if byEnv == nil {
		return withHint(refuse("mender_boot_part=%q in the boot environment is the number of neither slot: it is %d for %s, %d for %s", env["mender_boot_part"], s.a.num, s.a, s.b.num, s.b),
			"the bootloader may lack the Mender integration, or its environment is another device's")
	}
	if s.running != nil && s.running != byEnv {
		return withHint(refuse("the slot that runs and the boot environment do not agree (%s)", strings.Join(s.why, "; ")),
			"reboot if a rollback or an install is waiting for it; else set mender_boot_part to the slot that runs")
	}
	return nil
}

// inDev tells names where only device nodes belong.
func inDev(name string) bool {
	return strings.HasPrefix(name, "/dev/") && !strings.HasPrefix(name, "/dev/shm/")
}

// checkTarget refuses a slot that must not be written, before anything is: it exists, is
// neither mounted nor claimed, can be written and, in a device file system, is a device.
func (m *machine) checkTarget(t *slot) error {
	st, err := os.Stat(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return refuse("slot %s does not exist", t)
	}
	if err != nil {
		return refuse("slot %s: %w", t, err)
	}
	if st.Mode().IsRegular() && !inDev(strings.TrimPrefix(t.path, m.root)) {
		return nil
	}
	if st.Mode()&os.ModeDevice == 0 {
		return withHint(refuse("slot %s is not a device", t),
			"a program may have made a file where the device node should be; remove it and look for the node")
	}
	if char := st.Mode()&os.ModeCharDevice != 0; char != t.ubi {
		return refuse("slot %s: want a block device or a UBI volume", t)
	}
	mounts, err := m.mounts()
	if err != nil {
		return refuse("slot %s: %w", t, err)
	}
	for _, x := range mounts {
		if t.is(m, x) {
			return withHint(refuse("slot %s is mounted on %q", t, x.point), "unmount it; a slot is never written while it is in use")
		}
	}
	if !t.ubi && m.sysInt(m.path("/sys/dev/block/"+deviceNumber(t.path)+"/ro")) == 1 {
		return refuse("slot %s is read-only", t)
	}
	return nil
}

// ubiCapacity is the size of a volume in bytes, from sysfs.
func (m *machine) ubiCapacity(name string) int64 {
	dir := m.path("/sys/class/ubi/" + name)
	return int64(m.sysInt(dir+"/reserved_ebs")) * int64(m.sysInt(dir+"/usable_eb_size"))
}

// bootID is a number that the kernel makes up at each boot (random(4)); "" if unknown.
func (m *machine) bootID() string {
	id, _ := os.ReadFile(m.path("/proc/sys/kernel/random/boot_id"))
	return strings.TrimSpace(string(id))
}
