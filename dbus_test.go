// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nodbus

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// authDevice is a device with a server and the folder in which its bus is.
type authDevice struct {
	t      *testing.T
	dir    string
	server *testServer
	ca     string // file of the server's certificate; "": it has none
	log    bytes.Buffer
	ended  chan error
	stop   func()
}

// busGuard bounds what a test waits for; nothing takes as long.
const busGuard = time.Minute

func newAuthDevice(t *testing.T) *authDevice { return newAuthDeviceOf(t, newTestServer(t, false)) }

func newAuthDeviceOf(t *testing.T, server *testServer) *authDevice {
	dir, err := os.MkdirTemp("", "bus") // a socket's name is short
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	d := &authDevice{t: t, dir: dir, server: server, ended: make(chan error, 1)}
	d.server.autoAccept = true
	for _, name := range []string{"sys/class/net/eth0", "run/dbus", "var/lib/dbus"} {
		must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
	}
	for name, text := range map[string]string{"address": "02:00:00:00:00:01", "ifindex": "2", "type": "1"} {
		writeFile(t, filepath.Join(dir, "sys/class/net/eth0", name), text+"\n")
	}
	writeFile(t, filepath.Join(dir, "var/lib/dbus/machine-id"), "0123\n")
	return d
}

func (d *authDevice) socket() string { return filepath.Join(d.dir, "run/dbus/system_bus_socket") }

// pair is the n-th token that the server gave, from 0, which is waited for, and what shown makes of the address
// that stands for the server.
func (d *authDevice) pair(n int) string {
	s := d.server
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.tokens) <= n {
		s.changed.Wait()
	}
	var given []string // the number of the request, and what came of it
	for token := range s.tokens {
		var claims struct{ Jti string }
		text, _ := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
		must(d.t, json.Unmarshal(text, &claims))
		given = append(given, fmt.Sprintf("%9s %s", claims.Jti, token))
	}
	slices.Sort(given)
	return given[n][10:] + " forwarder"
}

var localAddress = regexp.MustCompile(`^http://127\.0\.0\.1:[1-9][0-9]*$`)

// shown is an answer with a word for an address that stands for the server's, and is not that.
func (d *authDevice) shown(got string) string {
	token, address, _ := strings.Cut(got, " ")
	if localAddress.MatchString(address) && address != d.server.URL {
		return token + " forwarder"
	}
	return got
}

// start runs the daemon until the test ends.
func (d *authDevice) start() {
	o := newOptions()
	o.paths = paths{d.dir, d.dir, d.dir}
	a, err := newApp(o, newLogger(&d.log), strings.NewReader(""), io.Discard, urlSource)
	must(d.t, err)
	a.c.Servers, a.c.ServerCertificate = []serverEntry{{d.server.URL}}, d.ca
	a.m.root = d.dir
	a.m.sleep = func(ctx context.Context, _ time.Duration) error { return sleepContext(ctx, time.Millisecond) }
	ctx, stop := context.WithCancel(context.Background())
	d.stop = stop
	go func() { d.ended <- authDaemon(ctx, a) }()
	d.t.Cleanup(func() {
		stop()
		if err := <-d.ended; err != nil {
			d.t.Errorf("got %v at its end, want nothing", err)
		}
		if d.t.Failed() {
			d.t.Logf("it said:\n%s", d.log.String())
		}
	})
}

// peer is one end of a bus in the test's hands, in a byte order of its own.
type peer struct {
	t     *testing.T
	order binary.AppendByteOrder
	net.Conn
	r *bufio.Reader
}

