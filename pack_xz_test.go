// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"testing"

	"github.com/ulikunitz/xz"
)

// What is written is what the library would write, to the byte, in whatever pieces it comes.
func TestXZWriter(t *testing.T) {
	t.Parallel()
	const block = 4096
	data := make([]byte, 3*block)
	rand.New(rand.NewSource(1)).Read(data[:block+50])
	for _, size := range []int{0, 1, 3, block, block + 1} {
		for _, piece := range []int{len(data), 1000} {
			var got, want bytes.Buffer
			z, err := newXZWriter(&got, block)
			must(t, err)
			lib, err := xz.WriterConfig{DictCap: packDict, BlockSize: block, CheckSum: xz.CRC64}.NewWriter(&want)
			must(t, err)
			_, err = io.CopyBuffer(struct{ io.Writer }{z}, struct{ io.Reader }{bytes.NewReader(data[:size])},
				make([]byte, piece))
			must(t, err)
			_, err = lib.Write(data[:size])
			must(t, errors.Join(err, z.Close(), lib.Close()))
			if !bytes.Equal(got.Bytes(), want.Bytes()) {
				t.Fatalf("%d bytes by %d: got %d bytes\n%.100x\nwant %d\n%.100x", size, piece, got.Len(), &got, want.Len(),
					&want)
			}
		}
	}
	failing := &brokenWriter{}
	for failing.at = 0; failing.at < 12; failing.at++ {
		failing.n = 0
		z, err := newXZWriter(failing, block)
		if err == nil {
			_, err = z.Write(data[:block+1])
		}
		if err == nil {
			err = z.Close()
		}
		if (err == nil) != (failing.n <= failing.at) {
			t.Errorf("write %d failed: %v", failing.at, err)
		}
	}
}

// brokenWriter fails the write of number at.
type brokenWriter struct{ n, at int }

func (b *brokenWriter) Write(p []byte) (int, error) {
	if b.n++; b.n > b.at {
		return 0, fmt.Errorf("write %d", b.n)
	}
	return len(p), nil
}
