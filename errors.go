// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// Exit codes. They are an interface: a number, once given, keeps its meaning for ever.
const (
	exitOK       = 0  // done, or nothing to do
	exitFailed   = 1  // failed
	exitNothing  = 2  // nothing in progress (commit, rollback, resume)
	exitRefused  = 3  // refused; nothing was changed
	exitReboot   = 4  // done, and a reboot is needed (only when asked to say so)
	exitUsage    = 64 // EX_USAGE of sysexits.h
	exitTempFail = 75 // EX_TEMPFAIL of sysexits.h: try later
)

// codedError is an error that knows the exit code it asks for and, where a person can do
// something about it, a hint.
type codedError struct {
	code int
	err  error
	hint string
	told bool // a person has read it already, on standard output or in the log
}

func (e *codedError) Error() string {
	if e.err == nil { // all that is to be said has been
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *codedError) Unwrap() error { return e.err }

// refuse makes an error with exit code 3: the input or the device is not as it must be,
// and nothing has been changed.
//
//go:noinline
func refuse(format string, args ...any) error {
	return &codedError{code: exitRefused, err: fmt.Errorf(format, args...)}
}

// tryLater makes an error with exit code 75: nothing is wrong that time may not mend.
//
//go:noinline
func tryLater(format string, args ...any) error {
	return &codedError{code: exitTempFail, err: fmt.Errorf(format, args...)}
}

// usageError makes an error with exit code 64.
//
//go:noinline
func usageError(format string, args ...any) error {
	return &codedError{code: exitUsage, err: fmt.Errorf(format, args...)}
}

// withHint adds a line that says what a person can do. The exit code stays.
func withHint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &codedError{code: exitCode(err), err: err, hint: fmt.Sprintf(format, args...)}
}

// told marks an error that must not be said a second time. The exit code stays.
//
//go:noinline
func told(err error) error {
	if err == nil {
		return nil
	}
	return &codedError{code: exitCode(err), err: err, told: true}
}

// isTold tells an error that is left to say nothing of: it was said, or is an exit code alone.
//
//go:noinline
func isTold(err error) bool {
	var c *codedError
	for errors.As(err, &c) {
		if c.told || c.err == nil {
			return true
		}
		err = c.err
	}
	return false
}

// exitCode is the code that the outermost coded error in the chain asks for; 1 for any
// other error, 0 for none.
//
//go:noinline
func exitCode(err error) int {
	var c *codedError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &c):
		return c.code
	}
	return exitFailed
}

// isTemporary: the same thing may succeed when it is tried later.
//
//go:noinline
func isTemporary(err error) bool { return exitCode(err) == exitTempFail }

// mayPass tells an error that may be gone the next time, such as one of a medium or of a limit on
// open files, from one about what a name stands for and who may use it.
//
//go:noinline
func mayPass(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.EINVAL,
		syscall.EACCES, syscall.EPERM, syscall.EROFS, syscall.ENXIO, syscall.ENODEV, syscall.ENOMEDIUM:
		return false
	}
	return true
}

// refuseUnlessPassing is a refusal because of err, or exit code 75 where err may pass.
//
//go:noinline
func refuseUnlessPassing(err error, format string, args ...any) error {
	if exitCode(err) == exitTempFail || mayPass(err) {
		return tryLater(format, args...)
	}
	return refuse(format, args...)
}

// sleeper waits for d, or until ctx ends: sleepContext, or what a test has instead.
type sleeper = func(ctx context.Context, d time.Duration) error

// sleepContext waits for d, or until ctx ends; then it gives back why.
func sleepContext(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// readTries is how often something is read before it counts as what cannot be.
const readTries = 3

// again reads until that works, readTries times.
//
//go:noinline
func again(read func() error) (err error) {
	for range readTries {
		if err = read(); err == nil {
			return nil
		}
	}
	return err
}

// readBounded reads r to its end and fails if there is more than limit.
func readBounded(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		return nil, fmt.Errorf("answer of more than %d bytes", limit)
	}
	return b, err
}

// splay is where in d this device's moment is: the same every time, and evenly spread over
// all devices.
func splay(identity string, d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	sum := sha256.Sum256([]byte(identity))
	return time.Duration(binary.BigEndian.Uint64(sum[:]) % uint64(d))
}

// backoff is Mender's schedule: one minute, three times, then twice as long, three times,
// and so on up to limit, which is at least a minute.
func backoff(failures int, limit time.Duration) time.Duration {
	limit = max(limit, time.Minute)
	d := time.Minute
	for i := 3; i < failures && d < limit; i += 3 {
		d *= 2
	}
	return min(d, limit)
}

