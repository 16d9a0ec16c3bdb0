package forwarder

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Server is one of the host's that a guest may reach at a port of the gateway.
type Server struct {
	Addr netip.AddrPort
	Path string // of a unix socket, instead
}

// reversed returns the server that a port of the gateway leads to.
func (f *Forwarder) reversed(to netip.AddrPort) (Server, bool) {
	if len(f.cfg.Reverse) == 0 {
		return Server{}, false
	}
	if _, gateway := f.policy.loopback(to.Addr().Unmap()); !gateway {
		return Server{}, false
	}
	s, ok := f.cfg.Reverse[to.Port()]
	return s, ok
}

// dialServer starts to connect to a server, as dialTCP does.
func (f *Forwarder) dialServer(s Server) (int, unix.Errno) {
	if s.Path == "" {
		return f.dialTCP(s.Addr)
	}
	fd, errno := rawSocket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if errno != 0 {
		return -1, errno
	}
	var sa unix.RawSockaddrUnix
	sa.Family = unix.AF_UNIX
	for i := range len(s.Path) {
		sa.Path[i] = int8(s.Path[i])
	}
	size := unsafe.Offsetof(sa.Path) + uintptr(len(s.Path)) + 1
	_, _, errno = unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), size)
	if errno == 0 {
		return fd, 0
	}
	unix.Close(fd)
	switch errno {
	case unix.EAGAIN: // the server lags behind: to the guest, a lost SYN
		return -1, unix.ETIMEDOUT
	case unix.ENOENT, unix.ENOTDIR, unix.ENOTSOCK, unix.EPROTOTYPE:
		return -1, unix.ECONNREFUSED // nobody listens there
	}
	return -1, errno
}
