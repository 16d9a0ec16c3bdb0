package dns

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

// maxUpstreams is how many upstreams are used; resolv.conf(5) promises three.
const maxUpstreams = 8

// A silent upstream rests for minRest; twice as long each time it is found
// silent again, up to maxRest.
const (
	minRest = 5 * time.Second
	maxRest = 60 * time.Second
)

// transport is how an upstream is asked.
type transport uint8

const (
	overUDP transport = iota
	overTCP
	transports
)

func (t transport) String() string {
	if t == overTCP {
		return "tcp"
	}
	return "udp"
}

// upstream is a resolver and what is known of its health.
type upstream struct {
	addr   netip.AddrPort
	health [transports]health
	latest *socket // the last one that got a port; guarded by sockets.mu
}

// health remembers failures. It reads no clock: now comes in.
type health struct {
	failures  atomic.Int32
	downUntil atomic.Int64 // as time.Duration; 0: up
	answered  atomic.Int64 // when last, as time.Duration
}

// aliveSince reports whether an answer came after then: one name that the
// upstream cannot find out about does not make it dead.
func (h *health) aliveSince(then time.Duration) bool {
	return time.Duration(h.answered.Load()) > then
}

// fail notes that the upstream was silent or refused. It reports whether the
// upstream was up until now.
func (h *health) fail(now time.Duration) bool {
	n := h.failures.Add(1)
	rest := min(minRest<<min(n-1, 5), maxRest)
	return h.downUntil.Swap(int64(now+rest)) == 0
}

// succeed notes an answer. It reports whether the upstream was down until now.
func (h *health) succeed(now time.Duration) bool {
	h.answered.Store(int64(now))
	h.failures.Store(0)
	return h.downUntil.Load() != 0 && h.downUntil.Swap(0) != 0
}

// probe reports whether the upstream is down but has rested: then the caller,
// and for a while nobody else, is to try it.
func (h *health) probe(now time.Duration) bool {
	until := h.downUntil.Load()
	return until != 0 && now >= time.Duration(until) &&
		h.downUntil.CompareAndSwap(until, int64(now+minRest))
}

// upstreams is the set in use. It is never changed, only replaced.
type upstreams struct {
	list []*upstream
}

// order appends to up to order the upstreams in the order in which to ask
// them: as configured, those that are down last. The first parallel of them
// are to be asked at once: a rested upstream is tried beside one that works,
// and if all are down there is nothing to spare.
func (u *upstreams) order(order []*upstream, t transport, now time.Duration) (all []*upstream, parallel int) {
	var up, rested, down [maxUpstreams]*upstream
	nup, nrested, ndown := 0, 0, 0
	for _, s := range u.list {
		h := &s.health[t]
		switch {
		case h.downUntil.Load() == 0:
			up[nup] = s
			nup++
		case h.probe(now):
			rested[nrested] = s
			nrested++
		default:
			down[ndown] = s
			ndown++
		}
	}
	first := min(nup, 1)
	order = append(order, up[:first]...)
	order = append(order, rested[:nrested]...)
	order = append(order, up[first:nup]...)
	order = append(order, down[:ndown]...)
	if nup == 0 {
		return order, len(order)
	}
	return order, first + nrested
}

// makeUpstreams returns the set of addrs, with the health that old knows.
func makeUpstreams(addrs []netip.AddrPort, old *upstreams) *upstreams {
	u := &upstreams{list: make([]*upstream, 0, len(addrs))}
	for _, a := range addrs[:min(len(addrs), maxUpstreams)] {
		up := &upstream{addr: a}
		if old != nil {
			if i := slices.IndexFunc(old.list, func(o *upstream) bool { return o.addr == a }); i >= 0 {
				up = old.list[i]
			}
		}
		u.list = append(u.list, up)
	}
	return u
}
