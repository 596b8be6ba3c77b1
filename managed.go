// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"cmp"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Managed mode: what a Mender server has deployed is installed and reported. One run is one
// process that ends; a daemon is the same thing in a loop.

// appliedConfig is the file in which mender-configure keeps what it has applied.
const appliedConfig = "/var/lib/mender-configure/device-config.json"

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
	deltaFlag(fs, &o.delta)
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

// deploymentSource says what is to be installed on this device, and hears how that went: a server, or a
// channel file. What is above it does not know which.
type deploymentSource interface {
	// ready makes what it takes to ask.
	ready() error
	// identity is who the device is to the source.
	identity(ctx context.Context) (string, error)
	// begin is called before each round.
	begin()
	// exchange tells what the source is owed and, with poll, asks what to install; nil: nothing.
	exchange(ctx context.Context, poll bool) (*deployment, error)
	// again asks for the deployment in progress once more. errAborted: it is not wanted any more.
	again(ctx context.Context, u *update) (*deployment, error)
	// client is what downloads are made with; of a source that is ready.
	client() *agent
	// status tells how far a deployment is. errAborted: it is not wanted any more.
	status(ctx context.Context, id, status string) error
	// alive proves that the system as it is now, which may be new, gets through to the source.
	alive(ctx context.Context) error
	// verdict tells how a deployment has ended.
	verdict(ctx context.Context, v *verdict) error
	// inventory tells what the device is, when that is due or forced.
	inventory(ctx context.Context, force bool) error
	// alert tells at once of what has changed beside updates. errNoAlerts: there the inventory is what tells it.
	alert(ctx context.Context, body []byte) error
	// every is how long a daemon waits between two questions.
	every() time.Duration
	// look asks and says, and changes nothing.
	look(ctx context.Context) error
	// remember keeps in the record what the next run is to know of the source.
	remember()
}

// round is what happens between the device and the source of its deployments, once or in a loop.
type round struct {
	a        *app
	server   *session // kept between the rounds of a daemon, as the channel is
	channel  *channel
	from     deploymentSource // of this round
	dep      *deployment      // as offered in this run
	log      *deployLog
	mu       sync.Mutex    // over dep and what follows while an artifact comes in, maybe in several parts at once
	progress func()        // there was progress
	asked    time.Time     // when the source last heard of the download
	patience time.Duration // until it hears the next time
}

