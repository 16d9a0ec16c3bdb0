package stack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/vnet"
)

func arpRequest(sender, target netip.Addr, op uint16) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, byte(op >> 8), byte(op)}
	b = append(append(b, testGuestMAC[:]...), sender.AsSlice()...)
	b = append(append(b, make([]byte, 6)...), target.AsSlice()...)
	return eth(broadcastMAC, testGuestMAC, 0x0806, b)
}

func TestARPAnswersForOwnAddressesOnly(t *testing.T) {
	_, l := newTestStack(t, true)
	zero := netip.IPv4Unspecified()
	for _, c := range []struct {
		name           string
		sender, target netip.Addr
		op             uint16
		want           bool
	}{
		{"gateway", tGuest4, tGateway4, 1, true},
		{"DNS", tGuest4, tDNS4, 1, true},
		{"probe of the guest's own address", zero, tGuest4, 1, false},
		{"probe of the gateway's address", zero, tGateway4, 1, true},
		{"address without owner", tGuest4, netip.MustParseAddr("10.0.2.77"), 1, false},
		{"a reply", tGuest4, tGateway4, 2, false},
		{"sender claims to be the gateway", tGateway4, tGateway4, 1, false},
		{"sender from elsewhere", tFar4, tGateway4, 1, false},
	} {
		l.inject(vnet.Header{}, arpRequest(c.sender, c.target, c.op))
		got := l.take()
		if (len(got) == 1) != c.want {
			t.Errorf("%s: %d answers, want one: %v", c.name, len(got), c.want)
			continue
		}
		if c.want {
			a := header.ARP(got[0].b[ethLen:])
			if a.Op() != header.ARPReply || !bytes.Equal(a.HardwareAddressSender(), testGatewayMAC[:]) || !bytes.Equal(a.ProtocolAddressSender(), c.target.AsSlice()) {
				t.Errorf("%s: answer % x", c.name, got[0].b)
			}
		}
	}
}

func TestNeighborSolicitationIsAnswered(t *testing.T) {
	s, l := newTestStack(t, true)
	for _, target := range []netip.Addr{tGateway6, netip.MustParseAddr("fd75:736e:6574::3"), s.LinkLocal()} {
		for _, src := range []netip.Addr{tGuest6, netip.IPv6Unspecified()} {
			rest := append(make([]byte, 4), target.AsSlice()...)
			dst := netip.MustParseAddr("ff02::1:ff00:2")
			l.inject(vnet.Header{}, ipTo(multicastMAC(dst), src, dst, 58, 255, icmpPacket(src, dst, 135, 0, rest)))
			got := l.take()
			if len(got) != 1 || got[0].b[ethLen+40] != 136 {
				t.Fatalf("%v asked by %v: %d frames", target, src, len(got))
			}
			to := netip.AddrFrom16([16]byte(got[0].b[ethLen+24 : ethLen+40]))
			solicited := got[0].b[ethLen+44]&0x40 != 0
			if src == tGuest6 && (to != tGuest6 || !solicited) || src != tGuest6 && (to != allNodes || solicited) {
				t.Errorf("%v asked by %v: answer to %v, solicited %v", target, src, to, solicited)
			}
		}
	}
	// A router forwarded this one, so it is not from the link.
	rest := append(make([]byte, 4), tGateway6.AsSlice()...)
	l.inject(vnet.Header{}, ip(tGuest6, tGateway6, 58, 254, icmpPacket(tGuest6, tGateway6, 135, 0, rest)))
	if got := l.take(); len(got) != 0 {
		t.Errorf("a solicitation with hop limit 254 was answered")
	}
	// Nor does any come behind other headers, be they few or many.
	for _, target := range []netip.Addr{tGateway6, netip.MustParseAddr("fd75:736e:6574::77")} {
		rest := append(append(make([]byte, 4), target.AsSlice()...), 1, 1, 2, 0, 0, 0, 0, 1)
		f := ip(tGuest6, tGateway6, 58, 255, icmpPacket(tGuest6, tGateway6, 135, 0, rest))
		for n := range 50 {
			f = behindOption(f)
			if n == 20 {
				f = slices.Concat(f[:ethLen+40], []byte{60, 200, 0, 0, 0, 0, 0, 0}, f[ethLen+40:])
				f[ethLen+5], f[ethLen+6] = f[ethLen+5]+8, 253
			}
			l.inject(vnet.Header{}, f)
			if got := l.take(); len(got) != 0 {
				t.Fatalf("a solicitation of %v behind %d headers was answered: % x", target, n+1, got[0].b)
			}
		}
	}
}

