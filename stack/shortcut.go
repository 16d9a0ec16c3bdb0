package stack

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/header/parse"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// netstack's IP layer serves any host: it asks packet filters, looks for
// listeners on raw sockets and for addresses, compares MTUs, four times per
// request and answer. A gateway for guests needs none of it for an unfragmented
// TCP segment without options, which [Stack.receive] has checked already. So
// such segments go around it, in both directions; all others take the long way.

// shortcut returns a network protocol that does for TCP only what is needed,
// and leaves the rest to the one that factory makes.
func (s *Stack) shortcut(factory stack.NetworkProtocolFactory) stack.NetworkProtocolFactory {
	return func(ns *stack.Stack) stack.NetworkProtocol {
		return &shortcutProtocol{factory(ns), s}
	}
}

type shortcutProtocol struct {
	stack.NetworkProtocol
	s *Stack
}

// NewEndpoint implements stack.NetworkProtocol.
func (p *shortcutProtocol) NewEndpoint(nic stack.NetworkInterface, d stack.TransportDispatcher) stack.NetworkEndpoint {
	inner := p.NetworkProtocol.NewEndpoint(nic, longWay{d.(stack.TransportDispatcherWithDefaultHandlerResult), p.s}).(networkEndpoint)
	if p.Number() == ipv4.ProtocolNumber {
		return &shortcut4{inner, p.s, d}
	}
	return &shortcut6{inner, p.s, d}
}

// networkEndpoint is what netstack expects of an endpoint of IP.
type networkEndpoint interface {
	stack.NetworkEndpoint
	stack.AddressableEndpoint
	stack.GroupAddressableEndpoint
	stack.ForwardingNetworkEndpoint
}

// A way says how the packet that is being handled gets to its handler. There is one
// at a time: a link has one receiver, and handlers are called by it.
type way struct {
	// vouched is set where the link answers for checksums of transport headers,
	// or has left them to us. It cannot do so for fragments, whose sender must
	// have filled them in.
	vouched bool
	// long is set on the way through netstack's IP layer.
	long bool
}

// longWay is where netstack's IP layer delivers what it was handed.
type longWay struct {
	stack.TransportDispatcherWithDefaultHandlerResult
	s *Stack
}

// DeliverTransportPacket implements stack.TransportDispatcher.
func (w longWay) DeliverTransportPacket(proto tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer) stack.TransportPacketDisposition {
	if h := pkt.TransportHeader().Slice(); proto == header.TCPProtocolNumber && w.s.hooks.Segment != nil {
		n := pkt.Network()
		if w.s.hooks.Segment(addrOf(n.SourceAddress()), addrOf(n.DestinationAddress()), h, nil, len(h)+pkt.Data().Size(), !pkt.RXChecksumValidated) {
			return stack.TransportPacketHandled
		}
	}
	return w.TransportDispatcherWithDefaultHandlerResult.DeliverTransportPacket(proto, pkt)
}

// takeLongWay hands netstack a packet with options, extension headers, or a part of
// one. Unlike those that the link has looked into, its checksums are still to be
// verified.
func (s *Stack) takeLongWay(e networkEndpoint, pkt *stack.PacketBuffer) {
	pkt.RXChecksumValidated = s.way.vouched
	s.way.long = true
	e.HandlePacket(pkt)
	s.way.long = false
}

type shortcut4 struct {
	networkEndpoint
	s *Stack
	d stack.TransportDispatcher
}

// HandlePacket implements stack.NetworkEndpoint.
func (e *shortcut4) HandlePacket(pkt *stack.PacketBuffer) {
	const first = 4<<4 | header.IPv4MinimumSize/4 // version, and length without options
	b, ok := pkt.Data().PullUp(header.IPv4MinimumSize)
	if !ok || b[0] != first || b[9] != uint8(header.TCPProtocolNumber) || binary.BigEndian.Uint16(b[6:])&0x3fff != 0 {
		e.s.takeLongWay(e.networkEndpoint, pkt)
		return
	}
	size := int(binary.BigEndian.Uint16(b[2:])) - header.IPv4MinimumSize
	pkt.NetworkHeader().Consume(header.IPv4MinimumSize)
	deliverTCP(e.d, ipv4.ProtocolNumber, pkt, size)
}

// deliverTCP hands netstack the segment of size bytes that pkt's network header
// precedes.
func deliverTCP(d stack.TransportDispatcher, proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer, size int) {
	pkt.NetworkProtocolNumber = proto
	pkt.NICID = nicID
	pkt.Data().CapLength(size) // Ethernet pads short frames
	if parse.TCP(pkt) {
		d.DeliverTransportPacket(header.TCPProtocolNumber, pkt)
	}
}

