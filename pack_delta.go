// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"runtime"
)

// The data member of a delta artifact, as doc/delta.md describes it: one gzip member with the tar header, members
// without data for the index, one for the image, and one for the end of the tar.

// packedDelta is what pack knows of it.
type packedDelta struct {
	average int64      // bytes of a chunk; 0: no delta
	bySight bool       // what the image is decides on that
	front   []byte     // of the data member: tar header and index, which are known last and stand first
	info    *deltaInfo // for the meta-data
}

// set reads the value of --delta; "true" is that of the option alone.
func (d *packedDelta) set(s string) error {
	d.bySight = s == "true"
	switch s {
	case "true", "32k":
		d.average = defaultAverage
	case "16k":
		d.average = minAverage
	case "64k":
		d.average = maxAverage
	default:
		return errors.New("want 16k, 32k or 64k")
	}
	return nil
}

// packsTight tells images of squashfs and EROFS, where a change of a file is followed by little ones all over the
// image. Compressed as they are, they have fewer chunks of 16 KiB than an image of ext4 with the same files has of 32.
func packsTight(front []byte) bool {
	return bytes.HasPrefix(front, []byte("hsqs")) ||
		len(front) > 1024 && bytes.HasPrefix(front[1024:], []byte("\xe2\xe1\xf5\xe0"))
}

// squeeze makes one gzip member of p.
func squeeze(z gzipWriter, to *bytes.Buffer, p []byte) error {
	z.Reset(to)
	_, err := z.Write(p)
	return errors.Join(err, z.Close())
}

// packJob is one chunk on its way.
type packJob struct {
	before int    // bytes of in that are those before the chunk
	in     []byte // up to the chunk's end
	chunk  chunk
	stored bytes.Buffer
	done   chan error
}

// run makes deflate blocks of the chunk. They end with a byte, and may refer to the window before them, which whoever
// unpacks them has.
func (j *packJob) run() {
	p := j.in[j.before:]
	j.chunk = describe(p)
	j.stored.Reset()
	z, err := newDeflate(&j.stored, j.in[:j.before])
	if err == nil {
		_, err = z.Write(p)
		err = errors.Join(err, z.Flush())
	}
	if j.stored.Len() >= len(p) {
		j.storePlain(p)
	}
	j.chunk.stored = uint32(j.stored.Len())
	j.done <- err
}

// storePlain makes blocks that are not compressed (RFC 1951, 3.2.4).
func (j *packJob) storePlain(p []byte) {
	j.stored.Reset()
	for len(p) > 0 {
		n := min(len(p), 0xffff)
		head := binary.LittleEndian.AppendUint16([]byte{0}, uint16(n))
		j.stored.Write(binary.LittleEndian.AppendUint16(head, ^uint16(n)))
		j.stored.Write(p[:n])
		p = p[n:]
	}
}

// packChunks writes the member of the image r to w, and adds its chunks to x. All processors work, on two chunks each
// at most, and what is written does not depend on which is ready first.
func packChunks(w io.Writer, r io.Reader, x *deltaIndex) error {
	jobs := 2 * runtime.GOMAXPROCS(0)
	free, queue, ended := make(chan *packJob, jobs), make(chan *packJob, jobs), make(chan error)
	for range jobs {
		free <- &packJob{done: make(chan error, 1)}
	}
	go func() {
		_, failed := io.WriteString(w, gzipHead)
		for j := range queue {
			if err := <-j.done; failed == nil {
				failed = err
			}
			if failed == nil {
				x.chunks = append(x.chunks, j.chunk)
				_, failed = w.Write(j.stored.Bytes())
			}
			free <- j
		}
		ended <- failed
	}()
	c, crc, window := newChunker(x.average), uint32(0), []byte(nil)
	err := c.split(r, make([]byte, 4*c.max), func(p []byte) error {
		j := <-free
		j.in, j.before = append(append(j.in[:0], window...), p...), len(window)
		window = append(window[:0], j.in[max(len(j.in)-gzipWindow, 0):]...)
		crc = crc32.Update(crc, crc32.IEEETable, p)
		x.imageSize += int64(len(p))
		queue <- j
		go j.run()
		return nil
	})
	close(queue)
	if err := errors.Join(err, <-ended); err != nil {
		return err
	}
	tail := binary.LittleEndian.AppendUint32([]byte(emptyBlock), crc)
	_, err = w.Write(binary.LittleEndian.AppendUint32(tail, uint32(x.imageSize)))
	return err
}

const (
	gzipHead   = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" // no flags, no time, system unknown (RFC 1952, 2.3)
	emptyBlock = "\x03\x00"                                 // of fixed codes, and the last one
)

// write writes the members of the image r and of the end of the tar to w, and keeps what goes before them. head is the
// tar's header.
func (d *packedDelta) write(w io.Writer, r io.Reader, head []byte) error {
	z, err := newGzip(nil)
	if err != nil {
		return err
	}
	var first, last bytes.Buffer
	if err := squeeze(z, &first, head); err != nil {
		return err
	}
	front := make([]byte, 1024+4)
	n, err := io.ReadFull(r, front)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return err
	}
	if d.bySight && packsTight(front[:n]) {
		d.average = minAverage
	}
	x := &deltaIndex{average: d.average, head: int64(first.Len())}
	if err := packChunks(w, io.MultiReader(bytes.NewReader(front[:n]), r), x); err != nil {
		return err
	}
	if err := squeeze(z, &last, make([]byte, -x.imageSize&511+1024)); err != nil {
		return err
	}
	raw := x.encode()
	if len(raw) > maxDeltaIndex {
		return withHint(fmt.Errorf("an index of %d bytes, want at most %d", len(raw), maxDeltaIndex),
			"--delta=64k has the smallest")
	}
	d.front, d.info = appendDeltaMembers(first.Bytes(), raw), x.info(raw)
	_, err = w.Write(last.Bytes())
	return err
}

// appendDeltaMembers puts the index into the extra fields of gzip members that hold nothing else (RFC 1952, 2.3.1.1).
func appendDeltaMembers(b, raw []byte) []byte {
	for len(raw) > 0 {
		slice := raw[:min(len(raw), deltaSlice)]
		raw = raw[len(slice):]
		b = append(b, gzipHead...)
		b[len(b)-7] = 4 // FLG.FEXTRA
		b = binary.LittleEndian.AppendUint16(b, uint16(4+len(slice)))
		b = append(b, deltaSubfield...)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(slice)))
		b = append(b, slice...)
		b = append(b, emptyBlock...)
		b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // CRC-32 and size of nothing
	}
	return b
}

// addInfo puts what is known of the index into the object meta, which may be empty.
func (d *packedDelta) addInfo(meta []byte) ([]byte, error) {
	if d.info == nil {
		return meta, nil
	}
	all := map[string]json.RawMessage{}
	if len(meta) > 0 {
		if err := json.Unmarshal(meta, &all); err != nil {
			return nil, err
		}
	}
	if all[deltaKey] != nil {
		return nil, fmt.Errorf("meta-data has a %q already", deltaKey)
	}
	text, err := json.Marshal(d.info)
	if err != nil {
		return nil, err
	}
	all[deltaKey] = text
	return json.Marshal(all)
}
