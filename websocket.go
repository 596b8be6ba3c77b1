// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// The client's side of WebSocket (RFC 6455), over the transport that everything else goes over. Messages are binary.

const (
	maxSocketMessage = 256 << 10 // bytes of a message that comes in whole
	socketBuffer     = 64 << 10  // bytes that are read at once, and kept for the next frame that is sent
	maxSocketSkipped = 16 << 20  // bytes of one that is too large, and read past; servers send 8 MiB at most

	socketHandshake = 45 * time.Second // until the server has answered
	socketQuiet     = 50 * time.Second // without a frame: a ping asks for one; as long again: the link is lost
	socketPatience  = time.Minute      // for the kernel to take a message
)

// Kinds of frames (RFC 6455, 5.2), and reasons for an end (7.4.1).
const (
	frameContinued = 0
	frameText      = 1
	frameBinary    = 2
	frameClose     = 8
	framePing      = 9
	framePong      = 10

	closeNormal   = 1000
	closeProtocol = 1002
	closeKind     = 1003
	closeNoCode   = 1005 // never sent
	closeContent  = 1007
	closeTooLarge = 1009
)

// errMessageSize is for a message of which only the beginning was kept.
var errMessageSize = fmt.Errorf("message of more than %d bytes", maxSocketMessage)

// socketEnd is how the link has ended: what the server said in its close frame, or what is wrong with what it sent.
type socketEnd struct {
	code int
	text string
	ours bool
}

func (e *socketEnd) Error() string {
	if e.ours {
		return "the server does not keep to the protocol: " + e.text
	}
	s := "closed by the server"
	if e.code != closeNoCode {
		s += fmt.Sprintf(", code %d", e.code)
	}
	if e.text != "" {
		s += ": " + quote(e.text)
	}
	return s
}

// webSocket is a connection. One goroutine reads; several may send.
type webSocket struct {
	conn  io.ReadWriteCloser
	r     *bufio.Reader
	quiet time.Duration // see socketQuiet

	mu   sync.Mutex // over writing
	out  []byte
	key  [256]byte   // the mask of a frame, again and again
	late *time.Timer // closes the connection when the kernel takes nothing
	over error       // why nothing is sent any more

	watch *time.Timer // see tick
	seen  sync.Mutex  // over what follows
	asked bool        // by a ping, and nothing has come since
	lost  error       // why the connection was closed from here
}

// dialWebSocket asks for the protocol and checks that the server agrees. Its errors have the exit code and the hint
// that go with them.
func dialWebSocket(ctx context.Context, hc *agent, url, token string) (*webSocket, error) {
	ctx, cancel := context.WithTimeout(ctx, socketHandshake)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, refuse("server URL: %w", err)
	}
	nonce := make([]byte, 16)
	rand.Read(nonce) // which never fails
	key := base64.StdEncoding.EncodeToString(nonce)
	req.Header = http.Header{"Authorization": {"Bearer " + token}, "Connection": {"Upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {key}}
	what := fmt.Sprintf("%s %q", req.Method, urlKey(req.URL))
	resp, err := hc.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			err = tryLater("no answer: %w", err)
		}
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	conn, ok := resp.Body.(io.ReadWriteCloser)
	if err := checkSocketAnswer(what, resp, key); err != nil || !ok {
		resp.Body.Close()
		return nil, err
	}
	return newWebSocket(conn, socketQuiet), nil
}

// checkSocketAnswer is 4.1 of the RFC, "the client MUST validate the server's response".
func checkSocketAnswer(what string, resp *http.Response, key string) error {
	h := resp.Header
	if resp.StatusCode != http.StatusSwitchingProtocols {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		if resp.StatusCode/100 != 2 {
			return newStatusError(what, resp, text)
		}
		err := tryLater("%s: got HTTP status %d, want 101: %s", what, resp.StatusCode, quote(serverWords(text)))
		if isWebPage(h, text) {
			err = withHint(err, "%s", hintPage)
		}
		return err
	}
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	wrong := ""
	switch {
	case !strings.EqualFold(h.Get("Upgrade"), "websocket"):
		wrong = "Upgrade"
	case !strings.Contains(strings.ToLower(strings.Join(h["Connection"], ",")), "upgrade"):
		wrong = "Connection"
	case h.Get("Sec-Websocket-Accept") != base64.StdEncoding.EncodeToString(sum[:]):
		wrong = "Sec-Websocket-Accept"
	case h.Get("Sec-Websocket-Extensions") != "": // not asked for, as is the next one
		wrong = "Sec-Websocket-Extensions"
	case h.Get("Sec-Websocket-Protocol") != "":
		wrong = "Sec-Websocket-Protocol"
	default:
		return nil
	}
	return withHint(tryLater("%s: got the header %s with %s, which is no WebSocket", what, wrong, quote(h.Get(wrong))),
		"a proxy in between may not know WebSocket")
}

