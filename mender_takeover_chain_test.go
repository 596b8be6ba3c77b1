// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// takenOver is a simulated device that Mender's client had in a deployment of storeRelease, and its server.
type takenOver struct {
	*managedSetup
	d   *simDevice
	dep *testDeployment
	ran []byte // the store
}

// newTakenOver: the store is of the client that had installed the image; the deployment is the one it names.
// heard: what that has told the server.
func newTakenOver(t *testing.T, store, env string, heard ...string) *takenOver {
	s := newManagedSetup(t)
	s.images = map[string][]byte{"app-1": s.images["old"], storeRelease: s.images["new"]}
	image := filepath.Join(s.dir, "new.img") // of newSimSetup
	must(t, packCommand([]string{"-n", storeRelease, "-c", "sim", "-f", image, "-o", s.dir + "/release.mender"},
		io.Discard, nil))
	text, err := os.ReadFile(s.dir + "/release.mender")
	must(t, err)
	ran := storeFile(t, store)
	m, err := parseMenderStore(ran)
	must(t, err)
	u, _, err := m.pending()
	must(t, err)
	dep := s.server.deploy(u.ID, u.Artifact, []string{"sim"}, text)
	d, _ := storeDevice(t, s.simSetup, ran, env)
	must(t, os.MkdirAll(filepath.Join(s.dir, "modules/v3"), 0o755))
	x := &takenOver{s, d, dep, ran}
	x.asMender(t, heard...)
	return x
}

// asMender tells the server what Mender's client did, and asks with the provides of before the update.
func (x *takenOver) asMender(t *testing.T, statuses ...string) {
	t.Helper()
	a := x.d.start()
	a.c.Servers = []serverEntry{{x.server.URL}}
	key, err := deviceKey(a.c, nil, false, a.lg)
	must(t, err)
	hc, err := newClient(a, "")
	must(t, err)
	api := newAPIClient(a.c, hc, func(ctx context.Context) (string, error) { return deviceIdentity(ctx, a) }, key, a.lg)
	body, err := a.nextBody(map[string]string{"artifact_name": "app-1", "artifact_group": "groupA", "custom": "value1",
		"rootfs-image.app.version": "1"})
	must(t, err)
	dep, err := api.nextDeployment(t.Context(), body)
	if err != nil || dep == nil || dep.ID != x.dep.id {
		t.Fatalf("got deployment %+v, %v", dep, err)
	}
	for _, s := range statuses {
		must(t, api.status(t.Context(), dep.ID, s))
	}
}

// end runs until the deployment has its verdict.
func (x *takenOver) end(t *testing.T, result string, heard ...string) {
	t.Helper()
	must(t, x.d.settleManaged(x.server.URL, x.dep.id))
	rec, err := x.d.peek()
	must(t, err)
	if rec.Last.Result != result {
		t.Errorf("got verdict %+v, want %s", rec.Last, result)
	}
	statuses, _, logs := x.server.history(x.dep)
	if !slices.Equal(statuses, heard) {
		t.Errorf("the server heard %v, want %v", statuses, heard)
	}
	if result != "committed" && len(logs) == 0 {
		t.Error("the server got no log")
	}
	untouched(t, x.dir, x.ran)
	// The next poll ends in nothing: it is another deployment's.
	must(t, x.d.managedRun(t.Context(), x.server.URL, nil))
	if statuses, _, _ := x.server.history(x.dep); !slices.Equal(statuses, heard) {
		t.Errorf("the server heard %v after the end", statuses)
	}
}

var upToReboot = []string{"downloading", "installing", "rebooting"}

func TestDeploymentTakenOverAfterReboot(t *testing.T) {
	t.Parallel()
	x := newTakenOver(t, "3.4.0-managed-reboot", "trial", upToReboot...)
	log := filepath.Join(x.dir, "deployments.0000."+x.dep.id+".log")
	before := `{"timestamp":"2026-01-01T00:00:00Z","level":"info","message":"before the reboot"}` + "\n"
	must(t, os.WriteFile(log, []byte(before), 0o600))
	x.end(t, "committed", append(upToReboot, "installing", "success")...)
	must(t, x.d.check(storeRelease))
	if text := string(readFileOrNil(log)); !strings.HasPrefix(text, before) || len(text) == len(before) {
		t.Errorf("the log is not gone on with: %q", text)
	}
	rec, _ := x.d.peek()
	if got := providesText(rec.Provides); got != "custom=value1 "+
		"rootfs-image.checksum=75b02d596961ebfa69227801527b3b22b17473803680f34ab0413c0703907c72 "+
		"rootfs-image.version=release-2" {
		t.Errorf("got provides %s", got)
	}
}

