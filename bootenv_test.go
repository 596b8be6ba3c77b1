// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const testEnvSize = 0x1000

// memDisk is a storage in memory that can go wrong on purpose.
type memDisk struct {
	data          []byte
	writes, syncs int
	onWrite       func(d *memDisk, p []byte, off int64) (int, error)
	syncErr       error
	readErr       error
}

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.readErr != nil {
		return 0, d.readErr
	}
	n := copy(p, d.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *memDisk) WriteAt(p []byte, off int64) (int, error) {
	d.writes++
	if d.onWrite != nil {
		return d.onWrite(d, p, off)
	}
	return copy(d.data[off:], p), nil
}

func (d *memDisk) Sync() error  { d.syncs++; return d.syncErr }
func (d *memDisk) Size() int64  { return int64(len(d.data)) }
func (d *memDisk) Close() error { return nil }

func (d *memDisk) open(path string, how openMode) (storage, error) { return d, nil }

// testHost is a machine on which no time passes.
func testHost(open func(string, openMode) (storage, error)) *envHost {
	return &envHost{open: open, resolve: (&machine{open: open}).resolveDevice, sleep: noSleep}
}

// noSleep is a wait in which no time passes.
func noSleep(ctx context.Context, _ time.Duration) error { return ctx.Err() }

func testNative(config string, copies []envCopy, open func(string, openMode) (storage, error)) *nativeEnv {
	return newNativeEnv(&envConfig{file: config, copies: copies}, testHost(open))
}

// envBytes makes a copy as a boot loader leaves it; flags < 0: without flags byte.
func envBytes(size, flags int, pad byte, entries ...string) []byte {
	b := bytes.Repeat([]byte{pad}, size)
	h := 4
	if flags >= 0 {
		h, b[4] = 5, byte(flags)
	}
	copy(b[h:], strings.Join(append(slices.Clone(entries), "", ""), "\x00"))
	binary.LittleEndian.PutUint32(b, crc32.ChecksumIEEE(b[h:]))
	return b
}

// twoCopies is a disk with copies at 0x400 and 0x2400, and something around them that must
// not change.
func twoCopies(a, b []byte) (*memDisk, *nativeEnv) {
	d := &memDisk{data: bytes.Repeat([]byte{0x5a}, 0x4000)}
	copy(d.data[0x400:], a)
	copy(d.data[0x2400:], b)
	return d, testNative("fw_env.config", []envCopy{{"disk", 0x400, testEnvSize}, {"disk", 0x2400, testEnvSize}}, d.open)
}

func mustVars(t *testing.T, e bootEnv) map[string]string {
	t.Helper()
	m, err := e.vars(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func wantErr(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("got no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q: want %q in it", err, p)
		}
	}
}

// Field case 26: line missing, decimal, negative; and what else people write.
func TestEnvConfig(t *testing.T) {
	good := []struct {
		text string
		want []envCopy
	}{
		{"/dev/mmcblk0 0x400000 0x4000\n", []envCopy{{"/dev/mmcblk0", 0x400000, 0x4000}}},
		{"# c\n\n/dev/mmcblk0\t4194304\t4000 # 0x\r\n", []envCopy{{"/dev/mmcblk0", 0x400000, 0x4000}}},
		{"/dev/mmcblk0boot0 -0x8000 0x4000 0x200 0x20\n/dev/mmcblk0boot0 -16384 0x4000 0x200 0x20 1",
			[]envCopy{{"/dev/mmcblk0boot0", -0x8000, 0x4000}, {"/dev/mmcblk0boot0", -0x4000, 0x4000}}},
		{"/boot/uboot.env 0 0x4000\n  # two files\n/boot/uboot-redund.env 0x0 0x4000\n",
			[]envCopy{{"/boot/uboot.env", 0, 0x4000}, {"/boot/uboot-redund.env", 0, 0x4000}}},
		{"/dev/x 010 5", []envCopy{{"/dev/x", 8, 5}}},
	}
	for _, c := range good {
		got, err := parseEnvConfig("cfg", []byte(c.text))
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q: got %v, %v, want %v", c.text, got, err, c.want)
		}
	}
	bad := map[string]string{
		"":                          `"cfg": no line`,
		"# only\n":                  `"cfg": no line`,
		"/dev/x 0x0\n":              `"cfg", line 1`,
		"\n/dev/x":                  `"cfg", line 2`,
		"/dev/x zero 0x4000":        `offset "zero"`,
		"/dev/x 0b1 0x4000":         `offset "0b1"`,
		"/dev/x 0x1_0 0x4000":       `offset "0x1_0"`,
		"/dev/x 1_0 0x4000":         `offset "1_0"`,
		"/dev/x 0x0 16K":            `size "16K"`,
		"/dev/x 0 -1":               `size "-1"`,
		"/dev/x 0 0":                `size 0x0`,
		"/dev/x 0 4":                `size 0x4`,
		"/dev/x 0 0x100001":         `size 0x100001`,
		"/dev/x 0 1ffffffff":        `size "1ffffffff"`,
		"/dev/x 0 0x4000 huh":       `sector size "huh"`,
		"/dev/x 0 1 2 3 4 5":        `got "/dev/x 0 1 2 3 4 5"`,
		"a 0 10\nb 0 10\nc 0 10":    `got 3 copies`,
		"a 0 10\nb 0 20":            `copies of 0x10 and 0x20`,
		"uboot:\n  size : 0x4000\n": `line 1: got "uboot:"`,
	}
	for text, want := range bad {
		got, err := parseEnvConfig("cfg", []byte(text))
		if err == nil {
			t.Errorf("%q: got %v, want an error", text, got)
			continue
		}
		wantErr(t, err, want)
		if exitCode(err) != exitRefused {
			t.Errorf("%q: exit code %d", text, exitCode(err))
		}
	}
}

