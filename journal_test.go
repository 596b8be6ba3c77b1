// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// blankJournal is a journal in memory, never written to.
func blankJournal() *memDisk { return &memDisk{data: make([]byte, journalSize)} }

func mustRead(t testing.TB, st storage) (*journalFile, *record) {
	t.Helper()
	j, rec, damaged, _, err := readJournal(st)
	if err != nil || damaged != nil {
		t.Fatal(err, damaged)
	}
	return j, rec
}

// named is a record that can be told from others.
func named(name string) *record {
	return &record{Provides: map[string]string{"artifact_name": name, "other": strings.Repeat(name, 50)}}
}

func TestJournalSaves(t *testing.T) {
	d := blankJournal()
	j, rec := mustRead(t, d)
	if rec.Provides != nil || rec.Update != nil || rec.Last != nil {
		t.Errorf("an empty journal gives %+v", rec)
	}
	for i := range 5 {
		rec := named(fmt.Sprint("name ", i))
		rec.Update = &update{Step: stepInstall, Artifact: "ü\x00\"<", From: 2, To: 3,
			Checkpoint: &checkpoint{Offset: 1 << 40, Check: 0xfffffffe}}
		if err := j.save(rec); err != nil {
			t.Fatal(err)
		}
		next, got := mustRead(t, d)
		if !reflect.DeepEqual(got, rec) || next.seq != uint64(i+1) || next.next != (i+1)%2 {
			t.Errorf("save %d: got %+v, want %+v; %+v", i, got, rec, next)
		}
	}
	// A person can read it.
	if !bytes.Contains(d.data, []byte("mendlet-journal 1 seq=0000000000000005 len=")) ||
		!bytes.Contains(d.data, []byte(`"artifact_name":"name 4"`)) {
		t.Errorf("got %q", d.data[:200])
	}
}

func TestJournalSkipsSaveThatChangesNothing(t *testing.T) {
	d := blankJournal()
	j, _ := mustRead(t, d)
	rec := named("a")
	for range 3 {
		if err := j.save(rec); err != nil {
			t.Fatal(err)
		}
	}
	j, rec = mustRead(t, d)
	if err := j.save(rec); err != nil {
		t.Fatal(err)
	}
	if d.writes != 1 || d.syncs != 1 {
		t.Errorf("%d writes, %d syncs, want 1", d.writes, d.syncs)
	}
}

// The clock may lose its battery; the journal's time is a floor for it.
func TestJournalTimeNeverGoesBack(t *testing.T) {
	d := blankJournal()
	j, _ := mustRead(t, d)
	rec := named("a")
	rec.Time = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
	if err := j.save(rec); err != nil || rec.Time.Year() != 2100 {
		t.Errorf("%v, %v", rec.Time, err)
	}
	rec.Time = time.Time{}
	if err := j.save(rec); err != nil || rec.Time.Year() < 2020 {
		t.Errorf("%v, %v", rec.Time, err)
	}
}

// field case 22: the copy that is being written is torn at each byte, with the older copy's
// bytes or others behind. The journal then gives the record before or the new one.
func TestJournalTorn(t *testing.T) {
	t.Parallel()
	for _, rest := range []byte{0x00, 0xff, '7'} {
		d := blankJournal()
		j, _ := mustRead(t, d)
		for _, n := range []string{"one", "two"} {
			if err := j.save(named(n)); err != nil {
				t.Fatal(err)
			}
		}
		before := bytes.Clone(d.data)
		if err := j.save(named("three")); err != nil {
			t.Fatal(err)
		}
		size := 1500
		for n := 0; n <= size; n++ {
			torn := &memDisk{data: bytes.Clone(before)}
			copy(torn.data, d.data[:n])
			if rest != 0 { // sectors that came as neither old nor new
				copy(torn.data[n:], bytes.Repeat([]byte{rest}, 512-n%512))
			}
			k, rec := mustRead(t, torn)
			name := rec.Provides["artifact_name"]
			if name != "two" && (name != "three" || n < 200) {
				t.Fatalf("torn after %d bytes: %q", n, name)
			}
			if err := k.save(named("four")); err != nil {
				t.Fatal(err)
			}
			if _, rec := mustRead(t, torn); rec.Provides["artifact_name"] != "four" {
				t.Fatalf("torn after %d bytes: cannot go on", n)
			}
		}
	}
}

