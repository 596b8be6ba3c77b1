// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf16"
)

// machine is the computer that the program runs on, as far as tests put another in its place.
type machine struct {
	root    string // before /proc, /sys and /dev; "" is the real one
	running string // --running: A, B, none, or "" to find out
	open    func(path string, how openMode) (storage, error)
	sleep   sleeper
}

// newMachine is the real one.
func newMachine(running string) *machine {
	return &machine{running: running, open: openStorage, sleep: sleepContext}
}

//go:noinline
func (m *machine) path(name string) string { return m.root + name }

// read reads a file of procfs or sysfs; nil for one that is not there. An error is one that may
// pass: what it would have said is not known then.
func (m *machine) read(name string) ([]byte, error) {
	text, err := readPlain(m.path(name))
	if mayPass(err) {
		return nil, tryLater("%w", err)
	}
	if err != nil {
		return nil, nil
	}
	return text, nil
}

// list gives the names in a folder of sysfs; none for one that is not there. Errors are as with read.
func (m *machine) list(name string) ([]string, error) {
	names, err := namesIn(m.path(name))
	if mayPass(err) {
		return nil, tryLater("%w", err)
	}
	return names, nil
}

// number reads a file of sysfs with a number in it; 0 for none.
func (m *machine) number(name string) (int, error) {
	text, err := m.read(name)
	if err != nil {
		return 0, err
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return n, nil
}

// numberBehind gives the number behind a mark in a file of procfs, less its dot.
func (m *machine) numberBehind(name, mark string) (int, error) {
	text, err := m.read(name)
	_, after, _ := strings.Cut(string(text), mark)
	digits := before(strings.TrimLeft(after, " "), " ")
	n, nerr := strconv.Atoi(strings.Replace(digits, ".", "", 1))
	return n, cmp.Or(err, nerr)
}

// process gives the number of a process of this name; of a service, also of one in its unit's control group, or with
// the number in its file under /run. "": there is none.
func (m *machine) process(name string, service bool) (string, error) {
	name = strings.TrimSuffix(name, ".service")
	file, _ := m.read("/run/" + name + ".pid")
	pid, short := strings.TrimSpace(string(file)), " ("+name[:min(len(name), 15)]
	all, err := m.list("/proc")
	for _, p := range all {
		stat, _ := m.read("/proc/" + p + "/stat") // proc_pid_stat(5): PID (NAME) STATE
		i := bytes.LastIndexByte(stat, ')')
		if i < 0 || bytes.HasPrefix(stat[i:], []byte(") Z")) {
			continue
		}
		found := string(stat[:i]) == p+short
		if service && !found {
			unit, _ := m.read("/proc/" + p + "/cgroup")
			found = pid == p || strings.Contains(string(unit), "/"+name+".service")
		}
		if found {
			return p, nil
		}
	}
	return "", err
}

// wear is how much of the life of an eMMC is used up, in steps of 10 %; of a disk or partition by its number, 0 for
// one that does not say.
func (m *machine) wear(number string) (percent int) {
	for _, at := range []string{"/", "/../"} { // of a disk, of a partition
		// Two types of memory, each 0x01 for up to 10 % of its life, to 0x0b for more than all (JESD84-B51, 7.4.58).
		life, _ := m.read("/sys/dev/block/" + number + at + "device/life_time")
		for _, w := range strings.Fields(string(life)) {
			n, _ := strconv.ParseUint(w, 0, 8)
			percent = max(percent, 10*int(n))
		}
	}
	return percent
}

// uevent reads the NAME=value lines of a device's directory in sysfs.
func (m *machine) uevent(dir string) (map[string]string, error) {
	text, err := m.read(dir + "/uevent")
	vars := map[string]string{}
	for _, line := range strings.Split(string(text), "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			vars[k] = v
		}
	}
	return vars, err
}

