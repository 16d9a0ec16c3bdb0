package stack

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// queueLen is how many datagrams a conn holds for a reader that is busy. More
// are dropped, as a socket drops them when its buffer is full.
const queueLen = 512

// queue is the receiving half of a conn.
type queue struct {
	ch     chan packet
	closed chan struct{}
	once   sync.Once
	pool   sync.Pool

	mu       sync.Mutex // guards following
	expired  chan struct{}
	deadline *time.Timer
}

type packet struct {
	from netip.AddrPort
	buf  *[]byte
}

func (q *queue) init() {
	q.ch = make(chan packet, queueLen)
	q.closed = make(chan struct{})
	q.expired = make(chan struct{})
	q.pool.New = func() any { return new([]byte) }
}

// put queues a copy of head+tail and reports whether there was room.
func (q *queue) put(from netip.AddrPort, head, tail []byte) bool {
	b := q.pool.Get().(*[]byte)
	*b = append(append((*b)[:0], head...), tail...)
	select {
	case q.ch <- packet{from, b}:
		return true
	default:
		q.pool.Put(b)
		return false
	}
}

func (q *queue) get(b []byte) (int, netip.AddrPort, error) {
	q.mu.Lock()
	expired := q.expired
	q.mu.Unlock()
	select {
	case <-q.closed:
		return 0, netip.AddrPort{}, net.ErrClosed
	case <-expired:
		return 0, netip.AddrPort{}, os.ErrDeadlineExceeded
	case p := <-q.ch:
		n := copy(b, *p.buf)
		if cap(*p.buf) <= 2048 { // keep the pool's pieces small
			q.pool.Put(p.buf)
		}
		return n, p.from, nil
	}
}

func (q *queue) SetReadDeadline(t time.Time) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.deadline != nil {
		q.deadline.Stop()
		q.deadline = nil
	}
	select {
	case <-q.expired:
		q.expired = make(chan struct{})
	default:
	}
	if t.IsZero() {
		return nil
	}
	expired := q.expired
	if d := time.Until(t); d > 0 {
		q.deadline = time.AfterFunc(d, func() {
			q.mu.Lock()
			defer q.mu.Unlock()
			if q.expired == expired {
				closeOnce(expired)
			}
		})
	} else {
		close(expired)
	}
	return nil
}

func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

func (q *queue) SetDeadline(t time.Time) error    { return q.SetReadDeadline(t) }
func (q *queue) SetWriteDeadline(time.Time) error { return nil } // writes never block

// packetConn is a UDP conn on one of our addresses.
type packetConn struct {
	queue
	s       *Stack
	local   netip.AddrPort
	handler atomic.Pointer[handler]
	handed  bool   // it took some since the last Flush
	joined  []byte // a datagram for handler that came in two pieces
}

// handler takes datagrams where they are received.
type handler struct {
	take func(b []byte, from netip.AddrPort)
	done func()
}

// Handle has take called with every datagram from now on, where it is received,
// and with those that wait to be read, maybe at the same time. ReadFrom finds
// none then. After each, or after all those that came at once, done is called.
// Neither may block, and take must not keep the slice.
func (c *packetConn) Handle(take func(b []byte, from netip.AddrPort), done func()) {
	h := &handler{take, done}
	c.handler.Store(h)
	c.drain(h)
}

// drain hands h what waits to be read.
func (c *packetConn) drain(h *handler) {
	for {
		select {
		case p := <-c.ch:
			h.take(*p.buf, p.from)
			h.done()
		default:
			return
		}
	}
}

// ListenPacket returns a conn for the datagrams that the guest sends to addr.
// The unspecified IPv4 address receives what is broadcast, besides what is sent
// to any of our addresses; ff02::1:2 receives what is sent to that group.
//
// ReadFrom returns copies, WriteTo sends from addr (or the gateway's address,
// where addr is unspecified or a group) and never blocks.
func (s *Stack) ListenPacket(addr netip.AddrPort) (net.PacketConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := *s.conns.Load()
	if old[addr] != nil {
		return nil, fmt.Errorf("stack: listen on UDP %v: address already in use", addr)
	}
	c := &packetConn{s: s, local: addr}
	c.init()
	m := make(map[netip.AddrPort]*packetConn, len(old)+1)
	for k, v := range old {
		m[k] = v
	}
	m[addr] = c
	s.conns.Store(&m)
	return c, nil
}

// connFor returns the conn that a datagram to dst is for, nil if there is none.
func (s *Stack) connFor(dst netip.AddrPort) *packetConn {
	conns := *s.conns.Load()
	if c := conns[dst]; c != nil {
		return c
	}
	a := dst.Addr()
	if a.Is4() && (a == broadcast4 || a == s.bcast4 || s.own(a)) {
		return conns[netip.AddrPortFrom(netip.IPv4Unspecified(), dst.Port())]
	}
	if a.Is6() && s.own(a) && dst.Port() == 547 {
		return conns[netip.AddrPortFrom(allDHCPAgents, dst.Port())]
	}
	return nil
}

func (c *packetConn) deliver(from netip.AddrPort, head, tail []byte) {
	if h := c.handler.Load(); h != nil {
		if len(tail) > 0 {
			c.joined = append(append(c.joined[:0], head...), tail...)
			head = c.joined
		}
		h.take(head, from)
		switch {
		case !c.s.holding():
			h.done()
		case !c.handed:
			c.handed = true
			c.s.handed = append(c.s.handed, c)
		}
		return
	}
	if !c.put(from, head, tail) {
		c.s.stats.QueueDropped.Add(1)
	}
	if h := c.handler.Load(); h != nil { // since a moment ago
		c.drain(h)
	}
}

