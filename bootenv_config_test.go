// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// documentedYAML is the example of libubootenv's documentation (docs/fw_env_config.md), on block devices.
const documentedYAML = `
uboot:
  size : 0x4000
  lockfile : /var/lock/fw_printenv.lock
  writelist:
    - var1:sw
    - var2:sr
    - var3:dw
  devices:
    - path : /dev/mmcblk0
      offset : 0xA0000
      sectorsize : 0x10000
      unlock : yes
    - path : /dev/mmcblk0
      offset : 0xB0000
      sectorsize : 0x10000
      disablelock : yes

appvar:
  size : 0x4000
  lockfile : /var/lock/appvar.lock

  devices:
    - path : /dev/mmcblk1
      offset : 0
      sectorsize : 0x10000
      unlock : yes
    - path : /dev/mmcblk1
      offset : 0x10000
      sectorsize : 0x10000
`

func TestEnvYAML(t *testing.T) {
	uboot := &envConfig{file: "f", name: "uboot", copies: []envCopy{{"/dev/mmcblk0", 0xa0000, 0x4000},
		{"/dev/mmcblk0", 0xb0000, 0x4000}},
		lockFile: "/var/lock/fw_printenv.lock", writable: []string{"var1", "var3"}}
	appvar := &envConfig{file: "f", name: "appvar", copies: []envCopy{{"/dev/mmcblk1", 0, 0x4000},
		{"/dev/mmcblk1", 0x10000, 0x4000}},
		lockFile: "/var/lock/appvar.lock"}
	one := []*envConfig{{file: "f", name: "a", copies: []envCopy{{"/boot/uboot.env", -0x4000, 16384}}}}
	for name, c := range map[string]struct {
		text string
		want []*envConfig
	}{
		"as documented": {documentedYAML, []*envConfig{uboot, appvar}},
		"CRLF":          {strings.ReplaceAll(documentedYAML, "\n", "\r\n"), []*envConfig{uboot, appvar}},
		"comments": {"# c\n---\na:   # c\n # c\n  size: 16384 # c\n  devices:\n    # c\n    - path: " +
			"/boot/uboot.env\n      offset: -0x4000\n", one},
		"list at the key": {"a:\n  devices:\n  - path: /boot/uboot.env\n    offset: -0x4000\n  size: 0x4000\n", one},
		"quotes": {"a:\n size: '0x4000'\n devices:\n  -   offset: -0x4000\n      path: \"/boot/uboot.env\"\n",
			one},
		"octal": {"a:\n size: 040000\n devices:\n  - path: /boot/uboot.env\n    offset: -040000\n", one},
		"a mark in the path": {"a:\n size: 0x4000\n devices:\n - path: /b#c:d\n",
			[]*envConfig{{file: "f", name: "a", copies: []envCopy{{"/b#c:d", 0, 0x4000}}}}},
		"empty writelist": {"a:\n size: 0x4000\n writelist:\n devices:\n - path: /b\n",
			[]*envConfig{{file: "f", name: "a", copies: []envCopy{{"/b", 0, 0x4000}}}}},
	} {
		if got, err := parseEnvYAML("f", c.text); err != nil || !reflect.DeepEqual(got, c.want) ||
			!isEnvYAML([]byte(c.text)) {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, c.want)
		}
	}
	const good = "a:\n size: 0x4000\n devices:\n  - path: /b\n"
	for text, want := range map[string]string{
		"---\n":                             "no environment in it",
		"a: 1\n":                            `line 1: got "a1", want the name of an environment`,
		"- a:\n":                            `line 1: got "a", want the name of an environment`,
		"{a: 1}\n":                          "line 1: got",
		"a: &x\n":                           `value "&x"`,
		"  size: 5\n":                       "want the name of an environment first",
		"a:\n":                              `"a": size is missing`,
		"a:\n size: 0x4000\n":               `got 0 devices`,
		good + "a:\n size: 5\n":             `environment "a" comes twice`,
		good + " size: 0x4000\n":            "size comes twice",
		good + " sizes: 0x4000\n":           `got "sizes0x4000", want one of size`,
		good + "    path: /c\n":             "path comes twice",
		good + "    name: /c\n":             "want one of path",
		good + "   offset: 1\n":             "fits nothing",
		good + "     offset: 1\n":           "fits nothing",
		good + " - path: /c\n":              "fits nothing",
		good + "   - path: /c\n":            "fits nothing",
		good + "    offset: 0b1\n":          `offset "0b1"`,
		good + "    offset: |\n":            `value "|"`,
		good + "    offset:\t1\n":           "a tab",
		good + "    offset: 'it''s'\n":      "want quotes around all",
		good + "    offset: a: b\n":         "want one word",
		good + "  - offset: 1\n":            "device 2: path is missing",
		good + "  - path: /c\n  - path: /d": "got 3 devices",
		good + "  - path:\n":                "path: got none",
		good + "  -\n":                      "want KEY: VALUE",
		good + " writelist:\n  - a\n":       "want NAME:FLAGS",
		good + " writelist: a:sw\n":         "want a list below it",
		good + " lockfile:\n":               "want a value",
		"a:\n size: 4\n":                    "size 0x4",
		"a:\n size: 16k\n":                  `size "16k"`,
		"a:\n devices: /b\n":                "want a list below it",
		"a:\n   size: 5\n b: 1\n":           "fits nothing",
		good + "b: \"c\n":                   "want quotes around all",
	} {
		got, err := parseEnvYAML("f", text)
		if err == nil {
			t.Errorf("%q: got %+v, want an error", text, got)
			continue
		}
		if wantErr(t, err, want, `"f"`); exitCode(err) != exitRefused {
			t.Errorf("%q: exit code %d", text, exitCode(err))
		}
	}
}

