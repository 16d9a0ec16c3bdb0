package forwarder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/congestion"
)

// Inbound is a published port: where the host listens, and where in the guest
// its clients are led to.
type Inbound struct {
	Proto uint8 // TCP or UDP
	// FDs are sockets made by [Listen] or [ListenUnix], of either family.
	FDs []int
	// Guest4 and Guest6 are where clients of each family are led to. If one
	// is missing, its clients go to the other, and come from the gateway.
	Guest4, Guest6 netip.AddrPort
	// Preface, if not nil, makes what the guest gets ahead of a connection's own
	// bytes, of the client's address and the one that it has connected to, which
	// are invalid for a client on a unix socket. At most 16 KiB, TCP only.
	Preface func(client, host netip.AddrPort) []byte
}

// Inside makes TCP sockets in the guest's own network namespace. It is used by
// the engine alone, and never blocks.
type Inside interface {
	// FD is readable when there are answers.
	FD() int
	// Dial asks for a non-blocking socket that connects to an address of the
	// guest and seems to come from another; Flush sends what was asked for.
	Dial(id uint32, from, to netip.AddrPort) error
	Flush() error
	// Spare returns a non-blocking socket for a client of this family that has
	// still to be bound and connected, or -1 where the client has to Dial. Trim
	// closes those that were not needed since it was last called.
	Spare(six bool) int
	Trim()
	// Adopt asks for a socket that is the far end of an established connection
	// of the guest's from now on, Release says that this has ended.
	Adopt(id uint32, c *Conn) error
	Release(id uint32) error
	// Receive hands over the answers that are there. The error is io.EOF where
	// nobody is left to answer.
	Receive(got func(id uint32, fd int, errno unix.Errno)) error
	Close()
}

// inboundTable holds what the host publishes.
type inboundTable struct {
	f     *Forwarder
	ports map[uint64]*inboundPort
	last  uint64 // id

	// insides has those who can reach a guest's address from within; what is
	// for others goes through netstack.
	insides  map[netip.Addr]*interior
	asked    []*interior // of whom something was asked in this turn
	dials    map[uint32]insideDial
	lastDial uint32
	paused   []*listener

	flows map[*spliceFlow]struct{}
	// connecting has the flows that the guest has not answered, and since when.
	connecting map[*spliceFlow]time.Time
	// draining and half are what they are of a tcpTable.
	draining map[*spliceFlow]time.Time
	half     map[*spliceFlow]time.Time
	// emptying are flows that were handed over and are closed at both ends, but
	// for what the guest has yet to take, and since when.
	emptying map[*spliceFlow]time.Time
	adopted  int                 // flows that were handed over
	wanted   map[netip.Addr]bool // guests whose insides were asked for
	pipes    pipePool

	udp udpInTable

	noRoute6 atomic.Bool // the guest has no IPv6 default route
}

// inboundPort is one published port.
type inboundPort struct {
	Inbound
	listeners []*listener
	sockets   []*udpSocket
	// detour is until when clients go through netstack.
	detour time.Time
	// connecting is how many of its clients the guest has not answered, letIn
	// when it last let one in that did not go through netstack.
	connecting int
	letIn      time.Time
}

// interior is an Inside in use.
type interior struct {
	Inside
	t       *inboundTable
	slot    int32
	pending int  // dials
	asked   bool // is in the table's list
	gone    bool
	trimmed time.Time
	// noHand is until when no connection is handed over.
	noHand time.Time
}

// maxInsideDials bounds the sockets that are asked for of one Inside, and those of
// one port that connect: a server that does not keep up has its queue full, and
// drops what comes. Clients beyond wait in the listeners' queues.
const maxInsideDials = 256

// insideDial is a client that waits for its socket.
type insideDial struct {
	in   *interior
	port *inboundPort
	arrival
	from netip.AddrPort // as the guest sees the client
	born time.Duration
}

// arrival is a client that was let in.
type arrival struct {
	fd      int
	client  netip.AddrPort
	to      netip.AddrPort // where in the guest it goes
	preface []byte         // what the guest gets ahead
}

