// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

var testPaths = paths{conf: "/c", data: "/d", ds: "/s"}

// loaded lays a main file over a fallback, both at default paths, and says what was warned.
func loaded(t testing.TB, fallback, main string) (*config, string, error) {
	t.Helper()
	var said bytes.Buffer
	file := func(text string) configFile {
		if text == "" {
			return configFile{path: filepath.Join(t.TempDir(), "absent.conf")}
		}
		return configFile{path: writeTemp(t, "mender.conf", []byte(text))}
	}
	c, err := loadConfig(testPaths, file(main), file(fallback),
		&logger{level: levelInfo, sinks: []logSink{writerSink(&said)}})
	return c, said.String(), err
}

// Every key of Mender's configuration, with a value that is not the default.
const everyKey = `{
 "ServerURL": "https://a.example/", "ServerCertificate": "/cert", "TenantToken": "tok", "DeviceTypeFile": "/type",
 "DeviceTier": "micro",
 "UpdatePollIntervalSeconds": 1, "InventoryPollIntervalSeconds": 2, "RetryPollIntervalSeconds": 3,
 "RetryPollCount": 4, "RetryDownloadCount": 5,
 "StateScriptTimeoutSeconds": 6, "StateScriptRetryTimeoutSeconds": 7, "StateScriptRetryIntervalSeconds": 8,
 "ModuleTimeoutSeconds": 9,
 "ArtifactVerifyKey": "/key", "UpdateLogPath": "/log", "DaemonLogLevel": "debug", "SkipVerify": true,
 "HttpsClient": {"Certificate": "/hc", "Key": "/hk", "SSLEngine": "e1"}, "Security": {"AuthPrivateKey": "/ak",
 "SSLEngine": "e2"},
 "RootfsPartA": "/dev/a2", "RootfsPartB": "/dev/a3", "Connectivity": {"DisableKeepAlive": true,
 "IdleConnTimeoutSeconds": 10},
 "BootUtilitiesSetActivePart": "set", "BootUtilitiesGetNextActivePart": "get", "FwEnvConfig": "/fw",
 "FwEnvNamespace": "name", "BootEnv": "grub", "Delta": "only",
 "Channel": "https://c.example/c.fleet", "FleetVerifyKeys": ["/fk"], "Groups": ["lab"], "DeviceID": "d1",
 "ChannelPollIntervalSeconds": 13,
 "ConnectAuditLog": "/audit",
 "MonitorChecks": "/checks", "MonitorBuiltin": ["load"], "MonitorTimeoutSeconds": 11, "MonitorIntervalSeconds": 12
}`

func TestConfigKeys(t *testing.T) {
	want := defaultConfig(testPaths)
	want.ServerURL, want.Servers = "https://a.example/", []serverEntry{{"https://a.example"}}
	want.ServerCertificate, want.TenantToken, want.DeviceTypeFile, want.DeviceTier = "/cert", "tok", "/type", "micro"
	want.UpdatePollIntervalSeconds, want.InventoryPollIntervalSeconds, want.RetryPollIntervalSeconds = 1, 2, 3
	want.RetryPollCount, want.RetryDownloadCount = 4, 5
	want.StateScriptTimeoutSeconds, want.StateScriptRetryTimeoutSeconds, want.StateScriptRetryIntervalSeconds,
		want.ModuleTimeoutSeconds = 6, 7, 8, 9
	want.ArtifactVerifyKey, want.UpdateLogPath, want.DaemonLogLevel, want.SkipVerify = "/key", "/log", "debug", true
	want.HttpsClient, want.Security = tlsFiles{"/hc", "/hk", "e1"}, securityConfig{"/ak", "e2"}
	want.RootfsPartA, want.RootfsPartB = "/dev/a2", "/dev/a3"
	want.Connectivity.DisableKeepAlive, want.Connectivity.IdleConnTimeoutSeconds = true, 10
	want.BootUtilitiesSetActivePart, want.BootUtilitiesGetNextActivePart = "set", "get"
	want.FwEnvConfig, want.FwEnvNamespace, want.BootEnv, want.Delta = "/fw", "name", "grub", "only"
	want.Channel, want.FleetVerifyKeys, want.Groups, want.DeviceID = "https://c.example/c.fleet", []string{"/fk"},
		[]string{"lab"}, "d1"
	want.ChannelPollIntervalSeconds = 13
	want.ConnectAuditLog = "/audit"
	want.MonitorChecks, want.MonitorBuiltin, want.MonitorTimeoutSeconds, want.MonitorIntervalSeconds = "/checks",
		[]string{"load"}, 11, 12
	for _, text := range []string{everyKey, lowerKeys(t, strings.ToLower), lowerKeys(t, strings.ToUpper)} {
		c, said, err := loaded(t, "", text)
		if err != nil || said != "" || !reflect.DeepEqual(c, want) {
			t.Errorf("got %+v\nwant %+v\n%v %s", c, want, err, said)
		}
	}
	// No key of the structure is left out above but those that exclude others.
	v, d := reflect.ValueOf(*want), reflect.ValueOf(*defaultConfig(testPaths))
	for i := range v.NumField() {
		if n := v.Type().Field(i).Name; v.Type().Field(i).IsExported() &&
			reflect.DeepEqual(v.Field(i).Interface(), d.Field(i).Interface()) && n != "ArtifactVerifyKeys" {
			t.Errorf("key %s is not tested", n)
		}
	}
}

