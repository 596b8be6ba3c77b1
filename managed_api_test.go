// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAuthenticate(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	for _, key := range []crypto.Signer{rsaKey, ecKey, testSigner(t)} {
		t.Run(fmt.Sprintf("%T", key), func(t *testing.T) {
			s := newTestServer(t, false)
			a := apiFor(t, s)
			a.key = key
			err := a.authenticate(t.Context())
			wantCode(t, err, exitTempFail)
			if !strings.Contains(hintOf(err), "accept the device") || httpStatus(err) != 401 {
				t.Fatalf("got %v, hint %q", err, hintOf(err))
			}
			s.setDevice(testID, "accepted")
			must(t, a.authenticate(t.Context()))
			s.setDevice(testID, "rejected")
			wantCode(t, a.authenticate(t.Context()), exitTempFail)
			if a.token != "" {
				t.Fatal("the old token was kept")
			}
		})
	}
}

func TestAuthenticatePreauthorized(t *testing.T) {
	s := newTestServer(t, false)
	a := apiFor(t, s)
	der, err := x509.MarshalPKIXPublicKey(a.key.Public())
	must(t, err)
	s.preauthorize(testID, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	must(t, a.authenticate(t.Context()))
	if len(s.devices) != 1 {
		t.Fatalf("got %d devices, want the one that was there", len(s.devices))
	}
}

func TestAuthenticateTenantAndTier(t *testing.T) {
	s := newTestServer(t, false)
	s.autoAccept, s.tenant = true, "t<e>nant"
	a := apiFor(t, s)
	wantCode(t, a.authenticate(t.Context()), exitTempFail)
	a.c.TenantToken, a.c.DeviceTier = "t<e>nant", "system"
	must(t, a.authenticate(t.Context()))
	if got := s.deviceByID(testID).tier; got != "system" {
		t.Fatalf("got tier %q", got)
	}
}

func TestAuthenticateServerList(t *testing.T) {
	down := "http://" + deadAddr(t)
	pending, good := newTestServer(t, false), newTestServer(t, false)
	good.autoAccept = true
	a := apiFor(t, good)
	a.c.Servers = []serverEntry{{down}, {pending.URL}, {good.URL}}
	must(t, a.authenticate(t.Context()))
	if a.base != good.URL {
		t.Fatalf("got server %q", a.base)
	}
	// Refused by one and not reached by the other: what a person can do is accept it.
	a.c.Servers = []serverEntry{{pending.URL}, {down}}
	err := a.authenticate(t.Context())
	if httpStatus(err) != 401 || hintOf(err) == "" {
		t.Fatalf("got %v", err)
	}
	a.c.Servers = nil
	wantCode(t, a.authenticate(t.Context()), exitRefused)
}

// A server that goes away in the middle is replaced by the next one of the list.
func TestServerListFailover(t *testing.T) {
	s1, s2 := newTestServer(t, false), newTestServer(t, false)
	s1.autoAccept, s2.autoAccept = true, true
	a := apiFor(t, s1)
	a.c.Servers = []serverEntry{{s1.URL}, {s2.URL}}
	must(t, a.authenticate(t.Context()))
	s1.CloseClientConnections()
	s1.Listener.Close()
	must(t, a.sendInventory(t.Context(), []byte(`[]`)))
	if a.base != s2.URL {
		t.Fatalf("got server %q, want %q", a.base, s2.URL)
	}
}

func TestNextDeployment(t *testing.T) {
	for _, v := range []struct {
		name       string
		v2, noPost bool
		requests   int
	}{{"v2", true, false, 1}, {"v1 POST", false, false, 2}, {"v1 GET", false, true, 3}} {
		t.Run(v.name, func(t *testing.T) {
			s := newTestServer(t, false)
			s.autoAccept, s.v2, s.noPost = true, v.v2, v.noPost
			a := apiFor(t, s)
			d, err := a.nextDeployment(t.Context(), provides("r 1&"))
			if d != nil || err != nil {
				t.Fatalf("got %v, %v, want nothing", d, err)
			}
			if len(s.log) != 1+v.requests {
				t.Fatalf("got requests %q", s.log)
			}
			run := s.deploy("d-1", "r2", []string{"qemu"}, []byte("artifact"))
			d, err = a.nextDeployment(t.Context(), provides("r 1&"))
			must(t, err)
			want := &deployment{ID: "d-1", ArtifactName: "r2", URI: s.link("r2")}
			if !reflect.DeepEqual(d, want) {
				t.Fatalf("got %+v, want %+v", d, want)
			}
			got := run.devices[s.deviceByID(testID)].provides
			if got["artifact_name"] != "r 1&" || got["device_type"] != "qemu" ||
				(v.noPost == (got["rootfs-image.version"] == "<1>")) {
				t.Fatalf("the server got %v", got)
			}
			_, err = a.nextDeployment(t.Context(), provides("r 1&"))
			must(t, err)
			_, err = a.nextDeployment(t.Context(), provides("other"))
			if !errors.Is(err, errAborted) {
				t.Fatalf("got %v, want errAborted: the provides changed", err)
			}
		})
	}
}

// A poll that finds nothing costs one connection and, where no token is kept, two requests.
func TestIdlePollCost(t *testing.T) {
	for _, v2 := range []bool{true, false} {
		s := newTestServer(t, true)
		s.autoAccept, s.v2 = true, v2
		a := apiFor(t, s)
		a.c.SkipVerify = true
		a.hc = testHTTPClient(t, a.c, netOptions{})
		if !v2 {
			a.v1Only = s.URL
		}
		_, err := a.nextDeployment(t.Context(), provides("r1"))
		must(t, err)
		if len(s.log) != 2 || s.conns != 1 {
			t.Fatalf("v2 %v: got requests %q over %d connections", v2, s.log, s.conns)
		}
	}
}

// Field case 4: what the server says becomes part of file names and URLs.
func TestParseDeploymentRefuses(t *testing.T) {
	const form = `{"id":%q,"artifact":{"source":{"uri":%q}}}`
	good := "https://h/a"
	if _, err := parseDeployment(fmt.Appendf(nil, form, "f0a1-B_2", good)); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]string{{"", good}, {"../x", good}, {"a/b", good}, {"-$(x) ", good},
		{strings.Repeat("a", 65), good},
		{"a", ""}, {"a", "file:///etc/passwd"}, {"a", "/x"}, {"a", "https://"}, {"a.b\x00", good}} {
		if d, err := parseDeployment(fmt.Appendf(nil, form, c[0], c[1])); err == nil {
			t.Errorf("%q: got %+v, want an error", c, d)
		}
	}
	for _, twice := range []string{
		`{"id":"a","id":"b","artifact":{"source":{"uri":"https://h/a"}}}`,
		`{"id":"a","artifact":{"source":{"uri":"https://h/a"}},"artifact":{"artifact_name":"n"}}`,
		`{"id":"a","artifact":{"source":{"uri":"https://h/a"},"Source":{"uri":"https://h/b"}}}`,
	} {
		if d, err := parseDeployment([]byte(twice)); err == nil || !strings.Contains(err.Error(), "for the second time") {
			t.Errorf("%s: got %+v, %v", twice, d, err)
		}
	}
	if _, err := parseDeployment([]byte(`[]`)); err == nil {
		t.Error("a list was accepted")
	}
}

