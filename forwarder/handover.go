package forwarder

import (
	"bytes"
	"math"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// A connection that carries much is handed over: the guest's own kernel makes a
// socket in its namespace the far end, where netstack has been it, and from then
// on it is a spliceFlow. That needs one moment at which all that both sides have
// sent is acknowledged. While one is awaited nothing new is sent to the guest; when
// it is there the link loses what the guest sends, until the guest's kernel has the
// far end, which hears of it again. What cannot be handed over goes on as it was.

// A Conn is an established connection of the guest's, as its far end has it. All
// that either side has sent is acknowledged.
type Conn struct {
	Guest, Remote netip.AddrPort // the two ends, as the guest knows them
	// Sent and Received are the sequence numbers that are next: of what the far
	// end sends, and of what the guest does.
	Sent, Received uint32
	// SendWindow is what the guest has room for, ReceiveWindow what it was told
	// that the far end has, in bytes.
	SendWindow, ReceiveWindow uint32
	// What the handshake has agreed on: Scaled says that the scales of the two
	// windows count, Timestamps and SACK that there are these options. MSS is
	// what the guest takes in one segment, in bytes.
	Scaled, Timestamps, SACK bool
	SendScale, ReceiveScale  uint8
	MSS                      uint16
	Timestamp                uint32 // the last that the far end has sent
}

const (
	// handBytes is what a flow has moved when it is worth it. Each failure doubles
	// it. Requests and answers below handTurn do not count: two sockets more,
	// one of them in the guest's time, cost them as much as netstack does.
	handBytes = 4 << 20
	handTurn  = 8 << 10
	maxFailed = 8
	// noHandTime is how long none is handed over after the two ends have not
	// heard of each other.
	noHandTime = time.Minute
	never      = math.MaxUint8
	// maxHanded bounds the flows that are handed over, for each is a rule of the
	// guest's routing.
	maxHanded = 128
	// handTime is how long the moment is awaited: a guest that keeps up takes what
	// there is in less than one, another has something to do meanwhile.
	handTime = 100 * time.Millisecond
	// handAnswerTime is how long the guest's end may take: some system calls.
	handAnswerTime = 3 * time.Second
	// cutTime is how long the link loses what it still has of a flow that is gone.
	cutTime = time.Second
)

// hand is what has been done to hand a flow over.
type hand struct {
	state  handState
	failed uint8  // times
	up     bool   // which way the last turn moved something
	bytes  int    // that count
	id     uint32 // of the question
	in     *interior
	until  time.Time
}

type handState uint8

const (
	handNot   handState = iota
	handWaits           // for the moment
	handAsked           // the guest's end is being made
)

// offer is what a SYN offers.
type offer struct {
	mss              uint16
	scale            int8 // -1: none
	timestamps, sack bool
}

func (o *offer) set(syn *stack.PacketBuffer) {
	h := header.TCP(syn.TransportHeader().Slice())
	if int(h.DataOffset()) < header.TCPMinimumSize || int(h.DataOffset()) > len(h) {
		return // netstack makes no connection of it
	}
	s := header.ParseSynOptions(h.Options(), false)
	*o = offer{s.MSS, int8(s.WS), s.TS, s.SACKPermitted}
}

// cutFlow is a flow of which the link may still have something.
type cutFlow struct {
	*tcpFlow
	since time.Time
}

// consider begins to hand a flow over that is worth it, after a turn that has moved
// so many bytes up and down.
func (t *tcpTable) consider(fl *tcpFlow, up, down int) {
	h := &fl.hand
	if n := up + down; n >= handTurn || h.up == (up > 0) && (up == 0 || down == 0) {
		h.bytes += n
	}
	h.up = up > 0
	if h.state != handNot || h.failed > maxFailed || h.bytes < handBytes<<h.failed {
		return
	}
	in := &t.f.inbound
	if t.f.cfg.NoHandover || fl.inbound || !fl.upOpen || !fl.downOpen || fl.hostHup || fl.urgent || t.f.cfg.Link.Recorded() ||
		in.adopted+len(t.handing) >= maxHanded {
		return
	}
	h.in = in.insides[fl.guest.Addr()]
	if h.in != nil && t.f.now.Before(h.in.noHand) {
		return
	}
	if h.in == nil {
		in.want(fl.guest.Addr())
		return
	}
	fl.leaveFast()
	h.state, h.until = handWaits, t.f.now.Add(handTime)
	t.handing = append(t.handing, fl)
	t.f.sweepIn(handTime)
}

// maxWanted bounds the guests whose insides were asked for.
const maxWanted = 4096

// want asks for the way into a guest.
func (t *inboundTable) want(guest netip.Addr) {
	if t.f.cfg.WantInside == nil || t.wanted[guest] || len(t.wanted) >= maxWanted {
		return
	}
	t.wanted[guest] = true
	t.f.cfg.WantInside(guest)
}

// handOver asks for the guest's end of flows whose moment has come.
func (t *tcpTable) handOver() {
	for _, fl := range slices.Clone(t.handing) {
		h := &fl.hand
		if h.state == handAsked {
			continue
		}
		tr := t.tracks.of(fl)
		switch {
		case tr.settled() && fl.whole():
			t.ask(fl, &tr)
		case t.f.now.After(h.until) || fl.hostHup || !fl.upOpen || !fl.downOpen:
			t.keep(fl)
		}
	}
}

// whole reports whether a flow is open in both directions, and netstack holds
// nothing that is for the guest.
func (fl *tcpFlow) whole() bool {
	return fl.upOpen && fl.downOpen && !fl.hostHup && !fl.urgent && fl.drained() &&
		tcp.EndpointState(fl.ep.State()) == tcp.StateEstablished
}

// ask asks for the guest's end.
func (t *tcpTable) ask(fl *tcpFlow, tr *track) {
	h := &fl.hand
	c := Conn{
		Guest: fl.guest, Remote: fl.remote, Sent: tr.own.end, Received: tr.guest.end,
		SendWindow: uint32(tr.guest.window), ReceiveWindow: uint32(tr.own.window),
		Timestamps: fl.offer.timestamps, SACK: fl.offer.sack, MSS: fl.offer.mss, Timestamp: tr.own.stamp,
	}
	if fl.offer.scale >= 0 {
		// Netstack derives its scale from the buffer's size.
		size := fl.ep.SocketOptions().GetReceiveBufferSize()
		c.Scaled, c.SendScale, c.ReceiveScale = true, uint8(fl.offer.scale), uint8(tcp.FindWndScale(seqnum.Size(size)))
		c.SendWindow <<= c.SendScale
		c.ReceiveWindow <<= c.ReceiveScale
	}
	in := &t.f.inbound
	in.lastDial++
	if err := h.in.Adopt(in.lastDial, &c); err != nil {
		t.keep(fl)
		return
	}
	t.tracks.cut(fl, true)
	h.state, h.id, h.until = handAsked, in.lastDial, t.f.now.Add(handAnswerTime)
	t.asked[h.id] = fl
}

// keep gives up handing a flow over. If the guest's end is being made already it
// is not taken.
func (t *tcpTable) keep(fl *tcpFlow) {
	h := &fl.hand
	if h.state == handNot {
		return
	}
	if h.state == handAsked {
		t.asked[h.id] = nil
		if h.in.gone {
			delete(t.asked, h.id) // nobody will answer
		}
		fl.guestReadable = true
	}
	t.tracks.cut(fl, false)
	t.handing = slices.DeleteFunc(t.handing, func(o *tcpFlow) bool { return o == fl })
	h.state, h.bytes = handNot, 0
	h.failed++
	t.f.makeReady(fl)
}

// adopted takes the guest's end of a flow, or the news that there is none. It
// reports false if that was asked for something else.
func (t *tcpTable) adopted(in *interior, id uint32, fd int, errno unix.Errno) bool {
	fl, ok := t.asked[id]
	if !ok {
		return false
	}
	delete(t.asked, id)
	switch {
	case fl != nil && fd >= 0:
		t.replace(fl, fd)
	case fd >= 0:
		unix.Close(fd)
		in.check(in.Release(id))
	case fl != nil:
		t.f.log.Debug("a connection stays where it is", "guest port", fl.guest.Port(), "err", errno)
		t.keep(fl)
		switch errno {
		case unix.ENOENT, unix.EXDEV:
			fl.hand.failed = never // of a container behind the guest, or bound to the interface
		case unix.EHOSTUNREACH:
			in.noHand = t.f.now.Add(noHandTime) // by the guest's packet filter
		}
	}
	return true
}

// replace puts a spliceFlow in the place of a flow.
func (t *tcpTable) replace(fl *tcpFlow, fd int) {
	in := &t.f.inbound
	s := &spliceFlow{
		t: in, by: fl.hand.in, number: fl.hand.id, usage: fl.usage,
		client: t.f.dialled(TCP, fl.remote), from: fl.remote, to: fl.guest,
	}
	s.guest = spliceEnd{fl: s, source: source{fd: fd}, slot: -1, readable: true, writable: true}
	var err error
	if s.guest.slot, err = t.f.poll.add(fd, spliceEvents, &s.guest); err != nil {
		t.f.log.Warn("a connection is lost", "err", err)
		unix.Close(fd)
		s.by.check(s.by.Release(s.number))
		fl.hand.state = handWaits // nobody is asked any more
		fl.kill()
		return
	}
	s.host.spliceEnd = spliceEnd{fl: s, source: fl.source, slot: fl.slot, readable: true, writable: fl.hostWritable, mixed: fl.hostHup || fl.urgent}
	t.f.poll.slots[fl.slot].p = &s.host
	s.down = stream{src: &s.host.spliceEnd, dst: &s.guest, open: true, bulk: fl.bulk, carry: fl.carry}
	s.up = stream{src: &s.guest, dst: &s.host.spliceEnd, open: true, carry: fl.rest()}
	in.flows[s] = struct{}{}
	in.adopted++
	t.f.stats.HandedOver.Add(1)

	fl.done = true
	fl.wq.EventUnregister(&fl.entry)
	fl.ep.Abort() // the link loses the reset
	delete(t.flows, fl)
	t.handing = slices.DeleteFunc(t.handing, func(o *tcpFlow) bool { return o == fl })
	t.cut = append(t.cut, cutFlow{fl, t.f.now})
	t.f.sweepIn(cutTime)
	s.makeReady()
}

// rest takes what the guest has sent and the host has not, at most what fits into
// the endpoint's buffer.
func (fl *tcpFlow) rest() []byte {
	var b bytes.Buffer
	for {
		if _, err := fl.ep.Read(&b, tcpip.ReadOptions{}); err != nil {
			return b.Bytes()
		}
	}
}

// abandoned takes in that nobody answers any more for the guest's ends.
func (t *tcpTable) abandoned(in *interior) {
	for _, fl := range slices.Clone(t.handing) {
		if fl.hand.in == in {
			t.keep(fl)
		}
	}
}

// strand ends what was handed over to one who gives up: the way to the guest's ends
// goes with him.
func (t *inboundTable) strand(in *interior) {
	for fl := range t.flows {
		if fl.by == in {
			fl.abort()
		}
	}
}

// sweepHands forgets what is long gone.
func (t *tcpTable) sweepHands() {
	for len(t.cut) > 0 && t.f.now.Sub(t.cut[0].since) >= cutTime {
		t.tracks.remove(t.cut[0].tcpFlow)
		t.cut = slices.Delete(t.cut, 0, 1)
	}
	if len(t.cut) > 0 {
		t.f.sweepIn(cutTime)
	}
	t.handOver()
	for _, fl := range slices.Clone(t.handing) {
		if fl.hand.state == handAsked && t.f.now.After(fl.hand.until) {
			fl.hand.in.check(errInsideSilent)
			break
		}
	}
	if len(t.handing) > 0 {
		t.f.sweepIn(handTime)
	}
}

const (
	// emptyPoll is how often a flow is looked at that the guest has yet to take
	// something of, emptyTime how long that may take.
	emptyPoll = 20 * time.Millisecond
	emptyTime = 10 * time.Minute
)

// end closes a flow in good order after both ends have sent their FIN. The rule that
// leads to the guest's end has to stay as long as the guest has something to
// acknowledge.
func (fl *spliceFlow) end() {
	if fl.by == nil {
		fl.finish()
		return
	}
	unix.SetsockoptLinger(fl.guest.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
	unix.Shutdown(fl.guest.fd, unix.SHUT_WR)
	if unsent(fl.guest.fd) == 0 {
		fl.finish()
		return
	}
	fl.t.emptying[fl] = fl.t.f.now
	fl.t.f.sweepIn(emptyPoll)
}

func (fl *spliceFlow) emptying() bool {
	_, ok := fl.t.emptying[fl]
	return ok
}

// release takes the way to the guest's end back.
func (fl *spliceFlow) release() {
	delete(fl.t.emptying, fl)
	if fl.by == nil {
		return
	}
	fl.t.adopted--
	if !fl.by.gone {
		fl.by.check(fl.by.Release(fl.number))
	}
}

// sweepEmptying ends flows that the guest has taken all of.
func (t *inboundTable) sweepEmptying() {
	for fl, since := range t.emptying {
		switch {
		case fl.guest.failed || unsent(fl.guest.fd) == 0:
			fl.finish()
		case t.f.now.Sub(since) > emptyTime:
			fl.abort()
		}
	}
	if len(t.emptying) > 0 {
		t.f.sweepIn(emptyPoll)
	}
}
