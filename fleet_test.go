// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nofleet

package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"
)

// testReleases makes the list of releases of a channel file of entries "gw-1 step; gw-2 from=gw-1,* …".
func testReleases(t testing.TB, list string) json.RawMessage {
	t.Helper()
	releases := []map[string]any{}
	for entry := range strings.SplitSeq(list, ";") {
		f := strings.Fields(entry)
		if len(f) == 0 {
			continue
		}
		r := map[string]any{"name": f[0], "url": []string{f[0] + ".mender"}, "size": 1000,
			"manifest": strings.Repeat(fmt.Sprintf("%02x", len(f[0])), 32)}
		for _, word := range f[1:] {
			key, value, _ := strings.Cut(word, "=")
			switch key {
			case "step", "paused":
				r[key] = true
			case "from", "groups":
				r[key] = strings.Split(value, ",")
			case "types":
				r["device_types"] = strings.Split(value, ",")
			case "not_before":
				r[key] = testMoment(value)
			case "rollout":
				steps := [][]any{}
				for step := range strings.SplitSeq(value, ",") {
					at, part, _ := strings.Cut(step, ":")
					n, err := strconv.ParseFloat(part, 64)
					must(t, err)
					steps = append(steps, []any{testMoment(at), n})
				}
				r[key] = steps
			default:
				r[key] = value
			}
		}
		releases = append(releases, r)
	}
	text, err := json.Marshal(releases)
	must(t, err)
	return text
}

// testMoment is a day of December 2026, "5", or a time of it, "5T12".
func testMoment(day string) string {
	day, hour, _ := strings.Cut(day, "T")
	return fmt.Sprintf("2026-12-%02sT%02s:00:00Z", day, hour)
}

func testTime(t testing.TB, day string) time.Time {
	at, err := parseZulu(testMoment(day))
	must(t, err)
	return at
}

// testFleet is what is signed of a channel file, issued on the 1st and good until the 15th.
func testFleet(t testing.TB, serial uint64, releases string, more ...string) []byte {
	extra := strings.Join(more, "")
	return fmt.Appendf(nil, `%s{"channel": "acme", "serial": %d, "issued": "2026-12-01T00:00:00Z",
"expires": "2026-12-15T00:00:00Z", %s "releases": %s}
`, fleetMagic, serial, extra, testReleases(t, releases))
}

// testSigned signs it.
func testSigned(t testing.TB, message []byte, keys ...crypto.Signer) []byte {
	t.Helper()
	text := message
	for _, k := range keys {
		alg, id := fleetKeyID(k.Public())
		sig, err := signBody(k, message)
		must(t, err)
		text = fmt.Appendf(text[:len(text):len(text)], "sig %s %s %s\n", alg, id[:8], base64.StdEncoding.EncodeToString(sig))
	}
	return text
}

func testKeys(keys ...crypto.Signer) (list []verifyKey) {
	for _, k := range keys {
		list = append(list, verifyKey{"key", k.Public()})
	}
	return list
}

// deviceAt finds an identity whose place in the rollout of salt is just behind part.
func deviceAt(salt string, part float64) string {
	for i := 0; ; i++ {
		id := fmt.Sprintf(`{"mac":"%d"}`, i)
		if p := (&fleetRelease{Name: salt}).place(id); p >= part && p < part+0.005 {
			return id
		}
	}
}

// deviceOf makes a device of "has=gw-1 type=gw2 groups=a,b failed=gw-2:3 asked at=0.05/gw-2".
func deviceOf(t testing.TB, f *fleetFile, words string) *fleetDevice {
	d := &fleetDevice{ID: "x", Type: "gw2", Artifact: "unknown", Failed: map[string]int{}}
	for word := range strings.FieldsSeq(words) {
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "has":
			d.Artifact = value
		case "type":
			d.Type = value
		case "groups":
			d.Groups = strings.Split(value, ",")
		case "asked":
			d.Asked = true
		case "at":
			part, salt, _ := strings.Cut(value, "/")
			n, err := strconv.ParseFloat(part, 64)
			must(t, err)
			d.ID = deviceAt(salt, n)
		case "failed":
			name, n, _ := strings.Cut(value, ":")
			times, err := strconv.Atoi(n)
			must(t, err)
			for i := range f.Releases {
				if f.Releases[i].Name == name {
					d.Failed[f.deployment(&f.Releases[i])] = times
				}
			}
		default:
			t.Fatalf("device %q?", word)
		}
	}
	return d
}

