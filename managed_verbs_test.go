// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// From an empty device to a finished deployment and one that fails, verb by verb.
func TestManagedVerbs(t *testing.T) {
	b := newVerbBoard(t)
	b.want(exitFailed, "hint: set ServerURL", "run")
	b.want(exitFailed, "no server is configured", "check-update")
	if _, _, log := b.call(t.Context(), "daemon"); strings.Count(log, "no server is configured") != 1 ||
		strings.Count(log, "hint: ") != 1 {
		t.Errorf("a daemon without a server says %q, want it once", log)
	}
	b.setup("--update-poll", "900")
	// Not accepted yet: bootstrap has done its part, run has not.
	b.want(0, "accept the device", "bootstrap")
	key, err := os.ReadFile(b.dir + "/var/mender-agent.pem")
	must(t, err)
	b.want(exitTempFail, "hint: accept the device", "run")
	asked := b.server.count("POST auth")
	if _, _, log := b.call(t.Context(), "run"); !strings.Contains(log, "failures in a row: 1, the last: not authorized") ||
		!strings.Contains(log, "hint: 'mendlet run --now'") || b.server.count("POST auth") != asked {
		t.Errorf("a run that comes too early says %q", log)
	}
	b.want(exitTempFail, "hint: accept the device", "run", "--now", "--splay", "1000h")
	b.want(exitTempFail, "failures in a row: 2", "run") // one that a person has made counts like any
	b.want(exitTempFail, "accept the device", "check-update")
	b.want(exitTempFail, "accept the device", "send-inventory")
	b.server.setDevice(boardID, "accepted")
	b.want(0, "the device is accepted", "bootstrap")
	b.want(0, "nothing is deployed", "run", "--now")
	if inv := b.server.deviceByID(boardID).inventory; inv["device_type"] != "qemu" || inv["mendlet_version"] == nil ||
		inv["artifact_name"] != "unknown" {
		t.Errorf("got inventory %v", inv)
	}
	if out := b.want(0, "", "check-update"); out != "no update\n" {
		t.Errorf("got %q", out)
	}
	n := b.server.count("PUT inventory")
	b.want(0, "nothing is deployed", "run")
	b.want(0, "", "send-inventory")
	if got := b.server.count("PUT inventory") - n; got != 1 {
		t.Errorf("got %d inventories, want the one that was asked for", got)
	}

	good := b.server.deploy("d-1", "release-2", []string{"qemu"}, b.artifact("release-2", "good"))
	before, err := os.ReadFile(b.dir + "/var/" + journalName)
	must(t, err)
	if out := b.want(0, "", "check-update"); out != "update: deployment d-1, artifact \"release-2\"\n" {
		t.Errorf("got %q", out)
	}
	if after, err := os.ReadFile(b.dir + "/var/" + journalName); err != nil || !bytes.Equal(before, after) {
		t.Errorf("check-update changed the journal (%v)", err)
	}
	b.want(0, "success", "run")
	if got, final, _ := b.server.history(good); final != "success" ||
		strings.Join(got, " ") != "downloading installing installing success" {
		t.Errorf("got %q, %s", got, final)
	}
	bad := b.server.deploy("d-2", "release-3", []string{"qemu"}, b.artifact("release-3", "broken"))
	b.want(exitFailed, "rolled-back", "run")
	if got, final, logs := b.server.history(bad); final != "failure" ||
		!strings.Contains(fmt.Sprint(logs), "ArtifactInstall") {
		t.Errorf("got %q, %s and log %v", got, final, logs)
	}

	// Another key is another device; only -F makes one.
	b.want(0, "", "bootstrap")
	if same, err := os.ReadFile(b.dir + "/var/mender-agent.pem"); err != nil || !bytes.Equal(same, key) {
		t.Errorf("the key was replaced (%v)", err)
	}
	b.want(0, "accept the device", "bootstrap", "-F")
	if other, err := os.ReadFile(b.dir + "/var/mender-agent.pem"); err != nil || bytes.Equal(other, key) {
		t.Errorf("the key was not replaced (%v)", err)
	}
	if st, err := os.Stat(b.dir + "/var/mender-agent.pem"); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("got mode %v, %v", st.Mode(), err)
	}
}

