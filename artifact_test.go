// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ulikunitz/xz"
)

const rootfsSum = "65170c11f0c76d9954bd768095dc21c3d21de427d0ce64fe17999250da6d7ac4"

func TestArtifactFixtures(t *testing.T) {
	for _, c := range []struct {
		name, artifact, typ, compression string
		files, scripts                   int
	}{
		{"bootstrap", "release-1", "", "gzip", 0, 0},
		{"module-no-files", "app-3", "trace", "gzip", 0, 0},
		{"module-scripts-signed", "app-2", "trace", "xz", 1, 6},
		{"module-two-files", "app-1", "trace", "gzip", 2, 0},
		{"rootfs-depends", "release-2", "rootfs-image", "gzip", 1, 0},
		{"rootfs-gzip", "release-2", "rootfs-image", "gzip", 1, 0},
		{"rootfs-scripts", "release-2", "rootfs-image", "gzip", 1, 6},
		{"rootfs-xz", "release-2", "rootfs-image", "xz", 1, 0},
		{"rootfs-zstd", "release-2", "rootfs-image", "zstd", 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, files, err := readAll(fixture(t, c.name+".mender"), artifactOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if a.Name != c.artifact || a.PayloadType != c.typ || a.Compression != c.compression || a.Empty != (c.typ == "") ||
				len(files) != c.files || len(a.Scripts) != c.scripts {
				t.Errorf("got %q type %q %s empty %v, %d files, %d scripts", a.Name, a.PayloadType, a.Compression, a.Empty,
					len(files), len(a.Scripts))
			}
			if img, ok := files["rootfs.img"]; ok && fmt.Sprintf("%x", sha256.Sum256(img)) != rootfsSum {
				t.Errorf("rootfs.img is wrong")
			}
		})
	}
}

// refusal is a change of the kit that must be refused, and a word of the message.
type refusal struct {
	name, want string
	change     func(k *kit)
}

func replaceIn(m []tarMember, name, old, new string) {
	for i := range m {
		if m[i].name == name {
			if !bytes.Contains(m[i].body, []byte(old)) {
				panic("test: " + old + " is not in " + name)
			}
			m[i].body = bytes.Replace(slices.Clone(m[i].body), []byte(old), []byte(new), 1)
		}
	}
}

// checkRefusals builds each artifact and wants it refused with exit code 3, at whatever
// point of the reading.
func checkRefusals(t *testing.T, list []refusal) {
	t.Helper()
	for _, c := range list {
		k := newKit("mod", tarMember{name: "a", body: []byte("hello")},
			tarMember{name: "b", body: bytes.Repeat([]byte("x"), 2000)})
		if _, _, err := readAll(k.build(t), artifactOptions{}); err != nil {
			t.Fatalf("the unchanged artifact: %v", err)
		}
		c.change(k)
		_, _, err := readAll(k.build(t), artifactOptions{dictLimit: 1 << 20})
		if exitCode(err) != exitRefused || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want a refusal that says %q", c.name, err, c.want)
		}
	}
}

func manifestEdit(old, new string) func(k *kit) {
	return func(k *kit) {
		k.manifest = func(lines []string) []string {
			s := strings.Join(lines, "")
			if !strings.Contains(s, old) {
				panic("test: " + old + " is not in the manifest")
			}
			return []string{strings.Replace(s, old, new, 1)}
		}
	}
}

