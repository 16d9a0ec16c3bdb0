package dns

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A query goes out by a random id and from a random port, and an answer has to
// match both, and the question, and come from the upstream's address and port:
// the sockets are connected. A forger who sees nothing must guess 16 bits of id
// and, in Linux's default range, 14.8 bits of port (RFC 5452 §4). A query that
// is alone has a port of its own. Those that come while others wait share the
// latest port, up to portQueries of them within portTime. That leaves the
// guessing as hard as it was, since a forged message can match only the one
// query whose id it has: questions are asked once at a time (see flight). What
// it gives away is time: a port that was found out in some other way is worth
// knowing for portTime longer. So the first message on a port that matches
// nothing ends its sharing, and after maxForged all its queries go over TCP.
const (
	portQueries = 64
	portTime    = 100 * time.Millisecond
)

// maxIdle is how many sockets are kept for the next questions.
const maxIdle = 128

// idleTime is about how long they are kept without need.
const idleTime = time.Second

// batch is how many answers are read from a socket at a time.
const batch = 16

// sockets are the sockets of upstream UDP queries. The way through the net
// package (a netpoll descriptor, options, three address look-ups) would cost
// more than the question; here a socket is in an epoll set of its own, which is
// watched as one descriptor. A socket that brought all its answers is
// disconnected, which gives its port back, and used again: the next connect
// draws a new port. That costs a quarter of a new socket.
type sockets struct {
	s     *Server
	fd    int // the epoll set
	epoll *os.File
	raw   syscall.RawConn

	in     *inbox // what poll reads into
	events []unix.EpollEvent

	mu     sync.Mutex // guards following, and all sockets
	serial uint64
	all    map[uint64]*socket // by serial number
	idle   []*socket
	unused int // of idle, the first ones, since the last reaping
	reaper *time.Timer
	closed bool

	// Queries on shared ports that wait for others while holding is set.
	holding bool
	held    []heldQuery

	releasing sync.Mutex // guards following; taken before mu
	spare     []heldQuery
	out       outbox
}

// heldQuery is a query that waits on the port it is going to leave by.
type heldQuery struct {
	a    *attempt
	sock *socket
	id   uint16
}

// socket is a UDP socket in the epoll set.
type socket struct {
	fd      int
	serial  uint64
	up      *upstream // bound and connected as befits this one
	born    time.Duration
	sent    int        // queries since it has its port
	open    []*attempt // those without an answer
	wrong   int        // messages that answered none of them
	unfit   bool       // something may still come, or went wrong
	users   int        // who read from it or write to it without the lock
	resting bool       // disconnected, or about to be
}

// find returns the query of that id, nil if there is none.
func (k *socket) find(id uint16) *attempt {
	for _, a := range k.open {
		if a.id == id {
			return a
		}
	}
	return nil
}

// shareable reports whether another query may go out from the socket's port.
func (k *socket) shareable(now time.Duration) bool {
	return len(k.open) > 0 && k.sent < portQueries && now-k.born < portTime && k.wrong == 0 && !k.unfit
}

// start makes the epoll set.
func (s *sockets) start(srv *Server) error {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("create epoll set: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return fmt.Errorf("prepare epoll set: %w", err)
	}
	s.s, s.fd, s.epoll = srv, fd, os.NewFile(uintptr(fd), "dns sockets")
	if s.raw, err = s.epoll.SyscallConn(); err != nil {
		s.epoll.Close()
		return fmt.Errorf("watch epoll set: %w", err)
	}
	s.in, s.events = newInbox(batch), make([]unix.EpollEvent, 128)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = make(map[uint64]*socket)
	return nil
}

