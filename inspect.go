package usernet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/dhcp"
	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/capture"
)

// live is what a Network has while it runs.
type live struct {
	link   agent.Link
	inode  uint64
	engine engine
	since  time.Time
	files  string // why the agent sees them
}

// ask has f ask the engine of a running network.
func (n *Network) ask(f func(context.Context, engine) error) error {
	l := n.live.Load()
	if l == nil {
		return ErrNotRunning
	}
	ctx, cancel := context.WithTimeout(context.Background(), engineTime)
	defer cancel()
	return f(ctx, l.engine)
}

// ErrNoFlow is the error of KillFlow for an ID that no flow has.
var ErrNoFlow = errors.New("usernet: no such flow")

// ErrNoRecord is the error of RemoveRecord for a name that is not known.
var ErrNoRecord = errors.New("usernet: no such name")

// ErrNoDNS is the error of what needs the DNS server where there is none.
var ErrNoDNS = errors.New("usernet: this network serves no DNS")

// Info tells what a Network is.
type Info struct {
	Ready bool      `json:"ready"` // the guest can use it
	Since time.Time `json:"since"` // when it attached

	Netns      string `json:"netns,omitempty"` // its path, as configured
	PID        int    `json:"guest_pid,omitempty"`
	NetnsInode uint64 `json:"netns_inode,omitempty"`

	Interface string `json:"interface"`
	Link      string `json:"link"` // tap or veth
	MTU       int    `json:"mtu"`
	MAC       string `json:"mac,omitempty"`
	Offload   bool   `json:"offload"`
	Configure string `json:"configure"`

	Network  string   `json:"network,omitempty"` // a shared one, and what the guest is called there
	Name     string   `json:"name,omitempty"`
	Aliases  []string `json:"aliases,omitempty"`
	Isolated bool     `json:"isolated,omitempty"`

	IPv4 Subnet  `json:"ipv4"`
	IPv6 *Subnet `json:"ipv6,omitempty"`
	DNS  bool    `json:"serves_dns"`

	HostLoopback bool     `json:"host_loopback"`
	HostPorts    []uint16 `json:"host_ports,omitempty"`
	Reverse      []string `json:"reverse,omitempty"` // as ParseReverse takes them

	Sandbox SandboxInfo `json:"sandbox"`
}

// SandboxInfo tells what the process that faces the guest, the worker, is kept
// from.
type SandboxInfo struct {
	WorkerPID      int  `json:"worker_pid,omitempty"`
	NoNewPrivs     bool `json:"no_new_privs"`    // no exec gains rights
	NoCapabilities bool `json:"no_capabilities"` // it has none, and can gain none
	NotDumpable    bool `json:"not_dumpable"`    // other processes cannot look into it
	Seccomp        bool `json:"seccomp"`         // only moving packets is left of the system calls
	Landlock       int  `json:"landlock"`        // version by which all files are closed; 0: the kernel has none
	// Missing says why something is not in force.
	Missing string `json:"missing,omitempty"`
	// AgentFiles says why the helper process inside the namespace sees the host's
	// files. It is empty where it does not, and where there is no helper.
	AgentFiles string `json:"agent_files,omitempty"`
}

// A Subnet is a guest's, of one family.
type Subnet struct {
	Prefix  netip.Prefix `json:"prefix"`
	Gateway netip.Addr   `json:"gateway"`
	DNS     netip.Addr   `json:"dns"`
	Guest   netip.Addr   `json:"guest"`
}

// config is the configuration, with what a shared network has assigned.
func (n *Network) config() Config {
	if m := n.member.Load(); m != nil {
		return m.config()
	}
	return n.cfg
}

// Config returns the configuration, with what a shared network has assigned once
// Ready is closed.
func (n *Network) Config() Config { return n.config() }

