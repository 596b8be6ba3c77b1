// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"os"
	"strings"
	"testing"
)

// A device does not become another one to the server without a word.
func TestIdentityDoesNotChangeSilently(t *testing.T) {
	b := newVerbBoard(t)
	b.server.autoAccept = true
	b.setup()
	b.want(0, "", "run")
	script := b.dir + "/share/identity/mender-device-identity"
	must(t, os.Rename(script, script+".away"))
	for _, words := range [][]string{{"run"}, {"run", "--splay", "1ns"}, {"check-update"}, {"send-inventory"},
		{"bootstrap"}} {
		code, _, log := b.call(t.Context(), words...)
		if code != exitRefused || !strings.Contains(log, "put the identity script") ||
			!strings.Contains(log, "--forcebootstrap") {
			t.Errorf("%q: got exit code %d and %q, want a refusal with a hint", words, code, log)
		}
	}
	writeScript(t, script, "echo mac=b", 0o755)
	if code, _, log := b.call(t.Context(), "run"); code != exitRefused || !strings.Contains(log, `{"mac":"b"}`) {
		t.Errorf("another identity: got exit code %d and %q", code, log)
	}
	heard := func() bool {
		b.server.mu.Lock()
		defer b.server.mu.Unlock()
		return b.server.devices[`{"mac":"b"}`] != nil
	}
	if heard() {
		t.Error("the server has heard of another device")
	}
	b.want(0, "", "bootstrap", "--forcebootstrap")
	b.want(0, "", "run")
	if !heard() {
		t.Error("the server has not heard of the other device, which was meant")
	}
	must(t, os.Rename(script+".away", script))
	b.want(exitRefused, "another", "run")
	b.want(0, "", "run", "-F")
	b.want(0, "", "run")
}

// Nor does it get another key without a word.
func TestKeyThatVanished(t *testing.T) {
	b := newVerbBoard(t)
	b.server.autoAccept = true
	b.setup()
	b.want(0, "", "run")
	key := b.dir + "/var/mender-agent.pem"
	must(t, os.Rename(key, key+".away"))
	for _, words := range [][]string{{"run"}, {"check-update"}, {"send-inventory"}, {"bootstrap"}} {
		if code, _, log := b.call(t.Context(), words...); code != exitRefused ||
			!strings.Contains(log, "the server has accepted one") {
			t.Errorf("%q: got exit code %d and %q, want a refusal", words, code, log)
		}
		if _, err := os.Stat(key); err == nil {
			t.Fatalf("%q: a key was made", words)
		}
	}
	must(t, os.Rename(key+".away", key))
	b.want(0, "", "run")
	must(t, os.Remove(key))
	b.want(0, "", "run", "--forcebootstrap")
	b.want(0, "", "run")
}

// A system's type is its topology's, and it takes nothing but manifests.
func TestDeviceTierSystem(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a := &app{c: testConfig(t), m: &machine{root: dir}, rec: &record{}}
	writeFile(t, a.c.DeviceTypeFile, "device_type=board\n")
	a.c.DeviceTier = "system"
	path := dir + topologyFile
	must(t, os.MkdirAll(strings.TrimSuffix(path, "/topology.yaml"), 0o755))
	for text, want := range map[string]string{"": "", "x: y\n": "",
		"api_version: v1\nsystem_type: gate\ncomponents: []\n": "gate",
		"system_type: \"gate way\" # its name\r\n":             "gate way", "  system_type: inner\n": "",
		"system_type:\n": ""} {
		writeFile(t, path, text)
		got, err := a.serverType()
		if got != want || want == "" && (exitCode(err) != exitRefused || hintOf(err) == "") {
			t.Errorf("%q: got %q, %v, want %q", text, got, err, want)
		}
	}
	must(t, os.Remove(path))
	if _, err := a.nextBody(nil); exitCode(err) != exitRefused {
		t.Errorf("without a topology: got %v, want a refusal", err)
	}
	a.c.DeviceTier = "micro"
	if body, err := a.nextBody(nil); err != nil || string(body) != `{"device_provides":{"device_type":"board"}}` {
		t.Errorf("got %s, %v", body, err)
	}
}
