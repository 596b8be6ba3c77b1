// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestPackTypeInfo: the provides and clears by default are mender-artifact's, as it writes
// them for the same options.
func TestPackTypeInfo(t *testing.T) {
	img := writeTemp(t, "img", []byte("hi\n"))
	const sum = `"rootfs-image.checksum":"98ea6e4f216f2fb4b69fff9b3a44842c38686ca685f3f55dc48c5d3fb1107be4"`
	const all = `"artifact_group","rootfs_image_checksum","rootfs-image.*"`
	for args, want := range map[string]string{
		"": `{"artifact_provides":{` + sum + `,"rootfs-image.version":"rel"},` +
			`"clears_artifact_provides":[` + all + `]`,
		"--software-name sn": `{"artifact_provides":{` + sum + `,"rootfs-image.sn.version":"rel"},` +
			`"clears_artifact_provides":["rootfs-image.sn.*"]`,
		"--software-filesystem fs": `{"artifact_provides":{"fs.version":"rel",` + sum + `},` +
			`"clears_artifact_provides":["fs.*"]`,
		"--no-default-software-version": `{"artifact_provides":{` + sum + `}`,
		"--no-default-clears-provides":  `{"artifact_provides":{` + sum + `,"rootfs-image.version":"rel"}`,
		"--no-checksum-provide --clears-provides x* -dk:v": `{"artifact_depends":{"k":"v"},` +
			`"artifact_provides":{"rootfs-image.version":"rel"},"clears_artifact_provides":["x*",` + all + `]`,
		"-p rootfs-image.version:zz": `{"artifact_provides":{` + sum + `,"rootfs-image.version":"zz"},` +
			`"clears_artifact_provides":[` + all + `]`,
		"-T mod -p a:b:c": `{"artifact_provides":{"a":"b:c","rootfs-image.mod.version":"rel"},` +
			`"clears_artifact_provides":["rootfs-image.mod.*"]`,
		"-T mod --software-name sn --software-version 9": `{"artifact_provides":{"rootfs-image.sn.version":"9"},` +
			`"clears_artifact_provides":["rootfs-image.sn.*"]`,
		"-T mod --no-default-software-version": `{`,
	} {
		args = strings.ReplaceAll(args, "-dk:v", "-d k:v")
		typ := "rootfs-image"
		if strings.Contains(args, "-T mod") {
			typ = "mod"
		}
		made := packed(t, append(strings.Fields(args), "-n", "rel", "-c", "dev", "-f", img)...)
		a, _, err := readAll(made, artifactOptions{})
		if err != nil {
			t.Fatal(err)
		}
		want = strings.Replace(want+`,"type":"`+typ+`"}`, "{,", "{", 1)
		if string(a.TypeInfo) != want {
			t.Errorf("pack %s: type-info\n%s, want\n%s", args, a.TypeInfo, want)
		}
	}
}

