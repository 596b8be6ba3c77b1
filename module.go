// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// module is the handler of a payload whose type names a program in DATA/modules/v3, called
// as the update module protocol, version 3, says (mender's
// Documentation/update-modules-v3-file-api.md).
type module struct {
	program string // absolute path
	name    string // the payload type
	ds      string // absolute path of the datastore
	tree    string // absolute path of the file tree
	timeout time.Duration
	grace   time.Duration // see child
	lg      *logger
}

// treeValues are the values of the device before the update.
type treeValues struct{ artifactName, artifactGroup, deviceType string }

// newModule finds the module for a payload type. The type comes from an artifact, so it is
// one plain file name or it is refused (MEN-9027).
func newModule(c *config, payloadType string, lg *logger) (*module, error) {
	dir := c.paths.in(c.paths.data, "modules", "v3")
	if err := checkFileName(payloadType); err != nil {
		return nil, refuse("payload type %w", err)
	}
	program, err := filepath.Abs(filepath.Join(dir, payloadType))
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(program)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, withHint(refuse("no update module for payload type %q in %q", payloadType, dir),
			"install the module as %q, executable", program)
	case err != nil:
		return nil, refuse("update module for payload type %q: %w", payloadType, err)
	case !isProgram(st):
		return nil, refuse("update module %q: got mode %v, want an executable regular file", program, st.Mode())
	}
	if err := startableFile(program); err != nil {
		return nil, refuse("update module %q: %w", program, err)
	}
	ds, err := filepath.Abs(c.paths.ds)
	if err != nil {
		return nil, err
	}
	tree := filepath.Join(ds, filepath.Join(treeParents...), treeName)
	return &module{program: program, name: payloadType, ds: ds, tree: tree,
		timeout: seconds(c.ModuleTimeoutSeconds), lg: lg}, nil
}

// treeParents lead from the datastore to the file tree, treeName, as with Mender's own client.
var treeParents = []string{"modules", "v3", "payloads", "0000"}

const treeName = "tree"

// parent opens the directory that the file tree is in.
func (m *module) parent(create bool) (*dir, error) {
	d, err := openDir(m.ds)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.way(create, treeParents...)
}

// checkFileName refuses a name from an artifact that would not be one entry of the directory
// it is meant for (MEN-9027, MEN-9057).
func checkFileName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > 255 || strings.Contains(name, "/") ||
		strings.ContainsFunc(name, unprintable) {
		return fmt.Errorf("%q: want a plain file name of 1 to 255 bytes without blanks", name)
	}
	return nil
}

// makeTree makes the module's file tree afresh, durably: the later states need it after a
// restart, too. The contents are byte for byte those of the C++ client 5.x.
func (m *module) makeTree(a *artifact, current treeValues) error {
	line := func(s string) []byte {
		if s == "" {
			return nil
		}
		return []byte(s + "\n")
	}
	top := map[string][]byte{
		"version":                line("3"),
		"current_artifact_name":  line(current.artifactName),
		"current_artifact_group": line(current.artifactGroup),
		"current_device_type":    line(current.deviceType),
	}
	header := map[string][]byte{
		"artifact_name":  []byte(a.Name),
		"artifact_group": []byte(a.Group),
		"payload_type":   []byte(a.PayloadType),
	}
	for name, raw := range map[string]json.RawMessage{
		"header-info": a.HeaderInfo, "type-info": a.TypeInfo, "meta-data": a.MetaData} {
		text, err := compactJSON(raw)
		if err != nil {
			return refuse("%s: %w", name, err)
		}
		header[name] = text
	}
	d, err := m.parent(true)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.removeAll(treeName); err != nil {
		return err
	}
	if err := putFiles(d, top, treeName); err != nil {
		return err
	}
	if err := putFiles(d, header, treeName, "header"); err != nil {
		return err
	}
	return putFiles(d, nil, treeName, "tmp")
}

// putFiles makes new files in the directory that the names lead to, durably.
func putFiles(d *dir, files map[string][]byte, names ...string) error {
	d, err := d.way(true, names...)
	if err != nil {
		return err
	}
	defer d.Close()
	for name, text := range files {
		if err := copySynced(d, name, bytes.NewReader(text)); err != nil {
			return err
		}
	}
	return d.sync()
}

