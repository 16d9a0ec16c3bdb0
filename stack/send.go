package stack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/vnet"
)

// maxDatagram and maxDatagram6 are the largest UDP payloads in a packet of IPv4,
// whose length counts the header, and of IPv6, whose does not.
const (
	maxDatagram  = 65535 - header.IPv4MinimumSize - udpLen
	maxDatagram6 = 65535 - udpLen
)

// defaultTTL is the hop limit of what we send ourselves.
const defaultTTL = 64

var errTooLong = errors.New("stack: send: datagram longer than an IP packet can be")

// writeUDP is WriteUDP without waiting for others.
func (s *Stack) writeUDP(src, dst netip.AddrPort, gso int, payload []byte) error {
	mtu := int(s.link.MTU())
	ipLen, most := header.IPv4MinimumSize, maxDatagram
	if dst.Addr().Is6() {
		ipLen, most = header.IPv6MinimumSize, maxDatagram6
	}
	if gso > 0 && len(payload) > gso {
		if s.cfg.USO && s.vnet && gso+ipLen+udpLen <= mtu && len(payload)+ipLen+udpLen <= 65535 {
			return s.writeUDPFrame(src, dst, gso, payload)
		}
		for len(payload) > 0 {
			n := min(gso, len(payload))
			if err := s.writeUDP(src, dst, 0, payload[:n]); err != nil {
				return err
			}
			payload = payload[n:]
		}
		return nil
	}
	if len(payload) > most {
		return errTooLong
	}
	if len(payload)+ipLen+udpLen <= mtu {
		return s.writeUDPFrame(src, dst, 0, payload)
	}
	var u [udpLen]byte
	putUDP(u[:], src.Port(), dst.Port(), len(payload))
	sum := checksum.Combine(sumPieces(u[:], payload), pseudoSum(src.Addr(), dst.Addr(), uint8(header.UDPProtocolNumber), udpLen+len(payload)))
	setUDPChecksum(u[:], ^sum)
	return s.writeFragments(src.Addr(), dst.Addr(), uint8(header.UDPProtocolNumber), u[:], payload)
}

// maxHeaders is the longest run of headers in front of a payload.
const maxHeaders = ethLen + header.IPv6MinimumSize + header.TCPHeaderMaximumSize

// headers are scratch memory for the headers of a frame: behind the interface
// of the link they would be allocated for each.
var headers = sync.Pool{New: func() any { return new([maxHeaders]byte) }}

// writeUDPFrame sends one frame with one datagram, or many of gso bytes.
func (s *Stack) writeUDPFrame(src, dst netip.AddrPort, gso int, payload []byte) error {
	f := headers.Get().(*[maxHeaders]byte)
	defer headers.Put(f)
	n := s.ipHeader(f[:], src.Addr(), dst.Addr(), uint8(header.UDPProtocolNumber), defaultTTL, udpLen+len(payload))
	u := f[n : n+udpLen]
	putUDP(u, src.Port(), dst.Port(), len(payload))
	pseudo := pseudoSum(src.Addr(), dst.Addr(), uint8(header.UDPProtocolNumber), udpLen+len(payload))
	h := vnet.Header{}
	if s.vnet {
		binary.BigEndian.PutUint16(u[6:], pseudo)
		h = vnet.Header{Flags: vnet.NeedsCsum, CsumStart: uint16(n), CsumOffset: 6, HdrLen: uint16(n + udpLen)}
		if gso > 0 {
			h.GSOType, h.GSOSize = vnet.GSOUDP, uint16(gso)
		}
	} else {
		setUDPChecksum(u, ^checksum.Combine(sumPieces(u, payload), pseudo))
	}
	return s.link.WriteFrame(h, f[:n+udpLen], payload, nil)
}

func putUDP(u []byte, src, dst uint16, n int) {
	binary.BigEndian.PutUint16(u[0:], src)
	binary.BigEndian.PutUint16(u[2:], dst)
	binary.BigEndian.PutUint16(u[4:], uint16(udpLen+n))
	u[6], u[7] = 0, 0
}

// setUDPChecksum stores sum, which must not look like "no checksum" (RFC 768).
func setUDPChecksum(u []byte, sum uint16) {
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(u[6:], sum)
}

