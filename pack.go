// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// What pack writes can be entered again every packFlush bytes of the data tar (gzip, as
// pgzip does in mender-artifact) or every packBlock bytes (xz). The xz dictionary bounds
// what a device needs to unpack. The price: 48 MiB of a Debian /usr/lib, with many similar
// files, came to 28.3 MB with blocks of 8 MiB and a dictionary of 4 MiB, to 20.9 MB with the
// 192 and 64 MiB that mender-artifact takes (xz --lzma2=preset=2,dict=… --block-size=…).
const (
	packFlush = 1 << 20
	packBlock = 8 << 20 // packDict is in pack_xz.go
)

const packUsage = `usage: mendlet pack -n NAME -c DEVICE_TYPE -f FILE [OPTION]… -o FILE|-
       mendlet pack --bootstrap -n NAME -c DEVICE_TYPE [OPTION]… -o FILE|-

Writes an artifact. The same input gives the same bytes.

Examples:
  mendlet pack -n release-2 -c board -f rootfs.ext4 -o release-2.mender
  mendlet pack --delta -n release-3 -c board -f rootfs.ext4 -o release-3.mender
  mendlet pack -T single-file -n app-3 -c board -f app -m meta.json -k key.pem -o app-3.mender

Options:
`

// packVerbs is the verb pack. The recovery build has none, so nothing below is linked into it; its
// tests make artifacts with what is below all the same.
func packVerbs() []verb {
	if recovery {
		return nil
	}
	return []verb{{"pack", "…", "make an artifact; see 'mendlet pack --help'", -1, nil,
		func(_ context.Context, a *app, w []string) error { return packCommand(w, a.out, a.lg) }}}
}

// packOptions are named as mender-artifact's.
type packOptions struct {
	typ, name, metaFile, group            string
	compression, keyFile, output          string
	softName, softVersion, softFS         string
	devices, files, scripts               []string
	provides, depends                     map[string]oneOrMore
	nameDepends, groupDepends, clears     []string
	noVersion, noClears, noSum, bootstrap bool
	delta                                 packedDelta

	mtime int64         // of all members, in seconds since 1970
	key   crypto.Signer // nil: not signed
}

// pairFlag collects KEY:VALUE.
func pairFlag(m map[string]oneOrMore) func(string) error {
	return func(s string) error {
		k, v, ok := strings.Cut(s, ":")
		if !ok || k == "" {
			return fmt.Errorf("%q: want KEY:VALUE", s)
		}
		m[k] = append(m[k], v)
		return nil
	}
}

// flags declares the options.
func (o *packOptions) flags(fs *flag.FlagSet) {
	text := func(p *string, def, help string, names ...string) { textFlag(fs, p, def, help, names) }
	list := func(f func(string) error, help string, names ...string) {
		for _, n := range names {
			fs.Func(n, help+"; repeatable", f)
		}
	}
	yes := func(p *bool, help, name string) { fs.BoolVar(p, name, false, help) }
	o.provides, o.depends = map[string]oneOrMore{}, map[string]oneOrMore{}
	text(&o.typ, "rootfs-image", "payload `TYPE`: the update module's name", "T", "type")
	text(&o.name, "", "artifact `NAME`", "n", "artifact-name", "name")
	list(listFlag(&o.devices), "`DEVICE_TYPE` that the artifact is for", "c", "t", "device-type", "compatible-types")
	list(listFlag(&o.files), "payload `FILE`", "f", "file")
	text(&o.metaFile, "", "JSON `FILE` with the payload's meta-data", "m", "meta-data")
	list(listFlag(&o.scripts), "state script `FILE`", "s", "script")
	text(&o.group, "", "`GROUP` that the artifact provides", "g", "provides-group")
	list(pairFlag(o.provides), "`KEY:VALUE` that the payload provides", "p", "provides")
	list(pairFlag(o.depends), "`KEY:VALUE` that the payload depends on", "d", "depends")
	list(listFlag(&o.nameDepends), "`NAME` of an artifact that must be installed", "N", "artifact-name-depends")
	list(listFlag(&o.groupDepends), "`GROUP` that must be provided", "G", "depends-groups")
	list(listFlag(&o.clears), "`PATTERN` of provides that the payload clears", "clears-provides")
	text(&o.softName, "", "`NAME` in the key FS.NAME.version of the software version", "software-name")
	text(&o.softVersion, "", "`VERSION` stored under the key FS.NAME.version (the artifact's name)", "software-version")
	text(&o.softFS, "", "`FS` in the key FS.NAME.version (rootfs-image)", "software-filesystem")
	text(&o.compression, "gzip", "`KIND`: none, gzip, xz, or lzma, which is xz", "compression")
	text(&o.keyFile, "", "private key `FILE` to sign with: RSA or P-256, PEM", "k", "key")
	text(&o.output, "", "`FILE` to write, - for standard output", "o", "output-path", "output")
	yes(&o.noVersion, "do not provide a software version, do not clear", "no-default-software-version")
	yes(&o.noClears, "do not clear earlier software versions", "no-default-clears-provides")
	yes(&o.noSum, "do not provide rootfs-image.checksum", "no-checksum-provide")
	fs.BoolFunc("delta", "let devices fetch only what they do not have of a rootfs-image, in pieces of 32k on average "+
		"(squashfs and EROFS: 16k), or with --delta=16k, 32k or 64k of so much", o.delta.set)
	yes(&o.bootstrap, "write a bootstrap artifact: provides, and no payload", "bootstrap")
}

