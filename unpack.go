// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// newUnpacker decompresses the section that in is fenced to.
func newUnpacker(kind string, in *input, lim unpackLimits) (unpacker, error) {
	head, err := in.peek(6)
	if err != nil {
		return nil, err
	}
	if magic := compressionMagic[kind]; !bytes.HasPrefix(head, []byte(magic)) && !(kind == "zstd" && skippable(head)) {
		return nil, fmt.Errorf("not %s data, as its name says: starts with % x, want % x", kind, head, magic)
	}
	switch kind {
	case "none":
		return &stored{in: in}, nil
	case "gzip":
		return newGunzip(in, restartPoint{Fresh: true}, nil)
	case "xz":
		return &unxz{in: in, lim: lim, index: sha256.New()}, nil
	case "zstd":
		return &unzstd{in: in, lim: lim}, nil
	}
	return nil, fmt.Errorf("compression %q is not known", kind)
}

// resumeUnpacker goes on at p, where in stands. window is what comes before p.Out in the
// tar, 32 KiB of it, needed by gzip only.
func resumeUnpacker(in *input, p restartPoint, window []byte, lim unpackLimits) (unpacker, error) {
	switch p.Kind {
	case "none":
		return &stored{in: in, out: p.Out}, nil
	case "gzip":
		if !p.Fresh && len(window) < gzipWindow {
			return nil, fmt.Errorf("resuming gzip: got %d bytes of what comes before, want %d", len(window), gzipWindow)
		}
		return newGunzip(in, p, window)
	case "xz":
		z := &unxz{in: in, lim: lim, index: sha256.New(), out: p.Out, inStream: true, partial: true}
		return z, z.setCheck(p.Check)
	case "zstd":
		return &unzstd{in: in, lim: lim, out: p.Out}, nil
	}
	return nil, fmt.Errorf("resuming %q data is not possible", p.Kind)
}

// stored is the unpacker of uncompressed data.
type stored struct {
	in  *input
	out int64
}

func (s *stored) Read(p []byte) (int, error) {
	n, err := s.in.Read(p)
	s.out += int64(n)
	return n, err
}

func (s *stored) latestRestart() (restartPoint, bool) {
	return restartPoint{Kind: "none", File: s.in.offset(), Out: s.out, Fresh: true}, true
}

// defaultDictLimit is 64 MiB, which mender-artifact's xz needs, or half of the memory that
// the kernel says is available (proc(5), meminfo), whichever is less.
func defaultDictLimit() int64 {
	limit := int64(64 << 20)
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return limit
	}
	for _, line := range strings.Split(string(text), "\n") {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "MemAvailable:" {
			if kb, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				limit = min(limit, kb<<10/2)
			}
		}
	}
	return limit
}
