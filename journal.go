// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
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
	// with artifact_name and artifact_group; without artifact_name nothing was ever installed here
	Provides map[string]string `json:"provides"`
	Update   *update           `json:"update,omitempty"`
	Last     *verdict          `json:"last,omitempty"`
	Time     time.Time         `json:"time"` // of the save: a floor for a clock that is not set
	Net      *netState         `json:"net,omitempty"`
	Mender   *inheritance      `json:"mender,omitempty"`
}

// inheritance is what was taken over from the store of Mender's client. Txn and Sum tell a store that it has
// written since.
type inheritance struct {
	File    string    `json:"file"` // in the datastore
	Txn     int       `json:"txn"`  // LMDB's number of the transaction that wrote it
	Sum     uint32    `json:"sum"`  // CRC-32 of the file
	Time    time.Time `json:"time"` // of the file's last change
	Name    string    `json:"artifact_name"`
	Update  string    `json:"update,omitempty"`  // in progress then: its artifact, and the client's name for its state
	Ignored string    `json:"ignored,omitempty"` // the artifact name in a newer store, of Txn, Sum and Time, that was left
}

func (i *inheritance) String() string {
	text := fmt.Sprintf("taken over from Mender's client: artifact %q", i.Name)
	if i.Update != "" {
		text += ", and its update " + i.Update
	}
	if i.Ignored != "" {
		text += fmt.Sprintf("; it has written its store since, and its artifact is %q: that is not taken over, unless the "+
			"journal is moved aside", i.Ignored)
	}
	return fmt.Sprintf("%s (%q, transaction %d, of %s)", text, i.File, i.Txn, i.Time.Format(time.RFC3339))
}

// verdict is how an update ended.
type verdict struct {
	Artifact string    `json:"artifact"`
	ID       string    `json:"id,omitempty"` // deployment
	Sum      string    `json:"sum,omitempty"`
	Result   string    `json:"result"` // committed, rolled-back, failed, inconsistent
	Cause    string    `json:"cause,omitempty"`
	Saved    int64     `json:"delta_saved,omitempty"` // bytes of the artifact that the device had and did not fetch
	Time     time.Time `json:"time"`
}

// netState is what the managed mode keeps between runs.
type netState struct {
	NextTry       time.Time     `json:"next_try,omitzero"` // no request before this; from backoff or Retry-After
	Failures      int           `json:"failures,omitempty"`
	Failure       string        `json:"failure,omitempty"` // the last one, for people
	Channel       *channelState `json:"channel,omitempty"`
	InventoryHash string        `json:"inventory_hash,omitempty"`
	InventoryTime time.Time     `json:"inventory_time,omitzero"`
	ConfigHash    string        `json:"config_hash,omitempty"` // of mender-configure's file, as the server has it
	Untold        *verdict      `json:"untold,omitempty"`      // the report of it was given up
	V1Only        string        `json:"v1_only,omitempty"`     // server without the v2 route
	Identity      string        `json:"identity,omitempty"`    // SHA-256 of the one that the server has accepted
	Device        string        `json:"device,omitempty"`      // who the device is to the server, by its last token
	Server        string        `json:"server,omitempty"`      // of several, the one that answered
	ServerTime    time.Time     `json:"server_time,omitzero"`  // when it did, for the first time
}

// channelState is what is kept of the channel of a device that has no server.
type channelState struct {
	Name     string               `json:"name"`
	Seen     map[string]fleetSeen `json:"seen"`           // by key and channel
	Copy     string               `json:"copy,omitempty"` // SHA-256 of the copy in the datastore, hex
	Tag      string               `json:"tag,omitempty"`  // its ETag or Last-Modified
	Serial   uint64               `json:"serial"`         // of the newest file
	Expires  time.Time            `json:"expires"`
	Poll     time.Duration        `json:"poll,omitempty"`
	Failed   map[string]int       `json:"failed,omitempty"`  // how often, by deployment
	Dropped  string               `json:"dropped,omitempty"` // deployment that was taken back: no failure
	Reported time.Time            `json:"reported,omitzero"` // when the last report was written
	Told     time.Time            `json:"told,omitzero"`     // time of the verdict in it
}

