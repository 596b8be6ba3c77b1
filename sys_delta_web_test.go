// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nodelta

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Parts of a file come from every kind of server as they should, or it is said that there are none; and that another
// file stands there, each has to tell.
func TestWebServersParts(t *testing.T) {
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
		first := "Range: bytes=0-" + fmt.Sprint(startUnknown-1)
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
		most := startUnknown + plan.Delta.Fetch + 8<<10 // and what is behind the image
		if exit != 0 || len(requests) != 1+plan.Delta.Requests || !strings.HasSuffix(requests[0], first) || bytes > most ||
			sent > bytes+int64(len(requests))<<10 {
			t.Errorf("exit code %d after %q", exit, requests)
		}
		b.holds(image)
	})
}
