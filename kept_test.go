// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// meteredProxy passes TCP on to what dial connects to, and counts connections, and bytes both ways.
func meteredProxy(t testing.TB, dial func() (net.Conn, error)) (addr string, counted func() (conns, total int64)) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var conns, total atomic.Int64
	var mu sync.Mutex
	var open []net.Conn
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range open {
			c.Close()
		}
	})
	pass := func(to, from net.Conn) {
		buf := make([]byte, 64<<10)
		for {
			n, err := from.Read(buf)
			total.Add(int64(n)) // before it is on its way
			if n > 0 {
				to.Write(buf[:n])
			}
			if err != nil {
				to.Close()
				return
			}
		}
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := dial()
			if err != nil {
				in.Close()
				continue
			}
			conns.Add(1)
			mu.Lock()
			open = append(open, in, out)
			mu.Unlock()
			go pass(in, out)
			go pass(out, in)
		}
	}()
	return l.Addr().String(), func() (int64, int64) { return conns.Load(), total.Load() }
}

// keptBoard is a device whose server is behind TLS and a meter.
type keptBoard struct {
	*verbBoard
	ca      *testCA
	file    string
	counted func() (conns, total int64)
	resumed atomic.Int64 // requests over sessions that were gone on with
}

func newKeptBoard(t *testing.T, conf *tls.Config) *keptBoard {
	b := &keptBoard{verbBoard: newVerbBoard(t), ca: newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))}
	if conf != nil { // else TLS is somebody else's
		leaf := b.ca.issue(t, false)
		conf.Certificates = []tls.Certificate{{Certificate: [][]byte{leaf.cert.Raw}, PrivateKey: leaf.key}}
	}
	b.server = startServer(t, conf)
	b.server.autoAccept, b.server.v2 = true, true
	b.server.setFault(func(_ string, _ http.ResponseWriter, r *http.Request) bool {
		if r.TLS != nil && r.TLS.DidResume {
			b.resumed.Add(1)
		}
		return false
	})
	b.file = filepath.Join(b.dir, "var", keptName)
	b.behind(b.dial)
	return b
}

func (b *keptBoard) dial() (net.Conn, error) {
	return net.Dial("tcp", b.server.Listener.Addr().String())
}

// behind has the device's server be what dial connects to, over TLS.
func (b *keptBoard) behind(dial func() (net.Conn, error)) {
	b.t.Helper()
	var addr string
	addr, b.counted = meteredProxy(b.t, dial)
	b.want(0, "", "setup", "--server-url", "https://"+addr, "--server-cert", b.ca.pem, "--device-type", "qemu")
}

// polled is what one run takes, that must end with this exit code.
type polled struct {
	requests []string
	conns    int64
	bytes    int64
	resumed  bool
}

func (b *keptBoard) poll(exit int, words ...string) (p polled) {
	b.t.Helper()
	before, _ := b.server.heard()
	conns, total := b.counted()
	resumed := b.resumed.Load()
	b.want(exit, "", append([]string{"run", "--now"}, words...)...)
	after, _ := b.server.heard()
	p.requests, p.resumed = after[len(before):], b.resumed.Load() > resumed
	p.conns, p.bytes = b.counted()
	p.conns -= conns
	p.bytes -= total
	return p
}

// cheap is one run that must be one request over a session of before.
func (b *keptBoard) cheap() polled {
	b.t.Helper()
	p := b.poll(0)
	if !slices.Equal(p.requests, []string{"POST next2"}) || p.conns != 1 || !p.resumed {
		b.t.Fatalf("got %+v, want one request, over a session of before", p)
	}
	return p
}

// pollLimit is what a poll that finds nothing may take, in bytes of the connection both ways, less the token:
// 1.6 kB with one of 380 bytes; servers with an Ed25519 key give some of 350.
const pollLimit = 1220

