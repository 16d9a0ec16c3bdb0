package agent

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// Listening is what servers in the namespace wait on.
type Listening struct {
	Ports []Ports `json:"ports"`
	Cut   bool    `json:"cut,omitempty"` // there are more than could be told
	// LocalFrom and LocalTo are the ports that clients inside are given
	// (net.ipv4.ip_local_port_range).
	LocalFrom uint16 `json:"local_from"`
	LocalTo   uint16 `json:"local_to"`
}

// Ports are neighbours that are alike.
type Ports struct {
	Proto uint8  `json:"proto"` // TCP or UDP
	From  uint16 `json:"from"`
	To    uint16 `json:"to"`
	Four  bool   `json:"four,omitempty"` // IPv4 gets there
	Six   bool   `json:"six,omitempty"`  // and IPv6
}

// maxPorts keeps an answer within a message.
const maxPorts = maxMessage / 100

// Listening looks which ports servers in the namespace listen on, as seen by
// who comes to one of these addresses. UDP knows no listening: there it is the
// sockets that are bound to a port and to no peer.
func (a *Agent) Listening(addrs ...netip.Addr) (Listening, error) {
	r, fds, err := a.call(&request{Op: opListening, Addrs: addrs})
	rights.Close(fds)
	if err == nil && r.Listening == nil {
		err = errors.New("the answer has no ports")
	}
	if err == nil {
		err = r.Listening.check()
	}
	if err != nil {
		return Listening{}, fmt.Errorf("agent: look for servers: %w", err)
	}
	return *r.Listening, nil
}

// A socketTable asks the kernel for the namespace's sockets (sock_diag(7)).
type socketTable struct {
	fd  int // 0 before the first question
	buf [32 << 10]byte
}

// listening answers Listening.
func (t *socketTable) listening(addrs []netip.Addr) (*Listening, error) {
	l := &Listening{}
	text, err := readFile("ipv4/ip_local_port_range")
	if err == nil {
		_, err = fmt.Sscan(strings.TrimSpace(text), &l.LocalFrom, &l.LocalTo)
	}
	if err != nil {
		return nil, fmt.Errorf("read the range of local ports: %w", err)
	}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		found := make(map[uint16]Ports)
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			if err := t.dump(family, proto, func(s boundSocket) { s.note(found, addrs) }); err != nil {
				return nil, err
			}
		}
		l.Ports = append(l.Ports, merge(found, proto)...)
	}
	if len(l.Ports) > maxPorts {
		l.Ports, l.Cut = l.Ports[:maxPorts], true
	}
	return l, nil
}

// boundSocket is a socket that waits on a port.
type boundSocket struct {
	addr   netip.Addr
	port   uint16
	device uint32
	only6  bool
}

// note adds a socket to those that are found, if who comes to addrs gets to it.
// One that is bound to an interface belongs to who manages that, a DHCP client
// for one.
func (s boundSocket) note(found map[uint16]Ports, addrs []netip.Addr) {
	all := s.addr.IsUnspecified()
	if s.port == 0 || s.device != 0 || !all && !slices.Contains(addrs, s.addr.Unmap()) {
		return
	}
	p := found[s.port]
	p.Four = p.Four || s.addr.Unmap().Is4() || all && !s.only6
	p.Six = p.Six || s.addr.Unmap().Is6()
	found[s.port] = p
}

// merge puts neighbours together.
func merge(found map[uint16]Ports, proto uint8) (list []Ports) {
	for port, p := range found {
		list = append(list, Ports{proto, port, port, p.Four, p.Six})
	}
	slices.SortFunc(list, func(a, b Ports) int { return cmp.Compare(a.From, b.From) })
	n := 0
	for _, p := range list {
		if n > 0 {
			if last := &list[n-1]; last.To+1 == p.From && last.Four == p.Four && last.Six == p.Six {
				last.To = p.From
				continue
			}
		}
		list[n] = p
		n++
	}
	return list[:n]
}

// Of include/uapi/linux/inet_diag.h and net/tcp_states.h.
const (
	diagRequestSize = 56 // struct inet_diag_req_v2
	diagMessageSize = 72 // struct inet_diag_msg
	diagOnly6       = 11 // INET_DIAG_SKV6ONLY
	stateClose      = 7  // of a UDP socket without a peer
	stateListen     = 10
)

// dump has f see the sockets that wait on a port.
func (t *socketTable) dump(family, proto uint8, f func(boundSocket)) error {
	err := t.ask(family, proto)
	for err == nil {
		var n int
		if n, _, err = unix.Recvfrom(t.fd, t.buf[:], 0); err != nil {
			break
		}
		var done bool
		if done, err = parseSockets(t.buf[:n], f); done {
			break
		}
	}
	if errors.Is(err, unix.ENOENT) && family == unix.AF_INET6 {
		return nil // a kernel without IPv6
	}
	if err != nil {
		t.close() // what is still to come would pass for the next answer
		return fmt.Errorf("ask for the sockets of protocol %d: %w", proto, err)
	}
	return nil
}

// ask sends the question.
func (t *socketTable) ask(family, proto uint8) error {
	if t.fd == 0 {
		fd, err := diagSocket()
		if err != nil {
			return err
		}
		t.fd = fd
	}
	const size = unix.SizeofNlMsghdr + diagRequestSize
	states := uint32(1 << stateListen)
	if proto == unix.IPPROTO_UDP {
		states = 1 << stateClose
	}
	b := make([]byte, size)
	binary.NativeEndian.PutUint32(b, size)
	binary.NativeEndian.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	b[16], b[17] = family, proto
	binary.NativeEndian.PutUint32(b[20:], states)
	return unix.Sendto(t.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

func (t *socketTable) close() {
	if t.fd != 0 {
		unix.Close(t.fd)
		t.fd = 0
	}
}

var errBadDump = errors.New("malformed answer")

// parseSockets reads the messages of one packet, and reports whether they were
// the last.
func parseSockets(b []byte, f func(boundSocket)) (done bool, err error) {
	return eachMessage(b, func(body []byte) error {
		s, err := parseSocket(body)
		if err == nil {
			f(s)
		}
		return err
	})
}

// parseSocket reads a struct inet_diag_msg and the attributes behind it.
func parseSocket(b []byte) (s boundSocket, err error) {
	if len(b) < diagMessageSize {
		return s, errBadDump
	}
	s.port = binary.BigEndian.Uint16(b[4:])
	s.addr = netip.AddrFrom4([4]byte(b[8:12]))
	if b[0] == unix.AF_INET6 {
		s.addr = netip.AddrFrom16([16]byte(b[8:24]))
	}
	s.device = binary.NativeEndian.Uint32(b[40:])
	for b = b[diagMessageSize:]; len(b) >= unix.SizeofRtAttr; {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return s, errBadDump
		}
		if binary.NativeEndian.Uint16(b[2:]) == diagOnly6 && size > unix.SizeofRtAttr {
			s.only6 = b[unix.SizeofRtAttr] != 0
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return s, nil
}
