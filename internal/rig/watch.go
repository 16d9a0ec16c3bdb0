package rig

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// A packet is recognized wherever it goes by its mark: bytes of its payload, or of
// TCP one of its ports, which the mark's number makes.
const (
	markText   = "rig-mark-"
	markDigits = 4
	markPort   = 20000
	maxMark    = 5000
)

// MarkText returns n bytes that carry a mark wherever they are cut.
func MarkText(mark, n int) []byte {
	one := fmt.Appendf(nil, markText+"%0*d.", markDigits, mark)
	return bytes.Repeat(one, n/len(one)+1)[:n]
}

// MarkPort returns the port that carries a mark.
func MarkPort(mark int) uint16 { return uint16(markPort + mark) }

// A Seen is a packet with a mark.
type Seen struct {
	Mark     int
	MAC      string // whom the frame was for
	Kind     string // udp, tcp, or icmp with its type and code
	Src, Dst netip.Addr
}

func (s Seen) String() string {
	return fmt.Sprintf("%d: %s %v → %v (%s)", s.Mark, s.Kind, s.Src, s.Dst, s.MAC)
}

// A Watch is where to look for marks.
type Watch struct {
	Interface string // "" is all
	Incoming  bool   // only what comes in
}

var watch struct {
	mu   sync.Mutex
	fd   int
	seen map[Seen]bool
}

// StartWatch has a node look at its packets, in place of what it looked at before.
var StartWatch = NewFunc("rig.startWatch", func(_ context.Context, w Watch) (struct{}, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(swap16(unix.ETH_P_ALL)))
	if err != nil {
		return struct{}{}, fmt.Errorf("open packet socket: %w", err)
	}
	if w.Interface != "" {
		iface, err := net.InterfaceByName(w.Interface)
		if err != nil {
			return struct{}{}, err
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: iface.Index, Protocol: swap16(unix.ETH_P_ALL)}); err != nil {
			return struct{}{}, err
		}
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20) // as far as rmem_max goes
	watch.mu.Lock()
	defer watch.mu.Unlock()
	watch.fd, watch.seen = fd, make(map[Seen]bool)
	go lookForMarks(fd, w)
	return struct{}{}, nil
})

func lookForMarks(fd int, w Watch) {
	defer unix.Close(fd)
	b := make([]byte, 1<<17)
	for {
		n, from, err := unix.Recvfrom(fd, b, 0)
		if err != nil && err != unix.EINTR && err != unix.ENETDOWN {
			return
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || w.Incoming && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		s, ok := readMark(b[:n])
		watch.mu.Lock()
		if watch.fd != fd {
			watch.mu.Unlock()
			return
		}
		if ok && len(watch.seen) < 1000 {
			watch.seen[s] = true
		}
		watch.mu.Unlock()
	}
}

// Watched lists what a node has seen since StartWatch, each once.
var Watched = NewFunc("rig.watched", func(context.Context, struct{}) ([]Seen, error) {
	watch.mu.Lock()
	defer watch.mu.Unlock()
	var all []Seen
	for s := range watch.seen {
		all = append(all, s)
	}
	return all, nil
})

// readMark recognizes a frame.
func readMark(f []byte) (s Seen, ok bool) {
	if len(f) < ethLen {
		return s, false
	}
	s.MAC = net.HardwareAddr(f[:6]).String()
	var l4 []byte
	if s.Kind, s.Src, s.Dst, l4, ok = readPacket(f[ethLen:]); !ok {
		return s, false
	}
	if _, rest, found := bytes.Cut(f, []byte(markText)); found && len(rest) >= markDigits {
		if s.Mark, _ = strconv.Atoi(string(rest[:markDigits])); s.Mark > 0 {
			return s, true
		}
	}
	if len(l4) > 8 && s.Kind != "tcp" && s.Kind != "udp" { // an error, which quotes what it is about
		kind, _, _, quoted, ok := readPacket(l4[8:])
		if !ok || kind != "tcp" && kind != "udp" {
			return s, false
		}
		l4 = quoted
	} else if s.Kind != "tcp" {
		return s, false
	}
	for i := 0; i+2 <= min(len(l4), 4); i += 2 {
		if s.Mark = int(binary.BigEndian.Uint16(l4[i:])) - markPort; 0 < s.Mark && s.Mark < maxMark {
			return s, true
		}
	}
	return s, false
}

// readPacket finds the transport header of an IP packet that is no later fragment.
func readPacket(b []byte) (kind string, src, dst netip.Addr, l4 []byte, ok bool) {
	var proto byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && len(b) >= int(b[0]&15)*4:
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		proto, l4 = b[9], b[int(b[0]&15)*4:]
	case len(b) >= 40 && b[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		proto, l4 = b[6], b[40:]
		if proto == unix.IPPROTO_FRAGMENT && len(l4) >= 8 {
			proto, l4 = l4[0], l4[8:]
		}
	default:
		return kind, src, dst, nil, false
	}
	switch {
	case proto == unix.IPPROTO_TCP:
		kind = "tcp"
	case proto == unix.IPPROTO_UDP:
		kind = "udp"
	case (proto == unix.IPPROTO_ICMP || proto == unix.IPPROTO_ICMPV6) && len(l4) >= 2:
		kind = fmt.Sprintf("icmp %d/%d", l4[0], l4[1])
	default:
		kind = fmt.Sprintf("protocol %d", proto)
	}
	return kind, src, dst, l4, true
}
