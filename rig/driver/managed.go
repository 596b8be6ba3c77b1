// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
)

// menderServer is as much of a Mender server as one device needs that is accepted. That the
// requests are right in every byte is what the program's own tests show.
type menderServer struct {
	url, files string // as the device sees them

	mu       sync.Mutex
	version  string // what is deployed, until its verdict; "" for nothing
	statuses []string
	logLines int
	named    string    // artifact_name of the last inventory
	said     io.Writer // gets each status
}

func newMenderServer(files string) (*menderServer, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &menderServer{said: io.Discard, url: fmt.Sprintf("http://10.0.2.2:%d", l.Addr().(*net.TCPAddr).Port), files: files}
	const deployments = "/api/devices/v1/deployments/device/deployments/"
	mux := http.NewServeMux()
	do := func(pattern string, f func(w http.ResponseWriter, body []byte)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			f(w, body)
		})
	}
	do("POST /api/devices/v1/authentication/auth_requests", func(w http.ResponseWriter, _ []byte) { io.WriteString(w, "token") })
	do("POST "+deployments+"next", s.next)
	do("PUT "+deployments+"{id}/status", s.status)
	do("PUT "+deployments+"{id}/log", func(w http.ResponseWriter, body []byte) {
		s.logLines += strings.Count(string(body), `"message":`)
		w.WriteHeader(http.StatusNoContent)
	})
	do("PUT /api/devices/v1/inventory/device/attributes", s.inventory)
	go http.Serve(l, mux)
	return s, nil
}

func (s *menderServer) next(w http.ResponseWriter, _ []byte) {
	if s.version == "" {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"id": "deploy-" + s.version, "artifact": map[string]any{
		"artifact_name": "v" + s.version, "device_types_compatible": []string{"rig"},
		"source": map[string]string{"uri": s.files + "v" + s.version + ".mender"}}})
}

func (s *menderServer) status(w http.ResponseWriter, body []byte) {
	var q struct{ Status string }
	if json.Unmarshal(body, &q) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	s.statuses = append(s.statuses, q.Status)
	fmt.Fprintln(s.said, q.Status)
	if q.Status == "success" || q.Status == "failure" {
		s.version = ""
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *menderServer) inventory(_ http.ResponseWriter, body []byte) {
	var list []struct {
		Name  string
		Value any
	}
	json.Unmarshal(body, &list)
	for _, a := range list {
		if a.Name == "artifact_name" {
			s.named = fmt.Sprint(a.Value)
		}
	}
}

func (s *menderServer) deploy(version string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version, s.statuses, s.logLines = version, nil, 0
}

// heard checks what the server has been told about the last deployment.
func (s *menderServer) heard(d *device, logs bool, statuses ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.statuses, statuses) || (s.logLines > 0) != logs {
		return fmt.Errorf("the server heard %q and %d lines of log, want %q", s.statuses, s.logLines, statuses)
	}
	if s.named != "v"+d.version {
		return fmt.Errorf("the inventory says artifact %q, but version %s runs", s.named, d.version)
	}
	d.say("the server heard %q and %d lines of log", s.statuses, s.logLines)
	return nil
}

// managed runs two deployments by "mendlet run", which reboots the machine itself: one that
// works, and one whose init dies at once.
func managed(d *device) error {
	s, err := newMenderServer(d.url)
	if err != nil {
		return err
	}
	if err := d.on(); err != nil {
		return err
	}
	s.deploy("2")
	if err := d.updateBy("2", "updater managed "+s.url); err != nil {
		return err
	}
	if err := s.heard(d, false, "downloading", "installing", "rebooting", "installing", "success"); err != nil {
		return err
	}
	s.deploy("badinit")
	if err := d.updateBy("badinit", "updater managed "+s.url); err != nil {
		return err
	}
	if err := s.heard(d, true, "downloading", "installing", "rebooting", "failure"); err != nil {
		return err
	}
	return d.off()
}

// serve deploys a version, whose artifact is in dir, to a device on this machine, until standard input ends. It prints
// the server's address, and each status that it hears.
func serve(dir, version string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go http.Serve(l, http.FileServer(http.Dir(dir)))
	s, err := newMenderServer("http://" + l.Addr().String() + "/")
	if err != nil {
		return err
	}
	s.said = os.Stdout
	s.deploy(version)
	fmt.Println(strings.Replace(s.url, "10.0.2.2", "127.0.0.1", 1))
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
