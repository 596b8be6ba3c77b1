// SPDX-License-Identifier: Apache-2.0

package main

// Deployment logs: one file per deployment, one JSON object per line, in the form and
// under the names that Mender's client uses, so that its tools find them.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	keptDeployLogs   = 5
	deployLogFree    = 100 << 10     // bytes of free space wanted before a new log is begun
	deployLogMax     = 4 << 20       // bytes of one file; then only its end is kept
	deployLogSend    = 1000000 - 256 // bytes of lines; servers take 1 MiB
	deployLogLine    = 64 << 10      // bytes of one message
	noteCorrupted    = "(THE ORIGINAL LOGS CONTAINED INVALID ENTRIES)"
	noteTooBig       = "(THE ORIGINAL LOGS WERE TOO BIG, ONLY THE LAST ENTRIES ARE HERE)"
	corruptedMessage = "(CORRUPTED LOG DATA)"
)

type deployLogEntry struct {
	Timestamp string `json:"timestamp"` // RFC 3339, UTC
	Level     string `json:"level"`
	Message   string `json:"message"`
}

// deployLog is the log of one deployment. Trouble with it is never a reason to stop an
// update: add keeps quiet about errors.
type deployLog struct {
	mu   sync.Mutex
	f    *os.File
	path string
	size int64
}

// validDeploymentID: it becomes part of file names and URLs. Servers use UUIDs.
func validDeploymentID(id string) bool {
	ok := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_'
	}
	return id != "" && len(id) <= 64 && !strings.ContainsFunc(id, func(r rune) bool { return !ok(r) })
}

// openDeployLog goes on with the deployment's file, or begins it after making room.
func openDeployLog(dir, id string) (*deployLog, error) {
	if !validDeploymentID(id) {
		return nil, fmt.Errorf("deployment log: got id %.80q, want letters, digits and dashes", id)
	}
	path := findDeployLog(dir, id)
	if path == "" {
		if err := rotateDeployLogs(dir); err != nil {
			return nil, fmt.Errorf("deployment log: %w", err)
		}
		path = filepath.Join(dir, "deployments.0000."+id+".log")
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("deployment log: %w", err)
	}
	l := &deployLog{f: f, path: path}
	if l.size, err = f.Seek(0, io.SeekEnd); err == nil && l.size > 0 {
		// A power cut may have left half a line.
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, l.size-1); err == nil && last[0] != '\n' {
			l.write([]byte("\n"))
		}
	}
	return l, nil
}

// findDeployLog returns the path of the deployment's log, "" if there is none.
func findDeployLog(dir, id string) string {
	list, _ := filepath.Glob(filepath.Join(dir, "deployments.[0-9][0-9][0-9][0-9]."+id+".log"))
	if len(list) == 0 {
		return ""
	}
	return list[0]
}

// rotateDeployLogs renumbers what is there from 0001 in the order of names and removes the
// oldest: what would be more than keptDeployLogs with the new one, and more where space is short.
func rotateDeployLogs(dir string) error {
	list, err := filepath.Glob(filepath.Join(dir, "deployments.[0-9][0-9][0-9][0-9].*.log"))
	if err != nil {
		return err
	}
	slices.Sort(list)
	for len(list) > 0 && (len(list) >= keptDeployLogs || freeBytes(dir) < deployLogFree) {
		if err := os.Remove(list[len(list)-1]); err != nil {
			return err
		}
		list = list[:len(list)-1]
	}
	// From the last: the number that a file gets is free by then, or its own.
	for i := len(list) - 1; i >= 0; i-- {
		id := filepath.Base(list[i])[len("deployments.0000."):]
		to := filepath.Join(dir, fmt.Sprintf("deployments.%04d.%s", i+1, id))
		if err := os.Rename(list[i], to); err != nil {
			return err
		}
	}
	return nil
}