// field case 27: whatever is found, the journal can be used; what is bad is told.
func TestJournalDamage(t *testing.T) {
	t.Parallel()
	good := blankJournal()
	j, _ := mustRead(t, good)
	for _, n := range []string{"one", "two"} {
		if err := j.save(named(n)); err != nil {
			t.Fatal(err)
		}
	}
	forge := func(text string) func(b []byte) []byte { return func(b []byte) []byte { return []byte(text) } }
	sealed := func(head, body string) string {
		return fmt.Sprintf("%s crc=%08x\n%s", head, journalSum(head, []byte(body)), body)
	}
	for name, c := range map[string]struct {
		make    func(b []byte) []byte
		want    string // artifact name
		damaged bool
	}{
		"whole":             {func(b []byte) []byte { return b }, "two", false},
		"absent":            {forge(""), "", false},
		"zeros":             {func(b []byte) []byte { return make([]byte, len(b)) }, "", false},
		"ones":              {func(b []byte) []byte { return bytes.Repeat([]byte{0xff}, len(b)) }, "", true},
		"only the first":    {func(b []byte) []byte { return b[:journalCopySize] }, "one", false},
		"cut in the first":  {func(b []byte) []byte { return b[:100] }, "", true},
		"first copy lost":   {func(b []byte) []byte { clear(b[:journalCopySize]); return b }, "two", false},
		"second copy wrong": {func(b []byte) []byte { b[journalCopySize+200] ^= 1; return b }, "one", false},
		"both wrong":        {func(b []byte) []byte { b[200] ^= 1; b[journalCopySize+200] ^= 1; return b }, "", true},
		"copies swapped": {func(b []byte) []byte {
			return append(b[journalCopySize:],
				b[:journalCopySize]...)
		}, "two", false},
		"text":               {forge("hello\n"), "", true},
		"no line feed":       {forge(strings.Repeat("x", 70000)), "", true},
		"no numbers":         {forge("mendlet-journal \n"), "", true},
		"no CRC":             {forge("mendlet-journal 1 seq=0000000000000001 len=00000002\n{}"), "", true},
		"length too large":   {forge("mendlet-journal 1 seq=0000000000000001 len=ffffffff crc=00000000\n{}"), "", true},
		"length over 31 bit": {forge("mendlet-journal 1 seq=0000000000000001 len=80000000 crc=00000000\n{}"), "", true},
		"negative format":    {forge(sealed("mendlet-journal -1 seq=0000000000000001 len=00000002", "{}")), "", false},
		"no JSON":            {forge(sealed("mendlet-journal 1 seq=0000000000000001 len=00000002", "{]")), "", true},
		"JSON of wrong type": {forge(sealed("mendlet-journal 1 seq=0000000000000001 len=00000002", "[]")), "", true},
		"from the future": {forge(sealed("mendlet-journal 9 seq=00000000000000ff len=0000002e",
			`{"provides":{"artifact_name":"nine"},"new":[1]}`)), "", true},
		"future": {forge(sealed("mendlet-journal 9 seq=00000000000000ff len=0000002f",
			`{"provides":{"artifact_name":"nine"},"new":[1]}`)), "nine", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, journalName)
			was := c.make(bytes.Clone(good.data))
			if name != "absent" {
				writeFile(t, path, string(was))
			}
			rec, err := peekJournal(dir, nil)
			if err != nil || rec.Provides["artifact_name"] != c.want {
				t.Errorf("peek: %+v, %v", rec, err)
			}
			var said bytes.Buffer
			j, rec, err := openJournal(dir, &logger{level: levelInfo, sinks: []logSink{writerSink(&said)}})
			if err != nil {
				t.Fatal(err)
			}
			if rec.Provides["artifact_name"] != c.want || strings.Contains(said.String(), "damaged") != c.damaged {
				t.Errorf("%+v, said %q", rec, &said)
			}
			if strings.Contains(name, "future") && !c.damaged && !strings.Contains(said.String(), "newer mendlet (format 9)") {
				t.Errorf("said %q", &said)
			}
			aside, err := os.ReadFile(path + ".bad")
			if c.damaged != (err == nil) || c.damaged && !bytes.HasPrefix(aside, was[:min(len(was), journalSize)]) {
				t.Errorf("kept aside: %d bytes, %v", len(aside), err)
			}
			if err := j.save(named("next")); err != nil {
				t.Fatal(err)
			}
			j.close()
			if rec, err := peekJournal(dir, nil); err != nil || rec.Provides["artifact_name"] != "next" {
				t.Errorf("after a save: %+v, %v", rec, err)
			}
			if st, err := os.Stat(path); err != nil || st.Size() < journalSize {
				t.Errorf("size %v", err)
			}
		})
	}
}

