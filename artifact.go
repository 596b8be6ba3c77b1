// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
)

// The reader of Mender artifacts, format version 3 (mender-artifact,
// Documentation/artifact-format-v3.md). One pass, nothing is rewound. It takes the members in
// their one legal order under their exact names and refuses everything else; nothing of the
// header is parsed before the manifest's signature and the header's checksum were right.

// What an artifact may ask for, in bytes unless said.
const (
	maxVersion  = 1 << 10
	maxManifest = 1 << 20
	maxSig      = 64 << 10
	maxHeader   = 16 << 20 // stored, and also unpacked
	maxScript   = 4 << 20
	maxInfo     = 1 << 20 // header-info, type-info, meta-data
	maxName     = 100     // a file's name in the manifest
)

type artifactOptions struct {
	keys      []verifyKey // nil: no signature demanded; a present one is then not checked
	dictLimit int64       // xz and zstd: refuse larger dictionaries; 0 = defaultDictLimit
	manifest  string      // SHA-256 that it has to have, hex: until it comes, the file is not the one; "": any
	buffer    int         // bytes read ahead; 0 = inputBuffer
	lg        *logger
}

type scriptFile struct {
	Name string // without "scripts/"
	Body []byte
}

// artifact is an open artifact. openArtifact fills what is exported.
type artifact struct {
	Name, Group string
	DeviceTypes []string
	Depends     map[string][]string // header-info and type-info together, without device_type
	Provides    map[string]string   // of type-info; nil = absent
	Clears      []string            // clears_artifact_provides; nil = absent
	PayloadType string              // "" when Empty
	Empty       bool                // payload type null: bootstrap artifact, empty payload
	Scripts     []scriptFile
	HeaderInfo  json.RawMessage // as stored
	TypeInfo    json.RawMessage // as stored
	MetaData    json.RawMessage // as stored; nil when absent or zero bytes
	ManifestSum [32]byte        // SHA-256 of the manifest: the artifact's identity
	Signed      bool            // there is a signature
	SignedBy    string          // path of the key that verified it, "" when unchecked
	Compression string          // of the payload: none, gzip, xz, zstd

	opt      artifactOptions
	in       *input
	outer    *tarStream
	manifest map[string][32]byte // what has not been met yet
	dataAt   int64               // offset in the file of the data member
	dataEnd  int64               // and of its end
	un       unpacker            // of the data member; nil when there is none
	data     *tarStream
	file     *payloadFile // the one that nextFile gave last
	ended    bool
}

// openArtifact reads r up to the payload's first tar header and verifies manifest, signature
// and header. What is wrong with the artifact is refused; an error of r itself is handed on.
func openArtifact(r io.Reader, opt artifactOptions) (*artifact, error) {
	if opt.dictLimit == 0 {
		opt.dictLimit = defaultDictLimit()
	}
	if opt.buffer == 0 {
		opt.buffer = inputBuffer
	}
	a := &artifact{opt: opt, in: newInput(r, 0, opt.buffer)}
	if err := a.openManifest(); err != nil {
		return nil, a.fail(err)
	}
	return a, nil
}

