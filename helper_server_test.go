// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// A Mender server for tests, as faithful as the open-source one where a device can see a
// difference: it verifies signatures over the exact bytes, tells devices apart by the exact
// identity text, compares the provides of a deployment in progress as a whole, and answers
// with the same codes. It keeps its state over restarts of a client. The test that runs
// Debian's own client against it (TestServerMenderClient) is what shows that it is right.

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

type testServer struct {
	*httptest.Server
	t testing.TB

	mu          sync.Mutex
	changed     *sync.Cond // after each request of the API
	v2          bool       // the Enterprise route
	noPost      bool       // no POST to next v1, as before server 3.x
	noPut       bool       // inventory by PATCH only
	takesAlerts bool       // as the monitor add-on's service does
	alerts      []testAlert
	autoAccept  bool
	tenant      string // if set, what tenant_token must be
	signature   string // of tokens: as long as with the keys of some server
	devices     map[string]*testDevice
	tokens      map[string]*testDevice
	issued      int // tokens so far
	uids        int // given so far
	deployments []*testDeployment
	artifacts   map[string][]byte
	linkEpoch   int            // links of another epoch have expired
	requests    map[string]int // "PUT status" and so on
	conns       int
	sent        int64 // bytes of artifacts
	log         []string
	// fault may answer in the server's place; it returns true if it did. route is as in
	// requests.
	fault func(route string, w http.ResponseWriter, r *http.Request) bool
	// connect is deviceconnect for devices; nil: there is none.
	connect http.HandlerFunc
}

type testDevice struct {
	id        string
	uid       string // by which the server knows it
	key       string // PEM
	status    string // pending, accepted, rejected, preauthorized
	tier      string
	inventory map[string]any

	configuration string // of mender-configure
}

type testDeployment struct {
	id, name string
	types    []string
	devices  map[*testDevice]*testRun
}

// testRun is one device's part in a deployment.
type testRun struct {
	provides map[string]any
	history  []string // statuses as they came, with ":substate"
	status   string   // "" before the first next
	logs     []testLogMessage
	logPuts  int
}

type testLogMessage struct {
	Timestamp *time.Time `json:"timestamp"`
	Level     string     `json:"level"`
	Message   string     `json:"message"`
}

func finished(status string) bool {
	return slices.Contains([]string{"success", "failure", "already-installed", "aborted"}, status)
}

// newTestServer starts one; secure: with TLS, trusted by the pool of s.Certificate().
func newTestServer(t testing.TB, secure bool) *testServer {
	if secure {
		return startServer(t, &tls.Config{})
	}
	return startServer(t, nil)
}

// heard is the log of requests, and the number of connections that they came over.
func (s *testServer) heard() (log []string, conns int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.log), s.conns
}

// startServer starts one with these certificates; nil: without TLS.
func startServer(t testing.TB, conf *tls.Config) *testServer {
	s := &testServer{t: t, devices: map[string]*testDevice{}, tokens: map[string]*testDevice{},
		artifacts: map[string][]byte{}, requests: map[string]int{}}
	s.changed = sync.NewCond(&s.mu)
	s.Server = httptest.NewUnstartedServer(s.handler())
	s.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			s.mu.Lock()
			s.conns++
			s.mu.Unlock()
		}
	}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if s.TLS = conf; conf != nil {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

func (s *testServer) handler() http.Handler {
	mux := http.NewServeMux()
	// do counts, lets the test interfere, bounds the body and holds the lock.
	do := func(pattern, name string, f func(http.ResponseWriter, *http.Request, []byte)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			route := r.Method + " " + name
			s.mu.Lock()
			s.requests[route]++
			s.log = append(s.log, route)
			fault := s.fault
			s.mu.Unlock()
			if fault != nil && fault(route, w, r) {
				return
			}
			body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20+1))
			if err != nil {
				return
			}
			if len(body) > 1<<20 {
				apiError(w, http.StatusRequestEntityTooLarge, "request body too large")
				return
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			f(w, r, body)
			s.changed.Broadcast()
		})
	}
	deploy := "/api/devices/v1/deployments/device/deployments/"
	do("POST /api/devices/v1/authentication/auth_requests", "auth", s.auth)
	do("POST /api/devices/v2/deployments/device/deployments/next", "next2", s.nextV2)
	do("POST "+deploy+"next", "next", s.nextPost)
	do("GET "+deploy+"next", "next", s.nextGet)
	do("PUT "+deploy+"{id}/status", "status", s.putStatus)
	do("PUT "+deploy+"{id}/log", "log", s.putLog)
	do("PUT /api/devices/v1/inventory/device/attributes", "inventory", s.putInventory)
	do("PATCH /api/devices/v1/inventory/device/attributes", "inventory", s.putInventory)
	do("POST /api/devices/v1/devicemonitor/alert", "alert", s.postAlert)
	do("PUT /api/devices/v1/deviceconfig/configuration", "configuration", s.putConfiguration)
	mux.HandleFunc("GET /artifacts/{name}", s.getArtifact)
	mux.HandleFunc("GET /api/devices/v1/deviceconnect/connect", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		serve, device := s.connect, s.tokens[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
		s.requests["GET connect"]++
		s.changed.Broadcast()
		s.mu.Unlock()
		switch {
		case serve == nil:
			http.NotFound(w, r)
		case device == nil:
			apiError(w, http.StatusUnauthorized, "token is not good any more")
		default:
			serve(w, r)
		}
	})
	return mux
}

