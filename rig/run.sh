#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The machine tests: builds the rig where that is needed, cross-builds mendlet, runs every scenario
# in QEMU. Exits 1 if one fails. CUTS and SD_CUTS are the numbers of power cuts on a virtio disk and
# on an SD card, SEED is where chance begins.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
OUT=$HERE/out
CUTS=${CUTS:-20} SD_CUTS=${SD_CUTS:-3} SEED=${SEED:-1}
skip() {
  echo "skipped: rig: $*"
  exit 0
}
[ "$(id -u)" = 0 ] || skip "needs root, to install packages"
command -v apt-get >/dev/null || skip "needs apt-get"
grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release || skip "needs Debian 12, whose U-Boot it builds"
[ "$(dpkg --print-architecture)" = amd64 ] || skip "needs an amd64 machine"

begin=$SECONDS
mkdir -p "$OUT/guest" "$OUT/host" "$OUT/logs"
rm -f "$OUT"/run-*
(
  cd "$HERE/.."
  CGO_ENABLED=0 GOARCH=arm64 go build -trimpath -ldflags '-s -w' -o "$OUT/guest/mendlet" .
  CGO_ENABLED=0 go build -trimpath -o "$OUT/host/mendlet" .
  CGO_ENABLED=0 go test -c -o "$OUT/host/relay" .
)
(cd "$HERE/driver" && go vet . && go test . && CGO_ENABLED=0 go build -trimpath -o "$OUT/driver" .)
"$HERE/build.sh" "$OUT/guest/mendlet" "$OUT/host/mendlet"
built=$((SECONDS - begin))

# QEMU's emulation takes one core, so two lanes run side by side.
ran=0 failed=0
one() { # LOG FLAGS... SCENARIO
  local log=$OUT/logs/$1
  shift
  "$OUT/driver" -out "$OUT" -seed "$SEED" "$@" >"$log" 2>&1 || echo "FAIL $*" >>"$log"
  cat "$log"
}
lane1() { one cut -n "$CUTS" cut; }
lane2() {
  one update update
  one rollback rollback
  one managed managed
  one takeover takeover
  one ubi ubi
  one connect connect
  one initramfs-tools initramfs-tools
  one dracut dracut
  one explore explore
  one found-out -stand-in wrong-order explore
  one sd -bus sd -n "$SD_CUTS" cut
  one download -n 10 download
}
rm -f "$OUT"/logs/*
lane1 &
pid=$!
lane2
wait $pid
for log in cut update rollback managed takeover ubi connect initramfs-tools dracut explore found-out sd download; do
  ran=$((ran + 1))
  tail -n 1 "$OUT/logs/$log" | grep -q '^ok ' || failed=$((failed + 1))
done
echo "rig: $CUTS power cuts on virtio, $SD_CUTS on SD; build $built s, all $((SECONDS - begin)) s"
echo "rig: $((ran - failed)) passed, $failed failed"
[ $failed = 0 ]
