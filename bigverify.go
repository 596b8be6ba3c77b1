// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/big"
	"math/bits"
)

// Verification of signatures on math/big, for the recovery build: crypto/rsa and crypto/ecdsa
// bring more of Go's FIPS module, with its self-tests, 0.6 MB in all (doc/performance.md). What
// goes in is public, so how long it takes may depend on it. The build with network has the
// standard library's by TLS, and tests and FuzzVerify hold this one against that.

// sha256Info is the DigestInfo of SHA-256 up to the digest (RFC 8017, 9.2, note 1).
const sha256Info = "\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"

// bigVerifyRSA is RSASSA-PKCS1-v1_5 (RFC 8017, 8.2.2), for a key that checkRSA took. The message
// is not taken apart but made, as a signer must have made it, and compared as a whole.
func bigVerifyRSA(modulus []byte, e int, digest, sig []byte) bool {
	n, s := new(big.Int).SetBytes(modulus), new(big.Int).SetBytes(sig)
	size := (n.BitLen() + 7) / 8
	pad := size - 3 - len(sha256Info) - len(digest)
	if len(sig) != size || s.Cmp(n) >= 0 || pad < 8 || len(digest) != 32 {
		return false
	}
	m := big.NewInt(1) // sᵉ mod n. Exp brings ways for large exponents, 13 KB of them.
	for i := bits.Len(uint(e)) - 1; i >= 0; i-- {
		if m.Mul(m, m).Mod(m, n); e>>i&1 == 1 {
			m.Mul(m, s).Mod(m, n)
		}
	}
	got := m.FillBytes(make([]byte, size))
	want := append([]byte{0, 1}, bytes.Repeat([]byte{0xff}, pad)...)
	want = append(append(want, 0), sha256Info...)
	return bytes.Equal(got, append(want, digest...))
}

// ecCurve is y² = x³ - 3x + b over the field of the prime p. The point (gx, gy) generates all
// others, and the number of them with infinity is the prime n (SEC 2, 2.3 to 2.6; FIPS 186-5).
type ecCurve struct{ p, n, b, gx, gy *big.Int }

func bigCurve(name string) *ecCurve {
	params := map[string][5]string{
		curveP224: {
			"ffffffffffffffffffffffffffffffff000000000000000000000001",
			"ffffffffffffffffffffffffffff16a2e0b8f03e13dd29455c5c2a3d",
			"b4050a850c04b3abf54132565044b0b7d7bfd8ba270b39432355ffb4",
			"b70e0cbd6bb4bf7f321390b94a03c1d356c21122343280d6115c1d21",
			"bd376388b5f723fb4c22dfe6cd4375a05a07476444d5819985007e34",
		},
		curveP256: {
			"ffffffff00000001000000000000000000000000ffffffffffffffffffffffff",
			"ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551",
			"5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b",
			"6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296",
			"4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5",
		},
		curveP384: {
			"fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffeffffffff0000000000000000ffffffff",
			"ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
			"b3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aef",
			"aa87ca22be8b05378eb1c71ef320ad746e1d3b628ba79b9859f741e082542a385502f25dbf55296c3a545e3872760ab7",
			"3617de4a96262c6f5d9e98bf9292dc29f8f41dbd289a147ce9da3113b5f0b8c00a60b1ce1d7e819d7a431d7c90ea0e5f",
		},
		curveP521: {
			"01ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
			"01fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffa51868783bf2f966b7fcc0148f709a5d03bb5c9b8899c47aebb6fb71e91386409",
			"0051953eb9618e1c9a1f929a21a0b68540eea2da725b99b315f3b8b489918ef109e156193951ec7e937b1652c0bd3bb1bf073573df883d2c34f1ef451fd46b503f00",
			"00c6858e06b70404e9cd9e3ecb662395b4429c648139053fb521f828af606b4d3dbaa14b5e77efe75928fe1dc127a2ffa8de3348b3c1856a429bf97e7e31c2e5bd66",
			"011839296a789a3bc0045c8a5fb42c7d1bd998f54449579b446817afbd17273e662c97ee72995ef42640c550b9013fad0761353c7086a272c24088be94769fd16650",
		},
	}[name]
	var v [5]*big.Int
	for i, s := range params {
		b, _ := hex.DecodeString(s)
		v[i] = new(big.Int).SetBytes(b)
	}
	return &ecCurve{v[0], v[1], v[2], v[3], v[4]}
}

