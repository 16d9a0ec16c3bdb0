package forwarder

import (
	"container/list"
	"encoding/binary"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpInTable holds the flows of published UDP ports: one per port and client.
type udpInTable struct {
	f     *Forwarder
	flows map[udpInKey]*udpInFlow // as the guest's answers name them
	idle  *list.List              // oldest first
}

// udpInKey is a flow as the guest sees it.
type udpInKey struct{ guest, client netip.AddrPort }

// udpSocket is a socket of a published port.
type udpSocket struct {
	t       *udpInTable
	port    *inboundPort
	fd      int
	slot    int32
	six     bool
	clients map[netip.AddrPort]*udpInFlow
	last    *udpInFlow // of the last datagram
}

// udpInFlow is one client of a published port.
type udpInFlow struct {
	s *udpSocket
	// The guest's end, and the client as the guest sees it.
	guest, seen netip.AddrPort

	client rawAddr
	addr   netip.AddrPort // the same
	// local is where the client has sent to, which answers come from, as
	// IP_PKTINFO or IPV6_PKTINFO.
	local [pktinfoSize]byte
	age   *list.Element
	used  time.Time
	usage
}

// pktinfoSize is the longer of struct in_pktinfo and struct in6_pktinfo.
const pktinfoSize = unix.SizeofInet6Pktinfo

func (t *udpInTable) init(f *Forwarder) {
	t.f = f
	t.flows = make(map[udpInKey]*udpInFlow)
	t.idle = list.New()
}

// prepareUDP readies a socket for a published port.
func prepareUDP(fd int, six bool) {
	if six {
		setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	} else {
		setInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	}
	setInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	setInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20) // as far as rmem_max goes
}

// open begins to serve a socket.
func (t *udpInTable) open(p *inboundPort, fd int) error {
	s := &udpSocket{t: t, port: p, fd: fd, clients: make(map[netip.AddrPort]*udpInFlow)}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	_, s.six = sa.(*unix.SockaddrInet6)
	if s.slot, err = t.f.poll.add(fd, unix.EPOLLIN, s); err != nil {
		return err
	}
	p.sockets = append(p.sockets, s)
	return nil
}

func (t *udpInTable) close(s *udpSocket) {
	for _, fl := range s.clients {
		fl.end()
	}
	t.f.poll.remove(s.slot)
	unix.Close(s.fd)
}

// ready implements pollee. It passes what the socket holds on to the guest.
func (s *udpSocket) ready(events uint32) {
	if events&unix.EPOLLERR != 0 {
		soError(s.fd) // or it would be reported for ever
	}
	f := s.t.f
	in := f.udp.receiver()
	n, errno := in.fill(s.fd)
	if errno != 0 {
		return
	}
	var fl *udpInFlow
	for i := range in.hdrs[:n] {
		m := &in.hdrs[i]
		from := in.addr[i].get()
		if fl == nil || fl.addr != from {
			if fl = s.flow(from, &in.addr[i], m.hdr.Namelen); fl == nil {
				f.stats.UDPDropped.Add(1)
				continue
			}
		}
		ctl := in.ctl[i][:m.hdr.Controllen]
		fl.keepLocal(ctl)
		fl.touch()
		fl.down += uint64(m.n)
		f.stats.UDPBytesDown.Add(uint64(m.n))
		f.guest.WriteUDP(fl.seen, fl.guest, groSize(ctl), in.bufs[i][:m.n])
	}
}

// flow finds the flow of a client, or makes one.
func (s *udpSocket) flow(client netip.AddrPort, raw *rawAddr, rawLen uint32) *udpInFlow {
	if s.last != nil && s.last.addr == client {
		return s.last
	}
	fl := s.clients[client]
	if fl == nil {
		if fl = s.newFlow(client); fl == nil {
			return nil
		}
		fl.client = *raw
		fl.client.len = rawLen
	}
	s.last = fl
	return fl
}

func (s *udpSocket) newFlow(client netip.AddrPort) *udpInFlow {
	t := s.t
	if !client.IsValid() || client.Port() == 0 {
		return nil
	}
	if len(t.flows) >= t.f.cfg.MaxUDP {
		t.idle.Front().Value.(*udpInFlow).end()
		t.f.stats.UDPEvicted.Add(1)
	}
	guest := s.port.to(client.Addr())
	seen, ok := t.free(guest, t.f.inbound.routed(t.f.inbound.seen(client, guest.Addr())))
	if !ok {
		return nil
	}
	fl := &udpInFlow{s: s, addr: client, guest: guest, seen: seen}
	fl.born = t.f.clock()
	fl.last = fl.born
	t.flows[udpInKey{guest, seen}] = fl
	s.clients[client] = fl
	fl.age = t.idle.PushBack(fl)
	t.f.stats.UDPActive.Add(1)
	t.f.stats.UDPTotal.Add(1)
	return fl
}

