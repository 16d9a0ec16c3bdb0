package forwarder

import (
	"net/netip"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Protocol numbers of IP (RFC 790); Any matches all in a Rule.
const (
	Any  = 0
	ICMP = 1
	TCP  = 6
	UDP  = 17
)

// Rule names destinations: the addresses in Prefix, and for TCP and UDP the
// ports From to To, both included (0 to 65535 for all).
type Rule struct {
	Prefix   netip.Prefix
	From, To uint16
	Proto    uint8
}

func (r Rule) matches(proto uint8, dst netip.AddrPort) bool {
	return (r.Proto == Any || r.Proto == proto) && r.Prefix.Contains(dst.Addr()) &&
		(proto == ICMP && r.From == 0 || proto != ICMP && r.From <= dst.Port() && dst.Port() <= r.To)
}

// PolicyConfig says what a guest may reach. Its zero value closes the host's
// own addresses and link-local ones, and opens everything else.
type PolicyConfig struct {
	// Gateways are the addresses at which the guest finds the host, Virtual
	// the guest's subnets. Other addresses in those do not exist.
	Gateways []netip.Addr
	Virtual  []netip.Prefix
	// HostLoopback opens the host's loopback at the gateway addresses, and
	// the host's own addresses; HostPorts does so for some ports only.
	HostLoopback bool
	HostPorts    []uint16
	// Deny rules are looked at first, then Allow rules. Once there is an
	// Allow rule, what no Allow rule names is denied.
	Allow, Deny []Rule
	// Unguarded opens the host's own addresses, but for the loopback, and the
	// guarded ones. The guest is told that what is still closed to it is
	// unreachable, rather than prohibited.
	Unguarded bool
}

// Policy decides what may be dialled and where that is.
type Policy struct {
	cfg   PolicyConfig
	local atomic.Pointer[[]netip.Prefix]
}

// NewPolicy returns a policy that knows no host addresses yet.
func NewPolicy(cfg PolicyConfig) *Policy {
	p := &Policy{cfg: cfg}
	p.SetLocal(nil)
	return p
}

// SetLocal replaces the addresses that the host's kernel delivers locally. It
// may be called at any time.
func (p *Policy) SetLocal(local []netip.Prefix) { p.local.Store(&local) }

// guarded are destinations that are closed unless an allow rule that is at
// least as specific opens them: link-local addresses and those where clouds
// serve credentials to whoever asks. 100.100.100.200 and 168.63.129.16 lie in
// no special range.
var guarded = []netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("fd00:ec2::254/128"),
	netip.MustParsePrefix("100.100.100.200/32"),
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("192.0.0.192/32"),
}

// Prefixes in which an IPv4 address hides, and where (RFC 6052, RFC 3056,
// RFC 4291 §2.5.5). A host with such a route would take the guest to that
// address by another name.
var embedding = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},
	{netip.MustParsePrefix("2002::/16"), 2},
	{netip.MustParsePrefix("::/96"), 12},
}

// Resolve says where a guest's packet for dst goes, and whether it may. The
// answer is the address to dial: the host's loopback for a gateway, an unmapped
// address for a v4-mapped one. Everything is judged on that final address.
func (p *Policy) Resolve(proto uint8, dst netip.AddrPort) (netip.AddrPort, bool) {
	a := dst.Addr().Unmap().WithZone("")
	dst = netip.AddrPortFrom(a, dst.Port())
	if slices.Contains(p.cfg.Gateways, a) {
		lo := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if a.Is6() {
			lo = netip.IPv6Loopback()
		}
		dst = netip.AddrPortFrom(lo, dst.Port())
		return dst, p.hostOpen(proto, dst) && p.rules(proto, dst)
	}
	for _, v := range p.cfg.Virtual {
		if v.Contains(a) {
			return dst, false
		}
	}
	return dst, p.open(proto, dst, 0)
}

// open judges an address that is no gateway.
func (p *Policy) open(proto uint8, dst netip.AddrPort, depth int) bool {
	a := dst.Addr()
	if !a.IsValid() || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240) {
		return false
	}
	if !p.cfg.Unguarded && p.isLocal(a) && !p.hostOpen(proto, dst) {
		return false
	}
	if a.Is6() && depth == 0 {
		b := a.As16()
		for _, e := range embedding {
			if e.prefix.Contains(a) {
				in := netip.AddrFrom4([4]byte(b[e.at : e.at+4]))
				if !p.open(proto, netip.AddrPortFrom(in, dst.Port()), depth+1) {
					return false
				}
			}
		}
	}
	return p.rules(proto, dst)
}

// hostOpen reports whether the host itself is open to the guest at dst's port.
func (p *Policy) hostOpen(proto uint8, dst netip.AddrPort) bool {
	return p.cfg.HostLoopback || proto != ICMP && slices.Contains(p.cfg.HostPorts, dst.Port())
}

func (p *Policy) isLocal(a netip.Addr) bool {
	for _, l := range *p.local.Load() {
		if l.Contains(a) {
			return true
		}
	}
	return false
}

// rules applies the user's rules and the guarded addresses.
func (p *Policy) rules(proto uint8, dst netip.AddrPort) bool {
	for _, r := range p.cfg.Deny {
		if r.matches(proto, dst) {
			return false
		}
	}
	var guard netip.Prefix
	for _, g := range guarded {
		if !p.cfg.Unguarded && g.Contains(dst.Addr()) {
			guard = g
		}
	}
	for _, r := range p.cfg.Allow {
		if r.matches(proto, dst) && (!guard.IsValid() || r.Prefix.Bits() >= guard.Bits()) {
			return true
		}
	}
	return len(p.cfg.Allow) == 0 && !guard.IsValid()
}

// refusal is the error that a guest gets for what it may not reach.
func (p *Policy) refusal() unix.Errno {
	if p.cfg.Unguarded {
		return unix.ENETUNREACH
	}
	return unix.EPERM
}

// Upstream reports whether name server a may be asked on the guest's behalf. It
// is the host's choice, so it may be a loopback or link-local address; the
// user's rules hold for it all the same.
func (p *Policy) Upstream(a netip.AddrPort) bool {
	a = netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
	for _, r := range p.cfg.Deny {
		if r.matches(UDP, a) || r.matches(TCP, a) {
			return false
		}
	}
	for _, r := range p.cfg.Allow {
		if r.matches(UDP, a) {
			return true
		}
	}
	return len(p.cfg.Allow) == 0
}

// translate returns the address as which the guest knows the host address src,
// and whether a datagram from there may reach it.
func (p *Policy) translate(src netip.AddrPort) (netip.AddrPort, bool) {
	a := src.Addr().Unmap().WithZone("")
	if a.IsLoopback() {
		for _, g := range p.cfg.Gateways {
			if g.Is4() == a.Is4() {
				return netip.AddrPortFrom(g, src.Port()), p.hostOpen(UDP, src)
			}
		}
		return src, false
	}
	src = netip.AddrPortFrom(a, src.Port())
	return src, p.open(UDP, src, 0)
}