// CVE-2025-67903, field case 1: a checksum that is missing, empty, short, upper case or
// there twice; a file that the manifest does not have, or has and the payload does not.
func TestManifestRefusals(t *testing.T) {
	h := helloSum()
	line := h + "  data/0000/a\n"
	checkRefusals(t, []refusal{
		{"file not in the manifest", `"a" is not in the manifest`, manifestEdit(line, "")},
		{"empty checksum", "manifest line 1", manifestEdit(line, "  data/0000/a\n")},
		{"short checksum", "manifest line 1", manifestEdit(line, h[1:]+"  data/0000/a\n")},
		{"long checksum", "manifest line 1", manifestEdit(line, h+"0  data/0000/a\n")},
		{"upper case", "manifest line 1", manifestEdit(h, strings.ToUpper(h))},
		{"not hexadecimal", "manifest line 1", manifestEdit(h[:1], "g")},
		{"wrong checksum", "SHA-256 is", manifestEdit(h, strings.Repeat("0", 64))},
		{"twice, the same", "second time", manifestEdit(line, line+line)},
		{"twice, another", "second time", manifestEdit(line, line+strings.Repeat("0", 64)+"  data/0000/a\n")},
		{"one space", "manifest line 1", manifestEdit(line, h+" data/0000/a\n")},
		{"three spaces", "manifest line 1", manifestEdit(line, h+"   data/0000/a\n")},
		{"tab", "manifest line 1", manifestEdit(line, h+"\t\tdata/0000/a\n")},
		{"carriage return", "manifest line 1", manifestEdit(line, h+"  data/0000/a\r\n")},
		{"empty line", "manifest line 1", manifestEdit(line, "\n"+line)},
		{"no name", "manifest line 1", manifestEdit(line, h+"  \n")},
		{"long name", "manifest line 1", manifestEdit(line, h+"  data/0000/"+strings.Repeat("a", 300)+"\n")},
		{"no last line feed", "manifest line 4", func(k *kit) {
			k.manifest = func(l []string) []string { return []string{strings.TrimSuffix(strings.Join(l, ""), "\n")} }
		}},
		{"no version entry", `"version" is not in the manifest`,
			func(k *kit) { k.manifest = func(l []string) []string { return l[:3] } }},
		{"no header entry", `"header.tar" is not in the manifest`, func(k *kit) {
			k.manifest = func(l []string) []string { return []string{l[0], l[1], l[3]} }
		}},
		{"header entry without its suffix", `"header.tar.gz" is not in the manifest`, func(k *kit) {
			k.headTar = func(b []byte) (string, []byte) { return "header.tar.gz", gzipped(t, b, 6, len(b), 0) }
			manifestEdit("header.tar.gz", "header.tar")(k)
		}},
		{"entry without a file", `"data/0000/c" is in the manifest and not`, manifestEdit(line, line+h+"  data/0000/c\n")},
		{"entry of no meaning", `manifest names "what"`, manifestEdit(line, line+h+"  what\n")},
		{"entry that climbs", `manifest names "data/0000/../x"`, manifestEdit(line, line+h+"  data/0000/../x\n")},
		{"two files of one name", "there twice", func(k *kit) {
			k.files = append(k.files, k.files[0])
			k.manifest = func(l []string) []string { return l }
		}},
		{"too large", "at most", func(k *kit) {
			k.manifest = func(l []string) []string { return append(l, strings.Repeat("x", maxManifest)) }
		}},
		{"empty", "is not in the manifest", func(k *kit) { k.manifest = func([]string) []string { return nil } }},
	})
}

// Field case 6, MEN-1412: header, version or manifest changed and the rest not.
func TestChangedMembers(t *testing.T) {
	change := func(name string) func(k *kit) {
		return func(k *kit) {
			k.outer = func(m []tarMember) []tarMember {
				for i := range m {
					if m[i].name == name {
						m[i].body = append(slices.Clone(m[i].body), '\n')
					}
				}
				return m
			}
		}
	}
	checkRefusals(t, []refusal{
		{"version", `"version": SHA-256 is`, change("version")},
		{"header", `"header.tar": SHA-256 is`, change("header.tar")},
		{"manifest", "manifest line", change("manifest")},
	})
}

