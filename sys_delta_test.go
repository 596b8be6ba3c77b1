// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nodelta

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Installs of deltas on the simulated device of helper_sim_test.go.

// deltaArtifact is the artifact that pack --delta=16k would make, with an index that lies if it is told to.
func deltaArtifact(t testing.TB, name string, image []byte, lie func(*deltaIndex)) []byte {
	t.Helper()
	k := newKit(rootfsImage, tarMember{name: "root.img", body: image})
	k.header[0].body = []byte(`{"payloads":[{"type":"rootfs-image"}],"artifact_provides":{"artifact_name":"` + name +
		`"},"artifact_depends":{"device_type":["sim"]}}`)
	var body bytes.Buffer
	d := packedDelta{average: minAverage}
	if err := d.write(&body, bytes.NewReader(image), makeTar(t, k.files)[:512]); err != nil {
		t.Fatal(err)
	}
	if lie != nil {
		x := indexOf(t, d.front, d.info, int64(len(image)))
		head := x.head
		lie(x)
		raw := x.encode()
		d.front, d.info = appendDeltaMembers(d.front[:head:head], raw), x.info(raw)
	}
	k.data = func([]byte) (string, []byte) { return "data/0000.tar.gz", append(d.front, body.Bytes()...) }
	meta, err := d.addInfo(nil)
	if err != nil {
		t.Fatal(err)
	}
	k.header[2].body = meta
	return k.build(t)
}

// indexOf takes the index out of the members before the chunks.
func indexOf(t testing.TB, front []byte, info *deltaInfo, imageSize int64) *deltaIndex {
	t.Helper()
	var raw []byte
	for p := front[len(front)-info.Members*deltaMember-int(info.Size):]; len(p) > 0; {
		n := min(len(p)-deltaMember, deltaSlice)
		raw, p = append(raw, p[16:16+n]...), p[n+deltaMember:]
	}
	x, err := parseDeltaIndex(raw, info, imageSize)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// spanServer gives an artifact in spans, and counts.
type spanServer struct {
	name           string
	n, spans, gets atomic.Int64
	fail           func(off, end int64) error // of a span
	corrupt        func(off int64, p []byte)
}

func (s *spanServer) source() *source {
	src := countedFile(s.name, &s.n)
	open := src.open
	src.open = func(ctx context.Context, off int64, want sourceID) (io.ReadCloser, sourceID, error) {
		s.gets.Add(1)
		return open(ctx, off, want)
	}
	src.span = func(ctx context.Context, id sourceID) (spanReader, error) {
		r, now, err := open(ctx, 0, id)
		if err == nil && now != id {
			err = errChanged
		}
		return &testSpan{ReadCloser: r, ctx: ctx, s: s}, err
	}
	return src
}

type testSpan struct {
	io.ReadCloser
	ctx      context.Context
	s        *spanServer
	off, end int64
}

func (r *testSpan) span(off, end int64) (err error) {
	r.s.spans.Add(1)
	if r.s.fail != nil {
		if err := r.s.fail(off, end); err != nil {
			return err
		}
	}
	r.off, r.end = off, end
	_, err = r.ReadCloser.(*countedReader).ReadCloser.(io.Seeker).Seek(off, io.SeekStart)
	return err
}

func (r *testSpan) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	if r.off == r.end {
		return 0, io.EOF
	}
	n, err := r.ReadCloser.Read(p[:min(int64(len(p)), r.end-r.off)])
	if r.s.corrupt != nil {
		r.s.corrupt(r.off, p[:n])
	}
	r.off += int64(n)
	return n, err
}

// deltaSetup has a device with image "old", an artifact of "new" which differs in few places, and one of "next".
type deltaSetup struct {
	*simSetup
	servers map[string]*spanServer // by URL
	how     string
	write   writeOptions
}

// deltaScale is resumeScale with blocks that are not too many for images of that size.
func deltaScale() writeOptions {
	o := resumeScale()
	o.block, o.syncEvery, o.keepEvery, o.gap = 16<<10, 32<<10, 32<<10, 1
	return o
}

func newDeltaSetup(t testing.TB) *deltaSetup {
	old := simImage(1, 300000)
	clear(old[150000:190000])
	changed := simImage(2, 20000)
	images := map[string][]byte{"old": old,
		"new":  slices.Concat(old[:90000], changed, old[100000:250000], []byte("shift"), old[250000:]),
		"next": slices.Concat(old[:20000], simImage(3, 14000), old[20000:])}
	return newDeltaSetupOf(t, images, nil)
}