// The server is told the same version that -v says, in every request and in the inventory.
func TestVersionForServer(t *testing.T) {
	b := newVerbBoard(t)
	b.setup()
	b.server.autoAccept = true
	var agents []string
	b.server.fault = func(_ string, _ http.ResponseWriter, r *http.Request) bool {
		agents = append(agents, r.UserAgent())
		return false
	}
	v := strings.TrimSpace(b.want(0, "", "--version"))
	b.want(0, "nothing is deployed", "run")
	inv := b.server.deviceByID(boardID).inventory
	if !versionForm.MatchString(v) || inv["mender_client_version"] != v || inv["mendlet_version"] != v {
		t.Errorf("got version %q and inventory %v", v, inv)
	}
	if len(agents) < 3 || slices.ContainsFunc(agents, func(a string) bool { return a != "mendlet/"+v }) {
		t.Errorf("got User-Agent %q, want at least three times %q", agents, "mendlet/"+v)
	}
}

func TestPassphraseFile(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("needs openssl")
	}
	b := newVerbBoard(t)
	b.setup()
	b.server.autoAccept = true
	openssl(t, "genrsa", "-aes256", "-traditional", "-passout", "pass:secret", "-out",
		b.dir+"/var/mender-agent.pem", "2048")
	must(t, os.WriteFile(b.dir+"/pass", []byte("secret\n"), 0o600))
	b.want(exitFailed, "--passphrase-file", "run")
	b.want(0, "nothing is deployed", "run", "--passphrase-file", b.dir+"/pass")
	b.want(0, "", "send-inventory", "--passphrase-file", "-")
}

// What setup is not told about stays; a server URL takes the place of a list.
func TestSetup(t *testing.T) {
	b := newVerbBoard(t)
	conf := b.dir + "/etc/mender.conf"
	must(t, os.WriteFile(conf, []byte(`{"Servers":[{"ServerURL":"https://old"}],`+
		`"ArtifactVerifyKey":"/k","Connectivity":{"DisableKeepAlive":true}}`), 0o644))
	b.setup("--tenant-token", "t", "--rootfs-part-a", "/dev/p2", "--rootfs-part-b", "/dev/p3", "--server-cert", "/ca",
		"--update-poll", "5", "--inventory-poll", "6", "--retry-poll", "7")
	text, err := os.ReadFile(conf)
	must(t, err)
	var got map[string]any
	must(t, json.Unmarshal(text, &got))
	want := map[string]any{"ServerURL": b.server.URL, "TenantToken": "t", "RootfsPartA": "/dev/p2",
		"RootfsPartB":       "/dev/p3",
		"ServerCertificate": "/ca", "UpdatePollIntervalSeconds": 5.0, "InventoryPollIntervalSeconds": 6.0,
		"RetryPollIntervalSeconds": 7.0,
		"ArtifactVerifyKey":        "/k", "Connectivity": map[string]any{"DisableKeepAlive": true}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if st, err := os.Stat(conf); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("got mode %v, %v: it holds a tenant token", st.Mode(), err)
	}
	if text, err := os.ReadFile(b.dir + "/var/device_type"); err != nil || string(text) != "device_type=qemu\n" {
		t.Errorf("got device type %q, %v", text, err)
	}
	must(t, os.WriteFile(conf, []byte(`{"half`), 0o644))
	b.want(exitFailed, "configuration", "setup", "--hosted-mender")
	if text, err := os.ReadFile(conf); err != nil || string(text) != `{"half` {
		t.Errorf("a file that could not be read became %q, %v", text, err)
	}
}