// accept is the bus's part up to the point where the service has its name.
func accept(t *testing.T, l net.Listener, order binary.AppendByteOrder) *peer {
	t.Helper()
	l.(*net.UnixListener).SetDeadline(time.Now().Add(busGuard))
	conn, err := l.Accept()
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(busGuard))
	p := &peer{t, order, conn, bufio.NewReader(conn)}
	hello, _ := p.r.ReadString('\n')
	if want := fmt.Sprintf("\x00AUTH EXTERNAL %x\r\n", fmt.Sprint(os.Getuid())); hello != want {
		t.Fatalf("got %q, want %q", hello, want)
	}
	io.WriteString(p, "OK 0123456789abcdef0123456789abcdef\r\n")
	if begin, _ := p.r.ReadString('\n'); begin != "BEGIN\r\n" {
		t.Fatalf("got %q, want BEGIN", begin)
	}
	m := p.next("/org/freedesktop/DBus org.freedesktop.DBus Hello")
	p.send(4, 0, 1, nil, "", busField{1, "o", "/org/freedesktop/DBus"}, busField{2, "s", "x.y"}, busField{3, "s", "Noise"})
	p.send(2, 1, 2, p.text(":1.7"), "s", busField{5, "u", p.number(m.serial)})
	m = p.next("/org/freedesktop/DBus org.freedesktop.DBus RequestName")
	if want := "\x1f\x00\x00\x00" + authName + "\x00\x04\x00\x00\x00"; string(m.body) != want ||
		m.fields[busSignature] != "su" {
		t.Fatalf("got a request for the name %q", m.body)
	}
	p.send(2, 1, 3, p.order.AppendUint32(nil, 1), "u", busField{5, "u", p.number(m.serial)})
	return p
}

type busField struct {
	code  byte
	kind  string
	value string // of "u", its four bytes
}

func (p *peer) number(n uint32) string { return string(p.order.AppendUint32(nil, n)) }

func (p *peer) text(s string) []byte {
	return append(append(p.order.AppendUint32(nil, uint32(len(s))), s...), 0)
}

// message is made here anew, in the order of this peer, as the rules have it.
func (p *peer) message(kind, flags byte, serial uint32, body []byte, signature string, fields ...busField) []byte {
	if signature != "" {
		fields = append(fields, busField{8, "g", signature})
	}
	var b []byte
	for _, f := range fields {
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
		b = append(b, f.code, byte(len(f.kind)))
		b = append(append(b, f.kind...), 0)
		switch f.kind {
		case "g":
			b = append(append(append(b, byte(len(f.value))), f.value...), 0)
		case "u":
			b = append(b, f.value...)
		default:
			b = append(b, p.text(f.value)...)
		}
	}
	order := byte('l')
	if p.order.String() == "BigEndian" {
		order = 'B'
	}
	head := p.order.AppendUint32([]byte{order, kind, flags, 1}, uint32(len(body)))
	head = p.order.AppendUint32(p.order.AppendUint32(head, serial), uint32(len(b)))
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return slices.Concat(head, b, body)
}

func (p *peer) send(kind, flags byte, serial uint32, body []byte, signature string, fields ...busField) {
	p.t.Helper()
	if _, err := p.Write(p.message(kind, flags, serial, body, signature, fields...)); err != nil {
		p.t.Fatal(err)
	}
}

// call calls the service.
func (p *peer) call(serial uint32, flags byte, path, iface, member string) {
	p.t.Helper()
	fields := []busField{{1, "o", path}, {3, "s", member}, {6, "s", authName}, {7, "s", ":1.9"}, {9, "u", p.number(0)}}
	if iface != "" {
		fields = append(fields, busField{2, "s", iface})
	}
	p.send(1, flags, serial, nil, "", fields...)
}

// next is the next message, which must be of this path, interface and member, or answer this serial.
func (p *peer) next(want string) *busMessage {
	p.t.Helper()
	m, err := readBusMessage(p.r)
	if err != nil {
		p.t.Fatalf("waiting for %q: %v", want, err)
	}
	got := strings.Join(m.fields[1:4], " ")
	if m.kind == busReturn || m.kind == busError {
		got = fmt.Sprintf("%d %d %s %s %s", m.kind, m.replyTo, m.fields[busDestination], m.fields[busSignature],
			m.fields[busErrorName])
	}
	if strings.TrimSpace(got) != want {
		p.t.Fatalf("got %q, %q, want %q", got, m.body, want)
	}
	return m
}

// pairOf is the body "ss".
func pairOf(m *busMessage) string {
	t := &busText{order: m.order, b: m.body}
	s := t.string() + " " + t.string()
	if t.bad || t.off != len(m.body) {
		return fmt.Sprintf("malformed: %q", m.body)
	}
	return s
}

const tokenSignal = authPath + " " + authInterface + " JwtTokenStateChange"

