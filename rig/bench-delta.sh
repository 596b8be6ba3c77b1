#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What an update costs over a slow line when the device has the version before it: mendlet's delta, beside the whole
# image, Debian's zchunk and casync, the patch between the two images by zstd, and what RAUC's adaptive updates fetch
# at least. nginx is in one network namespace, the device in another, and between them the line of rig/bench/link.go.
# Writes doc/performance.md. Needs root, Debian, /dev/net/tun, 20 GB in DIR.
#   KINDS="sec app full"          updates, of rig/delta-pairs.sh
#   FILES="ext4 squashfs erofs"   file systems
#   PEERS="mendlet zstd zchunk casync rauc"   with less of any of these nothing is written to doc/
#   PAIRS=rig/out/pairs DIR=rig/out/delta     the images, and all else that is made; both stay, for the next time
#   RATE=10000000 RTT=50ms        bits a second, round trip
# Usage: bench-delta.sh [GO]
set -eu
go=${1:-go}
here=$(cd "$(dirname "$0")" && pwd)
pairs=${PAIRS:-$here/out/pairs} work=${DIR:-$here/out/delta}
kinds=${KINDS:-sec app full} files=${FILES:-ext4 squashfs erofs} peers=${PEERS:-mendlet zstd zchunk casync rauc}
rate=${RATE:-10000000} rtt=${RTT:-50ms}
if [ "$(id -u)" != 0 ] || [ ! -c /dev/net/tun ]; then
	echo "needs root and /dev/net/tun: a line between two network namespaces"
	exit 1
fi
missing=
for p in nginx-light zchunk casync zstd mender-artifact iproute2; do
	dpkg-query -W -f='${Status}' $p 2> /dev/null | grep -q 'ok installed' || missing="$missing $p"
done
if [ -n "$missing" ]; then
	echo "installing$missing"
	apt-get update -qq || true
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null
fi
DIR=$pairs sh "$here/delta-pairs.sh" "$go" > /dev/null
mkdir -p "$work/www"
work=$(cd "$work" && pwd) pairs=$(cd "$pairs" && pwd)
(cd "$here/bench" && "$go" test . > /dev/null && CGO_ENABLED=0 "$go" build -trimpath -o "$work/driver" .)
cp -pf "$here/../mendlet" "$work/mendlet"

