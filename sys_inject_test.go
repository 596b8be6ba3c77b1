// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// injector runs the real program on a board of image files, and lets the kernel refuse one system
// call on the boot environment, the journal or the lock.
type injector struct {
	t       *testing.T
	program string
	dir     string
	image   []byte
}

// injected are the calls by which the three are opened, read, written, locked and made durable.
var injected = map[string][]string{
	"openat": {"EIO", "EMFILE"}, "read": {"EIO"}, "pread64": {"EIO"}, "write": {"EIO"}, "pwrite64": {"EIO", "ENOSPC"},
	"fsync": {"EIO"}, "fdatasync": {"EIO"}, "flock": {"ENOLCK"}, "fstat": {"EIO"}, "ftruncate": {"EIO"},
}

func (b *injector) run(strace []string, running string, args ...string) (exit int, output string) {
	line := append(append(strace, b.program, "-c", b.dir+"/mender.conf", "-b", b.dir+"/none", "-d", b.dir+"/var",
		"--running", running), args...)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "MENDER_CONF_DIR="+b.dir, "MENDER_DATA_DIR="+b.dir+"/share")
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		b.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// inject refuses the nth call on one of the three files with the error.
func (b *injector) inject(call, errno string, n int) []string {
	line := []string{"strace", "-f", "-b", "execve", "-qq", "-o", b.dir + "/trace", "-e", "trace=" + call,
		"-e", "signal=none",
		"-e", fmt.Sprintf("inject=%s:error=%s:when=%d", call, errno, n)}
	for _, path := range []string{b.dir + "/env", b.dir + "/var/" + journalName, journalName, "/var/lock/fw_printenv.lock",
		"fw_printenv.lock"} {
		line = append(line, "-P", path)
	}
	return line
}

// boots is the slot that the bootloader would take, and whether that is a trial.
func (b *injector) boots() (part string, trial bool) {
	vars, _ := readSimEnv(readFileOrNil(b.dir + "/env"))
	return vars[varBootPart], vars[varUpgrade] == "1"
}

// whole: what would boot is whole.
func (b *injector) whole() error {
	part, _ := b.boots()
	switch slot := readFileOrNil(b.dir + "/p" + part); {
	case part == "2" && bytes.HasPrefix(slot, []byte("old")), part == "3" && bytes.HasPrefix(slot, b.image):
		return nil
	}
	return fmt.Errorf("partition %q would boot, and is not whole", part)
}

// done checks the effect of a verb that has ended with 0.
func (b *injector) done(verb string) error {
	rec, err := peekJournal(b.dir+"/var", nil)
	if err != nil {
		return err
	}
	part, trial := b.boots()
	name, last := rec.Provides["artifact_name"], ""
	if rec.Last != nil {
		last = rec.Last.Result
	}
	switch {
	case verb == "install" && part == "3" && trial && rec.Update != nil && rec.Update.Step == stepCommitWait:
	case verb == "commit" && part == "3" && !trial && rec.Update == nil && last == "committed" && name == "new":
	case verb == "rollback" && part == "2" && !trial && rec.Update == nil && last == "rolled-back" && name == "unknown":
	default:
		return fmt.Errorf("partition %s boots (trial: %t), artifact_name %q, verdict %q, in progress %+v", part, trial, name,
			last, rec.Update)
	}
	return b.whole()
}

// consistent checks what must hold whatever has happened. before is the boot environment as it was.
func (b *injector) consistent(before []byte) error {
	rec, err := peekJournal(b.dir+"/var", nil)
	if err != nil {
		return err
	}
	touched := !bytes.Equal(before, readFileOrNil(b.dir+"/env"))
	if name := rec.Provides["artifact_name"]; strings.HasSuffix(name, "_INCONSISTENT") && !touched {
		return fmt.Errorf("artifact_name is %q, and the boot environment was not written", name)
	}
	if u := rec.Update; u != nil && u.Outcome == outcomeInconsistent && !touched {
		return fmt.Errorf("the update counts as inconsistent in %s, and the boot environment was not written", u.Step)
	}
	return b.whole()
}