// The bootloader has gone back: the image did not boot.
func TestDeploymentTakenOverOfWhatDoesNotBoot(t *testing.T) {
	t.Parallel()
	x := newTakenOver(t, "3.4.0-managed-reboot", "trial", upToReboot...)
	x.d.bad = storeRelease
	x.end(t, "rolled-back", append(upToReboot, "failure")...)
	must(t, x.d.check(storeRelease))
	if rec, _ := x.d.peek(); providesText(rec.Provides) != groupA || rec.Provides["artifact_name"] != "app-1" {
		t.Errorf("got provides %v", rec.Provides)
	}
}

// The packages were swapped between the switch and the reboot.
func TestDeploymentTakenOverBeforeReboot(t *testing.T) {
	t.Parallel()
	x := newTakenOver(t, "3.4.0-managed-reboot", "trial", upToReboot...)
	boot := filepath.Join(x.d.root, "proc/sys/kernel/random/boot_id")
	must(t, os.WriteFile(boot, []byte("0"), 0o644))
	if err := x.d.managedRun(t.Context(), x.server.URL, nil); exitCode(err) != exitReboot {
		t.Fatalf("got %v, want that a reboot is needed", err)
	}
	x.end(t, "committed", append(upToReboot, "installing", "success")...)
	must(t, x.d.check(storeRelease))
}

// What was owed is told: once, and true.
func TestVerdictTakenOver(t *testing.T) {
	t.Parallel()
	x := newTakenOver(t, "3.4.0-managed-retry-report", "", "downloading", "installing")
	x.end(t, "committed", "downloading", "installing", "success")
	if rec, _ := x.d.peek(); rec.Provides["artifact_name"] != "app-2" || providesText(rec.Provides) != groupA2 {
		t.Errorf("got provides %v", rec.Provides)
	}
}

// An install that was cut short in a module is rolled back by it, in the tree that Mender's client has made.
func TestModuleInstallTakenOver(t *testing.T) {
	t.Parallel()
	for _, store := range []string{"3.4.0-managed-update-install", "5.1.0-managed-update-install"} {
		x := newTakenOver(t, store, "", "downloading", "installing")
		tree := filepath.Join(x.dir, "modules/v3/payloads/0000/tree")
		must(t, os.MkdirAll(tree+"/header", 0o700))
		calls := filepath.Join(x.dir, "calls")
		must(t, os.RemoveAll(calls))
		writeScript(t, filepath.Join(x.dir, "modules/v3/testmod"), fmt.Sprintf(`echo "$1" >> %q
			case "$1" in SupportsRollback) echo Yes ;; esac; test -d header`, calls), 0o755)
		x.end(t, "rolled-back", "downloading", "installing", "failure")
		if got := strings.Join(strings.Fields(string(readFileOrNil(calls))), " "); got !=
			"SupportsRollback ArtifactRollback NeedsArtifactReboot ArtifactFailure Cleanup" {
			t.Errorf("%s: the module was called for %s", store, got)
		}
		if rec, _ := x.d.peek(); providesText(rec.Provides) != groupA || rec.Provides["artifact_name"] != "app-1" {
			t.Errorf("got provides %v", rec.Provides)
		}
		if _, err := os.Stat(tree); err == nil {
			t.Error("the tree is still there")
		}
	}
}

// restated is a store whose deployment is in another state, with the place of its artifact's source for padding.
func restated(t testing.TB, store []byte, state string) []byte {
	t.Helper()
	s, err := parseMenderStore(store)
	must(t, err)
	old := s.values["state"]
	var m map[string]any
	must(t, json.Unmarshal(old, &m))
	m["Name"] = state
	delete(m["UpdateInfo"].(map[string]any)["Artifact"].(map[string]any), "Source")
	text, err := json.Marshal(m)
	if err != nil || len(text) > len(old) {
		t.Fatalf("%d bytes, want %d at most: %v", len(text), len(old), err)
	}
	changed := bytes.Replace(store, old, append(text, bytes.Repeat([]byte(" "), len(old)-len(text))...), 1)
	if s, err := parseMenderStore(changed); err != nil || !bytes.Contains(s.values["state"], []byte(state)) {
		t.Fatalf("not changed: %v", err)
	}
	return changed
}

