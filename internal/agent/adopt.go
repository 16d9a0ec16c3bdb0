package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// A Conn is an established TCP connection of a program in the namespace, as its
// other end outside has it when that end is handed over to a socket inside. All
// that either side has sent is acknowledged.
type Conn struct {
	Guest, Remote netip.AddrPort // the two ends, of one family
	// Sent and Received are the sequence numbers that are next: of what the
	// other end sends, and of what the guest does.
	Sent, Received uint32
	// SendWindow is what the guest has room for, ReceiveWindow what it was told
	// that the other end has, in bytes.
	SendWindow, ReceiveWindow uint32
	// What the handshake has agreed on: Scaled says that the scales of the two
	// windows count, Timestamps and SACK that there are these options. MSS is
	// what the guest takes in one segment, in bytes.
	Scaled, Timestamps, SACK bool
	SendScale, ReceiveScale  uint8
	MSS                      uint16
	Timestamp                uint32 // the last that the other end has sent
}

// Adopt asks for a socket that is the other end of a connection from now on: what
// the guest sends does not leave its namespace any more. The answer comes by
// Receive; an error there or here leaves the connection as it is. The socket
// resets the connection when it is closed, unless SO_LINGER is taken back. Let
// goes of it, when that has happened, Release.
func (s *Sockets) Adopt(id uint32, c *Conn) error {
	if errno := rawSend(s.fd, appendConn(nil, id, c)); errno != 0 {
		return fmt.Errorf("agent: adopt connection: %w", errno)
	}
	return nil
}

// Release ends what Adopt of the same id has begun, before or after the socket is
// closed: other connections between the same ports are the link's again.
func (s *Sockets) Release(id uint32) error {
	var b [releaseSize]byte
	binary.NativeEndian.PutUint32(b[:], id)
	if errno := rawSend(s.fd, b[:]); errno != 0 {
		return fmt.Errorf("agent: release connection: %w", errno)
	}
	return nil
}

const (
	// MaxAdopted is how many connections of a namespace can be adopted at a
	// time: each takes a rule, which the kernel looks at for every connection
	// that begins.
	MaxAdopted = 128

	// Sizes of messages, which tell one kind from another.
	adoptSize   = 72
	releaseSize = 8

	scaled     = 1 << 0
	timestamps = 1 << 1
	sack       = 1 << 2
)

func appendConn(b []byte, id uint32, c *Conn) []byte {
	e := binary.NativeEndian
	b = appendDial(b, id, c.Guest, c.Remote)
	for _, v := range []uint32{c.Sent, c.Received, c.SendWindow, c.ReceiveWindow, c.Timestamp} {
		b = e.AppendUint32(b, v)
	}
	b = e.AppendUint16(b, c.MSS)
	var flags uint8
	for i, on := range []bool{c.Scaled, c.Timestamps, c.SACK} {
		if on {
			flags |= 1 << i
		}
	}
	return append(b, c.SendScale, c.ReceiveScale, flags, 0, 0, 0)
}

// parseConn reads a message of adoptSize.
func parseConn(b []byte) (id uint32, c Conn) {
	e := binary.NativeEndian
	id, c.Guest, c.Remote = parseDial(b)
	b = b[dialSize:]
	for i, v := range []*uint32{&c.Sent, &c.Received, &c.SendWindow, &c.ReceiveWindow, &c.Timestamp} {
		*v = e.Uint32(b[4*i:])
	}
	c.MSS, c.SendScale, c.ReceiveScale = e.Uint16(b[20:]), b[22], b[23]
	c.Scaled, c.Timestamps, c.SACK = b[24]&scaled != 0, b[24]&timestamps != 0, b[24]&sack != 0
	return id, c
}

// serveAdopt answers a request to adopt a connection.
func (in *inside) serveAdopt(b []byte) {
	id, c := parseConn(b)
	fd, err := -1, error(unix.EPIPE)
	if !hungUp(in.fd) { // else nobody would have the connection
		fd, err = in.adopt(id, &c)
	}
	var fds []int
	var errno unix.Errno
	if err != nil {
		errno = unix.EIO
		errors.As(err, &errno)
	} else {
		fds = []int{fd}
	}
	err = sendTo(in.fd, appendAnswer(nil, id, errno), fds)
	rights.Close(fds)
	if err != nil {
		in.hangUp()
	}
}

func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	n, _ := unix.Poll(p, 0)
	return n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
}

// adopt makes a socket the other end of a connection, by the kernel's means to
// restore connections (TCP_REPAIR of tcp(7)), and leads what the guest sends for
// it there.
func (in *inside) adopt(id uint32, c *Conn) (fd int, err error) {
	if len(in.adopted) >= MaxAdopted || in.adopted[id] != nil {
		return -1, unix.EUSERS
	}
	if err := established(c); err != nil {
		return -1, err
	}
	if fd, err = in.socket(c.Guest.Addr().Is6()); err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd) // without a word to the guest, while it is being repaired
		}
	}()
	if err := repair(fd, c); err != nil {
		return -1, fmt.Errorf("restore connection: %w", err)
	}
	rule := netlink.NewRule()
	rule.Family, rule.Table, rule.Priority, rule.IPProto = family(c), table, priority, unix.IPPROTO_TCP
	rule.Src, rule.Sport = host(c.Guest.Addr()), netlink.NewRulePortRange(c.Guest.Port(), c.Guest.Port())
	rule.Dst, rule.Dport = host(c.Remote.Addr()), netlink.NewRulePortRange(c.Remote.Port(), c.Remote.Port())
	if err := in.handle.RuleAdd(rule); err != nil {
		return -1, fmt.Errorf("add rule for a connection: %w", err)
	}
	// From here on the guest hears of it: where both stand, with an
	// acknowledgement that it answers.
	if err = unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 0); err == nil {
		err = answered(fd)
	}
	if err != nil {
		_ = in.handle.RuleDel(rule)
		// What was on its way when there was a rule has arrived by now.
		if time.Sleep(answerTime); answered(fd) == nil {
			err = in.handle.RuleAdd(rule)
		}
	}
	if err != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 1)
		return -1, fmt.Errorf("restore connection: %w", err)
	}
	// That has been taken back, and would keep servers from the port.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if in.adopted == nil {
		in.adopted = make(map[uint32]*netlink.Rule)
	}
	in.adopted[id] = rule
	return fd, nil
}

