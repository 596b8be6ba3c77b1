// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"testing"
)

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

func TestPrivateKeysAsX509ReadsThem(t *testing.T) {
	for _, key := range testSigners(t) {
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

func TestPrivateKeysOfOtherKinds(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	derOf(t, key, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if k, err := parseSigner("PRIVATE KEY", derOf(t, der, err)); err == nil {
		t.Errorf("Ed25519 private key: %v", k)
	}
	if k, err := parseSigner("ENCRYPTED PRIVATE KEY", der); err == nil {
		t.Errorf("encrypted: %v", k)
	}
}
