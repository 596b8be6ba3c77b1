// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// inspector has the verbs that only look: status, plan, show, env print.
type inspector struct{ *app }

// report is what status and plan say, for people and as JSON.
type report struct {
	Running    string            `json:"running,omitempty"` // A, B, or none
	Idle       string            `json:"idle,omitempty"`
	Slots      map[string]string `json:"slots,omitempty"`
	Evidence   []string          `json:"evidence,omitempty"`
	Env        map[string]string `json:"boot_environment,omitempty"`
	EnvFrom    string            `json:"boot_environment_from,omitempty"`
	Problem    string            `json:"problem,omitempty"`
	Notes      []string          `json:"notes,omitempty"` // what a person should know
	Provides   map[string]string `json:"provides"`
	Update     *updateReport     `json:"update"`         // null: nothing in progress
	Next       string            `json:"next,omitempty"` // what a person does now, in words
	Last       *verdict          `json:"last"`
	Connection string            `json:"connection,omitempty"` // to the server: stands, or none
	Mender     *inheritance      `json:"taken_over,omitempty"` // from the store of Mender's client
	Monitor    map[string]string `json:"monitor,omitempty"`    // "OK" or "CRITICAL: text", by check
}

type updateReport struct {
	Artifact string `json:"artifact"`
	ID       string `json:"id,omitempty"`
	Type     string `json:"type"`
	Step     step   `json:"step"`
	Managed  bool   `json:"managed"`
	Failed   bool   `json:"failed"`
	Cause    string `json:"cause,omitempty"`
	Done     int64  `json:"bytes_done,omitempty"`
	Left     int64  `json:"bytes_left,omitempty"`
}

// bootVars are the variables of Mender's contract with the bootloader.
var bootVars = []string{varBootPart, varBootPartHex, varUpgrade, varBootcount, "bootlimit", varCanaryCheck, varCanary}

// lookAround fills in what the machine says.
func (r *report) lookAround(ctx context.Context, a *app) (bootEnv, *slots, map[string]string, error) {
	env, err := openEnv(a.c, a.m, a.lg)
	if err != nil {
		return nil, nil, nil, err
	}
	r.EnvFrom = env.String()
	vars, err := env.vars(ctx)
	if err != nil {
		return env, nil, nil, err
	}
	r.Env = map[string]string{}
	for _, n := range bootVars {
		if v, ok := vars[n]; ok {
			r.Env[n] = v
		}
	}
	s, err := findSlots(a.c, a.m, vars)
	if s == nil {
		return env, nil, vars, err
	}
	r.Slots = map[string]string{"A": s.a.path, "B": s.b.path}
	r.Evidence = s.why
	if err != nil {
		return env, nil, vars, err
	}
	from := s.running
	if r.Running = "none"; from != nil {
		r.Running = from.letter
	} else {
		from = s.byNum(vars[varBootPart])
	}
	if from != nil {
		r.Idle = s.other(from).letter
	}
	return env, s, vars, nil
}

func (a inspector) status(ctx context.Context) error {
	rec, err := a.peek()
	if err != nil {
		return err
	}
	a.rec = rec
	a.nameUnsaved()
	r := &report{Provides: rec.Provides, Last: rec.Last, Mender: rec.Mender}
	if rec.Mender != nil {
		r.Notes = append(r.Notes, rec.Mender.String())
	}
	if a.beside.brief != nil {
		r.Monitor = a.beside.brief(false)
	}
	if n := rec.Net; n != nil && n.Channel != nil {
		now := time.Now()
		if rec.Time.After(now) {
			now = rec.Time
		}
		r.Notes = append(r.Notes, n.Channel.note(now))
	}
	if u := rec.Update; u != nil {
		r.Update = &updateReport{Artifact: u.Artifact, ID: u.ID, Type: u.Type, Step: u.Step, Managed: u.Managed,
			Failed: u.Outcome.bad(), Cause: u.Cause}
		if c := u.Checkpoint; c != nil {
			r.Update.Done, r.Update.Left = c.Offset, c.Total-c.Offset
		}
	}
	var s *slots
	var vars map[string]string
	if a.c.RootfsPartA != "" || a.c.RootfsPartB != "" {
		if _, s, vars, err = r.lookAround(ctx, a.app); err != nil {
			r.Problem = oneLine(err.Error())
		}
		if why, err := forgetful(a.c, a.m); err == nil && why != "" {
			r.Notes = append(r.Notes, why)
		}
	}
	r.Next = whatNext(rec.Update, s, vars)
	r.Connection = connectionState(a.c.paths.ds)
	if a.o.json {
		return printJSON(a.out, r)
	}
	r.print(a.out)
	return nil
}

