// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"
)

// The messages of the troubleshooting protocol: MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md)
// maps of a header and a body, which for most types is another map.

// The protocols of a message.
const (
	protoShell   = 1
	protoFile    = 2
	protoForward = 3
	protoClient  = 4
	protoControl = 0xffff
)

const (
	maxPackValues = 1024 // in a message or a body, of any kind
	maxPackDepth  = 8    // maps and arrays in each other
)

// errTrailing is for bytes behind a message, which otherwise is whole.
var errTrailing = errors.New("bytes behind the end of the message")

// peerMessage is one message, from or to a session.
type peerMessage struct {
	proto    uint16
	typ, sid string
	props    map[string]any // see appendPacked for the types, packReader.value for those of a message that came in
	body     []byte         // nil: none; of one that came in, a part of whole
	whole    []byte         // the bytes of one that came in; nil: they are not to be used again
}

// appendTo appends the bytes of m. What is empty is left out; the order of the keys is that of the reference.
func (m *peerMessage) appendTo(b []byte) []byte {
	hdr := []any{"proto", m.proto, "typ", nil, "sid", nil, "props", nil}
	for i, s := range []string{m.typ, m.sid} {
		if s != "" {
			hdr[2*i+3] = s
		}
	}
	if len(m.props) > 0 {
		hdr[7] = m.props
	}
	at := len(b)
	b = appendPairs(append(b, 0x81, 0xa3, 'h', 'd', 'r'), hdr)
	if len(m.body) > 0 {
		b[at]++
		b = appendPacked(appendPacked(b, "body"), m.body)
	}
	return b
}

// packMap makes a map of keys and values, in this order; a value that is nil is left out with its key.
func packMap(pairs ...any) []byte { return appendPairs(nil, pairs) }

func appendPairs(b []byte, pairs []any) []byte {
	at := len(b)
	b = append(b, 0x80) // fewer than 16
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != nil {
			b[at]++
			b = appendPacked(appendPacked(b, pairs[i]), pairs[i+1])
		}
	}
	return b
}

// appendHead appends the head of what has n bytes or elements: of less than few it is first+n, else one byte, wide
// and its successors, and a length of 8 bits, which maps and arrays do not have (few is 16 with them), 16 bits or 32.
func appendHead(b []byte, n int, first byte, few int, wide byte) []byte {
	switch {
	case n < few:
		return append(b, first+byte(n))
	case n < 1<<8 && few != 16:
		return append(b, wide, byte(n))
	case n < 1<<16:
		return appendNumber(b, wide+1, 2, uint64(n))
	}
	return appendNumber(b, wide+2, 4, uint64(n))
}

// appendNumber appends a head and n bytes of a number, big endian.
//
//go:noinline
func appendNumber(b []byte, head byte, n int, v uint64) []byte {
	b = append(b, head)
	for n--; n >= 0; n-- {
		b = append(b, byte(v>>(8*n)))
	}
	return b
}

// appendPacked appends a value: nil, bool, string, []byte, time.Time, []any, map[string]any, float32 and float64;
// int and uint in the least bytes, numbers of a fixed size in theirs, as peers look at the width of some. Anything else
// becomes nil.
func appendPacked(b []byte, v any) []byte {
	head, width, bits := byte(0xc0), 0, uint64(0)
	switch v := v.(type) {
	case bool:
		if head = 0xc2; v {
			head = 0xc3
		}
	case string:
		return append(appendHead(b, len(v), 0xa0, 32, 0xd9), v...)
	case []byte:
		return append(appendHead(b, len(v), 0, 0, 0xc4), v...)
	case int:
		return appendLeast(b, int64(v))
	case uint:
		return appendLeast(b, int64(v))
	case int8:
		head, width, bits = 0xd0, 1, uint64(v)
	case int16:
		head, width, bits = 0xd1, 2, uint64(v)
	case int32:
		head, width, bits = 0xd2, 4, uint64(v)
	case int64:
		head, width, bits = 0xd3, 8, uint64(v)
	case uint8:
		head, width, bits = 0xcc, 1, uint64(v)
	case uint16:
		head, width, bits = 0xcd, 2, uint64(v)
	case uint32:
		head, width, bits = 0xce, 4, uint64(v)
	case uint64:
		head, width, bits = 0xcf, 8, v
	case float32:
		head, width, bits = 0xca, 4, uint64(math.Float32bits(v))
	case float64:
		head, width, bits = 0xcb, 8, math.Float64bits(v)
	case time.Time:
		return appendTime(b, v)
	case []any:
		b = appendHead(b, len(v), 0x90, 16, 0xdb)
		for _, e := range v {
			b = appendPacked(b, e)
		}
		return b
	case map[string]any:
		b = appendHead(b, len(v), 0x80, 16, 0xdd)
		for _, k := range sortedKeys(v) {
			b = appendPacked(appendPacked(b, k), v[k])
		}
		return b
	}
	return appendNumber(b, head, width, bits)
}

