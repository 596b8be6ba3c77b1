// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// Lines of standalone mode.
const (
	sayInstalling   = "Installing artifact...|"
	sayWaits        = "Installed, but not committed.|Use 'commit' to update, or 'rollback' to roll back the update.|"
	sayNotModified  = "Streaming failed.|System not modified.|"
	sayFailedBack   = "Installation failed.|Rolled back.|"
	sayLost         = "Rollback failed. System may be in an inconsistent state.|"
	sayNoWayBack    = "Update Module does not support rollback. System may be in an inconsistent state.|"
	sayAutoCommit   = "Update Module doesn't support rollback. Committing immediately.|"
	sayRolledBack   = "Rolled back.|"
	sayNeedsReboot  = "At least one payload requested a reboot of the device it updated.|"
	sayStreamed     = "Streamed to storage, but not installed/enabled.|"
	sayPostCommit   = "One or more post-commit steps failed.|"
	sayDoneAtOnce   = "Installed and committed.|"
	sayEmptyPayload = "Artifact with empty payload. Committing immediately.|"

	killed = -1
	back   = "RB.E RB RB.L F.E F F.L CL"
)

// use is one call of the program; or, where there is no exit code to be had, something that
// is changed before the next one.
type use struct {
	args  string
	exit  int
	calls string
	says  string
}

func install(opts ...string) use {
	return use{strings.Join(append([]string{"install"}, opts...), " "), 0, "<INST>", sayInstalling + sayWaits}
}

func then(how string) use { return use{args: "!" + how} }

var (
	commits   = use{"commit", 0, "C.E C C.L CL", "Committed.|"}
	rollsBack = use{"rollback", 0, back, sayRolledBack}
)

type standaloneRow struct {
	name, how      string
	uses           []use
	stored, result string // as in chains; result "-": no verdict
}