func TestStatusLogInventory(t *testing.T) {
	s := newTestServer(t, false)
	s.autoAccept, s.noPut = true, true
	a := apiFor(t, s)
	run := s.deploy("d-1", "r2", []string{"qemu"}, nil)
	_, err := a.nextDeployment(t.Context(), provides("r1"))
	must(t, err)
	must(t, a.status(t.Context(), "d-1", "downloading"))
	must(t, a.status(t.Context(), "d-1", "installing"))
	must(t, a.sendLog(t.Context(), "d-1", []byte(`{"messages":[`+
		`{"timestamp":"2024-01-02T03:04:05Z","level":"info","message":"x"}]}`)))
	must(t, a.sendInventory(t.Context(), []byte(`[{"name":"a","value":["1","2"]}]`)))
	// Field case 18: aborted by an operator midway.
	s.abort(run)
	if err := a.status(t.Context(), "d-1", "rebooting"); !errors.Is(err, errAborted) {
		t.Fatalf("got %v, want errAborted", err)
	}
	if err := a.status(t.Context(), "d-2", "rebooting"); httpStatus(err) != 404 || errors.Is(err, errAborted) {
		t.Fatalf("got %v, want status 404", err)
	}
	history, final, logs := s.history(run)
	if want := []string{"downloading", "installing", "rebooting"}; !slices.Equal(history, want) ||
		final != "aborted" || len(logs) != 1 {
		t.Fatalf("got %q, %q, %v", history, final, logs)
	}
	if got := s.deviceByID(testID).inventory["a"]; !reflect.DeepEqual(got, []any{"1", "2"}) ||
		s.count("PATCH inventory") != 1 {
		t.Fatalf("got inventory %v", got)
	}
	err = a.sendLog(t.Context(), "d-1", make([]byte, 1<<20+1))
	if httpStatus(err) != 413 || exitCode(err) != exitFailed {
		t.Fatalf("got %v, want 413 and no retry", err)
	}
}