// Which environment of several: the one asked for, the boot loader's, the first.
func TestEnvNamespace(t *testing.T) {
	cfg := writeTemp(t, "fw_env.config", []byte(documentedYAML))
	lines := writeTemp(t, "lines", []byte("/dev/x 0 0x4000\n"))
	h := testHost(openStorage)
	h.root = t.TempDir()
	check := func(file, name, want, wantErrText string) {
		t.Helper()
		got, err := readEnvConfig(file, name, h)
		if wantErrText != "" {
			if wantErr(t, err, wantErrText); exitCode(err) != exitRefused {
				t.Errorf("exit code %d", exitCode(err))
			}
		} else if err != nil || got.name != want {
			t.Errorf("%q: got %+v, %v, want %q", name, got, err, want)
		}
	}
	check(cfg, "", "uboot", "")
	check(cfg, "appvar", "appvar", "")
	check(cfg, "other", "", `got the environments ["uboot" "appvar"], want the one asked for, "other"`)
	check(lines, "", "", "")
	check(lines, "uboot", "", "no environments by name")
	chosen := h.root + chosenEnv
	if err := os.MkdirAll(filepath.Dir(chosen), 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, chosen, "appvar\x00")
	check(cfg, "", "appvar", "")
	check(cfg, "uboot", "uboot", "")
	check(lines, "", "", "")
	writeFile(t, chosen, "gone\x00")
	check(cfg, "", "", "in the device tree, \"gone\"")
}

