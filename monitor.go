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

// checkState is what is known of a check. Times are as RFC 3339 has them, and Unix times.
type checkState struct {
	Type    string  `json:"type"` // check, service, log, or a built-in kind
	Status  string  `json:"status"`
	Text    string  `json:"text"`
	Time    string  `json:"time"`              // of the last run
	Since   string  `json:"since"`             // of the last change
	Said    string  `json:"said"`              // the text then
	Changes []int64 `json:"changes,omitempty"` // the last ones
	Flaps   bool    `json:"flaps,omitempty"`
	Inode   uint64  `json:"inode,omitempty"`  // of a log
	Offset  int64   `json:"offset,omitempty"` // how far it has been read
}

// monitorAlert is as the server's API wants it (devicemonitor, v1).
type monitorAlert struct {
	Name    string `json:"name"`
	Level   string `json:"level"` // OK or CRITICAL
	Time    string `json:"timestamp"`
	Subject struct {
		Name    string            `json:"name"`
		Type    string            `json:"type"`
		Status  string            `json:"status"`
		Details map[string]string `json:"details"`
	} `json:"subject"`
}

type monitorState struct {
	Checks    map[string]checkState `json:"checks"`
	Alerts    []*monitorAlert       `json:"alerts,omitempty"` // not told yet, the oldest first
	Saved     int64                 `json:"saved"`
	Inventory bool                  `json:"inventory"` // the server takes no alerts: it is told by that
	Failures  int                   `json:"failures"`  // to tell, in a row
	NextTry   int64                 `json:"next_try"`
}

