// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// supportShells are the shells that devices have, as command lines in front of a script's name.
func supportShells(t *testing.T) map[string][]string {
	list := map[string][]string{}
	if dash, err := exec.LookPath("dash"); err == nil {
		list["dash"] = []string{dash}
	}
	if box, err := exec.LookPath("busybox"); err == nil {
		list["busybox"] = []string{box, "sh"}
	}
	if len(list) == 0 {
		t.Skip("needs dash or busybox")
	}
	return list
}

// runSupport runs a script of support/ as it would run on a device whose root is dir, and returns
// the lines that it printed.
func runSupport(t *testing.T, shell []string, script, dir string) (string, error) {
	t.Helper()
	text := readText(t, "support/"+script)
	for _, sub := range []string{"/sys/class/net", "/proc/", "/etc/", "/usr/lib/", "/usr/share/mender", "/boot/"} {
		text = strings.ReplaceAll(text, " "+sub, " "+dir+sub)
	}
	for _, call := range []string{"uname -", "ip addr"} { // busybox takes its own before what is in PATH
		text = strings.ReplaceAll(text, call, dir+"/bin/"+call)
	}
	path := filepath.Join(t.TempDir(), filepath.Base(script))
	must(t, os.WriteFile(path, []byte(text), 0o755))
	cmd := exec.Command(shell[0], append(shell[1:], path)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	out, err := cmd.Output()
	return string(out), err
}

// supportRoot makes a root directory of these files; one whose name ends in "/" is a directory, one in bin a program.
func supportRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		switch {
		case strings.HasSuffix(name, "/"):
			must(t, os.MkdirAll(path, 0o755))
		case strings.HasPrefix(name, "bin/"):
			putScript(t, filepath.Dir(path), filepath.Base(path), text, 0o755)
		default:
			must(t, os.WriteFile(path, []byte(text), 0o644))
		}
	}
	return dir
}

func netDevice(files map[string]string, name, index, kind, mac string) {
	dir := "sys/class/net/" + name + "/"
	files[dir+"ifindex"], files[dir+"type"], files[dir+"address"] = index+"\n", kind+"\n", mac+"\n"
}

// The identity script names the same address as the program does without it: whether the script is
// there or not, the server sees the same device.
func TestSupportIdentity(t *testing.T) {
	t.Parallel()
	files := map[string]string{"sys/class/net/bonding_masters": "\n"}
	check := func(what, want string) {
		dir := supportRoot(t, files)
		mac, err := lowestMAC(dir + "/sys")
		if mac != want || (err == nil) != (want != "") {
			t.Errorf("%s: the program: got %q, %v, want %q", what, mac, err, want)
		}
		for name, shell := range supportShells(t) {
			out, err := runSupport(t, shell, "identity/mender-device-identity", dir)
			if want != "" && (out != "mac="+want+"\n" || err != nil) || want == "" && (out != "" || err == nil) {
				t.Errorf("%s: %s: got %q, %v, want %q", what, name, out, err, want)
			}
		}
	}
	check("no interface", "")
	netDevice(files, "lo", "1", "772", "00:00:00:00:00:00")
	netDevice(files, "dummy0", "2", "1", "02:00:00:00:00:02")
	netDevice(files, "can0", "3", "280", "")
	check("none of type ethernet", "")
	netDevice(files, "wlan0", "10", "1", "02:00:00:00:00:10")
	check("one", "02:00:00:00:00:10")
	netDevice(files, "eth0", "9", "1", "02:00:00:00:00:09")
	check("two", "02:00:00:00:00:09")
	netDevice(files, "eth1", "4", "1", "00:00:00:00:00:00")
	check("no address", "")
}

