// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// paths are the directories of a Mender client, from its environment variables or defaults.
type paths struct {
	conf string // MENDER_CONF_DIR: mender.conf, scripts/
	data string // MENDER_DATA_DIR: modules/v3/, identity/, inventory/
	ds   string // MENDER_DATASTORE_DIR, -d: everything that changes
}

//go:noinline
func defaultPaths() paths {
	env := func(name, def string) string {
		if v := os.Getenv(name); v != "" {
			return v
		}
		return def
	}
	return paths{
		conf: env("MENDER_CONF_DIR", "/etc/mender"),
		data: env("MENDER_DATA_DIR", "/usr/share/mender"),
		ds:   env("MENDER_DATASTORE_DIR", "/var/lib/mender"),
	}
}

//go:noinline
func (p paths) in(dir string, name ...string) string {
	return filepath.Join(append([]string{dir}, name...)...)
}

// checkDatastore tells a link to a place that is not there from a datastore that has not been made
// yet: the second is no fault.
func (p paths) checkDatastore() error {
	link, target := danglingLink(p.ds)
	if link == "" {
		return nil
	}
	return withHint(fmt.Errorf("datastore %q: %q is a link to %q, which is not there", p.ds, link, target),
		"mount or make what it leads to; -d names another place")
}

// explainFull says of an error for lack of room that it is the datastore which has none.
func (p paths) explainFull(err error) error {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) || exitCode(err) == exitRefused {
		return err
	}
	how := fullness(p.ds)
	if how == "" {
		return err
	}
	return withHint(fmt.Errorf("datastore %q %s: %w", p.ds, how, err), "make room there, or name another place with -d")
}

type serverEntry struct{ ServerURL string }

type tlsFiles struct{ Certificate, Key, SSLEngine string }

type securityConfig struct{ AuthPrivateKey, SSLEngine string }

// config holds the keys of mender.conf by the names they have there; encoding/json matches
// them without regard to case, as Mender does. The keys of mendlet's own are at the end.
// doc/mender.conf.5 says what each is for.
type config struct {
	ServerURL                       string
	Servers                         []serverEntry
	ServerCertificate               string
	TenantToken                     string
	DeviceTypeFile                  string
	DeviceTier                      string
	UpdatePollIntervalSeconds       int
	InventoryPollIntervalSeconds    int
	RetryPollIntervalSeconds        int
	RetryPollCount                  int
	RetryDownloadCount              int
	StateScriptTimeoutSeconds       int
	StateScriptRetryTimeoutSeconds  int
	StateScriptRetryIntervalSeconds int
	ModuleTimeoutSeconds            int
	ArtifactVerifyKey               string
	ArtifactVerifyKeys              []string
	UpdateLogPath                   string
	DaemonLogLevel                  string
	SkipVerify                      bool
	HttpsClient                     tlsFiles //lint:ignore ST1003 a key of mender.conf
	Security                        securityConfig
	RootfsPartA, RootfsPartB        string
	Connectivity                    struct {
		DisableKeepAlive       bool
		IdleConnTimeoutSeconds int
	}
	BootUtilitiesSetActivePart     string
	BootUtilitiesGetNextActivePart string

	FwEnvConfig    string // path of fw_env.config; mendlet's own
	FwEnvNamespace string // which environment of it, where it has several; mendlet's own
	BootEnv        string // auto, native, fw_setenv, grub; mendlet's own
	Delta          string // auto, off, only; mendlet's own

	Channel         string   // URL or path of a channel file, in the place of a server; mendlet's own
	FleetVerifyKeys []string // what that may be signed with; none: what artifacts may; mendlet's own
	Groups          []string // that the device is in; mendlet's own
	DeviceID        string   // by which it has its place in rollouts; "": its identity; mendlet's own

	ChannelPollIntervalSeconds int // in the place of the channel file's poll; 0: that; mendlet's own

	ConnectAuditLog string // file that has who did what over 'mendlet connect'; "": none; mendlet's own

	MonitorChecks          string   // directory of programs that check something; mendlet's own
	MonitorBuiltin         []string // built-in checks, KIND [OBJECT] [WARN CRITICAL]; mendlet's own
	MonitorTimeoutSeconds  int      // of each; mendlet's own
	MonitorIntervalSeconds int      // in which a daemon runs them; mendlet's own

	paths      paths  `json:"-"`
	broken     error  // of a file in its default place: what it demands is not known
	extraRoots string // -E: more trusted certificates
}