// Section by section: what Mender's client 5.x does on its own. Where a row differs from it
// the comment says so. A module that needs no reboot is the normal case here.
var standaloneRows = []standaloneRow{
	{"commit", "", []use{install(), commits}, "new", ""},
	{"rollback", "", []use{install(), rollsBack}, "old", ""},
	{"reboot needed", "answer NR Yes", []use{{"install", 0, "<INST>", sayInstalling + sayWaits + sayNeedsReboot},
		commits}, "new", ""},
	{"reboot needed, exit code", "answer NR Automatic",
		[]use{{"install --reboot-exit-code", 4, "<INST>", sayInstalling + sayWaits + sayNeedsReboot}, commits}, "new", ""},
	{"no reboot needed, exit code", "", []use{install("--reboot-exit-code"), commits}, "new", ""},
	{"no rollback", "answer SR No", []use{{"install", 0, "<INST> C.E C C.L CL",
		sayInstalling + sayAutoCommit + sayDoneAtOnce}}, "new", ""},
	{"no rollback, reboot needed", "answer SR No; answer NR Yes",
		[]use{{"install --reboot-exit-code", 4, "<INST> C.E C C.L CL",
			sayInstalling + sayAutoCommit + sayDoneAtOnce + sayNeedsReboot}}, "new", ""},
	{"empty payload", "artifact empty", []use{{"install", 0, "",
		sayInstalling + sayEmptyPayload + sayDoneAtOnce}}, "new", ""},
	{"install while one is pending", "", []use{install(), {"install", 1, "", "System not modified.|"},
		commits}, "new", ""},
	{"nothing in progress", "", []use{
		{"commit", 2, "", "No update in progress.|"},
		{"rollback", 2, "", "No update in progress.|"},
		{"resume", 2, "", "No update in progress.|"}}, "old", "-"},
	{"usage", "", []use{{"install --stop-before Nonsense", 64, "", ""}, {"resume --stop-before", 64, "", ""}}, "old", "-"},
	// A program that looks each minute whether something is to be resumed does no harm.
	{"resume many times", "", append(append([]use{install()}, repeated(35, use{"resume", 0, "", sayWaits})...),
		commits), "new", ""},

	// Refused before anything was done: exit code 3, which Mender does not have.
	{"device type mismatch", "device other", []use{{"install", 3, "", sayInstalling + sayNotModified}}, "old", "-"},
	{"no such module", "remove share/modules/v3/actor",
		[]use{{"install", 3, "", sayInstalling + sayNotModified}}, "old", "-"},
	{"malformed artifact", "artifact bad", []use{{"install", 3, "", sayNotModified}}, "old", "-"},
	{"missing file", "artifact missing", []use{{"install", 1, "", sayNotModified}}, "old", "-"},

	{"error in D.E", "fail D.E", []use{{"install", 1, "D.E D.X CL", sayInstalling + sayNotModified}}, "old", "failed"},
	{"error in PPFS", "fail PPFS", []use{{"install", 1, "D.E PPFS D.X CL", sayInstalling + sayNotModified}},
		"old", "failed"},
	{"error in D", "fail D", []use{{"install", 1, "D.E PPFS D D.X CL", sayInstalling + sayNotModified}}, "old", "failed"},
	{"error in D.L", "fail D.L", []use{{"install", 1, "<DL> D.X CL", sayInstalling + sayNotModified}}, "old", "failed"},
	{"error in D and in CL", "fail D; fail CL", []use{{"install", 1, "D.E PPFS D D.X CL",
		sayInstalling + "Streaming failed.|System not modified. Cleanup failed.|"}}, "old", "failed"},

	{"error in I", "fail I", []use{{"install", 1, "<DL> I.E I I.X " + back, sayInstalling + sayFailedBack}}, "old", ""},
	{"error in I.E", "fail I.E", []use{{"install", 1, "<DL> I.E I.X " + back, sayInstalling + sayFailedBack}}, "old", ""},
	{"error in I.L", "fail I.L", []use{{"install", 1, "<INST> I.X " + back, sayInstalling + sayFailedBack}}, "old", ""},
	{"error in I, no rollback", "fail I; answer SR No", []use{{"install", 1, "<DL> I.E I I.X F.E F F.L CL",
		sayInstalling + "Installation failed.|" + sayNoWayBack}}, "INC+", ""},
	{"error in I and SR", "fail I; fail SR", []use{{"install", 1, "<DL> I.E I I.X F.E F F.L CL",
		sayInstalling + "Installation failed.|" + sayLost}}, "INC+", ""},
	{"error in I and RB", "fail I; fail RB", []use{{"install", 1, "<DL> I.E I I.X " + back,
		sayInstalling + "Installation failed.|" + sayLost}}, "INC+", ""},
	{"error in I and CL", "fail I; fail CL", []use{{"install", 1, "<DL> I.E I I.X " + back,
		sayInstalling + "Installation failed.|Rolled back. Cleanup failed.|"}}, "old", ""},
	{"error in NeedsArtifactReboot", "fail NR", []use{{"install", 1, "<INST> " + back,
		sayInstalling + sayRolledBack}}, "old", ""},
	{"error in SupportsRollback", "fail SR", []use{{"install", 1, "<INST> F.E F F.L CL",
		sayInstalling + sayLost}}, "INC+", ""},
	{"error once in SupportsRollback", "once SR", []use{{"install", 1, "<INST> " + back,
		sayInstalling + sayRolledBack}}, "old", ""},

	{"error in C", "fail C", []use{install(), {"commit", 1, "C.E C C.X " + back,
		"Committing failed.|" + sayRolledBack}}, "old", ""},
	{"error in C.E", "fail C.E", []use{install(), {"commit", 1, "C.E C.X " + back,
		"Committing failed.|" + sayRolledBack}}, "old", ""},
	{"error in C.L", "fail C.L", []use{install(), {"commit", 1, "C.E C C.L CL",
		"Committed.|" + sayPostCommit}}, "new", ""},
	{"error in C, no rollback", "fail C; answer SR No", []use{{"install", 1, "<INST> C.E C C.X F.E F F.L CL",
		sayInstalling + sayAutoCommit + "Committing failed.|" + sayNoWayBack}}, "INC+", ""},
	{"error in C.L, no rollback", "fail C.L; answer SR No", []use{{"install", 1, "<INST> C.E C C.L CL",
		sayInstalling + sayAutoCommit + sayDoneAtOnce + sayPostCommit}}, "new", ""},
	{"error in CL after commit", "fail CL", []use{install(),
		{"commit", 1, "C.E C C.L CL", "Committed.|Cleanup failed.|"}}, "INC+", ""},
	{"error in C.L and CL", "fail C.L; fail CL", []use{install(), {"commit", 1, "C.E C C.L CL",
		"Committed.|One or more post-commit steps failed. Cleanup failed.|"}}, "INC+", ""},

	{"error in RB", "", []use{install(), then("fail RB"), {"rollback", 1, back, sayLost}}, "INC+", ""},
	{"error in RB.E", "", []use{install(), then("fail RB.E"), {"rollback", 1, back, sayLost}}, "INC+", ""},
	{"error in RB.L", "", []use{install(), then("fail RB.L"), rollsBack}, "old", ""},
	{"error in F", "", []use{install(), then("fail F"), {"rollback", 1, back, sayLost}}, "INC+", ""},
	{"error in F.E", "", []use{install(), then("fail F.E"), {"rollback", 1, back, sayLost}}, "INC+", ""},
	{"error in F.L", "", []use{install(), then("fail F.L"), rollsBack}, "old", ""},
	{"error in CL after rollback", "", []use{install(), then("fail CL"),
		{"rollback", 1, back, "Rolled back. Cleanup failed.|"}}, "old", ""},
	{"rollback not supported", "", []use{install(), then("answer SR No"), {"rollback", 1, "", sayNoWayBack},
		commits}, "new", ""},
	{"rollback query fails", "", []use{install(), then("once SR"), {"rollback", 1, "", ""}, commits}, "new", ""},

	// A signal does not tear a module or script apart, and is no failure.
	{"SIGTERM in I", "term I", []use{install(), commits}, "new", ""},
	{"SIGTERM in RB", "term RB", []use{install(), rollsBack}, "old", ""},

	{"killed in D.E", "kill D.E", []use{{"install", killed, "D.E", sayInstalling},
		{"resume", 1, "CL", "System not modified.|"}}, "old", "failed"},
	{"killed in D", "kill D", []use{{"install", killed, "D.E PPFS D", sayInstalling},
		{"resume", 1, "CL", "System not modified.|"}}, "old", "failed"},
	{"killed in D.L", "kill D.L", []use{{"install", killed, "<DL>", sayInstalling},
		{"resume", 1, "CL", "System not modified.|"}}, "old", "failed"},
	{"killed in D, commit", "kill D", []use{{"install", killed, "D.E PPFS D", sayInstalling}, {"commit", 1, "", ""},
		{"rollback", 0, "CL", "System not modified.|"}}, "old", "failed"},
	{"killed in D, install again", "kill D", []use{{"install", killed, "D.E PPFS D", sayInstalling},
		{"install", 0, "CL <INST>", sayInstalling + sayWaits}, commits}, "new", ""},

	{"killed in I, resume", "kill I", []use{{"install", killed, "<DL> I.E I", sayInstalling},
		{"resume", 1, back, sayRolledBack}}, "old", ""},
	{"killed in I.E, resume", "kill I.E", []use{{"install", killed, "<DL> I.E", sayInstalling},
		{"resume", 1, back, sayRolledBack}}, "old", ""},
	{"killed in I.L, resume", "kill I.L", []use{{"install", killed, "<INST>", sayInstalling},
		{"resume", 1, back, sayRolledBack}}, "old", ""},
	{"killed in I.X, resume", "fail I; kill I.X", []use{{"install", killed, "<DL> I.E I I.X", sayInstalling},
		{"resume", 1, back, sayRolledBack}}, "old", ""},
	{"killed in I, commit", "kill I", []use{{"install", killed, "<DL> I.E I", sayInstalling}, {"commit", 1, "", ""},
		rollsBack}, "old", ""},
	{"killed in I, install", "kill I", []use{{"install", killed, "<DL> I.E I", sayInstalling},
		{"install", 1, "", "System not modified.|"}, rollsBack}, "old", ""},
	// Cut short: the module is not asked whether it can roll back.
	{"killed in I, no rollback", "kill I; answer SR No",
		[]use{{"install", killed, "<DL> I.E I", sayInstalling}, {"resume", 1, back, sayRolledBack}}, "old", ""},
	{"killed in I, no rollback, rollback", "kill I; answer SR No",
		[]use{{"install", killed, "<DL> I.E I", sayInstalling}, rollsBack}, "old", ""},
	{"killed in NeedsArtifactReboot", "kill NR", []use{{"install", killed, "<INST>", sayInstalling},
		{"resume", 0, "", sayWaits}, commits}, "new", ""},
	{"killed in NeedsArtifactReboot, commit", "kill NR",
		[]use{{"install", killed, "<INST>", sayInstalling}, commits}, "new", ""},
	{"killed in NeedsArtifactReboot, rollback", "kill NR",
		[]use{{"install", killed, "<INST>", sayInstalling}, rollsBack}, "old", ""},

	{"killed in C, resume", "kill C", []use{install(), {"commit", killed, "C.E C", ""},
		{"resume", 1, back, sayRolledBack}}, "old", ""},
	{"killed in C, commit", "kill C", []use{install(), {"commit", killed, "C.E C", ""},
		{"commit", 1, back, sayRolledBack}}, "old", ""},
	{"killed in C, rollback", "kill C", []use{install(), {"commit", killed, "C.E C", ""}, rollsBack}, "old", ""},
	{"killed in C.E, resume", "kill C.E", []use{install(), {"commit", killed, "C.E", ""},
		{"resume", 1, back, sayRolledBack}}, "old", ""},
	{"killed in C.L, resume", "kill C.L", []use{install(), {"commit", killed, "C.E C C.L", ""},
		{"resume", 0, "C.L CL", "Cleaned up.|"}}, "new", ""},
	{"killed in C.L, commit and rollback", "kill C.L", []use{install(), {"commit", killed, "C.E C C.L", ""},
		{"commit", 1, "", ""}, {"rollback", 1, "", ""}, {"resume", 0, "C.L CL", "Cleaned up.|"}}, "new", ""},
	{"killed in C.L, then error in it", "kill C.L", []use{install(), {"commit", killed, "C.E C C.L", ""}, then("fail C.L"),
		{"resume", 1, "C.L CL", "Cleaned up.|" + sayPostCommit}}, "new", ""},
	{"killed in CL after commit", "kill CL", []use{install(), {"commit", killed, "C.E C C.L CL", ""},
		{"resume", 0, "CL", "Cleaned up.|"}}, "new", ""},
	{"killed in CL, commit and rollback", "kill CL", []use{install(), {"commit", killed, "C.E C C.L CL", ""},
		{"commit", 1, "", ""}, {"rollback", 1, "", ""}, {"resume", 0, "CL", "Cleaned up.|"}}, "new", ""},

	{"killed in RB.E, resume", "kill RB.E", []use{install(), {"rollback", killed, "RB.E", ""},
		{"resume", 0, back, sayRolledBack}}, "old", ""},
	{"killed in RB, rollback", "kill RB", []use{install(), {"rollback", killed, "RB.E RB", ""}, rollsBack}, "old", ""},
	{"killed in RB.L, commit", "kill RB.L", []use{install(), {"rollback", killed, "RB.E RB RB.L", ""},
		{"commit", 1, "", ""}, rollsBack}, "old", ""},
	{"killed in F.E", "kill F.E", []use{install(), {"rollback", killed, "RB.E RB RB.L F.E", ""}, {"rollback", 1, "", ""},
		{"resume", 0, "F.E F F.L CL", sayRolledBack}}, "old", ""},
	{"killed in F", "kill F", []use{install(), {"rollback", killed, "RB.E RB RB.L F.E F", ""},
		{"resume", 0, "F.E F F.L CL", sayRolledBack}}, "old", ""},
	{"killed in CL after rollback", "kill CL", []use{install(), {"rollback", killed, back, ""},
		{"resume", 0, "CL", sayRolledBack}}, "old", ""},
	{"error in I, killed in RB", "fail I; kill RB", []use{{"install", killed, "<DL> I.E I I.X RB.E RB", sayInstalling},
		{"resume", 1, back, sayRolledBack}}, "old", ""},
	{"error in I, killed in RB, rollback", "fail I; kill RB",
		[]use{{"install", killed, "<DL> I.E I I.X RB.E RB", sayInstalling}, rollsBack}, "old", ""},
	{"error in I, killed in CL", "fail I; kill CL", []use{{"install", killed, "<DL> I.E I I.X " + back, sayInstalling},
		{"resume", 1, "CL", sayRolledBack}}, "old", ""},

	{"stop before install", "", []use{{"install --stop-before ArtifactInstall_Enter", 0, "<DL>",
		sayInstalling + sayStreamed},
		{"commit", 1, "", ""},
		{"resume --stop-before ArtifactInstall_Enter", 0, "", ""},
		{"resume", 0, "I.E I I.L", sayWaits}, commits}, "new", ""},
	{"stop before install, rollback", "", []use{{"install --stop-before ArtifactInstall_Enter", 0, "<DL>",
		sayInstalling + sayStreamed}, rollsBack}, "old", ""},
	{"stop before commit", "", []use{install("--stop-before", "ArtifactCommit_Enter"),
		{"commit --stop-before ArtifactCommit_Enter", 0, "", ""},
		{"resume --stop-before ArtifactCommit_Enter", 0, "", ""}, commits}, "new", ""},
	{"stop before commit, no rollback", "answer SR No", []use{install("--stop-before", "ArtifactCommit_Enter"),
		{"resume --stop-before ArtifactCommit_Enter", 0, "", ""},
		{"resume", 0, "C.E C C.L CL", "Committed.|"}}, "new", ""},
	{"stop before commit leave", "", []use{install(),
		{"commit --stop-before ArtifactCommit_Leave", 0, "C.E C", "Committed.|"},
		{"resume --stop-before ArtifactCommit_Leave", 0, "", ""},
		{"commit", 1, "", ""}, {"resume", 0, "C.L CL", "Cleaned up.|"}}, "new", ""},
	{"stop before commit leave, rollback", "", []use{install(),
		{"commit --stop-before ArtifactCommit_Leave", 0, "C.E C", "Committed.|"},
		rollsBack}, "old", ""},
	{"stop before cleanup", "", []use{install(), {"commit --stop-before Cleanup", 0, "C.E C C.L", "Committed.|"},
		{"resume --stop-before Cleanup", 0, "", ""}, {"resume", 0, "CL", "Cleaned up.|"}}, "new", ""},
	{"stop at several places", "", []use{{"install --stop-before Cleanup --stop-before ArtifactInstall_Enter", 0, "<DL>",
		sayInstalling + sayStreamed},
		{"resume --stop-before Cleanup --stop-before ArtifactInstall_Enter", 0, "", ""},
		{"resume --stop-before Cleanup", 0, "I.E I I.L", sayWaits}, commits}, "new", ""},
	// The failure is the exit code of the run that met it; what follows is asked for.
	{"stop before rollback", "fail I", []use{
		{"install --stop-before ArtifactRollback_Enter", 1, "<DL> I.E I I.X", sayInstalling + "Installation failed.|"},
		{"resume --stop-before ArtifactRollback_Enter", 0, "", ""},
		{"commit", 1, "", ""}, {"resume", 0, back, sayRolledBack}}, "old", ""},
	{"stop before rollback, rollback", "fail I", []use{
		{"install --stop-before ArtifactRollback_Enter", 1, "<DL> I.E I I.X", sayInstalling + "Installation failed.|"},
		rollsBack}, "old", ""},
	{"stop before failure", "fail I", []use{
		{"install --stop-before ArtifactFailure_Enter", 1, "<DL> I.E I I.X RB.E RB RB.L", sayInstalling + sayFailedBack},
		{"rollback", 1, "", ""}, {"resume", 0, "F.E F F.L CL", sayRolledBack}}, "old", ""},
	{"stop before failure, then error in it", "fail I; fail F", []use{
		{"install --stop-before ArtifactFailure_Enter", 1, "<DL> I.E I I.X RB.E RB RB.L", sayInstalling + sayFailedBack},
		{"resume", 1, "F.E F F.L CL", sayLost}}, "INC+", ""},
	{"stop in a rollback that was asked for", "", []use{install(),
		{"rollback --stop-before ArtifactRollback_Enter", 0, "", ""},
		{"rollback --stop-before ArtifactRollback_Enter", 0, "", ""},
		{"rollback --stop-before ArtifactFailure_Enter", 0, "RB.E RB RB.L", sayRolledBack},
		{"resume --stop-before Cleanup", 0, "F.E F F.L", sayRolledBack},
		{"resume --stop-before Cleanup", 0, "", sayRolledBack},
		{"resume", 0, "CL", sayRolledBack}}, "old", ""},
}

