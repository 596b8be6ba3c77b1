// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/xml"
	"io"
	"strings"
	"testing"
)

func TestSpliceKeepsOtherSections(t *testing.T) {
	doc := splice("# Performance\n\n## Size\n\nsmall\n", "old\n") + "\n## Fleet\n\nlarge\n"
	got := splice(doc, "new\n")
	want := "# Performance\n\n## Size\n\nsmall\n\n## Beside other updaters\n\n" + beginMark + "new\n" + endMark + "\n## Fleet\n\nlarge\n"
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := splice(got, "new\n"); got != want {
		t.Errorf("the second time: %q", got)
	}
}

// A ratio is to the best of the others, even where mendlet is faster.
func TestRatios(t *testing.T) {
	r := row{comp: "none"}
	res := &results{runs: 3, peers: []string{"mendlet", "rauc", "mender"}, rows: []row{r, {comp: "xz"}}}
	for i, wall := range []float64{9, 1, 2} { // the median is 2
		res.add("mendlet", r, measured{wall: wall, cpu: 1, rss: 10 << 20, wrote: 512 << 20})
		res.add("rauc", r, measured{wall: float64(4 + i - 1), cpu: 2})
		res.add("mender", r, measured{wall: 8, cpu: 1})
	}
	md := res.markdown()
	for _, want := range []string{"| none, file | mendlet | 0.50 | 1.00 | 10 | 512 |\n", "| rauc | 1.00 | 2.00 |", "| mender | 2.00 | 1.00 |"} {
		if !strings.Contains(md, want) {
			t.Errorf("no %q in %s", want, md)
		}
	}
	d := xml.NewDecoder(strings.NewReader(res.svg()))
	for {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// libubootenv and mendlet both read this one; the sum is zlib's of 1019 bytes.
func TestEnvironment(t *testing.T) {
	e := environment(1024, []string{"a=1", "b=2"})
	if len(e) != 2048 || e[4] != 2 || e[1024+4] != 1 || string(e[5:13]) != "a=1\x00b=2\x00" {
		t.Errorf("got %d bytes, %q", len(e), e[:16])
	}
	if n := partNumber("/dev/loop12"); n != "12" {
		t.Errorf("got %q", n)
	}
}
