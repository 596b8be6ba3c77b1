// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// The transport that the device API and downloads share: trust, client certificate, proxy,
// redirects, clock, and errors that say what a person can do.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

const (
	maxRedirects   = 5
	maxHeaderBytes = 64 << 10       // of an answer
	maxRetryAfter  = 24 * time.Hour // what a server may ask for; more is taken as this
)

type netOptions struct {
	floor   time.Time        // the earliest time that it can be; see clockFloor
	now     func() time.Time // nil: time.Now
	getenv  func(string) string
	version string // for User-Agent
	lg      *logger

	sessions *tlsSessions // nil: none of before

	tuneDialer func(*dialer) // for tests
}

// newHTTPClient makes the client for everything that goes over the network. Connections
// are kept and reused within one run.
func newHTTPClient(c *config, o netOptions) (*agent, error) {
	if o.now == nil {
		o.now = time.Now
	}
	if o.getenv == nil {
		o.getenv = os.Getenv
	}
	clock := newTLSClock(o)
	if o.sessions == nil {
		o.sessions = &tlsSessions{}
	}
	conf, err := tlsConfig(c, clock, o)
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
	return &agent{
		name: "mendlet/" + o.version, c: c, clock: clock, dial: dial,
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

			MaxResponseHeaderBytes: maxHeaderBytes,
			OnProxyConnectResponse: proxyAnswer,
			TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{}, // no HTTP/2
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
func tlsConfig(c *config, clock *tlsClock, o netOptions) (*tls.Config, error) {
	roots, err := trustedRoots(c, o.lg)
	if err != nil {
		return nil, err
	}
	conf := &tls.Config{
		RootCAs:            roots,
		Time:               clock.time,
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: c.SkipVerify,
		CurvePreferences:   smallGroups,
		ClientSessionCache: o.sessions,
	}
	if c.SkipVerify {
		o.lg.warnf("server certificates are not verified (SkipVerify)")
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
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if pool.AppendCertsFromPEM(text) {
		return nil
	}
	if b, _ := pem.Decode(text); b != nil && b.Type == "CERTIFICATE" {
		_, err := x509.ParseCertificate(b.Bytes)
		return fmt.Errorf("%q: %w", path, err)
	} else if b != nil {
		return fmt.Errorf("%q: got a %s in PEM, want a CERTIFICATE", path, b.Type)
	}
	if c, err := x509.ParseCertificates(text); err == nil && len(c) > 0 {
		return fmt.Errorf("%q: got a certificate in DER, want PEM: openssl x509 -inform der makes it", path)
	}
	return fmt.Errorf("%q: no PEM certificate in it", path)
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

// Do sends a request, and goes where redirects say (RFC 9110, 15.4). The answer's body has to be closed. http.Client,
// which knows cookies and Referer beside, would be 12 kB of the compressed program.
func (t *agent) Do(req *http.Request) (*http.Response, error) {
	for first, hops := req, 1; ; hops++ {
		resp, err := t.RoundTrip(req)
		if err != nil {
			return nil, err
		}
		to, code := resp.Header.Get("Location"), resp.StatusCode
		if to == "" || code != 307 && code != 308 && (code < 301 || code > 303) {
			return resp, nil
		}
		next, err := redirected(req, code, to)
		if err == nil {
			err = checkRedirect(next, req, first, hops)
		}
		io.CopyN(io.Discard, resp.Body, 2<<10) // to its end if it is short: the connection can be used again
		resp.Body.Close()
		if err != nil {
			return nil, err
		}
		req = next
	}
}

// redirected is the request that follows req: the same with 307 and 308 and of a HEAD, else a GET.
func redirected(req *http.Request, code int, to string) (*http.Request, error) {
	u, err := req.URL.Parse(to)
	if err != nil {
		return nil, errors.New("redirect to what is no URL refused") // not err: it may quote a secret
	}
	next := req.Clone(req.Context())
	next.URL, next.Host = u, ""
	switch {
	case code < 307 && req.Method != http.MethodHead:
		next.Method, next.Body, next.GetBody, next.ContentLength = http.MethodGet, nil, nil, 0
		next.Header.Del("Content-Type")
	case req.Body != nil:
		next.Body, err = req.GetBody()
	}
	return next, err
}

// checkRedirect refuses what would weaken or leak: from https to http, a request with a
// body to another host, as portals do it; more than a few; and other schemes. What is for the first host is for no
// other, and does not come back behind one.
func checkRedirect(req, last, first *http.Request, hops int) error {
	switch {
	case req.URL.Scheme != "http" && req.URL.Scheme != "https" || req.URL.Host == "":
		return fmt.Errorf("redirect to %q refused: want http or https", urlKey(req.URL))
	case hops > maxRedirects:
		return fmt.Errorf("more than %d redirects, the last to %q", maxRedirects, urlKey(req.URL))
	case last.URL.Scheme == "https" && req.URL.Scheme != "https":
		return fmt.Errorf("redirect from https to %q refused", urlKey(req.URL))
	case req.URL.Host != first.URL.Host && first.Method != http.MethodGet:
		return withHint(tryLater("redirect of %s to another host, %q, refused", first.Method, urlKey(req.URL)),
			"%s", hintPage)
	}
	if req.URL.Host != first.URL.Host {
		req.Header.Del("Authorization")
		req.Header.Del("Cookie")
	}
	return nil
}

// urlKey is what names a URL in messages and in the journal: without the query, which in
// a presigned URL is a secret and changes each time, and without a password.
//
//go:noinline
func urlKey(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// agent is the transport with this program's name on requests, redirects, and errors that help.
type agent struct {
	*http.Transport
	name  string
	c     *config
	clock *tlsClock
	dial  *dialer
}

func (t *agent) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Set("User-Agent", t.name)
	if password, _ := req.URL.User.Password(); req.URL.User != nil && req.Header.Get("Authorization") == "" {
		req.SetBasicAuth(req.URL.User.Username(), password)
	}
	resp, err := t.Transport.RoundTrip(req)
	if err != nil && req.Context().Err() == nil {
		err = t.explain(err)
	}
	return resp, err
}

// explain makes of an error of the transport one with an exit code and, where a person can do
// something, a hint. What the network does is for later; what only a configuration mends is not, here
// or at the server.
func (t *agent) explain(err error) error {
	if told := t.explainCertificate(err); told != nil {
		return told
	}
	if isDistrust(err) {
		return err
	}
	if hint := tlsHint(err, t.c.HttpsClient.Certificate != ""); hint != "" {
		return withHint(distrust{err}, "%s", hint)
	}
	later := tryLater("%w", err)
	var dns *net.DNSError
	if errors.As(err, &dns) {
		if _, serr := os.Stat("/etc/resolv.conf"); serr != nil {
			return withHint(later, "there is no /etc/resolv.conf: name a DNS server in it, or the host in /etc/hosts")
		}
	}
	return later
}

// explainCertificate is explain for a server whose certificate is not good; nil: it is not about that.
func (t *agent) explainCertificate(err error) error {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	var unreadable x509.SystemRootsError
	var other x509.HostnameError
	var bad *tls.CertificateVerificationError
	mend := func(format string, args ...any) error { return withHint(distrust{err}, format, args...) }
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && invalid.Cert != nil:
		return t.explainValidity(err, invalid.Cert)
	case (errors.As(err, &unknown) || errors.As(err, &unreadable)) && noRoots(t.TLSClientConfig):
		return mend("this system has no CA certificates: give a PEM file with -E, ServerCertificate or "+
			"SSL_CERT_FILE%s", t.unread())
	case errors.As(err, &unknown) && unknown.Cert != nil:
		return mend("the certificate was issued by %q: if that is right, and no portal or proxy is in between, "+
			"give the issuer's certificate with ServerCertificate or -E%s", unknown.Cert.Issuer.CommonName, t.unread())
	case errors.As(err, &other) && other.Certificate != nil:
		return mend("the certificate is for %s: name the server so, or give it a certificate for this name "+
			"(as subjectAltName)", certificateNames(other.Certificate))
	case errors.As(err, &bad), errors.As(err, &unknown), errors.As(err, &unreadable):
		return mend("the server, or a proxy in between, has to have another certificate%s", t.unread())
	}
	return nil
}

// explainValidity is explain for a certificate that is not valid now. Time mends one that is not valid
// yet, and a clock that is set.
func (t *agent) explainValidity(err error, c *x509.Certificate) error {
	now, day := t.clock.time(), func(at time.Time) string { return at.UTC().Format(time.RFC3339) }
	if t.clock.odd() || now.Before(c.NotBefore) {
		return withHint(tryLater("%w", err), "the clock says %s, and the certificate is valid from %s to %s; "+
			"set the clock, or wait for the program that does", day(t.clock.at), day(c.NotBefore), day(c.NotAfter))
	}
	return withHint(distrust{err}, "the certificate of the server was valid until %s, and the clock says %s: "+
		"renew it, or set the clock", day(c.NotAfter), day(now))
}

// unread tells that ServerCertificate could not be used, if so, in words that follow a hint.
func (t *agent) unread() string {
	if err := addRoots(x509.NewCertPool(), t.c.ServerCertificate); err != nil {
		return fmt.Sprintf(" (ServerCertificate could not be used: %v)", err)
	}
	return ""
}

// certificateNames are some of the names that a certificate is for.
func certificateNames(c *x509.Certificate) string {
	names := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		return "no name"
	}
	return fmt.Sprintf("%q", names[:min(len(names), 5)])
}

// tlsHints are for what one side of TLS says to the other, or the standard library of it. Most alerts
// (RFC 8446, 6.2) have no type, so they are told by their words.
var tlsHints = []struct{ words, hint string }{
	{"protocol version", "the server, or a proxy in between, speaks TLS 1.1 or older only, and 1.2 is the least here: " +
		"it has to be updated"},
	{"handshake failure", "server and device have no kind of encryption in common, or " + hintClient},
	{"insufficient security level", "server and device have no kind of encryption in common"},
	{"certificate required", hintClient},
	{"bad certificate", hintClient}, {"unsupported certificate", hintClient}, {"revoked certificate", hintClient},
	{"expired certificate", hintClient}, {"unknown certificate", hintClient}, {"access denied", hintClient},
	{"unrecognized name", "the server has no certificate for this name: look at the URL"},
	{"failed to parse certificate", "the server has to have another certificate"},
	{"first record does not look like a TLS handshake", "what answers there does not speak TLS: look at the URL, " +
		"http or https, and at its port"},
}

// tlsHint says what to do about an error of TLS that waiting does not mend; "" if it is none.
func tlsHint(err error, hasClient bool) string {
	text := err.Error()
	if !strings.Contains(text, "tls: ") {
		return ""
	}
	for _, h := range tlsHints {
		if !strings.Contains(text, h.words) {
			continue
		}
		if h.hint == hintClient && hasClient {
			return "the server does not take the certificate that HttpsClient in mender.conf names"
		}
		return h.hint
	}
	return ""
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

// newStatusError gives exit code 75 to what may be otherwise in a while. body is the answer's, or
// the start of it.
func newStatusError(what string, r *http.Response, body []byte) error {
	e := &statusError{what: what, code: r.StatusCode, text: serverWords(body), after: retryAfter(r.Header)}
	switch c := r.StatusCode; {
	case c == 407:
		return withHint(distrust{e}, "the proxy wants a name and a password: http_proxy=http://NAME:PASSWORD@HOST:PORT")
	case c >= 400 && c < 500 && strings.Contains(strings.ToLower(e.text), "certificate"):
		return withHint(e, "%s", hintClient) // nginx has no status of its own for that
	case c == 400 && strings.Contains(e.text, "HTTPS"):
		return withHint(e, "the URL has to begin with https://")
	case c == 408, c == 425, c == 429, c >= 500 && c < 600:
		return tryLater("%w", e)
	}
	return e
}

// serverWords is what an answer says to people: the error of JSON, as in {"error":"…","request_id":"…"};
// the title of a page, the message of XML; or its text, if that is short.
func serverWords(body []byte) string {
	var e struct{ Error string }
	binary := func(r rune) bool { return r < ' ' && !unicode.IsSpace(r) }
	text, limit := "", 300
	if json.Unmarshal(body, &e) == nil {
		text = e.Error
	} else if !bytes.ContainsFunc(body[:min(len(body), maxWords)], binary) {
		text, limit = markupWords(string(body)), maxWords
	}
	return strings.ToValidUTF8(text[:min(len(text), limit)], "")
}

const maxWords = 160 // bytes; the page of a store goes on with what is secret of a presigned URL

// markupWords leaves tags out. Of what has a title or a message, it takes that.
func markupWords(text string) string {
	lower := strings.ToLower(text)
	for _, tag := range []string{"title", "message"} {
		_, behind, begun := strings.Cut(lower, "<"+tag+">")
		inner, _, ended := strings.Cut(behind, "</"+tag+">")
		if begun && ended && len(lower) == len(text) {
			at := len(text) - len(behind)
			return strings.Join(strings.Fields(text[at:at+len(inner)]), " ")
		}
	}
	var b strings.Builder
	for _, part := range strings.Split(text, "<") {
		if _, behind, tag := strings.Cut(part, ">"); tag {
			part = behind
		}
		b.WriteString(part + " ")
		if b.Len() > 4*maxWords {
			break
		}
	}
	return strings.Join(strings.Fields(b.String()), " ")
}

// isWebPage tells a page for people in the place of what a program asked for, as portals and error
// pages are that come with status 200. head is how the body begins.
func isWebPage(h http.Header, head []byte) bool {
	kind := before(strings.ToLower(h.Get("Content-Type")), ";")
	kind = strings.TrimSpace(kind)
	return kind == "text/html" || kind == "application/xhtml+xml" || isMarkup(head)
}

func isMarkup(head []byte) bool {
	return bytes.HasPrefix(bytes.TrimLeft(bytes.TrimPrefix(head, []byte("\ufeff")), " \t\r\n"), []byte("<"))
}

const hintPage = "a portal of this network that wants a login, or a proxy, may have answered in the server's place; " +
	"else look at the URL"

// distrust is an error that a configuration has to mend, here or at the server; or somebody else has
// answered, as portals do. So it is no verdict on an update.
type distrust struct{ error }

func (e distrust) Unwrap() error { return e.error }

//go:noinline
func isDistrust(err error) bool {
	var d distrust
	return errors.As(err, &d)
}

// hintClient is for a server that wants to know the device by TLS.
const hintClient = "the server wants a certificate of this device: HttpsClient in mender.conf names it"

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
//
//go:noinline
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

// proxyAnswer is an error for a proxy that wants a password, by CONNECT; others are made elsewhere.
func proxyAnswer(_ context.Context, proxy *url.URL, _ *http.Request, r *http.Response) error {
	if r.StatusCode == http.StatusProxyAuthRequired {
		return newStatusError(fmt.Sprintf("proxy %q", proxy.Host), r, nil)
	}
	return nil
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
