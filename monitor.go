// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nomonitor

package main

// Monitoring: checks are run, what has changed is journaled and then told. Updates know nothing of it but what
// sideline has.

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	monitorName  = "mendlet.monitor" // in the datastore: a monitorState in JSON
	stockChecks  = "/etc/mender-monitor/monitor.d/enabled"
	maxChecks    = 50
	maxCheckText = 1 << 10 // bytes of a check's output that are kept
	maxLogPart   = 8 << 20 // bytes of a log that one run looks at: the last
	maxAlerts    = 100     // that wait to be told; then the oldest goes
	flapChanges  = 5       // in flapTime: one alert instead of each
	flapTime     = 600     // seconds
	monitorSave  = 600     // seconds: texts that change alone are not written more often
)

// What a check may say, by its exit code (Monitoring Plugins Development Guidelines).
const checkOK, checkWarning, checkCritical, checkUnknown = 0, 1, 2, 3

var checkWords = [4]string{"OK", "WARNING", "CRITICAL", "UNKNOWN"}

// checkState is what is known of a check.
type checkState struct {
	Type    string    `json:"type"` // check, service, log, or a built-in kind
	Status  string    `json:"status"`
	Text    string    `json:"text"`
	Time    time.Time `json:"time"`              // of the last run
	Since   time.Time `json:"since"`             // of the last change
	Said    string    `json:"said"`              // the text then
	Changes []int64   `json:"changes,omitempty"` // the last ones, Unix time
	Flaps   bool      `json:"flaps,omitempty"`
	Inode   uint64    `json:"inode,omitempty"`  // of a log
	Offset  int64     `json:"offset,omitempty"` // how far it has been read
}

// monitorAlert is as the server's API wants it (devicemonitor, v1).
type monitorAlert struct {
	Name    string    `json:"name"`
	Level   string    `json:"level"` // OK or CRITICAL
	Time    time.Time `json:"timestamp"`
	Subject struct {
		Name    string            `json:"name"`
		Type    string            `json:"type"`
		Status  string            `json:"status"`
		Details map[string]string `json:"details"`
	} `json:"subject"`
}

type monitorState struct {
	Checks    map[string]*checkState `json:"checks"`
	Alerts    []*monitorAlert        `json:"alerts,omitempty"` // not told yet, the oldest first
	Saved     int64                  `json:"saved"`            // Unix time
	Inventory bool                   `json:"inventory"`        // the server takes no alerts: it is told by that
	Failures  int                    `json:"failures"`         // to tell, in a row
	NextTry   time.Time              `json:"next_try"`
}

// monitor is one run.
type monitor struct {
	*app
	st    *monitorState
	now   time.Time
	dirty bool // something has changed that the next run has to know
	says  bool // results, as they come
	store func([]byte) error
}

// check is one that is to be run: the program or file at path, or words of the configuration.
type check struct {
	name, kind, path string
	words            []string
}

func monitorVerbs() []verb {
	return []verb{{"monitor", "", "run the checks of this device, and tell what has changed", 0, lookFlags,
		func(ctx context.Context, a *app, _ []string) (err error) {
			if a.rec, err = a.peek(); err != nil {
				return err
			}
			a.nameUnsaved()
			r, m := newRound(a), newMonitor(a)
			r.server.looks, m.says = true, !a.o.json && !a.o.quiet
			if err = m.once(ctx, r.from); err == nil && a.o.json {
				err = printJSON(a.out, m.st)
			}
			return err
		}}}
}

// watch has the run tell what checks have found, and a daemon run them.
func watch(a *app) {
	a.beside.brief = func(inventory bool) map[string]string {
		st, brief := readMonitor(a.c), map[string]string{}
		for name, s := range st.Checks {
			text := s.Status // which changes when the status does, and only then
			if s.Status != checkWords[checkOK] {
				text += ": " + s.Said
			}
			if !inventory {
				brief[name] = text
			} else if st.Inventory {
				brief["monitor_"+name] = text
			}
		}
		return brief
	}
	a.beside.tick = func(ctx context.Context, from any) time.Duration {
		if err := newMonitor(a).once(ctx, from.(deploymentSource)); err != nil && ctx.Err() == nil {
			a.lg.warnf("%v", err)
		}
		return seconds(a.c.MonitorIntervalSeconds)
	}
}

