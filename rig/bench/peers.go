// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// peer is an updater. cannot has the reason for what it does not do, by compression or "HTTP".
type peer struct {
	name   string
	bin    string
	cannot map[string]string
	// start makes the command for a row; the service, if there is one, runs already.
	start func(r row) (cmd, service *exec.Cmd, err error)
}

const version = "1.0"

// peers prepares every updater that is there; the notes say why one is not, and how each is set up.
func (b *bench) peers() (peers []*peer, closers []func(), notes []string) {
	for _, x := range []struct {
		name string
		set  func() (*peer, func(), string, error)
	}{{"mendlet", b.setMendlet}, {"mender", b.setMender}, {"rauc", b.setRauc}, {"swupdate", b.setSwupdate}} {
		if !b.only.MatchString(x.name) {
			continue
		}
		p, closer, note, err := x.set()
		if err != nil {
			notes = append(notes, fmt.Sprintf("%s is left out: %v", x.name, err))
			fmt.Fprintln(os.Stderr, notes[len(notes)-1])
			continue
		}
		p.name = x.name
		peers, notes = append(peers, p), append(notes, note)
		if closer != nil {
			closers = append(closers, closer)
		}
	}
	return peers, closers, notes
}

func (b *bench) at(name string) string { return filepath.Join(b.dir, name) }

// source is what to give to a peer that takes a path or a URL.
func (b *bench) source(r row, name string) string {
	if r.http {
		return b.url + "/" + name
	}
	return b.at(name)
}

// payload is the image as the compressor leaves it.
func (b *bench) payload(comp string) string {
	if comp == "none" {
		return b.image
	}
	return b.at("payload." + comp)
}

