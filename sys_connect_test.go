// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

// The verb connect as a process, behind the relay, with programs that nobody here wrote at the other end.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// connectBoard is a device whose program is connected to a relay.
type connectBoard struct {
	*verbBoard
	*relay
	cmd  *exec.Cmd
	said *bytes.Buffer
	id   string // by which the server knows it
}

// newConnectBoard starts "mendlet connect" with these words; conf, if any, is its mender-connect.conf.
func newConnectBoard(t *testing.T, conf string, words ...string) *connectBoard {
	b := &connectBoard{verbBoard: newVerbBoard(t), relay: newRelay(t)}
	b.server = b.relay.testServer
	b.setup()
	if conf != "" {
		writeFile(t, filepath.Join(b.dir, "etc", connectConfName), conf)
	}
	b.cmd, b.said = b.process("mendlet", append([]string{"-b", b.dir + "/none", "connect"}, words...)...)
	over := make(chan struct{})
	go func() {
		b.cmd.Wait()
		close(over)
	}()
	t.Cleanup(func() {
		b.cmd.Process.Signal(os.Interrupt)
		<-over
		if t.Failed() {
			t.Logf("mendlet connect said:\n%s", b.said)
		}
	})
	b.id = b.device()
	return b
}

// cli is Debian's mender-cli with these words.
func (r *relay) cli(ctx context.Context, words ...string) *exec.Cmd {
	r.t.Helper()
	needTool(r.t, "mender-cli")
	cmd := exec.CommandContext(ctx, "mender-cli", append([]string{"--server", r.URL, "--token-value", userToken("user-1")},
		words...)...)
	cmd.Env = append(os.Environ(), "HOME="+r.t.TempDir())
	return cmd
}

// A terminal by mender-cli: what is typed is done, and the end of the shell is the end of the session.
func TestCLITerminal(t *testing.T) {
	needTool(t, "mender-cli")
	b := newConnectBoard(t, "", "--terminal")
	ctx, stop := context.WithTimeout(t.Context(), relayGuard)
	defer stop()
	cmd := b.cli(ctx, "terminal", b.id)
	in, err := cmd.StdinPipe()
	must(t, err)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	io.WriteString(in, "stty size; echo is $((6*7)) $TERM\nexit\n")
	err = cmd.Wait()
	t.Logf("%v\n%s", err, &out)
	for _, want := range []string{"40 80", "is 42 xterm-256color"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("got no %q", want)
		}
	}
}

// What the server asks of the updater is done by a process of its own, as there is no daemon.
func TestServerCommands(t *testing.T) {
	onlyExhaustive(t, "starts the program again")
	b := newConnectBoard(t, `{"User":"root"}`)
	ctx, stop := context.WithTimeout(t.Context(), relayGuard)
	defer stop()
	for what, route := range map[string]string{"send-inventory": "PUT inventory", "check-update": "POST next"} {
		before := b.server.count(route)
		if got := b.ask(t, "POST", what, "", nil); got != 202 {
			t.Errorf("%s: got HTTP status %d, want 202", what, got)
		}
		b.server.await(ctx, what, func() bool { return b.server.requests[route] > before })
	}
}

// vi in a terminal by mender-cli, in a root that has busybox and nothing else, no devpts too: it fills the screen, and
// again when the terminal becomes larger. The log has what the screen showed.
func TestCLIScreen(t *testing.T) {
	onlyExhaustive(t, "builds the program")
	needTool(t, "tmux")
	needTool(t, "mender-cli")
	if os.Getuid() != 0 {
		t.Skip("needs root: a root of its own")
	}
	root := busyboxRoot(t)
	r := newRelay(t)
	writeFile(t, root+"/mender.conf", fmt.Sprintf(`{"ServerURL":%q}`, r.URL))
	cmd := exec.Command("/mendlet", "-c", "/mender.conf", "-b", "/none", "-d", "/var", "connect", "--terminal")
	cmd.Env = []string{"PATH=/bin", "MENDER_DATA_DIR=/share"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Cloneflags: syscall.CLONE_NEWNS}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	defer func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		t.Logf("mendlet connect said:\n%s", &said)
	}()
	s := newScreen(t, r.cli(t.Context(), "terminal", r.device()))
	s.keys("vi /tmp/note\n")
	s.until("vi's empty lines", func(text string) bool { return strings.Count(text, "\n~") == 22 })
	s.keys("iboth slots are broken\ncaf\u00e9 \u2713")
	s.until("the text", func(text string) bool { return strings.Contains(text, "caf\u00e9 \u2713") })
	s.tmux("resize-window", "-t", "main", "-x", "100", "-y", "34")
	s.keys("\x1b")
	s.until("the larger screen", func(text string) bool {
		return strings.Count(text, "\n~") == 31 && strings.Contains(text, "- /tmp/note")
	})
	s.keys(":wq\n")
	s.until("the shell", func(text string) bool { return strings.Contains(text, "# ") })
	s.keys("stty size; exit\n")
	s.until("the size", func(text string) bool { return strings.Contains(text, "34 100") })
	if got := look(root + "/tmp/note"); got != "both slots are broken\ncaf\u00e9 \u2713\n" {
		t.Errorf("vi wrote %q", got)
	}
}

