#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# /usr/lib/dracut/modules.d/90mendlet/module-setup.sh: mendlet for the rescue shell.

check() {
	require_binaries mendlet || return 1
	return 255 # only when asked for
}

depends() {
	return 0
}

install() {
	local conf f
	inst_binary mendlet
	inst_multiple -o /var/lib/mender/device_type /etc/fw_env.config /usr/share/mender/identity/mender-device-identity
	# What mender.conf names is put in beside, if it is a certificate, a public key or the device's type: more people
	# can read an initramfs than a private key.
	for conf in /etc/mender/mender.conf /var/lib/mender/mender.conf; do
		[ -e "$conf" ] || continue
		inst_simple "$conf"
		for f in $(grep -o '"/[^"]*"' "$conf" | tr -d '"'); do
			! grep -qsE '^device_type=|BEGIN (CERTIFICATE|.*PUBLIC KEY)' "$f" ||
				grep -q 'PRIVATE KEY' "$f" || inst_simple "$f"
		done
	done
	# shellcheck disable=SC2154
	if [ -e "$moddir/mendlet-connect.sh" ]; then
		inst_multiple chmod mkdir mount sleep umount
		inst_multiple -o /etc/ssl/certs/ca-certificates.crt
		inst_hook emergency 50 "$moddir/mendlet-connect.sh"
		inst_hook pre-pivot 50 "$moddir/mendlet-connect-end.sh"
	fi
}
