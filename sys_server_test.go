// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// TestServerMenderClient runs Debian's mender-client 3.4.0 against the test server: from
// pending to a finished deployment by an update module, then a failing one with its log. It
// shows that what the other tests demand of a server is what a real client expects.
func TestServerMenderClient(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"mender", "mender-artifact", "unshare", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: the client's directories are fixed and are mounted over")
	}
	dir := t.TempDir()
	file := func(name, text string) {
		p := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		must(t, os.WriteFile(p, []byte(text), 0o600))
	}
	s := newTestServer(t, false)
	file("etc/artifact_info", "artifact_name=release-1\n")
	file("etc/mender.conf", fmt.Sprintf(`{"ServerURL":%q,"TenantToken":"x","UpdatePollIntervalSeconds":1,
		"InventoryPollIntervalSeconds":1,"RetryPollIntervalSeconds":1}`, s.URL))
	file("data/device_type", "device_type=qemu\n")
	writeScript(t, filepath.Join(dir, "share/identity/mender-device-identity"), "echo mac=a; echo sn=1; echo sn=2", 0o755)
	writeScript(t, filepath.Join(dir, "share/inventory/mender-inventory-test"),
		"echo k=v; echo list=1; echo list=2", 0o755)
	writeScript(t, filepath.Join(dir, "share/modules/v3/testmod"), testModule, 0o755)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out := startMender(t, ctx, dir)
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(out)
			t.Logf("the client said:\n%s", text)
		}
	})

	const id = `{"mac":"a","sn":["1","2"]}`
	s.await(ctx, "the device", func() bool { return s.devices[id] != nil })
	s.setDevice(id, "accepted")
	s.await(ctx, "inventory", func() bool { return s.devices[id].inventory["k"] == "v" })
	if got := s.deviceByID(id).inventory; got["device_type"] != "qemu" ||
		!reflect.DeepEqual(got["list"], []any{"1", "2"}) {
		t.Errorf("got inventory %v", got)
	}
	for _, d := range []struct{ id, name, payload, final string }{
		{"d-1", "release-2", "good", "success"}, {"d-2", "release-3", "broken", "failure"},
	} {
		file("payload", d.payload)
		made := filepath.Join(dir, "made.mender")
		if text, err := exec.Command("mender-artifact", "write", "module-image", "-T", "testmod", "-n", d.name, "-t", "qemu",
			"-f", filepath.Join(dir, "payload"), "-o", made).CombinedOutput(); err != nil {
			t.Fatalf("mender-artifact: %v\n%s", err, text)
		}
		artifact, err := os.ReadFile(made)
		must(t, err)
		dep := s.deploy(d.id, d.name, []string{"qemu"}, artifact)
		s.await(ctx, d.final, func() bool {
			for _, run := range dep.devices {
				return finished(run.status) && (run.status != "failure" || run.logPuts > 0)
			}
			return false
		})
		history, final, logs := s.history(dep)
		if final != d.final || (len(logs) > 0) != (d.final == "failure") {
			t.Errorf("%s: got %q after %q, %d log lines", d.name, final, history, len(logs))
		}
		if got, err := os.ReadFile(filepath.Join(dir, "share/installed")); err != nil || string(got) != d.payload {
			t.Errorf("%s: got payload %q, %v", d.name, got, err)
		}
		t.Logf("%s: %q", d.name, history)
	}
}

// startMender runs the client until ctx or the test ends, with dir/etc and dir/share in
// the place of its directories, in a mount namespace of its own.
func startMender(t *testing.T, ctx context.Context, dir string) (output string) {
	t.Helper()
	output = filepath.Join(dir, "output")
	f, err := os.Create(output)
	must(t, err)
	defer f.Close()
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, "unshare", "-m", "sh", "-ec", `mount --bind "$1/etc" /etc/mender
		mount --bind "$1/share" /usr/share/mender
		exec mender --no-syslog --config "$1/etc/mender.conf" --data "$1/data" daemon`, "sh", dir)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent")
	cmd.Stdout, cmd.Stderr = f, f
	ended, err := startTied(cmd)
	must(t, err)
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return output
}
