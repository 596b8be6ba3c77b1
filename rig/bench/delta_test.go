// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"math/rand"
	"testing"
)

func TestAdaptive(t *testing.T) {
	old := make([]byte, 10*adaptiveBlock+100)
	rand.New(rand.NewSource(1)).Read(old)
	for _, c := range []struct {
		name   string
		to     []byte
		blocks int // of the index
		fresh  int // that are fetched; of random bytes, so stored as they are
	}{
		{"same", old, 11, 0},
		{"blocks in another order", old[4*adaptiveBlock : 8*adaptiveBlock], 4, 0},
		{"zeros", make([]byte, 2*adaptiveBlock), 2, 0},
		{"all shifted by a byte", old[1 : 1+4*adaptiveBlock], 4, 4},
		{"the same new one twice", append(old[1:1+adaptiveBlock:1+adaptiveBlock], old[1:1+adaptiveBlock]...), 2, 1},
	} {
		got, err := adaptive(bytes.NewReader(old), bytes.NewReader(c.to))
		if want := int64(c.blocks*adaptiveIndex + c.fresh*adaptiveBlock); err != nil || got != want {
			t.Errorf("%s: got %d bytes, %v, want %d", c.name, got, err, want)
		}
	}
}

func TestPayload(t *testing.T) {
	packet := func(options, data int, flags byte) []byte {
		p := make([]byte, 20+20+options+data)
		p[0], p[9] = 0x45, 6
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		p[32], p[33] = byte((20+options)/4)<<4, flags
		return p
	}
	udp := packet(0, 10, 0)
	udp[9] = 17
	for _, c := range []struct {
		name string
		p    []byte
		n    int
		syn  bool
	}{
		{"data", packet(12, 1400, 0x10), 1400, false},
		{"an acknowledgement", packet(12, 0, 0x10), 0, false},
		{"the first of a connection", packet(20, 0, 0x12), 0, true},
		{"udp", udp, 0, false},
		{"cut off", packet(0, 100, 0x10)[:60], 0, false},
		{"short", []byte{0x45}, 0, false},
		{"of IPv6", append([]byte{0x60}, make([]byte, 80)...), 0, false},
	} {
		if n, syn := payload(c.p); n != c.n || syn != c.syn {
			t.Errorf("%s: got %d, %v, want %d, %v", c.name, n, syn, c.n, c.syn)
		}
	}
}
