#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the Debian packages of what is checked out into out/debian, offline but for the module that a tarball of a
# release would have in vendor/, looks at them with lintian, and, as root, tries them in a small Debian of its own:
# beside and over Debian's mender-client, upgraded, removed, purged, and back. What the device is must outlive it all.
# Usage: debian.sh GO
set -eu
umask 022
go=$1
unset VERSION SOURCE_DATE_EPOCH MAKEFLAGS MFLAGS MAKELEVEL TAGS GOFLAGS
for program in dpkg-buildpackage dh git; do
	command -v "$program" > /dev/null || {
		echo "skipped: no $program"
		exit 0
	}
done
fail() {
	echo "debian: $*" >&2
	exit 1
}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM HUP

# build VERSION: the packages of that version, in $dir/VERSION
build() {
	mkdir -p "$dir/$1/source"
	git ls-files -z | tar -c --null -T - | tar -x -C "$dir/$1/source"
	(
		cd "$dir/$1/source"
		"$go" mod vendor
		sed -i "1s/(.*)/($1)/" debian/changelog
		PATH=$(dirname "$(command -v "$go")"):$PATH
		export PATH DEB_BUILD_OPTIONS=nocheck
		# -d: Go need not be of a Debian package.
		dpkg-buildpackage -us -uc -b -d > ../log 2>&1 || {
			tail -n 40 ../log
			fail "dpkg-buildpackage failed"
		}
	)
	rm -r "$dir/$1/source"
}
version=$(sh rig/version.sh)
build "$version"
rm -rf out/debian
mkdir -p out/debian
cp "$dir/$version"/*.deb "$dir/$version"/*.changes "$dir/$version"/*.buildinfo out/debian/
echo "built:" out/debian/*.deb
if command -v lintian > /dev/null; then
	lintian --allow-root --fail-on error,warning out/debian/*.changes || fail "lintian"
	echo "lintian: no errors, no warnings"
else
	echo "skipped: no lintian"
fi

base=usr/share/mender
if [ "$(id -u)" != 0 ] || ! command -v debootstrap > /dev/null; then
	echo "skipped: not root or no debootstrap: the packages are not installed anywhere"
	exit 0
fi
mirror=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb [^h]*\(http[^ ]*\).*/\1/p' /etc/apt/sources.list \
	/etc/apt/sources.list.d/* 2> /dev/null | head -n 1)
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
root=$dir/root
timeout 240 debootstrap --variant=minbase --include=mender-client,libubootenv-tool,mount "$suite" "$root" "$mirror" > "$dir/log" 2>&1 || {
	tail -n 5 "$dir/log"
	echo "skipped: debootstrap gave no Debian with mender-client within 240 s; the packages are not installed anywhere"
	exit 0
}
inside() {
	chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"
}
dpkg_in() {
	inside dpkg "$@" > "$dir/log" 2>&1 || {
		cat "$dir/log"
		fail "dpkg $*"
	}
}
# The same packages as another version, for an upgrade.
for deb in out/debian/*.deb; do
	dpkg-deb -R "$deb" "$dir/raw"
	sed -i "s/^Version: .*/Version: $version+next/; s/^Depends: mendlet.*/Depends: mendlet/" "$dir/raw/DEBIAN/control"
	name=$(sed -n 's/^Package: //p' "$dir/raw/DEBIAN/control")
	cp "$deb" "$root/root/$name.deb"
	dpkg-deb -b "$dir/raw" "$root/root/$name-next.deb" > /dev/null
	rm -r "$dir/raw"
done

# The device: state on another partition, keys, an identity and a module of its own, and a store that the client made.
mkdir -p "$root/data/mender" "$root/etc/mender" "$root/$base/identity" "$root/$base/modules/v3"
echo 'device_type=board' > "$root/data/mender/device_type"
echo '{"ServerURL": "https://mender.example"}' > "$root/etc/mender/mender.conf"
echo 'of the person who made the device' > "$root/etc/mender/verify.pem"
echo 'artifact_name=release-1' > "$root/etc/mender/artifact_info"
inside mender bootstrap > "$dir/log" 2>&1 || true # without a server it makes key and store
[ -s "$root/data/mender/mender-agent.pem" ] && [ -s "$root/data/mender/mender-store" ] || {
	cat "$dir/log"
	fail "mender-client made no key and store"
}
printf '#!/bin/sh\necho serial=7\n' > "$root/$base/identity/mender-device-identity"
printf '#!/bin/sh\n' > "$root/$base/modules/v3/tar-app"
# An update that the client has installed and not committed.
printf '#!/bin/sh\necho "$1" >> /data/app.log\n[ "$1" != SupportsRollback ] || echo Yes\n' \
	> "$root/$base/modules/v3/app"