func repeated(n int, u use) []use {
	var list []use
	for range n {
		list = append(list, u)
	}
	return list
}

func TestStandalone(t *testing.T) {
	t.Parallel()
	artifacts := newChainArtifacts(t)
	for _, row := range standaloneRows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			row.check(t, artifacts)
		})
	}
}

func (row standaloneRow) check(t *testing.T, artifacts chainArtifacts) {
	d := newChainDevice(t, artifacts.full)
	d.arrange("answer NR No")
	switch row.how {
	case "artifact empty":
		d.artifact, row.how = artifacts.empty, ""
	case "artifact bad":
		d.put("bad", "not an artifact")
		d.artifact, row.how = d.dir+"/bad", ""
	case "artifact missing":
		d.artifact, row.how = d.dir+"/missing", ""
	}
	d.arrange(row.how)
	for i, u := range row.uses {
		if how, ok := strings.CutPrefix(u.args, "!"); ok {
			d.arrange(how)
			continue
		}
		args := strings.Fields(u.args)
		if args[0] == "install" {
			args = append(args, d.artifact)
		}
		exit, says := d.program(args...)
		if exit != u.exit {
			t.Errorf("use %d, %q: exit code %d, want %d", i+1, u.args, exit, u.exit)
		}
		if got, want := d.trace(), chainCalls(u.calls); got != want {
			t.Errorf("use %d, %q: calls\ngot  %s\nwant %s", i+1, u.args, got, want)
		}
		if got := strings.ReplaceAll(says, "\n", "|"); got != u.says {
			t.Errorf("use %d, %q: stdout\ngot  %s\nwant %s", i+1, u.args, got, u.says)
		}
	}
	d.checkStored(row.stored, row.result, false)
	if left, _ := filepath.Glob(d.dir + "/var/modules/v3/payloads/0000/tree/*"); row.result != "-" && left != nil {
		t.Errorf("the module's tree is still there: %v", left)
	}
}

