// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// portUser is the user of a session: it keeps what the handler sends, in its order.
type portUser struct {
	t     *testing.T
	p     *portForward
	end   func(error)
	mu    sync.Mutex
	more  *sync.Cond
	got   []*peerMessage
	open  atomic.Int32 // sockets
	gone  bool
	limit *time.Timer
}

// countedConn says when it was closed.
type countedConn struct {
	net.Conn
	once sync.Once
	open *atomic.Int32
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.open.Add(-1) })
	return c.Conn.Close()
}

// halfConn has nothing to be read.
type halfConn struct{ net.Conn }

func (halfConn) Read([]byte) (int, error) { return 0, io.EOF }

func newPortUser(t *testing.T, o *forwardOptions) *portUser {
	t.Helper()
	u := &portUser{t: t}
	u.more = sync.NewCond(&u.mu)
	dial := o.dial
	if dial == nil {
		dial = newDialer(nil, nil).Dialer.DialContext
	}
	own := *o
	own.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		u.open.Add(1)
		return &countedConn{Conn: conn, open: &u.open}, nil
	}
	if err := own.check(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	u.end = cancel
	u.p = newPortForward(&peerSession{id: "s", user: "u", ctx: ctx, send: u.take}, &own).(*portForward)
	u.limit = time.AfterFunc(20*time.Second, func() { // a test that waits for what does not come fails
		u.mu.Lock()
		u.gone = true
		u.mu.Unlock()
		u.more.Broadcast()
	})
	t.Cleanup(u.close)
	return u
}

func (u *portUser) take(m *peerMessage) error {
	if m.proto != protoForward {
		u.t.Errorf("sent a message of protocol %d", m.proto)
	}
	m.body = bytes.Clone(m.body)
	u.mu.Lock()
	u.got = append(u.got, m)
	u.mu.Unlock()
	u.more.Broadcast()
	return nil
}

// close ends the session and sees that nothing is left of it.
func (u *portUser) close() {
	u.limit.Stop()
	why := errors.New("end of the session")
	u.end(why)
	u.p.close(why)
	if n := u.open.Load(); n != 0 {
		u.t.Errorf("%d sockets are open after the end", n)
	}
	if len(u.p.conns) != 0 || u.p.held != 0 {
		u.t.Errorf("%d connections and %d bytes are left", len(u.p.conns), u.p.held)
	}
}

func (u *portUser) send(typ, id string, body []byte) {
	u.p.receive(&peerMessage{proto: protoForward, typ: typ, sid: "s", body: body,
		props: map[string]any{"connection_id": id, "user_id": "u"}})
}

// conn is the handler's side of a connection.
func (u *portUser) conn(id string) *forwardConn {
	u.p.mu.Lock()
	defer u.p.mu.Unlock()
	return u.p.conns[id]
}

