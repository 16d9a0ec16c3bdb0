package stack

import (
	"encoding/binary"
	"net/netip"
	"runtime"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/usernet/usernet/internal/vnet"
)

const (
	ethLen = header.EthernetMinimumSize
	udpLen = header.UDPMinimumSize
)

var (
	broadcast4    = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	allDHCPAgents = netip.MustParseAddr("ff02::1:2")
	allNodes      = netip.MustParseAddr("ff02::1")
)

// receive looks at a frame before netstack does and reports whether it is done
// with. eth starts with the Ethernet header and holds all headers of any packet
// that is not malformed; tail is the rest.
func (s *Stack) receive(h vnet.Header, eth, tail []byte) bool {
	var dst, src [6]byte
	copy(dst[:], eth[0:6])
	copy(src[:], eth[6:12])
	if dst[0]&1 == 0 && dst != s.cfg.GatewayMAC || src[0]&1 != 0 || src == s.cfg.GatewayMAC {
		s.stats.Foreign.Add(1)
		return true
	}
	s.way.vouched = h.Flags&(vnet.NeedsCsum|vnet.DataValid) != 0
	switch binary.BigEndian.Uint16(eth[12:]) {
	case uint16(header.IPv4ProtocolNumber):
		return s.receive4(h, src, eth[ethLen:], tail)
	case uint16(header.IPv6ProtocolNumber):
		if !s.ipv6() {
			return true
		}
		return s.receive6(h, src, eth[ethLen:], tail)
	case uint16(header.ARPProtocolNumber):
		s.receiveARP(src, eth[ethLen:])
		return true
	}
	s.stats.Foreign.Add(1)
	return true
}

// receive4 handles one IPv4 packet.
func (s *Stack) receive4(h vnet.Header, mac [6]byte, ip, tail []byte) bool {
	if len(ip) < header.IPv4MinimumSize || ip[0]>>4 != 4 {
		s.stats.Malformed.Add(1)
		return true
	}
	ihl, total := int(ip[0]&0xf)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ihl < header.IPv4MinimumSize || total < ihl || ihl > len(ip) || total > len(ip)+len(tail) {
		s.stats.Malformed.Add(1)
		return true
	}
	src, dst := netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
	proto := ip[9]
	if !s.guest4(src) {
		// A DHCP client has no address yet (RFC 2131 §4.1). It may also
		// keep one of a network where it was before; the server then
		// says no.
		if !(proto == uint8(header.UDPProtocolNumber) && src.IsUnspecified() && dst == broadcast4) {
			s.stats.Spoofed.Add(1)
			return true
		}
	} else {
		s.neigh.learn(src, mac)
	}
	if dst.IsMulticast() || dst == broadcast4 || dst == s.bcast4 {
		if proto != uint8(header.UDPProtocolNumber) {
			return true // IGMP and the like: nobody here is interested
		}
	} else if dst.IsLoopback() || dst.IsUnspecified() || dst == s.cfg.Prefix4.Addr() || dst.As4()[0] >= 240 {
		s.stats.Foreign.Add(1)
		return true
	}
	if checksum.Checksum(ip[:ihl], 0) != 0xffff {
		s.stats.Malformed.Add(1)
		return true
	}
	frag := binary.BigEndian.Uint16(ip[6:])
	l4, tail := trim(ip, tail, ihl, total)
	if ttl := ip[8]; ttl <= 1 && !s.own(dst) && !dst.IsMulticast() && dst != broadcast4 {
		if frag&0x1fff == 0 { // of a later fragment nobody is told (RFC 1122 §3.2.2)
			s.timeExceeded(src, dst, proto, l4)
		}
		return true
	}
	if ihl != header.IPv4MinimumSize || frag&0x3fff != 0 {
		return false // options and fragments are netstack's
	}
	switch proto {
	case uint8(header.UDPProtocolNumber):
		s.receiveUDP(h, src, dst, ip[8], l4, tail)
		return true
	case uint8(header.ICMPv4ProtocolNumber):
		if len(l4) >= header.ICMPv4MinimumSize && l4[0] == uint8(header.ICMPv4Echo) && l4[1] == 0 {
			s.receiveEcho(src, dst, ip[8], l4, tail, 0)
			return true
		}
	case uint8(header.TCPProtocolNumber):
		return !s.admit(src, dst, l4, tail)
	}
	return false
}