// ecPoint has coordinates from 0 to p-1; nil is the point at infinity.
type ecPoint struct{ x, y *big.Int }

// point reads an uncompressed point (SEC 1, 2.3.4), which must be on the curve: on another one
// the order could be small. Infinity has another form.
func (c *ecCurve) point(b []byte) (*ecPoint, error) {
	size := (c.p.BitLen() + 7) / 8
	if len(b) != 1+2*size || b[0] != 4 {
		return nil, errDER
	}
	q := &ecPoint{new(big.Int).SetBytes(b[1 : 1+size]), new(big.Int).SetBytes(b[1+size:])}
	right := new(big.Int).Mul(q.x, q.x) // (x² - 3)x + b
	right.Sub(right, big.NewInt(3)).Mul(right, q.x).Add(right, c.b).Mod(right, c.p)
	left := new(big.Int).Mul(q.y, q.y)
	if q.x.Cmp(c.p) >= 0 || q.y.Cmp(c.p) >= 0 || left.Mod(left, c.p).Cmp(right) != 0 {
		return nil, errors.New("public key is not a point on its elliptic curve")
	}
	return q, nil
}

// add is the sum of any two points of the curve (SEC 1, 2.2.1).
func (c *ecCurve) add(a, b *ecPoint) *ecPoint {
	if a == nil {
		return b
	}
	if b == nil {
		return a
	}
	rise, run := new(big.Int), new(big.Int)
	if a.x.Cmp(b.x) != 0 { // the line through both
		rise.Sub(b.y, a.y)
		run.Sub(b.x, a.x)
	} else if run.Add(a.y, b.y).Cmp(c.p) == 0 || run.Sign() == 0 { // b is -a
		return nil
	} else { // b is a, and run is 2y: the tangent
		rise.Mul(a.x, a.x)
		rise.Sub(rise, big.NewInt(1)).Mul(rise, big.NewInt(3)) // 3x² - 3
	}
	slope := run.ModInverse(run.Mod(run, c.p), c.p)
	slope.Mul(slope, rise).Mod(slope, c.p)
	x := new(big.Int).Mul(slope, slope)
	x.Sub(x, a.x).Sub(x, b.x).Mod(x, c.p)
	y := new(big.Int).Sub(a.x, x)
	y.Mul(y, slope).Sub(y, a.y).Mod(y, c.p)
	return &ecPoint{x, y}
}

// twoMuls is u·g + v·q, for both factors bit by bit from the top.
func (c *ecCurve) twoMuls(u *big.Int, g *ecPoint, v *big.Int, q *ecPoint) (sum *ecPoint) {
	terms := [4]*ecPoint{nil, g, q, c.add(g, q)}
	for i := c.n.BitLen() - 1; i >= 0; i-- {
		sum = c.add(c.add(sum, sum), terms[u.Bit(i)|v.Bit(i)<<1])
	}
	return sum
}

// bigCheckPoint says whether a key's point is one of that curve.
func bigCheckPoint(curve string, point []byte) error {
	_, err := bigCurve(curve).point(point)
	return err
}

// bigVerifyECDSA is ECDSA (SEC 1, 4.1.4; FIPS 186-5, 6.4.2), for a key that bigCheckPoint took.
func bigVerifyECDSA(curve string, point, digest []byte, r, s *big.Int) bool {
	c := bigCurve(curve)
	q, err := c.point(point)
	if err != nil || r.Sign() <= 0 || s.Sign() <= 0 || r.Cmp(c.n) >= 0 || s.Cmp(c.n) >= 0 {
		return false
	}
	e := new(big.Int).SetBytes(digest) // its leftmost bits, as many as the order has
	e.Rsh(e, uint(max(0, 8*len(digest)-c.n.BitLen())))
	w := new(big.Int).ModInverse(s, c.n)
	u := e.Mul(e, w).Mod(e, c.n)
	v := w.Mul(w, r).Mod(w, c.n)
	sum := c.twoMuls(u, &ecPoint{c.gx, c.gy}, v, q)
	return sum != nil && new(big.Int).Mod(sum.x, c.n).Cmp(r) == 0
}