// What a module had between its states is gone, or the module is: that is what is said, and each verb
// ends the update.
func TestStandaloneTreeGone(t *testing.T) {
	t.Parallel()
	artifacts := newChainArtifacts(t)
	for _, gone := range []string{"var/modules/v3/payloads/0000/tree", "share/modules/v3/actor"} {
		for _, row := range []struct{ verb, stop string }{
			{"rollback", ""}, {"rollback", "ArtifactInstall_Enter"}, {"resume", ""}, {"commit", ""},
		} {
			t.Run(filepath.Base(gone)+" "+row.verb+" "+row.stop, func(t *testing.T) {
				t.Parallel()
				d := newChainDevice(t, artifacts.full)
				d.arrange("answer NR No")
				install := []string{"install", d.artifact}
				if row.stop != "" {
					install = append(install, "--stop-before", row.stop)
				}
				if exit, _ := d.program(install...); exit != 0 {
					t.Fatalf("install: exit code %d", exit)
				}
				must(t, os.RemoveAll(filepath.Join(d.dir, gone)))
				exit, says := d.program(row.verb)
				if exit != exitFailed || !strings.Contains(says, "Rollback failed. System may be in an inconsistent state.\n") {
					t.Errorf("exit code %d, %q", exit, says)
				}
				want := "its work tree is gone"
				if strings.HasPrefix(gone, "share") {
					want = `no update module for payload type "actor"`
				}
				if !strings.Contains(d.said, want) || strings.Contains(d.said+says, "not support rollback") {
					t.Errorf("want %q in %q", want, d.said)
				}
				d.checkStored("INC+", "", false)
			})
		}
	}
}

