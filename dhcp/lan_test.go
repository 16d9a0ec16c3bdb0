package dhcp

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A lan is the least that real clients need around the servers: the far end of
// a veth pair, from which datagrams go to conns, and a gateway that answers
// ARP and echo requests. Package stack does all this for good.
type lan struct {
	f       *os.File
	v4      *lanConn
	v6      *lanConn
	ra      *lanConn
	guest   atomic.Pointer[[6]byte] // who sent last
	capture string                  // where messages are written to, if anywhere
	seen    map[string]bool         // file names

	mu    sync.Mutex // guards following
	taken map[netip.Addr]bool
}

var (
	gatewayMAC   = [6]byte{0x52, 0x55, 10, 0, 2, 2}
	gatewayLocal = addr("fe80::5055:aff:fe00:202")
)

// openLAN takes over the far end of the pair.
func openLAN(ifname string) (*lan, error) {
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, err
	}
	proto := uint16(unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(proto))
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: ifi.Index}); err != nil {
		return nil, err
	}
	l := &lan{f: os.NewFile(uintptr(fd), ifname), taken: make(map[netip.Addr]bool), seen: make(map[string]bool)}
	l.v4 = &lanConn{memConn: newQueueConn(), send: func(b []byte, to netip.Addr) error { return l.sendUDP(b, addr("10.0.2.2"), 67, to, 68) }}
	l.v6 = &lanConn{memConn: newQueueConn(), send: func(b []byte, to netip.Addr) error { return l.sendUDP(b, gatewayLocal, 547, to, 546) }}
	l.ra = &lanConn{memConn: newQueueConn(), send: l.sendICMPv6}
	go l.receive()
	return l, nil
}

func newQueueConn() *memConn {
	c := newMemConn()
	c.in = make(chan datagram, 64)
	return c
}

// lanConn is a conn whose writes become frames.
type lanConn struct {
	*memConn
	send func(b []byte, to netip.Addr) error
}

func (c *lanConn) WriteTo(b []byte, to net.Addr) (int, error) {
	return len(b), c.send(b, addrOf(to))
}

func (c *lanConn) deliver(b []byte, from net.Addr) {
	select {
	case c.in <- datagram{append([]byte(nil), b...), from}:
	default: // nobody reads
	}
}

// receive reads frames for as long as the process lives.
func (l *lan) receive() {
	buf := make([]byte, 65536)
	for {
		n, err := l.f.Read(buf)
		if err != nil {
			fmt.Println("read frame:", err)
			return
		}
		f := buf[:n]
		if n < 42 {
			continue
		}
		l.guest.Store((*[6]byte)(append([]byte(nil), f[6:12]...)))
		switch binary.BigEndian.Uint16(f[12:]) {
		case unix.ETH_P_ARP:
			l.arp(f[14:])
		case unix.ETH_P_IP:
			l.ipv4(f[14:])
		case unix.ETH_P_IPV6:
			if n >= 14+40+8 {
				l.ipv6(f[14:])
			}
		}
	}
}

// arp answers for the gateway and for addresses that are taken.
func (l *lan) arp(p []byte) {
	target := netip.AddrFrom4([4]byte(p[24:28]))
	l.mu.Lock()
	taken := l.taken[target]
	l.mu.Unlock()
	if p[7] != 1 || !(taken || target == addr("10.0.2.2")) {
		return
	}
	mac := gatewayMAC
	if taken {
		mac[0] = 0x56
	}
	r := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, mac[:]...)
	r = append(append(r, p[24:28]...), p[8:18]...)
	l.write(unix.ETH_P_ARP, *l.guest.Load(), r)
}

func (l *lan) ipv4(p []byte) {
	h := int(p[0]&15) * 4
	end := int(binary.BigEndian.Uint16(p[2:]))
	if h < 20 || end > len(p) || end < h+8 {
		return
	}
	src, dst, body := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[h:end]
	switch {
	case p[9] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(body[2:]) == 67:
		l.save("dhcp4", body[8:], 242)
		l.v4.deliver(body[8:], &net.UDPAddr{IP: ipOf(src), Port: 68})
	case p[9] == unix.IPPROTO_ICMP && body[0] == 8 && dst == addr("10.0.2.2"):
		body[0], body[2], body[3] = 0, 0, 0
		binary.BigEndian.PutUint16(body[2:], checksum(0, body))
		l.writeIP(dst, src, unix.IPPROTO_ICMP, body)
	}
}