func newDeltaSetupOf(t testing.TB, images map[string][]byte, lie func(*deltaIndex)) *deltaSetup {
	s := &deltaSetup{&simSetup{simLayout(t), images, map[string]string{}}, map[string]*spanServer{}, "auto", deltaScale()}
	for name, image := range images {
		path := filepath.Join(s.dir, name+".mender")
		s.artifacts[name] = "http://sim/" + name
		s.servers[s.artifacts[name]] = &spanServer{name: path}
		if err := os.WriteFile(path, deltaArtifact(t, name, image, lie), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// prep gives a device a datastore of its own, and the network.
func (s *deltaSetup) prep(d *simDevice) {
	ds, err := os.MkdirTemp(d.dir, "ds")
	if err != nil {
		d.t.Fatal(err)
	}
	d.arm = func(a *app) {
		a.o.write = s.write
		a.c.paths.ds, a.c.Delta = ds, s.how
		a.urlSource = func(_ *app, url string) *source { return s.servers[url].source() }
	}
	d.arm(d.start())
}

func (s *deltaSetup) newDevice(t testing.TB) *simDevice { return s.device(t, s.prep) }

// update brings a device to an image and gives the bytes and spans that were fetched.
func (s *deltaSetup) update(t testing.TB, d *simDevice, name string) (n, spans int64) {
	t.Helper()
	server := s.servers[s.artifacts[name]]
	n, spans = server.n.Load(), server.spans.Load()
	if err := d.settle(s.artifacts[name], name); err != nil {
		t.Fatal(err)
	}
	if err := d.endsWell(name); err != nil {
		t.Fatal(err)
	}
	return server.n.Load() - n, server.spans.Load() - spans
}

// size of an artifact in bytes.
func (s *deltaSetup) size(name string) int64 {
	return int64(len(readFileOrNil(s.servers[s.artifacts[name]].name)))
}

func TestDeltaInstall(t *testing.T) {
	t.Parallel()
	s := newDeltaSetup(t)
	d := s.newDevice(t)
	n, spans := s.update(t, d, "new")
	t.Logf("fetched %d of %d bytes in %d requests", n, s.size("new"), spans)
	if n > s.size("new")/2 || spans == 0 {
		t.Errorf("fetched %d bytes of %d in %d spans", n, s.size("new"), spans)
	}
	rec, _ := d.peek()
	if saved := rec.Last.Saved; saved < s.size("new")/2 || saved > s.size("new") {
		t.Errorf("saved %d of %d", saved, s.size("new"))
	}
	if _, err := os.Stat(filepath.Join(d.app.c.paths.ds, "mendlet.index.3")); err != nil {
		t.Error(err)
	}
	// What runs now is known by its index: it is not looked through.
	reads := 0
	d.w.blind = func(_ int, f *simFile, off int64) error {
		if f.name == "p3" && off >= 0 {
			reads++
		}
		return nil
	}
	n, _ = s.update(t, d, "next")
	d.w.blind = nil
	t.Logf("fetched %d of %d bytes, %d reads", n, s.size("next"), reads)
	if chunks := len(s.images["next"]) / 4096; n > s.size("next")/2 || reads > chunks {
		t.Errorf("fetched %d bytes of %d with %d reads", n, s.size("next"), reads)
	}
}

func TestPowerCutInDelta(t *testing.T) {
	t.Parallel()
	size := 20000 // a second's worth of states
	if exhaustive() {
		size = 300000
	}
	old := simImage(1, size)
	s := newDeltaSetupOf(t, map[string][]byte{"old": old,
		"new":  slices.Concat([]byte("new"), old, simImage(2, 14000)),
		"next": slices.Concat(simImage(3, 14000), old)}, nil)
	seen, err := s.explore(t, s.prep)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(seen)
	if seen.states < 500 && !testing.Short() {
		t.Errorf("%v: the simulator does not see the program's writes", seen)
	}
}

// lostPerDeltaCut is lostPerCut for a delta, in whose place of going on a chunk begins, that may have come before; and
// what is fetched ahead is twice as much.
func lostPerDeltaCut(o writeOptions) int64 {
	const chunkMax = maxShare * minAverage
	since := o.keepEvery + o.block + chunkMax
	inFlight := blocksInFlight*o.block + 2*int64(max(o.readAhead, aheadPieces*512)) + chunkMax
	begin := 4096 + o.head + chunkMax + int64(o.readAhead)
	return since + inFlight + begin
}

// The power goes again and again; what is fetched in all is what was missing and so much for each cut.
func TestFetchedBytesOfDeltaWithManyCuts(t *testing.T) {
	t.Parallel()
	s := newDeltaSetup(t)
	server := s.servers[s.artifacts["new"]]
	missing, _ := s.update(t, s.newDevice(t), "new")
	most, lost := 0, int64(0)
	for every := 13; every < 90; every += 7 {
		d := s.newDevice(t)
		rng := rand.New(rand.NewSource(int64(every)))
		before, cuts := server.n.Load(), 0
		for ; ; cuts++ {
			d.w.cutAt = d.w.ops + every
			var err error
			if !d.powered(func() { err = d.settle(s.artifacts["new"], "new") }) {
				if err != nil {
					t.Fatal(err)
				}
				break
			}
			torn := tears(rng)
			d.w.lose(lossModes[rng.Intn(len(lossModes))], torn[rng.Intn(len(torn))], rng)
		}
		if err := d.check("new"); err != nil {
			t.Fatalf("a cut every %d operations: %v", every, err)
		}
		got := server.n.Load() - before
		if bound := missing + int64(cuts)*lostPerDeltaCut(s.write); got > bound {
			t.Errorf("a cut every %d operations: %d cuts, fetched %d bytes, want %d at most", every, cuts, got, bound)
		}
		if most = max(most, cuts); cuts > 0 {
			lost = max(lost, (got-missing)/int64(cuts))
		}
	}
	t.Logf("%d bytes missing; up to %d cuts of one install, at most %d bytes fetched again for each (bound %d)", missing,
		most, lost, lostPerDeltaCut(s.write))
	if most < 5 {
		t.Errorf("at most %d cuts: nothing was proved", most)
	}
}

// cutDelta cuts the power of an install when its checkpoint is at or behind byte at.
func (s *deltaSetup) cutDelta(t testing.TB, d *simDevice, name string, at int64) {
	t.Helper()
	if err := d.boot(); err != nil {
		t.Fatal(err)
	}
	d.w.fault = func(int, *simFile, bool) error {
		if rec, err := d.peek(); err == nil && rec.Update != nil && rec.Update.Checkpoint != nil &&
			rec.Update.Checkpoint.Offset >= at {
			panic(powerCut{})
		}
		return nil
	}
	if !d.powered(func() { d.life(s.artifacts[name], name) }) {
		t.Fatal("the install was not cut")
	}
	d.w.fault = nil
	d.w.lose("lose", 0, rand.New(rand.NewSource(1)))
}

// An install that was begun as a delta goes on without, and the other way round; and so does one whose index is lost.
func TestDeltaTakesUpCheckpoints(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		first, second string
		lose          bool
		most          int64 // bytes fetched after the cut, of 270 kB
	}{
		{"auto", "auto", false, 70000},
		{"auto", "auto", true, 75000},
		{"auto", "off", false, 200000},
		{"off", "auto", false, 80000},
		{"off", "only", false, 80000},
	} {
		t.Run(fmt.Sprintf("%s %s %v", c.first, c.second, c.lose), func(t *testing.T) {
			s := newDeltaSetup(t)
			d := s.newDevice(t)
			s.how = c.first
			s.cutDelta(t, d, "new", 120000)
			if c.lose {
				os.Remove(filepath.Join(d.app.c.paths.ds, "mendlet.index.3.new"))
			}
			s.how = c.second
			n, spans := s.update(t, d, "new")
			t.Logf("fetched %d bytes in %d spans", n, spans)
			if n > c.most || (spans > 0) != (c.second != "off") {
				t.Errorf("fetched %d bytes in %d spans, want %d at most", n, spans, c.most)
			}
			if rec, _ := d.peek(); rec.Last.Result != "committed" {
				t.Errorf("%+v", rec.Last)
			}
		})
	}
}

// What is fetched refers to the bytes before it, which after a cut are in the slot and, of its head, in none.
func TestDeltaRefersToWhatIsThere(t *testing.T) {
	t.Parallel()
	old := simImage(1, 300000)
	var alike []byte
	for i := range 20 {
		p := simImage(2, 13001)[:6000]
		p[i*100] ^= 1
		alike = append(alike, p...)
	}
	s := newDeltaSetupOf(t, map[string][]byte{"old": old, "front": append(alike, old[100000:]...),
		"middle": slices.Concat(old[:100000], alike, old[120000:])}, nil)
	s.how, s.write.head, s.write.block = "only", 24<<10, 24<<10
	resumed := 0
	for name, from := range map[string]int64{"front": 1, "middle": 100000} {
		n, _ := s.update(t, s.newDevice(t), name)
		if t.Logf("%s: fetched %d bytes", name, n); n > 90000 {
			t.Errorf("%s: fetched %d bytes: what is alike is not stored as such", name, n)
		}
		for at := from; at < from+120000; at += 17000 {
			d := s.newDevice(t)
			s.cutDelta(t, d, name, at)
			rec, err := d.peek()
			must(t, err)
			if c := rec.Update.Checkpoint; c != nil { // what got into the slot later would be taken from there
				clear(d.w.files[filepath.Join(d.dir, "p3")].current[c.Offset:])
				resumed++
			}
			const late = 512 // one read of the life that was cut may be counted afterwards
			if again, _ := s.update(t, d, name); again > n+late {
				t.Errorf("%s, cut at %d: fetched %d bytes, as if from the start", name, at, again)
			}
		}
	}
	if resumed < 8 {
		t.Errorf("%d installs went on where they had come to: nothing was proved", resumed)
	}
}

// What the running slot holds changes after it was looked through, or cannot be read: so much is fetched.
func TestDeltaOfSlotThatChanges(t *testing.T) {
	t.Parallel()
	for name, broken := range map[string]bool{"changes": false, "cannot be read": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newDeltaSetup(t)
			missing, spans := s.update(t, s.newDevice(t), "new")
			d := s.newDevice(t)
			server := s.servers[s.artifacts["new"]]
			server.fail = func(int64, int64) error { // the first request comes when the plan is made
				f := d.w.files[filepath.Join(d.dir, "p2")]
				if d.w.mu.Lock(); !broken {
					f.current[220000] ^= 1
					f.current[280000] ^= 1
				}
				d.w.mu.Unlock()
				server.fail = nil
				return nil
			}
			if broken {
				d.w.blind = func(_ int, f *simFile, off int64) error {
					if f.name == "p2" && off >= 212992 && off < 229376 {
						return syscall.EIO
					}
					return nil
				}
			}
			n, odd := s.update(t, d, "new")
			t.Logf("fetched %d bytes in %d spans, against %d in %d", n, odd, missing, spans)
			if n <= missing || n > missing+3*maxShare*minAverage {
				t.Errorf("fetched %d bytes, want a few chunks more than %d", n, missing)
			}
			if !broken && odd <= spans {
				t.Errorf("%d spans, want more than %d", odd, spans)
			}
			if rec, _ := d.peek(); rec.Last.Saved < s.size("new")/4 {
				t.Errorf("%+v", rec.Last)
			}
		})
	}
}