// The service by the protocol, in both byte orders, with a bus that goes and comes back.
func TestBusService(t *testing.T) {
	for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
		t.Run(order.String(), func(t *testing.T) {
			t.Parallel()
			d := newAuthDevice(t)
			d.server.autoAccept = false
			l, err := net.Listen("unix", d.socket())
			must(t, err)
			defer l.Close()
			gate := make(chan struct{})
			open := sync.OnceFunc(func() { close(gate) })
			t.Cleanup(open) // the server waits at its end, too
			d.server.fault = func(string, http.ResponseWriter, *http.Request) bool {
				<-gate
				return false
			}
			d.start()
			p := accept(t, l, order)
			p.call(9, 0, "/", "org.freedesktop.DBus.Peer", "Ping")
			p.next("2 9 :1.9") // it has the name
			open()
			p.next(tokenSignal) // the device is not accepted
			p.call(10, 0, authPath, authInterface, "GetJwtToken")
			if got := pairOf(p.next("2 10 :1.9 ss")); got != " " {
				t.Errorf("got %q before a token, want two empty strings", got)
			}
			d.server.mu.Lock()
			d.server.autoAccept = true
			d.server.mu.Unlock()
			p.call(11, 0, authPath, authInterface, "FetchJwtToken")
			if m := p.next("2 11 :1.9 b"); !bytes.Equal(m.body, []byte{1, 0, 0, 0}) {
				t.Errorf("got %v to FetchJwtToken, want true", m.body)
			}
			want := d.pair(0)
			if m := p.next(tokenSignal); d.shown(pairOf(m)) != want || m.fields[busDestination] != "" ||
				m.fields[busSignature] != "ss" {
				t.Errorf("got the signal %q to %q, want %q to all", pairOf(m), m.fields[busDestination], want)
			}
			p.misuse()
			p.Close()
			p = accept(t, l, order)
			if got := d.shown(pairOf(p.next(tokenSignal))); got != want {
				t.Errorf("got %q with the name back, want %q", got, want)
			}
			p.call(30, 0, authPath, "", "GetJwtToken")
			if got := d.shown(pairOf(p.next("2 30 :1.9 ss"))); got != want {
				t.Errorf("got %q after the bus was gone, want %q", got, want)
			}
		})
	}
}

// misuse asks for what is no method, and what is not the service's own.
func (p *peer) misuse() {
	p.t.Helper()
	unknown := " :1.9 s org.freedesktop.DBus.Error.UnknownMethod"
	p.call(12, 0, authPath, authInterface, "Nothing")
	p.next("3 12" + unknown)
	p.call(13, 0, "/", authInterface, "GetJwtToken")
	p.next("3 13" + unknown)
	p.call(14, 0, authPath, "org.other", "GetJwtToken")
	p.next("3 14" + unknown)
	p.call(15, busNoReply, authPath, authInterface, "GetJwtToken") // is not answered
	p.send(9, 0, 16, nil, "", busField{1, "o", "/"})               // a kind of the future
	p.send(1, 0, 17, nil, "", busField{1, "u", p.number(1)})       // a path of a wrong type
	p.send(1, 0, 18, bytes.Repeat([]byte{7}, 1<<20), "ay", busField{1, "o", authPath}, busField{3, "s", "Ping"})
	p.next("2 18")
	p.call(19, 0, "/any", "org.freedesktop.DBus.Peer", "GetMachineId")
	if m := p.next("2 19 :1.9 s"); !bytes.Equal(m.body, []byte("\x04\x00\x00\x000123\x00")) {
		p.t.Errorf("got the machine id %q", m.body)
	}
	p.call(20, 0, authPath, "org.freedesktop.DBus.Properties", "GetAll")
	if m := p.next("2 20 :1.9 a{sv}"); !bytes.Equal(m.body, make([]byte, 8)) {
		p.t.Errorf("got the properties %q", m.body)
	}
}

// A bus that refuses or says nonsense ends nothing: it is tried again.
func TestBusRefuses(t *testing.T) {
	t.Parallel()
	d := newAuthDevice(t)
	l, err := net.Listen("unix", d.socket())
	must(t, err)
	defer l.Close()
	d.start()
	for _, answer := range []string{"REJECTED EXTERNAL\r\n", strings.Repeat("x", 8192), "",
		"OK 00\r\nxxxxxxxxxxxxxxxxxxxx",
		"OK 00\r\nl\x02\x01\x01\xff\xff\xff\xff\x01\x00\x00\x00\xff\xff\xff\xff"} {
		conn, err := l.Accept()
		must(t, err)
		io.WriteString(conn, answer)
		conn.(*net.UnixConn).CloseWrite()
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	accept(t, l, binary.LittleEndian)
}

func TestBusSockets(t *testing.T) {
	for address, want := range map[string][]string{
		"unix:path=/run/dbus/system_bus_socket":                    {"/run/dbus/system_bus_socket"},
		"unix:abstract=/tmp/a,guid=00;unix:path=/b%20c%2f;tcp:x=y": {"@/tmp/a", "/b c/"},
		"unix:guid=00,path=/x":                                     {"/x"},
		"":                                                         nil, "unix:": nil, "unix:path=": nil,
		"unix:path=%zz": nil, "launchd:env=x": nil, "path=/x": nil,
		"unix:runtime=yes": nil,
	} {
		if got := busSockets(address); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", address, got, want)
		}
	}
}

