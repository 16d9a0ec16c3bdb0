package forwarder_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/vnet"
	"github.com/usernet/usernet/stack"
	"github.com/usernet/usernet/tap"
)

var (
	guest4   = netip.MustParseAddr("10.0.2.100")
	gateway4 = netip.MustParseAddr("10.0.2.2")
	guest6   = netip.MustParseAddr("fd75:736e:6574::100")
	gateway6 = netip.MustParseAddr("fd75:736e:6574::2")
	gwMAC    = [6]byte{0x52, 0x55, 0x0a, 0, 2, 2}
	guestMAC = [6]byte{0x52, 0x55, 0x0a, 0, 2, 0x64}
)

// net is a whole network without a kernel device: a guest made of netstack, a
// pair of packet-preserving sockets as its cable, and a stack and forwarder at
// the other end, whose host is this machine's loopback.
type network struct {
	t     testing.TB
	guest *gstack.Stack
	fwd   *forwarder.Forwarder
	stk   *stack.Stack
}

type rigOptions struct {
	mtu     int
	offload bool
	policy  forwarder.PolicyConfig
	config  func(*forwarder.Config)
	// bad makes the cable lose, repeat and reorder frames.
	bad bool
	// link, if not nil, is put between the guest and its end of the cable.
	link func(*tap.Endpoint) gstack.LinkEndpoint
}

func newNetwork(t testing.TB, o rigOptions) *network {
	t.Helper()
	if o.mtu == 0 {
		o.mtu = 65520
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours := tap.NewEndpoint(tap.EndpointOptions{FD: fds[0], MTU: o.mtu, MAC: gwMAC, VnetHdr: o.offload, HoldAcks: true})
	theirs := tap.NewEndpoint(tap.EndpointOptions{FD: fds[1], MTU: o.mtu, MAC: guestMAC, VnetHdr: o.offload})
	var lose func(vnet.Header, []byte, []byte) bool
	if o.bad {
		lose = loser(t)
	}
	theirs.SetReceiver(lose, func(tcpip.Address) [6]byte { return gwMAC })
	n := &network{t: t}

	n.guest = gstack.New(gstack.Options{
		NetworkProtocols:   []gstack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []gstack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	// Where much is lost, netstack as a guest takes the time of its repetitions for the
	// path's: with its own bound, two minutes, a test may take as long for one segment.
	patience := tcpip.TCPMaxRTOOption(time.Second)
	if err := n.guest.SetTransportProtocolOption(tcp.ProtocolNumber, &patience); err != nil {
		t.Fatal(err)
	}
	var link gstack.LinkEndpoint = theirs
	if o.bad {
		link = newBadLink(t, theirs)
	}
	if o.link != nil {
		link = o.link(theirs)
	}
	if err := n.guest.CreateNIC(1, link); err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.Addr{guest4, guest6} {
		proto := ipv4.ProtocolNumber
		if a.Is6() {
			proto = ipv6.ProtocolNumber
		}
		if err := n.guest.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: proto, AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix()}, gstack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	n.guest.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}, {Destination: header.IPv6EmptySubnet, NIC: 1}})

	n.stk, err = stack.New(stack.Config{
		Link: ours, Prefix4: netip.MustParsePrefix("10.0.2.0/24"), Gateway4: gateway4, DNS4: netip.MustParseAddr("10.0.2.3"),
		Prefix6: netip.MustParsePrefix("fd75:736e:6574::/64"), Gateway6: gateway6, DNS6: netip.MustParseAddr("fd75:736e:6574::3"),
		GatewayMAC: gwMAC, GuestMAC: guestMAC, // netstack as a guest takes no UDP super-frames
	})
	if err != nil {
		t.Fatal(err)
	}
	o.policy.Gateways = []netip.Addr{gateway4, gateway6}
	o.policy.Virtual = []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd75:736e:6574::/64")}
	cfg := forwarder.Config{Netstack: n.stk.Netstack(), Clock: n.stk, Alone: true, Link: ours, Guest: errorsTo{n.stk}, Policy: forwarder.NewPolicy(o.policy)}
	if o.config != nil {
		o.config(&cfg)
	}
	n.fwd, err = forwarder.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.stk.SetHooks(stack.Hooks{TCP: n.fwd.HandleTCP, Segment: n.fwd.HandleSegment, Sent: n.fwd.HandleSent, UDP: n.fwd.HandleUDP, Echo: n.fwd.HandleEcho})

	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.fwd.Run(ctx) }()
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go pumpGuest(theirs, stop, stopped)
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		close(stop)
		<-stopped
		n.guest.Close()
		n.stk.Close()
	})
	return n
}