func (l *lan) ipv6(p []byte) {
	end := 40 + int(binary.BigEndian.Uint16(p[4:]))
	if end > len(p) || end < 48 {
		return
	}
	src, body := netip.AddrFrom16([16]byte(p[8:24])), p[40:end]
	switch {
	case p[6] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(body[2:]) == 547:
		l.save("dhcp6", body[8:], 0)
		l.v6.deliver(body[8:], &net.UDPAddr{IP: ipOf(src), Port: 546})
	case p[6] == unix.IPPROTO_ICMPV6 && body[0] == typeSolicitation && p[7] == 255:
		l.save("rs", body, 0)
		l.ra.deliver(body, &net.IPAddr{IP: ipOf(src)})
	}
}

// save writes one message of each kind into l.capture.
func (l *lan) save(kind string, b []byte, typeAt int) {
	if l.capture == "" || len(b) <= typeAt {
		return
	}
	name := fmt.Sprintf("%s-%s-%d.txt", kind, os.Getenv(insideVariable), b[typeAt])
	if l.seen[name] {
		return
	}
	l.seen[name] = true
	text := strings.TrimSuffix(hex.Dump(b), "\n")
	var out strings.Builder
	for line := range strings.Lines(text) { // offset, hex, |text| → hex # text
		digits, ascii, _ := strings.Cut(strings.TrimSuffix(line, "\n")[10:], "|")
		fmt.Fprintf(&out, "%s# %s\n", digits, strings.TrimSuffix(ascii, "|"))
	}
	if err := os.WriteFile(filepath.Join(l.capture, name), []byte(out.String()), 0o644); err != nil {
		fmt.Println("capture:", err)
	}
}

func (l *lan) sendUDP(b []byte, src netip.Addr, sport uint16, dst netip.Addr, dport uint16) error {
	u := binary.BigEndian.AppendUint16(nil, sport)
	u = binary.BigEndian.AppendUint16(u, dport)
	u = binary.BigEndian.AppendUint16(u, uint16(8+len(b)))
	u = append(append(u, 0, 0), b...)
	binary.BigEndian.PutUint16(u[6:], checksum(pseudo(src, dst, unix.IPPROTO_UDP, len(u)), u))
	return l.writeIP(src, dst, unix.IPPROTO_UDP, u)
}

func (l *lan) sendICMPv6(b []byte, dst netip.Addr) error {
	b = append([]byte(nil), b...)
	binary.BigEndian.PutUint16(b[2:], checksum(pseudo(gatewayLocal, dst, unix.IPPROTO_ICMPV6, len(b)), b))
	return l.writeIP(gatewayLocal, dst, unix.IPPROTO_ICMPV6, b)
}

// writeIP sends a packet to the group, to all, or to the guest.
func (l *lan) writeIP(src, dst netip.Addr, proto byte, body []byte) error {
	mac := [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	if dst.Is4() {
		p := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0}
		p = append(append(p, src.AsSlice()...), dst.AsSlice()...)
		binary.BigEndian.PutUint16(p[2:], uint16(20+len(body)))
		binary.BigEndian.PutUint16(p[10:], checksum(0, p))
		if g := l.guest.Load(); dst != broadcast4 && g != nil {
			mac = *g
		}
		return l.write(unix.ETH_P_IP, mac, append(p, body...))
	}
	p := []byte{0x60, 0, 0, 0, 0, 0, proto, 255}
	binary.BigEndian.PutUint16(p[4:], uint16(len(body)))
	p = append(append(p, src.AsSlice()...), dst.AsSlice()...)
	if d := dst.As16(); dst.IsMulticast() {
		mac = [6]byte{0x33, 0x33, d[12], d[13], d[14], d[15]}
	} else if g := l.guest.Load(); g != nil {
		mac = *g
	}
	return l.write(unix.ETH_P_IPV6, mac, append(p, body...))
}

func (l *lan) write(proto uint16, to [6]byte, body []byte) error {
	f := append(append([]byte(nil), to[:]...), gatewayMAC[:]...)
	_, err := l.f.Write(append(binary.BigEndian.AppendUint16(f, proto), body...))
	return err
}

func pseudo(src, dst netip.Addr, proto, n int) uint32 {
	var b []byte
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	b = binary.BigEndian.AppendUint32(b, uint32(proto))
	return uint32(^checksum(0, b))
}

func checksum(sum uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
