#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What the parts of the standard library that mendlet uses weigh: an empty program to which one
# part after the other is added. Calls are there to be linked, not to be run. The recovery build has
# the parts before private keys.
set -eu
sum=$PWD/go.sum
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cp "$sum" .
printf 'module parts\n\ngo 1.26\n\nrequire github.com/ulikunitz/xz v0.5.17\n' > go.mod
last=0
part() { # NAME IMPORTS; the body of a function on standard input
	{
		echo "package main"
		for i in $2; do echo "import \"$i\""; done
		echo "func init() {"
		cat
		echo "}"
	} > "part$last.go"
	CGO_ENABLED=0 go build -trimpath -tags nethttpomithttp2 -ldflags '-s -w -buildid=' -o parts .
	size=$(stat -c %s parts)
	printf '%8d %+8d  %s\n' "$size" $((size - last)) "$1"
	last=$size
}
echo 'package main
func main() {}' > main.go
part "Go runtime, fmt, encoding/json" "encoding/json fmt os" <<-'X'
	var v map[string]any
	err := json.Unmarshal([]byte(os.Args[1]), &v)
	b, _ := json.Marshal(v)
	fmt.Println(string(b), err)
X
part "SHA-256" "crypto/sha256" <<-'X'
	println(sha256.New().Sum(nil))
X
part "os/exec, flag, os/signal" "flag os/exec os/signal" <<-'X'
	exec.Command("x").Run()
	flag.Parse()
	signal.Notify(nil)
X
part "crypto/x509, crypto/rsa, crypto/ecdsa: public keys and verification" \
	"crypto crypto/ecdsa crypto/rsa crypto/x509" <<-'X'
	k, _ := x509.ParsePKIXPublicKey(nil)
	e, _ := k.(*ecdsa.PublicKey)
	r, _ := k.(*rsa.PublicKey)
	println(ecdsa.VerifyASN1(e, nil, nil), rsa.VerifyPKCS1v15(r, crypto.SHA256, nil, nil))
X
part "private keys and signing" "crypto crypto/ecdsa crypto/x509" <<-'X'
	k, _ := x509.ParsePKCS8PrivateKey(nil)
	k.(*ecdsa.PrivateKey).Sign(nil, nil, crypto.SHA256)
	r, _ := x509.ParsePKCS1PrivateKey(nil)
	r.Sign(nil, nil, crypto.SHA256)
X
part "writing gzip and LZMA2" "compress/gzip github.com/ulikunitz/xz/lzma os" <<-'X'
	g := gzip.NewWriter(os.Stdout)
	g.Write(nil)
	g.Flush()
	g.Close()
	z, _ := lzma.Writer2Config{}.NewWriter2(os.Stdout)
	z.Write(nil)
	z.Close()
X
part "net/http without HTTP/2, crypto/tls, crypto/x509" "net/http" <<-'X'
	http.Get("https://example.com/")
X
