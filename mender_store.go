// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"os"
	"syscall"
	"time"
)

// A reader of the file in which Mender's client keeps what it knows: an LMDB environment of one plain
// file (MDB_NOSUBDIR) of data version 1, as liblmdb 0.9 writes it (libraries/liblmdb/mdb.c). It only
// reads: a device that goes back to Mender's client finds its store as it left it.

const (
	menderStoreFile   = "mender-store"
	menderStoreBroken = "mender-store-broken" // as which a client puts a store aside that it cannot open
	menderStoreLock   = "mender-store-lock"

	maxStore      = 16 << 20 // bytes of the file, which is held in memory
	maxStoreValue = 1 << 20  // bytes; the clients' own stores do not grow beyond that as a whole
	maxStoreDepth = 16
	maxStoreKey   = 511 // bytes (MDB_MAXKEYSIZE)
)

// menderKeys are the keys whose values are kept. There are others, of no use to another program.
var menderKeys = map[string]bool{"artifact-name": true, "artifact-group": true, "artifact-provides": true,
	"standalone-state": true, "state": true, "state-uncommitted": true, "update-control-maps": true}

// menderStore is what a store says.
type menderStore struct {
	file   string
	txn    uint64            // transaction that wrote it
	sum    uint32            // CRC-32 (IEEE) of the file
	time   time.Time         // of the file's last change
	older  error             // why it is the state before the last transaction; nil: it is not
	values map[string][]byte // of menderKeys; absent: not in the store
}