func TestEchoToTheGatewayReturnsTheSameBytes(t *testing.T) {
	_, l := newTestStack(t, true)
	for _, size := range []int{0, 1, 56, 112, 113, 200, 1400} {
		payload := bytes.Repeat([]byte{0xa5}, size)
		rest := append([]byte{0x12, 0x34, 0, 9}, payload...)
		for _, a := range [][2]netip.Addr{{tGuest4, tGateway4}, {tGuest4, tDNS4}, {tGuest6, tGateway6}} {
			proto, typ := uint8(1), uint8(8)
			if a[0].Is6() {
				proto, typ = 58, 128
			}
			l.inject(vnet.Header{}, ip(a[0], a[1], proto, 64, icmpPacket(a[0], a[1], typ, 0, rest)))
			got := l.take()
			if len(got) != 1 || !bytes.HasSuffix(got[0].b, rest) {
				t.Fatalf("echo of %d bytes to %v: %d frames", size, a[1], len(got))
			}
		}
	}
}

func TestForeignAndSpoofedFramesAreDropped(t *testing.T) {
	s, l := newTestStack(t, true)
	hooked := 0
	s.SetHooks(Hooks{UDP: func(_, _ netip.AddrPort, _ uint8, _ int, _, _ []byte) { hooked++ }})
	far := port(tFar4, 9)
	for name, f := range map[string][]byte{
		"other station":               ipTo([6]byte{2, 2, 2, 2, 2, 2}, tGuest4, tFar4, 17, 64, udpPacket(port(tGuest4, 5), far, []byte("x"))),
		"source is the gateway":       udpFrame(port(tGateway4, 5), far, []byte("x")),
		"source is the DNS server":    udpFrame(port(tDNS4, 5), far, []byte("x")),
		"source is elsewhere":         udpFrame(port(tFar4, 5), far, []byte("x")),
		"source is broadcast":         udpFrame(port(netip.MustParseAddr("10.0.2.255"), 5), far, []byte("x")),
		"source is loopback":          udpFrame(port(netip.MustParseAddr("127.0.0.1"), 5), far, []byte("x")),
		"source is unspecified":       udpFrame(port(netip.IPv4Unspecified(), 5), far, []byte("x")),
		"to loopback":                 udpFrame(port(tGuest4, 5), port(netip.MustParseAddr("127.0.0.1"), 9), []byte("x")),
		"to class E":                  udpFrame(port(tGuest4, 5), port(netip.MustParseAddr("240.0.0.1"), 9), []byte("x")),
		"to nobody":                   udpFrame(port(tGuest4, 5), port(netip.IPv4Unspecified(), 9), []byte("x")),
		"to multicast":                udpFrame(port(tGuest4, 5), port(netip.MustParseAddr("224.0.0.251"), 5353), []byte("x")),
		"to broadcast":                udpFrame(port(tGuest4, 5), port(broadcast4, 9), []byte("x")),
		"port 0":                      udpFrame(port(tGuest4, 5), port(tFar4, 0), []byte("x")),
		"from port 0":                 udpFrame(port(tGuest4, 0), far, []byte("x")),
		"v6 source is elsewhere":      udpFrame(port(tFar6, 5), port(netip.MustParseAddr("2001:db8::8"), 9), []byte("x")),
		"v6 source is the gateway":    udpFrame(port(tGateway6, 5), port(tFar6, 9), []byte("x")),
		"v6 to loopback":              udpFrame(port(tGuest6, 5), port(netip.IPv6Loopback(), 9), []byte("x")),
		"v6 to a v4-mapped address":   udpFrame(port(tGuest6, 5), port(netip.MustParseAddr("::ffff:127.0.0.1"), 9), []byte("x")),
		"v6 link-local to a global":   udpFrame(port(netip.MustParseAddr("fe80::1"), 5), port(tFar6, 9), []byte("x")),
		"ethertype nobody knows":      eth(testGatewayMAC, testGuestMAC, 0x88cc, make([]byte, 50)),
		"source MAC is the gateway's": eth(testGatewayMAC, testGatewayMAC, 0x0800, udpFrame(port(tGuest4, 5), far, []byte("x"))[ethLen:]),
	} {
		l.inject(vnet.Header{}, f)
		if got := l.take(); len(got) != 0 {
			t.Errorf("%s: answered with % x", name, got[0].b)
		}
		if hooked != 0 {
			t.Errorf("%s: reached the forwarder", name)
			hooked = 0
		}
	}
	l.inject(vnet.Header{}, udpFrame(port(tGuest4, 5), far, []byte("x")))
	if hooked != 1 {
		t.Errorf("a good datagram did not reach the forwarder")
	}
}