server=mendlet-s$$ client=mendlet-c$$ link='' nginx=''
cleanup() {
	for pid in $nginx $link; do
		kill "$pid" 2> /dev/null || true
		wait "$pid" 2> /dev/null || true
	done
	ip netns del $server 2> /dev/null || true
	ip netns del $client 2> /dev/null || true
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP

# end NAMESPACE DEVICE ADDRESS: one end of the line
end() {
	ip netns add "$1"
	ip link set "$2" netns "$1"
	ip -n "$1" link set "$2" addrgenmode none
	ip -n "$1" address add "$3/24" dev "$2"
	ip -n "$1" link set "$2" up
	ip -n "$1" link set lo up
}
appears() { while [ ! -e "$1" ]; do sleep 0.05; done; }
rm -f "$work/stat"
"$work/driver" link -rate "$rate" -rtt "$rtt" -server mdl-s -client mdl-c -stat "$work/stat" &
link=$!
appears "$work/stat"
end $server mdl-s 10.77.0.1
end $client mdl-c 10.77.0.2
cat > "$work/nginx.conf" << X
daemon off; worker_processes 1; pid $work/nginx.pid; error_log $work/nginx.error; user root;
events {}
http {
	log_format range '\$status \$body_bytes_sent \$http_range \$request_uri';
	access_log $work/requests range;
	default_type application/octet-stream; sendfile on; keepalive_requests 100000;
	server { listen 10.77.0.1:80; root $work/www; }
}
X
rm -f "$work/nginx.pid"
ip netns exec $server nginx -p "$work" -c "$work/nginx.conf" &
nginx=$!
appears "$work/nginx.pid"
url=http://10.77.0.1

# device WHAT…: what it takes on the device, over the line: "SECONDS BYTES_OF_MEMORY"
device() { ip netns exec $client "$work/driver" measure "$@"; }
# begin, and then fetched: "BYTES CONNECTIONS REQUESTS" since
begin() {
	fetched > /dev/null
	: > "$work/requests"
}
fetched() {
	rm -f "$work/stat"
	kill -USR1 "$link"
	appears "$work/stat"
	echo "$(cat "$work/stat") $(wc -l < "$work/requests")"
}

# row WHAT BYTES REQUESTS SECONDS MEMORY: a line of the table; "-" is nothing. $whole is the whole image's size.
row() {
	echo "$kind $fs $2 $1" >> "$work/figures"
	echo "$2 $whole $3 $4 $5" | awk -v n="$kind, $fs" -v w="$1" '{
		printf "| %s | %s | %.2f | %.1f | %s | %s | %s |\n", n, w, $1 / 1e6, 100 * $1 / $2, $3, \
			$4 == "-" ? "" : sprintf("%.0f", $4), $5 == "-" ? "" : sprintf("%.0f", $5 / 1048576)}' | sed 's/ - / /g'
}
# taken WHAT SECONDS MEMORY: a row of what went over the line since begin
taken() {
	what=$1 seconds=$2 memory=$3
	# shellcheck disable=SC2046
	set -- $(fetched)
	row "$what" "$1" "$3" "$seconds" "$memory"
}
same() { # IMAGE FILE
	cmp -n "$(stat -c %s "$1")" "$1" "$2" || {
		echo "$2 is not $1" >&2
		exit 1
	}
}
# made FILE FROM…: it is there and newer than what it is made of
made() {
	out=$1
	shift
	[ -s "$out" ] && [ -z "$(find "$@" -newer "$out")" ]
}

of_mendlet() {
	artifact=$work/www/$kind.$fs.mender
	made "$artifact" "$new" "$work/mendlet" ||
		"$work/mendlet" pack --delta -n "$kind" -c demo-board -f "$new" -o "$artifact" > /dev/null
	(
		export TMPDIR="$work" # of the board's slots
		printf '#!/bin/sh\nexec ip netns exec %s %s/driver measure %s/mendlet "$@"\n' \
			$client "$work" "$work" > "$work/measured"
		chmod +x "$work/measured"
		mendlet=$work/mendlet testdata=$here/../testdata
		. "$here/board.sh"
		# shellcheck disable=SC2154 # of board.sh
		cp "$old" "$dir/dev/mmcblk0p2"
		rm "$dir/dev/mmcblk0p3"
		truncate -s "$(($(stat -c %s "$new") / 1048576 + 64))M" "$dir/dev/mmcblk0p2" "$dir/dev/mmcblk0p3"
		slot=A mendlet=$work/measured
		begin
		took=$(m install --delta=only "$url/$kind.$fs.mender")
		same "$new" "$dir/dev/mmcblk0p3"
		# shellcheck disable=SC2086
		taken mendlet $took
	)
	size=$(stat -c %s "$artifact")
	echo "$kind $fs $size artifact" >> "$work/figures"
}
of_zstd() { # only the size: a patch from each old version must be made, kept, and chosen
	made "$work/$kind.$fs.patch" "$new" "$old" ||
		zstd -q -f -3 --long=30 --patch-from="$old" "$new" -o "$work/$kind.$fs.patch"
	row patch "$(stat -c %s "$work/$kind.$fs.patch")" 1 - -
}
of_zchunk() {
	for n in old "$kind"; do
		made "$work/www/$n.$fs.zck" "$pairs/$n.$fs" || zck -o "$work/www/$n.$fs.zck" "$pairs/$n.$fs"
	done
	rm -rf "$work/zchunk"
	mkdir "$work/zchunk"
	begin
	took=$(cd "$work/zchunk" && device zckdl -s "$work/www/old.$fs.zck" "$url/$kind.$fs.zck")
	same "$work/www/$kind.$fs.zck" "$work/zchunk/$kind.$fs.zck"
	# shellcheck disable=SC2086
	taken zchunk $took
	rm -r "$work/zchunk"
}
of_casync() {
	made "$work/www/$kind.$fs.caibx" "$new" ||
		casync make --store="$work/www/$kind.$fs.castr" "$work/www/$kind.$fs.caibx" "$new" > /dev/null
	rm -f "$work/casync.image"
	begin
	took=$(device casync extract --store="$url/$kind.$fs.castr" --seed="$old" \
		"$url/$kind.$fs.caibx" "$work/casync.image")
	same "$new" "$work/casync.image"
	# shellcheck disable=SC2086
	taken casync $took
	rm "$work/casync.image"
}
of_rauc() { row "RAUC" "$("$work/driver" adaptive "$old" "$new")" - - -; }

