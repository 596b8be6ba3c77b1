// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The program as a process on image files, interrupted with real artifacts.

// resumeImage is 28 MiB that shrink well and evenly.
func resumeImage() []byte {
	b := make([]byte, 28<<20)
	r := rand.New(rand.NewSource(4))
	for off := 0; off < len(b); off += 1 << 20 {
		r.Read(b[off : off+100<<10])
		copy(b[off+500<<10:], "words words words")
	}
	return b
}

// realArtifact is an artifact of a kind that is in the field.
type realArtifact struct {
	name    string
	restart bool // it can be entered in the middle
	body    []byte
}

func realArtifacts(t *testing.T, image []byte) (list []realArtifact) {
	img := writeTemp(t, "root.img", image)
	for _, kind := range []string{"none", "gzip", "xz"} {
		list = append(list, realArtifact{"pack " + kind, true,
			packed(t, "-n", "new", "-c", "sim", "-f", img, "--compression", kind)})
	}
	if _, err := exec.LookPath("mender-artifact"); err == nil {
		for _, kind := range []string{"none", "gzip", "lzma"} {
			made := filepath.Join(t.TempDir(), "made.mender")
			if out, err := exec.Command("mender-artifact", "--compression", kind, "write", "rootfs-image", "-n", "new", "-t",
				"sim", "-f", img, "-o", made).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			list = append(list, realArtifact{"mender-artifact " + kind, kind != "lzma", readFileOrNil(made)})
		}
	}
	for _, program := range []struct{ name, suffix, args string }{{"gzip", ".gz", "-9"}, {"zstd", ".zst", "-3"}} {
		if _, err := exec.LookPath(program.name); err != nil {
			continue
		}
		k := newKit("rootfs-image", tarMember{name: "root.img", body: image})
		k.header[0].body = []byte(`{"payloads":[{"type":"rootfs-image"}],` +
			`"artifact_provides":{"artifact_name":"new"},"artifact_depends":{"device_type":["sim"]}}`)
		k.data = func(tar []byte) (string, []byte) {
			return "data/0000.tar" + program.suffix, piped(t, tar, program.name, program.args)
		}
		list = append(list, realArtifact{"one member of " + program.name, program.name == "gzip", k.build(t)})
		if program.name != "zstd" {
			continue
		}
		k.data = func(tar []byte) (string, []byte) {
			var frames []byte
			for part := range slices.Chunk(tar, 1<<20) {
				frames = append(frames, piped(t, part, "zstd", "-1")...)
			}
			return "data/0000.tar.zst", frames
		}
		list = append(list, realArtifact{"frames of zstd", true, k.build(t)})
	}
	return list
}

// reached is true when a checkpoint at byte at or behind it is in the journal or, where there
// can be none, when the image has begun to come in.
func (a realArtifact) reached(at int64) func(*update) bool {
	return func(u *update) bool {
		if !a.restart {
			return u.Type != "" && u.Tries > 0
		}
		return u.Checkpoint != nil && u.Checkpoint.Offset >= at
	}
}

// saysHowItWentOn checks the log line of a run that goes on.
func saysHowItWentOn(t *testing.T, a realArtifact, said string) {
	t.Helper()
	want := "going on at"
	if !a.restart {
		want = "read again from its start"
	}
	if !strings.Contains(said, want) {
		t.Errorf("got no %q", want)
	}
}

func TestInterruptedInstalls(t *testing.T) {
	if testing.Short() {
		t.Skip("short: installs 28 MiB many times")
	}
	t.Parallel()
	image := resumeImage()
	for _, a := range realArtifacts(t, image) {
		if !exhaustive() && (strings.HasSuffix(a.name, "none") || !a.restart ||
			strings.HasPrefix(a.name, "mender-artifact")) {
			continue // the simplest, those that start over, and what is as what pack makes
		}
		if exhaustive() || a.name == "pack gzip" {
			t.Run(a.name+"/file", func(t *testing.T) { a.interruptFile(t, image) }) // takes five times the image in memory
		}
		t.Run(a.name+"/url", func(t *testing.T) { t.Parallel(); a.interruptURL(t, image) })
		if strings.HasPrefix(a.name, "mender-artifact") && a.restart {
			continue // as what pack makes
		}
		if !exhaustive() && a.name != "pack xz" {
			continue // what is decoded is gone on with the same way
		}
		t.Run(a.name+"/run", func(t *testing.T) { t.Parallel(); a.interruptRun(t, image) })
	}
}

