// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/signal"
	"syscall"
	"testing"
)

// TestMain: the tests below run the program as a process, so that it can be killed. It is
// this test binary by another behaviour, which saves building it.
func TestMain(m *testing.M) {
	switch os.Getenv("MENDLET_TEST_PROGRAM") {
	case "":
		// What is installed on this machine is none of the tests' business. Those that need files in these places set
		// them anew, and then cannot run beside others.
		for _, name := range []string{"MENDER_CONF_DIR", "MENDER_DATA_DIR"} {
			os.Setenv(name, "/nonexistent")
		}
		// As main does: what the tests start hears of a terminal's end, also under nohup(1).
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	case "crash":
		prepareProcess()
		go panic("a fault beside the main goroutine")
		select {}
	default:
		main()
	}
	os.Exit(m.Run())
}
