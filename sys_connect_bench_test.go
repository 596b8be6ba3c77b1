// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect && !nodbus && !386

package main

// Not on 386, whose getsockopt(2) package syscall has only within socketcall(2).

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// contender is a program behind a relay of its own, as it is measured.
type contender struct {
	name     string
	r        *relay
	pid      int
	figures  map[string][]float64
	sessions int
}

// add adds what was measured to the figures of this name.
func (c *contender) add(name string, v float64) { c.figures[name] = append(c.figures[name], v) }

// TestBenchConnect compares with Debian's mender-connect: "make bench-connect". The variable has the seconds for which
// both are left alone.
func TestBenchConnect(t *testing.T) {
	idle, err := strconv.Atoi(os.Getenv("MENDLET_BENCH_CONNECT"))
	if err != nil {
		t.Skip("make bench-connect runs it")
	}
	us, them := startContender(t), &contender{name: "mender-connect"}
	them.r, them.pid = newReference(t)
	both := []*contender{us, them}
	for _, c := range both {
		c.figures = map[string][]float64{}
	}
	settle := time.Now().Add(5 * time.Second) // what a start takes is no idle time
	for time.Now().Before(settle) {
		time.Sleep(time.Second)
	}
	var began [2][2]int64
	for i, c := range both {
		began[i] = [2]int64{cpuTime(t, c.pid), c.carried(t)}
	}
	time.Sleep(time.Duration(idle) * time.Second)
	hour := 3600 / float64(idle)
	for i, c := range both {
		c.add("processor time of an idle hour, ms", float64(cpuTime(t, c.pid)-began[i][0])/1e6*hour)
		c.add("bytes of an idle hour", float64(c.carried(t)-began[i][1])*hour)
		c.memory(t)
	}
	dir := fastDir(t)
	must(t, os.Chmod(dir, 0o755))
	text := make([]byte, 64<<20)
	rand.New(rand.NewSource(1)).Read(text)
	must(t, os.WriteFile(dir+"/file", text, 0o644))
	for range 5 { // in turns
		for _, c := range both {
			c.lean(t, dir, text)
			c.transfers(t, dir, text)
		}
	}
	fmt.Printf("| | mendlet | mender-connect | ratio |\n|---|--:|--:|--:|\n")
	for _, name := range sortedKeys(us.figures) {
		a, b := median(us.figures[name]), median(them.figures[name])
		fmt.Printf("| %s | %.1f | %.1f | %.2f |\n", name, a, b, a/b)
	}
}

// during measures what f takes for n bytes: the rate, and what the program's processor time for 100 MiB is.
func (c *contender) during(t *testing.T, what string, n int, f func()) {
	work, began := cpuTime(t, c.pid), time.Now()
	f()
	c.add(what+", MB/s", float64(n)/1e6/time.Since(began).Seconds())
	c.add(what+", processor ms per 100 MiB", float64(cpuTime(t, c.pid)-work)/1e6*(100<<20)/float64(n))
}

// lean gets and puts the file once by a user that is the relay, too, and does as little as the device can be kept busy
// with: what the service does between them is nothing of the device's.
func (c *contender) lean(t *testing.T, dir string, text []byte) {
	there := filepath.Join(dir, c.name)
	os.Remove(there)
	c.session(t, func(x *leanSession) {
		x.say(protoFile, "stat", nil, packMap("path", dir+"/file"))
		x.reply("file_info")
		c.during(t, "download, lean", len(text), func() {
			x.run = x.get
			x.say(protoFile, "get_file", nil, packMap("path", dir+"/file"))
			must(t, <-x.over)
		})
		if x.offset != int64(len(text)) {
			t.Errorf("%s: got %d bytes", c.name, x.offset)
		}
	})
	c.session(t, func(x *leanSession) {
		c.during(t, "upload, lean", len(text), func() {
			x.run, x.text = x.put, text
			x.say(protoFile, "put_file", nil, packMap("src_path", "file", "path", there))
			must(t, <-x.over)
		})
	})
	for end := time.Now().Add(relayGuard); !bytes.Equal(readFileOrNil(there), text); time.Sleep(time.Millisecond) {
		if time.Now().After(end) { // what was acknowledged need not be in its place yet
			t.Fatalf("%s: the file that was put is another one", c.name)
		}
	}
}

