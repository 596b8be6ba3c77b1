// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// helpOf is what the program prints for these words, without a device; it must print and end well.
func helpOf(t *testing.T, words ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	if code := runProgram(context.Background(), append([]string{"mendlet"}, words...), strings.NewReader(""), &out,
		&errs); code != exitOK || errs.Len() > 0 {
		t.Errorf("%q: exit %d, stderr %q", words, code, errs.String())
	}
	return out.String()
}

// verbFlagSets are the options of all verbs by their names, and those of every verb under "".
func verbFlagSets() map[string]*flag.FlagSet {
	global := flag.NewFlagSet("", flag.ContinueOnError)
	globalFlags(global, &options{})
	sets := map[string]*flag.FlagSet{"": global}
	for _, v := range verbs() {
		sets[v.name] = flag.NewFlagSet(v.name, flag.ContinueOnError)
		if v.flags != nil {
			v.flags(sets[v.name], &options{})
		}
	}
	if sets["pack"] != nil {
		new(packOptions).flags(sets["pack"])
	}
	fleetFlagSet(sets)
	return sets
}

// Each option is in the help of its verb under all its names, with its default; and the help of
// a verb is the same whichever way it is asked for.
func TestVerbHelp(t *testing.T) {
	for name, fs := range verbFlagSets() {
		if name == "" || name == "help" {
			continue
		}
		help := helpOf(t, name, "--help")
		if other := helpOf(t, "help", name); other != help {
			t.Errorf("'help %s' and '%s --help' differ: %q, %q", name, name, other, help)
		}
		words := " " + strings.Join(strings.Fields(help), " ") + " "
		fs.VisitAll(func(f *flag.Flag) {
			if n := dashed(f.Name); !strings.Contains(words, " "+n+" ") && !strings.Contains(words, " "+n+", ") {
				t.Errorf("%s: no option %s:\n%s", name, n, help)
			}
			value, text := flag.UnquoteUsage(f)
			if value == "string" || value == "int" || !strings.Contains(words, " "+text+" ") {
				t.Errorf("%s: option %s has the text %q, value %q:\n%s", name, f.Name, text, value, help)
			}
		})
		for line := range strings.Lines(help) {
			if len([]rune(line)) > 81 && name != "pack" { // it begins with a long example
				t.Errorf("%s: line over 80 columns: %q", name, line)
			}
		}
	}
	for words, want := range map[string][]string{
		"install":   {"Cleanup", "repeatable", "a bar on a terminal, else lines"},
		"run":       {"(1h)", "accepted again", "-F, --forcebootstrap", "(no limit)"},
		"bootstrap": {"accepted again"}, "setup": {"(1800 if", "(28800 if", "(300 if"}, "pack": {"(gzip)", "(rootfs-image)"},
	} {
		if v, err := findVerb(persona{}, words); err != nil && leftOut(words) != "" {
			continue
		} else if v.name == "install" {
			for _, s := range stopPoints {
				want = append(want, string(s))
			}
		}
		help := strings.Join(strings.Fields(helpOf(t, "help", words)), " ")
		for _, w := range want {
			if !strings.Contains(help, w) {
				t.Errorf("help %s: no %q:\n%s", words, w, help)
			}
		}
	}
	for _, words := range [][]string{{"help"}, {"help", "--help"}, {"help", "help"}, {"-h"}, {"--help", "status"}} {
		if helpOf(t, words...) != helpOf(t, "--help") {
			t.Errorf("%q is not --help", words)
		}
	}
	for _, words := range [][]string{{"version"}, {"-v"}, {"status", "--version"}, {"version", "-c", "/nowhere.conf"}} {
		if out := helpOf(t, words...); out != versionString()+"\n" {
			t.Errorf("%q: got %q", words, out)
		}
	}
}