// freeBytes of the file system that dir is on; plenty if it does not say.
func freeBytes(dir string) int64 {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return deployLogFree
	}
	return int64(st.Bavail) * int64(st.Bsize)
}

// add has the form of logger.tee.
func (l *deployLog) add(t time.Time, level logLevel, msg string) {
	if msg == "" { // the server wants one
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > deployLogMax {
		l.shorten()
	}
	l.write(logLine(deployLogEntry{logTime(t), levelNames[level], msg[:min(len(msg), deployLogLine)]}))
}

func logTime(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000000Z") }

func logLine(e deployLogEntry) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.Encode(e) // strings cannot fail
	return b.Bytes()
}

func (l *deployLog) write(p []byte) {
	n, _ := l.f.Write(p)
	l.size += int64(n)
}

// shorten keeps the end of the file. It is not made durable on its own: after a cut there
// is the old file, the new one, or none, and the update does not depend on it.
func (l *deployLog) shorten() {
	text, err := readTail(l.path, deployLogSend)
	if err != nil {
		return
	}
	_, text, _ = bytes.Cut(text, []byte("\n"))
	text = append(logLine(deployLogEntry{logTime(time.Now()), levelNames[levelWarning], noteTooBig}), text...)
	if os.WriteFile(l.path+".tmp", text, 0o600) != nil || os.Rename(l.path+".tmp", l.path) != nil {
		return
	}
	if f, err := os.OpenFile(l.path, os.O_RDWR|os.O_APPEND, 0); err == nil {
		l.f.Close()
		l.f, l.size = f, int64(len(text))
	}
}

// sync makes the log durable, for before a reboot.
func (l *deployLog) sync() error { return l.f.Sync() }

func (l *deployLog) close() error {
	l.f.Sync()
	return l.f.Close()
}

// readTail reads the last n bytes of a file, or all.
func readTail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, size-n), min(n, size)))
}

// deployLogBody reads a log into what the server takes: {"messages":[…]}, every entry
// valid, and no more of them than fit, from the end.
func deployLogBody(path string) ([]byte, error) {
	text, err := readTail(path, 2*deployLogMax)
	if err != nil {
		return nil, fmt.Errorf("deployment log: %w", err)
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	corrupt := false
	stamp := firstTimestamp(lines)
	var keep [][]byte // from the last
	size, tooBig := 0, false
	for _, line := range slices.Backward(lines) {
		if line == "" {
			continue
		}
		e, ok := parseLogLine(line)
		if !ok {
			corrupt = true
			e = deployLogEntry{stamp, levelNames[levelError], corruptedMessage}
		}
		b := bytes.TrimSuffix(logLine(e), []byte("\n"))
		if size+len(b)+1 > deployLogSend {
			tooBig = true
			break
		}
		size += len(b) + 1
		keep = append(keep, b)
	}
	note := func(level logLevel, msg string) {
		keep = append(keep, bytes.TrimSuffix(logLine(deployLogEntry{stamp, levelNames[level], msg}), []byte("\n")))
	}
	if corrupt {
		note(levelError, noteCorrupted)
	}
	if tooBig {
		note(levelWarning, noteTooBig)
	}
	slices.Reverse(keep)
	return append(append([]byte(`{"messages":[`), bytes.Join(keep, []byte(","))...), "]}"...), nil
}

// parseLogLine wants what the server wants: all three, and a timestamp that is one.
func parseLogLine(line string) (deployLogEntry, bool) {
	var e deployLogEntry
	if json.Unmarshal([]byte(line), &e) != nil || e.Level == "" || e.Message == "" {
		return e, false
	}
	_, err := time.Parse(time.RFC3339Nano, e.Timestamp)
	return e, err == nil
}

// firstTimestamp is what entries without a time of their own get.
func firstTimestamp(lines []string) string {
	for _, l := range lines {
		if e, ok := parseLogLine(l); ok {
			return e.Timestamp
		}
	}
	return logTime(time.Unix(0, 0))
}
