// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
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

	plain := newTestServer(t, false)
	plain.setFault(func(route string, w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, other.link("a"), http.StatusTemporaryRedirect)
		return true
	})
	a := apiFor(t, plain)
	err = a.authenticate(t.Context())
	if err == nil || !strings.Contains(err.Error(), "another host") || header != nil {
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

func start(r *http.Request) int {
	var n int
	fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &n)
	return n
}

func TestDownload(t *testing.T) {
	f := newFlaky(t, 100_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) { f.serve(w, r) })
	_, d, err := f.get(t, downloadOptions{})
	must(t, err)
	if d.Size != 100_000 || d.ETag != `"one"` || d.Fetched != 100_000 || d.URLKey != f.URL+"/a" {
		t.Fatalf("got %+v", d)
	}
	_, d, err = f.get(t, downloadOptions{offset: 60_000, size: 100_000, etag: `"one"`})
	must(t, err)
	if d.Fetched != 40_000 || f.ranges[1] != "bytes=60000-" {
		t.Fatalf("got %d bytes, ranges %q", d.Fetched, f.ranges)
	}
	if _, _, err = f.get(t, downloadOptions{offset: 100_000, size: 100_000}); err != nil || len(f.ranges) != 2 {
		t.Fatalf("got %v, ranges %q, want no request for nothing", err, f.ranges)
	}
	if _, _, err = f.get(t, downloadOptions{offset: 100_001}); !errors.Is(err, errChanged) {
		t.Fatalf("got %v, want errChanged", err)
	}
}

// Field case 15: the connection closes at random. More cuts than retries: the budget comes
// back with progress (rauc#1517; the C++ client's ten are for the whole download).
func TestDownloadResumes(t *testing.T) {
	f := newFlaky(t, 90_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		code, from := 206, start(r)
		if from == 0 {
			code = 200
		}
		if from > 0 && n > 1 && r.Header.Get("If-Range") != `"one"` {
			t.Errorf("request %d: got If-Range %q", n, r.Header.Get("If-Range"))
		}
		w.Header().Set("ETag", `"one"`)
		f.part(w, code, from, min(from+3000, len(f.data)))
	})
	_, d, err := f.get(t, downloadOptions{retries: 2})
	must(t, err)
	if d.Fetched != 90_000 || len(f.ranges) != 30 || len(f.fast.slept) != 29 {
		t.Fatalf("got %d bytes in %d requests, %d waits", d.Fetched, len(f.ranges), len(f.fast.slept))
	}
	if f.fast.slept[28] > 3*time.Second {
		t.Errorf("wait %s: it did not begin anew with progress", f.fast.slept[28])
	}
}

// Field case 15: no connection at first, then none for too long.
func TestDownloadServerDown(t *testing.T) {
	f := newFlaky(t, 10_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		if n < 4 {
			panic(http.ErrAbortHandler)
		}
		f.serve(w, r)
	})
	_, _, err := f.get(t, downloadOptions{retries: 3})
	must(t, err)
	f.Close()
	_, _, err = f.get(t, downloadOptions{retries: 3})
	wantCode(t, err, exitTempFail)
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the error tells the presigned URL: %v", err)
	}
	if len(f.fast.slept) != 6 || f.fast.slept[5] < 8*time.Second {
		t.Errorf("got waits %s", f.fast.slept)
	}
}

// Field case 15: hangs before the header, after it, and one byte a minute. The stall time
// here is short, and what the server does would last for ever.
func TestDownloadStalls(t *testing.T) {
	t.Parallel()
	for name, stuck := range map[string]func(w http.ResponseWriter, r *http.Request){
		"before header": func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"after header": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "50000")
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		},
		"slow retrieval": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "50000")
			for r.Context().Err() == nil {
				w.Write([]byte{0})
				http.NewResponseController(w).Flush()
				sleepContext(r.Context(), 10*time.Millisecond)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFlaky(t, 50_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
				if n == 1 {
					stuck(w, r)
					return
				}
				f.serve(w, r)
			})
			o := downloadOptions{stall: 100 * time.Millisecond, sleep: f.fast.sleep}
			d, err := openDownload(t.Context(), f.hc, f.URL, o)
			must(t, err)
			n, err := io.Copy(io.Discard, d)
			if err != nil || n != 50_000 || len(f.ranges) < 2 { // more on a machine that is busy
				t.Fatalf("got %d bytes, %v, ranges %q", n, err, f.ranges)
			}
			d.Close()

			g := newFlaky(t, 50_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) { stuck(w, r) })
			_, _, err = g.get(t, downloadOptions{stall: 50 * time.Millisecond, retries: 2})
			wantCode(t, err, exitTempFail)
		})
	}
}