// TestPackRoundTrip: all kinds are read back as they were given, are the same bytes when
// made again, and mender-artifact accepts them.
func TestPackRoundTrip(t *testing.T) {
	t.Parallel()
	rk, ek := newKeys(t)
	rsa1, rsaPub := keyPair(t, "RSA PRIVATE KEY", rk)
	rsa8, rsaPub8 := keyPair(t, "PRIVATE KEY", rk)
	ec1, ecPub := keyPair(t, "EC PRIVATE KEY", ek)
	ec8, ecPub8 := keyPair(t, "PRIVATE KEY", ek)
	image := testImage(1, 1<<20+112345)
	img := writeTemp(t, "rootfs.img", image)
	two := writeTemp(t, "two.bin", []byte("two"))
	meta := writeTemp(t, "meta", []byte(`{"a": [1, "x"]}`))
	script := writeTemp(t, "ArtifactInstall_Enter_00", []byte("#!/bin/sh\n"))
	for _, c := range []struct{ name, args, pub string }{
		{"none", "-f " + img + " --compression none", ""},
		{"gzip", "-f " + img, ""},
		{"xz", "-f " + img + " --compression xz", ""},
		{"rsa", "-f " + img + " -k " + rsa1, rsaPub},
		{"rsa8", "-f " + img + " -k " + rsa8, rsaPub8},
		{"ec", "-f " + img + " -k " + ec1, ecPub},
		{"ec8", "-f " + img + " -k " + ec8 + " --compression lzma", ecPub8},
		{"relations", "-f " + img + " -g prod -p extra:1 -d k:v -N rel-0 -N rel-00 -G prod -s " + script, ""},
		{"module", "-T mod -f " + two + " -f " + img + " -m " + meta, ""},
		{"no files", "-T mod -m " + meta, ""},
		{"bootstrap", "--bootstrap -p rootfs-image.version:1 --clears-provides x -g prod", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append(strings.Fields(c.args), "-n", "rel", "-c", "dev", "-t", "dev2")
			b := packed(t, args...)
			if !bytes.Equal(b, packed(t, args...)) {
				t.Error("the same input gave other bytes")
			}
			var opt artifactOptions
			if c.pub != "" {
				var err error
				if opt.keys, err = loadVerifyKeys([]string{c.pub}, nil); err != nil {
					t.Fatal(err)
				}
			}
			a, files, err := readAll(b, opt)
			if err != nil {
				t.Fatal(err)
			}
			if got, ok := files["rootfs.img"]; ok != strings.Contains(c.args, img) || ok && !bytes.Equal(got, image) {
				t.Error("rootfs.img is not what was packed")
			}
			if a.Name != "rel" || !slices.Equal(a.DeviceTypes, []string{"dev", "dev2"}) || a.SignedBy != c.pub {
				t.Errorf("got %q for %q signed by %q", a.Name, a.DeviceTypes, a.SignedBy)
			}
			needTool(t, "mender-artifact")
			path := writeTemp(t, "a.mender", b)
			validate := []string{"validate", path}
			if c.pub != "" {
				validate = []string{"validate", "-k", c.pub, path}
			}
			for _, cmd := range [][]string{validate, {"read", path}} {
				if out, err := exec.Command("mender-artifact", cmd...).CombinedOutput(); err != nil {
					t.Errorf("mender-artifact %s: %v\n%s", cmd, err, out)
				}
			}
		})
	}
}

// Private keys in every form that openssl writes; others are refused with what is wanted.
func TestSigningKeys(t *testing.T) {
	t.Parallel()
	needTool(t, "openssl")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, words := range []string{
		"genpkey -algorithm RSA -out " + at("rsa8"), "rsa -in " + at("rsa8") + " -traditional -out " + at("rsa1"),
		"ecparam -name prime256v1 -genkey -out " + at("ec1"),
		"pkcs8 -topk8 -nocrypt -in " + at("ec1") + " -out " + at("ec8"),
		"pkcs8 -topk8 -in " + at("ec1") + " -passout pass:x -out " + at("locked8"),
		"rsa -in " + at("rsa8") + " -traditional -aes128 -passout pass:x -out " + at("locked1"),
		"ecparam -name secp384r1 -genkey -out " + at("p384"), "genpkey -algorithm ed25519 -out " + at("ed"),
		"genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:512 -out " + at("small"),
		"pkey -in " + at("rsa8") + " -pubout -out " + at("public"), "ecparam -name prime256v1 -out " + at("params"),
	} {
		runTool(t, "", "openssl", strings.Fields(words)...)
	}
	writeFile(t, at("text"), "no key")
	for name, want := range map[string]string{
		"rsa1": "", "rsa8": "", "ec1": "", "ec8": "", "locked1": "encrypted", "locked8": "encrypted",
		"p384": "P-384", "ed": "want RSA or ECDSA on P-256", "small": "512", "missing": "no such file",
		"public": "no PEM private key", "params": "no PEM private key", "text": "no PEM private key",
	} {
		key, err := loadSigningKey(at(name))
		switch {
		case want == "" && (err != nil || key == nil):
			t.Errorf("%s: got %v, want it accepted", name, err)
		case want != "" && (err == nil || key != nil):
			t.Errorf("%s: accepted, want %q", name, want)
		case want != "" && !(strings.Contains(err.Error(), want) && strings.Contains(err.Error(), at(name))):
			t.Errorf("%s: got %v, want %q in it, and the path", name, err, want)
		}
	}
	for _, pair := range [][2]string{{"rsa1", "rsa8"}, {"ec1", "ec8"}} {
		a, _ := loadSigningKey(at(pair[0]))
		if b, _ := loadSigningKey(at(pair[1])); !a.(interface{ Equal(crypto.PrivateKey) bool }).Equal(b) {
			t.Errorf("%q are not the same key", pair)
		}
	}
}

