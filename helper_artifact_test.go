// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	mrand "math/rand"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"
)

const fixtures = "testdata/artifact/"

// fixture reads a file of testdata/artifact.
func fixture(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(fixtures + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// readAll opens an artifact and reads it to its end; its payload files by name.
func readAll(b []byte, opt artifactOptions) (*artifact, map[string][]byte, error) {
	a, err := openArtifact(bytes.NewReader(b), opt)
	if err != nil {
		return nil, nil, err
	}
	files := map[string][]byte{}
	for {
		f, err := a.nextFile()
		if err == io.EOF {
			return a, files, nil
		}
		if err != nil {
			return a, files, err
		}
		var buf bytes.Buffer
		if _, err := io.Copy(&buf, f); err != nil {
			return a, files, err
		}
		files[f.Name] = buf.Bytes()
	}
}

func needTool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
}

// tarMember is a member of a tar made by a test.
type tarMember struct {
	name string
	body []byte
	head func(*tar.Header) // changes the header, or nil
}

func makeTar(t testing.TB, members []tarMember) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, m := range members {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: m.name, Size: int64(len(m.body)), Mode: 0o600}
		if m.head != nil {
			m.head(h)
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(m.body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// kit builds artifacts, right ones and any wrong one. Hooks that are nil change nothing.
type kit struct {
	version  string
	header   []tarMember
	files    []tarMember
	manifest func(lines []string) []string
	data     func(tar []byte) (name string, stored []byte)
	headTar  func(tar []byte) (name string, stored []byte)
	outer    func([]tarMember) []tarMember
	sign     func(manifest []byte) []byte
}

func newKit(typ string, files ...tarMember) *kit {
	return &kit{
		version: `{"format":"mender","version":3}`,
		header: []tarMember{
			{name: "header-info", body: []byte(`{"payloads":[{"type":"` + typ +
				`"}],"artifact_provides":{"artifact_name":"rel"},"artifact_depends":{"device_type":["dev"]}}`)},
			{name: "headers/0000/type-info", body: []byte(`{"type":"` + typ + `"}`)},
			{name: "headers/0000/meta-data"},
		},
		files: files,
	}
}

func (k *kit) build(t testing.TB) []byte {
	t.Helper()
	headName, head := "header.tar", makeTar(t, k.header)
	if k.headTar != nil {
		headName, head = k.headTar(head)
	}
	dataName, data := "data/0000.tar", makeTar(t, k.files)
	if k.data != nil {
		dataName, data = k.data(data)
	}
	sums := map[string][]byte{"version": []byte(k.version), headName: head}
	for _, f := range k.files {
		sums["data/0000/"+f.name] = f.body
	}
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		lines = append(lines, fmt.Sprintf("%x  %s\n", sha256.Sum256(sums[name]), name))
	}
	if k.manifest != nil {
		lines = k.manifest(lines)
	}
	manifest := []byte(strings.Join(lines, ""))
	members := []tarMember{{name: "version", body: []byte(k.version)}, {name: "manifest", body: manifest}}
	if k.sign != nil {
		members = append(members, tarMember{name: "manifest.sig", body: k.sign(manifest)})
	}
	members = append(members, tarMember{name: headName, body: head}, tarMember{name: dataName, body: data})
	if k.outer != nil {
		members = k.outer(members)
	}
	return makeTar(t, members)
}

func helloSum() string { return fmt.Sprintf("%x", sha256.Sum256([]byte("hello"))) }

// artifactFile is a payload file of an artifact made for a test.
type artifactFile struct{ name, body string }

// madeArtifact writes an artifact for the device type "testboard", uncompressed.
func madeArtifact(t *testing.T, payloadType, metaData string, files ...artifactFile) []byte {
	t.Helper()
	pack := func(files ...artifactFile) string {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range files {
			h := &tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.body)), Format: tar.FormatUSTAR}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			w.Write([]byte(f.body))
		}
		w.Close()
		return b.String()
	}
	kind, err := json.Marshal(payloadType)
	if err != nil {
		t.Fatal(err)
	}
	version := `{"format":"mender","version":3}`
	header := pack(
		artifactFile{"header-info", `{"payloads":[{"type":` + string(kind) +
			`}],"artifact_provides":{"artifact_name":"made-1"},"artifact_depends":{"device_type":["testboard"]}}`},
		artifactFile{"headers/0000/type-info", `{"type":` + string(kind) + `}`},
		artifactFile{"headers/0000/meta-data", metaData})
	sums := []string{sumLine("version", version), sumLine("header.tar", header)}
	for _, f := range files {
		sums = append(sums, sumLine("data/0000/"+f.name, f.body))
	}
	slices.SortFunc(sums, func(a, b string) int { return strings.Compare(a[64:], b[64:]) })
	return []byte(pack(artifactFile{"version", version}, artifactFile{"manifest", strings.Join(sums, "")},
		artifactFile{"header.tar", header}, artifactFile{"data/0000.tar", pack(files...)}))
}

