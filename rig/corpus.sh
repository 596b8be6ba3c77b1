#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Puts the files that XZ Utils and zstd test their own decoders with into a directory, from the source packages of the
# Debian release that this machine has. The tests that want them say so when they are not there. Usage: corpus.sh DIR
set -eu
dir=$1
[ ! -e "$dir/complete" ] || exit 0
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/parts" "$tmp/lists/partial" "$tmp/cache/archives/partial" "$dir/xz" "$dir/zstd"
[ ! -e /etc/apt/sources.list ] || sed -n 's/^deb /deb-src /p' /etc/apt/sources.list > "$tmp/parts/debian.list"
[ ! -e /etc/apt/sources.list.d/debian.sources ] ||
	sed 's/^Types:.*/Types: deb-src/' /etc/apt/sources.list.d/debian.sources > "$tmp/parts/debian.sources"
apt() {
	apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$tmp/parts" \
		-o Dir::State::lists="$tmp/lists" -o Dir::Cache="$tmp/cache" "$@"
}
apt update
(cd "$tmp" && apt source --download-only --tar-only xz-utils libzstd)
tar -xf "$tmp"/xz-utils_*.orig.tar.xz -C "$tmp" --wildcards '*/tests/files/*'
tar -xf "$tmp"/libzstd_*.orig.tar.* -C "$tmp" --wildcards '*/tests/golden-*'
cp "$tmp"/xz*/tests/files/*.xz "$dir/xz/"
cp -r "$tmp"/zstd*/tests/golden-* "$dir/zstd/"
touch "$dir/complete"
