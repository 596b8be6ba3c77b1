// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

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
	if _, _, err = f.get(t, downloadOptions{offset: 100_001}); !errors.Is(err, errUseless) || !isTemporary(err) {
		t.Fatalf("got %v, want errUseless", err)
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

// resumed is an odd answer of a server to a request that goes on at some byte of 9000.
type resumed struct {
	name   string
	answer func(f *flaky, w http.ResponseWriter, r *http.Request)
	wholes int // how often all of the file is asked for
}

// ranged sends from..to under a Content-Range of these words.
func (f *flaky) ranged(w http.ResponseWriter, from, to int, contentRange ...string) {
	w.Header()["Content-Range"] = contentRange
	w.WriteHeader(206)
	w.Write(f.data[from:to])
}

// wholeOnly answers a range with what no is, and serves the whole.
func wholeOnly(no func(f *flaky, w http.ResponseWriter, r *http.Request)) func(f *flaky, w http.ResponseWriter,
	r *http.Request) {
	return func(f *flaky, w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") == "" {
			f.serve(w, r)
			return
		}
		no(f, w, r)
	}
}

func contentRange(values ...string) func(f *flaky, w http.ResponseWriter, r *http.Request) {
	return wholeOnly(func(f *flaky, w http.ResponseWriter, r *http.Request) { f.ranged(w, start(r), 9000, values...) })
}

func tagged(etag, modified string) func(f *flaky, w http.ResponseWriter, r *http.Request) {
	return func(f *flaky, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", etag)
		w.Header().Set("Last-Modified", modified)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.data))
	}
}

func status(code int) func(f *flaky, w http.ResponseWriter, r *http.Request) {
	return wholeOnly(func(f *flaky, w http.ResponseWriter, r *http.Request) { w.WriteHeader(code) })
}

