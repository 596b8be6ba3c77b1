// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"compress/gzip"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// The block device of a file system, as it is at one moment, on standard output. Meanwhile the file system is frozen
// (FIFREEZE): all of it is on the medium, and whoever writes to it waits. That it thaws again is up to a child in
// a session of its own, which outlives this process, and up to this process, which outlives the child.

const (
	guardName      = "mendlet-thaw" // argv[0] of that child
	freezePatience = 30 * time.Second
	dumpBlock      = 256 << 10 // bytes
)

var (
	fiFreeze = ioctlNumber(ioctlRead|ioctlWrite, 4, 'X', 119) // linux/fs.h
	fiThaw   = ioctlNumber(ioctlRead|ioctlWrite, 4, 'X', 120)
)

func snapshotVerbs() []verb {
	return []verb{{"snapshot", "dump", "write the running system's block device to standard output", 1,
		func(fs *flag.FlagSet, o *options) {
			fs.StringVar(&o.source, "source", "/", "a `DIR` on the file system to dump, or its block device")
			const kinds = "`KIND` of compression: none or gzip"
			fs.StringVar(&o.compression, "compression", "none", kinds)
			fs.StringVar(&o.compression, "C", "none", kinds)
		}, func(ctx context.Context, a *app, words []string) error {
			if words[0] != "dump" {
				return usageError("snapshot %q: want dump", words[0])
			}
			return dump(ctx, a)
		}}}
}

func dump(ctx context.Context, a *app) error {
	if c := a.o.compression; c != "none" && c != "gzip" {
		return usageError("snapshot: compression %q: want none or gzip", c)
	}
	node, number, err := dumpSource(a)
	if err != nil {
		return err
	}
	if err := keepClear(a, number); err != nil {
		return err
	}
	st, err := a.m.open(node, openRead)
	if err != nil {
		return err
	}
	defer st.Close()
	if d, ok := st.(*device); ok {
		d.setDirect(true) // the page cache of a device may hold what was in its files before
	}
	if f, ok := a.out.(*os.File); ok {
		if x, err := f.Stat(); err == nil && x.Mode()&os.ModeNamedPipe != 0 {
			// mender-artifact drops what comes along with the line by which it knows that the image follows.
			if err := a.m.sleep(ctx, time.Second); err != nil {
				return tryLater("interrupted: %w", err)
			}
		}
	}
	g, err := a.freeze(number)
	if err != nil {
		a.lg.warnf("%q is not frozen: %v; what is written to it now may make the copy inconsistent", node, err)
	}
	defer context.AfterFunc(ctx, g.release)()
	err = copyDevice(ctx, a, st, g)
	if gerr := g.thaw(); err == nil {
		err = gerr
	}
	if err != nil {
		return fmt.Errorf("%q: %w", node, err)
	}
	a.lg.infof("%q: %s", node, mega(st.Size()))
	return nil
}

// dumpSource is the device to dump: its node, found without udev, and its number.
func dumpSource(a *app) (node, number string, err error) {
	source := a.o.source
	st, err := os.Stat(source)
	if err != nil {
		return "", "", err
	}
	on, number := numbersOf(st)
	switch {
	case number != "":
		return source, number, nil
	case !st.IsDir():
		return "", "", refuse("source %q: want a directory or a block device", source)
	case strings.HasPrefix(on, "0:"):
		return "", "", withHint(refuse("source %q is on a file system without a device of its own (%s)", source, on),
			"name the block device with --source")
	}
	if node, err = a.m.nodeOf(on); err == nil && deviceNumber(node) != on {
		err = refuse("source %q is on device %s, and %q is not that", source, on, node)
	}
	return node, on, err
}

// numbersOf gives the number of the device that a directory or regular file is on, and of the one that a block
// device is; else "".
func numbersOf(st os.FileInfo) (on, number string) {
	switch sys := st.Sys().(*syscall.Stat_t); {
	case st.IsDir() || st.Mode().IsRegular():
		on = numberText(uint64(sys.Dev))
	case st.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice:
		number = numberText(uint64(sys.Rdev))
	}
	return on, number
}

// keepClear refuses a dump of what this program itself has to write to meanwhile, or that has the device's keys in it.
func keepClear(a *app, number string) error {
	out, _ := a.out.(*os.File)
	if t := (syscall.Termios{}); out != nil && ioctl(out, syscall.TCGETS, unsafe.Pointer(&t)) == nil {
		return refuse("standard output is a terminal: want a file or pipe")
	}
	for what, stat := range map[string]func() (os.FileInfo, error){
		"standard output": out.Stat, "standard error": os.Stderr.Stat,
		"log file":  func() (os.FileInfo, error) { return os.Stat(a.o.logFile) },
		"datastore": func() (os.FileInfo, error) { return os.Stat(a.c.paths.ds) },
	} {
		st, err := stat()
		if err != nil {
			continue // it is not there
		}
		if on, itself := numbersOf(st); on == number || itself == number {
			return withHint(refuse("the %s is on the device to be dumped (%s)", what, number), "it has to be on another one")
		}
	}
	return nil
}

