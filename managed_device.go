// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// Who the device is: its key, its identity, its inventory.

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	scriptTimeout   = 10 * time.Second // of identity and inventory scripts
	maxScriptOutput = 256 << 10        // bytes
)

// deviceKey loads the key that the device is known by, or makes one if there is none. A
// key that is there and cannot be read is never replaced, except by force: to the server,
// another key is another device.
func deviceKey(c *config, passphrase []byte, force bool, lg *logger) (crypto.Signer, error) {
	key, err := knownKey(c, passphrase, lg)
	fixed := c.Security != securityConfig{}
	switch {
	case fixed && force && exitCode(err) != exitRefused:
		return nil, refuse("Security.AuthPrivateKey names a fixed key, %q: it is not replaced", c.Security.AuthPrivateKey)
	case fixed, !force && !errors.Is(err, fs.ErrNotExist):
		return key, err
	}
	return makeDeviceKey(deviceKeyPath(c), lg)
}

// knownKey loads the key that the device is known by. One that is missing is not made (fs.ErrNotExist).
func knownKey(c *config, passphrase []byte, lg *logger) (crypto.Signer, error) {
	p := c.Security.AuthPrivateKey
	if c.Security.SSLEngine != "" || isPKCS11(p) {
		return nil, noEngine("Security")
	}
	key, err := loadDeviceKey(cmp.Or(p, deviceKeyPath(c)), passphrase, lg)
	if p == "" && errors.Is(err, fs.ErrNotExist) {
		err = withHint(err, "'mendlet bootstrap' makes the key and introduces the device")
	}
	return key, err
}

// pkcs8Ed25519 is what comes before the 32 bytes of an Ed25519 key in PKCS#8 form: version, algorithm, and two octet
// strings around them (RFC 8410, 7).
const pkcs8Ed25519 = "\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20"

// makeDeviceKey makes an Ed25519 key in PKCS#8 form, as Mender's own client does since 4.0.
func makeDeviceKey(path string, lg *logger) (crypto.Signer, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	d, err := makeDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("device key: %w", err)
	}
	defer d.Close()
	text := asPEM("PRIVATE KEY", append([]byte(pkcs8Ed25519), key.Seed()...))
	if err := d.write(filepath.Base(path), []byte(text), 0o600); err != nil {
		return nil, fmt.Errorf("device key: %w", err)
	}
	lg.infof("made a device key, %q", path)
	return key, nil
}

func loadDeviceKey(path string, passphrase []byte, lg *logger) (crypto.Signer, error) {
	d, err := openDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("device key: %w", err)
	}
	defer d.Close()
	f, err := d.follow(filepath.Base(path), os.O_RDONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("device key: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("device key: %w", err)
	}
	if st, err := f.Stat(); err == nil && st.Mode().Perm()&0o077 != 0 {
		lg.warnf("device key %q has mode %04o: others may read it, want 0600", path, st.Mode().Perm())
	}
	key, err := parseDeviceKey(text, passphrase)
	if err != nil {
		return nil, withHint(fmt.Errorf("device key %q: %w", path, err),
			"it is kept as it is; a new key (bootstrap -F) would make this another device to the server")
	}
	return key, nil
}

// readPassphrase reads the first line of a file, or of stdin for "-".
func readPassphrase(path string, stdin io.Reader) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	var text []byte
	var err error
	if path == "-" {
		text, err = readBounded(stdin, 4096)
	} else {
		text, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	return bytes.TrimSuffix(line, []byte("\r")), nil
}

//go:noinline
func identityScript(c *config) string {
	return c.paths.in(c.paths.data, "identity", "mender-device-identity")
}

// readIdentity runs the identity script; where there is none, the identity is the MAC
// address of the ethernet interface with the lowest index, as Mender's script has it.
func readIdentity(ctx context.Context, c *config, sysfs string, lg *logger) (string, error) {
	script := identityScript(c)
	if _, err := os.Stat(script); errors.Is(err, fs.ErrNotExist) {
		mac, err := lowestMAC(sysfs)
		if err != nil {
			return "", withHint(err, "put a program that prints key=value lines at %q", script)
		}
		return identityJSON(map[string][]string{"mac": {mac}}), nil
	}
	out, err := runScript(ctx, script, scriptTimeout, lg)
	if err != nil {
		return "", fmt.Errorf("identity: %w", err)
	}
	data := map[string][]string{}
	if err := parseKeyValues(out, data); err != nil {
		return "", fmt.Errorf("identity script %q: %w", script, err)
	}
	if len(data) == 0 {
		return "", fmt.Errorf("identity script %q: it printed nothing, want key=value lines", script)
	}
	return identityJSON(data), nil
}

