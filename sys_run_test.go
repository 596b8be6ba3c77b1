// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Field cases 15 to 21, from poll to verdict: a whole "mendlet run" of the simulated device
// against a server that misbehaves.

// running is a device with what its runs differ in from those of other tests.
type running struct {
	*simDevice
	t      *testing.T
	setup  *managedSetup
	dep    *testDeployment
	server string
	tune   func(*app)
	stall  time.Duration
	said   *[]string // with what the sleeps of downloads were for
}

// shortStall is for tests of downloads that stall: all others have the time that a busy machine may need.
const shortStall = 300 * time.Millisecond

func newRunning(t *testing.T, s *managedSetup) *running {
	d, dep := s.device(t, "new")
	return &running{simDevice: d, t: t, setup: s, dep: dep, server: s.server.URL, stall: 20 * time.Second,
		said: &[]string{}}
}

// once boots the device and is one "mendlet run".
func (r *running) once() error {
	r.t.Helper()
	must(r.t, r.boot())
	return r.again()
}

// again is a run without a boot before it.
func (r *running) again() error {
	return r.managedRun(r.t.Context(), r.server, func(a *app) {
		a.lg = &logger{level: levelInfo, sinks: []logSink{func(_ logLevel, m string) { *r.said = append(*r.said, m) }}}
		a.o.net.tuneDownload = func(o *downloadOptions) {
			o.lg, o.stall = a.lg, r.stall
			o.sleep = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
		}
		if r.tune != nil {
			r.tune(a)
		}
	})
}

// next is a run after one that ended with err: the machine is rebooted if that was asked
// for, and no wait is kept to.
func (r *running) next(err error) error {
	r.t.Helper()
	r.patience()
	if r.booted == "" || exitCode(err) == exitReboot {
		return r.once()
	}
	return r.again()
}

// patience takes the wait for the next try out of the journal.
func (r *running) patience() {
	r.t.Helper()
	j, rec, _, _, err := readJournal(simStorage{r.w, r.w.files["/sim/journal"]})
	must(r.t, err)
	if rec.Net != nil {
		rec.Net.NextTry = time.Time{}
	}
	must(r.t, j.save(rec))
}

// end runs until there is a verdict, which must be the wanted one and the truth.
func (r *running) end(want string) {
	r.t.Helper()
	var last error
	for range 40 {
		if last = r.next(last); r.verdict() != nil {
			break
		}
	}
	statuses, final, logs := r.setup.server.history(r.dep)
	if v := r.verdict(); v == nil || final != want || (want == "failure") != (len(logs) > 0) {
		r.t.Fatalf("got %+v, statuses %q, final %q, %d log lines, want %q; last error: %v\n%s",
			v, statuses, final, len(logs), want, last, strings.Join(*r.said, "\n"))
	}
	must(r.t, r.check("new"))
	must(r.t, r.setup.told(r.simDevice, r.dep, "new"))
}

// verdict is that on the deployment, once it has ended.
func (r *running) verdict() *verdict {
	rec, err := r.peek()
	must(r.t, err)
	if rec.Update != nil || rec.Last == nil || rec.Last.ID != r.dep.id {
		return nil
	}
	return rec.Last
}

// downloads answers the n-th request for the artifact (from 1) by f, if that returns true.
func (r *running) downloads(f func(n int, w http.ResponseWriter, q *http.Request, text []byte) bool) {
	n := 0
	r.setup.server.setFault(func(route string, w http.ResponseWriter, q *http.Request) bool {
		if route != "GET artifact" {
			return false
		}
		n++
		return f(n, w, q, r.setup.server.artifacts["new"])
	})
}

// partly promises all of text and sends the first n bytes of it.
func partly(w http.ResponseWriter, text []byte, n int) {
	w.Header().Set("ETag", testETag(text))
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.Write(text[:n])
	http.NewResponseController(w).Flush()
}

func hangUp() { panic(http.ErrAbortHandler) }

