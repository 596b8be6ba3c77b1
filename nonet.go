// SPDX-License-Identifier: Apache-2.0

//go:build nonet

package main

import (
	"context"
	"errors"
	"flag"
	"io"
)

// The recovery build: files and standard input only, without HTTP and TLS.

type netFlags struct{}

func (n *netFlags) downloadFlags(*flag.FlagSet) {}

func netVerbs() []verb { return nil }

func (a *app) urlSource(name string) *source {
	return &source{name: name, open: func(context.Context, int64, sourceID) (io.ReadCloser, sourceID, error) {
		return nil, sourceID{}, withHint(errors.New("this mendlet was built without network support"), "fetch the artifact with another program: wget -O- URL | mendlet install -")
	}}
}