func TestChecksumsOfDatagramsAreVerified(t *testing.T) {
	s, l := newTestStack(t, true)
	hooked := 0
	s.SetHooks(Hooks{UDP: func(_, _ netip.AddrPort, _ uint8, _ int, _, _ []byte) { hooked++ }})
	for _, c := range []struct {
		name     string
		src, dst netip.Addr
		sum      uint16
		flags    uint8
		want     int
	}{
		{"wrong", tGuest4, tFar4, 0x1234, 0, 0},
		{"none in IPv4", tGuest4, tFar4, 0, 0, 1},
		{"none in IPv6", tGuest6, tFar6, 0, 0, 0},
		{"left to us", tGuest4, tFar4, 0x1234, vnet.NeedsCsum, 1},
		{"verified below", tGuest6, tFar6, 0x1234, vnet.DataValid, 1},
	} {
		hooked = 0
		p := udpPacket(port(c.src, 5), port(c.dst, 9), bytes.Repeat([]byte("x"), 301))
		binary.BigEndian.PutUint16(p[6:], c.sum)
		l.inject(vnet.Header{Flags: c.flags}, ip(c.src, c.dst, 17, 64, p))
		if hooked != c.want {
			t.Errorf("%s: %d datagrams forwarded, want %d", c.name, hooked, c.want)
		}
	}
}

// TestChecksumsBehindOptions: what has options is verified as well, and what the
// guest's kernel has left to its interface is right there too.
func TestChecksumsBehindOptions(t *testing.T) {
	s, l := newTestStack(t, true)
	hooked := 0
	s.SetHooks(Hooks{
		UDP: func(_, _ netip.AddrPort, _ uint8, _ int, _, _ []byte) { hooked++ },
		TCP: func(gstack.TransportEndpointID, *gstack.PacketBuffer) bool { hooked++; return true },
	})
	for _, a := range [][2]netip.AddrPort{{port(tGuest4, 5), port(tFar4, 9)}, {port(tGuest6, 5), port(tFar6, 9)}} {
		udp, tcp := udpFrame(a[0], a[1], []byte("hello")), syn(a[0], a[1])
		l4 := len(behindOption(udp)) - 8 - len("hello")
		for _, c := range []struct {
			name  string
			frame []byte
			at    int // of a byte that is wrong
			flags uint8
			want  int
		}{
			{"a datagram", udp, 0, 0, 1},
			{"a wrong one", udp, l4 + 6, 0, 0},
			{"one that is left to us", udp, l4 + 6, vnet.NeedsCsum, 1},
			{"a SYN", tcp, 0, 0, 1},
			{"a wrong one", tcp, l4 + 16, 0, 0},
			{"one that is left to us", tcp, l4 + 16, vnet.NeedsCsum, 1},
			{"one with a header of 16 bytes", tcp, l4 + 12, vnet.NeedsCsum, 0},
		} {
			hooked = 0
			b := behindOption(c.frame)
			if c.at > 0 {
				b[c.at] ^= 0x10
			}
			l.inject(vnet.Header{Flags: c.flags}, b)
			if hooked != c.want {
				t.Errorf("%v: %s: %d handed over, want %d", a[0].Addr(), c.name, hooked, c.want)
			}
		}
	}
	b := behindOption(udpFrame(port(tGuest4, 5), port(tFar4, 9), []byte("hello")))
	b[ethLen+10] ^= 1
	hooked = 0
	if l.inject(vnet.Header{Flags: vnet.NeedsCsum}, b); hooked != 0 {
		t.Error("a packet with a wrong header checksum is handed over")
	}
}

