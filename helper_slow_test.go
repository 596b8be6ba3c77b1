// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"testing"
)

// Three sizes of a test run: -short, which the race detector and the recovery build get;
// "make test", a minute and a half; and "make test-all", which CI runs and which sets
// MENDLET_TEST_ALL.

// exhaustive tells whether all is to be tried that could go wrong, however long that takes.
func exhaustive() bool { return os.Getenv("MENDLET_TEST_ALL") != "" && !testing.Short() }

// onlyExhaustive skips a test that "make test" can do without.
func onlyExhaustive(t testing.TB, why string) {
	t.Helper()
	if !exhaustive() {
		t.Skipf("%s: make test-all runs it", why)
	}
}
