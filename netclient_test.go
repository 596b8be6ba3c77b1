// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Field case 16: redirects.
func TestRedirects(t *testing.T) {
	other := newTestServer(t, false)
	other.artifacts["a"] = []byte("bytes")
	var header http.Header
	other.setFault(func(_ string, w http.ResponseWriter, r *http.Request) bool { header = r.Header.Clone(); return false })
	s := newTestServer(t, true)
	s.autoAccept = true
	to := ""
	s.setFault(func(route string, w http.ResponseWriter, r *http.Request) bool {
		if to != "" {
			http.Redirect(w, r, to, http.StatusTemporaryRedirect)
		}
		return to != ""
	})
	c := testConfig(t, s.URL)
	c.SkipVerify = true
	hc := testHTTPClient(t, c, netOptions{})

	to = other.URL + "/x"
	_, err := openDownload(t.Context(), hc, s.link("a"), downloadOptions{})
	if err == nil || !strings.Contains(err.Error(), "from https") || exitCode(err) != exitFailed {
		t.Fatalf("https to http: got %v", err)
	}
	to = s.URL + "/artifacts/a?loop"
	_, err = openDownload(t.Context(), hc, s.link("a"), downloadOptions{})
	if err == nil || !strings.Contains(err.Error(), "redirects") || exitCode(err) != exitFailed {
		t.Fatalf("loop: got %v", err)
	}

	away := newTestServer(t, false)
	away.setFault(func(route string, w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusFound)
		return true
	})
	for _, to = range []string{"file:///etc/passwd", "ftp://h/a", "http:///a", "gopher:a", "javascript:alert(1)"} {
		f := &fastSleep{}
		_, err = openDownload(t.Context(), hc, away.link("a"), downloadOptions{sleep: f.sleep})
		if exitCode(err) != exitFailed || !strings.Contains(err.Error(), "want http or https") || len(f.slept) > 0 {
			t.Errorf("to %q: got %v", to, err)
		}
	}

	plain := newTestServer(t, false)
	plain.setFault(func(route string, w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, other.link("a"), http.StatusTemporaryRedirect)
		return true
	})
	a := apiFor(t, plain)
	err = a.authenticate(t.Context())
	if !isTemporary(err) || !strings.Contains(err.Error(), "another host") ||
		!strings.Contains(hintOf(err), "portal") || header != nil {
		t.Fatalf("auth to another host: got %v, header there %v", err, header)
	}
	// A GET follows, and takes nothing along that is for the first host only.
	req, err := http.NewRequest("GET", "http://user:password@"+plain.Listener.Addr().String()+"/artifacts/a?secret", nil)
	must(t, err)
	req.Header.Set("Authorization", "Bearer x")
	req.Header.Set("Cookie", "a=b")
	resp, err := a.hc.Do(req)
	must(t, err)
	resp.Body.Close()
	for _, h := range []string{"Authorization", "Cookie", "Referer"} {
		if header.Get(h) != "" {
			t.Errorf("the other host got %s: %q", h, header.Get(h))
		}
	}
	if header.Get("User-Agent") != "mendlet/" {
		t.Errorf("got User-Agent %q", header.Get("User-Agent"))
	}
}

// What is asked for behind a redirect (RFC 9110, 15.4).
func TestRedirectMethods(t *testing.T) {
	t.Parallel()
	var got string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if code := r.FormValue("code"); code != "" {
			w.Header().Set("Location", "/there")
			n, _ := strconv.Atoi(code)
			w.WriteHeader(n)
			return
		}
		body, _ := io.ReadAll(r.Body)
		got = r.Method + " " + string(body)
	}))
	t.Cleanup(s.Close)
	hc := testHTTPClient(t, testConfig(t), netOptions{})
	for _, c := range []struct {
		code         int
		method, want string
	}{
		{301, "GET", "GET "}, {302, "HEAD", "HEAD "}, {303, "HEAD", "HEAD "}, {307, "HEAD", "HEAD "},
		{301, "POST", "GET "}, {302, "POST", "GET "}, {303, "PUT", "GET "}, {307, "POST", "POST b"}, {308, "PUT", "PUT b"},
	} {
		var body io.Reader
		if c.method[0] == 'P' {
			body = strings.NewReader("b")
		}
		req, err := http.NewRequest(c.method, fmt.Sprintf("%s/?code=%d", s.URL, c.code), body)
		must(t, err)
		resp, err := hc.Do(req)
		must(t, err)
		resp.Body.Close()
		if got != c.want {
			t.Errorf("%d of a %s: got %q, want %q", c.code, c.method, got, c.want)
		}
	}
}

