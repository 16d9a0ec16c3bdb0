package usernet

import (
	"net"
	"net/netip"

	"github.com/pires/go-proxyproto"
)

// proxyHeader returns what makes the PROXY protocol's header of a version
// (haproxy.org's proxy-protocol.txt). A client without an address gets the one
// that says so: UNKNOWN, or the command LOCAL.
func proxyHeader(version int) func(client, host netip.AddrPort) []byte {
	return func(client, host netip.AddrPort) []byte {
		h := &proxyproto.Header{Version: byte(version), Command: proxyproto.LOCAL, TransportProtocol: proxyproto.UNSPEC}
		if client.IsValid() && host.IsValid() {
			h.Command, h.TransportProtocol = proxyproto.PROXY, proxyproto.TCPv4
			if client.Addr().Is6() {
				h.TransportProtocol = proxyproto.TCPv6
			}
			h.SourceAddr = net.TCPAddrFromAddrPort(withoutZone(client))
			h.DestinationAddr = net.TCPAddrFromAddrPort(withoutZone(host))
		}
		b, err := h.Format()
		if err != nil {
			return nil // no family but those two
		}
		return b
	}
}

func withoutZone(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().WithZone(""), a.Port())
}