// Field case 16, and the outcomes that Mender's own http_resumer_test pins.
func TestDownloadContentRange(t *testing.T) {
	for _, c := range []struct {
		values []string
		ok     bool
	}{
		{[]string{"bytes 3000-8999/9000"}, true},
		{[]string{"bytes 3000-8999/*"}, true},
		{[]string{"bytes 3000-8999"}, true},
		{nil, false}, {[]string{""}, false}, {[]string{"garbage"}, false},
		{[]string{"bytes 2999-8999/9000"}, false},
		{[]string{"bytes 3001-8999/9000"}, false},
		{[]string{"bytes 3000-8998/9000"}, false},
		{[]string{"bytes 3000-9000/9001"}, false},
		{[]string{"bytes 3000-8999/9001"}, false},
		{[]string{"bytes 3000-8999/9000", "bytes 3000-8999/9000"}, false},
		{[]string{"bytes 3000--8999/9000"}, false}, {[]string{"bytes -3000-8999/9000"}, false},
		{[]string{"bytes +3000-8999/9000"}, false}, {[]string{"bytes 3000-8999/9000x"}, false},
		{[]string{"bytes 3000-x/9000"}, false}, {[]string{"bytes  3000-8999/9000"}, false},
		{[]string{"bytes 3000-8999/"}, false}, {[]string{"bytes */9000"}, false}, {[]string{"items 3000-8999/9000"}, false},
		{[]string{"bytes 3000-9223372036854775807/9223372036854775808"}, false},
		{[]string{"bytes 3000-99999999999999999999/9000"}, false},
	} {
		f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
			if n == 1 {
				f.part(w, 200, 0, 3000)
			}
			w.Header()["Content-Range"] = c.values
			w.WriteHeader(206) // no Content-Length: a missing one is fine
			w.Write(f.data[3000:])
		})
		_, _, err := f.get(t, downloadOptions{})
		if (err == nil) != c.ok || err != nil && exitCode(err) != exitFailed {
			t.Errorf("%q: got %v, want ok %v", c.values, err, c.ok)
		}
		if len(f.ranges) != 2 {
			t.Errorf("%q: got %d requests, want no retry of a clear answer", c.values, len(f.ranges))
		}
	}
}

// Field case 16: a multipart answer, a 206 that nobody asked for, an encoding.
func TestDownloadOddAnswers(t *testing.T) {
	for name, answer := range map[string]func(f *flaky, w http.ResponseWriter, r *http.Request){
		"multipart": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			r.Header.Set("Range", "bytes=3000-3999,5000-8999")
			f.serve(w, r)
		},
		"encoding": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			f.serve(w, r)
		},
		"no content": func(f *flaky, w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) },
		"redirect without location": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(304)
		},
	} {
		f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) { answer(f, w, r) })
		_, _, err := f.get(t, downloadOptions{offset: 3000})
		if exitCode(err) != exitFailed || len(f.ranges) != 1 {
			t.Errorf("%s: got %v after %d requests", name, err, len(f.ranges))
		}
	}
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-8999/9000")
		w.WriteHeader(206)
	})
	if _, _, err := f.get(t, downloadOptions{}); exitCode(err) != exitFailed {
		t.Errorf("206 for a request without Range: got %v", err)
	}
}

// Field case 16: a server that ignores Range is read over, and the user is told.
func TestDownloadNoRanges(t *testing.T) {
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		f.part(w, 200, 0, min(n*3000, 9000))
	})
	var lines []string
	lg := &logger{sinks: []logSink{func(_ logLevel, m string) { lines = append(lines, m) }}}
	_, d, err := f.get(t, downloadOptions{retries: 1, lg: lg})
	must(t, err)
	if d.Fetched != 3000+6000+9000 || !strings.Contains(strings.Join(lines, "\n"), "ignores ranges") {
		t.Fatalf("got %d bytes, said %q", d.Fetched, lines)
	}
}

