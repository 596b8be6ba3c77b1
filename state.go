// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// maxSaves bounds the steps of one update, so that nothing goes round for ever (a module
// whose VerifyRollbackReboot never succeeds, a device that loses power at each boot).
const maxSaves = 28

var errLoop = errors.New("the update went through too many steps")

// flow is one run through the steps of an update. What differs between an update that a person
// drives and one of a server is data: its mode, and hooks.
type flow struct {
	lg        *logger
	j         *journalFile
	rec       *record
	mode      mode
	handler   payloadHandler
	scripts   *scripts
	art       *artifact
	ended     *update // the update of this run, once it has left the journal
	events    []event
	rebooting bool // this boot has been asked to end already

	stopBefore []step
	newHandler func(kind string, u *update) (payloadHandler, error)
	deviceType func() (string, error)
	bootID     func() string
	fetch      func(ctx context.Context) (*artifact, error) // opens the artifact from its start

	// For an update of a server; a person's has none of these.
	reportStatus  func(ctx context.Context, status string) error
	checkServer   func(ctx context.Context) error // the new system still gets through to it
	reportVerdict func(ctx context.Context) error // final status and log
	reboot        func(ctx context.Context) error // restarts the machine
	beforeReboot  func()                          // saves the deployment log
}

// mode is what Mender's daemon and its standalone mode do differently.
type mode struct {
	reboots bool // restarts the machine by itself; else somebody does who commits afterwards
	asks    bool // an interrupted step asks whether there is a way back; else it is gone at once
	strict  bool // what fails in Leave scripts after the commit and on the way back is a failure of the update
	reports bool // has its verdict in the journal before Cleanup, and reports it
}

var (
	standaloneMode = mode{}
	managedMode    = mode{reboots: true, asks: true, strict: true, reports: true}
)

// event is something that has happened in this run, for the lines and the exit code of a verb.
type event string

const (
	eventDownloaded    event = "downloaded"
	eventInstalled     event = "installed"
	eventCommitted     event = "committed"
	eventAutoCommit    event = "committed for want of a way back"
	eventNoRollback    event = "no way back"
	eventReboot        event = "reboot wanted"
	eventFailed        event = "failed" // whatever it was
	eventLooped        event = "looped"
	eventStreaming     event = "Streaming failed"
	eventInstallation  event = "Installation failed"
	eventCommitting    event = "Committing failed"
	eventPostCommit    event = "post-commit steps failed"
	eventCleanupFailed event = "cleanup failed"
)

//go:noinline
func (f *flow) note(e event) { f.events = append(f.events, e) }

//go:noinline
func (f *flow) has(e event) bool { return slices.Contains(f.events, e) }

// pause ends a run in the middle of an update that goes on in a later run.
type pause struct {
	step step
	err  error // why, with its exit code; nil: it waits for a person
}

// result is how a step has ended, as far as it decides which one is next.
type result int

const (
	done    result = iota
	failed         // forwards: turn back; CheckRollback: there is no way back
	reboot         // done, and the machine has to be restarted
	nothing        // nothing is to be installed: an empty payload, or the server has ended it
	looped         // the update goes round in circles
	wait           // for a person
)

