// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// stdVerifies is the verdict of crypto/rsa and crypto/ecdsa.
func stdVerifies(key crypto.PublicKey, digest, sig []byte) bool {
	switch k := key.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, digest, sig) == nil
	case *ecdsa.PublicKey:
		if ecdsa.VerifyASN1(k, digest, sig) {
			return true
		}
		return len(sig) == 64 && k.Curve == elliptic.P256() &&
			ecdsa.Verify(k, digest, new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:]))
	}
	return false
}

// agreed is what all say: this build's verification, the one on math/big, the standard library's.
func agreed(t testing.TB, what string, der, digest, sig []byte) bool {
	t.Helper()
	pub, stdErr := x509.ParsePKIXPublicKey(der)
	want := stdErr == nil && stdVerifies(pub, digest, sig)
	k, err := parsePublicKey(der)
	if err != nil {
		if r, ok := pub.(*rsa.PublicKey); want && !(ok && r.N.BitLen() > maxRSA) {
			t.Errorf("%s: key refused, %v, and crypto/x509 takes it and the signature", what, err)
		}
		return false
	}
	if k.curve != "" {
		if err := bigCheckPoint(k.curve, k.point); err != nil {
			t.Errorf("%s: math/big says %v, crypto/ecdsa takes the point", what, err)
		}
	}
	if got := k.verifiesBy(bigVerifyRSA, bigVerifyECDSA, digest, sig); got != want {
		t.Errorf("%s: math/big says %v, the standard library %v: key % x, digest % x, signature % x", what, got, want, der, digest, sig)
	}
	if got := k.verifiesBy(verifyRSA, verifyECDSA, digest, sig); got != want {
		t.Errorf("%s: this build says %v, the standard library %v: key % x, digest % x, signature % x", what, got, want, der, digest, sig)
	}
	return want
}

func publicDER(t testing.TB, pub crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	return derOf(t, der, err)
}

// rsaKey makes a key with the exponent e, which crypto/rsa no longer lets choose.
func rsaKey(t testing.TB, size, e int) *rsa.PrivateKey {
	t.Helper()
	one, exp := big.NewInt(1), big.NewInt(int64(e))
	for {
		var primes []*big.Int
		phi := big.NewInt(1)
		for range 2 {
			p, err := rand.Prime(rand.Reader, size/2)
			primes = append(primes, derOf(t, p, err))
			phi.Mul(phi, new(big.Int).Sub(p, one))
		}
		n, d := new(big.Int).Mul(primes[0], primes[1]), new(big.Int).ModInverse(exp, phi)
		if d != nil && n.BitLen() == size {
			return &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: n, E: e}, D: d, Primes: primes}
		}
	}
}

// rsaRaw makes the signature whose encoded message is em.
func rsaRaw(k *rsa.PrivateKey, em []byte) []byte {
	s := new(big.Int).SetBytes(em)
	return s.Exp(s, k.D, k.N).FillBytes(make([]byte, k.Size()))
}

// encoded is 00 01 FF… 00 and rest, as long as a key's modulus.
func encoded(k *rsa.PrivateKey, rest string) []byte {
	return []byte("\x00\x01" + strings.Repeat("\xff", k.Size()-3-len(rest)) + "\x00" + rest)
}