// TestFleetDecision is the table of what a device does: the list, the device, the day of December, which
// release it installs, and what is said of the one behind "/".
func TestFleetDecision(t *testing.T) {
	t.Parallel()
	const ramp = " rollout=3:0.01,4:0.1,5:1"
	for _, c := range []struct{ releases, device, day, want, why string }{
		// The place in the list.
		{"", "", "2", "", ""},
		{"", "has=gw-1", "2", "", ""},
		{"gw-1", "", "2", "gw-1", "gw-1/is to be installed"},
		{"gw-1", "has=gw-1", "2", "", "gw-1/is installed"},
		{"gw-1; gw-2", "", "2", "gw-2", "gw-1/is passed over for \"gw-2\""},
		{"gw-1; gw-2", "has=gw-1", "2", "gw-2", "gw-1/is installed"},
		{"gw-1; gw-2", "has=gw-2", "2", "", "gw-1/is before what is installed"},
		{"gw-1; gw-2; gw-3", "has=gw-1", "2", "gw-3", "gw-2/is passed over for \"gw-3\""},
		{"gw-1; gw-2; gw-3", "has=gw-2", "2", "gw-3", "gw-1/is before"},
		{"gw-1; gw-2", "has=gw-9", "2", "gw-2", ""}, // taken out of the list: before the first
		{"gw-1; gw-2", "has=gw-2_INCONSISTENT", "2", "gw-2", ""},
		{"gw-2; gw-1", "has=gw-2", "2", "gw-1", ""}, // no grammar of versions: the order decides
		{"9.9; 1.0", "has=9.9", "2", "1.0", ""},
		{"gw-1; gw-2", "has=GW-2", "2", "gw-2", ""},
		// Types.
		{"gw-1 types=gw2", "", "2", "gw-1", ""},
		{"gw-1 types=gw3", "", "2", "", `gw-1/is for device types ["gw3"], and this one is "gw2"`},
		{"gw-1 types=gw3,gw2", "", "2", "gw-1", ""},
		{"gw-1; gw-2 types=gw3", "", "2", "gw-1", "gw-2/is for device types"},
		{"gw-1 types=gw", "", "2", "", "gw-1/device types"},
		{"gw-1 types=gw3", "asked", "2", "", "gw-1/device types"},
		// Groups.
		{"gw-1 groups=canary", "", "2", "", `gw-1/is for groups ["canary"], and this device is in []`},
		{"gw-1 groups=canary", "groups=canary", "2", "gw-1", ""},
		{"gw-1 groups=canary,lab", "groups=lab", "2", "gw-1", ""},
		{"gw-1 groups=canary", "groups=lab", "2", "", "gw-1/is for groups"},
		{"gw-1; gw-2 groups=canary", "", "2", "gw-1", "gw-2/is for groups"},
		{"gw-1; gw-2 groups=canary", "groups=canary", "2", "gw-2", ""},
		{"gw-1", "groups=canary", "2", "gw-1", ""},
		{"gw-1 groups=canary", "asked", "2", "", "gw-1/is for groups"},
		// From.
		{"gw-1; gw-2 from=gw-1", "has=gw-1", "2", "gw-2", ""},
		{"gw-1; gw-2 from=gw-1", "", "2", "gw-1", `gw-2/is for devices with ["gw-1"]`},
		{"gw-1; gw-2; gw-3 from=gw-2", "has=gw-1", "2", "gw-2", "gw-3/is for devices with"},
		{"gw-1; gw-2; gw-3 from=gw-1,gw-2", "has=gw-1", "2", "gw-3", ""},
		{"gw-2 from=*", "has=gw-9", "2", "gw-2", ""},
		{"gw-2 from=gw-1,*", "", "2", "gw-2", ""},
		{"gw-2 from=gw-1", "has=gw-1", "2", "gw-2", ""}, // though the list does not have it any more
		{"gw-2 from=gw-1", "has=gw-1_INCONSISTENT", "2", "", "gw-2/is for devices with"},
		{"gw-2 from=gw-1", "asked", "2", "", "gw-2/is for devices with"},
		// Several entries of one release, such as a delta beside the whole: the last that fits.
		{"gw-2; gw-2 from=gw-1", "has=gw-1", "2", "gw-2", "gw-2/is passed over"},
		{"gw-2; gw-2 from=gw-1", "has=gw-0", "2", "gw-2", "gw-2/is to be installed"},
		{"gw-2; gw-2 from=gw-1", "has=gw-2", "2", "", "gw-2/is installed"},
		{"gw-2 types=gw3; gw-2 types=gw2", "", "2", "gw-2", "gw-2/is for device types"},
		// Steps.
		{"gw-1 step; gw-2", "", "2", "gw-1", `gw-2/is behind "gw-1", which may not be skipped`},
		{"gw-1 step; gw-2", "has=gw-1", "2", "gw-2", ""},
		{"gw-0; gw-1 step; gw-2", "has=gw-0", "2", "gw-1", "gw-2/is behind"},
		{"gw-0; gw-1 step; gw-2", "has=gw-2", "2", "", "gw-1/is before"},
		{"gw-1 step; gw-2 step; gw-3", "", "2", "gw-1", "gw-3/is behind \"gw-1\""},
		{"gw-1 step; gw-2 step; gw-3", "has=gw-1", "2", "gw-2", "gw-3/is behind \"gw-2\""},
		{"gw-1 step; gw-2 step; gw-3", "has=gw-2", "2", "gw-3", ""},
		{"gw-1 step paused; gw-2", "", "2", "", "gw-2/is behind"},
		{"gw-0; gw-1 step paused; gw-2", "", "2", "gw-0", "gw-1/is paused"},
		{"gw-1 step not_before=5; gw-2", "", "2", "", "gw-1/comes at 2026-12-05"},
		{"gw-1 step types=gw3; gw-2", "", "2", "gw-2", ""}, // no step of this device's
		{"gw-1 step groups=lab; gw-2", "", "2", "gw-2", ""},
		{"gw-1 step groups=lab; gw-2", "groups=lab", "2", "gw-1", ""},
		{"gw-1 step; gw-1 step from=gw-0; gw-2", "has=gw-0", "2", "gw-1", "gw-2/is behind"},
		{"gw-0; gw-1 step from=gw-0; gw-2", "has=gw-9", "2", "gw-0", "gw-2/is behind"},
		{"gw-1 step; gw-2", "failed=gw-1:3", "2", "", "gw-1/has failed 3 times here"},
		{"gw-1 step odd=1; gw-2", "", "2", "", "gw-2/is behind"}, // what it wants is not known
		{"gw-1 step; gw-2", "asked", "2", "gw-1", "gw-2/is behind"},
		// Failures.
		{"gw-1", "failed=gw-1:1", "2", "gw-1", ""},
		{"gw-1", "failed=gw-1:2", "2", "gw-1", ""},
		{"gw-1", "failed=gw-1:3", "2", "", "gw-1/has failed 3 times here"},
		{"gw-1", "failed=gw-1:3 asked", "2", "", "gw-1/has failed"},
		{"gw-1; gw-2", "failed=gw-2:3", "2", "gw-1", "gw-2/has failed"},
		{"gw-1; gw-2", "has=gw-1 failed=gw-2:3", "2", "", "gw-2/has failed"},
		{"gw-1; gw-2; gw-3", "failed=gw-2:3", "2", "gw-3", ""},
		// Paused.
		{"gw-1 paused", "", "2", "", "gw-1/is paused"},
		{"gw-1 paused", "asked", "2", "gw-1", ""},
		{"gw-1; gw-2 paused", "has=gw-1", "2", "", "gw-2/is paused"},
		{"gw-1; gw-2 paused", "", "2", "gw-1", ""},
		// Not before.
		{"gw-1 not_before=3", "", "2", "", "gw-1/comes at 2026-12-03T00:00:00Z"},
		{"gw-1 not_before=3", "", "3", "gw-1", ""},
		{"gw-1 not_before=3T12", "", "3T11", "", "gw-1/comes at 2026-12-03T12:00:00Z"},
		{"gw-1 not_before=3", "asked", "2", "gw-1", ""},
		{"gw-1; gw-2 not_before=3", "", "2", "gw-1", "gw-2/comes at"},
		{"gw-1; gw-2 not_before=3", "has=gw-1", "2", "", "gw-2/comes at"},
		// Rollout.
		{"gw-1" + ramp, "at=0/gw-1", "2", "", "gw-1/comes at 2026-12-03T00:00:00Z: it is for 0 %"},
		{"gw-1" + ramp, "at=0/gw-1", "3", "gw-1", ""},
		{"gw-1" + ramp, "at=0.05/gw-1", "3", "", "gw-1/comes at 2026-12-04T00:00:00Z: it is for 1 %"},
		{"gw-1" + ramp, "at=0.05/gw-1", "4", "gw-1", ""},
		{"gw-1" + ramp, "at=0.5/gw-1", "4T23", "", "gw-1/comes at 2026-12-05T00:00:00Z: it is for 10 %"},
		{"gw-1" + ramp, "at=0.5/gw-1", "5", "gw-1", ""},
		{"gw-1" + ramp, "at=0.995/gw-1", "5", "gw-1", ""},
		{"gw-1" + ramp, "at=0.5/gw-1 asked", "2", "gw-1", ""},
		{"gw-1 rollout=3:0.1", "at=0.5/gw-1", "9", "", "gw-1/is for 10 % of the devices, and this one is at 50."},
		{"gw-1 rollout=3:0", "at=0/gw-1", "9", "", "gw-1/is for 0 % of the devices"},
		{"gw-1 rollout=3:1,4:0.1", "at=0.5/gw-1", "3", "gw-1", ""},
		{"gw-1 rollout=3:1,4:0.1", "at=0.5/gw-1", "4", "", "gw-1/is for 10 %"}, // taken back
		{"gw-1 rollout=3:1,4:0.1,5:1", "at=0.5/gw-1", "4", "", "gw-1/comes at 2026-12-05"},
		{"gw-1 rollout=3:0.1 salt=s", "at=0.05/s", "3", "gw-1", ""},
		{"gw-1 rollout=3:0.1 salt=s", "at=0.5/s", "3", "", "gw-1/is for 10 %"},
		{"gw-1; gw-2 rollout=3:0.1", "at=0.5/gw-2", "3", "gw-1", ""},
		{"gw-1; gw-2 rollout=3:0.1", "has=gw-1 at=0.5/gw-2", "3", "", ""},
		{"gw-1 rollout=3:1 not_before=4", "", "3", "", "gw-1/comes at 2026-12-04"},
		{"gw-1 rollout=3:1 paused", "", "3", "", "gw-1/is paused"},
		// What only a later version knows.
		{"gw-1 only_if=moon", "", "2", "", `gw-1/has "only_if", which this version does not know`},
		{"gw-1; gw-2 only_if=moon", "", "2", "gw-1", ""},
		{"gw-1 only_if=moon", "asked", "2", "", "gw-1/has \"only_if\""},
		{"gw-1 Paused=no", "", "2", "", `gw-1/has "Paused"`}, // names are exact
	} {
		f, err := parseFleet(testFleet(t, 1, c.releases))
		if err != nil {
			t.Errorf("%q: %v", c.releases, err)
			continue
		}
		pick, why := f.decide(deviceOf(t, f, c.device), testTime(t, c.day))
		got := ""
		if pick >= 0 {
			got = f.Releases[pick].Name
		}
		if got != c.want {
			t.Errorf("%q, device %q, day %s: got %q, want %q; %q", c.releases, c.device, c.day, got, c.want, why)
		}
		name, says, _ := strings.Cut(c.why, "/")
		found := says == ""
		for i, r := range f.Releases {
			if found = found || r.Name == name && strings.Contains(why[i], says); why[i] == "" {
				t.Errorf("%q, device %q: nothing is said of %q", c.releases, c.device, r.Name)
			}
		}
		if !found {
			t.Errorf("%q, device %q, day %s: got %q, want %q of %q", c.releases, c.device, c.day, why, says, name)
		}
	}
}

