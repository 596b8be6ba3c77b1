// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nomonitor && !nofleet

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// monitorBoard is a board with checks and a clock of its own. The server has accepted it.
type monitorBoard struct {
	*verbBoard
	now time.Time
	log strings.Builder
}

func newMonitorBoard(t *testing.T, keys map[string]any) *monitorBoard {
	b := &monitorBoard{verbBoard: newVerbBoard(t), now: time.Now().UTC().Truncate(time.Second).Add(time.Hour)}
	b.setup()
	b.server.autoAccept, b.server.takesAlerts = true, true
	var conf map[string]any
	must(t, json.Unmarshal([]byte(readText(t, b.dir+"/etc/mender.conf")), &conf))
	conf["MonitorChecks"] = b.dir + "/checks.d"
	for k, v := range keys {
		conf[k] = v
	}
	text, err := json.Marshal(conf)
	must(t, err)
	must(t, os.WriteFile(b.dir+"/etc/mender.conf", text, 0o600))
	must(t, os.Mkdir(b.dir+"/checks.d", 0o755))
	b.want(0, "the device is accepted", "bootstrap")
	return b
}

// check makes one of shell.
func (b *monitorBoard) check(name, script string) {
	writeScript(b.t, b.dir+"/checks.d/"+name, script, 0o755)
}

// run is a run of the verb by the board's clock; edit may change it before.
func (b *monitorBoard) run(edit func(*monitor)) (*monitorState, error) {
	b.t.Helper()
	o := newOptions()
	o.fallback, o.now = b.dir+"/none", func() time.Time { return b.now }
	b.log.Reset()
	a, err := newApp(o, newLogger(&b.log), strings.NewReader(""), &b.log, urlSource)
	must(b.t, err)
	watch(a)
	a.m.root = b.dir + "/root"
	a.rec, err = a.peek()
	must(b.t, err)
	a.nameUnsaved()
	r, m := newRound(a), newMonitor(a)
	r.server.looks, m.says = true, true
	if edit != nil {
		edit(m)
	}
	err = m.once(b.t.Context(), r.from)
	b.t.Logf("run at %v: %v\n%s", b.now, err, b.log.String())
	return m.st, err
}

// told gives what the server has heard since the last call, a word for each alert.
func (b *monitorBoard) told() string {
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	var said []string
	for _, a := range b.server.alerts {
		said = append(said, fmt.Sprintf("%s=%s@%d", a.Name, a.Subject.Status, int(a.Time.Sub(b.now).Seconds())))
	}
	b.server.alerts = nil
	return strings.Join(said, " ")
}

// What checks say, and what they do, comes to harmless results within their bounds.
func TestMonitorPrograms(t *testing.T) {
	b := newMonitorBoard(t, nil)
	pid := filepath.Join(b.dir, "pid")
	for name, c := range map[string]struct{ script, status, text string }{
		"ok":       {"echo 'fine | x=1'; echo more", "OK", "fine"},
		"warning":  {"echo so; exit 1", "WARNING", "so"},
		"critical": {"echo bad >&2; echo worse; exit 2", "CRITICAL", "worse"},
		"unknown":  {"exit 3", "UNKNOWN", ""},
		"other":    {"exit 7", "UNKNOWN", "exit status 7"},
		"killed":   {"kill -9 $$", "UNKNOWN", "killed"},
		"control":  {`printf 'a\033[31mb\007\377\342\200\256c\r\n'; exit 2`, "CRITICAL", `a\x1b[31mb\a\xff\u202ec`},
		"flood":    {"yes x | head -c 3000000 | tr -d '\\n'; exit 2", "CRITICAL", strings.Repeat("x", maxCheckText)},
		"fork":     {"sleep 1000 > /dev/null 2>&1 & echo $! > " + pid + "; echo forked", "OK", "forked"},
		"nice":     {"cut -d ' ' -f 19 /proc/self/stat", "OK", "19"},
	} {
		b.check(name, c.script)
		defer func() {
			s := b.state().Checks[name]
			if s.Status != c.status || !strings.Contains(s.Text, c.text) || len(s.Text) > maxCheckText ||
				s.Type != "check" {
				t.Errorf("%s: got %s, %.100q, want %s, %.100q", name, s.Status, s.Text, c.status, c.text)
			}
		}()
	}
	if _, err := exec.LookPath("ionice"); err == nil {
		b.check("ionice", "ionice | grep -q idle || exit 2")
	}
	writeFile(t, b.dir+"/checks.d/no-program", "x")
	b.check("ok~", "exit 2")
	b.want(0, "is no check", "monitor")
	if st := b.state(); len(st.Checks) != 10 && st.Checks["ionice"].Status != "OK" {
		t.Errorf("got %v", sortedKeys(b.state().Checks))
	}
	n, err := strconv.Atoi(strings.TrimSpace(readText(t, pid)))
	must(t, err)
	for range 1000 { // SIGKILL was sent; the kernel may need a moment
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n)); err != nil || strings.Contains(string(stat), ") Z ") {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n)); err == nil && !strings.Contains(string(stat), ") Z ") {
		syscall.Kill(n, syscall.SIGKILL)
		t.Errorf("what a check has left behind lives: %s", stat)
	}
}