func TestTokenLife(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for claims, want := range map[string]time.Duration{
		`{"exp":1800003600,"iat":1800000000}`: time.Hour,
		`{"exp":3600,"iat":0}`:                time.Minute, // long gone, by this clock
		`{"exp":7200,"iat":3600}`:             time.Hour,   // whatever this clock says
		`{"exp":1800003600}`:                  time.Hour,
		`{"exp":1e300}`:                       30 * 24 * time.Hour,
		`{"exp":-1e300}`:                      time.Minute,
		`{"exp":"soon"}`:                      24 * time.Hour,
		`{}`:                                  24 * time.Hour,
		`[`:                                   24 * time.Hour,
	} {
		token := "x." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".x"
		if got := tokenLife(token, now); got != want {
			t.Errorf("%s: got %s, want %s", claims, got, want)
		}
	}
	for _, token := range []string{"", "x", "a.b.c", "..", "x.e30.x.x"} {
		if got := tokenLife(token, now); got != 24*time.Hour {
			t.Errorf("%q: got %s, want a day", token, got)
		}
	}
}

// What is sent can be read, and what is read cannot be more than was sent.
func FuzzBusMessage(f *testing.F) {
	for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
		p := &peer{order: order}
		f.Add(p.message(1, 0, 5, p.text("x"), "s", busField{1, "o", "/a"}, busField{3, "s", "Ping"},
			busField{9, "u", p.number(1)}))
		f.Add(p.message(2, 1, 6, nil, "", busField{5, "u", p.number(3)}))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := readBusMessage(bytes.NewReader(text))
		if err != nil {
			return
		}
		if len(m.body) > len(text) || len(strings.Join(m.fields[:], "")) > len(text) {
			t.Fatalf("got %d bytes of body and %q out of %d bytes", len(m.body), m.fields, len(text))
		}
		_ = m.failure().Error()
		again, err := readBusMessage(bytes.NewReader(m.encode(m.serial)))
		if err != nil || m.kind != 0 && (again.fields != m.fields || again.replyTo != m.replyTo ||
			!bytes.Equal(again.body, m.body)) {
			t.Fatalf("got %v, %v back of %v", again, err, m)
		}
	})
}

// daemonBus is Debian's dbus-daemon with a configuration of a system bus, and our policy if it is to have it.
func (d *authDevice) daemonBus(policy bool) (stop func()) {
	d.t.Helper()
	needTool(d.t, "dbus-daemon")
	needTool(d.t, "dbus-send")
	if os.Getuid() != 0 {
		d.t.Skip("needs root: the policy is for root")
	}
	include := ""
	if policy {
		path, err := filepath.Abs("packaging/" + authName + ".conf")
		must(d.t, err)
		include = "<include>" + path + "</include>"
	}
	conf := filepath.Join(d.dir, "bus.conf")
	// The policy that a system bus begins with, without the programs that only the real one has.
	writeFile(d.t, conf, `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><auth>EXTERNAL</auth><listen>unix:path=`+d.socket()+`</listen>
<policy context="default"><allow user="*"/><deny own="*"/><deny send_type="method_call"/>
<allow send_type="signal"/><allow send_requested_reply="true" send_type="method_return"/>
<allow send_requested_reply="true" send_type="error"/><allow receive_type="method_call"/>
<allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
<allow send_destination="org.freedesktop.DBus"/></policy>`+include+`</busconfig>`)
	os.Remove(d.socket())
	cmd := exec.Command("dbus-daemon", "--nofork", "--nopidfile", "--print-address", "--config-file="+conf)
	said := &bytes.Buffer{}
	cmd.Stderr = said
	out, err := cmd.StdoutPipe()
	must(d.t, err)
	must(d.t, cmd.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		cmd.Wait()
		d.t.Skipf("dbus-daemon does not start: %v: %s%s", err, line, said)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	d.t.Cleanup(stop)
	return stop
}

// ask calls a method by Debian's dbus-send.
func (d *authDevice) ask(member string, uid uint32) string {
	cmd := exec.Command("dbus-send", "--system", "--print-reply=literal", "--dest="+authName, authPath, member)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+d.socket())
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "failed: " + string(out)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}

