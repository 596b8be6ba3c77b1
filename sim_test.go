// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// The power-cut simulator: a device of a boot environment in two copies, two slots and a
// journal, on disks with a volatile cache. Each write and each sync of the program is an
// operation. A run cuts the power at one of them, decides what the cache loses, boots the
// device by a model of Mender's U-Boot logic, and lets the program go on, until the update
// has ended.

// powerCut is what an operation panics with: the program's death, at once and for good.
type powerCut struct{}

// simWrite is a write that no sync has made durable yet.
type simWrite struct {
	f    *simFile
	off  int64
	data []byte
}

type simFile struct {
	name             string
	durable, current []byte
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
	corrupt func(op int, f *simFile, data []byte)
	lying   map[string]bool // files whose syncs do nothing
	trace   []string
}

type simStorage struct {
	w *world
	f *simFile
}

func (s simStorage) Size() int64  { return int64(len(s.f.current)) }
func (s simStorage) Close() error { return nil }

func (s simStorage) ReadAt(p []byte, off int64) (int, error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if off >= s.Size() {
		return 0, io.EOF
	}
	n := copy(p, s.f.current[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (s simStorage) op(sync bool) error {
	s.w.ops++
	kind := "write"
	if sync {
		kind = "sync"
	}
	s.w.trace = append(s.w.trace, kind+" "+s.f.name)
	if s.w.fault != nil {
		s.w.mu.Unlock() // it may look at the device
		defer s.w.mu.Lock()
		return s.w.fault(s.w.ops, s.f, sync)
	}
	return nil
}

func (s simStorage) WriteAt(p []byte, off int64) (int, error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if off+int64(len(p)) > s.Size() {
		return 0, syscall.ENOSPC
	}
	if err := s.op(false); err != nil {
		return 0, &os.PathError{Op: "write", Path: s.f.name, Err: err}
	}
	data := bytes.Clone(p)
	if s.w.ops == s.w.cutAt {
		s.w.flight = &simWrite{s.f, off, data}
		panic(powerCut{})
	}
	if s.w.corrupt != nil {
		s.w.corrupt(s.w.ops, s.f, data)
	}
	copy(s.f.current[off:], data)
	s.w.pending = append(s.w.pending, simWrite{s.f, off, data})
	return len(p), nil
}

func (s simStorage) Sync() error {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if err := s.op(true); err != nil {
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
	copy(s.f.durable, s.f.current)
	return nil
}

func (w *world) open(path string, how openMode) (storage, error) {
	f, ok := w.files[path]
	if !ok {
		return nil, &os.PathError{Op: "open", Path: path, Err: os.ErrNotExist}
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

var simEnvPath = "/sim/env"

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
	for _, k := range sortedKeys(vars) {
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
	d := &simDevice{t: t, w: &world{files: map[string]*simFile{}}, dir: dir, root: filepath.Join(dir, "root"), booted: "A", images: map[string]string{}}
	file := func(name string, content []byte) {
		d.w.files[name] = &simFile{name: filepath.Base(name), durable: bytes.Clone(content), current: bytes.Clone(content)}
	}
	vars := map[string]string{"mender_boot_part": "2", "mender_boot_part_hex": "2", "upgrade_available": "0", "bootcount": "0",
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
	file("/sim/journal", make([]byte, journalSize))
	j, _, _, _, err := readJournal(simStorage{d.w, d.w.files["/sim/journal"]})
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
	copy(f.durable, f.current)
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
			return fmt.Errorf("boots slot %s, which holds no known image (upgrade_available=%s)", part, vars["upgrade_available"])
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
	o := &options{log: "stderr", quiet: true, progress: "none", write: writeOptions{block: 4096, head: 4096, syncEvery: 3 * 4096, keepEvery: 2 * 4096}}
	a := &app{c: c, o: o, out: io.Discard, lg: &logger{level: levelFatal}, m: &machine{open: d.w.open, running: d.booted, root: d.root}}
	a.openJournal = func(string, *logger) (*journalFile, *record, error) {
		st, err := d.w.open("/sim/journal", openWrite)
		if err != nil {
			return nil, nil, err
		}
		j, rec, damaged, _, err := readJournal(st)
		if damaged != nil {
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
	_, rec, damaged, _, err := readJournal(simStorage{d.w, d.w.files["/sim/journal"]})
	return rec, errors.Join(damaged, err)
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
	if err = d.start().resume(ctx); err != nil && exitCode(err) != exitNothing {
		return false, err
	}
	rec, perr := d.peek()
	if perr != nil {
		return false, perr
	}
	switch {
	case rec.Update != nil && rec.Update.Step == stepCommitWait:
		err = d.start().commit(ctx)
		if d.late != nil {
			d.late()
		}
		return false, err
	case rec.Update != nil:
		return false, err
	case rec.Last == nil || rec.Last.Artifact != name:
		return false, d.start().install(ctx, artifact)
	}
	return true, nil
}

// settle boots and lives until the update has its verdict and the device runs what its
// boot environment says.
func (d *simDevice) settle(artifact, name string) error {
	var last error
	for range 8 {
		if err := d.boot(); err != nil {
			return fmt.Errorf("after %v: %w", last, err)
		}
		settled, err := d.life(artifact, name)
		if last = err; settled {
			return nil
		}
	}
	rec, _ := d.peek()
	return fmt.Errorf("not settled after 8 boots; journal %+v; last error: %v", rec.Update, last)
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
	s := &simSetup{dir: simLayout(t), images: map[string][]byte{"old": simImage(1, 20000), "new": simImage(2, 30001), "next": simImage(3, 25000)},
		artifacts: map[string]string{}}
	for name, img := range s.images {
		file := filepath.Join(s.dir, name+".img")
		if err := os.WriteFile(file, img, 0o644); err != nil {
			t.Fatal(err)
		}
		s.artifacts[name] = filepath.Join(s.dir, name+".mender")
		if err := packCommand([]string{"-n", name, "-c", "sim", "-f", file, "--compression", "none", "-o", s.artifacts[name]}, io.Discard, nil); err != nil {
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

// crash runs the update with a cut at operation k and reports whether it got that far.
func (s *simSetup) crash(t testing.TB, k int, mode string, torn int, seed int64, prep func(d *simDevice)) (reached bool, err error) {
	d := newSimDevice(t, s.dir, s.images)
	if prep != nil {
		prep(d)
	}
	d.w.cutAt = k
	// The first life and all that follow, until the cut comes or all is done.
	cut := d.powered(func() { err = d.settle(s.artifacts["new"], "new") })
	if !cut {
		if err == nil {
			err = d.check("new")
		}
		return false, err
	}
	d.w.lose(mode, torn, rand.New(rand.NewSource(seed)))
	if err := d.settle(s.artifacts["new"], "new"); err != nil {
		return true, err
	}
	if err := d.check("new"); err != nil {
		return true, err
	}
	// The idle slot takes the next update.
	if err := d.settle(s.artifacts["next"], "next"); err != nil {
		return true, fmt.Errorf("next update: %w", err)
	}
	if err := d.check("next"); err != nil {
		return true, fmt.Errorf("next update: %w", err)
	}
	if rec, _ := d.peek(); rec.Last.Result != "committed" {
		return true, fmt.Errorf("next update: %+v", rec.Last)
	}
	return true, nil
}

// explore cuts at every operation in every way. It returns how many states were tried and
// the first fault found.
func (s *simSetup) explore(t testing.TB, prep func(d *simDevice)) (states int, err error) {
	rng := rand.New(rand.NewSource(42))
	for k := 1; ; k++ {
		for _, mode := range lossModes {
			for _, torn := range tears(rng) {
				seed := rng.Int63()
				reached, err := s.crash(t, k, mode, torn, seed, prep)
				if err != nil {
					return states, fmt.Errorf("cut at operation %d, mode %s, torn after %d, seed %d: %w", k, mode, torn, seed, err)
				}
				if !reached {
					return states, nil
				}
				states++
			}
		}
	}
}

func TestPowerCutAtEveryOperation(t *testing.T) {
	t.Parallel()
	s := newSimSetup(t)
	states, err := s.explore(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d crash states", states)
	if states < 1000 && !testing.Short() {
		t.Errorf("only %d crash states: the simulator does not see the program's writes", states)
	}
}

// An image that does not boot must be rolled back, wherever the power is cut.
func TestPowerCutWithImageThatDoesNotBoot(t *testing.T) {
	t.Parallel()
	s := newSimSetup(t)
	states, err := s.explore(t, func(d *simDevice) { d.bad = "new" })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d crash states", states)
}

// The idle slot holds the image already, but in the cache of the disk only: nothing is written to it
// then, and yet it must be durable before it is switched to.
func TestPowerCutWithImageThatIsThere(t *testing.T) {
	t.Parallel()
	s := newSimSetup(t)
	states, err := s.explore(t, func(d *simDevice) {
		f := d.w.files[filepath.Join(s.dir, "p3")]
		copy(f.current, s.images["new"])
		d.w.pending = append(d.w.pending, simWrite{f, 0, s.images["new"]})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d crash states", states)
}

// errors at each operation, once or from then on until the next boot.
func TestErrorAtEveryOperation(t *testing.T) {
	s := newSimSetup(t)
	states := 0
	for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
		for _, sticky := range []bool{false, true} {
			for k := 1; ; k++ {
				d := newSimDevice(t, s.dir, s.images)
				boots, hit := 0, false
				d.w.fault = func(op int, f *simFile, sync bool) error {
					if op == k {
						boots, hit = d.boots, true
					}
					if op == k || sticky && hit && d.boots == boots {
						return errno
					}
					return nil
				}
				err := d.settle(s.artifacts["new"], "new")
				if err == nil {
					err = d.check("new")
				}
				if err != nil {
					t.Fatalf("%v at operation %d, sticky %v: %v\n%s", errno, k, sticky, err, strings.Join(d.w.trace, "\n"))
				}
				if !hit {
					break
				}
				states++
			}
		}
	}
	t.Logf("%d states", states)
}

// fwup#138, field case 24: a write that succeeds and puts something else on the medium.
func TestSilentCorruptionOfEveryWrite(t *testing.T) {
	s := newSimSetup(t)
	for k := 1; ; k++ {
		d := newSimDevice(t, s.dir, s.images)
		hit, where := false, ""
		d.w.corrupt = func(op int, f *simFile, data []byte) {
			if op == k || op == k+1 && !hit {
				hit, where = true, f.name
				data[len(data)/2] ^= 0x10
			}
		}
		if err := d.boot(); err != nil {
			t.Fatal(err)
		}
		for range 8 {
			d.life(s.artifacts["new"], "new")
			if hit {
				break
			}
			if err := d.boot(); err != nil {
				t.Fatal(err)
			}
			if rec, _ := d.peek(); rec.Update == nil && rec.Last != nil {
				break
			}
		}
		if !hit {
			break
		}
		d.w.corrupt = nil
		if vars := d.env(); vars == nil {
			t.Fatalf("write %d: no valid environment", k)
		} else if img := d.slotImage(vars["mender_boot_part"]); img == "" {
			t.Fatalf("write %d (%s): the corrupted slot would be booted", k, where)
		}
		err := d.settle(s.artifacts["new"], "new")
		if err == nil {
			err = d.check("new")
		}
		if err != nil {
			t.Fatalf("write %d (%s): %v", k, where, err)
		}
	}
}

// flipFirst switches the boot environment before the image is written and read back.
type flipFirst struct{ payloadHandler }

func (h flipFirst) download(ctx context.Context, a *artifact) error {
	return errors.Join(h.payloadHandler.call(ctx, "ArtifactInstall"), h.payloadHandler.download(ctx, a))
}

// lateCommit leaves the work of ArtifactCommit to be done when the journal has it as done.
type lateCommit struct {
	payloadHandler
	d *simDevice
}

func (h lateCommit) call(ctx context.Context, state string) error {
	if state == "ArtifactCommit" {
		h.d.late = func() { h.payloadHandler.call(ctx, state) }
		return nil
	}
	return h.payloadHandler.call(ctx, state)
}

// Tests of the test: programs that get the order wrong must be found out.
func TestSimulatorFindsWrongOrders(t *testing.T) {
	for name, prep := range map[string]func(d *simDevice){
		"environment before read-back": func(d *simDevice) {
			d.wrap = func(h payloadHandler) payloadHandler { return flipFirst{h} }
		},
		"no sync before the flip": func(d *simDevice) { d.w.lying = map[string]bool{"p3": true, "p2": true} },
		"journal before effect": func(d *simDevice) {
			d.wrap = func(h payloadHandler) payloadHandler { return lateCommit{h, d} }
		},
		"journal not synced": func(d *simDevice) { d.w.lying = map[string]bool{"journal": true} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSimSetup(t)
			states, err := s.explore(t, prep)
			if err == nil {
				t.Fatalf("nothing found in %d crash states", states)
			}
			t.Logf("found after %d states: %v", states, err)
		})
	}
}
