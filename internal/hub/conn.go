package hub

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// A message is JSON, cut into packets on a SOCK_SEQPACKET socket. The first byte
// of a packet says whether more of the message follow; descriptors come beside
// the first packet.
const (
	maxPacket  = 32 << 10
	maxMessage = 16 << 20
	maxFDs     = 8

	last, more = 0, 1

	// sendTime is how long the other end may leave a message in the way.
	sendTime = 5 * time.Second
)

// A Conn carries messages between a hub and another process. Sending is safe
// from many goroutines, receiving from one.
type Conn struct {
	c   *net.UnixConn
	mu  sync.Mutex // held while a message is sent
	buf []byte
	oob []byte
}

func newConn(c *net.UnixConn) *Conn {
	return &Conn{c: c, buf: make([]byte, maxPacket), oob: make([]byte, rights.Space(maxFDs))}
}

// Send sends one message, and copies of fds beside it.
func (c *Conn) Send(message any, fds ...int) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	control := rights.Encode(fds)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.c.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
		return err
	}
	packet := make([]byte, 0, min(len(b)+1, maxPacket))
	for first := true; first || len(b) > 0; first = false {
		n := min(len(b), maxPacket-1)
		packet = append(packet[:0], last)
		if n < len(b) {
			packet[0] = more
		}
		packet = append(packet, b[:n]...)
		if _, _, err := c.c.WriteMsgUnix(packet, control, nil); err != nil {
			c.c.Close() // half a message is none
			return fmt.Errorf("hub: send: %w", err)
		}
		b, control = b[n:], nil
	}
	return nil
}

// Receive receives one message. The descriptors beside it are the caller's. The
// error is io.EOF if the other end has gone.
func (c *Conn) Receive(message any) (fds []int, err error) {
	defer func() {
		if err != nil {
			rights.Close(fds)
			fds = nil
		}
	}()
	var all []byte
	for {
		n, oobN, flags, _, err := c.c.ReadMsgUnix(c.buf, c.oob)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), err == nil && n == 0:
			return fds, io.EOF
		case err != nil:
			return fds, err
		}
		got, err := rights.Decode(c.oob[:oobN])
		fds = append(fds, got...)
		switch {
		case err != nil:
			return fds, err
		case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0, len(fds) > maxFDs:
			return fds, errors.New("hub: receive: the message is cut short")
		case len(all)+n > maxMessage:
			return fds, errors.New("hub: receive: the message is too long")
		}
		all = append(all, c.buf[1:n]...)
		if c.buf[0] == last {
			return fds, json.Unmarshal(all, message)
		}
	}
}

// SetReadDeadline bounds the wait for a message.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.c.SetReadDeadline(t) }

// Close ends the connection.
func (c *Conn) Close() error { return c.c.Close() }

// peer returns the process at the other end, and refuses it if it is another
// user's or in another network namespace: a container that sees our directory is
// no member, whatever it says.
func (c *Conn) peer() (pid int, err error) {
	raw, err := c.c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var (
		cred    *unix.Ucred
		credErr error
	)
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, credErr); err != nil {
		return 0, err
	}
	if cred.Uid != uint32(os.Geteuid()) {
		return 0, fmt.Errorf("process %d is of another user", cred.Pid)
	}
	var own, other unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
		return 0, err
	}
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", cred.Pid), &other); err != nil {
		return 0, fmt.Errorf("cannot tell the network namespace of process %d: %w", cred.Pid, err)
	}
	if own.Ino != other.Ino || own.Dev != other.Dev {
		return 0, fmt.Errorf("process %d is in another network namespace", cred.Pid)
	}
	return int(cred.Pid), nil
}
