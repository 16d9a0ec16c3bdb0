package dhcp

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"slices"
	"time"
)

const (
	offerTime   = 10 * time.Second // how long an offer waits for its request
	restTime    = 10 * time.Minute // how long a declined address is avoided
	scarceLease = 2 * time.Minute  // the lease while the pool is scarce
	maxEntries  = 1024             // bound of the lease table
)

// Reservation ties an address to the guest with a link address.
type Reservation struct {
	LinkAddr net.HardwareAddr
	Addr     netip.Addr
}

// Lease is an address that a guest holds, or is about to.
type Lease struct {
	Addr     netip.Addr
	LinkAddr net.HardwareAddr // nil if the client did not tell
	Client   []byte           // client identifier, or DUID
	Hostname string           // as the client calls itself
	Offered  bool             // offered, not requested yet
	Start    time.Time        // first given to this client
	Expires  time.Time
}

// client is who asks.
type client struct {
	key      string // identifies the client, or one association of it
	id       []byte // what it calls itself
	mac      net.HardwareAddr
	hostname string
}

type state uint8

const (
	offered state = iota
	bound
	released
	declined
)

// entry is what became of one address.
//
//	          offer            request
//	(absent) ───────► offered ────────► bound ──► (until passed)
//	                                    │    │
//	                            release ▼    ▼ decline
//	                             released    declined
//
// Once until has passed, an entry is only the memory of who had the address.
type entry struct {
	client
	addr  netip.Addr
	state state
	start time.Time
	until time.Time
	used  time.Time // orders evictions
}

// held reports whether a client other than the entry's may not have the address.
func (e *entry) held(now time.Time) bool {
	return (e.state == bound || e.state == declined) && now.Before(e.until)
}

// pool is the lease table. It reads no clock.
type pool struct {
	prefix   netip.Prefix
	first    netip.Addr // invalid if there are only reservations
	size     uint64
	hashed   bool // start the search at a hash of the client
	never    map[netip.Addr]bool
	reserved map[netip.Addr]net.HardwareAddr
	byMAC    map[string]netip.Addr
	byAddr   map[netip.Addr]*entry
	byClient map[string]*entry
	changed  bool // a lease, since somebody has looked
}