// Field case 8: only the one order is legal, and every name is exact.
func TestMemberOrder(t *testing.T) {
	outer := func(f func(m []tarMember) []tarMember) func(k *kit) { return func(k *kit) { k.outer = f } }
	var list []refusal
	list = append(list, refusal{"empty", "end", outer(func([]tarMember) []tarMember { return nil })})
	for i := range 4 {
		list = append(list,
			refusal{fmt.Sprint("without member ", i), "want",
				outer(func(m []tarMember) []tarMember { return slices.Delete(m, i, i+1) })},
			refusal{fmt.Sprint("member twice: ", i), "want",
				outer(func(m []tarMember) []tarMember { return slices.Insert(m, i, m[i]) })})
		if i > 0 {
			list = append(list, refusal{fmt.Sprint("swapped with the one before: ", i), "want",
				outer(func(m []tarMember) []tarMember {
					m[i-1], m[i] = m[i], m[i-1]
					return m
				})})
		}
	}
	list[len(list)-3].want = "payload" // without data
	for name, want := range map[string]string{
		"./data/0000.tar": "want data/0000.tar", "data/0001.tar": "want data/0000.tar",
		"data/0000.tar.bz2": "want data/0000.tar",
		"data/0000.tar.gz":  "not gzip data", "data/0000.tar.xz": "not xz data", "data/0000.tar.zst": "not zstd data",
		"data/0000": "want data/0000.tar",
	} {
		list = append(list, refusal{name, want, func(k *kit) { k.data = func(b []byte) (string, []byte) { return name, b } }})
	}
	for name, want := range map[string]string{"header.tar.GZ": "want header.tar", "header": "want header.tar",
		"header.tar.gz": "not gzip data", "header-augment.tar": "augmented"} {
		list = append(list, refusal{name, want, func(k *kit) {
			k.headTar = func(b []byte) (string,
				[]byte) {
				return name, b
			}
		}})
	}
	list = append(list,
		refusal{"second data member", "more than one payload",
			outer(func(m []tarMember) []tarMember { return append(m, tarMember{name: "data/0001.tar"}) })},
		refusal{"signature after the header", "want data/0000.tar", outer(func(m []tarMember) []tarMember {
			return slices.Insert(m, 3, tarMember{name: "manifest.sig", body: []byte("AAAA")})
		})},
		refusal{"signature after the payload", "want the end", outer(func(m []tarMember) []tarMember {
			return append(m, tarMember{name: "manifest.sig", body: []byte("AAAA")})
		})},
		refusal{"two signatures", "want header.tar", outer(func(m []tarMember) []tarMember {
			s := tarMember{name: "manifest.sig", body: []byte("AAAA")}
			return slices.Insert(m, 2, s, s)
		})},
		refusal{"name of 300 bytes", "is not allowed", outer(func(m []tarMember) []tarMember {
			m[0].name = strings.Repeat("v", 300)
			return m
		})})
	checkRefusals(t, list)
}

// Field case 3, MEN-9056, MEN-9057, SWUpdate 3394cc6c: what is not a plain file under a
// plain name.
func TestMemberKinds(t *testing.T) {
	var list []refusal
	for name, head := range map[string]func(*tar.Header){
		"symlink":   func(h *tar.Header) { h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, "/etc/passwd", 0 },
		"hard link": func(h *tar.Header) { h.Typeflag, h.Linkname, h.Size = tar.TypeLink, "version", 0 },
		"device":    func(h *tar.Header) { h.Typeflag, h.Size = tar.TypeBlock, 0 },
		"fifo":      func(h *tar.Header) { h.Typeflag, h.Size = tar.TypeFifo, 0 },
		"directory": func(h *tar.Header) { h.Typeflag, h.Size = tar.TypeDir, 0 },
		"pax path": func(h *tar.Header) {
			h.Format, h.PAXRecords = tar.FormatPAX, map[string]string{"SCHILY.realsize": "1"}
		},
		"GNU long name": func(h *tar.Header) { h.Format, h.Name = tar.FormatGNU, strings.Repeat("l", 200) },
		"pax long name": func(h *tar.Header) { h.Format, h.Name = tar.FormatPAX, strings.Repeat("l", 300) },
	} {
		first := func(m []tarMember) { m[0].head = head }
		list = append(list,
			refusal{"outer " + name, "", func(k *kit) {
				k.outer = func(m []tarMember) []tarMember { first(m); return m }
			}},
			refusal{"header " + name, "header", func(k *kit) { first(k.header) }},
			refusal{"payload " + name, "", func(k *kit) { first(k.files) }})
	}
	for _, name := range []string{"../x", "/x", "a/../../x", "x/y", "..", ".", "", "a b", "a\nb", "-x\x01", "é",
		strings.Repeat("n", 300)} {
		list = append(list, refusal{"payload " + name, "", func(k *kit) { k.files[0].name = name }})
	}
	for _, name := range []string{"ArtifactInstall_Enter_00_/../../x", "../ArtifactInstall_Enter_00",
		"ArtifactInstall_Enter_0", "ArtifactInstall_Enter_00x",
		"Idle_Enter_00", "Sync_Enter_00", "Download_Enter_00", "Artifactinstall_Enter_00", "ArtifactInstall_Enter_00_",
		"ArtifactInstall_Enter_00_a b", "version"} {
		list = append(list, refusal{"script " + name, "", func(k *kit) {
			k.header = slices.Insert(k.header, 1, tarMember{name: "scripts/" + name, body: []byte("x")})
		}})
	}
	checkRefusals(t, list)
}