// lowestMAC looks in class/net of sysfs for the interface of type ethernet (ARPHRD_ETHER
// of linux/if_arp.h, 1) with the lowest index. Interfaces named dummy… do not count.
func lowestMAC(sysfs string) (string, error) {
	dir := filepath.Join(sysfs, "class/net")
	list, err := namesIn(dir)
	if err != nil {
		return "", fmt.Errorf("identity: %w", err)
	}
	value := func(dev, name string) string {
		text, _ := os.ReadFile(filepath.Join(dir, dev, name))
		return strings.TrimSpace(string(text))
	}
	best, mac := -1, ""
	for _, dev := range list {
		n, err := strconv.Atoi(value(dev, "ifindex"))
		if err != nil || value(dev, "type") != "1" || strings.HasPrefix(dev, "dummy") {
			continue
		}
		if best < 0 || n < best {
			best, mac = n, value(dev, "address")
		}
	}
	if strings.Trim(mac, "0:") == "" {
		return "", fmt.Errorf("identity: no ethernet interface with a MAC address in %q", dir)
	}
	return mac, nil
}

// parseKeyValues adds lines key=value to data. A line without "=" is an error; what came
// before it stays. Empty lines are passed over.
func parseKeyValues(text []byte, data map[string][]string) error {
	for _, line := range strings.Split(string(text), "\n") {
		if line == "" {
			continue
		}
		k, v, ok := strings.Cut(line, "=")
		if !ok {
			return fmt.Errorf("got line %.100q, want key=value", line)
		}
		data[k] = append(data[k], v)
	}
	return nil
}

// identityJSON is the form by which the server tells devices apart, byte for byte: keys
// sorted, no spaces, one value as a string and several as a list. It must never change.
func identityJSON(data map[string][]string) string {
	var b strings.Builder
	for i, k := range sortedKeys(data) {
		b.WriteString([2]string{"{", ","}[min(i, 1)])
		b.WriteString(identityString(k) + ":")
		if v := data[k]; len(v) == 1 {
			b.WriteString(identityString(v[0]))
		} else {
			quoted := make([]string, len(v))
			for j := range v {
				quoted[j] = identityString(v[j])
			}
			b.WriteString("[" + strings.Join(quoted, ",") + "]")
		}
	}
	return b.String() + "}"
}

// identityString escapes what Mender's C++ client escapes, and nothing else: unlike
// encoding/json it leaves <, >, & and bytes that are not UTF-8 as they are.
func identityString(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\t", `\t`, "\r", `\r`, "\f", `\f`, "\b",
		`\b`).Replace(s) + `"`
}

// runScript runs a program without arguments and returns what it printed.
func runScript(ctx context.Context, path string, limit time.Duration, lg *logger) ([]byte, error) {
	out := answer{max: maxScriptOutput}
	err := runChild(ctx, child{what: fmt.Sprintf("script %q", path), path: path, timeout: limit, grace: time.Second,
		prefix: path, level: levelDebug, answer: &out, lg: lg})
	if err == nil && out.over {
		return nil, fmt.Errorf("script %q: more than %d bytes of output", path, maxScriptOutput)
	}
	return out.text, err
}

// collectInventory runs the inventory scripts in dir by name, puts builtin over what they say, and what
// artifacts provide under it: that has no say in what the device is. Only mender_client_version is a
// script's to decide. Scripts that fail are left out; it is an error if all do, since what is sent
// replaces what the server has.
func collectInventory(ctx context.Context, dir string, builtin map[string][]string, provides map[string]string,
	lg *logger) (map[string][]string, error) {
	data := map[string][]string{}
	list, err := namesIn(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	ran, failed := 0, 0
	for _, name := range list { // in this order
		path := filepath.Join(dir, name)
		st, err := os.Stat(path)
		if !strings.HasPrefix(name, "mender-inventory-") || err != nil || !st.Mode().IsRegular() {
			continue
		}
		if st.Mode().Perm()&0o111 == 0 {
			lg.warnf("inventory script %q is not executable", path)
			continue
		}
		ran++
		out, err := runScript(ctx, path, scriptTimeout, lg)
		if err == nil {
			err = parseKeyValues(out, data)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			failed++
			lg.warnf("inventory: %q: %v", path, err)
		}
	}
	if ran > 0 && failed == ran {
		return nil, fmt.Errorf("inventory: all %d scripts in %q failed", ran, dir)
	}
	for k, v := range builtin {
		if k != "mender_client_version" || data[k] == nil {
			data[k] = v
		}
	}
	for k, v := range provides {
		if data[k] == nil && !strings.HasPrefix(k, "mendlet_") {
			data[k] = []string{v}
		}
	}
	return data, nil
}

// inventoryBody is the list of attributes sorted by name: the same data, the same bytes.
func inventoryBody(data map[string][]string) ([]byte, error) {
	type attribute struct {
		Name  string `json:"name"`
		Value any    `json:"value"`
	}
	list := []attribute{}
	for _, k := range sortedKeys(data) {
		v := data[k]
		switch {
		case k == "" || len(v) == 0: // the server refuses a list with a nameless one
		case len(v) == 1:
			list = append(list, attribute{k, v[0]})
		default:
			list = append(list, attribute{k, v})
		}
	}
	return json.Marshal(list)
}

// Deployment logs: one file per deployment, one JSON object per line, in the form and
// under the names that Mender's client uses, so that its tools find them.
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
	dir  *dir
	f    *os.File
	name string
	size int64
}