// packCommand is mendlet pack.
func packCommand(args []string, stdout io.Writer, lg *logger) error {
	o := &packOptions{}
	fs := flag.NewFlagSet("pack", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	o.flags(fs)
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, packUsage)
		flagHelp(stdout, fs)
		return nil
	} else if err != nil {
		return unknownOption(fs, "pack", err)
	}
	if fs.NArg() > 0 {
		return usageError("pack: %q is not an option; payload files are given with -f", fs.Arg(0))
	}
	if err := o.check(); err != nil {
		return err
	}
	n, err := o.write(stdout)
	if err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	lg.infof("wrote artifact %q, %d bytes, to %q", o.name, n, o.output)
	return nil
}

// check finds what the reader would refuse, before anything is written.
func (o *packOptions) check() error {
	if o.compression == "lzma" {
		o.compression = "xz"
	}
	typ := &o.typ
	if o.bootstrap {
		typ = nil
	}
	switch {
	case o.name == "" || o.output == "" || len(o.devices) == 0:
		return usageError("pack: want -n NAME, -c DEVICE_TYPE and -o FILE")
	case !listed([]string{"none", "gzip", "xz"}, o.compression):
		return usageError("pack: compression %q: want none, gzip or xz", o.compression)
	case o.bootstrap && (len(o.files)+len(o.scripts) > 0 || o.metaFile != ""):
		return usageError("pack: a bootstrap artifact has no files, scripts or meta-data")
	case o.delta.average > 0 && (o.bootstrap || o.typ != "rootfs-image" || o.compression != "gzip"):
		return usageError("pack: --delta is for a rootfs-image with compression gzip")
	case !o.bootstrap && o.typ == "rootfs-image" && len(o.files) != 1:
		return usageError("pack: %d files given with -f; a rootfs-image has one", len(o.files))
	}
	if err := new(artifact).setType(typ, nil); err != nil {
		return usageError("pack: %v", err)
	}
	seen := map[string]bool{}
	for _, f := range o.files {
		base := filepath.Base(f)
		if err := checkPayloadName(base); err != nil || seen[base] {
			return usageError("pack: %q: names of payload files are of letters, digits and _-., and each once", base)
		}
		seen[base] = true
	}
	for k, v := range o.provides {
		if len(v) > 1 {
			return usageError("pack: provides %q given twice", k)
		}
	}
	return nil
}

