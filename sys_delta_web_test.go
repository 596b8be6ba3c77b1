// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"errors"
	"io"
	"math/rand"
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
