// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// ownModule is what the tests must know of one of the modules in modules/.
type ownModule struct {
	name    string
	payload func(base, version string) (metaData string, files []artifactFile)
	look    func(base string) string // what the device is like: "" before the first update
	after   string                   // what it is like after version V, V standing for the version
}

func tarOf(t *testing.T, files ...artifactFile) string {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.body))}); err != nil {
			t.Fatal(err)
		}
		w.Write([]byte(f.body))
	}
	w.Close()
	return b.String()
}

func ownModules(t *testing.T) []ownModule {
	return []ownModule{
		{"single-file", func(base, v string) (string, []artifactFile) {
			return "", []artifactFile{{"dest_dir", base + "/etc\n"}, {"filename", "app.conf\n"},
				{"permissions", "640\n"}, {"app.conf", v}}
		}, func(base string) string { return look(base + "/etc/app.conf") }, "V"},
		{"directory", func(base, v string) (string, []artifactFile) {
			return "", []artifactFile{{"dest_dir", base + "/opt/app/\n"}, {"update.tar", tarOf(t, artifactFile{"f" + v, v})}}
		}, func(base string) string {
			list, _ := filepath.Glob(base + "/opt/app/*")
			for i := range list {
				list[i] = filepath.Base(list[i])
			}
			return strings.Join(list, " ")
		}, "fV"},
		{"tar-app", func(base, v string) (string, []artifactFile) {
			return "", []artifactFile{{"dest_dir", base + "/srv\n"}, {"app.tar", tarOf(t, artifactFile{"version", v})},
				{"command", "echo \"$(cat " + base + "/srv/current/version 2>/dev/null)\" >" + base + "/restarted\n"}}
		}, func(base string) string {
			return strings.TrimSpace(look(base+"/srv/current/version") + " " + look(base+"/restarted"))
		}, "V V"},
		{"docker-compose", func(base, v string) (string, []artifactFile) {
			return "", []artifactFile{{"project", "shop\n"}, {"compose.yaml", v}}
		}, func(base string) string {
			return strings.TrimSpace(look(base+"/compose/shop/compose.yaml") + " " + look(base+"/up"))
		}, "V V"},
		{"mender-configure", func(base, v string) (string, []artifactFile) {
			return `{"version":"` + v + `"}`, nil
		}, func(base string) string {
			return strings.TrimSpace(look(base+"/config/device-config.json") + " " +
				strings.TrimSpace(strings.TrimPrefix(look(base+"/applied"), "{}")))
		}, `{"version":"V"} {"version":"V"}`},
	}
}

// fakeDocker knows the calls of the docker-compose module, and keeps the compose file of
// the project that is up.
const fakeDocker = `#!/bin/sh
[ "$1" = compose ] || exit 9
case "$*" in
*" up "*) while [ "$1" != -f ]; do shift; done; cat "$2" >"$BASE/up"; [ "$(cat "$2")" != bad ] ;;
*" down "*) rm -f "$BASE/up" ;;
*" version" | *" config -q" | *" pull -q") ;;
*) exit 9 ;;
esac
`

// setUpOwn installs a module of ours, run by the shell sh with the programs in path, and with
// everything outside it faked under the returned directory.
func setUpOwn(t *testing.T, name, sh, path string) (*module, string) {
	t.Helper()
	text, err := os.ReadFile("modules/" + name)
	if err != nil {
		t.Fatal(err)
	}
	base := t.TempDir()
	m := moduleOf(t, name, "#!"+sh+"\n"+strings.TrimPrefix(string(text), "#!/bin/sh\n"), "BASE="+base,
		"PATH="+base+"/bin:"+path,
		"COMPOSE_BASE="+base+"/compose", "MENDER_CONFIGURE_DIR="+base+"/config",
		"MENDER_CONFIGURE_APPLY_DIR="+base+"/apply.d")
	putScript(t, base+"/apply.d", "apply", "#!/bin/sh\ncat \"$1\" >\"$BASE/applied\"\n! grep -q bad \"$1\" || exit "+
		"1\n! grep -q restart \"$1\" || exit 20\n", 0o755)
	putScript(t, base+"/bin", "docker", fakeDocker, 0o755)
	putScript(t, base+"/bin", "sync", "#!/bin/sh\n", 0o755) // nothing here outlives the machine
	return m, base
}

