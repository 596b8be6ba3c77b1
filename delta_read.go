// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nodelta

package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// An image that is made of what the device has and of what is fetched. To the slot writer it is one more reader of the
// payload: nothing here writes to a slot, and nothing that is given out is taken on trust.

// deltaHost is what a delta is made with.
type deltaHost struct {
	mode     string // auto, off, only
	ds       string // the datastore
	src      *source
	open     func(path string, how openMode) (storage, error)
	from, to *slot // the one that is not written to, and the one that is
	start    int64 // byte of the image where the writer goes on
	opt      writeOptions
	lg       *logger
}

// delta is an index with the plan that is made of it.
type delta struct {
	deltaHost
	x               *deltaIndex
	info            *deltaInfo
	plan            *deltaPlan // nil: not made yet
	cost            deltaCost
	kept            bool   // the index is in the datastore
	before, heads   int64  // bytes fetched for header and index, and requests
	by              string // how it was found out what the running slot holds
	dataAt, dataEnd int64  // offsets in the artifact of the data member
	tarAt           int64  // offset in the data tar of the image
	ahead           int    // bytes to be fetched ahead
	r               *deltaReader
}

func deltaFlag(fs *flag.FlagSet, how *string) {
	fs.Func("delta", "`HOW` to use what the device has of an image: auto, off or only (never fetch the whole)",
		func(s string) error {
			*how = s
			return checkDelta(s)
		})
}

func checkDelta(mode string) error {
	if !listed([]string{"auto", "off", "only"}, mode) {
		return fmt.Errorf("delta %q: want auto, off or only", mode)
	}
	return nil
}

