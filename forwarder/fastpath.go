package forwarder

import (
	"encoding/binary"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// A flow that carries small requests and answers is on the fast path. As long as
// segments are those that are expected next (header prediction, V. Jacobson), there is
// nothing to decide about them: what the guest sends goes to the host socket where it
// is received, what the host answers becomes a segment at once. Netstack, for which
// this is most of its work, hears nothing of it. Its endpoint stays as it was, with
// nothing sent that is not acknowledged and nothing received that is not read, and its
// sequence numbers are translated from then on. So it can take over at any time:
// before the first segment that is not expected, before a FIN, or where the guest does
// not acknowledge. What it has to send again then is written to it like anything else.
type fastPath struct {
	on      bool
	watched bool      // in tcpTable.unsure
	awaited bool      // a request was passed on, and its answer has not come
	unacked []byte    // sent, and not acknowledged
	unsent  int       // so many bytes at the end of unacked are about to be sent
	since   time.Time // when the guest last acknowledged something, or unacked began
}

const (
	// maxUnacked bounds what waits to be acknowledged on the fast path, in bytes.
	maxUnacked = 4 * smallAnswer
	// fastPatience is how long an acknowledgement may take: more than what a
	// kernel delays it at most (TCP_DELACK_MAX, 200 ms).
	fastPatience = 300 * time.Millisecond
	// minFastMSS is the least that a guest's segments must hold, in bytes: no kernel
	// offers less (TCP_MIN_MSS).
	minFastMSS = 88
	// spareBuffers bounds the memory that is kept for unacknowledged bytes.
	spareBuffers = 64
)

// predicted is all that the flags of an expected segment may have.
const predicted = header.TCPFlagAck | header.TCPFlagPsh

// enterFast puts a flow on the fast path, if there is nothing that netstack still has
// to do for it.
func (fl *tcpFlow) enterFast() {
	if fl.turns < manyTurns || fl.fast.on || fl.inbound || fl.offer.mss < minFastMSS || !fl.plain() || fl.hand.state != handNot ||
		fl.guestReadable || fl.ev.Load() != 0 || len(fl.carry) > 0 {
		return
	}
	t := &fl.t.tracks
	t.mu.Lock()
	tr := &fl.track
	ok := tr.settled() && !tr.summed && !tr.guest.ended && !tr.own.ended && (tr.own.stamp != 0) == fl.offer.timestamps
	t.mu.Unlock()
	if !ok || !fl.drained() || tcp.EndpointState(fl.ep.State()) != tcp.StateEstablished {
		return
	}
	if n, err := fl.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption); err != nil || n != 0 {
		return
	}
	fl.fast.on = true
}

// plain reports whether a flow is open in both directions, and nothing but bytes is to
// come from the host.
func (fl *tcpFlow) plain() bool { return fl.upOpen && fl.downOpen && !fl.hostHup && !fl.urgent }

// leaveFast gives the flow back to netstack, with what the guest may not have.
func (fl *tcpFlow) leaveFast() {
	p := &fl.fast
	if !p.on {
		return
	}
	p.on = false
	sent := uint32(len(p.unacked) - p.unsent)
	t := &fl.t.tracks
	t.mu.Lock()
	fl.track.down -= sent
	fl.track.own.end -= sent
	t.mu.Unlock()
	if b := p.unacked; len(b) > 0 {
		if n := fl.writeEndpoint(b); n < len(b) && !fl.done { // cannot happen: its buffer was empty
			fl.carry = append(append([]byte(nil), b[n:]...), fl.carry...)
		}
	}
	fl.forgetFast()
}

// forgetFast ends the fast path.
func (fl *tcpFlow) forgetFast() {
	fl.fast.on = false
	fl.awaits(false)
	fl.fast.release(fl.t)
}

// awaits notes whether the answer to a request is awaited.
func (fl *tcpFlow) awaits(yes bool) {
	switch p, b := &fl.fast, &fl.t.burst; {
	case yes && !p.awaited:
		b.awaited++
	case !yes && p.awaited:
		b.awaited--
	}
	fl.fast.awaited = yes
}

// release gives the memory for unacknowledged bytes back.
func (p *fastPath) release(t *tcpTable) {
	if p.unacked != nil && len(t.spare) < spareBuffers {
		t.spare = append(t.spare, p.unacked[:0])
	}
	p.unacked, p.unsent = nil, 0
}

