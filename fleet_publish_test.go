// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !nofleet && !nopublish

package main

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// fleetFlagSet adds the options of the verb fleet to those of the others.
func fleetFlagSet(sets map[string]*flag.FlagSet) { new(fleetOptions).flags(sets["fleet"]) }

// fleetFolder is a folder to be published, with keys made by openssl.
type fleetFolder struct {
	*verbBoard
	at string // of the folder
}

func newFleetFolder(t *testing.T) *fleetFolder {
	f := &fleetFolder{newVerbBoard(t), ""}
	f.at = filepath.Join(f.dir, "www")
	must(t, os.Mkdir(f.at, 0o755))
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("needs openssl")
	}
	for name, kind := range map[string]string{"rsa": "RSA", "ecdsa": "EC -pkeyopt ec_paramgen_curve:P-256",
		"ed25519": "ED25519"} {
		f.sh("openssl genpkey -algorithm " + kind + " -out " + name + ".pem && " +
			"openssl pkey -in " + name + ".pem -pubout -out " + name + ".pub")
	}
	return f
}

// sh runs a shell in the folder.
func (f *fleetFolder) sh(script string, env ...string) string {
	f.t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir, cmd.Env = f.at, append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		f.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// fleet runs the verb, with words that have a dot as files of the folder.
func (f *fleetFolder) fleet(code int, says string, words ...string) string {
	f.t.Helper()
	for i, w := range words {
		if strings.ContainsAny(w, ": ") {
			continue
		}
		if strings.HasSuffix(w, ".fleet") || strings.HasSuffix(w, ".mender") || strings.HasSuffix(w, ".pem") ||
			strings.HasSuffix(w, ".pub") || w == "device.json" {
			words[i] = filepath.Join(f.at, w)
		}
	}
	return f.want(code, says, append([]string{"fleet"}, words...)...)
}

func (f *fleetFolder) pack(name string) {
	must(f.t, os.WriteFile(filepath.Join(f.at, name+".mender"), f.artifact(name, "good "+name), 0o644))
}

func (f *fleetFolder) open(key string) *fleetFile {
	f.t.Helper()
	keys, err := loadKeys([]string{filepath.Join(f.at, key+".pub")}, "channel files", nil)
	must(f.t, err)
	file, _, err := openFleet(readFileOrNil(filepath.Join(f.at, "acme.fleet")), keys)
	must(f.t, err)
	return file
}

// A channel's life, verb by verb; a device follows it as it is in the folder.
func TestFleetPublish(t *testing.T) {
	f := newFleetFolder(t)
	f.fleet(0, "serial 1", "init", "acme.fleet", "-k", "ed25519.pem", "--poll", "2h", "--report", "https://r.example/")
	f.fleet(exitRefused, "is there already", "init", "acme.fleet", "-k", "ed25519.pem")
	f.pack("gw-1")
	f.pack("gw-2")
	f.fleet(0, "serial 2", "add", "acme.fleet", "gw-1.mender", "--key", "ed25519.pem", "--step")
	later := zulu(time.Now().Add(48 * time.Hour))
	f.fleet(0, "serial 3", "add", "acme.fleet", "gw-2.mender", "-k", "ed25519.pem", "--rollout", "10",
		"--rollout", "100@"+later, "--group", "lab", "--from", "gw-1", "--not-before", "2026-01-01T00:00:00Z", "--salt", "s",
		"--valid", "30d")
	file := f.open("ed25519")
	one, two := file.Releases[0], file.Releases[1]
	if one.Name != "gw-1" || !one.Step || one.URLs[0] != "gw-1.mender" || one.Types[0] != "qemu" ||
		file.Poll != 2*time.Hour || file.Report == "" || two.Rollout[0].Part != 0.1 ||
		zulu(two.Rollout[1].From) != later || two.Groups[0] != "lab" ||
		two.From[0] != "gw-1" || two.Salt != "s" || two.NotBefore.IsZero() ||
		file.Expires.Sub(file.Issued) != 30*24*time.Hour {
		t.Errorf("got %+v", file)
	}
	table := f.fleet(0, "", "check", "acme.fleet", "--verify", "ed25519.pub")
	for _, want := range []string{"signature: ed25519, key ", `channel "acme", serial 3`, "gw-1 ", ", types qemu, step\n",
		", groups lab, from gw-1, not before 2026-01-01T00:00:00Z, 10 % from ", ", 100 % from " + later + ": 10 % now\n"} {
		if !strings.Contains(table, want) {
			t.Errorf("got %q, want %q", table, want)
		}
	}
	f.fleet(0, "serial 4", "pause", "acme.fleet", "gw-2", "-k", "ed25519.pem")
	if !f.open("ed25519").Releases[1].Paused {
		t.Error("not paused")
	}
	f.fleet(0, "serial 5", "resume", "acme.fleet", "gw-2", "-k", "ed25519.pem")
	f.fleet(0, "serial 6", "rollout", "acme.fleet", "gw-2", "50", "100@"+later, "-k", "ed25519.pem")
	f.fleet(0, "serial 7", "renew", "acme.fleet", "-k", "ed25519.pem")
	file = f.open("ed25519")
	if r := file.Releases[1]; r.Paused || r.Rollout[0].Part != 0.5 || file.Expires.Sub(file.Issued) != 30*24*time.Hour {
		t.Errorf("got %+v", file)
	}
	// A device, by files.
	must(t, os.WriteFile(f.at+"/device.json", []byte(`{"id": "x", "device_type": "qemu", "artifact_name": "gw-1",
"groups": ["lab"]}`), 0o600))
	f.fleet(0, "is to be installed", "check", "acme.fleet", "--as", "device.json", "--at", later)
	out := f.fleet(0, "", "check", "acme.fleet", "--as", "device.json", "--json")
	if !strings.Contains(out, `"serial": 7`) {
		t.Errorf("got %q", out)
	}
	f.fleet(0, "no update", "check", "acme.fleet", "--as", "device.json", "--at", "2036-01-01T00:00:00Z")
	f.want(0, "", "setup", "--device-type", "qemu")
	must(t, os.WriteFile(f.dir+"/etc/mender.conf", fmt.Appendf(nil, `{"Channel": %q, "FleetVerifyKeys": [%q]}`,
		f.at+"/acme.fleet", f.at+"/ed25519.pub"), 0o600))
	f.want(0, `of "gw-1": success`, "run")
	f.want(0, `"gw-2", is for groups ["lab"]`, "run")
}

// What is not known stays, and so does the order.
func TestFleetPublishKeeps(t *testing.T) {
	f := newFleetFolder(t)
	f.fleet(0, "is not signed", "init", "acme.fleet")
	path := f.at + "/acme.fleet"
	text := strings.Replace(string(readFileOrNil(path)), "{", `{"z": {"b": 1, "a": [1.50]}, `, 1)
	must(t, os.WriteFile(path, []byte(text), 0o644))
	f.fleet(0, "serial 2", "renew", "acme.fleet", "-k", "rsa.pem")
	got := regexp.MustCompile(`\s`).ReplaceAllString(string(readFileOrNil(path)), "")
	if !strings.Contains(got, `{"z":{"b":1,"a":[1.50]},"channel":"acme","serial":2,`) {
		t.Errorf("got %s", got)
	}
}

func TestFleetPublishRefusals(t *testing.T) {
	f := newFleetFolder(t)
	for words, want := range map[string]string{"": "see 'mendlet fleet --help'", "init": "see", "launch a.fleet": "see",
		"pause a.fleet": "see", "renew a.fleet b": "see", "renew a.fleet --nix": "unknown option"} {
		f.fleet(exitUsage, want, strings.Fields(words)...)
	}
	f.fleet(exitFailed, "no such file", "renew", "none.fleet")
	f.fleet(exitRefused, "letters", "init", "a+b.fleet")
	f.fleet(exitUsage, "--valid", "init", "acme.fleet", "--valid", "soon")
	f.fleet(0, "", "init", "acme.fleet", "-k", "rsa.pem")
	f.fleet(exitRefused, "no release", "pause", "acme.fleet", "gw-1", "-k", "rsa.pem")
	f.fleet(exitFailed, "no such file", "add", "acme.fleet", "gw-1.mender", "-k", "rsa.pem")
	f.pack("gw-1")
	f.fleet(exitUsage, "PERCENT", "add", "acme.fleet", "gw-1.mender", "--rollout", "101", "-k", "rsa.pem")
	f.fleet(exitUsage, "PERCENT", "add", "acme.fleet", "gw-1.mender", "--rollout", "some", "-k", "rsa.pem")
	f.fleet(exitRefused, "want 2026", "add", "acme.fleet", "gw-1.mender", "--rollout", "1@soon", "-k", "rsa.pem")
	f.fleet(exitRefused, "device types", "add", "acme.fleet", "gw-1.mender", "--device-type", "other", "-k", "rsa.pem")
	f.fleet(exitRefused, "no such file", "add", "acme.fleet", "gw-1.mender", "--url", "elsewhere.mender", "-k", "rsa.pem")
	f.fleet(exitFailed, "PEM", "add", "acme.fleet", "gw-1.mender", "-k", "rsa.pub")
	f.fleet(exitUsage, "--key", "sign", "acme.fleet")
	f.fleet(exitUsage, "wants the public key", "sign", "acme.fleet", "--sign-with", "true")
	if got := f.open("rsa").Serial; got != 1 {
		t.Errorf("serial %d after refusals, want 1", got)
	}
	f.fleet(0, "", "add", "acme.fleet", "gw-1.mender", "-k", "rsa.pem")
	must(t, os.WriteFile(f.at+"/gw-1.mender", f.artifact("gw-1", "gone wrong"), 0o644))
	f.fleet(exitRefused, "manifest has SHA-256", "check", "acme.fleet")
	f.fleet(exitRefused, "manifest has SHA-256", "renew", "acme.fleet", "-k", "rsa.pem")
	f.fleet(exitRefused, "no signature of it", "check", "acme.fleet", "--verify", "ecdsa.pub")
}

// An artifact on another server has to answer with its size.
func TestFleetPublishHead(t *testing.T) {
	f := newFleetFolder(t)
	f.pack("gw-1")
	size := len(readFileOrNil(f.at + "/gw-1.mender"))
	h := newFleetHost(t)
	f.fleet(0, "", "init", "acme.fleet", "-k", "rsa.pem")
	add := func(code int, says string, more ...string) {
		t.Helper()
		f.fleet(code, says, append([]string{"add", "acme.fleet", "gw-1.mender", "-k", "rsa.pem",
			"--url", h.URL + "/gw-1.mender"}, more...)...)
	}
	add(exitRefused, "HEAD says status 404")
	h.fault = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(size-1))
		return true
	}
	add(exitRefused, fmt.Sprintf("%d bytes, want %d", size-1, size))
	add(0, "", "--no-head")
	h.fault = nil
	h.put("gw-1.mender", readFileOrNil(f.at+"/gw-1.mender"))
	f.fleet(0, "", "renew", "acme.fleet", "-k", "rsa.pem")
}