func (t *inboundTable) init(f *Forwarder) {
	t.f = f
	t.ports = make(map[uint64]*inboundPort)
	t.insides = make(map[netip.Addr]*interior)
	t.dials = make(map[uint32]insideDial)
	t.flows = make(map[*spliceFlow]struct{})
	t.connecting = make(map[*spliceFlow]time.Time)
	t.draining = make(map[*spliceFlow]time.Time)
	t.half = make(map[*spliceFlow]time.Time)
	t.emptying = make(map[*spliceFlow]time.Time)
	t.wanted = make(map[netip.Addr]bool)
	t.udp.init(f)
}

// UseInside has what is published of these addresses of a guest served by sockets
// that in makes. The forwarder closes in when it has ended, or at DropInside.
func (f *Forwarder) UseInside(ctx context.Context, in Inside, guests ...netip.Addr) error {
	if len(guests) == 0 {
		in.Close()
		return nil
	}
	t := &f.inbound
	var failed error
	err := f.Do(ctx, func() {
		i := &interior{Inside: in, t: t}
		if i.slot, failed = f.poll.add(in.FD(), unix.EPOLLIN, i); failed != nil {
			return
		}
		for _, a := range guests {
			t.insides[a] = i
		}
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		in.Close()
	}
	return err
}

// DropInside takes back what UseInside has said of an address. Clients that wait
// go through netstack.
func (f *Forwarder) DropInside(ctx context.Context, guest netip.Addr) error {
	return f.Do(ctx, func() {
		delete(f.inbound.wanted, guest)
		if in := f.inbound.insides[guest]; in != nil {
			f.inbound.giveUp(in)
		}
	})
}

// Publish publishes a port and returns its id. The sockets are the forwarder's
// from now on, whatever is returned.
func (f *Forwarder) Publish(ctx context.Context, in Inbound) (id uint64, err error) {
	if doErr := f.Do(ctx, func() { id, err = f.inbound.publish(in) }); doErr != nil {
		for _, fd := range in.FDs {
			unix.Close(fd)
		}
		return 0, doErr
	}
	return id, err
}

// Unpublish ends a published port. Its TCP connections go on, its UDP flows end.
func (f *Forwarder) Unpublish(ctx context.Context, id uint64) error {
	found := false
	err := f.Do(ctx, func() {
		var p *inboundPort
		if p, found = f.inbound.ports[id]; found {
			delete(f.inbound.ports, id)
			p.close(f)
		}
	})
	if err == nil && !found {
		err = fmt.Errorf("forwarder: unpublish: there is no port %d", id)
	}
	return err
}

func (t *inboundTable) publish(in Inbound) (uint64, error) {
	p := &inboundPort{Inbound: in}
	for i, fd := range in.FDs {
		var err error
		if in.Proto == UDP {
			err = t.udp.open(p, fd)
		} else {
			l := &listener{t: t, port: p, fd: fd, batch: 1, local: localAddr(fd).Addr().IsLoopback()}
			if l.local {
				congestion.Set(fd, t.f.congestion) // clients' sockets inherit it
			}
			if l.slot, err = t.f.poll.add(fd, unix.EPOLLIN, l); err == nil {
				p.listeners = append(p.listeners, l)
			}
		}
		if err != nil {
			p.close(t.f)
			for _, rest := range in.FDs[i:] {
				unix.Close(rest)
			}
			return 0, err
		}
	}
	t.last++
	t.ports[t.last] = p
	return t.last, nil
}

func (p *inboundPort) close(f *Forwarder) {
	for _, l := range p.listeners {
		l.closed = true
		f.poll.remove(l.slot)
		unix.Close(l.fd)
	}
	for _, s := range p.sockets {
		f.inbound.udp.close(s)
	}
}

// listener is a listening TCP or unix socket.
type listener struct {
	t      *inboundTable
	port   *inboundPort
	fd     int
	slot   int32
	local  bool // on the host's loopback
	paused bool
	closed bool
	batch  int // clients to let in at the next turn
}

// acceptBatch is how many clients of one listener are let in at most before
// anything else gets its turn.
const acceptBatch = 32

// ready implements pollee.
func (l *listener) ready(uint32) {
	t := l.t
	n := 0
	for ; n < l.batch; n++ {
		if t.busy(l.port) {
			l.pause()
			break
		}
		var ra rawAddr
		fd, errno := rawAccept(l.fd, &ra)
		if t.f.scarce(errno) || errno == unix.ENOBUFS || errno == unix.ENOMEM {
			// The client stays in the queue, and would wake us at once.
			l.pause()
			t.f.sweepIn(pauseTime)
			break
		}
		if errno == unix.ECONNABORTED || errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			break
		}
		client := ra.get()
		if !l.local && client.IsValid() && t.f.onHost(client.Addr()) {
			congestion.Set(fd, t.f.congestion)
		}
		t.admit(l.port, fd, client)
	}
	// To look once more for nothing costs a socket, made and thrown away.
	l.batch = nextBatch(n, l.batch, acceptBatch)
	for i, in := range t.asked {
		t.asked[i] = nil
		in.asked = false
		if !in.gone {
			in.check(in.Flush())
		}
	}
	t.asked = t.asked[:0]
}

