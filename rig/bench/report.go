// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// results is all that was measured, in the order in which it is told.
type results struct {
	runs             int
	peers            []string
	rows             []row
	notes            []string
	load             string // of the machine before the first run
	version, machine string

	floors []string // names
	got    map[string][]measured
	failed []string
}

func key(peer string, r row) string { return r.String() + "\x00" + peer }

func (res *results) put(k string, m measured) {
	if res.got == nil {
		res.got = map[string][]measured{}
	}
	res.got[k] = append(res.got[k], m)
}

func (res *results) add(peer string, r row, m measured) { res.put(key(peer, r), m) }

func (res *results) addFloor(name string, m measured) {
	if !slices.Contains(res.floors, name) {
		res.floors = append(res.floors, name)
	}
	res.put(name, m)
}

func (res *results) fail(peer string, r row, err error) {
	s := fmt.Sprintf("%s, %s: %v", peer, r, err)
	if !slices.Contains(res.failed, s) {
		res.failed = append(res.failed, s)
	}
}

// median of each figure by itself; ok is false where nothing was measured.
func (res *results) median(k string) (m measured, ok bool) {
	all := res.got[k]
	if len(all) == 0 {
		return m, false
	}
	of := func(get func(measured) float64) float64 {
		var v []float64
		for _, x := range all {
			v = append(v, get(x))
		}
		slices.Sort(v)
		return (v[len(v)/2] + v[(len(v)-1)/2]) / 2
	}
	m.wall = of(func(x measured) float64 { return x.wall })
	m.cpu = of(func(x measured) float64 { return x.cpu })
	m.rss = of(func(x measured) float64 { return x.rss })
	m.wrote = int64(of(func(x measured) float64 { return float64(x.wrote) }))
	m.conns = int64(of(func(x measured) float64 { return float64(x.conns) }))
	m.bytes = int64(of(func(x measured) float64 { return float64(x.bytes) }))
	return m, true
}

// best is the least wall and CPU time of the peers other than mendlet; without any, mendlet's.
func (res *results) best(r row) (wall, cpu float64) {
	for _, p := range res.peers {
		m, ok := res.median(key(p, r))
		if !ok || p == "mendlet" {
			continue
		}
		if wall == 0 || m.wall < wall {
			wall = m.wall
		}
		if cpu == 0 || m.cpu < cpu {
			cpu = m.cpu
		}
	}
	if m, ok := res.median(key("mendlet", r)); ok && wall == 0 {
		return m.wall, m.cpu
	}
	return wall, cpu
}

func (res *results) markdown() string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format, a...) }
	p("Measured by `make bench-peers RUNS=%d` with %s on %s, load %s before the first run. Medians of %d runs, in turns. Times are ratios to the best of the *other* updaters in the same row, so that 1.00 is the best of them and less is better; they end when the data is on the device (an fsync of it is part of the time), and every slot was compared with the image afterwards. The memory is the highest of what all processes of the updater had together, the last column what the block device was told to write.\n\n",
		res.runs, res.version, res.machine, res.load, res.runs)
	p("![Wall time beside the other updaters](performance.svg)\n\n")
	p("| payload, from, slot | updater | wall | CPU | memory, MiB | written, MiB |\n|---|---|--:|--:|--:|--:|\n")
	for _, r := range res.rows {
		wall, cpu := res.best(r)
		for _, name := range res.peers {
			if m, ok := res.median(key(name, r)); ok {
				p("| %s | %s | %.2f | %.2f | %.0f | %d |\n", r, name, m.wall/wall, m.cpu/cpu, m.rss/(1<<20), m.wrote>>20)
			}
		}
	}
	p("\nFloors of the same run, as ratios to the best other updater of the row that they belong to (from a file, different content):\n\n| floor | row | wall | CPU |\n|---|---|--:|--:|\n")
	for _, f := range res.floors {
		r := row{comp: "none"}
		if word, _, _ := strings.Cut(f, " "); slices.Contains([]string{"gzip", "xz", "zstd"}, word) {
			r.comp = word
		}
		wall, cpu := res.best(r)
		if m, ok := res.median(f); ok && wall > 0 {
			p("| %s | %s | %.2f | %.2f |\n", f, r.comp, m.wall/wall, m.cpu/cpu)
		}
	}
	res.startUp(p)
	p("\nHow each was set up:\n\n")
	for _, n := range append(slices.Clone(res.notes), res.failed...) {
		p("- %s\n", n)
	}
	return b.String()
}

