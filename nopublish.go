// SPDX-License-Identifier: Apache-2.0

//go:build (nofleet || nopublish) && !nonet

package main

// A device follows a channel without the verbs that make its file.

func fleetVerbs() []verb { return nil }
