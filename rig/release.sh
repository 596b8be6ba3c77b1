#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes what a release consists of, from the commit that is checked out: the source with the
# packages that it depends on, the binaries of all targets, built from that without a network, and
# the SHA-256 of each. The same commit gives the same bytes.
# Usage: release.sh GO DIR      TARGETS in the environment makes it fewer targets
set -eu
umask 022
export LC_ALL=C TZ=UTC
go=$1 out=$2
fail() {
	echo "release: $*" >&2
	exit 1
}
unset VERSION SOURCE_DATE_EPOCH MAKEFLAGS MFLAGS MAKELEVEL
version=$(sh rig/version.sh)
case $version in
*.dirty) fail "files were changed since the commit; commit them first" ;;
*+*) # not tagged, but as another version it must not be either
	[ -e .git ] || fail "want a git repository"
	tags=$(git tag --points-at HEAD 'v*')
	[ -z "$tags" ] || fail "VERSION is $(cat VERSION), and the commit has the tag $tags"
	;;
*) grep -q "^## $version\>" CHANGELOG.md || fail "CHANGELOG.md has no section $version" ;;
esac
name=mendlet-$version
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM HUP

mkdir "$dir/source" "$dir/build" "$dir/release"
git archive --prefix="$name/" HEAD | tar -x -C "$dir/source"
echo "$version" > "$dir/source/$name/VERSION"
(cd "$dir/source/$name" && "$go" mod vendor)
tar --sort=name --format=ustar --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
	--mtime="@$(git log -1 --format=%ct)" -C "$dir/source" -c "$name" | gzip -9n > "$dir/release/$name.tar.gz"

tar -x -C "$dir/build" -f "$dir/release/$name.tar.gz"
GOPROXY=off make -s -C "$dir/build/$name" GO="$go" ${TARGETS:+TARGETS="$TARGETS"} cross nonet
for f in "$dir/build/$name"/out/*; do
	rest=${f##*/mendlet-}
	case $rest in
	nonet-*) mv "$f" "$dir/release/mendlet-nonet-$version-${rest#nonet-}" ;;
	*) mv "$f" "$dir/release/$name-$rest" ;;
	esac
done
(cd "$dir/release" && sha256sum -- * > SHA256SUMS)
rm -rf "$out"
mkdir -p "$out"
mv "$dir/release"/* "$out"
cat "$out/SHA256SUMS"
