package tap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/usernet/usernet/internal/vnet"
)

var (
	gatewayMAC = [6]byte{0x52, 0x55, 10, 0, 2, 2}
	everyone   = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

func stationMAC(n byte) [6]byte { return [6]byte{2, 0, 0, 0, 0, n} }

func stationAddr(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 2, 100 + n}) }

func stationAddr6(n byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, 0x75, 15: n})
}

// frame4 makes an IPv4 packet with payload in a frame.
func frame4(dst, src [6]byte, to, from netip.Addr, proto byte, payload []byte) []byte {
	f := append(append(dst[:len(dst):len(dst)], src[:]...), 8, 0)
	ip := make([]byte, 20)
	ip[0], ip[8], ip[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(payload)))
	copy(ip[12:], from.AsSlice())
	copy(ip[16:], to.AsSlice())
	return append(append(f, ip...), payload...)
}

func frame6(dst, src [6]byte, to, from netip.Addr, next byte, payload []byte) []byte {
	f := append(append(dst[:len(dst):len(dst)], src[:]...), 0x86, 0xdd)
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, next, 255
	binary.BigEndian.PutUint16(ip[4:], uint16(len(payload)))
	copy(ip[8:], from.AsSlice())
	copy(ip[24:], to.AsSlice())
	return append(append(f, ip...), payload...)
}

