package dns

import (
	"errors"
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

// maxIdle is how many sockets are kept for the next questions.
const maxIdle = 128

// idleTime is about how long they are kept without need.
const idleTime = time.Second

// sockets watches the sockets of upstream UDP queries. Each query has a port
// of its own, so the way through the net package (a netpoll descriptor,
// options, three address look-ups) would cost more than the question; here a
// socket is in an epoll set of its own, which the runtime's poller watches as
// one descriptor. A socket that brought its answer is disconnected, which gives
// its port back, and used again: the next connect draws a new port. That costs
// a quarter of a new socket.
type sockets struct {
	epoll *os.File
	raw   syscall.RawConn

	mu      sync.Mutex // guards following
	serial  uint64
	waiting map[uint64]*attempt // by serial number of their socket
	idle    []*socket
	unused  int // of idle, the first ones, since the last reaping
	reaper  *time.Timer
	closed  bool
}

// socket is a UDP socket in the epoll set.
type socket struct {
	fd     int
	serial uint64
	up     *upstream // bound and connected as befits this one
}

// open makes the epoll set.
func (s *sockets) open() error {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("create epoll set: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return fmt.Errorf("prepare epoll set: %w", err)
	}
	s.epoll = os.NewFile(uintptr(fd), "dns sockets")
	if s.raw, err = s.epoll.SyscallConn(); err != nil {
		s.epoll.Close()
		return fmt.Errorf("watch epoll set: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting = make(map[uint64]*attempt)
	return nil
}

// send sends msg to the upstream of a from a port of its own and watches for
// answers. The caller holds a's flight.
func (s *sockets) send(a *attempt, msg []byte, bind func(fd int, remote netip.AddrPort) error) error {
	if sock := s.reuse(a.up); sock != nil {
		if connectUDP(sock.fd, a.up.addr) == nil && s.sendOn(sock, a, msg) == nil {
			return nil
		}
		unix.Close(sock.fd) // it may have had an error in store
	}
	fd, err := openUDP(a.up.addr, bind)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.serial++
	sock := &socket{fd: fd, serial: s.serial, up: a.up}
	s.mu.Unlock()
	if err = s.watch(sock); err == nil {
		err = s.sendOn(sock, a, msg)
	}
	if err != nil {
		unix.Close(fd)
	}
	return err
}

// sendOn sends msg on sock, which is a's from then on.
func (s *sockets) sendOn(sock *socket, a *attempt, msg []byte) error {
	s.mu.Lock()
	s.waiting[sock.serial] = a
	s.mu.Unlock()
	_, err := unix.Write(sock.fd, msg)
	// A full queue or lack of memory is as good as a lost datagram: it will
	// be repeated.
	if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENOBUFS) {
		s.mu.Lock()
		delete(s.waiting, sock.serial)
		s.mu.Unlock()
		return os.NewSyscallError("send", err)
	}
	a.sock = sock
	return nil
}

// watch puts sock into the epoll set.
func (s *sockets) watch(sock *socket) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(sock.serial), Pad: int32(sock.serial >> 32)}
	var err error
	if cerr := s.raw.Control(func(epfd uintptr) {
		err = unix.EpollCtl(int(epfd), unix.EPOLL_CTL_ADD, sock.fd, &ev)
	}); cerr != nil {
		return cerr
	}
	return os.NewSyscallError("epoll_ctl", err)
}

// forget ends a's use of its socket. If it is fit it is kept for others. The
// caller holds a's flight.
func (s *sockets) forget(a *attempt, fit bool) {
	sock := a.sock
	if sock == nil {
		return
	}
	a.sock = nil
	fit = fit && disconnect(sock.fd) == nil
	s.mu.Lock()
	delete(s.waiting, sock.serial)
	if fit = fit && !s.closed && len(s.idle) < maxIdle; fit {
		s.idle = append(s.idle, sock)
		if s.reaper == nil {
			s.reaper = time.AfterFunc(idleTime, s.reap)
		}
	}
	s.mu.Unlock()
	if !fit {
		unix.Close(sock.fd) // leaves the epoll set by itself
	}
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
		unix.Close(sock.fd)
	}
	s.idle = slices.Delete(s.idle, 0, s.unused)
	s.unused = len(s.idle)
	if s.unused > 0 {
		s.reaper.Reset(idleTime)
	} else {
		s.reaper = nil
	}
}

// strayed closes the idle socket of that serial number: something is still in
// its queue, which would be reported for ever.
func (s *sockets) strayed(serial uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.idle, func(sock *socket) bool { return sock.serial == serial })
	if i >= 0 {
		unix.Close(s.idle[i].fd)
		s.idle = slices.Delete(s.idle, i, i+1)
		s.unused = min(s.unused, len(s.idle))
	}
}

// run hands answers to their flights until close.
func (s *sockets) run() {
	events := make([]unix.EpollEvent, 128)
	buf := make([]byte, maxMessage+1)
	for {
		n := 0
		err := s.raw.Read(func(epfd uintptr) bool {
			var err error
			n, err = unix.EpollWait(int(epfd), events, 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
		if err != nil {
			return
		}
		if n < 0 {
			// Not known to happen; better slow than spinning.
			time.Sleep(time.Millisecond)
			continue
		}
		for _, ev := range events[:n] {
			serial := uint64(uint32(ev.Fd)) | uint64(uint32(ev.Pad))<<32
			s.mu.Lock()
			a := s.waiting[serial]
			s.mu.Unlock()
			if a != nil {
				a.receive(buf)
			} else {
				s.strayed(serial)
			}
		}
	}
}

// close ends run. Sockets in use are their flights' to give back.
func (s *sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, sock := range s.idle {
		unix.Close(sock.fd)
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
