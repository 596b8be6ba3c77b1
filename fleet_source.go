// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nofleet

package main

// A channel as a source of deployments: its file is fetched, or read from a stick, and what fleet.go
// decides by it is installed.

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	channelCopy   = "mendlet.fleet" // in the datastore: the file that was accepted last, for requests with If-None-Match
	reportEvery   = 24 * time.Hour  // at least, even if nothing has happened
	minPoll       = time.Minute
	maxPoll       = 7 * 24 * time.Hour
	noSuchChannel = "no channel is configured any more"
)

func channelFlags(fs *flag.FlagSet, o *options) {
	fs.StringVar(&o.channel, "channel", o.channel, "`URL` or path of a channel file, in the place of a server")
	fs.BoolVar(&o.allowExpired, "allow-expired", o.allowExpired,
		"for a person with a stick in hand: take a channel file that has expired")
}

// channel is a channel file as a source.
type channel struct {
	a     *app
	at    string // URL or path of the file
	name  string // of the channel
	gone  bool   // the update in progress came from it, and it is configured no more
	keys  []verifyKey
	hc    *agent
	web   *apiClient // for its way to make a request
	id    string     // of the device
	file  *fleetFile // the newest that was accepted in this run
	floor func(*app) time.Time

	connect  func(a *app, about string) (*agent, error)
	identify func(context.Context, *app) (string, error) // a device that has no DeviceID
}

// channelSource is the channel that the update in progress is from, or that is configured; nil: none.
func channelSource(a *app, connect func(*app, string) (*agent, error), floor func(*app) time.Time,
	identify func(context.Context, *app) (string, error)) *channel {
	c := &channel{a: a, at: cmp.Or(a.o.channel, a.c.Channel), connect: connect, floor: floor, identify: identify}
	if a.rec != nil && a.rec.Update != nil && a.rec.Update.Managed {
		from := a.rec.Update.Source
		if from == "" { // a server's
			return nil
		}
		c.gone = c.at == "" && isURL(from)
		c.at = cmp.Or(c.at, from)
	}
	if c.at == "" {
		return nil
	}
	// The file has the channel's name, or the name is behind a "#".
	at, name, _ := strings.Cut(lasting(c.at), "#")
	bare := before(at, "?")
	c.at, c.name = at, cmp.Or(name, strings.TrimSuffix(path.Base(bare), ".fleet"))
	return c
}

//go:noinline
func (c *channel) identity(ctx context.Context) (id string, err error) {
	if c.id == "" {
		c.id = c.a.c.DeviceID
	}
	if c.id == "" {
		c.id, err = c.identify(ctx, c.a)
	}
	return c.id, err
}

func (c *channel) ready() (err error) {
	a := c.a
	switch {
	case c.hc != nil:
		return nil
	case c.gone:
		return withHint(errors.New(noSuchChannel), "set Channel in %q", a.o.mainConfig())
	case a.c.broken != nil:
		return refuse("no channel file is trusted: %w", a.c.broken)
	}
	paths := a.c.FleetVerifyKeys
	if len(paths) == 0 {
		paths = a.c.verifyKeys()
	}
	if c.keys, err = loadKeys(paths, "channel files", a.lg); err != nil {
		return err
	}
	if len(c.keys) == 0 {
		return withHint(refuse("channel %q: there is no key to verify its file with", c.name),
			"name one with FleetVerifyKeys, or ArtifactVerifyKeys, in %q", a.o.mainConfig())
	}
	kind, _ := a.serverType()
	word := func(s string) string { // what a log of a web server cannot misread
		return strings.Map(func(r rune) rune {
			if r <= ' ' || r >= 0x7f || strings.ContainsRune(`"\();`, r) {
				return '_'
			}
			return r
		}, s)
	}
	hc, err := c.connect(a, fmt.Sprintf(" (%s; %s)", word(kind), word(a.rec.Provides["artifact_name"])))
	if err != nil {
		return err
	}
	c.hc, c.web = hc, newAPIClient(a.c, hc, nil, nil, a.lg)
	return nil
}