// release takes the rule of a connection back.
func (in *inside) release(id uint32) {
	if rule := in.adopted[id]; rule != nil {
		_ = in.handle.RuleDel(rule)
		delete(in.adopted, id)
	}
}

// answerTime is how long the two ends of a connection may need to hear of each
// other in their namespace: no wire is between them.
const answerTime = 50 * time.Millisecond

// answered waits until the guest has answered a socket. Where the namespace has
// rules of its own that keep the two apart it never does, and nothing has happened
// yet.
func answered(fd int) error {
	for end := time.Now().Add(answerTime); ; time.Sleep(answerTime / 50) {
		info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
		if err != nil {
			return err
		}
		if info.Segs_in > 0 {
			return nil
		}
		if time.Now().After(end) {
			return unix.EHOSTUNREACH
		}
	}
}

// established makes sure that a program in this namespace has the connection. That
// of a container behind it, whose address is translated, would not be led by a
// rule for the address that the link sees.
func established(c *Conn) error {
	fd, err := diagSocket()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	q := connection{family: uint8(family(c))}
	binary.BigEndian.PutUint16(q.id[0:], c.Guest.Port())
	binary.BigEndian.PutUint16(q.id[2:], c.Remote.Port())
	copy(q.id[4:], c.Guest.Addr().AsSlice())
	copy(q.id[20:], c.Remote.Addr().AsSlice())
	for i := 40; i < diagIDSize; i++ {
		q.id[i] = 0xff // INET_DIAG_NOCOOKIE
	}
	if err := diagRequest(fd, unix.SOCK_DIAG_BY_FAMILY, 0, &q); err != nil {
		return err
	}
	var buf [1024]byte
	n, _, err := unix.Recvfrom(fd, buf[:], 0)
	if err != nil {
		return err
	}
	_, err = eachMessage(buf[:n], func(body []byte) error {
		if len(body) < diagMessageSize {
			return errBadDump
		}
		switch {
		case body[1] != stateEstablished:
			return unix.ENOTCONN
		case binary.NativeEndian.Uint32(body[diagDevice:]) != 0:
			return unix.EXDEV // bound to an interface, no other will do
		}
		return nil
	})
	return err
}

// repair makes a fresh socket one end of a connection. It stays in the mode in
// which it sends nothing.
func repair(fd int, c *Conn) error {
	e := binary.NativeEndian
	words := func(v ...uint32) string {
		var b []byte
		for _, w := range v {
			b = e.AppendUint32(b, w)
		}
		return string(b)
	}
	// Whatever ends the process that gets it, the guest shall not take what is
	// cut off for the end.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return err
	}
	for _, o := range []struct{ name, value int }{
		{unix.TCP_REPAIR, 1},
		{unix.TCP_REPAIR_QUEUE, sendQueue}, {unix.TCP_QUEUE_SEQ, int(int32(c.Sent))},
		{unix.TCP_REPAIR_QUEUE, receiveQueue}, {unix.TCP_QUEUE_SEQ, int(int32(c.Received))},
		{unix.TCP_REPAIR_QUEUE, noQueue},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, o.name, o.value); err != nil {
			return err
		}
	}
	if err := unix.Bind(fd, sockaddr(c.Remote)); err != nil {
		return err
	}
	if err := unix.Connect(fd, sockaddr(c.Guest)); err != nil {
		return err
	}
	options := []uint32{optionMSS, uint32(c.MSS)}
	if c.Scaled {
		options = append(options, optionScale, uint32(c.SendScale)|uint32(c.ReceiveScale)<<16)
	}
	if c.SACK {
		options = append(options, optionSACK, 0)
	}
	if c.Timestamps {
		options = append(options, optionTimestamp, 0)
	}
	if err := unix.SetsockoptString(fd, unix.SOL_TCP, unix.TCP_REPAIR_OPTIONS, words(options...)); err != nil {
		return err
	}
	if c.Timestamps {
		// The lowest bit would ask newer kernels for microseconds.
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_TIMESTAMP, int(int32((c.Timestamp+2)&^1))); err != nil {
			return err
		}
	}
	// struct tcp_repair_window
	return unix.SetsockoptString(fd, unix.SOL_TCP, unix.TCP_REPAIR_WINDOW,
		words(c.Received-1, c.SendWindow, c.SendWindow, c.ReceiveWindow, c.Received))
}

// Of include/uapi/linux/tcp.h and include/net/tcp.h.
const (
	noQueue, receiveQueue, sendQueue = 0, 1, 2

	optionMSS, optionScale, optionSACK, optionTimestamp = 2, 3, 4, 8

	stateEstablished = 1
	diagDevice       = 40 // where the interface is in struct inet_diag_msg
)

func family(c *Conn) int {
	if c.Guest.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// host is the network that has but this address.
func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}