// A deployment of the server's is not for the standalone verbs.
func TestStandaloneManagedInProgress(t *testing.T) {
	artifacts := newChainArtifacts(t)
	d := newChainDevice(t, artifacts.full)
	a := d.newApp()
	a.rec.Update = &update{Step: stepCommitWait, Managed: true, ID: "deployment-1", Artifact: "new", Type: "actor"}
	if err := a.j.save(a.rec); err != nil {
		t.Fatal(err)
	}
	a.closeState()
	for verb, want := range map[string]string{"commit": "", "rollback": "", "resume": "",
		"install": "System not modified.\n"} {
		args := []string{verb}
		if verb == "install" {
			args = append(args, artifacts.full)
		}
		if exit, says := d.program(args...); exit != 1 || says != want {
			t.Errorf("%s: exit code %d and %q, want 1 and %q", verb, exit, says, want)
		}
	}
	if got := d.trace(); got != "" {
		t.Errorf("called: %s", got)
	}
}

// Edge case 16 of the Mender tests: what a device without a name takes for its name.
func TestBootstrapArtifact(t *testing.T) {
	bootstrap := packed(t, "--bootstrap", "-n", "factory", "-c", "sim", "-p", "app:1", "-o", "-")
	other := packed(t, "--bootstrap", "-n", "factory", "-c", "other", "-p", "app:1", "-o", "-")
	full := packed(t, "-T", "actor", "-n", "factory", "-c", "sim", "-f", writeTemp(t, "payload", []byte("x")), "-o", "-")
	for _, row := range []struct {
		name, file, info string
		named            bool
		want             string
	}{
		{"absent", "", "", false, "artifact_name=unknown|"},
		{"good", string(bootstrap), "", false, "app=1|artifact_name=factory|"},
		{"damaged", string(bootstrap[:len(bootstrap)/2]), "", false, "artifact_name=unknown|"},
		{"for another device", string(other), "", false, "artifact_name=unknown|"},
		// Mender would install it.
		{"with a payload", string(full), "", false, "artifact_name=unknown|"},
		{"of no use", string(bootstrap), "", true, "artifact_name=old|keep=1|"},
		// Mender before 3.5 took the name from there.
		{"artifact_info", "", "artifact_name=info-1\n", false, "artifact_name=info-1|"},
		{"before artifact_info", string(bootstrap), "artifact_name=info-1\n", false, "app=1|artifact_name=factory|"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d := newChainDevice(t, "")
			if !row.named {
				os.Remove(d.dir + "/var/" + journalName)
			}
			if row.file != "" {
				d.put("var/bootstrap.mender", row.file)
			}
			if row.info != "" {
				d.put("etc/artifact_info", row.info)
			}
			// The bootstrap artifact is not signed and needs not be.
			d.put("etc/mender.conf", `{"ArtifactVerifyKey":"/nonexistent/key"}`)
			exit, says := d.program("show-provides")
			if got := strings.ReplaceAll(says, "\n", "|"); got != row.want || exit != 0 {
				t.Errorf("show-provides: exit code %d and %q, want 0 and %q", exit, got, row.want)
			}
			if exit, _ := d.program("resume"); exit != exitNothing { // opens the state, whoever had the name before
				t.Errorf("resume: exit code %d, want %d", exit, exitNothing)
			}
			if _, err := os.Stat(d.dir + "/var/bootstrap.mender"); err == nil {
				t.Error("the bootstrap artifact is still there")
			}
			_, name, _ := strings.Cut(row.want, "artifact_name=")
			name, _, _ = strings.Cut(name, "|")
			if exit, says := d.program("show-artifact"); exit != 0 || says != name+"\n" {
				t.Errorf("show-artifact: exit code %d and %q, want 0 and %q", exit, says, name)
			}
			if got := d.trace(); got != "" {
				t.Errorf("called: %s", got)
			}
		})
	}
}

