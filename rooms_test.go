// SPDX-License-Identifier: Apache-2.0

package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// maxUses bounds the pairs of rooms of which one knows the other.
const maxUses = 365

// TestRooms holds the table of rooms in ARCHITECTURE.md against the code: who uses whom, and that
// no two rooms use each other.
func TestRooms(t *testing.T) {
	t.Parallel()
	told, found := roomTable(t), roomUses(t)
	for _, room := range slices.Sorted(maps.Keys(found)) {
		if told[room] == nil {
			t.Errorf("ARCHITECTURE.md has no row for %s.go", room)
			continue
		}
		for _, other := range slices.Sorted(maps.Keys(found[room])) {
			if !told[room][other] {
				t.Errorf("%s.go uses %s of %s.go: ARCHITECTURE.md does not let it", room, found[room][other], other)
			}
		}
	}
	uses := 0
	for _, room := range slices.Sorted(maps.Keys(told)) {
		if found[room] == nil {
			t.Errorf("ARCHITECTURE.md tells of %s.go, which is not there", room)
		}
		for other := range told[room] {
			uses++
			if found[room][other] == "" {
				t.Errorf("ARCHITECTURE.md says that %s.go uses %s.go, which it does not", room, other)
			}
			if told[other][room] && room < other {
				t.Errorf("%s.go and %s.go use each other", room, other)
			}
		}
	}
	t.Logf("%d rooms, %d uses", len(told), uses)
	if uses > maxUses {
		t.Errorf("got %d uses between rooms, want %d at most", uses, maxUses)
	}
}

// roomTable reads the rows "| file.go | what | other, other |". A row may name several files.
func roomTable(t *testing.T) map[string]map[string]bool {
	text, err := os.ReadFile("ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	table := map[string]map[string]bool{}
	for line := range strings.SplitSeq(string(text), "\n") {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || !strings.HasSuffix(strings.TrimSpace(cells[1]), ".go") {
			continue
		}
		room := strings.TrimSuffix(strings.TrimSpace(cells[1]), ".go")
		table[room] = map[string]bool{}
		for _, other := range strings.FieldsFunc(cells[3], func(r rune) bool { return r == ' ' || r == ',' }) {
			if other != "–" {
				table[room][other] = true
			}
		}
	}
	return table
}

// roomUses type-checks the package, but for what it imports, and gives for each file the files
// whose names it uses, with one of these names.
func roomUses(t *testing.T) map[string]map[string]string {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	set := token.NewFileSet()
	uses := map[string]map[string]string{}
	var parsed []*ast.File
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") || slices.Contains([]string{"nonet.go", "nodbus.go", "nofleet.go",
			"nopublish.go", "nodelta.go", "noconnect.go", "nomonitor.go"}, name) { // which stand for others
			continue
		}
		f, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, f)
		uses[strings.TrimSuffix(name, ".go")] = map[string]string{}
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: noImports{}, Error: func(error) {}} // what is imported is not known
	pkg, _ := conf.Check("main", set, parsed, info)
	room := func(p token.Pos) string { return strings.TrimSuffix(set.Position(p).Filename, ".go") }
	for name, what := range info.Uses {
		if what.Pkg() != pkg || room(name.Pos()) == room(what.Pos()) {
			continue
		}
		u := uses[room(name.Pos())]
		if old := u[room(what.Pos())]; old == "" || what.Name() < old {
			u[room(what.Pos())] = what.Name()
		}
	}
	return uses
}

// noImports gives empty packages.
type noImports struct{}

func (noImports) Import(name string) (*types.Package, error) {
	base := path.Base(name)
	if base == "v2" {
		base = path.Base(path.Dir(name))
	}
	p := types.NewPackage(name, base)
	p.MarkComplete()
	return p, nil
}

// TestRoomsFindUses proves the search itself on rooms that are known to know each other.
func TestRoomsFindUses(t *testing.T) {
	t.Parallel()
	found := roomUses(t)
	for _, pair := range [][2]string{{"main", "app"}, {"state", "journal"}, {"flash", "storage"},
		{"managed", "netclient"}} {
		if found[pair[0]][pair[1]] == "" {
			t.Errorf("%s.go is not found to use %s.go", pair[0], pair[1])
		}
	}
}
