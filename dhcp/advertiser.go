package dhcp

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Times of router advertisements: RFC 4861 §6.2.1 and §10.
const (
	maxInterval     = 10 * time.Minute
	minInterval     = maxInterval / 3
	initialInterval = 16 * time.Second
	initialCount    = 3
	minDelay        = 3 * time.Second // between multicast advertisements
	routerLifetime  = 3 * maxInterval
	serverLifetime  = 3 * maxInterval // of name servers and domains: RFC 8106 §5
)

// ConfigRA configures an [Advertiser]. Conn and Prefix are required.
type ConfigRA struct {
	// Conn reads router solicitations, as whole ICMPv6 messages that arrived
	// with hop limit 255, and sends ICMPv6 messages with hop limit 255 from a
	// link-local address; its addresses are *net.IPAddr. Run closes it.
	Conn net.PacketConn

	Prefix   netip.Prefix // on-link, and for autoconfiguration if it is a /64
	DNS      []netip.Addr
	Search   func() []string
	MTU      int              // 0 leaves it out
	LinkAddr net.HardwareAddr // of the gateway

	// NotDefault starts without offering a default route; see SetDefaultRouter.
	NotDefault bool
	Managed    bool // M flag: addresses are available by DHCPv6
	Other      bool // O flag: other configuration is

	ValidLifetime     time.Duration // of the prefix; default 24 hours
	PreferredLifetime time.Duration // default 4 hours, at most ValidLifetime

	Logger *slog.Logger // default: discard
}

// Advertiser is the router of one link, to its hosts.
type Advertiser struct {
	cfg  ConfigRA
	kick chan struct{} // something changed

	mu     sync.Mutex // guards following
	router bool
}

// NewAdvertiser returns an advertiser that Run starts.
func NewAdvertiser(cfg ConfigRA) (*Advertiser, error) {
	cfg.Logger = orDiscard(cfg.Logger)
	if cfg.ValidLifetime == 0 {
		cfg.ValidLifetime = 24 * time.Hour
	}
	if cfg.PreferredLifetime == 0 {
		cfg.PreferredLifetime = min(4*time.Hour, cfg.ValidLifetime)
	}
	switch {
	case cfg.Conn == nil:
		return nil, fmt.Errorf("dhcp: configure router advertisements: no conn")
	case !cfg.Prefix.IsValid() || !cfg.Prefix.Addr().Is6() || cfg.Prefix.Addr().Is4In6():
		return nil, fmt.Errorf("dhcp: configure router advertisements: %v is not an IPv6 prefix", cfg.Prefix)
	case cfg.MTU != 0 && cfg.MTU < 1280:
		return nil, fmt.Errorf("dhcp: configure router advertisements: MTU %d is under 1280", cfg.MTU)
	case cfg.PreferredLifetime > cfg.ValidLifetime:
		return nil, fmt.Errorf("dhcp: configure router advertisements: prefix preferred for longer than it is valid")
	case len(cfg.DNS) > 16:
		return nil, fmt.Errorf("dhcp: configure router advertisements: %d name servers are more than 16", len(cfg.DNS))
	case len(cfg.LinkAddr) != 0 && len(cfg.LinkAddr) != 6:
		return nil, fmt.Errorf("dhcp: configure router advertisements: %v is not an Ethernet address", cfg.LinkAddr)
	}
	for _, a := range cfg.DNS {
		if !a.Is6() {
			return nil, fmt.Errorf("dhcp: configure router advertisements: name server %v is not an IPv6 address", a)
		}
	}
	return &Advertiser{cfg: cfg, kick: make(chan struct{}, 1), router: !cfg.NotDefault}, nil
}

// SetDefaultRouter offers a default route or takes it back, and tells the hosts
// at once. It may be called at any time.
func (a *Advertiser) SetDefaultRouter(on bool) {
	a.mu.Lock()
	changed := a.router != on
	a.router = on
	a.mu.Unlock()
	if changed {
		a.Refresh()
	}
}

// Refresh advertises at once, because what Search returns has changed.
func (a *Advertiser) Refresh() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

