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
budget mendlet-linux-amd64 6815744
budget mendlet-linux-arm-6 6710886 1992294
budget mendlet-linux-arm-7 6710886 1992294
budget mendlet-linux-arm64 6815744
budget mendlet-linux-mipsle-softfloat 7864320
budget mendlet-linux-riscv64 6815744
exit $fail