// appendLeast appends a number in the least bytes that hold it.
func appendLeast(b []byte, v int64) []byte {
	if v >= -32 && v < 128 {
		return append(b, byte(v))
	}
	head, kind := byte(0xcc), uint64(v)
	if v < 0 {
		head, kind = 0xd0, uint64(^v)<<1 // which takes the bits that v does, with its sign
	}
	n := 0
	for ; n < 3 && kind>>(8<<n) != 0; n++ {
	}
	return appendNumber(b, head+byte(n), 1<<n, uint64(v))
}

// appendTime appends a time in the least of the three forms of the extension type -1.
func appendTime(b []byte, t time.Time) []byte {
	s, ns := t.Unix(), uint64(t.Nanosecond())
	switch {
	case ns == 0 && s>>32 == 0:
		return appendNumber(append(b, 0xd6), 0xff, 4, uint64(s))
	case s>>34 == 0:
		return appendNumber(append(b, 0xd7), 0xff, 8, ns<<34|uint64(s))
	}
	b = appendNumber(append(b, 0xc7, 12), 0xff, 4, ns)
	return binary.BigEndian.AppendUint64(b, uint64(s))
}

// unpackMessage reads a message. Keys that it does not know are skipped. With an error it gives what it had read
// until there, never nil; with errTrailing that is all.
func unpackMessage(b []byte) (*peerMessage, error) {
	m, u := &peerMessage{}, &packReader{b: b}
	err := u.fields([]string{"hdr", "body"}, func(i int) (err error) {
		if i == 1 {
			m.body, err = u.bytes()
			return err
		}
		return u.fields([]string{"proto", "typ", "sid", "props"}, func(i int) (err error) {
			var text []byte
			switch i {
			case 0:
				var v any
				v, err = u.value()
				n, ok := v.(int64)
				if m.proto = uint16(n); err == nil && (!ok || n != int64(m.proto)) {
					err = fmt.Errorf("proto: got %s, want a number of 16 bits", quote(fmt.Sprint(v)))
				}
			case 1:
				text, err = u.bytes()
				m.typ = string(text)
			case 2:
				text, err = u.bytes()
				m.sid = string(text)
			case 3:
				var v any
				v, err = u.value()
				props, ok := v.(map[string]any)
				if m.props = props; err == nil && !ok && v != nil {
					err = errors.New("props: want a map")
				}
			}
			return err
		})
	})
	if err == nil && len(u.b) > 0 {
		err = errTrailing
	}
	return m, err
}

// unpackMap reads a body that is a map.
func unpackMap(b []byte) (map[string]any, error) {
	u := &packReader{b: b}
	v, err := u.value()
	m, ok := v.(map[string]any)
	switch {
	case err != nil:
		return nil, fmt.Errorf("body: %w", err)
	case !ok:
		return nil, errors.New("body: want a map")
	case len(u.b) > 0:
		return nil, errTrailing
	}
	return m, nil
}

// field gives the value of a key, without regard to its case; nil: there is none, or it is nil.
func field(m map[string]any, key string) any {
	if v, ok := m[key]; ok {
		return v
	}
	for k, v := range m {
		if strings.EqualFold(k, key) {
			return v
		}
	}
	return nil
}

// packReader takes values off the front of b. Nothing that b only announces takes memory.
type packReader struct {
	b             []byte
	values, depth int
}

// The heads from 0xc0 on: what follows, and in how many bytes its number or length is. The fixed extensions have a
// length that is in the head itself.
const (
	packKinds  = "n-ftxxxeeerruuuuiiiieeeeesssaamm"
	packWidths = "00001241244812481248000001242424"
)

// number takes n bytes as a big endian number; 0 for n = 0.
func (u *packReader) number(n int) (v uint64, err error) {
	p, err := u.take(uint64(n))
	for _, c := range p {
		v = v<<8 | uint64(c)
	}
	return v, err
}

//go:noinline
func (u *packReader) take(n uint64) ([]byte, error) {
	if n > uint64(len(u.b)) {
		return nil, io.ErrUnexpectedEOF
	}
	p := u.b[:n:n]
	u.b = u.b[n:]
	return p, nil
}