// Field case 26: flags 255→0, both equal, one copy bad. The choice is compared with that of
// libubootenv where it is installed.
func TestEnvChoice(t *testing.T) {
	_, lookErr := exec.LookPath("fw_printenv")
	dir := t.TempDir()
	img, cfg := filepath.Join(dir, "env"), filepath.Join(dir, "cfg")
	writeFile(t, cfg, fmt.Sprintf("%s 0 0x200\n%s 0x200 0x200\n", img, img))
	check := func(a, b []byte, want string) {
		t.Helper()
		writeFile(t, img, string(a)+string(b))
		env, err := openBootEnv(&config{BootEnv: "native", FwEnvConfig: cfg}, testHost(openStorage))
		if err != nil {
			t.Fatal(err)
		}
		if got := mustVars(t, env)["copy"]; got != want {
			t.Errorf("flags %d, %d: got copy %q, want %q", a[4], b[4], got, want)
		}
		if lookErr == nil {
			if got := runTool(t, "", "fw_printenv", "-c", cfg, "-n", "copy"); got != want+"\n" {
				t.Errorf("flags %d, %d: libubootenv takes copy %q, want %q", a[4], b[4], got, want)
			}
		}
	}
	for _, f := range []struct {
		a, b int
		want string
	}{
		{0, 0, "1"}, {255, 255, "1"}, {7, 7, "1"}, {0, 1, "2"}, {1, 0, "1"}, {255, 0, "2"}, {0, 255, "1"},
		{254, 255, "2"}, {255, 254, "1"}, {1, 255, "2"}, {255, 1, "1"}, {0, 254, "2"}, {127, 128, "2"}, {200, 3, "1"},
	} {
		check(envBytes(0x200, f.a, 0, "copy=1"), envBytes(0x200, f.b, 0xff, "copy=2"), f.want)
	}
	torn := envBytes(0x200, 9, 0, "copy=1")
	torn[0x1ff] = 1
	check(torn, envBytes(0x200, 3, 0, "copy=2"), "2")
	check(envBytes(0x200, 3, 0, "copy=1"), torn, "1")
}

// runTool runs a program that must succeed, or skips the test if it is not installed.
func runTool(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skip("needs the program " + name)
	}
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, &errs)
	}
	return string(out)
}

// Environments of mkenvimage and fw_setenv are read, and ours by fw_printenv, over several
// changes in turn.
func TestEnvInterop(t *testing.T) {
	t.Parallel()
	for _, redundant := range []bool{false, true} {
		for _, pad := range []string{"0x00", "0xff"} {
			t.Run(fmt.Sprintf("redundant=%v,pad=%s", redundant, pad), func(t *testing.T) {
				dir := t.TempDir()
				img, cfg := filepath.Join(dir, "env"), filepath.Join(dir, "cfg")
				args := []string{"-s", "0x1000", "-p", pad, "-o", img, "-"}
				line := fmt.Sprintf("%s 0x0 0x1000\n", img)
				if redundant {
					args = append([]string{"-r"}, args...)
					line += fmt.Sprintf("%s 8192 1000\n", img)
				}
				runTool(t, "bootcmd=run a; b=c\nmender_boot_part=2\nmender_boot_part_hex=2\n", "mkenvimage", args...)
				if err := os.Truncate(img, 0x4000); err != nil {
					t.Fatal(err)
				}
				writeFile(t, cfg, line)
				host := testHost(openStorage)
				host.sleep = sleepContext // programs of other tests have the same lock
				env, err := openBootEnv(&config{BootEnv: "auto", FwEnvConfig: cfg}, host)
				if err != nil {
					t.Fatal(err)
				}
				want := map[string]string{"bootcmd": "run a; b=c", "mender_boot_part": "2", "mender_boot_part_hex": "2"}
				for i := range 5 {
					if got := mustVars(t, env); !maps.Equal(got, want) {
						t.Fatalf("round %d: got %v, want %v", i, got, want)
					}
					v := fmt.Sprint("value ", i)
					if err := env.set(t.Context(), []envVar{{"mine", v}, {"mender_boot_part", fmt.Sprint(i)},
						{"theirs", ""}}); err != nil {
						t.Fatal(err)
					}
					delete(want, "theirs")
					want["mine"], want["mender_boot_part"] = v, fmt.Sprint(i)
					for n, v := range want {
						if got := runTool(t, "", "fw_printenv", "-c", cfg, "-n", n); got != v+"\n" {
							t.Errorf("round %d: fw_printenv gives %s=%q, want %q", i, n, got, v)
						}
					}
					runTool(t, "", "fw_setenv", "-c", cfg, "theirs", "x y "+v)
					want["theirs"] = "x y " + v
				}
			})
		}
	}
}