// seeded returns a source of random numbers that a failed test can be repeated
// with, by USERNET_TEST_SEED.
func seeded(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("USERNET_TEST_SEED"); s != "" {
		fmt.Sscan(s, &seed)
	}
	t.Logf("USERNET_TEST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// loser drops one of fifty frames that the guest receives.
func loser(t testing.TB) func(vnet.Header, []byte, []byte) bool {
	r := seeded(t)
	return func(vnet.Header, []byte, []byte) bool { return r.IntN(50) == 0 }
}

// badLink drops, repeats and reorders what the guest sends.
type badLink struct {
	*tap.Endpoint

	mu    sync.Mutex // guards following
	r     *rand.Rand
	later *gstack.PacketBuffer // overtaken by the next packet
}

func newBadLink(t testing.TB, e *tap.Endpoint) *badLink {
	l := &badLink{Endpoint: e, r: seeded(t)}
	t.Cleanup(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.later != nil {
			l.later.DecRef()
		}
	})
	return l
}

func (l *badLink) WritePackets(pkts gstack.PacketBufferList) (int, tcpip.Error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range pkts.AsSlice() {
		switch n := l.r.IntN(100); {
		case n < 2:
		case n < 4:
			writePacket(l.Endpoint, p)
			writePacket(l.Endpoint, p)
		case n < 7 && l.later == nil:
			l.later = p.Clone()
		default:
			writePacket(l.Endpoint, p)
			if l.later != nil {
				writePacket(l.Endpoint, l.later)
				l.later.DecRef()
				l.later = nil
			}
		}
	}
	return pkts.Len(), nil
}

// writePacket writes p alone, which stays the caller's.
func writePacket(e *tap.Endpoint, p *gstack.PacketBuffer) {
	var one gstack.PacketBufferList
	one.PushBack(p.IncRef())
	e.WritePackets(one)
	one.DecRef()
}

// pumpGuest receives frames for the guest.
func pumpGuest(e *tap.Endpoint, stop, stopped chan struct{}) {
	defer close(stopped)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, err := e.Receive(64)
		if err != nil {
			return
		}
		if n == 0 {
			p := []unix.PollFd{{Fd: int32(e.FD()), Events: unix.POLLIN}}
			unix.Poll(p, 20)
		} else {
			runtime.Gosched()
		}
	}
}

// errorsTo adapts a stack to forwarder.Guest.
type errorsTo struct{ *stack.Stack }

func (g errorsTo) SendICMPError(e forwarder.ICMPError) error {
	return g.Stack.SendICMPError(stack.ICMPError(e))
}

func full(a netip.AddrPort) (tcpip.FullAddress, tcpip.NetworkProtocolNumber) {
	proto := ipv4.ProtocolNumber
	if a.Addr().Is6() {
		proto = ipv6.ProtocolNumber
	}
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}, proto
}

// dial connects from the guest.
func (n *network) dial(to netip.AddrPort) (*gonet.TCPConn, error) {
	return n.dialWithin(20*time.Second, to)
}

func (n *network) dialWithin(d time.Duration, to netip.AddrPort) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	fa, proto := full(to)
	return gonet.DialContextTCP(ctx, n.guest, fa, proto)
}

// dialUDP makes a connected UDP socket in the guest.
func (n *network) dialUDP(to netip.AddrPort) *gonet.UDPConn {
	fa, proto := full(to)
	c, err := gonet.DialUDP(n.guest, nil, &fa, proto)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

// listen serves on the host's loopback.
func listen(t testing.TB, handle func(*net.TCPConn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go handle(c.(*net.TCPConn))
		}
	}()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func openFDs(t testing.TB) int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
