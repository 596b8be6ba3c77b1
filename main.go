// SPDX-License-Identifier: Apache-2.0

// Command mendlet updates an A/B device from Mender artifacts, with or without a server.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
)

const usageText = `mendlet installs Mender artifacts on an A/B device, safely at any power cut.

Examples:
  mendlet plan  update.mender        what would happen; changes nothing
  mendlet install update.mender      write the idle slot and switch over; then reboot
  mendlet commit                     after the reboot: keep the new system
  mendlet rollback                   or go back to the old one
  wget -O- URL | mendlet install -   the same without a file
  mendlet status                     slots, boot environment, what is in progress

Verbs:
%s
'mendlet VERB --help' lists the options of a verb. These go with every verb:
  -c, --config FILE             configuration (/etc/mender/mender.conf)
  -b, --fallback-config FILE    read before it (/var/lib/mender/mender.conf)
  -d, --datastore, --data DIR   state (/var/lib/mender)
  -l, --log-level LEVEL         trace debug info warning error fatal (info)
  -L, --log-file FILE           log there too
      --log WHERE               stderr, kmsg or syslog (stderr)
  -E, --trusted-certs FILE      more certificates to trust
      --skipverify              do not verify TLS certificates
      --running A|B|none        the slot that runs, for people who know better
  -q, --quiet                   warnings and errors only
  -v, --version    -h, --help

Exit codes: 0 done or nothing to do, 1 failed, 2 nothing in progress, 3 refused and nothing
changed, 4 done and a reboot is needed, 64 usage, 75 try later.
`

const usageElsewhere = `usage: %s [options] VERB [options] [WORDS]

Verbs:
%s
This is mendlet under another name. 'mendlet --help' lists the options that go
with every verb, and mendlet(8), under NAMES OF MENDER'S CLIENT, what differs.
`

func verbs() []verb {
	list := []verb{
		{"install", "FILE|URL|-", "install an artifact", 1, installFlags, oneWord(standalone.install)},
		{"commit", "", "keep what was installed", 0, stopFlags, noWord(standalone.commit)},
		{"rollback", "", "go back to what was before", 0, stopFlags, noWord(standalone.rollback)},
		{"resume", "", "go on with an interrupted install", 0, installFlags, noWord(standalone.resume)},
		{"show-artifact", "", "name of the installed artifact", 0, nil, atOnce(standalone.showArtifact)},
		{"show-provides", "", "all that the installed artifacts provide", 0, nil, atOnce(standalone.showProvides)},
		{"status", "", "slots, boot environment, update in progress, last result", 0, jsonFlag, noWord(inspector.status)},
		{"plan", "FILE|URL|-", "say what install would do; changes nothing", 1, planFlags, oneWord(inspector.plan)},
		{"show", "FILE|URL|-", "what is in an artifact, fully verified", 1, jsonFlag, oneWord(inspector.show)},
		{"env", "print [-n] [NAME…] | set NAME=VALUE…", "the boot environment", -1, nil,
			func(ctx context.Context, a *app, w []string) error { return inspector{a}.env(ctx, w) }},
	}
	if !recovery {
		list = append(list, verb{"setup", "", "write mender.conf from options; its other keys stay", 0, setupFlag,
			func(_ context.Context, a *app, _ []string) error { return a.o.setup.write(a.o.mainConfig(), a.c) }})
	}
	return slices.Concat(list, packVerbs(), indexVerbs(), fleetVerbs(), netVerbs(), busVerbs(), tokenVerbs(),
		connectVerbs(), monitorVerbs(), snapshotVerbs(), []verb{
			{"help", "[VERB]", "what there is, or the options of a verb", 0, nil, nil}, // both are dispatch's
			{"version", "", "the version of this program", 0, nil, nil},
		})
}

func oneWord[T ~struct{ *app }](f func(T, context.Context, string) error) func(context.Context, *app, []string) error {
	return func(ctx context.Context, a *app, words []string) error { return f(T{a}, ctx, words[0]) }
}

func noWord[T ~struct{ *app }](f func(T, context.Context) error) func(context.Context, *app, []string) error {
	return func(ctx context.Context, a *app, _ []string) error { return f(T{a}, ctx) }
}

func atOnce[T ~struct{ *app }](f func(T) error) func(context.Context, *app, []string) error {
	return func(_ context.Context, a *app, _ []string) error { return f(T{a}) }
}

