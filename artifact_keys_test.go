// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// MEN-9055, mender-artifact 6ef1fdfd, field case 2: signatures of wrong length and form.
func TestSignatures(t *testing.T) {
	t.Parallel()
	rk, ek := newKeys(t)
	_, rsaPub := keyPair(t, "PRIVATE KEY", rk)
	_, ecPub := keyPair(t, "PRIVATE KEY", ek)
	_, other := keyPair(t, "PRIVATE KEY", func() *ecdsa.PrivateKey { _, e := newKeys(t); return e }())
	keys, err := loadVerifyKeys([]string{rsaPub, other, ecPub}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	raw := func(m []byte) []byte {
		sig, err := signManifest(ek, m)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := base64.StdEncoding.DecodeString(string(sig))
		return b
	}
	for _, c := range []struct {
		name string
		want string // path of the key; "" refused
		sign func(m []byte) string
	}{
		{"RSA", rsaPub, func(m []byte) string { s, _ := signManifest(rk, m); return string(s) }},
		{"ECDSA, 64 bytes", ecPub, func(m []byte) string { return b64(raw(m)) }},
		{"ECDSA, DER", ecPub, func(m []byte) string {
			d := sha256.Sum256(m)
			s, _ := ek.Sign(nil, d[:], crypto.SHA256)
			return b64(s)
		}},
		{"none", "", nil},
		{"empty", "", func([]byte) string { return "" }},
		{"63 bytes", "", func(m []byte) string { return b64(raw(m)[:63]) }},
		{"65 bytes", "", func(m []byte) string { return b64(append(raw(m), 0)) }},
		{"a zero between", "", func(m []byte) string { return b64(slices.Insert(raw(m), 32, 0)) }},
		{"71 bytes", "", func(m []byte) string { return b64(append(raw(m), 0, 0, 0, 0, 0, 0, 0)) }},
		{"64 zeros", "", func(m []byte) string { return b64(make([]byte, 64)) }},
		{"line feed", "", func(m []byte) string { return b64(raw(m)) + "\n" }},
		{"line feed inside", "", func(m []byte) string { s := b64(raw(m)); return s[:40] + "\n" + s[40:] }},
		{"no padding", "", func(m []byte) string { return strings.TrimRight(b64(raw(m)), "=") }},
		{"garbage", "", func(m []byte) string { return "!!!!" }},
		{"of another manifest", "", func(m []byte) string { return b64(raw(append(slices.Clone(m), 'x'))) }},
		{"too large", "", func(m []byte) string { return strings.Repeat("A", maxSig+1) }},
	} {
		k := newKit("mod", tarMember{name: "a", body: []byte("x")})
		if c.sign != nil {
			k.sign = func(m []byte) []byte { return []byte(c.sign(m)) }
		}
		b := k.build(t)
		a, err := openArtifact(bytes.NewReader(b), artifactOptions{keys: keys})
		if c.want == "" {
			if exitCode(err) != exitRefused {
				t.Errorf("%s: got %v, want it refused", c.name, err)
			}
			continue
		}
		if err != nil || a.SignedBy != c.want || !a.Signed {
			t.Errorf("%s: %v", c.name, err)
		}
		a, err = openArtifact(bytes.NewReader(b), artifactOptions{})
		if err != nil || a.SignedBy != "" || !a.Signed {
			t.Errorf("%s, no keys: %v", c.name, err)
		}
	}
}

// The signature comes before anything of the header is believed.
func TestSignatureBeforeHeader(t *testing.T) {
	keys, err := loadVerifyKeys([]string{fixtures + "ec.pub"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	k := newKit("../../bin/sh", tarMember{name: "a", body: []byte("x")})
	k.sign = func([]byte) []byte { return []byte(base64.StdEncoding.EncodeToString(make([]byte, 64))) }
	_, err = openArtifact(bytes.NewReader(k.build(t)), artifactOptions{keys: keys})
	if err == nil || !strings.Contains(err.Error(), "manifest.sig") {
		t.Errorf("got %v, want the signature refused", err)
	}
}

// Field case 11: signed by a key that is not trusted any more.
func TestSignedFixtures(t *testing.T) {
	for _, c := range []struct{ artifact, keys, by string }{
		{"rootfs-signed-rsa", "rsa.pub", "rsa.pub"}, {"rootfs-signed-ecdsa", "ec.pub", "ec.pub"},
		{"rootfs-signed-ecdsa", "other.pub rsa.pub ec.pub", "ec.pub"}, {"module-scripts-signed", "ec.pub", "ec.pub"},
		{"rootfs-signed-rsa", "other.pub", ""}, {"rootfs-signed-rsa", "ec.pub", ""},
		{"rootfs-signed-ecdsa", "rsa.pub other.pub", ""},
		{"rootfs-gzip", "rsa.pub", ""},
	} {
		var paths []string
		for _, k := range strings.Fields(c.keys) {
			paths = append(paths, fixtures+k)
		}
		keys, err := loadVerifyKeys(paths, nil)
		if err != nil {
			t.Fatal(err)
		}
		a, _, err := readAll(fixture(t, c.artifact+".mender"), artifactOptions{keys: keys})
		if c.by == "" && exitCode(err) != exitRefused || c.by != "" && (err != nil || a.SignedBy != fixtures+c.by) {
			t.Errorf("%s with %s: %v", c.artifact, c.keys, err)
		}
	}
}

// Of several keys one that cannot be loaded is warned of; if none can be, that is an error, never "no keys".
func TestLoadVerifyKeys(t *testing.T) {
	private, _ := keyPair(t, "PRIVATE KEY", func() *ecdsa.PrivateKey { _, e := newKeys(t); return e }())
	junk := []byte("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
	for _, path := range []string{"/nonexistent", writeTemp(t, "k", nil), writeTemp(t, "k", junk), private} {
		for _, paths := range [][]string{{fixtures + "ec.pub", path}, {path, fixtures + "ec.pub"}} {
			lg := newChildLog()
			keys, err := loadVerifyKeys(paths, &lg.logger)
			if err != nil || len(keys) != 1 || keys[0].path != fixtures+"ec.pub" || !strings.Contains(lg.text(), path) {
				t.Errorf("%q: got %v, %v, said %q", paths, keys, err, lg.text())
			}
		}
		for _, paths := range [][]string{{path}, {path, path + ".2"}} {
			keys, err := loadVerifyKeys(paths, nil)
			if exitCode(err) != exitRefused || keys != nil || !strings.Contains(err.Error(), path) {
				t.Errorf("%q: got %v, %v", paths, keys, err)
			}
		}
	}
	if keys, err := loadVerifyKeys(nil, nil); err != nil || keys != nil {
		t.Errorf("no paths: %v, %v", keys, err)
	}
}

// publicFile writes a public key in PEM.
func publicFile(t testing.TB, key crypto.PublicKey) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return writeTemp(t, "key.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// Which keys are taken is said when they are read, in every build.
func TestVerifyKeyKinds(t *testing.T) {
	odd := func(bits int) *big.Int { return new(big.Int).SetBit(big.NewInt(1), bits-1, 1) }
	modulus := func(n *big.Int) *rsa.PublicKey { return &rsa.PublicKey{N: n, E: 65537} }
	exponent := func(e int) *rsa.PublicKey { return &rsa.PublicKey{N: odd(2048), E: e} }
	curve := func(c elliptic.Curve) *ecdsa.PublicKey {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return &k.PublicKey
	}
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		key  crypto.PublicKey
		want string // in the refusal; "" accepted
	}{
		"RSA 512":    {modulus(odd(512)), "512 bits"},
		"RSA 1023":   {modulus(odd(1023)), "want an odd one of 1024 to 16384 bits"},
		"RSA 1024":   {modulus(odd(1024)), ""},
		"RSA 1025":   {modulus(odd(1025)), ""},
		"RSA 16384":  {modulus(odd(16384)), ""},
		"RSA 16385":  {modulus(odd(16385)), "16385 bits"},
		"RSA 500000": {modulus(odd(500000)), "500000 bits"},
		"RSA even":   {modulus(new(big.Int).Lsh(odd(2048), 1)), "last bit 0"},
		"e 1":        {exponent(1), "exponent 1:"},
		"e 2":        {exponent(2), "exponent 2:"},
		"e 65536":    {exponent(65536), "want an odd one"},
		"e 3":        {exponent(3), ""},
		"e 2^31-1":   {exponent(1<<31 - 1), ""},
		"P-224":      {curve(elliptic.P224()), ""},
		"P-256":      {curve(elliptic.P256()), ""},
		"P-384":      {curve(elliptic.P384()), ""},
		"P-521":      {curve(elliptic.P521()), ""},
		"Ed25519":    {edwards, "want RSA or ECDSA"},
	} {
		path := publicFile(t, c.key)
		keys, err := loadVerifyKeys([]string{path}, nil)
		if c.want == "" {
			if err != nil || len(keys) != 1 {
				t.Errorf("%s: got %v, want it accepted", name, err)
			}
			continue
		}
		if exitCode(err) != exitRefused || keys != nil {
			t.Errorf("%s: got %v, want it refused", name, err)
		} else if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want %q and %q in it", name, err, c.want, path)
		}
	}
}

// Each key takes its own signature over SHA-256 of the manifest, in the form of its kind, and no other.
func TestSignatureForms(t *testing.T) {
	manifest := []byte("manifest")
	digest, digest512 := sha256.Sum256(manifest), crypto.SHA512.New().Sum(nil)
	sign := func(k crypto.Signer, digest []byte, opts crypto.SignerOpts) []byte {
		t.Helper()
		sig, err := k.Sign(rand.Reader, digest, opts)
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	check := func(name string, keys []verifyKey, sig []byte, ok bool) {
		t.Helper()
		text := []byte(base64.StdEncoding.EncodeToString(sig))
		_, err := verifySignature(keys, manifest, text)
		if (err == nil) != ok || err != nil && exitCode(err) != exitRefused {
			t.Errorf("%s: got %v, want it accepted: %v", name, err, ok)
		}
		if _, err := verifySignature(keys, append(slices.Clone(manifest), 'x'), text); err == nil {
			t.Errorf("%s: accepted for another manifest", name)
		}
	}
	k, _ := newKeys(t)
	keys, err := loadVerifyKeys([]string{publicFile(t, k.Public())}, nil)
	if err != nil {
		t.Fatal(err)
	}
	good := sign(k, digest[:], crypto.SHA256)
	check("RSA", keys, good, true)
	check("RSA, a zero before", keys, append([]byte{0}, good...), false)
	check("RSA, cut off", keys, good[:len(good)-1], false)
	check("RSA over SHA-512", keys, sign(k, digest512, crypto.SHA512), false)
	check("RSA without the name of the hash", keys, sign(k, digest[:], crypto.Hash(0)), false)
	check("RSA by PSS", keys, sign(k, digest[:], &rsa.PSSOptions{Hash: crypto.SHA256}), false)
	for _, c := range []elliptic.Curve{elliptic.P224(), elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		name := c.Params().Name
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys, err := loadVerifyKeys([]string{publicFile(t, k.Public())}, nil)
		if err != nil {
			t.Fatal(err)
		}
		good := sign(k, digest[:], crypto.SHA256)
		check(name, keys, good, true)
		check(name+", longer", keys, append(slices.Clone(good), 0), false)
		r, s, err := ecdsa.Sign(rand.Reader, k, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		size := max(32, (c.Params().BitSize+7)/8) // with P-224 these are 64 bytes, too
		rb, sb := r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))
		check(name+", r and s", keys, slices.Concat(rb, sb), c == elliptic.P256())
		check(name+", s and r", keys, slices.Concat(sb, rb), false)
	}
}

// The signature of "sample" with SHA-256 in RFC 6979, A.2.5: pack needs no randomness, and what it
// writes are r and s, of 32 bytes each.
func TestSignManifestRFC6979(t *testing.T) {
	secret, _ := hex.DecodeString("c9afa9d845ba75166b5c215767b1d6934e50c3db36e89b127b8a622b120f6721")
	want, _ := hex.DecodeString("efd48b2aacb6a8fd1140dd9cd45e81d69d2c877b56aaf991c34d0ea84eaf3716" +
		"f7cb1c942d657c41d436c7a1b6e29f65f3e900dbb9aff4064dc4ab2f843acda8")
	k, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), secret)
	if err != nil {
		t.Fatal(err)
	}
	got, err := signManifest(k, []byte("sample"))
	if err != nil || string(got) != base64.StdEncoding.EncodeToString(want) {
		t.Errorf("got %s, %v, want %x", got, err, want)
	}
}

// Keys of every kind that openssl makes, and its signatures of a manifest.
func TestOpensslKeys(t *testing.T) {
	t.Parallel()
	needTool(t, "openssl")
	dir := t.TempDir()
	key, pub := filepath.Join(dir, "key"), filepath.Join(dir, "pub")
	manifest, sig := filepath.Join(dir, "manifest"), filepath.Join(dir, "sig")
	writeFile(t, manifest, "manifest")
	for _, alg := range []string{
		"RSA -pkeyopt rsa_keygen_bits:1024", "RSA -pkeyopt rsa_keygen_bits:2048 -pkeyopt rsa_keygen_pubexp:3",
		"EC -pkeyopt ec_paramgen_curve:P-224", "EC -pkeyopt ec_paramgen_curve:P-256",
		"EC -pkeyopt ec_paramgen_curve:P-384", "EC -pkeyopt ec_paramgen_curve:P-521",
	} {
		runTool(t, "", "openssl", strings.Fields("genpkey -algorithm "+alg+" -out "+key)...)
		runTool(t, "", "openssl", "pkey", "-in", key, "-pubout", "-out", pub)
		runTool(t, "", "openssl", "dgst", "-sha256", "-sign", key, "-out", sig, manifest)
		keys, err := loadVerifyKeys([]string{pub}, nil)
		if err != nil {
			t.Errorf("%s: %v", alg, err)
			continue
		}
		text, err := os.ReadFile(sig)
		if err != nil {
			t.Fatal(err)
		}
		text = []byte(base64.StdEncoding.EncodeToString(text))
		if by, err := verifySignature(keys, []byte("manifest"), text); err != nil || by != pub {
			t.Errorf("%s: signed by %q, %v", alg, by, err)
		}
		if _, err := verifySignature(keys, []byte("Manifest"), text); err == nil {
			t.Errorf("%s: accepted for another manifest", alg)
		}
	}
	for _, alg := range []string{
		"ED25519", "RSA -pkeyopt rsa_keygen_bits:512",
		"EC -pkeyopt ec_paramgen_curve:secp256k1", "RSA-PSS -pkeyopt rsa_keygen_bits:2048",
	} {
		runTool(t, "", "openssl", strings.Fields("genpkey -algorithm "+alg+" -out "+key)...)
		runTool(t, "", "openssl", "pkey", "-in", key, "-pubout", "-out", pub)
		if keys, err := loadVerifyKeys([]string{pub}, nil); exitCode(err) != exitRefused || keys != nil {
			t.Errorf("%s: got %v, want it refused", alg, err)
		}
	}
}

// The largest key with the largest exponent is verified in a time that one can wait for.
func BenchmarkVerifyLargest(b *testing.B) {
	n := bytes.Repeat([]byte{0xff}, maxRSA/8)
	k := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 1<<31 - 1}
	for b.Loop() {
		verifies(k, make([]byte, 32), bytes.Repeat([]byte{0x5a}, maxRSA/8))
	}
}
