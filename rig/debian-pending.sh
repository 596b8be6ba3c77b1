# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh disable=SC2154
# Read by debian.sh, whose root, dir, go and functions it uses: Debian's mender-client is in the middle of an update of
# the whole root, by hand or in a deployment, when the packages take its place. The device has two slots on loop
# devices, and boots as what is in the boot environment says.

# booted SLOT COMMAND...: with the file system of that slot as the root, and all that is in it from $root
booted() {
	# shellcheck disable=SC2016
	timeout 120 unshare -m sh -ec '
		root=$1 r=$1.booted
		mount --bind "$root/dev" /dev # the client wants the name that is in the table of mounts
		mount "/dev/$2" "$r"
		shift 2
		for x in "$root"/*; do
			at=$r/${x##*/}
			if [ -L "$x" ]; then
				ln -sfn "$(readlink "$x")" "$at"
			else
				mkdir -p "$at"
				mount --bind "$x" "$at"
			fi
		done
		mount -t proc proc "$r/proc"
		exec chroot "$r" env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
			DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent "$@"' sh "$root" "$@"
}

# slots makes them, in loops; 1: there are no loop devices
slots() {
	mkdir -p "$root.booted"
	loops=
	for n in 2 3; do
		truncate -s 4M "$dir/slot$n"
		mke2fs -q -F -t ext2 "$dir/slot$n"
		loop=$(losetup -f --show "$dir/slot$n") || return 1
		loops="$loops $loop"
		cp -a "$loop" "$root/dev/mmcblk0p$n"
	done
}

# loops_gone detaches them.
loops_gone() {
	for loop in $loops; do losetup -d "$loop" || true; done
}

# pending_device NAME SERVER: the device as Mender's client has it, at release-1 from slot 2
pending_device() {
	dpkg_in --purge mendlet-mender mendlet
	dpkg_in -i "/var/cache/apt/archives/$client"
	rm -rf "$root/data/mender" "$root/var/lib/mender" "$root/etc/mender"
	mkdir -p "$root/data/mender" "$root/etc/mender" "$root/$base/identity" "$root/usr/local/bin"
	ln -s /data/mender "$root/var/lib/mender"
	echo 'device_type=rig' > "$root/data/mender/device_type"
	echo 'artifact_name=release-1' > "$root/etc/mender/artifact_info"
	printf '{"ServerURL": "%s", "RootfsPartA": "/dev/mmcblk0p2", "RootfsPartB": "/dev/mmcblk0p3",
		"UpdatePollIntervalSeconds": 1, "InventoryPollIntervalSeconds": 1, "RetryPollIntervalSeconds": 1}\n' "$2" \
		> "$root/etc/mender/mender.conf"
	printf '#!/bin/sh\necho serial=7\n' > "$root/$base/identity/mender-device-identity"
	# shellcheck disable=SC2016
	printf '#!/bin/sh\nkill -9 $PPID\n' > "$root/usr/local/bin/reboot"
	chmod 755 "$root/$base/identity/mender-device-identity" "$root/usr/local/bin/reboot"
	rm -f "$root/data/env"
	truncate -s 32K "$root/data/env"
	printf '/data/env 0x0 0x4000\n/data/env 0x4000 0x4000\n' > "$root/etc/fw_env.config"
	echo mender_boot_part=2 > "$root/root/env"
	inside fw_setenv -f /root/env mender_boot_part 2 2> /dev/null # which says that there was none
	inside fw_setenv mender_boot_part_hex 2
	inside fw_setenv upgrade_available 0
	inside fw_setenv bootcount 0
	what=$1
}

# variable NAME VALUE: the boot environment has it
variable() {
	got=$(inside fw_printenv -n "$1")
	[ "$got" = "$2" ] || fail "$what: got $1=$got, want $2"
}