// receiveFast takes in a segment of the guest's with a payload of size bytes, head and
// tail. It reports false if netstack is to have it, which has the flow then.
func (fl *tcpFlow) receiveFast(h header.TCP, head, tail []byte, size int, summed bool) bool {
	p := &fl.fast
	t := &fl.t.tracks
	tr := &fl.track
	ack := h.AckNumber()
	t.mu.Lock()
	acked, sent := int(int32(ack-tr.guest.ack)), len(p.unacked)-p.unsent
	repeated := size == 0 && acked == 0 && h.WindowSize() == tr.guest.window
	ok := !summed && h.Flags()|header.TCPFlagPsh == predicted && h.SequenceNumber() == tr.guest.end &&
		acked >= 0 && acked <= sent && !(repeated && sent > 0) && size == len(head)+len(tail) && size <= handTurn
	var stamp uint32
	if fl.offer.timestamps {
		if ok = ok && stampsFirst(h) && int(h.DataOffset()) == stampedSize; ok {
			stamp = binary.BigEndian.Uint32(h[24:])
			ok = !after(tr.guest.stamp, stamp)
		}
	} else {
		ok = ok && int(h.DataOffset()) == header.TCPMinimumSize
	}
	t.mu.Unlock()
	if !ok || size > 0 && !fl.hostWritable {
		fl.leaveFast()
		return false
	}
	taken := 0
	if size > 0 {
		if taken = fl.sendUp(head, tail); !p.on {
			return false
		}
	}
	t.mu.Lock()
	tr.guest.end += uint32(taken)
	tr.up += uint32(taken)
	if taken < size {
		t.mu.Unlock()
		fl.leaveFast()
		return false // netstack has what the host socket did not take
	}
	tr.guest.ack, tr.guest.window, tr.guest.stamp = ack, h.WindowSize(), stamp
	t.mu.Unlock()
	if acked > 0 {
		p.since = fl.t.f.now
		if p.unacked = append(p.unacked[:0], p.unacked[acked:]...); len(p.unacked) == 0 {
			p.release(fl.t)
		}
	}
	fl.t.f.stats.Predicted.Add(1)
	if size > 0 {
		fl.awaits(true)
		if p.unsent == 0 { // else the answer says it
			fl.writeFast(nil)
		}
		fl.moved(fl.t.f)
		fl.t.consider(fl, size, 0)
	}
	return true
}

// sendUp sends to the host what the guest has sent, and returns how much of it was
// taken. Where the host socket has failed the flow is with netstack afterwards.
func (fl *tcpFlow) sendUp(head, tail []byte) int {
	r := &fl.t.relay
	n := uint64(0)
	for _, b := range [...][]byte{head, tail} {
		if len(b) > 0 {
			r.iov.iov[n] = unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
			n++
		}
	}
	r.msg.Iov, r.msg.Iovlen = &r.iov.iov[0], n
	sent, errno := rawSendmsg(fl.fd, &r.msg)
	switch errno {
	case 0:
		fl.sentUp(sent)
		fl.hostWritable = sent == len(head)+len(tail)
		return sent
	case unix.EAGAIN:
		fl.hostWritable = false
	default:
		fl.leaveFast()
		fl.hostFailed()
	}
	return 0
}

// sendFast sends b to the guest with the next burst, and reports false if the flow has to
// leave the fast path for that.
func (fl *tcpFlow) sendFast(b []byte) bool {
	p := &fl.fast
	if len(b) > smallAnswer || len(p.unacked)+len(b) > maxUnacked {
		return false
	}
	t := &fl.t.tracks
	t.mu.Lock()
	window := int(fl.track.guest.window)
	t.mu.Unlock()
	if fl.offer.scale > 0 {
		window <<= fl.offer.scale
	}
	if len(p.unacked)+len(b) > window {
		return false
	}
	if len(p.unacked) == 0 {
		if n := len(fl.t.spare); n > 0 {
			p.unacked = fl.t.spare[n-1]
			fl.t.spare = fl.t.spare[:n-1]
		}
		p.since = fl.t.f.now
		if !p.watched {
			p.watched = true
			fl.t.unsure.push(fl)
			fl.t.f.sweepIn(fastPatience)
		}
	}
	if p.unsent == 0 {
		fl.t.burst.add(fl)
	}
	p.unacked = append(p.unacked, b...)
	p.unsent += len(b)
	fl.awaits(false)
	return true
}

