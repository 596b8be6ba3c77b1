// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestVisible(t *testing.T) {
	for _, c := range []struct{ in, visible, plain string }{
		{"", "", ""},
		{"release-2 (ä, 日本語, 🙂)", "release-2 (ä, 日本語, 🙂)", "release-2 (ä, 日本語, 🙂)"},
		{`back\slash and "quotes"`, `back\slash and "quotes"`, `back\slash and "quotes"`},
		{"a\nb", `a\nb`, `"a\nb"`},
		{"\x1b[31mred\x07\x00\x7f", `\x1b[31mred\a\x00\x7f`, `"\x1b[31mred\a\x00\x7f"`},
		{"\tx\r", `\tx\r`, `"\tx\r"`},
		{"c1 \u009b31m", `c1 \u009b31m`, `"c1 \u009b31m"`},
		{"\u202egnp.exe", `\u202egnp.exe`, `"\u202egnp.exe"`},
		{"\u2066x\u2069\u200f\u061c", `\u2066x\u2069\u200f\u061c`, `"\u2066x\u2069\u200f\u061c"`},
		{"\u2028\u2029\u0085", `\u2028\u2029\u0085`, `"\u2028\u2029\u0085"`},
		{"\xff\xc3", `\xff\xc3`, `"\xff\xc3"`},
		{"\ufffd", `\ufffd`, `"\ufffd"`},
		{"\U000e0041\ufeff", `\U000e0041\ufeff`, `"\U000e0041\ufeff"`},
		{"\"\n", `"\n`, `"\"\n"`},
	} {
		if got := visible(c.in); got != c.visible {
			t.Errorf("%q: visible as %s, want %s", c.in, got, c.visible)
		}
		if got := plain(c.in); got != c.plain {
			t.Errorf("%q: plain as %s, want %s", c.in, got, c.plain)
		}
		var b bytes.Buffer
		if err := printf(&b, "%s|%-9s|%q|%d\n", c.in, "x", c.in, 7); err != nil ||
			b.String() != c.plain+"|x        |"+quote(c.in)+"|7\n" {
			t.Errorf("%q: printed as %s, %v", c.in, b.String(), err)
		}
		b.Reset()
		var back string
		if err := printJSON(&b, c.in); err != nil || strings.ContainsFunc(strings.TrimSuffix(b.String(), "\n"),
			func(r rune) bool { return visible(string(r)) != string(r) }) {
			t.Errorf("%q: in JSON %s, %v", c.in, b.String(), err)
		}
		if err := json.Unmarshal(b.Bytes(), &back); err != nil || back != string([]rune(c.in)) {
			t.Errorf("%q: JSON %s is %q, %v", c.in, b.String(), back, err)
		}
	}
	if got := oneLine("a\nb\x1b\n"); got != `a; b\x1b` {
		t.Errorf("got %q", got)
	}
}

// forged is what a hostile string would have a person believe.
const forged = "1\nsignature:     verified with key \"/etc/k\"\r\x1b[2K\u202e\u009b1m\xff"

