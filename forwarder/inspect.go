package forwarder

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Flow is what is known of one connection, UDP socket or ping of the guest.
type Flow struct {
	ID    uint64
	Proto uint8 // TCP, UDP or ICMP
	// Inbound is set where the host's side began it.
	Inbound bool
	// Remote is the far end as the guest knows it, Dialled as the host does.
	// A UDP socket may have many, these are the last. Ports of ICMP are
	// identifiers.
	Guest, Remote, Dialled netip.AddrPort
	// Up and Down count the payload from and to the guest.
	Up, Down uint64
	// Age is since the flow began, Idle since it last carried anything.
	Age, Idle time.Duration
	State     string
}

// States of a flow. Those of UDP and ICMP are always active.
const (
	StateConnecting  = "connecting"   // the host has not been reached yet
	StateAccepting   = "accepting"    // the guest has not completed its handshake yet
	StateEstablished = "established"  // open in both directions
	StateGuestClosed = "guest-closed" // the guest sends no more
	StateHostClosed  = "host-closed"  // the host sends no more
	StateClosing     = "closing"      // what is under way is delivered yet
	StateActive      = "active"
)

// ErrNoFlow is returned for the id of a flow that is no more.
var ErrNoFlow = errors.New("forwarder: there is no such flow")

// A subject is a flow as [Forwarder.Flows] finds it: a pollee that describes
// itself. Both methods are called on the engine.
type subject interface {
	describe(*Flow)
	// kill ends the flow at once, with resets where there are such things.
	kill()
}

// usage is what a flow has carried, and when. Times are since the engine began.
type usage struct {
	up, down   uint64
	born, last time.Duration
	period     uint32 // of [activity]
}

// moved notes that the flow has moved something.
func (u *usage) moved(f *Forwarder) {
	u.last = f.clock()
	f.activity.note(&u.period, f.now)
}

func (f *Forwarder) clock() time.Duration { return f.now.Sub(f.epoch) }

func (u *usage) describe(f *Forwarder, to *Flow) {
	to.Up, to.Down = u.up, u.down
	// A turn's time is taken before what it hears of: never report less than 0.
	to.Age, to.Idle = max(0, f.clock()-u.born), max(0, f.clock()-u.last)
}

// A call is a function on its way to the engine.
type call struct {
	f     func()
	state atomic.Int32
	done  chan struct{} // closed when f has returned, or will not be called
	err   error
}

// States of a call.
const (
	callWaits = iota
	callRuns
	callIsOff
)

// Do has the engine call f between two turns, and returns when that is done: f
// may touch what only the engine may, and keeps traffic waiting meanwhile. An
// error means that f was not called and will not be, because ctx is done or the
// engine has ended.
func (f *Forwarder) Do(ctx context.Context, fn func()) error {
	c := &call{f: fn, done: make(chan struct{})}
	f.queueMu.Lock()
	if f.ended {
		f.queueMu.Unlock()
		return net.ErrClosed
	}
	f.calls = append(f.calls, c)
	f.queueMu.Unlock()
	f.wake.wake()
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		if c.state.CompareAndSwap(callWaits, callIsOff) {
			return ctx.Err()
		}
		<-c.done
		return c.err
	}
}

// takeCalls calls what waits, which is rarely anything.
func (f *Forwarder) takeCalls(calls []*call) {
	for _, c := range calls {
		if c.state.CompareAndSwap(callWaits, callRuns) {
			c.f()
			close(c.done)
		}
	}
}

// endCalls refuses what waits and what is to come.
func (f *Forwarder) endCalls() {
	f.queueMu.Lock()
	calls := f.calls
	f.calls, f.ended = nil, true
	f.queueMu.Unlock()
	for _, c := range calls {
		if c.state.CompareAndSwap(callWaits, callIsOff) {
			c.err = net.ErrClosed
			close(c.done)
		}
	}
}

// flowsPerCall bounds how long traffic waits while flows are listed: some tens
// of microseconds.
const flowsPerCall = 256

// Flows lists all flows. Traffic goes on in between, so the list is of no one
// moment: a flow that begins or ends meanwhile may be in it or not.
func (f *Forwarder) Flows(ctx context.Context) ([]Flow, error) {
	var flows []Flow
	for next, more := 0, true; more; {
		err := f.Do(ctx, func() {
			flows, next = f.flowsFrom(flows, next)
			more = next < len(f.poll.slots)
		})
		if err != nil {
			return nil, err
		}
	}
	return flows, nil
}

// flowsFrom appends the flows at flowsPerCall slots from the given one on, and
// returns the slot to go on at. A flow keeps its slot as long as it lives.
func (f *Forwarder) flowsFrom(flows []Flow, slot int) ([]Flow, int) {
	f.now = time.Now()
	end := min(slot+flowsPerCall, len(f.poll.slots))
	for i := slot; i < end; i++ {
		s := &f.poll.slots[i]
		if subj, ok := s.p.(subject); ok {
			fl := Flow{ID: flowID(int32(i), s.gen)}
			subj.describe(&fl)
			flows = append(flows, fl)
		}
	}
	return flows, end
}

// flowID tells a flow from all others that were at its slot before.
func flowID(slot, gen int32) uint64 { return uint64(uint32(gen))<<32 | uint64(uint32(slot)) }

