#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Sizes of the binaries in a directory, raw and compressed, against their budgets.
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
# The goals are 2,000,000 bytes compressed for arm-6 and arm-7, which is missed, and, without network, 1,400,000, which
# is the budget. All others keep what was reached (doc/performance.md says which goals that misses).
budget mendlet-linux-amd64 7496500 2404500
budget mendlet-linux-arm-6 7414000 2109000
budget mendlet-linux-arm-7 7414000 2109000
budget mendlet-linux-arm64 6950500 2046000
budget mendlet-linux-mipsle-softfloat 8406500 1944500
budget mendlet-linux-riscv64 6553000 2201500
budget mendlet-nonet-linux-amd64 4200000 1431500
budget mendlet-nonet-linux-arm-6 4369000 1400000
budget mendlet-nonet-linux-arm-7 4369000 1400000
budget mendlet-nonet-linux-arm64 4038000 1235500
budget mendlet-nonet-linux-mipsle-softfloat 4965000 1190500
budget mendlet-nonet-linux-riscv64 3773500 1328000
with=$(xz -9 --check=crc32 -c "$dir/mendlet-linux-arm-6" | wc -c)
part() { # TAG WHAT BUDGET: what a tag leaves out, in bytes of the compressed armv6 file
	without=$(xz -9 --check=crc32 -c "$dir/mendlet-$1-linux-arm-6" | wc -c)
	echo "$2 takes $((with - without)) bytes of mendlet-linux-arm-6, xz -9"
	[ $((with - without)) -le "$3" ] || {
		echo "which is over its budget of $3 bytes"
		fail=1
	}
}
part nodbus D-Bus 20480
# The goal is 65536. With nothing but another version in it the same code takes 64740 to 65476: half a KiB is let be.
part noconnect troubleshooting 66048
exit $fail