// A read that fails is made again. A copy that cannot be read may be the newer one: nothing is
// decided then, and nothing saved over it.
func TestJournalReadError(t *testing.T) {
	d := &faultyDisk{memDisk: *blankJournal(), fault: func(string) error { return nil }}
	j, _ := mustRead(t, d)
	for _, n := range []string{"one", "two"} {
		if err := j.save(named(n)); err != nil {
			t.Fatal(err)
		}
	}
	for _, lost := range []int64{0, journalCopySize} {
		for failing := range readTries + 1 {
			left := failing
			d.reads = func(off int64) error {
				if off == lost && left > 0 {
					left--
					return syscall.EIO
				}
				return nil
			}
			_, rec, _, _, err := readJournal(d)
			if failing < readTries {
				if err != nil || rec.Provides["artifact_name"] != "two" {
					t.Errorf("copy at %d, %d reads fail: got %+v, %v", lost, failing, rec, err)
				}
			} else if !errors.Is(err, syscall.EIO) || exitCode(err) != exitTempFail || hintOf(err) == "" {
				t.Errorf("copy at %d cannot be read: got %+v, %v", lost, rec, err)
			}
		}
	}
}

// field cases 23 and 24: an error of a save says so and leaves the record before it.
func TestJournalSaveErrors(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(d *memDisk)
		want  string
	}{
		"write": {func(d *memDisk) {
			d.onWrite = func(*memDisk, []byte, int64) (int, error) { return 0, syscall.EROFS }
		}, "writing copy 2"},
		"sync":      {func(d *memDisk) { d.syncErr = syscall.EIO }, "syncing copy 2"},
		"read-back": {func(d *memDisk) { d.readErr = syscall.EIO }, "reading copy 2 back"},
		"corruption": {func(d *memDisk) {
			d.onWrite = func(d *memDisk, p []byte, off int64) (int, error) {
				n := copy(d.data[off:], p)
				d.data[off+int64(n)-3] ^= 4
				return n, nil
			}
		}, "reads back differently"},
	} {
		d := blankJournal()
		j, _ := mustRead(t, d)
		if err := j.save(named("one")); err != nil {
			t.Fatal(err)
		}
		c.spoil(d)
		if err := j.save(named("two")); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
		d.onWrite, d.syncErr, d.readErr = nil, nil, nil
		if _, rec := mustRead(t, d); rec.Provides["artifact_name"] != "one" && name != "sync" && name != "read-back" {
			t.Errorf("%s: got %q", name, rec.Provides["artifact_name"])
		}
		if err := j.save(named("three")); err != nil {
			t.Errorf("%s: then %v", name, err)
		}
		if _, rec := mustRead(t, d); rec.Provides["artifact_name"] != "three" {
			t.Errorf("%s: then %q", name, rec.Provides["artifact_name"])
		}
	}
}

func TestJournalIsBounded(t *testing.T) {
	d := blankJournal()
	j, _ := mustRead(t, d)
	fill := func(n int) *record { return &record{Provides: map[string]string{"k": strings.Repeat("v", n)}} }
	empty, _ := json.Marshal(&record{Provides: map[string]string{"k": ""}, Time: time.Now().UTC().Truncate(time.Second)})
	room := journalMax - len(empty)
	if err := j.save(fill(room)); err != nil {
		t.Errorf("the largest record: %v", err)
	}
	if err := j.save(fill(room + 1)); err == nil || !strings.Contains(err.Error(), fmt.Sprint("want ", journalMax)) {
		t.Errorf("one byte more: got %v", err)
	}
	if _, rec := mustRead(t, d); len(rec.Provides["k"]) != room {
		t.Errorf("the record before is gone")
	}
}

