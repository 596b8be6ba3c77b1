// SPDX-License-Identifier: Apache-2.0

// Command mendlet updates an A/B device from Mender artifacts, with or without a server.
package main

import (
	"context"
	_ "embed"
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

// release is the version that this source is, or becomes: MAJOR.MINOR.PATCH, and in a source
// tarball of what is not tagged "+HASH" too.
//
//go:embed VERSION
var release string

// version is set by the linker: -X main.version=…; else the build information has the commit.
var version string

// buildTime is set by the linker to the Unix time of the commit or SOURCE_DATE_EPOCH: the
// clock of a device that runs this cannot be right when it shows less.
var buildTime string

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

// options are the flags of all verbs.
type options struct {
	config, fallback, logLevel, logFile, log, progress string
	skipVerify, quiet, help, version                   bool
	rebootExitCode, json                               bool
	write                                              writeOptions
	stopBefore                                         []string
	net                                                netFlags

	paths   paths
	trusted string
	running string
}

// verb is a command. args says how many words it takes besides its options; -1 hands all
// words on unparsed.
type verb struct {
	name, words, help string
	args              int
	flags             func(*flag.FlagSet, *options)
	run               func(context.Context, *app, []string) error
}

func verbs() []verb {
	list := []verb{
		{"install", "FILE|URL|-", "install an artifact", 1, installFlags, func(ctx context.Context, a *app, w []string) error { return a.install(ctx, w[0]) }},
		{"commit", "", "keep what was installed", 0, stopFlags, func(ctx context.Context, a *app, _ []string) error { return a.commit(ctx) }},
		{"rollback", "", "go back to what was before", 0, stopFlags, func(ctx context.Context, a *app, _ []string) error { return a.rollback(ctx) }},
		{"resume", "", "go on with an interrupted install", 0, installFlags, func(ctx context.Context, a *app, _ []string) error { return a.resume(ctx) }},
		{"show-artifact", "", "name of the installed artifact", 0, nil, func(_ context.Context, a *app, _ []string) error { return a.showArtifact() }},
		{"show-provides", "", "all that the installed artifacts provide", 0, nil, func(_ context.Context, a *app, _ []string) error { return a.showProvides() }},
		{"status", "", "slots, boot environment, update in progress, last result", 0, jsonFlag, func(_ context.Context, a *app, _ []string) error { return a.status() }},
		{"plan", "FILE|URL|-", "say what install would do; changes nothing", 1, jsonFlag, func(ctx context.Context, a *app, w []string) error { return a.plan(ctx, w[0]) }},
		{"show", "FILE|URL|-", "what is in an artifact, fully verified", 1, jsonFlag, func(ctx context.Context, a *app, w []string) error { return a.show(ctx, w[0]) }},
		{"env", "print [-n] [NAME…] | set NAME=VALUE…", "the boot environment", -1, nil, func(_ context.Context, a *app, w []string) error { return a.env(w) }},
	}
	return slices.Concat(list, packVerbs(), netVerbs())
}

func jsonFlag(fs *flag.FlagSet, o *options) {
	fs.BoolVar(&o.json, "json", false, "print JSON")
}

func stopFlags(fs *flag.FlagSet, o *options) {
	fs.Func("stop-before", "`STATE` to stop before; repeatable", func(s string) error {
		o.stopBefore = append(o.stopBefore, s)
		return nil
	})
	fs.BoolVar(&o.rebootExitCode, "reboot-exit-code", false, "exit with 4 when a reboot is needed")
}

func installFlags(fs *flag.FlagSet, o *options) {
	stopFlags(fs, o)
	fs.BoolVar(&o.write.writeAll, "write-all", false, "write blocks that are already there, too")
	fs.BoolVar(&o.write.noReadBack, "no-read-back", false, "do not read the slot back")
	fs.StringVar(&o.progress, "progress", "", "`HOW` to show progress: bar, lines, json, none")
	o.net.downloadFlags(fs)
}

func globalFlags(fs *flag.FlagSet, o *options) {
	str := func(p *string, names ...string) {
		for _, n := range names {
			fs.StringVar(p, n, *p, "")
		}
	}
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
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run is the whole program but for what belongs to the process: it returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	lg := &logger{level: levelInfo, sinks: []logSink{writerSink(errw)}}
	o := &options{paths: defaultPaths(), log: "stderr", write: defaultWriteOptions()}
	if name := filepath.Base(args[0]); name == "fw_printenv" || name == "fw_setenv" {
		c, err := loadConfig(o.paths, configFile{path: o.mainConfig()}, configFile{path: o.fallbackConfig()}, nil)
		if err != nil {
			lg.fail(err)
			return exitCode(err)
		}
		return fwCommand(name, args[1:], c, openStorage, in, out, errw)
	}
	err := dispatch(ctx, args, o, lg, &patientReader{ctx: ctx, src: in}, out)
	if errors.Is(err, context.Canceled) && exitCode(err) == exitFailed {
		err = tryLater("interrupted: %w", err)
	}
	var coded *codedError
	if err != nil && !(errors.As(err, &coded) && coded.err == nil) {
		lg.fail(err)
	}
	return exitCode(err)
}

// patientReader is standard input, which may wait for ever, until the program is told to end.
type patientReader struct {
	ctx context.Context
	src io.Reader
	buf []byte // not the caller's, as a read that is given up may still fill it
}

func (r *patientReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	if r.buf == nil {
		r.buf = make([]byte, 64<<10)
	}
	var n int
	var err error
	done := make(chan struct{})
	go func() {
		n, err = r.src.Read(r.buf[:min(len(p), len(r.buf))])
		close(done)
	}()
	select {
	case <-done:
		return copy(p, r.buf[:n]), err
	case <-r.ctx.Done():
		return 0, context.Cause(r.ctx)
	}
}

func dispatch(ctx context.Context, args []string, o *options, lg *logger, in io.Reader, out io.Writer) error {
	fs := newFlagSet(o)
	if err := fs.Parse(args[1:]); err != nil {
		return usageError("%w; 'mendlet --help' lists what there is", err)
	}
	switch {
	case o.help, o.version:
		general(o, out)
		return nil
	case fs.NArg() == 0:
		return usageError("no verb; 'mendlet --help' lists what there is")
	}
	all := verbs()
	i := slices.IndexFunc(all, func(v verb) bool { return v.name == fs.Arg(0) })
	if hint := leftOut(fs.Arg(0)); i < 0 && hint != "" {
		return withHint(usageError("this mendlet was built without the verb %q", fs.Arg(0)), "%s", hint)
	} else if i < 0 {
		return usageError("unknown verb %q; 'mendlet --help' lists what there is", fs.Arg(0))
	}
	words, err := parseVerb(all[i], fs.Args()[1:], o)
	if err != nil {
		return err
	}
	if o.help {
		return verbHelp(all[i], out)
	}
	a, err := newApp(o, lg, in, out)
	if err != nil {
		return err
	}
	defer a.closeState()
	return all[i].run(ctx, a, words)
}

func newFlagSet(o *options) *flag.FlagSet {
	fs := flag.NewFlagSet("mendlet", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	globalFlags(fs, o)
	return fs
}

func general(o *options, out io.Writer) {
	if o.version {
		fmt.Fprintln(out, versionString())
		return
	}
	var list strings.Builder
	for _, v := range verbs() {
		fmt.Fprintf(&list, "  %-14s %s\n", v.name, v.help)
	}
	fmt.Fprintf(out, usageText, list.String())
}

func verbHelp(v verb, out io.Writer) error {
	fmt.Fprintf(out, "usage: mendlet %s [options] %s\n%s\n", v.name, v.words, v.help)
	fs := flag.NewFlagSet(v.name, flag.ContinueOnError)
	if v.flags != nil {
		v.flags(fs, &options{})
		fmt.Fprintln(out, "\nOptions:")
		fs.VisitAll(func(f *flag.Flag) {
			arg, text := flag.UnquoteUsage(f)
			dashes := "--"
			if len(f.Name) == 1 {
				dashes = "-"
			}
			fmt.Fprintf(out, "  %-26s %s\n", strings.TrimSpace(dashes+f.Name+" "+arg), text)
		})
	}
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
			return nil, usageError("%s: %w; see 'mendlet %s --help'", v.name, err, v.name)
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
	if len(words) != v.args && !o.help {
		return nil, usageError("%s: got %d words, want %d; usage: mendlet %s [options] %s", v.name, len(words), v.args, v.name, v.words)
	}
	return words, nil
}

func (o *options) mainConfig() string {
	if o.config != "" {
		return o.config
	}
	return o.paths.in(o.paths.conf, "mender.conf")
}

func (o *options) fallbackConfig() string {
	if o.fallback != "" {
		return o.fallback
	}
	p := defaultPaths()
	return p.in(p.ds, "mender.conf")
}

func newApp(o *options, lg *logger, in io.Reader, out io.Writer) (*app, error) {
	running := strings.ToLower(o.running)
	if !slices.Contains([]string{"", "a", "b", "none"}, running) {
		return nil, usageError("--running %q: want A, B or none", o.running)
	}
	if !slices.Contains([]string{"", "bar", "lines", "json", "none"}, o.progress) {
		return nil, usageError("--progress %q: want bar, lines, json or none", o.progress)
	}
	if err := setUpLog(o, lg); err != nil {
		return nil, err
	}
	c, err := loadConfig(o.paths, configFile{o.mainConfig(), o.config != ""}, configFile{o.fallbackConfig(), o.fallback != ""}, lg)
	if err != nil {
		return nil, err
	}
	if level, err := parseLevel(c.DaemonLogLevel); err != nil {
		lg.warnf("DaemonLogLevel: %v", err)
	} else if o.logLevel == "" && !o.quiet {
		lg.level = level
	}
	c.SkipVerify = c.SkipVerify || o.skipVerify
	c.extraRoots = o.trusted
	return &app{c: c, lg: lg, o: o, in: in, out: out, openJournal: openJournal,
		m: &machine{running: running, open: openStorage}}, nil
}

func setUpLog(o *options, lg *logger) (err error) {
	if o.quiet {
		lg.level = levelWarning
	}
	if o.logLevel != "" {
		if lg.level, err = parseLevel(o.logLevel); err != nil {
			return err
		}
	}
	var sink logSink
	switch o.log {
	case "stderr":
	case "kmsg":
		sink, err = kmsgSink()
	case "syslog":
		sink, err = syslogSink()
	default:
		return usageError("--log %q: want stderr, kmsg or syslog", o.log)
	}
	if err != nil {
		lg.warnf("--log %s: %v; logging to stderr", o.log, err)
	} else if sink != nil {
		lg.sinks = []logSink{sink}
	}
	if o.logFile != "" {
		f, err := os.OpenFile(o.logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		if err != nil {
			return fmt.Errorf("log file: %w", err)
		}
		lg.sinks = append(lg.sinks, writerSink(f))
	}
	return nil
}

// versionString is a release, "0.1.0", or what comes before it, "0.1.0+d8f7ea9", with ".dirty"
// behind it where files were changed since: build metadata as semver.org, 10, has it.
func versionString() string {
	if version != "" {
		return version
	}
	info, _ := debug.ReadBuildInfo()
	return buildVersion(strings.TrimSpace(release), info)
}

// buildVersion is the version of a program that a plain go build made; info may be nil.
func buildVersion(release string, info *debug.BuildInfo) string {
	if info == nil || strings.Contains(release, "+") {
		return release
	}
	vcs := map[string]string{}
	for _, s := range info.Settings {
		vcs[s.Key] = s.Value
	}
	if hash := vcs["vcs.revision"]; hash != "" {
		release += "+" + hash[:min(len(hash), 7)]
		if vcs["vcs.modified"] == "true" {
			release += ".dirty"
		}
	}
	return release
}