// admit reports whether a TCP segment is to go on to netstack: a SYN may have to
// stay behind.
func (s *Stack) admit(src, dst netip.Addr, l4, tail []byte) bool {
	if s.hooks.Segment != nil && s.hooks.Segment(src, dst, l4, tail, len(l4)+len(tail), !s.way.vouched) {
		return false
	}
	if !isSYN(l4) {
		return true
	}
	if !s.gate.take(s.clock.now()) {
		s.stats.SYNsDropped.Add(1)
		return false
	}
	s.makeWay(src, dst, l4)
	return true
}

// strayTCP is netstack's handler for segments that belong to no endpoint.
func (s *Stack) strayTCP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize {
		return true
	}
	if _, valid, ok := header.TCPValid(h, pkt.Data().Checksum, uint16(pkt.Data().Size()), id.RemoteAddress, id.LocalAddress, pkt.RXChecksumValidated); !ok || !valid {
		s.stats.Malformed.Add(1)
		return true
	}
	if s.way.long && isSYN(h) && !s.gate.take(s.clock.now()) {
		s.stats.SYNsDropped.Add(1)
		return true
	}
	// Nothing but the listeners answers at these addresses.
	if a := addrOf(id.LocalAddress); a == s.cfg.DNS4 || a == s.cfg.DNS6 || a == s.linkLocal {
		return s.cfg.SilentDNS && a != s.linkLocal
	}
	return s.hooks.TCP != nil && s.hooks.TCP(id, pkt)
}

// makeWay lets an earlier connection between the same ports come to its end
// when a SYN for the next one arrives. The guest's kernel reuses a port as soon
// as its own end is closed; the segments that closed it may still wait for
// netstack's goroutine, whose endpoint would take the SYN for a stray segment
// and cost the guest a second, or a refusal.
func (s *Stack) makeWay(src, dst netip.Addr, l4 []byte) {
	tcpHdr := header.TCP(l4)
	id := stack.TransportEndpointID{
		LocalPort: tcpHdr.DestinationPort(), LocalAddress: tcpip.AddrFromSlice(dst.AsSlice()),
		RemotePort: tcpHdr.SourcePort(), RemoteAddress: tcpip.AddrFromSlice(src.AsSlice()),
	}
	const patience = 64
	for i := 0; i < patience; i++ {
		ep := s.ns.FindTransportEndpoint(protocolOf(src), tcp.ProtocolNumber, id, nicID)
		if ep == nil {
			return
		}
		e, ok := ep.(tcpip.Endpoint)
		if !ok || tcp.EndpointState(e.State()) == tcp.StateListen {
			return
		}
		if i == patience-1 && tcp.EndpointState(e.State()) == tcp.StateTimeWait {
			e.Abort()
			return
		}
		runtime.Gosched() // netstack's goroutines, and its timers, go on
	}
}

// guest4 reports whether a packet of the guest may come from a.
func (s *Stack) guest4(a netip.Addr) bool {
	if l := s.neigh.last.Load(); l != nil && l.addr == a {
		return true
	}
	return s.cfg.Prefix4.Contains(a) && !s.own(a) && a != s.bcast4 && a != s.cfg.Prefix4.Addr()
}

// receive6 handles one IPv6 packet.
func (s *Stack) receive6(h vnet.Header, mac [6]byte, ip, tail []byte) bool {
	if len(ip) < header.IPv6MinimumSize || ip[0]>>4 != 6 {
		s.stats.Malformed.Add(1)
		return true
	}
	total := header.IPv6MinimumSize + int(binary.BigEndian.Uint16(ip[4:]))
	if total > len(ip)+len(tail) {
		s.stats.Malformed.Add(1)
		return true
	}
	src, dst := netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40]))
	proto := ip[6]
	if s.guest6(src) {
		s.neigh.learn(src, mac)
	} else if !(src.IsUnspecified() && proto == uint8(header.ICMPv6ProtocolNumber)) {
		s.stats.Spoofed.Add(1)
		return true
	}
	if dst.IsLoopback() || dst.IsUnspecified() || dst.Is4In6() ||
		src.IsLinkLocalUnicast() && !dst.IsLinkLocalUnicast() && !dst.IsMulticast() && !s.own(dst) {
		s.stats.Foreign.Add(1)
		return true
	}
	if dst.IsMulticast() && proto != uint8(header.ICMPv6ProtocolNumber) && proto != uint8(header.UDPProtocolNumber) {
		return true // MLD reports travel behind a hop-by-hop header
	}
	l4, tail := trim(ip, tail, header.IPv6MinimumSize, total)
	hops := ip[7]
	if hops <= 1 && !s.own(dst) && !dst.IsMulticast() {
		s.timeExceeded(src, dst, proto, l4)
		return true
	}
	switch proto {
	case uint8(header.UDPProtocolNumber):
		s.receiveUDP(h, src, dst, hops, l4, tail)
		return true
	case uint8(header.ICMPv6ProtocolNumber):
		return s.receiveICMPv6(src, dst, hops, l4, tail)
	case uint8(header.TCPProtocolNumber):
		return !s.admit(src, dst, l4, tail)
	}
	if hidesNDP(proto, l4, tail) {
		s.stats.Malformed.Add(1)
		return true
	}
	return false // extension headers are netstack's
}