// Search returns the domains in which a shared network would have the guest look
// names up.
func (n *Network) Search() []string {
	m := n.member.Load()
	if m == nil {
		return n.cfg.DNSSearch
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.search
}

// Info returns what the network is. Before Run has attached only what was
// configured is known.
func (n *Network) Info() Info {
	c := n.config()
	a := c.Addresses()
	i := Info{
		Netns: c.NetnsPath, PID: c.PID,
		Interface: c.Ifname, Link: string(c.Link), MTU: c.MTU, MAC: c.MAC.String(),
		Configure: string(c.Configure), DNS: !c.NoDNS,
		HostLoopback: c.HostLoopback, HostPorts: c.HostPorts,
		Network: c.Network, Name: c.Name, Aliases: c.Aliases, Isolated: c.Isolate,
		IPv4: Subnet{a.Prefix4, a.Gateway4, a.DNS4, a.Guest4},
	}
	for _, r := range c.Reverse {
		i.Reverse = append(i.Reverse, r.String())
	}
	if a.Prefix6.IsValid() {
		i.IPv6 = &Subnet{a.Prefix6, a.Gateway6, a.DNS6, a.Guest6}
	}
	select {
	case <-n.ready:
		i.Ready = true
	default:
	}
	if l := n.live.Load(); l != nil {
		i.Since, i.NetnsInode = l.since.Round(0), l.inode
		i.Interface, i.Link, i.MTU, i.Offload = l.link.Name, string(l.link.Kind), l.link.MTU, l.link.Offload
		i.MAC = net.HardwareAddr(l.link.MAC).String()
		if r, ok := l.engine.(*remote); ok {
			i.Sandbox = r.sandboxInfo()
		} else if m := n.member.Load(); m != nil {
			i.Sandbox = m.sandboxInfo()
		} else {
			i.Sandbox.Missing = "there is no process of its own for the gateway"
		}
		i.Sandbox.AgentFiles = l.files
	} else {
		i.Ready = false
	}
	return i
}

// A Flow is a TCP connection, a UDP socket or a ping of the guest.
type Flow struct {
	ID        string `json:"id"`
	Member    string `json:"member,omitempty"` // whose it is, on a shared network
	Protocol  string `json:"protocol"`         // tcp, udp or icmp
	Direction string `json:"direction"`        // outbound, or inbound through a forward
	// Remote is the far end as the guest knows it, Host as the host does: for
	// the gateway's address that is the host's loopback. A UDP socket of the
	// guest may talk to many, these are the last. Ports of pings are their
	// identifiers, and 0 at the far end.
	Guest  netip.AddrPort `json:"guest"`
	Remote netip.AddrPort `json:"remote"`
	Host   netip.AddrPort `json:"host"`
	// State is connecting, accepting, established, guest-closed, host-closed
	// or closing for TCP, and active for others.
	State string `json:"state"`
	Up    uint64 `json:"bytes_up"`   // payload from the guest
	Down  uint64 `json:"bytes_down"` // payload to the guest
	// Age is the time since the flow began, Idle since it carried anything, in
	// seconds.
	Age  float64 `json:"age_seconds"`
	Idle float64 `json:"idle_seconds"`
}

// Flows lists who talks to whom. Traffic goes on meanwhile.
func (n *Network) Flows(ctx context.Context) ([]Flow, error) {
	if m := n.member.Load(); m != nil {
		var flows []Flow
		err := m.ask(ctx, hubRequest{Op: opFlows}, &flows)
		return flows, err
	}
	l := n.live.Load()
	if l == nil {
		return nil, ErrNotRunning
	}
	return l.engine.flows(ctx)
}

// flows implements engine.
func (g *gateway) flows(ctx context.Context) ([]Flow, error) {
	list, err := g.fwd.Flows(ctx)
	if err != nil {
		return nil, ended(err)
	}
	flows := make([]Flow, len(list))
	for i, f := range list {
		direction := "outbound"
		if f.Inbound {
			direction = "inbound"
		}
		flows[i] = Flow{
			ID: forwarder.FlowID(f.ID), Protocol: Protocol(f.Proto).String(), Direction: direction,
			Guest: f.Guest, Remote: f.Remote, Host: f.Dialled, State: f.State,
			Up: f.Up, Down: f.Down, Age: f.Age.Seconds(), Idle: f.Idle.Seconds(),
		}
	}
	return flows, nil
}

// ended tells the end of the network from other errors.
func ended(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return ErrNotRunning
	}
	return fmt.Errorf("usernet: %w", err)
}

