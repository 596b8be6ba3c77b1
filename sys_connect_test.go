// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

// The verb connect as a process, behind the relay, with programs that nobody here wrote at the other end.

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
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
