package bench

import (
	"context"
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/vnet"
	"github.com/usernet/usernet/stack"
)

var (
	guestAddr   = netip.MustParseAddr("10.0.2.100")
	gatewayAddr = netip.MustParseAddr("10.0.2.2")
	dnsAddr     = netip.MustParseAddr("10.0.2.3")
	subnet      = netip.MustParsePrefix("10.0.2.0/24")
	gatewayMAC  = [6]byte{0x52, 0x55, 10, 0, 2, 2}
	guestMAC    = [6]byte{0x52, 0x55, 10, 0, 2, 100}
)

const (
	ipLen  = header.IPv4MinimumSize
	tcpLen = header.TCPMinimumSize
	udpLen = header.UDPMinimumSize
)

// network is a stack and a forwarder with a scripted guest.
type network struct {
	t    testing.TB
	link *link
	stk  *stack.Stack
	fwd  *forwarder.Forwarder
	over atomic.Bool // connections may be reset now

	script sync.Mutex // held while the guest acts
}

// errorsTo adapts a stack to forwarder.Guest.
type errorsTo struct{ *stack.Stack }

func (g errorsTo) SendICMPError(e forwarder.ICMPError) error {
	return g.Stack.SendICMPError(stack.ICMPError(e))
}

// newNetwork starts a network whose guest reaches this machine's loopback at
// the gateway's address. handle is the guest: it sees every frame.
func newNetwork(t testing.TB, mtu int, handle func(n *network, head []byte, payload int)) *network {
	t.Helper()
	n := &network{t: t, link: newLink(t, mtu, gatewayMAC)}
	n.link.guest = func(head []byte, payload int) {
		n.script.Lock()
		defer n.script.Unlock()
		handle(n, head, payload)
	}
	var err error
	n.stk, err = stack.New(stack.Config{
		Link: n.link, Prefix4: subnet, Gateway4: gatewayAddr, DNS4: dnsAddr,
		GatewayMAC: gatewayMAC, GuestMAC: guestMAC, USO: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	n.fwd, err = forwarder.New(forwarder.Config{
		Netstack: n.stk.Netstack(), Clock: n.stk, Link: n.link, Guest: errorsTo{n.stk},
		Policy: forwarder.NewPolicy(forwarder.PolicyConfig{
			Gateways: []netip.Addr{gatewayAddr}, Virtual: []netip.Prefix{subnet}, HostLoopback: true,
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	n.stk.SetHooks(stack.Hooks{TCP: n.fwd.HandleTCP, Segment: n.fwd.HandleSegment, Sent: n.fwd.HandleSent, UDP: n.fwd.HandleUDP, Echo: n.fwd.HandleEcho})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.fwd.Run(ctx) }()
	t.Cleanup(func() {
		n.over.Store(true)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		n.stk.Close()
		unix.Close(n.link.event)
	})
	return n
}

// wait waits for the guest's script to end.
func (n *network) wait(done <-chan struct{}) {
	n.t.Helper()
	select {
	case <-done:
	case <-time.After(time.Minute):
		n.t.Fatal("the guest's script stands still")
	}
}

// put4 writes the Ethernet and IPv4 headers of a packet with size bytes behind
// them.
func put4(f *frame, dst netip.Addr, proto uint8, size int) []byte {
	copy(f.head[0:], gatewayMAC[:])
	copy(f.head[6:], guestMAC[:])
	binary.BigEndian.PutUint16(f.head[12:], uint16(header.IPv4ProtocolNumber))
	ip := f.head[ethLen : ethLen+ipLen]
	clear(ip)
	ip[0], ip[8], ip[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(ip[2:], uint16(ipLen+size))
	src4, dst4 := guestAddr.As4(), dst.As4()
	copy(ip[12:], src4[:])
	copy(ip[16:], dst4[:])
	binary.BigEndian.PutUint16(ip[10:], ^checksum.Checksum(ip, 0))
	f.vnet = vnet.Header{Flags: vnet.NeedsCsum}
	return f.head[ethLen+ipLen:]
}

// finish sets how the frame's size bytes behind the IP header are split.
func (f *frame) finish(size int) {
	whole := ethLen + ipLen + size
	f.n = min(whole, len(f.head))
	f.tail = whole - f.n
}

// act has the guest do something by itself.
func (n *network) act(f func()) {
	n.script.Lock()
	defer n.script.Unlock()
	f()
}

// conn is the guest's side of one TCP connection. Its methods are called with
// the script's lock held.
type conn struct {
	n        *network
	port, to uint16
	next     uint32 // sequence number to send
	acked    uint32 // first one not acknowledged
	expect   uint32 // next one of the peer
	window   uint32 // of the peer
	scale    uint8
}

// segment is one TCP segment towards the guest.
type segment struct {
	from, to uint16
	seq, ack uint32
	flags    header.TCPFlags
	window   uint16
	options  []byte
	payload  int
}

// parseTCP reads a frame of the stack. ok is false for other protocols.
func parseTCP(head []byte, rest int) (s segment, ok bool) {
	if len(head) < ethLen+ipLen+tcpLen || head[ethLen+9] != uint8(header.TCPProtocolNumber) {
		return s, false
	}
	h := header.TCP(head[ethLen+ipLen:])
	off := int(h.DataOffset())
	return segment{
		from: h.SourcePort(), to: h.DestinationPort(), seq: h.SequenceNumber(), ack: h.AckNumber(),
		flags: h.Flags(), window: h.WindowSize(), options: h[tcpLen:min(off, len(h))],
		payload: len(h) - off + rest,
	}, true
}

// put writes a segment with payload bytes into f.
func (c *conn) put(f *frame, flags header.TCPFlags, payload int) {
	options := 0
	if flags&header.TCPFlagSyn != 0 {
		options = 8
	}
	size := tcpLen + options + payload
	b := put4(f, gatewayAddr, uint8(header.TCPProtocolNumber), size)
	clear(b[:tcpLen+options])
	header.TCP(b).Encode(&header.TCPFields{
		SrcPort: c.port, DstPort: c.to, SeqNum: c.next, AckNum: c.expect,
		DataOffset: uint8(tcpLen + options), Flags: flags, WindowSize: 0xffff,
	})
	if options > 0 {
		copy(b[tcpLen:], []byte{2, 4, 0xff, 0xb0, 1, 3, 3, 7}) // MSS 65456, window scale 7
	}
	f.finish(size)
	if payload > tcpLen {
		f.vnet.GSOType, f.vnet.GSOSize = vnet.GSOTCPv4, 1448
	}
	c.next += uint32(payload)
	if flags&(header.TCPFlagSyn|header.TCPFlagFin) != 0 {
		c.next++
	}
}

// send sends one segment.
func (c *conn) send(flags header.TCPFlags, payload int) {
	idle := c.n.link.lock()
	c.put(c.n.link.add(), flags, payload)
	c.n.link.unlock(idle)
}

// connect starts the handshake.
func (c *conn) connect() {
	c.next, c.acked = 1000, 1000
	c.expect = 0
	c.send(header.TCPFlagSyn, 0)
}

// take notes what a segment acknowledges and carries, and reports whether the
// handshake is what it completes.
func (c *conn) take(s segment) (established bool) {
	if s.flags&header.TCPFlagRst != 0 && !c.n.over.Load() {
		c.n.t.Errorf("the guest's connection %d was reset", c.port)
	}
	if s.flags&header.TCPFlagSyn != 0 {
		c.expect = s.seq + 1
		c.scale = windowScale(s.options)
		c.window = uint32(s.window)
		c.acked = s.ack
		return true
	}
	c.window = uint32(s.window) << c.scale
	c.acked = s.ack
	if s.seq == c.expect {
		c.expect += uint32(s.payload)
		if s.flags&header.TCPFlagFin != 0 {
			c.expect++
		}
	}
	return false
}

func windowScale(options []byte) uint8 {
	for len(options) > 0 {
		switch {
		case options[0] == 0:
			return 0
		case options[0] == 1:
			options = options[1:]
		case len(options) < 2 || int(options[1]) < 2 || int(options[1]) > len(options):
			return 0
		case options[0] == 3 && options[1] == 3:
			return options[2]
		default:
			options = options[options[1]:]
		}
	}
	return 0
}

// putUDP writes a datagram into f whose payload's first bytes are given.
func putUDP(f *frame, from uint16, to netip.AddrPort, start []byte, payload int) {
	b := put4(f, to.Addr(), uint8(header.UDPProtocolNumber), udpLen+payload)
	binary.BigEndian.PutUint16(b[0:], from)
	binary.BigEndian.PutUint16(b[2:], to.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(udpLen+payload))
	binary.BigEndian.PutUint16(b[6:], 0)
	copy(b[udpLen:], start)
	f.finish(udpLen + payload)
}
