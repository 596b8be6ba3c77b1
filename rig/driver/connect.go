// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
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

// relay is the server with deviceconnect of the program's own tests, as a process.
type relay struct {
	cmd                *exec.Cmd
	stdin              io.Closer
	lines              chan string
	url, token, device string
}

func startRelay(out string) (*relay, error) {
	cmd := exec.Command(filepath.Join(out, "host", "relay"), "-test.run", "^TestRelayForRig$", "-test.timeout", "0")
	cmd.Env = append(os.Environ(), "MENDLET_RIG_RELAY=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err1 := cmd.StdinPipe()
	said, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		return nil, err
	}
	r := &relay{cmd: cmd, stdin: in, lines: make(chan string, 16)}
	go func() {
		defer close(r.lines)
		for s := bufio.NewScanner(said); s.Scan(); {
			r.lines <- s.Text()
		}
	}()
	words, err := r.said("RELAY", 2)
	if err != nil {
		r.end()
		return nil, err
	}
	r.url, r.token = words[0], words[1]
	return r, nil
}

// said waits for a line that begins with this word, and gives the n words after it.
func (r *relay) said(first string, n int) ([]string, error) {
	end := time.After(bootLimit)
	for {
		select {
		case line, ok := <-r.lines:
			if w := strings.Fields(line); len(w) == 1+n && w[0] == first {
				return w[1:], nil
			}
			if !ok {
				return nil, fmt.Errorf("the relay ended before it said %q", first)
			}
		case <-end:
			return nil, fmt.Errorf("the relay did not say %q for %v", first, bootLimit)
		}
	}
}

// end ends it; what else it says is lost.
func (r *relay) end() {
	r.stdin.Close()
	for range r.lines {
	}
	r.cmd.Wait()
}

// cli is Debian's mender-cli with these words, and what it said. It is given lines to read, and no end of them.
func (r *relay) cli(d *device, ctx context.Context, lines string, words ...string) (string, error) {
	all := append([]string{"--server", r.url, "--token-value", r.token}, words...)
	cmd := exec.CommandContext(ctx, "mender-cli", all...)
	cmd.Env = append(os.Environ(), "HOME="+d.out)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return "", err
	}
	io.WriteString(in, lines)
	err = cmd.Wait()
	d.say("mender-cli %q: %v", words, err)
	fmt.Fprintf(d.console, "%s\n", said.String())
	return said.String(), err
}

// terminal types lines in a terminal of the device, the last of which ends it. All of want must be on the screen then.
func (r *relay) terminal(d *device, lines string, want ...string) error {
	ctx, stop := context.WithTimeout(context.Background(), updateLimit)
	defer stop()
	said, err := r.cli(d, ctx, lines, "terminal", r.device)
	if err != nil {
		return fmt.Errorf("mender-cli terminal: %w: %q", err, tail([]byte(said)))
	}
	for _, w := range want {
		if !strings.Contains(said, w) {
			return fmt.Errorf("nothing like %q in the terminal: %q", w, tail([]byte(said)))
		}
	}
	return nil
}

// recovery is a recovery system that build.sh made.
type recovery struct {
	image    string
	bootargs string // U-Boot reads them
	up       string // what it says on the console, as a pattern
	env      string // shows mender_boot_part
	files    string // the directory that it offers
	install  string
}

const packagedArgs = "root=/dev/vda2 ro console=ttyAMA0 loglevel=3 ip=dhcp mendlet.connect=terminal,files " +
	"mendlet.data=/dev/vda4"

// recoveries are the rig's own, and those that initramfs-tools and dracut make with the hooks that are packaged.
var recoveries = map[string]recovery{
	"connect": {"recovery.img", "${rig_bootargs}", `RIG-RECOVERY up\r?\n`, "fw_printenv mender_boot_part", "/data",
		"mendlet -d /data/mender install"},
	"initramfs-tools": {"packaged-initramfs-tools.img", packagedArgs, `\(initramfs\) `,
		"mendlet env print mender_boot_part", "/run/mendlet/files", "mendlet install"},
	// without a shell on the console
	"dracut": {"packaged-dracut.img", packagedArgs + " rd.neednet=1 rd.retry=2 rd.shell=0",
		`Dropping you to a shell|Could not boot`, "mendlet env print mender_boot_part", "/run/mendlet/files",
		"mendlet install"},
}