// raw answers with the header lines and body as they are.
func raw(w http.ResponseWriter, header string, body ...[]byte) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	fmt.Fprintf(conn, "HTTP/1.1 %s\r\nConnection: close\r\n\r\n", header)
	for _, b := range body {
		if _, err := conn.Write(b); err != nil {
			return
		}
	}
}

const someBytes = 20000 // of an artifact of some 36,000: behind the header, before the end

func TestRunOverBadDownloads(t *testing.T) {
	t.Parallel()
	// instead answers the first n requests by f.
	type answer = func(*running, int, http.ResponseWriter, *http.Request, []byte) bool
	instead := func(n int, f func(w http.ResponseWriter)) answer {
		return func(_ *running, i int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			if i <= n {
				f(w)
			}
			return i <= n
		}
	}
	page := func(w http.ResponseWriter) { io.WriteString(w, "<html><title>Log in</title>") }
	sized := func(n, off int) string { return fmt.Sprintf("200 OK\r\nContent-Length: %d", n+off) }
	ranged := func(head string) func(*running, int, http.ResponseWriter, *http.Request, []byte) bool {
		return func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			if n == 1 {
				partly(w, text, someBytes)
				hangUp()
			}
			raw(w, strings.NewReplacer("FROM", strconv.Itoa(start(q)), "SIZE", strconv.Itoa(len(text)), "LAST",
				strconv.Itoa(len(text)-1)).Replace(head), text[start(q):])
			return true
		}
	}
	for _, c := range []struct {
		name, want string
		f          func(r *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool
	}{
		// Field case 15.
		{"stall after headers", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			if n == 1 {
				partly(w, text, 0)
				<-q.Context().Done()
			}
			return n == 1
		}},
		{"stall in the middle", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			if n <= 2 {
				partly(w, text, someBytes)
				<-q.Context().Done()
			}
			return n <= 2
		}},
		{"stall but for a byte a minute", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			for i := 0; n == 1 && i < len(text) && q.Context().Err() == nil; i++ {
				if i == 0 {
					partly(w, text, 0)
				}
				w.Write(text[i : i+1])
				http.NewResponseController(w).Flush()
				time.Sleep(5 * time.Millisecond) // slower than the test's stall time allows
			}
			return n == 1
		}},
		{"closes at random", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			if n%2 == 1 && start(q) == 0 {
				partly(w, text, n*1500)
				hangUp()
			}
			return false
		}},
		// Field case 16.
		{"range ignored", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			if n == 1 {
				partly(w, text, someBytes)
				hangUp()
			}
			raw(w, sized(len(text), 0), text)
			return true
		}},
		{"right range", "success", ranged("206 Partial Content\r\nContent-Range: bytes FROM-LAST/SIZE")},
		{"late range", "failure", ranged("206 Partial Content\r\nContent-Range: bytes 30000-LAST/SIZE")},
		{"early range", "failure", ranged("206 Partial Content\r\nContent-Range: bytes 3-LAST/SIZE")},
		{"range of another file", "failure", ranged("206 Partial Content\r\nContent-Range: bytes FROM-LAST/99999")},
		{"garbled range", "failure", ranged("206 Partial Content\r\nContent-Range: bytes")},
		{"multipart answer", "failure", ranged("206 Partial Content\r\nContent-Type: multipart/byteranges; boundary=x")},
		{"redirect loop", "failure", func(_ *running, n int, w http.ResponseWriter, q *http.Request, _ []byte) bool {
			http.Redirect(w, q, q.URL.String(), http.StatusFound)
			return true
		}},
		{"no use for a range", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			if n == 1 {
				partly(w, text, someBytes)
				hangUp()
			}
			if start(q) > 0 {
				http.Error(w, "what is that?", http.StatusBadRequest)
			}
			return start(q) > 0
		}},
		// Something else in the artifact's place.
		{"a portal's page, for a while", "success", instead(7, page)},
		{"a portal's page, in the middle", "success",
			func(r *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
				if n == 1 {
					partly(w, text, someBytes)
					hangUp()
				}
				return instead(7, page)(r, n, w, q, text)
			}},
		{"an error page with status 200, for good", "failure", instead(1000, func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "Sorry")
		})},
		{"an error as JSON with status 200, for a while", "success", instead(3, func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"error":"busy"}`)
		})},
		{"nothing with status 200, for a while", "success", instead(3, func(w http.ResponseWriter) {})},
		{"an artifact that is called a page", "success",
			func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
				w.Header().Set("Content-Type", "text/html")
				return false
			}},
		// Replicas that know the same file under other tags, and connections that do not last.
		{"replicas", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			raw(w, fmt.Sprintf("206 Partial Content\r\nContent-Range: bytes %d-%d/%d\r\nETag: \"%d\"\r\nLast-Modified: %s",
				start(q), len(text)-1, len(text),
				n, time.Unix(int64(n), 0).UTC().Format(http.TimeFormat)), text[start(q):min(len(text), start(q)+3000)])
			return true
		}},
		// Field case 17.
		{"link expires in the middle", "success", func(r *running, n int, w http.ResponseWriter, q *http.Request,
			text []byte) bool {
			if n == 1 {
				partly(w, text, someBytes)
				r.setup.server.expireLinks()
				hangUp()
			}
			return false
		}},
		{"gone", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			if n == 1 {
				http.Error(w, "gone", http.StatusGone)
			}
			return n == 1
		}},
		{"forbidden for good", "failure", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			http.Error(w, "no", http.StatusForbidden)
			return true
		}},
		// Field case 18.
		{"429", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			if n <= 3 {
				w.Header().Set("Retry-After", "9")
				http.Error(w, "slowly", http.StatusTooManyRequests)
			}
			return n <= 3
		}},
		{"503, huge Retry-After", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request,
			text []byte) bool {
			if n == 1 {
				w.Header().Set("Retry-After", "99999999999999999999")
				http.Error(w, "later", http.StatusServiceUnavailable)
			}
			return n == 1
		}},
		{"token expires during the download", "success",
			func(r *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
				r.setup.server.expireTokens()
				return false
			}},
		// Field case 19.
		{"longer than it says", "failure", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			raw(w, sized(someBytes, 0), text)
			return true
		}},
		{"shorter than it says, once", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request,
			text []byte) bool {
			if n == 1 {
				raw(w, sized(len(text), 1000), text)
			}
			return n == 1
		}},
		{"no length", "success", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			raw(w, "200 OK", text)
			return true
		}},
		{"endless", "failure", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			raw(w, "200 OK", text, slices.Repeat([]byte{0}, 20<<20))
			return true
		}},
		{"half, and no length", "failure", func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
			raw(w, "200 OK", text[:someBytes])
			return true
		}},
		// Field case 12.
		{"changed under the same URL", "failure", func(_ *running, n int, w http.ResponseWriter, q *http.Request,
			text []byte) bool {
			if n == 1 {
				partly(w, text, someBytes)
				hangUp()
			}
			other := slices.Clone(text)
			other[len(other)/2+8000] ^= 1
			raw(w, fmt.Sprintf("206 Partial Content\r\nContent-Range: bytes %d-%d/%d", start(q), len(text)-1, len(text)),
				other[start(q):])
			return true
		}},
		{"changed under the same URL, and said so", "success",
			func(_ *running, n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
				if n == 1 {
					other := slices.Clone(text)
					other[someBytes-100] ^= 1
					partly(w, other, someBytes)
					hangUp()
				}
				return false
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRunning(t, newManagedSetup(t))
			if strings.HasPrefix(c.name, "stall") {
				r.stall = shortStall
			}
			r.downloads(func(n int, w http.ResponseWriter, q *http.Request, text []byte) bool { return c.f(r, n, w, q, text) })
			r.end(c.want)
		})
	}
}

// Field case 17: the new link is used from where the old one ended.
func TestRunGoesOnBehindNewLink(t *testing.T) {
	r := newRunning(t, newManagedSetup(t))
	s := r.setup.server
	r.downloads(func(n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
		if n == 1 {
			partly(w, text, someBytes)
			s.expireLinks()
			hangUp()
		}
		return false
	})
	r.end("success")
	want := fmt.Sprintf("GET artifact bytes=%d-", someBytes)
	if n := len(s.artifacts["new"]); !slices.Contains(s.log, want) || s.sent > int64(n-someBytes) {
		t.Errorf("got requests %q and %d bytes, want %q and %d bytes", s.log, s.sent, want, n-someBytes)
	}
}

// Somebody between the device and the server it knows, as a portal is: no verdict on the deployment,
// as long as it is that server; an artifact on a server that is never trusted is given up.
func TestRunUntrusted(t *testing.T) {
	t.Parallel()
	from, to := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	ours, other := newTestCA(t, from, to), newTestCA(t, from, to)
	portal := false
	config := func(*tls.ClientHelloInfo) (*tls.Config, error) {
		ca := ours
		if portal {
			ca = other
		}
		leaf := ca.issue(t, false)
		certificate := tls.Certificate{Certificate: [][]byte{leaf.cert.Raw}, PrivateKey: leaf.key}
		return &tls.Config{SessionTicketsDisabled: true, Certificates: []tls.Certificate{certificate}}, nil
	}
	s := newManagedSetup(t)
	s.server = startServer(t, &tls.Config{GetConfigForClient: config})
	s.server.autoAccept = true
	r := newRunning(t, s)
	r.tune = func(a *app) { a.c.ServerCertificate, a.c.Connectivity.DisableKeepAlive = ours.pem, true }
	r.downloads(func(n int, w http.ResponseWriter, q *http.Request, text []byte) bool {
		if n == 1 {
			partly(w, text, someBytes)
			portal = true
			hangUp()
		}
		return false
	})
	wantCode(t, r.once(), exitTempFail)
	for range 15 { // more than downloads without progress
		r.patience()
		if wantCode(t, r.again(), exitTempFail); r.verdict() != nil {
			t.Fatalf("the deployment has ended: %+v", r.verdict())
		}
	}
	portal = false
	r.patience()
	r.end("success")

	s = newManagedSetup(t)
	r = newRunning(t, s)
	away := tlsServer(t, other, &tls.Config{})
	r.downloads(func(_ int, w http.ResponseWriter, q *http.Request, _ []byte) bool {
		http.Redirect(w, q, away.URL, http.StatusFound)
		return true
	})
	r.end("failure")
	if !strings.Contains(strings.Join(*r.said, "\n"), "no progress in 10 downloads") {
		t.Errorf("said %q", *r.said)
	}
}

// Field case 16: from https to http, never; to another host, without credentials.
func TestRunRedirects(t *testing.T) {
	for _, secure := range []bool{false, true} {
		other := newTestServer(t, secure)
		var header http.Header
		other.setFault(func(_ string, _ http.ResponseWriter,
			q *http.Request) bool {
			header = q.Header.Clone()
			return false
		})
		s := newManagedSetup(t)
		s.server = newTestServer(t, true)
		s.server.autoAccept = true
		r := newRunning(t, s)
		other.artifacts["new"] = s.server.artifacts["new"]
		r.tune = func(a *app) { a.c.SkipVerify = true }
		r.downloads(func(_ int, w http.ResponseWriter, q *http.Request, _ []byte) bool {
			http.Redirect(w, q, other.link("new"), http.StatusFound)
			return true
		})
		r.end(map[bool]string{false: "failure", true: "success"}[secure])
		if secure == (header == nil) || header.Get("Authorization") != "" || header.Get("Referer") != "" {
			t.Errorf("https %v: the other host got %v", secure, header)
		}
	}
}

// Field case 18: what the server asks for is kept to, within reason, by runs that come too
// early, and costs no request.
func TestRunRetryAfter(t *testing.T) {
	for _, c := range []struct {
		code  int
		after string
		want  time.Duration
	}{
		{429, "1200", 20 * time.Minute},
		{503, "DATE", 20 * time.Minute},
		{429, "-5", time.Minute},
		{503, "", time.Minute},
		{500, "soon", time.Minute},
		{429, "99999999999999", 24 * time.Hour},
		{404, "", time.Minute}, // not the server that it should be: no reason to ask each second
	} {
		r := newRunning(t, newManagedSetup(t))
		s, failing := r.setup.server, true
		s.setFault(func(route string, w http.ResponseWriter, _ *http.Request) bool {
			if !failing || route != "POST next" && !(c.code == 404 && strings.HasSuffix(route, "next")) {
				return false
			}
			after := c.after
			if after == "DATE" {
				after = time.Now().Add(20 * time.Minute).UTC().Format(http.TimeFormat)
			}
			w.Header().Set("Retry-After", after)
			apiError(w, c.code, "not now")
			return true
		})
		began := time.Now()
		err := r.once()
		if code := exitCode(err); code != exitTempFail && !(c.code == 404 && code == exitFailed) {
			t.Errorf("%d, %q: got %v (exit code %d)", c.code, c.after, err, code)
		}
		rec, err := r.peek()
		must(t, err)
		if next := rec.Net.NextTry.Sub(began); next < c.want-3*time.Second || next > c.want+time.Minute {
			t.Errorf("%d, Retry-After %q: next try after %s, want %s", c.code, c.after, next, c.want)
		}
		if named := strings.Contains(rec.Net.Failure, "the server asks"); named != (c.want != time.Minute) ||
			!strings.Contains(rec.Net.Failure, strconv.Itoa(c.code)) {
			t.Errorf("%d, %q: the journal has %q", c.code, c.after, rec.Net.Failure)
		}
		requests := len(s.log)
		wantCode(t, r.again(), exitTempFail)
		if len(s.log) != requests {
			t.Errorf("%d, Retry-After %q: a run that came too early sent %q", c.code, c.after, s.log[requests:])
		}
		failing = false
		r.patience()
		r.end("success")
	}
}

// Field case 18: an operator aborts the deployment at each report of it.
func TestRunAborted(t *testing.T) {
	for n, c := range []struct {
		statuses string
		result   string
	}{
		{"downloading failure", "failed"},
		{"downloading installing failure", "failed"},
		{"downloading installing rebooting failure", "rolled-back"},
		{"downloading installing rebooting installing failure", "rolled-back"},
		{"downloading installing rebooting installing success", "committed"}, // too late
	} {
		r := newRunning(t, newManagedSetup(t))
		s, seen := r.setup.server, 0
		s.setFault(func(route string, _ http.ResponseWriter, _ *http.Request) bool {
			if route == "PUT status" {
				if seen++; seen == n+1 {
					s.abort(r.dep)
				}
			}
			return false
		})
		var err error
		for range 8 {
			if err = r.next(err); r.verdict() != nil {
				break
			}
		}
		statuses, final, _ := s.history(r.dep)
		if got := strings.Join(statuses, " "); got != c.statuses || final != "aborted" {
			t.Errorf("aborted at %d: got %q, %s, want %q", n+1, got, final, c.statuses)
		}
		if v := r.verdict(); v == nil || v.Result != c.result {
			t.Errorf("aborted at %d: got %+v, want %s", n+1, v, c.result)
		}
		must(t, r.check("new"))
	}
}

// A download that takes long is told of each minute, and ends soon when it was aborted; that the server
// does not answer to that is no reason to stop.
func TestRunAbortedInDownload(t *testing.T) {
	for _, c := range []struct {
		name   string
		status int // of the answer to the second report; 0: aborted
	}{{"aborted", 0}, {"not now", 503}, {"not there", 404}} {
		r := newRunning(t, newManagedSetup(t))
		s, reports := r.setup.server, 0
		s.setFault(func(route string, w http.ResponseWriter, _ *http.Request) bool {
			if route != "PUT status" {
				return false
			}
			if reports++; reports != 2 {
				return false
			}
			if c.status == 0 {
				s.abort(r.dep)
				return false
			}
			w.WriteHeader(c.status)
			return true
		})
		now := time.Unix(1e9, 0)
		var last *app
		r.tune = func(a *app) {
			last = a
			a.o.net.limitRate = 8000 // so a read gives a thousand bytes, some forty in all
			a.o.now = func() time.Time { now = now.Add(11 * time.Second); return now }
		}
		err := r.once()
		statuses, _, _ := s.history(r.dep)
		if got := strings.Join(statuses, " "); c.status == 0 && got != "downloading downloading failure" {
			t.Errorf("%s: got %v, statuses %q", c.name, err, got)
		}
		size := int64(len(s.artifacts["new"]))
		if got := last.fetched.Load(); c.status == 0 && got > size/2 || c.status != 0 && got < size {
			t.Errorf("%s: %d bytes of %d were fetched", c.name, got, size)
		}
		if v := r.verdict(); c.status == 0 && (v == nil || v.Result != "failed" || !strings.Contains(v.Cause, "aborted")) ||
			c.status != 0 && (exitCode(err) != exitReboot || s.count("PUT status") < 4) {
			t.Errorf("%s: got %v, verdict %+v, %d reports", c.name, err, v, s.count("PUT status"))
		}
	}
}

// Issue 3, 4: reports are tried again, the one before the commit and the last one for a
// bounded number of times; and no report is a reason to wedge.
func TestRunReportsFail(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		fails  func(n int, status string) bool // of the n-th report
		final  string
		result string
	}{
		{"each once", func(n int, _ string) bool { return n%2 == 1 }, "success", "committed"},
		{"before the commit, for a while", func(n int, _ string) bool { return n >= 3 && n < 8 }, "success", "committed"},
		{"before the commit, for good", func(n int, s string) bool { return n >= 4 && s == "installing" },
			"failure", "rolled-back"},
		// Told before the next question, as the server would otherwise find other provides.
		{"the last, until it is given up", func(n int, s string) bool { return s == "success" && n < 5+12 },
			"success", "committed"},
	} {
		for _, code := range []int{404, 503} {
			r := newRunning(t, newManagedSetup(t))
			s, n := r.setup.server, 0
			s.setFault(func(route string, w http.ResponseWriter, q *http.Request) bool {
				if route != "PUT status" {
					return false
				}
				n++
				body, _ := io.ReadAll(q.Body)
				q.Body = io.NopCloser(strings.NewReader(string(body)))
				status := strings.Split(string(body), `"`)[3]
				if c.fails(n, status) {
					apiError(w, code, "no")
					return true
				}
				return false
			})
			var err error
			for range 60 {
				if err = r.next(err); r.verdict() != nil {
					break
				}
			}
			r.next(nil) // tells what is owed
			statuses, final, _ := s.history(r.dep)
			if v := r.verdict(); v == nil || v.Result != c.result || final != c.final {
				t.Errorf("%s, %d: got %+v, %q, %s\n%s", c.name, code, v, statuses, final, strings.Join(*r.said, "\n"))
			}
			must(t, r.check("new"))
		}
	}
}

