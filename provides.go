// SPDX-License-Identifier: Apache-2.0

package main

import (
	"maps"
	"slices"
	"strings"
)

// checkDepends says whether the artifact is for this device. provides is what the device
// has stored, artifact_name and artifact_group among it.
func (a *artifact) checkDepends(deviceType string, provides map[string]string) error {
	if !slices.Contains(a.DeviceTypes, deviceType) {
		return refuse("artifact %q is for device type %q; this device is %q", a.Name, strings.Join(a.DeviceTypes, ", "), deviceType)
	}
	for _, key := range sortedKeys(a.Depends) {
		got, ok := provides[key]
		if !ok {
			return refuse("artifact %q depends on %s %q; this device provides no %s", a.Name, key, a.Depends[key], key)
		}
		if !slices.Contains(a.Depends[key], got) {
			return refuse("artifact %q depends on %s %q; this device provides %q", a.Name, key, a.Depends[key], got)
		}
	}
	return nil
}

// mergeProvides is what the device provides once a is installed. stored is not changed.
// Without clears_artifact_provides everything stored goes, also when the artifact provides
// nothing itself.
func mergeProvides(stored map[string]string, a *artifact) map[string]string {
	merged := map[string]string{}
	if a.Clears != nil {
		maps.Copy(merged, stored)
		maps.DeleteFunc(merged, func(key, _ string) bool {
			return slices.ContainsFunc(a.Clears, func(p string) bool { return matchClears(p, key) })
		})
	}
	maps.Copy(merged, a.Provides)
	merged["artifact_name"] = a.Name
	if a.Group != "" {
		merged["artifact_group"] = a.Group
	}
	return merged
}

// matchClears matches the whole key. "*" is any run of characters, "\*" a star, everything
// else stands for itself.
func matchClears(pattern, key string) bool {
	const star = "\x00"
	if strings.HasSuffix(pattern, `\`) || strings.Contains(pattern+key, star) {
		return false
	}
	parts := strings.Split(strings.ReplaceAll(pattern, `\*`, star), "*")
	for i, p := range parts {
		parts[i] = strings.ReplaceAll(p, star, "*")
	}
	key, ok := strings.CutPrefix(key, parts[0])
	if !ok || len(parts) == 1 {
		return ok && key == ""
	}
	last := len(parts) - 1
	for _, p := range parts[1:last] {
		_, after, found := strings.Cut(key, p)
		if !found {
			return false
		}
		key = after
	}
	return strings.HasSuffix(key, parts[last])
}
