// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nofleet && !nopublish

package main

// The publisher's side of a channel: edits of its file, which are numbered, checked as devices will check it,
// and signed.

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const fleetUsage = `usage: mendlet fleet init FILE.fleet [OPTION]…
       mendlet fleet add FILE.fleet ARTIFACT [OPTION]…
       mendlet fleet rollout FILE.fleet RELEASE PERCENT[@TIME]… [OPTION]…
       mendlet fleet pause|resume FILE.fleet RELEASE [OPTION]…
       mendlet fleet renew|sign|check FILE.fleet [OPTION]…

Makes and keeps a channel file. All but sign and check count its serial up;
where no key is given, it is not signed. Upload artifacts first, the file last.

Examples:
  mendlet fleet init acme.fleet -k fleet.pem
  mendlet fleet add acme.fleet gw-42.mender --rollout 1 -k fleet.pem
  mendlet fleet rollout acme.fleet gw-42 10 100@2026-12-02T02:00:00Z -k KEY
  mendlet fleet check acme.fleet --as device.json --at 2026-12-01T00:00:00Z

Options:
`

func fleetVerbs() []verb {
	return []verb{{"fleet", "…", "make and keep a channel file; see 'mendlet fleet --help'", -1, nil,
		func(ctx context.Context, a *app, w []string) error { return fleetCommand(ctx, a, w) }}}
}

// fleetOptions are those of all its verbs.
type fleetOptions struct {
	key, signWith, valid                      string
	channel, poll, report, method             string
	urls, from, groups, types, rollout, check []string
	notBefore, salt, as, at                   string
	step, paused, noHead, json                bool
}

func (o *fleetOptions) flags(fs *flag.FlagSet) {
	text := func(p *string, help string, names ...string) { textFlag(fs, p, "", help, names) }
	list := func(l *[]string, help, name string) { fs.Func(name, help+"; repeatable", listFlag(l)) }
	yes := func(p *bool, help, name string) { fs.BoolVar(p, name, false, help) }
	text(&o.key, "private key `FILE` to sign with; with --sign-with the public one, to check by", "k", "key")
	text(&o.signWith, "`COMMAND` for sh that gets on standard input what is to be signed, and gives the signature: "+
		"of Ed25519, or over SHA-256 by RSA PKCS #1 v1.5 or ECDSA in DER", "sign-with")
	text(&o.valid, "`TIME` until it expires, such as 14d or 36h (as before, or 14d)", "valid")
	text(&o.channel, "init: `NAME` of the channel (the file's)", "channel")
	text(&o.poll, "init: `TIME` between two questions of a daemon", "poll")
	text(&o.report, "init: `URL` below which devices write their reports", "report")
	text(&o.method, "init: `METHOD` of reports, PUT or POST", "report-method")
	list(&o.urls, "add: `URL` of the artifact, or its path from FILE on", "url")
	list(&o.from, "add: `NAME` of what a device has to have, or *", "from")
	list(&o.groups, "add: `GROUP` that it is for", "group")
	list(&o.types, "add: `DEVICE_TYPE` that it is for (the artifact's)", "device-type")
	list(&o.rollout, "add: `PERCENT[@TIME]` of the devices that it is for, from a time on", "rollout")
	text(&o.notBefore, "add: `TIME` before which it is not installed", "not-before")
	text(&o.salt, "add: `TEXT` that decides the order of devices, in place of the name", "salt")
	yes(&o.step, "add: it may not be skipped", "step")
	yes(&o.paused, "add: it is not installed yet", "paused")
	yes(&o.noHead, "do not ask web servers whether artifacts are there", "no-head")
	list(&o.check, "check: public key `FILE` that it has to be signed with", "verify")
	text(&o.as, "check: `FILE` with id, device_type, artifact_name and groups of a device: what does it do?", "as")
	text(&o.at, "check: `TIME` to answer for (now)", "at")
	yes(&o.json, "check: print JSON", "json")
}