func apiError(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(map[string]string{"error": text, "request_id": "test"})
}

// verifyTestSignature is what mender-server's utils.VerifyAuthReqSign does.
func verifyTestSignature(keyPEM, signature string, body []byte) error {
	b, _ := pem.Decode([]byte(keyPEM))
	if b == nil || b.Type != "PUBLIC KEY" {
		return fmt.Errorf("pubkey is not a PEM PUBLIC KEY")
	}
	key, err := x509.ParsePKIXPublicKey(b.Bytes)
	if err != nil {
		return err
	}
	sig, err := base64.StdEncoding.DecodeString(signature)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(body)
	ok := false
	switch k := key.(type) {
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], sig) == nil
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, sum[:], sig)
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, body, sig)
	}
	if !ok {
		return fmt.Errorf("signature verification failed with %T", key)
	}
	return nil
}

func (s *testServer) auth(w http.ResponseWriter, r *http.Request, body []byte) {
	var q authRequest
	if err := json.Unmarshal(body, &q); err != nil || q.IDData == "" || q.PubKey == "" {
		apiError(w, 400, "invalid auth request")
		return
	}
	var id map[string]any
	if err := json.Unmarshal([]byte(q.IDData), &id); err != nil {
		apiError(w, 400, "id_data: "+err.Error())
		return
	}
	if err := verifyTestSignature(q.PubKey, r.Header.Get("X-MEN-Signature"), body); err != nil {
		apiError(w, 401, err.Error())
		return
	}
	if s.tenant != "" && q.TenantToken != s.tenant {
		apiError(w, 401, "tenant token wrong")
		return
	}
	d := s.devices[q.IDData]
	if d == nil {
		s.uids++
		d = &testDevice{id: q.IDData, uid: fmt.Sprintf("device-%d", s.uids), key: q.PubKey, status: "pending"}
		s.devices[q.IDData] = d
	}
	if d.status == "preauthorized" && d.key == q.PubKey || s.autoAccept {
		d.status, d.key = "accepted", q.PubKey
	}
	if d.tier = q.Tier; d.tier == "" {
		d.tier = "standard"
	}
	if d.status != "accepted" || d.key != q.PubKey {
		apiError(w, 401, "dev auth: unauthorized")
		return
	}
	claims := fmt.Sprintf(`{"jti":"%d","sub":%q,"mender.device":true}`, s.issued, d.uid)
	s.issued++
	token := "e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + "." + cmp.Or(s.signature, "c2lnbmF0dXJl")
	s.tokens[token] = d
	w.Header().Set("Content-Type", "application/jwt")
	io.WriteString(w, token)
}

// device is who the request is from; nil: it was answered with 401.
func (s *testServer) device(w http.ResponseWriter, r *http.Request) *testDevice {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if d := s.tokens[token]; d != nil && d.status == "accepted" {
		return d
	}
	apiError(w, 401, "unauthorized")
	return nil
}