// busyboxOnly gives a directory of all of busybox's programs.
func busyboxOnly(t *testing.T) string {
	t.Helper()
	box, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox")
	}
	dir := t.TempDir()
	if out, err := exec.Command(box, "--install", "-s", dir).CombinedOutput(); err != nil {
		t.Skipf("needs busybox --install: %s", out)
	}
	return dir
}

// begin gives the module a tree with the payload of version v.
func (o ownModule) begin(t *testing.T, m *module, base, v string) {
	t.Helper()
	metaData, files := o.payload(base, v)
	a := opened(t, madeArtifact(t, m.name, metaData, files...))
	treeOf(t, m, a)
	if err := m.download(t.Context(), a); err != nil {
		t.Fatal(err)
	}
}

// quickly is begin without the calls of a download and without syncing.
func (o ownModule) quickly(t *testing.T, m *module, base, v string) {
	t.Helper()
	metaData, files := o.payload(base, v)
	files = append(files, artifactFile{"../header/artifact_name", v}, artifactFile{"../header/meta-data", metaData},
		artifactFile{"../tmp/none", ""})
	for _, f := range files {
		path := filepath.Join(m.tree, "files", f.name)
		putScript(t, filepath.Dir(path), filepath.Base(path), f.body, 0o600)
	}
}

func (o ownModule) want(v string) string { return strings.ReplaceAll(o.after, "V", v) }

func (m *module) mustCall(t *testing.T, states ...string) {
	t.Helper()
	for _, state := range states {
		if err := m.call(t.Context(), state); err != nil {
			t.Errorf("%v", err)
		}
	}
}

func TestOwnModules(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	for _, o := range ownModules(t) {
		t.Run(o.name, func(t *testing.T) {
			t.Parallel()
			m, base := setUpOwn(t, o.name, box+"/sh", box)
			see := func(when, want string) {
				t.Helper()
				if got := o.look(base); got != want {
					t.Errorf("%s: got %q, want %q", when, got, want)
				}
			}
			o.begin(t, m, base, "one")
			m.mustCall(t, "ArtifactRollback", "ArtifactFailure", "Cleanup")
			see("nothing installed", "")
			o.begin(t, m, base, "one")
			m.mustCall(t, "ArtifactInstall")
			see("first install", o.want("one"))
			m.mustCall(t, "ArtifactRollback", "ArtifactRollback", "ArtifactFailure", "Cleanup")
			see("first rollback", "")
			for _, v := range []string{"one", "two", "two", "two"} {
				o.begin(t, m, base, v)
				m.mustCall(t, "ArtifactInstall", "ArtifactCommit", "Cleanup")
				see("install", o.want(v))
			}
			o.begin(t, m, base, "three")
			m.mustCall(t, "ArtifactInstall")
			see("install before rollback", o.want("three"))
			m.mustCall(t, "ArtifactRollback", "ArtifactRollback", "ArtifactFailure", "Cleanup")
			see("rollback", o.want("two"))
			noLeftOvers(t, base)
		})
	}
}

func noLeftOvers(t *testing.T, base string) {
	t.Helper()
	filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
		if err != nil || strings.Contains(path, "mendlet-") ||
			strings.Contains(path, "/versions/v-") && strings.Contains(path, "three") {
			t.Errorf("left over: %q, %v", path, err)
		}
		return nil
	})
}

// The module is killed at each command that changes something in turn, first while it installs, then
// while it rolls back; a rollback must mend both.
func TestOwnModulesCut(t *testing.T) {
	t.Parallel()
	for _, o := range ownModules(t) {
		t.Run(o.name, func(t *testing.T) {
			t.Parallel()
			m, base := setUpOwn(t, o.name, "/bin/sh\n"+cutInto(), os.Getenv("PATH"))
			cutAt := func(n int) { must(t, os.WriteFile(base+"/cut", fmt.Appendln(nil, n), 0o600)) }
			cutAt(0)
			o.begin(t, m, base, "one")
			m.mustCall(t, "ArtifactInstall", "ArtifactCommit", "Cleanup")
			for _, state := range []string{"ArtifactInstall", "ArtifactRollback"} {
				n, killed := 0, true
				for killed {
					n++
					cutAt(0)
					o.quickly(t, m, base, "two")
					if state == "ArtifactRollback" {
						m.mustCall(t, "ArtifactInstall")
					}
					cutAt(n)
					killed = m.call(t.Context(), state) != nil
					cutAt(0)
					m.mustCall(t, "ArtifactRollback")
					if got := o.look(base); got != o.want("one") {
						t.Errorf("%s killed at command %d: got %q, want %q", state, n, got, o.want("one"))
					}
					m.mustCall(t, "Cleanup")
					noLeftOvers(t, base)
				}
				if n < 4 {
					t.Errorf("%s: killed at %d commands only", state, n-1)
				}
			}
		})
	}
}

