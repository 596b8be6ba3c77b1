#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes root images of a small Debian before and after three kinds of updates, as ext4, squashfs and erofs, in DIR:
#   old.FS   the suite of this machine as it was released
#   sec.FS   with the security updates of a few libraries
#   app.FS   old with its one Go program rebuilt after a change of a few lines
#   full.FS  with the kernel and all other updates
# From apt's own sources of this machine. Needs root, Debian, Go, 8 GB in DIR; what is there already stays.
# Usage: delta-pairs.sh [GO]
# shellcheck disable=SC2016 # apt and the shell of the hooks expand what is in single quotes
set -eu
umask 022
go=${1:-go}
here=$(cd "$(dirname "$0")" && pwd)
dir=${DIR:-$here/out/pairs}
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
	echo "needs root and apt-get: the images are made of Debian's packages"
	exit 1
fi
export SOURCE_DATE_EPOCH=1750000000 E2FSPROGS_FAKE_TIME=1750000000 LC_ALL=C
uuid=2c0c1ad5-8d5e-4d4c-9a55-5a3f2ac7b0de
seed=7f6f1a47-3b0f-4b0c-8e43-0c0bb7a9f1d1 # of the hashes in directories
security="libssl3 openssl libexpat1 liblzma5"
packages=systemd-sysv,udev,dbus,network-manager,modemmanager,openssh-server,nginx-light,bluez,mosquitto,openssl
packages=$packages,ca-certificates,curl,iproute2,iputils-ping,less,sqlite3,tcpdump,gdbserver,strace,alsa-utils
packages=$packages,python3,python3-requests,python3-serial,python3-numpy,gstreamer1.0-plugins-good,libexpat1,liblzma5
case $(dpkg --print-architecture) in
amd64) packages=$packages,linux-image-cloud-amd64 ;;
*) packages=$packages,linux-image-$(dpkg --print-architecture) ;;
esac
missing=
for p in mmdebstrap e2fsprogs squashfs-tools erofs-utils; do
	dpkg-query -W -f='${Status}' $p 2> /dev/null | grep -q 'ok installed' || missing="$missing $p"
done
if [ -n "$missing" ]; then
	echo "installing$missing"
	apt-get update -qq || true
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null
fi
mkdir -p "$dir"
work=$dir/making
rm -rf "$work"
mkdir "$work"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP

# What apt has of Debian here, as lines for another root.
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
	awk -v s="$suite" '$2 == s || $2 == s "-security" || $2 == s "-updates" {print "deb", $1, $2, $3}' |
	sort -u > "$work/sources.all"
awk -v s="$suite" '$3 == s' "$work/sources.all" > "$work/sources.old"
cat > "$work/pin" << X
Package: *
Pin: release n=$suite-updates
Pin-Priority: 1

Package: *
Pin: release n=$suite-security
Pin-Priority: 1

Package: $security
Pin: release n=$suite-security
Pin-Priority: 900
X

# debian NAME SOURCES [MORE]: a tar of the root
debian() {
	[ ! -s "$dir/$1.tar" ] || return 0
	echo "$1: Debian $suite"
	name=$1 sources=$2
	shift 2
	mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--setup-hook='mkdir -p "$1/etc" && echo "do_initrd = no" > "$1/etc/kernel-img.conf"' "$@" \
		--customize-hook='rm -rf "$1"/boot/initrd* "$1"/var/log/* "$1"/var/cache/*/* "$1"/var/lib/apt/lists/*' \
		--customize-hook='rm -rf "$1"/etc/ssh/ssh_host* "$1"/etc/ssl/private/* "$1"/var/lib/dpkg/*-old' \
		--customize-hook='rm -f "$1"/etc/*- "$1"/etc/apt/preferences.d/pin "$1"/etc/apt/sources.list' \
		--customize-hook=': > "$1/etc/machine-id"; : > "$1/etc/resolv.conf"; echo board > "$1/etc/hostname"' \
		"$suite" "$work/$name.tar" "$work/$sources"
	mv "$work/$name.tar" "$dir/$name.tar"
}
debian old sources.old
debian sec sources.all --setup-hook='mkdir -p "$1/etc/apt/preferences.d"' \
	--setup-hook="upload $work/pin /etc/apt/preferences.d/pin"
debian full sources.all
versions() {
	tar -xOf "$dir/$1.tar" ./var/lib/dpkg/status | awk '/^Package:/ {p = $2} /^Version:/ {print p, $2}' | sort
}
for n in old sec full; do versions $n > "$dir/$n.versions"; done
for n in sec full; do
	echo "$n: $(comm -13 "$dir/old.versions" "$dir/$n.versions" | wc -l) of $(wc -l < "$dir/$n.versions") packages differ"
done
if cmp -s "$dir/old.versions" "$dir/sec.versions"; then
	echo "the sources of this machine have no security updates of $security: no pair can be made"
	exit 1
fi

# The program is Go's compiler, as a large one that every Go has; the change is a function that is called.
if [ ! -s "$dir/app.2" ]; then
	src=$("$go" env GOROOT)/src/cmd/compile/internal/base/print.go
	cp "$src" "$work/changed.go"
	cat >> "$work/changed.go" << 'X'

var deltaSeen = map[string]int{}

func init() {
	for i, a := range os.Args {
		deltaSeen[fmt.Sprintf("%q", a)] = i
	}
}
X
	echo "{\"Replace\": {\"$src\": \"$work/changed.go\"}}" > "$work/overlay.json"
	CGO_ENABLED=0 "$go" build -trimpath -ldflags='-s -w -buildid=' -o "$dir/app.1" cmd/compile
	CGO_ENABLED=0 "$go" build -overlay "$work/overlay.json" -trimpath -ldflags='-s -w -buildid=' \
		-o "$work/app.2" cmd/compile
	mv "$work/app.2" "$dir/app.2"
fi

# images NAME TAR APP: the three of one root
images() {
	[ ! -s "$dir/$1.erofs" ] || return 0
	echo "$1: images"
	mkdir "$work/root"
	tar -xf "$dir/$2.tar" -C "$work/root" --numeric-owner --exclude='./dev/*'
	mkdir -p "$work/root/opt/app"
	cp "$dir/$3" "$work/root/opt/app/app"
	find "$work/root" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
	truncate -s "${size}M" "$work/ext4"
	mke2fs -q -F -t ext4 -d "$work/root" -U "$uuid" -E "hash_seed=$seed" -m 0 -L root "$work/ext4"
	mksquashfs "$work/root" "$work/squashfs" -quiet -no-progress -noappend -comp zstd -b 128K > /dev/null
	mkfs.erofs -zlz4 "-T$SOURCE_DATE_EPOCH" "-U$uuid" "$work/erofs" "$work/root" > /dev/null 2>&1
	for fs in ext4 squashfs erofs; do mv "$work/$fs" "$dir/$1.$fs"; done
	rm -rf "$work/root"
}
# The slot is as large as the largest root, a sixth, and what makes it a multiple of 32 MiB.
largest=$(($(stat -c %s "$dir/full.tar") / 1048576))
size=$((largest * 7 / 6 / 32 * 32 + 32))
images old old app.1
images sec sec app.1
images app old app.2
images full full app.1
ls -l "$dir"/*.ext4 "$dir"/*.squashfs "$dir"/*.erofs