// leanSession is one whose messages are taken where the relay reads the device's link.
type leanSession struct {
	*relayTransfer
	t      *testing.T
	l      *relayLink
	text   []byte                     // to put
	run    func(m *peerMessage) error // takes over from the next message on; nil: nobody does
	offset int64                      // bytes that came, or were acknowledged
	over   chan error                 // how run has ended
}

// session does f in a new session with the device.
func (c *contender) session(t *testing.T, f func(x *leanSession)) {
	r, dev := c.r, c.r.device()
	c.sessions++
	s := &relaySession{id: fmt.Sprintf("00000000-0000-4000-8000-%012d", c.sessions), user: "user-1", device: dev,
		drop: func() {}}
	x := &leanSession{relayTransfer: &relayTransfer{relaySession: s, r: r, came: make(chan *peerMessage, 64)}, t: t,
		over: make(chan error, 1)}
	s.take = func(m *peerMessage, _ []byte) {
		if run := x.run; run != nil {
			x.run = nil
			x.over <- run(m)
			return
		}
		x.came <- m
	}
	r.at.Lock()
	x.l = r.devices[dev]
	r.at.Unlock()
	r.open(s)
	defer r.forget(s)
	must(t, x.say(protoControl, "open", nil, packMap("versions", []any{1})))
	x.reply("accept")
	f(x)
	must(t, x.say(protoControl, "close", nil, nil))
}

// reply takes the next message, which is of this type.
func (x *leanSession) reply(typ string) {
	x.t.Helper()
	m, err := x.hear()
	must(x.t, err)
	if m.typ != typ {
		x.t.Fatalf("got the message %q, want %q", m.typ, typ)
	}
}

// get takes chunks until the end. They are counted by the lengths of their frames: one of the same length as the one
// before has as many bytes.
func (x *leanSession) get(m *peerMessage) error {
	l := x.l
	l.r = bufio.NewReaderSize(l.r, 256<<10)
	frame, chunk := -1, 0 // bytes of the last frame behind its head, and of what it had
	for n := 1; ; n++ {
		if m != nil {
			if m.typ != "file_chunk" || m.props["offset"] != any(x.offset) {
				return fmt.Errorf("got %q with %v", m.typ, m.props)
			}
			chunk = len(m.body)
		}
		if x.offset += int64(chunk); chunk == 0 || n%10 == 0 {
			if err := x.say(protoFile, "ack", x.offset, nil); err != nil || chunk == 0 {
				return err
			}
		}
		head, err := l.r.Peek(4)
		if err != nil {
			return err
		}
		length := int(head[1] & 0x7f)
		if length == 126 {
			length = int(binary.BigEndian.Uint16(head[2:]))
		}
		if m = nil; head[0] == 0x80|frameBinary && length == frame {
			if _, err := l.r.Discard(4 + 4 + length); err != nil {
				return err
			}
			continue
		}
		raw, err := l.next()
		if err == nil {
			m, err = unpackMessage(raw)
		}
		if err != nil {
			return err
		}
		if frame = -1; len(raw) >= 126 && len(raw) < 1<<16 {
			frame = len(raw)
		}
	}
}

// put sends the text in frames that are made beforehand but for their offsets and their bytes.
func (x *leanSession) put(m *peerMessage) error {
	offset := func(n int64) []byte { return appendPacked(appendPacked(nil, "offset"), n) }
	one := frame(true, frameBinary, (&peerMessage{proto: protoFile, typ: "file_chunk", sid: x.id,
		props: map[string]any{"offset": int64(0), "user_id": x.user}, body: x.text[:relayChunk]}).packed())
	at, size := bytes.Index(one, offset(0))+len(offset(0))-8, len(one)
	out, sent := bytes.Repeat(one, relayWindow), int64(0)
	for total := int64(len(x.text)); ; {
		acked, _ := m.props["offset"].(int64)
		if m.typ != "ack" {
			return fmt.Errorf("got %q: %q", m.typ, m.body)
		}
		if x.offset = max(x.offset, acked); x.offset == total {
			return nil
		}
		n := 0
		for ; sent < total && sent-x.offset < relayWindow*relayChunk; n++ {
			p := out[n*size : (n+1)*size]
			binary.BigEndian.PutUint64(p[at:], uint64(sent))
			copy(p[size-relayChunk:], x.text[sent:])
			sent += relayChunk
		}
		if _, err := x.l.Write(out[:n*size]); err != nil {
			return err
		}
		if sent == total && n > 0 {
			if err := x.say(protoFile, "file_chunk", sent, nil); err != nil {
				return err
			}
		}
		raw, err := x.l.next()
		if err == nil {
			m, err = unpackMessage(raw)
		}
		if err != nil {
			return err
		}
	}
}

