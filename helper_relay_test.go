// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

// A relay for tests: what the service deviceconnect does between devices and users, where either could see a
// difference. TestRelay* and Debian's mender-cli and mender-connect, which both talk with it, show that it is right.

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	relayMessage = 8 << 20          // bytes of a message
	relayPing    = 30 * time.Second // between two pings
	relaySilence = 60 * time.Second // after which who is silent is gone
	relayChunk   = 4096             // bytes of a file in one message
	relayWindow  = 10               // chunks that are sent ahead of the acks
	relayGuard   = time.Minute      // nothing that a test waits for takes as long

	manage = "/api/management/v1/deviceconnect/devices/{id}"
)

// relay is a server with deviceconnect.
type relay struct {
	*testServer
	at       sync.Mutex // over what follows
	news     *sync.Cond // a device or a session came or went
	devices  map[string]*relayLink
	links    int // of devices, so far
	sessions map[string]*relaySession
	trace    func(sid string, toDevice bool, m *peerMessage) // sees every message; nil: nobody does
}

// relayLink is a device's or a user's websocket.
type relayLink struct{ *socketPeer }

// relaySession is one of a user, or of a transfer.
type relaySession struct {
	id, user, device string
	take             func(m *peerMessage, raw []byte) // a message of the device
	drop             func()                           // the device is gone
}

func newRelay(t testing.TB) *relay {
	r := &relay{testServer: newTestServer(t, false), devices: map[string]*relayLink{},
		sessions: map[string]*relaySession{}}
	r.news = sync.NewCond(&r.at)
	r.autoAccept = true
	r.connect = r.serveDevice
	mux := http.NewServeMux()
	mux.Handle("/", r.Config.Handler)
	for pattern, f := range map[string]func(w http.ResponseWriter, q *http.Request, user string){
		"GET " + manage: r.getDevice, "GET " + manage + "/connect": r.serveUser, "GET " + manage + "/download": r.download,
		"PUT " + manage + "/upload": r.upload, "POST " + manage + "/check-update": r.command,
		"POST " + manage + "/send-inventory": r.command} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, q *http.Request) {
			if user := userOfToken(q); user != "" {
				f(w, q, user)
				return
			}
			apiError(w, http.StatusUnauthorized, "unauthorized")
		})
	}
	r.Config.Handler = mux
	t.Cleanup(func() {
		r.at.Lock()
		defer r.at.Unlock()
		for _, l := range r.devices {
			l.Close()
		}
		for _, s := range r.sessions {
			s.drop()
		}
	})
	return r
}

// userToken is what a user of this name shows.
func userToken(name string) string {
	claims := fmt.Sprintf(`{"sub":%q,"mender.user":true,"mender.tenant":"t1"}`, name)
	return "e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".c2ln"
}

// userOfToken gives who asks; "": nobody.
func userOfToken(q *http.Request) string {
	token, _ := strings.CutPrefix(q.Header.Get("Authorization"), "Bearer ")
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return ""
	}
	var claims struct {
		Sub  string
		User bool `json:"mender.user"`
	}
	text, _ := base64.RawURLEncoding.DecodeString(parts[1])
	if json.Unmarshal(text, &claims) != nil || !claims.User {
		return ""
	}
	return claims.Sub
}

// next takes the next message; it answers pings and the end.
func (l *relayLink) next() (msg []byte, err error) {
	for {
		l.SetReadDeadline(time.Now().Add(relaySilence))
		final, kind, text, err := l.frame(relayMessage)
		if err != nil {
			return nil, err
		}
		switch kind {
		case framePing:
			err = l.send(framePong, text)
		case framePong:
		case frameClose:
			l.send(frameClose, text[:min(2, len(text))])
			return nil, io.EOF
		default:
			if msg = append(msg, text...); len(msg) > relayMessage {
				return nil, errors.New("message too large")
			}
			if final {
				return msg, nil
			}
		}
		if err != nil {
			return nil, err
		}
	}
}

// end closes the link with a code.
func (l *relayLink) end(code uint16, text string) {
	l.SetWriteDeadline(time.Now().Add(time.Second))
	l.send(frameClose, append(binary.BigEndian.AppendUint16(nil, code), text...))
	l.Close()
}

