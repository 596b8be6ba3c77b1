// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// storeRelease is the artifact of the images in the stores.
const storeRelease = "release-2"

// newStoreSetup is newSimSetup with the names of the stores.
func newStoreSetup(t testing.TB) *simSetup {
	s := newSimSetup(t)
	s.images = map[string][]byte{"app-1": s.images["old"], storeRelease: s.images["new"]}
	return s
}

// storeDevice is a device that has lived with Mender's client: its slots are as that leaves them after an
// installation, and the journal is empty. env: what the bootloader made of that.
func storeDevice(t testing.TB, s *simSetup, store []byte, env string) (*simDevice, *bytes.Buffer) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(s.dir, menderStoreFile), store, 0o600))
	must(t, os.MkdirAll(s.dir+"/modules/v3", 0o755))
	must(t, os.WriteFile(s.dir+"/modules/v3/testmod", []byte("#!/bin/sh\n"), 0o755))
	d := newSimDevice(t, s.dir, s.images)
	f := d.w.files[simJournal]
	clear(f.current)
	clear(f.durable)
	old := d.w.files[filepath.Join(s.dir, "p2")]
	copy(old.current, s.images["app-1"])
	copy(old.durable, s.images["app-1"])
	f = d.w.files[filepath.Join(s.dir, "p3")]
	copy(f.current, s.images[storeRelease])
	copy(f.durable, s.images[storeRelease])
	vars := d.env()
	switch env {
	case "trial": // switched over, before the reboot
		vars["mender_boot_part"], vars["mender_boot_part_hex"], vars["upgrade_available"] = "3", "3", "1"
	case "kept":
		vars["mender_boot_part"], vars["mender_boot_part_hex"] = "3", "3"
		d.booted = "B"
	}
	d.saveEnv(vars)
	said := &bytes.Buffer{}
	d.arm = func(a *app) {
		a.inherit = inheritMender
		a.lg = newLogger(said)
	}
	return d, said
}

// untouched checks that the store is what it was, and nothing lies beside it.
func untouched(t testing.TB, dir string, store []byte) {
	t.Helper()
	if now := readFileOrNil(filepath.Join(dir, menderStoreFile)); !bytes.Equal(now, store) {
		t.Error("the store was changed")
	}
	if _, err := os.Lstat(filepath.Join(dir, menderStoreLock)); err == nil {
		t.Error("the lock file was made")
	}
}

type storeRow struct {
	store, env string
	name       string
	provides   string // without the name, sorted
	step       step
	update     string // artifact, type, from and to
	result     string // of the verdict that is owed
}

const (
	groupA     = "artifact_group=groupA custom=value1 rootfs-image.app.version=1"
	groupA2    = "artifact_group=groupA custom=value2 rootfs-image.app.version=2"
	synthetics = "a=b artifact_group=g"
)

var storeRows = []storeRow{
	{store: "3.4.0-committed", name: "app-1", provides: groupA},
	{store: "3.4.0-fresh", name: "unknown"},
	{store: "3.4.0-managed-idle", name: "app-1", provides: groupA},
	{"3.4.0-managed-reboot", "trial", "app-1", groupA, stepReboot, "release-2 rootfs-image 2 3", ""},
	{"3.4.0-managed-retry-report", "", "app-2", groupA2, stepReport, "app-2 testmod 0 0", "committed"},
	{"3.4.0-managed-update-install", "", "app-1", groupA, stepInstall, "app-2 testmod 0 0", ""},
	{"3.4.0-rootfs-standalone-pending", "trial", "app-1", groupA, stepCommitWait, "release-2 rootfs-image 2 3", ""},
	{"3.4.0-rootfs-standalone-pending", "", "app-1", groupA, stepCommitWait, "release-2 rootfs-image 2 3", ""},
	{"3.4.0-standalone-pending", "", "app-1", groupA, stepCommitWait, "app-3 testmod 0 0", ""},
	{"3.4.0-update-control-maps", "", "app-1", groupA, stepRollbackReboot, "release-2 rootfs-image 2 3", ""},
	{store: "5.1.0-bootstrap", name: "factory-1", provides: "rootfs-image.version=factory-1"},
	{store: "5.1.0-committed", name: "app-1", provides: groupA},
	{store: "5.1.0-inconsistent", name: "app-2_INCONSISTENT", provides: groupA2},
	{store: "5.1.0-managed-idle", name: "app-1", provides: groupA},
	{"5.1.0-managed-update-install", "", "app-1", groupA, stepInstall, "app-2 testmod 0 0", ""},
	{"5.1.0-rootfs-standalone-pending", "trial", "app-1", groupA, stepCommitWait, "release-2 rootfs-image 2 3", ""},
	{"5.1.0-standalone-pending", "", "app-1", groupA, stepCommitWait, "app-2 testmod 0 0", ""},
	{store: "synthetic-be32-n", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-be32-plain", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-be64-abm", name: "synthetic-2", provides: synthetics}, // its state is not understood
	{store: "synthetic-be64-n", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-be64-plain", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-le32-abm", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-le32-n", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-le32-plain", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-le64-abm", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-le64-n", name: "synthetic-2", provides: synthetics},
	{store: "synthetic-le64-plain", name: "synthetic-2", provides: synthetics},
}

