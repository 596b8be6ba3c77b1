// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// filePeer is a user who gets and puts files: it keeps what the handler sends.
type filePeer struct {
	t    *testing.T
	h    *fileTransfer
	s    *peerSession
	over sync.Once
	mu   sync.Mutex
	got  []*peerMessage
	more chan struct{} // something came
}

func newFilePeer(t *testing.T, o *fileOptions) *filePeer {
	t.Helper()
	must(t, o.check())
	p := &filePeer{t: t, more: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancelCause(context.Background())
	p.s = &peerSession{id: "1", user: "u", ctx: ctx, lg: &logger{}, end: func(why error) { cancel(why) },
		send: func(m *peerMessage) error {
			p.mu.Lock()
			defer p.mu.Unlock()
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			m, err := unpackMessage(m.packed())
			if m.typ == "file_chunk" && len(m.body) == 0 && p.h.getting.ctx.Err() == nil {
				t.Error("a user who hears of this end is refused the next transfer")
			}
			p.got = append(p.got, m)
			wake(p.more)
			return err
		}}
	p.h = newFileTransfer(p.s, o).(*fileTransfer)
	t.Cleanup(p.end)
	return p
}

// end ends the session.
func (p *filePeer) end() {
	p.over.Do(func() {
		p.s.end(errors.New("end of test"))
		p.h.close(errors.New("end of test"))
	})
}

func (p *filePeer) say(typ string, offset any, body []byte) {
	m := &peerMessage{proto: protoFile, typ: typ, sid: "1", props: map[string]any{"user_id": "u"}, body: body}
	if offset != nil {
		m.props["offset"] = offset
	}
	p.h.receive(m)
}

// next takes the next message.
func (p *filePeer) next() *peerMessage {
	p.t.Helper()
	late := time.After(20 * time.Second)
	for {
		p.mu.Lock()
		if len(p.got) > 0 {
			m := p.got[0]
			p.got = p.got[1:]
			p.mu.Unlock()
			return m
		}
		p.mu.Unlock()
		select {
		case <-p.more:
		case <-late:
			p.t.Fatal("waited for a message in vain")
		}
	}
}

// quiet wants that nothing more came.
func (p *filePeer) quiet() {
	p.t.Helper()
	if p.waits() {
		p.t.Fatalf("got %q, want nothing", p.next().typ)
	}
}

// fault is the code and the text of an error message; 0 and "" of others.
func (p *filePeer) fault(m *peerMessage) (int64, string) {
	p.t.Helper()
	if m.typ != "error" || m.proto != protoFile {
		return 0, ""
	}
	body, err := unpackMap(m.body)
	must(p.t, err)
	code, _ := field(body, "code").(int64)
	text, _ := field(body, "err").(string)
	return code, text
}

// refused wants the next message to be an error with this code and text.
func (p *filePeer) refused(code int64, text string) {
	p.t.Helper()
	m := p.next()
	if got, why := p.fault(m); got != code || !strings.Contains(why, text) {
		p.t.Fatalf("got %s %d %q, want error %d with %q", m.typ, got, why, code, text)
	}
}

func (p *filePeer) acked(offset int64) {
	p.t.Helper()
	if m := p.next(); m.typ != "ack" || m.props["offset"] != any(offset) {
		_, why := p.fault(m)
		p.t.Fatalf("got %s %v %q, want ack %d", m.typ, m.props, why, offset)
	}
}

// put puts a file as the server does, and gives the code of the error, if there is one.
func (p *filePeer) put(path string, data []byte, pairs ...any) (int64, string) {
	p.t.Helper()
	p.say("put_file", nil, packMap(append([]any{"path", path}, pairs...)...))
	size, acked := int64(len(data)), int64(-1)
	hear := func() *peerMessage { // nil: an ack
		m := p.next()
		if m.typ == "ack" {
			v, ok := m.props["offset"].(int64)
			if !ok || v < acked {
				p.t.Fatalf("got the offset %v after %d", m.props["offset"], acked)
			}
			acked, m = v, nil
		}
		return m
	}
	m := hear()
	for sent := int64(0); m == nil && sent < size; {
		c := data[sent:min(size, sent+fileChunk)]
		p.say("file_chunk", sent, c)
		for sent += int64(len(c)); m == nil && sent-acked >= 10*fileChunk; {
			m = hear()
		}
	}
	if m == nil {
		for p.waits() && m == nil {
			m = hear()
		}
		if acked == size && size > 0 {
			p.t.Fatal("all is acknowledged before the end")
		}
	}
	if m == nil {
		p.say("file_chunk", size, nil)
		for acked = -1; m == nil && acked < size; {
			m = hear()
		}
	}
	if m == nil {
		return 0, ""
	}
	return p.fault(m)
}

func (p *filePeer) waits() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.got) > 0
}

