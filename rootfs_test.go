// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestRefuseOpen(t *testing.T) {
	for errno, want := range map[syscall.Errno]string{syscall.EBUSY: "is busy", syscall.EROFS: "is read-only",
		syscall.ENOENT: "does not exist", syscall.ENXIO: "no such device"} {
		if err := refuseOpen(&slot{letter: "B", path: "x"},
			&os.PathError{Op: "open", Path: "x", Err: errno}); exitCode(err) != exitRefused ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%v: got %v", errno, err)
		}
	}
}

func TestBootEnvRefusals(t *testing.T) {
	for _, c := range []struct {
		vars map[string]string
		want string
	}{
		{map[string]string{}, ""},
		{map[string]string{varUpgrade: "0", varCanaryCheck: "1", varCanary: "1"}, ""},
		{map[string]string{varCanaryCheck: "0"}, ""},
		{map[string]string{varCanaryCheck: "1"}, "never saved its environment"},
		{map[string]string{varUpgrade: "1"}, `already "1"`},
		{map[string]string{varUpgrade: "2"}, `already "2"`},
	} {
		err := checkBootEnv(c.vars)
		if (err == nil) != (c.want == "") || err != nil &&
			(!strings.Contains(err.Error(), c.want) || exitCode(err) != exitRefused || hintOf(err) == "") {
			t.Errorf("%v: got %v, want %q", c.vars, err, c.want)
		}
	}
}

// field case 28 (mender#623, #97): what the bootloader left, and what each state then does.
func TestRootfsStates(t *testing.T) {
	t.Parallel()
	const committed, rolledBack = "part=3 up=0", "part=2 up=0"
	for name, c := range map[string]struct {
		state, env, running, wantErr, after string
	}{
		"install":       {"ArtifactInstall", "part=2 up=0", "A", "", "part=3 up=1"},
		"install again": {"ArtifactInstall", "part=3 up=1", "A", "", "part=3 up=1"},
		"install, environment changed": {"ArtifactInstall", "part=3 up=0", "B",
			"changed since the image was written", "part=3 up=0"},
		"install, another is pending": {"ArtifactInstall", "part=2 up=1", "A", "already", "part=2 up=1"},
		"verify":                      {"ArtifactVerifyReboot", "part=3 up=1", "B", "", "part=3 up=1"},
		"verify, not rebooted": {"ArtifactVerifyReboot", "part=3 up=1", "A",
			"has not been booted", "part=3 up=1"},
		"verify, fell back":                  {"ArtifactVerifyReboot", "part=2 up=0", "A", "was reverted", "part=2 up=0"},
		"verify, unknown side":               {"ArtifactVerifyReboot", "part=7 up=1", "B", "was reverted", "part=7 up=1"},
		"commit":                             {"ArtifactCommit", "part=3 up=1", "B", "", committed},
		"commit in initramfs":                {"ArtifactCommit", "part=3 up=1", "none", "", committed},
		"commit, new side but upgrade was 0": {"ArtifactCommit", "part=3 up=0", "B", "", committed},
		"commit, old side, upgrade 0":        {"ArtifactCommit", "part=2 up=0", "A", "was reverted", rolledBack},
		"commit, env new, old runs":          {"ArtifactCommit", "part=3 up=0", "A", "was reverted", "part=3 up=0"},
		"rollback":                           {"ArtifactRollback", "part=3 up=1", "B", "", rolledBack},
		"rollback before reboot":             {"ArtifactRollback", "part=3 up=1", "A", "", rolledBack},
		"rollback, bootloader did":           {"ArtifactRollback", "part=2 up=0", "A", "", rolledBack},
		"rollback, unknown side":             {"ArtifactRollback", "part=7 up=1", "B", "", rolledBack},
		"verify rollback":                    {"ArtifactVerifyRollbackReboot", "part=2 up=0", "A", "", rolledBack},
		"verify rollback, still up":          {"ArtifactVerifyRollbackReboot", "part=2 up=1", "A", "still 1", "part=2 up=1"},
		"verify rollback, new still runs": {"ArtifactVerifyRollbackReboot", "part=2 up=0", "B",
			"do not agree", rolledBack},
		"failure does nothing": {"ArtifactFailure", "part=2 up=0", "A", "", rolledBack},
	} {
		t.Run(name, func(t *testing.T) {
			b := newImageBoard(t)
			var part, up string
			fmt.Sscanf(c.env, "part=%s up=%s", &part, &up)
			b.setEnv(t, map[string]string{varBootPart: part, varBootPartHex: part, varUpgrade: up})
			r := b.rootfs(t, c.running, &update{From: 2, To: 3})
			err := r.call(t.Context(), c.state)
			if (err == nil) != (c.wantErr == "") || err != nil && !strings.Contains(err.Error(), c.wantErr) {
				t.Errorf("got %v, want %q", err, c.wantErr)
			}
			v := b.env(t)
			if got := fmt.Sprintf("part=%s up=%s", v[varBootPart], v[varUpgrade]); got != c.after ||
				v[varBootPart] != v[varBootPartHex] {
				t.Errorf("environment %s, want %s", got, c.after)
			}
		})
	}
}