// Two keys sign one file; another command signs; and openssl does, by the lines of doc/fleet.md.
func TestFleetSignElsewhere(t *testing.T) {
	f := newFleetFolder(t)
	f.fleet(0, "", "init", "acme.fleet", "-k", "rsa.pem")
	f.fleet(0, "", "sign", "acme.fleet", "-k", "ed25519.pem")
	f.fleet(0, "", "sign", "acme.fleet", "-k", "ed25519.pem") // once more is once
	for _, key := range []string{"rsa", "ed25519"} {
		if f.open(key).Serial != 1 {
			t.Errorf("signing by %s changed the file", key)
		}
	}
	if n := bytes.Count(readFileOrNil(f.at+"/acme.fleet"), []byte("\nsig ")); n != 2 {
		t.Errorf("%d signatures, want 2", n)
	}
	f.fleet(0, "", "renew", "acme.fleet", "-k", "ecdsa.pub",
		"--sign-with", "openssl dgst -sha256 -sign "+f.at+"/ecdsa.pem")
	f.open("ecdsa")
	f.fleet(exitRefused, "was not made by the key", "renew", "acme.fleet", "-k", "ecdsa.pub", "--sign-with",
		"openssl dgst -sha256 -sign "+f.at+"/rsa.pem")
	f.fleet(exitFailed, "exit status 3", "renew", "acme.fleet", "-k", "ecdsa.pub", "--sign-with", "exit 3")

	form := regexp.MustCompile("(?s)```sh\n(sed .*?)```.*?```sh\n(echo .*?)```")
	blocks := form.FindStringSubmatch(readText(t, "doc/fleet.md"))
	if blocks == nil {
		t.Fatal("doc/fleet.md has no lines for openssl")
	}
	lines := strings.Split(strings.TrimSpace(blocks[1]), "\n")
	for _, alg := range []string{"rsa", "ecdsa", "ed25519"} {
		must(t, os.Remove(f.at+"/acme.fleet"))
		f.fleet(0, "", "init", "acme.fleet")
		f.sh("cp " + alg + ".pem fleet.pem")
		script := strings.Join(lines, "\n")
		if alg == "ed25519" {
			script = strings.Join(append(lines[:2:2], blocks[2]), "\n")
		}
		f.sh(script, "ALG="+alg)
		f.open(alg)
		f.sh(script, "ALG="+alg) // again over a signed one
		f.open(alg)
	}
}