// get gets a file as the server does.
func (p *filePeer) get(path string) ([]byte, int64, string) {
	p.t.Helper()
	p.say("get_file", nil, packMap("path", path))
	var data []byte
	for n := 1; ; n++ {
		m := p.next()
		if m.typ != "file_chunk" {
			code, text := p.fault(m)
			return data, code, text
		}
		if m.props["offset"] != any(int64(len(data))) || len(m.body) > maxFileChunk {
			p.t.Fatalf("got %d bytes at %v, want them at %d", len(m.body), m.props["offset"], len(data))
		}
		if data = append(data, m.body...); len(m.body) == 0 || n%10 == 0 {
			p.say("ack", int64(len(data)), nil)
		}
		if len(m.body) == 0 {
			p.h.getting.work.Wait()
			return data, 0, ""
		}
	}
}

// nothingBeside wants these names and no others.
func nothingBeside(t *testing.T, dir string, want ...string) {
	t.Helper()
	var got []string
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("%q has %q, want %q", dir, got, want)
	}
}

func fileNoise(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	r.Read(b)
	return b
}

// eachWay runs a test with openat2 and without.
func eachWay(t *testing.T, f func(t *testing.T, o *fileOptions)) {
	for _, byHand := range []bool{false, true} {
		t.Run(fmt.Sprintf("byHand=%t", byHand), func(t *testing.T) {
			o := &fileOptions{root: t.TempDir()}
			o.AllowOverwrite = true
			o.byHand.Store(byHand)
			f(t, o)
		})
	}
}

// A file goes there and back, whatever its size.
func TestFileThereAndBack(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, o *fileOptions) {
		p := newFilePeer(t, o)
		must(t, os.Mkdir(o.root+"/sub", 0o755))
		for _, n := range []int{0, 1, 4095, 4096, 4097, 65536, 81920, 300001} {
			path, data := o.root+"/sub/f", fileNoise(n)
			if code, why := p.put(path, data); why != "" {
				t.Fatalf("put of %d bytes: %d %s", n, code, why)
			}
			nothingBeside(t, o.root+"/sub", "f")
			got, code, why := p.get(path)
			if !bytes.Equal(got, data) || why != "" {
				t.Fatalf("got %d bytes of %d: %d %s", len(got), n, code, why)
			}
		}
		p.quiet()
		if s := p.h.summary(); !strings.Contains(s, fmt.Sprintf("get %q: 300001 bytes", o.root+"/sub/f")) {
			t.Errorf("summary: got %q", s)
		}
	})
}

// What stat says has the types that the server reads.
func TestFileStat(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, o *fileOptions) {
		p := newFilePeer(t, o)
		path := o.root + "/f"
		writeFile(t, path, "hello")
		must(t, os.Chmod(path, 0o640))
		must(t, os.Chtimes(path, time.Unix(1, 0), time.Unix(1e9, 5)))
		must(t, os.Symlink("f", o.root+"/link"))
		p.say("stat", nil, packMap("path", path))
		want := packMap("path", path, "size", int64(5), "uid", uint32(os.Geteuid()), "gid", uint32(os.Getegid()),
			"mode", uint32(0o640), "modtime", time.Unix(1e9, 5))
		if m := p.next(); m.typ != "file_info" || m.props != nil || !bytes.Equal(m.body, want) {
			t.Errorf("got %s %v %q, want %q", m.typ, m.props, m.body, want)
		}
		for path, mode := range map[string]fs.FileMode{"": fs.ModeDir, "/link": fs.ModeSymlink} {
			p.say("stat", nil, packMap("path", o.root+path))
			body, err := unpackMap(p.next().body)
			must(t, err)
			if got, _ := field(body, "mode").(int64); fs.FileMode(got).Type() != mode {
				t.Errorf("%q: got mode %o, want %o", path, got, mode)
			}
		}
	})
}

