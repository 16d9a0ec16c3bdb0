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
	last     atomic.Pointer[neighbor] // the entry used most recently

	mu sync.Mutex // guards following
	m  map[netip.Addr]*neighbor
}

type neighbor struct {
	addr netip.Addr
	mac  [6]byte
}

// learn notes that addr was heard from mac.
func (n *neighbors) learn(addr netip.Addr, mac [6]byte) {
	if l := n.last.Load(); l != nil && l.addr == addr && l.mac == mac {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.m[addr]
	if e == nil || e.mac != mac {
		if n.m == nil {
			n.m = make(map[netip.Addr]*neighbor)
		}
		if e == nil && len(n.m) >= maxNeighbors {
			for a := range n.m { // any one
				delete(n.m, a)
				break
			}
		}
		e = &neighbor{addr, mac}
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