// What caches, load balancers and slicing proxies make of a range is taken, as far as it is of use.
var takenAnswers = []resumed{
	{"as asked for", contentRange("bytes 3000-8999/9000"), 0},
	{"size not told", contentRange("bytes 3000-8999/*"), 0},
	{"size missing", contentRange("bytes 3000-8999"), 0},
	{"size empty", contentRange("bytes 3000-8999/"), 0},
	{"equals sign", contentRange("bytes=3000-8999/9000"), 0},
	{"upper case", contentRange("Bytes 3000-8999/9000"), 0},
	{"two blanks", contentRange("bytes  3000-8999/9000"), 0},
	{"one too many", contentRange("bytes 3000-9000/9000"), 0},
	{"twice the same", contentRange("bytes 3000-8999/9000", "bytes 3000-8999/9000"), 0},
	{"none, chunked", contentRange(), 1},
	{"none, but of the right length", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(9000-start(r)))
		f.ranged(w, start(r), 9000)
	}, 0},
	{"empty", contentRange(""), 1}, {"garbage", contentRange("garbage"), 1},
	{"other unit", contentRange("items 3000-8999/9000"), 1},
	{"signs", contentRange("bytes +3000-8999/9000"), 1}, {"two dashes", contentRange("bytes 3000--8999/9000"), 1},
	{"backwards", contentRange("bytes 3000-2999/9000"), 1}, {"no end", contentRange("bytes 3000-/9000"), 1},
	{"no span", contentRange("bytes */9000"), 1}, {"size with a letter", contentRange("bytes 3000-8999/9000x"), 1},
	{"two that differ", contentRange("bytes 3000-8999/9000", "bytes 3001-8999/9000"), 1},
	{"huge", contentRange("bytes 3000-9223372036854775807/9223372036854775808"), 1},
	{"huger", contentRange("bytes 3000-99999999999999999999/9000"), 1},
	{"a later start", wholeOnly(func(f *flaky, w http.ResponseWriter, r *http.Request) {
		f.ranged(w, start(r)+1, 9000, fmt.Sprintf("bytes %d-8999/9000", start(r)+1))
	}), 1},
	{"an earlier start", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		f.ranged(w, start(r)-1500, 9000, fmt.Sprintf("bytes %d-8999/9000", start(r)-1500))
	}, 0},
	{"all of it", func(f *flaky, w http.ResponseWriter, r *http.Request) { f.ranged(w, 0, 9000, "bytes 0-8999/9000") }, 0},
	{"shorter", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		to := min(start(r)+2000, 9000)
		f.ranged(w, start(r), to, fmt.Sprintf("bytes %d-%d/9000", start(r), to-1))
	}, 0},
	{"shorter, size not told", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		to := min(start(r)+2000, 9000)
		f.ranged(w, start(r), to, fmt.Sprintf("bytes %d-%d/*", start(r), to-1))
	}, 0},
	{"slices", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		from := start(r) / 2048 * 2048
		to := min(from+2048, 9000)
		w.Header().Set("Content-Length", strconv.Itoa(to-from))
		f.ranged(w, from, to, fmt.Sprintf("bytes %d-%d/9000", from, to-1))
	}, 0},
	{"more bytes than it says", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		f.ranged(w, start(r), 9000, fmt.Sprintf("bytes %d-%d/9000", start(r), min(start(r)+1999, 8999)))
	}, 0},
	{"fewer bytes than it says", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		f.ranged(w, start(r), min(start(r)+2000, 9000), fmt.Sprintf("bytes %d-8999/9000", start(r)))
	}, 0},
	{"200 for 206", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-8999/9000", start(r)))
		w.Write(f.data[start(r):])
	}, 0},
	{"203", func(f *flaky, w http.ResponseWriter, r *http.Request) { w.WriteHeader(203); w.Write(f.data) }, 0},
	{"200, chunked", func(f *flaky, w http.ResponseWriter, r *http.Request) { w.WriteHeader(200); w.Write(f.data) }, 0},
	{"multipart of one", func(f *flaky, w http.ResponseWriter, r *http.Request) { f.multipart(w, start(r), 9000) }, 0},
	{"multipart of two", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		if start(r) == 3000 {
			f.multipart(w, 3000, 5000, 6000, 9000)
			return
		}
		f.serve(w, r)
	}, 0},
	{"multipart of none", wholeOnly(func(f *flaky, w http.ResponseWriter, r *http.Request) { f.multipart(w) }), 1},
	{"multipart with a long line", wholeOnly(func(f *flaky, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "multipart/byteranges; boundary=x")
		w.WriteHeader(206)
		w.Write(bytes.Repeat([]byte{'x'}, 1<<20))
	}), 1},
	{"another ETag", tagged(`"two"`, ""), 0}, {"a weak ETag", tagged(`W/"one"`, ""), 0},
	{"no ETag", tagged("", "Mon, 02 Jan 2006 15:04:06 GMT"), 0},
	{"another ETag and date", tagged(`"two"`, "Mon, 02 Jan 2006 15:04:06 GMT"), 0},
	{"another ETag, whole", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Range")
		tagged(`"two"`, "")(f, w, r)
	}, 0},
	{"204", status(204), 1}, {"304", status(304), 1}, {"400", status(400), 1}, {"416", status(416), 1},
	{"501", status(501), 1},
	{"302 without a place", status(302), 1},
	{"416 that knows better", wholeOnly(func(f *flaky, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes */9000")
		w.WriteHeader(416)
	}), 1},
	{"compressed", wholeOnly(func(f *flaky, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		f.serve(w, r)
	}), 1},
	{"an encoding that is none", func(f *flaky, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "aws-chunked")
		f.serve(w, r)
	}, 0},
	{"another size, but not of the whole", wholeOnly(func(f *flaky, w http.ResponseWriter, r *http.Request) {
		f.ranged(w, start(r), 8999, fmt.Sprintf("bytes %d-8998/8999", start(r)))
	}), 1},
}

// multipart sends the spans from..to as parts (RFC 9110, 14.6).
func (f *flaky) multipart(w http.ResponseWriter, spans ...int) {
	w.Header().Set("Content-Type", "Multipart/Byteranges; boundary=X")
	w.WriteHeader(206)
	for s := range slices.Chunk(spans, 2) {
		fmt.Fprintf(w, "\r\n--X\r\nContent-Type: a/b\r\nContent-range: bytes %d-%d/9000\r\n\r\n", s[0], s[1]-1)
		w.Write(f.data[s[0]:s[1]])
	}
	io.WriteString(w, "\r\n--X--\r\n")
}

// resumeWith has the first connection break off after 3000 bytes, and gets the rest, in one run
// and in a later one, by answers of this kind.
func resumeWith(t *testing.T, c resumed, run func(t *testing.T, f *flaky, o downloadOptions)) {
	for _, later := range []bool{false, true} {
		t.Run(fmt.Sprintf("%s, later %v", c.name, later), func(t *testing.T) {
			f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
				if n == 1 && !later {
					w.Header().Set("ETag", `"one"`)
					f.part(w, 200, 0, 3000)
				}
				c.answer(f, w, r)
			})
			o := downloadOptions{retries: 3}
			if later {
				o = downloadOptions{retries: 3, offset: 3000, size: 9000, etag: `"one"`}
			}
			run(t, f, o)
		})
	}
}

