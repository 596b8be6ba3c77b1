// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nofleet

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// A device follows a channel on each kind of web server there is: it is updated with a reboot in between,
// and asks for what has not changed with the name of what it has.
func TestChannelOnWebServers(t *testing.T) {
	t.Parallel()
	eachWebServer(t, func(t *testing.T, site *webSite) {
		if site.link != nil {
			t.Skip("its links are secrets of one file each")
		}
		s := newManagedSetup(t)
		h := &fleetHost{Server: newFleetHost(t).Server, t: t, key: testSigner(t)}
		h.files = map[string][]byte{}
		artifact := readFileOrNil(s.artifacts["new"])
		writeFile(t, filepath.Join(site.dir, "new.mender"), string(artifact))
		file := h.signFile(7, nil, testEntry(t, "new", artifact, nil))
		writeFile(t, filepath.Join(site.dir, "acme.fleet"), string(file))
		h.Server.URL = site.URL
		d := newSimDevice(t, s.dir, s.images)
		must(t, d.settleChannel(h))
		must(t, d.check("new"))
		site.counted()
		follow := func(a *app) { h.followed(a) }
		must(t, d.managedRun(t.Context(), "", follow))
		requests, _, sent := site.counted()
		if len(requests) != 1 || !strings.Contains(requests[0], "GET /acme.fleet") {
			t.Errorf("a poll of what has not changed: %q", requests)
		}
		t.Logf("a poll of what has not changed: %d bytes from the server", sent)
		if whole := int64(len(file)); strings.HasPrefix(site.name, "nginx") && !site.keeps && sent >= whole {
			t.Errorf("%d bytes came, want an answer of 304, and the file has %d", sent, whole)
		}
		// An older file, as a cache or an attacker has it.
		writeFile(t, filepath.Join(site.dir, "acme.fleet"), string(h.signFile(6, nil)))
		must(t, os.Chtimes(filepath.Join(site.dir, "acme.fleet"), time.Time{}, time.Now().Add(time.Hour)))
		err := d.managedRun(t.Context(), "", follow)
		if !site.keeps && (err == nil || !strings.Contains(err.Error(), "older")) {
			t.Errorf("an older file: got %v", err)
		}
	})
}

// A stick, as packaging/stick has it: an image with a file system, mounted by the script.
func TestChannelStickImage(t *testing.T) {
	for _, tool := range []string{"unshare", "mount", "losetup", "mke2fs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: loop devices and mounts")
	}
	b := newChannelBoard(t)
	content := filepath.Join(b.dir, "content")
	must(t, os.Mkdir(content, 0o755))
	text := b.artifact("gw-1", "good")
	must(t, os.WriteFile(content+"/gw-1.mender", text, 0o644))
	must(t, os.WriteFile(content+"/acme.fleet", b.host.signFile(5, nil, testEntry(t, "gw-1", text, nil)), 0o644))
	b.host.Close() // no network
	img := filepath.Join(b.dir, "stick.img")
	out, err := exec.Command("mke2fs", "-q", "-t", "ext2", "-d", content, img, "2M").CombinedOutput()
	if err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	out, err = exec.Command("losetup", "-f", "--show", img).Output()
	if err != nil {
		t.Skipf("needs loop devices: %v", err)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "-d", loop).Run() })
	self, err := os.Executable()
	must(t, err)
	must(t, os.Mkdir(b.dir+"/bin", 0o755))
	writeScript(t, b.dir+"/bin/mendlet", fmt.Sprintf(`exec %q -b %q "$@" --log stderr`, self, b.dir+"/none"), 0o755)
	script, err := filepath.Abs("packaging/stick/mendlet-stick")
	must(t, err)
	plug := func() string {
		cmd := exec.Command("unshare", "-m", "sh", script, strings.TrimPrefix(loop, "/dev/"))
		cmd.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=1", "PATH="+b.dir+"/bin:"+os.Getenv("PATH"),
			"MENDLET_STICK="+b.dir+"/mnt")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if said := plug(); !strings.Contains(said, "success") {
		t.Errorf("got %s", said)
	}
	b.has("gw-1")
	if said := plug(); !strings.Contains(said, "nothing is to be installed") {
		t.Errorf("got %s", said)
	}
	if rest, err := os.ReadDir(b.dir + "/mnt"); err != nil || len(rest) > 0 {
		t.Errorf("the stick is mounted still: %v, %v", rest, err)
	}
}

// fleetUnit is one device of many: files, and an update module.
type fleetUnit struct {
	dir, id string
	fetched int64 // bytes of artifacts, in the last run
}

func newFleetUnit(t testing.TB, dir, id string) *fleetUnit {
	u := &fleetUnit{dir: filepath.Join(dir, id), id: id}
	must(t, os.MkdirAll(u.dir, 0o755))
	writeFile(t, u.dir+"/device_type", "device_type=qemu\n")
	writeFile(t, u.dir+"/artifact_info", "artifact_name=gw-1\n")
	return u
}

