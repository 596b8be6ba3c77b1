// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nomonitor

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Monitoring in the power-cut simulator. Its file is replaced as a whole, as dir.write does it: each content is a file
// of its own, and the name a byte of the directory, which says whose it is.

const simMonitor, simMonitorDir = "/sim/monitor.", "/sim/directory"

// monitorWorld is a device whose checks are monitored, and what its server has been told.
type monitorWorld struct {
	*simDevice
	s       *managedSetup
	now     time.Time
	mood    string // of the server: "takes", "away", or "lost", which takes and does not get its answer through
	first   []testAlert
	told    map[string]int // how often, by alert
	again   map[string]int // of these, how often it was right to tell once more
	swallow bool           // a faulty program: it journals what it tells afterwards
}

func newMonitorWorld(t testing.TB, s *managedSetup) *monitorWorld {
	w := &monitorWorld{simDevice: newSimDevice(t, s.dir, s.images), s: s, told: map[string]int{}, again: map[string]int{},
		now: time.Now().Add(time.Hour)}
	w.w.files[simMonitorDir] = &simFile{path: simMonitorDir, name: "directory", durable: []byte{0}, current: []byte{0}}
	writeFile(t, w.log(), "an old error\n")
	return w
}

func (w *monitorWorld) log() string { return filepath.Join(w.dir, "log") }

// replace is dir.write.
func (w *monitorWorld) replace(data []byte) error {
	n := byte(len(w.w.files))
	f := &simFile{path: simMonitor + string(n), name: "monitor", durable: make([]byte, len(data)),
		current: make([]byte, len(data))}
	w.w.files[f.path] = f
	for _, step := range []struct {
		f    *simFile
		data []byte
	}{{f, data}, {w.w.files[simMonitorDir], []byte{n}}} {
		st := simStorage{w.w, step.f}
		_, err := st.WriteAt(step.data, 0)
		if err = errors.Join(err, st.Sync()); err != nil {
			return err
		}
	}
	return nil
}

// stored is what there is under the name now.
func (w *monitorWorld) stored() []byte {
	if f := w.w.files[simMonitor+string(w.w.files[simMonitorDir].current[0])]; f != nil {
		return f.current
	}
	return nil
}

// alert stands for the server's service.
func (w *monitorWorld) alert(route string, answer http.ResponseWriter, r *http.Request) bool {
	w.s.server.mu.Lock()
	defer w.s.server.mu.Unlock()
	if route != "POST alert" || w.mood == "takes" {
		return false
	}
	if w.mood == "lost" {
		var list []testAlert
		if err := json.NewDecoder(r.Body).Decode(&list); err != nil {
			w.t.Error(err)
		}
		w.s.server.alerts = append(w.s.server.alerts, list...)
		panic(http.ErrAbortHandler)
	}
	apiError(answer, 503, "away")
	return true
}

// run is "mendlet monitor" with what is on the disk. It reports whether the power was cut.
func (w *monitorWorld) run() (cut bool, err error) {
	writeFile(w.t, filepath.Join(w.dir, monitorName), string(w.stored()))
	a := w.start()
	a.c.Servers = []serverEntry{{w.s.server.URL}}
	a.c.MonitorChecks, a.c.MonitorBuiltin = filepath.Join(w.dir, "none"), []string{"process p"}
	a.o.now = func() time.Time { return w.now }
	a.o.paths = a.c.paths
	if a.rec, err = w.peek(); err != nil {
		return false, err
	}
	m := newMonitor(a)
	var late []byte
	m.store = func(_ string, data []byte, _ os.FileMode) error {
		if w.swallow && late == nil {
			late = data
			return nil
		}
		return w.replace(data)
	}
	cut = w.powered(func() { err = m.once(w.t.Context(), newRound(a).from) })
	return cut, err
}

// account notes what the server has heard in a run, and holds it against what waits after it.
func (w *monitorWorld) account(clean bool) error {
	w.s.server.mu.Lock()
	heard := w.s.server.alerts
	w.s.server.alerts = nil
	w.s.server.mu.Unlock()
	var st monitorState
	json.Unmarshal(w.stored(), &st)
	waits := map[string]bool{}
	for _, a := range st.Alerts {
		waits[a.Name+" "+a.Subject.Status+" "+a.Time] = true
	}
	for i, a := range heard {
		key := a.Name + " " + a.Subject.Status + " " + a.Time.Format(time.RFC3339)
		if i > 0 && a.Time.Before(heard[i-1].Time) {
			return fmt.Errorf("told %q after a later one", key)
		}
		if w.told[key]++; w.told[key] == 1 {
			w.first = append(w.first, a)
		}
		if waits[key] {
			w.again[key]++
		}
		if waits[key] && clean {
			return fmt.Errorf("%q was taken, and still waits", key)
		}
	}
	return nil
}