func TestVerifyRSA(t *testing.T) {
	const noNull = "\x30\x2f\x30\x0b\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x04\x20"
	const sha512 = "\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x20"
	for _, c := range []struct{ size, e int }{{1024, 65537}, {1030, 3}, {2048, 3}, {2048, 65537}, {2048, 1<<31 - 1}, {3072, 65537}, {4096, 3}, {4096, 65537}} {
		if testing.Short() && c.size > 2048 {
			continue
		}
		k := rsaKey(t, c.size, c.e)
		der := publicDER(t, &k.PublicKey)
		sum := sha256.Sum256([]byte("manifest"))
		h, other := string(sum[:]), sha256.Sum256([]byte("another"))
		good := encoded(k, sha256Info+h)
		sig := rsaRaw(k, good)
		if !agreed(t, "good", der, sum[:], sig) {
			t.Errorf("RSA of %d bits, e %d: good signature refused", c.size, c.e)
		}
		library, err := rsa.SignPKCS1v15(nil, k, crypto.SHA256, sum[:])
		if c.e != 65537 { // its own check of keys wants more of a private one
			library, err = sig, nil
		}
		if !bytes.Equal(derOf(t, library, err), sig) {
			t.Errorf("RSA of %d bits: crypto/rsa signs in another way", c.size)
		}
		at := func(i int, b byte) []byte {
			em := bytes.Clone(good)
			em[i] = b
			return rsaRaw(k, em)
		}
		behind := func(pad int) []byte { // Bleichenbacher 2006: what is wrong is behind the hash
			em := "\x00\x01" + strings.Repeat("\xff", pad) + "\x00" + sha256Info + h
			return rsaRaw(k, append([]byte(em), make([]byte, k.Size()-len(em))...))
		}
		wrap := new(big.Int).SetBytes(sig)
		wrap.Add(wrap, k.N)
		for name, bad := range map[string][]byte{
			"digest of another":        rsaRaw(k, encoded(k, sha256Info+string(other[:]))),
			"digest without its info":  rsaRaw(k, encoded(k, h)),
			"no NULL":                  rsaRaw(k, encoded(k, noNull+h)),
			"SHA-512's info":           rsaRaw(k, encoded(k, sha512+h)),
			"a byte behind the hash":   rsaRaw(k, encoded(k, sha256Info+h+"\x00")),
			"8 bytes of padding":       behind(8),
			"no padding":               behind(0),
			"one byte of padding less": rsaRaw(k, slices.Concat([]byte{0}, good[:2], good[3:])),
			"padding of another byte":  at(20, 0xfe),
			"zero in the padding":      at(3, 0),
			"no zero after it":         at(len(good)-len(sha256Info)-33, 0xff),
			"block type 0":             at(1, 0),
			"block type 2":             at(1, 2),
			"the hash's last bit":      at(len(good)-1, good[len(good)-1]^1),
			"the info's first bit":     at(len(good)-len(sha256Info)-32, sha256Info[0]^1),
			"empty":                    {},
			"zero":                     make([]byte, k.Size()),
			"one":                      append(make([]byte, k.Size()-1), 1),
			"the modulus":              k.N.Bytes(),
			"the modulus less one":     new(big.Int).Sub(k.N, big.NewInt(1)).Bytes(),
			"all bits":                 bytes.Repeat([]byte{0xff}, k.Size()),
			"the modulus more":         wrap.Bytes(),
			"a zero before":            append([]byte{0}, sig...),
			"a zero behind":            append(bytes.Clone(sig), 0),
			"cut off":                  sig[:len(sig)-1],
			"cut off before":           sig[1:],
			"the message itself":       good,
		} {
			if agreed(t, name, der, sum[:], bad) {
				t.Errorf("RSA of %d bits, e %d: %s: accepted", c.size, c.e, name)
			}
		}
		if agreed(t, "short digest", der, sum[:31], rsaRaw(k, encoded(k, sha256Info+h[:31]))) {
			t.Errorf("RSA of %d bits: digest of 31 bytes accepted", c.size)
		}
		for name, digest := range map[string][]byte{"another": other[:], "short": sum[:31], "long": append(sum[:], 0), "none": nil} {
			if agreed(t, name, der, digest, sig) {
				t.Errorf("RSA of %d bits: digest %s: accepted", c.size, name)
			}
		}
	}
}

