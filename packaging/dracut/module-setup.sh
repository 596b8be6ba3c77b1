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
}