func TestDownloadTakesWhatIsOfUse(t *testing.T) {
	t.Parallel()
	for _, c := range takenAnswers {
		resumeWith(t, c, func(t *testing.T, f *flaky, o downloadOptions) {
			_, _, err := f.get(t, o)
			must(t, err)
			wholes := 0
			for _, r := range f.ranges {
				if r == "" {
					wholes++
				}
			}
			if o.offset == 0 {
				wholes--
			}
			if wholes != c.wholes {
				t.Errorf("got requests %q, want %d for the whole", f.ranges, c.wholes)
			}
		})
	}
}

// Answers of which nothing can be used: once more without a range, then later.
func TestDownloadUseless(t *testing.T) {
	for _, c := range []struct {
		resumed
		changed bool
	}{
		{resumed{name: "another size", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "9001")
			w.WriteHeader(200)
		}}, true},
		{resumed{name: "another size, of a range", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) {
			f.ranged(w, 3000, 9000, "bytes 3000-8999/9001")
		}}, true},
		{resumed{name: "beyond the end", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) {
			f.ranged(w, 3000, 9000, "bytes 3000-9000/*")
		}}, true},
		{resumed{name: "smaller", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "2000")
			w.Write(f.data[:2000])
		}}, true},
		{resumed{name: "a gap", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) {
			f.ranged(w, 3001, 9000, "bytes 3001-8999/9000")
		}}, false},
		{resumed{name: "what is there", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) {
			f.ranged(w, 0, 3000, "bytes 0-2999/9000")
		}}, false},
		{resumed{name: "compressed", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "GZIP")
			f.serve(w, r)
		}}, false},
		{resumed{name: "no content", answer: func(f *flaky, w http.ResponseWriter,
			r *http.Request) {
			w.WriteHeader(204)
		}}, false},
		{resumed{name: "416", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) { w.WriteHeader(416) }}, false},
		{resumed{name: "a byte an answer", answer: func(f *flaky, w http.ResponseWriter, r *http.Request) {
			f.ranged(w, start(r), start(r)+1, fmt.Sprintf("bytes %d-%d/9000", start(r), start(r)))
		}}, false},
	} {
		resumeWith(t, c.resumed, func(t *testing.T, f *flaky, o downloadOptions) {
			_, _, err := f.get(t, o)
			wantCode(t, err, exitTempFail)
			if errors.Is(err, errChanged) != c.changed || len(f.ranges) > 7 {
				t.Errorf("got %v after requests %q", err, f.ranges)
			}
		})
	}
	// Before anything was known of the file.
	for name, answer := range map[string]func(f *flaky, w http.ResponseWriter, r *http.Request){
		"206 without a place": func(f *flaky, w http.ResponseWriter, r *http.Request) { f.ranged(w, 0, 9000) },
		"compressed": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "br")
			f.serve(w, r)
		},
		"304": func(f *flaky, w http.ResponseWriter, r *http.Request) { w.WriteHeader(304) },
	} {
		f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) { answer(f, w, r) })
		if _, _, err := f.get(t, downloadOptions{}); exitCode(err) != exitTempFail || len(f.ranges) != 1 {
			t.Errorf("%s: got %v after %d requests, want one", name, err, len(f.ranges))
		}
	}
	// A 206 for a request without a range is as good as any.
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		to := min(start(r)+4096, 9000)
		f.ranged(w, start(r), to, fmt.Sprintf("bytes %d-%d/9000", start(r), to-1))
	})
	_, _, err := f.get(t, downloadOptions{})
	must(t, err)
}