// interruptFile: a power cut, then SIGTERM, at exact places; and at last SIGKILL for a real
// process at any place, which for a local file is hard to choose.
func (a realArtifact) interruptFile(t *testing.T, image []byte) {
	s := &simSetup{dir: simLayout(t), images: map[string][]byte{"old": simImage(1, 20000), "new": image}}
	path := writeTemp(t, "a.mender", a.body)
	d := newSimDevice(t, s.dir, s.images)
	var said bytes.Buffer
	d.arm = func(app *app) {
		app.o.write = defaultWriteOptions()
		app.o.write.keepPause = 0
		app.lg = &logger{level: levelInfo, sinks: []logSink{writerSink(&said)}}
	}
	at := func(offset int64, writes int, do func()) {
		n := 0
		d.w.fault = func(op int, f *simFile, sync bool) error {
			if f.name == "p3" && !sync {
				n++
			}
			rec, err := d.peek()
			if u := rec.Update; err == nil && u != nil && (!a.restart && n == writes ||
				u.Checkpoint != nil && u.Checkpoint.Offset >= offset) {
				do()
			}
			return nil
		}
	}
	if err := d.boot(); err != nil {
		t.Fatal(err)
	}
	at(8<<20, 10, func() { panic(powerCut{}) })
	if !d.powered(func() { standalone{d.start()}.install(t.Context(), path) }) {
		t.Fatal("the install was not cut")
	}
	d.w.lose("lose", 0, rand.New(rand.NewSource(1)))
	if rec, _ := d.peek(); rec.Update.Tries != 1 {
		t.Errorf("the journal says %d tries, want 1", rec.Update.Tries)
	}
	ctx, stop := context.WithCancel(t.Context())
	at(16<<20, 12, stop)
	if err := (standalone{d.start()}).resume(ctx); exitCode(err) != exitTempFail {
		t.Errorf("interrupted: got %v, want exit code %d", err, exitTempFail)
	}
	d.w.fault = nil
	if rec, _ := d.peek(); a.restart == (rec.Update.Checkpoint == nil) || !a.restart && rec.Update.Tries != 2 {
		t.Errorf("the journal says %+v", rec.Update)
	}
	if rec, _ := d.peek(); a.restart {
		step := int64(packFlush)
		if strings.HasPrefix(a.name, "one member") || strings.HasSuffix(a.name, "xz") {
			step = packBlock // gzip's blocks have a fixed number of symbols, and much goes into one where all is zeros
		}
		if c := rec.Update.Checkpoint; c.Offset-c.From.Out > step {
			t.Errorf("the checkpoint at %d is entered at %d, want %d bytes before at most", c.Offset, c.From.Out, step)
		}
	}
	said.Reset()
	if err := (standalone{d.start()}).install(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	saysHowItWentOn(t, a, said.String())
	if d.slotImage("3") != "new" {
		t.Error("slot B does not hold the image")
	}
	b := newBoard(t, 30<<20, "")
	args := []string{"--running", "A", "install", path}
	b.start(args...).once(syscall.SIGKILL, func(u *update) bool { return u.Type != "" })
	if u := b.peek().Update; u != nil && u.Step != stepCommitWait {
		if u.Step != stepDownload { // it was quick: an install in this step is refused as another one
			args = []string{"--running", "A", "resume"}
		}
		if exit, _ := b.mendlet(args...); exit != exitOK {
			t.Errorf("after SIGKILL: exit code %d", exit)
		}
	}
	b.holds(image)
}

func (a realArtifact) interruptURL(t *testing.T, image []byte) {
	g := &gate{body: a.body, etag: `"one"`}
	server := httptest.NewServer(http.HandlerFunc(g.serve))
	defer server.Close()
	b := newBoard(t, 30<<20, "")
	url := server.URL + "/a.mender?signature=1"
	args := []string{"--running", "A", "install", url}
	part := func(percent int64) int64 { return int64(len(a.body)) * percent / 100 }

	g.set(part(45), "hang")
	if p := b.start(args...); !p.once(syscall.SIGTERM, a.reached(8<<20)) || p.ProcessState.ExitCode() != exitTempFail {
		t.Fatalf("SIGTERM: exit code %d, want %d\n%s", p.ProcessState.ExitCode(), exitTempFail, &p.out)
	}
	b.interrupted(a, 8<<20)
	g.set(part(75), "hang")
	if p := b.start("--running", "A", "resume"); !p.once(syscall.SIGKILL,
		func(u *update) bool { return a.reached(16<<20)(u) && u.Tries > 0 }) {
		t.Fatalf("ended by itself\n%s", &p.out)
	}
	b.interrupted(a, 16<<20)
	g.set(part(97), "drop")
	g.late = a.restart
	if exit, _ := b.mendlet(args...); exit != exitTempFail {
		t.Fatalf("source error: exit code %d, want %d", exit, exitTempFail)
	}
	b.interrupted(a, 24<<20)
	g.set(0, "")
	exit, said := b.mendlet(append(args, "--progress", "json")...)
	if exit != exitOK {
		t.Fatalf("exit code %d", exit)
	}
	saysHowItWentOn(t, a, said)
	b.holds(image)
	last, sent := g.resumed()
	t.Logf("3 interruptions: %d bytes sent for an artifact of %d", sent, len(a.body))
	if a.restart != (last > part(50)) {
		t.Errorf("the last request began at byte %d of %d", last, len(a.body))
	}
	if u := "signature"; bytes.Contains(readFileOrNil(filepath.Join(b.dir, journalName)),
		[]byte(`"name":"`+server.URL+"/a.mender?"+u)) {
		t.Error("the checkpoint holds the signature of the URL")
	}
}

// interruptRun: the same for a deployment.
func (a realArtifact) interruptRun(t *testing.T, image []byte) {
	s := newTestServer(t, false)
	s.autoAccept = true
	g := &gate{body: a.body, etag: `"one"`}
	s.setFault(func(route string, w http.ResponseWriter, r *http.Request) bool {
		if route == "GET artifact" {
			g.serve(w, r)
		}
		return route == "GET artifact"
	})
	dep := s.deploy("deployment-1", "new", []string{"sim"}, a.body)
	b := newBoard(t, 30<<20, `, "ServerURL": "`+s.URL+`"`)
	putScript(t, b.dir, "id", "#!/bin/sh\necho mac=02:00:00:00:00:01\n", 0o755)
	run := []string{"--running", "A", "run", "--no-reboot"}
	g.set(int64(len(a.body))*45/100, "hang")
	if p := b.start(run...); !p.once(syscall.SIGKILL, a.reached(8<<20)) {
		t.Fatalf("ended by itself\n%s", &p.out)
	}
	b.interrupted(a, 8<<20)
	g.set(int64(len(a.body))*75/100, "hang")
	if exit, said := b.mendlet(append(run, "--deadline", "2s")...); exit != exitTempFail ||
		!strings.Contains(said, "deadline") {
		t.Fatalf("deadline: exit code %d, want %d", exit, exitTempFail)
	}
	b.interrupted(a, 16<<20)
	b.journal(func(r *record) { r.Net.NextTry = time.Time{} })
	g.set(0, "")
	exit, said := b.mendlet(run...)
	if exit != exitReboot {
		t.Fatalf("exit code %d, want %d", exit, exitReboot)
	}
	saysHowItWentOn(t, a, said)
	b.holds(image)
	b.journal(func(r *record) { r.Update.BootID = "of the boot before" })
	if exit, _ := b.mendlet("--running", "B", "run", "--no-reboot"); exit != exitOK {
		t.Errorf("after the reboot: exit code %d", exit)
	}
	if statuses, final, _ := s.history(dep); final != "success" {
		t.Errorf("the server heard %v", statuses)
	}
	if last, _ := g.resumed(); a.restart != (last > int64(len(a.body)/2)) {
		t.Errorf("the last request began at byte %d of %d", last, len(a.body))
	}
}

// journal changes the record.
// What the slot holds already is not downloaded: here the server would never get beyond the first MiB.
func TestHeldImageIsNotDownloaded(t *testing.T) {
	t.Parallel()
	image := resumeImage()
	g := &gate{body: packed(t, "-n", "new", "-c", "sim", "--compression", "none", "-f",
		writeTemp(t, "root.img", image)), etag: `"one"`}
	server := httptest.NewServer(http.HandlerFunc(g.serve))
	defer server.Close()
	b := newBoard(t, 30<<20, "")
	for _, again := range []bool{false, true} {
		exit, said := b.mendlet("--running", "A", "install", server.URL+"/a.mender")
		if exit != exitOK || again != strings.Contains(said, "of which 0 written") {
			t.Fatalf("again=%v: exit code %d", again, exit)
		}
		b.holds(image)
		if exit, _ := b.mendlet("--running", "A", "rollback"); exit != exitOK {
			t.Fatalf("rollback: exit code %d", exit)
		}
		g.set(1<<20, "hang")
	}
}

// Field case 12: between two runs something else comes to stand behind the same URL.
func TestChangedBehindTheURL(t *testing.T) {
	t.Parallel()
	image := resumeImage()[:20<<20]
	other := slices.Clone(image)
	other[15<<20]++
	img := writeTemp(t, "root.img", image)
	made := func(file string, more ...string) []byte {
		return packed(t, append([]string{"-n", "new", "-c", "sim", "--compression", "none", "-f", file}, more...)...)
	}
	body, changed := made(img), made(writeTemp(t, "root.img", other))
	if len(body) != len(changed) {
		t.Fatal("the two artifacts are to have the same size")
	}
	for _, c := range []struct {
		name, etag string
		body       []byte
		image      []byte
	}{
		{"other bytes, same size and tag", `"one"`, changed, other},
		{"other bytes, other tag", `"two"`, changed, other},
		{"other size", `"two"`, made(img, "-p", "more:than before, so that its size is another one"+
			strings.Repeat("x", 2000)), image},
		{"same bytes, other tag", `"two"`, body, image},
		{"payload changed, same manifest", `"one"`, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := &gate{body: body, etag: `"one"`, stop: 12 << 20, how: "hang"}
			server := httptest.NewServer(http.HandlerFunc(g.serve))
			defer server.Close()
			b := newBoard(t, 30<<20, "")
			args := []string{"--running", "A", "install", server.URL + "/a.mender"}
			if p := b.start(args...); !p.once(syscall.SIGKILL, func(u *update) bool { return u.Checkpoint != nil }) {
				t.Fatalf("ended by itself\n%s", &p.out)
			}
			now := c.body
			if now == nil { // only the bytes behind the checkpoint
				now = slices.Clone(body)
				now[len(body)-4<<20]++
			}
			g.set(0, "")
			g.replace(now, c.etag)
			exit, _ := b.mendlet(args...)
			if c.body == nil {
				if exit != exitFailed || b.peek().Update != nil {
					t.Errorf("exit code %d, want %d and nothing in progress", exit, exitFailed)
				}
				if vars, _ := readSimEnv(readFileOrNil(filepath.Join(b.dir, "env"))); vars["upgrade_available"] == "1" {
					t.Error("the boot environment was changed")
				}
				return
			}
			if exit != exitOK {
				t.Fatalf("exit code %d", exit)
			}
			b.holds(c.image)
			if last, _ := g.resumed(); bytes.Equal(c.body, body) && last < 8<<20 {
				t.Errorf("the last request began at byte %d, want one where it was: it is the same file under another tag", last)
			}
		})
	}
}