// Field case 12: other bytes under the same URL between two requests.
func TestDownloadChanged(t *testing.T) {
	for name, second := range map[string]func(f *flaky, w http.ResponseWriter, r *http.Request){
		"etag, range honoured": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			r.Header.Del("If-Range")
			w.Header().Set("ETag", `"two"`)
			f.serve(w, r)
		},
		"etag, whole file": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"two"`)
			f.serve(w, r)
		},
		"size, whole file": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "9001")
			w.WriteHeader(200)
		},
		"size, range": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 3000-9000/9001")
			w.WriteHeader(206)
		},
		"shorter": func(f *flaky, w http.ResponseWriter, r *http.Request) { w.WriteHeader(416) },
	} {
		f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
			if n == 1 {
				w.Header().Set("ETag", `"one"`)
				f.part(w, 200, 0, 3000)
			}
			second(f, w, r)
		})
		if _, _, err := f.get(t, downloadOptions{}); !errors.Is(err, errChanged) || exitCode(err) != exitFailed {
			t.Errorf("%s: got %v, want errChanged", name, err)
		}
		// The same in another process.
		_, _, err := f.get(t, downloadOptions{offset: 3000, size: 9000, etag: `"one"`})
		if !errors.Is(err, errChanged) {
			t.Errorf("%s, later: got %v, want errChanged", name, err)
		}
	}
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Last-Modified", "Mon, 02 Jan 2006 15:04:06 GMT")
		w.Header().Set("Content-Range", "bytes 3000-8999/9000")
		w.WriteHeader(206)
	})
	_, _, err := f.get(t, downloadOptions{offset: 3000, lastModified: "Mon, 02 Jan 2006 15:04:05 GMT"})
	if !errors.Is(err, errChanged) {
		t.Errorf("date: got %v, want errChanged", err)
	}
}

// Field case 17: the link expires; the download goes on at the same offset under a new one.
func TestDownloadRelink(t *testing.T) {
	s := newTestServer(t, false)
	data := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	s.artifacts["a"] = data
	first := true
	s.setFault(func(_ string, w http.ResponseWriter, r *http.Request) bool {
		if !first {
			return false
		}
		first = false
		f := &flaky{data: data}
		s.expireLinks()
		f.part(w, 200, 0, 20_000)
		return true
	})
	c := testConfig(t)
	asked := 0
	o := downloadOptions{sleep: (&fastSleep{}).sleep, relink: func(context.Context) (string, error) { asked++; return s.link("a"), nil }}
	d, err := openDownload(t.Context(), testHTTPClient(t, c, netOptions{}), s.link("a"), o)
	must(t, err)
	got, err := io.ReadAll(d)
	if err != nil || !bytes.Equal(got, data) || asked != 1 || d.Fetched != int64(len(data)) {
		t.Fatalf("got %d bytes, %v, asked %d times, fetched %d", len(got), err, asked, d.Fetched)
	}
}

func TestDownloadFinalStatus(t *testing.T) {
	for code, want := range map[int]int{400: 1, 401: 1, 403: 1, 404: 1, 410: 1, 451: 1, 408: 4, 425: 4, 429: 4, 500: 4, 502: 4, 503: 4, 504: 4} {
		f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) { w.WriteHeader(code) })
		_, _, err := f.get(t, downloadOptions{retries: 3})
		if len(f.ranges) != want || httpStatus(err) != code || (exitCode(err) == exitTempFail) != (want > 1) {
			t.Errorf("status %d: got %d requests and %v, want %d requests", code, len(f.ranges), err, want)
		}
	}
	// New links that are no better: an end, too.
	asked := 0
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) { w.WriteHeader(403) })
	_, _, err := f.get(t, downloadOptions{relink: func(context.Context) (string, error) { asked++; return f.URL, nil }})
	if asked != 2 || httpStatus(err) != 403 {
		t.Errorf("got %v after %d new links", err, asked)
	}
	_, _, err = f.get(t, downloadOptions{relink: func(context.Context) (string, error) { return "", errAborted }})
	if !errors.Is(err, errAborted) {
		t.Errorf("got %v, want what relink said", err)
	}
}

// Field case 18: the server says how long to wait; for too long, the run ends.
func TestDownloadRetryAfter(t *testing.T) {
	after := "100"
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		if n == 2 {
			f.serve(w, r)
			return
		}
		w.Header().Set("Retry-After", after)
		w.WriteHeader(503)
	})
	_, _, err := f.get(t, downloadOptions{})
	must(t, err)
	if !slices.Equal(f.fast.slept, []time.Duration{100 * time.Second}) {
		t.Fatalf("got waits %s", f.fast.slept)
	}
	after = "3600"
	_, _, err = f.get(t, downloadOptions{})
	wantCode(t, err, exitTempFail)
	if retryAfterOf(err) != time.Hour || len(f.fast.slept) != 1 {
		t.Fatalf("got %v, waits %s", err, f.fast.slept)
	}
}

// Field case 19: lengths that lie, bodies without end.
func TestDownloadLengths(t *testing.T) {
	// Says more than it has, again and again.
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		if n == 1 {
			f.part(w, 200, 0, 5000)
		}
		f.part(w, 206, start(r), start(r))
	})
	_, _, err := f.get(t, downloadOptions{retries: 3})
	wantCode(t, err, exitTempFail)
	// Sends more than it said: no byte beyond the size is taken.
	endless := func(w http.ResponseWriter) {
		for {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}
	g := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		if n == 1 {
			f.part(w, 200, 0, 5000)
		}
		w.Header().Set("Content-Range", "bytes 5000-8999/9000")
		w.WriteHeader(206)
		w.Write(f.data[5000:])
		endless(w)
	})
	_, d, err := g.get(t, downloadOptions{})
	must(t, err)
	if d.Fetched != 9000 {
		t.Fatalf("fetched %d bytes", d.Fetched)
	}
	// A chunked body has no size: it ends where it ends, and a cut is seen.
	h := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"one"`)
		if n == 1 {
			w.Write(f.data[:4000])
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
		f.serve(w, r)
	})
	_, d, err = h.get(t, downloadOptions{})
	must(t, err)
	if d.Size != 9000 || h.ranges[1] != "bytes=4000-" {
		t.Fatalf("got size %d, ranges %q", d.Size, h.ranges)
	}
	empty := newFlaky(t, 0, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) { f.serve(w, r) })
	if _, _, err := empty.get(t, downloadOptions{}); err != nil || len(empty.ranges) != 1 {
		t.Fatalf("empty file: got %v", err)
	}
}

