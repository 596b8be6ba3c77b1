// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

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
		"install --help": "stop-before", "install x -h": "stop-before", "status -h": "json",
		"commit --help":        "reboot-exit-code",
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
		{"plan", art, "--json"}, {"plan", "--json", art}, {"-q", "plan", "-json", art}, {"plan", "--json=true", "--", art},
		{"--", "plan", "--json", art},
		{"plan", "-q", art, "--json", "--running=A"},
	} {
		out, _ := b.must(t, exitOK, words...)
		if !json.Valid([]byte(out)) || !strings.Contains(out, `"release-2"`) {
			t.Errorf("%q: %s", words, out)
		}
	}
	other := filepath.Join(b.dir, "other")
	for _, words := range [][]string{{"-d", other}, {"--data=" + other}, {"--datastore", other},
		{"status", "-d=" + other}} {
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

type badWriter struct{}

func (badWriter) Write([]byte) (int, error) { panic("a fault in the main goroutine") }

// No crash looks like a result that has a number of its own: one is exit code 1, with what to report in
// the log; the others end by a signal.
func TestCrash(t *testing.T) {
	var said strings.Builder
	code := runProgram(t.Context(), []string{"mendlet", "version"}, nil, badWriter{}, &said)
	if code != exitFailed || !strings.Contains(said.String(), "internal error: a fault in the main") ||
		!strings.Contains(said.String(), "main_test.go") {
		t.Errorf("got exit code %d, said %q", code, said.String())
	}
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=crash")
	cmd.Dir = t.TempDir() // for a core file
	out, _ := cmd.CombinedOutput()
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() || status.Signal() != syscall.SIGABRT ||
		!strings.Contains(string(out), "a fault beside") {
		t.Errorf("got %v, said %q", cmd.ProcessState, out)
	}
	if !strings.Contains(readText(t, "packaging/mendlet.service"), "\nSuccessExitStatus=4 75\n") {
		t.Error("mendlet.service: want 4 and 75, and no other code, to be a success")
	}
}

// cron's PATH has no directory with reboot and fw_setenv in it; what is there stays in front.
func TestWholePath(t *testing.T) {
	const all = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for path, want := range map[string]string{
		"": all, all: all,
		"/usr/bin:/bin":       "/usr/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin",
		"/opt/bin:/sbin::/x/": "/opt/bin:/sbin::/x/:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/bin",
	} {
		if got := wholePath(path); got != want {
			t.Errorf("%q: got %q, want %q", path, got, want)
		}
	}
}
