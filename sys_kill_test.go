// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// appModule replaces the file "app" of a device, and can bring the old one back.
const appModule = `#!/bin/sh
app=${0%/*}/../../../app
case $1 in
SupportsRollback) echo Yes ;;
ArtifactInstall)
	cp "$app" tmp/old.part && mv tmp/old.part tmp/old &&
		cp files/payload "$app.part" && mv "$app.part" "$app" ;;
ArtifactRollback) [ ! -e tmp/old ] || cp tmp/old "$app" ;;
esac
`

// killCalls are the system calls by which the program changes something, openat, by which it may
// make something, and waitid, in which it waits for a module.
var killCalls = []string{"pwrite64", "write", "fdatasync", "fsync", "openat", "mkdirat", "mknodat", "renameat",
	"unlinkat", "fchmod", "fchmodat", "ftruncate", "waitid"}

// killer runs the real program and kills it.
type killer struct {
	t       *testing.T
	program string
	dir     string
}

func (k *killer) run(strace []string, args ...string) (exit int, output string) {
	line := append(append(strace, k.program, "-b", filepath.Join(k.dir, "fallback.conf")), args...)
	cmd := exec.Command(line[0], line[1:]...)
	// One running thread at a time: strace counts the calls of each thread by itself.
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "MENDER_CONF_DIR="+k.dir+"/etc", "MENDER_DATA_DIR="+k.dir+"/share",
		"MENDER_DATASTORE_DIR="+k.dir+"/var")
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		k.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// inject kills the program at the nth call of one kind, before it has an effect. What the
// program starts is not traced.
func inject(call string, n int) []string {
	return []string{"strace", "-f", "-b", "execve", "-qq", "-o", "/dev/null", "-e", "trace=" + call, "-e", "signal=none",
		"-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", call, n)}
}

// recover does what a boot script does, until nothing is in progress.
func (k *killer) recover() (log string) {
	for range 5 {
		exit, out := k.run(nil, "resume")
		log += fmt.Sprintf("resume: %d\n%s", exit, out)
		rec, err := peekJournal(k.dir+"/var", nil)
		if err != nil {
			k.t.Fatal(err)
		}
		if rec.Update == nil {
			return log
		}
		if rec.Update.Step == stepCommitWait {
			exit, out = k.run(nil, "commit")
			log += fmt.Sprintf("commit: %d\n%s", exit, out)
		}
	}
	return log
}

// check: one verdict, and what is installed is what it says.
func (k *killer) check() error {
	rec, err := peekJournal(k.dir+"/var", nil)
	if err != nil {
		return err
	}
	app, err := os.ReadFile(k.dir + "/app")
	if err != nil {
		return err
	}
	left, _ := os.ReadDir(k.dir + "/var/modules/v3/payloads/0000/tree")
	verdict := "none"
	if rec.Last != nil {
		verdict = rec.Last.Result
	}
	name := rec.Provides["artifact_name"]
	switch {
	case rec.Update != nil:
		return fmt.Errorf("the update has not ended: %+v", rec.Update)
	case string(app) == "new" && name == "new" && verdict == "committed" && len(left) == 0:
	case string(app) == "old" && name == "old" && (verdict == "rolled-back" || verdict == "failed") && len(left) == 0:
	case string(app) == "old" && (name == "old" || name == "") && verdict == "none":
	default:
		return fmt.Errorf("installed is %q, artifact_name %q, verdict %s; the module's tree has %d entries", app, name,
			verdict, len(left))
	}
	return nil
}

func (k *killer) must(exit int, args ...string) {
	k.t.Helper()
	if got, out := k.run(nil, args...); got != exit {
		k.t.Fatalf("%s: exit code %d, want %d\n%s", strings.Join(args, " "), got, exit, out)
	}
}

// newKiller is a device that has "old" installed, without anything in progress.
func newKiller(t *testing.T, program string) *killer {
	k := &killer{t, program, fastDir(t)}
	for _, sub := range []string{"etc", "var", "share/modules/v3"} {
		if err := os.MkdirAll(filepath.Join(k.dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	putScript(t, k.dir+"/share/modules/v3", "app", appModule, 0o755)
	for name, text := range map[string]string{"app": "old", "fallback.conf": "{}", "var/device_type": "device_type=sim\n",
		"etc/artifact_info": "artifact_name=old\n"} {
		if err := os.WriteFile(filepath.Join(k.dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

// Each system call of a real update by which something changes is a place to die.
func TestKilledAtSystemCalls(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("needs strace")
	}
	onlyExhaustive(t, "hundreds of runs under strace")
	t.Parallel()
	if out, err := exec.Command("strace", "-f", "-b", "execve", "-qq", "-o", "/dev/null",
		"true").CombinedOutput(); err != nil {
		t.Skipf("needs a strace that may trace and knows -b: %v: %s", err, out)
	}
	dir := t.TempDir()
	program, artifact := filepath.Join(dir, "mendlet"), filepath.Join(dir, "new.mender")
	build := exec.Command("go", "build", "-tags", "nethttpomithttp2", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := packCommand([]string{"-T", "app", "-n", "new", "-c", "sim", "-f", writeTemp(t, "payload", []byte("new")),
		"-o", artifact}, io.Discard, nil); err != nil {
		t.Fatal(err)
	}
	for _, phase := range []struct {
		before [][]string // calls of the program that end well
		verb   []string   // the one that is killed
	}{
		{nil, []string{"install", artifact}},
		{[][]string{{"install", artifact}}, []string{"commit"}},
		{[][]string{{"install", artifact}}, []string{"rollback"}},
		{[][]string{{"install", "--stop-before", "ArtifactInstall_Enter", artifact}}, []string{"resume"}},
	} {
		t.Run(strings.Join(phase.verb[:1], " "), func(t *testing.T) {
			t.Parallel()
			start := newKiller(t, program)
			for _, args := range phase.before {
				start.must(0, args...)
			}
			points := 0
			for _, call := range killCalls {
				for n := 1; killAt(t, start, artifact, call, n, phase.verb); n++ {
					points++
				}
			}
			t.Logf("killed at %d places", points)
			if points < 5 {
				t.Errorf("killed at %d places only", points)
			}
		})
	}
}

// awaitOrphans waits for what a killed program leaves behind for a moment, such as the cp of a
// module that died with it. A power cut would have ended that, too.
func (k *killer) awaitOrphans() {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		left := false
		dirs, _ := filepath.Glob("/proc/[0-9]*/cwd")
		for _, d := range dirs {
			cwd, err := os.Readlink(d)
			left = left || err == nil && strings.HasPrefix(cwd, k.dir)
		}
		if !left {
			return
		}
	}
	k.t.Errorf("a process is still at work in %q", k.dir)
}

// killAt reports false when the program ended before the nth such call.
func killAt(t *testing.T, start *killer, artifact, call string, n int, verb []string) bool {
	k := &killer{t, start.program, fastDir(t)}
	if err := os.CopyFS(k.dir, os.DirFS(start.dir)); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(k.dir)
	exit, out := k.run(inject(call, n), verb...)
	if exit != -1 {
		return false
	}
	k.awaitOrphans()
	log := out + k.recover()
	if err := k.check(); err != nil {
		t.Errorf("%s killed at %s %d: %v\n%s", verb[0], call, n, err, log)
		return true
	}
	// The device is as good as before.
	if exit, out := k.run(nil, "install", artifact); exit != 0 {
		t.Errorf("%s killed at %s %d: the next install: exit code %d\n%s", verb[0], call, n, exit, out)
	}
	return true
}