// Ordinary pax records of times and owners are no reason to refuse, and neither are the
// names that scripts and files may have.
func TestMemberKindsAccepted(t *testing.T) {
	owner := func(h *tar.Header) {
		h.Format, h.Uid, h.Uname = tar.FormatPAX, 1<<30, strings.Repeat("u", 60)
		h.ModTime = time.Unix(5, 123456789)
	}
	k := newKit("mod", tarMember{"a_B-9.,", []byte("hello"), owner})
	k.header[0].head = owner
	k.header = slices.Insert(k.header, 1, tarMember{"scripts/ArtifactRollbackReboot_Leave_99_x-y;$(z)",
		[]byte("x"), owner})
	k.outer = func(m []tarMember) []tarMember {
		for i := range m {
			m[i].head = owner
		}
		return m
	}
	if a, _, err := readAll(k.build(t), artifactOptions{}); err != nil || len(a.Scripts) != 1 {
		t.Error(err)
	}
}

func headerEdit(member, old, new string) func(k *kit) {
	return func(k *kit) { replaceIn(k.header, member, old, new) }
}

// MEN-9098, MEN-9027, field cases 4 and 5: what header-info, type-info and meta-data say.
func TestHeaderRefusals(t *testing.T) {
	const info, typ = "header-info", "headers/0000/type-info"
	members := func(f func(m []tarMember) []tarMember) func(k *kit) {
		return func(k *kit) { k.header = f(slices.Clone(k.header)) }
	}
	list := []refusal{
		{"two payloads said", "2 payloads", headerEdit(info, `[{"type":"mod"}]`, `[{"type":"mod"},{"type":"mod"}]`)},
		{"no payloads", "no payloads", headerEdit(info, `[{"type":"mod"}]`, `[]`)},
		{"payloads null", "no payloads", headerEdit(info, `[{"type":"mod"}]`, `null`)},
		{"type-info missing", "no headers/0000/type-info", members(func(m []tarMember) []tarMember { return m[:1] })},
		{"type-info twice", "more than one payload", members(func(m []tarMember) []tarMember {
			return slices.Insert(m, 1,
				m[1])
		})},
		{"second type-info", "more than one payload", members(func(m []tarMember) []tarMember {
			return append(m, tarMember{name: "headers/0001/type-info", body: []byte(`{"type":"mod"}`)})
		})},
		{"type-info of index 1", "want", members(func(m []tarMember) []tarMember {
			m[1].name = "headers/0001/type-info"
			return m
		})},
		{"script after type-info", "want", members(func(m []tarMember) []tarMember {
			return slices.Insert(m, 2, tarMember{name: "scripts/ArtifactInstall_Enter_00"})
		})},
		{"script twice", "second time", members(func(m []tarMember) []tarMember {
			s := tarMember{name: "scripts/ArtifactInstall_Enter_00"}
			return slices.Insert(m, 1, s, s)
		})},
		{"member after meta-data", "want the end", members(func(m []tarMember) []tarMember {
			return append(m,
				tarMember{name: "files"})
		})},
		{"header-info not first", "want header-info", members(func(m []tarMember) []tarMember { return m[1:] })},
		{"no name", "artifact_name", headerEdit(info, `"rel"`, `""`)},
		{"name with a line feed", "control", headerEdit(info, `"rel"`, `"rel\nx"`)},
		{"no device type", "device_type", headerEdit(info, `["dev"]`, `[]`)},
		{"device type a string", "header-info", headerEdit(info, `["dev"]`, `"dev"`)},
		{"types differ", "in type-info", headerEdit(typ, `"mod"`, `"other"`)},
		{"data after header-info", "header-info", headerEdit(info, `}}`, `}} {}`)},
		{"a key twice", `"type" for the second time`, headerEdit(typ, `"mod"`, `"mod","type":"mod"`)},
		{"a key twice in two cases", `"TYPE" for the second time`, headerEdit(typ, `"mod"`, `"mod","TYPE":"mod"`)},
		{"provides in two parts", "for the second time",
			headerEdit(typ, `"mod"`, `"mod","artifact_provides":{"a":"1"},"artifact_provides":{"b":"2"}`)},
		{"provided twice", "for the second time", headerEdit(typ, `"mod"`, `"mod","artifact_provides":{"a":"1","a":"2"}`)},
		{"payloads twice", "for the second time", headerEdit(info, `[{"type":"mod"}]`, `[{"type":"mod","type":"mod"}]`)},
		{"type-info a list", "not a JSON object", headerEdit(typ, `{"type":"mod"}`, `[]`)},
		{"type-info null", "not a JSON object", headerEdit(typ, `{"type":"mod"}`, `null`)},
		{"provides twice", "artifact_provides", headerEdit(typ, `"mod"`, `"mod","artifact_provides":{"artifact_name":"x"}`)},
		{"device type twice", "artifact_depends", headerEdit(typ, `"mod"`, `"mod","artifact_depends":{"device_type":"x"}`)},
		{"provides not a string", "type-info", headerEdit(typ, `"mod"`, `"mod","artifact_provides":{"a":1}`)},
		{"clears ends in a backslash", "backslash", headerEdit(typ, `"mod"`, `"mod","clears_artifact_provides":["a\\"]`)},
		{"empty payload with meta-data", "empty payload", func(k *kit) {
			replaceIn(k.header, info, `"mod"`, `null`)
			replaceIn(k.header, typ, `"mod"`, `null`)
			k.header[2].body = []byte("{}")
		}},
		{"empty payload with files", "manifest names", func(k *kit) {
			replaceIn(k.header, info, `"mod"`, `null`)
			replaceIn(k.header, typ, `"mod"`, `null`)
			k.header = k.header[:2]
		}},
	}
	for _, typ := range []string{"", "..", ".", "../x", "/bin/sh", "a/b", "-x", "a b", "a\\u0000b"} {
		list = append(list, refusal{"type " + typ, "payload type", headerEdit(info, `"mod"`, `"`+typ+`"`)})
	}
	for _, meta := range []string{"[]", "null", "1", "{", "{} {}", " ", `{"a":1,"a":2}`} {
		list = append(list, refusal{"meta-data " + meta, "meta-data", func(k *kit) { k.header[2].body = []byte(meta) }})
	}
	checkRefusals(t, list)
}

