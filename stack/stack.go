package stack

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/usernet/usernet/internal/vnet"
)

// nicID is the only interface of the stack.
const nicID = 1

// Link is the link endpoint towards the guest.
type Link interface {
	stack.LinkEndpoint
	stack.GSOEndpoint
	// SetReceiver sets who sees frames before netstack does, and who
	// resolves a guest's address to its link address.
	SetReceiver(receive func(h vnet.Header, eth, tail []byte) bool, resolve func(tcpip.Address) [6]byte)
	// WriteFrame sends the frame that head, a and b make up.
	WriteFrame(h vnet.Header, head, a, b []byte) error
	// WriteSegment sends the frame of a TCP segment, of which head is all headers.
	WriteSegment(h vnet.Header, head, payload []byte) error
	// WritePacket sends a packet that has all but its link header.
	WritePacket(to tcpip.Address, pkt *stack.PacketBuffer) tcpip.Error
	// Detach lets go of the device, while frames may still be sent.
	Detach()
}

// Config configures a Stack. Link, the IPv4 addresses and GuestMAC are required.
type Config struct {
	Link Link

	// Prefix4 is the guest's subnet; Gateway4 and DNS4 are our addresses in it.
	Prefix4        netip.Prefix
	Gateway4, DNS4 netip.Addr
	// Prefix6, Gateway6 and DNS6 are the same for IPv6. An invalid Prefix6
	// turns IPv6 off: its frames are dropped, nothing is advertised.
	Prefix6        netip.Prefix
	Gateway6, DNS6 netip.Addr

	// GatewayMAC is the link address of all our addresses, GuestMAC the one
	// to use for guest addresses that were not heard of yet.
	GatewayMAC, GuestMAC [6]byte

	// SilentDNS has the DNS addresses answer nothing but ARP, NDP and echo
	// requests, without refusing.
	SilentDNS bool

	// Multicast hands the guest's IPv4 datagrams to groups to the UDP hook.
	Multicast bool

	// USO says that the link takes UDP super-frames (virtio GSO UDP_L4).
	USO bool

	// Logger gets one record per event; nil discards.
	Logger *slog.Logger
}

// Hooks are called for what the guest sends beyond the subnet or to the gateway
// itself. Slices are valid only during the call. The payload of a datagram is
// the concatenation of head and tail.
type Hooks struct {
	// TCP is called with segments that belong to no endpoint, as a
	// transport protocol handler of netstack. Not consumed ones are
	// answered with a reset.
	TCP func(stack.TransportEndpointID, *stack.PacketBuffer) bool
	// Segment is called with every TCP segment of the guest's: l4 is the header and the
	// beginning of the payload, tail the rest, and size the length in bytes. Where l4
	// and tail are shorter, the rest of the payload is elsewhere. summed says that the
	// checksum is filled in. A segment that it consumes goes nowhere else. It may
	// change the header.
	Segment func(src, dst netip.Addr, l4, tail []byte, size int, summed bool) bool
	// Sent is called by any goroutine with the header of every TCP segment that
	// netstack sends to the guest dst, with size bytes of payload. One that it consumes
	// is lost. It may change the header, and must not call netstack.
	Sent func(dst, src netip.Addr, h header.TCP, size int, summed bool) bool
	// UDP is called with every datagram. gso is 0, or the size of the
	// datagrams that make up the payload (the last one may be shorter).
	UDP func(src, dst netip.AddrPort, ttl uint8, gso int, head, tail []byte)
	// Echo is called with echo requests to other addresses than ours.
	Echo func(src, dst netip.Addr, ttl uint8, id, seq uint16, head, tail []byte)
}

// Stats counts what the stack did with frames before netstack saw them.
type Stats struct {
	// Spoofed counts packets whose source address is not a guest's.
	Spoofed atomic.Uint64
	// Foreign counts frames for another station or to addresses that no
	// guest packet may have.
	Foreign atomic.Uint64
	// Malformed counts packets with impossible lengths or wrong checksums.
	Malformed atomic.Uint64
	// QueueDropped counts datagrams for our own services that found their
	// queue full.
	QueueDropped atomic.Uint64
	// SYNsDropped counts those that too many others came to nothing before.
	SYNsDropped atomic.Uint64
	// ICMPLimited counts ICMP errors that the rate limit swallowed.
	ICMPLimited atomic.Uint64
	// ARPReplies and NDPReplies count answered address resolutions.
	ARPReplies, NDPReplies atomic.Uint64
}

