// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// The transport that the device API and downloads share: trust, client certificate, proxy,
// redirects, clock, and errors that say what a person can do.

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	maxRedirects  = 5
	maxRetryAfter = 24 * time.Hour // what a server may ask for; more is taken as this
)

type netOptions struct {
	floor   time.Time        // the earliest time that it can be; see clockFloor
	now     func() time.Time // nil: time.Now
	getenv  func(string) string
	version string // for User-Agent
	lg      *logger

	tuneDialer func(*dialer) // for tests
}

// newHTTPClient makes the client for everything that goes over the network. Connections
// are kept and reused within one run.
func newHTTPClient(c *config, o netOptions) (*http.Client, error) {
	if o.now == nil {
		o.now = time.Now
	}
	if o.getenv == nil {
		o.getenv = os.Getenv
	}
	clock := newTLSClock(o)
	conf, err := tlsConfig(c, clock, o.lg)
	if err != nil {
		return nil, err
	}
	proxy, err := proxyFromEnv(o.getenv, o.lg)
	if err != nil {
		return nil, err
	}
	idle := seconds(c.Connectivity.IdleConnTimeoutSeconds)
	if idle <= 0 {
		idle = 90 * time.Second
	}
	dial := newDialer(conf, o.lg)
	if o.tuneDialer != nil {
		o.tuneDialer(dial)
	}
	return &http.Client{
		CheckRedirect: checkRedirect,
		Transport: &agent{
			name: "mendlet/" + o.version, clock: clock, dial: dial,
			Transport: &http.Transport{
				Proxy:               proxy,
				DialContext:         dial.DialContext,
				DialTLSContext:      dial.DialTLSContext,
				TLSClientConfig:     conf,
				TLSHandshakeTimeout: handshakeTimeout,
				DisableKeepAlives:   c.Connectivity.DisableKeepAlive,
				DisableCompression:  true, // sizes and ranges are of the bytes as stored
				IdleConnTimeout:     idle,
				MaxIdleConnsPerHost: 2,
				TLSNextProto:        map[string]func(string, *tls.Conn) http.RoundTripper{}, // no HTTP/2
			},
		},
	}, nil
}

// tlsClock is the time by which certificates are judged. It never goes by a clock that
// reads less than the floor, and a clock that was plausible at the start is asked only
// once: a jump during the run changes nothing.
type tlsClock struct {
	began time.Time // monotonic
	at    time.Time // the time then
	floor time.Time
	now   func() time.Time
}

func newTLSClock(o netOptions) *tlsClock {
	k := &tlsClock{began: time.Now(), at: o.now(), floor: o.floor, now: o.now}
	if k.unset() {
		o.lg.warnf("the clock says %s, which cannot be: certificates are judged as of %s",
			k.at.UTC().Format(time.RFC3339), o.floor.UTC().Format(time.RFC3339))
	}
	return k
}

func (k *tlsClock) unset() bool { return k.at.Before(k.floor) }

// odd tells a clock that may be the reason why a certificate seems expired: below the
// floor, or so far above it that this program would have been replaced long ago.
func (k *tlsClock) odd() bool {
	return k.unset() || !k.floor.IsZero() && k.at.After(k.floor.AddDate(20, 0, 0))
}

func (k *tlsClock) time() time.Time {
	if !k.unset() {
		return k.at.Add(time.Since(k.began))
	}
	t := k.floor.Add(time.Since(k.began))
	if n := k.now(); n.After(t) { // set in the meantime
		t = n
	}
	return t
}

// clockFloor is the earliest time that it can be now: that of the build, or that of the
// newest of the files. Files that are not there are passed over. A file from more than 20
// years after the build was written under a clock that was wrong.
func clockFloor(build time.Time, files ...string) time.Time {
	floor := build
	for _, f := range files {
		st, err := os.Stat(f)
		if err == nil && st.ModTime().After(floor) && (build.IsZero() || st.ModTime().Before(build.AddDate(20, 0, 0))) {
			floor = st.ModTime()
		}
	}
	return floor
}

// tlsConfig builds trust and the client certificate.
func tlsConfig(c *config, clock *tlsClock, lg *logger) (*tls.Config, error) {
	roots, err := trustedRoots(c, lg)
	if err != nil {
		return nil, err
	}
	conf := &tls.Config{
		RootCAs:            roots,
		Time:               clock.time,
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: c.SkipVerify,
		CurvePreferences:   smallGroups,
		ClientSessionCache: smallTickets{tls.NewLRUClientSessionCache(4)}, // a reconnect costs half a handshake
	}
	if c.SkipVerify {
		lg.warnf("server certificates are not verified (SkipVerify)")
	}
	return conf, clientCertificate(conf, c.HttpsClient)
}

