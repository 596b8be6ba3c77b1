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
	"crypto/x509"
	"math/big"
	"testing"
)

func derOf[T any](t testing.TB, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// testSigners are one RSA key and one of each curve.
func testSigners(t testing.TB) []crypto.Signer {
	r, e := newKeys(t)
	list := []crypto.Signer{r, e}
	for _, c := range []elliptic.Curve{elliptic.P224(), elliptic.P384(), elliptic.P521()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		list = append(list, derOf(t, k, err))
	}
	return list
}

// samePublicKey compares what was read here with what crypto/x509 read.
func samePublicKey(k publicKey, pub crypto.PublicKey) bool {
	switch p := pub.(type) {
	case *rsa.PublicKey:
		return new(big.Int).SetBytes(k.n).Cmp(p.N) == 0 && k.e == p.E && k.curve == ""
	case *ecdsa.PublicKey:
		point, err := p.Bytes()
		return err == nil && k.curve == p.Params().Name && bytes.Equal(k.point, point) && k.n == nil
	}
	return false
}

func TestKeysAsX509ReadsThem(t *testing.T) {
	for _, key := range testSigners(t) {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		pub, err := parsePublicKey(derOf(t, der, err))
		if err != nil || !samePublicKey(pub, key.Public()) {
			t.Errorf("%T: %v, %v", key, pub, err)
		}
	}
}

func TestKeysOfOtherKinds(t *testing.T) {
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	der, err := x509.MarshalPKIXPublicKey(pub)
	if k, err := parsePublicKey(derOf(t, der, err)); err == nil {
		t.Errorf("Ed25519 public key: %v", k)
	}
}

// What is taken for a key here is one for crypto/x509 too, and the same.
func FuzzPublicKey(f *testing.F) {
	for _, key := range testSigners(f) {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		f.Add(derOf(f, der, err))
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		got, err := parsePublicKey(der)
		if err != nil {
			return
		}
		want, err := x509.ParsePKIXPublicKey(der)
		if err != nil || !samePublicKey(got, want) {
			t.Errorf("% x: got %v, crypto/x509 says %v, %v", der, got, want, err)
		}
	})
}