// What comes before the body is bounded, too.
func TestEndlessHeader(t *testing.T) {
	var sent atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
		for line := []byte("X: " + strings.Repeat("x", 1000) + "\r\n"); sent.Load() < 100<<20; {
			n, err := conn.Write(line)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	}))
	t.Cleanup(s.Close)
	hc := testHTTPClient(t, testConfig(t), netOptions{})
	if _, err := fetch(hc, s.URL); err == nil || !strings.Contains(err.Error(), "headers") {
		t.Errorf("got %v", err)
	}
	s.Close()                         // waits for the handler
	if n := sent.Load(); n > 20<<20 { // what the kernel's buffers take is sent, too
		t.Errorf("%d bytes of header were taken", n)
	}
}

func start(r *http.Request) int {
	var n int
	fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &n)
	return n
}

func fetch(hc *agent, url string) (string, error) {
	resp, err := getURL(hc, url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// Field case 20: clocks in 1970 and 2100, and one that jumps during the run.
func TestTLSClock(t *testing.T) {
	day := func(y int) time.Time { return time.Date(y, 6, 1, 0, 0, 0, 0, time.UTC) }
	ca := newTestCA(t, day(2020), day(2040))
	s := tlsServer(t, ca, &tls.Config{})
	for _, c := range []struct {
		name       string
		now, floor time.Time
		code       int
		warn       bool
	}{
		{"right", day(2026), day(2025), 0, false},
		{"no floor", day(2026), time.Time{}, 0, false},
		{"1970", time.Unix(0, 0), day(2025), 0, true},
		{"1970, certificate newer than the floor", time.Unix(0, 0), day(2019), exitTempFail, true},
		{"2100", day(2100), day(2025), exitTempFail, false},
		{"expired", day(2041), day(2039), exitFailed, false},
		{"not valid yet, by a clock that may be right", day(2019), day(2018), exitTempFail, false},
	} {
		var said []string
		lg := &logger{sinks: []logSink{func(_ logLevel, m string) { said = append(said, m) }}}
		cfg := testConfig(t)
		cfg.ServerCertificate = ca.pem
		hc := testHTTPClient(t, cfg, netOptions{floor: c.floor, now: func() time.Time { return c.now }, lg: lg})
		_, err := fetch(hc, s.URL)
		if exitCode(err) != c.code || (len(said) > 0) != c.warn {
			t.Errorf("%s: got %v (exit code %d), said %q", c.name, err, exitCode(err), said)
		}
		if (hintOf(err) != "") != (c.code != exitOK) {
			t.Errorf("%s: got hint %q", c.name, hintOf(err))
		}
	}
	now := day(2026)
	k := newTLSClock(netOptions{floor: day(2025), now: func() time.Time { return now }})
	now = day(2076)
	if got := k.time(); got.Year() != 2026 {
		t.Errorf("after a jump of 50 years: got %s", got)
	}
	now = time.Unix(0, 0)
	k = newTLSClock(netOptions{floor: day(2025), now: func() time.Time { return now }})
	if now = day(2026); k.time().Year() != 2026 {
		t.Errorf("after the clock was set: got %s", k.time())
	}
}

func TestClockFloor(t *testing.T) {
	build := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	dir := t.TempDir()
	file := func(name string, at time.Time) string {
		p := filepath.Join(dir, name)
		must(t, os.WriteFile(p, nil, 0o600))
		must(t, os.Chtimes(p, at, at))
		return p
	}
	old, newer, wrong := file("old", time.Unix(0, 0)), file("newer", build.AddDate(1, 0, 0)),
		file("wrong", build.AddDate(75, 0, 0))
	if got := clockFloor(build, old, wrong, filepath.Join(dir, "none")); !got.Equal(build) {
		t.Errorf("got %s, want the build's", got)
	}
	if got := clockFloor(build, old, newer); !got.Equal(build.AddDate(1, 0, 0)) {
		t.Errorf("got %s, want the newer file's", got)
	}
}

func TestTLSTrust(t *testing.T) {
	ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	s := tlsServer(t, ca, &tls.Config{})
	for _, c := range []struct {
		name string
		set  func(*config)
		ok   bool
	}{
		{"unknown", func(c *config) {}, false},
		{"ServerCertificate", func(c *config) { c.ServerCertificate = ca.pem }, true},
		{"-E", func(c *config) { c.extraRoots = ca.pem }, true},
		{"SkipVerify", func(c *config) { c.SkipVerify = true }, true},
		{"missing ServerCertificate", func(c *config) { c.ServerCertificate = ca.pem + "x" }, false},
	} {
		cfg := testConfig(t)
		c.set(cfg)
		got, err := fetch(testHTTPClient(t, cfg, netOptions{}), s.URL)
		if (err == nil) != c.ok || !c.ok && hintOf(err) == "" {
			t.Errorf("%s: got %v", c.name, err)
		}
		if c.ok && got != "HTTP/1.1 0" {
			t.Errorf("%s: got %q, want HTTP/1.1", c.name, got)
		}
	}
	cfg := testConfig(t)
	cfg.extraRoots = ca.pem + "x"
	if _, err := newHTTPClient(cfg, netOptions{}); exitCode(err) != exitRefused {
		t.Errorf("missing -E file: got %v", err)
	}
}

// What waiting does not mend is told as that, with what does.
func TestTLSRefusals(t *testing.T) {
	ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	trusted := func(c *config) { c.ServerCertificate = ca.pem }
	server := func(conf *tls.Config) string { return tlsServer(t, ca, conf).URL }
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	mutual := func() *tls.Config {
		return &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, MaxVersion: tls.VersionTLS12}
	}
	dir := t.TempDir()
	file := func(name string, text []byte) string {
		must(t, os.WriteFile(filepath.Join(dir, name), text, 0o600))
		return filepath.Join(dir, name)
	}
	keyed := func(c *config) {
		trusted(c)
		stranger := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)).issue(t, false)
		der, err := x509.MarshalPKCS8PrivateKey(stranger.key)
		must(t, err)
		c.HttpsClient.Certificate = file("client.pem", pemText("CERTIFICATE", stranger.cert.Raw))
		c.HttpsClient.Key = file("client.key", pemText("PRIVATE KEY", der))
	}
	badRoots := func(name string, text []byte) func(*config) {
		return func(c *config) { c.ServerCertificate = file(name, text) }
	}
	for _, c := range []struct {
		name, url string
		set       func(*config)
		hints     string
	}{
		{"issuer not known", server(&tls.Config{}), func(*config) {}, `"test CA" ServerCertificate -E portal`},
		{"ServerCertificate missing", server(&tls.Config{}), func(c *config) { c.ServerCertificate = "/nowhere.pem" },
			"/nowhere.pem could not be used"},
		{"ServerCertificate in DER", server(&tls.Config{}), badRoots("der", ca.cert.Raw), "DER openssl"},
		{"ServerCertificate a key", server(&tls.Config{}), badRoots("key", pemText("PRIVATE KEY", nil)),
			"want a CERTIFICATE"},
		{"ServerCertificate cut off", server(&tls.Config{}), badRoots("cut", pemText("CERTIFICATE", ca.cert.Raw[:99])),
			"x509:"},
		{"ServerCertificate no PEM", server(&tls.Config{}), badRoots("text", []byte("text")), "no PEM certificate"},
		{"another name", strings.Replace(server(&tls.Config{}), "127.0.0.1", "localhost", 1), trusted,
			`"device.test" "127.0.0.1" subjectAltName`},
		{"an old server", server(&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}), trusted,
			"TLS 1.1 or older"},
		{"no encryption in common", server(&tls.Config{MaxVersion: tls.VersionTLS12,
			CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_CBC_SHA}}), trusted, "in common"},
		{"a client certificate is wanted", server(mutual()), trusted, "HttpsClient names"},
		{"another client certificate is wanted", server(mutual()), keyed, "does not take HttpsClient"},
		{"no TLS", strings.Replace(plain.URL, "http:", "https:", 1), trusted, "does not speak TLS"},
	} {
		cfg := testConfig(t)
		c.set(cfg)
		f := &fastSleep{}
		_, err := openDownload(t.Context(), testHTTPClient(t, cfg, netOptions{}), c.url, downloadOptions{sleep: f.sleep})
		if exitCode(err) != exitFailed || !isDistrust(err) || len(f.slept) != 0 {
			t.Errorf("%s: got %v (exit code %d), %d more tries", c.name, err, exitCode(err), len(f.slept))
		}
		for _, word := range strings.Fields(c.hints) {
			if !strings.Contains(hintOf(err), word) {
				t.Errorf("%s: got hint %q, want %q in it", c.name, hintOf(err), word)
			}
		}
		// Behind bytes that have come from there it can only be somebody in between.
		later := downloadOptions{sleep: f.sleep, offset: 1, size: 2}
		_, err = openDownload(t.Context(), testHTTPClient(t, cfg, netOptions{}), c.url, later)
		wantCode(t, err, exitTempFail)
	}
	// A certificate that names nobody but in its subject, as many that were made by hand.
	nameless := *ca.issue(t, false).cert
	if got := certificateNames(&x509.Certificate{Subject: nameless.Subject}); got != "no name" {
		t.Errorf("got %q", got)
	}
}