// The same number in another writing: with the modulus added, or without the zero byte that it
// begins with. Not every signature has room for that.
func TestVerifyRSAOtherWritings(t *testing.T) {
	k := rsaKey(t, 1024, 65537)
	der := publicDER(t, &k.PublicKey)
	added, shortened := 0, 0
	for i := 0; added == 0 || shortened == 0; i++ {
		sum := sha256.Sum256(big.NewInt(int64(i)).Bytes())
		sig := rsaRaw(k, encoded(k, sha256Info+string(sum[:])))
		wrap := new(big.Int).SetBytes(sig)
		if wrap.Add(wrap, k.N).BitLen() <= 1024 {
			added++
			if agreed(t, "the modulus added", der, sum[:], wrap.Bytes()) {
				t.Fatal("the signature with the modulus added was accepted")
			}
		}
		if sig[0] == 0 {
			shortened++
			if agreed(t, "shortened", der, sum[:], sig[1:]) || !agreed(t, "with its zero", der, sum[:], sig) {
				t.Fatal("the signature without its first zero was accepted, or refused with it")
			}
		}
	}
}

// The rules for RSA keys are those of crypto/rsa, up to the limit of our own.
func TestCheckRSA(t *testing.T) {
	odd := func(bits int) *big.Int {
		return new(big.Int).SetBit(big.NewInt(1), bits-1, 1)
	}
	for _, c := range []struct {
		n  *big.Int
		e  int
		ok bool
	}{
		{big.NewInt(0), 3, false}, {big.NewInt(1), 3, false}, {big.NewInt(2), 3, false}, {odd(512), 3, false}, {odd(1023), 3, false},
		{odd(1024), 3, true}, {odd(1025), 3, true}, {odd(2048), 65537, true}, {odd(maxRSA), 3, true}, {odd(maxRSA + 1), 3, false}, {odd(500000), 3, false},
		{new(big.Int).Lsh(odd(1024), 1), 3, false}, {odd(2048), 0, false}, {odd(2048), 1, false}, {odd(2048), 2, false}, {odd(2048), 65536, false},
		{odd(2048), 1<<31 - 1, true},
	} {
		if err := checkRSA(c.n, c.e); (err == nil) != c.ok {
			t.Errorf("%d bits, e %d: %v", c.n.BitLen(), c.e, err)
		}
		var der []byte
		if c.n.Sign() > 0 {
			der = publicDER(t, &rsa.PublicKey{N: c.n, E: c.e})
		} else { // the only one that crypto/x509 does not write
			der, _ = hex.DecodeString("301b300d06092a864886f70d0101010500030a003007020100020200ff")
		}
		if _, err := parsePublicKey(der); (err == nil) != c.ok {
			t.Errorf("%d bits, e %d, in DER: %v", c.n.BitLen(), c.e, err)
		}
		if c.n.BitLen() > maxRSA {
			continue
		}
		// crypto/rsa tells a bad key from a signature that does not verify.
		std := rsa.VerifyPKCS1v15(&rsa.PublicKey{N: c.n, E: c.e}, crypto.SHA256, make([]byte, 32), make([]byte, (c.n.BitLen()+7)/8))
		if takes := std == rsa.ErrVerification; takes != c.ok {
			t.Errorf("%d bits, e %d: crypto/rsa says %v", c.n.BitLen(), c.e, std)
		}
	}
}

// The largest key with the largest exponent is verified in a time that one can wait for.
func BenchmarkVerifyLargest(b *testing.B) {
	n := make([]byte, maxRSA/8)
	rand.Read(n)
	n[0], n[len(n)-1] = 0xff, 0xff
	for b.Loop() {
		bigVerifyRSA(n, 1<<31-1, make([]byte, 32), bytes.Repeat([]byte{0x5a}, maxRSA/8))
	}
}

