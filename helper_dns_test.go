// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"encoding/binary"
	"net"
	"sync"
	"testing"
)

// dnsKind is a type of question (RFC 1035, 3.2.2; RFC 3596, 2.1).
type dnsKind uint16

const (
	kindA    dnsKind = 1
	kindAAAA dnsKind = 28
)

// dnsQuestion is what a resolver asked.
type dnsQuestion struct {
	name string // "a.example."
	kind dnsKind
	opt  bool // there is a record in the additional section: EDNS(0)
}

// dnsAnswer has addresses, or a code that is not 0 (RFC 1035, 4.1.1).
type dnsAnswer struct {
	silent bool
	code   byte
	ips    []net.IP
}

const (
	dnsFormErr  = 1
	dnsServFail = 2
	dnsNXDomain = 3
	dnsNotImp   = 4
	dnsRefused  = 5
)

// dnsServer is a name server on UDP.
type dnsServer struct {
	addr string

	mu    sync.Mutex
	asked []dnsQuestion
}

func startDNS(t *testing.T, addr string, answer func(q dnsQuestion) dnsAnswer) *dnsServer {
	t.Helper()
	conn, err := net.ListenPacket("udp", addr)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	s := &dnsServer{addr: conn.LocalAddr().String()}
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			q, end := parseQuestion(buf[:n])
			s.mu.Lock()
			s.asked = append(s.asked, q)
			s.mu.Unlock()
			if a := answer(q); !a.silent {
				conn.WriteTo(a.message(q, buf[:end]), from)
			}
		}
	}()
	return s
}

// parseQuestion wants one question without compression, as resolvers send it.
func parseQuestion(msg []byte) (q dnsQuestion, end int) {
	i := 12
	for msg[i] != 0 {
		q.name += string(msg[i+1:i+1+int(msg[i])]) + "."
		i += 1 + int(msg[i])
	}
	q.kind = dnsKind(binary.BigEndian.Uint16(msg[i+1:]))
	q.opt = binary.BigEndian.Uint16(msg[10:]) > 0
	return q, i + 5
}

// message is the answer to the question of which asked is the message, up to that question's end.
func (a dnsAnswer) message(q dnsQuestion, asked []byte) []byte {
	var records []byte
	n := uint16(0)
	for _, ip := range a.ips {
		if (ip.To4() != nil) != (q.kind == kindA) {
			continue
		}
		data := []byte(ip.To16())
		if four := ip.To4(); four != nil {
			data = four
		}
		n++
		records = append(records, 0xc0, 12, 0, byte(q.kind), 0, 1, 0, 0, 0, 60, 0, byte(len(data)))
		records = append(records, data...)
	}
	head := append([]byte{}, asked[:2]...)
	head = append(head, 0x81, 0x80|a.code, 0, 1)
	head = binary.BigEndian.AppendUint16(head, n)
	head = append(head, 0, 0, 0, 0)
	return append(append(head, asked[12:]...), records...)
}

// questions are those that came so far.
func (s *dnsServer) questions() []dnsQuestion {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]dnsQuestion{}, s.asked...)
}
