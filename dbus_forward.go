// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nodbus

package main

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The address that other programs get for the server's: a port of the loopback interface, behind which is the server
// over this program's own transport. They know nothing of ServerCertificate, of the client's certificate and of
// proxies, as with Mender's own clients (app/proxy of 3.x, http_forwarder of 5.x).

const (
	forwardPatience = time.Minute // for a request, and for the head of its answer
	forwardMost     = 64          // connections at a time: who holds them all keeps others out, and takes no more memory
)

// upstream is where requests go, and the token that lets them through: the port is open to everybody on this
// machine, and the server, which may know the device by its certificate, is not.
type upstream struct {
	base, token string // "": there is none
	hc          *agent
}

// listenLocally gives a socket and its address. Package net would have it, and much more, for 3 kB of the program.
func listenLocally() (*os.File, string, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, "", err
	}
	l := os.NewFile(uintptr(fd), "listener")
	name := syscall.Sockaddr(&syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	if err = syscall.Bind(fd, name); err == nil {
		err = syscall.Listen(fd, 16)
	}
	if err == nil {
		name, err = syscall.Getsockname(fd)
	}
	in, ok := name.(*syscall.SockaddrInet4)
	if err != nil || !ok {
		l.Close()
		return nil, "", fmt.Errorf("socket: %w", err)
	}
	return l, "http://127.0.0.1:" + strconv.Itoa(in.Port), nil
}

// acceptLocal waits for a connection.
func acceptLocal(l *os.File) (conn *os.File, err error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, err2 := 0, error(nil)
	err = raw.Read(func(l uintptr) bool {
		fd, _, err2 = syscall.Accept4(int(l), syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
		return err2 != syscall.EAGAIN
	})
	if err = cmp.Or(err, err2); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "connection"), nil
}

// forward passes on what comes to l, one request for each connection, until ctx ends. It closes l.
func forward(ctx context.Context, l *os.File, to func() upstream, lg *logger) {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	room := make(chan struct{}, forwardMost)
	for {
		room <- struct{}{}
		conn, err := acceptLocal(l)
		if err == nil {
			go func() {
				defer func() { <-room }()
				ctx, stop := context.WithCancel(ctx)
				defer stop()
				context.AfterFunc(ctx, func() { conn.Close() })
				late := time.AfterFunc(forwardPatience, stop)
				if err := pass(ctx, conn, to, late); err != nil {
					lg.debugf("forwarding: %v", err)
				}
			}()
			continue
		}
		if <-room; sleepContext(ctx, time.Second) != nil { // there may be no descriptor left
			return
		}
	}
}

// pass reads a request and passes it on. An answer that switches protocols (RFC 9110, 7.8; the WebSocket of
// mender-connect) makes a connection of it that both ends may use as they like, and for as long: late is stopped.
func pass(ctx context.Context, conn *os.File, to func() upstream, late *time.Timer) error {
	limited := &io.LimitedReader{R: conn, N: maxHeaderBytes}
	text := textproto.NewReader(bufio.NewReader(limited))
	line, err := text.ReadLine()
	if err != nil {
		return err
	}
	head, err := text.ReadMIMEHeader()
	if err != nil {
		return err
	}
	limited.N = 1 << 62
	resp, status, err := ask(ctx, line, http.Header(head), text.R, to())
	if resp == nil {
		io.WriteString(conn, "HTTP/1.1 "+status+"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		return err
	}
	defer resp.Body.Close()
	late.Stop()
	if back, ok := resp.Body.(io.Writer); ok {
		go func() {
			io.Copy(back, text.R)
			resp.Body.Close()
		}()
	} else {
		resp.Header.Set("Connection", "close")
	}
	w := bufio.NewWriter(conn)
	w.WriteString("HTTP/1.1 " + resp.Status + "\r\n")
	resp.Header.Write(w)
	w.WriteString("\r\n")
	w.Flush()
	_, err = io.Copy(conn, resp.Body)
	return err
}

// ask gives the server's answer, or the status of our own where there is none.
func ask(ctx context.Context, line string, h http.Header, body io.Reader, up upstream) (*http.Response, string, error) {
	words := strings.Fields(line)
	if len(words) != 3 || words[1][0] != '/' || h.Get("Transfer-Encoding") != "" {
		return nil, "400 Bad Request", nil
	}
	if up.token == "" || h.Get("Authorization") != "Bearer "+up.token {
		return nil, "401 Unauthorized", nil
	}
	req, err := http.NewRequestWithContext(ctx, words[0], strings.TrimSuffix(up.base, "/")+words[1], nil)
	if err != nil {
		return nil, "400 Bad Request", err
	}
	req.Header = h
	if req.ContentLength, _ = strconv.ParseInt(h.Get("Content-Length"), 10, 64); req.ContentLength > 0 {
		req.Body = io.NopCloser(io.LimitReader(body, req.ContentLength))
	}
	resp, err := up.hc.RoundTrip(req)
	return resp, "502 Bad Gateway", err
}