// monitor is one run.
type monitor struct {
	*app
	st    *monitorState
	seen  map[string]bool // checks of this run
	now   int64           // Unix time
	stamp string
	dirty bool // something has changed that the next run has to know
	says  bool // results, as they come
	store func(path string, data []byte, mode os.FileMode) error
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
		st, brief, prefix := readMonitor(a.c), map[string]string{}, ""
		if inventory {
			prefix = "monitor_"
		}
		for name, s := range st.Checks {
			text := s.Status // which changes when the status does, and only then
			if text != checkWords[checkOK] {
				text += ": " + s.Said
			}
			if !inventory || st.Inventory {
				brief[prefix+name] = text
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
	now := max(a.now().Unix(), timeFloor(a).Unix())
	return &monitor{app: a, now: now, stamp: time.Unix(now, 0).UTC().Format(time.RFC3339), store: writeFileDurably}
}

// readMonitor gives what the last run has left. What is damaged is found again, but for what was not told.
//
//go:noinline
func readMonitor(c *config) *monitorState {
	st := &monitorState{}
	text, _ := readOwn(c.paths.in(c.paths.ds, monitorName))
	err := json.Unmarshal(text, st)
	for _, a := range st.Alerts {
		if a == nil {
			err = fs.ErrInvalid
		}
	}
	if err != nil || st.Checks == nil {
		return &monitorState{Checks: map[string]checkState{}}
	}
	return st
}

func (m *monitor) save() error {
	m.st.Saved, m.dirty = m.now, false
	text, _ := json.Marshal(m.st) // strings and numbers cannot fail
	return m.store(m.c.paths.in(m.c.paths.ds, monitorName), text, 0o600)
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
	m.st, m.seen = readMonitor(m.c), map[string]bool{}
	idly(func() { err = m.runAll(ctx) })
	if ctx.Err() != nil {
		return tryLater("interrupted: %w", context.Cause(ctx))
	}
	if err == nil && (m.dirty || len(m.seen) > 0 && uint64(m.now-m.st.Saved) >= monitorSave) {
		err = m.save()
	}
	_, server := from.(*session)
	wait := m.st.NextTry - m.now
	if err != nil || len(m.st.Alerts) == 0 || server && len(m.c.Servers) == 0 ||
		wait > 0 && wait <= int64(maxRetryAfter/time.Second) {
		return err
	}
	return m.send(ctx, from)
}

// runAll runs all checks of the device: programs, stock files, and what the configuration names.
func (m *monitor) runAll(ctx context.Context) error {
	own, stock := m.c.MonitorChecks, m.m.path(stockChecks)
	for _, dir := range []string{own, stock} {
		names, err := namesIn(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, name := range names {
			kind, path := "check", filepath.Join(dir, name)
			if dir == stock {
				kind = before(name, "_")
			} else if st, err := os.Stat(path); err != nil || !isProgram(st) || checkName(name) != name {
				m.lg.infof("%q is no check: want an executable file, in its name letters, digits, dots and dashes", path)
				continue
			}
			if kind == "check" || kind == "service" || kind == "log" {
				m.runOne(ctx, strings.TrimSuffix(name, ".sh"), kind, path)
			}
		}
	}
	for _, spec := range m.c.MonitorBuiltin {
		kind, rest, _ := strings.Cut(strings.Join(strings.Fields(spec), " "), " ")
		name := kind
		if b := builtinOf(kind); b == nil {
			kind, rest, name = "builtin", spec, "builtin "+spec
		} else if b.object {
			name += " " + before(rest, " ")
		}
		m.runOne(ctx, checkName(name), kind, rest)
	}
	for name, s := range m.st.Checks {
		if !m.seen[name] {
			s.Changes, s.Flaps = nil, false
			m.note(name, &s, checkOK, "is not checked any more")
			delete(m.st.Checks, name)
			m.dirty = true
		}
	}
	return nil
}

// runOne runs a check, which an object belongs to: its program or file, or the words behind its kind. An error of it is
// UNKNOWN.
func (m *monitor) runOne(ctx context.Context, name, kind, object string) {
	if m.seen[name] || len(m.seen) == maxChecks {
		m.lg.warnf("check %q is not run: want one of each name, and no more than %d", name, maxChecks)
		return
	}
	m.seen[name] = true
	s := m.st.Checks[name]
	s.Type = kind
	var code int
	var text string
	var err error
	switch kind {
	case "check":
		code, text, err = m.runCheck(ctx, nil, object)
	case "service", "log":
		code, text, err = m.stockCheck(ctx, &s, object)
	default:
		code, text, err = m.builtin(ctx, kind, object)
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		code, text = checkUnknown, oneLine(fmt.Sprintf("%.1000s", err))
	}
	text = visible(text)
	if m.says {
		printf(m.out, "%s: %s: %s\n", name, checkWords[code], text)
	}
	m.note(name, &s, code, text)
	m.st.Checks[name] = s
}

// note puts a result into the state, and an alert behind the others if there is something to tell.
func (m *monitor) note(name string, s *checkState, code int, text string) {
	status := checkWords[code]
	same := s.Status == status
	if !same {
		s.Since, s.Said, m.dirty = m.stamp, text, true
	}
	if same = same || s.Status == "" && code == checkOK; !same {
		s.Changes = append(s.Changes, m.now)
	}
	for len(s.Changes) > flapChanges || len(s.Changes) > 0 && uint64(m.now-s.Changes[0]) >= flapTime {
		s.Changes = s.Changes[1:]
	}
	s.Status, s.Text, s.Time = status, text, m.stamp
	flapped := s.Flaps
	s.Flaps = len(s.Changes) == flapChanges || flapped && len(s.Changes) > 0
	if s.Flaps == flapped && (flapped || same) {
		return
	}
	level, waiting := checkWords[checkCritical], m.st.Alerts
	if s.Flaps { // one in the place of what led to it, as far as that has not been told
		status, text = "FLAPPING", "it has changed 5 times in 600 seconds"
		for i, n := len(waiting)-1, 1; i >= 0 && n < flapChanges; i-- {
			if waiting[i].Name == name {
				waiting = append(waiting[:i], waiting[i+1:]...)
				n++
			}
		}
	} else if code == checkOK {
		level = status
	}
	if len(waiting) == maxAlerts {
		m.lg.warnf("the oldest alert is dropped, not told: %d wait", maxAlerts)
		waiting = waiting[1:]
	}
	a := &monitorAlert{Name: name, Level: level, Time: m.stamp}
	a.Subject.Name, a.Subject.Type, a.Subject.Status = name, s.Type, status
	a.Subject.Details = map[string]string{"description": text}
	m.st.Alerts, m.dirty = append(waiting, a), true
}

// send tells what waits to be told. That it fails is no failure of monitoring.
func (m *monitor) send(ctx context.Context, from deploymentSource) error {
	body, _ := json.Marshal(m.st.Alerts) // strings cannot fail
	err := from.ready()
	if err == nil {
		from.begin()
		err = from.alert(ctx, body)
	}
	none := errors.Is(err, errNoAlerts)
	if none || err == nil {
		m.st.Inventory = none
	}
	if none { // the inventory tells it, by what is stored
		n := m.rec.net()
		n.InventoryHash = ""
		if err = m.save(); err == nil {
			err = from.inventory(ctx, true)
		}
		if err == nil && n.InventoryHash == "" {
			err = errors.New("the server has not taken the inventory")
		}
	}
	m.st.NextTry = 0
	if err != nil {
		m.st.Failures++
		wait := cmp.Or(retryAfterOf(err), backoff(m.st.Failures, seconds(m.c.RetryPollIntervalSeconds)))
		m.st.NextTry = m.now + int64(wait/time.Second)
		m.lg.warnf("%d alerts wait for %v: %v", len(m.st.Alerts), wait, err)
	} else {
		m.st.Alerts, m.st.Failures = nil, 0
	}
	return errors.Join(keep(m.app), m.save())
}

// checkName is a name for a check that may stand in an inventory.
func checkName(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r != '.' && !validDeploymentID(string(r)) }), "_")
}