// What is stored after real installs, one after the other (edge case 17).
func TestProvidesAfterInstalls(t *testing.T) {
	t.Parallel()
	d := newChainDevice(t, "")
	d.arrange("answer NR No; answer SR No")
	payload := writeTemp(t, "payload", []byte("x"))
	for i, row := range []struct{ args, want string }{
		{"-g G -p a:1 -p ab:2 -p b.c:3", "a=1|ab=2|artifact_group=G|artifact_name=N|b.c=3|"}, // no clears: all is replaced
		{"-p b:4 --clears-provides a", "ab=2|artifact_group=G|artifact_name=N|b=4|b.c=3|"},   // the whole key
		{"-p b:5 --clears-provides b?c --clears-provides x*", "ab=2|artifact_group=G|artifact_name=N|b=5|b.c=3|"},
		{"-p b:5 --clears-provides b.*", "ab=2|artifact_group=G|artifact_name=N|b=5|"},
		{"-g H -p a:6 --clears-provides *.checksum", "a=6|ab=2|artifact_group=H|artifact_name=N|b=5|"},
		{"--clears-provides artifact_group", "a=6|ab=2|artifact_name=N|b=5|"},
		{"--clears-provides *b*", "a=6|artifact_name=N|"},
		{"-d a:6 -p z:1", "artifact_name=N|z=1|"},
		{"-d a:6 -p z:2", ""}, // a is gone: refused
		{"-d z:1 -d z:2 -N name-7 -g K -p z:3", "artifact_group=K|artifact_name=N|z=3|"},
		{"-G other -p z:4", ""},
		{"-G K -G other --clears-provides *", "artifact_name=N|"},
		{"", "artifact_name=N|"},
	} {
		name := fmt.Sprintf("name-%d", i)
		file := filepath.Join(d.dir, name+".mender")
		args := append([]string{"-T", "actor", "-n", name, "-c", "sim", "-f", payload, "--no-default-software-version", "-o",
			file}, strings.Fields(row.args)...)
		if err := packCommand(args, io.Discard, nil); err != nil {
			t.Fatal(err)
		}
		_, before := d.program("show-provides")
		want, wantExit := strings.ReplaceAll(strings.ReplaceAll(row.want, "=N|", "="+name+"|"), "|", "\n"), 0
		if row.want == "" {
			want, wantExit = before, exitRefused
		}
		if exit, _ := d.program("install", file); exit != wantExit {
			t.Errorf("%d, %q: exit code %d, want %d", i, row.args, exit, wantExit)
		}
		if _, got := d.program("show-provides"); got != want {
			t.Errorf("%d, %q: provides\n%swant\n%s", i, row.args, got, want)
		}
	}
}