// hidesNDP reports whether there is a message of neighbour discovery behind the
// extension headers that head and tail begin with. No kernel sends such, and
// netstack, which is to take packets for all addresses, would answer for all. It
// refuses fragments by itself (RFC 6980 §5).
func hidesNDP(next uint8, head, tail []byte) bool {
	for b := head; ; tail = nil {
		n := 8
		switch id := header.IPv6ExtensionHeaderIdentifier(next); id {
		case header.IPv6HopByHopOptionsExtHdrIdentifier, header.IPv6RoutingExtHdrIdentifier,
			header.IPv6DestinationOptionsExtHdrIdentifier, header.IPv6ExperimentExtHdrIdentifier:
			b = append(b[:len(b):len(b)], tail...)
			if len(b) > 1 && id != header.IPv6ExperimentExtHdrIdentifier {
				n *= int(b[1]) + 1
			}
		default:
			return next == uint8(header.ICMPv6ProtocolNumber) && len(b) > 0 &&
				header.ICMPv6RouterSolicit <= header.ICMPv6Type(b[0]) && header.ICMPv6Type(b[0]) <= header.ICMPv6RedirectMsg
		}
		if len(b) < n {
			return false
		}
		next, b = b[0], b[n:]
	}
}

// guest6 reports whether a packet of the guest may come from a.
func (s *Stack) guest6(a netip.Addr) bool {
	if l := s.neigh.last.Load(); l != nil && l.addr == a {
		return true
	}
	return (s.cfg.Prefix6.Contains(a) || a.IsLinkLocalUnicast()) && !s.own(a) && a != s.cfg.Prefix6.Addr()
}

// trim returns the part of a packet from off to total as two pieces: what of it
// lies in head and what in tail.
func trim(head, tail []byte, off, total int) (l4, rest []byte) {
	if total <= len(head) {
		return head[off:total], nil
	}
	return head[off:], tail[:total-len(head)]
}

func clip(b []byte, n int) []byte { return b[:min(n, len(b))] }

// receiveUDP hands one datagram, or one super-frame of them, to the
// conn that is bound to its destination or else to the hook.
func (s *Stack) receiveUDP(h vnet.Header, src, dst netip.Addr, ttl uint8, l4, tail []byte) {
	if len(l4) < udpLen {
		s.stats.Malformed.Add(1)
		return
	}
	u := header.UDP(l4)
	length := int(u.Length())
	if h.GSOType == vnet.GSOUDP {
		length = len(l4) + len(tail) // the header's is that of one segment or of all, by kernel version
	}
	if length < udpLen || length > len(l4)+len(tail) {
		s.stats.Malformed.Add(1)
		return
	}
	if h.Flags&(vnet.NeedsCsum|vnet.DataValid) == 0 && !udpChecksumValid(src, dst, l4, tail, length) {
		s.stats.Malformed.Add(1)
		return
	}
	head, tail := trim(l4, tail, udpLen, length)
	gso := 0
	if h.GSOType == vnet.GSOUDP {
		gso = int(h.GSOSize)
		if gso == 0 {
			s.stats.Malformed.Add(1)
			return
		}
		if gso >= len(head)+len(tail) {
			gso = 0
		}
	}
	s.deliverUDP(netip.AddrPortFrom(src, u.SourcePort()), netip.AddrPortFrom(dst, u.DestinationPort()), ttl, gso, head, tail)
}

func (s *Stack) deliverUDP(src, dst netip.AddrPort, ttl uint8, gso int, head, tail []byte) {
	if src.Port() == 0 || dst.Port() == 0 {
		s.stats.Malformed.Add(1)
		return
	}
	if c := s.connFor(dst); c != nil {
		if gso == 0 {
			c.deliver(src, head, tail)
			return
		}
		all := append(append(make([]byte, 0, len(head)+len(tail)), head...), tail...)
		for len(all) > 0 {
			n := min(gso, len(all))
			c.deliver(src, all[:n], nil)
			all = all[n:]
		}
		return
	}
	a := dst.Addr()
	if a.IsMulticast() && !(s.cfg.Multicast && a.Is4() && ttl > 1) || a == broadcast4 || a == s.bcast4 || !s.guest(src.Addr()) {
		return
	}
	if s.hooks.UDP == nil || a == s.cfg.DNS4 || a == s.cfg.DNS6 || a == s.linkLocal {
		if !s.cfg.SilentDNS || a == s.linkLocal {
			s.refuseUDP(src, dst, len(head)+len(tail))
		}
		return
	}
	s.hooks.UDP(src, dst, ttl, gso, head, tail)
}

