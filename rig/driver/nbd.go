// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
)

// Numbers of the NBD protocol, fixed newstyle negotiation and simple replies
// (github.com/NetworkBlockDevice/nbd, doc/proto.md).
const (
	nbdMagic       = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOption      = 0x49484156454F5054 // "IHAVEOPT"
	nbdOptionReply = 0x3e889045565a9
	nbdRequest     = 0x25609513
	nbdReply       = 0x67446698
	nbdFlags       = 1 | 1<<2 | 1<<3 // has flags, flush, FUA
	nbdEinval      = 22

	optExportName, optAbort, optInfo, optGo           = 1, 2, 6, 7
	repAck, repInfo, repUnsupported                   = 1, 3, 1<<31 | 1
	cmdRead, cmdWrite, cmdDisconnect, cmdFlush        = 0, 1, 2, 3
	clientNoZeroes, commandFUA, maxOption      uint32 = 2, 1, 4096
)

// serve answers NBD clients on the listener until it is closed.
func (d *disk) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if d.negotiate(c) == nil {
				for d.answer(c) == nil {
				}
			}
		}()
	}
}

func put(w io.Writer, vs ...any) error {
	for _, v := range vs {
		if err := binary.Write(w, binary.BigEndian, v); err != nil {
			return err
		}
	}
	return nil
}

func (d *disk) negotiate(c io.ReadWriter) error {
	if err := put(c, uint64(nbdMagic), uint64(nbdOption), uint16(3)); err != nil {
		return err
	}
	var flags uint32
	if err := binary.Read(c, binary.BigEndian, &flags); err != nil {
		return err
	}
	for {
		var h struct {
			Magic    uint64
			Opt, Len uint32
		}
		if err := binary.Read(c, binary.BigEndian, &h); err != nil {
			return err
		}
		if h.Magic != nbdOption || h.Len > maxOption {
			return errors.New("nbd: bad option")
		}
		if _, err := io.CopyN(io.Discard, c, int64(h.Len)); err != nil {
			return err
		}
		reply := func(kind uint32, body ...byte) error {
			return put(c, uint64(nbdOptionReply), h.Opt, kind, uint32(len(body)), body)
		}
		switch h.Opt {
		case optExportName:
			pad := make([]byte, 124)
			if flags&clientNoZeroes != 0 {
				pad = nil
			}
			return put(c, d.size, uint16(nbdFlags), pad)
		case optAbort:
			return errors.Join(reply(repAck), io.EOF)
		case optInfo, optGo:
			b := binary.BigEndian.AppendUint64(make([]byte, 2), uint64(d.size))
			b = binary.BigEndian.AppendUint16(b, nbdFlags)
			if err := errors.Join(reply(repInfo, b...), reply(repAck)); err != nil || h.Opt == optGo {
				return err
			}
		default:
			if err := reply(repUnsupported); err != nil {
				return err
			}
		}
	}
}

// answer does one request.
func (d *disk) answer(c io.ReadWriter) error {
	var h struct {
		Magic       uint32
		Flags, Type uint16
		Cookie, Off uint64
		Len         uint32
	}
	if err := binary.Read(c, binary.BigEndian, &h); err != nil {
		return err
	}
	if h.Magic != nbdRequest {
		return errors.New("nbd: bad request")
	}
	var status uint32
	var data []byte
	switch h.Type {
	case cmdRead:
		data = make([]byte, h.Len)
		if err := d.read(data, int64(h.Off)); err != nil {
			return err
		}
	case cmdWrite:
		p := make([]byte, h.Len)
		if _, err := io.ReadFull(c, p); err != nil {
			return err
		}
		if !d.write(op{off: int64(h.Off), data: p, fua: uint32(h.Flags)&commandFUA != 0}) {
			powerless()
		}
	case cmdFlush:
		if !d.flush() {
			powerless()
		}
	case cmdDisconnect:
		return io.EOF
	default:
		status = nbdEinval
	}
	b := binary.BigEndian.AppendUint32(nil, nbdReply)
	b = binary.BigEndian.AppendUint32(b, status)
	b = binary.BigEndian.AppendUint64(b, h.Cookie)
	_, err := c.Write(append(b, data...))
	return err
}
