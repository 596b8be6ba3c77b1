// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

// Connections that a user of the server makes through this device, by TCP and UDP: to the device itself, and to what
// it was told to let through. In either direction one message of a connection is on its way: what a socket gives is
// read when the one before was acknowledged, and what a user sends is acknowledged when a socket has taken it. So
// whoever reads slowly is waited for by the one who writes, and nothing piles up in between.

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	forwardChunk     = 4096    // bytes in a message at most, as peers expect them
	maxForwards      = 64      // connections in a session
	maxForwardQueue  = 16      // messages for a connection that its socket has not taken; peers send one
	maxForwardHeld   = 1 << 20 // bytes of all these in a session
	maxForwardName   = 255     // bytes of the name of a host, or of a connection
	maxForwardTold   = 8       // destinations in the summary
	forwardIdle      = 10 * time.Minute
	forwardLastWords = 10 * time.Second // for a socket to take what came before the end
)

// forwardOptions say where to connections may be made. They are the same for all sessions.
type forwardOptions struct {
	// allow has what is allowed beside 127.0.0.1, ::1 and localhost: HOST:PORT, or HOST:* for all ports. A name is
	// compared as it stands, without regard to case, and stands for whatever the device resolves it to.
	allow []string
	idle  time.Duration                                                     // without data; 0: forwardIdle
	dial  func(ctx context.Context, network, addr string) (net.Conn, error) // nil: a dialer's
}

// check refuses (exit code 3) what is no destination, and brings the others into one form.
func (o *forwardOptions) check() error {
	for i, a := range o.allow {
		host, port, err := net.SplitHostPort(a)
		n, _ := strconv.ParseUint(port, 10, 16)
		if err != nil || host == "" || host == "*" || port != "*" && (n == 0 || port != strconv.FormatUint(n, 10)) {
			return refuse("port forwarding: got %q as a destination, want HOST:PORT or HOST:*", a)
		}
		o.allow[i] = net.JoinHostPort(oneAddress(host), port)
	}
	return nil
}

// oneAddress is the one form of an address, and a name as it stands.
func oneAddress(host string) string {
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Unmap().String()
	}
	return host
}

// addrs are the addresses to try for what was asked for; none: it is not allowed. localhost is no question for a name
// server, and a recovery system may have no file that answers it.
func (o *forwardOptions) addrs(host, port string) []string {
	host = oneAddress(host)
	addr := net.JoinHostPort(host, port)
	switch {
	case strings.EqualFold(host, "localhost"):
		return []string{"127.0.0.1:" + port, "[::1]:" + port}
	case host == "127.0.0.1", host == "::1", slices.ContainsFunc(o.allow, func(a string) bool {
		return strings.EqualFold(a, addr) || strings.EqualFold(a, net.JoinHostPort(host, "*"))
	}):
		return []string{addr}
	}
	return nil
}

// portForward is the port forwarding of one session.
type portForward struct {
	s  *peerSession
	o  *forwardOptions
	wg sync.WaitGroup // one for each of conns

	mu                     sync.Mutex              // over what follows, in connections too
	conns                  map[string]*forwardConn // by the names that the user gives them
	held                   int                     // see maxForwardHeld
	told                   []string                // destinations
	opened, sent, received int64                   // connections, bytes to sockets and from them
}

// forwardConn is a connection, from the request for it on.
type forwardConn struct {
	id, network string
	addrs       []string // to try
	ctx         context.Context
	end         context.CancelCauseFunc
	acked       chan struct{} // what was on its way to the user has arrived

	in     chan []byte // from the user to the socket; closed: that was all
	last   bool        // it is closed
	asking bool        // something is on its way to the user
	conn   net.Conn    // nil before there is one
	idle   *time.Timer
}

func newPortForward(s *peerSession, o *forwardOptions) peerHandler {
	return &portForward{s: s, o: o, conns: map[string]*forwardConn{}}
}

