package forwarder

import (
	"container/list"
	"encoding/binary"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpTable holds the UDP flows of a Forwarder: one per guest address and port.
type udpTable struct {
	f     *Forwarder
	flows map[netip.AddrPort]*udpFlow
	last  *udpFlow // the flow of the last datagram

	// Flows by age of their last datagram, oldest first. Those that only
	// asked name servers are kept apart, because they expire sooner.
	idle, idleDNS *list.List

	out udpBatch
	in  *udpReceive // made with the first flow
}

// udpFlow is one guest socket and its host socket.
type udpFlow struct {
	t     *udpTable
	guest netip.AddrPort
	fd    int
	slot  int32
	ttl   uint8 // the socket's hop limit, 0 for the host's default
	age   *list.Element
	dns   bool
	used  time.Time
	usage

	// The last destination, as the guest and as the host know it.
	dst, real netip.AddrPort
	// The last source, likewise.
	from, seen netip.AddrPort
}

func (t *udpTable) init(f *Forwarder) {
	t.f = f
	t.flows = make(map[netip.AddrPort]*udpFlow)
	t.idle, t.idleDNS = list.New(), list.New()
	t.out.t = t
}

// HandleUDP takes a datagram of the guest, or with gso > 0 a run of datagrams
// of that size, whose payload is head+tail.
func (f *Forwarder) HandleUDP(src, dst netip.AddrPort, ttl uint8, gso int, head, tail []byte) {
	if f.inbound.udp.answer(src, dst, gso, head, tail) {
		return
	}
	t := &f.udp
	fl := t.last
	if fl == nil || fl.guest != src {
		fl = t.flows[src]
	}
	if fl == nil || fl.dst != dst {
		to, v := f.policy.Resolve(UDP, dst)
		if v.Reason != Allowed {
			f.denied(UDP, src, dst, to, v)
			t.unreachable(src, dst, f.policy.refusal(), len(head)+len(tail))
			return
		}
		if fl == nil {
			var errno unix.Errno
			if fl, errno = t.open(src, to); errno != 0 {
				f.stats.UDPDropped.Add(1)
				t.unreachable(src, dst, errno, len(head)+len(tail))
				return
			}
		}
		fl.dst, fl.real = dst, to
	}
	t.last = fl
	fl.touch(fl.dns && dst.Port() == 53)
	fl.up += uint64(len(head) + len(tail))
	f.stats.UDPBytesUp.Add(uint64(len(head) + len(tail)))
	// We are one hop. Most guests do not care, then neither does the socket.
	if ttl >= 63 {
		ttl = 0
	} else {
		ttl--
	}
	t.out.add(fl, ttl, gso, head, tail)
}

// open makes a flow for the guest socket src, whose first datagram goes to dst.
func (t *udpTable) open(src, dst netip.AddrPort) (*udpFlow, unix.Errno) {
	f := t.f
	if len(t.flows) >= f.cfg.MaxUDP {
		t.evict()
	}
	fd, errno := rawSocket(family(dst.Addr()), unix.SOCK_DGRAM, 0)
	if f.scarce(errno) && t.evict() {
		fd, errno = rawSocket(family(dst.Addr()), unix.SOCK_DGRAM, 0)
	}
	if errno != 0 {
		if !f.scarce(errno) {
			f.log.Warn("no socket for a UDP flow", "src", src, "err", errno)
		}
		return nil, errno
	}
	if err := f.cfg.Outbound.Prepare(fd, dst.Addr()); err != nil {
		unix.Close(fd)
		f.log.Warn("outbound address or interface unusable", "dst", dst, "err", err)
		return nil, asErrno(err)
	}
	// Errors are reported with the packet that caused them, since one socket
	// has many destinations. Runs of datagrams arrive as one.
	if dst.Addr().Is4() {
		setInt(fd, unix.IPPROTO_IP, unix.IP_RECVERR, 1)
	} else {
		setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
		setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
	}
	setInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	setInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20) // as far as rmem_max goes
	setInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
	fl := &udpFlow{t: t, guest: src, fd: fd, dns: dst.Port() == 53}
	var err error
	if fl.slot, err = f.poll.add(fd, unix.EPOLLIN, fl); err != nil {
		unix.Close(fd)
		return nil, unix.ENOMEM
	}
	fl.born = f.clock()
	fl.age = fl.ageList().PushBack(fl)
	t.flows[src] = fl
	f.stats.UDPActive.Add(1)
	f.stats.UDPTotal.Add(1)
	return fl, 0
}

