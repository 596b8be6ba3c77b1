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
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
)

// An artifact's signature is over SHA-256 of its manifest: RSA by PKCS #1 v1.5, or ECDSA,
// which mender-artifact writes as r and s of 32 bytes each and which may also come in DER.
// It is stored in base64 without line breaks. The standard library reads keys and verifies.

// maxRSA bounds RSA moduli, in bits: the time to verify grows with the square of the size.
const maxRSA = 16384

// verifyKey is a public key that artifacts or channel files may be signed with.
type verifyKey struct {
	path string
	key  crypto.PublicKey // *rsa.PublicKey, *ecdsa.PublicKey or, not for artifacts, ed25519.PublicKey
}

// loadVerifyKeys reads PEM files of type PUBLIC KEY. Of several that were named, one that cannot be
// loaded, as while keys are replaced, is warned of. It is an error if none can be: going on would be
// going on without any check. No paths: nil, no signature is demanded.
func loadVerifyKeys(paths []string, lg *logger) ([]verifyKey, error) {
	return loadKeys(paths, "artifacts", lg)
}

// loadKeys is loadVerifyKeys for what the keys are to verify; only artifacts cannot be signed with Ed25519.
func loadKeys(paths []string, what string, lg *logger) ([]verifyKey, error) {
	var keys []verifyKey
	var faults []error
	for _, path := range paths {
		key, err := loadVerifyKey(path)
		if _, edwards := key.(ed25519.PublicKey); edwards && what == "artifacts" {
			err = fmt.Errorf("key %q: got a key of type %T, want RSA or ECDSA", path, key)
		}
		if err != nil {
			faults = append(faults, err)
			continue
		}
		keys = append(keys, verifyKey{path, key})
	}
	if len(keys) == 0 && len(paths) > 0 {
		return nil, refuse("no key to verify %s with can be loaded: %w", what, errors.Join(faults...))
	}
	for _, err := range faults {
		lg.warnf("one of the keys to verify %s with is left out: %v", what, err)
	}
	return keys, nil
}

func loadVerifyKey(path string) (crypto.PublicKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, withHint(fmt.Errorf("key %q: want PEM of type PUBLIC KEY", path),
			"openssl pkey -in PRIVATE -pubout writes one")
	}
	key, err := parsePublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", path, err)
	}
	return key, nil
}

// parsePublicKey reads a SubjectPublicKeyInfo (RFC 5280, 4.1) of RSA, of Ed25519, or of ECDSA on P-224,
// P-256, P-384 or P-521.
func parsePublicKey(der []byte) (crypto.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, err
	}
	switch k := key.(type) {
	case *rsa.PublicKey:
		return k, checkRSA(k)
	case *ecdsa.PublicKey:
		return k, nil
	case ed25519.PublicKey:
		return k, nil
	}
	return nil, fmt.Errorf("got a key of type %T, want RSA, ECDSA or Ed25519", key)
}

// checkRSA refuses, when the key is read, what crypto/rsa would refuse at each signature, and
// moduli over maxRSA. The smallest size is not left to crypto/rsa: GODEBUG can lift its rule.
func checkRSA(k *rsa.PublicKey) error {
	if bits, last := k.N.BitLen(), k.N.Bit(0); bits < 1024 || bits > maxRSA || last == 0 {
		return fmt.Errorf("rsa modulus of %d bits, last bit %d: want an odd one of 1024 to %d bits", bits, last, maxRSA)
	}
	if k.E < 3 || k.E&1 == 0 || k.E > 1<<31-1 {
		return fmt.Errorf("rsa exponent %d: want an odd one from 3 to 2147483647", k.E)
	}
	return nil
}

// privateBlock is the first private key of a PEM text; openssl puts EC PARAMETERS before one.
func privateBlock(text []byte) (*pem.Block, error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if strings.HasSuffix(block.Type, "PRIVATE KEY") {
			return block, nil
		}
	}
	return nil, errors.New("no PEM private key in it")
}