func (s *Stack) guest(a netip.Addr) bool {
	if a.Is4() {
		return s.guest4(a)
	}
	return s.guest6(a)
}

// udpChecksumValid verifies the checksum of the datagram of length bytes in
// l4 and tail.
func udpChecksumValid(src, dst netip.Addr, l4, tail []byte, length int) bool {
	if header.UDP(l4).Checksum() == 0 {
		return src.Is4() // optional in IPv4 only (RFC 8200 §8.1)
	}
	xsum := pseudoSum(src, dst, uint8(header.UDPProtocolNumber), length)
	return checksum.Combine(sumPieces(clip(l4, length), tail[:max(0, length-len(l4))]), xsum) == 0xffff
}

// sumPieces adds up two consecutive pieces of a packet, the first of which may
// have odd length.
func sumPieces(a, b []byte) uint16 {
	var c checksum.Checksumer
	c.Add(a)
	c.Add(b)
	return c.Checksum()
}

// pseudoSum is the sum of the pseudo-header, not inverted.
func pseudoSum(src, dst netip.Addr, proto uint8, length int) uint16 {
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		sum := checksum.Combine(checksum.Checksum(s[:], 0), checksum.Checksum(d[:], 0))
		return checksum.Combine(sum, checksum.Combine(uint16(proto), uint16(length)))
	}
	s, d := src.As16(), dst.As16()
	sum := checksum.Combine(checksum.Checksum(s[:], 0), checksum.Checksum(d[:], 0))
	return checksum.Combine(sum, checksum.Combine(uint16(proto), uint16(length)))
}

// receiveEcho answers an echo request for one of our addresses and passes
// others to the hook. pseudo is the pseudo-header's sum (0 for ICMPv4).
func (s *Stack) receiveEcho(src, dst netip.Addr, ttl uint8, l4, tail []byte, pseudo uint16) {
	if checksum.Combine(sumPieces(l4, tail), pseudo) != 0xffff {
		s.stats.Malformed.Add(1)
		return
	}
	id, seq := binary.BigEndian.Uint16(l4[4:]), binary.BigEndian.Uint16(l4[6:])
	switch {
	case s.own(dst):
		s.SendEchoReply(dst, src, 64, id, seq, l4[8:], tail)
	case s.hooks.Echo != nil && !dst.IsMulticast() && dst != broadcast4 && dst != s.bcast4 && !src.IsUnspecified():
		s.hooks.Echo(src, dst, ttl, id, seq, l4[8:], tail)
	}
}

// receiveICMPv6 answers what a router answers, and leaves the rest to netstack.
func (s *Stack) receiveICMPv6(src, dst netip.Addr, hops uint8, l4, tail []byte) bool {
	if len(l4) < header.ICMPv6MinimumSize {
		s.stats.Malformed.Add(1)
		return true
	}
	pseudo := pseudoSum(src, dst, uint8(header.ICMPv6ProtocolNumber), len(l4)+len(tail))
	typ := header.ICMPv6Type(l4[0])
	switch typ {
	case header.ICMPv6EchoRequest:
		if l4[1] == 0 && len(l4) >= 8 {
			s.receiveEcho(src, dst, hops, l4, tail, pseudo)
		}
		return true
	case header.ICMPv6NeighborSolicit, header.ICMPv6RouterSolicit:
		// Hop limit 255 proves that no router forwarded it (RFC 4861 §6.1.1, §7.1.1).
		if hops != 255 || l4[1] != 0 || checksum.Combine(sumPieces(l4, tail), pseudo) != 0xffff {
			s.stats.Malformed.Add(1)
			return true
		}
		if typ == header.ICMPv6NeighborSolicit {
			s.receiveNS(src, l4)
		} else if c := s.rs.Load(); c != nil && dst.IsMulticast() || dst == s.linkLocal {
			if c != nil {
				c.deliver(netip.AddrPortFrom(src, 0), l4, tail)
			}
		}
		return true
	case header.ICMPv6NeighborAdvert, header.ICMPv6RouterAdvert, header.ICMPv6RedirectMsg:
		return true // the guest has no say in our routing
	}
	return dst.IsMulticast()
}

