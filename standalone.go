// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// standalone has the verbs that a person or a script gives, in the words of Mender's standalone mode.
type standalone struct{ *app }

// say prints a line of the standalone interface; programs that asked for JSON get none.
func (a standalone) say(format string, args ...any) {
	if a.o.progress != "json" {
		fmt.Fprintf(a.out, format+"\n", args...)
	}
}

// install is the verb: it opens the artifact, looks for reasons to refuse, and only then
// begins an update.
func (a standalone) install(ctx context.Context, source string) error {
	if err := a.openState(); err != nil {
		return err
	}
	source = lasting(source)
	if u := a.rec.Update; u != nil && !u.Managed && u.Step == stepDownload {
		if goesOn, err := a.takeUp(ctx, source); goesOn || err != nil {
			return err
		}
	}
	if u := a.rec.Update; u != nil {
		a.say("System not modified.")
		return withHint(fmt.Errorf("update already in progress: %q, in %s", u.Artifact, u.Step), "%s", nextStep(u, false))
	}
	a.rec.Update = &update{Step: stepDownload, Source: source}
	f, err := a.newFlow()
	if err != nil {
		return err
	}
	art, err := a.fetch(ctx)
	if err != nil {
		return a.notModified(err)
	}
	a.say("Installing artifact...")
	if err := f.take(ctx, art); err != nil {
		a.rec.Update = nil
		return a.notModified(err)
	}
	if art.Empty {
		return a.installEmpty(ctx, f)
	}
	return a.outcome(f, f.advance(ctx))
}

// takeUp goes on with an install that was cut off while its bytes came in, if it is of the
// same source and can be; else it ends that, so that another can begin.
func (a standalone) takeUp(ctx context.Context, source string) (goesOn bool, err error) {
	u := a.rec.Update
	f, err := a.newFlow()
	if err != nil {
		return false, err
	}
	if u.Source == source {
		u.Step = f.restartAt()
	} else {
		u.Step = f.giveUp(fmt.Errorf("interrupted while downloading, and given up for %q", source))
	}
	if u.Step == stepDownload {
		a.lg.infof("going on with the install of %q that was cut off", u.Artifact)
		return true, a.outcome(f, f.advance(ctx))
	}
	if p := f.advance(ctx); p != nil {
		return false, p.err
	}
	return false, nil
}

func (a standalone) notModified(err error) error {
	a.say("Streaming failed.\nSystem not modified.")
	return err
}

// installEmpty: an artifact without payload only changes what the device provides.
func (a standalone) installEmpty(ctx context.Context, f *flow) error {
	if err := f.art.drain(); err != nil {
		a.rec.Update = nil
		return a.notModified(err)
	}
	a.say("Artifact with empty payload. Committing immediately.")
	a.rec.Update.Step = stepCleanup
	f.did.installed, f.did.committed = true, true
	return a.outcome(f, f.advance(ctx))
}

// errNothing: exit code 2 of commit, rollback and resume.
func errNothing() error {
	return &codedError{code: exitNothing, err: errors.New("no update in progress")}
}

// pending opens the state and the flow of the standalone update in progress.
func (a standalone) pending() (*flow, *update, error) {
	if err := a.openState(); err != nil {
		return nil, nil, err
	}
	u := a.rec.Update
	if u == nil {
		a.say("No update in progress.")
		return nil, nil, told(errNothing())
	}
	if u.Managed {
		return nil, nil, withHint(fmt.Errorf("the update in progress, %q, is a deployment of the server's", u.Artifact), "'mendlet run' ends it")
	}
	f, err := a.newFlow()
	return f, u, err
}

func (a standalone) commit(ctx context.Context) error {
	f, u, err := a.pending()
	if err != nil {
		return err
	}
	switch u.Step {
	case stepCommitWait:
		if err := a.booted(u); err != nil {
			return err
		}
		u.Step = stepCommit
	case stepCommit:
		u.Step = f.restartAt()
	default:
		return withHint(fmt.Errorf("cannot commit: the update of %q is in %s", u.Artifact, u.Step), "'mendlet resume' goes on from there")
	}
	return a.outcome(f, f.advance(ctx))
}

