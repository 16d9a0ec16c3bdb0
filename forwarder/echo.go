package forwarder

import (
	"container/list"
	"encoding/binary"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// echoIdle is how long a ping socket lives after its last message (pasta and
// Linux's conntrack keep theirs 30 to 60 s).
const echoIdle = 60 * time.Second

// echoKey is what tells one ping of the guest from another.
type echoKey struct {
	guest netip.Addr
	id    uint16
}

// echoTable holds the ping sockets of a Forwarder.
type echoTable struct {
	f     *Forwarder
	flows map[echoKey]*echoFlow
	idle  *list.List // oldest first
	buf   []byte     // made with the first flow
	// forbidden is set once the host has refused a ping socket, so that
	// it is said once.
	forbidden bool
}

// echoFlow is one pinging program and its ping socket. The kernel chooses the
// identifier outside.
type echoFlow struct {
	t    *echoTable
	key  echoKey
	fd   int
	slot int32
	ttl  uint8
	age  *list.Element
	used time.Time
	usage

	// The last destination, as the guest and as the host know it.
	dst, real netip.Addr
}

func (t *echoTable) init(f *Forwarder) {
	t.f = f
	t.flows = make(map[echoKey]*echoFlow)
	t.idle = list.New()
}

// HandleEcho takes an echo request of the guest with payload head+tail.
func (f *Forwarder) HandleEcho(src, dst netip.Addr, ttl uint8, id, seq uint16, head, tail []byte) {
	t := &f.echo
	to, v := f.policy.Resolve(ICMP, netip.AddrPortFrom(dst, 0))
	if v.Reason != Allowed {
		f.denied(ICMP, netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0), to, v)
		t.unreachable(src, dst, id, seq, f.policy.refusal())
		return
	}
	k := echoKey{src, id}
	fl := t.flows[k]
	if fl == nil {
		var errno unix.Errno
		if fl, errno = t.open(k, to.Addr()); errno != 0 {
			if !t.forbidden {
				t.unreachable(src, dst, id, seq, errno)
			}
			return
		}
	}
	fl.used = f.now
	fl.dst, fl.real = dst, to.Addr()
	fl.up += uint64(len(head) + len(tail))
	t.idle.MoveToBack(fl.age)
	if ttl--; ttl != fl.ttl {
		fl.ttl = ttl
		level, opt := unix.IPPROTO_IP, unix.IP_TTL
		if dst.Is6() {
			level, opt = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
		}
		setInt(fl.fd, level, opt, int(ttl))
	}
	var h [8]byte // identifier and checksum are the kernel's
	h[0] = 8
	if dst.Is6() {
		h[0] = 128
	}
	binary.BigEndian.PutUint16(h[6:], seq)
	iov := [3]unix.Iovec{{Base: &h[0], Len: 8}}
	n := 1
	for _, p := range [][]byte{head, tail} {
		if len(p) > 0 {
			iov[n] = unix.Iovec{Base: &p[0], Len: uint64(len(p))}
			n++
		}
	}
	var ra rawAddr
	ra.set(to)
	m := unix.Msghdr{Name: &ra.b[0], Namelen: ra.len, Iov: &iov[0], Iovlen: uint64(n)}
	_, errno := rawSendmsg(fl.fd, &m)
	if errno != 0 && fl.readErrors() {
		_, errno = rawSendmsg(fl.fd, &m)
	}
	if errno != 0 {
		t.unreachable(src, dst, id, seq, errno)
	}
}

// open makes a ping socket (net/ipv4/ping.c).
func (t *echoTable) open(k echoKey, dst netip.Addr) (*echoFlow, unix.Errno) {
	f := t.f
	if len(t.flows) >= f.cfg.MaxEcho {
		t.idle.Front().Value.(*echoFlow).end()
		f.stats.EchoEvicted.Add(1)
	}
	proto := unix.IPPROTO_ICMP
	if dst.Is6() {
		proto = unix.IPPROTO_ICMPV6
	}
	fd, errno := rawSocket(family(dst), unix.SOCK_DGRAM, proto)
	if errno != 0 {
		if !t.forbidden && (errno == unix.EACCES || errno == unix.EPERM) {
			t.forbidden = true
			f.log.Warn("ping works only to the gateway: the host forbids ping sockets; widen net.ipv4.ping_group_range to include this group", "err", errno)
		}
		return nil, errno
	}
	if err := f.cfg.Outbound.Prepare(fd, dst); err != nil {
		unix.Close(fd)
		return nil, asErrno(err)
	}
	if dst.Is4() {
		setInt(fd, unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		setInt(fd, unix.IPPROTO_IP, unix.IP_RECVTTL, 1)
	} else {
		setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
	}
	setInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 256<<10) // for the largest echo
	fl := &echoFlow{t: t, key: k, fd: fd, usage: usage{born: f.clock()}}
	var err error
	if fl.slot, err = f.poll.add(fd, unix.EPOLLIN, fl); err != nil {
		unix.Close(fd)
		return nil, unix.ENOMEM
	}
	fl.age = t.idle.PushBack(fl)
	t.flows[k] = fl
	f.stats.EchoActive.Add(1)
	f.stats.EchoTotal.Add(1)
	return fl, 0
}

