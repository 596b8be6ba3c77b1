// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// slot is one of the two root partitions.
type slot struct {
	letter string // A or B
	path   string // device node or image file
	num    int    // partition number that the boot environment calls it by
	ubi    bool
}

//go:noinline
func (s *slot) String() string { return fmt.Sprintf("%s (%s)", s.letter, s.path) }

// slots is what is known about the pair.
type slots struct {
	a, b    *slot
	running *slot    // nil: none of them runs (initramfs, recovery system, --running none)
	started *slot    // where none runs: the one that the kernel was started for, by its root=; nil: not known
	why     []string // one line for each source: mounted root, command line, boot environment
}

// mayRun tells that the slot of this number runs, or that nothing speaks against it.
//
//go:noinline
func (s *slots) mayRun(num int) bool {
	if s.running != nil {
		return s.running.num == num
	}
	return s.started == nil || s.started.num == num
}

//go:noinline
func (s *slots) byNum(n string) *slot {
	for _, x := range []*slot{s.a, s.b} {
		if strconv.Itoa(x.num) == n {
			return x
		}
	}
	return nil
}

//go:noinline
func (s *slots) other(x *slot) *slot {
	if x == s.a {
		return s.b
	}
	return s.a
}

// findSlots resolves RootfsPartA and RootfsPartB and finds out which one runs.
func findSlots(c *config, m *machine, env map[string]string) (*slots, error) {
	s := &slots{}
	for _, x := range []struct {
		letter, key, conf string
		to                **slot
	}{{"A", "RootfsPartA", c.RootfsPartA, &s.a}, {"B", "RootfsPartB", c.RootfsPartB, &s.b}} {
		if x.conf == "" {
			return nil, withHint(refuse("%s is not set in the configuration", x.key),
				"set RootfsPartA and RootfsPartB to the two root partitions in %q", m.path(filepath.Join(c.paths.conf,
					"mender.conf")))
		}
		one, err := m.resolveSlot(x.letter, x.conf)
		if err != nil {
			return nil, refuseUnlessPassing(err, "%s %q: %w", x.key, x.conf, err)
		}
		*x.to = one
	}
	if s.a.path == s.b.path || s.a.num == s.b.num {
		return nil, refuse("slots %s and %s are the same or have the same number", s.a, s.b)
	}
	all, err := m.mounts()
	if err != nil && (m.running == "" || exitCode(err) == exitTempFail) {
		return s, err
	}
	if err := s.oneDisk(m, all); err != nil {
		return s, err
	}
	return s, s.findRunning(m, env, all)
}

// oneDisk refuses slots on different disks: the boot environment knows partition numbers only, so one
// of them is not the partition that is meant.
func (s *slots) oneDisk(m *machine, all []mount) error {
	var on [2]*trail
	for i, x := range []*slot{s.a, s.b} {
		on[i] = &trail{}
		if num := deviceNumber(x.path); num != "" && !x.ubi {
			if err := on[i].device(m, num, all); err != nil {
				return tryLater("slot %s: %w", x, err)
			}
		}
	}
	a, b := on[0].disks, on[1].disks
	if len(a) == 0 || len(b) == 0 || slices.ContainsFunc(a, func(disk string) bool { return listed(b, disk) }) {
		return nil
	}
	return withHint(refuse("slot %s is on disk %s, and slot %s on %s", s.a, strings.Join(a, ", "), s.b,
		strings.Join(b, ", ")),
		"both must be on the disk that the bootloader boots from; a copy of a disk has the same UUIDs, take it away")
}

// isOn tells whether what a trail was followed from rests on the slot.
func (s *slot) isOn(t *trail) bool {
	if s.ubi {
		return listed(t.devs, s.path)
	}
	num := deviceNumber(s.path)
	return num != "" && listed(t.devs, num) || listed(t.files, s.path)
}

