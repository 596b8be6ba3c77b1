#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs one 512 MiB image with mendlet and with Debian's mender-client, rauc and swupdate, in
# turns, and writes doc/performance.md and .svg. Needs root, Debian 12, about 6 GB in DIR.
#   RUNS=5            runs of each
#   ROWS='^xz, file'  only rows that match (payload, file or HTTP, same content); then, as with PEERS,
#   PEERS=rauc        only updaters that match; and nothing is written to doc/
#   DIR=rig/out/bench where all is made; it stays, for the next time
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=${DIR:-$here/out/bench}
runs=${RUNS:-5} rows=${ROWS:-.} peers=${PEERS:-.}
if [ "$(id -u)" != 0 ]; then
	echo "needs root: loop devices and a mount namespace"
	exit 1
fi

missing=
for p in mender-client mender-artifact libubootenv-tool rauc swupdate dbus squashfs-tools e2fsprogs openssl xz-utils zstd util-linux mount; do
	dpkg-query -W -f='${Status}' $p 2> /dev/null | grep -q 'ok installed' || missing="$missing $p"
done
if [ -n "$missing" ]; then
	echo "installing$missing"
	apt-get update -qq || true
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null ||
		echo "not all could be installed: what is missing is left out"
fi

mkdir -p "$dir"
(cd "$here/bench" && go vet . && go test . > /dev/null && CGO_ENABLED=0 go build -trimpath -o "$dir/driver" .)
cp "$here/../mendlet" "$dir/mendlet-binary"

# About 350 MiB of this machine's own files; the rest of the image is zeros.
if [ ! -e "$dir/image.ext4" ]; then
	echo "making the image"
	files=$(mktemp -d -p "$dir")
	(cd / && find usr/bin usr/lib usr/share -xdev -type f -size -20000k | LC_ALL=C sort | tr '\n' '\0' |
		xargs -0 stat -c '%s %n' | awk '{n += $1; if (n > 350 * 1048576) exit; sub(/^[0-9]+ /, ""); print}' |
		tar -cf - --no-recursion -T -) | tar -xf - -C "$files"
	rm -f "$dir/image.new"
	truncate -s 512M "$dir/image.new"
	mke2fs -q -F -t ext4 -d "$files" "$dir/image.new"
	rm -rf "$files"
	mv "$dir/image.new" "$dir/image.ext4"
fi

a='' b=''
cleanup() {
	for l in $a $b; do losetup -d "$l" || true; done
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP
truncate -s 544M "$dir/slotA" "$dir/slotB"
a=$(losetup -f --show "$dir/slotA")
b=$(losetup -f --show "$dir/slotB")

doc=$here/../doc
[ "$rows$peers" = .. ] || doc=
echo "load: $(cut -d' ' -f1-3 /proc/loadavg) on $(nproc) cores"
unshare -m --propagation private "$dir/driver" -dir "$dir" -image "$dir/image.ext4" -a "$a" -b "$b" \
	-mendlet "$dir/mendlet-binary" -runs "$runs" -rows "$rows" -peers "$peers" -doc "$doc"