// parsePrivateKey reads PKCS #1, SEC 1 or PKCS #8, as the PEM type says: RSA, ECDSA or Ed25519.
func parsePrivateKey(kind string, der []byte) (crypto.Signer, error) {
	var key any
	var err error
	switch kind {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(der)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(der)
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(der)
	default:
		err = fmt.Errorf("got a PEM block %q, want PRIVATE KEY, RSA PRIVATE KEY or EC PRIVATE KEY", kind)
	}
	if err != nil {
		return nil, err
	}
	switch k := key.(type) {
	case *rsa.PrivateKey:
		return k, nil
	case *ecdsa.PrivateKey:
		return k, nil
	case ed25519.PrivateKey:
		return k, nil
	}
	return nil, fmt.Errorf("got a key of type %T, want RSA, ECDSA or Ed25519", key)
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
		if verifies(k.key, digest[:], raw) {
			return k.path, nil
		}
		tried = append(tried, k.path)
	}
	return "", refuse("manifest.sig: signature of %d bytes was not made by key %q", len(raw), strings.Join(tried, ", "))
}

// asPEM is the PEM form of some DER, in lines of 64 (RFC 7468, 2).
func asPEM(kind string, der []byte) string {
	text, lines := base64.StdEncoding.EncodeToString(der), "-----BEGIN "+kind+"-----\n"
	for len(text) > 0 {
		n := min(len(text), 64)
		lines += text[:n] + "\n"
		text = text[n:]
	}
	return lines + "-----END " + kind + "-----\n"
}

// parseDeviceKey takes the first private key of a PEM text.
func parseDeviceKey(text, passphrase []byte) (crypto.Signer, error) {
	b, err := privateBlock(text)
	if err != nil {
		return nil, err
	}
	der, err := decryptBlock(b, passphrase)
	if err != nil {
		return nil, err
	}
	return parsePrivateKey(b.Type, der)
}

// decryptBlock knows the encryption of RFC 1423 (DEK-Info; DES, 3DES and AES in CBC mode).
func decryptBlock(b *pem.Block, passphrase []byte) ([]byte, error) {
	if b.Type == "ENCRYPTED PRIVATE KEY" {
		return nil, errors.New("encrypted in PKCS#8 form (PBES2), which is not supported; want DEK-Info form " +
			"(openssl rsa -aes256 -traditional, or openssl ec -aes256) or no encryption")
	}
	// The form is deprecated because it does not authenticate; here it only guards a file
	// that has it already.
	//lint:ignore SA1019 see above
	if !x509.IsEncryptedPEMBlock(b) {
		return b.Bytes, nil
	}
	if len(passphrase) == 0 {
		return nil, errors.New("encrypted, and no passphrase was given: want --passphrase-file")
	}
	//lint:ignore SA1019 see above
	return x509.DecryptPEMBlock(b, passphrase)
}

// signBody signs as deviceauth verifies: RSA PKCS#1 v1.5 and ECDSA (DER) over SHA-256,
// Ed25519 over the body itself.
func signBody(key crypto.Signer, body []byte) ([]byte, error) {
	if _, ok := key.Public().(ed25519.PublicKey); ok {
		return key.Sign(rand.Reader, body, crypto.Hash(0))
	}
	sum := sha256.Sum256(body)
	return key.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// verifies says whether a key that parsePublicKey took made sig over digest, a SHA-256.
func verifies(key crypto.PublicKey, digest, sig []byte) bool {
	switch k := key.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, digest, sig) == nil
	case *ecdsa.PublicKey:
		if ecdsa.VerifyASN1(k, digest, sig) {
			return true
		}
		// MEN-9055: exactly 64 bytes, else the split would be anywhere.
		if len(sig) != 64 || k.Curve != elliptic.P256() {
			return false
		}
		r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
		return ecdsa.Verify(k, digest, r, s)
	}
	return false
}
