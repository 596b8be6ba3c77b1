// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// shown is what "mendlet show --json" prints; its names are an interface.
type shown struct {
	Name        string              `json:"artifact_name"`
	Group       string              `json:"artifact_group,omitempty"`
	DeviceTypes []string            `json:"device_types"`
	Type        *string             `json:"payload_type"` // null: no payload
	Compression string              `json:"compression"`
	Signed      bool                `json:"signed"`
	SignedBy    string              `json:"signed_by,omitempty"` // path of the key that verified
	Manifest    string              `json:"manifest_sha256"`
	Depends     map[string][]string `json:"artifact_depends"`
	Provides    map[string]string   `json:"artifact_provides"`        // null: absent
	Clears      []string            `json:"clears_artifact_provides"` // null: absent
	MetaData    json.RawMessage     `json:"meta_data,omitempty"`
	Scripts     []string            `json:"scripts"`
	Files       []shownFile         `json:"files"`
}

type shownFile struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
	Sum  string `json:"sha256"`
}

// showCommand reads the artifact to its end and then, if all of it was right, prints what is
// in it.
func showCommand(a *artifact, asJSON bool, w io.Writer) error {
	s := shown{Name: a.Name, Group: a.Group, DeviceTypes: a.DeviceTypes, Compression: a.Compression,
		Signed: a.Signed, SignedBy: a.SignedBy, Manifest: fmt.Sprintf("%x", a.ManifestSum),
		Depends: a.Depends, Provides: a.Provides, Clears: a.Clears, MetaData: a.MetaData,
		Scripts: []string{}, Files: []shownFile{}}
	if !a.Empty {
		s.Type = &a.PayloadType
	}
	for _, f := range a.Scripts {
		s.Scripts = append(s.Scripts, f.Name)
	}
	buf := make([]byte, 256<<10)
	for {
		f, err := a.nextFile()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, f, buf); err != nil {
			return err
		}
		s.Files = append(s.Files, shownFile{f.Name, f.Size, fmt.Sprintf("%x", f.Sum)})
	}
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(s)
	}
	_, err := io.WriteString(w, s.text())
	return err
}

func (s *shown) text() string {
	var b strings.Builder
	line := func(key, format string, args ...any) {
		fmt.Fprintf(&b, "%-14s "+format+"\n", append([]any{key + ":"}, args...)...)
	}
	line("name", "%s", s.Name)
	if s.Group != "" {
		line("group", "%s", s.Group)
	}
	line("device types", "%s", strings.Join(s.DeviceTypes, ", "))
	if s.Type != nil {
		line("payload type", "%s", *s.Type)
	} else {
		line("payload type", "none (empty payload)")
	}
	line("compression", "%s", s.Compression)
	switch {
	case s.SignedBy != "":
		line("signature", "verified with key %q", s.SignedBy)
	case s.Signed:
		line("signature", "present, not checked")
	default:
		line("signature", "none")
	}
	line("manifest", "sha256 %s", s.Manifest)
	for _, k := range sortedKeys(s.Depends) {
		line("depends", "%s = %s", k, strings.Join(s.Depends[k], " or "))
	}
	for _, k := range sortedKeys(s.Provides) {
		line("provides", "%s = %s", k, s.Provides[k])
	}
	switch {
	case s.Clears != nil:
		line("clears", "%s", strings.Join(s.Clears, " "))
	default:
		line("clears", "everything (no clears_artifact_provides)")
	}
	if s.MetaData != nil {
		line("meta-data", "%s", strings.Join(strings.Fields(string(s.MetaData)), " "))
	}
	for _, n := range s.Scripts {
		line("script", "%s", n)
	}
	for _, f := range s.Files {
		line("file", "%s, %d bytes, sha256 %s", f.Name, f.Size, f.Sum)
	}
	return b.String()
}