// bootID is a number that the kernel makes up at each boot (random(4)); "" if unknown.
func (m *machine) bootID() string {
	id, _ := m.read("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}

// ubiCapacity is the size of a volume in bytes, from sysfs.
func (m *machine) ubiCapacity(name string) (int64, error) {
	blocks, err := m.number("/sys/class/ubi/" + name + "/reserved_ebs")
	if err != nil {
		return 0, err
	}
	size, err := m.number("/sys/class/ubi/" + name + "/usable_eb_size")
	return int64(blocks) * int64(size), err
}

// inDev tells names where only device nodes belong.
func inDev(name string) bool {
	return strings.HasPrefix(name, "/dev/") && !strings.HasPrefix(name, "/dev/shm/")
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
	return numberText(uint64(sys.Rdev))
}

// numberText splits a device number: makedev(3), glibc and the kernel's new encoding.
func numberText(dev uint64) string {
	return fmt.Sprintf("%d:%d", dev>>8&0xfff|dev>>32&^0xfff, dev&0xff|dev>>12&0xffffff00)
}

// resolveDevice finds the node for one of the forms of a root= or RootfsPart value. Names
// by partition UUID or label are looked up in sysfs and in the partition table itself, so
// that neither udev nor findfs is needed, and so that a second disk with the same table is
// noticed. Other links are kept as they are: a device-mapper name is stable where the dm-N that
// it leads to is not.
func (m *machine) resolveDevice(name string) (string, error) {
	for _, p := range []struct{ prefix, tag string }{
		{"/dev/disk/by-partuuid/", "PARTUUID="}, {"/dev/disk/by-partlabel/", "PARTLABEL="},
	} {
		if v, ok := strings.CutPrefix(name, p.prefix); ok {
			return m.resolveLink(name, p.tag+unescapeUdev(v))
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

// errNoPartition: nothing has the UUID or label that was looked for.
var errNoPartition = errors.New("no partition has it")

// resolveLink takes what the look-up finds that is made for the tag, and the link itself only where
// that knows nothing of it.
func (m *machine) resolveLink(link, tag string) (string, error) {
	to, lerr := filepath.EvalSymlinks(m.path(link))
	path, err := m.findPartition(tag)
	switch {
	case lerr != nil:
		return path, err
	case errors.Is(err, errNoPartition):
		return to, nil
	case err == nil && path != to:
		return "", fmt.Errorf("it leads to %q, but the partition with %s is %q", to, tag, path)
	}
	return path, err
}

// unescapeUdev undoes the \x20 form in which udev writes blanks and slashes into names.
func unescapeUdev(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if n, err := strconv.ParseUint(s[min(i+2, len(s)):min(i+4, len(s))], 16, 8); s[i] == '\\' &&
			strings.HasPrefix(s[i:], `\x`) && err == nil {
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
	names, err := m.list("/sys/class/ubi")
	if err != nil {
		return "", err
	}
	for _, n := range names {
		if !strings.HasPrefix(n, dev+"_") {
			continue
		}
		got, err := m.read("/sys/class/ubi/" + n + "/name")
		if err != nil {
			return "", err
		}
		if strings.TrimSpace(string(got)) == vol {
			return m.path("/dev/" + n), nil
		}
	}
	return "", fmt.Errorf("no UBI volume %q on %s", vol, dev)
}

// findPartition looks for "PARTUUID=…" or "PARTLABEL=…" among all block devices: first in
// the uevent file (PARTNAME; PARTUUID since Linux 6.11), then in the disk's table.
func (m *machine) findPartition(tag string) (string, error) {
	kind, want, _ := strings.Cut(tag, "=")
	if want == "" {
		return "", fmt.Errorf("got %s without a value", tag)
	}
	names, err := m.list("/sys/class/block")
	if err != nil {
		return "", fmt.Errorf("looking for %s: %w", tag, err)
	}
	var found []string
	for _, name := range names {
		ue, err := m.uevent("/sys/class/block/" + name)
		if err == nil && ue["DEVTYPE"] != "partition" {
			continue
		}
		uuid, label := ue["PARTUUID"], ue["PARTNAME"]
		if err == nil && uuid == "" && kind == "PARTUUID" {
			uuid, label, err = m.partitionIDs(name)
		}
		if err != nil {
			return "", fmt.Errorf("looking for %s: %w", tag, err)
		}
		if kind == "PARTUUID" && strings.EqualFold(uuid, want) || kind == "PARTLABEL" && label == want {
			found = append(found, m.path("/dev/"+ue["DEVNAME"]))
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("looking for %s: %w", tag, errNoPartition)
	case 1:
		return found[0], nil
	}
	return "", withHint(refuse("%s is ambiguous: %s", tag, strings.Join(found, ", ")),
		"take the copy of the disk away, or use the name of a node")
}

// partitionIDs reads UUID and label of a partition from the table of the disk it is on.
func (m *machine) partitionIDs(name string) (uuid, label string, err error) {
	dir, err := filepath.EvalSymlinks(m.path("/sys/class/block/" + name))
	if err != nil {
		return "", "", nil
	}
	dir = strings.TrimPrefix(dir, m.root)
	disk := filepath.Dir(dir)
	num, err := m.number(filepath.Join(dir, "partition"))
	if err != nil {
		return "", "", err
	}
	sector, err := m.number(filepath.Join(disk, "queue/logical_block_size"))
	if err != nil {
		return "", "", err
	}
	st, err := m.open(m.path("/dev/"+filepath.Base(disk)), openRead)
	switch {
	case mayPass(err):
		return "", "", tryLater("%w", err)
	case err != nil:
		return "", "", nil
	}
	defer st.Close()
	if uuid, label, err = readPartitionIDs(st, num, int64(sector)); err != nil {
		err = tryLater("partition table of %q: %w", filepath.Base(disk), err)
	}
	return uuid, label, err
}

// readPartitionIDs knows GPT (UEFI 2.10, 5.3) and MBR disk signatures, from which the
// kernel makes SSSSSSSS-PP (block/partitions/msdos.c). No table gives empty strings; an error is
// one of the medium.
func readPartitionIDs(st storage, num int, sector int64) (uuid, label string, err error) {
	if sector < 512 || sector > 65536 || num < 1 {
		return "", "", nil
	}
	read := func(p []byte, off int64) bool {
		if err == nil {
			if _, err = st.ReadAt(p, off); err == io.EOF {
				clear(p)
				err = nil
			}
		}
		return err == nil
	}
	head := make([]byte, 512)
	if !read(head, sector) {
		return "", "", err
	}
	if string(head[:8]) != "EFI PART" {
		if read(head, 0) && head[510] == 0x55 && head[511] == 0xaa {
			return fmt.Sprintf("%08x-%02x", binary.LittleEndian.Uint32(head[440:]), num), "", nil
		}
		return "", "", err
	}
	first := int64(binary.LittleEndian.Uint64(head[72:]))
	count, size := binary.LittleEndian.Uint32(head[80:]), binary.LittleEndian.Uint32(head[84:])
	if uint32(num) > count || size < 128 || size > 4096 || first < 2 || first > 1<<40 {
		return "", "", nil
	}
	e := make([]byte, 128)
	if !read(e, first*sector+int64(num-1)*int64(size)) || len(strings.Trim(string(e), "\x00")) == 0 {
		return "", "", err
	}
	le, g := binary.LittleEndian, e[16:32]
	uuid = fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(g), le.Uint16(g[4:]), le.Uint16(g[6:]), g[8:10], g[10:16])
	var u16 []uint16
	for b := e[56:128]; len(b) > 0 && (b[0] != 0 || b[1] != 0); b = b[2:] {
		u16 = append(u16, le.Uint16(b))
	}
	return uuid, string(utf16.Decode(u16)), nil
}

// mount is a line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
type mount struct {
	dev     string // number, major:minor; major 0: of no device
	point   string
	fstype  string
	source  string
	options []string // of the file system
}

func (x mount) String() string { return fmt.Sprintf("%s (%s, %s)", x.source, x.dev, x.fstype) }

// ramRoot are the file systems that are in memory: of an initramfs, a recovery system, a live
// system.
var ramRoot = map[string]bool{"rootfs": true, "tmpfs": true, "ramfs": true}

// netRoot are those that are on another machine, whatever root= says.
var netRoot = map[string]bool{"nfs": true, "nfs4": true, "cifs": true, "smb3": true, "ceph": true}

// unescapeMount undoes the \040 form in which the kernel writes blanks, tabs, line feeds and backslashes.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if n, err := strconv.ParseUint(s[min(i+1, len(s)):min(i+4, len(s))], 8, 8); s[i] == '\\' && i+4 <= len(s) &&
			err == nil {
			b.WriteByte(byte(n))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func (m *machine) mounts() ([]mount, error) {
	text, err := m.read("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	if text == nil {
		return nil, refuse("%q is not there: mount procfs", m.path("/proc/self/mountinfo"))
	}
	var all []mount
	for _, line := range strings.Split(string(text), "\n") {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(g) < 2 {
			continue
		}
		x := mount{dev: f[2], point: unescapeMount(f[4]), fstype: g[0], source: unescapeMount(g[1])}
		if len(g) > 2 {
			x.options = strings.Split(g[2], ",")
		}
		all = append(all, x)
	}
	return all, nil
}

// rootMount is the mount that / is now: the last line for it, as later ones cover earlier.
func (m *machine) rootMount() (mount, error) {
	all, err := m.mounts()
	if err != nil {
		return mount{}, err
	}
	root := mountOf(all, "/")
	if root == nil {
		return mount{}, refuse("no line for / in /proc/self/mountinfo")
	}
	return *root, nil
}

// nodeOfRoot is the device node of the mounted root, for a configuration that says /dev/root.
func (m *machine) nodeOfRoot() (string, error) {
	r, err := m.rootMount()
	if err != nil {
		return "", err
	}
	node, err := m.nodeOf(r.dev)
	if err != nil {
		err = fmt.Errorf("the mounted root is on %s: %w", r.source, err)
	}
	return node, err
}

// nodeOf is the node of the block device with this number (devtmpfs has the names that the kernel tells).
func (m *machine) nodeOf(number string) (string, error) {
	ue, err := m.uevent("/sys/dev/block/" + number)
	if err == nil && ue["DEVNAME"] == "" {
		err = fmt.Errorf("no block device has the number %s", number)
	}
	return m.path("/dev/" + ue["DEVNAME"]), err
}

// mountOf is the mount that a path lies on: the one with the longest point, of several the last.
func mountOf(all []mount, path string) *mount {
	var on *mount
	for i, x := range all {
		within := x.point == "/" || path == x.point || strings.HasPrefix(path, x.point+"/")
		if within && (on == nil || len(x.point) >= len(on.point)) {
			on = &all[i]
		}
	}
	return on
}

// option gives the values of an option of the mount.
func (x mount) option(name string) (values []string) {
	for _, o := range x.options {
		if v, ok := strings.CutPrefix(o, name+"="); ok {
			values = append(values, unescapeMount(v))
		}
	}
	return values
}

// rootArg is the value of the last root= of the kernel command line, as the kernel takes it; "" for
// none.
func (m *machine) rootArg() (string, error) {
	text, err := m.read("/proc/cmdline")
	arg := ""
	for _, w := range strings.Fields(string(text)) {
		if v, ok := strings.CutPrefix(w, "root="); ok {
			arg = v
		}
	}
	return arg, err
}

// rootDevice gives the node that root= names, or the number of the device where it has that form, as
// 179:2 or in hexadecimal as b302 (Linux, block/early-lookup.c).
func (m *machine) rootDevice(arg string) (node, number string, err error) {
	major, minor, ok := strings.Cut(arg, ":")
	if _, err1 := strconv.ParseUint(major, 10, 20); ok && err1 == nil {
		if _, err2 := strconv.ParseUint(minor, 10, 20); err2 == nil {
			return "", arg, nil
		}
	}
	if n, err := strconv.ParseUint(arg, 16, 32); err == nil {
		return "", numberText(n), nil
	}
	node, err = m.resolveDevice(arg)
	return node, deviceNumber(node), err
}

// firstPIDs is the PID namespace of the machine itself (PROC_PID_INIT_INO of linux/proc_ns.h). In
// another one reboot(2) ends that alone (pid_namespaces(7)), and the file systems are not only ours.
const firstPIDs = "pid:[4026531836]"

// quiesce does what reboot(2) does not: what is not on the medium would be lost.
func (m *machine) quiesce(lg *logger) {
	syscall.Sync()
	if ns, _ := os.Readlink("/proc/self/ns/pid"); ns != firstPIDs {
		return
	}
	all, err := m.mounts()
	if err != nil {
		lg.warnf("%v", err)
	}
	busy := readOnly(all, func(point string) error {
		return syscall.Mount("", point, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
	})
	if len(busy) == 0 {
		return
	}
	lg.warnf("open for writing: %q", busy)
	// Emergency remount: open files do not keep a file system from it. It works behind our back, hence
	// the second (Documentation/admin-guide/sysrq.rst).
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0); err == nil {
		time.Sleep(time.Second)
	}
	syscall.Sync()
}

// readOnly calls remount for each file system on a device, those mounted last first, and gives the places
// for which it failed.
func readOnly(all []mount, remount func(point string) error) (failed []string) {
	seen := map[string]bool{}
	for _, x := range slices.Backward(all) {
		device := strings.HasPrefix(x.source, "/dev/") || strings.HasPrefix(x.source, "ubi") ||
			!strings.HasPrefix(x.dev, "0:")
		if !device || x.fstype == "devtmpfs" || seen[x.dev] || listed(x.options, "ro") {
			continue
		}
		seen[x.dev] = true
		if remount(x.point) != nil {
			failed = append(failed, x.point)
		}
	}
	return failed
}