func fleetCommand(ctx context.Context, a *app, args []string) error {
	o := &fleetOptions{}
	fs := flag.NewFlagSet("fleet", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	o.flags(fs)
	var words []string
	for len(args) > 0 { // options before, between and after words
		if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(a.out, fleetUsage)
			flagHelp(a.out, fs)
			return nil
		} else if err != nil {
			return unknownOption(fs, "fleet", err)
		}
		if args = fs.Args(); len(args) > 0 {
			words, args = append(words, args[0]), args[1:]
		}
	}
	counts := map[string]int{"init": 2, "add": 3, "rollout": 3, "pause": 3, "resume": 3, "renew": 2, "sign": 2, "check": 2}
	n := len(words)
	if n == 0 || counts[words[0]] == 0 || n < counts[words[0]] || n > counts[words[0]] && words[0] != "rollout" {
		return usageError("fleet: got %q; see 'mendlet fleet --help'", words)
	}
	p := &publisher{a: a, o: o, path: words[1], now: time.Now().UTC().Truncate(time.Second)}
	if err := p.run(ctx, words[0], words[2:]); err != nil {
		return fmt.Errorf("fleet %s: %w", words[0], err)
	}
	return nil
}

// publisher is one run of the verb.
type publisher struct {
	a    *app
	o    *fleetOptions
	path string
	now  time.Time
	hc   *agent // nil until it is needed
}

func (p *publisher) run(ctx context.Context, verb string, words []string) error {
	if verb == "init" {
		if _, err := os.Lstat(p.path); err == nil {
			return refuse("%q is there already", p.path)
		}
		return p.save(ctx, p.begin())
	}
	text, err := readPlain(p.path)
	if err != nil {
		return err
	}
	message, sigs, err := splitFleet(text)
	if err != nil {
		return err
	}
	switch verb {
	case "sign":
		return p.sign(ctx, text, message, sigs)
	case "check":
		return p.check(ctx, text, message, sigs)
	}
	var file members
	if err := json.Unmarshal(message[len(fleetMagic):], &file); err != nil {
		return err
	}
	if verb != "renew" {
		err = p.edit(ctx, verb, &file, words)
	}
	if err == nil {
		err = p.save(ctx, file)
	}
	return err
}

// members is a JSON object whose keys keep their order, and of which what is not known stays.
type members []member

type member struct {
	key   string
	value json.RawMessage
}

func (m *members) UnmarshalJSON(text []byte) error {
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return fmt.Errorf("got %.40q, want an object", text)
	}
	for d.More() {
		t, err := d.Token()
		var v json.RawMessage
		if err == nil {
			err = d.Decode(&v)
		}
		if err != nil {
			return err
		}
		*m = append(*m, member{t.(string), v})
	}
	return nil
}

func (m members) MarshalJSON() ([]byte, error) {
	text := []byte("{")
	for i, x := range m {
		key, err := json.Marshal(x.key)
		if err != nil {
			return nil, err
		}
		text = fmt.Appendf(text, "%s%s:%s", [2]string{"", ","}[min(i, 1)], key, x.value)
	}
	return append(text, '}'), nil
}

// get is the value of a key in to, which stays as it is where there is none.
//
//go:noinline
func (m members) get(key string, to any) error {
	for _, x := range m {
		if x.key == key {
			return json.Unmarshal(x.value, to)
		}
	}
	return nil
}

// set is for values that encoding/json takes; nil takes the key away.
//
//go:noinline
func (m *members) set(key string, v any) {
	value, _ := json.Marshal(v)
	for i, x := range *m {
		switch {
		case x.key == key && v == nil:
			*m = append((*m)[:i], (*m)[i+1:]...)
			return
		case x.key == key:
			(*m)[i].value = value
			return
		}
	}
	if v != nil {
		*m = append(*m, member{key, value})
	}
}

// setText sets what is not empty.
//
//go:noinline
func (m *members) setText(key, v string) {
	if v != "" {
		m.set(key, v)
	}
}

//go:noinline
func (m *members) setList(key string, l []string) {
	if len(l) > 0 {
		m.set(key, l)
	}
}

func (p *publisher) begin() (file members) {
	file.set("channel", cmp.Or(p.o.channel, strings.TrimSuffix(filepath.Base(p.path), ".fleet")))
	for _, key := range []string{"serial", "issued", "expires"} {
		file.set(key, 0)
	}
	file.setText("poll", p.o.poll)
	file.setText("report", p.o.report)
	file.setText("report_method", p.o.method)
	file.set("releases", []string{})
	return file
}

