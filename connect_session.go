// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"
)

// The sessions of a connection: which message is for whom, the protocol that they have in common ("control"), what
// they may take, and when they end.

const (
	maxPeerSessions = 16        // at a time, those that are just ending included
	maxInbox        = 256 << 10 // bytes of messages that wait in a session; one more may come on top
	messageOverhead = 512       // bytes that count for a message beside its own

	sessionQuiet = 48 * time.Second // without a message: a ping asks for one
	sessionEnds  = 60 * time.Second // without a message, of a session that is no terminal
	replaceAfter = 5 * time.Second  // without an answer a terminal gives its place to a new one
)

var (
	errPeerClosed = errors.New("closed by the user")
	errPeerQuiet  = errors.New("session timeout")
	errReplaced   = errors.New("it did not answer, and the user has begun a new one")
)

// peerSession is a session of the server: one sid, of one user, with one protocol beside control. Its messages come
// in order, in one goroutine of its own.
type peerSession struct {
	id, user string
	ctx      context.Context            // ends with the session, for the reason that is its cause
	send     func(m *peerMessage) error // fills in sid; blocks while the link is busy; an error: session or link are over
	end      func(why error)            // ends the session, from any goroutine; does not wait
	lg       *logger

	hub     *peerHub
	proto   uint16 // 0: none yet
	handler peerHandler
	started time.Time

	mu     sync.Mutex // over what follows
	inbox  []waiting
	held   int       // bytes of it
	heard  time.Time // when the last message came
	typed  time.Time // when the last one came that is no answer to a ping, or output of a terminal went
	wakes  chan struct{}
	spoken chan struct{} // a message came; for who waits for one
	done   chan struct{} // closed when nothing is left of it
}

// waiting is a message in the inbox of a session.
type waiting struct {
	m    *peerMessage
	size int // that counts
}

// peerHandler is what a protocol does in one session.
type peerHandler interface {
	// receive takes one message of the session. What takes long it does in goroutines of its own. Its bytes are used
	// again afterwards: nothing keeps a part of body or props, but strings.
	receive(m *peerMessage)
	// close ends all that the handler has, and returns when nothing is left of it. It is called once, when
	// the session is over, for why; the last messages can still be sent unless the link is lost.
	close(why error)
	// summary is what the log says of it: kind, path or host:port, bytes.
	summary() string
}

// peerError is an error that the peer is told with a code.
type peerError struct {
	code int // as of HTTP; 0: none
	err  error
}

//go:noinline
func peerErrorf(code int, format string, args ...any) *peerError {
	return &peerError{code, fmt.Errorf(format, args...)}
}

func (e *peerError) Error() string { return e.err.Error() }
func (e *peerError) Unwrap() error { return e.err }

// peerOffer is a protocol that this device offers.
type peerOffer struct {
	kind string // for the log
	open func(*peerSession) peerHandler
}

// peerHub has the sessions of a connection.
type peerHub struct {
	lg     *logger
	link   func(m *peerMessage) error // sends
	offers map[uint16]peerOffer
	client func(m *peerMessage) error // does a command of protoClient; nil: that is not offered
	note   func(format string, args ...any)
	count  func(n int, ended bool) // of the sessions, when one has begun or ended

	perUser               int           // terminals of one user; at least 1
	expires, expiresIdle  time.Duration // of terminals: since their start, since the last key or output; 0: never
	quiet, ends, patience time.Duration // see sessionQuiet, sessionEnds, replaceAfter

	mu       sync.Mutex
	sessions map[string]*peerSession
	alive    int  // of them and those that are ending
	over     bool // none begins any more
	running  sync.WaitGroup
}

// userOf is who has sent the message, as the server says.
//
//go:noinline
func userOf(m *peerMessage) string {
	user, _ := m.props["user_id"].(string)
	return user
}

// answer makes a message to the session that m came from.
//
//go:noinline
func (m *peerMessage) answer(proto uint16, typ string, body []byte) *peerMessage {
	return &peerMessage{proto: proto, typ: typ, sid: m.sid, body: body}
}

