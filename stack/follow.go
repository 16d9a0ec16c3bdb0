package stack

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A Standing is how far a TCP connection is, as its last segments on the link say.
type Standing struct {
	// Known is set when both sides have been heard of, Settled when all that was
	// sent is acknowledged, both ways.
	Known, Settled bool
	// Sent and Received are the sequence numbers that are next: of what
	// netstack sends, and of what the guest does.
	Sent, Received uint32
	// GuestWindow and Window are what the guest and netstack have announced, as
	// it is in the header.
	GuestWindow, Window uint16
	Timestamp           uint32 // netstack's last, 0 where there are none
}

// segment is what the last segment of a direction has said, with end for the
// highest sequence number.
type segment struct {
	end, ack  uint32
	window    uint16
	timestamp uint32
	seen      bool
}

func (s *segment) note(h header.TCP, payload int) {
	end := h.SequenceNumber() + uint32(payload)
	if s.seen && int32(end-s.end) < 0 {
		return // repeated
	}
	s.end, s.ack, s.window, s.seen = end, h.AckNumber(), h.WindowSize(), true
	if o := header.ParseTCPOptions(h.Options()); o.TS {
		s.timestamp = o.TSVal
	}
}

// follower watches the segments of some connections.
type follower struct {
	n atomic.Int32 // connections

	mu    sync.Mutex // guards following
	conns map[connection]*followed
}

// connection is a connection's two ends.
type connection struct{ guest, remote netip.AddrPort }

type followed struct {
	guest, own segment
	cut        bool
}

// Follow notes from now on how far the connection of the guest is that has these
// two ends.
func (s *Stack) Follow(guest, remote netip.AddrPort) {
	f := &s.follow
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conns == nil {
		f.conns = make(map[connection]*followed)
	}
	f.conns[connection{guest, remote}] = &followed{}
	f.n.Store(int32(len(f.conns)))
}

// Standing returns how far a connection is that is followed.
func (s *Stack) Standing(guest, remote netip.AddrPort) (st Standing) {
	f := &s.follow
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.conns[connection{guest, remote}]
	if c == nil {
		return st
	}
	return Standing{
		Known:   c.guest.seen && c.own.seen,
		Settled: c.guest.seen && c.own.seen && c.guest.ack == c.own.end && c.own.ack == c.guest.end,
		Sent:    c.own.end, Received: c.guest.end,
		GuestWindow: c.guest.window, Window: c.own.window, Timestamp: c.own.timestamp,
	}
}

// Cut lets no segment of a followed connection pass any more, in either direction:
// as if the link had lost it.
func (s *Stack) Cut(guest, remote netip.AddrPort) {
	f := &s.follow
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.conns[connection{guest, remote}]; c != nil {
		c.cut = true
	}
}

// Unfollow takes Follow back, and Cut.
func (s *Stack) Unfollow(guest, remote netip.AddrPort) {
	f := &s.follow
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, connection{guest, remote})
	f.n.Store(int32(len(f.conns)))
}

// heard takes in a segment of the guest's of size bytes, and reports whether it is
// lost.
func (f *follower) heard(src, dst netip.Addr, l4 []byte, size int) bool {
	h := header.TCP(l4)
	if len(l4) < header.TCPMinimumSize || int(h.DataOffset()) < header.TCPMinimumSize || int(h.DataOffset()) > len(l4) {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.conns[connection{netip.AddrPortFrom(src, h.SourcePort()), netip.AddrPortFrom(dst, h.DestinationPort())}]
	if c == nil {
		return false
	}
	if !c.cut {
		c.guest.note(h, size-int(h.DataOffset()))
	}
	return c.cut
}

// said takes in a segment of netstack's, and reports whether it is lost.
func (f *follower) said(r *stack.Route, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize {
		return false
	}
	return f.sends(connection{
		guest:  netip.AddrPortFrom(addrOf(r.RemoteAddress()), h.DestinationPort()),
		remote: netip.AddrPortFrom(addrOf(r.LocalAddress()), h.SourcePort()),
	}, h, pkt.Data().Size())
}

func (f *follower) sends(id connection, h header.TCP, size int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.conns[id]
	if c == nil {
		return false
	}
	if !c.cut {
		c.own.note(h, size)
	}
	return c.cut
}