// free returns an address that no other client has for the guest: clients of
// the host's own all come from the gateway.
func (t *udpInTable) free(guest, seen netip.AddrPort) (netip.AddrPort, bool) {
	const tries = 1 << 10
	for i := range tries {
		if _, taken := t.flows[udpInKey{guest, seen}]; !taken {
			return seen, true
		}
		// Ports from 49152 on are nobody's (RFC 6335 section 6).
		seen = netip.AddrPortFrom(seen.Addr(), 49152+uint16(int(seen.Port())+i)%(1<<14))
	}
	return seen, false
}

// keepLocal notes where the client has sent to.
func (fl *udpInFlow) keepLocal(ctl []byte) {
	for len(ctl) >= unix.SizeofCmsghdr {
		c := (*unix.Cmsghdr)(unsafe.Pointer(&ctl[0]))
		n := int(c.Len)
		if n < unix.SizeofCmsghdr || n > len(ctl) {
			return
		}
		data := ctl[unix.CmsgLen(0):n]
		switch {
		case c.Level == unix.IPPROTO_IP && c.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			// The interface is the route's to choose, ipi_spec_dst is the
			// source. What it is here is the address that was sent to.
			binary.NativeEndian.PutUint32(fl.local[0:], 0)
			copy(fl.local[4:8], data[4:8])
		case c.Level == unix.IPPROTO_IPV6 && c.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			copy(fl.local[:16], data[:16])
			binary.NativeEndian.PutUint32(fl.local[16:], 0)
			if fl.addr.Addr().IsLinkLocalUnicast() {
				copy(fl.local[16:20], data[16:20])
			}
		}
		ctl = ctl[min(unix.CmsgSpace(n-unix.CmsgLen(0)), len(ctl)):]
	}
}

func (fl *udpInFlow) touch() {
	t := fl.s.t
	if fl.used != t.f.now {
		t.idle.MoveToBack(fl.age)
	}
	fl.used = t.f.now
	fl.last = t.f.clock()
}

func (fl *udpInFlow) end() {
	t := fl.s.t
	t.idle.Remove(fl.age)
	delete(t.flows, udpInKey{fl.guest, fl.seen})
	delete(fl.s.clients, fl.addr)
	if fl.s.last == fl {
		fl.s.last = nil
	}
	t.f.stats.UDPActive.Add(-1)
}

// sweep ends flows that have been idle too long.
func (t *udpInTable) sweep() {
	for e := t.idle.Front(); e != nil; e = t.idle.Front() {
		fl := e.Value.(*udpInFlow)
		if t.f.now.Sub(fl.used) < t.f.cfg.UDPIdle {
			break
		}
		fl.end()
	}
}

// answer sends what the guest answers to a client of a published port, and
// reports whether it is one.
func (t *udpInTable) answer(src, dst netip.AddrPort, gso int, head, tail []byte) bool {
	if len(t.flows) == 0 {
		return false
	}
	fl := t.flows[udpInKey{src, dst}]
	if fl == nil {
		return false
	}
	fl.touch()
	n := len(head) + len(tail)
	fl.up += uint64(n)
	t.f.stats.UDPBytesUp.Add(uint64(n))
	if gso > 0 && n > gso {
		if errno := fl.send(gso, head, tail); errno != unix.EINVAL && errno != unix.EIO && errno != unix.EMSGSIZE {
			return true
		}
		all := append(append(make([]byte, 0, n), head...), tail...)
		for len(all) > 0 {
			k := min(gso, len(all))
			fl.send(0, all[:k], nil)
			all = all[k:]
		}
		return true
	}
	fl.send(0, head, tail)
	return true
}

// send sends head+tail to the client, with gso > 0 as datagrams of that size.
func (fl *udpInFlow) send(gso int, head, tail []byte) unix.Errno {
	var iov [2]unix.Iovec
	n := 0
	for _, p := range [][]byte{head, tail} {
		if len(p) > 0 {
			iov[n] = unix.Iovec{Base: &p[0], Len: uint64(len(p))}
			n++
		}
	}
	var ctl [64]byte // CMSG_SPACE of in6_pktinfo, and of uint16
	used := 0
	if fl.s.six {
		used = putCmsg(ctl[:], unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, fl.local[:unix.SizeofInet6Pktinfo])
	} else {
		used = putCmsg(ctl[:], unix.IPPROTO_IP, unix.IP_PKTINFO, fl.local[:unix.SizeofInet4Pktinfo])
	}
	if gso > 0 {
		var size [2]byte
		binary.NativeEndian.PutUint16(size[:], uint16(gso))
		used += putCmsg(ctl[used:], unix.SOL_UDP, unix.UDP_SEGMENT, size[:])
	}
	m := unix.Msghdr{Name: &fl.client.b[0], Namelen: fl.client.len, Iov: &iov[0], Iovlen: uint64(n), Control: &ctl[0], Controllen: uint64(used)}
	_, errno := rawSendmsg(fl.s.fd, &m)
	if errno != 0 {
		fl.s.t.f.stats.UDPDropped.Add(1)
	}
	return errno
}

// putCmsg writes a control message and returns its length.
func putCmsg(b []byte, level, typ int32, data []byte) int {
	c := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	c.Level, c.Type = level, typ
	c.SetLen(unix.CmsgLen(len(data)))
	copy(b[unix.CmsgLen(0):], data)
	return unix.CmsgSpace(len(data))
}