// on gives the slots that a mount rests on.
//
//go:noinline
func (s *slots) on(t *trail) (found []*slot) {
	for _, one := range []*slot{s.a, s.b} {
		if one.isOn(t) {
			found = append(found, one)
		}
	}
	return found
}

// findRunning puts the sources together. What the mounted root rests on speaks first. Where that cannot be
// followed to its end, root= of the command line does, and which of the slots is mounted at all;
// they must not speak against each other. Nothing is guessed: what runs is what is not written to.
func (s *slots) findRunning(m *machine, env map[string]string, all []mount) error {
	byEnv := s.byNum(env["mender_boot_part"])
	s.why = append(s.why, fmt.Sprintf("boot environment: mender_boot_part=%s is %s", env["mender_boot_part"],
		nameOf(byEnv)))
	switch strings.ToLower(m.running) {
	case "a", "b":
		s.running = map[string]*slot{"a": s.a, "b": s.b}[strings.ToLower(m.running)]
		s.why = append(s.why, "--running says "+nameOf(s.running))
		return nil
	case "none":
		s.why = append(s.why, "--running says that neither runs")
		return nil
	}
	root := mountOf(all, "/")
	if root == nil {
		return refuse("which slot runs: no line for / in /proc/self/mountinfo")
	}
	t, err := m.follow(*root, all)
	if err != nil {
		return tryLater("which slot runs: %w", err)
	}
	byRoot := s.on(t)
	s.why = append(s.why, fmt.Sprintf("mounted root: %s is %s", root, namesOf(byRoot)))
	if len(t.lost) > 0 && len(byRoot) == 0 {
		s.why = append(s.why, "what it rests on is not to be seen: "+strings.Join(t.lost, ", "))
	}
	byCmd, err := s.fromCmdline(m)
	if err != nil && len(byRoot) != 1 {
		return tryLater("which slot runs: kernel command line: %w", err)
	}
	switch {
	case len(byRoot) == 1 && (root.fstype != "overlay" || byCmd == nil || byCmd == byRoot[0]):
		s.running = byRoot[0]
		return nil
	case len(byRoot) == 0 && ramRoot[root.fstype], len(byRoot) == 0 && len(t.lost) == 0 &&
		slices.Equal(t.ends, []string{"memory"}):
		s.started = byCmd
		return nil
	case len(byRoot) == 0 && len(t.lost) > 0:
		if s.running, err = s.fromRest(m, byCmd, all); s.running != nil || err != nil {
			return err
		}
	}
	return withHint(refuse("which slot runs: the mounted root is not known to be on one of RootfsPartA and RootfsPartB "+
		"(%s)", strings.Join(s.why, "; ")),
		"set RootfsPartA and RootfsPartB to the two root partitions, or say --running A, B or none")
}

// fromRest finds the slot that runs, where what the root rests on is not to be seen: nil if the rest
// says nothing, or two things.
func (s *slots) fromRest(m *machine, byCmd *slot, all []mount) (*slot, error) {
	var mounted []*slot
	for _, x := range all {
		t, err := m.follow(x, all)
		if err != nil {
			return nil, tryLater("which slot runs: %w", err)
		}
		for _, one := range s.on(t) {
			if !slices.Contains(mounted, one) {
				mounted = append(mounted, one)
			}
		}
	}
	s.why = append(s.why, "mounted at all: "+namesOf(mounted))
	switch {
	case byCmd != nil && len(mounted) == 1 && mounted[0] != byCmd:
		return nil, nil
	case byCmd == nil && len(mounted) == 1:
		return mounted[0], nil
	}
	return byCmd, nil
}

