package dhcp

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"
)

// Route is a classless route for DHCPv4 clients (RFC 3442).
type Route struct {
	Prefix netip.Prefix
	Via    netip.Addr // default: the gateway
}

// Config4 configures a [Server4]. Conn, Prefix, Gateway, and a pool or a
// reservation are required.
type Config4 struct {
	// Conn is bound to port 67. What the server writes to 255.255.255.255
	// must be broadcast on the link. Run closes it.
	Conn net.PacketConn

	Prefix  netip.Prefix // of the link
	Gateway netip.Addr   // router, and the server's identifier
	DNS     []netip.Addr

	// PoolStart and PoolEnd are the first and the last address of the pool;
	// without them only reservations are served.
	PoolStart, PoolEnd netip.Addr
	Reservations       []Reservation

	Domain   string          // option 15; default: the first of Search, for clients that know no other
	Search   func() []string // option 119, asked for every answer; may be nil
	MTU      int             // option 26; 0 leaves it out
	Hostname string          // option 12; empty leaves it out
	// Routes is option 121. The default route is added to them, since clients
	// that know the option ignore the router option when they get both.
	Routes []Route

	LeaseTime time.Duration // default 1 hour
	Logger    *slog.Logger  // default: discard

	// Saved are leases that an earlier server has told to Changed, which gets
	// all of them whenever one has changed. It must not block.
	Saved   []SavedLease
	Changed func([]SavedLease)
}

// Server4 is a DHCPv4 server for one link.
type Server4 struct {
	cfg Config4
	ledger
}

// New4 returns a server that Run starts.
func New4(cfg Config4) (*Server4, error) {
	if cfg.LeaseTime == 0 {
		cfg.LeaseTime = time.Hour
	}
	cfg.Logger = orDiscard(cfg.Logger)
	switch {
	case cfg.Conn == nil:
		return nil, fmt.Errorf("dhcp: configure DHCPv4: no conn")
	case !cfg.Prefix.Addr().Is4() || !cfg.Prefix.Contains(cfg.Gateway):
		return nil, fmt.Errorf("dhcp: configure DHCPv4: gateway %v is not in the IPv4 prefix %v", cfg.Gateway, cfg.Prefix)
	case cfg.MTU != 0 && (cfg.MTU < 68 || cfg.MTU > 65535):
		// RFC 2132 §5.1.
		return nil, fmt.Errorf("dhcp: configure DHCPv4: MTU %d is not in 68 to 65535", cfg.MTU)
	case cfg.LeaseTime < time.Minute:
		return nil, fmt.Errorf("dhcp: configure DHCPv4: lease time %v is under a minute", cfg.LeaseTime)
	case len(cfg.Hostname) > 253 || len(cfg.Domain) > 253:
		return nil, fmt.Errorf("dhcp: configure DHCPv4: name longer than 253 bytes")
	}
	cfg.Routes = slices.Clone(cfg.Routes)
	for i, r := range cfg.Routes {
		if !r.Via.IsValid() {
			cfg.Routes[i].Via = cfg.Gateway
		} else if !r.Via.Is4() {
			return nil, fmt.Errorf("dhcp: configure DHCPv4: router %v of a route is not an IPv4 address", r.Via)
		}
		if !r.Prefix.Addr().Is4() {
			return nil, fmt.Errorf("dhcp: configure DHCPv4: route %v is not an IPv4 prefix", r.Prefix)
		}
	}
	for _, a := range cfg.DNS {
		if !a.Is4() {
			return nil, fmt.Errorf("dhcp: configure DHCPv4: name server %v is not an IPv4 address", a)
		}
	}
	p, err := newPool(cfg.Prefix, cfg.PoolStart, cfg.PoolEnd, cfg.Reservations, append([]netip.Addr{cfg.Gateway}, cfg.DNS...)...)
	if err != nil {
		return nil, fmt.Errorf("dhcp: configure DHCPv4: %w", err)
	}
	p.restore(time.Now(), cfg.Saved)
	return &Server4{cfg: cfg, ledger: newLedger(p)}, nil
}

// Run serves until ctx ends, and closes the conn.
func (s *Server4) Run(ctx context.Context) error {
	return serve(ctx, s.cfg.Conn, s.cfg.Logger, s.handle)
}

func (s *Server4) handle(now time.Time, b []byte, _ netip.Addr) ([]byte, net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Received++
	q, err := parse4(b)
	if err != nil {
		s.stats.Ignored++
		s.log.write(now, s.cfg.Logger, note{slog.LevelDebug, "DHCPv4 message ignored"}, "err", err)
		return nil, nil
	}
	a := decide4(now, &s.cfg, s.pool, q)
	s.pool.tell(now, s.cfg.Changed)
	s.stats.count4(a)
	s.log.write(now, s.cfg.Logger, a.note, "mac", q.mac.String(), "hostname", q.hostname, "addr", a.subject)
	if a.kind == 0 {
		return nil, nil
	}
	var search []string
	if s.cfg.Search != nil {
		search = domains(s.cfg.Search())
	}
	return marshal4(&s.cfg, search, q, a), &net.UDPAddr{IP: ipOf(a.to), Port: 68}
}