// The same on a block device with direct I/O, one copy at an odd offset, one at the end.
func TestEnvBlockDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: losetup")
	}
	dir := t.TempDir()
	img, cfg := filepath.Join(dir, "disk"), filepath.Join(dir, "cfg")
	disk := make([]byte, 1<<20)
	copy(disk[0x4600:], envBytes(testEnvSize, 8, 0, "a=1"))
	copy(disk[1<<20-testEnvSize:], envBytes(testEnvSize, 7, 0, "a=0"))
	writeFile(t, img, string(disk))
	if _, err := exec.LookPath("losetup"); err != nil {
		t.Skip("needs the program losetup")
	}
	out, err := exec.Command("losetup", "-f", "--show", img).Output()
	if err != nil {
		t.Skip("needs a loop device: ", err)
	}
	loop := strings.TrimSpace(string(out))
	defer exec.Command("losetup", "-d", loop).Run()
	writeFile(t, cfg, fmt.Sprintf("%s 0x4600 0x1000\n%s -0x1000 0x1000\n", loop, loop))
	env, err := openBootEnv(&config{BootEnv: "auto", FwEnvConfig: cfg}, testHost(openStorage))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		v := fmt.Sprint("v", i)
		if err := env.set(t.Context(), []envVar{{"a", v}}); err != nil {
			t.Fatal(err)
		}
		if got := mustVars(t, env)["a"]; got != v {
			t.Errorf("got %q, want %q", got, v)
		}
		if got := runTool(t, "", "fw_printenv", "-c", cfg, "-n", "a"); got != v+"\n" {
			t.Errorf("fw_printenv gives %q, want %q", got, v)
		}
	}
}

// Names that are not set, strings that are no variables and their order stay byte for byte;
// of a name that comes twice one is left.
func TestEnvUnknownPreserved(t *testing.T) {
	in := []string{"z=1", "junk", "dup=1", "a=\xff\xfe", "=odd", "dup=2", ".flags=a:sr", "m=x=y"}
	d, env := twoCopies(envBytes(testEnvSize, 255, 0xff, in...), envBytes(testEnvSize, 254, 0, "old=1"))
	before := slices.Clone(d.data)
	if got := mustVars(t, env)["dup"]; got != "2" {
		t.Errorf("dup: got %q, want 2", got)
	}
	if err := env.set(t.Context(), []envVar{{"dup", "3"}, {"new", "a b"}, {"m", ""}, {"absent", ""}}); err != nil {
		t.Fatal(err)
	}
	want := envBytes(testEnvSize, 0, 0, "z=1", "junk", "dup=3", "a=\xff\xfe", "=odd", ".flags=a:sr", "new=a b")
	copy(before[0x2400:], want)
	if !bytes.Equal(d.data, before) {
		t.Errorf("got %q, want %q", d.data[0x2400:0x2460], want[:0x60])
	}
	if d.writes != 1 || d.syncs != 1 {
		t.Errorf("got %d writes and %d syncs, want one of each", d.writes, d.syncs)
	}
	if err := env.set(t.Context(), []envVar{{"dup", "9"}, {"dup", "3"}, {"absent", ""}}); err != nil || d.writes != 1 {
		t.Errorf("setting what is there: got %d writes, %v", d.writes-1, err)
	}
}

// A single copy is written from its CRC to the last byte that changes, whatever the padding.
func TestEnvSingleCopy(t *testing.T) {
	for _, pad := range []byte{0, 0xff} {
		d := &memDisk{data: envBytes(testEnvSize, -1, pad, "a=1", "b=2")}
		longest := 0
		d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) {
			longest = max(longest, int(off)+len(p))
			return copy(d.data[off:], p), nil
		}
		env := testNative("c", []envCopy{{"disk", 0, testEnvSize}}, d.open)
		if err := env.set(t.Context(), []envVar{{"b", "3"}}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(d.data, envBytes(testEnvSize, -1, pad, "a=1", "b=3")) || d.writes != 1 || longest != 11 {
			t.Errorf("padding %#x: got %q, %d writes up to byte %d", pad, d.data[:16], d.writes, longest)
		}
		d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) { return len(p), nil }
		wantErr(t, env.set(t.Context(), []envVar{{"b", "4"}}), `"disk" at 0x0`, "only copy")
	}
}

// Field case 26: both copies bad. Nothing may be built on a default environment.
func TestEnvNoValidCopy(t *testing.T) {
	be := envBytes(testEnvSize, 1, 0, "a=1")
	slices.Reverse(be[:4])
	for _, c := range []struct {
		b    []byte
		want string
	}{
		{make([]byte, testEnvSize), "never written"},
		{bytes.Repeat([]byte{0xff}, testEnvSize), "never written: all bytes are 0xff"},
		{be, "big-endian"},
		{envBytes(testEnvSize, -1, 0, "a=1"), "single copy without flags byte"},
		{bytes.Repeat([]byte{7}, testEnvSize), "CRC: got 0x07070707, computed 0x"},
	} {
		d, env := twoCopies(c.b, c.b)
		err := env.set(t.Context(), []envVar{{"a", "2"}})
		wantErr(t, err, "no valid copy", c.want, `"disk" at 0x400`, `"disk" at 0x2400`)
		if exitCode(err) != exitRefused || hintOf(err) == "" || d.writes != 0 {
			t.Errorf("exit code %d, hint %q, %d writes", exitCode(err), hintOf(err), d.writes)
		}
	}
	d := &memDisk{data: envBytes(testEnvSize, 3, 0, "a=1")}
	_, err := testNative("c", []envCopy{{"disk", 0, testEnvSize}}, d.open).vars(t.Context())
	wantErr(t, err, "one of two redundant copies")
	denied := func(path string, how openMode) (storage, error) {
		return nil, &os.PathError{Op: "open", Path: path, Err: syscall.EACCES}
	}
	_, err = testNative("c", []envCopy{{"disk", 0, testEnvSize}}, denied).vars(t.Context())
	if wantErr(t, err, "permission denied"); !strings.Contains(hintOf(err), "root") {
		t.Errorf("hint: got %q", hintOf(err))
	}
}

