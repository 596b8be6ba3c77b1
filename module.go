// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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
	case !st.Mode().IsRegular() || st.Mode()&0o111 == 0:
		return nil, refuse("update module %q: got mode %v, want an executable regular file", program, st.Mode())
	}
	tree, err := filepath.Abs(c.paths.in(c.paths.ds, "modules", "v3", "payloads", "0000", "tree"))
	if err != nil {
		return nil, err
	}
	return &module{program: program, name: payloadType, tree: tree, timeout: seconds(c.ModuleTimeoutSeconds), lg: lg}, nil
}

// checkFileName refuses a name from an artifact that would not be one entry of the directory
// it is meant for (MEN-9027, MEN-9057).
func checkFileName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > 255 || strings.Contains(name, "/") || strings.ContainsFunc(name, unprintable) {
		return fmt.Errorf("%q: want a plain file name of 1 to 255 bytes without blanks", name)
	}
	return nil
}

// makeTree makes the module's file tree afresh, durably: the later states need it after a
// restart, too. The contents are byte for byte those of the C++ client 5.x.
func (m *module) makeTree(a *artifact, current treeValues) error {
	if err := m.removeTree(); err != nil {
		return err
	}
	line := func(s string) []byte {
		if s == "" {
			return nil
		}
		return []byte(s + "\n")
	}
	for _, dir := range []string{"header", "tmp"} {
		if err := os.MkdirAll(filepath.Join(m.tree, dir), 0o700); err != nil {
			return err
		}
	}
	texts := map[string][]byte{
		"version":                line("3"),
		"current_artifact_name":  line(current.artifactName),
		"current_artifact_group": line(current.artifactGroup),
		"current_device_type":    line(current.deviceType),
		"header/artifact_name":   []byte(a.Name),
		"header/artifact_group":  []byte(a.Group),
		"header/payload_type":    []byte(a.PayloadType),
	}
	for name, raw := range map[string]json.RawMessage{
		"header/header-info": a.HeaderInfo, "header/type-info": a.TypeInfo, "header/meta-data": a.MetaData,
	} {
		text, err := compactJSON(raw)
		if err != nil {
			return refuse("%s: %w", name, err)
		}
		texts[name] = text
	}
	for name, text := range texts {
		if err := copySynced(filepath.Join(m.tree, name), bytes.NewReader(text)); err != nil {
			return err
		}
	}
	// The names, and the way down to them from the datastore, which may be new as well.
	dir := filepath.Join(m.tree, "header")
	for range 7 {
		if err := syncDir(dir); err != nil {
			return err
		}
		dir = filepath.Dir(dir)
	}
	return nil
}

// removeTree deletes the tree, durably, so that a restart does not find half of it.
func (m *module) removeTree() error {
	if !m.hasTree() {
		return nil
	}
	if err := os.RemoveAll(m.tree); err != nil {
		return err
	}
	return syncDir(filepath.Dir(m.tree))
}

func (m *module) hasTree() bool {
	_, err := os.Lstat(m.tree)
	return err == nil
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
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.SortFunc(keys, func(x, y string) int {
			if n := strings.Compare(strings.ToLower(x), strings.ToLower(y)); n != 0 {
				return n
			}
			return strings.Compare(x, y)
		})
		b.WriteByte('{')
		for i, k := range keys {
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
		return m.run(ctx, m.child(state))
	}
	if !m.hasTree() {
		return nil
	}
	return errors.Join(m.run(ctx, m.child(state)), m.removeTree())
}

func (m *module) run(ctx context.Context, c child) error {
	if !m.hasTree() {
		return fmt.Errorf("%s: no file tree %q", c.what, m.tree)
	}
	return runChild(ctx, c)
}

// query asks the module a question. The answer is one line, or none, which means No.
func (m *module) query(ctx context.Context, state string) (string, error) {
	a := answer{max: 4 << 10}
	c := m.child(state)
	c.answer = &a
	if err := m.run(ctx, c); err != nil {
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
	s := &streams{tree: m.tree, sizes: sizes == "Yes"}
	if err := s.make(); err != nil {
		return err
	}
	defer s.remove()
	err = s.feed(ctx, a, m.child(state))
	switch {
	case err != nil || s.finished:
		return err
	case s.opened:
		return fmt.Errorf("update module %q, %s: started downloading, but did not finish", m.name, state)
	}
	s.remove()
	return m.store(a)
}

// store puts the payload under files/, for modules that do not stream.
func (m *module) store(a *artifact) error {
	dir := filepath.Join(m.tree, "files")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for {
		f, err := a.nextFile()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := checkPayloadName(f.Name); err != nil {
			return err
		}
		if err := copySynced(filepath.Join(dir, f.Name), f); err != nil {
			return err
		}
	}
	// The files are there for all later states, so after a power cut as well.
	return errors.Join(syncDir(dir), syncDir(m.tree))
}

func copySynced(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
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
	tree     string
	sizes    bool            // tell the sizes of files
	gone     context.Context // done when the module has ended
	opened   bool            // the module has opened stream-next
	finished bool            // the module has been told that there are no more files
	data     *os.File        // the stream that is being written, or nil
}

var errModuleGone = errors.New("the update module has ended")

func (s *streams) next() string { return filepath.Join(s.tree, "stream-next") }
func (s *streams) dir() string  { return filepath.Join(s.tree, "streams") }

func (s *streams) make() error {
	if err := os.Mkdir(s.dir(), 0o700); err != nil {
		return err
	}
	return mkfifo(s.next())
}

func (s *streams) remove() {
	os.Remove(s.next())
	os.RemoveAll(s.dir())
}

func mkfifo(path string) error {
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		return &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	return nil
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
		next, err := s.open(s.next())
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
	if err := mkfifo(filepath.Join(s.dir(), f.Name)); err != nil {
		return err
	}
	line := "streams/" + f.Name
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
	pipe, err := s.open(filepath.Join(s.dir(), f.Name))
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

// open opens a named pipe for writing as soon as the module has opened it for reading. The
// open must not block, for the module may end instead; without a reader it fails with ENXIO
// (fifo(7)), and there is no event to wait for, hence the repetition. A reader cannot be
// missed: its open blocks until ours succeeds.
func (s *streams) open(path string) (*os.File, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0)
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