// live lets a service end and come back, an error come into a log, and the server be away; after a cut the device goes
// on with the same. A second cut may follow the first.
func (w *monitorWorld) live(lose func(), second int) (cuts int, err error) {
	stat := filepath.Join(w.root, "proc/7/stat")
	for i, mood := range []string{"takes", "takes", "away", "lost", "takes", "takes"} {
		w.now = w.now.Add(15 * time.Minute)
		os.Remove(stat)
		if i%2 == 0 || i == 5 {
			writeFile(w.t, stat, "7 (p) S 1")
		}
		if i == 1 {
			writeFile(w.t, w.log(), "an old error\na new error\n")
		}
		w.s.server.mu.Lock()
		w.mood = mood
		w.s.server.mu.Unlock()
		for again := true; again; w.now = w.now.Add(time.Minute) {
			var rerr error
			if again, rerr = w.run(); again {
				cuts++
				lose()
				if w.w.cutAt = 0; cuts == 1 && second > 0 {
					w.w.cutAt = w.w.ops + second
				}
			}
			if err := errors.Join(rerr, w.account(!again && mood == "takes")); err != nil {
				return cuts, err
			}
		}
	}
	var st monitorState
	if err := json.Unmarshal(w.stored(), &st); err != nil || len(st.Alerts) > 0 {
		return cuts, fmt.Errorf("%d alerts were not told: %w", len(st.Alerts), err)
	}
	said := map[string]string{}
	for i, a := range w.first {
		if i > 0 && a.Time.Before(w.first[i-1].Time) {
			return cuts, fmt.Errorf("%s of %v was told late", a.Name, a.Time)
		}
		said[a.Name] += a.Subject.Status + " "
	}
	if got := fmt.Sprint(said); got != "map[log_app:CRITICAL OK  process_p:CRITICAL OK CRITICAL OK ]" {
		return cuts, fmt.Errorf("told %s", got)
	}
	for key, n := range w.told {
		if want := 1 + w.again[key]; n != want {
			return cuts, fmt.Errorf("told %q %d times, want %d", key, n, want)
		}
	}
	return cuts, nil
}

// cutMonitor cuts the power at every write and sync of that life. Each change is told, the oldest first, with one time:
// once, and once more for each answer of the server that did not reach the journal.
func cutMonitor(t *testing.T, prep func(*monitorWorld)) (states, repeats int, err error) {
	s := newManagedSetup(t)
	s.server.takesAlerts = true
	for _, dir := range []string{"proc/7", stockChecks} {
		must(t, os.MkdirAll(filepath.Join(s.dir, "root", dir), 0o755))
	}
	writeFile(t, filepath.Join(s.dir, "root", stockChecks, "log_app.sh"),
		"LOG_PATTERN=\"error$\"\nLOG_FILE='"+filepath.Join(s.dir, "log")+"'\n")
	rng := rand.New(rand.NewSource(3))
	step := 3
	if exhaustive() {
		step = 1
	}
	for k := 1; ; k += step {
		modes := lossModes[k%len(lossModes):][:1]
		if exhaustive() {
			modes = lossModes
		}
		for _, mode := range modes {
			w := newMonitorWorld(t, s)
			prep(w)
			w.s.server.setFault(w.alert)
			all := tears(rng)
			torn, second := all[rng.Intn(len(all))], rng.Intn(12)
			w.w.cutAt = k
			cuts, err := w.live(func() { w.w.lose(mode, torn, rng) }, second)
			if err != nil {
				return states, repeats, fmt.Errorf("cut at operation %d, mode %s, torn after %d, and %d later: %w", k, mode, torn,
					second, err)
			}
			if cuts == 0 {
				return states, repeats, nil
			}
			states += cuts
			for _, n := range w.again {
				repeats += n
			}
		}
	}
}

func TestMonitorPowerCutAtEveryOperation(t *testing.T) {
	t.Parallel()
	states, repeats, err := cutMonitor(t, func(*monitorWorld) {})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d crash states, %d alerts told again", states, repeats)
	if states < 10 || repeats == 0 {
		t.Error("the simulator does not see the program's writes")
	}
}

// Tests of the test: programs that get the order wrong must be found out.
func TestMonitorSimulatorFindsWrongOrders(t *testing.T) {
	onlyExhaustive(t, "it lives many lives")
	for name, prep := range map[string]func(*monitorWorld){
		"told before it is journaled": func(w *monitorWorld) { w.swallow = true },
		"file not synced":             func(w *monitorWorld) { w.w.lying = map[string]bool{"monitor": true} },
		"directory not synced":        func(w *monitorWorld) { w.w.lying = map[string]bool{"directory": true} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			states, _, err := cutMonitor(t, prep)
			if err == nil {
				t.Fatalf("nothing found in %d crash states", states)
			}
			t.Logf("found after %d: %v", states, err)
		})
	}
}
