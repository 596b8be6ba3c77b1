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
	inst_binary mendlet
	inst_multiple -o /etc/mender/mender.conf /var/lib/mender/mender.conf /var/lib/mender/device_type /etc/fw_env.config
	# shellcheck disable=SC2154
	if [ -e "$moddir/mendlet-connect" ]; then
		inst_multiple -o mount /etc/ssl/certs/ca-certificates.crt /etc/mender/mender-connect.conf
		inst_hook emergency 50 "$moddir/mendlet-connect"
	fi
}
