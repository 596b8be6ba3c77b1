// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// What Mender's client left, put into the journal's terms: names, provides, and the update that it was in.
// The keys and values are those of mender's datastore package (3.x) and of src/mender-update/context (4 on).

// inheritMender puts what the store of Mender's client says into the record, unless that has names of its own
// or an update in progress. It saves nothing, and says what it does only where the caller can save. Exit code
// 75: that client runs, or something else stands in the way that may pass.
func inheritMender(a *app, d *dir) (changed bool, err error) {
	if a.rec.Update != nil {
		return false, nil
	}
	s, fault := readMenderStore(d, menderStoreFile)
	if fault != nil && (isTemporary(fault) || mayPass(fault)) {
		return false, tryLater("the store of Mender's client: %w", fault)
	}
	if errors.Is(fault, fs.ErrNotExist) {
		fault = nil
	}
	was, guessed := a.rec.Mender, a.guessedName()
	known := s == nil || was != nil && was.Txn == s.txn && was.Sum == s.sum || was == nil && !guessed
	if runs := menderRuns(d); runs != nil {
		if !known {
			return false, runs
		}
		a.lg.warnf("%v", runs)
	}
	if recovery && guessed && s != nil && s.values["state"] != nil { // what ends a deployment is to find it there
		a.rec.Provides, err = s.provides()
		return false, err
	}
	if !known {
		if s.older != nil {
			a.lg.warnf("what %q was before its last change counts: %v", s.file, s.older)
		}
		if changed, err = inheritStore(a, d, s, guessed); changed || err != nil && exitCode(err) != exitFailed {
			return changed, err
		}
		fault = err
	}
	if guessed && was == nil && !changed { // then any name is better
		if s, err := readMenderStore(d, menderStoreBroken); !errors.Is(err, fs.ErrNotExist) {
			if err == nil {
				changed, err = inheritNames(a, s)
			}
			fault = errors.Join(fault, err)
		}
	}
	if fault != nil && guessed {
		a.lg.warnf("not taken over from Mender's client: %v", fault)
	}
	return changed, nil
}

// inheritNames takes over what is installed by the store's account, if it has one.
func inheritNames(a *app, s *menderStore) (bool, error) {
	p, err := s.provides()
	name := p["artifact_name"]
	if err != nil || name == "" || name == unknownName {
		return false, err
	}
	a.rec.Provides = p
	a.rec.Mender = &inheritance{File: s.file, Txn: s.txn, Sum: s.sum, Time: s.time, Name: name}
	a.sayInherited()
	return true, nil
}

// inheritStore takes over a store that the journal does not know yet, whose own names may be guesses. Exit
// code 1: it is not understood.
func inheritStore(a *app, d *dir, s *menderStore, guessed bool) (changed bool, err error) {
	was, name := a.rec.Mender, string(s.values["artifact-name"])
	u, state, err := s.pending()
	if u == nil && !guessed && a.rec.Provides["artifact_name"] != was.Name { // mendlet's own updates have been here
		kept := *was
		kept.Txn, kept.Sum, kept.Time, kept.Ignored = s.txn, s.sum, s.time, cmp.Or(name, unknownName)
		a.rec.Mender = &kept
		a.sayInherited()
		return true, nil
	}
	if err != nil {
		a.lg.warnf("the update of Mender's client is not taken over: %v", err)
	}
	if u == nil {
		return inheritNames(a, s)
	}
	rec := *a.rec
	if rec.Provides, err = s.provides(); err != nil {
		return false, err
	}
	if name == "" { // its clients up to 3.x fall back like this, too
		if name = a.nameFromInfo(); name == u.Artifact { // that is what runs on trial
			name = unknownName
		}
		rec.Provides["artifact_name"] = name
	}
	rec.Mender = &inheritance{File: s.file, Txn: s.txn, Sum: s.sum, Time: s.time, Name: name,
		Update: fmt.Sprintf("to %q, which was in %s", u.Artifact, state)}
	if err := adopt(a, d, u, &rec, state); err != nil {
		return false, err
	}
	if text, err := json.Marshal(rec); err != nil || len(text) > journalMax-4*maxCause {
		return false, fmt.Errorf("%d bytes are more than the journal holds", len(text))
	}
	*a.rec = rec
	if s.pauses() {
		a.lg.warnf("the server wants a pause in this deployment (update control map), which mendlet does not make")
	}
	a.sayInherited()
	return true, nil
}

// sayInherited says it where it is about to be journaled.
func (a *app) sayInherited() {
	switch {
	case a.j == nil:
	case a.rec.Mender.Ignored != "":
		a.lg.warnf("%s", a.rec.Mender)
	default:
		a.lg.infof("%s", a.rec.Mender)
	}
}

// provides are what is installed by the store's account.
func (s *menderStore) provides() (map[string]string, error) {
	p := map[string]string{}
	if text := s.values["artifact-provides"]; len(text) > 0 {
		if err := json.Unmarshal(text, &p); err != nil {
			return nil, fmt.Errorf("artifact-provides: %w", err)
		}
	}
	// Of null, too, comes a map; it has neither of these.
	m := mergeProvides(p, &artifact{Name: string(s.values["artifact-name"]), Group: string(s.values["artifact-group"]),
		Clears: []string{"artifact_group"}})
	return m, nil
}

