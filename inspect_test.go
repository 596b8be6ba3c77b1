// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

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
slots: running A (%[1]s/p2), idle B (%[1]s/p3)
  boot environment: mender_boot_part=2 is slot A (%[1]s/p2)
  --running says slot A (%[1]s/p2)
would write: slot B (%[1]s/p3), 300000 of 1048576 bytes
would change in the boot environment (`, b.dir)
	if !strings.HasPrefix(out, want) || errs != "" {
		t.Errorf("got %q, want %q; stderr %q", out, want, errs)
	}
	if want := "  -mender_boot_part=2\n  +mender_boot_part=3\n  -mender_boot_part_hex=2\n  +mender_boot_part_hex=3\n  " +
		"-upgrade_available=0\n  +upgrade_available=1\ninstall would go ahead\n"; !strings.HasSuffix(out, want) {
		t.Errorf("got %q, want at the end %q", out, want)
	}
	if after := snapshot(t, b.dir); after != before {
		t.Errorf("plan changed files:\n%s\n%s", before, after)
	}

	bad := b.pack(t, "release-3", testBlocks(2<<20), "-c", "otherboard", "-d", "color:blue")
	bad2 := filepath.Join(b.dir, "bad2.mender")
	if err := packCommand([]string{"-n", "x", "-c", "otherboard", "-f", b.a, "--compression", "none", "-o", bad2},
		io.Discard, nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		art     string
		env     map[string]string
		refused []string
	}{
		{bad2, nil, []string{"device"}},
		{bad, nil, []string{"color", "too small: the image has 2097152 bytes, the slot 1048576"}},
		{bad, map[string]string{varBootPart: "2", varUpgrade: "1", varCanary: "0"},
			[]string{"color", "never saved", "too small"}},
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

func TestPlanRefusedList(t *testing.T) {
	b := newImageBoard(t)
	out, _ := b.must(t, exitOK, "plan", "--json", b.pack(t, "release-2", testBlocks(1000)))
	if !strings.Contains(out, `"refused": []`) {
		t.Errorf("no empty list of refusals: %s", out)
	}
	b.must(t, exitOK, "install", b.pack(t, "release-2", testBlocks(1000)))
	out, errs := b.must(t, exitFailed, "plan", b.pack(t, "release-3", testBlocks(1000)))
	if strings.Count(out, "refused: an update is in progress") != 1 ||
		!strings.Contains(out, ", in Before_ArtifactCommit_Enter\n  hint: 'mendlet status' says what is next\nrefused: ") ||
		errs != "" {
		t.Errorf("%q, %q: want the refusal once", out, errs)
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
	for _, want := range []string{"slots: running B (" + b.b + "), idle A (" + b.a + ")\n", "  artifact_name=release-2\n",
		"update in progress: none\n", `last update: "release-2" committed`} {
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
		code := runProgram(t.Context(), args, strings.NewReader(""), &out, &errs)
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

// status says in words what to do now, at each point of an update, and never half a line of slots.
func TestStatusNext(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(300000))
	next := func(want string) {
		t.Helper()
		out, _ := b.must(t, exitOK, "status")
		asJSON, _ := b.must(t, exitOK, "status", "--json")
		var r report
		must(t, json.Unmarshal([]byte(asJSON), &r))
		_, got, _ := strings.Cut(out, "\nnext: ")
		if got, _, _ = strings.Cut(got, "\n"); got != want || r.Next != want {
			t.Errorf("got %q, %q, want %q; %s", got, r.Next, want, out)
		}
	}
	next("")
	b.must(t, exitOK, "install", "--stop-before", "ArtifactInstall_Enter", art)
	next("'mendlet resume' goes on with it, 'mendlet rollback' ends it")
	b.must(t, exitOK, "resume")
	next("reboot now, then 'mendlet commit' (or 'mendlet rollback')")
	b.reboot(t)
	next("'mendlet commit' keeps it, 'mendlet rollback' goes back")
	b.must(t, exitOK, "commit", "--stop-before", "Cleanup")
	next("'mendlet resume' goes on with it")
	b.must(t, exitOK, "resume")
	next("")
	b.must(t, exitOK, "install", b.pack(t, "release-3", testImage(9, 300000)))
	b.reboot(t)
	b.must(t, exitOK, "rollback")
	next("reboot now: slot B (" + b.b + ") is to boot next")
	b.reboot(t)
	next("")
	b.must(t, exitOK, "install", b.pack(t, "release-4", testImage(11, 300000)))
	b.setEnv(t, map[string]string{varBootPart: "3", varBootPartHex: "3", varBootcount: "2"})
	next("the bootloader went back to the system from before; 'mendlet rollback' ends the update")
	b.must(t, exitOK, "rollback")

	b.running = ""
	out, _ := b.must(t, exitOK, "status") // the machine of the tests has neither slot mounted
	if !strings.Contains(out, "slots: A ("+b.a+"), B ("+b.b+"); not known which one runs\n") ||
		!strings.Contains(out, "\nproblem: ") {
		t.Errorf("which slot runs is not known: %s", out)
	}
	b.running = "none"
	if out, _ = b.must(t, exitOK, "status"); !strings.Contains(out,
		"slots: none runs, idle A ("+b.a+"), other B ("+b.b+")\n") {
		t.Errorf("no slot runs: %s", out)
	}
	for u, want := range map[*update]string{
		{Managed: true, Type: rootfsImage, Step: stepReboot}:   "reboot now, then 'mendlet run'",
		{Managed: true, Type: rootfsImage, Step: stepDownload}: "'mendlet run' goes on with it",
		{Source: "-", Step: stepDownload}: "'mendlet resume' ends it: what came " +
			"from standard input cannot be read again",
		{Managed: true, Type: rootfsImage, Step: stepCommitWait, From: 2, To: 3}: "'mendlet run' goes on with it",
	} {
		one, two := &slot{letter: "A", num: 2}, &slot{letter: "B", num: 3}
		s := &slots{a: one, b: two, running: two}
		if u.Step == stepReboot {
			s.running = one
		}
		if got := whatNext(u, s, map[string]string{varBootPart: "3"}); got != want {
			t.Errorf("%+v: got %q, want %q", u, got, want)
		}
	}
}

// Where there is no fw_env.config, the hint says what to write, whichever way the environment is read.
func TestEnvWithoutConfig(t *testing.T) {
	b := newImageBoard(t)
	none := filepath.Join(b.dir, "none/fw_env.config")
	tools := t.TempDir()
	for _, name := range []string{"fw_printenv", "fw_setenv"} {
		must(t, os.WriteFile(filepath.Join(tools, name), []byte("#!/bin/sh\necho wrong >&2\nexit 1\n"), 0o755))
	}
	for _, c := range []struct{ how, path, want string }{
		{"native", tools, "no such file"}, {"auto", tools, `"wrong" (there is no `},
		{"fw_setenv", tools, `"wrong" (there is no `}, {"auto", "/nowhere", "no boot environment found"},
	} {
		t.Setenv("PATH", c.path)
		b.conf["BootEnv"], b.conf["FwEnvConfig"] = c.how, none
		for _, words := range [][]string{{"env", "print"}, {"env", "print", "-n", "x"}, {"env", "set", "x=1"}} {
			_, errs := b.must(t, exitRefused, words...)
			if !strings.Contains(errs, c.want) || !strings.Contains(errs,
				"hint: write \""+none+"\" with a line DEVICE OFFSET SIZE") || strings.Count(errs, "\n") != 2 {
				t.Errorf("%s, %q: %s", c.how, words, errs)
			}
		}
	}
}
