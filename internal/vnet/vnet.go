// Package vnet encodes the virtio-net header that precedes every frame on an offloading link.
package vnet

import "encoding/binary"

// Size is the length in bytes of a header without the mergeable-buffer count
// (struct virtio_net_hdr in include/uapi/linux/virtio_net.h).
const Size = 10

// Flag bits.
const (
	// NeedsCsum says that the checksum at CsumStart+CsumOffset holds only the
	// pseudo-header sum; whoever consumes the frame completes it or trusts it.
	NeedsCsum = 1
	// DataValid says that the sender has verified the checksum.
	DataValid = 2
)

// Segmentation types. ECN may be or'ed into the TCP ones.
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOUDP   = 5 // UDP_L4: one datagram per GSOSize bytes of payload
	GSOECN   = 0x80
)

// Header describes what the frame behind it leaves to the receiver. All
// offsets count from the start of the Ethernet header.
type Header struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // length of all headers; a hint when read, exact when written
	GSOSize    uint16 // payload bytes per segment
	CsumStart  uint16
	CsumOffset uint16 // of the checksum field, from CsumStart
}

// Encode writes h into b, which holds at least Size bytes. The header is in
// the machine's byte order (a TAP without TUNSETVNETLE and packet sockets are
// "legacy" devices); the project builds for little-endian machines and a
// big-endian one takes this path correctly too.
func (h Header) Encode(b []byte) {
	_ = b[Size-1]
	b[0], b[1] = h.Flags, h.GSOType
	binary.NativeEndian.PutUint16(b[2:], h.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], h.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], h.CsumOffset)
}

// Decode reads a header from b, which holds at least Size bytes.
func Decode(b []byte) Header {
	_ = b[Size-1]
	return Header{
		Flags: b[0], GSOType: b[1],
		HdrLen:     binary.NativeEndian.Uint16(b[2:]),
		GSOSize:    binary.NativeEndian.Uint16(b[4:]),
		CsumStart:  binary.NativeEndian.Uint16(b[6:]),
		CsumOffset: binary.NativeEndian.Uint16(b[8:]),
	}
}
