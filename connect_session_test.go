// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// testHub is a hub whose link is the test.
type testHub struct {
	*peerHub
	t       *testing.T
	sent    chan *peerMessage
	mu      sync.Mutex
	notes   []string
	opened  []*testPeerHandler
	blocked chan struct{} // what a handler waits for in receive, for typ "block"
}

// testPeerHandler answers each message with its own typ and body.
type testPeerHandler struct {
	s      *peerSession
	h      *testHub
	closed error
}

func (p *testPeerHandler) receive(m *peerMessage) {
	switch m.typ {
	case "block":
		<-p.h.blocked
	case "panic":
		panic("a fault")
	case "pong":
	default:
		p.s.send(&peerMessage{proto: m.proto, typ: m.typ, body: m.body})
	}
}

func (p *testPeerHandler) close(why error) {
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	p.closed = why
}

func (p *testPeerHandler) summary() string { return "a summary" }

func newTestHub(t *testing.T, change func(*peerHub)) *testHub {
	h := &testHub{t: t, sent: make(chan *peerMessage, 64), blocked: make(chan struct{})}
	open := func(s *peerSession) peerHandler {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.opened = append(h.opened, &testPeerHandler{s: s, h: h})
		return h.opened[len(h.opened)-1]
	}
	h.peerHub = &peerHub{lg: newLogger(testWriter{t}), sessions: map[string]*peerSession{}, perUser: 1, quiet: time.Hour,
		ends: 2 * time.Hour, patience: 10 * time.Millisecond, count: func(int, bool) {},
		offers: map[uint16]peerOffer{protoShell: {"terminal", open}, protoFile: {"files", open}},
		link: func(m *peerMessage) error {
			h.sent <- m
			return nil
		},
		note: func(format string, args ...any) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.notes = append(h.notes, fmt.Sprintf(format, args...))
		}}
	if change != nil {
		change(h.peerHub)
	}
	t.Cleanup(func() { h.endAll(errors.New("the test is over")) })
	return h
}

// testWriter logs to the test.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

// take is what the connection does with a message.
func (h *testHub) take(m *peerMessage, size int) error {
	s, err := h.peerHub.take(m, size)
	if s != nil {
		wake(s.wakes)
	}
	return err
}

func (h *testHub) give(proto uint16, typ, sid string, body []byte) {
	h.t.Helper()
	m := &peerMessage{proto: proto, typ: typ, sid: sid, body: body, props: map[string]any{"user_id": "u"}}
	if err := h.take(m, len(body)); err != nil {
		h.t.Fatal(err)
	}
}

// want waits for the next message to the server.
func (h *testHub) want(proto uint16, typ, sid string, body []byte) *peerMessage {
	h.t.Helper()
	select {
	case m := <-h.sent:
		if m.proto != proto || m.typ != typ || m.sid != sid || !bytes.Equal(m.body, body) {
			h.t.Fatalf("got protocol %d, %q to %q, %q, want %d, %q to %q, %q", m.proto, m.typ, m.sid, m.body, proto, typ, sid,
				body)
		}
		return m
	case <-time.After(20 * time.Second):
		h.t.Fatalf("waited for %q to %q in vain", typ, sid)
		return nil
	}
}