// complaint is the error of control about m; code 0: none. close: it ends the session.
func (m *peerMessage) complaint(code int, close bool, text string) *peerMessage {
	pairs := []any{"err", text, "close", close, "code", nil, "msgproto", nil, "msgtype", nil, "msgid", nil}
	if code != 0 {
		pairs[5] = code
	}
	if m.typ != "" {
		pairs[7], pairs[9] = m.proto, m.typ
	}
	if id, ok := m.props["msgid"].(string); ok {
		pairs[11] = id
	}
	return m.answer(protoControl, "error", packMap(pairs...))
}

// refusal answers m that there is no such thing. A terminal hears it in a way that it shows.
func (m *peerMessage) refusal(code int, text string) *peerMessage {
	if m.proto != protoShell {
		return m.complaint(code, code != 0, text)
	}
	r := m.answer(protoShell, m.typ, []byte(text))
	r.props = map[string]any{"status": int64(2)}
	return r
}

// take gives a message of size bytes to its session, which may be a new one. It does not wait for that, and leaves it
// to the caller to wake the session; nil: there is none.
func (h *peerHub) take(m *peerMessage, size int) (*peerSession, error) {
	if m.proto == protoClient {
		return nil, h.command(m)
	}
	if m.sid == "" { // and there is nobody to tell
		h.lg.debugf("message of protocol %d and type %s without a session", m.proto, quote(m.typ))
		return nil, nil
	}
	h.mu.Lock()
	s := h.sessions[m.sid]
	if s == nil {
		if h.over {
			h.mu.Unlock()
			return nil, nil
		}
		reply := h.beginning(m)
		if reply != nil || m.proto == protoControl && m.typ != "open" {
			h.mu.Unlock()
			if reply == nil {
				return nil, nil
			}
			return nil, h.link(reply)
		}
		s = h.begin(m)
	}
	h.mu.Unlock()
	s.put(m, size)
	return s, nil
}

// beginning gives what a message for no known session is answered with, where it does not begin one. h.mu is held.
func (h *peerHub) beginning(m *peerMessage) *peerMessage {
	if m.proto == protoControl {
		switch m.typ {
		case "open":
		case "ping":
			return m.answer(protoControl, "pong", nil)
		case "pong", "close", "error", "accept":
			return nil
		default:
			return m.complaint(0, false, "no such control message: "+quote(m.typ))
		}
	} else if _, ok := h.offers[m.proto]; !ok {
		return h.notOffered(m)
	} else if m.proto == protoShell && m.typ != "new" {
		if m.typ == "pong" {
			return m.answer(protoShell, "stop", nil)
		}
		return m.refusal(0, "session not found")
	}
	if h.alive >= maxPeerSessions {
		return m.refusal(429, fmt.Sprintf("this device has %d sessions, and takes no more", h.alive))
	}
	return nil
}

// notOffered is the answer to a protocol that this device does not offer, or that there is not.
func (h *peerHub) notOffered(m *peerMessage) *peerMessage {
	if m.proto == protoShell {
		return m.refusal(0, "this device does not offer a terminal")
	}
	return m.complaint(0, false, fmt.Sprintf("no handler registered for protocol: 0x%04x", m.proto))
}

// command does what the server asks of the updater. It is answered only where there is a session: the server takes
// no message without one.
func (h *peerHub) command(m *peerMessage) error {
	if h.client == nil {
		h.lg.infof("%s by user %s is not offered", quote(m.typ), quote(userOf(m)))
		if m.sid == "" {
			return nil
		}
		return h.link(h.notOffered(m))
	}
	err := h.client(m)
	if m.sid == "" {
		return nil
	}
	r := m.answer(protoClient, m.typ, nil)
	r.props = map[string]any{"status": 1}
	if err != nil {
		r.props["status"], r.body = 2, []byte(err.Error())
	}
	return h.link(r)
}

// begin makes a session. h.mu is held.
func (h *peerHub) begin(m *peerMessage) *peerSession {
	ctx, cancel := context.WithCancelCause(context.Background())
	now := time.Now()
	s := &peerSession{id: m.sid, user: userOf(m), ctx: ctx, lg: h.lg, hub: h, started: now, heard: now, typed: now,
		wakes: make(chan struct{}, 1), spoken: make(chan struct{}, 1), done: make(chan struct{}), end: cancel}
	s.send = func(m *peerMessage) error {
		m.sid = s.id
		if m.proto == protoShell && m.typ == "shell" { // a long build without a key is no idle terminal
			s.mu.Lock()
			s.typed = time.Now()
			s.mu.Unlock()
		}
		return h.link(m)
	}
	h.sessions[s.id] = s
	h.alive++
	h.running.Add(1)
	h.count(h.alive, false)
	go s.run()
	return s
}

