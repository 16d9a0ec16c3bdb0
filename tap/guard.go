package tap

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A guard knows who a station on a switch is, and what it may claim to be.
type guard struct {
	mac   [6]byte
	addrs map[netip.Addr]struct{}
}

// newGuard makes the guard of a station with these addresses. Those that its
// kernel makes of its MAC belong to it too: the link-local one, and one in the
// /64 of every IPv6 address (RFC 4291, appendix A).
func newGuard(mac [6]byte, addrs []netip.Addr) guard {
	g := guard{mac, make(map[netip.Addr]struct{})}
	g.addrs[eui64(netip.MustParseAddr("fe80::"), mac)] = struct{}{}
	for _, a := range addrs {
		g.addrs[a] = struct{}{}
		if a.Is6() {
			g.addrs[eui64(a, mac)] = struct{}{}
		}
	}
	return g
}

// eui64 returns the address in the /64 of a that a kernel makes of a MAC.
func eui64(a netip.Addr, mac [6]byte) netip.Addr {
	b := a.As16()
	copy(b[8:], []byte{mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
	return netip.AddrFrom16(b)
}

func (g *guard) has(a netip.Addr) bool {
	_, ok := g.addrs[a]
	return ok
}

// permits reports whether the station may have sent a frame, which begins with
// eth. Its MAC and addresses must be its own, also where ARP and NDP tell them.
// What only the gateway says (router advertisements, redirects, answers of DHCP
// servers) is not for others, and of protocols that could carry any of this in
// disguise, such as VLAN tags, there are none.
func (g *guard) permits(eth []byte) bool {
	if len(eth) < header.EthernetMinimumSize || [6]byte(eth[6:12]) != g.mac {
		return false
	}
	b := eth[header.EthernetMinimumSize:]
	switch binary.BigEndian.Uint16(eth[12:]) {
	case uint16(header.ARPProtocolNumber):
		return g.permitsARP(b)
	case uint16(header.IPv4ProtocolNumber):
		return g.permits4(b)
	case uint16(header.IPv6ProtocolNumber):
		return g.permits6(b)
	}
	return false
}

func (g *guard) permitsARP(b []byte) bool {
	a := header.ARP(b)
	if !a.IsValid() || [6]byte(a.HardwareAddressSender()) != g.mac {
		return false
	}
	sender := netip.AddrFrom4([4]byte(a.ProtocolAddressSender()))
	// Without an address it is asked whether somebody has one (RFC 5227 §1.1).
	return g.has(sender) || sender.IsUnspecified() && a.Op() == header.ARPRequest
}

func (g *guard) permits4(ip []byte) bool {
	if len(ip) < header.IPv4MinimumSize || ip[0]>>4 != 4 {
		return false
	}
	ihl := int(ip[0]&0xf) * 4
	if ihl < header.IPv4MinimumSize || len(ip) < ihl {
		return false
	}
	src := netip.AddrFrom4([4]byte(ip[12:16]))
	if ip[9] != uint8(header.UDPProtocolNumber) || binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 {
		return g.has(src)
	}
	from, to, ok := ports(ip[ihl:])
	switch {
	case !ok:
		return false
	case src.IsUnspecified(): // a DHCP client without an address (RFC 2131 §4.1)
		return from == dhcpClient && to == dhcpServer
	}
	return g.has(src) && !(from == dhcpServer && to == dhcpClient)
}

// Ports of DHCP (RFC 2131 §4.1, RFC 8415 §7.2).
const (
	dhcpServer, dhcpClient   = 67, 68
	dhcp6Server, dhcp6Client = 547, 546
)

func ports(udp []byte) (from, to uint16, ok bool) {
	if len(udp) < 4 {
		return 0, 0, false
	}
	return binary.BigEndian.Uint16(udp), binary.BigEndian.Uint16(udp[2:]), true
}

func (g *guard) permits6(ip []byte) bool {
	if len(ip) < header.IPv6MinimumSize || ip[0]>>4 != 6 {
		return false
	}
	src := netip.AddrFrom16([16]byte(ip[8:24]))
	proto, l4, plain, ok := skipExtensions(ip[6], ip[header.IPv6MinimumSize:])
	if !ok {
		return false
	}
	if src.IsUnspecified() && proto != uint8(header.ICMPv6ProtocolNumber) || !src.IsUnspecified() && !g.has(src) {
		return false
	}
	switch proto {
	case uint8(header.UDPProtocolNumber):
		from, to, ok := ports(l4)
		return ok && !(from == dhcp6Server && to == dhcp6Client)
	case uint8(header.ICMPv6ProtocolNumber):
		return len(l4) > 0 && g.permitsICMPv6(src.IsUnspecified(), plain, l4)
	}
	return true
}

// Extension headers of IPv6 (RFC 8200 §4). Of a fragment that is not the first
// only noNext is known.
const (
	hopByHop, routing, fragment, destination, noNext = 0, 43, 44, 60, 59
)

// skipExtensions finds the transport header behind extension headers. plain says
// that there were none. It fails where they reach beyond b.
func skipExtensions(next uint8, b []byte) (proto uint8, l4 []byte, plain, ok bool) {
	plain = true
	for {
		var n int
		switch {
		case next != hopByHop && next != routing && next != destination && next != fragment:
			return next, b, plain, true
		case len(b) < 8:
			return 0, nil, false, false
		case next == fragment:
			if binary.BigEndian.Uint16(b[2:])&^7 != 0 {
				return noNext, nil, false, true
			}
			n = 8
		default:
			n = 8 * (int(b[1]) + 1)
		}
		if len(b) < n {
			return 0, nil, false, false
		}
		next, b, plain = b[0], b[n:], false
	}
}

// permitsICMPv6 looks at what NDP tells of the sender (RFC 4861 §4).
func (g *guard) permitsICMPv6(unspecified, plain bool, m []byte) bool {
	const mldReport, mldReport2 = 131, 143
	target := func() (netip.Addr, bool) {
		if len(m) < 24 {
			return netip.Addr{}, false
		}
		return netip.AddrFrom16([16]byte(m[8:24])), true
	}
	switch typ := header.ICMPv6Type(m[0]); typ {
	case header.ICMPv6RouterAdvert, header.ICMPv6RedirectMsg:
		return false
	case header.ICMPv6RouterSolicit:
		return plain && len(m) >= 8 && g.permitsOption(m[8:])
	case header.ICMPv6NeighborSolicit:
		_, ok := target()
		return plain && ok && g.permitsOption(m[24:])
	case header.ICMPv6NeighborAdvert:
		a, ok := target()
		return plain && ok && !unspecified && g.has(a) && g.permitsOption(m[24:])
	case mldReport, mldReport2:
		return true // behind a hop-by-hop header, and before there is an address
	}
	return !unspecified
}

// permitsOption looks for link-layer addresses in NDP options.
func (g *guard) permitsOption(b []byte) bool {
	const source, target = 1, 2
	for len(b) >= 8 {
		n := 8 * int(b[1])
		if n == 0 || n > len(b) {
			return false
		}
		if (b[0] == source || b[0] == target) && [6]byte(b[2:8]) != g.mac {
			return false
		}
		b = b[n:]
	}
	return len(b) == 0
}