// Error answers are quoted, in few words.
func TestServerWords(t *testing.T) {
	for body, want := range map[string]string{
		``:                                   "",
		`{"error":"dev auth: unauthorized"}`: "dev auth: unauthorized",
		`{"error":"a","request_id":"b"}`:     "a",
		`{"message":"other"}`:                "",
		"not found\n":                        "not found",
		"<html>\r\n<head><title>400 No required SSL\n certificate was sent</title></head>x": "400 No required SSL " +
			"certificate was sent",
		"<!DOCTYPE html><H1>Not <b>Found</b></H1>": "Not Found",
		`<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message>` +
			`<Key>secret</Key></Error>`: "Request has expired",
		"<<<>>":                      ">",
		"<title>":                    "",
		"\x7fELF\x00\x01":            "",
		"caf\xe9":                    "caf",
		strings.Repeat("word ", 100): strings.Repeat("word ", 32),
	} {
		if got := serverWords([]byte(body)); got != want {
			t.Errorf("%q: got %q, want %q", body, got, want)
		}
	}
	for _, c := range []struct {
		code int
		body string
		exit int
		hint string
	}{
		{400, "<title>400 No required SSL certificate was sent</title>", exitFailed, "HttpsClient"},
		{403, "a certificate is needed", exitFailed, "HttpsClient"},
		{400, "Client sent an HTTP request to an HTTPS server.\n", exitFailed, "https://"},
		{407, "", exitFailed, "http_proxy"},
		{400, "", exitFailed, ""}, {502, "Bad Gateway", exitTempFail, ""},
		{600, "", exitFailed, ""}, {999, "Request denied", exitFailed, ""},
	} {
		f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(c.code)
			io.WriteString(w, c.body)
		})
		_, _, err := f.get(t, downloadOptions{retries: 1})
		words := serverWords([]byte(c.body))
		if exitCode(err) != c.exit || !strings.Contains(err.Error(), words) ||
			!strings.Contains(hintOf(err), c.hint) || (c.hint == "") != (hintOf(err) == "") {
			t.Errorf("%d, %q: got %v (exit code %d), hint %q", c.code, c.body, err, exitCode(err), hintOf(err))
		}
		if want := map[int]int{exitFailed: 1, exitTempFail: 2}[c.exit]; len(f.ranges) != want {
			t.Errorf("%d: got %d requests, want %d", c.code, len(f.ranges), want)
		}
	}
}