// next is the step that follows.
func next(s step, r result, m mode) step {
	switch {
	case r == looped && m.reports:
		return stepReport
	case r == looped:
		return stepEnd
	case r == nothing:
		return stepCleanup
	case r == failed && s == stepVerifyRollbackReboot:
		return stepRollbackReboot
	case r == failed && s == stepCheckRollback:
		return stepFailure
	case r == failed && s != stepDownload:
		return stepCheckRollback
	}
	switch s {
	case stepDownload:
		switch {
		case r == failed:
			return stepCleanup
		case m.reboots:
			return stepInstall
		}
		return stepInstallWait
	case stepInstallWait:
		return stepInstall
	case stepInstall:
		if r == reboot {
			return stepReboot
		}
		return stepCommitWait
	case stepReboot:
		return stepVerifyReboot
	case stepVerifyReboot:
		return stepCommitWait
	case stepCommitWait:
		return stepCommit
	case stepCommit, stepCommitLeaveWait:
		return stepCommitLeave
	case stepCheckRollback:
		return stepRollback
	case stepRollback:
		if r == reboot {
			return stepRollbackReboot
		}
		return stepFailure
	case stepRollbackReboot:
		return stepVerifyRollbackReboot
	case stepVerifyRollbackReboot:
		return stepFailure
	case stepCommitLeave, stepFailure:
		return stepCleanup
	case stepCleanup:
		if m.reports {
			return stepReport
		}
	case stepReport:
	default: // of a journal that this program does not know
		return stepCheckRollback
	}
	return stepEnd
}

// stepDef says what belongs to a step.
type stepDef struct {
	step    step
	run     func(*flow, context.Context) (result, error)
	status  string      // what the server is told before it begins
	journal func(*flow) // what goes into the journal together with it
	state   string      // its scripts' name; those of action Error run when it fails, and the update turns back
	network bool        // waits for the network, so the process may be told to end while it runs
}

var stepDefs = []stepDef{
	{step: stepDownload, run: (*flow).download, status: "downloading", state: "Download", network: true},
	{step: stepInstallWait, run: (*flow).pass},
	{step: stepInstall, run: (*flow).install, status: "installing", state: "ArtifactInstall"},
	{step: stepReboot, run: (*flow).rebootForward, status: "rebooting", journal: (*flow).markBoot,
		state: "ArtifactReboot"},
	{step: stepVerifyReboot, run: (*flow).verifyReboot, state: "ArtifactReboot"},
	{step: stepCommitWait, run: (*flow).beforeCommit, state: "ArtifactInstall", network: true},
	{step: stepCommit, run: (*flow).commit, state: "ArtifactCommit"},
	{step: stepCommitLeaveWait, run: (*flow).pass},
	{step: stepCommitLeave, run: (*flow).commitLeave},
	{step: stepCheckRollback, run: (*flow).checkRollback},
	{step: stepRollback, run: (*flow).rollback, journal: (*flow).turnedBack},
	{step: stepRollbackReboot, run: (*flow).rebootBack, journal: (*flow).markBoot},
	{step: stepVerifyRollbackReboot, run: (*flow).verifyRollbackReboot},
	{step: stepFailure, run: (*flow).failure},
	{step: stepCleanup, run: (*flow).cleanup, journal: (*flow).settleFirst},
	{step: stepReport, run: (*flow).report, journal: (*flow).settleFirst, network: true},
}

// stepDefOf is nil for a step that this program does not know.
func stepDefOf(s step) *stepDef {
	for i := range stepDefs {
		if stepDefs[i].step == s {
			return &stepDefs[i]
		}
	}
	return nil
}

// advance goes on with the update in the journal, from step s, until it has ended (nil) or has
// to wait.
func (f *flow) advance(ctx context.Context, s step) *pause {
	for s != stepEnd {
		if p := f.stop(ctx, s); p != nil {
			return p
		}
		r, p := f.run(ctx, s)
		if p != nil {
			return p
		}
		s = next(s, r, f.mode)
	}
	return f.finish()
}