// lowerKeys changes the case of the keys of everyKey.
func lowerKeys(t *testing.T, to func(string) string) string {
	var walk func(v any) any
	walk = func(v any) any {
		m, ok := v.(map[string]any)
		if !ok {
			return v
		}
		out := map[string]any{}
		for k, x := range m {
			out[to(k)] = walk(x)
		}
		return out
	}
	var m any
	if err := json.Unmarshal([]byte(everyKey), &m); err != nil {
		t.Fatal(err)
	}
	text, _ := json.Marshal(walk(m))
	return string(text)
}

func TestConfigDefaults(t *testing.T) {
	want := defaultConfig(testPaths)
	for _, text := range []string{"", "{}", `{"UpdatePollIntervalSeconds":0,` +
		`"InventoryPollIntervalSeconds":-1,"StateScriptTimeoutSeconds":0,` +
		`"ModuleTimeoutSeconds":-5,"Unknown":[1],"paths":{"ds":"/evil"},"extraRoots":"/evil"}`} {
		if c, said, err := loaded(t, "", text); err != nil || said != "" || !reflect.DeepEqual(c, want) {
			t.Errorf("%s: got %+v, want %+v; %v %s", text, c, want, err, said)
		}
	}
	if want.DeviceTypeFile != "/s/device_type" || want.UpdateLogPath != "/s" || want.RetryDownloadCount != 10 {
		t.Errorf("%+v", want)
	}
}

// A value of the wrong type leaves its key as it was, with a warning.
func TestConfigWrongTypes(t *testing.T) {
	fallback := `{"ServerURL":"https://a","UpdatePollIntervalSeconds":77,"HttpsClient":{"Certificate":"/c","Key":"/k"},` +
		`"SkipVerify":true,"DeviceTier":"system"}`
	want, _, _ := loaded(t, fallback, "")
	for _, text := range []string{
		`{"ServerURL":5}`, `{"UpdatePollIntervalSeconds":"x"}`, `{"UpdatePollIntervalSeconds":1.5}`,
		`{"UpdatePollIntervalSeconds":99999999999999999999}`,
		`{"HttpsClient":"x"}`, `{"HttpsClient":{"Key":false}}`, `{"SkipVerify":"true"}`, `{"DeviceTier":[]}`,
		`{"RootfsPartA":{}}`, `{"Connectivity":3}`,
	} {
		c, said, err := loaded(t, fallback, text)
		if err != nil || !strings.Contains(said, "ignored: got") || !reflect.DeepEqual(c, want) {
			t.Errorf("%s: got %+v, want %+v; %v %q", text, c, want, err, said)
		}
	}
	servers := `{"Servers":[{"ServerURL":"https://a"},{"ServerURL":"https://b"}]}`
	for _, text := range []string{`{"Servers":"https://x"}`, `{"Servers":[1]}`, `{"Servers":{"ServerURL":"https://x"}}`} {
		if c, _, err := loaded(t, servers, text); err != nil || len(c.Servers) != 2 {
			t.Errorf("%s: %v, %v", text, c.Servers, err)
		}
	}
}