// send sends a's query to its upstream. The caller holds a's flight.
func (s *sockets) send(a *attempt, bind func(fd int, remote netip.AddrPort) error) error {
	if sock, held := s.share(a); held {
		return nil
	} else if sock != nil {
		err := s.write(sock, a)
		if err == nil {
			return nil
		}
		// The error is that of an earlier query, and so are all on this port.
		s.forget(a, false)
		s.s.tasks.Go(func() { s.fail(sock, err) })
	}
	if sock := s.reuse(a.up); sock != nil {
		err := connectUDP(sock.fd, a.up.addr)
		if err == nil {
			err = s.first(sock, a)
		}
		if err == nil {
			return nil
		}
		s.discard(sock, a) // it may have had an error in store
	}
	fd, err := openUDP(a.up.addr, bind)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.serial++
	sock := &socket{fd: fd, serial: s.serial, up: a.up, resting: true}
	s.all[sock.serial] = sock
	s.mu.Unlock()
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(sock.serial), Pad: int32(sock.serial >> 32)}
	if err = unix.EpollCtl(s.fd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		s.discard(sock, a)
		return os.NewSyscallError("epoll_ctl", err)
	}
	if err = s.first(sock, a); err != nil {
		s.discard(sock, a)
	}
	return err
}

// share makes a one of the queries on the latest port to its upstream, if
// that may be shared, and reports whether it is held to be sent with others.
func (s *sockets) share(a *attempt) (sock *socket, held bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sock = a.up.latest
	if sock == nil || !sock.shareable(a.started) {
		return nil, false
	}
	for sock.find(a.id) != nil {
		a.id = s.s.ids.next()
	}
	sock.open = append(sock.open, a)
	sock.sent++
	a.sock = sock
	if s.holding {
		s.held = append(s.held, heldQuery{a, sock, a.id})
	}
	return sock, s.holding
}

// hold has queries on shared ports wait for release, to leave by fewer system
// calls.
func (s *sockets) hold() {
	s.mu.Lock()
	s.holding = true
	s.mu.Unlock()
}

// release sends the queries that wait.
func (s *sockets) release() {
	s.releasing.Lock()
	defer s.releasing.Unlock()
	s.mu.Lock()
	s.holding = false
	held := s.held
	s.held, s.spare = s.spare, nil
	s.mu.Unlock()
	for rest := held; len(rest) > 0; {
		n := 1
		for n < len(rest) && n < portQueries && rest[n].sock == rest[0].sock {
			n++
		}
		s.sendHeld(rest[0].sock, rest[:n])
		rest = rest[n:]
	}
	clear(held)
	s.spare = held[:0]
}

// sendHeld sends queries that waited, on the port that they share.
func (s *sockets) sendHeld(sock *socket, held []heldQuery) {
	s.mu.Lock()
	live := held[:0]
	for _, h := range held {
		// One that is over by now has no socket any more.
		if sock.find(h.id) == h.a {
			s.out.add(h.id, h.a.f.ask)
			live = append(live, h)
		}
	}
	if len(live) == 0 {
		s.mu.Unlock()
		return
	}
	sock.users++
	s.mu.Unlock()
	n, err := s.out.send(sock.fd)
	s.out.clear()
	if err != nil {
		// The error is that of an earlier query, and so are all on this port
		// but for those that have not left.
		for _, h := range live[n:] {
			h.a.again(sock)
		}
		s.fail(sock, os.NewSyscallError("send", err))
	}
	s.end(sock)
}

// first sends a's query, the first one on sock since that has its port.
func (s *sockets) first(sock *socket, a *attempt) error {
	s.mu.Lock()
	sock.born, sock.sent, sock.wrong, sock.resting = a.started, 1, 0, false
	sock.open = append(sock.open[:0], a)
	a.sock = sock
	s.mu.Unlock()
	if err := s.write(sock, a); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !sock.resting { // else the answer is here already
		a.up.latest = sock
	}
	return nil
}

// write sends a's query on sock.
func (s *sockets) write(sock *socket, a *attempt) error {
	// On the stack unless it is a large one.
	var buf [576]byte
	msg := append(append(buf[:0], byte(a.id>>8), byte(a.id)), a.f.ask...)
	_, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(sock.fd), uintptr(unsafe.Pointer(unsafe.SliceData(msg))), uintptr(len(msg)))
	// A full queue or lack of memory is as good as a lost datagram: it will
	// be repeated.
	if errno != 0 && errno != unix.EAGAIN && errno != unix.ENOBUFS {
		return os.NewSyscallError("send", errno)
	}
	return nil
}

