// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"
)

// at is a file of n zeros with text at some offset.
func at(n, off int, text string) []byte {
	b := make([]byte, n)
	copy(b[off:], text)
	return b
}

// tarNamed is a tar of small files.
func tarNamed(t *testing.T, names ...string) []byte {
	var files []artifactFile
	for _, n := range names {
		files = append(files, artifactFile{n, "x"})
	}
	return []byte(tarOf(t, files...))
}

// What people give in place of an artifact is refused with a word on what it is and on what to do.
func TestNoArtifact(t *testing.T) {
	board := newImageBoard(t)
	art, err := os.ReadFile(board.pack(t, "release-2", testBlocks(300000)))
	must(t, err)
	readme, err := os.ReadFile("README.md")
	must(t, err)
	random := testImage(3, 70000)
	random[510] = 1
	ext4 := at(2<<20, 1080, "\x53\xef")
	for _, c := range []struct {
		name       string
		text       []byte
		what, hint string
	}{
		{"README.md", readme, "looks like text", "mender-artifact"},
		{"empty", nil, "it is empty (0 bytes)", "checksum"},
		{"web page", []byte("\xef\xbb\xbf\n <!DOCTYPE html>\n<html><head><title>404</title></head></html>"),
			"looks like an HTML page", "portal"},
		{"web page without a type", []byte("<HTML><body>no"), "looks like an HTML page", "portal"},
		{"error of a store", []byte(`<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>`),
			"looks like an XML document", "portal"},
		{"error of a server", []byte(`{"error":"no"}`), "looks like JSON", "portal"},
		{"Git LFS pointer", []byte("version https://git-lfs.github.com/spec/v1\noid sha256:2d6c\nsize 10\n"),
			"looks like a Git LFS pointer", "git lfs pull"},
		{"zip", []byte("PK\x03\x04\x14\x00\x00\x00\x08\x00rest"), "looks like a zip archive", "unpack it"},
		{"gzip of an artifact", gzipped(t, art, 6, 1<<30, 0), "looks like one, but the whole file is compressed with gzip",
			"unpack it once"},
		{"gzip of an image", gzipped(t, ext4, 6, 1<<30, 0),
			"looks like gzip data; unpacked it looks like an ext4 image", "unpack it"},
		{"gzip of nothing", at(20, 0, "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x03\x00"),
			"looks like gzip data", "unpack it"},
		{"gzip, damaged", []byte("\x1f\x8b\x08 and so on"), "looks like gzip data", "unpack it"},
		{"xz of text", xzipped(t, []byte("some text\n"), xz.WriterConfig{}),
			"looks like xz data; unpacked it looks like text", "unpack it"},
		{"bzip2", []byte("BZh91AY&SY"), "looks like bzip2 data", "unpack it"},
		{"ext4", ext4, "looks like an ext4 image", "mendlet pack"},
		{"squashfs", at(8192, 0, "hsqs"), "looks like a squashfs image", "mendlet pack"},
		{"btrfs", at(128<<10, 64<<10+64, "_BHRfS_M"), "looks like a btrfs image", "mendlet pack"},
		{"disk", at(4096, 512, "EFI PART"), "looks like an image of a whole disk (GPT)", "root file system"},
		{"disk, old", at(4096, 510, "\x55\xaa"), "looks like an image of a whole disk (MBR)", "root file system"},
		{"xdelta", []byte("\xd6\xc3\xc4\x00rest"), "looks like a delta", "whole artifact"},
		{"bsdiff", []byte("BSDIFF40rest"), "looks like a delta of bsdiff", "whole artifact"},
		{"swu", at(4096, 0, "070702"+strings.Repeat("0", 104)+"sw-description\x00"), "looks like an update of SWUpdate",
			"another updater"},
		{"tar", tarNamed(t, "etc/\x1bpasswd", "b"),
			`looks like a tar archive whose first member is "etc/\x1bpasswd", want "version"`, "packed again"},
		{"artifact packed anew", tarNamed(t, "./version", "./manifest"),
			`looks like a tar archive whose first member is "./version"`, "packed again"},
		{"zeros", make([]byte, 100000), "its first 67072 bytes are all 0x00", "checksum"},
		{"erased flash", bytes.Repeat([]byte{0xff}, 100), "its first 100 bytes are all 0xff", "checksum"},
		{"random", random, "starts with ", "checksum"},
		{"cut letter", []byte("Grüße, ä\xc3"), "looks like text", "mendlet pack"},
		{"latin-1", []byte("Gr\xfc\xdfe und so weiter"), "starts with 47 72 fc df", "checksum"},
		{"one byte", []byte{7}, "starts with 07, which", "checksum"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(board.dir, "given")
			must(t, os.WriteFile(path, c.text, 0o600))
			out, errs := board.must(t, exitRefused, "install", path)
			if !strings.Contains(errs, "error: \""+path+"\": not a Mender artifact: "+c.what) ||
				strings.Count(errs, "hint: ") != 1 || !strings.Contains(errs, c.hint) {
				t.Errorf("got %s, want %q and the hint %q", errs, c.what, c.hint)
			}
			if len(errs) > 500 || out != "Streaming failed.\nSystem not modified.\n" {
				t.Errorf("%d bytes: %s%s", len(errs), out, errs)
			}
		})
	}
	// What begins as an artifact is told where it goes wrong.
	for _, text := range [][]byte{art[:8], art[:512], art[:2000], tarNamed(t, "version")} {
		path := filepath.Join(board.dir, "given")
		must(t, os.WriteFile(path, text, 0o600))
		if _, errs := board.must(t, exitRefused, "show", path); strings.Contains(errs, "not a Mender artifact") {
			t.Errorf("%d bytes of an artifact: %s", len(text), errs)
		}
	}
}

// A checksum decides whether something is a tar, also one of another writer's form.
func TestFirstMember(t *testing.T) {
	good := tarNamed(t, "x")
	if name, ok := firstMember(good); name != "x" || !ok {
		t.Errorf("got %q, %v", name, ok)
	}
	for i := range 512 {
		bad := bytes.Clone(good)
		bad[i] ^= 0x40
		if _, ok := firstMember(bad); ok && (i < 148 || i >= 156) {
			t.Errorf("a header with byte %d changed is taken", i)
		}
	}
	if _, ok := firstMember(good[:511]); ok {
		t.Error("511 bytes are taken")
	}
}

// FuzzLooks: whatever the bytes are, there is an answer, and it is short and visible.
func FuzzLooks(f *testing.F) {
	f.Add([]byte("version\x00"))
	f.Add([]byte("<!doctype html"))
	f.Add(binary.LittleEndian.AppendUint32(nil, 0x28cd3d45))
	f.Fuzz(func(t *testing.T, head []byte) {
		what, _ := looksLike(head)
		if what == "" || len(what) > 600 || visible(what) != what {
			t.Errorf("got %q", what)
		}
	})
}