// A list of keys that cannot be read must not let unsigned artifacts in.
func TestConfigWrongVerifyKeys(t *testing.T) {
	for _, text := range []string{`{"ArtifactVerifyKeys":"/key.pub"}`, `{"artifactverifykeys":[1]}`,
		`{"ArtifactVerifyKeys":["/key.pub",7]}`, `{"ArtifactVerifyKey":["/key.pub"]}`, `{"ArtifactVerifyKey":1}`} {
		c, _, err := loaded(t, "", text)
		if err != nil {
			t.Fatal(err)
		}
		if keys, err := loadVerifyKeys(c.verifyKeys(), nil); err == nil {
			t.Errorf("%s: %d keys, no error", text, len(keys))
		}
	}
}

func TestConfigBothSet(t *testing.T) {
	for _, text := range []string{
		`{"ServerURL":"https://a","Servers":[{"ServerURL":"https://b"}]}`, `{"serverurl":"https://a","SERVERS":[]}`,
		`{"ArtifactVerifyKey":"/a","ArtifactVerifyKeys":["/b"]}`,
	} {
		path := writeTemp(t, "mender.conf", []byte(text))
		if _, err := loadConfig(testPaths, configFile{path, true}, configFile{path: "/nowhere"}, nil); err == nil ||
			!strings.Contains(err.Error(), "both ") || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v", text, err)
		}
		// At a default path it is a warning, and keys stay in force: no artifact gets in unsigned.
		c, said, err := loaded(t, "", text)
		if err != nil || !strings.Contains(said, "both ") || strings.Contains(text, "Artifact") && len(c.verifyKeys()) == 0 {
			t.Errorf("%s: %v, %q, %v", text, err, said, c.verifyKeys())
		}
	}
}

// The main file's keys go over the fallback's, those of HttpsClient and Security one by one.
func TestConfigMerge(t *testing.T) {
	for _, c := range []struct{ fallback, main, want string }{
		{`{"TenantToken":"f","RootfsPartA":"/dev/a2"}`, `{"TenantToken":"m"}`, `m /dev/a2 [] {  } { } []`},
		{`{"HttpsClient":{"Certificate":"f","Key":"f"},"Security":{"AuthPrivateKey":"f"}}`,
			`{"HttpsClient":{"Key":"m"},"Security":{"SSLEngine":"m"}}`, `  [] {f m } {f m} []`},
		{`{"Servers":[{"ServerURL":"https://f1"},{"ServerURL":"https://f2"}]}`, `{"Servers":[{"ServerURL":"https://m"}]}`,
			`  [{https://m}] {  } { } []`},
		{`{"Servers":[{"ServerURL":"https://f1"}]}`, `{"Servers":[{}]}`, `  [] {  } { } []`},
		{`{"Servers":[{"ServerURL":"https://f1"}]}`, `{"ServerURL":"https://m"}`, `  [{https://m}] {  } { } []`},
		{`{"ServerURL":"https://f"}`, `{"Servers":[{"ServerURL":"https://m/"},{"ServerURL":"https://m"},{"ServerURL":""}]}`,
			`  [{https://m}] {  } { } []`},
		{`{"ServerURL":"host.example//"}`, `{}`, `  [{https://host.example}] {  } { } []`},
		{`{"ArtifactVerifyKey":"/f"}`, `{"ArtifactVerifyKeys":["/m1","/m2"]}`, `  [] {  } { } [/m1 /m2]`},
		{`{"ArtifactVerifyKeys":["/f1","/f2"]}`, `{"ArtifactVerifyKey":"/m"}`, `  [] {  } { } [/m]`},
		{`{"ArtifactVerifyKeys":["/f1","/f2"]}`, `{"ArtifactVerifyKeys":["/m"]}`, `  [] {  } { } [/m]`},
		{`{"ArtifactVerifyKey":"/f"}`, `{"ArtifactVerifyKeys":[]}`, `  [] {  } { } [/f]`},
		{`{"TenantToken":"f"}`, `{"TenantToken":null}`, `f  [] {  } { } []`},
	} {
		got, said, err := loaded(t, c.fallback, c.main)
		if err != nil || said != "" {
			t.Errorf("%+v: %v, %q", c, err, said)
			continue
		}
		if text := fmt.Sprintf("%s %s %v %v %v %v", got.TenantToken, got.RootfsPartA, got.Servers, got.HttpsClient,
			got.Security, got.verifyKeys()); text != c.want {
			t.Errorf("%s over %s: got %q, want %q", c.main, c.fallback, text, c.want)
		}
	}
}