func (fl *udpFlow) ageList() *list.List {
	if fl.dns {
		return fl.t.idleDNS
	}
	return fl.t.idle
}

// touch notes that the flow was used.
func (fl *udpFlow) touch(dns bool) {
	if fl.dns != dns {
		fl.ageList().Remove(fl.age)
		fl.dns = dns
		fl.age = fl.ageList().PushBack(fl)
	} else if fl.used != fl.t.f.now {
		fl.ageList().MoveToBack(fl.age)
	}
	fl.used = fl.t.f.now
}

// evict ends the flow that has been idle longest, a DNS one where there is one.
func (t *udpTable) evict() bool {
	for _, l := range []*list.List{t.idleDNS, t.idle} {
		if e := l.Front(); e != nil {
			t.out.flush() // the batch may hold datagrams of it
			e.Value.(*udpFlow).end()
			t.f.stats.UDPEvicted.Add(1)
			return true
		}
	}
	return false
}

func (fl *udpFlow) end() {
	t := fl.t
	fl.ageList().Remove(fl.age)
	delete(t.flows, fl.guest)
	if t.last == fl {
		t.last = nil
	}
	t.f.poll.remove(fl.slot)
	unix.Close(fl.fd)
	t.f.stats.UDPActive.Add(-1)
}

// sweep ends flows that have been idle too long.
func (t *udpTable) sweep() {
	for _, c := range []struct {
		l    *list.List
		life time.Duration
	}{{t.idleDNS, t.f.cfg.DNSIdle}, {t.idle, t.f.cfg.UDPIdle}} {
		for e := c.l.Front(); e != nil; e = c.l.Front() {
			fl := e.Value.(*udpFlow)
			if t.f.now.Sub(fl.used) < c.life {
				break
			}
			fl.end()
		}
	}
}

func (t *udpTable) flush() { t.out.flush() }

func (t *udpTable) close() {
	for _, fl := range t.flows {
		fl.end()
	}
}

// unreachable tells the guest why a datagram of n bytes went nowhere.
func (t *udpTable) unreachable(src, dst netip.AddrPort, errno unix.Errno, n int) {
	if typ, code, ok := t.f.icmpFor(dst.Addr(), errno); ok {
		t.icmp(ICMPError{Type: typ, Code: code}, src, dst, n)
	}
}

// icmp completes e, which is about a datagram of n bytes, and sends it.
func (t *udpTable) icmp(e ICMPError, src, dst netip.AddrPort, n int) {
	if dst.Addr().IsMulticast() {
		return // RFC 1122 section 3.2.2
	}
	var u [8]byte
	binary.BigEndian.PutUint16(u[0:], src.Port())
	binary.BigEndian.PutUint16(u[2:], dst.Port())
	binary.BigEndian.PutUint16(u[4:], uint16(8+n))
	e.Guest, e.Remote, e.Proto, e.L4 = src.Addr(), dst.Addr(), UDP, u[:]
	t.f.guest.SendICMPError(e)
}

// udpBatch gathers the datagrams of one batch of frames, so that the host's
// kernel is entered once for many. Runs of equal datagrams to one destination
// become one UDP_SEGMENT message.
type udpBatch struct {
	t     *udpTable
	arena [arenaSize]byte
	used  int
	n     int
	msgs  [maxMsgs]udpMsg
	hdrs  [maxMsgs]mmsghdr
	iovs  [maxMsgs]unix.Iovec
	ctl   [maxMsgs][ctlSize]byte
}

const (
	arenaSize = 256 << 10
	maxMsgs   = 64
	// maxSegs is UDP_MAX_SEGMENTS of kernels before 6.9.
	maxSegs = 64
	// gatherBelow is the largest datagram that is copied to be sent with
	// others; for longer ones the copy costs more than the call.
	gatherBelow = 4 << 10
	// maxRun bounds a run: a UDP packet, headers included, fits into 65535.
	maxRun  = 65000
	ctlSize = 24 // CMSG_SPACE(sizeof(uint16))
)