// openDeployLog goes on with the deployment's file, or begins it after making room.
func openDeployLog(path, id string) (*deployLog, error) {
	if !validDeploymentID(id) {
		return nil, fmt.Errorf("deployment log: got id %.80q, want letters, digits and dashes", id)
	}
	d, err := openDir(path)
	if err != nil {
		return nil, fmt.Errorf("deployment log: %w", err)
	}
	l, err := deployLogIn(d, id)
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("deployment log: %w", err)
	}
	return l, nil
}

func deployLogIn(d *dir, id string) (*deployLog, error) {
	list, err := deployLogs(d, id)
	if err != nil {
		return nil, err
	}
	name := "deployments.0000." + id + ".log"
	if len(list) > 0 {
		name = list[0]
	} else if err := rotateDeployLogs(d); err != nil {
		return nil, err
	}
	l := &deployLog{dir: d, name: name}
	if l.f, err = d.open(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
		return nil, err
	}
	if l.size, err = l.f.Seek(0, io.SeekEnd); err == nil && l.size > 0 {
		// A power cut may have left half a line.
		last := make([]byte, 1)
		if _, err := l.f.ReadAt(last, l.size-1); err == nil && last[0] != '\n' {
			l.write([]byte("\n"))
		}
	}
	return l, nil
}

// deployLogs are the names of all logs, the newest first; of one deployment's with an id.
func deployLogs(d *dir, id string) ([]string, error) {
	names, err := d.names()
	return slices.DeleteFunc(names, func(name string) bool {
		rest, ours := strings.CutPrefix(name, "deployments.")
		number, rest, _ := strings.Cut(rest, ".")
		got, log := strings.CutSuffix(rest, ".log")
		digits := strings.Trim(number, "0123456789") == "" && len(number) == 4
		return !ours || !digits || !log || id != "" && got != id
	}), err
}

// findDeployLog returns the path of the deployment's log, "" if there is none.
func findDeployLog(path, id string) string {
	d, err := openDir(path)
	if err != nil {
		return ""
	}
	defer d.Close()
	if list, _ := deployLogs(d, id); len(list) > 0 {
		return d.in(list[0])
	}
	return ""
}

// rotateDeployLogs renumbers what is there from 0001 in the order of names and removes the
// oldest: what would be more than keptDeployLogs with the new one, and more where space is short.
func rotateDeployLogs(d *dir) error {
	list, err := deployLogs(d, "")
	if err != nil {
		return err
	}
	for len(list) > 0 && (len(list) >= keptDeployLogs || freeBytes(d.path) < deployLogFree) {
		if err := d.remove(list[len(list)-1]); err != nil {
			return err
		}
		list = list[:len(list)-1]
	}
	// From the last: the number that a file gets is free by then, or its own.
	for i, name := range slices.Backward(list) {
		to := fmt.Sprintf("deployments.%04d.%s", i+1, name[len("deployments.0000."):])
		if err := d.rename(name, to); err != nil {
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

//go:noinline
func (l *deployLog) write(p []byte) {
	n, _ := l.f.Write(p)
	l.size += int64(n)
}

// shorten keeps the end of the file. It is not made durable on its own: after a cut there
// is the old file, the new one, or none, and the update does not depend on it.
func (l *deployLog) shorten() {
	text, err := readTail(l.f, deployLogSend)
	if err != nil {
		return
	}
	_, text, _ = bytes.Cut(text, []byte("\n"))
	text = append(logLine(deployLogEntry{logTime(time.Now()), levelNames[levelWarning], noteTooBig}), text...)
	tmp := l.name + ".tmp"
	l.dir.remove(tmp)
	f, err := l.dir.open(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return
	}
	if _, err = f.Write(text); err == nil {
		err = l.dir.rename(tmp, l.name)
	}
	if err != nil {
		f.Close()
		l.dir.remove(tmp)
		return
	}
	l.f.Close()
	l.f, l.size = f, int64(len(text))
}

// sync makes the log durable, for before a reboot.
func (l *deployLog) sync() error { return l.f.Sync() }

func (l *deployLog) close() error {
	l.f.Sync()
	l.dir.Close()
	return l.f.Close()
}

// readTail reads the last n bytes of a file, or all.
func readTail(f *os.File, n int64) ([]byte, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, size-n), min(n, size)))
}

// deployLogBody reads a log into what the server takes: {"messages":[…]}, every entry
// valid, no more of them than fit, from the end, and last as the last one, unless that is "". Where path
// is "" there is no other.
//
//go:noinline
func deployLogBody(path, last string) ([]byte, error) {
	var text []byte
	if path != "" {
		var err error
		if text, err = readDeployLog(path); err != nil {
			return nil, fmt.Errorf("deployment log: %w", err)
		}
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	if e, _ := parseLogLine(lines[len(lines)-1]); last != "" && e.Message != last {
		lines = append(lines, string(logLine(deployLogEntry{logTime(time.Now()), levelNames[levelError], last})))
	}
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

func readDeployLog(path string) ([]byte, error) {
	d, err := openDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	f, err := d.open(filepath.Base(path), os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readTail(f, 2*deployLogMax)
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