// pings sends them until the link ends.
func (l *relayLink) pings(ctx context.Context) {
	tick := time.NewTicker(relayPing)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			l.send(framePing, []byte("60"))
		}
	}
}

// welcome makes a link of a request.
func (r *relay) welcome(w http.ResponseWriter, q *http.Request) *relayLink {
	if q.Header.Get("Sec-Websocket-Version") != "13" || !strings.EqualFold(q.Header.Get("Upgrade"), "websocket") {
		apiError(w, http.StatusBadRequest, "not a websocket")
		return nil
	}
	var h http.Header
	if p := q.Header.Get("Sec-Websocket-Protocol"); p == "protomsg/msgpack" {
		h = http.Header{"Sec-Websocket-Protocol": {p}}
	}
	p := upgrade(w, q, h)
	if p == nil {
		return nil
	}
	return &relayLink{p}
}

// serveDevice is a device's connection.
func (r *relay) serveDevice(w http.ResponseWriter, q *http.Request) {
	token, _ := strings.CutPrefix(q.Header.Get("Authorization"), "Bearer ")
	r.testServer.mu.Lock()
	id := r.tokens[token].uid
	r.testServer.mu.Unlock()
	l := r.welcome(w, q)
	if l == nil {
		return
	}
	r.at.Lock()
	older := r.devices[id]
	r.devices[id] = l
	r.links++
	r.news.Broadcast()
	r.at.Unlock()
	if older != nil {
		older.end(1011, "connection closed by the server")
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go l.pings(ctx)
	why := r.readDevice(l)
	if why != nil {
		l.end(1011, why.Error())
	}
	l.Close()
	r.at.Lock()
	var orphans []*relaySession
	if r.devices[id] == l {
		delete(r.devices, id)
		for _, s := range r.sessions {
			if s.device == id {
				orphans = append(orphans, s)
			}
		}
	}
	r.news.Broadcast()
	r.at.Unlock()
	for _, s := range orphans {
		s.drop()
	}
}

// readDevice passes the device's messages on; an error is what it did wrong.
func (r *relay) readDevice(l *relayLink) error {
	for {
		raw, err := l.next()
		if err != nil {
			return nil
		}
		m, err := unpackMessage(raw)
		if err != nil {
			return err
		}
		if m.sid == "" {
			return errors.New("api: message missing required session ID")
		}
		r.at.Lock()
		s, trace := r.sessions[m.sid], r.trace
		r.at.Unlock()
		if trace != nil {
			trace(m.sid, false, m)
		}
		if s != nil {
			s.take(m, raw)
		}
	}
}

// tell sends a message to a device.
func (r *relay) tell(device string, m *peerMessage) error {
	r.at.Lock()
	l, trace := r.devices[device], r.trace
	r.at.Unlock()
	if l == nil {
		return errors.New("device not connected")
	}
	if trace != nil {
		trace(m.sid, true, m)
	}
	return l.send(frameBinary, m.packed())
}

// begin makes a session with a device; nil: that is not there, which is answered.
func (r *relay) begin(w http.ResponseWriter, q *http.Request, user string) *relaySession {
	b := make([]byte, 16)
	rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	s := &relaySession{id: fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), user: user,
		device: q.PathValue("id")}
	r.at.Lock()
	defer r.at.Unlock()
	if r.devices[s.device] == nil {
		apiError(w, http.StatusNotFound, "device not connected")
		return nil
	}
	return s
}

// open makes it known.
func (r *relay) open(s *relaySession) {
	r.at.Lock()
	defer r.at.Unlock()
	r.sessions[s.id] = s
	r.news.Broadcast()
}

func (r *relay) forget(s *relaySession) {
	r.at.Lock()
	defer r.at.Unlock()
	delete(r.sessions, s.id)
	r.news.Broadcast()
}

func (r *relay) getDevice(w http.ResponseWriter, q *http.Request, _ string) {
	id, status := q.PathValue("id"), "disconnected"
	r.at.Lock()
	if r.devices[id] != nil {
		status = "connected"
	}
	r.at.Unlock()
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]string{"device_id": id, "status": status, "created_ts": "2026-01-01T00:00:00Z",
		"updated_ts": "2026-01-01T00:00:00Z"})
}