// A delta and the whole are entries of one name: which of them is taken is told by their index.
func TestFleetDeltaBesideWhole(t *testing.T) {
	f, err := parseFleet(testFleet(t, 1, "gw-1; gw-2; gw-2 from=gw-1"))
	must(t, err)
	f.Releases[2].Manifest = strings.Repeat("d", 64)
	for device, want := range map[string]int{"has=gw-1": 2, "has=gw-0": 1, "has=gw-2": -1} {
		if pick, why := f.decide(deviceOf(t, f, device), testTime(t, "2")); pick != want {
			t.Errorf("%s: got entry %d, want %d; %q", device, pick, want, why)
		}
	}
	d := deviceOf(t, f, "has=gw-1")
	d.Failed[f.deployment(&f.Releases[2])] = 3
	if pick, why := f.decide(d, testTime(t, "2")); pick != 1 {
		t.Errorf("got entry %d after three failures of the delta, want the whole; %q", pick, why)
	}
}

// The place is what doc/fleet.md says, bit for bit: another implementation must come to the same.
func TestFleetPlace(t *testing.T) {
	for _, c := range []struct {
		name, salt, id string
		want           float64
	}{
		{"gw-42", "", `{"mac":"02:00:00:00:00:01"}`, 0.35248827703709473},
		{"gw-43", "", `{"mac":"02:00:00:00:00:01"}`, 0.7860768066064352},
		{"gw-43", "gw-42", `{"mac":"02:00:00:00:00:01"}`, 0.35248827703709473},
	} {
		r := &fleetRelease{Name: c.name, Salt: c.salt}
		if got := r.place(c.id); got != c.want || got < 0 || got >= 1 {
			t.Errorf("%s, salt %q: got %.17g, want %.17g", c.name, c.salt, got, c.want)
		}
	}
	// Spread evenly, and another place for each release.
	counts, moved := [10]int{}, 0
	for i := range 10000 {
		id := fmt.Sprintf(`{"mac":"%d"}`, i)
		a, b := (&fleetRelease{Name: "gw-1"}).place(id), (&fleetRelease{Name: "gw-2"}).place(id)
		counts[int(a*10)]++
		if math.Abs(a-b) > 0.1 {
			moved++
		}
	}
	for i, n := range counts {
		if n < 850 || n > 1150 {
			t.Errorf("%d of 10000 devices are in tenth %d, want about 1000", n, i)
		}
	}
	if moved < 7500 { // of two independent places 81 % differ by more
		t.Errorf("only %d of 10000 devices have another place for another release", moved)
	}
}

