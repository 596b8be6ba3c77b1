// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// scriptRun gives scripts with fast clocks, and what those have said that begin with traceScript.
func scriptRun(t *testing.T) (*scripts, func() []string) {
	dir := t.TempDir()
	trace := filepath.Join(dir, "trace")
	s := &scripts{rootfsDir: filepath.Join(dir, "fs", "rootfs"), artifactDir: filepath.Join(dir, "ds", "scripts"),
		timeout: time.Minute, retryInterval: time.Millisecond, retryTimeout: time.Minute}
	return s, func() []string {
		text, _ := os.ReadFile(trace)
		os.Remove(trace)
		return strings.Fields(string(text))
	}
}

// traceScript appends its name to a file that lies two directories above it.
const traceScript = "#!/bin/sh\nTRACE=${0%/*}/../../trace\necho ${0##*/} >>$TRACE\n"

func TestScriptsOrderAndChoice(t *testing.T) {
	t.Parallel()
	s, traced := scriptRun(t)
	for _, name := range []string{"Sync_Enter_10", "Sync_Enter_05_b", "Sync_Enter_05_a", "Sync_Enter_5_x",
		"Sync_Enter_050", "Sync_Leave_00", "Sync_Enter_01_a b", "xSync_Enter_00", "Sync_Enter_00~"} {
		putScript(t, s.rootfsDir, name, traceScript, 0o755)
	}
	putScript(t, s.rootfsDir, "Sync_Enter_00_plain", traceScript, 0o644)
	os.Mkdir(filepath.Join(s.rootfsDir, "Sync_Enter_00_dir"), 0o755)
	putScript(t, s.artifactDir, "Sync_Enter_00_artifact", traceScript, 0o755)
	putScript(t, s.rootfsDir, "ArtifactInstall_Enter_00_rootfs", traceScript, 0o755)
	putScript(t, s.artifactDir, "ArtifactInstall_Enter_00_artifact", traceScript, 0o755)
	lg := newChildLog()
	s.lg = &lg.logger
	var seen []string
	s.onRun = func(name string) { seen = append(seen, name) }
	if err := s.runState(t.Context(), "Sync", "Enter"); err != nil {
		t.Fatal(err)
	}
	want := []string{"Sync_Enter_05_a", "Sync_Enter_05_b", "Sync_Enter_10"}
	if got := traced(); !slices.Equal(got, want) || !slices.Equal(seen, want) {
		t.Errorf("got %q, and %q told, want %q", got, seen, want)
	}
	if n := strings.Count(lg.text(), "skipped"); n != 2 {
		t.Errorf("got %d warnings of what is skipped, want 2:\n%s", n, lg.text())
	}
	if err := s.runState(t.Context(), "ArtifactInstall", "Enter"); err != nil {
		t.Fatal(err)
	}
	if got := traced(); !slices.Equal(got, []string{"ArtifactInstall_Enter_00_artifact"}) {
		t.Errorf("got %q, want the script of the artifact", got)
	}
	s.rootfsDir = filepath.Join(s.rootfsDir, "missing")
	if err := s.runState(t.Context(), "Sync", "Enter"); err != nil {
		t.Errorf("no directory: %v", err)
	}
}

func TestScriptsFailure(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		state, action string
		all           bool // by runAll
		runs          int
		fails         bool
	}{
		{state: "ArtifactInstall", action: "Enter", runs: 1, fails: true},
		{state: "Download", action: "Leave", runs: 1, fails: true},
		{state: "ArtifactInstall", action: "Error", runs: 2},
		{state: "Sync", action: "Error", runs: 2},
		{state: "Idle", action: "Enter", runs: 2},
		{state: "ArtifactRollback", action: "Leave", runs: 1, fails: true},
		{state: "ArtifactRollback", action: "Leave", all: true, runs: 2, fails: true},
	} {
		s, traced := scriptRun(t)
		for _, dir := range []string{s.rootfsDir, s.artifactDir} {
			putScript(t, dir, c.state+"_"+c.action+"_01", traceScript+"exit 3\n", 0o755)
			putScript(t, dir, c.state+"_"+c.action+"_02", traceScript+"exit 4\n", 0o755)
		}
		run := s.runState
		if c.all {
			run = s.runAll
		}
		err := run(t.Context(), c.state, c.action)
		if got := traced(); len(got) != c.runs || (err != nil) != c.fails {
			t.Errorf("%+v: got %v and error %v", c, got, err)
		}
	}
}

