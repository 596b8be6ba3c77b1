// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

// The verb connect: a terminal, files and ports of the device through its server, for who may do that there. It has a
// connection of its own to the server, and not the journal: an update goes on beside it.

const (
	apiConnect = "/api/devices/v1/deviceconnect/connect"

	connectStable  = time.Minute     // that a connection stands: the next failure is the first one
	connectWait    = 5 * time.Minute // the longest wait for a server that may be there again
	connectRefused = time.Hour       // the first wait for one that knows the device and does not offer this
	connectSlowest = 4 * time.Hour

	connectGrace = 10 * time.Second // for sessions to say goodbye to a server that does not read
	commandPause = 10 * time.Second // between two commands to the updater
)

func connectVerbs() []verb {
	f := &connectFlags{}
	return []verb{{"connect", "", "let users of the server troubleshoot: terminal, files, ports", 0, f.register,
		func(ctx context.Context, a *app, _ []string) error { return f.connect(ctx, a) }}}
}

// connector keeps a connection to the server.
type connector struct {
	a        *app
	hub      *peerHub
	mark     *connectMark
	pass     []byte // from standard input
	identity string // for the splay
	commands map[string]chan struct{}

	quiet, stable time.Duration // see socketQuiet, connectStable
	wait          func(err error, failures int) time.Duration
}

// Why the verb ends.
var (
	errConnectTime = errors.New("the time is up (--for)")
	errConnectIdle = errors.New("there was no session (--idle)")
	errConnectOnce = errors.New("the first session has ended (--once)")
)

// connect is the verb.
func (f *connectFlags) connect(ctx context.Context, a *app) error {
	if len(a.c.Servers) == 0 {
		return newSession(a).ready() // it says so
	}
	hub, err := f.offer(a)
	if err != nil {
		return err
	}
	c := &connector{a: a, hub: hub, quiet: socketQuiet, stable: connectStable}
	c.wait = c.backoff
	if a.o.passphrase == "-" { // it is there to be read once
		if c.pass, err = readBounded(a.in, 4096); err != nil {
			return fmt.Errorf("passphrase: %w", err)
		}
	}
	if c.mark, err = takeConnectMark(a.c.paths.ds, a.lg); err != nil {
		return err
	}
	defer c.mark.close()
	hub.note = newConnectLog(a.c.ConnectAuditLog, a.lg)
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	idle := time.AfterFunc(1<<62, func() { stop(errConnectIdle) })
	defer idle.Stop()
	if f.idle > 0 {
		idle.Reset(f.idle)
	}
	hub.count = func(n int, ended bool) {
		if ended && n == 0 { // it may be long until the next one
			go debug.FreeOSMemory()
		}
		switch {
		case ended && f.once:
			stop(errConnectOnce)
		case n > 0:
			idle.Stop()
		case f.idle > 0:
			idle.Reset(f.idle)
		}
	}
	if f.lasts > 0 {
		defer time.AfterFunc(f.lasts, func() { stop(errConnectTime) }).Stop()
	}
	if hub.client != nil {
		done := c.serveCommands(ctx)
		defer func() { // a child of ours is told to end, and not killed with us
			stop(nil)
			<-done
		}()
		hub.client = c.command
	}
	if c.identity, err = deviceIdentity(ctx, a); err != nil {
		a.lg.debugf("%v", err) // who asks for the token says so
	}
	return c.keep(ctx, f.retry)
}

// keep keeps a connection until ctx ends. It is an error if there never was one; without retry, at once.
func (c *connector) keep(ctx context.Context, retry bool) (err error) {
	first := true
	for failures := 0; ; {
		link, life, derr := c.dial(ctx)
		began := time.Now()
		switch {
		case derr == nil:
			first = false
			c.a.lg.infof("connected to the server")
			err = c.serve(ctx, link, life)
		case ctx.Err() == nil:
			err, began = derr, time.Time{}
		}
		if ctx.Err() != nil {
			break
		}
		if first && (!retry || exitCode(err) == exitRefused) {
			return err
		}
		if failures++; !began.IsZero() && time.Since(began) >= c.stable {
			failures = 1
		}
		wait := c.wait(err, failures)
		c.a.lg.fail(err)
		c.a.lg.infof("connecting again in %s", wait.Round(time.Second))
		if c.a.m.sleep(ctx, wait) != nil {
			break
		}
	}
	why := context.Cause(ctx)
	c.a.lg.infof("ending: %v", why)
	if first && (why == errConnectTime || why == errConnectIdle) {
		return tryLater("there was no connection: %w", cmp.Or(err, why))
	}
	return nil
}