// newWebSocket is a link over conn, which it closes when there was no frame for twice the time quiet.
func newWebSocket(conn io.ReadWriteCloser, quiet time.Duration) *webSocket {
	w := &webSocket{conn: conn, r: bufio.NewReaderSize(conn, socketBuffer), quiet: quiet}
	w.late = time.AfterFunc(socketPatience, func() {
		w.drop(fmt.Errorf("the server has taken nothing for %s", socketPatience))
	})
	w.late.Stop()
	w.seen.Lock() // tick waits for it
	defer w.seen.Unlock()
	w.watch = time.AfterFunc(quiet, w.tick)
	return w
}

// tick is called when there was no frame for a while: a router in between may have forgotten the connection, which
// to the kernel stands for ever.
func (w *webSocket) tick() {
	w.seen.Lock()
	late := w.asked
	w.asked = true
	w.seen.Unlock()
	if late {
		w.drop(fmt.Errorf("nothing came from the server for %s", 2*w.quiet))
		return
	}
	w.watch.Reset(w.quiet) // first, as sending may wait
	w.send(framePing, nil)
}

// drop closes the connection; reading and sending end with why.
func (w *webSocket) drop(why error) {
	w.seen.Lock()
	if w.lost == nil {
		w.lost = why
	}
	w.seen.Unlock()
	w.watch.Stop()
	w.conn.Close()
}

// cause is err, or why the connection was closed from here, which err comes of.
//
//go:noinline
func (w *webSocket) cause(err error) error {
	w.seen.Lock()
	defer w.seen.Unlock()
	if w.lost != nil {
		return w.lost
	}
	return noEOF(err)
}

// frameHead is what a frame begins with.
type frameHead struct {
	kind   byte
	final  bool
	length uint64
}

// bad is an end because of what the server sent.
//
//go:noinline
func bad(code int, format string, args ...any) error {
	return &socketEnd{code, fmt.Sprintf(format, args...), true}
}

// head reads the next head. Bits that only extensions have, a mask, and lengths in more bytes than they take are
// errors.
func (w *webSocket) head() (h frameHead, err error) {
	var b [8]byte
	if _, err = io.ReadFull(w.r, b[:2]); err != nil {
		return h, err
	}
	w.seen.Lock()
	w.asked = false
	if w.lost == nil {
		w.watch.Reset(w.quiet)
	}
	w.seen.Unlock()
	h = frameHead{b[0] & 15, b[0]&0x80 != 0, uint64(b[1] & 0x7f)}
	switch {
	case b[0]&0x70 != 0:
		return h, bad(closeProtocol, "got a frame with bits of an extension, 0x%02x", b[0])
	case b[1]&0x80 != 0:
		return h, bad(closeProtocol, "got a masked frame")
	case h.kind > framePong || h.kind > frameBinary && h.kind < frameClose:
		return h, bad(closeProtocol, "got a frame of kind %d", h.kind)
	case h.kind >= frameClose && (!h.final || h.length > 125):
		return h, bad(closeProtocol, "got a control frame of kind %d that is too long, or a part", h.kind)
	}
	least := uint64(0)
	switch h.length {
	case 126:
		_, err = io.ReadFull(w.r, b[:2])
		h.length, least = uint64(binary.BigEndian.Uint16(b[:])), 126
	case 127:
		_, err = io.ReadFull(w.r, b[:])
		h.length, least = binary.BigEndian.Uint64(b[:]), 1<<16
	}
	if err == nil && (h.length < least || h.length>>63 != 0) {
		err = bad(closeProtocol, "got a length of %d in too many bytes", h.length)
	}
	return h, noEOF(err)
}

// ready says whether another message is here whole, in one frame: next will not wait for it.
func (w *webSocket) ready() bool {
	n := w.r.Buffered()
	b, _ := w.r.Peek(min(n, 4))
	switch {
	case n < 4 || b[0] != 0x80|frameBinary || b[1] == 127:
		return false
	case b[1] == 126:
		return n >= 4+int(binary.BigEndian.Uint16(b[2:]))
	}
	return n >= 2+int(b[1]&0x7f)
}