func BenchmarkVerifyBig(b *testing.B) {
	for _, c := range allCurves {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		point, _ := derOf(b, k, err).PublicKey.Bytes()
		r, s, _ := ecdsa.Sign(rand.Reader, k, make([]byte, 32))
		b.Run(c.Params().Name, func(b *testing.B) {
			for b.Loop() {
				bigVerifyECDSA(c.Params().Name, point, make([]byte, 32), r, s)
			}
		})
	}
	k := rsaKey(b, 4096, 65537)
	b.Run("RSA 4096", func(b *testing.B) {
		for b.Loop() {
			bigVerifyRSA(k.N.Bytes(), k.E, make([]byte, 32), bytes.Repeat([]byte{0x5a}, 512))
		}
	})
}

var allCurves = []elliptic.Curve{elliptic.P224(), elliptic.P256(), elliptic.P384(), elliptic.P521()}

func TestCurves(t *testing.T) {
	for _, c := range allCurves {
		want, got := c.Params(), bigCurve(c.Params().Name)
		for i, p := range [][2]*big.Int{{got.p, want.P}, {got.n, want.N}, {got.b, want.B}, {got.gx, want.Gx}, {got.gy, want.Gy}} {
			if p[0].Cmp(p[1]) != 0 {
				t.Errorf("%s, number %d: got %x, want %x", want.Name, i, p[0], p[1])
			}
		}
	}
}

type ecSig struct{ R, S *big.Int }

func ecDER(t testing.TB, r, s *big.Int) []byte {
	t.Helper()
	b, err := asn1.Marshal(ecSig{r, s})
	return derOf(t, b, err)
}

// ecKey is the key whose secret is d.
func ecKey(t testing.TB, c elliptic.Curve, d *big.Int) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.ParseRawPrivateKey(c, d.FillBytes(make([]byte, (c.Params().BitSize+7)/8)))
	return derOf(t, k, err)
}

func TestVerifyECDSA(t *testing.T) {
	sum, other := sha256.Sum256([]byte("manifest")), sha256.Sum256([]byte("another"))
	for _, c := range allCurves {
		n := c.Params().N
		plus := func(a *big.Int, b int64) *big.Int { return new(big.Int).Add(a, big.NewInt(b)) }
		fresh, err := ecdsa.GenerateKey(c, rand.Reader)
		keys := []*ecdsa.PrivateKey{derOf(t, fresh, err)}
		// The key's point is g, 2g, 3g, -g, -2g, g/2: sums that are twice a point, or infinity.
		for _, d := range []*big.Int{big.NewInt(1), big.NewInt(2), big.NewInt(3), plus(n, -1), plus(n, -2), new(big.Int).Rsh(plus(n, 1), 1)} {
			keys = append(keys, ecKey(t, c, d))
		}
		for i, k := range keys {
			der := publicDER(t, &k.PublicKey)
			r, s, err := ecdsa.Sign(rand.Reader, k, sum[:])
			derOf(t, r, err)
			negative := new(big.Int).Sub(n, s) // as valid: the point's x is the same
			for name, sig := range map[string][]byte{"good": ecDER(t, r, s), "n-s": ecDER(t, r, negative)} {
				if !agreed(t, name, der, sum[:], sig) {
					t.Errorf("%s, key %d: %s signature refused", c.Params().Name, i, name)
				}
			}
			zero := new(big.Int)
			for name, sig := range map[string][]byte{
				"swapped": ecDER(t, s, r), "r is 0": ecDER(t, zero, s), "s is 0": ecDER(t, r, zero), "both are 0": ecDER(t, zero, zero),
				"r is 1": ecDER(t, big.NewInt(1), s), "s is 1": ecDER(t, r, big.NewInt(1)),
				"r is n": ecDER(t, n, s), "s is n": ecDER(t, r, n), "r is n+1": ecDER(t, plus(n, 1), s), "s is n+1": ecDER(t, r, plus(n, 1)),
				"r more by n": ecDER(t, new(big.Int).Add(r, n), s), "s more by n": ecDER(t, r, new(big.Int).Add(s, n)),
				"r is p": ecDER(t, c.Params().P, s), "r negative": ecDER(t, new(big.Int).Neg(r), s), "s negative": ecDER(t, r, new(big.Int).Neg(s)),
				"r is off by one": ecDER(t, plus(r, 1), s), "s is off by one": ecDER(t, r, plus(s, -1)),
				"cut off": ecDER(t, r, s)[:40], "longer": append(ecDER(t, r, s), 0), "empty": {}, "64 zeros": make([]byte, 64),
			} {
				if agreed(t, name, der, sum[:], sig) {
					t.Errorf("%s, key %d: %s: accepted", c.Params().Name, i, name)
				}
			}
			if agreed(t, "another digest", der, other[:], ecDER(t, r, s)) {
				t.Errorf("%s, key %d: accepted for another digest", c.Params().Name, i)
			}
			agreed(t, "digest of zeros", der, make([]byte, 32), ecDER(t, r, s))
			if c == elliptic.P224() && agreed(t, "raw", der, sum[:], append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)) {
				t.Error("P-224: 64 bytes accepted")
			}
			if c == elliptic.P256() {
				testRaw(t, der, sum[:], r, s)
			}
			for size := range 70 { // digests of any size are cut to the order's bits, or are short
				digest := bytes.Repeat([]byte{0xf5}, size)
				r, s, err := ecdsa.Sign(rand.Reader, k, digest)
				if err == nil && size%7 == i && !agreed(t, "digest of another size", der, digest, ecDER(t, r, s)) {
					t.Errorf("%s: digest of %d bytes refused", c.Params().Name, size)
				}
			}
		}
	}
}

