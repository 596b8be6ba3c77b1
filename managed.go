// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// Managed mode: what a Mender server has deployed is installed and reported. One run is one
// process that ends; a daemon is the same thing in a loop.

func bootstrapFlags(fs *flag.FlagSet, o *options) {
	keyFlags(fs, o)
	for _, name := range []string{"F", "forcebootstrap"} {
		fs.BoolVar(&o.force, name, o.force, "make a new key, even if there is one: the server sees a new device "+
			"then, which has to be accepted again, and the old one stays there without a device")
	}
}

func runFlags(fs *flag.FlagSet, o *options) {
	bootstrapFlags(fs, o)
	sourceFlags(fs, o)
	fs.DurationVar(&o.deadline, "deadline", time.Hour,
		"give up for this run after this `TIME` without a byte of progress")
	fs.DurationVar(&o.splay, "splay", 0,
		"wait first: a part of this `TIME` that is the same for this device every time (do not wait)")
	channelFlags(fs, o)
	fs.BoolVar(&o.noReboot, "no-reboot", false, "never restart the machine; exit with 4 when it is needed")
}

func lookFlags(fs *flag.FlagSet, o *options) {
	keyFlags(fs, o)
	channelFlags(fs, o)
	jsonFlag(fs, o)
}

func runOnceFlags(fs *flag.FlagSet, o *options) {
	runFlags(fs, o)
	fs.BoolVar(&o.atOnce, "now", false,
		"for a person at the device: wait neither for the time that earlier failures, "+
			"or the server, have set nor for --splay")
}

// recovery and leftOut: see nonet.go.
const recovery = false

func leftOut(name string) string {
	switch name {
	case "auth-daemon":
		name = "dbus"
	case "fleet":
		name = "fleet, and without nopublish"
	case "monitor", "connect":
	default:
		return ""
	}
	return "it takes a mendlet that was built without the tag no" + name
}

func netVerbs() []verb {
	plain := func(run func(context.Context, *app) error) func(context.Context, *app, []string) error {
		return func(ctx context.Context, a *app, _ []string) error { return run(ctx, a) }
	}
	return []verb{
		{"run", "", "poll the server once, do what it says, exit", 0, runOnceFlags, plain(runOnce)},
		{"daemon", "", "the same in a loop", 0, runFlags, plain(runDaemon)},
		{"check-update", "", "ask the server what it has for this device; changes nothing", 0, lookFlags,
			plain(checkUpdate)},
		{"send-inventory", "", "send the inventory now", 0, keyFlags, plain(inventoryNow)},
		{"bootstrap", "", "make the device key and introduce the device", 0, bootstrapFlags, plain(bootstrapDevice)},
	}
}

// round is what happens between the device and the source of its deployments, once or in a loop.
type round struct {
	deploymentRun
	server  *session // kept between the rounds of a daemon, as the channel is
	channel *channel
}

//go:noinline
func newRound(a *app) *round {
	r := &round{deploymentRun: deploymentRun{a: a, progress: func() {}}, server: newSession(a)}
	r.choose()
	return r
}

// choose finds the source: of the update in progress, else the one that is configured.
func (r *round) choose() {
	r.from = r.server
	if c := channelSource(r.a, newClient, timeFloor, deviceIdentity); c != nil {
		if r.channel == nil || r.channel.at != c.at {
			r.channel = c
		}
		r.from = r.channel
	}
}

// runOnce is one round: what is open in the journal first, then inventory and poll. The
// journal's lock and wait come before the splay, so that a cron of every minute does not
// pile up processes; an update in progress does not wait for its part of the hour.
func runOnce(ctx context.Context, a *app) error {
	if err := a.openState(); err != nil {
		return err
	}
	stick := a.o.channel != "" && !isURL(a.o.channel) // has nothing to do with what failed over a network
	if err := notBefore(a); err != nil && !a.o.atOnce && !stick {
		return err
	}
	if d := a.o.splay; d > 0 && a.rec.Update == nil && !a.o.atOnce {
		id, err := newRound(a).from.identity(ctx)
		if err != nil {
			return err
		}
		if err := sleepContext(ctx, splay(id, d)); err != nil {
			return tryLater("interrupted: %w", err)
		}
	}
	return newRound(a).timedRound(ctx, true)
}

