// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nodbus

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The service by which Mender's add-ons get the device's token, and as much of the bus's own protocol as it takes
// (D-Bus Specification 0.43, "Authentication Protocol", "Message Protocol", "Message Bus Messages").

const (
	authName      = "io.mender.AuthenticationManager" // on the bus, and with slashes the object
	authPath      = "/io/mender/AuthenticationManager"
	authInterface = "io.mender.Authentication1"

	busInterface = "org.freedesktop.DBus"

	busPatience    = 30 * time.Second // for what the bus itself answers or takes
	maxBusFields   = 64 << 10         // bytes of a message's header
	maxBusBody     = 128 << 20        // bytes of a whole message, by the rules
	maxBusBodyKept = 4 << 10          // bytes of a body that are looked at; none of our methods takes arguments
)

func busVerbs() []verb {
	return []verb{{"auth-daemon", "", "give the device's token to other programs over D-Bus", 0, keyFlags,
		func(ctx context.Context, a *app, _ []string) error { return authDaemon(ctx, a) }}}
}

// Kinds of messages.
const (
	busCall = 1 + iota
	busReturn
	busError
	busSignal
)

// busNoReply is the flag of a call that wants no answer.
const busNoReply = 1

// Codes of header fields.
const (
	busPath = 1 + iota
	busIface
	busMember
	busErrorName
	busReplySerial
	busDestination
	busSender
	busSignature
	busFields // how many there are, and 0
)

// busTypes are the types of the fields.
const busTypes = " osssussg"

// busMessage is a message without what it takes to put it on the wire.
type busMessage struct {
	kind, flags byte
	serial      uint32            // of its sender
	replyTo     uint32            // serial of the call that it answers
	fields      [busFields]string // but for busReplySerial
	order       binary.ByteOrder  // of a message that came in
	body        []byte            // of one that came in no more than maxBusBodyKept
}

// padTo8 fills b to a multiple of 8 bytes.
//
//go:noinline
func padTo8(b []byte) []byte { return append(b, make([]byte, -len(b)&7)...) }

//go:noinline
func appendBusNumber(b []byte, n uint32) []byte { return binary.LittleEndian.AppendUint32(b, n) }

// appendBusString appends a string to b, whose start is at a multiple of 4 bytes in the message.
//
//go:noinline
func appendBusString(b []byte, s string) []byte {
	b = append(b, make([]byte, -len(b)&3)...)
	return append(append(appendBusNumber(b, uint32(len(s))), s...), 0)
}

// encode gives the message's bytes, little endian.
func (m *busMessage) encode(serial uint32) []byte {
	b := appendBusNumber([]byte{'l', m.kind, m.flags, 1}, uint32(len(m.body)))
	b = appendBusNumber(appendBusNumber(b, serial), 0)
	for code, v := range m.fields {
		if v == "" && (code != busReplySerial || m.replyTo == 0) {
			continue
		}
		b = append(padTo8(b), byte(code), 1, busTypes[code], 0)
		switch busTypes[code] {
		case 'u':
			b = appendBusNumber(b, m.replyTo)
		case 'g':
			b = append(append(append(b, byte(len(v))), v...), 0)
		default:
			b = appendBusString(b, v)
		}
	}
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-16))
	return append(padTo8(b), m.body...)
}

// busText takes values out of b, one after the other, in which alignment counts from the start.
type busText struct {
	order binary.ByteOrder
	b     []byte
	off   int
	bad   bool // it ended too early, or is not as it must be
}

// take gives the next n bytes from a multiple of align on; nil if there are no more that many.
func (t *busText) take(align, n int) []byte {
	t.off = (t.off + align - 1) / align * align
	if t.bad = t.bad || n < 0 || n > len(t.b)-t.off; t.bad {
		return nil
	}
	t.off += n
	return t.b[t.off-n : t.off]
}