// connect breaks both slots of a board, which comes up in its recovery system, where a user of the server mends it.
func connect(d *device, system recovery) error {
	if _, err := os.Stat(filepath.Join(d.out, system.image)); errors.Is(err, os.ErrNotExist) {
		d.say("skipped: build.sh could not make %s here", system.image)
		return nil
	}
	r, err := startRelay(d.out)
	if err != nil {
		return err
	}
	defer r.end()
	if err := d.on(); err != nil {
		return err
	}
	server := strings.Replace(r.url, "127.0.0.1", "10.0.2.2", 1)
	command := fmt.Sprintf("updater recovery %s %s %s '%s'", d.url, system.image, server, system.bootargs)
	if err := d.vm.send(command); err != nil {
		return err
	}
	if text, err := d.vm.wait(`RIG-STEP recovery exit=\d+\r?\n`, updateLimit, nil); err != nil {
		return err
	} else if !strings.Contains(text, "exit=0") {
		return fmt.Errorf("no recovery system: %q", tail([]byte(text)))
	}
	if err := d.off(); err != nil {
		return err
	}
	if err := d.breakSlots(); err != nil {
		return err
	}
	if err := d.start(); err != nil {
		return err
	}
	text, err := d.vm.wait(system.up+"|RIG-UP", bootLimit, nil)
	if err != nil {
		return err
	}
	if strings.Contains(text, "RIG-UP") || strings.Contains(text, "mounts") {
		return errors.New("the slots are not broken")
	}
	return r.mend(d, system, "2")
}

// breakSlots overwrites the beginning of both.
func (d *device) breakSlots() error {
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	noise := make([]byte, 1<<20)
	d.rng.Read(noise)
	_, err1 := f.WriteAt(noise, slotA)
	_, err2 := f.WriteAt(noise, slotA+slotSize)
	return errors.Join(err1, err2, f.Close())
}

// mend is what the user does: looks at the boot environment, copies an artifact, installs it, and reboots.
func (r *relay) mend(d *device, system recovery, version string) error {
	words, err := r.said("DEVICE", 1)
	if err != nil {
		return err
	}
	r.device = words[0]
	err = r.terminal(d, system.env+"; mendlet env print upgrade_available\nexit\n",
		"mender_boot_part=2\r\n", "upgrade_available=0\r\n")
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(context.Background(), updateLimit)
	defer stop()
	artifact := "v" + version + ".mender"
	there := system.files + "/" + artifact
	if said, err := r.cli(d, ctx, "", "cp", filepath.Join(d.out, artifact), r.device+":"+there); err != nil {
		return fmt.Errorf("mender-cli cp: %w: %q", err, said)
	}
	err = r.terminal(d, system.install+" --running A "+there+"; echo exit=$?\nsync; exit\n", "exit=0\r\n")
	if err != nil {
		return err
	}
	// The machine is gone before mender-cli can know.
	over := make(chan struct{})
	go func() {
		defer close(over)
		r.cli(d, ctx, "reboot -f || echo b > /proc/sysrq-trigger\n", "terminal", r.device) // dracut's has no reboot
	}()
	text, err := d.waitUp(bootLimit, nil)
	stop()
	<-over
	if err == nil {
		err = d.settled(text)
	}
	if err == nil && (d.version != version || d.slot != "3") {
		err = fmt.Errorf("version %s runs from slot %s, want %s from 3", d.version, d.slot, version)
	}
	if err == nil {
		err = d.verdict(version, "committed")
	}
	if err != nil {
		return err
	}
	d.say("a user of the server has mended a board with two broken slots: v%s runs", version)
	return d.off()
}