// WritePacket implements stack.NetworkEndpoint.
func (e *shortcut4) WritePacket(r *stack.Route, params stack.NetworkHeaderParams, pkt *stack.PacketBuffer) tcpip.Error {
	if params.Protocol == header.TCPProtocolNumber && e.s.sent(r, pkt) {
		return nil
	}
	if !short(r, params, pkt) {
		return e.networkEndpoint.WritePacket(r, params, pkt)
	}
	ip := header.IPv4(pkt.NetworkHeader().Push(header.IPv4MinimumSize))
	src, dst := r.LocalAddress(), r.RemoteAddress()
	ip[0], ip[1] = 4<<4|header.IPv4MinimumSize/4, params.TOS
	binary.BigEndian.PutUint16(ip[2:], uint16(pkt.Size()))
	// Never fragmented, so the identification says nothing (RFC 6864 §4.1).
	binary.BigEndian.PutUint32(ip[4:], header.IPv4FlagDontFragment<<13)
	ip[8], ip[9] = params.TTL, uint8(params.Protocol)
	binary.BigEndian.PutUint16(ip[10:], 0)
	copy(ip[12:], src.AsSlice())
	copy(ip[16:], dst.AsSlice())
	ip.SetChecksum(^ip.CalculateChecksum())
	return e.s.writeShort(ipv4.ProtocolNumber, dst, pkt)
}

// sent shows a segment of netstack's to the hook, and reports whether the link is to lose
// it.
func (s *Stack) sent(r *stack.Route, pkt *stack.PacketBuffer) bool {
	if s.hooks.Sent == nil {
		return false
	}
	left := pkt.GSOOptions.Type != stack.GSONone && pkt.GSOOptions.NeedsCsum
	return s.hooks.Sent(addrOf(r.RemoteAddress()), addrOf(r.LocalAddress()), pkt.TransportHeader().Slice(), pkt.Data().Size(), !left)
}

// short reports whether a packet is TCP for the guest that needs no fragments.
func short(r *stack.Route, params stack.NetworkHeaderParams, pkt *stack.PacketBuffer) bool {
	return params.Protocol == header.TCPProtocolNumber && r.Loop() == stack.PacketOut &&
		params.ExperimentOptionValue == 0 &&
		(pkt.GSOOptions.Type != stack.GSONone || pkt.Size() <= int(r.MTU()))
}

// writeShort sends a packet whose IP header is there.
func (s *Stack) writeShort(proto tcpip.NetworkProtocolNumber, dst tcpip.Address, pkt *stack.PacketBuffer) tcpip.Error {
	pkt.NetworkProtocolNumber = proto
	pkt.PktType = tcpip.PacketOutgoing
	return s.link.WritePacket(dst, pkt)
}

type shortcut6 struct {
	networkEndpoint
	s *Stack
	d stack.TransportDispatcher
}

// HandlePacket implements stack.NetworkEndpoint.
func (e *shortcut6) HandlePacket(pkt *stack.PacketBuffer) {
	b, ok := pkt.Data().PullUp(header.IPv6MinimumSize)
	if !ok || b[6] != uint8(header.TCPProtocolNumber) {
		e.s.takeLongWay(e.networkEndpoint, pkt)
		return
	}
	size := int(binary.BigEndian.Uint16(b[4:]))
	pkt.NetworkHeader().Consume(header.IPv6MinimumSize)
	deliverTCP(e.d, ipv6.ProtocolNumber, pkt, size)
}

// WritePacket implements stack.NetworkEndpoint.
func (e *shortcut6) WritePacket(r *stack.Route, params stack.NetworkHeaderParams, pkt *stack.PacketBuffer) tcpip.Error {
	if params.Protocol == header.TCPProtocolNumber && e.s.sent(r, pkt) {
		return nil
	}
	if !short(r, params, pkt) {
		return e.networkEndpoint.WritePacket(r, params, pkt)
	}
	size := pkt.Size()
	ip := header.IPv6(pkt.NetworkHeader().Push(header.IPv6MinimumSize))
	src, dst := r.LocalAddress(), r.RemoteAddress()
	binary.BigEndian.PutUint32(ip, 6<<28|uint32(params.TOS)<<20)
	binary.BigEndian.PutUint16(ip[4:], uint16(size))
	ip[6], ip[7] = uint8(params.Protocol), params.TTL
	copy(ip[8:], src.AsSlice())
	copy(ip[24:], dst.AsSlice())
	return e.s.writeShort(ipv6.ProtocolNumber, dst, pkt)
}
