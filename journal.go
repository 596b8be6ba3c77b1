// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// The journal is one file of two copies. A copy is a header line
//
//	mendlet-journal 1 seq=00000000000000a7 len=00000312 crc=5a0c9a1e
//
// followed by len bytes of JSON; the CRC-32 (IEEE) is over the line up to " crc=" and the
// JSON. A save overwrites the older copy, so a write that is torn leaves the newer one. What
// stands behind the JSON is left over from longer records and means nothing.
const (
	journalCopySize = 64 << 10
	journalSize     = 2 * journalCopySize
	journalMagic    = "mendlet-journal"
	journalFormat   = 1
	journalHeadLen  = len(journalMagic) + len(" 1 seq=0123456789abcdef len=01234567 crc=01234567\n")
	journalMax      = journalCopySize - journalHeadLen
)

// record is all that outlives a run.
type record struct {
	Provides map[string]string `json:"provides"` // with artifact_name and artifact_group; without artifact_name nothing was ever installed here
	Update   *update           `json:"update,omitempty"`
	Last     *verdict          `json:"last,omitempty"`
	Time     time.Time         `json:"time"` // of the save: a floor for a clock that is not set
	Net      *netState         `json:"net,omitempty"`
}

// verdict is how an update ended.
type verdict struct {
	Artifact string    `json:"artifact"`
	ID       string    `json:"id,omitempty"` // deployment
	Sum      string    `json:"sum,omitempty"`
	Result   string    `json:"result"` // committed, rolled-back, failed, inconsistent
	Cause    string    `json:"cause,omitempty"`
	Time     time.Time `json:"time"`
}

// netState is what the managed mode keeps between runs.
type netState struct {
	NextTry       time.Time `json:"next_try,omitzero"` // no request before this; from backoff or Retry-After
	Failures      int       `json:"failures,omitempty"`
	InventoryHash string    `json:"inventory_hash,omitempty"`
	InventoryTime time.Time `json:"inventory_time,omitzero"`
	V1Only        string    `json:"v1_only,omitempty"` // server without the v2 route
}

// journalFile is an open journal. It is not safe for use by several goroutines.
type journalFile struct {
	st     storage
	seq    uint64
	next   int    // copy that the next save overwrites
	last   []byte // JSON of the newest record, to skip a save that changes nothing
	format int    // of the record that was read
}

// journalHead is the header line up to " crc=".
func journalHead(seq uint64, n int) string {
	return fmt.Sprintf("%s %d seq=%016x len=%08x", journalMagic, journalFormat, seq, n)
}

func journalSum(head string, body []byte) uint32 {
	return crc32.Update(crc32.ChecksumIEEE([]byte(head)), crc32.IEEETable, body)
}

// parseJournalCopy checks one copy and returns its sequence number, format and JSON.
func parseJournalCopy(b []byte) (seq uint64, format int, body []byte, err error) {
	line, _, ok := bytes.Cut(b[:min(len(b), 2*journalHeadLen)], []byte("\n"))
	if !ok || !bytes.HasPrefix(line, []byte(journalMagic+" ")) {
		return 0, 0, nil, errors.New("no header line")
	}
	head, sum, ok := strings.Cut(string(line), " crc=")
	var n, crc uint32
	if _, err := fmt.Sscanf(head, journalMagic+" %d seq=%16x len=%8x", &format, &seq, &n); err != nil || !ok {
		return 0, 0, nil, errors.New("header line not understood")
	}
	if _, err := fmt.Sscanf(sum, "%8x", &crc); err != nil {
		return 0, 0, nil, errors.New("header line not understood")
	}
	start := len(line) + 1
	if int64(start)+int64(n) > int64(len(b)) {
		return 0, 0, nil, fmt.Errorf("length %d in the header is beyond the end", n)
	}
	body = b[start : start+int(n)]
	if got := journalSum(head, body); got != crc {
		return 0, 0, nil, fmt.Errorf("CRC %08x, want %08x", got, crc)
	}
	return seq, format, body, nil
}

// readJournal reads both copies and returns the newer good one. A journal that cannot be
// used is never fatal: the record is then empty, damaged says why, and raw is what was there.
func readJournal(st storage) (j *journalFile, rec *record, damaged error, raw []byte, err error) {
	raw = make([]byte, journalSize)
	if n, rerr := st.ReadAt(raw, 0); rerr != nil && rerr != io.EOF {
		return nil, nil, nil, nil, fmt.Errorf("reading the journal: %w", rerr)
	} else if n < journalSize {
		clear(raw[n:])
	}
	j, rec = &journalFile{st: st}, &record{}
	var faults []string
	found := false
	for i := range 2 {
		b := raw[i*journalCopySize : (i+1)*journalCopySize]
		seq, format, body, err := parseJournalCopy(b)
		var r record
		if err == nil {
			err = json.Unmarshal(body, &r)
		}
		if err != nil {
			if len(bytes.Trim(b, "\x00")) > 0 {
				faults = append(faults, fmt.Sprintf("copy %d: %v", i+1, err))
			}
			continue
		}
		if !found || seq > j.seq {
			found, j.seq, j.next, j.last, j.format, rec = true, seq, 1-i, body, format, &r
		}
	}
	if !found && len(faults) > 0 {
		damaged = errors.New(strings.Join(faults, "; "))
	}
	return j, rec, damaged, raw, nil
}

