// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Files by mender-cli both ways, and by the management API what cannot be had, with the status that says why.
func TestCLIFiles(t *testing.T) {
	onlyExhaustive(t, "starts mender-cli ten times")
	needTool(t, "mender-cli")
	dir := t.TempDir()
	b := newConnectBoard(t, "", "--files", dir)
	b.copies(t, dir, []int{0, 1, 4095, 4096, 4097, 81920, 81921, 3 << 20})
	must(t, os.Symlink("/etc/passwd", dir+"/link"))
	must(t, syscall.Mkfifo(dir+"/pipe", 0o600))
	for path, want := range map[string]int{dir + "/none": 404, dir + "/link": 400, dir + "/pipe": 400, dir: 400,
		"/etc/passwd": 403, dir + "/../../etc/passwd": 403} {
		if got := b.get(t, path); got != want {
			t.Errorf("GET %s: got HTTP status %d, want %d", path, got, want)
		}
	}
	for path, want := range map[string]int{dir + "/new": 201, dir + "/none/new": 404, dir + "/link": 403,
		dir + "/pipe": 403, "/etc/new": 403} {
		if got := b.put(t, path); got != want {
			t.Errorf("PUT %s: got HTTP status %d, want %d", path, got, want)
		}
	}
	names, err := filepath.Glob(dir + "/*")
	must(t, err)
	if len(names) != 8+3 {
		t.Errorf("left behind: %q", names)
	}
}

// copies copies files of these sizes to the device and back.
func (b *connectBoard) copies(t *testing.T, dir string, sizes []int) {
	t.Helper()
	for _, n := range sizes {
		text := make([]byte, n)
		rand.Read(text)
		here, there := filepath.Join(t.TempDir(), "here"), fmt.Sprintf("%s/f%d", dir, n)
		must(t, os.WriteFile(here, text, 0o644))
		for _, words := range [][]string{{here, b.id + ":" + there}, {b.id + ":" + there, here + ".back"}} {
			began := time.Now()
			out, err := b.cli(t.Context(), append([]string{"cp"}, words...)...).CombinedOutput()
			if err != nil {
				t.Fatalf("cp %q: %v: %s", words, err, out)
			}
			t.Logf("cp %d bytes: %s", n, time.Since(began).Round(time.Millisecond))
		}
		for _, path := range []string{there, here + ".back"} {
			if got := sha256.Sum256(readFileOrNil(path)); got != sha256.Sum256(text) {
				t.Errorf("%s: got another hash than that of the %d bytes", path, n)
			}
		}
	}
}

// ask is a request of the management API.
func (b *connectBoard) ask(t *testing.T, method, what, kind string, body io.Reader) int {
	t.Helper()
	at := b.relay.URL + strings.Replace(manage, "{id}", b.id, 1) + "/" + what
	req, err := http.NewRequestWithContext(t.Context(), method, at, body)
	must(t, err)
	req.Header.Set("Authorization", "Bearer "+userToken("user-1"))
	req.Header.Set("Content-Type", kind)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	t.Logf("%s %s: HTTP status %d, %.200q", method, what, resp.StatusCode, text)
	return resp.StatusCode
}

func (b *connectBoard) get(t *testing.T, path string) int {
	t.Helper()
	return b.ask(t, http.MethodGet, "download?path="+url.QueryEscape(path), "", nil)
}

func (b *connectBoard) put(t *testing.T, path string) int {
	t.Helper()
	var form bytes.Buffer
	w := multipart.NewWriter(&form)
	w.WriteField("path", path)
	w.WriteField("mode", "0640")
	f, err := w.CreateFormFile("file", "name")
	must(t, err)
	io.WriteString(f, "text")
	must(t, w.Close())
	return b.ask(t, http.MethodPut, "upload", w.FormDataContentType(), &form)
}

// 100 MiB by mender-cli both ways.
func TestCLILargeFile(t *testing.T) {
	onlyExhaustive(t, "100 MiB")
	needTool(t, "mender-cli")
	dir := fastDir(t)
	b := newConnectBoard(t, "", "--files", dir)
	b.copies(t, dir, []int{100 << 20})
	t.Logf("%d KiB resident at most", highWater(b.cmd.Process.Pid)>>10)
}
