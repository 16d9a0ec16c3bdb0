package forwarder

import (
	"fmt"
	"net/netip"
	"time"
)

// A Reason says why the policy closes an address, or that it does not.
type Reason uint8

// Reasons. The addresses of the first four are closed whatever is allowed.
const (
	Allowed        Reason = iota
	DeniedHost            // the host's loopback or one of its own addresses
	DeniedVirtual         // an address of the guest's subnets that does not exist
	DeniedSpecial         // multicast, reserved, no address at all
	DeniedGuarded         // link-local, or where clouds serve credentials
	DeniedRule            // a deny rule
	DeniedUnlisted        // there are allow rules, but none for it
	reasons
)

// A Verdict is what the policy says of a packet. Rule is the deny rule, if it
// was one.
type Verdict struct {
	Reason Reason
	Rule   *Rule
}

// String says what denied a packet.
func (v Verdict) String() string {
	switch v.Reason {
	case DeniedHost:
		return "the host is closed"
	case DeniedVirtual:
		return "nothing has this address"
	case DeniedSpecial:
		return "no address of a host"
	case DeniedGuarded:
		return "link-local and metadata addresses are closed"
	case DeniedRule:
		return "deny " + v.Rule.String()
	case DeniedUnlisted:
		return "no allow rule names it"
	}
	return "allowed"
}

// String returns the rule as a user writes it.
func (r Rule) String() string {
	s := r.Prefix.String()
	if r.From != 0 || r.To != 1<<16-1 {
		if r.Prefix.Addr().Is6() {
			s = "[" + s + "]"
		}
		s += fmt.Sprintf(":%d", r.From)
		if r.To != r.From {
			s += fmt.Sprintf("-%d", r.To)
		}
	}
	if r.Proto != Any {
		s += "/" + protoName(r.Proto)
	}
	return s
}

func protoName(proto uint8) string {
	switch proto {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMP:
		return "icmp"
	}
	return fmt.Sprint(proto)
}

// DeniedTotal is the sum of Denied and DeniedSource.
func (s *Stats) DeniedTotal() uint64 {
	n := s.DeniedSource.Load()
	for i := range s.Denied {
		n += s.Denied[i].Load()
	}
	return n
}

// address leaves out the port where there are none.
func address(proto uint8, a netip.AddrPort) string {
	if proto == ICMP {
		return a.Addr().String()
	}
	return a.String()
}

// denialsPerMinute is how many denials are logged; the rest is counted.
const denialsPerMinute = 10

// denialLog bounds the log of what a guest may try as fast as it likes. It
// belongs to the engine.
type denialLog struct {
	window time.Time
	logged int
	silent uint64
}

// denied counts a packet of the guest that the policy closes, and logs it. What
// every guest's kernel and browser send, to groups and to neighbours that do not
// exist, is worth no line.
func (f *Forwarder) denied(proto uint8, src, dst, dialled netip.AddrPort, v Verdict) {
	f.stats.Denied[v.Reason].Add(1)
	if v.Reason == DeniedSpecial || v.Reason == DeniedVirtual {
		return
	}
	l := &f.denials
	if f.now.Sub(l.window) >= time.Minute {
		l.window, l.logged = f.now, 0
	}
	if l.logged == denialsPerMinute {
		l.silent++
		return
	}
	l.logged++
	attrs := []any{"protocol", protoName(proto), "guest", address(proto, src), "dst", address(proto, dst), "why", v.String()}
	if dialled != dst {
		attrs = append(attrs, "address", address(proto, dialled))
	}
	if l.silent > 0 {
		attrs = append(attrs, "not_logged", l.silent)
		l.silent = 0
	}
	f.log.Info("denied", attrs...)
}