// A run that is told to end while it waits for the server has not tried.
func TestRunStoppedInReport(t *testing.T) {
	for _, at := range []string{"POST auth", "PUT status"} {
		r := newRunning(t, newManagedSetup(t))
		wantCode(t, r.once(), exitReboot)
		must(t, r.boot())
		ctx, stop := context.WithCancel(t.Context())
		r.setup.server.setFault(func(route string, _ http.ResponseWriter, q *http.Request) bool {
			if route == at {
				io.Copy(io.Discard, q.Body)
				stop()
				<-q.Context().Done()
			}
			return route == at
		})
		wantCode(t, r.managedRun(ctx, r.server, nil), exitTempFail)
		r.setup.server.setFault(nil)
		must(t, r.again())
		r.end("success")
	}
}

// A new system that has lost its server, or its key, is one that cannot reach the server.
func TestRunNewSystemWithoutServer(t *testing.T) {
	for name, spoil := range map[string]func(a *app){
		"no server":  func(a *app) { a.c.Servers = nil },
		"no key":     func(a *app) { a.c.Security.AuthPrivateKey = "/nonexistent" },
		"no CA file": func(a *app) { a.c.extraRoots = "/nonexistent" },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunning(t, newManagedSetup(t))
			r.tune = func(a *app) {
				a.c.RetryPollCount = 3
				if r.booted == "B" {
					spoil(a)
				}
			}
			wantCode(t, r.once(), exitReboot)
			must(t, r.boot())
			for range 2 {
				wantCode(t, r.again(), exitTempFail)
				r.patience()
			}
			wantCode(t, r.again(), exitReboot)
			must(t, r.boot())
			r.end("failure")
		})
	}
}