// mend runs the program, with nothing refused any more, until the update has ended.
func (b *injector) mend(verb, artifact, running string) (log string, err error) {
	for range 6 {
		rec, err := peekJournal(b.dir+"/var", nil)
		if err != nil {
			return log, err
		}
		if verb == "install" && rec.Update == nil {
			exit, out := b.run(nil, running, "install", artifact)
			log += fmt.Sprintf("install: %d\n%s", exit, out)
			continue
		}
		if rec.Update == nil || verb == "install" && rec.Update.Step == stepCommitWait {
			break
		}
		again := "resume"
		if rec.Update.Step == stepCommitWait {
			again = verb
		}
		exit, out := b.run(nil, running, again)
		log += fmt.Sprintf("%s: %d\n%s", again, exit, out)
	}
	rec, err := peekJournal(b.dir+"/var", nil)
	if err != nil {
		return log, err
	}
	part, trial := b.boots()
	switch {
	case verb == "install":
		return log, b.done(verb)
	case rec.Update != nil:
		return log, fmt.Errorf("the update has not ended: %+v", rec.Update)
	case rec.Last == nil, rec.Last.Result == "committed" && (part != "3" || trial), rec.Last.Result == "rolled-back" &&
		(part != "2" || trial):
		return log, fmt.Errorf("partition %s boots (trial: %t), and the verdict is %+v", part, trial, rec.Last)
	}
	return log, b.whole()
}

// TestInjectedErrors: whatever call the kernel refuses, the program never ends with 0 without the
// effect, never leaves a slot that is not whole to be booted, and never calls the device inconsistent
// when it has not written; and the next runs bring the update to its end.
func TestInjectedErrors(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: strace, and a lock in /var/lock")
	}
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("needs strace")
	}
	onlyExhaustive(t, "hundreds of runs under strace")
	dir := t.TempDir()
	start := &injector{t: t, program: filepath.Join(dir, "mendlet"),
		image: bytes.Repeat([]byte("an image of one block and some. "), 5<<10)}
	artifact := filepath.Join(dir, "new.mender")
	build := exec.Command("go", "build", "-tags", "nethttpomithttp2", "-o", start.program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	err := packCommand([]string{"-n", "new", "-c", "sim", "-f", writeTemp(t, "root.img", start.image), "-o",
		artifact}, io.Discard, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, phase := range []struct{ verb, running string }{{"install", "A"}, {"commit", "B"}, {"rollback", "B"}} {
		t.Run(phase.verb, func(t *testing.T) {
			points := 0
			for call, errnos := range injected {
				for _, errno := range errnos {
					for n := 1; start.injectAt(t, phase.verb, phase.running, artifact, call, errno, n); n++ {
						points++
					}
				}
			}
			t.Logf("%d calls refused", points)
			if points < 20 {
				t.Errorf("%d calls refused only", points)
			}
		})
	}
}

// injectAt reports false when there was no nth such call.
func (b *injector) injectAt(t *testing.T, verb, running, artifact, call, errno string, n int) bool {
	k := *b
	k.t, k.dir = t, fastDir(t)
	defer os.RemoveAll(k.dir)
	boardFiles(t, k.dir, 1<<20, "")
	if err := os.Mkdir(k.dir+"/var", 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{verb}
	if verb == "install" {
		args = append(args, artifact)
	} else if exit, out := k.run(nil, "A", "install", artifact); exit != 0 {
		t.Fatalf("install: exit code %d\n%s", exit, out)
	}
	before := readFileOrNil(k.dir + "/env")
	exit, out := k.run(k.inject(call, errno, n), running, args...)
	if !strings.Contains(string(readFileOrNil(k.dir+"/trace")), "(INJECTED)") {
		return false
	}
	what := fmt.Sprintf("%s with %s of %s %d: exit code %d", verb, errno, call, n, exit)
	if exit == 0 {
		if err := k.done(verb); err != nil {
			t.Errorf("%s: %v\n%s", what, err, out)
		}
	}
	if err := k.consistent(before); err != nil {
		t.Errorf("%s: %v\n%s", what, err, out)
		return true
	}
	if log, err := k.mend(verb, artifact, running); err != nil {
		t.Errorf("%s: afterwards: %v\n%s%s", what, err, out, log)
	}
	return true
}
