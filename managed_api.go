// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// The device API of a Mender server (mender-server, backend/docs/api/*/devices_v1.yaml).

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	apiAuth      = "/api/devices/v1/authentication/auth_requests"
	apiNextV2    = "/api/devices/v2/deployments/device/deployments/next"
	apiNextV1    = "/api/devices/v1/deployments/device/deployments/next"
	apiDeploy    = "/api/devices/v1/deployments/device/deployments/"
	apiInventory = "/api/devices/v1/inventory/device/attributes"

	apiAlert         = "/api/devices/v1/devicemonitor/alert"
	apiConfiguration = "/api/devices/v1/deviceconfig/configuration"

	maxAPIAnswer = 1 << 20 // bytes of any answer of the API
	apiTimeout   = time.Minute
	apiMinRate   = 512 // bytes per second that a body may take on top of apiTimeout
)

// identitySource gives the identity as JSON; see identityJSON.
type identitySource func(context.Context) (string, error)

// apiClient is one session with the server.
type apiClient struct {
	// v1Only is the base URL of a server that is known to have no v2 route. It may be
	// kept between runs to save a request.
	v1Only string
	// first is the server to ask before the others; it may be kept between runs, too.
	first string
	// refused: the server has said that it does not know the device, or not any more. It
	// may then know nothing of what it was told before.
	refused bool
	// device is who the device is to the server, by the last token; "" if that does not say.
	device string

	// kept is what is to be had at the next run, too; of the last one, at first.
	kept *kept

	c        *config
	hc       *agent
	patience time.Duration // with an answer: apiTimeout, but for tests
	id       identitySource
	key      crypto.Signer
	lg       *logger
	says     string // identity in the last request for a token
	accepted string // identity that the last token was got with
	base     string // URL of the server that gave the token
	token    string
	old      bool // the token is the last run's, and may have expired meanwhile
}

func newAPIClient(c *config, hc *agent, id identitySource, key crypto.Signer, lg *logger) *apiClient {
	return &apiClient{c: c, hc: hc, id: id, key: key, lg: lg, kept: &kept{}, patience: apiTimeout}
}

// dropToken makes the next request log in anew and, over a connection of its own, with a whole handshake.
func (a *apiClient) dropToken() {
	a.token, a.old = "", false
	a.kept.drop()
}

// login makes sure that there is a token: that of the last run, if it is from the server which would be asked
// first and for the same identity. Whether it is good still, the server says, by 401.
func (a *apiClient) login(ctx context.Context) error {
	if k := a.kept; a.token == "" && k.Token != "" {
		id, err := a.id(ctx)
		if err != nil {
			return err
		}
		servers := a.servers()
		if len(servers) > 0 && servers[0].ServerURL == k.Server && sha256Hex([]byte(id)) == k.Identity {
			a.base, a.token, a.device, a.accepted, a.old = k.Server, k.Token, tokenDevice(k.Token), id, true
		} else {
			k.drop()
		}
	}
	if a.token == "" {
		return a.authenticate(ctx)
	}
	return nil
}

// authRequest is the body of an authentication request. The server verifies the bytes it
// gets, so the order of the keys is free.
type authRequest struct {
	IDData      string `json:"id_data"`
	PubKey      string `json:"pubkey"`
	TenantToken string `json:"tenant_token,omitempty"`
	Tier        string `json:"tier,omitempty"`
}

func (a *apiClient) authBody(ctx context.Context) (body []byte, signature string, err error) {
	id, err := a.id(ctx)
	if err != nil {
		return nil, "", err
	}
	a.says = id
	der, err := x509.MarshalPKIXPublicKey(a.key.Public())
	if err != nil {
		return nil, "", fmt.Errorf("device key: %w", err)
	}
	r := authRequest{
		IDData:      id,
		PubKey:      asPEM("PUBLIC KEY", der),
		TenantToken: a.c.TenantToken,
	}
	if a.c.DeviceTier != "standard" { // which is the server's default, and older ones know no other
		r.Tier = a.c.DeviceTier
	}
	if body, err = json.Marshal(r); err != nil {
		return nil, "", err
	}
	sig, err := signBody(a.key, body)
	return body, base64.StdEncoding.EncodeToString(sig), err
}