// Field case 20: clocks in 1970 and 2100, and jumps during the run.
func TestRunClocks(t *testing.T) {
	now := time.Now()
	ca := newTestCA(t, now.Add(-time.Hour), now.Add(24*time.Hour))
	leaf := ca.issue(t, false)
	year := func(y int) func() time.Time {
		return func() time.Time { return time.Date(y, 1, 1, 0, 0, 0, 0, time.UTC) }
	}
	calls := 0
	for _, c := range []struct {
		name string
		now  func() time.Time
		late bool // it has to wait for the clock to be set
	}{
		{"1970", year(1970), false}, // the journal knows better
		{"2100", year(2100), true},
		{"jumps 50 years", func() time.Time { calls++; return now.Add(time.Minute).AddDate(50*min(calls-1, 1), 0, 0) },
			false},
		{"jumps back", func() time.Time { calls++; return now.Add(time.Minute).AddDate(-50*min(calls-1, 1), 0, 0) }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newManagedSetup(t)
			s.server = startServer(t, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.cert.Raw},
				PrivateKey: leaf.key}}})
			s.server.autoAccept = true
			r := newRunning(t, s)
			clock := c.now
			r.tune = func(a *app) {
				a.c.ServerCertificate = ca.pem
				a.o.net.tuneNet = func(o *netOptions) { calls, o.now = 0, clock }
			}
			if c.late {
				wantCode(t, r.once(), exitTempFail)
				if r.verdict() != nil || len(s.server.log) != 0 {
					t.Fatalf("got %+v, %q", r.verdict(), s.server.log)
				}
				clock = time.Now
				r.patience()
			}
			r.end("success")
		})
	}
}