// edit changes the list of releases.
func (p *publisher) edit(ctx context.Context, verb string, file *members, words []string) error {
	var list []members
	if err := file.get("releases", &list); err != nil {
		return err
	}
	if verb == "add" {
		r, err := p.release(ctx, words[0])
		if err != nil {
			return err
		}
		list = append(list, r)
	}
	found := verb == "add"
	for i := range list {
		var name string
		if err := list[i].get("name", &name); err != nil || verb == "add" || name != words[0] {
			continue
		}
		found = true
		switch verb {
		case "pause":
			list[i].set("paused", true)
		case "resume":
			list[i].set("paused", nil)
		case "rollout":
			steps, err := p.steps(words[1:])
			if err != nil {
				return err
			}
			list[i].set("rollout", steps)
			if len(steps) == 0 {
				list[i].set("rollout", nil)
			}
		}
	}
	if !found {
		return refuse("%q has no release %q", p.path, words[0])
	}
	file.set("releases", list)
	return nil
}

// steps reads "10" and "10@TIME", in percent of the devices.
func (p *publisher) steps(words []string) (list [][2]any, err error) {
	for _, w := range words {
		part, at, timed := strings.Cut(w, "@")
		n, err := strconv.ParseFloat(strings.TrimSuffix(part, "%"), 64)
		if err != nil || !(n >= 0 && n <= 100) {
			return nil, usageError("rollout %q: want PERCENT or PERCENT@2026-11-27T09:00:00Z", w)
		}
		if !timed {
			at = zulu(p.now)
		}
		list = append(list, [2]any{at, n / 100})
	}
	return list, nil
}

// release makes the entry of an artifact, which it opens.
func (p *publisher) release(ctx context.Context, path string) (r members, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := sizeOf(f)
	if err != nil {
		return nil, err
	}
	art, err := openArtifact(f, artifactOptions{lg: p.a.lg})
	if err != nil {
		return nil, err
	}
	o := p.o
	if len(o.urls) == 0 {
		rel, below := strings.CutPrefix(lasting(path), filepath.Dir(lasting(p.path))+"/")
		if !below {
			return nil, refuse("%q is not beside or below %q: say with --url where devices find it", path, p.path)
		}
		o.urls = []string{(&url.URL{Path: rel}).String()}
	}
	types := o.types
	if len(types) == 0 {
		types = art.DeviceTypes
	}
	r.set("name", art.Name)
	r.set("url", o.urls)
	r.set("size", size)
	r.set("manifest", hex.EncodeToString(art.ManifestSum[:]))
	r.setList("device_types", types)
	r.setList("groups", o.groups)
	r.setList("from", o.from)
	r.setText("not_before", o.notBefore)
	r.setText("salt", o.salt)
	if o.step {
		r.set("step", true)
	}
	if o.paused {
		r.set("paused", true)
	}
	if len(o.rollout) > 0 {
		steps, err := p.steps(o.rollout)
		if err != nil {
			return nil, err
		}
		r.set("rollout", steps)
	}
	return r, nil
}

// days reads a time as package time does, and days.
//
//go:noinline
func days(s string) (time.Duration, error) {
	if n, ok := strings.CutSuffix(s, "d"); ok {
		s = n + "h"
		d, err := time.ParseDuration(s)
		return 24 * d, err
	}
	return time.ParseDuration(s)
}