// fleetSeen is the newest file that was accepted of a key.
type fleetSeen struct {
	Serial uint64 `json:"serial"`
	Sum    string `json:"sum"` // SHA-256 of what is signed, hex
}

// note says where the channel stands, at a time that is not before now.
func (c *channelState) note(now time.Time) string {
	if now.After(c.Expires) {
		return fmt.Sprintf("channel %q: its file, serial %d, is stale since %s", c.Name, c.Serial,
			c.Expires.Format(time.RFC3339))
	}
	return fmt.Sprintf("channel %q: its file, serial %d, is good until %s", c.Name, c.Serial,
		c.Expires.Format(time.RFC3339))
}

// net is the part that managed mode has for itself; nil where there is no record.
//
//go:noinline
func (r *record) net() *netState {
	if r == nil {
		return nil
	}
	if r.Net == nil {
		r.Net = &netState{}
	}
	return r.Net
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
	head, sum, _ := strings.Cut(string(line), " crc=")
	f := strings.Split(head, " ")
	if len(f) != 4 {
		return 0, 0, nil, errors.New("header line not understood")
	}
	format, err1 := strconv.Atoi(f[1])
	seq, err2 := strconv.ParseUint(strings.TrimPrefix(f[2], "seq="), 16, 64)
	n, err3 := strconv.ParseUint(strings.TrimPrefix(f[3], "len="), 16, 32)
	crc, err4 := strconv.ParseUint(sum, 16, 32)
	if errors.Join(err1, err2, err3, err4) != nil {
		return 0, 0, nil, errors.New("header line not understood")
	}
	start := len(line) + 1
	if int64(start)+int64(n) > int64(len(b)) {
		return 0, 0, nil, fmt.Errorf("length %d in the header is beyond the end", n)
	}
	body = b[start : start+int(n)]
	if got := journalSum(head, body); got != uint32(crc) {
		return 0, 0, nil, fmt.Errorf("CRC %08x, want %08x", got, crc)
	}
	return seq, format, body, nil
}

// readJournal reads both copies and returns the newer good one. A journal that cannot be
// used is never fatal: the record is then empty, damaged says why, and raw is what was there.
// One of which a copy cannot be read is another thing: that copy may be the newer one, and a
// save would overwrite it.
func readJournal(st storage) (j *journalFile, rec *record, damaged error, raw []byte, err error) {
	raw = make([]byte, journalSize)
	j, rec = &journalFile{st: st}, &record{}
	found := false
	var faults error
	for i := range 2 {
		b := raw[i*journalCopySize : (i+1)*journalCopySize]
		if err := readCopy(st, b, int64(i)*journalCopySize); err != nil {
			return nil, nil, nil, nil, withHint(tryLater("journal: copy %d cannot be read, and may be the newer one: %w", i+1,
				err),
				"if its medium is failing for good, move the journal aside: an update in progress is lost with it, and what is "+
					"installed counts as unknown")
		}
		seq, format, body, err := parseJournalCopy(b)
		var r record
		if err == nil {
			err = json.Unmarshal(body, &r)
		}
		if err == nil && (!found || seq > j.seq) {
			found, j.seq, j.next, j.last, j.format, rec = true, seq, 1-i, body, format, &r
		}
		if err != nil && len(bytes.Trim(b, "\x00")) > 0 {
			faults = errors.Join(faults, fmt.Errorf("copy %d: %w", i+1, err))
		}
	}
	if found {
		return j, rec, nil, raw, nil
	}
	return j, rec, faults, raw, nil
}

// readCopy fills b, of which what is behind the end of the file stays empty.
func readCopy(st storage, b []byte, off int64) error {
	return again(func() error {
		if _, err := st.ReadAt(b, off); err != io.EOF {
			return err
		}
		return nil
	})
}

// save makes the record durable: the older copy is overwritten, synced, and read back past
// the cache. After an error the record before it is still there, and either may be what a
// later run finds.
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
	if err := again(func() error { return readUncached(j.st, back, off) }); err != nil {
		return fmt.Errorf("journal: reading copy %d back: %w", j.next+1, err)
	}
	if !bytes.Equal(back, text) {
		return fmt.Errorf("journal: copy %d reads back differently from what was written: the storage is failing", j.next+1)
	}
	j.seq, j.next, j.last = j.seq+1, 1-j.next, body
	return nil
}

