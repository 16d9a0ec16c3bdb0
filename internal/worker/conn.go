// Package worker runs usernet's worker, a child of this binary that faces the
// guest, and speaks with it.
package worker

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// A message goes over a SOCK_SEQPACKET socket in packets of a header and up to
// packetSize bytes; its descriptors are beside the first one. The header is the
// kind of the message, whether more packets of it follow, and its number. The
// message is one byte that says how long the name of the operation is, that name
// and a body in JSON; a reply has a byte that says whether its body is an error.
const (
	headerSize = 8
	packetSize = 32 << 10
	maxFDs     = 4

	// maxRequests bounds what is worked on at a time for the other side.
	maxRequests = 64
	// writeTimeout is how long the other side may take to read. A worker that
	// was stopped answers when it goes on.
	writeTimeout = 5 * time.Second
)

// Bounds of a message. What comes from a worker may be a list of all flows.
const (
	MaxToWorker   = 4 << 20
	MaxFromWorker = 32 << 20
)

const (
	kindRequest = iota + 1
	kindReply
	kindNote // a request without a reply
)

// An Error is one that happened on the other side.
type Error struct {
	Code  string        `json:"code,omitempty"` // for errors that have a name
	Errno syscall.Errno `json:"errno,omitempty"`
	Text  string        `json:"text"`
}

func (e *Error) Error() string { return e.Text }

func (e *Error) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// ErrEnded is the error of a call that the other side's end has cut off, ErrSilent
// that of one which it does not answer.
var (
	ErrEnded  = errors.New("worker: the other process has ended")
	ErrSilent = errors.New("worker: the other process does not answer")
)

// A Request is what the other side asks.
type Request struct {
	Op   string
	body []byte
	fds  []int
}

// Decode reads the body.
func (r *Request) Decode(to any) error {
	if err := json.Unmarshal(r.body, to); err != nil {
		return fmt.Errorf("worker: read %s: %w", r.Op, err)
	}
	return nil
}

// TakeFD returns the next descriptor, which is the caller's, or -1.
func (r *Request) TakeFD() int {
	if len(r.fds) == 0 {
		return -1
	}
	fd := r.fds[0]
	r.fds = r.fds[1:]
	return fd
}

// A Handler does what is asked. The descriptors that it returns are closed when
// they are passed on. It may be called by several goroutines, but for notes, which
// come one by one and in order.
type Handler func(r *Request) (body any, fds []int, err error)

// A Conn is one end of the socket between the two processes.
type Conn struct {
	conn    *net.UnixConn
	longest int
	timeout time.Duration // for writing; 0 is none
	slots   chan struct{} // of requests being worked on

	writeMu sync.Mutex // held for all packets of a message
	out     []byte

	mu    sync.Mutex // guards following
	calls map[uint32]chan answer
	last  uint32
	ended bool
}

type answer struct {
	failed bool
	body   []byte
	fds    []int
}

// newConn takes over a socket. Longer messages than longest are not taken.
func newConn(c *net.UnixConn, longest int, timeout time.Duration) *Conn {
	return &Conn{conn: c, longest: longest, timeout: timeout, slots: make(chan struct{}, maxRequests), calls: make(map[uint32]chan answer)}
}

// Close ends the connection, and with it Serve.
func (c *Conn) Close() { c.conn.Close() }

// Call asks the other side, passing it copies of fds, and reads the answer into
// out, if that is not nil. The descriptors of the answer are the caller's.
func (c *Conn) Call(ctx context.Context, op string, in, out any, fds ...int) ([]int, error) {
	got := make(chan answer, 1)
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return nil, ErrEnded
	}
	c.last++
	id := c.last
	c.calls[id] = got
	c.mu.Unlock()
	forget := func() {
		c.mu.Lock()
		delete(c.calls, id)
		c.mu.Unlock()
		select {
		case a := <-got:
			rights.Close(a.fds)
		default:
		}
	}
	if err := c.send(kindRequest, id, append([]byte{byte(len(op))}, op...), in, fds); err != nil {
		forget()
		return nil, err
	}
	select {
	case a, ok := <-got:
		return c.take(op, a, ok, out)
	case <-ctx.Done():
		forget()
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, fmt.Errorf("%w: %w", ErrSilent, ctx.Err())
		}
		return nil, ctx.Err()
	}
}

func (c *Conn) take(op string, a answer, ok bool, out any) ([]int, error) {
	if !ok {
		return nil, ErrEnded
	}
	if a.failed {
		rights.Close(a.fds)
		e := new(Error)
		if err := json.Unmarshal(a.body, e); err != nil {
			return nil, fmt.Errorf("worker: read answer to %s: %w", op, err)
		}
		return nil, e
	}
	if out != nil {
		if err := json.Unmarshal(a.body, out); err != nil {
			rights.Close(a.fds)
			return nil, fmt.Errorf("worker: read answer to %s: %w", op, err)
		}
	}
	return a.fds, nil
}

// Note tells the other side something.
func (c *Conn) Note(op string, in any) error {
	return c.send(kindNote, 0, append([]byte{byte(len(op))}, op...), in, nil)
}

