// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"fmt"
	"io"
	"os"
	"testing"
)

// The relay for the machine tests of rig/, until standard input ends. It prints its address and a user's token, and
// the device that connects, once there is one.
func TestRelayForRig(t *testing.T) {
	if os.Getenv("MENDLET_RIG_RELAY") == "" {
		t.Skip("serves the machine tests: rig/run.sh")
	}
	r := newRelay(t)
	fmt.Println("RELAY", r.URL, userToken("user-1"))
	go func() {
		r.at.Lock()
		defer r.at.Unlock()
		for len(r.devices) == 0 {
			r.news.Wait()
		}
		for id := range r.devices {
			fmt.Println("DEVICE", id)
		}
	}()
	io.Copy(io.Discard, os.Stdin)
}