// Field case 21: everything goes through the proxy, by name; this machine needs none.
func TestRunProxy(t *testing.T) {
	for _, spelling := range []string{"http_proxy", "HTTP_PROXY"} {
		s := newManagedSetup(t)
		r := newRunning(t, s)
		seen := map[string]bool{}
		target, err := url.Parse(s.server.URL)
		must(t, err)
		p := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			seen[q.URL.Host+" "+q.Header.Get("Proxy-Authorization")] = true
			q.URL.Host, q.RequestURI = target.Host, ""
			q.Header.Del("Proxy-Authorization")
			resp, err := http.DefaultTransport.RoundTrip(q)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			defer resp.Body.Close()
			w.WriteHeader(resp.StatusCode)
			io.Copy(w, resp.Body)
		}))
		t.Cleanup(p.Close)
		proxy := "http://us%40er:pw@" + p.Listener.Addr().String()
		env := map[string]string{spelling: proxy, "no_proxy": "other.test, 192.0.2.0/24 .sub.test"}
		r.tune = func(a *app) {
			a.o.net.tuneNet = func(o *netOptions) { o.getenv = func(k string) string { return env[k] } }
		}
		r.server = "http://mender.test"
		r.end("success")
		if len(seen) != 1 || !seen["mender.test Basic dXNAZXI6cHc="] {
			t.Errorf("the proxy saw %v", seen)
		}
	}
}

