// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
)

// pollServer is a Mender server that accepts every device and has nothing for it, behind TLS.
type pollServer struct {
	*httptest.Server
	conns, bytes, polls, inventories atomic.Int64
}

func newPollServer() *pollServer {
	s := &pollServer{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/auth_requests"):
			w.Write([]byte(strings.Repeat("t", 700))) // a token of a usual length
		case strings.HasSuffix(r.URL.Path, "/deployments/next"):
			w.WriteHeader(http.StatusNoContent)
			s.polls.Add(1)
		case strings.HasSuffix(r.URL.Path, "/device/attributes"):
			w.WriteHeader(http.StatusOK)
			s.inventories.Add(1)
		default:
			http.NotFound(w, r)
		}
	}))
	s.Listener = countedListener{s.Listener, s}
	s.StartTLS()
	return s
}

type countedListener struct {
	net.Listener
	s *pollServer
}

func (l countedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	l.s.conns.Add(1)
	return countedConn{c, l.s}, err
}

type countedConn struct {
	net.Conn
	s *pollServer
}

func (c countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.s.bytes.Add(int64(n))
	return n, err
}

func (c countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.s.bytes.Add(int64(n))
	return n, err
}

// identityScript puts one, and nothing else, where both clients look. It is mounted over what
// is there, which the other mount namespaces do not see.
func (b *bench) identityScript() error {
	const share = "/usr/share/mender"
	dir := b.at("share/identity")
	return errors.Join(os.MkdirAll(dir, 0o755), os.MkdirAll(share, 0o755),
		os.WriteFile(filepath.Join(dir, "mender-device-identity"), []byte("#!/bin/sh\necho mac=02:00:00:00:00:01\n"), 0o755),
		os.NewSyscallError("mount", syscall.Mount(b.at("share"), share, "", syscall.MS_BIND, "")))
}

// poll lets a client, which has its key already, start and ask once, and once more. mender-client can only do
// that as a daemon, which is told to end as soon as it has asked and has sent its inventory.
func (b *bench) poll(p *peer) (first, later measured, err error) {
	s := newPollServer()
	defer s.Close()
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	conf := fmt.Sprintf(`{"ServerURL": %q, "ServerCertificate": "CERT", "DeviceTypeFile": "TYPE", "RootfsPartA": %q, "RootfsPartB": %q,
 "FwEnvConfig": "ENV", "BootEnv": "native", "UpdatePollIntervalSeconds": 1800, "InventoryPollIntervalSeconds": 28800, "DBus": {"Enabled": false}}`,
		s.URL, b.slotA, b.slotB)
	dir, seen := b.at("mendlet"), b.at("mendlet")
	if p.name == "mender" {
		dir, seen = b.at("root/etc/mender"), "/etc/mender"
	}
	for from, to := range map[string]string{"CERT": "server.crt", "TYPE": "device_type", "ENV": "fw_env.config"} {
		conf = strings.Replace(conf, from, filepath.Join(seen, to), 1)
	}
	if err := os.WriteFile(filepath.Join(dir, "poll.conf"), []byte(conf), 0o600); err != nil {
		return first, later, err
	}
	if err := os.WriteFile(filepath.Join(dir, "server.crt"), cert, 0o644); err != nil {
		return first, later, err
	}
	if err := errors.Join(b.freshEnv(dir), os.MkdirAll(b.at("mendlet/poll"), 0o755)); err != nil {
		return first, later, err
	}
	if first, err = b.startAndAsk(p, dir, s); err == nil {
		later, err = b.startAndAsk(p, dir, s)
	}
	return first, later, err
}

func (b *bench) startAndAsk(p *peer, dir string, s *pollServer) (measured, error) {
	for _, n := range []*atomic.Int64{&s.conns, &s.bytes, &s.polls, &s.inventories} {
		n.Store(0)
	}
	cmd := exec.Command(b.mendlet, "run", "-q", "-c", filepath.Join(dir, "poll.conf"), "-d", b.at("mendlet/poll"), "--running", "A")
	if p.name == "mender" {
		cmd = exec.Command(p.bin, "--no-syslog", "-l", "warning", "-c", "/etc/mender/poll.conf", "daemon")
		cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: b.at("root")}
		go func() {
			if waitUntil("it has asked", func() bool { return s.polls.Load() > 0 && s.inventories.Load() > 0 }) != nil {
				cmd.Process.Kill()
				return
			}
			cmd.Process.Signal(syscall.SIGTERM)
		}()
	}
	m, err := command(cmd, nil, nil)
	if err != nil && s.polls.Load() > 0 && cmd.ProcessState != nil { // a daemon that is told to end does so as it likes
		err = nil
		m.addUsage(cmd.ProcessState)
	}
	m.conns, m.bytes = s.conns.Load(), s.bytes.Load()
	return m, err
}
