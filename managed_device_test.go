// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// openssl makes a key file as people have them.
func openssl(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("needs openssl")
	}
	if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
		t.Fatalf("openssl %q: %v\n%s", args, err, out)
	}
}

func TestDeviceKeyKinds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	openssl(t, "genrsa", "-traditional", "-out", file("rsa1"), "2048")
	openssl(t, "pkcs8", "-topk8", "-nocrypt", "-in", file("rsa1"), "-out", file("rsa8"))
	openssl(t, "rsa", "-in", file("rsa1"), "-traditional", "-aes256", "-passout", "pass:geheim", "-out", file("rsa-aes"))
	openssl(t, "pkcs8", "-topk8", "-passout", "pass:geheim", "-in", file("rsa1"), "-out", file("rsa-pbes2"))
	openssl(t, "ecparam", "-name", "prime256v1", "-genkey", "-out", file("ec1")) // with EC PARAMETERS before the key
	openssl(t, "ec", "-in", file("ec1"), "-des3", "-passout", "pass:geheim", "-out", file("ec-des3"))
	openssl(t, "genpkey", "-algorithm", "ed25519", "-out", file("ed8"))
	openssl(t, "genpkey", "-algorithm", "x25519", "-out", file("x25519"))
	openssl(t, "rsa", "-in", file("rsa1"), "-pubout", "-out", file("public"))
	must(t, os.WriteFile(file("empty"), nil, 0o600))
	for _, c := range []struct{ name, pass, want, wrong string }{
		{"rsa1", "", "*rsa.PrivateKey", ""}, {"rsa8", "", "*rsa.PrivateKey", ""}, {"ec1", "", "*ecdsa.PrivateKey", ""},
		{"ed8", "", "ed25519.PrivateKey", ""}, {"ed8", "unneeded", "ed25519.PrivateKey", ""},
		{"rsa-aes", "geheim", "*rsa.PrivateKey", ""}, {"ec-des3", "geheim", "*ecdsa.PrivateKey", ""},
		{"rsa-aes", "", "", "--passphrase-file"}, {"rsa-aes", "wrong", "", "rsa-aes"}, {"rsa-pbes2", "geheim", "", "PBES2"},
		{"x25519", "", "", "want RSA, ECDSA or Ed25519"}, {"public", "", "", "no PEM private key"},
		{"empty", "", "", "no PEM private key"},
	} {
		key, err := loadDeviceKey(file(c.name), []byte(c.pass), nil)
		if c.wrong != "" {
			if err == nil || !strings.Contains(err.Error(), c.wrong) {
				t.Errorf("%s with passphrase %q: got %v, want an error with %q", c.name, c.pass, err, c.wrong)
			}
			continue
		}
		if got := fmt.Sprintf("%T", key); err != nil || got != c.want {
			t.Errorf("%s: got %s, %v, want %s", c.name, got, err, c.want)
			continue
		}
		body := []byte("body\n")
		sig, err := signBody(key, body)
		must(t, err)
		sum := sha256.Sum256(body)
		ok := false
		switch k := key.Public().(type) {
		case *rsa.PublicKey:
			ok = rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], sig) == nil
		case *ecdsa.PublicKey:
			ok = ecdsa.VerifyASN1(k, sum[:], sig)
		case ed25519.PublicKey:
			ok = ed25519.Verify(k, body, sig)
		}
		if !ok {
			t.Errorf("%s: signature not good", c.name)
		}
	}
}