// testRaw tries r and s of 32 bytes each.
func testRaw(t *testing.T, der, digest []byte, r, s *big.Int) {
	t.Helper()
	raw := func(r, s *big.Int) []byte {
		return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	}
	good := raw(r, s)
	if !agreed(t, "raw", der, digest, good) {
		t.Error("64 bytes refused")
	}
	n := elliptic.P256().Params().N
	for name, sig := range map[string][]byte{
		"swapped": raw(s, r), "r is 0": raw(new(big.Int), s), "s is 0": raw(r, new(big.Int)), "r is n": raw(n, s), "s is n": raw(r, n),
		"63 bytes": good[:63], "65 bytes": append(bytes.Clone(good), 0), "zero between": slices.Concat(good[:32], []byte{0}, good[32:]),
		"66 bytes": slices.Concat([]byte{0}, good[:32], []byte{0}, good[32:]),
	} {
		if agreed(t, "raw, "+name, der, digest, sig) {
			t.Errorf("raw, %s: accepted", name)
		}
	}
}

// Where u·g and v·q cancel out there is no x to compare: with q = -g, r = e. And with q = g their
// sum is twice a point.
func TestVerifyECDSAInfinity(t *testing.T) {
	for _, c := range allCurves {
		n := c.Params().N
		for i, d := range []*big.Int{new(big.Int).Sub(n, big.NewInt(1)), big.NewInt(1)} {
			digest := sha256.Sum256([]byte(c.Params().Name))
			e := new(big.Int).SetBytes(digest[:])
			e.Rsh(e, uint(max(0, 256-n.BitLen())))
			e.Mod(e, n)
			if agreed(t, "infinity", publicDER(t, &ecKey(t, c, d).PublicKey), digest[:], ecDER(t, e, big.NewInt(12345))) {
				t.Errorf("%s, key %d: accepted", c.Params().Name, i)
			}
		}
	}
}

// Sums of points, against crypto/elliptic.
func TestPointSums(t *testing.T) {
	for _, c := range allCurves {
		b := bigCurve(c.Params().Name)
		mul := func(k int64) *ecPoint {
			if k == 0 {
				return nil
			}
			d := new(big.Int).Mod(big.NewInt(k), b.n)
			pub, _ := ecKey(t, c, d).PublicKey.Bytes()
			p, err := b.point(pub)
			return derOf(t, p, err)
		}
		var points []*ecPoint
		for k := int64(-8); k <= 8; k++ {
			points = append(points, mul(k))
		}
		for i := -4; i <= 4; i++ {
			for j := -4; j <= 4; j++ {
				got, want := b.add(points[8+i], points[8+j]), points[8+i+j]
				if (got == nil) != (want == nil) || got != nil && (got.x.Cmp(want.x) != 0 || got.y.Cmp(want.y) != 0) {
					t.Errorf("%s: %dg + %dg: got %v, want %v", c.Params().Name, i, j, got, want)
				}
			}
		}
	}
}

