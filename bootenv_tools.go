// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// toolEnv is an environment that other programs read and write: fw_printenv and fw_setenv,
// or those of grub-mender-grubenv, which are called the same way.
type toolEnv struct {
	*envHost
	print, setter string
	args          []string // for both
	separator     string   // between name and value in a script; "" until it is known
	devices       []string // where they keep it, as far as that is known
	missing       string   // their fw_env.config, if it is not there
}

// toolTimeout bounds a call: a tool waits for its lock for ever.
const toolTimeout = 2 * time.Minute

func (t *toolEnv) String() string { return fmt.Sprintf("tools, %q and %q", t.print, t.setter) }

func (t *toolEnv) callTool(ctx context.Context, program, stdin string, args ...string) (string, error) {
	timed, cancel := context.WithTimeout(ctx, toolTimeout)
	defer cancel()
	cmd := exec.CommandContext(timed, program, append(slices.Clone(t.args), args...)...)
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	said := strings.TrimSpace(errs.String())
	switch {
	case ctx.Err() != nil:
		return "", tryLater("interrupted: %w", context.Cause(ctx))
	case timed.Err() != nil:
		return "", tryLater("boot environment: %q has not ended after %v: %.200q", program, toolTimeout, said)
	case err != nil:
		return "", fmt.Errorf("boot environment: %q: %w: %.200q", program, err, said)
	}
	// Both U-Boot's tools and libubootenv go on with a default environment when no copy is
	// valid, and a change would make that the real one.
	if strings.Contains(strings.ToLower(said), "using default") {
		return "", withHint(refuse("boot environment: no valid copy: %q says %.200q", program, said),
			"compare fw_env.config with the boot loader's configuration, and look into the kernel's log for errors "+
				"of its medium; if there are none, have the boot loader save its environment (saveenv)")
	}
	return out.String(), nil
}

// vars asks again when the tool fails, since it does not say whether that may pass; nor does it tell
// a copy that it could not read from a bad one.
func (t *toolEnv) vars(ctx context.Context) (map[string]string, error) {
	out, err := t.callTool(ctx, t.print, "")
	if err != nil && t.missing != "" && !isTemporary(err) {
		return nil, describeEnv(refuse("%w (there is no %q)", err, t.missing), t.missing)
	}
	for i, wait := range envReads {
		if err == nil || ctx.Err() != nil {
			break
		}
		if i == 0 {
			t.lg.warnf("%v; trying again", err)
		}
		if err := t.sleep(ctx, wait); err != nil {
			return nil, tryLater("interrupted: %w", err)
		}
		out, err = t.callTool(ctx, t.print, "")
	}
	if err != nil && exitCode(err) != exitRefused {
		err = tryLater("%w", err)
	}
	if err != nil {
		return nil, err
	}
	m := map[string]string{}
	for _, line := range strings.Split(out, "\n") {
		if name, value, ok := strings.Cut(line, "="); ok {
			m[name] = value
		}
	}
	return m, nil
}

// envDiff gives those of vars that differ from what is there.
func envDiff(vars []envVar, there map[string]string) []envVar {
	return slices.DeleteFunc(slices.Clone(vars), func(v envVar) bool { return there[v.name] == v.value })
}

// set changes all variables by one call, since only that is atomic, and reads them back:
// libubootenv skips lines of a form it does not know and reports success. What writes is not
// cut off in the middle; it has its time-out.
func (t *toolEnv) set(ctx context.Context, vars []envVar) error {
	if err := checkEnvVars(vars); err != nil {
		return err
	}
	there, err := t.vars(ctx)
	if err != nil {
		return err
	}
	vars = lastOfEach(vars)
	if len(envDiff(vars, there)) == 0 {
		return nil
	}
	if err := t.change(context.WithoutCancel(ctx), vars, there); err != nil {
		return &envChangeError{err}
	}
	return nil
}

func (t *toolEnv) change(ctx context.Context, vars []envVar, there map[string]string) error {
	if err := t.probe(ctx, there); err != nil {
		return err
	}
	script := vars
	if t.separator == " " {
		script = append(slices.Clone(vars), envVar{envProbe, ""})
	}
	if err := t.script(ctx, script); err != nil {
		return err
	}
	there, err := t.vars(ctx)
	if err != nil {
		return err
	}
	if m := envDiff(vars, there); len(m) > 0 {
		return fmt.Errorf("boot environment: %q reported success, but %s is %q, want %q",
			t.setter, m[0].name, there[m[0].name], m[0].value)
	}
	return nil
}

