// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nodbus

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// forwarded is a server, which is asked over its forwarder.
type forwarded struct {
	t       *testing.T
	address string // HOST:PORT of the forwarder

	mu sync.Mutex
	up upstream
}

// newForwarded: the server has a certificate that only the forwarder's client knows.
func newForwarded(t *testing.T, h http.HandlerFunc) *forwarded {
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	l, address, err := listenLocally()
	must(t, err)
	c := testConfig(t)
	c.ServerCertificate = writeTemp(t, "server.pem", pemText("CERTIFICATE", server.Certificate().Raw))
	f := &forwarded{t: t, address: strings.TrimPrefix(address, "http://"),
		up: upstream{server.URL + "/prefix/", "token", testHTTPClient(t, c, netOptions{})}}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		forward(ctx, l, func() upstream {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.up
		}, newLogger(io.Discard))
		close(done)
	}()
	t.Cleanup(func() {
		stop()
		<-done
	})
	return f
}

func (f *forwarded) dial() net.Conn {
	f.t.Helper()
	conn, err := net.Dial("tcp", f.address)
	must(f.t, err)
	f.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(busGuard))
	return conn
}

// says sends a request as it is and gives all that comes back.
func (f *forwarded) says(request string) string {
	f.t.Helper()
	conn := f.dial()
	io.WriteString(conn, request)
	got, _ := io.ReadAll(conn)
	return string(got)
}

const bearer = "Authorization: Bearer token\r\n"

func TestForward(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("0123456789abcdef", 1<<16)
	f := newForwarded(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path == "/prefix/big" {
			io.WriteString(w, big) // in chunks
			return
		}
		w.Header().Set("X-Of-Server", "yes")
		w.WriteHeader(http.StatusAccepted)
		fmt.Fprintf(w, "%s %s %s %s %d", r.Method, r.RequestURI, r.Host, r.Header.Get("X-Of-Client"), len(body))
	})
	host := strings.TrimSuffix(strings.TrimPrefix(f.up.base, "https://"), "/prefix/")
	const denied, malformed = "HTTP/1.1 401 Unauthorized\r\n", "HTTP/1.1 400 Bad Request\r\n"
	for _, c := range []struct{ request, head, body string }{
		{"GET /api/x?y=%20z HTTP/1.1\r\nHost: other\r\nX-Of-Client: a\r\n" + bearer + "\r\n",
			"HTTP/1.1 202 Accepted\r\n", "GET /prefix/api/x?y=%20z " + host + " a 0"},
		{"PUT /api HTTP/1.1\r\nContent-Length: 1048576\r\n" + bearer + "\r\n" + big, "HTTP/1.1 202 Accepted\r\n",
			"PUT /prefix/api " + host + "  1048576"},
		{"GET /big HTTP/1.0\r\n" + bearer + "\r\n", "HTTP/1.1 200 OK\r\n", big},
		{"GET /api HTTP/1.1\r\n\r\n", denied, ""},
		{"GET /api HTTP/1.1\r\nAuthorization: Bearer other\r\n\r\n", denied, ""},
		{"GET /api HTTP/1.1\r\nAuthorization: token\r\n\r\n", denied, ""},
		{"GET http://elsewhere/ HTTP/1.1\r\n" + bearer + "\r\n", malformed, ""},
		{"GET @elsewhere/ HTTP/1.1\r\n" + bearer + "\r\n", malformed, ""},
		{"GET /%zz HTTP/1.1\r\n" + bearer + "\r\n", malformed, ""},
		{"G=T / HTTP/1.1\r\n" + bearer + "\r\n", "HTTP/1.1 ", ""},
		{"GET\r\n" + bearer + "\r\n", malformed, ""},
		{"\r\n\r\n", malformed, ""},
		{"PUT /api HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + bearer + "\r\n0\r\n\r\n", malformed, ""},
		{"GET /api HTTP/1.1\r\nX: " + big + "\r\n\r\n", "", ""},
		{"GET /api HTTP/1.1\r\nX\r\n\r\n", "", ""},
	} {
		got := f.says(c.request)
		head, body, _ := strings.Cut(got, "\r\n\r\n")
		if !strings.HasPrefix(got, c.head) || c.head == "" && got != "" || body != c.body ||
			c.body != "" && !strings.Contains(head, "\r\nConnection: close") {
			t.Errorf("%.99q: got %.300q and %d bytes, want %q and %.99q", c.request, got, len(body), c.head, c.body)
		}
	}
	f.mu.Lock()
	f.up.base = "https://127.0.0.1:1"
	f.mu.Unlock()
	if got := f.says("GET / HTTP/1.1\r\n" + bearer + "\r\n"); !strings.HasPrefix(got, "HTTP/1.1 502 ") {
		t.Errorf("without a server: got %q", got)
	}
	f.mu.Lock()
	f.up = upstream{}
	f.mu.Unlock()
	if got := f.says("GET / HTTP/1.1\r\nAuthorization: Bearer \r\n\r\n"); !strings.HasPrefix(got, denied) {
		t.Errorf("without a token: got %q", got)
	}
}

// A connection that has switched to another protocol carries bytes both ways, from the first on, until one end goes.
func TestForwardUpgrade(t *testing.T) {
	t.Parallel()
	gone := make(chan struct{}, 2)
	f := newForwarded(t, func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil || r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Connection") != "Upgrade" {
			t.Errorf("got %v, %v", r.Header, err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		for {
			line, err := rw.ReadString('\n')
			if err != nil || line == "bye\n" {
				gone <- struct{}{}
				return
			}
			io.WriteString(conn, line)
		}
	})
	open := func() (net.Conn, *bufio.Reader) {
		conn := f.dial()
		io.WriteString(conn, "GET /connect HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+bearer+"\r\nearly\n")
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Upgrade") != "websocket" {
			t.Fatalf("got %v, %v", resp, err)
		}
		if line, _ := r.ReadString('\n'); line != "early\n" {
			t.Fatalf("got %q, want what was sent early", line)
		}
		return conn, r
	}
	conn, r := open()
	for n := 1; n <= 1<<20; n <<= 5 {
		text := append(bytes.Repeat([]byte{'x'}, n), '\n')
		go conn.Write(text)
		if got, err := r.ReadBytes('\n'); err != nil || !bytes.Equal(got, text) {
			t.Fatalf("got %d bytes back, %v, want %d", len(got), err, len(text))
		}
	}
	conn.Close()
	<-gone // the server knows it
	conn, r = open()
	io.WriteString(conn, "bye\n")
	<-gone
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("got %v after the server has gone, want the end", err)
	}
}