// Every state of a deployment of an image, with what the bootloader was told in it; and the power is cut at each
// operation from the take-over on. The server hears one verdict, which is true of what runs.
func TestDeploymentTakenOverInEveryState(t *testing.T) {
	t.Parallel()
	store := storeFile(t, "3.4.0-managed-reboot")
	for _, c := range []struct{ state, env, verdict string }{
		{"update-store", "", "committed"},
		{"update-install", "", "committed"},
		{"update-install", "trial", "committed"},
		{"reboot", "trial", "committed"},
		{"after-reboot", "trial", "committed"},
		{"after-reboot", "", "rolled-back"},
		{"update-pre-commit-status-report-retry", "trial", "committed"},
		{"update-commit", "trial", "committed"},
		{"update-commit", "kept", "committed"},
		{"update-after-first-commit", "kept", "committed"},
		{"update-after-commit", "kept", "committed"},
		{"rollback", "trial", "rolled-back"},
		{"rollback", "", "rolled-back"},
		{"rollback-reboot", "", "rolled-back"},
		{"after-rollback-reboot", "", "rolled-back"},
		{"update-error", "", "rolled-back"},
		{"cleanup", "", "rolled-back"},
		{"update-retry-report", "", "rolled-back"},
		{"mender-update-control", "", "committed"},
		{"mender-update-control-pause", "trial", "committed"},
		{"of a later client", "trial", "rolled-back"},
	} {
		t.Run(c.state+" "+c.env, func(t *testing.T) {
			t.Parallel()
			eachCut(t, func(k int, mode string) (cut bool) {
				x := newTakenOver(t, "3.4.0-managed-reboot", c.env)
				if c.env == "kept" { // what runs is told apart by this
					must(t, os.WriteFile(x.dir+"/artifact_info", []byte("artifact_name="+storeRelease+"\n"), 0o600))
				}
				x.ran = restated(t, store, c.state)
				must(t, os.WriteFile(filepath.Join(x.dir, menderStoreFile), x.ran, 0o600))
				x.d.w.ops, x.d.w.cutAt = 0, k
				var err error
				if cut = x.d.powered(func() { err = x.d.settleManaged(x.server.URL, x.dep.id) }); cut {
					x.d.w.lose(mode, 513, rand.New(rand.NewSource(int64(k))))
					err = x.d.settleManaged(x.server.URL, x.dep.id)
				}
				if err == nil {
					err = x.d.check(storeRelease)
				}
				if err == nil {
					err = x.told(x.d, x.dep, storeRelease)
				}
				rec, _ := x.d.peek()
				// A cut in the trial boot is followed by another boot, for which the bootloader goes back.
				if err != nil || rec.Last.Result != c.verdict && (!cut || rec.Last.Result != "rolled-back") {
					t.Fatalf("cut at operation %d, %s: %v; verdict %+v, want %s", k, mode, err, rec.Last, c.verdict)
				}
				untouched(t, x.dir, x.ran)
				return cut
			})
		})
	}
}

// A download that a module was in begins anew, and the server takes the question for the one that it knows.
func TestModuleDownloadTakenOver(t *testing.T) {
	t.Parallel()
	x := newTakenOver(t, "5.1.0-managed-update-install", "", "downloading")
	x.ran = restated(t, x.ran, "update-store")
	must(t, os.WriteFile(filepath.Join(x.dir, menderStoreFile), x.ran, 0o600))
	writeScript(t, filepath.Join(x.dir, "modules/v3/testmod"), testModule, 0o755)
	must(t, os.WriteFile(x.dir+"/payload", []byte("good"), 0o600))
	must(t, packCommand([]string{"-T", "testmod", "-n", "app-2", "-c", "sim", "-f", x.dir + "/payload", "-o",
		x.dir + "/app.mender"},
		io.Discard, nil))
	x.server.mu.Lock()
	x.server.artifacts["app-2"] = readFileOrNil(x.dir + "/app.mender")
	x.server.mu.Unlock()
	x.end(t, "committed", "downloading", "downloading", "installing", "installing", "success")
	if rec, _ := x.d.peek(); rec.Provides["artifact_name"] != "app-2" || rec.Provides["custom"] != "value1" {
		t.Errorf("got provides %v", rec.Provides)
	}
}
