#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the tests for the other targets and runs a part of them under qemu-user: the artifact
# reader, decompressors, slot writer, journal, environment and terminal. Not those that start the program
# itself, which the kernel would not hand to qemu, or measure with it, and not the long ones that prove the
# simulator. Speed there means nothing.
# Usage: test-cross.sh GO [ARGUMENT]…    (arguments go to the test binary, as -test.v)
set -eu
cd "$(dirname "$0")/.."
go=$1
shift
run='Writer|Artifact|Journal|Env|Unpack|Inflate|LZMA|XZ|Zstd|Pax|ReadBack|Pack|Store|TestTerminal'
skip='TestEnvToolIsSelf|TestEnvironmentReadOnly|TestPackDeltaSize|TestBootstrapArtifact|RealArtifacts|TestZstdDamaged'
skip="$skip|TestTerminalDevpts"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM HUP
failed=0
for t in arm:qemu-arm-static arm64:qemu-aarch64-static mipsle:qemu-mipsel-static riscv64:qemu-riscv64-static; do
	arch=${t%%:*} qemu=${t##*:}
	if ! command -v "$qemu" > /dev/null; then
		echo "$arch: skipped: needs $qemu (Debian package qemu-user-static)"
		continue
	fi
	GOOS=linux GOARCH=$arch GOARM=6 GOMIPS=softfloat CGO_ENABLED=0 "$go" test -c -o "$dir/$arch.test" .
	if "$qemu" "$dir/$arch.test" -test.short -test.run "$run" -test.skip "$skip" "$@" > "$dir/log" 2>&1; then
		echo "$arch: $(tail -n 1 "$dir/log")"
	else
		cat "$dir/log"
		echo "$arch: FAIL"
		failed=1
	fi
	rm "$dir/$arch.test"
done
exit $failed