// No more than 20 chunks are on their way, which become larger and never smaller; acks of what was not sent end the
// transfer.
func TestFileGetWindow(t *testing.T) {
	t.Parallel()
	p := newFilePeer(t, &fileOptions{root: t.TempDir()})
	path := p.h.o.root + "/f"
	must(t, os.WriteFile(path, fileNoise(50*maxFileChunk), 0o600))
	for _, wrong := range []any{"more", int64(9 * fileChunk), int64(-1), "x", nil} {
		sent, chunk := int64(0), int64(fileChunk)
		fill := func(acked int64) {
			for sent-acked <= (fileWindow-1)*chunk {
				m := p.next()
				n := int64(len(m.body))
				if m.typ != "file_chunk" || n < chunk || n > maxFileChunk || m.props["offset"] != any(sent) {
					t.Fatalf("got %s, %d bytes at %v, want at least %d at %d", m.typ, n, m.props["offset"], chunk, sent)
				}
				sent, chunk = sent+n, n
			}
			p.quiet()
		}
		p.say("get_file", nil, packMap("path", path))
		fill(0)
		if sent != fileWindow*fileChunk {
			t.Errorf("got %d bytes before the first ack", sent)
		}
		p.say("get_file", nil, packMap("path", path))
		p.refused(409, "another file transfer")
		p.say("ack", int64(10*fileChunk), nil)
		fill(10 * fileChunk)
		if wrong == "more" {
			wrong = sent + 1
		}
		p.say("ack", wrong, nil)
		for m := p.next(); m.typ == "file_chunk"; m = p.next() {
			t.Fatal("it goes on")
		}
		p.say("ack", int64(20*fileChunk), nil) // sent before the user knew
		p.quiet()
	}
	p.say("get_file", nil, packMap("path", path))
	p.next()
	p.say("error", nil, packMap("err", "enough"))
	if !strings.Contains(p.h.summary(), "enough") {
		t.Errorf("summary: got %q", p.h.summary())
	}
	n := runtime.NumGoroutine()
	p.end()
	if runtime.NumGoroutine() > n {
		t.Error("goroutines are left")
	}
}

// Chunks that do not follow each other end the put, of which nothing is left; what was on its way then is dropped.
func TestFilePutOffsets(t *testing.T) {
	t.Parallel()
	p := newFilePeer(t, &fileOptions{root: t.TempDir()})
	p.say("file_chunk", int64(0), []byte("x"))
	p.refused(409, "no file transfer in progress")
	for _, wrong := range []any{int64(0), int64(2), int64(-1), "1", nil, 1.0, uint64(1 << 63)} {
		p.say("put_file", nil, packMap("path", p.h.o.root+"/f"))
		p.acked(0)
		p.say("put_file", nil, packMap("path", p.h.o.root+"/g"))
		p.refused(409, "another file transfer")
		p.say("file_chunk", int64(0), []byte("x"))
		p.acked(0)
		p.say("file_chunk", wrong, []byte("y"))
		p.refused(400, "want 1")
		p.say("file_chunk", int64(1), []byte("y"))
		p.quiet()
		nothingBeside(t, p.h.o.root)
	}
	for _, body := range [][]byte{nil, {0xc1}, packMap("path", nil), packMap("path", ""), packMap("path", 5),
		packMap("path", "f"), packMap("path", p.h.o.root+"/f", "uid", -1), packMap("path", p.h.o.root+"/f", "mode", "0644"),
		packMap("path", p.h.o.root+"/f", "uid", uint32(1<<32-1)), packMap("path", p.h.o.root+"/f\x00"),
		packMap("path", p.h.o.root, "src_path", "..")} {
		for _, typ := range []string{"put_file", "get_file", "stat"} {
			p.say(typ, nil, body)
			if m := p.next(); typ == "put_file" || m.typ != "file_info" {
				if code, why := p.fault(m); code != 400 && code != 404 && code != 403 {
					t.Errorf("%s of %q: got %s %d %s", typ, body, m.typ, code, why)
				}
			}
		}
	}
	p.say("mkdir", nil, nil)
	p.refused(400, "unknown message type")
	nothingBeside(t, p.h.o.root)
}

// A put that is cut off after any of its messages leaves nothing behind, and the file that was there as it was.
func TestFilePutCutOff(t *testing.T) {
	t.Parallel()
	data := fileNoise(3*fileChunk + 1)
	for n := range 6 {
		o := &fileOptions{root: t.TempDir()}
		o.AllowOverwrite = true
		writeFile(t, o.root+"/f", "old")
		p := newFilePeer(t, o)
		for i := range n {
			at := (i - 1) * fileChunk
			switch {
			case i == 0:
				p.say("put_file", nil, packMap("path", o.root+"/f"))
			case at < len(data):
				p.say("file_chunk", int64(at), data[at:min(len(data), at+fileChunk)])
			}
		}
		p.end()
		nothingBeside(t, o.root, "f")
		if got := look(o.root + "/f"); got != "old" {
			t.Errorf("after %d messages: got %d bytes", n, len(got))
		}
	}
}