// Field part 2, row 6: say which copy is bad and why; once. The next change mends it.
func TestEnvOneBadCopy(t *testing.T) {
	var log bytes.Buffer
	d, env := twoCopies(envBytes(testEnvSize, 5, 0, "a=1"), envBytes(testEnvSize, 6, 0, "a=2"))
	clear(d.data[0x2400+0xc00 : 0x3400]) // nerves_runtime#375: the end of the write is missing …
	d.data[0x2410]++                     // … and differs from what zeros would give
	env.lg = &logger{sinks: []logSink{writerSink(&log)}}
	for range 2 {
		if got := mustVars(t, env)["a"]; got != "1" {
			t.Errorf("got a=%q, want the valid copy's 1", got)
		}
	}
	if s := log.String(); strings.Count(s, "\n") != 1 || !strings.Contains(s, `copy 2 of 2 is not valid`) ||
		!strings.Contains(s, "CRC") {
		t.Errorf("log: got %q, want one line about copy 2", s)
	}
	if err := env.set(t.Context(), []envVar{{"b", "1"}}); err != nil {
		t.Fatal(err)
	}
	if want := envBytes(testEnvSize, 6, 0, "a=1", "b=1"); !bytes.Equal(d.data[0x2400:0x3400], want) {
		t.Error("the bad copy was not replaced")
	}
}

// Field case 22: whatever part of the new copy's 512-byte sectors, or of its bytes, is
// written when power goes, the environment is the old one or the new one.
func TestEnvTornWrite(t *testing.T) {
	old := map[string]string{"a": "1", "long": strings.Repeat("l", 3000)}
	for cut := 0; cut <= testEnvSize; cut += 512 {
		for _, odd := range []int{0, 3, 5, 17} {
			d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1", "long="+old["long"]), envBytes(testEnvSize, 7, 0xff, "a=0"))
			d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) {
				copy(d.data[off:], p[:min(len(p), cut+odd)])
				return 0, errors.New("power cut")
			}
			wantErr(t, env.set(t.Context(), []envVar{{"a", "2"}}), `"disk" at 0x2400`, "power cut",
				`the other copy, "disk" at 0x400, was not touched and is valid`)
			got := mustVars(t, env)
			if cut+odd >= testEnvSize {
				if got["a"] != "2" {
					t.Errorf("complete write: got a=%q", got["a"])
				}
			} else if got["long"] != old["long"] || got["a"] != "1" && got["a"] != "2" {
				t.Errorf("cut at %d: got %v", cut+odd, got)
			}
		}
	}
}

// Field cases 23 and 24: errors of write, sync and read-back, and a write that reports
// success and leaves something else. The old copy stays the current one.
func TestEnvFaults(t *testing.T) {
	eio := syscall.EIO
	for _, c := range []struct {
		name, want string
		fault      func(d *memDisk)
	}{
		{"write", "write: input/output error", func(d *memDisk) {
			d.onWrite = func(*memDisk, []byte, int64) (int, error) { return 0, eio }
		}},
		{"sync", "sync: input/output error", func(d *memDisk) { d.syncErr = eio }},
		{"read-back", "input/output error", func(d *memDisk) {
			d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) { d.readErr = eio; return len(p), nil }
		}},
		{"one bit", "what was written is not what is there", func(d *memDisk) {
			d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) {
				copy(d.data[off:], p)
				d.data[off+0x800] ^= 4
				return len(p), nil
			}
		}},
		{"lost", "what was written is not what is there", func(d *memDisk) {
			d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) { return len(p), nil }
		}},
	} {
		d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), envBytes(testEnvSize, 7, 0, "a=0"))
		c.fault(d)
		err := env.set(t.Context(), []envVar{{"a", "2"}})
		wantErr(t, err, `"disk" at 0x2400`, c.want, `"disk" at 0x400, was not touched and is valid`)
		var touched *envChangeError
		if want := map[bool]int{true: exitFailed, false: exitTempFail}[c.name == "sync"]; exitCode(err) != want ||
			!errors.As(err, &touched) {
			t.Errorf("%s: exit code %d, want %d; %T", c.name, exitCode(err), want, err)
		}
		d.readErr = nil
		if got := mustVars(t, env)["a"]; c.name != "sync" && got != "1" {
			t.Errorf("%s: got a=%q, want 1", c.name, got)
		}
	}
}