// write makes the artifact. The payload is read once: its checksums must come before it in
// the artifact, so it is compressed into a temporary file beside the output first.
func (o *packOptions) write(stdout io.Writer) (n int64, err error) {
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		if o.mtime, err = strconv.ParseInt(s, 10, 64); err != nil {
			return 0, fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
		}
	}
	if o.keyFile != "" {
		if o.key, err = loadSigningKey(o.keyFile); err != nil {
			return 0, err
		}
	}
	dir := os.TempDir()
	if o.output != "-" {
		dir = filepath.Dir(o.output)
	}
	stage, err := tempFile(dir)
	if err != nil {
		return 0, err
	}
	defer stage.Close()
	sums, err := o.writeData(stage)
	if err != nil {
		return 0, err
	}
	if o.output == "-" {
		return o.writeArtifact(stdout, stage, sums)
	}
	out, err := os.CreateTemp(dir, ".mendlet-pack-*")
	if err != nil {
		return 0, err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	if n, err = o.writeArtifact(out, stage, sums); err != nil {
		return 0, err
	}
	if err := errors.Join(out.Chmod(0o644), out.Close()); err != nil {
		return 0, err
	}
	return n, os.Rename(out.Name(), o.output)
}

// tempFile opens a file that has no name any more, so that nothing is left of it.
func tempFile(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".mendlet-pack-*")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// flushing makes a restart point in gzip data after every packFlush bytes.
type flushing struct {
	z gzipWriter
	n int
}

func (f *flushing) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := f.z.Write(p[done:min(len(p), done+packFlush-f.n)])
		done += n
		f.n += n
		if err != nil {
			return done, err
		}
		if f.n == packFlush {
			f.n = 0
			if err := f.z.Flush(); err != nil {
				return done, err
			}
		}
	}
	return done, nil
}

func (f *flushing) Close() error { return f.z.Close() }

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// compress wraps w by o.compression. Close ends the stream and leaves w open.
func (o *packOptions) compress(w io.Writer) (io.WriteCloser, error) {
	switch o.compression {
	case "gzip":
		z, err := newGzip(w)
		return &flushing{z: z}, err
	case "xz":
		return newXZWriter(w, packBlock)
	}
	return nopCloser{w}, nil
}

// suffixed is a member's name by o.compression.
func (o *packOptions) suffixed(stem string) string {
	return stem + map[string]string{"none": "", "gzip": ".gz", "xz": ".xz"}[o.compression]
}

// writeDelta writes the data tar with its one file in chunks, but for o.delta.front.
func (o *packOptions) writeDelta(w io.Writer) (map[string][]byte, error) {
	f, err := os.Open(o.files[0])
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := sizeOf(f)
	if err != nil {
		return nil, err
	}
	name := filepath.Base(o.files[0])
	var head bytes.Buffer
	if err := (&tarWriter{&head, o.mtime}).header(name, size); err != nil {
		return nil, err
	}
	h, n := sha256.New(), &countWriter{w: io.Discard}
	r := io.TeeReader(f, io.MultiWriter(h, n))
	if err = o.delta.write(w, r, head.Bytes()); err == nil && n.n != size {
		err = changedSize(name, n.n, size)
	}
	return map[string][]byte{"data/0000/" + name: h.Sum(nil)}, err
}

// writeData writes the data tar and gives the files' manifest entries.
func (o *packOptions) writeData(w io.Writer) (map[string][]byte, error) {
	if o.delta.average > 0 {
		return o.writeDelta(w)
	}
	z, err := o.compress(w)
	if err != nil {
		return nil, err
	}
	sums := map[string][]byte{}
	t := tarWriter{z, o.mtime}
	for _, path := range o.files {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		size, err := sizeOf(f)
		h := sha256.New()
		if err == nil {
			err = t.add(filepath.Base(path), size, io.TeeReader(f, h))
		}
		f.Close()
		if err != nil {
			return nil, err
		}
		sums["data/0000/"+filepath.Base(path)] = h.Sum(nil)
	}
	if err := t.close(); err != nil {
		return nil, err
	}
	return sums, z.Close()
}

