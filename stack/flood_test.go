package stack

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/vnet"
)

// syn is a frame that begins a connection from a port of the guest's.
func syn(src, dst netip.AddrPort) []byte {
	b := make([]byte, header.TCPMinimumSize)
	header.TCP(b).Encode(&header.TCPFields{
		SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: 1, DataOffset: header.TCPMinimumSize,
		Flags: header.TCPFlagSyn, WindowSize: 65535,
	})
	sum := sumPieces(b, nil)
	pseudo := pseudoSum(src.Addr(), dst.Addr(), uint8(header.TCPProtocolNumber), len(b))
	total := uint32(sum) + uint32(pseudo)
	total = total&0xffff + total>>16
	total = total&0xffff + total>>16
	binary.BigEndian.PutUint16(b[16:], ^uint16(total))
	return ip(src.Addr(), dst.Addr(), uint8(header.TCPProtocolNumber), 64, b)
}

// behindOption puts an option, or an extension header, in front of what a frame has
// behind its IP header.
func behindOption(frame []byte) []byte {
	if frame[12] == 8 {
		b := slices.Concat(frame[:ethLen+20], []byte{148, 4, 0, 0}, frame[ethLen+20:])
		b[ethLen]++
		binary.BigEndian.PutUint16(b[ethLen+2:], uint16(len(b)-ethLen))
		binary.BigEndian.PutUint16(b[ethLen+10:], 0)
		binary.BigEndian.PutUint16(b[ethLen+10:], ^checksum.Checksum(b[ethLen:ethLen+24], 0))
		return b
	}
	b := slices.Concat(frame[:ethLen+40], []byte{frame[ethLen+6], 0, 1, 4, 0, 0, 0, 0}, frame[ethLen+40:])
	b[ethLen+6] = 60
	binary.BigEndian.PutUint16(b[ethLen+4:], uint16(len(b)-ethLen-40))
	return b
}

// TestSYNsThatComeToNothing holds that a flood of SYNs is bounded before netstack
// sees it, in whatever packets they are, and that connections which come about are
// not.
func TestSYNsThatComeToNothing(t *testing.T) {
	s, l := newTestStack(t, true)
	passed := 0
	s.SetHooks(Hooks{TCP: func(gstack.TransportEndpointID, *gstack.PacketBuffer) bool { passed++; return true }})
	now := s.clock.base.Add(time.Hour)
	s.StopClock(now)
	flood := func(n int, to netip.Addr, from netip.Addr) int {
		passed = 0
		for i := range n {
			l.inject(vnet.Header{Flags: vnet.DataValid}, syn(port(from, uint16(1024+i)), port(to, 80)))
		}
		return passed
	}
	if n := flood(synBurst+100, tFar4, tGuest4); n != synBurst {
		t.Errorf("%d SYNs pass at once, want %d", n, synBurst)
	}
	if n := s.Stats().SYNsDropped.Load(); n != 100 {
		t.Errorf("%d SYNs are counted as dropped, want 100", n)
	}
	if n := flood(10, tFar6, tGuest6); n != 0 {
		t.Errorf("%d more pass over IPv6", n)
	}
	for i := range 10 {
		for _, a := range [][2]netip.AddrPort{{port(tGuest4, uint16(1024+i)), port(tFar4, 80)}, {port(tGuest6, uint16(1024+i)), port(tFar6, 80)}} {
			l.inject(vnet.Header{}, behindOption(syn(a[0], a[1])))
		}
	}
	if passed != 0 {
		t.Errorf("%d more pass behind options", passed)
	}
	for range 10 {
		s.Established()
	}
	if n := flood(20, tFar6, tGuest6); n != 10 {
		t.Errorf("%d SYNs pass after 10 connections came about", n)
	}
	now = now.Add(time.Second / 2)
	s.StopClock(now)
	if n := flood(synBurst, tFar4, tGuest4); n != synRate/2 {
		t.Errorf("%d SYNs pass in half a second, want %d", n, synRate/2)
	}
	s.StopClock(now.Add(time.Hour))
	for range 2 * synBurst { // connections that come about by the long way
		s.Established()
	}
	if n := flood(2*synBurst, tFar4, tGuest4); n != synBurst {
		t.Errorf("%d SYNs pass at once after a rest, want %d", n, synBurst)
	}
}
