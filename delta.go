// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/bits"
)

// The format of delta artifacts, version 2 (doc/delta.md): where an image is cut into chunks, and the index that
// says what and where each of them is. All of it is fixed by the format and never changes within a version: an index
// that was made by one program is compared with what another one cuts.

const (
	deltaVersion  = 2
	deltaMagic    = "MXD2"
	deltaKey      = "mendlet_delta" // of the object in the meta-data
	deltaSubfield = "MX"            // SI1 and SI2 of the index in an extra field (RFC 1952, 2.3.1.1)

	minAverage, maxAverage = 16 << 10, 64 << 10 // bytes of a chunk, a power of two
	defaultAverage         = 32 << 10

	deltaSlice = 65000 // bytes of the index in one gzip member, at most; all but the last have so many
	// deltaMember is what such a member has beside its slice: header, length of the extra field, subfield header, an
	// empty block and trailer (RFC 1952, 2.3).
	deltaMember = 10 + 2 + 4 + 2 + 8
	minMember   = 20 // of any gzip member: header, the shortest block, trailer

	// What the image's member has before its first chunk, a header without a name and the like, and behind its last
	// one, an empty block and the trailer.
	imageHead, imageTail = 10, 2 + 8

	minStored = 6  // bytes of a chunk as it is stored: one byte in a block, whose end is that of a byte
	sumBits   = 48 // of a chunk's SHA-256

	maxDeltaHead  = 64 << 10 // bytes of the first member
	maxDeltaIndex = 4 << 20  // bytes of an index: 12 GiB at the default average
)

// deltaInfo is the object mendlet_delta of an artifact's meta-data, which manifest and signature cover.
type deltaInfo struct {
	Version int    `json:"version"`
	Members int    `json:"members"` // gzip members that hold the index
	Size    int64  `json:"size"`    // bytes of the index
	Sha256  string `json:"sha256"`  // of the index, in hex
}

// parseDeltaInfo gives nil where the meta-data tells of no index, or of one of a later version.
func parseDeltaInfo(meta json.RawMessage) (*deltaInfo, error) {
	var all map[string]json.RawMessage
	if json.Unmarshal(meta, &all) != nil || all[deltaKey] == nil {
		return nil, nil // any JSON may be meta-data
	}
	var info deltaInfo
	var kind struct{ Version int }
	if err := json.Unmarshal(all[deltaKey], &kind); err == nil && kind.Version > deltaVersion {
		return nil, nil
	}
	if err := json.Unmarshal(all[deltaKey], &info); err != nil {
		return nil, fmt.Errorf("mendlet_delta in meta-data: %w", err)
	}
	sum, err := hex.DecodeString(info.Sha256)
	if err != nil || len(sum) != sha256.Size || info.Version != deltaVersion || info.Size < int64(len(deltaMagic)) ||
		info.Size > maxDeltaIndex || info.Members != deltaMembers(info.Size) {
		return nil, fmt.Errorf("mendlet_delta in meta-data: version %d, %d bytes in %d members, sha256 %q: "+
			"want version %d, %d bytes at most in members of %d, and 64 hex digits",
			info.Version, info.Size, info.Members, info.Sha256, deltaVersion, maxDeltaIndex, deltaSlice)
	}
	return &info, nil
}

// deltaMembers says into how many members an index of size bytes goes.
func deltaMembers(size int64) int { return int((size + deltaSlice - 1) / deltaSlice) }

// chunk is one piece of an image. 16 bytes, as there are 32,768 of them to a GiB.
type chunk struct {
	sum    uint64 // chunkSum of its bytes; 0: they are all zero, and it is never fetched
	size   uint32 // bytes of the image
	stored uint32 // bytes of its deflate blocks; 0 where there are none
}

// storedPlain is how many bytes a chunk of size takes in deflate blocks without compression (RFC 1951, 3.2.4).
func storedPlain(size uint32) uint32 { return size + (size+0xfffe)/0xffff*5 }

func (c *chunk) zero() bool { return c.sum == 0 }

// describe makes the chunk of these bytes.
func describe(p []byte) chunk { return chunk{sum: chunkSum(p), size: uint32(len(p))} }

// chunkSum is the first 6 bytes of SHA-256, big endian, with 1 in place of 0; 0 for nothing but zeros.
func chunkSum(p []byte) uint64 {
	if p[0] == 0 && allZero(p) {
		return 0
	}
	sum := sha256.Sum256(p)
	return max(binary.BigEndian.Uint64(sum[:])>>(64-sumBits), 1)
}

// deltaIndex says what an image is made of, and where in the data member each part is stored.
type deltaIndex struct {
	average   int64
	imageSize int64
	head      int64 // bytes of the first gzip member, which holds the image's tar header
	first     int64 // offset in the data member of the first chunk
	end       int64 // offset in the data member of what is behind the last chunk
	chunks    []chunk
}

