package stack

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/vnet"
)

// seeds are good frames of every kind.
func seeds() [][]byte {
	ll := netip.MustParseAddr("fe80::5054:ff:fe00:1")
	syn := make([]byte, 24)
	binary.BigEndian.PutUint16(syn[0:], 40000)
	binary.BigEndian.PutUint16(syn[2:], 80)
	syn[12], syn[13], syn[14] = 0x60, 0x02, 0xff
	copy(syn[20:], []byte{2, 4, 5, 0xb4})
	tcpOf := func(src, dst netip.Addr) []byte {
		b := append([]byte(nil), syn...)
		binary.BigEndian.PutUint16(b[16:], ^checksum.Checksum(b, pseudoSum(src, dst, 6, len(b))))
		return b
	}
	frag := ip(tGuest4, tFar4, 17, 64, udpPacket(port(tGuest4, 5), port(tFar4, 9), make([]byte, 64)))
	frag[ethLen+6] = 0x20
	binary.BigEndian.PutUint16(frag[ethLen+10:], 0)
	binary.BigEndian.PutUint16(frag[ethLen+10:], ^checksum.Checksum(frag[ethLen:ethLen+20], 0))
	return [][]byte{
		arpRequest(tGuest4, tGateway4, 1),
		udpFrame(port(tGuest4, 5), port(tFar4, 9), make([]byte, 200)),
		udpFrame(port(tGuest6, 5), port(tFar6, 9), make([]byte, 200)),
		udpFrame(port(tGuest4, 5), port(tDNS4, 53), make([]byte, 40)),
		ip(tGuest4, tFar4, 1, 64, icmpPacket(tGuest4, tFar4, 8, 0, make([]byte, 60))),
		ip(tGuest6, tFar6, 58, 64, icmpPacket(tGuest6, tFar6, 128, 0, make([]byte, 60))),
		ip(tGuest6, tGateway6, 58, 255, icmpPacket(tGuest6, tGateway6, 135, 0, append(make([]byte, 4), tGateway6.AsSlice()...))),
		ip(ll, netip.MustParseAddr("ff02::2"), 58, 255, icmpPacket(ll, netip.MustParseAddr("ff02::2"), 133, 0, make([]byte, 4))),
		ip(tGuest4, tFar4, 6, 64, tcpOf(tGuest4, tFar4)),
		ip(tGuest6, tFar6, 6, 64, tcpOf(tGuest6, tFar6)),
		ip(tGuest4, tFar4, 1, 64, icmpPacket(tGuest4, tFar4, 3, 3, append(make([]byte, 4), frag[ethLen:ethLen+28]...))),
		ip(tGuest6, tFar6, 0, 64, append([]byte{17, 0, 5, 2, 0, 0, 1, 0}, udpPacket(port(tGuest6, 5), port(tFar6, 9), make([]byte, 8))...)),
		ip(tGuest6, tFar6, 44, 64, append([]byte{17, 0, 0, 1, 0, 0, 0, 9}, udpPacket(port(tGuest6, 5), port(tFar6, 9), make([]byte, 64))...)),
		frag,
	}
}

func fuzzStack(t testing.TB) *memLink {
	s, l := newTestStack(t, true)
	s.SetHooks(Hooks{
		TCP:  func(gstack.TransportEndpointID, *gstack.PacketBuffer) bool { return false },
		UDP:  func(_, _ netip.AddrPort, _ uint8, gso int, a, b []byte) {},
		Echo: func(_, _ netip.Addr, _ uint8, _, _ uint16, _, _ []byte) {},
	})
	pc, err := s.ListenPacket(port(tDNS4, 53))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	rc, err := s.ListenRouter()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rc.Close() })
	if _, err := s.Listen(port(tDNS4, 53)); err != nil {
		t.Fatal(err)
	}
	return l
}

// FuzzFrames gives sequences of frames to the whole stack. The first byte of
// each says whether its checksums are made right, the next two how long it is.
func FuzzFrames(f *testing.F) {
	var all []byte
	for _, s := range seeds() {
		one := binary.BigEndian.AppendUint16([]byte{1}, uint16(len(s)))
		one = append(one, s...)
		f.Add(one)
		all = append(all, one...)
	}
	f.Add(all)
	l := fuzzStack(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		for n := 0; len(b) > 3 && n < 32; n++ {
			flags, size := b[0], int(binary.BigEndian.Uint16(b[1:]))
			b = b[3:]
			size = min(size, len(b))
			frame := append([]byte(nil), b[:size]...)
			b = b[size:]
			h := vnet.Header{}
			if flags&1 != 0 {
				fixChecksums(frame)
			}
			if flags&2 != 0 {
				h.Flags = vnet.NeedsCsum
			}
			if flags&4 != 0 {
				h.GSOType, h.GSOSize = vnet.GSOUDP, uint16(flags)<<3
			}
			l.inject(h, frame)
		}
		l.take()
	})
}

// fixChecksums makes a frame pass the first checks, so that the later ones are
// reached.
func fixChecksums(f []byte) {
	if len(f) < ethLen+20 {
		return
	}
	copy(f[0:6], testGatewayMAC[:])
	p := f[ethLen:]
	switch {
	case f[12] == 8 && f[13] == 0:
		ihl := int(p[0]&15) * 4
		if ihl < 20 || ihl > len(p) {
			return
		}
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ihl], 0))
		fixL4(p[9], netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[ihl:])
	case f[12] == 0x86 && f[13] == 0xdd && len(p) >= 40:
		fixL4(p[6], netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), p[40:])
	}
}

func fixL4(proto uint8, src, dst netip.Addr, b []byte) {
	at := map[uint8]int{6: 16, 17: 6, 1: 2, 58: 2}[proto]
	if at == 0 || len(b) < at+2 {
		return
	}
	b[at], b[at+1] = 0, 0
	sum := uint16(0)
	if proto != 1 {
		sum = pseudoSum(src, dst, proto, len(b))
	}
	binary.BigEndian.PutUint16(b[at:], ^checksum.Checksum(b, sum))
}

// TestEveryTruncationIsSurvived cuts and extends good frames at every byte.
func TestEveryTruncationIsSurvived(t *testing.T) {
	l := fuzzStack(t)
	for _, s := range seeds() {
		for n := range len(s) {
			for _, h := range []vnet.Header{{}, {Flags: vnet.NeedsCsum}, {GSOType: vnet.GSOUDP, GSOSize: 8}} {
				l.inject(h, append([]byte(nil), s[:n]...))
			}
		}
		for n := range 64 {
			l.inject(vnet.Header{}, append(append([]byte(nil), s...), make([]byte, n+1)...))
		}
	}
	l.take()
	// Still alive.
	l.inject(vnet.Header{}, arpRequest(tGuest4, tGateway4, 1))
	if len(l.take()) != 1 {
		t.Error("the gateway no longer answers")
	}
}