// SendEchoReply sends an echo reply with payload head+tail to the guest at dst.
func (s *Stack) SendEchoReply(src, dst netip.Addr, ttl uint8, id, seq uint16, head, tail []byte) error {
	f := headers.Get().(*[maxHeaders]byte)
	defer headers.Put(f)
	m := f[maxHeaders-8:]
	clear(m)
	pseudo := uint16(0)
	proto := uint8(header.ICMPv4ProtocolNumber)
	if dst.Is6() {
		m[0] = uint8(header.ICMPv6EchoReply)
		proto = uint8(header.ICMPv6ProtocolNumber)
		pseudo = pseudoSum(src, dst, proto, 8+len(head)+len(tail))
	}
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], seq)
	var c checksum.Checksumer
	c.Add(m)
	c.Add(head)
	c.Add(tail)
	binary.BigEndian.PutUint16(m[2:], ^checksum.Combine(c.Checksum(), pseudo))
	size := len(m) + len(head) + len(tail)
	if dst.Is4() && size+header.IPv4MinimumSize <= int(s.link.MTU()) || size+header.IPv6MinimumSize <= int(s.link.MTU()) {
		n := s.ipHeader(f[:], src, dst, proto, ttl, size)
		copy(f[n:], m) // one piece with the header in front of it
		return s.link.WriteFrame(vnet.Header{}, f[:n+8], head, tail)
	}
	payload := append(append(make([]byte, 0, len(head)+len(tail)), head...), tail...)
	return s.writeFragments(src, dst, proto, m, payload)
}

// WriteTCP sends a TCP segment with a header that has all but its checksum. A payload
// longer than mss bytes, or than the link's MTU allows, is for the link to cut up.
func (s *Stack) WriteTCP(src, dst netip.Addr, h header.TCP, mss int, payload []byte) error {
	f := headers.Get().(*[maxHeaders]byte)
	defer headers.Put(f)
	const proto = uint8(header.TCPProtocolNumber)
	size := len(h) + len(payload)
	v := vnet.Header{GSOType: vnet.GSOTCPv4}
	if dst.Is6() {
		v.GSOType = vnet.GSOTCPv6
	}
	// Never fragmented, so the identification says nothing (RFC 6864 §4.1).
	n := s.ipHeaderID(f[:], src, dst, proto, defaultTTL, size, 0, header.IPv4FlagDontFragment<<13)
	mss = min(mss, int(s.link.MTU())-(n-ethLen)-len(h))
	t := header.TCP(f[n : n+copy(f[n:], h)])
	n += len(t)
	pseudo := pseudoSum(src, dst, proto, size)
	if !s.vnet {
		if len(payload) > mss {
			return errTooLong
		}
		t.SetChecksum(0)
		t.SetChecksum(^checksum.Combine(sumPieces(t, payload), pseudo))
		return s.link.WriteSegment(vnet.Header{}, f[:n], payload)
	}
	t.SetChecksum(pseudo)
	v.Flags, v.CsumStart, v.CsumOffset, v.HdrLen = vnet.NeedsCsum, uint16(n-len(t)), header.TCPChecksumOffset, uint16(n)
	if len(payload) > mss {
		v.GSOSize = uint16(mss)
	} else {
		v.GSOType = vnet.GSONone
	}
	return s.link.WriteSegment(v, f[:n], payload)
}

// sendICMPv6 sends an ICMPv6 message, whose checksum it fills.
func (s *Stack) sendICMPv6(src, dst netip.Addr, hops uint8, m []byte) error {
	m[2], m[3] = 0, 0
	pseudo := pseudoSum(src, dst, uint8(header.ICMPv6ProtocolNumber), len(m))
	binary.BigEndian.PutUint16(m[2:], ^checksum.Checksum(m, pseudo))
	var f [ethLen + header.IPv6MinimumSize]byte
	n := s.ipHeader(f[:], src, dst, uint8(header.ICMPv6ProtocolNumber), hops, len(m))
	return s.link.WriteFrame(vnet.Header{}, f[:n], m, nil)
}