// removeTree deletes the tree, durably, so that a restart does not find half of it.
func (m *module) removeTree() error {
	d, err := m.parent(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.removeAll(treeName); err != nil {
		return err
	}
	return d.sync()
}

// openTree opens the file tree; fs.ErrNotExist: there is none.
func (m *module) openTree() (*dir, error) {
	d, err := m.parent(false)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.sub(treeName)
}

func (m *module) hasTree() bool {
	d, err := m.openTree()
	if err != nil {
		return false
	}
	d.Close()
	return true
}

// compactJSON writes raw without blanks and with keys in alphabetical order without regard
// to case; null when there is nothing.
func compactJSON(raw json.RawMessage) ([]byte, error) {
	if len(raw) == 0 {
		return []byte("null"), nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber() // keep numbers as they are written
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err := putJSON(&b, v)
	return b.Bytes(), err
}

func putJSON(b *bytes.Buffer, v any) error {
	switch v := v.(type) {
	case map[string]any:
		inOrder := map[string]string{} // by what they are sorted by
		for k := range v {
			inOrder[strings.ToLower(k)+"\x00"+k] = k
		}
		b.WriteByte('{')
		for i, o := range sortedKeys(inOrder) {
			k := inOrder[o]
			if i > 0 {
				b.WriteByte(',')
			}
			if err := putJSON(b, k); err != nil {
				return err
			}
			b.WriteByte(':')
			if err := putJSON(b, v[k]); err != nil {
				return err
			}
		}
		b.WriteByte('}')
	case []any:
		b.WriteByte('[')
		for i, e := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			if err := putJSON(b, e); err != nil {
				return err
			}
		}
		b.WriteByte(']')
	default:
		e := json.NewEncoder(b)
		e.SetEscapeHTML(false) // scripts look for "<" and "&" as they are
		if err := e.Encode(v); err != nil {
			return err
		}
		b.Truncate(b.Len() - 1) // the line feed that Encode adds
	}
	return nil
}

func (m *module) child(state string) child {
	return child{
		what: fmt.Sprintf("update module %q, %s", m.name, state),
		path: m.program, args: []string{state, m.tree}, dir: m.tree,
		timeout: m.timeout, grace: m.grace, prefix: "Update Module output", level: levelInfo, lg: m.lg,
	}
}

// resumable: a module's install is not ours to repeat.
func (m *module) resumable() bool { return false }

// call runs one state. Cleanup without a tree has nothing to do, and removes the tree
// whatever the module says.
func (m *module) call(ctx context.Context, state string) error {
	m.lg.debugf("update module %q: %s", m.name, state)
	if state != "Cleanup" {
		return m.runProgram(ctx, m.child(state))
	}
	if !m.hasTree() {
		return nil
	}
	return errors.Join(m.runProgram(ctx, m.child(state)), m.removeTree())
}

func (m *module) runProgram(ctx context.Context, c child) error {
	switch d, err := m.openTree(); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: %w: no directory %q", c.what, errNoTree, m.tree)
	case err != nil:
		return fmt.Errorf("%s: %w", c.what, err)
	default:
		d.Close()
	}
	return runChild(ctx, c)
}

// query asks the module a question. The answer is one line, or none, which means No.
func (m *module) query(ctx context.Context, state string) (string, error) {
	a := answer{max: 4 << 10}
	c := m.child(state)
	c.answer = &a
	if err := m.runProgram(ctx, c); err != nil {
		return "", err
	}
	text := strings.TrimSuffix(string(a.text), "\n")
	switch {
	case text == "":
		return "No", nil
	case text == "Yes", text == "No", text == "Automatic" && state == "NeedsArtifactReboot":
		return text, nil
	}
	want := "Yes, No or nothing"
	if state == "NeedsArtifactReboot" {
		want = "Yes, No, Automatic or nothing"
	}
	return "", fmt.Errorf("%s: got answer %.100q, want %s", c.what, text, want)
}

// download hands the payload to the module, through named pipes when the module opens
// them, else as files under files/. It may block as long as reading the artifact does.
func (m *module) download(ctx context.Context, a *artifact) error {
	sizes, err := m.query(ctx, "ProvidePayloadFileSizes")
	if err != nil {
		return err
	}
	state := "Download"
	if sizes == "Yes" {
		state = "DownloadWithFileSizes"
	}
	tree, err := m.openTree()
	if err != nil {
		return err
	}
	defer tree.Close()
	s := &streams{tree: tree, sizes: sizes == "Yes"}
	defer s.remove()
	if err := s.make(); err != nil {
		return err
	}
	err = s.feed(ctx, a, m.child(state))
	switch {
	case err != nil || s.finished:
		return err
	case s.opened:
		return fmt.Errorf("update module %q, %s: started downloading, but did not finish", m.name, state)
	}
	s.remove()
	return store(tree, a)
}

