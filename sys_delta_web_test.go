// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nodelta

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Parts of a file come from every kind of server as they should, or it is said that there are none; and that another
// file stands there, each has to tell.
func TestWebServersParts(t *testing.T) {
	t.Parallel()
	eachWebServer(t, func(t *testing.T, s *webSite) {
		f := &flaky{data: make([]byte, 90_000), hc: testHTTPClient(t, testConfig(t), netOptions{})}
		rand.New(rand.NewSource(2)).Read(f.data)
		link := s.add(t, "a", f.data)
		o := downloadOptions{sleep: f.fast.sleep}
		d, err := openDownload(t.Context(), f.hc, link, o)
		must(t, err)
		if n, err := io.Copy(io.Discard, d); err != nil || n != 90_000 {
			t.Fatalf("got %d bytes, %v", n, err)
		}
		d.Close()
		s.counted()
		o.same, o.size, o.etag, o.lastModified = true, d.Size, d.ETag, d.LastModified
		d, err = openDownload(t.Context(), f.hc, link, o)
		must(t, err)
		err = readSpans(t, f, d)
		requests, conns, sent := s.counted()
		t.Logf("ETag %q, Last-Modified %q, %d requests over %d connections, %d bytes", o.etag, o.lastModified,
			len(requests), conns, sent)
		if !s.parts {
			if !errors.Is(err, errNoRanges) || len(requests) != 1 {
				t.Fatalf("got %v after %q, want errNoRanges after one", err, requests)
			}
			return
		}
		if err != nil || d.Fetched != 45_301 || len(requests) != len(spans) {
			t.Fatalf("got %v, %d bytes, by %q", err, d.Fetched, requests)
		}
		f.data[0]++
		link = s.add(t, "a", append(f.data, 'x'))
		d, err = openDownload(t.Context(), f.hc, link, o)
		must(t, err)
		if err := readSpans(t, f, d); !s.keeps && !errors.Is(err, errChanged) || s.keeps && err != nil {
			t.Errorf("another file: got %v, want errChanged, or none of a cache", err)
		}
	})
}

// webDelta is an artifact of an image that does not get smaller, and differs from old in places that stand further
// apart than requests are ever joined over.
func webDelta(t *testing.T) (old, image, artifact []byte) {
	old = noise(5, 3_200_000)
	image = slices.Concat(old[:700_000], noise(6, 50_000), old[700_000:1_900_000], []byte("x"), old[1_900_001:])
	return old, image, packed(t, "-n", "new", "-c", "sim", "-f", writeTemp(t, "root.img", image), "--delta=16k")
}

// A delta comes from every kind of server by the requests that were planned, and as a whole where there are no parts.
func TestWebServersDelta(t *testing.T) {
	t.Parallel()
	old, image, artifact := webDelta(t)
	eachWebServer(t, func(t *testing.T, s *webSite) {
		b := newBoard(t, 4<<20, "")
		writeFile(t, filepath.Join(b.dir, "p2"), string(old))
		link := s.add(t, "new.mender", artifact)
		var plan struct {
			Delta deltaCost
		}
		exit, said := b.mendlet("plan", "--running", "A", "--json", link)
		err := json.Unmarshal([]byte(said[strings.Index(said, "{"):]), &plan) // progress is before it
		if err != nil || exit != 0 || plan.Delta.Requests == 0 {
			t.Fatalf("plan: exit code %d, %v, %+v", exit, err, plan)
		}
		s.counted()
		exit, _ = b.mendlet("install", "--running", "A", "--delta=only", link)
		requests, conns, sent := s.counted()
		first := "Range: bytes=0-" + fmt.Sprint(startHeader-1)
		if !s.parts {
			if exit != exitRefused || len(requests) != 1 || !strings.HasSuffix(requests[0], first) {
				t.Errorf("only: exit code %d after %q", exit, requests)
			}
			if exit, _ = b.mendlet("install", "--running", "A", link); exit != 0 {
				t.Errorf("exit code %d", exit)
			}
			b.holds(image)
			return
		}
		bytes := int64(0)
		for _, r := range requests {
			var from, to int64
			_, span, _ := strings.Cut(r, "Range: bytes=")
			fmt.Sscanf(span, "%d-%d", &from, &to)
			bytes += to + 1 - from
		}
		t.Logf("%d requests for %d of %d bytes over %d connections, %d bytes in all; planned %+v", len(requests), bytes,
			len(artifact), conns, sent, plan.Delta)
		most := startHeader + plan.Delta.Fetch + 8<<10 // and what is behind the image
		if exit != 0 || len(requests) != 1+plan.Delta.Requests || !strings.HasSuffix(requests[0], first) || bytes > most ||
			sent > bytes+int64(len(requests))<<10 || conns != 1 && strings.HasPrefix(s.name, "nginx") {
			t.Errorf("exit code %d after %q over %d connections", exit, requests, conns)
		}
		b.holds(image)
	})
}

// badSpan answers a request for a part of an artifact, which begins at from and ends before to.
type badSpan func(w http.ResponseWriter, q *http.Request, text []byte, from, to int)

// spanHead says that from up to to follows.
func spanHead(w http.ResponseWriter, text []byte, from, to int) {
	w.Header().Set("ETag", testETag(text))
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(text)))
	w.WriteHeader(http.StatusPartialContent)
}

func span(w http.ResponseWriter, text []byte, from, to int) {
	spanHead(w, text, from, to)
	w.Write(text[from:to])
}

