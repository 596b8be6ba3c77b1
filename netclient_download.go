// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// Downloads: one URL, read to its end over as many connections as that takes.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
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

var (
	errStalled = errors.New("stalled")
	// errUseless: what came does not hold the bytes that are wanted next.
	errUseless = errors.New("answer of no use")
)

// A connection is kept if no more than keepRest bytes, which are on their way, and the end of the answer come in
// keepWait: a new one costs more.
const (
	keepRest = 64 << 10
	keepWait = time.Second
)

// maxBefore is how many bytes before those of a span are read over, as of a proxy that has a file in slices.
const maxBefore = 1 << 20

type downloadOptions struct {
	offset             int64  // first byte wanted
	size               int64  // of the whole, as known from before; 0: unknown
	etag, lastModified string // as known from before, or ""
	// same: the file must not change between one answer and the next, so it is errChanged when its validators
	// are others than the first, and only the bytes that span aims at are asked for.
	same bool
	// first bounds the first answer, in bytes, as what is sent and not read is fetched in vain; each one after it may be
	// eight times as long as all before, or ends where want says. 0: one answer gives all.
	first int64
	// relink gives a new URL for the same bytes when the server answers 403, 404 or 410
	// (a presigned link has expired); nil: there is none.
	relink func(context.Context) (string, error)
	// mixed is called when an answer has another ETag or date than one before it. Replicas behind one
	// name differ in these for the same file; so whether it is the same only its hash tells. nil: nobody cares.
	mixed     func()
	retries   int           // without progress; 0: 10
	stall     time.Duration // longest time without progress; 0: 2 minutes
	limitRate int64         // bytes per second; 0: none
	sleep     func(context.Context, time.Duration) error
	lg        *logger
}

// download reads one URL to its end, or span after span of it, over as many connections as that takes. It is for one
// goroutine at a time.
type download struct {
	Size         int64 // of the whole; -1 while unknown
	ETag         string
	LastModified string
	URLKey       string // the URL without its query
	Fetched      int64  // bytes of the body that came over the network
	Whole        bool   // of what was asked for first, a part, the whole came

	ctx     context.Context
	hc      *agent
	url     string
	o       downloadOptions
	direct  string // where a redirect of url led, which is asked without it as long as that goes; or ""
	off     int64
	end     int64         // of the span; -1: that of the file
	body    io.ReadCloser // nil between connections
	from    int64         // where in the file the new bytes of this answer begin
	upto    int64         // where its bytes end; -1: not known
	next    int64         // where the next answer is to end, if that is behind off
	whole   bool          // ask without a range, as an answer to one was of no use
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

// want says that nothing from end on is wanted yet, and gives how many more requests it takes up to there.
func (d *download) want(end int64) int64 {
	if d.o.first == 0 || d.upto < 0 || end <= d.upto {
		return 0
	}
	d.next = end
	return 1
}

// openDownload returns when the server has answered with the body, or after all retries.
// Errors: exit code 75 when trying later may help, errChanged with it; else final.
func openDownload(ctx context.Context, hc *agent, rawURL string, o downloadOptions) (*download, error) {
	if o.retries <= 0 {
		o.retries = 10
	}
	if o.stall <= 0 {
		o.stall = defaultStall
	}
	if o.sleep == nil {
		o.sleep = sleepContext
	}
	d := &download{ctx: ctx, hc: hc, o: o, off: o.offset, end: -1, Size: -1, ETag: o.etag, LastModified: o.lastModified}
	if o.size > 0 {
		d.Size = o.size
	}
	if err := d.setURL(rawURL); err != nil {
		return nil, err
	}
	if o.same {
		d.end = 0
	}
	if d.atEnd() {
		return d, nil
	}
	if err := d.connect(); err != nil {
		return nil, err
	}
	return d, nil
}

// span is for downloads with o.same; see spanReader.
func (d *download) span(off, end int64) error {
	d.Close()
	if off < 0 || off >= end || d.Size >= 0 && end > d.Size {
		return fmt.Errorf("%q: got bytes %d to %d to fetch, want some of a file of %d", d.URLKey, off, end, d.Size)
	}
	d.off, d.end = off, end
	return d.connect()
}

func (d *download) setURL(raw string) error {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return refuse("download: not an http or https URL")
	}
	d.url, d.URLKey, d.direct = raw, urlKey(u), ""
	return nil
}