// ICMPError describes a packet of the guest and what became of it.
type ICMPError struct {
	// Type and Code are those of ICMP or ICMPv6, by the guest's family
	// (RFC 792, RFC 1812 §5.2.7, RFC 4443 §3).
	Type, Code uint8
	// Info is the second word of the message: the MTU where the packet was
	// too big, else 0.
	Info uint32
	// Router is who reports; the zero value means the gateway.
	Router netip.Addr
	// Guest and Remote are the packet's source and destination.
	Guest, Remote netip.Addr
	// Proto is its transport protocol, L4 at least the first 8 bytes of its
	// transport header.
	Proto uint8
	L4    []byte
}

// SendICMPError tells the guest about a packet that could not be delivered. The
// rate is bounded as Linux bounds it (RFC 1812 §4.3.2.8).
func (s *Stack) SendICMPError(e ICMPError) error {
	if !s.icmpLim.Allow() {
		s.stats.ICMPLimited.Add(1)
		return nil
	}
	// The quoted packet: an IP header and the first bytes behind it. The
	// guest's kernel finds the socket by addresses, ports and, for TCP, the
	// sequence number.
	var q [ethLen + header.IPv6MinimumSize]byte
	n := s.ipHeader(q[:], e.Guest, e.Remote, e.Proto, 1, len(e.L4))
	quoted := q[ethLen:n]

	m := make([]byte, 8, 8+len(quoted)+len(e.L4))
	m[0], m[1] = e.Type, e.Code
	binary.BigEndian.PutUint32(m[4:], e.Info)
	m = append(append(m, quoted...), e.L4...)
	if e.Guest.Is6() {
		if !e.Router.IsValid() {
			e.Router = s.cfg.Gateway6
		}
		return s.sendICMPv6(e.Router, e.Guest, defaultTTL, m)
	}
	if !e.Router.IsValid() {
		e.Router = s.cfg.Gateway4
	}
	binary.BigEndian.PutUint16(m[2:], ^checksum.Checksum(m, 0))
	var f [ethLen + header.IPv4MinimumSize]byte
	s.ipHeader(f[:], e.Router, e.Guest, uint8(header.ICMPv4ProtocolNumber), defaultTTL, len(m))
	return s.link.WriteFrame(vnet.Header{}, f[:], m, nil)
}

// timeExceeded tells the guest that the packet's hop limit ended here.
func (s *Stack) timeExceeded(guest, remote netip.Addr, proto uint8, l4 []byte) {
	e := ICMPError{Type: uint8(header.ICMPv4TimeExceeded), Guest: guest, Remote: remote, Proto: proto, L4: clip(l4, 8)}
	if guest.Is6() {
		e.Type = uint8(header.ICMPv6TimeExceeded)
	}
	s.SendICMPError(e)
}

// refuseUDP tells the guest that nobody listens at dst for its datagram of n bytes.
func (s *Stack) refuseUDP(src, dst netip.AddrPort, n int) {
	var u [udpLen]byte
	putUDP(u[:], src.Port(), dst.Port(), n)
	e := ICMPError{
		Type: uint8(header.ICMPv4DstUnreachable), Code: uint8(header.ICMPv4PortUnreachable),
		Router: dst.Addr(), Guest: src.Addr(), Remote: dst.Addr(),
		Proto: uint8(header.UDPProtocolNumber), L4: u[:],
	}
	if src.Addr().Is6() {
		e.Type, e.Code = uint8(header.ICMPv6DstUnreachable), uint8(header.ICMPv6PortUnreachable)
	}
	s.SendICMPError(e)
}

// ethHeader writes an Ethernet header.
func (s *Stack) ethHeader(f []byte, dst [6]byte, proto uint16) {
	copy(f[0:6], dst[:])
	copy(f[6:12], s.cfg.GatewayMAC[:])
	binary.BigEndian.PutUint16(f[12:], proto)
}

// ipHeader writes the Ethernet and IP headers of an unfragmented packet with n
// bytes behind them and returns their length.
func (s *Stack) ipHeader(f []byte, src, dst netip.Addr, proto, ttl uint8, n int) int {
	id := uint16(0)
	if dst.Is4() {
		id = uint16(s.ipID.Add(1))
	}
	return s.ipHeaderID(f, src, dst, proto, ttl, n, id, 0)
}

