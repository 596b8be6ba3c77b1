// SPDX-License-Identifier: Apache-2.0

//go:build nonet

package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"path/filepath"
)

// The recovery build: files and standard input only, without HTTP and TLS, and without pack.

// recovery is said where a branch is for one build only; the compiler leaves the other one out.
const recovery = true

type netFlags struct{}

func (n *netFlags) downloadFlags(*flag.FlagSet) {}

// What pack compresses with. No verb here does; tests do, and bring it.
type gzipWriter interface {
	io.WriteCloser
	Flush() error
	Reset(io.Writer)
}

var (
	newGzip func(io.Writer) (gzipWriter, error)
	newLZMA func(w io.Writer, dict int) (io.WriteCloser, error)

	newDeflate func(w io.Writer, dict []byte) (gzipWriter, error)
)

func netVerbs() []verb { return nil }

func fleetVerbs() []verb { return nil }

func tokenVerbs() []verb { return nil }

func indexVerbs() []verb { return nil }

// calledAs takes none of the names of Mender's programs: there is no server to be managed by.
func calledAs(args []string) (persona, []string, error) {
	switch name := filepath.Base(args[0]); name {
	case "mender", "mender-update", "mender-auth", "mender-setup", "mender-snapshot":
		return persona{}, nil, withHint(usageError("this mendlet was built without the name %q", name), "call it mendlet")
	}
	return persona{}, args, nil
}

func snapshotVerbs() []verb { return nil }

func runGuard(string, io.Reader, io.Writer) (code int, called bool) { return 0, false }

func urlSource(_ *app, name string) *source {
	return &source{open: func(context.Context, int64, sourceID) (io.ReadCloser, sourceID, error) {
		return nil, sourceID{}, withHint(errors.New("this mendlet was built without network support"),
			"fetch the artifact with another program: wget -O- URL | mendlet install -")
	}}
}

// leftOut is the hint for a verb of other builds.
func leftOut(name string) string {
	switch name {
	case "pack", "index", "fleet":
		return "make artifacts on a build host, and channel files, too, with a mendlet with network support"
	case "snapshot":
		return "write the device to a file or pipe with dd, after 'fsfreeze -f' or from a system that does not run on it"
	case "run", "daemon", "check-update", "send-inventory", "bootstrap", "setup", "auth-daemon", "token",
		"monitor", "connect":
		return "it takes a mendlet with network support; " +
			"install an artifact from a file or standard input with this one"
	}
	return ""
}
