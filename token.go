// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
)

// The device API without a bus: server and token for other programs. A token is as good as the device key
// until it expires, so only who asks for one has it in a file, which is root's alone.

// tokenFile has three lines: server, token, and the SHA-256 of the key's file, as with another key this is
// another device.
const tokenFile = "mendlet.token"

func tokenVerbs() []verb {
	fetch := false
	return []verb{{"token", "", "print server and token of the device, for programs that use its API", 0,
		func(fs *flag.FlagSet, o *options) {
			keyFlags(fs, o)
			fs.BoolVar(&fetch, "fetch", false, "get a new one from the server; else it is the last one that was got so")
		},
		func(ctx context.Context, a *app, _ []string) error {
			if fetch {
				if err := fetchToken(ctx, a); err != nil {
					return err
				}
			}
			line, err := lastToken(a)
			if err != nil {
				return withHint(tryLater("token: %w", err), "'mendlet token --fetch' gets a new one")
			}
			_, err = fmt.Fprintf(a.out, "server=%s\ntoken=%s\n", line[0], line[1])
			return err
		}}}
}

// fetchToken asks the server, and keeps what it gives. It makes no key.
func fetchToken(ctx context.Context, a *app) error {
	s := newSession(a)
	s.looks = true
	err := s.ready()
	if err == nil {
		err = s.api.authenticate(ctx)
	}
	if err != nil {
		return err
	}
	text := strings.Join([]string{s.api.base, s.api.token, keyHash(a.c)}, "\n")
	return writeFileDurably(a.c.paths.in(a.c.paths.ds, tokenFile), []byte(text), 0o600)
}

// lastToken gives what fetchToken has kept, if that is of this device and a server that is configured, and
// nobody else has been able to read it. Whether it has expired is for the server to say.
func lastToken(a *app) ([]string, error) {
	d, err := openDir(a.c.paths.ds)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	f, err := d.open(tokenFile, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Mode().Perm()&0o077 != 0 {
		err = errors.New("its file was open to others")
	}
	text, rerr := readClose(f, nil)
	line := strings.Split(string(text), "\n")
	switch {
	case err != nil || rerr != nil:
		return nil, cmp.Or(err, rerr)
	case len(line) != 3 || line[2] != keyHash(a.c):
		return nil, errors.New("it was got with another device key")
	case !slices.Contains(a.c.Servers, serverEntry{line[0]}):
		return nil, fmt.Errorf("its server, %q, is not configured", line[0])
	}
	return line, nil
}

// keyHash is "" where there is no key.
//
//go:noinline
func keyHash(c *config) string {
	text, err := readPlain(cmp.Or(c.Security.AuthPrivateKey, deviceKeyPath(c)))
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}