// field case 14 (SWUpdate 72a3f8ee): what another user put where the journal goes.
func TestJournalTraps(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, journalName)
	victim := writeTemp(t, "victim", []byte("kept"))
	if err := os.Symlink(victim, path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openJournal(dir, nil); !errors.Is(err, syscall.ELOOP) || hintOf(err) == "" {
		t.Errorf("a link to a file: got %v", err)
	}
	if got, _ := os.ReadFile(victim); string(got) != "kept" {
		t.Errorf("the link's target was written: %q", got)
	}
	os.Remove(path)
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openJournal(dir, nil); err == nil {
		t.Error("a directory was taken for a journal")
	}
	os.Remove(path)
	must(t, syscall.Mkfifo(path, 0o666)) // whose opening would wait for ever
	if _, _, err := openJournal(dir, nil); !errors.Is(err, errNotPlain) || hintOf(err) == "" {
		t.Errorf("a named pipe: got %v", err)
	}
	if _, err := peekJournal(dir, nil); !errors.Is(err, errNotPlain) {
		t.Errorf("a named pipe, to look at: got %v", err)
	}
	os.Remove(path)
	must(t, os.Symlink("/dev/null", path))
	if _, _, err := openJournal(dir, nil); !errors.Is(err, errNotPlain) {
		t.Errorf("a link to a character device: got %v", err)
	}
	os.Remove(path)
	if os.Geteuid() != 0 {
		t.Skip("needs root: chown")
	}
	writeFile(t, path, "")
	if err := os.Chown(path, 1, 1); err != nil {
		t.Skip("needs chown: ", err)
	}
	if _, _, err := openJournal(dir, nil); err == nil || !strings.Contains(err.Error(), "belongs to user 1") {
		t.Errorf("another user's file: got %v", err)
	}
}