//go:noinline
func (t *busText) number() uint32 {
	if p := t.take(4, 4); p != nil {
		return t.order.Uint32(p)
	}
	return 0
}

// text gives n bytes and takes the NUL behind them.
func (t *busText) text(n int) string {
	s := t.take(1, n)
	if end := t.take(1, 1); end != nil && end[0] != 0 {
		t.bad = true
	}
	return string(s)
}

func (t *busText) string() string { return t.text(int(min(t.number(), maxBusBody))) }

func (t *busText) signature() string {
	if n := t.take(1, 1); n != nil {
		return t.text(int(n[0]))
	}
	return ""
}

// readBusMessage reads the next message, in either byte order. One whose fields are not understood has kind 0;
// an error is one after which nothing can be read any more.
func readBusMessage(r io.Reader) (*busMessage, error) {
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	m := &busMessage{kind: head[1], flags: head[2]}
	switch head[0] {
	case 'l':
		m.order = binary.LittleEndian
	case 'B':
		m.order = binary.BigEndian
	}
	if m.order == nil || head[3] != 1 {
		return nil, fmt.Errorf("got a message that begins with % x, want l or B, and version 1", head[:4])
	}
	size, fields := m.order.Uint32(head[4:]), m.order.Uint32(head[12:])
	if m.serial = m.order.Uint32(head[8:]); fields > maxBusFields || size > maxBusBody {
		return nil, fmt.Errorf("got a message with %d bytes of header and %d of body, want %d and %d at most", fields, size,
			maxBusFields, maxBusBody)
	}
	text := make([]byte, (fields+7)&^7)
	if _, err := io.ReadFull(r, text); err != nil {
		return nil, noEOF(err)
	}
	m.body = make([]byte, min(size, maxBusBodyKept))
	if _, err := io.ReadFull(r, m.body); err != nil {
		return nil, noEOF(err)
	}
	if _, err := io.CopyN(io.Discard, r, int64(size)-int64(len(m.body))); err != nil {
		return nil, noEOF(err)
	}
	if !m.parse(text[:fields]) {
		m.kind = 0
	}
	return m, nil
}

// parse takes the fields, of which those that are not known are to be ignored.
func (m *busMessage) parse(fields []byte) bool {
	t := &busText{order: m.order, b: fields}
	for t.off < len(fields) && !t.bad {
		p := t.take(8, 1)
		if p == nil {
			break
		}
		code, kind := int(p[0]), t.signature()
		var text string
		var number uint32
		switch kind {
		case "s", "o":
			text = t.string()
		case "g":
			text = t.signature()
		case "u":
			number = t.number()
		default:
			return false
		}
		if code >= busFields || code == 0 {
			continue
		}
		if kind[0] != busTypes[code] {
			return false
		}
		if m.fields[code] = text; kind == "u" {
			m.replyTo = number
		}
	}
	return !t.bad
}

// failure is what a message of kind busError says.
func (m *busMessage) failure() error {
	t := &busText{order: m.order, b: m.body}
	err := fmt.Errorf("%s: %s", quote(m.fields[busErrorName]), quote(t.string()))
	if m.fields[busErrorName] == busInterface+".Error.AccessDenied" {
		return withHint(err, "the bus lets nobody have the name %s: put packaging/%[1]s.conf into /usr/share/dbus-1/system.d",
			authName)
	}
	return err
}

// busConn is a connection to a bus. Several goroutines may send.
type busConn struct {
	net.Conn
	r *bufio.Reader

	mu     sync.Mutex
	serial uint32 // of the last message
}

// send gives the message a serial and sends it. What the bus does not take in time ends the connection, as half a
// message may be on its way.
func (c *busConn) send(m *busMessage) (serial uint32, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.serial++
	c.SetWriteDeadline(time.Now().Add(busPatience))
	if _, err = c.Write(m.encode(c.serial)); err != nil {
		c.Close()
	}
	return c.serial, err
}

