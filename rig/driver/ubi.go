// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ubi lets the device change an environment on flash memory, by way of fw_setenv, and install into a
// UBI volume, which the kernel guards while it is written. The updater script does it and says what
// came of each step.
func ubi(d *device) error {
	image, err := os.ReadFile(filepath.Join(d.out, "ubi.img"))
	if err != nil {
		return err
	}
	if err := d.on(); err != nil {
		return err
	}
	if err := d.vm.send("updater ubi " + d.url); err != nil {
		return err
	}
	text, err := d.vm.wait(`RIG-UBI commit [^\n]* end`, updateLimit, nil)
	if err != nil {
		return err
	}
	for _, want := range []string{"env exit=0 mender_boot_part=3 upgrade_available=1 end", "half shut", "install exit=0 part=1", fmt.Sprintf("sum=%x", sha256.Sum256(image)), "commit exit=0 artifact=ubi end"} {
		if !strings.Contains(text, "RIG-UBI "+want) {
			return fmt.Errorf("no line %q from the device: %s", want, tail([]byte(text)))
		}
	}
	d.say("a volume cut off was shut, and then held the image")
	return d.off()
}
