// SPDX-License-Identifier: Apache-2.0

package main

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// stack is a machine whose block devices rest on each other: for each number, what sysfs has of it.
type stack map[string]string // "8:2 sda2": "partition of 8:0", "on 8:2 8:3", "file /x"

// fakeStack has the slots /dev/mmcblk0p2 and p3, which are nodes of this machine with numbers of their own.
// In the texts @A and @B stand for these numbers, and a stack may say what else they are.
func fakeStack(t *testing.T, devices stack, mounts, cmdline string) *machine {
	t.Helper()
	n := twoNodes(t)
	abc := strings.NewReplacer("@A", deviceNumber(n[0]), "@B", deviceNumber(n[1]))
	files := map[string]string{"/dev/mmcblk0p2": "->" + n[0], "/dev/mmcblk0p3": "->" + n[1],
		"/proc/cmdline": cmdline + "\n", "/proc/self/mountinfo": otherMounts + abc.Replace(mounts)}
	devices["179:0 mmcblk0"] = ""
	for _, slot := range []string{"@A mmcblk0p2", "@B mmcblk0p3"} {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(devices)), func(k string) bool { return k[:2] == slot[:2] }) {
			devices[slot] = "partition of 179:0"
		}
	}
	for key, what := range devices {
		num, name, _ := strings.Cut(abc.Replace(key), " ")
		dir, kind := "/sys/devices/"+name, "disk"
		if disk, ok := strings.CutPrefix(what, "partition of "); ok {
			for k := range devices {
				if of, parent, _ := strings.Cut(k, " "); of == disk {
					dir, kind = "/sys/devices/"+parent+"/"+name, "partition"
				}
			}
		}
		files["/sys/dev/block/"+num] = "->../.." + strings.TrimPrefix(dir, "/sys")
		files[dir+"/uevent"] = "DEVNAME=" + name + "\nDEVTYPE=" + kind + "\n"
		files[dir+"/dev"] = num + "\n"
		if below, ok := strings.CutPrefix(what, "on "); ok {
			for i, on := range strings.Fields(abc.Replace(below)) {
				files[dir+"/slaves/"+string(rune('a'+i))+"/dev"] = on + "\n"
			}
		}
		if file, ok := strings.CutPrefix(what, "file "); ok {
			files[dir+"/loop/backing_file"] = file + "\n"
		}
	}
	return fakeMachine(t, files)
}

const overlayRoot = "lowerdir=/media/root-ro,upperdir=/media/root-rw/up,workdir=/media/root-rw/work"

