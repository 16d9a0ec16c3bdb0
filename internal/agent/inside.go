package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/congestion"
	"github.com/usernet/usernet/internal/rights"
)

// Sockets that speak for a client outside. Such a socket is bound to the
// client's address, which is foreign here (IP_TRANSPARENT), and connects to one
// of the namespace's own. That is local, but the answers are for an address out
// there, and would leave by the link. So the socket has a mark, and one rule per
// family leads what bears it back into the namespace. The kernel gives the
// server's socket the mark of the SYN it has accepted (tcp_fwmark_accept), and
// a reset that of what it answers (fwmark_reflect). No packet filter takes part.
const (
	mark     = 0x75736e74
	table    = 0x7573
	priority = 0x75 // behind the local table, before whatever the guest has
)

// insideSysctls are what the mark needs, by family: the first serves both.
var insideSysctls = []string{
	"ipv4/tcp_fwmark_accept",
	"ipv4/fwmark_reflect",
	"ipv6/fwmark_reflect",
}

// inside makes sockets for the parent. The zero value has made no preparation.
type inside struct {
	fd       int // our end of the socket pair; 0 before open
	prepared bool
	err4     error // why there are none for clients of IPv4
	err6     error
	undo     []func()
	handle   *netlink.Handle
	adopted  map[uint32]*netlink.Rule // by the id of their connections
	// congestion is for connections from the parent to servers inside.
	congestion string
	buf        [dialSize * maxDials]byte
	out        [answerSize * maxDials]byte
}

// open returns the parent's end of a new socket pair.
func (in *inside) open(n *network) (*Inside, int, error) {
	in.hangUp() // who asks again has another process ask for sockets
	if !in.prepared {
		in.prepared = true
		// The preparation is taken back when the socket ends; the kernel's
		// signal would come first.
		_ = unix.Prctl(unix.PR_SET_PDEATHSIG, 0, 0, 0, 0)
		in.prepare(n)
	}
	r := &Inside{}
	if in.err4 != nil {
		r.Error4 = in.err4.Error()
	}
	if in.err6 != nil {
		r.Error6 = in.err6.Error()
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, err
	}
	if err := unix.SetNonblock(pair[1], true); err != nil {
		rights.Close(pair[:])
		return nil, -1, err
	}
	in.fd = pair[0]
	return r, pair[1], nil
}

// prepare readies the namespace.
func (in *inside) prepare(n *network) {
	in.congestion, in.handle = n.congestion, n.handle
	lo, err := n.handle.LinkByName("lo")
	if err != nil {
		in.err4, in.err6 = err, err
		return
	}
	for i, path := range insideSysctls {
		if err := in.sysctl(path, "1"); err != nil {
			if i < 2 {
				in.err4 = errors.Join(in.err4, err)
			}
			if i != 1 {
				in.err6 = errors.Join(in.err6, err)
			}
		}
	}
	if in.err4 == nil {
		in.err4 = in.route(n.handle, netlink.FAMILY_V4, lo.Attrs().Index)
	}
	if in.err6 == nil {
		in.err6 = in.route(n.handle, netlink.FAMILY_V6, lo.Attrs().Index)
	}
}

// sysctl sets a value, to be set back at the end.
func (in *inside) sysctl(path, value string) error {
	old, err := readFile(path)
	if err == nil && old != value {
		if err = writeFile(path, value); err == nil {
			in.undo = append(in.undo, func() { _ = writeFile(path, old) })
		}
	}
	if err != nil {
		return fmt.Errorf("set %s%s: %w", sysctlDir, path, err)
	}
	return nil
}