// Keys that are no points of their curve are refused when they are read, and verify nothing.
func TestPointsOffTheCurve(t *testing.T) {
	sum := sha256.Sum256(nil)
	for _, c := range allCurves {
		name, size, p := c.Params().Name, (c.Params().BitSize+7)/8, c.Params().P
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		good, _ := derOf(t, k, err).PublicKey.Bytes()
		r, s, _ := ecdsa.Sign(rand.Reader, k, sum[:])
		point := func(x, y *big.Int) []byte {
			return slices.Concat([]byte{4}, x.FillBytes(make([]byte, size)), y.FillBytes(make([]byte, size)))
		}
		x, y := new(big.Int).SetBytes(good[1:1+size]), new(big.Int).SetBytes(good[1+size:])
		all := bytes.Repeat([]byte{0xff}, 2*size)
		der := publicDER(t, &k.PublicKey)
		bad := map[string][]byte{
			"none": {}, "infinity": {0}, "infinity, long": make([]byte, 1+2*size), "zeros": append([]byte{4}, make([]byte, 2*size)...),
			"compressed": append([]byte{2 + byte(y.Bit(0))}, good[1:1+size]...), "hybrid": append([]byte{6 + byte(y.Bit(0))}, good[1:]...),
			"cut off": good[:2*size], "longer": append(bytes.Clone(good), 0), "swapped": point(y, x), "all bits": append([]byte{4}, all...),
			"y off by one": point(x, new(big.Int).Xor(y, big.NewInt(1))), "x off by one": point(new(big.Int).Xor(x, big.NewInt(1)), y),
			"x is p": point(p, y), "y is p": point(x, p), "y is 0": point(x, new(big.Int)),
		}
		if 8*size > p.BitLen() { // P-521 has room for more than p
			bad["x more by p"], bad["y more by p"] = point(new(big.Int).Add(x, p), y), point(x, new(big.Int).Add(y, p))
		}
		for what, b := range bad {
			if len(b) == len(good) {
				if k, err := parsePublicKey(slices.Concat(der[:len(der)-len(b)], b)); err == nil {
					t.Errorf("%s, %s: taken for a key: %v", name, what, k)
				}
			}
			if _, err := ecdsa.ParseUncompressedPublicKey(c, b); err == nil {
				t.Errorf("%s, %s: crypto/ecdsa takes it", name, what)
			}
			if bigCheckPoint(name, b) == nil || checkPoint(name, b) == nil || bigVerifyECDSA(name, b, sum[:], r, s) {
				t.Errorf("%s, %s: taken for a point: % x", name, what, b)
			}
		}
		if bigCheckPoint(name, good) != nil || !bigVerifyECDSA(name, good, sum[:], r, s) {
			t.Errorf("%s: a point was refused: % x", name, good)
		}
	}
	// A coordinate with p added, where that still fits: x³ - 3x + b is a square for a small x.
	p := elliptic.P224().Params().P
	b := bigCurve(curveP224)
	for x := int64(1); ; x++ {
		v := big.NewInt(x*x*x - 3*x)
		y := v.ModSqrt(v.Mod(v.Add(v, b.b), p), p)
		if y == nil {
			continue
		}
		for _, add := range []*big.Int{new(big.Int), p} {
			at := slices.Concat([]byte{4}, new(big.Int).Add(big.NewInt(x), add).FillBytes(make([]byte, 28)), y.FillBytes(make([]byte, 28)))
			if err := bigCheckPoint(curveP224, at); (err == nil) != (add.Sign() == 0) {
				t.Errorf("x is %d more than %d: %v", x, add, err)
			}
		}
		return
	}
}

