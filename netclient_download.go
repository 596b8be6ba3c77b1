// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// Downloads: one URL, read to its end over as many connections as that takes.

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	defaultStall = 2 * time.Minute
	// progressBytes within the stall time keep a connection; as many in all give the
	// retries back. Less is no progress: a server could hold us for ever by a byte a minute.
	progressBytes   = 1024
	maxUnsized      = 16 << 30 // bytes taken from a server that does not say how many there are
	maxDownloadWait = 10 * time.Minute
)

var errStalled = errors.New("stalled")

type downloadOptions struct {
	offset             int64  // first byte wanted
	size               int64  // of the whole, as known from before; 0: unknown
	etag, lastModified string // as known from before, or ""
	// relink gives a new URL for the same bytes when the server answers 403, 404 or 410
	// (a presigned link has expired); nil: there is none.
	relink    func(context.Context) (string, error)
	retries   int           // without progress; 0: 10
	stall     time.Duration // longest time without progress; 0: 2 minutes
	limitRate int64         // bytes per second; 0: none
	sleep     func(context.Context, time.Duration) error
	lg        *logger
}

// download reads one URL to its end, over as many connections as that takes.
type download struct {
	Size         int64 // of the whole; -1 while unknown
	ETag         string
	LastModified string
	URLKey       string // the URL without its query
	Fetched      int64  // bytes of the body that came over the network

	ctx     context.Context
	hc      *http.Client
	url     string
	o       downloadOptions
	off     int64
	body    io.ReadCloser // nil between connections
	conn    context.Context
	cancel  context.CancelCauseFunc
	watch   *time.Timer   // cancels conn; runs only while the network is waited for
	waited  time.Duration // for the network, since the last progress
	window  int64         // bytes since then
	tries   int           // failures since the last progress
	relinks int           // since the last progress
	gained  int64
	due     time.Time // when the rate limit lets the next byte through
}

// openDownload returns when the server has answered with the body, or after all retries.
// Errors: errChanged; exit code 75 when trying later may help; else final.
func openDownload(ctx context.Context, hc *http.Client, rawURL string, o downloadOptions) (*download, error) {
	if o.retries <= 0 {
		o.retries = 10
	}
	if o.stall <= 0 {
		o.stall = defaultStall
	}
	if o.sleep == nil {
		o.sleep = sleepContext
	}
	d := &download{ctx: ctx, hc: hc, o: o, off: o.offset, Size: -1, ETag: o.etag, LastModified: o.lastModified}
	if o.size > 0 {
		d.Size = o.size
	}
	if err := d.setURL(rawURL); err != nil {
		return nil, err
	}
	if d.atEnd() {
		return d, nil
	}
	if err := d.connect(); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *download) setURL(raw string) error {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return refuse("download: not an http or https URL")
	}
	d.url, d.URLKey = raw, urlKey(u)
	return nil
}

func (d *download) atEnd() bool { return d.Size >= 0 && d.off >= d.Size }

func (d *download) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if d.atEnd() {
			d.Close()
			return 0, io.EOF
		}
		if d.body == nil {
			if err := d.connect(); err != nil {
				return 0, err
			}
		}
		n, err := d.readSome(p)
		if d.Size < 0 && d.off > maxUnsized {
			d.Close()
			return 0, fmt.Errorf("%q: more than %d bytes, and the server did not say how many there are", d.URLKey, int64(maxUnsized))
		}
		if n > 0 {
			return n, d.pace(n)
		}
		if err == nil {
			continue
		}
		d.Close()
		if err == io.EOF && d.Size < 0 {
			d.Size = d.off
			return 0, io.EOF
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err := d.again(tryLater("%q: %w", d.URLKey, err)); err != nil {
			return 0, err
		}
	}
}

// readSome reads once from the connection, never past the end of the file.
func (d *download) readSome(p []byte) (int, error) {
	if d.Size >= 0 {
		p = p[:min(int64(len(p)), d.Size-d.off)]
	}
	if d.o.limitRate > 0 {
		p = p[:min(int64(len(p)), d.o.limitRate/8+1)]
	}
	n, err := d.receive(p)
	d.off += int64(n)
	d.gained += int64(n)
	if d.gained >= progressBytes {
		d.gained, d.tries, d.relinks = 0, 0, 0
	}
	return n, err
}

// receive is one Read of the body under the watch. The time that the caller takes for
// what it got does not count.
func (d *download) receive(p []byte) (int, error) {
	began := time.Now()
	d.watch.Reset(d.o.stall - d.waited)
	n, err := d.body.Read(p)
	d.watch.Stop()
	d.waited += time.Since(began)
	d.window += int64(n)
	d.Fetched += int64(n)
	if d.window >= progressBytes {
		d.waited, d.window = 0, 0
	}
	if err != nil && context.Cause(d.conn) == errStalled {
		err = fmt.Errorf("fewer than %d bytes in %s", progressBytes, d.o.stall)
	}
	return n, err
}

