#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs each fuzz target for a while. Usage: fuzz.sh GO TIME
# Until 1.27 Go may take the end of that time for a failure of the target, "context deadline
# exceeded" (go.dev/issue/75804); a real one leaves its input, and says so.
set -eu
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for f in $("$1" test -list '^Fuzz' . | grep ^Fuzz); do
	if "$1" test -run '^$' -fuzz "^$f\$" -fuzztime "$2" -fuzzminimizetime 1x . > "$log" 2>&1; then
		echo "ok $f: $(grep -o 'execs: [0-9]*' "$log" | tail -n 1)"
	elif grep -q '^ *context deadline exceeded$' "$log" && ! grep -q 'Failing input\|panic\|_test.go' "$log"; then
		echo "ok $f: $(grep -o 'execs: [0-9]*' "$log" | tail -n 1), until its time was up"
	else
		cat "$log"
		exit 1
	fi
done
