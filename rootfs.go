// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
)

// rootfs is the payload handler of type rootfs-image: an image for the idle slot.
type rootfs struct {
	c        *config
	m        *machine
	u        *update
	lg       *logger
	opt      writeOptions
	src      *source      // of the artifact; nil: cannot be read again
	how      string       // to use what the device has of an image: auto, off, only
	delta    *delta       // nil: the image is fetched as a whole
	saved    int64        // bytes that earlier runs of it had no need to fetch
	save     func() error // journals r.u
	file     *payloadFile // the image, once prepare has seen its size
	to       *slot
	capacity int64 // of to, in bytes; 0: not known
}

func (r *rootfs) resumable() bool { return true }

// openEnv opens the boot environment of a machine.
func openEnv(c *config, m *machine, lg *logger) (bootEnv, error) {
	return openBootEnv(c, &envHost{open: m.open, resolve: m.resolveDevice, root: m.root, sleep: m.sleep, lg: lg})
}

// survey reads the boot environment and finds the slots. Where it is not known which of them runs, they
// come with the error.
func (r *rootfs) survey(ctx context.Context) (bootEnv, map[string]string, *slots, error) {
	env, err := openEnv(r.c, r.m, r.lg)
	if err != nil {
		return nil, nil, nil, err
	}
	vars, err := env.vars(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	s, err := findSlots(r.c, r.m, vars)
	return env, vars, s, err
}

// undecided makes an error one of try later that came before anything was written: it says nothing of the
// update, and may be mended.
func undecided(err error) error {
	var touched *envChangeError
	if err == nil || errors.As(err, &touched) || isTemporary(err) {
		return err
	}
	return tryLater("nothing was written: %w", err)
}

// checkBootEnv refuses what an install must not start on.
func checkBootEnv(vars map[string]string) error {
	if vars[varCanaryCheck] == "1" && vars[varCanary] != "1" {
		return withHint(refuse("%s is 1 but %s is not: the bootloader has never saved its environment", varCanaryCheck,
			varCanary),
			"the bootloader integration is broken: it reads its environment from elsewhere, or cannot write it")
	}
	if v := vars[varUpgrade]; v != "" && v != "0" {
		return withHint(refuse("%s is already %q in the boot environment: another update waits for its verdict", varUpgrade,
			v),
			"commit it, roll it back or, if no updater knows of it, set %s=0", varUpgrade)
	}
	return nil
}

func (r *rootfs) prepare(ctx context.Context, a *artifact) error {
	env, vars, s, err := r.survey(ctx)
	if err != nil {
		return err
	}
	for err := range r.refusals(ctx, a, env, vars, s) {
		return err
	}
	r.u.From, r.u.To = s.other(r.to).num, r.to.num
	if r.delta, err = r.openDelta(ctx, a, s); err != nil {
		return err
	}
	return r.warnForgetful()
}

// openDelta finds out whether the image can be made of what is on the device.
func (r *rootfs) openDelta(ctx context.Context, a *artifact, s *slots) (*delta, error) {
	h := deltaHost{mode: r.how, ds: r.c.paths.ds, src: r.src, open: r.m.open, from: s.other(r.to), to: r.to, opt: r.opt,
		lg: r.lg}
	if r.u.WholeImage && h.mode == "auto" {
		h.mode = "off"
	}
	if c := r.u.Checkpoint; c != nil {
		h.start = c.Offset
	}
	return openDelta(ctx, a, h)
}

// refusals are all reasons not to install an image, in the order in which they are looked for. On
// the way they find the target, its size and the image's file.
func (r *rootfs) refusals(ctx context.Context, a *artifact, env bootEnv, vars map[string]string,
	s *slots) iter.Seq[error] {
	return func(yield func(error) bool) {
		fine := func(err error) bool { return err == nil || yield(err) }
		if !fine(checkBootEnv(vars)) || !fine(s.agree(vars)) {
			return
		}
		from := s.byNum(vars[varBootPart])
		if from == nil {
			return
		}
		r.to = s.other(from)
		err := r.m.checkTarget(r.to)
		if !fine(env.check(ctx, tryOnce(r.to.num))) || !fine(err) {
			return
		}
		file, ferr := a.nextFile()
		if ferr != nil {
			yield(fmt.Errorf("payload: %w", ferr))
			return
		}
		if r.file = file; err == nil {
			r.capacity, err = r.checkSize()
			fine(err)
		}
	}
}

// warnForgetful says that the journal will be gone after the boot into the new slot.
func (r *rootfs) warnForgetful() error {
	why, err := forgetful(r.c, r.m)
	if why != "" {
		r.lg.warnf("%s", why)
	}
	return err
}

// forgetful says why the datastore does not outlive a reboot, and what comes of it; "" if nothing speaks
// for that.
func forgetful(c *config, m *machine) (string, error) {
	why, err := m.forgets(filepath.Join(c.paths.ds, journalName))
	if why == "" || err != nil {
		return "", err
	}
	return fmt.Sprintf("the datastore %q may not outlive a reboot: %s. What boots next would know of no update, and "+
		"nothing would commit it; "+
		"put the datastore on a partition that stays (-d, MENDER_DATASTORE_DIR)", c.paths.ds, why), nil
}

// strayTrial explains a boot that waits for a verdict and that the journal, in which no update is, knows
// nothing of; "" if there is none.
func strayTrial(vars map[string]string, s *slots) string {
	up := vars[varUpgrade]
	if up == "" || up == "0" {
		return ""
	}
	to := s.byNum(vars[varBootPart])
	text := fmt.Sprintf("%s is %q in the boot environment, so that the bootloader is trying %s, but the journal knows "+
		"of no update", varUpgrade, up, nameOf(to))
	switch {
	case to == nil:
		return text
	case s.mayRun(to.num):
		return text + fmt.Sprintf(": it may have been lost, or another program installed what runs. At the next boot the "+
			"bootloader goes back to slot %s. "+
			"To keep what runs now: mendlet env set %s=0", s.other(to), varUpgrade)
	}
	return text + fmt.Sprintf(": it may have been lost, or another program installed what is there. The next boot "+
		"tries it. "+
		"To stay with what runs now: mendlet env set %s=%d %s=%x %s=0",
		varBootPart, s.other(to).num, varBootPartHex, s.other(to).num, varUpgrade)
}

// checkSize opens the slot for a moment, which also finds one that is claimed or read-only.
// It returns the size of the slot in bytes.
func (r *rootfs) checkSize() (capacity int64, err error) {
	name := r.to.path
	if r.to.ubi {
		if capacity, err = r.m.ubiCapacity(filepath.Base(name)); err != nil {
			return 0, err
		}
	} else {
		st, err := r.m.open(name, openSlot)
		if err != nil {
			return 0, refuseOpen(r.to, err)
		}
		capacity = st.Size()
		if err := st.Close(); err != nil {
			return 0, fmt.Errorf("slot %s: %w", r.to, err)
		}
	}
	switch {
	case r.file.Size > capacity:
		return capacity, refuse("slot %s is too small: the image has %d bytes, the slot %d: %w",
			r.to, r.file.Size, capacity, syscall.ENOSPC)
	case r.file.Size == 0:
		return capacity, refuse("image %q is empty", r.file.Name)
	}
	return capacity, nil
}

func refuseOpen(t *slot, err error) error {
	switch {
	case errors.Is(err, syscall.EBUSY):
		return withHint(refuse("slot %s is busy: mounted, or claimed by another program", t),
			"see /proc/mounts, dmsetup, mdadm or swapon for what uses it")
	case errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EACCES) && os.Getuid() == 0:
		return refuse("slot %s is read-only", t)
	case errors.Is(err, os.ErrNotExist):
		return refuse("slot %s does not exist", t)
	}
	return refuse("slot %s: %w", t, err)
}

