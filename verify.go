// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"math/big"
)

// Verification of signatures by the standard library, which TLS brings in anyway. The recovery
// build has bigverify.go instead.

func stdCurve(name string) elliptic.Curve {
	return map[string]elliptic.Curve{
		curveP224: elliptic.P224(), curveP256: elliptic.P256(), curveP384: elliptic.P384(), curveP521: elliptic.P521(),
	}[name]
}

// checkPoint says whether a key's point is one of that curve.
func checkPoint(curve string, point []byte) error {
	_, err := ecdsa.ParseUncompressedPublicKey(stdCurve(curve), point)
	return err
}

func verifyRSA(n []byte, e int, digest, sig []byte) bool {
	return rsa.VerifyPKCS1v15(&rsa.PublicKey{N: new(big.Int).SetBytes(n), E: e}, crypto.SHA256, digest, sig) == nil
}

func verifyECDSA(curve string, point, digest []byte, r, s *big.Int) bool {
	key, err := ecdsa.ParseUncompressedPublicKey(stdCurve(curve), point)
	return err == nil && ecdsa.Verify(key, digest, r, s)
}