// pace keeps to the rate limit after n bytes.
func (d *download) pace(n int) error {
	if d.o.limitRate <= 0 {
		return nil
	}
	now := time.Now()
	if d.due.Before(now) {
		d.due = now
	}
	d.due = d.due.Add(time.Duration(float64(n) / float64(d.o.limitRate) * float64(time.Second)))
	return d.o.sleep(d.ctx, d.due.Sub(now))
}

// Close ends the connection. A later Read would make a new one.
func (d *download) Close() error {
	if d.body != nil {
		d.body.Close()
		d.body = nil
		d.watch.Stop()
		d.cancel(nil)
	}
	return nil
}

// connect tries until there is a body that begins at d.off, or gives up.
func (d *download) connect() error {
	for {
		err := d.request()
		if err == nil {
			return nil
		}
		switch httpStatus(err) {
		case 403, 404, 410:
			if d.o.relink == nil || d.relinks >= 2 {
				return err
			}
			d.relinks++
			d.o.lg.infof("%v: asking for a new link", err)
			var fresh string
			if fresh, err = d.o.relink(d.ctx); err == nil {
				err = d.setURL(fresh)
			}
			if err == nil {
				continue
			}
		}
		if err := d.again(err); err != nil {
			return err
		}
	}
}

// again decides after a failure: it waits and returns nil, or returns what to give up with.
// What the network did is tried again; what the server said clearly is not.
func (d *download) again(err error) error {
	if d.ctx.Err() != nil {
		return context.Cause(d.ctx)
	}
	if !isTemporary(err) {
		return err
	}
	d.tries++
	wait := max(downloadBackoff(d.tries), retryAfterOf(err))
	if d.tries > d.o.retries || wait > maxDownloadWait {
		return withHint(tryLater("download stopped at byte %d after %d tries: %w", d.off, d.tries, err), "%s", hintOf(err))
	}
	d.o.lg.warnf("%v; trying again from byte %d in %s (%d of %d)", err, d.off, wait.Round(time.Second/10), d.tries, d.o.retries)
	return d.o.sleep(d.ctx, wait)
}

// downloadBackoff is 2 s, doubled with each try up to 5 min, and up to a quarter more so
// that devices which lost the same server do not come back together.
func downloadBackoff(try int) time.Duration {
	d := min(time.Second<<min(try, 20), 5*time.Minute)
	return d + rand.N(d/4)
}

// request makes one connection.
func (d *download) request() error {
	d.conn, d.cancel = context.WithCancelCause(d.ctx)
	cancel := d.cancel
	d.watch = time.AfterFunc(d.o.stall, func() { cancel(errStalled) })
	d.waited, d.window = 0, 0
	req, err := http.NewRequestWithContext(d.conn, http.MethodGet, d.url, nil)
	if err != nil {
		return refuse("download: not an http or https URL")
	}
	req.Header.Set("Accept-Encoding", "identity")
	if d.off > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(d.off, 10)+"-")
		if v := d.validator(); v != "" {
			req.Header.Set("If-Range", v)
		}
	}
	resp, err := d.hc.Do(req)
	d.watch.Stop()
	if err != nil {
		defer d.cancel(nil)
		if context.Cause(d.conn) == errStalled {
			return tryLater("%q: no answer in %s", d.URLKey, d.o.stall)
		}
		return fmt.Errorf("%q: %w", d.URLKey, tidyNetError(err))
	}
	d.body = resp.Body
	skip, err := d.accept(resp)
	if err == nil {
		err = d.skip(skip)
	}
	if err != nil {
		d.Close()
	}
	return err
}

// validator is what If-Range may carry: a strong ETag, else the date (RFC 9110, 13.1.5).
func (d *download) validator() string {
	if d.ETag != "" {
		if strings.HasPrefix(d.ETag, "W/") {
			return ""
		}
		return d.ETag
	}
	return d.LastModified
}