func frameARP(dst, src [6]byte, op byte, sender [6]byte, from, to netip.Addr) []byte {
	f := append(append(dst[:len(dst):len(dst)], src[:]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, op)
	f = append(append(f, sender[:]...), from.AsSlice()...)
	return append(append(f, make([]byte, 6)...), to.AsSlice()...)
}

// switchRig is a switch whose devices are sockets, and what it delivers.
type switchRig struct {
	*Switch
	ports     []*Port
	far       []int
	delivered [][]byte
}

// DeliverNetworkPacket implements stack.NetworkDispatcher.
func (r *switchRig) DeliverNetworkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

// DeliverLinkPacket implements stack.NetworkDispatcher.
func (r *switchRig) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

func newSwitchRig(t *testing.T, vnetHdr bool, options ...PortOptions) *switchRig {
	t.Helper()
	s, err := NewSwitch(SwitchOptions{MTU: 65520, MAC: gatewayMAC, VnetHdr: vnetHdr})
	if err != nil {
		t.Fatal(err)
	}
	r := &switchRig{Switch: s}
	s.Attach(r)
	s.SetReceiver(func(_ vnet.Header, eth, tail []byte) bool {
		r.delivered = append(r.delivered, append(bytes.Clone(eth), tail...))
		return true
	}, func(tcpip.Address) [6]byte { return stationMAC(1) })
	for i, o := range options {
		n := byte(i)
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		o.FD, o.MAC = fds[0], stationMAC(n)
		o.Addrs = []netip.Addr{stationAddr(n), stationAddr6(n)}
		p, err := s.Add(o)
		if err != nil {
			t.Fatal(err)
		}
		r.ports, r.far = append(r.ports, p), append(r.far, fds[1])
		t.Cleanup(func() { unix.Close(fds[1]) })
	}
	t.Cleanup(s.Close)
	return r
}

func (r *switchRig) write(t *testing.T, port int, f []byte) {
	t.Helper()
	if r.vnetHdr {
		var pre [vnet.Size]byte
		f = append(pre[:], f...)
	}
	if _, err := unix.Write(r.far[port], f); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Receive(8); err != nil {
		t.Fatal(err)
	}
}

// read returns the next frame that a port has got, with its header, or nil.
func (r *switchRig) read(port int) []byte {
	b := make([]byte, 1<<17)
	n, err := unix.Read(r.far[port], b)
	if err != nil {
		return nil
	}
	return b[:n]
}

// got says who has got the frame that was sent last: ports by their numbers, the
// gateway as g.
func (r *switchRig) got() string {
	var who string
	for i := range r.far {
		if r.read(i) != nil {
			who += string(rune('0' + i))
		}
	}
	if len(r.delivered) > 0 {
		who += "g"
	}
	r.delivered = nil
	return who
}

func TestSwitchPaths(t *testing.T) {
	m, a, a6 := stationMAC, stationAddr, stationAddr6
	gw4 := netip.MustParseAddr("10.0.2.2")
	zero := netip.IPv4Unspecified()
	bcast := netip.MustParseAddr("255.255.255.255")
	all6 := netip.MustParseAddr("ff02::1")
	mdns := netip.MustParseAddr("224.0.0.251")
	udp := func(from, to uint16) []byte {
		b := binary.BigEndian.AppendUint16(nil, from)
		return append(binary.BigEndian.AppendUint16(b, to), 0, 8, 0, 0)
	}
	ndp := func(typ byte, target netip.Addr, option byte, mac [6]byte) []byte {
		b := append([]byte{typ, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
		return append(append(b, option, 1), mac[:]...)
	}
	tests := []struct {
		name  string
		from  int
		frame []byte
		want  string
	}{
		{"to a member", 0, frame4(m(1), m(0), a(1), a(0), 6, make([]byte, 20)), "1"},
		{"to a member by IPv6", 1, frame6(m(0), m(1), a6(0), a6(1), 6, make([]byte, 20)), "0"},
		{"to itself", 0, frame4(m(0), m(0), a(0), a(0), 6, nil), ""},
		{"to nobody", 0, frame4(m(77), m(0), a(1), a(0), 6, nil), ""},
		{"to the gateway", 0, frame4(gatewayMAC, m(0), gw4, a(0), 6, nil), "g"},
		{"to a group", 0, frame4([6]byte{1, 0, 0x5e, 0, 0, 251}, m(0), mdns, a(0), 17, udp(5353, 5353)), "1g"},
		{"ARP request", 0, frameARP(everyone, m(0), 1, m(0), a(0), a(1)), "1g"},
		{"ARP probe", 0, frameARP(everyone, m(0), 1, m(0), zero, a(0)), "1g"},
		{"ARP reply", 0, frameARP(m(1), m(0), 2, m(0), a(0), a(1)), "1"},
		{"DHCP client", 0, frame4(everyone, m(0), bcast, zero, 17, udp(68, 67)), "1g"},
		{"duplicate address detection", 0, frame6(everyone, m(0), all6, netip.IPv6Unspecified(), 58, ndp(135, a6(0), 14, m(0))), "1g"},
		{"neighbour advertisement", 0, frame6(m(1), m(0), a6(1), a6(0), 58, ndp(136, a6(0), 2, m(0))), "1"},
		{"link-local source", 0, frame6(m(1), m(0), a6(1), eui64(netip.MustParseAddr("fe80::"), m(0)), 58, []byte{128, 0, 0, 0}), "1"},
		{"source made of the MAC", 0, frame6(m(1), m(0), a6(1), eui64(a6(0), m(0)), 58, []byte{128, 0, 0, 0}), "1"},

		{"foreign MAC", 0, frame4(m(1), m(7), a(1), a(0), 6, nil), ""},
		{"the gateway's MAC", 0, frame4(m(1), gatewayMAC, a(1), a(0), 6, nil), ""},
		{"foreign source", 0, frame4(m(1), m(0), a(1), a(7), 6, nil), ""},
		{"another's source to the gateway", 0, frame4(gatewayMAC, m(0), gw4, a(1), 6, nil), ""},
		{"the gateway's source", 0, frame4(m(1), m(0), a(1), gw4, 6, nil), ""},
		{"no source", 0, frame4(m(1), m(0), a(1), zero, 6, nil), ""},
		{"ARP claims another's address", 0, frameARP(everyone, m(0), 1, m(0), a(1), a(1)), ""},
		{"ARP claims another's MAC", 0, frameARP(everyone, m(0), 2, m(1), a(0), a(1)), ""},
		{"ARP claims the gateway", 0, frameARP(m(1), m(0), 2, m(0), gw4, a(1)), ""},
		{"ARP reply without address", 0, frameARP(m(1), m(0), 2, m(0), zero, a(1)), ""},
		{"DHCP server", 0, frame4(everyone, m(0), bcast, a(0), 17, udp(67, 68)), ""},
		{"DHCPv6 server", 0, frame6(m(1), m(0), a6(1), a6(0), 17, udp(547, 546)), ""},
		{"foreign IPv6 source", 0, frame6(m(1), m(0), a6(1), a6(7), 6, nil), ""},
		{"router advertisement", 0, frame6(everyone, m(0), all6, eui64(netip.MustParseAddr("fe80::"), m(0)), 58, ndp(134, a6(0), 1, m(0))), ""},
		{"hidden router advertisement", 0, frame6(everyone, m(0), all6, a6(0), 60, append([]byte{58, 0, 1, 4, 0, 0, 0, 0}, ndp(134, a6(0), 1, m(0))...)), ""},
		{"advertisement in a fragment", 0, frame6(m(1), m(0), a6(1), a6(0), 44, append([]byte{58, 0, 0, 1, 0, 0, 0, 0}, ndp(136, a6(0), 2, m(0))...)), ""},
		{"headers without end", 0, frame6(m(1), m(0), a6(1), a6(0), 60, []byte{58, 255, 0, 0, 0, 0, 0, 0}), ""},
		{"redirect", 0, frame6(m(1), m(0), a6(1), a6(0), 58, ndp(137, a6(0), 2, m(0))), ""},
		{"advertisement of another's address", 0, frame6(m(1), m(0), a6(1), a6(0), 58, ndp(136, a6(1), 2, m(0))), ""},
		{"advertisement of another MAC", 0, frame6(m(1), m(0), a6(1), a6(0), 58, ndp(136, a6(0), 2, m(1))), ""},
		{"solicitation of another MAC", 0, frame6(m(1), m(0), a6(1), a6(0), 58, ndp(135, a6(1), 1, m(1))), ""},
		{"VLAN tag", 0, append(append(append([]byte{}, frame4(m(1), m(0), a(1), a(0), 6, nil)[:12]...), 0x81, 0, 0, 0), 8, 0, 1, 2, 3), ""},
		{"unknown protocol", 0, append(append([]byte{}, frame4(m(1), m(0), a(1), a(0), 6, nil)[:12]...), 0x88, 0xb5, 1, 2, 3), ""},

		{"from an isolated one", 2, frame4(m(1), m(2), a(1), a(2), 6, nil), ""},
		{"to an isolated one", 0, frame4(m(2), m(0), a(2), a(0), 6, nil), ""},
		{"ARP of an isolated one", 2, frameARP(everyone, m(2), 1, m(2), a(2), gw4), "g"},
		{"an isolated one to the gateway", 2, frame4(gatewayMAC, m(2), gw4, a(2), 6, nil), "g"},
	}
	for _, offload := range []bool{false, true} {
		r := newSwitchRig(t, offload, PortOptions{}, PortOptions{}, PortOptions{Isolated: true})
		for _, tt := range tests {
			r.write(t, tt.from, tt.frame)
			if got := r.got(); got != tt.want {
				t.Errorf("%s: got by %q, want %q", tt.name, got, tt.want)
			}
		}
	}
}

// TestSwitchVerbatim: a super-frame passes as it is, with its header.
func TestSwitchVerbatim(t *testing.T) {
	r := newSwitchRig(t, true, PortOptions{}, PortOptions{})
	h := vnet.Header{Flags: vnet.NeedsCsum, GSOType: vnet.GSOTCPv4 | vnet.GSOECN, GSOSize: 1448, HdrLen: 66, CsumStart: 34, CsumOffset: 16}
	for _, n := range []int{20, 110, 1000, 65000} {
		payload := make([]byte, n)
		for i := range payload {
			payload[i] = byte(i * 7)
		}
		sent := make([]byte, vnet.Size)
		h.Encode(sent)
		sent = append(sent, frame4(stationMAC(1), stationMAC(0), stationAddr(1), stationAddr(0), 6, payload)...)
		if _, err := unix.Write(r.far[0], sent); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Receive(1); err != nil {
			t.Fatal(err)
		}
		if got := r.read(1); !bytes.Equal(got, sent) {
			t.Errorf("%d bytes: %d came of %d", n, len(got), len(sent))
		}
	}
	if st := r.SwitchStats(); st.Forwarded.Load() != 4 || st.Spoofed.Load() != 0 {
		t.Errorf("forwarded %d, spoofed %d", st.Forwarded.Load(), st.Spoofed.Load())
	}
}

// TestSwitchFair: one busy port leaves the others their turn.
func TestSwitchFair(t *testing.T) {
	r := newSwitchRig(t, false, PortOptions{}, PortOptions{}, PortOptions{})
	for i := range 3 {
		for range 8 {
			if _, err := unix.Write(r.far[i], frame4(gatewayMAC, stationMAC(byte(i)), stationAddr(9), stationAddr(byte(i)), 6, nil)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 4 {
		if n, err := r.Receive(3); n != 3 || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		heard := make(map[byte]bool)
		for _, f := range r.delivered {
			heard[f[11]] = true
		}
		if len(heard) != 3 {
			t.Errorf("heard %v, want all", heard)
		}
		r.delivered = nil
	}
}

// TestSwitchFlood: a storm is bounded, and other frames go on.
func TestSwitchFlood(t *testing.T) {
	r := newSwitchRig(t, false, PortOptions{}, PortOptions{})
	now := time.Now()
	r.Switch.now = func() time.Time { return now }
	arp := frameARP(everyone, stationMAC(0), 1, stationMAC(0), stationAddr(0), stationAddr(1))
	got := 0
	for range 3 * floodFrames {
		r.write(t, 0, arp)
		if r.read(1) != nil {
			got++
		}
	}
	st := r.SwitchStats()
	if got >= 3*floodFrames || uint64(got) != st.Flooded.Load() || st.FloodLimited.Load()+st.Flooded.Load() != 3*floodFrames {
		t.Errorf("%d came, %d flooded, %d held back", got, st.Flooded.Load(), st.FloodLimited.Load())
	}
	r.write(t, 0, frame4(stationMAC(1), stationMAC(0), stationAddr(1), stationAddr(0), 6, nil))
	if r.read(1) == nil {
		t.Error("nothing passes beside a storm")
	}
}

// TestSwitchLearn: behind a port with any source stations are found by what they
// send, and cannot take the place of others.
func TestSwitchLearn(t *testing.T) {
	r := newSwitchRig(t, false, PortOptions{AnySource: true}, PortOptions{})
	m, a := stationMAC, stationAddr
	r.write(t, 1, frame4(m(50), m(1), a(50), a(1), 6, nil))
	if got := r.got(); got != "0" {
		t.Errorf("a station that was not heard of: %q", got)
	}
	r.write(t, 0, frame4(m(1), m(50), a(1), a(50), 6, nil))
	if got := r.got(); got != "1" {
		t.Errorf("from it: %q", got)
	}
	for _, mac := range [][6]byte{m(1), gatewayMAC, {3}} {
		r.write(t, 0, frame4(m(1), mac, a(1), a(50), 6, nil))
		if got := r.got(); got != "" {
			t.Errorf("from %x: %q", mac, got)
		}
	}
	for i := range 3 * maxLearned {
		mac := [6]byte{2, 1, 0, 0, byte(i >> 8), byte(i)}
		r.write(t, 0, frame4(gatewayMAC, mac, a(1), a(50), 6, nil))
	}
	if n := len(r.learned); n > maxLearned {
		t.Errorf("%d are learned", n)
	}
	r.Remove(r.ports[0])
	if n := len(r.learned); n != 0 {
		t.Errorf("%d are learned of a port that has gone", n)
	}
}

func TestSwitchPorts(t *testing.T) {
	gone := 0
	r := newSwitchRig(t, true, PortOptions{}, PortOptions{Gone: func() { gone++ }}, PortOptions{})
	if _, err := r.Add(PortOptions{FD: -1, MAC: stationMAC(1)}); err != ErrMACTaken {
		t.Errorf("a MAC twice: %v", err)
	}
	if _, err := r.Add(PortOptions{FD: -1, MAC: gatewayMAC}); err != ErrMACTaken {
		t.Errorf("the gateway's MAC: %v", err)
	}
	// The gateway's frames find their port, and groups all of them.
	send := func(dst [6]byte) error {
		return r.WriteFrame(vnet.Header{}, frame4(dst, gatewayMAC, stationAddr(0), stationAddr(9), 6, nil), nil, nil)
	}
	for _, tt := range []struct {
		dst  [6]byte
		want string
	}{{stationMAC(2), "2"}, {everyone, "012"}, {stationMAC(9), ""}} {
		err := send(tt.dst)
		if got := r.got(); got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("to %x: got by %q, %v; want %q", tt.dst, got, err, tt.want)
		}
	}
	// The end of one device is its own.
	unix.Shutdown(r.far[1], unix.SHUT_RDWR)
	for range 3 {
		if n, err := r.Receive(8); n != 0 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	}
	if gone != 1 {
		t.Errorf("told %d times", gone)
	}
	r.Remove(r.ports[1])
	r.Remove(r.ports[1])
	if r.Ports() != 2 {
		t.Errorf("%d ports", r.Ports())
	}
	r.write(t, 0, frame4(stationMAC(1), stationMAC(0), stationAddr(1), stationAddr(0), 6, nil))
	if st := r.SwitchStats(); st.Unknown.Load() != 1 {
		t.Errorf("a frame to one that has gone: %d unknown", st.Unknown.Load())
	}
	r.Detach()
	if r.Ports() != 0 || send(stationMAC(0)) == nil {
		t.Error("ports are left")
	}
}

func FuzzGuard(f *testing.F) {
	m, a, a6 := stationMAC, stationAddr, stationAddr6
	f.Add(frame4(m(1), m(0), a(1), a(0), 17, make([]byte, 8)))
	f.Add(frame6(m(1), m(0), a6(1), a6(0), 0, []byte{58, 0, 5, 2, 0, 0, 0, 0, 143, 0, 0, 0}))
	f.Add(frame6(m(1), m(0), a6(1), a6(0), 58, append([]byte{136, 0, 0, 0, 0, 0, 0, 0}, a6(0).AsSlice()...)))
	f.Add(frameARP(everyone, m(0), 1, m(0), a(0), a(1)))
	g := newGuard(m(0), []netip.Addr{a(0), a6(0)})
	f.Fuzz(func(t *testing.T, b []byte) {
		if !g.permits(b) {
			return
		}
		if [6]byte(b[6:12]) != m(0) {
			t.Error("a foreign MAC passes")
		}
		switch {
		case b[12] == 8 && b[13] == 0:
			if src := netip.AddrFrom4([4]byte(b[26:30])); !g.has(src) && !src.IsUnspecified() {
				t.Errorf("source %v passes", src)
			}
		case b[12] == 0x86:
			if src := netip.AddrFrom16([16]byte(b[22:38])); !g.has(src) && !src.IsUnspecified() {
				t.Errorf("source %v passes", src)
			}
		}
	})
}
