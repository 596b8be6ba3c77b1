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

// privateForms are all in which openssl and crypto/x509 write a private key, by PEM type.
func privateForms(t testing.TB, key crypto.Signer) map[string][]byte {
	b, err := x509.MarshalPKCS8PrivateKey(key)
	forms := map[string][]byte{"PRIVATE KEY": derOf(t, b, err)}
	switch k := key.(type) {
	case *rsa.PrivateKey:
		forms["RSA PRIVATE KEY"] = x509.MarshalPKCS1PrivateKey(k)
	case *ecdsa.PrivateKey:
		b, err := x509.MarshalECPrivateKey(k)
		forms["EC PRIVATE KEY"] = derOf(t, b, err)
	}
	return forms
}

func TestKeysAsX509ReadsThem(t *testing.T) {
	type equaler interface{ Equal(crypto.PublicKey) bool }
	for _, key := range testSigners(t) {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		pub, err := parsePublicKey(derOf(t, der, err))
		if err != nil || !pub.(equaler).Equal(key.Public()) {
			t.Errorf("%T: %v, %v", key, pub, err)
		}
		for kind, der := range privateForms(t, key) {
			got, err := parseSigner(kind, der)
			if err != nil || !got.(interface{ Equal(crypto.PrivateKey) bool }).Equal(key) {
				t.Errorf("%T as %s: %v", key, kind, err)
			}
			for cut := range der {
				if _, err := parseSigner(kind, der[:cut]); err == nil {
					t.Errorf("%T as %s: cut off at %d of %d and accepted", key, kind, cut, len(der))
				}
			}
			if _, err := parseSigner(kind, append(bytes.Clone(der), 0)); err == nil {
				t.Errorf("%T as %s: a byte too much was accepted", key, kind)
			}
		}
	}
}

func TestKeysOfOtherKinds(t *testing.T) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	derOf(t, key, err)
	der, err := x509.MarshalPKIXPublicKey(pub)
	if k, err := parsePublicKey(derOf(t, der, err)); err == nil {
		t.Errorf("Ed25519 public key: %v", k)
	}
	der, err = x509.MarshalPKCS8PrivateKey(key)
	if k, err := parseSigner("PRIVATE KEY", derOf(t, der, err)); err == nil {
		t.Errorf("Ed25519 private key: %v", k)
	}
	if k, err := parseSigner("ENCRYPTED PRIVATE KEY", der); err == nil {
		t.Errorf("encrypted: %v", k)
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
		if err != nil || !got.(interface{ Equal(crypto.PublicKey) bool }).Equal(want) {
			t.Errorf("% x: got %v, crypto/x509 says %v, %v", der, got, want, err)
		}
	})
}
