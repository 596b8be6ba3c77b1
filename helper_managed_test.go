// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

const simIdentity = `{"mac":"02:00:00:00:00:01"}`

// managedSetup is a simulated device's surroundings: what its files say and a server.
type managedSetup struct {
	*simSetup
	server      *testServer
	deployments int
}

func newManagedSetup(t testing.TB) *managedSetup {
	s := &managedSetup{simSetup: newSimSetup(t), server: newTestServer(t, false)}
	s.server.autoAccept = true
	net := filepath.Join(s.dir, "root", "sys/class/net/eth0")
	boot := filepath.Join(s.dir, "root", "proc/sys/kernel/random")
	for _, d := range []string{net, boot} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{"address": "02:00:00:00:00:01", "ifindex": "2", "type": "1"} {
		writeFile(t, filepath.Join(net, name), text+"\n")
	}
	return s
}

// device is a device that gets deployment of the artifact from the server.
func (s *managedSetup) device(t testing.TB, artifact string) (*simDevice, *testDeployment) {
	d := newSimDevice(t, s.dir, s.images)
	return d, s.deploy(t, artifact)
}

func (s *managedSetup) deploy(t testing.TB, artifact string) *testDeployment {
	text, err := os.ReadFile(s.artifacts[artifact])
	if err != nil {
		t.Fatal(err)
	}
	s.deployments++
	return s.server.deploy(fmt.Sprintf("deployment-%d", s.deployments), artifact, []string{"sim"}, text)
}

// managedRun is one run of "mendlet run --no-reboot".
func (d *simDevice) managedRun(ctx context.Context, server string, tune func(*app)) error {
	boot := filepath.Join(d.root, "proc/sys/kernel/random/boot_id")
	if err := os.WriteFile(boot, []byte(strconv.Itoa(d.boots)), 0o644); err != nil {
		return err
	}
	a := d.start()
	a.c.Servers = []serverEntry{{server}}
	a.o.deadline, a.o.noReboot = time.Hour, true
	a.o.paths = a.c.paths
	if tune != nil {
		tune(a)
	}
	return runOnce(ctx, a)
}

// settleManaged boots and runs until the deployment has ended.
func (d *simDevice) settleManaged(server, id string) error {
	var last error
	for range 8 {
		if err := d.boot(); err != nil {
			return fmt.Errorf("after %v: %w", last, err)
		}
		last = d.managedRun(context.Background(), server, nil)
		if rec, err := d.peek(); err != nil {
			return err
		} else if rec.Update == nil && rec.Last != nil && rec.Last.ID == id {
			return nil
		}
	}
	return fmt.Errorf("not settled after 8 boots; last error: %v", last)
}

// told checks what the server heard: one final status, and a true one.
func (s *managedSetup) told(d *simDevice, dep *testDeployment, name string) error {
	statuses, final, _ := s.server.history(dep)
	want := "failure"
	if d.slotImage(d.env()["mender_boot_part"]) == name {
		want = "success"
	}
	ends := 0
	for _, st := range statuses {
		if st == "success" || st == "failure" {
			ends++
		}
	}
	if final != want || ends < 1 || !slices.Equal(statuses[len(statuses)-ends:], slices.Repeat([]string{want}, ends)) {
		return fmt.Errorf("the server heard %v, want one verdict, %q", statuses, want)
	}
	return nil
}
