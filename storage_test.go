// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestReadUncached(t *testing.T) {
	d, path := fileStorage(t, 0)
	text := testBlocks(10000)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ off, n int }{{0, 1}, {0, 4096}, {1, 4096}, {4095, 2}, {8000, 2000},
		{9999, 1}, {0, 10000}} {
		p := make([]byte, c.n)
		if err := readUncached(d, p, int64(c.off)); err != nil || !bytes.Equal(p, text[c.off:c.off+c.n]) {
			t.Errorf("%d at %d: %v", c.n, c.off, err)
		}
	}
	for _, c := range []struct{ off, n int }{{9999, 2}, {10000, 1}, {20000, 5}} {
		if err := readUncached(d, make([]byte, c.n), int64(c.off)); err != io.ErrUnexpectedEOF {
			t.Errorf("%d at %d: got %v, want %v", c.n, c.off, err, io.ErrUnexpectedEOF)
		}
	}
}

// field case 25: opening what is not there makes no file.
func TestOpenStorageNeverCreates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mmcblk0p9")
	for _, how := range []openMode{openRead, openWrite, openSlot} {
		if _, err := openStorage(path, how); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("mode %d: got %v", how, err)
		}
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("a file was made")
	}
}

// Nothing that is put where a file should be makes its opening wait.
func TestOpenPlain(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, dir, "/dev/null"} {
		if _, err := readPlain(path); !errors.Is(err, errNotPlain) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v", path, err)
		}
		for _, how := range []openMode{openRead, openWrite, openSlot} {
			if _, err := openStorage(path, how); !errors.Is(err, errNotPlain) && !errors.Is(err, syscall.EISDIR) {
				t.Errorf("%s, mode %d: got %v", path, how, err)
			}
		}
	}
	if got, err := readPlain(writeTemp(t, "file", []byte("text"))); string(got) != "text" || err != nil {
		t.Errorf("a file: got %q, %v", got, err)
	}
}

// A lock is waited for, as long as was asked and no longer than the run; what is no question of time
// is said at once.
func TestFlock(t *testing.T) {
	path := writeTemp(t, "lock", nil)
	open := func() *os.File {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	first, second := open(), open()
	var slept time.Duration
	sleep := func(ctx context.Context, d time.Duration) error { slept += d; return ctx.Err() }
	if err := flock(t.Context(), first, 0, nil); err != nil {
		t.Fatal(err)
	}
	if err := flock(t.Context(), second, 0, nil); !errors.Is(err, errLocked) || slept != 0 {
		t.Errorf("no time to wait: got %v after %v", err, slept)
	}
	if err := flock(t.Context(), second, time.Second, sleep); !errors.Is(err, errLocked) || slept != time.Second {
		t.Errorf("a second to wait: got %v after %v", err, slept)
	}
	ctx, stop := context.WithCancel(t.Context())
	free := func(_ context.Context, d time.Duration) error {
		if slept -= d; slept == 0 {
			first.Close()
		}
		return nil
	}
	if err := flock(ctx, second, time.Hour, free); err != nil {
		t.Errorf("released meanwhile: got %v", err)
	}
	stop()
	if err := flock(ctx, open(), time.Hour, sleep); !errors.Is(err, context.Canceled) {
		t.Errorf("told to end: got %v", err)
	}
	pipe, _, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe.Close()
	if err := flock(t.Context(), pipe, time.Hour, sleep); err == nil || errors.Is(err, errLocked) {
		t.Errorf("a file that is closed: got %v", err)
	}
}

func TestWriteFileDurably(t *testing.T) {
	dir := t.TempDir()
	path, victim := filepath.Join(dir, "f"), writeTemp(t, "victim", []byte("kept"))
	// field case 14: a link where the temporary file goes is not followed.
	if err := os.Symlink(victim, path+".tmp"); err != nil {
		t.Fatal(err)
	}
	if err := writeFileDurably(path, []byte("new"), 0o640); err != nil {
		t.Fatal(err)
	}
	st, _ := os.Lstat(path)
	got, _ := os.ReadFile(path)
	old, _ := os.ReadFile(victim)
	if string(got) != "new" || string(old) != "kept" || st.Mode() != 0o640 {
		t.Errorf("got %q, %v; the link's target %q", got, st.Mode(), old)
	}
	if all, _ := os.ReadDir(dir); len(all) != 1 {
		t.Errorf("left over: %v", all)
	}
}