// A key is made only where there is none: the C++ client overwrites one that it cannot
// read, and the device is another one from then on.
func TestDeviceKeyNeverOverwritten(t *testing.T) {
	c := testConfig(t)
	path := deviceKeyPath(c)
	k1, err := deviceKey(c, nil, false, nil)
	must(t, err)
	st, err := os.Stat(path)
	must(t, err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("got mode %o, want 0600", st.Mode().Perm())
	}
	k2, err := deviceKey(c, nil, false, nil)
	if err != nil || !reflect.DeepEqual(k1, k2) {
		t.Fatalf("got another key, %v", err)
	}
	for _, damage := range []string{"", "garbage", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"} {
		must(t, os.WriteFile(path, []byte(damage), 0o600))
		_, err := deviceKey(c, nil, false, nil)
		text, rerr := os.ReadFile(path)
		if err == nil || rerr != nil || string(text) != damage || hintOf(err) == "" {
			t.Fatalf("damaged by %q: got %v, and the file has %q", damage, err, text)
		}
	}
	must(t, os.Remove(path))
	must(t, os.Mkdir(path, 0o700)) // cannot be read as a file
	if _, err := deviceKey(c, nil, false, nil); err == nil {
		t.Fatal("a directory was taken for a missing key")
	}
	must(t, os.Remove(path))
	must(t, os.WriteFile(path, []byte("garbage"), 0o600))
	if k3, err := deviceKey(c, nil, true, nil); err != nil || reflect.DeepEqual(k1, k3) {
		t.Fatalf("forced: got %v", err)
	}
}

func TestDeviceKeyStatic(t *testing.T) {
	c := testConfig(t)
	c.Security.AuthPrivateKey = filepath.Join(t.TempDir(), "key.pem")
	if _, err := deviceKey(c, nil, false, nil); err == nil {
		t.Error("a missing fixed key was made")
	}
	if _, err := deviceKey(c, nil, true, nil); exitCode(err) != exitRefused {
		t.Errorf("force with a fixed key: got %v", err)
	}
	_, err := makeDeviceKey(c.Security.AuthPrivateKey, nil)
	must(t, err)
	_, err = deviceKey(c, nil, false, nil)
	must(t, err)
	if _, err := os.Stat(deviceKeyPath(c)); err == nil {
		t.Error("another key was made beside the fixed one")
	}
	for _, s := range []securityConfig{{"pkcs11:token=x", ""}, {"key.pem", "pkcs11"}} {
		c.Security = s
		if _, err := deviceKey(c, nil, false, nil); exitCode(err) != exitRefused || hintOf(err) == "" {
			t.Errorf("%+v: got %v", s, err)
		}
	}
}

// The files of keys are as the standard library would write them, to the byte.
func TestKeyForms(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "key.pem")
	key, err := makeDeviceKey(path, nil)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	if text, want := readFileOrNil(path), pemText("PRIVATE KEY", der); !bytes.Equal(text, want) {
		t.Errorf("%q, want %q", text, want)
	}
	for n := range 200 {
		der := bytes.Repeat([]byte{byte(n)}, n)
		if got, want := asPEM("X", der), pemText("X", der); got != string(want) {
			t.Errorf("%d bytes: %q, want %q", n, got, want)
		}
	}
}

// Field case 14: a key that others may read is used, and said.
func TestDeviceKeyWorldReadable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	_, err := makeDeviceKey(path, nil)
	must(t, err)
	must(t, os.Chmod(path, 0o644))
	said := ""
	_, err = loadDeviceKey(path, nil, &logger{sinks: []logSink{func(_ logLevel, m string) { said = m }}})
	if err != nil || !strings.Contains(said, "0644") {
		t.Fatalf("got %v, said %q", err, said)
	}
}

func TestReadPassphrase(t *testing.T) {
	for in, want := range map[string]string{"geheim\n": "geheim", "geheim": "geheim", "a b\r\nnext\n": "a b", "": ""} {
		got, err := readPassphrase("-", strings.NewReader(in))
		if err != nil || string(got) != want {
			t.Errorf("%q: got %q, %v", in, got, err)
		}
	}
	if _, err := readPassphrase("-", bytes.NewReader(make([]byte, 5000))); err == nil {
		t.Error("an endless passphrase was taken")
	}
}

