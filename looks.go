// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// What people give in place of an artifact, told by its first bytes. The magic numbers are those of
// file(1) and of the formats' own documents.

// looksAt is how many bytes looksLike may want to see: btrfs has its magic number behind 64 KiB.
const looksAt = 65<<10 + 512

// What there is to do about it.
const (
	adviseUnpack = "unpack it; if there is an artifact inside, that is what is wanted"
	advisePack   = "make an artifact of it: mendlet pack -n NAME -c DEVICE-TYPE -f THAT-FILE -o NAME.mender"
	adviseDisk   = "make an artifact of the root file system in it, not of the whole disk: " +
		"mendlet pack -n NAME -c DEVICE-TYPE -f IMAGE -o NAME.mender"
	adviseDelta = "a delta can only be applied by the updater that it was made for; take the whole artifact"
	adviseOther = "it is for another updater; take the artifact, which ends in .mender as a rule"
	advisePage  = "a server, a proxy or a portal has sent it in place of the artifact: " +
		"look at what it says, and at the address"
	adviseFetch = "fetch what it stands for: git lfs pull"
	adviseAgain = "it may not have been written or copied whole: compare its size and checksum with those of the original"
	adviseWrite = "mendlet pack or mender-artifact write artifacts"
)

// looks are what the bytes at some offset tell. An earlier line goes first.
var looks = []struct {
	off                 int
	magic, what, advice string
}{
	{0, "PK\x03\x04", "a zip archive", adviseUnpack},
	{0, "PK\x05\x06", "an empty zip archive", adviseAgain},
	{0, "\x1f\x8b", "gzip data", adviseUnpack},
	{0, "\xfd7zXZ\x00", "xz data", adviseUnpack},
	{0, "\x28\xb5\x2f\xfd", "zstd data", adviseUnpack},
	{0, "BZh", "bzip2 data", adviseUnpack},
	{0, "\x04\x22\x4d\x18", "lz4 data", adviseUnpack},
	{0, "7z\xbc\xaf\x27\x1c", "a 7-Zip archive", adviseUnpack},
	{0, "Rar!\x1a\x07", "a rar archive", adviseUnpack},
	{0, "\xd6\xc3\xc4", "a delta in VCDIFF form, as xdelta writes it", adviseDelta},
	{0, "BSDIFF4", "a delta of bsdiff", adviseDelta},
	{0, "ENDSLEY/BSDIFF", "a delta of bsdiff", adviseDelta},
	{0, "rs\x02\x36", "a delta of rdiff", adviseDelta},
	{0, "HDIFF", "a delta of HDiffPatch", adviseDelta},
	{0, "\x00ZCK1", "a zchunk file", adviseOther},
	{0, "CrAU", "a payload of update_engine", adviseOther},
	{0, "hsqs", "a squashfs image, or a bundle of RAUC, which is one", advisePack},
	{1080, "\x53\xef", "an ext4 image (or ext2, ext3)", advisePack},
	{1024, "\xe2\xe1\xf5\xe0", "an EROFS image", advisePack},
	{1024, "\x10\x20\xf5\xf2", "an F2FS image", advisePack},
	{64<<10 + 64, "_BHRfS_M", "a btrfs image", advisePack},
	{0, "\x45\x3d\xcd\x28", "a cramfs image", advisePack},
	{0, "XFSB", "an XFS image", advisePack},
	{0, "\x31\x18\x10\x06", "a UBIFS image", advisePack},
	{0, "UBI#", "a UBI image, of a whole flash", adviseDisk},
	{0, "\x3a\xff\x26\xed", "a sparse image of Android's tools", adviseUnpack},
	{32769, "CD001", "an ISO 9660 image", adviseDisk},
	{512, "EFI PART", "an image of a whole disk (GPT)", adviseDisk},
	{54, "FAT", "a FAT image", adviseDisk},
	{82, "FAT", "a FAT image", adviseDisk},
	{0, "\x27\x05\x19\x56", "an image for U-Boot", advisePack},
	{0, "\xd0\x0d\xfe\xed", "a device tree or a FIT image", advisePack},
	{110, "sw-description", "an update of SWUpdate", adviseOther},
	{0, "07070", "a cpio archive", adviseUnpack},
	{0, "\x7fELF", "a program", advisePack},
	{0, "version https://git-lfs.github.com/", "a Git LFS pointer, not the file itself", adviseFetch},
	{0, "-----BEGIN ", "a key, certificate or signature in PEM", adviseWrite},
	{510, "\x55\xaa", "an image of a whole disk (MBR)", adviseDisk},
}

// looksLike says, in words that follow "not a Mender artifact: ", what a file is taken for that
// starts with head and is no artifact, and what a person can do; advice may be "".
func looksLike(head []byte) (what, advice string) {
	if len(head) == 0 {
		return "it is empty (0 bytes)", adviseAgain
	}
	for _, l := range looks {
		if len(head) > l.off && bytes.HasPrefix(head[l.off:], []byte(l.magic)) {
			return "looks like " + l.what, l.advice
		}
	}
	if name, ok := firstMember(head); ok {
		return fmt.Sprintf("looks like a tar archive whose first member is %s, want \"version\"", quote(name)),
			"an artifact that was unpacked and packed again is none: order, names and form count; " + adviseWrite
	}
	if one := head[0]; bytes.Count(head, []byte{one}) == len(head) && (one == 0 || one == 0xff) {
		return fmt.Sprintf("its first %d bytes are all %#02x", len(head), one), adviseAgain
	}
	if isText(head) {
		return looksLikeText(head)
	}
	return fmt.Sprintf("starts with % x, which is nothing known", head[:min(len(head), 8)]), adviseAgain
}

// looksLikeText tells the kinds of text that servers send.
func looksLikeText(head []byte) (what, advice string) {
	start := strings.ToLower(string(bytes.TrimLeft(bytes.TrimPrefix(head, []byte("\ufeff")), " \t\r\n")))
	for _, k := range []struct{ prefix, what, advice string }{
		{"<!doctype html", "an HTML page", advisePage}, {"<html", "an HTML page", advisePage},
		{"<head", "an HTML page", advisePage},
		{"<?xml", "an XML document", advisePage}, {"<", "markup, perhaps a web page", advisePage},
		{"{", "JSON", advisePage}, {"[{", "JSON", advisePage}, {"#!", "a script", adviseWrite},
	} {
		if strings.HasPrefix(start, k.prefix) {
			return "looks like " + k.what, k.advice
		}
	}
	return "looks like text", adviseWrite
}

// isText tells UTF-8 without controls but those that lay out lines. A last letter may be cut off.
func isText(head []byte) bool {
	for len(head) > 0 {
		r, n := utf8.DecodeRune(head)
		broken := r == utf8.RuneError && n == 1 && (utf8.FullRune(head) || len(head) > utf8.UTFMax)
		if broken || r < ' ' && !strings.ContainsRune("\t\n\f\r", r) {
			return false
		}
		head = head[n:]
	}
	return true
}

// firstMember is the name of the first member of a tar, if head is the start of one: the checksum
// of its first header is right (POSIX ustar, tar(5)).
func firstMember(head []byte) (name string, ok bool) {
	if len(head) < 512 {
		return "", false
	}
	sum := 8 * int(' ') // the field itself counts as blanks
	for i, c := range head[:512] {
		if i < 148 || i >= 156 {
			sum += int(c)
		}
	}
	want, err := strconv.ParseInt(strings.Trim(string(head[148:156]), " \x00"), 8, 32)
	if err != nil || int(want) != sum {
		return "", false
	}
	name = before(string(head[:100]), "\x00")
	return name, true
}