// Chunks grow with the line: twenty of them take half a second on it at most, if they are not small to begin with.
func TestFileGetGrows(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/f"
	must(t, os.WriteFile(path, fileNoise(100*maxFileChunk), 0o600))
	for rate, want := range map[int]int{100000: fileChunk, 500000: 12500, 1e9: maxFileChunk} { // bytes a second
		synctest.Test(t, func(t *testing.T) {
			p := newFilePeer(t, &fileOptions{root: filepath.Dir(path)})
			p.say("get_file", nil, packMap("path", path))
			sent, largest := 0, 0
			for n := 1; ; n++ {
				m := p.next()
				if len(m.body) == 0 {
					break
				}
				sent, largest = sent+len(m.body), max(largest, len(m.body))
				time.Sleep(time.Duration(len(m.body)) * time.Second / time.Duration(rate))
				if n%10 == 0 {
					p.say("ack", int64(sent), nil)
				}
			}
			if sent != 100*maxFileChunk || largest > want || largest < want*3/4 {
				t.Errorf("at %d bytes a second: got %d bytes, in chunks of up to %d, want %d", rate, sent, largest, want)
			}
		})
	}
}

// An empty file is there although the close comes right behind its end, and whatever ends the session then.
func TestFilePutEmptyThenClose(t *testing.T) {
	t.Parallel()
	o := &fileOptions{root: t.TempDir()}
	must(t, o.check())
	h := newTestHub(t, func(h *peerHub) {
		h.offers[protoFile] = peerOffer{"files", func(s *peerSession) peerHandler { return newFileTransfer(s, o) }}
	})
	h.give(protoFile, "put_file", "a", packMap("path", o.root+"/f"))
	chunk := &peerMessage{proto: protoFile, typ: "file_chunk", sid: "a", props: map[string]any{"offset": int64(0)}}
	must(t, h.take(chunk, 100))
	h.give(protoControl, "close", "a", nil)
	h.running.Wait()
	for range 2 {
		h.want(protoFile, "ack", "a", nil)
	}
	nothingBeside(t, o.root, "f")
}

// What a power cut left is removed by the next put, and what another session is putting is not.
func TestFilePutLeftovers(t *testing.T) {
	t.Parallel()
	o := &fileOptions{root: t.TempDir()}
	a, b := newFilePeer(t, o), newFilePeer(t, o)
	writeFile(t, o.root+"/"+putPrefix+"0123456789abcdef", "half")
	must(t, os.Symlink("x", o.root+"/"+putPrefix+"link"))
	a.say("put_file", nil, packMap("path", o.root+"/f"))
	a.acked(0)
	if code, why := b.put(o.root+"/g", []byte("g")); why != "" {
		t.Fatalf("%d %s", code, why)
	}
	a.say("file_chunk", int64(0), []byte("f"))
	a.acked(0)
	a.say("file_chunk", int64(1), nil)
	a.acked(1)
	nothingBeside(t, o.root, putPrefix+"link", "f", "g")
}

// Paths that lead elsewhere, and what is no regular file.
func TestFileRefused(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, o *fileOptions) {
		base := t.TempDir()
		o.root = base + "/in"
		for _, d := range []string{"in/dir", "out"} {
			must(t, os.MkdirAll(base+"/"+d, 0o755))
		}
		writeFile(t, base+"/out/f", "secret")
		writeFile(t, base+"/in/f", "f")
		must(t, os.WriteFile(base+"/in/none", nil, 0))
		must(t, syscall.Mkfifo(base+"/in/fifo", 0o600))
		for link, to := range map[string]string{"link": "f", "dirlink": "dir", "up": "../out", "abs": base + "/out",
			"gone": "nowhere", "loop": "loop"} {
			must(t, os.Symlink(to, base+"/in/"+link))
		}
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		must(t, err)
		defer syscall.Close(fd)
		must(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: base + "/in/socket"}))
		p := newFilePeer(t, o)
		for _, c := range []struct {
			path     string
			get, put int64
		}{
			{"/in/f", 0, 0}, {"/in//./f", 0, 0}, {"/in/dir", 403, 409}, {"/in", 403, 409}, {"/in/", 403, 409},
			{"/out/f", 403, 403}, {"", 403, 403}, {"/inside", 403, 403},
			{"/in/../out/f", 403, 403}, {"/in/dir/../f", 403, 403}, {"/in/dir/..", 403, 403},
			{"/in/fifo", 403, 403}, {"/in/socket", 403, 403},
			{"/in/link", 403, 403}, {"/in/gone", 403, 403}, {"/in/loop", 403, 403}, {"/in/dirlink", 403, 403},
			{"/in/dirlink/f", 403, 403}, {"/in/up/f", 403, 403}, {"/in/abs/f", 403, 403}, {"/in/link/f", 403, 403},
			{"/in/nothing/f", 404, 404}, {"/in/f/f", 404, 404}, {"/in/" + strings.Repeat("x", 300), 400, 400},
		} {
			if _, code, why := p.get(base + c.path); code != c.get {
				t.Errorf("get %q: got %d %s, want %d", c.path, code, why, c.get)
			}
			if code, why := p.put(base+c.path, []byte("f")); code != c.put {
				t.Errorf("put %q: got %d %s, want %d", c.path, code, why, c.put)
			}
		}
		if _, code, why := p.get(base + "/out/f"); code != 403 || !strings.Contains(why, fmt.Sprintf("below %q", o.root)) {
			t.Errorf("got %d %s", code, why)
		}
		code, why := p.put(o.root+"/dir", []byte("x"), "src_path", "/a/name")
		if why != "" || look(o.root+"/dir/name") != "x" {
			t.Errorf("into a directory: got %d %s", code, why)
		}
		if code, why := p.put(o.root, []byte("x"), "src_path", "name"); why != "" || look(o.root+"/name") != "x" {
			t.Errorf("into the root: got %d %s", code, why)
		}
		if got := look(base + "/out/f"); got != "secret" {
			t.Errorf("got %q", got)
		}
		nothingBeside(t, base+"/out", "f")
	})
}