// busy reports whether too many of a port's clients wait for sockets inside, or
// for the guest to answer those.
func (t *inboundTable) busy(p *inboundPort) bool {
	if p.connecting >= maxInsideDials {
		return true
	}
	for _, a := range [...]netip.Addr{p.Guest4.Addr(), p.Guest6.Addr()} {
		if in := t.insides[a]; in != nil && in.pending >= maxInsideDials {
			return true
		}
	}
	return false
}

// pauseTime is how long a listener rests when there are no descriptors left.
const pauseTime = 100 * time.Millisecond

// pause lets clients wait in the kernel's queue.
func (l *listener) pause() {
	if !l.paused && l.watch(0) {
		l.paused = true
		l.t.paused = append(l.t.paused, l)
	}
}

func (l *listener) watch(events uint32) bool {
	ev := unix.EpollEvent{Events: events, Fd: l.slot, Pad: l.t.f.poll.slots[l.slot].gen}
	return epollCtl(l.t.f.poll.fd, unix.EPOLL_CTL_MOD, l.fd, &ev) == nil
}

// resume lets clients in again.
func (t *inboundTable) resume() {
	for _, l := range t.paused {
		l.paused = false
		if !l.closed {
			l.watch(unix.EPOLLIN)
		}
	}
	t.paused = t.paused[:0]
}

// admit leads a client to the guest. A client on a unix socket has no address.
func (t *inboundTable) admit(p *inboundPort, fd int, client netip.AddrPort) {
	c := arrival{fd: fd, client: client, to: p.to(client.Addr())}
	if p.Preface != nil {
		c.preface = p.Preface(client, localAddr(fd))
	}
	to := c.to
	from := t.seen(client, to.Addr())
	in := t.insides[to.Addr()]
	if in == nil || t.f.now.Before(p.detour) {
		t.f.tcp.dialGuest(c, t.routed(from), nil)
		return
	}
	d := insideDial{in, p, c, from, t.f.clock()}
	if fd := in.connect(from, to); fd >= 0 {
		t.join(d, fd)
		return
	}
	if !in.asked {
		in.asked = true
		t.asked = append(t.asked, in)
	}
	t.lastDial++
	t.dials[t.lastDial] = d
	in.pending++
	in.check(in.Dial(t.lastDial, from, to))
}

// firstPort is the first that nobody needs rights for.
const firstPort = 1024

// connect connects a spare socket, or returns -1. Whatever there is to say of a
// client's port inside is left to those who know the namespace.
func (in *interior) connect(from, to netip.AddrPort) int {
	if from.Port() < firstPort {
		return -1
	}
	fd := in.Spare(to.Addr().Is6())
	if fd < 0 {
		return -1
	}
	var ra rawAddr
	ra.set(from)
	errno := rawBind(fd, &ra)
	if errno == 0 {
		ra.set(to)
		errno = rawConnect(fd, &ra)
	}
	if errno != 0 && errno != unix.EINPROGRESS {
		unix.Close(fd)
		return -1
	}
	return fd
}

// to is where in the guest a client goes.
func (p *inboundPort) to(client netip.Addr) netip.AddrPort {
	if client.Is6() && p.Guest6.IsValid() || !p.Guest4.IsValid() {
		return p.Guest6
	}
	return p.Guest4
}

// seen is the address that a client has for the guest: its own, but that of the
// gateway where the guest could not answer it, or would take it for one of its
// own. With port 0 any will do.
func (t *inboundTable) seen(client netip.AddrPort, guest netip.Addr) netip.AddrPort {
	a := client.Addr()
	known := a.IsValid() && a.Is4() == guest.Is4() && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !a.IsUnspecified()
	for _, v := range t.f.policy.cfg.Virtual {
		known = known && !v.Contains(a)
	}
	if known {
		return netip.AddrPortFrom(a.WithZone(""), client.Port())
	}
	return t.gateway(client, guest)
}