func (fl *echoFlow) end() {
	t := fl.t
	t.idle.Remove(fl.age)
	delete(t.flows, fl.key)
	t.f.poll.remove(fl.slot)
	unix.Close(fl.fd)
	t.f.stats.EchoActive.Add(-1)
}

func (t *echoTable) sweep() {
	for e := t.idle.Front(); e != nil; e = t.idle.Front() {
		fl := e.Value.(*echoFlow)
		if t.f.now.Sub(fl.used) < echoIdle {
			break
		}
		fl.end()
	}
}

func (t *echoTable) close() {
	for _, fl := range t.flows {
		fl.end()
	}
}

// unreachable tells the guest why its echo request went nowhere.
func (t *echoTable) unreachable(src, dst netip.Addr, id, seq uint16, errno unix.Errno) {
	if typ, code, ok := t.f.icmpFor(dst, errno); ok {
		t.icmp(ICMPError{Type: typ, Code: code}, src, dst, id, seq)
	}
}

func (t *echoTable) icmp(e ICMPError, src, dst netip.Addr, id, seq uint16) {
	var h [8]byte
	h[0], e.Proto = 8, ICMP
	if dst.Is6() {
		h[0], e.Proto = 128, unix.IPPROTO_ICMPV6
	}
	binary.BigEndian.PutUint16(h[4:], id)
	binary.BigEndian.PutUint16(h[6:], seq)
	e.Guest, e.Remote, e.L4 = src, dst, h[:]
	t.f.guest.SendICMPError(e)
}

// ready implements pollee.
func (fl *echoFlow) ready(events uint32) {
	if events&unix.EPOLLERR != 0 {
		fl.readErrors()
	}
	if events&unix.EPOLLIN != 0 {
		fl.receive()
	}
}

// receive passes echo replies on to the guest.
func (fl *echoFlow) receive() {
	t := fl.t
	if t.buf == nil {
		t.buf = make([]byte, 1<<16)
	}
	for range 16 {
		var ctl [64]byte
		var ra rawAddr
		iov := unix.Iovec{Base: &t.buf[0], Len: uint64(len(t.buf))}
		m := unix.Msghdr{
			Name: &ra.b[0], Namelen: uint32(len(ra.b)), Iov: &iov, Iovlen: 1,
			Control: &ctl[0], Controllen: uint64(len(ctl)),
		}
		n, errno := rawRecvmsg(fl.fd, &m, 0)
		if errno != 0 {
			return
		}
		from := ra.get().Addr()
		if b := t.buf[:n]; n >= 8 && (b[0] == 0 || b[0] == 129) && from.Is4() == fl.key.guest.Is4() {
			fl.down += uint64(n - 8)
			ttl := hopLimit(ctl[:m.Controllen])
			t.f.guest.SendEchoReply(from, fl.key.guest, max(ttl-1, 1), fl.key.id, binary.BigEndian.Uint16(b[6:]), b[8:], nil)
		}
	}
}

// hopLimit returns the hop limit with which a message arrived.
func hopLimit(ctl []byte) uint8 {
	for len(ctl) >= unix.SizeofCmsghdr {
		c := (*unix.Cmsghdr)(unsafe.Pointer(&ctl[0]))
		n := int(c.Len)
		if n < unix.SizeofCmsghdr || n > len(ctl) {
			break
		}
		if n >= unix.CmsgLen(4) && (c.Level == unix.IPPROTO_IP && c.Type == unix.IP_TTL || c.Level == unix.IPPROTO_IPV6 && c.Type == unix.IPV6_HOPLIMIT) {
			return uint8(*(*int32)(unsafe.Pointer(&ctl[unix.CmsgLen(0)])))
		}
		ctl = ctl[min(unix.CmsgSpace(n-unix.CmsgLen(0)), len(ctl)):]
	}
	return 64
}

// readErrors passes errors about earlier requests on to the guest, and reports
// whether there were any.
func (fl *echoFlow) readErrors() bool {
	any := false
	var q errorQueue
	for range 64 {
		e, dst, data, ok := q.read(fl.fd)
		if !ok {
			break
		}
		any = true
		if len(data) >= 8 && e.Type != 0 {
			fl.t.icmp(e, fl.key.guest, dst.Addr(), fl.key.id, binary.BigEndian.Uint16(data[6:]))
		}
	}
	return any
}
