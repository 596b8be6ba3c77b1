#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Two updates of a make-believe board, on image files: one is kept, one is rolled back.
# Usage: demo.sh MENDLET TESTDATA
set -eu
mendlet=$1
testdata=$2
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cp "$testdata/demo-env.img" "$dir/env"
printf '%s 0x0 0x400\n%s 0x400 0x400\n' "$dir/env" "$dir/env" > "$dir/fw_env.config"
printf 'device_type=demo-board\n' > "$dir/device_type"
printf '{"RootfsPartA": "%s/p2", "RootfsPartB": "%s/p3", "FwEnvConfig": "%s/fw_env.config",
 "DeviceTypeFile": "%s/device_type", "BootEnv": "native"}\n' "$dir" "$dir" "$dir" "$dir" > "$dir/mender.conf"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n%s\n' "$*"; }
m() { "$mendlet" "$@" -c "$dir/mender.conf" -d "$dir" --running "$slot"; }
env() { "$mendlet" -c "$dir/mender.conf" -d "$dir" env "$@"; }
run() { echo "\$ mendlet $*" | sed "s,$dir/,,g"; m "$@" 2>&1 | sed "s,$dir/,,g"; }
image() { yes "This is release $1 of the demo system." | head -c 8000000; }
runs() { head -n 1 "$dir/p$part"; }

# What U-Boot does at power-on, by Mender's boot script.
boot() {
	if [ "$(env print -n upgrade_available)" = 1 ]; then
		count=$(($(env print -n bootcount) + 1))
		env set bootcount=$count
		if [ $count -gt 1 ]; then
			other=$((5 - $(env print -n mender_boot_part)))
			env set mender_boot_part=$other mender_boot_part_hex=$other upgrade_available=0
			echo "U-Boot: second boot without a commit: back to the other slot"
		fi
	fi
	part=$(env print -n mender_boot_part)
	if [ "$part" = 2 ]; then slot=A; else slot=B; fi
	echo "U-Boot: boots slot $slot (partition $part). It says: $(runs)"
}

say "A board has two root slots. It runs one; an update goes to the other."
image 1 > "$dir/p2"
head -c 10000000 /dev/zero > "$dir/p3"
boot

say "1. On the build machine: pack two releases as Mender artifacts."
for n in 2 3; do
	image $n > "$dir/rootfs.img"
	"$mendlet" pack -n release-$n -c demo-board -f "$dir/rootfs.img" -o "$dir/release-$n.mender"
done
ls -l "$dir" | awk '/mender$/ {print $9 ": " $5 " bytes"}'

say "2. On the board: what would happen? (Nothing is changed.)"
run plan "$dir/release-2.mender"

say "3. Install it: the idle slot is written and read back, then the boot environment is switched."
run install "$dir/release-2.mender"
echo "the board still runs: $(runs)"

say "4. Reboot. The bootloader tries the new slot, and would fall back if that did not come up."
boot

say "5. The new system works: commit makes it the one that stays."
run commit
run show-artifact

say "6. Another update, release 3 ..."
run install "$dir/release-3.mender"
boot

say "7. ... which we do not like. Roll back, reboot: release 2 is as it was."
run rollback
boot
run show-artifact

say "8. Once more, but this time release 3 hangs, and a watchdog resets the board before anyone could commit."
run install "$dir/release-3.mender"
boot
boot
echo "(the commit that comes now is refused: there is nothing left to commit)"
run commit || true

say "The end: one update committed, two rolled back, and the board always had a slot to boot."
run status