// Cron calls each minute: a second process ends at once, also while the first one waits for
// its part of the splay.
func TestRunLocked(t *testing.T) {
	b := newVerbBoard(t)
	b.setup()
	j, _, err := openJournal(b.dir+"/var", nil)
	must(t, err)
	b.want(exitTempFail, "another mendlet is running", "run", "--splay", "1000h")
	must(t, j.close())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if code, _, _ := b.call(ctx, "run", "--splay", "1000h"); code != exitTempFail {
		t.Errorf("told to end while it waits: got exit code %d", code)
	}
	if len(b.server.log) != 0 {
		t.Errorf("got requests %q", b.server.log)
	}
}

// Each step waits for what the server sees; the intervals are long, so what comes before
// they end was asked for by a signal.
func TestDaemon(t *testing.T) {
	b := newVerbBoard(t)
	b.setup("--update-poll", "1", "--inventory-poll", "100000")
	b.server.autoAccept = true
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	daemon := func(f func()) {
		t.Helper()
		inner, stop := context.WithCancel(ctx)
		done := make(chan int)
		go func() {
			code, _, _ := b.call(inner, "daemon")
			done <- code
		}()
		f()
		stop()
		if code := <-done; code != 0 {
			t.Errorf("got exit code %d of a daemon that was told to end", code)
		}
	}
	polls := func() int { return b.server.requests["POST next"] }
	daemon(func() {
		b.server.await(ctx, "two polls", func() bool { return polls() >= 2 })
		b.server.mu.Lock()
		auths, inventories := b.server.requests["POST auth"], b.server.requests["PUT inventory"]
		b.server.mu.Unlock()
		if auths != 1 || inventories != 1 {
			t.Errorf("got %d authentications and %d inventories in two polls, want 1 and 1", auths, inventories)
		}
		dep := b.server.deploy("d-1", "release-2", []string{"qemu"}, b.artifact("release-2", "good"))
		b.server.await(ctx, "the deployment", func() bool {
			for _, run := range dep.devices {
				return finished(run.status)
			}
			return false
		})
	})
	b.setup("--update-poll", "100000")
	var n, m int
	daemon(func() {
		b.server.mu.Lock()
		n = polls()
		b.server.mu.Unlock()
		b.server.await(ctx, "the first poll", func() bool { return polls() > n })
		must(t, syscall.Kill(os.Getpid(), syscall.SIGUSR1))
		b.server.await(ctx, "SIGUSR1's poll", func() bool { return polls() > n+1 })
		b.server.mu.Lock()
		m = b.server.requests["PUT inventory"]
		b.server.mu.Unlock()
		must(t, syscall.Kill(os.Getpid(), syscall.SIGUSR2))
		b.server.await(ctx, "SIGUSR2's inventory", func() bool { return b.server.requests["PUT inventory"] > m })
	})
	b.setup("--update-poll", "100000", "--inventory-poll", "1")
	writeScript(t, b.dir+"/share/inventory/mender-inventory-test", "date +x=%s%N", 0o755)
	daemon(func() {
		b.server.await(ctx, "inventories by the clock", func() bool { return b.server.requests["PUT inventory"] > m+1 })
	})
}

