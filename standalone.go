// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// standalone has the verbs that a person or a script gives, in the words of Mender's standalone mode.
type standalone struct{ *app }

// print prints a line of the standalone interface; programs that asked for JSON get none.
//
//go:noinline
func (a standalone) print(format string, args ...any) {
	if a.o.progress != "json" {
		printf(a.out, format+"\n", args...)
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
		if resumed, err := a.resumeInstall(ctx, source); resumed || err != nil {
			return err
		}
	}
	if u := a.rec.Update; u != nil {
		a.print("System not modified.")
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
	a.print("Installing artifact...")
	if err := f.accept(ctx, art); err != nil {
		a.rec.Update = nil
		return a.notModified(err)
	}
	if art.Empty {
		return a.installEmpty(ctx, f)
	}
	return a.conclude(f, f.advance(ctx, stepDownload))
}

// resumeInstall goes on with an install that was cut off while its bytes came in, if it is of the
// same source and can be; else it ends that, so that another can begin.
func (a standalone) resumeInstall(ctx context.Context, source string) (resumed bool, err error) {
	u := a.rec.Update
	f, err := a.newFlow()
	if err != nil {
		return false, err
	}
	s := stepCleanup
	if u.Source == source {
		s = f.resume()
	} else {
		f.giveUp(fmt.Errorf("interrupted while downloading, and given up for %q", source))
	}
	if s == stepDownload {
		a.lg.infof("going on with the install of %q that was cut off", u.Artifact)
		return true, a.conclude(f, f.advance(ctx, s))
	}
	if p := f.advance(ctx, s); p != nil {
		return false, p.err
	}
	return false, nil
}

//go:noinline
func (a standalone) notModified(err error) error {
	a.print("Streaming failed.\nSystem not modified.")
	return err
}

// installEmpty: an artifact without payload only changes what the device provides.
func (a standalone) installEmpty(ctx context.Context, f *flow) error {
	if err := f.art.drain(); err != nil {
		a.rec.Update = nil
		return a.notModified(err)
	}
	a.print("Artifact with empty payload. Committing immediately.")
	f.note(eventInstalled)
	f.note(eventCommitted)
	return a.conclude(f, f.advance(ctx, stepCleanup))
}

// errNothing: exit code 2 of commit, rollback and resume.
func errNothing() error {
	return &codedError{code: exitNothing, err: errors.New("no update in progress")}
}

// pending opens the state and the flow of the standalone update in progress.
func (a standalone) pending(ctx context.Context) (*flow, *update, error) {
	if err := a.openState(); err != nil {
		return nil, nil, err
	}
	u := a.rec.Update
	if u == nil {
		a.print("No update in progress.")
		a.warnStray(ctx)
		return nil, nil, told(errNothing())
	}
	if u.Managed {
		return nil, nil, withHint(fmt.Errorf("the update in progress, %q, is a deployment of the server's", u.Artifact),
			"'mendlet run' ends it")
	}
	f, err := a.newFlow()
	return f, u, err
}

func (a standalone) commit(ctx context.Context) error {
	f, u, err := a.pending(ctx)
	if err != nil {
		return err
	}
	switch u.Step {
	case stepCommitWait:
		if err := booted(ctx, f); err != nil {
			return err
		}
		return a.conclude(f, f.advance(ctx, stepCommit))
	case stepCommit:
		return a.conclude(f, f.advance(ctx, f.resume()))
	}
	return withHint(fmt.Errorf("cannot commit: the update of %q is in %s", u.Artifact, u.Step),
		"'mendlet resume' goes on from there")
}

// booted refuses the commit of an image that has not been booted, or of which that is not known: that
// is an early command and not a failed update, so nothing changes.
func booted(ctx context.Context, f *flow) error {
	if f.rec.Update.Type != rootfsImage {
		return nil
	}
	err := f.call(ctx, "ArtifactVerifyReboot")
	if code := exitCode(err); errors.Is(err, errNotRebooted) || code == exitTempFail || code == exitRefused {
		return err
	}
	return nil
}

func (a standalone) rollback(ctx context.Context) error {
	f, u, err := a.pending(ctx)
	if err != nil {
		return err
	}
	switch u.Step {
	case stepInstallWait, stepCommitWait, stepCommitLeaveWait:
		can, err := f.query(ctx, "SupportsRollback")
		if errors.Is(err, errNoTree) || f.handler == nil { // it will fail, and that ends the update
			break
		}
		if err != nil {
			return fmt.Errorf("whether %q can be rolled back is not known: %w", u.Artifact, err)
		}
		if can != "Yes" {
			a.print("Update Module does not support rollback. System may be in an inconsistent state.")
			return withHint(fmt.Errorf("the update module %q does not support rollback: nothing was changed", u.Type),
				"'mendlet commit' keeps it")
		}
	case stepDownload:
		f.keepCause(errors.New("rolled back while downloading"))
		u.Outcome, u.Known = outcomeFailed, true
		return a.conclude(f, f.advance(ctx, stepCleanup))
	case stepInstall, stepCommit, stepRollback: // cut short or failed: the module is not asked
	default:
		return withHint(fmt.Errorf("cannot roll back: the update of %q is in %s", u.Artifact, u.Step),
			"'mendlet resume' goes on from there")
	}
	if u.Step != stepRollback {
		u.Outcome = outcomeRolledBack
	}
	u.Known = true
	return a.conclude(f, f.advance(ctx, stepRollback))
}

func (a standalone) resume(ctx context.Context) error {
	f, _, err := a.pending(ctx)
	if err != nil {
		return err
	}
	return a.conclude(f, f.advance(ctx, f.resume()))
}

// conclude says how a run ended, in the words of Mender's standalone mode, and turns it into
// an exit code.
func (a standalone) conclude(f *flow, p *pause) error {
	if p != nil && p.err != nil {
		return p.err
	}
	u := f.ended
	if p != nil {
		u = a.rec.Update
	}
	reboot := f.has(eventReboot)
	if u.Type == rootfsImage && f.handler != nil { // it is another question after a commit or a rollback
		answer, err := f.query(context.Background(), "NeedsArtifactReboot")
		reboot = err == nil && answer != "No"
	}
	a.reboot = reboot
	a.printDone(f, p)
	a.printState(f, u, p, reboot)
	a.adviseNext(f, u, p, reboot)
	if !f.succeeded(u, p) {
		err := fmt.Errorf("update to %q failed: %s", u.Artifact, u.Cause)
		if f.has(eventFailed) { // this run has said why
			err = told(err)
		}
		return err
	}
	if reboot && a.o.rebootExitCode {
		return &codedError{code: exitReboot}
	}
	return nil
}

// waitsAnew tells a run that has come to the wait for a commit, and has not stopped there at once.
func (f *flow) waitsAnew(p *pause) bool {
	return p != nil && p.step == stepCommitWait && (f.has(eventInstalled) || !slices.Contains(f.stopBefore, stepCommit))
}

// printDone says what the run has done, or what it failed to do; nothing where it stopped at once.
func (a standalone) printDone(f *flow, p *pause) {
	if f.has(eventAutoCommit) && f.has(eventInstalled) && (f.has(eventCommitted) || f.has(eventFailed)) {
		a.print("Update Module doesn't support rollback. Committing immediately.")
	}
	for _, e := range f.events {
		if e == eventStreaming || e == eventInstallation || e == eventCommitting {
			a.print("%s.", e)
			return
		}
	}
	switch {
	case f.has(eventFailed):
	case f.has(eventCommitted) && f.has(eventInstalled):
		a.print("Installed and committed.")
	case f.has(eventCommitted):
		a.print("Committed.")
	case f.waitsAnew(p):
		a.print("Installed, but not committed.\nUse 'commit' to update, or 'rollback' to roll back the update.")
	case p != nil && p.step == stepInstallWait && f.has(eventDownloaded):
		a.print("Streamed to storage, but not installed/enabled.")
	case p == nil && a.rec.Last.Result == "committed":
		a.print("Cleaned up.")
	}
}

// printState says, in one line, what has become of the system.
func (a standalone) printState(f *flow, u *update, p *pause, reboot bool) {
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
	lost := result == "inconsistent" && (f.has(eventFailed) || u.Known && p == nil)
	add(lost && !f.has(eventNoRollback), "Rollback failed. System may be in an inconsistent state.")
	add(lost && f.has(eventNoRollback), "Update Module does not support rollback. System may be in an inconsistent state.")
	add(result == "failed", "System not modified.")
	add(result == "rolled-back", "Rolled back.")
	add(f.has(eventPostCommit) || result == "committed" && u.Cause != "", "One or more post-commit steps failed.")
	add(f.has(eventCleanupFailed), "Cleanup failed.")
	add(reboot && !u.Outcome.bad(), "At least one payload requested a reboot of the device it updated.")
	if line != nil {
		a.print("%s", strings.Join(line, " "))
	}
}

// soFar is the result, by the journal's names, of an update that stopped behind its rollback or
// behind a download that failed; "" for all others, whose result is open.
func (u *update) soFar(p *pause) string {
	if p == nil || p.step != stepFailure && p.step != stepCleanup {
		return ""
	}
	return string(u.Outcome)
}

// adviseNext tells a person, and no script, what to do now.
func (a standalone) adviseNext(f *flow, u *update, p *pause, reboot bool) {
	switch {
	case p != nil && !f.waitsAnew(p):
		a.lg.infof("stopped before %s; %s", strings.TrimPrefix(string(p.step), "Before_"), nextStep(u, reboot))
	case reboot && p != nil:
		a.lg.infof("%s", nextStep(u, reboot))
	case reboot && u.Outcome.bad():
		a.lg.infof("reboot now, to run the system from before")
	case reboot:
		a.lg.infof("reboot now, to run what was installed")
	}
}

// showArtifact and showProvides only read; they work while another mendlet runs.
func (a standalone) showArtifact() error {
	p, err := a.provides()
	if err == nil {
		err = printf(a.out, "%s\n", p["artifact_name"])
	}
	return err
}

func (a standalone) showProvides() error {
	p, err := a.provides()
	for _, k := range sortedKeys(p) {
		printf(a.out, "%s=%s\n", k, p[k])
	}
	return err
}