func TestDownloadCancel(t *testing.T) {
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "9000")
		w.Write(f.data[:10])
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	d, err := openDownload(ctx, f.hc, f.URL, downloadOptions{})
	must(t, err)
	_, err = io.ReadFull(d, make([]byte, 10))
	must(t, err)
	cancel(stop)
	if _, err := io.ReadAll(d); err != stop {
		t.Fatalf("got %v, want the cause", err)
	}
	// In a wait between tries, too.
	_, err = openDownload(ctx, f.hc, "http://127.0.0.1:1/", downloadOptions{})
	if err != stop {
		t.Fatalf("got %v, want the cause", err)
	}
}

func TestDownloadRateLimit(t *testing.T) {
	f := newFlaky(t, 50_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) { f.serve(w, r) })
	_, _, err := f.get(t, downloadOptions{limitRate: 1000})
	must(t, err)
	// Nothing really slept, so what was owed has added up: 50 s but for the time this took.
	owed := f.fast.slept[len(f.fast.slept)-1]
	if owed > 50*time.Second || owed < 20*time.Second {
		t.Fatalf("the last wait was %s, want about 50s", owed)
	}
}

func TestDownloadRefusesURL(t *testing.T) {
	for _, u := range []string{"", "file:///etc/passwd", "ftp://h/a", "http://", "http://h:x/", "x"} {
		if _, err := openDownload(t.Context(), http.DefaultClient, u, downloadOptions{}); exitCode(err) != exitRefused {
			t.Errorf("%q: got %v", u, err)
		}
	}
}

