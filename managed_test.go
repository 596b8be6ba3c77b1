// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
)

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

// What is on a device is made read-only before the kernel restarts the machine: the latest mount first,
// each file system once, and no other.
func TestReadOnly(t *testing.T) {
	all := []mount{
		{dev: "0:2", point: "/", fstype: "rootfs", source: "rootfs"},
		{dev: "179:2", point: "/", fstype: "ext4", source: "/dev/root"},
		{dev: "0:5", point: "/dev", fstype: "devtmpfs", source: "/dev"},
		{dev: "0:6", point: "/proc", fstype: "proc", source: "proc"},
		{dev: "0:30", point: "/var", fstype: "ubifs", source: "ubi0:data"},
		{dev: "179:4", point: "/data", fstype: "ext4", source: "/dev/mmcblk0p4"},
		{dev: "179:4", point: "/etc/mender", fstype: "ext4", source: "/dev/mmcblk0p4"},
		{dev: "0:31", point: "/b", fstype: "btrfs", source: "/dev/sda"},
		{dev: "179:5", point: "/usr", fstype: "squashfs", source: "/dev/mmcblk0p5",
			options: []string{"ro", "errors=continue"}},
		{dev: "0:32", point: "/tmp", fstype: "tmpfs", source: "tmpfs"},
	}
	var got []string
	failed := readOnly(all, func(point string) error {
		if got = append(got, point); point == "/" {
			return syscall.EBUSY
		}
		return nil
	})
	if want := []string{"/b", "/etc/mender", "/var", "/"}; !slices.Equal(got, want) ||
		!slices.Equal(failed, []string{"/"}) {
		t.Errorf("got %q, failed %q, want %q", got, failed, want)
	}
}

// What an artifact provides has no say in what the server is told of the device.
func TestPollKeepsDeviceType(t *testing.T) {
	c := modulePaths(t)
	writeFile(t, c.DeviceTypeFile, "device_type=real\n")
	provides := map[string]string{"artifact_name": "a", "device_type": "forged", "app.version": "1"}
	s := &session{a: &app{c: c, rec: &record{Provides: provides}}}
	body, err := s.a.nextBody(s.a.rec.Provides)
	must(t, err)
	if want := `{"device_provides":{"app.version":"1","artifact_name":"a","device_type":"real"}}`; string(body) != want {
		t.Errorf("got %s, want %s", body, want)
	}
	if provides["device_type"] != "forged" {
		t.Error("the journal's record was changed")
	}
}

// A run on a device whose journal was lost in a trial boot says so.
func TestRunExplainsStrayTrial(t *testing.T) {
	s := newManagedSetup(t)
	d := newSimDevice(t, s.dir, s.images)
	vars := d.env()
	vars[varBootPart], vars[varBootPartHex], vars[varUpgrade] = "3", "3", "1"
	d.saveEnv(vars)
	d.booted = "B"
	var log bytes.Buffer
	listen := func(a *app) { a.lg = newLogger(&log) }
	if err := d.managedRun(t.Context(), s.server.URL, listen); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"the journal knows of no update", "mendlet env set upgrade_available=0"} {
		if got := log.String(); !strings.Contains(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if d.env()[varUpgrade] != "1" {
		t.Error("the environment changed")
	}
}
