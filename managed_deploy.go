// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
)

// One deployment, on this device: where its artifact comes from, who hears how it goes, its log, the reboot.

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

// deploymentRun is a run through the steps of one deployment, as far as its source has to do with them.
type deploymentRun struct {
	a        *app
	from     deploymentSource
	dep      *deployment // as offered in this run
	log      *deployLog
	mu       sync.Mutex    // over dep and what follows while an artifact comes in, maybe in several parts at once
	progress func()        // there was progress
	asked    time.Time     // when the source last heard of the download
	patience time.Duration // until it hears the next time
}

// deploy begins what has been deployed. A deployment that has its verdict already is
// offered again only when the server did not hear it: then it is told once more.
func (r *deploymentRun) deploy(ctx context.Context, dep *deployment) error {
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
func (r *deploymentRun) resume(ctx context.Context) error {
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

func (r *deploymentRun) newFlow(ctx context.Context) (*flow, error) {
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
func (r *deploymentRun) openLog() {
	l, err := openDeployLog(r.a.c.UpdateLogPath, r.a.rec.Update.ID)
	if err != nil {
		r.a.lg.warnf("no deployment log: %v", err)
		return
	}
	r.log, r.a.lg.tee = l, l.add
}

//go:noinline
func (r *deploymentRun) closeLog() {
	if r.log != nil {
		r.a.lg.tee = nil
		r.log.close()
		r.log = nil
	}
}

func (r *deploymentRun) conclude(f *flow, p *pause) error {
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

// fetch opens the artifact, which must be the one that the deployment names.
func (r *deploymentRun) fetch(ctx context.Context) (*artifact, error) {
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

// fetchAny opens the artifact from the first of the places that have it. A run that goes on asks its source again, for
// a link that is still good, and after tries without progress begins with another one.
func (r *deploymentRun) fetchAny(ctx context.Context) (*artifact, error) {
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
func (r *deploymentRun) countUseless(err error) error {
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

// open is the source of the deployment's artifact.
func (r *deploymentRun) open(ctx context.Context, off int64, want sourceID) (in io.ReadCloser, id sourceID, err error) {
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
func (r *deploymentRun) openDeployed(ctx context.Context, o downloadOptions, want sourceID) (
	*progressReader, sourceID, error) {
	r.mu.Lock()
	dep := r.dep
	r.mu.Unlock()
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
func (r *deploymentRun) refresh(ctx context.Context) error {
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

// progressReader tells the watchdog that bytes come in.
type progressReader struct {
	io.ReadCloser
	download *download // for parts; nil: a file
	ctx      context.Context
	r        *deploymentRun
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

// askEvery is how often a long download is told of, and how long that may take: the line may be a
// metered one, and the deployment have been aborted. When the server does not answer it is asked less.
const (
	askEvery   = time.Minute
	askTimeout = 15 * time.Second
	askLater   = 5 * time.Minute
)

// reportStatus tells the source how far the deployment is.
func (r *deploymentRun) reportStatus(ctx context.Context, status string) error {
	if err := r.from.ready(); err != nil {
		return err
	}
	r.asked, r.patience = r.a.now(), askEvery
	return r.from.status(ctx, r.a.rec.Update.ID, status)
}

// stillWanted is an error when the server has aborted the deployment that is being downloaded.
func (r *deploymentRun) stillWanted(ctx context.Context) error {
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

// checkServer reports "installing" once more to a source that it gets through to, though the update may have
// changed identity, keys or the network: a device that cannot get through any more must roll back. A connection from
// before an update without a reboot would prove nothing.
func (r *deploymentRun) checkServer(ctx context.Context) error {
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

// reportVerdict reports the verdict of the update in progress. When that is given up, so that the
// device can have other updates, it stays on the list of what the server is owed.
func (r *deploymentRun) reportVerdict(ctx context.Context) error {
	v := r.a.rec.Last
	err := r.countTries(ctx, r.from.verdict(ctx, v))
	if err != nil && !isTemporary(err) {
		r.a.rec.net().Untold = v
	}
	return err
}

// countTries counts the tries of something that must succeed in the end, over all runs, and
// turns the last failure into a final one. An abort is final at once, and so is what the
// server finds too large; a run that is told to end has not tried.
func (r *deploymentRun) countTries(ctx context.Context, err error) error {
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

// attempts is how many tries the schedule has before it is given up (RetryPollCount, or
// until its longest wait was used three times).
func (r *deploymentRun) attempts() int {
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
