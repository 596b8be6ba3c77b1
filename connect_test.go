// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// verbPeers is a device whose server has deviceconnect, of which the test is the other side.
type verbPeers struct {
	*verbBoard
	peers chan *socketPeer // connections of the device
	more  http.Header      // in the answers to handshakes
}

func newVerbPeers(t *testing.T, conf string) *verbPeers {
	b := &verbPeers{newVerbBoard(t), make(chan *socketPeer, 8), nil}
	b.server.autoAccept = true
	b.server.connect = func(w http.ResponseWriter, r *http.Request) {
		if p := upgrade(w, r, b.more); p != nil {
			b.peers <- p
		}
	}
	b.setup()
	if conf != "" {
		writeFile(t, b.dir+"/etc/mender-connect.conf", conf)
	}
	return b
}

// run runs the verb with these options until it ends; pauses between connections take no time. begun is what each
// of them would have been.
func (b *verbPeers) run(ctx context.Context, f *connectFlags) (pauses *atomic.Int32, ended chan error) {
	b.t.Helper()
	o := newOptions()
	o.fallback = b.dir + "/none"
	a, err := newApp(o, newLogger(testWriter{b.t}), strings.NewReader(""), io.Discard, urlSource)
	must(b.t, err)
	pauses, ended = &atomic.Int32{}, make(chan error, 1)
	a.m.sleep = func(ctx context.Context, d time.Duration) error {
		pauses.Add(1)
		return ctx.Err()
	}
	go func() { ended <- f.connect(ctx, a) }()
	return pauses, ended
}

// say sends a message to the device.
func (p *socketPeer) say(proto uint16, typ, sid string, body []byte) {
	p.send(frameBinary, (&peerMessage{proto: proto, typ: typ, sid: sid, body: body,
		props: map[string]any{"user_id": "user-1"}}).packed())
}

// hear waits for the next message of this type, and answers pings meanwhile.
func (p *socketPeer) hear(t *testing.T, typ string) *peerMessage {
	t.Helper()
	p.SetReadDeadline(time.Now().Add(20 * time.Second))
	for {
		kind, text, err := p.receive()
		if err != nil {
			t.Fatalf("waiting for %q: %v", typ, err)
		}
		if kind == framePing {
			p.send(framePong, text)
			continue
		}
		m, err := unpackMessage(text)
		if err != nil {
			t.Fatalf("waiting for %q: %v, %x", typ, err, text)
		}
		if m.typ == typ {
			return m
		}
	}
}

