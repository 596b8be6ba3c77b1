// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand"
	"path/filepath"
	"testing"
)

// Going on after a cut: what it costs to fetch, and that it can never go wrong.

// lostPerCut is the most that is fetched twice because of one cut, in bytes of the artifact
// where the data does not shrink: what came since the checkpoint, which is kept at the first
// block that is keepEvery after the one before and may be the very thing that was cut; the
// blocks in flight behind it; what was read ahead; and, to begin again, all up to the end of
// the slot's head. For gzip the nearest place to enter lies up to a flush before the
// checkpoint, and as much is decoded ahead.
func lostPerCut(artifact []byte, o writeOptions, flush int64) int64 {
	since := o.keepEvery + o.block
	inFlight := blocksInFlight*o.block + int64(o.readAhead) + flush
	begin := payloadStart(artifact) + o.head + int64(o.readAhead) + flush
	return since + inFlight + flush + begin
}

// payloadStart is where in the artifact its payload's bytes begin, with the tar header of the
// image.
func payloadStart(artifact []byte) int64 {
	for off := 0; off+512 <= len(artifact); {
		var size int64
		name := string(bytes.TrimRight(artifact[off:off+100], "\x00"))
		fmt.Sscanf(string(artifact[off+124:off+135]), "%o", &size)
		if off += 512; len(name) > 8 && name[:9] == "data/0000" {
			return int64(off) + 512
		}
		off += int(size+511) &^ 511
	}
	return 0
}

// MEN-2293: every operation of an install cut, and what is fetched in all bounded.
func TestFetchedBytesWithACutAtEveryOperation(t *testing.T) {
	t.Parallel()
	for _, compression := range []string{"none", "gzip"} {
		t.Run(compression, func(t *testing.T) {
			t.Parallel()
			s, flush := newResumeSetup(t, compression)
			artifact := readFileOrNil(s.artifacts["new"])
			bound := int64(len(artifact)) + lostPerCut(artifact, resumeScale(), flush)
			moments, fetched := s.recordFetched(t)
			rng := rand.New(rand.NewSource(3))
			states, most := 0, int64(0)
			for i, m := range moments {
				for j := range 2 {
					mode, torn := lossModes[(2*i+2+j)%len(lossModes)], tears(rng)
					d, n := s.countedDevice(t)
					n.Store(fetched[i])
					d.cut(m, mode, torn[(i+1+j)%len(torn)], rand.New(rand.NewSource(int64(i+1))))
					err := d.settle(s.artifacts["new"], "new")
					if err == nil {
						err = d.check("new")
					}
					if got := n.Load(); err == nil && got > bound {
						err = fmt.Errorf("fetched %d bytes, want %d at most", got, bound)
					}
					if err != nil {
						t.Fatalf("cut at operation %d, mode %s: %v", i+1, mode, err)
					}
					states, most = states+1, max(most, n.Load())
				}
			}
			t.Logf("%d crash states; artifact of %d bytes, at most %d fetched for one cut (bound %d)", states, len(artifact),
				most-int64(len(artifact)), bound-int64(len(artifact)))
			if states < 200 {
				t.Errorf("%d crash states: the simulator does not see the program's writes", states)
			}
		})
	}
}

