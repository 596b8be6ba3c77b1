// SPDX-License-Identifier: Apache-2.0

//go:build nonet || nodbus

package main

import (
	"context"
	"errors"
)

// What stands for dbus.go in builds without it.

func busVerbs() []verb { return nil }

func authDaemon(context.Context, *app) error {
	return withHint(errors.New("this mendlet was built without D-Bus"), "it takes one without the tags nodbus and nonet")
}
