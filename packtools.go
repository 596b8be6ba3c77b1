// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"compress/gzip"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"os"
	"strings"

	"github.com/ulikunitz/xz"
)

// The verb pack, and what it alone needs: compressors, and private keys.

var packTools = packers{
	gzip: func(w io.Writer) (flushWriter, error) { return gzip.NewWriterLevel(w, gzip.BestCompression) },
	xz: func(w io.Writer) (io.WriteCloser, error) {
		return xz.WriterConfig{DictCap: packDict, BlockSize: packBlock, CheckSum: xz.CRC64}.NewWriter(w)
	},
	loadKey: loadSigningKey,
}

func packVerbs() []verb {
	return []verb{{"pack", "…", "make an artifact; see 'mendlet pack --help'", -1, nil, func(_ context.Context, a *app, w []string) error { return packCommand(w, a.out, a.lg) }}}
}

// leftOut is the hint for a verb of other builds.
func leftOut(string) string { return "" }

// loadSigningKey reads an unencrypted private key, RSA or P-256, in PEM: PKCS #1, SEC 1 or
// PKCS #8. It says which of both it is.
func loadSigningKey(path string) (key crypto.Signer, ec bool, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, false, fmt.Errorf("signing key: %w", err)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if !strings.HasSuffix(block.Type, "PRIVATE KEY") { // openssl puts EC PARAMETERS before one
			continue
		}
		if key, err = parseSigner(block.Type, block.Bytes); err != nil {
			return nil, false, fmt.Errorf("signing key %q: %w", path, err)
		}
	}
	switch k := key.(type) {
	case *rsa.PrivateKey:
		return k, false, nil
	case *ecdsa.PrivateKey:
		if k.Curve == elliptic.P256() {
			return k, true, nil
		}
	}
	return nil, false, fmt.Errorf("signing key %q: want an RSA or a P-256 key in PEM, not encrypted", path)
}

// parseSigner reads a private key of the kind that its PEM type says.
func parseSigner(kind string, der []byte) (crypto.Signer, error) {
	switch kind {
	case "RSA PRIVATE KEY":
		return parseRSAKey(der)
	case "EC PRIVATE KEY":
		return parseECKey(der, nil)
	case "PRIVATE KEY":
	default:
		return nil, errDER
	}
	top := newDER(der) // PKCS #8, RFC 5208, 5
	info := top.next(derSequence)
	version := info.small()
	alg := info.next(derSequence)
	oid := string(alg.next(derOID).rest)
	key := info.next(derOctets).rest // attributes may follow
	if top.end() != nil || version != 0 {
		return nil, errDER
	}
	switch oid {
	case oidRSA:
		return parseRSAKey(key)
	case oidEC:
		curve := alg.next(derOID).rest
		return parseECKey(key, curve)
	}
	return nil, fmt.Errorf("key algorithm % x is not supported; want RSA or ECDSA", oid)
}

// parseRSAKey reads an RSAPrivateKey of two primes (RFC 8017, A.1.2).
func parseRSAKey(der []byte) (*rsa.PrivateKey, error) {
	top := newDER(der)
	seq := top.next(derSequence)
	version := seq.small()
	key := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: seq.integer(), E: seq.small()}, D: seq.integer()}
	key.Primes = []*big.Int{seq.integer(), seq.integer()}
	for range 3 { // d mod p-1, d mod q-1, 1/q mod p: made again by Precompute
		seq.integer()
	}
	if seq.end() != nil || top.end() != nil || version != 0 {
		return nil, errDER
	}
	if err := key.Validate(); err != nil {
		return nil, err
	}
	key.Precompute()
	return key, nil
}

// parseECKey reads an ECPrivateKey (RFC 5915, 3). Within PKCS #8 the curve is named outside.
func parseECKey(der, oid []byte) (*ecdsa.PrivateKey, error) {
	top := newDER(der)
	seq := top.next(derSequence)
	version := seq.small()
	secret := seq.next(derOctets).rest
	if top.end() != nil || version != 1 {
		return nil, errDER
	}
	if oid == nil {
		params := seq.next(derContext0)
		oid = params.next(derOID).rest
	}
	curve, err := derCurve(oid)
	if err != nil {
		return nil, err
	}
	return ecdsa.ParseRawPrivateKey(stdCurve(curve), secret)
}