// Where nobody says how large the file is, its end is found by asking for what comes behind it.
func TestDownloadEndOfUnknownSize(t *testing.T) {
	for name, end := range map[string]func(f *flaky, w http.ResponseWriter, r *http.Request){
		"416 with the size": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes */9000")
			w.WriteHeader(416)
		},
		"416": func(f *flaky, w http.ResponseWriter, r *http.Request) { w.WriteHeader(416) },
		"206 of what is there": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			f.ranged(w, 8000, 9000, "bytes 8000-8999/*")
		},
		"206 with the size": func(f *flaky, w http.ResponseWriter, r *http.Request) {
			f.ranged(w, 8000, 9000, "bytes 8000-8999/9000")
		},
	} {
		f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
			switch from := start(r); {
			case r.Header.Get("Range") == "": // chunked
				http.NewResponseController(w).Flush()
				if w.Write(f.data[:3000]); n == 1 {
					http.NewResponseController(w).Flush()
					panic(http.ErrAbortHandler)
				}
				w.Write(f.data[3000:])
			case from < 9000:
				to := min(from+3000, 9000)
				f.ranged(w, from, to, fmt.Sprintf("bytes %d-%d/*", from, to-1))
			default:
				end(f, w, r)
			}
		})
		if _, d, err := f.get(t, downloadOptions{}); err != nil || d.Size != 9000 {
			t.Errorf("%s: got %v after requests %q", name, err, f.ranges)
		}
	}
}

// That answers may be of two files is said, so that a bad hash is not the last word.
func TestDownloadMixed(t *testing.T) {
	const date, later = "Mon, 02 Jan 2006 15:04:05 GMT", "Mon, 02 Jan 2006 15:04:06 GMT"
	for _, c := range []struct {
		name, etag, modified string
		mixed                bool
	}{
		{"the same", `"one"`, date, false}, {"weak", `W/"one"`, "", false}, {"nothing", "", "", false},
		{"ETag", `"two"`, date, true}, {"date", `"one"`, later, true}, {"date alone", "", later, true},
	} {
		f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter,
			r *http.Request) {
			tagged(c.etag, c.modified)(f, w, r)
		})
		mixed := false
		_, _, err := f.get(t, downloadOptions{offset: 3000, etag: `"one"`, lastModified: date,
			mixed: func() { mixed = true }})
		if err != nil || mixed != c.mixed {
			t.Errorf("%s: got %v, mixed %v", c.name, err, mixed)
		}
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
	if d.Fetched != 3000+6000+9000 || !strings.Contains(strings.Join(lines, "\n"),
		"3000 bytes before byte 3000 come again") {
		t.Fatalf("got %d bytes, said %q", d.Fetched, lines)
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
	o := downloadOptions{sleep: (&fastSleep{}).sleep,
		relink: func(context.Context) (string, error) { asked++; return s.link("a"), nil }}
	d, err := openDownload(t.Context(), testHTTPClient(t, c, netOptions{}), s.link("a"), o)
	must(t, err)
	got, err := io.ReadAll(d)
	if err != nil || !bytes.Equal(got, data) || asked != 1 || d.Fetched != int64(len(data)) {
		t.Fatalf("got %d bytes, %v, asked %d times, fetched %d", len(got), err, asked, d.Fetched)
	}
}

func TestDownloadFinalStatus(t *testing.T) {
	for code, want := range map[int]int{400: 1, 401: 1, 403: 1, 404: 1, 410: 1, 451: 1, 408: 4, 425: 4, 429: 4, 500: 4,
		502: 4, 503: 4, 504: 4} {
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
		if _, err := openDownload(t.Context(), new(agent), u, downloadOptions{}); exitCode(err) != exitRefused {
			t.Errorf("%q: got %v", u, err)
		}
	}
}

// spans are what the tests below read of 90,000 bytes, one after the other.
var spans = [][2]int64{{1000, 5000}, {5000, 5001}, {20_000, 60_000}, {70_000, 70_300}, {89_000, 90_000}}

// readSpans reads spans as a caller does who knows how long they are, and gives the first error.
func readSpans(t *testing.T, f *flaky, d *download) error {
	t.Helper()
	defer d.Close()
	if n, err := d.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("before the first span: got %d bytes, %v", n, err)
	}
	for i, s := range spans {
		if err := d.span(s[0], s[1]); err != nil {
			return err
		}
		got, err := []byte(nil), error(nil)
		if i%2 == 0 { // to its end, or as many as are known to be there: both is good
			got, err = io.ReadAll(d)
		} else {
			got = make([]byte, s[1]-s[0])
			_, err = io.ReadFull(d, got)
		}
		if err != nil {
			return err
		}
		if !bytes.Equal(got, f.data[s[0]:s[1]]) {
			t.Fatalf("span %d: got %d bytes that are not those of the file", s, len(got))
		}
	}
	return nil
}