// Run advertises until ctx ends. Its last advertisement takes the default route
// back (RFC 4861 §6.2.5); then it closes the conn.
func (a *Advertiser) Run(ctx context.Context) error {
	solicited := make(chan netip.Addr, 16)
	readEnd := make(chan error, 1)
	go a.read(solicited, readEnd)
	if err := a.advertise(ctx, solicited, readEnd); err != nil {
		a.cfg.Conn.Close()
		return err
	}
	a.send(allNodes, true)
	a.cfg.Conn.Close()
	<-readEnd
	return nil
}

// read passes the sources of solicitations on until the conn is closed.
func (a *Advertiser) read(solicited chan<- netip.Addr, end chan<- error) {
	buf := make([]byte, maxMessage+1)
	for {
		n, from, err := a.cfg.Conn.ReadFrom(buf)
		if err != nil {
			end <- err
			return
		}
		addr := addrOf(from)
		if n > maxMessage || !validSolicitation(buf[:n], addr) {
			continue
		}
		select {
		case solicited <- addr:
		default: // one advertisement more would not help
		}
	}
}

// advertise sends what the schedule says until ctx ends.
func (a *Advertiser) advertise(ctx context.Context, solicited <-chan netip.Addr, readEnd <-chan error) error {
	s := newSchedule(time.Now())
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if now := time.Now(); s.due(now) {
			a.send(allNodes, false)
			s.sent(now, rand.N(maxInterval-minInterval))
		}
		timer.Reset(time.Until(s.next))
		select {
		case <-ctx.Done():
			return nil
		case err := <-readEnd:
			return fmt.Errorf("dhcp: read solicitation: %w", err)
		case <-a.kick:
			s.changed(time.Now())
		case from := <-solicited:
			if s.solicited(time.Now(), from) {
				a.send(from, false)
			}
		case <-timer.C:
		}
	}
}

// send sends an advertisement.
func (a *Advertiser) send(to netip.Addr, last bool) {
	a.mu.Lock()
	router := a.router
	a.mu.Unlock()
	var search []string
	if a.cfg.Search != nil {
		search = domains(a.cfg.Search())
	}
	m := advertisement(&a.cfg, router && !last, search)
	if _, err := a.cfg.Conn.WriteTo(m, &net.IPAddr{IP: ipOf(to), Zone: to.Zone()}); err != nil {
		a.cfg.Logger.Debug("router advertisement not sent", "to", to, "err", err)
	}
}

// schedule says when to advertise. It reads no clock.
//
//	start, change ──► at once, 16 s, 16 s, then every 200 to 600 s
//	solicitation  ──► at once to its sender; else, with the others,
//	                  3 s after the last multicast
type schedule struct {
	next    time.Time // of the next multicast
	last    time.Time // of the last one
	initial int       // how many follow in the short interval
	unicast rate
}

func newSchedule(now time.Time) *schedule {
	s := &schedule{unicast: rate{burst: 10, perSecond: 10}}
	s.changed(now)
	return s
}

// due reports whether it is time for a multicast.
func (s *schedule) due(now time.Time) bool { return !now.Before(s.next) }

// sent notes a multicast. The jitter keeps routers apart (RFC 4861 §6.2.4).
func (s *schedule) sent(now time.Time, jitter time.Duration) {
	s.last, s.next = now, now.Add(minInterval+jitter)
	if s.initial--; s.initial > 0 {
		s.next = now.Add(min(initialInterval, minInterval+jitter))
	}
}

// changed makes a multicast due at once, and repeats it as at the start. The
// host's side decides when, so there is no limit.
func (s *schedule) changed(now time.Time) {
	s.next, s.initial = now, initialCount
}

// solicited reports whether to answer a solicitation to its sender at once. RFC
// 4861 §6.2.6 wants a random delay of up to half a second, to keep routers
// apart; here there is one. A sender without an address gets a multicast, and
// so do all where there are too many.
func (s *schedule) solicited(now time.Time, from netip.Addr) bool {
	if !from.IsUnspecified() && s.unicast.allow(now) {
		return true
	}
	at := s.last.Add(minDelay)
	if at.Before(now) {
		at = now
	}
	if at.Before(s.next) {
		s.next = at
	}
	return false
}