func TestScriptRetryLater(t *testing.T) {
	t.Parallel()
	s, traced := scriptRun(t)
	third := traceScript + "[ $(wc -l <$TRACE) -ge 3 ] || exit 21\n"
	putScript(t, s.artifactDir, "ArtifactCommit_Enter_01", third, 0o755)
	if err := s.runState(t.Context(), "ArtifactCommit", "Enter"); err != nil {
		t.Error(err)
	}
	if got := traced(); len(got) != 3 {
		t.Errorf("got %d runs, want 3", len(got))
	}
	s.retryInterval, s.retryTimeout = time.Hour, time.Millisecond
	putScript(t, s.artifactDir, "ArtifactCommit_Leave_01", traceScript+"exit 21\n", 0o755)
	if err := s.runState(t.Context(), "ArtifactCommit", "Leave"); err == nil || len(traced()) != 1 {
		t.Errorf("got %v, want an error after one run", err)
	}
	// A stop is obeyed at once instead of an hour later, also where errors do not count.
	s.retryTimeout = time.Hour
	putScript(t, s.artifactDir, "ArtifactCommit_Error_01", traceScript+"echo asking; exit 21\n", 0o755)
	putScript(t, s.artifactDir, "ArtifactCommit_Error_02", traceScript, 0o755)
	ctx, cancel := context.WithCancel(t.Context())
	lg := newChildLog()
	s.lg = &lg.logger
	lg.onLine = func(string) { cancel() }
	if err := s.runState(ctx, "ArtifactCommit", "Error"); err == nil || len(traced()) > 1 {
		t.Errorf("got %v, want an error after at most one run", err)
	}
}

func TestScriptTimeout(t *testing.T) {
	t.Parallel()
	s, _ := scriptRun(t)
	s.timeout = 50 * time.Millisecond
	putScript(t, s.rootfsDir, "Download_Enter_01", "#!/bin/sh\nexec sleep 1000\n", 0o755)
	if err := s.runState(t.Context(), "Download", "Enter"); err == nil ||
		!strings.Contains(err.Error(), "not done after") {
		t.Errorf("got %v, want a time-out", err)
	}
}

func TestScriptVersions(t *testing.T) {
	t.Parallel()
	for text, good := range map[string]bool{"2": true, "3": true, "3\n": true, "": false, "4": false,
		"33": false, "1": false} {
		s, traced := scriptRun(t)
		putScript(t, s.rootfsDir, "version", text, 0o644)
		putScript(t, s.rootfsDir, "Sync_Enter_01", traceScript, 0o755)
		putScript(t, s.rootfsDir, "Idle_Enter_01", traceScript, 0o755)
		if err := s.runState(t.Context(), "Sync", "Enter"); (err == nil) != good || (len(traced()) == 1) != good {
			t.Errorf("version %q: got %v", text, err)
		}
		if err := s.checkRootfsVersion(); (err == nil) != good {
			t.Errorf("version %q before commit: got %v", text, err)
		}
		if err := s.runState(t.Context(), "Idle", "Enter"); err != nil || (len(traced()) == 1) != good {
			t.Errorf("version %q, idle: got %v", text, err)
		}
	}
}