func TestFleetSignatures(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	message := testFleet(t, 7, "gw-1")
	all := []crypto.Signer{rsaKey, ecKey, edKey}
	for i, k := range all {
		f, signers, err := openFleet(testSigned(t, message, k), testKeys(all...))
		_, id := fleetKeyID(k.Public())
		if err != nil || f.Serial != 7 || len(signers) != 1 || signers[0] != id[:16] {
			t.Errorf("%T: got %v by %q, %v", k, f, signers, err)
		}
		for j, other := range all {
			if _, _, err := openFleet(testSigned(t, message, other), testKeys(k)); (err == nil) != (i == j) {
				t.Errorf("signed by %T, key %T: got %v", other, k, err)
			}
		}
		signed := testSigned(t, message, k)
		for at := range len(message) - 1 { // the last one is the line feed before "sig"
			signed[at] ^= 1
			if _, _, err := openFleet(signed, testKeys(all...)); err == nil {
				t.Fatalf("%T: byte %d changed, and taken", k, at)
			}
			signed[at] ^= 1
		}
	}
	if _, signers, err := openFleet(testSigned(t, message, all...), testKeys(all...)); err != nil || len(signers) != 3 {
		t.Errorf("got signers %q, %v, want all", signers, err)
	}
	// The raw form of ECDSA, r and s of 32 bytes each, as artifacts have it.
	text, err := signManifest(ecKey, message)
	must(t, err)
	_, id := fleetKeyID(ecKey.Public())
	raw := fmt.Appendf(message[:len(message):len(message)], "sig ecdsa %s %s", id[:8], text) // and no line feed at the end
	if _, _, err := openFleet(raw, testKeys(ecKey)); err != nil {
		t.Error(err)
	}
}