# goes EXIT SLOT COMMAND...: with that exit code, from that slot; the client's store and key stay
goes() {
	want=$1 code=0
	shift
	booted "$@" > "$dir/log" 2>&1 < /dev/null || code=$?
	[ "$code" = "$want" ] || {
		cat "$dir/log"
		fail "$what: $*: got exit code $code, want $want"
	}
	held > "$dir/after"
	diff "$dir/before" "$dir/after" || fail "$what: $*: store or key were changed"
}
held() { (cd "$root/data/mender" && find . \( -name mender-store -o -name '*.pem' \) -exec sha256sum {} + | sort); }

# client COMMAND...: what Mender's client does from slot 2, until it ends or reboots; then it is replaced
client() {
	booted mmcblk0p2 "$@" > "$dir/log" 2>&1 < /dev/null || true
	[ "$(inside fw_printenv -n mender_boot_part upgrade_available)" = "3
1" ] || {
		tail -n 20 "$dir/log"
		fail "$what: the client did not switch over"
	}
	held > "$dir/before"
	dpkg_in -i /root/mendlet.deb /root/mendlet-mender.deb
}

# back is what the bootloader does when the new root does not boot.
back() {
	inside fw_setenv mender_boot_part 2
	inside fw_setenv mender_boot_part_hex 2
	inside fw_setenv upgrade_available 0
}

# ended NAME: that is installed, and the bootloader is content
ended() {
	got=$(inside mender-update show-artifact)
	[ "$got" = "$1" ] || fail "$what: got artifact $got, want $1"
	variable upgrade_available 0
	echo "$what: ended with $1"
}

# by_hand: before the reboot nothing is committed, an upgrade of the package is no matter, and what boots counts.
by_hand() {
	pending_device "an image by hand" http://127.0.0.1:1
	client mender install /root/v2.mender
	goes 1 mmcblk0p2 mender-update commit
	variable upgrade_available 1
	dpkg_in -i /root/mendlet-next.deb /root/mendlet-mender-next.deb
	goes 0 mmcblk0p3 mender-update commit
	ended v2
	variable mender_boot_part 3

	pending_device "an image by hand that does not boot" http://127.0.0.1:1
	client mender install /root/v2.mender
	back
	goes 1 mmcblk0p2 mender-update commit
	ended release-1
}

# deployed RESULT SLOT NAME: the server hears the result, once
deployed() {
	rm -f "$dir/heard" "$dir/on"
	mkfifo "$dir/on"
	"$dir/driver" -out "$root/root" -deploy 2 serve < "$dir/on" > "$dir/heard" 2>&1 &
	server=$!
	exec 9> "$dir/on"
	until [ -s "$dir/heard" ]; do kill -0 $server || fail "no server: $(cat "$dir/heard")"; done
	pending_device "an image deployed, $1" "$(sed -n 1p "$dir/heard")"
	client mender daemon
	[ "$2" = mmcblk0p3 ] || back
	code=0
	[ "$1" = success ] || code=1
	goes $code "$2" mendlet run
	goes 0 "$2" mendlet run
	ended "$3"
	exec 9>&-
	wait $server
	got=$(grep -c -x -e success -e failure "$dir/heard") || true
	[ "$got $(tail -n 1 "$dir/heard")" = "1 $1" ] || fail "$what: the server heard $(cat "$dir/heard")"
	echo "$what: the server heard $(sed 1d "$dir/heard" | tr "\n" " ")"
}

pending() {
	client=$(cd "$root/var/cache/apt/archives" && ls mender-client_*.deb)
	slots || {
		loops_gone
		echo "skipped: no loop devices: no update of an image is pending when the packages are installed"
		return 0
	}
	trap 'loops_gone; rm -rf "$dir"' EXIT
	dpkg-deb -x out/debian/mendlet_*.deb "$dir/raw"
	"$dir/raw/usr/sbin/mendlet" pack -n v2 -c rig -f "$dir/slot3" -o "$root/root/v2.mender"
	(cd rig/driver && CGO_ENABLED=0 "$go" build -o "$dir/driver" .)
	by_hand
	deployed success mmcblk0p3 v2
	deployed failure mmcblk0p2 release-1
	loops_gone
	trap 'rm -rf "$dir"' EXIT
}
