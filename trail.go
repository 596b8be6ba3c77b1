// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path/filepath"
	"strings"
)

// lowerDirs are the layers below an overlay (Linux, Documentation/filesystems/overlayfs.rst):
// lowerdir=A:B, with \: for a colon in a name, or lowerdir+=A for each since 6.5.
func (x mount) lowerDirs() []string {
	dirs := append(x.option("lowerdir+"), x.option("datadir+")...)
	for _, v := range x.option("lowerdir") {
		for _, d := range strings.Split(strings.ReplaceAll(v, `\:`, "\x00"), ":") {
			if d != "" { // "::" is before layers of data only
				dirs = append(dirs, strings.ReplaceAll(d, "\x00", ":"))
			}
		}
	}
	return dirs
}

// trail is what a mount or device rests on, layer by layer, as far as it can be followed: through
// overlays, device mapper (crypt, verity, LVM), RAID and loop devices.
type trail struct {
	devs  []string // numbers of block devices, and nodes of UBI volumes
	files []string // behind loop devices
	disks []string // names of whole disks that it ends on
	ends  []string // other ends: memory, other machines
	lost  []string // where it could not be followed
}

// follow finds out what a mount rests on. An error is one that may pass.
//
//go:noinline
func (m *machine) follow(x mount, all []mount) (*trail, error) {
	t := &trail{}
	return t, t.mount(m, x, all)
}

func (t *trail) mount(m *machine, x mount, all []mount) error {
	switch {
	case ramRoot[x.fstype]:
		t.ends = append(t.ends, "memory")
	case netRoot[x.fstype]:
		t.ends = append(t.ends, x.source)
	case x.fstype == "overlay":
		return t.overlay(m, x, all)
	case x.fstype == "ubifs":
		node, err := m.resolveDevice(x.source)
		if err != nil {
			t.lost = append(t.lost, x.source)
			if exitCode(err) == exitTempFail {
				return err
			}
			return nil
		}
		t.devs = append(t.devs, node)
	case strings.HasPrefix(x.dev, "0:"): // btrfs has a device number of its own
		num := deviceNumber(m.path(x.source))
		if num == "" {
			t.lost = append(t.lost, x.source)
			return nil
		}
		return t.device(m, num, all)
	default:
		return t.device(m, x.dev, all)
	}
	return nil
}

// overlay follows the layers below. Their paths are those of the time of mounting: an initramfs has
// often moved them away since, and what is under the name now may be another thing. So only a layer
// that is all of a file system is believed.
func (t *trail) overlay(m *machine, x mount, all []mount) error {
	dirs := x.lowerDirs()
	if len(dirs) == 0 {
		t.lost = append(t.lost, "the layers of "+x.point)
	}
	for _, dir := range dirs {
		below := mountOf(all, dir)
		if below == nil || below.fstype == "overlay" || below.point != dir {
			t.lost = append(t.lost, "lowerdir="+dir)
			continue
		}
		if err := t.mount(m, *below, all); err != nil {
			return err
		}
	}
	return nil
}

// device follows a block device by its number.
func (t *trail) device(m *machine, num string, all []mount) error {
	if listed(t.devs, num) {
		return nil
	}
	t.devs = append(t.devs, num)
	dir := "/sys/dev/block/" + num
	ue, err := m.uevent(dir)
	name := ue["DEVNAME"]
	switch {
	case err != nil:
		return err
	case strings.HasPrefix(num, "1:"), strings.HasPrefix(name, "zram"): // Linux, Documentation/admin-guide/devices.txt
		t.ends = append(t.ends, "memory")
		return nil
	case name == "":
		t.lost = append(t.lost, num)
		return nil
	case strings.HasPrefix(name, "ubiblock"):
		node, err := m.resolveUBI(name)
		t.devs = append(t.devs, node)
		return err
	case ue["DEVTYPE"] == "partition":
		real, err := filepath.EvalSymlinks(m.path(dir))
		if err != nil {
			t.lost = append(t.lost, num)
			return nil
		}
		disk, err := m.read(strings.TrimPrefix(filepath.Dir(real), m.root) + "/dev")
		if err != nil {
			return err
		}
		return t.device(m, strings.TrimSpace(string(disk)), all)
	}
	slaves, err := m.list(dir + "/slaves")
	if err != nil {
		return err
	}
	for _, s := range slaves {
		below, err := m.read(dir + "/slaves/" + s + "/dev")
		if err != nil {
			return err
		}
		if err := t.device(m, strings.TrimSpace(string(below)), all); err != nil {
			return err
		}
	}
	if len(slaves) > 0 {
		return nil
	}
	return t.end(m, dir, name, all)
}

// end is a device with no other below it: a disk, or a loop device with a file below.
func (t *trail) end(m *machine, dir, name string, all []mount) error {
	file, err := m.read(dir + "/loop/backing_file")
	if err != nil {
		return err
	}
	path := strings.TrimRight(string(file), "\n")
	if path == "" {
		t.disks = append(t.disks, name)
		return nil
	}
	t.files = append(t.files, path)
	on := mountOf(all, path)
	if on == nil || on.fstype == "overlay" || listed(t.devs, on.dev) {
		t.lost = append(t.lost, path)
		return nil
	}
	return t.mount(m, *on, all)
}

// forgets says why what is written to a file will not outlive a reboot; "" where nothing speaks for
// that.
func (m *machine) forgets(path string) (string, error) {
	all, err := m.mounts()
	if exitCode(err) == exitTempFail {
		return "", err
	}
	for dir := path; ; dir = filepath.Dir(dir) {
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			path = real
			break
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	x := mountOf(all, path)
	switch {
	case x == nil:
		return "", nil
	case x.fstype == "overlay":
		return m.overlayForgets(*x, all)
	}
	return m.inMemory(*x, all, fmt.Sprintf("%q is in memory (%s)", x.point, x.fstype))
}

// inMemory gives back what to say of a mount if it is in memory.
func (m *machine) inMemory(x mount, all []mount, text string) (string, error) {
	t, err := m.follow(x, all)
	if err != nil || !listed(t.ends, "memory") {
		return "", err
	}
	return text, nil
}

func (m *machine) overlayForgets(x mount, all []mount) (string, error) {
	upper := x.option("upperdir")
	if listed(x.options, "volatile") {
		return fmt.Sprintf("%q is an overlay that was mounted as volatile", x.point), nil
	}
	if len(upper) == 0 {
		return "", nil // read-only
	}
	on := mountOf(all, upper[0])
	if on == nil || on.fstype == "overlay" || on.point == "/" && x.point == "/" {
		return fmt.Sprintf("%q is an overlay, and where its changes go, %q, is not to be seen: perhaps into memory", x.point,
			upper[0]), nil
	}
	return m.inMemory(*on, all, fmt.Sprintf("%q is an overlay whose changes go into memory (%q, %s)", x.point, on.point,
		on.fstype))
}