// The whole way, by both names of the program, with a lock file of its own; and what the boot loader does
// not take is not written.
func TestEnvYAMLFile(t *testing.T) {
	dir := t.TempDir()
	cfg := filepath.Join(dir, "cfg")
	writeFile(t, cfg, fmt.Sprintf("uboot:\n  size: 0x1000\n  lockfile: %[1]s/lock\n  writelist:\n  - a:sw\n  - "+
		"once:so\n  devices:\n"+
		"  - path: %[1]s/env\n    offset: 0\n  - path: %[1]s/env\n    offset: 0x1000\nmore:\n  size: 0x1000\n  "+
		"devices:\n  - path: %[1]s/more\n    offset: 0\n", dir))
	writeFile(t, dir+"/env", string(envBytes(0x1000, 1, 0, "a=1", "once=1"))+string(envBytes(0x1000, 0, 0, "a=0")))
	writeFile(t, dir+"/more", string(envBytes(0x1000, -1, 0, "b=1")))
	env, err := openBootEnv(&config{FwEnvConfig: cfg}, testHost(openStorage))
	if err != nil {
		t.Fatal(err)
	}
	if err := env.set(t.Context(), []envVar{{"a", "2"}}); err != nil || mustVars(t, env)["a"] != "2" {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(dir + "/lock"); err != nil {
		t.Errorf("its lock file: %v", err)
	}
	for _, name := range []string{"b", "once"} {
		for what, err := range map[string]error{"set": env.set(t.Context(), []envVar{{name, "2"}}),
			"check": env.check(t.Context(), []envVar{{name, "2"}})} {
			if wantErr(t, err, fmt.Sprintf("%q is not among", name)); exitCode(err) != exitRefused || hintOf(err) == "" {
				t.Errorf("%s %s: exit code %d", what, name, exitCode(err))
			}
		}
	}
	more, err := openBootEnv(&config{FwEnvConfig: cfg, FwEnvNamespace: "more"}, testHost(openStorage))
	if err != nil || mustVars(t, more)["b"] != "1" {
		t.Errorf("the other: got %v", err)
	}
	for line, want := range map[string]string{"fw_printenv -m more": "b=1\n", "fw_printenv -n a --namespace=uboot": "2\n",
		"fw_printenv -mmore -n b": "1\n"} {
		var out, errs strings.Builder
		f := strings.Fields(line)
		open := func(c *config, lg *logger) (bootEnv, error) { return openBootEnv(c, testHost(openStorage)) }
		code := fwCommand(t.Context(), f[0], append([]string{"-c", cfg}, f[1:]...), defaultConfig(paths{}), open,
			strings.NewReader(""), &out, &errs, newLogger(&errs))
		if code != 0 || out.String() != want {
			t.Errorf("%s: got %d, %q, %q", line, code, &out, &errs)
		}
	}
	// The same file, read by libubootenv since 0.3.4.
	if _, err := exec.LookPath("fw_printenv"); err != nil {
		t.Skip("needs fw_printenv")
	}
	if err := exec.Command("fw_printenv", "-c", cfg, "-m", "more").Run(); err != nil {
		t.Skip("needs a fw_printenv that reads YAML: ", err)
	}
	for _, name := range []string{"uboot", "more"} {
		ours, err := openBootEnv(&config{FwEnvConfig: cfg, FwEnvNamespace: name}, testHost(openStorage))
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		if err := envCommand(t.Context(), []string{"print"}, ours, &out); err != nil {
			t.Fatal(err)
		}
		if theirs := runTool(t, "", "fw_printenv", "-c", cfg, "-m", name); theirs != out.String() {
			t.Errorf("%s: libubootenv reads %q, want %q", name, theirs, &out)
		}
	}
	runTool(t, "", "fw_setenv", "-c", cfg, "a", "3")
	if got := mustVars(t, env)["a"]; got != "3" {
		t.Errorf("after its fw_setenv: got a=%q", got)
	}
}

// Partitions by UUID or label are found for the environment as they are for slots, and a link that has
// a double is not believed.
func TestEnvByUUID(t *testing.T) {
	part := func(name, uuid, label string) (string, string) {
		return "/sys/class/block/" + name + "/uevent",
			fmt.Sprintf("DEVTYPE=partition\nDEVNAME=%s\nPARTUUID=%s\nPARTNAME=%s\n", name, uuid, label)
	}
	files := map[string]string{"/dev/disk/by-partuuid/aa-01": "->../../sda1",
		"/dev/disk/by-partuuid/bb-02": "->../../sda2",
		"/dev/sda1":                   string(envBytes(testEnvSize, -1, 0, "a=1")), "/dev/sda2": "", "/dev/sdb2": ""}
	for _, p := range [][3]string{{"sda1", "aa-01", "env"}, {"sda2", "bb-02", "x"}, {"sdb2", "bb-02", "y"}} {
		name, text := part(p[0], p[1], p[2])
		files[name] = text
	}
	m := fakeMachine(t, files)
	h := &envHost{open: m.open, resolve: m.resolveDevice, root: m.root, sleep: noSleep}
	open := func(device string) (bootEnv, error) {
		return openBootEnv(&config{FwEnvConfig: writeTemp(t, "cfg", []byte(device+" 0 0x1000\n"))}, h)
	}
	for _, device := range []string{"PARTUUID=AA-01", "PARTLABEL=env", "/dev/disk/by-partuuid/aa-01",
		"/dev/disk/by-partlabel/env", "/dev/sda1"} {
		if env, err := open(device); err != nil || mustVars(t, env)["a"] != "1" {
			t.Errorf("%s: got %v", device, err)
		}
	}
	for device, want := range map[string]string{
		"PARTUUID=bb-02": "ambiguous", "/dev/disk/by-partuuid/bb-02": "ambiguous", "PARTUUID=cc-01": "no partition has it",
		"/dev/disk/by-partuuid/cc-01": "no partition has it", "/dev/disk/by-id/x": "no such link"} {
		_, err := open(device)
		if wantErr(t, err, want, device); exitCode(err) != exitRefused || strings.Contains(hintOf(err), "saveenv") {
			t.Errorf("%s: exit code %d, hint %q", device, exitCode(err), hintOf(err))
		}
	}
}

func FuzzEnvYAML(f *testing.F) {
	f.Add(documentedYAML)
	f.Add("a:\n size: 0x4000\n devices:\n - path: /b\n")
	f.Add("a:\n - b\n")
	f.Fuzz(func(t *testing.T, text string) {
		all, err := parseEnvYAML("f", text)
		if (err == nil) != (len(all) > 0) {
			t.Fatalf("got %v, %v", all, err)
		}
		for _, c := range all {
			if n := len(c.copies); c.name == "" || n < 1 || n > 2 {
				t.Fatalf("accepted %+v", c)
			}
			for _, x := range c.copies {
				if x.path == "" || checkEnvSize(x.size) != nil || x.size != c.copies[0].size {
					t.Fatalf("accepted %+v", c)
				}
			}
		}
	})
}