// check opens the devices that the tools would write. That both tools are there is known already.
func (t *toolEnv) check(ctx context.Context, vars []envVar) error {
	if err := checkEnvVars(vars); err != nil {
		return err
	}
	if _, err := t.vars(ctx); err != nil {
		return err
	}
	for _, d := range t.devices {
		f, err := os.OpenFile(d, os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err == nil {
			f.Close()
		} else if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) { // others may be the tools' to know
			return refuse("boot environment: %q cannot be written: %w", d, err)
		}
	}
	return nil
}

// lastOfEach drops what a later setting of the same name overrides.
func lastOfEach(vars []envVar) []envVar {
	var out []envVar
	for i, v := range vars {
		if !slices.ContainsFunc(vars[i+1:], func(w envVar) bool { return w.name == v.name }) {
			out = append(out, v)
		}
	}
	return out
}

// envProbe is the variable that Mender's client, too, finds out the separator with.
const envProbe = "mender_uboot_separator"

// probe finds out the form of script lines: U-Boot's fw_setenv wants "name value",
// libubootenv's "name=value" and ignores others.
func (t *toolEnv) probe(ctx context.Context, there map[string]string) error {
	if t.separator != "" {
		return nil
	}
	if there[envProbe] != "1" {
		t.separator = " "
		err := t.script(ctx, []envVar{{envProbe, "1"}})
		t.separator = ""
		if err != nil {
			return err
		}
		if there, err = t.vars(ctx); err != nil {
			return err
		}
	}
	t.separator = "="
	if there[envProbe] == "1" {
		t.separator = " "
	}
	return nil
}

func (t *toolEnv) script(ctx context.Context, vars []envVar) error {
	var b strings.Builder
	for _, v := range vars {
		line := v.name + t.separator + v.value
		b.WriteString(strings.TrimSuffix(line, " ") + "\n")
	}
	_, err := t.callTool(ctx, t.setter, b.String(), "-s", "-")
	return err
}

// findFwTools looks for U-Boot's tools; cfg is nil where no fw_env.config is known.
func findFwTools(c *config, cfg *envConfig, h *envHost) (bootEnv, error) {
	env, err := findTools(c, h, "fw_printenv", "fw_setenv")
	if err != nil {
		return nil, err
	}
	if c.FwEnvConfig != "" && c.FwEnvConfig != defaultConfig(paths{}).FwEnvConfig {
		env.args = []string{"-c", c.FwEnvConfig}
	}
	if c.FwEnvNamespace != "" {
		env.args = append(env.args, "-m", c.FwEnvNamespace)
	}
	if _, err := os.Stat(c.FwEnvConfig); errors.Is(err, fs.ErrNotExist) {
		env.missing = c.FwEnvConfig
	}
	if cfg != nil {
		for _, x := range cfg.copies {
			env.devices = append(env.devices, x.path)
		}
	}
	return env, nil
}

// findTools looks for the two programs in PATH; names in the configuration go first.
func findTools(c *config, h *envHost, print, set string) (*toolEnv, error) {
	t := &toolEnv{envHost: h}
	for _, p := range []struct {
		name, def string
		found     *string
	}{
		{c.BootUtilitiesGetNextActivePart, print, &t.print},
		{c.BootUtilitiesSetActivePart, set, &t.setter},
	} {
		name := p.name
		if name == "" {
			name = p.def
		}
		file, err := exec.LookPath(name)
		if err != nil {
			return nil, withHint(refuse("boot environment: program %q: %w", name, errors.Unwrap(err)),
				"install it, or set BootEnv in the configuration to what this device has")
		}
		if isSelf(file) {
			return nil, refuse("boot environment: program %q is a link to mendlet itself", file)
		}
		*p.found = file
	}
	if strings.HasPrefix(filepath.Base(t.setter), "grub-mender-grubenv-") {
		t.separator = "="
	}
	return t, nil
}

// isSelf keeps mendlet from calling itself without end where it is installed as fw_setenv.
func isSelf(file string) bool {
	a, err := os.Stat("/proc/self/exe")
	if err != nil {
		return false
	}
	b, err := os.Stat(file)
	return err == nil && os.SameFile(a, b)
}

// envCommand is "mendlet env": print [-n] [NAME...] or set NAME=VALUE...
func envCommand(ctx context.Context, args []string, env bootEnv, out io.Writer) error {
	if len(args) > 0 && args[0] == "print" {
		names := args[1:]
		bare := len(names) > 0 && names[0] == "-n"
		if bare {
			names = names[1:]
		}
		missing, err := printEnv(ctx, env, names, bare, plain, out)
		if err == nil && len(missing) > 0 {
			err = fmt.Errorf("boot environment: %q is not set", missing)
		}
		return err
	}
	if len(args) < 2 || args[0] != "set" {
		return usageError("usage: mendlet env print [-n] [NAME...] | set NAME=VALUE...")
	}
	var vars []envVar
	for _, a := range args[1:] {
		name, value, ok := strings.Cut(a, "=")
		if !ok {
			return usageError("env set: got %q, want NAME=VALUE, or NAME= to unset", a)
		}
		vars = append(vars, envVar{name, value})
	}
	return env.set(ctx, vars)
}