// A default path may be missing or bad; one that a person gave must be there and be right.
func TestConfigExplicit(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"absent":     {"", "no such file"},
		"no JSON":    {`{"TenantToken":`, "not a JSON object"},
		"a list":     {`[]`, "not a JSON object"},
		"two values": {`{} {}`, "not a JSON object"},
		"empty":      {" ", "not a JSON object: line 1, column 2: unexpected end"},
		"comma":      {"{\n  \"TenantToken\": \"ä\",\n}\n", "not a JSON object: line 3, column 1: invalid character '}'"},
		"bare word":  {"{\n\t\"TenantToken\": \"ä\", x}", "line 2, column 22: invalid character 'x'"},
		"cut":        {"\ufeff{\n\"TenantToken\": \"t\",", "line 2, column 20: unexpected end"},
		"UTF-16":     {"\xff\xfe{\x00}\x00", "in UTF-16, want UTF-8"},
		"too many":   {`{"RetryDownloadCount":10001,"TenantToken":"kept"}`, "RetryDownloadCount 10001: want 1 to 10000"},
		"none":       {`{"RetryDownloadCount":0}`, "RetryDownloadCount 0"},
		"a tier":     {`{"DeviceTier":"large"}`, `DeviceTier "large"`},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.conf")
			if c.text != "" {
				writeFile(t, path, c.text)
			}
			none := configFile{path: "/nowhere"}
			for _, pair := range [][2]configFile{{{path, true}, none}, {none, {path, true}}} {
				if _, err := loadConfig(testPaths, pair[0], pair[1], nil); err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("explicit: got %v, want %q", err, c.want)
				}
			}
			got, said, err := loaded(t, `{"RootfsPartA":"/dev/a2"}`, c.text)
			switch {
			case name == "a tier":
				if exitCode(err) != exitRefused || !strings.Contains(err.Error(), c.want) {
					t.Errorf("a tier is fatal everywhere: got %v", err)
				}
			case err != nil || got.RootfsPartA != "/dev/a2" || got.RetryDownloadCount != 10:
				t.Errorf("by default: %+v, %v", got, err)
			case name != "absent" && !strings.Contains(said, c.want):
				t.Errorf("by default: said %q, want %q", said, c.want)
			case name == "too many" && got.TenantToken != "kept":
				t.Error("keys before the error are lost")
			}
		})
	}
	dir := t.TempDir()
	if _, err := loadConfig(testPaths, configFile{dir, true}, configFile{path: "/nowhere"}, nil); err == nil ||
		errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory: got %v", err)
	}
}

func TestDeviceTypeFile(t *testing.T) {
	for text, want := range map[string]string{
		"device_type=board\n": "board", "device_type=board": "board", "device_type=a b=c\r\n": "a b=c",
		"\n# made by hand\n  device_type= board \n\n": "board",
		"": "", "board\n": "", "device_type=\n": "", "device_type=a\ndevice_type=b\n": "", "device_type=a\njunk\n": "",
		"Device_Type=a\n": "", "#device_type=a\n": "",
	} {
		c := &config{DeviceTypeFile: writeTemp(t, "device_type", []byte(text))}
		got, err := c.deviceType()
		if got != want || (err != nil) != (want == "") || err != nil && exitCode(err) != exitRefused {
			t.Errorf("%q: got %q, %v, want %q", text, got, err, want)
		}
	}
	c := &config{DeviceTypeFile: "/nowhere/device_type"}
	if _, err := c.deviceType(); exitCode(err) != exitRefused || hintOf(err) == "" {
		t.Errorf("absent: got %v", err)
	}
}

