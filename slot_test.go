// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"
)

// fakeMachine has /proc, /sys and /dev in a temporary directory. files are texts by name;
// one that begins with "->" is a link.
func fakeMachine(t testing.TB, files map[string]string) *machine {
	t.Helper()
	m := &machine{root: t.TempDir(), open: openStorage, sleep: noSleep}
	for name, text := range files {
		path := m.path(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if to, ok := strings.CutPrefix(text, "->"); ok {
			if err := os.Symlink(to, path); err != nil {
				t.Fatal(err)
			}
			continue
		}
		writeFile(t, path, text)
	}
	return m
}

// twoNodes gives the names of two block devices of this machine to link to: their device
// numbers are all that is used. They are not opened.
func twoNodes(t testing.TB) [2]string {
	t.Helper()
	var found []string
	all, _ := filepath.Glob("/dev/*")
	for _, path := range all {
		if st, err := os.Stat(path); err == nil && st.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice {
			found = append(found, path)
		}
	}
	if len(found) < 2 {
		t.Skip("needs two block devices in /dev")
	}
	return [2]string{found[0], found[1]}
}

const otherMounts = "21 20 0:5 / /dev rw - devtmpfs devtmpfs rw\n22 20 0:21 / /proc rw shared:3 - proc proc rw\n"

// mountLine is a line of mountinfo as proc_pid_mountinfo(5) has it, with optional fields.
func mountLine(dev, point, fstype, source string, options ...string) string {
	return fmt.Sprintf("25 1 %s / %s rw,relatime shared:1 master:2 - %s %s %s\n", dev, point, fstype, source,
		strings.Join(append([]string{"rw"}, options...), ","))
}

func TestResolveDevice(t *testing.T) {
	sys := func(name string, vars ...string) (string, string) {
		return "/sys/class/block/" + name + "/uevent", strings.Join(append(vars, "DEVNAME="+name), "\n") + "\n"
	}
	files := map[string]string{
		"/dev/mmcblk0p2": "", "/dev/mmcblk0p3": "",
		"/dev/disk/by-partuuid/11111111-02":  "->../../mmcblk0p2",
		"/dev/disk/by-partlabel/root a":      "->../../mmcblk0p2",
		"/dev/disk/by-label/rootfs":          "->../../mmcblk0p3",
		"/dev/disk/by-path/platform-1-part7": "->../../gone7",
		"/dev/mapper/root-2":                 "->../dm-5",
		"/dev/dm-5":                          "",
		"/sys/class/ubi/ubi0_3/name":         "rootfs-b\n",
		"/sys/class/ubi/ubi1_3/name":         "rootfs-b\n",
		"/proc/self/mountinfo":               otherMounts + mountLine("179:2", "/", "ext4", "/dev/root"),
		"/sys/dev/block/179:2/uevent":        "MAJOR=179\nMINOR=2\nDEVNAME=mmcblk0p2\nDEVTYPE=partition\n",
	}
	for _, u := range [][]string{
		{"mmcblk0", "DEVTYPE=disk"},
		{"mmcblk0p2", "DEVTYPE=partition", "PARTN=2", "PARTNAME=root a", "PARTUUID=aaaaaaaa-0000-1111-2222-0123456789ab"},
		{"mmcblk0p3", "DEVTYPE=partition", "PARTN=3", "PARTNAME=root/b=1", "PARTUUID=bbbbbbbb-0000-1111-2222-0123456789ab"},
		{"sda1", "DEVTYPE=partition", "PARTN=1", "PARTNAME=twice", "PARTUUID=00c0ffee-01"},
		{"sdb1", "DEVTYPE=partition", "PARTN=1", "PARTNAME=twice", "PARTUUID=00c0ffee-02"},
	} {
		name, text := sys(u[0], u[1:]...)
		files[name] = text
	}
	m := fakeMachine(t, files)
	for _, c := range []struct{ name, want, err string }{
		{"/dev/mmcblk0p2", "/dev/mmcblk0p2", ""},
		{"/dev/sda2", "/dev/sda2", ""},
		{"/dev/nvme0n1p2", "/dev/nvme0n1p2", ""},
		{"/dev/disk/by-partuuid/11111111-02", "/dev/mmcblk0p2", ""},
		{"/dev/disk/by-partlabel/root a", "/dev/mmcblk0p2", ""},
		{"/dev/disk/by-label/rootfs", "/dev/mmcblk0p3", ""},
		// No link (no udev): from sysfs.
		{"/dev/disk/by-partuuid/BBBBBBBB-0000-1111-2222-0123456789ab", "/dev/mmcblk0p3", ""},
		{`/dev/disk/by-partlabel/root\x2fb=1`, "/dev/mmcblk0p3", ""},
		{"/dev/disk/by-partuuid/cccccccc-0000-1111-2222-0123456789ab", "",
			"PARTUUID=cccccccc-0000-1111-2222-0123456789ab: no partition has it"},
		{"/dev/disk/by-uuid/1234-5678", "", "use PARTUUID="},
		{"/dev/disk/by-path/platform-1-part7", "", "use PARTUUID="},
		{"PARTUUID=aaaaaaaa-0000-1111-2222-0123456789AB", "/dev/mmcblk0p2", ""},
		{"PARTUUID=00c0ffee-02", "/dev/sdb1", ""},
		{"PARTLABEL=root a", "/dev/mmcblk0p2", ""},
		{"PARTLABEL=ROOT A", "", "no partition has"},
		{"PARTLABEL=twice", "", "ambiguous"},
		{"PARTLABEL=", "", "without a value"},
		{"/dev/root", "/dev/mmcblk0p2", ""},
		// Other links stay as they are: dm-5 may be dm-6 at the next boot.
		{"/dev/mapper/root-2", "/dev/mapper/root-2", ""},
		{"ubi0_1", "/dev/ubi0_1", ""},
		{"/dev/ubi0_1", "/dev/ubi0_1", ""},
		{"ubi0:rootfs-b", "/dev/ubi0_3", ""},
		{"ubi:rootfs-b", "/dev/ubi0_3", ""},
		{"ubi1:rootfs-b", "/dev/ubi1_3", ""},
		{"ubi0:other", "", "no UBI volume"},
		{"/dev/ubiblock0_1", "/dev/ubi0_1", ""},
	} {
		got, err := m.resolveDevice(c.name)
		if want := c.want; err == nil && got != m.path(want) || (err == nil) != (c.err == "") ||
			err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q: got %q, %v; want %q, %q", c.name, strings.TrimPrefix(got, m.root), err, want, c.err)
		}
	}
}