func fetch(hc *http.Client, url string) (string, error) {
	resp, err := hc.Get(url)
	if err != nil {
		return "", tidyNetError(err)
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
		if (hintOf(err) != "") != (c.code == exitTempFail) {
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
	old, newer, wrong := file("old", time.Unix(0, 0)), file("newer", build.AddDate(1, 0, 0)), file("wrong", build.AddDate(75, 0, 0))
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
	// The right CA, another name.
	cfg := testConfig(t)
	cfg.ServerCertificate = ca.pem
	if _, err := fetch(testHTTPClient(t, cfg, netOptions{}), strings.Replace(s.URL, "127.0.0.1", "localhost", 1)); err == nil {
		t.Error("a certificate for another name was accepted")
	}
	cfg.extraRoots = ca.pem + "x"
	if _, err := newHTTPClient(cfg, netOptions{}); exitCode(err) != exitRefused {
		t.Errorf("missing -E file: got %v", err)
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
	must(t, os.WriteFile(cert, append(pemText("CERTIFICATE", leaf.cert.Raw), pemText("CERTIFICATE", sub.cert.Raw)...), 0o600))
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
		{"", "http://h.test/", false}, {"", "http://localhost/", true}, {"", "http://127.0.0.2:80/", true}, {"", "https://[::1]/", true},
		{"h.test", "http://h.test:8080/", true}, {"h.test", "http://H.TEST/", true}, {"h.test", "http://a.h.test/", true},
		{"h.test", "http://xh.test/", false}, {".h.test", "http://a.h.test/", true}, {".h.test", "http://b.a.h.test/", true},
		{".h.test", "http://xh.test/", false}, {".very.long.name.test", "http://a/", false}, {"*.h.test", "http://a.h.test/", true},
		{"a.test,h.test", "http://h.test/", true}, {"a.test h.test", "http://h.test/", true}, {"a.test, ,h.test ", "http://h.test/", true},
		{"*", "http://h.test/", true}, {".", "http://h.test/", true}, {"a b . c", "http://h.test/", true},
		{"10.0.0.0/8", "http://10.1.2.3/", true}, {"10.0.0.0/8", "http://11.1.2.3/", false}, {"10.0.0.0/8", "http://h.test/", false},
		{"10.1.2.3", "https://10.1.2.3/", true}, {"10.1.2.3", "https://10.1.2.30/", false}, {"fd00::/8", "http://[fd00::1]/", true},
		{"fd00::1", "http://[fd00::1]:80/", true}, {"[fd00::1]:80", "http://[fd00::1]/", true}, {"10.0.0.0/8", "http://[::ffff:10.0.0.1]/", true},
		{"h.test:443", "https://h.test/", true}, {"h.test:443", "http://h.test/", false}, {"h.test:8080", "http://h.test:8080/", true},
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
		{"both the same", map[string]string{"http_proxy": "http://p", "HTTP_PROXY": "http://p"}, "http://h.test", "http://p", false},
		{"both", map[string]string{"http_proxy": "http://p", "HTTP_PROXY": "http://q"}, "http://h.test", "http://p", true},
		{"upper empty", map[string]string{"http_proxy": "http://p", "HTTP_PROXY": ""}, "http://h.test", "http://p", false},
		{"upper no_proxy", map[string]string{"http_proxy": "http://p", "NO_PROXY": "h.test"}, "http://h.test", "<nil>", false},
		{"CGI", map[string]string{"HTTP_PROXY": "http://p", "REQUEST_METHOD": "GET"}, "http://h.test", "<nil>", true},
		{"password", map[string]string{"http_proxy": "http://us%40er:p%3Aw@p.test"}, "http://h.test", "http://us%40er:p%3Aw@p.test", false},
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

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 3-8/9", "bytes 3-8/*", "bytes 3-8", "bytes 3-/9", "bytes */9", "bytes 3-4611686018427387903/*", ""} {
		f.Add(s, int64(3), int64(9))
	}
	f.Fuzz(func(t *testing.T, s string, off, size int64) {
		total, err := checkContentRange([]string{s}, off, size)
		if err == nil && (total <= off || size >= 0 && total != size || !strings.HasPrefix(s, "bytes "+strconv.FormatInt(off, 10)+"-") && !strings.Contains(s, "0")) {
			t.Fatalf("%q from %d of %d: got %d", s, off, size, total)
		}
	})
}