func (d *download) atEnd() bool {
	return d.Size >= 0 && d.off >= d.Size || d.end >= 0 && d.off >= d.end
}

func (d *download) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for !d.atEnd() {
		if d.body == nil {
			if err := d.connect(); err != nil {
				return 0, err
			}
			continue // that may have found the end
		}
		n, err := d.readSome(p)
		if d.Size < 0 && d.off > maxUnsized {
			d.Close()
			return 0, fmt.Errorf("%q: more than %d bytes, and the server did not say how many there are",
				d.URLKey, int64(maxUnsized))
		}
		if n > 0 {
			return n, d.pace(n)
		}
		if err == nil {
			continue
		}
		if err := d.ended(err); err != nil {
			return 0, err
		}
	}
	d.Close()
	return 0, io.EOF
}

// ended is called when there is no more of an answer: it decides whether that is the end of the
// file, of one slice of it, or a failure.
func (d *download) ended(err error) error {
	d.Close()
	switch {
	case err != io.EOF:
	case d.upto < 0 && d.Size < 0:
		d.Size = d.off // nobody said how many there are, and the connection ended as it must
		return nil
	case d.off != d.upto:
		err = io.ErrUnexpectedEOF
	case d.off-d.from >= progressBytes:
		return nil
	default: // else a server could hold us for ever by a byte an answer
		err = fmt.Errorf("got %d bytes in an answer, want %d or more", d.off-d.from, progressBytes)
	}
	return d.again(tryLater("%q: %w", d.URLKey, err))
}

// readSome reads once from the connection, never past the end of the file or of what was announced.
func (d *download) readSome(p []byte) (int, error) {
	if d.off == d.upto {
		return 0, io.EOF
	}
	for _, end := range []int64{d.Size, d.upto, d.end} {
		if end >= 0 {
			p = p[:min(int64(len(p)), end-d.off)]
		}
	}
	if d.o.limitRate > 0 {
		p = p[:min(int64(len(p)), d.o.limitRate/8+1)]
	}
	n, err := d.receive(p)
	d.off += int64(n)
	d.gained += int64(n)
	if d.gained >= progressBytes {
		d.gained, d.tries, d.relinks, d.whole = 0, 0, 0, false
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
		d.stalled()
		err = fmt.Errorf("fewer than %d bytes in %s", progressBytes, d.o.stall)
	}
	return n, err
}