// untilClosed waits until the kernel has heard that the other side takes no more: a reset that was sent need not have
// come. That is TCP_CLOSE (7) in the first byte of struct tcp_info.
func untilClosed(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	for state := 0; err == nil && state&0xff != 7; runtime.Gosched() {
		if cerr := raw.Control(func(fd uintptr) {
			state, err = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
		}); err == nil {
			err = cerr
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// dial asks for a connection to a HOST:PORT.
func (u *portUser) dial(id, network, addr string) {
	u.t.Helper()
	host, port, err := net.SplitHostPort(addr)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil {
		u.t.Fatal(err, perr)
	}
	u.send("new", id, packMap("remote_host", host, "remote_port", uint16(n), "protocol", network))
}

// next takes the next message for a connection, and fails if that is not of the type. Data and acknowledgements have no
// order among each other.
func (u *portUser) next(id, typ string) *peerMessage {
	u.t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	for {
		for i, m := range u.got {
			switch {
			case m.props["connection_id"] != id:
			case m.typ == typ:
				u.got = slices.Delete(u.got, i, i+1)
				return m
			case typ+m.typ != "forwardack" && typ+m.typ != "ackforward":
				body, _ := unpackMap(m.body)
				u.t.Fatalf("%s: got %s %v, want %s", id, m.typ, body, typ)
			}
		}
		if u.gone {
			u.t.Fatalf("%s: got nothing, want %s", id, typ)
		}
		u.more.Wait()
	}
}

// fails takes an error with a code about a message of a type.
func (u *portUser) fails(id, typ string, code int64) string {
	u.t.Helper()
	body, err := unpackMap(u.next(id, "error").body)
	text, _ := body["err"].(string)
	if err != nil || body["code"] != code || body["msgtype"] != typ || text == "" {
		u.t.Fatalf("%s: got %v, %v, want code %d about %q", id, body, err, code, typ)
	}
	return text
}

// none sees that nothing has come for a connection.
func (u *portUser) none(id string) {
	u.t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, m := range u.got {
		if m.props["connection_id"] == id {
			u.t.Fatalf("%s: got %s %q, want nothing yet", id, m.typ, m.body)
		}
	}
}

// rest takes what comes for a connection until its end, and gives the types.
func (u *portUser) rest(id string) (types string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for !u.gone {
		for i, m := range u.got {
			if m.props["connection_id"] == id {
				u.got = slices.Delete(u.got, i, i+1)
				if types += m.typ + " "; m.typ == "stop" {
					return types
				}
				break
			}
		}
		if !slices.ContainsFunc(u.got, func(m *peerMessage) bool { return m.props["connection_id"] == id }) {
			u.more.Wait()
		}
	}
	return types + "and no stop"
}

// read takes data of so many bytes, and acknowledges it.
func (u *portUser) read(id string, n int) (data []byte) {
	u.t.Helper()
	for len(data) < n {
		m := u.next(id, "forward")
		if len(m.body) > 4096 {
			u.t.Fatalf("%s: got %d bytes in a message", id, len(m.body))
		}
		data = append(data, m.body...)
		u.send("ack", id, nil)
	}
	return data
}

// echo has data come back.
func (u *portUser) echo(id string, data []byte) {
	u.t.Helper()
	u.send("forward", id, data)
	u.next(id, "ack")
	if back := u.read(id, len(data)); !bytes.Equal(back, data) {
		u.t.Fatalf("%s: got %q back, want %q", id, back, data)
	}
}

// tcpServer serves each connection, and ends with the test.
func tcpServer(t *testing.T, addr string, serve func(c *net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skip(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	return l.Addr().String()
}

func tcpEcho(c *net.TCPConn) { io.Copy(c, c) }

// udpEcho answers each datagram with itself, and one that asks for a size with as many bytes.
func udpEcho(t *testing.T, addr string) string {
	t.Helper()
	c, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Skip(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	go func() {
		defer close(done)
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if size, err := strconv.Atoi(string(b[:n])); err == nil {
				n = size
			}
			c.WriteTo(b[:n], from)
		}
	}()
	return c.LocalAddr().String()
}

func TestPortForwardEcho(t *testing.T) {
	t.Parallel()
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run("tcp "+addr, func(t *testing.T) {
			if strings.HasPrefix(addr, "[") { // at the address of localhost that is tried first is nobody
				addr = strings.Replace(deadAddr(t), "127.0.0.1", "[::1]", 1)
			}
			addr := tcpServer(t, addr, tcpEcho)
			_, port, _ := net.SplitHostPort(addr)
			u := newPortUser(t, &forwardOptions{})
			for i, to := range []string{addr, "localhost:" + port} {
				id := strconv.Itoa(i)
				u.dial(id, "tcp", to)
				u.next(id, "new")
				u.echo(id, []byte("hello"))
				u.echo(id, bytes.Repeat([]byte("0123456789abcdef"), 256))
				u.echo(id, bytes.Repeat([]byte("\x00\xff\r\n"), 4000)) // of a peer that sends more at once
				u.send("stop", id, nil)
				u.next(id, "stop")
				u.send("forward", id, []byte("late"))
				if text := u.fails(id, "forward", 404); text != "unknown connection" {
					t.Errorf("got %q", text)
				}
			}
			if text := u.p.summary(); !strings.Contains(text, strconv.Quote("localhost:"+port)) ||
				!strings.Contains(text, "2 connections, 40202 bytes to them, 40202 from them") {
				t.Errorf("summary: %s", text)
			}
		})
		t.Run("udp "+addr, func(t *testing.T) {
			u := newPortUser(t, &forwardOptions{})
			u.dial("1", "udp", udpEcho(t, addr))
			u.next("1", "new")
			u.echo("1", []byte("hello"))
			u.echo("1", bytes.Repeat([]byte("x"), 4096))
			u.send("forward", "1", nil) // a datagram too
			u.next("1", "ack")
			if m := u.next("1", "forward"); len(m.body) != 0 {
				t.Errorf("got %q for an empty datagram", m.body)
			}
			u.send("ack", "1", nil)
			u.send("forward", "1", []byte("4097")) // is too large for a message
			u.next("1", "ack")
			u.echo("1", []byte("after it"))
		})
	}
}

func TestPortForwardMany(t *testing.T) {
	t.Parallel()
	addr, closes := tcpServer(t, "127.0.0.1:0", tcpEcho), tcpServer(t, "127.0.0.1:0", func(c *net.TCPConn) { c.Close() })
	u := newPortUser(t, &forwardOptions{})
	var wg sync.WaitGroup
	for i := range maxForwards {
		id := fmt.Sprint("many ", i)
		u.dial(id, "tcp", addr) // and then all at once
		wg.Go(func() {
			u.next(id, "new")
			for n := range 5 {
				u.echo(id, []byte(fmt.Sprint("this is ", n, " for ", id)))
			}
		})
	}
	wg.Wait()
	u.dial("many 7", "tcp", addr)
	u.fails("many 7", "new", 409) // and it goes on
	u.echo("many 7", []byte("hello"))
	u.dial("one more", "tcp", addr)
	u.fails("one more", "new", 429)
	u.next("one more", "stop")
	u.send("stop", "many 7", nil)
	u.next("many 7", "stop")
	for i := range 100 { // a place is free again after each end
		id := fmt.Sprint("short ", i)
		u.dial(id, "tcp", closes)
		u.next(id, "new")
		u.next(id, "stop")
	}
}

// TestPortForwardSlow: a socket that takes nothing, and a user who takes nothing.
func TestPortForwardSlow(t *testing.T) {
	t.Parallel()
	pipes := make(chan net.Conn, 3) // in which nothing is ever on its way
	dial := func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe()
		pipes <- far
		return near, nil
	}
	start := func(u *portUser, id string) net.Conn {
		u.dial(id, "tcp", "127.0.0.1:1")
		u.next(id, "new")
		return <-pipes
	}
	half := func(c net.Conn, n int) string {
		b := make([]byte, n)
		io.ReadFull(c, b)
		return string(b)
	}
	t.Run("user", func(t *testing.T) {
		u := newPortUser(t, &forwardOptions{dial: dial})
		slow, quick := start(u, "slow"), start(u, "quick")
		u.send("ack", "slow", nil) // of nothing, so it counts for nothing
		slow.Write(make([]byte, 4096))
		u.next("slow", "forward")
		wrote := make(chan int)
		go func() {
			n, _ := slow.Write(make([]byte, 4096))
			wrote <- n
		}()
		for range 50 {
			go quick.Write([]byte("x"))
			u.read("quick", 1)
			u.none("slow")
		}
		select {
		case <-wrote:
			t.Fatal("was read before the user had what came before")
		default:
		}
		u.send("ack", "slow", nil)
		u.send("ack", "slow", nil) // one too many
		if n := <-wrote; n != 4096 {
			t.Errorf("wrote %d bytes", n)
		}
		u.next("slow", "forward")
		go slow.Write([]byte("y"))
		go quick.Write([]byte("x"))
		u.read("quick", 1)
		u.none("slow")
	})
	t.Run("socket", func(t *testing.T) {
		u := newPortUser(t, &forwardOptions{dial: dial})
		slow, quick := start(u, "slow"), start(u, "quick")
		for i := range 10 {
			u.send("forward", "slow", []byte{'0' + byte(i)})
		}
		for range 50 {
			u.send("forward", "quick", []byte("xy"))
			if got := half(quick, 2); got != "xy" {
				t.Fatalf("got %q", got)
			}
			u.next("quick", "ack")
			u.none("slow")
		}
		if got := half(slow, 10); got != "0123456789" {
			t.Fatalf("got %q", got)
		}
		for range 10 {
			u.next("slow", "ack")
		}
		u.none("slow")
	})
	for _, size := range []int{0, 1, 4096, 100000, maxForwardHeld + 1} {
		t.Run(fmt.Sprintf("flood of %d", size), func(t *testing.T) {
			u := newPortUser(t, &forwardOptions{dial: dial})
			start(u, "flood")
			c := u.conn("flood")
			for i := 0; c.ctx.Err() == nil; i++ {
				u.send("forward", "flood", make([]byte, size))
				u.p.mu.Lock()
				if u.p.held > maxForwardHeld || i > maxForwardQueue+1 {
					t.Fatalf("%d bytes are held after %d messages", u.p.held, i+1)
				}
				u.p.mu.Unlock()
			}
			u.fails("flood", "forward", 413)
			u.next("flood", "stop")
		})
	}
}

// TestPortForwardDial: data that comes before there is a connection, and connections that do not come about.
func TestPortForwardDial(t *testing.T) {
	t.Parallel()
	addr := tcpServer(t, "127.0.0.1:0", tcpEcho)
	t.Run("data before", func(t *testing.T) {
		let := make(chan struct{})
		u := newPortUser(t, &forwardOptions{dial: func(ctx context.Context, n, a string) (net.Conn, error) {
			<-let
			return (&net.Dialer{}).DialContext(ctx, n, a)
		}})
		u.dial("1", "tcp", addr)
		for i := range 10 {
			u.send("forward", "1", []byte{'0' + byte(i)})
		}
		u.none("1")
		close(let)
		u.next("1", "new")
		if got := u.read("1", 10); string(got) != "0123456789" {
			t.Errorf("got %q", got)
		}
		for range 10 {
			u.next("1", "ack")
		}
	})
	t.Run("black hole", func(t *testing.T) {
		hole := blackHole(t)
		u := newPortUser(t, &forwardOptions{})
		for i := range 3 {
			u.dial(fmt.Sprint("hole ", i), "tcp", hole)
			u.send("forward", fmt.Sprint("hole ", i), []byte("hello"))
		}
		u.dial("quiet", "tcp", hole)
		u.dial("1", "tcp", addr)
		u.next("1", "new")
		for range 20 {
			u.echo("1", []byte("hello"))
		}
		u.send("stop", "quiet", nil) // with nothing to be sent before
		u.next("quiet", "stop")
		u.send("error", "hole 0", nil)
		u.none("hole 0") // what was sent has some time
		u.close()
		u.next("hole 1", "stop")
	})
	t.Run("refused", func(t *testing.T) {
		addr := deadAddr(t)
		u := newPortUser(t, &forwardOptions{})
		u.dial("1", "tcp", addr)
		u.send("forward", "1", []byte("hello"))
		if text := u.fails("1", "new", 502); !strings.Contains(text, "connection refused") {
			t.Errorf("got %q", text)
		}
		u.next("1", "stop")
		u.dial("2", "udp", addr) // may be there later
		u.next("2", "new")
		for range 3 {
			u.send("forward", "2", []byte("hello"))
			u.next("2", "ack")
		}
		c, err := net.ListenPacket("udp", addr)
		if err != nil {
			t.Skip(err)
		}
		defer c.Close()
		u.send("forward", "2", []byte("hello"))
		u.next("2", "ack")
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		b := make([]byte, 9)
		n, from, _ := c.ReadFrom(b)
		c.WriteTo(b[:n], from)
		if got := u.read("2", 5); string(got) != "hello" {
			t.Errorf("got %q", got)
		}
	})
}

// blackHole is an address that answers no request for a connection: its queue of them is full.
func blackHole(t *testing.T) string {
	fd, at := boundSocket(t)
	must(t, syscall.Listen(fd, 0))
	for range 4 {
		c, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Close(c) })
		if err := syscall.Connect(c, at); err != nil && err != syscall.EINPROGRESS {
			t.Fatal(err)
		}
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(at.Port))
}

func TestPortForwardAllowed(t *testing.T) {
	t.Parallel()
	o := &forwardOptions{allow: []string{
		"router.lan:80", "10.0.0.1:*", "[::ffff:10.0.0.2]:22", "[fe80::1%eth0]:1", "0.0.0.0:5"}}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ host, port, want string }{
		{"127.0.0.1", "22", "127.0.0.1:22"},
		{"::1", "22", "[::1]:22"},
		{"0:0:0:0:0:0:0:1", "22", "[::1]:22"},
		{"::ffff:127.0.0.1", "22", "127.0.0.1:22"},
		{"LocalHost", "22", "127.0.0.1:22 [::1]:22"},
		{"localhost.", "22", ""},
		{"127.0.0.2", "22", ""},
		{"127.1", "22", ""},
		{"0x7f.0.0.1", "22", ""},
		{"127.0.0.01", "22", ""},
		{"0.0.0.0", "22", ""},
		{"0.0.0.0", "5", "0.0.0.0:5"},
		{"::", "22", ""},
		{"::1%lo", "22", ""},
		{"router.lan", "80", "router.lan:80"},
		{"Router.LAN", "80", "Router.LAN:80"},
		{"router.lan", "81", ""},
		{"router.lan", "*", ""},
		{"router.lan.", "80", ""},
		{"xrouter.lan", "80", ""},
		{"10.0.0.1", "80", "10.0.0.1:80"},
		{"::ffff:10.0.0.1", "80", "10.0.0.1:80"},
		{"10.0.0.2", "22", "10.0.0.2:22"},
		{"10.0.0.2", "23", ""},
		{"fe80::1%eth0", "1", "[fe80::1%eth0]:1"},
		{"fe80::1%eth1", "1", ""},
		{"fe80::1", "1", ""},
		{"example.org", "443", ""},
		{"*", "80", ""},
	} {
		if got := strings.Join(o.addrs(c.host, c.port), " "); got != c.want {
			t.Errorf("%s port %s: got %q, want %q", c.host, c.port, got, c.want)
		}
	}
	for _, bad := range []string{"", "router.lan", ":80", "*:80", "*:*", "router.lan:", "router.lan:0", "router.lan:65536",
		"router.lan:ssh", "router.lan:+1", "router.lan:080", "::1:80", "[::1]", "a:b:1", "host:-1"} {
		if err := (&forwardOptions{allow: []string{bad}}).check(); exitCode(err) != exitRefused {
			t.Errorf("%q: got %v, want a refusal", bad, err)
		}
	}
	o = &forwardOptions{allow: []string{"router.lan:80"}}
	o.dial = func(_ context.Context, _, a string) (net.Conn, error) { return nil, errors.New("dialled " + a) }
	u := newPortUser(t, o)
	u.dial("1", "tcp", "192.0.2.1:22")
	if text := u.fails("1", "new", 403); !strings.Contains(text, `"192.0.2.1:22"`) {
		t.Errorf("got %q", text)
	}
	u.next("1", "stop")
	u.dial("2", "udp", "router.lan:80")
	if text := u.fails("2", "new", 502); text != "dialled router.lan:80" {
		t.Errorf("got %q", text)
	}
	u.next("2", "stop")
	for i := range 20 {
		u.dial(strconv.Itoa(i), "tcp", fmt.Sprintf("192.0.2.1:%d", i+1))
	}
	want := `refused tcp "192.0.2.1:22", udp "router.lan:80", refused tcp "192.0.2.1:1"`
	if text := u.p.summary(); !strings.Contains(text, want) || len(text) > 400 {
		t.Errorf("summary: %s", text)
	}
}