// busyboxRoot is a root with the program and busybox, and the devices that every kernel has.
func busyboxRoot(t *testing.T) string {
	needTool(t, "busybox")
	root := t.TempDir()
	for _, d := range []string{"bin", "dev", "etc", "tmp", "var", "proc", "root"} {
		must(t, os.Mkdir(filepath.Join(root, d), 0o755))
	}
	writeScript(t, root+"/share/identity/mender-device-identity", "echo mac=a", 0o755)
	writeFile(t, root+"/none", "{}")
	path, err := exec.LookPath("busybox")
	must(t, err)
	for from, to := range map[string]string{path: "/bin/busybox", builtProgram(t): "/mendlet"} {
		must(t, os.WriteFile(root+to, readFileOrNil(from), 0o755))
	}
	for _, applet := range []string{"sh", "vi", "stty", "echo", "cat"} {
		must(t, os.Symlink("busybox", filepath.Join(root, "bin", applet)))
	}
	for name, dev := range map[string]int{"null": 1<<8 | 3, "tty": 5 << 8, "ptmx": 5<<8 | 2} {
		must(t, syscall.Mknod(filepath.Join(root, "dev", name), syscall.S_IFCHR|0o666, dev))
	}
	return root
}

// screen is a terminal of 80 by 24 that a program runs in.
type screen struct {
	t      *testing.T
	socket string
}

func newScreen(t *testing.T, cmd *exec.Cmd) *screen {
	t.Helper()
	s := &screen{t, filepath.Join(t.TempDir(), "tmux")}
	s.tmux(append([]string{"-f", "/dev/null", "new-session", "-d", "-s", "main", "-x", "80", "-y", "24"}, cmd.Args...)...)
	t.Cleanup(func() { exec.Command("tmux", "-S", s.socket, "kill-server").Run() })
	s.tmux("set-option", "-g", "remain-on-exit", "on")
	return s
}

func (s *screen) tmux(words ...string) string {
	s.t.Helper()
	cmd := exec.Command("tmux", append([]string{"-u", "-S", s.socket}, words...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("tmux %q: %v: %s", words, err, out)
	}
	return string(out)
}

func (s *screen) keys(text string) { s.tmux("send-keys", "-t", "main", "-l", text) }

// until waits until the screen shows what cond wants, and puts it in the log.
func (s *screen) until(what string, cond func(text string) bool) {
	s.t.Helper()
	var text string
	for end := time.Now().Add(relayGuard); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if text = s.tmux("capture-pane", "-p", "-t", "main"); cond(text) {
			s.t.Logf("%s:\n%s", what, text)
			return
		}
	}
	s.t.Fatalf("the screen never showed %s, but\n%s", what, text)
}

// freePort is one that nobody listens at.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// forwarder starts mender-cli's port-forward and waits until it listens.
func (b *connectBoard) forwarder(t *testing.T, words ...string) {
	t.Helper()
	cmd := b.cli(t.Context(), append([]string{"port-forward", b.id}, words...)...)
	out := &bytes.Buffer{}
	cmd.Stderr = out
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("mender-cli said:\n%s", out)
		}
	})
	lines := bufio.NewScanner(stdout)
	for n := 0; n < len(words); {
		if !lines.Scan() {
			t.Fatalf("mender-cli port-forward ended: %s", out)
		}
		if strings.HasPrefix(lines.Text(), "Forwarding from") {
			n++
		}
	}
	go io.Copy(io.Discard, stdout)
}

// Ports by mender-cli: TCP with several connections at a time, UDP, and what is not offered.
func TestCLIPorts(t *testing.T) {
	onlyExhaustive(t, "megabytes through ports")
	needTool(t, "mender-cli")
	tcp, udp := echoServers(t)
	b := newConnectBoard(t, "", "--forward", tcp, "--forward", udp)
	denied := make(chan map[string]any, 1)
	b.at.Lock()
	b.trace = func(_ string, toDevice bool, m *peerMessage) {
		if m.typ == "error" && !toDevice {
			body, _ := unpackMap(m.body)
			select {
			case denied <- body:
			default:
			}
		}
	}
	b.at.Unlock()
	local, localUDP, closed := freePort(t), freePort(t), freePort(t)
	_, tcpPort, _ := net.SplitHostPort(tcp)
	_, udpPort, _ := net.SplitHostPort(udp)
	b.forwarder(t, fmt.Sprintf("tcp/%d:%s", local, tcpPort), fmt.Sprintf("udp/%d:%s", localUDP, udpPort),
		fmt.Sprintf("%d:192.0.2.1:22", closed))
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", local))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(relayGuard))
			text := bytes.Repeat([]byte{byte(n), 0xff, 7}, 1<<18)
			go conn.Write(text)
			got := make([]byte, len(text))
			if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, text) {
				t.Errorf("connection %d: not what was sent, %v", n, err)
			}
		})
	}
	wg.Wait()
	conn, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", localUDP))
	must(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(relayGuard))
	for _, n := range []int{1, 500, 4000} {
		text, got := bytes.Repeat([]byte{byte(n)}, n), make([]byte, 8192)
		conn.Write(text)
		if m, err := conn.Read(got); err != nil || !bytes.Equal(got[:m], text) {
			t.Errorf("a datagram of %d bytes: got %d, %v", n, m, err)
		}
	}
	refused, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", closed))
	must(t, err)
	defer refused.Close()
	select {
	case got := <-denied:
		if code := field(got, "code"); code != any(int64(403)) {
			t.Errorf("what is not offered: got %v, want the code 403", got)
		}
	case <-time.After(relayGuard):
		t.Error("what is not offered: no answer")
	}
}

