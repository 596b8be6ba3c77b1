// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"
)

// release is the version that this source is, or becomes: MAJOR.MINOR.PATCH, and in a source
// tarball of what is not tagged "+HASH" too.
//
//go:embed VERSION
var release string

// version is set by the linker: -X main.version=…; else buildinfo.go adds the commit to release.
var version string

// buildTime is set by the linker to the Unix time of the commit or SOURCE_DATE_EPOCH: the
// clock of a device that runs this cannot be right when it shows less.
var buildTime string

// options are the flags of all verbs.
type options struct {
	config, fallback, logLevel, logFile, log, progress string
	skipVerify, quiet, help, version                   bool
	rebootExitCode, json                               bool
	source, compression                                string // of snapshot
	delta                                              string // auto, off, only; "": as configured
	maxBytes                                           int64  // of index; 0: no limit
	maxPercent                                         float64
	write                                              writeOptions
	stopBefore                                         []string
	net                                                netFlags
	setup                                              setupFlags

	// Of the verbs that deal with a server, or with what stands for one.
	deadline, splay time.Duration
	noReboot, force bool
	atOnce          bool // no wait that earlier runs have left
	passphrase      string
	channel         string // URL or path, in the place of a server
	allowExpired    bool   // of the channel's file

	paths   paths
	trusted string
	running string
	now     func() time.Time // for tests: another clock
}

// verb is a command. args says how many words it takes besides its options, with orMore added how many at least; -1
// hands all words on unparsed.
type verb struct {
	name, words, help string
	args              int
	flags             func(*flag.FlagSet, *options)
	run               func(context.Context, *app, []string) error
}

const orMore = 100

// persona is what the program is when it is called by another name. The zero value is mendlet itself.
type persona struct {
	name    string                        // as in messages; "": mendlet
	list    func([]verb) []verb           // its verbs, made of ours
	flags   func(*flag.FlagSet, *options) // what goes with every verb besides our options
	version string                        // what stands behind ours
	bare    bool                          // without a verb it is helpful
	exit    func(error) int               // its exit codes
}

// errNoVerb: there is no such verb.
var errNoVerb = errors.New("unknown verb")

//go:noinline
func newOptions() *options {
	return &options{paths: defaultPaths(), log: "stderr", write: defaultWriteOptions()}
}

//go:noinline
func (o *options) mainConfig() string {
	if o.config != "" {
		return o.config
	}
	return o.paths.in(o.paths.conf, "mender.conf")
}

//go:noinline
func (o *options) fallbackConfig() string {
	if o.fallback != "" {
		return o.fallback
	}
	p := defaultPaths()
	return p.in(p.ds, "mender.conf")
}

// versionString is a release, "0.1.0", or what comes before it, "0.1.0+d8f7ea9", with ".dirty"
// behind it where files were changed since: build metadata as semver.org, 10, has it.
func versionString() string {
	switch {
	case version == "":
		return strings.TrimSpace(release)
	case !strings.Contains(version, "."): // a bare hash says nothing of old and new
		return strings.TrimSpace(release) + "+" + version
	}
	return version
}

// app is one run of the program: what the flags, the configuration and the machine say.
type app struct {
	c   *config
	m   *machine
	lg  *logger
	o   *options
	out io.Writer // stdout
	in  io.Reader

	openJournal func(ds string, lg *logger) (*journalFile, *record, error)
	wrapHandler func(payloadHandler) payloadHandler // for tests of the tests
	rebootHook  func(context.Context) error         // restarts the machine; nil: really
	urlSource   func(a *app, url string) *source
	inherit     func(a *app, ds *dir) (changed bool, err error) // puts into rec what another client left; nil: nothing
	beside      sideline
	src         *source      // of the artifact being installed
	fetched     atomic.Int64 // bytes of it that came over the network, managed
	j           *journalFile
	rec         *record
	before      *verdict // the last one as this run found it
	reboot      bool     // a standalone update wants one
}

// sideline is what goes on beside updates: monitoring. What has it knows no more of it than this; nil: there is none.
type sideline struct {
	brief func(inventory bool) map[string]string // for status and the report of a channel, or for the inventory
	// tick is for a daemon, between two rounds, with its deploymentSource: it does what is due and says when more is.
	tick func(ctx context.Context, from any) time.Duration
}

//go:noinline
func (a *app) now() time.Time {
	if a.o.now != nil {
		return a.o.now()
	}
	return time.Now()
}

