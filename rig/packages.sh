#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs the Debian packages that the tests want. rig/build.sh and rig/bench-peers.sh install what
# they alone need.
set -eu
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
	echo "skipped: not root or no apt-get"
	exit 0
fi
# None of them is to be started.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	printf '#!/bin/sh\nexit 101\n' > $policy
	chmod +x $policy
fi
apt-get update -qq || echo "apt-get update failed; going on with what is here"
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	mender-artifact mender-client mender-cli mender-connect python3-websockets tmux dbus openssh-server openssh-client libubootenv-tool u-boot-tools openssl busybox-static xz-utils zstd \
	lmdb-utils libarchive-tools gdisk fdisk mount e2fsprogs util-linux strace qemu-user-static rpm jq shellcheck nginx lighttpd python3 \
	debhelper lintian debootstrap monitoring-plugins-basic > /dev/null ||
	echo "some packages are missing: their tests will say what they skip"