func (s *testServer) nextV2(w http.ResponseWriter, r *http.Request, body []byte) {
	if !s.v2 {
		http.NotFound(w, r)
		return
	}
	var q struct {
		Provides map[string]any `json:"device_provides"`
	}
	if json.Unmarshal(body, &q) != nil {
		apiError(w, 400, "malformed body")
		return
	}
	s.next(w, r, q.Provides)
}

func (s *testServer) nextPost(w http.ResponseWriter, r *http.Request, body []byte) {
	if s.noPost {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	var provides map[string]any
	if json.Unmarshal(body, &provides) != nil {
		apiError(w, 400, "malformed body")
		return
	}
	s.next(w, r, provides)
}

func (s *testServer) nextGet(w http.ResponseWriter, r *http.Request, _ []byte) {
	q := r.URL.Query()
	s.next(w, r, map[string]any{"artifact_name": q.Get("artifact_name"), "device_type": q.Get("device_type")})
}

func (s *testServer) next(w http.ResponseWriter, r *http.Request, provides map[string]any) {
	dev := s.device(w, r)
	if dev == nil {
		return
	}
	name, _ := provides["artifact_name"].(string)
	kind, _ := provides["device_type"].(string)
	if name == "" || kind == "" {
		apiError(w, 400, "artifact_name: cannot be blank; device_type: cannot be blank.")
		return
	}
	for _, d := range s.deployments {
		run := d.devices[dev]
		if run == nil {
			run = &testRun{}
			d.devices[dev] = run
		}
		switch {
		case finished(run.status):
			continue
		case run.status == "":
			if name == d.name {
				run.status = "already-installed"
				continue
			}
			run.status, run.provides = "pending", provides
		case !reflect.DeepEqual(run.provides, provides):
			run.status = "failure"
			run.history = append(run.history, "failure:by server, provides changed")
			apiError(w, 409, "the deployment request does not match the active one")
			return
		}
		s.offer(w, d)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *testServer) offer(w http.ResponseWriter, d *testDeployment) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{
		"id":   d.id,
		"type": "software",
		"artifact": map[string]any{
			"id":                      "artifact-" + d.name,
			"artifact_name":           d.name,
			"source":                  map[string]string{"uri": s.link(d.name), "expire": "2040-01-01T00:00:00Z"},
			"device_types_compatible": d.types,
		},
	})
}

// link is a presigned URL, good until the next expireLinks.
func (s *testServer) link(name string) string {
	return s.URL + "/artifacts/" + name + "?X-Amz-Signature=secret&epoch=" + strconv.Itoa(s.linkEpoch)
}

func (s *testServer) expireLinks() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.linkEpoch++
}

func (s *testServer) expireTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

func (s *testServer) putStatus(w http.ResponseWriter, r *http.Request, body []byte) {
	run := s.run(w, r)
	if run == nil {
		return
	}
	var q struct{ Status, Substate string }
	if json.Unmarshal(body, &q) != nil || !slices.Contains([]string{"installing", "pause_before_installing",
		"downloading", "pause_before_rebooting", "rebooting", "pause_before_committing", "success", "failure",
		"already-installed"}, q.Status) {
		apiError(w, 400, "status: unknown")
		return
	}
	entry := q.Status
	if q.Substate != "" {
		entry += ":" + q.Substate
	}
	run.history = append(run.history, entry)
	if run.status == "aborted" {
		apiError(w, 409, "deployment aborted")
		return
	}
	if !finished(run.status) {
		run.status = q.Status
	}
	w.WriteHeader(http.StatusNoContent)
}

// run finds the part of the asking device in the deployment of the path, or answers.
func (s *testServer) run(w http.ResponseWriter, r *http.Request) *testRun {
	dev := s.device(w, r)
	if dev == nil {
		return nil
	}
	for _, d := range s.deployments {
		if run := d.devices[dev]; d.id == r.PathValue("id") && run != nil && run.status != "" {
			return run
		}
	}
	apiError(w, 404, "not found")
	return nil
}