// backoff is how long to wait after so many failures in a row. Not all devices of a server that was away come back
// at the same moment.
func (c *connector) backoff(err error, failures int) time.Duration {
	if wait := retryAfterOf(err); wait > 0 {
		return wait
	}
	n := min(failures-1, 20)
	switch httpStatus(err) {
	case http.StatusUnauthorized:
		return backoff(failures, seconds(c.a.c.RetryPollIntervalSeconds))
	case http.StatusForbidden, http.StatusNotFound:
		wait := min(connectRefused<<n, connectSlowest)
		return wait + splay(c.identity, wait/4)
	}
	wait := min(time.Second<<n, connectWait)
	return wait + splay(c.identity, max(5*time.Second, wait/2))
}

// dial gets a token, if the one that is kept is not good any more, and connects. life is the token's.
func (c *connector) dial(ctx context.Context) (link *webSocket, life time.Duration, err error) {
	a := c.a
	if a.rec, err = a.peek(); err != nil {
		return nil, 0, err
	}
	if c.pass != nil {
		a.in = bytes.NewReader(c.pass)
	}
	s := newSession(a)
	if err := s.ready(); err != nil {
		return nil, 0, err
	}
	defer s.hc.CloseIdleConnections()
	for try := 0; ; try++ {
		if err = s.api.login(ctx); err != nil {
			break
		}
		link, err = dialWebSocket(ctx, s.hc, s.api.base+apiConnect, s.api.token)
		if httpStatus(err) != http.StatusUnauthorized || try > 0 {
			break
		}
		s.api.dropToken()
	}
	if kerr := keep(a); kerr != nil {
		a.lg.warnf("%v", kerr)
	}
	return link, tokenLife(s.api.token, time.Now()), explainConnect(err)
}

// explainConnect says what a person can do about an answer that is no connection.
func explainConnect(err error) error {
	switch httpStatus(err) {
	case http.StatusUnauthorized:
		if exitCode(err) == exitTempFail { // from who gives tokens
			return err
		}
		return withHint(tryLater("with a new token, too: %w", err),
			"the server does not take this device any more, or not yet")
	case http.StatusForbidden:
		return withHint(tryLater("%w", err), "the server's plan has no troubleshooting (the add-on \"troubleshoot\")")
	case http.StatusNotFound:
		return withHint(tryLater("%w", err), "the server has no deviceconnect service, or its gateway does not lead there")
	}
	return err
}

// serve is one connection, from its beginning to its end, with which all its sessions end.
func (c *connector) serve(ctx context.Context, link *webSocket, life time.Duration) error {
	c.mark.stands(true)
	h := c.hub
	h.over = false
	h.link = func(m *peerMessage) error { return link.write(frameBinary, m.appendTo) }
	ctx, stop := context.WithTimeoutCause(ctx, life, errors.New("the device's token has expired"))
	defer stop()
	gone := make(chan struct{})
	go func() { // reading goes on, so that who sends hears of an end
		defer close(gone)
		<-ctx.Done()
		late := time.AfterFunc(connectGrace, func() { link.drop(context.Cause(ctx)) })
		defer late.Stop()
		h.endAll(context.Cause(ctx))
		link.close(closeNormal, "")
	}()
	err := c.read(link)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	stop()
	h.endAll(fmt.Errorf("connection lost: %w", err))
	<-gone
	c.mark.stands(false)
	return tryLater("connection lost: %w", err)
}

