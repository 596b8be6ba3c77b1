// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
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
	b := &imageBoard{dir: dir, running: "A", a: filepath.Join(dir, "p2"), b: filepath.Join(dir, "p3"),
		conf: map[string]any{}}
	for _, d := range []string{"conf", "data", "ds"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(dir, "fallback.conf"), "{}")
	writeFile(t, filepath.Join(dir, "ds/device_type"), "device_type=testboard\n")
	writeFile(t, filepath.Join(dir, "fw_env.config"), envOf(dir, boardEnvSize))
	writeFile(t, filepath.Join(dir, "lock"), "")
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
	writeFile(t, filepath.Join(b.dir, "env"), string(envBytes(boardEnvSize, 8, 0, list...))+
		string(envBytes(boardEnvSize, 7, 0, list...)))
}

func (b *imageBoard) config(t testing.TB) string {
	c := map[string]any{"RootfsPartA": b.a, "RootfsPartB": b.b, "FwEnvConfig": filepath.Join(b.dir, "fw_env.config"),
		"BootEnv": "native"}
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
	return &rootfs{c: c, m: &machine{running: running, open: openStorage, sleep: noSleep}, u: u,
		opt: defaultWriteOptions()}
}

func (b *imageBoard) env(t testing.TB) map[string]string {
	env, err := openBootEnv(&config{BootEnv: "native", FwEnvConfig: filepath.Join(b.dir, "fw_env.config")},
		testHost(openStorage))
	if err != nil {
		t.Fatal(err)
	}
	vars, err := env.vars(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return vars
}

// args are those of a command line for this board.
func (b *imageBoard) args(t testing.TB, words ...string) []string {
	args := []string{"mendlet", "-c", b.config(t), "-b", filepath.Join(b.dir, "fallback.conf"), "-d",
		filepath.Join(b.dir, "ds")}
	if b.running != "" {
		args = append(args, "--running", b.running)
	}
	return append(args, words...)
}

// do runs the program on the board.
func (b *imageBoard) do(t testing.TB, in string, words ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = runProgram(context.Background(), b.args(t, words...), strings.NewReader(in), &o, &e)
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
	args := append([]string{"-n", name, "-c", "testboard", "-f", writeTemp(t, "rootfs.img", img), "--compression", "none",
		"-o", path}, more...)
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
	changeJournal(t, filepath.Join(b.dir, "ds"), func(r *record) { *r = *rec })
}

// process is the program as a process of its own, see TestMain.
func (b *imageBoard) process(t *testing.T, words ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
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

// surroundings makes the board's those directories that no option names; a test without files in them needs it not.
func (b *imageBoard) surroundings(t testing.TB) {
	t.Setenv("MENDER_CONF_DIR", filepath.Join(b.dir, "conf"))
	t.Setenv("MENDER_DATA_DIR", filepath.Join(b.dir, "data"))
}
