// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"compress/flate"
	"compress/gzip"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// The compressors of pack. They are named here alone: the recovery build has no verb that packs, and so leaves out
// their packages, which would make tables when it starts; its tests bring them along.

type gzipWriter = *gzip.Writer

func newGzip(w io.Writer) (gzipWriter, error) { return gzip.NewWriterLevel(w, gzip.BestCompression) }

// newDeflate compresses what is behind dict, of which 32 KiB may be referred to.
func newDeflate(w io.Writer, dict []byte) (*flate.Writer, error) {
	return flate.NewWriterDict(w, flate.BestCompression, dict)
}

// newLZMA compresses to LZMA2 with a dictionary of dict bytes.
func newLZMA(w io.Writer, dict int) (io.WriteCloser, error) {
	return lzma.Writer2Config{DictCap: dict}.NewWriter2(w)
}