// Where links are followed, they still do not lead out.
func TestFileFollowed(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	for _, d := range []string{"in/dir", "out"} {
		must(t, os.MkdirAll(base+"/"+d, 0o755))
	}
	writeFile(t, base+"/out/f", "secret")
	writeFile(t, base+"/in/dir/f", "f")
	for link, to := range map[string]string{"link": "dir/f", "dirlink": "dir", "up": "../out", "abs": base + "/out"} {
		must(t, os.Symlink(to, base+"/in/"+link))
	}
	o := &fileOptions{root: base + "/in", fileLimits: fileLimits{FollowSymLinks: true}}
	p := newFilePeer(t, o)
	for path, want := range map[string]int64{"link": 0, "dirlink/f": 0, "up/f": 403, "abs/f": 403} {
		if _, code, why := p.get(o.root + "/" + path); code != want && !o.byHand.Load() {
			t.Errorf("%s: got %d %s, want %d", path, code, why, want)
		}
	}
	for _, byHand := range []bool{false, true} {
		o := &fileOptions{root: "/", fileLimits: fileLimits{FollowSymLinks: true}}
		o.byHand.Store(byHand)
		p := newFilePeer(t, o)
		for _, path := range []string{"/in/link", "/in/dirlink/f", "/in/up/f", "/in/abs/f", "/out/f"} {
			if _, code, why := p.get(base + path); why != "" {
				t.Errorf("%s: got %d %s", path, code, why)
			}
		}
	}
}

// However names change while files are got and put, nothing outside is.
func TestFileSwapped(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, o *fileOptions) {
		base := t.TempDir()
		o.root = base + "/in"
		for _, d := range []string{"in/dir", "out"} {
			must(t, os.MkdirAll(base+"/"+d, 0o755))
			writeFile(t, base+"/"+d+"/f", d)
		}
		must(t, os.Symlink(base+"/out", o.root+"/trap"))
		p := newFilePeer(t, o)
		stop, gone := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(gone)
			for {
				select {
				case <-stop:
					return
				default:
				}
				syscall.Rename(o.root+"/dir", o.root+"/away")
				syscall.Rename(o.root+"/trap", o.root+"/dir")
				syscall.Rename(o.root+"/dir", o.root+"/trap")
				syscall.Rename(o.root+"/away", o.root+"/dir")
			}
		}()
		n, ok := 200, 0
		if exhaustive() {
			n = 20000
		}
		for range n {
			data, _, why := p.get(o.root + "/dir/f")
			if string(data) == "out" {
				t.Fatal("got a file from outside")
			}
			if why == "" {
				ok++
			}
			p.put(o.root+"/dir/f", []byte("in"))
		}
		close(stop)
		<-gone
		t.Logf("%d of %d", ok, n)
		nothingBeside(t, base+"/out", "f")
		if got := look(base + "/out/f"); got != "out" {
			t.Errorf("outside there is %q", got)
		}
	})
}