// A run that finds nothing is one request over a session of before, whichever key signs the tokens.
func TestPollBytes(t *testing.T) {
	for _, sign := range []struct {
		with string
		size int // of the signature in base64
	}{{"Ed25519", 86}, {"RSA with 2048 bits", 342}, {"RSA with 3072 bits", 512}} {
		b := newKeptBoard(t, &tls.Config{})
		b.server.signature = strings.Repeat("s", sign.size)
		if first := b.poll(0); first.resumed || first.conns != 1 {
			t.Fatalf("got %+v, want a whole handshake", first)
		}
		full := b.poll(0, "--skipverify") // other settings: a whole handshake, and no inventory
		b.poll(0)
		for range 3 { // each leaves what the next one needs
			p, token := b.cheap(), len(b.kept().Token)
			if p.bytes > int64(pollLimit+token) || full.bytes < p.bytes+1000 {
				t.Errorf("%s: got %d bytes for a poll, want %d and the %d of the token; a whole one takes %d",
					sign.with, p.bytes, pollLimit, token, full.bytes)
			}
			t.Logf("%s, token of %d bytes: %d bytes (%q) and later %d (%q)", sign.with, token, full.bytes, full.requests,
				p.bytes, p.requests)
		}
	}
}

// The same with nginx and OpenSSL before the server; with sessions that nginx keeps itself tickets are shorter.
func TestPollBytesNginx(t *testing.T) {
	for _, c := range []struct {
		conf  string
		limit int
	}{{"", pollLimit + 260}, {"ssl_session_tickets off; ssl_session_cache shared:TLS:1m;", pollLimit}} {
		b := newKeptBoard(t, nil)
		dir := t.TempDir()
		startNginx(fmt.Sprintf(`} server { listen unix:DIR/tls.sock ssl; ssl_protocols TLSv1.3; ssl_session_timeout 1d; %s
			ssl_certificate %[2]s; ssl_certificate_key %[2]s; location / { proxy_pass %s; }`, c.conf, b.ca.serverPEM(t),
			b.server.URL))(t, dir)
		b.behind(dialFile(t, dir+"/tls.sock"))
		b.poll(0)
		full := b.poll(0, "--skipverify")
		b.poll(0)
		for range 3 {
			p, token := b.poll(0), len(b.kept().Token)
			if len(p.requests) != 1 || p.bytes > int64(c.limit+token) || full.bytes < p.bytes+1000 {
				t.Errorf("%q: got %+v with a token of %d bytes; a whole one is %+v", c.conf, p, token, full)
			}
			t.Logf("%q, token of %d bytes: %d bytes (%q) and later %d (%q)", c.conf, token, full.bytes, full.requests, p.bytes,
				p.requests)
		}
	}
}

func (b *keptBoard) kept() *kept {
	b.t.Helper()
	k, err := readKept(defaultConfig(paths{conf: b.dir + "/etc", data: b.dir + "/share", ds: b.dir + "/var"}))
	must(b.t, err)
	return k
}

// With a token that the server does not take any more the device logs in anew, once, and goes on in the same run.
func TestKeptToken401(t *testing.T) {
	b := newKeptBoard(t, &tls.Config{})
	b.poll(0)
	old := b.kept().Token
	b.cheap()
	b.server.expireTokens()
	p := b.poll(0)
	if want := []string{"POST next2", "POST auth", "POST next2"}; !slices.Equal(p.requests, want) {
		t.Errorf("got %q, want %q", p.requests, want)
	}
	k := b.kept()
	if k.Token == old || len(k.TLS) != 0 {
		t.Errorf("got token %q after %q, and %d sessions, want another and none", k.Token, old, len(k.TLS))
	}
	if p := b.poll(0); p.resumed || !slices.Equal(p.requests, []string{"POST next2"}) {
		t.Errorf("got %+v, want one request and a whole handshake", p)
	}
	b.cheap()
	// Nor is a device that has been refused asked of twice, or kept as an accepted one.
	b.server.expireTokens()
	b.server.autoAccept = false
	b.server.setDevice(boardID, "rejected")
	if p := b.poll(exitTempFail); !slices.Equal(p.requests, []string{"POST next2", "POST auth"}) {
		t.Errorf("got %q", p.requests)
	}
	if k := b.kept(); k.Token != "" || len(k.TLS) != 0 {
		t.Errorf("got %+v, want nothing", k)
	}
}