// cutInto gives the shell functions that count the commands which change something, and kill
// the module's process group instead of running the one whose number is in the file cut.
func cutInto() string {
	text := "read -r left <\"$BASE/cut\"; cut_here() { left=$((left - 1)); [ $left != 0 ] || kill -9 0; }\n"
	for _, name := range []string{"chmod", "cp", "docker", "ln", "mkdir", "mv", "rm", "sync", "tar"} {
		text += name + "() { cut_here; command " + name + " \"$@\"; }\n"
	}
	return text
}

// A rollback that a power cut kept from ever being run does not lose the old directory.
func TestOwnDirectoryLeftOver(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	o := ownModules(t)[1]
	m, base := setUpOwn(t, o.name, box+"/sh", box)
	putScript(t, base+"/opt/app.mendlet-old", "fone", "one", 0o644)
	o.quickly(t, m, base, "two")
	m.mustCall(t, "Cleanup")
	o.quickly(t, m, base, "two")
	m.mustCall(t, "ArtifactInstall", "ArtifactRollback", "Cleanup")
	if got := o.look(base); got != o.want("one") {
		t.Errorf("got %q, want %q", got, o.want("one"))
	}
}

// What is in the place of what a module would replace, and is of another kind, is refused and kept.
func TestOwnModulesKeepWhatIsThere(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	for i, place := range []struct{ path, link string }{
		{"/etc/app.conf/mine", ""}, {"/opt/app", ""}, {"/srv/current", ""}, {"/compose/shop/compose.yaml/mine", ""},
		{"/config/device-config.json/mine", ""}, {"/opt/app", "/nowhere"}, {"/srv/versions", ""},
	} {
		o := ownModules(t)[i%5]
		if i == 6 {
			o = ownModules(t)[2]
		} else if i == 5 {
			o = ownModules(t)[1]
		}
		m, base := setUpOwn(t, o.name, box+"/sh", box)
		path := base + place.path
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		if place.link != "" {
			must(t, os.Symlink(place.link, path))
		} else {
			writeFile(t, path, "mine")
		}
		if o.name == "tar-app" && i == 2 { // by whoever has put current there as a directory or file
			must(t, os.MkdirAll(base+"/srv/versions/v-theirs", 0o755))
			writeFile(t, base+"/srv/versions/v-theirs/file", "theirs")
		}
		before := snapshot(t, base)
		o.begin(t, m, base, "two")
		if err := m.call(t.Context(), "ArtifactInstall"); err == nil {
			t.Errorf("%s: installed over %s", o.name, place.path)
		}
		m.mustCall(t, "ArtifactRollback", "ArtifactFailure", "Cleanup")
		if after := snapshot(t, base); after != before {
			t.Errorf("%s:\nbefore %s\nafter  %s", o.name, before, after)
		}
	}
	// Neither is a node of a device.
	m, base := setUpOwn(t, "single-file", box+"/sh", box)
	must(t, os.MkdirAll(base+"/etc", 0o755))
	must(t, syscall.Mkfifo(base+"/etc/app.conf", 0o600))
	ownModules(t)[0].begin(t, m, base, "two")
	if err := m.call(t.Context(), "ArtifactInstall"); err == nil {
		t.Error("single-file: installed over a pipe")
	}
	m.mustCall(t, "ArtifactRollback", "ArtifactFailure", "Cleanup")
	if st, err := os.Lstat(base + "/etc/app.conf"); err != nil || st.Mode()&os.ModeNamedPipe == 0 {
		t.Errorf("the pipe is gone: %v, %v", st, err)
	}
}