func sumLine(name, body string) string {
	return fmt.Sprintf("%x  %s\n", sha256.Sum256([]byte(body)), name)
}

func opened(t *testing.T, text []byte) *artifact {
	t.Helper()
	a, err := openArtifact(bytes.NewReader(text), artifactOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// testImage is n bytes of an image's kind: words, runs of zeros, islands of noise. The same
// seed gives the same bytes.
func testImage(seed int64, n int) []byte {
	r := mrand.New(mrand.NewSource(seed))
	var words [500][]byte
	for i := range words {
		words[i] = make([]byte, 2+r.Intn(9))
		for j := range words[i] {
			words[i][j] = byte('a' + r.Intn(26))
		}
	}
	b := make([]byte, 0, n+120<<10)
	for len(b) < n {
		switch k := r.Intn(20); {
		case k < 7:
			for range 900 {
				b = append(append(b, words[r.Intn(len(words))]...), ' ')
			}
		case k < 17:
			b = append(b, make([]byte, (1+r.Intn(60))<<10)...)
		default:
			island := make([]byte, (1+r.Intn(30))<<9)
			r.Read(island)
			b = append(b, island...)
		}
	}
	return b[:n]
}

// packed runs pack with args and returns what it wrote.
func packed(t testing.TB, args ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := packCommand(append(args, "-o", "-"), &out, nil); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// keyPair writes a new private key, in PEM of the given type, and its public half.
func keyPair(t testing.TB, pemType string, key any) (private, public string) {
	t.Helper()
	var der []byte
	var err error
	var pub any
	switch k := key.(type) {
	case *rsa.PrivateKey:
		pub = &k.PublicKey
	case *ecdsa.PrivateKey:
		pub = &k.PublicKey
	}
	switch pemType {
	case "RSA PRIVATE KEY":
		der = x509.MarshalPKCS1PrivateKey(key.(*rsa.PrivateKey))
	case "EC PRIVATE KEY":
		der, err = x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey))
	default:
		der, err = x509.MarshalPKCS8PrivateKey(key)
	}
	if err != nil {
		t.Fatal(err)
	}
	pubDER, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	private = writeTemp(t, "key.pem", pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}))
	public = writeTemp(t, "key.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pubDER}))
	return private, public
}

func newKeys(t testing.TB) (*rsa.PrivateKey, *ecdsa.PrivateKey) {
	t.Helper()
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	e, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return r, e
}

// gzipped compresses in members of the given size, flushed every flush bytes (0: never).
func gzipped(t testing.TB, b []byte, level, member, flush int) []byte {
	t.Helper()
	var out bytes.Buffer
	for m := range slices.Chunk(b, member) {
		w, err := gzip.NewWriterLevel(&out, level)
		if err != nil {
			t.Fatal(err)
		}
		w.Name, w.Comment, w.Extra = "name", "comment", []byte("\x00\x00\xff\xff")
		for part := range slices.Chunk(m, max(flush, 1<<10)) {
			w.Write(part)
			if flush > 0 {
				w.Flush()
			}
		}
		w.Close()
	}
	return out.Bytes()
}

func xzipped(t testing.TB, b []byte, c xz.WriterConfig) []byte {
	t.Helper()
	return written(t, b, func(w io.Writer) (io.WriteCloser, error) { return c.NewWriter(w) })
}

// written is what a compressor makes of b.
func written(t testing.TB, b []byte, compressor func(io.Writer) (io.WriteCloser, error)) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := compressor(&out)
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// piped runs a program over b.
func piped(t testing.TB, b []byte, args ...string) []byte {
	t.Helper()
	needTool(t, args[0])
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}