func TestDefaultPaths(t *testing.T) {
	for _, n := range []string{"MENDER_CONF_DIR", "MENDER_DATA_DIR", "MENDER_DATASTORE_DIR"} {
		t.Setenv(n, "")
	}
	if got, want := defaultPaths(), (paths{"/etc/mender", "/usr/share/mender", "/var/lib/mender"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	t.Setenv("MENDER_CONF_DIR", "/x")
	t.Setenv("MENDER_DATASTORE_DIR", "/z")
	if got, want := defaultPaths(), (paths{"/x", "/usr/share/mender", "/z"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	o := &options{paths: defaultPaths()}
	if o.mainConfig() != "/x/mender.conf" || o.fallbackConfig() != "/z/mender.conf" {
		t.Errorf("got %q, %q", o.mainConfig(), o.fallbackConfig())
	}
}

// FuzzConfig: nothing panics, and what was read means the same when it is written and read.
func FuzzConfig(f *testing.F) {
	for _, text := range []string{"", "{}", everyKey, `{"Servers":[{"ServerURL":"a"},{"ServerURL":"a/"}]}`,
		`{"ServerURL":1,"Servers":null,"HttpsClient":[]}`, `{"DeviceTier":"x"}`, `{"ſervers":[]}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c := defaultConfig(testPaths)
		if c.parse(text, nil) != nil || c.tierErr() != nil {
			return
		}
		c.fillDefaults()
		out, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var keys map[string]json.RawMessage
		if err := json.Unmarshal(out, &keys); err != nil {
			t.Fatal(err)
		}
		for _, k := range []string{"ServerURL", "ArtifactVerifyKey"} { // one of two
			if string(keys[k]) == `""` {
				delete(keys, k)
			} else {
				delete(keys, map[string]string{"ServerURL": "Servers", "ArtifactVerifyKey": "ArtifactVerifyKeys"}[k])
			}
		}
		out, _ = json.Marshal(keys)
		again := defaultConfig(testPaths)
		if err := again.parse(out, nil); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		again.fillDefaults()
		a, _ := json.Marshal(c)
		b, _ := json.Marshal(again)
		if !bytes.Equal(a, b) {
			t.Errorf("wrote %s\nread  %s", a, b)
		}
	})
}

// Editors of some systems put a byte order mark before the text.
func TestConfigByteOrderMark(t *testing.T) {
	c, said, err := loaded(t, "\ufeff{\"TenantToken\":\"t\"}", "\ufeff{\"RootfsPartA\":\"/dev/a2\"}")
	if err != nil || said != "" || c.TenantToken != "t" || c.RootfsPartA != "/dev/a2" || c.broken != nil {
		t.Errorf("got %+v, %q, %v", c, said, err)
	}
	path := filepath.Join(t.TempDir(), "mender.conf")
	writeFile(t, path, "\ufeff{\"TenantToken\":\"t\"}")
	must(t, (&setupFlags{partA: "/dev/a2"}).write(path, c))
	if text, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(text), "{") ||
		!strings.Contains(string(text), `"TenantToken": "t"`) {
		t.Errorf("setup made %q of it, %v", text, err)
	}
}

// Whoever may write to the datastore can put a pipe there, which nobody writes to: it is not waited for.
// A file that a person names may be one.
func TestConfigDoesNotWait(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	must(t, syscall.Mkfifo(pipe, 0o666))
	c, err := loadConfig(testPaths, configFile{path: filepath.Join(dir, "none")}, configFile{path: pipe}, nil)
	if err != nil || !errors.Is(c.broken, errNotPlain) {
		t.Errorf("got %v, %v", c, err)
	}
	c = defaultConfig(paths{ds: dir})
	c.DeviceTypeFile = pipe
	if _, err := c.deviceType(); !errors.Is(err, errNotPlain) || exitCode(err) != exitRefused {
		t.Errorf("device type: got %v", err)
	}
	written := make(chan error)
	go func() { written <- os.WriteFile(pipe, []byte(`{"RootfsPartA":"/dev/a"}`), 0) }()
	none := configFile{path: filepath.Join(dir, "none")}
	c, err = loadConfig(testPaths, configFile{path: pipe, explicit: true}, none, nil)
	if err != nil || c.RootfsPartA != "/dev/a" {
		t.Errorf("named: got %v, %v", c, err)
	}
	must(t, <-written)
}
