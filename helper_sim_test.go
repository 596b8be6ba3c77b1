// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The power-cut simulator: a device of a boot environment in two copies, two slots and a
// journal, on disks with a volatile cache. Each write and each sync of the program is an
// operation. The power is cut at one of them, which decides what the cache loses; the device
// boots by a model of Mender's U-Boot logic, and the program goes on, until the update has
// ended.
//
// The life before the cut is lived once and recorded. Most cuts leave what another one has
// left: a device is only followed up to a state that is known to end well (see simState), in
// "make test-all" every one to its end.

// powerCut is what an operation panics with: the program's death, at once and for good.
type powerCut struct{}

// simWrite is a write that no sync has made durable yet.
type simWrite struct {
	f    *simFile
	off  int64
	data []byte
}

type simFile struct {
	path, name       string
	durable, current []byte
}

// moment is a device before an operation: all that outlives a power cut there, and all that
// may.
type moment struct {
	durable map[string][]byte // contents by path, which nobody changes any more
	pending []simWrite
	flight  *simWrite // the operation itself, if it is a write
}

// world is the device's hardware.
type world struct {
	mu      sync.Mutex // the writer's stages outlive a power cut by a moment
	files   map[string]*simFile
	pending []simWrite
	ops     int
	cutAt   int       // operation at which the power is cut; 0: never
	flight  *simWrite // the write at which it was
	fault   func(op int, f *simFile, sync bool) error
	looks   int                                         // opens and reads
	blind   func(look int, f *simFile, off int64) error // off is below 0 for an opening
	corrupt func(op int, f *simFile, data []byte)
	lying   map[string]bool // files whose syncs do nothing
	trace   []string
	record  bool // moments
	moments []moment
}

type simStorage struct {
	w *world
	f *simFile
}

func (s simStorage) Size() int64 { return int64(len(s.f.current)) }

func (s simStorage) Close() error { return nil }

// look counts an opening or a read.
func (w *world) look(f *simFile, off int64) error {
	w.looks++
	if w.blind == nil {
		return nil
	}
	return w.blind(w.looks, f, off)
}

