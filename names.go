// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// The names of Mender's client: scripts, units and other programs of a fleet call it by them. A link of such
// a name to this program takes that client's options and verbs and ends with its exit codes (of
// github.com/mendersoftware/mender cli/cli.go of 3.x, which is one program, and src/mender-update/cli/cli.cpp
// and src/mender-auth/cli/cli.cpp of 5.x).

// menderVerbs are the verbs of a name, as far as there are such. Those of mender-setup and mender-snapshot
// are not said.
//
//go:noinline
func menderVerbs(name string) []string {
	list := ""
	switch name {
	case "mender":
		list = "bootstrap check-update commit daemon install rollback send-inventory setup show-artifact show-provides " +
			"snapshot"
	case "mender-update":
		list = "install resume commit rollback show-artifact show-provides check-update send-inventory daemon"
	case "mender-auth":
		list = "bootstrap daemon"
	case "mender-setup":
		list = "setup"
	case "mender-snapshot":
		list = "snapshot"
	}
	return strings.Fields(list)
}

// calledAs gives what the program is by its name, and its words with the verb that such a name may leave out.
func calledAs(args []string) (persona, []string, error) {
	name := filepath.Base(args[0])
	if name == "mender-update" && len(args) > 1 && args[1] == "auth" { // of builds that have both in one
		name, args = "mender-auth", args[1:]
	}
	list := menderVerbs(name)
	switch len(list) {
	case 0:
		return persona{}, args, nil
	case 1:
		if len(args) != 2 || args[1] != "--version" && args[1] != "-v" { // which are no verb's
			args = append([]string{name, list[0]}, args[1:]...)
		}
	}
	m := &asMender{name: name}
	p := persona{name: name, list: m.verbs, flags: m.flags, exit: m.exit}
	if name == "mender" {
		p.version, p.bare = "\truntime: "+runtime.Version(), true
	}
	return p, args, nil
}

// asMender is a run under one of these names.
type asMender struct {
	name     string
	noSyslog bool
	root     string // of what setup reads and writes outside the configuration: a test's own

	// What setup has besides our own options.
	username, password, serverIP  string
	demo, demoServer, demoPolling bool
}

// exit is the exit code of Mender's clients: they have none for usage, refusals and what may pass.
func (m *asMender) exit(err error) int {
	switch code := exitCode(err); {
	case errors.Is(err, errNoVerb) && m.name == "mender":
		return 3 // of the library that its command line is made with
	case code == exitRefused, code == exitUsage, code == exitTempFail:
		return exitFailed
	default:
		return code
	}
}

// flags registers what goes with every verb, as far as the verb has not such options of its own.
func (m *asMender) flags(fs *flag.FlagSet, o *options) {
	more := flag.NewFlagSet("", flag.ContinueOnError)
	bootstrapFlags(more, o)
	more.BoolVar(&m.noSyslog, "no-syslog", m.noSyslog, "do not log to syslog")
	more.VisitAll(func(f *flag.Flag) {
		if fs.Lookup(f.Name) == nil {
			fs.Var(f.Value, f.Name, f.Usage)
		}
	})
}

// verbs makes those of this name of ours.
func (m *asMender) verbs(ours []verb) (list []verb) {
	mine := menderVerbs(m.name)
	for _, v := range ours {
		if m.name == "mender-auth" && v.name == "daemon" {
			v = verb{v.name, "", "give the device's token to other programs over D-Bus", 0, keyFlags,
				func(ctx context.Context, a *app, _ []string) error { return authDaemon(ctx, a) }}
		}
		if listed(mine, v.name) {
			list = append(list, m.adapt(v))
		}
	}
	return list
}

