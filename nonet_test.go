// SPDX-License-Identifier: Apache-2.0

//go:build nonet

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"
)

// The tests of a recovery build make artifacts with what the program has not.
func init() {
	packTools = packers{
		gzip: func(w io.Writer) (flushWriter, error) { return gzip.NewWriterLevel(w, gzip.BestCompression) },
		xz: func(w io.Writer) (io.WriteCloser, error) {
			return xz.WriterConfig{DictCap: packDict, BlockSize: packBlock, CheckSum: xz.CRC64}.NewWriter(w)
		},
		loadKey: testLoadKey,
	}
}

func testLoadKey(path string) (crypto.Signer, bool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, false, err
	}
	block, _ := pem.Decode(text)
	var key any
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, false, err
	}
	_, ec := key.(*ecdsa.PrivateKey)
	return key.(crypto.Signer), ec, nil
}

// A verb that another build has is refused as such.
func TestLeftOutVerbs(t *testing.T) {
	for words, want := range map[string]string{
		"pack -n x":   "without the verb \"pack\"",
		"pack --help": "hint: make artifacts on a build host",
		"daemon":      "hint: it takes a mendlet with network support",
		"what":        "unknown verb \"what\"",
	} {
		var out, errw bytes.Buffer
		code := run(context.Background(), append([]string{"mendlet"}, strings.Fields(words)...), strings.NewReader(""), &out, &errw)
		if code != exitUsage || !strings.Contains(errw.String(), want) {
			t.Errorf("%s: got exit code %d, %q, want %d, %q", words, code, errw.String(), exitUsage, want)
		}
	}
	var help bytes.Buffer
	general(&options{}, &help)
	if strings.Contains(help.String(), "\n  pack ") || !strings.Contains(help.String(), "\n  install ") {
		t.Errorf("--help:\n%s", help.String())
	}
}