// What is refused of a file, whoever signed it.
func TestFleetRefusals(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	whole := string(testFleet(t, 1, "gw-1 types=gw2 from=gw-0 groups=a rollout=2:0.1,3:1; gw-2"))
	swap := func(old, new string) string {
		if !strings.Contains(whole, old) {
			t.Fatalf("no %q in the file", old)
		}
		return strings.Replace(whole, old, new, 1)
	}
	if _, _, err := openFleet(testSigned(t, []byte(whole), key), testKeys(key)); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"":                                   "begins with",
		"hello\n":                            "begins with",
		"mendlet-fleet 2\n{}\n":              "begins with",
		fleetMagic:                           "JSON",
		fleetMagic + "[]\n":                  "array",
		fleetMagic + "null\n":                `no "channel"`,
		fleetMagic + "{}\n":                  `no "channel"`,
		fleetMagic + "{} {}\n":               "after top-level value",
		swap(`"acme"`, `"a/b"`):              "letters",
		swap(`"acme"`, `".."`):               "letters",
		swap(`"acme"`, `""`):                 "letters",
		swap(`"acme"`, `7`):                  "channel",
		swap(`"acme"`, `null`):               "null",
		swap(`"serial": 1`, `"serial": 0`):   "serial",
		swap(`"serial": 1`, `"serial": -1`):  "serial",
		swap(`"serial": 1`, `"serial": 1.5`): "serial",
		swap(`"serial": 1`, `"serial": "1"`): "serial",
		swap(`"serial": 1`, `"SERIAL": 1`):   `no "serial"`,
		swap(`"serial": 1`, `"serial": 9007199254740992`):                "serial",
		swap(`"serial": 1`, `"serial": 1, "serial": 2`):                  "second time",
		swap("2026-12-15T00:00:00Z", "2026-12-01T00:00:00Z"):             "after issued",
		swap("2026-12-15T00:00:00Z", "2026-12-15T00:00:00.5Z"):           "want 2026",
		swap("2026-12-15T00:00:00Z", "2026-12-15T00:00:00+00:00"):        "want 2026",
		swap("2026-12-15T00:00:00Z", "2026-13-15T00:00:00Z"):             "want 2026",
		swap("2026-12-15T00:00:00Z", "2026-12-15"):                       "want 2026",
		swap(`"expires"`, `"expire"`):                                    `no "expires"`,
		swap(`"serial": 1`, `"serial": 1, "poll": "soon"`):               "poll",
		swap(`"serial": 1`, `"serial": 1, "poll": "-1h"`):                "poll",
		swap(`"serial": 1`, `"serial": 1, "report": "ftp://x/"`):         "report",
		swap(`"serial": 1`, `"serial": 1, "report": "https://x"`):        "report",
		swap(`"serial": 1`, `"serial": 1, "report_method": "HEAD"`):      "report_method",
		swap(`"releases": [`, `"releases": [null,`):                      `no "name"`,
		swap(`"releases": [`, `"releases": [[],`):                        "releases",
		swap(`"releases": `, `"release": `):                              `no "releases"`,
		swap(`"name":"gw-2"`, `"name":""`):                               "name",
		swap(`"name":"gw-2"`, `"name":"gw\n2"`):                          "name",
		swap(`"name":"gw-2"`, `"name":"gw-2","name":"gw-2"`):             "second time",
		swap(`["gw-2.mender"]`, `[]`):                                    "url",
		swap(`["gw-2.mender"]`, `[""]`):                                  "url",
		swap(`["gw-2.mender"]`, `["//host/x"]`):                          "url",
		swap(`["gw-2.mender"]`, `["file:///etc/passwd"]`):                "url",
		swap(`["gw-2.mender"]`, `["ftp://host/x"]`):                      "url",
		swap(`["gw-2.mender"]`, `["1","2","3","4","5","6","7","8","9"]`): "url",
		swap(`["gw-2.mender"]`, `"gw-2.mender"`):                         "url",
		swap(`"size":1000`, `"size":0`):                                  "size",
		swap(`"size":1000`, `"size":-5`):                                 "size",
		swap(`"size":1000`, `"size":99999999999999999999`):               "size",
		swap(`"manifest":"0404`, `"manifest":"04`):                       "manifest",
		swap(`"manifest":"0404`, `"manifest":"0x04`):                     "manifest",
		swap(`"manifest":"0404`, `"manifest":"AB04`):                     "manifest",
		swap(`"device_types":["gw2"]`, `"device_types":"gw2"`):           "device_types",
		swap(`"device_types":["gw2"]`, `"device_types":[""]`):            "device_types",
		swap(`"from":["gw-0"]`, `"from":null`):                           "null",
		swap(`0.1]`, `1.1]`):                                             "0 to 1",
		swap(`0.1]`, `-0.1]`):                                            "0 to 1",
		swap(`0.1]`, `"10 %"]`):                                          "part",
		swap(`0.1]`, `0.1, 2]`):                                          "3 values",
		swap(`"2026-12-02T00:00:00Z",0.1`, `"2026-12-03T00:00:00Z",0.1`): "after that",
		swap(`"2026-12-02T00:00:00Z",0.1`, `5,0.1`):                      "time",
		strings.ReplaceAll(whole, "acme", "acm\xff"):                     "UTF-8",
		whole + strings.Repeat(" ", maxFleet):                            "more than",
		strings.Replace(whole, "[{", strings.Repeat("[", 20000), 1):      "JSON",
	} {
		if !strings.HasSuffix(text, "\n") {
			text += "\n"
		}
		_, _, err := openFleet(testSigned(t, []byte(text), key), testKeys(key))
		if err == nil || !strings.Contains(err.Error(), want) && want != "JSON" {
			t.Errorf("%.300q: got %v, want %q", text, err, want)
		}
	}
	for text, want := range map[string]string{
		whole:                                                     "not signed",
		whole[:len(whole)/2]:                                      "not signed",
		whole + "sig ed25519 00000000\n":                          "want up to 16",
		whole + "sig ed25519 0000 AAAA\n":                         "want up to 16",
		whole + "sig ed25519 00000000 *\n":                        "illegal base64",
		whole + "sig future 00000000 AAAA\n":                      "by a key that is trusted",
		whole + "sig ed25519 00000000 AAAA\nmore":                 "want up to 16",
		whole + strings.Repeat("sig ed25519 00000000 AAAA\n", 17): "want up to 16",
	} {
		if _, _, err := openFleet([]byte(text), testKeys(key)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q…%.60q: got %v, want %q", text, text[max(0, len(text)-60):], err, want)
		}
	}
	for _, list := range []string{"gw-1; gw-2; gw-1", strings.Repeat("x;", 1001)} {
		if _, err := parseFleet(testFleet(t, 1, list)); err == nil {
			t.Errorf("%.40q: taken", list)
		}
	}
	f, err := parseFleet(testFleet(t, 1, "gw-1", `"note": {"a": [1]}, "later": 5,`))
	if err != nil || len(f.Releases) != 1 {
		t.Errorf("keys of later versions: got %v", err)
	}
	names := ""
	for i := range maxReleases {
		names += fmt.Sprintf("gw-%d;", i)
	}
	if f, err := parseFleet(testFleet(t, 1, names)); err != nil || len(f.Releases) != maxReleases {
		t.Errorf("as many releases as may be: got %v", err)
	}
}