func (s simStorage) ReadAt(p []byte, off int64) (int, error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if err := s.w.look(s.f, off); err != nil {
		return 0, &os.PathError{Op: "read", Path: s.f.name, Err: err}
	}
	if off >= s.Size() {
		return 0, io.EOF
	}
	n := copy(p, s.f.current[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// op counts an operation: a write, or a sync, which has none in flight.
func (s simStorage) op(flight *simWrite) error {
	s.w.ops++
	kind := "write"
	if flight == nil {
		kind = "sync"
	}
	s.w.trace = append(s.w.trace, kind+" "+s.f.name)
	if s.w.record {
		m := moment{map[string][]byte{}, slices.Clone(s.w.pending), flight}
		for path, f := range s.w.files {
			m.durable[path] = f.durable
		}
		s.w.moments = append(s.w.moments, m)
	}
	if s.w.fault != nil {
		s.w.mu.Unlock() // it may look at the device
		defer s.w.mu.Lock()
		return s.w.fault(s.w.ops, s.f, flight == nil)
	}
	return nil
}

func (s simStorage) WriteAt(p []byte, off int64) (int, error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if off+int64(len(p)) > s.Size() {
		return 0, syscall.ENOSPC
	}
	flight := simWrite{s.f, off, bytes.Clone(p)}
	if err := s.op(&flight); err != nil {
		return 0, &os.PathError{Op: "write", Path: s.f.name, Err: err}
	}
	if s.w.ops == s.w.cutAt {
		s.w.flight = &flight
		panic(powerCut{})
	}
	data := flight.data
	if s.w.corrupt != nil {
		data = bytes.Clone(data)
		s.w.corrupt(s.w.ops, s.f, data)
	}
	copy(s.f.current[off:], data)
	s.w.pending = append(s.w.pending, simWrite{s.f, off, data})
	return len(p), nil
}

func (s simStorage) Sync() error {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if err := s.op(nil); err != nil {
		return &os.PathError{Op: "sync", Path: s.f.name, Err: err}
	}
	if s.w.ops == s.w.cutAt {
		panic(powerCut{})
	}
	if s.w.lying[s.f.name] {
		return nil
	}
	rest := s.w.pending[:0:0]
	for _, e := range s.w.pending {
		if e.f != s.f {
			rest = append(rest, e)
		}
	}
	s.w.pending = rest
	if s.w.record {
		s.f.durable = bytes.Clone(s.f.current) // a moment holds the old one
	} else {
		copy(s.f.durable, s.f.current)
	}
	return nil
}

func (w *world) open(path string, how openMode) (storage, error) {
	f, ok := w.files[path]
	if !ok {
		return nil, &os.PathError{Op: "open", Path: path, Err: os.ErrNotExist}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.look(f, -1); err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return simStorage{w, f}, nil
}

// lossModes: what becomes of writes that were not synced.
var lossModes = []string{"keep", "lose", "prefix", "subset", "sectors"}

// lose ends the power: some of what was not synced reaches the medium, in one of the ways
// of lossModes, and the write in flight does so for its first torn bytes.
func (w *world) lose(mode string, torn int, rng *rand.Rand) {
	w.mu.Lock()
	defer w.mu.Unlock()
	apply := func(e simWrite) { copy(e.f.durable[e.off:], e.data) }
	prefix := rng.Intn(len(w.pending) + 1)
	for i, e := range w.pending {
		switch {
		case mode == "keep", mode == "prefix" && i < prefix, mode == "subset" && rng.Intn(2) == 0:
			apply(e)
		case mode == "sectors":
			for s := 0; s < len(e.data); s += 512 {
				if rng.Intn(2) == 0 {
					apply(simWrite{e.f, e.off + int64(s), e.data[s:min(s+512, len(e.data))]})
				}
			}
		}
	}
	if e := w.flight; e != nil && mode != "lose" {
		apply(simWrite{e.f, e.off, e.data[:min(torn, len(e.data))]})
	}
	w.pending, w.flight, w.cutAt = nil, nil, 0
	for _, f := range w.files {
		copy(f.current, f.durable)
	}
}

// simDevice is a device with its update tool.
type simDevice struct {
	t      testing.TB
	w      *world
	dir    string // real files: configuration, device type
	root   string // before /proc and /sys
	booted string // letter of the slot that runs
	images map[string]string
	size   int
	bad    string // image that does not boot
	app    *app
	wrap   func(payloadHandler) payloadHandler // a faulty program, for tests of the test
	late   func()
	arm    func(*app) // of each life, before it begins
	boots  int
}

const simEnvSize = 1024

var (
	simEnvPath = "/sim/env"
	simJournal = "/sim/journal"
)

// simLayout makes the real files that a simulated device needs, once for many devices.
func simLayout(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "mendlet-sim") // the syncs of real files would cost most of the time
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for name, text := range map[string]string{
		"fw_env.config": fmt.Sprintf("%s 0x0 %#x\n%s %#x %#x\n", simEnvPath, simEnvSize, simEnvPath, simEnvSize, simEnvSize),
		"device_type":   "device_type=sim\n",
		"p2":            "",
		"p3":            "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// simEnvImage writes a copy of a redundant environment as U-Boot does.
func simEnvImage(flag byte, vars map[string]string) []byte {
	b := make([]byte, simEnvSize)
	n := 5
	for _, k := range slices.Sorted(maps.Keys(vars)) {
		n += copy(b[n:], k+"="+vars[k]+"\x00")
	}
	b[4] = flag
	binary.LittleEndian.PutUint32(b, crc32.ChecksumIEEE(b[5:]))
	return b
}

// readSimEnv is U-Boot's env_import_redund in a few lines: nil when no copy is good.
func readSimEnv(b []byte) (vars map[string]string, cur int) {
	ok := func(i int) bool {
		c := b[i*simEnvSize : (i+1)*simEnvSize]
		return crc32.ChecksumIEEE(c[5:]) == binary.LittleEndian.Uint32(c)
	}
	f0, f1 := b[4], b[simEnvSize+4]
	switch {
	case !ok(0) && !ok(1):
		return nil, -1
	case !ok(0):
		cur = 1
	case ok(1) && (f0 == 255 && f1 == 0 || f1 > f0 && !(f1 == 255 && f0 == 0)):
		cur = 1
	}
	vars = map[string]string{}
	for kv := range strings.SplitSeq(string(b[cur*simEnvSize+5:(cur+1)*simEnvSize]), "\x00") {
		if kv == "" {
			break
		}
		k, v, _ := strings.Cut(kv, "=")
		vars[k] = v
	}
	return vars, cur
}

// newSimDevice is a device that runs slot A, which holds image "old".
func newSimDevice(t testing.TB, dir string, images map[string][]byte) *simDevice {
	d := &simDevice{t: t, w: &world{files: map[string]*simFile{}}, dir: dir, root: filepath.Join(dir, "root"), booted: "A",
		images: map[string]string{}}
	file := func(name string, content []byte) {
		d.w.files[name] = &simFile{path: name, name: filepath.Base(name), durable: bytes.Clone(content),
			current: bytes.Clone(content)}
	}
	vars := map[string]string{"mender_boot_part": "2", "mender_boot_part_hex": "2", "upgrade_available": "0",
		"bootcount": "0",
		"bootlimit": "1", "mender_check_saveenv_canary": "1", "mender_saveenv_canary": "1", "other": "kept"}
	file(simEnvPath, append(simEnvImage(254, vars), simEnvImage(255, vars)...))
	for name, img := range images {
		d.images[string(img)] = name
		d.size = max(d.size, len(img))
	}
	slotSize := d.size + 3000
	file(filepath.Join(dir, "p2"), append(bytes.Clone(images["old"]), make([]byte, slotSize-len(images["old"]))...))
	junk := make([]byte, slotSize)
	rand.New(rand.NewSource(7)).Read(junk)
	file(filepath.Join(dir, "p3"), junk)
	file(simJournal, make([]byte, journalSize))
	j, _, _, _, err := readJournal(simStorage{d.w, d.w.files[simJournal]})
	if err == nil {
		err = j.save(&record{Provides: map[string]string{"artifact_name": "old"}})
	}
	if err != nil {
		t.Fatal(err)
	}
	d.w.ops = 0
	return d
}

// slotImage names the image that a slot holds, "" for none that is known.
func (d *simDevice) slotImage(num string) string {
	f, ok := d.w.files[filepath.Join(d.dir, "p"+num)]
	if !ok {
		return ""
	}
	for img, name := range d.images {
		if bytes.HasPrefix(f.current, []byte(img)) {
			return name
		}
	}
	return ""
}

func (d *simDevice) env() map[string]string {
	vars, _ := readSimEnv(d.w.files[simEnvPath].current)
	return vars
}

// saveEnv is the bootloader's saveenv, into the copy that is not current.
func (d *simDevice) saveEnv(vars map[string]string) {
	f := d.w.files[simEnvPath]
	_, cur := readSimEnv(f.current)
	img := simEnvImage(f.current[cur*simEnvSize+4]+1, vars)
	copy(f.current[(1-cur)*simEnvSize:], img)
	f.durable = bytes.Clone(f.current)
}

// boot is Mender's U-Boot logic (bootcount, bootlimit 1, altbootcmd). It returns an error
// when the device is bricked.
func (d *simDevice) boot() error {
	for range 5 {
		d.boots++
		vars := d.env()
		if vars == nil {
			return errors.New("no valid copy of the boot environment")
		}
		if vars["upgrade_available"] == "1" {
			n, _ := strconv.Atoi(vars["bootcount"])
			vars["bootcount"] = strconv.Itoa(n + 1)
			if n+1 > 1 {
				vars["mender_boot_part"] = map[string]string{"2": "3", "3": "2"}[vars["mender_boot_part"]]
				vars["mender_boot_part_hex"] = vars["mender_boot_part"]
				vars["upgrade_available"] = "0"
			}
			d.saveEnv(vars)
		}
		part := vars["mender_boot_part"]
		img := d.slotImage(part)
		if img == "" {
			return fmt.Errorf("boots slot %s, which holds no known image (upgrade_available=%s)", part,
				vars["upgrade_available"])
		}
		if vars["other"] != "kept" {
			return errors.New("a variable that is none of ours is gone")
		}
		if img != d.bad {
			d.booted = map[string]string{"2": "A", "3": "B"}[part]
			return nil
		}
		// the image panics early: the machine resets
	}
	return errors.New("boot loop")
}

// simMachine starts the program anew, as after a boot.
func (d *simDevice) start() *app {
	p := paths{conf: d.dir, data: d.dir, ds: d.dir}
	c := defaultConfig(p)
	c.FwEnvConfig, c.BootEnv = filepath.Join(d.dir, "fw_env.config"), "native"
	c.RootfsPartA, c.RootfsPartB = filepath.Join(d.dir, "p2"), filepath.Join(d.dir, "p3")
	o := &options{log: "stderr", quiet: true, progress: "none",
		write: writeOptions{block: 4096, head: 4096, syncEvery: 3 * 4096, keepEvery: 2 * 4096}}
	a := &app{c: c, o: o, out: io.Discard, lg: &logger{level: levelFatal},
		m: &machine{open: d.w.open, running: d.booted, root: d.root, sleep: noSleep}}
	a.openJournal = func(string, *logger) (*journalFile, *record, error) {
		st, err := d.w.open(simJournal, openWrite)
		if err != nil {
			return nil, nil, refuseUnlessPassing(err, "journal: %w", err)
		}
		j, rec, damaged, raw, err := readJournal(st)
		if damaged != nil && !firstSave(raw) {
			err = fmt.Errorf("journal: %w", damaged)
		}
		return j, rec, err
	}
	a.wrapHandler = d.wrap
	if d.arm != nil {
		d.arm(a)
	}
	d.app = a
	return a
}

// peek reads the journal as it is on the medium.
func (d *simDevice) peek() (*record, error) {
	_, rec, damaged, raw, err := readJournal(simStorage{d.w, d.w.files[simJournal]})
	if damaged != nil && firstSave(raw) {
		damaged = nil
	}
	return rec, errors.Join(damaged, err)
}

// firstSave tells a journal of which one copy was never written: when the other is torn, that was its first save, and
// there is nothing to be lost.
func firstSave(raw []byte) bool {
	blank := make([]byte, journalCopySize)
	return bytes.Equal(raw[:journalCopySize], blank) || bytes.Equal(raw[journalCopySize:], blank)
}

// powered runs f; it reports whether the power was cut in it.
func (d *simDevice) powered(f func()) (cut bool) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(powerCut); !ok {
				panic(r)
			}
			cut = true
		}
	}()
	f()
	return false
}

// life is what a device does after a boot: it finishes what is open, commits what waits
// for it, and installs the artifact if that has not had its verdict. It returns true when
// there is nothing left to do, and what the last command said.
func (d *simDevice) life(artifact, name string) (settled bool, err error) {
	ctx := context.Background()
	if err = (standalone{d.start()}).resume(ctx); err != nil && exitCode(err) != exitNothing {
		return false, err
	}
	rec, perr := d.peek()
	if perr != nil {
		return false, perr
	}
	switch {
	case rec.Update != nil && rec.Update.Step == stepCommitWait:
		err = standalone{d.start()}.commit(ctx)
		if d.late != nil {
			d.late()
			d.late = nil
		}
		return false, err
	case rec.Update != nil:
		return false, err
	case rec.Last == nil || rec.Last.Artifact != name:
		return false, standalone{d.start()}.install(ctx, artifact)
	}
	return true, nil
}

// maxLives is how often the device lives at most between two boots, when it is told to try later.
const maxLives = 3

// maxBoots is how often a device boots at most until an update has its verdict.
const maxBoots = 8

// settle boots and lives until the update has its verdict and the device runs what its
// boot environment says.
func (d *simDevice) settle(artifact, name string) error {
	_, err := d.settleUnless(artifact, name, nil)
	return err
}

// settleUnless stops when the device comes into a state from which all is known to end well.
func (d *simDevice) settleUnless(artifact, name string, known simStates) (met bool, err error) {
	var last error
	var way []simState
	for range maxBoots {
		if known != nil {
			way = append(way, d.state(name))
			if known.meets(way) {
				return true, nil
			}
		}
		if err := d.boot(); err != nil {
			return false, fmt.Errorf("after %v: %w", last, err)
		}
		settled, err := d.life(artifact, name)
		for n := 1; exitCode(err) == exitTempFail && n < maxLives; n++ { // as cron has it
			settled, err = d.life(artifact, name)
		}
		if last = err; settled {
			known.add(way, 1)
			return false, nil
		}
	}
	rec, _ := d.peek()
	return false, fmt.Errorf("not settled after %d boots; journal %+v; last error: %v", maxBoots, rec.Update, last)
}

// simState is the hash of all that decides what becomes of a device without power and of the
// update that it is in: slots, boot environment, and the journal but for its times.
type simState [sha256.Size]byte

// simStates says how many boots an update takes from states that are known to end well. It
// belongs to one exploration, which ends with the first that does not.
type simStates map[simState]int

// meets reports whether the last state of the way is known, and short enough.
func (s simStates) meets(way []simState) bool {
	left, ok := s[way[len(way)-1]]
	if ok = ok && len(way)-1+left <= maxBoots; ok {
		s.add(way[:len(way)-1], left+1)
	}
	return ok
}

// add notes the states of a way, the last of which took so many boots.
func (s simStates) add(way []simState, boots int) {
	for i := range way {
		s[way[len(way)-1-i]] = boots + i
	}
}

// state of a device that is about to boot, on its way to an update.
func (d *simDevice) state(update string) (s simState) {
	h := sha256.New()
	fmt.Fprintf(h, "%s, %s ran\n", update, d.booted)
	for _, path := range slices.Sorted(maps.Keys(d.w.files)) {
		content := d.w.files[path].current
		if path == simJournal {
			content = timeless(content)
		}
		fmt.Fprintf(h, "%s %d\n", path, len(content))
		h.Write(content)
	}
	return simState(h.Sum(nil))
}

// timeless is what a journal says: its records, newest first, without their times. A copy
// that is not good says nothing, whatever is in it.
func timeless(journal []byte) []byte {
	var seqs [2]uint64
	var said [2]string
	for i := range 2 {
		b := journal[i*journalCopySize : (i+1)*journalCopySize]
		seq, format, body, err := parseJournalCopy(b)
		var r record
		if err == nil {
			err = json.Unmarshal(body, &r)
		}
		if err != nil {
			said[i] = fmt.Sprintf("bad, empty %v\n", len(bytes.Trim(b, "\x00")) == 0)
			continue
		}
		r.Time = time.Time{}
		if r.Last != nil {
			r.Last.Time = time.Time{}
		}
		text, _ := json.Marshal(r)
		seqs[i], said[i] = seq, fmt.Sprintf("%d %s\n", format, text)
	}
	if seqs[1] > seqs[0] {
		said[0], said[1] = said[1], said[0]
	}
	return []byte(said[0] + said[1])
}

// check asserts what must hold once an update to "new" has ended.
func (d *simDevice) check(name string) error {
	rec, err := d.peek()
	if err != nil {
		return err
	}
	vars := d.env()
	runs := d.slotImage(vars["mender_boot_part"])
	num := map[string]string{"A": "2", "B": "3"}[d.booted]
	switch {
	case rec.Update != nil || rec.Last == nil || rec.Last.Artifact != name:
		return fmt.Errorf("no verdict: %+v", rec)
	case vars["upgrade_available"] != "0":
		return errors.New("upgrade_available is not 0")
	case vars["mender_boot_part"] != num:
		return fmt.Errorf("runs slot %s, boots %s next", num, vars["mender_boot_part"])
	case (rec.Last.Result == "committed") != (runs == name):
		return fmt.Errorf("verdict %q but %q runs", rec.Last.Result, runs)
	case (rec.Provides["artifact_name"] == name) != (runs == name):
		return fmt.Errorf("artifact_name %q but %q runs", rec.Provides["artifact_name"], runs)
	}
	return nil
}

func simImage(seed int64, n int) []byte {
	b := make([]byte, n)
	rand.New(rand.NewSource(seed)).Read(b)
	clear(b[9000:13000])
	return b
}

type simSetup struct {
	dir       string
	images    map[string][]byte
	artifacts map[string]string
}

func newSimSetup(t testing.TB) *simSetup {
	s := &simSetup{dir: simLayout(t), images: map[string][]byte{"old": simImage(1, 20000), "new": simImage(2, 30001),
		"next": simImage(3, 25000)},
		artifacts: map[string]string{}}
	for name, img := range s.images {
		file := filepath.Join(s.dir, name+".img")
		if err := os.WriteFile(file, img, 0o644); err != nil {
			t.Fatal(err)
		}
		s.artifacts[name] = filepath.Join(s.dir, name+".mender")
		if err := packCommand([]string{"-n", name, "-c", "sim", "-f", file, "--compression", "none", "-o", s.artifacts[name]},
			io.Discard, nil); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// tears are the places at which the write in flight is torn: sector borders, odd bytes, the
// whole.
func tears(rng *rand.Rand) []int {
	if testing.Short() {
		return []int{0, 513, rng.Intn(4096)}
	}
	return []int{0, 1, 5, 511, 512, 513, 1024, 4095, rng.Intn(4096), 1 << 20}
}

// device is one to explore: prep says what is special about it.
func (s *simSetup) device(t testing.TB, prep func(d *simDevice)) *simDevice {
	d := newSimDevice(t, s.dir, s.images)
	if prep != nil {
		prep(d)
	}
	return d
}

// record lives the update once without a cut. It returns what a cut may meet.
func (s *simSetup) record(t testing.TB, prep func(d *simDevice)) ([]moment, error) {
	d := s.device(t, prep)
	d.w.record = true
	err := d.settle(s.artifacts["new"], "new")
	if err == nil {
		err = d.check("new")
	}
	return d.w.moments, err
}

// cut takes the power away at a moment.
func (d *simDevice) cut(m moment, mode string, torn int, rng *rand.Rand) {
	ours := func(e simWrite) simWrite { return simWrite{d.w.files[e.f.path], e.off, e.data} }
	for path, content := range m.durable {
		copy(d.w.files[path].durable, content)
	}
	d.w.pending = nil
	for _, e := range m.pending {
		d.w.pending = append(d.w.pending, ours(e))
	}
	if m.flight != nil {
		e := ours(*m.flight)
		d.w.flight = &e
	}
	d.w.lose(mode, torn, rng)
}

// outlive lets a device that lost its power go on. The update has to end well, and the idle slot
// has to take the next one.
func (s *simSetup) outlive(d *simDevice, known simStates) error {
	if met, err := d.settleUnless(s.artifacts["new"], "new", known); met || err != nil {
		return err
	}
	if err := d.check("new"); err != nil {
		return err
	}
	if met, err := d.settleUnless(s.artifacts["next"], "next", known); err != nil {
		return fmt.Errorf("next update: %w", err)
	} else if met {
		return nil
	}
	if err := d.check("next"); err != nil {
		return fmt.Errorf("next update: %w", err)
	}
	if rec, _ := d.peek(); rec.Last.Result != "committed" {
		return fmt.Errorf("next update: %+v", rec.Last)
	}
	return nil
}

// found is what an exploration has seen: crash states, and how many of them differ.
type found struct{ states, differ int }

func (f found) String() string {
	return fmt.Sprintf("%d crash states, of which %d differ", f.states, f.differ)
}

// explore cuts at every operation in every way. It returns the first fault found.
func (s *simSetup) explore(t testing.TB, prep func(d *simDevice)) (found, error) {
	if exhaustive() {
		return s.exploreUnless(t, prep, nil)
	}
	return s.exploreUnless(t, prep, simStates{})
}

func (s *simSetup) exploreUnless(t testing.TB, prep func(d *simDevice), known simStates) (f found, err error) {
	moments, err := s.record(t, prep)
	if err != nil {
		return f, fmt.Errorf("without a cut: %w", err)
	}
	crashes := map[simState]bool{}
	rng := rand.New(rand.NewSource(42))
	for i, m := range moments {
		for _, mode := range lossModes {
			for _, torn := range tears(rng) {
				seed := rng.Int63()
				d := s.device(t, prep)
				d.cut(m, mode, torn, rand.New(rand.NewSource(seed)))
				crashes[d.state("")] = true
				f = found{f.states + 1, len(crashes)}
				if err := s.outlive(d, known); err != nil {
					return f, fmt.Errorf("cut at operation %d, mode %s, torn after %d, seed %d: %w", i+1, mode, torn, seed, err)
				}
			}
		}
	}
	return f, nil
}

// resumeScale is the program's sizes, a 256th of the real ones and less, in bytes.
const (
	simBlock     = 4096
	simHead      = 4096
	simKeep      = 4 * simBlock
	simReadAhead = 1024
	simFlush     = 8192 // between two places where the gzip data can be entered
)

func resumeScale() writeOptions {
	return writeOptions{block: simBlock, head: simHead, syncEvery: 2 * simBlock, keepEvery: simKeep,
		readAhead: simReadAhead}
}

// countedFile is a source that adds up what is read of it.
func countedFile(name string, n *atomic.Int64) *source {
	return &source{open: func(ctx context.Context, off int64, want sourceID) (io.ReadCloser, sourceID, error) {
		r, id, err := openFile(ctx, name, off, want)
		return &countedReader{r, n}, id, err
	}}
}

type countedReader struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c *countedReader) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// newResumeSetup has an image of 60 blocks in an artifact of the given compression.
func newResumeSetup(t testing.TB, compression string) (s *simSetup, flush int64) {
	s = &simSetup{dir: simLayout(t), images: map[string][]byte{"old": simImage(1, 20000),
		"new": simImage(2, 60*simBlock+77)}, artifacts: map[string]string{}}
	s.artifacts["new"] = filepath.Join(s.dir, "new.mender")
	if compression == "gzip" {
		flush = simFlush
	}
	if err := os.WriteFile(s.artifacts["new"], simArtifact(t, "new", compression, s.images["new"]), 0o644); err != nil {
		t.Fatal(err)
	}
	return s, flush
}

func simArtifact(t testing.TB, name, compression string, image []byte) []byte {
	k := newKit("rootfs-image", tarMember{name: "root.img", body: image})
	k.header[0].body = []byte(`{"payloads":[{"type":"rootfs-image"}],"artifact_provides":{"artifact_name":"` + name +
		`"},"artifact_depends":{"device_type":["sim"]}}`)
	switch compression {
	case "gzip":
		k.data = func(tar []byte) (string, []byte) { return "data/0000.tar.gz", gzipped(t, tar, 6, len(tar), simFlush) }
	case "gzip -9":
		k.data = func(tar []byte) (string, []byte) { return "data/0000.tar.gz", gzipped(t, tar, 9, len(tar), 0) }
	}
	return k.build(t)
}

// device is a device whose every life reads the artifact through a counter.
func (s *simSetup) countedDevice(t testing.TB) (*simDevice, *atomic.Int64) {
	n := &atomic.Int64{}
	d := newSimDevice(t, s.dir, s.images)
	d.arm = func(a *app) {
		a.o.write = resumeScale()
		a.src = countedFile(s.artifacts["new"], n)
	}
	return d, n
}

// endsWell checks that the new image runs and was committed.
func (d *simDevice) endsWell(name string) error {
	if err := d.check(name); err != nil {
		return err
	}
	if rec, _ := d.peek(); rec.Last.Result != "committed" {
		return fmt.Errorf("verdict %q, want committed: %s", rec.Last.Result, rec.Last.Cause)
	}
	return nil
}

// recordFetched lives the update once without a cut: what a cut may meet, and how many bytes of the
// artifact had been fetched by then.
func (s *simSetup) recordFetched(t *testing.T) (moments []moment, fetched []int64) {
	d, n := s.countedDevice(t)
	d.w.record = true
	d.w.fault = func(int, *simFile, bool) error {
		fetched = append(fetched, n.Load())
		return nil
	}
	if err := d.settle(s.artifacts["new"], "new"); err != nil {
		t.Fatal(err)
	}
	if err := d.check("new"); err != nil {
		t.Fatal(err)
	}
	return d.w.moments, fetched
}

// halfway is a device whose install was cut when its checkpoint was at or behind byte at.
func (s *simSetup) halfway(t testing.TB, at int64) (*simDevice, *atomic.Int64) {
	t.Helper()
	d, n := s.countedDevice(t)
	if err := d.boot(); err != nil {
		t.Fatal(err)
	}
	d.w.fault = func(op int, f *simFile, sync bool) error {
		if rec, err := d.peek(); err == nil && rec.Update != nil && rec.Update.Checkpoint != nil &&
			rec.Update.Checkpoint.Offset >= at {
			panic(powerCut{})
		}
		return nil
	}
	if !d.powered(func() { d.life(s.artifacts["new"], "new") }) {
		t.Fatal("the install was not cut")
	}
	d.w.fault = nil
	d.w.lose("lose", 0, rand.New(rand.NewSource(1)))
	return d, n
}

// journal changes the record on the medium.
func (d *simDevice) journal(change func(*record)) {
	j, rec, damaged, _, err := readJournal(simStorage{d.w, d.w.files[simJournal]})
	if err = errors.Join(err, damaged); err == nil {
		change(rec)
		err = j.save(rec)
	}
	if err != nil {
		d.t.Fatal(err)
	}
}
