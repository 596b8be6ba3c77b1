// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Files that users of the server get and put: the messages, in chunks of which so many are on their way at a time.

const (
	fileChunk    = 4096            // bytes in a message, as peers expect them
	maxFileChunk = 32<<10 - 512    // where the line is fast: with its frame, what TLS sends as two records
	fileWindow   = 20              // chunks on their way to the user that are not acknowledged
	fileQueue    = time.Second / 2 // that they may take, as what others say waits behind them
	fileAck      = 10              // chunks from the user until they are, or fewer if no more wait
	maxFilesTold = 8               // in the summary
)

// fileTransfer is the handler of a session, with one transfer at a time.
type fileTransfer struct {
	s        *peerSession
	o        *fileOptions
	getting  *fileGet // the last one
	putting  *filePut // nil: none
	told     string   // the path that the user was told the size of, and that
	toldSize int64
	failed   bool        // what was sent before the user knew is dropped
	done     []*fileDone // the last one is that of putting
}

// fileDone is one transfer, for the log.
type fileDone struct {
	verb, path string
	bytes      atomic.Int64
	err        error // not before the end
}

func newFileTransfer(s *peerSession, o *fileOptions) peerHandler { return &fileTransfer{s: s, o: o} }

func (t *fileTransfer) send(typ string, offset int64, body []byte) error {
	return t.s.send(&peerMessage{proto: protoFile, typ: typ, props: map[string]any{"offset": offset}, body: body})
}

// tell tells the user of an error with what m asked for.
func (t *fileTransfer) tell(m *peerMessage, err error) {
	e := explainFile(err)
	r := m.complaint(e.code, false, e.Error())
	r.proto = protoFile
	t.s.send(r)
}

func (t *fileTransfer) receive(m *peerMessage) {
	err := error(nil)
	switch m.typ {
	case "stat", "get_file", "put_file":
		if err := t.begin(m); err != nil {
			t.tell(m, err)
		}
		return
	case "file_chunk":
		err = t.chunk(m)
	case "ack":
		err = t.ack(m)
	case "error":
		body, _ := unpackMap(m.body)
		t.abort(fmt.Errorf("given up by the user: %s", quote(fmt.Sprint(field(body, "err")))))
	default:
		t.tell(m, peerErrorf(http.StatusBadRequest, "unknown message type %s", quote(m.typ)))
	}
	if err != nil && !t.failed {
		t.abort(err)
		t.tell(m, err)
	}
}

// begin does what has a path.
func (t *fileTransfer) begin(m *peerMessage) error {
	body, err := unpackMap(m.body)
	path, _ := field(body, "path").(string)
	if err == nil && path == "" {
		err = fmt.Errorf("no path")
	}
	if err != nil {
		return peerErrorf(http.StatusBadRequest, "%s: %w", quote(m.typ), err)
	}
	if m.typ == "stat" {
		return t.stat(path)
	}
	if t.putting != nil || t.getting != nil && t.getting.ctx.Err() == nil {
		return peerErrorf(http.StatusConflict, "another file transfer is in progress")
	}
	if t.getting != nil {
		t.getting.work.Wait() // what it says last is not to come among what is of this one
	}
	d := &fileDone{verb: strings.TrimSuffix(m.typ, "_file"), path: path}
	t.done = append(t.done, d)
	t.done = t.done[max(0, len(t.done)-maxFilesTold):]
	if m.typ == "get_file" {
		err = t.get(m, d)
	} else {
		err = t.put(body, d)
	}
	if t.failed = err != nil; err != nil { // else it is the transfer's to say how it ended
		d.err = err
	}
	return err
}

// abort ends a transfer, of which nothing is left.
func (t *fileTransfer) abort(why error) {
	t.failed = true
	if p := t.putting; p != nil {
		t.putting = nil
		p.drop()
		t.done[len(t.done)-1].err = why
	}
	if g := t.getting; g != nil {
		g.stop(why)
		g.f.SetReadDeadline(time.Unix(1, 0)) // /proc has files that are read like pipes
		g.work.Wait()
	}
}

func (t *fileTransfer) close(why error) { t.abort(why) }

func (t *fileTransfer) summary() string {
	var all []string
	for _, d := range t.done {
		s := fmt.Sprintf("%s %s: %d bytes", d.verb, quote(d.path), d.bytes.Load())
		if d.err != nil {
			s += " (" + oneLine(d.err.Error()) + ")"
		}
		all = append(all, s)
	}
	return "files: " + strings.Join(all, ", ")
}

func (t *fileTransfer) stat(path string) error {
	_, st, err := t.o.look(path)
	if err != nil {
		return err
	}
	t.told, t.toldSize = path, st.Size()
	sys := st.Sys().(*syscall.Stat_t)
	return t.s.send(&peerMessage{proto: protoFile, typ: "file_info", body: packMap("path", path, "size", st.Size(),
		"uid", sys.Uid, "gid", sys.Gid, "mode", uint32(st.Mode()), "modtime", st.ModTime())})
}

// fileGet is a file on its way to the user.
type fileGet struct {
	f           *os.File
	size        int64           // that the user was told, or had to be
	ctx         context.Context // ends with it
	stop        context.CancelCauseFunc
	sent, acked atomic.Int64
	more        chan struct{} // holds one: something was acknowledged
	work        sync.WaitGroup
	done        *fileDone
}

