#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Tries what is in packaging/ and support/, as far as that goes without the systems that it is for: shells and
# shellcheck read each script, and "make install" must put for each init what it should.
# What cannot be tried for want of a program is said.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM HUP
fail() {
	echo "packaging: $*" >&2
	exit 1
}
have() {
	command -v "$1" > /dev/null || {
		echo "skipped, no $1: $2"
		return 1
	}
}

# Every script, by its first line.
scripts=$(grep -rlE '^#!.*(sh|openrc-run|rc.common)\b' packaging support modules debian | sort)
scripts="$scripts packaging/alpine/APKBUILD"
[ "$(echo "$scripts" | wc -w)" -ge 21 ] || fail "found only these scripts: $scripts"
for shell in dash 'busybox sh'; do
	have "${shell%% *}" "scripts are not read by it" || continue
	for f in $scripts; do
		head -n 1 "$f" | grep -q bash || $shell -n "$f" || fail "$shell does not read $f"
	done
done
if have shellcheck "scripts are not checked"; then
	for f in $scripts; do
		kind=sh
		! head -n 1 "$f" | grep -q bash || kind=bash
		# Variables that openrc-run and rc.common use, and files that are not here.
		shellcheck -s "$kind" -e SC2034,SC1090,SC1091 "$f" || fail "shellcheck does not like $f"
	done
fi

# hook WORDS: what the hook of the initramfs makes of this command line, in a system of its own as dracut's is. "none"
# if mendlet is not started.
hook() {
	echo "quiet $1" > "$dir/cmdline"
	rm -f "$dir/args"
	unshare -r -m sh -c '
		mount --bind "$0/cmdline" /proc/cmdline
		mount --bind /dev/null /dev/kmsg
		for at in /run /var/lib /scripts; do [ ! -d $at ] || mount -t tmpfs tmpfs $at; done
		PATH=$0:$PATH
		. packaging/initramfs-tools/mendlet-connect
		read -r pid 2> /dev/null < /run/mendlet/connect.pid || exit 0
		while kill -0 "$pid" 2> /dev/null; do sleep 0.1; done
		! grep -q " /run/mendlet/files tmpfs " /proc/mounts || echo "in memory" >> "$0/args"
	' "$dir" 2> "$dir/said"
	[ -e "$dir/args" ] || echo none > "$dir/args"
}
printf '#!/bin/sh\necho "$*" > "%s/args"\n' "$dir" > "$dir/mendlet"
chmod 755 "$dir/mendlet"
more='--retry --log kmsg'
if unshare -r -m true 2> /dev/null; then
	while read -r words; do
		read -r want
		hook "$words"
		got=$(tr '\n' ' ' < "$dir/args")
		[ "$got" = "$want " ] || fail "the hook makes of \"$words\": \"$got\", want \"$want\": $(cat "$dir/said")"
	done <<- X
		mendlet.data=/dev/null
		none
		mendlet.connect=
		none
		mendlet.connect=terminal
		connect --terminal $more
		xmendlet.connect=terminal
		none
		mendlet.connect=files,terminal
		connect --terminal --files /run/mendlet/files $more in memory
		mendlet.connect=terminal,files:/run/*/etc:x
		connect --terminal --files /run/*/etc:x $more
		mendlet.connect=files:etc
		none
		mendlet.connect=terminal,*
		none
		mendlet.connect=terminal mendlet.data=/dev/null
		connect --terminal $more
	X
	for word in fils '*'; do
		hook "mendlet.connect=terminal,$word"
		grep -qF "got \"$word\", want terminal" "$dir/said" || fail "the hook says of \"$word\": $(cat "$dir/said")"
	done
	hook "mendlet.connect=terminal mendlet.data=/dev/null"
	grep -q 'cannot mount "/dev/null"' "$dir/said" || fail "the hook says of no data: $(cat "$dir/said")"
else
	echo "skipped, no user namespaces: the hook of the initramfs is not run"
fi

version=$(cat VERSION)
head -n 1 debian/changelog | grep -qF "mendlet (${version%%+*}) " || fail "debian/changelog is not of version $version"

# What is installed for each init, and that a script of the device's own that says who it is stays.
base='usr/sbin/mendlet usr/share/man/man8/mendlet.8 usr/share/man/man5/mender.conf.5
usr/share/doc/mendlet/examples/mender.conf usr/share/doc/mendlet/examples/crontab
usr/share/doc/mendlet/examples/stick/60-mendlet-stick.rules usr/share/doc/mendlet/examples/stick/mdev.conf
usr/share/doc/mendlet/examples/stick/mendlet-stick
usr/share/mender/identity/mender-device-identity'
for f in support/inventory/* modules/*; do
	case $f in
	modules/*) base="$base usr/share/mender/modules/v3/${f#modules/}" ;;
	*) base="$base usr/share/mender/inventory/${f##*/}" ;;
	esac
done
names='usr/bin/mender usr/bin/mender-update usr/bin/mender-auth usr/bin/mender-setup usr/bin/mender-snapshot'
units=usr/lib/systemd/system
bus=usr/share/dbus-1
for f in packaging/io.mender.*.conf packaging/*/io.mender.*.conf; do
	[ ! -e "$f" ] || names="$names $bus/system.d/${f##*/}"
done
for f in packaging/io.mender.*.service packaging/*/io.mender.*.service; do
	[ ! -e "$f" ] || names="$names $bus/system-services/${f##*/}"
done
for init in none systemd openrc procd sysv; do
	want="$base $names"
	case $init in
	none) ;;
	systemd) want="$want $units/mendlet.service $units/mendlet.timer $units/mender-updated.service
			$units/mender-authd.service" ;;
	*) want="$want etc/init.d/mendlet" ;;
	esac
	make -s -o mendlet INIT=$init DESTDIR="$dir/$init" install install-modules install-mender
	echo "$want" | tr -s ' \t\n' '\n' | sort > "$dir/want"
	(cd "$dir/$init" && find . ! -type d | sed 's|^\./||' | sort) > "$dir/got"
	diff "$dir/want" "$dir/got" || fail "INIT=$init does not install that"
	(cd "$dir/$init" && find . -type d -empty) > "$dir/got"
	echo ./etc/mendlet/checks.d | diff - "$dir/got" || fail "INIT=$init does not make that directory, or others"
	case $init in
	systemd) file=$units/mendlet-connect.service ;;
	openrc | procd) file=etc/init.d/mendlet-connect ;;
	*) file='' ;;
	esac
	[ -z "$file" ] || make -s INIT=$init DESTDIR="$dir/connect" install-connect
	[ -z "$file" ] || [ -e "$dir/connect/$file" ] || fail "INIT=$init does not install $file"
	[ "$(readlink "$dir/$init/usr/bin/mender-update")" = /usr/sbin/mendlet ] || fail "mender-update is no link to it"
done
! make -s -o mendlet INIT=upstart DESTDIR="$dir/upstart" install 2> /dev/null || fail "INIT=upstart was taken"
echo 'echo serial=7' > "$dir/none/usr/share/mender/identity/mender-device-identity"
make -s -o mendlet DESTDIR="$dir/none" install | grep -q 'is another and stays' || fail "nothing said of the identity"
grep -q serial=7 "$dir/none/usr/share/mender/identity/mender-device-identity" || fail "the identity was replaced"
if have systemd-analyze "units are not checked"; then
	systemd-analyze verify --man=no packaging/*.service packaging/*.timer 2> "$dir/verify" || true
	! grep -v ' is not executable: No such file' "$dir/verify" || fail "systemd does not like a unit"
fi
echo "packaging: scripts are read by the shells, and make install does as it should"
