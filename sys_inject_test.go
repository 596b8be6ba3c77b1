// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// injected are the system calls that fail on the files of the environment, the journal and the lock, and
// how.
var injected = []struct{ call, errno string }{
	{"openat", "EMFILE"}, {"openat", "EIO"}, {"pread64", "EIO"}, {"pwrite64", "EIO"}, {"pwrite64", "ENOSPC"},
	{"fdatasync", "EIO"}, {"fsync", "EIO"}, {"flock", "ENOLCK"}, {"flock", "EINTR"}, {"fstat", "EIO"},
}

// Each system call on environment, journal and lock fails once, in install, commit and rollback. What the
// program says it has done is done; the slot that boots next is a good one; the device can go on; and
// inconsistent is called only what something was written to.
func TestErrorAtSystemCalls(t *testing.T) {
	t.Parallel()
	needTool(t, "strace")
	b := newImageBoard(t)
	probe := exec.Command("strace", "-o", "/dev/null", "-e", "inject=fsync:error=EIO", "true")
	if out, err := probe.CombinedOutput(); err != nil {
		t.Skipf("needs to trace: %v: %s", err, out)
	}
	img := testBlocks(900000)
	e := &injection{imageBoard: b, t: t, art: b.pack(t, "release-2", img), img: img, old: oldImage()}
	e.keep()
	runs := e.all("install")
	e.reset("A")
	b.must(t, exitOK, "install", e.art)
	b.running = "B" // by a bootloader that did not save anything: the other copy is from before the install
	e.keep()
	runs += e.all("commit") + e.all("rollback")
	t.Logf("%d runs with an error", runs)
	if runs < 50 && exhaustive() {
		t.Errorf("%d runs with an error: the calls are not found", runs)
	}
}

// injection is a board that is put back to how it was before each run.
type injection struct {
	*imageBoard
	t        *testing.T
	art      string
	img, old []byte
	start    map[string][]byte
	runs     string // the slot that runs at the start
}

var injectionFiles = []string{"env", "ds/mendlet.state", "p3"}

func (e *injection) keep() {
	e.start, e.runs = map[string][]byte{}, e.running
	for _, name := range injectionFiles {
		e.start[name] = readFileOrNil(filepath.Join(e.dir, name))
	}
}

func (e *injection) reset(running string) {
	e.running = running
	for name, text := range e.start {
		path := filepath.Join(e.dir, name)
		if text == nil {
			os.Remove(path)
		} else if err := os.WriteFile(path, text, 0o600); err != nil {
			e.t.Fatal(err)
		}
	}
}

// all makes every call fail in turn. It returns how many did.
func (e *injection) all(verb string) (runs int) {
	for _, file := range []string{"env", "mendlet.state", "lock"} {
		for i, c := range injected {
			if !exhaustive() && (verb == "install" || file == "mendlet.state" || i%4 != 0) {
				continue
			}
			for n := 1; n <= 40; n++ {
				e.reset(e.runs)
				if !e.once(verb, file, c.call, c.errno, n) {
					break
				}
				runs++
			}
		}
	}
	return runs
}

// once runs the verb with the nth call on a file failing. It reports whether there was one.
func (e *injection) once(verb, file, call, errno string, n int) bool {
	words := []string{verb}
	if verb == "install" {
		words = append(words, e.art)
	}
	log := filepath.Join(e.dir, "strace")
	os.Remove(log)
	cmd := e.process(e.t, words...)
	paths := []string{"-P", filepath.Join(e.dir, file)}
	if file == "mendlet.state" {
		paths = []string{"-P", filepath.Join(e.dir, "ds", file), "-P", file}
	}
	trace := append([]string{"strace", "-f", "-qq", "-o", log, "-e", "trace=" + call, "-e", "signal=none",
		"-e", fmt.Sprintf("inject=%s:error=%s:when=%d", call, errno, n)}, paths...)
	cmd.Path, cmd.Args = "", append(trace, cmd.Args...)
	var err error
	if cmd.Path, err = exec.LookPath("strace"); err != nil {
		e.t.Fatal(err)
	}
	cmd.Env = append(cmd.Env, "GOMAXPROCS=1")
	out, err := cmd.CombinedOutput()
	code := exitStatus(err)
	if !bytes.Contains(readFileOrNil(log), []byte("(INJECTED)")) {
		return false
	}
	what := fmt.Sprintf("%s, %s of %s fails with %s, number %d: exit %d\n%s", verb, call, file, errno, n, code, out)
	e.judge(what, verb, code, call == "pwrite64" || strings.HasSuffix(call, "sync"))
	return true
}

// judge looks at what a run has left, and lets it go on.
func (e *injection) judge(what, verb string, code int, wrote bool) {
	e.t.Helper()
	done := map[string]string{"install": "3 1", "commit": "3 0", "rollback": "2 0"}[verb]
	before := map[string]string{"install": "2 0", "commit": "3 1", "rollback": "3 1"}[verb]
	vars := e.env(e.t)
	now := vars[varBootPart] + " " + vars[varUpgrade]
	switch {
	case code == exitOK && now != done:
		e.t.Errorf("%s: it is %q, want %q", what, now, done)
	case now != done && now != before && now != "2 0":
		e.t.Errorf("%s: it is %q", what, now)
	case vars[varBootPart] == "3":
		e.slotHolds(e.t, e.b, e.img)
	}
	rec, err := peekJournal(filepath.Join(e.dir, "ds"), nil)
	if err != nil {
		e.t.Errorf("%s: %v", what, err)
		return
	}
	if rec.Last != nil && rec.Last.Result == "inconsistent" && !wrote {
		e.t.Errorf("%s: inconsistent, and nothing had been written", what)
	}
	// The error has passed: what was begun is ended, one way or the other.
	for range 3 {
		if rec, err = peekJournal(filepath.Join(e.dir, "ds"), nil); err != nil || rec.Update == nil {
			break
		}
		e.do(e.t, "", "resume")
		if verb == "install" {
			e.reboot(e.t)
		}
		e.do(e.t, "", "commit")
	}
	vars = e.env(e.t)
	lied := rec.Last != nil && (rec.Last.Result == "committed") != (vars[varBootPart] == "3")
	if rec.Update != nil || vars[varUpgrade] != "0" || lied {
		e.t.Errorf("%s: and then it is %v, %+v, %+v", what, vars, rec.Update, rec.Last)
	}
}
