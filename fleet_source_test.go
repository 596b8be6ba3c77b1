// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nofleet

package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fleetHost is a web space with a channel, and what it saw.
type fleetHost struct {
	*httptest.Server
	t   testing.TB
	key crypto.Signer

	mu      sync.Mutex
	files   map[string][]byte
	objects map[string][]byte // that were put there
	log     []string
	agents  []string
	fault   func(w http.ResponseWriter, r *http.Request) bool
}

func newFleetHost(t testing.TB) *fleetHost {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	h := &fleetHost{t: t, key: key, files: map[string][]byte{}, objects: map[string][]byte{}}
	h.Server = httptest.NewServer(http.HandlerFunc(h.serve))
	t.Cleanup(h.Close)
	return h
}

func (h *fleetHost) serve(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	name := strings.TrimPrefix(r.URL.Path, "/")
	text, ok := h.files[name]
	h.agents = append(h.agents, r.UserAgent())
	fault := h.fault
	h.mu.Unlock()
	if fault != nil && fault(w, r) {
		return
	}
	rec := &statusRecorder{w, 200}
	switch {
	case r.Method == http.MethodPut || r.Method == http.MethodPost:
		body, _ := io.ReadAll(r.Body)
		h.mu.Lock()
		h.objects[name] = body
		h.mu.Unlock()
		rec.WriteHeader(http.StatusCreated)
	case !ok:
		http.NotFound(rec, r)
	default:
		rec.Header().Set("ETag", testETag(text))
		rec.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(rec, r, "", time.Unix(1700000000, 0), bytes.NewReader(text))
	}
	h.mu.Lock()
	h.log = append(h.log, fmt.Sprintf("%s %s %d", r.Method, name, rec.code))
	h.mu.Unlock()
}

type statusRecorder struct {
	http.ResponseWriter
	code int
}

func (s *statusRecorder) WriteHeader(code int) {
	s.code = code
	s.ResponseWriter.WriteHeader(code)
}

// heard gives the requests since the last call.
func (h *fleetHost) heard() (log []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	log, h.log = h.log, nil
	return log
}

func (h *fleetHost) put(name string, text []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.files[name] = text
}

// testEntry is the entry of a release with the artifact in text.
func testEntry(t testing.TB, name string, artifact []byte, more map[string]any) map[string]any {
	art, err := openArtifact(bytes.NewReader(artifact), artifactOptions{})
	must(t, err)
	e := map[string]any{"name": name, "url": []string{name + ".mender"}, "size": len(artifact),
		"manifest": hex.EncodeToString(art.ManifestSum[:])}
	for k, v := range more {
		e[k] = v
	}
	return e
}

// signFile makes a file of channel acme, good from an hour ago for two weeks.
func (h *fleetHost) signFile(serial int, head map[string]any, releases ...map[string]any) []byte {
	now := time.Now().UTC().Truncate(time.Second)
	m := map[string]any{"channel": "acme", "serial": serial, "issued": zulu(now.Add(-time.Hour)),
		"expires": zulu(now.Add(14 * 24 * time.Hour)), "releases": append([]map[string]any{}, releases...)}
	for k, v := range head {
		m[k] = v
	}
	body, err := json.Marshal(m)
	must(h.t, err)
	return testSigned(h.t, fmt.Appendf(nil, "%s%s\n", fleetMagic, body), h.key)
}

func (h *fleetHost) publish(serial int, head map[string]any, releases ...map[string]any) {
	h.put("acme.fleet", h.signFile(serial, head, releases...))
}

// channelBoard is a verbBoard that has a channel and no server.
type channelBoard struct {
	*verbBoard
	host *fleetHost
}

func newChannelBoard(t *testing.T) *channelBoard {
	b := &channelBoard{newVerbBoard(t), newFleetHost(t)}
	b.want(0, "", "setup", "--device-type", "qemu")
	b.configure(map[string]any{"Channel": b.host.URL + "/acme.fleet",
		"FleetVerifyKeys": []string{publicFile(t, b.host.key.Public())}})
	return b
}

func (b *channelBoard) configure(keys map[string]any) {
	b.t.Helper()
	text, err := json.Marshal(keys)
	must(b.t, err)
	must(b.t, os.WriteFile(b.dir+"/etc/mender.conf", text, 0o600))
}