// The limits of mender-connect.conf.
func TestFileLimits(t *testing.T) {
	t.Parallel()
	me := fmt.Sprint(os.Geteuid())
	etc := t.TempDir()
	writeFile(t, etc+"/passwd", "me:x:"+me+":0::/:\nother:x:4242:4242::/:\n")
	writeFile(t, etc+"/group", "mine:x:"+fmt.Sprint(os.Getegid())+":\nother:x:4242:\n")
	for _, c := range []struct {
		name           string
		l              fileLimits
		put, over, get int64 // a new file, over one that is there, and back
		mode           fs.FileMode
		pairs          []any
	}{
		{"none", fileLimits{}, 0, 409, 0, 0o644, nil},
		{"overwrite", fileLimits{AllowOverwrite: true}, 0, 0, 0, 0o644, nil},
		{"size", fileLimits{MaxFileSize: 3}, 0, 409, 0, 0o644, nil},
		{"too large", fileLimits{MaxFileSize: 2}, 413, 409, 0, 0, nil},
		{"announced", fileLimits{MaxFileSize: 2}, 413, 413, 0, 0, []any{"size", int64(3)}},
		{"another size", fileLimits{}, 400, 409, 0, 0, []any{"size", 2}},
		{"mode", fileLimits{}, 0, 409, 0, 0o600, []any{"mode", uint32(0o600)}},
		{"no suid", fileLimits{}, 0, 409, 0, 0o755, []any{"mode", uint32(0o106755)}},
		{"suid", fileLimits{AllowSuid: true}, 0, 409, 0, 0o755 | fs.ModeSetuid | fs.ModeSetgid,
			[]any{"mode", uint32(0o6755)}},
		{"umask", fileLimits{Umask: "027", AllowSuid: true}, 0, 409, 0, 0o750, []any{"mode", uint32(0o6777)}},
		{"owner", fileLimits{OwnerPut: "me", GroupPut: "mine", AllowOverwrite: true}, 0, 0, 0, 0o644, nil},
		{"get mine", fileLimits{OwnerGet: []string{"other", "me"}, GroupGet: []string{"mine"}}, 0, 409, 0, 0o644, nil},
		{"get number", fileLimits{OwnerGet: []string{me}}, 0, 409, 0, 0o644, nil},
		{"get other's", fileLimits{OwnerGet: []string{"other"}}, 0, 409, 403, 0o644, nil},
		{"get other group's", fileLimits{OwnerGet: []string{"me"}, GroupGet: []string{"other"}}, 0, 409, 403, 0o644, nil},
		{"get nobody's", fileLimits{OwnerGet: []string{"unknown"}}, 0, 409, 403, 0o644, nil},
	} {
		o := &fileOptions{root: t.TempDir(), etc: etc, fileLimits: c.l}
		p, path := newFilePeer(t, o), o.root+"/f"
		if code, why := p.put(path, []byte("abc"), c.pairs...); code != c.put {
			t.Errorf("%s: put: got %d %s, want %d", c.name, code, why, c.put)
		}
		if c.put == 0 {
			st, err := os.Stat(path)
			must(t, err)
			if st.Mode() != c.mode {
				t.Errorf("%s: got mode %s, want %s", c.name, st.Mode(), c.mode)
			}
			if _, code, why := p.get(path); code != c.get {
				t.Errorf("%s: get: got %d %s, want %d", c.name, code, why, c.get)
			}
			p.say("stat", nil, packMap("path", path))
			if code, why := p.fault(p.next()); code != c.get {
				t.Errorf("%s: stat: got %d %s, want %d", c.name, code, why, c.get)
			}
		} else {
			nothingBeside(t, o.root)
			writeFile(t, path, "abc")
		}
		if code, why := p.put(path, []byte("abc"), c.pairs...); code != c.over {
			t.Errorf("%s: over: got %d %s, want %d", c.name, code, why, c.over)
		}
		nothingBeside(t, o.root, "f")
	}
	o := &fileOptions{root: t.TempDir(), fileLimits: fileLimits{MaxFileSize: fileChunk}}
	must(t, os.WriteFile(o.root+"/f", fileNoise(fileChunk+1), 0o600))
	if got, code, why := newFilePeer(t, o).get(o.root + "/f"); code != 413 || len(got) > 0 {
		t.Errorf("get of what is too large: got %d bytes, %d %s", len(got), code, why)
	}
}

