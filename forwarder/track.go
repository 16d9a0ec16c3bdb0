package forwarder

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// A track is how far a connection is, as its segments on the link say. Sequence
// numbers are the guest's. Netstack's are the same until something has gone past it:
// then those of what the guest sends differ by up, those of what it is sent by down,
// and segments are translated on their way.
type track struct {
	guest, own direction
	up, down   uint32
	offset     uint32 // of own timestamps from netstack's clock, in ms
	summed     bool   // the guest's last segment had its checksum filled in
	cut        bool   // nothing passes any more
}

// direction is what the segments that one side has sent say.
type direction struct {
	end, ack uint32 // the sequence numbers that are next, its own and the other side's
	acked    bool   // ack is valid
	window   uint16 // as it is in the header
	stamp    uint32 // the last timestamp, 0 where there are none
	ended    bool   // there was a FIN or a reset
}

// note takes in a segment with so many bytes of payload, and reports whether none after
// it was seen before.
func (d *direction) note(h header.TCP, payload int) bool {
	flags := h.Flags()
	end := h.SequenceNumber() + uint32(payload)
	if flags&(header.TCPFlagSyn|header.TCPFlagFin) != 0 {
		end++
	}
	d.ended = d.ended || flags&(header.TCPFlagFin|header.TCPFlagRst) != 0
	if ack := h.AckNumber(); flags.Contains(header.TCPFlagAck) && (!d.acked || after(ack, d.ack)) {
		d.ack, d.acked = ack, true
	}
	if after(d.end, end) {
		return false
	}
	d.end, d.window = end, h.WindowSize()
	if val, _, ok := timestamps(h); ok {
		d.stamp = val
	}
	return true
}

// after reports whether the sequence number a comes after b.
func after(a, b uint32) bool { return int32(a-b) > 0 }

// timestamps returns the option of that name (RFC 7323 §3.2), which every segment has
// or none.
func timestamps(h header.TCP) (val, ecr uint32, ok bool) {
	if stampsFirst(h) {
		return binary.BigEndian.Uint32(h[24:]), binary.BigEndian.Uint32(h[28:]), true
	}
	if int(h.DataOffset()) == header.TCPMinimumSize {
		return 0, 0, false
	}
	o := header.ParseTCPOptions(h.Options())
	return o.TSVal, o.TSEcr, o.TS
}

const (
	// stampedSize is a header's with timestamps alone, in bytes.
	stampedSize = header.TCPMinimumSize + 12
	// stampsAlone is what such options begin with: two NOPs, kind and length.
	stampsAlone = header.TCPOptionNOP<<24 | header.TCPOptionNOP<<16 | header.TCPOptionTS<<8 | header.TCPOptionTSLength
)

// stampsFirst reports whether the options begin as everybody's do who has timestamps.
func stampsFirst(h header.TCP) bool {
	return int(h.DataOffset()) >= stampedSize && len(h) >= stampedSize && binary.BigEndian.Uint32(h[20:]) == stampsAlone
}

// settled reports whether all that was sent is acknowledged, both ways.
func (tr *track) settled() bool {
	return tr.guest.acked && tr.own.acked && tr.guest.ack == tr.own.end && tr.own.ack == tr.guest.end
}

// shifted reports whether netstack's sequence numbers are not the guest's.
func (tr *track) shifted() bool { return tr.up != 0 || tr.down != 0 }

// toNetstack translates a segment of the guest's. Netstack never hears of more than it
// has sent itself.
func (tr *track) toNetstack(h header.TCP, summed bool) {
	if !tr.shifted() {
		return
	}
	old := headerSum(h)
	h.SetSequenceNumber(h.SequenceNumber() - tr.up)
	if h.Flags().Contains(header.TCPFlagAck) {
		ack := h.AckNumber()
		if after(ack, tr.own.end) {
			ack = tr.own.end
		}
		h.SetAckNumber(ack - tr.down)
	}
	shiftSACK(h, -tr.down)
	if summed {
		resum(h, old)
	}
}

// toGuest translates a segment of netstack's. It has not seen the guest's last
// timestamps, which tell the guest how long its segments take.
func (tr *track) toGuest(h header.TCP, summed bool) {
	if !tr.shifted() {
		return
	}
	old := headerSum(h)
	h.SetSequenceNumber(h.SequenceNumber() + tr.down)
	if h.Flags().Contains(header.TCPFlagAck) {
		h.SetAckNumber(h.AckNumber() + tr.up)
	}
	shiftSACK(h, tr.up)
	if stampsFirst(h) && after(tr.guest.stamp, binary.BigEndian.Uint32(h[28:])) {
		binary.BigEndian.PutUint32(h[28:], tr.guest.stamp)
	}
	if summed {
		resum(h, old)
	}
}

// shiftSACK adds to the sequence numbers of SACK blocks (RFC 2018 §3).
func shiftSACK(h header.TCP, by uint32) {
	for o := h.Options(); len(o) > 0; {
		n := 1
		switch o[0] {
		case header.TCPOptionEOL:
			return
		case header.TCPOptionNOP:
		default:
			if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
				return
			}
			n = int(o[1])
			for edge := 2; o[0] == header.TCPOptionSACK && edge+4 <= n; edge += 4 {
				binary.BigEndian.PutUint32(o[edge:], binary.BigEndian.Uint32(o[edge:])+by)
			}
		}
		o = o[n:]
	}
}

