#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds and installs by the recipes in packaging/, each under a few lines that stand for the system that it is for:
# Buildroot, OpenWrt, Alpine, Yocto. The program must be static, of the version, and without a fetch; each file must end
# up in a package. What a recipe says of versions and sums must be true.
# Usage: recipes.sh GO
set -eu
umask 022
go=$(command -v "$1")
unset VERSION SOURCE_DATE_EPOCH MAKEFLAGS MFLAGS MAKELEVEL TAGS GOFLAGS INIT DESTDIR
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM HUP
fail() {
	echo "recipes: $*" >&2
	exit 1
}
PATH=$(dirname "$go"):$PATH
export PATH

# A release's tarball, unpacked: what is checked out, with vendor/.
version=$(cat VERSION)
src=$dir/mendlet-$version
mkdir "$src"
if [ -e .git ]; then
	git ls-files -z | tar -c --null -T - | tar -x -C "$src"
	(cd "$src" && "$go" mod vendor)
else
	cp -r . "$src"
fi
GOPROXY=off
GOTOOLCHAIN=local
export GOPROXY GOTOOLCHAIN

# program FILE VERSION TAGS: what it is
program() {
	"$go" version -m "$1" > "$dir/about"
	for want in CGO_ENABLED=0 -buildmode=exe "-tags=$3"; do
		grep -qF "	build	$want" "$dir/about" || fail "$1 was not built with $want: $(cat "$dir/about")"
	done
	"$1" --version | grep -qx "$2" || fail "got version $("$1" --version), want $2"
}
# installed DIR FILE...: the directory for checks, where the program is, and nothing but these files; a name with a * stands for one or more
installed() {
	root=$1
	shift
	(cd "$root" && find . ! -type d | sed 's|^\./||' | sort) > "$dir/got"
	! grep -qx usr/sbin/mendlet "$dir/got" || [ -d "$root/etc/mendlet/checks.d" ] || fail "$root has no directory for checks"
	for want; do
		grep -qx "$(echo "$want" | sed 's/\./\\./g; s/\*/[^\/]*/g')" "$dir/got" || fail "no $want in $(cat "$dir/got")"
		grep -vx "$(echo "$want" | sed 's/\./\\./g; s/\*/[^\/]*/g')" "$dir/got" > "$dir/rest" || true
		mv "$dir/rest" "$dir/got"
	done
	[ ! -s "$dir/got" ] || fail "installed, too: $(cat "$dir/got")"
}
share=usr/share/mender
plain="usr/sbin/mendlet $share/identity/mender-device-identity $share/inventory/mender-inventory-*"
doc='usr/share/man/man*/*.[58] usr/share/doc/mendlet/examples/* usr/share/doc/mendlet/examples/stick/*'
modules=$share/modules/v3/*
names='usr/bin/mender usr/bin/mender-*'
units=usr/lib/systemd/system
bus=
for f in packaging/io.mender.*.conf packaging/*/io.mender.*.conf; do
	[ ! -e "$f" ] || bus=usr/share/dbus-1/system.d/io.mender.*
done

# Buildroot: for each init and some choices, the commands of mendlet.mk.
cat > "$dir/buildroot.mk" << 'EOF'
comma := ,
INSTALL = install
GO_BIN = go
HOST_GO_TARGET_ENV = GO111MODULE=on GOFLAGS=-mod=vendor CGO_ENABLED=1
BR2_EXTERNAL_MENDLET_PATH = $(SRC)/packaging/buildroot
include $(BR2_EXTERNAL_MENDLET_PATH)/external.mk
$(MENDLET_SITE)/.stamp:
	$(MENDLET_BUILD_CMDS)
	$(MENDLET_INSTALL_TARGET_CMDS)
	$(MENDLET_INSTALL_INIT_$(BR_INIT))