// release makes an artifact, puts it on the web space and gives its entry.
func (b *channelBoard) release(name, payload string, more map[string]any) map[string]any {
	text := b.artifact(name, payload)
	b.host.put(name+".mender", text)
	return testEntry(b.t, name, text, more)
}

func (b *channelBoard) has(name string) {
	b.t.Helper()
	if out := b.want(0, "", "show-artifact"); strings.TrimSpace(out) != name {
		b.t.Fatalf("got artifact %q, want %q", out, name)
	}
}

func (b *channelBoard) again() {
	changeJournal(b.t, b.dir+"/var", func(r *record) {
		if r.Net != nil {
			r.Net.NextTry = time.Time{}
		}
	})
}

// run is want of the verb run, after the wait of earlier failures.
func (b *channelBoard) run(code int, says string, more ...string) {
	b.t.Helper()
	b.again()
	b.want(code, says, append([]string{"run"}, more...)...)
}

// A poll of a channel that has not changed is one request over a session of before.
func TestChannelPollBytes(t *testing.T) {
	b := newChannelBoard(t)
	b.host.publish(1, nil, b.release("gw-1", "good", nil))
	ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	s := tlsServer(t, ca, &tls.Config{})
	s.Config.Handler = http.HandlerFunc(b.host.serve)
	addr, counted := meteredProxy(t, func() (net.Conn, error) { return net.Dial("tcp", s.Listener.Addr().String()) })
	b.configure(map[string]any{"Channel": "https://" + addr + "/acme.fleet", "ServerCertificate": ca.pem,
		"FleetVerifyKeys": []string{publicFile(t, b.host.key.Public())}})
	b.run(0, "success")
	b.run(0, "nothing is to be installed")
	for range 3 {
		conns, before := counted()
		b.host.heard()
		b.run(0, "nothing is to be installed")
		all, after := counted()
		log := b.host.heard()
		if !slices.Equal(log, []string{"GET acme.fleet 304"}) || all != conns+1 || after-before > 1300 {
			t.Errorf("got %q in %d bytes over %d connections, want one request and 1300 bytes at most", log, after-before,
				all-conns)
		}
		t.Logf("304: %d bytes", after-before)
	}
}

// From an empty device to releases that are installed, fail, are paused and taken back.
func TestChannelVerbs(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	b.run(exitTempFail, "HTTP status 404")
	one := b.release("gw-1", "good", nil)
	h.publish(1, nil, one)
	if out := b.want(0, "", "check-update"); !strings.Contains(out, "gw-1                 is to be installed\n") ||
		!strings.Contains(out, "update: release \"gw-1\"") {
		t.Errorf("got %q", out)
	}
	var look channelLook
	must(t, json.Unmarshal([]byte(b.want(0, "", "check-update", "--json")), &look))
	if look.Channel != "acme" || look.Serial != 1 || look.Update != "gw-1" || look.Stale || len(look.Releases) != 1 {
		t.Errorf("got %+v", look)
	}
	b.run(0, "success")
	b.has("gw-1")
	h.heard()
	b.run(0, "nothing is to be installed")
	if got := h.heard(); !slices.Equal(got, []string{"GET acme.fleet 304"}) {
		t.Errorf("a poll of what has not changed costs %q, want one 304", got)
	}
	if v := strings.TrimSpace(b.want(0, "", "--version")); !slices.Contains(h.agents, "mendlet/"+v+" (qemu; gw-1)") {
		t.Errorf("got User-Agent %q", h.agents[len(h.agents)-1])
	}
	b.want(0, `channel "acme": its file, serial 1, is good until`, "status")

	bad := b.release("gw-2", "broken", nil)
	h.publish(2, nil, one, bad)
	for range 3 {
		b.run(exitFailed, "rolled-back")
	}
	h.heard()
	b.run(0, `the newest release, "gw-2", has failed 3 times here`)
	if got := h.heard(); len(got) != 1 {
		t.Errorf("got %q, want no download", got)
	}
	better := b.release("gw-2", "better", nil) // the same name, and another manifest
	h.publish(3, nil, one, better)
	b.run(0, "success")
	b.has("gw-2")

	three := b.release("gw-3", "three", map[string]any{"paused": true})
	h.publish(4, nil, one, better, three)
	b.run(0, `"gw-3", is paused`)
	b.run(0, "success", "--now")
	b.has("gw-3")
}