// until asks until the answer is the one, as the service comes when it can.
func (d *authDevice) until(member, want string) {
	d.t.Helper()
	var got string
	for end := time.Now().Add(busGuard); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if got = d.shown(d.ask(member, 0)); got == want {
			return
		}
	}
	d.t.Fatalf("%s: got %q, want %q", member, got, want)
}

// On Debian's bus, which restarts; by its policy root alone gets the token.
func TestBusOfDebian(t *testing.T) {
	t.Parallel()
	d := newAuthDevice(t)
	stop := d.daemonBus(true)
	d.start()
	d.until(authInterface+".GetJwtToken", d.pair(0))
	if got := d.ask(authInterface+".GetJwtToken", 65534); !strings.Contains(got, "AccessDenied") {
		t.Errorf("got %q for nobody, want a denial", got)
	}
	if got := d.ask(authInterface+".FetchJwtToken", 0); got != "boolean true" {
		t.Errorf("got %q to FetchJwtToken, want true", got)
	}
	d.until(authInterface+".GetJwtToken", d.pair(1))
	if got := d.ask("org.freedesktop.DBus.Introspectable.Introspect", 0); !strings.Contains(got, "JwtTokenStateChange") {
		t.Errorf("got %q to Introspect", got)
	}
	if got := d.ask("org.freedesktop.DBus.Properties.GetAll", 0); got != "array [ ]" {
		t.Errorf("got %q to GetAll, want an empty array", got)
	}
	stop()
	d.daemonBus(true)
	d.until(authInterface+".GetJwtToken", d.pair(1))
}

// Where the policy is not installed, it says which file is missing; once that is there, it has the name.
func TestBusWithoutPolicy(t *testing.T) {
	t.Parallel()
	d := newAuthDevice(t)
	stop := d.daemonBus(false)
	said := make(chan string, 64)
	o := newOptions()
	o.paths = paths{d.dir, d.dir, d.dir}
	lg := newLogger(io.Discard)
	lg.sinks = []logSink{func(_ logLevel, msg string) {
		select {
		case said <- msg:
		default:
		}
	}}
	a, err := newApp(o, lg, strings.NewReader(""), io.Discard, urlSource)
	must(t, err)
	a.c.Servers, a.m.root = []serverEntry{{d.server.URL}}, d.dir
	a.m.sleep = func(ctx context.Context, _ time.Duration) error { return sleepContext(ctx, time.Millisecond) }
	ctx, end := context.WithCancel(context.Background())
	defer end()
	go authDaemon(ctx, a)
	for guard := time.After(busGuard); ; {
		select {
		case msg := <-said:
			if !strings.HasPrefix(msg, "hint: the bus lets nobody have the name") {
				continue
			}
		case <-guard:
			t.Fatal("no hint at the policy")
		}
		break
	}
	stop()
	d.daemonBus(true)
	d.until(authInterface+".GetJwtToken", d.pair(0))
}