// call asks the bus itself and waits for its answer; what else comes meanwhile is not for us.
func (c *busConn) call(member, signature string, body []byte) (*busText, error) {
	m := &busMessage{kind: busCall, body: body, fields: [busFields]string{busPath: "/org/freedesktop/DBus",
		busIface: busInterface, busMember: member, busDestination: busInterface, busSignature: signature}}
	serial, err := c.send(m)
	if err != nil {
		return nil, err
	}
	c.SetReadDeadline(time.Now().Add(busPatience))
	defer c.SetReadDeadline(time.Time{})
	for {
		m, err := readBusMessage(c.r)
		switch {
		case err != nil:
			return nil, noEOF(err)
		case m.replyTo != serial:
		case m.kind == busError:
			return nil, m.failure()
		case m.kind == busReturn:
			return &busText{order: m.order, b: m.body}, nil
		}
	}
}

// busSockets are the sockets that an address of the bus names, as net.Dial takes them ("Server Addresses").
func busSockets(address string) (sockets []string) {
	for _, one := range strings.Split(address, ";") {
		rest, ok := strings.CutPrefix(one, "unix:")
		for _, pair := range strings.Split(rest, ",") {
			key, value, _ := strings.Cut(pair, "=")
			path, err := url.PathUnescape(value)
			switch {
			case !ok || err != nil || path == "":
			case key == "path":
				sockets = append(sockets, path)
			case key == "abstract":
				sockets = append(sockets, "@"+path)
			}
		}
	}
	return sockets
}

// dialBus connects to the system bus and makes itself known by the user id that the kernel tells of the socket.
func dialBus(ctx context.Context, m *machine) (*busConn, error) {
	address := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")
	if address == "" || m.root != "" {
		const name = "run/dbus/system_bus_socket"
		address = "unix:path=" + m.path("/"+name) + ";unix:path=" + m.path("/var/"+name)
	}
	err := fmt.Errorf("bus address %q: want unix:path=… or unix:abstract=…", address)
	for _, name := range busSockets(address) {
		var conn net.Conn
		if conn, err = (&net.Dialer{Timeout: busPatience}).DialContext(ctx, "unix", name); err != nil {
			continue
		}
		c := &busConn{Conn: conn, r: bufio.NewReader(conn)}
		if err := c.introduce(); err != nil {
			c.Close()
			return nil, fmt.Errorf("%q: %w", name, err)
		}
		return c, nil
	}
	return nil, err
}

// introduce is the authentication: the mechanism EXTERNAL, with the user id in hexadecimal digits of its decimal ones.
func (c *busConn) introduce() error {
	c.SetDeadline(time.Now().Add(busPatience))
	uid := hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid())))
	if _, err := io.WriteString(c, "\x00AUTH EXTERNAL "+uid+"\r\n"); err != nil {
		return err
	}
	line, err := c.r.ReadSlice('\n')
	if err == nil && !bytes.HasPrefix(line, []byte("OK ")) {
		err = fmt.Errorf("got %q to AUTH EXTERNAL, want OK", clip(line))
	}
	if err == nil {
		_, err = io.WriteString(c, "BEGIN\r\n")
	}
	c.SetDeadline(time.Time{})
	return noEOF(err)
}

// authService has the token, and tells it to whom the bus's policy lets ask.
type authService struct {
	a    *app // for login alone, once it runs
	pass []byte
	ask  chan struct{} // wakes keepToken; has room for one

	mu    sync.Mutex
	conn  *busConn // on which it has the name; or nil
	up    upstream
	local string // address that others get for the server's; "": that itself
	busy  bool   // a login is under way or asked for
}

