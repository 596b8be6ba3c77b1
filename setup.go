// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

// setupFlags are the options of Mender's own "setup" as far as they need nobody to answer
// questions.
type setupFlags struct {
	serverURL, serverCert, tenantToken, deviceType, partA, partB string
	updatePoll, inventoryPoll, retryPoll                         int
	hosted                                                       bool
}

func setupVerbFlags(fs *flag.FlagSet, o *options) {
	s, c := &o.net.setup, defaultConfig(defaultPaths())
	fs.StringVar(&s.serverURL, "server-url", "", "`URL` of the Mender server; it replaces a list of servers")
	fs.BoolVar(&s.hosted, "hosted-mender", false, "use https://hosted.mender.io")
	fs.StringVar(&s.serverCert, "server-cert", "", "`FILE` with a certificate to trust")
	fs.StringVar(&s.tenantToken, "tenant-token", "", "`TOKEN` of the organisation")
	fs.StringVar(&s.deviceType, "device-type", "", "`NAME` that artifacts for this board are made with")
	fs.StringVar(&s.partA, "rootfs-part-a", "", "`DEVICE` of the first root partition")
	fs.StringVar(&s.partB, "rootfs-part-b", "", "`DEVICE` of the second root partition")
	poll := func(p *int, name, what string, unset int) {
		fs.IntVar(p, name, 0, fmt.Sprintf("%s, in `SECONDS` (%d if the configuration has none)", what, unset))
	}
	poll(&s.updatePoll, "update-poll", "time between polls", c.UpdatePollIntervalSeconds)
	poll(&s.inventoryPoll, "inventory-poll", "time between inventories", c.InventoryPollIntervalSeconds)
	poll(&s.retryPoll, "retry-poll", "longest wait after failures", c.RetryPollIntervalSeconds)
}

// setup lays the options over the keys that the configuration file has already.
func (a *app) setup() error {
	s, path := &a.o.net.setup, a.o.mainConfig()
	keys := map[string]any{}
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &keys)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("configuration %q: %w", path, err)
	}
	if s.hosted {
		s.serverURL = "https://hosted.mender.io"
	}
	for name, v := range map[string]string{"ServerURL": s.serverURL, "ServerCertificate": s.serverCert, "TenantToken": s.tenantToken,
		"RootfsPartA": s.partA, "RootfsPartB": s.partB} {
		if v != "" {
			keys[name] = v
		}
	}
	if s.serverURL != "" {
		delete(keys, "Servers")
	}
	for name, v := range map[string]int{"UpdatePollIntervalSeconds": s.updatePoll, "InventoryPollIntervalSeconds": s.inventoryPoll,
		"RetryPollIntervalSeconds": s.retryPoll} {
		if v > 0 {
			keys[name] = v
		}
	}
	if text, err = json.MarshalIndent(keys, "", "  "); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := writeFileDurably(path, append(text, '\n'), 0o600); err != nil { // it may hold a tenant token
		return err
	}
	if s.deviceType == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(a.c.DeviceTypeFile), 0o755); err != nil {
		return err
	}
	return writeFileDurably(a.c.DeviceTypeFile, []byte("device_type="+s.deviceType+"\n"), 0o644)
}