//go:noinline
func newMonitor(a *app) *monitor {
	m := &monitor{app: a, now: a.now()}
	if floor := timeFloor(a); m.now.Before(floor) {
		m.now = floor
	}
	m.now = m.now.UTC().Truncate(time.Second)
	m.store = func(text []byte) error {
		return writeFileDurably(a.c.paths.in(a.c.paths.ds, monitorName), text, 0o600)
	}
	return m
}

// readMonitor gives what the last run has left. What is damaged is found again, but for what was not told.
//
//go:noinline
func readMonitor(c *config) *monitorState {
	st := &monitorState{}
	d, err := openDir(c.paths.ds)
	if err == nil {
		defer d.Close()
		text, _ := readClose(d.open(monitorName, os.O_RDONLY, 0))
		err = json.Unmarshal(text, st)
	}
	for _, s := range st.Checks {
		if s == nil {
			err = fs.ErrInvalid
		}
	}
	for _, a := range st.Alerts {
		if a == nil {
			err = fs.ErrInvalid
		}
	}
	if err != nil || st.Checks == nil {
		return &monitorState{Checks: map[string]*checkState{}}
	}
	return st
}

func (m *monitor) save() error {
	m.st.Saved, m.dirty = m.now.Unix(), false
	text, err := json.Marshal(m.st)
	if err == nil {
		err = m.store(text)
	}
	return err
}

// once runs all checks, journals, and tells. Nothing is told that is not journaled; what was told and could not be
// struck off, as when the power is cut, is told once more with the same time.
func (m *monitor) once(ctx context.Context, from deploymentSource) error {
	ds, err := os.Open(m.c.paths.ds) // whose lock nobody else takes
	if err != nil {
		return err
	}
	defer funlock(ds)
	if err := flock(ctx, ds, 0, sleepContext); err != nil {
		return tryLater("another mendlet runs the checks: %w", err)
	}
	list, err := m.checks()
	if err != nil {
		return err
	}
	m.st = readMonitor(m.c)
	idly(func() { m.runAll(ctx, list) })
	if ctx.Err() != nil {
		return tryLater("interrupted: %w", context.Cause(ctx))
	}
	if age := m.now.Unix() - m.st.Saved; m.dirty || len(list) > 0 && (age < 0 || age >= monitorSave) {
		err = m.save()
	}
	if wait := m.st.NextTry.Sub(m.now); err != nil || len(m.st.Alerts) == 0 || wait > 0 && wait <= maxRetryAfter {
		return err
	}
	if _, server := from.(*session); server && len(m.c.Servers) == 0 {
		return nil
	}
	return m.send(ctx, from)
}

// idly calls f with the lowest priority for processors and disks, which what it starts inherits. The thread ends
// with it, as not everybody may raise its priority again.
func idly(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()                   // for good
		const whoProcess, classIdle = 1, 3 << 13 // linux/ioprio.h
		syscall.Setpriority(syscall.PRIO_PROCESS, 0, 19)
		syscall.Syscall(syscall.SYS_IOPRIO_SET, whoProcess, 0, classIdle)
		f()
	}()
	<-done
}

func (m *monitor) runAll(ctx context.Context, list []check) {
	seen := map[string]bool{}
	for _, c := range list {
		s := m.st.Checks[c.name]
		if s == nil {
			s = &checkState{}
			m.st.Checks[c.name] = s
		}
		if seen[c.name] {
			m.lg.warnf("two checks are called %q: one is not run", c.name)
			continue
		}
		seen[c.name], s.Type = true, c.kind
		code, text := m.run(ctx, c, s)
		if ctx.Err() != nil {
			return
		}
		if m.says {
			printf(m.out, "%s: %s: %s\n", c.name, checkWords[code], text)
		}
		m.note(c.name, s, code, text)
	}
	for name, s := range m.st.Checks {
		if !seen[name] {
			s.Changes, s.Flaps = nil, false
			m.note(name, s, checkOK, "is not checked any more")
			delete(m.st.Checks, name)
			m.dirty = true
		}
	}
}

