// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// The chains of calls that Mender's client 5.x is held to by its own tests
// (tests/src/mender-update/daemon/state_test.cpp), here for the real flow, with a real
// update module, real state scripts and a journal in a file.

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
	names := map[string]string{"PPFS": "ProvidePayloadFileSizes", "VR": "ArtifactVerifyReboot", "VRR": "ArtifactVerifyRollbackReboot",
		"CL": "Cleanup", "SR": "SupportsRollback", "NR": "NeedsArtifactReboot"}
	for short, state := range map[string]string{"D": "Download", "I": "ArtifactInstall", "R": "ArtifactReboot", "C": "ArtifactCommit",
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

func fastDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "mendlet-chain") // syncs on a disk would cost most of the time
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

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

	stops     map[string]bool // calls in which the program is told to end
	stop      context.CancelFunc
	resumable bool // the handler says that what it does may be repeated
}

func newChainDevice(t *testing.T, artifact string) *chainDevice {
	d := &chainDevice{t: t, dir: fastDir(t), artifact: artifact, kills: map[string]int{}, busy: map[string]int{}, stops: map[string]bool{}, answers: map[string][]error{}}
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
	j, rec, err := openJournal(d.dir+"/var", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer j.st.Close()
	rec.Provides = map[string]string{"artifact_name": "old", "keep": "1"}
	if err := j.save(rec); err != nil {
		t.Fatal(err)
	}
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
		h.run(ctx, h.child(state)) // but its tree is still there
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
	a := &app{c: c, o: &options{progress: "none"}, out: io.Discard, m: &machine{open: openStorage}}
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
	f.reportVerdict = func(ctx context.Context, success bool) error {
		err := d.answer(ctx, "finish")
		if err == nil {
			d.says = append(d.says, map[bool]string{true: "S", false: "F"}[success])
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

// chain is a row of the table of spec-conforming call chains.
type chain struct {
	name, how, calls, says string
	stored                 string // artifact_name afterwards; INC: the new one, _INCONSISTENT
	result                 string // verdict in the journal; empty: the usual one for stored
}

// Where a row differs from what Mender does the comment says so.
var chains = []chain{
	{"normal", "", "<INST> R.E R VR R.L C.E C C.L CL", "dir iS", "new", ""},
	{"no reboot", "answer NR No", "<INST> C.E C C.L CL", "diiS", "new", ""},
	{"no answer means no reboot", "answer NR", "<INST> C.E C C.L CL", "diiS", "new", ""},
	// What may succeed later is no failure: the update waits in that step, however often.
	{"busy in I", "busy I", "<DL> I.E I.E I I.L R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"busy in VR", "busy VR xx", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"busy in C", "busy C", "<INST> R.E R VR R.L C.E C.E C C.L CL", "diriS", "new", ""},
	{"busy in C for long", "busy C xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
		"<INST> R.E R VR R.L " + strings.Repeat("C.E ", 41) + "C C.L CL", "diriS", "new", ""},
	{"busy in RB", "fail C; busy RB", "<INST> R.E R VR R.L C.E C C.X RB.E " + "<RBK>", "diriF", "old", ""},
	{"busy in VRR", "fail C; busy VRR xx", "<INST> R.E R VR R.L C.E C C.X <RBK>", "diriF", "old", ""},
	{"no rollback", "answer SR No", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"sizes", "answer PPFS Yes", "D.E PPFS DownloadWithFileSizes D.L I.E I I.L R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"empty payload", "artifact empty", "D.E D.L", "dS", "new", ""},

	{"error in D.E", "fail D.E", "D.E D.X", "dF", "old", "failed"},
	{"fetch failure", "unheard fetch", "D.E D.X", "dF", "old", "failed"},
	// A new try costs traffic only; Mender would fail.
	{"fetch fails for a while", "later fetch; later fetch", "D.E D.E <INST> R.E R VR R.L C.E C C.L CL", "dddiriS", "new", ""},
	{"device type mismatch", "device other", "D.E D.X", "dF", "old", "failed"},
	{"no such module", "remove share/modules/v3/actor", "D.E D.X", "dF", "old", "failed"},
	// No Cleanup: what kind of payload it would have been is not known yet.
	{"killed in D.E", "die D.E", "D.E", "dF", "old", "failed"},
	{"error in D", "fail D", "D.E PPFS D D.X CL", "dF", "old", "failed"},
	{"error in PPFS", "fail PPFS", "D.E PPFS D.X CL", "dF", "old", "failed"},
	{"hang in D", "hang D", "D.E PPFS D D.X CL", "dF", "old", "failed"},
	{"killed in D", "die D", "D.E PPFS D CL", "dF", "old", "failed"},
	{"killed in D.L", "die D.L", "<DL> CL", "dF", "old", "failed"},
	{"error in D.L", "fail D.L", "<DL> D.X CL", "dF", "old", "failed"},

	{"error in I", "fail I", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"error in I, no rollback", "fail I; answer SR No", "<DL> I.E I I.X F.E F F.L CL", "diF", "INC", ""},
	{"killed in I, no rollback", "die I; answer SR No", "<DL> I.E I F.E F F.L CL", "diF", "INC", ""},
	{"error in I.E", "fail I.E", "<DL> I.E I.X <RBK>", "diF", "old", ""},
	{"error in I.L", "fail I.L", "<DL> I.E I I.L I.X <RBK>", "diF", "old", ""},
	{"error in I.X", "fail I; fail I.X", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"killed in I", "die I", "<DL> I.E I <RBK>", "diF", "old", ""},
	{"killed in I.E", "die I.E", "<DL> I.E <RBK>", "diF", "old", ""},
	{"killed in I.L", "die I.L", "<DL> I.E I I.L <RBK>", "diF", "old", ""},
	{"killed in I.X", "fail I; die I.X", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"error in I, no reboot", "fail I; answer NR No", "<DL> I.E I I.X RB.E RB RB.L F.E F F.L CL", "diF", "old", ""},
	{"error in NeedsArtifactReboot", "fail NR", "<INST> RB.E RB RB.L F.E F F.L CL", "diF", "INC", ""},
	{"bad answer to NeedsArtifactReboot", "answer NR Perhaps", "<INST> RB.E RB RB.L F.E F F.L CL", "diF", "INC", ""},
	{"error in SupportsRollback", "fail I; fail SR", "<DL> I.E I I.X F.E F F.L CL", "diF", "INC", ""},

	{"error in R", "fail R", "<INST> R.E R R.X <RBK>", "dirF", "old", ""},
	{"error in R.E", "fail R.E", "<INST> R.E R.X <RBK>", "dirF", "old", ""},
	{"killed in R", "die R", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"killed in R.E", "die R.E", "<INST> R.E VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"error in VR", "fail VR", "<INST> R.E R VR R.X <RBK>", "dirF", "old", ""},
	{"error in R.L", "fail R.L", "<INST> R.E R VR R.L R.X <RBK>", "dirF", "old", ""},
	{"killed in VR", "die VR", "<INST> R.E R VR <RBK>", "dirF", "old", ""},
	{"killed in R.L", "die R.L", "<INST> R.E R VR R.L <RBK>", "dirF", "old", ""},
	// As with Mender, but the reboot is the system's own.
	{"automatic reboot", "answer NR Automatic", "<INST> R.E reboot VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"automatic reboot fails", "answer NR Automatic; unheard reboot", "<INST> R.E reboot R.X RB.E RB RB.L RR.E reboot VRR RR.L F.E F F.L CL", "dirF", "old", ""},
	{"error in VR, automatic reboot", "fail VR; answer NR Automatic", "<INST> R.E reboot VR R.X RB.E RB RB.L RR.E reboot VRR RR.L F.E F F.L CL", "dirF", "old", ""},

	{"pre-commit report keeps failing", "ok installing; unheard installing", "<INST> R.E R VR R.L <RBK>", "dirF", "old", ""},
	{"pre-commit report fails for a while", "ok installing; later installing; later installing", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"login before the commit keeps failing", "unheard login", "<INST> R.E R VR R.L <RBK>", "dirF", "old", ""},
	{"login before the commit fails for a while", "later login", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"other reports keep failing", "unheard downloading; unheard rebooting", "<INST> R.E R VR R.L C.E C C.L CL", "iiS", "new", ""},
	{"final report fails for a while", "later finish; later finish", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},

	{"error in C", "fail C", "<INST> R.E R VR R.L C.E C C.X <RBK>", "diriF", "old", ""},
	{"error in C.E", "fail C.E", "<INST> R.E R VR R.L C.E C.X <RBK>", "diriF", "old", ""},
	{"error in C, no reboot", "fail C; answer NR No", "<INST> C.E C C.X RB.E RB RB.L F.E F F.L CL", "diiF", "old", ""},
	{"error in C.E, no reboot", "fail C.E; answer NR No", "<INST> C.E C.X RB.E RB RB.L F.E F F.L CL", "diiF", "old", ""},
	{"killed in C", "die C", "<INST> R.E R VR R.L C.E C <RBK>", "diriF", "old", ""},
	{"killed in C.E", "die C.E", "<INST> R.E R VR R.L C.E <RBK>", "diriF", "old", ""},
	{"error in C.L", "fail C.L", "<INST> R.E R VR R.L C.E C C.L C.X CL", "diriF", "INC", ""},
	{"killed in C.L", "die C.L", "<INST> R.E R VR R.L C.E C C.L C.L CL", "diriS", "new", ""},
	{"the new root has scripts of an unknown version", "bump R", "<INST> R.E R VR R.L C.E C.X <RBK>", "diriF", "old", ""},

	{"error in RB", "fail I; fail RB", "<DL> I.E I I.X RB.E RB RB.L F.E F F.L CL", "diF", "INC", ""},
	{"error in RB.E", "fail I; fail RB.E", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in RB.L", "fail I; fail RB.L", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in RB and RB.L", "fail I; fail RB; fail RB.L", "<DL> I.E I I.X RB.E RB RB.L F.E F F.L CL", "diF", "INC", ""},
	{"killed in RB.E", "fail I; die RB.E", "<DL> I.E I I.X RB.E <RBK>", "diF", "old", ""},
	{"killed in RB", "fail I; die RB", "<DL> I.E I I.X RB.E RB <RBK>", "diF", "old", ""},
	{"killed in RB.L", "fail I; die RB.L", "<DL> I.E I I.X RB.E RB RB.L <RBK>", "diF", "old", ""},
	{"error in RB.E, then killed in RB", "fail I; once RB.E; die RB", "<DL> I.E I I.X RB.E RB <RBK>", "diF", "old", ""},
	{"error in RR.E", "fail I; fail RR.E", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in RR", "fail I; fail RR", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"killed in RR.E", "fail I; die RR.E", "<DL> I.E I I.X RB.E RB RB.L RR.E VRR RR.L F.E F F.L CL", "diF", "old", ""},
	{"killed in RR", "fail I; die RR", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"error once in VRR", "fail I; once VRR", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR VRR RR.L F.E F F.L CL", "diF", "old", ""},
	{"error always in VRR", "fail VR; fail VRR", "<INST> R.E R VR R.X RB.E RB RB.L RR.E" + strings.Repeat(" RR VRR", 12), "dirF", "INC", ""},
	{"error always in VRR, automatic reboot", "fail VR; fail VRR; answer NR Automatic", "<INST> R.E reboot VR R.X RB.E RB RB.L RR.E" + strings.Repeat(" reboot VRR", 12), "dirF", "INC", ""},
	{"killed in VRR", "fail I; die VRR", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR VRR RR.L F.E F F.L CL", "diF", "old", ""},
	{"killed in RR.L", "fail I; die RR.L", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L VRR RR.L F.E F F.L CL", "diF", "old", ""},
	{"error in RR.L", "fail I; fail RR.L", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L RR.X F.E F F.L CL", "diF", "INC", ""},

	{"error in F", "fail I; fail F", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in F.E", "fail I; fail F.E", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"error in F.L", "fail I; fail F.L", "<DL> I.E I I.X <RBK>", "diF", "INC", ""},
	{"killed in F.E", "fail I; die F.E", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L F.E F.E F F.L CL", "diF", "old", ""},
	{"killed in F", "fail I; die F", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L F.E F F.E F F.L CL", "diF", "old", ""},
	{"killed in F.L", "fail I; die F.L", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L F.E F F.L F.E F F.L CL", "diF", "old", ""},
	{"endless kills in F", "fail I; endless F", "<DL> I.E I I.X RB.E RB RB.L RR.E RR VRR RR.L" + strings.Repeat(" F.E F", 24), "diF", "INC", ""},
	{"error in CL of a failed update", "fail I; fail CL", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"error in CL of a good update", "fail CL", "<INST> R.E R VR R.L C.E C C.L CL", "diriF", "new", ""},
	{"killed in CL of a failed update", "fail I; die CL", "<DL> I.E I I.X <RBK> CL", "diF", "old", ""},
	// Mender reports failure here, having forgotten that the update had succeeded.
	{"killed in CL of a good update", "die CL", "<INST> R.E R VR R.L C.E C C.L CL CL", "diriS", "new", ""},

	// Mender rolls all of these back. A handler whose work can be repeated, as rootfs-image,
	// goes on where it was cut short.
	{"resumable, killed in D", "artifact bare; resumable; die D", "D.E PPFS D <DL> I R VR C CL", "ddiriS", "new", ""},
	{"resumable, killed in I", "artifact bare; resumable; die I", "<DL> I I R VR C CL", "diriS", "new", ""},
	{"resumable, killed in VR", "artifact bare; resumable; die VR", "<DL> I R VR VR C CL", "diriS", "new", ""},
	{"resumable, killed in C", "artifact bare; resumable; die C", "<DL> I R VR C C CL", "diriS", "new", ""},
	{"resumable, endless kills in I", "artifact bare; resumable; endless I", "<DL>" + strings.Repeat(" I", maxSaves), "diF", "INC", ""},
	{"resumable, error in I", "artifact bare; resumable; fail I", "<DL> I RB RR VRR F CL", "diF", "old", ""},
	// Unless there are scripts: nothing is known about those.
	{"resumable with scripts, killed in I", "resumable; die I", "<DL> I.E I <RBK>", "diF", "old", ""},
	{"resumable with scripts, killed in C", "resumable; die C", "<INST> R.E R VR R.L C.E C <RBK>", "diriF", "old", ""},

	// A signal to the program tears no module or script apart and is no failure; the update
	// rests at the next place where it can go on later.
	{"told to end before D.E", "stop D.E", "<INST> R.E R VR R.L C.E C C.L CL", "ddiriS", "new", ""},
	{"told to end in I.E", "stop I.E", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"told to end in I", "stop I; answer NR No", "<INST> C.E C C.L CL", "diiS", "new", ""},
	{"told to end in VR", "stop VR", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"told to end in C", "stop C", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"told to end in C.L", "stop C.L", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	{"told to end in RB", "fail I; stop RB", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"told to end in F", "fail I; stop F", "<DL> I.E I I.X <RBK>", "diF", "old", ""},
	{"told to end in CL", "stop CL", "<INST> R.E R VR R.L C.E C C.L CL", "diriS", "new", ""},
	// The download is a module's: what it has seen of it cannot be taken back.
	{"told to end before D", "stop D", "D.E CL", "dF", "old", "failed"},

	{"409 on downloading", "aborted downloading", "", "dF", "old", "failed"},
	{"409 on installing", "aborted installing", "<DL> CL", "diF", "old", "failed"},
	{"409 on rebooting", "aborted rebooting", "<INST> <RBK>", "dirF", "old", ""},
	{"409 before the commit", "ok installing; aborted installing", "<INST> R.E R VR R.L <RBK>", "diriF", "old", ""},
}

// An unwritable journal: no update is begun, one that has begun is rolled back, and the
// server hears of it. Where the journal can be written again the next run comes to the same
// end.
func TestChainsUnwritable(t *testing.T) {
	t.Parallel()
	artifacts := newChainArtifacts(t)
	for _, row := range []struct{ name, how, calls, says, again string }{
		{"never", "ro", "D.X", "dF", "dF"},
		{"at I.E", "ro installing", "<DL> I.X <RBK>", "diF", "F"},
		{"at R.E", "ro rebooting", "<INST> R.X <RBK>", "dirF", "F"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d := newChainDevice(t, artifacts.full)
			d.arrange(row.how)
			if err := d.live(); !errors.Is(err, syscall.EROFS) {
				t.Errorf("got error %v, want %v", err, syscall.EROFS)
			}
			if got, want := d.trace(), chainCalls(row.calls); got != want {
				t.Errorf("calls\ngot  %s\nwant %s", got, want)
			}
			if got := strings.Join(d.says, ""); got != row.says {
				t.Errorf("statuses %s, want %s", got, row.says)
			}
			d.says, d.readOnly, d.roAt = nil, false, ""
			d.arrange("fail D.E")
			if err := d.live(); err != nil {
				t.Error(err)
			}
			if got := strings.Join(d.says, ""); got != row.again {
				t.Errorf("then statuses %s, want %s", got, row.again)
			}
		})
	}
}

func TestChains(t *testing.T) {
	t.Parallel()
	artifacts := newChainArtifacts(t)
	for _, row := range chains {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			row.check(t, artifacts)
		})
	}
}

func (row chain) check(t *testing.T, artifacts chainArtifacts) {
	d := newChainDevice(t, artifacts.full)
	if how, ok := strings.CutPrefix(row.how, "artifact empty"); ok {
		d.artifact, row.how = artifacts.empty, how
	} else if how, ok := strings.CutPrefix(row.how, "artifact bare"); ok {
		d.artifact, row.how = artifacts.bare, how
	}
	d.arrange(row.how)
	if err := d.live(); err != nil {
		t.Error(err)
	}
	if got, want := d.trace(), chainCalls(row.calls); got != want {
		t.Errorf("calls\ngot  %s\nwant %s", got, want)
	}
	if got, want := strings.Join(d.says, ""), strings.ReplaceAll(row.says, " ", ""); got != want {
		t.Errorf("statuses %s, want %s", got, want)
	}
	d.checkStored(row.stored, row.result, d.f.has(eventLooped))
}

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
		result = map[string]string{"old": "rolled-back", "new": "committed", "INC": "inconsistent", "INC+": "inconsistent"}[stored]
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
