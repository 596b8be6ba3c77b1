// SPDX-License-Identifier: Apache-2.0

//go:build nonet

package main

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"context"
	"io"
	"strings"
	"testing"

	"github.com/ulikunitz/xz/lzma"
)

// Tests pack in this build, too.
func init() {
	newGzip = func(w io.Writer) (gzipWriter, error) { return gzip.NewWriterLevel(w, gzip.BestCompression) }
	newLZMA = func(w io.Writer, dict int) (io.WriteCloser, error) {
		return lzma.Writer2Config{DictCap: dict}.NewWriter2(w)
	}
	newDeflate = func(w io.Writer, dict []byte) (gzipWriter, error) {
		return flate.NewWriterDict(w, flate.BestCompression, dict)
	}
}

// A verb that another build has is refused as such.
func TestLeftOutVerbs(t *testing.T) {
	for words, want := range map[string]string{
		"pack -n x":     "without the verb \"pack\"",
		"pack --help":   "hint: make artifacts on a build host",
		"daemon":        "hint: it takes a mendlet with network support",
		"snapshot dump": "hint: write the device to a file or pipe with dd",
		"what":          "unknown verb \"what\"",
	} {
		var out, errw bytes.Buffer
		args := append([]string{"mendlet"}, strings.Fields(words)...)
		code := runProgram(context.Background(), args, strings.NewReader(""), &out, &errw)
		if code != exitUsage || !strings.Contains(errw.String(), want) {
			t.Errorf("%s: got exit code %d, %q, want %d, %q", words, code, errw.String(), exitUsage, want)
		}
	}
	var help bytes.Buffer
	general(persona{}, &options{}, &help)
	if strings.Contains(help.String(), "\n  pack ") || !strings.Contains(help.String(), "\n  install ") {
		t.Errorf("--help:\n%s", help.String())
	}
}
