# SPDX-License-Identifier: Apache-2.0
SUMMARY = "A/B updates from Mender artifacts, for a device"
DESCRIPTION = "The device side of Mender in one static program, without a C library, bus or shell."
LICENSE = "Apache-2.0 & BSD-3-Clause"
LIC_FILES_CHKSUM = "\
    file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57 \
    file://vendor/github.com/ulikunitz/xz/LICENSE;md5=3c82255323cf3d48815acdbf9068b715 \
"

SRC_URI = "${MENDLET_URI}"
SRC_URI[sha256sum] = "${MENDLET_SHA256}"

GO_IMPORT = "mendlet"
inherit go systemd update-rc.d

# "nonet" for a recovery system, "nodbus" without the token on the system bus.
MENDLET_TAGS ?= "nethttpomithttp2${@bb.utils.contains('DISTRO_FEATURES', 'dbus', '', ',nodbus', d)}"

# vendor/ has what is needed.
export GOPROXY = "off"
export GOTOOLCHAIN = "local"

do_configure[noexec] = "1"

# Its Makefile builds it without cgo and not as PIE, whatever GOBUILDFLAGS has, so that an initramfs can have it.
do_compile() {
    export TMPDIR="${GOTMPDIR}"
    cd ${S}
    oe_runmake GO="${GO}" GOFLAGS="-mod=vendor" VERSION="${PV}" TAGS="${MENDLET_TAGS}" mendlet
    if readelf -l mendlet | grep INTERP; then
        bbfatal "mendlet is not static"
    fi
}

do_install() {
    cd ${S}
    for init in systemd none; do
        oe_runmake -o mendlet DESTDIR="${D}" PREFIX="${prefix}" BINDIR="${bindir}" SBINDIR="${sbindir}" \
            MANDIR="${mandir}" DATADIR="${datadir}/mender" DOCDIR="${docdir}/mendlet" \
            UNITDIR="${systemd_system_unitdir}" INIT=$init install install-modules install-mender
    done
    install -D -m 0755 packaging/mendlet.sysv ${D}${sysconfdir}/init.d/mendlet
}

# mendlet-run polls by itself; mendlet-mender has the names and units of Mender's client.
PACKAGES =+ "${PN}-run ${PN}-mender ${PN}-modules"

FILES:${PN} = "${sbindir}/mendlet ${datadir}/mender/identity ${datadir}/mender/inventory ${sysconfdir}/mendlet"
FILES:${PN}-run = "${sysconfdir}/init.d ${systemd_system_unitdir}/mendlet.*"
FILES:${PN}-mender = "${bindir}/mender* ${systemd_system_unitdir}/mender-* ${datadir}/dbus-1"
FILES:${PN}-modules = "${datadir}/mender/modules"

RRECOMMENDS:${PN} += "ca-certificates"
RDEPENDS:${PN}-run += "${PN}"
RDEPENDS:${PN}-mender += "${PN} ${@bb.utils.contains('DISTRO_FEATURES', 'systemd', '', '${PN}-run', d)}"
RPROVIDES:${PN}-mender += "mender-update mender-auth"
RCONFLICTS:${PN}-mender += "mender-update mender-auth"
RREPLACES:${PN}-mender += "mender-update mender-auth"

SYSTEMD_PACKAGES = "${PN}-run ${PN}-mender"
SYSTEMD_SERVICE:${PN}-run = "mendlet.timer"
SYSTEMD_SERVICE:${PN}-mender = "mender-updated.service ${@bb.utils.contains('DISTRO_FEATURES', 'dbus', \
    'mender-authd.service', '', d)}"
INITSCRIPT_PACKAGES = "${PN}-run"
INITSCRIPT_NAME:${PN}-run = "mendlet"
INITSCRIPT_PARAMS:${PN}-run = "defaults 95 5"