// servers are those of the configuration, the one to ask first before the others.
func (a *apiClient) servers() []serverEntry {
	list := slices.Clone(a.c.Servers)
	if i := slices.Index(list, serverEntry{a.first}); i > 0 {
		list = slices.Concat(list[i:i+1], list[:i], list[i+1:])
	}
	return list
}

// authenticate asks all servers in order for a token; the first that gives one is the
// server of this session.
func (a *apiClient) authenticate(ctx context.Context) error {
	a.token = ""
	if len(a.c.Servers) == 0 {
		return withHint(refuse("no server: neither ServerURL nor Servers is set"),
			"set ServerURL in %q", a.c.paths.in(a.c.paths.conf, "mender.conf"))
	}
	body, signature, err := a.authBody(ctx)
	if err != nil {
		return err
	}
	var failure error
	servers := a.servers()
	for i, s := range servers {
		err := a.askToken(ctx, s.ServerURL, body, signature)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if i < len(servers)-1 {
			a.lg.warnf("%v; asking the next server", err)
		}
		// That a server refused the device says more than that another was not there.
		if failure == nil || httpStatus(failure) != 401 {
			failure = err
		}
	}
	return failure
}

func (a *apiClient) askToken(ctx context.Context, base string, body []byte, signature string) error {
	h := http.Header{"Authorization": {"API_KEY"}, "X-Men-Signature": {signature}}
	ans, err := a.send(ctx, http.MethodPost, base+apiAuth, body, h)
	if err != nil {
		return err
	}
	switch ans.code {
	case http.StatusOK:
	case http.StatusUnauthorized:
		a.refused = true
		a.kept.drop()
		return withHint(tryLater("not authorized: %w", ans.err),
			"accept the device in the server's user interface, or preauthorize it; if it was rejected there, or the "+
				"tenant token is wrong, waiting does not help")
	default:
		return ans.err
	}
	token := strings.TrimSpace(string(ans.body))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return tryLater("%q: got a token of %d bytes, want one word", base+apiAuth, len(token))
	}
	a.base, a.token, a.device, a.accepted = base, token, tokenDevice(token), a.says
	a.kept.Server, a.kept.Token, a.kept.Identity = base, token, sha256Hex([]byte(a.says))
	a.lg.debugf("authenticated with %q", base)
	return nil
}

// tokenDevice is the subject of a JSON web token (RFC 7519, 4.1.2), which a Mender server gives the id
// that it has for the device; "" if there is none. It decides nothing but whether to say more.
func tokenDevice(token string) string {
	_, rest, _ := strings.Cut(token, ".")
	claims := before(rest, ".")
	var c struct {
		Sub string `json:"sub"`
	}
	text, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(claims, "="))
	if err != nil || json.Unmarshal(text, &c) != nil || !validDeploymentID(c.Sub) {
		return ""
	}
	return c.Sub
}

// tokenLife is how long a token that came at the time now is good, by its claims "iat" and "exp" (RFC 7519, 4.1;
// seconds since 1970), which are the server's to verify: from a minute to 30 days; a day if it does not say.
func tokenLife(token string, now time.Time) time.Duration {
	var claims struct{ Exp, Iat float64 }
	if parts := strings.Split(token, "."); len(parts) == 3 {
		text, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err = errors.Join(err, json.Unmarshal(text, &claims)); err != nil {
			claims.Exp = 0
		}
	}
	if claims.Exp == 0 {
		return 24 * time.Hour
	}
	if claims.Iat == 0 { // else this machine's clock does not matter
		claims.Iat = float64(now.Unix())
	}
	return time.Duration(max(60, min(claims.Exp-claims.Iat, 30*24*3600))) * time.Second
}

// apiAnswer is what came back, whatever its status; err says it as an error, for a caller
// that wanted another.
type apiAnswer struct {
	code   int
	header http.Header
	body   []byte
	err    error
}

