// SPDX-License-Identifier: Apache-2.0

//go:build !mips && !mipsle && !mips64 && !mips64le

package main

// Directions of an ioctl request and where they stand in it: asm-generic/ioctl.h.
const (
	ioctlNone     = 0
	ioctlWrite    = 1
	ioctlRead     = 2
	ioctlDirShift = 30
)