// store puts the payload under files/, for modules that do not stream. The files are there for all
// later states, so after a power cut as well.
func store(tree *dir, a *artifact) error {
	if err := tree.mkdir("files"); err != nil {
		return err
	}
	if err := tree.sync(); err != nil {
		return err
	}
	d, err := tree.sub("files")
	if err != nil {
		return err
	}
	defer d.Close()
	for f, err := range a.files() {
		if err != nil {
			return err
		}
		if err := checkPayloadName(f.Name); err != nil {
			return err
		}
		if err := copySynced(d, f.Name, f); err != nil {
			return err
		}
	}
	return d.sync()
}

func copySynced(d *dir, name string, r io.Reader) error {
	f, err := d.open(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	return f.Sync()
}

// streams are the named pipes of one download.
type streams struct {
	tree     *dir
	pipes    *dir            // streams/ in it
	sizes    bool            // tell the sizes of files
	gone     context.Context // done when the module has ended
	opened   bool            // the module has opened stream-next
	finished bool            // the module has been told that there are no more files
	data     *os.File        // the stream that is being written, or nil
}

var errModuleGone = errors.New("the update module has ended")

const (
	streamNext = "stream-next"
	streamsDir = "streams"
)

func (s *streams) make() (err error) {
	if err = s.tree.mkdir(streamsDir); err != nil {
		return err
	}
	if s.pipes, err = s.tree.sub(streamsDir); err != nil {
		return err
	}
	return s.tree.mkfifo(streamNext)
}

// remove may be called again.
func (s *streams) remove() {
	s.tree.remove(streamNext)
	s.tree.removeAll(streamsDir)
	if s.pipes != nil {
		s.pipes.Close()
		s.pipes = nil
	}
}

// feed runs the module and serves its pipes. A failure on our side stops the module before
// it can take the end of a stream for the end of a good file.
func (s *streams) feed(ctx context.Context, a *artifact, c child) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	gone, ended := context.WithCancel(context.Background())
	s.gone = gone
	var exit error
	go func() {
		exit = runChild(ctx, c)
		ended()
	}()
	err := s.serve(a)
	if err != nil {
		stop(err)
	}
	<-gone.Done()
	if s.data != nil {
		s.data.Close()
	}
	switch {
	case exit == nil && errors.Is(err, errModuleGone):
		return nil // the caller looks at how far it came
	case exit == nil:
		return err
	case err == nil, errors.Is(err, errModuleGone), errors.Is(exit, err):
		return exit
	}
	return fmt.Errorf("%w; %w", err, exit)
}

// serve answers each opening of stream-next with the next payload file, and the last one
// with nothing.
func (s *streams) serve(a *artifact) error {
	for {
		next, err := s.openFifo(s.tree, streamNext)
		if err != nil {
			return err
		}
		s.opened = true
		f, err := a.nextFile()
		if err == io.EOF {
			s.finished = true
			return next.Close()
		}
		if err == nil {
			err = s.announce(next, f)
		}
		if err != nil {
			s.data = next // closed when the module has ended
			return err
		}
		if err := s.copy(f); err != nil {
			return err
		}
	}
}

// announce makes the pipe for f and writes its name to next. The pipe must be there before
// the module hears of it.
func (s *streams) announce(next *os.File, f *payloadFile) error {
	if err := checkPayloadName(f.Name); err != nil { // again, where it becomes a path (MEN-9056)
		return err
	}
	if err := s.pipes.mkfifo(f.Name); err != nil {
		return err
	}
	line := streamsDir + "/" + f.Name
	if s.sizes {
		line = fmt.Sprintf("%s %d", line, f.Size)
	}
	if _, err := next.WriteString(line + "\n"); err != nil {
		return fmt.Errorf("stream-next: %w", err)
	}
	return next.Close()
}

// copy writes f to its pipe. On an error the pipe stays open until the module has ended.
func (s *streams) copy(f *payloadFile) error {
	pipe, err := s.openFifo(s.pipes, f.Name)
	if err != nil {
		return err
	}
	// A process that the module has left behind may hold the other end open.
	unhook := context.AfterFunc(s.gone, func() { pipe.SetWriteDeadline(time.Unix(1, 0)) })
	defer unhook()
	if _, err := io.Copy(pipe, f); err != nil {
		s.data = pipe
		if s.gone.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			return errModuleGone
		}
		return err
	}
	return pipe.Close()
}