// run does one step: the server is told, the journal gets it, and then its effects begin.
func (f *flow) run(ctx context.Context, s step) (result, *pause) {
	def := stepDefOf(s)
	if def == nil {
		f.fail(fmt.Errorf("step %q in the journal is not known", s))
		return failed, nil
	}
	if !def.network || s == stepCommitWait && f.checkServer == nil {
		// A signal to this process must not tear a module or script apart: only what
		// waits for the network can be interrupted; the rest has time-outs of its own.
		ctx = context.WithoutCancel(ctx)
	}
	first := f.rec.Update.Step != s
	if first || s == stepDownload {
		if err := f.announce(ctx, def.status); err != nil {
			if s == stepDownload || s == stepInstall {
				return f.giveUp(err), nil
			}
			f.fail(err)
			return failed, nil
		}
	}
	err := f.enter(s, def)
	switch {
	case errors.Is(err, errLoop):
		return f.abortLoop(), nil
	case err != nil && (def.state != "" || s == stepCommitLeave && first && f.mode.strict):
		return f.turnBack(ctx, s, cmp.Or(def.state, "ArtifactCommit"), err), nil
	case err != nil: // nothing stops it on its way, least of all a disk that is dying
		f.lg.errorf("%v", err)
		f.keepCause(err)
	}
	r, err := def.run(f, ctx)
	if def.network {
		err = unlessStopped(ctx, err)
	}
	switch {
	case r == wait:
		return r, &pause{step: s}
	case exitCode(err) == exitReboot:
		return r, &pause{s, err}
	case isTemporary(err) && !f.triedLongEnough(def):
		return r, f.park(s, err)
	case err != nil:
		return f.turnBack(ctx, s, def.state, err), nil
	}
	return r, nil
}

// waits are the names under which an update is saved that has not begun a step; to be in
// the step itself at start means that it was cut short.
var waits = map[step]step{stepInstall: stepInstallWait, stepCommit: stepCommitWait,
	stepCommitLeave: stepCommitLeaveWait}

// stop ends the run before a step that --stop-before names, or at a safe place when the
// process was told to end.
func (f *flow) stop(ctx context.Context, s step) *pause {
	saved, safe := waits[s]
	asked := slices.Contains(f.stopBefore, s)
	if !asked && (ctx.Err() == nil || !safe) {
		return nil
	}
	if !safe {
		saved = s
	}
	f.rec.Update.Known = f.rec.Update.Outcome.bad()
	if err := f.record(saved); err != nil {
		return &pause{saved, err}
	}
	if !asked {
		return &pause{saved, tryLater("interrupted: %w", context.Cause(ctx))}
	}
	return &pause{step: saved}
}

// record journals where the update is.
//
//go:noinline
func (f *flow) record(s step) error {
	f.rec.Update.Step = s
	return f.j.save(f.rec)
}

// enter journals that a step begins. Some steps have no place of their own there.
func (f *flow) enter(s step, def *stepDef) error {
	u := f.rec.Update
	inThisBoot := u.Step == s // of a reboot that was asked for already
	if def.journal != nil {
		def.journal(f)
	}
	counted := !u.Parked
	switch s {
	case stepInstallWait, stepCommitLeaveWait, stepCheckRollback:
		return nil
	case stepCommitWait:
		if f.checkServer != nil { // as long as the new system is trying, that has not begun
			return nil
		}
		counted = false // a person may take any time
	case stepReboot, stepRollbackReboot:
		if inThisBoot {
			return nil
		}
	case stepDownload, stepReport: // tries without progress are the bound there
		counted = false
	}
	if counted && u.Saves >= maxSaves {
		return errLoop
	}
	if counted {
		u.Saves++
		u.Tries = 0 // of another step
	}
	u.Parked = false
	return f.record(s)
}

// park keeps an update at a step that may succeed when it is tried again.
func (f *flow) park(s step, err error) *pause {
	if s == stepReboot || s == stepRollbackReboot { // the machine is going down
		return &pause{s, err}
	}
	f.rec.Update.Parked = true
	if s == stepDownload {
		err = tryLater("download not finished: %w", err)
	}
	return &pause{s, errors.Join(err, f.record(s))}
}

// triedLongEnough counts how often a step on the way forward was tried in vain; what waits for the
// network counts for itself, and nothing ends the way back.
func (f *flow) triedLongEnough(def *stepDef) bool {
	if def.network || def.state == "" {
		return false
	}
	f.rec.Update.Tries++
	return f.rec.Update.Tries >= maxSaves
}

