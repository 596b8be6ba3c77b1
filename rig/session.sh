#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Records a session on a make-believe board as a picture, on standard output: one update that is kept, and one that
# hangs. Every line is what the program prints; the same program gives the same bytes.
# Usage: session.sh MENDLET TESTDATA > doc/session.svg
set -eu
export LC_ALL=C
mendlet=$1
testdata=$2
. "$(dirname "$0")/board.sh"

# On the screen a command is as a person types it.
typed() { echo "\$ $*"; }
shown() { sed "s,$dir/dev/,/dev/,g; s,$dir/,,g"; }
install() {
	typed mendlet install --progress none "release-$1.mender"
	m install --progress none "$dir/release-$1.mender" 2>&1 | shown
}

session() {
	boot > /dev/null
	release 2 2> /dev/null
	release 3 2> /dev/null
	install 2
	typed "mendlet status | tail -n 2"
	m status | tail -n 2 | shown
	typed reboot
	boot
	typed mendlet commit
	m commit 2>&1
	echo
	install 3
	typed reboot
	boot
	echo "# release 3 hangs; a watchdog resets the board"
	boot
	typed mendlet commit
	m commit 2>&1 | shown || true
	typed mendlet show-artifact
	m show-artifact
}

session > "$dir/said" # and not into the pipe, which would hide where it failed

# A terminal of 100 columns. Lines are broken as it breaks them.
awk -v columns=100 '
function escape(s) { gsub(/&/, "\\&amp;", s); gsub(/</, "\\&lt;", s); gsub(/>/, "\\&gt;", s); return s }
function put(s, class) { n++; text[n] = "<text x=\"16\" y=\"" 46 + n * 18 "\" class=\"" class "\">" escape(s) "</text>" }
{
	class = "o"
	if (/^\$ /) class = "c"
	if (/^#/ || /^U-Boot: /) class = "b"
	if (/^mendlet: /) class = "m"
	if (/^mendlet: (error|warning)/) class = "e"
	for (line = $0; length(line) > columns; line = substr(line, columns + 1)) put(substr(line, 1, columns), class)
	put(line, class)
}
END {
	width = 32 + columns * 7.83
	height = 64 + n * 18
	printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" role=\"img\">\n", width, height, width, height
	print "<title>A session: an update that is kept, and one that hangs and is taken back by the bootloader</title>"
	print "<style>text{font:13px ui-monospace,Menlo,Consolas,\"DejaVu Sans Mono\",monospace;white-space:pre}"
	print ".o{fill:#d8dee9}.c{fill:#a3e28b;font-weight:bold}.m{fill:#8fc7ff}.e{fill:#ff9c8a}.b{fill:#e8c872}</style>"
	print "<rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#1c2128\"/>"
	print "<circle cx=\"20\" cy=\"20\" r=\"6\" fill=\"#ff5f56\"/><circle cx=\"40\" cy=\"20\" r=\"6\" fill=\"#ffbd2e\"/><circle cx=\"60\" cy=\"20\" r=\"6\" fill=\"#27c93f\"/>"
	for (i = 1; i <= n; i++) print text[i]
	print "</svg>"
}' "$dir/said"
