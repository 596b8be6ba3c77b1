// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// fleet is a simulation of devices that cron starts at :00 and of what their server sees,
// second by second. Everything in it is computed, so it gives the same every time. Run it
// with -v for the table that the documentation has.
type fleet struct {
	devices int
	splay   time.Duration // --splay of every device
	every   time.Duration // period of cron
	backoff bool          // the journal's wait after failures is longer than the period
	// The server is down in [down, up) after the beginning, and can take capacity requests a
	// second otherwise; 0: any number.
	down, up time.Duration
}

// skew is how far a device is from the exact second: its clock is off by up to 2 s, and
// starting takes up to 1 s.
func skew(id string) time.Duration { return splay("skew "+id, 3*time.Second) }

// requestsPerPoll is what a poll that finds nothing costs; see TestRunIdleCost.
const requestsPerPoll = 1

// run returns requests per second over hours. A failed attempt is one request.
func (f *fleet) run(hours int) []int {
	seconds := make([]int, hours*3600)
	end := time.Duration(hours) * time.Hour
	for i := range f.devices {
		id := fmt.Sprintf(`{"mac":"02:00:%02x:%02x:%02x:%02x"}`, i>>24&255, i>>16&255, i>>8&255, i&255)
		offset := splay(id, f.splay) + skew(id)
		failures := 0
		for at := time.Duration(0); ; {
			hit := at + offset
			if hit >= end {
				break
			}
			isDown := hit >= f.down && hit < f.up
			if isDown {
				seconds[hit/time.Second]++
				failures++
			} else {
				seconds[hit/time.Second] += requestsPerPoll
				if failures > 1 {
					seconds[hit/time.Second]++ // to log in: see session.keep
				}
				failures = 0
			}
			at += f.next(failures)
		}
	}
	return seconds
}

// next is how long until cron's run that asks the server again.
func (f *fleet) next(failures int) time.Duration {
	if !f.backoff || failures == 0 {
		return f.every
	}
	return backoff(failures, 5*time.Minute)
}

func TestFleet(t *testing.T) {
	t.Parallel()
	devices := 100_000
	if testing.Short() {
		devices = 10_000
	}
	peaks := map[string]int{}
	for _, c := range []struct {
		name string
		f    fleet
	}{
		{"hourly at :00", fleet{every: time.Hour}},
		{"hourly at :00, --splay 10m", fleet{every: time.Hour, splay: 10 * time.Minute}},
		{"hourly at :00, --splay 1h", fleet{every: time.Hour, splay: time.Hour}},
		{"hourly, outage of 90 min", fleet{every: time.Hour, down: 90 * time.Minute, up: 180 * time.Minute}},
		{"hourly, outage, --splay 1h", fleet{every: time.Hour, splay: time.Hour, down: 90 * time.Minute,
			up: 180 * time.Minute}},
		{"every minute with back-off, outage", fleet{every: time.Minute, backoff: true, down: 90 * time.Minute,
			up: 180 * time.Minute}},
		{"every minute with back-off, outage, --splay 1m",
			fleet{every: time.Minute, backoff: true, splay: time.Minute, down: 90 * time.Minute, up: 180 * time.Minute}},
	} {
		c.f.devices = devices
		load := c.f.run(6)
		peaks[c.name] = slices.Max(load)
		total := 0
		for _, n := range load {
			total += n
		}
		after := 0
		if c.f.up > 0 {
			after = slices.Max(load[c.f.up/time.Second:])
		}
		t.Logf("%-48s peak %6d requests/s, after the outage %6d, mean %5.1f", c.name, peaks[c.name], after,
			float64(total)/float64(len(load)))
	}
	if p := peaks["hourly at :00"]; p < devices*requestsPerPoll/4 {
		t.Errorf("without splay: got peak %d, which is too good to be true", p)
	}
	// Even spread over an hour is devices/3600 requests a second; the rest is chance.
	if p, want := peaks["hourly at :00, --splay 1h"], devices*requestsPerPoll/3600; p > 3*want+20 {
		t.Errorf("with splay: got peak %d, want about %d", p, want)
	}
	if p, q := peaks["hourly at :00, --splay 1h"], peaks["hourly, outage, --splay 1h"]; q > 2*p {
		t.Errorf("an outage makes the peak %d, from %d", q, p)
	}
}