// What a person says goes over the configuration, and a stick needs no network.
func TestChannelStick(t *testing.T) {
	b := newChannelBoard(t)
	stick := filepath.Join(b.dir, "stick")
	must(t, os.Mkdir(stick, 0o755))
	text := b.artifact("gw-1", "good")
	must(t, os.WriteFile(stick+"/gw 1.mender", text, 0o644))
	entry := testEntry(t, "gw-1", text, map[string]any{"url": []string{"gw%201.mender"}})
	past := map[string]any{"issued": "2020-01-01T00:00:00Z", "expires": "2020-01-15T00:00:00Z"}
	must(t, os.WriteFile(stick+"/acme.fleet", b.host.signFile(5, past, entry), 0o644))
	b.host.Close()
	b.run(exitTempFail, "stale since 2020-01-15T00:00:00Z", "--channel", stick+"/acme.fleet")
	b.run(0, "success", "--channel", stick+"/acme.fleet", "--allow-expired")
	b.has("gw-1")
	must(t, os.WriteFile(stick+"/acme.fleet", b.host.signFile(4, past, entry), 0o644))
	b.run(exitTempFail, "serial 4 is older", "--channel", stick+"/acme.fleet", "--allow-expired")
	must(t, os.WriteFile(stick+"/acme.fleet", []byte("mendlet-fleet 1\n{}\n"), 0o644))
	b.run(exitTempFail, "not signed", "--channel", stick+"/acme.fleet", "--allow-expired")
	must(t, os.Rename(stick+"/acme.fleet", stick+"/other.fleet"))
	must(t, os.WriteFile(stick+"/other.fleet", b.host.signFile(6, past, entry), 0o644))
	b.run(exitTempFail, `of channel "acme", want "other"`, "--channel", stick+"/other.fleet", "--allow-expired")
	b.run(0, "nothing is to be installed", "--channel", stick+"/other.fleet#acme", "--allow-expired")
}

// An artifact that is not there yet, or not whole, burns no try, however often; and mirrors are asked in turn.
func TestChannelNotPublishedYet(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	one := b.release("gw-1", "good", map[string]any{"url": []string{"gw-1.mender", "mirror/gw-1.mender"}})
	whole := h.files["gw-1.mender"]
	h.publish(1, nil, one)
	delete(h.files, "gw-1.mender")
	for range 12 { // more than the downloads that may come to nothing
		b.run(exitTempFail, "not there, or not yet")
	}
	h.put("gw-1.mender", whole[:len(whole)/2])
	for range 12 {
		b.run(exitTempFail, "not there, or not yet")
	}
	for _, text := range [][]byte{nil, []byte("<html>soon"), b.artifact("gw-1", "another"),
		bytes.Repeat([]byte("x"), len(whole))} {
		h.put("gw-1.mender", append(text, make([]byte, max(0, len(whole)-len(text)))...))
		b.run(exitTempFail, "download not finished")
	}
	h.heard()
	h.put("mirror/gw-1.mender", whole)
	b.run(0, "success")
	if got := h.heard(); !slices.Contains(got, "GET mirror/gw-1.mender 200") {
		t.Errorf("got %q", got)
	}
	b.has("gw-1")
}