// keepCause keeps the first error for the verdict.
func (f *flow) keepCause(err error) {
	if u := f.rec.Update; u.Cause == "" {
		u.Cause = err.Error()
		u.Cause = u.Cause[:min(len(u.Cause), maxCause)]
	}
}

// fail notes that the update does not succeed. Whether the old state can be had back is
// open until a rollback has gone through.
func (f *flow) fail(err error) {
	f.lg.fail(err)
	f.keepCause(err)
	f.rec.Update.Outcome = outcomeInconsistent
	f.note(eventFailed)
}

// giveUp ends an update before anything was installed.
//
//go:noinline
func (f *flow) giveUp(err error) result {
	f.fail(err)
	f.rec.Update.Outcome = outcomeFailed
	return nothing
}

// turnBack notes the failure of a step and runs the Error scripts of its state.
func (f *flow) turnBack(ctx context.Context, s step, state string, err error) result {
	f.fail(err)
	switch state {
	case "Download":
		f.note(eventStreaming)
	case "ArtifactInstall":
		f.note(eventInstallation)
	case "ArtifactCommit":
		f.note(eventCommitting)
	}
	f.errorScripts(ctx, state)
	if s == stepDownload {
		f.rec.Update.Outcome = outcomeFailed
	}
	return failed
}

// abortLoop ends an update that goes round in circles; no module and no script is called.
func (f *flow) abortLoop() result {
	f.fail(errLoop)
	f.note(eventLooped)
	return looped
}

// unlessStopped makes an error one that says nothing when this process was told to end.
func unlessStopped(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return tryLater("interrupted: %w", err)
	}
	return err
}

// script runs the scripts of a state's action.
//
//go:noinline
func (f *flow) script(ctx context.Context, state, action string) error {
	return f.scripts.runState(ctx, state, action)
}

func (f *flow) errorScripts(ctx context.Context, state string) {
	if err := f.script(ctx, state, "Error"); err != nil {
		f.lg.warnf("%v", err)
	}
}

// around runs the Enter scripts, the body and the Leave scripts of a state until one fails.
func (f *flow) around(ctx context.Context, state string, body func() error) error {
	if err := f.script(ctx, state, "Enter"); err != nil {
		return err
	}
	if err := body(); err != nil {
		return err
	}
	return f.script(ctx, state, "Leave")
}

func (f *flow) call(ctx context.Context, state string) error {
	if f.handler == nil {
		return fmt.Errorf("%s: there is no update module for payload type %q", state, f.rec.Update.Type)
	}
	f.lg.debugf("state %s", state)
	return f.handler.call(ctx, state)
}

func (f *flow) query(ctx context.Context, state string) (string, error) {
	if f.handler == nil {
		return "", fmt.Errorf("%s: there is no update module for payload type %q", state, f.rec.Update.Type)
	}
	return f.handler.query(ctx, state)
}

// announce reports a status. Only an abort counts: a report that does not get through is no
// reason to stop.
func (f *flow) announce(ctx context.Context, status string) error {
	if status == "" || f.reportStatus == nil {
		return nil
	}
	err := f.reportStatus(ctx, status)
	if err != nil && !errors.Is(err, errAborted) {
		f.lg.warnf("status %q not reported: %v", status, err)
		return nil
	}
	return err
}

// pass is the step of an update that was waiting for the next one.
func (f *flow) pass(context.Context) (result, error) { return done, nil }

// download fetches, checks and hands over the payload. A standalone install has opened the
// artifact and checked it before anything was journaled.
func (f *flow) download(ctx context.Context) (result, error) {
	if err := f.around(ctx, "Download", func() error { return f.stream(ctx) }); err != nil {
		return failed, err
	}
	u := f.rec.Update
	u.Checkpoint, u.Tries = nil, 0
	f.note(eventDownloaded)
	if u.Type == "" {
		return nothing, nil
	}
	return done, nil
}