func TestFragmentsAreReassembledAndMade(t *testing.T) {
	s, l := newTestStack(t, false)
	var got []byte
	s.SetHooks(Hooks{UDP: func(src, dst netip.AddrPort, _ uint8, _ int, a, b []byte) { got = bytes.Join([][]byte{a, b}, nil) }})
	payload := make([]byte, 20000)
	for i := range payload {
		payload[i] = byte(i * 7)
	}
	for _, a := range [][2]netip.AddrPort{{port(tGuest4, 5), port(tFar4, 9)}, {port(tGuest6, 5), port(tFar6, 9)}} {
		// Our own fragments, turned round, are the guest's.
		if err := s.WriteUDP(a[1], a[0], 0, payload); err != nil {
			t.Fatal(err)
		}
		frames := l.take()
		if len(frames) < 14 {
			t.Fatalf("%d frames for 20000 bytes", len(frames))
		}
		got = nil
		for _, f := range frames {
			if len(f.b) > ethLen+1500 {
				t.Errorf("a frame of %d bytes on an MTU of 1500", len(f.b))
			}
			b := f.b
			copy(b[0:6], testGatewayMAC[:])
			copy(b[6:12], testGuestMAC[:])
			n := len(a[0].Addr().AsSlice())
			src := b[ethLen+12 : ethLen+12+n]
			if n == 16 {
				src = b[ethLen+8 : ethLen+24]
			}
			dst := b[ethLen+12+n : ethLen+12+2*n]
			if n == 16 {
				dst = b[ethLen+24 : ethLen+40]
			}
			tmp := append([]byte(nil), src...)
			copy(src, dst)
			copy(dst, tmp)
			l.inject(vnet.Header{}, b)
		}
		if !bytes.Equal(got, payload) {
			t.Errorf("%v: %d bytes reassembled", a[0], len(got))
		}
	}
}

func TestHopLimitEndsHere(t *testing.T) {
	s, l := newTestStack(t, true)
	s.SetHooks(Hooks{UDP: func(_, _ netip.AddrPort, _ uint8, _ int, _, _ []byte) { t.Error("forwarded") }})
	for _, a := range [][2]netip.Addr{{tGuest4, tFar4}, {tGuest6, tFar6}} {
		l.inject(vnet.Header{}, ip(a[0], a[1], 17, 1, udpPacket(port(a[0], 5), port(a[1], 33434), []byte("x"))))
		got := l.take()
		if len(got) != 1 {
			t.Fatalf("%d frames", len(got))
		}
		at, want := ethLen+20, []byte{11, 0}
		if a[0].Is6() {
			at, want = ethLen+40, []byte{3, 0}
		}
		if !bytes.Equal(got[0].b[at:at+2], want) {
			t.Errorf("%v: type and code % d", a[0], got[0].b[at:at+2])
		}
	}
}

// TestMulticastIsHandedOver where that is wanted, and meant for more than the
// guest's own link.
func TestMulticastIsHandedOver(t *testing.T) {
	group4, group6 := port(netip.MustParseAddr("239.255.255.250"), 1900), port(netip.MustParseAddr("ff0e::1"), 1900)
	for _, tt := range []struct {
		wanted   bool
		src, dst netip.AddrPort
		ttl      uint8
		handed   bool
	}{
		{false, port(tGuest4, 5), group4, 4, false},
		{true, port(tGuest4, 5), group4, 4, true},
		{true, port(tGuest4, 5), group4, 1, false},
		{true, port(tGuest6, 5), group6, 4, false},
	} {
		s, l := newTestStack(t, false)
		s.cfg.Multicast = tt.wanted
		handed := false
		s.SetHooks(Hooks{UDP: func(_, dst netip.AddrPort, _ uint8, _ int, _, _ []byte) { handed = dst == tt.dst }})
		l.inject(vnet.Header{}, ip(tt.src.Addr(), tt.dst.Addr(), 17, tt.ttl, udpPacket(tt.src, tt.dst, []byte("x"))))
		if handed != tt.handed {
			t.Errorf("%+v: %v", tt, handed)
		}
	}
}

func TestDNSAddressHasNoOtherPorts(t *testing.T) {
	s, l := newTestStack(t, true)
	s.SetHooks(Hooks{UDP: func(_, _ netip.AddrPort, _ uint8, _ int, _, _ []byte) { t.Error("forwarded") }})
	l.inject(vnet.Header{}, udpFrame(port(tGuest4, 5), port(tDNS4, 54), []byte("x")))
	got := l.take()
	if len(got) != 1 || got[0].b[ethLen+20] != 3 || got[0].b[ethLen+21] != 3 {
		t.Errorf("got %d frames", len(got))
	}
}

