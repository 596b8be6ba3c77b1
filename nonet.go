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

func (a *app) openURL(context.Context, string) (io.ReadCloser, error) {
	return nil, withHint(errors.New("this mendlet was built without network support"), "fetch the artifact with another program: wget -O- URL | mendlet install -")
}