// run is "mendlet run --now", but for what --now does about rollouts.
func (u *fleetUnit) run(ctx context.Context, c *config) error {
	conf := *c
	conf.paths = paths{conf: u.dir, data: c.paths.data, ds: u.dir}
	conf.DeviceTypeFile, conf.UpdateLogPath, conf.DeviceID = u.dir+"/device_type", u.dir, u.id
	a := &app{c: &conf, m: newMachine(""), lg: &logger{level: levelFatal}, out: io.Discard, openJournal: openJournal,
		urlSource: urlSource, o: &options{log: "stderr", quiet: true, progress: "none", write: defaultWriteOptions(),
			deadline: time.Hour, noReboot: true, paths: conf.paths}}
	defer a.closeState()
	err := runOnce(ctx, a)
	u.fetched = a.fetched.Load()
	return err
}

// runAll has all devices run, and gives the exit codes by how often they came.
func runAll(t *testing.T, units []*fleetUnit, c *config) map[int]int {
	t.Helper()
	codes, mu, next := map[int]int{}, sync.Mutex{}, make(chan *fleetUnit)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for u := range next {
				code := exitCode(u.run(t.Context(), c))
				mu.Lock()
				codes[code]++
				mu.Unlock()
			}
		})
	}
	for _, u := range units {
		next <- u
	}
	close(next)
	all.Wait()
	return codes
}

// Many devices on one nginx: a release for 10 %, then for all; then a bad one for 10 %, which is rolled back there and
// paused. Who has what, what was asked for, and the reports that nginx has taken are counted.
func TestChannelManyDevices(t *testing.T) {
	t.Parallel()
	n := 20
	if exhaustive() {
		n = 200
	}
	site := newWebSite(t, &webServer{name: "nginx", start: startNginx(
		`root DIR; location /r/ { dav_methods PUT; create_full_put_path on; }`)})
	h := &fleetHost{Server: newFleetHost(t).Server, t: t, key: testSigner(t)}
	dir := fastDir(t)
	must(t, os.MkdirAll(dir+"/share/modules/v3", 0o755))
	writeScript(t, dir+"/share/modules/v3/testmod", `case "$1" in
NeedsArtifactReboot) echo No ;;
SupportsRollback) echo Yes ;;
ArtifactInstall) ! grep -q broken "$2/files/payload" ;;
esac`, 0o755)
	c := defaultConfig(paths{data: dir + "/share"})
	c.Channel, c.FleetVerifyKeys = site.URL+"/acme.fleet", []string{publicFile(t, h.key.Public())}
	var units []*fleetUnit
	for i := range n {
		units = append(units, newFleetUnit(t, dir, fmt.Sprintf("device-%d", i)))
	}
	artifacts := map[string][]byte{}
	serial := 0
	// publish writes the next file, in which the release is for this part of the devices.
	publish := func(name, payload string, part float64, paused bool) {
		file := filepath.Join(dir, "payload")
		writeFile(t, file, payload)
		if artifacts[name] == nil {
			must(t, packCommand([]string{"-T", "testmod", "-n", name, "-c", "qemu", "-f", file, "-o",
				filepath.Join(site.dir, name+".mender")}, io.Discard, nil))
			artifacts[name] = readFileOrNil(filepath.Join(site.dir, name+".mender"))
		}
		serial++
		var list []map[string]any
		for _, r := range []string{"gw-2", "gw-3"} {
			if artifacts[r] == nil {
				continue
			}
			e := testEntry(t, r, artifacts[r], nil)
			if r == name {
				e["rollout"] = [][]any{{"2020-01-01T00:00:00Z", part}}
				e["paused"] = paused
			}
			list = append(list, e)
		}
		// Of another second than the file before it: a web server tells files apart by that.
		path := filepath.Join(site.dir, "acme.fleet")
		writeFile(t, path, string(h.signFile(serial, map[string]any{"report": site.URL + "/r/"}, list...)))
		must(t, os.Chtimes(path, time.Time{}, time.Unix(1700000000+int64(serial), 0)))
	}
	have := func() map[string]int {
		got := map[string]int{}
		for _, u := range units {
			rec, err := peekJournal(u.dir, nil)
			must(t, err)
			got[rec.Provides["artifact_name"]]++
		}
		return got
	}
	within := func(name string, part float64) (in int) {
		for _, u := range units {
			if (&fleetRelease{Name: name}).place(u.id) < part {
				in++
			}
		}
		return in
	}
	expect := func(what string, in, downloads, failed int, codes map[int]int, name string) {
		t.Helper()
		requests, _, _ := site.counted()
		loads := 0
		for _, u := range units {
			if u.fetched > 0 {
				loads++
			}
		}
		t.Logf("%s: %v, exit codes %v, %d requests, %d downloads", what, have(), codes, len(requests), loads)
		if have()[name] != in || loads != downloads || len(requests) < n || codes[exitFailed] != failed ||
			codes[exitOK]+codes[exitFailed] != n {
			t.Errorf("%s: want %d with %q, %d downloads, %d failures", what, in, name, downloads, failed)
		}
	}
	ten := within("gw-2", 0.1)
	publish("gw-2", "good", 0.1, false)
	codes := runAll(t, units, c)
	expect("gw-2 for 10 %", ten, ten, 0, codes, "gw-2")
	codes = runAll(t, units, c)
	expect("gw-2 for 10 %, once more", ten, 0, 0, codes, "gw-2")
	publish("gw-2", "good", 1, false)
	codes = runAll(t, units, c)
	expect("gw-2 for all", n, n-ten, 0, codes, "gw-2")
	bad := within("gw-3", 0.1)
	publish("gw-3", "broken", 0.1, false)
	codes = runAll(t, units, c)
	expect("gw-3, which is bad, for 10 %", n, bad, bad, codes, "gw-2")
	publish("gw-3", "broken", 0.1, true)
	codes = runAll(t, units, c)
	expect("gw-3 paused", n, 0, 0, codes, "gw-2")
	if ten == 0 || bad == 0 || ten == n {
		t.Errorf("of %d devices %d and %d are in a rollout of 10 %%", n, ten, bad)
	}
	// The folder of reports is the state of the fleet.
	reports, err := filepath.Glob(site.dir + "/r/acme/*.json")
	must(t, err)
	results := map[string]int{}
	for _, path := range reports {
		var r struct{ Artifact, Release, Result string }
		must(t, json.Unmarshal(readFileOrNil(path), &r))
		results[r.Artifact+" "+r.Release+" "+r.Result]++
	}
	if len(reports) != n || results["gw-2 gw-2 committed"] != n-bad || results["gw-2 gw-3 rolled-back"] != bad {
		t.Errorf("%d reports: %v", len(reports), results)
	}
}