// receiveNS answers a neighbour solicitation for one of our addresses,
// duplicate address detection included (RFC 4861 §7.2.4).
func (s *Stack) receiveNS(src netip.Addr, l4 []byte) {
	if len(l4) < 24 {
		s.stats.Malformed.Add(1)
		return
	}
	target := netip.AddrFrom16([16]byte(l4[8:24]))
	if !s.own(target) {
		return
	}
	na := make([]byte, 32)
	na[0] = uint8(header.ICMPv6NeighborAdvert)
	na[4] = 0x80 | 0x40 | 0x20 // router, solicited, override
	dst := src
	if src.IsUnspecified() {
		na[4] &^= 0x40
		dst = allNodes
	}
	copy(na[8:24], target.AsSlice())
	na[24], na[25] = 2, 1 // target link-layer address, in units of 8 bytes
	copy(na[26:32], s.cfg.GatewayMAC[:])
	s.stats.NDPReplies.Add(1)
	s.sendICMPv6(target, dst, 255, na)
}

// receiveARP answers requests for our addresses. Nothing else on the link is
// ours to answer for: an address without owner stays silent, as on a wire.
func (s *Stack) receiveARP(mac [6]byte, b []byte) {
	a := header.ARP(b)
	if !a.IsValid() {
		s.stats.Malformed.Add(1)
		return
	}
	sender := netip.AddrFrom4([4]byte(a.ProtocolAddressSender()))
	if sender.IsValid() && !sender.IsUnspecified() {
		if !s.guest4(sender) {
			s.stats.Spoofed.Add(1)
			return
		}
		s.neigh.learn(sender, mac)
	}
	target := netip.AddrFrom4([4]byte(a.ProtocolAddressTarget()))
	if a.Op() != header.ARPRequest || !s.own(target) {
		return
	}
	var f [ethLen + header.ARPSize]byte
	s.ethHeader(f[:], mac, uint16(header.ARPProtocolNumber))
	r := header.ARP(f[ethLen:])
	r.SetIPv4OverEthernet()
	r.SetOp(header.ARPReply)
	copy(r.HardwareAddressSender(), s.cfg.GatewayMAC[:])
	copy(r.ProtocolAddressSender(), target.AsSlice())
	copy(r.HardwareAddressTarget(), a.HardwareAddressSender())
	copy(r.ProtocolAddressTarget(), a.ProtocolAddressSender())
	s.stats.ARPReplies.Add(1)
	s.link.WriteFrame(vnet.Header{}, f[:], nil, nil)
}

// reassembledUDP is netstack's handler for datagrams that came in fragments or
// with IP options.
func (s *Stack) reassembledUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	src, dst := addrOf(id.RemoteAddress), addrOf(id.LocalAddress)
	l4 := append([]byte(nil), pkt.TransportHeader().Slice()...)
	data := pkt.Data().AsRange().ToSlice()
	if len(l4) < udpLen {
		return true
	}
	length := int(header.UDP(l4).Length())
	if length < udpLen || length > udpLen+len(data) || !s.way.vouched && !udpChecksumValid(src, dst, l4, data, length) {
		s.stats.Malformed.Add(1)
		return true
	}
	s.deliverUDP(netip.AddrPortFrom(src, id.RemotePort), netip.AddrPortFrom(dst, id.LocalPort), ttlOf(pkt), 0, data[:length-udpLen], nil)
	return true
}

// reassembledEcho is netstack's handler for ICMP messages that came in
// fragments or with IP options.
func (s *Stack) reassembledEcho(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	src, dst := addrOf(id.RemoteAddress), addrOf(id.LocalAddress)
	l4 := append(append([]byte(nil), pkt.TransportHeader().Slice()...), pkt.Data().AsRange().ToSlice()...)
	if len(l4) < 8 {
		return true
	}
	pseudo, echo := uint16(0), uint8(header.ICMPv4Echo)
	if src.Is6() {
		pseudo, echo = pseudoSum(src, dst, uint8(header.ICMPv6ProtocolNumber), len(l4)), uint8(header.ICMPv6EchoRequest)
	}
	if l4[0] == echo && l4[1] == 0 {
		s.receiveEcho(src, dst, ttlOf(pkt), l4, nil, pseudo)
	}
	return true
}

func ttlOf(pkt *stack.PacketBuffer) uint8 {
	b := pkt.NetworkHeader().Slice()
	if len(b) > 8 && b[0]>>4 == 4 {
		return b[8]
	}
	if len(b) > 7 {
		return b[7]
	}
	return 64
}

func addrOf(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return addr
}
