// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"strings"
)

// readEnv does what U-Boot does at its start: of the copies whose checksum is right it takes the
// one with the newer flag byte. It returns nil if neither is valid.
func readEnv(r io.ReaderAt) map[string]string {
	a, b := envCopy(r, envA), envCopy(r, envB)
	switch {
	case a == nil && b == nil:
		return nil
	case a == nil:
		a = b
	case b != nil:
		fa, fb := a[4], b[4]
		if fa == 255 && fb == 0 || fb > fa && !(fb == 255 && fa == 0) {
			a = b
		}
	}
	vars := map[string]string{}
	for _, kv := range bytes.Split(a[5:], []byte{0}) {
		if len(kv) == 0 {
			break
		}
		k, v, _ := strings.Cut(string(kv), "=")
		vars[k] = v
	}
	return vars
}

func envCopy(r io.ReaderAt, off int64) []byte {
	b := make([]byte, envSize)
	if _, err := r.ReadAt(b, off); err != nil || crc32.ChecksumIEEE(b[5:]) != binary.LittleEndian.Uint32(b) {
		return nil
	}
	return b
}
