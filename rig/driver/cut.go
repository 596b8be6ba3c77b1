// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// A cutPoint is where to cut the power: at the k-th op of a kind, or after a delay.
type cutPoint struct {
	what  string
	k     int
	after time.Duration
}

func (p cutPoint) String() string {
	if p.what == "delay" {
		return fmt.Sprintf("after %.1fs", p.after.Seconds())
	}
	return fmt.Sprintf("%s %d", p.what, p.k)
}

// cuts updates the device n times, cuts the power during each update, and checks each time that the
// device comes up in a whole root, that the update has ended with one verdict, and that the next
// update is begun. A last update runs to its end.
func cuts(d *device, n int) error {
	if err := d.on(); err != nil {
		return err
	}
	before, begin := d.vm.disk.counted(), time.Now()
	if err := d.update(d.target()); err != nil {
		return err
	}
	whole := less(d.vm.disk.counted(), before)
	took := time.Since(begin)
	results := map[string]int{}
	for i := 1; i <= n; i++ {
		result, err := d.cutOnce(i, d.pick(whole, took))
		if err != nil {
			return err
		}
		results[result]++
	}
	if err := d.update(d.target()); err != nil {
		return fmt.Errorf("the update after the last cut: %w", err)
	}
	d.say("%d power cuts: %v", n, results)
	return d.off()
}

// pick chooses a point of an update that does as many ops as the one before the cuts. Ops of the
// environment and the journal are few among those of the slot, so they are chosen by name, too.
func (d *device) pick(whole map[string]int, took time.Duration) cutPoint {
	kinds := []string{"write", "env", "env", "data", "flush", "flush", "delay"}
	p := cutPoint{what: kinds[d.rng.Intn(len(kinds))]}
	if p.what == "delay" || whole[p.what] == 0 {
		return cutPoint{what: "delay", after: time.Duration(d.rng.Int63n(int64(took)))}
	}
	p.k = 1 + d.rng.Intn(whole[p.what])
	return p
}

func (d *device) cutOnce(i int, p cutPoint) (string, error) {
	from, version, last := d.version, d.target(), d.status.Last
	mode := []lossMode{keepAll, loseAll, prefix, anything}[d.rng.Intn(4)]
	if d.bus == "sd" {
		mode = keepAll
	}
	before := d.vm.disk.counted()
	cut := d.vm.disk.cutAt(p.what, p.k)
	if p.what == "delay" {
		c := make(chan struct{})
		time.AfterFunc(p.after, func() { close(c) })
		cut = c
	}
	if err := d.vm.send("updater update " + d.url + "v" + version + ".mender"); err != nil {
		return "", err
	}
	text, err := d.waitUp(updateLimit, cut) // when it ends by itself, the cut falls into the idle device
	if err != nil && !errors.Is(err, errCut) {
		return "", err
	}
	d.vm.kill()
	lost, err := d.vm.disk.powerCut(mode, d.rng)
	if err != nil {
		return "", err
	}
	ops := less(d.vm.disk.counted(), before)
	d.say("cut %d at %v of v%s -> v%s, %q: %s", i, p, from, version, lastStep(text), lost)
	if err := d.checkEnv(); err != nil {
		return "", fmt.Errorf("after cut %d: %w", i, err)
	}
	begin := time.Now()
	if err := d.on(); err != nil {
		return "", fmt.Errorf("after cut %d: %w", i, err)
	}
	result, err := d.judge(from, version, last, ops["slot"] > 0)
	if err != nil {
		return "", fmt.Errorf("after cut %d: %w", i, err)
	}
	if err := sameVerdict(text, d.status.Last); err != nil {
		return "", fmt.Errorf("after cut %d: %w", i, err)
	}
	d.say("       runs %s/v%s after %.0f s: %s", d.slot, d.version, time.Since(begin).Seconds(), result)
	return result, nil
}

// checkEnv looks at the disk before U-Boot can write its defaults over a bad environment.
func (d *device) checkEnv() error {
	f, err := os.Open(d.path)
	if err != nil {
		return err
	}
	defer f.Close()
	if readEnv(f) == nil {
		return errors.New("neither copy of the environment is valid")
	}
	return nil
}

// judge says how the update ended, from what runs and what the updater says. Before it has written
// into the slot it may not yet have noted that it began.
func (d *device) judge(from, version string, last verdict, wrote bool) (string, error) {
	switch {
	case d.version == version:
		return "committed", d.verdict(version, "committed")
	case d.version != from:
		return "", fmt.Errorf("version %s runs after an update from %s to %s", d.version, from, version)
	case d.status.Last == last && !wrote:
		return "not begun", nil
	case d.status.Last.Artifact != "v"+version:
		return "", fmt.Errorf("no verdict for v%s: the last result is %q for %q", version, d.status.Last.Result, d.status.Last.Artifact)
	case d.status.Last.Result == "committed":
		return "", fmt.Errorf("v%s is said to have succeeded, but v%s runs", version, from)
	}
	return d.status.Last.Result, nil
}

// sameVerdict checks that a verdict that the updater gave before the cut still stands after it.
func sameVerdict(text string, now verdict) error {
	if !strings.Contains(text, "RIG-STATUS ") {
		return nil
	}
	then, err := lastStatus(text)
	if err != nil || then.inProgress() {
		return nil // the line itself was cut
	}
	if then.Last != now {
		return fmt.Errorf("the verdict was %+v before the cut and is %+v after it", then.Last, now)
	}
	return nil
}

// lastStep says how far the update had come when the power went.
func lastStep(text string) string {
	step := "update"
	at := -1
	for _, s := range []string{"RIG-STEP install", "U-Boot 20", "RIG: booting part", "RIG: bootlimit", "Starting kernel",
		"RIG-STEP resume", "RIG-STEP commit", "RIG-STEP rollback", "RIG-STATUS", "RIG-UP"} {
		if i := strings.LastIndex(text, s); i > at {
			at, step = i, s
		}
	}
	return step
}
