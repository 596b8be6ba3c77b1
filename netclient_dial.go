// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// Connections, made for networks as they are: name servers that know one kind of question only,
// IPv6 that leads nowhere, paths that lose large packets without a word, and boxes that want the
// first message of TLS in one packet. (Name servers that know no EDNS(0) are met by the setting in
// go.mod: as with a C library, no question has it.)

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	connectTimeout   = 30 * time.Second
	handshakeTimeout = 30 * time.Second
	// firstHandshake is how long the first try of a handshake may take before another way is tried;
	// with the second it fits into apiTimeout.
	firstHandshake = 15 * time.Second
	headStart      = 300 * time.Millisecond // of IPv6 over IPv4 (RFC 8305, 5, has 250 ms)
	// narrowSegment is the bytes of TCP in a packet that every path can bear: IPv6 asks for 1280
	// bytes (RFC 8200, 5), of which 60 are headers.
	narrowSegment = 1220
	// unackedTimeout ends a connection whose other end has acknowledged nothing for so long.
	unackedTimeout = 2 * time.Minute
	tcpUserTimeout = 18 // TCP_USER_TIMEOUT of linux/tcp.h, in ms

	// maxTicket is the bytes of a session ticket that fit into one packet with the rest of a ClientHello.
	maxTicket   = 700
	maxSessions = 4
)

// smallGroups are the groups of keys that leave the ClientHello at some 300 bytes. With the
// post-quantum ones, which the standard library prefers, it has 1.5 kB, more than a packet.
var smallGroups = []tls.CurveID{tls.X25519, tls.CurveP256, tls.CurveP384, tls.CurveP521}

// tlsSessions are those that a handshake can go on with, which then costs half: one for each server, by its name.
// It is safe for use by several goroutines.
type tlsSessions struct {
	mu   sync.Mutex
	live map[string]*tls.ClientSessionState
}

func (c *tlsSessions) Get(name string) (*tls.ClientSessionState, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.live[name]
	return s, s != nil
}

// Put takes no session that would make the next ClientHello a large one: servers may put a client's
// certificate into the ticket. It is called with nil for one that a handshake has failed with.
func (c *tlsSessions) Put(name string, s *tls.ClientSessionState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.live == nil || len(c.live) >= maxSessions {
		c.live = map[string]*tls.ClientSessionState{}
	}
	delete(c.live, name)
	if s != nil {
		if ticket, _, err := s.ResumptionState(); err == nil && len(ticket) <= maxTicket {
			c.live[name] = s
		}
	}
}

//go:noinline
func (c *tlsSessions) clear() {
	c.mu.Lock()
	c.live = nil
	c.mu.Unlock()
}

// keptState is how a state begins (tls.SessionState) that outlives the process: version and side. Of TLS 1.3,
// because with what is kept of an older one all that is sent under it could be read. Nothing else may come back: of
// a server's side the client would look for a certificate, and not for whether there is one.
const keptState = "\x03\x04\x02"

// export gives those that may be kept, by name, with the ticket in what tls.SessionState.Extra is for.
func (c *tlsSessions) export() map[string][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := map[string][]byte{}
	for name, s := range c.live {
		if text, lasting := lastingSession(s); lasting {
			kept[name] = text
		}
	}
	return kept
}

// lastingSession is a session as it is kept; false: it is not to be, or is nil.
func lastingSession(s *tls.ClientSessionState) (text []byte, lasting bool) {
	ticket, state, err := s.ResumptionState()
	if err != nil || state == nil {
		return nil, false
	}
	state.Extra = [][]byte{ticket}
	text, err = state.Bytes()
	return text, err == nil && strings.HasPrefix(string(text), keptState)
}

// restore puts back what was exported. What is none of that is left out.
func (c *tlsSessions) restore(kept map[string][]byte) {
	for name, text := range kept {
		state, err := tls.ParseSessionState(text)
		if err != nil || len(state.Extra) == 0 || !strings.HasPrefix(string(text), keptState) {
			continue
		}
		if s, err := tls.NewResumptionState(state.Extra[0], state); err == nil {
			c.Put(name, s)
		}
	}
}

// dialer makes connections, and learns from those that come to nothing.
type dialer struct {
	net.Dialer
	tls   *tls.Config
	first time.Duration // see firstHandshake
	lg    *logger

	mu     sync.Mutex
	narrow bool   // take and send small segments only
	avoid  string // address of which a connection came to nothing: the last resort
}

func newDialer(conf *tls.Config, lg *logger) *dialer {
	d := &dialer{tls: conf, first: firstHandshake, lg: lg}
	d.Timeout, d.KeepAlive = connectTimeout, 30*time.Second
	d.Resolver = &net.Resolver{PreferGo: true} // the same in a build with cgo
	d.ControlContext = d.control
	return d
}