// KillFlow ends a flow. Both ends of a TCP connection get a reset.
func (n *Network) KillFlow(ctx context.Context, id string) error {
	if m := n.member.Load(); m != nil {
		return m.ask(ctx, hubRequest{Op: opKillFlow, Text: id}, nil)
	}
	l := n.live.Load()
	if l == nil {
		return ErrNotRunning
	}
	return l.engine.killFlow(ctx, id)
}

// killFlow implements engine.
func (g *gateway) killFlow(ctx context.Context, id string) error {
	num, ok := forwarder.ParseFlowID(id)
	if !ok {
		return ErrNoFlow
	}
	err := g.fwd.KillFlow(ctx, num)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, forwarder.ErrNoFlow):
		return ErrNoFlow
	}
	return ended(err)
}

// LogLevelChanged tells a running network that the Logger of its Config takes
// other levels than before.
func (n *Network) LogLevelChanged() {
	if l := n.live.Load(); l != nil {
		if r, ok := l.engine.(*remote); ok {
			r.setLogLevel()
		}
	}
}

// A Lease is an address that a guest has by DHCP.
type Lease struct {
	Member   string     `json:"member,omitempty"` // whose it is, on a shared network
	Addr     netip.Addr `json:"address"`
	MAC      string     `json:"mac,omitempty"`
	Client   string     `json:"client_id,omitempty"` // client identifier or DUID, in hexadecimal
	Hostname string     `json:"hostname,omitempty"`
	Offered  bool       `json:"offered"` // offered, not requested yet
	Since    time.Time  `json:"since"`
	Expires  time.Time  `json:"expires"`
}

// Leases lists the addresses that DHCP has given, of both families.
func (n *Network) Leases() []Lease {
	if m := n.member.Load(); m != nil {
		leases := []Lease{}
		_ = m.ask(context.Background(), hubRequest{Op: opLeases}, &leases)
		return leases
	}
	leases := []Lease{}
	_ = n.ask(func(ctx context.Context, e engine) error {
		list, err := e.leases(ctx)
		if err == nil {
			leases = list
		}
		return err
	})
	return leases
}

// leases implements engine.
func (g *gateway) leases(context.Context) ([]Lease, error) {
	leases := []Lease{}
	list := g.dhcp4.Leases()
	if g.dhcp6 != nil {
		list = append(list, g.dhcp6.Leases()...)
	}
	slices.SortFunc(list, func(a, b dhcp.Lease) int { return a.Addr.Compare(b.Addr) })
	for _, d := range list {
		leases = append(leases, Lease{
			Addr: d.Addr, MAC: d.LinkAddr.String(), Client: fmt.Sprintf("%x", d.Client), Hostname: d.Hostname,
			Offered: d.Offered, Since: d.Start.Round(0), Expires: d.Expires.Round(0),
		})
	}
	return leases, nil
}

// A Record is a name that the DNS server answers by itself.
type Record struct {
	Name  string       `json:"name"`
	Addrs []netip.Addr `json:"addresses"`
}

// maxRecords bounds the names: every change copies their index.
const maxRecords = 4096

// Records lists the names that the DNS server answers by itself.
func (n *Network) Records() (records []Record, err error) {
	if m := n.member.Load(); m != nil {
		err = m.ask(context.Background(), hubRequest{Op: opRecords}, &records)
		return records, err
	}
	err = n.ask(func(ctx context.Context, e engine) (err error) {
		records, err = e.records(ctx)
		return err
	})
	return records, err
}

// records implements engine.
func (g *gateway) records(context.Context) ([]Record, error) {
	if g.dns == nil {
		return nil, ErrNoDNS
	}
	all := g.dns.Records()
	records := make([]Record, 0, len(all))
	for _, name := range slices.Sorted(maps.Keys(all)) {
		records = append(records, Record{name, all[name]})
	}
	return records, nil
}

// SetRecord gives a name its addresses, in place of those it had.
func (n *Network) SetRecord(name string, addrs ...netip.Addr) error {
	if m := n.member.Load(); m != nil {
		return m.ask(context.Background(), hubRequest{Op: opSetRecord, Text: name, Addrs: addrs}, nil)
	}
	return n.ask(func(ctx context.Context, e engine) error { return e.setRecord(ctx, name, addrs) })
}

