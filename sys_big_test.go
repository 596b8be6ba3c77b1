// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

// bigTail is what stands behind 5 GiB of zeros in the image of TestBeyond4GiB, and bigSum the
// SHA-256 of both: (head -c 5G /dev/zero; printf tail) | sha256sum
const (
	bigTail = "what is at the end of an image of more than 4 GiB"
	bigSum  = "fc908a7d3bd9d203638b81d4bd7d4361865754cc992447673575121b339ca3cd"
	bigSize = 5<<30 + int64(len(bigTail))
)

// tarHeader is a member's header alone.
func tarHeader(t *testing.T, name string, size int64) []byte {
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o600}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// bigArtifact is an artifact of more than 4 GiB that is made while it is read.
func bigArtifact(t *testing.T) io.Reader {
	k := newKit("rootfs-image")
	k.manifest = func(lines []string) []string {
		return append([]string{bigSum + "  data/0000/root.img\n"}, lines...)
	}
	k.outer = func(m []tarMember) []tarMember { return m[:len(m)-1] }
	front := k.build(t)
	front = front[:len(front)-1024] // the end of the tar comes later
	inner := tarHeader(t, "root.img", bigSize)
	end := make([]byte, -bigSize&511+1024)
	data := int64(len(inner)) + bigSize + int64(len(end))
	return io.MultiReader(bytes.NewReader(front), bytes.NewReader(tarHeader(t, "data/0000.tar", data)),
		bytes.NewReader(inner),
		io.LimitReader(zeros{}, 5<<30), strings.NewReader(bigTail), bytes.NewReader(end),
		bytes.NewReader(make([]byte, -data&511+1024)))
}

// Field case 7: a whole install of a sparse image of 5 GiB, whose offsets a 32-bit number would
// wrap. In CI it runs as a 32-bit program, too.
func TestBeyond4GiB(t *testing.T) {
	onlyExhaustive(t, "hashes 5 GiB")
	t.Parallel()
	if _, err := hex.DecodeString(bigSum); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	boardFiles(t, dir, 5<<30+1<<20, "")
	must(t, os.WriteFile(dir+"/device_type", []byte("device_type=dev\n"), 0o644))
	var said bytes.Buffer
	args := []string{"mendlet", "-c", dir + "/mender.conf", "-b", dir + "/none", "-d", dir, "--running",
		"A", "install", "-"}
	if exit := runProgram(t.Context(), args, bigArtifact(t), io.Discard, &said); exit != exitOK {
		t.Fatalf("exit code %d: %s", exit, &said)
	}
	f, err := os.Open(dir + "/p3")
	must(t, err)
	defer f.Close()
	got := make([]byte, len(bigTail))
	if _, err := f.ReadAt(got, 5<<30); err != nil || string(got) != bigTail {
		t.Errorf("got %q, %v, want %q", got, err, bigTail)
	}
	if want := fmt.Sprintf("%d bytes in place", bigSize); !strings.Contains(said.String(), want) {
		t.Errorf("got no %q: %s", want, &said)
	}
}