func (m *asMender) adapt(v verb) verb {
	ours := v
	v.flags = func(fs *flag.FlagSet, o *options) {
		if ours.flags != nil {
			ours.flags(fs, o)
		}
		m.flags(fs, o)
		if v.name == "setup" {
			m.setupFlags(fs, o)
		}
	}
	v.run = func(ctx context.Context, a *app, words []string) error {
		if m.name == "mender" && !m.noSyslog && a.o.log == "stderr" {
			if sink, err := syslogSink(); err == nil { // its client says it there, too
				a.lg.sinks = append(a.lg.sinks, sink)
			}
		}
		a.o.force = a.o.force && (v.name == "bootstrap" || v.name == "daemon")
		told, err := false, error(nil)
		switch v.name {
		case "setup":
			return m.setup(a)
		case "check-update":
			told, err = tellDaemon(a, syscall.SIGUSR1)
		case "send-inventory":
			told, err = tellDaemon(a, syscall.SIGUSR2)
		}
		if told || err != nil {
			return err
		}
		return ours.run(ctx, a, words)
	}
	return v
}

func (m *asMender) setupFlags(fs *flag.FlagSet, o *options) {
	fs.StringVar(&o.setup.serverURL, "url", "", fs.Lookup("server-url").Usage)
	fs.StringVar(&m.serverIP, "server-ip", "", "`ADDRESS` of a demo server; it goes into /etc/hosts")
	fs.StringVar(&m.username, "username", "", "`EMAIL` at hosted.mender.io; cannot be used, see --tenant-token")
	fs.StringVar(&m.password, "password", "", "`PASSWORD` there; cannot be used")
	fs.BoolVar(&m.demoServer, "demo-server", false, "use the demo server, "+demoServer)
	fs.BoolVar(&m.demoPolling, "demo-polling", false, "poll every 5 seconds")
	fs.BoolVar(&m.demo, "demo", false, "--demo-polling, and --demo-server if no other server is named")
}

const demoServer = "docker.mender.io"

// setup is Mender's setup, as far as it asks no questions: what it would have to ask for is an error.
func (m *asMender) setup(a *app) error {
	s := &a.o.setup
	s.serverCert = cmp.Or(s.serverCert, a.o.trusted) // it has -E for that
	m.demoServer = m.demoServer || m.serverIP != "" || m.demo && s.serverURL == "" && !s.hosted
	if err := m.incomplete(a); err != nil {
		return err
	}
	if m.demo || m.demoPolling {
		s.updatePoll, s.inventoryPoll = cmp.Or(s.updatePoll, 5), cmp.Or(s.inventoryPoll, 5)
		s.retryPoll = cmp.Or(s.retryPoll, 30)
	}
	if m.demoServer {
		s.serverURL = "https://" + demoServer
		for _, client := range []string{"auth", "client"} { // packages of 5.x and 3.x
			path := m.root + "/usr/share/doc/mender-" + client + "/examples/demo.crt"
			if _, err := os.Stat(path); err == nil && s.serverCert == "" {
				s.serverCert = path
			}
		}
	}
	if m.serverIP != "" {
		if err := nameHost(m.root+"/etc/hosts", m.serverIP, demoServer); err != nil {
			return err
		}
	}
	err := s.write(a.o.mainConfig(), a.c)
	if err == nil && !a.o.quiet {
		_, err = fmt.Fprintln(a.out, "Mender setup successfully.")
	}
	return err
}

// incomplete finds what is missing, and what contradicts itself.
func (m *asMender) incomplete(a *app) error {
	s := &a.o.setup
	named := s.serverURL != "" && s.hosted || m.demoServer && (s.serverURL != "" || s.hosted)
	_, typeErr := a.c.deviceType()
	_, addrErr := netip.ParseAddr(m.serverIP)
	missing := ""
	switch {
	case named:
		return usageError("setup: more than one server is named")
	case m.serverIP != "" && addrErr != nil:
		return usageError("setup: --server-ip: %w", addrErr)
	case (s.hosted || m.username+m.password != "") && s.tenantToken == "" && a.c.TenantToken == "":
		missing = "--tenant-token; nobody logs in with --username to fetch it"
	case s.serverURL == "" && !s.hosted && !m.demoServer && len(a.c.Servers) == 0:
		missing = "one of --server-url, --hosted-mender and --demo-server"
	case s.deviceType == "" && typeErr != nil:
		missing = "--device-type"
	default:
		return nil
	}
	return usageError("setup: no questions are asked: want %s", missing)
}