func (b *monitorBoard) state() *monitorState {
	c := defaultConfig(paths{ds: b.dir + "/var"})
	return readMonitor(c)
}

// A check that hangs costs its time and no more, and those behind it run.
func TestMonitorHang(t *testing.T) {
	onlyExhaustive(t, "it waits")
	b := newMonitorBoard(t, map[string]any{"MonitorTimeoutSeconds": 1})
	b.check("a", "trap '' TERM; while :; do sleep 100; done")
	b.check("b", "while :; do echo x; done")
	b.check("c", "exit 2")
	b.want(0, "", "monitor")
	for name, want := range map[string]string{"a": "not done after 1s", "b": "not done after 1s", "c": ""} {
		if s := b.state().Checks[name]; !strings.Contains(s.Text, want) {
			t.Errorf("%s: got %+v, want %q", name, s, want)
		}
	}
}

// More checks than there may be, two of one name, and no directory.
func TestMonitorBounds(t *testing.T) {
	b := newMonitorBoard(t, nil)
	for i := range maxChecks + 2 {
		b.check(fmt.Sprintf("c%02d", i), "exit 0")
	}
	b.want(0, "want one of each name, and no more than 50", "monitor")
	if st := b.state(); len(st.Checks) != maxChecks || st.Checks["c50"].Type != "" {
		t.Errorf("got %d checks", len(st.Checks))
	}
	must(t, os.RemoveAll(b.dir+"/checks.d"))
	b.want(0, "", "monitor")
	writeFile(t, b.dir+"/checks.d", "")
	b.want(exitFailed, "not a directory", "monitor")
	for _, text := range []string{"", "{", "null", `{"checks":null}`, `{"checks":{},"alerts":[null]}`,
		`{"checks":3}`} {
		writeFile(t, b.dir+"/var/"+monitorName, text)
		if st := b.state(); st.Checks == nil || len(st.Checks) > 0 || len(st.Alerts) > 0 {
			t.Errorf("%q: got %+v", text, st)
		}
	}
}