// The bytes that Mender's C++ client makes of these; they are the device's name.
func TestIdentityJSON(t *testing.T) {
	for _, c := range []struct {
		text string
		want string // "" is an error
	}{
		{"mac=52:54:00:12:34:56\n", `{"mac":"52:54:00:12:34:56"}`},
		{"sn=1\nmac=a\nsn=2\n", `{"mac":"a","sn":["1","2"]}`},
		{"Z=1\na=2\nB=3", `{"B":"3","Z":"1","a":"2"}`},
		{"a=x=y\nb=\n=c\n", `{"":"c","a":"x=y","b":""}`},
		{"a=<&>\u2028\n", "{\"a\":\"<&>\u2028\"}"},
		{"a=\"q\\\t\r\f\b\n", `{"a":"\"q\\\t\r\f\b"}`},
		{"a=\x01\x7f\xff\n", "{\"a\":\"\x01\x7f\xff\"}"},
		{"a=1\n\nb=2\n", `{"a":"1","b":"2"}`},
		{"a=1\nnonsense\n", ""},
	} {
		data := map[string][]string{}
		err := parseKeyValues([]byte(c.text), data)
		if c.want == "" {
			if err == nil {
				t.Errorf("%q: want an error", c.text)
			}
			continue
		}
		if got := identityJSON(data); err != nil || got != c.want {
			t.Errorf("%q: got %s, %v, want %s", c.text, got, err, c.want)
		}
	}
}

func TestReadIdentityScript(t *testing.T) {
	c := testConfig(t)
	script := filepath.Join(c.paths.data, "identity/mender-device-identity")
	for _, s := range []struct {
		body string
		mode os.FileMode
		want string
	}{
		{"echo talk >&2; echo sn=1; echo sn=2", 0o755, `{"sn":["1","2"]}`},
		{"echo sn=1; exit 1", 0o755, ""}, {"true", 0o755, ""}, {"echo sn", 0o755, ""}, {"echo sn=1", 0o644, ""},
		{"while :; do echo sn=1111111111111111111111111111111111111111111111111; done | head -c 300000", 0o755, ""},
	} {
		writeScript(t, script, s.body, s.mode)
		got, err := readIdentity(t.Context(), c, "/nonexistent", nil)
		if got != s.want || (err == nil) != (s.want != "") {
			t.Errorf("%q mode %o: got %.100q, %v", s.body, s.mode, got, err)
		}
	}
}

// One that hangs is ended, with what it has started.
func TestIdentityScriptTimeout(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "script")
	writeScript(t, path, "echo a=1; sleep 1000 & sleep 1000", 0o755)
	if _, err := runScript(t.Context(), path, 100*time.Millisecond, nil); err == nil ||
		!strings.Contains(err.Error(), "not done after 100ms") {
		t.Fatalf("got %v", err)
	}
	// What it leaves behind with its output open does not hold us.
	writeScript(t, path, "echo a=1; sleep 1000 &", 0o755)
	out, err := runScript(t.Context(), path, time.Minute, nil)
	if err != nil || string(out) != "a=1\n" {
		t.Fatalf("got %q, %v", out, err)
	}
}

