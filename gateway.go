package usernet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/dhcp"
	"github.com/usernet/usernet/dns"
	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/stack"
	"github.com/usernet/usernet/tap"
)

// gateway is the router that the guest sees: the rooms, joined.
type gateway struct {
	log    *slog.Logger
	stack  *stack.Stack
	fwd    *forwarder.Forwarder
	policy *forwarder.Policy
	link   *tap.Endpoint
	ra     *dhcp.Advertiser // nil without IPv6
	dns    *dns.Server      // nil without DNS
	dhcp4  *dhcp.Server4
	dhcp6  *dhcp.Server6 // nil without IPv6
	tasks  []func(context.Context) error
	shared *sharedPorts // nil with one guest
}

// Ports of the gateway's services.
const (
	dnsPort         = 53
	dhcpServerPort  = 67
	dhcp6ServerPort = 547
)

// allDHCPAgents is where DHCPv6 clients send to (RFC 8415 section 7.1).
var allDHCPAgents = netip.MustParseAddr("ff02::1:2")

// A seed is what a gateway begins with, and what another one in its place would.
type seed struct {
	Local      []netip.Prefix // the host's own addresses
	Default6   bool           // it has an IPv6 default route
	ResolvConf dns.ResolvConf
	Records    map[string][]netip.Addr // names that the DNS server answers
	Leases4    []dhcp.SavedLease
	Leases6    []dhcp.SavedLease
	Learned    []forwarder.Learned // addresses that rules for names allow
}

// hooks are what a gateway has others do, or tells them. All may be nil.
type hooks struct {
	alone    bool // this process does nothing else
	dialPath func(path string, done func(fd int, errno unix.Errno))
	leases4  func([]dhcp.SavedLease)
	leases6  func([]dhcp.SavedLease)
	learned  func([]forwarder.Learned)
	// wantInside asks for the way into a guest, once for each.
	wantInside func(guest netip.Addr)
}

// newGateway joins the rooms on an open link, whose descriptor it takes.
func newGateway(c Config, link agent.Link, s seed, h hooks) (g *gateway, err error) {
	a := c.Addresses()
	mac := gatewayMAC(a.Gateway4)
	end := tap.NewEndpoint(tap.EndpointOptions{FD: link.FD, MTU: link.MTU, MAC: mac, VnetHdr: link.VnetHdr, HoldAcks: true})
	return joinRooms(c, link, s, h, end, end)
}

// A device is what the guests' frames come from.
type device interface {
	stack.Link
	forwarder.Link
}

// joinRooms joins the rooms on a device, which it takes. end is the device, or
// the gateway's port of it.
func joinRooms(c Config, link agent.Link, s seed, h hooks, dev device, end *tap.Endpoint) (g *gateway, err error) {
	a := c.Addresses()
	mac := gatewayMAC(a.Gateway4)
	var guestMAC [6]byte
	copy(guestMAC[:], link.MAC)
	g = &gateway{log: c.Logger, link: end}
	g.stack, err = stack.New(stack.Config{
		Link:    dev,
		Prefix4: a.Prefix4, Gateway4: a.Gateway4, DNS4: a.DNS4,
		Prefix6: a.Prefix6, Gateway6: a.Gateway6, DNS6: a.DNS6,
		GatewayMAC: mac, GuestMAC: guestMAC, USO: link.USO, Logger: c.Logger,
		SilentDNS: c.NoGuard && c.NoDNS, Multicast: c.NoGuard,
	})
	if err != nil {
		dev.Close()
		return nil, err
	}
	policy := newPolicy(c, a)
	g.policy = policy
	policy.SetLocal(s.Local)
	policy.Restore(s.Learned)
	policy.TellLearned(h.learned)
	outbound := forwarder.Outbound{Addr4: c.OutboundAddr, Addr6: c.OutboundAddr6, Interface: c.OutboundInterface}
	toHost := outbound
	toHost.Loopback = c.NoGuard // the host's resolver may answer only to the host
	g.fwd, err = forwarder.New(forwarder.Config{
		Netstack: g.stack.Netstack(), Link: dev, Guest: guest{g.stack}, Policy: policy,
		Clock: g.stack, Alone: h.alone, Outbound: toHost, Reverse: servers(c.Reverse), DialPath: h.dialPath, NoHandover: c.NoHandover, WantInside: h.wantInside, Logger: c.Logger,
	})
	if err != nil {
		g.stack.Close()
		return nil, err
	}
	g.stack.SetHooks(stack.Hooks{TCP: g.fwd.HandleTCP, Segment: g.fwd.HandleSegment, Sent: g.fwd.HandleSent, UDP: g.fwd.HandleUDP, Echo: g.fwd.HandleEcho})
	if err := errors.Join(g.addDNS(c, a, policy, &outbound, s), g.addDHCP(c, a, link, mac, s, h)); err != nil {
		g.stack.Close()
		return nil, err
	}
	g.setDefaultRouter6(s.Default6)
	return g, nil
}

