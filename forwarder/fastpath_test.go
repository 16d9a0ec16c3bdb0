package forwarder_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/vnet"
	"github.com/usernet/usernet/tap"
)

// fast asks so often for a small answer that the connection is on the fast path.
func fast(t *testing.T, n *network, c net.Conn, next *byte) {
	t.Helper()
	before := n.fwd.Stats().Predicted.Load()
	for range 20 {
		if err := ask(c, 100, next); err != nil {
			t.Fatal(err)
		}
	}
	if n.fwd.Stats().Predicted.Load() == before {
		t.Fatal("nothing goes past netstack")
	}
}

// connect makes a connection of the guest's to a port of the host's loopback.
func connect(t *testing.T, n *network, port uint16) *gonet.TCPConn {
	t.Helper()
	c, err := n.dial(at(gateway4, port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(60 * time.Second))
	return c
}

// TestFastPathOnABadLink: with segments lost, repeated and overtaken, flows leave the
// fast path and come back, and every byte arrives once.
func TestFastPathOnABadLink(t *testing.T) {
	const flows, turns = 8, 80
	for _, v := range variants[3:4] {
		n := newNetwork(t, v.opt)
		port := listen(t, func(c *net.TCPConn) { answering(c, func(c *net.TCPConn) { c.Close() }) })
		var wg sync.WaitGroup
		for i := range flows {
			r := seeded(t)
			wg.Go(func() {
				c, err := n.dial(at(gateway4, port))
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(120 * time.Second))
				var next byte
				for k := range turns {
					size := 1 + r.IntN(3000)
					if r.IntN(20) == 0 {
						size = 1 + r.IntN(50000)
					}
					if err := ask(c, size, &next); err != nil {
						t.Errorf("flow %d, answer %d: %v", i, k, err)
						return
					}
				}
				c.Write(make([]byte, 4))
				if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
					t.Errorf("flow %d ends with %d bytes and %v", i, len(b), err)
				}
			})
		}
		wg.Wait()
		if n.fwd.Stats().Predicted.Load() == 0 {
			t.Error("nothing went past netstack")
		}
	}
}