// A burst is answers that leave together, at the end of a turn at the earliest. A client
// that shares a processor with its server is woken by the first answer that it gets, and
// takes the processor from the server, which has more of them to write: two switches for
// each answer, where there could be two for all. So where there are many flows, answers
// wait for one another as long as they keep coming.
type burst struct {
	flows   []*tcpFlow // with something unsent
	begun   time.Time
	grown   time.Time // when the last one joined
	awaited int       // answers that have not come
}

const (
	// burstTime is how long an answer waits at most.
	burstTime = 200 * time.Microsecond
	// burstGap is how long one waits for the next.
	burstGap = 30 * time.Microsecond
	// burstRest is how many are awaited when the server is about to run out of work.
	// It makes these while the client takes what there is.
	burstRest = 3
	// maxBurst is how many flows' answers leave together at most.
	maxBurst = 64
)

func (b *burst) add(fl *tcpFlow) {
	if len(b.flows) == 0 {
		b.begun = fl.t.f.now
	}
	b.grown = fl.t.f.now
	b.flows = append(b.flows, fl)
}

// waits reports whether there are answers that wait for others.
func (b *burst) waits(f *Forwarder) bool {
	return len(b.flows) > 0 && len(b.flows) < maxBurst && b.awaited > burstRest && f.activity.many() &&
		f.now.Sub(b.begun) < burstTime && f.now.Sub(b.grown) < burstGap
}

// sendBurst sends what is not to wait any longer, and reports whether something waits.
func (t *tcpTable) sendBurst() bool {
	b := &t.burst
	if b.waits(t.f) {
		return true
	}
	for i, fl := range b.flows {
		if n := fl.fast.unsent; n > 0 {
			fl.fast.unsent = 0
			fl.writeFast(fl.fast.unacked[len(fl.fast.unacked)-n:])
		}
		b.flows[i] = nil
	}
	b.flows = b.flows[:0]
	return false
}

// writeFast writes a segment with b to the link. If that fails the link has lost it.
func (fl *tcpFlow) writeFast(b []byte) {
	t := fl.t
	h := header.TCP(t.relay.header[:header.TCPMinimumSize])
	f := header.TCPFields{SrcPort: fl.remote.Port(), DstPort: fl.guest.Port(), Flags: header.TCPFlagAck}
	if len(b) > 0 {
		f.Flags |= header.TCPFlagPsh
	}
	if fl.offer.timestamps {
		h = t.relay.header[:]
		binary.BigEndian.PutUint32(h[20:], stampsAlone)
	}
	f.DataOffset = uint8(len(h))

	t.tracks.mu.Lock()
	tr := &fl.track
	f.SeqNum, f.AckNum, f.WindowSize = tr.own.end, tr.guest.end, tr.own.window
	tr.own.ack = tr.guest.end
	tr.own.end += uint32(len(b))
	tr.down += uint32(len(b))
	if fl.offer.timestamps {
		tr.own.stamp = tr.offset + t.f.milliseconds()
		binary.BigEndian.PutUint32(h[24:], tr.own.stamp)
		binary.BigEndian.PutUint32(h[28:], tr.guest.stamp)
	}
	t.tracks.mu.Unlock()

	h.Encode(&f)
	t.f.stats.Predicted.Add(1)
	_ = t.f.guest.WriteTCP(fl.remote.Addr(), fl.guest.Addr(), h, int(fl.offer.mss)-(len(h)-header.TCPMinimumSize), b)
}

// sweepFast gives flows back to netstack whose guest has not acknowledged what it was
// sent.
func (t *tcpTable) sweepFast() {
	for n := t.unsure.n; n > 0; n-- {
		fl := t.unsure.pop().(*tcpFlow)
		p := &fl.fast
		p.watched = false
		switch {
		case fl.done || len(p.unacked) == 0:
			continue
		case t.f.now.Sub(p.since) >= fastPatience:
			fl.leaveFast()
			continue
		}
		p.watched = true
		t.unsure.push(fl)
	}
	if t.unsure.n > 0 {
		t.f.sweepIn(fastPatience)
	}
}
