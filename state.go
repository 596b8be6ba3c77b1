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

// maxCause bounds what the journal keeps of an error, in bytes.
const maxCause = 1024

// maxSaves bounds the steps of one update, so that nothing goes round for ever (a module
// whose VerifyRollbackReboot never succeeds, a device that loses power at each boot).
const maxSaves = 28

var errLoop = errors.New("the update went through too many steps")

// flow is one run through the steps of an update. What differs between a standalone and a
// managed update is data: update.Managed, and whether there is someone to report to.
type flow struct {
	lg      *logger
	j       *journalFile
	rec     *record
	handler payloadHandler
	scripts *scripts
	art     *artifact
	ended   *update // the update of this run, once it has left the journal
	did     deeds

	stopBefore []step
	newHandler func(kind string, u *update) (payloadHandler, error)
	deviceType func() (string, error)
	fetch      func(ctx context.Context) (*artifact, error)   // opens the artifact from its start
	tell       func(ctx context.Context, status string) error // managed: reports a status
	finish     func(ctx context.Context, success bool) error  // managed: final status and log
	relogin    func(ctx context.Context) error                // managed: a new authentication before the commit
	reboot     func(ctx context.Context) error                // restarts the machine
	bootID     func() string
	looped     bool

	beforeReboot func() // managed: saves the deployment log
}

// deeds are what happened in this run, for the lines and the exit code of standalone mode.
type deeds struct {
	downloaded, installed, committed bool
	failed, cleanupFailed            bool
	failure                          string // of what: Streaming, Installation, Committing
	autoCommit, noRollback, reboot   bool
}

// pause ends a run in the middle of an update that goes on in a later run.
type pause struct {
	step step
	err  error // why, with its exit code; nil: it waits for a person
}

// advance goes on with the update in the journal until it has ended (nil) or has to wait.
func (f *flow) advance(ctx context.Context) *pause {
	for u := f.rec.Update; u.Step != stepEnd; {
		if p := f.stop(ctx, u.Step); p != nil {
			return p
		}
		next, p := f.do(ctx, u.Step)
		if p != nil {
			return p
		}
		u.Step = next
	}
	return f.end()
}

func (f *flow) do(ctx context.Context, s step) (step, *pause) {
	if network := s == stepDownload || f.rec.Update.Managed && s == stepCommitWait || s == stepReport; !network {
		// A signal to this process must not tear a module or script apart: only what
		// waits for the network can be interrupted; the rest has time-outs of its own.
		ctx = context.WithoutCancel(ctx)
	}
	switch s {
	case stepDownload:
		return f.download(ctx)
	case stepInstallWait:
		return stepInstall, nil
	case stepInstall:
		return f.install(ctx), nil
	case stepReboot:
		return f.restart(ctx)
	case stepVerifyReboot:
		return f.verifyReboot(ctx)
	case stepCommitWait:
		return f.beforeCommit(ctx)
	case stepCommit:
		return f.commit(ctx), nil
	case stepCommitLeaveWait:
		return stepCommitLeave, nil
	case stepCommitLeave:
		return f.commitLeave(ctx), nil
	case stepCheckRollback:
		return f.checkRollback(ctx), nil
	case stepRollback:
		return f.rollback(ctx), nil
	case stepRollbackReboot:
		return f.rollbackReboot(ctx)
	case stepVerifyRollbackReboot:
		return f.verifyRollbackReboot(ctx)
	case stepFailure:
		return f.failure(ctx), nil
	case stepCleanup:
		return f.cleanup(ctx), nil
	case stepReport:
		return f.report(ctx)
	}
	f.fail(fmt.Errorf("step %q in the journal is not known", s))
	return stepCheckRollback, nil
}

// waits are the names under which an update is saved that has not begun a step; to be in
// the step itself at start means that it was cut short.
var waits = map[step]step{stepInstall: stepInstallWait, stepCommit: stepCommitWait, stepCommitLeave: stepCommitLeaveWait}

