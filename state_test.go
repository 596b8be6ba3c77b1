// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The chains of calls that Mender's client 5.x is held to by its own tests
// (tests/src/mender-update/daemon/state_test.cpp), here for the real flow, with a real
// update module, real state scripts and a journal in a file.

// chain is a row of the table of spec-conforming call chains.
type chain struct {
	name, how, calls, says string
	stored                 string // artifact_name afterwards; INC: the new one, _INCONSISTENT
	result                 string // verdict in the journal; empty: the usual one for stored
}

// Where a row differs from what Mender does the comment says so.
var chains = []chain{
	{"normal", "", "<INST> R.E R VR R.L C.E C C.L CL", "dir iS", "new", ""},
	{"no reboot", "answer NR No", "<INST> C.E C C.L CL", "diiS", "new", ""},
	{"no answer means no reboot", "answer NR", "<INST> C.E C C.L CL", "diiS", "new", ""},
	// What may succeed later is no failure: the update waits in that step, for long, and then turns back.
	{"busy in I", "busy I", "<DL> I.E I.E I I.L R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"busy in VR", "busy VR xx", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"busy in C", "busy C", "<INST> R.E R VR R.L C.E C.E C C.L CL", "diriS", "new", ""},
	{"busy in C for long", "busy C xxxxxxxxxxxxxxxxxxxxxxxxxxx",
		"<INST> R.E R VR R.L " + strings.Repeat("C.E ", 28) + "C C.L CL", "diriS", "new", ""},
	{"busy in C for too long", "busy C xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
		"<INST> R.E R VR R.L " + strings.Repeat("C.E ", 28) + "C.X <RBK>", "diriF", "old", ""},
	{"busy in RB for long", "fail C; busy RB xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
		"<INST> R.E R VR R.L C.E C C.X " + strings.Repeat("RB.E ", 37) + "<RBK>", "diriF", "old", ""},
	{"busy in RB", "fail C; busy RB", "<INST> R.E R VR R.L C.E C C.X RB.E " + "<RBK>", "diriF", "old", ""},
	{"busy in VRR", "fail C; busy VRR xx", "<INST> R.E R VR R.L C.E C C.X <RBK>", "diriF", "old", ""},
	{"no rollback", "answer SR No", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"sizes", "answer PPFS Yes", "D.E PPFS DownloadWithFileSizes D.L I.E I I.L R.E R VR R.L C.E C C.L CL",
		"diriS", "new", ""},
	{"empty payload", "artifact empty", "D.E D.L", "dS", "new", ""},

	{"error in D.E", "fail D.E", "D.E D.X", "dF", "old", "failed"},
	{"fetch failure", "unheard fetch", "D.E D.X", "dF", "old", "failed"},
	// A new try costs traffic only; Mender would fail.
	{"fetch fails for a while", "later fetch; later fetch", "D.E D.E <INST> R.E R VR R.L C.E C C.L CL",
		"dddiriS", "new", ""},
	{"device type mismatch", "device other", "D.E D.X", "dF", "old", "failed"},
	{"no such module", "remove share/modules/v3/actor", "D.E D.X", "dF", "old", "failed"},
	// No Cleanup: what kind of payload it would have been is not known yet.
	{"killed in D.E", "die D.E", "D.E", "dF", "old", "failed"},
	{"error in D", "fail D", "D.E PPFS D D.X CL", "dF", "old", "failed"},
	{"error in PPFS", "fail PPFS", "D.E PPFS D.X CL", "dF", "old", "failed"},
	{"hang in D", "hang D", "D.E PPFS D D.X CL", "dF", "old", "failed"},
	{"killed in D", "die D", "D.E PPFS D CL", "dF", "old", "failed"},
	{"killed in D.L", "die D.L", "<DL> CL", "dF", "old", "failed"},
	{"error in D.L", "fail D.L", "<DL> D.X CL", "dF", "old", "failed"},

	{"error in I", "fail I", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"error in I, no rollback", "fail I; answer SR No", "<DL> I.E I I.X F.E F F.L CL", "diF", "INC", ""},
	{"killed in I, no rollback", "die I; answer SR No", "<DL> I.E I F.E F F.L CL", "diF", "INC", ""},
	{"error in I.E", "fail I.E", "<DL> I.E I.X <RBK>", "diF", "old", ""},
	{"error in I.L", "fail I.L", "<DL> I.E I I.L I.X <RBK>", "diF", "old", ""},
	{"error in I.X", "fail I; fail I.X", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"killed in I", "die I", "<DL> I.E I <RBK>", "diF", "old", ""},
	{"killed in I.E", "die I.E", "<DL> I.E <RBK>", "diF", "old", ""},
	{"killed in I.L", "die I.L", "<DL> I.E I I.L <RBK>", "diF", "old", ""},
	{"killed in I.X", "fail I; die I.X", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"error in I, no reboot", "fail I; answer NR No", "<DL> I.E I I.X RB.E RB RB.L F.E F F.L CL", "diF", "old", ""},
	{"error in NeedsArtifactReboot", "fail NR", "<INST> RB.E RB RB.L F.E F F.L CL", "diF", "INC", ""},
	{"bad answer to NeedsArtifactReboot", "answer NR Perhaps", "<INST> RB.E RB RB.L F.E F F.L CL", "diF", "INC", ""},
	{"error in SupportsRollback", "fail I; fail SR", "<DL> I.E I I.X F.E F F.L CL", "diF", "INC", ""},

	{"error in R", "fail R", "<INST> R.E R R.X <RBK>", "dirF", "old", ""},
	{"error in R.E", "fail R.E", "<INST> R.E R.X <RBK>", "dirF", "old", ""},
	{"killed in R", "die R", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"killed in R.E", "die R.E", "<INST> R.E VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"error in VR", "fail VR", "<INST> R.E R VR R.X <RBK>", "dirF", "old", ""},
	{"error in R.L", "fail R.L", "<INST> R.E R VR R.L R.X <RBK>", "dirF", "old", ""},
	{"killed in VR", "die VR", "<INST> R.E R VR <RBK>", "dirF", "old", ""},
	{"killed in R.L", "die R.L", "<INST> R.E R VR R.L <RBK>", "dirF", "old", ""},
	// As with Mender, but the reboot is the system's own.
	{"automatic reboot", "answer NR Automatic", "<INST> R.E reboot VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"automatic reboot fails", "answer NR Automatic; unheard reboot",
		"<INST> R.E reboot R.X RB.E RB RB.L RR.E reboot VRR RR.L F.E F F.L CL", "dirF", "old", ""},
	{"error in VR, automatic reboot", "fail VR; answer NR Automatic",
		"<INST> R.E reboot VR R.X RB.E RB RB.L RR.E reboot VRR RR.L F.E F F.L CL", "dirF", "old", ""},

	{"pre-commit report keeps failing", "ok installing; unheard installing", "<INST> R.E R VR R.L <RBK>",
		"dirF", "old", ""},
	{"pre-commit report fails for a while", "ok installing; later installing; later installing",
		"<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"login before the commit keeps failing", "unheard login", "<INST> R.E R VR R.L <RBK>", "dirF", "old", ""},
	{"login before the commit fails for a while", "later login", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"other reports keep failing", "unheard downloading; unheard rebooting", "<INST> R.E R VR R.L C.E C C.L CL",
		"iiS", "new", ""},
	{"final report fails for a while", "later finish; later finish", "<INST> R.E R VR R.L C.E C C.L CL",
		"diriS", "new", ""},

	{"error in C", "fail C", "<INST> R.E R VR R.L C.E C C.X <RBK>", "diriF", "old", ""},
	{"error in C.E", "fail C.E", "<INST> R.E R VR R.L C.E C.X <RBK>", "diriF", "old", ""},
	{"error in C, no reboot", "fail C; answer NR No", "<INST> C.E C C.X RB.E RB RB.L F.E F F.L CL", "diiF", "old", ""},
	{"error in C.E, no reboot", "fail C.E; answer NR No", "<INST> C.E C.X RB.E RB RB.L F.E F F.L CL", "diiF", "old", ""},
	{"killed in C", "die C", "<INST> R.E R VR R.L C.E C <RBK>", "diriF", "old", ""},
	{"killed in C.E", "die C.E", "<INST> R.E R VR R.L C.E <RBK>", "diriF", "old", ""},
	{"error in C.L", "fail C.L", "<INST> R.E R VR R.L C.E C C.L C.X CL", "diriF", "INC", ""},
	{"killed in C.L", "die C.L", "<INST> R.E R VR R.L C.E C C.L C.L CL", "diriS", "new", ""},
	{"the new root has scripts of an unknown version", "bump R", "<INST> R.E R VR R.L C.E C.X <RBK>", "diriF", "old", ""},

	{"error in RB", "fail I; fail RB", "<DL> I.E I I.X RB.E RB RB.L F.E F F.L CL", "diF", "INC", ""},
	{"error in RB.E", "fail I; fail RB.E", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in RB.L", "fail I; fail RB.L", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in RB and RB.L", "fail I; fail RB; fail RB.L", "<DL> I.E I I.X RB.E RB RB.L F.E F F.L CL", "diF", "INC", ""},
	{"killed in RB.E", "fail I; die RB.E", "<DL> I.E I I.X RB.E <RBK>", "diF", "old", ""},
	{"killed in RB", "fail I; die RB", "<DL> I.E I I.X RB.E RB <RBK>", "diF", "old", ""},
	{"killed in RB.L", "fail I; die RB.L", "<DL> I.E I I.X RB.E RB RB.L <RBK>", "diF", "old", ""},
	{"error in RB.E, then killed in RB", "fail I; once RB.E; die RB", "<DL> I.E I I.X RB.E RB <RBK>", "diF", "old", ""},
	{"error in RR.E", "fail I; fail RR.E", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in RR", "fail I; fail RR", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"killed in RR.E", "fail I; die RR.E", "<DL> I.E I I.X RB.E RB RB.L RR.E VRR RR.L F.E F F.L CL", "diF", "old", ""},
	{"killed in RR", "fail I; die RR", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"error once in VRR", "fail I; once VRR", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR VRR RR.L F.E F F.L CL",
		"diF", "old", ""},
	{"error always in VRR", "fail VR; fail VRR", "<INST> R.E R VR R.X RB.E RB RB.L RR.E" + strings.Repeat(" RR VRR", 12),
		"dirF", "INC", ""},
	{"error always in VRR, automatic reboot", "fail VR; fail VRR; answer NR Automatic",
		"<INST> R.E reboot VR R.X RB.E RB RB.L RR.E" + strings.Repeat(" reboot VRR", 12), "dirF", "INC", ""},
	{"killed in VRR", "fail I; die VRR", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR VRR RR.L F.E F F.L CL",
		"diF", "old", ""},
	{"killed in RR.L", "fail I; die RR.L", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L VRR RR.L F.E F F.L CL",
		"diF", "old", ""},
	{"error in RR.L", "fail I; fail RR.L", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L RR.X F.E F F.L CL",
		"diF", "INC", ""},

	{"error in F", "fail I; fail F", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in F.E", "fail I; fail F.E", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in F.L", "fail I; fail F.L", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"killed in F.E", "fail I; die F.E", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L F.E F.E F F.L CL",
		"diF", "old", ""},
	{"killed in F", "fail I; die F", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L F.E F F.E F F.L CL", "diF", "old", ""},
	{"killed in F.L", "fail I; die F.L", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L F.E F F.L F.E F F.L CL",
		"diF", "old", ""},
	{"endless kills in F", "fail I; endless F", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L" + strings.Repeat(" F.E F",
		24), "diF", "INC", ""},
	{"error in CL of a failed update", "fail I; fail CL", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	// The verdict is in the journal before Cleanup, and the server hears that one, as Mender's does not:
	// what is committed stays committed.
	{"error in CL of a good update", "fail CL", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"killed in CL of a failed update", "fail I; die CL", "<DL> I.E I I.X <RBK> CL", "diF", "old", ""},
	// Mender reports failure here, having forgotten that the update had succeeded.
	{"killed in CL of a good update", "die CL", "<INST> R.E R VR R.L C.E C C.L CL CL", "diriS", "new", ""},

	// Mender rolls all of these back. A handler whose work can be repeated, as rootfs-image,
	// goes on where it was cut short.
	{"resumable, killed in D", "artifact bare; resumable; die D", "D.E PPFS D <DL> I R VR C CL", "ddiriS", "new", ""},
	{"resumable, killed in I", "artifact bare; resumable; die I", "<DL> I I R VR C CL", "diriS", "new", ""},
	{"resumable, killed in VR", "artifact bare; resumable; die VR", "<DL> I R VR VR C CL", "diriS", "new", ""},
	{"resumable, killed in C", "artifact bare; resumable; die C", "<DL> I R VR C C CL", "diriS", "new", ""},
	{"resumable, endless kills in I", "artifact bare; resumable; endless I", "<DL>" + strings.Repeat(" I", maxSaves),
		"diF", "INC", ""},
	{"resumable, error in I", "artifact bare; resumable; fail I", "<DL> I RB RR VRR F CL", "diF", "old", ""},
	// Unless there are scripts: nothing is known about those.
	{"resumable with scripts, killed in I", "resumable; die I", "<DL> I.E I <RBK>", "diF", "old", ""},
	{"resumable with scripts, killed in C", "resumable; die C", "<INST> R.E R VR R.L C.E C <RBK>", "diriF", "old", ""},

	// A signal to the program tears no module or script apart and is no failure; the update
	// rests at the next place where it can go on later.
	{"told to end before D.E", "stop D.E", "<INST> R.E R VR R.L C.E C C.L CL", "ddiriS", "new", ""},
	{"told to end in I.E", "stop I.E", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"told to end in I", "stop I; answer NR No", "<INST> C.E C C.L CL", "diiS", "new", ""},
	{"told to end in VR", "stop VR", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"told to end in C", "stop C", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"told to end in C.L", "stop C.L", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"told to end in RB", "fail I; stop RB", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"told to end in F", "fail I; stop F", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"told to end in CL", "stop CL", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	// The download is a module's: what it has seen of it cannot be taken back.
	{"told to end before D", "stop D", "D.E CL", "dF", "old", "failed"},

	{"409 on downloading", "aborted downloading", "", "dF", "old", "failed"},
	{"409 on installing", "aborted installing", "<DL> CL", "diF", "old", "failed"},
	{"409 on rebooting", "aborted rebooting", "<INST> <RBK>", "dirF", "old", ""},
	{"409 before the commit", "ok installing; aborted installing", "<INST> R.E R VR R.L <RBK>", "diriF", "old", ""},
}

// An unwritable journal: no update is begun, one that has begun is rolled back, and the
// server hears of it. Where the journal can be written again the next run comes to the same
// end.
func TestChainsUnwritable(t *testing.T) {
	t.Parallel()
	artifacts := newChainArtifacts(t)
	for _, row := range []struct{ name, how, calls, says, again string }{
		{"never", "ro", "D.X", "dF", "dF"},
		{"at I.E", "ro installing", "<DL> I.X <RBK>", "diF", "F"},
		{"at R.E", "ro rebooting", "<INST> R.X <RBK>", "dirF", "F"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d := newChainDevice(t, artifacts.full)
			d.arrange(row.how)
			if err := d.live(); !errors.Is(err, syscall.EROFS) {
				t.Errorf("got error %v, want %v", err, syscall.EROFS)
			}
			if got, want := d.trace(), chainCalls(row.calls); got != want {
				t.Errorf("calls\ngot  %s\nwant %s", got, want)
			}
			if got := strings.Join(d.says, ""); got != row.says {
				t.Errorf("statuses %s, want %s", got, row.says)
			}
			d.says, d.readOnly, d.roAt = nil, false, ""
			d.arrange("fail D.E")
			if err := d.live(); err != nil {
				t.Error(err)
			}
			if got := strings.Join(d.says, ""); got != row.again {
				t.Errorf("then statuses %s, want %s", got, row.again)
			}
		})
	}
}

func TestChains(t *testing.T) {
	t.Parallel()
	artifacts := newChainArtifacts(t)
	for _, row := range chains {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			row.check(t, artifacts)
		})
	}
}

func (row chain) check(t *testing.T, artifacts chainArtifacts) {
	d := newChainDevice(t, artifacts.full)
	if how, ok := strings.CutPrefix(row.how, "artifact empty"); ok {
		d.artifact, row.how = artifacts.empty, how
	} else if how, ok := strings.CutPrefix(row.how, "artifact bare"); ok {
		d.artifact, row.how = artifacts.bare, how
	}
	d.arrange(row.how)
	if err := d.live(); err != nil {
		t.Error(err)
	}
	if got, want := d.trace(), chainCalls(row.calls); got != want {
		t.Errorf("calls\ngot  %s\nwant %s", got, want)
	}
	if got, want := strings.Join(d.says, ""), strings.ReplaceAll(row.says, " ", ""); got != want {
		t.Errorf("statuses %s, want %s", got, want)
	}
	d.checkStored(row.stored, row.result, d.f.has(eventLooped))
}

// From each step every result leads to a step that there is, and without failures to the end.
func TestNext(t *testing.T) {
	for _, m := range []mode{standaloneMode, managedMode} {
		for _, def := range stepDefs {
			s := def.step
			for r := done; r <= wait; r++ {
				to := next(s, r, m)
				if stepDefOf(to) == nil && to != stepEnd {
					t.Errorf("%v: %q with %d leads to %q", m, s, r, to)
				}
			}
			at, n := s, 0
			for ; at != stepEnd && n < len(stepDefs); n++ {
				at = next(at, done, m)
			}
			if at != stepEnd {
				t.Errorf("%v: from %q the end is not reached, but %q", m, s, at)
			}
		}
	}
}

// calm is a payload handler that does nothing, well.
type calm struct{}

func (calm) prepare(context.Context, *artifact) error      { return nil }
func (calm) download(context.Context, *artifact) error     { return nil }
func (calm) call(context.Context, string) error            { return nil }
func (calm) query(context.Context, string) (string, error) { return "Yes", nil }
func (calm) resumable() bool                               { return true }

// A journal that cannot be written does not stop the way back, but it is said, and it is what
// the verdict names where nothing else has failed.
func TestDyingJournalOnTheWayBack(t *testing.T) {
	for _, s := range []step{stepRollback, stepVerifyRollbackReboot, stepFailure, stepCleanup} {
		dir, readOnly := t.TempDir(), false
		st, err := openLocked(dirOf(t, dir))
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		j, rec, _, _, err := readJournal(lockedStorage{st, &readOnly})
		if err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		rec.Update = &update{Step: stepCommitWait, Artifact: "new", Outcome: outcomeRolledBack, Known: true}
		f := &flow{lg: newLogger(&said), j: j, rec: rec, handler: calm{},
			scripts: newScripts(defaultConfig(paths{conf: dir, ds: dir}), nil),
			bootID:  func() string { return "1" }}
		readOnly = true
		if r, p := f.run(t.Context(), s); r != done || p != nil {
			t.Errorf("%s: got result %d, %v", s, r, p)
		}
		if !strings.Contains(said.String(), "writing copy") || !strings.Contains(rec.Update.Cause, "writing copy") {
			t.Errorf("%s: said %q, cause %q", s, said.String(), rec.Update.Cause)
		}
	}
}

// The largest of all that an update may keep fits into the journal, with the longest causes.
func TestJournalHoldsAnyUpdate(t *testing.T) {
	provides := map[string]string{"artifact_name": strings.Repeat("n", 400), "artifact_group": strings.Repeat("g", 500)}
	for i := 0; ; i++ {
		provides[fmt.Sprintf("key-%02d", i)] = strings.Repeat("<", 90)
		if text, _ := json.Marshal(provides); len(text) > maxAllProvides {
			break
		}
	}
	request, err := json.Marshal(map[string]any{"device_provides": provides})
	must(t, err)
	cause := strings.Repeat("\x01", maxCause) // six bytes each
	v := verdict{Artifact: provides["artifact_name"] + "_INCONSISTENT", ID: strings.Repeat("i", 64),
		Sum:    strings.Repeat("5", 64),
		Result: "inconsistent", Cause: cause, Time: time.Now()}
	source := sourceID{Name: "https://" + strings.Repeat("s", 1000), Size: 1 << 60, Tag: strings.Repeat("t", 200)}
	rec := &record{Provides: provides, Last: &v, Time: time.Now(), Net: &netState{Untold: &v, NextTry: time.Now(),
		V1Only:        strings.Repeat("u", 200),
		InventoryHash: v.Sum, ConfigHash: v.Sum, InventoryTime: time.Now()}}
	rec.Update = &update{Step: stepVerifyRollbackReboot, Managed: true, ID: v.ID,
		Source:   source.Name,
		Artifact: v.Artifact,
		Group:    provides["artifact_group"], Sum: v.Sum, Type: strings.Repeat("t", 255), Provides: provides,
		Clears: []string{strings.Repeat("c", maxClears)}, Scripts: true, Reboot: "Automatic", BootID: strings.Repeat("b", 40),
		Cause: cause, Saves: 28, Tries: 10, Reached: 1 << 60, Request: request,
		Checkpoint: &checkpoint{Slot: strings.Repeat("d", 200),
			Source: source}}
	d := blankJournal()
	j, _ := mustRead(t, d)
	must(t, j.save(rec))
}

// What a person drives runs all scripts of the way back and behind the commit, whatever becomes of the first; a
// deployment ends a state at the first that fails. Both report it.
func TestLaterScriptsRun(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		step   step
		states []string
	}{
		{stepCommitLeave, []string{"ArtifactCommit_Leave"}},
		{stepRollback, []string{"ArtifactRollback_Enter", "ArtifactRollback_Leave"}},
		{stepFailure, []string{"ArtifactFailure_Enter", "ArtifactFailure_Leave"}},
	} {
		for _, state := range c.states {
			for _, m := range []mode{standaloneMode, managedMode} {
				s, traced := scriptRun(t)
				putScript(t, s.artifactDir, state+"_01", traceScript+"exit 3\n", 0o755)
				putScript(t, s.artifactDir, state+"_02", traceScript, 0o755)
				st, err := openLocked(dirOf(t, t.TempDir()))
				must(t, err)
				defer st.Close()
				j, rec, _, _, err := readJournal(st)
				must(t, err)
				var said strings.Builder
				rec.Update = &update{Step: stepCommitWait, Artifact: "new"}
				f := &flow{lg: newLogger(&said), j: j, rec: rec, mode: m, handler: calm{}, scripts: s,
					bootID: func() string { return "1" }}
				if _, p := f.run(t.Context(), c.step); p != nil {
					t.Fatal(p.err)
				}
				want := 2
				if m.strict {
					want = 1
				}
				if got := traced(); len(got) != want {
					t.Errorf("%s, %+v: ran %v, want %d scripts", state, m, got, want)
				}
				if !strings.Contains(said.String(), "exit status 3") {
					t.Errorf("%s, %+v: said %q", state, m, said.String())
				}
			}
		}
	}
}
