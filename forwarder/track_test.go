package forwarder

import (
	"bytes"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

var (
	trackGuest  = netip.MustParseAddrPort("10.0.2.100:40000")
	trackRemote = netip.MustParseAddrPort("192.0.2.1:80")
)

// tcpSegment makes a header with timestamps and more options.
func tcpSegment(from, to netip.AddrPort, seq, ack uint32, flags header.TCPFlags, window uint16, more ...byte) header.TCP {
	h := header.TCP(make([]byte, stampedSize, stampedSize+len(more)))
	header.EncodeNOP(h[20:])
	header.EncodeNOP(h[21:])
	header.EncodeTSOption(ack^seq, 9, h[22:])
	h = append(h, more...)
	h.Encode(&header.TCPFields{
		SrcPort: from.Port(), DstPort: to.Port(), SeqNum: seq, AckNum: ack,
		DataOffset: uint8(len(h)), Flags: flags, WindowSize: window,
	})
	return h
}

// tracked returns a forwarder with one flow that is tracked.
func tracked(t testing.TB, first uint32) (*Forwarder, *tcpFlow) {
	f := &Forwarder{}
	f.tcp.f = f
	f.tcp.tracks.flows = make(map[connection]*tcpFlow)
	fl := &tcpFlow{t: &f.tcp, connection: connection{trackGuest, trackRemote}}
	f.tcp.tracks.add(fl, tcpSegment(trackGuest, trackRemote, first, 0, header.TCPFlagSyn, 1))
	f.cfg.Netstack = stack.New(stack.Options{})
	t.Cleanup(f.cfg.Netstack.Destroy)
	return f, fl
}

// TestSettled: a connection is settled when each side has acknowledged all that the
// other has sent, wherever the sequence numbers are.
func TestSettled(t *testing.T) {
	for _, base := range []uint32{1000, 1<<32 - 150} {
		f, fl := tracked(t, base-1)
		hears := func(seq, ack uint32, payload int) bool {
			h := tcpSegment(trackGuest, trackRemote, base+seq, ack, header.TCPFlagAck, 11)
			return f.HandleSegment(trackGuest.Addr(), trackRemote.Addr(), h, nil, len(h)+payload, false)
		}
		says := func(seq, ack uint32, flags header.TCPFlags, payload int) bool {
			return f.HandleSent(trackGuest.Addr(), trackRemote.Addr(), tcpSegment(trackRemote, trackGuest, seq, base+ack, flags|header.TCPFlagAck, 12), payload, false)
		}
		want := func(what string, settled bool) {
			t.Helper()
			if tr := f.tcp.tracks.of(fl); tr.settled() != settled {
				t.Errorf("base %d, %s: %+v, want settled %v", base, what, tr, settled)
			}
		}
		want("nothing", false)
		says(499, 0, header.TCPFlagSyn, 0)
		want("a SYN is answered", false)
		hears(0, 500, 0)
		want("the handshake is over", true)
		hears(0, 500, 100)
		want("the guest has sent", false)
		says(500, 100, 0, 0)
		want("it is acknowledged", true)
		says(500, 100, 0, 200)
		want("an answer", false)
		hears(100, 600, 0)
		want("half of it is acknowledged", false)
		hears(100, 700, 0)
		want("all of it is", true)
		hears(0, 500, 50)
		want("something is repeated", true)
		tr := f.tcp.tracks.of(fl)
		if tr.own.end != 700 || tr.guest.end != base+100 || tr.guest.window != 11 || tr.own.window != 12 || tr.own.stamp != 500^(base+100) {
			t.Errorf("base %d: %+v", base, tr)
		}
		hears(300, 700, 100)
		want("a segment is missing", false)
		hears(100, 700, 100)
		says(700, 200, 0, 0)
		want("it has come, another is missing", false)

		f.tcp.tracks.cut(fl, true)
		if !hears(100, 700, 10) || !says(700, 110, 0, 0) {
			t.Errorf("base %d: a segment passes a cut link", base)
		}
		f.tcp.tracks.cut(fl, false)
		before := f.tcp.tracks.of(fl)
		syn := tcpSegment(trackGuest, trackRemote, base+7000, 0, header.TCPFlagSyn, 1)
		if f.HandleSegment(trackGuest.Addr(), trackRemote.Addr(), syn, nil, len(syn), false) || f.tcp.tracks.of(fl) != before {
			t.Errorf("base %d: a SYN for netstack's answer changes the track", base)
		}
	}
}

// A header of a length that it does not have is left to netstack.
func TestTrackMalformed(t *testing.T) {
	f, fl := tracked(t, 1)
	before := f.tcp.tracks.of(fl)
	h := tcpSegment(trackGuest, trackRemote, 2, 1, header.TCPFlagAck, 1)
	for _, b := range [][]byte{h[:10], h[:24], append(append([]byte(nil), h[:12]...), make([]byte, 20)...)} {
		if f.HandleSegment(trackGuest.Addr(), trackRemote.Addr(), b, nil, len(b), false) || f.tcp.tracks.of(fl) != before {
			t.Errorf("%x was taken in", b)
		}
	}
}

// fillSum fills a header's checksum.
func fillSum(h header.TCP, pseudo uint16) {
	h.SetChecksum(0)
	h.SetChecksum(^checksum.Checksum(h, pseudo))
}

func sumValid(h header.TCP, pseudo uint16) bool { return checksum.Checksum(h, pseudo) == 0xffff }

// TestTranslation: netstack and the guest each see their own sequence numbers, in SACK
// blocks too, and checksums that are filled in stay right.
func TestTranslation(t *testing.T) {
	const pseudo = 0x1234
	sack := []byte{1, 1, 5, 10, 0, 0, 1, 0, 0, 0, 2, 0}
	tr := track{up: 100, down: 1000}
	tr.own.end, tr.guest.stamp = 5000, 77

	h := tcpSegment(trackGuest, trackRemote, 60, 4000, header.TCPFlagAck, 1, sack...)
	fillSum(h, pseudo)
	tr.toNetstack(h, true)
	if h.SequenceNumber() != 1<<32-40 || h.AckNumber() != 3000 || !sumValid(h, pseudo) {
		t.Errorf("to netstack: seq %d, ack %d, checksum right: %v", h.SequenceNumber(), h.AckNumber(), sumValid(h, pseudo))
	}
	if b := h.ParsedOptions().SACKBlocks; len(b) != 1 || uint32(b[0].Start) != 1<<32+0x100-1000 || uint32(b[0].End) != 1<<32+0x200-1000 {
		t.Errorf("to netstack: SACK blocks %v", b)
	}
	h = tcpSegment(trackGuest, trackRemote, 60, 5400, header.TCPFlagAck, 1)
	if tr.toNetstack(h, false); h.AckNumber() != 4000 {
		t.Errorf("the guest has more than netstack has sent: it hears of %d, want 4000", h.AckNumber())
	}

	h = tcpSegment(trackRemote, trackGuest, 1<<32-500, 50, header.TCPFlagAck, 1, sack...)
	fillSum(h, pseudo)
	tr.toGuest(h, true)
	if _, ecr, _ := timestamps(h); h.SequenceNumber() != 500 || h.AckNumber() != 150 || ecr != 77 || !sumValid(h, pseudo) {
		t.Errorf("to the guest: seq %d, ack %d, echoes %d, checksum right: %v", h.SequenceNumber(), h.AckNumber(), ecr, sumValid(h, pseudo))
	}
	if b := h.ParsedOptions().SACKBlocks; len(b) != 1 || b[0].Start != 0x100+100 || b[0].End != 0x200+100 {
		t.Errorf("to the guest: SACK blocks %v", b)
	}
	h[17]++
	if tr.toGuest(h, true); sumValid(h, pseudo) {
		t.Error("a wrong checksum was made right")
	}
}

// FuzzTranslation: what is translated to and fro is what it was.
func FuzzTranslation(f *testing.F) {
	f.Add([]byte(tcpSegment(trackGuest, trackRemote, 1, 2, header.TCPFlagAck, 3, 1, 1, 5, 10, 0, 0, 1, 0, 0, 0, 2, 0)), uint32(7), uint32(1<<31))
	f.Add([]byte(tcpSegment(trackGuest, trackRemote, 1, 2, header.TCPFlagAck, 3, 5, 40, 5, 3, 5, 2, 0, 0)), uint32(0), uint32(1))
	f.Fuzz(func(t *testing.T, b []byte, up, down uint32) {
		h := header.TCP(bytes.Clone(b))
		if len(h) < header.TCPMinimumSize || int(h.DataOffset()) < header.TCPMinimumSize || int(h.DataOffset()) > len(h) {
			return
		}
		fillSum(h, 0)
		before := bytes.Clone(h)
		there, back := track{up: up, down: down}, track{up: down, down: up}
		there.own.end = h.AckNumber()
		_, back.guest.stamp, _ = timestamps(h)
		there.toNetstack(h, true)
		if !sumValid(h, 0) {
			t.Fatalf("checksum wrong: %x", []byte(h))
		}
		back.toGuest(h, true)
		fillSum(h, 0) // there are two zeros
		if !bytes.Equal(h, before) {
			t.Fatalf("%x\nhas become\n%x", before, []byte(h))
		}
	})
}
