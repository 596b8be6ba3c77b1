// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A datastore that is a link to what is not mounted is no empty one, for verbs that look, too.
func TestDanglingDatastore(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(300000))
	ds, away := filepath.Join(b.dir, "ds"), filepath.Join(b.dir, "data-partition/mender")
	must(t, os.Rename(ds, ds+".old"))
	must(t, os.Symlink(away, ds))
	for _, words := range [][]string{{"status"}, {"plan", art}, {"show-provides"}, {"show-artifact"}, {"install", art},
		{"commit"}, {"resume"}} {
		out, errs := b.must(t, exitFailed, words...)
		if want := fmt.Sprintf("%q is a link to %q, which is not there", ds, away); out != "" ||
			!strings.Contains(errs, want) || !strings.Contains(errs, "hint: mount") {
			t.Errorf("%q: %s%s", words, out, errs)
		}
	}
	b.must(t, exitOK, "show", art)
	// A link on the way to it.
	must(t, os.Remove(ds))
	must(t, os.Symlink(filepath.Dir(away), filepath.Join(b.dir, "link")))
	must(t, os.Symlink("link/mender", ds))
	if _, errs := b.must(t, exitFailed, "status"); !strings.Contains(errs, `is a link to "link/mender"`) {
		t.Errorf("status: %s", errs)
	}
	must(t, os.MkdirAll(away, 0o755))
	if out, _ := b.must(t, exitOK, "status"); !strings.Contains(out, "update in progress: none") {
		t.Errorf("a link to a place that is there: %s", out)
	}
	// One that is not there yet is empty.
	must(t, os.Remove(ds))
	b.must(t, exitOK, "status")
}

// A datastore without room, or without room for another file, is called that.
func TestFullDatastore(t *testing.T) {
	for _, c := range []struct{ options, want string }{
		{"size=64k", "is on a file system that is full ("},
		{"nr_inodes=2", "is on a file system that can hold no more files (no inodes left"},
	} {
		b := newImageBoard(t)
		art := b.pack(t, "release-2", testBlocks(300000))
		ds := filepath.Join(b.dir, "ds")
		if out, err := exec.Command("mount", "-t", "tmpfs", "-o", c.options, "none", ds).CombinedOutput(); err != nil {
			t.Skipf("needs mount and root: %v: %s", err, out)
		}
		defer exec.Command("umount", ds).Run()
		writeFile(t, filepath.Join(ds, "device_type"), "device_type=testboard\n")
		_, errs := b.must(t, exitTempFail, "install", art) // someone may make room
		if !strings.Contains(errs, fmt.Sprintf("error: datastore %q %s", ds, c.want)) ||
			!strings.Contains(errs, "hint: make room there") || strings.Count(errs, "hint: ") != 1 {
			t.Errorf("%s: %s", c.options, errs)
		}
	}
	if what := fullness(t.TempDir()); what != "" {
		t.Errorf("got %q of a file system that has room", what)
	}
}