func (p *portForward) receive(m *peerMessage) {
	id, _ := field(m.props, "connection_id").(string)
	if err := p.handle(id, m); err != nil {
		p.fail(m.typ, id, err)
		if m.typ == "new" && err.code != 409 {
			p.send("stop", id, nil)
		}
	}
}

// handle does what a message asks for, or says why not.
func (p *portForward) handle(id string, m *peerMessage) *peerError {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.conns[id]
	switch {
	case id == "" || len(id) > maxForwardName:
		return peerErrorf(400, "want a connection_id")
	case m.typ == "new":
		return p.open(id, m.body)
	case m.typ == "error" && c == nil: // is never answered by one
	case c == nil || m.typ == "forward" && c.last:
		return peerErrorf(404, "unknown connection")
	case m.typ == "forward":
		if len(c.in) == cap(c.in) || p.held+len(m.body) > maxForwardHeld {
			p.stop(c, peerErrorf(413, "more was sent than was acknowledged"))
			return nil
		}
		p.held += len(m.body)
		c.in <- bytes.Clone(m.body)
	case m.typ == "ack" && c.asking:
		c.asking = false
		c.acked <- struct{}{}
	case m.typ == "stop" || m.typ == "error":
		p.noMore(c)
	case m.typ != "ack":
		return peerErrorf(400, "unknown type of message: %s", quote(m.typ))
	}
	return nil
}

// open starts a connection. p.mu is held.
func (p *portForward) open(id string, body []byte) *peerError {
	ask, err := unpackMap(body)
	host, _ := field(ask, "remote_host").(string)
	n, _ := field(ask, "remote_port").(int64)
	network, _ := field(ask, "protocol").(string)
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if err != nil || host == "" || len(host) > maxForwardName || n < 1 || n > 65535 ||
		network != "tcp" && network != "udp" {
		return peerErrorf(400, "want remote_host, remote_port, and tcp or udp as protocol")
	}
	port := strconv.FormatInt(n, 10)
	c := &forwardConn{id: id, network: network, addrs: p.o.addrs(host, port), acked: make(chan struct{}, 1),
		in: make(chan []byte, maxForwardQueue)}
	where := network + " " + quote(net.JoinHostPort(host, port))
	switch {
	case p.conns[id] != nil:
		return peerErrorf(409, "there is a connection of this name")
	case len(p.conns) == maxForwards:
		return peerErrorf(429, "the session has as many connections as it may have")
	case c.addrs == nil:
		where = "refused " + where
	}
	if len(p.told) < maxForwardTold && !slices.Contains(p.told, where) {
		p.told = append(p.told, where)
	}
	if c.addrs == nil {
		return peerErrorf(403, "%s: this device does not allow it", where)
	}
	c.ctx, c.end = context.WithCancelCause(p.s.ctx)
	c.idle = time.AfterFunc(time.Hour, func() {
		p.mu.Lock()
		p.stop(c, errors.New("nothing was sent for too long"))
		p.mu.Unlock()
	})
	p.wait(c)
	p.conns[id] = c
	p.opened++
	p.wg.Add(1)
	go p.run(c)
	return nil
}

// wait lets c be without data for some time from now on. p.mu is held.
func (p *portForward) wait(c *forwardConn) {
	d := cmp.Or(p.o.idle, forwardIdle)
	if c.last {
		d = min(d, forwardLastWords)
	}
	c.idle.Reset(d)
}

// noMore lets c end when its socket has what was sent before. p.mu is held.
func (p *portForward) noMore(c *forwardConn) {
	if c.last {
		return
	}
	c.last = true
	close(c.in)
	p.wait(c)
	if c.conn == nil && len(c.in) == 0 {
		p.stop(c, errors.New("stopped by the user"))
	}
}

// stop ends c at once. p.mu is held.
func (p *portForward) stop(c *forwardConn, why error) {
	c.end(why)
	if c.conn != nil {
		c.conn.Close()
	}
}