// After a failed update the versions that were there are there: the one in use, and the one before.
func TestTarAppKeepsVersions(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	o := ownModules(t)[2]
	m, base := setUpOwn(t, o.name, box+"/sh", box)
	versions := func() string {
		list, _ := filepath.Glob(base + "/srv/versions/*")
		for i := range list {
			list[i] = look(list[i] + "/version")
		}
		return strings.Join(list, " ")
	}
	for _, v := range []string{"zero", "one", "two"} {
		o.quickly(t, m, base, v)
		m.mustCall(t, "ArtifactInstall", "ArtifactCommit", "Cleanup")
	}
	for _, broken := range []bool{true, false} {
		o.quickly(t, m, base, "three")
		if broken {
			must(t, os.Remove(m.tree+"/files/app.tar"))
		}
		if err := m.call(t.Context(), "ArtifactInstall"); (err == nil) == broken {
			t.Errorf("broken %v: got %v", broken, err)
		}
		m.mustCall(t, "ArtifactRollback", "ArtifactFailure", "Cleanup")
		if got := versions(); got != "one two" || look(base+"/srv/current/version") != "two" {
			t.Errorf("broken %v: got versions %q, in use %q", broken, got, look(base+"/srv/current/version"))
		}
	}
}

// The exit code of a program that fails is the module's, and a link is not taken for the configuration.
func TestConfigureExitCode(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	o := ownModules(t)[4]
	m, base := setUpOwn(t, o.name, box+"/sh", box)
	must(t, os.MkdirAll(base+"/config", 0o755))
	must(t, os.MkdirAll(base+"/data", 0o755))
	must(t, os.Symlink("../data/kept.json", base+"/config/device-config.json"))
	o.begin(t, m, base, "one")
	m.mustCall(t, "ArtifactInstall", "ArtifactCommit", "Cleanup")
	got := look(base + "/data/kept.json")
	if got != `{"version":"one"}` || look(base+"/config/device-config.json") != got {
		t.Errorf("behind the link: got %q", got)
	}
	putScript(t, base+"/apply.d", "fails", "#!/bin/sh\nexit 42\n", 0o755)
	o.begin(t, m, base, "two")
	var exit *exec.ExitError
	if err := m.call(t.Context(), "ArtifactInstall"); !errors.As(err, &exit) || exit.ExitCode() != 42 {
		t.Errorf("got %v, want exit code 42", err)
	}
	must(t, os.Remove(base+"/apply.d/fails"))
	m.mustCall(t, "ArtifactRollback", "Cleanup")
	if got := look(base + "/data/kept.json"); got != `{"version":"one"}` {
		t.Errorf("after the rollback: got %q", got)
	}
}

// A state that a module does not know must leave no trace, and its header must say how its
// artifacts are made. Without a payload, after a download that failed, Cleanup is no error.
func TestOwnModulesManners(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	list, err := filepath.Glob("modules/*")
	if err != nil || len(list) != 9 {
		t.Fatalf("got modules %q, %v, want nine", list, err)
	}
	for _, path := range list {
		name := filepath.Base(path)
		m, _ := setUpOwn(t, name, box+"/sh", box)
		lg := newChildLog()
		lg.level = levelInfo
		m.lg = &lg.logger
		if err := os.MkdirAll(m.tree+"/tmp", 0o700); err != nil {
			t.Fatal(err)
		}
		for _, state := range []string{"ProvidePayloadFileSizes", "Download", "ArtifactReboot", "ArtifactVerifyReboot",
			"ArtifactCommit",
			"ArtifactRollback", "ArtifactRollbackReboot", "ArtifactVerifyRollbackReboot", "ArtifactFailure",
			"SomethingNew", "Cleanup"} {
			if err := m.call(t.Context(), state); err != nil || len(lg.lines) != 0 {
				t.Errorf("%s, %s: got %v and output %q", name, state, err, lg.lines)
			}
		}
		if err := os.MkdirAll(m.tree+"/tmp", 0o700); err != nil {
			t.Fatal(err)
		}
		for _, state := range []string{"NeedsArtifactReboot", "SupportsRollback"} {
			if _, err := m.query(t.Context(), state); err != nil {
				t.Error(err)
			}
		}
		text := look(path)
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o755 ||
			!strings.HasPrefix(text, "#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n") {
			t.Errorf("%s: mode, first line or licence line", name)
		}
		packAsToldIn(t, text, name)
	}
}