// TestPortForwardEnds: who ends a connection, and what was on its way then.
func TestPortForwardEnds(t *testing.T) {
	t.Parallel()
	result := make(chan string, 1)
	readAll := func(c *net.TCPConn) {
		b, err := io.ReadAll(c)
		result <- fmt.Sprint(string(b), " ", err)
	}
	held := func(let chan struct{}) *forwardOptions {
		return &forwardOptions{dial: func(ctx context.Context, n, a string) (net.Conn, error) {
			<-let
			return (&net.Dialer{}).DialContext(ctx, n, a)
		}}
	}
	t.Run("the socket, with data on its way to the user", func(t *testing.T) {
		addr := tcpServer(t, "127.0.0.1:0", func(c *net.TCPConn) { c.Write(make([]byte, 10000)) })
		u := newPortUser(t, &forwardOptions{})
		u.dial("1", "tcp", addr)
		u.next("1", "new")
		u.read("1", 10000)
		u.next("1", "stop")
		u.send("stop", "1", nil)
		u.fails("1", "stop", 404)
		u.send("error", "1", nil)
		u.none("1")
	})
	t.Run("half of the socket, before it has taken anything", func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		o := &forwardOptions{}
		let := make(chan struct{})
		o.dial = func(context.Context, string, string) (net.Conn, error) {
			<-let
			return halfConn{near}, nil
		}
		u := newPortUser(t, o)
		u.dial("1", "tcp", "127.0.0.1:1")
		c := u.conn("1")
		u.send("forward", "1", []byte("abc"))
		close(let)
		for last := false; !last; runtime.Gosched() {
			u.p.mu.Lock()
			last = c.last
			u.p.mu.Unlock()
		}
		b := make([]byte, 3)
		if _, err := io.ReadFull(far, b); err != nil || string(b) != "abc" {
			t.Errorf("got %q, %v", b, err)
		}
		if got := u.rest("1"); got != "new ack stop " {
			t.Errorf("got %s", got)
		}
	})
	t.Run("half of the socket, with data on its way to it", func(t *testing.T) {
		addr := tcpServer(t, "127.0.0.1:0", func(c *net.TCPConn) {
			c.CloseWrite()
			readAll(c)
		})
		let := make(chan struct{})
		u := newPortUser(t, held(let))
		u.dial("1", "tcp", addr)
		for range 3 {
			u.send("forward", "1", []byte("abc"))
		}
		close(let)
		u.next("1", "new")
		if got := <-result; got != "abcabcabc <nil>" {
			t.Errorf("got %q", got)
		}
		for range 3 {
			u.next("1", "ack")
		}
		u.next("1", "stop")
	})
	t.Run("the user, with data on its way to the socket", func(t *testing.T) {
		let := make(chan struct{})
		u := newPortUser(t, held(let))
		u.dial("1", "tcp", tcpServer(t, "127.0.0.1:0", readAll))
		u.send("forward", "1", []byte("abc"))
		u.send("forward", "1", []byte("def"))
		u.send("stop", "1", nil)
		u.send("stop", "1", nil)
		u.send("forward", "1", []byte("late"))
		u.fails("1", "forward", 404)
		close(let)
		u.next("1", "new")
		if got := <-result; got != "abcdef <nil>" {
			t.Errorf("got %q", got)
		}
		u.next("1", "ack")
		u.next("1", "ack")
		u.next("1", "stop")
		u.none("1")
	})
	t.Run("the user, while the socket has more", func(t *testing.T) {
		addr := tcpServer(t, "127.0.0.1:0", func(c *net.TCPConn) {
			for b := make([]byte, 4096); ; {
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		})
		u := newPortUser(t, &forwardOptions{})
		u.dial("1", "tcp", addr)
		u.next("1", "new")
		u.read("1", 4096)
		u.send("stop", "1", nil)
		u.rest("1")
		u.none("1")
	})
	t.Run("a socket that takes no more, but has said why", func(t *testing.T) {
		addr := tcpServer(t, "127.0.0.1:0", func(c *net.TCPConn) {
			c.Read(make([]byte, 1))
			c.Write(bytes.Repeat([]byte("too large "), 1000))
			c.Close() // with data unread: a reset
		})
		let := make(chan struct{})
		u := newPortUser(t, held(let))
		u.dial("1", "tcp", addr)
		u.send("forward", "1", []byte("abc"))
		close(let)
		u.next("1", "new")
		u.next("1", "ack")
		u.next("1", "forward")
		untilClosed(t, u.conn("1").conn.(*countedConn).Conn.(*net.TCPConn))
		u.send("forward", "1", []byte("def"))
		u.send("ack", "1", nil)
		u.read("1", 10000-4096)
		if got := u.rest("1"); got != "stop " {
			t.Errorf("got %s", got)
		}
	})
	t.Run("a socket that takes nothing, at the end of the session", func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		o := &forwardOptions{}
		o.dial = func(context.Context, string, string) (net.Conn, error) { return near, nil }
		u := newPortUser(t, o)
		u.dial("1", "tcp", "127.0.0.1:1")
		u.next("1", "new")
		u.send("forward", "1", []byte("abc"))
		u.send("stop", "1", nil)
		u.close()
		u.next("1", "stop")
	})
	t.Run("nobody: time", func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		o := &forwardOptions{idle: 10 * time.Millisecond}
		o.dial = func(context.Context, string, string) (net.Conn, error) { return near, nil }
		u := newPortUser(t, o)
		u.dial("1", "tcp", "127.0.0.1:1")
		u.next("1", "new")
		u.next("1", "stop")
	})
}