// hintOf returns the first hint in the chain, or "".
//
//go:noinline
func hintOf(err error) string {
	var c *codedError
	for errors.As(err, &c) {
		if c.hint != "" {
			return c.hint
		}
		err = c.err
	}
	return ""
}

type logLevel int

const (
	levelTrace logLevel = iota
	levelDebug
	levelInfo
	levelWarning
	levelError
	levelFatal
)

var levelNames = []string{"trace", "debug", "info", "warning", "error", "fatal"}

func parseLevel(s string) (logLevel, error) {
	for i, n := range levelNames {
		if strings.EqualFold(s, n) {
			return logLevel(i), nil
		}
	}
	switch strings.ToLower(s) { // as Mender's client has had it
	case "warn":
		return levelWarning, nil
	case "panic":
		return levelFatal, nil
	}
	return levelInfo, usageError("log level %q: want one of %s", s, strings.Join(levelNames, ", "))
}

// logger writes one line per event, in which nothing is hidden. A nil logger is silent. It may be used from several
// goroutines.
type logger struct {
	mu    sync.Mutex
	level logLevel
	sinks []logSink
	tee   func(t time.Time, level logLevel, msg string) // deployment log, or nil

	before func() // makes room for a line on the terminal, or nil
}

// logSink takes one line without its line feed.
type logSink func(level logLevel, msg string)

func (l *logger) log(level logLevel, format string, args ...any) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if level < l.level && l.tee == nil {
		return
	}
	msg := oneLine(fmt.Sprintf(format, args...))
	if l.tee != nil && level >= levelDebug {
		l.tee(time.Now(), level, msg)
	}
	l.write(level, msg)
}

// write gives a line to all sinks. l.mu is held.
func (l *logger) write(level logLevel, msg string) {
	if level < l.level {
		return
	}
	if l.before != nil {
		l.before()
	}
	for _, s := range l.sinks {
		s(level, msg)
	}
}

// passf is infof for what is out of date soon, such as progress: it is not kept with a deployment.
func (l *logger) passf(format string, args ...any) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.write(levelInfo, oneLine(fmt.Sprintf(format, args...)))
}

//go:noinline
func (l *logger) debugf(format string, args ...any) { l.log(levelDebug, format, args...) }

//go:noinline
func (l *logger) infof(format string, args ...any) { l.log(levelInfo, format, args...) }

//go:noinline
func (l *logger) warnf(format string, args ...any) { l.log(levelWarning, format, args...) }

//go:noinline
func (l *logger) errorf(format string, args ...any) { l.log(levelError, format, args...) }

// fail logs an error and, on a line of its own, its hint.
//
//go:noinline
func (l *logger) fail(err error) {
	l.errorf("%v", err)
	if h := hintOf(err); h != "" {
		l.errorf("hint: %s", h)
	}
}

// noEOF is for an end that comes too early.
//
//go:noinline
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

//go:noinline
func allZero(p []byte) bool { return bytes.Count(p, []byte{0}) == len(p) }

// visible is s with all escaped, as in Go's strings, that a terminal or a reader of lines takes for
// more than a letter: control characters, separators of lines, what changes the direction of
// text, bytes that are not UTF-8, and U+FFFD, which stands for such.
//
//go:noinline
func visible(s string) string {
	hidden := func(r rune) bool { return r == utf8.RuneError || !strconv.IsGraphic(r) }
	if !strings.ContainsFunc(s, hidden) {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		_, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case !hidden(r):
			b.WriteRune(r)
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case r == utf8.RuneError:
			b.WriteString(`\ufffd`)
		default:
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		}
	}
	return b.String()
}

// quote is s in quotes, as %q has it, and visible.
//
//go:noinline
func quote(s string) string { return visible(strconv.Quote(s)) }

// plain is s for output that programs read line by line: as it is, or quoted where it has
// something that is not visible.
//
//go:noinline
func plain(s string) string {
	if visible(s) == s {
		return s
	}
	return quote(s)
}

func isURL(name string) bool {
	return strings.HasPrefix(name, "http://") || strings.HasPrefix(name, "https://")
}

// validDeploymentID: it becomes part of file names and URLs. Servers use UUIDs.
func validDeploymentID(id string) bool {
	ok := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_'
	}
	return id != "" && len(id) <= 64 && !strings.ContainsFunc(id, func(r rune) bool { return !ok(r) })
}

// sha256Hex is the SHA-256 of b as text.
func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// before is what of s comes before sep, or all of it.
//
//go:noinline
func before(s, sep string) string {
	s, _, _ = strings.Cut(s, sep)
	return s
}

