// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// takeOvers are two updates that Mender's client 3.4.0 began and whose images have this program in them: one by hand,
// one by a server. The device has what that client leaves between the installation and the reboot, and boots.
func takeOvers(d *device) error {
	s, err := newMenderServer(d.url)
	if err != nil {
		return err
	}
	if err := d.on(); err != nil {
		return err
	}
	if err := d.takeOver("2", "3.4.0-rootfs-standalone-pending", "ArtifactName", ""); err != nil {
		return err
	}
	s.deploy("3")
	if err := d.takeOver("3", "3.4.0-managed-reboot", "artifact_name", " "+s.url); err != nil {
		return err
	}
	if err := s.heard(d, false, "installing", "success"); err != nil {
		return err
	}
	return d.off()
}

// takeOver boots a version that the store's update is of, whose artifact key names.
func (d *device) takeOver(version, store, key, server string) error {
	text, err := os.ReadFile(filepath.Join(d.out, store+".mender-store"))
	if err != nil {
		return err
	}
	named := func(name string) []byte { return []byte(fmt.Sprintf("%q:%q", key, name)) }
	old, now := named("release-2"), named("v"+version)
	now = append(now, strings.Repeat(" ", len(old)-len(now))...) // which JSON has room for
	changed := bytes.ReplaceAll(text, old, now)                  // in pages of earlier transactions, too
	if bytes.Equal(changed, text) {
		return errors.New("the store has no " + string(old))
	}
	if err := os.WriteFile(filepath.Join(d.out, "mender-store"), changed, 0o644); err != nil {
		return err
	}
	return d.updateBy(version, "updater mender "+d.url+"root-v"+version+".ext4 "+d.url+"mender-store"+server)
}