// A system without CA certificates, as an initramfs is. The pool is read once per process,
// so it takes another one.
func TestTLSNoRoots(t *testing.T) {
	const marker = "MENDLET_TEST_NO_ROOTS"
	if os.Getenv(marker) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestTLSNoRoots$", "-test.v")
		cmd.Env = append(os.Environ(), marker+"=1", "SSL_CERT_FILE=/nonexistent", "SSL_CERT_DIR=/nonexistent")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	s := tlsServer(t, ca, &tls.Config{})
	cfg := testConfig(t)
	f := &fastSleep{}
	_, err := openDownload(t.Context(), testHTTPClient(t, cfg, netOptions{}), s.URL, downloadOptions{sleep: f.sleep})
	if exitCode(err) != exitFailed || !strings.Contains(hintOf(err), "SSL_CERT_FILE") || len(f.slept) != 0 {
		t.Errorf("got %v, hint %q, %d more tries", err, hintOf(err), len(f.slept))
	}
	cfg.extraRoots = ca.pem
	if _, err := fetch(testHTTPClient(t, cfg, netOptions{}), s.URL); err != nil {
		t.Errorf("with -E: got %v", err)
	}
}

func TestTLSClientCertificate(t *testing.T) {
	ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	s := tlsServer(t, ca, &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool})
	// The server knows the root only, so the chain must be sent.
	sub := ca.issue(t, true)
	leaf := sub.issue(t, false)
	dir := t.TempDir()
	cert, keyFile := filepath.Join(dir, "chain.pem"), filepath.Join(dir, "key.pem")
	must(t, os.WriteFile(cert, append(pemText("CERTIFICATE", leaf.cert.Raw),
		pemText("CERTIFICATE", sub.cert.Raw)...), 0o600))
	der, err := x509.MarshalPKCS8PrivateKey(leaf.key)
	must(t, err)
	must(t, os.WriteFile(keyFile, pemText("PRIVATE KEY", der), 0o600))

	cfg := testConfig(t)
	cfg.ServerCertificate = ca.pem
	if _, err := fetch(testHTTPClient(t, cfg, netOptions{}), s.URL); err == nil {
		t.Error("the server does not ask for a certificate: the test shows nothing")
	}
	cfg.HttpsClient = tlsFiles{Certificate: cert, Key: keyFile}
	if got, err := fetch(testHTTPClient(t, cfg, netOptions{}), s.URL); got != "HTTP/1.1 2" {
		t.Errorf("got %q, %v, want both certificates sent", got, err)
	}
	for _, f := range []tlsFiles{{Certificate: cert}, {Key: keyFile}, {Certificate: keyFile, Key: keyFile},
		{Certificate: cert, Key: "pkcs11:token=x"}, {Certificate: cert, Key: keyFile, SSLEngine: "pkcs11"}} {
		cfg.HttpsClient = f
		if _, err := newHTTPClient(cfg, netOptions{}); exitCode(err) != exitRefused {
			t.Errorf("%+v: got %v, want a refusal", f, err)
		}
	}
}