// forget ends a's use of its socket. Good means that its answer has come. The
// caller holds a's flight.
func (s *sockets) forget(a *attempt, good bool) {
	sock := a.sock
	if sock == nil {
		return
	}
	a.sock = nil
	s.mu.Lock()
	if i := slices.Index(sock.open, a); i >= 0 {
		last := len(sock.open) - 1
		sock.open[i], sock.open[last] = sock.open[last], nil
		sock.open = sock.open[:last]
	}
	if !good {
		sock.unfit = true
	}
	s.mu.Unlock()
	s.settle(sock)
}

// settle puts sock away once nothing is expected on it. If it is fit it is kept
// for others.
func (s *sockets) settle(sock *socket) {
	s.mu.Lock()
	if sock.users > 0 || sock.resting || len(sock.open) > 0 {
		s.mu.Unlock()
		return
	}
	sock.resting = true
	if sock.up.latest == sock {
		sock.up.latest = nil
	}
	fit := !sock.unfit && sock.wrong == 0 && !s.closed && len(s.idle) < maxIdle
	s.mu.Unlock()
	fit = fit && disconnect(sock.fd) == nil
	s.mu.Lock()
	defer s.mu.Unlock()
	if !fit || s.closed {
		s.closeLocked(sock)
		return
	}
	s.idle = append(s.idle, sock)
	if s.reaper == nil {
		s.reaper = time.AfterFunc(idleTime, s.reap)
	}
}

// discard closes sock, which failed before a's query was out.
func (s *sockets) discard(sock *socket, a *attempt) {
	a.sock = nil
	s.mu.Lock()
	defer s.mu.Unlock()
	sock.open, sock.resting, sock.unfit = nil, true, true
	if sock.users == 0 { // else the last of them will
		s.closeLocked(sock)
	}
}

func (s *sockets) closeLocked(sock *socket) {
	delete(s.all, sock.serial)
	unix.Close(sock.fd) // leaves the epoll set by itself
}

// reuse returns an idle socket made for up, if there is one.
func (s *sockets) reuse(up *upstream) *socket {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.idle) - 1; i >= max(0, len(s.idle)-8); i-- {
		if sock := s.idle[i]; sock.up == up {
			s.idle = slices.Delete(s.idle, i, i+1)
			s.unused = min(s.unused, len(s.idle))
			return sock
		}
	}
	return nil
}

// reap closes the idle sockets that nobody needed since the last time.
func (s *sockets) reap() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sock := range s.idle[:s.unused] {
		s.closeLocked(sock)
	}
	s.idle = slices.Delete(s.idle, 0, s.unused)
	s.unused = len(s.idle)
	if s.unused > 0 {
		s.reaper.Reset(idleTime)
	} else {
		s.reaper = nil
	}
}

// run calls poll when there is something to read, until close.
func (s *sockets) run() {
	for {
		n := 0
		err := s.raw.Read(func(uintptr) bool {
			n = s.poll()
			return n != 0
		})
		if err != nil {
			return
		}
		if n < 0 {
			// Not known to happen; better slow than spinning.
			time.Sleep(time.Millisecond)
		}
	}
}

// poll hands the answers that are there to their flights. It returns on how
// many sockets there were some, or -1. One goroutine at a time may call it.
func (s *sockets) poll() int {
	r, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(s.fd), uintptr(unsafe.Pointer(&s.events[0])), uintptr(len(s.events)), 0, 0, 0)
	if errno != 0 {
		if errno == unix.EINTR {
			return 0
		}
		return -1
	}
	for _, ev := range s.events[:r] {
		if sock := s.begin(uint64(uint32(ev.Fd)) | uint64(uint32(ev.Pad))<<32); sock != nil {
			s.receive(sock)
			s.end(sock)
		}
	}
	return int(r)
}