// printEnv prints the variables named, or all of them, and gives back those not set. Each
// value ends with a line feed, with bare too; a bare value is as it is, for programs. The rest
// goes through show.
func printEnv(ctx context.Context, env bootEnv, names []string, bare bool, show func(string) string,
	out io.Writer) (missing []string, err error) {
	there, err := env.vars(ctx)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		names = sortedKeys(there)
	}
	var b strings.Builder
	for _, n := range names {
		v, ok := there[n]
		if !ok {
			missing = append(missing, n)
			continue
		}
		if bare {
			b.WriteString(v + "\n")
		} else {
			b.WriteString(show(n) + "=" + show(v) + "\n")
		}
	}
	_, err = io.WriteString(out, b.String())
	return missing, err
}

// fwCall is a call of mendlet by the name fw_printenv or fw_setenv, with options as those
// of U-Boot and libubootenv have them.
type fwCall struct {
	config string // -c
	name   string // -m: which environment of a file that has several
	script string // -s: a file, or "-"
	bare   bool   // -n
	help   bool   // -h, -V
	args   []string
}

// parseFwArgs: options end at the first argument of fw_setenv that is none, so that a value
// may begin with "-". What only concerns default environments and locks (-f, -l) is taken and
// not used.
func parseFwArgs(set bool, args []string) (fwCall, error) {
	var f fwCall
	takes := map[string]*string{"-c": &f.config, "--config": &f.config, "-s": &f.script, "--script": &f.script,
		"-m": &f.name, "--namespace": &f.name}
	for _, ignored := range []string{"-f", "--defenv", "-l", "--lock"} {
		takes[ignored] = new(string)
	}
	for i := 0; i < len(args); i++ {
		a := args[i]
		name, value, joined := strings.Cut(a, "=")
		if !strings.HasPrefix(a, "--") && len(a) > 2 {
			name, value, joined = a[:2], a[2:], true
		}
		switch {
		case a == "--":
			f.args = append(f.args, args[i+1:]...)
			return f, nil
		case len(a) < 2 || a[0] != '-':
			if f.args = append(f.args, a); set {
				f.args = args[i:]
				return f, nil
			}
		case a == "-n" || a == "--no-header" || a == "--noheader":
			f.bare = true
		case a == "-h" || a == "--help" || a == "-V" || a == "--version":
			f.help = true
		case takes[name] != nil && joined:
			*takes[name] = value
		case takes[name] != nil && i+1 < len(args):
			i++
			*takes[name] = args[i]
		default:
			return f, fmt.Errorf("option %q: unknown or without its value", a)
		}
	}
	return f, nil
}

const fwUsage = `fw_printenv and fw_setenv of mendlet: the U-Boot environment
usage: fw_printenv [-c FILE] [-m NAMESPACE] [-n] [NAME...]
       fw_setenv [-c FILE] [-m NAMESPACE] NAME [VALUE...]
       fw_setenv [-c FILE] [-m NAMESPACE] -s FILE|-
`

// fwCommand is mendlet called as fw_printenv or fw_setenv (the base name of argv0). It gives
// the exit code, 0 or 1 as theirs. It is always native: the tools may be links to this.
func fwCommand(ctx context.Context, argv0 string, args []string, c *config,
	open func(*config, *logger) (bootEnv, error), in io.Reader, out, errOut io.Writer, lg *logger) int {
	set := filepath.Base(argv0) == "fw_setenv"
	f, err := parseFwArgs(set, args)
	if f.help {
		io.WriteString(out, fwUsage)
		return exitOK
	}
	if err != nil || set && f.script == "" && len(f.args) == 0 {
		fmt.Fprint(errOut, fwUsage)
		return exitFailed
	}
	native := *c
	native.BootEnv = "native"
	if f.config != "" {
		native.FwEnvConfig = f.config
	}
	if f.name != "" {
		native.FwEnvNamespace = f.name
	}
	env, err := open(&native, lg)
	if err != nil {
		lg.fail(err)
		return exitFailed
	}
	if set {
		err = fwSet(ctx, env, f, in)
	} else {
		var missing []string
		missing, err = printEnv(ctx, env, f.args, f.bare, strings.Clone, out)
		for _, n := range missing {
			fmt.Fprintf(errOut, "## Error: %q not defined\n", n)
		}
		if len(missing) > 0 && err == nil {
			return exitFailed
		}
	}
	if err != nil {
		lg.fail(err)
		return exitFailed
	}
	return exitOK
}