// newPool checks the range and the reservations. What is in never is not
// handed out, not even as a reservation.
func newPool(prefix netip.Prefix, first, last netip.Addr, rs []Reservation, never ...netip.Addr) (*pool, error) {
	p := &pool{
		prefix:   prefix.Masked(),
		never:    make(map[netip.Addr]bool),
		reserved: make(map[netip.Addr]net.HardwareAddr),
		byMAC:    make(map[string]netip.Addr),
		byAddr:   make(map[netip.Addr]*entry),
		byClient: make(map[string]*entry),
	}
	for _, a := range append(never, p.prefix.Addr(), lastAddr(p.prefix)) {
		p.never[a] = true
	}
	if first.IsValid() || last.IsValid() {
		n, ok := distance(first, last)
		if !ok || !prefix.Contains(first) || !prefix.Contains(last) {
			return nil, fmt.Errorf("pool %v to %v is not a range in %v", first, last, prefix)
		}
		p.first, p.size = first, n+1
	}
	for _, r := range rs {
		if err := p.reserve(r); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// inRange reports whether addr may be handed out to anybody.
func (p *pool) inRange(addr netip.Addr) bool {
	if !p.first.IsValid() || p.never[addr] || p.reserved[addr] != nil {
		return false
	}
	n, ok := distance(p.first, addr)
	return ok && n < p.size
}

// choose returns the address that c should be offered: its reservation, what it
// had, what it wants, or any. The zero Addr means that none is left.
func (p *pool) choose(now time.Time, c client, want netip.Addr) netip.Addr {
	if a, ok := p.byMAC[string(c.mac)]; ok {
		return a
	}
	if e := p.byClient[c.key]; e != nil && e.state != declined && p.inRange(e.addr) {
		return e.addr
	}
	if e := p.byAddr[want]; p.inRange(want) && (e == nil || !now.Before(e.until)) && p.room(now, want) {
		return want
	}
	if len(p.byAddr) < maxEntries+len(p.reserved) {
		if a := p.unused(c); a.IsValid() {
			return a
		}
	}
	if e := p.victim(now); e != nil {
		return e.addr
	}
	return netip.Addr{}
}

// unused returns an address without an entry. It looks at no more addresses
// than there are entries and exceptions, plus one.
func (p *pool) unused(c client) netip.Addr {
	if p.size == 0 {
		return netip.Addr{}
	}
	var from uint64
	if p.hashed {
		h := fnv.New64a()
		h.Write([]byte(c.key))
		from = h.Sum64() % p.size
	}
	tries := min(p.size, uint64(len(p.byAddr)+len(p.never)+len(p.reserved)+1))
	for i := range tries {
		if a := add(p.first, (from+i)%p.size); p.byAddr[a] == nil && p.inRange(a) {
			return a
		}
	}
	return netip.Addr{}
}

// victim returns the entry of the pool that is the least loss: an offer that
// ended, else a lease that ended, an offer, a declined address; each time the
// one unused for longest. It is nil if all are leased.
func (p *pool) victim(now time.Time) *entry {
	var best *entry
	rank := func(e *entry) int {
		ended := !now.Before(e.until)
		switch {
		case ended && e.state == offered:
			return 0
		case ended:
			return 1
		case e.state == offered:
			return 2
		case e.state == declined:
			return 3
		}
		return 4
	}
	for _, e := range p.byAddr {
		if rank(e) == 4 || !p.inRange(e.addr) {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(rank(e), rank(best)), e.used.Compare(best.used), e.addr.Compare(best.addr)) < 0 {
			best = e
		}
	}
	return best
}

// room reports whether there can be an entry for addr.
func (p *pool) room(now time.Time, addr netip.Addr) bool {
	return p.byAddr[addr] != nil || len(p.byAddr) < maxEntries+len(p.reserved) || p.victim(now) != nil
}

// grantable reports whether c may have addr, which is the case too when it is
// merely offered to somebody else.
func (p *pool) grantable(now time.Time, c client, addr netip.Addr) bool {
	if a, ok := p.byMAC[string(c.mac)]; ok {
		return a == addr
	}
	if !p.inRange(addr) || !p.room(now, addr) {
		return false
	}
	e := p.byAddr[addr]
	return e == nil || !e.held(now) || (e.key == c.key && e.state == bound)
}

// offer notes that c was offered addr. An offer never takes an address that
// somebody holds, and leaves a lease of the client itself alone.
func (p *pool) offer(now time.Time, c client, addr netip.Addr) {
	if e := p.byAddr[addr]; e != nil && e.state == bound && now.Before(e.until) {
		return
	}
	p.put(now, c, addr, offered, now.Add(offerTime))
}

// bind gives addr to c for d.
func (p *pool) bind(now time.Time, c client, addr netip.Addr, d time.Duration) {
	p.put(now, c, addr, bound, now.Add(d))
}

func (p *pool) put(now time.Time, c client, addr netip.Addr, s state, until time.Time) {
	start := now
	if e := p.byAddr[addr]; e != nil {
		if e.key == c.key && e.state == bound && s == bound {
			start = e.start
		}
		p.forget(e)
	}
	if e := p.byClient[c.key]; e != nil {
		p.forget(e)
	}
	if len(p.byAddr) >= maxEntries+len(p.reserved) {
		if e := p.victim(now); e != nil {
			p.forget(e)
		}
	}
	c.id, c.mac = bytes.Clone(c.id), bytes.Clone(c.mac)
	e := &entry{client: c, addr: addr, state: s, start: start, until: until, used: now}
	p.byAddr[addr], p.byClient[c.key] = e, e
	p.changed = p.changed || s == bound
}

func (p *pool) forget(e *entry) {
	delete(p.byAddr, e.addr)
	delete(p.byClient, e.key)
}

// lease returns the client's lease that runs, or nil.
func (p *pool) lease(now time.Time, c client) *entry {
	if e := p.byClient[c.key]; e != nil && e.state == bound && now.Before(e.until) {
		return e
	}
	return nil
}

// release ends the client's lease of addr. The address stays the client's own
// as long as nobody else needs it (RFC 2131 §4.3.4).
func (p *pool) release(now time.Time, c client, addr netip.Addr) bool {
	e := p.byClient[c.key]
	if e == nil || e.addr != addr || e.state != bound || !now.Before(e.until) {
		return false
	}
	e.state, e.until, e.used = released, now, now
	p.changed = true
	return true
}

// withdraw ends an offer that the client did not take up.
func (p *pool) withdraw(c client) {
	if e := p.byClient[c.key]; e != nil && e.state == offered {
		p.forget(e)
	}
}

// decline puts addr to rest, if it was given to c. A reserved address is
// forgotten instead: there is no other for its owner.
func (p *pool) decline(now time.Time, c client, addr netip.Addr) bool {
	e := p.byClient[c.key]
	if e == nil || e.addr != addr || (e.state != bound && e.state != offered) {
		return false
	}
	p.changed = true
	if p.reserved[addr] != nil {
		p.forget(e)
		return true
	}
	// The key must not lead the client back here.
	delete(p.byClient, e.key)
	e.key = "declined " + addr.String()
	p.byClient[e.key] = e
	e.state, e.until, e.used = declined, now.Add(restTime), now
	return true
}

// scarce reports whether more than half of the pool is taken by others than c.
func (p *pool) scarce(now time.Time, c client) bool {
	n := 0
	for _, e := range p.byAddr {
		if e.key != c.key && e.held(now) && p.inRange(e.addr) {
			n++
		}
	}
	return uint64(n)*2 > min(p.size, maxEntries)
}

// leases returns what is offered or bound, by address.
func (p *pool) leases(now time.Time) []Lease {
	var ls []Lease
	for _, e := range p.byAddr {
		if e.state > bound || !now.Before(e.until) {
			continue
		}
		ls = append(ls, Lease{
			Addr: e.addr, LinkAddr: bytes.Clone(e.mac), Client: bytes.Clone(e.id), Hostname: e.hostname,
			Offered: e.state == offered, Start: e.start, Expires: e.until,
		})
	}
	slices.SortFunc(ls, func(a, b Lease) int { return a.Addr.Compare(b.Addr) })
	return ls
}

// distance returns b-a, if a ≤ b and both are in one IPv4 network or IPv6 /64.
func distance(a, b netip.Addr) (uint64, bool) {
	if !a.IsValid() || a.BitLen() != b.BitLen() || a.Is4In6() || b.Is4In6() || b.Less(a) {
		return 0, false
	}
	x, y := a.As16(), b.As16()
	n := binary.BigEndian.Uint64(y[8:]) - binary.BigEndian.Uint64(x[8:])
	return n, [8]byte(x[:8]) == [8]byte(y[:8]) && n < 1<<63
}

// add returns a+n, which must be in the same network or /64.
func add(a netip.Addr, n uint64) netip.Addr {
	x := a.As16()
	binary.BigEndian.PutUint64(x[8:], binary.BigEndian.Uint64(x[8:])+n)
	if a.Is4() {
		return netip.AddrFrom4([4]byte(x[12:]))
	}
	return netip.AddrFrom16(x)
}

// lastAddr returns the prefix's last address: the broadcast address of IPv4.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// reserve adds a reservation.
func (p *pool) reserve(r Reservation) error {
	switch {
	case !p.prefix.Contains(r.Addr) || p.never[r.Addr]:
		return fmt.Errorf("reserved address %v is not for guests of %v", r.Addr, p.prefix)
	case len(r.LinkAddr) != 6:
		return fmt.Errorf("reservation of %v: %v is not an Ethernet address", r.Addr, r.LinkAddr)
	case p.reserved[r.Addr] != nil || p.byMAC[string(r.LinkAddr)].IsValid():
		return fmt.Errorf("reservation of %v for %v: either has another one", r.Addr, r.LinkAddr)
	}
	if e := p.byAddr[r.Addr]; e != nil {
		p.forget(e)
	}
	p.reserved[r.Addr] = r.LinkAddr
	p.byMAC[string(r.LinkAddr)] = r.Addr
	return nil
}

// unreserve takes the reservation of a guest back, and all that it has.
func (p *pool) unreserve(mac net.HardwareAddr) {
	if a, ok := p.byMAC[string(mac)]; ok {
		delete(p.byMAC, string(mac))
		delete(p.reserved, a)
	}
	for _, e := range p.byAddr {
		if string(e.mac) == string(mac) {
			p.forget(e)
		}
	}
}