// Field case 21 and mender/tests/src/common/http_proxy_test.cpp.
func TestNoProxy(t *testing.T) {
	for _, c := range []struct {
		list, url string
		want      bool
	}{
		{"", "http://h.test/", false}, {"", "http://localhost/", true}, {"", "http://127.0.0.2:80/", true},
		{"", "https://[::1]/", true},
		{"h.test", "http://h.test:8080/", true}, {"h.test", "http://H.TEST/", true}, {"h.test", "http://a.h.test/", true},
		{"h.test", "http://xh.test/", false}, {".h.test", "http://a.h.test/", true}, {".h.test", "http://b.a.h.test/", true},
		{".h.test", "http://xh.test/", false}, {".very.long.name.test", "http://a/", false},
		{"*.h.test", "http://a.h.test/", true},
		{"a.test,h.test", "http://h.test/", true}, {"a.test h.test", "http://h.test/", true},
		{"a.test, ,h.test ", "http://h.test/", true},
		{"*", "http://h.test/", true}, {".", "http://h.test/", true}, {"a b . c", "http://h.test/", true},
		{"10.0.0.0/8", "http://10.1.2.3/", true}, {"10.0.0.0/8", "http://11.1.2.3/", false},
		{"10.0.0.0/8", "http://h.test/", false},
		{"10.1.2.3", "https://10.1.2.3/", true}, {"10.1.2.3", "https://10.1.2.30/", false},
		{"fd00::/8", "http://[fd00::1]/", true},
		{"fd00::1", "http://[fd00::1]:80/", true}, {"[fd00::1]:80", "http://[fd00::1]/", true},
		{"10.0.0.0/8", "http://[::ffff:10.0.0.1]/", true},
		{"h.test:443", "https://h.test/", true}, {"h.test:443", "http://h.test/", false},
		{"h.test:8080", "http://h.test:8080/", true},
	} {
		env := map[string]string{"http_proxy": "http://proxy.test", "https_proxy": "http://proxy.test", "no_proxy": c.list}
		f, err := proxyFromEnv(func(k string) string { return env[k] }, nil)
		must(t, err)
		u, err := url.Parse(c.url)
		must(t, err)
		p, err := f(&http.Request{URL: u})
		must(t, err)
		if (p == nil) != c.want {
			t.Errorf("no_proxy %q, %q: got proxy %v", c.list, c.url, p)
		}
	}
}