func defaultConfig(p paths) *config {
	return &config{
		DeviceTypeFile:                  p.in(p.ds, "device_type"),
		DeviceTier:                      "standard",
		UpdatePollIntervalSeconds:       1800,
		InventoryPollIntervalSeconds:    28800,
		RetryPollIntervalSeconds:        300,
		RetryDownloadCount:              10,
		StateScriptTimeoutSeconds:       3600,
		StateScriptRetryTimeoutSeconds:  1800,
		StateScriptRetryIntervalSeconds: 60,
		ModuleTimeoutSeconds:            14400,
		UpdateLogPath:                   p.ds,
		DaemonLogLevel:                  "info",
		FwEnvConfig:                     "/etc/fw_env.config",
		BootEnv:                         "auto",
		Delta:                           "auto",
		MonitorChecks:                   "/etc/mendlet/checks.d",
		MonitorTimeoutSeconds:           10,
		MonitorIntervalSeconds:          60,
		paths:                           p,
	}
}

//go:noinline
func seconds(n int) time.Duration { return time.Duration(n) * time.Second }

// configFile names a file to read. A default path may be missing, and an error in it is a
// warning, as with Mender's own client: an unreadable file must not keep a device from
// being repaired. A path that a person gave must be there and be right.
type configFile struct {
	path     string
	explicit bool
}

// loadConfig reads the fallback file, then the main one over it.
func loadConfig(p paths, main, fallback configFile, lg *logger) (*config, error) {
	c := defaultConfig(p)
	for _, f := range []configFile{fallback, main} {
		if err := c.readFile(f, lg); err != nil {
			if !f.explicit && errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if f.explicit {
				return nil, err
			}
			lg.warnf("%v", err)
			c.broken = err
		}
	}
	if err := c.tierErr(); err != nil {
		return nil, err
	}
	c.fillDefaults()
	return c, nil
}

func (c *config) tierErr() error {
	switch c.DeviceTier {
	case "standard", "system", "micro":
		return nil
	}
	return refuse("DeviceTier %q in the configuration: want standard, system or micro", c.DeviceTier)
}

