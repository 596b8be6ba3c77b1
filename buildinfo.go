// SPDX-License-Identifier: Apache-2.0

//go:build !nobuildinfo

package main

import (
	"runtime/debug"
	"strings"
)

// What a plain go build knows of the version. make links the version in, and leaves this out.
func init() {
	if version == "" {
		info, _ := debug.ReadBuildInfo()
		release = buildVersion(strings.TrimSpace(release), info)
	}
}

// buildVersion is the version of a program that a plain go build made; info may be nil.
func buildVersion(release string, info *debug.BuildInfo) string {
	if info == nil || strings.Contains(release, "+") {
		return release
	}
	vcs := map[string]string{}
	for _, s := range info.Settings {
		vcs[s.Key] = s.Value
	}
	if hash := vcs["vcs.revision"]; hash != "" {
		release += "+" + hash[:min(len(hash), 7)]
		if vcs["vcs.modified"] == "true" {
			release += ".dirty"
		}
	}
	return release
}