// Issue 3, 2: the body of the question stays the same while a deployment is in progress,
// whatever else has changed; the server fails the deployment otherwise.
func TestRunAsksInTheSameWords(t *testing.T) {
	r := newRunning(t, newManagedSetup(t))
	r.tune = func(a *app) { a.c.RetryDownloadCount = 1 }
	r.downloads(func(n int, w http.ResponseWriter, _ *http.Request, text []byte) bool {
		partly(w, text, someBytes)
		hangUp()
		return true
	})
	wantCode(t, r.once(), exitTempFail)
	j, rec, _, _, err := readJournal(simStorage{r.w, r.w.files["/sim/journal"]})
	must(t, err)
	rec.Provides["data-partition.app.version"] = "2"
	must(t, j.save(rec))
	r.patience()
	r.setup.server.setFault(nil)
	r.end("success")
}

// MEN-9098's neighbour, field case 30: a verdict that the server has not heard is told
// again when it offers the deployment again, and nothing is installed.
func TestRunTellsVerdictAgain(t *testing.T) {
	s := newManagedSetup(t)
	r := newRunning(t, s)
	r.downloads(func(_ int, w http.ResponseWriter, _ *http.Request, text []byte) bool {
		raw(w, "200 OK", text[:someBytes])
		return true
	})
	r.end("failure")
	s.server.mu.Lock()
	for _, run := range r.dep.devices { // restored from a backup
		run.status, run.history, run.logs = "pending", nil, nil
	}
	s.server.mu.Unlock()
	before := s.server.count("GET artifact")
	must(t, r.once())
	statuses, final, logs := s.server.history(r.dep)
	if final != "failure" || len(statuses) != 1 || len(logs) == 0 || s.server.count("GET artifact") != before {
		t.Errorf("got %q, %q, %d log lines", statuses, final, len(logs))
	}
}

