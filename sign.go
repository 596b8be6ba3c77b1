// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"os"
	"strings"
)

// An artifact's signature is over SHA-256 of its manifest: RSA by PKCS #1 v1.5, or ECDSA,
// which mender-artifact writes as r and s of 32 bytes each and which may also come in DER.
// It is stored in base64 without line breaks.

// verifyKey is a public key that artifacts may be signed with.
type verifyKey struct {
	path string
	key  publicKey
}

// loadVerifyKeys reads PEM files of type PUBLIC KEY. One that cannot be loaded is an error:
// going on without it could mean going on without any check.
func loadVerifyKeys(paths []string) ([]verifyKey, error) {
	var keys []verifyKey
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, refuse("key to verify artifacts with: %w", err)
		}
		block, _ := pem.Decode(text)
		if block == nil || block.Type != "PUBLIC KEY" {
			return nil, withHint(refuse("key %q: want PEM of type PUBLIC KEY", path), "openssl pkey -in PRIVATE -pubout writes one")
		}
		key, err := parsePublicKey(block.Bytes)
		if err != nil {
			return nil, refuse("key %q: %w", path, err)
		}
		keys = append(keys, verifyKey{path, key})
	}
	return keys, nil
}

// verifySignature gives the path of the first key that verifies sig.
func verifySignature(keys []verifyKey, manifest, sig []byte) (path string, err error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(string(sig))
	if err != nil || bytes.ContainsAny(sig, "\r\n") || len(raw) == 0 {
		return "", refuse("manifest.sig: %d bytes %q are not base64 without line breaks", len(sig), clip(sig))
	}
	digest := sha256.Sum256(manifest)
	var tried []string
	for _, k := range keys {
		if k.key.verifiesBy(verifyRSA, verifyECDSA, digest[:], raw) {
			return k.path, nil
		}
		tried = append(tried, k.path)
	}
	return "", refuse("manifest.sig: signature of %d bytes was not made by key %q", len(raw), strings.Join(tried, ", "))
}

// verifiesBy says whether the key made sig; rsa and ecdsa do the arithmetic.
func (k *publicKey) verifiesBy(
	rsa func(n []byte, e int, digest, sig []byte) bool,
	ecdsa func(curve string, point, digest []byte, r, s *big.Int) bool,
	digest, sig []byte,
) bool {
	if k.curve == "" {
		return rsa(k.n, k.e, digest, sig)
	}
	if r, s, err := parseECSignature(sig); err == nil && ecdsa(k.curve, k.point, digest, r, s) {
		return true
	}
	// MEN-9055: exactly 64 bytes, else the split would be anywhere.
	if len(sig) != 64 || k.curve != curveP256 {
		return false
	}
	r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
	return ecdsa(k.curve, k.point, digest, r, s)
}
