#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Two updates of a make-believe board, on image files: one is kept, one is rolled back.
# Usage: demo.sh MENDLET TESTDATA
set -eu
mendlet=$1
testdata=$2
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

say "The end: one update committed, two rolled back, and the board always had a slot to boot."
run status