func TestFleetSerial(t *testing.T) {
	const k, other = "key", "other"
	for _, c := range []struct {
		serial  uint64
		signers []string
		seen    map[string]fleetSeen
		floor   uint64
		want    string
	}{
		{1, []string{k}, nil, 0, ""},
		{1 << 50, []string{k}, nil, 0, ""},
		{5, []string{k}, map[string]fleetSeen{k: {4, "x"}}, 0, ""},
		{5, []string{k}, map[string]fleetSeen{k: {5, ""}}, 0, ""}, // the same: see below
		{5, []string{k}, map[string]fleetSeen{k: {5, "x"}}, 0, "not the file"},
		{5, []string{k}, map[string]fleetSeen{k: {6, "x"}}, 0, "older"},
		{1000005, []string{k}, map[string]fleetSeen{k: {5, "x"}}, 0, ""},
		{1000006, []string{k}, map[string]fleetSeen{k: {5, "x"}}, 0, "ahead"},
		{5, []string{k}, nil, 6, "older"},
		{6, []string{k}, nil, 6, ""},
		{5, []string{k}, map[string]fleetSeen{k: {5, ""}}, 6, ""}, // what was seen says more than the floor
		{1, []string{other}, map[string]fleetSeen{k: {maxSerial, "x"}}, 0, ""},
		{7, []string{k, other}, map[string]fleetSeen{k: {5, "x"}, other: {8, "x"}}, 0, "older"},
		{7, []string{k, other}, map[string]fleetSeen{k: {5, "x"}}, 0, ""},
	} {
		f, err := parseFleet(testFleet(t, c.serial, "gw-1"))
		must(t, err)
		seen := map[string]fleetSeen{}
		for key, s := range c.seen {
			if s.Sum == "" {
				s.Sum = f.Sum
			}
			seen[key+" acme"], seen[key+" other"] = s, fleetSeen{maxSerial, "x"}
		}
		err = f.checkSerial(c.signers, seen, c.floor)
		if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || !isTemporary(err)) {
			t.Errorf("serial %d, seen %v, floor %d: got %v, want %q", c.serial, c.seen, c.floor, err, c.want)
		}
	}
}