// What comes before the first write says nothing of the update: it waits at its step, and the bootloader goes
// back at the next boot if nothing else does.
func TestRootfsUndecided(t *testing.T) {
	t.Parallel()
	u := &update{From: 2, To: 3}
	for name, c := range map[string]struct {
		state, running string
		spoil          func(b *imageBoard)
		want           int
		after          string // mender_boot_part and upgrade_available
	}{
		"verify, environment away":     {"ArtifactVerifyReboot", "B", envAway, exitTempFail, "3 1"},
		"commit, environment away":     {"ArtifactCommit", "B", envAway, exitTempFail, "3 1"},
		"rollback, environment away":   {"ArtifactRollback", "B", envAway, exitTempFail, "3 1"},
		"install, environment away":    {"ArtifactInstall", "B", envAway, exitRefused, "3 1"},
		"verify, no configuration":     {"ArtifactVerifyReboot", "B", noFwConfig, exitRefused, "3 1"},
		"commit, no configuration":     {"ArtifactCommit", "B", noFwConfig, exitRefused, "3 1"},
		"rollback, no configuration":   {"ArtifactRollback", "B", noFwConfig, exitTempFail, "3 1"},
		"rollback, slots not known":    {"ArtifactRollback", "B", noSlots, exitTempFail, "3 1"},
		"commit, running not known":    {"ArtifactCommit", "", nil, exitRefused, "3 1"},
		"rollback, running not known":  {"ArtifactRollback", "", nil, exitOK, "2 0"},
		"commit, cannot be written":    {"ArtifactCommit", "B", readOnlyEnv, exitTempFail, "3 1"},
		"rollback, cannot be written":  {"ArtifactRollback", "B", readOnlyEnv, exitTempFail, "3 1"},
		"rollback, another's, no slot": {"ArtifactRollback", "B", otherSlots, exitFailed, "3 1"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newImageBoard(t)
			b.setEnv(t, map[string]string{varBootPart: "3", varBootPartHex: "3", varUpgrade: "1"})
			if c.spoil != nil {
				c.spoil(b)
			}
			r := b.rootfs(t, c.running, u)
			open := r.m.open
			r.m.open = func(path string, how openMode) (storage, error) {
				if how != openRead && b.conf["read-only"] != nil {
					return nil, &os.PathError{Op: "open", Path: path, Err: syscall.EROFS}
				}
				return open(path, how)
			}
			err := r.call(t.Context(), c.state)
			var touched *envChangeError
			if exitCode(err) != c.want || errors.As(err, &touched) {
				t.Errorf("got %v, exit code %d, want %d", err, exitCode(err), c.want)
			}
			for _, name := range []string{"env", "fw_env.config"} {
				if _, err := os.Stat(b.dir + "/" + name + ".away"); err == nil {
					must(t, os.Rename(b.dir+"/"+name+".away", b.dir+"/"+name))
				}
			}
			if v := b.env(t); v[varBootPart]+" "+v[varUpgrade] != c.after {
				t.Errorf("got %v, want %s", v, c.after)
			}
		})
	}
	// Where it is not known what runs, a reboot makes it known.
	b := newImageBoard(t)
	if got, err := b.rootfs(t, "", u).query(t.Context(), "NeedsArtifactReboot"); got != "Automatic" || err != nil {
		t.Errorf("running not known: got %q, %v", got, err)
	}
}