// guest is the stack as the forwarder sees it.
type guest struct{ *stack.Stack }

// SendICMPError implements forwarder.Guest.
func (g guest) SendICMPError(e forwarder.ICMPError) error {
	return g.Stack.SendICMPError(stack.ICMPError(e))
}

// gatewayMAC makes a locally administered address of the gateway's IPv4
// address, so that a guest finds the same one after a restart.
func gatewayMAC(gateway netip.Addr) [6]byte {
	b := gateway.As4()
	return [6]byte{0x52, 0x55, b[0], b[1], b[2], b[3]}
}

func newPolicy(c Config, a Addresses) *forwarder.Policy {
	p := forwarder.PolicyConfig{
		Gateways: []netip.Addr{a.Gateway4}, Virtual: []netip.Prefix{a.Prefix4},
		HostLoopback: c.HostLoopback, HostPorts: c.HostPorts, Unguarded: c.NoGuard,
		Allow: rules(c.Allow), Deny: rules(c.Deny), Names: nameRules(c.AllowNames),
	}
	if a.Prefix6.IsValid() {
		p.Gateways = append(p.Gateways, a.Gateway6)
		p.Virtual = append(p.Virtual, a.Prefix6)
	}
	return forwarder.NewPolicy(p)
}

func servers(rs []Reverse) map[uint16]forwarder.Server {
	m := make(map[uint16]forwarder.Server, len(rs))
	for _, r := range rs {
		m[r.Port] = forwarder.Server{Addr: r.Host, Path: r.HostPath}
	}
	return m
}

func rules(rs []Rule) []forwarder.Rule {
	out := make([]forwarder.Rule, len(rs))
	for i, r := range rs {
		out[i] = forwarder.Rule{Prefix: r.Prefix, From: r.From, To: r.To, Proto: uint8(r.Protocol)}
	}
	return out
}

func nameRules(rs []NameRule) []forwarder.NameRule {
	out := make([]forwarder.NameRule, len(rs))
	for i, r := range rs {
		out[i] = forwarder.NameRule{Name: r.Name, From: r.From, To: r.To, Proto: uint8(r.Protocol)}
	}
	return out
}

// addDNS makes the DNS server.
func (g *gateway) addDNS(c Config, a Addresses, policy *forwarder.Policy, outbound *forwarder.Outbound, s seed) error {
	if c.NoDNS {
		return nil
	}
	cfg := dns.Config{
		Upstreams: c.DNS, Unread: true, Records: s.Records, Logger: c.Logger,
		Permit: func(u netip.AddrPort) error {
			if !policy.Upstream(u) {
				return fmt.Errorf("name server %v is closed by the egress policy", u)
			}
			return nil
		},
		Bind:      func(fd int, u netip.AddrPort) error { return outbound.Prepare(fd, u.Addr()) },
		Watch:     g.fwd.Watch,
		NoPrivate: c.NoPrivateDNS,
		Zones:     c.zones(),
	}
	if len(c.AllowNames) > 0 {
		cfg.Answered = policy.Learn
	}
	for _, addr := range []netip.Addr{a.DNS4, a.DNS6} {
		if !addr.IsValid() {
			continue
		}
		pc, err := g.stack.ListenPacket(netip.AddrPortFrom(addr, dnsPort))
		if err != nil {
			return err
		}
		l, err := g.stack.Listen(netip.AddrPortFrom(addr, dnsPort))
		if err != nil {
			return err
		}
		cfg.PacketConns = append(cfg.PacketConns, pc)
		cfg.Listeners = append(cfg.Listeners, l)
	}
	var err error
	if g.dns, err = dns.New(cfg); err != nil {
		return err
	}
	g.dns.SetResolvConf(s.ResolvConf)
	g.tasks = append(g.tasks, g.dns.Run)
	return nil
}

// search returns the function that tells the guest's search domains.
func (g *gateway) search(c Config) func() []string {
	if c.Network == "" {
		return g.searchBeyond(c)
	}
	own, beyond := c.Network+"."+networkDomain, g.searchBeyond(c)
	return func() []string { return append([]string{own}, beyond()...) }
}

func (g *gateway) searchBeyond(c Config) func() []string {
	if len(c.DNSSearch) > 0 || g.dns == nil {
		return func() []string { return c.DNSSearch }
	}
	return g.dns.Search
}