func (c *channel) client() *agent { return c.hc }

func (c *channel) begin() { c.file = nil }

func (c *channel) remember() {}

func (c *channel) inventory(context.Context, bool) error { return nil }

func (c *channel) status(context.Context, string, string) error { return nil }

// every is how long a daemon waits between two questions: as long as this device's configuration says of channels,
// else the file, else the configuration for servers.
func (c *channel) every() time.Duration {
	var wait time.Duration
	if n := c.a.c.ChannelPollIntervalSeconds; n > 0 {
		wait = seconds(min(n, int(maxPoll/time.Second)))
	} else if n := c.a.rec.net().Channel; n != nil {
		wait = n.Poll
	}
	if wait > 0 {
		return min(max(wait, minPoll), maxPoll)
	}
	return seconds(c.a.c.UpdatePollIntervalSeconds)
}

// state is what is kept of the channel.
//
//go:noinline
func (c *channel) state() *channelState {
	n := c.a.rec.net()
	if n.Channel == nil || n.Channel.Name != c.name {
		seen := map[string]fleetSeen{} // of other channels, too
		if n.Channel != nil {
			seen = n.Channel.Seen
		}
		n.Channel = &channelState{Name: c.name, Seen: seen}
	}
	return n.Channel
}

// get reads the file, or asks for it if it is not the one with this tag; nil: it still is.
func (c *channel) get(ctx context.Context, tag string) (text []byte, newTag string, err error) {
	if !isURL(c.at) {
		f, err := openPlain(c.at, os.O_RDONLY, 0)
		if err != nil {
			return nil, "", tryLater("channel file: %w", err)
		}
		defer f.Close()
		text, err = readBounded(f, maxFleet)
		return text, "", err
	}
	h := http.Header{"Cache-Control": {"no-cache"}} // caches on the way ask the server, too
	switch {
	case strings.HasPrefix(tag, `"`) || strings.HasPrefix(tag, "W/"):
		h.Set("If-None-Match", tag)
	case tag != "":
		h.Set("If-Modified-Since", tag)
	}
	ans, err := c.web.send(ctx, http.MethodGet, c.at, nil, h)
	switch {
	case err != nil:
		return nil, "", err
	case ans.code == http.StatusNotModified && tag != "":
		return nil, tag, nil
	case ans.code != http.StatusOK:
		return nil, "", tryLater("channel file: %w", ans.err)
	}
	return ans.body, cmp.Or(ans.header.Get("ETag"), ans.header.Get("Last-Modified")), nil
}

// open is the file in text, if it is this channel's.
//
//go:noinline
func (c *channel) open(text []byte) (*fleetFile, []string, error) {
	f, signers, err := openFleet(text, c.keys)
	if err == nil && f.Channel != c.name {
		err = withHint(fmt.Errorf("channel file: it is of channel %q, want %q", f.Channel, c.name),
			"a file that has not its channel's name is asked for as URL#CHANNEL")
	}
	if err != nil {
		return nil, nil, withHint(tryLater("%q: %w", bare(c.at), err), "%s", hintOf(err))
	}
	return f, signers, nil
}

// bare is a URL without its query, or a path.
//
//go:noinline
func bare(at string) string {
	if u, err := url.Parse(at); err == nil && isURL(at) {
		return urlKey(u)
	}
	return at
}

// stored is the copy of the file that was accepted last; nil: there is none that is of use.
func (c *channel) stored() []byte {
	if c.state().Tag == "" {
		return nil
	}
	text, err := readOwn(c.a.c.paths.in(c.a.c.paths.ds, channelCopy))
	if err != nil || len(text) > maxFleet || sha256Hex(text) != c.state().Copy {
		return nil
	}
	if _, _, err := c.open(text); err != nil {
		return nil // the keys are others now
	}
	return text
}

