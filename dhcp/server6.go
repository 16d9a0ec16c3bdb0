package dhcp

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

// Config6 configures a [Server6]. Conn and Prefix are required; with neither a
// pool nor a reservation the server is stateless.
type Config6 struct {
	// Conn receives what is sent to ff02::1:2 port 547. Run closes it.
	Conn net.PacketConn

	Prefix  netip.Prefix // of the link
	Gateway netip.Addr   // never handed out
	// LinkAddr makes the server's DUID, the same in every run. Without it the
	// DUID is random.
	LinkAddr net.HardwareAddr
	DNS      []netip.Addr // never handed out either
	Search   func() []string

	PoolStart, PoolEnd netip.Addr // in one /64
	// Reservations are found by the link address in the client's DUID or, for
	// DUIDs without one, in the link-local address that it asks from.
	Reservations []Reservation

	LeaseTime time.Duration // default 1 hour
	Logger    *slog.Logger  // default: discard

	// Saved are leases that an earlier server has told to Changed, which gets
	// all of them whenever one has changed. It must not block.
	Saved   []SavedLease
	Changed func([]SavedLease)
}

// Server6 is a DHCPv6 server for one link.
type Server6 struct {
	cfg  Config6
	duid []byte
	ledger
}

// New6 returns a server that Run starts.
func New6(cfg Config6) (*Server6, error) {
	if cfg.LeaseTime == 0 {
		cfg.LeaseTime = time.Hour
	}
	cfg.Logger = orDiscard(cfg.Logger)
	switch {
	case cfg.Conn == nil:
		return nil, fmt.Errorf("dhcp: configure DHCPv6: no conn")
	case !cfg.Prefix.IsValid() || !cfg.Prefix.Addr().Is6() || cfg.Prefix.Addr().Is4In6():
		return nil, fmt.Errorf("dhcp: configure DHCPv6: %v is not an IPv6 prefix", cfg.Prefix)
	case cfg.LeaseTime < time.Minute:
		return nil, fmt.Errorf("dhcp: configure DHCPv6: lease time %v is under a minute", cfg.LeaseTime)
	}
	for _, a := range cfg.DNS {
		if !a.Is6() {
			return nil, fmt.Errorf("dhcp: configure DHCPv6: name server %v is not an IPv6 address", a)
		}
	}
	p, err := newPool(cfg.Prefix, cfg.PoolStart, cfg.PoolEnd, cfg.Reservations, append([]netip.Addr{cfg.Gateway}, cfg.DNS...)...)
	if err != nil {
		return nil, fmt.Errorf("dhcp: configure DHCPv6: %w", err)
	}
	p.hashed = true
	p.restore(time.Now(), cfg.Saved)
	s := &Server6{cfg: cfg, ledger: newLedger(p)}
	if len(cfg.LinkAddr) > 0 {
		s.duid = (&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: cfg.LinkAddr}).ToBytes()
	} else {
		var id dhcpv6.DUIDUUID
		rand.Read(id.UUID[:])
		s.duid = id.ToBytes()
	}
	return s, nil
}

// Run serves until ctx ends, and closes the conn.
func (s *Server6) Run(ctx context.Context) error {
	return serve(ctx, s.cfg.Conn, s.cfg.Logger, s.handle)
}

func (s *Server6) handle(now time.Time, b []byte, from netip.Addr) ([]byte, net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Received++
	q, err := parse6(b, from, s.duid)
	if err != nil {
		s.stats.Ignored++
		s.log.write(now, s.cfg.Logger, note{slog.LevelDebug, "DHCPv6 message ignored"}, "err", err)
		return nil, nil
	}
	a := decide6(now, &s.cfg, s.pool, q)
	s.pool.tell(now, s.cfg.Changed)
	s.stats.count6(a)
	s.log.write(now, s.cfg.Logger, a.note, "mac", q.mac.String(), "hostname", q.hostname, "addr", a.subject)
	if a.kind == 0 {
		return nil, nil
	}
	var search []string
	if s.cfg.Search != nil {
		search = domains(s.cfg.Search())
	}
	// RFC 8415 §7.2: clients listen on port 546.
	return marshal6(&s.cfg, s.duid, search, q, a), &net.UDPAddr{IP: ipOf(from), Zone: from.Zone(), Port: 546}
}