// udpMsg is a datagram, or a run of segs of them, in the arena.
type udpMsg struct {
	fl        *udpFlow
	guest     netip.AddrPort // the destination as the guest knows it
	dst       netip.AddrPort
	addr      rawAddr
	off, size int
	seg       int // size of each but the last
	segs      int
	ttl       uint8
}

// add queues a datagram, or sends it at once where it is long.
func (b *udpBatch) add(fl *udpFlow, ttl uint8, gso int, head, tail []byte) {
	size := len(head) + len(tail)
	if gso > 0 || size > gatherBelow {
		b.flush()
		m := &b.msgs[0]
		b.set(m, fl, ttl)
		m.size, m.seg, m.segs = size, size, 1
		if gso > 0 {
			m.seg, m.segs = gso, (size+gso-1)/gso
		}
		b.sendNow(m, head, tail)
		return
	}
	if b.n == maxMsgs || b.used+size > arenaSize {
		b.flush()
	}
	copy(b.arena[b.used:], head)
	copy(b.arena[b.used+len(head):], tail)
	if b.n > 0 {
		// A run takes datagrams of one size, and a shorter one as its last.
		m := &b.msgs[b.n-1]
		if m.fl == fl && m.dst == fl.real && m.ttl == ttl && size > 0 && size <= m.seg &&
			m.size == m.seg*m.segs && m.segs < maxSegs && m.size+size <= maxRun {
			m.size += size
			m.segs++
			b.used += size
			return
		}
	}
	m := &b.msgs[b.n]
	b.n++
	b.set(m, fl, ttl)
	m.off, m.size, m.seg, m.segs = b.used, size, size, 1
	b.used += size
}

func (b *udpBatch) set(m *udpMsg, fl *udpFlow, ttl uint8) {
	m.fl, m.guest, m.dst, m.ttl = fl, fl.dst, fl.real, ttl
	m.addr.set(fl.real)
}

// flush sends what is queued.
func (b *udpBatch) flush() {
	for i := 0; i < b.n; {
		fl, ttl := b.msgs[i].fl, b.msgs[i].ttl
		j := i
		for ; j < b.n && b.msgs[j].fl == fl && b.msgs[j].ttl == ttl; j++ {
			m := &b.msgs[j]
			b.iovs[j] = unix.Iovec{Base: &b.arena[m.off%arenaSize], Len: uint64(m.size)}
			b.header(&b.hdrs[j].hdr, m, &b.iovs[j], 1, &b.ctl[j])
		}
		fl.setTTL(ttl)
		for i < j {
			n, errno := rawSendmmsg(fl.fd, b.hdrs[i:j])
			if errno == 0 {
				i += n
				continue
			}
			if !b.retry(&b.msgs[i], errno) {
				i++
			}
		}
	}
	b.n, b.used = 0, 0
}

// sendNow sends m, whose payload is head+tail.
func (b *udpBatch) sendNow(m *udpMsg, head, tail []byte) {
	m.fl.setTTL(m.ttl)
	var iov [2]unix.Iovec
	n := 0
	for _, p := range [][]byte{head, tail} {
		if len(p) > 0 {
			iov[n] = unix.Iovec{Base: &p[0], Len: uint64(len(p))}
			n++
		}
	}
	b.iovs[0], b.iovs[1] = iov[0], iov[1]
	hdr := &b.hdrs[0].hdr
	b.header(hdr, m, &b.iovs[0], n, &b.ctl[0])
	for {
		_, errno := rawSendmsg(m.fl.fd, hdr)
		if errno == 0 {
			return
		}
		if m.segs > 1 && (errno == unix.EINVAL || errno == unix.EIO || errno == unix.EMSGSIZE) {
			all := append(append(make([]byte, 0, m.size), head...), tail...)
			b.sendSingly(m, all)
			return
		}
		if !b.retry(m, errno) {
			return
		}
	}
}

// header describes m to the kernel.
func (b *udpBatch) header(h *unix.Msghdr, m *udpMsg, iov *unix.Iovec, n int, ctl *[ctlSize]byte) {
	*h = unix.Msghdr{Name: &m.addr.b[0], Namelen: m.addr.len, Iov: iov, Iovlen: uint64(n)}
	if m.segs > 1 {
		c := (*unix.Cmsghdr)(unsafe.Pointer(ctl))
		c.Level, c.Type = unix.SOL_UDP, unix.UDP_SEGMENT
		c.SetLen(unix.CmsgLen(2))
		*(*uint16)(unsafe.Pointer(&ctl[unix.CmsgLen(0)])) = uint16(m.seg)
		h.Control, h.Controllen = &ctl[0], ctlSize
	}
}