// An index in the datastore that is another image's, or damaged, costs time and no more bytes than none.
func TestDeltaWithWrongIndexOfSlot(t *testing.T) {
	t.Parallel()
	s := newDeltaSetup(t)
	missing, _ := s.update(t, s.newDevice(t), "new")
	fill := s.newDevice(t)
	s.update(t, fill, "new")
	right := readFileOrNil(filepath.Join(fill.app.c.paths.ds, "mendlet.index.3")) // of new
	for name, index := range map[string][]byte{
		"another image": right,
		"damaged":       append(bytes.Clone(right[:100]), make([]byte, len(right)-100)...),
		"short":         right[:20],
		"empty":         {},
	} {
		d := s.newDevice(t)
		if err := os.WriteFile(filepath.Join(d.app.c.paths.ds, "mendlet.index.2"), index, 0o600); err != nil {
			t.Fatal(err)
		}
		if n, _ := s.update(t, d, "new"); n > missing+2*maxShare*minAverage {
			t.Errorf("%s: fetched %d bytes, want about %d", name, n, missing)
		}
	}
}

// What the idle slot holds is used where it has not been overwritten yet.
func TestDeltaFromIdleSlot(t *testing.T) {
	t.Parallel()
	s := newDeltaSetup(t)
	idle := s.newDevice(t)
	// The idle slot holds "next", of which its index tells, and the running one nothing of use.
	ds := idle.app.c.paths.ds
	p3 := idle.w.files[filepath.Join(idle.dir, "p3")]
	copy(p3.current, s.images["next"])
	copy(p3.durable, s.images["next"])
	other := newDeltaSetupOf(t, map[string][]byte{"old": simImage(8, 300000), "x": s.images["next"]}, nil)
	fill := other.newDevice(t)
	copy(fill.w.files[filepath.Join(fill.dir, "p3")].current, s.images["next"])
	other.update(t, fill, "x")
	index := readFileOrNil(filepath.Join(fill.app.c.paths.ds, "mendlet.index.3"))
	if index == nil {
		t.Fatal("no index was kept")
	}
	if err := os.WriteFile(filepath.Join(ds, "mendlet.index.3"), index, 0o600); err != nil {
		t.Fatal(err)
	}
	p2 := idle.w.files[filepath.Join(idle.dir, "p2")]
	idle.images[string(bytes.Repeat([]byte{7}, 4000))] = "old" // the bootloader's view of what runs
	for _, b := range [][]byte{p2.current, p2.durable} {
		for i := range b {
			b[i] = 7
		}
	}
	n, _ := s.update(t, idle, "new")
	t.Logf("fetched %d of %d bytes", n, s.size("new"))
	if n > s.size("new")*7/10 {
		t.Errorf("fetched %d bytes of %d: the idle slot was not used", n, s.size("new"))
	}
}