// packAsToldIn runs the call of mendlet pack in the header of a module.
func packAsToldIn(t *testing.T, module, name string) {
	t.Helper()
	_, rest, _ := strings.Cut(strings.ReplaceAll(module, "\\\n#", ""), "#   mendlet pack ")
	line, _, _ := strings.Cut(rest, "\n")
	dir := t.TempDir()
	args := strings.Fields(line)
	for i := 1; i < len(args); i++ {
		switch args[i-1] {
		case "-f", "-m":
			putScript(t, dir, args[i], "{}", 0o644)
			args[i] = filepath.Join(dir, args[i])
		case "-o":
			args[i] = filepath.Join(dir, args[i])
		}
	}
	if err := packCommand(args, io.Discard, nil); err != nil {
		t.Fatalf("%s: as its header says: %v", name, err)
	}
	list, _ := filepath.Glob(dir + "/*.mender")
	if len(list) != 1 {
		t.Fatalf("%s: got %q, want one artifact", name, list)
	}
	if a := opened(t, []byte(look(list[0]))); a.PayloadType != name {
		t.Errorf("%s: the header packs payload type %q", name, a.PayloadType)
	}
}

// What the payload says must not lead a module where it should not write.
func TestOwnModulesRefuse(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	for _, c := range []struct {
		module string
		files  []artifactFile
	}{
		{"single-file", []artifactFile{{"dest_dir", "etc"}, {"filename", "x"}, {"x", ""}}},
		{"single-file", []artifactFile{{"dest_dir", "/etc"}, {"filename", "../x"}, {"x", ""}}},
		{"single-file", []artifactFile{{"dest_dir", "/"}, {"filename", ""}, {"x", ""}}},
		{"single-file", []artifactFile{{"dest_dir", "/"}, {"filename", "proc"}, {"proc", ""}}},
		{"single-file", []artifactFile{{"filename", "x"}, {"x", ""}}},
		{"directory", []artifactFile{{"dest_dir", "/"}, {"update.tar", tarOf(t)}}},
		{"directory", []artifactFile{{"dest_dir", "//"}, {"update.tar", tarOf(t)}}},
		{"directory", []artifactFile{{"dest_dir", ""}, {"update.tar", tarOf(t)}}},
		{"directory", []artifactFile{{"dest_dir", "/tmp/.."}, {"update.tar", tarOf(t)}}},
		{"directory", []artifactFile{{"dest_dir", "/tmp/../etc"}, {"update.tar", tarOf(t)}}},
		{"tar-app", []artifactFile{{"dest_dir", "/"}, {"app.tar", tarOf(t)}}},
		{"tar-app", []artifactFile{{"dest_dir", "srv"}, {"app.tar", tarOf(t)}}},
		{"docker-compose", []artifactFile{{"project", ".."}, {"compose.yaml", ""}}},
		{"docker-compose", []artifactFile{{"project", "a/b"}, {"compose.yaml", ""}}},
		{"docker-compose", []artifactFile{{"project", "-x"}, {"compose.yaml", ""}}},
		{"mender-configure", nil},
		{"script", []artifactFile{{"a.sh", "#!/bin/sh\nexit 1\n"}}},
	} {
		m, _ := setUpOwn(t, c.module, box+"/sh", box)
		a := opened(t, madeArtifact(t, c.module, "", c.files...))
		treeOf(t, m, a)
		if err := m.download(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		if err := m.call(t.Context(), "ArtifactInstall"); err == nil {
			t.Errorf("%s with %q: got success", c.module, c.files)
		}
	}
}

// The old compose file comes back when the new project does not become healthy, and the
// old configuration when the new one cannot be applied.
func TestOwnModulesBadVersion(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	for _, o := range ownModules(t) {
		if o.name != "docker-compose" && o.name != "mender-configure" {
			continue
		}
		m, base := setUpOwn(t, o.name, box+"/sh", box)
		o.begin(t, m, base, "one")
		m.mustCall(t, "ArtifactInstall", "Cleanup")
		o.begin(t, m, base, "bad")
		if err := m.call(t.Context(), "ArtifactInstall"); err == nil {
			t.Errorf("%s: got success", o.name)
		}
		m.mustCall(t, "ArtifactRollback", "ArtifactFailure", "Cleanup")
		if got := o.look(base); got != o.want("one") {
			t.Errorf("%s: got %q, want %q", o.name, got, o.want("one"))
		}
	}
}

func TestOwnScript(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	m, base := setUpOwn(t, "script", box+"/sh", box)
	text := madeArtifact(t, "script", "", artifactFile{"b.sh", "#!/bin/sh\necho b >>$BASE/ran\n"},
		artifactFile{"a.sh", "#!/bin/sh\necho a >>$BASE/ran\n"})
	if err := through(t, m, text, chainGood...); err != nil {
		t.Fatal(err)
	}
	if got := look(base + "/ran"); got != "a\nb\n" {
		t.Errorf("got %q, want a, then b", got)
	}
}

// The specification of the add-on: exit 20 asks for a restart, the file is for root alone,
// and a boot service applies it again.
func TestOwnConfigure(t *testing.T) {
	t.Parallel()
	box := busyboxOnly(t)
	m, base := setUpOwn(t, "mender-configure", box+"/sh", box)
	for _, c := range []struct{ metaData, reboot string }{{`{"a":"b"}`, "No"}, {`{"a":"restart"}`, "Automatic"},
		{`{"a":"c"}`, "No"}} {
		a := opened(t, madeArtifact(t, m.name, c.metaData))
		treeOf(t, m, a)
		if err := m.download(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		m.mustCall(t, "ArtifactInstall")
		if got, err := m.query(t.Context(), "NeedsArtifactReboot"); got != c.reboot || err != nil {
			t.Errorf("%s: got %q, %v, want %q", c.metaData, got, err, c.reboot)
		}
		config := base + "/config/device-config.json"
		if st, err := os.Stat(config); err != nil || st.Mode() != 0o600 || look(config) != c.metaData {
			t.Errorf("%s: got %q, %v", c.metaData, look(config), err)
		}
	}
	os.Remove(base + "/applied")
	if out, err := exec.Command(m.program, "--apply-only").CombinedOutput(); err != nil || len(out) > 0 ||
		look(base+"/applied") != `{"a":"c"}` {
		t.Errorf("--apply-only: got %v, %q, applied %q", err, out, look(base+"/applied"))
	}
}

// An update that Debian's module of the same name has installed is gone on with: taken back, or kept.
func TestOwnModulesAfterDebians(t *testing.T) {
	t.Parallel()
	for _, o := range ownModules(t) {
		if o.name != "single-file" && o.name != "directory" {
			continue
		}
		theirs := "/usr/share/mender/modules/v3/" + o.name
		if st, err := os.Lstat(theirs); err != nil || !st.Mode().IsRegular() {
			t.Skipf("needs Debian's mender-client: %v", err)
		}
		m, base := setUpOwn(t, o.name, "/bin/sh", os.Getenv("PATH"))
		next := func(v, want string, states ...string) {
			t.Helper()
			must(t, os.RemoveAll(m.tree))
			o.quickly(t, m, base, v)
			if out, err := exec.Command(theirs, "ArtifactInstall", m.tree).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", theirs, err, out)
			}
			if got := o.look(base); got != o.want(v) {
				t.Fatalf("%s: Debian's module installed %q, want %q", o.name, got, o.want(v))
			}
			m.mustCall(t, states...)
			if got := o.look(base); got != want {
				t.Errorf("%s: %q: got %q, want %q", o.name, states, got, want)
			}
			noLeftOvers(t, base)
		}
		next("1", o.want("1"), "ArtifactCommit", "Cleanup")
		next("2", o.want("1"), "ArtifactRollback", "ArtifactRollback", "ArtifactFailure", "Cleanup")
		next("3", o.want("3"), "ArtifactCommit", "Cleanup")
	}
}

// debianModule is a handler for a module of Debian's mender-client package, which is
// installed or unpacked at MENDER_MODULES_DIR.
func debianModule(t *testing.T, name string, env ...string) *module {
	t.Helper()
	onlyExhaustive(t, "a module of Debian's")
	t.Parallel()
	dir := os.Getenv("MENDER_MODULES_DIR")
	if dir == "" {
		dir = "/usr/share/mender/modules/v3"
	}
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Skipf("needs Debian's mender-client: %v", err)
	}
	return moduleOf(t, name, string(text), env...)
}