// gateway puts the gateway's address in the place of a client's.
func (t *inboundTable) gateway(client netip.AddrPort, guest netip.Addr) netip.AddrPort {
	for _, g := range t.f.policy.cfg.Gateways {
		if g.Is4() == guest.Is4() {
			return netip.AddrPortFrom(g, client.Port())
		}
	}
	return client
}

// routed is the address that a client has for a guest whose answers leave by
// its interface: without a default route for IPv6, only the gateway's will do.
func (t *inboundTable) routed(from netip.AddrPort) netip.AddrPort {
	if from.Addr().Is6() && t.noRoute6.Load() {
		return t.gateway(from, from.Addr())
	}
	return from
}

// SetRoute6 says whether the guest has an IPv6 default route; it has one unless
// this says otherwise.
func (f *Forwarder) SetRoute6(on bool) { f.inbound.noRoute6.Store(!on) }

// ready implements pollee.
func (in *interior) ready(uint32) {
	if in.gone {
		return
	}
	err := in.Receive(in.answered)
	if err == nil {
		err = in.Flush()
	}
	in.check(err)
	if in.pending <= maxInsideDials/2 && len(in.t.paused) > 0 {
		in.t.resume()
	}
}

// check gives up on sockets inside the namespace if err says so.
func (in *interior) check(err error) {
	if err != nil && !in.gone {
		in.t.f.log.Warn("published ports are slower from now on", "err", err)
		in.t.giveUp(in)
		if !errors.Is(err, io.EOF) {
			in.t.strand(in)
		}
	}
}

// giveUp makes no more sockets with in. Those who wait for one go through
// netstack.
func (t *inboundTable) giveUp(in *interior) {
	in.gone = true
	t.f.poll.remove(in.slot)
	in.Close()
	for a, other := range t.insides {
		if other == in {
			delete(t.insides, a)
		}
	}
	for id, d := range t.dials {
		if d.in == in {
			delete(t.dials, id)
			t.f.tcp.dialGuest(d.arrival, t.routed(d.from), nil)
		}
	}
	t.f.tcp.abandoned(in)
	t.resume()
}

// answered takes the socket that a client has waited for.
func (in *interior) answered(id uint32, fd int, errno unix.Errno) {
	t := in.t
	if t.f.tcp.adopted(in, id, fd, errno) {
		return
	}
	d, ok := t.dials[id]
	if !ok || d.in != in {
		if fd >= 0 {
			unix.Close(fd)
		}
		return
	}
	delete(t.dials, id)
	in.pending--
	switch {
	case fd >= 0:
		t.join(d, fd)
	case errno == unix.ECONNREFUSED:
		t.f.tcp.dialGuest(d.arrival, t.routed(d.from), d.port)
	default:
		t.f.log.Debug("no socket inside for a client", "client", d.client, "err", errno)
		t.f.tcp.dialGuest(d.arrival, t.routed(d.from), nil)
	}
}

// insideTimeout is how long a socket inside may take: a few system calls.
const insideTimeout = 10 * time.Second

var errInsideSilent = errors.New("forwarder: no answer from inside the namespace")

// sweep does for published ports what it does for the guest's flows.
func (t *inboundTable) sweep() {
	for _, d := range t.dials {
		if t.f.clock()-d.born > insideTimeout {
			d.in.check(errInsideSilent)
		}
	}
	t.resume()
	for fl, since := range t.connecting {
		waited := t.f.now.Sub(since)
		if waited >= detourAfter && (waited >= crowdTime || !fl.port.lets(t.f.now)) && !hasPeer(fl.guest.fd) {
			fl.detour()
		}
	}
	if len(t.connecting) > 0 {
		t.f.sweepIn(detourAfter)
	}
	t.udp.sweep()
	t.pipes.trim()
	for _, in := range t.insides {
		if t.f.now.Sub(in.trimmed) >= sweepEvery {
			in.trimmed = t.f.now
			in.Trim()
		}
	}
	for fl, since := range t.half {
		if t.f.now.Sub(since) >= sweepEvery {
			keepSocketAlive(fl.host.fd)
			keepSocketAlive(fl.guest.fd)
			delete(t.half, fl)
		}
	}
	for fl, deadline := range t.draining {
		if unsent(fl.survivor.fd) == 0 || t.f.now.After(deadline) {
			fl.abort()
		}
	}
	if len(t.draining) > 0 {
		t.f.sweepIn(drainPoll)
	}
	t.sweepEmptying()
}