func (f *flow) stream(ctx context.Context) error {
	u := f.rec.Update
	for {
		if err := f.openArtifact(ctx); err != nil {
			return err
		}
		if u.Type == "" {
			return f.art.drain()
		}
		err := f.handler.download(ctx, f.art)
		if !errors.Is(err, errStartOver) {
			return err
		}
		f.lg.warnf("%v", err)
		u.Checkpoint = nil // so this comes once only
		f.art = nil
	}
}

// maxTries bounds the downloads that begin and get no further than the one before.
const maxTries = 10

// openArtifact gets hold of the artifact, unless install has it already, and counts the try.
func (f *flow) openArtifact(ctx context.Context) error {
	u := f.rec.Update
	if f.art == nil {
		a, err := f.fetch(ctx)
		if err != nil {
			return err
		}
		if err := f.accept(ctx, a); err != nil {
			return err
		}
	}
	if c := u.Checkpoint; c != nil && c.Offset > u.Reached {
		u.Reached, u.Tries = c.Offset, 0
	}
	if u.Tries++; u.Tries > maxTries {
		return fmt.Errorf("no progress in %d downloads", maxTries)
	}
	return f.j.save(f.rec)
}

func (f *flow) install(ctx context.Context) (result, error) {
	err := f.around(ctx, "ArtifactInstall", func() error { return f.call(ctx, "ArtifactInstall") })
	if err != nil {
		return failed, err
	}
	f.note(eventInstalled)
	if !f.mode.reboots {
		return done, nil
	}
	return f.needsReboot(ctx)
}

// needsReboot asks the handler. An answer that does not come is a failure, but no Error scripts run.
func (f *flow) needsReboot(ctx context.Context) (r result, err error) {
	u := f.rec.Update
	u.Reboot, err = f.query(ctx, "NeedsArtifactReboot")
	switch {
	case isTemporary(err):
		return failed, err
	case err != nil:
		f.fail(err)
		return failed, nil
	case u.Reboot == "No":
		return done, nil
	}
	return reboot, nil
}

// markBoot notes the boot in which the machine is told to go down.
func (f *flow) markBoot() {
	u, now := f.rec.Update, f.bootID()
	f.rebooting = u.BootID != "" && u.BootID == now
	u.BootID = now
}

// rebootForward is the reboot into the new system.
func (f *flow) rebootForward(ctx context.Context) (result, error) {
	if !f.rebooting {
		if err := f.script(ctx, "ArtifactReboot", "Enter"); err != nil {
			return failed, err
		}
	}
	return done, f.restartMachine(ctx, "ArtifactReboot")
}

// restartMachine lets the module reboot, or reboots the machine. An error with the exit code of
// a wanted reboot means that somebody else has to.
func (f *flow) restartMachine(ctx context.Context, state string) error {
	if f.beforeReboot != nil {
		f.beforeReboot()
	}
	if f.rec.Update.Reboot != "Automatic" {
		return f.call(ctx, state)
	}
	return f.reboot(ctx)
}

func (f *flow) verifyReboot(ctx context.Context) (result, error) {
	if err := f.call(ctx, "ArtifactVerifyReboot"); err != nil {
		return failed, err
	}
	return done, f.script(ctx, "ArtifactReboot", "Leave")
}

// beforeCommit: a managed update proves that it can still talk to the server; when that is
// given up, the new system is taken for one that lost its network. A standalone one waits for
// a person, unless there would be no way back anyway.
func (f *flow) beforeCommit(ctx context.Context) (result, error) {
	if f.checkServer != nil {
		err := unlessStopped(ctx, f.checkServer(ctx))
		if err != nil && !isTemporary(err) {
			f.fail(err)
			return failed, nil
		}
		return done, err
	}
	answer, err := f.query(ctx, "NeedsArtifactReboot")
	can := ""
	if err == nil {
		if answer != "No" {
			f.note(eventReboot)
		}
		can, err = f.query(ctx, "SupportsRollback")
	}
	switch {
	case isTemporary(err):
		return failed, err
	case err != nil:
		f.fail(err)
		return failed, nil
	case can == "Yes":
		return wait, nil
	}
	f.note(eventAutoCommit)
	return done, nil
}