func TestPacketConn(t *testing.T) {
	s, l := newTestStack(t, true)
	c, err := s.ListenPacket(port(netip.IPv4Unspecified(), 67))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.ListenPacket(port(netip.IPv4Unspecified(), 67)); err == nil {
		t.Error("the same port twice")
	}
	// A client without an address broadcasts.
	discover := ipTo(broadcastMAC, netip.IPv4Unspecified(), broadcast4, 17, 64, udpPacket(port(netip.IPv4Unspecified(), 68), port(broadcast4, 67), []byte("discover")))
	l.inject(vnet.Header{}, discover)
	b := make([]byte, 100)
	n, from, err := c.ReadFrom(b)
	if err != nil || string(b[:n]) != "discover" || from.String() != "0.0.0.0:68" {
		t.Fatalf("read %q from %v, %v", b[:n], from, err)
	}
	if _, err := c.WriteTo([]byte("offer"), &net.UDPAddr{IP: net.IPv4bcast, Port: 68}); err != nil {
		t.Fatal(err)
	}
	f := l.take()
	if len(f) != 1 || !bytes.Equal(f[0].b[:6], broadcastMAC[:]) || !bytes.Equal(f[0].b[ethLen+12:ethLen+20], []byte{10, 0, 2, 2, 255, 255, 255, 255}) {
		t.Fatalf("sent % x", f)
	}
	c.SetReadDeadline(time.Now().Add(-time.Second))
	if _, _, err := c.ReadFrom(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read after the deadline: %v", err)
	}
	c.SetReadDeadline(time.Time{})
	time.AfterFunc(10*time.Millisecond, func() { c.Close() })
	if _, _, err := c.ReadFrom(b); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if c, err = s.ListenPacket(port(netip.IPv4Unspecified(), 67)); err != nil {
		t.Errorf("the port is not free after close: %v", err)
	}
	// A flood does not grow memory without bound.
	for range 3 * queueLen {
		l.inject(vnet.Header{}, discover)
	}
	if d := s.Stats().QueueDropped.Load(); d != 2*queueLen {
		t.Errorf("%d dropped, want %d", d, 2*queueLen)
	}
	// What waits and what comes goes to the handler, long datagrams as well.
	got, done := 0, 0
	c.(*packetConn).Handle(func(b []byte, from netip.AddrPort) {
		if string(b) != "discover" && len(b) != 1000 || from.String() != "0.0.0.0:68" {
			t.Fatalf("handler gets %d bytes from %v", len(b), from)
		}
		got++
	}, func() { done++ })
	if got != queueLen || done != queueLen {
		t.Errorf("%d datagrams waited, want %d; done %d times", got, queueLen, done)
	}
	long := bytes.Repeat([]byte("x"), 1000)
	l.inject(vnet.Header{}, ipTo(broadcastMAC, netip.IPv4Unspecified(), broadcast4, 17, 64, udpPacket(port(netip.IPv4Unspecified(), 68), port(broadcast4, 67), long)))
	l.inject(vnet.Header{}, discover)
	if got != queueLen+2 || done != got {
		t.Errorf("%d datagrams were handled, want %d; done %d times", got, queueLen+2, done)
	}
	// Those that come at once end with one call.
	s.Hold()
	l.inject(vnet.Header{}, discover)
	l.inject(vnet.Header{}, discover)
	if got != queueLen+4 || done != queueLen+2 {
		t.Errorf("while they come: %d datagrams, done %d times", got, done)
	}
	s.Flush()
	s.Flush()
	if done != queueLen+3 {
		t.Errorf("after them done %d times, want %d", done, queueLen+3)
	}
	c.Close()
	l.inject(vnet.Header{}, discover)
	if got != queueLen+4 {
		t.Error("a closed conn's handler was called")
	}
}

