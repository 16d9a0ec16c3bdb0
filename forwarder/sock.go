package forwarder

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Outbound says where host sockets come from. The zero value leaves it to the
// host's routing.
type Outbound struct {
	// Addr4 and Addr6 are source addresses for host sockets.
	Addr4, Addr6 netip.Addr
	// Interface is a device that host sockets are bound to.
	Interface string
	// Loopback has the addresses hold towards the host's loopback, too.
	Loopback bool
}

// Prepare applies o to a new socket that will reach dst. The host's loopback
// has its own device, and its own source unless o says otherwise.
func (o *Outbound) Prepare(fd int, dst netip.Addr) error {
	lo := dst.IsLoopback()
	if lo && !o.Loopback {
		return nil
	}
	if o.Interface != "" && !lo {
		if err := unix.BindToDevice(fd, o.Interface); err != nil {
			return err
		}
	}
	src := o.Addr4
	if dst.Is6() {
		src = o.Addr6
	}
	if src.IsValid() {
		return unix.Bind(fd, sockaddr(netip.AddrPortFrom(src, 0)))
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// rawAddr is a socket address in the kernel's layout.
type rawAddr struct {
	b   [unix.SizeofSockaddrInet6]byte
	len uint32
}

// set fills r with a.
func (r *rawAddr) set(a netip.AddrPort) {
	p := a.Port()
	if a.Addr().Is4() {
		*(*uint16)(unsafe.Pointer(&r.b[0])) = unix.AF_INET
		r.b[2], r.b[3] = byte(p>>8), byte(p)
		ip := a.Addr().As4()
		copy(r.b[4:8], ip[:])
		r.len = unix.SizeofSockaddrInet4
		return
	}
	*(*uint16)(unsafe.Pointer(&r.b[0])) = unix.AF_INET6
	r.b[2], r.b[3] = byte(p>>8), byte(p)
	r.b[4], r.b[5], r.b[6], r.b[7] = 0, 0, 0, 0
	ip := a.Addr().As16()
	copy(r.b[8:24], ip[:])
	r.b[24], r.b[25], r.b[26], r.b[27] = 0, 0, 0, 0
	r.len = unix.SizeofSockaddrInet6
}

// get returns the address that the kernel wrote into r.
func (r *rawAddr) get() netip.AddrPort {
	return parseRawAddr(r.b[:])
}

func parseRawAddr(b []byte) netip.AddrPort {
	if len(b) < 8 {
		return netip.AddrPort{}
	}
	port := uint16(b[2])<<8 | uint16(b[3])
	switch *(*uint16)(unsafe.Pointer(&b[0])) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port)
	case unix.AF_INET6:
		if len(b) >= 24 {
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), port)
		}
	}
	return netip.AddrPort{}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// The following are the system calls of the data path. Descriptors are
// non-blocking, so the scheduler need not hear of them.

func rawSocket(domain, typ, proto int) (int, unix.Errno) {
	r, _, errno := unix.RawSyscall(unix.SYS_SOCKET, uintptr(domain), uintptr(typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC), uintptr(proto))
	return int(r), errno
}

func rawConnect(fd int, a *rawAddr) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&a.b)), uintptr(a.len))
	return errno
}

func setInt(fd, level, opt, v int) unix.Errno {
	x := int32(v)
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt), uintptr(unsafe.Pointer(&x)), 4, 0)
	return errno
}

func soError(fd int) unix.Errno {
	v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return unix.EIO
	}
	return unix.Errno(v)
}

func rawRecv(fd int, b []byte, flags int) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(flags|unix.MSG_DONTWAIT), 0, 0)
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}

// rawDiscard takes up to n bytes out of a TCP socket and keeps none (tcp(7),
// MSG_TRUNC).
func rawDiscard(fd, n int) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), 0, uintptr(n), unix.MSG_DONTWAIT|unix.MSG_TRUNC, 0, 0)
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}

func rawSendmsg(fd int, m *unix.Msghdr) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(m)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}

func rawRecvmsg(fd int, m *unix.Msghdr, flags int) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(m)), uintptr(flags|unix.MSG_DONTWAIT))
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}

// queued returns how many bytes a stream socket can deliver at once.
func queued(fd int) int {
	var n int32
	_, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCINQ, uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return 0
	}
	return int(n)
}

// reset closes a TCP socket so that its peer gets a reset.
func closeWithReset(fd int) {
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
	_   [4]byte
}

func rawSendmmsg(fd int, m []mmsghdr) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}

func rawRecvmmsg(fd int, m []mmsghdr) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), unix.MSG_DONTWAIT, 0, 0)
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}