// A rootfs-image is one file, whoever reads it.
func TestRootfsImageIsOneFile(t *testing.T) {
	one := tarMember{name: "a", body: []byte("x")}
	for _, files := range [][]tarMember{nil, {one, {name: "b"}}} {
		_, got, err := readAll(newKit("rootfs-image", files...).build(t), artifactOptions{})
		if exitCode(err) != exitRefused || !strings.Contains(err.Error(), "holds exactly one") || len(got) > 0 {
			t.Errorf("%d files: %d read, %v", len(files), len(got), err)
		}
	}
	if _, _, err := readAll(newKit("rootfs-image", one).build(t), artifactOptions{}); err != nil {
		t.Error(err)
	}
	if _, _, err := readAll(newKit("mod", one, tarMember{name: "b"}).build(t), artifactOptions{}); err != nil {
		t.Error(err)
	}
}

// Names of JSON keys match in any case, unknown ones are ignored, meta-data may be absent
// or empty, depends may be strings or lists.
func TestHeaderAccepted(t *testing.T) {
	k := newKit("mod", tarMember{name: "a", body: []byte("x")})
	replaceIn(k.header, "header-info", `"artifact_provides":{"artifact_name":"rel"}`,
		`"what":1,"Artifact_Provides":{"ARTIFACT_NAME":"rel","artifact_group":"g","x":[]}`)
	replaceIn(k.header, "headers/0000/type-info", `"mod"`,
		`"","artifact_depends":{"one":"1","more":["1","2"]},"clears_artifact_provides":[]`)
	k.header = k.header[:2]
	a, _, err := readAll(k.build(t), artifactOptions{})
	if err != nil {
		t.Fatal(err)
	}
	own := newKit("mod", tarMember{name: "a", body: []byte("x")}) // names that are the artifact's own
	replaceIn(own.header, "headers/0000/type-info", `"mod"`, `"mod","artifact_provides":{"a":"1","A":"2"}`)
	own.header[2].body = []byte(`{"a":1,"A":2}`)
	if a, _, err := readAll(own.build(t), artifactOptions{}); err != nil || len(a.Provides) != 2 {
		t.Errorf("got %+v, %v", a, err)
	}
	if a.Name != "rel" || a.Group != "g" || a.MetaData != nil || a.Provides != nil || a.Clears == nil ||
		fmt.Sprint(a.Depends) != "map[more:[1 2] one:[1]]" {
		t.Errorf("got %+v", a)
	}
}