// setRecord implements engine.
func (g *gateway) setRecord(_ context.Context, name string, addrs []netip.Addr) error {
	if err := g.acceptsRecord(name, addrs); err != nil {
		return err
	}
	if err := g.dns.SetRecord(name, addrs...); err != nil {
		return badConfig("%v", err)
	}
	return nil
}

// acceptsRecord tells why a name cannot have addresses.
func (g *gateway) acceptsRecord(name string, addrs []netip.Addr) error {
	switch {
	case g.dns == nil:
		return ErrNoDNS
	case len(addrs) == 0:
		return badConfig("name %q: give it an address", name)
	case len(g.dns.Records()) >= maxRecords:
		return badConfig("name %q: there are %d already: remove some", name, maxRecords)
	}
	return nil
}

// AddRecord gives a name addresses beside those it has.
func (n *Network) AddRecord(name string, addrs ...netip.Addr) error {
	if m := n.member.Load(); m != nil {
		return m.ask(context.Background(), hubRequest{Op: opAddRecord, Text: name, Addrs: addrs}, nil)
	}
	return n.ask(func(ctx context.Context, e engine) error {
		_, err := e.addRecord(ctx, name, addrs)
		return err
	})
}

// addRecord implements engine.
func (g *gateway) addRecord(_ context.Context, name string, addrs []netip.Addr) ([]netip.Addr, error) {
	if err := g.acceptsRecord(name, addrs); err != nil {
		return nil, err
	}
	all, err := g.dns.AddRecord(name, addrs...)
	if err != nil {
		return nil, badConfig("%v", err)
	}
	return all, nil
}

// RemoveRecord takes a name away.
func (n *Network) RemoveRecord(name string) error {
	if m := n.member.Load(); m != nil {
		return m.ask(context.Background(), hubRequest{Op: opRemRecord, Text: name}, nil)
	}
	return n.ask(func(ctx context.Context, e engine) error { return e.removeRecord(ctx, name) })
}

// removeRecord implements engine.
func (g *gateway) removeRecord(_ context.Context, name string) error {
	switch {
	case g.dns == nil:
		return ErrNoDNS
	case !g.dns.RemoveRecord(name):
		return ErrNoRecord
	}
	return nil
}

// CaptureOptions say which frames to capture, and how much of each.
type CaptureOptions struct {
	// Filter chooses frames, in the language of docs/capture.md; "" is all.
	Filter string
	// Snaplen is how many bytes of a frame are written at most; 0 is all.
	Snaplen int
}

// ErrCaptures is the error of Capture when there are too many at a time.
var ErrCaptures = errors.New("usernet: too many captures run already: end one first")

// Capture writes the frames of the guest's link to w, as pcapng, until ctx is
// done or w fails. Traffic does not wait for w: what that has no room for is
// dropped and counted in what it gets. Published TCP ports that bypass the link
// are not on it. On a shared network they are the frames of all its guests.
func (n *Network) Capture(ctx context.Context, w io.Writer, o CaptureOptions) error {
	_, err := capture.ParseFilter(o.Filter)
	switch {
	case err != nil:
		return badConfig("capture: %v", err)
	case o.Snaplen < 0 || o.Snaplen > capture.MaxSnaplen:
		return badConfig("capture: snap length %d: choose one up to %d, or 0 for whole frames", o.Snaplen, capture.MaxSnaplen)
	}
	l := n.live.Load()
	switch {
	case l == nil:
		return ErrNotRunning
	}
	if m := n.member.Load(); m != nil {
		err = captureShared(ctx, m.place, w, o)
	} else {
		err = l.engine.capture(ctx, w, l.link.Name, o)
	}
	if err != nil && !errors.Is(err, ErrCaptures) {
		return fmt.Errorf("usernet: capture: %w", err)
	}
	return err
}

// capture implements engine.
func (g *gateway) capture(ctx context.Context, w io.Writer, name string, o CaptureOptions) error {
	filter, err := capture.ParseFilter(o.Filter)
	if err != nil {
		return err
	}
	err = g.link.Recorder().Stream(ctx, w, capture.Options{Name: name, Filter: filter, Snaplen: o.Snaplen})
	if errors.Is(err, capture.ErrBusy) {
		return ErrCaptures
	}
	return err
}