// headerSum is what the header adds to its checksum.
func headerSum(h header.TCP) uint16 { return checksum.Checksum(h[:h.DataOffset()], 0) }

// resum has the checksum follow what was changed since old was the header's sum (RFC
// 1624 §3): it stays as right or wrong as it was.
func resum(h header.TCP, old uint16) {
	h.SetChecksum(^checksum.Combine(checksum.Combine(^h.Checksum(), ^old), headerSum(h)))
}

// connection is a connection's two ends, as the guest knows them.
type connection struct{ guest, remote netip.AddrPort }

// tracks finds the flow of a segment. Netstack's goroutines ask it, too.
type tracks struct {
	mu    sync.Mutex // guards following, and the track of every flow
	flows map[connection]*tcpFlow
}

func (t *tracks) add(fl *tcpFlow, syn header.TCP) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fl.track = track{guest: direction{end: syn.SequenceNumber() + 1}}
	t.flows[fl.connection] = fl
}

func (t *tracks) of(fl *tcpFlow) track {
	t.mu.Lock()
	defer t.mu.Unlock()
	return fl.track
}

// cut lets no segment of the flow pass any more, in either direction: as if the link
// had lost it.
func (t *tracks) cut(fl *tcpFlow, on bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fl.track.cut = on
}

func (t *tracks) remove(fl *tcpFlow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flows[fl.connection] == fl {
		delete(t.flows, fl.connection)
	}
}

// forget removes the track of a flow whose endpoint is gone, if there is one.
func (t *tracks) forget(c connection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.flows, c)
}

// untrack forgets the track of a flow that has ended. Netstack may still have something
// to say to the guest, which has to be translated.
func (t *tcpTable) untrack(fl *tcpFlow) {
	if tr := t.tracks.of(fl); tr.shifted() && !fl.gone() {
		t.ended = append(t.ended, fl)
		t.f.sweepIn(endedPoll)
		return
	}
	t.tracks.remove(fl)
}

// endedPoll is how often it is looked whether netstack has done with what has ended.
const endedPoll = 200 * time.Millisecond

// gone reports whether netstack has done with the flow's endpoint.
func (fl *tcpFlow) gone() bool {
	switch tcp.EndpointState(fl.ep.State()) {
	case tcp.StateClose, tcp.StateError:
		return true
	}
	return false
}

// sweepEnded forgets tracks of flows that netstack has done with.
func (t *tcpTable) sweepEnded() {
	t.ended = slices.DeleteFunc(t.ended, func(fl *tcpFlow) bool {
		if fl.gone() {
			t.tracks.remove(fl)
			return true
		}
		return false
	})
	if len(t.ended) > 0 {
		t.f.sweepIn(endedPoll)
	}
}

// HandleSegment is called with every segment of the guest's, of which l4 is the header
// and the beginning of the payload, tail the rest, and size the length in bytes. That
// l4 and tail are shorter means that the rest of the payload is elsewhere. summed says
// that the checksum is filled in. It reports whether netstack is to see the segment no
// more, and may change the header.
func (f *Forwarder) HandleSegment(guest, remote netip.Addr, l4, tail []byte, size int, summed bool) bool {
	h := header.TCP(l4)
	if len(l4) < header.TCPMinimumSize {
		return false
	}
	off := int(h.DataOffset())
	if off < header.TCPMinimumSize || off > len(l4) || off > size {
		return false // netstack says so
	}
	t := &f.tcp.tracks
	t.mu.Lock()
	defer t.mu.Unlock()
	fl := t.flows[connection{netip.AddrPortFrom(guest, h.SourcePort()), netip.AddrPortFrom(remote, h.DestinationPort())}]
	if fl == nil {
		return false
	}
	tr := &fl.track
	switch {
	case h.Flags().Contains(header.TCPFlagSyn):
		// As long as its endpoint lives netstack only answers it, with what is
		// translated (RFC 5961 §4). Else it belongs to the next connection.
		return false
	case tr.cut:
		return true
	case fl.fast.on:
		t.mu.Unlock()
		done := fl.receiveFast(h, l4[off:], tail, size-off, summed)
		t.mu.Lock()
		if done {
			return true
		}
	}
	tr.guest.note(h, size-off)
	tr.summed = summed
	tr.toNetstack(h, summed)
	return false
}

// HandleSent is called with every segment that netstack sends, with size bytes of
// payload. It reports whether the link is to lose it, and may change the header.
func (f *Forwarder) HandleSent(guest, remote netip.Addr, h header.TCP, size int, summed bool) bool {
	if len(h) < header.TCPMinimumSize || int(h.DataOffset()) > len(h) {
		return false
	}
	t := &f.tcp.tracks
	t.mu.Lock()
	defer t.mu.Unlock()
	fl := t.flows[connection{netip.AddrPortFrom(guest, h.DestinationPort()), netip.AddrPortFrom(remote, h.SourcePort())}]
	if fl == nil {
		return false
	}
	tr := &fl.track
	if tr.cut {
		return true
	}
	tr.toGuest(h, summed)
	if !tr.own.acked {
		tr.own.end = h.SequenceNumber() // of its SYN
	}
	if tr.own.note(h, size) {
		tr.offset = tr.own.stamp - f.milliseconds()
	}
	return false
}

// milliseconds is netstack's time, as its timestamps count it.
func (f *Forwarder) milliseconds() uint32 {
	return uint32(f.cfg.Netstack.Clock().NowMonotonic().Sub(tcpip.MonotonicTime{}).Milliseconds())
}