// send makes one request of the API. What it takes is bounded by time and size.
func (a *apiClient) send(ctx context.Context, method, rawURL string, body []byte, h http.Header) (*apiAnswer, error) {
	limit := a.patience + time.Duration(len(body)/apiMinRate)*time.Second
	tctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	req, err := http.NewRequestWithContext(tctx, method, rawURL, bytes.NewReader(body))
	if err == nil && (req.URL.Host == "" || req.URL.Scheme != "http" && req.URL.Scheme != "https") {
		err = fmt.Errorf("%q: want http://HOST or https://HOST", urlKey(req.URL))
	}
	if err != nil {
		return nil, withHint(refuse("server URL: %w", err), "set ServerURL in mender.conf")
	}
	what := fmt.Sprintf("%s %q", method, urlKey(req.URL))
	req.Header = h
	// All requests may be repeated. Without a value this is not sent, but net/http repeats one at once that met
	// a connection which the server, or a router in between, had closed meanwhile.
	req.Header["Idempotency-Key"] = nil
	if body == nil {
		req.Body = nil
	} else {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.hc.Do(req)
	if err == nil {
		defer resp.Body.Close()
		var text []byte
		if text, err = readBounded(resp.Body, maxAPIAnswer); err == nil {
			if resp.StatusCode/100 == 2 && len(text) > 0 && isWebPage(resp.Header, text) {
				return nil, withHint(tryLater("%s: got a web page, %q", what, serverWords(text)), "%s", hintPage)
			}
			return &apiAnswer{code: resp.StatusCode, header: resp.Header, body: text, err: newStatusError(what, resp, text)}, nil
		}
		err = tryLater("%w", err)
	}
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case tctx.Err() != nil:
		return nil, tryLater("%s: no answer in %s", what, limit)
	}
	return nil, fmt.Errorf("%s: %w", what, err)
}

// request makes a request with the token, which it gets if there is none. A token that is not
// good any more (401) is replaced once, and so is a server that is not there any more if
// there are others.
func (a *apiClient) request(ctx context.Context, method, path string, body []byte) (*apiAnswer, error) {
	for try := 0; ; try++ {
		if err := a.login(ctx); err != nil {
			return nil, err
		}
		ans, err := a.send(ctx, method, a.base+path, body, http.Header{"Authorization": {"Bearer " + a.token}})
		stale := err == nil && ans.code == http.StatusUnauthorized
		a.refused = a.refused || stale && !a.old
		gone := err != nil && ctx.Err() == nil && len(a.c.Servers) > 1
		if !stale && !gone {
			a.old = a.old && err != nil
			return ans, err
		}
		a.dropToken()
		if try > 0 {
			if stale {
				return nil, tryLater("%w, with a new token, too", ans.err)
			}
			return nil, err
		}
	}
}

// expect is call for requests of which only success matters.
func (a *apiClient) expect(ctx context.Context, method, path string, body []byte) error {
	ans, err := a.request(ctx, method, path, body)
	if err != nil {
		return err
	}
	if ans.code/100 != 2 {
		return ans.err
	}
	return nil
}

// deployment is what a source wants installed.
type deployment struct {
	ID           string
	ArtifactName string
	URI          string // presigned, valid for some time

	Others   []string // that have the same as URI
	Size     int64    // of the artifact; 0: not said
	Manifest string   // SHA-256 of the artifact's, hex; "": not said. Else what is another artifact is no artifact yet

	Request json.RawMessage // goes into the journal: what to ask with for this deployment again
	Source  string          // goes there, too: the source's name for itself; "" is a server
	Again   bool            // it is meant to be tried though it has ended before
}

