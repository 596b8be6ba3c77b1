// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
)

// The device API without a bus: server and token for other programs.

func tokenVerbs() []verb {
	fetch := false
	return []verb{{"token", "", "print server and token of the device, for programs that use its API", 0,
		func(fs *flag.FlagSet, o *options) {
			keyFlags(fs, o)
			fs.BoolVar(&fetch, "fetch", false, "get a new one from the server; else it is the last one that is kept")
		},
		func(ctx context.Context, a *app, _ []string) error {
			if fetch {
				if err := fetchToken(ctx, a); err != nil {
					return err
				}
			}
			server, token, err := lastToken(a.c)
			if err != nil {
				return withHint(tryLater("token: %w", err), "'mendlet token --fetch' gets a new one")
			}
			_, err = fmt.Fprintf(a.out, "server=%s\ntoken=%s\n", server, token)
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
	return keep(a)
}

// lastToken gives what was kept last, if that is of this device and a server that is configured, and nobody else
// has been able to read it. Whether it has expired is for the server to say.
func lastToken(c *config) (server, token string, err error) {
	k, err := readKept(c)
	switch {
	case err != nil:
	case k.Token == "":
		err = errors.New("none is kept")
	case k.Key != keyHash(c):
		err = errors.New("it was got with another device key")
	case !slices.Contains(c.Servers, serverEntry{k.Server}):
		err = fmt.Errorf("its server, %q, is not configured", k.Server)
	default:
		return k.Server, k.Token, nil
	}
	return "", "", err
}