// stop ends the run before a step that --stop-before names, or at a safe place when the
// process was told to end.
func (f *flow) stop(ctx context.Context, s step) *pause {
	saved, safe := waits[s]
	asked := !f.rec.Update.Managed && slices.Contains(f.stopBefore, s)
	if !asked && (ctx.Err() == nil || !safe) {
		return nil
	}
	if !safe {
		saved = s
	}
	f.rec.Update.Step, f.rec.Update.Told = saved, f.rec.Update.Failed
	if err := f.j.save(f.rec); err != nil {
		return &pause{saved, err}
	}
	if !asked {
		return &pause{saved, tryLater("interrupted: %w", context.Cause(ctx))}
	}
	return &pause{step: saved}
}

// enter journals that a step begins. Its error is a failure of that step.
func (f *flow) enter(s step) error {
	u := f.rec.Update
	if u.Saves >= maxSaves {
		return errLoop
	}
	u.Step = s
	if s != stepDownload && s != stepCommitWait { // the bounds there: tries without progress; a person
		u.Saves++
	}
	return f.j.save(f.rec)
}

// fail notes that the update does not succeed. Whether the old state can be had back is
// open until a rollback has gone through.
func (f *flow) fail(err error) {
	u := f.rec.Update
	f.lg.fail(err)
	if u.Cause == "" {
		u.Cause = err.Error()
		u.Cause = u.Cause[:min(len(u.Cause), maxCause)]
	}
	u.Failed, u.RollbackFailed, f.did.failed = true, true, true
}

