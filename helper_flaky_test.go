// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"
)

// fastSleep notes what it was asked for.
type fastSleep struct {
	mu    sync.Mutex
	slept []time.Duration
}

func (f *fastSleep) sleep(ctx context.Context, d time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.slept = append(f.slept, d)
	return ctx.Err()
}

// flaky serves one file of size bytes; answer decides about each request.
type flaky struct {
	*httptest.Server
	data []byte
	hc   *agent
	fast fastSleep

	mu     sync.Mutex
	ranges []string
	conns  int
}

func newFlaky(t *testing.T, size int, answer func(f *flaky, n int, w http.ResponseWriter, r *http.Request)) *flaky {
	f := &flaky{data: make([]byte, size)}
	rand.New(rand.NewSource(1)).Read(f.data) // wherever it is cut, no part is like another
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.ranges = append(f.ranges, r.Header.Get("Range"))
		n := len(f.ranges)
		f.mu.Unlock()
		answer(f, n, w, r)
	}))
	f.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if st == http.StateNew {
			f.conns++
		}
	}
	f.Config.ErrorLog = log.New(io.Discard, "", 0)
	f.Start()
	t.Cleanup(func() { f.CloseClientConnections(); f.Close() })
	f.hc = testHTTPClient(t, testConfig(t), netOptions{})
	return f
}

func (f *flaky) serve(w http.ResponseWriter, r *http.Request) {
	if w.Header().Get("ETag") == "" {
		w.Header().Set("ETag", `"one"`)
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.data))
}

// part sends bytes from..to as they are, under a header that promises more, and hangs up.
func (f *flaky) part(w http.ResponseWriter, code, from, to int) {
	if code == 206 {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(f.data)-1, len(f.data)))
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(f.data)-from))
	w.WriteHeader(code)
	w.Write(f.data[from:to])
	http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

func (f *flaky) get(t *testing.T, o downloadOptions) ([]byte, *download, error) {
	t.Helper()
	if o.sleep == nil {
		o.sleep = f.fast.sleep
	}
	d, err := openDownload(t.Context(), f.hc, f.URL+"/a?secret=1", o)
	if err != nil {
		return nil, d, err
	}
	defer d.Close()
	got, err := io.ReadAll(d)
	if err == nil && !bytes.Equal(got, f.data[o.offset:]) {
		t.Fatalf("got %d bytes that are not those of the file", len(got))
	}
	return got, d, err
}
