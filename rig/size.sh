#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Sizes of the binaries in a directory, raw and compressed, against the budget.
set -eu
dir=$1
fail=0
budget() { # NAME RAW [COMPRESSED], in bytes
	raw=$(stat -c %s "$dir/$1")
	small=$(xz -9 --check=crc32 -c "$dir/$1" | wc -c)
	printf '%-34s %9d raw %9d xz -9\n' "$1" "$raw" "$small"
	if [ "$raw" -gt "$2" ] || [ "$small" -gt "${3:-999999999}" ]; then
		echo "$1 is over its budget of $2 ${3:-} bytes"
		fail=1
	fi
}
# 2 % above what was reached; doc/performance.md has the goals and what is in the way.
budget mendlet-linux-amd64 7260000
budget mendlet-linux-arm-6 7090000 2085000
budget mendlet-linux-arm-7 7090000 2085000
budget mendlet-linux-arm64 6690000
budget mendlet-linux-mipsle-softfloat 8030000
budget mendlet-linux-riscv64 6360000
budget mendlet-nonet-linux-amd64 4670000
budget mendlet-nonet-linux-arm-6 4680000
budget mendlet-nonet-linux-arm-7 4680000
budget mendlet-nonet-linux-arm64 4350000
budget mendlet-nonet-linux-mipsle-softfloat 5290000
budget mendlet-nonet-linux-riscv64 4150000
exit $fail