// Stack is the gateway that a guest sees. Its link drives it: there is nothing
// to run.
type Stack struct {
	cfg   Config
	log   *slog.Logger
	link  Link
	ns    *stack.Stack
	clock *clock
	hooks Hooks
	vnet  bool // the link completes checksums
	stats Stats

	// LinkLocal is the gateway's link-local address, the source of router
	// advertisements.
	linkLocal netip.Addr
	bcast4    netip.Addr

	neigh   neighbors
	icmpLim *rate.Limiter
	ipID    atomic.Uint32
	gate    gate
	gather  gather
	way     way
	handed  []*packetConn // whose handlers took datagrams since the last Flush

	mu    sync.Mutex // guards writes to the following
	conns atomic.Pointer[map[netip.AddrPort]*packetConn]
	rs    atomic.Pointer[icmpConn]
}

// New makes a stack on cfg.Link. Set the hooks before the link receives.
func New(cfg Config) (*Stack, error) {
	if cfg.Link == nil || !cfg.Prefix4.IsValid() || !cfg.Prefix4.Contains(cfg.Gateway4) {
		return nil, errors.New("stack: new: link and IPv4 subnet with its gateway are required")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	log.SetTarget(netstackLog{cfg.Logger}) // of all stacks in this process
	cfg.Prefix4 = cfg.Prefix4.Masked()
	s := &Stack{
		cfg: cfg, log: cfg.Logger, link: cfg.Link, clock: newClock(),
		vnet:    cfg.Link.SupportedGSO() == stack.HostGSOSupported,
		bcast4:  lastAddr(cfg.Prefix4),
		icmpLim: rate.NewLimiter(1000, 50), // the figures of Linux's icmp_msgs_per_sec and icmp_msgs_burst
	}
	s.neigh.fallback, s.gate.tokens = cfg.GuestMAC, synBurst
	var seed [4]byte
	rand.Read(seed[:])
	s.ipID.Store(binary.NativeEndian.Uint32(seed[:]))
	s.conns.Store(&map[netip.AddrPort]*packetConn{})

	s.ns = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{s.shortcut(ipv4.NewProtocol), s.shortcut(ipv6.NewProtocol)},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
		Clock: s.clock,
		// The guest's addresses are not ours to deliver locally.
		HandleLocal: false,
	})
	if err := s.configure(); err != nil {
		s.ns.Destroy()
		return nil, err
	}
	cfg.Link.SetReceiver(s.receive, s.resolve)
	return s, nil
}

func (s *Stack) configure() error {
	if err := s.tuneTCP(); err != nil {
		return err
	}
	if err := s.ns.CreateNIC(nicID, s.link); err != nil {
		return fmt.Errorf("stack: create NIC: %v", err)
	}
	addrs := []netip.Addr{s.cfg.Gateway4, s.cfg.DNS4}
	if s.ipv6() {
		s.cfg.Prefix6 = s.cfg.Prefix6.Masked()
		s.linkLocal = linkLocal(s.cfg.Gateway6)
		addrs = append(addrs, s.cfg.Gateway6, s.cfg.DNS6, s.linkLocal)
	}
	for _, a := range addrs {
		if !a.IsValid() {
			continue
		}
		pa := tcpip.ProtocolAddress{Protocol: protocolOf(a), AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix()}
		if err := s.ns.AddProtocolAddress(nicID, pa, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("stack: add address %v: %v", a, err)
		}
	}
	// Any destination is for us to forward, and answers come from it.
	if err := s.ns.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("stack: set promiscuous mode: %v", err)
	}
	if err := s.ns.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("stack: set spoofing: %v", err)
	}
	s.ns.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	s.ns.SetTransportProtocolHandler(tcp.ProtocolNumber, s.strayTCP)
	s.ns.SetTransportProtocolHandler(udp.ProtocolNumber, s.reassembledUDP)
	s.ns.SetTransportProtocolHandler(icmp.ProtocolNumber4, s.reassembledEcho)
	s.ns.SetTransportProtocolHandler(icmp.ProtocolNumber6, s.reassembledEcho)
	return nil
}