func (f *flow) commit(ctx context.Context) (result, error) {
	err := f.script(ctx, "ArtifactCommit", "Enter")
	if err == nil {
		err = f.scripts.checkRootfsVersion()
	}
	if err == nil {
		err = f.call(ctx, "ArtifactCommit")
	}
	if err == nil {
		f.note(eventCommitted)
	}
	return done, err
}

// commitLeave: what fails here comes too late for a rollback.
func (f *flow) commitLeave(ctx context.Context) (result, error) {
	err := f.scriptsBack(ctx, "ArtifactCommit", "Leave")
	switch {
	case err == nil:
	case f.mode.strict:
		f.fail(err)
		f.errorScripts(ctx, "ArtifactCommit")
	default:
		f.lg.fail(err)
		f.keepCause(err) // which is how a later run knows it
		f.note(eventPostCommit)
	}
	return done, nil
}

func (f *flow) checkRollback(ctx context.Context) (result, error) {
	can, err := f.query(ctx, "SupportsRollback")
	if err != nil {
		f.fail(err)
		return failed, nil
	}
	if can != "Yes" {
		f.lg.errorf("the update module does not support rollback")
		f.note(eventNoRollback)
		return failed, nil
	}
	f.rec.Update.Outcome = outcomeRolledBack
	return done, nil
}

// turnedBack is how an update is while it is on its way back.
func (f *flow) turnedBack() {
	u := f.rec.Update
	if u.BootID = ""; u.Outcome != outcomeInconsistent {
		u.Outcome = outcomeRolledBack
	}
}

// rollback brings the old state back. Nothing stops it on its way.
func (f *flow) rollback(ctx context.Context) (result, error) {
	if err := f.scriptsBack(ctx, "ArtifactRollback", "Enter"); err != nil {
		f.fail(err)
	}
	err := f.call(ctx, "ArtifactRollback")
	if isTemporary(err) {
		return failed, err
	}
	if err != nil {
		f.fail(err)
	}
	switch lerr := f.scriptsBack(ctx, "ArtifactRollback", "Leave"); {
	case lerr != nil && err == nil && f.mode.strict:
		f.fail(lerr)
	case lerr != nil:
		f.lg.warnf("%v", lerr)
	}
	if err != nil || !f.mode.reboots {
		return done, nil
	}
	r, err := f.needsReboot(ctx)
	if r == failed && err == nil {
		r = done
	}
	return r, err
}

func (f *flow) rebootBack(ctx context.Context) (result, error) {
	if !f.rebooting {
		if err := f.script(ctx, "ArtifactRollbackReboot", "Enter"); err != nil {
			f.fail(err)
		}
	}
	err := f.restartMachine(ctx, "ArtifactRollbackReboot")
	if err != nil && exitCode(err) != exitReboot && !isTemporary(err) {
		f.lg.warnf("ignored: %v", err)
		err = nil
	}
	return done, err
}

func (f *flow) verifyRollbackReboot(ctx context.Context) (result, error) {
	err := f.call(ctx, "ArtifactVerifyRollbackReboot")
	if isTemporary(err) {
		return failed, err
	}
	if err != nil {
		f.lg.warnf("rebooting again: %v", err)
		f.rec.Update.BootID = f.bootID() // without the scripts of the first time
		return failed, nil
	}
	if err := f.script(ctx, "ArtifactRollbackReboot", "Leave"); err != nil {
		f.fail(err)
		f.errorScripts(ctx, "ArtifactRollbackReboot")
	}
	return done, nil
}

