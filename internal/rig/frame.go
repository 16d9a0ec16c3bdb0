package rig

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Frames asks a guest's node to send hand-made frames, which its kernel would
// refuse to: to each destination a TCP SYN, a UDP datagram, and an echo
// request.
type Frames struct {
	Interface string
	Gateway   netip.Addr // its link address is where the frames go
	// Source4 and Source6 are the guest's addresses.
	Source4, Source6 netip.Addr
	Destinations     []netip.Addr
	Port             uint16
}

// SendFrames sends them; the strings are the frames that came back within two
// seconds, from one of the destinations.
var SendFrames = NewFunc("rig.sendFrames", func(_ context.Context, f Frames) ([]string, error) {
	iface, err := net.InterfaceByName(f.Interface)
	if err != nil {
		return nil, err
	}
	mac, err := linkAddress(iface, f.Gateway)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(swap16(unix.ETH_P_ALL)))
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	defer unix.Close(fd)
	ll := &unix.SockaddrLinklayer{Ifindex: iface.Index, Protocol: swap16(unix.ETH_P_ALL)}
	if err := unix.Bind(fd, ll); err != nil {
		return nil, err
	}
	for _, dst := range f.Destinations {
		for _, frame := range f.probes(iface.HardwareAddr, mac, dst) {
			if err := unix.Sendto(fd, frame, 0, ll); err != nil {
				return nil, fmt.Errorf("send to %v: %w", dst, err)
			}
		}
	}
	return f.collect(fd)
})

// linkAddress finds the neighbour's MAC; the kernel resolves it for a datagram.
func linkAddress(iface *net.Interface, a netip.Addr) (net.HardwareAddr, error) {
	if c, err := net.Dial("udp", netip.AddrPortFrom(a, 9).String()); err == nil {
		c.Write(nil)
		c.Close()
	}
	var mac net.HardwareAddr
	found := Poll(3*time.Second, func() bool {
		list, _ := netlink.NeighList(iface.Index, netlink.FAMILY_ALL)
		for _, n := range list {
			if n.IP.Equal(a.AsSlice()) && len(n.HardwareAddr) == 6 {
				mac = n.HardwareAddr
			}
		}
		return mac != nil
	})
	if !found {
		return nil, fmt.Errorf("no link address of %v", a)
	}
	return mac, nil
}

// probes makes the frames for one destination.
func (f Frames) probes(from, to net.HardwareAddr, dst netip.Addr) [][]byte {
	src, etherType, icmp, echo := f.Source4, uint16(unix.ETH_P_IP), uint8(unix.IPPROTO_ICMP), byte(8)
	if dst.Is6() {
		src, etherType, icmp, echo = f.Source6, unix.ETH_P_IPV6, unix.IPPROTO_ICMPV6, 128
	}
	be := binary.BigEndian
	tcp := make([]byte, 20)
	be.PutUint16(tcp[0:], 41000)
	be.PutUint16(tcp[2:], f.Port)
	be.PutUint32(tcp[4:], 1)
	tcp[12], tcp[13] = 5<<4, 2 // header length, SYN
	be.PutUint16(tcp[14:], 65535)
	udp := make([]byte, 12)
	be.PutUint16(udp[0:], 41001)
	be.PutUint16(udp[2:], f.Port)
	be.PutUint16(udp[4:], 12)
	copy(udp[8:], "raw!")
	ping := []byte{echo, 0, 0, 0, 0x12, 0x34, 0, 1, 'r', 'a', 'w', '!'}
	var frames [][]byte
	for _, p := range []struct {
		protocol uint8
		payload  []byte
		checksum int
	}{{unix.IPPROTO_TCP, tcp, 16}, {unix.IPPROTO_UDP, udp, 6}, {icmp, ping, 2}} {
		sum := pseudoSum(src, dst, p.protocol, len(p.payload))
		if p.protocol == unix.IPPROTO_ICMP {
			sum = 0 // has no pseudo header
		}
		be.PutUint16(p.payload[p.checksum:], ^fold(sumBytes(sum, p.payload)))
		frame := append(append(append([]byte(nil), to...), from...), byte(etherType>>8), byte(etherType))
		frames = append(frames, append(append(frame, ipHeader(src, dst, p.protocol, len(p.payload))...), p.payload...))
	}
	return frames
}

func ipHeader(src, dst netip.Addr, protocol uint8, length int) []byte {
	be := binary.BigEndian
	if dst.Is6() {
		h := make([]byte, 8, 40)
		h[0] = 6 << 4
		be.PutUint16(h[4:], uint16(length))
		h[6], h[7] = protocol, 64
		return append(append(h, src.AsSlice()...), dst.AsSlice()...)
	}
	h := make([]byte, 12, 20)
	h[0] = 4<<4 | 5
	be.PutUint16(h[2:], uint16(20+length))
	be.PutUint16(h[6:], 1<<14) // don't fragment
	h[8], h[9] = 64, protocol
	h = append(append(h, src.AsSlice()...), dst.AsSlice()...)
	be.PutUint16(h[10:], ^fold(sumBytes(0, h)))
	return h
}

