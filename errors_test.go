// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestUniqueKeys(t *testing.T) {
	for _, c := range []struct {
		text string
		fold int
		ok   bool
	}{
		{`1`, 9, true}, {`[]`, 9, true}, {`{}`, 9, true}, {`{"a":1,"b":{"a":[1,{"a":2}]},"c":"a"}`, 9, true},
		{`{"a":"a","b":["a","a"],"c":{"d":"a"},"e":[{"a":1},{"a":2}]}`, 9, true},
		{`{"a":1,"a":1}`, 0, false}, {`{"a":{},"b":[[]],"a":{}}`, 0, false}, {`{"a":{"b":{},"b":[]}}`, 0, false},
		{`[1,{"a":[{"x":1,"y":{},"x":null}]}]`, 0, false}, {`{"a":1,"\u0061":2}`, 0, false},
		{`{"a":1,"A":2}`, 0, true}, {`{"a":1,"A":2}`, 1, false},
		{`{"a":{"b":1,"B":2}}`, 1, true}, {`{"a":{"b":1,"B":2}}`, 2, false},
		{`{"source":1,"\u017fource":2}`, 1, false}, // which encoding/json takes for an s
		{strings.Repeat(`{"a":`, 5000) + `1` + strings.Repeat(`}`, 5000), 9, true},
	} {
		if !json.Valid([]byte(c.text)) {
			t.Fatalf("%.80q is no JSON", c.text)
		}
		if err := uniqueKeys([]byte(c.text), c.fold); (err == nil) != c.ok {
			t.Errorf("%.80q, folded to depth %d: got %v", c.text, c.fold, err)
		}
	}
}