// A server that answers otherwise than with 401 to a token that has ended, such as a proxy before it may do, gets
// another one after the second time.
func TestKeptTokenUnwanted(t *testing.T) {
	b := newKeptBoard(t, &tls.Config{})
	b.poll(0)
	bad := b.kept().Token
	b.server.setFault(func(_ string, w http.ResponseWriter, r *http.Request) bool {
		if unwanted := r.Header.Get("Authorization") == "Bearer "+bad; unwanted {
			apiError(w, http.StatusForbidden, "expired")
			return true
		}
		return false
	})
	b.poll(exitFailed)
	b.poll(exitFailed)
	if p := b.poll(0); len(p.requests) != 2 || p.requests[0] != "POST auth" {
		t.Errorf("got %q, want a new token", p.requests)
	}
}

// A token is used at the server that would be asked first: one that was only there when the first was not is not
// clung to.
func TestKeptTokenServers(t *testing.T) {
	t.Parallel()
	first, second := newTestServer(t, false), newTestServer(t, false)
	first.autoAccept, second.autoAccept = true, true
	c := testConfig(t, second.URL)
	a := newAPIClient(c, testHTTPClient(t, c, netOptions{}), fixedID, testSigner(t), nil)
	_, err := a.nextDeployment(t.Context(), provides("r1"))
	must(t, err)
	c.Servers = []serverEntry{{first.URL}, {second.URL}}
	for _, c := range []struct {
		prefers string
		auths   int // at the first server
	}{{second.URL, 0}, {"", 1}} {
		b := newAPIClient(a.c, a.hc, fixedID, a.key, nil)
		b.kept, b.first = &kept{Server: a.base, Token: a.token, Identity: sha256Hex([]byte(testID))}, c.prefers
		_, err = b.nextDeployment(t.Context(), provides("r1"))
		must(t, err)
		if first.count("POST auth") != c.auths || second.count("POST auth") != 1 {
			t.Errorf("%q is asked first: got %d logins there and %d at the other", c.prefers, first.count("POST auth"),
				second.count("POST auth"))
		}
	}
}

// What was kept is of use under the very settings that it came from.
func TestKeptSettings(t *testing.T) {
	other := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	for _, c := range []struct {
		what   string
		change func(b *keptBoard)
		words  []string
	}{
		{"key", func(b *keptBoard) {
			must(b.t, os.Remove(b.dir+"/var/mender-agent.pem"))
			_, err := makeDeviceKey(b.dir+"/var/mender-agent.pem", nil)
			must(b.t, err)
		}, nil},
		{"new key", nil, []string{"--forcebootstrap"}},
		{"server", func(b *keptBoard) { b.behind(b.dial) }, nil},
		{"identity", func(b *keptBoard) {
			writeScript(b.t, b.dir+"/share/identity/mender-device-identity", "echo mac=b", 0o755)
			changeJournal(b.t, b.dir+"/var", func(r *record) { r.Net.Identity = "" })
		}, nil},
		{"certificates", func(b *keptBoard) {
			text := readText(b.t, b.ca.pem) + readText(b.t, other.pem)
			must(b.t, os.WriteFile(b.ca.pem, []byte(text), 0o600))
		}, nil},
		{"more certificates", nil, []string{"-E", other.pem}},
		{"skipverify", nil, []string{"--skipverify"}},
		{"age", func(b *keptBoard) {
			k := b.kept()
			k.Since = k.Since.Add(-keptFor)
			text, err := json.Marshal(k)
			must(b.t, errors.Join(err, os.WriteFile(b.file, text, 0o600)))
		}, nil},
		{"tenant", func(b *keptBoard) { b.want(0, "", "setup", "--tenant-token", "other") }, nil},
	} {
		b := newKeptBoard(t, &tls.Config{})
		b.poll(0)
		old := b.cheap()
		token := b.kept().Token
		if c.change != nil {
			c.change(b)
		}
		p := b.poll(0, c.words...)
		if p.resumed || p.requests[0] != "POST auth" || b.kept().Token == token {
			t.Errorf("%s: got %+v after %+v, want another token and a whole handshake", c.what, p, old)
		}
		if len(c.words) > 0 && c.what != "new key" {
			if p := b.poll(0); p.resumed || p.requests[0] != "POST auth" {
				t.Errorf("without %s again: got %+v, want another token and a whole handshake", c.what, p)
			}
		}
	}
}