// notBefore is an error while a wait after failures lasts. A wait beyond what is ever asked
// for was journaled under another clock and does not count.
func notBefore(a *app) error {
	n := a.rec.net()
	if wait := time.Until(n.NextTry); wait > 0 && wait <= maxRetryAfter {
		return withHint(tryLater("not before %s, in %s; failures in a row: %d, the last: %s", n.NextTry.Format(time.RFC3339),
			wait.Round(time.Second), n.Failures, n.Failure), "'mendlet run --now' does not wait")
	}
	return nil
}

// errDeadline ends a run that makes no progress.
var errDeadline = tryLater("no progress before the deadline")

// timedRound is a round that ends when nothing has come in for the deadline's time.
func (r *round) timedRound(outer context.Context, poll bool) error {
	a := r.a
	ctx, stop := context.WithCancelCause(outer)
	defer stop(nil)
	watch := time.AfterFunc(a.o.deadline, func() { stop(errDeadline) })
	defer watch.Stop()
	r.progress = func() { watch.Reset(a.o.deadline) }
	a.rec.net().NextTry = time.Time{} // this is the next try; whatever it saves says so
	r.choose()
	r.from.begin()
	last := a.rec.Last
	err := r.once(ctx, poll)
	return r.scheduleRetry(outer, err, a.rec.Last != last)
}

// scheduleRetry journals when the next try may be made after a failure between us and the
// server. ended: the failure is that of a deployment, which has had its verdict.
func (r *round) scheduleRetry(outer context.Context, err error, ended bool) error {
	n := r.a.rec.net()
	r.from.remember()
	switch code := exitCode(err); {
	case outer.Err() != nil || code == exitRefused:
	case code == exitTempFail || (httpStatus(err) != 0 || isDistrust(err)) && !ended:
		n.Failures++
		n.Failure = oneLine(fmt.Sprintf("%.300s", err))
		wait := retryAfterOf(err)
		if wait == 0 {
			wait = backoff(n.Failures, seconds(r.a.c.RetryPollIntervalSeconds))
		} else {
			n.Failure += "; so long the server asks to be left alone"
		}
		n.NextTry = time.Now().Add(wait).UTC().Truncate(time.Second)
	default:
		n.Failures, n.Failure = 0, ""
	}
	if kerr := keep(r.a); kerr != nil {
		r.a.lg.warnf("%v", kerr)
	}
	if jerr := r.a.j.save(r.a.rec); jerr != nil {
		return errors.Join(err, jerr)
	}
	return err
}

func (r *round) once(ctx context.Context, poll bool) error {
	a := r.a
	if u := a.rec.Update; u != nil {
		if !u.Managed {
			return withHint(fmt.Errorf("a standalone update, %q, is in progress", u.Artifact),
				"end it with 'mendlet commit' or 'mendlet rollback'")
		}
		return r.refreshInventory(ctx, r.resume(ctx))
	}
	a.warnStray(ctx)
	if err := r.from.ready(); err != nil {
		return err
	}
	sc := newScripts(a.c, a.lg)
	for _, action := range []string{"Enter", "Leave"} {
		if err := sc.runState(ctx, "Idle", action); err != nil {
			a.lg.warnf("%v", err)
		}
	}
	dep, err := r.sync(ctx, sc, poll)
	if err != nil || dep == nil {
		return err
	}
	return r.refreshInventory(ctx, r.deploy(ctx, dep))
}

// refreshInventory tells the source what the device is now, if a deployment has just ended.
func (r *round) refreshInventory(ctx context.Context, err error) error {
	if r.a.rec.Update == nil {
		if ierr := r.from.inventory(ctx, true); ierr != nil {
			r.a.lg.warnf("%v", ierr)
		}
	}
	return err
}

// sync is the Sync state: inventory when it is due, then the question for a deployment.
func (r *round) sync(ctx context.Context, sc *scripts, poll bool) (*deployment, error) {
	var dep *deployment
	err := sc.runState(ctx, "Sync", "Enter")
	if err == nil {
		dep, err = r.from.exchange(ctx, poll)
	}
	if err == nil {
		err = sc.runState(ctx, "Sync", "Leave")
	}
	if err != nil {
		if serr := sc.runState(ctx, "Sync", "Error"); serr != nil {
			r.a.lg.warnf("%v", serr)
		}
		return nil, err
	}
	return dep, nil
}