// An update that needs no reboot may have cut the device off, too: before the commit the file has to come once more,
// over a new connection. Until it does the update waits, and goes back when that is given up.
func TestChannelBeforeCommit(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	one := b.release("gw-1", "good", nil)
	h.publish(1, nil, one)
	var from []string // where each request is from
	var gone atomic.Bool
	h.mu.Lock()
	h.fault = func(_ http.ResponseWriter, r *http.Request) bool {
		if from = append(from, r.RemoteAddr); gone.Load() && r.URL.Path == "/acme.fleet" {
			panic(http.ErrAbortHandler) // the connection ends without an answer
		}
		gone.CompareAndSwap(false, r.URL.Path == "/gw-2.mender")
		return false
	}
	h.mu.Unlock()
	b.run(0, "success")
	if n := len(from); n != 3 || from[0] != from[1] || from[1] == from[2] {
		t.Errorf("got requests from %q, want file and artifact over one connection, and the file over another", from)
	}
	h.publish(2, nil, one, b.release("gw-2", "good", nil))
	b.run(exitTempFail, "EOF")
	b.run(exitTempFail, "EOF")
	b.has("gw-1")
	gone.Store(false)
	h.heard()
	b.run(0, "success")
	if got := h.heard(); !slices.Equal(got, []string{"GET acme.fleet 200", "GET acme.fleet 304"}) {
		t.Errorf("got %q, want the whole file, and whether it wants a report", got)
	}
	b.has("gw-2")

	conf := map[string]any{"Channel": h.URL + "/acme.fleet", "RetryPollCount": 2,
		"FleetVerifyKeys": []string{publicFile(t, h.key.Public())}}
	b.configure(conf)
	h.publish(3, nil, one, b.release("gw-3", "good", map[string]any{"url": []string{"gw-2.mender"}}))
	h.put("gw-2.mender", h.files["gw-3.mender"])
	b.run(exitTempFail, "EOF")
	b.run(exitFailed, "given up after 2 tries")
	b.has("gw-2")
}

// A stick does not wait for what has failed over the network.
func TestChannelStickOffline(t *testing.T) {
	b := newChannelBoard(t)
	b.host.Close()
	b.run(exitTempFail, "refused")
	b.want(exitTempFail, "not before", "run")
	text := b.artifact("gw-1", "good")
	must(t, os.WriteFile(b.dir+"/gw-1.mender", text, 0o644))
	must(t, os.WriteFile(b.dir+"/acme.fleet", b.host.signFile(1, nil, testEntry(t, "gw-1", text, nil)), 0o644))
	b.want(0, "success", "run", "--channel", b.dir+"/acme.fleet")
}

// A release that is taken back before anything of it has come gives way, and was no failure.
func TestChannelTakenBack(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	one, two := b.release("gw-1", "good", nil), b.release("gw-2", "good", nil)
	delete(h.files, "gw-2.mender")
	h.publish(1, nil, one, two)
	b.run(exitTempFail, "not there")
	h.publish(2, nil, one)
	b.run(exitFailed, "not what there is for this device now")
	b.run(0, "success")
	b.has("gw-1")
	if rec, err := peekJournal(b.dir+"/var", nil); err != nil || len(rec.Net.Channel.Failed) > 0 {
		t.Errorf("got failures %v, %v, want none", rec.Net.Channel.Failed, err)
	}
}

func TestChannelReport(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	head := map[string]any{"report": h.URL + "/r/"}
	one := b.release("gw-1", "good", nil)
	h.publish(1, head, one)
	object := fmt.Sprintf("r/acme/%.16s.json", sha256Hex([]byte(boardID)))
	said := func() (m map[string]any) {
		must(t, json.Unmarshal(h.objects[object], &m))
		return m
	}
	b.run(0, "success")
	if m := said(); m["artifact"] != "gw-1" || m["result"] != "committed" || m["release"] != "gw-1" ||
		m["serial"] != 1.0 || m["device_type"] != "qemu" || m["error"] != "" {
		t.Errorf("got %v", m)
	}
	h.heard()
	b.run(0, "nothing")
	if got := h.heard(); len(got) != 1 {
		t.Errorf("got %q, want no second report", got)
	}
	bad := b.release("gw-2", "broken", nil)
	h.publish(2, head, one, bad)
	b.run(exitFailed, "rolled-back")
	if m := said(); m["artifact"] != "gw-1" || m["result"] != "rolled-back" || m["release"] != "gw-2" || m["error"] == "" {
		t.Errorf("got %v", m)
	}
	// A day later, and by POST; one that does not get through is no reason for anything.
	head["report_method"] = "POST"
	h.publish(3, head, one)
	changeJournal(t, b.dir+"/var", func(r *record) { r.Net.Channel.Reported = time.Now().Add(-25 * time.Hour) })
	b.run(0, "nothing")
	if got := h.heard(); !slices.Contains(got, "POST "+object+" 201") {
		t.Errorf("got %q, want a report", got)
	}
	h.publish(4, map[string]any{"report": "http://127.0.0.1:1/"}, one)
	changeJournal(t, b.dir+"/var", func(r *record) { r.Net.Channel.Reported = time.Time{} })
	b.run(0, "not reported")
}