// TestFastPathToAFullServer: a server that does not read loses nothing of what its
// socket has no room for.
func TestFastPathToAFullServer(t *testing.T) {
	const size, piece = 12 << 20, 3000
	n := newNetwork(t, variants[0].opt)
	begin, sum := make(chan struct{}), make(chan error, 1)
	port := listen(t, func(c *net.TCPConn) {
		answering(c, func(c *net.TCPConn) {
			<-begin
			b := make([]byte, size)
			_, err := io.ReadFull(c, b)
			for i := range b {
				if err == nil && b[i] != byte(i/piece) {
					err = fmt.Errorf("byte %d is %d", i, b[i])
				}
			}
			sum <- err
		})
	})
	c := connect(t, n, port)
	var next byte
	fast(t, n, c, &next)
	c.Write(make([]byte, 4))
	time.AfterFunc(300*time.Millisecond, func() { close(begin) })
	b := make([]byte, piece)
	for at := 0; at < size; at += piece {
		for i := range b {
			b[i] = byte(at / piece)
		}
		if _, err := c.Write(b[:min(piece, size-at)]); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-sum; err != nil {
		t.Fatal(err)
	}
}

// TestFastPathToAFullGuest: answers to a guest that does not read wait for it.
func TestFastPathToAFullGuest(t *testing.T) {
	const turns, size = 8000, 1000
	n := newNetwork(t, variants[0].opt)
	port := listen(t, func(c *net.TCPConn) { answering(c, func(c *net.TCPConn) { c.Close() }) })
	c := connect(t, n, port)
	var next byte
	fast(t, n, c, &next)
	var requests []byte
	for range turns {
		requests = binary.BigEndian.AppendUint32(requests, size)
	}
	if _, err := c.Write(append(requests, 0, 0, 0, 0)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	b, err := io.ReadAll(c)
	if len(b) != turns*size || err != nil {
		t.Fatalf("%d bytes and %v, want %d", len(b), err, turns*size)
	}
	for i, x := range b {
		if x != next {
			t.Fatalf("byte %d is %d, want %d", i, x, next)
		}
		next++
	}
}

// TestFastPathHalfClosed: what the server says after the guest's FIN arrives, and what
// the guest says after the server's.
func TestFastPathHalfClosed(t *testing.T) {
	n := newNetwork(t, variants[1].opt)
	heard := make(chan error, 1)
	port := listen(t, func(c *net.TCPConn) {
		answering(c, func(c *net.TCPConn) {
			c.CloseWrite()
			b, err := io.ReadAll(c)
			if string(b) != "the guest's last words" {
				err = errors.Join(err, fmt.Errorf("the server hears %q", b))
			}
			heard <- err
			c.Close()
		})
	})
	for range 10 {
		c := connect(t, n, port)
		var next byte
		fast(t, n, c, &next)
		c.Write(make([]byte, 4))
		if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
			t.Fatalf("%d bytes and %v after the last answer", len(b), err)
		}
		c.Write([]byte("the guest's last words"))
		c.CloseWrite()
		if err := <-heard; err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// TestFastPathPortsAgain: a connection from a port that one has just been on, whose
// sequence numbers were not netstack's.
func TestFastPathPortsAgain(t *testing.T) {
	n := newNetwork(t, variants[0].opt)
	port := listen(t, func(c *net.TCPConn) { answering(c, func(c *net.TCPConn) { c.Close() }) })
	to, proto := full(at(gateway4, port))
	from, _ := full(at(guest4, 45678))
	for i := range 20 {
		var c *gonet.TCPConn
		var err error
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			// The guest's last endpoint may have to end yet.
			if c, err = gonet.DialTCPWithBind(t.Context(), n.guest, from, to, proto); err == nil || time.Now().After(end) {
				break
			}
		}
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		var next byte
		fast(t, n, c, &next)
		c.Write(make([]byte, 4))
		if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
			t.Fatalf("connection %d: %d bytes and %v after the last answer", i, len(b), err)
		}
		c.Close()
	}
}

// TestFastPathAndStraySYNs: a SYN with the ports of a connection that is alive says
// nothing about it, whatever its number is. It lives on, and answers it (RFC 5961 §4).
func TestFastPathAndStraySYNs(t *testing.T) {
	opt := variants[1].opt
	var end *tap.Endpoint
	opt.link = func(e *tap.Endpoint) gstack.LinkEndpoint { end = e; return e }
	n := newNetwork(t, opt)
	port := listen(t, func(c *net.TCPConn) { answering(c, func(c *net.TCPConn) { c.Close() }) })
	c := connect(t, n, port)
	from := uint16(c.LocalAddr().(*net.TCPAddr).Port)
	var next byte
	for i := range uint32(64) {
		fast(t, n, c, &next)
		if err := writeSYN(end, from, port, i<<26); err != nil {
			t.Fatal(err)
		}
	}
	c.Write(make([]byte, 4))
	if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
		t.Fatalf("%d bytes and %v after the last answer", len(b), err)
	}
}

// writeSYN sends a SYN to the gateway.
func writeSYN(e *tap.Endpoint, from, to uint16, seq uint32) error {
	f := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize+header.TCPMinimumSize)
	header.Ethernet(f).Encode(&header.EthernetFields{SrcAddr: tcpip.LinkAddress(guestMAC[:]), DstAddr: tcpip.LinkAddress(gwMAC[:]), Type: header.IPv4ProtocolNumber})
	ip := header.IPv4(f[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(ip)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
		SrcAddr: tcpip.AddrFrom4(guest4.As4()), DstAddr: tcpip.AddrFrom4(gateway4.As4()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	h := header.TCP(ip.Payload())
	h.Encode(&header.TCPFields{SrcPort: from, DstPort: to, SeqNum: seq, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 65535})
	h.SetChecksum(^h.CalculateChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(len(h)))))
	return e.WriteFrame(vnet.Header{}, f, nil, nil)
}