// Stats are counters since the network began, but for those that say "now".
type Stats struct {
	Flows    FlowStats     `json:"flows"`
	Link     LinkStats     `json:"link"`
	Dropped  DropStats     `json:"dropped"`
	Denied   DenialStats   `json:"denied"`
	Netstack NetstackStats `json:"netstack"`
	DNS      *DNSStats     `json:"dns,omitempty"`
	DHCP4    DHCPStats     `json:"dhcp4"`
	DHCP6    *DHCPStats    `json:"dhcp6,omitempty"`
	Forwards int           `json:"forwards"` // published now
	Switch   *SwitchStats  `json:"switch,omitempty"`
	Process  ProcessStats  `json:"process"`
}

// ProcessStats tell what serving takes.
type ProcessStats struct {
	GoroutinesNow int `json:"goroutines_now"` // a flow has none of its own
	FilesNow      int `json:"files_now"`      // open descriptors: a flow has one or two
	// Restarts counts workers that have taken the place of one that had ended:
	// with each, the other counters begin anew.
	Restarts uint64 `json:"worker_restarts"`
}

// FlowStats count what the guest has begun, and what became of it.
type FlowStats struct {
	TCPNow     int64  `json:"tcp_now"`
	UDPNow     int64  `json:"udp_now"`
	ICMPNow    int64  `json:"icmp_now"`
	DialingNow int64  `json:"dialing_now"`
	TCP        uint64 `json:"tcp"`
	UDP        uint64 `json:"udp"`
	ICMP       uint64 `json:"icmp"`
	Refused    uint64 `json:"refused"`     // by the far end or the network
	Denied     uint64 `json:"denied"`      // by the egress policy
	HandedOver uint64 `json:"handed_over"` // TCP connections that went on past the interface
	LearnedNow int    `json:"learned_now"` // addresses that are allowed by their names
	BytesUp    uint64 `json:"tcp_bytes_up"`
	BytesDown  uint64 `json:"tcp_bytes_down"`
	UDPUp      uint64 `json:"udp_bytes_up"`
	UDPDown    uint64 `json:"udp_bytes_down"`
}

// LinkStats count frames, seen from the gateway: received are the guest's.
type LinkStats struct {
	RxFrames uint64 `json:"rx_frames"`
	RxBytes  uint64 `json:"rx_bytes"`
	TxFrames uint64 `json:"tx_frames"`
	TxBytes  uint64 `json:"tx_bytes"`
}

// DropStats count what was lost, by reason.
type DropStats struct {
	BadFrame     uint64 `json:"bad_frame"`         // too short, or with impossible offloads
	BadChecksum  uint64 `json:"bad_checksum"`      // of TCP
	Malformed    uint64 `json:"malformed"`         // impossible lengths, other checksums
	Spoofed      uint64 `json:"spoofed"`           // a source that is not the guest's
	Foreign      uint64 `json:"foreign"`           // for another station
	Fragments    uint64 `json:"fragments"`         // overlap with others, or of impossible length
	Neighbors    uint64 `json:"neighbors_evicted"` // link addresses of the guest that made room for others
	LinkRefused  uint64 `json:"link_refused"`      // the guest's interface did not take it
	QueueFull    uint64 `json:"queue_full"`        // for DHCP or DNS, too many at once
	ICMPLimited  uint64 `json:"icmp_limited"`      // ICMP errors above the rate limit
	UDPHost      uint64 `json:"udp_host"`          // a host socket did not take it
	DialsFull    uint64 `json:"dials_full"`        // too many connection attempts at once
	SYNFlood     uint64 `json:"syn_flood"`         // too many that come to nothing
	UDPEvicted   uint64 `json:"udp_evicted"`       // flows that made room for newer ones
	ICMPEvicted  uint64 `json:"icmp_evicted"`      // likewise
	DNSDropped   uint64 `json:"dns_dropped"`       // were no queries at all
	DHCPIgnored  uint64 `json:"dhcp_ignored"`      // malformed, or for another server
	DNSOverload  uint64 `json:"dns_overload"`      // queries that found too many waiting
	DHCPNoneFree uint64 `json:"dhcp_no_lease"`     // clients that found no address
	Capture      uint64 `json:"capture"`           // frames that a capture's reader was too slow for: the guest has lost nothing
}

