// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"hash/crc32"
	"strings"
)

// environment is U-Boot's redundant environment: two copies of size bytes, each a CRC-32 of the
// data, a flag that counts, and NUL-terminated variables (U-Boot, include/env_internal.h).
func environment(size int, vars []string) []byte {
	var both []byte
	for flag := byte(2); flag > 0; flag-- {
		one := make([]byte, size)
		one[4] = flag
		copy(one[5:], strings.Join(vars, "\x00"))
		binary.LittleEndian.PutUint32(one, crc32.ChecksumIEEE(one[5:]))
		both = append(both, one...)
	}
	return both
}

// partNumber is what a device name ends in.
func partNumber(dev string) string { return dev[len(strings.TrimRight(dev, "0123456789")):] }
