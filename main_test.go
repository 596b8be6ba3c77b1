// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// imageBoard is a device of image files and directories, on which the whole program runs.
type imageBoard struct {
	dir, running string
	a, b         string // RootfsPartA and B
	conf         map[string]any
}

const boardEnvSize = 0x1000

// newImageBoard runs slot A, partition 2; slot B is partition 3. Slots have 1 MiB.
func newImageBoard(t testing.TB) *imageBoard {
	t.Helper()
	dir := t.TempDir()
	b := &imageBoard{dir: dir, running: "A", a: filepath.Join(dir, "p2"), b: filepath.Join(dir, "p3"), conf: map[string]any{}}
	for _, d := range []string{"conf", "data", "ds"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(dir, "fallback.conf"), "{}")
	writeFile(t, filepath.Join(dir, "ds/device_type"), "device_type=testboard\n")
	env := filepath.Join(dir, "env")
	writeFile(t, filepath.Join(dir, "fw_env.config"), fmt.Sprintf("%s 0 %x\n%s %d %x\n", env, boardEnvSize, env, boardEnvSize, boardEnvSize))
	b.setEnv(t, map[string]string{varBootPart: "2", varBootPartHex: "2"})
	old := oldImage()
	for _, p := range []string{b.a, b.b} {
		if err := os.WriteFile(p, old, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// oldImage is what both slots hold at first: testBlocks but for the head, so that an image of
// those is not there already.
func oldImage() []byte {
	b := testBlocks(1 << 20)
	clear(b[:512])
	return b
}

func (b *imageBoard) setEnv(t testing.TB, vars map[string]string) {
	all := map[string]string{varUpgrade: "0", varBootcount: "0", "bootlimit": "1", varCanaryCheck: "1", varCanary: "1"}
	for k, v := range vars {
		all[k] = v
	}
	var list []string
	for _, k := range slices.Sorted(maps.Keys(all)) {
		list = append(list, k+"="+all[k])
	}
	writeFile(t, filepath.Join(b.dir, "env"), string(envBytes(boardEnvSize, 8, 0, list...))+string(envBytes(boardEnvSize, 7, 0, list...)))
}

func (b *imageBoard) config(t testing.TB) string {
	c := map[string]any{"RootfsPartA": b.a, "RootfsPartB": b.b, "FwEnvConfig": filepath.Join(b.dir, "fw_env.config"), "BootEnv": "native"}
	for k, v := range b.conf {
		c[k] = v
	}
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(b.dir, "conf/mender.conf")
	writeFile(t, path, string(text))
	return path
}

func (b *imageBoard) rootfs(t testing.TB, running string, u *update) *rootfs {
	p := paths{conf: filepath.Join(b.dir, "conf"), data: filepath.Join(b.dir, "data"), ds: filepath.Join(b.dir, "ds")}
	c, err := loadConfig(p, configFile{b.config(t), true}, configFile{filepath.Join(b.dir, "fallback.conf"), true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &rootfs{c: c, m: &machine{running: running, open: openStorage}, u: u, opt: defaultWriteOptions()}
}

func (b *imageBoard) env(t testing.TB) map[string]string {
	env, err := openBootEnv(&config{BootEnv: "native", FwEnvConfig: filepath.Join(b.dir, "fw_env.config")}, openStorage, nil)
	if err != nil {
		t.Fatal(err)
	}
	vars, err := env.vars()
	if err != nil {
		t.Fatal(err)
	}
	return vars
}

// args are those of a command line for this board.
func (b *imageBoard) args(t testing.TB, words ...string) []string {
	args := []string{"mendlet", "-c", b.config(t), "-b", filepath.Join(b.dir, "fallback.conf"), "-d", filepath.Join(b.dir, "ds")}
	if b.running != "" {
		args = append(args, "--running", b.running)
	}
	return append(args, words...)
}

// do runs the program on the board.
func (b *imageBoard) do(t testing.TB, in string, words ...string) (code int, out, errs string) {
	t.Helper()
	b.surroundings(t)
	var o, e bytes.Buffer
	code = run(context.Background(), b.args(t, words...), strings.NewReader(in), &o, &e)
	return code, o.String(), e.String()
}

// must runs a command that has to end with the given code.
func (b *imageBoard) must(t testing.TB, want int, words ...string) (out, errs string) {
	t.Helper()
	code, out, errs := b.do(t, "", words...)
	if code != want {
		t.Fatalf("%q: exit %d, want %d\nstdout: %s\nstderr: %s", words, code, want, out, errs)
	}
	return out, errs
}

// reboot does what the bootloader does: it takes what the environment names.
func (b *imageBoard) reboot(t testing.TB) {
	vars := b.env(t)
	if vars[varUpgrade] == "1" {
		vars[varBootcount] = "1"
		b.setEnv(t, vars)
	}
	b.running = map[string]string{"2": "A", "3": "B"}[vars[varBootPart]]
}

// fallBack does what the bootloader does after a boot that failed.
func (b *imageBoard) fallBack(t testing.TB) {
	b.setEnv(t, map[string]string{varBootPart: "2", varBootPartHex: "2", varBootcount: "2"})
	b.running = "A"
}

// pack makes an artifact for the board.
func (b *imageBoard) pack(t testing.TB, name string, img []byte, more ...string) string {
	t.Helper()
	path := filepath.Join(b.dir, name+".mender")
	args := append([]string{"-n", name, "-c", "testboard", "-f", writeTemp(t, "rootfs.img", img), "--compression", "none", "-o", path}, more...)
	if err := packCommand(args, io.Discard, nil); err != nil {
		t.Fatal(err)
	}
	return path
}

func (b *imageBoard) slotHolds(t testing.TB, path string, img []byte) {
	t.Helper()
	st, err := openStorage(path, openRead)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	got := make([]byte, len(img))
	if err := readUncached(st, got, 0); err != nil || !bytes.Equal(got, img) {
		t.Errorf("%s does not hold the image: %v", path, err)
	}
}

func TestUsage(t *testing.T) {
	b := newImageBoard(t)
	for _, c := range []struct {
		words string
		code  int
		err   string
	}{
		{"", exitUsage, "no verb"},
		{"frobnicate", exitUsage, `unknown verb "frobnicate"`},
		{"--frobnicate status", exitUsage, "frobnicate"},
		{"status --frobnicate", exitUsage, "frobnicate"},
		{"status x", exitUsage, "got 1 words, want 0"},
		{"install", exitUsage, "got 0 words, want 1"},
		{"install a b", exitUsage, "got 2 words, want 1"},
		{"install -- --json", exitFailed, "--json: no such file"},
		{"install x --stop-before", exitUsage, "stop-before"},
		{"install x --progress sometimes", exitUsage, "--progress"},
		{"status --running C", exitUsage, "--running"},
		{"status -l loud", exitUsage, "log level"},
		{"status --log paper", exitUsage, "--log"},
		{"status --json=perhaps", exitUsage, "json"},
		{"env", exitUsage, "usage"},
		{"env print NOT_THERE", exitFailed, "not set"},
		{"env set X", exitUsage, "want NAME=VALUE"},
		{"install /nowhere.mender", exitFailed, "/nowhere.mender"},
		{"install /", exitFailed, "directory"},
		{"plan /nowhere.mender", exitFailed, "/nowhere.mender"},
		{"install -", exitRefused, ""},
		{"plan -", exitRefused, ""},
		{"show -", exitRefused, ""},
		{"status -c /nowhere.conf", exitFailed, "/nowhere.conf"},
		{"--log-file=/nowhere/log status", exitFailed, "/nowhere/log"},
	} {
		code, out, errs := b.do(t, "", strings.Fields(c.words)...)
		if code != c.code || !strings.Contains(errs, c.err) || errs == "" {
			t.Errorf("%q: exit %d, want %d; stderr %q, want %q", c.words, code, c.code, errs, c.err)
		}
		if code == exitUsage && out != "" {
			t.Errorf("%q: a usage error wrote %q to stdout", c.words, out)
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	b := newImageBoard(t)
	for words, want := range map[string]string{
		"--help": "Exit codes:", "-h": "Exit codes:", "--help install": "Exit codes:",
		"install --help": "stop-before", "install x -h": "stop-before", "status -h": "json", "commit --help": "reboot-exit-code",
		"show-artifact --help": "usage: mendlet show-artifact", "env --help": "env print", "pack --help": "",
		"--version": versionString(), "-v": versionString(),
	} {
		if words == "pack --help" && len(packVerbs()) == 0 { // nonet_test.go has this case
			continue
		}
		if out, errs := b.must(t, exitOK, strings.Fields(words)...); !strings.Contains(out, want) || errs != "" {
			t.Errorf("%q: stdout %q, stderr %q, want %q", words, out, errs, want)
		}
	}
	out, _ := b.must(t, exitOK, "--help")
	for _, v := range verbs() {
		if !strings.Contains(out, "\n  "+v.name+" ") {
			t.Errorf("verb %q is not in the help", v.name)
		}
	}
}

// Options go before and after the words, with one dash or two, with "=" or without.
func TestOptionPlaces(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(1000))
	for _, words := range [][]string{
		{"plan", art, "--json"}, {"plan", "--json", art}, {"-q", "plan", "-json", art}, {"plan", "--json=true", "--", art}, {"--", "plan", "--json", art},
		{"plan", "-q", art, "--json", "--running=A"},
	} {
		out, _ := b.must(t, exitOK, words...)
		if !json.Valid([]byte(out)) || !strings.Contains(out, `"release-2"`) {
			t.Errorf("%q: %s", words, out)
		}
	}
	other := filepath.Join(b.dir, "other")
	for _, words := range [][]string{{"-d", other}, {"--data=" + other}, {"--datastore", other}, {"status", "-d=" + other}} {
		if words[0] != "status" {
			words = append(words, "show-artifact")
		}
		b.must(t, exitOK, words...)
	}
	log := filepath.Join(b.dir, "log")
	b.must(t, exitFailed, "install", "/nowhere.mender", "-L", log)
	if text, _ := os.ReadFile(log); !strings.Contains(string(text), "mendlet: error: open /nowhere.mender") {
		t.Errorf("log file: %q", text)
	}
}

// The life of a device, and what is said where: stdout holds the lines of Mender's
// standalone mode, stderr the log.
func TestInstallCommitRollback(t *testing.T) {
	b := newImageBoard(t)
	img1, img2 := testBlocks(300000), testImage(9, 700000)
	first, second := b.pack(t, "release-1", img1), b.pack(t, "release-2", img2)

	out, errs := b.must(t, exitReboot, "install", "--reboot-exit-code", first)
	if want := "Installing artifact...\nInstalled, but not committed.\nUse 'commit' to update, or 'rollback' to roll back the update.\nAt least one payload requested a reboot of the device it updated.\n"; out != want {
		t.Errorf("stdout %q, want %q", out, want)
	}
	if !strings.Contains(errs, "300000 bytes in place") || !strings.HasSuffix(errs, "mendlet: reboot now, then 'mendlet commit' (or 'mendlet rollback')\n") {
		t.Errorf("stderr %q", errs)
	}
	b.slotHolds(t, b.b, img1)
	if v := b.env(t); v[varBootPart] != "3" || v[varBootPartHex] != "3" || v[varUpgrade] != "1" || v[varBootcount] != "0" {
		t.Errorf("environment %v", v)
	}
	// Too early; nothing changes.
	_, errs = b.must(t, exitFailed, "commit")
	if !strings.Contains(errs, "has not been booted") || !strings.Contains(errs, "hint: ") {
		t.Errorf("commit before the reboot: %q", errs)
	}
	b.must(t, exitFailed, "install", second)
	b.reboot(t)
	if out, errs = b.must(t, exitOK, "commit", "--stop-before", "ArtifactCommit_Enter"); out != "" ||
		!strings.Contains(errs, "stopped before ArtifactCommit_Enter; 'mendlet commit' keeps it") {
		t.Errorf("stopped: stdout %q, stderr %q", out, errs)
	}
	if out, _ = b.must(t, exitOK, "commit"); out != "Committed.\n" {
		t.Errorf("stdout %q", out)
	}
	if out, _ = b.must(t, exitOK, "show-artifact"); out != "release-1\n" {
		t.Errorf("show-artifact %q", out)
	}
	if out, _ = b.must(t, exitOK, "show-provides"); !strings.Contains(out, "artifact_name=release-1\n") || !strings.Contains(out, "rootfs-image.checksum=") {
		t.Errorf("show-provides %q", out)
	}

	b.must(t, exitOK, "install", second, "-q")
	b.slotHolds(t, b.a, img2)
	b.reboot(t)
	if out, errs = b.must(t, exitReboot, "rollback", "--reboot-exit-code"); out != "Rolled back.\n" || !strings.Contains(errs, "mendlet: reboot now, to run the system from before\n") {
		t.Errorf("stdout %q, stderr %q", out, errs)
	}
	b.reboot(t)
	if b.running != "B" {
		t.Errorf("runs %s after the rollback", b.running)
	}
	if out, _ = b.must(t, exitOK, "show-artifact"); out != "release-1\n" {
		t.Errorf("after rollback: %q", out)
	}
	b.must(t, exitNothing, "commit")
}

// What is on standard output or in the log is not said once more at the end.
func TestNothingSaidTwice(t *testing.T) {
	b := newImageBoard(t)
	for _, verb := range []string{"commit", "rollback", "resume"} {
		if out, errs := b.must(t, exitNothing, verb); out != "No update in progress.\n" || errs != "" {
			t.Errorf("%s: stdout %q, stderr %q", verb, out, errs)
		}
	}
	art := b.pack(t, "release-2", testBlocks(300000))
	text, err := os.ReadFile(art)
	if err != nil {
		t.Fatal(err)
	}
	text[len(text)/2] ^= 1
	writeFile(t, art, string(text))
	out, errs := b.must(t, exitFailed, "install", art)
	if n := strings.Count(errs, "SHA-256"); n != 1 || !strings.Contains(out, "Streaming failed.\nSystem not modified.\n") {
		t.Errorf("a damaged artifact: the cause is told %d times, want once; stdout %q, stderr %q", n, out, errs)
	}
}

// field case 28: the bootloader went back to the old side by itself.
func TestCommitAfterFallBack(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(100000))
	b.must(t, exitOK, "install", art)
	b.fallBack(t)
	_, errs := b.must(t, exitFailed, "commit")
	if !strings.Contains(errs, "reverted") {
		t.Errorf("stderr %q", errs)
	}
	out, _ := b.must(t, exitOK, "status", "--json")
	var r report
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Last == nil || r.Last.Result != "rolled-back" || r.Update != nil {
		t.Errorf("%v: %s", err, out)
	}
	if v := b.env(t); v[varBootPart] != "2" || v[varUpgrade] != "0" {
		t.Errorf("environment %v", v)
	}
	b.must(t, exitOK, "install", art)
}

// field case 28: upgrade_available is 0 already, but the new side runs: a person committed
// by hand; the side is unknown: nothing is made worse.
func TestCommitWithOddEnvironment(t *testing.T) {
	for _, c := range []struct {
		part, running string
		code          int
		after         string
	}{{"3", "B", exitOK, "3"}, {"7", "none", exitFailed, "2"}} {
		b := newImageBoard(t)
		b.must(t, exitOK, "install", b.pack(t, "release-2", testBlocks(100000)))
		b.setEnv(t, map[string]string{varBootPart: c.part, varBootPartHex: c.part})
		b.running = c.running
		b.must(t, c.code, "commit")
		if v := b.env(t); v[varBootPart] != c.after || v[varUpgrade] != "0" {
			t.Errorf("%+v: environment %v", c, v)
		}
	}
}

// plan names every reason, install stops at the first; both give its exit code, and plan
// changes nothing at all.
func TestPlan(t *testing.T) {
	b := newImageBoard(t)
	good := b.pack(t, "release-2", testBlocks(300000))
	before := snapshot(t, b.dir)
	out, errs := b.must(t, exitOK, "plan", good)
	want := fmt.Sprintf(`artifact: "release-2", type "rootfs-image", compression none
signature: none
for device types: testboard
slots: A %[1]s/p2, B %[1]s/p3; running A
  boot environment: mender_boot_part=2 is slot A (%[1]s/p2)
  --running says slot A (%[1]s/p2)
would write: slot B (%[1]s/p3), 300000 of 1048576 bytes
would change in the boot environment (`, b.dir)
	if !strings.HasPrefix(out, want) || errs != "" {
		t.Errorf("got %q, want %q; stderr %q", out, want, errs)
	}
	if want := "  -mender_boot_part=2\n  +mender_boot_part=3\n  -mender_boot_part_hex=2\n  +mender_boot_part_hex=3\n  -upgrade_available=0\n  +upgrade_available=1\ninstall would go ahead\n"; !strings.HasSuffix(out, want) {
		t.Errorf("got %q, want at the end %q", out, want)
	}
	if after := snapshot(t, b.dir); after != before {
		t.Errorf("plan changed files:\n%s\n%s", before, after)
	}

	bad := b.pack(t, "release-3", testBlocks(2<<20), "-c", "otherboard", "-d", "color:blue")
	bad2 := filepath.Join(b.dir, "bad2.mender")
	if err := packCommand([]string{"-n", "x", "-c", "otherboard", "-f", b.a, "--compression", "none", "-o", bad2}, io.Discard, nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		art     string
		env     map[string]string
		refused []string
	}{
		{bad2, nil, []string{"device"}},
		{bad, nil, []string{"color", "too small: the image has 2097152 bytes, the slot 1048576"}},
		{bad, map[string]string{varBootPart: "2", varUpgrade: "1", varCanary: "0"}, []string{"color", "never saved", "too small"}},
		{good, map[string]string{varBootPart: "3", varUpgrade: "1"}, []string{"already", "do not agree"}},
		{good, map[string]string{varBootPart: "9"}, []string{"neither slot"}},
	} {
		if c.env == nil {
			c.env = map[string]string{varBootPart: "2"}
		}
		b.setEnv(t, c.env)
		code, out, _ := b.do(t, "", "plan", "--json", c.art)
		var p struct{ Refused []string }
		if err := json.Unmarshal([]byte(out), &p); err != nil || code != exitRefused || len(p.Refused) < len(c.refused) {
			t.Errorf("%s, %v: exit %d, %v, %q", c.art, c.env, code, err, p.Refused)
			continue
		}
		for _, w := range c.refused {
			if !slices.ContainsFunc(p.Refused, func(s string) bool { return strings.Contains(s, w) }) {
				t.Errorf("%s, %v: no %q in %q", c.art, c.env, w, p.Refused)
			}
		}
		if got, _, _ := b.do(t, "", "install", c.art); got != code {
			t.Errorf("%s, %v: plan gives %d, install %d", c.art, c.env, code, got)
		}
		b.slotHolds(t, b.b, oldImage())
	}
}

// snapshot lists names, sizes, times and modes below a directory.
func snapshot(t testing.TB, dir string) string {
	var s strings.Builder
	err := filepath.Walk(dir, func(path string, st os.FileInfo, err error) error {
		if err == nil && filepath.Base(path) != "mender.conf" && !st.IsDir() { // the test writes its configuration anew
			fmt.Fprintf(&s, "%s %d %v %v\n", path, st.Size(), st.ModTime(), st.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.String()
}

func TestPlanRefusedList(t *testing.T) {
	b := newImageBoard(t)
	out, _ := b.must(t, exitOK, "plan", "--json", b.pack(t, "release-2", testBlocks(1000)))
	if !strings.Contains(out, `"refused": []`) {
		t.Errorf("no empty list of refusals: %s", out)
	}
	b.must(t, exitOK, "install", b.pack(t, "release-2", testBlocks(1000)))
	out, errs := b.must(t, exitFailed, "plan", b.pack(t, "release-3", testBlocks(1000)))
	if !strings.Contains(out, "refused: an update is in progress") || !strings.Contains(errs, "install would refuse") {
		t.Errorf("%q, %q", out, errs)
	}
}

// The form that programs read.
func TestStatusJSON(t *testing.T) {
	b := newImageBoard(t)
	out, errs := b.must(t, exitOK, "status", "--json")
	want := strings.ReplaceAll(`{
  "running": "A",
  "idle": "B",
  "slots": {
    "A": "DIR/p2",
    "B": "DIR/p3"
  },
  "evidence": [
    "boot environment: mender_boot_part=2 is slot A (DIR/p2)",
    "--running says slot A (DIR/p2)"
  ],
  "boot_environment": {
    "bootcount": "0",
    "bootlimit": "1",
    "mender_boot_part": "2",
    "mender_boot_part_hex": "2",
    "mender_check_saveenv_canary": "1",
    "mender_saveenv_canary": "1",
    "upgrade_available": "0"
  },
  "boot_environment_from": FROM,
  "provides": {
    "artifact_name": "unknown"
  },
  "update": null,
  "last": null
}
`, "DIR", b.dir)
	var r report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	from, _ := json.Marshal(r.EnvFrom)
	if want = strings.ReplaceAll(want, "FROM", string(from)); out != want || errs != "" {
		t.Errorf("got %s, want %s; stderr %q", out, want, errs)
	}
	b.must(t, exitOK, "install", b.pack(t, "release-2", testBlocks(1000)))
	out, _ = b.must(t, exitOK, "status", "--json")
	if !strings.Contains(out, `"update": {
    "artifact": "release-2",
    "type": "rootfs-image",
    "step": "Before_ArtifactCommit_Enter",
    "managed": false,
    "failed": false
  },`) {
		t.Errorf("got %s", out)
	}
	b.reboot(t)
	b.must(t, exitOK, "commit")
	out, _ = b.must(t, exitOK, "status")
	for _, want := range []string{"running B, idle A", "  artifact_name=release-2\n", "update in progress: none\n", `last update: "release-2" committed`} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	writeFile(t, filepath.Join(b.dir, "env"), "garbage")
	out, _ = b.must(t, exitOK, "status", "--json")
	if json.Unmarshal([]byte(out), &r) != nil || r.Problem == "" {
		t.Errorf("a broken environment is not shown: %s", out)
	}
}

func TestEnvVerb(t *testing.T) {
	b := newImageBoard(t)
	b.must(t, exitOK, "env", "set", "one=1 x", "two=2")
	if out, errs := b.must(t, exitOK, "env", "print", "two", "one"); out != "two=2\none=1 x\n" || errs != "" {
		t.Errorf("got %q, %q", out, errs)
	}
	b.must(t, exitOK, "env", "set", "two=")
	if out, _ := b.must(t, exitOK, "env", "print"); strings.Contains(out, "two=") || !strings.Contains(out, "one=1 x\n") {
		t.Errorf("got %q", out)
	}
	// The same binary by its other names.
	cfg := filepath.Join(b.dir, "fw_env.config")
	fw := func(args ...string) (int, string) {
		var out, errs bytes.Buffer
		t.Setenv("MENDER_CONF_DIR", b.dir)
		code := run(t.Context(), args, strings.NewReader(""), &out, &errs)
		return code, out.String()
	}
	if code, _ := fw("/sbin/fw_setenv", "-c", cfg, "three", "a", "b"); code != 0 {
		t.Errorf("fw_setenv: exit %d", code)
	}
	if code, out := fw("fw_printenv", "-c", cfg, "-n", "three"); code != 0 || out != "a b\n" {
		t.Errorf("fw_printenv: exit %d, %q", code, out)
	}
	if code, _ := fw("fw_printenv", "-c", cfg, "four"); code != 1 {
		t.Errorf("fw_printenv of what is not there: exit %d", code)
	}
}

// By the names of Mender's programs everything is as by its own.
func TestOtherNames(t *testing.T) {
	b := newImageBoard(t)
	for _, name := range []string{"mender", "/usr/bin/mender-update"} {
		var out, errs bytes.Buffer
		args := b.args(t, "show-artifact")
		args[0] = name
		if code := run(t.Context(), args, nil, &out, &errs); code != 0 || out.String() != "unknown\n" || errs.Len() > 0 {
			t.Errorf("%s: exit %d, %q, %q", name, code, &out, &errs)
		}
	}
}

func TestProgressOutput(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(1<<20))
	out, _ := b.must(t, exitOK, "install", "--progress", "json", art)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var last map[string]any
	for _, l := range lines {
		if err := json.Unmarshal([]byte(l), &last); err != nil {
			t.Errorf("line %q: %v", l, err)
		}
	}
	if last["event"] != "progress" || last["done"] != float64(1<<20) || last["total"] != last["done"] {
		t.Errorf("got %q", out)
	}
	b.must(t, exitOK, "rollback")
	_, errs := b.must(t, exitOK, "install", "--progress", "lines", art)
	if !strings.Contains(errs, "100 %: 1.0 MB of 1.0 MB written") { // already there
		t.Errorf("got %q", errs)
	}
	b.must(t, exitOK, "rollback")
	if _, errs := b.must(t, exitOK, "-q", "install", art); errs != "" {
		t.Errorf("-q: %q", errs)
	}
}

// Everything to this end of the input fails and leaves the device as it is, over stdin.
func TestInstallFromStdin(t *testing.T) {
	b := newImageBoard(t)
	img := testBlocks(200000)
	art, err := os.ReadFile(b.pack(t, "release-2", img))
	if err != nil {
		t.Fatal(err)
	}
	for _, cut := range []int{0, 100, 5000, 60000, len(art) - 1024} {
		code, out, _ := b.do(t, string(art[:cut]), "install", "-")
		if code == exitOK || !strings.Contains(out, "System not modified.\n") {
			t.Errorf("cut off after %d bytes: exit %d, %q", cut, code, out)
		}
		if v := b.env(t); v[varUpgrade] != "0" || v[varBootPart] != "2" {
			t.Errorf("cut off after %d bytes: %v", cut, v)
		}
	}
	if code, _, errs := b.do(t, string(art), "install", "-"); code != exitOK {
		t.Fatalf("exit %d: %s", code, errs)
	}
	b.slotHolds(t, b.b, img)
}

// A data directory that nothing can be written to: said before anything is done.
func TestInstallReadOnlyState(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(1000))
	if err := os.RemoveAll(filepath.Join(b.dir, "ds")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(b.dir, "ds"), "a file")
	_, errs := b.must(t, exitFailed, "install", art)
	if !strings.Contains(errs, "hint: mendlet keeps its state in") {
		t.Errorf("got %q", errs)
	}
	b.slotHolds(t, b.b, oldImage())
}

// The slot fails in ways that only the whole program meets (field case 23): the close of a
// device reports what its writes could not.
func TestInstallCloseError(t *testing.T) {
	s := newSimSetup(t)
	d := newSimDevice(t, s.dir, s.images)
	a := d.start()
	a.m.open = func(path string, how openMode) (storage, error) {
		st, err := d.w.open(path, how)
		if err == nil && how == openSlot && strings.HasSuffix(path, "p3") && d.w.ops > 2 {
			return closeFails{st}, nil
		}
		return st, err
	}
	err := standalone{a}.install(t.Context(), s.artifacts["new"])
	if exitCode(err) != exitFailed || !strings.Contains(err.Error(), "closing") || !strings.Contains(err.Error(), "input/output error") {
		t.Errorf("got %v", err)
	}
	if v := d.env(); v[varUpgrade] != "0" || v[varBootPart] != "2" {
		t.Errorf("the environment was changed: %v", v)
	}
	if err := d.settle(s.artifacts["next"], "next"); err != nil {
		t.Error(err)
	}
}

type closeFails struct{ storage }

func (closeFails) Close() error { return syscall.EIO }

// field case 13 (CVE-2020-25860): the file on the stick is swapped between check and use.
// It is opened once, and what is written is what was hashed.
func TestFileSwappedWhileInstalling(t *testing.T) {
	b := newImageBoard(t)
	img := testBlocks(300000)
	art := b.pack(t, "release-2", img)
	evil := b.pack(t, "evil", testImage(5, 300000))
	fifo := filepath.Join(b.dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Skip("needs mkfifo: ", err)
	}
	good, err := os.ReadFile(art)
	if err != nil {
		t.Fatal(err)
	}
	var once sync.WaitGroup
	once.Go(func() {
		f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		f.Write(good[:20000]) // the header has been verified with this much
		if err := os.Rename(evil, fifo); err != nil {
			t.Error(err)
		}
		f.Write(good[20000:])
	})
	b.must(t, exitOK, "install", fifo)
	once.Wait()
	b.slotHolds(t, b.b, img)
}

// An update that was rolled back and is tried again: the slot holds the image, so that no more of
// the artifact is needed than its header and the head of the image.
func TestInstallAgain(t *testing.T) {
	for _, comp := range []string{"none", "gzip", "xz"} {
		b := newImageBoard(t)
		img := make([]byte, 1<<20) // does not get smaller
		rand.New(rand.NewSource(3)).Read(img)
		art := b.pack(t, "release-2", img, "--compression", comp)
		b.must(t, exitOK, "install", art)
		b.must(t, exitOK, "rollback")
		whole, err := os.ReadFile(art)
		if err != nil {
			t.Fatal(err)
		}
		cut := writeTemp(t, "cut.mender", whole[:payloadStart(whole)+headSize+maxPacked])
		_, errs := b.must(t, exitOK, "install", cut)
		if want := "of which 0 written and 1048576 already there"; !strings.Contains(errs, want) {
			t.Errorf("%s: got %q, want %q", comp, errs, want)
		}
		b.slotHolds(t, b.b, img)
		if v := b.env(t); v[varUpgrade] != "1" || v[varBootPart] != "3" {
			t.Errorf("%s: environment %v", comp, v)
		}
		b.must(t, exitOK, "rollback")
		img[1<<20-1] ^= 1 // the image is another one in its last byte
		b.must(t, exitOK, "install", b.pack(t, "release-3", img, "--compression", comp))
		b.slotHolds(t, b.b, img)
		b.must(t, exitOK, "rollback")
		if _, errs = b.must(t, exitFailed, "install", cut); !strings.Contains(errs, "EOF") {
			t.Errorf("%s: got %q, want the end to be missed", comp, errs)
		}
	}
}

// Bytes of the payload that change after the header was verified.
func TestPayloadDiffersFromManifest(t *testing.T) {
	b := newImageBoard(t)
	path := b.pack(t, "release-2", testBlocks(300000))
	art, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	art[len(art)/2] ^= 1
	writeFile(t, path, string(art))
	_, errs := b.must(t, exitFailed, "install", path)
	if !strings.Contains(errs, "checksum") && !strings.Contains(errs, "SHA-256") {
		t.Errorf("got %q", errs)
	}
	got, _ := os.ReadFile(b.b)
	if len(bytes.Trim(got[:headSize], "\x00")) > 0 {
		t.Error("the slot looks bootable")
	}
	if v := b.env(t); v[varUpgrade] != "0" {
		t.Error("it was switched to")
	}
}

// Every fixture, made by mender-artifact, by every way of reading it.
func TestFixturesThroughProgram(t *testing.T) {
	for _, name := range []string{"rootfs-gzip", "rootfs-xz", "rootfs-zstd", "rootfs-depends", "rootfs-scripts", "rootfs-signed-rsa", "rootfs-signed-ecdsa",
		"bootstrap", "module-augmented", "module-no-files", "module-scripts-signed", "module-two-files"} {
		t.Run(name, func(t *testing.T) {
			b := newImageBoard(t)
			path := fixtures + name + ".mender"
			if err := os.Truncate(b.b, 4<<20); err != nil {
				t.Fatal(err)
			}
			if key := map[string]string{"rootfs-signed-rsa": "rsa.pub", "rootfs-signed-ecdsa": "ec.pub"}[name]; key != "" {
				b.conf["ArtifactVerifyKeys"] = []string{fixtures + "other.pub", fixtures + key}
			}
			if name == "module-augmented" { // with header-augment, which no client of today takes
				b.must(t, exitRefused, "show", path)
				return
			}
			out, errs := b.must(t, exitOK, "show", path, "--json")
			if !json.Valid([]byte(out)) || errs != "" && name != "module-scripts-signed" {
				t.Errorf("show: %q, %q", out, errs)
			}
			want := exitOK
			if strings.HasPrefix(name, "module") {
				want = exitRefused // there is no such module
			}
			if name == "rootfs-depends" {
				b.must(t, exitRefused, "plan", path)
				b.must(t, exitRefused, "install", path)
				b.provides(t, fixture(t, name+".mender"))
			}
			b.must(t, want, "plan", path)
			b.must(t, want, "install", path)
			if want == exitOK && strings.HasPrefix(name, "rootfs") {
				_, files, err := readAll(fixture(t, name+".mender"), artifactOptions{})
				if err != nil {
					t.Fatal(err)
				}
				b.slotHolds(t, b.b, files["rootfs.img"])
				b.reboot(t)
				b.must(t, exitOK, "commit")
				if out, _ := b.must(t, exitOK, "show-artifact"); out != "release-2\n" {
					t.Errorf("got %q", out)
				}
			}
			if strings.Contains(name, "signed") && want == exitOK {
				b.conf["ArtifactVerifyKeys"] = []string{fixtures + "other.pub"}
				b.must(t, exitRefused, "install", path)
				b.must(t, exitRefused, "install", fixtures+"rootfs-gzip.mender")
				b.conf["ArtifactVerifyKeys"] = []string{"/nowhere.pub"}
				if code, _, _ := b.do(t, "", "install", path); code == exitOK {
					t.Error("installed with a key that cannot be loaded")
				}
			}
		})
	}
}

// provides makes the device one on which the artifact's depends are met.
func (b *imageBoard) provides(t testing.TB, art []byte) {
	t.Helper()
	a, err := openArtifact(bytes.NewReader(art), artifactOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rec := &record{Provides: map[string]string{"artifact_name": "release-1"}}
	for k, values := range a.Depends {
		rec.Provides[k] = values[len(values)-1]
	}
	j, _, err := openJournal(filepath.Join(b.dir, "ds"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer j.st.Close()
	if err := j.save(rec); err != nil {
		t.Fatal(err)
	}
}

// Artifacts that Debian's mender-artifact makes on the spot.
func TestMadeByMenderArtifact(t *testing.T) {
	needTool(t, "mender-artifact")
	r, e := newKeys(t)
	rsaKey, rsaPub := keyPair(t, "RSA PRIVATE KEY", r)
	ecKey, ecPub := keyPair(t, "EC PRIVATE KEY", e)
	img := testImage(3, 900001)
	for i, comp := range []string{"none", "gzip", "lzma"} {
		for _, key := range []string{"", rsaKey, ecKey} {
			b := newImageBoard(t)
			path := filepath.Join(b.dir, "made.mender")
			script := filepath.Join(b.dir, "ArtifactInstall_Enter_01_say")
			ran := filepath.Join(b.dir, "ran")
			writeFile(t, script, "#!/bin/sh\necho yes >"+ran+"\n")
			args := []string{"--compression", comp, "write", "rootfs-image", "-n", "made", "-t", "testboard", "-f", writeTemp(t, "rootfs.ext4", img), "-o", path, "-s", script}
			if key != "" {
				args = append(args, "-k", key)
				b.conf["ArtifactVerifyKey"] = map[string]string{rsaKey: rsaPub, ecKey: ecPub}[key]
			}
			runTool(t, "", "mender-artifact", args...)
			b.must(t, exitOK, "install", path)
			b.slotHolds(t, b.b, img)
			if text, _ := os.ReadFile(ran); string(text) != "yes\n" {
				t.Errorf("%s: the script did not run", comp)
			}
			b.reboot(t)
			b.must(t, exitOK, "commit")
			if i == 0 && key == rsaKey { // signed with a key that is not configured
				b.conf["ArtifactVerifyKey"] = ecPub
				b.must(t, exitRefused, "install", path)
			}
		}
	}
}

// A whole install onto a loop device, as root.
func TestInstallOnLoopDevice(t *testing.T) {
	node, file := loopDevice(t, 4<<20)
	b := newImageBoard(t)
	b.b = node
	num := strings.TrimPrefix(node, "/dev/loop")
	if num == "2" {
		t.Skip("needs another loop device than that of the number 2")
	}
	img := testImage(8, 3<<20+513)
	art := b.pack(t, "release-2", img)
	b.must(t, exitOK, "install", art)
	b.slotHolds(t, node, img)
	if v := b.env(t); v[varBootPart] != num || v[varUpgrade] != "1" {
		t.Errorf("environment %v", v)
	}
	b.must(t, exitOK, "rollback")
	// The same content again: nothing is written.
	_, errs := b.must(t, exitOK, "install", art)
	if want := fmt.Sprintf("of which 0 written and %d already there", len(img)); !strings.Contains(errs, want) {
		t.Errorf("got %q, want %q", errs, want)
	}
	b.must(t, exitOK, "rollback")
	_, errs = b.must(t, exitOK, "install", "--write-all", "--no-read-back", art)
	if want := fmt.Sprintf("of which %d written and 0 already there", len(img)); !strings.Contains(errs, want) {
		t.Errorf("--write-all: got %q, want %q", errs, want)
	}
	b.must(t, exitOK, "rollback")

	refused := func(what string) {
		t.Helper()
		for _, verb := range []string{"plan", "install"} {
			out, errs := b.must(t, exitRefused, verb, art)
			if !strings.Contains(errs, what) {
				t.Errorf("%s: got %q, %q, want %q", verb, out, errs, what)
			}
		}
		if v := b.env(t); v[varUpgrade] != "0" || v[varBootPart] != "2" {
			t.Errorf("%s: environment %v", what, v)
		}
	}
	t.Run("mounted", func(t *testing.T) {
		needTool(t, "mkfs.ext4")
		if out, err := exec.Command("mkfs.ext4", "-q", node).CombinedOutput(); err != nil {
			t.Skipf("needs mkfs.ext4: %v: %s", err, out)
		}
		dir := t.TempDir()
		if out, err := exec.Command("mount", node, dir).CombinedOutput(); err != nil {
			t.Skipf("needs mount: %v: %s", err, out)
		}
		defer exec.Command("umount", dir).Run()
		before, _ := os.ReadFile(file)
		refused("is mounted on")
		after, _ := os.ReadFile(file)
		if !bytes.Equal(before, after) {
			t.Error("a mounted target was written")
		}
	})
	t.Run("busy", func(t *testing.T) {
		f, err := os.OpenFile(node, os.O_RDWR|syscall.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		refused("is busy")
	})
	t.Run("too small", func(t *testing.T) {
		big := b.pack(t, "release-9", testBlocks(4<<20+1))
		out, errs := b.must(t, exitRefused, "install", big)
		if !strings.Contains(errs, "is too small: the image has 4194305 bytes, the slot 4194304: no space left on device") {
			t.Errorf("got %q %q", out, errs)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		ro := attach(t, file, "-r")
		saved := b.b
		b.b = ro
		refused("is read-only")
		b.b = saved
	})
	t.Run("missing", func(t *testing.T) {
		saved := b.b
		b.b = "/dev/mendlet-test-missing9"
		refused("does not exist")
		if _, err := os.Lstat(b.b); err == nil {
			os.Remove(b.b)
			t.Error("a file was made in /dev")
		}
		b.b = saved
	})
	t.Run("a file in /dev", func(t *testing.T) {
		saved := b.b
		b.b = "/dev/mendlet-test-file9"
		writeFile(t, b.b, "left behind by cat")
		defer os.Remove(b.b)
		refused("is not a device")
		b.b = saved
	})
}

// process is the program as a process of its own, see TestMain.
func (b *imageBoard) process(t *testing.T, words ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b.surroundings(t)
	cmd := exec.Command(self, b.args(t, words...)[1:]...)
	cmd.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=1")
	return cmd
}

// start starts a process; its standard error comes line by line.
func (b *imageBoard) start(t *testing.T, words ...string) (*exec.Cmd, io.WriteCloser, *bufio.Scanner) {
	t.Helper()
	cmd := b.process(t, words...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd, in, bufio.NewScanner(errs)
}

func waitLine(t *testing.T, lines *bufio.Scanner, want string) {
	t.Helper()
	for lines.Scan() {
		if strings.Contains(lines.Text(), want) {
			return
		}
	}
	t.Fatalf("no line with %q", want)
}

func exitStatus(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return 0
}

// SIGTERM ends an install from standard input with 75, and the next one goes ahead.
func TestSignalWhileInstalling(t *testing.T) {
	b := newImageBoard(t)
	img := testBlocks(900000)
	if err := os.Truncate(b.b, 8<<20); err != nil {
		t.Fatal(err)
	}
	big := testImage(4, 6<<20)
	art, err := os.ReadFile(b.pack(t, "release-2", big))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		sig  os.Signal
		sent int
	}{"payload": {syscall.SIGTERM, 4 << 20}, "payload, SIGINT": {syscall.SIGINT, 4 << 20}, "header": {syscall.SIGTERM, 700}, "nothing": {syscall.SIGTERM, 0}} {
		t.Run(name, func(t *testing.T) {
			cmd, in, lines := b.start(t, "install", "-l", "debug", "--progress", "lines", "-")
			if _, err := in.Write(art[:c.sent]); err != nil {
				t.Fatal(err)
			}
			if c.sent > 10000 {
				waitLine(t, lines, "written") // a line of progress
			} else {
				waitLocked(t, cmd.Process)
			}
			if err := cmd.Process.Signal(c.sig); err != nil {
				t.Fatal(err)
			}
			for lines.Scan() {
			}
			if code := exitStatus(cmd.Wait()); code != exitTempFail {
				t.Errorf("exit %d, want %d", code, exitTempFail)
			}
			if v := b.env(t); v[varUpgrade] != "0" || v[varBootPart] != "2" {
				t.Errorf("environment %v", v)
			}
			b.must(t, exitOK, "status")
		})
	}
	b.must(t, exitOK, "install", b.pack(t, "release-3", img))
	b.slotHolds(t, b.b, img)
}

// waitLocked waits until a process holds its journal. It asks the kernel (proc_locks(5));
// to try the lock could make the process find it taken.
func waitLocked(t *testing.T, p *os.Process) {
	t.Helper()
	holds := regexp.MustCompile(fmt.Sprintf(`(?m)FLOCK +ADVISORY +WRITE %d `, p.Pid))
	for {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			t.Skip("needs /proc/locks: ", err)
		}
		if holds.Match(locks) {
			return
		}
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid)); err != nil || bytes.Contains(stat, []byte(") Z ")) {
			t.Fatalf("the process has ended: %v %s", err, stat)
		}
	}
}

// field case 29 (rauc#1676): two at once, and one killed while it holds the lock.
func TestTwoAtOnce(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(900000))
	text, err := os.ReadFile(art)
	if err != nil {
		t.Fatal(err)
	}
	cmd, in, _ := b.start(t, "install", "-")
	if _, err := in.Write(text[:500000]); err != nil {
		t.Fatal(err)
	}
	waitLocked(t, cmd.Process)
	for _, words := range [][]string{{"install", art}, {"commit"}, {"rollback"}, {"resume"}} {
		if _, errs := b.must(t, exitTempFail, words...); !strings.Contains(errs, "another mendlet is running") {
			t.Errorf("%q: %q", words, errs)
		}
	}
	// Those that only read go on.
	b.must(t, exitOK, "status")
	b.must(t, exitOK, "show-artifact")
	b.must(t, exitOK, "show-provides")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	b.must(t, exitOK, "install", art)
	b.slotHolds(t, b.b, testBlocks(900000))
}

// stdout that nobody reads is an error and no death by SIGPIPE.
func TestStdoutClosed(t *testing.T) {
	b := newImageBoard(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	cmd := b.process(t, "install", b.pack(t, "release-2", testBlocks(1000)))
	cmd.Stdout = w
	if err := cmd.Run(); err != nil {
		t.Errorf("got %v", err)
	}
	w.Close()
	if v := b.env(t); v[varUpgrade] != "1" {
		t.Error("the install did not finish")
	}
}

// surroundings are the directories that no option names.
func (b *imageBoard) surroundings(t testing.TB) {
	t.Setenv("MENDER_CONF_DIR", filepath.Join(b.dir, "conf"))
	t.Setenv("MENDER_DATA_DIR", filepath.Join(b.dir, "data"))
}

// The manual page has every verb and every option that --help has.
func TestManual(t *testing.T) {
	text, err := os.ReadFile("doc/mendlet.8")
	if err != nil {
		t.Fatal(err)
	}
	man := strings.ReplaceAll(string(text), `\-`, "-")
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	globalFlags(fs, &options{})
	sets := map[string]*flag.FlagSet{"mendlet": fs, "pack": flag.NewFlagSet("", flag.ContinueOnError)}
	for _, v := range verbs() {
		if !strings.Contains(man, v.name) {
			t.Errorf("no verb %s", v.name)
		}
		sets[v.name] = flag.NewFlagSet("", flag.ContinueOnError)
		if v.flags != nil {
			v.flags(sets[v.name], &options{})
		}
	}
	new(packOptions).flags(sets["pack"])
	for name, fs := range sets {
		fs.VisitAll(func(f *flag.Flag) {
			if dashes := strings.Repeat("-", min(len(f.Name), 2)); !regexp.MustCompile(`[ "]` + dashes + f.Name + `\b`).MatchString(man) {
				t.Errorf("%s: no option %s%s", name, dashes, f.Name)
			}
		})
	}
}