// FlowID writes the id of a flow as people read it, ParseFlowID reads it.
func FlowID(id uint64) string { return strconv.FormatUint(id, 16) }

// ParseFlowID reads what FlowID has written.
func ParseFlowID(s string) (uint64, bool) {
	id, err := strconv.ParseUint(s, 16, 64)
	return id, err == nil && FlowID(id) == s
}

// KillFlow ends a flow: both ends of a TCP connection get a reset, and a UDP
// socket or a ping of the guest its own anew with the next packet.
func (f *Forwarder) KillFlow(ctx context.Context, id uint64) error {
	found := false
	err := f.Do(ctx, func() {
		slot, gen := uint32(id), int32(uint32(id>>32))
		if uint64(slot) >= uint64(len(f.poll.slots)) || f.poll.slots[slot].gen != gen {
			return
		}
		var subj subject
		if subj, found = f.poll.slots[slot].p.(subject); found {
			subj.kill()
		}
	})
	if err == nil && !found {
		err = ErrNoFlow
	}
	return err
}

// dialled is the address that a packet for remote leaves to.
func (f *Forwarder) dialled(proto uint8, remote netip.AddrPort) netip.AddrPort {
	if s, ok := f.reversed(remote); ok && proto == TCP {
		return s.Addr // none if it has a path
	}
	to, _ := f.policy.Resolve(proto, remote)
	return to
}

func (d *dial) describe(to *Flow) {
	to.Proto, to.State = TCP, StateConnecting
	to.Guest = netip.AddrPortFrom(addrOf(d.id.RemoteAddress), d.id.RemotePort)
	to.Remote = netip.AddrPortFrom(addrOf(d.id.LocalAddress), d.id.LocalPort)
	to.Dialled = d.t.f.dialled(TCP, to.Remote)
	to.Age = max(0, d.t.f.clock()-d.born)
	to.Idle = to.Age
}

func (d *dial) kill() {
	syn := d.syn.IncRef()
	defer syn.DecRef()
	d.forget()
	unix.Close(d.fd)
	d.t.reset(d.id, syn)
}

func (fl *tcpFlow) describe(to *Flow) {
	to.Proto, to.State = TCP, fl.stateName()
	to.Guest, to.Remote = fl.guest, fl.remote
	if to.Inbound = fl.inbound; fl.inbound {
		to.Dialled = fl.client
	} else {
		to.Dialled = fl.t.f.dialled(TCP, to.Remote)
	}
	fl.usage.describe(fl.t.f, to)
}

func (fl *tcpFlow) stateName() string {
	switch {
	case fl.ep == nil || fl.connecting:
		return StateAccepting
	case fl.upOpen && fl.downOpen:
		return StateEstablished
	case fl.upOpen:
		return StateHostClosed
	case fl.downOpen && !fl.hostReset:
		return StateGuestClosed
	}
	return StateClosing
}

func (fl *tcpFlow) kill() {
	fl.t.keep(fl)
	fl.leaveFast()
	if fl.ep != nil {
		fl.ep.Abort()
	}
	fl.resetHost()
}

func (fl *udpFlow) describe(to *Flow) {
	to.Proto, to.State = UDP, StateActive
	to.Guest, to.Remote, to.Dialled = fl.guest, fl.dst, fl.real
	fl.usage.describe(fl.t.f, to)
	to.Idle = max(0, fl.t.f.now.Sub(fl.used))
}

func (fl *udpFlow) kill() {
	fl.t.out.flush() // the batch may hold datagrams of it
	fl.end()
}

func (fl *echoFlow) describe(to *Flow) {
	to.Proto, to.State = ICMP, StateActive
	to.Guest = netip.AddrPortFrom(fl.key.guest, fl.key.id)
	to.Remote, to.Dialled = netip.AddrPortFrom(fl.dst, 0), netip.AddrPortFrom(fl.real, 0)
	fl.usage.describe(fl.t.f, to)
	to.Idle = max(0, fl.t.f.now.Sub(fl.used))
}

func (fl *echoFlow) kill() { fl.end() }

// Netstack are counters of the guest's side of all connections.
type Netstack struct {
	Received, Sent              uint64 // TCP segments
	MalformedReceived           uint64
	ChecksumErrors              uint64 // of TCP
	Retransmits, FastRetransmit uint64 // segments that the guest had to be sent again
	Timeouts                    uint64
	ResetsSent, ResetsReceived  uint64
	Established                 uint64 // connections now
}

// Netstack returns the counters of netstack so far.
func (f *Forwarder) Netstack() Netstack {
	s := f.cfg.Netstack.Stats()
	return Netstack{
		Received: s.TCP.ValidSegmentsReceived.Value(), Sent: s.TCP.SegmentsSent.Value(),
		MalformedReceived: s.IP.MalformedPacketsReceived.Value() + s.TCP.InvalidSegmentsReceived.Value(),
		ChecksumErrors:    s.TCP.ChecksumErrors.Value(),
		Retransmits:       s.TCP.Retransmits.Value(), FastRetransmit: s.TCP.FastRetransmit.Value(),
		Timeouts:   s.TCP.Timeouts.Value(),
		ResetsSent: s.TCP.ResetsSent.Value(), ResetsReceived: s.TCP.ResetsReceived.Value(),
		Established: s.TCP.CurrentEstablished.Value(),
	}
}
