// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// foreignServer is a websocket server by python3-websockets. It says its port, and on other lines how each connection
// ended: the path, the code that the client gave, and the extensions that were agreed upon.
const foreignServer = `
import asyncio, http, websockets

async def parts(ws):
    yield b"ab"
    await ws.ping(b"60")
    yield b""
    yield bytes(70000)
    await ws.ping(b"61")
    yield b"cd"

async def serve(ws):
    what = ws.path.split("/")
    if what[1] == "echo":
        async for m in ws:
            await ws.send(m)
    elif what[1] == "parts":
        await ws.send(parts(ws))
        await asyncio.wait_for(await ws.ping(b"62"), 30)
        await ws.close()
    elif what[1] == "close":
        await ws.close(int(what[2]), what[3])
    elif what[1] == "drop":
        ws.transport.abort()
    elif what[1] == "half":
        ws.transport.write(b"\x82\x05ab")
        ws.transport.close()
    elif what[1] == "raw":
        ws.transport.write(bytes.fromhex(what[2]))
        await ws.wait_closed()
    elif what[1] == "text":
        await ws.send("text")
        await ws.wait_closed()
    print(ws.path, ws.close_code, len(ws.extensions), flush=True)

async def portal(path, headers):
    if path == "/portal":
        return http.HTTPStatus.OK, [("Content-Type", "text/html")], b"<html><title>Hotel</title></html>"
    if path == "/away":
        return http.HTTPStatus.FOUND, [("Location", "http://127.0.0.1:9/login")], b""

async def main():
    async with websockets.serve(serve, "127.0.0.1", 0, process_request=portal, max_size=1 << 20) as s:
        print(s.sockets[0].getsockname()[1], flush=True)
        await asyncio.Future()

asyncio.run(main())
`

// A websocket server of others: parts of messages with pings in between, ends with and without a frame, frames that a
// server must not send, compression, which it offers and does not get, the lengths at which a head changes, and what
// answers in the place of a server.
func TestForeignSocket(t *testing.T) {
	t.Parallel()
	needTool(t, "/usr/bin/python3")
	cmd := exec.Command("/usr/bin/python3", "-c", foreignServer)
	var wrong bytes.Buffer
	cmd.Stderr = &wrong
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Skipf("needs python3-websockets: %s", &wrong)
	}
	base := "http://127.0.0.1:" + lines.Text()
	hc := testHTTPClient(t, testConfig(t, base), netOptions{})
	for path, want := range map[string]string{
		"/echo":                     "",
		"/parts":                    `"ab" and 70002 bytes, closed by the server, code 1000`,
		"/close/1000/":              "closed by the server, code 1000",
		"/close/1011/sorry":         `closed by the server, code 1011: "sorry"`,
		"/close/4000/ours":          `closed by the server, code 4000: "ours"`,
		"/drop":                     "ECONNRESET or EOF",
		"/half":                     "unexpected EOF",
		"/raw/828101020304":         "the server does not keep to the protocol",
		"/raw/c200":                 "the server does not keep to the protocol",
		"/raw/827f8000000000000000": "the server does not keep to the protocol",
		"/text":                     "the server does not keep to the protocol",
		"/portal":                   `got HTTP status 200, want 101: "Hotel"`,
		"/away":                     "127.0.0.1:9",
	} {
		w, err := dialWebSocket(t.Context(), hc, base+path, "token")
		said := ""
		switch {
		case err != nil:
			said = err.Error()
		case path == "/echo":
			err = echoSizes(w)
			w.close(closeNormal, "")
		default:
			var b []byte
			for b, err = w.next(nil); err == nil; b, err = w.next(nil) {
				said += fmt.Sprintf("%q and %d bytes, ", b[:2], len(b)-2)
			}
			said += err.Error()
			if errors.Is(err, io.ErrUnexpectedEOF) || strings.Contains(said, "reset by peer") {
				said += ", ECONNRESET or EOF"
			}
			err = nil
		}

		if !strings.Contains(said, want) || path == "/echo" && err != nil {
			t.Errorf("%s: got %s, %v, want %s", path, said, err, want)
		}
		wantEnd := map[string]string{"/echo": "1000 0", "/parts": "1000 0", "/text": "1003 0",
			"/raw/828101020304": "1002 0", "/raw/c200": "1002 0"}[path]
		if wantEnd != "" && (!lines.Scan() || lines.Text() != path+" "+wantEnd) {
			t.Errorf("%s: the server says %q, want %s", path, lines.Text(), wantEnd)
		} else if wantEnd == "" && w != nil {
			lines.Scan()
		}
	}
	if t.Failed() {
		t.Logf("%s", &wrong)
	}
}

// echoSizes sends messages of many lengths and wants them back.
func echoSizes(w *webSocket) error {
	for _, n := range []int{0, 1, 125, 126, 127, 4096, 65535, 65536, 65537, 200 << 10} {
		text := bytes.Repeat([]byte{byte(n), 0xff, 0}, n/3+1)[:n]
		if err := w.send(frameBinary, text); err != nil {
			return err
		}
		if got, err := w.next(nil); err != nil || !bytes.Equal(got, text) {
			return fmt.Errorf("%d bytes: got %d back, %v", n, len(got), err)
		}
	}
	return nil
}