// encode gives the bytes of the index. first and end follow from the rest.
func (x *deltaIndex) encode() []byte {
	b := []byte(deltaMagic)
	for _, n := range []int64{x.average, x.imageSize, int64(len(x.chunks)), x.head} {
		b = binary.AppendUvarint(b, uint64(n))
	}
	w := bitWriter{b: b}
	for i := range x.chunks {
		c := &x.chunks[i]
		w.put(c.sum, sumBits)
		w.put(uint64(c.size-1), sizeBits(x.average))
		if c.stored == storedPlain(c.size) {
			w.put(1, 1)
		} else {
			w.put(0, 1)
			w.put(uint64(c.stored), sizeBits(x.average))
		}
	}
	w.put(0, -w.n&7)
	return w.b
}

// sizeBits are those of the length of a chunk, less one.
func sizeBits(average int64) uint { return uint(bits.Len64(uint64(average*maxShare - 1))) }

// bitWriter appends numbers to b, each with its lowest bit first, as deflate does.
type bitWriter struct {
	b   []byte
	acc uint64 // the n bits that are not in b yet, less than eight
	n   uint
}

// put appends n bits, 48 at most. Those of v above them do not count.
func (w *bitWriter) put(v uint64, n uint) {
	w.acc |= v & (1<<n - 1) << w.n
	for w.n += n; w.n >= 8; w.n -= 8 {
		w.b = append(w.b, byte(w.acc))
		w.acc >>= 8
	}
}

// info is what goes into the meta-data for the encoded index raw.
func (x *deltaIndex) info(raw []byte) *deltaInfo {
	return &deltaInfo{deltaVersion, deltaMembers(int64(len(raw))), int64(len(raw)), fmt.Sprintf("%x", sha256.Sum256(raw))}
}

// parseDeltaIndex verifies raw by info before it looks into it. imageSize is that of the tar header. The index owns
// none of raw, and takes 16 bytes for a chunk.
func parseDeltaIndex(raw []byte, info *deltaInfo, imageSize int64) (*deltaIndex, error) {
	if sum := sha256.Sum256(raw); int64(len(raw)) != info.Size || hex.EncodeToString(sum[:]) != info.Sha256 {
		return nil, fmt.Errorf("delta index of %d bytes has sha256 %x, want %d bytes and %s", len(raw), sum, info.Size,
			info.Sha256)
	}
	if len(raw) < len(deltaMagic) || string(raw[:len(deltaMagic)]) != deltaMagic {
		return nil, fmt.Errorf("delta index begins with %q, want %q", clip(raw), deltaMagic)
	}
	p := indexReader{b: raw[len(deltaMagic):]}
	x := &deltaIndex{average: p.number(maxAverage), imageSize: p.number(1<<62 - 1)}
	count := p.number(maxDeltaIndex)
	x.head = p.number(maxDeltaHead)
	minSize := x.average / minShare
	switch {
	case p.bad || x.head < minMember:
		return nil, fmt.Errorf("delta index: its head is damaged")
	case x.average < minAverage || bits.OnesCount64(uint64(x.average)) != 1:
		return nil, fmt.Errorf("delta index: chunks of %d bytes on average, want 16, 32 or 64 KiB", x.average)
	case x.imageSize != imageSize:
		return nil, fmt.Errorf("delta index: is for an image of %d bytes, and this has %d", x.imageSize, imageSize)
	case count > x.imageSize/minSize+1 || count > int64(len(p.b))*8/sumBits:
		return nil, fmt.Errorf("delta index: %d chunks in %d bytes, for %d of the image", count, len(p.b), imageSize)
	}
	x.chunks = make([]chunk, count)
	x.first = x.head + int64(info.Members)*deltaMember + info.Size + imageHead
	x.end = x.first
	left := x.imageSize
	for i := range x.chunks {
		c := &x.chunks[i]
		p.chunk(c, x.average)
		left -= int64(c.size)
		if p.bad || left < 0 || int64(c.size) < minSize && left > 0 {
			return nil, fmt.Errorf("delta index: chunk %d of %d is damaged", i, count)
		}
		x.end += int64(c.stored)
	}
	if left != 0 || len(p.b) > 0 || p.acc != 0 {
		return nil, fmt.Errorf("delta index: %d bytes of the image and %d of the index are left over", left, len(p.b))
	}
	return x, nil
}

// indexReader reads an index from its front: numbers, and then chunks. Once bad, what it gives is of no meaning.
type indexReader struct {
	b   []byte
	bad bool
	acc uint64 // the n bits of the byte before b that were not read yet
	n   uint
}