// save makes the record durable: the older copy is overwritten, synced, and read back past
// the cache. When it returns an error the record before it is still the newest good one.
func (j *journalFile) save(rec *record) error {
	body, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if bytes.Equal(body, j.last) {
		return nil
	}
	// Time never goes back, so that it can be a floor for a clock that lost its battery.
	if now := time.Now().UTC().Truncate(time.Second); now.After(rec.Time) {
		rec.Time = now
	}
	if body, err = json.Marshal(rec); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if len(body) > journalMax {
		return fmt.Errorf("journal: the record has %d bytes, want %d at most", len(body), journalMax)
	}
	head := journalHead(j.seq+1, len(body))
	text := fmt.Appendf(nil, "%s crc=%08x\n", head, journalSum(head, body))
	text = append(text, body...)
	off := int64(j.next) * journalCopySize
	if _, err := j.st.WriteAt(text, off); err != nil {
		return fmt.Errorf("journal: writing copy %d: %w", j.next+1, err)
	}
	// Before anything relies on the record it has to be on the medium, not in the page
	// cache (fsync(2)); the error is final, a second try would report success for lost data.
	if err := j.st.Sync(); err != nil {
		return fmt.Errorf("journal: syncing copy %d: %w", j.next+1, err)
	}
	back := make([]byte, len(text))
	if err := readUncached(j.st, back, off); err != nil {
		return fmt.Errorf("journal: reading copy %d back: %w", j.next+1, err)
	}
	if !bytes.Equal(back, text) {
		return fmt.Errorf("journal: copy %d reads back differently from what was written: the storage is failing", j.next+1)
	}
	j.seq, j.next, j.last = j.seq+1, 1-j.next, body
	return nil
}

const journalName = "mendlet.state"

// openJournal opens DS/mendlet.state for this process alone, making it when it is absent.
// It may be a link to a raw partition. A second process gets exit code 75.
func openJournal(ds string, lg *logger) (*journalFile, *record, error) {
	path := filepath.Join(ds, journalName)
	if err := makeJournal(path); err != nil {
		return nil, nil, withHint(err, "mendlet keeps its state in %q: it has to be there and writable; -d names another place", ds)
	}
	st, err := openStorage(path, openWrite)
	if err != nil {
		return nil, nil, fmt.Errorf("journal: %w", err)
	}
	// flock(2): released by the kernel when this process ends, however it ends.
	if err := lockStorage(st); err != nil {
		st.Close()
		return nil, nil, tryLater("journal %q: another mendlet is running (%w)", path, err)
	}
	j, rec, damaged, raw, err := readJournal(st)
	if err != nil {
		st.Close()
		return nil, nil, err
	}
	if damaged != nil {
		lg.warnf("journal %q is damaged and counts as empty: %v", path, damaged)
		if err := writeFileDurably(path+".bad", raw, 0o600); err != nil {
			lg.warnf("could not keep the damaged journal: %v", err)
		} else {
			lg.warnf("the damaged journal is kept as %q", path+".bad")
		}
	}
	if j.format > journalFormat {
		lg.warnf("journal %q was written by a newer mendlet (format %d): what this one does not know is ignored", path, j.format)
	}
	return j, rec, nil
}

// peekJournal reads the record without a lock and without changing anything; an absent
// journal is an empty record. A reader may meet a copy that is just being written: then the
// other one is good, unless two saves ended in between; hence the second look.
func peekJournal(ds string, lg *logger) (*record, error) {
	st, err := openStorage(filepath.Join(ds, journalName), openRead)
	if errors.Is(err, os.ErrNotExist) {
		return &record{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	defer st.Close()
	_, rec, damaged, _, err := readJournal(st)
	if err == nil && damaged != nil {
		_, rec, damaged, _, err = readJournal(st)
	}
	if err == nil && damaged != nil {
		lg.warnf("journal is damaged and counts as empty: %v", damaged)
	}
	return rec, err
}

// makeJournal makes an empty journal of full size, so that later saves change neither its
// length nor its place on the disk.
func makeJournal(path string) error {
	if st, err := os.Stat(path); err == nil && (st.Size() >= journalSize || !st.Mode().IsRegular()) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	defer f.Close()
	// A short file is one whose making was cut off, or damage; what it holds stays.
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if _, err := f.WriteAt(make([]byte, journalSize-st.Size()), st.Size()); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if err := f.Sync(); err != nil { // its length must outlive a power cut before saves rely on it
		return fmt.Errorf("journal: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

func lockStorage(s storage) error {
	d, ok := s.(*device)
	if !ok {
		return nil
	}
	c, err := d.f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := c.Control(func(fd uintptr) { err = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB) })
	return errors.Join(cerr, err)
}
