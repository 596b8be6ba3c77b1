// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// exitRetryLater is the exit code with which a state script asks to be called again.
const exitRetryLater = 21

// scripts runs state scripts: those of Idle, Sync and Download belong to the device, those
// of all Artifact states come with the artifact.
type scripts struct {
	rootfsDir, artifactDir string
	timeout                time.Duration // of one run of one script
	retryInterval          time.Duration // between runs of a script that asks for it
	retryTimeout           time.Duration // from the first time a script asks for it
	lg                     *logger
	onRun                  func(name string) // called before each run, or nil
}

func newScripts(c *config, lg *logger) *scripts {
	return &scripts{
		rootfsDir:     c.paths.in(c.paths.conf, "scripts"),
		artifactDir:   c.paths.in(c.paths.ds, "scripts"),
		timeout:       seconds(c.StateScriptTimeoutSeconds),
		retryInterval: seconds(c.StateScriptRetryIntervalSeconds),
		retryTimeout:  seconds(c.StateScriptRetryTimeoutSeconds),
		lg:            lg,
	}
}

// install replaces the scripts of the last artifact, durably.
func (s *scripts) install(files []scriptFile) error {
	if err := os.RemoveAll(s.artifactDir); err != nil {
		return err
	}
	if err := os.MkdirAll(s.artifactDir, 0o700); err != nil {
		return err
	}
	for _, f := range files {
		// Checked again, where it becomes a path (MEN-9057).
		if !isScriptName(f.Name) || checkFileName(f.Name) != nil {
			return refuse("state script %q: want a name like ArtifactInstall_Enter_05_what", f.Name)
		}
		if err := writeFileDurably(filepath.Join(s.artifactDir, f.Name), f.Body, 0o700); err != nil {
			return err
		}
	}
	if err := writeFileDurably(filepath.Join(s.artifactDir, "version"), []byte("3"), 0o600); err != nil {
		return err
	}
	return syncDir(filepath.Dir(filepath.Clean(s.artifactDir)))
}

// checkRootfsVersion is for the moment before a commit: the new root file system may have
// brought scripts that this program does not know how to run.
func (s *scripts) checkRootfsVersion() error { return checkScriptVersion(s.rootfsDir) }

func checkScriptVersion(dir string) error {
	path := filepath.Join(dir, "version")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if v := strings.TrimSpace(string(text)); v != "2" && v != "3" {
		return fmt.Errorf("version of state scripts %q: got %.20q, want 2 or 3", path, v)
	}
	return nil
}

// run runs the scripts of a state (Idle, Sync, Download, Artifact…) and action (Enter,
// Leave, Error) in order. The first that fails ends it, except where results do not count:
// Idle, and Error actions.
func (s *scripts) run(ctx context.Context, state, action string) error {
	if state == "Idle" || action == "Error" {
		return s.runAll(ctx, state, action)
	}
	return s.each(state, action, func(path string) error { return s.runOne(ctx, path) })
}

// runAll runs every script whatever comes of the others, and fails only when ctx is done.
func (s *scripts) runAll(ctx context.Context, state, action string) error {
	ignore := func(err error) error {
		if err == nil || ctx.Err() != nil {
			return err
		}
		s.lg.warnf("ignored: %v", err)
		return nil
	}
	return ignore(s.each(state, action, func(path string) error { return ignore(s.runOne(ctx, path)) }))
}

// each calls f with the path of each script, in bytewise order.
func (s *scripts) each(state, action string, f func(path string) error) error {
	dir := s.rootfsDir
	if strings.HasPrefix(state, "Artifact") {
		dir = s.artifactDir
	}
	if err := checkScriptVersion(dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir) // sorted
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if order, ok := strings.CutPrefix(e.Name(), state+"_"+action+"_"); !ok || !isScriptOrder(order) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if st, err := os.Stat(path); err != nil {
			return err
		} else if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
			s.lg.warnf("state script %q skipped: got mode %v, want an executable regular file", path, st.Mode())
		} else if err := f(path); err != nil {
			return err
		}
	}
	return nil
}

// runOne runs one script, again and again while it asks for that and there is time.
func (s *scripts) runOne(ctx context.Context, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	name := filepath.Base(path)
	c := child{what: fmt.Sprintf("state script %q", name), path: path, dir: "/", timeout: s.timeout,
		prefix: "State script " + name + " output", level: levelInfo, lg: s.lg}
	var giveUp <-chan time.Time
	for {
		if s.onRun != nil {
			s.onRun(name)
		}
		s.lg.debugf("%s", c.what)
		err := runChild(ctx, c)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != exitRetryLater {
			return err
		}
		if giveUp == nil {
			giveUp = time.After(s.retryTimeout)
		}
		select {
		case <-giveUp:
			return fmt.Errorf("%w: still asks to be called later after %v", err, s.retryTimeout)
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		case <-time.After(s.retryInterval):
		}
	}
}
