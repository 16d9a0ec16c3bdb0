package rig

import (
	"context"
	_ "embed" // for the frames
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

//go:embed frames.txt
var guestFrames string

// GuestFrames returns what a Linux guest at the usual addresses sends: ARP, NDP,
// echo requests, fragments, TCP, UDP, DNS, and DHCP.
var GuestFrames = sync.OnceValue(func() [][]byte {
	var all [][]byte
	for line := range strings.Lines(guestFrames) {
		digits, _, _ := strings.Cut(line, "#")
		if b, err := hex.DecodeString(strings.TrimSpace(digits)); err == nil && len(b) > 0 {
			all = append(all, b)
		}
	}
	return all
})

const ethLen = 14

// FixChecksums makes the checksums of a frame right, as far as it has any, so
// that what lies behind the check is reached.
func FixChecksums(f []byte) {
	if len(f) < ethLen+20 {
		return
	}
	be := binary.BigEndian
	p := f[ethLen:]
	var src, dst netip.Addr
	var proto uint8
	var l4 []byte
	switch {
	case be.Uint16(f[12:]) == unix.ETH_P_IP:
		ihl := int(p[0]&15) * 4
		if ihl < 20 || ihl > len(p) {
			return
		}
		be.PutUint16(p[10:], 0)
		be.PutUint16(p[10:], ^fold(sumBytes(0, p[:ihl])))
		src, dst = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
		proto, l4 = p[9], p[ihl:]
		if n := int(be.Uint16(p[2:])); n >= ihl && n <= len(p) {
			l4 = p[ihl:n]
		}
	case be.Uint16(f[12:]) == unix.ETH_P_IPV6 && len(p) >= 40:
		src, dst = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
		proto, l4 = p[6], p[40:]
		if n := int(be.Uint16(p[4:])); n <= len(l4) {
			l4 = l4[:n]
		}
	default:
		return
	}
	at := 0
	switch proto {
	case unix.IPPROTO_TCP:
		at = 16
	case unix.IPPROTO_UDP:
		at = 6
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		at = 2
	}
	if at == 0 || len(l4) < at+2 {
		return
	}
	be.PutUint16(l4[at:], 0)
	sum := uint32(0)
	if proto != unix.IPPROTO_ICMP {
		sum = pseudoSum(src, dst, proto, len(l4))
	}
	be.PutUint16(l4[at:], ^fold(sumBytes(sum, l4)))
}

// Fragment makes a fragment of a frame whose IP header is a plain one: of what is
// behind that, it carries data, which begins at from.
func Fragment(frame []byte, id, from int, data []byte, more bool) []byte {
	be := binary.BigEndian
	flag := uint16(0)
	if more {
		flag = 1
	}
	if be.Uint16(frame[12:]) == unix.ETH_P_IP {
		const header = 20
		b := append(append([]byte(nil), frame[:ethLen+header]...), data...)
		ip := b[ethLen : ethLen+header]
		be.PutUint16(ip[2:], uint16(header+len(data)))
		be.PutUint16(ip[4:], uint16(id))
		be.PutUint16(ip[6:], uint16(from/8)|flag<<13)
		be.PutUint16(ip[10:], 0)
		be.PutUint16(ip[10:], ^fold(sumBytes(0, ip)))
		return b
	}
	const header = 40
	b := append([]byte(nil), frame[:ethLen+header]...)
	b = append(b, b[ethLen+6], 0)
	b = be.AppendUint16(b, uint16(from)&^7|flag)
	b = append(be.AppendUint32(b, uint32(id)), data...)
	b[ethLen+6] = unix.IPPROTO_FRAGMENT
	be.PutUint16(b[ethLen+4:], uint16(8+len(data)))
	return b
}

// Malform makes a malformed frame of a good one: cut short, made longer, or with
// some bytes, words or header fields changed; in half of them the checksums are
// right nevertheless.
func Malform(rnd *rand.Rand, good []byte) []byte {
	f := append([]byte(nil), good...)
	field := func() { // in the headers, where it matters
		i := rnd.IntN(min(len(f), 100))
		if rnd.IntN(2) == 0 && i+2 <= len(f) {
			v := []uint16{0, 1, 0x7fff, 0x8000, 0xfffe, 0xffff, binary.BigEndian.Uint16(f[i:]) + 1, binary.BigEndian.Uint16(f[i:]) - 1}[rnd.IntN(8)]
			binary.BigEndian.PutUint16(f[i:], v)
			return
		}
		f[i] = []byte{0, 1, 0x7f, 0x80, 0xfe, 0xff, f[i] ^ 1<<rnd.IntN(8), byte(rnd.Uint32())}[rnd.IntN(8)]
	}
	for range 1 + rnd.IntN(3) {
		switch rnd.IntN(8) {
		case 0:
			f = f[:1+rnd.IntN(len(f))]
		case 1:
			f = append(f, make([]byte, 1+rnd.IntN(64))...)
		case 2: // nonsense of some length
			for i := ethLen + rnd.IntN(40); i < len(f); i++ {
				f[i] = byte(rnd.Uint32())
			}
		case 3: // as another protocol
			if len(f) > 23 {
				protos := []byte{0, 1, 2, 4, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 132, 135, 255}
				f[23-3*(int(f[12])>>7)] = protos[rnd.IntN(len(protos))] // next header of IPv6 is at 20
			}
		default:
			field()
		}
	}
	if rnd.IntN(2) == 0 {
		FixChecksums(f)
	}
	// The kernel takes no frame without an Ethernet header from a packet socket.
	for len(f) < ethLen {
		f = append(f, 0)
	}
	return f
}

// A Flood asks a guest's node for malformed frames on its interface.
type Flood struct {
	Interface string
	Gateway   netip.Addr // whose link address they mostly go to
	Count     int
	Seed      uint64
}

// SendFlood sends them as fast as the interface takes them, and returns how many
// it took.
var SendFlood = NewFunc("rig.sendFlood", func(ctx context.Context, f Flood) (int, error) {
	iface, mac, fd, err := openInterface(f.Interface, f.Gateway)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	ll := &unix.SockaddrLinklayer{Ifindex: iface.Index}
	rnd := rand.New(rand.NewPCG(f.Seed, 0))
	good := GuestFrames()
	sent := 0
	for i := 0; i < f.Count && (i%1024 != 0 || ctx.Err() == nil); i++ {
		frame := append([]byte(nil), good[rnd.IntN(len(good))]...)
		copy(frame[6:12], iface.HardwareAddr)
		if frame[0]&1 == 0 {
			copy(frame, mac)
		}
		frame = Malform(rnd, frame)
		if len(frame) > iface.MTU+ethLen {
			frame = frame[:iface.MTU+ethLen]
		}
		switch err := unix.Sendto(fd, frame, 0, ll); err {
		case nil:
			sent++
		case unix.ENOBUFS, unix.EAGAIN, unix.EMSGSIZE, unix.EINVAL:
		default:
			return sent, fmt.Errorf("send frame: %w", err)
		}
	}
	return sent, ctx.Err()
})

// openInterface opens a packet socket that sends whole frames and receives none,
// and finds the gateway's link address on that interface.
func openInterface(name string, gateway netip.Addr) (iface *net.Interface, mac net.HardwareAddr, fd int, err error) {
	if iface, err = net.InterfaceByName(name); err != nil {
		return nil, nil, -1, err
	}
	if mac, err = linkAddress(iface, gateway); err != nil {
		return nil, nil, -1, err
	}
	if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, nil, -1, fmt.Errorf("open packet socket: %w", err)
	}
	return iface, mac, fd, nil
}
