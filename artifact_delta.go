// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// readIndex reads the index that info tells of, behind the tar header of the image, which nextFile has just given. The
// payload goes on as before, whether the index is good or not. An error of the source is in a.in.failed.
func (a *artifact) readIndex(info *deltaInfo) (*deltaIndex, error) {
	g, ok := a.un.(*gunzip)
	if !ok {
		return nil, fmt.Errorf("delta index: the payload's compression is %s, want gzip", a.Compression)
	}
	raw := make([]byte, 0, info.Size)
	g.extra = func(n int64) (err error) {
		raw, err = appendSlice(raw, a.in, n)
		return err
	}
	defer func() { g.extra = nil }()
	for len(g.inflate.pending()) == 0 && (g.member || g.members <= info.Members) {
		if err := g.unpack(); err != nil {
			g.err = err
			return nil, err
		}
	}
	x, err := parseDeltaIndex(raw, info, a.file.Size)
	if err != nil {
		return nil, err
	}
	if at := a.in.offset() - a.dataAt; at != x.first-imageHead {
		return nil, fmt.Errorf("delta index: its image begins at byte %d, and it has it at %d", at, x.first-imageHead)
	}
	return x, a.holdsChunks(x)
}

// holdsChunks checks that the data member is long enough for what x says.
func (a *artifact) holdsChunks(x *deltaIndex) error {
	const least = imageTail + minMember
	if left := a.dataEnd - a.dataAt - x.end; left < least {
		return fmt.Errorf("delta index: the data has %d bytes behind its chunks, want %d or more", left, least)
	}
	return nil
}

// image is the one of a rootfs-image.
func (a *artifact) image() (*payloadFile, error) {
	if a.PayloadType != "rootfs-image" {
		return nil, fmt.Errorf("payload of type %q, want rootfs-image", a.PayloadType)
	}
	return a.nextFile()
}

// indexed reads no more than the index of an artifact that was just opened.
func (a *artifact) indexed() (*deltaIndex, *deltaInfo, error) {
	info, err := parseDeltaInfo(a.MetaData)
	if err == nil && info == nil {
		err = withHint(errors.New("it has no index"), "make it with mendlet pack --delta")
	}
	if err != nil {
		return nil, nil, err
	}
	if _, err := a.image(); err != nil {
		return nil, nil, err
	}
	x, err := a.readIndex(info)
	if err != nil {
		return nil, nil, a.fail(err)
	}
	return x, info, nil
}

// appendSlice reads an extra field of n bytes, and adds what it has of an index to raw, as far as there is room.
func appendSlice(raw []byte, in *input, n int64) ([]byte, error) {
	head, err := in.need(int(min(n, 4)))
	if err != nil {
		return nil, err
	}
	if n >= 4 && string(head[:2]) == deltaSubfield && int64(binary.LittleEndian.Uint16(head[2:])) == n-4 {
		if err := in.skip(4); err != nil {
			return nil, err
		}
		n -= 4
		had := len(raw)
		raw = raw[:min(int64(cap(raw)), int64(had)+n)]
		if _, err := io.ReadFull(in, raw[had:]); err != nil {
			return nil, noEOF(err)
		}
		n -= int64(len(raw) - had)
	}
	return raw, in.skip(n)
}

// shownDelta is what "mendlet show --json" prints of an index; its names are an interface.
type shownDelta struct {
	Average int64  `json:"average"` // bytes of a chunk that it was made for
	Chunks  int    `json:"chunks"`
	Size    int64  `json:"index_size"`        // bytes
	Problem string `json:"problem,omitempty"` // why devices fetch the whole image
}

func newShownDelta(info *deltaInfo, x *deltaIndex) *shownDelta {
	return &shownDelta{Average: x.average, Chunks: len(x.chunks), Size: info.Size}
}

func (s *shownDelta) String() string {
	if s.Problem != "" {
		return "no use: " + s.Problem
	}
	return fmt.Sprintf("%d chunks of %d KiB on average, index of %d bytes", s.Chunks, s.Average>>10, s.Size)
}

// showDelta holds the index of an artifact against its image f, which it reads to its end if there is an index; nil if
// there is none. The error is one of f.
func (a *artifact) showDelta(f *payloadFile) (*shownDelta, error) {
	info, err := parseDeltaInfo(a.MetaData)
	if err != nil {
		return &shownDelta{Problem: err.Error()}, nil
	}
	if info == nil {
		return nil, nil
	}
	x, err := a.readIndex(info)
	if a.in.failed != nil {
		return nil, a.fail(err)
	}
	if err != nil {
		return &shownDelta{Size: info.Size, Problem: err.Error()}, nil
	}
	s := newShownDelta(info, x)
	buf := make([]byte, x.average*maxShare)
	for i := range x.chunks {
		p := buf[:x.chunks[i].size]
		if _, err := io.ReadFull(f, p); err != nil {
			return nil, err
		}
		if describe(p).sum != x.chunks[i].sum && s.Problem == "" {
			s.Problem = fmt.Sprintf("delta index: chunk %d is another one than it says", i)
		}
	}
	return s, nil
}