// A session does not outlive the trust that it came from: not a certificate that has expired since, nor one whose
// issuer is no longer among the system's certificates or those of the configuration, nor one for another name.
func TestKeptTrust(t *testing.T) {
	now := time.Now()
	ca := newTestCA(t, now.Add(-time.Hour), now.Add(time.Hour))
	other := newTestCA(t, now.Add(-time.Hour), now.Add(time.Hour))
	s := tlsServer(t, ca, &tls.Config{})
	k := &kept{}
	get := func(url string, roots string, at time.Time, change func(*config)) (*http.Response, error) {
		c := testConfig(t)
		c.ServerCertificate = roots
		if change != nil {
			change(c)
		}
		hc := testHTTPClient(t, c, netOptions{sessions: &k.sessions, now: func() time.Time { return at }})
		resp, err := getURL(hc, url)
		if err == nil {
			resp.Body.Close()
		}
		return resp, err
	}
	text := ""
	again := func() { // as another process has it
		k.TLS = k.sessions.export()
		if k.sessions.clear(); len(k.TLS) != 1 {
			t.Fatalf("got %d sessions, want one", len(k.TLS))
		}
		k.sessions.restore(k.TLS)
		text = fmt.Sprint(len(k.TLS))
	}
	skip := func(c *config) { c.SkipVerify = true }
	for _, c := range []struct {
		what    string
		url     string
		roots   string
		at      time.Time
		change  func(*config)
		resumed bool
		err     string
	}{
		{"the same", s.URL, ca.pem, now, nil, true, ""},
		{"expired", s.URL, ca.pem, now.Add(2 * time.Hour), nil, false, "expired"},
		{"not valid yet", s.URL, ca.pem, now.Add(-2 * time.Hour), nil, false, "not yet valid"},
		{"other certificates", s.URL, other.pem, now, nil, false, "unknown authority"},
		{"another name", strings.Replace(s.URL, "127.0.0.1", "localhost", 1), ca.pem, now, nil, false, "localhost"},
		{"not verified", s.URL, other.pem, now, skip, true, ""}, // which lastKept does not let come to this
	} {
		if _, err := get(s.URL, ca.pem, now, nil); err != nil {
			t.Fatal(err)
		}
		again()
		resp, err := get(c.url, c.roots, c.at, c.change)
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: got %v, want %q", c.what, err, c.err)
		}
		if err == nil && resp.TLS.DidResume != c.resumed {
			t.Errorf("%s: got resumed %v", c.what, resp.TLS.DidResume)
		}
		k.sessions.clear()
	}
	// What came without verification does not count as verified.
	if _, err := get(s.URL, other.pem, now, skip); err != nil {
		t.Fatal(err)
	}
	again()
	if _, err := get(s.URL, other.pem, now, nil); err == nil {
		t.Errorf("a session of a server that was not verified (%s) is good for one that is to be", text)
	}
}