// DenialStats count what the egress policy has kept the guest from, by reason.
type DenialStats struct {
	Host     uint64 `json:"host"`        // the host's loopback and its own addresses
	Metadata uint64 `json:"metadata"`    // link-local, and where clouds serve credentials
	Rule     uint64 `json:"rule"`        // a deny rule
	Unlisted uint64 `json:"unlisted"`    // there are allow rules, but none for it
	Virtual  uint64 `json:"virtual"`     // addresses of the guest's subnets that do not exist
	Special  uint64 `json:"special"`     // multicast and reserved addresses
	Source   uint64 `json:"source"`      // datagrams from outside, of one that the guest may not talk to
	DNS      uint64 `json:"private_dns"` // queries whose answer held a private address
}

// NetstackStats count what the TCP of the guest's side went through.
type NetstackStats struct {
	Received        uint64 `json:"segments_received"`
	Sent            uint64 `json:"segments_sent"`
	Malformed       uint64 `json:"malformed"`
	ChecksumErrors  uint64 `json:"tcp_checksum_errors"`
	Retransmits     uint64 `json:"tcp_retransmits"`
	FastRetransmits uint64 `json:"tcp_fast_retransmits"`
	Timeouts        uint64 `json:"tcp_timeouts"`
	ResetsSent      uint64 `json:"tcp_resets_sent"`
	ResetsReceived  uint64 `json:"tcp_resets_received"`
	EstablishedNow  uint64 `json:"tcp_established_now"`
	AcksHeld        uint64 `json:"acks_held"`
	AcksLate        uint64 `json:"acks_sent_late"`
}

// DNSStats count queries of the guest.
type DNSStats struct {
	Queries         uint64 `json:"queries"`
	Malformed       uint64 `json:"malformed"`
	Local           uint64 `json:"local"`
	CacheHits       uint64 `json:"cache_hits"`
	Forwarded       uint64 `json:"forwarded"`
	Merged          uint64 `json:"merged"`
	Failed          uint64 `json:"failed"`
	UpstreamQueries uint64 `json:"upstream_queries"`
	UpstreamErrors  uint64 `json:"upstream_errors"`
	Mismatched      uint64 `json:"upstream_mismatched"`
	InFlightNow     int    `json:"in_flight_now"`
	CacheEntriesNow int    `json:"cache_entries_now"`
	CacheBytesNow   int    `json:"cache_bytes_now"`
}

// DHCPStats count messages of the guest and answers.
type DHCPStats struct {
	Received  uint64 `json:"received"`
	Offers    uint64 `json:"offers"`
	Acks      uint64 `json:"acks"`
	Naks      uint64 `json:"naks"`
	LeasesNow int    `json:"leases_now"`
}

// Stats returns the counters.
func (n *Network) Stats() Stats {
	var s Stats
	if m := n.member.Load(); m != nil {
		_ = m.ask(context.Background(), hubRequest{Op: opStats}, &s)
		return s
	}
	_ = n.ask(func(ctx context.Context, e engine) error {
		got, err := e.stats(ctx)
		if err == nil {
			s = got
			s.Forwards = len(n.Forwards())
		}
		return err
	})
	return s
}