// stalled: large packets may be what gets lost, so the next connection does without.
//
//go:noinline
func (d *download) stalled() {
	d.hc.dial.narrowDown()
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

// Close ends the answer; a later Read would ask for more. The connection is kept if there is no more in the answer, or
// little of what may be all that was wanted, and if its end is seen, as behind the last chunk.
func (d *download) Close() error {
	rest := d.upto - d.off
	if d.body != nil && (rest == 0 || rest > 0 && rest <= keepRest && d.o.first > 0 && d.o.limitRate <= 0) {
		d.watch.Reset(min(d.o.stall, keepWait))
		n, _ := io.CopyN(io.Discard, d.body, rest+1) // a connection that fails is not kept
		d.Fetched += min(n, rest)
	}
	d.drop()
	return nil
}

// drop ends the connection.
func (d *download) drop() {
	if d.body != nil {
		d.body.Close()
		d.body = nil
		d.watch.Stop()
		d.cancel(nil)
	}
}

// connect tries until there is a body that begins at d.off, or gives up.
func (d *download) connect() error {
	for {
		err := d.request()
		if err == nil {
			return nil
		}
		if isDistrust(err) && d.off > 0 { // it was trusted when the first bytes came
			err = tryLater("%w", err)
		}
		if errors.Is(err, errUseless) && d.ranged() && !d.o.same {
			d.o.lg.warnf("%v; asking for the whole file", err)
			d.whole = true
			continue
		}
		was := d.direct
		d.direct = ""
		switch httpStatus(err) {
		case 403, 404, 410:
			if was != "" {
				continue
			}
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
// What the network did is tried again; what the server said clearly is not, nor what has made no
// sense from the first answer on.
func (d *download) again(err error) error {
	if d.ctx.Err() != nil {
		return context.Cause(d.ctx)
	}
	if !isTemporary(err) || errors.Is(err, errChanged) || d.Fetched == 0 && errors.Is(err, errUseless) {
		return err
	}
	if errors.Is(err, errNoRanges) && d.tries >= 2 { // it had them before: one of several may be at fault
		return err
	}
	d.tries++
	wait := max(downloadBackoff(d.tries), retryAfterOf(err))
	if d.tries > d.o.retries || wait > maxDownloadWait {
		return withHint(tryLater("download stopped at byte %d after %d tries: %w", d.off, d.tries, err),
			"%s", hintOf(err))
	}
	d.o.lg.warnf("%v; trying again from byte %d in %s (%d of %d)",
		err, d.off, wait.Round(time.Second/10), d.tries, d.o.retries)
	return d.o.sleep(d.ctx, wait)
}

// downloadBackoff is 2 s, doubled with each try up to 5 min, and up to a quarter more so
// that devices which lost the same server do not come back together.
func downloadBackoff(try int) time.Duration {
	d := min(time.Second<<min(try, 20), 5*time.Minute)
	return d + rand.N(d/4)
}

// ranged tells that not the whole file is asked for.
func (d *download) ranged() bool { return d.o.same || !d.whole && (d.off > 0 || d.o.first > 0) }

// request makes one connection.
func (d *download) request() error {
	d.conn, d.cancel = context.WithCancelCause(d.ctx)
	cancel := d.cancel
	d.watch = time.AfterFunc(d.o.stall, func() { cancel(errStalled) })
	d.waited, d.window = 0, 0
	req, err := http.NewRequestWithContext(d.conn, http.MethodGet, cmp.Or(d.direct, d.url), nil)
	if err != nil {
		return refuse("download: not an http or https URL")
	}
	req.Header.Set("Accept-Encoding", "identity")
	// No If-Range: where each replica has an ETag of its own it would make the whole file come again.
	if d.o.same {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", d.off, d.end-1))
		switch { // a weak ETag never matches (RFC 9110, 13.1.1); it is looked at in the answer
		case strings.HasPrefix(d.ETag, `"`):
			req.Header.Set("If-Match", d.ETag)
		case d.LastModified != "":
			req.Header.Set("If-Unmodified-Since", d.LastModified)
		}
	} else if d.ranged() {
		span := "bytes=" + strconv.FormatInt(d.off, 10) + "-"
		if d.o.first > 0 {
			end := d.next
			if end <= d.off {
				end = d.off + max(d.o.first, 8*d.off)
			}
			span += strconv.FormatInt(end-1, 10)
		}
		req.Header.Set("Range", span)
	}
	resp, err := d.hc.Do(req)
	d.watch.Stop()
	if err != nil {
		defer d.cancel(nil)
		if context.Cause(d.conn) == errStalled {
			d.stalled()
			return tryLater("%q: no answer in %s", d.URLKey, d.o.stall)
		}
		return fmt.Errorf("%q: %w", d.URLKey, err)
	}
	d.body = resp.Body
	at, err := d.accept(resp)
	if err == nil && !d.atEnd() {
		err = d.skip(d.off - at)
	}
	d.from = d.off
	if err != nil {
		d.drop()
	} else if d.o.same && resp.Request.URL.String() != d.url {
		d.direct = resp.Request.URL.String()
	}
	return err
}

// accept finds out which bytes of the file an answer has: those from at, which may be before
// d.off, to d.upto. It takes over what the answer says about the file. Any bytes that are wanted are
// taken, in whatever way they come: that they are the right ones is for the manifest's SHA-256 to say.
func (d *download) accept(r *http.Response) (at int64, err error) {
	span := r.Header.Values("Content-Range")
	total, all := r.ContentLength, false
	d.upto = total
	switch c := r.StatusCode; {
	case c == http.StatusPartialContent, c == http.StatusOK && len(span) > 0: // proxies make a 200 of a 206
		if at, d.upto, total, err = d.part(r, span); err != nil {
			return 0, d.useless("%w", err)
		}
	case c == http.StatusOK, c == http.StatusNonAuthoritativeInfo:
		all = true
		d.Whole = d.o.first > 0
	case c == http.StatusRequestedRangeNotSatisfiable:
		return d.off, d.pastEnd(span)
	case c < 400:
		return 0, d.useless("got HTTP status %d, want 200", c)
	case c == http.StatusPreconditionFailed && d.o.same:
		return 0, tryLater("%q: got HTTP status %d: %w", d.URLKey, c, errChanged)
	case d.ranged() && rangeTrouble(c):
		return 0, d.useless("%w", newStatusError("range", r, d.head(maxHead)))
	default:
		return 0, newStatusError(fmt.Sprintf("%q", d.URLKey), r, d.head(maxHead))
	}
	if at == 0 {
		// An artifact begins with its member "version".
		if head := d.head(8); isWebPage(r.Header, head) && !bytes.HasPrefix(head, []byte("version\x00")) {
			return 0, withHint(tryLater("%q: %w: got a web page, %q, want an artifact", d.URLKey, errUseless,
				serverWords(d.head(maxHead))), "%s", hintPage)
		}
	}
	if enc := strings.ToLower(r.Header.Get("Content-Encoding")); !harmlessEncoding[enc] {
		return 0, withHint(d.useless("got Content-Encoding %q, want none", enc),
			"the server, or a proxy on the way, has to leave the file as it is")
	}
	if d.Size >= 0 && (total >= 0 && total != d.Size || d.upto > d.Size) || total >= 0 && total < d.end {
		return 0, d.useless("got a file of %d bytes, want %d: %w", max(total, d.upto), max(d.Size, d.end), errChanged)
	}
	if d.o.same && (all || d.off-at > maxBefore) {
		return 0, d.useless("got HTTP status %d and bytes from %d on, want %d to %d", r.StatusCode, at, d.off, d.end-1)
	}
	if at > d.off || d.upto >= 0 && d.upto <= d.off && total != d.off {
		return 0, d.useless("got bytes %d to %d, want some from byte %d on", at, d.upto, d.off)
	}
	if d.Size < 0 {
		d.Size = total
	}
	return at, d.validate(r.Header.Get("ETag"), r.Header.Get("Last-Modified"))
}

// validate compares what an answer says of the file with what one before it said.
func (d *download) validate(etag, modified string) error {
	old, is := strings.TrimPrefix(d.ETag, "W/"), strings.TrimPrefix(etag, "W/")
	if d.o.same {
		if changed(old, is) || (old == "" || is == "") && changed(d.LastModified, modified) {
			return tryLater("%q: got ETag %q, Last-Modified %q, want %q, %q: %w",
				d.URLKey, etag, modified, d.ETag, d.LastModified, errChanged)
		}
		d.ETag, d.LastModified = cmp.Or(d.ETag, etag), cmp.Or(d.LastModified, modified)
		return nil
	}
	if changed(old, is) || changed(d.LastModified, modified) {
		d.o.lg.debugf("%q: got ETag %q, Last-Modified %q, want %q, %q",
			d.URLKey, etag, modified, d.ETag, d.LastModified)
		if d.o.mixed != nil {
			d.o.mixed()
		}
	}
	d.ETag, d.LastModified = cmp.Or(etag, d.ETag), cmp.Or(modified, d.LastModified)
	return nil
}

const maxHead = 2 << 10 // bytes of a page or an error that are looked at

// head gives the first n bytes of the body, of which there may be fewer, without taking them.
func (d *download) head(n int) []byte {
	d.watch.Reset(d.o.stall)
	defer d.watch.Stop()
	in := bufio.NewReaderSize(d.body, n)
	head, _ := in.Peek(n) // what is wrong will be met again
	d.body = readCloser{in, d.body}
	return head
}

// useless makes the error for an answer that cannot be used.
func (d *download) useless(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if d.o.same && !errors.Is(err, errChanged) {
		err = fmt.Errorf("%w: %w", errNoRanges, err)
	}
	return tryLater("%q: %w: %w", d.URLKey, errUseless, err)
}

func changed(was, is string) bool { return was != "" && is != "" && was != is }

// harmlessEncoding: these leave a file as it is. Object stores keep "aws-chunked" from the upload.
var harmlessEncoding = map[string]bool{"": true, "identity": true, "aws-chunked": true, "binary": true, "none": true}

// rangeTrouble tells the statuses that a server without a mind for ranges may answer one with, and
// that say nothing of the file itself.
func rangeTrouble(code int) bool {
	switch code {
	case 400, 405, 406, 411, 412, 413, 414, 417, 422, 428, 431, 501:
		return true
	}
	return false
}

// part reads what a partial answer says of itself: where in the file its bytes begin and end, and
// the size of the file, -1 if it does not say.
func (d *download) part(r *http.Response, span []string) (at, upto, total int64, err error) {
	kind := before(r.Header.Get("Content-Type"), ";")
	if len(span) == 0 && strings.EqualFold(strings.TrimSpace(kind), "multipart/byteranges") {
		if span, err = d.firstPart(); err != nil {
			return 0, 0, 0, err
		}
	}
	if len(span) == 0 && !d.o.same && d.Size >= 0 && r.ContentLength == d.Size-d.off { // it can only be that
		return d.off, d.Size, d.Size, nil
	}
	return parseContentRange(span)
}

// firstPart gets to the bytes of the first part of a multipart/byteranges body (RFC 9110, 14.6), as
// which some servers send a single range, and returns its Content-Range.
func (d *download) firstPart() (span []string, err error) {
	d.watch.Reset(d.o.stall)
	defer d.watch.Stop()
	in := bufio.NewReaderSize(d.body, 1<<10) // the longest line
	for range 32 {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return nil, fmt.Errorf("multipart/byteranges: no part: %w", err)
		}
		name, value, _ := strings.Cut(strings.TrimSpace(string(line)), ":")
		if strings.EqualFold(name, "Content-Range") {
			span = append(span, strings.TrimSpace(value))
		}
		if name == "" && span != nil {
			d.body = readCloser{in, d.body}
			return span, nil
		}
	}
	return nil, errors.New("multipart/byteranges: a part without Content-Range")
}

type readCloser struct {
	io.Reader
	io.Closer
}

// pastEnd is for status 416: with "bytes */SIZE" it may tell that all is there already.
func (d *download) pastEnd(span []string) error {
	for _, s := range span {
		_, text, _ := strings.Cut(s, "*/")
		n, err := decimal(text)
		if err == nil && d.o.same && n < d.end {
			return d.useless("got a file of %d bytes, want %d or more: %w", n, d.end, errChanged)
		}
		if err == nil && n == d.off && d.Size < 0 {
			d.Size = n
			return nil
		}
	}
	return d.useless("got HTTP status 416, Content-Range %q, want bytes from %d on", span, d.off)
}

// skip reads over n bytes that are known already: of a server that does no ranges, or slices.
func (d *download) skip(n int64) error {
	if n == 0 {
		return nil
	}
	d.o.lg.warnf("%q: %d bytes before byte %d come again", d.URLKey, n, d.off)
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

// parseContentRange reads "bytes FIRST-LAST/SIZE" (RFC 9110, 14.4), in which SIZE may be "*" or
// missing, "=" stand for the blank, and LAST be too large by what SIZE says. total is -1 if not told.
func parseContentRange(values []string) (at, upto, total int64, err error) {
	if len(values) == 0 || slices.Max(values) != slices.Min(values) {
		return 0, 0, 0, fmt.Errorf("got Content-Range %q, want one", values)
	}
	unit, rest, _ := strings.Cut(strings.ReplaceAll(values[0], "=", " "), " ")
	span, size, told := strings.Cut(strings.TrimSpace(rest), "/")
	first, last, _ := strings.Cut(span, "-")
	at, err1 := decimal(first)
	end, err2 := decimal(last)
	total = -1
	var err3 error
	if told && size != "*" && size != "" {
		total, err3 = decimal(size)
	}
	if !strings.EqualFold(unit, "bytes") || errors.Join(err1, err2, err3) != nil || end < at {
		return 0, 0, 0, fmt.Errorf("got Content-Range %q, want bytes FIRST-LAST/SIZE", values[0])
	}
	upto = end + 1
	if total >= 0 {
		upto = min(upto, total)
	}
	return at, upto, total, nil
}

// decimal reads digits only: no sign, no space; at most 2^62, so that one more still fits.
//
//go:noinline
func decimal(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 62)
	return int64(n), err
}

// netFlags is how the network is used.
type netFlags struct {
	limitRate int64 // bytes per second; 0: no limit

	kept *kept // from the last run and for the next one; nil until there is a client

	// For tests: other times.
	tuneDownload func(*downloadOptions)
	tuneNet      func(*netOptions)
}

func (n *netFlags) downloadFlags(fs *flag.FlagSet) {
	set := func(s string) (err error) {
		n.limitRate, err = parseRate(s)
		return err
	}
	fs.Func("limit-rate", "download at most this many `BYTES` per second; k and M may follow (no limit)", set)
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
