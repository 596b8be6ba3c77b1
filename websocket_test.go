// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// socketPeer is the server's side of a websocket, which sends what it is told to, right or wrong.
type socketPeer struct {
	net.Conn
	r  *bufio.Reader
	mu sync.Mutex
}

// socketPair is a link with both sides in this process; quiet: see webSocket.
func socketPair(t testing.TB, quiet time.Duration) (*webSocket, *socketPeer) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	w := newWebSocket(ours, quiet)
	t.Cleanup(func() {
		w.drop(errors.New("the test is over"))
		theirs.Close()
	})
	return w, &socketPeer{Conn: theirs, r: bufio.NewReader(theirs)}
}

// frame makes a frame of the server's: not masked.
func frame(final bool, kind byte, text []byte) []byte {
	b := []byte{kind}
	if final {
		b[0] |= 0x80
	}
	switch n := len(text); {
	case n < 126:
		b = append(b, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
	return append(b, text...)
}

func (p *socketPeer) send(kind byte, text []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, err := p.Write(frame(true, kind, text))
	return err
}

// receive takes a frame of the client's, which must be whole.
func (p *socketPeer) receive() (kind byte, text []byte, err error) {
	final, kind, text, err := p.frame(1 << 20)
	if err == nil && !final {
		err = fmt.Errorf("got a part of a message, of kind %d", kind)
	}
	return kind, text, err
}

// frame takes a frame of the client's, which must be masked, without bits of extensions, and of limit bytes at most.
func (p *socketPeer) frame(limit uint64) (final bool, kind byte, text []byte, err error) {
	head := make([]byte, 2)
	if _, err = io.ReadFull(p.r, head); err != nil {
		return false, 0, nil, err
	}
	n := uint64(head[1] & 0x7f)
	if head[0]&0x70 != 0 || head[1]&0x80 == 0 {
		return false, 0, nil, fmt.Errorf("got a frame that begins with % x", head)
	}
	more := make([]byte, map[uint64]int{126: 2, 127: 8}[n]+4)
	if _, err = io.ReadFull(p.r, more); err != nil {
		return false, 0, nil, err
	}
	switch mask := len(more) - 4; mask {
	case 2:
		n = uint64(binary.BigEndian.Uint16(more))
	case 8:
		n = binary.BigEndian.Uint64(more)
	}
	if n > limit {
		return false, 0, nil, fmt.Errorf("got a frame of %d bytes", n)
	}
	text = make([]byte, n)
	_, err = io.ReadFull(p.r, text)
	for i := range text {
		text[i] ^= more[len(more)-4+i&3]
	}
	return head[0]&0x80 != 0, head[0] & 15, text, err
}

// TestWebSocketMessages sends messages of the lengths at which a head changes, both ways.
func TestWebSocketMessages(t *testing.T) {
	t.Parallel()
	w, p := socketPair(t, socketQuiet)
	for _, n := range []int{0, 1, 125, 126, 127, 65535, 65536, 65537, maxSocketMessage} {
		text := bytes.Repeat([]byte{byte(n), 0xff, 1}, n/3+1)[:n]
		sent := make(chan error, 1)
		go func() { sent <- w.send(frameBinary, text) }()
		kind, got, err := p.receive()
		if err != nil || kind != frameBinary || !bytes.Equal(got, text) || <-sent != nil {
			t.Fatalf("%d bytes: got kind %d, %d bytes, %v", n, kind, len(got), err)
		}
		go func() { sent <- p.send(frameBinary, text) }()
		if got, err := w.next(nil); err != nil || !bytes.Equal(got, text) || <-sent != nil {
			t.Fatalf("%d bytes from the server: got %d, %v", n, len(got), err)
		}
	}
}

// TestWebSocketFragments puts a ping between the parts of a message, and ends with a close frame.
func TestWebSocketFragments(t *testing.T) {
	t.Parallel()
	w, p := socketPair(t, socketQuiet)
	p.Write(bytes.Join([][]byte{frame(false, frameBinary, []byte("ab")), frame(true, framePing, []byte("60")),
		frame(false, frameContinued, nil), frame(true, framePong, nil), frame(true, frameContinued, []byte("cd")),
		frame(true, frameClose, append([]byte{0x03, 0xf3}, "bye \x1b[2J"...))}, nil))
	if got, err := w.next(nil); err != nil || string(got) != "abcd" {
		t.Fatalf("got %q, %v", got, err)
	}
	if kind, text, err := p.receive(); kind != framePong || string(text) != "60" || err != nil {
		t.Errorf("got kind %d, %q, %v, want the pong", kind, text, err)
	}
	_, err := w.next(nil)
	if err == nil || err.Error() != `closed by the server, code 1011: "bye \x1b[2J"` {
		t.Errorf("got %v", err)
	}
	if kind, text, err := p.receive(); kind != frameClose || !bytes.Equal(text, []byte{0x03, 0xf3}) || err != nil {
		t.Errorf("got kind %d, % x, %v, want the same code", kind, text, err)
	}
	if err := w.send(frameBinary, []byte("x")); err == nil {
		t.Error("a message went out behind the end")
	}
}

// TestWebSocketReady is true only of what next gives without waiting.
func TestWebSocketReady(t *testing.T) {
	t.Parallel()
	w, p := socketPair(t, socketQuiet)
	for _, n := range []int{2, 125, 126, 40000} {
		whole := frame(true, frameBinary, make([]byte, n))
		for want, behind := range map[bool][][]byte{
			true: {whole},
			false: {nil, whole[:2], whole[:len(whole)-1], frame(false, frameBinary, make([]byte, n)),
				frame(true, framePing, []byte("60"))},
		} {
			for _, b := range behind {
				w.r.Reset(bytes.NewReader(append(frame(true, frameBinary, []byte("first")), b...)))
				if got, err := w.next(nil); err != nil || string(got) != "first" || w.ready() != want {
					t.Errorf("%d of %d bytes behind %q (%v): want ready %t", len(b), len(whole), got, err, want)
				}
			}
		}
	}
	p.Close()
}

// TestWebSocketLargeMessage ends nothing: the beginning is kept.
func TestWebSocketLargeMessage(t *testing.T) {
	t.Parallel()
	w, p := socketPair(t, socketQuiet)
	go func() {
		part := bytes.Repeat([]byte{7}, 200<<10)
		p.Write(frame(false, frameBinary, part))
		p.Write(frame(false, frameContinued, part))
		p.Write(frame(true, frameContinued, part))
		p.Write(frame(true, frameBinary, []byte("next")))
	}()
	if got, err := w.next(nil); err != errMessageSize || len(got) != maxSocketMessage {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	if got, err := w.next(nil); err != nil || string(got) != "next" {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestWebSocketRefusals sends what a server must not, and wants the code with which the link ends.
func TestWebSocketRefusals(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		bytes []byte
		code  uint16
	}{
		"masked":              {[]byte{0x82, 0x81, 1, 2, 3, 4, 5}, closeProtocol},
		"compressed":          {[]byte{0xc2, 0}, closeProtocol},
		"another bit":         {[]byte{0x92, 0}, closeProtocol},
		"kind 3":              {[]byte{0x83, 0}, closeProtocol},
		"kind 11":             {[]byte{0x8b, 0}, closeProtocol},
		"text":                {frame(true, frameText, []byte("x")), closeKind},
		"a part first":        {frame(true, frameContinued, nil), closeProtocol},
		"two beginnings":      {append(frame(false, frameBinary, nil), frame(true, frameBinary, nil)...), closeProtocol},
		"a long ping":         {frame(true, framePing, make([]byte, 126)), closeProtocol},
		"a part of a ping":    {frame(false, framePing, nil), closeProtocol},
		"a length in 2 bytes": {[]byte{0x82, 126, 0, 125}, closeProtocol},
		"a length in 8 bytes": {[]byte{0x82, 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff}, closeProtocol},
		"a negative length":   {[]byte{0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0}, closeProtocol},
		"17 MiB":              {[]byte{0x82, 127, 0, 0, 0, 0, 1, 0x10, 0, 0}, closeTooLarge},
		"half a code":         {frame(true, frameClose, []byte{3}), closeProtocol},
		"a reason in Latin 1": {frame(true, frameClose, []byte{3, 0xe8, 0xfc}), closeProtocol},
	} {
		w, p := socketPair(t, socketQuiet)
		p.Write(c.bytes)
		_, err := w.next(nil)
		var end *socketEnd
		if !errors.As(err, &end) || !end.ours {
			t.Errorf("%s: got %v", name, err)
			continue
		}
		kind, text, err := p.receive()
		if kind != frameClose || err != nil || binary.BigEndian.Uint16(text) != c.code {
			t.Errorf("%s: got kind %d, % x, %v, want code %d", name, kind, text, err, c.code)
		}
	}
}

// TestWebSocketEnds without a close frame, and with a line that is dead.
func TestWebSocketEnds(t *testing.T) {
	t.Parallel()
	w, p := socketPair(t, socketQuiet)
	p.Write(frame(true, frameBinary, []byte("abc"))[:3])
	p.Close()
	if _, err := w.next(nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut off: got %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		w, p := newWebSocket(near, time.Minute), &socketPeer{Conn: far, r: bufio.NewReader(far)}
		var kinds []byte
		go func() {
			for {
				kind, _, err := p.receive()
				if err != nil {
					return
				}
				kinds = append(kinds, kind)
			}
		}()
		if _, err := w.next(nil); err == nil || !strings.Contains(err.Error(), "nothing came from the server for 2m0s") {
			t.Errorf("dead: got %v", err)
		}
		synctest.Wait()
		if !bytes.Equal(kinds, []byte{framePing}) {
			t.Errorf("dead: got kinds %d, want a ping", kinds)
		}
	})
}

// upgrade answers a handshake, with these headers changed, and hands the connection on.
func upgrade(w http.ResponseWriter, r *http.Request, change http.Header) *socketPeer {
	sum := sha1.Sum([]byte(r.Header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	h := http.Header{"Upgrade": {"WebSocket"}, "Connection": {"keep-alive, Upgrade"},
		"Sec-Websocket-Accept": {base64.StdEncoding.EncodeToString(sum[:])}}
	for k, v := range change {
		h[k] = v
	}
	conn, rw, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return nil
	}
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\n")
	h.Write(conn)
	io.WriteString(conn, "\r\n")
	return &socketPeer{Conn: conn, r: rw.Reader}
}

// TestWebSocketHandshake meets servers, and what answers in their place.
func TestWebSocketHandshake(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status int
		body   string
		h      http.Header
		code   int
		says   string
	}{
		"a server":         {0, "", nil, 0, ""},
		"a portal":         {200, "<html><title>Log in</title>", nil, 75, `want 101: "Log in"`},
		"an answer":        {204, "", nil, 75, "got HTTP status 204, want 101"},
		"no deviceconnect": {404, "", nil, 1, "HTTP status 404"},
		"busy":             {503, "", nil, 75, "HTTP status 503"},
		"another key":      {0, "", http.Header{"Sec-Websocket-Accept": {"x"}}, 75, `Sec-Websocket-Accept with "x"`},
		"no upgrade":       {0, "", http.Header{"Connection": {"close"}}, 75, `header Connection with ""`},
		"another protocol": {0, "", http.Header{"Upgrade": {"h2c"}}, 75, `header Upgrade with "h2c"`},
		"compression": {0, "", http.Header{"Sec-Websocket-Extensions": {"permessage-deflate"}}, 75,
			"permessage-deflate"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if c.status != 0 {
					w.WriteHeader(c.status)
					io.WriteString(w, c.body)
					return
				}
				if p := upgrade(w, r, c.h); p != nil {
					defer p.Close()
					if r.Header.Get("Authorization") == "Bearer token" && r.Header.Get("Sec-Websocket-Version") == "13" {
						p.send(frameBinary, []byte("hello"))
					}
					p.receive()
				}
			}))
			defer server.Close()
			hc := testHTTPClient(t, testConfig(t, server.URL), netOptions{})
			w, err := dialWebSocket(t.Context(), hc, server.URL+"/x", "token")
			if c.says != "" {
				if err == nil || exitCode(err) != c.code || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v, exit code %d, want %d and %s", err, exitCode(err), c.code, c.says)
				}
				if name == "a portal" && hintOf(err) != hintPage {
					t.Errorf("got the hint %q", hintOf(err))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := w.next(nil); string(got) != "hello" || err != nil {
				t.Errorf("got %q, %v", got, err)
			}
			w.close(closeNormal, "")
		})
	}
}

func FuzzWebSocket(f *testing.F) {
	for _, m := range readPeerVectors(f).Messages {
		b := m.bytes(f)
		f.Add(frame(true, frameBinary, b[:min(len(b), 4096)]))
	}
	f.Add(bytes.Join([][]byte{frame(false, frameBinary, []byte("ab")), frame(true, framePing, nil),
		frame(true, frameContinued, []byte("c")), frame(true, frameClose, []byte{3, 0xe8, 'x'})}, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		w := newWebSocket(&onlyInput{Reader: bytes.NewReader(b)}, time.Hour)
		for total := 0; ; {
			msg, err := w.next(nil)
			if total += len(msg); total > len(b) {
				t.Errorf("got %d bytes of %d", total, len(b))
			}
			if err != nil && err != errMessageSize {
				return
			}
		}
	})
}

// onlyInput is a connection that takes everything.
type onlyInput struct{ io.Reader }

func (*onlyInput) Write(p []byte) (int, error) { return len(p), nil }
func (*onlyInput) Close() error                { return nil }