// stats implements engine.
func (g *gateway) stats(context.Context) (Stats, error) {
	f, link, st, ns := g.fwd.Stats(), g.link.Stats(), g.stack.Stats(), g.fwd.Netstack()
	s := Stats{
		Flows: FlowStats{
			TCPNow: f.TCPActive.Load(), UDPNow: f.UDPActive.Load(), ICMPNow: f.EchoActive.Load(), DialingNow: f.Dialing.Load(),
			TCP: f.TCPTotal.Load(), UDP: f.UDPTotal.Load(), ICMP: f.EchoTotal.Load(),
			Refused: f.Refused.Load(), Denied: f.DeniedTotal(), HandedOver: f.HandedOver.Load(), LearnedNow: g.policy.Learned(), BytesUp: f.BytesUp.Load(), BytesDown: f.BytesDown.Load(),
			UDPUp: f.UDPBytesUp.Load(), UDPDown: f.UDPBytesDown.Load(),
		},
		Link: LinkStats{link.RxFrames.Load(), link.RxBytes.Load(), link.TxFrames.Load(), link.TxBytes.Load()},
		Dropped: DropStats{
			BadFrame: link.RxBad.Load(), BadChecksum: link.RxChecksum.Load(), LinkRefused: link.TxDropped.Load(),
			Malformed: st.Malformed.Load(), Spoofed: st.Spoofed.Load(), Foreign: st.Foreign.Load(),
			Fragments: g.stack.BadFragments(), Neighbors: g.stack.NeighborsEvicted(),
			QueueFull: st.QueueDropped.Load(), ICMPLimited: st.ICMPLimited.Load(), SYNFlood: st.SYNsDropped.Load(),
			UDPHost: f.UDPDropped.Load(), DialsFull: f.DialsDropped.Load(), UDPEvicted: f.UDPEvicted.Load(), ICMPEvicted: f.EchoEvicted.Load(),
			Capture: g.link.Recorder().Dropped(),
		},
		Denied: DenialStats{
			Host: f.Denied[forwarder.DeniedHost].Load(), Metadata: f.Denied[forwarder.DeniedGuarded].Load(),
			Rule: f.Denied[forwarder.DeniedRule].Load(), Unlisted: f.Denied[forwarder.DeniedUnlisted].Load(),
			Virtual: f.Denied[forwarder.DeniedVirtual].Load(), Special: f.Denied[forwarder.DeniedSpecial].Load(),
			Source: f.DeniedSource.Load(),
		},
		Netstack: NetstackStats{
			Received: ns.Received, Sent: ns.Sent, Malformed: ns.MalformedReceived, ChecksumErrors: ns.ChecksumErrors,
			Retransmits: ns.Retransmits, FastRetransmits: ns.FastRetransmit, Timeouts: ns.Timeouts,
			ResetsSent: ns.ResetsSent, ResetsReceived: ns.ResetsReceived, EstablishedNow: ns.Established,
			AcksHeld: link.AcksHeld.Load(), AcksLate: link.AcksSent.Load(),
		},
		Process: ProcessStats{GoroutinesNow: runtime.NumGoroutine(), FilesNow: openFiles()},
	}
	if g.dns != nil {
		d := g.dns.Stats()
		s.DNS = &DNSStats{
			Queries: d.Queries, Malformed: d.Malformed, Local: d.Local, CacheHits: d.Hits, Forwarded: d.Forwarded,
			Merged: d.Merged, Failed: d.Failed, UpstreamQueries: d.UpstreamQueries, UpstreamErrors: d.UpstreamErrors,
			Mismatched: d.Mismatched, InFlightNow: d.InFlight, CacheEntriesNow: d.CacheEntries, CacheBytesNow: d.CacheBytes,
		}
		s.Denied.DNS = d.Rebound
		s.Dropped.DNSDropped, s.Dropped.DNSOverload = d.Dropped, d.Overload
	}
	if g.shared != nil {
		s.Switch = g.shared.stats()
	}
	s.DHCP4 = s.addDHCP(g.dhcp4.Stats(), len(g.dhcp4.Leases()))
	if g.dhcp6 != nil {
		six := s.addDHCP(g.dhcp6.Stats(), len(g.dhcp6.Leases()))
		s.DHCP6 = &six
	}
	return s, nil
}

// openFiles counts this process's descriptors by poll(2): a sealed process has no
// /proc. The kernel gives out the lowest number that is free, so a long run of
// closed ones is the end.
func openFiles() int {
	const run = 256 // no more than any limit
	var fds [run]unix.PollFd
	open := 0
	for first := 0; ; first += run {
		for i := range fds {
			fds[i] = unix.PollFd{Fd: int32(first + i)}
		}
		if _, err := unix.Poll(fds[:], 0); err != nil {
			return open
		}
		before := open
		for _, f := range fds {
			if f.Revents&unix.POLLNVAL == 0 {
				open++
			}
		}
		if open == before {
			return open
		}
	}
}

func (s *Stats) addDHCP(d dhcp.Stats, leases int) DHCPStats {
	s.Dropped.DHCPIgnored += d.Ignored
	s.Dropped.DHCPNoneFree += d.Exhausted
	return DHCPStats{Received: d.Received, Offers: d.Offers, Acks: d.Acks, Naks: d.Naks, LeasesNow: leases}
}