// note puts a result into the state, and an alert behind the others if there is something to tell.
func (m *monitor) note(name string, s *checkState, code int, text string) {
	was, status, now := cmp.Or(s.Status, checkWords[checkOK]), checkWords[code], m.now.Unix()
	if s.Status == "" || was != status {
		s.Since, s.Said, m.dirty = m.now, text, true
	}
	if was != status {
		s.Changes = append(s.Changes, now)
	}
	for len(s.Changes) > flapChanges || len(s.Changes) > 0 && uint64(now-s.Changes[0]) >= flapTime {
		s.Changes = s.Changes[1:]
	}
	s.Status, s.Text, s.Time = status, text, m.now
	flapped := s.Flaps
	s.Flaps = len(s.Changes) == flapChanges || flapped && len(s.Changes) > 0
	if s.Flaps == flapped && (flapped || was == status) {
		return
	}
	a := &monitorAlert{Name: name, Level: checkWords[checkCritical], Time: m.now}
	if s.Flaps { // one in the place of what led to it
		status, text = "FLAPPING", fmt.Sprintf("it has changed %d times in %d seconds", flapChanges, flapTime)
		kept := m.st.Alerts[:0]
		for _, old := range m.st.Alerts {
			if old.Name != name || uint64(now-old.Time.Unix()) >= flapTime {
				kept = append(kept, old)
			}
		}
		m.st.Alerts = kept
	} else if code == checkOK {
		a.Level = status
	}
	a.Subject.Name, a.Subject.Type, a.Subject.Status = name, s.Type, status
	a.Subject.Details = map[string]string{"description": text}
	m.st.Alerts, m.dirty = append(m.st.Alerts, a), true
	if n := len(m.st.Alerts) - maxAlerts; n > 0 {
		m.lg.warnf("the oldest alert is dropped, not told: %d wait", maxAlerts)
		m.st.Alerts = m.st.Alerts[n:]
	}
}

// send tells what waits to be told. That it fails is no failure of monitoring.
func (m *monitor) send(ctx context.Context, from deploymentSource) error {
	body, _ := json.Marshal(m.st.Alerts) // strings and times cannot fail
	err := from.ready()
	if err == nil {
		from.begin()
		err = from.alert(ctx, body)
	}
	if none := errors.Is(err, errNoAlerts); none || err == nil {
		m.st.Inventory = none
		if none { // which goes by what is stored
			n := m.rec.net()
			n.InventoryHash = ""
			if err := m.save(); err != nil {
				return err
			}
			if err = from.inventory(ctx, true); err == nil && n.InventoryHash == "" {
				err = errors.New("the server has not taken the inventory")
			}
		}
	}
	if err != nil {
		m.st.Failures++
		m.st.NextTry = m.now.Add(cmp.Or(retryAfterOf(err), backoff(m.st.Failures, seconds(m.c.RetryPollIntervalSeconds))))
		m.lg.warnf("%d alerts wait until %s: %v", len(m.st.Alerts), m.st.NextTry.Format(time.RFC3339), err)
	} else {
		m.st.Alerts, m.st.Failures, m.st.NextTry = nil, 0, time.Time{}
	}
	if err := keep(m.app); err != nil {
		m.lg.warnf("%v", err)
	}
	return m.save()
}

// checks are all of the device: programs, stock files, and what the configuration names.
func (m *monitor) checks() (list []check, err error) {
	for _, dir := range []string{m.c.MonitorChecks, m.m.path(stockChecks)} {
		files, err := os.ReadDir(dir) // sorted by name
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, f := range files {
			c := check{checkName(f.Name()), "check", filepath.Join(dir, f.Name()), nil}
			if dir == m.c.MonitorChecks {
				st, err := os.Stat(c.path)
				if err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 || c.name != f.Name() {
					m.lg.infof("%q is no check: want an executable file, in its name letters, digits, dots and dashes", c.path)
					continue
				}
			} else if c.kind, _, _ = strings.Cut(c.name, "_"); c.kind != "service" && c.kind != "log" {
				continue
			}
			c.name = strings.TrimSuffix(c.name, ".sh")
			list = append(list, c)
		}
	}
	for _, spec := range m.c.MonitorBuiltin {
		f := strings.Fields(spec + " ? ?")
		c := check{cmp.Or(checkName(f[0]), "builtin"), f[0], "", f[:len(f)-2]}
		if aboutObject(c.kind) {
			c.name = checkName(f[0] + "/" + f[1])
		}
		list = append(list, c)
	}
	if len(list) > maxChecks {
		m.lg.warnf("%d checks: no more than %d are run", len(list), maxChecks)
		list = list[:maxChecks]
	}
	return list, nil
}

