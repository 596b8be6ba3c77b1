// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect && !nodbus

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// peerConf is a mender-connect.conf for both programs.
const peerConf = `{"ShellCommand":"/bin/bash","ShellArguments":["--noprofile","--norc"],"User":"root",
	"Sessions":{"MaxPerUser":4}}`

// newReference is a relay with Debian's mender-connect at it, which gets its token over a bus from our service. pid is
// its process.
func newReference(t *testing.T) (r *relay, pid int) {
	needTool(t, "mender-connect")
	r = newRelay(t)
	d := newAuthDeviceOf(t, r.testServer)
	d.daemonBus(true)
	d.start()
	d.until(authInterface+".GetJwtToken", d.pair(0))
	conf := filepath.Join(d.dir, "connect.conf")
	writeFile(t, conf, peerConf)
	cmd := exec.Command("mender-connect", "--config", conf, "daemon")
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+d.socket())
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("mender-connect said:\n%s", &said)
		}
	})
	r.device()
	return r, cmd.Process.Pid
}

// conversation is what one device answers to a user, in words that do not depend on its texts and its moments.
type conversation struct {
	*relayUser
	lines []string
}

// converse speaks with the device of a relay.
func converse(t *testing.T, r *relay) (lines []string) {
	c := &conversation{relayUser: r.user("user-1")}
	c.shell(t)
	c.lines = append(c.lines, "", "control:")
	c.relayUser = r.user("user-2")
	c.control()
	c.files(t, r)
	c.ports(t, r)
	return c.lines
}

// note writes a message down: its type, its props and the keys of its body, with the values that both give.
func (c *conversation) note(m *peerMessage, values ...string) {
	line := fmt.Sprintf("%#x %s", m.proto, m.typ)
	for _, k := range sortedKeys(m.props) {
		line += fmt.Sprintf(" %s=%v", k, m.props[k])
	}
	if body, err := unpackMap(m.body); err == nil && m.proto != protoShell && m.typ != "forward" && m.typ != "file_chunk" {
		line += " {"
		for _, k := range sortedKeys(body) {
			if slices.Contains(values, k) {
				line += fmt.Sprintf(" %s=%v", k, body[k])
			} else {
				line += " " + k
			}
		}
		line += " }"
	}
	c.lines = append(c.lines, line)
}

func (c *conversation) shell(t *testing.T) {
	c.lines = append(c.lines, "shell:")
	ask := func(typ string, body string, pairs ...any) {
		props := map[string]any{}
		for i := 0; i < len(pairs); i += 2 {
			props[pairs[i].(string)] = pairs[i+1]
		}
		c.say(protoShell, typ, props, []byte(body))
	}
	said := func(line, want string) {
		t.Helper()
		ask("shell", line+"\n")
		text := ""
		c.hear(want, func(m *peerMessage) bool {
			if m.typ != "shell" || m.props["status"] != any(int64(1)) || m.sid == "" {
				t.Errorf("got %q with %v", m.typ, m.props)
			}
			text += string(m.body)
			return strings.Contains(text, want)
		})
		c.lines = append(c.lines, "output with "+want)
	}
	ask("shell", "x") // before there is one
	c.note(c.reply("shell"))
	ask("stop", "")
	c.note(c.reply("stop"))
	ask("new", "", "terminal_width", int64(100), "terminal_height", int64(30))
	m := c.reply("new")
	c.note(m)
	c.lines = append(c.lines, string(m.body))
	said("PS1=; echo $((6*7))-$TERM-$HOME; stty size", "30 100")
	ask("resize", "", "terminal_width", 90, "terminal_height", 25)
	said("stty size", "25 90")
	ask("resize", "", "terminal_width", 80) // half of it
	said("stty size; echo again", "25 90\r\nagain")
	said("printf '\\303\\274\\001\\377'; echo end", "\u00fc\x01\xffend")
	ask("new", "")
	c.note(c.hear("about a second shell", func(m *peerMessage) bool { return m.typ == "new" }))
	ask("nonsense", "")
	c.note(c.reply("nonsense"))
	ask("stop", "")
	c.note(c.reply("stop"))
}

func (c *conversation) control() {
	hear := func(values ...string) {
		c.note(c.hear("control", func(m *peerMessage) bool { return m.proto == protoControl }), values...)
	}
	c.say(protoControl, "open", nil, packMap("versions", []any{1}))
	hear("version")
	c.say(protoControl, "ping", nil, nil)
	hear()
	c.say(protoControl, "nonsense", nil, nil)
	hear("close")
	c.say(9, "foo", map[string]any{"msgid": "7"}, nil)
	hear("close", "msgproto", "msgtype", "msgid")
	c.say(protoControl, "open", nil, packMap("versions", []any{9, 10}))
	hear("close", "err")
}

