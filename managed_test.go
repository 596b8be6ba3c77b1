// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"fmt"
	"strings"
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