// bothModules runs a test with Debian's module of a name and with ours.
func bothModules(t *testing.T, name string, test func(t *testing.T, made func(t *testing.T, env ...string) *module)) {
	t.Run("Debian's", func(t *testing.T) {
		test(t, func(t *testing.T, env ...string) *module { return debianModule(t, name, env...) })
	})
	t.Run("ours", func(t *testing.T) {
		t.Parallel()
		test(t, func(t *testing.T, env ...string) *module {
			text, err := os.ReadFile("modules/" + name)
			must(t, err)
			return moduleOf(t, name, string(text), env...)
		})
	})
}

// through takes an artifact through the calls of a deployment that ends at last, and says
// what failed.
func through(t *testing.T, m *module, text []byte, states ...string) error {
	t.Helper()
	a := opened(t, text)
	treeOf(t, m, a)
	if err := m.download(t.Context(), a); err != nil {
		return err
	}
	var failed error
	for _, state := range states {
		if err := m.call(t.Context(), state); err != nil && failed == nil {
			failed = fmt.Errorf("%s: %w", state, err)
		}
	}
	return failed
}

var (
	chainGood = []string{"ArtifactInstall", "ArtifactCommit", "Cleanup"}
	chainBack = []string{"ArtifactInstall", "ArtifactRollback", "ArtifactRollback", "ArtifactFailure", "Cleanup"}
)