// TestFastPathForgotten: a guest that has forgotten a connection, as one that was begun
// anew, makes another from the same port.
func TestFastPathForgotten(t *testing.T) {
	opt := variants[0].opt
	link := &resetLink{}
	opt.link = func(e *tap.Endpoint) gstack.LinkEndpoint { link.Endpoint = e; return link }
	n := newNetwork(t, opt)
	port := listen(t, func(c *net.TCPConn) { answering(c, func(c *net.TCPConn) { c.Close() }) })
	to, proto := full(at(gateway4, port))
	from, _ := full(at(guest4, 45679))
	for i := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		c, err := gonet.DialTCPWithBind(ctx, n.guest, from, to, proto)
		cancel()
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		var next byte
		fast(t, n, c, &next)
		link.lose.Store(true)
		n.guest.RegisteredEndpoints()[0].Abort()
		for end := time.Now().Add(10 * time.Second); link.lose.Load(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("connection %d: the guest has sent no reset to be lost", i)
			}
		}
	}
}

// resetLink loses the guest's next reset when it is told to.
type resetLink struct {
	*tap.Endpoint

	lose atomic.Bool
}

func (l *resetLink) WritePackets(pkts gstack.PacketBufferList) (int, tcpip.Error) {
	for _, p := range pkts.AsSlice() {
		if h := header.TCP(p.TransportHeader().Slice()); len(h) > 0 && h.Flags().Contains(header.TCPFlagRst) && l.lose.CompareAndSwap(true, false) {
			continue
		}
		writePacket(l.Endpoint, p)
	}
	return pkts.Len(), nil
}

// TestFastPathAndTheLongWay: segments with IP options go through netstack's IP layer, and
// may come in the middle of a connection that is on the fast path.
func TestFastPathAndTheLongWay(t *testing.T) {
	opt := variants[0].opt
	opt.link = func(e *tap.Endpoint) gstack.LinkEndpoint { return &optionLink{Endpoint: e} }
	n := newNetwork(t, opt)
	port := listen(t, func(c *net.TCPConn) { answering(c, func(c *net.TCPConn) { c.Close() }) })
	c := connect(t, n, port)
	var next byte
	for i := range 300 {
		if err := ask(c, 1+i, &next); err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
	}
	c.Write(make([]byte, 4))
	if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
		t.Fatalf("%d bytes and %v after the last answer", len(b), err)
	}
	if n.fwd.Stats().Predicted.Load() == 0 {
		t.Error("nothing went past netstack")
	}
	if again := n.guest.Stats().TCP.Retransmits.Value(); again > 15 { // a busy machine makes a few
		t.Errorf("the guest had to repeat %d segments", again)
	}
}

// optionLink puts an option into the IP header of every eleventh packet.
type optionLink struct {
	*tap.Endpoint

	mu sync.Mutex // guards following
	n  int
}

func (l *optionLink) WritePackets(pkts gstack.PacketBufferList) (int, tcpip.Error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range pkts.AsSlice() {
		if l.n++; l.n%11 != 0 || p.NetworkProtocolNumber != header.IPv4ProtocolNumber {
			writePacket(l.Endpoint, p)
			continue
		}
		const l3 = header.EthernetMinimumSize
		b := p.ToView().AsSlice()
		f := append(append(append([]byte(nil), b[:l3+header.IPv4MinimumSize]...), 1, 1, 1, 0), b[l3+header.IPv4MinimumSize:]...)
		ip := header.IPv4(f[l3:])
		ip[0]++ // the length of the header, in words
		ip.SetTotalLength(ip.TotalLength() + 4)
		ip.SetChecksum(0)
		ip.SetChecksum(^checksum.Checksum(ip[:ip.HeaderLength()], 0))
		h := vnet.Header{Flags: vnet.NeedsCsum, CsumStart: l3 + uint16(ip.HeaderLength()), CsumOffset: p.GSOOptions.CsumOffset}
		if !p.GSOOptions.NeedsCsum {
			h = vnet.Header{}
		}
		l.Endpoint.WriteFrame(h, f, nil, nil)
	}
	return pkts.Len(), nil
}
