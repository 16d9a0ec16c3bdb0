package dhcp

import (
	"fmt"
	"net"
	"sync"
	"time"
)

// Stats counts what a server received and what it answered.
type Stats struct {
	Received  uint64 // messages
	Ignored   uint64 // messages that are malformed, or not for us
	Offers    uint64 // offers, and advertises of DHCPv6
	Acks      uint64 // acknowledgements, and replies of DHCPv6
	Naks      uint64 // DHCPv4 only
	Exhausted uint64 // clients that found no address
}

// ledger is what a server knows of its clients, and what was asked of it.
type ledger struct {
	mu    sync.Mutex // guards following
	pool  *pool
	log   rate
	stats Stats
}

func newLedger(p *pool) ledger { return ledger{pool: p, log: rate{burst: 20, perSecond: 1}} }

// Leases returns what is offered or leased, by address.
func (l *ledger) Leases() []Lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pool.leases(time.Now())
}

// Stats returns the counters.
func (l *ledger) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}

// Reserve ties an address to a guest from now on. Whoever had it loses it.
func (l *ledger) Reserve(r Reservation) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.pool.reserve(r); err != nil {
		return fmt.Errorf("dhcp: %w", err)
	}
	return nil
}

// Unreserve forgets a guest, its reservation and its lease.
func (l *ledger) Unreserve(mac net.HardwareAddr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pool.unreserve(mac)
}
