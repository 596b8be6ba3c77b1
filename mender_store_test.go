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
		if s.values["sub"] != nil || len(s.values["artifact-name"]) == 0 ||
			!bytes.HasPrefix(s.values["artifact-provides"], []byte("{")) {
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
		{"empty", nil, "page 0: cut off"},
		{"one page", good[:4096], "page 0: page size"},
		{"text", bytes.Repeat([]byte("text"), 3000), "page 0: no mark"},
		{"version 2", storeWith(good, 0, 20, 2), "page 0: no meta page"},
		{"page size 0", storeWith(good, 0, 16+24, 0, 0), "page 0: page size"},
		{"page size 65536", storeWith(good, 0, 16+24, 0, 0, 1), "page 0: page size"},
		{"page size 4097", storeWith(good, 0, 16+24, 1), "page 0: page size"},
		{"no meta page", storeWith(good, 0, 10, 0), "page 0: no meta page"},
		{"flags", storeWith(good, 0, 16+76, 4), "another kind"},
		{"depth", storeWith(good, 0, 16+78, 99), "another kind"},
		{"depth of another tree", storeWith(good, 0, 16+78, 2), "page 2: kind"},
		{"depth of no tree", storeWith(good, 0, 16+78, 0), "more or fewer"},
		{"root beyond the file", storeWith(good, 0, 16+112, 99), "page 99: out of place"},
		{"root far beyond the file", storeWith(good, 0, 16+112, 2, 0, 0, 0, 0, 0, 0, 1), "out of place"},
		{"root is a meta page", storeWith(good, 0, 16+112, 0), "page 0: out of place"},
		{"entries", storeWith(good, 0, 16+104, 9), "more or fewer"},
		{"page number", storeWith(good, 2, 0, 7), "page 2: another number"},
		{"kind", storeWith(good, 2, 10, 1), "page 2: kind"},
		{"lower", storeWith(good, 2, 12, 8, 0), "page 2: kind, or room"},
		{"lower beyond upper", storeWith(good, 2, 12, 0xff, 0xf), "page 2: kind, or room"},
		{"upper", storeWith(good, 2, 14, 1, 0x10), "page 2: kind, or room"},
		{"node before upper", storeWith(good, 2, 16, 20, 0), "page 2: entry"},
		{"node at the end", storeWith(good, 2, 16, 0xfc, 0xf), "page 2: entry"},
		{"key of no bytes", storeWith(good, 2, first+6, 0, 0), "page 2: size of a key"},
		{"key too long", storeWith(good, 2, first+6, 0, 2), "page 2: size of a key"},
		{"value beyond the page", storeWith(good, 2, first, 0xff, 0xf), "page 2: size of a value"},
		{"value too large", storeWith(good, 2, first+2, 0xff), "page 2: size of a value"},
		{"order", storeWith(good, 2, first+8, 'z'), "page 2: order"},
		{"a page that is cut off", good[:2*4096], "page 2: out of place"},
		{"overflow elsewhere", storeWith(big, 6, overflowRef(big), 3), "page 3: no pages of a value"},
		{"overflow in the leaf", storeWith(big, 6, overflowRef(big), 6), "page 6: met twice"},
		{"overflow beyond the file", storeWith(big, 6, overflowRef(big), 11), "page 11: out of place"},
		{"overflow too short", storeWith(big, int(big[6*4096+overflowRef(big)]), 12, 1), "no pages of a value"},
		{"overflow too long", storeWith(big, int(big[6*4096+overflowRef(big)]), 12, 200), "no pages of a value"},
		{"overflow of another kind", storeWith(big, int(big[6*4096+overflowRef(big)]), 10, 2), "no pages of a value"},
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
	for _, w := range []storeWriter{{order: binary.BigEndian, word: 4, page: 512},
		{order: binary.LittleEndian, word: 8, page: 16384}} {
		f.Add(byte(len(stores)), uint32(2*w.page+w.word+4), []byte{1, 0, 2}, uint16(0))
		stores = append(stores, w.write(storeValues()))
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
		if len(v) > len(b) {
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
	for _, name := range []string{"3.4.0-managed-reboot", "5.1.0-bootstrap", "synthetic-be32-n", "synthetic-le32-plain",
		"synthetic-be64-plain"} {
		whole := storeFile(t, name)
		for at, old := range whole {
			if old == 0 && at%64 > 0 && at%4096 > 200 || testing.Short() && at%17 > 0 {
				continue
			}
			for _, v := range []byte{0, 1, 0x7f, 0xff} {
				whole[at] = v
				readMutated(t, whole)
			}
			whole[at] = old
		}
	}
	small := storeWriter{order: binary.BigEndian, word: 4, page: 512} // with three levels of pages
	for _, whole := range [][]byte{storeFile(t, "3.4.0-big-overflow"), storeFile(t, "synthetic-be64-abm"),
		small.write(storeValues())} {
		for n := 0; n < len(whole); n += 509 {
			readMutated(t, whole[:n])
		}
	}
}