// elsewhere redirects to where text is.
func elsewhere(t *testing.T) func(w http.ResponseWriter, q *http.Request, text []byte) {
	s := newTestServer(t, false)
	return func(w http.ResponseWriter, q *http.Request, text []byte) {
		s.mu.Lock()
		s.artifacts["new"] = text
		s.mu.Unlock()
		http.Redirect(w, q, s.link("new"), http.StatusFound)
	}
}

// Whatever a server does in the middle of a delta, the deployment ends well: with the delta, or with the whole image
// once.
func TestRunOverBadDelta(t *testing.T) {
	t.Parallel()
	same, other := elsewhere(t), elsewhere(t)
	for _, c := range []struct {
		name  string
		once  bool // from the second request for a part on it is good again
		whole bool // the image is fetched as a whole in the end
		bad   badSpan
	}{
		{"nothing", true, false, func(w http.ResponseWriter, _ *http.Request, text []byte, from, to int) {
			span(w, text, from, to)
		}},
		{"other bytes", true, true, func(w http.ResponseWriter, _ *http.Request, text []byte, from, to int) {
			span(w, slices.Concat(text[:from], noise(9, to-from), text[to:]), from, to)
		}},
		{"other bytes, no ETag", true, true, func(w http.ResponseWriter, _ *http.Request, text []byte, from, to int) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(text)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(noise(9, to-from))
		}},
		{"no end", false, false, func(w http.ResponseWriter, q *http.Request, text []byte, from, to int) {
			w.Header().Set("Transfer-Encoding", "identity")
			for span(w, text, from, to); q.Context().Err() == nil; {
				w.Write(text)
			}
		}},
		{"stall but for drops", true, false, func(w http.ResponseWriter, q *http.Request, text []byte, from, to int) {
			w.Header().Set("Content-Length", fmt.Sprint(to-from))
			for spanHead(w, text, from, to); q.Context().Err() == nil && from < to; from++ {
				w.Write(text[from : from+1])
				http.NewResponseController(w).Flush()
				sleepContext(q.Context(), 20*time.Millisecond)
			}
		}},
		{"short", true, false, func(w http.ResponseWriter, _ *http.Request, text []byte, from, to int) {
			w.Header().Set("Content-Length", fmt.Sprint(to-from))
			spanHead(w, text, from, to)
			w.Write(text[from : from+(to-from)/2])
			hangUp()
		}},
		{"short, and says so", true, false, func(w http.ResponseWriter, _ *http.Request, text []byte, from, to int) {
			span(w, text, from, from+(to-from)/2)
		}},
		{"hangs up", true, false, func(http.ResponseWriter, *http.Request, []byte, int, int) { hangUp() }},
		{"busy", true, false, func(w http.ResponseWriter, _ *http.Request, _ []byte, _, _ int) { w.WriteHeader(503) }},
		{"whole", false, true, func(w http.ResponseWriter, _ *http.Request, text []byte, _, _ int) { w.Write(text) }},
		{"416", false, true, func(w http.ResponseWriter, _ *http.Request, _ []byte, _, _ int) { w.WriteHeader(416) }},
		{"412", true, true, func(w http.ResponseWriter, _ *http.Request, _ []byte, _, _ int) { w.WriteHeader(412) }},
		{"compressed", false, true, func(w http.ResponseWriter, _ *http.Request, text []byte, from, to int) {
			w.Header().Set("Content-Encoding", "gzip")
			span(w, text, from, to)
		}},
		{"elsewhere", false, true, func(w http.ResponseWriter, _ *http.Request, text []byte, from, to int) {
			span(w, text, from+1, to)
		}},
		{"a page", true, false, func(w http.ResponseWriter, _ *http.Request, _ []byte, _, _ int) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html><title>Log in</title>")
		}},
		{"redirect to the same", false, false, func(w http.ResponseWriter, q *http.Request, text []byte, _, _ int) {
			same(w, q, text)
		}},
		{"redirect to another", false, true, func(w http.ResponseWriter, q *http.Request, text []byte, _, _ int) {
			other(w, q, noise(9, len(text)))
		}},
		{"redirect in a circle", true, false, func(w http.ResponseWriter, q *http.Request, _ []byte, _, _ int) {
			http.Redirect(w, q, q.URL.String(), http.StatusFound)
		}},
		{"redirect to a file", true, true, func(w http.ResponseWriter, q *http.Request, _ []byte, _, _ int) {
			http.Redirect(w, q, "file:///etc/passwd", http.StatusFound)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newManagedSetup(t)
			delta := newDeltaSetup(t)
			s.images, s.artifacts["new"] = delta.images, delta.servers[delta.artifacts["new"]].name
			r := newRunning(t, s)
			r.tune = func(a *app) { a.o.write, a.c.Delta = delta.write, "auto" }
			if strings.HasPrefix(c.name, "stall") {
				r.stall = shortStall
			}
			parts := 0
			r.downloads(func(_ int, w http.ResponseWriter, q *http.Request, text []byte) bool {
				var from, to int
				n, _ := fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-%d", &from, &to)
				if n < 2 {
					return false
				}
				if parts++; parts > 1 && c.once {
					return false
				}
				c.bad(w, q, text, from, to+1)
				return true
			})
			r.end("success")
			log, _ := s.server.heard()
			gets, wholes := 0, 0
			for _, line := range log {
				if strings.HasPrefix(line, "GET artifact") {
					gets++
				}
				if line == "GET artifact" {
					wholes++
				}
			}
			rec, err := r.peek()
			must(t, err)
			if (rec.Last.Saved == 0) != c.whole || gets > 12 || wholes > 2 {
				t.Errorf("saved %d bytes after %q\n%s", rec.Last.Saved, log, strings.Join(*r.said, "\n"))
			}
		})
	}
}