// number reads a uvarint of the shortest form, at most limit.
func (r *indexReader) number(limit int64) int64 {
	v, n := binary.Uvarint(r.b)
	if r.bad || n <= 0 || v > uint64(limit) || n > 1 && r.b[n-1] == 0 {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return int64(v)
}

// bits reads n, 48 at most.
func (r *indexReader) bits(n uint) uint64 {
	for ; r.n < n; r.n += 8 {
		if len(r.b) == 0 {
			r.bad = true
			return 0
		}
		r.acc |= uint64(r.b[0]) << r.n
		r.b = r.b[1:]
	}
	v := r.acc & (1<<n - 1)
	r.acc >>= n
	r.n -= n
	return v
}

// chunk reads one.
func (r *indexReader) chunk(c *chunk, average int64) {
	n := sizeBits(average)
	c.sum = r.bits(sumBits)
	c.size = uint32(r.bits(n)) + 1
	c.stored = storedPlain(c.size)
	if r.bits(1) == 0 {
		c.stored = uint32(r.bits(n))
		r.bad = r.bad || c.stored < minStored || c.stored >= c.size
	}
}

// A chunk has at least the average divided by minShare bytes, but for the last, and at most the average times maxShare.
const minShare, maxShare = 4, 4

// gearWindow is how many bytes decide whether a chunk ends behind them: older ones have left the 32 bits.
const gearWindow = 32

// deltaGear and a byte, hashed with SHA-256, give the byte's number: the first four bytes, big endian.
const deltaGear = "mendlet gear 1"

// chunker finds where chunks end, by nothing but their bytes: a gear hash with two thresholds, the lower one up to
// the average ("normalised chunking"), so that sizes keep near it. It may be used by many at once.
type chunker struct {
	min, average, max int
	before, behind    uint32 // a chunk ends where the hash is below: up to the average, and from there on
	gear              [256]uint32
}

// newChunker is for one of the averages that the format knows.
func newChunker(average int64) *chunker {
	n := int(average)
	c := &chunker{min: n / minShare, average: n, max: n * maxShare,
		before: uint32(1 << 32 / (average * 4)), behind: uint32(1 << 32 / (average / 4))}
	for i := range c.gear {
		sum := sha256.Sum256(append([]byte(deltaGear), byte(i)))
		c.gear[i] = binary.BigEndian.Uint32(sum[:])
	}
	return c
}

// next gives the length of the chunk at the start of p. p holds all that is left of the image, or at least c.max bytes.
func (c *chunker) next(p []byte) int {
	if len(p) <= c.min {
		return len(p)
	}
	p = p[:min(len(p), c.max)]
	_, hash := c.scan(p[c.min-gearWindow:c.min], 0, 0)
	if hash < c.before {
		return c.min
	}
	turn := min(len(p), c.average)
	n, hash := c.scan(p[c.min:turn], hash, c.before)
	if n > 0 {
		return c.min + n
	}
	if n, _ = c.scan(p[turn:], hash, c.behind); n > 0 {
		return turn + n
	}
	return len(p)
}

// scan goes on with hash until it is below limit, and gives how many bytes it has taken up to there; 0 if that is not
// in p. This is the loop that each byte of a slot passes through: four bytes a round, their numbers fetched together,
// and each second hash made of the one before the last, so that none waits for two others.
func (c *chunker) scan(p []byte, hash, limit uint32) (int, uint32) {
	gear, all := &c.gear, len(p)
	for ; len(p) >= 4; p = p[4:] {
		q := (*[4]byte)(p)
		g0, g1, g2, g3 := gear[q[0]], gear[q[1]], gear[q[2]], gear[q[3]]
		h0 := hash<<1 + g0
		h1 := hash<<2 + (g0<<1 + g1)
		h2 := h1<<1 + g2
		hash = h1<<2 + (g2<<1 + g3)
		if h0 >= limit && h1 >= limit && h2 >= limit && hash >= limit {
			continue
		}
		for i, h := range [...]uint32{h0, h1, h2, hash} {
			if h < limit {
				return all - len(p) + i + 1, h
			}
		}
	}
	for i, b := range p {
		if hash = hash<<1 + gear[b]; hash < limit {
			return all - len(p) + i + 1, hash
		}
	}
	return 0, hash
}

// split cuts all of r and hands on one chunk after the other; f may not keep it. buf holds at least c.max bytes, and
// should hold some chunks more: what is left of it is moved to its front each time.
func (c *chunker) split(r io.Reader, buf []byte, f func(p []byte) error) error {
	from, to := 0, 0
	for ended := false; ; {
		if !ended && to-from < c.max {
			to = copy(buf, buf[from:to])
			n, err := io.ReadFull(r, buf[to:])
			from, to = 0, to+n
			if ended = err == io.EOF || err == io.ErrUnexpectedEOF; err != nil && !ended {
				return err
			}
		}
		if from == to {
			return nil
		}
		n := c.next(buf[from:to])
		if err := f(buf[from : from+n]); err != nil {
			return err
		}
		from += n
	}
}