// The signatures over "sample" with SHA-256 in RFC 6979, A.2.4 to A.2.7.
func TestVerifyRFC6979(t *testing.T) {
	sum := sha256.Sum256([]byte("sample"))
	for _, v := range []struct{ curve, x, y, r, s string }{
		{
			curveP224, "00CF08DA5AD719E42707FA431292DEA11244D64FC51610D94B130D6C", "EEAB6F3DEBE455E3DBF85416F7030CBD94F34F2D6F232C69F3C1385A",
			"61AA3DA010E8E8406C656BC477A7A7189895E7E840CDFE8FF42307BA", "BC814050DAB5D23770879494F9E0A680DC1AF7161991BDE692B10101",
		},
		{
			curveP256, "60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6", "7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299",
			"EFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716", "F7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8",
		},
		{
			curveP384, "EC3A4E415B4E19A4568618029F427FA5DA9A8BC4AE92E02E06AAE5286B300C64DEF8F0EA9055866064A254515480BC13", "8015D9B72D7D57244EA8EF9AC0C621896708A59367F9DFB9F54CA84B3F1C9DB1288B231C3AE0D4FE7344FD2533264720",
			"21B13D1E013C7FA1392D03C5F99AF8B30C570C6F98D4EA8E354B63A21D3DAA33BDE1E888E63355D92FA2B3C36D8FB2CD", "F3AA443FB107745BF4BD77CB3891674632068A10CA67E3D45DB2266FA7D1FEEBEFDC63ECCD1AC42EC0CB8668A4FA0AB0",
		},
		{
			curveP521, "01894550D0785932E00EAA23B694F213F8C3121F86DC97A04E5A7167DB4E5BCD371123D46E45DB6B5D5370A7F20FB633155D38FFA16D2BD761DCAC474B9A2F5023A4", "00493101C962CD4D2FDDF782285E64584139C2F91B47F87FF82354D6630F746A28A0DB25741B5B34A828008B22ACC23F924FAAFBD4D33F81EA66956DFEAA2BFDFCF5",
			"01511BB4D675114FE266FC4372B87682BAECC01D3CC62CF2303C92B3526012659D16876E25C7C1E57648F23B73564D67F61C6F14D527D54972810421E7D87589E1A7", "004A171143A83163D6DF460AAF61522695F207A58B95C0644D87E52AA1A347916E4F7A72930B1BC06DBE22CE3F58264AFD23704CBB63B29B931F7DE6C9D949A7ECFC",
		},
	} {
		point := slices.Concat([]byte{4}, unhex(t, v.x), unhex(t, v.y))
		r, s := new(big.Int).SetBytes(unhex(t, v.r)), new(big.Int).SetBytes(unhex(t, v.s))
		if !bigVerifyECDSA(v.curve, point, sum[:], r, s) {
			t.Errorf("%s: refused", v.curve)
		}
		if bigVerifyECDSA(v.curve, point, sum[:], s, r) {
			t.Errorf("%s: accepted with r and s swapped", v.curve)
		}
	}
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Repeat("0", len(s)%2) + s)
	return derOf(t, b, err)
}

