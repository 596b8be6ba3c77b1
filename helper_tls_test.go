// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// testCA is a CA with a server certificate for 127.0.0.1 that is valid from..to.
type testCA struct {
	cert *x509.Certificate
	key  crypto.Signer
	pem  string // file
}

func newTestCA(t testing.TB, from, to time.Time) *testCA {
	ca := &testCA{key: testSigner(t)}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: from, NotAfter: to,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, ca.key.Public(), ca.key)
	must(t, err)
	ca.cert, err = x509.ParseCertificate(der)
	must(t, err)
	ca.pem = filepath.Join(t.TempDir(), "ca.pem")
	must(t, os.WriteFile(ca.pem, pemText("CERTIFICATE", der), 0o600))
	return ca
}

func pemText(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func (ca *testCA) issue(t testing.TB, isCA bool) *testCA {
	sub := &testCA{key: testSigner(t)}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "leaf"},
		NotBefore: ca.cert.NotBefore,
		NotAfter:  ca.cert.NotAfter, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"device.test"},
		IsCA: isCA, BasicConstraintsValid: isCA, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, sub.key.Public(), ca.key)
	must(t, err)
	sub.cert, err = x509.ParseCertificate(der)
	must(t, err)
	return sub
}

// serverPEM is a file with a certificate that ca has issued, and its key.
func (ca *testCA) serverPEM(t testing.TB) string {
	leaf := ca.issue(t, false)
	der, err := x509.MarshalPKCS8PrivateKey(leaf.key)
	must(t, err)
	file := filepath.Join(t.TempDir(), "server.pem")
	must(t, os.WriteFile(file, append(pemText("CERTIFICATE", leaf.cert.Raw), pemText("PRIVATE KEY", der)...), 0o600))
	return file
}

// tlsServer answers with a certificate of ca.
func tlsServer(t testing.TB, ca *testCA, conf *tls.Config) *httptest.Server {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	return tlsServerOn(t, l, ca, conf)
}

func tlsServerOn(t testing.TB, l net.Listener, ca *testCA, conf *tls.Config) *httptest.Server {
	leaf := ca.issue(t, false)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %d", r.Proto, len(r.TLS.PeerCertificates))
	}))
	conf.Certificates = []tls.Certificate{{Certificate: [][]byte{leaf.cert.Raw}, PrivateKey: leaf.key}}
	s.Listener.Close()
	s.Listener, s.TLS = l, conf
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// boundSocket is a TCP socket with a port of 127.0.0.1 that is nobody's else.
func boundSocket(t testing.TB) (fd int, at *syscall.SockaddrInet4) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { syscall.Close(fd) })
	must(t, syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	name, err := syscall.Getsockname(fd)
	must(t, err)
	return fd, name.(*syscall.SockaddrInet4)
}

// deadAddr is a HOST:PORT of this machine that refuses connections, and stays so: nobody listens there, and no other
// program can.
func deadAddr(t testing.TB) string {
	t.Helper()
	_, at := boundSocket(t)
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(at.Port))
}