// The time is never before what the file, or the journal, says it must be.
func TestFleetTime(t *testing.T) {
	f, err := parseFleet(testFleet(t, 1, "gw-1"))
	must(t, err)
	for _, c := range []struct{ clock, floor, want string }{
		{"5", "3", "5"}, {"3", "5", "5"}, {"20", "3", "20"},
		{"", "", "1"}, // no clock at all: the file itself says so
	} {
		var clock, floor time.Time
		if c.clock != "" {
			clock, floor = testTime(t, c.clock), testTime(t, c.floor)
		}
		if got := f.at(clock, floor); !got.Equal(testTime(t, c.want)) {
			t.Errorf("clock %q, floor %q: got %s, want day %s", c.clock, c.floor, got, c.want)
		}
	}
}

// The attacks that the file alone answers; those on what is fetched are in fleet_source_test.go.

func TestFleetAttackDowngradeByOrder(t *testing.T) {
	f, err := parseFleet(testFleet(t, 2, "gw-1; gw-2"))
	must(t, err)
	if pick, _ := f.decide(deviceOf(t, f, "has=gw-2 asked"), testTime(t, "2")); pick >= 0 {
		t.Errorf("a device with gw-2 takes %q", f.Releases[pick].Name)
	}
}

func TestFleetAttackFastForward(t *testing.T) {
	f, err := parseFleet(testFleet(t, maxSerial, "gw-1"))
	must(t, err)
	seen := map[string]fleetSeen{"stolen acme": {10, "x"}}
	if err := f.checkSerial([]string{"stolen"}, seen, 0); err == nil {
		t.Error("a serial without a next one is taken")
	}
	next, err := parseFleet(testFleet(t, 11, "gw-1"))
	must(t, err)
	seen["stolen acme"] = fleetSeen{maxSerial, "x"}
	if err := next.checkSerial([]string{"new"}, seen, 0); err != nil {
		t.Errorf("another key has to begin at the count of a stolen one: %v", err)
	}
}