// runCheck runs a program: the first line of what it says, without what is behind "|", is its text.
func (m *monitor) runCheck(ctx context.Context, in *os.File, path string, args ...string) (
	code int, text string, err error) {
	out := answer{max: maxCheckText}
	err = runChild(ctx, child{what: path, path: path, args: args, dir: "/", in: in, alone: true, grace: time.Second,
		timeout: seconds(m.c.MonitorTimeoutSeconds), prefix: path, level: levelDebug, answer: &out, lg: m.lg})
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && uint(exit.ExitCode()) < uint(len(checkWords)) {
		code, err = exit.ExitCode(), nil
	}
	text = before(string(out.text), "\n")
	text = before(text, "|")
	return code, strings.TrimSpace(text), err
}

// stockCheck is one by a file of Mender's monitor, which is read and not run.
func (m *monitor) stockCheck(ctx context.Context, s *checkState, path string) (code int, text string, err error) {
	lines, err := readPlain(path)
	if err != nil {
		return 0, "", err
	}
	vars, got := assignments(string(lines))
	file, pattern, service := vars["LOG_FILE"], vars["LOG_PATTERN"], vars["SERVICE_NAME"]
	switch {
	case got != "":
	case s.Type == "service" && service != "":
		return m.process(service, true)
	case strings.HasPrefix(file, "@"): // the output of a program
		got = file
	case s.Type == "log" && file != "" && pattern != "":
		return m.searchLog(ctx, s, file, pattern)
	}
	return 0, "", fmt.Errorf("%q: got %.200q, want NAME=VALUE and nothing that takes a shell: "+
		"SERVICE_NAME, or LOG_PATTERN and a LOG_FILE that is a file", path, got)
}

// process says whether one runs.
func (m *monitor) process(name string, service bool) (code int, text string, err error) {
	pid, err := m.m.process(name, service)
	if code, text = checkOK, name+" runs, process "+pid; pid == "" {
		code, text = checkCritical, name+" does not run"
	}
	return code, text, err
}

// searchLog looks for a pattern, an extended regular expression, in what has come to a file since the last time.
func (m *monitor) searchLog(ctx context.Context, s *checkState, path, pattern string) (
	code int, text string, err error) {
	f, err := openPlain(path, os.O_RDONLY, 0)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return 0, "", err
	}
	from := s.Offset
	if s.Inode == 0 { // what was there before is not news
		from = st.Size
	} else if s.Inode != uint64(st.Ino) || st.Size < from {
		from = 0
	}
	from = max(from, st.Size-maxLogPart)
	f.Seek(from, io.SeekStart)
	code, text, err = m.runCheck(ctx, f, "grep", "-E", "-e", pattern)
	if err != nil || code > 1 {
		return 0, "", cmp.Or(err, fmt.Errorf("grep takes no pattern %q", pattern))
	}
	end, _ := f.Seek(0, io.SeekCurrent) // grep's place is ours
	from = max(from, end-4<<10)
	tail := make([]byte, end-from)
	n, _ := f.ReadAt(tail, from)
	end = from + 1 + int64(bytes.LastIndexByte(tail[:n], '\n')) // a line that has not ended is read again
	m.dirty = m.dirty || s.Inode != uint64(st.Ino) || s.Offset != end
	if s.Inode, s.Offset = uint64(st.Ino), end; code == 0 {
		return checkCritical, text, nil
	}
	return checkOK, "nothing new is like it", nil
}

