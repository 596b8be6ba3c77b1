// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

import "context"

// peerSession is a session of the server: one sid, of one user, with one protocol beside control. Its messages come
// in order, in one goroutine of its own.
type peerSession struct {
	id, user string
	ctx      context.Context            // ends with the session, for the reason that is its cause
	send     func(m *peerMessage) error // sid is filled in; blocks while the link is busy; an error: session or link are over
	end      func(why error)            // ends the session, from any goroutine; does not wait
	lg       *logger
}

// peerHandler is what a protocol does in one session.
type peerHandler interface {
	// receive takes one message of the session. What takes long it does in goroutines of its own.
	receive(m *peerMessage)
	// close ends all that the handler has, and returns when nothing is left of it. It is called once, when
	// the session is over, for why; the last messages can still be sent unless the link is lost.
	close(why error)
	// summary is what the log says of it: kind, path or host:port, bytes.
	summary() string
}

// peerError is an error that the peer is told with a code.
type peerError struct {
	code int // as of HTTP; 0: none
	err  error
}

func (e *peerError) Error() string { return e.err.Error() }
func (e *peerError) Unwrap() error { return e.err }
