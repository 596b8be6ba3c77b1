// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
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
	defer a.close()
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

const rootfsSum = "65170c11f0c76d9954bd768095dc21c3d21de427d0ce64fe17999250da6d7ac4"

func TestArtifactFixtures(t *testing.T) {
	for _, c := range []struct {
		name, artifact, typ, compression string
		files, scripts                   int
	}{
		{"bootstrap", "release-1", "", "gzip", 0, 0},
		{"module-no-files", "app-3", "trace", "gzip", 0, 0},
		{"module-scripts-signed", "app-2", "trace", "xz", 1, 6},
		{"module-two-files", "app-1", "trace", "gzip", 2, 0},
		{"rootfs-depends", "release-2", "rootfs-image", "gzip", 1, 0},
		{"rootfs-gzip", "release-2", "rootfs-image", "gzip", 1, 0},
		{"rootfs-scripts", "release-2", "rootfs-image", "gzip", 1, 6},
		{"rootfs-xz", "release-2", "rootfs-image", "xz", 1, 0},
		{"rootfs-zstd", "release-2", "rootfs-image", "zstd", 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.compression == "zstd" {
				needTool(t, "zstd")
			}
			a, files, err := readAll(fixture(t, c.name+".mender"), artifactOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if a.Name != c.artifact || a.PayloadType != c.typ || a.Compression != c.compression || a.Empty != (c.typ == "") ||
				len(files) != c.files || len(a.Scripts) != c.scripts {
				t.Errorf("got %q type %q %s empty %v, %d files, %d scripts", a.Name, a.PayloadType, a.Compression, a.Empty, len(files), len(a.Scripts))
			}
			if img, ok := files["rootfs.img"]; ok && fmt.Sprintf("%x", sha256.Sum256(img)) != rootfsSum {
				t.Errorf("rootfs.img is wrong")
			}
		})
	}
}