// TestSessionControl holds the protocol of sessions against what was seen of the reference.
func TestSessionControl(t *testing.T) {
	t.Parallel()
	h := newTestHub(t, nil)
	h.give(protoControl, "open", "a", packMap("versions", []any{2, 1}))
	h.want(protoControl, "accept", "a", packMap("version", 1, "protocols", []any{uint16(1), uint16(2)}))
	h.give(protoControl, "ping", "a", nil)
	h.want(protoControl, "pong", "a", nil)
	h.give(protoControl, "ping", "nobody", nil)
	h.want(protoControl, "pong", "nobody", nil)
	h.give(protoControl, "odd", "a", nil)
	h.want(protoControl, "error", "a", packMap("err", `no such control message: "odd"`, "close", false,
		"msgproto", uint16(protoControl), "msgtype", "odd"))
	h.give(9, "x", "a", nil)
	h.want(protoControl, "error", "a", packMap("err", "no handler registered for protocol: 0x0009", "close", false,
		"msgproto", uint16(9), "msgtype", "x"))
	h.give(protoFile, "stat", "a", []byte("path"))
	h.want(protoFile, "stat", "a", []byte("path"))
	h.give(protoShell, "new", "a", nil)
	h.want(protoControl, "error", "a", packMap("err", "the session is for another protocol", "close", false, "code", 409,
		"msgproto", uint16(protoShell), "msgtype", "new"))
	h.take(&peerMessage{proto: protoFile, typ: "stat", sid: "a", props: map[string]any{"user_id": "v"}}, 0)
	h.want(protoControl, "error", "a", packMap("err", "the session is another user's", "close", true, "code", 403,
		"msgproto", uint16(protoFile), "msgtype", "stat"))
	h.give(protoShell, "shell", "b", []byte("ls"))
	if m := h.want(protoShell, "shell", "b", []byte("session not found")); m.props["status"] != int64(2) {
		t.Errorf("got %v", m.props)
	}
	for _, typ := range []string{"close", "error", "pong"} { // of a session that is not there any more
		h.give(protoControl, typ, "c", nil)
	}
	h.take(&peerMessage{proto: protoFile, typ: "stat", sid: "", props: nil}, 0) // an answer would end the connection
	h.take(&peerMessage{proto: protoClient, typ: "check-update", sid: ""}, 0)
	h.give(protoClient, "check-update", "d", nil)
	h.want(protoControl, "error", "d", packMap("err", "no handler registered for protocol: 0x0004", "close", false,
		"msgproto", uint16(protoClient), "msgtype", "check-update"))
	h.give(protoControl, "open", "e", packMap("versions", []any{2}))
	h.want(protoControl, "error", "e", packMap("err", "handshake rejected: require version 1", "close", true,
		"msgproto", uint16(protoControl), "msgtype", "open"))
	h.give(protoControl, "close", "a", nil)
	<-h.opened[0].s.done
	h.endAll(errors.New("over"))
	if h.opened[0].closed != errPeerClosed || h.alive != 0 || len(h.sessions) != 0 || len(h.sent) != 0 {
		t.Errorf("got %v, %d alive, %d sessions, %d messages", h.opened[0].closed, h.alive, len(h.sessions), len(h.sent))
	}
	want := []string{`session "a" of user "u" begins: files`,
		`session "a" of user "u" ends after 0s: a summary; closed by the user`}
	if !reflect.DeepEqual(h.notes, want) {
		t.Errorf("got %q, want %q", h.notes, want)
	}
}

// TestSessionsOfAConnection begins one more than there may be, and ends them all.
func TestSessionsOfAConnection(t *testing.T) {
	t.Parallel()
	h := newTestHub(t, nil)
	for i := range maxPeerSessions {
		sid := fmt.Sprint(i)
		h.give(protoFile, "get_file", sid, nil)
		h.want(protoFile, "get_file", sid, nil)
	}
	h.give(protoFile, "get_file", "more", nil)
	h.want(protoControl, "error", "more", packMap("err", "this device has 16 sessions, and takes no more", "close", true,
		"code", 429, "msgproto", uint16(protoFile), "msgtype", "get_file"))
	lost := errors.New("the link is lost")
	h.endAll(lost)
	for _, o := range h.opened {
		if o.closed != lost {
			t.Errorf("got %v", o.closed)
		}
	}
	h.give(protoFile, "get_file", "late", nil)
	if h.alive != 0 || len(h.sent) != 0 {
		t.Errorf("got %d alive, %d messages", h.alive, len(h.sent))
	}
}

// TestSessionIdle asks by a ping, and ends without an answer; a terminal asks by itself and ends by its own limits.
func TestSessionIdle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newTestHub(t, func(h *peerHub) { h.quiet, h.ends, h.expiresIdle = time.Second, 3*time.Second, time.Minute })
		h.give(protoFile, "get_file", "a", nil)
		h.want(protoFile, "get_file", "a", nil)
		h.want(protoControl, "ping", "a", nil)
		h.want(protoControl, "error", "a", packMap("err", "session timeout", "close", true))
		h.give(protoShell, "new", "b", nil)
		h.want(protoShell, "new", "b", nil)
		<-h.opened[1].s.done
		if why := h.opened[1].closed; why == nil || why.Error() != "session expired after 1m0s" {
			t.Errorf("got %v", why)
		}
	})
}

