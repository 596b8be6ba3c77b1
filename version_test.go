// SPDX-License-Identifier: Apache-2.0

//go:build !nobuildinfo

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strings"
	"testing"
)

// A version is one wherever it comes from: never a bare hash, which says nothing of old and new.
var versionForm = regexp.MustCompile(`^[0-9]+\.[0-9]+\.[0-9]+(\+([0-9a-f]{7,40}|unknown)(\.dirty)?)?$`)

func TestBuildVersion(t *testing.T) {
	if v := versionString(); !versionForm.MatchString(v) || !strings.HasPrefix(v, strings.TrimSpace(release)) {
		t.Errorf("got version %q, file VERSION %q", v, release)
	}
	was := version
	defer func() { version = was }()
	for linked, want := range map[string]string{"d8f7ea9": strings.TrimSpace(release) + "+d8f7ea9", "2.0.1": "2.0.1"} {
		if version = linked; versionString() != want {
			t.Errorf("linked as %q: got %q, want %q", linked, versionString(), want)
		}
	}
	settings := func(kv ...string) *debug.BuildInfo {
		info := &debug.BuildInfo{}
		for i := 0; i < len(kv); i += 2 {
			info.Settings = append(info.Settings, debug.BuildSetting{Key: kv[i], Value: kv[i+1]})
		}
		return info
	}
	const hash = "d8f7ea9d2b1722cdaf46be6c2b401a42acbeaf46"
	for _, c := range []struct {
		release string
		info    *debug.BuildInfo
		want    string
	}{
		{"0.1.0", nil, "0.1.0"},
		{"0.1.0", settings(), "0.1.0"},
		{"0.1.0", settings("vcs.revision", hash, "vcs.modified", "false"), "0.1.0+d8f7ea9"},
		{"0.1.0", settings("vcs.revision", hash, "vcs.modified", "true"), "0.1.0+d8f7ea9.dirty"},
		{"0.1.0", settings("vcs.revision", "d8"), "0.1.0+d8"},
		// A tarball that is built in somebody else's repository.
		{"0.1.0+1234567", settings("vcs.revision", hash), "0.1.0+1234567"},
	} {
		if got := buildVersion(c.release, c.info); got != c.want {
			t.Errorf("%q, %v: got %q, want %q", c.release, c.info, got, c.want)
		}
	}
}

// The version that make gives: of a commit, a changed file, a tag, another version's tag, and
// of a tarball within somebody else's repository.
func TestVersionScript(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"git", "sh"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("needs " + tool)
		}
	}
	script, err := filepath.Abs("rig/version.sh")
	must(t, err)
	dir := t.TempDir()
	do := func(dir, name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null",
			"GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t", "GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	version := func(dir, want string) {
		t.Helper()
		if got := do(dir, "sh", script); got != want || !versionForm.MatchString(got) {
			t.Errorf("got version %q, want %q", got, want)
		}
	}
	file := filepath.Join(dir, "VERSION")
	must(t, os.WriteFile(file, []byte("1.2.3\n"), 0o644))
	version(dir, "1.2.3")
	do(dir, "git", "init", "-q")
	do(dir, "git", "add", "VERSION")
	do(dir, "git", "commit", "-q", "-m", "one")
	hash := do(dir, "git", "rev-parse", "--short=7", "HEAD")
	version(dir, "1.2.3+"+hash)
	do(dir, "git", "tag", "v1.2.2")
	do(dir, "git", "tag", "v1.2.30")
	version(dir, "1.2.3+"+hash)
	do(dir, "git", "tag", "-a", "-m", "x", "v1.2.3")
	version(dir, "1.2.3")
	must(t, os.WriteFile(file, []byte("1.2.4\n"), 0o644))
	version(dir, "1.2.4+"+hash+".dirty")
	inner := filepath.Join(dir, "tarball")
	must(t, os.Mkdir(inner, 0o755))
	must(t, os.WriteFile(filepath.Join(inner, "VERSION"), []byte("3.2.1+abcdef0\n"), 0o644))
	version(inner, "3.2.1+abcdef0")
}