func (t *fileTransfer) get(m *peerMessage, d *fileDone) (err error) {
	g := &fileGet{more: make(chan struct{}, 1), done: d}
	if g.f, g.size, err = t.o.get(d.path); err != nil {
		return err
	}
	if d.path == t.told {
		g.size, t.told = t.toldSize, ""
	}
	g.ctx, g.stop = context.WithCancelCause(t.s.ctx)
	t.getting = g
	g.work.Go(func() {
		defer g.f.Close()
		off, err := t.stream(g)
		g.stop(io.EOF) // first: who hears of the end may begin another
		why := context.Cause(g.ctx)
		if why != io.EOF && err != nil { // who gave up says so
			d.err = why
			return
		}
		if d.err = err; err != nil {
			t.tell(m, err)
		} else {
			d.err = t.send("file_chunk", off, nil)
		}
	})
	return nil
}

// stream sends the file but for the chunk that says that this was all, and never more of it than the size. off: its end
func (t *fileTransfer) stream(g *fileGet) (off int64, err error) {
	buf, chunk, began := make([]byte, maxFileChunk), int64(fileChunk), time.Now()
	for {
		left := g.size - off
		if g.size == 0 { // files of /proc do not tell
			if st, err := g.f.Stat(); err == nil && st.Size() == 0 {
				left = chunk
			}
		}
		// They never become smaller: the user acknowledges a number of them.
		rate := float64(g.acked.Load()) / float64(time.Since(began)+1)
		chunk = max(chunk, min(maxFileChunk, int64(rate*float64(fileQueue/fileWindow))))
		n, err := g.f.Read(buf[:min(chunk, left)])
		if n > 0 {
			if err := t.window(g, buf[:n], off, chunk); err != nil {
				return off, err
			}
			off += int64(n)
		}
		if err != nil && err != io.EOF {
			return off, err
		}
		if n > 0 {
			continue
		}
		// Those of /sys tell a size that they do not have, and keep to it.
		if st, err := g.f.Stat(); err != nil || off < g.size && st.Size() < g.size {
			return off, cmp.Or(err,
				error(peerErrorf(http.StatusConflict, "the file has become shorter: %d bytes, not %d", off, g.size)))
		}
		return off, nil
	}
}

// window sends what there is of a chunk when there is room for all of that in the window.
func (t *fileTransfer) window(g *fileGet, c []byte, off, chunk int64) error {
	end := off + int64(len(c))
	if err := t.o.fits(end); err != nil {
		return err
	}
	if err := t.o.tx.take(len(c), t.o.Counters.MaxBytesTxPerMinute); err != nil {
		return err
	}
	for off-g.acked.Load() > (fileWindow-1)*chunk && g.ctx.Err() == nil {
		select {
		case <-g.more:
		case <-g.ctx.Done():
		}
	}
	if g.ctx.Err() != nil {
		return context.Cause(g.ctx)
	}
	g.sent.Store(end)
	g.done.bytes.Store(end)
	return t.send("file_chunk", off, c)
}

func (t *fileTransfer) ack(m *peerMessage) error {
	g := t.getting
	if g == nil || g.ctx.Err() != nil { // of the end, or of what failed
		return nil
	}
	v, ok := m.props["offset"].(int64)
	if !ok || v < g.acked.Load() || v > g.sent.Load() {
		return peerErrorf(http.StatusBadRequest, "ack: got the offset %s, want one from %d to %d",
			quote(fmt.Sprint(m.props["offset"])), g.acked.Load(), g.sent.Load())
	}
	g.acked.Store(v)
	wake(g.more)
	return nil
}

func (t *fileTransfer) put(body map[string]any, d *fileDone) error {
	p := &filePut{o: t.o}
	if err := p.begin(d.path, body); err != nil {
		p.drop()
		return err
	}
	t.putting = p
	return t.send("ack", 0, nil)
}

func (t *fileTransfer) chunk(m *peerMessage) error {
	p, n := t.putting, len(m.body)
	if p == nil {
		return peerErrorf(http.StatusConflict, "no file transfer in progress")
	}
	end := p.off + int64(n)
	if m.props["offset"] != any(p.off) {
		return peerErrorf(http.StatusBadRequest, "file_chunk: got the offset %s, want %d",
			quote(fmt.Sprint(m.props["offset"])), p.off)
	}
	if p.size >= 0 && (end > p.size || n == 0 && end < p.size) {
		return peerErrorf(http.StatusBadRequest, "got %d bytes, %d were announced", end, p.size)
	}
	err := t.o.fits(end)
	if err == nil && n == 0 {
		if err = p.land(); err == nil {
			t.putting = nil
			return t.send("ack", end, nil)
		}
	}
	if err == nil {
		err = t.o.rx.take(n, t.o.Counters.MaxBytesRxPerMinute)
	}
	if err == nil {
		err = p.write(m.body)
		t.done[len(t.done)-1].bytes.Store(p.off)
	}
	if err != nil {
		return err
	}
	if p.unacked++; p.unacked < fileAck && t.s.waiting() > 0 {
		return nil
	}
	p.unacked = 0
	// One chunk less than there are: for the server the file is there when all its bytes are acknowledged.
	return t.send("ack", end-int64(n), nil)
}