// put leaves a message to the session. One that does not keep up ends.
func (s *peerSession) put(m *peerMessage, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = time.Now()
	if m.typ != "pong" {
		s.typed = s.heard
	}
	if s.held > maxInbox {
		s.end(peerErrorf(413, "more than %d bytes of messages wait", maxInbox))
		return
	}
	size += messageOverhead
	s.inbox, s.held = append(s.inbox, waiting{m, size}), s.held+size
	wake(s.spoken)
}

// wholeMessages are the bytes of messages that were dealt with, for those that come.
var wholeMessages sync.Pool

func keepBytes(b []byte) {
	if b != nil && cap(b) <= 16<<10 {
		wholeMessages.Put(&b)
	}
}

func spareBytes() []byte {
	if b, ok := wholeMessages.Get().(*[]byte); ok {
		return *b
	}
	return nil
}

// wake makes a channel of one place ready.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// get takes the next message; nil: there is none.
func (s *peerSession) get() *peerMessage {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.inbox) == 0 {
		s.inbox = nil
		return nil
	}
	next := s.inbox[0]
	s.inbox[0] = waiting{} // the memory goes with the message
	s.inbox, s.held = s.inbox[1:], s.held-next.size
	return next.m
}

// waiting says how many messages there are to be taken.
//
//go:noinline
func (s *peerSession) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.inbox)
}

// run is the session, until it ends.
func (s *peerSession) run() {
	defer s.hub.running.Done()
	defer s.bury()
	defer func() {
		if fault := recover(); fault != nil {
			s.lg.errorf("internal error in session %s: %v: %s", quote(s.id), fault, debug.Stack())
			s.end(errors.New("internal error"))
		}
	}()
	asked := false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for s.ctx.Err() == nil {
		select {
		case <-s.ctx.Done():
			return
		case <-s.wakes:
			asked = false
			for m := s.get(); m != nil && s.ctx.Err() == nil; m = s.get() {
				s.receive(m)
				keepBytes(m.whole)
			}
		case <-timer.C:
		}
		next, quiet := s.due(asked)
		if quiet {
			asked = true
			s.send(&peerMessage{proto: protoControl, typ: "ping"})
		}
		timer.Reset(next)
	}
}

// due ends the session if its time is over, and else says when to ask again. quiet: it is time for a ping.
func (s *peerSession) due(asked bool) (next time.Duration, quiet bool) {
	h, now := s.hub, time.Now()
	s.mu.Lock()
	heard, typed := now.Sub(s.heard), now.Sub(s.typed)
	s.mu.Unlock()
	if s.proto == protoShell { // which asks by messages of its own
		next = 24 * time.Hour
		for _, limit := range [][2]time.Duration{{h.expires, now.Sub(s.started)}, {h.expiresIdle, typed}} {
			if limit[0] > 0 && limit[1] >= limit[0] {
				s.end(fmt.Errorf("session expired after %s", limit[0]))
			} else if limit[0] > 0 {
				next = min(next, limit[0]-limit[1])
			}
		}
		return next, false
	}
	switch {
	case heard >= h.ends:
		s.end(&peerError{0, errPeerQuiet})
	case heard < h.quiet:
		return h.quiet - heard, false
	}
	return h.ends - heard, !asked
}

// receive takes a message of control, or of the one protocol that the session has.
func (s *peerSession) receive(m *peerMessage) {
	if user := userOf(m); user != "" && user != s.user {
		s.mu.Lock()
		first := s.user == ""
		if first {
			s.user = user
		}
		s.mu.Unlock()
		if !first {
			s.send(m.refusal(403, "the session is another user's"))
			return
		}
	}
	offer, offered := s.hub.offers[m.proto]
	switch {
	case m.proto == protoControl:
		s.control(m)
		return
	case !offered:
		s.send(s.hub.notOffered(m))
		return
	case s.proto == 0:
		if m.proto == protoShell {
			if err := s.hub.makeRoom(s); err != nil {
				s.send(m.refusal(429, err.Error()))
				s.end(err)
				return
			}
		}
		s.setProto(m.proto)
		s.hub.note("session %s of user %s begins: %s", quote(s.id), quote(s.user), offer.kind)
		s.handler = offer.open(s)
	case s.proto != m.proto:
		s.send(m.complaint(409, false, "the session is for another protocol"))
		return
	}
	s.handler.receive(m)
}