// writeArtifact writes the outer tar; stage holds the data member.
func (o *packOptions) writeArtifact(w io.Writer, stage *os.File, sums map[string][]byte) (int64, error) {
	header, err := o.header(sums)
	if err != nil {
		return 0, err
	}
	const version = `{"format":"mender","version":3}`
	sum := func(name string, b []byte) {
		s := sha256.Sum256(b)
		sums[name] = s[:]
	}
	sum("version", []byte(version))
	sum(o.suffixed("header.tar"), header)
	var manifest []byte
	for _, name := range sortedKeys(sums) {
		manifest = fmt.Appendf(manifest, "%x  %s\n", sums[name], name)
	}
	members := []scriptFile{{"version", []byte(version)}, {"manifest", manifest}}
	if o.key != nil {
		sig, err := signManifest(o.key, manifest)
		if err != nil {
			return 0, err
		}
		members = append(members, scriptFile{"manifest.sig", sig})
	}
	members = append(members, scriptFile{o.suffixed("header.tar"), header})
	size, err := stage.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, err
	}
	if _, err := stage.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	count := &countWriter{w: w}
	t := tarWriter{count, o.mtime}
	for _, m := range members {
		if err := t.add(m.Name, int64(len(m.Body)), bytes.NewReader(m.Body)); err != nil {
			return 0, err
		}
	}
	data := io.MultiReader(bytes.NewReader(o.delta.front), stage)
	if err := t.add(o.suffixed("data/0000.tar"), int64(len(o.delta.front))+size, data); err != nil {
		return 0, err
	}
	err = t.close()
	return count.n, err
}

// loadSigningKey reads an RSA or P-256 private key from PEM, not encrypted, in any of the forms
// that parsePrivateKey knows.
func loadSigningKey(path string) (crypto.Signer, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("signing key: %w", err)
	}
	key, err := parseSigningKey(text)
	if err != nil {
		return nil, fmt.Errorf("signing key %q: %w", path, err)
	}
	return key, nil
}

func parseSigningKey(text []byte) (crypto.Signer, error) {
	block, err := privateBlock(text)
	if err != nil {
		return nil, err
	}
	if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" {
		return nil, withHint(errors.New("encrypted; want a key without a passphrase"),
			"openssl pkey -in KEY -out PLAIN writes one")
	}
	key, err := parsePrivateKey(block.Type, block.Bytes)
	if err != nil {
		return nil, err
	}
	switch k := key.(type) {
	case *rsa.PrivateKey: // as devices will check its public half
		if err := checkRSA(&k.PublicKey); err != nil {
			return nil, err
		}
		return k, nil
	case *ecdsa.PrivateKey:
		if k.Curve == elliptic.P256() {
			return k, nil
		}
		return nil, fmt.Errorf("got an ECDSA key on %s, want P-256 or RSA", k.Curve.Params().Name)
	}
	return nil, fmt.Errorf("got a key of type %T, want RSA or ECDSA on P-256", key)
}

// signManifest makes the content of manifest.sig. The same key and manifest give the same
// signature: ECDSA without a source of randomness is that of RFC 6979.
func signManifest(key crypto.Signer, manifest []byte) ([]byte, error) {
	digest := sha256.Sum256(manifest)
	sig, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	if _, ok := key.(*ecdsa.PrivateKey); ok { // DER; stored are r and s of 32 bytes each
		var v struct{ R, S *big.Int }
		if _, err := asn1.Unmarshal(sig, &v); err != nil {
			return nil, err
		}
		sig = make([]byte, 64)
		v.R.FillBytes(sig[:32])
		v.S.FillBytes(sig[32:])
	}
	return base64.StdEncoding.AppendEncode(nil, sig), nil
}