// The life of a device, and what is said where: stdout holds the lines of Mender's
// standalone mode, stderr the log.
func TestInstallCommitRollback(t *testing.T) {
	t.Parallel()
	b := newImageBoard(t)
	img1, img2 := testBlocks(300000), testImage(9, 700000)
	first, second := b.pack(t, "release-1", img1), b.pack(t, "release-2", img2)

	out, errs := b.must(t, exitReboot, "install", "--reboot-exit-code", first)
	if want := "Installing artifact...\nInstalled, but not committed.\nUse 'commit' to update, or 'rollback' to roll " +
		"back the update.\nAt least one payload requested a reboot of the device it updated.\n"; out != want {
		t.Errorf("stdout %q, want %q", out, want)
	}
	if !strings.Contains(errs, "300000 bytes in place") ||
		!strings.HasSuffix(errs, "mendlet: reboot now, then 'mendlet commit' (or 'mendlet rollback')\n") {
		t.Errorf("stderr %q", errs)
	}
	b.slotHolds(t, b.b, img1)
	if v := b.env(t); v[varBootPart] != "3" || v[varBootPartHex] != "3" || v[varUpgrade] != "1" || v[varBootcount] != "0" {
		t.Errorf("environment %v", v)
	}
	// Too early; nothing changes.
	_, errs = b.must(t, exitFailed, "commit")
	if !strings.Contains(errs, "has not been booted") || !strings.Contains(errs, "hint: ") {
		t.Errorf("commit before the reboot: %q", errs)
	}
	b.must(t, exitFailed, "install", second)
	b.reboot(t)
	if out, errs = b.must(t, exitOK, "commit", "--stop-before", "ArtifactCommit_Enter"); out != "" ||
		!strings.Contains(errs, "stopped before ArtifactCommit_Enter; 'mendlet commit' keeps it") {
		t.Errorf("stopped: stdout %q, stderr %q", out, errs)
	}
	if out, _ = b.must(t, exitOK, "commit"); out != "Committed.\n" {
		t.Errorf("stdout %q", out)
	}
	if out, _ = b.must(t, exitOK, "show-artifact"); out != "release-1\n" {
		t.Errorf("show-artifact %q", out)
	}
	if out, _ = b.must(t, exitOK, "show-provides"); !strings.Contains(out, "artifact_name=release-1\n") ||
		!strings.Contains(out, "rootfs-image.checksum=") {
		t.Errorf("show-provides %q", out)
	}

	b.must(t, exitOK, "install", second, "-q")
	b.slotHolds(t, b.a, img2)
	b.reboot(t)
	if out, errs = b.must(t, exitReboot, "rollback", "--reboot-exit-code"); out != "Rolled back.\n" ||
		!strings.Contains(errs, "mendlet: reboot now, to run the system from before\n") {
		t.Errorf("stdout %q, stderr %q", out, errs)
	}
	b.reboot(t)
	if b.running != "B" {
		t.Errorf("runs %s after the rollback", b.running)
	}
	if out, _ = b.must(t, exitOK, "show-artifact"); out != "release-1\n" {
		t.Errorf("after rollback: %q", out)
	}
	b.must(t, exitNothing, "commit")
}

// What is on standard output or in the log is not said once more at the end.
func TestNothingSaidTwice(t *testing.T) {
	b := newImageBoard(t)
	for _, verb := range []string{"commit", "rollback", "resume"} {
		if out, errs := b.must(t, exitNothing, verb); out != "No update in progress.\n" || errs != "" {
			t.Errorf("%s: stdout %q, stderr %q", verb, out, errs)
		}
	}
	art := b.pack(t, "release-2", testBlocks(300000))
	text, err := os.ReadFile(art)
	if err != nil {
		t.Fatal(err)
	}
	text[len(text)/2] ^= 1
	writeFile(t, art, string(text))
	out, errs := b.must(t, exitFailed, "install", art)
	if n := strings.Count(errs, "SHA-256"); n != 1 || !strings.Contains(out, "Streaming failed.\nSystem not modified.\n") {
		t.Errorf("a damaged artifact: the cause is told %d times, want once; stdout %q, stderr %q", n, out, errs)
	}
}

// field case 28: the bootloader went back to the old side by itself.
func TestCommitAfterFallBack(t *testing.T) {
	t.Parallel()
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(100000))
	b.must(t, exitOK, "install", art)
	b.fallBack(t)
	_, errs := b.must(t, exitFailed, "commit")
	if !strings.Contains(errs, "reverted") {
		t.Errorf("stderr %q", errs)
	}
	out, _ := b.must(t, exitOK, "status", "--json")
	var r report
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Last == nil || r.Last.Result != "rolled-back" ||
		r.Update != nil {
		t.Errorf("%v: %s", err, out)
	}
	if v := b.env(t); v[varBootPart] != "2" || v[varUpgrade] != "0" {
		t.Errorf("environment %v", v)
	}
	b.must(t, exitOK, "install", art)
}

// field case 28: upgrade_available is 0 already, but the new side runs: a person committed
// by hand; the side is unknown: nothing is made worse.
func TestCommitWithOddEnvironment(t *testing.T) {
	for _, c := range []struct {
		part, running string
		code          int
		after         string
	}{{"3", "B", exitOK, "3"}, {"7", "none", exitFailed, "2"}} {
		b := newImageBoard(t)
		b.must(t, exitOK, "install", b.pack(t, "release-2", testBlocks(100000)))
		b.setEnv(t, map[string]string{varBootPart: c.part, varBootPartHex: c.part})
		b.running = c.running
		b.must(t, c.code, "commit")
		if v := b.env(t); v[varBootPart] != c.after || v[varUpgrade] != "0" {
			t.Errorf("%+v: environment %v", c, v)
		}
	}
}

// Everything to this end of the input fails and leaves the device as it is, over stdin.
func TestInstallFromStdin(t *testing.T) {
	b := newImageBoard(t)
	img := testBlocks(200000)
	art, err := os.ReadFile(b.pack(t, "release-2", img))
	if err != nil {
		t.Fatal(err)
	}
	for _, cut := range []int{0, 100, 5000, 60000, len(art) - 1024} {
		code, out, _ := b.do(t, string(art[:cut]), "install", "-")
		if code == exitOK || !strings.Contains(out, "System not modified.\n") {
			t.Errorf("cut off after %d bytes: exit %d, %q", cut, code, out)
		}
		if v := b.env(t); v[varUpgrade] != "0" || v[varBootPart] != "2" {
			t.Errorf("cut off after %d bytes: %v", cut, v)
		}
	}
	if code, _, errs := b.do(t, string(art), "install", "-"); code != exitOK {
		t.Fatalf("exit %d: %s", code, errs)
	}
	b.slotHolds(t, b.b, img)
}

