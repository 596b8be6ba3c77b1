// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestProgressOutput(t *testing.T) {
	b := newImageBoard(t)
	art := b.pack(t, "release-2", testBlocks(1<<20))
	out, _ := b.must(t, exitOK, "install", "--progress", "json", art)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var last map[string]any
	for _, l := range lines {
		if err := json.Unmarshal([]byte(l), &last); err != nil {
			t.Errorf("line %q: %v", l, err)
		}
	}
	if last["event"] != "progress" || last["done"] != float64(1<<20) || last["total"] != last["done"] {
		t.Errorf("got %q", out)
	}
	b.must(t, exitOK, "rollback")
	_, errs := b.must(t, exitOK, "install", "--progress", "lines", art)
	if !strings.Contains(errs, "100 %: 1.0 MB of 1.0 MB written") { // already there
		t.Errorf("got %q", errs)
	}
	b.must(t, exitOK, "rollback")
	if _, errs := b.must(t, exitOK, "-q", "install", art); errs != "" {
		t.Errorf("-q: %q", errs)
	}
}