// TestSessionBusy counts output of a terminal as life, as keys are.
func TestSessionBusy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newTestHub(t, func(h *peerHub) { h.expiresIdle = 10 * time.Minute })
		h.give(protoShell, "new", "a", nil)
		h.want(protoShell, "new", "a", nil)
		s := h.opened[0].s
		for _, typ := range []string{"shell", "shell", "ping"} {
			time.Sleep(9 * time.Minute)
			s.send(&peerMessage{proto: protoShell, typ: typ})
			h.want(protoShell, typ, "a", nil)
		}
		<-s.done
		if age := time.Since(s.started); age != 28*time.Minute {
			t.Errorf("ended after %v, want 28m", age)
		}
	})
}

// TestSessionOfOneUser lets a new terminal take the place of one that does not answer, and of no other.
func TestSessionOfOneUser(t *testing.T) {
	t.Parallel()
	h := newTestHub(t, nil)
	h.give(protoShell, "new", "a", nil)
	h.want(protoShell, "new", "a", nil)
	h.take(&peerMessage{proto: protoShell, typ: "new", sid: "other", props: map[string]any{"user_id": "v"}}, 0)
	h.want(protoShell, "new", "other", nil)
	h.give(protoShell, "new", "b", []byte("2"))
	h.want(protoShell, "ping", "a", nil)
	h.want(protoShell, "new", "b", []byte("2"))
	if h.opened[0].closed != errReplaced || len(h.sessions) != 2 {
		t.Errorf("got %v, %d sessions", h.opened[0].closed, len(h.sessions))
	}
	h.patience = time.Hour
	h.give(protoShell, "new", "c", nil)
	h.want(protoShell, "ping", "b", nil)
	h.give(protoShell, "pong", "b", nil)
	h.want(protoShell, "new", "c", []byte("user has too many open sessions"))
	h.give(protoShell, "shell", "b", []byte("x"))
	h.want(protoShell, "shell", "b", []byte("x"))
}

// TestSessionInbox fills the inbox of a session that does not keep up: it ends alone.
func TestSessionInbox(t *testing.T) {
	t.Parallel()
	h := newTestHub(t, nil)
	h.give(protoFile, "block", "a", nil)
	h.give(protoFile, "get_file", "b", nil)
	h.want(protoFile, "get_file", "b", nil)
	chunk, n := make([]byte, 4096), 0
	h.mu.Lock()
	s := h.sessions["a"]
	h.mu.Unlock()
	for ; s.ctx.Err() == nil && n < 1000; n++ {
		h.give(protoFile, "file_chunk", "a", chunk)
	}
	if most := maxInbox/(4096+messageOverhead) + 4; n > most || n < most-8 {
		t.Errorf("it took %d messages, want about %d", n, most)
	}
	close(h.blocked)
	for m := <-h.sent; ; m = <-h.sent {
		if m.typ == "error" {
			if text := string(m.body); m.sid != "a" || !strings.Contains(text, "more than 262144 bytes of messages wait") {
				t.Errorf("got %q to %q", text, m.sid)
			}
			break
		}
	}
	h.give(protoFile, "get_file", "b", nil)
	h.want(protoFile, "get_file", "b", nil)
}

// TestSessionFault ends the one session in which there is a fault of this program.
func TestSessionFault(t *testing.T) {
	t.Parallel()
	h := newTestHub(t, nil)
	h.give(protoFile, "get_file", "a", nil)
	h.want(protoFile, "get_file", "a", nil)
	h.mu.Lock()
	s := h.sessions["a"]
	h.mu.Unlock()
	h.give(protoFile, "panic", "a", nil)
	<-s.done
	if h.opened[0].closed == nil || len(h.sessions) != 0 {
		t.Errorf("got %v, %d sessions", h.opened[0].closed, len(h.sessions))
	}
}

// TestSessionKeepsUp takes what comes without ever having taken all.
func TestSessionKeepsUp(t *testing.T) {
	t.Parallel()
	s := &peerSession{wakes: make(chan struct{}, 1), spoken: make(chan struct{}, 1)}
	s.end = func(why error) { t.Fatalf("%d bytes wait: %v", s.held, why) }
	s.put(&peerMessage{}, 4096)
	for range 1000 {
		s.put(&peerMessage{}, 4096)
		s.get()
	}
}