func TestChannelRefusals(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	h.publish(1, nil)
	b.run(0, "nothing")
	b.configure(map[string]any{"Channel": h.URL + "/acme.fleet"})
	b.run(exitRefused, "there is no key to verify its file with")
	b.configure(map[string]any{"Channel": h.URL + "/acme.fleet", "ArtifactVerifyKey": fixtures + "rsa.pub"})
	b.run(exitTempFail, "no signature of it")
	b.configure(map[string]any{"Channel": h.URL + "/acme.fleet", "FleetVerifyKeys": []string{"/none"}})
	b.run(exitRefused, "no key to verify channel files with")
}

// A device in a group, and one whose identity for rollouts is its own.
func TestChannelDevice(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	one := b.release("gw-1", "good", map[string]any{"groups": []string{"canary"}})
	h.publish(1, nil, one)
	b.run(0, `is for groups ["canary"], and this device is in []`)
	must(t, os.WriteFile(b.dir+"/var/groups", []byte("lab\ncanary\n"), 0o600))
	b.want(0, "is to be installed", "check-update")
	must(t, os.Remove(b.dir+"/var/groups"))
	conf := map[string]any{"Channel": h.URL + "/acme.fleet", "Groups": []string{"canary"},
		"FleetVerifyKeys": []string{publicFile(t, h.key.Public())}}
	b.configure(conf)
	b.want(0, "is to be installed", "check-update")
	two := b.release("gw-2", "good", map[string]any{"rollout": [][]any{{"2020-01-01T00:00:00Z", 0.1}}})
	h.publish(2, nil, two)
	for part, want := range map[float64]string{0.05: "is to be installed",
		0.15: "is for 10 % of the devices, and this one is at 15"} {
		conf["DeviceID"] = deviceAt("gw-2", part)
		b.configure(conf)
		b.want(0, want, "check-update")
	}
}

// A daemon asks as often as the file says, or the device's own configuration of channels.
func TestChannelPoll(t *testing.T) {
	c := &channel{a: &app{c: defaultConfig(testPaths), rec: &record{}}, name: "acme"}
	for poll, want := range map[time.Duration]time.Duration{0: 30 * time.Minute, time.Hour: time.Hour,
		time.Second: time.Minute, 1000 * time.Hour: 7 * 24 * time.Hour} {
		c.state().Poll = poll
		if got := c.every(); got != want {
			t.Errorf("poll %s: got %s, want %s", poll, got, want)
		}
	}
	c.state().Poll = time.Hour
	for own, want := range map[int]time.Duration{-1: time.Hour, 0: time.Hour, 1: time.Minute, 600: 10 * time.Minute,
		1 << 30: 7 * 24 * time.Hour, math.MaxInt: 7 * 24 * time.Hour} {
		c.a.c.ChannelPollIntervalSeconds = own
		if got := c.every(); got != want {
			t.Errorf("ChannelPollIntervalSeconds %d: got %s, want %s", own, got, want)
		}
	}
}

// The attacks on what is fetched.

func TestFleetAttackArbitrarySoftware(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	one := b.release("gw-1", "good", nil)
	h.publish(1, nil, one)
	h.put("gw-1.mender", b.artifact("gw-1", "evil")) // another artifact under the name of this one
	b.run(exitTempFail, "manifest has SHA-256")
	// And who can sign the file cannot sign artifacts.
	h.put("gw-1.mender", b.artifact("gw-1", "good"))
	b.configure(map[string]any{"Channel": h.URL + "/acme.fleet", "ArtifactVerifyKey": fixtures + "rsa.pub",
		"FleetVerifyKeys": []string{publicFile(t, h.key.Public())}})
	b.run(exitFailed, "not signed")
	b.has("unknown")
}

func TestFleetAttackFileRollback(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	one, two := b.release("gw-1", "good", nil), b.release("gw-2", "good", nil)
	h.publish(1, nil, two)
	old := h.files["acme.fleet"]
	h.publish(2, nil, two, one) // gw-2 is bad: who has it goes back, by a newer file
	b.run(0, "success")
	b.has("gw-1")
	h.put("acme.fleet", old)
	b.run(exitTempFail, "serial 1 is older than what was seen before, 2")
	b.has("gw-1")
}