// A server that takes alerts: each change once, the oldest first, by their own times; one that asks to wait, and
// one that is away for a day.
func TestMonitorAlerts(t *testing.T) {
	b := newMonitorBoard(t, nil)
	b.check("x", "echo up")
	tell := func(want string) {
		t.Helper()
		if _, err := b.run(nil); err != nil {
			t.Fatal(err)
		}
		if got := b.told(); got != want {
			t.Fatalf("the server heard %q, want %q", got, want)
		}
	}
	tell("") // it is as it should be: nothing has changed
	b.check("x", "echo down; exit 2")
	tell("x=CRITICAL@0")
	tell("")
	b.check("x", "echo odd; exit 1")
	b.now = b.now.Add(time.Hour)
	tell("x=WARNING@0")
	refuse := func(code int, after string) {
		b.server.setFault(func(route string, w http.ResponseWriter, _ *http.Request) bool {
			if route != "POST alert" {
				return false
			}
			w.Header().Set("Retry-After", after)
			apiError(w, code, "not now")
			return true
		})
	}
	refuse(429, "600")
	b.now = b.now.Add(time.Hour)
	b.check("x", "echo up")
	tell("")
	b.server.setFault(nil)
	b.now = b.now.Add(599 * time.Second)
	b.check("y", "exit 3")
	n := b.server.count("POST alert")
	tell("") // not yet
	if got := b.server.count("POST alert"); got != n {
		t.Errorf("%d requests before the time that the server has named", got-n)
	}
	b.now = b.now.Add(time.Second)
	tell("x=OK@-600 y=UNKNOWN@-1")
	// A day away, with a change each hour.
	refuse(503, "")
	want := []string{}
	for i := range 24 {
		b.now = b.now.Add(time.Hour)
		b.check("x", fmt.Sprintf("exit %d", 2*((i+1)%2)))
		if i == 20 {
			must(t, os.Remove(b.dir+"/checks.d/y"))
		}
		tell("")
		want = append(want, fmt.Sprintf("x=%s@%d", []string{"CRITICAL", "OK"}[i%2], -3600*(24-i)))
		if i == 20 {
			want = append(want, fmt.Sprintf("y=OK@%d", -3600*(24-i)))
		}
	}
	b.server.setFault(nil)
	b.now = b.now.Add(time.Hour)
	tell(strings.Join(want, " "))
	tell("")
	if st := b.state(); st.Failures != 0 || len(st.Alerts) != 0 || len(st.Checks) != 1 {
		t.Errorf("got %+v", st)
	}
}

// A server without such a service: the inventory tells it, at once and from then on, until the service is there.
func TestMonitorInventory(t *testing.T) {
	b := newMonitorBoard(t, nil)
	b.server.takesAlerts = false
	b.check("x y", "exit 2") // no name for one
	b.check("door", "echo open; exit 2")
	b.want(0, "", "monitor")
	inventory := func(name string) any {
		d := b.server.deviceByID(boardID)
		b.server.mu.Lock()
		defer b.server.mu.Unlock()
		return d.inventory[name]
	}
	if got := inventory("monitor_door"); got != "CRITICAL: open" {
		t.Errorf("got %q", got)
	}
	n := b.server.count("PUT inventory")
	b.want(0, "", "monitor")
	b.want(0, "nothing is deployed", "run")
	if got, sent := inventory("monitor_door"), b.server.count("PUT inventory")-n; got != "CRITICAL: open" || sent != 1 {
		t.Errorf("after a run: got %q in %d inventories", got, sent)
	}
	if out := b.want(0, "", "status"); !strings.Contains(out, "check door: CRITICAL: open\n") {
		t.Errorf("got %q", out)
	}
	if out := b.want(0, "", "status", "--json"); !strings.Contains(out, `"door": "CRITICAL: open"`) {
		t.Errorf("got %q", out)
	}
	// An inventory that is not taken is tried again.
	b.check("door", "echo shut")
	b.server.setFault(func(route string, w http.ResponseWriter, _ *http.Request) bool {
		if route == "PUT inventory" {
			apiError(w, 403, "no")
		}
		return route == "PUT inventory"
	})
	b.want(0, "1 alerts wait", "monitor")
	b.server.setFault(nil)
	b.now = b.now.Add(time.Hour)
	st, err := b.run(nil)
	if err != nil || len(st.Alerts) > 0 || inventory("monitor_door") != "OK" {
		t.Errorf("got %+v, %v, %q", st.Alerts, err, inventory("monitor_door"))
	}
	b.server.takesAlerts = true
	b.check("door", "exit 2")
	b.want(0, "door: CRITICAL", "monitor")
	b.want(0, "", "send-inventory")
	if got := inventory("monitor_door"); got != nil || !strings.HasPrefix(b.told(), "door=CRITICAL") {
		t.Errorf("got %q beside an alert", got)
	}
}