// fromCmdline is the slot that root= names; nil for none.
func (s *slots) fromCmdline(m *machine) (*slot, error) {
	arg, err := m.rootArg()
	if err != nil {
		return nil, err
	}
	if arg == "" {
		s.why = append(s.why, "kernel command line: root= not given")
		return nil, nil
	}
	node, num, err := m.rootDevice(arg)
	if exitCode(err) == exitTempFail {
		return nil, err
	}
	var found *slot
	for _, one := range []*slot{s.a, s.b} {
		if err == nil && (one.path == node || num != "" && num == deviceNumber(one.path)) {
			found = one
		}
	}
	line := fmt.Sprintf("kernel command line: root=%s is %s", arg, nameOf(found))
	if err != nil {
		line += fmt.Sprintf(" (%v)", err)
	}
	s.why = append(s.why, line)
	return found, nil
}

func namesOf(list []*slot) string {
	if len(list) == 2 {
		return nameOf(list[0]) + " and " + nameOf(list[1])
	}
	return nameOf(append(list, nil)[0])
}

// resolveSlot turns what the configuration says into a node and a partition number, which
// is what the path ends in (spec: the trailing decimal digits).
func (m *machine) resolveSlot(letter, conf string) (*slot, error) {
	path, err := m.resolveDevice(conf)
	if err != nil {
		return nil, err
	}
	digits := path[len(strings.TrimRight(path, "0123456789")):]
	num, err := strconv.Atoi(digits)
	if err != nil {
		return nil, fmt.Errorf("%q does not end in a partition number", path)
	}
	ubi, err := filepath.Match("ubi[0-9]*_[0-9]*", filepath.Base(path))
	return &slot{letter: letter, path: path, num: num, ubi: ubi}, err
}

//go:noinline
func nameOf(s *slot) string {
	if s == nil {
		return "neither slot"
	}
	return "slot " + s.String()
}

// agree refuses when the boot environment names another slot than the one that runs. That
// is right only between the flip and the boot that follows, which callers know about.
func (s *slots) agree(env map[string]string) error {
	byEnv := s.byNum(env["mender_boot_part"])
	if byEnv == nil {
		return withHint(refuse(
			"mender_boot_part=%q in the boot environment is the number of neither slot: it is %d for %s, %d for %s",
			env["mender_boot_part"], s.a.num, s.a, s.b.num, s.b),
			"the bootloader may lack the Mender integration, or its environment is another device's")
	}
	if s.running != nil && s.running != byEnv {
		return withHint(refuse("the slot that runs and the boot environment do not agree (%s)", strings.Join(s.why, "; ")),
			"reboot if a rollback or an install is waiting for it; else set mender_boot_part to the slot that runs")
	}
	return nil
}

// checkTarget refuses a slot that must not be written, before anything is: it exists, is
// neither mounted nor claimed, can be written and, in a device file system, is a device.
func (m *machine) checkTarget(t *slot) error {
	st, err := os.Stat(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return refuse("slot %s does not exist", t)
	}
	if err != nil {
		return refuse("slot %s: %w", t, err)
	}
	if st.Mode().IsRegular() && !inDev(strings.TrimPrefix(t.path, m.root)) {
		return nil
	}
	if st.Mode()&os.ModeDevice == 0 {
		return withHint(refuse("slot %s is not a device", t),
			"a program may have made a file where the device node should be; remove it and look for the node")
	}
	if char := st.Mode()&os.ModeCharDevice != 0; char != t.ubi {
		return refuse("slot %s: want a block device or a UBI volume", t)
	}
	all, err := m.mounts()
	if err != nil {
		return refuseUnlessPassing(err, "slot %s: %w", t, err)
	}
	for _, x := range all {
		trail, err := m.follow(x, all)
		if err != nil {
			return tryLater("slot %s: %w", t, err)
		}
		if t.isOn(trail) {
			return withHint(refuse("slot %s is mounted on %q", t, x.point),
				"unmount it; a slot is never written while it is in use")
		}
	}
	if t.ubi {
		return nil
	}
	ro, err := m.number("/sys/dev/block/" + deviceNumber(t.path) + "/ro")
	if err == nil && ro == 1 {
		err = refuse("slot %s is read-only", t)
	}
	return err
}