func (s *testServer) putLog(w http.ResponseWriter, r *http.Request, body []byte) {
	run := s.run(w, r)
	if run == nil {
		return
	}
	var q struct{ Messages []testLogMessage }
	err := json.Unmarshal(body, &q)
	for _, m := range q.Messages {
		if m.Timestamp == nil || m.Level == "" || m.Message == "" {
			err = fmt.Errorf("a message lacks something")
		}
	}
	if err != nil || len(q.Messages) == 0 {
		apiError(w, 400, "malformed log")
		return
	}
	run.logs = q.Messages
	run.logPuts++
	w.WriteHeader(http.StatusNoContent)
}

func (s *testServer) putInventory(w http.ResponseWriter, r *http.Request, body []byte) {
	if s.noPut && r.Method == http.MethodPut {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	dev := s.device(w, r)
	if dev == nil {
		return
	}
	var list []struct {
		Name  string
		Value any
	}
	err := json.Unmarshal(body, &list)
	set := map[string]any{}
	for _, a := range list {
		if _, twice := set[a.Name]; twice || a.Name == "" || a.Value == nil {
			err = fmt.Errorf("bad attribute")
		}
		set[a.Name] = a.Value
	}
	if err != nil {
		apiError(w, 400, "malformed inventory")
		return
	}
	if r.Method == http.MethodPut || dev.inventory == nil {
		dev.inventory = map[string]any{}
	}
	for k, v := range set {
		dev.inventory[k] = v
	}
	w.WriteHeader(http.StatusOK)
}

// testAlert has all that an alert has, and nothing else.
type testAlert struct {
	Name    string
	Level   string
	Time    time.Time `json:"timestamp"`
	Subject struct {
		Name, Type, Status string
		Details            struct{ Description string }
	}
}

func (s *testServer) postAlert(w http.ResponseWriter, r *http.Request, body []byte) {
	if !s.takesAlerts {
		http.NotFound(w, r)
		return
	}
	if s.device(w, r) == nil {
		return
	}
	var list []testAlert
	in := json.NewDecoder(bytes.NewReader(body))
	in.DisallowUnknownFields()
	err := in.Decode(&list)
	for _, a := range list {
		if a.Name == "" || a.Level != "OK" && a.Level != "CRITICAL" || a.Time.IsZero() || a.Subject.Name != a.Name ||
			a.Subject.Type == "" || a.Subject.Status == "" || !bytes.Equal(body, bytes.ToValidUTF8(body, nil)) {
			err = fmt.Errorf("malformed alert")
		}
	}
	if err != nil || len(list) == 0 {
		apiError(w, 400, "malformed alerts")
		return
	}
	s.alerts = append(s.alerts, list...)
	w.WriteHeader(http.StatusNoContent)
}

func (s *testServer) putConfiguration(w http.ResponseWriter, r *http.Request, body []byte) {
	dev := s.device(w, r)
	if dev == nil {
		return
	}
	var keys map[string]string
	if json.Unmarshal(body, &keys) != nil {
		apiError(w, 400, "malformed configuration")
		return
	}
	dev.configuration = string(body)
	w.WriteHeader(http.StatusNoContent)
}

func (s *testServer) getArtifact(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests["GET artifact"]++
	s.log = append(s.log, strings.TrimSpace("GET artifact "+r.Header.Get("Range")))
	body, ok := s.artifacts[r.PathValue("name")]
	expired := r.URL.Query().Get("epoch") != strconv.Itoa(s.linkEpoch)
	fault := s.fault
	s.mu.Unlock()
	if fault != nil && fault("GET artifact", w, r) {
		return
	}
	switch {
	case r.Header.Get("Authorization") != "":
		http.Error(w, "AuthorizationQueryParametersError", http.StatusBadRequest) // as S3 does
		return
	case expired:
		http.Error(w, "AccessDenied: Request has expired", http.StatusForbidden)
		return
	case !ok:
		http.NotFound(w, r)
		return
	}
	w.Header().Set("ETag", testETag(body))
	w.Header().Set("Content-Type", "application/vnd.mender-artifact")
	http.ServeContent(&countingWriter{ResponseWriter: w, s: s}, r, "", time.Unix(1700000000, 0), bytes.NewReader(body))
}

func testETag(text []byte) string { return fmt.Sprintf("\"%x", sha256.Sum256(text))[:33] + `"` }

type countingWriter struct {
	http.ResponseWriter
	s *testServer
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.s.mu.Lock()
	c.s.sent += int64(n)
	c.s.mu.Unlock()
	return n, err
}

// What follows is for the test's side.

func (s *testServer) setFault(f func(route string, w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// await returns when cond, which is called with the lock held, is true after a request, and
// fails the test when ctx ends before.
func (s *testServer) await(ctx context.Context, what string, cond func() bool) {
	s.t.Helper()
	defer context.AfterFunc(ctx, s.changed.Broadcast)()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !cond() {
		if ctx.Err() != nil {
			s.t.Fatalf("waiting for %s: %v; requests so far: %q", what, context.Cause(ctx), s.log)
		}
		s.changed.Wait()
	}
}

// deviceByID waits for nothing: the device must have asked before.
func (s *testServer) deviceByID(id string) *testDevice {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.devices[id]; d != nil {
		return d
	}
	s.t.Fatalf("the server knows no device %s", id)
	return nil
}

func (s *testServer) setDevice(id, status string) {
	d := s.deviceByID(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	d.status = status
}

// decommission forgets the device.
func (s *testServer) decommission(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.devices, id)
	clear(s.tokens)
}

func (s *testServer) preauthorize(id, keyPEM string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devices[id] = &testDevice{id: id, key: keyPEM, status: "preauthorized"}
}

// deploy offers the artifact to every device that asks.
func (s *testServer) deploy(id, name string, types []string, artifact []byte) *testDeployment {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := &testDeployment{id: id, name: name, types: types, devices: map[*testDevice]*testRun{}}
	s.deployments = append(s.deployments, d)
	s.artifacts[name] = artifact
	return d
}

// abort ends the deployment for all devices, as an operator does.
func (s *testServer) abort(d *testDeployment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, run := range d.devices {
		if !finished(run.status) {
			run.status = "aborted"
		}
	}
}

// history is what the one device of the deployment has reported.
func (s *testServer) history(d *testDeployment) (statuses []string, final string, logs []testLogMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, run := range d.devices {
		return slices.Clone(run.history), run.status, slices.Clone(run.logs)
	}
	return nil, "", nil
}

func (s *testServer) count(route string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests[route]
}

const testModule = `case "$1" in
NeedsArtifactReboot) echo No ;;
SupportsRollback) echo Yes ;;
ArtifactInstall) cp "$2/files/payload" "$(dirname "$0")/../../installed" && ! grep -q broken "$2/files/payload" ;;
esac`

const testID = `{"mac":"52:54:00:12:34:56"}`

func fixedID(context.Context) (string, error) { return testID, nil }

func testSigner(t testing.TB) crypto.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func testConfig(t testing.TB, servers ...string) *config {
	t.Helper()
	dir := t.TempDir()
	c := defaultConfig(paths{conf: dir, data: dir, ds: dir})
	for _, s := range servers {
		c.Servers = append(c.Servers, serverEntry{s})
	}
	return c
}

func noEnv(string) string { return "" }

func testHTTPClient(t testing.TB, c *config, o netOptions) *agent {
	t.Helper()
	if o.getenv == nil {
		o.getenv = noEnv
	}
	hc, err := newHTTPClient(c, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hc.CloseIdleConnections)
	return hc
}

func getURL(hc *agent, url string) (*http.Response, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return hc.Do(req)
}

// apiFor is a client with a key of its own against s.
func apiFor(t testing.TB, s *testServer) *apiClient {
	t.Helper()
	c := testConfig(t, s.URL)
	return newAPIClient(c, testHTTPClient(t, c, netOptions{}), fixedID, testSigner(t), nil)
}

func wantCode(t *testing.T, err error, code int) {
	t.Helper()
	if exitCode(err) != code {
		t.Fatalf("got %v (exit code %d), want exit code %d", err, exitCode(err), code)
	}
}

func provides(name string) []byte {
	return []byte(`{"device_provides":{"artifact_name":"` + name + `","device_type":"qemu","rootfs-image.version":"<1>"}}`)
}