// startUp tells of what is not an install: how a program starts, and what a poll takes.
func (res *results) startUp(p func(string, ...any)) {
	p("\nStart-up, `--version`, as a ratio to the best of the others:\n\n| updater | CPU | memory, MiB |\n|---|--:|--:|\n")
	least := 0.0
	for _, name := range res.peers {
		if m, ok := res.median("start " + name); ok && name != "mendlet" && (least == 0 || m.cpu < least) {
			least = m.cpu
		}
	}
	for _, name := range res.peers {
		if m, ok := res.median("start " + name); ok && least > 0 {
			p("| %s | %.2f | %.0f |\n", name, m.cpu/least, m.rss/(1<<20))
		}
	}
	other, ok := res.median("poll mender")
	if !ok {
		return
	}
	p("\nOne start that asks over TLS and finds nothing (`mendlet run`, and the start of `mender daemon`, which has no other way and " +
		"sends its inventory): the first one, which authenticates and sends the inventory, and a later one at the same server. " +
		"Bytes are those of the connections, both ways, without what is below TCP; 700 of each request with a token are the token:" +
		"\n\n| updater | start | CPU | memory, MiB | connections | bytes |\n|---|---|--:|--:|--:|--:|\n")
	for _, name := range res.peers {
		for _, start := range [][2]string{{"poll ", "first"}, {"poll again ", "later"}} {
			if m, ok := res.median(start[0] + name); ok {
				p("| %s | %s | %.2f | %.0f | %d | %d |\n", name, start[1], m.cpu/other.cpu, m.rss/(1<<20), m.conns, m.bytes)
			}
		}
	}
}

var colours = map[string]string{"mendlet": "#0b6e4f", "mender": "#c98b2b", "rauc": "#7a7f87", "swupdate": "#5b7db1"}

// svg is a bar for each updater in each row, and a line where the best of the others is.
func (res *results) svg() string {
	const left, unit, bar, gap = 190, 220.0, 11, 10 // unit: pixels for a ratio of 1
	var b strings.Builder
	y := 50
	for _, r := range res.rows {
		wall, _ := res.best(r)
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>\n", left-8, y+bar, r)
		for _, name := range res.peers {
			m, ok := res.median(key(name, r))
			if !ok || wall == 0 {
				continue
			}
			w := min(m.wall/wall*unit, 2.6*unit)
			fmt.Fprintf(&b, "<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\" fill=\"%s\"/><text x=\"%.1f\" y=\"%d\" class=\"n\">%.2f</text>\n",
				left, y, w, bar-1, colours[name], left+w+4, y+bar-2, m.wall/wall)
			y += bar
		}
		y += gap
	}
	fmt.Fprintf(&b, "<line x1=\"%.0f\" x2=\"%.0f\" y1=\"44\" y2=\"%d\" stroke=\"#888\" stroke-dasharray=\"3 3\"/>\n", left+unit, left+unit, y)
	x := left
	for _, name := range res.peers {
		fmt.Fprintf(&b, "<rect x=\"%d\" y=\"26\" width=\"10\" height=\"10\" fill=\"%s\"/><text x=\"%d\" y=\"35\">%s</text>\n", x, colours[name], x+14, name)
		x += 90
	}
	return fmt.Sprintf("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"840\" height=\"%d\" font-family=\"sans-serif\" font-size=\"11\">\n"+
		"<style>.n{font-size:9px}</style>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n"+
		"<text x=\"8\" y=\"16\" font-size=\"13\">Wall time of an install; 1 is the best of the other updaters in that row</text>\n%s</svg>\n", y+10, b.String())
}

const (
	beginMark = "<!-- bench-peers: begin; written by make bench-peers -->\n"
	endMark   = "<!-- bench-peers: end -->\n"
)

// splice puts text between the marks; without marks a section is added at the end.
func splice(doc, text string) string {
	before, rest, ok := strings.Cut(doc, beginMark)
	_, after, ok2 := strings.Cut(rest, endMark)
	if !ok || !ok2 {
		if doc == "" {
			doc = "# Performance\n"
		}
		return doc + "\n## Beside other updaters\n\n" + beginMark + text + endMark
	}
	return before + beginMark + text + endMark + after
}

// write tells w, and the two files in dir unless dir is "".
func (res *results) write(w io.Writer, dir string) error {
	text := res.markdown()
	if _, err := io.WriteString(w, text); err != nil || dir == "" {
		return err
	}
	name := filepath.Join(dir, "performance.md")
	old, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return errors.Join(os.WriteFile(name, []byte(splice(string(old), text)), 0o644),
		os.WriteFile(filepath.Join(dir, "performance.svg"), []byte(res.svg()), 0o644))
}
