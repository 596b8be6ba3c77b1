// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nofleet

package main

// A channel file says what there is to install, for whom and from when on, in one signed file on any
// web space; doc/fleet.md describes the format. Here is what it means: functions of the file, the
// device and the time.

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	fleetMagic = "mendlet-fleet 1\n"

	maxFleet      = 256 << 10 // bytes of a file
	maxReleases   = 1000
	maxURLs       = 8
	maxRollout    = 100       // steps
	maxFleetSigs  = 16        // lines
	maxSerial     = 1<<53 - 1 // what every reader of JSON can tell from the next
	maxSerialStep = 1000000   // how much a file may be ahead of the one before
	maxFailures   = 3         // of one release on one device
)

// fleetFile is a channel file.
type fleetFile struct {
	Channel  string
	Serial   uint64
	Issued   time.Time
	Expires  time.Time
	Poll     time.Duration // between questions; 0: not said
	Report   string        // URL that ends in "/"; "": none
	Method   string        // of reports: PUT or POST
	Releases []fleetRelease

	Sum string // SHA-256 of what is signed, hex
}

// fleetRelease is one entry of the list. What is not said of it is empty.
type fleetRelease struct {
	Name      string
	URLs      []string
	Size      int64
	Manifest  string // SHA-256 of the artifact's manifest, hex
	Types     []string
	Groups    []string
	From      []string
	Step      bool
	NotBefore time.Time
	Rollout   []fleetShare
	Salt      string
	Paused    bool
	Unknown   string // a key that this program does not know
}

// fleetShare is the part of all devices, 0 to 1, that a release is for from a time on.
type fleetShare struct {
	From time.Time
	Part float64
}

// fleetSig is a signature line of a channel file.
type fleetSig struct {
	alg string // rsa, ecdsa, ed25519; others are of later versions
	key string // the first 8 hex digits of the key's SHA-256
	raw []byte
}

// splitFleet parts what is signed from the signatures. What is signed ends before the first line that
// begins with "sig ", which no JSON outside of a string can contain.
func splitFleet(text []byte) (message []byte, sigs []fleetSig, err error) {
	if len(text) > maxFleet {
		return nil, nil, fmt.Errorf("channel file: more than %d bytes", maxFleet)
	}
	if !bytes.HasPrefix(text, []byte(fleetMagic)) {
		return nil, nil, fmt.Errorf("channel file: begins with %q, want %q", text[:min(len(text), len(fleetMagic))],
			fleetMagic)
	}
	at := bytes.Index(text, []byte("\nsig "))
	if at < 0 {
		return text, nil, nil
	}
	message = text[:at+1]
	lines := strings.TrimSuffix(string(text[at+1:]), "\n")
	for _, line := range strings.Split(lines, "\n") {
		f := strings.Split(line, " ")
		if len(f) != 4 || f[0] != "sig" || len(f[2]) != 8 || len(sigs) == maxFleetSigs {
			return nil, nil, fmt.Errorf("channel file: got line %.100q behind what is signed, want up to %d of "+
				"\"sig ALGORITHM KEY BASE64\"", line, maxFleetSigs)
		}
		raw, err := base64.StdEncoding.Strict().DecodeString(f[3])
		if err != nil {
			return nil, nil, fmt.Errorf("channel file: signature by key %.8q: %w", f[2], err)
		}
		sigs = append(sigs, fleetSig{f[1], f[2], raw})
	}
	return message, sigs, nil
}