// whatNext says what a person does now, with the update in progress or without one; "" for nothing.
// s is nil where it is not known which slot runs.
func whatNext(u *update, s *slots, vars map[string]string) string {
	if s == nil && u == nil {
		return ""
	}
	if s == nil {
		return nextStep(u, false)
	}
	if stray := strayTrial(vars, s); u == nil && stray != "" {
		return stray
	}
	runs := s.running != nil && strconv.Itoa(s.running.num) == vars[varBootPart]
	switch {
	case u == nil && s.running != nil && !runs && s.byNum(vars[varBootPart]) != nil:
		return fmt.Sprintf("reboot now: slot %s is to boot next", s.byNum(vars[varBootPart]))
	case u == nil:
		return ""
	case u.Type == rootfsImage && u.Step == stepCommitWait && vars[varBootPart] == strconv.Itoa(u.From):
		return "the bootloader went back to the system from before; " + nextEnd(u)
	}
	return nextStep(u, !runs && (u.Step == stepCommitWait || u.Step == stepReboot || u.Step == stepRollbackReboot))
}

// nextEnd ends an update that the bootloader has reverted.
func nextEnd(u *update) string {
	if u.Managed {
		return "'mendlet run' reports it"
	}
	return "'mendlet rollback' ends the update"
}

// printSlots names slots by letter and device.
func (r *report) printSlots(w io.Writer) {
	if r.Slots == nil {
		return
	}
	name := func(letter string) string { return fmt.Sprintf("%s (%s)", letter, r.Slots[letter]) }
	switch {
	case r.Running == "":
		printf(w, "slots: %s, %s; not known which one runs\n", name("A"), name("B"))
	case r.Idle == "":
		printf(w, "slots: %s, %s; running %s\n", name("A"), name("B"), r.Running)
	case r.Running == "none":
		printf(w, "slots: none runs, idle %s, other %s\n", name(r.Idle), name(map[string]string{"A": "B", "B": "A"}[r.Idle]))
	default:
		printf(w, "slots: running %s, idle %s\n", name(r.Running), name(r.Idle))
	}
	for _, l := range r.Evidence {
		printf(w, "  %s\n", l)
	}
}

func (r *report) print(w io.Writer) {
	r.printSlots(w)
	if r.EnvFrom != "" {
		printf(w, "boot environment: %s\n", r.EnvFrom)
		for _, k := range sortedKeys(r.Env) {
			printf(w, "  %s=%s\n", k, r.Env[k])
		}
	}
	if r.Problem != "" {
		printf(w, "problem: %s\n", r.Problem)
	}
	for _, n := range r.Notes {
		printf(w, "note: %s\n", n)
	}
	printf(w, "provides:\n")
	for _, k := range sortedKeys(r.Provides) {
		printf(w, "  %s=%s\n", k, r.Provides[k])
	}
	if u := r.Update; u != nil {
		printf(w, "update in progress: %q, in %s\n", u.Artifact, string(u.Step))
		if u.Done > 0 {
			printf(w, "  %s downloaded, %s left\n", mega(u.Done), mega(u.Left))
		}
	} else {
		printf(w, "update in progress: none\n")
	}
	if r.Next != "" {
		printf(w, "next: %s\n", r.Next)
	}
	if r.Connection != "" {
		printf(w, "connection: %s\n", r.Connection)
	}
	if v := r.Last; v != nil {
		printf(w, "last update: %q %s", v.Artifact, v.Result)
		if v.Cause != "" {
			printf(w, ": %s", v.Cause)
		}
		if v.Saved > 0 {
			printf(w, ", with %s less to fetch", mega(v.Saved))
		}
		printf(w, "\n")
	}
	for _, k := range sortedKeys(r.Monitor) {
		printf(w, "check %s: %s\n", k, r.Monitor[k])
	}
}

// planReport is what plan says beside what status does.
type planReport struct {
	*report
	Artifact    string   `json:"artifact"`
	Type        string   `json:"type"`
	Compression string   `json:"compression"`
	Signature   string   `json:"signature"`
	DeviceTypes []string `json:"device_types"`
	Target      string   `json:"target,omitempty"`
	ImageSize   int64    `json:"image_size,omitempty"`
	SlotSize    int64    `json:"slot_size,omitempty"`
	Delta       any      `json:"delta,omitempty"` // its cost; absent: the whole image is fetched
	deltaText   string
	EnvChanges  []string `json:"boot_environment_changes,omitempty"`
	Refused     []string `json:"refused"` // every reason; install would stop at the first
	Hints       []string `json:"hints"`   // what a person can do about each; "" for nothing
}