// The journal of a device without a file system to write to lies in a raw partition.
func TestJournalOnPartition(t *testing.T) {
	for _, size := range []int64{journalSize, 1 << 20} {
		node, _ := loopDevice(t, size)
		dir := t.TempDir()
		if err := os.Symlink(node, filepath.Join(dir, journalName)); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			j, rec, err := openJournal(dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprint("name ", i-1); i > 0 && rec.Provides["artifact_name"] != want {
				t.Errorf("got %q, want %q", rec.Provides["artifact_name"], want)
			}
			if err := j.save(named(fmt.Sprint("name ", i))); err != nil {
				t.Fatal(err)
			}
			j.close()
		}
	}
	node, _ := loopDevice(t, journalCopySize)
	dir := t.TempDir()
	if err := os.Symlink(node, filepath.Join(dir, journalName)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openJournal(dir, nil); err == nil || !strings.Contains(err.Error(), "has 65536 bytes, want 131072") {
		t.Errorf("a partition that is too small: got %v", err)
	}
}

// field case 27: read-only. Those that only look still work.
func TestJournalReadOnly(t *testing.T) {
	needTool(t, "mkfs.ext4")
	node, _ := loopDevice(t, 8<<20)
	dir := t.TempDir()
	mount := func(options string) {
		t.Helper()
		if err := syscall.Mount(node, dir, "ext4", map[string]uintptr{"rw": 0, "ro": syscall.MS_RDONLY}[options],
			""); err != nil {
			t.Skip("needs mount: ", err)
		}
	}
	runTool(t, "", "mkfs.ext4", "-q", node)
	mount("rw")
	t.Cleanup(func() { syscall.Unmount(dir, 0) })
	j, _, err := openJournal(dir, nil)
	if err == nil {
		err = j.save(named("one"))
	}
	if err != nil {
		t.Fatal(err)
	}
	j.close()
	if err := syscall.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	mount("ro")
	if rec, err := peekJournal(dir, nil); err != nil || rec.Provides["artifact_name"] != "one" {
		t.Errorf("peek: %+v, %v", rec, err)
	}
	if _, _, err := openJournal(dir, nil); !errors.Is(err, syscall.EROFS) || hintOf(err) == "" {
		t.Errorf("open: got %v", err)
	}
}

// field case 29: a second one is told to come later, and the lock ends with its holder.
func TestJournalLock(t *testing.T) {
	dir := t.TempDir()
	j, _, err := openJournal(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.save(named("one")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openJournal(dir, nil); exitCode(err) != exitTempFail || hintOf(err) != "" {
		t.Errorf("got %v, want exit code %d", err, exitTempFail)
	}
	forked(t, filepath.Join(dir, journalName))
	j.close()
	j, rec, err := openJournal(dir, nil)
	if err != nil || rec.Provides["artifact_name"] != "one" {
		t.Errorf("%+v, %v", rec, err)
	}
	j.close()
	if st, err := os.Stat(filepath.Join(dir, journalName)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// FuzzJournal: nothing panics, and what is read is saved and read back the same.
func FuzzJournal(f *testing.F) {
	d := blankJournal()
	j, _, _, _, _ := readJournal(d)
	f.Add([]byte(""), false)
	for _, n := range []string{"one", "two"} {
		j.save(named(n))
		f.Add(bytes.TrimRight(d.data[:journalCopySize], "\x00"), false)
	}
	f.Add([]byte("mendlet-journal 1 seq=ffffffffffffffff len=00000002 crc=00000000\n{}"), true)
	f.Add([]byte(`{"provides":null,"update":{"step":"x","checkpoint":{"offset":-1}},`+
		`"time":"0001-01-01T00:00:00Z","net":{}}`), true)
	f.Fuzz(func(t *testing.T, text []byte, seal bool) {
		if seal && len(text) <= journalMax {
			head := journalHead(7, len(text))
			text = append(fmt.Appendf(nil, "%s crc=%08x\n", head, journalSum(head, text)), text...)
		}
		d := blankJournal()
		copy(d.data, text)
		j, rec, _, _, err := readJournal(d)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.save(rec); err != nil {
			if strings.Contains(err.Error(), "the record has") || strings.Contains(err.Error(), "year outside") {
				return
			}
			t.Fatal(err)
		}
		_, again, damaged, _, err := readJournal(d)
		if err != nil || damaged != nil {
			t.Fatal(err, damaged)
		}
		a, _ := json.Marshal(rec)
		b, _ := json.Marshal(again)
		if !bytes.Equal(a, b) {
			t.Errorf("saved %s, read %s", a, b)
		}
	})
}

func BenchmarkJournalSave(b *testing.B) {
	j, _, err := openJournal(b.TempDir(), nil)
	if err != nil {
		b.Fatal(err)
	}
	rec := named("one")
	rec.Update = &update{Step: stepDownload, Checkpoint: &checkpoint{}}
	b.ReportAllocs()
	for b.Loop() {
		rec.Update.Checkpoint.Offset++
		if err := j.save(rec); err != nil {
			b.Fatal(err)
		}
	}
}

// sink is a slot that takes everything and counts.
type sink struct{ size, written int64 }

func (s *sink) Size() int64 { return s.size }

func (s *sink) Close() error { return nil }

func (s *sink) Sync() error { return nil }

func (s *sink) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = 0xff
	}
	return len(p), nil
}

func (s *sink) WriteAt(p []byte, off int64) (int, error) {
	s.written += int64(len(p))
	return len(p), nil
}

// countedJournal is a journal's storage that adds up what is written to it.
type countedJournal struct {
	simStorage
	written, saves int64
}

func (c *countedJournal) WriteAt(p []byte, off int64) (int, error) {
	c.written, c.saves = c.written+int64(len(p)), c.saves+1
	return c.simStorage.WriteAt(p, off)
}

// What checkpoints wear out: journal bytes for an image of 1 GiB, when all of them are kept
// that may be, which a slow medium makes.
func TestJournalWear(t *testing.T) {
	t.Parallel()
	w := &world{}
	file := &simFile{name: "journal", durable: make([]byte, journalSize), current: make([]byte, journalSize)}
	st := &countedJournal{simStorage: simStorage{w, file}}
	j, rec, _, _, err := readJournal(st)
	if err != nil {
		t.Fatal(err)
	}
	rec.Provides = map[string]string{"artifact_name": "release-1", "rootfs-image.version": "release-1",
		"rootfs-image.checksum": fmt.Sprintf("%064x", 1)}
	rec.Update = &update{Step: stepDownload, Managed: true, ID: "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0",
		Artifact: "release-2", Sum: fmt.Sprintf("%064x", 2),
		Type: "rootfs-image", Provides: rec.Provides, Clears: []string{"artifact_group", "rootfs_image_checksum",
			"rootfs-image.*"}, From: 2, To: 3, Tries: 1,
		Request: []byte(`{"device_provides":{"artifact_name":"release-1","device_type":"beaglebone"}}`)}
	const size = 1 << 30
	opt := defaultWriteOptions()
	opt.keepPause = 0
	s := &slotWriter{dst: &sink{size: size}, name: "sink", size: size, opt: opt}
	off := int64(0)
	s.mark = func() (restartPoint, bool) {
		off += blockSize
		return restartPoint{Kind: "gzip", File: off / 3, Out: off}, true
	}
	s.checkpoint = func(c checkpoint) error {
		c.Slot, c.Source = "/dev/mmcblk0p3", sourceID{Name: "https://s3.example.com/mender-artifact-storage/0f1e2d3c-4b5a",
			Size: size / 3, Tag: `"0123456789abcdef0123456789abcdef-42"`}
		rec.Update.Checkpoint = &c
		return j.save(rec)
	}
	if err := errors.Join(s.takeHead(zeros{}), s.invalidate()); err != nil {
		t.Fatal(err)
	}
	if err := s.writeBody(context.Background(), io.LimitReader(zeros{}, size-headSize), headSize); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes in %d saves for each GiB installed", st.written, st.saves)
	if st.saves > size/(8<<20) || st.written > 256<<10 {
		t.Errorf("%d saves, %d bytes: want 128 and 256 KiB at most", st.saves, st.written)
	}
}

// What a journal of before says of an outcome is read, and what is written says the same to a
// program of before: the other slot may hold one.
func TestJournalOutcome(t *testing.T) {
	for _, c := range []struct {
		name, flags string // beside step and artifact
		want        update
		written     string // "": the same
	}{
		{"running", ``, update{}, ``},
		{"failed before anything was installed", `"failed":true`, update{Outcome: outcomeFailed}, ``},
		{"nothing is known to be as it was", `"failed":true,"rollback_failed":true`,
			update{Outcome: outcomeInconsistent}, ``},
		{"on the way back", `"failed":true,"rolled_back":true`, update{Outcome: outcomeRolledBack}, ``},
		{"the way back failed", `"failed":true,"rollback_failed":true,"rolled_back":true`,
			update{Outcome: outcomeInconsistent},
			`"failed":true,"rollback_failed":true`},
		{"a person asked for it", `"failed":true,"rolled_back":true,"asked":true`,
			update{Outcome: outcomeRolledBack, Known: true},
			`"failed":true,"rolled_back":true,"told":true`},
		{"told", `"failed":true,"told":true`, update{Outcome: outcomeFailed, Known: true}, ``},
		{"after the commit", `"post_commit":true`, update{Cause: "a state script of ArtifactCommit_Leave failed"}, ``},
		{"after the commit, with a cause", `"cause":"why","post_commit":true`, update{Cause: "why"}, ``},
		{"parked", `"parked":true`, update{Parked: true}, ``},
	} {
		before := `{"step":"Cleanup","artifact":"new"` + strings.TrimSuffix(","+c.flags, ",") + `}`
		var got update
		if err := json.Unmarshal([]byte(before), &got); err != nil {
			t.Fatal(err)
		}
		c.want.Step, c.want.Artifact = stepCleanup, "new"
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %+v, want %+v", c.name, got, c.want)
		}
		text, err := json.Marshal(&got)
		if err != nil {
			t.Fatal(err)
		}
		flags := map[string]any{}
		if err := json.Unmarshal(text, &flags); err != nil {
			t.Fatal(err)
		}
		for _, k := range []string{"step", "artifact", "sum", "type", "provides", "clears", "cause"} {
			delete(flags, k)
		}
		want := map[string]any{}
		if err := json.Unmarshal([]byte("{"+cmp.Or(c.written, c.flags)+"}"), &want); err != nil {
			t.Fatal(err)
		}
		delete(want, "cause")
		if !reflect.DeepEqual(flags, want) {
			t.Errorf("%s: written as %v, want %v", c.name, flags, want)
		}
	}
	// A deployment in its last steps has its verdict in the record, and says so.
	text, err := json.Marshal(&update{Step: stepReport, Managed: true})
	if err != nil || !strings.Contains(string(text), `"settled":true`) {
		t.Errorf("got %s, %v", text, err)
	}
}