// readFile lays the file's keys over c. Keys that came before an error stay in force.
func (c *config) readFile(f configFile, lg *logger) error {
	path, read := f.path, readPlain
	if f.explicit { // a shell's <(…) is a pipe
		read = os.ReadFile
	}
	text, err := read(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if err := c.parse(text, lg); err != nil {
		return fmt.Errorf("configuration %q: %w", path, err)
	}
	return nil
}

// parse lays the keys of one JSON object over c. A value of the wrong type is ignored with
// a warning and its key keeps what it had.
func (c *config) parse(text []byte, lg *logger) error {
	var keys map[string]json.RawMessage
	if err := parseObject(text, &keys); err != nil {
		return err
	}
	for _, k := range sortedKeys(keys) {
		one, err := json.Marshal(map[string]json.RawMessage{k: keys[k]})
		if err != nil {
			return err
		}
		before := *c
		c.Servers, c.ArtifactVerifyKeys = nil, nil // else their elements would be merged
		var wrong *json.UnmarshalTypeError
		err = json.Unmarshal(one, c)
		if !strings.EqualFold(k, "Servers") || errors.As(err, &wrong) {
			c.Servers = before.Servers
		}
		if !strings.EqualFold(k, "ArtifactVerifyKeys") {
			c.ArtifactVerifyKeys = before.ArtifactVerifyKeys
		}
		switch {
		case errors.As(err, &wrong) && strings.HasPrefix(strings.ToLower(k), "artifactverifykey"):
			// Ignored, it would let unsigned artifacts in. No key can be loaded from here.
			c.ArtifactVerifyKey = fmt.Sprintf("(%s: got %s, want %s)", k, wrong.Value, wrong.Type)
		case errors.As(err, &wrong):
			lg.warnf("configuration key %q ignored: got %s, want %s", k, wrong.Value, wrong.Type)
		case err != nil:
			return err
		}
	}
	return c.check(keys)
}

// check finds contradictions within one file, and between it and what was there before.
func (c *config) check(keys map[string]json.RawMessage) error {
	has := func(name string) bool {
		for k := range keys {
			if strings.EqualFold(k, name) {
				return true
			}
		}
		return false
	}
	switch {
	case has("ServerURL") && has("Servers"):
		return errors.New("both ServerURL and Servers are set: want one")
	case has("ServerURL"):
		c.Servers = nil
	case has("Servers"):
		c.ServerURL = ""
	}
	switch {
	case has("ArtifactVerifyKey") && has("ArtifactVerifyKeys"):
		return errors.New("both ArtifactVerifyKey and ArtifactVerifyKeys are set: want one")
	case has("ArtifactVerifyKey"):
		c.ArtifactVerifyKeys = nil
	case has("ArtifactVerifyKeys") && len(c.ArtifactVerifyKeys) > 0:
		c.ArtifactVerifyKey = ""
	}
	if c.RetryDownloadCount < 1 || c.RetryDownloadCount > 10000 {
		n := c.RetryDownloadCount
		c.RetryDownloadCount = defaultConfig(c.paths).RetryDownloadCount
		return fmt.Errorf("RetryDownloadCount %d: want 1 to 10000", n)
	}
	return nil
}

func (c *config) fillDefaults() {
	def := defaultConfig(c.paths)
	for p, v := range map[*int]int{
		&c.UpdatePollIntervalSeconds:       def.UpdatePollIntervalSeconds,
		&c.InventoryPollIntervalSeconds:    def.InventoryPollIntervalSeconds,
		&c.StateScriptTimeoutSeconds:       def.StateScriptTimeoutSeconds,
		&c.StateScriptRetryTimeoutSeconds:  def.StateScriptRetryTimeoutSeconds,
		&c.StateScriptRetryIntervalSeconds: def.StateScriptRetryIntervalSeconds,
		&c.ModuleTimeoutSeconds:            def.ModuleTimeoutSeconds,
		&c.MonitorTimeoutSeconds:           def.MonitorTimeoutSeconds,
		&c.MonitorIntervalSeconds:          def.MonitorIntervalSeconds,
	} {
		if *p <= 0 {
			*p = v
		}
	}
	if c.ServerURL != "" {
		c.Servers = []serverEntry{{c.ServerURL}}
	}
	seen := map[string]bool{}
	var list []serverEntry
	for _, s := range c.Servers {
		url := strings.TrimRight(s.ServerURL, "/")
		if url != "" && !strings.Contains(url, "://") {
			url = "https://" + url
		}
		if url != "" && !seen[url] {
			seen[url] = true
			list = append(list, serverEntry{url})
		}
	}
	c.Servers = list
}

// verifyKeys are the paths of the keys that artifacts must be signed with; none: unsigned
// artifacts are accepted.
func (c *config) verifyKeys() []string {
	if c.ArtifactVerifyKey != "" {
		return []string{c.ArtifactVerifyKey}
	}
	return c.ArtifactVerifyKeys
}

// deviceKeyPath is where the device key is kept that is made here.
//
//go:noinline
func deviceKeyPath(c *config) string { return c.paths.in(c.paths.ds, "mender-agent.pem") }

// deviceType reads the file of one line "device_type=NAME". Comment lines are skipped.
func (c *config) deviceType() (string, error) {
	text, err := readPlain(c.DeviceTypeFile)
	if err != nil {
		return "", withHint(refuse("device type: %w", err),
			"write device_type=NAME into %q; NAME is what artifacts for this board are made with", c.DeviceTypeFile)
	}
	got := ""
	for _, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		v, ok := strings.CutPrefix(line, "device_type=")
		if !ok || got != "" || strings.TrimSpace(v) == "" {
			return "", refuse("device type file %q: got line %q, want exactly one line device_type=NAME", c.DeviceTypeFile, line)
		}
		got = strings.TrimSpace(v)
	}
	if got == "" {
		return "", refuse("device type file %q: no line device_type=NAME", c.DeviceTypeFile)
	}
	return got, nil
}

// setupFlags are the options of Mender's own "setup" as far as they need nobody to answer
// questions.
type setupFlags struct {
	serverURL, serverCert, tenantToken, deviceType, partA, partB string
	updatePoll, inventoryPoll, retryPoll                         int
	hosted                                                       bool
}