// head takes the head of a value: its kind, n: nil, -: none of the rules, f and t: bool, x: bytes, e: extension, r:
// real, u and i: number, s: string, a: array, m: map; and its number, its bits or its length.
func (u *packReader) head() (kind byte, n uint64, err error) {
	if u.values++; u.values > maxPackValues {
		return 0, 0, fmt.Errorf("more than %d values", maxPackValues)
	}
	c, err := u.number(1)
	switch {
	case err != nil:
		return 0, 0, err
	case c < 0x80:
		return 'i', c, nil
	case c < 0x90:
		return 'm', c & 15, nil
	case c < 0xa0:
		return 'a', c & 15, nil
	case c < 0xc0:
		return 's', c & 31, nil
	case c >= 0xe0:
		return 'i', uint64(int64(int8(c))), nil
	}
	kind, width := packKinds[c-0xc0], int(packWidths[c-0xc0]-'0')
	n, err = u.number(width)
	switch {
	case c >= 0xd4 && c <= 0xd8:
		n = 1 << (c - 0xd4)
	case kind == 'i':
		n = uint64(int64(n<<(64-8*width)) >> (64 - 8*width))
	case c == 0xca:
		n = math.Float64bits(float64(math.Float32frombits(uint32(n))))
	case kind == '-' && err == nil:
		err = fmt.Errorf("got the byte 0x%02x, which begins no value", c)
	}
	return kind, n, err
}

// bytes takes a string or bytes, which are a part of b; nil for nil.
func (u *packReader) bytes() ([]byte, error) {
	kind, n, err := u.head()
	switch {
	case err != nil || kind == 'n':
		return nil, err
	case kind != 's' && kind != 'x':
		return nil, fmt.Errorf("got a value of kind %q, want a string", kind)
	}
	return u.take(n)
}

// fields takes a map and calls set for each key that is among names, or an array with as many elements as there are
// names, in their order; or nil.
func (u *packReader) fields(names []string, set func(i int) error) error {
	kind, n, err := u.head()
	switch {
	case err != nil || kind == 'n':
		return err
	case kind != 'm' && (kind != 'a' || n != uint64(len(names))):
		return fmt.Errorf("got a value of kind %q, want a map of %q", kind, names)
	}
	for i := 0; uint64(i) < n && err == nil; i++ {
		field := i
		if kind == 'm' {
			var key []byte
			if key, err = u.bytes(); err != nil {
				break
			}
			field = slices.Index(names, string(key))
		}
		if field >= 0 {
			err = set(field)
		} else {
			_, err = u.value()
		}
	}
	return err
}

// value takes any value: numbers as int64, uint64 only if they are above its range, and float64; string, []byte,
// bool, time.Time, []any, map[string]any; nil for nil and for extensions that are no time.
func (u *packReader) value() (any, error) {
	kind, n, err := u.head()
	if err != nil {
		return nil, err
	}
	switch kind {
	case 'f', 't':
		return kind == 't', nil
	case 'i':
		return int64(n), nil
	case 'u':
		if n > math.MaxInt64 {
			return n, nil
		}
		return int64(n), nil
	case 'r':
		return math.Float64frombits(n), nil
	case 's':
		p, err := u.take(n)
		return string(p), err
	case 'x':
		return u.take(n)
	case 'e':
		return u.extension(n)
	case 'a', 'm':
		if u.depth++; u.depth > maxPackDepth {
			return nil, fmt.Errorf("more than %d maps and arrays in each other", maxPackDepth)
		}
		defer func() { u.depth-- }()
		if kind == 'm' {
			return u.mapOf(n)
		}
		list := []any{}
		for ; n > 0 && err == nil; n-- {
			var v any
			v, err = u.value()
			list = append(list, v)
		}
		return list, err
	}
	return nil, nil
}

func (u *packReader) mapOf(n uint64) (map[string]any, error) {
	m := map[string]any{}
	for ; n > 0; n-- {
		key, err := u.bytes()
		if err != nil {
			return nil, err
		}
		v, err := u.value()
		if err != nil {
			return nil, err
		}
		m[string(key)] = v
	}
	return m, nil
}

// extension takes n bytes of an extension and its type before them.
func (u *packReader) extension(n uint64) (any, error) {
	kind, err := u.number(1)
	if err != nil {
		return nil, err
	}
	p, err := u.take(n)
	if err != nil || kind != 0xff {
		return nil, err
	}
	u.b, p = p, u.b // to read in it
	defer func() { u.b = p }()
	sec, ns := uint64(0), uint64(0)
	switch n {
	case 4, 8:
		if sec, _ = u.number(int(n)); n == 8 {
			sec, ns = sec&(1<<34-1), sec>>34
		}
	case 12:
		ns, _ = u.number(4)
		sec, _ = u.number(8)
	default:
		return nil, fmt.Errorf("got a time of %d bytes, want 4, 8 or 12", n)
	}
	return time.Unix(int64(sec), int64(ns)).UTC(), nil
}