// A file keeps its owner and mode when its contents change and nobody asks for others.
func TestFileOwners(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	etc := t.TempDir()
	writeFile(t, etc+"/passwd", "u:x:4242:4343::/:\n")
	writeFile(t, etc+"/group", "g:x:4343:\n")
	o := &fileOptions{root: t.TempDir(), etc: etc, fileLimits: fileLimits{AllowOverwrite: true}}
	owner := func(what string, p *filePeer, uid, gid uint32, mode fs.FileMode, pairs ...any) {
		t.Helper()
		path := o.root + "/f"
		if code, why := p.put(path, []byte(what), pairs...); why != "" {
			t.Errorf("%s: %d %s", what, code, why)
			return
		}
		st, err := os.Stat(path)
		must(t, err)
		sys := st.Sys().(*syscall.Stat_t)
		if sys.Uid != uid || sys.Gid != gid || st.Mode() != mode {
			t.Errorf("%s: got %d:%d %s, want %d:%d %s", what, sys.Uid, sys.Gid, st.Mode(), uid, gid, mode)
		}
	}
	p := newFilePeer(t, o)
	owner("new", p, 0, 0, 0o644)
	owner("asked", p, 7, 8, 0o600, "uid", uint32(7), "gid", uint32(8), "mode", uint32(0o600))
	owner("kept", p, 7, 8, 0o600)
	owner("large", p, 1<<32-2, 8, 0o600, "uid", uint32(1<<32-2))
	must(t, os.Chmod(o.root+"/f", 0o755|fs.ModeSetuid))
	owner("suid of before", p, 1<<32-2, 8, 0o755)
	must(t, os.Chown(o.root+"/f", 4242, 4343))
	forced := &fileOptions{root: o.root, etc: etc,
		fileLimits: fileLimits{AllowOverwrite: true, OwnerPut: "u", GroupPut: "g"}}
	q := newFilePeer(t, forced)
	owner("forced", q, 4242, 4343, 0o755, "uid", uint32(7), "gid", uint32(8))
	must(t, os.Chown(o.root+"/f", 4242, 8))
	if code, _ := q.put(o.root+"/f", nil); code != 403 {
		t.Errorf("over another group's: got %d", code)
	}
	must(t, os.Chown(o.root+"/f", 7, 4343))
	if code, _ := q.put(o.root+"/f", nil); code != 403 {
		t.Errorf("over another's: got %d", code)
	}
	for _, l := range []fileLimits{{OwnerPut: "nobody-here"}, {GroupPut: "u"}, {Umask: "8"}, {Umask: "1000"}} {
		if err := (&fileOptions{root: o.root, etc: etc, fileLimits: l}).check(); exitCode(err) != exitRefused {
			t.Errorf("%+v: got %v", l, err)
		}
	}
	for _, root := range []string{"/dev/null", o.root + "/none"} {
		if err := (&fileOptions{root: root}).check(); exitCode(err) != exitRefused {
			t.Errorf("root %q: got %v", root, err)
		}
	}
	must(t, syscall.Mknod(o.root+"/null", syscall.S_IFCHR|0o666, 1<<8|3))
	if _, code, _ := p.get(o.root + "/null"); code != 403 {
		t.Errorf("a device: got %d", code)
	}
	if code, _ := p.put(o.root+"/null", nil); code != 403 {
		t.Errorf("over a device: got %d", code)
	}
}

// The counters are of all sessions, and what was used up comes back.
func TestFileCounters(t *testing.T) {
	t.Parallel()
	o := &fileOptions{root: t.TempDir()}
	o.Counters.MaxBytesRxPerMinute, o.Counters.MaxBytesTxPerMinute = 10000, 1000
	a, b := newFilePeer(t, o), newFilePeer(t, o)
	if code, why := a.put(o.root+"/f", fileNoise(12000)); why != "" {
		t.Fatalf("%d %s", code, why)
	}
	if code, _ := b.put(o.root+"/g", []byte("g")); code != 429 {
		t.Errorf("put: got %d", code)
	}
	if _, code, _ := b.get(o.root + "/f"); code != 429 {
		t.Errorf("get: got %d", code)
	}
	nothingBeside(t, o.root, "f")
	o.rx.at = o.rx.at.Add(-time.Minute)
	if code, why := b.put(o.root+"/g", []byte("g")); why != "" {
		t.Errorf("a minute later: %d %s", code, why)
	}
}

// A file that changes while it is got: never more than was announced, and less is an error.
func TestFileChanging(t *testing.T) {
	t.Parallel()
	p := newFilePeer(t, &fileOptions{root: t.TempDir()})
	path := p.h.o.root + "/f"
	stat := func(text string) {
		writeFile(t, path, text)
		p.say("stat", nil, packMap("path", path))
		p.next()
	}
	stat("abc")
	writeFile(t, path, "abcdef")
	if got, _, why := p.get(path); string(got) != "abc" || why != "" {
		t.Errorf("grown: got %q, %s", got, why)
	}
	stat("abc")
	writeFile(t, path, "a")
	if got, code, _ := p.get(path); string(got) != "a" || code != 409 {
		t.Errorf("shrunken: got %q, %d", got, code)
	}
	stat("")
	writeFile(t, path, "abc")
	if got, _, why := p.get(path); len(got) > 0 || why != "" {
		t.Errorf("grown from nothing: got %q, %s", got, why)
	}
	must(t, os.WriteFile(path, fileNoise(40*fileChunk), 0o600))
	p.say("get_file", nil, packMap("path", path))
	for range fileWindow {
		p.next()
	}
	must(t, os.Truncate(path, 20*fileChunk))
	p.say("ack", int64(fileWindow*fileChunk), nil)
	m := p.next()
	for m.typ == "file_chunk" {
		m = p.next()
	}
	if code, why := p.fault(m); code != 409 {
		t.Errorf("shrunken meanwhile: got %d %s", code, why)
	}
}