func TestDidYouMean(t *testing.T) {
	for words, want := range map[string]string{
		"instal": "hint: did you mean 'mendlet install'?", "comit": "'mendlet commit'", "stauts": "'mendlet status'",
		"help instal":   "'mendlet install'",
		"show_artifact": "'mendlet show-artifact'", "INSTALL": "", "frobnicate": "", "": "", "x": "", "ls": "",
		"status --jsn": "hint: did you mean --json?", "install --stopbefore": "--stop-before", "--confg x status": "--config",
		"status --frobnicate": "",
		"status -x":           "", "-" + strings.Repeat("a", 1<<20): "", strings.Repeat("a", 1<<20): "",
		"status --json=x": "",
	} {
		var out, errs bytes.Buffer
		code := runProgram(context.Background(), append([]string{"mendlet"}, strings.Fields(words)...),
			strings.NewReader(""), &out, &errs)
		if code != exitUsage || out.Len() > 0 || !strings.Contains(errs.String(), want) ||
			(want == "") == strings.Contains(errs.String(), "did you mean") {
			t.Errorf("%.40q: exit %d, stdout %q, stderr %.200q, want %q", words, code, out.String(), errs.String(), want)
		}
	}
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"", "ab", 2}, {"commit", "commit", 0}, {"comimt", "commit", 1}, {"kitten", "sitting", 3},
		{"ab", "ba", 1}} {
		if got := slips(c.a, c.b); got != c.want {
			t.Errorf("%q to %q: got %d slips, want %d", c.a, c.b, got, c.want)
		}
	}
}

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	return string(text)
}

// What CONTRIBUTING.md shows of our own files is there.
func TestContributingQuotes(t *testing.T) {
	files, err := filepath.Glob("*.go")
	must(t, err)
	var code strings.Builder
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.go") {
			code.WriteString(readText(t, f))
		}
	}
	text := readText(t, "CONTRIBUTING.md")
	style := text[strings.Index(text, "## Style"):strings.Index(text, "## A release")]
	quotes := regexp.MustCompile("(?s)`([^`]+)`|: \"([^\"]+)\"").FindAllStringSubmatch(style, -1)
	if len(quotes) < 8 {
		t.Errorf("got %d quotes, want some", len(quotes))
	}
	for _, q := range quotes {
		if s := strings.TrimSuffix(q[1]+q[2], "."); !strings.Contains(code.String(), s) {
			t.Errorf("no source has %s", s)
		}
	}
}