// trustedRoots are the system's certificates and those of the configuration; nil: only the
// system's, of which the hundred or more are then not read before a server is verified.
func trustedRoots(c *config, lg *logger) (*x509.CertPool, error) {
	if c.ServerCertificate == "" && c.extraRoots == "" {
		return nil, nil
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		lg.warnf("system certificates: %v", err)
		roots = x509.NewCertPool()
	}
	for _, f := range []configFile{{c.ServerCertificate, false}, {c.extraRoots, true}} {
		if err := addRoots(roots, f.path); err != nil && f.explicit {
			return nil, refuse("trusted certificates: %w", err)
		} else if err != nil {
			lg.warnf("ServerCertificate: %v", err)
		}
	}
	return roots, nil
}

// noRoots tells that there is nothing to verify a server with.
func noRoots(c *tls.Config) bool {
	roots, err := c.RootCAs, error(nil)
	if roots == nil {
		roots, err = x509.SystemCertPool()
	}
	return err != nil || roots.Equal(x509.NewCertPool())
}

func addRoots(pool *x509.CertPool, path string) error {
	if path == "" {
		return nil
	}
	pem, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%q: no PEM certificate in it", path)
	}
	return nil
}

func clientCertificate(conf *tls.Config, f tlsFiles) error {
	if f.SSLEngine != "" || isPKCS11(f.Key) || isPKCS11(f.Certificate) {
		return noEngine("HttpsClient")
	}
	if f.Certificate == "" && f.Key == "" {
		return nil
	}
	if f.Certificate == "" || f.Key == "" {
		return refuse("HttpsClient: got Certificate %q and Key %q, want both or none", f.Certificate, f.Key)
	}
	cert, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
	if err != nil {
		return refuse("HttpsClient: Certificate %q with Key %q: %w", f.Certificate, f.Key, err)
	}
	conf.Certificates = []tls.Certificate{cert}
	return nil
}

func isPKCS11(s string) bool { return strings.HasPrefix(s, "pkcs11:") }

func noEngine(key string) error {
	return withHint(refuse("%s: keys in PKCS#11 tokens and SSLEngine are not supported", key),
		"use a key file in PEM form")
}

// checkRedirect refuses what would weaken or leak: from https to http, a request with a
// body to another host, more than a few. A presigned URL is a secret, so no Referer.
func checkRedirect(req *http.Request, via []*http.Request) error {
	first, last := via[0], via[len(via)-1]
	switch {
	case len(via) > maxRedirects:
		return fmt.Errorf("more than %d redirects, the last to %q", maxRedirects, urlKey(req.URL))
	case last.URL.Scheme == "https" && req.URL.Scheme != "https":
		return fmt.Errorf("redirect from https to %q refused", urlKey(req.URL))
	case req.URL.Host != first.URL.Host && first.Method != http.MethodGet:
		return fmt.Errorf("redirect of %s to another host, %q, refused", first.Method, urlKey(req.URL))
	}
	req.Header.Del("Referer")
	if req.URL.Host != first.URL.Host {
		// net/http keeps these for sub-domains; a token is for one host.
		req.Header.Del("Authorization")
		req.Header.Del("Cookie")
	}
	return nil
}

// urlKey is what names a URL in messages and in the journal: without the query, which in
// a presigned URL is a secret and changes each time, and without a password.
func urlKey(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// agent is the transport with this program's name on requests, and errors that help.
type agent struct {
	*http.Transport
	name  string
	clock *tlsClock
	dial  *dialer
}

func (t *agent) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Set("User-Agent", t.name)
	resp, err := t.Transport.RoundTrip(req)
	if err != nil && req.Context().Err() == nil {
		err = t.explain(err)
	}
	return resp, err
}

// explain makes of an error of the transport one with an exit code. Almost everything is
// "try later": a portal that wants a login looks like a wrong certificate, too.
func (t *agent) explain(err error) error {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	var unreadable x509.SystemRootsError
	var dns *net.DNSError
	later := tryLater("%w", err)
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		if !t.clock.odd() {
			return err
		}
		return withHint(later, "the clock says %s; set it, or wait for the program that does",
			t.clock.at.UTC().Format(time.RFC3339))
	case (errors.As(err, &unknown) || errors.As(err, &unreadable)) && noRoots(t.TLSClientConfig):
		return withHint(err, "this system has no CA certificates: give a PEM file with -E, ServerCertificate or SSL_CERT_FILE")
	case errors.As(err, &unknown):
		return withHint(later, "if the server has a certificate of its own, name it with ServerCertificate or -E")
	case errors.As(err, &dns):
		if _, serr := os.Stat("/etc/resolv.conf"); serr != nil {
			return withHint(later, "there is no /etc/resolv.conf: name a DNS server in it, or the host in /etc/hosts")
		}
	}
	return later
}