// Field case 10: cut off at every byte, followed by anything, two in one file.
func TestTruncatedEverywhere(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"none":  newKit("mod", tarMember{name: "a", body: []byte("hello")}).build(t),
		"gzip":  fixture(t, "module-no-files.mender"),
		"empty": fixture(t, "bootstrap.mender"),
	} {
		step := 1
		if name != "none" {
			step = 7
		}
		for cut := 0; cut < len(b); cut += step {
			if _, _, err := readAll(b[:cut], artifactOptions{}); exitCode(err) != exitRefused && exitCode(err) != exitOK ||
				err == nil && !(cut >= endOfMembers(b)+1024) {
				t.Fatalf("%s cut off at %d of %d: %v", name, cut, len(b), err)
			}
		}
		for what, bad := range map[string][]byte{"a byte": {1},
			"zeros and a byte": append(make([]byte, 5000), 1), "itself": b} {
			if _, _, err := readAll(append(slices.Clone(b), bad...), artifactOptions{}); exitCode(err) != exitRefused {
				t.Errorf("%s followed by %s: %v", name, what, err)
			}
		}
		if _, _, err := readAll(append(slices.Clone(b), make([]byte, 9000)...), artifactOptions{}); err != nil {
			t.Errorf("%s followed by zeros: %v", name, err)
		}
	}
}

// endOfMembers is where the zeros at the end start, as a multiple of 512.
func endOfMembers(b []byte) int {
	n := len(bytes.TrimRight(b, "\x00"))
	return (n + 511) &^ 511
}

// What follows the compressed stream, or the tar in it, inside the member.
func TestDataAfterEnd(t *testing.T) {
	for suffix, compress := range map[string]func([]byte) []byte{
		"":    func(b []byte) []byte { return b },
		".gz": func(b []byte) []byte { return gzipped(t, b, 6, len(b), 0) },
		".xz": func(b []byte) []byte { return xzipped(t, b, xz.WriterConfig{DictCap: 4096}) },
	} {
		head := func(edit func([]byte) []byte) func(k *kit) {
			return func(k *kit) {
				k.headTar = func(b []byte) (string, []byte) { return "header.tar" + suffix, edit(b) }
			}
		}
		data := func(edit func([]byte) []byte) func(k *kit) {
			return func(k *kit) { k.data = func(b []byte) (string, []byte) { return "data/0000.tar" + suffix, edit(b) } }
		}
		for where, change := range map[string]func(func([]byte) []byte) func(k *kit){"header": head, "data": data} {
			checkRefusals(t, []refusal{
				{where + suffix + ": after the tar", "", change(func(b []byte) []byte { return compress(append(b, 'x')) })},
				{where + suffix + ": after the stream", "", change(func(b []byte) []byte { return append(compress(b), "x"...) })},
				{where + suffix + ": one zero block less", "", change(func(b []byte) []byte { return compress(b[:len(b)-512]) })},
				{where + suffix + ": no zero blocks", "end-of-archive",
					change(func(b []byte) []byte { return compress(b[:len(b)-1024]) })},
				{where + suffix + ": cut off", "", change(func(b []byte) []byte { b = compress(b); return b[:len(b)-1] })},
				{where + suffix + ": padding", "padding", change(func(b []byte) []byte {
					b = slices.Clone(b)
					b[512+511] = 1
					return compress(b)
				})},
			})
		}
	}
}