func TestPackUsage(t *testing.T) {
	var help bytes.Buffer
	err := packCommand([]string{"--help"}, &help, nil)
	if err != nil || !strings.Contains(help.String(), "\n  -n, --name, --artifact-name NAME\n") {
		t.Errorf("help: %v\n%s", err, help.String())
	}
	img := writeTemp(t, "img", []byte("hi"))
	bad := writeTemp(t, "no good", []byte("hi"))
	out := filepath.Join(t.TempDir(), "out")
	for _, args := range []string{
		"", "-n rel -c dev", "-n rel -c dev -f " + img, "-n rel -f " + img + " -o " + out, "-n rel -c dev -o " + out,
		"-n rel -c dev -o " + out + " -T ../x -f " + img, "-n rel -c dev -T -x -o " + out,
		"-n rel -c dev -T m -f " + img + " -f " + img + " -o " + out,
		"-n rel -c dev --compression zip -f " + img + " -o " + out,
		"--bootstrap -n rel -c dev -f " + img + " -o " + out,
		"-n rel -c dev -f " + img + " -o " + out + " surplus",
		"-n rel -c dev -p novalue -f " + img + " -o " + out, "--what",
	} {
		if err := packCommand(strings.Fields(args), os.Stdout, nil); exitCode(err) != exitUsage {
			t.Errorf("pack %s: %v, want a usage error", args, err)
		}
	}
	err = packCommand([]string{"-n", "rel", "-c", "dev", "-f", bad, "-o", out}, os.Stdout, nil)
	if exitCode(err) != exitUsage {
		t.Errorf("pack %q: %v", bad, err)
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("a refused pack left its output")
	}
	err = packCommand([]string{"-n", "rel", "-c", "dev", "-f", img + "-none", "-o", out}, os.Stdout, nil)
	if err == nil {
		t.Error("a missing file was packed")
	}
	if l, _ := filepath.Glob(filepath.Join(filepath.Dir(out), "*")); len(l) > 0 {
		t.Errorf("a failed pack left %q", l)
	}
}

func TestShow(t *testing.T) {
	for _, name := range []string{"bootstrap", "module-two-files", "rootfs-depends"} {
		var text, js bytes.Buffer
		for _, asJSON := range []bool{false, true} {
			a, err := openArtifact(bytes.NewReader(fixture(t, name+".mender")), artifactOptions{})
			if err != nil {
				t.Fatal(err)
			}
			w := map[bool]*bytes.Buffer{false: &text, true: &js}[asJSON]
			if err := showCommand(a, asJSON, w); err != nil {
				t.Fatal(err)
			}
		}
		var s shown
		if err := json.Unmarshal(js.Bytes(), &s); err != nil || s.Name == "" {
			t.Errorf("%s: %v\n%s", name, err, js.Bytes())
		}
		for _, f := range s.Files {
			if !strings.Contains(text.String(), f.Name+", ") || len(f.Sum) != 64 {
				t.Errorf("%s: text lacks file %+v:\n%s", name, f, text.String())
			}
		}
	}
}
