// SPDX-License-Identifier: Apache-2.0

//go:build nonet || nodelta

package main

import (
	"context"
	"flag"
)

// The builds without deltas: an artifact that is made for them is one like any other.

type deltaHost struct {
	mode, ds string
	src      *source
	open     func(path string, how openMode) (storage, error)
	from, to *slot
	start    int64
	opt      writeOptions
	lg       *logger
}

type delta struct{}

func deltaFlag(*flag.FlagSet, *string) {}

// openDelta never gives one.
func openDelta(_ context.Context, _ *artifact, h deltaHost) (*delta, error) {
	if h.mode == "only" && h.src != nil && h.src.span != nil {
		return nil, withHint(refuse("Delta is only, and this mendlet was built without deltas"),
			"set Delta to auto, or install from a file")
	}
	return nil, nil
}

func (*delta) String() string { return "" }

func (*delta) figures() any { return nil }

func (*delta) begin(context.Context, *artifact) error { return nil }

func (*delta) makePlan(context.Context) error { return nil }

func (*delta) enter(*artifact, int64, int64) int64 { return 0 }

func (*delta) follow([]byte) {}

func (*delta) done() {}

func (*delta) close() {}

func (*delta) saved() int64 { return 0 }

func (*delta) fetched() (n, requests int64) { return 0, 0 }

func forgetIndex(string, *slot) {}

func deltaStart(mode, ds string) int64 { return 0 }