// A link /dev/root of old udev rules goes first.
func TestResolveDevRootLink(t *testing.T) {
	m := fakeMachine(t, map[string]string{"/dev/root": "->mmcblk0p3", "/dev/mmcblk0p3": ""})
	if got, err := m.resolveDevice("/dev/root"); err != nil || got != m.path("/dev/mmcblk0p3") {
		t.Errorf("got %q, %v", got, err)
	}
	m = fakeMachine(t, map[string]string{"/proc/self/mountinfo": mountLine("0:2", "/", "tmpfs", "none")})
	if _, err := m.resolveDevice("/dev/root"); err == nil || !strings.Contains(err.Error(), "no block device") {
		t.Errorf("root in memory: got %v", err)
	}
}

func TestUnescapeUdev(t *testing.T) {
	for in, want := range map[string]string{"": "", "a": "a", `a\x20b`: "a b", `\x2f`: "/", `\x`: `\x`, `\x2`: "\x02",
		`\xzz`: `\xzz`, `\\x41`: `\A`, "ü": "ü"} {
		if got := unescapeUdev(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

// gptImage makes the two sectors of a GUID partition table that matter (UEFI 2.10, 5.3).
func gptImage(sector, entrySize int, guid []byte, label string) []byte {
	b := make([]byte, sector*40)
	b[510], b[511] = 0x55, 0xaa
	h := b[sector:]
	copy(h, "EFI PART")
	binary.LittleEndian.PutUint64(h[72:], 2)
	binary.LittleEndian.PutUint32(h[80:], 8)
	binary.LittleEndian.PutUint32(h[84:], uint32(entrySize))
	e := b[2*sector+2*entrySize:] // partition 3
	copy(e[16:], guid)
	for i, c := range utf16.Encode([]rune(label)) {
		binary.LittleEndian.PutUint16(e[56+2*i:], c)
	}
	return b
}

func TestPartitionTables(t *testing.T) {
	guid := []byte{0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff}
	const text = "00112233-4455-6677-8899-aabbccddeeff"
	long := "thirty-six units fill it entirely 🙂"
	mbr := make([]byte, 512)
	binary.LittleEndian.PutUint32(mbr[440:], 0x0badcafe)
	mbr[510], mbr[511] = 0x55, 0xaa
	far := gptImage(512, 128, guid, "x")
	binary.LittleEndian.PutUint64(far[512+72:], 1<<62)
	tiny := gptImage(512, 128, guid, "x")
	binary.LittleEndian.PutUint32(tiny[512+84:], 16)
	for name, c := range map[string]struct {
		disk        []byte
		num         int
		sector      int64
		uuid, label string
	}{
		"GPT":                {gptImage(512, 128, guid, "Root B"), 3, 512, text, "Root B"},
		"4096":               {gptImage(4096, 256, guid, "ü/b"), 3, 4096, text, "ü/b"},
		"long":               {gptImage(512, 128, guid, long), 3, 512, text, long},
		"number not in it":   {gptImage(512, 128, guid, "x"), 9, 512, "", ""},
		"no number":          {gptImage(512, 128, guid, "x"), 0, 512, "", ""},
		"sector not known":   {gptImage(512, 128, guid, "x"), 3, 0, "", ""},
		"cut off":            {gptImage(512, 128, guid, "x")[:1100], 3, 512, "", ""},
		"entries far away":   {far, 3, 512, "", ""},
		"entries too small":  {tiny, 3, 512, "", ""},
		"MBR":                {mbr, 2, 512, "0badcafe-02", ""},
		"MBR, more sectors":  {append(bytes.Clone(mbr), make([]byte, 8192)...), 12, 512, "0badcafe-0c", ""},
		"nothing":            {make([]byte, 4096), 1, 512, "", ""},
		"shorter than a MBR": {mbr[:100], 1, 512, "", ""},
	} {
		st := writeTemp(t, "disk", c.disk)
		d, err := openStorage(st, openRead)
		if err != nil {
			t.Fatal(err)
		}
		if uuid, label, err := readPartitionIDs(d, c.num, c.sector); uuid != c.uuid || label != c.label || err != nil {
			t.Errorf("%s: got %q %q, want %q %q", name, uuid, label, c.uuid, c.label)
		}
		d.Close()
	}
}

// The table of a real tool, found by way of a fake sysfs as it is before Linux 6.11.
func TestPartitionTableOfSgdisk(t *testing.T) {
	t.Parallel()
	needTool(t, "sgdisk")
	const uuid = "0fc63daf-8483-4772-8e79-3d69d8477de4"
	m := fakeMachine(t, map[string]string{
		"/dev/sdz": "",
		"/sys/devices/block/sdz/queue/logical_block_size": "512\n",
		"/sys/devices/block/sdz/sdz1/uevent":              "DEVNAME=sdz1\nDEVTYPE=partition\nPARTN=1\nPARTNAME=boot\n",
		"/sys/devices/block/sdz/sdz1/partition":           "1\n",
		"/sys/devices/block/sdz/sdz2/uevent":              "DEVNAME=sdz2\nDEVTYPE=partition\nPARTN=2\nPARTNAME=root b\n",
		"/sys/devices/block/sdz/sdz2/partition":           "2\n",
		"/sys/class/block/sdz1":                           "->../../devices/block/sdz/sdz1",
		"/sys/class/block/sdz2":                           "->../../devices/block/sdz/sdz2",
		"/sys/class/block/sdz":                            "->../../devices/block/sdz",
		"/sys/devices/block/sdz/uevent":                   "DEVNAME=sdz\nDEVTYPE=disk\n",
		// its disk has no node
		"/sys/devices/block/sdy/sdy1/uevent":              "DEVNAME=sdy1\nDEVTYPE=partition\nPARTN=1\n",
		"/sys/devices/block/sdy/sdy1/partition":           "1\n",
		"/sys/devices/block/sdy/queue/logical_block_size": "512\n",
		"/sys/class/block/sdy1":                           "->../../devices/block/sdy/sdy1",
		"/sys/devices/block/sdx/sdx1/uevent":              "DEVNAME=sdx1\nDEVTYPE=partition\n",
		"/sys/class/block/sdx1":                           "->../../devices/block/sdx/sdx1",
	})
	disk := m.path("/dev/sdz")
	if err := os.Truncate(disk, 4<<20); err != nil {
		t.Fatal(err)
	}
	runTool(t, "", "sgdisk", "-n", "1:2048:4095", "-n", "2:4096:6143", "-c", "1:boot", "-c", "2:root b",
		"-u", "2:"+uuid, disk)
	for _, tag := range []string{"PARTUUID=" + uuid, "/dev/disk/by-partuuid/" + strings.ToUpper(uuid), "PARTLABEL=root b",
		`/dev/disk/by-partlabel/root\x20b`} {
		if got, err := m.resolveDevice(tag); err != nil || got != m.path("/dev/sdz2") {
			t.Errorf("%s: got %q, %v", tag, got, err)
		}
	}
	if d, err := openStorage(disk, openRead); err != nil {
		t.Error(err)
	} else if _, label, _ := readPartitionIDs(d, 2, 512); label != "root b" {
		t.Errorf("label %q", label)
	}
}

func TestFindSlotsConfiguration(t *testing.T) {
	m := fakeMachine(t, map[string]string{"/proc/self/mountinfo": mountLine("0:2", "/", "rootfs", "rootfs")})
	for _, c := range []struct{ a, b, err string }{
		{"/dev/mmcblk0p2", "/dev/mmcblk0p3", ""},
		{"ubi0_0", "ubi0_1", ""},
		{"", "/dev/mmcblk0p3", "RootfsPartA is not set"},
		{"/dev/mmcblk0p2", "", "RootfsPartB is not set"},
		{"/dev/mmcblk0p2", "/dev/mmcblk0p2", "are the same"},
		{"/dev/sda2", "/dev/sdb2", "same number"},
		{"/dev/mmcblk0p2", "/dev/mapper/root", "does not end in a partition number"},
		{"/dev/mmcblk0p2", "/dev/sda99999999999999999999", "does not end in a partition number"},
		{"/dev/mmcblk0p2", "PARTUUID=1-1", "looking for PARTUUID=1-1"},
	} {
		s, err := findSlots(&config{RootfsPartA: c.a, RootfsPartB: c.b}, m, map[string]string{"mender_boot_part": "3"})
		if c.err == "" {
			if err != nil || s.other(s.a) != s.b || s.other(s.b) != s.a {
				t.Errorf("%q, %q: %v", c.a, c.b, err)
			}
		} else if exitCode(err) != exitRefused || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q, %q: got %v, want %q", c.a, c.b, err, c.err)
		}
	}
}

func TestUBISlot(t *testing.T) {
	for name, want := range map[string]bool{"/dev/ubi0_1": true, "ubi12_3": true, "/dev/ubiblock0_1": true,
		"/dev/ubi_a_1": false, "/dev/sda1": false} {
		if s, err := (&machine{}).resolveSlot("A", name); err != nil || s.ubi != want {
			t.Errorf("%q: %+v, %v", name, s, err)
		}
	}
}

// Which slot runs: the mounted root, the command line and the boot environment.
func TestRunningSlot(t *testing.T) {
	n := twoNodes(t)
	numA, numB := deviceNumber(n[0]), deviceNumber(n[1])
	for name, c := range map[string]struct {
		mounts, cmdline, env, running string
		want, err, agree              string // want: A, B or ""
	}{
		"mounted": {mounts: mountLine(numA, "/", "ext4", "/dev/root"), cmdline: "root=/dev/mmcblk0p2",
			env: "2", want: "A"},
		"later mount covers": {mounts: mountLine("0:1", "/", "rootfs", "rootfs") + mountLine(numB, "/", "ext4",
			"/dev/x"), env: "3", want: "B"},
		"btrfs": {mounts: mountLine("0:23", "/", "btrfs", "/dev/mmcblk0p3"), env: "3", want: "B"},
		"dm-verity, by root=": {mounts: mountLine("254:0", "/", "squashfs", "/dev/dm-0"),
			cmdline: "quiet root=/dev/sda1 root=/dev/mmcblk0p3", env: "3", want: "B"},
		"root= by PARTLABEL": {mounts: mountLine("254:0", "/", "squashfs", "/dev/dm-0"), cmdline: "root=PARTLABEL=b",
			env: "3", want: "B"},
		"initramfs": {mounts: mountLine("0:2", "/", "rootfs", "rootfs"),
			cmdline: "root=/dev/mmcblk0p2", env: "3"},
		"tmpfs":   {mounts: mountLine("0:30", "/", "tmpfs", "none"), env: "2"},
		"overlay": {mounts: mountLine("0:30", "/", "overlay", "overlay"), env: "2", err: "root= not given"},
		"neither": {mounts: mountLine("8:99", "/", "ext4", "/dev/sdz3"), cmdline: "root=/dev/sdz3",
			env: "2", err: "the mounted root is not known to be on one of"},
		"neither, --running":      {mounts: mountLine("8:99", "/", "ext4", "/dev/sdz3"), running: "b", env: "3", want: "B"},
		"neither, --running none": {mounts: mountLine("8:99", "/", "ext4", "/dev/sdz3"), running: "none", env: "3"},
		"no mountinfo":            {env: "2", err: "mountinfo"},
		"no line for /":           {mounts: otherMounts, env: "2", err: "no line for /"},
		"root= not to be found": {mounts: mountLine("8:99", "/", "ext4", "x"), cmdline: "root=PARTUUID=5", env: "2",
			err: "root=PARTUUID=5 is neither"},
		"root= not given": {mounts: mountLine("8:99", "/", "ext4", "x"), cmdline: "quiet", env: "2",
			err: "root= not given"},
		"environment says other": {mounts: mountLine(numA, "/", "ext4", "/dev/root"), cmdline: "root=/dev/mmcblk0p2",
			env: "3", want: "A", agree: "do not agree"},
		"environment says neither": {mounts: mountLine(numA, "/", "ext4", "/dev/root"), env: "7", want: "A",
			agree: `"7" in the boot environment is the number of neither slot: it is 2 for A (`},
		"environment says nothing": {mounts: mountLine(numA, "/", "ext4", "/dev/root"), env: "", want: "A",
			agree: `mender_boot_part=""`},
		"initramfs, env is garbage": {mounts: mountLine("0:2", "/", "rootfs", "rootfs"), env: "02", agree: "neither slot"},
		"--running against env": {mounts: mountLine("0:2", "/", "rootfs", "rootfs"), running: "A", env: "3", want: "A",
			agree: "do not agree"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{"/dev/mmcblk0p2": "->" + n[0], "/dev/mmcblk0p3": "->" + n[1],
				"/proc/cmdline":                     c.cmdline + "\n",
				"/sys/class/block/mmcblk0p3/uevent": "DEVTYPE=partition\nDEVNAME=mmcblk0p3\nPARTNAME=b\nPARTUUID=1-2\n"}
			if c.mounts != "" {
				files["/proc/self/mountinfo"] = otherMounts + c.mounts
			}
			m := fakeMachine(t, files)
			m.running = c.running
			env := map[string]string{"mender_boot_part": c.env}
			s, err := findSlots(&config{RootfsPartA: "/dev/mmcblk0p2", RootfsPartB: "/dev/mmcblk0p3"}, m, env)
			if c.err != "" {
				if exitCode(err) != exitRefused || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := s.running; got == nil && c.want != "" || got != nil && got.letter != c.want {
				t.Errorf("got %v, want %q; %q", got, c.want, s.why)
			}
			err = s.agree(env)
			if (err == nil) != (c.agree == "") || err != nil &&
				(!strings.Contains(err.Error(), c.agree) || hintOf(err) == "" || exitCode(err) != exitRefused) {
				t.Errorf("agree: got %v, want %q", err, c.agree)
			}
			if c.agree == "do not agree" && c.running == "" {
				for _, source := range []string{"mounted root: /dev/root", "kernel command line: root=/dev/mmcblk0p2",
					"boot environment: mender_boot_part=3"} {
					if !strings.Contains(err.Error(), source) {
						t.Errorf("no %q in %v", source, err)
					}
				}
			}
		})
	}
}

func TestRunningUBISlot(t *testing.T) {
	for source, want := range map[string]string{"ubi0:rootfs-b": "B", "ubi0_1": "B", "/dev/ubi0_0": "A",
		"/dev/ubiblock0_1": "B"} {
		m := fakeMachine(t, map[string]string{"/sys/class/ubi/ubi0_1/name": "rootfs-b", "/dev/ubi0_0": "", "/dev/ubi0_1": "",
			"/proc/self/mountinfo": mountLine("0:15", "/", "ubifs", source), "/proc/cmdline": ""})
		s, err := findSlots(&config{RootfsPartA: "ubi0_0", RootfsPartB: "ubi0_1"}, m,
			map[string]string{"mender_boot_part": "1"})
		if err != nil || s.running == nil || s.running.letter != want || !s.running.ubi {
			t.Errorf("%s: %v, %v", source, s.running, err)
		}
	}
}

// field case 25, MEN-2084: what must not be written is refused before anything is.
func TestCheckTarget(t *testing.T) {
	n := twoNodes(t)
	num := deviceNumber(n[1])
	mounts := otherMounts + mountLine("8:1", "/", "ext4", "/dev/sda1")
	m := fakeMachine(t, map[string]string{
		"/proc/self/mountinfo":          mounts,
		"/dev/file9":                    "x",
		"/dev/shm/image4":               "x",
		"/image5":                       "x",
		"/dev/node3":                    "->" + n[1],
		"/dev/null1":                    "->/dev/null",
		"/dev/gone8":                    "->nowhere",
		"/dev/ubi0_1":                   "->/dev/null",
		"/dev/dir2/x":                   "",
		"/sys/dev/block/" + num + "/ro": "0\n",
	})
	check := func(name, want string) {
		t.Helper()
		err := m.checkTarget(&slot{path: m.path(name), ubi: strings.Contains(name, "ubi")})
		if (err == nil) != (want == "") || err != nil &&
			(!strings.Contains(err.Error(), want) || exitCode(err) != exitRefused) {
			t.Errorf("%s: got %v, want %q", name, err, want)
		}
	}
	check("/image5", "")
	check("/dev/shm/image4", "")
	check("/dev/node3", "")
	check("/dev/ubi0_1", "")
	check("/dev/file9", "is not a device")
	check("/dev/dir2", "is not a device")
	check("/dev/mmcblk0p9", "does not exist")
	check("/dev/gone8", "does not exist")
	check("/dev/file9/x", "not a directory")
	check("/dev/null1", "want a block device")
	writeFile(t, m.path("/proc/self/mountinfo"), mounts+mountLine(num, "/mnt/b", "ext4", "/dev/other"))
	check("/dev/node3", `mounted on "/mnt/b"`)
	writeFile(t, m.path("/proc/self/mountinfo"), mounts+mountLine("0:9", "/mnt/c", "btrfs", "/dev/node3"))
	check("/dev/node3", `mounted on "/mnt/c"`)
	writeFile(t, m.path("/proc/self/mountinfo"), mounts+mountLine("0:9", "/mnt/d", "ubifs", "ubi0_1"))
	check("/dev/ubi0_1", `mounted on "/mnt/d"`)
	writeFile(t, m.path("/proc/self/mountinfo"), mounts)
	writeFile(t, m.path("/sys/dev/block/"+num+"/ro"), "1\n")
	check("/dev/node3", "is read-only")
	if err := os.Remove(m.path("/proc/self/mountinfo")); err != nil {
		t.Fatal(err)
	}
	check("/dev/node3", "mountinfo")
}

// makedev(3): major and minor numbers have their bits in four places.
func TestDeviceNumber(t *testing.T) {
	for path, want := range map[string]string{"/dev/null": "1:3", "/proc/self/stat": "", "/nowhere": ""} {
		if got := deviceNumber(path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: mknod")
	}
	path := filepath.Join(t.TempDir(), "node")
	if err := exec.Command("mknod", path, "b", "259", "70000").Run(); err != nil {
		t.Skip("needs mknod: ", err)
	}
	if got := deviceNumber(path); got != "259:70000" {
		t.Errorf("got %q, want 259:70000", got)
	}
}