func pseudoSum(src, dst netip.Addr, protocol uint8, length int) uint32 {
	sum := sumBytes(sumBytes(0, src.AsSlice()), dst.AsSlice())
	return sum + uint32(protocol) + uint32(length)
}

func sumBytes(sum uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}

func fold(sum uint32) uint16 {
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// collect reads frames for two seconds and describes those that are answers.
func (f Frames) collect(fd int) ([]string, error) {
	var answers []string
	b := make([]byte, 65536)
	timeout := unix.Timeval{Usec: 100_000}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		n, from, err := unix.Recvfrom(fd, b, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if text := f.answer(b[:n]); text != "" {
			answers = append(answers, text)
		}
	}
	return answers, nil
}

// answer describes a frame that is a success, which is what must not come: a
// SYN-ACK, a datagram, an echo reply from a destination. Errors are welcome.
func (f Frames) answer(b []byte) string {
	if len(b) < 34 {
		return ""
	}
	var src netip.Addr
	var protocol byte
	var payload []byte
	switch binary.BigEndian.Uint16(b[12:]) {
	case unix.ETH_P_IP:
		src, _ = netip.AddrFromSlice(b[26:30])
		protocol, payload = b[23], b[34:]
	case unix.ETH_P_IPV6:
		if len(b) < 54 {
			return ""
		}
		src, _ = netip.AddrFromSlice(b[22:38])
		protocol, payload = b[20], b[54:]
	default:
		return ""
	}
	switch {
	case len(payload) < 8:
	case protocol == unix.IPPROTO_TCP && len(payload) >= 20 && binary.BigEndian.Uint16(payload[2:]) == 41000 && payload[13]&2 != 0:
		return fmt.Sprintf("SYN-ACK from %v", src)
	case protocol == unix.IPPROTO_UDP && binary.BigEndian.Uint16(payload[2:]) == 41001:
		return fmt.Sprintf("datagram from %v", src)
	case protocol == unix.IPPROTO_ICMP && payload[0] == 0 || protocol == unix.IPPROTO_ICMPV6 && payload[0] == 129:
		return fmt.Sprintf("echo reply from %v", src)
	}
	return ""
}

// swap16 puts a protocol number into network byte order for a sockaddr_ll.
func swap16(v uint16) uint16 { return v<<8 | v>>8 }

// A RouterAdvertisement is what a guest learns from its router.
type RouterAdvertisement struct {
	From             string
	Lifetime         time.Duration // as a default router
	Managed, Other   bool          // DHCPv6 has addresses, has anything else
	MTU              int
	Prefixes         []netip.Prefix
	Autonomous       bool // of the last prefix
	DNS              []netip.Addr
	LinkLayerAddress string
}

// AskRouter sends a Router Solicitation from an interface of a node and
// returns the answer.
var AskRouter = NewFunc("rig.askRouter", func(ctx context.Context, name string) (RouterAdvertisement, error) {
	c, err := net.ListenIP("ip6:58", &net.IPAddr{IP: net.IPv6unspecified})
	if err != nil {
		return RouterAdvertisement{}, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return RouterAdvertisement{}, err
	}
	// RFC 4861 section 6.1.1: other hop limits are not from this link.
	raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255) })
	b := make([]byte, 65536)
	for ctx.Err() == nil {
		// Fails while the interface's own address is tentative.
		c.WriteToIP([]byte{133, 0, 0, 0, 0, 0, 0, 0}, &net.IPAddr{IP: net.ParseIP("ff02::2"), Zone: name})
		for c.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); ; {
			n, from, err := c.ReadFromIP(b)
			if err != nil {
				break
			}
			if n >= 16 && b[0] == 134 {
				return parseAdvertisement(b[:n], from.String())
			}
		}
	}
	return RouterAdvertisement{}, errors.New("no router advertisement came")
})

// parseAdvertisement reads RFC 4861 section 4.2 and RFC 8106 section 5.1.
func parseAdvertisement(b []byte, from string) (RouterAdvertisement, error) {
	be := binary.BigEndian
	ra := RouterAdvertisement{
		From:     from,
		Lifetime: time.Duration(be.Uint16(b[6:])) * time.Second,
		Managed:  b[5]&0x80 != 0,
		Other:    b[5]&0x40 != 0,
	}
	for o := b[16:]; len(o) >= 8; {
		length := 8 * int(o[1])
		if length == 0 || length > len(o) {
			return ra, fmt.Errorf("option %d of %d bytes in %d", o[0], length, len(o))
		}
		switch o[0] {
		case 1:
			ra.LinkLayerAddress = net.HardwareAddr(o[2:8]).String()
		case 3:
			addr, _ := netip.AddrFromSlice(o[16:32])
			ra.Prefixes = append(ra.Prefixes, netip.PrefixFrom(addr, int(o[2])))
			ra.Autonomous = o[3]&0x40 != 0
		case 5:
			ra.MTU = int(be.Uint32(o[4:]))
		case 25:
			for a := o[8:length]; len(a) >= 16; a = a[16:] {
				addr, _ := netip.AddrFromSlice(a[:16])
				ra.DNS = append(ra.DNS, addr)
			}
		}
		o = o[length:]
	}
	return ra, nil
}