// spanDownload is a download of a file known from a first answer with ETag "one".
func spanDownload(t *testing.T, f *flaky, o downloadOptions) *download {
	t.Helper()
	o.same, o.sleep, o.retries = true, f.fast.sleep, 3
	if o.size == 0 {
		o.size = int64(len(f.data))
	}
	d, err := openDownload(t.Context(), f.hc, f.URL+"/a?secret=1", o)
	must(t, err)
	return d
}

// bounds of the range that is asked for, which must have both.
func bounds(t *testing.T, r *http.Request) (from, to int) {
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
		t.Errorf("got Range %q, want both ends", r.Header.Get("Range"))
	}
	return from, to + 1
}

// spanned sends from..to of what a request for a part asks for.
func (f *flaky) spanned(w http.ResponseWriter, from, to int) {
	f.ranged(w, from, to, fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(f.data)))
}

// Span after span comes by a request each, for no more than that, over one connection.
func TestDownloadSpans(t *testing.T) {
	const date = "Mon, 02 Jan 2006 15:04:05 GMT"
	for name, c := range map[string]struct {
		o              downloadOptions
		etag, modified string // of the answers
		match, since   string // of the requests, but for the first
	}{
		"strong ETag":   {downloadOptions{etag: `"one"`}, `"one"`, date, `"one"`, ""},
		"weak ETag":     {downloadOptions{etag: `W/"one"`}, `W/"one"`, date, "", date},
		"became strong": {downloadOptions{etag: `W/"one"`}, `"one"`, "", "", ""},
		"date":          {downloadOptions{lastModified: date}, "", date, "", date},
		"nothing known": {downloadOptions{}, `"one"`, "", `"one"`, ""},
		"nothing told":  {downloadOptions{}, "", "", "", ""},
		"told no more":  {downloadOptions{etag: `"one"`}, "", "", `"one"`, ""},
		"other date":    {downloadOptions{etag: `"one"`, lastModified: "x"}, `"one"`, date, `"one"`, ""},
		"size unknown":  {downloadOptions{size: -1}, `"one"`, "", `"one"`, ""},
	} {
		for _, chunked := range []bool{false, true} {
			f := newFlaky(t, 90_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
				h := r.Header
				if n > 1 && (h.Get("If-Match") != c.match || h.Get("If-Unmodified-Since") != c.since) {
					t.Errorf("%s: got If-Match %q, If-Unmodified-Since %q", name, h.Get("If-Match"),
						h.Get("If-Unmodified-Since"))
				}
				for k, v := range map[string]string{"ETag": c.etag, "Last-Modified": c.modified} {
					if v != "" {
						w.Header().Set(k, v)
					}
				}
				from, to := bounds(t, r)
				if !chunked {
					w.Header().Set("Content-Length", strconv.Itoa(to-from))
				}
				f.spanned(w, from, to)
				http.NewResponseController(w).Flush()
			})
			d := spanDownload(t, f, c.o)
			err := readSpans(t, f, d)
			f.mu.Lock()
			if err != nil || f.conns != 1 || len(f.ranges) != len(spans) || d.Fetched != 45_301 {
				t.Errorf("%s: got %v, %d bytes over %d connections by %q", name, err, d.Fetched, f.conns, f.ranges)
			}
			f.mu.Unlock()
		}
	}
}

