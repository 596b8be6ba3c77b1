// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
)

// Of RAUC's adaptive update by block-hash-index (its documentation, "Adaptive Updates"): the image in blocks of 4 KiB,
// an index of their SHA-256.
const (
	adaptiveBlock = 4096
	adaptiveIndex = sha256.Size
)

// adaptive is what such an update from one image to another fetches at least, in bytes: the index, and the blocks that
// are new, each counted once and as if compressed alone by gzip -9. A bundle has them in larger blocks of squashfs.
func adaptive(from, to io.Reader) (int64, error) {
	have := map[[sha256.Size]byte]bool{sha256.Sum256(make([]byte, adaptiveBlock)): true}
	if err := eachBlock(from, func(b []byte) { have[sha256.Sum256(b)] = true }); err != nil {
		return 0, err
	}
	var sum int64
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return 0, err
	}
	err = eachBlock(to, func(b []byte) {
		sum += adaptiveIndex
		h := sha256.Sum256(b)
		if have[h] {
			return
		}
		have[h] = true
		out.Reset()
		z.Reset(&out)
		z.Write(b)
		z.Close()
		sum += int64(min(out.Len(), len(b)))
	})
	return sum, err
}

// eachBlock gives the blocks of r, the last one filled with zeros.
func eachBlock(r io.Reader, do func([]byte)) error {
	in := bufio.NewReaderSize(r, 1<<20)
	for b := make([]byte, adaptiveBlock); ; {
		n, err := io.ReadFull(in, b)
		if n > 0 {
			clear(b[n:])
			do(b)
		}
		if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// adaptiveMain wants two images, and prints that figure.
func adaptiveMain(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("got %q, want two images", args)
	}
	old, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer old.Close()
	image, err := os.Open(args[1])
	if err != nil {
		return err
	}
	defer image.Close()
	n, err := adaptive(old, image)
	if err == nil {
		fmt.Println(n)
	}
	return err
}