func setupFlag(fs *flag.FlagSet, o *options) { o.setup.register(fs) }

func stopFlags(fs *flag.FlagSet, o *options) {
	var states []string
	for _, s := range stopPoints {
		states = append(states, string(s))
	}
	usage := "stop before this `STATE`, for 'mendlet resume' to go on; repeatable: " + strings.Join(states, ", ")
	fs.Func("stop-before", usage, func(s string) error {
		o.stopBefore = append(o.stopBefore, s)
		return nil
	})
	fs.BoolVar(&o.rebootExitCode, "reboot-exit-code", false, "exit with 4 when a reboot is needed, not with 0")
}

func installFlags(fs *flag.FlagSet, o *options) {
	stopFlags(fs, o)
	writeFlags(fs, o)
	sourceFlags(fs, o)
}

func globalFlags(fs *flag.FlagSet, o *options) {
	str := func(p *string, names ...string) { textFlag(fs, p, *p, "", names) }
	yes := func(p *bool, names ...string) {
		for _, n := range names {
			fs.BoolVar(p, n, *p, "")
		}
	}
	str(&o.config, "c", "config")
	str(&o.fallback, "b", "fallback-config")
	str(&o.paths.ds, "d", "datastore", "data")
	str(&o.logLevel, "l", "log-level")
	str(&o.logFile, "L", "log-file")
	str(&o.log, "log")
	str(&o.trusted, "E", "trusted-certs")
	str(&o.running, "running")
	yes(&o.skipVerify, "skipverify")
	yes(&o.quiet, "q", "quiet")
	yes(&o.version, "v", "version")
	yes(&o.help, "h", "help")
}

