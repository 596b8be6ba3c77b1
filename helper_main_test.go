// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"testing"
)

// TestMain: the tests below run the program as a process, so that it can be killed. It is
// this test binary by another behaviour, which saves building it.
func TestMain(m *testing.M) {
	switch os.Getenv("MENDLET_TEST_PROGRAM") {
	case "":
	case "crash":
		prepareProcess()
		go panic("a fault beside the main goroutine")
		select {}
	default:
		main()
	}
	os.Exit(m.Run())
}