// run is a connection from its beginning to its end.
func (p *portForward) run(c *forwardConn) {
	defer p.wg.Done()
	typ, err := "new", p.dial(c)
	if err == nil {
		p.send(typ, c.id, nil)
		read := make(chan struct{})
		go func() {
			defer close(read)
			p.toUser(c)
		}()
		typ, err = "forward", p.toSocket(c)
		c.conn.Close()
		<-read
	}
	p.mu.Lock()
	p.noMore(c)
	p.stop(c, err)
	c.idle.Stop()
	for b := range c.in {
		p.held -= len(b)
	}
	delete(p.conns, c.id)
	p.mu.Unlock()
	p.s.lg.debugf("forwarding for %s: end of %s: %v", quote(p.s.user), quote(c.id), err)
	var tell *peerError
	if errors.As(err, &tell) {
		p.fail(typ, c.id, tell)
	}
	p.send("stop", c.id, nil)
}

func (p *portForward) dial(c *forwardConn) (first error) {
	dial := p.o.dial
	if dial == nil {
		dial = newDialer(nil, p.s.lg).Dialer.DialContext // the one around it is for TCP alone
	}
	for _, addr := range c.addrs {
		conn, err := dial(c.ctx, c.network, addr)
		if err == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			c.conn = conn
			return context.Cause(c.ctx)
		}
		first = cmp.Or(first, err)
	}
	return cmp.Or(context.Cause(c.ctx), error(&peerError{502, first}))
}

// toSocket passes on what the user sends, until that was all. What a socket refuses is not acknowledged, and no end
// yet: there may be something left to read from it.
func (p *portForward) toSocket(c *forwardConn) (broken error) {
	for {
		select {
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		case b, more := <-c.in:
			if !more {
				return broken
			}
			if broken == nil {
				_, broken = c.conn.Write(b)
			}
			if c.network == "udp" && broken != nil { // which may be of the datagram before
				c.conn.Write(b)
				broken = nil
			}
			p.mu.Lock()
			p.held -= len(b)
			if broken == nil {
				p.sent += int64(len(b))
				p.wait(c)
			}
			p.mu.Unlock()
			if broken == nil {
				p.send("ack", c.id, nil)
			}
		}
	}
}

// toUser passes on what the socket gives until its end. A datagram is a message; one that is larger than that is lost,
// as in a network of small packets: a part of it would be something else.
func (p *portForward) toUser(c *forwardConn) {
	b := make([]byte, forwardChunk+1)
	if c.network == "tcp" {
		b = b[:forwardChunk]
	}
	for {
		n, err := c.conn.Read(b)
		var refused syscall.Errno // by a host where nobody listens: that may change
		if n > forwardChunk || c.network == "udp" && errors.As(err, &refused) {
			p.s.lg.debugf("forwarding for %s: a datagram of %s is lost: %v", quote(p.s.user), quote(c.id), err)
			continue
		}
		p.mu.Lock()
		if err != nil {
			p.noMore(c) // the protocol knows no half of an end
			p.mu.Unlock()
			return
		}
		c.asking = true
		p.received += int64(n)
		p.wait(c)
		p.mu.Unlock()
		p.send("forward", c.id, b[:n])
		select {
		case <-c.acked:
		case <-c.ctx.Done():
			return
		}
	}
}

// send gives the user a message. That it cannot be sent ends the session, which ends its connections.
func (p *portForward) send(typ, id string, body []byte) {
	p.s.send(&peerMessage{proto: protoForward, typ: typ, props: map[string]any{"connection_id": id}, body: body})
}

// fail tells the user what became of a message of a type.
func (p *portForward) fail(typ, id string, err *peerError) {
	p.send("error", id, packMap("err", err.Error(), "code", err.code, "msgtype", typ))
}

func (p *portForward) close(why error) {
	p.mu.Lock()
	for _, c := range p.conns {
		p.stop(c, why)
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *portForward) summary() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("ports: %s; %d connections, %d bytes to them, %d from them",
		strings.Join(p.told, ", "), p.opened, p.sent, p.received)
}