func (b *bench) payloads() error {
	for comp, cmd := range map[string]string{"gzip": "gzip -c", "xz": "xz -c", "zstd": "zstd -8 -qc"} {
		if err := b.once("payload."+comp, func(to string) error {
			_, err := output("sh", "-ec", cmd+` "$1" > "$2"`, "sh", b.image, to)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// once makes a file unless it is there and newer than the image; make gets a temporary name.
func (b *bench) once(name string, make func(to string) error) error {
	st, err := os.Stat(b.at(name))
	img, err2 := os.Stat(b.image)
	if err == nil && err2 == nil && st.ModTime().After(img.ModTime()) {
		return nil
	}
	fmt.Fprintln(os.Stderr, "making", name)
	tmp := b.at("new-" + name)
	os.Remove(tmp)
	if err := make(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, b.at(name))
}

// artifacts makes the Mender artifacts, by Mender's own tool. That one has no zstd: the payload
// of the plain artifact is compressed after the fact.
func (b *bench) artifacts() error {
	for comp, arg := range map[string]string{"none": "none", "gzip": "gzip", "xz": "lzma"} {
		if err := b.once(comp+".mender", func(to string) error {
			_, err := output("mender-artifact", "--compression", arg, "write", "rootfs-image", "-t", "bench",
				"-n", "release", "-f", b.image, "-o", to)
			return err
		}); err != nil {
			return err
		}
	}
	return b.once("zstd.mender", func(to string) error {
		_, err := output("sh", "-ec", `t=$(mktemp -d); trap 'rm -rf "$t"' EXIT; cd "$t"; tar -xf "$1"
			zstd -q -8 --rm data/0000.tar
			tar --format=ustar --owner=0 --group=0 --numeric-owner -cf "$2" version manifest header.tar data/0000.tar.zst`,
			"sh", b.at("none.mender"), to)
		return err
	})
}

// bootFiles puts an environment, what finds it, and a device type into dir; the configuration
// names them as seen from the root that the client has.
func (b *bench) bootFiles(dir, seen string) error {
	err := os.MkdirAll(dir, 0o755)
	for name, body := range map[string]string{
		"device_type":   "device_type=bench\n",
		"fw_env.config": fmt.Sprintf("%s/env 0x0 0x400\n%s/env 0x400 0x400\n", seen, seen),
		"mender.conf": fmt.Sprintf(`{"RootfsPartA": %q, "RootfsPartB": %q, "DeviceTypeFile": "%s/device_type",
 "FwEnvConfig": "%s/fw_env.config", "BootEnv": "native", "DBus": {"Enabled": false}}`, b.slotA, b.slotB, seen, seen),
	} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644))
	}
	return err
}

// freshEnv is the environment of a system that runs slot A and has nothing in progress: two
// copies of 1 KiB, the first one newer.
func (b *bench) freshEnv(dir string) error {
	return os.WriteFile(filepath.Join(dir, "env"), environment(1024, []string{"bootcount=0", "bootlimit=1",
		"mender_boot_part=" + partNumber(b.slotA), "mender_boot_part_hex=" + partNumber(b.slotA), "upgrade_available=0"}), 0o644)
}

func (b *bench) setMendlet() (*peer, func(), string, error) {
	dir := b.at("mendlet")
	if err := errors.Join(b.artifacts(), b.bootFiles(dir, dir)); err != nil {
		return nil, nil, "", err
	}
	start := func(r row) (*exec.Cmd, *exec.Cmd, error) {
		data := filepath.Join(dir, "data")
		err := errors.Join(os.RemoveAll(data), os.Mkdir(data, 0o755), b.freshEnv(dir))
		return exec.Command(b.mendlet, "install", b.source(r, r.comp+".mender"), "-c", filepath.Join(dir, "mender.conf"),
			"-d", data, "--running", "A", "-q", "--progress", "none"), nil, err
	}
	return &peer{bin: b.mendlet, start: start}, nil, "mendlet: checks the manifest, reads the slot back, switches a native environment.", nil
}

// Debian's client insists that what is mounted as / is the running slot: it gets a root that is,
// with the machine's programs bound into it.
func (b *bench) setMender() (*peer, func(), string, error) {
	bin, err := exec.LookPath("mender")
	if err != nil {
		return nil, nil, "", err
	}
	root := b.at("root")
	if err := errors.Join(b.artifacts(), os.MkdirAll(root, 0o755)); err != nil {
		return nil, nil, "", err
	}
	_, err = output("sh", "-ec", `mke2fs -q -F -t ext4 "$2"; mount "$2" "$1"; cd "$1"; mkdir -p tmp var/lib/mender etc/mender
		for d in usr dev proc sys run; do mkdir $d; mount --rbind /$d $d; done
		for d in bin sbin lib lib64; do if [ -L /$d ]; then ln -s usr/$d $d; fi; done
		echo artifact_name=before > etc/mender/artifact_info; ln -s /etc/mender/fw_env.config etc/fw_env.config`, "sh", root, b.slotA)
	if err != nil {
		return nil, nil, "", err
	}
	conf := filepath.Join(root, "etc/mender")
	if err := b.bootFiles(conf, "/etc/mender"); err != nil {
		return nil, nil, "", err
	}
	start := func(r row) (*exec.Cmd, *exec.Cmd, error) {
		data := filepath.Join(root, "var/lib/mender")
		err := errors.Join(os.RemoveAll(data), os.Mkdir(data, 0o755), b.freshEnv(conf))
		from := b.source(r, r.comp+".mender")
		if !r.http { // the path of the file as it is seen in the root
			if err := bind(b.at(r.comp+".mender"), filepath.Join(root, "tmp/release.mender")); err != nil {
				return nil, nil, err
			}
			from = "/tmp/release.mender"
		}
		cmd := exec.Command(bin, "--no-syslog", "install", from)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		return cmd, nil, err
	}
	return &peer{bin: bin, start: start, cannot: map[string]string{"zstd": "not in 3.4.0"}}, nil,
		"mender: " + firstLine(bin, "--version") + ", in a root that is a mounted slot, environment by libubootenv.", nil
}

// bind makes from visible as to; what was there before is taken away.
func bind(from, to string) error {
	syscall.Unmount(to, 0) // not mounted the first time
	if err := os.WriteFile(to, nil, 0o644); err != nil {
		return err
	}
	return os.NewSyscallError("mount", syscall.Mount(from, to, "", syscall.MS_BIND, ""))
}

// certificate makes a key and a self-signed certificate that rauc and swupdate both take.
func (b *bench) certificate() error {
	return b.once("cert.pem", func(to string) error {
		_, err := output("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", b.at("key.pem"), "-out", to,
			"-days", "3650", "-subj", "/CN=bench", "-addext", "extendedKeyUsage=emailProtection,codeSigning",
			"-addext", "keyUsage=digitalSignature")
		return err
	})
}

// rauc compresses by way of the bundle's file system. The service does the work: it has a bus of
// its own, and is started before the clock is.
func (b *bench) setRauc() (*peer, func(), string, error) {
	bin, err := exec.LookPath("rauc")
	if err != nil {
		return nil, nil, "", err
	}
	if err := errors.Join(b.certificate(), b.bundles(bin)); err != nil {
		return nil, nil, "", err
	}
	conf := fmt.Sprintf(`[system]
compatible=bench
bootloader=noop
mountprefix=%s
statusfile=%s
[keyring]
path=%s
[slot.rootfs.0]
device=%s
type=raw
bootname=A
[slot.rootfs.1]
device=%s
type=raw
bootname=B
`, b.at("rauc-mnt"), b.at("rauc-status"), b.at("cert.pem"), b.slotA, b.slotB)
	if err := errors.Join(os.MkdirAll(b.at("rauc-mnt"), 0o755), os.WriteFile(b.at("rauc.conf"), []byte(conf), 0o644)); err != nil {
		return nil, nil, "", err
	}
	closer, err := b.startBus()
	if err != nil {
		return nil, nil, "", err
	}
	env := append(os.Environ(), "DBUS_STARTER_BUS_TYPE=session", "DBUS_SESSION_BUS_ADDRESS=unix:path="+b.at("bus"))
	start := func(r row) (*exec.Cmd, *exec.Cmd, error) {
		os.Remove(b.at("rauc-status"))
		service := exec.Command(bin, "-c", b.at("rauc.conf"), "--override-boot-slot=A", "service")
		cmd := exec.Command(bin, "install", b.source(r, r.comp+".raucb"))
		service.Env, cmd.Env = env, env
		service.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := service.Start(); err != nil {
			return nil, nil, err
		}
		return cmd, service, b.waitForName("de.pengutronix.rauc", env)
	}
	return &peer{bin: bin, start: start, cannot: map[string]string{"HTTP": "plain bundles are not streamed, and nbd, which other ones need, is not in every kernel"}}, closer,
		"rauc: " + firstLine(bin, "--version") + ", plain bundle with a raw image, compressed by squashfs in the kernel (whose time for reading ahead is not in the CPU figure); boot loader noop.", nil
}

func (b *bench) bundles(rauc string) error {
	for comp, arg := range map[string]string{"none": "-noI -noD -noF -noX", "gzip": "-comp gzip", "xz": "-comp xz", "zstd": "-comp zstd"} {
		if err := b.once(comp+".raucb", func(to string) error {
			src := b.at("bundle")
			err := errors.Join(os.RemoveAll(src), os.Mkdir(src, 0o755), os.WriteFile(filepath.Join(src, "manifest.raucm"),
				[]byte("[update]\ncompatible=bench\nversion="+version+"\n[bundle]\nformat=plain\n[image.rootfs]\nfilename=rootfs.img\n"), 0o644),
				os.Link(b.image, filepath.Join(src, "rootfs.img")))
			if err == nil {
				_, err = output(rauc, "--cert="+b.at("cert.pem"), "--key="+b.at("key.pem"), "bundle", "--mksquashfs-args="+arg, src, to)
			}
			return errors.Join(err, os.RemoveAll(src))
		}); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) startBus() (stop func(), err error) {
	os.Remove(b.at("bus"))
	bus := exec.Command("dbus-daemon", "--session", "--nofork", "--nopidfile", "--address=unix:path="+b.at("bus"))
	bus.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it must not outlive this program
	if err := bus.Start(); err != nil {
		return nil, err
	}
	stop = func() { bus.Process.Kill(); bus.Wait() }
	return stop, waitUntil("the bus is there", func() bool { _, err := os.Stat(b.at("bus")); return err == nil })
}

func (b *bench) waitForName(name string, env []string) error {
	return waitUntil(name+" is on the bus", func() bool {
		cmd := exec.Command("dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/", "org.freedesktop.DBus.NameHasOwner", "string:"+name)
		cmd.Env = env
		out, err := cmd.Output()
		return err == nil && strings.Contains(string(out), "boolean true")
	})
}

func waitUntil(what string, ok func() bool) error {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return nil
		}
	}
	return fmt.Errorf("10 s, and it is not so yet that %s", what)
}

