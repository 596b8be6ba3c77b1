// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Stores of machines with other page sizes, made here: a writer of what liblmdb 0.9 leaves after one transaction
// (mdb.c: MDB_page, MDB_node, MDB_meta), which liblmdb itself reads where it can.

// storeWriter makes the file of one machine.
type storeWriter struct {
	order binary.AppendByteOrder
	word  int // bytes
	page  int // bytes
	b     []byte
	kinds [3]int // pages of branches, leaves, values
}

// storePart is an entry of a page: of a leaf, or a page below.
type storePart struct {
	key   string
	data  []byte // of a leaf, or the number of its page if it is large
	size  int    // of the value
	flags int
	child int
}

func (w *storeWriter) number(b []byte, n, size int) []byte {
	switch size {
	case 2:
		return w.order.AppendUint16(b, uint16(n))
	case 4:
		return w.order.AppendUint32(b, uint32(n))
	}
	return w.order.AppendUint64(b, uint64(n))
}

// add appends pages with one header, and gives the number of the first.
func (w *storeWriter) add(flags, pages int, rest []byte) int {
	num := len(w.b) / w.page
	b := w.number(w.number(w.number(nil, num, w.word), 0, 2), flags, 2)
	b = append(b, rest...)
	w.b = append(w.b, append(b, make([]byte, pages*w.page-len(b))...)...)
	return num
}

// level writes the pages of one level of the tree, and gives what the level above has.
func (w *storeWriter) level(flags int, parts []storePart) (above []storePart) {
	head := w.word + 8
	for len(parts) > 0 {
		var nodes []byte // the last first
		var offsets []int
		first := parts[0].key
		for len(parts) > 0 {
			p := parts[0]
			if flags == 0x01 && len(offsets) == 0 {
				p.key = "" // lower than all
			}
			lo, nodeFlags := p.size, p.flags
			if flags == 0x01 {
				lo, nodeFlags = p.child, 0
			}
			node := w.number(w.number(w.number(nil, lo, 4), nodeFlags, 2), len(p.key), 2)
			node = append(append(node, p.key...), p.data...)
			node = append(node, make([]byte, len(node)%2)...)
			if head+2*len(offsets)+2+len(nodes)+len(node) > w.page {
				break
			}
			nodes = append(node, nodes...)
			offsets = append(offsets, w.page-len(nodes))
			parts = parts[1:]
		}
		body := w.number(w.number(nil, head+2*len(offsets), 2), w.page-len(nodes), 2)
		for _, o := range offsets {
			body = w.number(body, o, 2)
		}
		body = append(body, make([]byte, w.page-len(nodes)-(w.word+4)-len(body))...)
		above = append(above, storePart{key: first, child: w.add(flags, 1, append(body, nodes...))})
		w.kinds[flags-1]++
	}
	return above
}

// write gives the file with these values.
func (w *storeWriter) write(values map[string]string) []byte {
	head := w.word + 8
	w.b = make([]byte, 2*w.page)
	var parts []storePart
	for _, key := range slices.Sorted(maps.Keys(values)) {
		p := storePart{key: key, data: []byte(values[key]), size: len(values[key])}
		if 8+len(key)+p.size > (w.page-head)/2&^1-2 { // me_nodemax
			pages := (head-1+p.size)/w.page + 1
			num := w.add(0x04, pages, append(w.number(nil, pages, 4), p.data...))
			p.data, p.flags = w.number(nil, num, w.word), 0x01
			w.kinds[2] += pages
		}
		parts = append(parts, p)
	}
	depth := 1
	parts = w.level(0x02, parts)
	for ; len(parts) > 1; depth++ {
		parts = w.level(0x01, parts)
	}
	body := w.b
	for i, txn := range []int{2, 1} {
		w.b = w.b[:i*w.page]
		w.add(0x08, 1, w.meta(txn, depth, len(values), parts[0].child, len(body)/w.page-1))
	}
	copy(body, w.b)
	return body
}

// meta is what a meta page has behind its flags; the transaction before had an empty tree.
func (w *storeWriter) meta(txn, depth, entries, root, last int) []byte {
	kinds := w.kinds
	if txn == 1 {
		depth, entries, root, kinds = 0, 0, -1, [3]int{}
	}
	b := w.number(w.order.AppendUint32(w.number(nil, 0, 4), 0xbeefc0de), 1, 4)
	b = w.number(w.number(b, 0, w.word), 1<<20, w.word)
	for _, db := range [][8]int{{w.page, 0x4008, 0, 0, 0, 0, 0, -1},
		{0, 0, depth, kinds[0], kinds[1], kinds[2], entries, root}} {
		b = w.number(w.number(w.number(b, db[0], 4), db[1], 2), db[2], 2)
		for _, n := range db[3:] {
			b = w.number(b, n, w.word)
		}
	}
	return w.number(w.number(b, last, w.word), txn, w.word)
}

// storeValues are as many as take a tree of some depth, with one that takes pages of its own.
func storeValues() map[string]string {
	values := map[string]string{"artifact-name": "release-1", "artifact-group": "g", "artifact-provides": `{"a":"` +
		strings.Repeat("b", 40000) + `"}`, "standalone-state": `{"Version":1,"ArtifactName":"release-2"}`}
	for i := range 300 {
		values[fmt.Sprintf("key-%04d", i)] = strings.Repeat("v", i%100)
	}
	return values
}

// Every page size, word size and byte order, as a tree and as one leaf.
func TestStoreOfEveryMachine(t *testing.T) {
	t.Parallel()
	_, err := exec.LookPath("mdb_dump")
	for page := 512; page <= 32768; page *= 2 {
		for _, word := range []int{4, 8} {
			for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
				values := storeValues()
				name := fmt.Sprintf("%d bytes of page, %d of a word, %s", page, word, order)
				for len(values) > 0 {
					b := (&storeWriter{order: order, word: word, page: page}).write(values)
					s, rerr := parseMenderStore(b)
					if rerr != nil || s.older != nil || s.txn != 2 || len(s.values) != len(values) {
						t.Fatalf("%s: got %+v, %v", name, s, rerr)
					}
					for k, v := range values {
						if string(s.values[k]) != v {
							t.Fatalf("%s: %q: got %.20q, want %.20q", name, k, s.values[k], v)
						}
					}
					if word == 8 && order.String() == "LittleEndian" && err == nil && littleMachine() {
						dumpedByLMDB(t, name, b, values)
					}
					if len(values) == 1 {
						break
					}
					values = map[string]string{"artifact-name": "release-1"}
				}
			}
		}
	}
	if err != nil {
		t.Log("no mdb_dump: liblmdb did not read what was made here")
	}
}

// littleMachine tells one of the machines whose stores liblmdb here reads.
func littleMachine() bool { return binary.NativeEndian.Uint16([]byte{1, 0}) == 1 && ^uint(0)>>63 == 1 }

// dumpedByLMDB compares with what liblmdb makes of the file.
func dumpedByLMDB(t *testing.T, name string, store []byte, values map[string]string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	must(t, os.WriteFile(path, store, 0o600))
	var want bytes.Buffer
	for _, key := range slices.Sorted(maps.Keys(values)) {
		fmt.Fprintf(&want, " %s\n %s\n", key, values[key])
	}
	out, err := exec.Command("mdb_dump", "-n", "-p", path).CombinedOutput()
	_, data, _ := strings.Cut(string(out), "HEADER=END\n")
	if data = strings.TrimSuffix(data, "DATA=END\n"); err != nil || data != want.String() {
		t.Errorf("%s: liblmdb: %v: got %d bytes, %.300q, want %d", name, err, len(data), out, want.Len())
	}
}