// builtinCheck is one that the configuration may name, as KIND [OBJECT] [WARN CRITICAL]. From these values on what is
// measured is a warning, and critical.
type builtinCheck struct {
	kind   string
	object bool
	limits [2]int
	text   string // of the value; "": the check has one of its own
}

var builtins = []builtinCheck{
	{"disk", true, [2]int{90, 95}, ""},
	{"memory", false, [2]int{90, 95}, "%d %% are used"},
	{"load", false, [2]int{200, 400}, "%d %% of each processor"},
	{"process", true, [2]int{checkWarning, checkCritical}, ""},
	{"age", true, [2]int{86400, 172800}, "changed %d seconds ago"},
	{"update", false, [2]int{1, 1}, ""},
	{"bootcount", false, [2]int{2, 3}, "%d boots were not confirmed"},
}

//go:noinline
func builtinOf(kind string) *builtinCheck {
	for i := range builtins {
		if b := &builtins[i]; b.kind == kind {
			return b
		}
	}
	return nil
}

func (m *monitor) builtin(ctx context.Context, kind, spec string) (code int, text string, err error) {
	b, words, object := builtinOf(kind), strings.Fields(spec), ""
	if b != nil && b.object && len(words) > 0 {
		object, words = words[0], words[1:]
	}
	if b == nil || b.object != (object != "") || len(words)&^2 != 0 {
		return 0, "", fmt.Errorf("got %q, want disk PATH, memory, load, process NAME, age FILE, update or bootcount, "+
			"and behind it nothing or WARN CRITICAL", kind+" "+spec)
	}
	limits := b.limits
	for i, word := range words {
		if limits[i], err = strconv.Atoi(word); err != nil {
			return 0, "", err
		}
	}
	value, text, err := m.measure(ctx, kind, object)
	if text == "" {
		text = fmt.Sprintf(b.text, value)
	}
	if value >= limits[0] {
		code = checkWarning
	}
	if value >= limits[1] {
		code = checkCritical
	}
	return code, text, err
}

func (m *monitor) measure(ctx context.Context, kind, object string) (value int, text string, err error) {
	switch kind {
	case "disk":
		return m.disk(object)
	case "memory": // Documentation/filesystems/proc.rst, meminfo
		all, _ := m.m.numberBehind("/proc/meminfo", "MemTotal:")
		free, err := m.m.numberBehind("/proc/meminfo", "MemAvailable:")
		return 100 - 100*free/max(1, all), "", err
	case "load": // of five minutes, the second word: two digits are behind the dot
		value, err = m.m.numberBehind("/proc/loadavg", " ")
		value /= runtime.NumCPU()
	case "process":
		return m.process(object, false)
	case "age":
		st, err := os.Stat(object)
		if errors.Is(err, fs.ErrNotExist) {
			return math.MaxInt32, "it is not there", nil
		} else if err == nil {
			value = int(min(time.Now().Unix()-st.ModTime().Unix(), math.MaxInt32))
		}
		return value, "", err
	case "update":
		if v := m.rec.Last; v != nil && v.Result != "committed" {
			return 1, v.Artifact + " " + v.Result, nil
		}
		text = "no update has failed"
	case "bootcount":
		look := &report{}
		if _, _, _, err = look.lookAround(ctx, m.app); err == nil {
			value, err = strconv.Atoi(cmp.Or(look.Env[varBootcount], "0"))
		}
	}
	return value, text, err
}

// disk gives per cent: the most of space, inodes and, where it is known, the life of the eMMC.
func (m *monitor) disk(path string) (value int, text string, err error) {
	var file syscall.Stat_t
	if err := syscall.Stat(path, &file); err != nil {
		return 0, "", err
	}
	st, err := fileSystem(path)
	const readOnlyFlag = 1 // ST_RDONLY of linux/statfs.h
	if st.Flags&readOnlyFlag != 0 {
		return math.MaxInt32, "it is read-only", nil
	}
	used := func(all, free, avail uint64) int { return int(100 * (all - free) / max(1, all-free+avail)) }
	space, inodes := used(st.Blocks, st.Bfree, uint64(st.Bavail)), used(st.Files, st.Ffree, st.Ffree)
	wear := m.m.wear(numberText(uint64(file.Dev)))
	return max(space, inodes, wear), fmt.Sprintf("used: %d %% of space, %d %% of inodes, up to %d %% of the eMMC's life",
		space, inodes, wear), err
}