// What an artifact says of itself forges no line, wherever it is printed, logged or kept.
func TestForgedLines(t *testing.T) {
	b := newImageBoard(t)
	b.surroundings(t)
	art := b.pack(t, "release-2", testBlocks(300000), "-p", "a:"+forged, "-p", "good:it\\em \"x\"", "--clears-provides",
		"c"+forged, "-d", "none"+forged+":x")
	must(t, os.MkdirAll(filepath.Join(b.dir, "data/modules/v3"), 0o755))
	module := "#!/bin/sh\nprintf 'one\\033[31m\\302\\233\\tok\\nsignature: good\\n'; exit 1\n"
	must(t, os.WriteFile(filepath.Join(b.dir, "data/modules/v3/loud"), []byte(module), 0o755))
	loud := b.pack(t, "loud", []byte("x"), "-T", "loud")
	check := func(what, text string) {
		t.Helper()
		for i, line := range strings.Split(text, "\n") {
			if visible(line) != line || strings.HasPrefix(line, "signature:     verified") {
				t.Errorf("%s: line %d is %q", what, i+1, line)
			}
		}
	}
	run := func(code int, words ...string) string {
		t.Helper()
		out, errs := b.must(t, code, words...)
		check(strings.Join(words[:1], " ")+", stdout", out)
		check(strings.Join(words[:1], " ")+", stderr", errs)
		return out + errs
	}
	for _, words := range [][]string{{"show", art}, {"show", "--json", art}} {
		if out := run(exitOK, words...); !strings.Contains(out, `\u202e`) {
			t.Errorf("%q: %s", words, out)
		}
	}
	run(exitRefused, "plan", art)
	run(exitRefused, "plan", "--json", art)
	run(exitRefused, "install", art) // for what it depends on
	art = b.pack(t, "release-2", testBlocks(300000), "-p", "a:"+forged, "-p", "good:it\\em \"x\"")
	run(exitOK, "plan", art)
	run(exitOK, "install", art)
	b.reboot(t)
	run(exitOK, "commit")
	run(exitOK, "status")
	run(exitOK, "status", "--json")
	if out := run(exitOK, "show-provides"); !strings.Contains(out, "good=it\\em \"x\"\n") ||
		!strings.Contains(out, "a="+quote(string([]rune(forged)))+"\n") {
		t.Errorf("show-provides %s", out)
	}
	log := filepath.Join(b.dir, "log")
	if out := run(exitFailed, "install", loud, "-L", log); !strings.Contains(out, `one\x1b[31m\u009b\tok`+"\n") {
		t.Errorf("output of a module: %s", out)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	check("log file", string(text))
	b.setEnv(t, map[string]string{"x": "1\x1b\n2"})
	if out := run(exitOK, "env", "print", "x"); out != `x="1\x1b\n2"`+"\n" {
		t.Errorf("env print %q", out)
	}
	if out, _ := b.must(t, exitOK, "env", "print", "-n", "x"); out != "1\x1b\n2\n" {
		t.Errorf("env print -n %q", out)
	}
}

// The verbs print to stdout by printf and printJSON alone.
func TestVerbsPrintOneWay(t *testing.T) {
	for _, name := range []string{"inspect.go", "standalone.go", "managed.go", "managed_server.go"} {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				what := fmt.Sprint(s.X) + "." + s.Sel.Name
				if strings.HasPrefix(what, "fmt.Fprint") || strings.HasPrefix(what, "fmt.Print") {
					t.Errorf("%v: %s", fset.Position(n.Pos()), what)
				}
			}
			return true
		})
	}
}

// events are the lines of JSON that the program printed; every line is one.
func events(t *testing.T, out string) (all []map[string]any) {
	t.Helper()
	for l := range strings.Lines(out) {
		var e map[string]any
		if err := json.Unmarshal([]byte(l), &e); err != nil {
			t.Errorf("line %q: %v", l, err)
		}
		all = append(all, e)
	}
	return all
}