// authDaemon has the name on the bus, and asks the server for tokens, until ctx ends. A bus that is not there, or
// goes, is waited for.
func authDaemon(ctx context.Context, a *app) (err error) {
	if len(a.c.Servers) == 0 {
		return newSession(a).ready() // it says so
	}
	if a.rec, err = a.peek(); err != nil {
		return err
	}
	s := &authService{a: a, ask: make(chan struct{}, 1)}
	if a.o.passphrase == "-" { // it is there to be read once
		if s.pass, err = readBounded(a.in, 4096); err != nil {
			return fmt.Errorf("passphrase: %w", err)
		}
	}
	ctx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	if l, local, err := listenLocally(); err == nil {
		s.local = local
		go forward(ctx, l, s.upstream, a.lg)
	} else {
		a.lg.warnf("programs get the server's own address, and have to know its certificate: %v", err)
	}
	go func() {
		s.keepToken(ctx)
		close(done)
	}()
	defer func() {
		stop()
		<-done
	}()
	said, wait := "", time.Second
	for {
		served, err := s.serve(ctx)
		if served {
			said, wait = "", time.Second
		}
		if ctx.Err() != nil {
			return nil
		}
		if text := err.Error(); text != said {
			said = text
			a.lg.fail(withHint(fmt.Errorf("bus: %w", err), "%s", hintOf(err)))
		}
		if a.m.sleep(ctx, wait) != nil {
			return nil
		}
		wait = min(2*wait, 30*time.Second)
	}
}

// serve connects to the bus, takes the name, and answers until the bus goes. served: it had the name.
func (s *authService) serve(ctx context.Context) (served bool, err error) {
	c, err := dialBus(ctx, s.a.m)
	if err != nil {
		return false, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if _, err := c.call("Hello", "", nil); err != nil {
		return false, err
	}
	const doNotQueue, owner, already = 4, 1, 4
	r, err := c.call("RequestName", "su", appendBusNumber(
		append(appendBusString(nil, authName), make([]byte, -(len(authName)+1)&3)...), doNotQueue))
	if err != nil {
		return false, err
	}
	if got := r.number(); got != owner && got != already {
		return false, withHint(fmt.Errorf("name %q: got %d, want %d, owner", authName, got, owner),
			"another program has it, such as Mender's own client: stop that")
	}
	s.a.lg.infof("%s is on the bus", authName)
	s.attach(c)
	defer s.attach(nil)
	for {
		m, err := readBusMessage(c.r)
		if err == nil && m.kind == busCall {
			err = s.answer(c, m)
		}
		if err != nil {
			return true, fmt.Errorf("connection lost: %w", noEOF(err))
		}
	}
}

// attach makes c the connection for signals. Who was there before us knows by one that there is a token.
func (s *authService) attach(c *busConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn = c; s.up.token != "" {
		s.announce()
	}
}

// announce sends the signal. s.mu is held.
func (s *authService) announce() {
	if s.conn == nil {
		return
	}
	_, err := s.conn.send(&busMessage{kind: busSignal, flags: busNoReply, body: s.pair(), fields: [busFields]string{
		busPath: authPath, busIface: authInterface, busMember: "JwtTokenStateChange", busSignature: "ss"}})
	if err != nil {
		s.a.lg.warnf("bus: %v", err)
	}
}

// upstream is what forward asks for.
func (s *authService) upstream() upstream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.up
}

// pair is the body of what tells token and server. s.mu is held. The bus ends a connection that sends what is not
// UTF-8.
func (s *authService) pair() []byte {
	base := s.up.base
	if base != "" && s.local != "" {
		base = s.local
	}
	return appendBusString(appendBusString(nil, s.up.token), strings.ToValidUTF8(base, "?"))
}

const introspection = `<node><interface name="` + authInterface + `">` +
	`<method name="GetJwtToken"><arg type="s" name="token" direction="out"/>` +
	`<arg type="s" name="server_url" direction="out"/></method>` +
	`<method name="FetchJwtToken"><arg type="b" name="success" direction="out"/></method>` +
	`<signal name="JwtTokenStateChange"><arg type="s" name="token"/><arg type="s" name="server_url"/></signal>` +
	`</interface></node>`