func (j *journalFile) close() error {
	if d, ok := j.st.(*device); ok {
		return funlock(d.f)
	}
	return j.st.Close()
}

// markDaemon says to daemonOf, by a lock on the journal (lockMark), that this process is a daemon, which heeds
// SIGUSR1 and SIGUSR2. Closing any descriptor of the journal takes that back.
func (j *journalFile) markDaemon() error {
	d, ok := j.st.(*device)
	if !ok {
		return nil
	}
	_, err := lockMark(d.f, syscall.F_SETLK, syscall.F_WRLCK)
	return err
}

// daemonOf gives the process of the daemon that has the journal in ds; 0: there is none.
func daemonOf(ds string) (pid int, err error) {
	f, err := viewJournal(ds)
	if f == nil {
		return 0, err
	}
	defer f.Close()
	lock, err := lockMark(f, syscall.F_GETLK, syscall.F_WRLCK)
	switch {
	case err != nil:
		return 0, err
	case lock.Type == syscall.F_UNLCK:
		return 0, nil
	case lock.Start != markByte || lock.Len != 1 || lock.Pid <= 0:
		// Of a lock of the whole file, or from another PID namespace.
		return 0, fmt.Errorf("journal %q: process %d has locked %d bytes at %d, and is no daemon that can be seen from here",
			f.Name(), lock.Pid, lock.Len, lock.Start)
	}
	return int(lock.Pid), nil
}

const journalName = "mendlet.state"

// openJournal opens DS/mendlet.state for this process alone, making it when it is absent.
// It may be a link to a raw partition. A second process gets exit code 75.
func openJournal(ds string, lg *logger) (*journalFile, *record, error) {
	path := filepath.Join(ds, journalName)
	d, err := makeDir(ds)
	var st storage
	if err == nil {
		defer d.Close()
		st, err = openLocked(d)
	}
	switch {
	case isTemporary(err):
		return nil, nil, err
	case mayPass(err):
		return nil, nil, tryLater("journal: %w", err)
	case err != nil:
		return nil, nil, withHint(fmt.Errorf("journal: %w", err),
			"mendlet keeps its state in %q: it has to be writable by this user alone; -d names another place", ds)
	}
	j, rec, damaged, raw, err := readJournal(st)
	if err != nil {
		st.Close()
		return nil, nil, err
	}
	if damaged != nil {
		lg.warnf("journal %q is damaged and counts as empty: %v", path, damaged)
		if err := d.write(journalName+".bad", raw, 0o600); err != nil {
			lg.warnf("could not keep the damaged journal: %v", err)
		} else {
			lg.warnf("the damaged journal is kept as %q", path+".bad")
		}
	}
	if j.format > journalFormat {
		lg.warnf("journal %q was written by a newer mendlet (format %d): what this one does not know is ignored", path,
			j.format)
	}
	return j, rec, nil
}

