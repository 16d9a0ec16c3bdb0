package stack

import (
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A connection that the guest begins costs as much as hundreds of its frames: a
// host socket, and netstack's handshake. One that comes about gives back what it
// has taken from the gate, so that there may be as many as the processor can
// make. Those that come to nothing, refused ones among them, are bounded: what a
// port scanner or a crowd of clients of a dead server needs passes, the rest of a
// flood is dropped for the price of reading it. A guest's kernel repeats a SYN
// after a second.
const (
	// synBurst is how many SYNs pass at once.
	synBurst = 4096
	// synRate is how many more pass in a second.
	synRate = 2048
)

// gate lets SYNs pass.
type gate struct {
	mu     sync.Mutex // guards following
	tokens int
	filled time.Duration // up to when tokens are counted, on netstack's clock
}

// take reports whether a SYN may pass now.
func (g *gate) take(now time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if n := int64(now-g.filled) * synRate / int64(time.Second); n > 0 {
		g.filled = now
		g.tokens = int(min(int64(g.tokens)+n, synBurst))
	}
	if g.tokens == 0 {
		return false
	}
	g.tokens--
	return true
}

// give takes a token back.
func (g *gate) give() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tokens = min(g.tokens+1, synBurst)
}

// isSYN reports whether a TCP header, of which at least the fixed part must be
// there, begins a connection.
func isSYN(l4 []byte) bool {
	const kinds = header.TCPFlagSyn | header.TCPFlagAck | header.TCPFlagRst | header.TCPFlagFin
	return len(l4) >= header.TCPMinimumSize && header.TCP(l4).Flags()&kinds == header.TCPFlagSyn
}

// Established tells that a connection which the guest has begun has come about.
func (s *Stack) Established() { s.gate.give() }