// download writes the image to the idle slot and reads it back.
func (r *rootfs) download(ctx context.Context, a *artifact) error {
	dst, err := r.openTarget()
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	w := &slotWriter{dst: dst, name: r.to.String(), size: r.file.Size, opt: r.opt, sequential: r.to.ubi}
	w.halt = func() {
		stop() // what a delta fetches
		if r.src != nil {
			r.src.halt()
		}
	}
	err = r.fill(ctx, w, a)
	// A device may report a failed write only now (close(2)).
	if cerr := dst.Close(); cerr != nil && err == nil {
		err = fmt.Errorf("closing slot %s: %w", w.name, cerr)
	}
	if err != nil {
		return err
	}
	r.lg.infof("slot %s: %d bytes in place, of which %d written and %d already there, SHA-256 %x", r.to, w.size,
		w.stats.Written, w.stats.Same, r.file.Sum)
	if r.delta != nil {
		n, requests := r.delta.fetched()
		r.lg.infof("delta: %s fetched in %d requests, %s saved", mega(n), requests, mega(r.u.Saved))
	}
	return nil
}

func (r *rootfs) openTarget() (storage, error) {
	var st storage
	var err error
	if r.to.ubi {
		st, err = openUBI(r.to.path, r.file.Size)
	} else {
		st, err = r.m.open(r.to.path, openSlot)
	}
	if err != nil {
		return nil, refuseOpen(r.to, err)
	}
	return st, nil
}