// With the journal lost, the running system knows what it was made with.
func TestFleetAttackFileRollbackWithoutJournal(t *testing.T) {
	b := newChannelBoard(t)
	must(t, os.WriteFile(b.dir+"/etc/artifact_info", []byte("artifact_name=gw-2\nfleet_serial=412\n"), 0o644))
	b.host.publish(411, nil, b.release("gw-1", "good", nil))
	b.run(exitTempFail, "serial 411 is older")
	b.host.publish(412, nil)
	b.run(0, "nothing")
}

func TestFleetAttackFreeze(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	one := b.release("gw-1", "good", nil)
	h.publish(1, map[string]any{"issued": "2020-01-01T00:00:00Z", "expires": "2020-01-15T00:00:00Z"}, one)
	b.run(exitTempFail, "stale since 2020-01-15T00:00:00Z")
	b.want(0, "is stale since 2020-01-15T00:00:00Z", "status")
	b.want(exitTempFail, "no update", "check-update")
	// What has begun is finished: the file expires while the artifact is not there yet.
	delete(h.files, "gw-1.mender")
	h.publish(2, nil, one)
	b.run(exitTempFail, "not there")
	h.put("gw-1.mender", b.artifact("gw-1", "good"))
	h.publish(3, map[string]any{"issued": "2020-01-01T00:00:00Z", "expires": "2020-01-15T00:00:00Z"}, one)
	b.run(0, "success")
}

func TestFleetAttackMixAndMatch(t *testing.T) {
	b := newChannelBoard(t)
	b.host.publish(1, map[string]any{"channel": "acme-beta"}, b.release("gw-1", "good", nil))
	b.run(exitTempFail, `of channel "acme-beta", want "acme"`)
	// The file of the one channel with a release of the other: the bytes are signed as a whole.
	text := bytes.Replace(b.host.files["acme.fleet"], []byte("acme-beta"), []byte("acme"), 1)
	b.host.put("acme.fleet", text)
	b.run(exitTempFail, "no signature of it")
}

func TestFleetAttackEndlessData(t *testing.T) {
	b := newChannelBoard(t)
	var sent atomic.Int64
	b.host.fault = func(w http.ResponseWriter, _ *http.Request) bool {
		page := bytes.Repeat([]byte("mendlet-fleet 1\n"), 4096)
		for range 1000 {
			n, err := w.Write(page)
			if sent.Add(int64(n)); err != nil {
				return true
			}
		}
		return true
	}
	b.run(exitTempFail, "more than")
	if n := sent.Load(); n > 16<<20 {
		t.Errorf("%d bytes were taken", n)
	}
}

// A file, and an artifact, that come by a byte now and then for ever: both are given up.
func TestFleetAttackSlowRetrieval(t *testing.T) {
	h := newFleetHost(t)
	h.fault = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", "50000")
		for r.Context().Err() == nil {
			w.Write([]byte("m"))
			http.NewResponseController(w).Flush()
			sleepContext(r.Context(), 10*time.Millisecond)
		}
		return true
	}
	conf := defaultConfig(testPaths)
	hc, err := newHTTPClient(conf, netOptions{})
	must(t, err)
	c := &channel{a: &app{c: conf, rec: &record{}}, at: h.URL + "/acme.fleet", name: "acme", hc: hc,
		web: newAPIClient(conf, hc, nil, nil, newLogger(io.Discard))}
	if c.web.patience != apiTimeout {
		t.Errorf("a channel file may take %s, want %s", c.web.patience, apiTimeout)
	}
	c.web.patience = 50 * time.Millisecond
	_, err = c.fetch(t.Context(), false)
	wantCode(t, err, exitTempFail)
	if !strings.Contains(err.Error(), "no answer in 50ms") || len(c.state().Seen) > 0 {
		t.Errorf("got %v, and %v is kept, want the end of the patience, and nothing", err, c.state().Seen)
	}
	d, err := openDownload(t.Context(), hc, h.URL+"/gw-1.mender", downloadOptions{stall: 50 * time.Millisecond, retries: 1,
		sleep: func(context.Context, time.Duration) error { return nil }, lg: newLogger(io.Discard)})
	if err == nil {
		_, err = io.Copy(io.Discard, d)
		d.Close()
	}
	wantCode(t, err, exitTempFail)
}

