// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// actor is both the update module and every state script. It writes its name into "trace"
// and does what files in the device's directory say about that name.
const actor = `#!/bin/sh
case $# in
0) name=${0##*/} dir=${0%/*}/../.. ;;
*) name=$1 dir=${0%/*}/../../.. ;;
esac
cd "$dir" || exit 9
case $name in
SupportsRollback | NeedsArtifactReboot) ;;
*) echo "$name" >>trace ;;
esac
if [ -e "kill-$name" ]; then rm "kill-$name"; kill -9 $PPID; exit 0; fi
if [ -e "term-$name" ]; then rm "term-$name"; kill -TERM $PPID; fi
[ ! -e "bump-$name" ] || echo 9 >etc/scripts/version
[ ! -e "hang-$name" ] || exec sleep 1000
[ ! -e "fail-$name" ] || exit 1
if [ -e "once-$name" ]; then rm "once-$name"; exit 1; fi
if [ -e "answer-$name" ]; then read -r a <"answer-$name"; echo "$a"; fi
exit 0
`

// chainNames are the names of the tables: D, I, R, C, RB, RR and F are states, with E, L
// and X for their Enter, Leave and Error scripts.
var chainNames = func() map[string]string {
	names := map[string]string{"PPFS": "ProvidePayloadFileSizes", "VR": "ArtifactVerifyReboot",
		"VRR": "ArtifactVerifyRollbackReboot",
		"CL":  "Cleanup", "SR": "SupportsRollback", "NR": "NeedsArtifactReboot"}
	for short, state := range map[string]string{"D": "Download", "I": "ArtifactInstall", "R": "ArtifactReboot",
		"C":  "ArtifactCommit",
		"RB": "ArtifactRollback", "RR": "ArtifactRollbackReboot", "F": "ArtifactFailure", "Idle": "Idle", "Sync": "Sync"} {
		names[short] = state
		for s, action := range map[string]string{"E": "Enter", "L": "Leave", "X": "Error"} {
			names[short+"."+s] = state + "_" + action + "_00"
		}
	}
	return names
}()

func longName(short string) string {
	if long, ok := chainNames[short]; ok {
		return long
	}
	return short
}

// chainCalls expands what rows have in common and gives the names in full.
func chainCalls(text string) string {
	for _, part := range [][2]string{
		{"<INST>", "<DL> I.E I I.L"},
		{"<DL>", "D.E PPFS D D.L"},
		{"<RBK>", "RB.E RB RB.L RR.E RR VRR RR.L F.E F F.L CL"},
	} {
		text = strings.ReplaceAll(text, part[0], part[1])
	}
	words := strings.Fields(text)
	for i, w := range words {
		words[i] = longName(w)
	}
	return strings.Join(words, " ")
}

// chainArtifacts are made once for all rows.
type chainArtifacts struct{ full, bare, empty string }

