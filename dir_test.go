// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func dirOf(t *testing.T, path string) *dir {
	t.Helper()
	d, err := openDir(path)
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

// What is done in a directory stays in it, when something else has taken its name since it was opened.
func TestDirIsHeld(t *testing.T) {
	top, other := t.TempDir(), t.TempDir()
	path := filepath.Join(top, "d")
	must(t, os.Mkdir(path, 0o755))
	d := dirOf(t, path)
	must(t, os.Rename(path, path+".moved"))
	must(t, os.Symlink(other, path))
	must(t, d.write("a", []byte("x"), 0o600))
	must(t, d.mkdir("sub"))
	must(t, d.mkfifo("pipe"))
	s, err := d.way(true, "sub", "deep")
	must(t, err)
	must(t, s.write("b", []byte("y"), 0o640))
	must(t, s.Close())
	if err := s.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed twice: got %v", err)
	}
	if names, err := d.names(); err != nil || !slices.Equal(names, []string{"a", "pipe", "sub"}) {
		t.Errorf("got %q, %v", names, err)
	}
	if text, err := readClose(d.open("a", os.O_RDONLY, 0)); string(text) != "x" || err != nil {
		t.Errorf("got %q, %v", text, err)
	}
	must(t, d.rename("a", "c"))
	for _, name := range []string{"c", "sub", "pipe", "missing"} {
		must(t, d.removeAll(name))
	}
	for _, p := range []string{path + ".moved", other} {
		if list, err := os.ReadDir(p); err != nil || len(list) != 0 {
			t.Errorf("%s: got %v, %v", p, list, err)
		}
	}
}

// No call follows a link, waits for a pipe, or writes to what is somebody's under another name.
func TestDirTraps(t *testing.T) {
	top := t.TempDir()
	victim := writeTemp(t, "victim", []byte("kept"))
	tree := filepath.Join(t.TempDir(), "tree")
	must(t, os.Mkdir(tree, 0o755))
	writeFile(t, filepath.Join(tree, "mine"), "kept")
	must(t, os.Symlink(victim, filepath.Join(top, "file")))
	must(t, os.Symlink(tree, filepath.Join(top, "dir")))
	must(t, os.Symlink(filepath.Join(tree, "new"), filepath.Join(top, "dangling")))
	must(t, syscall.Mkfifo(filepath.Join(top, "pipe"), 0o666))
	must(t, os.WriteFile(filepath.Join(top, "named"), nil, 0o600))
	must(t, os.Link(filepath.Join(top, "named"), filepath.Join(top, "twice")))
	d := dirOf(t, top)
	rw := os.O_RDWR | os.O_CREATE
	for name, want := range map[string]error{"file": syscall.ELOOP, "dir": syscall.ELOOP,
		"dangling": syscall.ELOOP, "pipe": errNotPlain, "../x": syscall.EINVAL, "..": syscall.EINVAL, "": syscall.EINVAL} {
		if _, err := d.open(name, rw, 0o600); !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", name, err, want)
		}
	}
	if _, err := d.open("twice", rw, 0o600); err == nil || !strings.Contains(err.Error(), "file of 2 names") {
		t.Errorf("a hard link: got %v", err)
	}
	if _, err := d.open("twice", os.O_RDONLY, 0); err != nil {
		t.Errorf("a hard link, to read: got %v", err)
	}
	if _, err := d.sub("file"); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("a link to a file as a directory: got %v", err)
	}
	if _, err := d.sub("named"); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("a file as a directory: got %v", err)
	}
	_, err := d.follow("dangling", rw, 0o600)
	if err == nil || errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), tree+"/new") {
		t.Errorf("a link that leads nowhere: got %v", err)
	}
	for _, name := range []string{"file", "dir", "dangling", "pipe"} {
		must(t, d.write(name+".x", nil, 0o600))
		must(t, d.rename(name+".x", name)) // in the place of the link
	}
	for path, want := range map[string]string{victim: "kept", filepath.Join(tree, "mine"): "kept"} {
		if text, _ := os.ReadFile(path); string(text) != want {
			t.Errorf("%s: got %q", path, text)
		}
	}
	if list, _ := os.ReadDir(tree); len(list) != 1 {
		t.Errorf("in the link's directory: %v", list)
	}
}

// A link of ours is a feature where it is asked for; what another user has put there is not.
func TestDirLinks(t *testing.T) {
	top, tree := t.TempDir(), t.TempDir()
	writeFile(t, filepath.Join(tree, "file"), "text")
	d := dirOf(t, top)
	must(t, os.Symlink(tree, filepath.Join(top, "dir")))
	must(t, os.Symlink("dir/file", filepath.Join(top, "file"))) // relative to the directory, not to us
	check := func(follow, sub bool) {
		t.Helper()
		text, err := readClose(d.follow("file", os.O_RDONLY, 0))
		if (string(text) == "text") != follow || (err == nil) != follow {
			t.Errorf("file: got %q, %v", text, err)
		}
		s, err := d.sub("dir")
		if (err == nil) != sub || !sub && !strings.Contains(err.Error(), "belongs to user 1") {
			t.Errorf("directory: got %v", err)
		}
		if err == nil {
			s.Close()
		}
	}
	check(true, true)
	if os.Geteuid() != 0 {
		t.Skip("needs root: chown")
	}
	must(t, os.Lchown(filepath.Join(top, "file"), 1, 1))
	check(false, true)
	must(t, os.Lchown(filepath.Join(top, "dir"), 1, 1))
	check(false, false)
	must(t, os.Lchown(filepath.Join(top, "dir"), 0, 0))
	must(t, os.Chown(tree, 1, 1))
	check(false, false)
}
