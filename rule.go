package usernet

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// A Protocol is what a Rule is about.
type Protocol uint8

// Protocols, by their numbers in IP packets. ICMP stands for ICMPv6 too.
const (
	AnyProtocol Protocol = 0
	ICMP        Protocol = 1
	TCP         Protocol = 6
	UDP         Protocol = 17
)

// String returns the protocol's name, or its number.
func (p Protocol) String() string {
	switch p {
	case AnyProtocol:
		return "any"
	case ICMP:
		return "icmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return strconv.Itoa(int(p))
}

// A Rule names destinations: the addresses in Prefix and the ports From to To,
// both included. All ports are 0 to 65535; with fewer the rule is about TCP and
// UDP only.
type Rule struct {
	Prefix   netip.Prefix
	From, To uint16
	Protocol Protocol
}

const lastPort = 1<<16 - 1

func (r Rule) allPorts() bool { return r.From == 0 && r.To == lastPort }

// A NameRule names destinations by what the DNS server answers for Name, in
// lower case and without a final dot. "*.example.com" stands for all names below
// example.com, at any depth, but not for itself. Ports and Protocol are as in a
// Rule.
type NameRule struct {
	Name     string
	From, To uint16
	Protocol Protocol
}

// String returns the rule as ParseRule takes it.
func (r Rule) String() string {
	s := r.Prefix.String()
	if !r.allPorts() && r.Prefix.Addr().Is6() {
		s = "[" + s + "]"
	}
	return s + suffix(r.From, r.To, r.Protocol)
}

// String returns the rule as ParseNameRule takes it.
func (r NameRule) String() string { return r.Name + suffix(r.From, r.To, r.Protocol) }

// suffix writes ports and protocol, where they are not all.
func suffix(from, to uint16, p Protocol) (s string) {
	if from != 0 || to != lastPort {
		s = ":" + strconv.Itoa(int(from))
		if to != from {
			s += "-" + strconv.Itoa(int(to))
		}
	}
	if p != AnyProtocol {
		s += "/" + p.String()
	}
	return s
}

// flaw says what is wrong with the rule, if anything is.
func (r Rule) flaw() string {
	p := r.Prefix
	switch {
	case !p.IsValid():
		return "no addresses given"
	case p.Addr().Is4In6():
		return "IPv4 addresses inside IPv6 ones are taken out before rules are applied: write them as IPv4"
	case p != p.Masked():
		return fmt.Sprintf("the address has bits beyond /%d: write %v for the subnet or %v for the one address", p.Bits(), p.Masked(), p.Addr())
	}
	return portFlaw(r.From, r.To, r.Protocol)
}

// flaw says what is wrong with the rule, if anything is.
func (r NameRule) flaw() string {
	if strings.Trim(r.Name, "0123456789.") == "" && r.Name != "" {
		return "that is an address: use an allow rule"
	}
	name := strings.TrimPrefix(r.Name, "*.")
	switch {
	case strings.Contains(name, "*"):
		return "a star stands for whole labels at the front alone, as in *.example.com"
	case !isDomain(name) || strings.HasSuffix(name, ".") || strings.ToLower(name) != name:
		return "not a domain name in lower case, such as api.example.com or *.example.com"
	}
	return portFlaw(r.From, r.To, r.Protocol)
}

func portFlaw(from, to uint16, p Protocol) string {
	all := from == 0 && to == lastPort
	switch {
	case from > to:
		return fmt.Sprintf("the port range ends before it starts: write %d-%d", to, from)
	case from == 0 && !all:
		return "a port is a number from 1 to 65535"
	case p == ICMP && !all:
		return "ICMP has no ports: leave them out"
	}
	switch p {
	case AnyProtocol, ICMP, TCP, UDP:
		return ""
	}
	return fmt.Sprintf("no protocol %v: there are tcp, udp and icmp", p)
}

// ParseNameRule parses NAME[:PORT[-END]][/tcp|udp|icmp].
//
//	api.example.com:443/tcp
//	*.example.com
func ParseNameRule(s string) (NameRule, error) {
	r := NameRule{To: lastPort}
	rest, proto, found := strings.Cut(s, "/")
	if found {
		var ok bool
		if r.Protocol, ok = parseProtocol(proto); !ok {
			return NameRule{}, badConfig("allow name %q: no protocol %q: there are tcp, udp and icmp", s, proto)
		}
	}
	name, ports, found := strings.Cut(rest, ":")
	if found {
		var ok bool
		if r.From, r.To, ok = parsePorts(ports); !ok {
			return NameRule{}, badConfig("allow name %q: %q is not a port or a range of ports, such as 443 or 8000-8999", s, ports)
		}
	}
	r.Name = strings.ToLower(strings.TrimSuffix(name, "."))
	if why := r.flaw(); why != "" {
		return NameRule{}, badConfig("allow name %q: %s", s, why)
	}
	return r, nil
}

func parseProtocol(s string) (Protocol, bool) {
	switch strings.ToLower(s) {
	case "tcp":
		return TCP, true
	case "udp":
		return UDP, true
	case "icmp":
		return ICMP, true
	}
	return AnyProtocol, false
}

// ParseRule parses CIDR[:PORT[-END]][/tcp|udp|icmp]. A single address stands for
// itself; an IPv6 one with a port is in brackets.
//
//	10.0.0.0/8
//	192.0.2.7:443/tcp
//	[2001:db8::/32]:8000-8999
func ParseRule(s string) (Rule, error) {
	r, why := parseRule(s)
	if why == "" {
		why = r.flaw()
	}
	if why != "" {
		return Rule{}, badConfig("apply rule %q: %s", s, why)
	}
	return r, nil
}

func parseRule(s string) (r Rule, flaw string) {
	const form = "not of the form CIDR[:PORT[-END]][/tcp|udp|icmp]"
	r.To = lastPort
	rest := s
	if i := strings.LastIndexByte(s, '/'); i >= 0 {
		proto := s[i+1:]
		if p, ok := parseProtocol(proto); ok {
			r.Protocol, rest = p, s[:i]
		} else if proto == "" || proto[0] < '0' || proto[0] > '9' {
			return r, fmt.Sprintf("no protocol %q: there are tcp, udp and icmp", proto)
		}
	}
	cidr, ports, hasPorts := splitPorts(rest)
	if hasPorts {
		var ok bool
		if r.From, r.To, ok = parsePorts(ports); !ok {
			return r, fmt.Sprintf("%q is not a port or a range of ports, such as 443 or 8000-8999", ports)
		}
	}
	if p, err := netip.ParsePrefix(cidr); err == nil {
		r.Prefix = p
		return r, ""
	}
	a, err := netip.ParseAddr(cidr)
	switch {
	case err != nil:
		return r, form
	case a.Zone() != "":
		return r, "a zone has no place in a rule: leave it out"
	}
	r.Prefix = netip.PrefixFrom(a, a.BitLen())
	return r, ""
}

// splitPorts cuts the ports off. An IPv6 address without brackets has none, for
// its colons would not tell.
func splitPorts(s string) (cidr, ports string, found bool) {
	if inner, ok := strings.CutPrefix(s, "["); ok {
		cidr, ports, ok = strings.Cut(inner, "]")
		if !ok {
			return s, "", false
		}
		// [ADDRESS]/BITS:PORTS is understood as well as [ADDRESS/BITS]:PORTS.
		bits, ports, found := strings.Cut(ports, ":")
		return cidr + bits, ports, found
	}
	if strings.Count(s, ":") > 1 {
		return s, "", false
	}
	return strings.Cut(s, ":")
}

func parsePorts(s string) (from, to uint16, ok bool) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	return uint16(a), uint16(b), errA == nil && errB == nil && a > 0 && b > 0
}