// TestConnectTerminal is a session from new to stop, and the end of the verb with it.
func TestConnectTerminal(t *testing.T) {
	b := newVerbPeers(t, "")
	audit := b.dir + "/audit"
	conf := string(readFileOrNil(b.dir + "/etc/mender.conf"))
	writeFile(t, b.dir+"/etc/mender.conf", strings.Replace(conf, "{", `{"ConnectAuditLog": "`+audit+`",`, 1))
	_, ended := b.run(t.Context(), &connectFlags{terminal: true, once: true})
	p := <-b.peers
	p.say(protoControl, "open", "x", packMap("versions", []any{1}))
	if m := p.hear(t, "accept"); !bytes.Equal(m.body, packMap("version", 1, "protocols", []any{uint16(protoShell)})) {
		t.Errorf("got %x", m.body)
	}
	p.say(protoShell, "new", "x", nil)
	if m := p.hear(t, "new"); m.props["status"] != int64(1) {
		t.Fatalf("got %v, %q", m.props, m.body)
	}
	p.say(protoShell, "shell", "x", []byte("stty -echo; echo $((6*7))é\n"))
	for out := ""; !strings.Contains(out, "42é"); {
		out += string(p.hear(t, "shell").body)
	}
	p.say(protoShell, "stop", "x", nil)
	p.hear(t, "stop")
	if kind, text, err := p.receive(); kind != frameClose || err != nil || !bytes.Equal(text, []byte{3, 0xe8}) {
		t.Errorf("got kind %d, % x, %v, want a close frame with 1000", kind, text, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("got %v", err)
	}
	log := string(readFileOrNil(audit))
	for _, want := range []string{`Z session "x" of user "user-1" begins: terminal` + "\n",
		"bytes out; stopped by the user\n"} {
		if !strings.Contains(log, want) || strings.Contains(log, "stty") {
			t.Errorf("got the log %q, want %q", log, want)
		}
	}
}

// TestConnectAgain loses the connection in several ways, and what is not a message ends it.
func TestConnectAgain(t *testing.T) {
	b := newVerbPeers(t, `{"User": "root", "FileTransfer": {"Disable": true}, "PortForward": {"Disable": true}}`)
	ctx, stop := context.WithCancel(t.Context())
	pauses, ended := b.run(ctx, &connectFlags{})
	p := <-b.peers
	p.Close()
	p = <-b.peers
	p.say(protoShell, "new", "x", nil)
	p.hear(t, "new")
	p.send(frameBinary, []byte{0xc1})
	for {
		if kind, text, err := p.receive(); err != nil {
			t.Fatal(err)
		} else if kind == frameClose {
			if !bytes.Equal(text, []byte{3, 0xef}) {
				t.Errorf("got % x, want 1007", text)
			}
			break
		}
	}
	b.server.expireTokens() // as when it is accepted anew: one more login
	p = <-b.peers
	p.say(protoControl, "open", "y", packMap("versions", []any{1}))
	m := p.hear(t, "accept")
	if !bytes.Equal(m.body, packMap("version", 1, "protocols", []any{uint16(protoShell), uint16(protoClient)})) {
		t.Errorf("got %x", m.body)
	}
	if n := b.server.count("POST auth"); n != 2 {
		t.Errorf("got %d logins, want 2", n)
	}
	if n := pauses.Load(); n != 2 {
		t.Errorf("got %d pauses, want 2", n)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("got %v", err)
	}
}

// TestConnectFailures are exit codes and hints where there is no connection.
func TestConnectFailures(t *testing.T) {
	b := newVerbPeers(t, "")
	b.want(3, "nothing is offered", "connect")
	b.want(3, "not an absolute path", "connect", "--terminal", "--config",
		b.config(`{"ShellCommand": "sh", "User": "root"}`))
	b.want(3, "no User is set", "connect", "--config", b.config("{}"))
	b.want(3, "all is disabled", "connect", "--config", b.config(`{"Terminal": {"Disable": true}, "fileTransfer":
		{"disable": true}, "PORTFORWARD": {"DISABLE": true}, "MenderClient": {"Disable": true}}`))
	b.want(3, "not a JSON object", "connect", "--config", b.config(`{"User": "root"`))
	serve := b.server.connect
	b.server.connect = nil
	b.want(75, "no deviceconnect service", "connect", "--terminal")
	b.server.connect = func(w http.ResponseWriter, r *http.Request) {
		apiError(w, 403, "operation requires addon: troubleshoot")
	}
	b.want(75, `"operation requires addon: troubleshoot"`, "connect", "--terminal")
	b.server.connect = func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html><title>Hotel</title>") }
	b.want(75, "a portal of this network", "connect", "--terminal")
	b.server.connect = func(w http.ResponseWriter, r *http.Request) { apiError(w, 401, "no") }
	b.want(75, "with a new token, too", "connect", "--terminal")
	b.server.connect = serve
	b.server.expireTokens()
	b.server.autoAccept = false
	b.server.setDevice(boardID, "rejected")
	b.want(75, "not authorized", "connect", "--terminal")
	b.server.Close()
	b.want(75, "refused", "connect", "--terminal")
	b.want(75, "there was no connection", "connect", "--terminal", "--retry", "--for", "1ms")
}

// config makes a mender.conf, beside which is this mender-connect.conf.
func (b *verbPeers) config(text string) string {
	b.t.Helper()
	dir, err := os.MkdirTemp(b.dir, "conf")
	must(b.t, err)
	writeFile(b.t, dir+"/mender.conf", string(readFileOrNil(b.dir+"/etc/mender.conf")))
	writeFile(b.t, dir+"/mender-connect.conf", text)
	return dir + "/mender.conf"
}

// TestConnectEnds by --idle and --for, and has a second process wait.
func TestConnectEnds(t *testing.T) {
	b := newVerbPeers(t, "")
	for _, f := range []*connectFlags{{terminal: true, idle: time.Millisecond}, {terminal: true, lasts: time.Second}} {
		_, ended := b.run(t.Context(), f)
		if f.lasts > 0 {
			p := <-b.peers
			p.say(protoShell, "new", "x", nil)
			p.hear(t, "new")
			b.want(75, "another 'mendlet connect' is running", "connect", "--terminal")
		}
		if err := <-ended; err != nil && exitCode(err) != exitTempFail {
			t.Errorf("got %v", err)
		}
	}
}

// TestConnectCommands has the server ask for an update and for the inventory, which this program does in a process
// of its own where there is no daemon.
func TestConnectCommands(t *testing.T) {
	t.Setenv("MENDLET_TEST_PROGRAM", "1")
	b := newVerbPeers(t, `{"Terminal": {"Disable": true}, "FileTransfer": {"Disable": true},
		"PortForward": {"Disable": true}}`)
	ctx, stop := context.WithCancel(t.Context())
	_, ended := b.run(ctx, &connectFlags{})
	p := <-b.peers
	p.say(protoClient, "send-inventory", "", nil)
	b.server.await(ctx, "the inventory", func() bool { return b.server.requests["PUT inventory"] > 0 })
	p.say(protoClient, "check-update", "s", nil)
	if m := p.hear(t, "check-update"); m.props["status"] != int64(1) {
		t.Errorf("got %v", m.props)
	}
	b.server.await(ctx, "the poll", func() bool {
		return b.server.requests["POST next2"]+b.server.requests["POST next"] > 0
	})
	p.say(protoClient, "reboot", "s", nil)
	if m := p.hear(t, "reboot"); m.props["status"] != int64(2) || string(m.body) != `unknown message type "reboot"` {
		t.Errorf("got %v, %q", m.props, m.body)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("got %v", err)
	}
}

// TestConnectBackoff is the schedule after failures.
func TestConnectBackoff(t *testing.T) {
	t.Parallel()
	c := &connector{a: &app{c: &config{RetryPollIntervalSeconds: 300}}, identity: "x"}
	lost, last := errors.New("lost"), time.Duration(0)
	for n := 1; n <= 9; n++ {
		wait := c.backoff(lost, n)
		if least := time.Second << (n - 1); wait < least || wait > max(least*3/2, least+5*time.Second) || wait < last {
			t.Errorf("failure %d: got %s", n, wait)
		}
		last = wait
	}
	for _, x := range []struct {
		status      int
		after       time.Duration
		n           int
		least, most time.Duration
	}{{0, 0, 1000, connectWait, connectWait * 3 / 2}, {401, 0, 1, time.Minute, time.Minute},
		{401, 0, 100, 5 * time.Minute, 5 * time.Minute}, {404, 0, 1, time.Hour, 5 * time.Hour / 4},
		{403, 0, 50, 4 * time.Hour, 5 * time.Hour}, {503, 7 * time.Second, 3, 7 * time.Second, 7 * time.Second}} {
		err := error(&statusError{code: x.status, after: x.after})
		if got := c.backoff(fmt.Errorf("failed: %w", err), x.n); got < x.least || got > x.most {
			t.Errorf("%d, failure %d: got %s", x.status, x.n, got)
		}
	}
}

// TestConnectMark asks from another process whether the connection stands.
func TestConnectMark(t *testing.T) {
	t.Parallel()
	b := newBoard(t, 1<<20, "")
	if s := connectionState(b.dir); s != "" {
		t.Errorf("got %q before there was one", s)
	}
	m, err := takeConnectMark(b.dir, nil)
	must(t, err)
	forked(t, b.dir+"/"+connectMarkName)
	for _, stands := range []bool{true, false} {
		m.stands(stands)
		want := "connection: none"
		if stands {
			want = fmt.Sprintf("connection: stands, process %d", syscall.Getpid())
		}
		if _, said := b.mendlet("status"); !strings.Contains(said, want+"\n") {
			t.Errorf("got no %q", want)
		}
	}
	m.close()
	m, err = takeConnectMark(b.dir, nil)
	must(t, err)
	m.close()
}

// TestAppendBounded keeps two files of the bound, and none behind a link.
func TestAppendBounded(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/log"
	for i := range 10 {
		must(t, appendBounded(path, fmt.Sprintf("line %d\n", i), 20))
	}
	if now, before := string(readFileOrNil(path)), string(readFileOrNil(path+".1")); now != "line 9\n" ||
		before != "line 6\nline 7\nline 8\n" {
		t.Errorf("got %q and %q", now, before)
	}
	must(t, os.Symlink(path, path+".link"))
	if err := appendBounded(path+".link", "x\n", 20); err == nil {
		t.Error("a link was followed")
	}
}
