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
	"strings"
	"testing"
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
		if err := printf(&b, "%s|%-9s|%q|%d\n", c.in, "x", c.in, 7); err != nil || b.String() != c.plain+"|x        |"+quote(c.in)+"|7\n" {
			t.Errorf("%q: printed as %s, %v", c.in, b.String(), err)
		}
		b.Reset()
		var back string
		if err := printJSON(&b, c.in); err != nil || strings.ContainsFunc(strings.TrimSuffix(b.String(), "\n"), func(r rune) bool { return visible(string(r)) != string(r) }) {
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
	art := b.pack(t, "release-2", testBlocks(300000), "-p", "a:"+forged, "-p", "good:it\\em \"x\"", "--clears-provides", "c"+forged, "-d", "none"+forged+":x")
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
	if out := run(exitOK, "show-provides"); !strings.Contains(out, "good=it\\em \"x\"\n") || !strings.Contains(out, "a="+quote(string([]rune(forged)))+"\n") {
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
	for _, name := range []string{"inspect.go", "standalone.go", "managed.go"} {
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
func TestProgressOutput(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(1<<20))
	out, _ := b.must(t, exitOK, "install", "--progress", "json", art)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var last map[string]any
	for _, l := range lines {
		if err := json.Unmarshal([]byte(l), &last); err != nil {
			t.Errorf("line %q: %v", l, err)
		}
	}
	if last["event"] != "progress" || last["done"] != float64(1<<20) || last["total"] != last["done"] {
		t.Errorf("got %q", out)
	}
	b.must(t, exitOK, "rollback")
	_, errs := b.must(t, exitOK, "install", "--progress", "lines", art)
	if !strings.Contains(errs, "100 %: 1.0 MB of 1.0 MB written") { // already there
		t.Errorf("got %q", errs)
	}
	b.must(t, exitOK, "rollback")
	if _, errs := b.must(t, exitOK, "-q", "install", art); errs != "" {
		t.Errorf("-q: %q", errs)
	}
}