func providesText(p map[string]string) string {
	rest := map[string]string{}
	for k, v := range p {
		if k != "artifact_name" {
			rest[k] = v
		}
	}
	text := fmt.Sprint(rest)
	return strings.ReplaceAll(strings.TrimSuffix(strings.TrimPrefix(text, "map["), "]"), ":", "=")
}

func TestTakeOverEveryStore(t *testing.T) {
	t.Parallel()
	s := newStoreSetup(t)
	for _, row := range storeRows {
		store := storeFile(t, row.store)
		if read, err := parseMenderStore(store); recovery && err == nil && read.values["state"] != nil {
			d, said := storeDevice(t, s, store, row.env)
			a := d.start()
			if must(t, a.openState()); a.rec.Provides["artifact_name"] != row.name || a.rec.Update != nil || said.Len() > 0 {
				t.Errorf("%s: got %+v, said %q", row.store, a.rec, said)
			}
			if rec, _ := d.peek(); rec.Provides != nil || rec.Mender != nil {
				t.Errorf("%s: journaled %+v", row.store, rec)
			}
			continue
		}
		d, said := storeDevice(t, s, store, row.env)
		a := d.start()
		if err := a.openState(); err != nil {
			t.Errorf("%s: %v", row.store, err)
			continue
		}
		rec, err := d.peek()
		must(t, err)
		if rec.Provides["artifact_name"] != row.name || providesText(rec.Provides) != row.provides {
			t.Errorf("%s: got provides %v, want %s and %s", row.store, rec.Provides, row.name, row.provides)
		}
		got, at := "", stepEnd
		if u := rec.Update; u != nil {
			at, got = u.Step, fmt.Sprintf("%s %s %d %d", u.Artifact, u.Type, u.From, u.To)
		}
		if got != row.update || at != row.step {
			t.Errorf("%s: got update %q in %q, want %q in %q", row.store, got, at, row.update, row.step)
		}
		if result := resultOf(rec); result != row.result {
			t.Errorf("%s: got verdict %q, want %q", row.store, result, row.result)
		}
		if taken := row.name != unknownName; strings.Count(said.String(), "taken over from Mender's client") != b2i(taken) ||
			(rec.Mender != nil) != taken {
			t.Errorf("%s: said %q, journaled %+v", row.store, said, rec.Mender)
		}
		if paused := strings.Contains(said.String(), "wants a pause"); paused != (row.store == "3.4.0-update-control-maps") {
			t.Errorf("%s: a pause is said: %t", row.store, paused)
		}
		said.Reset()
		ops := d.w.ops
		if err := d.start().openState(); err != nil || said.Len() > 0 || d.w.ops != ops {
			t.Errorf("%s, once more: %v, said %q, %d operations", row.store, err, said, d.w.ops-ops)
		}
		untouched(t, s.dir, store)
	}
	d, _ := storeDevice(t, s, storeFile(t, "3.4.0-big-overflow"), "")
	a := d.start()
	if err := a.openState(); err != nil || a.rec.Provides["artifact_name"] != "big-1" || len(a.rec.Provides) < 50 {
		t.Errorf("got %v, %d provides", err, len(a.rec.Provides))
	}
}

