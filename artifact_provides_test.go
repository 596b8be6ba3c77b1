// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"strings"
	"testing"
)

func TestMatchClears(t *testing.T) {
	for _, c := range []struct {
		pattern, key string
		want         bool
	}{
		{"", "", true}, {"", "a", false}, {"a", "a", true}, {"a", "", false},
		{"*", "", true}, {"*", "anything.at-all", true}, {"***", "anything", true}, {"***", "", true},
		{"test_*test_*", "test_string", false}, {"test_*test_*", "test_test_", true}, {"test_*test_*", "test_x_test_y", true},
		{"ab", "abXab", false}, {"a", "aa", false}, // pinned because Mender's C++ client matches them
		{"*.checksum", "abc", false}, {"*.checksum", "abc.checksum", true}, {"*.checksum", ".checksum", true},
		{"rootfs-image.*", "rootfs-image.version", true}, {"rootfs-image.*", "rootfs-imageXversion", false},
		{"rootfs-image.*", "rootfs-image", false},
		{"a?c", "abc", false}, {"a?c", "a?c", true}, {"[ab]", "a", false}, {"a*b*c", "abbc", true}, {"a*b*c", "acb", false},
		{"*a", "aa", true}, {"a*a", "a", false}, {"*aab", "aaab", true}, {"a*bc*bc", "abcbc", true},
		{"a*bc*bc", "abc", false},
		{`a\*`, "a*", true}, {`a\*`, "ab", false}, {`\**`, "*x", true}, {`a\b`, `a\b`, true}, {`a\`, `a\`, false},
		{"a\x00b", "aXb", false}, {"a*", "a\x00", false},
	} {
		if got := matchClears(c.pattern, c.key); got != c.want {
			t.Errorf("matchClears(%q, %q) = %v, want %v", c.pattern, c.key, got, c.want)
		}
	}
}

func TestMergeProvides(t *testing.T) {
	stored := map[string]string{"artifact_name": "old", "artifact_group": "g", "rootfs-image.version": "1",
		"rootfs-image.checksum": "c", "other": "x"}
	for _, c := range []struct {
		name     string
		provides map[string]string
		clears   []string
		group    string
		want     string
	}{
		{"neither: all goes", nil, nil, "", "map[artifact_name:new]"},
		{"neither, with group", nil, nil, "h", "map[artifact_group:h artifact_name:new]"},
		{"provides only: replaced", map[string]string{"p": "1"}, nil, "", "map[artifact_name:new p:1]"},
		{"provides empty", map[string]string{}, nil, "", "map[artifact_name:new]"},
		{"clears only", nil, []string{"rootfs-image.*"}, "", "map[artifact_group:g artifact_name:new other:x]"},
		{"clears nothing", nil, []string{}, "", "map[artifact_group:g artifact_name:new other:x rootfs-image.checksum:c " +
			"rootfs-image.version:1]"},
		{"clears the group", nil, []string{"artifact_group"}, "",
			"map[artifact_name:new other:x rootfs-image.checksum:c rootfs-image.version:1]"},
		{"clears the group, has one", nil, []string{"artifact_*"}, "h",
			"map[artifact_group:h artifact_name:new other:x rootfs-image.checksum:c rootfs-image.version:1]"},
		{"both", map[string]string{"rootfs-image.version": "2", "other": "y"}, []string{"rootfs-image.*", "nothing"}, "",
			"map[artifact_group:g artifact_name:new other:y rootfs-image.version:2]"},
		{"both, all cleared", map[string]string{"p": "1"}, []string{"*"}, "", "map[artifact_name:new p:1]"},
	} {
		before := maps.Clone(stored)
		got := mergeProvides(stored, &artifact{Name: "new", Group: c.group, Provides: c.provides, Clears: c.clears})
		if fmt.Sprint(got) != c.want || !maps.Equal(stored, before) {
			t.Errorf("%s: got %v, want %s", c.name, got, c.want)
		}
	}
	if got := mergeProvides(nil, &artifact{Name: "n"}); fmt.Sprint(got) != "map[artifact_name:n]" {
		t.Errorf("nothing stored: %v", got)
	}
}

// Field case 11: an artifact for another device, or that the installed one does not allow.
func TestCheckDepends(t *testing.T) {
	a := &artifact{Name: "rel", DeviceTypes: []string{"one", "two"},
		Depends: map[string][]string{"artifact_name": {"r1", "r2"}, "k": {"*"}}}
	good := map[string]string{"artifact_name": "r2", "k": "*", "more": "x"}
	if err := a.checkDepends("two", good); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		device, key, value string
		want               []string
	}{
		{"One", "", "", []string{"one", "two", "One"}},
		{"", "", "", []string{"one"}},
		{"one", "artifact_name", "r3", []string{"artifact_name", "r1", "r2", "r3"}},
		{"one", "k", "anything", []string{"k", "*", "anything"}},
		{"one", "k", "-", []string{"provides no k"}},
	} {
		p := maps.Clone(good)
		if p[c.key] = c.value; c.value == "-" {
			delete(p, c.key)
		}
		err := a.checkDepends(c.device, p)
		if exitCode(err) != exitRefused {
			t.Fatalf("%+v: %v", c, err)
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%+v: %v lacks %q", c, err, w)
			}
		}
	}
}

// providing is an artifact of that many bytes of provides under names of its own, which clears no others.
func providing(name string, n int) *artifact {
	p := map[string]string{}
	for i := 0; n > 0; i++ {
		p[fmt.Sprintf("%s-%d", name, i)] = strings.Repeat("v", min(n, 200))
		n -= 220
	}
	return &artifact{Name: name, Provides: p, Clears: []string{}}
}

// Whatever artifacts have left, one of the usual kind goes through, and one that clears.
func TestProvidesAreBounded(t *testing.T) {
	stored := map[string]string{"artifact_name": "old"}
	took := 0
	for i, n := range []int{1 << 20, 7000, 3000, 2000, 1500, 1200, 1100} {
		for range 5 {
			a := providing(fmt.Sprintf("evil-%d-%d", i, took), n)
			if err := checkProvides(stored, a); err == nil {
				took, stored = took+1, mergeProvides(stored, a)
			} else if exitCode(err) != exitRefused || hintOf(err) == "" {
				t.Fatalf("got %v", err)
			}
		}
	}
	usual := providing("usual", 300)
	usual.Provides["rootfs-image.checksum"] = strings.Repeat("0", 64)
	must(t, checkProvides(stored, usual))
	must(t, checkProvides(stored, &artifact{Name: "sweep", Provides: usual.Provides, Clears: []string{"*"}}))
	must(t, checkProvides(stored, &artifact{Name: "of format 2", Provides: usual.Provides}))
	if took < 2 || took > 10 {
		t.Errorf("%d of the large ones were taken", took)
	}
	for name, a := range map[string]*artifact{
		"one value":     {Name: "x", Provides: map[string]string{"k": strings.Repeat("v", maxProvides)}},
		"escaped":       {Name: "x", Provides: map[string]string{"k": strings.Repeat("<", maxProvides/5)}},
		"the name":      {Name: strings.Repeat("n", maxNames)},
		"the group":     {Name: "x", Group: strings.Repeat("g", maxNames)},
		"what it clear": {Name: "x", Clears: []string{strings.Repeat("c", maxClears)}},
	} {
		if err := checkProvides(nil, a); exitCode(err) != exitRefused || !strings.Contains(err.Error(), "want ") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	// What a device has from a time without bounds may stay, and go.
	full := providing("full", 40<<10).Provides
	must(t, checkProvides(full, &artifact{Name: "x", Provides: map[string]string{}, Clears: []string{"full-1"}}))
	if err := checkProvides(full, usual); exitCode(err) != exitRefused {
		t.Errorf("it grows: got %v", err)
	}
}