// Field case 7, CVE-2026-34155: sizes around the limits of integers, negative and in base
// 256, in a header that the tar writer would not make.
func TestTarSizes(t *testing.T) {
	for _, size := range []string{"77777777777", "20000000000\x00", "40000000000\x00",
		"\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff",
		"\x80\x00\x00\x00\x00\x00\x00\x00\x80\x00\x00\x00", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
		"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe\x00",
		"\x80\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00", "-0000000001\x00", "0000000000x\x00"} {
		for _, where := range []string{"version", "manifest", "header.tar", "data/0000.tar", "a"} {
			b := newKit("mod", tarMember{name: "a", body: []byte("hello")}).build(t)
			at := bytes.Index(b, append([]byte(where), 0))
			for string(b[at+257:at+262]) != "ustar" {
				at += 1 + bytes.Index(b[at+1:], append([]byte(where), 0))
			}
			copy(b[at+124:at+136], size)
			sum := 0
			copy(b[at+148:], "        ")
			for _, c := range b[at : at+512] {
				sum += int(c)
			}
			copy(b[at+148:], fmt.Sprintf("%06o\x00 ", sum))
			if _, _, err := readAll(b, artifactOptions{}); exitCode(err) != exitRefused {
				t.Errorf("size %q of %s: %v", size, where, err)
			}
		}
	}
}

// Field case 9: what asks for more than it is worth.
func TestBombs(t *testing.T) {
	t.Parallel()
	zeros := make([]byte, maxHeader+1<<20)
	gz := gzipped(t, zeros, 6, len(zeros), 0)
	many := func(n int) []tarMember {
		m := make([]tarMember, n)
		for i := range m {
			m[i] = tarMember{name: fmt.Sprint("f", i)}
		}
		return m
	}
	checkRefusals(t, []refusal{
		{"zeros in the header", "header", func(k *kit) {
			k.headTar = func([]byte) (string, []byte) { return "header.tar.gz", gz }
		}},
		{"zeros after the header's tar", "after the end", func(k *kit) {
			k.headTar = func(b []byte) (string, []byte) {
				b = append(slices.Clone(b), zeros...)
				return "header.tar.gz", gzipped(t, b, 6, len(b), 0)
			}
		}},
		{"large script", "at most", func(k *kit) {
			k.header = slices.Insert(k.header, 1, tarMember{name: "scripts/ArtifactInstall_Enter_00", body: zeros[:maxScript+1]})
		}},
		{"large header", "more than", func(k *kit) {
			for i := range 5 {
				k.header = slices.Insert(k.header, 1, tarMember{name: fmt.Sprint("scripts/ArtifactInstall_Enter_0", i),
					body: zeros[:maxScript-512*5]})
			}
			k.headTar = func(b []byte) (string, []byte) { return "header.tar.gz", gzipped(t, b, 1, len(b), 0) }
		}},
		{"many files", "more than 1000", func(k *kit) { k.files = many(maxMembers) }},
		{"large dictionary", "dictionary of 16777216 bytes", func(k *kit) {
			k.data = func(b []byte) (string, []byte) {
				return "data/0000.tar.xz", xzipped(t, b, xz.WriterConfig{DictCap: 16 << 20})
			}
		}},
	})
}

