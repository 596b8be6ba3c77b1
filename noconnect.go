// SPDX-License-Identifier: Apache-2.0

//go:build nonet || noconnect

package main

// What stands for troubleshooting in builds without it.

func connectVerbs() []verb { return nil }

func connectionState(string) string { return "" }