// Answers from the second request on that are taken, and at what price.
func TestDownloadSpansTaken(t *testing.T) {
	for _, c := range []struct {
		name            string
		answer          func(f *flaky, n int, w http.ResponseWriter, from, to int)
		conns, requests int // at most, exactly
	}{
		{"connection closed", func(f *flaky, _ int, w http.ResponseWriter, from, to int) {
			w.Header().Set("Connection", "close")
			f.spanned(w, from, to)
		}, 4, 5},
		{"more than asked for", func(f *flaky, _ int, w http.ResponseWriter, from, to int) {
			f.spanned(w, from, len(f.data))
		}, 4, 5},
		{"some before", func(f *flaky, _ int, w http.ResponseWriter, from, to int) {
			f.spanned(w, from-999, to)
		}, 1, 5},
		{"slices", func(f *flaky, _ int, w http.ResponseWriter, from, to int) {
			at := from / 8192 * 8192
			w.Header().Set("Content-Length", strconv.Itoa(min(at+8192, to)-at))
			f.spanned(w, at, min(at+8192, to))
		}, 1, 10},
		{"200 for 206", func(f *flaky, _ int, w http.ResponseWriter, from, to int) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", from, to-1))
			w.Write(f.data[from:to])
		}, 1, 5},
		{"multipart", func(f *flaky, _ int, w http.ResponseWriter, from, to int) {
			w.Header().Set("Content-Type", "multipart/byteranges; boundary=X")
			w.WriteHeader(206)
			fmt.Fprintf(w, "--X\r\nContent-Range: bytes %d-%d/90000\r\n\r\n%s\r\n--X--\r\n", from, to-1, f.data[from:to])
		}, 4, 5},
		{"short, and cut", func(f *flaky, n int, w http.ResponseWriter, from, to int) {
			if n == 3 {
				w.Header().Set("Content-Length", strconv.Itoa(to-from))
				f.spanned(w, from, from+1000)
				http.NewResponseController(w).Flush()
				panic(http.ErrAbortHandler)
			}
			f.spanned(w, from, to)
		}, 2, 6},
		{"whole once", func(f *flaky, n int, w http.ResponseWriter, from, to int) {
			if n == 3 {
				w.Write(f.data)
				return
			}
			f.spanned(w, from, to)
		}, 2, 6},
		{"busy once", func(f *flaky, n int, w http.ResponseWriter, from, to int) {
			if n == 3 {
				w.WriteHeader(503)
				return
			}
			f.spanned(w, from, to)
		}, 1, 6},
	} {
		f := newFlaky(t, 90_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
			from, to := bounds(t, r)
			w.Header().Set("ETag", `"one"`)
			if n == 1 {
				f.spanned(w, from, to)
				return
			}
			c.answer(f, n, w, from, to)
		})
		err := readSpans(t, f, spanDownload(t, f, downloadOptions{etag: `"one"`}))
		f.mu.Lock()
		if err != nil || f.conns > c.conns || len(f.ranges) != c.requests {
			t.Errorf("%s: got %v over %d connections by %q, want %d at most", c.name, err, f.conns, f.ranges, c.conns)
		}
		f.mu.Unlock()
	}
}

