// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Stores in testdata/stores: those named by a version were written by that client, the others by liblmdb
// 0.9.24 on machines of either byte order and word size.

func storeFile(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata/stores", name+".mender-store"))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestReadEveryStore(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/stores/*.mender-store")
	if err != nil || len(files) != 28 {
		t.Fatalf("got %d stores, want 28: %v", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".mender-store")
		s, err := parseMenderStore(storeFile(t, name))
		if err != nil || s.older != nil {
			t.Errorf("%s: %v, %v", name, err, s)
			continue
		}
		if name == "3.4.0-fresh" {
			if len(s.values) != 0 || s.txn != 0 {
				t.Errorf("%s: got %v", name, s.values)
			}
			continue
		}
		if want := "synthetic-2"; strings.HasPrefix(name, "synthetic") &&
			(string(s.values["artifact-name"]) != want || string(s.values["artifact-provides"]) != `{"a":"b"}`) {
			t.Errorf("%s: got %q", name, s.values)
		}
		if strings.HasSuffix(name, "-abm") && string(s.values["state"]) != strings.Repeat("z", 20000) {
			t.Errorf("%s: got a state of %d bytes", name, len(s.values["state"]))
		}
		if s.values["sub"] != nil || len(s.values["artifact-name"]) == 0 || !bytes.HasPrefix(s.values["artifact-provides"], []byte("{")) {
			t.Errorf("%s: got %q", name, s.values)
		}
	}
	s, _ := parseMenderStore(storeFile(t, "3.4.0-big-overflow"))
	if got := s.values["artifact-provides"]; len(got) != 6251 || got[6250] != '}' || s.txn != 6 {
		t.Errorf("got %d bytes of provides in transaction %d, want 6251 in 6", len(got), s.txn)
	}
}

// storeWith changes a store: where says in which page and at which byte of it.
func storeWith(b []byte, page, at int, value ...byte) []byte {
	b = bytes.Clone(b)
	copy(b[page*4096+at:], value)
	return b
}

// Structural faults, each of which is refused by name. In this store the newest meta page is the first, its
// tree one leaf in page 2, and the state before it cannot be read either, as its root is made to be page 1.
func TestStoreFaults(t *testing.T) {
	t.Parallel()
	good := storeWith(storeFile(t, "3.4.0-committed"), 1, 16+112, 1, 0)
	first := int(binary.LittleEndian.Uint16(good[2*4096+16:])) // of the nodes
	big := storeWith(storeFile(t, "3.4.0-big-overflow"), 1, 16+112, 1, 0)
	for _, c := range []struct {
		what string
		b    []byte
		says string
	}{
		{"sound", good, ""},
		{"empty", nil, "0 bytes"},
		{"one page", good[:4096], "two pages"},
		{"text", bytes.Repeat([]byte("text"), 3000), "mark of LMDB"},
		{"version 2", storeWith(good, 0, 20, 2), "data version 2"},
		{"page size 0", storeWith(good, 0, 16+24, 0, 0), "page size 0"},
		{"page size 65536", storeWith(good, 0, 16+24, 0, 0, 1), "page size 65536"},
		{"no meta page", storeWith(good, 0, 10, 0), "no meta page"},
		{"flags", storeWith(good, 0, 16+76, 4), "flags 0x4"},
		{"depth", storeWith(good, 0, 16+78, 99), "depth 99"},
		{"depth of another tree", storeWith(good, 0, 16+78, 2), "kind 0x2"},
		{"root beyond the file", storeWith(good, 0, 16+112, 99), "want pages from 2"},
		{"root is a meta page", storeWith(good, 0, 16+112, 0), "want pages from 2"},
		{"entries", storeWith(good, 0, 16+104, 9), "3 entries, want 9"},
		{"page number", storeWith(good, 2, 0, 7), "page 2 says"},
		{"kind", storeWith(good, 2, 10, 1), "kind 0x1"},
		{"lower", storeWith(good, 2, 12, 8, 0), "room from 8"},
		{"lower beyond upper", storeWith(good, 2, 12, 0xff, 0xf), "room from 4095"},
		{"upper", storeWith(good, 2, 14, 1, 0x10), "to 4097"},
		{"node before upper", storeWith(good, 2, 16, 20, 0), "entry 0 at 20"},
		{"node at the end", storeWith(good, 2, 16, 0xfc, 0xf), "entry 0 at 4092"},
		{"key of no bytes", storeWith(good, 2, first+6, 0, 0), "key of 0 bytes"},
		{"key too long", storeWith(good, 2, first+6, 0, 2), "key of 512 bytes"},
		{"value beyond the page", storeWith(good, 2, first, 0xff, 0xf), "value of 4095 bytes"},
		{"value too large", storeWith(good, 2, first+2, 0xff), "value of 16711686 bytes"},
		{"order", storeWith(good, 2, first+8, 'z'), `is behind "z`},
		{"a page that is cut off", good[:2*4096], "want pages from 2"},
		{"overflow elsewhere", storeWith(big, 6, overflowRef(big), 3), "kind 0x2 with"},
		{"overflow in the leaf", storeWith(big, 6, overflowRef(big), 6), "met twice"},
		{"overflow beyond the file", storeWith(big, 6, overflowRef(big), 11), "and 1 behind it"},
		{"overflow too short", storeWith(big, int(big[6*4096+overflowRef(big)]), 12, 1), "with 1 pages"},
		{"overflow too long", storeWith(big, int(big[6*4096+overflowRef(big)]), 12, 200), "with 200 pages"},
		{"overflow of another kind", storeWith(big, int(big[6*4096+overflowRef(big)]), 10, 2), "kind 0x2"},
	} {
		s, err := parseMenderStore(c.b)
		if c.says == "" && err == nil && s.txn == 4 {
			continue
		}
		if err == nil || c.says == "" || !strings.Contains(err.Error(), c.says) || exitCode(err) != exitRefused {
			t.Errorf("%s: got %v, want a refusal that says %q", c.what, err, c.says)
		}
	}
}