// next gives the next message, in buf if there is room. One that is too large ends nothing: its beginning comes with
// errMessageSize. After any other error the link is over; the server is told why if it is its fault.
func (w *webSocket) next(buf []byte) ([]byte, error) {
	msg, err := w.message(buf[:0])
	if err == nil || err == errMessageSize {
		return msg, err
	}
	err = w.cause(err)
	var end *socketEnd
	if errors.As(err, &end) {
		w.close(end.code, "")
	}
	w.drop(err)
	return nil, err
}

func (w *webSocket) message(msg []byte) ([]byte, error) {
	begun, skipped := false, uint64(0)
	for {
		h, err := w.head()
		switch {
		case err != nil:
			return nil, err
		case h.kind >= frameClose:
			if err := w.control(h); err != nil {
				return nil, err
			}
			continue
		case h.kind == frameText:
			return nil, bad(closeKind, "got a message of text, want binary ones")
		case begun != (h.kind == frameContinued):
			return nil, bad(closeProtocol, "got a frame of kind %d in the place of another", h.kind)
		}
		begun = true
		keep := min(h.length, uint64(maxSocketMessage-len(msg)))
		rest := h.length - keep
		if skipped += rest; skipped > maxSocketSkipped || rest > maxSocketSkipped {
			return nil, bad(closeTooLarge, "got a message of more than %d bytes", maxSocketSkipped)
		}
		for n := 0; keep > 0; keep -= uint64(n) { // memory is for what is there
			n = int(min(keep, 16<<10))
			msg = append(msg, make([]byte, n)...)
			if _, err := io.ReadFull(w.r, msg[len(msg)-n:]); err != nil {
				return nil, noEOF(err)
			}
		}
		if _, err := w.r.Discard(int(rest)); err != nil {
			return nil, noEOF(err)
		}
		switch {
		case h.final && skipped > 0:
			return msg, errMessageSize
		case h.final:
			return msg, nil
		}
	}
}

// control takes a control frame. That of an end is an error.
func (w *webSocket) control(h frameHead) error {
	text := make([]byte, h.length)
	if _, err := io.ReadFull(w.r, text); err != nil {
		return noEOF(err)
	}
	switch h.kind {
	case framePing:
		return w.send(framePong, text)
	case framePong:
		return nil
	}
	if len(text) == 0 {
		return &socketEnd{code: closeNoCode}
	}
	if len(text) == 1 || !utf8.Valid(text[2:]) {
		return bad(closeProtocol, "got a close frame with the bytes % x", text)
	}
	return &socketEnd{code: int(binary.BigEndian.Uint16(text)), text: string(text[2:])}
}

// send sends one frame.
func (w *webSocket) send(kind byte, text []byte) error {
	return w.write(kind, func(b []byte) []byte { return append(b, text...) })
}

// write sends one frame of what text appends. It waits while the kernel takes nothing, and not for ever.
func (w *webSocket) write(kind byte, text func(b []byte) []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over != nil {
		return w.over
	}
	const room = 14 // bytes of the longest head
	b := text(append(w.out[:0], make([]byte, room)...))
	if w.out = b; cap(b) > socketBuffer {
		w.out = nil
	}
	n := len(b) - room
	at, length := room-6, byte(n)
	switch {
	case n >= 1<<16:
		at, length = 0, 127
		binary.BigEndian.PutUint64(b[2:], uint64(n))
	case n >= 126:
		at, length = room-8, 126
		binary.BigEndian.PutUint16(b[room-6:], uint16(n))
	}
	b[at], b[at+1] = 0x80|kind, 0x80|length
	key := w.key[:]
	rand.Read(key[:4])
	for n := 4; n < len(key); n *= 2 {
		copy(key[n:], key[:n])
	}
	copy(b[room-4:room], key)
	for p := b[room:]; len(p) > 0; p = p[subtle.XORBytes(p, p, key):] {
	}
	w.late.Reset(socketPatience)
	_, err := w.conn.Write(b[at:])
	w.late.Stop()
	if kind == frameClose {
		w.over = errors.New("the link is closed")
	}
	if err != nil {
		w.over = w.cause(err)
		w.conn.Close()
		return w.over
	}
	return nil
}

// close says goodbye, with a code unless it is one that is not sent, and closes the connection.
func (w *webSocket) close(code int, text string) {
	b := []byte(nil)
	if code != closeNoCode {
		b = append(binary.BigEndian.AppendUint16(nil, uint16(code)), text...)
	}
	late := time.AfterFunc(2*time.Second, func() { w.conn.Close() }) // others may be sending
	w.send(frameClose, b)
	late.Stop()
	w.drop(errors.New("the link is closed"))
}