// booted refuses the commit of an image that has not been booted: that is an early command
// and not a failed update, so nothing changes.
func (a standalone) booted(u *update) error {
	if u.Type != "rootfs-image" {
		return nil
	}
	r := &rootfs{c: a.c, m: a.m, u: u, lg: a.lg}
	if _, err := r.verify(); errors.Is(err, errNotRebooted) {
		return err
	}
	return nil
}

func (a standalone) rollback(ctx context.Context) error {
	f, u, err := a.pending()
	if err != nil {
		return err
	}
	switch u.Step {
	case stepInstallWait, stepCommitWait, stepCommitLeaveWait:
		can, err := f.query(ctx, "SupportsRollback")
		if err != nil {
			return fmt.Errorf("whether %q can be rolled back is not known: %w", u.Artifact, err)
		}
		if can != "Yes" {
			a.say("Update Module does not support rollback. System may be in an inconsistent state.")
			return withHint(fmt.Errorf("the update module %q does not support rollback: nothing was changed", u.Type), "'mendlet commit' keeps it")
		}
	case stepDownload:
		u.Step = f.giveUp(errors.New("rolled back while downloading"))
		u.Asked = true
		return a.outcome(f, f.advance(ctx))
	case stepInstall, stepCommit, stepRollback: // cut short or failed: the module is not asked
	default:
		return withHint(fmt.Errorf("cannot roll back: the update of %q is in %s", u.Artifact, u.Step), "'mendlet resume' goes on from there")
	}
	if u.Step != stepRollback {
		u.Failed, u.RollbackFailed = true, false
	}
	u.Step, u.Asked = stepRollback, true
	return a.outcome(f, f.advance(ctx))
}

func (a standalone) resume(ctx context.Context) error {
	f, u, err := a.pending()
	if err != nil {
		return err
	}
	u.Step = f.restartAt()
	return a.outcome(f, f.advance(ctx))
}

// outcome says how a run ended, in the words of Mender's standalone mode, and turns it into
// an exit code.
func (a standalone) outcome(f *flow, p *pause) error {
	if p != nil && p.err != nil {
		return p.err
	}
	u := f.ended
	if p != nil {
		u = a.rec.Update
	}
	if r, ok := a.rootfsOf(u); ok {
		q, err := r.query(context.Background(), "NeedsArtifactReboot")
		f.did.reboot = err == nil && q != "No"
	}
	a.sayDone(f, p)
	a.sayState(f.did, u, p)
	a.adviseNext(f, u, p)
	if !f.well(u, p) {
		err := fmt.Errorf("update to %q failed: %s", u.Artifact, u.Cause)
		if f.did.failed { // this run has said why
			err = told(err)
		}
		return err
	}
	if f.did.reboot && a.o.rebootExitCode {
		return &codedError{code: exitReboot}
	}
	return nil
}

// well tells whether the run did what it was asked to. A failure is told once.
func (f *flow) well(u *update, p *pause) bool {
	switch {
	case p != nil:
		return !f.did.failed || u.Asked
	case f.rec.Last.Result == "committed":
		return !u.PostCommit
	case f.rec.Last.Result == "inconsistent", f.did.cleanupFailed:
		return false
	}
	return u.Asked || u.Told && !f.did.failed
}

// waitsAnew tells a run that has come to the wait for a commit, and has not stopped there at once.
func (f *flow) waitsAnew(p *pause) bool {
	return p != nil && p.step == stepCommitWait && (f.did.installed || !slices.Contains(f.stopBefore, stepCommit))
}