// accept checks the header of an answer and takes over what it says about the file. skip
// is how many bytes of the body come before d.off.
func (d *download) accept(r *http.Response) (skip int64, err error) {
	total := r.ContentLength
	switch {
	case r.StatusCode == http.StatusOK:
		skip = d.off
	case r.StatusCode == http.StatusPartialContent && d.off > 0:
		if total, err = checkContentRange(r.Header.Values("Content-Range"), d.off, d.Size); err != nil {
			return 0, fmt.Errorf("%q: %w", d.URLKey, err)
		}
	case r.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		return 0, fmt.Errorf("%q: it ends before byte %d: %w", d.URLKey, d.off, errChanged)
	case r.StatusCode < 400:
		return 0, fmt.Errorf("%q: got HTTP status %d, want 200", d.URLKey, r.StatusCode)
	default:
		return 0, newStatusError(fmt.Sprintf("%q", d.URLKey), r, "")
	}
	if enc := r.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return 0, fmt.Errorf("%q: got Content-Encoding %q, want none", d.URLKey, enc)
	}
	if d.Size >= 0 && total >= 0 && total != d.Size {
		return 0, fmt.Errorf("%q: got %d bytes, want %d: %w", d.URLKey, total, d.Size, errChanged)
	}
	etag, modified := r.Header.Get("ETag"), r.Header.Get("Last-Modified")
	if changed(d.ETag, etag) || (d.ETag == "" || etag == "") && changed(d.LastModified, modified) {
		return 0, fmt.Errorf("%q: got ETag %q, Last-Modified %q, want %q, %q: %w",
			d.URLKey, etag, modified, d.ETag, d.LastModified, errChanged)
	}
	if skip > 0 && total >= 0 && total < skip {
		return 0, fmt.Errorf("%q: got %d bytes, want more than %d: %w", d.URLKey, total, skip, errChanged)
	}
	if d.Size < 0 {
		d.Size = total
	}
	d.ETag, d.LastModified = cmp.Or(etag, d.ETag), cmp.Or(modified, d.LastModified)
	return skip, nil
}

func changed(was, is string) bool { return was != "" && is != "" && was != is }

// skip reads over the beginning when the server does not do ranges.
func (d *download) skip(n int64) error {
	if n == 0 {
		return nil
	}
	d.o.lg.warnf("%q: the server ignores ranges: the first %d bytes come again", d.URLKey, n)
	buf := make([]byte, 32<<10)
	for n > 0 {
		got, err := d.receive(buf[:min(n, int64(len(buf)))])
		n -= int64(got)
		if err != nil {
			return tryLater("%q: %w", d.URLKey, err)
		}
		if err := d.pace(got); err != nil {
			return err
		}
	}
	return nil
}

// checkContentRange wants "bytes OFF-END/TOTAL" once, to the end of the file. TOTAL may be
// "*" or missing. It returns the size of the whole; size is what is known, or -1.
func checkContentRange(values []string, off, size int64) (int64, error) {
	if len(values) != 1 {
		return 0, fmt.Errorf("got %d Content-Range headers, want one", len(values))
	}
	bad := fmt.Errorf("got Content-Range %q, want from byte %d to the end (of %d)", values[0], off, size)
	rest, ok := strings.CutPrefix(values[0], "bytes ")
	span, totalText, hasTotal := strings.Cut(rest, "/")
	first, last, dash := strings.Cut(span, "-")
	start, err1 := decimal(first)
	end, err2 := decimal(last)
	if !ok || !dash || err1 != nil || err2 != nil || start != off || end < start {
		return 0, bad
	}
	total := end + 1
	if hasTotal && totalText != "*" {
		if n, err := decimal(totalText); err != nil {
			return 0, bad
		} else if size >= 0 && n != size {
			return 0, fmt.Errorf("got Content-Range %q, want a total of %d: %w", values[0], size, errChanged)
		} else if n != total {
			return 0, bad
		}
	}
	if size >= 0 && total != size {
		return 0, bad
	}
	return total, nil
}

// decimal reads digits only: no sign, no space; at most 2^62, so that one more still fits.
func decimal(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 62)
	return int64(n), err
}

// netFlags are the options of the verbs that use the network.
type netFlags struct {
	limitRate  int64
	deadline   time.Duration
	splay      time.Duration
	noReboot   bool
	force      bool
	passphrase string

	// For tests: other times and clocks.
	tuneDownload func(*downloadOptions)
	tuneNet      func(*netOptions)
}

func (n *netFlags) downloadFlags(fs *flag.FlagSet) {
	fs.Func("limit-rate", "download at most this many `BYTES` per second; k and M may follow (no limit)", func(s string) (err error) {
		n.limitRate, err = parseRate(s)
		return err
	})
}

func parseRate(s string) (int64, error) {
	unit := int64(1)
	if len(s) > 0 {
		switch s[len(s)-1] {
		case 'k', 'K':
			unit, s = 1000, s[:len(s)-1]
		case 'M':
			unit, s = 1000000, s[:len(s)-1]
		}
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil || v < 1 || v > 1<<40/unit {
		return 0, fmt.Errorf("rate %q: want a number above 0, with k or M behind it or not", s)
	}
	return v * unit, nil
}