func (f *flow) failure(ctx context.Context) (result, error) {
	if err := f.scriptsBack(ctx, "ArtifactFailure", "Enter"); err != nil {
		f.fail(err)
	}
	if err := f.call(ctx, "ArtifactFailure"); err != nil {
		f.fail(err)
	}
	switch err := f.scriptsBack(ctx, "ArtifactFailure", "Leave"); {
	case err != nil && f.mode.strict:
		f.fail(err)
	case err != nil:
		f.lg.warnf("%v", err)
	}
	return done, nil
}

// scriptsBack runs scripts whose failure does not keep the others of a standalone update from running.
func (f *flow) scriptsBack(ctx context.Context, state, action string) error {
	if f.mode.strict {
		return f.script(ctx, state, action)
	}
	return f.scripts.runAll(ctx, state, action)
}

// settleFirst has provides and verdict in the journal before the last steps of an update that
// is reported; one that a person drives has them there after its last, as with Mender.
func (f *flow) settleFirst() {
	if f.mode.reports && !f.rec.Update.settled() {
		f.settle()
	}
}

// cleanup lets the module tidy up.
func (f *flow) cleanup(ctx context.Context) (result, error) {
	if f.handler == nil {
		return done, nil
	}
	if err := f.handler.call(ctx, "Cleanup"); err != nil {
		f.lg.fail(err)
		f.keepCause(err)
		f.note(eventCleanupFailed)
		// What is settled, or has been rolled back, stays as it is.
		if u := f.rec.Update; !u.Outcome.bad() {
			u.Outcome = outcomeInconsistent
		}
	}
	return done, nil
}

// settle decides what the device is from now on and writes it into the record.
func (f *flow) settle() {
	u := f.rec.Update
	v := verdict{Artifact: u.Artifact, ID: u.ID, Sum: u.Sum, Cause: u.Cause, Saved: u.Saved,
		Result: string(u.Outcome)}
	a := &artifact{Name: u.Artifact, Group: u.Group, Provides: u.Provides, Clears: u.Clears}
	switch u.Outcome {
	case outcomeRunning:
		v.Result = "committed"
		f.rec.Provides = mergeProvides(f.rec.Provides, a)
	case outcomeInconsistent:
		a.Name = strings.TrimSuffix(a.Name, "_INCONSISTENT") + "_INCONSISTENT"
		if f.mode.reports && !f.has(eventLooped) { // only name and group: what else is there is not known
			a.Provides, a.Clears = nil, []string{}
		}
		f.rec.Provides = mergeProvides(f.rec.Provides, a)
	}
	v.Time = time.Now().UTC().Truncate(time.Second)
	f.rec.Last = &v
}

// report tells the server how it ended, until it has heard it or that is given up.
func (f *flow) report(ctx context.Context) (result, error) {
	err := unlessStopped(ctx, f.reportVerdict(ctx))
	if err != nil && !isTemporary(err) {
		f.lg.warnf("final status not reported: %v", err)
		err = nil
	}
	return done, err
}

// finish removes the update from the journal; its verdict stays.
func (f *flow) finish() *pause {
	if !f.rec.Update.settled() {
		f.settle()
	}
	f.ended, f.rec.Update = f.rec.Update, nil
	if err := f.j.save(f.rec); err != nil {
		return &pause{stepEnd, err}
	}
	return nil
}

// succeeded tells whether the run did what it was asked to. A failure is told once.
func (f *flow) succeeded(u *update, p *pause) bool {
	switch {
	case p != nil:
		return !f.has(eventFailed)
	case f.rec.Last.Result == "committed":
		return u.Cause == ""
	case f.rec.Last.Result == "inconsistent", f.has(eventFailed), f.has(eventCleanupFailed):
		return false
	}
	return u.Known
}