func newChainArtifacts(t testing.TB) chainArtifacts {
	dir := fastDir(t)
	a := chainArtifacts{dir + "/full.mender", dir + "/bare.mender", dir + "/empty.mender"}
	common := []string{"-n", "new", "-c", "sim", "-p", "app:2", "--compression", "none", "--no-default-software-version"}
	common = slices.Clip(common)
	bare := append(common, "-T", "actor", "-f", writeTemp(t, "payload", []byte("payload")))
	full := append(slices.Clip(bare), "-o", a.full)
	for _, name := range chainNames {
		if strings.HasPrefix(name, "Artifact") && strings.HasSuffix(name, "_00") {
			full = append(full, "-s", writeTemp(t, name, []byte(actor)))
		}
	}
	for _, args := range [][]string{full, append(bare, "-o", a.bare), append(common, "--bootstrap", "-o", a.empty)} {
		if err := packCommand(args, io.Discard, nil); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// chainDevice is a device of one row.
type chainDevice struct {
	t        *testing.T
	dir      string
	artifact string
	f        *flow
	kills    map[string]int // calls in which the program dies, and how often
	busy     map[string]int // calls for which something is locked, and how often
	answers  map[string][]error
	says     []string
	boots    int
	readOnly bool   // the journal cannot be written
	roAt     string // status with which that begins
	retries  int    // runs that ended with "try later"
	said     string // on standard error, by program

	stops     map[string]bool // calls in which the program is told to end
	stop      context.CancelFunc
	resumable bool // the handler says that what it does may be repeated
}

func newChainDevice(t *testing.T, artifact string) *chainDevice {
	d := &chainDevice{t: t, dir: fastDir(t), artifact: artifact, kills: map[string]int{}, busy: map[string]int{},
		stops: map[string]bool{}, answers: map[string][]error{}}
	for _, sub := range []string{"etc/scripts", "share/modules/v3", "var"} {
		if err := os.MkdirAll(filepath.Join(d.dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	putScript(t, d.dir+"/share/modules/v3", "actor", actor, 0o755)
	for _, s := range []string{"Download_Enter_00", "Download_Leave_00", "Download_Error_00"} {
		putScript(t, d.dir+"/etc/scripts", s, actor, 0o755)
	}
	d.put("var/device_type", "device_type=sim\n")
	d.put("fallback.conf", "{}")
	d.put("answer-NeedsArtifactReboot", "Yes\n")
	d.put("answer-SupportsRollback", "Yes\n")
	changeJournal(t, d.dir+"/var", func(r *record) { r.Provides = map[string]string{"artifact_name": "old", "keep": "1"} })
	return d
}

func (d *chainDevice) put(name, text string) {
	if err := os.WriteFile(filepath.Join(d.dir, name), []byte(text), 0o644); err != nil {
		d.t.Fatal(err)
	}
}

// trace is what was called since the last look.
func (d *chainDevice) trace() string {
	path := d.dir + "/trace"
	text, _ := os.ReadFile(path)
	os.Remove(path)
	return strings.Join(strings.Fields(string(text)), " ")
}

func (d *chainDevice) note(name string) {
	f, err := os.OpenFile(d.dir+"/trace", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	fmt.Fprintln(f, name)
}

// arrange takes the words of a row that say what goes wrong.
func (d *chainDevice) arrange(how string) {
	for _, clause := range strings.Split(how, ";") {
		w := append(strings.Fields(clause), "", "", "")
		name := longName(w[1])
		switch w[0] {
		case "fail", "once", "hang", "kill", "term", "bump":
			d.put(w[0]+"-"+name, "")
		case "answer":
			d.put("answer-"+name, w[2]+"\n")
		case "die", "endless":
			if d.kills[name] = 1; w[0] == "endless" {
				d.kills[name] = 1000
			}
		case "busy":
			d.busy[name] = max(1, len(w[2]))
		case "aborted", "unheard", "later":
			d.answers[w[1]] = append(d.answers[w[1]], map[string]error{
				"aborted": errAborted, "unheard": errors.New("no answer"), "later": tryLater("no answer")}[w[0]])
		case "ok":
			d.answers[w[1]] = append(d.answers[w[1]], nil)
		case "ro":
			d.readOnly, d.roAt = w[1] == "", w[1]
		case "stop":
			d.stops[name] = true
		case "resumable":
			d.resumable = true
		case "remove":
			if err := os.Remove(filepath.Join(d.dir, w[1])); err != nil {
				d.t.Fatal(err)
			}
		case "device":
			d.put("var/device_type", "device_type="+w[1]+"\n")
		case "":
		default:
			d.t.Fatalf("%q is not understood", clause)
		}
	}
}

// mortal lets the program die in a call, at its end: what the module did is done.
type mortal struct {
	payloadHandler
	d *chainDevice
}

func (m mortal) resumable() bool { return m.d.resumable }

func (m mortal) download(ctx context.Context, a *artifact) error {
	m.d.mayStop("Download")
	err := m.payloadHandler.download(ctx, a)
	m.d.die("Download")
	return err
}

func (m mortal) call(ctx context.Context, state string) error {
	if h, ok := m.payloadHandler.(moduleHandler); ok && state == "Cleanup" && m.d.kills[state] > 0 {
		h.runProgram(ctx, h.child(state)) // but its tree is still there
		m.d.die(state)
	}
	m.d.mayStop(state)
	if m.d.busy[state] > 0 {
		m.d.busy[state]--
		return tryLater("the boot environment is locked")
	}
	err := m.payloadHandler.call(ctx, state)
	m.d.die(state)
	return err
}

func (d *chainDevice) mayStop(name string) {
	if d.stops[name] {
		delete(d.stops, name)
		d.stop()
	}
}

func (d *chainDevice) die(name string) {
	if d.kills[name] > 0 {
		d.kills[name]--
		panic(powerCut{})
	}
}

// lockedStorage is a journal on a file system that may have become read-only.
type lockedStorage struct {
	storage
	readOnly *bool
}

func (s lockedStorage) WriteAt(p []byte, off int64) (int, error) {
	if *s.readOnly {
		return 0, syscall.EROFS
	}
	return s.storage.WriteAt(p, off)
}

// newApp is the program, started anew.
func (d *chainDevice) newApp() *app {
	c := defaultConfig(paths{conf: d.dir + "/etc", data: d.dir + "/share", ds: d.dir + "/var"})
	c.ModuleTimeoutSeconds = 60
	if _, err := os.Stat(d.dir + "/hang-Download"); err == nil {
		c.ModuleTimeoutSeconds = 1
	}
	a := &app{c: c, o: &options{progress: "none"}, out: io.Discard, m: &machine{open: openStorage, sleep: noSleep}}
	a.openJournal = func(ds string, _ *logger) (*journalFile, *record, error) {
		// Without the lock: until their exec, children of parallel tests would hold it.
		st, err := openStorage(filepath.Join(ds, journalName), openWrite)
		if err != nil {
			return nil, nil, err
		}
		j, rec, damaged, _, err := readJournal(lockedStorage{st, &d.readOnly})
		return j, rec, errors.Join(err, damaged)
	}
	a.wrapHandler = func(h payloadHandler) payloadHandler { return mortal{h, d} }
	if err := a.openState(); err != nil {
		d.t.Fatal(err)
	}
	return a
}

// managedFlow is a flow with a server that answers as the row says.
func (d *chainDevice) managedFlow(a *app) *flow {
	f, err := a.newFlow()
	if err != nil {
		d.t.Fatal(err)
	}
	f.fetch = func(ctx context.Context) (*artifact, error) {
		if err := d.answer(ctx, "fetch"); err != nil {
			return nil, err
		}
		r, err := os.Open(d.artifact)
		if err != nil {
			return nil, err
		}
		d.t.Cleanup(func() { r.Close() })
		return a.openArtifact(r)
	}
	f.mode = managedMode
	f.reportStatus = func(ctx context.Context, status string) error {
		if status == d.roAt {
			d.readOnly = true
		}
		err := d.answer(ctx, status)
		if err == nil || errors.Is(err, errAborted) {
			d.says = append(d.says, status[:1])
		}
		return err
	}
	f.reportVerdict = func(ctx context.Context) error {
		err := d.answer(ctx, "finish")
		if err == nil {
			d.says = append(d.says, map[bool]string{true: "S", false: "F"}[a.rec.Last.Result == "committed"])
		}
		return err
	}
	f.checkServer = func(ctx context.Context) error {
		if err := d.answer(ctx, "login"); err != nil {
			return err
		}
		return f.reportStatus(ctx, "installing")
	}
	f.reboot = func(ctx context.Context) error {
		d.note("reboot")
		if err := d.answer(ctx, "reboot"); err != nil {
			return err
		}
		d.boots++
		return &codedError{code: exitReboot, err: errors.New("rebooting")}
	}
	f.bootID = func() string { return fmt.Sprint("boot-", d.boots) }
	f.scripts.onRun = func(name string) {
		d.mayStop(name)
		if d.kills[name] > 0 {
			d.note(name)
			d.die(name)
		}
	}
	return f
}

// answer is the next answer of the server to a request, or none: it is well.
func (d *chainDevice) answer(ctx context.Context, to string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	list := d.answers[to]
	if len(list) == 0 {
		return nil
	}
	if d.answers[to] = list[1:]; len(list) == 1 && !errors.Is(list[0], errAborted) && exitCode(list[0]) != exitTempFail {
		d.answers[to] = list // for good
	}
	return list[0]
}

// live runs the program until the update has ended.
func (d *chainDevice) live() error {
	for range 60 {
		var p *pause
		a := d.newApp()
		died := powered(func() { p = d.once(a) })
		a.closeState()
		switch {
		case died:
			d.boots++
		case p == nil:
			return nil
		case exitCode(p.err) == exitTempFail:
			d.retries++
		case exitCode(p.err) != exitReboot:
			return p.err
		}
	}
	return errors.New("the update has not ended after 60 runs")
}

func (d *chainDevice) once(a *app) *pause {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	d.stop = stop
	if a.rec.Update == nil {
		a.rec.Update = &update{Step: stepDownload, Managed: true, ID: "deployment-1"}
		d.f = d.managedFlow(a)
		return d.f.advance(ctx, stepDownload)
	}
	d.f = d.managedFlow(a)
	return d.f.advance(ctx, d.f.resume())
}

// powered runs f; it reports whether the program died in it.
func powered(f func()) (died bool) { return (&simDevice{}).powered(f) }

// checkStored compares the provides and the verdict in the journal.
func (d *chainDevice) checkStored(stored, result string, looped bool) {
	d.t.Helper()
	rec, err := peekJournal(d.dir+"/var", nil)
	if err != nil {
		d.t.Fatal(err)
	}
	want := map[string]map[string]string{
		"old": {"artifact_name": "old", "keep": "1"},
		"new": {"artifact_name": "new", "app": "2"},
		"INC": {"artifact_name": "new_INCONSISTENT", "keep": "1"},
	}[stored]
	if looped || stored == "INC+" {
		want = map[string]string{"artifact_name": "new_INCONSISTENT", "app": "2"}
	}
	if !maps.Equal(rec.Provides, want) {
		d.t.Errorf("provides %v, want %v", rec.Provides, want)
	}
	if result == "" {
		result = map[string]string{"old": "rolled-back", "new": "committed", "INC": "inconsistent",
			"INC+": "inconsistent"}[stored]
	}
	if rec.Update != nil {
		d.t.Errorf("the update is still in the journal: %+v", rec.Update)
	}
	if result == "-" && rec.Last == nil {
		return
	}
	if rec.Last == nil || rec.Last.Result != result {
		d.t.Errorf("verdict %+v, want %s", rec.Last, result)
	}
}

// program runs mendlet on the device; exit is -1 when it was killed.
func (d *chainDevice) program(args ...string) (exit int, stdout string) {
	d.t.Helper()
	self, err := os.Executable()
	if err != nil {
		d.t.Fatal(err)
	}
	cmd := exec.Command(self, append([]string{"-b", d.dir + "/fallback.conf"}, args...)...)
	cmd.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=1", "MENDER_CONF_DIR="+d.dir+"/etc",
		"MENDER_DATA_DIR="+d.dir+"/share", "MENDER_DATASTORE_DIR="+d.dir+"/var")
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	var failed *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &failed) {
		d.t.Fatal(err)
	}
	d.t.Logf("%s: exit code %d\n%s%s", strings.Join(args, " "), cmd.ProcessState.ExitCode(), out.String(), log.String())
	d.said = log.String()
	return cmd.ProcessState.ExitCode(), out.String()
}