// addDHCP makes the DHCP servers and the router advertiser.
func (g *gateway) addDHCP(c Config, a Addresses, link agent.Link, mac [6]byte, s seed, h hooks) error {
	search := g.search(c)
	var dns4, dns6 []netip.Addr
	if !c.NoDNS {
		dns4 = []netip.Addr{a.DNS4}
		if a.DNS6.IsValid() {
			dns6 = []netip.Addr{a.DNS6}
		}
	}
	var reserved4, reserved6 []dhcp.Reservation
	if c.Network != "" {
		// Those of members come and go.
	} else if c.Configure == ConfigureStatic {
		// A DHCP client inside, if there is one, gets what is set already.
		reserved4 = []dhcp.Reservation{{LinkAddr: link.MAC, Addr: a.Guest4}}
	} else if len(link.MAC) > 0 {
		// However many clients a guest makes up, its own keeps its place.
		reserved4 = []dhcp.Reservation{{LinkAddr: link.MAC, Addr: a.PoolStart}}
	}
	if a.Guest6.IsValid() && !c.SLAAC && c.Network == "" {
		reserved6 = []dhcp.Reservation{{LinkAddr: link.MAC, Addr: a.Guest6}}
	}
	conn, err := g.stack.ListenPacket(netip.AddrPortFrom(netip.IPv4Unspecified(), dhcpServerPort))
	if err != nil {
		return err
	}
	s4, err := dhcp.New4(dhcp.Config4{
		Conn: conn, Prefix: a.Prefix4, Gateway: a.Gateway4, DNS: dns4,
		PoolStart: a.PoolStart, PoolEnd: a.PoolEnd, Reservations: reserved4,
		Search: search, MTU: link.MTU, Logger: c.Logger, Saved: s.Leases4, Changed: h.leases4,
	})
	if err != nil {
		return err
	}
	g.dhcp4 = s4
	g.tasks = append(g.tasks, s4.Run)
	if !a.Prefix6.IsValid() {
		return nil
	}
	if conn, err = g.stack.ListenPacket(netip.AddrPortFrom(allDHCPAgents, dhcp6ServerPort)); err != nil {
		return err
	}
	s6, err := dhcp.New6(dhcp.Config6{
		Conn: conn, Prefix: a.Prefix6, Gateway: a.Gateway6, LinkAddr: net.HardwareAddr(mac[:]), DNS: dns6,
		Search: search, PoolStart: addrIn(a.Prefix6, pool6Start), PoolEnd: addrIn(a.Prefix6, pool6End),
		Reservations: reserved6, Logger: c.Logger, Saved: s.Leases6, Changed: h.leases6,
	})
	if err != nil {
		return err
	}
	if conn, err = g.stack.ListenRouter(); err != nil {
		return err
	}
	g.ra, err = dhcp.NewAdvertiser(dhcp.ConfigRA{
		Conn: conn, Prefix: a.Prefix6, DNS: dns6, Search: search, MTU: link.MTU,
		LinkAddr: net.HardwareAddr(mac[:]), NotDefault: true, Managed: !c.SLAAC, Other: !c.SLAAC, Logger: c.Logger,
	})
	if err != nil {
		return err
	}
	if g.dns != nil {
		g.dns.OnSearchChange(func([]string) { g.ra.Refresh() })
	}
	g.dhcp6 = s6
	g.tasks = append(g.tasks, s6.Run, g.ra.Run)
	return nil
}

// The addresses that DHCPv6 leases to guests other than the first.
const (
	pool6Start = 0x1000
	pool6End   = 0x10ff
)

// setDefaultRouter6 says in router advertisements whether the gateway is a
// default router.
func (g *gateway) setDefaultRouter6(on bool) {
	g.fwd.SetRoute6(on)
	if g.ra != nil {
		g.ra.SetDefaultRouter(on)
	}
}

// setLocal tells which addresses are the host's own.
func (g *gateway) setLocal(local []netip.Prefix) { g.policy.SetLocal(local) }

// setResolvConf tells what the host's resolv.conf says.
func (g *gateway) setResolvConf(rc dns.ResolvConf) {
	if g.dns != nil {
		g.dns.SetResolvConf(rc)
	}
}

// publish implements inlet.
func (g *gateway) publish(ctx context.Context, _ Forward, in forwarder.Inbound) (uint64, error) {
	return g.fwd.Publish(ctx, in)
}

// unpublish implements inlet.
func (g *gateway) unpublish(ctx context.Context, number uint64) error {
	return g.fwd.Unpublish(ctx, number)
}

// useInside implements inlet.
func (g *gateway) useInside(ctx context.Context, s *agent.Sockets, own ...netip.Addr) error {
	return g.fwd.UseInside(ctx, inside{s}, own...)
}

// inside is the agent's sockets as the forwarder uses them.
type inside struct{ *agent.Sockets }

// Adopt implements forwarder.Inside.
func (i inside) Adopt(id uint32, c *forwarder.Conn) error {
	return i.Sockets.Adopt(id, (*agent.Conn)(c))
}

// work counts what the gateway has done: frames and connections.
func (g *gateway) work() uint64 {
	link, flows := g.link.Stats(), g.fwd.Stats()
	return link.RxFrames.Load() + link.TxFrames.Load() + flows.TCPTotal.Load()
}

// run serves the guest.
func (g *gateway) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.fwd.Run(ctx) })
	for _, task := range g.tasks {
		group.Go(func() error { return task(ctx) })
	}
	return group.Wait()
}

func (g *gateway) close() { g.stack.Close() }