// Requests that never arrive: nothing new is begun, and the file that was seen last expires, which the device says.
func TestFleetAttackDropRequest(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	one, two := b.release("gw-1", "good", nil), b.release("gw-2", "good", nil)
	h.publish(1, nil, one)
	b.run(0, "success")
	h.publish(2, nil, one, two)
	var gone atomic.Bool
	gone.Store(true)
	h.mu.Lock()
	h.fault = func(http.ResponseWriter, *http.Request) bool {
		if gone.Load() {
			panic(http.ErrAbortHandler) // the connection ends without an answer
		}
		return false
	}
	h.mu.Unlock()
	b.run(exitTempFail, "EOF")
	b.has("gw-1")
	if out := b.want(0, "", "status"); strings.Contains(out, "stale") {
		t.Errorf("the file has not expired yet: %s", out)
	}
	changeJournal(t, b.dir+"/var", func(r *record) { // two weeks later
		r.Net.Channel.Expires = time.Now().Add(-time.Hour)
	})
	b.want(0, "is stale since", "status")
	gone.Store(false)
	b.run(0, "success")
	b.has("gw-2")
}

func TestFleetAttackKeyLoss(t *testing.T) {
	b := newChannelBoard(t)
	_, next, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	one := b.release("gw-1", "good", nil)
	b.host.publish(900, nil, one)
	b.run(0, "success")
	// The key is lost, or stolen: an image brings another, whose count begins anew.
	b.host.key = next
	b.configure(map[string]any{"Channel": b.host.URL + "/acme.fleet",
		"FleetVerifyKeys": []string{publicFile(t, next.Public())}})
	b.host.publish(1, nil, one, b.release("gw-2", "good", nil))
	b.run(0, "success")
	b.has("gw-2")
}

// simFleet is a simulated device's channel.
func (s *managedSetup) fleet(t testing.TB) *fleetHost {
	h := newFleetHost(t)
	text := readFileOrNil(s.artifacts["new"])
	h.put("new.mender", text)
	h.publish(7, map[string]any{"report": h.URL + "/r/"}, testEntry(t, "new", text, nil))
	return h
}

// followed configures a simulated device for the channel.
func (h *fleetHost) followed(a *app) {
	a.c.Servers, a.c.Channel = nil, h.URL+"/acme.fleet"
	a.c.FleetVerifyKeys = []string{publicFile(h.t, h.key.Public())}
}

// settleChannel boots and runs until there is a verdict and nothing is open.
func (d *simDevice) settleChannel(h *fleetHost) error {
	var last error
	for range 8 {
		if err := d.boot(); err != nil {
			return fmt.Errorf("after %v: %w", last, err)
		}
		last = d.managedRun(context.Background(), "", func(a *app) {
			h.followed(a)
			a.o.atOnce = true
		})
		if rec, err := d.peek(); err != nil {
			return err
		} else if rec.Update == nil && rec.Last != nil {
			return nil
		}
	}
	return fmt.Errorf("not settled after 8 boots; last error: %v", last)
}

func TestChannelUpdateWithReboot(t *testing.T) {
	t.Parallel()
	s := newManagedSetup(t)
	h := s.fleet(t)
	d := newSimDevice(t, s.dir, s.images)
	must(t, d.settleChannel(h))
	must(t, d.check("new"))
	rec, err := d.peek()
	if err != nil || rec.Last.Result != "committed" || rec.Provides["artifact_name"] != "new" {
		t.Errorf("got %+v, %v", rec.Last, err)
	}
	if len(h.objects) != 1 {
		t.Errorf("got reports %q, want one", h.objects)
	}
}