// answer answers a call. FetchJwtToken is answered first, so that its caller can wait for the signal.
func (s *authService) answer(c *busConn, m *busMessage) (err error) {
	re := &busMessage{kind: busReturn, flags: busNoReply, replyTo: m.serial}
	re.fields[busDestination] = m.fields[busSender]
	text := func(s string) { re.fields[busSignature], re.body = "s", appendBusString(nil, s) }
	what := m.fields[busMember]
	if i := m.fields[busIface]; i != "" { // it may be left out
		what = strings.TrimPrefix(i, busInterface+".") + "." + what
	}
	if m.fields[busPath] != authPath && !strings.HasPrefix(what, "Peer.") {
		what = "." + what
	}
	switch what {
	case "GetJwtToken", authInterface + ".GetJwtToken":
		s.mu.Lock()
		re.fields[busSignature], re.body = "ss", s.pair()
		s.mu.Unlock()
	case "FetchJwtToken", authInterface + ".FetchJwtToken":
		re.fields[busSignature], re.body = "b", []byte{1, 0, 0, 0}
		defer s.wake()
	case "Ping", "Peer.Ping":
	case "GetMachineId", "Peer.GetMachineId":
		text(s.machineID())
	case "Introspect", "Introspectable.Introspect":
		text(introspection)
	case "GetAll", "Properties.GetAll": // of which there are none: an empty array of what is aligned to 8
		re.fields[busSignature], re.body = "a{sv}", make([]byte, 8)
	default:
		re.kind, re.fields[busErrorName] = busError, busInterface+".Error.UnknownMethod"
		text("no method " + quote(m.fields[busMember]) + " at " + quote(m.fields[busPath]))
	}
	if m.flags&busNoReply == 0 {
		_, err = c.send(re)
	}
	return err
}

// machineID is that of machine-id(5), where the bus has it, too; "" for none.
func (s *authService) machineID() string {
	id, _ := s.a.m.read("/etc/machine-id")
	if id == nil {
		id, _ = s.a.m.read("/var/lib/dbus/machine-id")
	}
	return strings.ToValidUTF8(strings.TrimSpace(string(id)), "?")
}

// wake asks for a login, unless one is under way: its outcome is told to all.
func (s *authService) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.busy {
		s.busy = true
		select {
		case s.ask <- struct{}{}:
		default:
		}
	}
}

// keepToken logs in when it is asked to, at first, again after failures, and before a token ends.
func (s *authService) keepToken(ctx context.Context) {
	var wait time.Duration
	var ends time.Time // of the token's life, monotonic
	for failures := 0; ; {
		asked := false
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			return
		case <-s.ask:
			asked = true
		case <-timer.C:
		}
		timer.Stop()
		up, err := s.login(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			failures = 0
			life := tokenLife(up.token, time.Now())
			wait, ends = life/4*3, time.Now().Add(life)
		} else {
			s.a.lg.fail(err)
			failures++
			if wait = retryAfterOf(err); wait == 0 {
				wait = backoff(failures, seconds(s.a.c.RetryPollIntervalSeconds))
			}
			// A token that is good still outlives an outage while nobody asks for another.
			if !asked && httpStatus(err) != http.StatusUnauthorized && time.Until(ends) > 0 {
				continue
			}
		}
		s.mu.Lock()
		s.up, s.busy = up, false
		s.announce()
		s.mu.Unlock()
	}
}

// login gets a token with the key as it is now, as others may have made a new one.
func (s *authService) login(ctx context.Context) (up upstream, err error) {
	if rec, err := s.a.peek(); err == nil {
		s.a.rec = rec
	}
	if s.pass != nil {
		s.a.in = bytes.NewReader(s.pass)
	}
	n := newSession(s.a)
	if err := n.ready(); err != nil {
		return up, err
	}
	defer n.hc.CloseIdleConnections()
	if err := n.api.authenticate(ctx); err != nil {
		return up, err
	}
	return upstream{n.api.base, n.api.token, n.hc}, nil
}