// Field case 26: environment full, and what cannot be a name or value.
func TestEnvRefusals(t *testing.T) {
	d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), envBytes(testEnvSize, 7, 0, "a=0"))
	room := testEnvSize - 5 - len("a=1\x00b=\x00\x00")
	for want, vars := range map[string][]envVar{
		"full: got 4092 bytes of variables, there is room for 4091": {{"b", strings.Repeat("x", room+1)}},
		`variable name ""`:        {{"a", "2"}, {"", "x"}},
		`variable name "x=y"`:     {{"x=y", "x"}},
		`variable name "x y"`:     {{"x y", "x"}},
		`variable name "x\x00"`:   {{"x\x00", "x"}},
		`value "1\n2" of "x"`:     {{"x", "1\n2"}},
		`value "1\x00b=2" of "x"`: {{"x", "1\x00b=2"}},
	} {
		err := env.set(t.Context(), vars)
		wantErr(t, err, want)
		if exitCode(err) != exitRefused || d.writes != 0 {
			t.Errorf("%s: exit code %d, %d writes", want, exitCode(err), d.writes)
		}
	}
	if err := env.set(t.Context(), []envVar{{"b", strings.Repeat("x", room)}}); err != nil {
		t.Errorf("the last byte: %v", err)
	}
	mustVars(t, env)
	_, env = twoCopies(envBytes(testEnvSize, 8, 0, strings.Repeat("x", 4091)), envBytes(testEnvSize, 7, 0, "a=0"))
	if _, err := env.vars(t.Context()); err == nil {
		t.Error("data without end: got no error")
	}
}

// Field case 26: both lines equal; and copies that do not fit the device.
func TestEnvPlaces(t *testing.T) {
	d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), nil)
	for _, c := range []struct {
		a, b int64
		want string
	}{
		{0x400, 0x400, "overlap"}, {0x400, 0x13ff, "overlap"}, {0x400, 0x400 - 0x4000, "overlap"},
		{0x400, 0x3001, "do not fit"}, {0x400, -0xfff, "do not fit"}, {-0x4001, 0, "do not fit"},
		{0x400, 1 << 62, "do not fit"},
	} {
		env.copies[0].offset, env.copies[1].offset = c.a, c.b
		err := env.set(t.Context(), []envVar{{"a", "2"}})
		wantErr(t, err, c.want)
		if exitCode(err) != exitRefused || d.writes > 0 {
			t.Errorf("%#x, %#x: exit code %d, %d writes", c.a, c.b, exitCode(err), d.writes)
		}
	}
	copy(d.data[0x2400:], envBytes(testEnvSize, 9, 0, "a=9"))
	env.copies[0].offset, env.copies[1].offset = 0x400, 0x2400-0x4000
	if got := mustVars(t, env)["a"]; got != "9" {
		t.Errorf("negative offset: got a=%q, want 9", got)
	}
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	writeFile(t, a, string(envBytes(testEnvSize, 8, 0, "a=1")))
	if err := os.Symlink(a, b); err != nil {
		t.Fatal(err)
	}
	_, err := testNative("c", []envCopy{{a, 0, testEnvSize}, {b, 0, testEnvSize}}, openStorage).vars(t.Context())
	wantErr(t, err, "overlap")

	missing := filepath.Join(dir, "missing")
	env = testNative("c", []envCopy{{a, 0, testEnvSize}, {missing, 0, testEnvSize}}, openStorage)
	err = env.set(t.Context(), []envVar{{"a", "2"}})
	wantErr(t, err, "no such file")
	if _, serr := os.Stat(missing); serr == nil || hintOf(err) == "" {
		t.Errorf("missing file: got %v, hint %q", serr, hintOf(err))
	}
}

// eMMC boot partitions are unlocked for the write and locked again, and only if they were
// locked (rauc#165).
func TestEnvForceRO(t *testing.T) {
	for _, was := range []string{"1\n", "0\n"} {
		dir := t.TempDir()
		file := filepath.Join(dir, "sys/class/block/mmcblk2boot1", "force_ro")
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, file, was)
		d, env := twoCopies(envBytes(testEnvSize, 8, 0, "a=1"), envBytes(testEnvSize, 7, 0, "a=0"))
		env.root = dir
		for i := range env.copies {
			env.copies[i].path = "/dev/mmcblk2boot1"
		}
		during := ""
		d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) {
			text, err := os.ReadFile(file)
			during = string(text)
			return copy(d.data[off:], p), err
		}
		if err := env.set(t.Context(), []envVar{{"a", "2"}}); err != nil {
			t.Fatal(err)
		}
		after, _ := os.ReadFile(file)
		if strings.TrimSpace(during) != "0" || strings.TrimSpace(string(after)) != strings.TrimSpace(was) {
			t.Errorf("force_ro %q: got %q during the write and %q after it", was, during, after)
		}
	}
}

// Field case 29: another program holds the lock that U-Boot's tools use; and there is no
// place for such a file.
func TestEnvLock(t *testing.T) {
	dir := t.TempDir()
	img := filepath.Join(dir, "env")
	writeFile(t, img, string(envBytes(testEnvSize, -1, 0, "a=1")))
	for _, lockFile := range []string{filepath.Join(dir, "lock"), filepath.Join(dir, "nodir", "lock")} {
		env := testNative("c", []envCopy{{img, 0, testEnvSize}}, openStorage)
		env.lockFile = lockFile
		unlock, err := env.lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		held := lockFile
		if _, err := os.Stat(lockFile); err != nil {
			held = img
		}
		f, err := os.Open(held)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); err != syscall.EWOULDBLOCK {
			t.Errorf("%q is not locked: %v", held, err)
		}
		forked(t, held)
		unlock()
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			t.Errorf("%q is still locked: %v", held, err)
		}
	}
}

