// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"fmt"
	"math/rand"
	"testing"
)

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
