// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"math/rand"
	"os"
	"path/filepath"
	"testing"
)

func testDisk(t *testing.T) (*disk, string) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 8*sector), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := openDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	return d, path
}

func fill(sect int64, n int, b byte) op {
	return op{off: sect * sector, data: bytes.Repeat([]byte{b}, n*sector)}
}

// firsts returns the first byte of each sector.
func firsts(p []byte) string {
	var out []byte
	for i := 0; i < len(p); i += sector {
		out = append(out, max(p[i], '.'))
	}
	return string(out)
}

func TestUnflushedWritesAreReadButLost(t *testing.T) {
	d, path := testDisk(t)
	d.write(fill(0, 2, 'a'))
	d.flush()
	d.write(fill(0, 4, 'b'))
	fua := fill(1, 1, 'c')
	fua.fua = true
	d.write(fua)
	p := make([]byte, 8*sector)
	if err := d.read(p, 0); err != nil || firsts(p) != "bcbb...." {
		t.Fatalf("reads %q, %v, want bcbb....", firsts(p), err)
	}
	if _, err := d.powerCut(loseAll, rand.New(rand.NewSource(1))); err != nil {
		t.Fatal(err)
	}
	if p, _ := os.ReadFile(path); firsts(p) != "ac......" {
		t.Fatalf("the file holds %q, want ac......", firsts(p))
	}
}

func TestSurvivors(t *testing.T) {
	pending := []op{fill(0, 1, 'a'), fill(1, 1, 'b'), fill(2, 1, 'c')}
	rng := rand.New(rand.NewSource(1))
	seen := map[lossMode]map[string]bool{}
	for _, mode := range []lossMode{keepAll, loseAll, prefix, anything} {
		seen[mode] = map[string]bool{}
		for range 200 {
			p := make([]byte, 8*sector)
			overlay(p, 0, survivors(pending, fill(4, 2, 'x'), mode, rng))
			seen[mode][firsts(p)] = true
		}
	}
	// the write in flight has three outcomes: none, one, or both of its sectors
	for mode, want := range map[lossMode]int{keepAll: 3, loseAll: 3, prefix: 4 * 3, anything: 8 * 3} {
		if len(seen[mode]) != want {
			t.Errorf("%s: %d different outcomes, want %d: %v", mode, len(seen[mode]), want, seen[mode])
		}
	}
	if !seen[keepAll]["abc....."] || !seen[loseAll]["....xx.."] || seen[prefix][".b......"] || !seen[anything][".b......"] {
		t.Errorf("outcomes: %v", seen)
	}
}

func TestCutAtIsNotAcknowledged(t *testing.T) {
	d, _ := testDisk(t)
	cut := d.cutAt("flush", 2)
	if !d.write(fill(0, 1, 'a')) || !d.flush() || !d.write(fill(1, 1, 'b')) {
		t.Fatal("an op before the cut failed")
	}
	if d.flush() || d.write(fill(2, 1, 'c')) {
		t.Fatal("an op at or after the cut was acknowledged")
	}
	<-cut
}

func TestRegion(t *testing.T) {
	for _, c := range []struct {
		off  int64
		want string
	}{{0, "other"}, {envA, "env"}, {envA + envSize, "other"}, {envB + sector, "env"}, {slotA, "slot"}, {dataAt, "data"}} {
		if got := fill(c.off/sector, 1, 0).region(); got != c.want {
			t.Errorf("%#x is %s, want %s", c.off, got, c.want)
		}
	}
}