chmod 755 "$root/$base/identity/mender-device-identity" "$root/$base/modules/v3/tar-app" "$root/$base/modules/v3/app"
dpkg-deb -x out/debian/mendlet_*.deb "$dir/raw"
"$dir/raw/usr/sbin/mendlet" pack -T app -n release-2 -c board -f rig/debian.sh -o "$root/root/app.mender"
rm -r "$dir/raw"
inside mender install /root/app.mender > "$dir/log" 2>&1 || {
	cat "$dir/log"
	fail "mender-client did not install"
}
state() {
	(cd "$root" && find data/mender/* etc/mender "$base/identity/mender-device-identity" "$base/modules/v3/tar-app" \
		-type f ! -name mender-store-lock ! -name 'mendlet.*' ! -path 'data/mender/modules/*' -exec sha256sum {} + |
		sort -k 2 && stat -c '%a %n' data/mender/*.pem &&
		readlink var/lib/mender && inside ls /var/lib/mender/mender-agent.pem)
}
# kept WHAT: the device is what it was
state > "$dir/before"
kept() {
	state > "$dir/after"
	diff "$dir/before" "$dir/after" || fail "$1: the device is not what it was"
	inside dpkg --audit | { ! grep .; } || fail "$1: dpkg is not content"
	echo "$1: state, keys, identity and modules are what they were"
}
# of PATH: whose it is
of() {
	if [ -L "$root/$1" ]; then readlink "$root/$1"; else inside dpkg -S "/$1" 2> /dev/null || echo "nobody's"; fi
}
want() {
	got=$(of "$1")
	[ "$got" = "$2" ] || fail "/$1: got $got, want $2"
}

dpkg_in -i /root/mendlet.deb
kept "beside mender-client"
want usr/bin/mender "mender-client: /usr/bin/mender"
want "$base/modules/v3/directory" "mender-client: /$base/modules/v3/directory"
want "$base/modules/v3/docker-compose" "/usr/share/mendlet/modules/v3/docker-compose"
want "$base/modules/v3/tar-app" "nobody's"
inside mendlet version > "$dir/version"
grep -qF "$version" "$dir/version" || fail "got $(cat "$dir/version"), want $version"

dpkg_in -i /root/mendlet-mender.deb
kept "over mender-client"
for name in mender mender-update mender-auth mender-setup mender-snapshot; do
	want usr/bin/$name ../sbin/mendlet
	inside $name --version > /dev/null || fail "$name --version: exit $?"
done
want "$base/modules/v3/directory" "/usr/share/mendlet/modules/v3/directory"
inside mender-update commit > "$dir/log" 2>&1 || {
	cat "$dir/log"
	fail "the client's update was not committed: exit $?"
}
got=$(inside mender-update show-artifact)
[ "$got" = release-2 ] || fail "got artifact $got, want release-2"
grep -qx ArtifactCommit "$root/data/app.log" || fail "the module was not told of the commit"
kept "the client's update committed"
got=$(inside dpkg-query -W -f '${Status}' mender-client)
[ "$got" = "install ok config-files" ] || fail "mender-client is \"$got\""
for unit in mender-client.service multi-user.target.wants/mender-updated.service; do
	want etc/systemd/system/$unit /lib/systemd/system/mender-updated.service
done
dpkg_in --purge mender-client
kept "mender-client purged"
want etc/systemd/system/mender-client.service /lib/systemd/system/mender-updated.service

dpkg_in -i /root/mendlet-next.deb /root/mendlet-mender-next.deb
kept "upgraded"
want "$base/modules/v3/directory" "/usr/share/mendlet/modules/v3/directory"

# What apt makes of "install mender-client".
dpkg_in --remove mendlet-mender
kept "without mendlet-mender"
client=$(cd "$root/var/cache/apt/archives" && ls mender-client_*.deb)
dpkg_in -i "/var/cache/apt/archives/$client"
kept "back to mender-client"
want usr/bin/mender "mender-client: /usr/bin/mender"
want "$base/modules/v3/directory" "mender-client: /$base/modules/v3/directory"
dpkg_in -i /root/mendlet-mender.deb
kept "and over it again"

dpkg_in --remove mendlet-mender mendlet
kept "removed"
dpkg_in --purge mendlet-mender mendlet
kept "purged"
dpkg_in --purge mender-client
left=$(cd "$root" && find "$base" usr/share/mendlet usr/sbin/mendlet usr/bin/mender* etc/systemd \
	\( -type l -o -type f \) ! -path "$base/modules/v3/*app" ! -path "$base/identity/*" 2> /dev/null |
	grep -i mend) || true
[ -z "$left" ] || fail "left behind: $left"

# A device that never had Mender's client. Where a check would be, one stays.
rm -rf "$root/var/lib/mender" "$root/data/mender" "$root/$base"
checks=$root/etc/mendlet/checks.d
[ ! -e "$checks" ] || fail "left behind: $checks"
dpkg_in -i /root/mendlet.deb /root/mendlet-mender.deb
[ "$(stat -c '%F %a %u' "$checks")" = "directory 755 0" ] || fail "got $(stat "$checks")"
printf '#!/bin/sh\necho up\n' > "$checks/door"
chmod 755 "$checks/door"
got=$(inside mendlet monitor) || fail "the checks are not run: exit $?"
[ "$got" = 'door: OK: up' ] || fail "got \"$got\" of the check"
want "$base/identity/mender-device-identity" /usr/share/mendlet/identity/mender-device-identity
[ "$(stat -c '%F %a' "$root/var/lib/mender")" = "directory 700" ] || fail "got $(stat "$root/var/lib/mender")"
echo key > "$root/var/lib/mender/mender-agent.pem"
dpkg_in --purge mendlet-mender mendlet
[ -s "$root/var/lib/mender/mender-agent.pem" ] || fail "the key was removed with the package"
[ -s "$checks/door" ] || fail "the check was removed with the package"
[ ! -e "$root/$base" ] || fail "left behind: $(ls -R "$root/$base")"
rm -r "$root/etc/mendlet"
echo "new device, purged: the key and a check are there, and nothing else"

. rig/debian-pending.sh
pending
