package dhcp

import (
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

// answer6 is what to do about a request. With a zero kind there is no answer.
type answer6 struct {
	kind       dhcpv6.MessageType
	status     iana.StatusCode
	hasStatus  bool
	ias        []iaAnswer
	others     []dhcpv6.Option
	rapid      bool
	parameters bool // name servers and the like

	exhausted bool
	subject   netip.Addr // of the note
	note      note
}

// iaAnswer is what becomes of one identity association.
type iaAnswer struct {
	id     [4]byte
	addr   netip.Addr // the zero Addr if it gets none
	lease  time.Duration
	ended  []netip.Addr // addresses that it must stop using
	status iana.StatusCode
}

// count6 counts an answer.
func (s *Stats) count6(a answer6) {
	switch a.kind {
	case dhcpv6.MessageTypeAdvertise:
		s.Offers++
	case dhcpv6.MessageTypeReply:
		s.Acks++
	}
	if a.exhausted {
		s.Exhausted++
	}
}

// decide6 decides about a request, and brings the lease table up to date.
func decide6(now time.Time, cfg *Config6, p *pool, q request6) answer6 {
	switch q.kind {
	case dhcpv6.MessageTypeSolicit:
		return solicit(now, cfg, p, q)
	case dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeRebind:
		return bind6(now, cfg, p, q)
	case dhcpv6.MessageTypeConfirm:
		return confirm(cfg, q)
	case dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline:
		return giveBack(now, p, q)
	case dhcpv6.MessageTypeInformationRequest:
		return answer6{kind: dhcpv6.MessageTypeReply, parameters: true}
	}
	return answer6{}
}

// clientOf returns the i-th identity association as a client of the lease
// table. A client has at most one reservation, so only the first one gets it.
func (q *request6) clientOf(i int) client {
	c := q.client
	c.key += string(q.ias[i].id[:])
	if i > 0 {
		c.mac = nil
	}
	return c
}

// wanted returns the address that an association names first, if any.
func (a *ia) wanted() netip.Addr {
	if len(a.addrs) > 0 {
		return a.addrs[0]
	}
	return netip.Addr{}
}

// solicit answers a SOLICIT (RFC 8415 §18.3.1).
func solicit(now time.Time, cfg *Config6, p *pool, q request6) answer6 {
	a := answer6{kind: dhcpv6.MessageTypeAdvertise, parameters: true}
	rapid := q.rapid && len(q.ias) > 0
	for i := range q.ias {
		rapid = rapid && !p.scarce(now, q.clientOf(i))
	}
	if rapid {
		a.kind, a.rapid = dhcpv6.MessageTypeReply, true
	}
	for i := range q.ias {
		c := q.clientOf(i)
		x := iaAnswer{id: q.ias[i].id, addr: p.choose(now, c, q.ias[i].wanted())}
		switch {
		case !x.addr.IsValid():
			a.noAddress(p, &x)
		case rapid:
			a.grant(now, cfg, p, c, &x)
		default:
			x.lease = cfg.leaseTime(now, p, c, x.addr)
			p.offer(now, c, x.addr)
		}
		a.ias = append(a.ias, x)
	}
	for _, o := range q.others {
		a.others = append(a.others, refuse(o, iana.StatusNoAddrsAvail, iana.StatusNoPrefixAvail))
	}
	return a
}

// bind6 answers a REQUEST, RENEW or REBIND (RFC 8415 §18.3.2, §18.3.4, §18.3.5).
// All three give the client what it has or names, where that is free; the
// server is the only one, so a binding it knows nothing of is as good as new.
func bind6(now time.Time, cfg *Config6, p *pool, q request6) answer6 {
	a := answer6{kind: dhcpv6.MessageTypeReply, parameters: true}
	request := q.kind == dhcpv6.MessageTypeRequest
	for i, asked := range q.ias {
		c := q.clientOf(i)
		x := iaAnswer{id: asked.id}
		var on []netip.Addr // addresses of this link
		for _, addr := range asked.addrs {
			if cfg.Prefix.Contains(addr) {
				on = append(on, addr)
			} else {
				x.ended = append(x.ended, addr)
			}
		}
		if request && len(x.ended) > 0 {
			// RFC 8415 §18.3.2: an address of another link.
			x.ended, x.status = nil, iana.StatusNotOnLink
			a.ias = append(a.ias, x)
			continue
		}
		if e := p.lease(now, c); e != nil && slices.Contains(on, e.addr) {
			x.addr = e.addr
		} else if n := slices.IndexFunc(on, func(addr netip.Addr) bool { return p.grantable(now, c, addr) }); n >= 0 {
			x.addr = on[n]
		} else {
			x.addr = p.choose(now, c, netip.Addr{})
		}
		if x.addr.IsValid() {
			a.grant(now, cfg, p, c, &x)
		} else {
			a.noAddress(p, &x)
		}
		if !request {
			for _, addr := range on {
				if addr != x.addr {
					x.ended = append(x.ended, addr)
				}
			}
		}
		a.ias = append(a.ias, x)
	}
	for _, o := range q.others {
		if request {
			a.others = append(a.others, refuse(o, iana.StatusNoAddrsAvail, iana.StatusNoPrefixAvail))
		} else {
			a.others = append(a.others, refuse(o, iana.StatusNoBinding, iana.StatusNoBinding))
		}
	}
	return a
}

// confirm answers whether addresses are of this link (RFC 8415 §18.3.3). To a
// client without addresses there is nothing to say.
func confirm(cfg *Config6, q request6) answer6 {
	a := answer6{}
	for _, x := range q.ias {
		for _, addr := range x.addrs {
			a.kind, a.hasStatus = dhcpv6.MessageTypeReply, true
			if !cfg.Prefix.Contains(addr) {
				a.status = iana.StatusNotOnLink
			}
		}
	}
	return a
}

// giveBack answers a RELEASE or DECLINE (RFC 8415 §18.3.7, §18.3.8): success as
// a whole, and no binding for the associations that are not known.
func giveBack(now time.Time, p *pool, q request6) answer6 {
	a := answer6{kind: dhcpv6.MessageTypeReply, hasStatus: true}
	do, n := p.release, note{slog.LevelInfo, "lease released"}
	if q.kind == dhcpv6.MessageTypeDecline {
		do, n = p.decline, note{slog.LevelWarn, "address declined: somebody else uses it"}
	}
	for i, x := range q.ias {
		known := false
		for _, addr := range x.addrs {
			if do(now, q.clientOf(i), addr) {
				known = true
				a.subject, a.note = addr, n
			}
		}
		if !known {
			a.ias = append(a.ias, iaAnswer{id: x.id, status: iana.StatusNoBinding})
		}
	}
	for _, o := range q.others {
		a.others = append(a.others, refuse(o, iana.StatusNoBinding, iana.StatusNoBinding))
	}
	return a
}

// noAddress notes that there is none for x.
func (a *answer6) noAddress(p *pool, x *iaAnswer) {
	x.status = iana.StatusNoAddrsAvail
	if p.first.IsValid() {
		a.exhausted, a.note = true, note{slog.LevelWarn, "no address left in the DHCPv6 pool"}
	}
}

// grant binds x.addr to c.
func (a *answer6) grant(now time.Time, cfg *Config6, p *pool, c client, x *iaAnswer) {
	n := note{slog.LevelInfo, "lease given"}
	if e := p.lease(now, c); e != nil && e.addr == x.addr {
		n = note{slog.LevelDebug, "lease renewed"}
	}
	x.lease = cfg.leaseTime(now, p, c, x.addr)
	p.bind(now, c, x.addr, x.lease)
	if a.note.text == "" || n.level > slog.LevelDebug {
		a.subject, a.note = x.addr, n
	}
}

func (cfg *Config6) leaseTime(now time.Time, p *pool, c client, addr netip.Addr) time.Duration {
	if p.inRange(addr) && p.scarce(now, c) {
		return min(cfg.LeaseTime, scarceLease)
	}
	return cfg.LeaseTime
}