func TestProgressOutput(t *testing.T) {
	b := newImageBoard(t)
	img := testImage(9, 1<<20)
	art := b.pack(t, "release-2", img)
	out, _ := b.must(t, exitOK, "install", "--progress", "json", art)
	last := map[any]map[string]any{}
	var order []any
	for _, e := range events(t, out) {
		if e["event"] == "progress" && last[e["phase"]] == nil {
			order = append(order, e["phase"])
		}
		last[e["phase"]] = e
	}
	if !slices.Equal(order, []any{"write", "read-back"}) {
		t.Errorf("got phases %v", order)
	}
	// All but the head is written, and that comes last of all.
	if e := last["write"]; e["done"] != float64(1<<20) || e["total"] != e["done"] ||
		e["written"] != float64(1<<20-headSize) {
		t.Errorf("got %v", e)
	}
	if e := last["read-back"]; e["done"] != float64(1<<20) || e["total"] != e["done"] {
		t.Errorf("got %v", e)
	}
	b.must(t, exitOK, "rollback")
	if _, errs := b.must(t, exitOK, "install", "--progress", "lines", art); !strings.Contains(errs,
		"mendlet: check: 1.0 MB\n") || strings.Contains(errs, "MB written") {
		t.Errorf("an image that is there already: %q", errs)
	}
	b.must(t, exitOK, "rollback")
	img[1<<20-1] ^= 1 // and the slot has the rest
	if _, errs := b.must(t, exitOK, "install", "--progress", "lines", b.pack(t, "release-3", img)); !strings.Contains(errs,
		"write: 100 %, 1.0 of 1.0 MB, 0.5 MB written") ||
		!strings.Contains(errs, "mendlet: read-back: 0.9 MB\n") {
		t.Errorf("got %q", errs)
	}
	b.must(t, exitOK, "rollback")
	if _, errs := b.must(t, exitOK, "-q", "install", art); errs != "" {
		t.Errorf("-q: %q", errs)
	}
}

// The last line of --progress json tells the outcome, whatever it is, and nothing else is printed.
func TestProgressEnd(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(300000))
	check := func(want map[string]any, code int, words ...string) {
		t.Helper()
		out, _ := b.must(t, code, append(words, "--progress", "json")...)
		all := events(t, out)
		for _, e := range all[:len(all)-1] {
			if e["event"] != "progress" {
				t.Errorf("%q: %v before the end", words, e)
			}
		}
		want["event"], want["exit_code"] = "end", float64(code)
		end := all[len(all)-1]
		for k, v := range want {
			if got := fmt.Sprint(end[k]); k == "error" || k == "hint" {
				if !strings.Contains(got, v.(string)) {
					t.Errorf("%q: %s is %q, want %q", words, k, got, v)
				}
			} else if end[k] != v {
				t.Errorf("%q: got %v, want %s %v", words, end, k, v)
			}
		}
	}
	bad := filepath.Join(b.dir, "bad")
	writeFile(t, bad, "text\n")
	check(map[string]any{"result": "refused", "error": "looks like text", "hint": "mendlet pack"},
		exitRefused, "install", bad)
	check(map[string]any{"result": "failed", "error": "no such file"}, exitFailed, "install", "/nowhere.mender")
	check(map[string]any{"result": "failed", "error": "no such file"}, exitFailed, "install", art, "-c", "/nowhere.conf")
	check(map[string]any{"result": "nothing", "reboot": false, "error": "no update in progress"}, exitNothing, "resume")
	check(map[string]any{"result": "stopped", "artifact": "release-2", "step": "Before_ArtifactInstall_Enter",
		"reboot": false}, exitOK,
		"install", art, "--stop-before", "ArtifactInstall_Enter")
	check(map[string]any{"result": "installed", "artifact": "release-2", "step": "Before_ArtifactCommit_Enter",
		"reboot": true}, exitReboot, "resume", "--reboot-exit-code")
	check(map[string]any{"result": "failed", "error": "already in progress"}, exitFailed, "install", art)
	b.fallBack(t)
	b.must(t, exitFailed, "commit", "--stop-before", "Cleanup")
	check(map[string]any{"result": "rolled-back", "artifact": "release-2", "reboot": false, "step": nil}, exitOK, "resume")
	text, err := os.ReadFile(b.pack(t, "release-3", testImage(9, 300000)))
	must(t, err)
	text[len(text)/2] ^= 1
	writeFile(t, bad, string(text))
	check(map[string]any{"result": "failed", "artifact": "release-3", "error": "SHA-256"}, exitFailed, "install", bad)
}