// NIST's vectors of signatures, good and bad (CAVP, SigVer.rsp), of which Go's source has a copy.
func TestVerifyNIST(t *testing.T) {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Skip(err)
	}
	f, err := os.Open(filepath.Join(strings.TrimSpace(string(root)), "src/crypto/ecdsa/testdata/SigVer.rsp.bz2"))
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	verdicts := map[bool]int{}
	curve, hash, v := "", "", map[string]string{}
	lines := bufio.NewScanner(bzip2.NewReader(f))
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "[") {
			curve, hash, _ = strings.Cut(strings.Trim(line, "[]"), ",")
		}
		key, value, _ := strings.Cut(line, " = ")
		if v[key] = value; key != "Result" || !slices.Contains([]string{curveP224, curveP256, curveP384, curveP521}, curve) {
			continue
		}
		size := map[string]int{curveP224: 28, curveP256: 32, curveP384: 48, curveP521: 66}[curve]
		number := func(name string) *big.Int { return new(big.Int).SetBytes(unhex(t, v[name])) }
		point := slices.Concat([]byte{4}, number("Qx").FillBytes(make([]byte, size)), number("Qy").FillBytes(make([]byte, size)))
		want := strings.HasPrefix(value, "P")
		if got := bigVerifyECDSA(curve, point, sumOf(t, hash, unhex(t, v["Msg"])), number("R"), number("S")); got != want {
			t.Errorf("%s, %s: got %v, want %v for %v", curve, hash, got, want, v)
		}
		verdicts[want]++
	}
	if verdicts[true] < 50 || verdicts[false] < 100 {
		t.Errorf("read %v, want more", verdicts)
	}
}

func sumOf(t testing.TB, hash string, b []byte) []byte {
	t.Helper()
	switch hash {
	case "SHA-1":
		s := sha1.Sum(b)
		return s[:]
	case "SHA-224":
		s := sha256.Sum224(b)
		return s[:]
	case "SHA-256":
		s := sha256.Sum256(b)
		return s[:]
	case "SHA-384":
		s := sha512.Sum384(b)
		return s[:]
	case "SHA-512":
		s := sha512.Sum512(b)
		return s[:]
	}
	t.Fatalf("hash %q", hash)
	return nil
}

// FuzzVerify holds verification on math/big against the standard library's: for key, digest and
// signature as they are, and, so that some verify, for a key made here and the encoded message or
// the two numbers of a good signature that differ in the bits of sig.
func FuzzVerify(f *testing.F) {
	sum := sha256.Sum256([]byte("manifest"))
	for i, k := range testSigners(f) {
		sig, err := k.Sign(rand.Reader, sum[:], crypto.SHA256)
		f.Add(publicDER(f, k.Public()), sum[:], derOf(f, sig, err), uint8(i))
		f.Add(publicDER(f, k.Public()), sum[:], make([]byte, 64), uint8(i))
	}
	f.Add([]byte{}, sum[:], []byte{}, uint8(1))               // nothing: as signed
	f.Add([]byte{}, sum[:], []byte("\x00\x00\x01"), uint8(4)) // a byte of the padding
	rsaSigner := rsaKey(f, 1024, 3)
	var ecSigners []*ecdsa.PrivateKey
	for _, c := range allCurves {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		ecSigners = append(ecSigners, derOf(f, k, err))
	}
	f.Fuzz(func(t *testing.T, der, digest, sig []byte, which uint8) {
		agreed(t, "as it is", der, digest, sig)
		if which %= 5; which == 4 {
			em := encoded(rsaSigner, sha256Info+string(sum[:]))
			flip(em[1:], sig)
			agreed(t, "RSA", publicDER(t, &rsaSigner.PublicKey), sum[:], rsaRaw(rsaSigner, em))
			return
		}
		k := ecSigners[which]
		r, s, err := ecdsa.Sign(rand.Reader, k, digest)
		if err != nil {
			return
		}
		size := (k.Params().BitSize + 7) / 8
		both := append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
		flip(both, sig)
		r, s = new(big.Int).SetBytes(both[:size]), new(big.Int).SetBytes(both[size:])
		agreed(t, "ECDSA", publicDER(t, &k.PublicKey), digest, ecDER(t, r, s))
		agreed(t, "ECDSA, raw", publicDER(t, &k.PublicKey), digest, both)
	})
}

func flip(b, bits []byte) {
	for i := range min(len(b), len(bits)) {
		b[i] ^= bits[i]
	}
}
