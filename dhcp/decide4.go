package dhcp

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// answer4 is what to do about a request. With a zero kind there is no answer.
type answer4 struct {
	kind  dhcpv4.MessageType
	addr  netip.Addr    // the client's, if it gets one
	lease time.Duration // 0 if none is given: INFORM
	rapid bool
	text  string     // of a NAK
	to    netip.Addr // the port is always the client's, 68

	exhausted bool
	subject   netip.Addr // of the note
	note      note
}

// count4 counts an answer.
func (s *Stats) count4(a answer4) {
	switch a.kind {
	case dhcpv4.MessageTypeOffer:
		s.Offers++
	case dhcpv4.MessageTypeAck:
		s.Acks++
	case dhcpv4.MessageTypeNak:
		s.Naks++
	}
	if a.exhausted {
		s.Exhausted++
	}
}

// decide4 decides about a request, and brings the lease table up to date.
func decide4(now time.Time, cfg *Config4, p *pool, q request4) answer4 {
	switch q.kind {
	case dhcpv4.MessageTypeDiscover:
		return discover4(now, cfg, p, q)
	case dhcpv4.MessageTypeRequest:
		return request(now, cfg, p, q)
	case dhcpv4.MessageTypeDecline:
		if q.server == cfg.Gateway && p.decline(now, q.client, q.want) {
			return answer4{subject: q.want, note: note{slog.LevelWarn, "address declined: somebody else uses it"}}
		}
	case dhcpv4.MessageTypeRelease:
		if q.server == cfg.Gateway && p.release(now, q.client, q.ciaddr) {
			return answer4{subject: q.ciaddr, note: note{slog.LevelInfo, "lease released"}}
		}
	case dhcpv4.MessageTypeInform:
		// RFC 2131 §4.3.5: to ciaddr, without a lease, whoever asks. But
		// not to ourselves, or to all.
		if cfg.Prefix.Contains(q.ciaddr) && !p.never[q.ciaddr] {
			return answer4{kind: dhcpv4.MessageTypeAck, to: q.ciaddr}
		}
	}
	return answer4{}
}

// discover4 answers a DISCOVER (RFC 2131 §4.3.1).
func discover4(now time.Time, cfg *Config4, p *pool, q request4) answer4 {
	addr := p.choose(now, q.client, q.want)
	if !addr.IsValid() {
		return answer4{exhausted: true, note: note{slog.LevelWarn, "no address left in the DHCPv4 pool"}}
	}
	d, scarce := cfg.leaseTime(now, p, q, addr)
	if q.rapid && !scarce {
		a := grant4(now, p, q, addr, d)
		a.rapid = true
		return a
	}
	p.offer(now, q.client, addr)
	return answer4{kind: dhcpv4.MessageTypeOffer, addr: addr, lease: d, to: q.replyTo(addr)}
}

// request answers a REQUEST. RFC 2131 §4.3.2 tells the states apart:
//
//	             server id   requested address   ciaddr
//	SELECTING    ours        the offered one     0
//	INIT-REBOOT  –           the former one      0
//	RENEWING     –           –                   the client's (unicast)
//	REBINDING    –           –                   the client's (broadcast)
//
// Where a client mixes them up, what it says about the address still holds.
func request(now time.Time, cfg *Config4, p *pool, q request4) answer4 {
	if q.server.IsValid() && q.server != cfg.Gateway {
		p.withdraw(q.client) // it chose another server
		return answer4{}
	}
	want := q.want
	if !want.IsValid() {
		want = q.ciaddr
	}
	switch {
	case !want.IsValid():
		return answer4{}
	case !cfg.Prefix.Contains(want):
		return nak4(want, fmt.Sprintf("%v is not on this network", want))
	case !p.grantable(now, q.client, want):
		return nak4(want, fmt.Sprintf("%v is not available", want))
	}
	d, _ := cfg.leaseTime(now, p, q, want)
	return grant4(now, p, q, want, d)
}

func nak4(addr netip.Addr, text string) answer4 {
	// RFC 2131 §4.3.2: without a relay a NAK is broadcast, since the client
	// may not have an address that works.
	return answer4{kind: dhcpv4.MessageTypeNak, text: text, to: broadcast4, subject: addr, note: note{slog.LevelInfo, "request refused"}}
}

func grant4(now time.Time, p *pool, q request4, addr netip.Addr, d time.Duration) answer4 {
	n := note{slog.LevelInfo, "lease given"}
	if e := p.lease(now, q.client); e != nil && e.addr == addr {
		n = note{slog.LevelDebug, "lease renewed"}
	}
	p.bind(now, q.client, addr, d)
	return answer4{kind: dhcpv4.MessageTypeAck, addr: addr, lease: d, to: q.replyTo(addr), subject: addr, note: n}
}

// leaseTime returns how long a lease of addr lasts, and whether it is short
// because the pool is scarce. A client may ask for less than it would get.
func (cfg *Config4) leaseTime(now time.Time, p *pool, q request4, addr netip.Addr) (time.Duration, bool) {
	d := cfg.LeaseTime
	if q.lease > 0 {
		d = min(d, max(q.lease, scarceLease))
	}
	if p.inRange(addr) && p.scarce(now, q.client) {
		return min(d, scarceLease), true
	}
	return d, false
}

// replyTo returns where an answer with address addr goes (RFC 2131 §4.1). To a
// client without an address, which cannot be asked for its link address, it is
// broadcast.
func (q *request4) replyTo(addr netip.Addr) netip.Addr {
	if q.ciaddr.IsValid() && q.ciaddr == addr {
		return q.ciaddr
	}
	return broadcast4
}