// makeTargets are the targets that a script calls make for; check stands for what it consists of.
func makeTargets(t *testing.T, script string) []string {
	var list []string
	// A command at the start of a line, or an element of the workflow's matrix.
	calls := regexp.MustCompile(`(?m)^(?:if ! | *- run: )?make((?: +[A-Z]+=\S*| +[a-z][a-z0-9-]*)+)|^ {10}- ([a-z].*)$`)
	for _, m := range calls.FindAllStringSubmatch(script, -1) {
		for _, word := range strings.Fields(m[1] + m[2]) {
			switch {
			case strings.ContainsAny(word, "=:"):
			case word == "check":
				check := regexp.MustCompile(`(?m)^check: (.*)$`).FindStringSubmatch(readText(t, "Makefile"))
				list = append(list, strings.Fields(check[1])...)
			default:
				list = append(list, word)
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// The public CI runs what our own does, and both only what there is.
func TestWorkflowTargets(t *testing.T) {
	ours := makeTargets(t, readText(t, ".ci/run"))
	workflow := readText(t, ".github/workflows/ci.yml")
	theirs := makeTargets(t, workflow[:strings.Index(workflow, "\n  release:")])
	if !slices.Equal(ours, theirs) || len(ours) < 10 {
		t.Errorf("got targets\n%q in .ci/run and\n%q in the workflow", ours, theirs)
	}
	makefile := readText(t, "Makefile")
	contributing := readText(t, "CONTRIBUTING.md")
	for _, target := range ours {
		if !regexp.MustCompile(`(?m)^` + target + `:`).MatchString(makefile) {
			t.Errorf("the Makefile has no target %s", target)
		}
		if strings.HasPrefix(target, "test-") && !strings.Contains(contributing, target) && target != "test-bench" {
			t.Errorf("CONTRIBUTING.md does not name %s", target)
		}
	}
}

// manText is a manual page without its escapes for dashes.
func manText(t *testing.T, path string) string {
	return strings.ReplaceAll(readText(t, path), `\-`, "-")
}

// section is the part of a manual page below a heading of this level (SH, SS).
func section(t *testing.T, man, kind, name string) string {
	t.Helper()
	_, text, ok := strings.Cut(man, "\n."+kind+" "+name+"\n")
	if !ok {
		t.Errorf("no section %q", name)
	}
	text, _, _ = strings.Cut(text, "\n."+kind+" ")
	return text
}

// The manual page has every verb and every option in its section, each state to stop before,
// and nothing that the program has not.
func TestManual(t *testing.T) {
	man := manText(t, "doc/mendlet.8")
	in := map[string]string{"": section(t, man, "SH", "OPTIONS"), "pack": section(t, man, "SH", "PACK"),
		"fleet": section(t, man, "SH", "CHANNELS")}
	text := section(t, man, "SH", "VERBS")
	known := map[string]bool{"-n": true, "-": true} // of env print; standard input
	sets := verbFlagSets()
	for name := range sets {
		if in[name] == "" {
			in[name] = text
		}
		if !regexp.MustCompile(`(?m)^\.(BR?|BI) (.* )?"?` + name + `\b`).MatchString(text) {
			t.Errorf("no verb %s", name)
		}
	}
	if len(packVerbs()) == 0 {
		return // the page is that of the build which has all verbs
	}
	for name, fs := range sets {
		fs.VisitAll(func(f *flag.Flag) {
			known[dashed(f.Name)] = true
			if !regexp.MustCompile(`[ "]` + dashed(f.Name) + `\b`).MatchString(in[name]) {
				t.Errorf("%s: no option %s", name, dashed(f.Name))
			}
		})
	}
	mender, _, err := calledAs([]string{"mender"})
	must(t, err)
	names := section(t, man, "SH", "NAMES OF MENDER'S CLIENT")
	for _, v := range mender.verbs() {
		fs := flag.NewFlagSet(v.name, flag.ContinueOnError)
		v.flags(fs, &options{})
		fs.VisitAll(func(f *flag.Flag) {
			if o := dashed(f.Name); !known[o] && !regexp.MustCompile(`[ "(]`+o+`\b`).MatchString(names) {
				t.Errorf("called as mender, %s: no option %s", v.name, o)
			}
		})
		fs.VisitAll(func(f *flag.Flag) { known[dashed(f.Name)] = true })
	}
	for _, o := range regexp.MustCompile(`(?m)[ ("](--?[a-zA-Z][a-z-]*)`).FindAllStringSubmatch(man, -1) {
		if !known[o[1]] {
			t.Errorf("the program has no option %s", o[1])
		}
	}
	for _, s := range stopPoints {
		if !strings.Contains(text, string(s)) {
			t.Errorf("no state %s", s)
		}
	}
}

// The help that goes with every verb has all such options, with the defaults that they have.
func TestGeneralHelp(t *testing.T) {
	t.Setenv("MENDER_CONF_DIR", "")
	t.Setenv("MENDER_DATASTORE_DIR", "")
	help := helpOf(t, "--help")
	verbFlagSets()[""].VisitAll(func(f *flag.Flag) {
		if !regexp.MustCompile(`[ (]` + dashed(f.Name) + `[ ,\n]`).MatchString(help) {
			t.Errorf("no option %s", dashed(f.Name))
		}
	})
	o := &options{paths: defaultPaths()}
	for name, def := range map[string]string{"config": o.mainConfig(), "fallback-config": o.fallbackConfig(),
		"data":      o.paths.ds,
		"log-level": defaultConfig(o.paths).DaemonLogLevel, "log": "stderr"} {
		if !regexp.MustCompile(dashed(name) + ` .*\(` + regexp.QuoteMeta(def) + `\)\n`).MatchString(help) {
			t.Errorf("%s: no default %s", dashed(name), def)
		}
	}
}

// README.md has the verbs as the help has them, and knows no others.
func TestReadmeVerbs(t *testing.T) {
	_, table, _ := strings.Cut(readText(t, "README.md"), "| verb | |\n|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := map[string]bool{}
	for row := range strings.SplitSeq(table, "\n") {
		rows[row] = true
	}
	for _, v := range verbs() {
		row := fmt.Sprintf("| `%s` | %s |", strings.TrimSpace(v.name+" "+strings.ReplaceAll(v.words, "|", `\|`)), v.help)
		if !rows[row] {
			t.Errorf("no row %s", row)
		}
		delete(rows, row)
	}
	if len(packVerbs()) == 0 {
		return // it is that of the build which has all verbs
	}
	if len(rows) > 0 {
		t.Errorf("rows that are no verbs: %q", slices.Sorted(maps.Keys(rows)))
	}
	known := map[string]bool{}
	for _, fs := range verbFlagSets() {
		fs.VisitAll(func(f *flag.Flag) { known[dashed(f.Name)] = true })
	}
	for _, o := range regexp.MustCompile("[ `]--[a-z][a-z-]*").FindAllString(readText(t, "README.md"), -1) {
		if !known[o[1:]] {
			t.Errorf("the program has no option %s", o[1:])
		}
	}
}

// codeIn is what of a file is meant to be typed or run: blocks and spans of code in Markdown, and
// lines that are no comments elsewhere; lines that go on in the next one are joined.
func codeIn(path, text string) string {
	pattern := "(?m)^[^#\\n].*$"
	if filepath.Ext(path) == ".md" {
		pattern = "(?s)```.*?```|`[^`\\n]+`|\\n    [^\\n]+"
	}
	return strings.ReplaceAll(strings.Join(regexp.MustCompile(pattern).FindAllString(text, -1), "\n"), "\\\n", " ")
}

// Every command line of ours in the documents and in what is packaged is one that the program
// takes.
func TestDocumentedCommands(t *testing.T) {
	if len(packVerbs()) == 0 {
		t.Skip("the documents are those of the build which has all verbs")
	}
	files := []string{"README.md", "CONTRIBUTING.md", "SECURITY.md", "ARCHITECTURE.md", "rig/README.md"}
	must(t, filepath.WalkDir("packaging", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	}))
	command := regexp.MustCompile("(?m)(?:^|[ /`'])mendlet ([a-z][^\\n`'|>#]*)")
	found := 0
	for _, file := range files {
		for _, m := range command.FindAllStringSubmatch(codeIn(file, readText(t, file)), -1) {
			found++
			words := strings.Fields(m[1])
			v, err := findVerb(persona{}, words[0])
			if err == nil && v.name == "pack" {
				set := flag.NewFlagSet("", flag.ContinueOnError)
				set.SetOutput(io.Discard)
				new(packOptions).flags(set)
				if err = set.Parse(words[1:]); errors.Is(err, flag.ErrHelp) {
					err = nil
				}
			} else if err == nil {
				_, err = parseVerb(v, words[1:], &options{help: len(words) == 1}) // a bare verb is just named
			}
			if err != nil {
				t.Errorf("%s: %q: %v", file, words, err)
			}
		}
	}
	if found < 20 {
		t.Errorf("found %d command lines", found)
	}
}

// The exit codes are those of the source, in README.md, the manual page and --help, under the
// same names.
func TestExitCodes(t *testing.T) {
	codes := map[string]string{}
	line := regexp.MustCompile(`(?m)^\texit\w+ += (\d+) +// (?:EX_\w+ of sysexits.h(?:: )?)?(.*)$`)
	for _, m := range line.FindAllStringSubmatch(readText(t, "errors.go"), -1) {
		codes[m[1]] = cmp.Or(firstPhrase(m[2]), "usage")
	}
	if len(codes) != 7 {
		t.Fatalf("got codes %q of the source", codes)
	}
	_, readme, _ := strings.Cut(readText(t, "README.md"), "## Verbs and exit codes\n")
	readme, _, _ = strings.Cut(readme, "\n## ")
	man := section(t, manText(t, "doc/mendlet.8"), "SH", "EXIT STATUS")
	for name, rows := range map[string][][]string{
		"README.md":  regexp.MustCompile(`(?m)^\| (\d+) \| (.*) \|$`).FindAllStringSubmatch(readme, -1),
		"mendlet(8)": regexp.MustCompile(`(?m)^(\d+)\t(.*)$`).FindAllStringSubmatch(man, -1),
	} {
		if len(rows) != len(codes) {
			t.Errorf("%s has %d exit codes, want %d", name, len(rows), len(codes))
		}
		for _, r := range rows {
			if got := firstPhrase(r[2]); got != codes[r[1]] {
				t.Errorf("%s: exit code %s is %q, want %q", name, r[1], got, codes[r[1]])
			}
		}
	}
	_, help, _ := strings.Cut(strings.Join(strings.Fields(helpOf(t, "--help")), " "), "Exit codes: ")
	for code, name := range codes {
		if want := " " + code + " " + strings.ReplaceAll(name, ",", ""); !strings.Contains(" "+help, want) {
			t.Errorf("--help: no exit code%s", want)
		}
	}
}

// firstPhrase is what comes before details.
func firstPhrase(s string) string {
	if i := strings.IndexAny(s, "(:;"); i >= 0 {
		s = s[:i]
	}
	return strings.TrimSpace(s)
}

// configKeys are the keys of mender.conf by the names that its manual page gives them, with
// their defaults.
func configKeys(v reflect.Value, prefix string, keys map[string]string) {
	for i := range v.NumField() {
		f, name := v.Field(i), prefix+v.Type().Field(i).Name
		if !v.Type().Field(i).IsExported() {
			continue
		}
		if f.Kind() == reflect.Slice {
			f, name = reflect.Zero(f.Type().Elem()), name+"[]"
		}
		if f.Kind() == reflect.Struct {
			configKeys(f, name+".", keys)
			continue
		}
		keys[name] = cmp.Or(fmt.Sprint(f.Interface()), "none")
	}
}

// The table in the manual page has every key that is read and no other, with its default; the
// text below says something about each.
func TestConfigManual(t *testing.T) {
	keys := map[string]string{}
	configKeys(reflect.ValueOf(*defaultConfig(paths{ds: "DIR"})), "", keys)
	man := manText(t, "doc/mender.conf.5")
	_, table, _ := strings.Cut(man, "Whose\\fR\n_\n")
	table, text, ok := strings.Cut(table, ".TE\n")
	if !ok || len(keys) < 30 {
		t.Fatalf("no table, or %d keys", len(keys))
	}
	own := map[string]bool{"FwEnvConfig": true, "FwEnvNamespace": true, "BootEnv": true, "Delta": true, "Channel": true,
		"FleetVerifyKeys[]": true, "Groups[]": true, "DeviceID": true, "ChannelPollIntervalSeconds": true,
		"MonitorChecks": true, "MonitorBuiltin[]": true,
		"MonitorTimeoutSeconds": true, "MonitorIntervalSeconds": true, "ConnectAuditLog": true}
	units := map[reflect.Kind][]string{reflect.Bool: {"bool"}, reflect.Int: {"s", "tries"},
		reflect.String: {"URL", "path", "text"}}
	seen := map[string]bool{}
	for row := range strings.Lines(table) {
		col := strings.Split(strings.TrimSuffix(row, "\n"), "\t")
		if len(col) != 5 {
			t.Errorf("row %q: want 5 columns", row)
			continue
		}
		name, def, unit, since, whose := col[0], col[1], col[2], col[3], col[4]
		if want, ok := keys[name]; !ok || def != want || seen[name] {
			t.Errorf("key %s with default %s: the program has %q", name, def, want)
		}
		seen[name] = true
		if (whose == "mendlet") != own[name] || (whose == "Mender") == own[name] {
			t.Errorf("key %s is said to be of %s", name, whose)
		}
		if !regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(since) {
			t.Errorf("key %s since %q", name, since)
		}
		kind := keyKind(reflect.TypeFor[config](), name)
		if !slices.Contains(units[kind], unit) || (unit == "s") != strings.HasSuffix(name, "Seconds") {
			t.Errorf("key %s is a %v and has the unit %q", name, kind, unit)
		}
	}
	for name := range keys {
		if !seen[name] {
			t.Errorf("no key %s in the table", name)
		}
		plain, _, _ := strings.Cut(name, "[]")
		if !regexp.MustCompile(`(?m)^\.BR? .*\b` + regexp.QuoteMeta(plain) + `\b`).MatchString(text) {
			t.Errorf("no text about key %s", name)
		}
	}
}

// keyKind is the kind of value that a key of that name in the table takes.
func keyKind(typ reflect.Type, name string) reflect.Kind {
	for part := range strings.SplitSeq(name, ".") {
		plain, list := strings.CutSuffix(part, "[]")
		f, _ := typ.FieldByName(plain)
		if typ = f.Type; list {
			typ = typ.Elem()
		}
	}
	return typ.Kind()
}

// The program stops at no key that it does not know, and takes what the example has.
func TestConfigManualExample(t *testing.T) {
	_, example, _ := strings.Cut(manText(t, "doc/mender.conf.5"), ".SH EXAMPLES\n.nf\n")
	example, _, _ = strings.Cut(example, ".fi")
	c, said, err := loaded(t, "", example)
	if err != nil || said != "" || c.RootfsPartB == "" || len(c.verifyKeys()) != 1 || len(c.Servers) != 1 {
		t.Errorf("got %+v, %v, %s from %s", c, err, said, example)
	}
}

// README.md's first screen: what it is, two commands, and two pictures, of which the session is what
// the program prints today (make session).
func TestSession(t *testing.T) {
	t.Parallel()
	first, _, _ := strings.Cut(readText(t, "README.md"), "\n## ")
	var commands []string
	for i, block := range strings.Split(first, "```\n") {
		if i%2 == 1 {
			commands = append(commands, strings.Split(strings.TrimSpace(block), "\n")...)
		}
	}
	if len(commands) != 2 || !strings.Contains(first, `src="doc/session.svg"`) ||
		!strings.Contains(first, `src="doc/performance.svg"`) {
		t.Errorf("got the commands %q and %s", commands, first)
	}
	if len(packVerbs()) == 0 {
		t.Skip("needs pack")
	}
	self, err := os.Executable()
	must(t, err)
	program := filepath.Join(t.TempDir(), "mendlet")
	must(t, os.WriteFile(program, []byte("#!/bin/sh\nMENDLET_TEST_PROGRAM=1 exec "+self+" \"$@\"\n"), 0o755))
	cmd := exec.Command("sh", "rig/session.sh", program, "testdata")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil || errs.Len() > 0 {
		t.Fatalf("%v: %s", err, errs.String())
	}
	if string(out) != readText(t, "doc/session.svg") {
		t.Errorf("doc/session.svg is not what the program prints today; make session writes it anew:\n%s", out)
	}
	if err := xml.Unmarshal(out, new(struct{})); err != nil {
		t.Errorf("it is no XML: %v", err)
	}
}

// Who calls a verb that another build has is told which.
func TestLeftOut(t *testing.T) {
	for _, name := range []string{"pack", "index", "fleet", "run", "daemon", "check-update", "send-inventory", "bootstrap",
		"setup", "auth-daemon", "token", "connect", "monitor", "snapshot"} {
		if _, err := findVerb(persona{}, name); err != nil && leftOut(name) == "" {
			t.Errorf("%s: %v, and nothing is said of other builds", name, err)
		}
	}
}
