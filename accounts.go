// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// The users and groups of the device as passwd(5) and group(5) have them: package os/user would be larger, and knows
// no other place and no device without these files.

// account is a user of the device.
type account struct {
	name, home string
	uid, gid   uint32
	groups     []uint32 // supplementary
	known      bool     // there is an entry
}

// findAccount finds a user in passwd, which is in the directory etc or in /etc; of name "" the one who we are. We must
// be able to become it. Without the file, as in an initramfs, root is known all the same.
func findAccount(etc, name string) (*account, error) {
	etc, me := cmp.Or(etc, "/etc"), os.Geteuid()
	column, want := 0, name
	if name == "" {
		column, want = 2, strconv.Itoa(me)
	}
	e, err := accountEntry(etc+"/passwd", column, want)
	a := &account{name: cmp.Or(name, "root"), home: "/"}
	switch {
	case err == nil && len(e) < 7:
		return nil, fmt.Errorf("user %q: %d fields in %q, want 7", want, len(e), etc+"/passwd")
	case err == nil:
		a.name, a.home, a.known = e[0], cmp.Or(e[5], "/"), true
		for i, id := range []*uint32{&a.uid, &a.gid} {
			n, err := strconv.ParseUint(e[2+i], 10, 32)
			if err != nil {
				return nil, fmt.Errorf("user %q in %q: %w", want, etc+"/passwd", err)
			}
			*id = uint32(n)
		}
	case name == "" && me != 0:
		a.name, a.uid, a.gid = want, uint32(me), uint32(os.Getegid())
	case name == "", name == "root" && errors.Is(err, fs.ErrNotExist):
	default:
		return nil, fmt.Errorf("user %q: %w", name, err)
	}
	if me != 0 && int(a.uid) != me {
		return nil, fmt.Errorf("user %q: only root can start a shell of another user", a.name)
	}
	a.groups, err = accountGroups(etc+"/group", a.name)
	return a, err
}

// accountEntry is the line of passwd(5) or group(5) of which the column has the value.
func accountEntry(file string, column int, value string) ([]string, error) {
	lines, err := accountLines(file)
	for _, e := range lines {
		if len(e) > column && e[column] == value {
			return e, nil
		}
	}
	return nil, cmp.Or(err, fmt.Errorf("not in %q", file))
}

// accountLines are the fields of all lines.
func accountLines(file string) (lines [][]string, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for _, line := range strings.Split(string(text), "\n") {
		lines = append(lines, strings.Split(line, ":"))
	}
	return lines, nil
}

// accountGroups are the groups of which name is a member.
func accountGroups(file, name string) (ids []uint32, err error) {
	lines, err := accountLines(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range lines {
		if len(e) != 4 || !slices.Contains(strings.Split(e[3], ","), name) {
			continue
		}
		if id, err := strconv.ParseUint(e[2], 10, 32); err == nil {
			ids = append(ids, uint32(id))
		}
	}
	return ids, nil
}