func main() {
	prepareProcess()
	// There is little garbage, and a board with 24 MiB has no room for as much of it as there
	// is memory in use.
	debug.SetGCPercent(25)
	// A child or reader that went away is an error where it is written to, not a death.
	// Caught and not ignored, because children would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(runProgram(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// runProgram is the whole program but for what belongs to the process: it returns the exit code.
func runProgram(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) (code int) {
	lg := newLogger(errw)
	defer func() {
		if fault := recover(); fault != nil {
			lg.errorf("internal error: %v", fault)
			for _, line := range strings.Split(strings.TrimSpace(string(debug.Stack())), "\n") {
				lg.errorf("%s", strings.ReplaceAll(line, "\t", "  "))
			}
			code = exitFailed
		}
	}()
	o, name := newOptions(), filepath.Base(args[0])
	if code, called := runGuard(name, in, out); called {
		return code
	}
	if name == "fw_printenv" || name == "fw_setenv" {
		return fwProgram(ctx, name, args[1:], o, in, out, errw, lg)
	}
	who, args, err := calledAs(args)
	if err == nil {
		err = dispatch(ctx, who, args, o, lg, patient(ctx, in), out)
	}
	if err != nil && !isTold(err) {
		lg.fail(err)
	}
	if who.exit != nil {
		return who.exit(err)
	}
	return exitCode(err)
}

func dispatch(ctx context.Context, who persona, args []string, o *options, lg *logger,
	in io.Reader, out io.Writer) error {
	fs := newFlagSet(o)
	if who.flags != nil {
		who.flags(fs, o)
	}
	if err := fs.Parse(args[1:]); err != nil {
		return unknownOption(fs, "", err)
	}
	words := fs.Args()
	if len(words) > 0 && words[0] == "help" {
		if o.help = len(words) == 1 || words[1] == "help" || strings.HasPrefix(words[1], "-"); !o.help {
			words = []string{words[1], "--help"}
		}
	}
	switch {
	case o.help, o.version, who.bare && len(words) == 0:
		general(who, o, out)
		return nil
	case len(words) == 0:
		return usageError("no verb; 'mendlet --help' lists what there is")
	}
	v, err := findVerb(who, words[0])
	if err != nil {
		return err
	}
	if words, err = parseVerb(v, words[1:], o); err != nil {
		return err
	}
	o.version = o.version || v.name == "version"
	switch {
	case o.help:
		return verbHelp(who, v, out)
	case o.version:
		general(who, o, out)
		return nil
	}
	a, err := newApp(o, lg, in, out, urlSource)
	if err == nil {
		a.inherit = inheritMender
		watch(a)
		defer a.closeState()
		err = a.c.paths.explainFull(v.run(ctx, a, words))
	}
	if errors.Is(err, context.Canceled) && exitCode(err) == exitFailed {
		err = tryLater("interrupted: %w", err)
	}
	if o.progress == "json" {
		endEvent(out, a, err)
	}
	return err
}

// verbs are those of the name that the program is called by.
//
//go:noinline
func (p persona) verbs() []verb {
	if p.list == nil {
		return verbs()
	}
	return p.list(verbs())
}

//go:noinline
func (p persona) String() string { return cmp.Or(p.name, "mendlet") }

func findVerb(who persona, name string) (verb, error) {
	var names []string
	for _, v := range who.verbs() {
		if v.name == name {
			return v, nil
		}
		names = append(names, v.name)
	}
	if hint := leftOut(name); hint != "" {
		return verb{}, withHint(usageError("this mendlet was built without the verb %q", name), "%s", hint)
	}
	err := usageError("%w %q; '%s --help' lists what there is", errNoVerb, name, who)
	if near := closest(name, names); near != "" {
		err = withHint(err, "did you mean '%s %s'?", who, near)
	}
	return verb{}, err
}

func newFlagSet(o *options) *flag.FlagSet {
	fs := flag.NewFlagSet("mendlet", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	globalFlags(fs, o)
	return fs
}

func general(who persona, o *options, out io.Writer) {
	if o.version {
		fmt.Fprintln(out, versionString()+who.version)
		return
	}
	var list strings.Builder
	for _, v := range who.verbs() {
		fmt.Fprintf(&list, "  %-14s %s\n", v.name, v.help)
	}
	if who.name != "" {
		fmt.Fprintf(out, usageElsewhere, who, list.String())
		return
	}
	fmt.Fprintf(out, usageText, list.String())
}

func verbHelp(who persona, v verb, out io.Writer) error {
	fmt.Fprintf(out, "usage: %s %s\n%s\n", who, strings.TrimSpace(v.name+" [options] "+v.words), v.help)
	if v.flags != nil {
		fs := flag.NewFlagSet(v.name, flag.ContinueOnError)
		v.flags(fs, newOptions())
		fmt.Fprintln(out, "\nOptions:")
		flagHelp(out, fs)
	}
	fmt.Fprintln(out, "\n'mendlet --help' lists the options that go with every verb.")
	return nil
}

// parseVerb takes options before and after the words, as Mender's own client does; "--"
// ends them.
func parseVerb(v verb, args []string, o *options) ([]string, error) {
	if v.args < 0 {
		return args, nil
	}
	fs := newFlagSet(o)
	if v.flags != nil {
		v.flags(fs, o)
	}
	var words []string
	for len(args) > 0 {
		if err := fs.Parse(args); err != nil {
			return nil, unknownOption(fs, v.name, err)
		}
		rest := fs.Args()
		if n := len(args) - len(rest); n > 0 && args[n-1] == "--" {
			words = append(words, rest...)
			break
		}
		if len(rest) > 0 {
			words, rest = append(words, rest[0]), rest[1:]
		}
		args = rest
	}
	if len(words) != v.args && !(v.args >= orMore && len(words) >= v.args-orMore) && !o.help {
		return nil, usageError("%s: got %d words, want %d; usage: mendlet %s",
			v.name, len(words), v.args%orMore, strings.TrimSpace(v.name+" [options] "+v.words))
	}
	return words, nil
}

// prepareProcess sets what children inherit and what cannot be set for a child alone
// without a race between threads: the umask, and the PATH; and how a crash ends. It must run once, before
// anything else.
func prepareProcess() {
	// Else a crash in a goroutine, or of the runtime itself, ends with exit code 2, which has a meaning:
	// it gets SIGABRT (GOTRACEBACK=crash of package runtime).
	debug.SetTraceback("crash")
	syscall.Umask(0o022)
	os.Setenv("PATH", wholePath(os.Getenv("PATH")))
}

// wholePath puts the usual directories behind a PATH that lacks them: cron has none of those in which
// reboot and fw_setenv are, an initramfs none at all.
func wholePath(path string) string {
	list := filepath.SplitList(path)
	for _, d := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if !listed(list, d) {
			list = append(list, d)
		}
	}
	return strings.Join(list, ":")
}