func TestScriptsInstall(t *testing.T) {
	t.Parallel()
	s, _ := scriptRun(t)
	putScript(t, s.artifactDir, "ArtifactFailure_Enter_00_old", traceScript, 0o755)
	if err := s.install([]scriptFile{{Name: "ArtifactInstall_Enter_01_new", Body: []byte(traceScript)}}); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"ArtifactInstall_Enter_01_new": 0o700, "version": 0o600} {
		if st, err := os.Stat(filepath.Join(s.artifactDir, name)); err != nil || st.Mode() != mode {
			t.Errorf("%s: got %v, %v", name, st, err)
		}
	}
	if text, _ := os.ReadFile(filepath.Join(s.artifactDir, "version")); string(text) != "3" {
		t.Errorf("version: got %q, want 3", text)
	}
	if list, _ := os.ReadDir(s.artifactDir); len(list) != 2 {
		t.Errorf("got %v, want two files", list)
	}
	if err := s.install(nil); err != nil {
		t.Error(err)
	}
}

// Field case 14: a link that someone put in the place of our directories is not followed.
func TestStateDirsAreLinks(t *testing.T) {
	t.Parallel()
	other := t.TempDir()
	putScript(t, other, "mine", "", 0o644)
	s, _ := scriptRun(t)
	m := moduleOf(t, "app", "#!/bin/sh\n")
	for _, path := range []string{s.artifactDir, m.tree} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(other, path); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.install(nil); err != nil {
		t.Error(err)
	}
	treeOf(t, m, opened(t, madeArtifact(t, "app", "")))
	m.mustCall(t, "Cleanup")
	if list, _ := os.ReadDir(other); len(list) != 1 {
		t.Errorf("got %v, want what was there", list)
	}
}

// MEN-9057; field cases 3 and 4.
func TestScriptNames(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", ".", "..", "version", "../x", "/x", "ArtifactInstall_Enter_05_../../x",
		"ArtifactInstall_Enter_05_a/b",
		"ArtifactInstall_Enter_5", "Idle_Enter_05", "Download_Enter_05", "Sync_Leave_05", "ArtifactInstall_Enter_05_a b",
		"ArtifactInstall_Enter_05_",
		"ArtifactInstall_Enter_05\n", "ArtifactInstall_Enter_05_a\x00", "ArtifactCleanup_Enter_05", "ArtifactInstall_Done_05",
		"ArtifactInstall_Enter_05_" + strings.Repeat("x", 300)} {
		s, _ := scriptRun(t)
		if err := s.install([]scriptFile{{Name: name}}); exitCode(err) != exitRefused {
			t.Errorf("%q: got %v, want a refusal", name, err)
		}
	}
	for _, name := range []string{"ArtifactInstall_Enter_05", "ArtifactRollbackReboot_Error_99_x-y.sh",
		"ArtifactCommit_Leave_00_$(x)"} {
		s, _ := scriptRun(t)
		if err := s.install([]scriptFile{{Name: name}}); err != nil {
			t.Error(err)
		}
	}
}

// noExecDir is a directory from which nothing can be run.
func noExecDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_NOEXEC, ""); err != nil {
		t.Skip("needs root: mount: ", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, 0) })
	return dir
}

// unstartable are programs that the kernel does not start, and what is said of each.
var unstartable = []struct{ text, says string }{
	{"", "has no #! line"},
	{"exit 0\n", "has no #! line"},
	{"# !/bin/sh\n", "has no #! line"},
	{"#!\n", "has no #! line"},
	{"#! \t\n", "has no #! line"},
	{"\xef\xbb\xbf#!/bin/sh\n", "byte order mark"},
	{"#!/bin/sh\r\nexit 0\r\n", `has DOS line ends: its #! line is "#!/bin/sh\r"`},
	{"#!/bin/sh -e\r\nexit 0\r\n", `its #! line is "#!/bin/sh -e\r"`},
	{"#!/bin/not-there\nexit 0\n", `its interpreter "/bin/not-there" is not there`},
	{"#!/bin\nexit 0\n", `its interpreter "/bin" is not there, or is no program`},
	{"#!/etc/passwd\nexit 0\n", `its interpreter "/etc/passwd" is not there, or is no program`},
	{"#!/usr/bin/env not-there\nexit 0\n", `its interpreter "not-there" is not there`},
}

