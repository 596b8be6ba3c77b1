// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
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
	if errors.Is(fault, fs.ErrNotExist) {
		fault = nil
	}
	if fault != nil && (isTemporary(fault) || mayPass(fault)) {
		return false, tryLater("the store of Mender's client: %w", fault)
	}
	was, own := a.rec.Mender, !a.guessedName()
	known := s == nil || was != nil && was.Txn == s.txn && was.Sum == s.sum || was == nil && own
	pid, runs, err := menderRuns(d)
	if err != nil {
		return false, refuseUnlessPassing(err, "whether Mender's client runs: %w", err)
	}
	if runs {
		err := withHint(tryLater("Mender's client is running: process %d has its store in %q open", pid, d.path),
			"stop it and keep it from starting again: a device has one update client")
		if !known {
			return false, err
		}
		a.lg.warnf("%v", err)
	}
	if fault != nil && !own {
		a.lg.warnf("the store of Mender's client is not taken over: %v", fault)
	}
	if !known {
		if changed, err = inheritStore(a, d, s, own); changed || err != nil {
			return changed, err
		}
	}
	if a.guessedName() && a.rec.Mender == nil {
		return inheritBroken(a, d), nil
	}
	return false, nil
}

// inheritStore takes over a store that the journal does not know yet. own: the journal has a name that
// mendlet's own updates gave the device.
func inheritStore(a *app, d *dir, s *menderStore, own bool) (changed bool, err error) {
	was, name := a.rec.Mender, string(s.values["artifact-name"])
	if was != nil && a.rec.Provides["artifact_name"] == was.Name {
		own = false
	}
	u, state, uerr := s.pending()
	if uerr != nil {
		a.lg.warnf("the update of Mender's client is not taken over: %v", uerr)
	}
	left := &inheritance{File: s.file, Txn: s.txn, Sum: s.sum, Time: s.time, Name: name}
	switch {
	case u == nil && own:
		kept := *was
		kept.Txn, kept.Sum, kept.Time, kept.Ignored = s.txn, s.sum, s.time, name
		a.rec.Mender = &kept
		if a.j != nil {
			a.lg.warnf("Mender's client has written its store since mendlet took that over. Its artifact is %q, and %q stays "+
				"here; move the journal %q aside to take over what the store says", name, a.rec.Provides["artifact_name"], d.in(journalName))
		}
		return true, nil
	case u == nil && (name == "" || name == unknownName):
		return false, nil
	}
	rec := *a.rec
	rec.Mender = left
	if rec.Provides, err = s.provides(); err != nil {
		a.lg.warnf("the store of Mender's client is not taken over: %v", err)
		return false, nil
	}
	if name == "" {
		left.Name = a.nameFromInfo()
		rec.Provides["artifact_name"] = left.Name
	}
	if u != nil {
		left.Update = fmt.Sprintf("to %q, which was in %s", u.Artifact, state)
		if err := adopt(a, d, u, &rec, state); err != nil {
			return false, err
		}
	}
	if text, err := json.Marshal(rec); err != nil || len(text) > journalMax-4*maxCause {
		a.lg.warnf("the store of Mender's client is not taken over: %d bytes are more than the journal holds", len(text))
		return false, nil
	}
	*a.rec = rec
	if a.j == nil {
		return true, nil
	}
	if s.older != nil {
		a.lg.warnf("the store of Mender's client is damaged, and what it was before its last change counts: %v", s.older)
	}
	if s.pauses() && u != nil {
		a.lg.warnf("the server wants a pause in this deployment (update control map), which mendlet does not make")
	}
	a.lg.infof("%s", left)
	return true, nil
}

// inheritBroken takes names from a store that Mender's client has put aside, for want of better ones.
func inheritBroken(a *app, d *dir) bool {
	s, err := readMenderStore(d, menderStoreBroken)
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	var provides map[string]string
	if err == nil {
		provides, err = s.provides()
	}
	name := provides["artifact_name"]
	if err != nil || name == "" || name == unknownName {
		a.lg.warnf("Mender's client has put its store aside as %q, which says nothing that can be used: %v", d.in(menderStoreBroken), err)
		return false
	}
	a.rec.Provides = provides
	a.rec.Mender = &inheritance{File: s.file, Txn: s.txn, Sum: s.sum, Time: s.time, Name: name}
	if a.j != nil {
		a.lg.warnf("%s; that client could not open it any more", a.rec.Mender)
	}
	return true
}

// provides are what is installed by the store's account.
func (s *menderStore) provides() (map[string]string, error) {
	p := map[string]string{}
	if text := s.values["artifact-provides"]; text != nil {
		if err := json.Unmarshal(text, &p); err != nil {
			return nil, refuse("artifact-provides: %w", err)
		}
		if p == nil { // of null
			p = map[string]string{}
		}
	}
	for key, to := range map[string]string{"artifact-name": "artifact_name", "artifact-group": "artifact_group"} {
		delete(p, to)
		if v := s.values[key]; len(v) > 0 {
			p[to] = string(v)
		}
	}
	return p, nil
}