// The power goes again and again, each time after so many operations.
func TestFetchedBytesWithManyCuts(t *testing.T) {
	t.Parallel()
	for _, compression := range []string{"none", "gzip"} {
		t.Run(compression, func(t *testing.T) {
			t.Parallel()
			s, flush := newResumeSetup(t, compression)
			artifact := readFileOrNil(s.artifacts["new"])
			most := 0
			for every := 15; every < 120; every += 3 {
				d, n := s.countedDevice(t)
				rng := rand.New(rand.NewSource(int64(every)))
				cuts := 0
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
				bound := int64(len(artifact)) + int64(cuts)*lostPerCut(artifact, resumeScale(), flush)
				if got := n.Load(); got > bound {
					t.Errorf("a cut every %d operations: %d cuts, fetched %d bytes, want %d at most", every, cuts, got, bound)
				}
				most = max(most, cuts)
			}
			t.Logf("up to %d cuts of one install", most)
			if most < 10 {
				t.Errorf("at most %d cuts: nothing was proved", most)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestCheckpointsThatDoNotFit(t *testing.T) {
	t.Parallel()
	s, _ := newResumeSetup(t, "gzip")
	artifact := readFileOrNil(s.artifacts["new"])
	for name, change := range map[string]func(*simDevice){
		"nothing changed": func(*simDevice) {},
		"slot tampered": func(d *simDevice) {
			f := d.w.files[filepath.Join(d.dir, "p3")]
			f.current[30000]++
			f.durable[30000]++
		},
		"slot of another device": func(d *simDevice) {
			d.journal(func(r *record) { r.Update.Checkpoint.Slot = "/dev/mmcblk7p3" })
		},
		"another size": func(d *simDevice) { d.journal(func(r *record) { r.Update.Checkpoint.Total++ }) },
		"another artifact's journal": func(d *simDevice) {
			d.journal(func(r *record) { r.Update.Sum = "00" })
		},
		"another tag":  func(d *simDevice) { d.journal(func(r *record) { r.Update.Checkpoint.Source.Tag = "other" }) },
		"another file": func(d *simDevice) { d.journal(func(r *record) { r.Update.Checkpoint.Source.Size++ }) },
		"wrong check":  func(d *simDevice) { d.journal(func(r *record) { r.Update.Checkpoint.Check++ }) },
		"wrong place": func(d *simDevice) {
			d.journal(func(r *record) { r.Update.Checkpoint.From.File += 3 })
		},
		"before the file": func(d *simDevice) {
			d.journal(func(r *record) { r.Update.Checkpoint.From.File = -3 })
		},
		"before the image": func(d *simDevice) {
			d.journal(func(r *record) { r.Update.Checkpoint.From.Out = 20000 })
		},
		"another kind": func(d *simDevice) {
			d.journal(func(r *record) { r.Update.Checkpoint.From.Kind = "none" })
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, n := s.halfway(t, 100000)
			change(d)
			before := n.Load()
			if err := d.settle(s.artifacts["new"], "new"); err != nil {
				t.Fatal(err)
			}
			if err := d.endsWell("new"); err != nil {
				t.Fatal(err)
			}
			whole := n.Load()-before >= int64(len(artifact))
			if want := name != "nothing changed" && name != "another tag"; whole != want {
				t.Errorf("read %d bytes of %d after the cut: all of them: %v, want %v", n.Load()-before, len(artifact), whole, want)
			}
		})
	}
}

// A journal that says anything at all: no panic, and no image is run but the right one.
func FuzzCheckpoint(f *testing.F) {
	s, _ := newResumeSetup(f, "gzip")
	f.Add(int64(102400), int64(60*simBlock+77), int64(50000), int64(98304+1536), uint32(7), "gzip", "p3", true, false)
	f.Add(int64(-1), int64(-1), int64(-1), int64(-1), uint32(0), "", "", false, true)
	f.Add(int64(1)<<62, int64(1)<<62, int64(1)<<62, int64(1)<<62, uint32(0), "xz", "p2", true, true)
	f.Add(int64(102400), int64(60*simBlock+77), int64(0), int64(32768), uint32(0), "gzip", "p3", false, true)
	f.Fuzz(func(t *testing.T, offset, total, file, out int64, check uint32, kind, slot string, fresh, keepCheck bool) {
		d, _ := s.halfway(t, 100000)
		d.journal(func(r *record) {
			c := r.Update.Checkpoint
			c.Offset, c.Total, c.Slot = offset, total, filepath.Join(d.dir, slot)
			c.From = restartPoint{Kind: kind, File: file, Out: out, Fresh: fresh, Check: byte(check), Bit: byte(check & 15)}
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

// A device that never gets as far as the first checkpoint gives up, and says so once.
func TestNoProgressEndsInFailure(t *testing.T) {
	s, _ := newResumeSetup(t, "none")
	d, _ := s.countedDevice(t)
	tries := 0
	d.w.fault = func(op int, f *simFile, sync bool) error {
		if f.name == "p3" && !sync && tries < 100 {
			tries++
			panic(powerCut{})
		}
		return nil
	}
	if err := d.boot(); err != nil {
		t.Fatal(err)
	}
	var err error
	for d.powered(func() { _, err = d.life(s.artifacts["new"], "new") }) {
		d.w.lose("lose", 0, rand.New(rand.NewSource(1)))
	}
	if tries != maxTries {
		t.Errorf("%d tries, want %d", tries, maxTries)
	}
	if rec, _ := d.peek(); err == nil || rec.Update != nil || rec.Last == nil || rec.Last.Result != "failed" {
		t.Errorf("got %v and %+v, want a failure", err, rec.Last)
	}
	if err := (standalone{d.start()}).resume(context.Background()); exitCode(err) != exitNothing {
		t.Errorf("a second time: got %v, want nothing in progress", err)
	}
}
