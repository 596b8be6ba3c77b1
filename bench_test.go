// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// BenchmarkUnpackZstd is what BenchmarkUnpack is, with the artifact made here: pack writes no zstd.
func BenchmarkUnpackZstd(b *testing.B) {
	if _, err := exec.LookPath("zstd"); err != nil {
		b.Skip("needs zstd")
	}
	image := testImage(3, 8<<20)
	img := writeTemp(b, "rootfs.img", image)
	art := withZstd(b, packed(b, "-n", "r", "-c", "d", "-f", img, "--compression", "none"))
	b.ReportAllocs()
	b.SetBytes(int64(len(image)))
	for b.Loop() {
		a, err := openArtifact(struct{ io.Reader }{bytes.NewReader(art)}, artifactOptions{})
		if err != nil {
			b.Fatal(err)
		}
		f, err := a.nextFile()
		if err != nil {
			b.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, f); err != nil || n != int64(len(image)) {
			b.Fatal(n, err)
		}
	}
}

// withZstd compresses the payload of an uncompressed artifact.
func withZstd(b *testing.B, art []byte) []byte {
	dir := b.TempDir()
	script := `tar -xf -; zstd -q --rm data/0000.tar
tar --format=ustar --owner=0 --group=0 -cf - version manifest header.tar data/0000.tar.zst`
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(art)
	out, err := cmd.Output()
	if err != nil {
		b.Fatal(err)
	}
	return out
}

// benchAgainst unpacks packed, which is size bytes, by an unpacker of our own and by a library's in turn, and reports
// the speed of the first and its time as a part of the other's: what else the machine does falls on both.
func benchAgainst(b *testing.B, kind string, packed []byte, size int, library func(io.Reader) (io.Reader, error)) {
	buf := make([]byte, 64<<10)
	timed := func(r io.Reader, err error) time.Duration {
		start, n := time.Now(), 0
		for err == nil {
			var k int
			k, err = r.Read(buf)
			n += k
		}
		if err != io.EOF || n != size {
			b.Fatal(n, err)
		}
		return time.Since(start)
	}
	var own, other time.Duration
	for b.Loop() {
		in := newInput(bytes.NewReader(packed), 0, inputBuffer)
		in.section(int64(len(packed)))
		u, err := newUnpacker(kind, in, unpackLimits{dict: 64 << 20})
		own += timed(u, err)
		other += timed(library(bytes.NewReader(packed)))
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(size)*float64(b.N)/own.Seconds()/1e6, "MB/s")
	b.ReportMetric(own.Seconds()/other.Seconds(), "of-the-library's-time")
}

// BenchmarkVerify is the way from the first byte to the verified header.
func BenchmarkVerify(b *testing.B) {
	for _, kind := range []string{"rsa", "ecdsa"} {
		b.Run(kind, func(b *testing.B) {
			art := fixture(b, "rootfs-signed-"+kind+".mender")
			keys, err := loadVerifyKeys([]string{fixtures + "rsa.pub", fixtures + "ec.pub"}, nil)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := openArtifact(bytes.NewReader(art), artifactOptions{keys: keys}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// The two benchmarks of the environment have one of 4 KiB, more than half full.
func benchEnv() bootEnv {
	vars := []string{"bootcount=0", "upgrade_available=0"}
	for i := range 40 {
		vars = append(vars, "variable"+strings.Repeat("x", i)+"="+strings.Repeat("y", 20))
	}
	_, e := twoCopies(envBytes(testEnvSize, 1, 0, vars...), envBytes(testEnvSize, 0, 0, vars...))
	return e
}

func BenchmarkEnvSet(b *testing.B) {
	e := benchEnv()
	b.ReportAllocs()
	for b.Loop() {
		if err := e.set(b.Context(), []envVar{{"upgrade_available", "1"}, {"bootcount", "0"}}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEnvRead(b *testing.B) {
	e := benchEnv()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := e.vars(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
