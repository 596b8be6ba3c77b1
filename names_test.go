// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// as is the program under another name.
func (b *verbBoard) as(name string, words ...string) (code int, out, log string) {
	b.t.Helper()
	var stdout, stderr bytes.Buffer
	code = runProgram(b.t.Context(), append([]string{"/usr/bin/" + name}, words...), strings.NewReader("secret\n"),
		&stdout, &stderr)
	b.t.Logf("%s %s: exit code %d\n%s%s", name, strings.Join(words, " "), code, stdout.String(), stderr.String())
	return code, stdout.String(), stderr.String()
}

// process is the program under another name as a process.
func (b *verbBoard) process(name string, words ...string) (*exec.Cmd, *bytes.Buffer) {
	b.t.Helper()
	self, err := os.Executable()
	must(b.t, err)
	cmd := exec.Command(self, words...)
	cmd.Args[0] = name
	cmd.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=1")
	out := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	must(b.t, cmd.Start())
	b.t.Cleanup(func() {
		if cmd.ProcessState == nil { // a test that failed has left it
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	return cmd, out
}

// Verbs, options, words and exit codes under each name; and that our own name knows none of that.
func TestNames(t *testing.T) {
	b := newVerbBoard(t)
	b.setup()
	b.server.autoAccept = true
	for _, c := range []struct {
		call string
		code int
		says string // in what is printed or logged
	}{
		{"mender", 0, "usage: mender "}, {"mender help", 0, "send-inventory"}, {"mender --help", 0, "show-provides"},
		{"mender --version", 0, versionString() + "\truntime: go"}, {"mender-update --version", 0, versionString() + "\n"},
		{"mender-setup --version", 0, versionString()}, {"mender-setup --help", 0, "--server-ip ADDRESS"},
		{"mender version", 3, "unknown verb"}, {"mender bogus", 3, "'mender --help'"}, {"mender comit", 3, "'mender commit'"},
		{"mender plan x", 3, ""}, {"mender-update", 1, "no verb"}, {"mender-update bogus", 1, "unknown verb"},
		{"mender-update bootstrap", 1, "unknown verb"}, {"mender-auth commit", 1, "unknown verb"},
		{"mender-snapshot --version", 0, ""}, {"mender-setup -v", 0, ""},
		{"mender --bogus", 1, "unknown option"}, {"mender commit extra", 1, "got 1 words"}, {"mender install", 1,
			"got 0 words"},
		{"mender -l bogus commit", 1, "log level"}, {"mender -l panic commit", 2, "No update in progress."},
		{"mender --no-syslog commit", 2, ""}, {"mender commit --no-syslog", 2, ""}, {"mender-update commit", 2, ""},
		{"mender-update rollback", 2, ""}, {"mender-update resume", 2, ""}, {"mender install /nowhere.mender", 1,
			"no such file"},
		{"mender install --passphrase-file /nowhere /nowhere.mender", 1, "/nowhere.mender"},
		{"mender show-artifact", 0, "unknown\n"}, {"mender-update show-provides", 0, "artifact_name=unknown\n"},
		{"mender --passphrase-file /nowhere bootstrap", 1, "passphrase: open /nowhere"},
		{"mender --passphrase-file - -F bootstrap", 0, "made a device key"},
		{"mender bootstrap -F", 0, "made a device key"}, {"mender-auth bootstrap", 0, "the device is accepted"},
		{"mender-update auth bootstrap", 0, "the device is accepted"},
		{"mendlet mender", 64, "unknown verb"}, {"mendlet --no-syslog commit", 64, "unknown option"},
		{"mendlet -F bootstrap", 64, "unknown option"}, {"mendlet commit extra", 64, ""}, {"mendlet install /nowhere.mender",
			1, ""},
		{"mendlet-1.2 bogus", 64, "'mendlet --help'"},
	} {
		words := strings.Fields(c.call)
		code, out, log := b.as(words[0], words[1:]...)
		if code != c.code || !strings.Contains(out+log, c.says) {
			t.Errorf("%s: exit code %d, want %d and %q", c.call, code, c.code, c.says)
		}
	}
}

// -F makes a key where the client made one, and nowhere else.
func TestNamesForceNoKey(t *testing.T) {
	b := newVerbBoard(t)
	b.setup()
	b.server.autoAccept = true
	b.want(0, "", "bootstrap")
	key := readText(t, b.dir+"/var/mender-agent.pem")
	for _, words := range [][]string{{"-F", "check-update"}, {"send-inventory", "-F"}, {"-F", "commit"}} {
		b.as("mender", words...)
		if readText(t, b.dir+"/var/mender-agent.pem") != key {
			t.Fatalf("%q: another key", words)
		}
	}
	if b.as("mender", "-F", "bootstrap"); readText(t, b.dir+"/var/mender-agent.pem") == key {
		t.Error("-F before bootstrap made no key")
	}
}

// mender-auth's daemon is not the one that updates: it says by itself what it is, and leaves the journal alone.
func TestNamesAuthDaemon(t *testing.T) {
	b := newVerbBoard(t)
	code, out, _ := b.as("mender-auth", "daemon", "--help")
	if code != 0 || !strings.Contains(out, "D-Bus") || !strings.Contains(out, "--passphrase-file") {
		t.Errorf("got %d, %q", code, out)
	}
	if code, _, _ := b.as("mender-auth", "-F", "daemon"); code != exitFailed { // there is no server
		t.Errorf("got %d, want %d", code, exitFailed)
	}
	if _, err := os.Stat(b.dir + "/var/" + journalName); err == nil {
		t.Error("it has made a journal")
	}
}

// What setup writes, or why it does not, and then nothing is written.
func TestNamesSetup(t *testing.T) {
	for _, c := range []struct {
		words, fails string
		want         map[string]string // by the key in mender.conf
		hosts        bool
	}{
		{words: "--device-type b --url https://x.example --server-cert /c",
			want: map[string]string{"ServerURL": "https://x.example",
				"ServerCertificate": "/c"}},
		{words: "--device-type b --server-url https://x.example -E /c --demo-polling --update-poll 7",
			want: map[string]string{
				"ServerCertificate": "/c", "UpdatePollIntervalSeconds": "7", "InventoryPollIntervalSeconds": "5",
				"RetryPollIntervalSeconds": "30"}},
		{words: "--device-type b --demo --server-ip 10.0.0.7",
			want: map[string]string{"ServerURL": "https://docker.mender.io",
				"UpdatePollIntervalSeconds": "5"}, hosts: true},
		{words: "--device-type b --demo-server", want: map[string]string{"ServerURL": "https://docker.mender.io",
			"UpdatePollIntervalSeconds": "1800"}},
		{words: "--device-type b --demo --hosted-mender --tenant-token T --quiet --username u@example.com",
			want: map[string]string{
				"ServerURL": "https://hosted.mender.io", "TenantToken": "T", "UpdatePollIntervalSeconds": "5"}},
		{words: "--device-type b --hosted-mender --username u@example.com --password p", fails: "--tenant-token"},
		{words: "--device-type b --hosted-mender", fails: "--tenant-token"},
		{words: "--device-type b --server-url https://x.example --server-ip 10.0.0.7", fails: "more than one"},
		{words: "--device-type b --server-ip ten", fails: "--server-ip"},
		{words: "--server-url https://x.example", fails: "--device-type"},
		{words: "--device-type b", fails: "--server-url"},
		{words: "", fails: "no questions"},
	} {
		b := newVerbBoard(t)
		const before = "127.0.0.1 localhost\n10.0.0.1 docker.mender.io s3.docker.mender.io"
		must(t, os.WriteFile(b.dir+"/etc/hosts", []byte(before), 0o644))
		m := &asMender{name: "mender", root: b.dir}
		o := newOptions()
		v := m.adapt(verb{"setup", "", "", 0, setupFlag, nil})
		_, err := parseVerb(v, strings.Fields(c.words), o)
		must(t, err)
		var out, log bytes.Buffer
		a, err := newApp(o, newLogger(&log), nil, &out, nil)
		must(t, err)
		err = v.run(t.Context(), a, nil)
		text, _ := os.ReadFile(b.dir + "/etc/mender.conf")
		if c.fails != "" {
			if err == nil || !strings.Contains(err.Error()+hintOf(err), c.fails) || text != nil || m.exit(err) != exitFailed {
				t.Errorf("%s: got %v (%q), want %q; wrote %q", c.words, err, hintOf(err), c.fails, text)
			}
			continue
		}
		must(t, err)
		conf, err := loadConfig(o.paths, configFile{b.dir + "/etc/mender.conf", true}, configFile{path: b.dir + "/none"}, nil)
		must(t, err)
		got := map[string]string{"ServerURL": conf.Servers[0].ServerURL, "ServerCertificate": conf.ServerCertificate,
			"TenantToken": conf.TenantToken, "UpdatePollIntervalSeconds": fmt.Sprint(conf.UpdatePollIntervalSeconds),
			"InventoryPollIntervalSeconds": fmt.Sprint(conf.InventoryPollIntervalSeconds),
			"RetryPollIntervalSeconds":     fmt.Sprint(conf.RetryPollIntervalSeconds)}
		for k, want := range c.want {
			if got[k] != want {
				t.Errorf("%s: %s is %q, want %q", c.words, k, got[k], want)
			}
		}
		if dt, err := conf.deviceType(); err != nil || dt != "b" {
			t.Errorf("%s: device type %q, %v", c.words, dt, err)
		}
		if quiet := strings.Contains(c.words, "--quiet"); quiet != (out.Len() == 0) {
			t.Errorf("%s: said %q", c.words, out.String())
		}
		want := before
		if c.hosts {
			want = "127.0.0.1 localhost\n10.0.0.7\tdocker.mender.io s3.docker.mender.io\n"
		}
		if hosts := readText(t, b.dir+"/etc/hosts"); hosts != want {
			t.Errorf("%s: hosts %q, want %q", c.words, hosts, want)
		}
	}
}

// check-update and send-inventory have a daemon do it, whichever name that runs under, and do it themselves
// without one. A daemon ends with 0 when it is told to.
func TestNamesDaemonActs(t *testing.T) {
	for _, call := range []string{"mender --no-syslog daemon", "mender-update daemon", "mendlet daemon"} {
		b := newVerbBoard(t)
		b.server.autoAccept = true
		b.setup("--update-poll", "100000", "--inventory-poll", "100000")
		ctx := t.Context()
		polls := func() int { return b.server.requests["POST next"] }
		words := strings.Fields(call)
		daemon, said := b.process(words[0], words[1:]...)
		b.server.await(ctx, "the first poll", func() bool { return polls() > 0 })
		b.server.mu.Lock()
		n, m := polls(), b.server.requests["PUT inventory"]
		b.server.mu.Unlock()
		for _, name := range []string{"mender-update", "mender"} {
			if code, out, log := b.as(name, "check-update"); code != 0 || out != "" ||
				!strings.Contains(log, "told the daemon") {
				t.Errorf("%s: %s check-update: %d, %q, %q", call, name, code, out, log)
			}
			n++
			b.server.await(ctx, "the poll", func() bool { return polls() >= n })
		}
		if code, _, _ := b.as("mender-update", "send-inventory"); code != 0 {
			t.Errorf("%s: send-inventory: %d", call, code)
		}
		b.server.await(ctx, "the inventory", func() bool { return b.server.requests["PUT inventory"] > m })
		must(t, daemon.Process.Signal(syscall.SIGTERM))
		if err := daemon.Wait(); err != nil {
			t.Errorf("%s: %v\n%s", call, err, said)
		}
		if code, out, _ := b.as("mender-update", "check-update"); code != 0 || out != "no update\n" {
			t.Errorf("%s: without a daemon: %d, %q", call, code, out)
		}
		m = b.server.count("PUT inventory")
		if code, _, _ := b.as("mender", "send-inventory"); code != 0 || b.server.count("PUT inventory") != m+1 {
			t.Errorf("%s: without a daemon: %d, and %d inventories", call, code, b.server.count("PUT inventory")-m)
		}
	}
}

// Only the daemon that has marked the journal gets a signal: not who has it locked for something else.
func TestNamesSignalOnlyDaemon(t *testing.T) {
	b := newVerbBoard(t)
	b.server.autoAccept = true
	b.setup()
	b.want(0, "", "bootstrap")
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	defer signal.Stop(signals)
	j, _, err := openJournal(b.dir+"/var", nil) // this process is the one that runs
	must(t, err)
	defer j.close()
	check := func(want int, says string) {
		t.Helper()
		cmd, out := b.process("mender-update", "check-update")
		cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != want || !strings.Contains(out.String(), says) {
			t.Errorf("got exit code %d, want %d and %q: %s", got, want, says, out)
		}
	}
	check(0, "no update")
	whole := &syscall.Flock_t{Type: syscall.F_WRLCK}
	f := j.st.(*device).f
	must(t, syscall.FcntlFlock(f.Fd(), syscall.F_SETLK, whole))
	check(exitFailed, "no daemon")
	whole.Type = syscall.F_UNLCK
	must(t, syscall.FcntlFlock(f.Fd(), syscall.F_SETLK, whole))
	select {
	case <-signals:
		t.Fatal("a process that is no daemon got a signal")
	default:
	}
	must(t, j.markDaemon())
	check(0, fmt.Sprintf("told the daemon, process %d", os.Getpid()))
	select {
	case <-signals:
	case <-t.Context().Done():
		t.Error("the daemon got no signal")
	}
}

// menderClient runs Debian's mender-client in its own datastore, with a configuration and update modules of
// the test in the places that it looks in.
func menderClient(t *testing.T, dir string, words ...string) (code int, out string) {
	script := fmt.Sprintf("mount --bind %s/etc /etc/mender && "+
		"mount --bind %s/share/modules/v3 /usr/share/mender/modules/v3 && exec \"$@\"", dir, dir)
	cmd := exec.Command("unshare", append([]string{"-m", "sh", "-c", script, "-", "/usr/bin/mender", "--no-syslog"},
		words...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Run()
	t.Logf("client: %s: %v\n%s%s", strings.Join(words, " "), cmd.ProcessState, stdout.String(), stderr.String())
	return cmd.ProcessState.ExitCode(), stdout.String()
}

// The same situations, one after the other, with the real client and with this program under its name: the same
// exit codes, and the same lines of those that scripts read.
func TestNamesLikeClient(t *testing.T) {
	version, err := exec.Command("/usr/bin/mender", "--version").Output()
	if err != nil || !strings.HasPrefix(string(version), "3.") || os.Getuid() != 0 {
		t.Skip("needs root, and Debian's mender-client (make packages)")
	}
	b := newVerbBoard(t)
	theirs := b.dir + "/theirs"
	must(t, os.Mkdir(theirs, 0o700))
	must(t, os.WriteFile(b.dir+"/etc/artifact_info", []byte("artifact_name=first\n"), 0o644))
	must(t, os.WriteFile(b.dir+"/etc/mender.conf", []byte("{}"), 0o644))
	for _, d := range []string{theirs, b.dir + "/var"} {
		must(t, os.WriteFile(d+"/device_type", []byte("device_type=qemu\n"), 0o644))
	}
	module := func(name, reboot, rollback string) {
		writeScript(t, b.dir+"/share/modules/v3/"+name, fmt.Sprintf(`case "$1" in
NeedsArtifactReboot) echo %s ;;
SupportsRollback) echo %s ;;
ArtifactInstall) ! grep -q broken "$2"/files/* ;;
esac`, reboot, rollback), 0o755)
		for _, what := range []string{"good", "broken"} {
			must(t, os.WriteFile(b.dir+"/payload", []byte(what), 0o600))
			b.want(0, "", "pack", "-T", name, "-n", name+"-"+what, "-c", "qemu", "-f", b.dir+"/payload",
				"-o", b.dir+"/"+name+"-"+what)
		}
	}
	module("plain", "No", "Yes")
	module("reboots", "Yes", "Yes")
	module("oneway", "No", "No")
	b.want(0, "", "pack", "-T", "plain", "-n", "other", "-c", "another", "-f", b.dir+"/payload", "-o", b.dir+"/other")
	for _, call := range []string{
		"commit", "rollback", "show-artifact", "bogus", "version", "--bogus", "commit --bogus", "commit extra", "install",
		"install DIR/nowhere", "install DIR/payload", "install DIR/other", "-l panic commit", "-l bogus commit",
		"--passphrase-file DIR/nowhere commit", "-F commit", "--passphrase-file DIR/nowhere bootstrap",
		"install DIR/plain-good", "show-artifact", "commit", "show-artifact", "show-provides", "commit",
		"install --reboot-exit-code DIR/reboots-good", "rollback", "show-artifact", "rollback",
		"install DIR/reboots-good", "commit", "show-artifact", "install DIR/plain-broken", "show-artifact", "commit",
		"install --passphrase-file DIR/nowhere --reboot-exit-code " +
			"DIR/oneway-good", "show-artifact", "show-provides", "commit",
		"install DIR/oneway-broken", "show-artifact", "check-update extra",
	} {
		words := strings.Fields(strings.ReplaceAll(call, "DIR", b.dir))
		code, out, _ := b.as("mender", append([]string{"--no-syslog"}, words...)...)
		wantCode, want := menderClient(t, b.dir, append([]string{"-d", theirs}, words...)...)
		if code != wantCode || !slices.Equal(menderLines(words, out), menderLines(words, want)) {
			t.Errorf("%s: got exit code %d and %q, the client's is %d, %q", call, code, out, wantCode, want)
		}
	}
}

// menderLines are those that scripts read.
func menderLines(words []string, out string) (lines []string) {
	for line := range strings.Lines(out) {
		if strings.HasPrefix(words[0], "show-") || strings.HasPrefix(line, "Use 'commit'") ||
			strings.HasPrefix(line, "At least one payload") {
			lines = append(lines, line)
		}
	}
	return lines
}

// What the client's setup writes and ours are the same configuration, and both fail where the client would
// have to ask.
func TestNamesSetupLikeClient(t *testing.T) {
	version, err := exec.Command("/usr/bin/mender", "--version").Output()
	if err != nil || !strings.HasPrefix(string(version), "3.") || os.Getuid() != 0 {
		t.Skip("needs root, and Debian's mender-client (make packages)")
	}
	for _, call := range []string{
		"--device-type b --server-url https://x.example --update-poll 10 --retry-poll 11 --inventory-poll 12 --server-cert=",
		"--device-type b --url https://x.example --server-cert /etc/passwd --quiet --demo-polling",
		"--device-type b --demo-polling --hosted-mender --tenant-token T",
		"--device-type b --server-url https://x.example --server-ip 10.0.0.7",
		"--device-type b --hosted-mender --username u@example --password p",
		"--server-url https://x.example", "--device-type b", "",
	} {
		b := newVerbBoard(t)
		must(t, os.Mkdir(b.dir+"/theirs", 0o700))
		code, _, _ := b.as("mender", append([]string{"--no-syslog", "setup"}, strings.Fields(call)...)...)
		wantCode, _ := menderClient(t, b.dir, append([]string{"setup", "-c", b.dir + "/theirs/conf", "-d", b.dir + "/theirs"},
			strings.Fields(call)...)...)
		if code != wantCode {
			t.Errorf("%s: got exit code %d, the client's is %d", call, code, wantCode)
		}
		got := setupResult(t, b.dir+"/etc/mender.conf", b.dir+"/var")
		want := setupResult(t, b.dir+"/theirs/conf", b.dir+"/theirs")
		if got != want {
			t.Errorf("%s: got %s, the client's is %s", call, got, want)
		}
	}
}

func setupResult(t *testing.T, conf, ds string) string {
	if _, err := os.Stat(conf); err != nil {
		return "nothing"
	}
	p := defaultPaths()
	p.ds = ds
	c, err := loadConfig(p, configFile{conf, true}, configFile{path: filepath.Join(ds, "none")}, nil)
	must(t, err)
	dt, err := c.deviceType()
	must(t, err)
	return fmt.Sprint(c.Servers, c.ServerCertificate, c.TenantToken, c.UpdatePollIntervalSeconds,
		c.InventoryPollIntervalSeconds,
		c.RetryPollIntervalSeconds, dt)
}

// By the names of Mender's programs everything is as by its own.
func TestOtherNames(t *testing.T) {
	b := newImageBoard(t)
	for _, name := range []string{"mender", "/usr/bin/mender-update"} {
		var out, errs bytes.Buffer
		args := b.args(t, "show-artifact")
		args[0] = name
		if code := runProgram(t.Context(), args, nil, &out, &errs); code != 0 || out.String() != "unknown\n" ||
			errs.Len() > 0 {
			t.Errorf("%s: exit %d, %q, %q", name, code, &out, &errs)
		}
	}
}
