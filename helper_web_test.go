// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Web servers as they are in the field, each behind a relay that counts what goes over the line.

// webServer is one kind of them. Those that take no socket of a file have their own dial.
type webServer struct {
	name  string
	parts bool // it serves single ranges
	keeps bool // what it has served once
	start func(t *testing.T, dir string) (dial func() (net.Conn, error))
	put   func(t *testing.T, s *webSite, name string, body []byte) // nil: a file in dir
	link  func(s *webSite, name string) string                     // nil: the plain URL
}

// webSite is a running one.
type webSite struct {
	*webServer
	URL string
	dir string

	mu       sync.Mutex
	conns    int
	requests []string // "GET /path HTTP/1.1 Range: bytes=…"
	sent     *int64   // bytes from the server, headers and all, over connections made since it was counted
}

var webServers = []webServer{
	{name: "nginx", parts: true, start: startNginx(`root DIR;`)},
	{name: "nginx, cache", parts: true, keeps: true, start: startNginx(`location / {
		proxy_pass http://unix:DIR/web.origin:; proxy_cache c; proxy_cache_valid 1m; proxy_cache_key $request_uri; }`)},
	{name: "nginx, cache in slices", parts: true, keeps: true, start: startNginx(`location / { slice 64k;
		proxy_pass http://unix:DIR/web.origin:; proxy_set_header Range $slice_range; proxy_http_version 1.1;
		proxy_cache c; proxy_cache_valid 200 206 1m; proxy_cache_key $request_uri$slice_range; }`)},
	{name: "nginx, ranges dropped", start: startNginx(`max_ranges 0; location / {
		proxy_pass http://unix:DIR/web.origin:; proxy_set_header Range ""; }`)},
	{name: "lighttpd", parts: true, start: startLighttpd},
	{name: "busybox httpd", parts: true, start: startBusybox},
	{name: "python http.server", start: startPython},
	{name: "versitygw", parts: true, start: startS3, put: putS3, link: linkS3},
}

// eachWebServer runs f with every server that there is, and a site of its own.
func eachWebServer(t *testing.T, f func(t *testing.T, s *webSite)) {
	for _, kind := range webServers {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			f(t, newWebSite(t, &kind))
		})
	}
}

func newWebSite(t *testing.T, kind *webServer) *webSite {
	t.Helper()
	s := &webSite{webServer: kind, dir: fastDir(t), sent: new(int64)}
	dial := kind.start(t, s.dir)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s.URL = "http://" + l.Addr().String()
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			all.Go(func() { s.relay(c, dial) })
		}
	})
	return s
}

// relay is one connection.
func (s *webSite) relay(client net.Conn, dial func() (net.Conn, error)) {
	defer client.Close()
	server, err := dial()
	if err != nil {
		return
	}
	s.mu.Lock()
	s.conns++
	sent := s.sent // one that its client has left goes on for a moment
	s.mu.Unlock()
	go func() {
		defer server.Close()
		io.Copy(server, io.TeeReader(client, &requestLines{s: s}))
	}()
	buf := make([]byte, 32<<10)
	for {
		n, err := server.Read(buf)
		s.mu.Lock()
		*sent += int64(n)
		s.mu.Unlock()
		if _, werr := client.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// requestLines notes what is asked for, of all that a client sends.
type requestLines struct {
	s    *webSite
	rest []byte
}

func (l *requestLines) Write(p []byte) (int, error) {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.rest = append(l.rest, p...)
	for {
		line, rest, whole := bytes.Cut(l.rest, []byte("\r\n"))
		if !whole {
			return len(p), nil
		}
		l.rest = rest
		switch text := string(line); {
		case strings.HasPrefix(text, "GET "):
			l.s.requests = append(l.s.requests, text)
		case strings.HasPrefix(text, "Range:"):
			l.s.requests[len(l.s.requests)-1] += " " + text
		}
	}
}

// add puts a file on the server and gives its URL.
func (s *webSite) add(t *testing.T, name string, body []byte) string {
	t.Helper()
	if s.put != nil {
		s.put(t, s, name, body)
	} else { // as an upload does it
		writeFile(t, filepath.Join(s.dir, "new"), string(body))
		must(t, os.Rename(filepath.Join(s.dir, "new"), filepath.Join(s.dir, name)))
	}
	if s.link != nil {
		return s.link(s, name)
	}
	return s.URL + "/" + name
}

// counted gives what has gone over the line since the last time, and begins to count anew.
func (s *webSite) counted() (requests []string, conns int, sent int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	requests, conns, sent = s.requests, s.conns, *s.sent
	s.requests, s.conns, s.sent = nil, 0, new(int64)
	return
}

// serve starts a server that ends with the test, and gives what it says, for those who read it.
func serve(t *testing.T, name string, args ...string) io.Reader {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath("out/" + name); err != nil {
			t.Skipf("no %s (make packages s3)", name)
		}
	}
	cmd := exec.Command(path, args...)
	r, w, err := os.Pipe()
	must(t, err)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = w, w
	ended, err := startTied(cmd)
	must(t, err)
	w.Close()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		r.Close()
		if t.Failed() {
			t.Logf("%s said: %s", name, &out)
		}
	})
	return io.TeeReader(r, &out)
}

// dialFile connects to a socket in the file system once it is there.
func dialFile(t *testing.T, path string) func() (net.Conn, error) {
	return func() (c net.Conn, err error) {
		for t.Context().Err() == nil {
			if c, err = net.Dial("unix", path); err == nil {
				return c, nil
			}
			sleepContext(t.Context(), 5*time.Millisecond)
		}
		return nil, err
	}
}