// nextDeployment asks what to install; nil: nothing. body is the v2 form,
// {"device_provides":{…}}, and must be the same, byte for byte, for as long as a
// deployment is in progress: the server fails the deployment if the provides differ.
// Servers without the v2 route get the inner object by POST, older ones two of its values
// by GET. errAborted: the server ended the deployment that was in progress.
func (a *apiClient) nextDeployment(ctx context.Context, body []byte) (*deployment, error) {
	var v2 struct {
		Provides json.RawMessage `json:"device_provides"`
	}
	var provides struct {
		Name string `json:"artifact_name"`
		Type string `json:"device_type"`
	}
	if err := json.Unmarshal(body, &v2); err != nil {
		return nil, fmt.Errorf("provides for the server: %w", err)
	}
	if err := json.Unmarshal(v2.Provides, &provides); err != nil {
		return nil, fmt.Errorf("provides for the server: %w", err)
	}
	if err := a.login(ctx); err != nil {
		return nil, err
	}
	if a.v1Only != a.base {
		ans, err := a.request(ctx, http.MethodPost, apiNextV2, body)
		if err != nil || ans.code != http.StatusNotFound {
			return parseNext(ans, err)
		}
		a.v1Only = a.base
	}
	ans, err := a.request(ctx, http.MethodPost, apiNextV1, v2.Provides)
	if err == nil && (ans.code == http.StatusNotFound || ans.code == http.StatusMethodNotAllowed) {
		query := "?artifact_name=" + url.QueryEscape(provides.Name) + "&device_type=" + url.QueryEscape(provides.Type)
		ans, err = a.request(ctx, http.MethodGet, apiNextV1+query, nil)
	}
	return parseNext(ans, err)
}

func parseNext(ans *apiAnswer, err error) (*deployment, error) {
	switch {
	case err != nil:
		return nil, err
	case ans.code == http.StatusNoContent:
		return nil, nil
	case ans.code == http.StatusConflict:
		return nil, fmt.Errorf("%w: %w", errAborted, ans.err)
	case ans.code != http.StatusOK:
		return nil, ans.err
	}
	return parseDeployment(ans.body)
}

func parseDeployment(text []byte) (*deployment, error) {
	var r struct {
		ID       string `json:"id"`
		Artifact struct {
			Name   string               `json:"artifact_name"`
			Source struct{ URI string } `json:"source"`
		} `json:"artifact"`
	}
	err := json.Unmarshal(text, &r)
	if err == nil {
		err = uniqueKeys(text, 10)
	}
	if err != nil {
		return nil, fmt.Errorf("deployment from the server: %w", err)
	}
	if !validDeploymentID(r.ID) {
		return nil, fmt.Errorf("deployment from the server: got id %.80q, want letters, digits and dashes", r.ID)
	}
	u, err := url.Parse(r.Artifact.Source.URI)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("deployment %q: its artifact's source is not an http or https URL", r.ID)
	}
	return &deployment{ID: r.ID, ArtifactName: r.Artifact.Name, URI: r.Artifact.Source.URI}, nil
}

// status reports where a deployment is: installing, downloading, rebooting, success,
// failure. errAborted: an operator aborted it.
func (a *apiClient) status(ctx context.Context, id, status string) error {
	body, err := json.Marshal(map[string]string{"status": status})
	if err != nil {
		return err
	}
	err = a.expect(ctx, http.MethodPut, apiDeploy+url.PathEscape(id)+"/status", body)
	if httpStatus(err) == http.StatusConflict {
		return fmt.Errorf("%w: %w", errAborted, err)
	}
	return err
}

// sendLog sends the body that deployLogBody made.
func (a *apiClient) sendLog(ctx context.Context, id string, body []byte) error {
	return a.expect(ctx, http.MethodPut, apiDeploy+url.PathEscape(id)+"/log", body)
}

// sendAlerts sends a list of what has changed on the device; servers without a monitor add-on do not know the route.
func (a *apiClient) sendAlerts(ctx context.Context, body []byte) error {
	err := a.expect(ctx, http.MethodPost, apiAlert, body)
	if httpStatus(err) == http.StatusNotFound {
		return fmt.Errorf("%w: %w", errNoAlerts, err)
	}
	return err
}

// sendInventory sends the body that inventoryBody made. PUT replaces what the server has;
// one that does not know PUT is asked to merge.
func (a *apiClient) sendInventory(ctx context.Context, body []byte) error {
	err := a.expect(ctx, http.MethodPut, apiInventory, body)
	if httpStatus(err) == http.StatusMethodNotAllowed {
		err = a.expect(ctx, http.MethodPatch, apiInventory, body)
	}
	return err
}