// save numbers the file, gives it its times, checks and signs it, and puts it in its place.
func (p *publisher) save(ctx context.Context, file members) error {
	var serial uint64
	var issued, expires string
	err := errors.Join(file.get("serial", &serial))
	valid := 14 * 24 * time.Hour
	if file.get("issued", &issued) == nil && file.get("expires", &expires) == nil {
		from, err1 := parseZulu(issued)
		to, err2 := parseZulu(expires)
		if errors.Join(err1, err2) == nil && to.After(from) {
			valid = to.Sub(from)
		}
	}
	if p.o.valid != "" {
		var derr error
		if valid, derr = days(p.o.valid); derr != nil || valid < time.Second {
			return usageError("--valid %q: want a time such as 14d or 36h", p.o.valid)
		}
	}
	if err != nil {
		return err
	}
	file.set("serial", serial+1)
	file.set("issued", zulu(p.now))
	file.set("expires", zulu(p.now.Add(valid)))
	body, err := json.MarshalIndent(file, "", "  ")
	if err != nil {
		return err
	}
	message := fmt.Appendf(nil, "%s%s\n", fleetMagic, body)
	f, err := parseFleet(message)
	if err != nil {
		return refuse("devices would refuse it: %w", err)
	}
	if len(message)+maxFleetSigs*1024 > maxFleet {
		return refuse("it has %d bytes, and devices take %d with its signatures: take old releases out", len(message),
			maxFleet)
	}
	if err := p.inspect(ctx, f); err != nil {
		return err
	}
	return p.sign(ctx, nil, message, nil)
}

// inspect looks whether each artifact that can be seen from here is what the file says.
func (p *publisher) inspect(ctx context.Context, f *fleetFile) error {
	var wrong []error
	for i := range f.Releases {
		r := &f.Releases[i]
		for _, ref := range r.URLs {
			if err := p.inspectURL(ctx, r, ref); err != nil {
				wrong = append(wrong, fmt.Errorf("release %q, %q: %w", r.Name, ref, err))
			}
		}
	}
	if len(wrong) > 0 {
		return refuse("%w", errors.Join(wrong...))
	}
	return nil
}

func (p *publisher) inspectURL(ctx context.Context, r *fleetRelease, ref string) (err error) {
	if isURL(ref) {
		if p.o.noHead {
			return nil
		}
		if p.hc == nil {
			if p.hc, err = newClient(p.a, ""); err != nil {
				return err
			}
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodHead, ref, nil)
		if err != nil {
			return err
		}
		resp, err := p.hc.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK || resp.ContentLength != r.Size {
			return withHint(fmt.Errorf("HEAD says status %d and %d bytes, want %d", resp.StatusCode, resp.ContentLength,
				r.Size), "put the artifact there first")
		}
		return nil
	}
	u, err := url.Parse(ref)
	if err != nil {
		return err
	}
	in, err := os.Open(filepath.Join(filepath.Dir(p.path), u.Path))
	if err != nil {
		return err
	}
	defer in.Close()
	if size, err := sizeOf(in); err != nil || size != r.Size {
		return errors.Join(err, fmt.Errorf("%d bytes, want %d", size, r.Size))
	}
	art, err := openArtifact(in, artifactOptions{manifest: r.Manifest})
	switch {
	case err != nil:
		return err
	case art.Name != r.Name:
		return fmt.Errorf("its name is %q", art.Name)
	}
	for _, t := range r.Types {
		if !listed(art.DeviceTypes, t) {
			return fmt.Errorf("it is for device types %q, and not for %q", art.DeviceTypes, t)
		}
	}
	return nil
}

// sign puts a signature behind message and those that are there, and the whole in the file's place. Without a key
// nothing is added.
func (p *publisher) sign(ctx context.Context, text, message []byte, sigs []fleetSig) error {
	key, sig, err := p.signature(ctx, message)
	if err != nil {
		return err
	}
	switch {
	case key == nil && text != nil:
		return usageError("want --key FILE")
	case key == nil:
		p.a.lg.warnf("%q is not signed: devices do not take it before 'mendlet fleet sign'", p.path)
		text = message
	default:
		alg, id := fleetKeyID(key)
		if !(&fleetSig{raw: sig}).made(key, message) {
			return refuse("the signature of %d bytes was not made by the key %q", len(sig), p.o.key)
		}
		text = message
		for _, s := range sigs {
			if s.key != id[:8] {
				text = s.behind(text)
			}
		}
		text = (&fleetSig{alg, id[:8], sig}).behind(text)
		if _, _, err := openFleet(text, []verifyKey{{p.o.key, key}}); err != nil {
			return refuse("devices would refuse it: %w", err)
		}
	}
	if err := writeFileDurably(p.path, text, 0o644); err != nil {
		return err
	}
	f, err := parseFleet(message)
	if err == nil {
		p.a.lg.infof("%q: channel %q, serial %d, expires %s", p.path, f.Channel, f.Serial, zulu(f.Expires))
	}
	return err
}