// channelLoad is a simulation of a fleet that cron has poll a channel once an hour, second by second: a release is for
// 1 % from hour 2 on, for 10 % from hour 4 and for all from hour 6. The bytes of an answer are those that
// TestChannelOnWebServers measures, with nginx.
type channelLoad struct {
	devices int
	splay   time.Duration
}

const (
	load304   = 180       // bytes of nginx' answer 304
	loadFile  = 3000      // bytes of a file of ten releases
	loadDelta = 6_000_000 // bytes of a delta
	loadWhole = 180_000_000
)

// run gives the requests in each second, and the devices that begin to download in each hour.
func (l *channelLoad) run() (requests []int, begun [8]int) {
	requests = make([]int, 8*3600+3600)
	r := &fleetRelease{Name: "gw-42"}
	hour := func(n int) time.Time { return time.Unix(0, 0).Add(time.Duration(n) * time.Hour) }
	r.Rollout = []fleetShare{{hour(2), 0.01}, {hour(4), 0.1}, {hour(6), 1}}
	for i := range l.devices {
		id := fmt.Sprintf(`{"mac":"02:00:%02x:%02x:%02x:%02x"}`, i>>24&255, i>>16&255, i>>8&255, i&255)
		at, place := splay(id, l.splay)+skew(id), r.place(id)
		has := false
		for n := range 8 {
			second := n*3600 + int(at/time.Second)
			requests[second]++
			if part, _ := r.share(hour(n).Add(at), place); place < part && !has {
				has = true
				requests[second]++
				begun[n]++
			}
		}
	}
	return requests[:8*3600], begun
}

// The table of doc/fleet.md, with -v and MENDLET_TEST_ALL=1.
func TestChannelLoad(t *testing.T) {
	t.Parallel()
	devices := 20_000
	if exhaustive() {
		devices = 1_000_000
	}
	for _, spread := range []time.Duration{0, 10 * time.Minute, time.Hour} {
		l := &channelLoad{devices, spread}
		requests, begun := l.run()
		mean := func(hour int) float64 {
			sum := 0
			for _, n := range requests[hour*3600 : hour*3600+3600] {
				sum += n
			}
			return float64(sum) / 3600
		}
		quiet, peak := slices.Max(requests[:3600]), slices.Max(requests)
		t.Logf("--splay %-5s %8d requests/s at most while nothing changes (mean %.0f), %8d in the rollout", spread, quiet,
			mean(0), peak)
		for _, hour := range []int{2, 4, 6} {
			t.Logf("  hour %d: %7d begin; deltas %.2f Gbit/s on average, whole artifacts %.1f", hour, begun[hour],
				float64(begun[hour])*loadDelta*8/3600/1e9, float64(begun[hour])*loadWhole*8/3600/1e9)
		}
		t.Logf("  a day of polls: %.1f GB of answers 304, against %.1f GB of whole files", float64(devices)*24*load304/1e9,
			float64(devices)*24*loadFile/1e9)
		for _, hour := range []int{2, 4, 6} { // of some the clock is late
			begun[hour] += begun[hour+1]
		}
		total := begun[2] + begun[4] + begun[6]
		if total < devices*999/1000 || begun[2] < devices*8/1000 || begun[2] > devices*12/1000 ||
			begun[4] < devices*85/1000 || begun[4] > devices*95/1000 {
			t.Errorf("got %v of %d devices in the hours of the rollout", begun, devices)
		}
		if want := devices / 3600; spread == time.Hour && quiet > 3*want+20 {
			t.Errorf("with --splay 1h: got %d requests in a second, want about %d", quiet, want)
		}
	}
}