// daemon is a round in a loop: polls, retries after failures, inventory.
type daemon struct {
	*round
	poll, inventory, tick time.Time // when they are due; monotonic
}

// runDaemon does a round whenever one is due. SIGUSR1 polls now, SIGUSR2 sends the inventory now.
func runDaemon(ctx context.Context, a *app) error {
	if err := a.openState(); err != nil {
		return err
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	if err := a.j.markDaemon(); err != nil { // after the signals, which it calls for
		a.lg.warnf("%v", err)
	}
	now := time.Now()
	d := &daemon{newRound(a), now, now, now}
	for d.wait(ctx, signals) {
		if notBefore(a) != nil || time.Until(d.poll) > 0 && time.Until(d.inventory) > 0 && a.rec.net().NextTry.IsZero() {
			continue
		}
		if time.Until(d.inventory) <= 0 {
			a.rec.net().InventoryTime = time.Time{}
		}
		open := a.rec.Update != nil
		err := d.timedRound(ctx, time.Until(d.poll) <= 0)
		if err != nil && ctx.Err() == nil {
			a.lg.fail(err)
		}
		if exitCode(err) == exitReboot || d.from == d.server && len(a.c.Servers) == 0 && a.rec.Update == nil {
			return told(err)
		}
		if !a.rec.net().NextTry.IsZero() || open && a.rec.Update == nil {
			continue // what was due still is
		}
		if time.Until(d.poll) <= 0 {
			d.poll = time.Now().Add(d.from.every())
		}
		if time.Until(d.inventory) <= 0 {
			d.inventory = time.Now().Add(seconds(a.c.InventoryPollIntervalSeconds))
		}
	}
	return nil
}

// wait does what is due beside updates, and waits until something is due or a signal says so; false: the
// daemon is to end.
func (d *daemon) wait(ctx context.Context, signals <-chan os.Signal) bool {
	a := d.a
	if a.beside.tick != nil && time.Until(d.tick) <= 0 && ctx.Err() == nil {
		d.tick = time.Now().Add(a.beside.tick(ctx, d.from))
	}
	wait := min(time.Until(d.poll), time.Until(d.inventory))
	if notBefore(a) != nil {
		wait = time.Until(a.rec.net().NextTry)
	}
	if a.beside.tick != nil {
		wait = min(wait, time.Until(d.tick))
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case sig := <-signals:
		a.rec.net().NextTry = time.Time{}
		if d.poll = time.Now(); sig == syscall.SIGUSR2 {
			d.poll, d.inventory = d.poll.Add(d.from.every()), d.poll
			a.rec.net().InventoryHash = ""
		}
	case <-timer.C:
	}
	return true
}

// tellDaemon signals the daemon, if there is one.
//
//go:noinline
func tellDaemon(a *app, sig syscall.Signal) (told bool, err error) {
	pid, err := daemonOf(a.c.paths.ds)
	if pid == 0 {
		return false, err
	}
	p, err := os.FindProcess(pid) // from here on it stands for this process, and for no other that gets the number
	if err != nil {
		return false, err
	}
	again, err := daemonOf(a.c.paths.ds)
	switch {
	case err != nil:
	case again != pid:
		err = fmt.Errorf("the daemon, process %d, has just ended", pid)
	default:
		err = p.Signal(sig)
		a.lg.infof("told the daemon, process %d", pid)
	}
	return true, err
}

// checkUpdate asks and says; nothing changes, here or on the server.
func checkUpdate(ctx context.Context, a *app) error {
	var err error
	if a.rec, err = a.peek(); err != nil {
		return err
	}
	a.nameUnsaved()
	return newRound(a).from.look(ctx)
}

func inventoryNow(ctx context.Context, a *app) error {
	if err := a.openState(); err != nil {
		return err
	}
	s := newSession(a)
	if err := s.ready(); err != nil {
		return err
	}
	if err := s.inventory(ctx, true); err != nil {
		return err
	}
	return errors.Join(keep(a), a.j.save(a.rec))
}