// script runs the scripts of a state's action.
func (f *flow) script(ctx context.Context, state, action string) error {
	return f.scripts.run(ctx, state, action)
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

func (f *flow) call(ctx context.Context, state string) func() error {
	return func() error {
		if f.handler == nil {
			return fmt.Errorf("%s: there is no update module for payload type %q", state, f.rec.Update.Type)
		}
		f.lg.debugf("state %s", state)
		return f.handler.call(ctx, state)
	}
}

func (f *flow) query(ctx context.Context, state string) (string, error) {
	if f.handler == nil {
		return "", fmt.Errorf("%s: there is no update module for payload type %q", state, f.rec.Update.Type)
	}
	return f.handler.query(ctx, state)
}

// say reports a status. Only an abort counts: a report that does not get through is no
// reason to stop.
func (f *flow) say(ctx context.Context, status string) error {
	if !f.rec.Update.Managed || f.tell == nil {
		return nil
	}
	err := f.tell(ctx, status)
	if errors.Is(err, errAborted) {
		return err
	}
	if err != nil {
		f.lg.warnf("status %q not reported: %v", status, err)
	}
	return nil
}

// download fetches, checks and hands over the payload. A standalone install has opened the
// artifact and checked it before anything was journaled.
func (f *flow) download(ctx context.Context) (step, *pause) {
	u := f.rec.Update
	if err := f.say(ctx, "downloading"); err != nil {
		return f.giveUp(err), nil
	}
	err := f.enter(stepDownload)
	if err == nil {
		err = f.around(ctx, "Download", func() error { return f.stream(ctx) })
	}
	if err != nil && (ctx.Err() != nil || exitCode(err) == exitTempFail) {
		u.Parked = true
		return stepDownload, &pause{stepDownload, tryLater("download not finished: %w", errors.Join(err, f.j.save(f.rec)))}
	}
	if err != nil {
		f.fail(err)
		f.did.failure = "Streaming"
		f.errorScripts(ctx, "Download")
		u.RollbackFailed = false
		return stepCleanup, nil
	}
	f.did.downloaded = true
	u.Checkpoint, u.Tries = nil, 0
	if u.Type == "" {
		return stepCleanup, nil
	}
	if err := f.say(ctx, "installing"); err != nil {
		return f.giveUp(err), nil
	}
	if u.Managed {
		return stepInstall, nil
	}
	return stepInstallWait, nil
}

// giveUp ends an update before anything was installed.
func (f *flow) giveUp(err error) step {
	f.fail(err)
	f.rec.Update.RollbackFailed = false
	return stepCleanup
}

func (f *flow) stream(ctx context.Context) error {
	u := f.rec.Update
	for {
		if err := f.open(ctx); err != nil {
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

// open gets hold of the artifact, unless install has it already, and counts the try.
func (f *flow) open(ctx context.Context) error {
	u := f.rec.Update
	if f.art == nil {
		a, err := f.fetch(ctx)
		if err != nil {
			return err
		}
		if u.Managed && u.Artifact != "" && a.Name != u.Artifact {
			return fmt.Errorf("deployment %q: got artifact %q, want %q", u.ID, a.Name, u.Artifact)
		}
		if err := f.take(ctx, a); err != nil {
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

func (f *flow) install(ctx context.Context) step {
	u := f.rec.Update
	err := f.enter(stepInstall)
	if err == nil {
		err = f.around(ctx, "ArtifactInstall", f.call(ctx, "ArtifactInstall"))
	}
	if err != nil {
		return f.failed(ctx, err, "ArtifactInstall")
	}
	f.did.installed = true
	if !u.Managed {
		return stepCommitWait
	}
	if u.Reboot, err = f.query(ctx, "NeedsArtifactReboot"); err != nil {
		f.fail(err)
		return stepCheckRollback
	}
	if u.Reboot == "No" {
		return stepCommitWait
	}
	return stepReboot
}

// failed notes the failure of a state, runs its Error scripts and turns to the way back.
func (f *flow) failed(ctx context.Context, err error, state string) step {
	if errors.Is(err, errLoop) {
		return f.breakOut()
	}
	f.fail(err)
	f.did.failure = map[string]string{"ArtifactInstall": "Installation", "ArtifactCommit": "Committing"}[state]
	f.errorScripts(ctx, state)
	return stepCheckRollback
}

// breakOut ends an update that goes round in circles; no module and no script is called.
func (f *flow) breakOut() step {
	u := f.rec.Update
	f.fail(errLoop)
	f.looped = true
	f.settle()
	u.Step = stepEnd
	if u.Managed {
		u.Step = stepReport
	}
	if err := f.j.save(f.rec); err != nil {
		f.lg.errorf("%v", err)
	}
	return u.Step
}

// restart is the reboot into the new system.
func (f *flow) restart(ctx context.Context) (step, *pause) {
	u := f.rec.Update
	var err error
	if again := u.BootID != "" && u.BootID == f.bootID(); !again {
		if err := f.say(ctx, "rebooting"); err != nil {
			f.fail(err)
			return stepCheckRollback, nil
		}
		u.BootID = f.bootID()
		if err = f.enter(stepReboot); err == nil {
			err = f.script(ctx, "ArtifactReboot", "Enter")
		}
	}
	if err == nil {
		var p *pause
		if p, err = f.doReboot(ctx, "ArtifactReboot"); p != nil {
			return stepReboot, p
		}
	}
	if err != nil {
		return f.failed(ctx, err, "ArtifactReboot"), nil
	}
	return stepVerifyReboot, nil
}

// doReboot lets the module reboot, or reboots the machine. A pause means that somebody else
// has to.
func (f *flow) doReboot(ctx context.Context, state string) (*pause, error) {
	if f.beforeReboot != nil {
		f.beforeReboot()
	}
	if f.rec.Update.Reboot != "Automatic" {
		return nil, f.call(ctx, state)()
	}
	err := f.reboot(ctx)
	if code := exitCode(err); code == exitReboot || code == exitTempFail {
		return &pause{f.rec.Update.Step, err}, nil
	}
	return nil, err
}

func (f *flow) verifyReboot(ctx context.Context) (step, *pause) {
	err := f.enter(stepVerifyReboot)
	if err == nil {
		err = f.call(ctx, "ArtifactVerifyReboot")()
	}
	if err == nil {
		err = f.script(ctx, "ArtifactReboot", "Leave")
	}
	if err != nil {
		return f.failed(ctx, err, "ArtifactReboot"), nil
	}
	return stepCommitWait, nil
}

// beforeCommit: a managed update proves that it can still talk to the server; a standalone
// one waits for a person, unless there would be no way back anyway.
func (f *flow) beforeCommit(ctx context.Context) (step, *pause) {
	u := f.rec.Update
	if u.Managed {
		return f.prove(ctx)
	}
	if err := f.enter(stepCommitWait); err != nil {
		return f.failed(ctx, err, "ArtifactInstall"), nil
	}
	reboot, err := f.query(ctx, "NeedsArtifactReboot")
	if err != nil {
		f.fail(err)
		return stepCheckRollback, nil
	}
	f.did.reboot = reboot != "No"
	can, err := f.query(ctx, "SupportsRollback")
	if err != nil {
		f.fail(err)
		return stepCheckRollback, nil
	}
	if can == "Yes" {
		return stepCommitWait, &pause{step: stepCommitWait}
	}
	f.did.autoCommit = true
	return stepCommit, nil
}

// unlessStopped makes an error one that says nothing when this process was told to end.
func unlessStopped(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return tryLater("interrupted: %w", err)
	}
	return err
}

// prove logs in anew and reports "installing" once more. While that may still succeed the
// run pauses; when it is given up, the new system is taken for one that lost its network.
func (f *flow) prove(ctx context.Context) (step, *pause) {
	err := f.relogin(ctx)
	if err == nil {
		err = f.tell(ctx, "installing")
	}
	if err = unlessStopped(ctx, err); exitCode(err) == exitTempFail {
		f.rec.Update.Step = stepCommitWait
		return stepCommitWait, &pause{stepCommitWait, errors.Join(err, f.j.save(f.rec))}
	}
	if err != nil {
		f.fail(err)
		return stepCheckRollback, nil
	}
	return stepCommit, nil
}

func (f *flow) commit(ctx context.Context) step {
	err := f.enter(stepCommit)
	if err == nil {
		err = f.script(ctx, "ArtifactCommit", "Enter")
	}
	if err == nil {
		err = f.scripts.checkRootfsVersion()
	}
	if err == nil {
		err = f.call(ctx, "ArtifactCommit")()
	}
	if err == nil && f.rec.Update.Managed {
		err = f.enter(stepCommitLeave)
	}
	if err != nil {
		return f.failed(ctx, err, "ArtifactCommit")
	}
	f.did.committed = true
	return stepCommitLeave
}

// commitLeave: what fails here comes too late for a rollback.
func (f *flow) commitLeave(ctx context.Context) step {
	u := f.rec.Update
	if !u.Managed {
		if err := f.enter(stepCommitLeave); errors.Is(err, errLoop) {
			return f.breakOut()
		}
	}
	if err := f.script(ctx, "ArtifactCommit", "Leave"); err != nil {
		if u.Managed {
			f.fail(err)
			f.errorScripts(ctx, "ArtifactCommit")
			return stepCleanup
		}
		f.lg.fail(err)
		u.PostCommit = true
	}
	return stepCleanup
}

func (f *flow) checkRollback(ctx context.Context) step {
	can, err := f.query(ctx, "SupportsRollback")
	if err != nil {
		f.fail(err)
		return stepFailure
	}
	if can != "Yes" {
		f.lg.errorf("the update module does not support rollback")
		f.did.noRollback = true
		return stepFailure
	}
	f.rec.Update.RollbackFailed = false
	return stepRollback
}

// rollback brings the old state back. Nothing stops it on its way.
func (f *flow) rollback(ctx context.Context) step {
	u := f.rec.Update
	u.BootID, u.RolledBack = "", true
	if err := f.enter(stepRollback); errors.Is(err, errLoop) {
		return f.breakOut()
	}
	if err := f.script(ctx, "ArtifactRollback", "Enter"); err != nil {
		f.fail(err)
	}
	err := f.call(ctx, "ArtifactRollback")()
	if err != nil {
		f.fail(err)
	}
	if lerr := f.script(ctx, "ArtifactRollback", "Leave"); lerr != nil && err == nil && u.Managed {
		f.fail(lerr)
	}
	if err != nil || !u.Managed {
		return stepFailure
	}
	if u.Reboot, err = f.query(ctx, "NeedsArtifactReboot"); err != nil {
		f.fail(err)
		return stepFailure
	}
	if u.Reboot == "No" {
		return stepFailure
	}
	return stepRollbackReboot
}

func (f *flow) rollbackReboot(ctx context.Context) (step, *pause) {
	u := f.rec.Update
	if again := u.BootID != "" && u.BootID == f.bootID(); !again {
		u.BootID = f.bootID()
		if err := f.enter(stepRollbackReboot); errors.Is(err, errLoop) {
			return f.breakOut(), nil
		}
		if err := f.script(ctx, "ArtifactRollbackReboot", "Enter"); err != nil {
			f.fail(err)
		}
	}
	return f.rebootBack(ctx)
}

func (f *flow) rebootBack(ctx context.Context) (step, *pause) {
	p, err := f.doReboot(ctx, "ArtifactRollbackReboot")
	if p != nil {
		return stepRollbackReboot, p
	}
	if err != nil {
		f.lg.warnf("ignored: %v", err)
	}
	return stepVerifyRollbackReboot, nil
}

func (f *flow) verifyRollbackReboot(ctx context.Context) (step, *pause) {
	if err := f.enter(stepVerifyRollbackReboot); errors.Is(err, errLoop) {
		return f.breakOut(), nil
	}
	if err := f.call(ctx, "ArtifactVerifyRollbackReboot")(); err != nil {
		f.lg.warnf("rebooting again: %v", err)
		f.rec.Update.BootID = f.bootID()
		if err := f.enter(stepRollbackReboot); errors.Is(err, errLoop) {
			return f.breakOut(), nil
		}
		return f.rebootBack(ctx)
	}
	if err := f.script(ctx, "ArtifactRollbackReboot", "Leave"); err != nil {
		f.fail(err)
		f.errorScripts(ctx, "ArtifactRollbackReboot")
	}
	return stepFailure, nil
}

func (f *flow) failure(ctx context.Context) step {
	if err := f.enter(stepFailure); errors.Is(err, errLoop) {
		return f.breakOut()
	}
	if err := f.script(ctx, "ArtifactFailure", "Enter"); err != nil {
		f.fail(err)
	}
	if err := f.call(ctx, "ArtifactFailure")(); err != nil {
		f.fail(err)
	}
	if err := f.script(ctx, "ArtifactFailure", "Leave"); err != nil && f.rec.Update.Managed {
		f.fail(err)
	}
	return stepCleanup
}

// cleanup lets the module tidy up. A managed update has its provides and verdict in the
// journal before that, together with the step; a standalone one after it, as with Mender.
func (f *flow) cleanup(ctx context.Context) step {
	u := f.rec.Update
	if u.Managed {
		f.settle()
	}
	if err := f.enter(stepCleanup); errors.Is(err, errLoop) {
		return f.breakOut()
	}
	if f.handler != nil {
		if err := f.handler.call(ctx, "Cleanup"); err != nil {
			f.lg.fail(err)
			// What is settled, or has been rolled back, stays as it is.
			u.RollbackFailed = u.RollbackFailed || !u.Failed
			u.Failed, f.did.cleanupFailed, u.Cause = true, true, cmp.Or(u.Cause, err.Error())
		}
	}
	if u.Managed {
		return stepReport
	}
	return stepEnd
}

// settle decides what the device is from now on and writes it into the record, once.
func (f *flow) settle() {
	u := f.rec.Update
	if u.Settled {
		return
	}
	u.Settled = true
	v := verdict{Artifact: u.Artifact, ID: u.ID, Sum: u.Sum, Cause: u.Cause, Result: "committed"}
	a := &artifact{Name: u.Artifact, Group: u.Group, Provides: u.Provides, Clears: u.Clears}
	switch {
	case !u.Failed:
		f.rec.Provides = mergeProvides(f.rec.Provides, a)
	case !u.RollbackFailed:
		if v.Result = "failed"; u.RolledBack {
			v.Result = "rolled-back"
		}
	default:
		v.Result = "inconsistent"
		a.Name = strings.TrimSuffix(a.Name, "_INCONSISTENT") + "_INCONSISTENT"
		if u.Managed && !f.looped { // only name and group: what else is there is not known
			a.Provides, a.Clears = nil, []string{}
		}
		f.rec.Provides = mergeProvides(f.rec.Provides, a)
	}
	v.Time = time.Now().UTC().Truncate(time.Second)
	f.rec.Last = &v
}

// report tells the server how it ended, until it has heard it or that is given up.
func (f *flow) report(ctx context.Context) (step, *pause) {
	u := f.rec.Update
	u.Step = stepReport
	if err := f.j.save(f.rec); err != nil {
		f.lg.errorf("%v", err)
	}
	err := unlessStopped(ctx, f.finish(ctx, !u.Failed))
	if exitCode(err) == exitTempFail {
		return stepReport, &pause{stepReport, err}
	}
	if err != nil {
		f.lg.warnf("final status not reported: %v", err)
	}
	return stepEnd, nil
}

// end removes the update from the journal; its verdict stays.
func (f *flow) end() *pause {
	f.settle()
	f.ended, f.rec.Update = f.rec.Update, nil
	if err := f.j.save(f.rec); err != nil {
		return &pause{stepEnd, err}
	}
	return nil
}

// restartAt says where an update goes on whose process ended in step s, for whatever
// reason. Being in a step means that it was cut short: where its effects can be repeated it
// is repeated, else the update is rolled back. No Error scripts run for a cut.
func (f *flow) restartAt() step {
	u := f.rec.Update
	again := f.handler != nil && f.handler.resumable() && !u.Scripts
	cut := func(way step) step {
		if again {
			return u.Step
		}
		f.fail(fmt.Errorf("interrupted in %s", u.Step))
		return way
	}
	switch u.Step {
	case stepDownload:
		// Another try costs network traffic only, unless a module has seen part of it.
		parked := u.Parked
		// Scripts of the artifact have not run yet.
		again = f.handler != nil && f.handler.resumable()
		if u.Parked = false; u.Source != "-" && (parked && u.Type == "" || again && u.Type != "") {
			return stepDownload
		}
		return f.giveUp(errors.New("interrupted while downloading"))
	case stepInstall, stepCommit:
		if u.Managed {
			return cut(stepCheckRollback)
		}
		next := cut(stepRollback)
		u.RollbackFailed = false
		return next
	case stepVerifyReboot:
		return cut(stepCheckRollback)
	case stepReboot:
		if u.Reboot == "Automatic" && u.BootID != "" && u.BootID == f.bootID() {
			return stepReboot // the machine has not been down yet
		}
		return stepVerifyReboot
	case stepRollbackReboot:
		if u.Reboot == "Automatic" && u.BootID != "" && u.BootID == f.bootID() {
			return stepRollbackReboot
		}
		return stepVerifyRollbackReboot
	case stepCommitLeave:
		if err := f.enter(stepCommitLeave); errors.Is(err, errLoop) {
			return f.breakOut()
		}
	}
	return u.Step
}

// take makes the artifact the one of the update, after every check that can be made before
// something changes. Its scripts are put in place.
func (f *flow) take(ctx context.Context, art *artifact) error {
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

// fits refuses an artifact that provides more than the journal can hold next to what is
// there: the worst record is that of the last steps, with both sets in it.
func (f *flow) fits(art *artifact) error {
	worst := *f.rec
	worst.Provides = mergeProvides(f.rec.Provides, art)
	worst.Last = &verdict{Artifact: art.Name, Cause: strings.Repeat("x", maxCause)}
	text, err := json.Marshal(worst)
	if err == nil && len(text) > journalMax-4*maxCause { // room for a checkpoint and the like
		err = refuse("artifact %q provides more than the journal can hold: %d bytes, want %d at most", art.Name, len(text), journalMax-4*maxCause)
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
