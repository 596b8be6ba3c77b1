// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// How long a thing may take with software emulation on a busy machine.
const (
	bootLimit   = 4 * time.Minute // the device may boot several times before it has settled
	updateLimit = 8 * time.Minute
)

// device is the thing under test: its disk lives on while it is switched on and off.
type device struct {
	out, bus string
	path     string // the disk
	keepLog  bool
	url      string // of the files in out, as the device sees it
	files    *fileServer
	console  *os.File
	rng      *rand.Rand
	vm       *vm
	slot     string // where it has booted, as its own init says
	version  string
	named    bool // an update has succeeded: from now on the updater must know the artifact's name
	status   status
}

// status is what the rig reads of `mendlet status --json`.
type status struct {
	Update   json.RawMessage   // the update in progress
	Provides map[string]string // of what is installed
	Last     verdict           // on the last update that ended
}

type verdict struct{ Artifact, Result, Time string }

var upLine = regexp.MustCompile(`RIG-UP slot=(\d) version=(\S+) data=(\S+) uptime=\S+ upgrade_available=(\S*) bootcount=(\S*) mender_boot_part=(\d)`)

var goPanic = regexp.MustCompile(`(?m)^(panic|fatal error): .*`)

// newDevice makes a device with a fresh disk: version 1 runs from A, B holds version 3.
func newDevice(out, bus, name string, seed int64) (*device, error) {
	path := filepath.Join(out, "run-"+name+".img")
	if err := copyFile(filepath.Join(out, "disk.img"), path); err != nil {
		return nil, err
	}
	old, err := os.ReadFile(filepath.Join(out, "root-v3.ext4"))
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(old, slotA+slotSize); err != nil {
		return nil, err
	}
	console, err := os.Create(filepath.Join(out, name+".console"))
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	files := &fileServer{files: http.FileServer(http.Dir(out))}
	go http.Serve(l, files)
	return &device{out: out, bus: bus, path: path, console: console, files: files, rng: rand.New(rand.NewSource(seed)),
		url: fmt.Sprintf("http://10.0.2.2:%d/", l.Addr().(*net.TCPAddr).Port)}, f.Close()
}

func copyFile(from, to string) error {
	return exec.Command("cp", "--sparse=always", from, to).Run()
}

// end switches the device off for good; its disk is kept if something went wrong.
func (d *device) end(err error) error {
	if d.vm != nil {
		d.vm.kill()
	}
	if err != nil {
		return fmt.Errorf("%w\nthe disk is in %s, what the console said in %s", err, d.path, d.console.Name())
	}
	return os.Remove(d.path)
}

func (d *device) say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	fmt.Println(line)
	fmt.Fprintf(d.console, "\n=== %s\n", line)
}

func (d *device) start() (err error) {
	d.vm, err = startVM(d.out, d.path, d.bus, d.keepLog, d.console)
	return err
}

// on switches the device on and waits until it has settled.
func (d *device) on() error {
	if err := d.start(); err != nil {
		return err
	}
	text, err := d.waitUp(bootLimit, nil)
	if err != nil {
		return err
	}
	return d.settled(text)
}

func (d *device) off() error {
	v := d.vm
	d.vm = nil
	return v.powerOff()
}

// waitUp waits until init has finished and the console is ready, and returns what it said.
func (d *device) waitUp(limit time.Duration, cut <-chan struct{}) (string, error) {
	text, err := d.vm.wait(`RIG-UP [^\n]*\n[\s\S]*?rig# |RIG-STEP install [^\n]*exit=[^4][^\n]*\n`, limit, cut)
	if err != nil {
		return text, err
	}
	if !strings.Contains(text, "RIG-UP") {
		return text, fmt.Errorf("the installation failed: %q", tail([]byte(text)))
	}
	m := upLine.FindStringSubmatch(text)
	if m == nil {
		return text, fmt.Errorf("init's report is not as expected: %q", tail([]byte(text)))
	}
	d.slot, d.version = m[1], m[2]
	return text, nil
}