// retry handles the error of sending m and reports whether to try it again.
func (b *udpBatch) retry(m *udpMsg, errno unix.Errno) bool {
	t := b.t
	switch errno {
	case unix.EINTR:
		return true
	case unix.ECONNREFUSED, unix.ECONNRESET:
		// About an earlier datagram; the error queue has the details,
		// and reading it clears this.
		if m.fl.readErrors() {
			return true
		}
	case unix.EINVAL, unix.EIO, unix.EMSGSIZE:
		if m.segs > 1 {
			// The way out cannot carry a run: its segments are
			// longer than a packet may be there, or the device
			// cannot compute checksums.
			b.sendSingly(m, b.arena[m.off:m.off+m.size])
			return false
		}
	case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EPERM, unix.EACCES:
		if m.fl.readErrors() {
			return true
		}
		t.unreachable(m.fl.guest, m.guest, errno, m.seg)
	}
	t.f.stats.UDPDropped.Add(uint64(m.segs))
	return false
}

// sendSingly sends a run one datagram at a time.
func (b *udpBatch) sendSingly(m *udpMsg, all []byte) {
	one := *m
	one.segs = 1
	for off := 0; off < len(all); off += m.seg {
		p := all[off:min(off+m.seg, len(all))]
		iov := unix.Iovec{Base: &p[0], Len: uint64(len(p))}
		hdr := unix.Msghdr{Name: &one.addr.b[0], Namelen: one.addr.len, Iov: &iov, Iovlen: 1}
		if _, errno := rawSendmsg(m.fl.fd, &hdr); errno != 0 {
			b.t.f.stats.UDPDropped.Add(1)
		}
	}
}

// setTTL sets the hop limit of what the socket sends next; 0 is the default.
func (fl *udpFlow) setTTL(ttl uint8) {
	if fl.ttl == ttl {
		return
	}
	fl.ttl = ttl
	v := int(ttl)
	if v == 0 {
		v = -1
	}
	if fl.guest.Addr().Is4() {
		setInt(fl.fd, unix.IPPROTO_IP, unix.IP_TTL, v)
	} else {
		setInt(fl.fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, v)
	}
}

// udpReceive is the memory for one recvmmsg, shared by all flows.
type udpReceive struct {
	bufs [recvBatch][1 << 16]byte
	hdrs [recvBatch]mmsghdr
	iovs [recvBatch]unix.Iovec
	addr [recvBatch]rawAddr
	ctl  [recvBatch][80]byte // pktinfo of IPv6, and the size of joined datagrams
}

const recvBatch = 32

// receiver returns the memory.
func (t *udpTable) receiver() *udpReceive {
	if t.in == nil {
		t.in = new(udpReceive)
		for i := range t.in.bufs {
			t.in.iovs[i] = unix.Iovec{Base: &t.in.bufs[i][0], Len: uint64(len(t.in.bufs[i]))}
		}
	}
	return t.in
}

// fill takes in what a socket holds, and returns how many messages it was.
func (in *udpReceive) fill(fd int) (int, unix.Errno) {
	for i := range in.hdrs {
		in.hdrs[i].hdr = unix.Msghdr{
			Name: &in.addr[i].b[0], Namelen: uint32(len(in.addr[i].b)), Iov: &in.iovs[i], Iovlen: 1,
			Control: &in.ctl[i][0], Controllen: uint64(len(in.ctl[i])),
		}
	}
	return rawRecvmmsg(fd, in.hdrs[:])
}

// ready implements pollee.
func (fl *udpFlow) ready(events uint32) {
	if events&unix.EPOLLERR != 0 {
		fl.readErrors()
	}
	if events&unix.EPOLLIN != 0 {
		fl.receive()
	}
}

