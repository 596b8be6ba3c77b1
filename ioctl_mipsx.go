// SPDX-License-Identifier: Apache-2.0

//go:build mips || mipsle || mips64 || mips64le

package main

// Directions of an ioctl request on MIPS, which has three bits for them:
// arch/mips/include/uapi/asm/ioctl.h.
const (
	ioctlNone     = 1
	ioctlWrite    = 4
	ioctlRead     = 2
	ioctlDirShift = 29
)