func resultOf(rec *record) string {
	if rec.Last == nil {
		return ""
	}
	return rec.Last.Result
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// storeOf is what a store would be with these values.
func storeOf(txn int, values map[string]string) *menderStore {
	s := &menderStore{file: menderStoreFile, txn: txn, values: map[string][]byte{}}
	for k, v := range values {
		s.values[k] = []byte(v)
	}
	return s
}

// All states of both clients, by the step that they stand for.
func TestEveryStateOfMendersClients(t *testing.T) {
	t.Parallel()
	if recovery {
		t.Skip("the recovery build ends no deployment")
	}
	for _, c := range []struct {
		state, more string
		step        step
		outcome     outcome
	}{
		{"update-store", "", stepDownload, ""},
		{"update-install", "", stepInstall, ""},
		{"reboot", "", stepReboot, ""},
		{"after-reboot", "", stepVerifyReboot, ""},
		{"update-pre-commit-status-report-retry", "", stepCommitWait, ""},
		{"update-commit", "", stepCommit, ""},
		{"update-after-first-commit", "", stepCommitLeave, ""},
		{"update-after-commit", "", stepCommitLeave, ""},
		{"rollback", "", stepRollback, outcomeRolledBack},
		{"rollback-reboot", "", stepRollbackReboot, outcomeRolledBack},
		{"verify-rollback-reboot", "", stepVerifyRollbackReboot, outcomeRolledBack},
		{"after-rollback-reboot", "", stepVerifyRollbackReboot, outcomeRolledBack},
		{"update-error", "", stepFailure, outcomeRolledBack},
		{"update-error", `,"SupportsRollback":"rollback-not-supported"`, stepFailure, outcomeInconsistent},
		{"update-error", `,"AllRollbacksSuccessful":false`, stepFailure, outcomeInconsistent},
		{"update-error", `,"SupportsRollback":"","AllRollbacksSuccessful":true`, stepFailure, outcomeRolledBack},
		{"cleanup", "", stepCleanup, ""},
		{"update-retry-report", "", stepReport, ""},
		{"status-report-error", "", stepReport, ""},
		{"mender-update-control-pause", "", "Mender's mender-update-control-pause", ""},
		{"of a later release", "", "Mender's of a later release", ""},
	} {
		u, state, err := storeOf(1, map[string]string{"artifact-name": "a", "state": `{"Version":2,"Name":"` + c.state +
			`","UpdateInfo":{"Artifact":{"PayloadTypes":["m"],"artifact_name":"b"},"ID":"d","RebootRequested":[""],` +
			`"SupportsRollback":"rollback-supported"` + c.more + `}}`}).pending()
		if err != nil || state != c.state || u.Step != c.step || u.Outcome != c.outcome || !u.Managed || u.Reboot != "No" {
			t.Errorf("%s%s: got %+v, %v", c.state, c.more, u, err)
		}
	}
	for state, want := range map[string]outcome{"Before_ArtifactInstall_Enter": "", "ArtifactInstall_Enter": "",
		"Before_ArtifactCommit_Enter": "", "ArtifactCommit_Enter": "", "Before_ArtifactCommit_Leave": "",
		"ArtifactCommit_Leave": "", "ArtifactRollback_Enter": outcomeRolledBack, "ArtifactFailure_Enter": outcomeInconsistent,
		"Cleanup": ""} {
		u, _, err := storeOf(1, map[string]string{"standalone-state": `{"Version":2,"ArtifactName":"b",` +
			`"PayloadTypes":["m"],"InState":"` + state + `","Failed":false,"RolledBack":false}`}).pending()
		if err != nil || u.Step != step(state) || u.Outcome != want || u.Managed || u.Known != want.bad() {
			t.Errorf("%s: got %+v, %v", state, u, err)
		}
	}
}

func TestStatesNotUnderstood(t *testing.T) {
	t.Parallel()
	for what, values := range map[string]map[string]string{
		"no JSON":   {"state": "{"},
		"version 3": {"state": `{"Version":3,"Name":"reboot","UpdateInfo":{"ID":"d","Artifact":{"PayloadTypes":["m"]}}}`},
		"no id":     {"state": `{"Version":2,"Name":"reboot","UpdateInfo":{"Artifact":{"PayloadTypes":["m"]}}}`},
		"two": {"state": `{"Version":2,"Name":"reboot","UpdateInfo":{"ID":"d","Artifact":` +
			`{"PayloadTypes":["m","n"]}}}`},
		"none":        {"state": `{"Version":2,"Name":"reboot","UpdateInfo":{"ID":"d","Artifact":{}}}`},
		"InState":     {"standalone-state": `{"Version":2,"ArtifactName":"b","PayloadTypes":["m"],"InState":"x"}`},
		"no artifact": {"standalone-state": `{"Version":1,"PayloadTypes":["m"]}`},
		"version 9":   {"standalone-state": `{"Version":9,"ArtifactName":"b","PayloadTypes":["m"]}`},
		"a number":    {"standalone-state": `7`},
	} {
		if u, _, err := storeOf(1, values).pending(); err == nil || u != nil {
			t.Errorf("%s: got %+v, %v", what, u, err)
		}
	}
	if recovery {
		return
	}
	if u, _, err := storeOf(1, map[string]string{"state": `{"Version":2,"Name":"idle"}`}).pending(); u != nil ||
		err != nil {
		t.Errorf("idle: got %+v, %v", u, err)
	}
	// A version 1 has no payload types; the form of version 2 of the same deployment counts before it.
	old := `{"Version":1,"Name":"reboot","UpdateInfo":{"ID":"d","Artifact":{"artifact_name":"b"}}}`
	u, _, err := storeOf(1, map[string]string{"state": old}).pending()
	if err != nil || u.Type != rootfsImage || u.Reboot != "Automatic" || u.Clears != nil {
		t.Errorf("version 1: got %+v, %v", u, err)
	}
	for id, want := range map[string]step{"d": stepCommit, "other": stepReboot} {
		next := `{"Version":2,"Name":"update-commit","UpdateInfo":{"ID":"` + id +
			`","Artifact":{"artifact_name":"b","PayloadTypes":["rootfs-image"]}}}`
		if u, _, err := storeOf(1, map[string]string{"state": old,
			"state-uncommitted": next}).pending(); err != nil || u.Step != want {
			t.Errorf("uncommitted of %q: got %+v, %v", id, u, err)
		}
	}
}

// Names that nobody stored give way to the store's; others stay, and a store that was written since is said.
func TestWhatIsTakenOver(t *testing.T) {
	t.Parallel()
	s := newStoreSetup(t)
	name := func(d *simDevice) string {
		t.Helper()
		a := d.start()
		must(t, a.openState())
		return a.rec.Provides["artifact_name"]
	}
	first, second, pending := storeFile(t, "3.4.0-committed"), storeFile(t, "5.1.0-inconsistent"),
		storeFile(t, "5.1.0-standalone-pending")
	put := func(b []byte) { must(t, os.WriteFile(filepath.Join(s.dir, menderStoreFile), b, 0o600)) }

	d, said := storeDevice(t, s, first, "")
	d.journal(func(r *record) { r.Provides = map[string]string{"artifact_name": "mine", "x": "y"} })
	if got := name(d); got != "mine" || said.Len() > 0 {
		t.Errorf("own name: got %q, said %q", got, said)
	}
	for _, guess := range []string{"unknown", "from-info"} {
		must(t, os.WriteFile(s.dir+"/artifact_info", []byte("artifact_name=from-info\n"), 0o600))
		d.journal(func(r *record) { r.Provides = map[string]string{"artifact_name": guess} })
		if got := name(d); got != "app-1" {
			t.Errorf("guess %q: got %q", guess, got)
		}
		d.journal(func(r *record) { r.Mender = nil })
	}
	d.journal(func(r *record) { *r = record{} })
	name(d)
	put(second) // what was taken over is not mendlet's own
	if got := name(d); got != "app-2_INCONSISTENT" {
		t.Errorf("newer store: got %q", got)
	}
	d.journal(func(r *record) { r.Provides["artifact_name"] = "mine" })
	said.Reset()
	put(first)
	if got := name(d); got != "mine" || strings.Count(said.String(), "has written its store since") != 1 {
		t.Errorf("newer store, own name: got %q, said %q", got, said)
	}
	if got := name(d); got != "mine" || strings.Count(said.String(), "has written its store since") != 1 {
		t.Errorf("it was said twice: %q", said)
	}
	rec, _ := d.peek()
	if text := rec.Mender.String(); !strings.Contains(text, `its artifact is "app-1"`) ||
		!strings.Contains(text, "transaction 4") {
		t.Errorf("got %q", text)
	}
	put(pending) // its client has begun an update since, with the names of before it
	a := d.start()
	if must(t, a.openState()); a.rec.Provides["artifact_name"] != "app-1" || a.rec.Update == nil {
		t.Errorf("newer store with an update: got %+v", a.rec)
	}
}

// A store that cannot be read, and the one that Mender's client put aside.
func TestBrokenStore(t *testing.T) {
	t.Parallel()
	s := newStoreSetup(t)
	d, said := storeDevice(t, s, bytes.Repeat([]byte("no store"), 999), "")
	must(t, d.start().openState())
	if rec, _ := d.peek(); rec.Provides["artifact_name"] != unknownName ||
		!strings.Contains(said.String(), "mark of LMDB") {
		t.Errorf("got %v, said %q", rec.Provides, said)
	}
	broken := filepath.Join(s.dir, menderStoreBroken)
	must(t, os.WriteFile(broken, []byte("no store, either"), 0o600))
	must(t, d.start().openState())
	if !strings.Contains(said.String(), "mender-store-broken") {
		t.Errorf("said %q", said)
	}
	must(t, os.WriteFile(broken, storeFile(t, "3.4.0-standalone-pending"), 0o600))
	must(t, d.start().openState())
	if rec, _ := d.peek(); rec.Provides["artifact_name"] != "app-1" || rec.Update != nil ||
		rec.Mender.File != menderStoreBroken {
		t.Errorf("got %+v, want its name, and no update", rec)
	}
	must(t, os.WriteFile(filepath.Join(s.dir, menderStoreFile), storeFile(t, "5.1.0-bootstrap"), 0o600))
	must(t, d.start().openState())
	if rec, _ := d.peek(); rec.Provides["artifact_name"] != "factory-1" {
		t.Errorf("got %+v, want the name of the store that is new", rec)
	}
}

// A disk that fails while the store is read is no reason to take it for absent; nor is what is needed
// for an image and not there.
func TestTakeOverIsRefused(t *testing.T) {
	t.Parallel()
	s := newStoreSetup(t)
	d, _ := storeDevice(t, s, storeFile(t, "3.4.0-rootfs-standalone-pending"), "trial")
	arm := d.arm
	d.arm = func(a *app) {
		arm(a)
		a.c.RootfsPartA = ""
	}
	err := d.start().openState()
	if exitCode(err) != exitRefused || !strings.Contains(err.Error(), "RootfsPartA") || hintOf(err) == "" {
		t.Errorf("got %v, want a refusal with a hint", err)
	}
	if rec, _ := d.peek(); rec.Provides != nil || rec.Update != nil {
		t.Errorf("the journal has %+v", rec)
	}
}

// Nor is a module that is gone, as when it came with Mender's client, a reason to leave the device inconsistent.
func TestTakeOverWithoutModule(t *testing.T) {
	t.Parallel()
	s := newStoreSetup(t)
	d, _ := storeDevice(t, s, storeFile(t, "3.4.0-standalone-pending"), "")
	module := filepath.Join(s.dir, "modules/v3/testmod")
	must(t, os.Rename(module, module+".away"))
	err := d.start().openState()
	if exitCode(err) != exitRefused || !strings.Contains(err.Error(), `no update module for payload type "testmod"`) ||
		!strings.Contains(hintOf(err), "install the module") {
		t.Errorf("got %v, want a refusal with a hint", err)
	}
	if rec, _ := d.peek(); rec.Provides != nil || rec.Update != nil {
		t.Errorf("the journal has %+v", rec)
	}
	must(t, os.Rename(module+".away", module))
	must(t, d.start().openState())
	if rec, _ := d.peek(); rec.Update == nil || rec.Update.Artifact != "app-3" {
		t.Errorf("with the module again: got %+v", rec)
	}
}

// What status says, before and after the journal has it.
func TestStatusOfWhatWasTakenOver(t *testing.T) {
	t.Parallel()
	s := newStoreSetup(t)
	d, _ := storeDevice(t, s, storeFile(t, "3.4.0-rootfs-standalone-pending"), "trial")
	for range 2 {
		out := &bytes.Buffer{}
		a := d.start()
		a.out, a.o.json = out, true
		must(t, inspector{a}.status(context.Background()))
		var r report
		must(t, json.Unmarshal(out.Bytes(), &r))
		if r.Mender == nil || r.Mender.Txn != 5 || r.Update == nil || r.Update.Artifact != storeRelease ||
			r.Provides["artifact_name"] != "app-1" ||
			!strings.Contains(fmt.Sprint(r.Notes), "taken over from Mender's client") {
			t.Errorf("got %s", out)
		}
		must(t, d.start().openState())
	}
}

// A standalone update of an image waits for its verdict, and the power is cut at each operation from the
// take-over on. What is lost of the journal is taken over again.
func TestPowerCutInTakeOver(t *testing.T) {
	t.Parallel()
	for _, store := range []string{"3.4.0-rootfs-standalone-pending", "5.1.0-rootfs-standalone-pending"} {
		for _, env := range []string{"trial", ""} {
			s := newStoreSetup(t)
			text := storeFile(t, store)
			eachCut(t, func(k int, mode string) (cut bool) {
				d, _ := storeDevice(t, s, text, env)
				d.w.ops, d.w.cutAt = 0, k
				var err error
				if cut = d.powered(func() { err = d.settle("/none", storeRelease) }); cut {
					d.w.lose(mode, 513, rand.New(rand.NewSource(int64(k))))
					err = d.settle("/none", storeRelease)
				}
				if err == nil {
					err = d.check(storeRelease)
				}
				rec, _ := d.peek()
				if want := map[string]string{"trial": "committed", "": "rolled-back"}[env]; err != nil ||
					rec.Last.Result != want && (!cut || rec.Last.Result != "rolled-back") || rec.Mender == nil {
					t.Fatalf("%s %s, cut at operation %d, %s: %v; verdict %+v, want %s", store, env, k, mode, err, rec.Last, want)
				}
				untouched(t, s.dir, text)
				return cut
			})
		}
	}
}

// eachCut calls f for each operation until there was none to cut at, with one way to lose what was not synced, or
// with all of them where there is time.
func eachCut(t *testing.T, f func(k int, mode string) (cut bool)) {
	t.Helper()
	for k := 1; ; k++ {
		modes := lossModes[k%len(lossModes):][:1]
		if exhaustive() {
			modes = lossModes
		}
		for _, mode := range modes {
			if !f(k, mode) {
				t.Logf("%d operations", k-1)
				return
			}
		}
		if testing.Short() {
			k += 6
		}
	}
}

// Names alone are taken over, and the power is cut at each operation: the journal has all of them or none.
func TestPowerCutInImport(t *testing.T) {
	t.Parallel()
	s := newStoreSetup(t)
	for _, row := range storeRows {
		if row.step != stepEnd || row.name == unknownName {
			continue
		}
		text := storeFile(t, row.store)
		if read, _ := parseMenderStore(text); recovery && read.values["state"] != nil {
			continue // which is not for the recovery build
		}
		eachCut(t, func(k int, mode string) (cut bool) {
			d, _ := storeDevice(t, s, text, "")
			d.w.ops, d.w.cutAt = 0, k
			open := func() { must(t, d.start().openState()) }
			if cut = d.powered(open); cut {
				d.w.lose(mode, 513, rand.New(rand.NewSource(int64(k))))
				rec, err := d.peek()
				if must(t, err); rec.Provides != nil && (rec.Mender == nil || rec.Provides["artifact_name"] != row.name) {
					t.Fatalf("%s, cut at operation %d, %s: got %+v", row.store, k, mode, rec)
				}
				open()
			}
			rec, err := d.peek()
			if must(t, err); rec.Provides["artifact_name"] != row.name || providesText(rec.Provides) != row.provides ||
				rec.Mender == nil {
				t.Fatalf("%s, cut at operation %d, %s: got %+v", row.store, k, mode, rec)
			}
			untouched(t, s.dir, text)
			return cut
		})
	}
}

// While Mender's client has its store open, nothing is taken over.
func TestMenderStillRuns(t *testing.T) {
	t.Parallel()
	s := newStoreSetup(t)
	d, said := storeDevice(t, s, storeFile(t, "3.4.0-committed"), "")
	f, err := os.Create(filepath.Join(s.dir, menderStoreLock))
	must(t, err)
	defer f.Close()
	const ofdSetLock = 37 // F_OFD_SETLK of linux/fcntl.h: it is another's even for the process that has it
	lock := syscall.Flock_t{Type: syscall.F_RDLCK, Len: 1}
	must(t, syscall.FcntlFlock(f.Fd(), ofdSetLock, &lock))
	err = d.start().openState()
	if exitCode(err) != exitTempFail || !strings.Contains(err.Error(), "Mender's client is running") ||
		!strings.Contains(hintOf(err), "stop it") {
		t.Errorf("got %v, want that it runs, with a hint", err)
	}
	if rec, _ := d.peek(); rec.Provides != nil || rec.Mender != nil {
		t.Errorf("the journal has %+v", rec)
	}
	lock.Type = syscall.F_UNLCK
	must(t, syscall.FcntlFlock(f.Fd(), ofdSetLock, &lock))
	must(t, d.start().openState())
	lock.Type = syscall.F_RDLCK // what has been taken over is no reason to stop, but to say it
	must(t, syscall.FcntlFlock(f.Fd(), ofdSetLock, &lock))
	said.Reset()
	if err := d.start().openState(); err != nil || !strings.Contains(said.String(), "is running") {
		t.Errorf("got %v, said %q", err, said)
	}
}
