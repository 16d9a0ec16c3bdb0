package tap

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/vnet"
)

// netstack has no delayed acknowledgement: a request is acknowledged at once,
// and the answer that follows within microseconds acknowledges it again. The
// first of the two costs the guest's kernel as much as the second. So a bare
// ACK waits here, for less than RFC 9293 §3.8.6.3 allows by two orders of
// magnitude, and is dropped when a segment of its flow makes it superfluous.
//
// Held are only ACKs that are new and small news. A duplicate or an ACK with
// SACK blocks tells of a loss, one that moves only the window ends a stall, and
// one for much data keeps the sender of a bulk transfer going: none may wait.

const (
	// AckDelay is how long an ACK is held at most.
	AckDelay = 2 * time.Millisecond
	// maxAckHeld is how much data a held ACK may be about, in bytes.
	maxAckHeld = 8 << 10
	// ackSlots is how many flows may have an ACK held at a time. Two flows
	// that hash to one slot disturb each other, no more.
	ackSlots = 1024
	// maxAckFrame is an Ethernet, an IPv6 and a TCP header with timestamps,
	// the longest frame that is held.
	maxAckFrame = header.EthernetMinimumSize + header.IPv6MinimumSize + header.TCPMinimumSize + 12
)

// ackHolder keeps back bare ACKs.
type ackHolder struct {
	held   atomic.Int32 // slots with a frame
	notify func()       // called when the first is held

	mu    sync.Mutex // guards following
	now   time.Time  // of the last Flush
	slots [ackSlots]ackSlot
	list  [ackSlots]uint16 // slots that hold frames, oldest first
	n     int
}

// ackSlot is what is known of the flow seen last in it.
type ackSlot struct {
	ports uint32
	addr  uint64 // a digest of the addresses
	ack   uint32 // the highest acknowledgement sent or held
	known bool
	size  uint8 // of frame; 0: nothing is held
	since time.Time
	h     vnet.Header
	frame [maxAckFrame]byte
}

// holdPacket decides about a TCP packet that netstack sends, and reports whether it
// keeps it.
func (a *ackHolder) holdPacket(e *Endpoint, pkt *stack.PacketBuffer) bool {
	h := vnet.Header{}
	if e.vnetHdr {
		h = gsoHeader(pkt)
	}
	return a.hold(e, h, pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice(), pkt.Data().Size(), pkt.Size(), func(frame []byte) {
		views, skip := pkt.AsViewList()
		for v := views.Front(); v != nil; v = v.Next() {
			b := v.AsSlice()
			if skip >= len(b) {
				skip -= len(b)
				continue
			}
			frame = frame[copy(frame, b[skip:]):]
			skip = 0
		}
	})
}

// hold decides about the frame of size bytes that has these headers and so much
// payload, and reports whether it keeps it, as written by fill.
func (a *ackHolder) hold(e *Endpoint, h vnet.Header, ip []byte, tcp header.TCP, payload, size int, fill func(frame []byte)) bool {
	if len(tcp) < header.TCPMinimumSize {
		return false
	}
	ports := binary.BigEndian.Uint32(tcp)
	addr := addrDigest(ip)
	ack, flags := tcp.AckNumber(), tcp.Flags()
	i := uint16((ports * 2654435761) >> 22)

	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.slots[i]
	same := s.known && s.ports == ports && s.addr == addr && !flags.Contains(header.TCPFlagSyn)
	if s.size > 0 && !same {
		a.send(e, i) // the slot gets another flow
	}
	advance := ack - s.ack
	bare := flags == header.TCPFlagAck && payload == 0 && len(tcp) <= header.TCPMinimumSize+12
	if bare && same && advance > 0 && advance <= maxAckHeld {
		if s.size == 0 {
			if size > maxAckFrame {
				return false
			}
			a.list[a.n] = i
			a.n++
			s.since = a.now
			if a.held.Add(1) == 1 && a.notify != nil {
				a.notify()
			}
		}
		s.h = h
		fill(s.frame[:size])
		s.size = uint8(size)
		s.ack = ack
		e.stats.AcksHeld.Add(1)
		return true
	}
	if s.size > 0 {
		if bare && (advance == 0 || int32(advance) < 0) {
			a.send(e, i) // a window update or duplicate: both must arrive
		} else {
			a.drop(i) // this segment says it too
		}
	}
	if !same || int32(advance) > 0 {
		s.ports, s.addr, s.ack, s.known = ports, addr, ack, flags.Contains(header.TCPFlagAck)
	}
	return false
}

// addrDigest folds the addresses of an IP header.
func addrDigest(ip []byte) uint64 {
	if len(ip) >= header.IPv4MinimumSize && ip[0]>>4 == 4 {
		return binary.NativeEndian.Uint64(ip[12:])
	}
	if len(ip) < header.IPv6MinimumSize {
		return 0
	}
	d := uint64(14695981039346656037) // FNV-1a, by words
	for i := 8; i < header.IPv6MinimumSize; i += 8 {
		d = (d ^ binary.NativeEndian.Uint64(ip[i:])) * 1099511628211
	}
	return d
}

// send sends what slot i holds.
func (a *ackHolder) send(e *Endpoint, i uint16) {
	s := &a.slots[i]
	var pre [vnet.Size]byte
	iov := [2]unix.Iovec{{Base: &pre[0], Len: vnet.Size}, {Base: &s.frame[0], Len: uint64(s.size)}}
	v := iov[:]
	if e.vnetHdr {
		s.h.Encode(pre[:])
	} else {
		v = iov[1:]
	}
	e.writev(v, int(s.size))
	e.stats.AcksSent.Add(1)
	a.drop(i)
}

// drop forgets what slot i holds.
func (a *ackHolder) drop(i uint16) {
	a.slots[i].size = 0
	for k := range a.list[:a.n] {
		if a.list[k] == i {
			copy(a.list[k:a.n-1], a.list[k+1:a.n])
			break
		}
	}
	a.n--
	a.held.Add(-1)
}

// NotifyHeld has f called when an acknowledgement is kept back and none was
// before. It must be set before the first frame is sent, and must not block.
func (e *Endpoint) NotifyHeld(f func()) { e.acks.notify = f }

// Held reports whether acknowledgements are kept back, which Flush will send.
func (e *Endpoint) Held() bool { return e.acks.held.Load() > 0 }

// Flush sends the acknowledgements that have been kept back for AckDelay. now is
// also what those to come are kept back from, so it has to be called before
// frames are received.
func (e *Endpoint) Flush(now time.Time) {
	a := &e.acks
	a.mu.Lock()
	defer a.mu.Unlock()
	a.now = now
	for a.n > 0 && now.Sub(a.slots[a.list[0]].since) >= AckDelay {
		a.send(e, a.list[0])
	}
}
