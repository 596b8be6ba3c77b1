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
    busybox-static e2fsprogs gdisk kmod device-tree-compiler xz-utils openssl mender-cli qemu-user-static; do
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

# Recovery systems as initramfs-tools and dracut make them with what is in packaging/, in an arm64 Debian that QEMU's
# user mode runs. No package is configured there; the kernel knows the emulator in a user namespace alone (Linux 6.7),
# and without that there are no such systems.
debian() {
  local m=$W/debian
  [ ! -e "$m/.done" ] || return 0
  step "arm64 Debian with initramfs-tools and dracut"
  rm -rf "$m"
  mkdir -p "$m/dl/partial" "$m/root/usr"/{bin,sbin,lib}
  sed 's/^APT::Architecture.*/APT::Architecture "arm64"; APT::Architectures {"arm64";}; APT::Sandbox::User "root";/' \
    "$W/apt/conf" >"$m/conf"
  {
    APT_CONFIG=$m/conf apt-get update || true
    APT_CONFIG=$m/conf apt-get install -y -d --no-install-recommends -o Dir::Cache::archives="$m/dl" bash dash \
      coreutils sed grep findutils gzip mawk dpkg util-linux mount libc-bin procps udev busybox initramfs-tools-core \
      dracut-network
  } >"$m/log" 2>&1 || { tail -5 "$m/log" >&2; return 1; }
  local d f
  for d in bin sbin lib; do ln -s "usr/$d" "$m/root/$d"; done
  for f in "$m/dl"/*.deb; do dpkg-deb --fsys-tarfile "$f" | tar -x --keep-directory-symlink -C "$m/root"; done
  ln -sf mawk "$m/root/usr/bin/awk"
  ln -sf which.debianutils "$m/root/usr/bin/which"
  mkdir -p "$m/root/lib/modules" "$m/root/etc/mender" "$m/root/var/tmp"
  touch "$m/.done"
}

# In the Debian above: inside COMMAND...
inside() {
  unshare -r -m -p -f bash -c '
    set -e
    mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
    # EM_AARCH64 of linux/elf-em.h, in executables and shared objects; F: opened now
    z3="\\x00\\x00\\x00" f3="\\xff\\xff\\xff"
    magic="\\x7fELF\\x02\\x01\\x01$z3$z3$z3\\x02\\x00\\xb7\\x00" mask="$f3$f3\\xff\\x00$f3$f3\\xff\\xff\\xfe$f3"
    echo ":rig:M::$magic:$mask:$1:F" >/proc/sys/fs/binfmt_misc/register
    root=$2
    shift 2
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount --rbind /sys "$root/sys"
    exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"' \
    - "$(command -v qemu-aarch64-static)" "$W/debian/root" "$@" >"$W/debian/log" 2>&1
}

packaged() {
  rm -f "$OUT"/packaged-*.img
  debian
  if ! inside true; then
    step "no packaged recovery systems: $(tail -n 1 "$W/debian/log")"
    return 0
  fi
  step "recovery systems by the packaged hooks"
  local p=$HERE/../packaging r=$W/debian/root krel e m f
  krel=$(cat "$W/krel")
  rm -rf "$r/lib/modules/$krel"
  # of all drivers those of the board, or each would be looked at, in emulation
  cp "$W/x/boot/config-$krel" "$r/boot/"
  for m in virtio_pci virtio_blk virtio_net ext4; do
    modprobe -d "$W/x" -S "$krel" --show-depends "$m" | awk '$1 == "insmod" { print $2 }'
  done | sort -u | sed "s,^$W/x/,," |
    tar -c -C "$W/x" -T - "lib/modules/$krel"/modules.{builtin,builtin.modinfo,order} | tar -x --keep-directory-symlink -C "$r"
  depmod -b "$r" "$krel"
  # as packaging/README.md says
  e=$r/etc/initramfs-tools m=$r/usr/lib/dracut/modules.d/90mendlet
  install -D -m 755 "$GUEST" "$r/usr/sbin/mendlet"
  install -D -m 755 "$p/initramfs-tools/mendlet" "$e/hooks/mendlet"
  install -D -m 755 "$p/initramfs-tools/mendlet-connect" "$e/scripts/panic/mendlet-connect"
  install -D -m 755 "$p/initramfs-tools/mendlet-connect-end" "$e/scripts/init-bottom/mendlet-connect-end"
  install -D -m 755 "$p/dracut/module-setup.sh" "$m/module-setup.sh"
  for f in mendlet-connect mendlet-connect-end; do install -m 755 "$p/initramfs-tools/$f" "$m/$f.sh"; done
  # the device
  echo device_type=rig >"$r/etc/mender/device_type"
  cp "$W/key.pub" "$r/etc/mender/artifact-verify.pem"
  printf '/dev/vda 0x800000 0x20000\n/dev/vda 0x1000000 0x20000\n' >"$r/etc/fw_env.config"
  echo '{"DeviceTypeFile": "/etc/mender/device_type", "ArtifactVerifyKey": "/etc/mender/artifact-verify.pem"}' \
    >"$r/etc/mender/mender.conf"
  sed -i 's/^BUSYBOX=.*/BUSYBOX=y/; s/^COMPRESS=.*/COMPRESS=gzip/' "$e/initramfs.conf"
  inside mkinitramfs -o /initramfs-tools.img "$krel" || { tail -5 "$W/debian/log" >&2; return 1; }
  inside dracut --force --no-hostonly --no-compress --kver "$krel" \
    -m "dash base busybox kernel-modules udev-rules rootfs-block network mendlet" /dracut.img ||
    { tail -5 "$W/debian/log" >&2; return 1; }
  gzip -1nc "$r/dracut.img" >"$OUT/packaged-dracut.img"
  mv "$r/initramfs-tools.img" "$OUT/packaged-initramfs-tools.img"
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
KEY=$(cat "$GUEST" "$0" "$HERE"/rootfs/* "$HERE"/../packaging/{initramfs-tools,dracut}/* "$W/krel" | sha256sum)
if [ "$KEY" != "$(cat "$OUT/images.key" 2>/dev/null)" ]; then
  rm -f "$OUT/images.key"
  initramfs
  images
  recovery
  packaged
  disk
  echo "$KEY" >"$OUT/images.key"
fi
step "built"
