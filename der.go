// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
)

// The keys and signatures of artifacts come in a few fixed forms of DER (X.690). They are read
// here, since crypto/x509 brings certificates, encoding/asn1, time and net with it, which a
// build without network has no other use for.

const (
	derInteger   = 0x02
	derBitString = 0x03
	derOctets    = 0x04
	derOID       = 0x06
	derSequence  = 0x30
	derContext0  = 0xa0 // [0], constructed
)

const oidRSA = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01" // rsaEncryption, RFC 8017 A.1
const oidEC = "\x2a\x86\x48\xce\x3d\x02\x01"          // id-ecPublicKey, RFC 5480 2.1.1

var errDER = errors.New("not DER of the form that is wanted")

// derReader reads the elements of one content after the other. What does not have the
// wanted form gives empty values and sets bad, which all readers of one text share.
type derReader struct {
	rest []byte
	bad  *bool
}

func newDER(b []byte) derReader { return derReader{b, new(bool)} }

// next gives the content of the next element, which must have that tag. Lengths go up to
// 65535 and have their shortest form.
func (d *derReader) next(tag byte) derReader {
	b := d.rest
	if len(b) < 2 || b[0] != tag {
		return d.fail()
	}
	head, n := 2, int(b[1])
	switch {
	case n == 0x81 && len(b) >= 3 && b[2] >= 0x80:
		head, n = 3, int(b[2])
	case n == 0x82 && len(b) >= 4 && b[2] != 0:
		head, n = 4, int(binary.BigEndian.Uint16(b[2:]))
	case n >= 0x80:
		return d.fail()
	}
	if n > len(b)-head {
		return d.fail()
	}
	d.rest = b[head+n:]
	return derReader{b[head : head+n], d.bad}
}

func (d *derReader) fail() derReader {
	*d.bad = true
	return derReader{nil, d.bad}
}

// number reads an integer that is not below zero, in its shortest form.
func (d *derReader) number() []byte {
	b := d.next(derInteger).rest
	if len(b) == 0 || b[0] >= 0x80 || len(b) > 1 && b[0] == 0 && b[1] < 0x80 {
		return d.fail().rest
	}
	return b
}

// integer reads one above zero, as all parts of keys and signatures are.
func (d *derReader) integer() *big.Int {
	n := new(big.Int).SetBytes(d.number())
	if n.Sign() == 0 {
		d.fail()
	}
	return n
}

// small reads a version or an RSA exponent: 31 bits.
func (d *derReader) small() (n int) {
	b := d.number()
	if len(b) > 4 {
		d.fail()
		return 0
	}
	for _, c := range b {
		n = n<<8 | int(c)
	}
	return n
}

// end wants nothing more to follow.
func (d *derReader) end() error {
	if len(d.rest) > 0 || *d.bad {
		return errDER
	}
	return nil
}

const (
	curveP224 = "P-224"
	curveP256 = "P-256"
	curveP384 = "P-384"
	curveP521 = "P-521"
)

// derCurve is the curve that an object identifier names (RFC 5480, 2.1.1.1).
func derCurve(oid []byte) (string, error) {
	switch string(oid) {
	case "\x2a\x86\x48\xce\x3d\x03\x01\x07":
		return curveP256, nil
	case "\x2b\x81\x04\x00\x21":
		return curveP224, nil
	case "\x2b\x81\x04\x00\x22":
		return curveP384, nil
	case "\x2b\x81\x04\x00\x23":
		return curveP521, nil
	}
	return "", fmt.Errorf("elliptic curve % x is not supported; want P-256", oid)
}

// publicKey is one of RSA, n and e, or of ECDSA: an uncompressed point on a curve. As bytes, since
// a big.Int that an interface may hold is linked with all that it can print and parse.
type publicKey struct {
	n     []byte
	e     int
	curve string
	point []byte
}

// parsePublicKey reads a SubjectPublicKeyInfo (RFC 5280, 4.1) of RSA (RFC 8017, A.1.1) or of
// ECDSA (RFC 5480, 2).
func parsePublicKey(der []byte) (k publicKey, err error) {
	top := newDER(der)
	info := top.next(derSequence)
	alg := info.next(derSequence)
	kind := string(alg.next(derOID).rest)
	bits := info.next(derBitString).rest
	if info.end() != nil || top.end() != nil || len(bits) == 0 || bits[0] != 0 {
		return k, errDER
	}
	switch kind {
	case oidRSA:
		d := newDER(bits[1:])
		seq := d.next(derSequence)
		k.n, k.e = seq.number(), seq.small()
		if seq.end() != nil || d.end() != nil || string(alg.rest) != "\x05\x00" {
			return k, errDER
		}
		return k, checkRSA(new(big.Int).SetBytes(k.n), k.e)
	case oidEC:
		if k.curve, err = derCurve(alg.next(derOID).rest); err != nil {
			return k, err
		}
		if err = alg.end(); err != nil {
			return k, err
		}
		k.point = bits[1:]
		return k, checkPoint(k.curve, k.point)
	}
	return k, fmt.Errorf("key algorithm % x is not supported; want RSA or ECDSA", kind)
}

// checkRSA has the rules of crypto/rsa for a key to verify with, and a limit: the time that it
// takes grows with the square of the size.
func checkRSA(n *big.Int, e int) error {
	if bits := n.BitLen(); bits < 1024 || bits > maxRSA || n.Bit(0) == 0 {
		return fmt.Errorf("rsa modulus of %d bits, last bit %d: want an odd one of 1024 to %d bits", bits, n.Bit(0), maxRSA)
	}
	if e < 3 || e&1 == 0 {
		return fmt.Errorf("rsa exponent %d: want an odd one from 3 on", e)
	}
	return nil
}

const maxRSA = 16384

// parseECSignature reads an ECDSA-Sig-Value (RFC 3279, 2.2.3).
func parseECSignature(der []byte) (r, s *big.Int, err error) {
	top := newDER(der)
	seq := top.next(derSequence)
	r, s = seq.integer(), seq.integer()
	return r, s, errors.Join(seq.end(), top.end())
}