// echoServers send back what they get, at these addresses.
func echoServers(t *testing.T) (tcp, udp string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(conn, conn)
				conn.Close()
			}()
		}
	}()
	p, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { p.Close() })
	go func() {
		for buf := make([]byte, 8192); ; {
			n, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			p.WriteTo(buf[:n], from)
		}
	}()
	return l.Addr().String(), p.LocalAddr().String()
}

// ssh through a port, and scp of 50 MiB.
func TestCLISecureShell(t *testing.T) {
	onlyExhaustive(t, "50 MiB through ssh")
	for _, tool := range []string{"mender-cli", "scp", "ssh-keygen"} {
		needTool(t, tool)
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: sshd")
	}
	const sshd = "/usr/sbin/sshd" // which wants its whole path
	needTool(t, sshd)
	dir, port, local := fastDir(t), freePort(t), freePort(t)
	must(t, os.Chmod(dir, 0o700))
	for _, name := range []string{"host", "user"} {
		keygen := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, name))
		out, err := keygen.CombinedOutput()
		if err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	must(t, os.MkdirAll("/run/sshd", 0o755))
	writeFile(t, dir+"/conf", fmt.Sprintf("Port %d\nListenAddress 127.0.0.1\nHostKey %s/host\n"+
		"AuthorizedKeysFile %s/user.pub\nPidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"+
		"Subsystem sftp internal-sftp\n",
		port, dir, dir))
	server := exec.Command(sshd, "-D", "-e", "-f", dir+"/conf")
	said := &bytes.Buffer{}
	server.Stderr = said
	must(t, server.Start())
	defer func() {
		server.Process.Kill()
		server.Wait()
	}()
	for end := time.Now().Add(relayGuard); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatalf("sshd does not listen: %s", said)
		}
	}
	b := newConnectBoard(t, "", "--forward", fmt.Sprintf("127.0.0.1:%d", port))
	b.forwarder(t, fmt.Sprintf("%d:%d", local, port))
	text := make([]byte, 50<<20)
	rand.Read(text)
	must(t, os.WriteFile(dir+"/here", text, 0o600))
	began := time.Now()
	out, err := exec.Command("scp", "-q", "-P", fmt.Sprint(local), "-i", dir+"/user", "-o", "StrictHostKeyChecking=no",
		"-o", "UserKnownHostsFile=/dev/null", dir+"/here", "root@127.0.0.1:"+dir+"/there").CombinedOutput()
	if err != nil {
		t.Fatalf("scp: %v: %s\nsshd: %s", err, out, said)
	}
	t.Logf("50 MiB in %s", time.Since(began).Round(time.Millisecond))
	if sha256.Sum256(readFileOrNil(dir+"/there")) != sha256.Sum256(text) {
		t.Error("the copy has another hash")
	}
}

// The relay's own part: what a device does wrong, and what becomes of its older connection.
func TestRelay(t *testing.T) {
	t.Parallel()
	r := newRelay(t)
	api := apiFor(t, r.testServer)
	must(t, api.login(t.Context()))
	dial := func() *webSocket {
		w, err := dialWebSocket(t.Context(), api.hc, r.URL+apiConnect, api.token)
		must(t, err)
		t.Cleanup(func() { w.drop(io.EOF) })
		return w
	}
	ends := func(w *webSocket, want string) {
		t.Helper()
		if _, err := w.next(nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	older := dial()
	r.device()
	w := dial()
	ends(older, `code 1011: "connection closed by the server"`)
	must(t, w.send(frameBinary, (&peerMessage{proto: protoShell, typ: "shell", sid: "unknown"}).packed())) // nobody hears it
	u := r.user("user-1")
	u.say(protoShell, "new", map[string]any{"user_id": "somebody"}, nil)
	raw, err := w.next(nil)
	must(t, err)
	m, err := unpackMessage(raw)
	must(t, err)
	if m.sid == "" || userOf(m) != "user-1" {
		t.Errorf("got the session %q of user %q", m.sid, userOf(m))
	}
	u.drop(io.EOF)
	raw, err = w.next(nil)
	must(t, err)
	if m, _ = unpackMessage(raw); m.typ != "stop" || string(m.body) != "user disconnected" {
		t.Errorf("got %q, %q, want the stop", m.typ, m.body)
	}
	must(t, w.send(frameBinary, (&peerMessage{proto: protoShell, typ: "shell"}).packed()))
	ends(w, "missing required session ID")
	w = dial()
	must(t, w.send(frameBinary, []byte{0xc1}))
	ends(w, "code 1011")
}