// What each inventory script says of a device, line by line.
func TestSupportInventory(t *testing.T) {
	t.Parallel()
	full := map[string]string{
		"etc/hostname":   "# set by hand\nbox-1\n",
		"etc/os-release": "NAME=Box\nVERSION=\"2 (two)\"\nPRETTY_NAME=\"Box 'OS' 2\"\n",
		"proc/version":   "Linux version 6.1 (a=b) #1\n",
		"proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast: CPU\n\nprocessor\t: 1\nmodel name\t: Fast: CPU\n\n" +
			"processor\t: 2\nmodel name\t: Slow CPU\n",
		"proc/meminfo":      "MemTotal:         503132 kB\nMemFree:  1 kB\n",
		"proc/mounts":       "rootfs / rootfs rw 0 0\n/dev/mmcblk0p2 / ext4 rw 0 0\n/dev/sda1 /mnt vfat rw 0 0\n",
		"etc/fw_env.config": "", "usr/share/mender/modules/v3/README": "",
		"sys/class/net/bonding_masters": "\n", "bin/uname": "#!/bin/sh\necho x86_64\n",
		"bin/ip": "#!/bin/sh\n[ \"$*\" = \"addr show dev eth0\" ] || exit 1\necho '2: eth0: <UP> mtu 1500'\n" +
			"echo '    link/ether 02:00:00:00:00:02 brd ff:ff:ff:ff:ff:ff'\n" +
			"echo '    inet 192.0.2.7/24 brd 192.0.2.255 scope global eth0'\necho '    inet6 fe80::2/64 scope link'\n",
	}
	netDevice(full, "lo", "1", "772", "00:00:00:00:00:00")
	netDevice(full, "eth0", "2", "1", "02:00:00:00:00:02")
	netDevice(full, "can0", "3", "280", "")
	netDevice(full, "docker0", "4", "1", "02:00:00:00:00:04")
	old := map[string]string{"etc/os-release": "NAME=Box\nVERSION=2\n", "proc/mounts": "rootfs / rootfs rw 0 0\n",
		"proc/version": "Linux\n", "proc/cpuinfo": "Processor: ARM\ncpu model\t\t: MIPS 24Kc\n", "proc/meminfo": "",
		"boot/efi/EFI/BOOT/mender_grubenv1/": "", "bin/uname": "#!/bin/sh\necho aarch64\n"}
	none := map[string]string{"bin/uname": "#!/bin/sh\n"}
	grub := map[string]string{"boot/grub/mender_grubenv1/": "", "proc/mounts": "overlay / overlay rw 0 0\n",
		"bin/uname": "#!/bin/sh\necho i686\n"}
	rows := []struct {
		script string
		files  map[string]string
		want   string
	}{
		{"hostinfo", full, "hostname=box-1 kernel=Linux version 6.1 (a=b) #1 " +
			"cpu_model=Fast: CPU cpu_model=Slow CPU mem_total_kB=503132"},
		{"hostinfo", old, "hostname=aarch64 kernel=Linux cpu_model=MIPS 24Kc"},
		{"network", full, "network_interfaces=can0 network_interfaces=eth0 mac_eth0=02:00:00:00:00:02 " +
			"ipv4_eth0=192.0.2.7/24 ipv6_eth0=fe80::2/64"},
		{"network", old, ""},
		{"os", full, "os=Box 'OS' 2"},
		{"os", old, "os=Box 2"},
		{"os", grub, "os=unknown"},
		{"rootfs-type", full, "rootfs_type=ext4"},
		{"rootfs-type", old, "rootfs_type=Unknown"},
		{"rootfs-type", grub, "rootfs_type=overlay"},
		{"bootloader-integration", full, "mender_bootloader_integration=uboot"},
		{"bootloader-integration", old, "mender_bootloader_integration=uboot_uefi_grub"},
		{"bootloader-integration", grub, "mender_bootloader_integration=bios_grub"},
		{"bootloader-integration", none, "mender_bootloader_integration=unknown"},
		{"update-modules", full, "update_modules="},
		{"update-modules", old, "update_modules="},
	}
	tried := map[string]bool{}
	for _, row := range rows {
		tried["support/inventory/mender-inventory-"+row.script] = true
		dir := supportRoot(t, row.files)
		for name, shell := range supportShells(t) {
			out, err := runSupport(t, shell, "inventory/mender-inventory-"+row.script, dir)
			if got := strings.TrimSpace(strings.ReplaceAll(out, "\n", " ")); got != row.want || err != nil {
				t.Errorf("%s, %s: got %q, %v, want %q", row.script, name, got, err, row.want)
			}
			if err := parseKeyValues([]byte(out), map[string][]string{}); err != nil {
				t.Errorf("%s, %s: %v", row.script, name, err)
			}
		}
	}
	list, err := filepath.Glob("support/inventory/*")
	if err != nil || len(list) != len(tried) {
		t.Errorf("got scripts %q, %v, tried %v", list, err, tried)
	}
	dir := supportRoot(t, nil)
	must(t, os.MkdirAll(dir+"/usr/share/mender/modules/v3/sub", 0o755))
	must(t, os.WriteFile(dir+"/usr/share/mender/modules/v3/script", nil, 0o755))
	for name, shell := range supportShells(t) {
		out, err := runSupport(t, shell, "inventory/mender-inventory-update-modules", dir)
		if out != "update_modules=script\n" || err != nil {
			t.Errorf("%s: got %q, %v", name, out, err)
		}
	}
}