// trimMemory gives back what configuration, certificates and headers left behind, before an image takes
// its memory. Once per process: after that the image's buffers are the peak, and each call costs a collection.
var trimMemory = sync.OnceFunc(debug.FreeOSMemory)

func (r *rootfs) fill(ctx context.Context, w *slotWriter, a *artifact) error {
	trimMemory()
	if r.delta == nil {
		return r.pour(ctx, w, a)
	}
	defer r.delta.close()
	if show := w.opt.progress; show != nil {
		w.opt.progress = func(h headway) {
			h.fetched, _ = r.delta.fetched()
			show(h)
		}
	}
	r.saved = r.u.Saved
	err := r.delta.begin(ctx, a)
	if err == nil {
		err = r.pour(ctx, w, a)
	}
	if r.u.Saved = r.saved + r.delta.saved(); err == nil {
		r.delta.done()
	}
	var fault *deltaFault
	if !errors.As(err, &fault) || ctx.Err() != nil || r.how == "only" {
		return err
	}
	r.u.WholeImage, r.u.Saved = true, 0
	return fmt.Errorf("%w, without a delta: %w", errStartOver, err)
}

// deltaFault is what comes of an index, or of a server, that is not as it says, or of chunks that are not what they are
// taken for. The artifact may be good for all that.
type deltaFault struct{ error }

func (e *deltaFault) Unwrap() error { return e.error }

// blame says so of an error of what is read.
func (r *rootfs) blame(err error) error {
	var target *targetError
	moved := errors.Is(err, errNoRanges) || errors.Is(err, errChanged)
	if err == nil || r.delta == nil || errors.As(err, &target) || errors.Is(err, errAborted) ||
		isTemporary(err) && !moved {
		return err
	}
	return &deltaFault{err}
}

// pour takes the image to the slot.
func (r *rootfs) pour(ctx context.Context, w *slotWriter, a *artifact) error {
	start, err := r.resume(ctx, w, a)
	if err != nil {
		return err
	}
	resumed := start > 0
	if !resumed {
		r.u.Checkpoint = nil
		if there, err := r.begin(ctx, w, a); there || err != nil {
			return err
		}
		start = int64(len(w.head))
	}
	if r.reopenable() && !w.sequential { // a UBI volume is wiped by the kernel when an update begins
		w.checkpoint, w.mark = r.keepCheckpoint, a.latestRestart
	}
	if r.delta != nil {
		if err := r.delta.makePlan(ctx); err != nil {
			return r.blame(err)
		}
		r.lg.infof("%s", r.delta)
	}
	err = r.stream(ctx, w, a, start)
	if err == nil {
		return w.finish()
	}
	var target *targetError
	final := ctx.Err() != nil || isTemporary(err) || errors.Is(err, errAborted) || errors.As(err, &target)
	if !final && (resumed || r.src != nil && r.src.doubtful()) {
		return fmt.Errorf("%w: %w", errStartOver, err)
	}
	return err
}

