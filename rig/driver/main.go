// SPDX-License-Identifier: Apache-2.0

// Command driver boots the A/B device that build.sh made in QEMU, updates it, and cuts its power.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"time"
)

func main() {
	runtime.LockOSThread() // see startVM
	out := flag.String("out", "out", "directory of what build.sh built")
	bus := flag.String("bus", "virtio", "virtio (/dev/vda, a disk with a volatile cache) or sd (/dev/mmcblk0, sector by sector)")
	n := flag.Int("n", 20, "how many power cuts")
	seed := flag.Int64("seed", 1, "where chance begins")
	way := flag.String("stand-in", "", "explore with the stand-in: right-order, or wrong-order, which must be found out")
	deploy := flag.String("deploy", "2", "serve: the version to deploy")
	flag.Parse()
	scenario := flag.Arg(0)
	if scenario == "serve" {
		if err := serve(*out, *deploy); err != nil {
			fmt.Fprintln(os.Stderr, "FAIL serve:", err)
			os.Exit(1)
		}
		return
	}
	name := scenario + "-" + *bus
	if *way != "" {
		name += "-" + *way
	}
	begin := time.Now()
	d, err := newDevice(*out, *bus, name, *seed)
	if err == nil {
		err = d.end(run(d, scenario, *n, *way))
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "FAIL %s: %v\n", name, err)
		os.Exit(1)
	}
	fmt.Printf("ok   %s in %.0f s\n", name, time.Since(begin).Seconds())
}

func run(d *device, scenario string, n int, way string) error {
	switch scenario {
	case "boot":
		return d.interactive()
	case "update":
		return updates(d, "2", "3")
	case "rollback":
		return updates(d, "badinit", "badkernel", "2")
	case "managed":
		return managed(d)
	case "takeover":
		return takeOvers(d)
	case "ubi":
		return ubi(d)
	case "connect", "initramfs-tools", "dracut":
		return connect(d, recoveries[scenario])
	case "cut":
		return cuts(d, n)
	case "download":
		return downloads(d, n)
	case "explore":
		bad, err := explore(d, way)
		switch {
		case err != nil:
			return err
		case way == "wrong-order" && bad == 0:
			return errors.New("the faulty updater was not found out")
		case way != "wrong-order" && bad > 0:
			return fmt.Errorf("%d bad crash states", bad)
		}
		return nil
	}
	return errors.New("usage: driver [flags] boot | update | rollback | managed | takeover | ubi | connect | initramfs-tools |" +
		" dracut | cut | download | explore")
}

// updates runs whole updates, one after the other.
func updates(d *device, versions ...string) error {
	if err := d.on(); err != nil {
		return err
	}
	for _, v := range versions {
		if err := d.update(v); err != nil {
			return err
		}
	}
	return d.off()
}
