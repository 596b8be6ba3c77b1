#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Updates of a make-believe board, on image files: by hand, kept and rolled back, and from a folder.
# Usage: demo.sh MENDLET TESTDATA
set -eu
mendlet=$(realpath "$1")
testdata=$(realpath "$2")
. "$(dirname "$0")/board.sh"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n%s\n' "$*"; }

say "A board has two root slots. It runs one; an update goes to the other."
boot

say "1. On the build machine: pack two releases as Mender artifacts."
release 2
release 3
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

if ! command -v openssl > /dev/null || ! unshare -rm true 2> /dev/null; then
	say "The end. (There is a last act, for which it takes openssl, and unshare for the board's own boot_id.)"
	exit 0
fi
say "9. No server either: a folder with the artifact and one signed file, on any web space or stick."
mkdir "$dir/www"
cd "$dir"
cp release-3.mender www/
openssl genpkey -algorithm ed25519 -out fleet.pem
openssl pkey -in fleet.pem -pubout -out fleet.pub
publish() { echo "\$ mendlet fleet $*"; "$mendlet" fleet "$@" 2>&1; }
publish init www/demo.fleet -k fleet.pem
publish add www/demo.fleet www/release-3.mender -k fleet.pem
publish check www/demo.fleet --verify fleet.pub

say "10. The board follows it. What is there for it, and why?"
sed -i "s,^{,{\"FleetVerifyKeys\": [\"$dir/fleet.pub\"]\, \"DeviceID\": \"demo\"\, ," mender.conf
run check-update --channel "$dir/www/demo.fleet"

# Each boot of the board has an identity of its own, which is not that of this machine.
m() {
	unshare -rm sh -ec 'mount --bind "$1" /proc/sys/kernel/random/boot_id; shift; exec "$@"' sh boot_id \
		"$mendlet" "$@" -c mender.conf -b none.conf -d "$dir" --running "$slot"
}
cat /proc/sys/kernel/random/uuid > boot_id
say "11. It installs that, reboots, and the same command commits."
run run --no-reboot --channel "$dir/www/demo.fleet"
boot
cat /proc/sys/kernel/random/uuid > boot_id
run run --no-reboot --channel "$dir/www/demo.fleet"
run show-artifact

say "The end: two updates committed, two rolled back, and the board always had a slot to boot."
run status