// plan makes every check of install that needs only the header, and changes nothing.
func (a inspector) plan(ctx context.Context, source string) error {
	rec, err := a.peek()
	if err != nil {
		return err
	}
	a.rec = rec
	a.nameUnsaved()
	a.src = a.source(source)
	art, err := a.fetch(ctx)
	if err != nil {
		return err
	}
	p := &planReport{report: &report{Provides: a.rec.Provides, Last: rec.Last}, Artifact: art.Name, Type: art.PayloadType,
		Compression: art.Compression, DeviceTypes: art.DeviceTypes, Signature: signatureText(art),
		Refused: []string{}, Hints: []string{}}
	var first error
	no := func(err error) {
		if err == nil {
			return
		}
		if p.Refused = append(p.Refused, oneLine(err.Error())); first == nil {
			first = err
		}
		p.Hints = append(p.Hints, oneLine(hintOf(err)))
	}
	if u := rec.Update; u != nil && (u.Managed || u.Step != stepDownload) { // install clears what was cut off downloading
		no(withHint(fmt.Errorf("an update is in progress: %q, in %s", u.Artifact, u.Step),
			"'mendlet status' says what is next"))
	}
	no(a.checkCompatible(art))
	no(a.checkScripts(art))
	switch {
	case art.PayloadType == rootfsImage:
		a.planRootfs(ctx, p, art, no)
	case !art.Empty:
		_, err := a.newHandler(art.PayloadType, nil)
		no(err)
	}
	if a.o.json {
		no(printJSON(a.out, p))
	} else {
		p.print(a.out)
	}
	if first != nil {
		return told(fmt.Errorf("install would refuse: %w", first))
	}
	return nil
}

func signatureText(art *artifact) string {
	switch {
	case art.SignedBy != "":
		return "good, by " + art.SignedBy
	case art.Signed:
		return "present, not checked: no key is configured"
	}
	return "none"
}

func (a inspector) planRootfs(ctx context.Context, p *planReport, art *artifact, no func(error)) {
	env, s, vars, err := p.lookAround(ctx, a.app)
	if err != nil {
		no(err)
		return
	}
	why, err := forgetful(a.c, a.m)
	no(err)
	if why != "" {
		p.Notes = append(p.Notes, why)
	}
	r := newRootfs(a.app, &update{})
	for err := range r.refusals(ctx, art, env, vars, s) {
		no(err)
	}
	if r.to == nil {
		return
	}
	p.Target, p.SlotSize = r.to.String(), r.capacity
	if r.file != nil {
		p.ImageSize = r.file.Size
	}
	if r.file != nil {
		a.planDelta(ctx, p, r, art, s, no)
	}
	for _, v := range tryOnce(r.to.num) {
		if vars[v.name] != v.value {
			p.EnvChanges = append(p.EnvChanges, "-"+v.name+"="+vars[v.name], "+"+v.name+"="+v.value)
		}
	}
}

// planDelta finds out what would be fetched.
func (a inspector) planDelta(ctx context.Context, p *planReport, r *rootfs, art *artifact, s *slots, no func(error)) {
	d, err := r.openDelta(ctx, art, s)
	if d != nil && err == nil {
		if err = d.makePlan(ctx); err == nil {
			p.Delta, p.deltaText = d.figures(), d.String()
		}
	}
	no(err)
}