// openState takes the journal for this process and makes sure that the device has a name.
func (a *app) openState() error {
	err := a.c.paths.checkDatastore()
	if err != nil {
		return err
	}
	if a.j, a.rec, err = a.openJournal(a.c.paths.ds, a.lg); err != nil {
		return err
	}
	a.before = a.rec.Last
	return a.nameDevice()
}

// peek reads the journal for a verb that only looks.
func (a *app) peek() (*record, error) {
	if err := a.c.paths.checkDatastore(); err != nil {
		return nil, err
	}
	return peekJournal(a.c.paths.ds, a.lg)
}

// warnStray explains a trial boot of which the journal, in which no update is, knows nothing.
func (a *app) warnStray(ctx context.Context) {
	if a.c.RootfsPartA == "" {
		return
	}
	_, vars, s, err := newRootfs(a, nil).survey(ctx)
	if err != nil {
		return // whoever needs it says so
	}
	if text := strayTrial(vars, s); text != "" {
		a.lg.warnf("%s", text)
	}
}

func (a *app) closeState() {
	if a.src != nil {
		a.src.close()
	}
	if a.j != nil {
		a.j.close()
	}
}

// unknownName is the artifact name of a device that nothing is known about.
const unknownName = "unknown"

// nameDevice gives a device without a stored artifact name one: from what another client left, else
// from the bootstrap artifact, else from the artifact_info file of old clients, else "unknown". The
// bootstrap file is used once and removed in any case.
func (a *app) nameDevice() error {
	d, err := openDir(a.c.paths.ds)
	if err != nil {
		return err
	}
	defer d.Close()
	if a.inherit != nil {
		changed, err := a.inherit(a, d)
		if err == nil && changed {
			err = a.j.save(a.rec)
		}
		if err != nil {
			return err
		}
	}
	if a.rec.Provides["artifact_name"] == "" {
		provides, err := a.readBootstrap(d)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			a.lg.warnf("bootstrap artifact %q ignored: %v", d.in(bootstrapName), err)
		}
		if provides == nil {
			provides = map[string]string{"artifact_name": a.nameFromInfo()}
		}
		a.rec.Provides = provides
		if err := a.j.save(a.rec); err != nil {
			return err
		}
	}
	if err := d.remove(bootstrapName); err != nil && !errors.Is(err, os.ErrNotExist) {
		a.lg.warnf("%v", err)
	}
	return nil
}

const bootstrapName = "bootstrap.mender"