// Answers from request number from on that are not taken: what is said, and that wrong bytes never come.
func TestDownloadSpansRefused(t *testing.T) {
	t.Parallel()
	bad := func(code int, contentRange string) func(f *flaky, w http.ResponseWriter) {
		return func(f *flaky, w http.ResponseWriter) {
			if contentRange != "" {
				w.Header().Set("Content-Range", contentRange)
			}
			w.WriteHeader(code)
			w.Write(f.data[:300])
		}
	}
	tag := func(etag, date string, code int) func(f *flaky, w http.ResponseWriter) {
		return func(f *flaky, w http.ResponseWriter) {
			w.Header().Set("ETag", etag)
			w.Header().Set("Last-Modified", date)
			bad(code, "bytes 1000-90000/90000")(f, w)
		}
	}
	for _, c := range []struct {
		name   string
		answer func(f *flaky, w http.ResponseWriter)
		want   error
	}{
		{"200", func(f *flaky, w http.ResponseWriter) { w.Write(f.data) }, errNoRanges},
		{"200 of another size", bad(200, ""), errChanged},
		{"203", func(f *flaky, w http.ResponseWriter) { w.WriteHeader(203); w.Write(f.data) }, errNoRanges},
		{"416", bad(416, ""), errNoRanges},
		{"416, same size", bad(416, "bytes */90000"), errNoRanges},
		{"416, smaller", bad(416, "bytes */900"), errChanged},
		{"206 without", bad(206, ""), errNoRanges},
		{"elsewhere", bad(206, "bytes 80000-80299/90000"), errNoRanges},
		{"before", bad(206, "bytes 0-299/90000"), errNoRanges},
		{"garbage", bad(206, "bytes x-300/90000"), errNoRanges},
		{"backwards", bad(206, "bytes 1000-999/90000"), errNoRanges},
		{"another size", bad(206, "bytes 1000-1299/90001"), errChanged},
		{"smaller", bad(206, "bytes 1000-1299/1300"), errChanged},
		{"beyond the end", bad(206, "bytes 1000-90000/*"), errChanged},
		{"compressed", func(f *flaky, w http.ResponseWriter) {
			w.Header().Set("Content-Encoding", "gzip")
			f.spanned(w, 1000, 5000)
		}, errNoRanges},
		{"204", bad(204, ""), errNoRanges}, {"304", bad(304, ""), errNoRanges}, {"400", bad(400, ""), errNoRanges},
		{"501", bad(501, ""), errNoRanges}, {"412", bad(412, ""), errChanged},
		{"another ETag", tag(`"two"`, "", 206), errChanged}, {"another weak one", tag(`W/"two"`, "", 206), errChanged},
		{"another ETag, 200", tag(`"two"`, "", 200), errChanged},
		{"another date", tag("", "Mon, 02 Jan 2006 15:04:06 GMT", 206), errChanged},
		{"403", bad(403, ""), nil}, {"500", bad(500, ""), nil},
		{"a web page", func(f *flaky, w http.ResponseWriter) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html><title>Log in</title></html>")
		}, errUseless},
	} {
		for _, first := range []int{1, 3} {
			f := newFlaky(t, 90_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
				if n < first {
					f.spanned(w, int(spans[n-1][0]), int(spans[n-1][1]))
					return
				}
				c.answer(f, w)
			})
			o := downloadOptions{etag: `"one"`}
			if c.name == "another date" {
				o = downloadOptions{lastModified: "Mon, 02 Jan 2006 15:04:05 GMT"}
			}
			err := readSpans(t, f, spanDownload(t, f, o))
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%s, request %d: got %v, want %v", c.name, first, err, c.want)
			}
			if len(f.ranges) > first+3 {
				t.Errorf("%s, request %d: %d requests", c.name, first, len(f.ranges))
			}
			if c.want == errNoRanges && first == 1 && len(f.ranges) != 1 {
				t.Errorf("%s: asked %d times of a server that never gave a part", c.name, len(f.ranges))
			}
			if c.want == errChanged && len(f.ranges) != first || exitCode(err) == exitRefused {
				t.Errorf("%s, request %d: got %v after %d requests", c.name, first, err, len(f.ranges))
			}
		}
	}
	f := newFlaky(t, 2<<20, func(f *flaky, _ int, w http.ResponseWriter, _ *http.Request) {
		f.spanned(w, 1000, len(f.data))
	})
	if err := readSpans(t, f, spanDownload(t, f, downloadOptions{})); err != nil {
		t.Errorf("a little before: got %v", err)
	}
	if err := spanDownload(t, f, downloadOptions{}).span(2<<20-9, 2<<20); !errors.Is(err, errNoRanges) {
		t.Errorf("far before: got %v", err)
	}
	g := newFlaky(t, 90_000, func(f *flaky, _ int, w http.ResponseWriter, _ *http.Request) {
		f.ranged(w, 1000, 1300, "bytes 1000-1299/1300")
	})
	if err := readSpans(t, g, spanDownload(t, g, downloadOptions{size: -1})); !errors.Is(err, errChanged) {
		t.Errorf("too small for what is in it: got %v", err)
	}
	for _, s := range [][2]int64{{-1, 4}, {4, 4}, {5, 4}, {0, 2<<20 + 1}} {
		if err := spanDownload(t, f, downloadOptions{}).span(s[0], s[1]); err == nil {
			t.Errorf("span %d: want an error", s)
		}
	}
}

// Of a redirect to a presigned link the place is remembered for as long as it is good.
func TestDownloadSpansRedirect(t *testing.T) {
	var store *flaky
	good := 2 // answers by one link
	front := newFlaky(t, 90_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprintf("%s/%d", store.URL, n), http.StatusFound)
	})
	uses := map[string]int{}
	store = newFlaky(t, 90_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		if uses[r.URL.Path]++; uses[r.URL.Path] > good {
			w.WriteHeader(403)
			return
		}
		f.serve(w, r)
	})
	err := readSpans(t, front, spanDownload(t, front, downloadOptions{etag: `"one"`}))
	if err != nil || len(front.ranges) != 3 || len(store.ranges) != len(spans)+2 {
		t.Fatalf("got %v by %q and %q", err, front.ranges, store.ranges)
	}
	// A link that is never good is an end.
	good = 0
	err = readSpans(t, front, spanDownload(t, front, downloadOptions{etag: `"one"`}))
	if httpStatus(err) != 403 || len(front.ranges) != 4 {
		t.Fatalf("got %v by %q", err, front.ranges)
	}
}