// menderRuns tells whether a client has the store open: it then holds a lock on the first byte of the lock
// file (mdb_env_setup_locks). pid is 0 where the client is in another PID namespace (fcntl(2), F_GETLK).
func menderRuns(d *dir) (pid int32, runs bool, err error) {
	f, err := d.follow(menderStoreLock, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	lock := syscall.Flock_t{Type: syscall.F_WRLCK, Len: 1}
	err = uninterrupted("fcntl", f.Name(), func() error { return syscall.FcntlFlock(f.Fd(), syscall.F_GETLK, &lock) })
	return lock.Pid, lock.Type != syscall.F_UNLCK, err
}

// errStoreChanges: a client writes while the store is being read.
var errStoreChanges = tryLater("it changes while it is read")

// readMenderStore reads a store of the datastore. fs.ErrNotExist: there is none. All faults of the file
// are refusals.
func readMenderStore(d *dir, name string) (s *menderStore, err error) {
	f, err := d.follow(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > maxStore {
		return nil, refuse("%q has %d bytes, want %d at most", f.Name(), st.Size(), maxStore)
	}
	err = again(func() error {
		s, err = readStoreOnce(f, st.Size())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%q: %w", f.Name(), err)
	}
	s.file, s.time = name, st.ModTime().UTC().Truncate(time.Second)
	return s, nil
}

// readStoreOnce reads the file as a whole, and its meta pages once more: without a place in the lock file's
// table of readers nothing keeps a writer from using pages again that this one is about to read.
func readStoreOnce(f *os.File, size int64) (*menderStore, error) {
	b := make([]byte, size)
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, size), b); err != nil {
		return nil, err
	}
	s, err := parseMenderStore(b)
	metas := make([]byte, min(len(b), 2*32768))
	if _, rerr := f.ReadAt(metas, 0); rerr != nil && rerr != io.EOF {
		return nil, rerr
	}
	if !bytes.Equal(metas, b[:len(metas)]) {
		return nil, errStoreChanges
	}
	return s, err
}

// lmdb is a file with the shape of what is in it.
type lmdb struct {
	b     []byte
	order binary.ByteOrder
	word  int // bytes of a number of a page or transaction: 4 or 8
	head  int // bytes of a page's header
	page  int // bytes of a page
	seen  []bool
	count uint64 // entries met
	last  []byte // key of the last of them
	found map[string][]byte
}

// lmdbMeta is what a meta page says of the main database.
type lmdbMeta struct {
	txn, entries, root uint64
	flags, depth       uint16
}

// number reads one of the machine's word size.
func (l *lmdb) number(b []byte) uint64 {
	if l.word == 4 {
		return uint64(l.order.Uint32(b))
	}
	return l.order.Uint64(b)
}

// none is the number of no page.
func (l *lmdb) none() uint64 { return math.MaxUint64 >> (64 - 8*l.word) }

// parseMenderStore reads the newest state of a store, whatever machine wrote it. It keeps b.
func parseMenderStore(b []byte) (*menderStore, error) {
	l, err := lmdbLayout(b)
	if err != nil {
		return nil, refuse("not a store that can be read: %w", err)
	}
	first, err := l.meta(0)
	if err != nil {
		return nil, refuse("not a store that can be read: %w", err)
	}
	newest, other, olderErr := first, lmdbMeta{}, error(nil)
	if second, err := l.meta(1); err != nil {
		olderErr = err
	} else if newest, other = first, second; second.txn > first.txn {
		newest, other = second, first
	}
	s := &menderStore{txn: newest.txn, sum: crc32.ChecksumIEEE(b), older: olderErr}
	if err = l.read(newest); err != nil && olderErr == nil && other.txn != newest.txn {
		// Its pages may have been used again, which the checks would show with near certainty.
		if l.read(other) == nil {
			s.txn, s.older, err = other.txn, err, nil
		}
	}
	if err != nil {
		return nil, refuse("damaged: %w", err)
	}
	s.values = l.found
	return s, nil
}

// lmdbLayout tells byte order, word size and page size by the first meta page.
func lmdbLayout(b []byte) (*lmdb, error) {
	const magic = 0xBEEFC0DE
	for _, l := range []*lmdb{{order: binary.LittleEndian, word: 8}, {order: binary.LittleEndian, word: 4},
		{order: binary.BigEndian, word: 8}, {order: binary.BigEndian, word: 4}} {
		l.b, l.head = b, l.word+8
		if len(b) < 1024 || l.order.Uint32(b[l.head:]) != magic {
			continue
		}
		l.page = int(l.order.Uint32(b[l.head+8+2*l.word:]))
		if l.page < 512 || l.page > 32768 || l.page&(l.page-1) != 0 {
			return nil, fmt.Errorf("page size %d, want a power of two from 512 to 32768", l.page)
		}
		if len(b) < 2*l.page {
			return nil, fmt.Errorf("%d bytes, want two pages of %d at least", len(b), l.page)
		}
		return l, nil
	}
	return nil, fmt.Errorf("%d bytes without the mark of LMDB", len(b))
}

func (l *lmdb) meta(i int) (m lmdbMeta, err error) {
	p := l.b[i*l.page:][:l.page]
	flags := l.order.Uint16(p[l.word+2:])
	at := p[l.head:]
	main := at[16+7*l.word:] // behind magic, version, two words, and the record of the free list
	version := l.order.Uint32(at[4:])
	switch {
	case flags&0x08 == 0 || l.order.Uint32(at) != 0xBEEFC0DE:
		return m, fmt.Errorf("page %d is no meta page", i)
	case version != 1:
		return m, fmt.Errorf("data version %d, want 1", version)
	}
	m = lmdbMeta{flags: l.order.Uint16(main[4:]), depth: l.order.Uint16(main[6:])}
	m.entries, m.root = l.number(main[8+3*l.word:]), l.number(main[8+4*l.word:])
	m.txn = l.number(main[8+6*l.word:])
	return m, nil
}

// read walks the whole tree, which says more about its soundness than a search would.
func (l *lmdb) read(m lmdbMeta) error {
	l.seen, l.count, l.last, l.found = make([]bool, len(l.b)/l.page), 0, nil, map[string][]byte{}
	switch {
	case m.flags != 0:
		return fmt.Errorf("database with flags %#x, want none", m.flags)
	case m.depth > maxStoreDepth:
		return fmt.Errorf("tree of depth %d, want %d at most", m.depth, maxStoreDepth)
	case m.root != l.none():
		if err := l.walk(m.root, int(m.depth)); err != nil {
			return err
		}
	}
	if l.count != m.entries {
		return fmt.Errorf("%d entries, want %d", l.count, m.entries)
	}
	return nil
}

// claim gives n pages from page number num on, which nothing else may be in.
func (l *lmdb) claim(num uint64, n int) ([]byte, error) {
	if all := uint64(len(l.seen)); num < 2 || num >= all || uint64(n) > all-num {
		return nil, fmt.Errorf("page %d and %d behind it, want pages from 2 to %d", num, n-1, all-1)
	}
	for i := range l.seen[num:][:n] {
		if l.seen[int(num)+i] {
			return nil, fmt.Errorf("page %d is met twice", int(num)+i)
		}
		l.seen[int(num)+i] = true
	}
	p := l.b[int(num)*l.page:][:n*l.page]
	if got := l.number(p); got != num {
		return nil, fmt.Errorf("page %d says that it is page %d", num, got)
	}
	return p, nil
}

// walk reads the pages below num, which is depth levels above what is in the file's leaves.
func (l *lmdb) walk(num uint64, depth int) error {
	p, err := l.claim(num, 1)
	if err != nil {
		return err
	}
	kind, want := l.order.Uint16(p[l.word+2:])&0x2f, uint16(0x01) // branch
	if depth == 1 {
		want = 0x02 // leaf
	}
	lower, upper := int(l.order.Uint16(p[l.word+4:])), int(l.order.Uint16(p[l.word+6:]))
	switch {
	case kind != want || depth < 1:
		return fmt.Errorf("page %d is of kind %#x, at level %d from below", num, kind, depth)
	case lower < l.head || lower > upper || upper > l.page:
		return fmt.Errorf("page %d: room from %d to %d, want it between %d and %d", num, lower, upper, l.head, l.page)
	}
	for i := range (lower - l.head) / 2 {
		off := int(l.order.Uint16(p[l.head+2*i:]))
		if off < upper || off+8 > l.page {
			return fmt.Errorf("page %d: entry %d at %d, want it from %d to %d", num, i, off, upper, l.page-8)
		}
		err := l.node(p[off:], depth, i)
		if err != nil {
			return fmt.Errorf("page %d, entry %d: %w", num, i, err)
		}
	}
	return nil
}

// node reads an entry, whose page ends where n does.
func (l *lmdb) node(n []byte, depth, i int) error {
	lo, hi := l.order.Uint16(n), l.order.Uint16(n[2:])
	if l.order == binary.BigEndian {
		lo, hi = hi, lo
	}
	flags, klen := l.order.Uint16(n[4:]), int(l.order.Uint16(n[6:]))
	size := uint64(lo) | uint64(hi)<<16
	if n = n[8:]; klen > len(n) || klen > maxStoreKey || klen == 0 && (depth == 1 || i > 0) {
		return fmt.Errorf("key of %d bytes, want 1 to %d", klen, min(len(n), maxStoreKey))
	}
	key, data := n[:klen], n[klen:]
	if depth > 1 {
		if l.word == 8 {
			size |= uint64(flags) << 32
		}
		return l.walk(size, depth-1)
	}
	if l.count++; l.last != nil && bytes.Compare(key, l.last) <= 0 {
		return fmt.Errorf("key %.40q is behind %.40q", key, l.last)
	}
	l.last = key
	if size > maxStoreValue {
		return fmt.Errorf("value of %d bytes, want %d at most", size, maxStoreValue)
	}
	if flags&0x01 != 0 { // it is elsewhere
		var err error
		if data, err = l.overflow(data, int(size)); err != nil {
			return err
		}
	}
	if int(size) > len(data) {
		return fmt.Errorf("value of %d bytes, want %d at most", size, len(data))
	}
	if flags&0x06 == 0 && menderKeys[string(key)] { // neither a database of its own nor several values
		l.found[string(key)] = data[:size]
	}
	return nil
}

// overflow gives a value of this size, which has pages of its own; ref holds the number of the first.
func (l *lmdb) overflow(ref []byte, size int) ([]byte, error) {
	if len(ref) < l.word {
		return nil, errors.New("the number of its page is beyond the page's end")
	}
	n := (l.head-1+size)/l.page + 1
	p, err := l.claim(l.number(ref), n)
	if err != nil {
		return nil, err
	}
	kind, pages := l.order.Uint16(p[l.word+2:])&0x2f, l.order.Uint32(p[l.word+4:])
	if left := uint64(len(l.seen)) - l.number(ref); kind != 0x04 || uint64(pages) < uint64(n) || uint64(pages) > left {
		return nil, fmt.Errorf("its page is of kind %#x with %d pages, want a value's with %d to %d", kind, pages, n, left)
	}
	return p[l.head:], nil
}