// Not artifacts of this kind: a compressed file, version 2, augmented.
func TestOtherKinds(t *testing.T) {
	b := newKit("mod", tarMember{name: "a", body: []byte("x")}).build(t)
	two := newKit("mod", tarMember{name: "a", body: []byte("x")})
	two.version = `{"format":"mender","version":2}`
	one := newKit("mod", tarMember{name: "a", body: []byte("x")})
	one.version = `{"format":"tar","version":3}`
	for _, c := range []struct {
		name, want string
		b          []byte
	}{
		{"gzip outside", "compressed with gzip", gzipped(t, b, 6, len(b), 0)},
		{"xz outside", "compressed with xz", xzipped(t, b, xz.WriterConfig{})},
		{"version 2", "format version 2", two.build(t)},
		{"format", `format "tar"`, one.build(t)},
		{"augmented", "augmented artifacts are not supported", fixture(t, "module-augmented.mender")},
		{"nothing", "it is empty", nil},
		{"HTML", "artifact", []byte(strings.Repeat("<html>not found</html>", 100))},
	} {
		if _, err := openArtifact(bytes.NewReader(c.b), artifactOptions{}); exitCode(err) != exitRefused ||
			!strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if _, err := openArtifact(bytes.NewReader(two.build(t)), artifactOptions{}); !strings.Contains(hintOf(err), "-v 3") {
		t.Errorf("version 2: hint %q", hintOf(err))
	}
}

// A payload file must be verified before the next one is given, however it is read.
func TestUnverifiedFile(t *testing.T) {
	b := newKit("mod", tarMember{name: "a", body: []byte("hello")}, tarMember{name: "b", body: []byte("x")}).build(t)
	for n, ok := range map[int64]bool{0: false, 2: false, 5: true} {
		a, err := openArtifact(bytes.NewReader(b), artifactOptions{})
		if err != nil {
			t.Fatal(err)
		}
		f, _ := a.nextFile()
		io.CopyN(io.Discard, f.unhashed(), n)
		if err := f.verify(sha256.Sum256([]byte("hello"))); (err == nil) != ok {
			t.Errorf("verified after %d of 5 bytes: %v", n, err)
		}
		if _, err := a.nextFile(); (err == nil) != ok {
			t.Errorf("next file after %d of 5 bytes: %v", n, err)
		}
	}
}

// FuzzArtifact: no panic, memory as limited, and no artifact is accepted whose payload is
// not what its manifest says.
func FuzzArtifact(f *testing.F) {
	for _, name := range []string{"bootstrap", "module-no-files", "module-scripts-signed", "module-augmented"} {
		f.Add(fixture(f, name+".mender"))
	}
	k := newKit("mod", tarMember{name: "a", body: []byte("hello")})
	f.Add(k.build(f))
	k.data = func(b []byte) (string, []byte) { return "data/0000.tar.gz", gzipped(f, b, 6, 700, 100) }
	f.Add(k.build(f))
	k.data = func(b []byte) (string, []byte) {
		return "data/0000.tar.xz", xzipped(f, b, xz.WriterConfig{DictCap: 4096, BlockSize: 1000})
	}
	f.Add(k.build(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.Contains(b, []byte(".zst")) {
			return // a process for each
		}
		a, files, err := readAll(b, artifactOptions{dictLimit: 1 << 20})
		if err != nil {
			if exitCode(err) != exitRefused {
				t.Fatalf("exit code %d: %v", exitCode(err), err)
			}
			return
		}
		for name, body := range files {
			if !bytes.Contains(b, fmt.Appendf(nil, "%x  data/0000/%s\n", sha256.Sum256(body), name)) {
				t.Fatalf("payload file %q is not what the manifest says", name)
			}
		}
		if a.Name == "" || len(a.DeviceTypes) == 0 {
			t.Fatalf("accepted: %+v", a)
		}
	})
}

// FuzzParts gives the fuzzer what is behind the checksums: the header tar, and the data
// member before and behind the decompressor.
func FuzzParts(f *testing.F) {
	body := bytes.Repeat([]byte("hello"), 1000)
	k := newKit("mod", tarMember{name: "a", body: body})
	data := makeTar(f, k.files)
	names := []string{"header.tar", "data/0000.tar", "data/0000.tar.gz", "data/0000.tar.xz"}
	f.Add(uint8(0), makeTar(f, k.header))
	f.Add(uint8(1), data)
	f.Add(uint8(2), gzipped(f, data, 6, 3000, 1000))
	f.Add(uint8(3), xzipped(f, data, xz.WriterConfig{DictCap: 4096, BlockSize: 2000}))
	f.Fuzz(func(t *testing.T, kind uint8, b []byte) {
		k := newKit("mod", tarMember{name: "a", body: body})
		part := func([]byte) (string, []byte) { return names[kind%4], b }
		if k.data = part; kind%4 == 0 {
			k.data, k.headTar = nil, part
		}
		a, files, err := readAll(k.build(t), artifactOptions{dictLimit: 1 << 20})
		switch {
		case err != nil && exitCode(err) != exitRefused:
			t.Fatalf("exit code %d: %v", exitCode(err), err)
		case err == nil && (a.Name == "" || a.PayloadType == "" || !bytes.Equal(files["a"], body)):
			t.Fatalf("accepted: %+v", a)
		}
	})
}
