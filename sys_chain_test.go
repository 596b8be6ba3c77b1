// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// loopBoard is a board with two slots on loop devices, a boot environment in a file, and a
// program "reboot" that takes the caller down as a reboot would.
type loopBoard struct {
	*verbBoard
	slots  map[string]string // by partition number
	booted string            // A or B
	boots  int
}

func newLoopBoard(t *testing.T) *loopBoard {
	for _, tool := range []string{"losetup", "unshare", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: loop devices, and a mount over the kernel's boot_id")
	}
	b := &loopBoard{verbBoard: newVerbBoard(t), slots: map[string]string{}}
	for _, num := range []string{"2", "3"} {
		img := filepath.Join(b.dir, "p"+num)
		must(t, os.WriteFile(img, make([]byte, 4<<20), 0o600))
		out, err := exec.Command("losetup", "-f", "--show", img).Output()
		if err != nil {
			t.Skipf("needs loop devices: %v", err)
		}
		loop := strings.TrimSpace(string(out))
		t.Cleanup(func() { exec.Command("losetup", "-d", loop).Run() })
		b.slots[num] = filepath.Join(b.dir, "mmcblk0p"+num) // the name says the number
		must(t, os.Symlink(loop, b.slots[num]))
	}
	vars := map[string]string{"mender_boot_part": "2", "mender_boot_part_hex": "2", "upgrade_available": "0", "bootcount": "0"}
	must(t, os.WriteFile(b.dir+"/env", append(simEnvImage(254, vars), simEnvImage(255, vars)...), 0o600))
	conf := fmt.Sprintf("%s/env 0x0 %#x\n%s/env %#x %#x\n", b.dir, simEnvSize, b.dir, simEnvSize, simEnvSize)
	must(t, os.WriteFile(b.dir+"/fw_env.config", []byte(conf), 0o600))
	must(t, os.WriteFile(b.dir+"/none", fmt.Appendf(nil, `{"FwEnvConfig":%q,"BootEnv":"native"}`, b.dir+"/fw_env.config"), 0o600))
	must(t, os.Mkdir(b.dir+"/bin", 0o755))
	writeScript(t, b.dir+"/bin/reboot", "kill -9 $PPID", 0o755)
	b.fill("2", "release-1")
	b.setup("--rootfs-part-a", b.slots["2"], "--rootfs-part-b", b.slots["3"])
	return b
}

// rootImage begins with its name, by which the boot loader knows what it boots.
func rootImage(name string) []byte {
	return append([]byte(name+"\n"), simImage(int64(len(name)), 3<<20)...)
}

func (b *loopBoard) fill(num, name string) {
	f, err := os.OpenFile(b.slots[num], os.O_WRONLY, 0)
	must(b.t, err)
	_, err = f.Write(rootImage(name))
	must(b.t, errors.Join(err, f.Sync(), f.Close()))
}

func (b *loopBoard) release(name string) []byte {
	img := filepath.Join(b.dir, "root.img")
	must(b.t, os.WriteFile(img, rootImage(name), 0o600))
	b.want(0, "", "pack", "-n", name, "-c", "qemu", "-f", img, "-o", b.dir+"/made.mender")
	text, err := os.ReadFile(b.dir + "/made.mender")
	must(b.t, err)
	return text
}

// boot is Mender's U-Boot logic with bootlimit 1; a root called broken resets the machine.
// It returns the name of the root that comes up.
func (b *loopBoard) boot() string {
	b.t.Helper()
	for range 3 {
		b.boots++
		env, err := os.ReadFile(b.dir + "/env")
		must(b.t, err)
		vars, cur := readSimEnv(env)
		if n, _ := strconv.Atoi(vars["bootcount"]); vars["upgrade_available"] == "1" {
			vars["bootcount"] = strconv.Itoa(n + 1)
			if n >= 1 {
				vars["mender_boot_part"] = map[string]string{"2": "3", "3": "2"}[vars["mender_boot_part"]]
				vars["mender_boot_part_hex"], vars["upgrade_available"] = vars["mender_boot_part"], "0"
			}
			copy(env[(1-cur)*simEnvSize:], simEnvImage(env[cur*simEnvSize+4]+1, vars))
			must(b.t, os.WriteFile(b.dir+"/env", env, 0o600))
		}
		num := vars["mender_boot_part"]
		root, err := os.ReadFile(b.slots[num])
		must(b.t, err)
		name, _, _ := bytes.Cut(root, []byte("\n"))
		if string(name) != "broken" {
			b.booted = map[string]string{"2": "A", "3": "B"}[num]
			return string(name)
		}
	}
	b.t.Fatal("boot loop")
	return ""
}

