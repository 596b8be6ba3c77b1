// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Power cuts at every operation of an update, on the simulated device of helper_sim_test.go.

func TestPowerCutAtEveryOperation(t *testing.T) {
	t.Parallel()
	s := newSimSetup(t)
	seen, err := s.explore(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(seen)
	if seen.states < 1000 && !testing.Short() {
		t.Errorf("%v: the simulator does not see the program's writes", seen)
	}
}

// An image that does not boot must be rolled back, wherever the power is cut.
func TestPowerCutWithImageThatDoesNotBoot(t *testing.T) {
	t.Parallel()
	s := newSimSetup(t)
	seen, err := s.explore(t, func(d *simDevice) { d.bad = "new" })
	if err != nil {
		t.Fatal(err)
	}
	t.Log(seen)
}

// The idle slot holds the image already, but in the cache of the disk only: nothing is written to it
// then, and yet it must be durable before it is switched to.
func TestPowerCutWithImageThatIsThere(t *testing.T) {
	t.Parallel()
	s := newSimSetup(t)
	seen, err := s.explore(t, func(d *simDevice) {
		f := d.w.files[filepath.Join(s.dir, "p3")]
		copy(f.current, s.images["new"])
		d.w.pending = append(d.w.pending, simWrite{f, 0, s.images["new"]})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(seen)
}

// errors at each operation, once or from then on until the next boot.
func TestErrorAtEveryOperation(t *testing.T) {
	t.Parallel()
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

// Every opening and every read of environment and journal fails: once, a few times, or in that place until
// the next boot. What cannot be read is not taken for what is wrong: an update that meets a passing
// error is committed as if there had been none, and none is called inconsistent.
func TestBlindAtEveryLook(t *testing.T) {
	t.Parallel()
	s := newSimSetup(t)
	states := 0
	for _, times := range []int{1, 2, 0} {
		for k := 1; ; k++ {
			d := newSimDevice(t, s.dir, s.images)
			f := &blindness{d: d, at: k, left: times, boot: times == 0}
			d.w.blind = f.look
			err := d.settle(s.artifacts["new"], "new")
			d.w.mu.Lock()
			looks := d.w.looks
			d.w.blind = nil
			d.w.mu.Unlock()
			if err == nil {
				err = d.check("new")
			}
			rec, _ := d.peek()
			if err == nil && (rec.Last.Result == "inconsistent" || times > 0 && rec.Last.Result != "committed") {
				err = fmt.Errorf("verdict %q: %s", rec.Last.Result, rec.Last.Cause)
			}
			if err != nil {
				t.Fatalf("blind %d times at look %d, %v: %v", times, k, f, err)
			}
			if k >= looks {
				break
			}
			states++
		}
	}
	t.Logf("%d states", states)
	if states < 100 {
		t.Errorf("%d states: the simulator does not see the program's reads", states)
	}
}

// blindness is a look that fails, and those after it in the same place: as many as are left, or all until
// the next boot.
type blindness struct {
	d        *simDevice
	at, left int
	boot     bool
	file     *simFile
	off      int64
	boots    int
}

func (b *blindness) String() string {
	if b.file == nil {
		return "not met"
	}
	return fmt.Sprintf("%s at %d", b.file.name, b.off)
}

func (b *blindness) look(look int, f *simFile, off int64) error {
	if slot := strings.HasPrefix(f.name, "p"); look == b.at && !slot {
		b.file, b.off, b.boots = f, off, b.d.boots
	}
	if b.file != f || b.off != off || b.boot && b.d.boots != b.boots || !b.boot && b.left == 0 {
		return nil
	}
	b.left--
	if off < 0 {
		return syscall.EMFILE
	}
	return syscall.EIO
}

// fwup#138, field case 24: a write that succeeds and puts something else on the medium.
func TestSilentCorruptionOfEveryWrite(t *testing.T) {
	t.Parallel()
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
	t.Parallel()
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
			seen, err := s.exploreUnless(t, prep, simStates{})
			if err == nil {
				t.Fatalf("nothing found in %v", seen)
			}
			t.Logf("found after %v: %v", seen, err)
			if !exhaustive() {
				return
			}
			if all, err := s.exploreUnless(t, prep, nil); err == nil || all != seen {
				t.Errorf("every state followed to its end: %v, %v, want the same", all, err)
			}
		})
	}
}

// What decides the future makes another state, and nothing else does.
func TestSimState(t *testing.T) {
	t.Parallel()
	s := newSimSetup(t)
	state := func(what string, at int, edit func(r *record)) simState {
		d := s.device(t, nil)
		d.journal(func(r *record) {
			r.Last = &verdict{Artifact: "old", Result: "committed", Time: time.Unix(1, 0)}
			edit(r)
		})
		if what != "" {
			d.w.files[what].current[at] ^= 1
		}
		return d.state("new")
	}
	same := func(*record) {}
	plain := state("", 0, same)
	for _, c := range []struct {
		what string
		at   int
		edit func(r *record)
		same bool
	}{
		{"", 0, same, true},
		{"", 0, func(r *record) { r.Time = r.Time.Add(time.Hour) }, true},
		{"", 0, func(r *record) { r.Last.Time = r.Last.Time.Add(time.Hour) }, true},
		{"", 0, func(r *record) { r.Last.Result = "failed" }, false},
		{"", 0, func(r *record) { r.Update = &update{Step: stepInstall} }, false},
		{simJournal, 20, same, false},
		{simJournal, journalCopySize + 20, same, false},
		{simJournal, journalCopySize - 1, same, true}, // behind the JSON
		{simEnvPath, simEnvSize + 9, same, false},
		{filepath.Join(s.dir, "p2"), 0, same, false},
		{filepath.Join(s.dir, "p3"), 32000, same, false},
	} {
		if got := state(c.what, c.at, c.edit) == plain; got != c.same {
			t.Errorf("byte %d of %q changed, or the record: the same state is %v, want %v", c.at, c.what, got, c.same)
		}
	}
}
