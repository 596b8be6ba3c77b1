// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

// What a run leaves to the next one of its business with servers: the device's token, which is as good as the
// device key until it expires, and TLS sessions, by which a server is known without its certificate being shown
// again. With both, a poll is one request. They are root's alone, and of use under the very settings that they
// came from.

import (
	"cmp"
	"encoding/json"
	"errors"
	"os"
	"time"
)

// keptName is the file: a kept in JSON. What of it is damaged is not used or, with the handshake or the login that
// fails with it, got anew.
const keptName = "mendlet.token"

// keptFor is how long it is of use: in a session that is gone on with again and again nobody shows a certificate. A
// ticket of TLS 1.3 may be as old (RFC 8446, 4.6.1), and so may a token of a Mender server.
const keptFor = 7 * 24 * time.Hour

type kept struct {
	Since    time.Time         `json:"since"`              // by the clock, when there was nothing
	Server   string            `json:"server,omitempty"`   // that gave the token
	Token    string            `json:"token,omitempty"`    // "": none
	Identity string            `json:"identity,omitempty"` // SHA-256 of that with which it was got
	Key      string            `json:"key,omitempty"`      // SHA-256 of the device key's file
	Trust    string            `json:"trust,omitempty"`    // see trustHash
	TLS      map[string][]byte `json:"tls,omitempty"`      // on disk; in a run they are sessions

	sessions tlsSessions
	onDisk   string // as it was read or written last
}

// readKept is what is in the datastore, if root or we have put it there and nobody else could read it.
func readKept(c *config) (*kept, error) {
	d, err := openDir(c.paths.ds)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	f, err := d.open(keptName, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	err = checkOwner(int(f.Fd()), f.Name())
	if st, serr := f.Stat(); serr != nil || st.Mode()&0o077 != 0 {
		err = errors.New("its file was open to others")
	}
	text, rerr := readClose(f, nil)
	k := &kept{onDisk: string(text)}
	return k, cmp.Or(err, rerr, json.Unmarshal(text, k))
}

// lastKept is what the last run has left; under other settings, or after a week, nothing. version is this program's.
func lastKept(c *config, version string, lg *logger) *kept {
	now := &kept{Since: time.Now(), Key: keyHash(c), Trust: trustHash(c, version)}
	k, err := readKept(c)
	if err != nil {
		lg.debugf("nothing is kept: %v", err)
	} else if age := now.Since.Sub(k.Since); age >= 0 && age < keptFor && k.Key == now.Key && k.Trust == now.Trust {
		k.sessions.restore(k.TLS)
		return k
	}
	return now
}

// save leaves it to the next run, in the place of what was there.
func (k *kept) save(c *config) error {
	k.TLS = k.sessions.export()
	text, _ := json.Marshal(k) // strings and bytes cannot fail
	if string(text) == k.onDisk {
		return nil
	}
	k.onDisk = string(text)
	return writeFileDurably(c.paths.in(c.paths.ds, keptName), text, 0o600)
}

// drop forgets all of it.
//
//go:noinline
func (k *kept) drop() {
	k.Since, k.Token = time.Now(), ""
	k.sessions.clear()
}

// trustHash is over all that decides whom a TLS session is good for: who is trusted, and as whom the device has
// shown itself; and over this program, whose form of a session may be another. The system's certificates are not in
// it: as with names and validity, crypto/tls asks for each session that it goes on with whether the root of its chain
// is still one of them.
func trustHash(c *config, version string) string {
	conf, _ := json.Marshal(c) // strings and numbers cannot fail
	what := version + string(conf)
	for _, file := range []string{c.ServerCertificate, c.extraRoots, c.HttpsClient.Certificate, c.HttpsClient.Key} {
		text, _ := os.ReadFile(file)
		what += sha256Hex(text)
	}
	return sha256Hex([]byte(what))
}

// keyHash is "" where there is no key.
//
//go:noinline
func keyHash(c *config) string {
	text, err := readPlain(cmp.Or(c.Security.AuthPrivateKey, deviceKeyPath(c)))
	if err != nil {
		return ""
	}
	return sha256Hex(text)
}
