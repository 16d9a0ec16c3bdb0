package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sockets are asked for on a socket pair of their own, in packets of up to
// maxDials requests, each answered by one packet with as many answers and, in
// their order, the descriptors of those that have one. Answers come in the
// order of the requests.
const (
	maxDials   = 32
	dialSize   = 44 // id, ports, family, addresses
	answerSize = 8  // id, errno
)

// Inside says what sockets the agent can make in the namespace.
type Inside struct {
	Error4 string `json:"error4,omitempty"` // why there are none for clients of IPv4
	Error6 string `json:"error6,omitempty"` // and of IPv6
}

// Sockets makes TCP sockets inside the namespace that connect to one of its own
// addresses and seem to come from a client outside. It is not safe for use by
// several goroutines.
type Sockets struct {
	Inside
	fd      int
	out     []byte
	in      [answerSize * maxDials]byte
	control []byte
}

// Sockets readies the namespace for such sockets. It may be called once.
func (a *Agent) Sockets() (*Sockets, error) {
	r, fds, err := a.call(&request{Op: opSockets})
	if err == nil && (r.Inside == nil || len(fds) != 1) {
		closeFDs(fds)
		err = errors.New("the answer has no socket")
	}
	if err != nil {
		return nil, fmt.Errorf("agent: open sockets: %w", err)
	}
	return NewSockets(fds[0], *r.Inside), nil
}

// NewSockets takes over from another process what Sockets has returned there.
func NewSockets(fd int, in Inside) *Sockets {
	return &Sockets{Inside: in, fd: fd, control: make([]byte, unix.CmsgSpace(4*maxDials))}
}

// FD is readable when there are answers.
func (s *Sockets) FD() int { return s.fd }

// Dial asks for a socket that connects from one address to another. It is asked
// for when Flush is called, or at once if there are many.
func (s *Sockets) Dial(id uint32, from, to netip.AddrPort) error {
	s.out = appendDial(s.out, id, from, to)
	if len(s.out) == dialSize*maxDials {
		return s.Flush()
	}
	return nil
}

// Flush sends what has been asked for.
func (s *Sockets) Flush() error {
	for len(s.out) > 0 {
		n := min(len(s.out), dialSize*maxDials)
		_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&s.out[0])), uintptr(n), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			s.out = s.out[:copy(s.out, s.out[n:])]
		case unix.EINTR:
		case unix.EAGAIN:
			return nil // the agent lags behind; the next answer is a chance
		default:
			return fmt.Errorf("agent: ask for sockets: %w", errno)
		}
	}
	return nil
}

// Receive hands over the answers of one packet, if there is one: a non-blocking
// socket, which is the receiver's, or an error. What the socket is the receiver
// may not rely on, as the agent lives among the container's processes.
func (s *Sockets) Receive(got func(id uint32, fd int, errno syscall.Errno)) error {
	for {
		n, controlN, flags, _, err := unix.Recvmsg(s.fd, s.in[:], s.control, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("agent: receive sockets: %w", ended(err))
		}
		fds, err := parseFDs(s.control[:controlN])
		switch {
		case err != nil:
		case n == 0:
			err = errors.New("the agent process has ended")
		case n%answerSize != 0 || flags&unix.MSG_TRUNC != 0:
			err = errors.New("bad answer")
		}
		if err != nil {
			closeFDs(fds)
			return fmt.Errorf("agent: receive sockets: %w", err)
		}
		for b := s.in[:n]; len(b) > 0; b = b[answerSize:] {
			id := binary.NativeEndian.Uint32(b)
			errno := syscall.Errno(binary.NativeEndian.Uint32(b[4:]))
			fd := -1
			if errno == 0 {
				// Where this process has no room for more descriptors, the
				// last ones are missing.
				if errno = unix.EMFILE; len(fds) > 0 {
					fd, fds, errno = fds[0], fds[1:], 0
				}
			}
			got(id, fd, errno)
		}
		closeFDs(fds)
		return nil
	}
}

// Close gives the sockets up. Those that were handed over stay.
func (s *Sockets) Close() { unix.Close(s.fd) }

func appendDial(b []byte, id uint32, from, to netip.AddrPort) []byte {
	b = binary.NativeEndian.AppendUint32(b, id)
	b = binary.NativeEndian.AppendUint16(b, from.Port())
	b = binary.NativeEndian.AppendUint16(b, to.Port())
	family := uint32(4)
	if to.Addr().Is6() {
		family = 6
	}
	b = binary.NativeEndian.AppendUint32(b, family)
	f, t := from.Addr().As16(), to.Addr().As16()
	return append(append(b, f[:]...), t[:]...)
}

// parseDial reads the request that b starts with.
func parseDial(b []byte) (id uint32, from, to netip.AddrPort) {
	f, t := netip.AddrFrom16([16]byte(b[12:28])), netip.AddrFrom16([16]byte(b[28:44]))
	if binary.NativeEndian.Uint32(b[8:]) == 4 {
		f, t = f.Unmap(), t.Unmap()
	}
	return binary.NativeEndian.Uint32(b),
		netip.AddrPortFrom(f, binary.NativeEndian.Uint16(b[4:])), netip.AddrPortFrom(t, binary.NativeEndian.Uint16(b[6:]))
}

func appendAnswer(b []byte, id uint32, errno syscall.Errno) []byte {
	b = binary.NativeEndian.AppendUint32(b, id)
	return binary.NativeEndian.AppendUint32(b, uint32(errno))
}
