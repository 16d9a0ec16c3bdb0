package stack

import (
	"net/netip"
	"sync"
)

const (
	// maxSegs is UDP_MAX_SEGMENTS of kernels before 6.9.
	maxSegs = 64
	// maxRun bounds a run: a UDP packet, headers included, fits into 65535.
	maxRun = 65000
	// gatherBelow is the largest datagram that is copied to leave with others;
	// for longer ones the copy costs more than a frame.
	gatherBelow = 4 << 10
)

// gather joins datagrams of one size, source and destination, which the guest's
// kernel takes as one frame. A copy of a datagram costs a tenth of a frame of
// its own.
type gather struct {
	mu       sync.Mutex // guards following
	held     bool       // Flush is going to be called soon
	src, dst netip.AddrPort
	buf      []byte
	size     int  // of each datagram but the last
	count    int  // of datagrams
	short    bool // the last one was shorter: no more may follow
}

// fits reports whether b may follow what is gathered.
func (g *gather) fits(src, dst netip.AddrPort, b []byte) bool {
	return g.count > 0 && g.count < maxSegs && !g.short && len(b) <= g.size && len(g.buf)+len(b) <= maxRun &&
		g.src == src && g.dst == dst
}

// Hold has datagrams wait for others that can share a frame with them, until
// Flush. It is for whoever handles many events at once.
func (s *Stack) Hold() {
	s.gather.mu.Lock()
	s.gather.held = true
	s.gather.mu.Unlock()
}

func (s *Stack) holding() bool {
	s.gather.mu.Lock()
	defer s.gather.mu.Unlock()
	return s.gather.held
}

// Flush sends what waits, after the conns' handlers were told that no more
// datagrams come for now.
func (s *Stack) Flush() {
	for _, c := range s.handed {
		c.handed = false
		c.handler.Load().done()
	}
	s.handed = s.handed[:0]
	g := &s.gather
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = false
	s.flushLocked()
}

// flushLocked sends what is gathered.
func (s *Stack) flushLocked() error {
	g := &s.gather
	if g.count == 0 {
		return nil
	}
	gso := 0
	if g.count > 1 {
		gso = g.size
	}
	err := s.writeUDP(g.src, g.dst, gso, g.buf)
	g.buf, g.count, g.short = g.buf[:0], 0, false
	return err
}

// WriteUDP sends the datagram with that payload from src to the guest at dst.
// With gso > 0 the payload is a run of datagrams of that size, of which only the
// last may be shorter. Datagrams beyond the link's MTU are fragmented. Between
// Hold and Flush it may wait for others, and errors are those of earlier ones.
func (s *Stack) WriteUDP(src, dst netip.AddrPort, gso int, payload []byte) error {
	g := &s.gather
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.held || !s.cfg.USO || !s.vnet || gso > 0 || len(payload) == 0 || len(payload) > gatherBelow {
		if err := s.flushLocked(); err != nil {
			return err
		}
		return s.writeUDP(src, dst, gso, payload)
	}
	var err error
	if !g.fits(src, dst, payload) {
		err = s.flushLocked()
		g.src, g.dst, g.size = src, dst, len(payload)
	}
	if g.buf == nil {
		g.buf = make([]byte, 0, maxRun)
	}
	g.short = len(payload) < g.size
	g.buf = append(g.buf, payload...)
	g.count++
	return err
}
