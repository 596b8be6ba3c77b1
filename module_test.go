// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// modulePaths is a configuration whose directories are all under one temporary directory.
func modulePaths(t *testing.T) *config {
	t.Helper()
	dir := t.TempDir()
	p := paths{conf: dir + "/etc", data: dir + "/share", ds: dir + "/var"}
	for _, d := range []string{p.conf, p.data + "/modules/v3", p.ds} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return defaultConfig(p)
}

// moduleOf installs script as the module for payloadType and gives the handler for it. The script
// sees env besides the environment of this process, which tests that run side by side share.
func moduleOf(t *testing.T, payloadType, script string, env ...string) *module {
	t.Helper()
	first, rest, _ := strings.Cut(script, "\n")
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		first += "\nexport " + name + "='" + value + "'"
	}
	c := modulePaths(t)
	putScript(t, c.paths.data+"/modules/v3", payloadType, first+"\n"+rest, 0o755)
	m, err := newModule(c, payloadType, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func treeOf(t *testing.T, m *module, a *artifact) {
	t.Helper()
	if err := m.makeTree(a, treeValues{"release-1", "", "testboard"}); err != nil {
		t.Fatal(err)
	}
}

// MEN-9027; field case 4.
func TestModuleNames(t *testing.T) {
	t.Parallel()
	c := modulePaths(t)
	dir := c.paths.data + "/modules/v3"
	putScript(t, dir, "plain", "", 0o644)
	putScript(t, dir+"/sub", "module", "#!/bin/sh\n", 0o755)
	putScript(t, c.paths.data, "outside", "#!/bin/sh\n", 0o755)
	for _, name := range []string{"", ".", "..", "../../outside", "/bin/sh", "sub", "sub/module", "./plain",
		"plain", "missing",
		"a\x00", "a b", "a\n", strings.Repeat("x", 300)} {
		if _, err := newModule(c, name, nil); exitCode(err) != exitRefused {
			t.Errorf("%q: got %v, want a refusal", name, err)
		}
	}
	for _, name := range []string{"-x", "$(reboot)", "app.v2"} {
		putScript(t, dir, name, "#!/bin/sh\n[ $# = 2 ] && [ $1 = ArtifactInstall ] && [ $2 = \"$PWD\" ]\n", 0o755)
		m, err := newModule(c, name, nil)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if err := os.MkdirAll(m.tree, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := m.call(t.Context(), "ArtifactInstall"); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestModuleTree(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/artifact/module-two-files.mender")
	if err != nil {
		t.Fatal(err)
	}
	m := moduleOf(t, "trace", "#!/bin/sh\n")
	putScript(t, m.tree+"/tmp", "left-over", "", 0o644)
	a := opened(t, text)
	treeOf(t, m, a)
	got := readTree(t, m.tree)
	info, err := compactJSON(a.HeaderInfo)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"version": "3\n", "current_artifact_name": "release-1\n", "current_artifact_group": "",
		"current_device_type":  "testboard\n",
		"header/artifact_name": "app-1", "header/artifact_group": "", "header/payload_type": "trace",
		"header/header-info": string(info),
		"header/type-info":   got["header/type-info"], "header/meta-data": got["header/meta-data"], "header/": "", "tmp/": "",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	for _, name := range []string{"header/type-info", "header/meta-data"} {
		if !json.Valid([]byte(got[name])) || !strings.HasPrefix(got[name], "{") {
			t.Errorf("%s: got %q", name, got[name])
		}
	}
}

// readTree gives all names under dir, directories with a slash, and the contents of files.
func readTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name := path[len(dir)+1:]
		st, err := d.Info()
		if err != nil {
			return err
		}
		if d.IsDir() {
			got[name+"/"] = ""
			if st.Mode().Perm() != 0o700 {
				t.Errorf("%s: mode %v, want 0700", name, st.Mode())
			}
			return nil
		}
		text, err := os.ReadFile(path)
		got[name] = string(text)
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, want 0600", name, st.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestCompactJSON(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"": "null", "{}": "{}", " [ 1.0, 1e3 , 12345678901234567890 ] ": "[1.0,1e3,12345678901234567890]",
		`{"b":1,"a":{"Z":"<&>","y":null},"B":[true,"\u00e9\n"]}`: `{"a":{"y":null,"Z":"<&>"},"B":[true,"é\n"],"b":1}`,
	} {
		if got, err := compactJSON(json.RawMessage(in)); err != nil || string(got) != want {
			t.Errorf("%s: got %s, %v, want %s", in, got, err, want)
		}
	}
}

func TestModuleQueries(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ state, body, want string }{
		{"NeedsArtifactReboot", "", "No"},
		{"NeedsArtifactReboot", "echo No", "No"},
		{"NeedsArtifactReboot", "printf Yes", "Yes"},
		{"NeedsArtifactReboot", "echo Automatic; echo talk >&2", "Automatic"},
		{"NeedsArtifactReboot", "echo Maybe", ""},
		{"NeedsArtifactReboot", "echo Yes; echo Yes", ""},
		{"NeedsArtifactReboot", "echo yes", ""},
		{"NeedsArtifactReboot", "echo; echo", ""},
		{"NeedsArtifactReboot", "yes | head -n 100000", ""},
		{"NeedsArtifactReboot", "echo Yes; exit 1", ""},
		{"SupportsRollback", "", "No"},
		{"SupportsRollback", "echo Yes", "Yes"},
		{"SupportsRollback", "echo Automatic", ""},
		{"ProvidePayloadFileSizes", "echo ' Yes'", ""},
	} {
		m := moduleOf(t, "q", "#!/bin/sh\n"+c.body+"\n")
		if err := os.MkdirAll(m.tree, 0o700); err != nil {
			t.Fatal(err)
		}
		got, err := m.query(t.Context(), c.state)
		if got != c.want || (err != nil) != (c.want == "") {
			t.Errorf("%s with %q: got %q, %v, want %q", c.state, c.body, got, err, c.want)
		}
	}
}

func TestModuleCleanup(t *testing.T) {
	t.Parallel()
	m := moduleOf(t, "c", "#!/bin/sh\necho $1 >> ${0%/*}/calls\nexit 1\n")
	calls := filepath.Join(filepath.Dir(m.program), "calls")
	if err := m.call(t.Context(), "Cleanup"); err != nil {
		t.Errorf("no tree: got %v, want success", err)
	}
	if err := m.call(t.Context(), "ArtifactInstall"); err == nil {
		t.Error("no tree: want an error")
	}
	if _, err := m.query(t.Context(), "SupportsRollback"); err == nil {
		t.Error("no tree: want an error")
	}
	if _, err := os.Stat(calls); err == nil {
		t.Error("called without a tree")
	}
	if err := os.MkdirAll(m.tree+"/tmp", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := m.call(t.Context(), "Cleanup"); err == nil {
		t.Error("failing module: want an error")
	}
	if text, _ := os.ReadFile(calls); string(text) != "Cleanup\n" || m.hasTree() {
		t.Errorf("got calls %q and tree %v, want one call and no tree", text, m.hasTree())
	}
}

// A module that streams into tmp/, in parts, so that each way to fail can be put between.
const (
	moduleHead = "#!/bin/sh\n" + `case $1 in Download*) ;; ProvidePayloadFileSizes) echo $SIZES; exit;; *) exit;; esac
next() { line=$(cat stream-next); echo "$line" >>tmp/lines; name=${line%% *}; }
take() { cat "$name" >tmp/part && mv tmp/part "tmp/${name##*/}"; }
`
	moduleLoop = "while next; [ -n \"$name\" ]; do take; done\n"
)

// The rows of the table in the specification of streams, and ways to hang.
func TestModuleDownload(t *testing.T) {
	t.Parallel()
	small, big := artifactFile{"greeting.txt", "hello\n"},
		artifactFile{"blob.bin", strings.Repeat("0123456789abcde\n", 50000)}
	both := []artifactFile{small, big}
	timeout := 300 * time.Millisecond
	rows := []struct {
		name, body string
		sizes      string
		files      []artifactFile
		timeout    time.Duration
		err, orErr string // part of the error, "" for success
		lines      string // what stream-next said, when successful
		dir        string // where the files are then
	}{
		{name: "streams", body: moduleLoop, files: both, lines: "streams/greeting.txt\nstreams/blob.bin\n\n", dir: "tmp"},
		{name: "streams with sizes", body: moduleLoop, sizes: "Yes", files: both,
			lines: "streams/greeting.txt 6\nstreams/blob.bin 800000\n\n", dir: "tmp"},
		{name: "sizes: No", body: moduleLoop, sizes: "No", files: both,
			lines: "streams/greeting.txt\nstreams/blob.bin\n\n", dir: "tmp"},
		{name: "sizes: Perhaps", body: moduleLoop, sizes: "Perhaps", files: both, err: `got answer "Perhaps"`},
		{name: "streams no file", body: moduleLoop, lines: "\n", dir: "tmp"},
		{name: "empty file", body: moduleLoop, files: []artifactFile{{"empty", ""}}, lines: "streams/empty\n\n", dir: "tmp"},
		{name: "never opens", body: "exit 0\n", files: both, dir: "files"},
		{name: "never opens, no file", body: "exit 0\n", dir: "files"},
		{name: "takes sizes, never opens", body: "exit 0\n", sizes: "Yes", files: both, dir: "files"},
		{name: "fails after the end", body: moduleLoop + "exit 9", files: both, err: "exit status 9"},
		{name: "one name and exit", body: "next\n", files: both, err: "did not finish"},
		{name: "one file and exit", body: "next; take\n", files: both, err: "did not finish"},
		{name: "all but the last empty read", body: "next; take; next; take\n", files: both, err: "did not finish"},
		{name: "asks again after the end", body: "next; next\n", timeout: timeout, err: "not done after"},
		{name: "closes early", body: "next; take; next; exec 3<$name; exec 3<&-\n" + moduleLoop, files: both,
			err: "broken pipe"},
		{name: "closes early and exits", body: "next; take; next; exec 3<$name; exit 0\n", files: both, err: "broken pipe",
			orErr: "did not finish"},
		{name: "fails at once", body: "exit 7\n", files: both, err: "exit status 7"},
		{name: "fails when told the name", body: "next; exit 7\n", files: both, err: "exit status 7"},
		{name: "fails within a file", body: "next; take; next; exec 3<$name; exit 7\n", files: both, err: "exit status 7"},
		{name: "dies", body: "kill -9 $$\n", files: both, err: "signal: killed"},
		{name: "dies within a file", body: "next; take; next; exec 3<$name; kill -9 $$\n", files: both,
			err: "signal: killed"},
		{name: "hangs at once", body: "exec sleep 1000\n", files: both, timeout: timeout, err: "not done after"},
		{name: "hangs before the file", body: "next; exec sleep 1000\n", files: both, timeout: timeout,
			err: "not done after"},
		{name: "stops reading", body: "next; take; next; exec 3<$name; exec sleep 1000\n", files: both, timeout: timeout,
			err: "not done after"},
		{name: "asks again without taking", body: "next; next\n", files: both, timeout: timeout, err: "not done after"},
		{name: "removes the pipe", body: "rm stream-next; exec sleep 1000\n", files: both, err: "no such file"},
		{name: "leaves a reader behind", body: "next; take; next; exec 3<$name; sleep 1000 >/dev/null 2>&1 & echo $! " +
			">tmp/pid; exit 0\n",
			files: both, err: "did not finish"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			m := moduleOf(t, "app", moduleHead+r.body, "SIZES="+r.sizes)
			if r.timeout != 0 {
				m.timeout = r.timeout
			}
			a := opened(t, madeArtifact(t, "app", "", r.files...))
			treeOf(t, m, a)
			err := m.download(t.Context(), a)
			endReader(t, m)
			if r.err != "" {
				if err == nil || !strings.Contains(err.Error(), r.err) &&
					(r.orErr == "" || !strings.Contains(err.Error(), r.orErr)) {
					t.Errorf("got %v, want an error with %q", err, r.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := readTreeFiles(m, "stream-next", "streams", "tmp/lines")
			if got != r.lines {
				t.Errorf("got pipes or lines %q, want %q", got, r.lines)
			}
			for _, f := range r.files {
				if text, err := os.ReadFile(filepath.Join(m.tree, r.dir, f.name)); err != nil || string(text) != f.body {
					t.Errorf("%s: got %d bytes, %v, want %d", f.name, len(text), err, len(f.body))
				}
			}
			if _, err := os.Stat(m.tree + "/files"); (err == nil) != (r.dir == "files") {
				t.Errorf("files/: got %v", err)
			}
		})
	}
}

// readTreeFiles gives the contents of the last of names, and complains of the others.
func readTreeFiles(m *module, names ...string) string {
	got := ""
	for i, name := range names {
		path := filepath.Join(m.tree, name)
		if _, err := os.Lstat(path); err == nil && i < len(names)-1 {
			got += name + " is there; "
		} else if err == nil {
			text, _ := os.ReadFile(path)
			got += string(text)
		}
	}
	return got
}

// endReader kills the process that a module has left behind, if it has.
func endReader(t *testing.T, m *module) {
	text, err := os.ReadFile(m.tree + "/tmp/pid")
	if err != nil {
		return
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Error(err)
	} else if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Errorf("process left behind: %v", err)
	}
}

// A module must not see the end of a stream whose checksum is wrong, not even one that is
// slow to die.
func TestModuleDownloadWrongSum(t *testing.T) {
	t.Parallel()
	good := artifactFile{"app.bin", strings.Repeat("good", 50000)}
	text := madeArtifact(t, "app", "", good)
	at := bytes.LastIndex(text, []byte("good"))
	for _, body := range []string{"trap '' TERM\n" + moduleLoop, "exit 0\n"} {
		broken := bytes.Clone(text)
		copy(broken[at:], "evil")
		m := moduleOf(t, "app", moduleHead+body)
		m.grace = 100 * time.Millisecond
		a := opened(t, broken)
		treeOf(t, m, a)
		err := m.download(t.Context(), a)
		if err == nil || !strings.Contains(err.Error(), "app.bin") {
			t.Errorf("%q: got %v, want an error that names the file", body, err)
		}
		if _, err := os.Stat(m.tree + "/tmp/app.bin"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%q: the module took the file for good: %v", body, err)
		}
	}
}

// The artifact ends in the middle of a file: field case 10, through a module.
func TestModuleDownloadTruncated(t *testing.T) {
	t.Parallel()
	text := madeArtifact(t, "app", "", artifactFile{"app.bin", strings.Repeat("x", 100000)})
	for _, body := range []string{moduleLoop, "exit 0\n"} {
		m := moduleOf(t, "app", moduleHead+body)
		a := opened(t, text[:len(text)-50000])
		treeOf(t, m, a)
		if err := m.download(t.Context(), a); err == nil {
			t.Errorf("%q: got success", body)
		}
	}
}

func TestModuleOutputIsLogged(t *testing.T) {
	t.Parallel()
	m := moduleOf(t, "app", "#!/bin/sh\necho out; echo err >&2\n")
	lg := newChildLog()
	m.lg = &lg.logger
	if err := os.MkdirAll(m.tree, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := m.call(t.Context(), "ArtifactInstall"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Update Module output (stdout): out\n", "Update Module output (stderr): err\n"} {
		if !strings.Contains(lg.text(), want) {
			t.Errorf("got %q, want %q", lg.text(), want)
		}
	}
}

// Artifacts as the real tool makes them, through a module that streams.
func TestModuleFixtures(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"module-two-files.mender":      "streams/greeting.txt\nstreams/blob.bin\n\n",
		"module-no-files.mender":       "\n",
		"module-scripts-signed.mender": "",
	} {
		text, err := os.ReadFile("testdata/artifact/" + name)
		if err != nil {
			t.Fatal(err)
		}
		m := moduleOf(t, "trace", moduleHead+moduleLoop)
		a := opened(t, text)
		treeOf(t, m, a)
		if err := m.download(t.Context(), a); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got, _ := os.ReadFile(m.tree + "/tmp/lines")
		if want != "" && sortedLines(string(got)) != sortedLines(want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
		s := &scripts{artifactDir: t.TempDir() + "/scripts"}
		if err := s.install(a.Scripts); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if (len(a.Scripts) > 0) != (name == "module-scripts-signed.mender") {
			t.Errorf("%s: got %d scripts", name, len(a.Scripts))
		}
	}
}

func sortedLines(s string) string {
	return strings.Join(slices.Sorted(strings.SplitSeq(s, "\n")), "\n")
}
