package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// CutOff resets the namespace's TCP connections that go by the opened link, and
// returns how many there were. It is for those whose other end is lost: a client
// that only waits would do so for ever. EOPNOTSUPP: the kernel cannot
// (CONFIG_INET_DIAG_DESTROY).
func (a *Agent) CutOff() (int, error) {
	r, fds, err := a.call(&request{Op: opCutOff})
	rights.Close(fds)
	if err != nil {
		return 0, fmt.Errorf("agent: cut off connections: %w", err)
	}
	return r.Count, nil
}

const (
	sockDestroy = 21 // SOCK_DESTROY of include/uapi/linux/sock_diag.h
	diagID      = 4  // where the addresses are in struct inet_diag_msg
	diagIDSize  = 48 // struct inet_diag_sockid

	stateSynSent  = 2
	stateTimeWait = 6
	// All states of TCP but those before a connection, and after one.
	connected = 1<<12 - 1 - 1<<stateClose - 1<<stateListen - 1<<stateTimeWait - 1<<stateSynSent
)

// cutOff answers CutOff.
func (n *network) cutOff() (int, error) {
	if n.link == nil {
		return 0, errors.New("there is no link")
	}
	own, all, err := n.addresses()
	if err != nil {
		return 0, err
	}
	fd, err := diagSocket()
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	cut := 0
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := connections(fd, family)
		if errors.Is(err, unix.ENOENT) && family == unix.AF_INET6 {
			continue // a kernel without IPv6
		}
		if err != nil {
			return cut, err
		}
		for _, s := range sockets {
			if !slices.Contains(own, s.local()) || slices.Contains(all, s.remote()) || s.remote().IsLoopback() {
				continue
			}
			switch err := destroy(fd, s); {
			case errors.Is(err, unix.ENOENT): // it has ended by itself
			case err != nil:
				return cut, err
			default:
				cut++
			}
		}
	}
	return cut, nil
}

// addresses returns those of the link, and those of all interfaces.
func (n *network) addresses() (own, all []netip.Addr, err error) {
	list, err := n.handle.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range list {
		addr, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		all = append(all, addr.Unmap())
		if a.LinkIndex == n.link.Attrs().Index {
			own = append(own, addr.Unmap())
		}
	}
	return own, all, nil
}

// connection is a TCP connection as the kernel names it: its family, and a struct
// inet_diag_sockid.
type connection struct {
	family uint8
	id     [diagIDSize]byte
}

func (c *connection) local() netip.Addr  { return c.addr(4) }
func (c *connection) remote() netip.Addr { return c.addr(20) }

func (c *connection) addr(at int) netip.Addr {
	if c.family == unix.AF_INET6 {
		return netip.AddrFrom16([16]byte(c.id[at : at+16])).Unmap()
	}
	return netip.AddrFrom4([4]byte(c.id[at : at+4]))
}

// connections lists the TCP connections of a family.
func connections(fd int, family uint8) (list []connection, err error) {
	if err := diagRequest(fd, unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, &connection{family: family}); err != nil {
		return nil, err
	}
	buf := make([]byte, 32<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return nil, err
		}
		done, err := eachMessage(buf[:n], func(body []byte) error {
			if len(body) < diagMessageSize {
				return errBadDump
			}
			c := connection{family: body[0]}
			copy(c.id[:], body[diagID:])
			list = append(list, c)
			return nil
		})
		if done {
			return list, err
		}
	}
}

// destroy resets a connection.
func destroy(fd int, c connection) error {
	if err := diagRequest(fd, sockDestroy, unix.NLM_F_ACK, &c); err != nil {
		return err
	}
	var buf [256]byte
	n, _, err := unix.Recvfrom(fd, buf[:], 0)
	if err != nil {
		return err
	}
	_, err = eachMessage(buf[:n], func([]byte) error { return nil })
	return err
}

// diagSocket opens a socket to ask the kernel for the namespace's sockets, of which
// no answer takes long (sock_diag(7)).
func diagSocket() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func diagRequest(fd int, kind, flags uint16, c *connection) error {
	const size = unix.SizeofNlMsghdr + diagRequestSize
	b := make([]byte, size)
	binary.NativeEndian.PutUint32(b, size)
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|flags)
	b[16], b[17] = c.family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[20:], connected)
	copy(b[24:], c.id[:])
	return unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// eachMessage has f read the sockets in one packet of answers, and reports whether
// it has the last.
func eachMessage(b []byte, f func(body []byte) error) (done bool, err error) {
	const head = unix.SizeofNlMsghdr
	for len(b) >= head {
		size := int(binary.NativeEndian.Uint32(b))
		if size < head || size > len(b) {
			return true, errBadDump
		}
		body := b[head:size]
		switch binary.NativeEndian.Uint16(b[4:]) {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return true, errBadDump
			}
			if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(body))); errno != 0 {
				return true, errno
			}
			return true, nil
		default:
			if err := f(body); err != nil {
				return true, err
			}
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return false, nil
}