// An update from a stick is committed without a network, and without the stick.
func TestChannelStickPulledOut(t *testing.T) {
	t.Parallel()
	s := newManagedSetup(t)
	h, dir := s.fleet(t), t.TempDir()
	for name, text := range h.files {
		must(t, os.WriteFile(filepath.Join(dir, name), text, 0o600))
	}
	h.Close()
	d := newSimDevice(t, s.dir, s.images)
	must(t, d.boot())
	run := func(path string) error {
		return d.managedRun(t.Context(), "", func(a *app) {
			h.followed(a)
			a.o.channel = path
		})
	}
	wantCode(t, run(filepath.Join(dir, "acme.fleet")), exitReboot)
	must(t, errors.Join(os.RemoveAll(dir), d.boot(), run("")))
	must(t, d.check("new"))
	if rec, err := d.peek(); err != nil || rec.Last == nil || rec.Last.Result != "committed" {
		t.Errorf("got %+v, %v, want it committed", rec.Last, err)
	}
}

// A system that does not get through to its channel any more goes back.
func TestChannelLostByUpdate(t *testing.T) {
	t.Parallel()
	for name, tune := range map[string]func(*fleetHost, *app){
		"no channel configured": func(_ *fleetHost, a *app) { a.c.Channel = "" },
		"another key":           func(h *fleetHost, a *app) { a.c.FleetVerifyKeys = []string{fixtures + "rsa.pub"} },
		"no such file":          func(h *fleetHost, a *app) { a.c.Channel = h.URL + "/gone.fleet#acme" },
		"a server instead":      func(h *fleetHost, a *app) { a.c.Channel, a.c.Servers = "", []serverEntry{{h.URL}} },
	} {
		s := newManagedSetup(t)
		h := s.fleet(t)
		d := newSimDevice(t, s.dir, s.images)
		must(t, d.boot())
		err := d.managedRun(t.Context(), "", h.followed)
		wantCode(t, err, exitReboot)
		for i := 0; i < 10; i++ {
			must(t, d.boot())
			err = d.managedRun(t.Context(), "", func(a *app) {
				h.followed(a)
				a.o.atOnce, a.c.RetryPollCount = true, 3
				if d.booted == "B" {
					tune(h, a)
				}
			})
			if rec, perr := d.peek(); perr != nil || rec.Update == nil {
				break
			}
		}
		if rec, perr := d.peek(); perr != nil || rec.Last == nil || rec.Last.Result != "rolled-back" {
			t.Errorf("%s: got %+v, %v; last error %v; want it rolled back", name, rec.Last, perr, err)
		}
	}
}

// Every operation of an update from a channel cut, while serial and verdict are journaled, too: the count of
// failures is right, and an older file is refused from the moment on in which the newer one was acted on.
func TestChannelPowerCutAtEveryOperation(t *testing.T) {
	t.Parallel()
	for _, bad := range []bool{false, true} {
		s := newManagedSetup(t)
		h := s.fleet(t)
		rng := mathrand.New(mathrand.NewSource(17))
		states := 0
		for k := 1; ; k++ {
			all := tears(rng)
			mode := lossModes[k%len(lossModes)]
			d := newSimDevice(t, s.dir, s.images)
			if bad {
				d.bad = "new"
			}
			d.w.cutAt = k
			var err error
			cut := d.powered(func() { err = d.settleChannel(h) })
			if cut {
				d.w.lose(mode, all[k%len(all)], mathrand.New(mathrand.NewSource(int64(k))))
				// What is on the medium: with an update in it, it has the serial, too.
				if rec, perr := d.peek(); perr == nil && (rec.Update != nil || rec.Last != nil) &&
					(rec.Net == nil || rec.Net.Channel == nil || rec.Net.Channel.Serial != 7) {
					t.Fatalf("cut at operation %d: an update is journaled, and not the serial of its file", k)
				}
				err = d.settleChannel(h)
			}
			if err == nil {
				err = d.check("new")
			}
			rec, perr := d.peek()
			if err == nil {
				err = perr
			}
			if err == nil && bad {
				n := 0
				for _, times := range rec.Net.Channel.Failed {
					n += times
				}
				if n != 1 {
					err = fmt.Errorf("%d failures counted, want 1", n)
				}
			}
			if err != nil {
				t.Fatalf("bad %v, cut at operation %d, mode %s: %v", bad, k, mode, err)
			}
			if !cut {
				t.Logf("bad %v: %d crash states", bad, states)
				break
			}
			states++
		}
	}
}