func TestFleetAttackTwoPublishers(t *testing.T) {
	a, err := parseFleet(testFleet(t, 5, "gw-1"))
	must(t, err)
	b, err := parseFleet(testFleet(t, 5, "gw-2"))
	must(t, err)
	err = b.checkSerial([]string{"k"}, map[string]fleetSeen{"k acme": {5, a.Sum}}, 0)
	if err == nil || !strings.Contains(hintOf(err), "two publishers") {
		t.Errorf("got %v, hint %q", err, hintOf(err))
	}
}

func TestFleetAttackOldCopyOfACache(t *testing.T) {
	f, err := parseFleet(testFleet(t, 5, "gw-1"))
	must(t, err)
	if err := f.checkSerial([]string{"k"}, map[string]fleetSeen{"k acme": {6, "x"}}, 0); !errors.Is(err, errFleetOlder) ||
		exitCode(err) != exitTempFail {
		t.Errorf("got %v", err)
	}
}

// A signed manifest of an artifact is no channel file, and the other way round.
func TestFleetAttackOtherSignedText(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	manifest := []byte(strings.Repeat("a", 64) + "  version\n")
	if _, _, err := openFleet(testSigned(t, manifest, key), testKeys(key)); err == nil {
		t.Error("a manifest is taken for a channel file")
	}
	if _, err := parseManifest(testFleet(t, 1, "gw-1")); err == nil {
		t.Error("a channel file is taken for a manifest")
	}
}

func FuzzFleet(f *testing.F) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(f, err)
	all := testFleet(f, 1, "gw-1 step rollout=2:0.1,3:1 from=*; gw-2 groups=a types=gw2 not_before=3")
	f.Add(testSigned(f, all, key), "gw-1")
	f.Add(testFleet(f, 1, ""), "")
	f.Fuzz(func(t *testing.T, text []byte, name string) {
		message, sigs, err := splitFleet(text)
		if err != nil {
			return
		}
		if len(sigs) > maxFleetSigs || len(message) > len(text) {
			t.Fatalf("%d signatures, %d of %d bytes", len(sigs), len(message), len(text))
		}
		file, err := parseFleet(message)
		if err != nil {
			return
		}
		if len(file.Releases) > maxReleases || !validChannel(file.Channel) || file.Serial == 0 {
			t.Fatalf("got %+v", file)
		}
		now := file.at(time.Unix(0, 0), time.Time{})
		for _, asked := range []bool{false, true} {
			d := &fleetDevice{ID: name, Artifact: name, Type: "gw2", Asked: asked}
			pick, why := file.decide(d, now)
			if len(why) != len(file.Releases) || pick >= len(why) {
				t.Fatalf("picked %d, and %d reasons of %d releases", pick, len(why), len(file.Releases))
			}
			own := -1
			for i, r := range file.Releases {
				if r.Name == name {
					own = i
				}
			}
			if pick >= 0 && (pick <= own || file.Releases[pick].meant(d) != "" || file.Releases[pick].Unknown != "") {
				t.Fatalf("picked %d, own place %d", pick, own)
			}
		}
	})
}