// fetch gets the file and journals its serial, before anything is done by it. looks: nothing is kept.
func (c *channel) fetch(ctx context.Context, looks bool) (*fleetFile, error) {
	if err := c.ready(); err != nil {
		return nil, err
	}
	n, tag := c.state(), ""
	old := c.stored()
	if old != nil {
		tag = n.Tag
	}
	text, tag, err := c.get(ctx, tag)
	if err != nil {
		return nil, err
	}
	if text == nil {
		text = old
	}
	f, signers, err := c.open(text)
	if err != nil {
		return nil, err
	}
	if err := f.checkSerial(signers, n.Seen, c.a.serialFloor()); err != nil {
		return nil, err
	}
	c.file = f
	if looks {
		return f, nil
	}
	for _, key := range signers {
		n.Seen[f.counter(key)] = fleetSeen{f.Serial, f.Sum}
	}
	n.Serial, n.Expires, n.Poll = f.Serial, f.Expires, f.Poll
	if isURL(c.at) {
		n.Copy, n.Tag = sha256Hex(text), tag
		if !bytes.Equal(text, old) {
			if err := writeFileDurably(filepath.Join(c.a.c.paths.ds, channelCopy), text, 0o600); err != nil {
				c.a.lg.warnf("no copy of the channel file is kept: %v", err)
			}
		}
	}
	for id := range n.Failed {
		if f.find(id) == nil { // it is not offered any more
			delete(n.Failed, id)
		}
	}
	return f, c.a.j.save(c.a.rec)
}

// serialFloor is the serial that the running system was made with, by what its artifact provides or, where the
// journal was lost, by a line in artifact_info.
func (a *app) serialFloor() uint64 {
	n, _ := strconv.ParseUint(cmp.Or(a.rec.Provides["fleet_serial"], a.info("fleet_serial")), 10, 64)
	return n
}

// fresh is the time by which a file is judged, and an error if it has expired by then.
//
//go:noinline
func (c *channel) fresh(f *fleetFile) (time.Time, error) {
	now := f.at(c.a.now(), c.floor(c.a))
	if now.After(f.Expires) && !c.a.o.allowExpired {
		return now, withHint(tryLater("channel %q: its file, serial %d, is stale since %s, and it is %s", f.Channel, f.Serial,
			zulu(f.Expires), zulu(now)), "the publisher has to renew it, or somebody keeps newer ones from coming; "+
			"a person may take it with --allow-expired")
	}
	return now, nil
}