// reopenable: the artifact can be opened another time.
func (r *rootfs) reopenable() bool { return r.src != nil && !r.src.once }

// begin takes the image's head and makes the slot unbootable; there: all of the image is in the
// slot already, as after an update that was rolled back and is tried again. Then nothing is
// written, and the rest of the artifact is not fetched. Standard input is read to its end
// anyway, for the sake of what writes to it.
func (r *rootfs) begin(ctx context.Context, w *slotWriter, a *artifact) (there bool, err error) {
	if err := w.takeHead(r.file.unhashed()); err != nil {
		return false, r.blame(err)
	}
	if r.reopenable() {
		if there, err = w.alreadyInstalled(ctx, r.file.Sum); err != nil {
			return false, err
		}
	}
	if there {
		r.src.close() // it would only send on
		w.stats.Same = w.size
		r.file.skip()
		return true, onlyFile(a)
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	if r.delta == nil {
		forgetIndex(r.c.paths.ds, r.to)
	}
	return false, w.invalidate()
}

// stream writes the rest of the image and checks all that came, but leaves the slot without
// its head.
func (r *rootfs) stream(ctx context.Context, w *slotWriter, a *artifact, start int64) error {
	if err := w.writeBody(ctx, r.file.unhashed(), start); err != nil {
		return r.blame(err)
	}
	if err := r.file.verify(w.sum()); err != nil {
		return r.blame(err)
	}
	if err := w.verifyReadback(ctx); err != nil {
		return err
	}
	return r.blame(onlyFile(a))
}

// onlyFile wants the artifact to end behind the file that was read.
func onlyFile(a *artifact) error {
	for f, err := range a.files() {
		if err != nil {
			return err
		}
		return fmt.Errorf("a rootfs-image holds exactly one file, got another: %q", f.Name)
	}
	return nil
}

func (r *rootfs) query(ctx context.Context, state string) (string, error) {
	switch state {
	case "SupportsRollback":
		return "Yes", nil
	case "NeedsArtifactReboot":
		// Only where another slot than the running one is to boot next; after a rollback
		// that came before the reboot, or that the bootloader did itself, there is nothing
		// to reboot for. Where neither runs the boot that follows decides.
		_, vars, s, err := r.survey(ctx)
		if s == nil || isTemporary(err) {
			return "", err
		}
		if s.running != nil && strconv.Itoa(s.running.num) == vars[varBootPart] {
			return "No", nil
		}
		return "Automatic", nil
	}
	return "", nil
}

func (r *rootfs) call(ctx context.Context, state string) error {
	switch state {
	case "ArtifactInstall":
		return r.install(ctx)
	case "ArtifactVerifyReboot":
		return r.verify(ctx)
	case "ArtifactCommit":
		return r.commit(ctx)
	case "ArtifactRollback":
		return r.rollback(ctx)
	case "ArtifactVerifyRollbackReboot":
		return r.verifyRollback(ctx)
	}
	return nil
}

// install makes the bootloader try the new slot, in one write.
func (r *rootfs) install(ctx context.Context) error {
	env, vars, s, err := r.survey(ctx)
	if err != nil {
		return err
	}
	if r.switched(vars) { // a power cut fell between the flip and the journal; that boot may have been counted
		return env.set(ctx, append(bootsFrom(r.u.To), envVar{varUpgrade, "1"}))
	}
	if err := checkBootEnv(vars); err != nil {
		return err
	}
	if err := s.agree(vars); err != nil {
		return err
	}
	if vars[varBootPart] != strconv.Itoa(r.u.From) {
		return fmt.Errorf("%s is %q, want %d: the boot environment was changed since the image was written", varBootPart,
			vars[varBootPart], r.u.From)
	}
	return env.set(ctx, tryOnce(r.u.To))
}

// bootsFrom are the variables that name a partition to the bootloader.
func bootsFrom(num int) []envVar {
	return []envVar{{varBootPart, strconv.Itoa(num)}, {varBootPartHex, strconv.FormatInt(int64(num), 16)}}
}

// tryOnce is what makes the bootloader try a partition.
//
//go:noinline
func tryOnce(num int) []envVar {
	return append(bootsFrom(num), envVar{varUpgrade, "1"}, envVar{varBootcount, "0"})
}

// stayWith is what makes the bootloader stay with a partition.
//
//go:noinline
func stayWith(num int) []envVar { return append(bootsFrom(num), envVar{varUpgrade, "0"}) }

// switched tells whether the bootloader is to try the new slot, or has.
func (r *rootfs) switched(vars map[string]string) bool {
	return vars[varUpgrade] == "1" && vars[varBootPart] == strconv.Itoa(r.u.To)
}

// verify checks that the new slot is the one that runs and that the bootloader has not fallen back. An
// environment that cannot be had may be on a file system that is mounted later in the boot.
func (r *rootfs) verify(ctx context.Context) error {
	_, vars, s, err := r.survey(ctx)
	if errors.Is(err, errNotThere) {
		return undecided(err)
	}
	if err != nil {
		return err
	}
	return r.isTrial(vars, s)
}

// isTrial is nil in the trial boot of this update.
func (r *rootfs) isTrial(vars map[string]string, s *slots) error {
	to := strconv.Itoa(r.u.To)
	switch {
	case vars[varBootPart] != to || vars[varUpgrade] != "1":
		return fmt.Errorf("upgrade failed and was reverted: %s is %s and %s is %q, want %s and 1",
			varBootPart, vars[varBootPart], varUpgrade, vars[varUpgrade], to)
	case s.running != nil && s.running.num != r.u.To:
		return withHint(fmt.Errorf("%w: slot %s runs, want %s", errNotRebooted, s.running, nameOf(s.byNum(to))),
			"reboot first")
	case !s.mayRun(r.u.To):
		return withHint(fmt.Errorf("%w: the kernel was started for slot %s, want %s",
			errNotRebooted, s.started, nameOf(s.byNum(to))),
			"reboot first, or say --running if that is not so")
	}
	return nil
}

// commit keeps the new slot. The change may be there already, when a power cut fell between it and the
// journal; it cannot be a bootloader that fell back: that one also changes mender_boot_part.
func (r *rootfs) commit(ctx context.Context) error {
	env, vars, s, err := r.survey(ctx)
	if errors.Is(err, errNotThere) {
		return undecided(err)
	}
	if err != nil {
		return err
	}
	done := vars[varUpgrade] == "0" && vars[varBootPart] == strconv.Itoa(r.u.To) && s.mayRun(r.u.To)
	if err := r.isTrial(vars, s); err != nil && !done {
		return err
	}
	return undecided(env.set(ctx, stayWith(r.u.To)))
}

// rollback makes the old slot boot next. The bootloader may have done so already. Which slot runs does
// not matter; what does not let it write may be mended, or the bootloader goes back by itself.
func (r *rootfs) rollback(ctx context.Context) error {
	env, _, s, err := r.survey(ctx)
	if s == nil || isTemporary(err) {
		return undecided(err)
	}
	if s.byNum(strconv.Itoa(r.u.From)) == nil {
		return fmt.Errorf("the journal names partition %d as the old slot, but %s is %d and %s is %d: it is another device's",
			r.u.From, s.a, s.a.num, s.b, s.b.num)
	}
	return undecided(env.set(ctx, stayWith(r.u.From)))
}

func (r *rootfs) verifyRollback(ctx context.Context) error {
	_, vars, s, err := r.survey(ctx)
	if err != nil {
		return err
	}
	if vars[varUpgrade] == "1" {
		return fmt.Errorf("%s is still 1 after the rollback", varUpgrade)
	}
	return s.agree(vars)
}

// resume takes up an interrupted write: it returns the offset in the image to go on from, with
// w as it was there, or 0 when there is nothing to go on from.
//
// What is trusted is little. The artifact is the same one, because its manifest is (the
// flow drops the checkpoint otherwise); that the slot still holds what was written is
// checked by hashing it; and at the end the whole image is read back in any case.
func (r *rootfs) resume(ctx context.Context, w *slotWriter, a *artifact) (int64, error) {
	c := r.u.Checkpoint
	switch {
	case c == nil:
		if r.u.Tries > 1 {
			r.lg.warnf("no place is known where to go on: the artifact is read again from its start, which costs network " +
				"traffic but no writes")
		}
		return 0, nil
	case !r.reopenable() || w.sequential:
		return 0, nil
	case c.Slot != r.to.path, c.Total != w.size, c.Offset < min(r.opt.head, w.size), c.Offset > w.size,
		c.From.File < 0, c.From.Bit > 7:
		r.lg.warnf("the journal tells of a write of %d bytes to %q, and this one is of %d to slot %s: the install starts "+
			"over",
			c.Total, c.Slot, w.size, w.name)
		return 0, nil
	case c.Source.Size >= 0 && r.src.id.Size >= 0 && c.Source.Size != r.src.id.Size:
		// Its tag does not count: replicas of a server give the same file others.
		r.lg.warnf("the artifact's file has %d bytes, and had %d before: the install starts over", r.src.id.Size,
			c.Source.Size)
		return 0, nil
	}
	if err := r.reenter(ctx, w, a, c); err != nil {
		if ctx.Err() != nil || isTemporary(err) || errors.Is(err, errAborted) {
			return 0, err
		}
		return 0, fmt.Errorf("%w: %w", errStartOver, err)
	}
	r.lg.infof("going on at %s of %s", mega(c.Offset), mega(c.Total))
	return c.Offset, nil
}

func (r *rootfs) reenter(ctx context.Context, w *slotWriter, a *artifact, c *checkpoint) error {
	// The head is not in the slot yet; it is at the start of the payload, which has to be
	// fetched for header and signature anyway.
	if r.delta != nil {
		r.delta.enter(a, 0, min(r.opt.head, w.size))
	}
	if err := w.takeHead(r.file.unhashed()); err != nil {
		return r.blame(err)
	}
	r.src.close() // it would only send on while the slot is being hashed
	if err := w.verifyPrefix(ctx, c); err != nil {
		return err
	}
	if r.delta != nil {
		window, err := w.window(r.delta.enter(a, c.Offset, w.size))
		r.delta.follow(window)
		return err
	}
	var window []byte
	if !c.From.Fresh {
		end := c.From.Out - r.file.TarOffset
		if end < gzipWindow || end > c.Offset {
			return fmt.Errorf("the journal names byte %d of %d as a place to go on from", end, c.Offset)
		}
		var err error
		if window, err = w.window(end); err != nil {
			return err
		}
	}
	in, err := r.src.from(ctx, c.From.File)
	if err != nil {
		return err
	}
	r.file, err = a.resumePayload(c.From, window, in, r.file.Name, c.Offset)
	return err
}

// window gives what deflate data for byte end of the image may refer to, of which all is in the slot but the head.
func (w *slotWriter) window(end int64) ([]byte, error) {
	from := max(end-gzipWindow, 0)
	window := make([]byte, end-from)
	_, err := w.dst.ReadAt(window, from)
	if from < int64(len(w.head)) {
		copy(window, w.head[from:])
	}
	return window, err
}

// keepCheckpoint journals how far the write has come.
func (r *rootfs) keepCheckpoint(c checkpoint) error {
	c.Slot, c.Source = r.to.path, r.src.id
	r.u.Checkpoint = &c
	if r.delta != nil {
		r.u.Saved = r.saved + r.delta.saved()
	}
	return r.save()
}
