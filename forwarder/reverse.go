package forwarder

import (
	"context"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
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
	return -1, unixErrno(errno)
}

// unixErrno is what a failed connection to a unix socket means for a guest.
func unixErrno(errno unix.Errno) unix.Errno {
	switch errno {
	case unix.EAGAIN: // the server lags behind: to the guest, a lost SYN
		return unix.ETIMEDOUT
	case unix.ENOENT, unix.ENOTDIR, unix.ENOTSOCK, unix.EPROTOTYPE:
		return unix.ECONNREFUSED // nobody listens there
	}
	return errno
}

// await has DialPath connect to a unix socket, and answers the guest's SYN when
// it has.
func (t *tcpTable) await(id stack.TransportEndpointID, syn *stack.PacketBuffer, path string) {
	d := &dial{t: t, id: id, fd: -1, slot: -1, syn: syn.IncRef(), born: t.f.clock()}
	t.dials[id] = d
	t.f.stats.Dialing.Add(1)
	t.f.cfg.DialPath(path, func(fd int, errno unix.Errno) {
		if t.f.Do(context.Background(), func() { d.arrived(fd, errno) }) != nil && errno == 0 {
			unix.Close(fd)
		}
	})
}

// arrived ends an attempt that others have made.
func (d *dial) arrived(fd int, errno unix.Errno) {
	t := d.t
	if t.dials[d.id] != d { // the guest has given up
		if errno == 0 {
			unix.Close(fd)
		}
		return
	}
	syn := d.syn.IncRef()
	defer syn.DecRef()
	d.forget()
	if errno != 0 {
		t.f.stats.Refused.Add(1)
		if !t.refuse(d.id, syn, unixErrno(errno)) {
			t.reset(d.id, syn)
		}
		return
	}
	if !t.establish(d.id, syn, fd, -1, 0) {
		t.reset(d.id, syn)
	}
}