// Progress begins where the install goes on, and status says how much is left.
func TestResumedProgress(t *testing.T) {
	t.Parallel()
	image := resumeImage()[:20<<20]
	body := packed(t, "-n", "new", "-c", "sim", "--compression", "none", "-f", writeTemp(t, "root.img", image))
	g := &gate{body: body, etag: `"one"`, stop: 12 << 20, how: "hang"}
	server := httptest.NewServer(http.HandlerFunc(g.serve))
	defer server.Close()
	b := newBoard(t, 30<<20, "")
	args := []string{"--running", "A", "install", server.URL + "/a.mender"}
	if p := b.start(args...); !p.once(syscall.SIGTERM, func(u *update) bool { return u.Checkpoint != nil }) {
		t.Fatalf("ended by itself\n%s", &p.out)
	}
	done := b.peek().Update.Checkpoint.Offset
	_, status := b.mendlet("status", "--json")
	for _, want := range []string{fmt.Sprintf(`"bytes_done": %d`, done),
		fmt.Sprintf(`"bytes_left": %d`, int64(len(image))-done)} {
		if !strings.Contains(status, want) {
			t.Errorf("status: no %s", want)
		}
	}
	g.set(0, "")
	_, said := b.mendlet(append(args, "--progress", "lines")...)
	var first int64
	_, text, _ := strings.Cut(said, fmt.Sprintf("going on at %s of %s\nmendlet: ", mega(done), mega(int64(len(image)))))
	if fmt.Sscanf(text, "write: %d %%,", &first); first < done*100/int64(len(image)) {
		t.Errorf("progress begins at %d %%, want %d %% or more", first, done*100/int64(len(image)))
	}
	b.holds(image)
}

// What answers in the artifact's place is no verdict on it: a page of a portal is for later, a server
// that is not trusted for a person. Nothing is begun.
func TestInstallFromSomebodyElse(t *testing.T) {
	t.Parallel()
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "<!DOCTYPE html><title>Welcome to the hotel</title>")
	}))
	defer page.Close()
	stranger := tlsServer(t, newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)), &tls.Config{})
	b := newBoard(t, 1<<20, "")
	for _, c := range []struct {
		url  string
		exit int
		says []string
	}{
		{page.URL + "/a.mender", exitTempFail, []string{"Welcome to the hotel", "hint: a portal", "System not modified."}},
		{stranger.URL + "/a.mender", exitFailed,
			[]string{"hint: the certificate was issued by", "ServerCertificate", "System not modified."}},
	} {
		exit, said := b.mendlet("--running", "A", "install", c.url)
		if exit != c.exit || b.peek().Update != nil {
			t.Errorf("%s: exit code %d, update %+v", c.url, exit, b.peek().Update)
		}
		for _, want := range c.says {
			if !strings.Contains(said, want) {
				t.Errorf("%s: said nothing of %q", c.url, want)
			}
		}
	}
}