EOF
buildroot() {
	name=$1 init=$2
	shift 2
	make -s -f "$dir/buildroot.mk" SRC="$src" TARGET_DIR="$dir/$name" BR_INIT="$init" "$@" > "$dir/log" 2>&1 ||
		fail "buildroot, $name: $(cat "$dir/log")"
}
B=BR2_PACKAGE_MENDLET
set -f # the names with * are not for this shell
buildroot all SYSTEMD ${B}_NET=y ${B}_DBUS=y ${B}_INIT=y ${B}_MENDER=y ${B}_MODULES=y
installed "$dir/all" $plain $doc $modules $names $bus "$units/mender-updated.service" "$units/mender-authd.service"
program "$dir/all/usr/sbin/mendlet" "$version" nethttpomithttp2
buildroot timer SYSTEMD ${B}_NET=y ${B}_INIT=y
installed "$dir/timer" $plain $doc "$units/mendlet.timer" "$units/mendlet.service"
program "$dir/timer/usr/sbin/mendlet" "$version" nethttpomithttp2,nodbus
buildroot sysv SYSV ${B}_NET=y ${B}_DBUS=y ${B}_INIT=y ${B}_MENDER=y
installed "$dir/sysv" $plain $doc $names $bus etc/init.d/S99mendlet
buildroot openrc OPENRC ${B}_NET=y ${B}_DBUS=y ${B}_INIT=y
installed "$dir/openrc" $plain $doc etc/init.d/mendlet
buildroot rescue SYSV
installed "$dir/rescue" $plain $doc
program "$dir/rescue/usr/sbin/mendlet" "$version" nethttpomithttp2,nonet,nodbus
# Each option that a recipe or the menu has is known to the other.
grep -oh "${B}_[A-Z]*" packaging/buildroot/package/mendlet/mendlet.mk | sort -u > "$dir/used"
sed -n "s/^config \(${B}_.*\)/\1/p" packaging/buildroot/package/mendlet/Config.in | sort > "$dir/menu"
diff "$dir/menu" "$dir/used" || fail "Config.in and mendlet.mk do not have the same options"
(cd "$src" && sed -n 's/^sha256  //p' packaging/buildroot/package/mendlet/mendlet.hash | sha256sum -c --quiet) ||
	fail "mendlet.hash"

# OpenWrt: the Makefile with another rules.mk, package.mk and golang-package.mk.
mkdir -p "$dir/owrt/include" "$dir/owrt/feed/net/mendlet" "$dir/owrt/feed/lang/golang"
cp packaging/openwrt/mendlet/Makefile "$dir/owrt/feed/net/mendlet/"
echo 'INCLUDE_DIR:=$(TOPDIR)/include' > "$dir/owrt/rules.mk"
cat > "$dir/owrt/include/package.mk" << 'EOF'
PKG_BUILD_DIR:=$(dir $(SRC))$(PKG_NAME)-$(PKG_VERSION)
all: ; $(Build/Compile)
define BuildPackage
  $$(if $$(Package/$(1)),,$$(error no Package/$(1)))
  all: install-$(1)
  install-$(1): ; $$(call Package/$(1)/install,$$(DEST)/$(1))
endef
EOF
echo 'GO_PKG_VARS=GOOS=linux CGO_ENABLED=1' > "$dir/owrt/feed/lang/golang/golang-package.mk"
rm -f "$src/mendlet"
sed -i 's|^all: .*|all: compile\ncompile: ; $(Build/Compile)|; s|^  install-\$(1): ;|  install-$(1): compile ;|' \
	"$dir/owrt/include/package.mk"
make -s -C "$dir/owrt/feed/net/mendlet" TOPDIR="$dir/owrt" SRC="$src" DEST="$dir/owrt/dest" > "$dir/log" 2>&1 ||
	fail "openwrt: $(cat "$dir/log")"
installed "$dir/owrt/dest/mendlet" $plain etc/init.d/mendlet
installed "$dir/owrt/dest/mendlet-mender" $names $bus
installed "$dir/owrt/dest/mendlet-modules" $modules
program "$dir/owrt/dest/mendlet/usr/sbin/mendlet" "$version-r1" nethttpomithttp2