// Five changes in ten minutes are one alert, in the place of those that wait; it ends when ten minutes are quiet.
func TestMonitorFlapping(t *testing.T) {
	t.Parallel()
	m := &monitor{app: &app{lg: newLogger(&strings.Builder{})}, st: &monitorState{}, now: 1_900_000_000}
	s := &checkState{Type: "check", Status: "OK"}
	step := func(code int, after time.Duration, want ...string) {
		t.Helper()
		m.now += int64(after / time.Second)
		m.stamp = strconv.FormatInt(m.now, 10)
		m.note("x", s, code, "text")
		var got []string
		for _, a := range m.st.Alerts {
			got = append(got, a.Subject.Status)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
	step(2, 0, "CRITICAL")
	step(0, time.Hour, "CRITICAL", "OK")
	step(2, time.Minute, "CRITICAL", "OK", "CRITICAL")
	step(0, time.Minute, "CRITICAL", "OK", "CRITICAL", "OK")
	step(2, time.Minute, "CRITICAL", "OK", "CRITICAL", "OK", "CRITICAL")
	step(0, time.Minute, "CRITICAL", "FLAPPING")
	if a := m.st.Alerts[1]; a.Level != "CRITICAL" || a.Time != m.stamp {
		t.Errorf("got %+v", a)
	}
	step(2, time.Minute, "CRITICAL", "FLAPPING")
	step(2, 9*time.Minute, "CRITICAL", "FLAPPING")
	step(2, time.Minute, "CRITICAL", "FLAPPING", "CRITICAL")
	step(2, time.Minute, "CRITICAL", "FLAPPING", "CRITICAL")
	// Slower than that it is no flapping, and a clock that is put back does not count.
	for i := range 6 {
		step(2*(i%2), 151*time.Second, append([]string{"CRITICAL", "FLAPPING", "CRITICAL"},
			slices.Repeat([]string{"OK", "CRITICAL"}, 3)[:i+1]...)...)
	}
	step(0, -time.Hour, "CRITICAL", "FLAPPING", "CRITICAL", "OK", "CRITICAL", "OK", "CRITICAL", "OK", "CRITICAL", "OK")
	// The oldest go when there are too many.
	for i := range 2 * maxAlerts {
		m.now += 3600
		m.note("x", s, 2*((i+1)%2), strconv.Itoa(i))
	}
	if n := len(m.st.Alerts); n != maxAlerts || m.st.Alerts[0].Subject.Details["description"] != strconv.Itoa(maxAlerts) {
		t.Errorf("got %d alerts from %v", n, m.st.Alerts[0].Subject)
	}
}

// The power is cut between check, journal and send: what was not journaled is not told, and what was told but not
// struck off is told once more with the same time.
func TestMonitorPowerCuts(t *testing.T) {
	b := newMonitorBoard(t, nil)
	b.check("x", "exit 2")
	cut := errors.New("the power is cut")
	at := func(n int) func(*monitor) { // the nth save, and all after, are lost
		return func(m *monitor) {
			store := m.store
			m.store = func(path string, text []byte, mode os.FileMode) error {
				if n--; n <= 0 {
					return cut
				}
				return store(path, text, mode)
			}
		}
	}
	began := b.now
	if _, err := b.run(at(1)); !errors.Is(err, cut) || b.told() != "" {
		t.Fatalf("got %v, want nothing told that is not journaled", err)
	}
	if _, err := b.run(at(2)); !errors.Is(err, cut) || b.told() != "x=CRITICAL@0" {
		t.Fatalf("got %v", err)
	}
	b.now = b.now.Add(time.Minute)
	if _, err := b.run(nil); err != nil || b.told() != "x=CRITICAL@-60" { // once more, with the same time
		t.Fatalf("got %v", err)
	}
	b.now = b.now.Add(time.Minute)
	if st, err := b.run(nil); err != nil || b.told() != "" || st.Checks["x"].Since != began.Format(time.RFC3339) {
		t.Fatalf("got %v, %v", st.Checks["x"].Since, err)
	}
	// Between journal and send, and with it the server.
	b.check("x", "exit 0")
	b.server.setFault(func(route string, w http.ResponseWriter, _ *http.Request) bool { panic(http.ErrAbortHandler) })
	if _, err := b.run(at(2)); !errors.Is(err, cut) {
		t.Fatal(err)
	}
	b.server.setFault(nil)
	b.now = b.now.Add(time.Minute)
	if _, err := b.run(nil); err != nil || b.told() != "x=OK@-60" {
		t.Fatal(err)
	}
}

// The real program is killed at each system call by which it changes something: what comes after is a state that
// can be read, and every alert is told, with one time.
func TestMonitorKill(t *testing.T) {
	onlyExhaustive(t, "it runs the program some hundred times")
	needTool(t, "strace")
	b := newMonitorBoard(t, nil)
	b.check("x", "exit 2")
	self, err := os.Executable()
	must(t, err)
	t.Setenv("MENDLET_TEST_PROGRAM", "1")
	k := &killer{t, self, b.dir}
	must(t, os.WriteFile(b.dir+"/fallback.conf", []byte("{}"), 0o600))
	kills := 0
	for _, call := range killCalls {
		for n := 1; ; n++ {
			os.Remove(b.dir + "/var/" + monitorName)
			b.told()
			exit, _ := k.run(inject(call, n), "monitor")
			killed := exit != 0
			if exit, out := k.run(nil, "monitor"); exit != 0 {
				t.Fatalf("%s %d: %s", call, n, out)
			}
			b.server.mu.Lock()
			times := map[time.Time]int{}
			for _, a := range b.server.alerts {
				times[a.Time]++
			}
			b.server.mu.Unlock()
			if st := b.state(); len(times) != 1 || len(st.Alerts) > 0 || st.Checks["x"].Status == "" {
				t.Fatalf("%s %d: told at %v, left %+v", call, n, times, st)
			}
			if !killed {
				break
			}
			kills++
		}
	}
	t.Logf("%d kills", kills)
	if kills < 20 {
		t.Errorf("%d kills: the calls are not found", kills)
	}
}

// Files of Mender's monitor are read as assignments; nothing in them is run.
func TestMonitorStock(t *testing.T) {
	b := newMonitorBoard(t, nil)
	dir := b.dir + "/root" + stockChecks
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.MkdirAll(b.dir+"/root/proc/77", 0o755))
	must(t, os.MkdirAll(b.dir+"/root/proc/78", 0o755))
	must(t, os.MkdirAll(b.dir+"/root/run", 0o755))
	writeFile(t, b.dir+"/root/proc/77/stat", "77 (a (b) c) S 1")
	writeFile(t, b.dir+"/root/proc/77/cgroup", "0::/system.slice/cron.service\n")
	writeFile(t, b.dir+"/root/proc/78/stat", "78 (gone) Z 1")
	writeFile(t, b.dir+"/root/run/other.pid", "77\n")
	log := b.dir + "/app log"
	writeFile(t, log, "error 1\n")
	for name, text := range map[string]string{
		"service_cron.sh":   "# a comment\n\nSERVICE_NAME=\"cron\"\nSERVICE_TYPE=\"systemd\"\n",
		"service_unit.sh":   "export SERVICE_NAME=cron.service",
		"service_name.sh":   "SERVICE_NAME='a (b) c'",
		"service_pid.sh":    "SERVICE_NAME=other",
		"service_zombie.sh": "SERVICE_NAME=gone",
		"service_ron.sh":    "SERVICE_NAME=ron",
		"service_run.sh":    "SERVICE_NAME=$(touch " + b.dir + "/ran)\n",
		"service_cmd.sh":    "SERVICE_NAME=cron\ntouch " + b.dir + "/ran\n",
		"service_none.sh":   "",
		"log_app.sh":        "LOG_PATTERN=\"error [0-9]+\\\\\\$|out of memory$\"\nLOG_FILE='" + log + "'\n",
		"log_journal.sh":    "LOG_PATTERN=x\nLOG_FILE='@journalctl -f -u cron'\n",
		"log_pattern.sh":    "LOG_PATTERN='('\nLOG_FILE='" + log + "'\n",
		"log_gone.sh":       "LOG_PATTERN=x\nLOG_FILE=/nowhere/log\n",
		"dbus_x.sh":         "DBUS_PATTERN=x",
	} {
		writeFile(t, filepath.Join(dir, name), text)
	}
	run := func(want map[string]string) {
		t.Helper()
		st, err := b.run(nil)
		must(t, err)
		for name, says := range want {
			if s := st.Checks[name]; !strings.Contains(s.Status+" "+s.Text, says) {
				t.Errorf("%s: got %+v, want %q", name, s, says)
			}
		}
		if _, err := os.Stat(b.dir + "/ran"); err == nil {
			t.Fatal("a file was run")
		}
		if _, ok := st.Checks["dbus_x"]; ok {
			t.Error("a file of another kind is a check")
		}
	}
	run(map[string]string{"service_cron": "OK cron runs, process 77", "service_unit": "OK", "service_name": "OK",
		"service_pid": "OK", "service_zombie": "CRITICAL gone does not run", "service_ron": "CRITICAL",
		"service_run": "nothing that takes a shell", "service_cmd": "UNKNOWN", "service_none": "SERVICE_NAME",
		"log_app": "OK", "log_journal": "got \"@journalctl -f -u cron\", want",
		"log_pattern": "UNKNOWN grep takes no pattern \"(\"", "log_gone": "UNKNOWN"})
	add := func(text string) {
		f, err := os.OpenFile(log, os.O_APPEND|os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteString(text)
		must(t, errors.Join(err, f.Close()))
	}
	add("fine\nerror 2$\x1b[0m\nout of memory\nout of")
	run(map[string]string{"log_app": `CRITICAL error 2$\x1b[0m`})
	run(map[string]string{"log_app": "OK"}) // none since
	add(" memory\n")                        // a line that had not ended
	run(map[string]string{"log_app": "CRITICAL out of memory"})
	must(t, os.Rename(log, log+".1"))
	writeFile(t, log, "error 3$\n") // another file
	run(map[string]string{"log_app": "CRITICAL error 3$"})
	writeFile(t, log, "error 4\n") // the same, cut
	run(map[string]string{"log_app": "OK"})
}

func TestShellValue(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`a`: "a", `"a b"`: "a b", `'a $b'`: "a $b", `"a\.b\\\"c\$"`: `a\.b\"c$`, `"a$"`: "a$", ``: "", `""`: "", `''`: "",
		`"$a"`: "-", `"a` + "`b`" + `"`: "-", `$a`: "-", `a b`: "-", `a;b`: "-", `'a'b'`: "-", `"a"b"`: "-", `a\b`: "-",
		`"a`: "-", `'`: "-", `a#b`: "-", `*`: "-", `a&`: "-", `"\"`: "-", `a>b`: "-",
	} {
		got, ok := shellValue(text)
		if !ok {
			got = "-"
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", text, got, want)
		}
	}
}

// The built-in checks, by what files of the kernel say.
func TestMonitorBuiltin(t *testing.T) {
	b := newMonitorBoard(t, map[string]any{"MonitorBuiltin": []string{
		"memory", "memory 10 20 30", "load", "process a", "process b", "update", "bootcount", "age " + "/nowhere",
		"disk", "disk /nowhere", "", "nothing"}})
	root := b.dir + "/root"
	must(t, os.MkdirAll(root+"/proc/77", 0o755))
	writeFile(t, root+"/proc/77/stat", "77 (a) S 1")
	writeFile(t, root+"/proc/meminfo", "MemTotal:  1000 kB\nMemFree: 5 kB\nMemAvailable:    75 kB\n")
	writeFile(t, root+"/proc/loadavg", "9.00 0.00 5.00 1/2 3\n")
	st, err := b.run(func(m *monitor) { m.rec.Last = &verdict{Artifact: "release-2", Result: "rolled-back"} })
	must(t, err)
	for name, want := range map[string]string{"memory": "WARNING 93 % are used", "load": "OK 0 %",
		"process_a": "OK a runs", "process_b": "CRITICAL b does not run", "update": "CRITICAL release-2 rolled-back",
		"bootcount": "UNKNOWN", "age_nowhere": "CRITICAL it is not there", "disk_nowhere": "UNKNOWN",
		"builtin": "UNKNOWN", "builtin_nothing": "UNKNOWN got \"builtin nothing\", want disk PATH"} {
		if s := st.Checks[name]; !strings.HasPrefix(s.Status+" "+s.Text, want) {
			t.Errorf("%s: got %+v, want %q", name, s, want)
		}
	}
	m := &monitor{app: &app{m: &machine{root: root}, rec: &record{}}}
	must(t, os.MkdirAll(root+"/dir", 0o755))
	var st2 syscall.Stat_t
	must(t, syscall.Stat(root+"/dir", &st2))
	sys := fmt.Sprintf("%s/sys/dev/block/%d:%d", root, st2.Dev>>8&0xfff, st2.Dev&0xff)
	must(t, os.MkdirAll(sys+"/device", 0o755))
	for life, want := range map[string]string{"0x01 0x03\n": "OK used: ", "0x01 0x09\n": "WARNING",
		"0x0b 0x01\n": "CRITICAL"} {
		writeFile(t, sys+"/device/life_time", life)
		code, text, err := m.builtin(t.Context(), "disk", root+"/dir 90 100")
		if got := checkWords[code] + " " + text; err != nil || !strings.HasPrefix(got, want) {
			t.Errorf("life %q: got %q, want %q", life, got, want)
		}
	}
	file := filepath.Join(root, "stamp")
	writeFile(t, file, "")
	must(t, os.Chtimes(file, time.Time{}, time.Now().Add(-time.Hour)))
	for limits, want := range map[string]int{"3000 4000": 1, "60 3000": 2, "4000 5000": 0, "x 1": 3, "1": 3} {
		code, text, err := m.builtin(t.Context(), "age", file+" "+limits)
		if err == nil && code != want || (err != nil) != (want == 3) {
			t.Errorf("age %s: got %d, %s, %v, want %d", limits, code, text, err, want)
		}
	}
	if os.Getuid() != 0 || syscall.Mount("tmpfs", root+"/dir", "tmpfs", syscall.MS_RDONLY, "") != nil {
		t.Log("no file system could be mounted read-only")
		return
	}
	defer syscall.Unmount(root+"/dir", 0)
	code, text, err := m.builtin(t.Context(), "disk", root+"/dir")
	if err != nil || code != 2 || text != "it is read-only" {
		t.Errorf("got %d, %q, %v", code, text, err)
	}
}

// The plugins of Debian's monitoring-plugins-basic are checks by a link or two words of shell.
func TestMonitorPlugins(t *testing.T) {
	onlyExhaustive(t, "it runs other programs")
	const dir = "/usr/lib/nagios/plugins"
	if _, err := os.Stat(dir + "/check_disk"); err != nil {
		t.Skip("needs monitoring-plugins-basic")
	}
	b := newMonitorBoard(t, nil)
	file := filepath.Join(b.dir, "file")
	writeFile(t, file, "x")
	for name, c := range map[string]struct{ args, want string }{
		"disk":      {"check_disk -w 0% -c 0% -p " + b.dir, "OK DISK OK"},
		"disk-full": {"check_disk -w 100% -c 100% -p " + b.dir, "CRITICAL DISK CRITICAL"},
		"procs":     {"check_procs -c 1:", "OK PROCS OK"},
		"no-procs":  {"check_procs -C no-such-program -c 1:", "CRITICAL PROCS CRITICAL"},
		"load":      {"check_load -w 1000,1000,1000 -c 2000,2000,2000", "OK "},
		"overload":  {"check_load -w 0,0,0 -c 0,0,0", ""},
		"age":       {"check_file_age -w 1000 -c 2000 -W 0 -C 0 -f " + file, "OK FILE_AGE OK"},
		"no-file":   {"check_file_age -f " + file + ".gone", "CRITICAL FILE_AGE CRITICAL"},
		"usage":     {"check_disk", "UNKNOWN"},
	} {
		b.check(name, "exec "+dir+"/"+c.args)
		defer func() {
			if s := b.state().Checks[name]; !strings.HasPrefix(s.Status+" "+s.Text, c.want) || strings.Contains(s.Text, "|") {
				t.Errorf("%s: got %s %q, want %q", name, s.Status, s.Text, c.want)
			}
		}()
	}
	must(t, os.Symlink(dir+"/check_dummy", b.dir+"/checks.d/link")) // without an argument: UNKNOWN
	b.want(0, "", "monitor")
	if s := b.state().Checks["link"]; s.Status != "UNKNOWN" {
		t.Errorf("got %+v", s)
	}
}

// A daemon runs the checks, also while it waits after failures.
func TestMonitorDaemon(t *testing.T) {
	b := newMonitorBoard(t, map[string]any{"MonitorIntervalSeconds": 1})
	b.check("x", "exit 2")
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	inner, end := context.WithCancel(ctx)
	done := make(chan int)
	b.server.setFault(func(route string, w http.ResponseWriter, _ *http.Request) bool {
		if route == "POST next" || route == "POST next2" {
			w.Header().Set("Retry-After", "3600")
			apiError(w, 503, "later")
			return true
		}
		return false
	})
	go func() {
		code, _, _ := b.call(inner, "daemon")
		done <- code
	}()
	b.server.await(ctx, "an alert", func() bool { return len(b.server.alerts) == 1 })
	if b.check("x", "exit 0"); exhaustive() { // the interval is a second
		b.server.await(ctx, "the end of it", func() bool { return len(b.server.alerts) == 2 })
	}
	end()
	if code := <-done; code != 0 {
		t.Errorf("got exit code %d", code)
	}
}

// With a channel the report has it, at once.
func TestMonitorChannel(t *testing.T) {
	b := newChannelBoard(t)
	h := b.host
	h.publish(1, map[string]any{"report": h.URL + "/r/"})
	var conf map[string]any
	must(t, json.Unmarshal([]byte(readText(t, b.dir+"/etc/mender.conf")), &conf))
	conf["MonitorChecks"] = b.dir + "/checks.d"
	b.configure(conf)
	b.run(0, "nothing")
	writeScript(t, b.dir+"/checks.d/x", "echo down; exit 2", 0o755)
	b.want(0, "x: CRITICAL: down", "monitor")
	object := fmt.Sprintf("r/acme/%.16s.json", sha256Hex([]byte(boardID)))
	var m map[string]any
	must(t, json.Unmarshal(h.objects[object], &m))
	if got := fmt.Sprint(m["monitor"]); got != "map[x:CRITICAL: down]" {
		t.Errorf("got %s", got)
	}
	h.heard()
	b.want(0, "", "monitor")
	if got := h.heard(); len(got) != 0 {
		t.Errorf("got %q, want nothing: nothing has changed", got)
	}
}

// A device without server and channel has results to look at, and a journal that does not grow.
func TestMonitorAlone(t *testing.T) {
	b := newVerbBoard(t)
	must(t, os.WriteFile(b.dir+"/etc/mender.conf", fmt.Appendf(nil, `{"MonitorChecks":%q}`, b.dir+"/c"), 0o600))
	writeScript(t, b.dir+"/c/x", "echo down; exit 2", 0o755)
	b.want(0, "x: CRITICAL: down", "monitor")
	if out := b.want(0, "", "monitor", "--json"); !json.Valid([]byte(out)) || !strings.Contains(out, `"text": "down"`) {
		t.Errorf("got %q", out)
	}
	before, err := os.Stat(b.dir + "/var/" + monitorName)
	must(t, err)
	b.want(0, "", "monitor", "-q")
	if after, err := os.Stat(b.dir + "/var/" + monitorName); err != nil || after.ModTime() != before.ModTime() {
		t.Errorf("nothing has changed, and it was written again (%v)", err)
	}
	must(t, os.Chmod(b.dir+"/c/x", 0o644))
	must(t, os.Remove(b.dir+"/var/"+monitorName))
	must(t, os.Mkdir(b.dir+"/var/"+monitorName, 0o755))
	must(t, os.Chmod(b.dir+"/c/x", 0o755))
	b.want(exitFailed, "is a directory", "monitor")
	ds, err := os.Open(b.dir + "/var")
	must(t, err)
	must(t, flock(t.Context(), ds, 0, sleepContext))
	b.want(exitTempFail, "another mendlet runs the checks", "monitor")
	must(t, ds.Close())
}