func startContender(t *testing.T) *contender {
	b := newVerbBoard(t)
	r := newRelay(t)
	b.server = r.testServer
	b.setup()
	cmd := exec.Command("./mendlet", "-b", b.dir+"/none", "connect", "--terminal", "--files", "/", "--forward",
		"127.0.0.1:22")
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	r.device()
	return &contender{name: "mendlet", r: r, pid: cmd.Process.Pid}
}

// carried is what the device's connection has carried, of TCP's payload (tcpi_bytes_acked and tcpi_bytes_received of
// struct tcp_info, linux/tcp.h).
func (c *contender) carried(t *testing.T) int64 {
	id := c.r.device()
	c.r.at.Lock()
	defer c.r.at.Unlock()
	raw, err := c.r.devices[id].Conn.(*net.TCPConn).SyscallConn()
	must(t, err)
	var info [256]byte
	n := uint32(len(info))
	must(t, raw.Control(func(fd uintptr) {
		_, _, e := syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, syscall.IPPROTO_TCP, syscall.TCP_INFO,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&n)), 0)
		if e != 0 || n < 136 {
			t.Errorf("TCP_INFO: %v, %d bytes", e, n)
		}
	}))
	return int64(binary.NativeEndian.Uint64(info[120:]) + binary.NativeEndian.Uint64(info[128:]))
}

// memory is what the program has resident, and of that what is its own alone and could go only to swap space, and what
// is of files, which the kernel can drop and read again (proc_pid_status(5)).
func (c *contender) memory(t *testing.T) {
	for line := range strings.Lines(look(fmt.Sprintf("/proc/%d/status", c.pid))) {
		name, kb, _ := strings.Cut(line, ":")
		if slices.Contains([]string{"VmRSS", "RssAnon", "RssFile"}, name) {
			n, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(kb), " kB"), 64)
			must(t, err)
			c.add("memory when idle, "+name+", KiB", n)
		}
	}
}

// transfers gets and puts the file once.
func (c *contender) transfers(t *testing.T, dir string, text []byte) {
	base := c.r.URL + strings.Replace(manage, "{id}", c.r.device(), 1)
	there := filepath.Join(dir, c.name)
	os.Remove(there)
	var got []byte
	c.during(t, "download, relay", len(text), func() {
		got = c.request(t, http.MethodGet, base+"/download?path="+url.QueryEscape(dir+"/file"), "", nil, 200)
	})
	if !bytes.Equal(got, text) {
		t.Errorf("%s: got %d bytes, not those of the file", c.name, len(got))
	}
	var form bytes.Buffer
	w := multipart.NewWriter(&form)
	w.WriteField("path", there)
	f, err := w.CreateFormFile("file", "file")
	must(t, err)
	f.Write(text)
	must(t, w.Close())
	c.during(t, "upload, relay", len(text), func() {
		c.request(t, http.MethodPut, base+"/upload", w.FormDataContentType(), &form, 201)
	})
}

func (c *contender) request(t *testing.T, method, at, kind string, body io.Reader, want int) []byte {
	req, err := http.NewRequestWithContext(t.Context(), method, at, body)
	must(t, err)
	req.Header.Set("Authorization", "Bearer "+userToken("user-1"))
	req.Header.Set("Content-Type", kind)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	text := make([]byte, max(resp.ContentLength, 0))
	n, err := io.ReadFull(resp.Body, text)
	if text = text[:n]; err != nil {
		t.Fatalf("%s: %s: %d bytes came: %v", c.name, method, n, err)
	}
	if resp.StatusCode != want {
		t.Fatalf("%s: %s: got HTTP status %d: %.200q", c.name, method, resp.StatusCode, text)
	}
	return text
}

func median(list []float64) float64 {
	slices.Sort(list)
	return list[len(list)/2]
}
