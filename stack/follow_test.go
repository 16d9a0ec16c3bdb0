package stack

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func tcpSegment(from, to netip.AddrPort, seq, ack uint32, window uint16) header.TCP {
	h := header.TCP(make([]byte, header.TCPMinimumSize+12))
	h.Encode(&header.TCPFields{
		SrcPort: from.Port(), DstPort: to.Port(), SeqNum: seq, AckNum: ack,
		DataOffset: uint8(len(h)), Flags: header.TCPFlagAck, WindowSize: window,
	})
	header.EncodeNOP(h[20:])
	header.EncodeNOP(h[21:])
	header.EncodeTSOption(ack^seq, 9, h[22:])
	return h
}

// TestFollow: a connection is settled when each side has acknowledged all that the
// other has sent, wherever the sequence numbers are.
func TestFollow(t *testing.T) {
	guest, remote := netip.MustParseAddrPort("10.0.2.100:40000"), netip.MustParseAddrPort("192.0.2.1:80")
	for _, base := range []uint32{1000, 1<<32 - 150} {
		var s Stack
		s.Follow(guest, remote)
		id := connection{guest, remote}
		hears := func(seq, ack uint32, payload int) bool {
			h := tcpSegment(guest, remote, base+seq, ack, 11)
			return s.follow.heard(guest.Addr(), remote.Addr(), h, len(h)+payload)
		}
		says := func(seq, ack uint32, payload int) bool {
			return s.follow.sends(id, tcpSegment(remote, guest, seq, base+ack, 12), payload)
		}
		want := func(what string, known, settled bool) {
			t.Helper()
			if st := s.Standing(guest, remote); st.Known != known || st.Settled != settled {
				t.Errorf("base %d, %s: %+v, want known %v and settled %v", base, what, st, known, settled)
			}
		}
		want("nothing", false, false)
		hears(0, 500, 100)
		want("the guest has sent", false, false)
		says(500, 100, 0)
		want("it is acknowledged", true, true)
		says(500, 100, 200)
		want("an answer", true, false)
		hears(100, 600, 0)
		want("half of it is acknowledged", true, false)
		hears(100, 700, 0)
		want("all of it is", true, true)
		hears(0, 500, 50)
		want("something is repeated", true, true)
		st := s.Standing(guest, remote)
		if st.Sent != 700 || st.Received != base+100 || st.GuestWindow != 11 || st.Window != 12 || st.Timestamp != 500^(base+100) {
			t.Errorf("base %d: %+v", base, st)
		}
		s.Cut(guest, remote)
		if !hears(100, 700, 10) || !says(700, 110, 0) {
			t.Errorf("base %d: a segment passes a cut link", base)
		}
		want("what is lost", true, true)
		other := netip.AddrPortFrom(guest.Addr(), guest.Port()+1)
		if s.follow.sends(connection{other, remote}, tcpSegment(remote, other, 1, 1, 1), 0) {
			t.Errorf("base %d: another connection's segment is lost", base)
		}
		s.Unfollow(guest, remote)
		if hears(100, 700, 10) || s.follow.n.Load() != 0 {
			t.Errorf("base %d: the connection is still followed", base)
		}
	}
}

// A header of a length that it does not have is left to netstack.
func TestFollowMalformed(t *testing.T) {
	var s Stack
	guest, remote := netip.MustParseAddrPort("10.0.2.100:40000"), netip.MustParseAddrPort("192.0.2.1:80")
	s.Follow(guest, remote)
	h := tcpSegment(guest, remote, 1, 1, 1)
	for _, b := range [][]byte{h[:10], h[:24], append(append([]byte(nil), h[:12]...), make([]byte, 20)...)} {
		if s.follow.heard(guest.Addr(), remote.Addr(), b, len(b)) || s.Standing(guest, remote).Known {
			t.Errorf("%x was taken in", b)
		}
	}
}