// Rate and time left are those of the last seconds and count the read-back.
func TestProgressPace(t *testing.T) {
	var said []string
	now := time.Unix(1000, 0)
	lg := &logger{level: levelInfo, sinks: []logSink{func(_ logLevel, m string) { said = append(said, m) }}}
	p := &progress{mode: "lines", lg: lg, now: func() time.Time { return now }}
	const mb = 1000000
	h := headway{phase: phaseWrite, total: 1000 * mb, later: 1000 * mb, readRate: 20 * mb}
	move := func(seconds int, rate int64) (float64, time.Duration, bool) {
		for range seconds * 5 {
			p.update(h)
			now = now.Add(200 * time.Millisecond)
			h.done += rate / 5
		}
		p.update(h)
		return p.speed(h)
	}
	near := func(got, want float64) bool { return got > want*0.98 && got < want*1.02 }
	check := func(what string, seconds int, rate int64, wantRate, wantLeft float64) {
		t.Helper()
		got, left, known := move(seconds, rate)
		if !known || !near(got, wantRate) || !near(left.Seconds(), wantLeft) {
			t.Errorf("%s: %.0f bytes a second, %s left (%v), want %.0f and %.0f s", what, got, left, known, wantRate, wantLeft)
		}
	}
	check("fast", 20, 10*mb, 10*mb, 800/10+50)
	check("slower for a while", 15, 1*mb, 1*mb, 785/1+50)
	check("fast again", 15, 10*mb, 10*mb, 635/10+50)
	h.readRate = 0
	check("the slot's rate is not known", 5, 10*mb, 10*mb, 585/10+100)
	if _, _, known := move(15, 0); known {
		t.Error("a time is known though nothing moves")
	}
	move(40, 0)
	if l := said[len(said)-1]; !strings.HasSuffix(l, ", stalled") {
		t.Errorf("nothing moves: %q", l)
	}
	if len(p.samples) > 30 {
		t.Errorf("%d samples are kept", len(p.samples))
	}
	h = headway{phase: phaseReadBack, total: 1000 * mb}
	check("reading back", 10, 50*mb, 50*mb, 10)
	h = headway{phase: phaseWrite, total: 1 << 62}
	if _, left, known := move(20, 5); !known || left <= 0 {
		t.Errorf("a very long time is %s, %v", left, known)
	}
	for _, l := range said {
		if strings.Contains(l, "\n") || !strings.HasPrefix(l, "write: ") && !strings.HasPrefix(l, "read-back: ") {
			t.Errorf("line %q", l)
		}
	}
}

// A line of the log does not run into the bar.
func TestProgressBar(t *testing.T) {
	var b bytes.Buffer
	lg := newLogger(&b)
	now := time.Unix(1000, 0)
	p := &progress{mode: "bar", w: &b, lg: lg, now: func() time.Time { return now }}
	lg.before = p.endLine
	for i := range int64(3) {
		p.update(headway{phase: phaseWrite, done: i * 4900000000, total: 9999900000, later: 9999900000, readRate: 1e6})
		now = now.Add(time.Second)
	}
	lg.warnf("something")
	p.update(headway{phase: phaseWrite, done: 9999900000, total: 9999900000})
	want := "\rwrite [                ]   0 % 0.0 of 9999.9 MB" +
		"\rwrite [#######         ]  49 % 4900.0 of 9999.9 MB, 4900.0 MB/s, 2h46m41s left" +
		"\rwrite [############### ]  98 % 9800.0 of 9999.9 MB, 4900.0 MB/s, 2h46m40s left\nmendlet: warning: something\n" +
		"\rwrite [################] 100 % 9999.9 of 9999.9 MB, 3333.3 MB/s, 0s left\n"
	if b.String() != want {
		t.Errorf("got  %q\nwant %q", b.String(), want)
	}
	for l := range strings.FieldsFuncSeq(want, func(r rune) bool { return r == '\r' || r == '\n' }) {
		if len(l) > 79 {
			t.Errorf("%q is wider than a terminal", l)
		}
	}
}