// The system's certificates are read once in a process, so this takes several.
func TestKeptSystemRoots(t *testing.T) {
	b := newKeptBoard(t, &tls.Config{})
	none := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	addr := b.server.Listener.Addr().String()
	must(t, os.WriteFile(b.dir+"/etc/mender.conf", fmt.Appendf(nil, `{"ServerURL":"https://%s"}`, addr), 0o600))
	self, err := os.Executable()
	must(t, err)
	run := func(roots string) string {
		cmd := exec.Command(self, "-b", b.dir+"/none", "run", "--now")
		cmd.Env = append(os.Environ(), "MENDLET_TEST_PROGRAM=1", "SSL_CERT_FILE="+roots, "SSL_CERT_DIR="+b.dir)
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	for _, c := range []struct {
		roots, says string
		resumed     int64
	}{{b.ca.pem, "nothing is deployed", 0}, {b.ca.pem, "nothing is deployed", 1}, {none.pem, "unknown authority", 0}} {
		before := b.resumed.Load()
		out := run(c.roots)
		if got := b.resumed.Load() - before; !strings.Contains(out, c.says) || got != c.resumed {
			t.Errorf("got %q and %d requests over a session of before, want %q and %d", out, got, c.says, c.resumed)
		}
	}
}

// Only sessions of TLS 1.3 are kept: with the key of an older one what was sent under it could be read.
func TestKeptTLS12(t *testing.T) {
	b := newKeptBoard(t, &tls.Config{MaxVersion: tls.VersionTLS12})
	b.poll(0)
	if k := b.kept(); len(k.TLS) != 0 || k.Token == "" {
		t.Errorf("got %d sessions and token %q, want a token alone", len(k.TLS), k.Token)
	}
	if p := b.poll(0); p.resumed || len(p.requests) != 1 {
		t.Errorf("got %+v, want one request and a whole handshake", p)
	}
}

// A server that has come down to TLS 1.2 since gets a whole handshake in the same run, and no session is tried again.
func TestKeptTLS13Gone(t *testing.T) {
	var old atomic.Bool
	conf := &tls.Config{}
	conf.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := conf.Clone()
		if c.GetConfigForClient = nil; old.Load() {
			c.MaxVersion = tls.VersionTLS12
		}
		return c, nil
	}
	b := newKeptBoard(t, conf)
	b.poll(0)
	old.Store(true)
	if p := b.poll(0); p.conns != 2 || p.resumed || len(p.requests) != 1 {
		t.Errorf("got %+v, want one request after a second handshake", p)
	}
	if p := b.poll(0); p.conns != 1 || len(b.kept().TLS) != 0 {
		t.Errorf("got %+v and %d sessions, want one connection and no session", p, len(b.kept().TLS))
	}
	// Nor one that crypto/tls passes over, and leaves where it is, as nobody has verified what it is from.
	old.Store(false)
	var live tlsSessions
	for _, skip := range []bool{true, false} {
		c := testConfig(t)
		c.SkipVerify, c.ServerCertificate = skip, b.ca.pem
		resp, err := getURL(testHTTPClient(t, c, netOptions{sessions: &live}), b.server.URL)
		must(t, err)
		resp.Body.Close()
		old.Store(true)
	}
}

// What is in the way of the file, or what others could read or have written, is not used, nor waited for.
func TestKeptFile(t *testing.T) {
	b := newKeptBoard(t, &tls.Config{})
	b.poll(0)
	st, err := os.Stat(b.file)
	if err != nil || st.Mode() != 0o600 {
		t.Fatalf("got %v, %v, want mode 0600", st, err)
	}
	for _, c := range []struct {
		what string
		put  func(text []byte) error
	}{
		{"open to others", func([]byte) error { return os.Chmod(b.file, 0o644) }},
		{"open to a group", func([]byte) error { return os.Chmod(b.file, 0o660) }},
		{"another's", func([]byte) error { return os.Chown(b.file, 1234, -1) }},
		{"a link", func(text []byte) error {
			return errors.Join(os.WriteFile(b.dir+"/copy", text, 0o600), os.Remove(b.file), os.Symlink(b.dir+"/copy", b.file))
		}},
		{"a pipe", func([]byte) error { return errors.Join(os.Remove(b.file), syscall.Mkfifo(b.file, 0o600)) }},
		{"empty", func([]byte) error { return os.WriteFile(b.file, nil, 0o600) }},
		{"half of it", func(text []byte) error { return os.WriteFile(b.file, text[:len(text)/2], 0o600) }},
		{"something else", func([]byte) error { return os.WriteFile(b.file, []byte("[7]"), 0o600) }},
	} {
		b.cheap()
		text, err := os.ReadFile(b.file)
		must(t, err)
		if os.Getuid() != 0 && c.what == "another's" {
			continue
		}
		must(t, c.put(text))
		must(t, os.WriteFile(b.file+".tmp", []byte("cut off"), 0o600)) // what a power cut leaves is in nobody's way
		if p := b.poll(0); p.resumed || p.requests[0] != "POST auth" {
			t.Errorf("%s: got %+v, want all anew", c.what, p)
		}
		if st, err := os.Lstat(b.file); err != nil || st.Mode() != 0o600 {
			t.Errorf("%s: got %v, %v, want a file of mode 0600", c.what, st, err)
		}
	}
	// What can be neither read nor written costs the saving and nothing else.
	must(t, errors.Join(os.Remove(b.file), os.Mkdir(b.file, 0o700), os.WriteFile(b.file+"/x", nil, 0o600)))
	for range 2 {
		if p := b.poll(0); len(p.requests) != 2 {
			t.Errorf("got %+v, want login and poll", p)
		}
	}
}