var errAvoided = errors.New("there was no answer from there before")

func (d *dialer) control(_ context.Context, _, addr string, c syscall.RawConn) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if addr == d.avoid {
		return errAvoided
	}
	return c.Control(func(fd uintptr) { // what a kernel does not have of these, it does without
		syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(unackedTimeout/time.Millisecond))
		if d.narrow {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, narrowSegment)
		}
	})
}

// narrowDown makes the next connections take small packets.
func (d *dialer) narrowDown() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.narrow = true
}

// learn notes that a connection came to nothing: the next one takes small packets and another
// address than avoid, if there is one.
func (d *dialer) learn(avoid string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.narrow, d.avoid = true, avoid
}

// DialContext is for http.Transport.
func (d *dialer) DialContext(ctx context.Context, _, addr string) (net.Conn, error) {
	conn, err := d.race(ctx, addr)
	if errors.Is(err, errAvoided) { // there is no other
		d.learn("")
		conn, err = d.race(ctx, addr)
	}
	return conn, err
}

// race dials by IPv6 and, a little later or when that has failed, by IPv4. Each looks up addresses of
// its own kind, so that a question that is never answered holds up nobody.
func (d *dialer) race(ctx context.Context, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if _, perr := netip.ParseAddr(host); err != nil || perr == nil {
		return d.Dialer.DialContext(ctx, "tcp", addr)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type dialed struct {
		conn net.Conn
		err  error
	}
	results, running := make(chan dialed, 2), 0
	start := func(network string) {
		running++
		go func() {
			conn, err := d.Dialer.DialContext(ctx, network, addr)
			results <- dialed{conn, err}
		}()
	}
	start("tcp6")
	later, both := time.After(headStart), false
	for err = nil; running > 0; {
		select {
		case r := <-results:
			running--
			if r.err == nil {
				go func() {
					for range running {
						if r := <-results; r.err == nil {
							r.conn.Close()
						}
					}
				}()
				return r.conn, nil
			}
			err = moreTelling(err, r.err)
		case <-later:
		}
		if !both {
			both = true
			start("tcp4")
		}
	}
	return nil, err
}

// moreTelling is the one of two errors to give to a person: that there is no address of one kind
// says nothing.
func moreTelling(a, b error) error {
	rank := func(err error) int {
		var dns *net.DNSError
		var none *net.AddrError
		switch {
		case err == nil:
			return 0
		case errors.Is(err, errAvoided):
			return 4
		case errors.As(err, &dns) && !dns.IsNotFound:
			return 2
		case errors.As(err, &dns), errors.As(err, &none):
			return 1
		}
		return 3
	}
	if rank(b) >= rank(a) {
		return b
	}
	return a
}

// DialTLSContext is for http.Transport, without a proxy. A handshake that comes to nothing is tried
// once more, as is one that fails with a session of before.
func (d *dialer) DialTLSContext(ctx context.Context, _, addr string) (net.Conn, error) {
	conn, lost, err := d.shakeHands(ctx, addr, d.first)
	if lost && ctx.Err() == nil {
		d.lg.debugf("%v: trying another way", err)
		conn, _, err = d.shakeHands(ctx, addr, handshakeTimeout)
	}
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// shakeHands connects and makes a connection of TLS of that; lost: there was none to talk to.
func (d *dialer) shakeHands(ctx context.Context, addr string, limit time.Duration) (
	conn *tls.Conn, lost bool, err error) {
	raw, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, false, err
	}
	conf := d.tls.Clone()
	conf.ServerName, _, _ = net.SplitHostPort(addr)
	session, resumes := conf.ClientSessionCache.Get(conf.ServerName)
	if _, lasting := lastingSession(session); lasting { // saves to list what is for TLS 1.2: 28 bytes
		conf.MinVersion = tls.VersionTLS13
	}
	conn = tls.Client(raw, conf)
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err = conn.HandshakeContext(limited); err == nil {
		return conn, false, nil
	}
	raw.Close()
	if limited.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("TLS handshake with %q: no answer in %s", addr, limit)
		lost = true
	}
	for _, gone := range []error{syscall.ECONNRESET, syscall.EPIPE, syscall.ETIMEDOUT, io.EOF, io.ErrUnexpectedEOF} {
		lost = lost || errors.Is(err, gone)
	}
	if lost {
		d.learn(raw.RemoteAddr().String())
	}
	if resumes {
		conf.ClientSessionCache.Put(conf.ServerName, nil)
	}
	return nil, lost || resumes, err
}