func (s *Stack) tuneTCP() error {
	sack := tcpip.TCPSACKEnabled(true)
	// RACK takes the reordering between our processors for loss and halves
	// the download rate; reno's recovery with SACK suffices on a link that
	// does not lose.
	rack := tcpip.TCPRecovery(0)
	reno := tcpip.CongestionControlOption("reno")
	// The window is fixed, moderation would only cost a lock per read.
	moderate := tcpip.TCPModerateReceiveBufferOption(false)
	// Segments that reach an endpoint in TIME_WAIT are only matched with
	// listeners, of which a forwarder has none: a guest that reuses a port
	// would find its SYN dropped for a minute. On a link that neither
	// delays nor duplicates there are no late segments to wait for.
	timeWait := tcpip.TCPTimeWaitTimeoutOption(0)
	linger := tcpip.TCPLingerTimeoutOption(10 * time.Second)
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &rack, &reno, &moderate, &timeWait, &linger} {
		if err := s.ns.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("stack: set TCP option %T: %v", o, err)
		}
	}
	return nil
}

// SetHooks sets what is called for the guest's traffic. It must be called
// before the link receives its first frame.
func (s *Stack) SetHooks(h Hooks) { s.hooks = h }

// Netstack returns the TCP/IP stack, for making TCP endpoints.
func (s *Stack) Netstack() *stack.Stack { return s.ns }

// Stats returns the live counters.
func (s *Stack) Stats() *Stats { return &s.stats }

// NeighborsEvicted counts link addresses that made room for others.
func (s *Stack) NeighborsEvicted() uint64 { return s.neigh.evicted.Load() }

// BadFragments counts those that fit into no datagram: they overlap, or have
// impossible lengths.
func (s *Stack) BadFragments() uint64 { return s.ns.Stats().IP.MalformedFragmentsReceived.Value() }

// LinkLocal returns the gateway's link-local address, invalid without IPv6.
func (s *Stack) LinkLocal() netip.Addr { return s.linkLocal }

// closeWait is how long Close waits for netstack's endpoints to end by
// themselves, which they do at once while the guest answers.
const closeWait = 100 * time.Millisecond

// Close resets all connections, stops netstack and lets go of the link. The
// link must not receive any more. An endpoint whose guest has vanished may keep
// a goroutine until its retransmissions are over; what it sends goes nowhere.
func (s *Stack) Close() {
	s.ns.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.ns.Wait() // closes the link
	}()
	select {
	case <-done:
	case <-time.After(closeWait):
		s.link.Detach()
	}
}

// Listen listens for the guest's TCP connections on one of our addresses.
func (s *Stack) Listen(addr netip.AddrPort) (net.Listener, error) {
	l, err := gonet.ListenTCP(s.ns, tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFromSlice(addr.Addr().AsSlice()), Port: addr.Port()}, protocolOf(addr.Addr()))
	if err != nil {
		return nil, fmt.Errorf("stack: listen on %v: %w", addr, err)
	}
	return listener{l, s}, nil
}

// listener tells of the connections that have come about.
type listener struct {
	net.Listener
	s *Stack
}

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.s.Established()
	}
	return c, err
}

func (s *Stack) ipv6() bool { return s.cfg.Prefix6.IsValid() }

// own reports whether a is one of our addresses.
func (s *Stack) own(a netip.Addr) bool {
	return a == s.cfg.Gateway4 || a == s.cfg.DNS4 ||
		s.ipv6() && (a == s.cfg.Gateway6 || a == s.cfg.DNS6 || a == s.linkLocal)
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// linkLocal returns the link-local address with the interface identifier of a:
// a gateway ::2 is fe80::2, too.
func linkLocal(a netip.Addr) netip.Addr {
	b := a.As16()
	copy(b[:8], []byte{0xfe, 0x80, 0, 0, 0, 0, 0, 0})
	return netip.AddrFrom16(b)
}

// lastAddr returns the broadcast address of an IPv4 prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	v := binary.BigEndian.Uint32(a[:]) | uint32(1<<(32-p.Bits())-1)
	binary.BigEndian.PutUint32(a[:], v)
	return netip.AddrFrom4(a)
}
