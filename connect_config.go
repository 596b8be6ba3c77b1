// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"path/filepath"
	"strings"
	"time"
)

// What the device offers: as the options of the verb say, or as mender-connect.conf does, of which all that Mender's
// own add-on would offer is.

const connectConfName = "mender-connect.conf"

// connectFlags are those of the verb.
type connectFlags struct {
	lasts, idle           time.Duration
	once, retry, terminal bool
	files                 string
	forward               []string
}

func (f *connectFlags) register(fs *flag.FlagSet, o *options) {
	keyFlags(fs, o)
	fs.BoolVar(&f.terminal, "terminal", false, "offer a terminal")
	fs.StringVar(&f.files, "files", "", "offer the files below this `DIR`, to get and to put")
	fs.Func("forward", "offer connections to this `HOST:PORT`, from the device; repeatable", func(s string) error {
		f.forward = append(f.forward, s)
		return nil
	})
	fs.DurationVar(&f.lasts, "for", 0, "end after this `TIME` (when it is told to)")
	fs.DurationVar(&f.idle, "idle", 0, "end when there was no session for this `TIME` (do not)")
	fs.BoolVar(&f.once, "once", false, "end after the first session")
	fs.BoolVar(&f.retry, "retry", false, "go on trying if the first connection comes to nothing, too")
}

// connectConfig has the keys of mender-connect.conf, which encoding/json matches without regard to case.
type connectConfig struct {
	ShellCommand   string
	ShellArguments []string
	User           string
	Terminal       struct {
		Width, Height uint16
		Disable       bool
	}
	FileTransfer, MenderClient struct{ Disable bool }
	PortForward                struct {
		Disable bool
		Allow   []string // HOST:PORT beside this machine's own; mendlet's own
	}
	Sessions struct {
		StopExpired                              *bool
		ExpireAfter, ExpireAfterIdle, MaxPerUser uint32 // seconds; of users
	}
	Limits struct {
		Enabled      bool
		FileTransfer fileLimits
	}
}

// connectIdle is how long a terminal without a key lives, where nothing else is configured.
const connectIdle = 600

// readConnectConfig reads the file beside mender.conf over the one beside the fallback; found: there was one.
func readConnectConfig(a *app) (c *connectConfig, found bool, err error) {
	c = &connectConfig{}
	for _, beside := range []string{a.o.fallbackConfig(), a.o.mainConfig()} {
		path := filepath.Join(filepath.Dir(beside), connectConfName)
		text, err := readPlain(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = parseObject(text, c)
		}
		if err != nil {
			return nil, false, refuse("configuration %q: %w", path, err)
		}
		found = true
		var keys map[string]json.RawMessage
		parseObject(text, &keys)
		for _, k := range sortedKeys(keys) {
			switch strings.ToLower(k) {
			case "serverurl", "servers", "clientprotocol", "httpsclient", "skipverify", "servercertificate",
				"reconnectintervalseconds":
				a.lg.warnf("%q: %s is not used: the server is mender.conf's", path, quote(k))
			}
		}
	}
	return c, found, nil
}

// terminal is what all terminals have in common.
func (c *connectConfig) terminal() *terminalOptions {
	return &terminalOptions{shell: c.ShellCommand, args: c.ShellArguments, user: c.User, width: c.Terminal.Width,
		height: c.Terminal.Height}
}

// files is what all sessions of files have in common; dir: whose, "": those of the configuration. Without limits all
// that is in the configuration's is as by the device itself.
func (c *connectConfig) files(dir string) *fileOptions {
	o := &fileOptions{root: dir}
	if o.AllowOverwrite, o.FollowSymLinks = true, dir == ""; c.Limits.Enabled {
		o.fileLimits = c.Limits.FileTransfer
	}
	return o
}

// limits puts the times of sessions into h, and how many terminals a user may have.
func (c *connectConfig) limits(h *peerHub) {
	s := c.Sessions
	h.perUser = int(min(max(s.MaxPerUser, 1), maxPeerSessions))
	if s.StopExpired != nil && !*s.StopExpired {
		return
	}
	h.expires, h.expiresIdle = time.Duration(s.ExpireAfter)*time.Second, time.Duration(s.ExpireAfterIdle)*time.Second
	if h.expiresIdle > 0 { // the one or the other
		h.expires = 0
	} else if h.expires == 0 {
		h.expiresIdle = connectIdle * time.Second
	}
}

// offer makes the sessions' side of what is offered. Nothing is that is not named; what cannot be had is refused.
func (f *connectFlags) offer(a *app) (*peerHub, error) {
	c, found, err := readConnectConfig(a)
	if err != nil {
		return nil, err
	}
	h := &peerHub{lg: a.lg, offers: map[uint16]peerOffer{}, sessions: map[string]*peerSession{}, quiet: sessionQuiet,
		ends: sessionEnds, patience: replaceAfter}
	c.limits(h)
	flags := f.terminal || f.files != "" || f.forward != nil
	if !flags && !found {
		return nil, withHint(refuse("nothing is offered"), "name it with --terminal, --files or --forward, or write %q",
			filepath.Join(filepath.Dir(a.o.mainConfig()), connectConfName))
	}
	files, forwards := c.files(f.files), &forwardOptions{allow: f.forward}
	if !flags {
		f.terminal = !c.Terminal.Disable
		if !c.FileTransfer.Disable {
			files.root = cmp.Or(files.Chroot, "/")
		}
		if !c.PortForward.Disable {
			forwards.allow = append([]string{}, c.PortForward.Allow...)
		}
		if !c.MenderClient.Disable {
			h.client = func(*peerMessage) error { return nil }
		}
		if f.terminal && c.User == "" {
			return nil, withHint(refuse("%s: no User is set, whose the terminals are", connectConfName),
				"set it, or set Disable of Terminal")
		}
	}
	if f.terminal {
		o := c.terminal()
		if err := o.check(); err != nil {
			return nil, err
		}
		h.offers[protoShell] = peerOffer{"terminal", func(s *peerSession) peerHandler { return newTerminal(s, o) }}
	}
	if files.root != "" {
		if err := files.check(); err != nil {
			return nil, err
		}
		h.offers[protoFile] = peerOffer{"files", func(s *peerSession) peerHandler { return newFileTransfer(s, files) }}
	}
	if forwards.allow != nil {
		if err := forwards.check(); err != nil {
			return nil, err
		}
		h.offers[protoForward] = peerOffer{"ports", func(s *peerSession) peerHandler { return newPortForward(s, forwards) }}
	}
	if len(h.offers) == 0 && h.client == nil {
		return nil, refuse("%s: all is disabled", connectConfName)
	}
	return h, nil
}