// tidyNetError takes the URL out of what http.Client.Do returns: it may hold a secret.
func tidyNetError(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

// statusError is an answer of a server that was not what was asked for.
type statusError struct {
	what  string // method and URL
	code  int
	text  string        // the server's own words, for people
	after time.Duration // Retry-After; 0: none
}

func (e *statusError) Error() string {
	s := fmt.Sprintf("%s: HTTP status %d", e.what, e.code)
	if e.text != "" {
		s += fmt.Sprintf(" %q", e.text)
	}
	return s
}

// newStatusError gives exit code 75 to what may be otherwise in a while.
func newStatusError(what string, r *http.Response, text string) error {
	e := &statusError{what: what, code: r.StatusCode, text: text, after: retryAfter(r.Header)}
	switch c := r.StatusCode; {
	case c == 408, c == 425, c == 429, c >= 500:
		return tryLater("%w", e)
	}
	return e
}

// httpStatus is the status behind err, 0 if there is none.
//
//go:noinline
func httpStatus(err error) int {
	var e *statusError
	if errors.As(err, &e) {
		return e.code
	}
	return 0
}

// retryAfterOf is how long the server behind err asked to be left alone; 0 if it did not.
func retryAfterOf(err error) time.Duration {
	var e *statusError
	if errors.As(err, &e) {
		return e.after
	}
	return 0
}

// retryAfter reads Retry-After, seconds or a date (RFC 9110, 10.2.3). A date is taken
// relative to the server's own Date, so that our clock does not matter. What is negative
// or unreadable counts as absent, what is huge as maxRetryAfter.
func retryAfter(h http.Header) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	var d time.Duration
	if n, err := strconv.ParseUint(v, 10, 64); err == nil || errors.Is(err, strconv.ErrRange) {
		d = time.Duration(min(n, uint64(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(v); err == nil {
		now, err := http.ParseTime(h.Get("Date"))
		if err != nil {
			now = time.Now()
		}
		d = at.Sub(now)
	}
	return max(0, min(d, maxRetryAfter))
}

// readBounded reads r to its end and fails if there is more than limit.
func readBounded(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		return nil, fmt.Errorf("answer of more than %d bytes", limit)
	}
	return b, err
}

// proxyFromEnv reads http_proxy, https_proxy and no_proxy in both spellings. net/http's
// own reader prefers the upper-case ones silently and knows commas only.
func proxyFromEnv(getenv func(string) string, lg *logger) (func(*http.Request) (*url.URL, error), error) {
	either := func(name string) string {
		low, up := getenv(name), getenv(strings.ToUpper(name))
		if low != "" && up != "" && low != up {
			lg.warnf("%s and %s differ: going by %s", name, strings.ToUpper(name), name)
		}
		if low == "" && name == "http_proxy" && up != "" && getenv("REQUEST_METHOD") != "" {
			// A CGI program gets the request's header "Proxy:" in this variable.
			lg.warnf("HTTP_PROXY ignored, because REQUEST_METHOD is set")
			return ""
		}
		return cmp.Or(low, up)
	}
	proxies := map[string]*url.URL{}
	for _, scheme := range []string{"http", "https"} {
		u, err := parseProxy(either(scheme + "_proxy"))
		if err != nil {
			return nil, usageError("%s_proxy: %w", scheme, err)
		}
		proxies[scheme] = u
	}
	direct := strings.FieldsFunc(either("no_proxy"), func(r rune) bool { return r == ',' || r == ' ' || r == '\t' })
	return func(req *http.Request) (*url.URL, error) {
		p := proxies[req.URL.Scheme]
		if p == nil || noProxy(req.URL, direct) {
			return nil, nil
		}
		return p, nil
	}, nil
}

func parseProxy(s string) (*url.URL, error) {
	if s == "" {
		return nil, nil
	}
	if !strings.Contains(s, "://") {
		s = "http://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("not a URL") // not err: it quotes the password
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "socks5":
		return nil, fmt.Errorf("%q: want http, https or socks5", u.Redacted())
	case u.Host == "" || strings.Trim(u.Path, "/") != "":
		return nil, fmt.Errorf("%q: want [scheme://][user:password@]host[:port]", u.Redacted())
	}
	return u, nil
}

// noProxy tells whether the URL's host is in the list: "*" or "." is every host, a name is
// itself and what is below it, a name with a leading dot only what is below it, and there
// are addresses and CIDR ranges. A port limits an entry. This machine is always in it.
func noProxy(u *url.URL, list []string) bool {
	host := strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	ip, _ := netip.ParseAddr(host)
	ip = ip.Unmap()
	if host == "localhost" || ip.IsLoopback() {
		return true
	}
	for _, e := range list {
		e = strings.ToLower(e)
		if e == "*" || e == "." {
			return true
		}
		if p, err := netip.ParsePrefix(e); err == nil {
			if ip.IsValid() && p.Contains(ip) {
				return true
			}
			continue
		}
		if h, p, err := net.SplitHostPort(e); err == nil {
			if p != port {
				continue
			}
			e = h
		}
		e = strings.TrimPrefix(strings.Trim(e, "[]"), "*")
		if a, err := netip.ParseAddr(e); err == nil {
			if a.Unmap() == ip {
				return true
			}
			continue
		}
		if host == e || strings.HasSuffix(host, "."+strings.TrimPrefix(e, ".")) {
			return true
		}
	}
	return false
}
