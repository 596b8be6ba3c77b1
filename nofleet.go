// SPDX-License-Identifier: Apache-2.0

//go:build nofleet && !nonet

package main

import (
	"context"
	"flag"
	"time"
)

// What stands for channels in builds without them.

type channel struct {
	*session
	at string
}

func channelSource(*app, func(*app, string) (*agent, error), func(*app) time.Time,
	func(context.Context, *app) (string, error)) *channel {
	return nil
}

func channelFlags(*flag.FlagSet, *options) {}