// receive passes what the host socket holds on to the guest.
func (fl *udpFlow) receive() {
	t := fl.t
	in := t.receiver()
	n, errno := in.fill(fl.fd)
	if errno != 0 {
		return
	}
	for i := range in.hdrs[:n] {
		m := &in.hdrs[i]
		from := in.addr[i].get()
		if from != fl.from || !fl.seen.IsValid() {
			seen, ok := fl.dst, true
			if from != fl.real {
				seen, ok = t.f.policy.translate(from)
			}
			if !ok {
				t.f.stats.DeniedSource.Add(1)
				continue
			}
			fl.from, fl.seen = from, seen
		}
		fl.down += uint64(m.n)
		t.f.stats.UDPBytesDown.Add(uint64(m.n))
		t.f.guest.WriteUDP(fl.seen, fl.guest, groSize(in.ctl[i][:m.hdr.Controllen]), in.bufs[i][:m.n])
	}
	fl.touch(fl.dns)
}

// groSize returns the size of the datagrams that the kernel has joined to one,
// or 0.
func groSize(ctl []byte) int {
	for len(ctl) >= unix.SizeofCmsghdr {
		c := (*unix.Cmsghdr)(unsafe.Pointer(&ctl[0]))
		n := int(c.Len)
		if n < unix.SizeofCmsghdr || n > len(ctl) {
			return 0
		}
		if c.Level == unix.SOL_UDP && c.Type == unix.UDP_GRO && n >= unix.CmsgLen(2) {
			return int(*(*uint16)(unsafe.Pointer(&ctl[unix.CmsgLen(0)])))
		}
		ctl = ctl[min(unix.CmsgSpace(n-unix.CmsgLen(0)), len(ctl)):]
	}
	return 0
}

// readErrors passes the errors that the host's kernel got for earlier datagrams
// on to the guest, and reports whether there were any.
func (fl *udpFlow) readErrors() bool {
	any := false
	var q errorQueue
	for i := 0; i < 64; i++ {
		e, dst, data, ok := q.read(fl.fd)
		if !ok {
			break
		}
		any = true
		guest, open := fl.t.f.policy.translate(dst)
		if open && e.Type != 0 {
			fl.t.icmp(e, fl.guest, guest, len(data))
		}
	}
	return any
}

// errorQueue reads what IP_RECVERR queues (ip(7)).
type errorQueue struct {
	data [256]byte
	ctl  [256]byte
	addr rawAddr
}

// read returns the next error as an ICMP message (of type 0 where there is none
// for it), the destination of the packet
// that caused it and what of its payload was quoted.
func (q *errorQueue) read(fd int) (e ICMPError, dst netip.AddrPort, data []byte, ok bool) {
	iov := unix.Iovec{Base: &q.data[0], Len: uint64(len(q.data))}
	m := unix.Msghdr{
		Name: &q.addr.b[0], Namelen: uint32(len(q.addr.b)), Iov: &iov, Iovlen: 1,
		Control: &q.ctl[0], Controllen: uint64(len(q.ctl)),
	}
	n, errno := rawRecvmsg(fd, &m, unix.MSG_ERRQUEUE)
	if errno != 0 {
		return e, dst, nil, false
	}
	dst = q.addr.get()
	ctl := q.ctl[:m.Controllen]
	for len(ctl) >= unix.SizeofCmsghdr {
		c := (*unix.Cmsghdr)(unsafe.Pointer(&ctl[0]))
		size := int(c.Len)
		if size < unix.SizeofCmsghdr || size > len(ctl) {
			break
		}
		body := ctl[unix.CmsgLen(0):size]
		if (c.Level == unix.IPPROTO_IP && c.Type == unix.IP_RECVERR || c.Level == unix.IPPROTO_IPV6 && c.Type == unix.IPV6_RECVERR) &&
			len(body) >= int(unsafe.Sizeof(unix.SockExtendedErr{})) {
			x := (*unix.SockExtendedErr)(unsafe.Pointer(&body[0]))
			switch x.Origin {
			case unix.SO_EE_ORIGIN_ICMP, unix.SO_EE_ORIGIN_ICMP6:
				e = ICMPError{Type: x.Type, Code: x.Code, Info: x.Info}
				// The offender's address follows the error.
				r := parseRawAddr(body[unsafe.Sizeof(*x):]).Addr()
				if r.IsValid() && !r.IsLoopback() && !r.IsUnspecified() {
					e.Router = r
				}
			default: // the host's own kernel could not send it
				e.Type, e.Code, _ = icmpFor(dst.Addr(), unix.Errno(x.Errno))
			}
		}
		ctl = ctl[min(unix.CmsgSpace(size-unix.CmsgLen(0)), len(ctl)):]
	}
	return e, dst, q.data[:n], true
}