func (s *setupFlags) register(fs *flag.FlagSet) {
	c := defaultConfig(defaultPaths())
	fs.StringVar(&s.serverURL, "server-url", "", "`URL` of the Mender server; it replaces a list of servers")
	fs.BoolVar(&s.hosted, "hosted-mender", false, "use https://hosted.mender.io")
	fs.StringVar(&s.serverCert, "server-cert", "", "`FILE` with a certificate to trust")
	fs.StringVar(&s.tenantToken, "tenant-token", "", "`TOKEN` of the organisation")
	fs.StringVar(&s.deviceType, "device-type", "", "`NAME` that artifacts for this board are made with")
	fs.StringVar(&s.partA, "rootfs-part-a", "", "`DEVICE` of the first root partition")
	fs.StringVar(&s.partB, "rootfs-part-b", "", "`DEVICE` of the second root partition")
	poll := func(p *int, name, what string, unset int) {
		fs.IntVar(p, name, 0, fmt.Sprintf("%s, in `SECONDS` (%d if the configuration has none)", what, unset))
	}
	poll(&s.updatePoll, "update-poll", "time between polls", c.UpdatePollIntervalSeconds)
	poll(&s.inventoryPoll, "inventory-poll", "time between inventories", c.InventoryPollIntervalSeconds)
	poll(&s.retryPoll, "retry-poll", "longest wait after failures", c.RetryPollIntervalSeconds)
}

// write lays the options over the keys that the configuration file has already.
func (s *setupFlags) write(path string, c *config) error {
	keys := map[string]any{}
	text, err := os.ReadFile(path)
	if err == nil {
		err = parseObject(text, &keys)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("configuration %q: %w", path, err)
	}
	if s.hosted {
		s.serverURL = "https://hosted.mender.io"
	}
	for name, v := range map[string]string{"ServerURL": s.serverURL,
		"ServerCertificate": s.serverCert, "TenantToken": s.tenantToken,
		"RootfsPartA": s.partA, "RootfsPartB": s.partB} {
		if v != "" {
			keys[name] = v
		}
	}
	if s.serverURL != "" {
		delete(keys, "Servers")
	}
	for name, v := range map[string]int{"UpdatePollIntervalSeconds": s.updatePoll,
		"InventoryPollIntervalSeconds": s.inventoryPoll,
		"RetryPollIntervalSeconds":     s.retryPoll} {
		if v > 0 {
			keys[name] = v
		}
	}
	if text, err = json.MarshalIndent(keys, "", "  "); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := writeFileDurably(path, append(text, '\n'), 0o600); err != nil { // it may hold a tenant token
		return err
	}
	if s.deviceType == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(c.DeviceTypeFile), 0o755); err != nil {
		return err
	}
	return writeFileDurably(c.DeviceTypeFile, []byte("device_type="+s.deviceType+"\n"), 0o644)
}

// nameHost puts a line for a host and its s3 into a hosts file, in the place of one that is there.
func nameHost(path, ip, host string) error {
	text, err := readPlain(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 1 && f[1] == host {
			lines = append(lines[:i], lines[i+1:]...)
		}
	}
	lines = append(lines, ip+"\t"+host+" s3."+host+"\n")
	return writeFileDurably(path, []byte(strings.Join(lines, "\n")), 0o644)
}

//go:noinline
func isPKCS11(s string) bool { return strings.HasPrefix(s, "pkcs11:") }

func noEngine(key string) error {
	return withHint(refuse("%s: keys in PKCS#11 tokens and SSLEngine are not supported", key),
		"use a key file in PEM form")
}

// assignments reads lines NAME=VALUE as a shell takes them, of values that stand for themselves; bad is the first line
// that is not like that.
func assignments(text string) (vars map[string]string, bad string) {
	vars = map[string]string{}
	for _, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		name, word, ok := strings.Cut(strings.TrimPrefix(line, "export "), "=")
		if value, plain := shellValue(word); ok && plain {
			vars[name] = value
		} else if bad == "" && line != "" && line[0] != '#' {
			bad = line
		}
	}
	return vars, bad
}

// shellValue is what a shell makes of a word, of one that stands for itself: without or in quotes, and in double ones
// with a backslash before what else would mean something.
func shellValue(word string) (value string, ok bool) {
	n := len(word) - 1
	if n < 1 || word[0] != word[n] || word[0] != '"' && word[0] != '\'' {
		return word, !strings.ContainsAny(word, "$`\"' \t\\;&|<>()#*?[~")
	}
	inner := word[1:n]
	if word[0] == '\'' {
		return inner, !strings.Contains(inner, "'")
	}
	const special = "$`\"\\"
	var out []byte
	for i := 0; i < len(inner); i++ {
		c, last := inner[i], i+1 == len(inner)
		switch {
		case strings.IndexByte(special, c) < 0, c == '$' && last: // which is one there, as at the end of a pattern
		case c == '\\' && !last:
			if strings.IndexByte(special, inner[i+1]) >= 0 {
				i++
				c = inner[i]
			}
		default:
			return "", false
		}
		out = append(out, c)
	}
	return string(out), true
}
