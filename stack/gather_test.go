package stack

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/usernet/usernet/internal/vnet"
)

// TestDatagramsShareFrames holds that between Hold and Flush datagrams of one
// size, source and destination leave as one frame, in order, and that nothing
// waits beyond.
func TestDatagramsShareFrames(t *testing.T) {
	a, b := port(tGuest4, 1000), port(tGuest4, 1001)
	far, far6, guest6 := port(tFar4, 53), port(tFar6, 53), port(tGuest6, 1000)
	type datagram struct {
		src, dst netip.AddrPort
		size     int
	}
	many := make([]datagram, maxSegs+1)
	for i := range many {
		many[i] = datagram{far, a, 100}
	}
	type frame struct{ size, gso int } // size of what is behind the UDP header
	for _, c := range []struct {
		name string
		in   []datagram
		want []frame
	}{
		{"one", []datagram{{far, a, 100}}, []frame{{100, 0}}},
		{"equal ones", []datagram{{far, a, 100}, {far, a, 100}, {far, a, 100}}, []frame{{300, 100}}},
		{"a shorter one ends a run", []datagram{{far, a, 100}, {far, a, 60}, {far, a, 60}}, []frame{{160, 100}, {60, 0}}},
		{"a longer one begins another", []datagram{{far, a, 60}, {far, a, 100}}, []frame{{60, 0}, {100, 0}}},
		{"of two destinations", []datagram{{far, a, 100}, {far, b, 100}, {far, a, 100}}, []frame{{100, 0}, {100, 0}, {100, 0}}},
		{"of two families", []datagram{{far, a, 100}, {far6, guest6, 100}, {far6, guest6, 100}}, []frame{{100, 0}, {200, 100}}},
		{"empty ones", []datagram{{far, a, 0}, {far, a, 0}}, []frame{{0, 0}, {0, 0}}},
		{"long ones", []datagram{{far, a, 5000}, {far, a, 5000}}, []frame{{5000, 0}, {5000, 0}}},
		{"too many for one", many, []frame{{maxSegs * 100, 100}, {100, 0}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, l := newTestStack(t, true)
			l.mtu = 65520
			var sent []byte
			write := func(d datagram, fill byte) {
				p := bytes.Repeat([]byte{fill}, d.size)
				sent = append(sent, p...)
				if err := s.WriteUDP(d.src, d.dst, 0, p); err != nil {
					t.Fatal(err)
				}
			}
			s.Hold()
			for i, d := range c.in {
				write(d, byte(i))
			}
			s.Flush()
			var got []frame
			var payload []byte
			for _, f := range l.take() {
				p := f.b[ethLen+20+udpLen:]
				if f.b[12] == 0x86 {
					p = p[20:]
				}
				got = append(got, frame{len(p), int(f.h.GSOSize)})
				payload = append(payload, p...)
				if gso := f.h.GSOType == vnet.GSOUDP; gso != (f.h.GSOSize > 0) {
					t.Errorf("a frame of type %d with datagrams of %d bytes", f.h.GSOType, f.h.GSOSize)
				}
			}
			if len(got) != len(c.want) {
				t.Fatalf("frames %v, want %v", got, c.want)
			}
			for i := range got {
				if got[i] != c.want[i] {
					t.Errorf("frames %v, want %v", got, c.want)
				}
			}
			if !bytes.Equal(payload, sent) {
				t.Error("what was sent is not what was written")
			}
			// Outside nothing waits.
			for _, d := range c.in {
				write(d, 0)
			}
			if n := len(l.take()); n != len(c.in) {
				t.Errorf("%d frames at once for %d datagrams", n, len(c.in))
			}
		})
	}
}

// TestDatagramsKeepToFramesWithoutOffload holds that a link that takes no UDP
// super-frames gets its datagrams at once, and one each.
func TestDatagramsKeepToFramesWithoutOffload(t *testing.T) {
	s, l := newTestStack(t, true)
	s.cfg.USO = false
	s.Hold()
	for range 3 {
		if err := s.WriteUDP(port(tFar4, 53), port(tGuest4, 1000), 0, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(l.take()); n != 3 {
		t.Errorf("%d frames, want 3", n)
	}
	s.Flush()
	if n := len(l.take()); n != 0 {
		t.Errorf("%d more frames", n)
	}
}
