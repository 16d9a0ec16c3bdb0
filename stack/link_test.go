package stack

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/vnet"
)

// memLink is a link in memory. What is sent is kept; what arrives is given to
// inject.
type memLink struct {
	mtu        uint32
	offload    bool
	receive    func(vnet.Header, []byte, []byte) bool
	resolve    func(tcpip.Address) [6]byte
	dispatcher gstack.NetworkDispatcher

	mu   sync.Mutex // guards following
	sent []sentFrame
}

type sentFrame struct {
	h vnet.Header
	b []byte
}

var _ Link = (*memLink)(nil)

func (l *memLink) SetReceiver(r func(vnet.Header, []byte, []byte) bool, resolve func(tcpip.Address) [6]byte) {
	l.receive, l.resolve = r, resolve
}

func (l *memLink) WriteFrame(h vnet.Header, head, a, b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent = append(l.sent, sentFrame{h, bytes.Join([][]byte{head, a, b}, nil)})
	return nil
}

func (l *memLink) WriteSegment(h vnet.Header, head, payload []byte) error {
	return l.WriteFrame(h, head, payload, nil)
}

func (l *memLink) WritePackets(pkts gstack.PacketBufferList) (int, tcpip.Error) {
	for _, p := range pkts.AsSlice() {
		v := p.ToView()
		l.WriteFrame(vnet.Header{}, append([]byte(nil), v.AsSlice()...), nil, nil)
		v.Release()
	}
	return pkts.Len(), nil
}

func (l *memLink) WritePacket(to tcpip.Address, pkt *gstack.PacketBuffer) tcpip.Error {
	l.addHeader(to, pkt)
	var one gstack.PacketBufferList
	one.PushBack(pkt)
	_, err := l.WritePackets(one)
	return err
}

func (l *memLink) MTU() uint32                           { return l.mtu }
func (l *memLink) SetMTU(uint32)                         {}
func (l *memLink) MaxHeaderLength() uint16               { return header.EthernetMinimumSize }
func (l *memLink) LinkAddress() tcpip.LinkAddress        { return tcpip.LinkAddress(testGatewayMAC[:]) }
func (l *memLink) SetLinkAddress(tcpip.LinkAddress)      {}
func (l *memLink) Attach(d gstack.NetworkDispatcher)     { l.dispatcher = d }
func (l *memLink) IsAttached() bool                      { return l.dispatcher != nil }
func (l *memLink) Wait()                                 {}
func (l *memLink) Close()                                {}
func (l *memLink) Detach()                               {}
func (l *memLink) SetOnCloseAction(func())               {}
func (l *memLink) ParseHeader(*gstack.PacketBuffer) bool { return true }
func (l *memLink) ARPHardwareType() header.ARPHardwareType {
	return header.ARPHardwareEther
}
func (l *memLink) Capabilities() gstack.LinkEndpointCapabilities { return gstack.CapabilityNone }
func (l *memLink) GSOMaxSize() uint32                            { return 65535 }
func (l *memLink) SupportedGSO() gstack.SupportedGSO {
	if l.offload {
		return gstack.HostGSOSupported
	}
	return gstack.GSONotSupported
}

func (l *memLink) AddHeader(pkt *gstack.PacketBuffer) {
	l.addHeader(pkt.EgressRoute.RemoteAddress, pkt)
}

func (l *memLink) addHeader(to tcpip.Address, pkt *gstack.PacketBuffer) {
	eth := pkt.LinkHeader().Push(header.EthernetMinimumSize)
	mac := l.resolve(to)
	copy(eth, mac[:])
	copy(eth[6:], testGatewayMAC[:])
	binary.BigEndian.PutUint16(eth[12:], uint16(pkt.NetworkProtocolNumber))
}