// TestWriteTCP: the link gets a whole frame, with what is left for it to do said in the
// frame's own header.
func TestWriteTCP(t *testing.T) {
	for _, offload := range []bool{false, true} {
		s, l := newTestStack(t, offload)
		for _, ends := range [][2]netip.Addr{{tGuest4, netip.MustParseAddr("192.0.2.1")}, {tGuest6, netip.MustParseAddr("2001:db8::1")}} {
			guest, remote := ends[0], ends[1]
			h := header.TCP(make([]byte, header.TCPMinimumSize))
			h.Encode(&header.TCPFields{SrcPort: 80, DstPort: 40000, SeqNum: 7, AckNum: 9, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagAck, WindowSize: 11})
			payload := bytes.Repeat([]byte("p"), 999)
			if err := s.WriteTCP(remote, guest, h, 500, payload); (err == nil) != offload {
				t.Errorf("offload %v: a payload of two segments: %v", offload, err)
			}
			long := l.take()
			if err := s.WriteTCP(remote, guest, h, 1460, payload); err != nil {
				t.Fatal(err)
			}
			f := l.take()
			if len(f) != 1 {
				t.Fatalf("%d frames", len(f))
			}
			ip := ethLen + header.IPv4MinimumSize
			if guest.Is6() {
				ip = ethLen + header.IPv6MinimumSize
			}
			b := f[0].b
			l4 := header.TCP(b[ip:])
			if l4.SequenceNumber() != 7 || l4.AckNumber() != 9 || l4.DestinationPort() != 40000 || !bytes.Equal(l4[header.TCPMinimumSize:], payload) {
				t.Errorf("sent % x", b)
			}
			pseudo := pseudoSum(remote, guest, uint8(header.TCPProtocolNumber), len(l4))
			if !offload {
				if f[0].h != (vnet.Header{}) || checksum.Checksum(l4, pseudo) != 0xffff {
					t.Errorf("without offload: %+v, checksum %x", f[0].h, l4.Checksum())
				}
				continue
			}
			want := vnet.Header{Flags: vnet.NeedsCsum, HdrLen: uint16(ip + len(h)), CsumStart: uint16(ip), CsumOffset: header.TCPChecksumOffset}
			if f[0].h != want || l4.Checksum() != pseudo {
				t.Errorf("with offload: %+v and checksum %x, want %+v and %x", f[0].h, l4.Checksum(), want, pseudo)
			}
			if len(long) != 1 || long[0].h.GSOSize != 500 || long[0].h.GSOType == vnet.GSONone {
				t.Errorf("two segments: %+v", long)
			}
		}
	}
}

func TestRouterConn(t *testing.T) {
	s, l := newTestStack(t, true)
	c, err := s.ListenRouter()
	if err != nil {
		t.Fatal(err)
	}
	src, dst := netip.MustParseAddr("fe80::5054:ff:fe00:1"), netip.MustParseAddr("ff02::2")
	l.inject(vnet.Header{}, ipTo(multicastMAC(dst), src, dst, 58, 255, icmpPacket(src, dst, 133, 0, make([]byte, 4))))
	b := make([]byte, 100)
	c.SetReadDeadline(time.Now().Add(time.Second))
	n, from, err := c.ReadFrom(b)
	if err != nil || n != 8 || b[0] != 133 {
		t.Fatalf("read %d bytes from %v, %v", n, from, err)
	}
	if _, err := c.WriteTo([]byte{134, 0, 0, 0, 64, 0, 0, 0}, from); err != nil {
		t.Fatal(err)
	}
	f := l.take()
	if len(f) != 1 {
		t.Fatal("no advertisement")
	}
	p := f[0].b[ethLen:]
	if p[7] != 255 || netip.AddrFrom16([16]byte(p[8:24])) != s.LinkLocal() || checksum.Checksum(p[40:], pseudoSum(s.LinkLocal(), src, 58, 8)) != 0xffff {
		t.Errorf("sent % x", p)
	}
	c.Close()
}

func TestICMPErrorsAreLimited(t *testing.T) {
	_, l := newTestStack(t, true)
	for range 500 {
		l.inject(vnet.Header{}, udpFrame(port(tGuest4, 5), port(tDNS4, 54), []byte("x")))
	}
	if n := len(l.take()); n < 50 || n > 400 {
		t.Errorf("%d errors for 500 datagrams at once", n)
	}
}

func TestNeighborTableIsBounded(t *testing.T) {
	s, l := newTestStack(t, true)
	s.SetHooks(Hooks{UDP: func(_, _ netip.AddrPort, _ uint8, _ int, _, _ []byte) {}})
	for i := range 5000 {
		a := tGuest6.As16()
		binary.BigEndian.PutUint16(a[12:], uint16(i))
		src := netip.AddrFrom16(a)
		l.inject(vnet.Header{}, udpFrame(port(src, 5), port(tFar6, 9), nil))
	}
	if n, out := len(s.neigh.m), s.NeighborsEvicted(); n > maxNeighbors || out != uint64(5000-n) {
		t.Errorf("%d entries, %d evicted", n, out)
	}
}