// oneLine is an error or a message of several lines in one, visible.
//
//go:noinline
func oneLine(s string) string {
	return visible(strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "; "))
}

// atPlace is an error from parsing text as JSON, with the line and the column in characters, from 1,
// where it was found.
//
//go:noinline
func atPlace(text []byte, err error) error {
	var wrong *json.SyntaxError
	if !errors.As(err, &wrong) {
		return err
	}
	before := text[:max(0, min(int(wrong.Offset)-1, len(text)))] // Offset counts the byte that is wrong
	if wrong.Offset >= int64(len(text)) && strings.Contains(err.Error(), "end of JSON") {
		before = text
	}
	line := bytes.Count(before, []byte("\n")) + 1
	column := utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:]) + 1
	return fmt.Errorf("line %d, column %d: %w", line, column, err)
}

// parseObject reads a JSON object that a person has written, on whatever system: a byte order mark
// of UTF-8 before it is no part of it.
func parseObject(text []byte, to any) error {
	if bytes.HasPrefix(text, []byte("\xff\xfe")) || bytes.HasPrefix(text, []byte("\xfe\xff")) {
		return errors.New("in UTF-16, want UTF-8")
	}
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	if err := json.Unmarshal(text, to); err != nil {
		return fmt.Errorf("not a JSON object: %w", atPlace(text, err))
	}
	return nil
}

// uniqueKeys refuses JSON with a key that an object has twice: encoding/json would merge the two, and
// other programs take the first or the last. As it matches the names of fields without regard to case,
// keys of one object that differ in case only count as the same here down to depth fold, of which 1 is
// the outermost object. text is valid JSON.
func uniqueKeys(text []byte, fold int) error {
	type object struct {
		keys map[string]bool // nil for a list
		key  bool            // a key is next, or the end
	}
	var open []object
	for d := json.NewDecoder(bytes.NewReader(text)); ; {
		t, err := d.Token()
		if err != nil { // the end
			return nil
		}
		inner := len(open) - 1
		switch {
		case t == json.Delim('{'):
			open = append(open, object{map[string]bool{}, true})
			continue
		case t == json.Delim('['):
			open = append(open, object{})
			continue
		case t == json.Delim('}'), t == json.Delim(']'):
			open = open[:inner]
			inner--
		case open != nil && open[inner].key:
			key := t.(string)
			if len(open) <= fold {
				key = strings.ToLower(strings.ToUpper(key)) // for the two letters that have another to them
			}
			if open[inner].keys[key] {
				return fmt.Errorf("key %q for the second time", t)
			}
			open[inner].keys[key], open[inner].key = true, false
			continue
		}
		if inner >= 0 { // behind a value
			open[inner].key = open[inner].keys != nil
		}
	}
}

// clip shortens what goes into a message.
//
//go:noinline
func clip(b []byte) []byte { return b[:min(len(b), 120)] }

//go:noinline
func mega(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// errChanged: other bytes stand where those of before stood. What was fetched is of no use.
var errChanged = errors.New("the artifact at the source has changed")

// errNoRanges: an artifact may be had from there as a whole only.
var errNoRanges = errors.New("the server gives no parts of it as asked for")

// errStartOver: what an interrupted install left cannot be gone on with.
var errStartOver = errors.New("the install starts over")

// errNotRebooted: the new slot is to boot next but the old one still runs.
var errNotRebooted = errors.New("the new slot has not been booted yet")

// errNoTree: what an update module keeps between its states is gone, so none of them can be run.
var errNoTree = errors.New("its work tree is gone")

// errAborted: the server says that the deployment was aborted (409).
var errAborted = errors.New("the deployment was aborted on the server")

// errNoAlerts: the server has no service that takes alerts.
var errNoAlerts = errors.New("the server takes no alerts")

// writerSink prefixes each line for people, as "mendlet: warning: …".
//
//go:noinline
func writerSink(w io.Writer) logSink {
	return func(level logLevel, msg string) {
		tag := ""
		if level != levelInfo && !strings.HasPrefix(msg, "hint: ") {
			tag = levelNames[level] + ": "
		}
		fmt.Fprintf(w, "mendlet: %s%s\n", tag, msg)
	}
}

// newLogger writes to w, and no debugging.
func newLogger(w io.Writer) *logger {
	return &logger{level: levelInfo, sinks: []logSink{writerSink(w)}}
}

// sortedKeys gives the keys of m in order. It sorts by the standard library's own instance for strings, which is there
// anyway, where slices.Sorted would make another one here.
//
//go:noinline
func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// listed is slices.Contains for what is in no hurry.
//
//go:noinline
func listed(list []string, s string) bool { return slices.Contains(list, s) }
