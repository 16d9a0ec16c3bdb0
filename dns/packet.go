package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

// client is where an answer goes: to a sender of datagrams or into a stream.
type client struct {
	id   uint16
	conn net.PacketConn // and addr, or
	fast addrPortConn   // and from, or
	addr net.Addr
	from netip.AddrPort
	tcp  *stream
}

// addrPortConn is what net.UDPConn has beside net.PacketConn: the same without
// allocations.
type addrPortConn interface {
	ReadFromUDPAddrPort(b []byte) (n int, addr netip.AddrPort, err error)
	WriteToUDPAddrPort(b []byte, addr netip.AddrPort) (int, error)
}

// handlerConn is what a conn has that can hand over datagrams where it receives
// them: no goroutine has to wake for a query.
type handlerConn interface {
	// Handle has take called with each, and done after each or after all those
	// that came at once.
	Handle(take func(b []byte, from netip.AddrPort), done func())
}

// send sends msg under the client's id. It keeps nothing of it.
func (c *client) send(msg []byte) {
	switch {
	case c.tcp != nil:
		c.tcp.send(c.id, msg)
	case c.fast != nil:
		binary.BigEndian.PutUint16(msg, c.id)
		c.fast.WriteToUDPAddrPort(msg, c.from)
	default:
		binary.BigEndian.PutUint16(msg, c.id)
		c.conn.WriteTo(msg, c.addr)
	}
}

// servePackets answers the datagrams that conn receives. It returns nil if
// conn was closed because ctx is done.
func (s *Server) servePackets(ctx context.Context, conn net.PacketConn) error {
	c := client{conn: conn}
	c.fast, _ = conn.(addrPortConn)
	if h, ok := conn.(handlerConn); ok && c.fast != nil {
		s.handlePackets(ctx, h, c)
		return nil
	}
	buf := make([]byte, maxMessage)
	w := &scratch{out: make([]byte, 0, maxMessage)}
	var wait backoff
	for {
		var n int
		var err error
		if c.fast != nil {
			n, c.from, err = c.fast.ReadFromUDPAddrPort(buf)
		} else {
			n, c.addr, err = conn.ReadFrom(buf)
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) || !wait.sleep(ctx) {
				return fmt.Errorf("dns: read queries: %w", err)
			}
			continue
		}
		wait.reset()
		if n >= 2 {
			c.id = binary.BigEndian.Uint16(buf)
		}
		s.handle(buf[:n], c, overUDP, w)
	}
}

// handlePackets answers the datagrams that conn hands over until ctx is done.
func (s *Server) handlePackets(ctx context.Context, conn handlerConn, c client) {
	var mu sync.Mutex // guards following
	ended := false
	w := &scratch{out: make([]byte, 0, maxMessage)}
	conn.Handle(func(b []byte, from netip.AddrPort) {
		mu.Lock()
		defer mu.Unlock()
		if ended {
			return
		}
		c.from = from
		if len(b) >= 2 {
			c.id = binary.BigEndian.Uint16(b)
		}
		s.sockets.hold()
		s.handle(b, c, overUDP, w)
	}, s.sockets.release)
	<-ctx.Done()
	mu.Lock()
	defer mu.Unlock()
	ended = true
}

// backoff keeps an error that stays from making a loop spin, and gives up
// after some seconds of it.
type backoff struct {
	delay time.Duration
}

func (b *backoff) reset() { b.delay = 0 }

// sleep waits longer each time. It returns false if there is no point in
// trying again.
func (b *backoff) sleep(ctx context.Context) bool {
	b.delay = max(2*b.delay, 5*time.Millisecond)
	if b.delay > 3*time.Second {
		return false
	}
	t := time.NewTimer(b.delay)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return true
}