func (r *relay) command(w http.ResponseWriter, q *http.Request, user string) {
	typ := q.URL.Path[strings.LastIndexByte(q.URL.Path, '/')+1:]
	err := r.tell(q.PathValue("id"), &peerMessage{proto: protoClient, typ: typ, props: map[string]any{"user_id": user}})
	if err != nil {
		apiError(w, http.StatusConflict, err.Error())
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

// serveUser is a user's websocket, which is one session.
func (r *relay) serveUser(w http.ResponseWriter, q *http.Request, user string) {
	s := r.begin(w, q, user)
	if s == nil {
		return
	}
	l := r.welcome(w, q)
	if l == nil {
		return
	}
	s.take = func(_ *peerMessage, raw []byte) { l.send(frameBinary, raw) }
	stop := func(text string) *peerMessage {
		return &peerMessage{proto: protoShell, typ: "stop", sid: s.id, body: []byte(text),
			props: map[string]any{"status": 2, "user_id": user}}
	}
	s.drop = func() {
		l.SetWriteDeadline(time.Now().Add(time.Second))
		l.send(frameBinary, stop("device disconnected").packed())
		l.Close()
	}
	r.open(s)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go l.pings(ctx)
	shell := false
	for {
		raw, err := l.next()
		if err != nil {
			break
		}
		m, err := unpackMessage(raw)
		if err != nil {
			l.end(1011, err.Error())
			break
		}
		if m.sid = s.id; m.props == nil {
			m.props = map[string]any{}
		}
		m.props["user_id"] = user
		shell = m.proto == protoShell && m.typ != "stop" || shell && m.proto != protoShell
		if r.tell(s.device, m) != nil {
			break
		}
	}
	l.Close()
	r.forget(s)
	if shell {
		r.tell(s.device, stop("user disconnected"))
	}
}

// relayTransfer is a transfer by the management API.
type relayTransfer struct {
	*relaySession
	r    *relay
	came chan *peerMessage
	gone chan struct{}
	once sync.Once
}

// relayError is an error with the HTTP status that answers the user.
type relayError struct {
	status int
	text   string
}

func (e *relayError) Error() string { return e.text }

// transfer begins one, which f does; an error of f is answered.
func (r *relay) transfer(w http.ResponseWriter, q *http.Request, user string, f func(x *relayTransfer) error) {
	s := r.begin(w, q, user)
	if s == nil {
		return
	}
	x := &relayTransfer{relaySession: s, r: r, came: make(chan *peerMessage, 64), gone: make(chan struct{})}
	s.drop = func() { x.once.Do(func() { close(x.gone) }) }
	s.take = func(m *peerMessage, raw []byte) {
		// What has another width than 8 bytes, signed, is no offset to the service.
		if _, ok := m.props["offset"]; ok && !bytes.Contains(raw, []byte("\xa6offset\xd3")) {
			delete(m.props, "offset")
		}
		select {
		case x.came <- m:
		case <-x.gone:
		}
	}
	r.open(s)
	defer r.forget(s)
	defer s.drop()
	err := x.say(protoControl, "open", nil, packMap("versions", []any{1}))
	var m *peerMessage
	if err == nil {
		m, err = x.hear()
	}
	if err == nil {
		body, _ := unpackMap(m.body)
		list, _ := field(body, "protocols").([]any)
		if m.proto != protoControl || m.typ != "accept" || !slices.Contains(list, any(int64(protoFile))) {
			err = &relayError{http.StatusBadGateway, "file transfer not implemented on device"}
		}
	}
	if err == nil {
		err = f(x)
	}
	x.say(protoControl, "close", nil, nil)
	var known *relayError
	if errors.As(err, &known) {
		apiError(w, known.status, known.text)
	} else if err != nil { // in the middle
		panic(http.ErrAbortHandler)
	}
}

func (x *relayTransfer) say(proto uint16, typ string, offset any, body []byte) error {
	m := &peerMessage{proto: proto, typ: typ, sid: x.id, props: map[string]any{"user_id": x.user}, body: body}
	if offset != nil {
		m.props["offset"] = offset
	}
	if x.r.tell(x.device, m) != nil {
		return &relayError{http.StatusConflict, "device disconnected"}
	}
	return nil
}

// hear takes the next message; pings are answered.
func (x *relayTransfer) hear() (*peerMessage, error) {
	late := time.NewTimer(relaySilence)
	defer late.Stop()
	for {
		select {
		case m := <-x.came:
			if m.proto != protoControl || m.typ != "ping" {
				return m, nil
			}
			if err := x.say(protoControl, "pong", nil, nil); err != nil {
				return nil, err
			}
		case <-x.gone:
			return nil, &relayError{http.StatusConflict, "device disconnected"}
		case <-late.C:
			return nil, &relayError{http.StatusRequestTimeout, "timeout"}
		}
	}
}

// want takes the next message, which has this type; else it is the error, of this status if the device names none.
func (x *relayTransfer) want(typ string, status int) (*peerMessage, map[string]any, error) {
	m, err := x.hear()
	if err != nil {
		return nil, nil, err
	}
	if m.proto == protoFile && m.typ == typ {
		body, _ := unpackMap(m.body)
		return m, body, nil
	}
	body, _ := unpackMap(m.body)
	text, _ := field(body, "err").(string)
	if m.typ != "error" || text == "" {
		return nil, nil, &relayError{http.StatusInternalServerError, fmt.Sprintf("unexpected message %q", m.typ)}
	}
	if code, _ := field(body, "code").(int64); code >= 400 && code < 600 {
		status = int(code)
	}
	return nil, nil, &relayError{status, text}
}

func (r *relay) download(w http.ResponseWriter, q *http.Request, user string) {
	r.transfer(w, q, user, func(x *relayTransfer) error {
		path := packMap("path", q.URL.Query().Get("path"))
		if err := x.say(protoFile, "stat", nil, path); err != nil {
			return err
		}
		_, info, err := x.want("file_info", http.StatusBadRequest)
		if err != nil {
			return err
		}
		mode, _ := info["mode"].(int64)
		size, _ := info["size"].(int64)
		if !fs.FileMode(mode).IsRegular() {
			return &relayError{http.StatusBadRequest, "path is not a regular file"}
		}
		if err := x.say(protoFile, "get_file", nil, path); err != nil {
			return err
		}
		var got int64
		for n := 1; ; n++ {
			m, _, err := x.want("file_chunk", http.StatusInternalServerError)
			if err == nil && m.props["offset"] != any(got) {
				err = &relayError{http.StatusInternalServerError, fmt.Sprintf("wrong offset: %v, not %d",
					m.props["offset"], got)}
			}
			if err != nil {
				if n > 1 {
					return errors.New(err.Error()) // it is too late for a status
				}
				return err
			}
			if n == 1 {
				for name, v := range info {
					w.Header().Set("X-Men-File-"+name, fmt.Sprint(v))
				}
				w.Header().Set("Content-Type", "application/octet-stream")
				w.Header().Set("X-Men-File-Mode", strconv.FormatInt(mode, 8))
				w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
			}
			if got += int64(len(m.body)); len(m.body) == 0 || n%10 == 0 {
				if err := x.say(protoFile, "ack", got, nil); err != nil {
					return err
				}
			}
			if len(m.body) == 0 {
				return nil
			}
			if _, err := w.Write(m.body); err != nil {
				return err
			}
		}
	})
}

func (r *relay) upload(w http.ResponseWriter, q *http.Request, user string) {
	parts, err := q.MultipartReader()
	if err != nil {
		apiError(w, http.StatusBadRequest, err.Error())
		return
	}
	fields := map[string]string{}
	for {
		p, err := parts.NextPart()
		if err != nil {
			apiError(w, http.StatusBadRequest, "no file: "+err.Error())
			return
		}
		if p.FormName() != "file" {
			text, _ := io.ReadAll(io.LimitReader(p, 4096))
			fields[p.FormName()] = string(text)
			continue
		}
		number := func(name string, base int) any {
			n, err := strconv.ParseUint(fields[name], base, 32)
			if err != nil {
				return nil
			}
			return uint32(n)
		}
		body := packMap("src_path", p.FileName(), "path", fields["path"], "uid", number("uid", 10), "gid",
			number("gid", 10), "mode", number("mode", 8))
		r.transfer(w, q, user, func(x *relayTransfer) error { return x.put(w, p, body) })
		return
	}
}

// put sends a file.
func (x *relayTransfer) put(w http.ResponseWriter, file io.Reader, body []byte) error {
	if err := x.say(protoFile, "put_file", nil, body); err != nil {
		return err
	}
	acked := int64(0)
	ack := func() error {
		m, _, err := x.want("ack", http.StatusBadRequest)
		if err == nil {
			offset, _ := m.props["offset"].(int64)
			acked = max(acked, offset)
		}
		return err
	}
	if err := ack(); err != nil {
		return err
	}
	buf, sent := make([]byte, relayChunk), int64(0)
	for {
		n, err := io.ReadFull(file, buf)
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return err
		}
		if err := x.say(protoFile, "file_chunk", sent, buf[:n]); err != nil {
			return err
		}
		sent += int64(n)
		for sent-acked >= relayWindow*relayChunk || n == 0 && acked < sent {
			if err := ack(); err != nil {
				return err
			}
		}
		if n == 0 {
			w.WriteHeader(http.StatusCreated)
			return nil
		}
	}
}

// What follows is for the test's side.

// until waits for cond, which is called with at held.
func (r *relay) until(what string, cond func() bool) {
	r.t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), relayGuard)
	defer stop()
	defer context.AfterFunc(ctx, func() {
		r.at.Lock()
		defer r.at.Unlock()
		r.news.Broadcast()
	})()
	r.at.Lock()
	defer r.at.Unlock()
	for !cond() {
		if ctx.Err() != nil {
			r.t.Fatalf("waiting for %s: %d links so far, %d devices, %d sessions", what, r.links, len(r.devices),
				len(r.sessions))
		}
		r.news.Wait()
	}
}

