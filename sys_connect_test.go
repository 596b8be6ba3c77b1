// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

// The verb connect as a process, behind the relay, with programs that nobody here wrote at the other end.

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