//go:noinline
func newRound(a *app) *round {
	r := &round{a: a, server: newSession(a), progress: func() {}}
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

// session is a server as a source.
type session struct {
	a     *app
	hc    *agent
	api   *apiClient // nil until ready
	looks bool       // and changes nothing: no key is made
	anew  bool       // to be another device to the server is what is meant
}

// buildMoment is when this program was built, the zero time if that is not known.
func buildMoment() time.Time {
	n, err := strconv.ParseInt(buildTime, 10, 64)
	if err != nil || n <= 0 {
		return time.Time{}
	}
	return time.Unix(n, 0)
}

// timeFloor is the floor of the time: no clock that shows less is right. A journal from more
// than 20 years after the build was saved under a clock that was wrong.
func timeFloor(a *app) time.Time {
	build := buildMoment()
	floor := clockFloor(build, append(a.c.verifyKeys(), deviceKeyPath(a.c), a.o.mainConfig())...)
	if a.rec != nil && a.rec.Time.After(floor) && (build.IsZero() || a.rec.Time.Before(build.AddDate(20, 0, 0))) {
		floor = a.rec.Time
	}
	return floor
}

// newClient makes the client; about is what it says of this device behind its version. It goes on with the TLS
// sessions that the last run left.
func newClient(a *app, about string) (*agent, error) {
	if a.o.net.kept == nil {
		a.o.net.kept = lastKept(a.c, versionString(), a.lg)
	}
	o := netOptions{floor: timeFloor(a), version: versionString() + about, sessions: &a.o.net.kept.sessions, lg: a.lg}
	if a.o.net.tuneNet != nil {
		a.o.net.tuneNet(&o)
	}
	return newHTTPClient(a.c, o)
}

// urlSource is install's way to the network: without authentication.
func urlSource(a *app, url string) *source {
	var hc *agent
	open := func(ctx context.Context, o downloadOptions, want sourceID) (*download, sourceID, error) {
		if hc == nil {
			var err error
			if hc, err = newClient(a, ""); err != nil {
				return nil, sourceID{}, err
			}
		}
		return openHTTP(ctx, a, hc, url, o, want)
	}
	return &source{
		open: func(ctx context.Context, off int64, want sourceID) (io.ReadCloser, sourceID, error) {
			return open(ctx, downloadOptions{offset: off}, want)
		},
		span: func(ctx context.Context, id sourceID) (spanReader, error) {
			d, _, err := open(ctx, downloadOptions{same: true}, id)
			return d, err
		},
	}
}

// openHTTP downloads url as o says: from an offset on, or in spans, of what is known as want.
func openHTTP(ctx context.Context, a *app, hc *agent, url string, o downloadOptions, want sourceID) (
	*download, sourceID, error) {
	o.retries, o.limitRate, o.lg = cmp.Or(o.retries, a.c.RetryDownloadCount), a.o.net.limitRate, a.lg
	if o.offset > 0 || o.same {
		o.size = max(want.Size, 0)
		if o.etag = want.Tag; !strings.HasPrefix(want.Tag, `"`) && !strings.HasPrefix(want.Tag, "W/") {
			o.etag, o.lastModified = "", want.Tag
		}
	} else if u := a.rec.Update; u == nil || !u.WholeImage {
		o.first = deltaStart(cmp.Or(a.o.delta, a.c.Delta), a.c.paths.ds)
	}
	if a.src != nil {
		o.mixed = func() { a.src.mixed = true }
	}
	if a.o.net.tuneDownload != nil {
		a.o.net.tuneDownload(&o)
	}
	d, err := openDownload(ctx, hc, url, o)
	if err != nil {
		return nil, sourceID{}, err
	}
	if d.Whole {
		a.src.whole = true
	}
	return d, sourceID{Name: d.URLKey, Size: d.Size, Tag: cmp.Or(d.ETag, d.LastModified)}, nil
}

//go:noinline
func newSession(a *app) *session { return &session{a: a} }

func (s *session) every() time.Duration { return seconds(s.a.c.UpdatePollIntervalSeconds) }

func (s *session) client() *agent { return s.hc }

// ready makes what it takes to talk to the server. An update that has broken that, such as
// a configuration without a server, counts as one that cannot reach it any more.
func (s *session) ready() error {
	if s.api != nil {
		return nil
	}
	a := s.a
	if len(a.c.Servers) == 0 {
		return withHint(errors.New("no server is configured"),
			"set ServerURL in %q, or see 'mendlet setup --help'", a.o.mainConfig())
	}
	pass, err := readPassphrase(a.o.passphrase, a.in)
	if err != nil {
		return err
	}
	key, err := s.key(pass)
	if err != nil {
		return err
	}
	s.anew = s.anew || a.o.force
	a.o.force = false // once per process
	if s.hc, err = newClient(a, ""); err != nil {
		return err
	}
	s.api = newAPIClient(a.c, s.hc, s.identity, key, a.lg)
	s.api.kept = a.o.net.kept
	if n := a.rec.net(); n != nil {
		s.api.v1Only = n.V1Only
	}
	s.begin()
	return nil
}

// keep leaves token and TLS sessions to the next run. After two failures one of these may be what is wrong, and
// the third run begins without.
func keep(a *app) error {
	k := a.o.net.kept
	if k == nil {
		return nil
	}
	if n := a.rec.net(); n != nil && n.Failures > 1 {
		k.drop()
	}
	return k.save(a.c)
}

// key is the device's key. One that the server has accepted and that is gone is not replaced.
func (s *session) key(pass []byte) (crypto.Signer, error) {
	a, n := s.a, s.a.rec.net()
	accepted := n != nil && (n.Identity != "" || n.Device != "" || a.rec.Update != nil && a.rec.Update.Managed)
	if !s.looks && (!accepted || a.o.force) {
		return deviceKey(a.c, pass, a.o.force, a.lg)
	}
	key, err := knownKey(a.c, pass, a.lg)
	if accepted && errors.Is(err, os.ErrNotExist) {
		err = withHint(refuse("%w, and the server has accepted one", err),
			"put it back; with --forcebootstrap the device gets a new one, with which it has to be accepted anew")
	}
	return key, err
}

// identity is who the device says it is. It is not another one without a word: to the server it would be another
// device, and the old one be gone.
func (s *session) identity(ctx context.Context) (string, error) {
	a, n := s.a, s.a.rec.net()
	id, err := deviceIdentity(ctx, a)
	if err != nil || n == nil || n.Identity == "" || n.Identity == sha256Hex([]byte(id)) || s.anew || a.o.force {
		return id, err
	}
	err = refuse("the device's identity is now %s, and that is not the one which the server has accepted", id)
	script := identityScript(a.c)
	if _, serr := os.Stat(script); errors.Is(serr, os.ErrNotExist) {
		return "", withHint(err, "put the identity script %q back; --forcebootstrap to be another device to the server",
			script)
	}
	return "", withHint(err, "mend what %q prints; --forcebootstrap to be another device to the server", script)
}

// begin has the server asked first that has answered before, for a day: with the first of several
// dead, each run would wait for it.
func (s *session) begin() {
	if s.api == nil {
		return
	}
	s.api.first = ""
	if n := s.a.rec.net(); n != nil {
		if age := time.Since(n.ServerTime); age >= 0 && age < 24*time.Hour {
			s.api.first = n.Server
		}
	}
}

// remember keeps in the record what the next run is to know of the server.
func (s *session) remember() {
	n := s.a.rec.net()
	if s.api == nil {
		return
	}
	n.V1Only = s.api.v1Only
	s.rememberIdentity()
	if base := s.api.base; len(s.a.c.Servers) > 1 && base != "" && base != s.api.first {
		n.Server, n.ServerTime = base, time.Now().UTC().Truncate(time.Second)
	}
	s.forget()
}

// rememberIdentity keeps in the record as whom the server has accepted the device.
func (s *session) rememberIdentity() {
	if id := s.api.accepted; id != "" {
		s.a.rec.net().Identity = sha256Hex([]byte(id))
	}
}

// forget drops what the server was told of the device, when it may know nothing of it any more: it
// was refused, or is another one to the server since it was decommissioned and accepted anew.
func (s *session) forget() (forgot bool) {
	n, id := s.a.rec.net(), s.api.device
	if forgot = s.api.refused || id != "" && id != n.Device; forgot {
		n.InventoryHash, n.ConfigHash, n.InventoryTime = "", "", time.Time{}
	}
	n.Device, s.api.refused = cmp.Or(id, n.Device), false
	return forgot
}

// forgetLater is forget for a verb that changes nothing else. Where the journal is in use, that run
// finds out by itself.
func (s *session) forgetLater() {
	if s.api == nil || !s.api.refused {
		return
	}
	if rec, err := s.a.peek(); err != nil || rec.net().InventoryTime.IsZero() {
		return // there is nothing to forget
	}
	j, rec, err := s.a.openJournal(s.a.c.paths.ds, nil)
	if err != nil {
		return
	}
	defer j.close()
	n := rec.net()
	n.InventoryHash, n.ConfigHash, n.InventoryTime = "", "", time.Time{}
	if err := errors.Join(j.save(rec), keep(s.a)); err != nil {
		s.a.lg.warnf("%v", err)
	}
}

func deviceIdentity(ctx context.Context, a *app) (string, error) {
	return readIdentity(ctx, a.c, a.m.path("/sys"), a.lg)
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

// attempts is how many tries the schedule has before it is given up (RetryPollCount, or
// until its longest wait was used three times).
func (r *round) attempts() int {
	if n := r.a.c.RetryPollCount; n > 0 {
		return n
	}
	limit := max(seconds(r.a.c.RetryPollIntervalSeconds), time.Minute)
	n := 3
	for d := time.Minute; d < limit; d *= 2 {
		n += 3
	}
	return n
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

func (s *session) exchange(ctx context.Context, poll bool) (*deployment, error) {
	if err := s.sendPending(ctx); err != nil {
		return nil, err
	}
	if err := s.api.login(ctx); err != nil {
		return nil, err
	}
	s.forget()
	if err := s.inventory(ctx, false); err != nil || !poll {
		return nil, err
	}
	body, err := s.a.nextBody(s.a.rec.Provides)
	if err != nil {
		return nil, err
	}
	dep, err := s.api.nextDeployment(ctx, body)
	if errors.Is(err, errAborted) {
		s.a.lg.warnf("%v", err) // what the server has just ended, this device knows nothing of
		err = nil
	}
	if err == nil && dep == nil {
		s.a.lg.infof("nothing is deployed for this device")
		if s.forget() { // the token was replaced on the way
			err = s.inventory(ctx, false)
		}
	}
	if dep != nil {
		s.rememberIdentity()
		dep.Request = body
	}
	return dep, err
}

// deploy begins what has been deployed. A deployment that has its verdict already is
// offered again only when the server did not hear it: then it is told once more.
func (r *round) deploy(ctx context.Context, dep *deployment) error {
	a := r.a
	if v := a.rec.Last; v != nil && v.ID == dep.ID && !dep.Again {
		a.lg.infof("deployment %q has ended as %s already: telling the server again", dep.ID, v.Result)
		return r.from.verdict(ctx, v)
	}
	r.dep = dep
	a.rec.Update = &update{Step: stepDownload, Managed: true, ID: dep.ID, Artifact: dep.ArtifactName, Request: dep.Request,
		Source: dep.Source}
	r.openLog()
	defer r.closeLog()
	a.lg.infof("deployment %q: artifact %q", dep.ID, dep.ArtifactName)
	f, err := r.newFlow(ctx)
	if err != nil {
		return err
	}
	return r.conclude(f, f.advance(ctx, stepDownload))
}

// resume continues the deployment in the journal.
func (r *round) resume(ctx context.Context) error {
	u := r.a.rec.Update
	r.openLog()
	defer r.closeLog()
	r.a.lg.infof("going on with deployment %q in %s", u.ID, u.Step)
	f, err := r.newFlow(ctx)
	if err != nil {
		return err
	}
	return r.conclude(f, f.advance(ctx, f.resume()))
}

func (r *round) newFlow(ctx context.Context) (*flow, error) {
	r.a.src = &source{open: r.open,
		span: func(ctx context.Context, id sourceID) (spanReader, error) {
			in, _, err := r.openDeployed(ctx, downloadOptions{same: true}, id)
			return in, err
		},
	}
	f, err := r.a.newFlow()
	if err != nil {
		return nil, err
	}
	f.stopBefore, f.mode = nil, managedMode
	f.fetch, f.deviceType = r.fetch, r.a.serverType
	f.reportStatus, f.checkServer, f.reportVerdict = r.reportStatus, r.checkServer, r.reportVerdict
	f.beforeReboot = func() {
		if r.log != nil {
			r.log.sync()
		}
	}
	// A flow shields its steps from signals, but one that waits to go down must heed them.
	f.reboot = func(context.Context) error { return rebootMachine(ctx, r.a) }
	if r.a.rebootHook != nil {
		f.reboot = r.a.rebootHook
	}
	return f, nil
}

// openLog begins or goes on with the deployment's log. It takes what is logged from now on.
func (r *round) openLog() {
	l, err := openDeployLog(r.a.c.UpdateLogPath, r.a.rec.Update.ID)
	if err != nil {
		r.a.lg.warnf("no deployment log: %v", err)
		return
	}
	r.log, r.a.lg.tee = l, l.add
}

//go:noinline
func (r *round) closeLog() {
	if r.log != nil {
		r.a.lg.tee = nil
		r.log.close()
		r.log = nil
	}
}

func (r *round) conclude(f *flow, p *pause) error {
	if p != nil {
		return p.err
	}
	if v := r.a.rec.Last; v.Result != "committed" {
		if r.log != nil {
			r.log.add(time.Now(), levelError, lastLine(v))
		}
		return fmt.Errorf("deployment %q of %q: %s", v.ID, v.Artifact, v.Result)
	}
	r.a.lg.infof("deployment %q of %q: success", f.ended.ID, f.ended.Artifact)
	return nil
}

// lastLine is that of a failed deployment's log: whoever reads its log wants to know the cause.
func lastLine(v *verdict) string {
	return oneLine(fmt.Sprintf("deployment %q of %q: %s: %s", v.ID, v.Artifact, v.Result, v.Cause))
}

// fetch opens the artifact, which must be the one that the deployment names.
func (r *round) fetch(ctx context.Context) (*artifact, error) {
	art, err := r.fetchAny(ctx)
	if err != nil {
		return nil, r.countUseless(err)
	}
	if r.a.c.DeviceTier == "system" && art.PayloadType != "mender-orchestrator-manifest" {
		return nil, refuse("payload type %q: a device of DeviceTier system takes mender-orchestrator-manifest only",
			art.PayloadType)
	}
	if u := r.a.rec.Update; u.Artifact != "" && art.Name != u.Artifact {
		return nil, fmt.Errorf("deployment %q: got artifact %q, want %q", u.ID, art.Name, u.Artifact)
	}
	return art, nil
}

// fetchAny opens the artifact from the first of the places that have it. A run that goes on after tries without
// progress begins with another one.
func (r *round) fetchAny(ctx context.Context) (*artifact, error) {
	if r.dep == nil {
		if err := r.refresh(ctx); err != nil {
			return nil, err
		}
	}
	places := append([]string{r.dep.URI}, r.dep.Others...)
	for i := range places {
		at := (i + r.a.rec.Update.Tries) % len(places)
		r.dep.URI, r.a.src.manifest = places[at], r.dep.Manifest
		if !isURL(places[at]) {
			r.a.src.span = nil
		}
		art, err := r.a.fetch(ctx)
		if !isTemporary(err) || ctx.Err() != nil || i == len(places)-1 {
			return art, err
		}
		r.a.lg.warnf("%v; asking elsewhere", err)
	}
	return nil, nil // there is one place at least
}

// countUseless counts the runs in which something other than an artifact came, or somebody else than
// its server answered. That is no verdict on the artifact, which the server has seen as one, and may be
// over later; but there are as many of them as of downloads that get no further.
func (r *round) countUseless(err error) error {
	useless := errors.Is(err, errUseless) || errors.Is(err, errNoArtifact) || isDistrust(err) && !isTemporary(err)
	if !useless || r.dep != nil && r.dep.Manifest != "" {
		return err
	}
	u := r.a.rec.Update
	if u.Tries++; u.Tries >= maxTries {
		return fmt.Errorf("no progress in %d downloads: %s", maxTries, err)
	}
	return tryLater("%w", err)
}

// open is the source of the deployment's artifact. After a pause its source is asked again, for a link that is
// still good.
func (r *round) open(ctx context.Context, off int64, want sourceID) (in io.ReadCloser, id sourceID, err error) {
	if r.dep == nil {
		if err := r.refresh(ctx); err != nil {
			return nil, id, err
		}
	}
	dep := r.dep
	if isURL(dep.URI) {
		in, id, err = r.openDeployed(ctx, downloadOptions{offset: off}, want)
	} else if in, id, err = openFile(ctx, dep.URI, off, want); err == nil {
		in = &progressReader{in, nil, ctx, r}
	}
	if err == nil && dep.Size > 0 && id.Size >= 0 && id.Size != dep.Size {
		in.Close()
		err = fmt.Errorf("%q: got %d bytes, want %d", id.Name, id.Size, dep.Size)
	}
	if err != nil && dep.Manifest != "" {
		err = tryLater("release %q is not there, or not yet: %w", dep.ArtifactName, err)
	}
	if err != nil {
		return nil, id, err
	}
	return in, id, nil
}

// openDeployed opens it, or parts of it, at its URL.
func (r *round) openDeployed(ctx context.Context, o downloadOptions, want sourceID) (
	*progressReader, sourceID, error) {
	r.mu.Lock()
	var err error
	if r.dep == nil {
		err = r.refresh(ctx)
	}
	dep := r.dep
	r.mu.Unlock()
	if err != nil {
		return nil, sourceID{}, err
	}
	if dep.Manifest != "" { // a link for ever
		o.size = dep.Size
	} else {
		o.relink = func(ctx context.Context) (string, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			err := r.refresh(ctx)
			return r.dep.URI, err
		}
	}
	if len(dep.Others) > 0 { // soon it is another's turn
		o.retries = 2
	}
	d, id, err := openHTTP(ctx, r.a, r.from.client(), dep.URI, o, want)
	if err != nil {
		return nil, id, err
	}
	return &progressReader{d, d, ctx, r}, id, nil
}

// refresh asks for the deployment again; another one, or none, means that ours has ended.
func (r *round) refresh(ctx context.Context) error {
	u := r.a.rec.Update
	if err := r.from.ready(); err != nil {
		return err
	}
	dep, err := r.from.again(ctx, u)
	if err == nil {
		r.dep = dep
	}
	return err
}

// again asks for the deployment in the very words of the first time.
func (s *session) again(ctx context.Context, u *update) (*deployment, error) {
	dep, err := s.api.nextDeployment(ctx, u.Request)
	if isDistrust(err) { // it was trusted when it deployed this; so somebody is in between
		err = tryLater("%w", err)
	}
	if err == nil && (dep == nil || dep.ID != u.ID) {
		err = fmt.Errorf("deployment %q is not offered any more: %w", u.ID, errAborted)
	}
	return dep, err
}

// progressReader tells the watchdog that bytes come in.
type progressReader struct {
	io.ReadCloser
	download *download // for parts; nil: a file
	ctx      context.Context
	r        *round
}

func (k *progressReader) span(off, end int64) error { return k.download.span(off, end) }

func (k *progressReader) want(end int64) int64 {
	if k.download == nil {
		return 0
	}
	return k.download.want(end)
}

func (k *progressReader) Read(p []byte) (int, error) {
	n, err := k.ReadCloser.Read(p)
	k.r.a.fetched.Add(int64(n))
	if n > 0 && k.ctx.Err() == nil { // else the deployment may be done with
		k.r.mu.Lock()
		defer k.r.mu.Unlock()
		k.r.progress()
		if unwanted := k.r.stillWanted(k.ctx); unwanted != nil {
			return n, unwanted
		}
	}
	return n, err
}

// reportStatus tells the source how far the deployment is.
func (r *round) reportStatus(ctx context.Context, status string) error {
	if err := r.from.ready(); err != nil {
		return err
	}
	r.asked, r.patience = r.a.now(), askEvery
	return r.from.status(ctx, r.a.rec.Update.ID, status)
}

// askEvery is how often a long download is told of, and how long that may take: the line may be a
// metered one, and the deployment have been aborted. When the server does not answer it is asked less.
const (
	askEvery   = time.Minute
	askTimeout = 15 * time.Second
	askLater   = 5 * time.Minute
)

func (s *session) status(ctx context.Context, id, status string) error {
	return s.api.status(ctx, id, status)
}

// stillWanted is an error when the server has aborted the deployment that is being downloaded.
func (r *round) stillWanted(ctx context.Context) error {
	if r.a.now().Sub(r.asked) < r.patience {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err := r.reportStatus(ctx, "downloading")
	if err != nil {
		r.patience = askLater
		r.a.lg.debugf("status not reported: %v", err)
	}
	if errors.Is(err, errAborted) {
		return err
	}
	return nil
}

// countTries counts the tries of something that must succeed in the end, over all runs, and
// turns the last failure into a final one. An abort is final at once, and so is what the
// server finds too large; a run that is told to end has not tried.
func (r *round) countTries(ctx context.Context, err error) error {
	u := r.a.rec.Update
	switch {
	case err == nil:
		u.Tries = 0
		return nil
	case ctx.Err() != nil:
		return tryLater("interrupted: %w", context.Cause(ctx))
	case errors.Is(err, errAborted), httpStatus(err) == http.StatusRequestEntityTooLarge:
		return err
	}
	if u.Tries++; u.Tries < r.attempts() {
		return tryLater("%w", err)
	}
	u.Tries = 0
	return fmt.Errorf("given up after %d tries: %s", r.attempts(), err)
}

// checkServer reports "installing" once more to a source that it gets through to, though the update may have
// changed identity, keys or the network: a device that cannot get through any more must roll back. A connection from
// before an update without a reboot would prove nothing.
func (r *round) checkServer(ctx context.Context) error {
	err := r.from.ready()
	if err == nil {
		r.from.client().CloseIdleConnections()
		r.a.o.net.kept.drop() // the handshake is to be a whole one
		err = r.from.alive(ctx)
	}
	if err == nil {
		err = r.reportStatus(ctx, "installing")
	}
	return r.countTries(ctx, err)
}

func (s *session) alive(ctx context.Context) error {
	s.api.dropToken()
	return s.api.authenticate(ctx)
}

// reportVerdict reports the verdict of the update in progress. When that is given up, so that the
// device can have other updates, it stays on the list of what the server is owed.
func (r *round) reportVerdict(ctx context.Context) error {
	v := r.a.rec.Last
	err := r.countTries(ctx, r.from.verdict(ctx, v))
	if err != nil && !isTemporary(err) {
		r.a.rec.net().Untold = v
	}
	return err
}

// verdict tells the server how a deployment ended and, for a failure, sends its log.
func (s *session) verdict(ctx context.Context, v *verdict) error {
	if err := s.ready(); err != nil {
		return err
	}
	status := "failure"
	if v.Result == "committed" {
		status = "success"
	}
	err := s.api.status(ctx, v.ID, status)
	if errors.Is(err, errAborted) {
		return nil
	}
	path := findDeployLog(s.a.c.UpdateLogPath, v.ID)
	if err != nil || status == "success" {
		return err
	}
	body, err := deployLogBody(path, lastLine(v))
	if err == nil {
		err = s.api.sendLog(ctx, v.ID, body)
	}
	if err != nil && !isTemporary(err) && ctx.Err() == nil {
		s.a.lg.warnf("deployment log not sent: %v", err)
		return nil
	}
	return err
}

// sendPending tells the server a verdict that could not be told in its time: before the next
// question, whose other provides would make the server end that deployment as it sees fit.
func (s *session) sendPending(ctx context.Context) error {
	n := s.a.rec.net()
	if n.Untold == nil {
		return nil
	}
	if err := s.verdict(ctx, n.Untold); err != nil {
		if httpStatus(err) == 0 || httpStatus(err) == http.StatusUnauthorized {
			return err
		}
		s.a.lg.warnf("verdict on deployment %q not reported: %v", n.Untold.ID, err)
	}
	n.Untold = nil
	return nil
}

// rebootMachine restarts the machine and waits for that to take this process along. A
// recovery system has its own way to go on: it gets the exit code.
func rebootMachine(ctx context.Context, a *app) error {
	root, err := a.m.rootMount()
	initramfs := err == nil && ramRoot[root.fstype]
	if a.o.noReboot || initramfs || strings.EqualFold(a.o.running, "none") {
		a.lg.infof("a reboot is needed")
		return &codedError{code: exitReboot}
	}
	a.lg.infof("rebooting")
	err = runChild(ctx, child{what: `program "reboot"`, path: "reboot", dir: "/", timeout: goDown,
		prefix: "reboot output", level: levelInfo, lg: a.lg})
	if err != nil && ctx.Err() == nil {
		a.lg.warnf("%v", err)
		a.lg.warnf("the kernel restarts the machine, and nothing is stopped before: " +
			"file systems are synced and made read-only")
		a.m.quiesce(a.lg)
		if err := syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART); err != nil {
			return fmt.Errorf("reboot: %w", err)
		}
	}
	if err := sleepContext(ctx, goDown); err != nil {
		return tryLater("stopped while the machine goes down: %w", err)
	}
	return fmt.Errorf("still running %v after asking for the reboot", goDown)
}

// goDown is the longest time for a machine to stop.
const goDown = 10 * time.Minute

// firstPIDs is the PID namespace of the machine itself (PROC_PID_INIT_INO of linux/proc_ns.h). In
// another one reboot(2) ends that alone (pid_namespaces(7)), and the file systems are not only ours.
const firstPIDs = "pid:[4026531836]"

// quiesce does what reboot(2) does not: what is not on the medium would be lost.
func (m *machine) quiesce(lg *logger) {
	syscall.Sync()
	if ns, _ := os.Readlink("/proc/self/ns/pid"); ns != firstPIDs {
		return
	}
	all, err := m.mounts()
	if err != nil {
		lg.warnf("%v", err)
	}
	busy := readOnly(all, func(point string) error {
		return syscall.Mount("", point, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
	})
	if len(busy) == 0 {
		return
	}
	lg.warnf("open for writing: %q", busy)
	// Emergency remount: open files do not keep a file system from it. It works behind our back, hence
	// the second (Documentation/admin-guide/sysrq.rst).
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0); err == nil {
		time.Sleep(time.Second)
	}
	syscall.Sync()
}

// readOnly calls remount for each file system on a device, those mounted last first, and gives the places
// for which it failed.
func readOnly(all []mount, remount func(point string) error) (failed []string) {
	seen := map[string]bool{}
	for _, x := range slices.Backward(all) {
		device := strings.HasPrefix(x.source, "/dev/") || strings.HasPrefix(x.source, "ubi") ||
			!strings.HasPrefix(x.dev, "0:")
		if !device || x.fstype == "devtmpfs" || seen[x.dev] || listed(x.options, "ro") {
			continue
		}
		seen[x.dev] = true
		if remount(x.point) != nil {
			failed = append(failed, x.point)
		}
	}
	return failed
}

// runDaemon does a round whenever one is due: polls, retries after failures, inventory.
// SIGUSR1 polls now, SIGUSR2 sends the inventory now.
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
	s := newRound(a)
	poll, inventory, beside := time.Now(), time.Now(), time.Now() // when they are due; monotonic
	for {
		if a.beside.tick != nil && time.Until(beside) <= 0 && ctx.Err() == nil {
			beside = time.Now().Add(a.beside.tick(ctx, s.from))
		}
		wait := min(time.Until(poll), time.Until(inventory))
		if notBefore(a) != nil {
			wait = time.Until(a.rec.net().NextTry)
		}
		if a.beside.tick != nil {
			wait = min(wait, time.Until(beside))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			return nil
		case sig := <-signals:
			a.rec.net().NextTry = time.Time{}
			if poll = time.Now(); sig == syscall.SIGUSR2 {
				poll, inventory = poll.Add(s.from.every()), poll
				a.rec.net().InventoryHash = ""
			}
		case <-timer.C:
		}
		timer.Stop()
		if notBefore(a) != nil || time.Until(poll) > 0 && time.Until(inventory) > 0 && a.rec.net().NextTry.IsZero() {
			continue
		}
		if time.Until(inventory) <= 0 {
			a.rec.net().InventoryTime = time.Time{}
		}
		open := a.rec.Update != nil
		err := s.timedRound(ctx, time.Until(poll) <= 0)
		if err != nil && ctx.Err() == nil {
			a.lg.fail(err)
		}
		if exitCode(err) == exitReboot || s.from == s.server && len(a.c.Servers) == 0 && a.rec.Update == nil {
			return told(err)
		}
		if !a.rec.net().NextTry.IsZero() || open && a.rec.Update == nil {
			continue // what was due still is
		}
		if time.Until(poll) <= 0 {
			poll = time.Now().Add(s.from.every())
		}
		if time.Until(inventory) <= 0 {
			inventory = time.Now().Add(seconds(a.c.InventoryPollIntervalSeconds))
		}
	}
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

func (s *session) look(ctx context.Context) error {
	a := s.a
	s.looks = true
	if err := s.ready(); err != nil {
		return err
	}
	defer s.forgetLater()
	body, err := a.nextBody(a.rec.Provides)
	if u := a.rec.Update; u != nil && u.Managed {
		body = u.Request
	}
	if err != nil {
		return err
	}
	dep, err := s.api.nextDeployment(ctx, body)
	if err != nil {
		return err
	}
	switch {
	case a.o.json && dep == nil:
		return printJSON(a.out, map[string]any{"update": nil})
	case a.o.json:
		update := map[string]string{"deployment": dep.ID, "artifact": dep.ArtifactName}
		return printJSON(a.out, map[string]any{"update": update})
	case dep == nil:
		return printf(a.out, "no update\n")
	}
	return printf(a.out, "update: deployment %s, artifact %q\n", dep.ID, dep.ArtifactName)
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

// inventory sends what the device is when that is due and has changed, or when forced.
func (s *session) inventory(ctx context.Context, force bool) error {
	a, n := s.a, s.a.rec.net()
	if err := s.ready(); err != nil {
		return err
	}
	since := time.Since(n.InventoryTime)
	if due := since < 0 || since >= seconds(a.c.InventoryPollIntervalSeconds); !due && !force {
		return nil
	}
	data, err := collectInventory(ctx, a.c.paths.in(a.c.paths.data, "inventory"),
		builtinInventory(ctx, a), a.rec.Provides, a.lg)
	if err != nil {
		a.lg.warnf("%v", err)
		return nil
	}
	body, err := inventoryBody(data)
	if err != nil {
		return err
	}
	if hash := sha256Hex(body); force || hash != n.InventoryHash {
		if err := s.api.sendInventory(ctx, body); err != nil {
			n.InventoryHash = ""
			if isTemporary(err) || isDistrust(err) || exitCode(err) == exitRefused {
				return err
			}
			a.lg.warnf("inventory: %v", err) // no reason not to ask for updates
			return nil
		}
		n.InventoryHash = hash
	}
	n.InventoryTime = time.Now().UTC().Truncate(time.Second)
	return s.configuration(ctx)
}

func (s *session) alert(ctx context.Context, body []byte) error { return s.api.sendAlerts(ctx, body) }

// configuration tells the server what mender-configure has applied, where that is in use,
// when it has changed since the server took it last.
func (s *session) configuration(ctx context.Context) error {
	body, err := os.ReadFile(s.a.m.path(appliedConfig))
	if err != nil || !json.Valid(body) {
		return nil
	}
	hash := sha256Hex(body)
	if n := s.a.rec.net(); hash != n.ConfigHash {
		if err := s.api.expect(ctx, http.MethodPut, apiConfiguration, body); isTemporary(err) {
			return err
		} else if err != nil { // not every server has it
			s.a.lg.warnf("configuration: %v", err)
		}
		n.ConfigHash = hash
	}
	return nil
}

// builtinInventory is what this program knows of the device by itself.
func builtinInventory(ctx context.Context, a *app) map[string][]string {
	data := map[string][]string{
		"mender_client_version":          {versionString()},
		"mender_client_version_provider": {"internal"},
		"mendlet_version":                {versionString()},
	}
	if t, err := a.c.deviceType(); err == nil {
		data["device_type"] = []string{t}
	}
	for _, k := range []string{"artifact_name", "artifact_group"} {
		if v, ok := a.rec.Provides[k]; ok {
			data[k] = []string{v}
		}
	}
	if v := a.rec.Last; v != nil {
		data["mendlet_last_update"] = []string{v.Artifact + " " + v.Result}
		if v.Saved > 0 {
			data["mendlet_delta_saved"] = []string{fmt.Sprint(v.Saved)}
		}
	}
	r := &report{}
	if _, _, _, err := r.lookAround(ctx, a); err == nil {
		data["mendlet_slot"] = []string{r.Running}
		data["mendlet_bootcount"] = []string{r.Env["bootcount"]}
	}
	if a.beside.brief != nil {
		for k, v := range a.beside.brief(true) {
			data[k] = []string{v}
		}
	}
	return data
}

const bootstrapTimeout = 30 * time.Second

// bootstrapDevice makes the key and introduces the device. Not being accepted yet is no error.
func bootstrapDevice(ctx context.Context, a *app) error {
	if len(a.c.Servers) == 0 {
		pass, err := readPassphrase(a.o.passphrase, a.in)
		if err != nil {
			return err
		}
		_, err = deviceKey(a.c, pass, a.o.force, a.lg)
		return err
	}
	err := error(nil)
	if a.o.force { // the journal is to forget whom the server has accepted
		err = a.openState()
	} else {
		a.rec, err = a.peek()
	}
	if err != nil {
		return err
	}
	s := newSession(a)
	if err := s.ready(); err != nil {
		return err
	}
	if s.anew {
		n := a.rec.net()
		n.Identity, n.Device = "", ""
		if err := a.j.save(a.rec); err != nil {
			return err
		}
	}
	defer s.forgetLater()
	limited, stop := context.WithTimeoutCause(ctx, bootstrapTimeout, tryLater("no answer in %s", bootstrapTimeout))
	defer stop()
	err = s.api.authenticate(limited)
	switch {
	case err == nil:
		a.lg.infof("the device is accepted")
	case httpStatus(err) == http.StatusUnauthorized:
		a.lg.infof("the device is not accepted yet: %v", err)
		a.lg.infof("hint: %s", hintOf(err))
		return nil
	}
	return err
}