func (t *inboundTable) close() {
	for id, p := range t.ports {
		delete(t.ports, id)
		p.close(t.f)
	}
	for id, d := range t.dials {
		delete(t.dials, id)
		closeWithReset(d.fd)
	}
	for fl := range t.flows {
		fl.abort()
	}
	t.pipes.close()
	closed := make(map[*interior]bool)
	for a, in := range t.insides {
		delete(t.insides, a)
		if !closed[in] {
			closed[in] = true
			in.Close()
		}
	}
}

// keepSocketAlive has the kernel probe whether a socket's peer still exists.
func keepSocketAlive(fd int) {
	const secs = int(keepAliveAfter / time.Second)
	setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, secs)
	setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, secs/4)
	setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4)
	setInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

// Listen opens a socket for [Inbound] on a port of the host, and returns the
// address it has.
func Listen(proto uint8, addr netip.AddrPort) (fd int, got netip.AddrPort, err error) {
	typ := unix.SOCK_STREAM
	if proto == UDP {
		typ = unix.SOCK_DGRAM
	}
	fd, err = unix.Socket(family(addr.Addr()), typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, got, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if addr.Addr().Is6() {
		// What is for IPv4 has a socket of its own.
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return -1, got, err
		}
	}
	if proto == UDP {
		prepareUDP(fd, addr.Addr().Is6())
	} else {
		prepareTCP(fd)
	}
	sa := sockaddr(addr)
	if six, ok := sa.(*unix.SockaddrInet6); ok && addr.Addr().Zone() != "" {
		if six.ZoneId, err = zoneID(addr.Addr().Zone()); err != nil {
			return -1, got, err
		}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return -1, got, err
	}
	if proto != UDP {
		if err := unix.Listen(fd, backlog); err != nil {
			return -1, got, err
		}
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		return -1, got, err
	}
	port := addr.Port()
	switch b := bound.(type) {
	case *unix.SockaddrInet4:
		port = uint16(b.Port)
	case *unix.SockaddrInet6:
		port = uint16(b.Port)
	}
	return fd, netip.AddrPortFrom(addr.Addr(), port), nil
}

// backlog is how many clients wait to be let in, as far as net.core.somaxconn
// goes.
const backlog = 4096

// prepareTCP sets what the sockets of clients inherit. A client that has gone
// without a word is found out within a quarter of an hour.
func prepareTCP(fd int) {
	setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	setInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	setInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 600)
	setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 60)
	setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 5)
	setInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

// ListenUnix opens a listening unix socket for [Inbound].
func ListenUnix(path string) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err == nil {
		if err = unix.Listen(fd, backlog); err == nil {
			return fd, nil
		}
		unix.Unlink(path)
	}
	unix.Close(fd)
	return -1, err
}

func rawBind(fd int, a *rawAddr) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&a.b)), uintptr(a.len))
	return errno
}

func rawAccept(fd int, from *rawAddr) (int, unix.Errno) {
	size := uint32(len(from.b))
	r, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&from.b)), uintptr(unsafe.Pointer(&size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	return int(r), errno
}

// localAddr returns the address that a client of fd has connected to.
func localAddr(fd int) netip.AddrPort {
	var ra rawAddr
	size := uint32(len(ra.b))
	if _, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&ra.b)), uintptr(unsafe.Pointer(&size))); errno != 0 {
		return netip.AddrPort{}
	}
	return ra.get()
}

// hasPeer reports whether a TCP socket's peer has answered.
func hasPeer(fd int) bool {
	var ra rawAddr
	size := uint32(len(ra.b))
	_, _, errno := unix.RawSyscall(unix.SYS_GETPEERNAME, uintptr(fd), uintptr(unsafe.Pointer(&ra.b)), uintptr(unsafe.Pointer(&size)))
	return errno == 0
}

// unsent returns how many bytes a socket's peer has not acknowledged.
func unsent(fd int) int {
	var n int32
	_, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCOUTQ, uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return 0
	}
	return int(n)
}

func zoneID(name string) (uint32, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0, unix.ENODEV
	}
	return uint32(i.Index), nil
}