// The two daemons of Mender's client 4 and later, on a device that has no key yet: they make one, each does its own,
// and neither is in the other's way.
func TestDaemonsSideBySide(t *testing.T) {
	b := newVerbBoard(t)
	b.server.autoAccept = true
	b.setup("--update-poll", "100000", "--inventory-poll", "100000")
	d := newAuthDeviceOf(t, b.server)
	d.daemonBus(true)
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+d.socket())
	auth, authSaid := b.process("mender-auth", "daemon")
	update, updateSaid := b.process("mender-update", "daemon")
	ctx := t.Context()
	b.server.await(ctx, "the first poll", func() bool { return b.server.requests["POST next"] > 0 })
	var token, address string
	for end := time.Now().Add(busGuard); !localAddress.MatchString(address); { // the service comes when it can
		token, address, _ = strings.Cut(d.ask(authInterface+".GetJwtToken", 0), " ")
		if time.Now().After(end) {
			t.Fatalf("got %q, %q: %s", token, address, authSaid)
		}
	}
	dep := b.server.deploy("d-1", "app-2", []string{"qemu"}, b.artifact("app-2", "good"))
	if code, _, log := b.as("mender-update", "check-update"); code != 0 || !strings.Contains(log, "told the daemon") {
		t.Errorf("check-update: exit code %d, %q", code, log)
	}
	b.server.await(ctx, "the deployment's end", func() bool {
		for _, run := range dep.devices {
			return finished(run.status)
		}
		return false
	})
	if _, final, _ := b.server.history(dep); final != "success" {
		t.Errorf("the deployment ended in %s: %s", final, updateSaid)
	}
	const set = `{"timezone":"UTC"}` // as the scripts of mender-configure do
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, address+"/api/devices/v1/deviceconfig/configuration",
		strings.NewReader(set))
	must(t, err)
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		t.Errorf("with token and address of the bus: got %s", resp.Status)
	}
	for _, cmd := range []*exec.Cmd{auth, update} {
		must(t, cmd.Process.Signal(syscall.SIGTERM))
		if err := cmd.Wait(); err != nil {
			t.Errorf("%q: %v\n%s%s", cmd.Args, err, authSaid, updateSaid)
		}
	}
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	if n := len(b.server.devices); n != 1 {
		t.Errorf("the server knows %d devices, want one", n)
	}
	for _, dev := range b.server.devices {
		if dev.configuration != set {
			t.Errorf("the server got the configuration %q, want %q", dev.configuration, set)
		}
	}
}

// Debian's mender-connect gets token and address, and talks with a server whose certificate nobody knows but
// ServerCertificate.
func TestMenderConnect(t *testing.T) {
	t.Parallel()
	needTool(t, "mender-connect")
	d := newAuthDeviceOf(t, newTestServer(t, true))
	d.ca = filepath.Join(d.dir, "server.crt")
	must(t, os.WriteFile(d.ca, pemText("CERTIFICATE", d.server.Certificate().Raw), 0o644))
	d.daemonBus(true)
	came := make(chan string, 1)
	d.server.Config.Handler = connectHandler(d.server.Config.Handler, came)
	d.start()
	d.until(authInterface+".GetJwtToken", d.pair(0))
	conf := filepath.Join(d.dir, "connect.conf")
	writeFile(t, conf, `{"ShellCommand":"/bin/sh","User":"root"}`)
	cmd := exec.Command("mender-connect", "--config", conf, "--debug", "daemon")
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+d.socket())
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	over := make(chan struct{})
	go func() {
		cmd.Wait()
		close(over)
	}()
	defer func() {
		cmd.Process.Kill()
		<-over
		if t.Failed() {
			t.Logf("mender-connect said:\n%s", said.String())
		}
	}()
	select {
	case got := <-came:
		if token, _, _ := strings.Cut(d.pair(0), " "); got != "Bearer "+token {
			t.Errorf("mender-connect came with %q, want the token", got)
		}
	case <-over:
		t.Fatal("mender-connect ended")
	case <-time.After(busGuard):
		t.Fatal("mender-connect did not come to the server, or did not answer it")
	}
}

// connectHandler switches to WebSocket on the route of mender-connect, and tells who came when that has answered.
func connectHandler(next http.Handler, came chan string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/devices/v1/deviceconnect/connect" {
			next.ServeHTTP(w, r)
			return
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		// RFC 6455, 4.2.2: and then a ping (5.5.2), to which a pong with the same bytes comes back, masked.
		sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
			"Sec-WebSocket-Accept: %s\r\n\r\n\x89\x03abc", base64.StdEncoding.EncodeToString(sum[:]))
		rw.Flush()
		for head := make([]byte, 6); ; {
			if _, err := io.ReadFull(rw, head); err != nil {
				return
			}
			frame := make([]byte, head[1]&0x7f)
			if _, err := io.ReadFull(rw, frame); err != nil || len(frame) > 125 {
				return
			}
			for i := range frame {
				frame[i] ^= head[2+i%4]
			}
			if head[0] == 0x8a && string(frame) == "abc" {
				select {
				case came <- r.Header.Get("Authorization"):
				default:
				}
				io.Copy(io.Discard, rw) // until it goes
				return
			}
		}
	})
}