func (b *bench) setSwupdate() (*peer, func(), string, error) {
	bin, err := exec.LookPath("swupdate")
	if err != nil {
		return nil, nil, "", err
	}
	if err := errors.Join(b.certificate(), b.swus()); err != nil {
		return nil, nil, "", err
	}
	start := func(r row) (*exec.Cmd, *exec.Cmd, error) {
		arg := []string{"-k", b.at("cert.pem"), "-H", "bench:1.0", "-M", "-m", "-l", "2"}
		if r.http {
			arg = append(arg, "-d", "-u "+b.source(r, r.comp+".swu"))
		} else {
			arg = append(arg, "-i", b.at(r.comp+".swu"))
		}
		return exec.Command(bin, arg...), nil, nil
	}
	return &peer{bin: bin, start: start, cannot: map[string]string{"xz": "not in 2022.12"}}, nil,
		"swupdate: Debian's 2022.12, installed-directly, no boot loader.", nil
}

// swus makes the archives for swupdate. They name the device, which may be another next time.
func (b *bench) swus() error {
	for comp, compressed := range map[string]string{"none": "", "gzip": `compressed = "zlib";`, "zstd": `compressed = "zstd";`} {
		sum, err := fileSum(b.payload(comp))
		if err != nil {
			return err
		}
		name := filepath.Base(b.payload(comp))
		desc := fmt.Sprintf("software = { version = %q; hardware-compatibility: [ \"1.0\" ]; images: ( { filename = %q; device = %q;"+
			" type = \"raw\"; %s installed-directly = true; sha256 = \"%x\"; } ); }\n", version, name, b.slotB, compressed, sum)
		sig := b.at("sw-description.sig")
		if err := os.WriteFile(b.at("sw-description"), []byte(desc), 0o644); err != nil {
			return err
		}
		if _, err := output("openssl", "cms", "-sign", "-in", b.at("sw-description"), "-out", sig, "-signer", b.at("cert.pem"),
			"-inkey", b.at("key.pem"), "-outform", "DER", "-nosmimecap", "-binary"); err != nil {
			return err
		}
		if err := writeCpio(b.at(comp+".swu"), b.at("sw-description"), sig, b.payload(comp)); err != nil {
			return err
		}
	}
	return nil
}

func fileSum(name string) ([32]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	defer f.Close()
	sum, _, err := sumOf(f)
	return sum, err
}

// writeCpio writes an archive in cpio's new ASCII format (cpio(5), "New ASCII Format").
func writeCpio(to string, files ...string) (err error) {
	w, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	member := func(ino int, name string, mode int, size int64, body io.Reader) error {
		head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
		head += strings.Repeat("\x00", -len(head)&3)
		if _, err := w.WriteString(head); err != nil {
			return err
		}
		n, err := io.Copy(w, body)
		if err == nil && n != size {
			err = fmt.Errorf("%q: got %d bytes, want %d", name, n, size)
		}
		_, err2 := w.WriteString(strings.Repeat("\x00", int(-size&3)))
		return errors.Join(err, err2)
	}
	for i, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		st, err := f.Stat()
		if err == nil {
			err = member(i+1, filepath.Base(name), 0o100644, st.Size(), f)
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	return member(0, "TRAILER!!!", 0, 0, strings.NewReader(""))
}