// openFifo opens a named pipe for writing as soon as the module has opened it for reading. The
// open must not block, for the module may end instead; without a reader it fails with ENXIO
// (fifo(7)), and there is no event to wait for, hence the repetition. A reader cannot be
// missed: its open blocks until ours succeeds.
func (s *streams) openFifo(d *dir, name string) (*os.File, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		f, err := d.openAny(name, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if !errors.Is(err, syscall.ENXIO) {
			return f, err
		}
		select {
		case <-s.gone.Done():
			return nil, errModuleGone
		case <-time.After(wait):
		}
	}
}

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
	ds, err := makeDir(filepath.Dir(s.artifactDir))
	if err != nil {
		return err
	}
	defer ds.Close()
	name := filepath.Base(s.artifactDir)
	if err := ds.removeAll(name); err != nil {
		return err
	}
	d, err := ds.way(true, name)
	if err != nil {
		return err
	}
	defer d.Close()
	for _, f := range files {
		// Checked again, where it becomes a path (MEN-9057).
		if !isScriptName(f.Name) || checkFileName(f.Name) != nil {
			return refuse("state script %q: want a name like ArtifactInstall_Enter_05_what", f.Name)
		}
		if err := d.write(f.Name, f.Body, 0o700); err != nil {
			return err
		}
	}
	return d.write("version", []byte("3"), 0o600)
}

// check refuses scripts of an artifact that could not be started when their time comes. An interpreter
// that those before the reboot do not want may come with the new system.
func (s *scripts) check(files []scriptFile) error {
	if len(files) > 0 && noExec(s.artifactDir) {
		return withHint(refuse("state scripts cannot be run: %q is on a file system that is mounted noexec", s.artifactDir),
			"mount it without noexec, or name another datastore with -d")
	}
	for _, f := range files {
		err := startable(f.Body)
		here := strings.HasPrefix(f.Name, "ArtifactInstall_") || strings.HasPrefix(f.Name, "ArtifactReboot_Enter_")
		if errors.Is(err, errNoInterpreter) && !here {
			s.lg.warnf("state script %q: %v, in this system", f.Name, err)
		} else if err != nil {
			return refuse("state script %q: %w", f.Name, err)
		}
	}
	return nil
}

// checkRootfsVersion is for the moment before a commit: the new root file system may have
// brought scripts that this program does not know how to run.
func (s *scripts) checkRootfsVersion() error { return checkScriptVersion(s.rootfsDir) }

func checkScriptVersion(dir string) error {
	path := filepath.Join(dir, "version")
	text, err := readPlain(path)
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

// runState runs the scripts of a state (Idle, Sync, Download, Artifact…) and action (Enter,
// Leave, Error) in order. The first that fails ends it, except where results do not count:
// Idle, and Error actions.
func (s *scripts) runState(ctx context.Context, state, action string) error {
	if state != "Idle" && action != "Error" {
		return s.each(state, action, func(path string) error { return s.runOne(ctx, path) })
	}
	err := s.runAll(ctx, state, action)
	if err != nil && ctx.Err() == nil {
		s.lg.warnf("ignored: %v", err)
		err = nil
	}
	return err
}

// runAll runs every script whatever comes of the others, and returns the first failure. It ends
// early only when ctx is done.
func (s *scripts) runAll(ctx context.Context, state, action string) error {
	var first error
	err := s.each(state, action, func(path string) error {
		err := s.runOne(ctx, path)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if first == nil {
			first = err
		} else {
			s.lg.warnf("%v", err)
		}
		return nil
	})
	return cmp.Or(err, first)
}

// each calls f with the path of each script, in bytewise order.
func (s *scripts) each(state, action string, f func(path string) error) error {
	dir, names, err := s.list(state)
	if err == nil {
		err = checkScriptVersion(dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range names {
		if order, ok := strings.CutPrefix(name, state+"_"+action+"_"); !ok || !isScriptOrder(order) {
			continue
		}
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); err != nil {
			return err
		} else if !isProgram(st) {
			s.lg.warnf("state script %q skipped: got mode %v, want an executable regular file", path, st.Mode())
		} else if err := f(path); err != nil {
			return err
		}
	}
	return nil
}

// list gives the directory of a state's scripts and the names in it, sorted. That of an artifact's must
// still be ours.
func (s *scripts) list(state string) (path string, names []string, err error) {
	var d *dir
	if path = s.rootfsDir; strings.HasPrefix(state, "Artifact") {
		path = s.artifactDir
		var ds *dir
		if ds, err = openDir(filepath.Dir(path)); err == nil {
			d, err = ds.sub(filepath.Base(path))
			ds.Close()
		}
	} else {
		d, err = openDir(path)
	}
	if err == nil {
		names, err = d.names()
		d.Close()
	}
	return path, names, err
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
