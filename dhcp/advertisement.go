package dhcp

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// ICMPv6 messages and options of neighbour discovery.
const (
	typeSolicitation  = 133
	typeAdvertisement = 134

	optSourceLink = 1
	optPrefix     = 3
	optMTU        = 5
	optRDNSS      = 25 // RFC 8106 §5.1
	optDNSSL      = 31 // RFC 8106 §5.2
)

var allNodes = netip.MustParseAddr("ff02::1")

// validSolicitation checks a router solicitation (RFC 4861 §6.1.1), but for the
// checksum and the hop limit, which the conn answers for.
func validSolicitation(b []byte, from netip.Addr) bool {
	if len(b) < 8 || b[0] != typeSolicitation || b[1] != 0 {
		return false
	}
	if !from.Is6() || from.Is4In6() || from.IsMulticast() || from.IsLoopback() {
		return false
	}
	for o := b[8:]; len(o) > 0; {
		if len(o) < 2 || o[1] == 0 || len(o) < int(o[1])*8 {
			return false
		}
		if o[0] == optSourceLink && from.IsUnspecified() {
			return false
		}
		o = o[int(o[1])*8:]
	}
	return true
}

// advertisement returns a router advertisement (RFC 4861 §4.2) without its
// checksum.
func advertisement(cfg *ConfigRA, router bool, search []string) []byte {
	b := []byte{typeAdvertisement, 0, 0, 0, 64 /* hop limit */, 0}
	if cfg.Managed {
		b[5] |= 0x80
	}
	if cfg.Other {
		b[5] |= 0x40
	}
	var lifetime time.Duration
	if router {
		lifetime = routerLifetime
	}
	b = binary.BigEndian.AppendUint16(b, uint16(lifetime/time.Second))
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // reachable time, retransmission timer: not specified
	if len(cfg.LinkAddr) == 6 {
		b = append(append(b, optSourceLink, 1), cfg.LinkAddr...)
	}
	if cfg.MTU > 0 {
		b = binary.BigEndian.AppendUint32(append(b, optMTU, 1, 0, 0), uint32(cfg.MTU))
	}
	b = appendPrefix(b, cfg)
	if len(cfg.DNS) > 0 {
		b = append(b, optRDNSS, byte(1+2*len(cfg.DNS)), 0, 0)
		b = appendSeconds(b, serverLifetime)
		for _, a := range cfg.DNS {
			b = append(b, a.AsSlice()...)
		}
	}
	// In the smallest MTU without fragments (RFC 6980 forbids them).
	return appendSearch(b, search, 1280-40-len(b))
}

// appendPrefix appends the prefix information option. Hosts configure
// themselves in a /64 only (RFC 4862 §5.5.3 d).
func appendPrefix(b []byte, cfg *ConfigRA) []byte {
	flags := byte(0x80) // on-link
	if cfg.Prefix.Bits() == 64 {
		flags |= 0x40 // autonomous
	}
	b = append(b, optPrefix, 4, byte(cfg.Prefix.Bits()), flags)
	b = appendSeconds(b, cfg.ValidLifetime)
	b = appendSeconds(b, cfg.PreferredLifetime)
	return append(append(b, 0, 0, 0, 0), cfg.Prefix.Masked().Addr().AsSlice()...)
}

// appendSearch appends as many of the domains as fit in room bytes, padded with
// zeros and not compressed (RFC 8106 §5.2).
func appendSearch(b []byte, search []string, room int) []byte {
	var names []byte
	for _, n := range search {
		if 8+(len(names)+len(n)+2+7)/8*8 > room {
			break
		}
		names = appendName(names, n)
	}
	if len(names) == 0 {
		return b
	}
	for len(names)%8 != 0 {
		names = append(names, 0)
	}
	b = append(b, optDNSSL, byte(1+len(names)/8), 0, 0)
	return append(appendSeconds(b, serverLifetime), names...)
}

// appendSeconds appends a lifetime in seconds, whose highest value is for ever.
func appendSeconds(b []byte, d time.Duration) []byte {
	return binary.BigEndian.AppendUint32(b, uint32(min(d/time.Second, 1<<32-1)))
}
