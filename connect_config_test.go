// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// offered is what these options offer with these files beside mender.conf and its fallback; "": no file.
func offered(t *testing.T, f *connectFlags, main, fallback string) (*peerHub, []uint16, string, error) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"main": main, "fallback": fallback} {
		if text != "" {
			must(t, os.Mkdir(dir+"/"+name, 0o755))
			writeFile(t, dir+"/"+name+"/"+connectConfName, text)
		}
	}
	o := newOptions()
	o.config, o.fallback = dir+"/main/mender.conf", dir+"/fallback/mender.conf"
	var log bytes.Buffer
	h, err := f.offer(&app{o: o, lg: newLogger(&log)})
	var protocols []uint16
	if err == nil {
		for p := range h.offers {
			protocols = append(protocols, p)
		}
		if h.client != nil {
			protocols = append(protocols, protoClient)
		}
		slices.Sort(protocols)
	}
	return h, protocols, log.String(), err
}

// TestConnectOffers: nothing that is not named, by options or else by the file.
func TestConnectOffers(t *testing.T) {
	t.Parallel()
	const disabled = `"Terminal": {"Disable": true}, "PortForward": {"Disable": true}, "FileTransfer": {"Disable": true}`
	for name, c := range map[string]struct {
		f              connectFlags
		main, fallback string
		want           []uint16
	}{
		"terminal":         {connectFlags{terminal: true}, "", "", []uint16{1}},
		"ports":            {connectFlags{forward: []string{"10.0.0.1:22"}}, "", "", []uint16{3}},
		"files":            {connectFlags{files: "/"}, "", "", []uint16{2}},
		"before the file":  {connectFlags{terminal: true}, `{"User": "root"}`, "", []uint16{1}},
		"commands alone":   {connectFlags{}, "{" + disabled + "}", "", []uint16{4}},
		"all but commands": {connectFlags{}, `{"MenderClient": {"Disable": true}, "Terminal": {"Disable": true}}`, "", nil},
		"main over fallback": {connectFlags{}, `{"portforward": {"disable": false}}`, "{" + disabled + "}",
			[]uint16{3, 4}},
	} {
		_, got, _, err := offered(t, &c.f, c.main, c.fallback)
		if c.want == nil { // whatever there is beside
			if slices.Contains(got, 1) || slices.Contains(got, 4) || err != nil {
				t.Errorf("%s: got %v, %v", name, got, err)
			}
		} else if !reflect.DeepEqual(got, c.want) || err != nil {
			t.Errorf("%s: got %v, %v, want %v", name, got, err, c.want)
		}
	}
}

// TestConnectRefusals: a file that is not understood offers nothing.
func TestConnectRefusals(t *testing.T) {
	t.Parallel()
	for text, says := range map[string]string{
		`{"User": "root", "ShellCommand": 5}`:                         "cannot unmarshal number",
		`{"User": "root"`:                                             "not a JSON object",
		`{"User": "nobody-here"}`:                                     "nobody-here",
		`{"User": "root", "ShellCommand": "/nowhere/sh"}`:             "/nowhere/sh",
		`{"User": "root", "PortForward": {"Allow": ["example.org"]}}`: "example.org",
		`{}`: "no User is set",
		`{"User": "root", "Limits": {"Enabled": true, "FileTransfer": {"Umask": "9"}}}`:        "Umask",
		`{"User": "root", "Limits": {"Enabled": true, "FileTransfer": {"Chroot": "/no/dir"}}}`: "/no/dir",
	} {
		if _, got, _, err := offered(t, &connectFlags{}, text, ""); exitCode(err) != exitRefused ||
			!strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, %v", text, got, err)
		}
	}
}

// TestConnectLimits are the times of terminals, and how many of a user there may be.
func TestConnectLimits(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][3]time.Duration{
		`{}`:                                 {1, 0, 10 * time.Minute},
		`{"Sessions": {"MaxPerUser": 4000}}`: {16, 0, 10 * time.Minute},
		`{"Sessions": {"ExpireAfter": 60, "MaxPerUser": 2}}`:        {2, time.Minute, 0},
		`{"Sessions": {"ExpireAfterIdle": 30}}`:                     {1, 0, 30 * time.Second},
		`{"Sessions": {"ExpireAfterIdle": 30, "ExpireAfter": 60}}`:  {1, 0, 30 * time.Second},
		`{"Sessions": {"StopExpired": false, "ExpireAfter": 1}}`:    {1, 0, 0},
		`{"sessions": {"stopexpired": true, "expireafteridle": 7}}`: {1, 0, 7 * time.Second},
	} {
		h, _, _, err := offered(t, &connectFlags{terminal: true}, text, "")
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if got := [3]time.Duration{time.Duration(h.perUser), h.expires, h.expiresIdle}; got != want {
			t.Errorf("%s: got %v, want %v", text, got, want)
		}
	}
}

// TestConnectUnused warns of what the file had to say to another program, and of nothing else.
func TestConnectUnused(t *testing.T) {
	t.Parallel()
	_, _, log, err := offered(t, &connectFlags{terminal: true}, `{"ServerURL": "https://x.example", "Unknown": 1,
		"ShellArguments": ["-l"], "Terminal": {"Width": 100, "Height": 30}}`, "")
	if err != nil || !strings.Contains(log, `"ServerURL" is not used`) || strings.Count(log, "\n") != 1 {
		t.Errorf("got %q, %v", log, err)
	}
	c := &connectConfig{}
	must(t, parseObject([]byte(`{"SHELLCOMMAND": "/bin/ash", "shellArguments": [""], "user": "u",
		"terminal": {"width": 100, "height": 30}}`), c))
	if o := c.terminal(); !reflect.DeepEqual(o, &terminalOptions{shell: "/bin/ash", args: []string{""}, user: "u",
		width: 100, height: 30}) {
		t.Errorf("got %+v", o)
	}
}