// openDelta takes the index of an artifact whose image nextFile has just given; nil if there is none to be used. With
// mode only that is refused. From here on the source is closed. An error of it is handed on.
func openDelta(ctx context.Context, a *artifact, h deltaHost) (*delta, error) {
	if err := checkDelta(h.mode); err != nil {
		return nil, refuse("configuration: %w", err)
	}
	if h.mode == "off" || h.src == nil || h.src.span == nil {
		return nil, nil
	}
	d := &delta{deltaHost: h, dataAt: a.dataAt, dataEnd: a.dataEnd, tarAt: a.file.TarOffset, ahead: a.opt.buffer,
		heads: 1}
	why := d.unfit(a)
	if why == nil {
		why = d.takeIndex(a)
	}
	if a.in.failed != nil {
		return nil, a.fail(why)
	}
	if why != nil {
		return nil, d.without(why)
	}
	d.before = a.in.base + int64(a.in.end)
	h.src.close() // it would only send on
	if h.mode == "only" {
		if err := d.makePlan(ctx); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// errNoIndex: an artifact like any other.
var errNoIndex = errors.New("it has no index")

// unfit says why the artifact cannot be had as a delta, as far as that is known without its index.
func (d *delta) unfit(a *artifact) (err error) {
	d.info, err = parseDeltaInfo(a.MetaData)
	switch _, gzip := a.un.(*gunzip); {
	case err != nil:
		return err
	case d.info == nil:
		return errNoIndex
	case !gzip:
		return errors.New("its payload is not compressed with gzip")
	case d.to.ubi:
		return errors.New("the slots are UBI volumes")
	case d.src.whole:
		return errNoRanges
	case d.src.id.Size <= 0:
		return errors.New("the server does not tell its size")
	}
	return nil
}

// without is what comes of an artifact that cannot be had as a delta.
func (d *delta) without(why error) error {
	if d.mode == "only" {
		hint := "make it with mendlet pack --delta"
		if why == errNoRanges {
			hint = "put it on a server that gives ranges"
		}
		return withHint(refuse("the artifact would have to be fetched as a whole: %w", why),
			"%s, or allow that with --delta=auto", hint)
	}
	if !errors.Is(why, errNoIndex) {
		d.lg.warnf("the image is fetched as a whole: %v", why)
	}
	return nil
}

// takeIndex gets the index: the one that an interrupted run has kept, or from the artifact, of which nothing is lost if
// it is no good.
func (d *delta) takeIndex(a *artifact) (err error) {
	d.x, err = d.keptIndex(a.file.Size)
	if d.kept = err == nil; !d.kept {
		// Behind the index is what an input may look at before it knows that it ends here.
		d.heads += d.src.want(a.in.offset() + int64(d.info.Members)*deltaMember + d.info.Size + deltaMember)
		d.x, err = a.readIndex(d.info)
		return err
	}
	return a.holdsChunks(d.x)
}

// An index in the datastore has its SHA-256 before it. What a slot holds is only ever found by one, and known by
// hashing.
//
//go:noinline
func indexName(s *slot) string { return fmt.Sprintf("%s%d", indexPrefix, s.num) }

const (
	indexPrefix = "mendlet.index."
	newIndex    = ".new" // of the image that is being written
)

// openKept opens an index in the datastore and gives its SHA-256, behind which it is read on.
func (d *delta) openKept(name string) (f *os.File, sum [sha256.Size]byte, err error) {
	ds, err := openDir(d.ds)
	if err != nil {
		return nil, sum, err
	}
	defer ds.Close()
	if f, err = ds.open(name, os.O_RDONLY, 0); err != nil {
		return nil, sum, err
	}
	_, err = io.ReadFull(f, sum[:])
	return f, sum, err
}

// keptIndex is the one of the artifact, from a run that was interrupted.
func (d *delta) keptIndex(imageSize int64) (*deltaIndex, error) {
	f, _, err := d.openKept(indexName(d.to) + newIndex)
	if f == nil {
		return nil, err
	}
	defer f.Close()
	raw := make([]byte, d.info.Size)
	if _, err := io.ReadFull(f, raw); err != nil {
		return nil, err
	}
	return parseDeltaIndex(raw, d.info, imageSize)
}

// keep puts the index into the datastore, for a run that goes on with this one and for the next update. Without it they
// take longer.
func (d *delta) keep() {
	if d.kept {
		return
	}
	raw := d.x.encode()
	sum := sha256.Sum256(raw)
	ds, err := openDir(d.ds)
	if err == nil {
		err = ds.write(indexName(d.to)+newIndex, append(sum[:], raw...), 0o600)
		ds.Close()
	}
	if d.kept = err == nil; !d.kept {
		d.lg.warnf("the index of the image is not kept: %v", err)
	}
}

// lookUp finds chunks in a slot by the index that was kept when it was written, of which never all is in memory.
func (d *delta) lookUp(s *slot, src deltaSource) error {
	f, want, err := d.openKept(indexName(s))
	if f == nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if err == nil {
		_, err = io.Copy(sum, f)
	}
	if err == nil {
		_, err = f.Seek(sha256.Size, io.SeekStart)
	}
	if err == nil && [sha256.Size]byte(sum.Sum(nil)) != want {
		err = errors.New("SHA-256 is wrong")
	}
	if err != nil {
		return fmt.Errorf("%q: %w", f.Name(), err)
	}
	buf := make([]byte, 16<<10)
	r := indexReader{}
	fill := func() {
		n := copy(buf, r.b)
		m, _ := io.ReadFull(f, buf[n:])
		r.b = buf[:n+m]
	}
	fill()
	r.b = r.b[min(len(deltaMagic), len(r.b)):]
	average, _, count, _ := r.number(maxAverage), r.number(1<<62), r.number(maxDeltaIndex), r.number(1<<62)
	if average != d.x.average {
		return fmt.Errorf("%q has chunks of %d bytes on average, want %d", f.Name(), average, d.x.average)
	}
	at := int64(0)
	for range count {
		if len(r.b) < 64 {
			fill()
		}
		var c chunk
		if r.chunk(&c, average); r.bad {
			break
		}
		d.plan.found(src, c, at)
		at += int64(c.size)
	}
	return nil
}

// deltaSlots reads chunks from both slots.
type deltaSlots struct {
	st   [2]storage
	buf  []byte // room for a chunk, or for several that stand one behind the other
	held deltaSource
	lo   int64 // of what buf holds
	n    int
}

// openSlots leaves out what cannot be opened.
func (d *delta) openSlots() *deltaSlots {
	s := &deltaSlots{buf: alignedBuffer(int(d.x.average)*maxShare + 2*directAlign)}
	for i, one := range []*slot{d.from, d.to} {
		st, err := d.open(one.path, openRead)
		if err != nil {
			d.lg.warnf("slot %s: %v", one, err)
			continue
		}
		if dev, ok := st.(*device); ok { // else a whole image would go through the page cache
			dev.setDirect(true)
		}
		s.st[i] = st
	}
	return s
}

func (s *deltaSlots) close() {
	for _, st := range s.st {
		if st != nil {
			st.Close()
		}
	}
}

// read gives a chunk if it is at offset at of a source, whatever was thought of that; nil: it is not, or cannot be
// read. It is good until the next one is read.
func (s *deltaSlots) read(src deltaSource, at int64, c *chunk) []byte {
	if s.st[src] == nil {
		return nil
	}
	if end := at + int64(c.size); src != s.held || at < s.lo || end > s.lo+int64(s.n) {
		lo := at &^ (directAlign - 1)
		need := min(int(end-lo+directAlign-1)&^(directAlign-1), len(s.buf))
		goesOn := src == s.held && s.n > 0 && lo >= s.lo && lo <= s.lo+int64(s.n)
		s.held, s.lo, s.n = src, lo, 0
		if goesOn {
			s.n, _ = s.st[src].ReadAt(s.buf, lo)
		}
		if end > lo+int64(s.n) { // what is behind the chunk may be what cannot be read
			s.n, _ = s.st[src].ReadAt(s.buf[:need], lo)
		}
		if end > lo+int64(s.n) {
			return nil
		}
	}
	p := s.buf[at-s.lo:][:c.size]
	if chunkSum(p) != c.sum {
		return nil
	}
	return p
}

const (
	scanBlock   = 128 << 10 // bytes that are read of a slot at once while it is looked through
	maxFaults   = 16        // places of a slot that cannot be read, until looking through it ends
	maxSamples  = 32        // chunks that an index is tried by
	maxMisses   = 64        // chunks in a row that an interrupted run has not left
	startHeader = 16 << 10  // bytes of an artifact up to its payload, or more
	oddMax      = 1 << 20   // bytes that one request gets of what has turned out not to be there
)

// makePlan finds out what the slots hold.
func (d *delta) makePlan(ctx context.Context) error {
	if d.plan != nil {
		return nil
	}
	s := d.openSlots()
	defer s.close()
	p := newDeltaPlan(d.x)
	d.plan = p
	d.by = "its index"
	if err := d.lookUp(d.from, fromRunning); err != nil || !d.holds(s, fromRunning) {
		d.lg.debugf("slot %s is looked through: %v", d.from.letter, err)
		p.forget(fromRunning)
		d.by = "looking through it"
		if err := d.scan(ctx, s.st[fromRunning]); err != nil {
			return err
		}
	}
	if err := d.lookUp(d.to, fromIdle); err != nil || !d.holds(s, fromIdle) {
		d.lg.debugf("slot %s has nothing of use: %v", d.to.letter, err)
		p.forget(fromIdle)
	}
	p.settle(d.start)
	d.probe(s)
	gap := cmp.Or(d.opt.gap, gapUnknown)
	var whole bool
	if d.cost, whole = p.decide(gap); whole {
		why := fmt.Errorf("%s of %s are not on the device", mega(d.cost.Fetch), mega(d.cost.Whole))
		if err := d.without(why); err != nil {
			return err
		}
		p.whole = true
		d.cost = p.cost(gap)
	}
	return nil
}

// String says what is fetched, and from where the rest comes.
func (d *delta) String() string {
	c := &d.cost
	return fmt.Sprintf("delta: %s of %s are fetched, in %d requests; %s of the image are in slot %s (known by %s), "+
		"%s in slot %s, %s are zeros", mega(c.Fetch), mega(c.Whole), int64(c.Requests)+d.heads, mega(c.Running),
		d.from.letter, d.by, mega(c.Idle), d.to.letter, mega(c.Zeros))
}

// figures are what a program is told of it.
func (d *delta) figures() any { return &d.cost }

// holds tries by samples whether a slot has what its index says, as far as nothing has been written since.
func (d *delta) holds(s *deltaSlots, src deltaSource) bool {
	var all, good, bad int
	from := int64(0)
	if src == fromIdle {
		from = max(d.start, d.opt.head)
	}
	for step := range 2 { // they are counted, and then some are tried
		n := 0
		for i := range d.x.chunks {
			is, at, ok := d.plan.source(i)
			if !ok || is != src || at < from {
				continue
			}
			if n++; step > 0 && n%max(all/maxSamples, 1) == 0 {
				if s.read(src, at, &d.x.chunks[i]) != nil {
					good++
				} else {
					bad++
				}
			}
		}
		all = n
	}
	return good > 0 && good >= 8*bad
}

// scan looks through the running slot, as far as an image of about this size goes.
func (d *delta) scan(ctx context.Context, st storage) error {
	if st == nil {
		return nil
	}
	w := &slotWriter{dst: st, name: d.from.String(), opt: d.opt}
	w.opt.block = min(w.opt.block, scanBlock)
	s, size := newDeltaScan(d.plan, fromRunning), min(st.Size(), d.x.imageSize/4*5)
	for off, faults := int64(0), 0; off < size && faults < maxFaults; faults++ {
		err := w.hashSlot(ctx, phaseScan, s, off, size)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err == nil {
			break
		}
		d.lg.warnf("%v", err)
		off = s.at + int64(len(s.buf)) + w.opt.block
		s.jump(off)
	}
	s.end()
	return nil
}

// probe finds what an interrupted run has put in place: up to the writer's offset all of it, and behind that what got
// there since that was journaled.
func (d *delta) probe(s *deltaSlots) {
	pos, misses := int64(0), 0
	for i := range d.x.chunks {
		c := &d.x.chunks[i]
		if d.plan.missing(i) && pos >= d.opt.head {
			if pos+int64(c.size) <= d.start || misses < maxMisses && s.read(fromIdle, pos, c) != nil {
				d.plan.from[i] = pos<<1 | int64(fromIdle)
				misses = 0
			} else {
				misses++
			}
		}
		pos += int64(c.size)
	}
}

// begin puts the delta in the place of what would unpack the payload. The datastore gets its index.
func (d *delta) begin(ctx context.Context, a *artifact) error {
	d.keep()
	z := &deltaReader{delta: d, deltaSlots: d.openSlots(), room: make([]byte, d.x.average*maxShare)}
	z.ctx, z.stop = context.WithCancel(ctx)
	z.in = newInput(readFunc(z.receive), d.dataAt, max(d.ahead/4, 1<<10))
	var err error
	z.g, err = newGunzip(nil, restartPoint{Fresh: true}, nil)
	d.r = z
	d.enter(a, 0, d.x.imageSize)
	return err
}

// enter goes on at byte off of the image, and gives where the chunk begins in which that is. What is needed from limit
// on is not fetched.
func (d *delta) enter(a *artifact, off, limit int64) (start int64) {
	d.r.seek(off, limit)
	a.unpackWith(d.r.in, d.r, d.tarAt+off)
	return d.r.pos
}

// follow takes the bytes of the image before what enter gave, as many as there are or a window of them: what is fetched
// may refer to them.
func (d *delta) follow(window []byte) { d.r.g.inflate.follow(window) }

// close ends what is under way. The reader may still be being read.
func (d *delta) close() {
	if d.r != nil {
		d.r.stop()
		d.r.deltaSlots.close()
	}
}

// done: the image is in its slot, and so is what the index says.
func (d *delta) done() {
	if !d.kept {
		forgetIndex(d.ds, d.to)
		return
	}
	ds, err := openDir(d.ds)
	if err == nil {
		defer ds.Close()
		if err = ds.rename(indexName(d.to)+newIndex, indexName(d.to)); err == nil {
			err = ds.sync()
		}
	}
	if err != nil {
		d.lg.warnf("the index of the image is not kept: %v", err)
	}
}

// forgetIndex drops what was kept of a slot that is about to hold something else. What stays is found out to be wrong.
func forgetIndex(path string, s *slot) {
	if ds, err := openDir(path); err == nil {
		ds.remove(indexName(s))
		ds.remove(indexName(s) + newIndex)
		ds.Close()
	}
}

// deltaStart is how many bytes of an artifact are to be asked for at first, where it is likely to be had as a delta, as
// the one before was: up to its payload; 0: it is not likely. How long its index is stands in there.
func deltaStart(mode, ds string) int64 {
	if mode == "off" {
		return 0
	}
	if mode == "only" {
		return startHeader
	}
	d, err := openDir(ds)
	if err != nil {
		return 0
	}
	defer d.Close()
	names, _ := d.names()
	for _, name := range names {
		if strings.HasPrefix(name, indexPrefix) {
			return startHeader
		}
	}
	return 0
}

// saved is how many stored bytes have not been fetched so far; fetched is how many have, and requests in how many.
func (d *delta) saved() int64 { return d.r.local.Load() }

func (d *delta) fetched() (n, requests int64) {
	return d.before + d.r.fetched.Load(), d.heads + d.r.requests.Load()
}

// deltaReader gives the bytes of the data tar, from the image's first on: an unpacker.
type deltaReader struct {
	*delta
	*deltaSlots
	ctx  context.Context
	stop func()

	i, limit int   // the next chunk, and the first one that is not wanted
	pos, off int64 // of chunk i, in the image and in the data member
	skip     int64 // bytes of chunk i that are not wanted
	rest     []byte
	room     []byte // for a chunk that is in no slot
	latest   restartPoint
	err      error

	g      *gunzip // of what is behind the chunks, when it has an input; its inflater is that of the chunks, too
	run    deltaRun
	runs   *deltaRuns // nil: not begun
	in     *input     // reads them
	odd    spanReader // for what turns out not to be where it should
	oddIn  *input
	oddEnd int // the chunk behind those that come from it

	local, fetched, requests atomic.Int64
}

func (z *deltaReader) Read(p []byte) (int, error) {
	for z.err == nil && len(z.rest) == 0 {
		if z.i == len(z.x.chunks) {
			return z.tail(p)
		}
		z.err = z.next()
	}
	if z.err != nil {
		return 0, z.err
	}
	n := copy(p, z.rest)
	z.rest = z.rest[n:]
	return n, nil
}

func (z *deltaReader) latestRestart() (restartPoint, bool) { return z.latest, z.latest.Kind != "" }

// seek goes to byte off of the image, which is at most its size.
func (z *deltaReader) seek(off, limit int64) {
	z.runs.end()
	z.runs, z.run, z.oddEnd, z.rest = nil, deltaRun{}, 0, nil
	z.i, z.pos, z.off, z.limit = 0, 0, z.x.first, len(z.x.chunks)+1
	at := int64(0)
	for i := range z.x.chunks {
		if at >= limit && limit < z.x.imageSize {
			z.limit = i
			break
		}
		c := &z.x.chunks[i]
		if at += int64(c.size); at <= off {
			z.i, z.pos, z.off = i+1, at, z.off+int64(c.stored)
		}
	}
	z.skip = off - z.pos
	z.g.inflate.reset() // what it has is not what comes before
}

// next gets chunk i.
func (z *deltaReader) next() error {
	c := &z.x.chunks[z.i]
	data, fetched, err := z.chunk(c)
	if err != nil {
		return err
	}
	if !fetched {
		z.local.Add(int64(c.stored))
		z.g.inflate.follow(data)
	}
	z.latest = restartPoint{Kind: "gzip", File: z.dataAt + z.off, Out: z.tarAt + z.pos}
	z.rest, z.skip = data[z.skip:], 0
	z.i, z.pos, z.off = z.i+1, z.pos+int64(c.size), z.off+int64(c.stored)
	return nil
}

// chunk gives chunk i, c, from wherever it is to be had; fetched: not from the device.
func (z *deltaReader) chunk(c *chunk) (data []byte, fetched bool, err error) {
	in := z.in
	switch {
	case z.i < z.oddEnd:
		in = z.oddIn
	case z.i >= z.run.first && z.i < z.run.end:
	case z.plan == nil && !c.zero():
		// An image that is all there needs no plan: its head tells.
		if data = z.read(fromIdle, z.pos, c); data != nil {
			return data, false, nil
		}
		if err = z.makePlan(z.ctx); err == nil {
			return z.chunk(c)
		}
	case z.plan != nil && z.plan.missing(z.i):
		err = z.nextRun()
	case c.zero():
		data = z.room[:c.size]
		clear(data)
		return data, false, nil
	default:
		src, at, _ := z.plan.source(z.i)
		if data = z.read(src, at, c); data != nil {
			return data, false, nil
		}
		err = z.fetchOdd(c)
		in = z.oddIn
	}
	if err == nil {
		data, err = z.unpack(in, c)
	}
	return data, true, err
}

// unpack gets chunk i out of what is fetched. It has to be where and what the index says.
func (z *deltaReader) unpack(in *input, c *chunk) ([]byte, error) {
	begun, data := in.offset(), z.room[:c.size]
	err := z.g.inflate.segment(in, data, int64(c.stored))
	if err != nil && err != errDeflate {
		return nil, err
	}
	if err != nil || begun != z.dataAt+z.off || chunkSum(data) != c.sum {
		return nil, fmt.Errorf("delta index: chunk %d at byte %d of the image is not what is stored at %d", z.i, z.pos, begun)
	}
	return data, nil
}

// nextRun waits for the run that begins with chunk i.
func (z *deltaReader) nextRun() error {
	if z.runs == nil {
		z.runs = z.startRuns(z.i, z.limit, z.off)
	}
	p := <-z.runs.pieces
	switch {
	case p.err != nil:
		return p.err
	case z.ctx.Err() != nil:
		return context.Cause(z.ctx)
	}
	if p.run == nil || p.run.first != z.i {
		return fmt.Errorf("delta: got %+v, want the run of chunk %d", p.run, z.i)
	}
	z.run = *p.run
	z.in.jump(z.dataAt + z.run.off)
	z.in.section(z.run.upto - z.run.off)
	if z.run.end > len(z.x.chunks) {
		z.in.section(z.dataEnd - z.in.offset())
	}
	return nil
}

// tail is what stands behind the chunks.
func (z *deltaReader) tail(p []byte) (n int, err error) {
	if z.run.end <= z.i {
		err = z.nextRun()
	}
	if err == nil && z.g.in == nil {
		z.g.in, z.g.inflate.in = z.in, z.in
		err = z.in.skip(imageTail)
	}
	if err == nil {
		n, err = z.g.Read(p)
	}
	z.err = err
	return n, err
}

// receive gives what the runs fetch; of one run only, as in is fenced in to it until the next one begins.
func (z *deltaReader) receive(p []byte) (int, error) {
	r := z.runs
	for len(r.data) == 0 {
		if r.buf != nil {
			r.free <- r.buf
			r.buf = nil
		}
		piece, more := <-r.pieces
		if !more {
			return 0, io.EOF
		}
		if piece.run != nil {
			return 0, io.ErrUnexpectedEOF
		}
		if piece.err != nil {
			return 0, piece.err
		}
		r.data, r.buf = piece.data, piece.data[:cap(piece.data)]
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

// fetchOdd asks for chunk i, which is not where it should be, and for those behind it of which the same holds: what
// changes in a mounted file system often stands together.
func (z *deltaReader) fetchOdd(c *chunk) (err error) {
	end, upto := z.i+1, z.off+int64(c.stored)
	for ; end < len(z.x.chunks) && upto-z.off < oddMax && !z.plan.missing(end); end++ {
		next := &z.x.chunks[end]
		src, at, ok := z.plan.source(end)
		if !ok || z.read(src, at, next) != nil {
			break
		}
		upto += int64(next.stored)
	}
	z.lg.debugf("chunk %d at byte %d of the image, and %d behind it, are not where they were", z.i, z.pos, end-z.i-1)
	if z.odd == nil {
		if z.odd, err = z.src.span(z.ctx, z.src.id); err != nil {
			return err
		}
	}
	z.requests.Add(1)
	if err := z.odd.span(z.dataAt+z.off, z.dataAt+upto); err != nil {
		return err
	}
	z.oddIn = newInput(readFunc(func(p []byte) (int, error) {
		n, err := z.odd.Read(p)
		z.fetched.Add(int64(n))
		return n, err
	}), z.dataAt+z.off, max(z.ahead/8, 1<<10))
	z.oddIn.section(upto - z.off)
	z.oddEnd = end
	return nil
}

// Runs that are joined have at most so many bytes between them as come in a part of the time that a request takes: as
// many as come in all of it make an update of kernel and all 8 % larger, and 6 % faster (make bench-delta).
const minGap, maxGap, gapPart = 4 << 10, 1 << 20, 4

const aheadPieces = 16

// deltaRuns fetches run after run of a plan, ahead of the one who takes them, as far as there is room: so the next
// request is under way while what came before is unpacked and written.
type deltaRuns struct {
	pieces chan deltaPiece
	free   chan []byte
	stop   func()
	data   []byte // what is left of the piece that is being read
	buf    []byte // the one that it is in
}

// deltaPiece is the start of a run, some of its data, or an error, after which there is no more.
type deltaPiece struct {
	run  *deltaRun
	data []byte
	err  error
}

// startRuns fetches what is missing of chunks i up to limit; the member of chunk i is at off.
func (z *deltaReader) startRuns(i, limit int, off int64) *deltaRuns {
	ctx, stop := context.WithCancel(z.ctx)
	r := &deltaRuns{pieces: make(chan deltaPiece, 2*aheadPieces), free: make(chan []byte, aheadPieces), stop: stop}
	for range aheadPieces {
		r.free <- make([]byte, max(z.ahead/2/aheadPieces, 512))
	}
	id := z.src.id
	go func() {
		defer close(r.pieces)
		if err := z.fetchRuns(ctx, r, id, i, limit, off); err != nil {
			r.send(ctx, deltaPiece{err: err})
		}
	}()
	return r
}

// send reports false when nobody takes pieces any more.
//
//go:noinline
func (r *deltaRuns) send(ctx context.Context, p deltaPiece) bool {
	select {
	case r.pieces <- p:
		return true
	case <-ctx.Done():
		return false
	}
}

// end stops fetching; r may be nil.
func (r *deltaRuns) end() {
	if r != nil {
		r.stop()
		for range r.pieces {
		}
	}
}

func (z *deltaReader) fetchRuns(ctx context.Context, r *deltaRuns, id sourceID, i, limit int, off int64) error {
	in, err := z.src.span(ctx, id)
	if err != nil {
		return err
	}
	defer in.Close()
	line := lineSpeed{gap: gapUnknown}
	for {
		run, ok := z.plan.run(i, limit, off, cmp.Or(z.opt.gap, line.gap))
		if !ok || !r.send(ctx, deltaPiece{run: &run}) {
			return nil
		}
		upto := z.dataAt + run.upto
		if run.end > len(z.x.chunks) { // up to the end of the artifact
			upto = id.Size
		}
		z.requests.Add(1)
		begun := time.Now()
		if err := in.span(z.dataAt+run.off, upto); err != nil {
			return err
		}
		line.answered(time.Since(begun))
		if err := z.fetchRun(ctx, r, in, upto-z.dataAt-run.off, &line); err != nil {
			return err
		}
		i, off = run.end, run.upto
	}
}

// fetchRun hands on the n bytes of a run.
func (z *deltaReader) fetchRun(ctx context.Context, r *deltaRuns, in io.Reader, n int64, line *lineSpeed) error {
	var took time.Duration
	waited := false // for room, and so the data for us
	size := n
	for n > 0 {
		var buf []byte
		select {
		case buf = <-r.free:
		default:
			waited = true
			select {
			case buf = <-r.free:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		begun := time.Now()
		got, err := in.Read(buf)
		took += time.Since(begun)
		z.fetched.Add(int64(got))
		n -= int64(got)
		if err != nil && (err != io.EOF || n > 0) {
			return noEOF(err)
		}
		if !r.send(ctx, deltaPiece{data: buf[:got]}) {
			return context.Cause(ctx)
		}
	}
	if !waited {
		line.came(size, took)
	}
	return nil
}

// lineSpeed measures what a request costs on this line.
type lineSpeed struct {
	trips int           // answers to requests
	trip  time.Duration // from a request to its answer, on a connection that was there
	rate  float64       // bytes a second
	gap   int64         // bytes that come in gapPart of the time of a trip
}

func (l *lineSpeed) answered(d time.Duration) {
	if l.trips++; l.trips == 2 || l.trips > 2 && d < l.trip { // the first one has made the connection
		l.trip = d
	}
}

// came takes down n bytes. What is little has come with the answer.
func (l *lineSpeed) came(n int64, d time.Duration) {
	if n < 64<<10 || d <= 0 {
		return
	}
	if l.rate = float64(n) / d.Seconds(); l.trips > 1 {
		l.gap = int64(min(max(l.rate*l.trip.Seconds()/gapPart, minGap), maxGap))
	}
}