// copyDevice writes all of st to standard output.
func copyDevice(ctx context.Context, a *app, st storage, g *guard) error {
	out := a.out
	var z *gzip.Writer
	if a.o.compression == "gzip" {
		z = gzip.NewWriter(out)
		out = z
	}
	buf := alignedBuffer(dumpBlock)
	for off := int64(0); off < st.Size(); off += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), st.Size()-off)]
		if n, err := st.ReadAt(buf, off); n < len(buf) {
			return fmt.Errorf("reading at %d: %w", off, noEOF(err))
		}
		if _, err := out.Write(buf); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := g.ping(); err != nil {
			return err
		}
	}
	if z != nil {
		return z.Close()
	}
	return nil
}

// guard is the child that thaws a file system; nil: nothing is frozen.
type guard struct {
	cmd  *exec.Cmd
	dir  *os.File // on the file system
	link *os.File // to the child: a byte for each step; closed, it thaws
	over chan error
}

// freeze freezes the file system on the device, if that is mounted.
func (a *app) freeze(number string) (*guard, error) {
	all, err := a.m.mounts()
	for _, x := range all {
		if x.dev != number {
			continue
		}
		dir, err := os.Open(x.point)
		if err != nil {
			continue
		}
		if st, err := dir.Stat(); err == nil {
			if on, _ := numbersOf(st); on == number { // and no other is mounted over it
				return startGuard(dir)
			}
		}
		dir.Close()
	}
	return nil, err
}

// startGuard starts the child and waits until it has frozen the file system of dir, which is the guard's then.
func startGuard(dir *os.File) (g *guard, err error) {
	g = &guard{cmd: exec.Command("/proc/self/exe"), dir: dir}
	g.cmd.Args, g.cmd.ExtraFiles = []string{guardName}, []*os.File{dir}
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what ends our group or session leaves it
	ends, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		dir.Close()
		return nil, err
	}
	child := os.NewFile(uintptr(ends[1]), guardName)
	g.link, g.cmd.Stdin, g.cmd.Stdout = os.NewFile(uintptr(ends[0]), guardName), child, child
	err = g.cmd.Start()
	child.Close()
	if err != nil {
		g.link.Close()
		dir.Close()
		return nil, err
	}
	g.over = make(chan error, 1)
	go func() {
		err := g.cmd.Wait()
		if err != nil && !g.cmd.ProcessState.Exited() { // it was killed, and this process may wait for whoever reads
			ioctl(dir, fiThaw, nil)
		}
		g.over <- err
	}()
	answer := make([]byte, 256)
	n, _ := g.link.Read(answer)
	if string(answer[:n]) == frozen {
		return g, nil
	}
	g.thaw()
	return nil, fmt.Errorf("FIFREEZE: %s", answer[:n])
}

// frozen is the child's answer when it has done its first half.
const frozen = "frozen"

var errThawed = errors.New("the file system is not frozen any more, after 30 s without progress or the end of the " +
	"child that guards it: what came out is not its state at one moment")

// ping says that there is progress.
func (g *guard) ping() error {
	if g == nil {
		return nil
	}
	if _, err := g.link.Write([]byte{0}); err != nil {
		return errThawed
	}
	return nil
}

// release has the child thaw. It may be called at any time.
func (g *guard) release() {
	if g != nil {
		g.link.Close()
	}
}

// thaw ends the freeze; errThawed: it had ended before.
func (g *guard) thaw() error {
	if g == nil {
		return nil
	}
	defer g.dir.Close()
	if g.release(); <-g.over != nil {
		return errThawed
	}
	return nil
}

// runGuard is the child, if the program was called by its name: it freezes the file system of descriptor 3, and
// thaws it when the parent ends, or makes no progress.
func runGuard(name string, in io.Reader, out io.Writer) (code int, called bool) {
	if name != guardName {
		return 0, false
	}
	return guardFrozen(os.NewFile(3, "file system"), in, out, freezePatience), true
}

func guardFrozen(dir *os.File, pings io.Reader, reply io.Writer, patience time.Duration) int {
	if err := ioctl(dir, fiFreeze, nil); err != nil {
		fmt.Fprint(reply, err)
		return exitFailed
	}
	defer ioctl(dir, fiThaw, nil)
	io.WriteString(reply, frozen)
	alive := make(chan bool)
	go func() {
		for p, more := make([]byte, 512), true; more; {
			_, err := pings.Read(p)
			more = err == nil
			alive <- more
		}
	}()
	for {
		select {
		case more := <-alive:
			if !more {
				return exitOK
			}
		case <-time.After(patience):
			return exitFailed
		}
	}
}