// ReadFrom implements net.PacketConn.
func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.get(b)
	if err != nil {
		return 0, nil, &net.OpError{Op: "read", Net: "udp", Source: c.LocalAddr(), Err: err}
	}
	return n, net.UDPAddrFromAddrPort(from), nil
}

// ReadFromUDPAddrPort is ReadFrom without an allocation.
func (c *packetConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	n, from, err := c.get(b)
	if err != nil {
		return 0, from, &net.OpError{Op: "read", Net: "udp", Source: c.LocalAddr(), Err: err}
	}
	return n, from, nil
}

// WriteTo implements net.PacketConn.
func (c *packetConn) WriteTo(b []byte, to net.Addr) (int, error) {
	u, ok := to.(*net.UDPAddr)
	if !ok {
		return 0, &net.OpError{Op: "write", Net: "udp", Source: c.LocalAddr(), Addr: to, Err: net.InvalidAddrError("not a UDP address")}
	}
	return c.WriteToUDPAddrPort(b, u.AddrPort())
}

// WriteToUDPAddrPort is WriteTo without an allocation.
func (c *packetConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	select {
	case <-c.closed:
		return 0, &net.OpError{Op: "write", Net: "udp", Source: c.LocalAddr(), Err: net.ErrClosed}
	default:
	}
	dst := netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
	src := c.local
	if src.Addr().IsUnspecified() {
		src = netip.AddrPortFrom(c.s.cfg.Gateway4, src.Port())
	} else if src.Addr().IsMulticast() {
		src = netip.AddrPortFrom(c.s.linkLocal, src.Port())
	}
	if src.Addr().Is4() != dst.Addr().Is4() {
		return 0, &net.OpError{Op: "write", Net: "udp", Source: c.LocalAddr(), Err: net.InvalidAddrError("other address family")}
	}
	if err := c.s.WriteUDP(src, dst, 0, b); err != nil {
		return 0, &net.OpError{Op: "write", Net: "udp", Source: c.LocalAddr(), Err: err}
	}
	return len(b), nil
}

// LocalAddr implements net.PacketConn.
func (c *packetConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.local) }

// Close implements net.PacketConn.
func (c *packetConn) Close() error {
	c.once.Do(func() {
		defer close(c.closed) // a reader that returns finds the port free
		c.s.mu.Lock()
		defer c.s.mu.Unlock()
		m := make(map[netip.AddrPort]*packetConn)
		for k, v := range *c.s.conns.Load() {
			if v != c {
				m[k] = v
			}
		}
		c.s.conns.Store(&m)
	})
	return nil
}

// icmpConn receives router solicitations and sends ICMPv6 messages from the
// gateway's link-local address.
type icmpConn struct {
	queue
	s *Stack
}

// ListenRouter returns a conn for router advertising: it reads whole router
// solicitations and writes ICMPv6 messages, whose checksum it fills, with hop
// limit 255 from the gateway's link-local address. Addresses are *net.IPAddr.
func (s *Stack) ListenRouter() (net.PacketConn, error) {
	c := &icmpConn{s: s}
	c.init()
	if !s.ipv6() || !s.rs.CompareAndSwap(nil, c) {
		return nil, fmt.Errorf("stack: listen for router solicitations: already in use, or IPv6 is off")
	}
	return c, nil
}

func (c *icmpConn) deliver(from netip.AddrPort, head, tail []byte) {
	if !c.put(from, head, tail) {
		c.s.stats.QueueDropped.Add(1)
	}
}

// ReadFrom implements net.PacketConn.
func (c *icmpConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.get(b)
	if err != nil {
		return 0, nil, &net.OpError{Op: "read", Net: "ip6:ipv6-icmp", Source: c.LocalAddr(), Err: err}
	}
	return n, &net.IPAddr{IP: from.Addr().AsSlice()}, nil
}

// WriteTo implements net.PacketConn.
func (c *icmpConn) WriteTo(b []byte, to net.Addr) (int, error) {
	select {
	case <-c.closed:
		return 0, &net.OpError{Op: "write", Net: "ip6:ipv6-icmp", Source: c.LocalAddr(), Err: net.ErrClosed}
	default:
	}
	ip, ok := to.(*net.IPAddr)
	var dst netip.Addr
	if ok {
		dst, ok = netip.AddrFromSlice(ip.IP.To16())
	}
	if !ok || dst.Is4In6() || len(b) < 4 {
		return 0, &net.OpError{Op: "write", Net: "ip6:ipv6-icmp", Source: c.LocalAddr(), Addr: to, Err: net.InvalidAddrError("not an IPv6 address or message")}
	}
	m := append([]byte(nil), b...)
	if err := c.s.sendICMPv6(c.s.linkLocal, dst, 255, m); err != nil {
		return 0, &net.OpError{Op: "write", Net: "ip6:ipv6-icmp", Source: c.LocalAddr(), Err: err}
	}
	return len(b), nil
}

// LocalAddr implements net.PacketConn.
func (c *icmpConn) LocalAddr() net.Addr { return &net.IPAddr{IP: c.s.linkLocal.AsSlice()} }

// Close implements net.PacketConn.
func (c *icmpConn) Close() error {
	c.once.Do(func() {
		c.s.rs.CompareAndSwap(c, nil)
		close(c.closed)
	})
	return nil
}
