#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The version of the source in this directory, as "0.1.0" if its commit has the tag v0.1.0, else as
# "0.1.0+d8f7ea9", with ".dirty" behind it if files were changed since.
# Without a .git of its own, as in a tarball, the file VERSION says it all, whose tree ever this lies in.
set -eu
version=$(cat VERSION)
if [ -e .git ]; then
	hash=$(git rev-parse --short=7 HEAD) || hash=unknown
	dirty=$(git status --porcelain --untracked-files=no)
	if [ -n "$dirty" ]; then
		version=$version+$hash.dirty
	elif ! git tag --points-at HEAD | grep -qx "v$version"; then
		version=$version+$hash
	fi
fi
echo "$version"
