// SPDX-License-Identifier: Apache-2.0

//go:build nonet || nofleet

package main

import "flag"

func fleetFlagSet(map[string]*flag.FlagSet) {}