func TestProxyVariables(t *testing.T) {
	for _, c := range []struct {
		name string
		env  map[string]string
		url  string
		want string // "error" or the proxy
		warn bool
	}{
		{"lower", map[string]string{"http_proxy": "http://p.test:3128"}, "http://h.test", "http://p.test:3128", false},
		{"upper", map[string]string{"HTTPS_PROXY": "p.test:3128"}, "https://h.test", "http://p.test:3128", false},
		{"other scheme", map[string]string{"https_proxy": "p.test"}, "http://h.test", "<nil>", false},
		{"both the same", map[string]string{"http_proxy": "http://p", "HTTP_PROXY": "http://p"}, "http://h.test",
			"http://p", false},
		{"both", map[string]string{"http_proxy": "http://p", "HTTP_PROXY": "http://q"}, "http://h.test", "http://p", true},
		{"upper empty", map[string]string{"http_proxy": "http://p", "HTTP_PROXY": ""}, "http://h.test", "http://p", false},
		{"upper no_proxy", map[string]string{"http_proxy": "http://p", "NO_PROXY": "h.test"},
			"http://h.test", "<nil>", false},
		{"CGI", map[string]string{"HTTP_PROXY": "http://p", "REQUEST_METHOD": "GET"}, "http://h.test", "<nil>", true},
		{"password", map[string]string{"http_proxy": "http://us%40er:p%3Aw@p.test"}, "http://h.test",
			"http://us%40er:p%3Aw@p.test", false},
		{"https", map[string]string{"https_proxy": "https://p.test"}, "https://h.test", "https://p.test", false},
		{"scheme", map[string]string{"https_proxy": "gopher://p.test"}, "", "error", false},
		{"path", map[string]string{"https_proxy": "http://u:secret@p.test/x"}, "", "error", false},
		{"garbage", map[string]string{"https_proxy": "http://u:secret@%zz"}, "", "error", false},
	} {
		said := 0
		lg := &logger{sinks: []logSink{func(logLevel, string) { said++ }}}
		f, err := proxyFromEnv(func(k string) string { return c.env[k] }, lg)
		if err != nil {
			if c.want != "error" || strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: got %v", c.name, err)
			}
			continue
		}
		u, err := url.Parse(c.url)
		must(t, err)
		p, err := f(&http.Request{URL: u})
		if got := fmt.Sprint(p); err != nil || got != c.want || (said > 0) != c.warn {
			t.Errorf("%s: got %s, %v, %d warnings", c.name, got, err, said)
		}
	}
}

// testProxy answers absolute-form requests and CONNECT by going to target, whatever the
// host's name.
func testProxy(t *testing.T, target string) (*httptest.Server, *[]string) {
	var seen []string
	p := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = append(seen, fmt.Sprintf("%s %s %s", r.Method, r.RequestURI, r.Header.Get("Proxy-Authorization")))
		if r.Method != http.MethodConnect {
			io.WriteString(w, "by proxy")
			return
		}
		out, err := net.Dial("tcp", target)
		if err != nil {
			t.Error(err)
			return
		}
		in, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(in, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { io.Copy(out, buf); out.Close() }()
		io.Copy(in, out)
		in.Close()
	}))
	t.Cleanup(p.Close)
	return p, &seen
}

// A proxy that wants a password says so, whichever way it is asked.
func TestProxyPassword(t *testing.T) {
	p := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(407) }))
	t.Cleanup(p.Close)
	hc := testHTTPClient(t, testConfig(t), netOptions{getenv: func(k string) string {
		return map[string]string{"http_proxy": p.URL, "https_proxy": p.URL}[k]
	}})
	for _, scheme := range []string{"http", "https"} {
		f := &fastSleep{}
		_, err := openDownload(t.Context(), hc, scheme+"://device.test/a", downloadOptions{sleep: f.sleep})
		if exitCode(err) != exitFailed || httpStatus(err) != 407 || !strings.Contains(hintOf(err), "http_proxy") ||
			len(f.slept) > 0 {
			t.Errorf("%s: got %v (exit code %d), hint %q", scheme, err, exitCode(err), hintOf(err))
		}
	}
}

func TestProxy(t *testing.T) {
	ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	s := tlsServer(t, ca, &tls.Config{})
	p, seen := testProxy(t, s.Listener.Addr().String())
	proxyURL := "http://us%40er:pw@" + p.Listener.Addr().String()
	env := map[string]string{"http_proxy": proxyURL, "HTTPS_PROXY": proxyURL}
	cfg := testConfig(t)
	cfg.ServerCertificate = ca.pem
	hc := testHTTPClient(t, cfg, netOptions{getenv: func(k string) string { return env[k] }})
	if got, err := fetch(hc, "http://device.test/x"); got != "by proxy" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := fetch(hc, "https://device.test/x"); got != "HTTP/1.1 0" {
		t.Errorf("got %q, %v", got, err)
	}
	hc.CloseIdleConnections()
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("us@er:pw"))
	want := []string{"GET http://device.test/x " + basic, "CONNECT device.test:443 " + basic}
	if !slices.Equal(*seen, want) {
		t.Errorf("the proxy saw %q, want %q", *seen, want)
	}
}