// TestPortForwardOdd gives messages of every kind, with values of every kind where they have some, and none may bring
// down the program or be answered without an end.
func TestPortForwardOdd(t *testing.T) {
	t.Parallel()
	values := []any{nil, "", "1", "127.0.0.1", "tcp", "udp", strings.Repeat("x", 300), true, -1, 0, 1, int64(22),
		uint64(1 << 63), 1.5, []byte("1"), []any{"1"}, map[string]any{"a": 1}, time.Unix(0, 0)}
	types := []string{"", "new", "forward", "ack", "stop", "error", "resize", "\x00"}
	u := newPortUser(t, &forwardOptions{dial: func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe()
		if rand.IntN(2) == 0 {
			return nil, errors.New("no")
		}
		go io.CopyN(far, far, 5)
		time.AfterFunc(time.Millisecond, func() { far.Close() })
		return near, nil
	}})
	rnd := rand.New(rand.NewPCG(1, 2))
	any1 := func() any { return values[rnd.IntN(len(values))] }
	for range 5000 {
		m := &peerMessage{proto: protoForward, typ: types[rnd.IntN(len(types))], sid: "s"}
		switch rnd.IntN(4) {
		case 0:
		case 1:
			m.props = map[string]any{"connection_id": any1()}
		default:
			m.props = map[string]any{"connection_id": "1", "user_id": any1()}
		}
		switch rnd.IntN(4) {
		case 0:
			m.body = appendPacked(nil, any1())
		case 1:
			m.body = []byte{0x81, 0xc1}
		default:
			m.body = packMap("remote_host", any1(), "remote_port", any1(), "protocol", any1())
		}
		u.p.receive(m)
	}
	u.close()
	counts := map[string]int{}
	for _, m := range u.got {
		counts[m.typ]++
	}
	if counts["error"] == 0 || counts["stop"] == 0 || len(u.got) > 3*5000 {
		t.Errorf("got %v", counts)
	}
}

// TestPortForwardLeaves ends many sessions in the middle of everything: no goroutine and no socket stays. It runs
// alone, as it looks at all goroutines.
func TestPortForwardLeaves(t *testing.T) {
	addr := tcpServer(t, "127.0.0.1:0", tcpEcho)
	for i := range 50 {
		u := newPortUser(t, &forwardOptions{})
		for n := range 8 {
			id := strconv.Itoa(n)
			u.dial(id, []string{"tcp", "udp"}[n%2], addr)
			u.send("forward", id, []byte("hello"))
			if i%3 == 0 {
				u.next(id, "new")
			}
			if i%3 == 1 {
				u.send("stop", id, nil)
			}
		}
		u.close() // which sees to the sockets
	}
	stacks := make([]byte, 1<<20)
	for range 1000 { // one that has said that it is done may have an instruction to go
		n := runtime.Stack(stacks, true)
		if !bytes.Contains(stacks[:n], []byte("(*portForward)")) {
			return
		}
		runtime.Gosched()
	}
	t.Errorf("goroutines are left:\n%s", stacks[:runtime.Stack(stacks, true)])
}