// pauses tells whether an update control map asks for a pause.
func (s *menderStore) pauses() bool {
	var maps struct {
		Active []struct {
			States map[string]struct{ Action string }
		}
	}
	json.Unmarshal(s.values["update-control-maps"], &maps) // only for a warning
	for _, m := range maps.Active {
		for _, state := range m.States {
			if state.Action == "pause" {
				return true
			}
		}
	}
	return false
}

// menderStandalone is the value of standalone-state: version 1 up to 3.x, which has no InState and always
// waits for the commit, and version 2.
type menderStandalone struct {
	Version                     int
	ArtifactName, ArtifactGroup string
	ArtifactTypeInfoProvides    map[string]string
	ArtifactClearsProvides      []string
	PayloadTypes                []string
	InState                     string
	Failed, RolledBack          bool
}

// menderState is the value of state and state-uncommitted.
type menderState struct {
	Version    int
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
func (s *menderStore) pending() (u *update, state string, err error) {
	switch {
	case s.values["state"] != nil || s.values["state-uncommitted"] != nil:
		return s.deployment()
	case s.values["standalone-state"] != nil:
		return s.standalone()
	}
	return nil, "", nil
}

// menderWaits are the states in which a standalone update of Mender's client may be; its names are the
// journal's.
var menderWaits = map[step]bool{stepInstallWait: true, stepInstall: true, stepCommitWait: true, stepCommit: true,
	stepCommitLeaveWait: true, stepCommitLeave: true, stepRollback: true, stepFailure: true, stepCleanup: true}

func (s *menderStore) standalone() (*update, string, error) {
	var m menderStandalone
	if err := json.Unmarshal(s.values["standalone-state"], &m); err != nil {
		return nil, "", fmt.Errorf("standalone-state: %w", err)
	}
	if m.Version == 1 {
		m.InState = string(stepCommitWait)
	}
	u := &update{Step: step(m.InState), Artifact: m.ArtifactName, Group: m.ArtifactGroup, Provides: m.ArtifactTypeInfoProvides,
		Clears: m.ArtifactClearsProvides}
	if m.Version < 1 || m.Version > 2 || !menderWaits[u.Step] || len(m.PayloadTypes) != 1 || u.Artifact == "" {
		return nil, "", fmt.Errorf("standalone-state: version %d, state %q, artifact %q, %d payloads: not understood", m.Version, m.InState,
			u.Artifact, len(m.PayloadTypes))
	}
	u.Type = m.PayloadTypes[0]
	switch {
	case m.RolledBack || u.Step == stepRollback:
		u.Outcome = outcomeRolledBack
	case m.Failed || u.Step == stepFailure:
		u.Outcome = outcomeInconsistent
	}
	u.Known = u.Outcome.bad() && !m.Failed // it is cleared once it has been an exit code
	return u, m.InState, nil
}

// menderSteps are the steps that the states of Mender's daemon stand for. In one that is not here the update
// is on its way back, as with that daemon.
var menderSteps = map[string]step{
	"update-store":                          stepDownload,
	"update-install":                        stepInstall,
	"reboot":                                stepReboot,
	"after-reboot":                          stepVerifyReboot,
	"update-pre-commit-status-report-retry": stepCommitWait,
	"update-commit":                         stepCommit,
	"update-after-first-commit":             stepCommitLeave,
	"update-after-commit":                   stepCommitLeave,
	"rollback":                              stepRollback,
	"rollback-reboot":                       stepRollbackReboot,
	"verify-rollback-reboot":                stepVerifyRollbackReboot,
	"after-rollback-reboot":                 stepVerifyRollbackReboot,
	"update-error":                          stepFailure,
	"cleanup":                               stepCleanup,
	"update-retry-report":                   stepReport,
	"status-report-error":                   stepReport,
}

// menderPause begins the names of states in which the daemon waits for leave to go on (update control map).
const menderPause = "mender-update-control"

// deployment reads the state of the daemon. While it was changing the form of what it stores, the new form is
// in state-uncommitted.
func (s *menderStore) deployment() (*update, string, error) {
	var m, next menderState
	err := json.Unmarshal(s.values["state"], &m)
	nerr := json.Unmarshal(s.values["state-uncommitted"], &next)
	if nerr == nil && (err != nil || m.Version != 2 && (m.Version > 2 || m.UpdateInfo.ID == next.UpdateInfo.ID)) {
		m, err = next, nil
	}
	i := m.UpdateInfo
	types := i.Artifact.PayloadTypes
	if m.Version < 2 {
		types, i.RebootRequested, i.SupportsRollback = []string{rootfsImage}, nil, "rollback-supported"
	}
	at, ok := menderSteps[m.Name]
	if strings.HasPrefix(m.Name, menderPause) && len(types) == 1 && types[0] == rootfsImage {
		at, ok = stepReboot, true // or another: see adoptSlots
	}
	switch {
	case err != nil:
		return nil, "", fmt.Errorf("state: %w", err)
	case m.Name == "idle" || m.Name == "init":
		return nil, "", nil
	case m.Version < 0 || m.Version > 2 || i.ID == "" || len(types) > 1 || len(types) == 0 && at != stepDownload && at != stepCleanup:
		return nil, "", fmt.Errorf("state: version %d, %q of deployment %q, %d payloads: not understood", m.Version, m.Name, i.ID, len(types))
	}
	u := &update{Step: at, Managed: true, ID: i.ID, Artifact: i.Artifact.Name, Group: i.Artifact.Group,
		Provides: i.Artifact.Provides, Clears: i.Artifact.Clears}
	if len(types) == 1 {
		u.Type = types[0]
	}
	if len(i.RebootRequested) == 1 {
		u.Reboot = map[string]string{"": "No", "reboot-type-automatic": "Automatic"}[i.RebootRequested[0]]
	}
	if u.Reboot = cmp.Or(u.Reboot, "Yes"); u.Type == rootfsImage {
		u.Reboot = "Automatic"
	}
	back := i.SupportsRollback == "rollback-supported"
	if ok := i.AllRollbacksSuccessful; ok != nil {
		back = *ok
	}
	switch {
	case !ok:
		u.Step = step("Mender's " + m.Name)
	case at == stepFailure && !back:
		u.Outcome = outcomeInconsistent
	case at == stepFailure, at == stepRollback, at == stepRollbackReboot, at == stepVerifyRollbackReboot:
		u.Outcome = outcomeRolledBack
	}
	return u, m.Name, nil
}

// adopt puts the update into the record, which has the names of before it, in the step that it goes on from.
func adopt(a *app, d *dir, u *update, rec *record, state string) (err error) {
	if scripts, err := d.sub("scripts"); err == nil {
		names, _ := scripts.names()
		u.Scripts = len(names) > 1 // one is the version
		scripts.Close()
	}
	rec.Update = u
	if u.Outcome.bad() {
		u.Cause = fmt.Sprintf("failed under Mender's client, which left it in %s", state)
	}
	if u.Managed && (u.Step == stepCleanup || u.Step == stepReport) {
		owed(u, rec, state)
		return nil
	}
	if u.Type == rootfsImage && u.Step != stepDownload && u.Step != stepCleanup {
		if err := adoptSlots(a, u, state); err != nil {
			return err
		}
	}
	if u.Step == stepDownload {
		u.Parked, u.Type, u.Provides, u.Clears = true, "", nil, nil // from its start
		u.Request, err = a.nextBody(rec.Provides)
	}
	return err
}

// owed is for a deployment that has ended, but for the report: the names say how.
func owed(u *update, rec *record, state string) {
	name := rec.Provides["artifact_name"]
	v := &verdict{Artifact: u.Artifact, ID: u.ID, Result: "committed", Time: rec.Mender.Time}
	switch {
	case u.Artifact == "":
		u.Outcome = outcomeFailed
	case name == strings.TrimSuffix(u.Artifact, "_INCONSISTENT")+"_INCONSISTENT":
		u.Outcome = outcomeInconsistent
	case name != u.Artifact:
		u.Outcome = outcomeRolledBack
	}
	if u.Outcome.bad() {
		u.Cause = fmt.Sprintf("failed under Mender's client, which left it in %s", state)
		v.Result, v.Cause = string(u.Outcome), u.Cause
	}
	rec.Last = v
}

// adoptSlots finds the two slots of an image that Mender's client has installed, by what its bootloader is
// told, and whether the machine has been down since.
func adoptSlots(a *app, u *update, state string) error {
	_, vars, s, err := newRootfs(a, u).survey(context.Background())
	if err == nil && s.byNum(vars[varBootPart]) == nil {
		err = s.agree(vars)
	}
	if err != nil {
		return withHint(refuseUnlessPassing(err, "the update of Mender's client to %q is not taken over: %w", u.Artifact, err), "%s", hintOf(err))
	}
	trial := vars[varUpgrade] != "" && vars[varUpgrade] != "0"
	to := s.byNum(vars[varBootPart])
	kept := u.Step == stepCommitLeave || u.Step == stepCommitLeaveWait || u.Step == stepCommit && a.nameFromInfo() == u.Artifact
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
