package dhcp

import (
	"fmt"
	"net"
)

// Reserve ties an address to a guest from now on. Whoever had it loses it.
func (s *Server4) Reserve(r Reservation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.pool.reserve(r); err != nil {
		return fmt.Errorf("dhcp: %w", err)
	}
	return nil
}

// Unreserve forgets a guest, its reservation and its lease.
func (s *Server4) Unreserve(mac net.HardwareAddr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pool.unreserve(mac)
}

// Reserve ties an address to a guest from now on. Whoever had it loses it.
func (s *Server6) Reserve(r Reservation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.pool.reserve(r); err != nil {
		return fmt.Errorf("dhcp: %w", err)
	}
	return nil
}

// Unreserve forgets a guest, its reservation and its lease.
func (s *Server6) Unreserve(mac net.HardwareAddr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pool.unreserve(mac)
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
