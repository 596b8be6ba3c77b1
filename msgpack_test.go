// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// peerVector is a message with the bytes that the reference library makes of it, or that were seen on a wire.
type peerVector struct {
	Name string
	Msg  struct {
		Proto    uint16
		Typ, Sid string
		Props    map[string]json.RawMessage
	}
	Hex, Sorted, Body string
	Zeros             int            // more at the end of Hex
	Fields            map[string]any // what Body is made of
}

type peerVectors struct {
	Messages []peerVector
	Decoder  []struct{ Name, Hex, Want string }
}

func readPeerVectors(t testing.TB) (v peerVectors) {
	t.Helper()
	text, err := os.ReadFile("testdata/connect-messages.json")
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	if err != nil || len(v.Messages) != 142 || len(v.Decoder) != 35 {
		t.Fatalf("got %d messages and %d cases: %v", len(v.Messages), len(v.Decoder), err)
	}
	return v
}

func (v *peerVector) bytes(t testing.TB) []byte {
	t.Helper()
	b, err := hex.DecodeString(v.Hex)
	if err != nil {
		t.Fatal(err)
	}
	return append(b, make([]byte, v.Zeros)...)
}

// typed is a value of a vector with its type: {go_type, value}, or plain JSON of what was seen on a wire.
func typed(t testing.TB, raw json.RawMessage, number any) any {
	t.Helper()
	var v struct {
		GoType   string `json:"go_type"`
		Value    json.RawMessage
		ValueHex string `json:"value_hex"`
	}
	into := func(p any) any {
		if err := json.Unmarshal(v.Value, p); err != nil {
			t.Fatal(err)
		}
		return reflect.ValueOf(p).Elem().Interface()
	}
	if raw[0] != '{' {
		v.Value = raw
		if raw[0] == '"' {
			return into(new(string))
		}
		return reflect.ValueOf(into(new(int))).Convert(reflect.TypeOf(number)).Interface()
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]any{"int": new(int), "int8": new(int8), "int16": new(int16), "int32": new(int32),
		"int64": new(int64), "uint": new(uint), "uint8": new(uint8), "uint16": new(uint16), "uint32": new(uint32),
		"uint64": new(uint64), "float32": new(float32), "float64": new(float64), "string": new(string),
		"bool": new(bool), "time.Time": new(time.Time), "shell.MenderShellMessageStatus": new(int)}
	switch v.GoType {
	case "nil":
		return nil
	case "[]byte":
		b, _ := hex.DecodeString(v.ValueHex)
		return append([]byte{}, b...)
	case "[]interface {}", "[]interface{}":
		list := []any{}
		for _, e := range into(new([]json.RawMessage)).([]json.RawMessage) {
			list = append(list, typed(t, e, number))
		}
		return list
	case "map[string]interface {}", "map[string]interface{}":
		m := map[string]any{}
		for k, e := range into(new(map[string]json.RawMessage)).(map[string]json.RawMessage) {
			m[k] = typed(t, e, number)
		}
		return m
	}
	if kinds[v.GoType] == nil {
		t.Fatalf("type %q", v.GoType)
	}
	return into(kinds[v.GoType])
}

// decodedAs is what the decoder makes of a value that was encoded.
func decodedAs(v any) any {
	switch v := v.(type) {
	case uint64:
		if int64(v) < 0 {
			return v
		}
		return int64(v)
	case []byte:
		return v
	case []any:
		for i := range v {
			v[i] = decodedAs(v[i])
		}
		return v
	case map[string]any:
		for k := range v {
			v[k] = decodedAs(v[k])
		}
		return v
	}
	switch r := reflect.ValueOf(v); {
	case v != nil && r.CanInt():
		return r.Int()
	case v != nil && r.CanUint():
		return int64(r.Uint())
	case v != nil && r.CanFloat():
		return r.Float()
	}
	return v
}

