#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes the release of the last commit twice, in clones of different places, with another umask,
# time zone and language, and with an empty build cache the second time. All files must be the same
# to the bit, and so must be the program that somebody builds from the tarball.
# Usage: reproducible.sh GO
set -eu
go=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM HUP
mkdir "$dir/another place"
git clone -q . "$dir/one"
git clone -q . "$dir/another place/two"
(cd "$dir/one" && sh rig/release.sh "$go" "$dir/one/out/release")
(cd "$dir/another place/two" && umask 077 && export TZ=Asia/Kolkata LC_ALL=C.UTF-8 GOCACHE="$dir/cache" &&
	sh rig/release.sh "$go" "../out" > /dev/null)
diff -r "$dir/one/out/release" "$dir/another place/out"
git init -q "$dir/foreign"
tar -x -C "$dir/foreign" -f "$(echo "$dir/one/out/release"/*.tar.gz)"
cd "$dir/foreign"/*
GOPROXY=off make -s GO="$go" mendlet
cmp mendlet "$dir/one/out/release/mendlet-$(./mendlet --version)-$("$go" env GOOS)-$("$go" env GOARCH)"
echo "two releases, and a build from the tarball in somebody else's repository, are the same to the bit"
