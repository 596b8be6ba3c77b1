#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds what the rig boots, all from Debian 12 packages, into rig/out: U-Boot (source package),
# kernel and initramfs once; root images, artifacts and the disk whenever the updater changed.
# Usage: build.sh GUEST_BINARY HOST_BINARY     (mendlet for linux/arm64, and one that runs here)
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
OUT=$HERE/out
W=$OUT/work
mkdir -p "$W/dl" "$W/x"
GUEST=$1 HOST=$2
T=aarch64-linux-gnu
ROOT_MB=32 # the size of a root slot; driver/disk.go knows it too
NOISE_MB=3 # what makes the big root big
step() { echo "[$(date +%T)] $*"; }

host_packages() {
  local p missing=
  for p in qemu-system-arm gcc libc6-dev gcc-aarch64-linux-gnu bison flex bc libssl-dev dpkg-dev make \
    busybox-static e2fsprogs gdisk kmod device-tree-compiler xz-utils openssl mender-cli; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
  done
  [ -n "$missing" ] || return 0
  step "installing$missing"
  apt-get update >"$W/apt-install.log" 2>&1 || true
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing >>"$W/apt-install.log" 2>&1
}

# Uses an apt state of its own, so that the host's architectures and sources stay as they are:
# the host's mirrors and suites, for both architectures and with sources.
foreign_packages() {
  [ ! -e "$W/dl/.done" ] || return 0
  step "packages for arm64, and U-Boot's source"
  local a=$W/apt key=/usr/share/keyrings/debian-archive-keyring.gpg krel f
  mkdir -p "$a/state/lists/partial" "$a/cache/archives/partial"
  touch "$a/status"
  apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | sort -u -k2,2 |
    while read -r uri suite; do
      echo "deb [arch=amd64,arm64 signed-by=$key] $uri $suite main"
      echo "deb-src [signed-by=$key] $uri $suite main"
    done >"$a/sources.list"
  cat >"$a/conf" <<X
Dir::State "$a/state"; Dir::State::status "$a/status"; Dir::Cache "$a/cache";
Dir::Etc::SourceList "$a/sources.list"; Dir::Etc::SourceParts "-";
APT::Architecture "amd64"; APT::Architectures {"amd64";"arm64";}; APT::Sandbox::User "root";
X
  (
    export APT_CONFIG=$a/conf
    apt-get update || true
    krel=$(apt-cache depends linux-image-arm64:arm64 | sed -n 's/.*Depends: linux-image-\(.*\):arm64/\1/p')
    echo "$krel" >"$W/krel"
    cd "$W/dl"
    apt-get download "linux-image-$krel-unsigned:arm64" busybox-static:arm64 libubootenv-tool:arm64 \
      libubootenv0.1:arm64 libc6:arm64 zlib1g:arm64
    apt-get source --download-only u-boot
  ) >"$W/apt-download.log" 2>&1 || { tail -5 "$W/apt-download.log" >&2; return 1; }
  for f in "$W"/dl/*.deb; do dpkg-deb -x "$f" "$W/x"; done
  touch "$W/dl/.done"
}

uboot() {
  local key
  key=$(cat "$HERE"/uboot/* | sha256sum)
  [ "$key" != "$(cat "$OUT/u-boot.key" 2>/dev/null)" ] || return 0
  step "U-Boot"
  [ -d "$W/uboot" ] || dpkg-source -x "$W"/dl/u-boot_*.dsc "$W/uboot" >/dev/null 2>&1
  cp "$HERE/uboot/env_mmc.c" "$W/uboot/env/mmc.c"
  grep -v '^#' "$HERE/uboot/rig.env" >"$W/uboot/rig.env"
  mkdir -p "$W/ub"
  (
    cd "$W/uboot"
    make O="$W/ub" qemu_arm64_defconfig
    ./scripts/kconfig/merge_config.sh -O "$W/ub" -m "$W/ub/.config" "$HERE/uboot/common.config"
    make O="$W/ub" olddefconfig
    make O="$W/ub" CROSS_COMPILE=$T- -j"$(nproc)" u-boot.bin
  ) >"$W/uboot.log" 2>&1 || { tail -20 "$W/uboot.log" >&2; return 1; }
  cp "$W/ub/u-boot.bin" "$OUT/u-boot.bin"
  echo "$key" >"$OUT/u-boot.key"
}

# Flash memory. Debian's kernel has UBI but no MTD device that QEMU could be: mtdram, which is flash
# in memory, is built from the kernel's source as a module.
flash() {
  local m=$W/mtd krel kver f
  [ ! -e "$m/.done" ] || return 0
  step "flash memory"
  krel=$(cat "$W/krel")
  kver=${krel%-arm64}
  mkdir -p "$m/dl" "$m/x" "$m/k"
  (
    export APT_CONFIG=$W/apt/conf
    cd "$m/dl"
    apt-get download "linux-headers-$krel:arm64" "linux-headers-$kver-common" linux-kbuild-6.1:amd64 linux-source-6.1 mtd-utils:arm64
    for f in linux-headers* linux-kbuild* mtd-utils*; do dpkg-deb -x "$f" "$m/x"; done
    dpkg-deb --fsys-tarfile linux-source-6.1_*.deb | tar -xO ./usr/src/linux-source-6.1.tar.xz |
      tar -xJO linux-source-6.1/drivers/mtd/devices/mtdram.c >"$m/k/mtdram.c"
    sed -i "s,include /usr/src,include $m/x/usr/src," "$m/x/usr/src/linux-headers-$krel/Makefile"
    cat >"$m/k/Kbuild" <<'X'
ccflags-y += -DCONFIG_MTDRAM_TOTAL_SIZE=16384 -DCONFIG_MTDRAM_ERASE_SIZE=64 -DCONFIG_MTDRAM_ABS_POS=0
obj-m += mtdram.o
X
    make -C "$m/x/usr/src/linux-headers-$krel" M="$m/k" ARCH=arm64 CROSS_COMPILE=$T- modules
  ) >"$m/log" 2>&1 || { tail -5 "$m/log" >&2; return 1; }
  cp "$m/k/mtdram.ko" "$m/"
  for f in mtd ubi; do cp "$(find "$W/x/lib/modules/$krel" -name $f.ko)" "$m/"; done
  $T-strip -g "$m"/*.ko
  touch "$m/.done"
}

initramfs() {
  step "initramfs"
  local krel i=$W/initrd m f
  krel=$(cat "$W/krel")
  depmod -b "$W/x" "$krel"
  rm -rf "$i"
  mkdir -p "$i"/{bin,proc,sys,dev,root,modules}
  cp "$W/x/bin/busybox" "$i/bin/busybox"
  install -m 755 "$HERE/rootfs/initrd-init" "$i/init"
  for m in virtio_pci virtio_blk sdhci-pci ext4 virtio_net; do
    modprobe -d "$W/x" -S "$krel" --show-depends "$m" | awk '$1=="insmod"{print $2}'
  done | awk '!s[$0]++' | while read -r f; do
    cp "$f" "$i/modules/"
    basename "$f" >>"$i/modules/order"
  done
  (cd "$i" && find . | sort | busybox cpio -o -H newc 2>/dev/null | gzip -9n) >"$W/initrd.img"
  [ -e "$W/Image" ] || gzip -9nc "$W/x/boot/vmlinuz-$krel" >"$W/Image"
}

# The recovery system: the initramfs with mendlet beside the drivers, and an /init of its own. updater adds the
# server's address.
recovery() {
  local r=$W/recovery
  rm -rf "$r"
  mkdir -p "$r"/{bin,data,etc/mender}
  install -m 755 "$HERE/rootfs/recovery-init" "$r/init"
  install -m 755 "$GUEST" "$r/bin/"
  ln -s mendlet "$r/bin/fw_printenv"
  echo 'root:x:0:0:root:/:/bin/sh' >"$r/etc/passwd"
  echo device_type=rig >"$r/etc/mender/device_type"
  cp "$W/key.pub" "$r/etc/mender/artifact-verify.pem"
  printf '/dev/vda 0x800000 0x20000\n/dev/vda 0x1000000 0x20000\n' >"$r/etc/fw_env.config"
  {
    cat "$W/initrd.img"
    (cd "$r" && find . | sort | busybox cpio -o -H newc 2>/dev/null | gzip -9n)
  } >"$OUT/recovery.img"
  cp "$W/Image" "$OUT/Image"
}

root_tree() {
  local r=$1 a
  rm -rf "$r"
  mkdir -p "$r"/{bin,sbin,usr/bin,usr/sbin,lib/$T,etc/mender,proc,sys,dev,run,tmp,data,boot}
  cp "$W/x/bin/busybox" "$r/bin/"
  for a in $(busybox --list); do [ "$a" = busybox ] || ln -s busybox "$r/bin/$a"; done
  cp -L "$W/x/lib/$T"/{libc.so.6,libz.so.1} "$W/x/usr/lib/$T"/libubootenv.so.0* "$r/lib/$T/"
  cp -L "$W/x/lib/$T/ld-linux-aarch64.so.1" "$r/lib/"
  cp "$W/x/usr/bin/fw_printenv" "$r/usr/bin/"
  ln -s fw_printenv "$r/usr/bin/fw_setenv"
  install -m 755 "$HERE/rootfs/init" "$r/sbin/init"
  install -m 755 "$HERE/rootfs/updater" "$HERE/rootfs/stand-in" "$GUEST" "$r/usr/bin/"
  mkdir -p "$r/lib/mtd"
  cp "$W/mtd"/*.ko "$r/lib/mtd/"
  cp "$W/mtd/x/usr/sbin/ubimkvol" "$r/usr/sbin/"
  ln -s /run/fw_env.config "$r/etc/fw_env.config"
  ln -s /proc/mounts "$r/etc/mtab"
  echo device_type=rig >"$r/etc/mender/device_type"
  cp "$W/key.pub" "$r/etc/mender/artifact-verify.pem"
  cp "$W/Image" "$W/initrd.img" "$r/boot/"
}

# root_image VERSION INODES: the file system and the signed artifact that holds it. The number of
# inodes shifts all files: an updater that writes only what differs would have little to do else.
root_image() {
  local img=$OUT/root-v$1.ext4
  echo "$1" >"$W/root/etc/rig-version"
  rm -f "$img"
  truncate -s ${ROOT_MB}M "$img"
  mke2fs -q -t ext4 -b 4096 -N "$2" -O '^metadata_csum,^orphan_file' -m 0 -E root_owner=0:0 -L root \
    -d "$W/root" "$img"
  "$HOST" pack -n "v$1" -c rig -f "$img" -k "$W/key.pem" --compression gzip -o "$OUT/v$1.mender"
}

images() {
  step "root images and artifacts"
  [ -e "$W/key.pub" ] || {
    openssl ecparam -genkey -name prime256v1 -noout -out "$W/key.pem"
    openssl pkey -in "$W/key.pem" -pubout -out "$W/key.pub"
  }
  root_tree "$W/root"
  local v
  for v in 1 2 3; do root_image $v $((1024 * (1 + v))); done
  # a root whose init dies at once, which is a kernel panic and a reboot
  printf '#!/bin/sh\necho "bad init: exiting"\nexit 1\n' >"$W/root/sbin/init"
  root_image badinit 1024
  # a root whose kernel is garbage
  install -m 755 "$HERE/rootfs/init" "$W/root/sbin/init"
  head -c 1000000 /dev/urandom >"$W/root/boot/Image"
  root_image badkernel 1024
  # a good root that is worth downloading
  cp "$W/Image" "$W/root/boot/Image"
  head -c ${NOISE_MB}M /dev/urandom >"$W/root/boot/noise"
  root_image big 1024
  # an image for a UBI volume, of no even size
  head -c 4000123 /dev/urandom >"$OUT/ubi.img"
  "$HOST" pack -n ubi -c rig -f "$OUT/ubi.img" -k "$W/key.pem" --compression none -o "$OUT/ubi.mender"
  cp "$HERE/../testdata/demo-env.img" "$OUT/"
  # what Mender's client 3.4.0 leaves between the installation of an image and the reboot
  cp "$HERE"/../testdata/stores/3.4.0-{rootfs-standalone-pending,managed-reboot}.mender-store "$OUT/"
}

# 256 MiB because an SD card in QEMU has to be a power of two. The first partition is there so
# that the roots are 2 and 3, as on most Mender devices; it is empty.
disk() {
  step "disk"
  local d=$OUT/disk.img b=$((32 + ROOT_MB)) c=$((32 + 2 * ROOT_MB))
  rm -f "$d"
  truncate -s 256M "$d"
  sgdisk -o -n 1:24M:+8M -c 1:boot -n 2:32M:+${ROOT_MB}M -c 2:roota -n 3:${b}M:+${ROOT_MB}M -c 3:rootb \
    -n 4:${c}M:0 -c 4:data "$d" >/dev/null
  mke2fs -q -t ext4 -E offset=$((c * 1048576)) -L data "$d" $((255 - c))M
  dd if="$OUT/root-v1.ext4" of="$d" bs=1M seek=32 conv=notrunc,sparse status=none
}

host_packages
foreign_packages
uboot
flash
KEY=$(cat "$GUEST" "$0" "$HERE"/rootfs/* "$W/krel" | sha256sum)
if [ "$KEY" != "$(cat "$OUT/images.key" 2>/dev/null)" ]; then
  rm -f "$OUT/images.key"
  initramfs
  images
  recovery
  disk
  echo "$KEY" >"$OUT/images.key"
fi
step "built"