// Field case 18: the token expires midway.
func TestTokenExpires(t *testing.T) {
	s := newTestServer(t, false)
	s.autoAccept = true
	a := apiFor(t, s)
	must(t, a.sendInventory(t.Context(), []byte(`[]`)))
	s.expireTokens()
	must(t, a.sendInventory(t.Context(), []byte(`[]`)))
	if n := s.count("POST auth"); n != 2 {
		t.Fatalf("got %d authentications, want 2", n)
	}
	// Tokens that are never good: one repetition, no loop.
	s.setFault(func(route string, w http.ResponseWriter, r *http.Request) bool {
		if route == "PUT inventory" {
			w.WriteHeader(401)
		}
		return route == "PUT inventory"
	})
	wantCode(t, a.sendInventory(t.Context(), []byte(`[]`)), exitTempFail)
	if n := s.count("PUT inventory"); n != 5 { // 1, then 2 with the expired token, then 2
		t.Fatalf("got %d requests, want 5", n)
	}
	if a.token != "" {
		t.Fatal("a token that is not good was kept")
	}
}

// Field case 18: Retry-After in both forms, absurd values among them.
func TestRetryAfter(t *testing.T) {
	date := "Mon, 02 Jan 2006 15:04:05 GMT"
	for _, c := range []struct {
		value, date string
		want        time.Duration
	}{
		{"", "", 0}, {"120", "", 2 * time.Minute}, {" 7 ", "", 7 * time.Second}, {"-1", "", 0},
		{"soon", "", 0}, {"1.5", "", 0},
		{"99999999", "", maxRetryAfter}, {"99999999999999999999999", "", maxRetryAfter},
		{"Mon, 02 Jan 2006 15:05:35 GMT", date, 90 * time.Second},
		{"Mon, 02 Jan 2006 15:00:00 GMT", date, 0},
		{"Fri, 01 Jan 2106 00:00:00 GMT", date, maxRetryAfter},
	} {
		if got := retryAfter(http.Header{"Retry-After": {c.value}, "Date": {c.date}}); got != c.want {
			t.Errorf("%q: got %s, want %s", c.value, got, c.want)
		}
	}
	s := newTestServer(t, false)
	s.autoAccept = true
	for _, code := range []int{429, 503} {
		s.setFault(func(route string, w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(route, "next") {
				return false
			}
			w.Header().Set("Retry-After", "77")
			apiError(w, code, "slow down")
			return true
		})
		_, err := apiFor(t, s).nextDeployment(t.Context(), provides("r1"))
		wantCode(t, err, exitTempFail)
		if retryAfterOf(err) != 77*time.Second || httpStatus(err) != code || !strings.Contains(err.Error(), "slow down") {
			t.Fatalf("got %v", err)
		}
	}
}

