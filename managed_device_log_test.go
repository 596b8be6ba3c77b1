// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func logNames(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func readMessages(t *testing.T, path string) []deployLogEntry {
	t.Helper()
	body, err := deployLogBody(path)
	if err != nil {
		t.Fatal(err)
	}
	var r struct{ Messages []deployLogEntry }
	if err := json.Unmarshal(body, &r); err != nil {
		t.Fatalf("%v in %.200s", err, body)
	}
	if len(body) > 1<<20 {
		t.Fatalf("got %d bytes, a server takes 1 MiB", len(body))
	}
	return r.Messages
}

func TestDeployLog(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.FixedZone("x", 3600))
	for _, msg := range []string{"one <1>", "two\nlines", ""} { // opened anew each time, as after a restart
		l, err := openDeployLog(dir, "id-1")
		if err != nil {
			t.Fatal(err)
		}
		l.add(at, levelInfo, msg)
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "deployments.0000.id-1.log")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"timestamp":"2026-01-02T02:04:05.000000678Z","level":"info","message":"one <1>"}` + "\n" +
		`{"timestamp":"2026-01-02T02:04:05.000000678Z","level":"info","message":"two\nlines"}` + "\n"
	if string(text) != want {
		t.Fatalf("got %s", text)
	}
	if got := readMessages(t, path); len(got) != 2 || got[1].Message != "two\nlines" {
		t.Fatalf("got %v", got)
	}
}

// Field case 4: an id that is not one never becomes a file name.
func TestDeployLogID(t *testing.T) {
	dir := t.TempDir()
	for _, id := range []string{"", "../x", "a/b", "a.b", "*", "[a]", "-x\x00", strings.Repeat("a", 65)} {
		if _, err := openDeployLog(dir, id); err == nil {
			t.Errorf("%q: want an error", id)
		}
	}
	if got := logNames(t, dir); len(got) != 0 {
		t.Errorf("got files %q", got)
	}
}

func TestDeployLogRotation(t *testing.T) {
	dir := t.TempDir()
	// One of each kind that Mender's clients leave, and a file that is none of ours.
	for _, n := range []string{"deployments.0001.old-g.log", "other.log", "deployments.1.x.log"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		l, err := openDeployLog(dir, fmt.Sprint("id-", i))
		if err != nil {
			t.Fatal(err)
		}
		l.close()
	}
	want := []string{"deployments.0000.id-5.log", "deployments.0001.id-4.log", "deployments.0002.id-3.log",
		"deployments.0003.id-2.log", "deployments.0004.id-1.log", "deployments.1.x.log", "other.log"}
	if got := logNames(t, dir); !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	// An older deployment that goes on after all keeps its file.
	l, err := openDeployLog(dir, "id-3")
	if err != nil {
		t.Fatal(err)
	}
	l.close()
	if got := logNames(t, dir); !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

// A link that someone put there is not followed (field case 14).
func TestDeployLogSymlink(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	if err := os.Symlink(target, filepath.Join(dir, "deployments.0000.id.log")); err != nil {
		t.Fatal(err)
	}
	if _, err := openDeployLog(dir, "id"); err == nil {
		t.Error("a link was followed")
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("its target was made")
	}
}

// Mender 39f4a3d6 and integration test_bad_depl_log: a torn line made the server answer 400
// for ever.
func TestDeployLogCorrupt(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "deployments.0000.id.log")
	good := `{"timestamp":"2024-01-02T03:04:05Z","level":"info","message":"good"}`
	bad := []string{"garbage", `{"timestamp":"yesterday","level":"info","message":"m"}`, `{"level":"info","message":"m"}`,
		`{"timestamp":"2024-01-02T03:04:05Z","message":"m"}`, `{"timestamp":"2024-01-02T03:04:05Z","level":"info","message":""}`,
		`[]`, "\x00\x00\x00", `{"timestamp":"2024-01-02T03:04:05Z","level":"in`}
	if err := os.WriteFile(path, []byte(strings.Join(append(slices.Clone(bad[:7]), good, bad[7]), "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := openDeployLog(dir, "id")
	if err != nil {
		t.Fatal(err)
	}
	l.add(time.Now(), levelError, "after the cut")
	l.close()
	got := readMessages(t, path)
	if len(got) != 1+len(bad)+2 {
		t.Fatalf("got %d messages: %v", len(got), got)
	}
	if got[0] != (deployLogEntry{"2024-01-02T03:04:05Z", "error", noteCorrupted}) {
		t.Errorf("got first %v", got[0])
	}
	for i, m := range got {
		isBad := i >= 1 && i <= 7 || i == 9
		if (m.Message == corruptedMessage) != isBad || m.Timestamp == "" {
			t.Errorf("entry %d: got %v", i, m)
		}
	}
	if got[8].Message != "good" || got[10].Message != "after the cut" {
		t.Errorf("got %v", got)
	}
}

func TestDeployLogEmpty(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	body, err := deployLogBody(path)
	if err != nil || string(body) != `{"messages":[]}` {
		t.Fatalf("got %s, %v", body, err)
	}
}

func TestDeployLogTooBig(t *testing.T) {
	dir := t.TempDir()
	l, err := openDeployLog(dir, "id")
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	n := 0
	fill := func(until int64) {
		for l.size < until {
			n++
			l.add(time.Now(), levelInfo, fmt.Sprint(n, " ", strings.Repeat("<", 1000)))
		}
	}
	fill(2 << 20)
	check := func() {
		t.Helper()
		got := readMessages(t, l.path)
		if got[0].Message != noteTooBig || got[0].Level != "warning" {
			t.Errorf("got first %v", got[0])
		}
		if !strings.HasPrefix(got[len(got)-1].Message, fmt.Sprint(n, " ")) || len(got) < 800 {
			t.Errorf("got %d messages, the last %.20q, want %d", len(got), got[len(got)-1].Message, n)
		}
		for i := range got[:len(got)-1] {
			if got[i].Message == corruptedMessage {
				t.Fatalf("message %d is corrupt", i)
			}
		}
	}
	check()
	// On disk it is bounded, and says so.
	fill(deployLogMax)
	for range 10 {
		n++
		l.add(time.Now(), levelInfo, fmt.Sprint(n, " ", strings.Repeat("<", 1000)))
	}
	if l.size > deployLogMax/2 {
		t.Errorf("got %d bytes", l.size)
	}
	check()
}

// A disk that is full or gone does not disturb an update.
func TestDeployLogWriteError(t *testing.T) {
	l, err := openDeployLog(t.TempDir(), "id")
	if err != nil {
		t.Fatal(err)
	}
	l.f.Close()
	l.add(time.Now(), levelInfo, "x")
	if l.size != 0 {
		t.Errorf("got size %d", l.size)
	}
}

func FuzzDeployLogBody(f *testing.F) {
	f.Add([]byte(`{"timestamp":"2024-01-02T03:04:05Z","level":"info","message":"good"}` + "\nx\n"))
	f.Add([]byte("\n\n\x00"))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, m := range readMessages(t, path) {
			if m.Timestamp == "" || m.Level == "" || m.Message == "" {
				t.Fatalf("got %v", m)
			}
		}
	})
}