// fakeTools puts shell programs into a directory that becomes all of PATH but sh's own.
func fakeTools(t *testing.T, tools map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, script := range tools {
		path := filepath.Join(dir, name)
		writeFile(t, path, "#!/bin/sh\nPATH=/bin:/usr/bin\nstate="+dir+"/state\necho \"$0 $*\" >>"+dir+"/calls\n"+script)
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	return dir
}

const (
	printScript = "cat \"$state\"\n"
	// what grub-mender-grubenv-set and libubootenv do with "name=value"
	equalScript = "while read -r l; do n=${l%%=*}; case $l in *=*) ;; *) continue ;; esac\n" +
		"grep -v \"^$n=\" \"$state\" >\"$state.new\"; [ \"$l\" = \"$n=\" ] || echo \"$l\" >>\"$state.new\"; mv " +
		"\"$state.new\" \"$state\"; done\n"
	// what U-Boot's own does with "name value"
	spaceScript = "while read -r n v; do\n" +
		"case $n in *=*) exit 1 ;; esac\n" +
		"grep -v \"^$n=\" \"$state\" >\"$state.new\"; [ -z \"$v\" ] || echo \"$n=$v\" >>\"$state.new\"; mv \"$state.new\" " +
		"\"$state\"; done\n"
)

// Spec 7.2: one call for the whole set, with the lines' form found out first, and the result
// read back.
func TestEnvTools(t *testing.T) {
	for _, c := range []struct {
		name, mode, print, set, script string
		calls                          int // of the set program
	}{
		{"grub", "grub", "grub-mender-grubenv-print", "grub-mender-grubenv-set", equalScript, 1},
		{"libubootenv", "fw_setenv", "fw_printenv", "fw_setenv", equalScript, 2},
		{"u-boot", "fw_setenv", "fw_printenv", "fw_setenv", spaceScript, 2},
		{"auto: grub", "auto", "grub-mender-grubenv-print", "grub-mender-grubenv-set", equalScript, 1},
		{"auto: fw_setenv", "auto", "fw_printenv", "fw_setenv", spaceScript, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := fakeTools(t, map[string]string{c.print: printScript, c.set: c.script})
			writeFile(t, dir+"/state", "keep=me\nmender_boot_part=2\nupgrade_available=0\n")
			env, err := openBootEnv(&config{BootEnv: c.mode, FwEnvConfig: dir + "/none"}, testHost(openStorage))
			if err != nil {
				t.Fatal(err)
			}
			vars := []envVar{{"mender_boot_part", "3"}, {"upgrade_available", "1"}, {"bootcount", "0"}}
			for range 2 { // the second time nothing changes and nothing is called
				if err := env.set(t.Context(), vars); err != nil {
					t.Fatal(err)
				}
			}
			want := map[string]string{"keep": "me", "mender_boot_part": "3", "upgrade_available": "1", "bootcount": "0"}
			if got := mustVars(t, env); !maps.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
			calls, _ := os.ReadFile(dir + "/calls")
			if got := strings.Count(string(calls), "/"+c.set+" "); got != c.calls {
				t.Errorf("got %d calls of %s, want %d:\n%s", got, c.set, c.calls, calls)
			}
			if c.mode == "fw_setenv" && !strings.Contains(string(calls), "fw_setenv -c "+dir+"/none -s -\n") {
				t.Errorf("want -c FILE in calls:\n%s", calls)
			}
		})
	}
}

func TestEnvToolsFail(t *testing.T) {
	open := func(print, set string) bootEnv {
		dir := fakeTools(t, map[string]string{"my-print": print, "my-set": set})
		writeFile(t, dir+"/state", "a=1\n")
		env, err := openBootEnv(&config{BootEnv: "auto", BootUtilitiesGetNextActivePart: "my-print",
			BootUtilitiesSetActivePart: "my-set"}, testHost(openStorage))
		if err != nil {
			t.Fatal(err)
		}
		return env
	}
	set := []envVar{{"a", "2"}}
	wantErr(t, open(printScript, "cat >/dev/null\n").set(t.Context(), set), "reported success", `a is "1", want "2"`)
	wantErr(t, open(printScript, "echo no space >&2; exit 3\n").set(t.Context(), set), "my-set",
		"exit status 3", "no space")
	// "Cannot read environment, using default" with exit 0, where /etc/u-boot-initial-env is
	// installed: then fw_setenv would make the defaults real (hub 7370).
	for _, says := range []string{"Cannot read environment, using default",
		"Warning: Bad CRC, using default environment"} {
		env := open("echo '"+says+"' >&2; "+printScript, equalScript)
		_, err := env.vars(t.Context())
		wantErr(t, err, "no valid copy", says)
		wantErr(t, env.set(t.Context(), set), "no valid copy")
	}
}