// An index of the idle slot that is not of what is there costs no requests.
func TestDeltaWithWrongIndexOfIdleSlot(t *testing.T) {
	t.Parallel()
	s := newDeltaSetup(t)
	missing, spans := s.update(t, s.newDevice(t), "new")
	fill := s.newDevice(t)
	s.update(t, fill, "new")
	d := s.newDevice(t) // whose idle slot holds noise
	index := readFileOrNil(filepath.Join(fill.app.c.paths.ds, "mendlet.index.3"))
	if err := os.WriteFile(filepath.Join(d.app.c.paths.ds, "mendlet.index.3"), index, 0o600); err != nil {
		t.Fatal(err)
	}
	if n, got := s.update(t, d, "new"); n != missing || got != spans {
		t.Errorf("fetched %d bytes in %d spans, want %d in %d", n, got, missing, spans)
	}
}

// Chunks of other bytes with the same 6 bytes of hash, and an index that lies in other ways: the image's own hash
// tells, and then it is fetched as a whole, once. With "only" it is not.
func TestDeltaIndexThatLies(t *testing.T) {
	t.Parallel()
	s := newDeltaSetup(t)
	for name, lie := range map[string]func(*deltaIndex){
		"a sum": func(x *deltaIndex) { x.chunks[len(x.chunks)/3].sum ^= 1 },
		"sizes": func(x *deltaIndex) {
			a, b := &x.chunks[3], &x.chunks[4]
			a.stored, b.stored = a.stored+1, b.stored-1
		},
		"the head": func(x *deltaIndex) { x.head++ },
		"the end":  func(x *deltaIndex) { x.chunks[len(x.chunks)-1].stored++ },
		"zeros": func(x *deltaIndex) {
			for i := range x.chunks {
				if c := &x.chunks[i]; !c.zero() && i > 4 {
					c.sum = 0
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			liar := newDeltaSetupOf(t, s.images, lie)
			testLiar(t, liar)
		})
	}
}

// A chunk of other bytes has the size and the 6 bytes of hash of one in the running slot.
func TestDeltaChunksThatCollide(t *testing.T) {
	t.Parallel()
	old := simImage(1, 300000)
	c := newChunker(minAverage)
	first := c.next(old)
	second := c.next(old[first:])
	image := bytes.Clone(old)
	image[first+10] ^= 1 // too far from the chunk's end to move it
	s := newDeltaSetupOf(t, map[string][]byte{"old": old, "new": image},
		func(x *deltaIndex) { x.chunks[1].sum = describe(old[first : first+second]).sum })
	testLiar(t, s)
}

// testLiar installs an image by an index that lies.
func testLiar(t *testing.T, liar *deltaSetup) {
	server := liar.servers[liar.artifacts["new"]]
	d := liar.newDevice(t)
	n, _ := liar.update(t, d, "new")
	t.Logf("fetched %d of %d bytes in %d + %d requests", n, liar.size("new"), server.gets.Load(), server.spans.Load())
	if n > 2*liar.size("new") || server.gets.Load() > 2 {
		t.Errorf("fetched %d bytes of %d, in %d requests for the whole", n, liar.size("new"), server.gets.Load())
	}
	liar.how = "only"
	d = liar.newDevice(t)
	if err := d.boot(); err != nil {
		t.Fatal(err)
	}
	before := server.n.Load()
	_, err := d.life(liar.artifacts["new"], "new")
	if got := server.n.Load() - before; err == nil || got > liar.size("new")*7/10 {
		t.Errorf("only: %v, and %d bytes fetched", err, got)
	}
	if img := d.slotImage(d.env()["mender_boot_part"]); img != "old" {
		t.Errorf("only: %q boots next", img)
	}
}

// A server that gives no parts, or whose file changes, is asked for the whole, once; with "only" the update fails.
func TestDeltaFromServerWithoutRanges(t *testing.T) {
	t.Parallel()
	for _, fault := range []error{errNoRanges, errChanged, tryLater("%w", errNoRanges)} {
		for _, at := range []int64{1, 2} {
			s := newDeltaSetup(t)
			server := s.servers[s.artifacts["new"]]
			var spans atomic.Int64
			server.fail = func(int64, int64) error {
				if spans.Add(1) >= at {
					return fault
				}
				return nil
			}
			d := s.newDevice(t)
			if n, _ := s.update(t, d, "new"); n > s.size("new")*3/2 || spans.Load() > at+1 {
				t.Errorf("%v at span %d: fetched %d bytes, %d spans", fault, at, n, spans.Load())
			}
			if rec, _ := d.peek(); rec.Last.Saved != 0 {
				t.Errorf("%v: saved %d", fault, rec.Last.Saved)
			}
			s.how = "only"
			d, before := s.newDevice(t), server.n.Load()
			if err := d.boot(); err != nil {
				t.Fatal(err)
			}
			spans.Store(0)
			if _, err := d.life(s.artifacts["new"], "new"); !errors.Is(err, fault) && err == nil {
				t.Errorf("only: got %v, want %v", err, fault)
			}
			if got := server.n.Load() - before; got > s.size("new")/2 {
				t.Errorf("only: %d bytes fetched", got)
			}
		}
	}
}

// A span that brings other bytes than the artifact has.
func TestDeltaOfDamagedSpans(t *testing.T) {
	t.Parallel()
	s := newDeltaSetup(t)
	server := s.servers[s.artifacts["new"]]
	var mu sync.Mutex
	left := 1
	server.corrupt = func(off int64, p []byte) {
		mu.Lock()
		defer mu.Unlock()
		if left > 0 && off > 100000 && len(p) > 10 {
			left--
			p[5] ^= 4
		}
	}
	s.update(t, s.newDevice(t), "new")
	if left != 0 {
		t.Error("nothing was damaged")
	}
}

// only refuses what has no index, or too little in common, before anything is changed.
func TestDeltaOnly(t *testing.T) {
	t.Parallel()
	old := simImage(1, 100000)
	s := newDeltaSetupOf(t, map[string][]byte{"old": old, "far": simImage(9, 100000), "near": append([]byte("x"), old...)},
		nil)
	plain := filepath.Join(s.dir, "plain.mender")
	if err := os.WriteFile(plain, simArtifact(t, "plain", "gzip", old), 0o644); err != nil {
		t.Fatal(err)
	}
	s.servers["http://sim/plain"] = &spanServer{name: plain}
	s.how = "only"
	d := s.newDevice(t)
	if err := d.boot(); err != nil {
		t.Fatal(err)
	}
	for url, want := range map[string]string{"http://sim/plain": "it has no index",
		"http://sim/far": "are not on the device"} {
		err := standalone{d.start()}.install(t.Context(), url)
		if exitCode(err) != exitRefused || !strings.Contains(err.Error(), want) || hintOf(err) == "" {
			t.Errorf("%s: got %v, hint %q, want a refusal: %s", url, err, hintOf(err), want)
		}
		if rec, _ := d.peek(); rec.Update != nil || rec.Last != nil {
			t.Errorf("%s: the journal has %+v", url, rec)
		}
		if n := s.servers[url].n.Load(); n > 50000 {
			t.Errorf("%s: %d bytes fetched", url, n)
		}
	}
	if n, _ := s.update(t, d, "near"); n > 60000 {
		t.Errorf("fetched %d bytes", n)
	}
	// A file costs nothing.
	d = s.newDevice(t)
	if err := (standalone{d.start()}).install(t.Context(), plain); err != nil {
		t.Error(err)
	}
	s.how = "onyl"
	if err := (standalone{s.newDevice(t).start()}).install(t.Context(), "http://sim/near"); exitCode(err) != exitRefused {
		t.Errorf("Delta %q: got %v, want a refusal", s.how, err)
	}
}

// An image that is in the idle slot already is not fetched, and the running slot not looked through.
func TestDeltaOfImageThatIsThere(t *testing.T) {
	t.Parallel()
	s := newDeltaSetup(t)
	d := s.newDevice(t)
	p3 := d.w.files[filepath.Join(d.dir, "p3")]
	copy(p3.current, s.images["new"])
	copy(p3.durable, s.images["new"])
	d.w.blind = func(_ int, f *simFile, off int64) error {
		if f.name == "p2" && off >= 0 {
			t.Error("the running slot is read")
		}
		return nil
	}
	if n, spans := s.update(t, d, "new"); n > 20000 || spans > 0 {
		t.Errorf("fetched %d bytes in %d spans", n, spans)
	}
	if readFileOrNil(filepath.Join(d.app.c.paths.ds, "mendlet.index.3")) == nil {
		t.Error("its index is not kept")
	}
}

// The whole program, and a web server: what plan says before, status after, and what the server was asked for.
func TestDeltaOverHTTP(t *testing.T) {
	t.Parallel()
	old := simImage(1, 700000)
	image := slices.Concat(old[:200000], []byte("some bytes more"), old[200000:500000], simImage(2, 30000), old[500000:])
	b := newImageBoard(t)
	slot := make([]byte, 1<<20)
	copy(slot, old)
	writeFile(t, b.a, string(slot))
	for i := range slot {
		slot[i] ^= 0x55
	}
	writeFile(t, b.b, string(slot))
	data := readFileOrNil(b.pack(t, "new", image, "--compression", "gzip", "--delta=16k"))
	var sent, requests atomic.Int64
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		w.Header().Set("ETag", `"one"`)
		http.ServeContent(&sentCounter{w, &sent}, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer site.Close()
	url := site.URL + "/new.mender"

	out, _ := b.must(t, exitOK, "plan", "--json", url)
	var plan struct {
		Delta deltaCost `json:"delta"`
	}
	if err := json.Unmarshal([]byte(out), &plan); err != nil {
		t.Fatal(err)
	}
	if c := plan.Delta; c.Fetch == 0 || c.Fetch > int64(len(data))/3 || c.Running < 500000 || c.Requests < 1 {
		t.Errorf("plan: %+v", c)
	}
	if out, _ := b.must(t, exitOK, "plan", url); !strings.Contains(out, "known by looking through it") {
		t.Errorf("plan says %s", out)
	}
	if _, err := os.Stat(filepath.Join(b.dir, "ds/mendlet.index.3.new")); err == nil {
		t.Error("plan has written to the datastore")
	}
	sent.Store(0)
	requests.Store(0)
	_, errs := b.must(t, exitOK, "install", "--delta=only", url)
	b.slotHolds(t, b.b, image)
	t.Logf("%d bytes of %d in %d requests, planned were %d in %d\n%s", sent.Load(), len(data), requests.Load(),
		plan.Delta.Fetch, plan.Delta.Requests+1, errs)
	if n := sent.Load(); n > int64(len(data))/2 {
		t.Errorf("%d bytes of %d were sent", n, len(data))
	}
	if !strings.Contains(errs, "saved") {
		t.Errorf("nothing is said to be saved: %s", errs)
	}
	b.reboot(t)
	b.must(t, exitOK, "commit")
	sent.Store(0)
	b.must(t, exitOK, "plan", url)
	if n := sent.Load(); n > 30000 { // header and index, as there is an index that tells of such artifacts
		t.Errorf("%d bytes were sent for a header and an index", n)
	}
	var status report
	out, _ = b.must(t, exitOK, "status", "--json")
	if err := json.Unmarshal([]byte(out), &status); err != nil || status.Last.Saved < int64(len(data))/2 {
		t.Errorf("status: %v, %+v", err, status.Last)
	}
	// The same again is there but for what the other slot lacks.
	if code, _, errs := b.do(t, "", "install", "--delta=only", url); code != exitOK {
		t.Errorf("only: exit %d: %s", code, errs)
	}
	if code, _, _ := b.do(t, "", "install", "--delta=some", url); code != exitUsage {
		t.Errorf("--delta=some: exit %d, want %d", code, exitUsage)
	}
}

// sentCounter adds up what is sent.
type sentCounter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *sentCounter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// Index and plan of an image of 1 GiB take at most 1 MiB, wherever one looks.
func TestDeltaMemory(t *testing.T) {
	x := &deltaIndex{average: defaultAverage, imageSize: 1 << 30, head: 100}
	for left := int64(1 << 30); left > 0; {
		c := chunk{sum: rand.Uint64() | 1, size: uint32(min(defaultAverage, left)), stored: 12345}
		x.chunks, left = append(x.chunks, c), left-int64(c.size)
	}
	raw := x.encode()
	info := x.info(raw)
	x = nil
	live := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := live()
	y, err := parseDeltaIndex(raw, info, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	parsed := live() - before + int64(len(raw)) // which is still there then
	before, raw = before-int64(len(raw)), nil
	p := newDeltaPlan(y)
	planned := live() - before
	p.settle(0)
	settled := live() - before
	t.Logf("%d chunks: %d bytes parsed, %d while sources are looked through, %d then", len(y.chunks), parsed, planned,
		settled)
	if max(parsed, planned, settled) > 1<<20 {
		t.Errorf("more than 1 MiB")
	}
	runtime.KeepAlive(p)
}

// Killed at its system calls an install of a delta goes on, and ends with the image in its slot.
func TestKilledInDelta(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("needs strace")
	}
	onlyExhaustive(t, "hundreds of runs under strace")
	program := filepath.Join(t.TempDir(), "mendlet")
	build := exec.Command("go", "build", "-tags", "nethttpomithttp2", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	old := simImage(1, 700000)
	image := slices.Concat(old[:200000], []byte("some bytes more"), old[200000:500000], simImage(2, 30000), old[500000:])
	start := newImageBoard(t)
	writeFile(t, start.a, string(append(old, make([]byte, 1<<20-len(old))...)))
	data := readFileOrNil(start.pack(t, "new", image, "--compression", "gzip", "--delta=16k"))
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"one"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer site.Close()
	points := 0
	for _, call := range []string{"pwrite64", "fdatasync", "fsync", "renameat", "unlinkat", "fchmod"} {
		for n := 1; killDeltaAt(t, start, program, site.URL+"/new.mender", image, call, n); n++ {
			points++
		}
	}
	t.Logf("killed at %d places", points)
	if points < 20 {
		t.Errorf("killed at %d places only", points)
	}
}

// killDeltaAt reports false when the install ended before the nth such call.
func killDeltaAt(t *testing.T, start *imageBoard, program, url string, image []byte, call string, n int) bool {
	dir := fastDir(t)
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, os.DirFS(start.dir)); err != nil {
		t.Fatal(err)
	}
	b := *start
	b.dir, b.a, b.b = dir, filepath.Join(dir, "p2"), filepath.Join(dir, "p3")
	env := filepath.Join(dir, "env")
	writeFile(t, filepath.Join(dir, "fw_env.config"),
		fmt.Sprintf("%s 0 %x\n%s %d %x\n", env, boardEnvSize, env, boardEnvSize, boardEnvSize))
	run := func(trace []string, words ...string) (int, string) {
		line := append(append(trace, program), b.args(t, words...)[1:]...)
		cmd := exec.Command(line[0], line[1:]...)
		cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "MENDER_CONF_DIR="+dir+"/conf", "MENDER_DATA_DIR="+dir+"/data")
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), string(out)
	}
	code, log := run(inject(call, n), "install", url)
	if code == exitOK {
		return false
	}
	waits := func() bool {
		rec, err := peekJournal(filepath.Join(dir, "ds"), nil)
		if err != nil {
			t.Fatal(err)
		}
		return rec.Update != nil && rec.Update.Step == stepCommitWait
	}
	for try := 0; try < 4 && !waits(); try++ {
		word := [][]string{{"resume"}, {"install", url}}[try%2]
		code, out := run(nil, word...)
		log += fmt.Sprintf("%v: %d\n%s", word, code, out)
	}
	if !waits() || b.env(t)[varUpgrade] != "1" {
		t.Fatalf("killed at %s %d: %s", call, n, log)
	}
	b.slotHolds(t, b.b, image)
	return true
}

