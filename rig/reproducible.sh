#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the program in two directories of different names and compares.
set -eu
go=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for d in one another-place; do
	mkdir -p "$dir/$d"
	cp -r ./*.go go.mod go.sum Makefile VERSION "$dir/$d"
	make -s -C "$dir/$d" GO="$go" VERSION=reproducible SOURCE_DATE_EPOCH=1 mendlet > /dev/null
done
cmp "$dir/one/mendlet" "$dir/another-place/mendlet"
echo "two builds in different directories are the same to the bit: $(sha256sum < "$dir/one/mendlet")"