// run gives an index of checkWords and a text.
func (m *monitor) run(ctx context.Context, c check, s *checkState) (int, string) {
	switch {
	case c.path == "":
		return m.builtin(ctx, c.words)
	case c.kind == "check":
		return m.runCheck(ctx, child{what: c.path, path: c.path})
	}
	return m.stockCheck(ctx, s, c.path)
}

// checkName is a name for a check that may stand in an inventory.
func checkName(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r != '.' && !validDeploymentID(string(r)) }), "_")
}

// runCheck runs a program: the first line of what it says, without what is behind "|", is its text.
func (m *monitor) runCheck(ctx context.Context, c child) (code int, text string) {
	out := answer{max: maxCheckText}
	c.dir, c.timeout, c.grace, c.alone = "/", seconds(m.c.MonitorTimeoutSeconds), time.Second, true
	c.prefix, c.level, c.answer, c.lg = c.what, levelDebug, &out, m.lg
	err := runChild(ctx, c)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && uint(exit.ExitCode()) < uint(len(checkWords)) {
		code, err = exit.ExitCode(), nil
	}
	if err != nil {
		return unknownCheck(err)
	}
	text, _, _ = strings.Cut(string(out.text), "\n")
	text, _, _ = strings.Cut(text, "|")
	return code, visible(strings.TrimSpace(text))
}

//go:noinline
func unknownCheck(err error) (int, string) { return checkUnknown, oneLine(fmt.Sprintf("%.1000s", err)) }

// stockCheck is one by a file of Mender's monitor, which is read and not run.
func (m *monitor) stockCheck(ctx context.Context, s *checkState, path string) (int, string) {
	text, err := readPlain(path)
	vars := map[string]string{}
	for _, line := range strings.Split(string(text), "\n") {
		line = strings.TrimPrefix(strings.TrimSpace(line), "export ")
		name, value, ok := strings.Cut(line, "=")
		if line == "" || line[0] == '#' {
			continue
		}
		if value, quoted := shellValue(value); ok && quoted {
			vars[name] = value
		} else {
			err = fmt.Errorf("%q: got line %.200q, want NAME=VALUE and nothing that takes a shell", path, line)
		}
	}
	file, pattern := vars["LOG_FILE"], vars["LOG_PATTERN"]
	switch {
	case err != nil:
	case s.Type == "service" && vars["SERVICE_NAME"] != "":
		return m.running(vars["SERVICE_NAME"], true)
	case s.Type == "service" || file == "" || pattern == "":
		err = fmt.Errorf("%q: want SERVICE_NAME, or LOG_FILE and LOG_PATTERN", path)
	case file[0] == '@':
		err = fmt.Errorf("LOG_FILE %q is the output of a program: only files are looked at", file)
	default:
		return m.searchLog(ctx, s, file, pattern)
	}
	return unknownCheck(err)
}

