// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
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
	maxStoreKey   = 511   // bytes (MDB_MAXKEYSIZE)
	maxStoreKeys  = 10000 // Mender's clients have eight
)

// menderStore is what a store says.
type menderStore struct {
	file   string
	txn    int               // transaction that wrote it
	sum    uint32            // CRC-32 (IEEE) of the file
	time   time.Time         // of the file's last change
	older  error             // why it is the state before the last transaction; nil: it is not
	values map[string][]byte // by key
}

// menderRuns is an error while a client has the store open: it then holds a lock on the first byte of the lock
// file (mdb_env_setup_locks), with its process, or 0 from another PID namespace (fcntl(2), F_GETLK).
func menderRuns(d *dir) error {
	f, err := d.follow(menderStoreLock, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock := syscall.Flock_t{Type: syscall.F_WRLCK, Len: 1}
	if err == nil {
		defer f.Close()
		err = syscall.FcntlFlock(f.Fd(), syscall.F_GETLK, &lock)
	}
	switch {
	case err != nil:
		return refuseUnlessPassing(err, "whether Mender's client runs: %w", err)
	case lock.Type == syscall.F_UNLCK:
		return nil
	}
	return withHint(tryLater("Mender's client is running: process %d has its store in %q open", lock.Pid, d.path),
		"stop it, and keep it from starting again: a device has one update client")
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
	metas := make([]byte, min(size, 2*32768))
	_, err := f.ReadAt(b, 0)
	if err == nil {
		_, err = f.ReadAt(metas, 0)
	}
	switch {
	case err == io.EOF, err == nil && !bytes.Equal(metas, b[:len(metas)]):
		return nil, errStoreChanges
	case err != nil:
		return nil, err
	}
	return parseMenderStore(b)
}

// lmdb is a file with the shape of what is in it. All its numbers fit into 30 bits: what is larger is beyond
// any store, and counts as tooLarge.
type lmdb struct {
	b     []byte
	big   bool // the machine's byte order
	word  int  // bytes of a number of a page or transaction: 4 or 8
	head  int  // bytes of a page's header
	page  int  // bytes of a page
	seen  []bool
	count int    // entries met
	last  []byte // key of the last of them
	found map[string][]byte
}

// lmdbMeta is what a meta page says of the main database.
type lmdbMeta struct {
	txn, entries, root, flags, depth int
}

const tooLarge = 1 << 30

// number reads one of n bytes.
//
//go:noinline
func (l *lmdb) number(b []byte, n int) (v int) {
	for i := range n {
		if !l.big {
			i = n - 1 - i
		}
		if v >= tooLarge>>8 {
			return tooLarge
		}
		v = v<<8 | int(b[i])
	}
	return v
}

// parseMenderStore reads the newest state of a store, whatever machine wrote it. It keeps b.
func parseMenderStore(b []byte) (*menderStore, error) {
	l, err := lmdbLayout(b)
	if err != nil {
		return nil, err
	}
	newest, err := l.meta(0)
	if err != nil {
		return nil, err
	}
	other, fault := l.meta(1)
	if fault == nil && other.txn > newest.txn {
		newest, other = other, newest
	}
	s := &menderStore{txn: newest.txn, sum: crc32.ChecksumIEEE(b), older: fault}
	if err = l.read(newest); err != nil && fault == nil && l.read(other) == nil {
		// Its pages may have been used again, which the checks would show with near certainty.
		s.txn, s.older, err = other.txn, err, nil
	}
	s.values = l.found
	return s, err
}

// errStore is a fault of the file.
//
//go:noinline
func errStore(page int, what string) error { return refuse("no sound store: page %d: %s", page, what) }

// lmdbLayout tells byte order, word size and page size by the first meta page.
func lmdbLayout(b []byte) (*lmdb, error) {
	for _, word := range []int{8, 4} {
		head := word + 8
		if len(b) < 1024 {
			return nil, errStore(0, "cut off")
		}
		mark := string(b[head:][:4])
		if mark != lmdbMark && mark != lmdbMarkBig {
			continue
		}
		l := &lmdb{b: b, big: mark == lmdbMarkBig, word: word, head: head}
		l.page = l.number(b[head+8+2*word:], 4)
		if l.page < 512 || l.page > 32768 || l.page&(l.page-1) != 0 || len(b) < 2*l.page {
			return nil, errStore(0, "page size")
		}
		return l, nil
	}
	return nil, errStore(0, "no mark of LMDB")
}

const lmdbMark, lmdbMarkBig = "\xde\xc0\xef\xbe", "\xbe\xef\xc0\xde"

func (l *lmdb) meta(i int) (m lmdbMeta, err error) {
	p := l.b[i*l.page:]
	at := p[l.head:]
	mark := string(at[:4])
	if l.kind(p)&0x08 == 0 || mark != lmdbMark && mark != lmdbMarkBig || l.number(at[4:], 4) != 1 {
		return m, errStore(i, "no meta page of data version 1")
	}
	main := at[16+7*l.word:] // behind magic, version, two words, and the record of the free list
	m = lmdbMeta{flags: l.number(main[4:], 2), depth: l.number(main[6:], 2), entries: l.number(main[8+3*l.word:], l.word)}
	m.root, m.txn = l.number(main[8+4*l.word:], l.word), l.number(main[8+6*l.word:], l.word)
	return m, nil
}

// kind is what the header of a page says: 0x01 branch, 0x02 leaf, 0x04 overflow, 0x08 meta, 0x20 leaf of another form.
//
//go:noinline
func (l *lmdb) kind(p []byte) int { return l.number(p[l.word+2:], 2) & 0x2f }

// read walks the whole tree, which says more about its soundness than a search would.
func (l *lmdb) read(m lmdbMeta) (err error) {
	l.seen, l.count, l.last, l.found = make([]bool, len(l.b)/l.page), 0, nil, map[string][]byte{}
	if m.flags != 0 || m.depth > maxStoreDepth {
		return errStore(m.root, "root of a database of another kind")
	}
	if m.depth > 0 { // else it is empty, and has no root
		err = l.walk(m.root, m.depth)
	}
	if err == nil && l.count != m.entries {
		err = errStore(m.root, "root of more or fewer entries")
	}
	return err
}

// claim gives n pages from page num on, which nothing else may be in.
func (l *lmdb) claim(num, n int) ([]byte, error) {
	if num < 2 || num+n > len(l.seen) {
		return nil, errStore(num, "out of place")
	}
	for i := num; i < num+n; i++ {
		if l.seen[i] {
			return nil, errStore(i, "met twice")
		}
		l.seen[i] = true
	}
	p := l.b[num*l.page:][:n*l.page]
	if l.number(p, l.word) != num {
		return nil, errStore(num, "another number in its header")
	}
	return p, nil
}

// walk reads page num, which is depth levels above what is below the leaves, and all below it.
func (l *lmdb) walk(num, depth int) error {
	p, err := l.claim(num, 1)
	if err != nil {
		return err
	}
	lower, upper, kind := l.number(p[l.word+4:], 2), l.number(p[l.word+6:], 2), 0x01
	if depth == 1 {
		kind = 0x02
	}
	if l.kind(p) != kind || lower < l.head || lower > upper || upper > l.page {
		return errStore(num, "kind, or room")
	}
	for at := l.head; at+1 < lower; at += 2 {
		off := l.number(p[at:], 2)
		if off < upper || off+8 > l.page {
			return errStore(num, "entry out of place")
		}
		n := p[off:] // its entry: 32 bits of size or page, flags, bytes of the key, key, data
		size, flags, klen := l.number(n, 4), l.number(n[4:], 2), l.number(n[6:], 2)
		if n = n[8:]; klen > min(len(n), maxStoreKey) || klen == 0 && (depth == 1 || at > l.head) {
			return errStore(num, "size of a key")
		}
		if depth == 1 {
			err = l.leaf(num, n[:klen], n[klen:], size, flags)
		} else {
			if flags != 0 && l.word == 8 { // further bits of the page
				size = tooLarge
			}
			err = l.walk(size, depth-1)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// leaf takes an entry of page num; its page ends with data.
func (l *lmdb) leaf(num int, key, data []byte, size, flags int) (err error) {
	if l.count++; l.count > maxStoreKeys || l.last != nil && bytes.Compare(key, l.last) <= 0 {
		return errStore(num, "order or number of keys")
	}
	l.last = key
	if size <= maxStoreValue && flags&0x01 != 0 && len(data) >= l.word { // it has pages of its own
		num = l.number(data, l.word)
		n := (l.head-1+size)/l.page + 1
		if data, err = l.claim(num, n); err != nil {
			return err
		}
		if pages := l.number(data[l.word+4:], 4); l.kind(data) != 0x04 || pages < n || num+pages > len(l.seen) {
			return errStore(num, "no pages of a value")
		}
		data = data[l.head:]
	}
	if size > min(len(data), maxStoreValue) {
		return errStore(num, "size of a value")
	}
	if flags&0x06 == 0 { // neither a database of its own nor several values
		l.found[string(key)] = data[:size]
	}
	return nil
}
