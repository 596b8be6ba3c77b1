// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// verbBoard is a device of files that the program is run on with all its options, in this
// process. It has an update module and no slots.
type verbBoard struct {
	t      *testing.T
	dir    string
	server *testServer
}

const boardID = `{"mac":"a"}`

func newVerbBoard(t *testing.T) *verbBoard {
	b := &verbBoard{t: t, dir: fastDir(t), server: newTestServer(t, false)}
	for _, d := range []string{"etc", "share/identity", "share/inventory", "share/modules/v3", "var"} {
		must(t, os.MkdirAll(filepath.Join(b.dir, d), 0o755))
	}
	writeScript(t, b.dir+"/share/identity/mender-device-identity", "echo mac=a", 0o755)
	writeScript(t, b.dir+"/share/modules/v3/testmod", testModule, 0o755)
	must(t, os.WriteFile(b.dir+"/none", []byte("{}"), 0o600))
	t.Setenv("MENDER_CONF_DIR", b.dir+"/etc")
	t.Setenv("MENDER_DATA_DIR", b.dir+"/share")
	t.Setenv("MENDER_DATASTORE_DIR", b.dir+"/var")
	return b
}

// call is the program with these words; it returns the exit code and what was printed.
func (b *verbBoard) call(ctx context.Context, words ...string) (code int, out, log string) {
	b.t.Helper()
	var stdout, stderr bytes.Buffer
	code = runProgram(ctx, append([]string{"mendlet", "-b", b.dir + "/none"}, words...), strings.NewReader("secret\n"),
		&stdout, &stderr)
	b.t.Logf("%s: exit code %d\n%s%s", strings.Join(words, " "), code, stdout.String(), stderr.String())
	return code, stdout.String(), stderr.String()
}

// want is call with a check of the exit code and of words in what was said.
func (b *verbBoard) want(code int, says string, words ...string) string {
	b.t.Helper()
	got, out, log := b.call(b.t.Context(), words...)
	if got != code || !strings.Contains(out+log, says) {
		b.t.Fatalf("%q: got exit code %d, want %d and %q", words, got, code, says)
	}
	return out
}

func (b *verbBoard) setup(more ...string) {
	b.t.Helper()
	b.want(0, "", append([]string{"setup", "--server-url", b.server.URL, "--device-type", "qemu"}, more...)...)
}

// wait forgets the wait for the next try.
func (b *verbBoard) wait() {
	changeJournal(b.t, b.dir+"/var", func(r *record) { r.Net.NextTry = time.Time{} })
}

func (b *verbBoard) artifact(name, payload string) []byte {
	file := filepath.Join(b.dir, "payload")
	must(b.t, os.WriteFile(file, []byte(payload), 0o600))
	b.want(0, "", "pack", "-T", "testmod", "-n", name, "-c", "qemu", "-f", file, "-o", b.dir+"/made.mender")
	text, err := os.ReadFile(b.dir + "/made.mender")
	must(b.t, err)
	return text
}

// loopBoard is a board with two slots on loop devices, a boot environment in a file, and a
// program "reboot" that takes the caller down as a reboot would.
type loopBoard struct {
	*verbBoard
	slots  map[string]string // by partition number
	booted string            // A or B
	boots  int

	unshare []string // what else the program does not share with us
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
	vars := map[string]string{"mender_boot_part": "2", "mender_boot_part_hex": "2", "upgrade_available": "0",
		"bootcount": "0"}
	must(t, os.WriteFile(b.dir+"/env", append(simEnvImage(254, vars), simEnvImage(255, vars)...), 0o600))
	conf := fmt.Sprintf("%s/env 0x0 %#x\n%s/env %#x %#x\n", b.dir, simEnvSize, b.dir, simEnvSize, simEnvSize)
	must(t, os.WriteFile(b.dir+"/fw_env.config", []byte(conf), 0o600))
	must(t, os.WriteFile(b.dir+"/none", fmt.Appendf(nil, `{"FwEnvConfig":%q,"BootEnv":"native"}`,
		b.dir+"/fw_env.config"), 0o600))
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
	cmd := exec.Command("unshare", slices.Concat(b.unshare,
		[]string{"-m", "sh", "-ec", `mount --bind "$1" /proc/sys/kernel/random/boot_id; shift; exec "$@"`,
			"sh", id, self, "-b", b.dir + "/none", "--running", b.booted}, words)...)
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