// send writes one message.
func (c *Conn) send(kind byte, id uint32, prefix []byte, body any, fds []int) error {
	b, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("worker: write message: %w", err)
	}
	b = append(prefix, b...)
	control := rights.Encode(fds)
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.timeout > 0 {
		if err := c.conn.SetWriteDeadline(time.Now().Add(c.timeout)); err != nil {
			return ErrEnded
		}
	}
	for first := true; first || len(b) > 0; first = false {
		n := min(len(b), packetSize)
		more := byte(0)
		if n < len(b) {
			more = 1
		}
		c.out = append(c.out[:0], kind, more, 0, 0)
		c.out = binary.NativeEndian.AppendUint32(c.out, id)
		c.out = append(c.out, b[:n]...)
		b = b[n:]
		if _, _, err := c.conn.WriteMsgUnix(c.out, control, nil); err != nil {
			if !first {
				c.conn.Close() // the rest would be taken for something else
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return ErrSilent
			}
			return ErrEnded
		}
		control = nil
	}
	if cap(c.out) > 4096 {
		c.out = nil // long messages are rare
	}
	return nil
}

// Serve reads what the other side says and has h do what it asks, until the
// connection ends; it returns nil if that was the other side's doing.
func (c *Conn) Serve(h Handler) error {
	err := c.serve(h)
	c.conn.Close()
	c.mu.Lock()
	c.ended = true
	for id, got := range c.calls {
		close(got)
		delete(c.calls, id)
	}
	c.mu.Unlock()
	return err
}

func (c *Conn) serve(h Handler) error {
	buf := make([]byte, headerSize+packetSize)
	control := make([]byte, unix.CmsgSpace(4*maxFDs))
	var (
		m    message
		open bool // m is to be continued
	)
	for {
		n, controlN, flags, _, err := c.conn.ReadMsgUnix(buf, control)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, net.ErrClosed):
			rights.Close(m.fds)
			return nil
		case err != nil:
			rights.Close(m.fds)
			return fmt.Errorf("worker: receive: %w", err)
		}
		fds, err := rights.Decode(control[:controlN])
		if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			err = errors.New("a packet is too long")
		}
		if err == nil {
			err = m.add(buf[:n], fds, open, c.longest)
		}
		if err != nil {
			rights.Close(fds)
			if open {
				rights.Close(m.fds)
			}
			return fmt.Errorf("worker: receive: %w", err)
		}
		if open = m.more; open {
			continue
		}
		if err := c.dispatch(&m, h); err != nil {
			return fmt.Errorf("worker: receive: %w", err)
		}
		m = message{}
	}
}

// message is one that is being received.
type message struct {
	kind byte
	more bool
	id   uint32
	body []byte
	fds  []int
}

// add takes in a packet.
func (m *message) add(b []byte, fds []int, open bool, longest int) error {
	if len(b) < headerSize || b[1] > 1 {
		return errors.New("a packet has no header")
	}
	kind, more, id := b[0], b[1] == 1, binary.NativeEndian.Uint32(b[4:])
	b = b[headerSize:]
	switch {
	case open && (kind != m.kind || id != m.id || len(fds) > 0):
		return errors.New("a packet is of another message")
	case len(m.body)+len(b) > longest:
		return fmt.Errorf("a message has more than %d bytes", longest)
	case more && len(b) == 0:
		return errors.New("a packet is empty")
	}
	if !open {
		m.kind, m.id, m.fds = kind, id, fds
	}
	m.more = more
	m.body = append(m.body, b...)
	return nil
}

func (c *Conn) dispatch(m *message, h Handler) error {
	if len(m.body) == 0 {
		rights.Close(m.fds)
		return errors.New("a message is empty")
	}
	n, rest := int(m.body[0]), m.body[1:]
	if m.kind == kindReply {
		c.mu.Lock()
		got, ok := c.calls[m.id]
		delete(c.calls, m.id)
		c.mu.Unlock()
		if !ok {
			rights.Close(m.fds) // nobody waits any more
			return nil
		}
		got <- answer{n != 0, rest, m.fds}
		return nil
	}
	if n > len(rest) || m.kind != kindRequest && m.kind != kindNote {
		rights.Close(m.fds)
		return errors.New("a message makes no sense")
	}
	r := &Request{Op: string(rest[:n]), body: rest[n:], fds: m.fds}
	if m.kind == kindNote {
		_, fds, _ := h(r)
		rights.Close(fds)
		rights.Close(r.fds)
		return nil
	}
	id := m.id
	c.slots <- struct{}{}
	go func() {
		defer func() { <-c.slots }()
		body, fds, err := h(r)
		rights.Close(r.fds)
		failed := byte(0)
		if err != nil {
			rights.Close(fds)
			failed, fds, body = 1, nil, errorOf(err)
		}
		_ = c.send(kindReply, id, []byte{failed}, body, fds) // else there is nobody to tell
		rights.Close(fds)
	}()
	return nil
}

// errorOf makes an error fit to be sent.
func errorOf(err error) *Error {
	e := &Error{Text: err.Error()}
	var own *Error
	if errors.As(err, &own) {
		e.Code = own.Code
	}
	errors.As(err, &e.Errno)
	return e
}