# table prints it; what it is of is in $work/figures.
table() {
	echo "| update, file system | by | fetched, MB | % of the whole | requests | time, s | memory, MiB |"
	echo "|---|---|--:|--:|--:|--:|--:|"
	for fs in $files; do
		for kind in $kinds; do
			old=$pairs/old.$fs new=$pairs/$kind.$fs
			made "$work/$kind.$fs.whole" "$new" ||
				mender-artifact write rootfs-image -n "$kind" -t demo-board -f "$new" -o "$work/$kind.$fs.whole" > /dev/null
			whole=$(stat -c %s "$work/$kind.$fs.whole")
			row "whole" "$whole" 1 "$((whole * 8 / rate))" -
			for peer in $peers; do of_"$peer"; done
		done
	done
}
: > "$work/figures"
table | tee "$work/table"

# What was set out to reach. A missed goal is said, and does not fail: the numbers are what they are.
awk '
	{ at[$1 "," $2] = 1; of[$1 "," $2 "," $4] = $3 }
	function goal(text, got, most) {
		if (got == "" || most == "") return
		printf "%s: %s, %.2f of %.2f MB\n", got + 0 <= most + 0 ? "met" : "MISSED", text, got / 1e6, most / 1e6
	}
	function scaled(x, by) { return x == "" ? "" : x * by }
	END {
		goal("ext4, security update: 2.2 % of the whole", of["sec,ext4,mendlet"], scaled(of["sec,ext4,whole"], 0.022))
		goal("squashfs, security update: 3 % of the whole", of["sec,squashfs,mendlet"],
			scaled(of["sec,squashfs,whole"], 0.03))
		for (r in at) {
			goal(r ": not more than zchunk", of[r ",mendlet"], of[r ",zchunk"])
			goal(r ": not more than casync", of[r ",mendlet"], of[r ",casync"])
			if (r ~ /^sec/) goal(r ": twice the patch", of[r ",mendlet"], scaled(of[r ",patch"], 2))
			goal(r ": artifact 4 % larger than by mender-artifact", of[r ",artifact"], scaled(of[r ",whole"], 1.04))
		}
	}' "$work/figures" | sort | tee "$work/goals"

[ "$kinds,$files,$peers" = "sec app full,ext4 squashfs erofs,mendlet zstd zchunk casync rauc" ] || exit 0
mib() { echo $(($(stat -c %s "$pairs/old.$1") / 1048576)); }
doc=$here/../doc/performance.md
{
	sed '/^<!-- bench-delta: begin/q' "$doc"
	echo "Measured by \`make bench-delta\` with $("$work/mendlet" --version | head -n 1) over" \
		"$((rate / 1000000)) Mbit/s and a round trip of $rtt; bytes are TCP's payload that arrived. The whole is the" \
		"artifact that mender-artifact makes, by gzip. The old image has $(mib ext4) MiB as ext4, $(mib squashfs) as" \
		"squashfs, $(mib erofs) as erofs."
	echo
	cat "$work/table"
	echo
	sed 's/^/- /' "$work/goals"
	sed -n '/^<!-- bench-delta: end/,$p' "$doc"
} > "$work/performance.md"
cp "$work/performance.md" "$doc"