// behind is text with a line of the signature.
//
//go:noinline
func (s *fleetSig) behind(text []byte) []byte {
	sig := base64.StdEncoding.EncodeToString(s.raw)
	return fmt.Appendf(text[:len(text):len(text)], "sig %s %s %s\n", s.alg, s.key, sig)
}

// signature is that of the key or the command; no key: neither was given.
func (p *publisher) signature(ctx context.Context, message []byte) (crypto.PublicKey, []byte, error) {
	switch {
	case p.o.key == "" && p.o.signWith == "":
		return nil, nil, nil
	case p.o.key == "":
		return nil, nil, usageError("--sign-with wants the public key, too: --key FILE")
	case p.o.signWith != "":
		keys, err := loadKeys([]string{p.o.key}, "channel files", p.a.lg)
		if err != nil {
			return nil, nil, err
		}
		cmd := exec.CommandContext(ctx, "sh", "-c", p.o.signWith)
		var sig bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(message), &sig, os.Stderr
		if err := cmd.Run(); err != nil {
			return nil, nil, fmt.Errorf("%q: %w", p.o.signWith, err)
		}
		return keys[0].key, sig.Bytes(), nil
	}
	text, err := os.ReadFile(p.o.key)
	if err != nil {
		return nil, nil, err
	}
	key, err := parseDeviceKey(text, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("signing key %q: %w", p.o.key, err)
	}
	sig, err := signBody(key, message)
	return key.Public(), sig, err
}

// check says what is in the file, who signed it, and who gets what when, or what one device would do at a time.
func (p *publisher) check(ctx context.Context, text, message []byte, sigs []fleetSig) error {
	f, err := parseFleet(message)
	if err != nil {
		return refuse("%w", err)
	}
	if len(p.o.check) > 0 {
		keys, err := loadKeys(p.o.check, "channel files", p.a.lg)
		if err == nil {
			_, _, err = openFleet(text, keys)
		}
		if err != nil {
			return refuse("%w", err)
		}
	}
	now := p.now
	if p.o.at != "" {
		if now, err = parseZulu(p.o.at); err != nil {
			return usageError("--at: %w", err)
		}
	}
	if p.o.as != "" {
		var d fleetDevice
		text, err := os.ReadFile(p.o.as)
		if err == nil {
			err = parseObject(text, &d)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", p.o.as, err)
		}
		p.a.o.json = p.o.json
		now = f.at(now, time.Time{})
		return f.print(p.a, &d, now, now.After(f.Expires))
	}
	for _, s := range sigs {
		printf(p.a.out, "signature: %s, key %s\n", s.alg, s.key)
	}
	f.table(p.a.out, now)
	if len(sigs) == 0 {
		return refuse("it is not signed")
	}
	return p.inspect(ctx, f)
}

// table says who gets what when.
func (f *fleetFile) table(w io.Writer, now time.Time) {
	state := "good until"
	if now.After(f.Expires) {
		state = "stale since"
	}
	printf(w, "channel %q, serial %d, issued %s, %s %s\n", f.Channel, f.Serial, zulu(f.Issued), state, zulu(f.Expires))
	for i := range f.Releases {
		r := &f.Releases[i]
		printf(w, "%-20s %10s", r.Name, mega(r.Size))
		for i, list := range [][]string{r.Types, r.Groups, r.From} {
			if len(list) > 0 {
				printf(w, ", %s %s", []string{"types", "groups", "from"}[i], strings.Join(list, " "))
			}
		}
		for i, yes := range []bool{r.Step, r.Paused, r.Unknown != ""} {
			if yes {
				printf(w, ", %s", []string{"step", "paused", "not for this version: " + r.Unknown}[i])
			}
		}
		if !r.NotBefore.IsZero() {
			printf(w, ", not before %s", zulu(r.NotBefore))
		}
		for _, s := range r.Rollout {
			printf(w, ", %.4g %% from %s", 100*s.Part, zulu(s.From))
		}
		if len(r.Rollout) > 0 {
			part, _ := r.share(now, 1)
			printf(w, ": %.4g %% now", 100*part)
		}
		printf(w, "\n")
	}
}