// check-update of a device without a key asks nobody and leaves no file behind; with one it does not
// change the datastore either.
func TestCheckUpdateMakesNothing(t *testing.T) {
	b := newVerbBoard(t)
	b.setup()
	list := func() []string {
		entries, err := os.ReadDir(b.dir + "/var")
		must(t, err)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	before := list()
	b.want(exitFailed, "hint: 'mendlet bootstrap' makes the key", "check-update")
	if got := list(); !slices.Equal(got, before) || b.server.count("POST auth") != 0 {
		t.Errorf("the datastore has %q, want %q; %d requests", got, before, b.server.count("POST auth"))
	}
	must(t, os.RemoveAll(b.dir+"/var"))
	b.want(exitFailed, "hint: 'mendlet bootstrap' makes the key", "check-update")
	if _, err := os.Stat(b.dir + "/var"); err == nil {
		t.Error("the datastore was made")
	}
	b.server.autoAccept = true
	b.setup()
	b.want(0, "the device is accepted", "bootstrap")
	before = list()
	if out := b.want(0, "", "check-update"); out != "no update\n" || !slices.Equal(list(), before) {
		t.Errorf("got %q, and the datastore has %q, want %q", out, list(), before)
	}
}

// A server that may know nothing of the device any more is told its inventory again, whoever has met
// that, and told it once.
func TestInventoryAfterRefusal(t *testing.T) {
	for name, c := range map[string]struct {
		before func(b *verbBoard) // what happens on the server, and what is called meanwhile
		sends  int
	}{
		"nothing": {func(*verbBoard) {}, 0},
		"token expired, met by a verb that gets another": {func(b *verbBoard) { b.server.expireTokens() }, 0},
		"decommissioned, and nobody has noticed":         {func(b *verbBoard) { b.server.decommission(boardID) }, 1},
		"decommissioned, met by check-update": {func(b *verbBoard) {
			b.server.decommission(boardID)
			b.server.autoAccept = false
			b.want(exitTempFail, "accept the device", "check-update")
		}, 1},
		"rejected, and nobody has noticed": {func(b *verbBoard) {
			b.server.setDevice(boardID, "rejected")
			b.server.setDevice(boardID, "accepted")
		}, 0},
		"rejected, met by check-update": {func(b *verbBoard) {
			b.server.setDevice(boardID, "rejected")
			b.server.autoAccept = false
			b.want(exitTempFail, "accept the device", "check-update")
		}, 1},
		"rejected, met by bootstrap": {func(b *verbBoard) {
			b.server.setDevice(boardID, "rejected")
			b.server.autoAccept = false
			b.want(0, "not accepted yet", "bootstrap")
		}, 1},
		"rejected, met by run": {func(b *verbBoard) {
			b.server.setDevice(boardID, "rejected")
			b.server.autoAccept = false
			b.want(exitTempFail, "accept the device", "run")
			b.wait()
		}, 1},
		"a token that is refused in the middle of a run": {func(b *verbBoard) {
			must(b.t, os.Remove(b.dir+"/var/"+keptName)) // a kept one has expired, no more
			once := true
			b.server.setFault(func(route string, _ http.ResponseWriter, _ *http.Request) bool {
				if once && route == "POST next" {
					once = false
					b.server.expireTokens()
				}
				return false
			})
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := newVerbBoard(t)
			b.setup()
			b.server.autoAccept = true
			b.want(0, "nothing is deployed", "run")
			b.want(0, "nothing is deployed", "run")
			if n := b.server.count("PUT inventory"); n != 1 {
				t.Fatalf("got %d inventories, want one", n)
			}
			c.before(b)
			b.server.autoAccept = true
			for range 2 {
				b.want(0, "nothing is deployed", "run")
			}
			if n := b.server.count("PUT inventory") - 1; n != c.sends {
				t.Errorf("got %d more inventories, want %d", n, c.sends)
			}
			if c.sends > 0 && b.server.deviceByID(boardID).inventory["device_type"] != "qemu" {
				t.Errorf("the server has inventory %v", b.server.deviceByID(boardID).inventory)
			}
		})
	}
}

// What bootstrap says of a server: not accepted yet is no error, what a configuration has to mend is
// one, and what the network does is for later.
func TestBootstrapEnds(t *testing.T) {
	b := newVerbBoard(t)
	stranger := newTestServer(t, true)
	down := "http://" + deadAddr(t)
	broken := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }))
	t.Cleanup(broken.Close)
	nginx := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(400)
		io.WriteString(w, "<html><head><title>400 No required SSL certificate was sent</title></head></html>")
	}))
	t.Cleanup(nginx.Close)
	for _, c := range []struct {
		url  string
		exit int
		says string
	}{
		{b.server.URL, exitOK, "hint: accept the device"},
		{stranger.URL, exitFailed, "hint: the certificate was issued by"},
		{nginx.URL, exitFailed, "hint: the server wants a certificate of this device: HttpsClient"},
		{"ftp://127.0.0.1", exitRefused, "want http://HOST"},
		{"http://127.0.0.1:port", exitRefused, "hint: set ServerURL"},
		{"http:///nohost", exitRefused, "hint: set ServerURL"},
		{down, exitTempFail, "connection refused"},
		{broken.URL, exitTempFail, "HTTP status 500"},
	} {
		b.want(0, "", "setup", "--server-url", c.url, "--device-type", "qemu")
		code, out, log := b.call(t.Context(), "bootstrap")
		if code != c.exit || !strings.Contains(log, c.says) || out != "" {
			t.Errorf("%s: got exit code %d, want %d and %q", c.url, code, c.exit, c.says)
		}
		if strings.Contains(log, "error") != (c.exit != exitOK) {
			t.Errorf("%s: exit code %d, and it says\n%s", c.url, code, log)
		}
	}
}