// A data directory that nothing can be written to: said before anything is done.
func TestInstallReadOnlyState(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(1000))
	if err := os.RemoveAll(filepath.Join(b.dir, "ds")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(b.dir, "ds"), "a file")
	_, errs := b.must(t, exitFailed, "install", art)
	if !strings.Contains(errs, "hint: mendlet keeps its state in") {
		t.Errorf("got %q", errs)
	}
	b.slotHolds(t, b.b, oldImage())
}

// The slot fails in ways that only the whole program meets (field case 23): the close of a
// device reports what its writes could not.
func TestInstallCloseError(t *testing.T) {
	s := newSimSetup(t)
	d := newSimDevice(t, s.dir, s.images)
	a := d.start()
	a.m.open = func(path string, how openMode) (storage, error) {
		st, err := d.w.open(path, how)
		if err == nil && how == openSlot && strings.HasSuffix(path, "p3") && d.w.ops > 2 {
			return closeFails{st}, nil
		}
		return st, err
	}
	err := standalone{a}.install(t.Context(), s.artifacts["new"])
	if exitCode(err) != exitFailed || !strings.Contains(err.Error(), "closing") ||
		!strings.Contains(err.Error(), "input/output error") {
		t.Errorf("got %v", err)
	}
	if v := d.env(); v[varUpgrade] != "0" || v[varBootPart] != "2" {
		t.Errorf("the environment was changed: %v", v)
	}
	if err := d.settle(s.artifacts["next"], "next"); err != nil {
		t.Error(err)
	}
}

type closeFails struct{ storage }

func (closeFails) Close() error { return syscall.EIO }

// field case 13 (CVE-2020-25860): the file on the stick is swapped between check and use.
// It is opened once, and what is written is what was hashed.
func TestFileSwappedWhileInstalling(t *testing.T) {
	b := newImageBoard(t)
	img := testBlocks(300000)
	art := b.pack(t, "release-2", img)
	evil := b.pack(t, "evil", testImage(5, 300000))
	fifo := filepath.Join(b.dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Skip("needs mkfifo: ", err)
	}
	good, err := os.ReadFile(art)
	if err != nil {
		t.Fatal(err)
	}
	var once sync.WaitGroup
	once.Go(func() {
		f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		f.Write(good[:20000]) // the header has been verified with this much
		if err := os.Rename(evil, fifo); err != nil {
			t.Error(err)
		}
		f.Write(good[20000:])
	})
	b.must(t, exitOK, "install", fifo)
	once.Wait()
	b.slotHolds(t, b.b, img)
}

// An update that was rolled back and is tried again: the slot holds the image, so that no more of
// the artifact is needed than its header and the head of the image.
func TestInstallAgain(t *testing.T) {
	t.Parallel()
	for _, comp := range []string{"none", "gzip", "xz"} {
		b := newImageBoard(t)
		img := make([]byte, 1<<20) // does not get smaller
		rand.New(rand.NewSource(3)).Read(img)
		art := b.pack(t, "release-2", img, "--compression", comp)
		b.must(t, exitOK, "install", art)
		b.must(t, exitOK, "rollback")
		whole, err := os.ReadFile(art)
		if err != nil {
			t.Fatal(err)
		}
		cut := writeTemp(t, "cut.mender", whole[:payloadStart(whole)+headSize+maxPacked])
		_, errs := b.must(t, exitOK, "install", cut)
		if want := "of which 0 written and 1048576 already there"; !strings.Contains(errs, want) {
			t.Errorf("%s: got %q, want %q", comp, errs, want)
		}
		b.slotHolds(t, b.b, img)
		if v := b.env(t); v[varUpgrade] != "1" || v[varBootPart] != "3" {
			t.Errorf("%s: environment %v", comp, v)
		}
		b.must(t, exitOK, "rollback")
		img[1<<20-1] ^= 1 // the image is another one in its last byte
		b.must(t, exitOK, "install", b.pack(t, "release-3", img, "--compression", comp))
		b.slotHolds(t, b.b, img)
		b.must(t, exitOK, "rollback")
		if _, errs = b.must(t, exitFailed, "install", cut); !strings.Contains(errs, "EOF") {
			t.Errorf("%s: got %q, want the end to be missed", comp, errs)
		}
	}
}

// Bytes of the payload that change after the header was verified.
func TestPayloadDiffersFromManifest(t *testing.T) {
	b := newImageBoard(t)
	path := b.pack(t, "release-2", testBlocks(300000))
	art, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	art[len(art)/2] ^= 1
	writeFile(t, path, string(art))
	_, errs := b.must(t, exitFailed, "install", path)
	if !strings.Contains(errs, "checksum") && !strings.Contains(errs, "SHA-256") {
		t.Errorf("got %q", errs)
	}
	got, _ := os.ReadFile(b.b)
	if len(bytes.Trim(got[:headSize], "\x00")) > 0 {
		t.Error("the slot looks bootable")
	}
	if v := b.env(t); v[varUpgrade] != "0" {
		t.Error("it was switched to")
	}
}