// A link expires between spans, the line stalls in one, and the pace is kept over all.
func TestDownloadSpansGoOn(t *testing.T) {
	f := newFlaky(t, 90_000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		from, to := bounds(t, r)
		switch {
		case n == 2:
			w.WriteHeader(410)
		case n == 4:
			w.Header().Set("Content-Length", strconv.Itoa(to-from))
			f.spanned(w, from, from+500)
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		default:
			f.spanned(w, from, to)
		}
	})
	asked := 0
	d := spanDownload(t, f, downloadOptions{stall: 100 * time.Millisecond, limitRate: 1000,
		relink: func(context.Context) (string, error) { asked++; return f.URL, nil }})
	must(t, readSpans(t, f, d))
	if asked != 1 || !strings.HasPrefix(f.ranges[4], "bytes=20500-") {
		t.Errorf("got %d new links, ranges %q", asked, f.ranges)
	}
	if owed := f.fast.slept[len(f.fast.slept)-1]; owed < 20*time.Second {
		t.Errorf("the last wait was %s, want about 45s", owed)
	}
}

// What may be all that is wanted is asked for first. If more is, it comes in few steps, and from servers that know no
// ranges all at once.
func TestDownloadFirst(t *testing.T) {
	const size = 3 << 20
	steps := []string{"bytes=0-262143", "bytes=262144-2359295", "bytes=2359296-21233663"}
	for _, c := range []struct {
		name   string
		size   int
		answer func(f *flaky, n int, w http.ResponseWriter, r *http.Request)
		want   []string
		whole  bool
		conns  int
	}{
		{"in steps", size, func(f *flaky, _ int, w http.ResponseWriter, r *http.Request) { f.serve(w, r) }, steps, false, 1},
		{"small", 1000, func(f *flaky, _ int, w http.ResponseWriter, r *http.Request) { f.serve(w, r) }, steps[:1], false, 1},
		{"just that", 256 << 10, func(f *flaky, _ int, w http.ResponseWriter, r *http.Request) { f.serve(w, r) },
			steps[:1], false, 1},
		{"no ranges", size, func(f *flaky, _ int, w http.ResponseWriter, _ *http.Request) { w.Write(f.data) },
			steps[:1], true, 1},
		{"no word for them", size, func(f *flaky, _ int, w http.ResponseWriter, r *http.Request) { status(501)(f, w, r) },
			[]string{steps[0], ""}, true, 2},
		{"empty", 0, func(f *flaky, _ int, w http.ResponseWriter, r *http.Request) { status(416)(f, w, r) },
			[]string{steps[0], ""}, true, 2},
		{"cut", size, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
			if n == 2 {
				f.part(w, 206, 256<<10, 300_000)
			}
			f.serve(w, r)
		}, []string{steps[0], steps[1], "bytes=300000-2699999", "bytes=2700000-24299999"}, false, 2},
	} {
		f := newFlaky(t, c.size, c.answer)
		_, d, err := f.get(t, downloadOptions{first: inputBuffer})
		f.mu.Lock()
		if err != nil || !slices.Equal(f.ranges, c.want) || d.Whole != c.whole || f.conns > c.conns {
			t.Errorf("%s: got %v, %q over %d connections, whole %v", c.name, err, f.ranges, f.conns, d.Whole)
		}
		f.mu.Unlock()
	}
}

// What follows header and index comes over the same connection, if little was left of the first answer.
func TestDownloadFirstIsClosed(t *testing.T) {
	for _, c := range []struct {
		read, first, rate int64
		conns             int
	}{
		{100_000, 100_000, 0, 1}, {36_000, 100_000, 0, 1}, {10_000, 100_000, 0, 2}, {80_000, 100_000, 1 << 30, 2},
		{80_000, 0, 0, 2},
	} {
		f := newFlaky(t, 8<<20, func(f *flaky, _ int, w http.ResponseWriter, r *http.Request) { f.serve(w, r) })
		d, err := openDownload(t.Context(), f.hc, f.URL, downloadOptions{first: c.first, limitRate: c.rate})
		must(t, err)
		_, err = io.CopyN(io.Discard, d, c.read)
		must(t, err)
		must(t, d.Close())
		must(t, readSpans(t, f, spanDownload(t, f, downloadOptions{etag: `"one"`})))
		f.mu.Lock()
		if f.conns != c.conns || c.conns == 1 && d.Fetched != c.first {
			t.Errorf("%+v: got %d connections, %d bytes", c, f.conns, d.Fetched)
		}
		f.mu.Unlock()
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 3-8/9", "bytes 3-8/*", "bytes 3-8", "bytes 3-/9", "bytes */9",
		"bytes=3-4611686018427387903/*", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		at, upto, total, err := parseContentRange([]string{s})
		if err == nil && (at < 0 || upto < 0 || total < -1 || total >= 0 && upto > total) {
			t.Fatalf("%q: got %d to %d of %d", s, at, upto, total)
		}
	})
}