// run is the real program on the booted system; it ends with killed when it reboots.
func (b *loopBoard) run(exit int, words ...string) string {
	b.t.Helper()
	self, err := os.Executable()
	must(b.t, err)
	id := filepath.Join(b.dir, "boot_id")
	must(b.t, os.WriteFile(id, fmt.Appendf(nil, "boot-%d\n", b.boots), 0o600))
	cmd := exec.Command("unshare", append([]string{"-m", "sh", "-ec", `mount --bind "$1" /proc/sys/kernel/random/boot_id; shift; exec "$@"`,
		"sh", id, self, "-b", b.dir + "/none", "--running", b.booted}, words...)...)
	cmd.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=1", "PATH="+b.dir+"/bin:"+os.Getenv("PATH"))
	out, _ := cmd.CombinedOutput()
	b.t.Logf("%s: %v\n%s", strings.Join(words, " "), cmd.ProcessState, out)
	if got := cmd.ProcessState.ExitCode(); got != exit {
		b.t.Fatalf("%q: got exit code %d, want %d", words, got, exit)
	}
	return string(out)
}

func (b *loopBoard) heard(dep *testDeployment, want string) []testLogMessage {
	b.t.Helper()
	statuses, _, logs := b.server.history(dep)
	if got := strings.Join(statuses, " "); got != want {
		b.t.Fatalf("the server heard %q, want %q", got, want)
	}
	return logs
}

// The whole chain: the program as a process, loop devices, a server, reboots.
func TestFullChain(t *testing.T) {
	b := newLoopBoard(t)
	b.boot()
	if out := b.run(exitTempFail, "run"); !strings.Contains(out, "hint: accept the device") {
		t.Error("no hint for a device that is not accepted")
	}
	b.server.setDevice(boardID, "accepted")
	b.wait()
	dep := b.server.deploy("d-1", "release-2", []string{"qemu"}, b.release("release-2"))
	b.run(killed, "run")
	b.heard(dep, "downloading installing rebooting")
	if name := b.boot(); name != "release-2" || b.booted != "B" {
		t.Fatalf("%s booted from %s", name, b.booted)
	}
	b.run(0, "run")
	b.heard(dep, "downloading installing rebooting installing success")
	if inv := b.server.deviceByID(boardID).inventory; inv["artifact_name"] != "release-2" || inv["mendlet_slot"] != "B" {
		t.Errorf("got inventory %v", inv)
	}

	// One that does not boot; and no reboot without leave.
	dep = b.server.deploy("d-2", "broken", []string{"qemu"}, b.release("broken"))
	b.run(exitReboot, "run", "--no-reboot")
	b.run(exitReboot, "run", "--no-reboot") // the machine has not been down yet
	b.run(killed, "run")
	b.heard(dep, "downloading installing rebooting")
	if name := b.boot(); name != "release-2" || b.booted != "B" {
		t.Fatalf("%s booted from %s", name, b.booted)
	}
	b.run(exitFailed, "run")
	logs := b.heard(dep, "downloading installing rebooting failure")
	if text := fmt.Sprint(logs); !strings.Contains(text, "reverted") || !strings.Contains(text, "rebooting") {
		t.Errorf("the log lacks the cause, or what was said just before the reboot: %v", logs)
	}
	b.run(0, "run")
	if b.run(0, "show-artifact") != "release-2\n" {
		t.Error("want release-2 installed")
	}

	// Cut off while it goes down: the next run of the same boot asks for the reboot again.
	dep = b.server.deploy("d-3", "release-3", []string{"qemu"}, b.release("release-3"))
	b.run(killed, "run")
	b.run(killed, "run")
	if name := b.boot(); name != "release-3" {
		t.Fatalf("%s booted", name)
	}
	b.run(0, "run", "--splay", "1000h") // does not wait with an update open
	b.heard(dep, "downloading installing rebooting installing success")
}