// readBootstrap reads what the bootstrap artifact provides. It is not signed by design: it
// only says what the image it came with is.
func (a *app) readBootstrap(ds *dir) (map[string]string, error) {
	f, err := ds.follow(bootstrapName, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	art, err := openArtifact(f, artifactOptions{lg: a.lg})
	if err != nil {
		return nil, err
	}
	if !art.Empty {
		return nil, fmt.Errorf("it has a payload of type %q", art.PayloadType)
	}
	if err := a.checkCompatible(art); err != nil {
		return nil, err
	}
	if err := checkProvides(nil, art); err != nil {
		return nil, err
	}
	return mergeProvides(nil, art), art.drain()
}

func (a *app) nameFromInfo() string { return cmp.Or(a.info("artifact_name"), unknownName) }

// info is the value of a line KEY=VALUE in artifact_info, which came with the running system; "": there is none.
func (a *app) info(key string) string {
	text, err := os.ReadFile(a.c.paths.in(a.c.paths.conf, "artifact_info"))
	if err == nil {
		for _, line := range strings.Split(string(text), "\n") {
			if value, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok && value != "" {
				return value
			}
		}
	}
	return ""
}

// guessedName tells whether the device has no name, or one that no program has stored before.
func (a *app) guessedName() bool {
	p, last := a.rec.Provides, a.rec.Last
	switch name := p["artifact_name"]; {
	case name == "", name == unknownName:
		return true
	case len(p) > 1 || last != nil && last.Result == "committed":
		return false
	default:
		return name == a.nameFromInfo()
	}
}

// topologyFile is where the orchestrator of a DeviceTier system has what the system is made of.
const topologyFile = "/var/lib/mender-orchestrator/topology.yaml"

// serverType is the type of the device as the server deploys for it: the system's, where it stands for one.
func (a *app) serverType() (string, error) {
	if a.c.DeviceTier != "system" {
		return a.c.deviceType()
	}
	path := a.m.path(topologyFile)
	text, err := os.ReadFile(path)
	for _, line := range strings.Split(string(text), "\n") {
		v, ok := strings.CutPrefix(line, "system_type:")
		v = before(v, " #")
		if v = strings.Trim(v, " \t\r\"'"); ok && v != "" {
			return v, nil
		}
	}
	if err == nil {
		err = fmt.Errorf("%q has no system_type", path)
	}
	return "", withHint(refuse("DeviceTier is system: %w", err),
		"the orchestrator writes it; without one, leave DeviceTier out")
}

// nextBody is the question for a deployment, as a device with these provides asks it.
func (a *app) nextBody(provides map[string]string) ([]byte, error) {
	t, err := a.serverType()
	if err != nil {
		return nil, err
	}
	p := map[string]string{}
	maps.Copy(p, provides)
	p["device_type"] = t // no artifact's to say
	return json.Marshal(map[string]any{"device_provides": p})
}

func (a *app) checkCompatible(art *artifact) error {
	t, err := a.c.deviceType()
	if err != nil {
		return err
	}
	return art.checkDepends(t, a.rec.Provides)
}

func (a *app) checkScripts(art *artifact) error { return newScripts(a.c, a.lg).check(art.Scripts) }

func newRootfs(a *app, u *update) *rootfs {
	return &rootfs{c: a.c, m: a.m, u: u, lg: a.lg, opt: a.writeOptions(), src: a.src, how: cmp.Or(a.o.delta, a.c.Delta),
		save: func() error { return a.j.save(a.rec) }}
}

// newHandler is the handler of a payload type. rootfs-image is built in, and a module of
// that name is not looked at.
func (a *app) newHandler(kind string, u *update) (payloadHandler, error) {
	var h payloadHandler
	if kind == rootfsImage {
		h = newRootfs(a, u)
	} else {
		m, err := newModule(a.c, kind, a.lg)
		if err != nil {
			return nil, err
		}
		t, _ := a.c.deviceType()
		h = moduleHandler{m, treeValues{a.rec.Provides["artifact_name"], a.rec.Provides["artifact_group"], t}}
	}
	if a.wrapHandler != nil {
		h = a.wrapHandler(h)
	}
	return h, nil
}

// moduleHandler is an update module with what it is told about the device.
type moduleHandler struct {
	*module
	current treeValues
}

func (h moduleHandler) prepare(_ context.Context, art *artifact) error {
	return h.makeTree(art, h.current)
}

func (a *app) writeOptions() writeOptions {
	w := a.o.write
	w.progress = newProgress(a.o.progress, a.o.quiet, a.o.log == "stderr", a.out, a.lg)
	return w
}

// newFlow is the flow for the update in the journal, if there is one.
func (a *app) newFlow() (*flow, error) {
	f := &flow{lg: a.lg, j: a.j, mode: standaloneMode, rec: a.rec, newHandler: a.newHandler, deviceType: a.c.deviceType,
		scripts: newScripts(a.c, a.lg), bootID: a.m.bootID, fetch: a.fetch}
	for _, s := range a.o.stopBefore {
		if !slices.Contains(stopPoints, step(s)) {
			return nil, usageError("--stop-before %q: want one of %v", s, stopPoints)
		}
		f.stopBefore = append(f.stopBefore, step(s))
	}
	if u := a.rec.Update; u != nil && u.Type != "" {
		h, err := a.newHandler(u.Type, u)
		if err != nil {
			a.lg.errorf("%v", err) // every state of it will fail; a missing module must not wedge the device
		} else {
			f.handler = h
		}
	}
	return f, nil
}

// openArtifact reads the artifact's header and verifies it.
func (a *app) openArtifact(r io.Reader) (*artifact, error) {
	if a.c.broken != nil { // it may name keys that artifacts must be signed with
		return nil, withHint(refuse("no artifact is opened: %w", a.c.broken),
			"mend the file, or name another one with -c and -b")
	}
	keys, err := loadVerifyKeys(a.c.verifyKeys(), a.lg)
	if err != nil {
		return nil, err
	}
	o := artifactOptions{keys: keys, lg: a.lg, buffer: a.o.write.readAhead}
	if a.src != nil {
		o.manifest = a.src.manifest
	}
	return openArtifact(r, o)
}

// fetch opens the artifact from its start: the one of a.src, else of the update in progress.
func (a *app) fetch(ctx context.Context) (*artifact, error) {
	if a.src == nil {
		a.src = a.source(a.rec.Update.Source)
	}
	r, err := a.src.from(ctx, 0)
	if err != nil {
		return nil, err
	}
	art, err := a.openArtifact(r)
	if errors.Is(err, errNoArtifact) {
		err = fmt.Errorf("%q: %w", a.src.id.Name, err)
	}
	return art, err
}

// lasting is the name of a source in any working directory.
//
//go:noinline
func lasting(source string) string {
	if abs, err := filepath.Abs(source); err == nil && source != "-" && !isURL(source) {
		return abs
	}
	return source
}

// source finds what a person named.
func (a *app) source(name string) *source {
	switch {
	case name == "-":
		return &source{once: true, open: func(ctx context.Context, _ int64, _ sourceID) (io.ReadCloser, sourceID, error) {
			return io.NopCloser(patient(ctx, a.in)), sourceID{Name: name, Size: -1}, nil
		}}
	case isURL(name):
		return a.urlSource(a, name)
	}
	return &source{open: func(ctx context.Context, off int64, want sourceID) (io.ReadCloser, sourceID, error) {
		return openFile(ctx, name, off, want)
	}}
}

// nameUnsaved is nameDevice for a verb that only looks: nothing is saved.
func (a *app) nameUnsaved() {
	d, err := openDir(a.c.paths.ds)
	if err == nil {
		defer d.Close()
		if a.inherit != nil {
			if _, err := a.inherit(a, d); err != nil {
				a.lg.warnf("%v", err)
			}
		}
	}
	if a.rec.Provides["artifact_name"] != "" {
		return
	}
	a.rec.Provides = map[string]string{"artifact_name": a.nameFromInfo()}
	if err == nil {
		if provides, err := a.readBootstrap(d); err == nil {
			a.rec.Provides = provides
		}
	}
}

// rebootMachine restarts the machine and waits for that to take this process along. A
// recovery system has its own way to go on: it gets the exit code.
func rebootMachine(ctx context.Context, a *app) error {
	root, err := a.m.rootMount()
	initramfs := err == nil && ramRoot[root.fstype]
	if a.o.noReboot || initramfs || strings.EqualFold(a.o.running, "none") {
		a.lg.infof("a reboot is needed")
		return &codedError{code: exitReboot}
	}
	a.lg.infof("rebooting")
	err = runChild(ctx, child{what: `program "reboot"`, path: "reboot", dir: "/", timeout: goDown,
		prefix: "reboot output", level: levelInfo, lg: a.lg})
	if err != nil && ctx.Err() == nil {
		a.lg.warnf("%v", err)
		a.lg.warnf("the kernel restarts the machine, and nothing is stopped before: " +
			"file systems are synced and made read-only")
		a.m.quiesce(a.lg)
		if err := syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART); err != nil {
			return fmt.Errorf("reboot: %w", err)
		}
	}
	if err := sleepContext(ctx, goDown); err != nil {
		return tryLater("stopped while the machine goes down: %w", err)
	}
	return fmt.Errorf("still running %v after asking for the reboot", goDown)
}