// startNginx has the files at one socket and what a proxy makes of them at another. As one process, it ends at once.
func startNginx(server string) func(t *testing.T, dir string) func() (net.Conn, error) {
	return func(t *testing.T, dir string) func() (net.Conn, error) {
		writeFile(t, filepath.Join(dir, "nginx.conf"), strings.ReplaceAll(`daemon off; master_process off; pid DIR/pid;
			error_log stderr; events {} http { access_log off; client_body_temp_path DIR/1; proxy_temp_path DIR/2;
			fastcgi_temp_path DIR/3; uwsgi_temp_path DIR/4; scgi_temp_path DIR/5;
			proxy_cache_path DIR/cache keys_zone=c:1m; types {} default_type application/octet-stream;
			server { listen unix:DIR/web.origin; root DIR; }
			server { listen unix:DIR/web.sock; `+server+` } }`, "DIR", dir))
		go io.Copy(io.Discard, serve(t, "nginx", "-e", "stderr", "-c", filepath.Join(dir, "nginx.conf")))
		return dialFile(t, filepath.Join(dir, "web.sock"))
	}
}

func startLighttpd(t *testing.T, dir string) func() (net.Conn, error) {
	writeFile(t, filepath.Join(dir, "conf"), fmt.Sprintf(`server.document-root = %q
		server.bind = %q
		server.stat-cache-engine = "disable"
		mimetype.assign = ("" => "application/octet-stream")`, dir, dir+"/web.sock"))
	go io.Copy(io.Discard, serve(t, "lighttpd", "-D", "-f", filepath.Join(dir, "conf")))
	return dialFile(t, filepath.Join(dir, "web.sock"))
}

// startBusybox has inetd's part: a process for each connection.
func startBusybox(t *testing.T, dir string) func() (net.Conn, error) {
	if out, err := exec.Command("busybox", "--list").Output(); err != nil || !bytes.Contains(out, []byte("httpd\n")) {
		t.Skip("no busybox with httpd (make packages)")
	}
	return func() (net.Conn, error) {
		pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
		defer ours.Close()
		defer theirs.Close()
		cmd := exec.Command("busybox", "httpd", "-i", "-h", dir)
		cmd.Stdin, cmd.Stdout = theirs, theirs
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		go cmd.Wait()
		return net.FileConn(ours)
	}
}

func startPython(t *testing.T, dir string) func() (net.Conn, error) {
	out := serve(t, "python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", dir, "0")
	line, err := bufio.NewReader(out).ReadString('\n')
	port := regexp.MustCompile(`port (\d+)`).FindStringSubmatch(line)
	if err != nil || port == nil {
		t.Fatalf("http.server: got %q, %v, want the port", line, err)
	}
	go io.Copy(io.Discard, out)
	return func() (net.Conn, error) { return net.Dial("tcp", "127.0.0.1:"+port[1]) }
}

const keyS3, secretS3 = "device", "a secret of the bucket's owner"

func startS3(t *testing.T, dir string) func() (net.Conn, error) {
	must(t, os.MkdirAll(filepath.Join(dir, "store", "bucket"), 0o755))
	must(t, os.Mkdir(filepath.Join(dir, "meta"), 0o755))
	go io.Copy(io.Discard, serve(t, "versitygw", "--access", keyS3, "--secret", secretS3, "--quiet", "--port",
		filepath.Join(dir, "web.sock"), "posix", "--sidecar", filepath.Join(dir, "meta"), filepath.Join(dir, "store")))
	return dialFile(t, filepath.Join(dir, "web.sock"))
}

func linkS3(s *webSite, name string) string {
	return presignedS3(http.MethodGet, s.URL+"/bucket/"+name, time.Now())
}

func putS3(t *testing.T, s *webSite, name string, body []byte) {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut,
		presignedS3(http.MethodPut, s.URL+"/bucket/"+name, time.Now()), bytes.NewReader(body))
	must(t, err)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != 200 {
		t.Fatalf("PUT: got status %d, %s, %v", resp.StatusCode, text, err)
	}
}

// presignedS3 signs a request with no header but Host, for five minutes from at on, by AWS Signature Version 4 in the
// query. The path must need no escapes.
func presignedS3(method, link string, at time.Time) string {
	u, err := url.Parse(link)
	if err != nil {
		panic(err)
	}
	now := at.UTC().Format("20060102T150405Z")
	scope := now[:8] + "/us-east-1/s3/aws4_request"
	query := url.Values{"X-Amz-Algorithm": {"AWS4-HMAC-SHA256"}, "X-Amz-Credential": {keyS3 + "/" + scope},
		"X-Amz-Date": {now}, "X-Amz-Expires": {"300"}, "X-Amz-SignedHeaders": {"host"}}.Encode()
	request := fmt.Sprintf("%s\n%s\n%s\nhost:%s\n\nhost\nUNSIGNED-PAYLOAD", method, u.Path, query, u.Host)
	sum := sha256.Sum256([]byte(request))
	mac := []byte("AWS4" + secretS3)
	for _, part := range append(strings.Split(scope, "/"),
		fmt.Sprintf("AWS4-HMAC-SHA256\n%s\n%s\n%x", now, scope, sum)) {
		h := hmac.New(sha256.New, mac)
		io.WriteString(h, part)
		mac = h.Sum(nil)
	}
	u.RawQuery = query + "&X-Amz-Signature=" + hex.EncodeToString(mac)
	return u.String()
}