// What could not be started is told from its first line, and in the same words when it is run.
func TestStartable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i, c := range unstartable {
		err := startable([]byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: got %v, want %q", c.text, err, c.says)
		}
		if strings.HasPrefix(c.text, "#!/usr/bin/env") || strings.HasPrefix(c.text, "#!/bin/sh -e") {
			continue // these start, and end by themselves
		}
		putScript(t, dir, strconv.Itoa(i), c.text, 0o755)
		err = runChild(t.Context(), child{what: "it", path: filepath.Join(dir, strconv.Itoa(i)), dir: "/",
			timeout: time.Minute})
		if err == nil || !strings.Contains(err.Error(), "it: ") || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q, when it is run: got %v, want %q", c.text, err, c.says)
		}
	}
	for _, text := range []string{"#!/bin/sh", "#!/bin/sh\n", "#! /bin/sh -e\nx\r\n", "#!\t/bin/sh\n",
		"#!/usr/bin/env sh\n", "#!/usr/bin/env -S sh -e\n",
		"\x7fELF\x02", "#!/bin/sh\n" + strings.Repeat("\r\n", 1000)} {
		if err := startable([]byte(text)); err != nil {
			t.Errorf("%q: got %v", text, err)
		}
	}
	putScript(t, dir, "alien", "\x7fELF"+strings.Repeat("\x00", 100), 0o755)
	err := runChild(t.Context(), child{what: "it", path: filepath.Join(dir, "alien"), dir: "/", timeout: time.Minute})
	if err == nil || !strings.Contains(err.Error(), "for another kind of machine") {
		t.Errorf("an alien: got %v", err)
	}
	path := filepath.Join(noExecDir(t), "x")
	putScript(t, filepath.Dir(path), "x", "#!/bin/sh\n", 0o755)
	err = runChild(t.Context(), child{what: "it", path: path, dir: "/", timeout: time.Minute})
	if err == nil || !strings.Contains(err.Error(), "mounted noexec") || hintOf(err) == "" {
		t.Errorf("from a noexec file system: got %v", err)
	}
}

// An interpreter may come with the new system for those scripts that run in it.
func TestScriptsCheck(t *testing.T) {
	t.Parallel()
	s, _ := scriptRun(t)
	lg := newChildLog()
	s.lg = &lg.logger
	good := scriptFile{"ArtifactInstall_Enter_00", []byte("#!/bin/sh\n")}
	for name, here := range map[string]bool{"ArtifactInstall_Enter_00": true, "ArtifactInstall_Error_00": true,
		"ArtifactReboot_Enter_00": true,
		"ArtifactReboot_Leave_00": false, "ArtifactCommit_Enter_00": false, "ArtifactRollback_Enter_00": false,
		"ArtifactFailure_Leave_00": false} {
		err := s.check([]scriptFile{good, {name, []byte("#!/bin/not-there\n")}})
		if here && exitCode(err) != exitRefused || !here && err != nil {
			t.Errorf("%s: got %v", name, err)
		}
		if !here && !strings.Contains(lg.text(), name+`": its interpreter "/bin/not-there" is not there`) {
			t.Errorf("%s: said %q", name, lg.text())
		}
		if err := s.check([]scriptFile{good, {name, []byte("exit 0\n")}}); exitCode(err) != exitRefused || hintOf(err) == "" {
			t.Errorf("%s: got %v", name, err)
		}
	}
	s.artifactDir = filepath.Join(noExecDir(t), "ds", "scripts")
	if err := s.check(nil); err != nil {
		t.Errorf("no scripts in a noexec datastore: got %v", err)
	}
	if err := s.check([]scriptFile{good}); exitCode(err) != exitRefused || !strings.Contains(err.Error(), "noexec") ||
		hintOf(err) == "" {
		t.Errorf("a noexec datastore: got %v", err)
	}
}
