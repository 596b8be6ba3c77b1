# SPDX-License-Identifier: Apache-2.0
# A make-believe board on image files, for the scripts beside this one: . board.sh, with the program in $mendlet and
# testdata in $testdata. It is in $dir and runs $slot; its devices are files below $dir/dev.
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/dev"
export MENDER_CONF_DIR="$dir" MENDER_DATA_DIR="$dir" # no scripts of this machine
cp "$testdata/demo-env.img" "$dir/dev/mmcblk0boot1"
printf '%s 0x0 0x400\n%s 0x400 0x400\n' "$dir/dev/mmcblk0boot1" "$dir/dev/mmcblk0boot1" > "$dir/fw_env.config"
echo "{}" > "$dir/none.conf" # not that of this machine
printf 'device_type=demo-board\n' > "$dir/device_type"
printf '{"RootfsPartA": "%s/dev/mmcblk0p2", "RootfsPartB": "%s/dev/mmcblk0p3", "FwEnvConfig": "%s/fw_env.config",
 "DeviceTypeFile": "%s/device_type", "BootEnv": "native"}\n' "$dir" "$dir" "$dir" "$dir" > "$dir/mender.conf"

m() { "$mendlet" "$@" -c "$dir/mender.conf" -b "$dir/none.conf" -d "$dir" --running "$slot"; }
env() { "$mendlet" -c "$dir/mender.conf" -b "$dir/none.conf" -d "$dir" env "$@"; }
# What it says has the names that its files stand for.
run() { echo "\$ mendlet $*" | sed "s,$dir/,,g"; m "$@" 2>&1 | sed "s,$dir/dev/,/dev/,g; s,$dir/,,g"; }
image() { yes "This is release $1 of the demo system." | head -c 8000000; }
runs() { head -n 1 "$dir/dev/mmcblk0p$part"; }

# release N packs an artifact.
release() {
	image "$1" > "$dir/rootfs.img"
	"$mendlet" pack -n "release-$1" -c demo-board -f "$dir/rootfs.img" -o "$dir/release-$1.mender"
}

# What U-Boot does at power-on, by Mender's boot script.
boot() {
	if [ "$(env print -n upgrade_available)" = 1 ]; then
		count=$(($(env print -n bootcount) + 1))
		env set bootcount=$count
		if [ $count -gt 1 ]; then
			other=$((5 - $(env print -n mender_boot_part)))
			env set mender_boot_part=$other mender_boot_part_hex=$other upgrade_available=0
			echo "U-Boot: second boot without a commit: back to the other slot"
		fi
	fi
	part=$(env print -n mender_boot_part)
	if [ "$part" = 2 ]; then slot=A; else slot=B; fi
	echo "U-Boot: boots slot $slot (partition $part). It says: $(runs)"
}

image 1 > "$dir/dev/mmcblk0p2"
head -c 10000000 /dev/zero > "$dir/dev/mmcblk0p3"