func TestDebianSingleFile(t *testing.T) {
	m := debianModule(t, "single-file")
	dest := t.TempDir()
	made := func(body string) []byte {
		return madeArtifact(t, "single-file", "", artifactFile{"dest_dir", dest + "\n"},
			artifactFile{"filename", "app.conf\n"},
			artifactFile{"permissions", "640\n"}, artifactFile{"app.conf", body})
	}
	for _, c := range []struct {
		body, want string
		states     []string
	}{{"one", "one", chainGood}, {"two", "one", chainBack}, {"three", "three", chainGood}} {
		if err := through(t, m, made(c.body), c.states...); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(dest + "/app.conf"); string(got) != c.want {
			t.Errorf("after %q: got %q, %v, want %q", c.body, got, err, c.want)
		}
	}
	dest = "/dev/null/no"
	if err := through(t, m, made("x"), "ArtifactInstall", "ArtifactRollback", "Cleanup"); err == nil {
		t.Error("got success at an impossible place")
	}
}

func TestDebianDirectory(t *testing.T) {
	m := debianModule(t, "directory")
	dest := filepath.Join(t.TempDir(), "app")
	made := func(name string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: 1})
		w.Write([]byte("x"))
		w.Close()
		return madeArtifact(t, "directory", "", artifactFile{"update.tar", b.String()}, artifactFile{"dest_dir", dest + "\n"})
	}
	for _, c := range []struct {
		name, want string
		states     []string
	}{{"one", "one", chainGood}, {"two", "one", chainBack}, {"three", "three", chainGood}} {
		if err := through(t, m, made(c.name), c.states...); err != nil {
			t.Fatal(err)
		}
		if list, err := os.ReadDir(dest); len(list) != 1 || list[0].Name() != c.want {
			t.Errorf("after %q: got %v, %v, want %q", c.name, list, err, c.want)
		}
	}
	dest = "/"
	if err := through(t, m, made("x"), "ArtifactInstall", "Cleanup"); err == nil {
		t.Error("got success for /")
	}
}

func TestDebianScript(t *testing.T) {
	trace := filepath.Join(t.TempDir(), "trace")
	m := debianModule(t, "script", "TRACE="+trace)
	if err := through(t, m, madeArtifact(t, "script", "", artifactFile{"hello.sh", "#!/bin/sh\necho ${0##*/} >>$TRACE\n"}),
		chainGood...); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(trace); string(got) != "hello.sh\n" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := through(t, m, madeArtifact(t, "script", "", artifactFile{"bad.sh", "#!/bin/sh\nexit 3\n"}),
		chainGood...); err == nil {
		t.Error("a failing script: got success")
	}
}

// A package of its own, installed into a root of its own.
func TestDebModule(t *testing.T) { bothModules(t, "deb", testDebModule) }

func testDebModule(t *testing.T, made func(t *testing.T, env ...string) *module) {
	dir := t.TempDir()
	m := made(t, "PATH="+dir+"/bin:"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	needTool(t, "dpkg-deb")
	dpkg, err := exec.LookPath("dpkg")
	if err != nil {
		t.Skip("needs dpkg")
	}
	for _, d := range []string{"info", "updates", "triggers"} {
		putScript(t, dir+"/root/var/lib/dpkg/"+d, "none", "", 0o644)
	}
	putScript(t, dir+"/root/var/lib/dpkg", "status", "", 0o644)
	putScript(t, dir+"/bin", "dpkg", "#!/bin/sh\nexec "+dpkg+" --root="+dir+
		"/root --log=/dev/null --force-not-root \"$@\"\n", 0o755)
	putScript(t, dir+"/p/DEBIAN", "control", "Package: mendlet-test\nVersion: 1\nArchitecture: all\nMaintainer: none "+
		"<none@example.com>\nDescription: test\n", 0o644)
	putScript(t, dir+"/p/etc", "mendlet-test", "installed\n", 0o644)
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", dir+"/p",
		dir+"/test.deb").CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v: %s", err, out)
	}
	lg := newChildLog()
	m.lg = &lg.logger
	if err := through(t, m, madeArtifact(t, "deb", "", artifactFile{"test.deb", look(dir + "/test.deb")}),
		chainGood...); err != nil {
		t.Errorf("%v\n%s", err, lg.text())
	}
	if got := look(dir + "/root/etc/mendlet-test"); got != "installed\n" {
		t.Errorf("got %q, want the file of the package", got)
	}
	if err := through(t, m, madeArtifact(t, "deb", "", artifactFile{"test.deb", "no package"}), chainGood...); err == nil {
		t.Error("a broken package: got success")
	}
}