// A commit is one write, of boot part and upgrade_available together, and none where it is there.
func TestCommitIsOneWrite(t *testing.T) {
	b := newImageBoard(t)
	b.setEnv(t, map[string]string{varBootPart: "3", varBootPartHex: "2", varUpgrade: "1"})
	r := b.rootfs(t, "B", &update{From: 2, To: 3})
	writes := 0
	open := r.m.open
	r.m.open = func(path string, how openMode) (storage, error) {
		st, err := open(path, how)
		if how == openWrite {
			writes++
		}
		return st, err
	}
	for range 2 {
		must(t, r.call(t.Context(), "ArtifactCommit"))
		if v := b.env(t); writes != 1 || v[varBootPart] != "3" || v[varBootPartHex] != "3" || v[varUpgrade] != "0" {
			t.Errorf("%d writes, %v", writes, v)
		}
	}
}

func envAway(b *imageBoard)     { os.Rename(b.dir+"/env", b.dir+"/env.away") }
func noFwConfig(b *imageBoard)  { os.Rename(b.dir+"/fw_env.config", b.dir+"/fw_env.config.away") }
func readOnlyEnv(b *imageBoard) { b.conf["read-only"] = true }
func noSlots(b *imageBoard)     { b.conf["RootfsPartA"] = "" }
func otherSlots(b *imageBoard)  { b.a = b.dir + "/p9" }

// field case 27, cloned storage: the update of another device, whose partitions are not here.
func TestRollbackOfAnotherDevice(t *testing.T) {
	b := newImageBoard(t)
	r := b.rootfs(t, "A", &update{From: 5, To: 6})
	for _, state := range []string{"ArtifactInstall", "ArtifactVerifyReboot", "ArtifactCommit", "ArtifactRollback"} {
		if err := r.call(t.Context(), state); err == nil {
			t.Errorf("%s of another device's update succeeded", state)
		}
	}
	if v := b.env(t); v[varBootPart] != "2" || v[varUpgrade] != "0" {
		t.Errorf("the environment changed: %v", v)
	}
}

func TestNeedsReboot(t *testing.T) {
	for _, c := range []struct{ running, part, want string }{{"A", "2", "No"}, {"A", "3", "Automatic"}, {"B", "3", "No"},
		{"none", "2", "Automatic"}} {
		b := newImageBoard(t)
		b.setEnv(t, map[string]string{varBootPart: c.part})
		got, err := b.rootfs(t, c.running, &update{}).query(t.Context(), "NeedsArtifactReboot")
		if err != nil || got != c.want {
			t.Errorf("%+v: got %q, %v", c, got, err)
		}
	}
}

// What deflate data may refer to is in the slot, but for the head, which is kept back, and zeros there.
func TestWindowOfHead(t *testing.T) {
	t.Parallel()
	image := noise(1, 3*gzipWindow)
	for _, head := range []int{0, 4096, gzipWindow, 2 * gzipWindow} {
		slot := bytes.Clone(image)
		clear(slot[:head])
		w := &slotWriter{dst: &memDisk{data: slot}, head: image[:head]}
		for _, end := range []int{0, 1, 4095, 4097, gzipWindow, gzipWindow + 1, gzipWindow + 4096,
			2*gzipWindow + 9, 3 * gzipWindow} {
			got, err := w.window(int64(end))
			if err != nil || !bytes.Equal(got, image[max(end-gzipWindow, 0):end]) {
				t.Errorf("head of %d: the window before byte %d is another one: %d bytes, %v", head, end, len(got), err)
			}
		}
	}
}