// A name that does not resolve is no error of the configuration: the network may not be up.
func TestBootstrapWithoutNames(t *testing.T) {
	dns := startDNS(t, "127.0.0.1:0", func(dnsQuestion) dnsAnswer { return dnsAnswer{code: dnsNXDomain} })
	s := newManagedSetup(t)
	a := newSimDevice(t, s.dir, s.images).start()
	a.c.Servers = []serverEntry{{"https://" + dialHost}}
	a.o.paths = a.c.paths
	a.o.net.tuneNet = func(o *netOptions) { o.tuneDialer = asks(dns) }
	wantCode(t, bootstrapDevice(t.Context(), a), exitTempFail)
}

// The first of several servers, which is dead, is not waited for by every run; the one that answered
// is asked first for a day, and no longer.
func TestServerRemembered(t *testing.T) {
	b := newVerbBoard(t)
	b.server.autoAccept = true
	var dials atomic.Int32
	dead := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		dials.Add(1)
		panic(http.ErrAbortHandler)
	}))
	t.Cleanup(dead.Close)
	b.setup()
	must(t, os.WriteFile(b.dir+"/etc/mender.conf",
		fmt.Appendf(nil, `{"Servers":[{"ServerURL":%q},{"ServerURL":%q}]}`, dead.URL, b.server.URL), 0o600))
	for i, want := range []int32{1, 1, 1} {
		b.want(0, "nothing is deployed", "run")
		if got := dials.Load(); got != want {
			t.Errorf("run %d: the dead server was asked %d times, want %d", i+1, got, want)
		}
	}
	b.want(0, "no update", "check-update")
	if dials.Load() != 1 {
		t.Error("check-update asked the dead server")
	}
	age := func(d time.Duration) {
		changeJournal(t, b.dir+"/var", func(r *record) { r.Net.ServerTime = time.Now().Add(-d).UTC().Truncate(time.Second) })
	}
	for _, d := range []time.Duration{25 * time.Hour, -2 * time.Hour} { // a day later; a clock that went back
		before := dials.Load()
		age(d)
		b.want(0, "nothing is deployed", "run")
		b.want(0, "nothing is deployed", "run")
		if got := dials.Load() - before; got != 1 {
			t.Errorf("%s later: the first server was asked %d times in two runs, want once", d, got)
		}
	}
	// One that is remembered and has died is no hindrance.
	changeJournal(t, b.dir+"/var", func(r *record) { r.Net.Server, r.Net.ServerTime = dead.URL, time.Now().UTC() })
	b.want(0, "nothing is deployed", "run")
	if rec, err := peekJournal(b.dir+"/var", nil); err != nil || rec.Net.Server != b.server.URL {
		t.Errorf("got %+v, %v", rec.Net, err)
	}
}
