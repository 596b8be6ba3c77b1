// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// toolEnv is an environment that other programs read and write: fw_printenv and fw_setenv,
// or those of grub-mender-grubenv, which are called the same way.
type toolEnv struct {
	print, setter string
	args          []string // for both
	separator     string   // between name and value in a script; "" until it is known
}

const toolTimeout = 2 * time.Minute

func (t *toolEnv) String() string { return fmt.Sprintf("tools, %q and %q", t.print, t.setter) }

func (t *toolEnv) callTool(program, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append(slices.Clone(t.args), args...)...)
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	said := strings.TrimSpace(errs.String())
	if err != nil {
		return "", fmt.Errorf("boot environment: %q: %w: %.200q", program, err, said)
	}
	// Both U-Boot's tools and libubootenv go on with a default environment when no copy is
	// valid, and a change would make that the real one.
	if strings.Contains(strings.ToLower(said), "using default") {
		return "", withHint(refuse("boot environment: no valid copy: %q says %.200q", program, said),
			"compare fw_env.config with the boot loader's configuration; if they agree, have the boot loader save its environment (saveenv)")
	}
	return out.String(), nil
}

func (t *toolEnv) vars() (map[string]string, error) {
	out, err := t.callTool(t.print, "")
	if err != nil {
		return nil, err
	}
	m := map[string]string{}
	for line := range strings.SplitSeq(out, "\n") {
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
// libubootenv skips lines of a form it does not know and reports success.
func (t *toolEnv) set(vars []envVar) error {
	if err := checkEnvVars(vars); err != nil {
		return err
	}
	there, err := t.vars()
	if err != nil {
		return err
	}
	vars = lastOfEach(vars)
	if len(envDiff(vars, there)) == 0 {
		return nil
	}
	if err := t.probe(there); err != nil {
		return err
	}
	script := vars
	if t.separator == " " {
		script = append(slices.Clone(vars), envVar{envProbe, ""})
	}
	if err := t.script(script); err != nil {
		return err
	}
	if there, err = t.vars(); err != nil {
		return err
	}
	if m := envDiff(vars, there); len(m) > 0 {
		return fmt.Errorf("boot environment: %q reported success, but %s is %q, want %q", t.setter, m[0].name, there[m[0].name], m[0].value)
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
func (t *toolEnv) probe(there map[string]string) error {
	if t.separator != "" {
		return nil
	}
	if there[envProbe] != "1" {
		t.separator = " "
		err := t.script([]envVar{{envProbe, "1"}})
		t.separator = ""
		if err != nil {
			return err
		}
		if there, err = t.vars(); err != nil {
			return err
		}
	}
	t.separator = "="
	if there[envProbe] == "1" {
		t.separator = " "
	}
	return nil
}

func (t *toolEnv) script(vars []envVar) error {
	var b strings.Builder
	for _, v := range vars {
		line := v.name + t.separator + v.value
		b.WriteString(strings.TrimSuffix(line, " ") + "\n")
	}
	_, err := t.callTool(t.setter, b.String(), "-s", "-")
	return err
}

func findFwTools(c *config) (bootEnv, error) {
	env, err := findTools(c, "fw_printenv", "fw_setenv")
	if err == nil && c.FwEnvConfig != "" && c.FwEnvConfig != defaultConfig(paths{}).FwEnvConfig {
		env.args = []string{"-c", c.FwEnvConfig}
	}
	return env, err
}

// findTools looks for the two programs in PATH; names in the configuration go first.
func findTools(c *config, print, set string) (*toolEnv, error) {
	t := &toolEnv{}
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
			return nil, refuse("boot environment: program %q: %w", name, errors.Unwrap(err))
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
func envCommand(args []string, env bootEnv, out io.Writer) error {
	if len(args) > 0 && args[0] == "print" {
		names := args[1:]
		bare := len(names) > 0 && names[0] == "-n"
		if bare {
			names = names[1:]
		}
		missing, err := printEnv(env, names, bare, plain, out)
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
	return env.set(vars)
}

// printEnv prints the variables named, or all of them, and gives back those not set. Each
// value ends with a line feed, with bare too; a bare value is as it is, for programs. The rest
// goes through show.
func printEnv(env bootEnv, names []string, bare bool, show func(string) string, out io.Writer) (missing []string, err error) {
	there, err := env.vars()
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(there))
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
	script string // -s: a file, or "-"
	bare   bool   // -n
	help   bool   // -h, -V
	args   []string
}

// parseFwArgs: options end at the first argument of fw_setenv that is none, so that a value
// may begin with "-". What only concerns default environments and locks (-f, -l, -m) is
// taken and not used.
func parseFwArgs(set bool, args []string) (fwCall, error) {
	var f fwCall
	takes := map[string]*string{"-c": &f.config, "--config": &f.config, "-s": &f.script, "--script": &f.script}
	for _, ignored := range []string{"-f", "--defenv", "-l", "--lock", "-m", "--namespace"} {
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
usage: fw_printenv [-c FILE] [-n] [NAME...]
       fw_setenv [-c FILE] NAME [VALUE...]
       fw_setenv [-c FILE] -s FILE|-
`

// fwCommand is mendlet called as fw_printenv or fw_setenv (the base name of argv0). It gives
// the exit code, 0 or 1 as theirs. It is always native: the tools may be links to this.
func fwCommand(argv0 string, args []string, c *config, in io.Reader, out, errOut io.Writer, lg *logger) int {
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
	env, err := openBootEnv(&native, openStorage, lg)
	if err != nil {
		lg.fail(err)
		return exitFailed
	}
	if set {
		err = fwSet(env, f, in)
	} else {
		var missing []string
		missing, err = printEnv(env, f.args, f.bare, strings.Clone, out)
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

func fwSet(env bootEnv, f fwCall, in io.Reader) error {
	if f.script == "" {
		return env.set([]envVar{{f.args[0], strings.Join(f.args[1:], " ")}})
	}
	if f.script != "-" {
		file, err := os.Open(f.script)
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
	return env.set(parseFwScript(string(text)))
}

// parseFwScript takes both forms of lines, "name=value" and "name value": what comes first,
// "=" or a blank, ends the name. A name alone unsets.
func parseFwScript(text string) []envVar {
	var vars []envVar
	for line := range strings.SplitSeq(text, "\n") {
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
func openBootEnv(c *config, open envOpen, lg *logger) (bootEnv, error) {
	switch c.BootEnv {
	case "auto", "":
		return autoBootEnv(c, open, lg)
	case "native":
		copies, err := readEnvConfig(c.FwEnvConfig)
		if err != nil {
			return nil, err
		}
		if d := charDevice(copies); d != "" {
			return nil, withHint(refuse("boot environment: %q is a character device (raw MTD or UBI), which BootEnv native cannot write", d),
				"set BootEnv to fw_setenv, and have fw_printenv and fw_setenv in PATH")
		}
		return newNativeEnv(c.FwEnvConfig, copies, open, lg), nil
	case "fw_setenv":
		return findFwTools(c)
	case "grub":
		return findTools(c, "grub-mender-grubenv-print", "grub-mender-grubenv-set")
	}
	return nil, refuse("BootEnv %q in the configuration: want auto, native, fw_setenv or grub", c.BootEnv)
}

func autoBootEnv(c *config, open envOpen, lg *logger) (bootEnv, error) {
	if c.BootUtilitiesGetNextActivePart != "" && filepath.Base(c.BootUtilitiesGetNextActivePart) != "fw_printenv" {
		return findTools(c, "", "") // someone chose it with care
	}
	copies, cerr := readEnvConfig(c.FwEnvConfig)
	if cerr == nil {
		if d := charDevice(copies); d != "" {
			env, err := findFwTools(c)
			if err != nil {
				return nil, refuse("boot environment: %q is a character device (raw MTD or UBI), which is left to the tools: %w", d, err)
			}
			return env, nil
		}
		if canOpenAny(copies, open) {
			return newNativeEnv(c.FwEnvConfig, copies, open, lg), nil
		}
	}
	grub, gerr := openBootEnv(&config{BootEnv: "grub"}, open, lg)
	if gerr == nil {
		return grub, nil
	}
	if cerr == nil {
		return newNativeEnv(c.FwEnvConfig, copies, open, lg), nil // its first use says what is missing
	}
	if !errors.Is(cerr, fs.ErrNotExist) {
		return nil, cerr // the tools would read the same file
	}
	env, ferr := findFwTools(c)
	if ferr == nil {
		return env, nil
	}
	return nil, withHint(refuse("no boot environment found; tried: native: %w; grub: %w; fw_setenv: %w", cerr, gerr, ferr),
		"write %q with a line DEVICE OFFSET SIZE for each copy of the U-Boot environment, or set FwEnvConfig or BootEnv in the configuration", c.FwEnvConfig)
}