// fleetKeyID is the algorithm's name in a signature line and the key's SHA-256 in hex, which is that of
// its SubjectPublicKeyInfo.
//
//go:noinline
func fleetKeyID(key crypto.PublicKey) (alg, id string) {
	switch key.(type) {
	case *rsa.PublicKey:
		alg = "rsa"
	case *ecdsa.PublicKey:
		alg = "ecdsa"
	case ed25519.PublicKey:
		alg = "ed25519"
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil { // of a curve without a name, which no file of a key has
		return alg, ""
	}
	sum := sha256.Sum256(der)
	return alg, hex.EncodeToString(sum[:])
}

// made tells whether key made the signature over message.
func (s *fleetSig) made(key crypto.PublicKey, message []byte) bool {
	if k, ok := key.(ed25519.PublicKey); ok {
		return ed25519.Verify(k, message, s.raw)
	}
	digest := sha256.Sum256(message)
	return verifies(key, digest[:], s.raw)
}

// openFleet is the file in text, and the ids of the keys that signed it: one of keys at least.
func openFleet(text []byte, keys []verifyKey) (f *fleetFile, signers []string, err error) {
	message, sigs, err := splitFleet(text)
	if err != nil {
		return nil, nil, err
	}
	if len(sigs) == 0 {
		return nil, nil, errors.New("channel file: it is not signed, or cut off")
	}
	for _, k := range keys {
		alg, id := fleetKeyID(k.key)
		for _, s := range sigs {
			if id != "" && s.alg == alg && s.key == id[:8] && s.made(k.key, message) {
				signers = append(signers, id[:16])
				break
			}
		}
	}
	if len(signers) == 0 {
		var said []string
		for _, s := range sigs {
			said = append(said, s.alg+" "+s.key)
		}
		return nil, nil, fmt.Errorf("channel file: no signature of it (%.200q) is by a key that is trusted here",
			strings.Join(said, ", "))
	}
	f, err = parseFleet(message)
	return f, signers, err
}

// fleetFields takes values out of an object under their exact names, and keeps the first error.
type fleetFields struct {
	what string
	m    map[string]json.RawMessage
	err  error
}

// get takes the value of a key; there is none: to stays as it is.
//
//go:noinline
func (f *fleetFields) get(key string, to any, needed bool) {
	raw, ok := f.m[key]
	delete(f.m, key)
	switch {
	case f.err != nil:
	case !ok && needed:
		f.bad("it has no %q", key)
	case !ok:
	case string(raw) == "null":
		f.bad("%q is null", key)
	default:
		if err := json.Unmarshal(raw, to); err != nil {
			f.bad("%q: %w", key, err)
		}
	}
}

//go:noinline
func (f *fleetFields) bad(format string, args ...any) {
	if f.err == nil {
		f.err = fmt.Errorf(f.what+": "+format, args...)
	}
}

// want keeps it as the first error that a value is not as it must be.
//
//go:noinline
func (f *fleetFields) want(ok bool, key string, got any, want string) {
	if !ok {
		f.bad("%q: got %.100q, want %s", key, fmt.Sprint(got), want)
	}
}

// time takes a time in the one form of it.
//
//go:noinline
func (f *fleetFields) time(key string, needed bool) time.Time {
	var s string
	f.get(key, &s, needed)
	if f.err != nil || s == "" && !needed {
		return time.Time{}
	}
	t, err := parseZulu(s)
	if err != nil {
		f.bad("%q: %w", key, err)
	}
	return t
}

// parseZulu reads RFC 3339 in UTC and whole seconds, 2026-11-27T09:00:00Z.
//
//go:noinline
func parseZulu(s string) (time.Time, error) {
	t, err := time.Parse("2006-01-02T15:04:05Z", s)
	if err != nil || len(s) != 20 {
		return time.Time{}, fmt.Errorf("got time %.40q, want 2026-11-27T09:00:00Z", s)
	}
	return t, nil
}

//go:noinline
func zulu(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// parseFleet reads what is signed of a channel file. What it refuses the publisher's verbs do not make.
func parseFleet(message []byte) (*fleetFile, error) {
	sum := sha256.Sum256(message)
	body := message[min(len(message), len(fleetMagic)):]
	if !utf8.Valid(body) {
		return nil, errors.New("channel file: not UTF-8")
	}
	in := fleetFields{what: "channel file"}
	err := json.Unmarshal(body, &in.m)
	if err == nil {
		err = uniqueKeys(body, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("channel file: %w", atPlace(body, err))
	}
	f := &fleetFile{Method: "PUT", Sum: hex.EncodeToString(sum[:])}
	var poll string
	var list []map[string]json.RawMessage
	in.get("channel", &f.Channel, true)
	in.get("serial", &f.Serial, true)
	in.get("poll", &poll, false)
	in.get("report", &f.Report, false)
	in.get("report_method", &f.Method, false)
	in.get("releases", &list, true)
	f.Issued, f.Expires = in.time("issued", true), in.time("expires", true)
	in.want(validChannel(f.Channel), "channel", f.Channel, "up to 64 letters, digits, dashes, dots and underscores")
	in.want(f.Serial > 0 && f.Serial <= maxSerial, "serial", f.Serial, "1 to 2^53-1")
	in.want(f.Expires.After(f.Issued), "expires", zulu(f.Expires), "a time after issued")
	if poll != "" {
		f.Poll, err = time.ParseDuration(poll)
		in.want(err == nil && f.Poll > 0, "poll", poll, "a time such as 1h")
	}
	in.want(f.Report == "" || isURL(f.Report) && strings.HasSuffix(f.Report, "/"), "report", f.Report,
		"an http or https URL that ends in /")
	in.want(f.Method == "PUT" || f.Method == "POST", "report_method", f.Method, "PUT or POST")
	in.want(len(list) <= maxReleases, "releases", len(list), "1000 at most")
	if in.err != nil {
		return nil, in.err
	}
	seen := map[string]bool{}
	for i, m := range list {
		r, err := parseRelease(m, i)
		if err != nil {
			return nil, err
		}
		if seen[r.Name] && f.Releases[i-1].Name != r.Name {
			return nil, fmt.Errorf("channel file: release %q comes twice, with others in between", r.Name)
		}
		seen[r.Name] = true
		f.Releases = append(f.Releases, *r)
	}
	return f, nil
}

// validChannel: it becomes part of a URL.
//
//go:noinline
func validChannel(s string) bool {
	return validDeploymentID(strings.ReplaceAll(s, ".", "-")) && s[0] != '.'
}

func parseRelease(m map[string]json.RawMessage, i int) (*fleetRelease, error) {
	r := &fleetRelease{}
	in := fleetFields{what: fmt.Sprintf("channel file: release %d", i+1), m: m}
	in.get("name", &r.Name, true)
	in.want(r.Name != "" && len(r.Name) <= 256 && visible(r.Name) == r.Name, "name", r.Name,
		"1 to 256 bytes of visible text")
	if in.err != nil {
		return nil, in.err
	}
	in.what = fmt.Sprintf("channel file: release %q", r.Name)
	in.get("url", &r.URLs, true)
	in.get("size", &r.Size, true)
	in.get("manifest", &r.Manifest, true)
	for key, list := range map[string]*[]string{"device_types": &r.Types, "groups": &r.Groups, "from": &r.From} {
		in.get(key, list, false)
		in.want(!listed(*list, ""), key, *list, "no empty text")
	}
	in.get("step", &r.Step, false)
	in.get("salt", &r.Salt, false)
	in.get("paused", &r.Paused, false)
	r.NotBefore = in.time("not_before", false)
	r.Rollout = in.rollout()
	in.want(len(r.URLs) > 0 && len(r.URLs) <= maxURLs, "url", r.URLs, "1 to 8")
	for _, ref := range r.URLs {
		u, err := url.Parse(ref)
		web := err == nil && u.Host != "" && (u.Scheme == "http" || u.Scheme == "https")
		in.want(web || err == nil && u.Scheme == "" && u.Host == "" && u.Path != "", "url", ref,
			"http, https, or relative to the channel file")
	}
	sum, err := hex.DecodeString(r.Manifest)
	in.want(err == nil && len(sum) == sha256.Size && r.Manifest == strings.ToLower(r.Manifest), "manifest", r.Manifest,
		"64 hex digits in lower case")
	in.want(r.Size > 0, "size", r.Size, "1 or more")
	if names := sortedKeys(m); len(names) > 0 {
		r.Unknown = names[0]
	}
	return r, in.err
}

// rollout takes the pairs of time and share.
func (f *fleetFields) rollout() (list []fleetShare) {
	var pairs [][]json.RawMessage
	f.get("rollout", &pairs, false)
	f.want(len(pairs) <= maxRollout, "rollout", len(pairs), "100 steps at most")
	for _, p := range pairs {
		if len(p) != 2 {
			f.bad("\"rollout\": got a step of %d values, want a time and a number from 0 to 1", len(p))
			break
		}
		in := fleetFields{what: f.what + ": \"rollout\"", m: map[string]json.RawMessage{"time": p[0], "part": p[1]}}
		s := fleetShare{From: in.time("time", true)}
		in.get("part", &s.Part, true)
		in.want(s.Part >= 0 && s.Part <= 1, "part", s.Part, "0 to 1")
		in.want(len(list) == 0 || s.From.After(list[len(list)-1].From), "time", string(p[0]),
			"one after that of the step before")
		f.err = cmp.Or(f.err, in.err)
		list = append(list, s)
	}
	return list
}

// errFleetOlder: the file is one of before, as a cache may have for a while.
var errFleetOlder = errors.New("older than what was seen before")

// checkSerial refuses files of before, two files under one number, and one that is so far ahead that
// the next could not be. The count is each key's own, so that a stolen one spoils no other's. floor is
// what a device goes by that has seen none by a key.
func (f *fleetFile) checkSerial(signers []string, seen map[string]fleetSeen, floor uint64) error {
	for _, key := range signers {
		s, known := seen[f.counter(key)]
		switch {
		case !known && f.Serial < floor || f.Serial < s.Serial:
			return tryLater("channel file: serial %d is %w, %d", f.Serial, errFleetOlder, max(s.Serial, floor))
		case known && f.Serial == s.Serial && f.Sum != s.Sum:
			return withHint(tryLater("channel file: serial %d is not the file that had this number before", f.Serial),
				"two publishers, or copies of the file, are in each other's way: the next one has to have a higher serial")
		case known && f.Serial-s.Serial > maxSerialStep:
			return withHint(tryLater("channel file: serial %d is more than %d ahead of %d", f.Serial, maxSerialStep, s.Serial),
				"if the key was stolen, put another one into FleetVerifyKeys: each has its own count")
		}
	}
	return nil
}

// counter names the count of a key, which is another one in each channel.
//
//go:noinline
func (f *fleetFile) counter(key string) string { return key + " " + f.Channel }

// at is the time by which the file is judged: no device is before what it was told of time.
func (f *fleetFile) at(clock, floor time.Time) time.Time {
	for _, t := range []time.Time{floor, f.Issued} {
		if t.After(clock) {
			clock = t
		}
	}
	return clock
}

// fleetDevice is what a decision depends on of a device.
type fleetDevice struct {
	ID       string         `json:"id"` // as Mender would have it, or DeviceID
	Type     string         `json:"device_type"`
	Artifact string         `json:"artifact_name"`
	Groups   []string       `json:"groups"`
	Failed   map[string]int `json:"failed"` // how often, by deployment
	Asked    bool           `json:"now"`    // by a person, who does not wait
}

// deployment is what names a release of this file's channel with just this content.
//
//go:noinline
func (f *fleetFile) deployment(r *fleetRelease) string {
	sum := sha256.Sum256([]byte("mendlet deployment\x00" + f.Channel + "\x00" + r.Name + "\x00" + r.Manifest))
	return hex.EncodeToString(sum[:16])
}

// find is the release of a deployment; nil: there is none.
//
//go:noinline
func (f *fleetFile) find(deployment string) *fleetRelease {
	for i := range f.Releases {
		if f.deployment(&f.Releases[i]) == deployment {
			return &f.Releases[i]
		}
	}
	return nil
}

// place is where in the rollout of a release a device is, 0 to 1, 1 excluded: 53 bits, which a float64
// holds exactly.
//
//go:noinline
func (r *fleetRelease) place(id string) float64 {
	sum := sha256.Sum256([]byte("mendlet rollout\x00" + cmp.Or(r.Salt, r.Name) + "\x00" + id))
	return float64(binary.BigEndian.Uint64(sum[:])>>11) / (1 << 53)
}

// share is the part of all devices that the release is for at a time, and from when on it will be for one at
// place: the zero time is never.
func (r *fleetRelease) share(now time.Time, place float64) (part float64, next time.Time) {
	if len(r.Rollout) == 0 {
		return 1, time.Time{}
	}
	for _, s := range r.Rollout {
		if !now.Before(s.From) {
			part = s.Part
		} else if next.IsZero() && place < s.Part {
			next = s.From
		}
	}
	return part, next
}

// meant is why a release is not for such a device at all; "": it is.
//
//go:noinline
func (r *fleetRelease) meant(d *fleetDevice) string {
	if len(r.Types) > 0 && !listed(r.Types, d.Type) {
		return fmt.Sprintf("is for device types %q, and this one is %q", r.Types, d.Type)
	}
	for _, g := range d.Groups {
		if listed(r.Groups, g) {
			return ""
		}
	}
	if len(r.Groups) > 0 {
		return fmt.Sprintf("is for groups %q, and this device is in %q", r.Groups, d.Groups)
	}
	return ""
}

// refusal is why a device does not take a release now; "": it does.
func (f *fleetFile) refusal(r *fleetRelease, d *fleetDevice, now time.Time) string {
	place := r.place(d.ID)
	part, next := r.share(now, place)
	why := r.meant(d)
	switch n := d.Failed[f.deployment(r)]; {
	case why != "":
		return why
	case r.Unknown != "":
		return fmt.Sprintf("has %q, which this version does not know", r.Unknown)
	case len(r.From) > 0 && !listed(r.From, "*") && !listed(r.From, d.Artifact):
		return fmt.Sprintf("is for devices with %q", r.From)
	case n >= maxFailures:
		return fmt.Sprintf("has failed %d times here", n)
	case d.Asked:
	case r.Paused:
		return "is paused"
	case now.Before(r.NotBefore):
		return "comes at " + zulu(r.NotBefore)
	case place >= part && next.IsZero():
		return fmt.Sprintf("is for %.4g %% of the devices, and this one is at %.4g %%", 100*part, 100*place)
	case place >= part:
		return fmt.Sprintf("comes at %s: it is for %.4g %% of the devices now, and this one is at %.4g %%", zulu(next),
			100*part, 100*place)
	}
	return ""
}

// decide gives the index of the release that the device installs now, -1 if there is none, and of each
// release a few words why, or why not. The order of the list is that of versions: it is the last of those
// that the device can take, up to the first step behind the device's own place.
func (f *fleetFile) decide(d *fleetDevice, now time.Time) (pick int, why []string) {
	own, end, step := -1, len(f.Releases), ""
	for i := range f.Releases {
		switch r := &f.Releases[i]; {
		case r.Name == d.Artifact:
			own, end, step = i, len(f.Releases), ""
		case step == "" && r.Step && r.meant(d) == "":
			step = r.Name
		case step != "" && end == len(f.Releases) && r.Name != step:
			end = i
		}
	}
	pick, why = -1, make([]string, len(f.Releases))
	for i := range f.Releases {
		switch r := &f.Releases[i]; {
		case r.Name == d.Artifact:
			why[i] = "is installed"
		case i < own:
			why[i] = "is before what is installed"
		case i >= end:
			why[i] = fmt.Sprintf("is behind %q, which may not be skipped", step)
		default:
			if why[i] = f.refusal(r, d, now); why[i] == "" {
				if pick >= 0 {
					why[pick] = fmt.Sprintf("is passed over for %q", r.Name)
				}
				pick, why[i] = i, "is to be installed"
			}
		}
	}
	return pick, why
}