// pauses tells whether an update control map asks for a pause.
func (s *menderStore) pauses() bool {
	return bytes.Contains(s.values["update-control-maps"], []byte(`"action":"pause"`))
}

// menderPending is the value of standalone-state (version 1 up to 3.x, which has no InState and always waits
// for the commit; and 2), and of state and state-uncommitted, which have Name and UpdateInfo.
type menderPending struct {
	Version                     int
	ArtifactName, ArtifactGroup string
	ArtifactTypeInfoProvides    map[string]string
	ArtifactClearsProvides      []string
	PayloadTypes                []string
	InState                     string
	Failed, RolledBack          bool

	Name       string
	UpdateInfo struct {
		Artifact struct {
			PayloadTypes []string
			Name         string            `json:"artifact_name"`
			Group        string            `json:"artifact_group"`
			Provides     map[string]string `json:"artifact_provides"`
			Clears       []string          `json:"clears_artifact_provides"`
		}
		ID                     string
		RebootRequested        []string
		SupportsRollback       string
		AllRollbacksSuccessful *bool
	}
}

// pending is the update that the client is in, and the client's name of its state; nil: in none.
func (s *menderStore) pending() (*update, string, error) {
	for _, key := range []string{"state", "standalone-state"} {
		text := s.values[key]
		if text == nil {
			continue
		}
		m, next := &menderPending{}, &menderPending{}
		err := json.Unmarshal(text, m)
		// While the daemon changes the form of what it stores, the new form is here.
		nerr := json.Unmarshal(s.values["state-uncommitted"], next)
		if nerr == nil && m.Version != 2 && (m.Version > 2 || m.UpdateInfo.ID == next.UpdateInfo.ID) {
			m = next
		}
		if err != nil || m.Version > 2 {
			return nil, "", fmt.Errorf("%s of version %d is not understood: %v", key, m.Version, err)
		}
		u := m.standalone()
		if !recovery && key == "state" {
			u = m.deployment()
		}
		if m.Name == "idle" || m.Name == "init" {
			return nil, "", nil
		}
		if early := u.Step == stepDownload || u.Step == stepCleanup; !early && (u.Artifact == "" || u.Type == "") ||
			u.Managed == (u.ID == "") {
			return nil, "", fmt.Errorf("%s %.50q is not understood", key, m.Name+m.InState)
		}
		return u, m.Name + m.InState, nil
	}
	return nil, "", nil
}

// only is the one payload's type or answer; "" if there is another number of them.
func only(list []string) string {
	if len(list) != 1 {
		return ""
	}
	return list[0]
}

// standalone: the states of a standalone update have the names of the journal's steps.
func (m *menderPending) standalone() *update {
	if m.Version == 1 {
		m.InState = string(stepCommitWait)
	}
	u := &update{Step: step(m.InState), Artifact: m.ArtifactName, Group: m.ArtifactGroup, Type: only(m.PayloadTypes),
		Provides: m.ArtifactTypeInfoProvides, Clears: m.ArtifactClearsProvides}
	switch {
	case !slices.Contains(stopPoints, step(strings.TrimPrefix(string(u.Step), "Before_"))):
		u.Type = "" // not understood
	case m.RolledBack || u.Step == stepRollback:
		u.Outcome = outcomeRolledBack
	case m.Failed || u.Step == stepFailure:
		u.Outcome = outcomeInconsistent
	}
	u.Known = u.Outcome.bad() && !m.Failed // it is cleared once it has been an exit code
	return u
}

// menderSteps are the steps that the states of Mender's daemon stand for, each behind a blank. In one that is
// not here the update is on its way back, as with that daemon.
const menderSteps = " update-store=" + string(stepDownload) + " update-install=" + string(stepInstall) +
	" reboot=" + string(stepReboot) + " after-reboot=" + string(stepVerifyReboot) +
	" update-pre-commit-status-report-retry=" + string(stepCommitWait) + " update-commit=" + string(stepCommit) +
	" update-after-first-commit=" + string(stepCommitLeave) + " update-after-commit=" + string(stepCommitLeave) +
	" rollback=" + string(stepRollback) + " rollback-reboot=" + string(stepRollbackReboot) +
	" verify-rollback-reboot=" + string(stepVerifyRollbackReboot) +
	" after-rollback-reboot=" + string(stepVerifyRollbackReboot) + " update-error=" + string(stepFailure) +
	" cleanup=" + string(stepCleanup) + " update-retry-report=" + string(stepReport) + " " +
	"status-report-error=" + string(stepReport) + " "

// menderPause begins the names of states in which the daemon waits for leave to go on (update control map).
const menderPause = "mender-update-control"