// The real libubootenv through the tools' way.
func TestEnvToolsReal(t *testing.T) {
	dir := t.TempDir()
	cfg := filepath.Join(dir, "cfg")
	writeFile(t, cfg, dir+"/env 0 1000\n"+dir+"/env 0x1000 1000\n")
	runTool(t, "keep=me\n", "mkenvimage", "-r", "-s", "0x1000", "-o", dir+"/env", "-")
	if err := os.Truncate(dir+"/env", 0x2000); err != nil {
		t.Fatal(err)
	}
	runTool(t, "", "fw_printenv", "-c", cfg)
	env, err := openBootEnv(&config{BootEnv: "fw_setenv", FwEnvConfig: cfg}, testHost(openStorage))
	if err != nil {
		t.Fatal(err)
	}
	if err := env.set(t.Context(), []envVar{{"a", "x y=z"}, {"b", "1"}}); err != nil {
		t.Fatal(err)
	}
	if err := env.set(t.Context(), []envVar{{"b", ""}}); err != nil {
		t.Fatal(err)
	}
	if got, want := mustVars(t, env), map[string]string{"keep": "me", "a": "x y=z"}; !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestOpenBootEnv(t *testing.T) {
	dir := fakeTools(t, nil)
	cfg := dir + "/fw_env.config"
	open := func(mode, text string) (bootEnv, error) {
		os.Remove(cfg)
		if text != "" {
			writeFile(t, cfg, text)
		}
		return openBootEnv(&config{BootEnv: mode, FwEnvConfig: cfg}, testHost(openStorage))
	}
	_, err := open("auto", "")
	wantErr(t, err, "native", "grub-mender-grubenv-print", "fw_printenv", cfg)
	if hintOf(err) == "" || exitCode(err) != exitRefused {
		t.Errorf("hint %q, exit code %d", hintOf(err), exitCode(err))
	}
	_, err = open("auto", "garbage\n")
	wantErr(t, err, cfg, "line 1")
	_, err = open("other", "")
	wantErr(t, err, `"other"`)
	_, err = open("native", "/dev/null 0 1000\n") // a character device, as /dev/mtd0 is
	wantErr(t, err, `"/dev/null" is a character device`)
	_, err = open("auto", "/dev/mtd77 0 1000\n")
	wantErr(t, err, `"/dev/mtd77" is a character device`, "fw_printenv")
	for _, p := range []string{"/dev/mtdblock77", "/dev/ubiblock0_77"} {
		if (envCopy{path: p}).isCharDevice() {
			t.Errorf("%q taken for a character device", p)
		}
	}

	// No valid copy: the tools, though there, must not be asked, and nothing is written.
	fakeTools(t, map[string]string{"fw_printenv": printScript, "fw_setenv": equalScript})
	writeFile(t, dir+"/env", strings.Repeat("\xff", testEnvSize))
	env, err := open("auto", dir+"/env 0 1000\n")
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, env.set(t.Context(), []envVar{{"a", "1"}}), "no valid copy")
	if env, err = open("auto", "/dev/ubi0:env 0 1000\n"); err != nil || !strings.HasPrefix(env.String(), "tools") {
		t.Errorf("UBI volume: got %v, %v, want the tools", env, err)
	}

	// GRUB, with a fw_env.config left from somewhere else.
	fakeTools(t, map[string]string{"grub-mender-grubenv-print": printScript, "grub-mender-grubenv-set": equalScript})
	for _, text := range []string{"", "garbage\n", dir + "/missing 0 1000\n"} {
		if env, err = open("auto", text); err != nil || !strings.Contains(env.String(), "grub-mender-grubenv-set") {
			t.Errorf("%q: got %v, %v, want grub's tools", text, env, err)
		}
	}
	if env, err = open("auto", dir+"/env 0 1000\n"+dir+"/env 0x1000 1000\n"); err != nil ||
		env.String() != fmt.Sprintf("native, %q at 0x0 and 0x1000", dir+"/env") {
		t.Errorf("got %v, %v, want native", env, err)
	}
}

// A link fw_setenv to mendlet must not make it call itself for ever.
func TestEnvToolIsSelf(t *testing.T) {
	dir := fakeTools(t, nil)
	self, err := os.Executable()
	if err != nil {
		t.Skip("needs /proc: ", err)
	}
	for _, n := range []string{"fw_printenv", "fw_setenv"} {
		if err := os.Symlink(self, filepath.Join(dir, n)); err != nil {
			t.Fatal(err)
		}
	}
	_, err = openBootEnv(&config{BootEnv: "fw_setenv"}, testHost(openStorage))
	wantErr(t, err, "mendlet itself")
}

func TestEnvCommand(t *testing.T) {
	_, env := twoCopies(envBytes(testEnvSize, 8, 0, "b=2 x", "a=1"), nil)
	run := func(args ...string) (string, error) {
		var out bytes.Buffer
		err := envCommand(t.Context(), args, env, &out)
		return out.String(), err
	}
	if _, err := run("set", "c=x=y", "a="); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		"b=2 x\nc=x=y\n": {"print"},
		"c=x=y\nb=2 x\n": {"print", "c", "b"},
		"2 x\n":          {"print", "-n", "b"},
	} {
		if got, err := run(args...); got != want || err != nil {
			t.Errorf("%q: got %q, %v, want %q", args, got, err, want)
		}
	}
	got, err := run("print", "a", "b")
	if got != "b=2 x\n" || exitCode(err) != exitFailed {
		t.Errorf("missing variable: got %q, %v", got, err)
	}
	wantErr(t, err, `"a"`)
	for _, args := range [][]string{nil, {"set"}, {"get"}, {"set", "x", "y"}} {
		if _, err := run(args...); exitCode(err) != exitUsage {
			t.Errorf("%q: got %v, want a usage error", args, err)
		}
	}
}