// shellValue is what a shell would make of a word, of one that stands for itself.
func shellValue(s string) (value string, ok bool) {
	n := len(s) - 1
	if n > 0 && s[0] == '\'' && s[n] == '\'' {
		return s[1:n], !strings.Contains(s[1:n], "'")
	}
	quoted := n > 0 && s[0] == '"' && s[n] == '"'
	if quoted {
		s = s[1:n]
	}
	for i := 0; i < len(s); i++ {
		c := s[i : i+1]
		switch rest := s[i+1:]; {
		case quoted && c == `\` && rest != "" && strings.Contains("$`\"\\", rest[:1]):
			c, i = rest[:1], i+1
		case quoted && c == "$" && rest == "": // the end of a pattern
		case strings.Contains("$`\"", c), c == `\` && rest == "", !quoted && strings.Contains(" \t'\\;&|<>()#*?[~", c):
			return "", false
		}
		value += c
	}
	return value, true
}

// running looks for a process of this name; of a service, also for one in its unit's control group, or by the number
// in its file under /run.
func (m *monitor) running(name string, service bool) (int, string) {
	name = strings.TrimSuffix(name, ".service")
	pid, _ := m.m.read("/run/" + name + ".pid")
	list, err := os.ReadDir(m.m.path("/proc"))
	if err != nil {
		return unknownCheck(err)
	}
	for _, e := range list {
		stat, _ := m.m.read("/proc/" + e.Name() + "/stat") // proc_pid_stat(5): PID (NAME) STATE
		i, j := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		if i < 0 || j < i || len(stat) < j+3 || stat[j+2] == 'Z' {
			continue
		}
		found := string(stat[i+1:j]) == name[:min(len(name), 15)]
		if service && !found {
			unit, _ := m.m.read("/proc/" + e.Name() + "/cgroup")
			found = strings.Contains(string(unit)+"/", "/"+name+".service") || strings.TrimSpace(string(pid)) == e.Name()
		}
		if found {
			return checkOK, visible(name) + " runs, process " + e.Name()
		}
	}
	return checkCritical, visible(name) + " does not run"
}

// searchLog looks for a pattern, an extended regular expression, in what has come to a file since the last time.
func (m *monitor) searchLog(ctx context.Context, s *checkState, path, pattern string) (int, string) {
	f, err := openPlain(path, os.O_RDONLY, 0)
	if err != nil {
		return unknownCheck(err)
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return unknownCheck(err)
	}
	from := s.Offset
	if s.Inode == 0 { // what was there before is not news
		from = st.Size
	} else if s.Inode != uint64(st.Ino) || st.Size < from {
		from = 0
	}
	from = max(from, st.Size-maxLogPart)
	f.Seek(from, io.SeekStart)
	code, text := m.runCheck(ctx, child{what: "grep", path: "grep", args: []string{"-E", "-e", pattern}, in: f})
	if code > 1 {
		return checkUnknown, "LOG_PATTERN " + quote(pattern) + ": grep: " + text
	}
	end, _ := f.Seek(0, io.SeekCurrent) // grep's place is ours
	tail := make([]byte, min(end-from, 4<<10))
	n, _ := f.ReadAt(tail, end-int64(len(tail)))
	end -= int64(n - 1 - bytes.LastIndexByte(tail[:n], '\n')) // a line that has not ended is read again
	m.dirty = m.dirty || s.Inode != uint64(st.Ino) || s.Offset != end
	if s.Inode, s.Offset = uint64(st.Ino), end; code == 0 {
		return checkCritical, text
	}
	return checkOK, "nothing new is like it"
}

const builtinKinds = "disk PATH, memory, load, process NAME, age FILE, update, bootcount"

//go:noinline
func aboutObject(kind string) bool { return kind == "disk" || kind == "process" || kind == "age" }

// reading is what a built-in check has found, and from which value on that is a warning, and critical.
type reading struct {
	value, warn, crit int
	text              string
	err               error
}

// builtin runs KIND [OBJECT] [WARN CRITICAL].
func (m *monitor) builtin(ctx context.Context, f []string) (int, string) {
	kind, object, limits := strings.Join(f[:min(len(f), 1)], ""), "", f[min(len(f), 1):]
	if aboutObject(kind) && len(limits) > 0 {
		object, limits = limits[0], limits[1:]
	}
	r := &reading{}
	m.measure(ctx, r, kind, object)
	for i, to := range []*int{&r.warn, &r.crit} {
		if len(limits) == 2 && r.err == nil {
			*to, r.err = strconv.Atoi(limits[i])
		}
	}
	switch {
	case r.err == nil && (len(limits)&^2 != 0 || aboutObject(kind) && object == ""):
		r.err = fs.ErrInvalid
		fallthrough
	case r.err != nil:
		return unknownCheck(fmt.Errorf("%q: %w; want [WARN CRITICAL] behind %s", f, r.err, builtinKinds))
	case r.value >= r.crit:
		return checkCritical, r.text
	case r.value >= r.warn:
		return checkWarning, r.text
	}
	return checkOK, r.text
}

// number is the first word behind a mark in a file of procfs, less its dot.
func (m *monitor) number(r *reading, path, mark string) int {
	text, _ := m.m.read(path)
	_, s, _ := strings.Cut(string(text), mark)
	s, _, _ = strings.Cut(strings.TrimLeft(s, " "), " ")
	n, err := strconv.Atoi(strings.Replace(s, ".", "", 1))
	if err != nil {
		r.err = err
	}
	return n
}

func (m *monitor) measure(ctx context.Context, r *reading, kind, object string) {
	format := "%d %% are used"
	switch r.warn, r.crit = 90, 95; kind {
	case "disk":
		m.disk(r, object)
	case "memory": // Documentation/filesystems/proc.rst, meminfo
		all := m.number(r, "/proc/meminfo", "MemTotal:")
		r.value = 100 - 100*m.number(r, "/proc/meminfo", "MemAvailable:")/max(1, all)
	case "load": // of five minutes, the second word
		r.value, r.warn, r.crit = m.number(r, "/proc/loadavg", " ")/runtime.NumCPU(), 200, 400
		format = "%d %% of each processor"
	case "process":
		r.value, r.text = m.running(object, false)
		r.warn, r.crit = checkWarning, checkCritical
	case "age":
		r.warn, r.crit, format = 86400, 172800, "changed %d seconds ago"
		st, err := os.Stat(object)
		if errors.Is(err, fs.ErrNotExist) {
			r.value, r.text = math.MaxInt32, "it is not there"
		} else if r.err = err; err == nil {
			r.value = int(min(time.Now().Unix()-st.ModTime().Unix(), math.MaxInt32))
		}
	case "update":
		r.warn, r.crit, r.text = 1, 1, "no update has failed"
		if v := m.rec.Last; v != nil && v.Result != "committed" {
			r.value, r.text = 1, visible(v.Artifact)+" "+v.Result
		}
	case "bootcount":
		r.warn, r.crit, format = 2, 3, "%d boots were not confirmed"
		look := &report{}
		if _, _, _, r.err = look.lookAround(ctx, m.app); r.err == nil {
			r.value, r.err = strconv.Atoi(cmp.Or(look.Env[varBootcount], "0"))
		}
	default:
		r.err = errors.New("there is no such check")
	}
	if r.text == "" {
		r.text = fmt.Sprintf(format, r.value)
	}
}

// disk gives per cent: the most of space, inodes and, where it is known, the life of the eMMC.
func (m *monitor) disk(r *reading, path string) {
	var st syscall.Statfs_t
	var file syscall.Stat_t
	if r.err = cmp.Or(syscall.Statfs(path, &st), syscall.Stat(path, &file)); r.err != nil {
		return
	}
	const readOnlyFlag = 1 // ST_RDONLY of linux/statfs.h
	if st.Flags&readOnlyFlag != 0 {
		r.value, r.text = math.MaxInt32, "it is read-only"
		return
	}
	used := func(all, free, avail uint64) int { return int(100 * (all - free) / max(1, all-free+avail)) }
	space, inodes := used(st.Blocks, st.Bfree, uint64(st.Bavail)), used(st.Files, st.Ffree, st.Ffree)
	// Two types of memory, each 0x01 for up to 10 % of its life, to 0x0b for more than all (JESD84-B51, 7.4.58).
	n, wear := uint64(file.Dev), 0 // gnu_dev_major and gnu_dev_minor of sys/sysmacros.h
	dev := fmt.Sprintf("/sys/dev/block/%d:%d/", n>>8&0xfff|n>>32&^0xfff, n&0xff|n>>12&^0xff)
	for _, at := range []string{"", "../"} { // of a disk, of a partition
		life, _ := m.m.read(dev + at + "device/life_time")
		for _, w := range strings.Fields(string(life)) {
			n, _ := strconv.ParseUint(w, 0, 8)
			wear = max(wear, 10*int(n))
		}
	}
	r.value = max(space, inodes, wear)
	r.text = fmt.Sprintf("used: %d %% of space, %d %% of inodes, up to %d %% of the eMMC's life", space, inodes, wear)
}