func (p *planReport) print(w io.Writer) {
	printf(w, "artifact: %q, type %s, compression %s\n", p.Artifact, orNone(p.Type), p.Compression)
	printf(w, "signature: %s\n", p.Signature)
	printf(w, "for device types: %s\n", strings.Join(p.DeviceTypes, ", "))
	p.printSlots(w)
	if p.Target != "" {
		printf(w, "would write: slot %s, %d of %d bytes\n", p.Target, p.ImageSize, p.SlotSize)
	}
	if p.deltaText != "" {
		printf(w, "%s\n", p.deltaText)
	}
	if len(p.EnvChanges) > 0 {
		printf(w, "would change in the boot environment (%s):\n", p.EnvFrom)
		for _, l := range p.EnvChanges {
			printf(w, "  %s\n", l)
		}
	}
	for _, n := range p.Notes {
		printf(w, "note: %s\n", n)
	}
	for i, l := range p.Refused {
		printf(w, "refused: %s\n", l)
		if h := p.Hints[i]; h != "" {
			printf(w, "  hint: %s\n", h)
		}
	}
	if len(p.Refused) == 0 {
		printf(w, "install would go ahead\n")
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return quote(s)
}

// show prints what is in an artifact after reading it to its end.
func (a inspector) show(ctx context.Context, source string) error {
	a.src = a.source(source)
	art, err := a.fetch(ctx)
	if err != nil {
		return err
	}
	return showCommand(art, a.o.json, a.out)
}

func (a inspector) env(ctx context.Context, words []string) error {
	if len(words) > 0 && (words[0] == "-h" || words[0] == "--help") {
		return printf(a.out, "usage: mendlet env print [-n] [NAME…]\n"+
			"       mendlet env set NAME=VALUE…   (NAME= removes it)\n")
	}
	env, err := openEnv(a.c, a.m, a.lg)
	if err != nil {
		return err
	}
	return envCommand(ctx, words, env, a.out)
}

func planFlags(fs *flag.FlagSet, o *options) {
	jsonFlag(fs, o)
	deltaFlag(fs, &o.delta)
}

// fwProgram is the program called as fw_printenv or fw_setenv, and gives the exit code.
func fwProgram(ctx context.Context, name string, words []string, o *options, in io.Reader, out, errw io.Writer,
	lg *logger) int {
	c, err := loadConfig(o.paths, configFile{path: o.mainConfig()}, configFile{path: o.fallbackConfig()}, nil)
	if err != nil {
		lg.fail(err)
		return exitCode(err)
	}
	lg.level = levelWarning
	open := func(c *config, lg *logger) (bootEnv, error) { return openEnv(c, newMachine(""), lg) }
	return fwCommand(ctx, name, words, c, open, in, out, errw, lg)
}

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
	Delta       *shownDelta         `json:"delta,omitempty"`
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
	for f, err := range a.files() {
		if err != nil {
			return err
		}
		if s.Delta, err = a.showDelta(f); err != nil {
			return err
		}
		if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, f, buf); err != nil {
			return err
		}
		s.Files = append(s.Files, shownFile{f.Name, f.Size, fmt.Sprintf("%x", f.Sum)})
	}
	if asJSON {
		return printJSON(w, s)
	}
	_, err := io.WriteString(w, s.text())
	return err
}

//go:noinline
func shownLine(b *strings.Builder, key, format string, args ...any) {
	printf(b, "%-14s "+format+"\n", append([]any{key + ":"}, args...)...)
}

func (s *shown) text() string {
	var b strings.Builder
	shownLine(&b, "name", "%s", s.Name)
	if s.Group != "" {
		shownLine(&b, "group", "%s", s.Group)
	}
	shownLine(&b, "device types", "%s", strings.Join(s.DeviceTypes, ", "))
	if s.Type != nil {
		shownLine(&b, "payload type", "%s", *s.Type)
	} else {
		shownLine(&b, "payload type", "none (empty payload)")
	}
	shownLine(&b, "compression", "%s", s.Compression)
	switch {
	case s.SignedBy != "":
		shownLine(&b, "signature", "verified with key %q", s.SignedBy)
	case s.Signed:
		shownLine(&b, "signature", "present, not checked")
	default:
		shownLine(&b, "signature", "none")
	}
	shownLine(&b, "manifest", "sha256 %s", s.Manifest)
	for _, k := range sortedKeys(s.Depends) {
		shownLine(&b, "depends", "%s = %s", k, strings.Join(s.Depends[k], " or "))
	}
	for _, k := range sortedKeys(s.Provides) {
		shownLine(&b, "provides", "%s = %s", k, s.Provides[k])
	}
	switch {
	case s.Clears != nil:
		shownLine(&b, "clears", "%s", strings.Join(s.Clears, " "))
	default:
		shownLine(&b, "clears", "everything (no clears_artifact_provides)")
	}
	if s.MetaData != nil {
		shownLine(&b, "meta-data", "%s", strings.Join(strings.Fields(string(s.MetaData)), " "))
	}
	for _, n := range s.Scripts {
		shownLine(&b, "script", "%s", n)
	}
	for _, f := range s.Files {
		shownLine(&b, "file", "%s, %d bytes, sha256 %s", f.Name, f.Size, f.Sum)
	}
	if s.Delta != nil {
		shownLine(&b, "delta", "%s", s.Delta)
	}
	return b.String()
}