# Alpine: APKBUILD's functions, and what abuild does with the default subpackages.
cat > "$dir/abuild" << 'EOF'
set -eu
amove() {
	for f; do
		mkdir -p "$subpkgdir/$(dirname "$f")"
		mv "$pkgdir/$f" "$subpkgdir/$f"
		rmdir -p "$pkgdir/$(dirname "$f")" 2> /dev/null || true
	done
}
mkdir -p "$out"
cd "$src"
. packaging/alpine/APKBUILD
[ "$pkgver" = "$(cat VERSION)" ]
pkgdir=$out/$pkgname
build
package
for sub in $subpackages; do
	subpkgdir=$out/${sub%%:*}
	case $sub in
	*-doc) amove usr/share/man usr/share/doc ;;
	*-openrc) amove etc/init.d ;;
	*:*) rest=${sub#*:} && ${rest%%:*} ;;
	esac
done
EOF
rm -f "$src/mendlet"
for shell in dash 'busybox sh'; do
	command -v ${shell%% *} > /dev/null || continue
	rm -rf "$dir/apk"
	src=$src out=$dir/apk GOFLAGS=-buildmode=pie $shell "$dir/abuild" > "$dir/log" 2>&1 || fail "alpine: $(cat "$dir/log")"
	installed "$dir/apk/mendlet" $plain
	installed "$dir/apk/mendlet-doc" $doc
	installed "$dir/apk/mendlet-openrc" etc/init.d/mendlet
	installed "$dir/apk/mendlet-mender" $names $bus
	installed "$dir/apk/mendlet-modules" $modules
	installed "$dir/apk/mendlet-mkinitfs" etc/mkinitfs/features.d/mendlet.files
	program "$dir/apk/mendlet/usr/sbin/mendlet" "$version-r0" nethttpomithttp2
done

# Yocto: each line of the recipe is one of a few kinds; its functions are run; each file is in one package's FILES.
recipe=packaging/yocto/meta-mendlet/recipes-mendlet/mendlet/mendlet_$version.bb
[ -e "$recipe" ] || fail "no $recipe"
awk '
	body { if (/^}$/) body = 0; next }
	more { more = /\\$/; next }
	/^(#.*)?$/ || /^inherit( [a-z.-]+)+$/ { next }
	/^[a-z_]+\(\) \{$/ { body = 1; next }
	/^(export )?[A-Za-z_]+(\[[a-z0-9]+\])?(:[a-z$\{\}PN-]+)* (\?|\+|=\+)?= ?"([^"]*"|[^"]*\\)$/ { more = /\\$/; next }
	/^PACKAGES =\+ "[^"]*"$/ { next }
	{ print FILENAME ":" NR ": " $0; bad = 1 }
	END { exit bad || body || more }
' "$recipe" > "$dir/log" || fail "not a recipe's line: $(cat "$dir/log")"
sed -n 's|.*file://\([^;]*\);md5=\([0-9a-f]*\).*|\2  \1|p' "$recipe" > "$dir/sums"
[ "$(wc -l < "$dir/sums")" = 2 ] && (cd "$src" && md5sum -c --quiet "$dir/sums") || fail "LIC_FILES_CHKSUM"
{
	cat << 'EOF'
set -eu
oe_runmake() { make "$@"; }
bbfatal() { echo "$*"; exit 1; }
GO=go PV=$(cat "$S/VERSION") MENDLET_TAGS=nethttpomithttp2 PN=mendlet GOTMPDIR=$TMPDIR
prefix=/usr bindir=/usr/bin sbindir=/usr/sbin mandir=/usr/share/man datadir=/usr/share docdir=/usr/share/doc
sysconfdir=/etc systemd_system_unitdir=/usr/lib/systemd/system
EOF
	sed -n '/^do_[a-z]*() {$/,/^}$/p' "$recipe"
	echo 'do_compile; do_install; set -f'
	sed -n 's/^FILES:\(.*\) = "\(.*\)"$/echo "\1" "\2"/p' "$recipe"
} > "$dir/oe"
rm -f "$src/mendlet"
S=$src D=$dir/oe-image TMPDIR=$dir sh "$dir/oe" > "$dir/log" 2>&1 || fail "yocto: $(cat "$dir/log")"
program "$dir/oe-image/usr/sbin/mendlet" "$version" nethttpomithttp2
installed "$dir/oe-image" $plain $doc $modules $names $bus etc/init.d/mendlet "$units/mender-updated.service" \
	"$units/mender-authd.service" "$units/mendlet.timer" "$units/mendlet.service"
(cd "$dir/oe-image" && find . ! -type d -o -type d -empty | sed 's|^\.||' | sort) > "$dir/got"
echo "mendlet-doc /usr/share/doc /usr/share/man" > "$dir/packages"
grep '^mendlet[^ ]* /' "$dir/log" >> "$dir/packages"
[ "$(wc -l < "$dir/packages")" = 5 ] || fail "yocto: packages $(cat "$dir/packages")"
while read -r file; do
	in=
	while read -r package globs; do
		for glob in $globs; do
			case $file in $glob | $glob/*) in="$in$package " ;; esac
		done
	done < "$dir/packages"
	case $in in *' '*' '* | '') fail "yocto: $file is in packages \"$in\", want one" ;; esac
	case "$in$file" in
	'mendlet-mender '*/bin/mender* | 'mendlet-mender '*/mender-*.service | 'mendlet-mender '*/dbus-1/*) ;;
	'mendlet '/etc/mendlet/checks.d) ;;
	'mendlet-run '*/mendlet* | 'mendlet-modules '*/modules/* | 'mendlet-doc '* | 'mendlet '*) ;;
	*) fail "yocto: $file is in package $in" ;;
	esac
done < "$dir/got"
echo "recipes: Buildroot's, OpenWrt's, Alpine's and Yocto's build a static program and install what they should"
