// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"os"
	"strings"
	"testing"
)

// token says what --fetch has kept, and only as long as that is this device's at a server of the configuration.
func TestToken(t *testing.T) {
	b := newVerbBoard(t)
	b.setup()
	file := b.dir + "/var/" + keptName
	b.want(exitFailed, "'mendlet bootstrap' makes the key", "token", "--fetch")
	b.want(exitTempFail, "no such file", "token")
	if _, err := os.Stat(b.dir + "/var/mender-agent.pem"); err == nil {
		t.Fatal("a key was made")
	}
	b.want(0, "", "bootstrap")
	b.want(exitTempFail, "accept the device", "token", "--fetch")
	b.server.autoAccept = true
	n := b.server.count("POST auth")
	out := b.want(0, "", "token", "--fetch")
	lines := strings.Split(out, "\n")
	b.server.mu.Lock()
	known := len(lines) == 3 && b.server.tokens[strings.TrimPrefix(lines[1], "token=")] != nil
	b.server.mu.Unlock()
	if lines[0] != "server="+b.server.URL || !known || b.server.count("POST auth") != n+1 {
		t.Fatalf("got %q", out)
	}
	if again := b.want(0, "", "token"); again != out || b.server.count("POST auth") != n+1 {
		t.Errorf("got %q, want %q and no request", again, out)
	}
	if st, err := os.Stat(file); err != nil || st.Mode() != 0o600 {
		t.Errorf("got %v, %v, want mode 0600", st.Mode(), err)
	}
	must(t, os.Chmod(file, 0o640))
	b.want(exitTempFail, "open to others", "token")
	b.want(0, "", "token", "--fetch") // and it is as it should be again
	b.want(0, "server=", "token")
	b.want(0, "made a device key", "bootstrap", "-F")
	b.want(exitTempFail, "another device key", "token")
	b.want(0, "", "token", "--fetch")
	conf := readText(t, b.dir+"/etc/mender.conf")
	b.want(0, "", "setup", "--server-url", "https://elsewhere.example")
	b.want(exitTempFail, "not configured", "token")
	must(t, os.WriteFile(b.dir+"/etc/mender.conf", []byte(conf), 0o600))
	must(t, os.WriteFile(file, []byte("{"), 0o600))
	b.want(exitTempFail, "hint: 'mendlet token --fetch'", "token")
}