// What mender-configure has applied is sent once, and again after it has changed.
func TestRunSendsConfiguration(t *testing.T) {
	r := newRunning(t, newManagedSetup(t))
	r.end("success")
	s := r.setup.server
	if n := s.count("PUT configuration"); n != 0 {
		t.Fatalf("got %d reports without mender-configure", n)
	}
	file := filepath.Join(r.root, appliedConfig)
	must(t, os.MkdirAll(filepath.Dir(file), 0o755))
	for i, text := range []string{`{"timezone":"UTC"}`, `{"timezone":"UTC"}`, `{"timezone":"CET"}`, `{"timezone"`} {
		must(t, os.WriteFile(file, []byte(text), 0o600))
		must(t, r.managedRun(t.Context(), r.server, func(a *app) { a.c.InventoryPollIntervalSeconds = -1 }))
		if n, want := s.count("PUT configuration"), []int{1, 1, 2, 2}[i]; n != want {
			t.Errorf("%s: got %d reports, want %d", text, n, want)
		}
	}
	if got := s.deviceByID(simIdentity).configuration; got != `{"timezone":"CET"}` {
		t.Errorf("got configuration %s", got)
	}
}

// A poll that finds nothing is one connection and one request, once a run before it has logged in.
func TestRunIdleCost(t *testing.T) {
	for _, v2 := range []bool{false, true} {
		s := newManagedSetup(t)
		s.server = newTestServer(t, true)
		s.server.autoAccept, s.server.v2 = true, v2
		d := newSimDevice(t, s.dir, s.images)
		must(t, d.boot())
		for i := range 3 {
			before, conns := s.server.heard()
			must(t, d.managedRun(t.Context(), s.server.URL, func(a *app) { a.c.SkipVerify = true }))
			after, all := s.server.heard()
			if got := after[len(before):]; i > 0 && (len(got) != 1 || all != conns+1) {
				t.Errorf("v2 %v: got requests %q over %d connections", v2, got, all-conns)
			}
		}
	}
}
