// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect && !nodbus && !386

package main

// Not on 386, whose getsockopt(2) package syscall has only within socketcall(2).

import (
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
	name string
	r    *relay
	pid  int

	memory   int64     // bytes resident when idle (Pss of smaps_rollup)
	cpu      int64     // ns of the idle time
	bytes    int64     // of both directions, in TCP's payload, in the idle time
	get, put []float64 // MB/s
	work     int64     // ns of the processors for all of that
}

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
	settle := time.Now().Add(5 * time.Second) // what a start takes is no idle time
	for time.Now().Before(settle) {
		time.Sleep(time.Second)
	}
	for _, c := range both {
		c.cpu, c.bytes = -cpuTime(t, c.pid), -c.carried(t)
	}
	time.Sleep(time.Duration(idle) * time.Second)
	for _, c := range both {
		c.cpu, c.bytes = c.cpu+cpuTime(t, c.pid), c.bytes+c.carried(t)
		c.memory = pss(t, c.pid)
	}
	dir := fastDir(t)
	must(t, os.Chmod(dir, 0o755))
	text := make([]byte, 64<<20)
	rand.New(rand.NewSource(1)).Read(text)
	must(t, os.WriteFile(dir+"/file", text, 0o644))
	for range 5 { // in turns
		for _, c := range both {
			c.transfers(t, dir, text)
		}
	}
	hour := 3600 / float64(idle)
	fmt.Printf("| | mendlet | mender-connect | ratio |\n|---|---|---|---|\n")
	row := func(what, form string, a, b float64) {
		fmt.Printf("| %s | "+form+" | "+form+" | %.2f |\n", what, a, b, a/b)
	}
	row("download, MB/s", "%.1f", median(us.get), median(them.get))
	row("upload, MB/s", "%.1f", median(us.put), median(them.put))
	row("processor time for 64 MiB each way, ms", "%.0f", float64(us.work)/5e6, float64(them.work)/5e6)
	row("memory when idle, KiB", "%.0f", float64(us.memory)/1024, float64(them.memory)/1024)
	row("processor time of an idle hour, ms", "%.0f", float64(us.cpu)/1e6*hour, float64(them.cpu)/1e6*hour)
	row("bytes of an idle hour", "%.0f", float64(us.bytes)*hour, float64(them.bytes)*hour)
}

func startContender(t *testing.T) *contender {
	b := newVerbBoard(t)
	r := newRelay(t)
	b.server = r.testServer
	b.setup()
	cmd := exec.Command(builtProgram(t), "-b", b.dir+"/none", "connect", "--terminal", "--files", "/", "--forward",
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

// pss is what a process has of the memory, shared pages in parts.
func pss(t *testing.T, pid int) int64 {
	for line := range strings.Lines(look(fmt.Sprintf("/proc/%d/smaps_rollup", pid))) {
		if kb, ok := strings.CutPrefix(line, "Pss:"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(kb), " kB"), 10, 64)
			must(t, err)
			return n << 10
		}
	}
	t.Fatal("smaps_rollup has no Pss")
	return 0
}

// transfers gets and puts the file once.
func (c *contender) transfers(t *testing.T, dir string, text []byte) {
	base := c.r.URL + strings.Replace(manage, "{id}", c.r.device(), 1)
	there := filepath.Join(dir, c.name)
	os.Remove(there)
	c.work -= cpuTime(t, c.pid)
	defer func() { c.work += cpuTime(t, c.pid) }()
	began := time.Now()
	got := c.request(t, http.MethodGet, base+"/download?path="+url.QueryEscape(dir+"/file"), "", nil, 200)
	c.get = append(c.get, float64(len(text))/1e6/time.Since(began).Seconds())
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
	began = time.Now()
	c.request(t, http.MethodPut, base+"/upload", w.FormDataContentType(), &form, 201)
	c.put = append(c.put, float64(len(text))/1e6/time.Since(began).Seconds())
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