// resumePoint says where an update goes on whose process ended, for whatever reason. To be in
// a step means that it was cut short: where its effects can be repeated it is repeated, else
// the update is rolled back, and cut says why it fails. No Error scripts run for a cut.
// sameBoot: the machine has not been down since it was told to.
func resumePoint(u *update, repeatable, sameBoot bool, m mode) (s step, cut error) {
	cut = fmt.Errorf("interrupted in %s", u.Step)
	again := repeatable && !u.Scripts || u.Parked
	switch u.Step {
	case stepDownload:
		// Another try costs network traffic only, unless a module has seen part of it.
		// Scripts of the artifact have not run yet.
		if u.Source != "-" && (u.Parked && u.Type == "" || repeatable && u.Type != "") {
			return stepDownload, nil
		}
		return stepCleanup, errors.New("interrupted while downloading")
	case stepInstall, stepCommit, stepVerifyReboot:
		switch {
		case again:
		case m.asks || u.Step == stepVerifyReboot:
			return stepCheckRollback, cut
		default:
			return stepRollback, cut
		}
	case stepReboot:
		if !sameBoot {
			return stepVerifyReboot, nil
		}
	case stepRollbackReboot:
		if !sameBoot {
			return stepVerifyRollbackReboot, nil
		}
	}
	return u.Step, nil
}

// resume is where the update in the journal goes on.
func (f *flow) resume() step {
	u := f.rec.Update
	sameBoot := u.Reboot == "Automatic" && u.BootID != "" && u.BootID == f.bootID()
	s, cut := resumePoint(u, f.handler != nil && f.handler.resumable(), sameBoot, f.mode)
	if cut == nil {
		return s
	}
	f.fail(cut)
	switch s {
	case stepCleanup:
		u.Outcome = outcomeFailed
	case stepRollback:
		u.Outcome = outcomeRolledBack
	}
	return s
}

// accept makes the artifact the one of the update, after every check that can be made before
// something changes. Its scripts are put in place.
func (f *flow) accept(ctx context.Context, art *artifact) error {
	u := f.rec.Update
	t, err := f.deviceType()
	if err == nil {
		err = art.checkDepends(t, f.rec.Provides)
	}
	if err != nil {
		return err
	}
	f.art = art
	sum := hex.EncodeToString(art.ManifestSum[:])
	if u.Sum != sum {
		u.Checkpoint = nil // of another artifact
	}
	u.Artifact, u.Group, u.Type = art.Name, art.Group, art.PayloadType
	u.Provides, u.Clears, u.Sum = art.Provides, art.Clears, sum
	u.Scripts = len(art.Scripts) > 0
	if err := f.fits(art); err != nil {
		return err
	}
	if err := f.scripts.check(art.Scripts); err != nil {
		return err
	}
	if !art.Empty {
		h, err := f.newHandler(art.PayloadType, u)
		if err != nil {
			return err
		}
		if err := h.prepare(ctx, art); err != nil {
			return err
		}
		f.handler = h
	}
	return f.scripts.install(art.Scripts)
}

// fits refuses an artifact of which the journal could not hold all that the steps of its update keep: the
// worst record is that of the last ones, with both sets of provides in it.
func (f *flow) fits(art *artifact) error {
	if err := checkProvides(f.rec.Provides, art); err != nil {
		return err
	}
	worst := *f.rec
	worst.Provides = mergeProvides(f.rec.Provides, art)
	worst.Last = &verdict{Artifact: art.Name, Cause: strings.Repeat("x", maxCause)}
	text, err := json.Marshal(worst)
	if room := journalMax - 4*maxCause; err == nil && len(text) > room { // for a checkpoint and the like
		err = refuse("the update to %q keeps more than the journal can hold: %d bytes, want %d at most", art.Name, len(text),
			room)
	}
	return err
}

// payloadHandler does what an update is about: the built-in rootfs-image, or an update
// module. States and answers are those of the update module protocol.
type payloadHandler interface {
	// prepare looks for every reason to refuse before anything of the update is done.
	prepare(ctx context.Context, a *artifact) error
	download(ctx context.Context, a *artifact) error
	call(ctx context.Context, state string) error
	query(ctx context.Context, state string) (string, error)
	// resumable: every state may be repeated after a power cut, so that an interrupted
	// install or commit goes on instead of being rolled back.
	resumable() bool
}