// Verbs that only look use what is kept, and leave it as it is. token prints what the last run has used.
func TestKeptVerbs(t *testing.T) {
	b := newKeptBoard(t, &tls.Config{})
	b.poll(0)
	text := readText(t, b.file)
	requests, _ := b.server.heard()
	b.want(0, "no update", "check-update")
	if out := b.want(0, "", "token"); !strings.HasSuffix(out, "token="+b.kept().Token+"\n") {
		t.Errorf("got %q", out)
	}
	after, _ := b.server.heard()
	if now := readText(t, b.file); now != text || len(after) != len(requests)+1 {
		t.Errorf("got requests %q, and a file that is another %v", after[len(requests):], now != text)
	}
	b.server.expireTokens()
	b.want(0, "no update", "check-update")
	if now := readText(t, b.file); now != text {
		t.Error("check-update has changed what is kept")
	}
	b.want(0, "token=", "token", "--fetch")
	b.cheap() // the new token, and a session of either
	b.want(0, "", "send-inventory")
	b.cheap()
}

// keptSession is a session with a new server, as it is kept, and how to get a page of it with one.
func keptSession(t testing.TB) (state []byte, get func(state []byte) (resumed bool, err error)) {
	ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	s := tlsServer(t, ca, &tls.Config{})
	c := testConfig(t)
	c.ServerCertificate = ca.pem
	var live tlsSessions
	get = func(state []byte) (bool, error) {
		live.clear()
		live.restore(map[string][]byte{"127.0.0.1": state})
		hc := testHTTPClient(t, c, netOptions{sessions: &live})
		resp, err := getURL(hc, s.URL)
		if err != nil {
			return false, err
		}
		resp.Body.Close()
		hc.CloseIdleConnections()
		return resp.TLS.DidResume, nil
	}
	if _, err := get(nil); err != nil {
		t.Fatal(err)
	}
	return live.export()["127.0.0.1"], get
}

// Whatever has become of a session while it was kept, the device gets through with a whole handshake in the same
// run.
func TestKeptDamage(t *testing.T) {
	t.Parallel()
	good, get := keptSession(t)
	if resumed, err := get(good); err != nil || !resumed {
		t.Fatalf("got %v, %v: the session is not gone on with", resumed, err)
	}
	step, resumed, tries := 9, 0, 0
	if exhaustive() {
		step = 1
	}
	try := func(what string, state []byte) {
		r, err := get(state)
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if tries++; r {
			resumed++
		}
	}
	for i := 0; i < len(good); i += step {
		bad := slices.Clone(good)
		bad[i] ^= 0x55
		try(fmt.Sprintf("byte %d", i), bad)
		try(fmt.Sprintf("cut off at %d", i), good[:i])
	}
	// One of a server's side has no certificate, which a client does not reckon with.
	try("a server's", []byte{3, 4, 1, 0x13, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 9, 0, 0, 4, 0, 0, 1, 9, 0, 0, 0, 0, 0, 0, 0, 0})
	if t.Logf("%d of %d were gone on with", resumed, tries); resumed > tries/2 {
		t.Error("the damage does nothing")
	}
}

// FuzzKept makes a client of what is read as a session.
func FuzzKept(f *testing.F) {
	good, _ := keptSession(f)
	f.Add(good)
	f.Fuzz(func(t *testing.T, state []byte) {
		var live tlsSessions
		live.restore(map[string][]byte{"h": state})
		if len(live.live) == 0 {
			return
		}
		in, out := net.Pipe()
		go func() {
			io.CopyN(io.Discard, out, 100)
			out.Close()
		}()
		conf := &tls.Config{ServerName: "h", ClientSessionCache: &live, InsecureSkipVerify: true}
		if err := tls.Client(in, conf).Handshake(); err == nil {
			t.Fatal("a handshake with nobody")
		}
		in.Close()
		live.restore(map[string][]byte{"h": state})
		live.export()
	})
}