// goDown is the longest time for a machine to stop.
const goDown = 10 * time.Minute

// textFlag registers an option of several names.
//
//go:noinline
func textFlag(fs *flag.FlagSet, p *string, def, help string, names []string) {
	for _, n := range names {
		fs.StringVar(p, n, def, help)
	}
}

// listFlag collects the values of an option that can be repeated.
//
//go:noinline
func listFlag(l *[]string) func(string) error {
	return func(s string) error {
		*l = append(*l, s)
		return nil
	}
}

func jsonFlag(fs *flag.FlagSet, o *options) {
	fs.BoolVar(&o.json, "json", false, "print JSON")
}

//go:noinline
func keyFlags(fs *flag.FlagSet, o *options) {
	fs.StringVar(&o.passphrase, "passphrase-file", o.passphrase,
		"`FILE` (or -) with the passphrase of the device key")
}

func writeFlags(fs *flag.FlagSet, o *options) {
	fs.BoolVar(&o.write.writeAll, "write-all", false, "write blocks that are already there, too")
	fs.BoolVar(&o.write.noReadBack, "no-read-back", false, "do not read the slot back")
}

// sourceFlags are those of the verbs that fetch an artifact.
func sourceFlags(fs *flag.FlagSet, o *options) {
	fs.StringVar(&o.progress, "progress", "",
		"`HOW` to show it: bar, lines, json (on standard output) or none (a bar on a terminal, else lines)")
	o.net.downloadFlags(fs)
	deltaFlag(fs, &o.delta)
}

