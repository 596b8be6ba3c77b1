// SPDX-License-Identifier: Apache-2.0

//go:build !nonet && !noconnect

package main

// The messages of the troubleshooting protocol: MessagePack maps of a header and a body.

// The protocols of a message.
const (
	protoShell   = 1
	protoFile    = 2
	protoForward = 3
	protoClient  = 4
	protoControl = 0xffff
)

// peerMessage is one message, from or to a session.
type peerMessage struct {
	proto    uint16
	typ, sid string
	props    map[string]any // see packed for the types
	body     []byte         // nil: none
}