// TestPeerMessages reads each message and writes it again, byte for byte; where a message has several properties, in
// an order that is not fixed, in the order of their names.
func TestPeerMessages(t *testing.T) {
	t.Parallel()
	for _, v := range readPeerVectors(t).Messages {
		raw := v.bytes(t)
		got, err := unpackMessage(raw)
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		body, _ := hex.DecodeString(v.Body)
		if v.Zeros > 0 {
			body = make([]byte, 65536)
		}
		if v.Name != "ft_chunk_4096" && !bytes.Equal(got.body, body) {
			t.Errorf("%s: got the body %x, want %x", v.Name, got.body, body)
		}
		if strconv.IntSize == 32 && (v.Name == "prop_int_2p32" || v.Name == "prop_int_neg_2p31m1") {
			continue // more than an int, which is what was packed, can be here
		}
		packed := false
		for _, number := range []any{0, int64(0), int8(0)} { // the widths that were seen
			m := &peerMessage{proto: v.Msg.Proto, typ: v.Msg.Typ, sid: v.Msg.Sid, body: got.body}
			length := 0
			for k, e := range v.Msg.Props {
				if m.props == nil {
					m.props = map[string]any{}
				}
				m.props[k] = typed(t, e, number)
				if pair := appendPacked(appendPacked(nil, k), m.props[k]); bytes.Contains(raw, pair) {
					length++
				}
			}
			want := v.Sorted
			if want == "" {
				want = hex.EncodeToString(raw)
			}
			b := m.packed()
			packed = packed || hex.EncodeToString(b) == want || len(b) == len(raw) && length == len(m.props) && length > 1
			for k := range m.props {
				m.props[k] = decodedAs(m.props[k])
			}
			if len(got.body) == 0 {
				got.body, m.body = nil, nil
			}
			if !reflect.DeepEqual(got, m) {
				t.Errorf("%s: got %#v, want %#v", v.Name, got, m)
			}
		}
		if !packed {
			t.Errorf("%s: %#v was not packed as %x", v.Name, got, raw)
		}
	}
}

// TestPeerBodies reads each body that is a map, and writes it again.
func TestPeerBodies(t *testing.T) {
	t.Parallel()
	names := map[string]string{"error": "err", "message_type": "msgtype", "message_protocol": "msgproto",
		"message_id": "msgid", "modification_time": "modtime"}
	n := 0
	for _, v := range readPeerVectors(t).Messages {
		if v.Fields == nil {
			continue
		}
		raw, _ := hex.DecodeString(v.Body)
		m, err := unpackMap(raw)
		if err != nil || len(m) != len(v.Fields) {
			t.Errorf("%s: got %v, %v, want %v", v.Name, m, err, v.Fields)
			continue
		}
		pairs := []any{}
		for name, want := range v.Fields {
			key := cmp.Or(names[name], strings.ToLower(name))
			got := field(m, strings.ToUpper(key))
			text, _ := json.Marshal(got)
			if should, _ := json.Marshal(want); string(text) != string(should) {
				t.Errorf("%s: %s: got %s, want %s", v.Name, key, text, should)
			}
			pairs = append(pairs, key, asSent(key, got))
		}
		slices.SortFunc(pairsOf(pairs), func(a, b [2]any) int {
			return bytes.Index(raw, appendPacked(nil, a[0])) - bytes.Index(raw, appendPacked(nil, b[0]))
		})
		n++
		if got := packPairs(raw, pairs); !bytes.Equal(got, raw) && !bytes.Contains(raw, []byte{0xc0}) {
			t.Errorf("%s: packed as %x, want %x", v.Name, got, raw)
		}
	}
	if n != 27 {
		t.Errorf("got %d bodies, want 27", n)
	}
}

func pairsOf(pairs []any) (list [][2]any) {
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, [2]any{pairs[i], pairs[i+1]})
	}
	return list
}

// packPairs packs the pairs in the order in which raw has their keys.
func packPairs(raw []byte, pairs []any) []byte {
	list := pairsOf(pairs)
	slices.SortFunc(list, func(a, b [2]any) int {
		return bytes.Index(raw, appendPacked(nil, a[0])) - bytes.Index(raw, appendPacked(nil, b[0]))
	})
	flat := []any{}
	for _, p := range list {
		flat = append(flat, p[0], p[1])
	}
	return packMap(flat...)
}