// An index that says anything at all that can be parsed, of an artifact that is good: the device ends with its image.
func FuzzDeltaInstall(f *testing.F) {
	f.Add([]byte{3, 0, 1, 0, 4, 0, 255, 0}, int8(0))
	f.Add([]byte{5, 1, 7, 0, 6, 1, 249, 255}, int8(0))
	f.Add([]byte{2, 2, 9, 0, 7, 3, 0, 0, 9, 2, 1, 1}, int8(1))
	s := newDeltaSetup(f)
	f.Fuzz(func(t *testing.T, change []byte, head int8) {
		ok := true
		lie := func(x *deltaIndex) {
			before := *x
			before.chunks = slices.Clone(x.chunks)
			for p := change; len(p) >= 4; p = p[4:] {
				c := &x.chunks[int(p[0])%len(x.chunks)]
				n := uint32(int32(int16(uint16(p[2]) | uint16(p[3])<<8)))
				switch p[1] % 4 {
				case 0:
					c.stored += n
				case 1:
					c.size += n
				case 2:
					c.sum += uint64(n)
				case 3:
					c.sum = 0
				}
			}
			x.head += int64(head)
			raw := x.encode()
			if _, err := parseDeltaIndex(raw, x.info(raw), x.imageSize); err != nil {
				ok, *x = false, before
			}
		}
		d := s.newDevice(t)
		url, path := s.artifacts["new"], filepath.Join(t.TempDir(), "new.mender")
		if err := os.WriteFile(path, deltaArtifact(t, "new", s.images["new"], lie), 0o644); err != nil {
			t.Fatal(err)
		}
		if !ok {
			return
		}
		server := &spanServer{name: path}
		arm := d.arm
		d.arm = func(a *app) {
			arm(a)
			a.urlSource = func(*app, string) *source { return server.source() }
		}
		if err := d.settle(url, "new"); err != nil {
			t.Fatal(err)
		}
		if err := d.endsWell("new"); err != nil {
			t.Fatal(err)
		}
	})
}