func (m *menderPending) deployment() *update {
	i := &m.UpdateInfo
	if m.Version < 2 { // which had images only
		i.Artifact.PayloadTypes, i.SupportsRollback = []string{rootfsImage}, menderSupported
	}
	u := &update{Managed: true, ID: i.ID, Artifact: i.Artifact.Name, Group: i.Artifact.Group,
		Type:     only(i.Artifact.PayloadTypes),
		Provides: i.Artifact.Provides, Clears: i.Artifact.Clears, Reboot: "Yes"}
	_, rest, ok := strings.Cut(menderSteps, " "+m.Name+"=")
	at := before(rest, " ")
	switch u.Step = step(at); {
	case !ok && strings.HasPrefix(m.Name, menderPause) && u.Type == rootfsImage:
		u.Step = stepReboot // or another: see adoptSlots
	case !ok:
		u.Step = step("Mender's " + m.Name)
	}
	switch requested := only(i.RebootRequested); {
	case u.Type == rootfsImage, strings.HasSuffix(requested, "-automatic"):
		u.Reboot = "Automatic"
	case requested == "":
		u.Reboot = "No"
	}
	back := i.SupportsRollback == menderSupported
	if i.AllRollbacksSuccessful != nil {
		back = *i.AllRollbacksSuccessful
	}
	switch {
	case u.Step == stepFailure && !back:
		u.Outcome = outcomeInconsistent
	case u.Step == stepFailure, u.Step == stepRollback, u.Step == stepRollbackReboot, u.Step == stepVerifyRollbackReboot:
		u.Outcome = outcomeRolledBack
	}
	return u
}

const menderSupported = "rollback-supported"

// adopt puts the update into the record, which has the names of before it, in the step that it goes on from.
func adopt(a *app, d *dir, u *update, rec *record, state string) (err error) {
	if scripts, err := d.sub("scripts"); err == nil {
		names, _ := scripts.names()
		u.Scripts = len(names) > 1 // one is the version
		scripts.Close()
	}
	rec.Update = u
	told := !recovery && u.Managed && (u.Step == stepCleanup || u.Step == stepReport)
	if told { // it has ended, but for the report: the names say how
		switch rec.Provides["artifact_name"] {
		case u.Artifact:
		case strings.TrimSuffix(u.Artifact, inconsistent) + inconsistent:
			u.Outcome = outcomeInconsistent
		default:
			u.Outcome = outcomeRolledBack
		}
	}
	if u.Outcome.bad() {
		u.Cause = fmt.Sprintf("failed under Mender's client, which left it in %s", state)
	}
	switch {
	case told:
		rec.Last = &verdict{Artifact: u.Artifact, ID: u.ID, Result: string(u.Outcome), Cause: u.Cause, Time: rec.Mender.Time}
		if !u.Outcome.bad() {
			rec.Last.Result = "committed"
		}
		return nil
	case u.Type == rootfsImage && u.Step != stepDownload && u.Step != stepCleanup:
		if err := adoptSlots(a, u, state); err != nil {
			return err
		}
	case u.Type != rootfsImage && !u.Managed: // of a deployment the server hears it
		if _, err := a.newHandler(u.Type, u); err != nil { // it may have gone along with that client
			return notAdopted(err, u)
		}
	}
	if !recovery && u.Step == stepDownload {
		if u.Provides, u.Clears = nil, nil; u.Type != rootfsImage { // as if it had not been opened: the module begins anew
			u.Parked, u.Type = true, ""
		}
		u.Request, err = a.nextBody(rec.Provides)
	}
	return err
}

const inconsistent = "_INCONSISTENT"

func notAdopted(err error, u *update) error {
	return withHint(refuseUnlessPassing(err, "the update of Mender's client to %q is not taken over: %w", u.Artifact, err),
		"%s", hintOf(err))
}

// adoptSlots finds the two slots of an image that Mender's client has installed, by what its bootloader is
// told, and whether the machine has been down since.
func adoptSlots(a *app, u *update, state string) error {
	_, vars, s, err := newRootfs(a, u).survey(context.Background())
	if err == nil && s.byNum(vars[varBootPart]) == nil {
		err = s.agree(vars)
	}
	if err != nil {
		return notAdopted(err, u)
	}
	trial := vars[varUpgrade] != "" && vars[varUpgrade] != "0"
	to := s.byNum(vars[varBootPart])
	kept := u.Step == stepCommitLeave || u.Step == stepCommitLeaveWait || u.Step == stepCommit &&
		a.nameFromInfo() == u.Artifact
	if !trial && !kept { // not switched over yet, or gone back
		to = s.other(to)
	}
	u.From, u.To = s.other(to).num, to.num
	switch {
	case u.Step == stepReboot && trial && !s.mayRun(u.To), u.Step == stepRollbackReboot && !s.mayRun(u.From):
		u.BootID = a.m.bootID() // the reboot has not come yet
	case !trial && u.Managed && !u.Scripts && (u.Step == stepInstall || strings.HasPrefix(state, menderPause)):
		u.Step = stepDownload // which finds out whether the image is whole
	}
	return nil
}