// viewJournal opens the journal to look at it; nil where there is none.
//
//go:noinline
func viewJournal(ds string) (*os.File, error) {
	d, err := openDir(ds)
	var f *os.File
	if err == nil {
		defer d.Close()
		f, err = journalIn(d, os.O_RDONLY)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return f, nil
}

// peekJournal reads the record without a lock and without changing anything; an absent
// journal is an empty record. A reader may meet a copy that is just being written: then the
// other one is good, unless two saves ended in between; hence the second look.
func peekJournal(ds string, lg *logger) (*record, error) {
	f, err := viewJournal(ds)
	if err != nil {
		return nil, err
	}
	if f == nil {
		return &record{}, nil
	}
	st := &device{f: f}
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

// openLocked opens the journal for this process alone and makes it when it is absent, of full
// size, so that later saves change neither its length nor its place on the disk.
func openLocked(d *dir) (storage, error) {
	f, err := journalIn(d, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, err
	}
	st, err := lockedJournal(d, f)
	if err != nil {
		f.Close()
	}
	return st, err
}

// journalIn opens the journal's file, or the block device that a link in its place leads to: a link to a
// file may be a trap.
func journalIn(d *dir, flag int) (*os.File, error) {
	f, err := d.follow(journalName, flag, 0o600)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || f.Name() != d.in(journalName) && st.Mode()&os.ModeDevice == 0 {
		f.Close()
		return nil, errors.Join(err, &os.PathError{Op: "open", Path: d.in(journalName), Err: syscall.ELOOP})
	}
	return f, nil
}

func lockedJournal(d *dir, f *os.File) (storage, error) {
	switch err := flock(context.Background(), f, 0, nil); {
	case errors.Is(err, errLocked):
		return nil, tryLater("journal %q: another mendlet is running", f.Name())
	case err != nil:
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && st.Mode().IsRegular() && int(sys.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%q belongs to user %d, not to %d who runs this", f.Name(), sys.Uid, os.Geteuid())
	}
	// A short file is one whose making was cut off, or damage; what it holds stays.
	if n := journalSize - st.Size(); n > 0 && st.Mode().IsRegular() {
		if _, err := f.WriteAt(make([]byte, n), st.Size()); err != nil {
			return nil, err
		}
		if err := f.Sync(); err != nil { // its length must outlive a power cut before saves rely on it
			return nil, err
		}
		if err := d.sync(); err != nil {
			return nil, err
		}
	}
	n, err := sizeOf(f)
	if err == nil && n < journalSize {
		err = fmt.Errorf("%q has %d bytes, want %d", f.Name(), n, journalSize)
	}
	return &device{f: f, size: n}, err
}

// step is what an update does next, by the names that Mender's standalone mode has for its
// saved states. The journal holds the step that was entered last.
type step string

const (
	stepDownload             step = "Download_Enter"
	stepInstallWait          step = "Before_ArtifactInstall_Enter"
	stepInstall              step = "ArtifactInstall_Enter"
	stepReboot               step = "ArtifactReboot_Enter"
	stepVerifyReboot         step = "ArtifactVerifyReboot"
	stepCommitWait           step = "Before_ArtifactCommit_Enter"
	stepCommit               step = "ArtifactCommit_Enter"
	stepCommitLeaveWait      step = "Before_ArtifactCommit_Leave"
	stepCommitLeave          step = "ArtifactCommit_Leave"
	stepCheckRollback        step = "CheckRollback" // never saved
	stepRollback             step = "ArtifactRollback_Enter"
	stepRollbackReboot       step = "ArtifactRollbackReboot_Enter"
	stepVerifyRollbackReboot step = "ArtifactVerifyRollbackReboot"
	stepFailure              step = "ArtifactFailure_Enter"
	stepCleanup              step = "Cleanup"
	stepReport               step = "Report" // final status to the server
	stepEnd                  step = ""
)

// rootfsImage is the payload type that is built in.
const rootfsImage = "rootfs-image"

// update is an update in progress, as the journal has it.
type update struct {
	Step    step   `json:"step"`
	Managed bool   `json:"managed,omitempty"`
	ID      string `json:"id,omitempty"` // deployment
	Source  string `json:"source,omitempty"`

	Artifact string            `json:"artifact"`
	Group    string            `json:"group,omitempty"`
	Sum      string            `json:"sum"`  // SHA-256 of the manifest
	Type     string            `json:"type"` // of the payload; "" for an empty one or before the header was read
	Provides map[string]string `json:"provides"`
	Clears   []string          `json:"clears"`
	Scripts  bool              `json:"scripts,omitempty"` // the artifact brings scripts for install or commit

	From int `json:"from,omitempty"` // partition numbers
	To   int `json:"to,omitempty"`

	Reboot  string  `json:"reboot,omitempty"` // the handler's answer: No, Yes, Automatic
	BootID  string  `json:"boot_id,omitempty"`
	Outcome outcome `json:"-"`                // on disk: see updateOnDisk
	Cause   string  `json:"cause,omitempty"`  // of the first failure; of one after the commit, too, where it was committed
	Known   bool    `json:"-"`                // whoever waits for the exit code asked for the rollback, or has been told
	Parked  bool    `json:"parked,omitempty"` // the step paused by itself and was not cut off
	Saves   int     `json:"saves,omitempty"`
	// of what is tried again: the download, or the report before the commit or at the end
	Tries   int   `json:"tries,omitempty"`
	Reached int64 `json:"reached,omitempty"` // bytes of the image at the last try of the download

	WholeImage bool  `json:"whole_image,omitempty"` // a delta went wrong: the image is fetched as a whole
	Saved      int64 `json:"saved,omitempty"`       // bytes of the artifact that a delta had no need to fetch

	Request    json.RawMessage `json:"request,omitempty"` // body of deployments/next, to be repeated
	Checkpoint *checkpoint     `json:"checkpoint,omitempty"`
}

// outcome is how an update goes: what the device would be if it ended now.
type outcome string

const (
	outcomeRunning      outcome = ""             // nothing has failed
	outcomeFailed       outcome = "failed"       // before anything was installed: the system is as it was
	outcomeRolledBack   outcome = "rolled-back"  // it is on the way back, or has been, and nothing failed there
	outcomeInconsistent outcome = "inconsistent" // it has failed, and nothing has brought the old state back
)

// updateOnDisk spells the outcome in flags, which are the format of the journal: an older
// program in the other slot reads what this one writes.
type updateOnDisk struct {
	*updateFields
	Failed         bool `json:"failed,omitempty"`
	RollbackFailed bool `json:"rollback_failed,omitempty"` // nothing is known to be as it was
	RolledBack     bool `json:"rolled_back,omitempty"`
	Asked          bool `json:"asked,omitempty"`       // a person asked for the rollback; read only
	Told           bool `json:"told,omitempty"`        // an earlier run has ended with the failure as its exit code
	Settled        bool `json:"settled,omitempty"`     // provides and verdict are in the record; written only
	PostCommit     bool `json:"post_commit,omitempty"` // ArtifactCommit_Leave failed, standalone
}

// updateFields is an update without its methods.
type updateFields update

func (u *update) MarshalJSON() ([]byte, error) {
	return json.Marshal(updateOnDisk{
		updateFields:   (*updateFields)(u),
		Failed:         u.Outcome.bad(),
		RollbackFailed: u.Outcome == outcomeInconsistent,
		RolledBack:     u.Outcome == outcomeRolledBack,
		Told:           u.Known,
		Settled:        u.settled(),
		PostCommit:     !u.Outcome.bad() && u.Cause != "",
	})
}

func (u *update) UnmarshalJSON(text []byte) error {
	d := updateOnDisk{updateFields: (*updateFields)(u)}
	if err := json.Unmarshal(text, &d); err != nil {
		return err
	}
	u.Known = d.Asked || d.Told
	switch {
	case d.RollbackFailed:
		u.Outcome = outcomeInconsistent
	case d.RolledBack:
		u.Outcome = outcomeRolledBack
	case d.Failed:
		u.Outcome = outcomeFailed
	}
	if d.PostCommit && u.Cause == "" {
		u.Cause = "a state script of ArtifactCommit_Leave failed"
	}
	return nil
}

// bad: the update does not succeed.
//
//go:noinline
func (o outcome) bad() bool { return o != outcomeRunning }

// settled: provides and verdict are in the record. A deployment's get there together with its
// last steps, what a person installs when it leaves the journal.
func (u *update) settled() bool { return u.Managed && (u.Step == stepCleanup || u.Step == stepReport) }

// checkpoint is where an interrupted write can go on: all of the image before Offset is
// durable in the slot, but for its head.
type checkpoint struct {
	Slot   string       `json:"slot"`
	Offset int64        `json:"offset"` // bytes of the image
	Total  int64        `json:"total"`
	Check  uint32       `json:"check"` // CRC-32C of the image up to Offset
	From   restartPoint `json:"from"`  // where the artifact is read again
	Source sourceID     `json:"source"`
}

// maxCause bounds what the journal keeps of an error, in bytes.
const maxCause = 1024

// lastLine is that of a failed deployment's log: whoever reads its log wants to know the cause.
func lastLine(v *verdict) string {
	return oneLine(fmt.Sprintf("deployment %q of %q: %s: %s", v.ID, v.Artifact, v.Result, v.Cause))
}
