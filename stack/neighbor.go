package stack

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// maxNeighbors bounds the table of link addresses; Linux's own hard limit for
// a neighbour table (gc_thresh3) is twice that. The table holds guests only,
// so a guest that fills it just evicts entries of its own.
const maxNeighbors = 512

// neighbors maps guest addresses to the link addresses that they were last
// heard from. It is learned from frames, so nothing ever waits for ARP.
type neighbors struct {
	fallback [6]byte
	evicted  atomic.Uint64
	last     atomic.Pointer[neighbor] // the entry used most recently

	mu sync.Mutex // guards following
	m  map[netip.Addr]*neighbor
}

type neighbor struct {
	addr  netip.Addr
	mac   [6]byte
	fixed bool // set, not learned
}

// set notes that addr is at mac, whatever is heard.
func (n *neighbors) set(addr netip.Addr, mac [6]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.m == nil {
		n.m = make(map[netip.Addr]*neighbor)
	}
	n.m[addr] = &neighbor{addr, mac, true}
	n.last.Store(nil)
}

// forget forgets addr.
func (n *neighbors) forget(addr netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.m, addr)
	n.last.Store(nil)
}

// learn notes that addr was heard from mac.
func (n *neighbors) learn(addr netip.Addr, mac [6]byte) {
	if l := n.last.Load(); l != nil && l.addr == addr && l.mac == mac {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.m[addr]
	if e != nil && e.fixed {
		return
	}
	if e == nil || e.mac != mac {
		if n.m == nil {
			n.m = make(map[netip.Addr]*neighbor)
		}
		if e == nil && len(n.m) >= maxNeighbors {
			for a, old := range n.m { // any one
				if !old.fixed {
					delete(n.m, a)
					n.evicted.Add(1)
					break
				}
			}
		}
		e = &neighbor{addr, mac, false}
		n.m[addr] = e
	}
	n.last.Store(e)
}

// lookup returns the link address for addr.
func (n *neighbors) lookup(addr netip.Addr) [6]byte {
	if l := n.last.Load(); l != nil && l.addr == addr {
		return l.mac
	}
	if addr.IsMulticast() {
		return multicastMAC(addr)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.m[addr]; e != nil {
		n.last.Store(e)
		return e.mac
	}
	return n.fallback
}

// SetNeighbor says which link address a guest's address has. It holds until
// ForgetNeighbor, whatever is heard from whom.
func (s *Stack) SetNeighbor(addr netip.Addr, mac [6]byte) { s.neigh.set(addr, mac) }

// ForgetNeighbor takes back what SetNeighbor said, or what was learned.
func (s *Stack) ForgetNeighbor(addr netip.Addr) { s.neigh.forget(addr) }

// resolve is lookup for netstack.
func (s *Stack) resolve(a tcpip.Address) [6]byte {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return s.neigh.lookup(addr)
}

// multicastMAC maps a group to its Ethernet address (RFC 1112 §6.4, RFC 2464 §7).
func multicastMAC(a netip.Addr) [6]byte {
	if a.Is4() {
		b := a.As4()
		return [6]byte{0x01, 0x00, 0x5e, b[1] & 0x7f, b[2], b[3]}
	}
	b := a.As16()
	return [6]byte{0x33, 0x33, b[12], b[13], b[14], b[15]}
}