func TestLowestMAC(t *testing.T) {
	sysfs := t.TempDir()
	dev := func(name, index, kind, mac string) {
		d := filepath.Join(sysfs, "class/net", name)
		must(t, os.MkdirAll(d, 0o755))
		for f, v := range map[string]string{"ifindex": index, "type": kind, "address": mac} {
			must(t, os.WriteFile(filepath.Join(d, f), []byte(v+"\n"), 0o600))
		}
	}
	if mac, err := lowestMAC(sysfs); err == nil {
		t.Errorf("no sysfs: got %q", mac)
	}
	dev("lo", "1", "772", "00:00:00:00:00:00")
	if mac, err := lowestMAC(sysfs); err == nil {
		t.Errorf("only lo: got %q", mac)
	}
	dev("dummy0", "2", "1", "aa:00:00:00:00:02")
	dev("wlan0", "10", "1", "aa:00:00:00:00:0a")
	dev("eth0", "9", "1", "aa:00:00:00:00:09")
	dev("can0", "3", "280", "")
	must(t, os.MkdirAll(filepath.Join(sysfs, "class/net/bonding_masters"), 0o755))
	if mac, err := lowestMAC(sysfs); err != nil || mac != "aa:00:00:00:00:09" {
		t.Errorf("got %q, %v", mac, err)
	}
	c := testConfig(t)
	if got, err := readIdentity(t.Context(), c, sysfs, nil); got != `{"mac":"aa:00:00:00:00:09"}` {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestInventory(t *testing.T) {
	dir := t.TempDir()
	script := func(name, body string, mode os.FileMode) { writeScript(t, filepath.Join(dir, name), body, mode) }
	script("mender-inventory-b", "echo x=b; echo mender_client_version=script; echo device_type=script", 0o755)
	script("mender-inventory-a", "echo x=a; echo y='<&>'", 0o755)
	script("mender-inventory-fails", "echo z=1; exit 3", 0o755)
	script("mender-inventory-bad-line", "echo k=1; echo nonsense; echo l=1", 0o755)
	script("mender-inventory-plain", "echo p=1", 0o644)
	script("other", "echo o=1", 0o755)
	must(t, os.Mkdir(filepath.Join(dir, "mender-inventory-dir"), 0o755))
	builtin := map[string][]string{"mender_client_version": {"built in"}, "device_type": {"qemu"}, "none": nil}
	// An artifact has no say in what the device and its scripts are asked for, nor under our own names.
	provides := map[string]string{"app.version": "1"}
	for _, k := range []string{"device_type", "x", "mender_client_version", "mendlet_slot"} {
		provides[k] = "forged"
	}
	data, err := collectInventory(t.Context(), dir, builtin, provides, nil)
	must(t, err)
	body, err := inventoryBody(data)
	must(t, err)
	want := `[{"name":"app.version","value":"1"},{"name":"device_type","value":"qemu"},{"name":"k","value":"1"},` +
		`{"name":"mender_client_version","value":"script"},` +
		`{"name":"x","value":["a","b"]},{"name":"y","value":"\u003c\u0026\u003e"}]`
	if string(body) != want {
		t.Fatalf("got  %s\nwant %s", body, want)
	}
	if sha256Hex(body) == sha256Hex([]byte(`[]`)) || sha256Hex(body) != sha256Hex([]byte(want)) {
		t.Error("the hash does not tell bodies apart")
	}
	// None there: the built-in ones. All failed: an error, since a PUT would remove what they gave before.
	data, err = collectInventory(t.Context(), filepath.Join(dir, "none"), builtin, nil, nil)
	if err != nil || len(data) != 3 {
		t.Fatalf("got %v, %v", data, err)
	}
	bad := t.TempDir()
	writeScript(t, filepath.Join(bad, "mender-inventory-x"), "exit 1", 0o755)
	if _, err := collectInventory(t.Context(), bad, builtin, nil, nil); err == nil {
		t.Error("all scripts failed: want an error")
	}
}

func TestSplay(t *testing.T) {
	if splay("a", 0) != 0 || splay("a", -time.Second) != 0 {
		t.Error("no splay wanted, some got")
	}
	var buckets [10]int
	for i := range 10_000 {
		d := splay(fmt.Sprint("device", i), 10*time.Minute)
		if d < 0 || d >= 10*time.Minute || d != splay(fmt.Sprint("device", i), 10*time.Minute) {
			t.Fatalf("got %s", d)
		}
		buckets[d/time.Minute]++
	}
	for i, n := range buckets {
		if n < 850 || n > 1150 { // 5 sigma
			t.Errorf("minute %d: got %d of 10000 devices", i, n)
		}
	}
}

func FuzzIdentity(f *testing.F) {
	f.Add([]byte("a=1\nb=2\na=3\n"))
	f.Add([]byte("=\n\"=\\\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		data := map[string][]string{}
		if parseKeyValues(text, data) != nil || len(data) == 0 {
			return
		}
		got := identityJSON(data)
		if strings.Contains(got, "\n") || got[0] != '{' || got[len(got)-1] != '}' {
			t.Fatalf("%q: got %q", text, got)
		}
	})
}

// The scripts of Debian's mender-client package, as they are: all but the one that asks a server
// on the internet where the device is. Its identity must be that of the built-in one, as to the
// server another identity is another device.
func TestDebianIdentityAndInventory(t *testing.T) {
	const from = "/usr/share/doc/mender-client/examples"
	if _, err := os.Stat(from + "/mender-device-identity"); err != nil {
		t.Skipf("needs Debian's mender-client: %v", err)
	}
	c := testConfig(t)
	must(t, os.MkdirAll(c.paths.data+"/identity", 0o755))
	must(t, os.MkdirAll(c.paths.data+"/inventory", 0o755))
	builtin, err := readIdentity(t.Context(), c, "/sys", nil)
	if err != nil {
		t.Skipf("needs a network interface: %v", err)
	}
	must(t, os.Symlink(from+"/mender-device-identity", c.paths.data+"/identity/mender-device-identity"))
	if got, err := readIdentity(t.Context(), c, "/sys", nil); err != nil || got != builtin {
		t.Errorf("got identity %s, %v, built-in is %s", got, err, builtin)
	}
	list, err := filepath.Glob(from + "/mender-inventory-*")
	must(t, err)
	for _, s := range list {
		if filepath.Base(s) != "mender-inventory-geo" {
			must(t, os.Symlink(s, filepath.Join(c.paths.data, "inventory", filepath.Base(s))))
		}
	}
	data, err := collectInventory(t.Context(), c.paths.data+"/inventory", nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	host, _ := os.Hostname()
	if len(data["kernel"]) != 1 || len(data["os"]) != 1 || len(data["network_interfaces"]) == 0 ||
		!slices.Equal(data["hostname"], []string{host}) {
		t.Errorf("got %v", data)
	}
	if body, err := inventoryBody(data); err != nil || !json.Valid(body) {
		t.Errorf("got %s, %v", body, err)
	}
}

func logNames(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func readMessages(t *testing.T, path string) []deployLogEntry {
	t.Helper()
	body, err := deployLogBody(path, "")
	if err != nil {
		t.Fatal(err)
	}
	var r struct{ Messages []deployLogEntry }
	if err := json.Unmarshal(body, &r); err != nil {
		t.Fatalf("%v in %.200s", err, body)
	}
	if len(body) > 1<<20 {
		t.Fatalf("got %d bytes, a server takes 1 MiB", len(body))
	}
	return r.Messages
}

func TestDeployLog(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.FixedZone("x", 3600))
	for _, msg := range []string{"one <1>", "two\nlines", ""} { // opened anew each time, as after a restart
		l, err := openDeployLog(dir, "id-1")
		if err != nil {
			t.Fatal(err)
		}
		l.add(at, levelInfo, msg)
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "deployments.0000.id-1.log")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"timestamp":"2026-01-02T02:04:05.000000678Z","level":"info","message":"one <1>"}` + "\n" +
		`{"timestamp":"2026-01-02T02:04:05.000000678Z","level":"info","message":"two\nlines"}` + "\n"
	if string(text) != want {
		t.Fatalf("got %s", text)
	}
	if got := readMessages(t, path); len(got) != 2 || got[1].Message != "two\nlines" {
		t.Fatalf("got %v", got)
	}
}

// Field case 4: an id that is not one never becomes a file name.
func TestDeployLogID(t *testing.T) {
	dir := t.TempDir()
	for _, id := range []string{"", "../x", "a/b", "a.b", "*", "[a]", "-x\x00", strings.Repeat("a", 65)} {
		if _, err := openDeployLog(dir, id); err == nil {
			t.Errorf("%q: want an error", id)
		}
	}
	if got := logNames(t, dir); len(got) != 0 {
		t.Errorf("got files %q", got)
	}
}

func TestDeployLogRotation(t *testing.T) {
	dir := t.TempDir()
	// One of each kind that Mender's clients leave, and a file that is none of ours.
	for _, n := range []string{"deployments.0001.old-g.log", "other.log", "deployments.1.x.log"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		l, err := openDeployLog(dir, fmt.Sprint("id-", i))
		if err != nil {
			t.Fatal(err)
		}
		l.close()
	}
	want := []string{"deployments.0000.id-5.log", "deployments.0001.id-4.log", "deployments.0002.id-3.log",
		"deployments.0003.id-2.log", "deployments.0004.id-1.log", "deployments.1.x.log", "other.log"}
	if got := logNames(t, dir); !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	// An older deployment that goes on after all keeps its file.
	l, err := openDeployLog(dir, "id-3")
	if err != nil {
		t.Fatal(err)
	}
	l.close()
	if got := logNames(t, dir); !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

// A link that someone put there is not followed (field case 14).
func TestDeployLogSymlink(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	if err := os.Symlink(target, filepath.Join(dir, "deployments.0000.id.log")); err != nil {
		t.Fatal(err)
	}
	if _, err := openDeployLog(dir, "id"); err == nil {
		t.Error("a link was followed")
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("its target was made")
	}
	// Nor where a log is made shorter, in a directory that was given another name meanwhile.
	victim, moved := writeTemp(t, "victim", []byte("kept")), dir+".moved"
	l, err := openDeployLog(dir, "id-2")
	must(t, err)
	defer l.close()
	must(t, os.Symlink(victim, l.dir.in(l.name)+".tmp"))
	must(t, os.Rename(dir, moved))
	must(t, os.Symlink(filepath.Dir(victim), dir))
	l.add(time.Now(), levelInfo, strings.Repeat("x", 1000))
	l.shorten()
	l.add(time.Now(), levelInfo, "the end")
	if got := readText(t, victim); got != "kept" {
		t.Errorf("the link's target: got %.100q", got)
	}
	if list, _ := os.ReadDir(filepath.Dir(victim)); len(list) != 1 {
		t.Errorf("in the link's directory: got %v", list)
	}
	text := readText(t, filepath.Join(moved, l.name))
	if !strings.Contains(text, noteTooBig) || !strings.Contains(text, "the end") {
		t.Errorf("got %q", text)
	}
}

// Mender 39f4a3d6 and integration test_bad_depl_log: a torn line made the server answer 400
// for ever.
func TestDeployLogCorrupt(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "deployments.0000.id.log")
	good := `{"timestamp":"2024-01-02T03:04:05Z","level":"info","message":"good"}`
	bad := []string{"garbage", `{"timestamp":"yesterday","level":"info","message":"m"}`, `{"level":"info","message":"m"}`,
		`{"timestamp":"2024-01-02T03:04:05Z","message":"m"}`,
		`{"timestamp":"2024-01-02T03:04:05Z","level":"info","message":""}`,
		`[]`, "\x00\x00\x00", `{"timestamp":"2024-01-02T03:04:05Z","level":"in`}
	if err := os.WriteFile(path, []byte(strings.Join(append(slices.Clone(bad[:7]), good, bad[7]), "\n")),
		0o600); err != nil {
		t.Fatal(err)
	}
	l, err := openDeployLog(dir, "id")
	if err != nil {
		t.Fatal(err)
	}
	l.add(time.Now(), levelError, "after the cut")
	l.close()
	got := readMessages(t, path)
	if len(got) != 1+len(bad)+2 {
		t.Fatalf("got %d messages: %v", len(got), got)
	}
	if got[0] != (deployLogEntry{"2024-01-02T03:04:05Z", "error", noteCorrupted}) {
		t.Errorf("got first %v", got[0])
	}
	for i, m := range got {
		isBad := i >= 1 && i <= 7 || i == 9
		if (m.Message == corruptedMessage) != isBad || m.Timestamp == "" {
			t.Errorf("entry %d: got %v", i, m)
		}
	}
	if got[8].Message != "good" || got[10].Message != "after the cut" {
		t.Errorf("got %v", got)
	}
}

// The cause is what a person looks for: it is last, once, and there where nothing else could be kept.
func TestDeployLogEndsWithCause(t *testing.T) {
	dir := t.TempDir()
	v := &verdict{ID: "id", Artifact: "a\n1", Result: "failed", Cause: "no\nspace"}
	const want = `deployment "id" of "a\n1": failed: no; space`
	entries := func(path string) []deployLogEntry {
		t.Helper()
		body, err := deployLogBody(path, lastLine(v))
		must(t, err)
		var r struct{ Messages []deployLogEntry }
		must(t, json.Unmarshal(body, &r))
		return r.Messages
	}
	l, err := openDeployLog(dir, "id")
	must(t, err)
	l.add(time.Now(), levelInfo, "first")
	for n := range 2 {
		got := entries(l.dir.in(l.name))
		if len(got) != 2 || got[0].Message != "first" || got[1].Message != want || got[1].Level != "error" {
			t.Errorf("got %v, want %q once, at the end", got, want)
		}
		if n == 0 {
			l.add(time.Now(), levelError, lastLine(v))
		}
	}
	must(t, l.close())
	if got := entries(""); len(got) != 1 || got[0].Message != want || got[0].Timestamp == "" {
		t.Errorf("without a file: got %v", got)
	}
}

func TestDeployLogEmpty(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	body, err := deployLogBody(path, "")
	if err != nil || string(body) != `{"messages":[]}` {
		t.Fatalf("got %s, %v", body, err)
	}
}

func TestDeployLogTooBig(t *testing.T) {
	dir := t.TempDir()
	l, err := openDeployLog(dir, "id")
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	n := 0
	fill := func(until int64) {
		for l.size < until {
			n++
			l.add(time.Now(), levelInfo, fmt.Sprint(n, " ", strings.Repeat("<", 1000)))
		}
	}
	fill(2 << 20)
	check := func() {
		t.Helper()
		got := readMessages(t, l.dir.in(l.name))
		if got[0].Message != noteTooBig || got[0].Level != "warning" {
			t.Errorf("got first %v", got[0])
		}
		if !strings.HasPrefix(got[len(got)-1].Message, fmt.Sprint(n, " ")) || len(got) < 800 {
			t.Errorf("got %d messages, the last %.20q, want %d", len(got), got[len(got)-1].Message, n)
		}
		for i := range got[:len(got)-1] {
			if got[i].Message == corruptedMessage {
				t.Fatalf("message %d is corrupt", i)
			}
		}
	}
	check()
	// On disk it is bounded, and says so.
	fill(deployLogMax)
	for range 10 {
		n++
		l.add(time.Now(), levelInfo, fmt.Sprint(n, " ", strings.Repeat("<", 1000)))
	}
	if l.size > deployLogMax/2 {
		t.Errorf("got %d bytes", l.size)
	}
	check()
}

// A disk that is full or gone does not disturb an update.
func TestDeployLogWriteError(t *testing.T) {
	l, err := openDeployLog(t.TempDir(), "id")
	if err != nil {
		t.Fatal(err)
	}
	l.f.Close()
	l.add(time.Now(), levelInfo, "x")
	if l.size != 0 {
		t.Errorf("got size %d", l.size)
	}
}

func FuzzDeployLogBody(f *testing.F) {
	f.Add([]byte(`{"timestamp":"2024-01-02T03:04:05Z","level":"info","message":"good"}` + "\nx\n"))
	f.Add([]byte("\n\n\x00"))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, m := range readMessages(t, path) {
			if m.Timestamp == "" || m.Level == "" || m.Message == "" {
				t.Fatalf("got %v", m)
			}
		}
	})
}