// outside is a string that may hold anything. %s gives it plain, %q quoted.
type outside string

func (s outside) Format(f fmt.State, verb rune) {
	text := plain(string(s))
	if verb == 'q' {
		text = quote(string(s))
	}
	fmt.Fprintf(f, fmt.FormatString(f, 's'), text)
}

// printf prints to stdout. Strings among args are taken for ones from outside.
func printf(w io.Writer, format string, args ...any) error {
	for i, a := range args {
		if s, ok := a.(string); ok {
			args[i] = outside(s)
		}
	}
	_, err := fmt.Fprintf(w, format, args...)
	return err
}

// printJSON prints v, with all of it escaped that is not visible: encoding/json leaves some controls
// and what changes the direction of text.
func printJSON(w io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", visibleJSON(text))
	return err
}

// unknownOption is what to say of an error from parsing the options of a verb, or before one.
func unknownOption(fs *flag.FlagSet, verb string, err error) error {
	prefix, see := "", "'mendlet --help' lists what there is"
	if verb != "" {
		prefix, see = verb+": ", fmt.Sprintf("see 'mendlet %s --help'", verb)
	}
	given, unknown := strings.CutPrefix(err.Error(), "flag provided but not defined: -")
	if !unknown {
		return usageError("%s%w; %s", prefix, err, see)
	}
	var names []string
	fs.VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	err = usageError("%sunknown option %q; %s", prefix, dashed(given), see)
	if near := closest(given, names); near != "" {
		err = withHint(err, "did you mean %s?", dashed(near))
	}
	return err
}

// dashed is an option's name as it is written.
//
//go:noinline
func dashed(name string) string { return strings.Repeat("-", min(len(name), 2)) + name }

// flagHelp prints each option with all its names, which have the same text, and its default.
func flagHelp(out io.Writer, fs *flag.FlagSet) {
	names := map[string][]string{}
	fs.VisitAll(func(f *flag.Flag) { names[f.Usage] = append(names[f.Usage], f.Name) })
	fs.VisitAll(func(f *flag.Flag) {
		all := names[f.Usage]
		if all[0] != f.Name {
			return
		}
		var inOrder []string // the shortest first
		for _, n := range all {
			inOrder = append(inOrder, dashed(n))
			for i := len(inOrder) - 1; i > 0 && len(inOrder[i-1]) > len(inOrder[i]); i-- {
				inOrder[i-1], inOrder[i] = inOrder[i], inOrder[i-1]
			}
		}
		all = inOrder
		value, text := flag.UnquoteUsage(f)
		if d := f.DefValue; d != "" && d != "0" && d != "0s" && d != "false" {
			text += " (" + strings.ReplaceAll(strings.Replace(d, "m0s", "m", 1), "h0m", "h") + ")"
		}
		line := fmt.Sprintf("  %-26s", strings.TrimSpace(strings.Join(all, ", ")+" "+value))
		if len(line) > 28 {
			fmt.Fprintln(out, line)
			line = strings.Repeat(" ", 28)
		}
		for _, word := range strings.Fields(text) {
			if utf8.RuneCountInString(line+" "+word) > 80 {
				fmt.Fprintln(out, line)
				line = strings.Repeat(" ", 28)
			}
			line += " " + word
		}
		fmt.Fprintln(out, line)
	})
}

func newApp(o *options, lg *logger, in io.Reader, out io.Writer,
	urlSource func(*app, string) *source) (*app, error) {
	running := strings.ToLower(o.running)
	if !listed([]string{"", "a", "b", "none"}, running) {
		return nil, usageError("--running %q: want A, B or none", o.running)
	}
	if !listed([]string{"", "bar", "lines", "json", "none"}, o.progress) {
		return nil, usageError("--progress %q: want bar, lines, json or none", o.progress)
	}
	if err := setUpLog(o, lg); err != nil {
		return nil, err
	}
	c, err := loadConfig(o.paths, configFile{o.mainConfig(), o.config != ""},
		configFile{o.fallbackConfig(), o.fallback != ""}, lg)
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
	return &app{c: c, lg: lg, o: o, in: in, out: out, openJournal: openJournal, urlSource: urlSource,
		m: newMachine(running)}, nil
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
		// A pipe that nobody reads is an error, and no reason to wait.
		f, err := os.OpenFile(o.logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NONBLOCK, 0o644)
		if err != nil {
			return fmt.Errorf("log file: %w", err)
		}
		lg.sinks = append(lg.sinks, writerSink(f))
	}
	return nil
}