// asSent gives a value the type with which its key is sent.
func asSent(key string, v any) any {
	n, _ := v.(int64)
	list, _ := v.([]any)
	switch {
	case v == nil || key == "size":
	case key == "uid" || key == "gid" || key == "mode":
		return uint32(n)
	case key == "remote_port" || key == "msgproto":
		return uint16(n)
	case key == "version" || key == "code":
		return int(n)
	case key == "protocols":
		protocols := []any{}
		for _, p := range list {
			protocols = append(protocols, uint16(p.(int64)))
		}
		return protocols
	case key == "versions":
		versions := []any{}
		for _, p := range list {
			versions = append(versions, int(p.(int64)))
		}
		return versions
	}
	return v
}

// TestPeerDecoderCases holds the decoder against what the reference makes of odd messages.
func TestPeerDecoderCases(t *testing.T) {
	t.Parallel()
	kinds := regexp.MustCompile(`=[a-z0-9]+(\[string\]interface \{\})?\((map\[k:5\]|[^ \]]*)\)`)
	for _, c := range readPeerVectors(t).Decoder {
		raw, err := hex.DecodeString(c.Hex)
		if err != nil {
			t.Fatal(err)
		}
		m, err := unpackMessage(raw)
		props := strings.TrimPrefix(fmt.Sprint(m.props), "map")
		got := fmt.Sprintf("proto=%d typ=%q sid=%q props=%s body=%x nilbody=%v", m.proto, m.typ, m.sid,
			strings.Replace(props, "[x:", "[x=", 1), m.body, m.body == nil)
		if want := kinds.ReplaceAllString(c.Want, "=$2"); strings.HasPrefix(want, "error: ") {
			if err == nil || errors.Is(err, errTrailing) {
				t.Errorf("%s: got %s, want an error", c.Name, got)
			}
		} else if got != want || (err != nil) != (c.Name == "trailing bytes") {
			t.Errorf("%s: got %s, %v, want %s", c.Name, got, err, want)
		}
	}
}

// TestPeerMessageBounds gives the decoder what only says that it is large, or is.
func TestPeerMessageBounds(t *testing.T) {
	t.Parallel()
	deep := append(bytes.Repeat([]byte{0x91}, 9), 0xc0)
	for name, b := range map[string][]byte{
		"nothing":            {},
		"a map of 4 Gi":      {0xdf, 0xff, 0xff, 0xff, 0xff},
		"an array of 4 Gi":   {0x81, 0xa1, 'x', 0xdd, 0xff, 0xff, 0xff, 0xff},
		"a string of 4 Gi":   {0x81, 0xa1, 'x', 0xdb, 0xff, 0xff, 0xff, 0xff},
		"an extension":       {0x81, 0xa1, 'x', 0xc9, 0xff, 0xff, 0xff, 0xff, 0xff},
		"a time of 3 bytes":  {0x81, 0xa1, 'x', 0xc7, 3, 0xff, 1, 2, 3},
		"no value":           {0x81, 0xa1, 'x', 0xc1},
		"9 levels":           append([]byte{0x81, 0xa1, 'x'}, deep[:8]...),
		"1025 values":        append([]byte{0x81, 0xa1, 'x', 0xdc, 4, 0}, make([]byte, 1024)...),
		"an array":           {0x91, 1},
		"bytes behind it":    {0x80, 0x80},
		"a proto of 17 bits": packMap("hdr", map[string]any{"proto": 1 << 16}),
	} {
		if m, err := unpackMap(b); err == nil && !strings.HasPrefix(name, "a proto") {
			t.Errorf("%s: got the map %v", name, m)
		}
		if _, err := unpackMessage(b); err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
	if m, err := unpackMap(append([]byte{0x81, 0xa1, 'x'}, deep[2:]...)); err != nil {
		t.Errorf("8 levels: %v, %v", m, err)
	}
}

func FuzzPeerMessage(f *testing.F) {
	v := readPeerVectors(f)
	for _, m := range v.Messages {
		f.Add(m.bytes(f))
	}
	for _, c := range v.Decoder {
		b, _ := hex.DecodeString(c.Hex)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := unpackMessage(b)
		unpackMap(m.body)
		if err != nil {
			return
		}
		again, err := unpackMessage(m.packed())
		if err != nil || again.sid != m.sid || again.typ != m.typ || again.proto != m.proto ||
			!bytes.Equal(again.body, m.body) || len(again.props) != len(m.props) {
			t.Errorf("got %#v, then %#v, %v", m, again, err)
		}
	})
}

func (m *peerMessage) packed() []byte { return m.appendTo(nil) }
