// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"cmp"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"time"
)

// A Mender server as a source of deployments.

// appliedConfig is the file in which mender-configure keeps what it has applied.
const appliedConfig = "/var/lib/mender-configure/device-config.json"

// session is a server as a source.
type session struct {
	a     *app
	hc    *agent
	api   *apiClient // nil until ready
	looks bool       // and changes nothing: no key is made
	anew  bool       // to be another device to the server is what is meant
}

//go:noinline
func newSession(a *app) *session { return &session{a: a} }

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

func deviceIdentity(ctx context.Context, a *app) (string, error) {
	return readIdentity(ctx, a.c, a.m.path("/sys"), a.lg)
}

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

func (s *session) every() time.Duration { return seconds(s.a.c.UpdatePollIntervalSeconds) }

func (s *session) client() *agent { return s.hc }

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

func (s *session) status(ctx context.Context, id, status string) error {
	return s.api.status(ctx, id, status)
}

func (s *session) alive(ctx context.Context) error {
	s.api.dropToken()
	return s.api.authenticate(ctx)
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