func fwSet(ctx context.Context, env bootEnv, f fwCall, in io.Reader) error {
	if f.script == "" {
		return env.set(ctx, []envVar{{f.args[0], strings.Join(f.args[1:], " ")}})
	}
	if f.script != "-" {
		file, err := openWaiting(ctx, f.script)
		if err != nil {
			return err
		}
		defer file.Close()
		in = file
	}
	text, err := io.ReadAll(io.LimitReader(in, envSizeMax+1))
	if err != nil {
		return fmt.Errorf("script %q: %w", f.script, err)
	}
	if len(text) > envSizeMax {
		return refuse("script %q: longer than any environment (%d bytes)", f.script, envSizeMax)
	}
	return env.set(ctx, parseFwScript(string(text)))
}

// parseFwScript takes both forms of lines, "name=value" and "name value": what comes first,
// "=" or a blank, ends the name. A name alone unsets.
func parseFwScript(text string) []envVar {
	var vars []envVar
	for _, line := range strings.Split(text, "\n") {
		line = strings.TrimLeft(strings.TrimRight(line, "\r"), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.IndexAny(line, "= \t")
		switch {
		case i < 0:
			vars = append(vars, envVar{line, ""})
		case line[i] == '=':
			vars = append(vars, envVar{line[:i], line[i+1:]})
		default:
			vars = append(vars, envVar{line[:i], strings.TrimLeft(line[i:], " \t")})
		}
	}
	return vars
}

// openBootEnv finds the environment that c.BootEnv asks for. "auto" is native where
// fw_env.config names block devices or files, since only then every step is under control;
// no valid copy there is an error of that environment, and not a reason to let a tool build
// a new one on its defaults.
func openBootEnv(c *config, h *envHost) (bootEnv, error) {
	switch c.BootEnv {
	case "auto", "":
		return autoBootEnv(c, h)
	case "native":
		cfg, err := readEnvConfig(c.FwEnvConfig, c.FwEnvNamespace, h)
		if err != nil {
			return nil, err
		}
		if d := charDevice(cfg.copies); d != "" {
			return nil, withHint(refuse("boot environment: %q is a character device (raw MTD or UBI), which BootEnv native "+
				"cannot write", d),
				"set BootEnv to fw_setenv, and have fw_printenv and fw_setenv in PATH")
		}
		return newNativeEnv(cfg, h), nil
	case "fw_setenv":
		cfg, _ := readEnvConfig(c.FwEnvConfig, c.FwEnvNamespace, h) // the tools may know more forms of it
		return findFwTools(c, cfg, h)
	case "grub":
		return findTools(c, h, "grub-mender-grubenv-print", "grub-mender-grubenv-set")
	}
	return nil, refuse("BootEnv %q in the configuration: want auto, native, fw_setenv or grub", c.BootEnv)
}

func autoBootEnv(c *config, h *envHost) (bootEnv, error) {
	if c.BootUtilitiesGetNextActivePart != "" && filepath.Base(c.BootUtilitiesGetNextActivePart) != "fw_printenv" {
		return findTools(c, h, "", "") // someone chose it with care
	}
	cfg, cerr := readEnvConfig(c.FwEnvConfig, c.FwEnvNamespace, h)
	if cerr == nil {
		if d := charDevice(cfg.copies); d != "" {
			env, err := findFwTools(c, cfg, h)
			if err != nil {
				return nil, refuse("boot environment: %q is a character device (raw MTD or UBI), which is left to the "+
					"tools: %w", d, err)
			}
			return env, nil
		}
		if canOpenAny(cfg.copies, h) {
			return newNativeEnv(cfg, h), nil
		}
	}
	if exitCode(cerr) == exitTempFail {
		return nil, cerr // nothing is known yet that could speak for another way
	}
	grub, gerr := openBootEnv(&config{BootEnv: "grub"}, h)
	if gerr == nil {
		return grub, nil
	}
	if cerr == nil {
		return newNativeEnv(cfg, h), nil // its first use says what is missing
	}
	if !errors.Is(cerr, fs.ErrNotExist) || errors.Is(cerr, errNotThere) {
		return nil, cerr // the tools would read the same file
	}
	env, ferr := findFwTools(c, nil, h)
	if ferr == nil {
		return env, nil
	}
	err := refuse("no boot environment found; tried: native: %w; grub: %w; fw_setenv: %w", cerr, gerr, ferr)
	return nil, describeEnv(err, c.FwEnvConfig)
}

func canOpenAny(copies []envCopy, h *envHost) bool {
	for _, c := range copies {
		if s, err := h.open(c.path, openRead); err == nil {
			s.Close()
			return true
		} else if !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}