// header makes the header tar, as stored.
func (o *packOptions) header(sums map[string][]byte) ([]byte, error) {
	members, err := o.scriptMembers()
	if err != nil {
		return nil, err
	}
	info, err := json.Marshal(o.headerInfo())
	if err != nil {
		return nil, err
	}
	typ, err := json.Marshal(o.typeInfo(sums))
	if err != nil {
		return nil, err
	}
	members = append([]scriptFile{{"header-info", info}}, members...)
	members = append(members, scriptFile{"headers/0000/type-info", typ})
	if !o.bootstrap {
		var meta []byte
		if o.metaFile != "" {
			if meta, err = os.ReadFile(o.metaFile); err != nil {
				return nil, err
			}
			if err := unmarshalObject(o.metaFile, meta, &map[string]json.RawMessage{}); err != nil {
				return nil, err
			}
		}
		if meta, err = o.delta.addInfo(meta); err != nil {
			return nil, err
		}
		members = append(members, scriptFile{"headers/0000/meta-data", meta})
	}
	var buf bytes.Buffer
	z, err := o.compress(&buf)
	if err != nil {
		return nil, err
	}
	t := tarWriter{z, o.mtime}
	for _, m := range members {
		if err := t.add(m.Name, int64(len(m.Body)), bytes.NewReader(m.Body)); err != nil {
			return nil, err
		}
	}
	if err := t.close(); err != nil {
		return nil, err
	}
	err = z.Close()
	return buf.Bytes(), err
}

// scriptMembers reads the state scripts, in the order of their names.
func (o *packOptions) scriptMembers() ([]scriptFile, error) {
	bodies := map[string][]byte{}
	for _, path := range o.scripts {
		body, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		name := filepath.Base(path)
		if !isScriptName(name) || len(body) > maxScript {
			return nil, fmt.Errorf("script %q of %d bytes: want a name such as ArtifactInstall_Enter_00_what, "+
				"and at most %d bytes", path, len(body), maxScript)
		}
		if _, ok := bodies[name]; ok {
			return nil, fmt.Errorf("script %q given twice", name)
		}
		bodies[name] = body
	}
	var list []scriptFile
	for _, name := range sortedKeys(bodies) {
		list = append(list, scriptFile{"scripts/" + name, bodies[name]})
	}
	return list, nil
}

func (o *packOptions) headerInfo() any {
	typ := any(o.typ)
	if o.bootstrap {
		typ = nil
	}
	provides := map[string]string{"artifact_name": o.name}
	if o.group != "" {
		provides["artifact_group"] = o.group
	}
	depends := map[string][]string{"device_type": o.devices}
	if o.nameDepends != nil {
		depends["artifact_name"] = o.nameDepends
	}
	if o.groupDepends != nil {
		depends["artifact_group"] = o.groupDepends
	}
	return map[string]any{
		"payloads":          []any{map[string]any{"type": typ}},
		"artifact_provides": provides,
		"artifact_depends":  depends,
	}
}

// typeInfo has the same provides and clears by default as mender-artifact's.
func (o *packOptions) typeInfo(sums map[string][]byte) any {
	info := map[string]any{"type": o.typ}
	provides := map[string]string{}
	clears := o.clears
	switch {
	case o.bootstrap:
		info["type"] = nil
	case !o.noVersion:
		key := cmp.Or(o.softFS, "rootfs-image")
		if name := cmp.Or(o.softName, o.typ); o.softName != "" || o.typ != "rootfs-image" {
			key += "." + name
		}
		provides[key+".version"] = cmp.Or(o.softVersion, o.name)
		if key == "rootfs-image" && !o.noClears {
			clears = append(clears, "artifact_group", "rootfs_image_checksum")
		}
		if !o.noClears {
			clears = append(clears, key+".*")
		}
	}
	if o.typ == "rootfs-image" && !o.bootstrap && !o.noSum {
		for _, sum := range sums {
			provides["rootfs-image.checksum"] = fmt.Sprintf("%x", sum)
		}
	}
	for k, v := range o.provides {
		provides[k] = v[0]
	}
	if len(provides) > 0 {
		info["artifact_provides"] = provides
	}
	if len(clears) > 0 {
		info["clears_artifact_provides"] = clears
	}
	depends := map[string]any{}
	for k, v := range o.depends {
		if depends[k] = v; len(v) == 1 {
			depends[k] = v[0] // Mender's C++ client takes nothing but a string
		}
	}
	if len(depends) > 0 {
		info["artifact_depends"] = depends
	}
	return info
}