// ipHeaderID is ipHeader with the identification and the flags of IPv4.
func (s *Stack) ipHeaderID(f []byte, src, dst netip.Addr, proto, ttl uint8, n int, id, flags uint16) int {
	mac := s.neigh.lookup(dst)
	if dst.Is4() {
		if dst == broadcast4 {
			mac = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		}
		s.ethHeader(f, mac, uint16(header.IPv4ProtocolNumber))
		s.ipv4Header(f[ethLen:], src, dst, proto, ttl, n, id, flags)
		return ethLen + header.IPv4MinimumSize
	}
	s.ethHeader(f, mac, uint16(header.IPv6ProtocolNumber))
	ipv6Header(f[ethLen:], src, dst, proto, ttl, n)
	return ethLen + header.IPv6MinimumSize
}

func (s *Stack) ipv4Header(ip []byte, src, dst netip.Addr, proto, ttl uint8, n int, id, frag uint16) {
	ip[0], ip[1] = 0x45, 0
	binary.BigEndian.PutUint16(ip[2:], uint16(header.IPv4MinimumSize+n))
	binary.BigEndian.PutUint16(ip[4:], id)
	binary.BigEndian.PutUint16(ip[6:], frag)
	ip[8], ip[9], ip[10], ip[11] = ttl, proto, 0, 0
	s4, d4 := src.As4(), dst.As4()
	copy(ip[12:16], s4[:])
	copy(ip[16:20], d4[:])
	binary.BigEndian.PutUint16(ip[10:], ^checksum.Checksum(ip[:header.IPv4MinimumSize], 0))
}

func ipv6Header(ip []byte, src, dst netip.Addr, next, hops uint8, n int) {
	ip[0], ip[1], ip[2], ip[3] = 0x60, 0, 0, 0
	binary.BigEndian.PutUint16(ip[4:], uint16(n))
	ip[6], ip[7] = next, hops
	s6, d6 := src.As16(), dst.As16()
	copy(ip[8:24], s6[:])
	copy(ip[24:40], d6[:])
}

// writeFragments sends a transport header and its payload in fragments that fit
// the link's MTU.
func (s *Stack) writeFragments(src, dst netip.Addr, proto uint8, l4, payload []byte) error {
	const fragHdr = header.IPv6FragmentHeaderSize
	id := s.ipID.Add(1)
	mac := s.neigh.lookup(dst)
	overhead := header.IPv4MinimumSize
	if dst.Is6() {
		overhead = header.IPv6MinimumSize + fragHdr
	}
	step := (int(s.link.MTU()) - overhead) &^ 7
	total := len(l4) + len(payload)
	for off := 0; off < total; off += step {
		n := min(step, total-off)
		more := off+n < total
		a, b := l4[:0], payload
		if off < len(l4) {
			a = l4[off:min(off+n, len(l4))]
		}
		start := max(0, off-len(l4))
		b = payload[start : start+n-len(a)]
		var f [ethLen + header.IPv6MinimumSize + fragHdr]byte
		hdr := ethLen + overhead
		if dst.Is4() {
			frag := uint16(off / 8)
			if more {
				frag |= 0x2000
			}
			s.ethHeader(f[:], mac, uint16(header.IPv4ProtocolNumber))
			s.ipv4Header(f[ethLen:], src, dst, proto, defaultTTL, n, uint16(id), frag)
		} else {
			s.ethHeader(f[:], mac, uint16(header.IPv6ProtocolNumber))
			ipv6Header(f[ethLen:], src, dst, header.IPv6FragmentHeader, defaultTTL, fragHdr+n)
			fh := f[ethLen+header.IPv6MinimumSize:]
			fh[0], fh[1] = proto, 0
			frag := uint16(off)
			if more {
				frag |= 1
			}
			binary.BigEndian.PutUint16(fh[2:], frag)
			binary.BigEndian.PutUint32(fh[4:], id)
		}
		if err := s.link.WriteFrame(vnet.Header{}, f[:hdr], a, b); err != nil {
			return err
		}
	}
	return nil
}
