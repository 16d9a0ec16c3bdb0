package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// Sockets are asked for on a socket pair of their own, in packets of up to
// maxDials requests, each answered by one packet with as many answers and, in
// their order, the descriptors of those that have one. Answers come in the
// order of the requests. A packet of spareSize asks for spares of a family, and
// is answered by one of that size that has them.
const (
	maxDials   = 32
	dialSize   = 44 // id, ports, family, addresses
	answerSize = 8  // id, errno
	spareSize  = 4  // family

	// spareBatch is how many spares are made at a time: when fewer are left, so
	// that there are less than twice as many of a family at any time. They last
	// for some milliseconds, which the agent may have to wait for a processor.
	spareBatch = 64
	// spareAfter is how many clients have to find none before some are made.
	spareAfter = 4
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

	ahead  bool // spares are made
	spares [2]spares
}

// spares are sockets of one family that wait for a client.
type spares struct {
	fds    []int
	asked  bool // for more
	used   bool // since Trim
	missed int  // clients who found none since Trim
}

// Sockets readies the namespace for such sockets. What an earlier call has
// returned gets no more answers.
func (a *Agent) Sockets() (*Sockets, error) {
	r, fds, err := a.call(&request{Op: opSockets})
	if err == nil {
		if err = errors.New("the answer has no socket"); r.Inside != nil && len(fds) == 1 {
			err = checkSocket(fds[0], unix.AF_UNIX, unix.SOCK_SEQPACKET)
		}
		if err != nil {
			rights.Close(fds)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("agent: open sockets: %w", err)
	}
	return NewSockets(fds[0], *r.Inside), nil
}

// NewSockets takes over from another process what Sockets has returned there.
func NewSockets(fd int, in Inside) *Sockets {
	return &Sockets{Inside: in, fd: fd, control: make([]byte, unix.CmsgSpace(4*max(maxDials, spareBatch)))}
}

// FD is readable when there are answers.
func (s *Sockets) FD() int { return s.fd }

// MakeSpares has sockets made ahead of the clients, who then need not wait for
// the agent. Whoever binds and connects them has to be sure that it can wait: a
// process of the container that has taken the agent over can make such a socket
// block. So it is not for those who serve several containers.
func (s *Sockets) MakeSpares() { s.ahead = true }

// Spare returns a non-blocking socket of the namespace that has still to be bound
// to a client's address and connected, and is the caller's, or -1. The caller may
// rely on it no more than on those that Receive hands over.
func (s *Sockets) Spare(six bool) int {
	if !s.ahead {
		return -1
	}
	p, fd := &s.spares[0], -1
	if six {
		p = &s.spares[1]
	}
	p.used = true
	if n := len(p.fds); n > 0 {
		fd = p.fds[n-1]
		p.fds = p.fds[:n-1]
	} else {
		p.missed++
	}
	if len(p.fds) < spareBatch && p.missed >= spareAfter && !p.asked {
		var b [spareSize]byte
		binary.NativeEndian.PutUint32(b[:], familyNumber(six))
		// An agent that lags behind, or has ended, is found out by Dial.
		p.asked = rawSend(s.fd, b[:]) == 0
	}
	return fd
}

// Trim closes the spares that were not needed since it was last called.
func (s *Sockets) Trim() {
	for i := range s.spares {
		p := &s.spares[i]
		if !p.used {
			rights.Close(p.fds)
			p.fds, p.missed = nil, 0
		}
		p.used = false
	}
}

// takeSpares takes the answer to a request for spares.
func (s *Sockets) takeSpares(family uint32, fds []int) {
	p := &s.spares[0]
	if family == familyNumber(true) {
		p = &s.spares[1]
	}
	if !p.asked {
		discard(fds...)
		return
	}
	if p.asked = false; len(fds) == 0 {
		p.missed = 0 // there are none to be had for now
	}
	for _, fd := range fds {
		if len(p.fds) == 2*spareBatch {
			discard(fd)
		} else if fd = vetted(fd); fd >= 0 {
			p.fds = append(p.fds, fd)
		}
	}
}

// vetted returns a descriptor that the agent has handed over if it is a TCP socket,
// not to block; otherwise it gives it up and returns -1. Whoever has taken the agent
// over could hand over what lets its user wait, as a file of FUSE does in close.
func vetted(fd int) int {
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err == nil && protocol == unix.IPPROTO_TCP {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_NONBLOCK)
	}
	if err != nil || protocol != unix.IPPROTO_TCP {
		discard(fd)
		return -1
	}
	return fd
}

// discard closes what was not vetted.
func discard(fds ...int) {
	if len(fds) > 0 {
		go rights.Close(fds)
	}
}

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
		switch errno := rawSend(s.fd, s.out[:n]); errno {
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
// TCP socket, which is the receiver's, or an error. What it is connected to, and that
// it stays non-blocking, the receiver may not rely on: the agent lives among the
// container's processes.
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
		fds, err := rights.Decode(s.control[:controlN])
		switch {
		case err != nil:
		case n == 0:
			err = errEnded
		case n == spareSize && flags&unix.MSG_TRUNC == 0:
			s.takeSpares(binary.NativeEndian.Uint32(s.in[:]), fds)
			return nil
		case n%answerSize != 0 || flags&unix.MSG_TRUNC != 0:
			err = errors.New("bad answer")
		}
		if err != nil {
			discard(fds...)
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
					if fd, fds, errno = vetted(fds[0]), fds[1:], 0; fd < 0 {
						errno = unix.ENOTSOCK
					}
				}
			}
			got(id, fd, errno)
		}
		discard(fds...)
		return nil
	}
}

// Close gives the sockets up. Those that were handed over stay.
func (s *Sockets) Close() {
	for i := range s.spares {
		rights.Close(s.spares[i].fds)
		s.spares[i] = spares{}
	}
	unix.Close(s.fd)
}

func rawSend(fd int, b []byte) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
	return errno
}

func familyNumber(six bool) uint32 {
	if six {
		return 6
	}
	return 4
}

func appendDial(b []byte, id uint32, from, to netip.AddrPort) []byte {
	b = binary.NativeEndian.AppendUint32(b, id)
	b = binary.NativeEndian.AppendUint16(b, from.Port())
	b = binary.NativeEndian.AppendUint16(b, to.Port())
	b = binary.NativeEndian.AppendUint32(b, familyNumber(to.Addr().Is6()))
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