// closest is the name that takes the fewest slips of the hand to become word; "" if that is
// more than one in three letters.
func closest(word string, names []string) (near string) {
	best := 1 + min(len(word)/3, 3)
	for _, n := range names {
		if len(word) > 2*len(n) { // far, and no reason to count
			continue
		}
		if d := slips(word, n); d < best {
			near, best = n, d
		}
	}
	return near
}

// slips counts the letters to add, leave out, change or swap with the next one until a is b.
func slips(a, b string) int {
	var before []int // the row two up
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next := make([]int, len(b)+1)
		next[0] = i
		for j := 1; j <= len(b); j++ {
			next[j] = min(row[j], next[j-1], row[j-1]) + 1
			if a[i-1] == b[j-1] {
				next[j] = row[j-1]
			}
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}

// endEvent is the last line for a program that reads --progress json: how the run ended. Its names and
// words are an interface; the manual has them. a is nil where the run did not get to begin.
func endEvent(out io.Writer, a *app, err error) {
	e := map[string]any{"event": "end", "exit_code": exitCode(err), "result": a.result(err)}
	if a != nil && a.rec != nil {
		e["reboot"] = a.reboot || exitCode(err) == exitReboot
		switch u, last := a.rec.Update, a.rec.Last; {
		case u != nil:
			e["artifact"], e["step"] = u.Artifact, u.Step
		case last != nil && last != a.before:
			e["artifact"] = last.Artifact
		}
	}
	var c *codedError
	if err != nil && !(errors.As(err, &c) && c.err == nil) {
		e["error"] = oneLine(err.Error())
		if h := hintOf(err); h != "" {
			e["hint"] = oneLine(h)
		}
	}
	printEvent(out, e)
}

// result is the outcome of a run in one word.
func (a *app) result(err error) string {
	switch code := exitCode(err); {
	case code == exitRefused:
		return "refused"
	case code == exitTempFail:
		return "try-later"
	case a == nil || a.rec == nil:
		return "failed"
	case a.rec.Update == nil && a.rec.Last != a.before:
		return a.rec.Last.Result
	case code != exitOK && code != exitReboot && code != exitNothing:
		return "failed"
	case a.rec.Update == nil:
		return "nothing"
	case a.rec.Update.Step == stepCommitWait, a.rec.Update.Step == stepReboot:
		return "installed"
	}
	return "stopped"
}

// nextStep says what a person does with an update that the journal has; reboot: the machine has to
// restart before anything else.
//
//go:noinline
func nextStep(u *update, reboot bool) string {
	switch {
	case u.Managed && reboot:
		return "reboot now, then 'mendlet run'"
	case u.Managed:
		return "'mendlet run' goes on with it"
	case u.Step == stepCommitWait && reboot:
		return "reboot now, then 'mendlet commit' (or 'mendlet rollback')"
	case u.Step == stepCommitWait:
		return "'mendlet commit' keeps it, 'mendlet rollback' goes back"
	case u.Step == stepDownload && u.Source == "-":
		return "'mendlet resume' ends it: what came from standard input cannot be read again"
	case u.Step == stepInstallWait, u.Step == stepDownload:
		return "'mendlet resume' goes on with it, 'mendlet rollback' ends it"
	}
	return "'mendlet resume' goes on with it"
}

// stopPoints are what --stop-before takes.
var stopPoints = []step{stepInstall, stepCommit, stepCommitLeave, stepRollback, stepFailure, stepCleanup}

// provides reads what is installed. A device that has no name yet gets it now, if nobody
// else holds the journal.
func (a *app) provides() (map[string]string, error) {
	rec, err := a.peek()
	if err != nil {
		return nil, err
	}
	_, serr := os.Stat(filepath.Join(a.c.paths.ds, bootstrapName))
	if rec.Provides["artifact_name"] != "" || serr != nil || a.openState() != nil {
		a.rec = rec
		a.nameUnsaved()
	}
	return a.rec.Provides, nil
}
