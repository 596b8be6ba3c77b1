// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
)

func indexVerbs() []verb {
	return []verb{{"index", "ARTIFACT OLD…", "what devices with an old artifact or image fetch of a delta", 2 + orMore,
		indexFlags, func(ctx context.Context, a *app, w []string) error { return indexer{a}.index(ctx, w[0], w[1:]) }}}
}

func indexFlags(fs *flag.FlagSet, o *options) {
	fs.BoolVar(&o.json, "json", false, "print JSON")
	fs.Int64Var(&o.maxBytes, "max-bytes", 0, "fail if one of them would fetch more than `N` bytes")
	fs.Float64Var(&o.maxPercent, "max-percent", 0,
		"fail if one of them would fetch more than `N` per cent of the artifact")
}

type indexer struct{ *app }

// indexReport is what index prints as JSON; its names are an interface.
type indexReport struct {
	Name  string      `json:"artifact_name"`
	Size  int64       `json:"size"` // bytes of all that a device reads of it
	Delta *shownDelta `json:"delta"`
	Old   []indexCost `json:"old"`
}

// indexCost is what a device fetches that has an old image.
type indexCost struct {
	File     string  `json:"file"`
	Bytes    int64   `json:"bytes"` // header and index included
	Percent  float64 `json:"percent"`
	Requests int     `json:"requests"`
	Whole    bool    `json:"whole"`   // so much is missing that it fetches all
	Missing  int64   `json:"missing"` // bytes of the image
	Zeros    int64   `json:"zeros"`   // bytes of the image that are zero
}

// index plans an update to artifact from each old version as a device would.
func (a indexer) index(ctx context.Context, artifact string, old []string) error {
	a.src = a.source(artifact)
	art, err := a.fetch(ctx)
	if err != nil {
		return err
	}
	x, info, err := art.indexed()
	if err != nil {
		return fmt.Errorf("%q: %w", artifact, err)
	}
	a.src.close()
	r := &indexReport{Name: art.Name, Size: art.dataEnd, Delta: newShownDelta(info, x)}
	var large error
	for _, name := range old {
		c, err := a.costFrom(ctx, x, name)
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		c.Bytes += art.dataAt
		if c.Whole {
			c.Bytes = r.Size
		}
		c.Percent = float64(c.Bytes*1000/r.Size) / 10
		r.Old = append(r.Old, *c)
		if m := a.o.maxBytes; m > 0 && c.Bytes > m {
			large = errors.Join(large, fmt.Errorf("from %q: got %d bytes, want at most %d", name, c.Bytes, m))
		}
		if m := a.o.maxPercent; m > 0 && float64(c.Bytes)*100 > m*float64(r.Size) {
			large = errors.Join(large, fmt.Errorf("from %q: got %.1f per cent, want at most %g", name, c.Percent, m))
		}
	}
	if a.o.json {
		err = printJSON(a.out, r)
	} else {
		err = r.print(a.out)
	}
	return errors.Join(err, large)
}

func (r *indexReport) print(w io.Writer) error {
	printf(w, "%s: %s, %s\n", r.Name, mega(r.Size), r.Delta)
	for i := range r.Old {
		c := &r.Old[i]
		what := fmt.Sprintf("in %d requests", c.Requests)
		if c.Whole {
			what = "the whole"
		}
		printf(w, "from %q: %d bytes, %.1f %%, %s\n", c.File, c.Bytes, c.Percent, what)
	}
	return nil
}

// costFrom looks through an old version.
func (a indexer) costFrom(ctx context.Context, x *deltaIndex, name string) (*indexCost, error) {
	src := a.source(name)
	r, err := src.from(ctx, 0)
	if err != nil {
		return nil, err
	}
	defer src.close()
	image, err := a.imageIn(r)
	if err != nil {
		return nil, err
	}
	p := newDeltaPlan(x)
	scan := newDeltaScan(p, fromRunning)
	if _, err := io.CopyBuffer(scan, struct{ io.Reader }{image}, make([]byte, 512<<10)); err != nil {
		return nil, err
	}
	scan.end()
	p.settle(0)
	c, whole := p.decide(gapUnknown)
	cost := &indexCost{File: name, Bytes: c.Fetch, Requests: c.Requests + 1, Whole: whole, Missing: c.Missing,
		Zeros: c.Zeros}
	if whole {
		cost.Requests = 1
	}
	return cost, nil
}

// imageIn gives the image of an artifact, or r itself if it is none.
func (a indexer) imageIn(r io.Reader) (io.Reader, error) {
	in := bufio.NewReaderSize(r, 512)
	head, err := in.Peek(512)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if !beginsArtifact(head) {
		for kind, magic := range compressionMagic {
			if magic != "" && bytes.HasPrefix(head, []byte(magic)) {
				return nil, fmt.Errorf("is compressed with %s, want an artifact or an image", kind)
			}
		}
		return in, nil
	}
	art, err := a.openArtifact(in)
	if err != nil {
		return nil, err
	}
	return art.image()
}
