// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// What other processes are to know of a connection to the server: that there is a program for it, and whether the
// connection stands. Both are locks of an empty file, which end with the process.

const connectMarkName = "mendlet.connect"

// connectMark is the file, held open; nil where there can be none.
type connectMark struct{ f *os.File }

// takeConnectMark is an error with exit code 75 if another process has it: the server would end the connection of
// one for that of the other, again and again.
func takeConnectMark(ds string, lg *logger) (*connectMark, error) {
	d, err := openDir(ds)
	if err == nil {
		defer d.Close()
		var f *os.File
		if f, err = d.open(connectMarkName, os.O_RDWR|os.O_CREATE, 0o600); err == nil {
			if err = flock(context.Background(), f, 0, nil); err == nil {
				return &connectMark{f}, nil
			}
			f.Close()
		}
	}
	if errors.Is(err, errLocked) {
		return nil, withHint(tryLater("another 'mendlet connect' is running: %w", err),
			"a device has one connection: name all that is to be offered in one command")
	}
	lg.warnf("'mendlet status' will not know of the connection: %v", err)
	return &connectMark{}, nil
}

// stands says whether there is a connection now.
func (m *connectMark) stands(yes bool) {
	kind := int16(syscall.F_UNLCK)
	if yes {
		kind = syscall.F_WRLCK
	}
	if m.f != nil {
		lockMark(m.f, syscall.F_SETLK, kind)
	}
}

func (m *connectMark) close() {
	if m.f != nil {
		funlock(m.f)
	}
}

// connectionState is what status says of it; "" where there was no connection ever.
func connectionState(ds string) string {
	d, err := openDir(ds)
	if err != nil {
		return ""
	}
	defer d.Close()
	f, err := d.open(connectMarkName, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	if err != nil {
		return "not known: " + oneLine(err.Error())
	}
	defer f.Close()
	lock, err := lockMark(f, syscall.F_GETLK, syscall.F_WRLCK)
	switch {
	case err != nil:
		return "not known: " + oneLine(err.Error())
	case lock.Type == syscall.F_UNLCK:
		return "none"
	}
	return fmt.Sprintf("stands, process %d", lock.Pid)
}