func TestFwCommand(t *testing.T) {
	dir := t.TempDir()
	cfg := dir + "/cfg"
	writeFile(t, dir+"/env", string(envBytes(testEnvSize, -1, 0xff, "a=1", "b=2")))
	writeFile(t, cfg, dir+"/env 0 1000\n")
	writeFile(t, dir+"/script", "# comment\n\n  a\t one  two=3 \r\nb=four five\nc\nd \ne=\nf = x\n")
	for _, c := range []struct {
		line, stdin, out, err string
		code                  int
	}{
		{"fw_printenv -c CFG", "", "a=1\nb=2\n", "", 0},
		{"/sbin/fw_printenv -cCFG -n b", "", "2\n", "", 0},
		{"fw_printenv a -n --config=CFG", "", "1\n", "", 0},
		{"fw_printenv --config CFG -l /tmp a nope b", "", "a=1\nb=2\n", "## Error: \"nope\" not defined\n", 1},
		{"fw_printenv -x", "", "", fwUsage, 1},
		{"fw_printenv -c", "", "", fwUsage, 1},
		{"fw_printenv -h", "", fwUsage, "", 0},
		{"fw_setenv -c CFG", "", "", fwUsage, 1},
		{"fw_setenv -c CFG g -1 -c x", "", "", "", 0},
		{"fw_printenv -c CFG -n g", "", "-1 -c x\n", "", 0},
		{"fw_setenv -c CFG -- g", "", "", "", 0},
		{"fw_printenv -c CFG", "", "a=1\nb=2\n", "", 0},
		{"fw_setenv -c CFG -s DIR/script", "", "", "", 0},
		{"fw_printenv -c CFG", "", "a=one  two=3 \nb=four five\nf== x\n", "", 0},
		{"fw_setenv --script - -c CFG", "f\nb 9\n", "", "", 0},
		{"fw_printenv -c CFG -n b", "", "9\n", "", 0},
		{"fw_printenv -c DIR/none", "", "", "mendlet: error: ", 1},
		{"fw_setenv -c CFG x=y z", "", "", "mendlet: error: ", 1},
		{"fw_setenv -c CFG -s DIR/none", "", "", "mendlet: error: ", 1},
	} {
		line := strings.NewReplacer("CFG", cfg, "DIR", dir).Replace(c.line)
		args := strings.Fields(line)
		var out, errs bytes.Buffer
		open := func(c *config, lg *logger) (bootEnv, error) {
			h := testHost(openStorage)
			h.lg = lg
			return openBootEnv(c, h)
		}
		code := fwCommand(t.Context(), args[0], args[1:], defaultConfig(paths{}), open,
			strings.NewReader(c.stdin), &out, &errs,
			&logger{level: levelWarning, sinks: []logSink{writerSink(&errs)}})
		if code != c.code || out.String() != c.out || !strings.HasPrefix(errs.String(), c.err) ||
			c.err == "" && errs.Len() > 0 {
			t.Errorf("%s: got %d, %q, %q, want %d, %q, %q", c.line, code, &out, &errs, c.code, c.out, c.err)
		}
	}
}

func FuzzEnvConfig(f *testing.F) {
	f.Add("/dev/mmcblk0 0x400000 0x4000\n/dev/mmcblk0 -0x4000 0x4000 0x200 0x20 # x\n")
	f.Add("/dev/mtd1 0 4000 0x10000 2 1\n")
	f.Fuzz(func(t *testing.T, text string) {
		copies, err := parseEnvConfig("f", []byte(text))
		if err != nil {
			return
		}
		again := ""
		for _, c := range copies {
			if c.size < envSizeMin || c.size > envSizeMax || c.path == "" {
				t.Fatalf("accepted %v", c)
			}
			if off, err := c.locate(1 << 30); err == nil && (off < 0 || off+c.size > 1<<30) {
				t.Fatalf("%v located at %d", c, off)
			}
			again += fmt.Sprintf("%s %#x %#x\n", c.path, c.offset, c.size)
		}
		if got, err := parseEnvConfig("f", []byte(again)); err != nil || !slices.Equal(got, copies) || len(copies) > 2 {
			t.Fatalf("%q again: got %v, %v, want %v", again, got, err, copies)
		}
	})
}

func FuzzEnvImage(f *testing.F) {
	f.Add(envBytes(64, 1, 0, "a=1", "b"), "a", "2")
	f.Add(envBytes(64, -1, 0xff), "x", "")
	f.Add([]byte("\x00\x00\x00\x00\x00"), "x", "y")
	f.Fuzz(func(t *testing.T, raw []byte, name, value string) {
		if len(raw) < envSizeMin {
			return
		}
		for h := range 2 {
			checkEnvImage(raw, 4+h)
		}
		entries, err := parseEnv(raw[5:])
		if err != nil {
			return
		}
		again := make([]byte, len(raw)-5)
		if err := formatEnv(again, entries, 0xff); err != nil {
			t.Fatalf("what was read does not fit: %v", err)
		}
		if got, err := parseEnv(again); err != nil || !slices.Equal(got, entries) {
			t.Fatalf("got %q, %v, want %q", got, err, entries)
		}
		v := []envVar{{name, value}}
		if checkEnvVars(v) != nil {
			return
		}
		once := changeEnv(entries, v)
		if !slices.Equal(changeEnv(once, v), once) {
			t.Fatalf("a second change changes more: %q", once)
		}
		if formatEnv(again, once, 0) == nil {
			if got, err := parseEnv(again); err != nil || !slices.Equal(got, once) {
				t.Fatalf("got %q, %v, want %q", got, err, once)
			}
		}
	})
}