// read gives the messages to the sessions, until the link ends.
func (c *connector) read(link *webSocket) error {
	var s *peerSession // has messages that it was not woken for, as more of them may be here
	for {
		if s != nil && !link.ready() {
			wake(s.wakes)
			s = nil
		}
		b, err := link.next(spareBytes())
		large := err == errMessageSize
		if err != nil && !large {
			return err
		}
		m, err := unpackMessage(b)
		switch {
		case large:
			c.a.lg.warnf("session %s: %v", quote(m.sid), errMessageSize)
			c.hub.drop(m.sid, &peerError{http.StatusRequestEntityTooLarge, errMessageSize})
			continue
		case err == errTrailing:
			c.a.lg.debugf("message of type %s dropped: %v", quote(m.typ), err)
			continue
		case err != nil:
			link.close(closeContent, "")
			return fmt.Errorf("got a message that cannot be read: %w", err)
		}
		m.whole = b
		to, err := c.hub.take(m, len(b))
		if err != nil {
			return err
		}
		if s != nil && to != nil && to != s {
			wake(s.wakes)
		}
		s = cmp.Or(to, s)
	}
}

// serveCommands does what is asked of the updater, one after the other and with pauses, until ctx ends. What is
// asked more than once meanwhile is done once. The channel is closed when nothing is left of it.
func (c *connector) serveCommands(ctx context.Context) (done chan struct{}) {
	done = make(chan struct{})
	c.commands = map[string]chan struct{}{"check-update": make(chan struct{}, 1), "send-inventory": make(chan struct{}, 1)}
	go func() {
		defer close(done)
		for {
			var err error
			select {
			case <-ctx.Done():
				return
			case <-c.commands["check-update"]:
				err = c.tell(ctx, syscall.SIGUSR1, "run")
			case <-c.commands["send-inventory"]:
				err = c.tell(ctx, syscall.SIGUSR2, "send-inventory")
			}
			if err != nil {
				c.a.lg.warnf("%v", err)
			}
			c.a.m.sleep(ctx, commandPause)
		}
	}()
	return done
}

// command takes a command.
func (c *connector) command(m *peerMessage) error {
	ask := c.commands[m.typ]
	if ask == nil {
		return fmt.Errorf("unknown message type %s", quote(m.typ))
	}
	c.hub.note("%s by user %s", m.typ, quote(userOf(m)))
	select {
	case ask <- struct{}{}:
	default:
	}
	return nil
}

// tell signals the daemon; where there is none, this program does the same in a process of its own.
func (c *connector) tell(ctx context.Context, sig syscall.Signal, verb string) error {
	if told, err := tellDaemon(c.a, sig); told || err != nil {
		return err
	}
	o := c.a.o
	args := []string{verb, "--log-level", levelNames[c.a.lg.level]}
	for _, f := range [][2]string{{"-c", o.config}, {"-b", o.fallback}, {"-d", o.paths.ds}, {"-E", o.trusted},
		{"--running", o.running}, {"--passphrase-file", o.passphrase}} {
		if f[1] != "" && f[1] != "-" {
			args = append(args, f[0], f[1])
		}
	}
	if o.skipVerify {
		args = append(args, "--skipverify")
	}
	return runChild(ctx, child{what: "mendlet " + verb, path: "/proc/self/exe", args: args, timeout: 24 * time.Hour,
		prefix: verb, level: levelInfo, lg: c.a.lg})
}

// maxConnectLog is bytes of the file that has who did what; one of them before it is kept.
const maxConnectLog = 256 << 10

// newConnectLog makes what notes a line in the log and, where path names one, in a file.
func newConnectLog(path string, lg *logger) func(format string, args ...any) {
	return func(format string, args ...any) {
		lg.infof(format, args...)
		if path == "" {
			return
		}
		line := time.Now().UTC().Format(time.RFC3339) + " " + oneLine(fmt.Sprintf(format, args...)) + "\n"
		if err := appendBounded(path, line, maxConnectLog); err != nil {
			lg.warnf("ConnectAuditLog: %v", err)
		}
	}
}

// appendBounded appends a line to a file. One that has reached its limit, in bytes, is first given the ending ".1",
// in the place of what had that.
func appendBounded(path, line string, limit int64) error {
	d, err := openDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	name := filepath.Base(path)
	for {
		f, err := d.open(name, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		st, err := f.Stat()
		if err == nil && st.Size() >= limit {
			f.Close()
			if err = d.rename(name, name+".1"); err == nil {
				continue
			}
			return err
		}
		if err == nil {
			_, err = io.Copy(f, strings.NewReader(line))
		}
		return errors.Join(err, f.Close())
	}
}