// route leads what bears the mark back into the namespace.
func (in *inside) route(h *netlink.Handle, family, lo int) error {
	everything := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if family == netlink.FAMILY_V6 {
		everything = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	r := &netlink.Route{
		Family: family, LinkIndex: lo, Table: table, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		Dst:     &net.IPNet{IP: net.IP(everything.Addr().AsSlice()), Mask: net.CIDRMask(0, everything.Addr().BitLen())},
		Congctl: in.congestion, // of what servers inside send
	}
	switch err := h.RouteAdd(r); {
	case err == nil:
		in.undo = append(in.undo, func() { _ = h.RouteDel(r) })
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("add route of table %d: %w", table, err)
	}
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Table, rule.Priority = family, mark, table, priority
	switch err := h.RuleAdd(rule); {
	case err == nil:
		in.undo = append(in.undo, func() { _ = h.RuleDel(rule) })
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("add rule for mark %#x: %w", mark, err)
	}
	return nil
}

// close leaves the namespace as it was found.
func (in *inside) close() {
	for _, undo := range in.undo {
		undo()
	}
	in.undo = nil
	in.hangUp()
}

func (in *inside) hangUp() {
	for id := range in.adopted {
		in.release(id)
	}
	if in.fd != 0 {
		unix.Close(in.fd)
		in.fd = 0
	}
}

// serve answers one packet of the parent's.
func (in *inside) serve() {
	n, _, flags, _, err := unix.Recvmsg(in.fd, in.buf[:], nil, unix.MSG_DONTWAIT)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return
	}
	if err == nil && n == spareSize {
		in.serveSpares(in.buf[:n])
		return
	}
	if err == nil && flags&unix.MSG_TRUNC == 0 {
		switch n {
		case adoptSize:
			in.serveAdopt(in.buf[:n])
			return
		case releaseSize:
			in.release(binary.NativeEndian.Uint32(in.buf[:]))
			return
		}
	}
	if err != nil || n == 0 || n%dialSize != 0 || flags&unix.MSG_TRUNC != 0 {
		in.hangUp()
		return
	}
	var fds []int
	out := in.out[:0]
	for b := in.buf[:n]; len(b) > 0; b = b[dialSize:] {
		id, from, to := parseDial(b)
		fd, err := in.dial(from, to)
		var errno unix.Errno
		if err != nil {
			errno = unix.EIO
			errors.As(err, &errno)
		} else {
			fds = append(fds, fd)
		}
		out = appendAnswer(out, id, errno)
	}
	err = sendTo(in.fd, out, fds)
	if err != nil && len(fds) > 0 {
		// Too many descriptors are under way (ETOOMANYREFS): say no.
		out = out[:0]
		for b := in.buf[:n]; len(b) > 0; b = b[dialSize:] {
			id, _, _ := parseDial(b)
			out = appendAnswer(out, id, unix.EMFILE)
		}
		err = sendTo(in.fd, out, nil)
	}
	rights.Close(fds)
	if err != nil {
		in.hangUp()
	}
}

// serveSpares makes sockets whose clients are still to come.
func (in *inside) serveSpares(request []byte) {
	var fds []int
	for range spareBatch {
		fd, err := in.socket(binary.NativeEndian.Uint32(request) == familyNumber(true))
		if err != nil {
			break
		}
		fds = append(fds, fd)
	}
	err := sendTo(in.fd, request, fds)
	if err != nil && len(fds) > 0 {
		err = sendTo(in.fd, request, nil) // too many are under way
	}
	rights.Close(fds)
	if err != nil {
		in.hangUp()
	}
}

// dial begins a connection to one of the namespace's addresses that seems to
// come from another. If the client's port is taken inside, the connection comes
// from another port of the client's.
func (in *inside) dial(from, to netip.AddrPort) (int, error) {
	fd, err := in.dialFrom(from, to)
	if err == nil {
		return fd, nil
	}
	if from.Port() == 0 || !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EACCES) {
		return -1, err
	}
	return in.dialFrom(netip.AddrPortFrom(from.Addr(), 0), to)
}

func (in *inside) dialFrom(from, to netip.AddrPort) (fd int, err error) {
	fd, err = in.socket(to.Addr().Is6())
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if from.Port() == 0 {
		// The port is chosen in connect, which knows the other end's.
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return -1, err
		}
	}
	if err := unix.Bind(fd, sockaddr(from)); err != nil {
		return -1, err
	}
	// It goes on when this returns, though all of it takes place in this kernel.
	if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return -1, err
	}
	return fd, nil
}

// socket makes a socket that can take a foreign address, and whose other end
// answers into the namespace.
func (in *inside) socket(six bool) (fd int, err error) {
	domain, level, transparent := unix.AF_INET, unix.SOL_IP, unix.IP_TRANSPARENT
	if six {
		domain, level, transparent = unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err
	}
	for _, o := range []struct{ level, name, value int }{
		{level, transparent, 1},
		{unix.SOL_SOCKET, unix.SO_MARK, mark},
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
		{unix.SOL_TCP, unix.TCP_NODELAY, 1},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	congestion.Set(fd, in.congestion)
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