// settled checks what must hold whenever init has finished, whatever happened before.
func (d *device) settled(text string) error {
	m := upLine.FindStringSubmatch(text)
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(m[3] == "ok", "the data partition did not mount")
	check(m[4] == "0", "upgrade_available is %q after init has finished, want 0", m[4])
	check(m[6] == m[1], "mender_boot_part is %s, but slot %s runs", m[6], m[1])
	check(!goPanic.MatchString(text), "the updater crashed: %q", goPanic.FindString(text)) // with exit code 2, "nothing in progress"
	check(strings.Contains(text, "RIG-ENV same"), "fw_printenv and mendlet do not read the same environment")
	var err error
	if d.status, err = lastStatus(text); err != nil {
		errs = append(errs, err)
	}
	check(!d.status.inProgress(), "an update is still in progress: %s", d.status.Update)
	d.named = d.named || d.status.Last.Result == "committed"
	name := d.status.Provides["artifact_name"]
	check(name == "v"+d.version || !d.named && (name == "unknown" || name == ""),
		"artifact name is %q, but version %s runs", name, d.version)
	return errors.Join(errs...)
}

// lastStatus reads the last RIG-STATUS line.
func lastStatus(text string) (status, error) {
	i := strings.LastIndex(text, "RIG-STATUS ")
	if i < 0 {
		return status{}, errors.New("no status line on the console")
	}
	line, _, _ := strings.Cut(text[i+len("RIG-STATUS "):], "\n")
	return parseStatus([]byte(line))
}

// target picks a version that neither runs nor was the target of the last update.
func (d *device) target() string {
	for _, v := range []string{"1", "2", "3"} {
		if v != d.version && "v"+v != d.status.Last.Artifact {
			return v
		}
	}
	return ""
}

// update runs a whole update without a cut. The new version must be committed, or rolled back if
// it is a bad one.
func (d *device) update(version string) error {
	return d.updateBy(version, "updater update "+d.url+"v"+version+".mender")
}

func (d *device) updateBy(version, command string) error {
	from, slot := d.version, d.slot
	before := d.vm.disk.counted()
	begin := time.Now()
	if err := d.vm.send(command); err != nil {
		return err
	}
	text, err := d.waitUp(updateLimit, nil)
	if err != nil {
		return err
	}
	if err := d.settled(text); err != nil {
		return err
	}
	want, result := version, "committed"
	if strings.HasPrefix(version, "bad") {
		want, result = from, "rolled-back"
	}
	if d.version != want {
		return fmt.Errorf("version %s runs after an update from %s to %s", d.version, from, version)
	}
	if err := d.verdict(version, result); err != nil {
		return err
	}
	d.say("update from %s/v%s to v%s: %s, runs %s/v%s, %.0f s, ops %v", slot, from, version, result, d.slot, d.version,
		time.Since(begin).Seconds(), less(d.vm.disk.counted(), before))
	return nil
}

func (d *device) verdict(version, result string) error {
	if d.status.Last.Artifact != "v"+version || d.status.Last.Result != result {
		return fmt.Errorf("the last result is %q for %q, want %q for %q",
			d.status.Last.Result, d.status.Last.Artifact, result, "v"+version)
	}
	return nil
}

func less(a, b map[string]int) map[string]int {
	for k := range a {
		a[k] -= b[k]
	}
	return a
}

// interactive is the console by hand.
func (d *device) interactive() error {
	fmt.Println("what build.sh made is at", d.url)
	d.console = os.Stdout
	if err := d.start(); err != nil {
		return err
	}
	go io.Copy(d.vm.in, os.Stdin)
	<-d.vm.gone
	return nil
}

func (s status) inProgress() bool { return len(s.Update) > 0 && string(s.Update) != "null" }

func parseStatus(line []byte) (status, error) {
	var s status
	if err := json.Unmarshal(line, &s); err != nil {
		return s, fmt.Errorf("status is not JSON: %w: %q", err, line)
	}
	return s, nil
}