// inject delivers a frame as an endpoint would: split behind 128 bytes of
// packet, to the receiver first and then to netstack.
func (l *memLink) inject(h vnet.Header, frame []byte) {
	if len(frame) < ethLen+1 {
		return
	}
	cut := min(len(frame), ethLen+128)
	if l.receive(h, frame[:cut:cut], frame[cut:]) {
		return
	}
	pkt := gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: buffer.MakeWithData(frame[ethLen:])})
	l.dispatcher.DeliverNetworkPacket(tcpip.NetworkProtocolNumber(binary.BigEndian.Uint16(frame[12:])), pkt)
	pkt.DecRef()
}

// take returns the frames sent since the last call.
func (l *memLink) take() []sentFrame {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sent
	l.sent = nil
	return s
}

var (
	testGatewayMAC = [6]byte{0x52, 0x55, 10, 0, 2, 2}
	testGuestMAC   = [6]byte{0x52, 0x54, 0, 0, 0, 1}
	broadcastMAC   = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	tGuest4        = netip.MustParseAddr("10.0.2.100")
	tGateway4      = netip.MustParseAddr("10.0.2.2")
	tDNS4          = netip.MustParseAddr("10.0.2.3")
	tGuest6        = netip.MustParseAddr("fd75:736e:6574::100")
	tGateway6      = netip.MustParseAddr("fd75:736e:6574::2")
	tFar4          = netip.MustParseAddr("198.51.100.7")
	tFar6          = netip.MustParseAddr("2001:db8::7")
)

func newTestStack(t testing.TB, offload bool) (*Stack, *memLink) {
	t.Helper()
	l := &memLink{mtu: 1500, offload: offload}
	s, err := New(Config{
		Link: l, Prefix4: netip.MustParsePrefix("10.0.2.0/24"), Gateway4: tGateway4, DNS4: tDNS4,
		Prefix6: netip.MustParsePrefix("fd75:736e:6574::/64"), Gateway6: tGateway6, DNS6: netip.MustParseAddr("fd75:736e:6574::3"),
		GatewayMAC: testGatewayMAC, GuestMAC: testGuestMAC, USO: offload,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, l
}

func eth(dst, src [6]byte, proto uint16, payload []byte) []byte {
	f := append(append([]byte{}, dst[:]...), src[:]...)
	return append(binary.BigEndian.AppendUint16(f, proto), payload...)
}

// ip makes a frame of the guest with a transport packet in it.
func ip(src, dst netip.Addr, proto, ttl uint8, l4 []byte) []byte {
	return ipTo(testGatewayMAC, src, dst, proto, ttl, l4)
}

func ipTo(mac [6]byte, src, dst netip.Addr, proto, ttl uint8, l4 []byte) []byte {
	if src.Is4() {
		h := make([]byte, 20)
		(&Stack{}).ipv4Header(h, src, dst, proto, ttl, len(l4), 7, 0)
		return eth(mac, testGuestMAC, 0x0800, append(h, l4...))
	}
	h := make([]byte, 40)
	ipv6Header(h, src, dst, proto, ttl, len(l4))
	return eth(mac, testGuestMAC, 0x86dd, append(h, l4...))
}

func udpPacket(src, dst netip.AddrPort, payload []byte) []byte {
	u := make([]byte, 8)
	putUDP(u, src.Port(), dst.Port(), len(payload))
	sum := checksum.Combine(sumPieces(u, payload), pseudoSum(src.Addr(), dst.Addr(), 17, 8+len(payload)))
	setUDPChecksum(u, ^sum)
	return append(u, payload...)
}

func udpFrame(src, dst netip.AddrPort, payload []byte) []byte {
	return ip(src.Addr(), dst.Addr(), 17, 64, udpPacket(src, dst, payload))
}

func icmpPacket(src, dst netip.Addr, typ, code uint8, rest []byte) []byte {
	m := append([]byte{typ, code, 0, 0}, rest...)
	sum := uint16(0)
	if src.Is6() {
		sum = pseudoSum(src, dst, 58, len(m))
	}
	binary.BigEndian.PutUint16(m[2:], ^checksum.Checksum(m, sum))
	return m
}

func port(a netip.Addr, p uint16) netip.AddrPort { return netip.AddrPortFrom(a, p) }