// A package of its own, installed into a root of its own.
func TestRpmModule(t *testing.T) { bothModules(t, "rpm", testRpmModule) }

func testRpmModule(t *testing.T, made func(t *testing.T, env ...string) *module) {
	dir := t.TempDir()
	m := made(t, "PATH="+dir+"/bin:"+os.Getenv("PATH"))
	needTool(t, "rpmbuild")
	rpm, err := exec.LookPath("rpm")
	if err != nil {
		t.Skip("needs rpm")
	}
	putScript(t, dir, "test.spec", `Name: mendlet-test
Version: 1
Release: 1
Summary: test
License: none
BuildArch: noarch
AutoReqProv: no
%description
test
%install
mkdir -p %{buildroot}/etc
echo installed >%{buildroot}/etc/mendlet-test
%files
/etc/mendlet-test
`, 0o644)
	if out, err := exec.Command("rpmbuild", "-bb", "--quiet", "--define", "_topdir "+dir, "--define", "_rpmdir "+dir,
		"--define", "_build_name_fmt test.rpm", dir+"/test.spec").CombinedOutput(); err != nil {
		t.Fatalf("rpmbuild: %v: %s", err, out)
	}
	putScript(t, dir+"/bin", "rpm", "#!/bin/sh\nexec "+rpm+" --root="+dir+"/root \"$@\"\n", 0o755)
	lg := newChildLog()
	m.lg = &lg.logger
	if err := through(t, m, madeArtifact(t, "rpm", "", artifactFile{"test.rpm", look(dir + "/test.rpm")}),
		chainGood...); err != nil {
		t.Errorf("%v\n%s", err, lg.text())
	}
	if got := look(dir + "/root/etc/mendlet-test"); got != "installed\n" {
		t.Errorf("got %q, want the file of the package", got)
	}
	if err := through(t, m, madeArtifact(t, "rpm", "", artifactFile{"test.rpm", "no package"}), chainGood...); err == nil {
		t.Error("a broken package: got success")
	}
}

// fakeEngine is a docker without an engine, which keeps a list of the containers that run.
const fakeEngine = `#!/bin/sh
cd "$BASE" && touch running
case "$1" in
ps) cat running ;;
pull) [ "$2" != missing ] ;;
run) shift $(($# - 1)) && echo "$1" >>running ;;
stop) shift && for c; do grep -vx "$c" running >left; mv left running; done ;;
start) shift && for c; do echo "$c" >>running; done ;;
*) exit 9 ;;
esac
`

func TestDockerModule(t *testing.T) { bothModules(t, "docker", testDockerModule) }

func testDockerModule(t *testing.T, made func(t *testing.T, env ...string) *module) {
	base := t.TempDir()
	m := made(t, "BASE="+base, "PATH="+base+"/bin:"+os.Getenv("PATH"))
	needTool(t, "jq")
	putScript(t, base+"/bin", "docker", fakeEngine, 0o755)
	want := func(containers string) []byte {
		return madeArtifact(t, "docker", `{"containers":[`+containers+`],"run_args":"-p 80:80"}`)
	}
	for _, c := range []struct {
		containers, want string
		states           []string
	}{{`"one"`, "one\n", chainGood}, {`"two"`, "one\n", chainBack}, {`"three","four"`, "three\nfour\n", chainGood}} {
		if err := through(t, m, want(c.containers), c.states...); err != nil {
			t.Fatal(err)
		}
		if got := look(base + "/running"); got != c.want {
			t.Errorf("after %s: %q run, want %q", c.containers, got, c.want)
		}
	}
	if err := through(t, m, want(`"missing"`), chainBack...); err == nil || look(base+"/running") != "three\nfour\n" {
		t.Errorf("an image that is not there: %v, %q run", err, look(base+"/running"))
	}
}
