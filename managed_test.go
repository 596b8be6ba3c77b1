// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"context"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	a.o.net = netFlags{deadline: time.Hour, noReboot: true}
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

func TestManagedUpdate(t *testing.T) {
	s := newManagedSetup(t)
	d, dep := s.device(t, "new")
	if err := d.settleManaged(s.server.URL, dep.id); err != nil {
		t.Fatal(err)
	}
	if err := d.check("new"); err != nil {
		t.Fatal(err)
	}
	statuses, _, _ := s.server.history(dep)
	if got, want := strings.Join(statuses, " "), "downloading installing rebooting installing success"; got != want {
		t.Errorf("statuses: got %q, want %q", got, want)
	}
	if inv := s.server.deviceByID(simIdentity).inventory; fmt.Sprint(inv["artifact_name"]) != "new" {
		t.Errorf("inventory after the update: got %v, want artifact_name new", inv)
	}
}

func TestManagedUpdateThatDoesNotBoot(t *testing.T) {
	s := newManagedSetup(t)
	d, dep := s.device(t, "new")
	d.bad = "new"
	if err := d.settleManaged(s.server.URL, dep.id); err != nil {
		t.Fatal(err)
	}
	if err := d.check("new"); err != nil {
		t.Fatal(err)
	}
	statuses, final, logs := s.server.history(dep)
	if final != "failure" || len(logs) == 0 {
		t.Errorf("got %v and %d lines of log, want failure and its log", statuses, len(logs))
	}
}

// Every operation of a managed update cut, with a server that remembers.
func TestManagedPowerCutAtEveryOperation(t *testing.T) {
	t.Parallel()
	s := newManagedSetup(t)
	rng := rand.New(rand.NewSource(11))
	states := 0
	for k := 1; ; k++ {
		for i, mode := range lossModes {
			all := tears(rng)
			torn := all[(k+i)%len(all)]
			d, dep := s.device(t, "new")
			d.w.cutAt = k
			var err error
			cut := d.powered(func() { err = d.settleManaged(s.server.URL, dep.id) })
			if cut {
				d.w.lose(mode, torn, rand.New(rand.NewSource(int64(k))))
				err = d.settleManaged(s.server.URL, dep.id)
			}
			if err == nil {
				err = d.check("new")
			}
			if err == nil {
				err = s.told(d, dep, "new")
			}
			if err != nil {
				t.Fatalf("cut at operation %d, mode %s, torn after %d: %v", k, mode, torn, err)
			}
			if !cut {
				t.Logf("%d crash states", states)
				return
			}
			states++
		}
	}
}

// MEN-2293, with a server: what comes over the network is bounded wherever the power is cut.
func TestManagedFetchedBytes(t *testing.T) {
	t.Parallel()
	s := newManagedSetup(t)
	images, flush := newResumeSetup(t, "gzip")
	s.images, s.artifacts = images.images, images.artifacts
	artifact := readFileOrNil(s.artifacts["new"])
	bound := int64(len(artifact)) + lostPerCut(artifact, resumeScale(), flush)
	rng := rand.New(rand.NewSource(5))
	most := int64(0)
	for k := 1; ; k++ {
		d, dep := s.device(t, "new")
		var lives []*app
		d.arm = func(a *app) {
			a.o.write = resumeScale()
			lives = append(lives, a)
		}
		d.w.cutAt = k
		var err error
		cut := d.powered(func() { err = d.settleManaged(s.server.URL, dep.id) })
		if cut {
			torn := tears(rng)
			d.w.lose(lossModes[k%len(lossModes)], torn[k%len(torn)], rand.New(rand.NewSource(int64(k))))
			err = d.settleManaged(s.server.URL, dep.id)
		}
		if err == nil {
			err = d.check("new")
		}
		fetched := int64(0)
		for _, a := range lives {
			fetched += a.fetched.Load()
		}
		if err == nil && fetched > bound {
			err = fmt.Errorf("fetched %d bytes, want %d at most", fetched, bound)
		}
		if err != nil {
			t.Fatalf("cut at operation %d: %v", k, err)
		}
		if most = max(most, fetched); !cut {
			t.Logf("%d crash states; artifact of %d bytes, at most %d fetched (bound %d)", k-1, len(artifact), most, bound)
			return
		}
	}
}