// device waits for one, and gives its name.
func (r *relay) device() (id string) {
	r.t.Helper()
	r.until("a device", func() bool {
		for id = range r.devices {
			return true
		}
		return false
	})
	return id
}

// relayUser is a user's websocket in the test's hands.
type relayUser struct {
	*webSocket
	t    testing.TB
	came chan *peerMessage // closed at the end
}

func (r *relay) user(name string) *relayUser {
	r.t.Helper()
	hc := testHTTPClient(r.t, testConfig(r.t, r.URL), netOptions{})
	url := r.URL + strings.Replace(manage, "{id}", r.device(), 1) + "/connect"
	w, err := dialWebSocket(context.Background(), hc, url, userToken(name))
	must(r.t, err)
	u := &relayUser{w, r.t, make(chan *peerMessage, 1<<16)}
	r.t.Cleanup(func() { u.drop(io.EOF) })
	go func() {
		defer close(u.came)
		for {
			raw, err := u.next(nil)
			if err != nil {
				return
			}
			if m, err := unpackMessage(raw); err == nil {
				u.came <- m
			}
		}
	}()
	return u
}

func (u *relayUser) say(proto uint16, typ string, props map[string]any, body []byte) {
	u.t.Helper()
	must(u.t, u.send(frameBinary, (&peerMessage{proto: proto, typ: typ, props: props, body: body}).packed()))
}

// hear takes messages until cond is true of one, which it gives.
func (u *relayUser) hear(what string, cond func(m *peerMessage) bool) *peerMessage {
	u.t.Helper()
	late := time.NewTimer(relayGuard)
	defer late.Stop()
	for {
		select {
		case m, ok := <-u.came:
			if !ok {
				u.t.Fatalf("waiting for %s: the link has ended", what)
			}
			if cond(m) {
				return m
			}
		case <-late.C:
			u.t.Fatalf("nobody said %s", what)
		}
	}
}

// reply takes the next message of this type.
func (u *relayUser) reply(typ string) *peerMessage {
	u.t.Helper()
	return u.hear("a "+typ, func(m *peerMessage) bool { return m.typ == typ })
}