// fail makes the error that the caller sees: an error of the source as it is, everything
// else a refusal.
func (a *artifact) fail(err error) error {
	var coded *codedError
	switch {
	case a.in.failed != nil:
		return fmt.Errorf("reading the artifact at offset %d: %w", a.in.offset(), a.in.failed)
	case errors.As(err, &coded) && (a.opt.manifest == "" || a.ManifestSum != [32]byte{}):
		return err
	case a.opt.manifest != "" && a.ManifestSum == [32]byte{}:
		return tryLater("artifact: %w", err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return refuse("artifact: cut off, at offset %d of the file: %w", a.in.offset(), err)
	}
	return refuse("artifact: %w", err)
}

func (a *artifact) openManifest() error {
	if err := a.recognise(); err != nil {
		return err
	}
	a.outer = &tarStream{name: "artifact", r: counter{r: a.in}}
	version, err := a.whole("version", maxVersion)
	if err != nil {
		return err
	}
	if err := checkVersion(version); err != nil {
		return err
	}
	manifest, err := a.whole("manifest", maxManifest)
	if err != nil {
		return err
	}
	if a.manifest, err = parseManifest(manifest); err != nil {
		return err
	}
	a.ManifestSum = sha256.Sum256(manifest)
	if got := hex.EncodeToString(a.ManifestSum[:]); a.opt.manifest != "" && got != a.opt.manifest {
		return tryLater("the artifact's manifest has SHA-256 %s, want %s", got, a.opt.manifest)
	}
	if err := a.expectSum("version", sha256.Sum256(version)); err != nil {
		return err
	}
	if err := a.openHeader(manifest); err != nil {
		return err
	}
	if n := len(a.manifest); a.PayloadType == "rootfs-image" && n != 1 {
		return fmt.Errorf("manifest names %d payload files, and a rootfs-image holds exactly one", n)
	}
	for name := range a.manifest {
		if f, ok := strings.CutPrefix(name, "data/0000/"); !ok || a.Empty || checkPayloadName(f) != nil {
			return fmt.Errorf("manifest names %q, which such an artifact cannot have", name)
		}
	}
	return a.openData()
}

// errNoArtifact: the file is none at all, as against one that is damaged or not taken.
var errNoArtifact = errors.New("not a Mender artifact")

// recognise refuses what is no artifact by its first bytes, and says what it looks like.
func (a *artifact) recognise() error {
	head, err := a.in.peek(512)
	if err != nil {
		return err
	}
	if beginsArtifact(head) {
		return nil
	}
	if head, err = a.in.peek(min(looksAt, len(a.in.buf))); err != nil {
		return err
	}
	what, advice := looksLike(head)
	for kind, magic := range compressionMagic {
		if magic == "" || !bytes.HasPrefix(head, []byte(magic)) {
			continue
		}
		if in := a.unpackStart(kind, head); beginsArtifact(in) {
			what = "looks like one, but the whole file is compressed with " + kind
			advice = "unpack it once: the file inside is the artifact"
		} else if len(in) > 0 {
			inner, _ := looksLike(in)
			what += "; unpacked it " + strings.TrimPrefix(inner, "it ")
		}
	}
	return withHint(refuse("%w: %s", errNoArtifact, what), "%s", advice)
}

// beginsArtifact tells the start of an artifact, 512 bytes or all there is: its first member is
// version. Before it there may be a pax header.
func beginsArtifact(head []byte) bool {
	_, isTar := firstMember(head)
	return bytes.HasPrefix(head, []byte("version\x00")) || isTar && head[156] == 'x'
}

// unpackStart gives what the start of a compressed file holds, as far as that goes.
func (a *artifact) unpackStart(kind string, head []byte) []byte {
	in := newInput(bytes.NewReader(head), 0, len(head))
	in.section(int64(len(head)))
	out := make([]byte, 4<<10)
	un, err := newUnpacker(kind, in, unpackLimits{dict: a.opt.dictLimit, out: int64(len(out))})
	if err != nil {
		return nil
	}
	n, _ := io.ReadFull(un, out) // it is cut off, so there may be an error
	return out[:n]
}

// openHeader reads what is between manifest and payload.
func (a *artifact) openHeader(manifest []byte) error {
	h, err := a.member()
	if err != nil {
		return err
	}
	if h.Name == "manifest.sig" {
		sig, err := a.outer.all(h, maxSig)
		if err != nil {
			return err
		}
		a.Signed = true
		if a.opt.keys == nil {
			a.opt.lg.warnf("artifact is signed, but no key is configured: signature not checked")
		} else if a.SignedBy, err = verifySignature(a.opt.keys, manifest, sig); err != nil {
			return err
		}
		if h, err = a.member(); err != nil {
			return err
		}
	}
	if a.opt.keys != nil && !a.Signed {
		return withHint(refuse("artifact: not signed, and a signature is demanded by key %q", a.opt.keys[0].path),
			"sign it: mender-artifact sign, or mendlet pack --key")
	}
	if strings.HasPrefix(h.Name, "manifest-augment") || strings.HasPrefix(h.Name, "header-augment") {
		return fmt.Errorf("member %q: augmented artifacts are not supported", h.Name)
	}
	kind, ok := compressionOf(h.Name, "header.tar")
	if !ok {
		return fmt.Errorf("member %q at offset %d: want header.tar, .gz, .xz or .zst", h.Name, a.in.offset())
	}
	stored, err := a.outer.all(h, maxHeader)
	if err != nil {
		return err
	}
	if err := a.expectSum(h.Name, sha256.Sum256(stored)); err != nil {
		return err
	}
	if err := a.readHeader(stored, kind); err != nil {
		return fmt.Errorf("%s: %w", h.Name, err)
	}
	return nil
}

// member gives the next member of the outer tar; its end is an error.
func (a *artifact) member() (*tarFile, error) {
	h, err := a.outer.next()
	if err == io.EOF {
		return nil, fmt.Errorf("ends at offset %d, without a payload", a.in.offset())
	}
	return h, err
}

// whole reads the next member, which must have that name.
func (a *artifact) whole(name string, limit int64) ([]byte, error) {
	h, err := a.member()
	if err != nil {
		return nil, err
	}
	if h.Name != name {
		return nil, fmt.Errorf("member %q at offset %d: want %q", h.Name, a.in.offset(), name)
	}
	return a.outer.all(h, limit)
}

// expectSum strikes name off the manifest, whose checksum for it must be sum.
func (a *artifact) expectSum(name string, sum [32]byte) error {
	want, ok := a.manifest[name]
	if !ok {
		return fmt.Errorf("%q is not in the manifest", name)
	}
	if sum != want {
		return fmt.Errorf("%q: SHA-256 is %x, the manifest wants %x", name, sum, want)
	}
	delete(a.manifest, name)
	return nil
}

func checkVersion(text []byte) error {
	var v struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	if err := unmarshalObject("version", text, &v); err != nil {
		return err
	}
	if v.Format != "mender" {
		return fmt.Errorf("version: format %q, want %q", v.Format, "mender")
	}
	if v.Version != 3 {
		return withHint(refuse("artifact: format version %d, want 3", v.Version),
			"write it again with mender-artifact write … -v 3, or with mendlet pack")
	}
	return nil
}

// parseManifest takes lines of 64 lower-case hexadecimal digits, two spaces, a name, LF.
func parseManifest(text []byte) (map[string][32]byte, error) {
	m := map[string][32]byte{}
	for n := 1; len(text) > 0; n++ {
		line, rest, ok := bytes.Cut(text, []byte("\n"))
		text = rest
		name := ""
		var sum [32]byte
		if ok = ok && len(line) > 66 && len(line) <= 66+maxName; ok {
			_, err := hex.Decode(sum[:], line[:64])
			name = string(line[66:])
			ok = err == nil && bytes.Equal(bytes.ToLower(line[:64]), line[:64]) && string(line[64:66]) == "  " &&
				!strings.ContainsFunc(name, unprintable)
		}
		if !ok {
			return nil, fmt.Errorf("manifest line %d: %q, want 64 hex digits, two spaces, a name of at most %d bytes, line "+
				"feed", n, clip(line), maxName)
		}
		if _, twice := m[name]; twice {
			return nil, fmt.Errorf("manifest line %d: %q for the second time", n, name)
		}
		if len(m) >= maxMembers {
			return nil, fmt.Errorf("manifest: more than %d lines", maxMembers)
		}
		m[name] = sum
	}
	return m, nil
}

// unprintable tells blanks and control characters.
func unprintable(r rune) bool { return r <= ' ' || r == 0x7f }

// readHeader unpacks and parses the header tar.
func (a *artifact) readHeader(stored []byte, kind string) error {
	in := newInput(bytes.NewReader(stored), 0, 32<<10)
	in.section(int64(len(stored)))
	un, err := newUnpacker(kind, in, unpackLimits{dict: a.opt.dictLimit, out: maxHeader})
	if err != nil {
		return err
	}
	t := &tarStream{name: "header", r: counter{r: un}, limit: maxHeader}
	if err := a.headerMembers(t); err != nil {
		return err
	}
	if in.offset() != in.stop {
		return fmt.Errorf("data after the end of the %s stream", kind)
	}
	return a.parseInfo()
}

// headerMembers takes the members of the header tar in their order.
func (a *artifact) headerMembers(t *tarStream) error {
	h, err := t.next()
	for want := 0; err == nil; h, err = t.next() {
		script, isScript := strings.CutPrefix(h.Name, "scripts/")
		var into *json.RawMessage
		switch {
		case want == 0 && h.Name == "header-info":
			into, want = &a.HeaderInfo, 1
		case want == 1 && isScript:
			if err := a.readScript(t, h, script); err != nil {
				return err
			}
			continue
		case want == 1 && h.Name == "headers/0000/type-info":
			into, want = &a.TypeInfo, 2
		case want == 2 && h.Name == "headers/0000/meta-data":
			into, want = &a.MetaData, 3
		case want >= 2 && strings.HasPrefix(h.Name, "headers/"):
			return fmt.Errorf("member %q: artifacts with more than one payload are not supported", h.Name)
		default:
			return fmt.Errorf("member %q at offset %d: want %s", h.Name, t.r.n,
				[]string{"header-info", "scripts/… or headers/0000/type-info", "headers/0000/meta-data or the end",
					"the end"}[want])
		}
		if *into, err = t.all(h, maxInfo); err != nil {
			return err
		}
		if into == &a.MetaData && len(a.MetaData) == 0 {
			a.MetaData = nil
		}
	}
	if err == io.EOF {
		err = nil
	}
	if err == nil && a.TypeInfo == nil {
		err = errors.New("no headers/0000/type-info")
	}
	return err
}

// isScriptName is for the scripts of an artifact: STATE_ACTION_NN or STATE_ACTION_NN_WHAT.
func isScriptName(name string) bool {
	state, rest, _ := strings.Cut(name, "_")
	action, order, _ := strings.Cut(rest, "_")
	switch state {
	case "ArtifactInstall", "ArtifactReboot", "ArtifactCommit",
		"ArtifactRollback", "ArtifactRollbackReboot", "ArtifactFailure":
		return (action == "Enter" || action == "Leave" || action == "Error") && isScriptOrder(order)
	}
	return false
}

// isScriptOrder is for what ends the name of any script: NN or NN_WHAT. A slash is not
// allowed, which Mender's own pattern would admit (MEN-9057).
func isScriptOrder(s string) bool {
	if len(s) < 2 || s[0] < '0' || s[0] > '9' || s[1] < '0' || s[1] > '9' || strings.ContainsAny(s, " \t\n\f\r/") {
		return false
	}
	return len(s) == 2 || len(s) > 3 && s[2] == '_'
}

func (a *artifact) readScript(t *tarStream, h *tarFile, name string) error {
	if !isScriptName(name) || strings.ContainsFunc(name, unprintable) {
		return fmt.Errorf("script %q: want a name such as ArtifactInstall_Enter_00_what", name)
	}
	for _, s := range a.Scripts {
		if s.Name == name {
			return fmt.Errorf("script %q for the second time", name)
		}
	}
	body, err := t.all(h, maxScript)
	a.Scripts = append(a.Scripts, scriptFile{name, body})
	return err
}

// oneOrMore is a string or a list of strings.
type oneOrMore []string

func (l *oneOrMore) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil && string(b) != "null" {
		*l = oneOrMore{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(l))
}

type headerInfo struct {
	Payloads []struct {
		Type *string `json:"type"`
	} `json:"payloads"`
	Provides struct {
		Name  string `json:"artifact_name"`
		Group string `json:"artifact_group"`
	} `json:"artifact_provides"`
	Depends struct {
		DeviceType []string `json:"device_type"`
		Name       []string `json:"artifact_name"`
		Group      []string `json:"artifact_group"`
	} `json:"artifact_depends"`
}

type typeInfo struct {
	Type     *string              `json:"type"`
	Depends  map[string]oneOrMore `json:"artifact_depends"`
	Provides map[string]string    `json:"artifact_provides"`
	Clears   []string             `json:"clears_artifact_provides"`
}

// unmarshalObject takes a JSON object. Names match without regard to case and unknown ones
// are ignored, as with Mender.
func unmarshalObject(name string, text []byte, to any) error {
	if !bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte("{")) {
		return fmt.Errorf("%s: %q is not a JSON object", name, clip(text))
	}
	if err := json.Unmarshal(text, to); err != nil {
		return fmt.Errorf("%s: %w", name, atPlace(text, err))
	}
	fold := 1 // below are names of the artifact's own
	if _, own := to.(*map[string]json.RawMessage); own {
		fold = 0
	}
	if err := uniqueKeys(text, fold); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (a *artifact) parseInfo() error {
	var h headerInfo
	var t typeInfo
	if err := unmarshalObject("header-info", a.HeaderInfo, &h); err != nil {
		return err
	}
	if err := unmarshalObject("type-info", a.TypeInfo, &t); err != nil {
		return err
	}
	if a.MetaData != nil {
		if err := unmarshalObject("meta-data", a.MetaData, &map[string]json.RawMessage{}); err != nil {
			return err
		}
	}
	switch n := len(h.Payloads); {
	case n == 0:
		return errors.New("header-info: no payloads")
	case n > 1:
		return fmt.Errorf("header-info: %d payloads; more than one is not supported", n)
	}
	a.Name, a.Group, a.DeviceTypes = h.Provides.Name, h.Provides.Group, h.Depends.DeviceType
	if a.Name == "" || strings.ContainsFunc(a.Name+a.Group, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fmt.Errorf("header-info: artifact_name %q, artifact_group %q: want a name, and no control characters", a.Name,
			a.Group)
	}
	if len(a.DeviceTypes) == 0 {
		return errors.New("header-info: artifact_depends has no device_type")
	}
	if err := a.setType(h.Payloads[0].Type, t.Type); err != nil {
		return err
	}
	return a.setRelations(&h, &t)
}

// setType takes the payload's type from header-info. In type-info mender-artifact may leave
// it empty.
func (a *artifact) setType(header, info *string) error {
	if header == nil {
		a.Empty = true
		if info != nil || a.MetaData != nil {
			return errors.New("an empty payload (type null) has a type in type-info, or meta-data")
		}
		return nil
	}
	a.PayloadType = *header
	// The type becomes the name of a program (MEN-9027) and an argument.
	if t := *header; t == "" || t == "." || t == ".." || t[0] == '-' ||
		strings.ContainsFunc(t, func(r rune) bool { return r == '/' || unprintable(r) }) {
		return fmt.Errorf("header-info: payload type %q: want a plain file name", t)
	}
	if info != nil && *info != "" && *info != *header {
		return fmt.Errorf("payload type is %q in header-info, %q in type-info", *header, *info)
	}
	return nil
}

func (a *artifact) setRelations(h *headerInfo, t *typeInfo) error {
	a.Provides, a.Clears = t.Provides, t.Clears
	a.Depends = map[string][]string{}
	if h.Depends.Name != nil {
		a.Depends["artifact_name"] = h.Depends.Name
	}
	if h.Depends.Group != nil {
		a.Depends["artifact_group"] = h.Depends.Group
	}
	for k, v := range t.Depends {
		if _, twice := a.Depends[k]; twice || k == "device_type" {
			return fmt.Errorf("artifact_depends: %q is in header-info and in type-info", k)
		}
		a.Depends[k] = v
	}
	for k := range t.Provides {
		if k == "artifact_name" || k == "artifact_group" && a.Group != "" {
			return fmt.Errorf("artifact_provides: %q is in header-info and in type-info", k)
		}
	}
	for _, p := range t.Clears {
		if strings.HasSuffix(p, `\`) {
			return fmt.Errorf("clears_artifact_provides: %q ends in a backslash", p)
		}
	}
	return nil
}

// openData reads the tar header of the data member.
func (a *artifact) openData() error {
	h, err := a.outer.next()
	if err == io.EOF && a.Empty {
		a.ended, a.Compression = true, "none"
		return nil
	}
	if err == io.EOF {
		return fmt.Errorf("ends at offset %d, without a payload", a.in.offset())
	}
	if err != nil {
		return err
	}
	kind, ok := compressionOf(h.Name, "data/0000.tar")
	if !ok {
		return fmt.Errorf("member %q at offset %d: want data/0000.tar, .gz, .xz or .zst", h.Name, a.in.offset())
	}
	a.Compression = kind
	a.in.section(h.Size)
	a.dataAt, a.dataEnd = a.in.offset(), a.in.stop
	if a.un, err = newUnpacker(kind, a.in, a.limits()); err != nil {
		return fmt.Errorf("%s: %w", h.Name, err)
	}
	a.data = &tarStream{name: h.Name, r: counter{r: a.un}}
	return nil
}

func (a *artifact) limits() unpackLimits { return unpackLimits{dict: a.opt.dictLimit} }

// Names of payload files, as mender-artifact's reader takes them.
func checkPayloadName(name string) error {
	bad := func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-.,", r))
	}
	if name == "" || name == "." || name == ".." || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("payload file %q: want a name of letters, digits and _-.,", name)
	}
	return nil
}

// payloadFile is one file of the payload. It must be read to its end.
type payloadFile struct {
	Name      string
	Size      int64    // bytes
	Sum       [32]byte // from the manifest
	TarOffset int64    // offset in the data tar of the file's first byte

	a    *artifact
	hash hash.Hash
	done bool // the checksum was right
}

// nextFile gives the next payload file; io.EOF after the last one, when data tar and
// artifact have ended as they must and every manifest entry was used.
func (a *artifact) nextFile() (*payloadFile, error) {
	if a.file != nil && !a.file.done {
		return nil, a.fail(fmt.Errorf("payload file %q was not verified", a.file.Name))
	}
	if !a.ended {
		h, err := a.data.next()
		if err == nil {
			if a.file, err = a.newFile(h); err == nil {
				return a.file, nil
			}
		}
		if err == io.EOF {
			err = a.end()
		}
		if err != nil {
			return nil, a.fail(err)
		}
	}
	for _, name := range sortedKeys(a.manifest) {
		return nil, a.fail(fmt.Errorf("%q is in the manifest and not in the payload", name))
	}
	return nil, io.EOF
}

func (a *artifact) newFile(h *tarFile) (*payloadFile, error) {
	if err := checkPayloadName(h.Name); err != nil {
		return nil, err
	}
	sum, ok := a.manifest["data/0000/"+h.Name]
	if !ok {
		return nil, fmt.Errorf("payload file %q is not in the manifest, or there twice", h.Name)
	}
	delete(a.manifest, "data/0000/"+h.Name)
	return &payloadFile{Name: h.Name, Size: h.Size, Sum: sum, TarOffset: a.data.r.n, a: a, hash: sha256.New()}, nil
}

// end checks what follows the data tar.
func (a *artifact) end() error {
	if a.in.offset() != a.dataEnd {
		return fmt.Errorf("%s: data after the end of the %s stream, at offset %d of the artifact", a.data.name,
			a.Compression, a.in.offset())
	}
	a.in.section(-1)
	a.outer.left, a.outer.r.n = 0, a.dataEnd
	h, err := a.outer.next()
	switch {
	case err == io.EOF:
		a.ended = true
		return nil
	case err == nil:
		err = fmt.Errorf("member %q at offset %d: want the end (more than one payload is not supported)", h.Name,
			a.in.offset())
	}
	return err
}

// Read hashes what it gives. The end is io.EOF only if the checksum is right.
func (f *payloadFile) Read(p []byte) (int, error) {
	n, err := f.read(p)
	f.hash.Write(p[:n])
	if err == io.EOF {
		if verr := f.verify([32]byte(f.hash.Sum(nil))); verr != nil {
			err = verr
		}
	}
	return n, err
}

func (f *payloadFile) read(p []byte) (int, error) {
	n, err := f.a.data.Read(p)
	if err != nil && err != io.EOF {
		err = f.a.fail(fmt.Errorf("%s: payload file %q at offset %d: %w", f.a.data.name, f.Name, f.a.data.r.n-f.TarOffset,
			err))
	}
	return n, err
}

type readFunc func(p []byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// unhashed reads the file for one who hashes it himself and then calls verify.
func (f *payloadFile) unhashed() io.Reader { return readFunc(f.read) }

// verify says whether sum, of the file read to its end, is what the manifest wants.
func (f *payloadFile) verify(sum [32]byte) error {
	if f.a.data.left != 0 {
		return fmt.Errorf("payload file %q: %d bytes were not read", f.Name, f.a.data.left)
	}
	if sum != f.Sum {
		return f.a.fail(fmt.Errorf("payload file %q: SHA-256 is %x, the manifest wants %x", f.Name, sum, f.Sum))
	}
	f.done = true
	return nil
}

// skip is for one who knows that the content is in place. What follows in the artifact, no other
// file if the manifest names none, is not read.
func (f *payloadFile) skip() { f.done, f.a.ended = true, true }

// latestRestart gives the latest point, at or before what was read of the current payload file, at which
// resumePayload can go on. Points whose window would reach back before the file's
// first byte are left out, so that the window is always part of the file.
func (a *artifact) latestRestart() (restartPoint, bool) {
	if a.un == nil || a.file == nil {
		return restartPoint{}, false
	}
	p, ok := a.un.latestRestart()
	from := a.file.TarOffset
	if !p.Fresh {
		from += gzipWindow
	}
	return p, ok && p.Out >= from && p.Out <= a.file.TarOffset+a.file.Size
}

// resumePayload goes on with payload file name, which nextFile has just given, at byte
// fileOff of it. r stands at p.File of the same artifact. window is the 32 KiB of the file
// before p.Out, which gzip needs unless p.Fresh. The caller knows the hash of the bytes
// before fileOff: it reads on with unhashed and calls verify.
func (a *artifact) resumePayload(p restartPoint, window []byte, r io.Reader, name string,
	fileOff int64) (*payloadFile, error) {
	f := a.file
	if f == nil || f.done || f.Name != name || p.Kind != a.Compression || p.File > a.dataEnd ||
		p.Out < f.TarOffset || p.Out > f.TarOffset+fileOff || fileOff > f.Size {
		return nil, a.fail(fmt.Errorf("cannot go on with payload file %q of %s data at byte %d, from %+v", name,
			a.Compression, fileOff, p))
	}
	in := newInput(r, p.File, a.opt.buffer)
	in.section(a.dataEnd - p.File)
	un, err := resumeUnpacker(in, p, window, a.limits())
	if err != nil {
		return nil, a.fail(err)
	}
	a.unpackWith(in, un, p.Out)
	if _, err := io.CopyN(io.Discard, f.unhashed(), f.TarOffset+fileOff-p.Out); err != nil {
		return nil, a.fail(noEOF(err))
	}
	return f, nil
}

// unpackWith goes on with the file that nextFile gave last, at byte out of the data tar, where un stands. in is what un
// reads, and is to stand at the end of the data member when un has ended.
func (a *artifact) unpackWith(in *input, un unpacker, out int64) {
	a.in, a.un, a.outer.r.r = in, un, in
	a.data = &tarStream{name: a.data.name, r: counter{r: un, n: out}, left: a.file.TarOffset + a.file.Size - out,
		members: a.data.members}
}

// files gives the payload files that are left, each before the next is read. After an error there
// are no more.
func (a *artifact) files() iter.Seq2[*payloadFile, error] {
	return func(yield func(*payloadFile, error) bool) {
		for {
			f, err := a.nextFile()
			if err == io.EOF || !yield(f, err) || err != nil {
				return
			}
		}
	}
}

// drain reads the artifact to its end, so that all of it is verified.
func (a *artifact) drain() error {
	for f, err := range a.files() {
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, f); err != nil {
			return err
		}
	}
	return nil
}

// checkDepends says whether the artifact is for this device. provides is what the device
// has stored, artifact_name and artifact_group among it.
func (a *artifact) checkDepends(deviceType string, provides map[string]string) error {
	if !listed(a.DeviceTypes, deviceType) {
		return refuse("artifact %q is for device type %q; this device is %q", a.Name, strings.Join(a.DeviceTypes, ", "),
			deviceType)
	}
	for _, key := range sortedKeys(a.Depends) {
		got, ok := provides[key]
		if !ok {
			return refuse("artifact %q depends on %s %q; this device provides no %s", a.Name, key, a.Depends[key], key)
		}
		if !listed(a.Depends[key], got) {
			return refuse("artifact %q depends on %s %q; this device provides %q", a.Name, key, a.Depends[key], got)
		}
	}
	return nil
}

// mergeProvides is what the device provides once a is installed. stored is not changed.
// Without clears_artifact_provides everything stored goes, also when the artifact provides
// nothing itself.
func mergeProvides(stored map[string]string, a *artifact) map[string]string {
	merged := map[string]string{}
	if a.Clears != nil {
		maps.Copy(merged, stored)
		maps.DeleteFunc(merged, func(key, _ string) bool {
			return slices.ContainsFunc(a.Clears, func(p string) bool { return matchClears(p, key) })
		})
	}
	maps.Copy(merged, a.Provides)
	merged["artifact_name"] = a.Name
	if a.Group != "" {
		merged["artifact_group"] = a.Group
	}
	return merged
}

// What provides and the like may take, in bytes of their JSON. The journal holds the provides of the device
// up to three times over while a server's update is under way: before or after it, as they were sent to
// the server, and what the artifact brings. So any update that keeps to this fits, and after artifacts
// that took all of maxProvides those of the usual kind, which bring a few hundred bytes, still do.
const (
	maxNames       = 1 << 10  // artifact_name and artifact_group
	maxClears      = 2 << 10  // clears_artifact_provides
	usualProvides  = 1 << 10  // what an artifact of the usual kind brings
	maxProvides    = 6 << 10  // of the device after an update
	maxAllProvides = 10 << 10 // the same after one of the usual kind
)

// checkProvides refuses an artifact after which the device would provide too much. What it has from before
// may be more, as long as it does not grow.
func checkProvides(stored map[string]string, a *artifact) error {
	size := func(v any) int {
		text, _ := json.Marshal(v) // strings cannot fail
		return len(text)
	}
	if n := size([]string{a.Name, a.Group}); n > maxNames {
		return refuse("artifact %.100q: its name and group have %d bytes, want %d at most", a.Name, n, maxNames)
	}
	if n := size(a.Clears); n > maxClears {
		return refuse("artifact %q: clears_artifact_provides has %d bytes, want %d at most", a.Name, n, maxClears)
	}
	limit := maxProvides
	if size(a.Provides) <= usualProvides {
		limit = maxAllProvides
	}
	limit = max(limit, size(stored))
	if n := size(mergeProvides(stored, a)); n > limit {
		return withHint(refuse("artifact %q would make the device provide %d bytes, want %d at most", a.Name, n, limit),
			"an artifact that clears '*' removes what others have left: mendlet pack --clears-provides '*'")
	}
	return nil
}

// matchClears matches the whole key. "*" is any run of characters, "\*" a star, everything
// else stands for itself.
func matchClears(pattern, key string) bool {
	const star = "\x00"
	if strings.HasSuffix(pattern, `\`) || strings.Contains(pattern+key, star) {
		return false
	}
	parts := strings.Split(strings.ReplaceAll(pattern, `\*`, star), "*")
	for i, p := range parts {
		parts[i] = strings.ReplaceAll(p, star, "*")
	}
	key, ok := strings.CutPrefix(key, parts[0])
	if !ok || len(parts) == 1 {
		return ok && key == ""
	}
	last := len(parts) - 1
	for _, p := range parts[1:last] {
		_, after, found := strings.Cut(key, p)
		if !found {
			return false
		}
		key = after
	}
	return strings.HasSuffix(key, parts[last])
}