//go:noinline
func (s *peerSession) setProto(proto uint16) {
	s.mu.Lock()
	s.proto = proto
	s.mu.Unlock()
}

// control takes a message about the session itself.
func (s *peerSession) control(m *peerMessage) {
	switch m.typ {
	case "open":
		body, err := unpackMap(m.body)
		versions, _ := field(body, "versions").([]any)
		if err != nil || !slices.Contains(versions, any(int64(1))) {
			s.send(m.complaint(0, true, "handshake rejected: require version 1"))
			s.end(errors.New("no common version of the protocol"))
			return
		}
		protocols := []any{}
		for p := uint16(protoShell); p <= protoClient; p++ {
			if _, ok := s.hub.offers[p]; ok || p == protoClient && s.hub.client != nil {
				protocols = append(protocols, p)
			}
		}
		s.send(m.answer(protoControl, "accept", packMap("version", 1, "protocols", protocols)))
	case "ping":
		s.send(m.answer(protoControl, "pong", nil))
	case "pong", "accept":
	case "close":
		s.end(errPeerClosed)
	case "error":
		body, _ := unpackMap(m.body)
		text, _ := field(body, "err").(string)
		if closes, _ := field(body, "close").(bool); closes {
			s.end(fmt.Errorf("ended by the user's side: %s", quote(text)))
		}
	default:
		s.send(m.complaint(0, false, "no such control message: "+quote(m.typ)))
	}
}

// makeRoom lets s be a terminal, if its user may have one more, or one of those does not answer and gives way.
func (h *peerHub) makeRoom(s *peerSession) error {
	h.mu.Lock()
	n, o := 0, (*peerSession)(nil) // the oldest of n others
	for _, other := range h.sessions {
		other.mu.Lock()
		if other != s && other.proto == protoShell && other.user == s.user {
			if n++; o == nil || other.started.Before(o.started) {
				o = other
			}
		}
		other.mu.Unlock()
	}
	if n < h.perUser {
		s.setProto(protoShell) // it counts from here on
		h.mu.Unlock()
		return nil
	}
	h.mu.Unlock()
	select {
	case <-o.spoken: // before
	default:
	}
	o.send(&peerMessage{proto: protoShell, typ: "ping", props: map[string]any{"timeout": int64(65), "status": int64(3)}})
	late := time.NewTimer(h.patience)
	defer late.Stop()
	select {
	case <-o.spoken:
		return errors.New("user has too many open sessions")
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	case <-late.C:
		o.end(errReplaced)
		<-o.done
	case <-o.done:
	}
	s.setProto(protoShell)
	return nil
}

// bury ends what the session has, and says how that was.
func (s *peerSession) bury() {
	h, why := s.hub, context.Cause(s.ctx)
	h.mu.Lock()
	delete(h.sessions, s.id)
	h.mu.Unlock()
	if s.handler != nil {
		s.handler.close(why)
		h.note("session %s of user %s ends after %s: %s; %s", quote(s.id), quote(s.user),
			time.Since(s.started).Round(time.Second), s.handler.summary(), oneLine(why.Error()))
	}
	var told *peerError
	if errors.As(why, &told) && s.proto != protoShell { // whose handler tells it
		s.send((&peerMessage{}).complaint(told.code, true, told.Error()))
	}
	close(s.done)
	h.mu.Lock()
	h.alive--
	h.count(h.alive, true)
	h.mu.Unlock()
}

// endAll ends all sessions, for why, and returns when nothing is left of them.
func (h *peerHub) endAll(why error) {
	h.mu.Lock()
	h.over = true
	for _, s := range h.sessions {
		s.end(why)
	}
	h.mu.Unlock()
	h.running.Wait()
}

// drop ends the session of this id, if there is one.
func (h *peerHub) drop(id string, why error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.sessions[id]; s != nil {
		s.end(why)
	}
}