// device is what a decision depends on of this device.
func (c *channel) device(ctx context.Context) (*fleetDevice, error) {
	a := c.a
	id, err := c.identity(ctx)
	if err != nil {
		return nil, err
	}
	kind, err := a.serverType()
	if err != nil {
		return nil, err
	}
	d := &fleetDevice{ID: id, Type: kind, Artifact: a.rec.Provides["artifact_name"],
		Groups: a.c.Groups[:len(a.c.Groups):len(a.c.Groups)],
		Asked:  a.o.atOnce, Failed: c.state().Failed}
	text, err := readPlain(a.c.paths.in(a.c.paths.ds, "groups"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("groups of the device: %w", err)
	}
	d.Groups = append(d.Groups, strings.Fields(string(text))...)
	return d, nil
}

func (c *channel) exchange(ctx context.Context, poll bool) (*deployment, error) {
	if !poll {
		return nil, nil
	}
	f, err := c.fetch(ctx, false)
	if err != nil {
		return nil, err
	}
	c.report(ctx, false)
	d, err := c.device(ctx)
	if err != nil {
		return nil, err
	}
	now, err := c.fresh(f)
	if err != nil {
		return nil, err
	}
	pick, why := f.decide(d, now)
	if n := len(why) - 1; n >= 0 && pick != n {
		c.a.lg.infof("channel %q: the newest release, %q, %s", f.Channel, f.Releases[n].Name, why[n])
	}
	if pick < 0 {
		c.a.lg.infof("nothing is to be installed on this device")
		return nil, nil
	}
	return c.deploy(f, &f.Releases[pick])
}

// channelRequest is what the journal keeps of a release that is being installed: the download can go
// on without the channel file.
type channelRequest struct {
	URLs     []string `json:"url"`
	Size     int64    `json:"size"`
	Manifest string   `json:"manifest"`
}

func (c *channel) deploy(f *fleetFile, r *fleetRelease) (*deployment, error) {
	q := channelRequest{Size: r.Size, Manifest: r.Manifest}
	base, err := url.Parse(c.at)
	for _, ref := range r.URLs {
		u, uerr := url.Parse(ref)
		switch {
		case uerr != nil || err != nil && isURL(c.at):
			return nil, errors.Join(err, uerr)
		case isURL(c.at):
			ref = base.ResolveReference(u).String()
		case u.Host == "":
			ref = filepath.Join(filepath.Dir(c.at), u.Path)
		}
		q.URLs = append(q.URLs, ref)
	}
	body, err := json.Marshal(q)
	dep := q.deployment(f.deployment(r), r.Name)
	dep.Request, dep.Source = body, c.at
	if c.name != strings.TrimSuffix(path.Base(dep.Source), ".fleet") {
		dep.Source += "#" + c.name
	}
	return dep, err
}

func (q *channelRequest) deployment(id, name string) *deployment {
	return &deployment{ID: id, ArtifactName: name, URI: q.URLs[0], Others: q.URLs[1:], Size: q.Size, Manifest: q.Manifest,
		Again: true}
}

// again looks whether the file still has the release: one that was begun goes on though it has been
// paused since, or is for fewer devices; and with what the journal has where the file cannot be had.
func (c *channel) again(ctx context.Context, u *update) (*deployment, error) {
	var q channelRequest
	if err := json.Unmarshal(u.Request, &q); err != nil || len(q.URLs) == 0 {
		return nil, fmt.Errorf("deployment %q: the journal has no request for it that can be used", u.ID)
	}
	dep := q.deployment(u.ID, u.Artifact)
	f, err := c.fetch(ctx, false)
	if err != nil {
		c.a.lg.warnf("going on without the channel file: %v", err)
		return dep, nil
	}
	if u.Type == "" { // nothing has come of it so far
		var d *fleetDevice
		if d, err = c.device(ctx); err != nil {
			return nil, err
		}
		now, _ := c.fresh(f)
		pick, why := f.decide(d, now)
		if pick < 0 || f.deployment(&f.Releases[pick]) != u.ID {
			c.state().Dropped = u.ID
			return nil, fmt.Errorf("release %q is not what there is for this device now (%q): %w", u.Artifact, why, errAborted)
		}
	}
	if r := f.find(u.ID); r != nil {
		return c.deploy(f, r)
	}
	c.state().Dropped = u.ID
	return nil, fmt.Errorf("release %q is not in the channel any more: %w", u.Artifact, errAborted)
}

// alive: the file of a channel on a web server can still be fetched, and be trusted. Of an update from a stick, which
// may have been pulled out, nothing is asked: where one is used, there may be no network.
func (c *channel) alive(ctx context.Context) error {
	if u := c.a.rec.Update; !isURL(c.at) || u != nil && !isURL(u.Source) {
		return nil
	}
	text, _, err := c.get(ctx, "")
	if err == nil {
		_, _, err = c.open(text)
	}
	return err
}

// verdict counts failures, which are journaled together with the end of the update, and tells how it ended where the
// channel wants reports.
func (c *channel) verdict(ctx context.Context, v *verdict) error {
	n := c.state()
	switch {
	case v.Result == "committed":
		delete(n.Failed, v.ID)
	case n.Dropped == v.ID:
		n.Dropped = ""
	default:
		if n.Failed == nil {
			n.Failed = map[string]int{}
		}
		n.Failed[v.ID]++
	}
	if c.file == nil { // after a reboot
		if _, err := c.fetch(ctx, true); err != nil {
			c.a.lg.debugf("no report: %v", err)
			return nil
		}
	}
	c.report(ctx, true)
	return nil
}

// alert has the report tell it, which needs the newest file to know where.
func (c *channel) alert(ctx context.Context, _ []byte) error {
	_, err := c.fetch(ctx, true)
	if err == nil {
		err = c.report(ctx, true)
	}
	return err
}

// deviceReport is a device's object.
type deviceReport struct {
	Type     string `json:"device_type"`
	Artifact string `json:"artifact"`
	Serial   uint64 `json:"serial"`
	Release  string `json:"release"`
	Result   string `json:"result"`
	Error    string `json:"error"`
	Version  string `json:"version"`
	Time     string `json:"time"`

	Monitor map[string]string `json:"monitor,omitempty"` // by check, "OK" or "CRITICAL: text"
}

// report writes this device's object, where the channel wants that: after a verdict, and once a day. That it may
// fail is no reason for anything.
func (c *channel) report(ctx context.Context, ended bool) error {
	n, last := c.state(), c.a.rec.Last
	var verdict time.Time
	if last != nil {
		verdict = last.Time
	}
	since := c.a.now().Sub(n.Reported)
	if c.file.Report == "" || since >= 0 && since < reportEvery && n.Told.Equal(verdict) && !ended {
		return nil
	}
	id, err := c.identity(ctx)
	if err == nil {
		kind, _ := c.a.serverType()
		body := deviceReport{Type: kind, Artifact: c.a.rec.Provides["artifact_name"], Serial: c.file.Serial,
			Version: versionString(), Time: zulu(c.a.now())}
		if last != nil {
			body.Release, body.Result, body.Error = last.Artifact, last.Result, oneLine(last.Cause)
		}
		if c.a.beside.brief != nil {
			body.Monitor = c.a.beside.brief(false)
		}
		var text []byte
		if text, err = json.Marshal(body); err == nil {
			to := fmt.Sprintf("%s%s/%.16s.json", c.file.Report, c.file.Channel, sha256Hex([]byte(id)))
			var ans *apiAnswer
			if ans, err = c.web.send(ctx, c.file.Method, to, text, http.Header{}); err == nil && ans.code/100 != 2 {
				err = ans.err
			}
		}
	}
	if err != nil {
		c.a.lg.warnf("not reported: %v", err)
		return err
	}
	n.Reported, n.Told = c.a.now().UTC().Truncate(time.Second), verdict
	return nil
}

// channelLook is what check-update --json says.
type channelLook struct {
	Channel  string        `json:"channel"`
	Serial   uint64        `json:"serial"`
	Issued   time.Time     `json:"issued"`
	Expires  time.Time     `json:"expires"`
	Stale    bool          `json:"stale"`
	Update   string        `json:"update"` // release; "": none
	Releases []releaseLook `json:"releases"`
}

type releaseLook struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// look says what would be installed and, of each release, why or why not.
func (c *channel) look(ctx context.Context) error {
	f, err := c.fetch(ctx, true)
	if err != nil {
		return err
	}
	d, err := c.device(ctx)
	if err != nil {
		return err
	}
	now, stale := c.fresh(f)
	if err := f.print(c.a, d, now, stale != nil); err != nil {
		return err
	}
	return stale
}

func (f *fleetFile) print(a *app, d *fleetDevice, now time.Time, stale bool) error {
	look := channelLook{Channel: f.Channel, Serial: f.Serial, Issued: f.Issued, Expires: f.Expires, Stale: stale}
	pick, why := f.decide(d, now)
	if pick >= 0 && !stale {
		look.Update = f.Releases[pick].Name
	}
	for i, r := range f.Releases {
		look.Releases = append(look.Releases, releaseLook{r.Name, why[i]})
	}
	if a.o.json {
		return printJSON(a.out, look)
	}
	printf(a.out, "channel %q, serial %d, issued %s, expires %s\n", f.Channel, f.Serial, zulu(f.Issued), zulu(f.Expires))
	for _, r := range look.Releases {
		printf(a.out, "  %-20s %s\n", r.Name, r.Reason)
	}
	if look.Update == "" {
		return printf(a.out, "no update\n")
	}
	return printf(a.out, "update: release %q, %s\n", look.Update, mega(f.Releases[pick].Size))
}
