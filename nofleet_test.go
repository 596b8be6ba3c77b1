// SPDX-License-Identifier: Apache-2.0

//go:build nonet || nofleet || nopublish

package main

import "flag"

func fleetFlagSet(map[string]*flag.FlagSet) {}
