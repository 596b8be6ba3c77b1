// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"sort"
)

// explore records every op of one whole update and then, without QEMU, builds the disk as each
// possible power cut would have left it: there must be a valid environment, and the slot that it
// chooses must hold exactly the old image or the new one. It returns how many states were wrong.
// The updater is mendlet, or the stand-in in one of its ways.
func explore(d *device, way string) (bad int, err error) {
	first, log, err := record(d, way)
	if err != nil {
		return 0, err
	}
	defer os.Remove(first)
	f, err := os.OpenFile(first, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	x := explorer{f: f, known: map[[32]byte]string{}, durable: map[int64][32]byte{}, found: map[string]int{}, rng: d.rng}
	for _, v := range []string{"v1", "v2"} {
		img, err := os.ReadFile(filepath.Join(d.out, "root-"+v+".ext4"))
		if err != nil {
			return 0, err
		}
		x.known[sha256.Sum256(img)] = v
	}
	states := 0
	for i := 0; i <= len(log); i++ {
		var inflight op
		if i < len(log) {
			inflight = log[i]
		}
		for _, mode := range []lossMode{keepAll, loseAll, prefix, anything, anything, anything} {
			states++
			ok, err := x.look(inflight, mode)
			if err != nil {
				return 0, err
			}
			if !ok {
				bad++
			}
		}
		if i < len(log) {
			if err := x.advance(log[i]); err != nil {
				return 0, err
			}
		}
	}
	var kinds []string
	for k, n := range x.found {
		kinds = append(kinds, fmt.Sprintf("%6d %s", n, k))
	}
	sort.Strings(kinds)
	for _, k := range kinds {
		d.say("%s", k)
	}
	d.say("%d crash states of %d recorded ops, %d bad", states, len(log), bad)
	return bad, nil
}

// record boots the device once, copies its disk, and records what an update does to it, from the
// boot before it to the end of the boot after it.
func record(d *device, way string) (first string, log []op, err error) {
	if err := d.start(); err != nil {
		return "", nil, err
	}
	if _, err := d.waitUp(bootLimit, nil); err != nil { // U-Boot makes its environment at this boot
		return "", nil, err
	}
	if err := d.off(); err != nil {
		return "", nil, err
	}
	first = d.path + ".first"
	if err := copyFile(d.path, first); err != nil {
		return "", nil, err
	}
	d.keepLog = true
	if err := d.start(); err != nil {
		return "", nil, err
	}
	disk := d.vm.disk
	if _, err := d.waitUp(bootLimit, nil); err != nil {
		return "", nil, err
	}
	if way == "" {
		err = d.update("2")
	} else {
		err = errors.Join(d.vm.send("stand-in "+way+" "+d.url+"root-v2.ext4"), d.standInUp())
	}
	if err != nil {
		return "", nil, err
	}
	if err := d.off(); err != nil {
		return "", nil, err
	}
	return first, disk.log, nil
}

func (d *device) standInUp() error {
	if _, err := d.waitUp(updateLimit, nil); err != nil {
		return err
	}
	if d.version != "2" {
		return fmt.Errorf("the stand-in's update to v2 ended in v%s", d.version)
	}
	return nil
}

// explorer holds the disk at one moment: the file is what is durable.
type explorer struct {
	f       *os.File
	pending []op
	known   map[[32]byte]string
	durable map[int64][32]byte // see hash
	found   map[string]int
	rng     *rand.Rand
}

// advance lets an op happen.
func (x *explorer) advance(o op) error {
	durable := []op{o}
	switch {
	case o.flush:
		durable, x.pending = x.pending, nil
	case o.fua:
		x.pending = trim(x.pending, o)
	default:
		x.pending = append(x.pending, o)
		return nil
	}
	for _, o := range durable {
		if inSlot(o) {
			clear(x.durable)
		}
		if _, err := x.f.WriteAt(o.data, o.off); err != nil {
			return err
		}
	}
	return nil
}

// look cuts the power during the op and says whether the device would boot a whole root.
func (x *explorer) look(inflight op, mode lossMode) (bool, error) {
	d := diskState{x.f, survivors(x.pending, inflight, mode, x.rng)}
	env := readEnv(d)
	if env == nil {
		x.found["no valid environment"]++
		return false, nil
	}
	part := env["mender_boot_part"]
	at := map[string]int64{"2": slotA, "3": slotA + slotSize}[part]
	if at == 0 || env["mender_boot_part_hex"] != part {
		x.found[fmt.Sprintf("no such slot: %q, %q in hex", part, env["mender_boot_part_hex"])]++
		return false, nil
	}
	sum, err := x.hash(d, at)
	if err != nil {
		return false, err
	}
	image, ok := x.known[sum]
	if !ok {
		image = "NO KNOWN IMAGE"
	}
	x.found[fmt.Sprintf("boot slot %s with %s, upgrade_available=%s", part, image, env["upgrade_available"])]++
	return ok, nil
}

// hash returns the SHA-256 of the slot at an offset. Most ops do not touch a slot, so that of the
// durable disk is kept.
func (x *explorer) hash(d diskState, at int64) (sum [32]byte, err error) {
	plain := !slices.ContainsFunc(d.over, inSlot)
	if sum, ok := x.durable[at]; ok && plain {
		return sum, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(d, at, slotSize)); err != nil {
		return sum, err
	}
	if h.Sum(sum[:0]); plain {
		x.durable[at] = sum
	}
	return sum, nil
}

func inSlot(o op) bool { return o.region() == "slot" }

// diskState is the durable disk with some writes over it.
type diskState struct {
	f    *os.File
	over []op
}

func (s diskState) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.f.ReadAt(p, off)
	overlay(p[:n], off, s.over)
	return n, err
}
