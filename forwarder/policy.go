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
	return r.Prefix.Contains(dst.Addr()) && about(r.Proto, r.From, r.To, proto, dst.Port())
}

// about reports whether a rule for ports from to to of proto rule is about a
// packet.
func about(rule uint8, from, to uint16, proto uint8, port uint16) bool {
	return (rule == Any || rule == proto) &&
		(proto == ICMP && from == 0 || proto != ICMP && from <= port && port <= to)
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
	// Deny rules are looked at first, then Allow rules and Names. Once there
	// is one of those, what none of them names is denied.
	Allow, Deny []Rule
	Names       []NameRule
	// Unguarded opens the host's own addresses, but for the loopback, and the
	// guarded ones. The guest is told that what is still closed to it is
	// unreachable, rather than prohibited.
	Unguarded bool
}

// Policy decides what may be dialled and where that is.
type Policy struct {
	cfg   PolicyConfig
	local atomic.Pointer[[]netip.Prefix]
	names names
}

// NewPolicy returns a policy that knows no host addresses yet.
func NewPolicy(cfg PolicyConfig) *Policy {
	p := &Policy{cfg: cfg, names: names{rules: cfg.Names}}
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

// Prefixes in which an IPv4 address hides, and where (RFC 6052, RFC 8215,
// RFC 3056, RFC 4291 §2.5.5, RFC 2765 §2.1). A host with such a route would take
// the guest to that address by another name.
var embedding = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12},
	{netip.MustParsePrefix("2002::/16"), 2},
	{netip.MustParsePrefix("::/96"), 12},
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12},
}

// Resolve says where a guest's packet for dst goes, and whether it may. The
// answer is the address to dial: the host's loopback for a gateway, an unmapped
// address for a v4-mapped one. Everything is judged on that final address.
func (p *Policy) Resolve(proto uint8, dst netip.AddrPort) (netip.AddrPort, Verdict) {
	a := dst.Addr().Unmap().WithZone("")
	dst = netip.AddrPortFrom(a, dst.Port())
	if lo, ok := p.loopback(a); ok {
		dst = netip.AddrPortFrom(lo, dst.Port())
		if !p.hostOpen(proto, dst) {
			return dst, Verdict{Reason: DeniedHost}
		}
		return dst, p.rules(proto, dst)
	}
	for _, v := range p.cfg.Virtual {
		if v.Contains(a) {
			return dst, Verdict{Reason: DeniedVirtual}
		}
	}
	return dst, p.judge(proto, dst)
}

// loopback returns the host's loopback address if a is a gateway's.
func (p *Policy) loopback(a netip.Addr) (netip.Addr, bool) {
	if !slices.Contains(p.cfg.Gateways, a) {
		return a, false
	}
	if a.Is6() {
		return netip.IPv6Loopback(), true
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1}), true
}

// judge judges an address that is no gateway. An IPv4 address inside must be
// open as well, but that the rules name the outer one is enough.
func (p *Policy) judge(proto uint8, dst netip.AddrPort) Verdict {
	if v := p.closed(proto, dst); v.Reason != Allowed {
		return v
	}
	if a := dst.Addr(); a.Is6() {
		b := a.As16()
		for _, e := range embedding {
			if !e.prefix.Contains(a) {
				continue
			}
			in := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[e.at:e.at+4])), dst.Port())
			v := p.closed(proto, in)
			if v.Reason == Allowed {
				v = p.rules(proto, in)
			}
			if v.Reason != Allowed && v.Reason != DeniedUnlisted {
				return v
			}
		}
	}
	return p.rules(proto, dst)
}

// closed finds addresses that no rule can open.
func (p *Policy) closed(proto uint8, dst netip.AddrPort) Verdict {
	a := dst.Addr()
	switch {
	case a.IsLoopback():
		return Verdict{Reason: DeniedHost}
	case p.cfg.Unguarded && proto == UDP && a.Is4() && a.IsMulticast(): // sent, never joined
	case !a.IsValid(), a.IsUnspecified(), a.IsMulticast(), a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240):
		return Verdict{Reason: DeniedSpecial}
	case !p.cfg.Unguarded && p.isLocal(a) && !p.hostOpen(proto, dst):
		return Verdict{Reason: DeniedHost}
	}
	return Verdict{}
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

// denies applies the user's deny rules.
func (p *Policy) denies(proto uint8, dst netip.AddrPort) Verdict {
	for i, r := range p.cfg.Deny {
		if r.matches(proto, dst) {
			return Verdict{DeniedRule, &p.cfg.Deny[i]}
		}
	}
	return Verdict{}
}

// rules applies the user's rules and the guarded addresses.
func (p *Policy) rules(proto uint8, dst netip.AddrPort) Verdict {
	if v := p.denies(proto, dst); v.Reason != Allowed {
		return v
	}
	var guard netip.Prefix
	for _, g := range guarded {
		if !p.cfg.Unguarded && g.Contains(dst.Addr()) {
			guard = g
		}
	}
	for _, r := range p.cfg.Allow {
		if r.matches(proto, dst) && (!guard.IsValid() || r.Prefix.Bits() >= guard.Bits()) {
			return Verdict{}
		}
	}
	switch {
	case guard.IsValid():
		return Verdict{Reason: DeniedGuarded} // whatever a name says
	case len(p.cfg.Allow)+len(p.cfg.Names) == 0, p.names.allow(proto, dst):
		return Verdict{}
	}
	return Verdict{Reason: DeniedUnlisted}
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
// user's rules hold for it all the same. Rules for names are of no use without,
// so with one of those it need not be allowed.
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
	return len(p.cfg.Allow) == 0 || len(p.cfg.Names) > 0
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
	return src, p.judge(UDP, src).Reason == Allowed
}
