package dhcp

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// start is some moment; the tables tell later ones by their distance.
var start = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

var (
	addr   = netip.MustParseAddr
	prefix = netip.MustParsePrefix
)

// mac returns the link address of the n-th guest.
func mac(n int) net.HardwareAddr {
	return net.HardwareAddr{0x52, 0x54, 0, byte(n >> 16), byte(n >> 8), byte(n)}
}

// memConn is a conn made of channels.
type memConn struct {
	in     chan datagram
	out    chan datagram
	closed chan struct{}
	once   sync.Once
}

type datagram struct {
	b    []byte
	peer net.Addr
}

func newMemConn() *memConn {
	return &memConn{in: make(chan datagram), out: make(chan datagram, 64), closed: make(chan struct{})}
}

func (c *memConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case <-c.closed:
		return 0, nil, net.ErrClosed
	case d := <-c.in:
		return copy(b, d.b), d.peer, nil
	}
}

func (c *memConn) WriteTo(b []byte, to net.Addr) (int, error) {
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	case c.out <- datagram{append([]byte(nil), b...), to}:
		return len(b), nil
	default:
		return 0, errors.New("nobody reads")
	}
}

func (c *memConn) Close() error                     { c.once.Do(func() { close(c.closed) }); return nil }
func (c *memConn) LocalAddr() net.Addr              { return &net.UDPAddr{} }
func (c *memConn) SetDeadline(time.Time) error      { return nil }
func (c *memConn) SetReadDeadline(time.Time) error  { return nil }
func (c *memConn) SetWriteDeadline(time.Time) error { return nil }

// config4 is the network that the tests have: the pool has the 16 addresses
// from .15 to .30, and .100 is reserved for guest 100.
func config4() Config4 {
	return Config4{
		Conn:         newMemConn(),
		Prefix:       prefix("10.0.2.0/24"),
		Gateway:      addr("10.0.2.2"),
		DNS:          []netip.Addr{addr("10.0.2.3")},
		PoolStart:    addr("10.0.2.15"),
		PoolEnd:      addr("10.0.2.30"),
		Reservations: []Reservation{{mac(100), addr("10.0.2.100")}},
		Domain:       "usernet.internal",
		Search:       func() []string { return []string{"usernet.internal", "corp.example.com", "example.com."} },
		MTU:          65520,
		Hostname:     "guest",
	}
}

func newTest4(t testing.TB, change ...func(*Config4)) *Server4 {
	t.Helper()
	cfg := config4()
	for _, f := range change {
		f(&cfg)
	}
	s, err := New4(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// message4 makes a client's message.
func message4(t testing.TB, kind dhcpv4.MessageType, hw net.HardwareAddr, mods ...dhcpv4.Modifier) []byte {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithHwAddr(hw), dhcpv4.WithTransactionID(dhcpv4.TransactionID{1, 2, 3, 4}),
	}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m.ToBytes()
}

func ciaddr(a string) dhcpv4.Modifier { return dhcpv4.WithClientIP(net.ParseIP(a)) }
func want(a string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(a)))
}
func server(a string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(a)))
}
func option(code uint8, v ...byte) dhcpv4.Modifier {
	return dhcpv4.WithGeneric(dhcpv4.GenericOptionCode(code), v)
}
func params(codes ...uint8) dhcpv4.Modifier { return option(55, codes...) }

// ask4 hands a message to s and decodes the answer, which may be nil.
func ask4(t testing.TB, s *Server4, now time.Time, b []byte) (*dhcpv4.DHCPv4, *net.UDPAddr) {
	t.Helper()
	r, to := s.handle(now, b, netip.Addr{})
	if r == nil {
		return nil, nil
	}
	m, err := dhcpv4.FromBytes(r)
	if err != nil {
		t.Fatalf("answer % x: %v", r, err)
	}
	return m, to.(*net.UDPAddr)
}

// lease4 takes a client through DISCOVER and REQUEST, and returns its address
// and lease time; the zero Addr if it gets none.
func lease4(t testing.TB, s *Server4, now time.Time, hw net.HardwareAddr, mods ...dhcpv4.Modifier) (netip.Addr, time.Duration) {
	t.Helper()
	offer, _ := ask4(t, s, now, message4(t, dhcpv4.MessageTypeDiscover, hw, mods...))
	if offer == nil {
		return netip.Addr{}, 0
	}
	ack, _ := ask4(t, s, now, message4(t, dhcpv4.MessageTypeRequest, hw, append(mods, want(offer.YourIPAddr.String()), server("10.0.2.2"))...))
	if ack == nil || ack.MessageType() != dhcpv4.MessageTypeAck {
		return netip.Addr{}, 0
	}
	return addr(ack.YourIPAddr.String()), ack.IPAddressLeaseTime(0)
}