// Which slot runs is what the mounted root rests on, through every layer; where that is not to be seen,
// what else speaks for a slot, and nothing against it. Otherwise it is not known, and that is said.
func TestRunningSlotBelow(t *testing.T) {
	t.Parallel()
	dm := mountLine("254:0", "/", "ext4", "/dev/mapper/root")
	lower := func(dev string) string { return mountLine(dev, "/media/root-ro", "ext4", "/dev/x") }
	over := mountLine("0:30", "/", "overlay", "overlayroot", overlayRoot)
	tmp := mountLine("0:29", "/media/root-rw", "tmpfs", "tmpfs")
	for name, c := range map[string]struct {
		devices         stack
		mounts, cmdline string
		want, err       string
	}{
		// device mapper, RAID, LVM
		"dm-crypt":                {stack{"254:0 dm-0": "on @B"}, dm, "root=/dev/mapper/root", "B", ""},
		"dm-crypt, root= differs": {stack{"254:0 dm-0": "on @B"}, dm, "root=/dev/mmcblk0p2", "B", ""},
		"dm-verity on dm-crypt":   {stack{"254:0 dm-0": "on 254:1 254:1", "254:1 dm-1": "on @A"}, dm, "", "A", ""},
		"a mirror of both":        {stack{"254:0 dm-0": "on @A @B"}, dm, "root=/dev/mmcblk0p2", "", "slot A (.+) and slot B"},
		"dm on another disk": {stack{"254:0 dm-0": "on 8:1", "8:1 sda1": "partition of 8:0", "8:0 sda": ""}, dm,
			"root=/dev/mmcblk0p2", "", "is neither slot"},
		"round and round": {stack{"254:0 dm-0": "on 254:1", "254:1 dm-1": "on 254:0"}, dm, "", "", "is neither slot"},
		"no sysfs of it":  {stack{}, dm, "root=/dev/mmcblk0p2", "A", ""},
		// loop devices
		"loop on a slot": {stack{"7:9 loop9": "file /data/root.squashfs"},
			mountLine("7:9", "/", "squashfs", "/dev/loop9") + mountLine("@B", "/data", "ext4", "x"), "", "B", ""},
		"loop on another disk": {stack{"7:9 loop9": "file /data/r", "8:0 sda": ""},
			mountLine("7:9", "/", "squashfs", "x") + mountLine("8:0", "/data", "ext4", "x"), "root=/dev/mmcblk0p2", "",
			"is neither slot"},
		"loop on a file removed": {stack{"7:9 loop9": "file /data/r (deleted)"},
			mountLine("7:9", "/", "squashfs", "x") + mountLine("@B", "/data", "ext4", "x"), "", "B", ""},
		"loop on what is hidden": {stack{"7:9 loop9": "file /r"}, mountLine("7:9", "/", "squashfs", "x"), "", "",
			"not to be seen: /r"},
		"partition of a loop": {stack{"259:1 loop9p1": "partition of 7:9", "7:9 loop9": "file /data/r"},
			mountLine("259:1", "/", "ext4", "x") + mountLine("@A", "/data", "ext4", "x"), "", "A", ""},
		// overlays
		"overlay":                {stack{}, over + lower("@A") + tmp, "root=/dev/mmcblk0p2", "A", ""},
		"overlay, no root=":      {stack{}, over + lower("@B") + tmp, "quiet", "B", ""},
		"overlay on dm-verity":   {stack{"254:0 dm-0": "on @B"}, over + lower("254:0"), "", "B", ""},
		"overlay, against root=": {stack{}, over + lower("@B"), "root=/dev/mmcblk0p2", "", "slot A"},
		"overlay of both": {stack{}, mountLine("0:30", "/", "overlay", "o", `lowerdir=/a:/b`) +
			mountLine("@A", "/a", "ext4", "x") + mountLine("@B", "/b", "ext4", "x"), "", "", "slot A (.+) and slot B"},
		"overlay, each layer by itself": {stack{}, mountLine("0:30", "/", "overlay", "o", `lowerdir+=/a:1\0401`,
			"lowerdir+=/b") + mountLine("@A", `/a:1\0401`, "ext4", "x") + tmp, "", "A", ""},
		"overlay, a colon": {stack{}, mountLine("0:30", "/", "overlay", "o",
			`lowerdir=/a\\:1::/data`) + mountLine("@B", "/a:1", "ext4", "x"), "", "B", ""},
		"overlay, lower moved": {stack{}, over + mountLine("@B", "/rom", "squashfs", "/dev/root"), "", "B", ""},
		"overlay, lower moved, root= same": {stack{}, over + mountLine("@B", "/rom", "squashfs", "/dev/root"),
			"root=/dev/mmcblk0p3", "B", ""},
		"overlay, lower moved, root= not": {stack{}, over + mountLine("@B", "/rom", "squashfs", "/dev/root"),
			"root=/dev/mmcblk0p2", "", "mounted at all: slot B"},
		"overlay, both are mounted": {stack{}, over + mountLine("@B", "/b", "ext4", "x") + mountLine("@A", "/a",
			"ext4", "x"), "", "", "mounted at all: slot B (.+) and slot A"},
		"overlay, both are mounted, root=": {stack{}, over + mountLine("@B", "/b", "ext4", "x") + mountLine("@A", "/a",
			"ext4", "x"), "root=/dev/mmcblk0p3", "B", ""},
		"overlay, lower hidden, root=":     {stack{}, over, "root=/dev/mmcblk0p2", "A", ""},
		"overlay, lower hidden, no root=":  {stack{}, over, "quiet", "", "not to be seen: lowerdir=/media/root-ro"},
		"overlay, lower hidden, root= odd": {stack{}, over, "root=LABEL=x", "", "root=LABEL=x is neither slot"},
		"overlay, something else is there": {stack{}, over + mountLine("@B", "/media", "ext4", "x") + mountLine("@A", "/a",
			"ext4", "x"), "", "", "not to be seen: lowerdir=/media/root-ro"},
		"overlay that is its own lower": {stack{}, mountLine("0:30", "/", "overlay", "o", "lowerdir=/"),
			"root=/dev/mmcblk0p2", "A", ""},
		"overlay on another disk": {stack{"8:1 sda1": "partition of 8:0", "8:0 sda": ""}, over + lower("8:1"),
			"root=/dev/mmcblk0p2", "", "is neither slot"},
		"overlay in memory": {stack{}, over + mountLine("0:31", "/media/root-ro", "tmpfs", "x"),
			"root=/dev/mmcblk0p2", "", ""},
		"overlay, upper in a slot": {stack{}, over + mountLine("@B", "/media/root-rw", "ext4",
			"x") + lower("@A"), "", "A", ""},
		"overlay without its layers' names": {stack{}, mountLine("0:30", "/", "overlay", "o"),
			"root=/dev/mmcblk0p2", "A", ""},
		// others
		"bind mount": {stack{}, strings.Replace(mountLine("@B", "/", "ext4", "/dev/x"), " / / ", " /rootfs / ",
			1), "", "B", ""},
		"NFS": {stack{}, mountLine("0:40", "/", "nfs4", "10.0.0.1:/export"), "root=/dev/nfs", "",
			"10.0.0.1:/export"},
		"NFS, with a stale root=": {stack{}, mountLine("0:40", "/", "nfs", "10.0.0.1:/export"), "root=/dev/mmcblk0p2", "",
			"10.0.0.1:/export"},
		"ramdisk": {stack{"1:0 ram0": ""}, mountLine("1:0", "/", "ext2", "/dev/ram0"),
			"root=/dev/ram0", "", ""},
		"zram": {stack{"252:0 zram0": ""}, mountLine("252:0", "/", "ext4", "/dev/zram0"), "", "", ""},
		"btrfs on dm-crypt": {stack{"254:0 dm-0": "on @B"},
			mountLine("0:23", "/", "btrfs", "/dev/mmcblk0p3"), "", "B", ""},
		"btrfs, source unknown": {stack{}, mountLine("0:23", "/", "btrfs", "none"), "root=/dev/mmcblk0p3", "B", ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := fakeStack(t, c.devices, c.mounts, c.cmdline)
			s, err := findSlots(&config{RootfsPartA: "/dev/mmcblk0p2", RootfsPartB: "/dev/mmcblk0p3"}, m,
				map[string]string{"mender_boot_part": "2"})
			if c.err != "" {
				text := ""
				if err != nil {
					text = err.Error()
				}
				for part := range strings.SplitSeq(c.err, "(.+)") {
					if !strings.Contains(text, part) {
						t.Errorf("got %v, want %q", err, c.err)
					}
				}
				if exitCode(err) != exitRefused || hintOf(err) == "" {
					t.Errorf("exit code %d, hint %q", exitCode(err), hintOf(err))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := s.running; got == nil && c.want != "" || got != nil && got.letter != c.want {
				t.Errorf("got %v, want %q; %q", got, c.want, s.why)
			}
		})
	}
}

// The number of a device in root=, as the kernel takes it.
func TestRootArg(t *testing.T) {
	m := fakeMachine(t, map[string]string{"/proc/cmdline": "root=/dev/sda1 quiet root=b302 x\n"})
	if got, err := m.rootArg(); got != "b302" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	for arg, want := range map[string]string{"b302": "179:2", "179:2": "179:2", "103:00010001": "103:00010001",
		"/dev/gone": "", "a:b": "", "x": ""} {
		if _, got, err := m.rootDevice(arg); got != want || err != nil {
			t.Errorf("%s: got %q, %v, want %q", arg, got, err, want)
		}
	}
}

// In memory, root= does not make a slot the running one, but a commit of the other one is refused.
func TestStartedSlot(t *testing.T) {
	for cmdline, want := range map[string][2]bool{"root=/dev/mmcblk0p2": {true, false},
		"root=/dev/mmcblk0p3": {false, true}, "quiet": {true, true}} {
		m := fakeStack(t, stack{}, mountLine("0:2", "/", "rootfs", "rootfs"), cmdline)
		s, err := findSlots(&config{RootfsPartA: "/dev/mmcblk0p2", RootfsPartB: "/dev/mmcblk0p3"}, m,
			map[string]string{"mender_boot_part": "3", "upgrade_available": "1"})
		if err != nil {
			t.Fatal(err)
		}
		if got := [2]bool{s.mayRun(2), s.mayRun(3)}; s.running != nil || got != want {
			t.Errorf("%s: got %v, running %v, want %v", cmdline, got, s.running, want)
		}
		r := &rootfs{u: &update{From: 2, To: 3}}
		if err := r.isTrial(map[string]string{varBootPart: "3", varUpgrade: "1"}, s); (err == nil) != want[1] ||
			exitCode(err) == exitRefused {
			t.Errorf("%s: commit: got %v", cmdline, err)
		}
	}
}

// Partition numbers mean one disk: slots on two are refused, above all a copy with the same UUIDs.
func TestSlotsOnOneDisk(t *testing.T) {
	root := mountLine("0:2", "/", "rootfs", "rootfs")
	for name, c := range map[string]struct {
		devices stack
		ok      bool
	}{
		"one disk":  {stack{}, true},
		"two disks": {stack{"179:0 mmcblk0": "", "8:0 sda": "", "@B sda3": "partition of 8:0"}, false},
		"volumes of a disk": {stack{"@A dm-0": "on 8:1", "@B dm-1": "on 8:1", "8:1 sda1": "partition of 8:0",
			"8:0 sda": ""}, true},
		"volumes of two": {stack{"@A dm-0": "on 8:1", "@B dm-1": "on 8:17", "8:1 sda1": "partition of 8:0", "8:0 sda": "",
			"8:17 sdb1": "partition of 8:16", "8:16 sdb": ""}, false},
		"a disk not to see": {stack{"@A dm-0": "on 8:1", "@B dm-1": "on 9:1", "8:1 sda1": "partition of 8:0",
			"8:0 sda": ""}, true},
		"loops on one disk": {stack{"@A loop1": "file /a", "@B loop2": "file /b"}, true},
		"volumes in a group": {stack{"@A dm-0": "on 8:1 8:17", "@B dm-1": "on 8:17", "8:1 sda1": "partition of 8:0",
			"8:0 sda": "", "8:17 sdb1": "partition of 8:16", "8:16 sdb": ""}, true},
	} {
		t.Run(name, func(t *testing.T) {
			full := fakeStack(t, c.devices, root, "")
			s, err := findSlots(&config{RootfsPartA: "/dev/mmcblk0p2", RootfsPartB: "/dev/mmcblk0p3"}, full,
				map[string]string{"mender_boot_part": "2"})
			if (err == nil) != c.ok || err != nil && (exitCode(err) != exitRefused ||
				!strings.Contains(err.Error(), "is on disk") || hintOf(err) == "") {
				t.Errorf("got %v, %v", s, err)
			}
			full.running = "A" // whoever says that knows what runs, and no more
			if _, err := findSlots(&config{RootfsPartA: "/dev/mmcblk0p2", RootfsPartB: "/dev/mmcblk0p3"}, full,
				map[string]string{"mender_boot_part": "2"}); (err == nil) != c.ok {
				t.Errorf("--running A: got %v", err)
			}
		})
	}
}

// An error that may pass is one of try later, whatever could not be read: what was not seen speaks for nothing.
func TestMachineUnreadable(t *testing.T) {
	over := mountLine("0:30", "/", "overlay", "o", "lowerdir=/ro")
	find := func(m *machine) error {
		_, err := findSlots(&config{RootfsPartA: "/dev/mmcblk0p2", RootfsPartB: "/dev/mmcblk0p3"}, m,
			map[string]string{"mender_boot_part": "2"})
		return err
	}
	for _, c := range []struct{ mounts, file string }{
		{over, "/proc/self/mountinfo"}, {over, "/proc/cmdline"},
		{mountLine("254:0", "/", "ext4", "x"), "/sys/devices/dm-0/uevent"},
		{mountLine("254:0", "/", "ext4", "x"), "/sys/devices/dm-0/slaves/a/dev"},
		{mountLine("7:9", "/", "ext4", "x"), "/sys/devices/loop9/loop/backing_file"},
		{mountLine("254:0", "/", "ext4", "x"), "/sys/devices/mmcblk0/dev"},
	} {
		m := fakeStack(t, stack{"254:0 dm-0": "on @A", "7:9 loop9": "file /x"}, c.mounts, "root=/dev/mmcblk0p2")
		if err := find(m); err != nil {
			t.Fatal(err)
		}
		// A file that cannot be read as it is: reading /proc/self/mem at 0 is EIO.
		path := m.path(c.file)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/proc/self/mem", path); err != nil {
			t.Fatal(err)
		}
		if err := find(m); exitCode(err) != exitTempFail {
			t.Errorf("%s: got %v", c.file, err)
		}
	}
	// A table that cannot be read may have the same UUID.
	m := fakeMachine(t, map[string]string{
		"/sys/class/block/sda1/uevent": "DEVTYPE=partition\nDEVNAME=sda1\nPARTUUID=aa-01\n",
		"/sys/class/block/sdb1":        "->../../devices/sdb/sdb1",
		"/sys/devices/sdb/sdb1/uevent": "DEVTYPE=partition\nDEVNAME=sdb1\n", "/sys/devices/sdb/sdb1/partition": "1\n",
		"/sys/devices/sdb/queue/logical_block_size": "512\n", "/dev/sdb": "", "/dev/disk/by-partuuid/aa-01": "->../../sda1",
		"/dev/sda1": ""})
	for _, name := range []string{"PARTUUID=aa-01", "/dev/disk/by-partuuid/aa-01"} {
		m.open = openStorage
		if got, err := m.resolveDevice(name); err != nil || got != m.path("/dev/sda1") {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
		for what, open := range map[string]func(string, openMode) (storage, error){
			"opening": func(path string, _ openMode) (storage, error) {
				return nil, &os.PathError{Op: "open", Path: path, Err: syscall.EMFILE}
			},
			"reading": (&unreadDisk{memDisk: &memDisk{data: make([]byte, 4096)}, fails: func(off int64) error {
				if off < 0 {
					return nil
				}
				return syscall.EIO
			}}).open,
		} {
			m.open = open
			if got, err := m.resolveDevice(name); exitCode(err) != exitTempFail {
				t.Errorf("%s, %s: got %q, %v", name, what, got, err)
			}
		}
	}
}

// A link is looked up as the tag that it is made for, and believed only where nobody else has that.
func TestLinksAndTags(t *testing.T) {
	uevent := func(name, uuid string) (string, string) {
		return "/sys/class/block/" + name + "/uevent", "DEVTYPE=partition\nDEVNAME=" + name +
			"\nPARTNAME=root\nPARTUUID=" + uuid + "\n"
	}
	files := map[string]string{"/dev/disk/by-partuuid/aa-02": "->../../sda2",
		"/dev/disk/by-partuuid/cc-02": "->../../sda2",
		"/dev/disk/by-partuuid/dd-02": "->../../sda9", "/dev/disk/by-partlabel/root": "->../../sda2", "/dev/sda2": "",
		"/dev/sdb2": "", "/dev/sda9": ""}
	for name, uuid := range map[string]string{"sda2": "aa-02", "sdb2": "aa-02", "sdc2": "cc-02"} {
		file, text := uevent(name, uuid)
		files[file] = text
	}
	m := fakeMachine(t, files)
	for name, want := range map[string]string{
		"PARTUUID=aa-02": "ambiguous: ", "/dev/disk/by-partuuid/aa-02": "ambiguous: ",
		"/dev/disk/by-partuuid/AA-02": "ambiguous: ",
		"PARTLABEL=root":              "ambiguous: ", "/dev/disk/by-partlabel/root": "ambiguous: ",
		"/dev/disk/by-partuuid/cc-02": `leads to "` + m.path("/dev/sda2") + `", but the partition with PARTUUID=cc-02 is "` +
			m.path("/dev/sdc2") + `"`,
		"/dev/disk/by-partuuid/dd-02": "", // of a kind of table that is not known here
	} {
		got, err := m.resolveDevice(name)
		if want == "" && err == nil && got == m.path("/dev/sda9") {
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
}

// A target that is in use through other layers is refused, too.
func TestTargetInUseBelow(t *testing.T) {
	m := fakeStack(t, stack{"254:0 dm-0": "on @B"}, mountLine("8:1", "/", "ext4", "x")+mountLine("254:0", "/data", "ext4",
		"/dev/mapper/data"), "")
	if err := m.checkTarget(&slot{letter: "B", path: m.path("/dev/mmcblk0p3")}); exitCode(err) != exitRefused ||
		!strings.Contains(err.Error(), `mounted on "/data"`) {
		t.Errorf("got %v", err)
	}
	if err := m.checkTarget(&slot{letter: "A", path: m.path("/dev/mmcblk0p2")}); err != nil {
		t.Errorf("the other: got %v", err)
	}
}

// What does not outlive a reboot: memory, and overlays whose changes go there.
func TestForgets(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "data/ds")
	if err := os.MkdirAll(data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(data, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	disk := mountLine("8:1", "/", "ext4", "x")
	for name, c := range map[string]struct{ mounts, path, want string }{
		"disk": {disk, data + "/mendlet.state", ""},
		"tmpfs": {disk + mountLine("0:30", dir+"/data", "tmpfs", "x"), data + "/mendlet.state",
			"in memory (tmpfs)"},
		"by a link": {disk + mountLine("0:30", dir+"/data", "ramfs", "x"), dir + "/link/mendlet.state",
			"in memory (ramfs)"},
		"not made yet": {disk + mountLine("0:30", dir+"/data", "tmpfs", "x"), data + "/a/b/mendlet.state",
			"in memory (tmpfs)"},
		"beside it": {disk + mountLine("0:30", dir+"/dat", "tmpfs", "x"), data + "/mendlet.state", ""},
		"mounted over": {disk + mountLine("0:30", dir, "tmpfs", "x") + mountLine("8:2", dir+"/data",
			"ext4", "x"), data, ""},
		"ramdisk":   {mountLine("1:0", "/", "ext2", "x"), data, "in memory (ext2)"},
		"initramfs": {mountLine("0:2", "/", "rootfs", "rootfs"), data, "in memory (rootfs)"},
		"overlay in memory": {mountLine("0:30", "/", "overlay", "o", overlayRoot) + mountLine("0:31", "/media/root-rw",
			"tmpfs", "x"), data, "changes go into memory (\"/media/root-rw\", tmpfs)"},
		"overlay on disk": {mountLine("0:30", "/", "overlay", "o", overlayRoot) + mountLine("8:1", "/media/root-rw",
			"ext4", "x"), data, ""},
		"overlay on who knows": {mountLine("0:30", "/", "overlay", "o", overlayRoot), data, "is not to be seen"},
		"overlay, volatile": {mountLine("0:30", "/", "overlay", "o", overlayRoot, "volatile") + mountLine("8:1",
			"/media/root-rw", "ext4", "x"), data, "mounted as volatile"},
		"overlay, read-only": {mountLine("0:30", "/", "overlay", "o", "lowerdir=/a:/b"), data, ""},
		"no mountinfo":       {"", data, ""},
	} {
		files := map[string]string{"/proc/self/mountinfo": c.mounts}
		if c.mounts == "" {
			files = nil
		}
		m := fakeMachine(t, files)
		for _, dev := range []string{"8:1 sda1", "8:2 sda2", "1:0 ram0"} {
			num, node, _ := strings.Cut(dev, " ")
			if err := os.MkdirAll(m.path("/sys/dev/block/"+num), 0o755); err != nil {
				t.Fatal(err)
			}
			writeFile(t, m.path("/sys/dev/block/"+num+"/uevent"), "DEVNAME="+node+"\nDEVTYPE=disk\n")
		}
		got, err := m.forgets(c.path)
		if err != nil || (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, c.want)
		}
	}
}

func TestUnescapeMount(t *testing.T) {
	for in, want := range map[string]string{"": "", "a": "a", `a\040b`: "a b", `\134`: `\`, `\`: `\`, `\04`: `\04`,
		`\999`: `\999`, "ü": "ü", `a\134:b`: `a\:b`} {
		if got := unescapeMount(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
	x := mount{options: []string{"rw", `lowerdir=/a\134:b:/c`, "lowerdir+=/d:e", "datadir+=/f", "upperdir=/u"}}
	if got, want := x.lowerDirs(), []string{"/d:e", "/f", "/a:b", "/c"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