// overflowRef is where in page 6 the number of a value's page is.
func overflowRef(b []byte) int {
	return bytes.Index(b[6*4096:7*4096], []byte("artifact-provides")) + len("artifact-provides")
}

// The tree of the newest transaction cannot be read: the one before counts, and that is said.
func TestStoreOfTheTransactionBefore(t *testing.T) {
	t.Parallel()
	whole := storeFile(t, "3.4.0-managed-update-install")
	s, err := parseMenderStore(storeWith(whole, 2, 0, 9))
	if err != nil || s.older == nil || s.txn != 9 {
		t.Fatalf("got %+v, %v; want transaction 9, with a warning", s, err)
	}
	if s, err = parseMenderStore(storeWith(whole, 1, 16, 0)); err != nil || s.older == nil || s.txn != 10 {
		t.Errorf("without the second meta page: got %+v, %v; want transaction 10, with a warning", s, err)
	}
}

// A store that is written while it is read, links, pipes, a lock.
func TestReadMenderStore(t *testing.T) {
	t.Parallel()
	ds := t.TempDir()
	d, err := openDir(ds)
	must(t, err)
	defer d.Close()
	if _, err := readMenderStore(d, menderStoreFile); !os.IsNotExist(err) {
		t.Errorf("got %v, want that there is none", err)
	}
	must(t, syscall.Mkfifo(ds+"/"+menderStoreFile, 0o600))
	if _, err := readMenderStore(d, menderStoreFile); err == nil || !strings.Contains(err.Error(), "neither a file") {
		t.Errorf("got %v for a pipe", err)
	}
	must(t, os.Remove(ds+"/"+menderStoreFile))
	must(t, os.WriteFile(ds+"/real", storeFile(t, "5.1.0-bootstrap"), 0o600))
	must(t, os.Symlink("real", ds+"/"+menderStoreFile))
	s, err := readMenderStore(d, menderStoreFile)
	if err != nil || s.txn != 1 || string(s.values["artifact-name"]) != "factory-1" || s.time.IsZero() {
		t.Errorf("got %+v, %v", s, err)
	}
	must(t, os.Truncate(ds+"/real", maxStore+1))
	if _, err := readMenderStore(d, menderStoreFile); exitCode(err) != exitRefused {
		t.Errorf("got %v for a file that is too large, want a refusal", err)
	}
}

// FuzzMenderStore: whatever becomes of a store, it is read or refused, and no more is kept than is in it.
func FuzzMenderStore(f *testing.F) {
	files, _ := filepath.Glob("testdata/stores/*.mender-store")
	var stores [][]byte
	for i, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		stores = append(stores, b)
		for _, at := range []uint32{16, 4096 + 16, 2*4096 + 8, 6*4096 + 8} {
			f.Add(byte(i), at, []byte{1, 0, 2}, uint16(0))
		}
	}
	f.Fuzz(func(t *testing.T, store byte, at uint32, patch []byte, cut uint16) {
		b := bytes.Clone(stores[int(store)%len(stores)])
		b = b[:len(b)-int(cut)%len(b)]
		copy(b[int(at)%len(b):], patch)
		readMutated(t, b)
	})
}

func readMutated(t *testing.T, b []byte) {
	s, err := parseMenderStore(b)
	if err != nil {
		if exitCode(err) != exitRefused {
			t.Fatalf("got %v, want a refusal", err)
		}
		return
	}
	for k, v := range s.values {
		if !menderKeys[k] || len(v) > len(b) {
			t.Fatalf("got %d bytes of %q", len(v), k)
		}
	}
	s.provides()
	s.pauses()
	if u, _, err := s.pending(); u != nil && (err != nil || u.Step == stepEnd) {
		t.Fatalf("got update %+v, %v", u, err)
	}
}

// Every byte of the pages that count, of some of the stores, in turn.
func TestMutatedStores(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"3.4.0-managed-reboot", "5.1.0-bootstrap", "synthetic-be32-n", "synthetic-le32-plain", "synthetic-be64-plain"} {
		whole := storeFile(t, name)
		for at, old := range whole {
			if old == 0 && at%64 > 0 && at%4096 > 200 {
				continue
			}
			for _, v := range []byte{0, 1, 0x7f, 0xff} {
				whole[at] = v
				readMutated(t, whole)
			}
			whole[at] = old
		}
	}
	for _, name := range []string{"3.4.0-big-overflow", "synthetic-be64-abm"} {
		whole := storeFile(t, name)
		for n := 0; n < len(whole); n += 509 {
			readMutated(t, whole[:n])
		}
	}
}