// begin returns the socket of that serial number, which is not closed until
// end. Nil means that there is nothing to be read.
func (s *sockets) begin(serial uint64) *socket {
	s.mu.Lock()
	defer s.mu.Unlock()
	sock := s.all[serial]
	if sock == nil {
		return nil
	}
	if sock.resting {
		// Something is still in the queue of an idle socket, which would
		// be reported for ever. One that is no longer idle is being
		// connected anew, or closed.
		if i := slices.Index(s.idle, sock); i >= 0 {
			s.idle = slices.Delete(s.idle, i, i+1)
			s.unused = min(s.unused, len(s.idle))
			s.closeLocked(sock)
		}
		return nil
	}
	sock.users++
	return sock
}

func (s *sockets) end(sock *socket) {
	s.mu.Lock()
	sock.users--
	if sock.users == 0 && sock.resting { // discarded meanwhile
		s.closeLocked(sock)
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	s.settle(sock)
}

// receive reads what came on sock: a bounded number, so that a flood on one
// socket does not keep others waiting. The rest is reported again.
func (s *sockets) receive(sock *socket) {
	n, errno := s.in.receive(sock.fd)
	switch errno {
	case 0:
	case unix.EAGAIN, unix.EINTR:
		return
	default:
		s.fail(sock, os.NewSyscallError("receive", errno))
		return
	}
	for i := range n {
		msg := s.in.message(i)
		if len(msg) >= headerLen {
			s.mu.Lock()
			a := sock.find(uint16(msg[0])<<8 | uint16(msg[1]))
			s.mu.Unlock()
			if a != nil && a.receive(sock, msg) {
				continue
			}
		}
		s.s.stats.mismatched.Add(1)
		s.mistrust(sock)
	}
}

// mistrust notes a message that answers no query of sock.
func (s *sockets) mistrust(sock *socket) {
	s.mu.Lock()
	sock.wrong++
	var open []*attempt
	if sock.wrong >= maxForged {
		open = slices.Clone(sock.open)
	}
	s.mu.Unlock()
	for _, a := range open {
		a.suspect(sock)
	}
}

// fail ends all queries on sock, which had an error.
func (s *sockets) fail(sock *socket, err error) {
	s.mu.Lock()
	sock.unfit = true
	open := slices.Clone(sock.open)
	s.mu.Unlock()
	for _, a := range open {
		a.fail(sock, err)
	}
}

// close ends run. Sockets in use are their flights' to give back.
func (s *sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, sock := range s.idle {
		s.closeLocked(sock)
	}
	s.idle, s.unused = nil, 0
	s.epoll.Close()
}

// openUDP returns a socket that is bound to a random port of the kernel's
// choice and connected to addr, so that it takes datagrams from there alone.
func openUDP(addr netip.AddrPort, bind func(fd int, remote netip.AddrPort) error) (int, error) {
	family := unix.AF_INET
	if !addr.Addr().Is4() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if bind != nil {
		err = bind(fd, addr)
	}
	if err == nil {
		err = connectUDP(fd, addr)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// connectUDP connects fd, which draws a port.
func connectUDP(fd int, addr netip.AddrPort) error {
	if addr.Addr().Is4() {
		sa := unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
		return os.NewSyscallError("connect", unix.Connect(fd, &sa))
	}
	sa := unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	if zone := addr.Addr().Zone(); zone != "" {
		var err error
		if sa.ZoneId, err = zoneIndex(fd, zone); err != nil {
			return err
		}
	}
	return os.NewSyscallError("connect", unix.Connect(fd, &sa))
}

// disconnect undoes connectUDP and gives the port back (udp_disconnect in the
// kernel, as long as nobody asked for that port by number).
func disconnect(fd int) error {
	sa := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
	if errno != 0 {
		return errno
	}
	return nil
}

// zoneIndex returns the index of the interface that a scope names.
func zoneIndex(fd int, zone string) (uint32, error) {
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	ifr, err := unix.NewIfreq(zone)
	if err != nil {
		return 0, os.NewSyscallError("interface "+zone, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, os.NewSyscallError("interface "+zone, err)
	}
	return ifr.Uint32(), nil
}