// sayDone says what the run has done, or what it failed to do; nothing where it stopped at once.
func (a standalone) sayDone(f *flow, p *pause) {
	did := f.did
	if did.autoCommit && did.installed && (did.committed || did.failed) {
		a.say("Update Module doesn't support rollback. Committing immediately.")
	}
	switch {
	case did.failure != "":
		a.say("%s failed.", did.failure)
	case did.failed:
	case did.committed && did.installed:
		a.say("Installed and committed.")
	case did.committed:
		a.say("Committed.")
	case f.waitsAnew(p):
		a.say("Installed, but not committed.\nUse 'commit' to update, or 'rollback' to roll back the update.")
	case p != nil && p.step == stepInstallWait && did.downloaded:
		a.say("Streamed to storage, but not installed/enabled.")
	case p == nil && a.rec.Last.Result == "committed":
		a.say("Cleaned up.")
	}
}

// sayState says, in one line, what has become of the system.
func (a standalone) sayState(did deeds, u *update, p *pause) {
	var line []string
	add := func(when bool, text string) {
		if when {
			line = append(line, text)
		}
	}
	result := u.soFar(p)
	if p == nil {
		result = a.rec.Last.Result
	}
	lost := result == "inconsistent" && (did.failed || u.Told && p == nil)
	add(lost && !did.noRollback, "Rollback failed. System may be in an inconsistent state.")
	add(lost && did.noRollback, "Update Module does not support rollback. System may be in an inconsistent state.")
	add(result == "failed", "System not modified.")
	add(result == "rolled-back", "Rolled back.")
	add(p == nil && u.PostCommit, "One or more post-commit steps failed.")
	add(did.cleanupFailed, "Cleanup failed.")
	add(did.reboot && !u.Failed, "At least one payload requested a reboot of the device it updated.")
	if line != nil {
		a.say("%s", strings.Join(line, " "))
	}
}

// soFar is the result, by the journal's names, of an update that stopped behind its rollback or
// behind a download that failed; "" for all others, whose result is open.
func (u *update) soFar(p *pause) string {
	switch {
	case p == nil || !u.Failed || p.step != stepFailure && p.step != stepCleanup:
		return ""
	case u.RollbackFailed:
		return "inconsistent"
	case u.RolledBack:
		return "rolled-back"
	}
	return "failed"
}

// adviseNext tells a person, and no script, what to do now.
func (a standalone) adviseNext(f *flow, u *update, p *pause) {
	reboot := f.did.reboot
	switch {
	case p != nil && !f.waitsAnew(p):
		a.lg.infof("stopped before %s; %s", strings.TrimPrefix(string(p.step), "Before_"), nextStep(u, reboot))
	case reboot && p != nil:
		a.lg.infof("%s", nextStep(u, reboot))
	case reboot && u.Failed:
		a.lg.infof("reboot now, to run the system from before")
	case reboot:
		a.lg.infof("reboot now, to run what was installed")
	}
}

// nextStep says what a person does with an update that the journal has; reboot: the machine has to
// restart before anything else.
func nextStep(u *update, reboot bool) string {
	switch {
	case u.Managed:
		return "'mendlet run' goes on with it"
	case u.Step == stepCommitWait && reboot:
		return "reboot now, then 'mendlet commit' (or 'mendlet rollback')"
	case u.Step == stepCommitWait:
		return "'mendlet commit' keeps it, 'mendlet rollback' goes back"
	case u.Step == stepDownload && u.Source == "-":
		return "'mendlet resume' ends it: what came from standard input cannot be read again"
	case u.Step == stepInstallWait, u.Step == stepDownload:
		return "'mendlet resume' goes on with it, 'mendlet rollback' ends it"
	}
	return "'mendlet resume' goes on with it"
}

func (a standalone) rootfsOf(u *update) (*rootfs, bool) {
	return &rootfs{c: a.c, m: a.m, u: u, lg: a.lg}, u.Type == "rootfs-image"
}

// showArtifact and showProvides only read; they work while another mendlet runs.
func (a standalone) showArtifact() error {
	p, err := a.provides()
	if err == nil {
		fmt.Fprintln(a.out, p["artifact_name"])
	}
	return err
}

func (a standalone) showProvides() error {
	p, err := a.provides()
	for _, k := range slices.Sorted(maps.Keys(p)) {
		fmt.Fprintf(a.out, "%s=%s\n", k, p[k])
	}
	return err
}