// Answers without end or sense.
func TestBadAnswers(t *testing.T) {
	for name, answer := range map[string]func(http.ResponseWriter){
		"endless": func(w http.ResponseWriter) {
			for {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		},
		"two words": func(w http.ResponseWriter) { io.WriteString(w, "a b") },
		"header":    func(w http.ResponseWriter) { io.WriteString(w, "a\r\nX: y") },
		"empty":     func(w http.ResponseWriter) {},
		"hang up":   func(w http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		s := newTestServer(t, false)
		s.setFault(func(route string, w http.ResponseWriter, r *http.Request) bool { answer(w); return true })
		a := apiFor(t, s)
		if err := a.authenticate(t.Context()); exitCode(err) != exitTempFail || a.token != "" {
			t.Errorf("%s: got %v, token %q", name, err, a.token)
		}
	}
}

// A page for people is no answer, whatever its status: a portal has taken nothing over.
func TestPageForAnswer(t *testing.T) {
	s := newTestServer(t, false)
	s.autoAccept = true
	a := apiFor(t, s)
	must(t, a.authenticate(t.Context()))
	for _, kind := range []string{"text/html; charset=utf-8", ""} {
		s.setFault(func(_ string, w http.ResponseWriter, r *http.Request) bool {
			w.Header()["Content-Type"] = []string{kind}
			io.WriteString(w, "\n<!DOCTYPE html><title>Log in</title>")
			return true
		})
		_, next := a.nextDeployment(t.Context(), provides("r1"))
		for _, err := range []error{next, a.status(t.Context(), "d-1", "success"),
			a.sendInventory(t.Context(), []byte(`[]`)), apiFor(t, s).authenticate(t.Context())} {
			if !isTemporary(err) || !strings.Contains(err.Error(), "Log in") || !strings.Contains(hintOf(err), "portal") {
				t.Errorf("%q: got %v, hint %q", kind, err, hintOf(err))
			}
		}
	}
}

// A status that there is not is for ever.
func TestStatusOutOfRange(t *testing.T) {
	s := newTestServer(t, false)
	s.setFault(func(_ string, w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(999); return true })
	if err := apiFor(t, s).authenticate(t.Context()); exitCode(err) != exitFailed || httpStatus(err) != 999 {
		t.Errorf("got %v", err)
	}
}

// A connection that was kept and is closed by the other end when it is used again costs no request.
func TestStaleConnection(t *testing.T) {
	s := newTestServer(t, false)
	s.autoAccept = true
	uses := map[string]int{}
	s.setFault(func(_ string, w http.ResponseWriter, r *http.Request) bool {
		if uses[r.RemoteAddr]++; uses[r.RemoteAddr] < 2 {
			if r.Header["Idempotency-Key"] != nil {
				t.Errorf("the server got Idempotency-Key %q", r.Header["Idempotency-Key"])
			}
			return false
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		must(t, err)
		conn.Close()
		return true
	})
	a := apiFor(t, s)
	must(t, a.authenticate(t.Context()))
	for range 3 {
		must(t, a.sendInventory(t.Context(), []byte(`[]`)))
	}
	if len(uses) != 4 {
		t.Errorf("got %d connections, want 4", len(uses))
	}
}

// A request that hangs ends at once when the run is stopped.
func TestCancelAPI(t *testing.T) {
	s := newTestServer(t, false)
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	s.setFault(func(_ string, w http.ResponseWriter, r *http.Request) bool {
		io.Copy(io.Discard, r.Body) // only then does the server see that the client is gone
		cancel(stop)
		<-r.Context().Done()
		return true
	})
	if err := apiFor(t, s).authenticate(ctx); err != stop {
		t.Fatalf("got %v, want the cause", err)
	}
}

func FuzzParseDeployment(f *testing.F) {
	f.Add([]byte(`{"id":"a","artifact":{"source":{"uri":"https://h/x"}}}`))
	f.Add([]byte(`{"id":"../a","artifact":{"source":{"uri":"file:///x"}}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := parseDeployment(text)
		if err == nil && (!validDeploymentID(d.ID) || filepath.Base(d.ID) != d.ID) {
			t.Fatalf("got id %q", d.ID)
		}
	})
}