// Files that the kernel makes up tell no size, or a wrong one.
func TestFileKernel(t *testing.T) {
	t.Parallel()
	p := newFilePeer(t, &fileOptions{root: "/"})
	for _, path := range []string{"/proc/self/status", "/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"} {
		want, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		got, code, why := p.get(strings.Replace(path, "self", fmt.Sprint(os.Getpid()), 1))
		if why != "" || len(got) == 0 || !strings.Contains(path, "status") && !bytes.Equal(got, want) {
			t.Errorf("%s: got %q, %d %s, want %q", path, got, code, why, want)
		}
	}
	if _, code, _ := p.get("/proc/self/status"); code != 403 { // self is a link
		t.Errorf("got %d", code)
	}
}

// A file system is not filled to its end, whether the size was announced or not.
func TestFileDiskFull(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("mount: %v", err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	o := &fileOptions{root: dir}
	p := newFilePeer(t, o)
	if code, _ := p.put(dir+"/f", nil, "size", int64(5<<20)); code != 507 {
		t.Errorf("announced: got %d", code)
	}
	if code, _ := p.put(dir+"/f", fileNoise(5<<20)); code != 507 {
		t.Errorf("not announced: got %d", code)
	}
	nothingBeside(t, dir)
	if code, why := p.put(dir+"/f", fileNoise(3<<20)); why != "" {
		t.Errorf("what there is room for: got %d %s", code, why)
	}
	p.end()
}

// A put is read and written as fast as it comes, with a digest at the end.
func TestFileLarge(t *testing.T) {
	t.Parallel()
	onlyExhaustive(t, "100 MiB there and back")
	o := &fileOptions{root: fastDir(t)}
	p, data := newFilePeer(t, o), fileNoise(100<<20)
	began := time.Now()
	if code, why := p.put(o.root+"/f", data); why != "" {
		t.Fatalf("put: %d %s", code, why)
	}
	t.Logf("put: %s", time.Since(began))
	began = time.Now()
	got, code, why := p.get(o.root + "/f")
	t.Logf("get: %s", time.Since(began))
	if sha256.Sum256(got) != sha256.Sum256(data) {
		t.Errorf("got %d bytes, other ones: %d %s", len(got), code, why)
	}
}

// What options and mender-connect.conf say of files.
func TestFileConfig(t *testing.T) {
	t.Parallel()
	c := &connectConfig{}
	must(t, parseObject([]byte(`{"limits": {"fileTransfer": {"Chroot": "/srv", "MaxFileSize": 7, "ownerGet": ["a"],
		"Counters": {"MaxBytesTxPerMinute": 8, "MaxBytesRxPerMinute": 9}}}}`), c))
	if o := c.files(""); !o.AllowOverwrite || !o.FollowSymLinks || o.MaxFileSize != 0 || o.root != "" {
		t.Errorf("not enabled: got %+v", o.fileLimits)
	}
	if o := c.files("/x"); !o.AllowOverwrite || o.FollowSymLinks || o.root != "/x" {
		t.Errorf("--files: got %+v", o.fileLimits)
	}
	c.Limits.Enabled = true
	o := c.files("/x")
	if o.AllowOverwrite || o.FollowSymLinks || o.MaxFileSize != 7 || o.Counters.MaxBytesTxPerMinute != 8 ||
		o.Counters.MaxBytesRxPerMinute != 9 || o.Chroot != "/srv" || o.root != "/x" || o.OwnerGet[0] != "a" {
		t.Errorf("enabled: got %+v", o.fileLimits)
	}
}

// Whatever messages come, in whatever order: nothing outside is touched and nothing half is left.
func FuzzFileTransfer(f *testing.F) {
	f.Add([]byte("p0c1e2a3"))
	f.Add([]byte("pcce"))
	f.Add([]byte("pesga0"))
	f.Fuzz(func(t *testing.T, script []byte) {
		o := &fileOptions{root: t.TempDir()}
		o.AllowOverwrite = true
		p, off := newFilePeer(t, o), int64(0)
		paths := []string{"/f", "/sub", "/../f", "//", ""}
		for i, c := range script[:min(len(script), 40)] {
			path := o.root + paths[i%len(paths)]
			switch c {
			case 'p', 'P':
				off = 0
				p.say("put_file", nil, packMap("path", path, "mode", int(c)*i, "size", map[bool]any{true: i}[c == 'P']))
			case 'c':
				p.say("file_chunk", off, script)
				off += int64(len(script))
			case 'e':
				p.say("file_chunk", off, nil)
			case 's', 'g':
				p.say(map[byte]string{'s': "stat", 'g': "get_file"}[c], nil, packMap("path", path))
			case 'a':
				p.say("ack", off, nil)
			case 'x':
				p.say("error", nil, script)
			default:
				p.say("file_chunk", int64(c), script[i:])
				p.say("put_file", nil, script[i:])
			}
		}
		p.end()
		entries, _ := os.ReadDir(o.root)
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), filepath.Base(putPrefix)) {
				t.Errorf("%q is left", e.Name())
			}
		}
	})
}