func (c *conversation) files(t *testing.T, r *relay) {
	c.lines = append(c.lines, "", "files:")
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	text := bytes.Repeat([]byte("0123456789"), 2000) // 20000
	must(t, os.WriteFile(dir+"/a", text, 0o640))
	stamp := time.Unix(1700000000, 0)
	must(t, os.Chtimes(dir+"/a", stamp, stamp))
	ask := func(typ string, offset any, body []byte) {
		var props map[string]any
		if offset != nil {
			props = map[string]any{"offset": offset}
		}
		c.say(protoFile, typ, props, body)
	}
	hear := func(values ...string) *peerMessage {
		m := c.hear("about files", func(m *peerMessage) bool { return m.proto == protoFile })
		c.note(m, values...)
		return m
	}
	begin := func() { // each transfer has a session of its own
		c.relayUser = r.user("user-2")
		c.say(protoControl, "open", nil, packMap("versions", []any{1}))
		c.reply("accept")
	}
	begin()
	ask("stat", nil, packMap("path", dir+"/a"))
	hear("size", "uid", "gid", "mode", "modtime")
	ask("stat", nil, packMap("path", dir+"/none"))
	hear()
	ask("get_file", nil, packMap("path", dir+"/a"))
	var got []byte
	for {
		m := hear()
		if got = append(got, m.body...); m.typ != "file_chunk" || len(m.body) == 0 {
			break
		}
	}
	if !bytes.Equal(got, text) {
		t.Errorf("got %d bytes of a file, not its own", len(got))
	}
	ask("ack", int64(len(text)), nil)
	begin()
	ask("get_file", nil, packMap("path", dir+"/none"))
	hear()
	begin()
	ask("get_file", nil, packMap("path", dir))
	hear()
	begin()
	ask("put_file", nil, packMap("path", dir+"/b", "src_path", "b", "mode", uint32(0o600)))
	hear()
	for off := 0; off < len(text); off += 4096 {
		ask("file_chunk", int64(off), text[off:min(off+4096, len(text))])
	}
	ask("file_chunk", int64(len(text)), nil)
	c.hear("the last ack", func(m *peerMessage) bool {
		return m.typ == "ack" && m.props["offset"] == any(int64(len(text)))
	})
	for end := time.Now().Add(relayGuard); look(dir+"/b") != string(text) && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // it may get its name after the ack
	}
	st, err := os.Stat(dir + "/b")
	if err != nil {
		t.Fatal(err)
	}
	c.lines = append(c.lines, fmt.Sprintf("put: %d bytes, %s", st.Size(), st.Mode()))
	begin()
	ask("put_file", nil, packMap("path", dir+"/none/b", "src_path", "b"))
	hear()
	begin()
	ask("file_chunk", int64(0), text[:10])
	hear()
}

func (c *conversation) ports(t *testing.T, r *relay) {
	c.lines = append(c.lines, "", "ports:")
	tcp, _ := echoServers(t)
	c.relayUser = r.user("user-2")
	c.say(protoControl, "open", nil, packMap("versions", []any{1}))
	c.reply("accept")
	ask := func(typ, id string, body []byte) {
		c.say(protoForward, typ, map[string]any{"connection_id": id}, body)
	}
	hear := func() *peerMessage {
		return c.hear("about ports", func(m *peerMessage) bool { return m.proto == protoForward && m.typ != "ack" })
	}
	port, err := strconv.ParseUint(tcp[strings.LastIndexByte(tcp, ':')+1:], 10, 16)
	must(t, err)
	ask("new", "c1", packMap("remote_host", "127.0.0.1", "remote_port", uint16(port), "protocol", "tcp"))
	c.note(hear())
	got, sent := 0, 0
	send := func() {
		if sent++; sent <= 3 {
			ask("forward", "c1", bytes.Repeat([]byte{byte(sent)}, 3000))
		}
	}
	for send(); got < 9000 || sent <= 3; {
		m := c.hear("about ports", func(m *peerMessage) bool { return m.proto == protoForward })
		switch m.typ {
		case "ack":
			send()
		case "forward":
			got += len(m.body)
			ask("ack", "c1", nil)
		default:
			t.Fatalf("got %q", m.typ)
		}
	}
	c.lines = append(c.lines, fmt.Sprintf("%d bytes came back", got))
	ask("stop", "c1", nil)
	c.note(hear())
	ask("forward", "c9", []byte("x"))
	c.note(hear(), "msgtype")
	ask("new", "c2", packMap("remote_host", "127.0.0.1", "remote_port", uint16(1), "protocol", "tcp")) // nobody listens
	c.note(hear(), "msgtype")
}

// errorLine is about a file or a port: there our errors tell more, and which connection they are about.
var errorLine = regexp.MustCompile(`(?m)^(0x[23] error) .*`)

// TestConnectReference holds what both programs answer to the same user side by side.
func TestConnectReference(t *testing.T) {
	onlyExhaustive(t, "mender-connect takes ten seconds to come")
	b := newConnectBoard(t, peerConf)
	ours := strings.Join(converse(t, b.relay), "\n")
	for _, line := range errorLine.FindAllString(ours, -1) {
		if !strings.Contains(line, " code ") {
			t.Errorf("%s: want a code", line)
		}
	}
	r, _ := newReference(t)
	theirs := strings.Join(converse(t, r), "\n")
	if errorLine.ReplaceAllString(ours, "$1") != errorLine.ReplaceAllString(theirs, "$1") {
		t.Errorf("mendlet says\n%s\n\nand mender-connect\n%s", ours, theirs)
	}
}