// A journal that says anything of how far a delta has come.
func FuzzDeltaCheckpoint(f *testing.F) {
	f.Add(int64(131072), uint32(0), true, int64(0), int64(0))
	f.Add(int64(300000), uint32(1), false, int64(-1), int64(1)<<40)
	f.Add(int64(-5), uint32(0), true, int64(7), int64(512))
	f.Add(int64(1)<<62, uint32(0), false, int64(100000), int64(150000))
	s := newDeltaSetup(f)
	f.Fuzz(func(t *testing.T, offset int64, check uint32, keepCheck bool, file, out int64) {
		d := s.newDevice(t)
		s.cutDelta(t, d, "new", 120000)
		d.journal(func(r *record) {
			c := r.Update.Checkpoint
			c.Offset, c.From.File, c.From.Out = offset, file, out
			if !keepCheck {
				c.Check = check
			}
		})
		if err := d.settle(s.artifacts["new"], "new"); err != nil {
			t.Fatal(err)
		}
		if err := d.endsWell("new"); err != nil {
			t.Fatal(err)
		}
	})
}

// A deployment of a delta: its links expire and its server is asked for new ones, wherever that is; and the slot
// changes while it is read, so that two connections fetch at once.
func TestManagedDelta(t *testing.T) {
	t.Parallel()
	from := newDeltaSetup(t)
	for _, at := range []int{0, 2, 3, 4} { // artifact requests, after which the links expire
		s := newManagedSetup(t)
		s.images = map[string][]byte{"old": from.images["old"], "new": from.images["new"]}
		s.artifacts["new"] = from.servers[from.artifacts["new"]].name
		d, dep := s.device(t, "new")
		d.arm = func(a *app) {
			a.o.write = deltaScale()
			a.c.Delta = "only"
		}
		var mu sync.Mutex
		seen, changed := 0, false
		s.server.setFault(func(route string, _ http.ResponseWriter, _ *http.Request) bool {
			if route != "GET artifact" {
				return false
			}
			mu.Lock()
			defer mu.Unlock()
			if seen++; seen == at {
				s.server.expireLinks()
			}
			if seen == 2 && !changed { // the plan is made
				changed = true
				d.w.mu.Lock()
				f := d.w.files[filepath.Join(d.dir, "p2")]
				f.current[210000] ^= 1
				f.current[280000] ^= 1
				d.w.mu.Unlock()
			}
			return false
		})
		if err := d.settleManaged(s.server.URL, dep.id); err != nil {
			t.Fatal(err)
		}
		if err := d.endsWell("new"); err != nil {
			t.Fatal(err)
		}
		if err := s.told(d, dep, "new"); err != nil {
			t.Error(err)
		}
		size := from.size("new")
		log, _ := s.server.heard()
		s.server.mu.Lock()
		n := s.server.sent
		s.server.mu.Unlock()
		if n > size*9/10 || s.server.count("GET artifact") < 4 {
			t.Errorf("%d of %d bytes were sent: %q", n, size, log)
		}
		inv := s.server.deviceByID(simIdentity).inventory
		got, want := fmt.Sprint(inv["mendlet_delta_saved"]), fmt.Sprint(mustPeek(t, d).Last.Saved)
		if got != want || got == "0" {
			t.Errorf("inventory: mendlet_delta_saved is %s, want %s", got, want)
		}
	}
}

func mustPeek(t *testing.T, d *simDevice) *record {
	t.Helper()
	rec, err := d.peek()
	if err != nil {
		t.Fatal(err)
	}
	return rec
}
