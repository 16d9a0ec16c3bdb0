package dns

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// Bounds on what is read of one answer: longer chains are no one's, and more
// addresses nobody tries.
const (
	maxChain   = 16
	maxRecords = 512
)

// tell tells the Answered hook what addresses msg has, whose question ends at
// end.
func (s *Server) tell(msg []byte, end int) {
	if s.cfg.Answered == nil {
		return
	}
	var q [maxName + 5]byte
	if len(msg) < end || end < headerLen+5 || binary.BigEndian.Uint16(msg[4:]) != 1 || msg[3]&maskRcode != rcodeSuccess {
		return
	}
	n := lowerName(&q, msg[headerLen:end])
	name, ok := hostName(q[:n])
	if !ok {
		return
	}
	if addrs, ttl := addresses(msg, end, q[:n]); len(addrs) > 0 {
		s.cfg.Answered(name, addrs, ttl)
	}
}

// hostName returns a name in wire format as text. A name whose labels have other
// bytes than those of hosts could be taken for another one then.
func hostName(wire []byte) (string, bool) {
	var text []byte
	for i := 0; i < len(wire) && wire[i] != 0; {
		label := wire[i+1 : i+1+int(wire[i])]
		for _, c := range label {
			if c <= ' ' || c >= 0x7f || c == '.' || c == '\\' {
				return "", false
			}
		}
		if len(text) > 0 {
			text = append(text, '.')
		}
		text = append(text, label...)
		i += 1 + len(label)
	}
	return string(text), len(text) > 0
}

// addresses returns the addresses that msg, whose question ends at end, has for
// name, in wire format and lower case, or for the name that it is an alias of,
// and so on; and the smallest TTL on the way.
func addresses(msg []byte, end int, name []byte) ([]netip.Addr, time.Duration) {
	var current, owner, target [maxName + 5]byte
	n := copy(current[:], name)
	ttl := uint32(maxTTL / time.Second)
	var addrs []netip.Addr
	for range maxChain {
		alias := 0
		w := walkRecords(msg, end)
		for count := 0; count < maxRecords && w.next() && w.section == answer; count++ {
			if w.class != classIN {
				continue
			}
			switch {
			case w.typ == typeCNAME, w.typ == typeA && w.rdLen == 4, w.typ == typeAAAA && w.rdLen == 16:
			default:
				continue
			}
			if o := expandName(&owner, msg, w.start); o == 0 || string(owner[:o]) != string(current[:n]) {
				continue
			}
			ttl = min(ttl, binary.BigEndian.Uint32(msg[w.ttl:]))
			if w.typ == typeCNAME {
				alias = expandName(&target, msg, w.rd)
				continue
			}
			a, _ := netip.AddrFromSlice(msg[w.rd : w.rd+w.rdLen])
			addrs = append(addrs, a)
		}
		if len(addrs) > 0 || alias == 0 {
			break
		}
		n = copy(current[:], target[:alias])
	}
	return addrs, time.Duration(ttl) * time.Second
}

// expandName copies the name at off of msg to dst, without compression and in
// lower case, and returns its length; 0 if there is none.
func expandName(dst *[maxName + 5]byte, msg []byte, off int) int {
	n := 0
	for limit := len(msg); off < len(msg); {
		c := int(msg[off])
		switch {
		case c == 0:
			dst[n] = 0
			return n + 1
		case c >= 0xc0:
			// Each pointer must point before the last one (RFC 1035 §4.1.4
			// says "prior"), so that there is an end.
			if off+1 >= len(msg) {
				return 0
			}
			to := c&0x3f<<8 | int(msg[off+1])
			if to >= limit || to >= off {
				return 0
			}
			limit, off = to, to
			continue
		case c > 63 || off+1+c > len(msg) || n+1+c >= maxName:
			return 0
		}
		dst[n] = byte(c)
		for i := 1; i <= c; i++ {
			dst[n+i] = lower(msg[off+i])
		}
		n += 1 + c
		off += 1 + c
	}
	return 0
}

// private are the networks that no public name should lead to (RFC 1918,
// RFC 6598, RFC 6890, RFC 4193, RFC 4291).
var private = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("::/127"),
	netip.MustParsePrefix("fc00::/7"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("fec0::/10"),
}

// embedding are networks with an IPv4 address in the last four bytes: v4-mapped,
// v4-compatible, and NAT64's (RFC 6052, RFC 8215).
var embedding = []netip.Prefix{
	netip.MustParsePrefix("::/96"),
	netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("64:ff9b:1::/48"),
}

func isPrivate(a netip.Addr) bool {
	a = a.Unmap()
	if a.Is6() {
		for _, p := range embedding {
			if b := a.As16(); p.Contains(a) && a != netip.IPv6Unspecified() && isPrivate(netip.AddrFrom4([4]byte(b[12:]))) {
				return true
			}
		}
	}
	for _, p := range private {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// holdsPrivate reports whether msg, whose question ends at end, has a private
// address in any section, or cannot be read to its end.
func holdsPrivate(msg []byte, end int) bool {
	if binary.BigEndian.Uint16(msg[4:]) == 0 {
		end = headerLen
	}
	if end > len(msg) {
		return true
	}
	w := walkRecords(msg, end)
	for w.next() {
		rd := msg[w.rd : w.rd+w.rdLen]
		switch w.typ {
		case typeA, typeAAAA:
			if a, ok := netip.AddrFromSlice(rd); !ok || isPrivate(a) {
				return true
			}
		case typeSVCB, typeHTTPS:
			if hintsPrivate(rd) {
				return true
			}
		}
	}
	// A truncated answer may end anywhere: the client asks again over TCP.
	return w.bad && msg[2]&bitTC == 0
}

// hintsPrivate looks at the address hints of a service record (RFC 9460 §2.2,
// §7.3).
func hintsPrivate(rd []byte) bool {
	const ipv4hint, ipv6hint = 4, 6
	if len(rd) < 3 {
		return true
	}
	off := skipName(rd, 2)
	if off < 0 {
		return true
	}
	for rd = rd[off:]; len(rd) >= 4; {
		key, n := binary.BigEndian.Uint16(rd), int(binary.BigEndian.Uint16(rd[2:]))
		if n > len(rd)-4 {
			return true
		}
		value := rd[4 : 4+n]
		rd = rd[4+n:]
		size := 0
		switch key {
		case ipv4hint:
			size = 4
		case ipv6hint:
			size = 16
		}
		for ; size > 0 && len(value) >= size; value = value[size:] {
			if a, _ := netip.AddrFromSlice(value[:size]); isPrivate(a) {
				return true
			}
		}
	}
	return false
}
