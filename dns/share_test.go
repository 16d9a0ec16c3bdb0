package dns

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// burst sends n questions at once, for n0.example and so on, and returns the
// answers by name.
func burst(t *testing.T, addr netip.AddrPort, n int) map[string]*dns.Msg {
	t.Helper()
	c, err := net.Dial("udp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range n {
		c.Write(ask(fmt.Sprintf("n%d.example", i), dns.TypeA))
	}
	answers := make(map[string]*dns.Msg)
	c.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 512)
	for range n {
		k, err := c.Read(b)
		if err != nil {
			t.Fatalf("%d of %d answers came: %v", len(answers), n, err)
		}
		m := unpack(t, b[:k])
		answers[m.Question[0].Name] = m
	}
	return answers
}

// together returns a handler that answers with h once n queries are there. Where
// that takes long, some of them come again.
func together(n int, h handler) handler {
	var came atomic.Int64
	all := make(chan struct{})
	return func(q []byte, tcp bool, send func([]byte)) {
		if !tcp {
			if came.Add(1) == int64(n) {
				close(all)
			}
			<-all
		}
		h(q, tcp, send)
	}
}

// own answers with an address made of the name.
func own(q []byte, _ bool, send func([]byte)) {
	var m dns.Msg
	m.Unpack(q)
	send(reply(q, 0, m.Question[0].Name+" 60 IN A "+ownAddr(m.Question[0].Name)))
}

func ownAddr(name string) string {
	var i int
	fmt.Sscanf(name, "n%d.", &i)
	return fmt.Sprintf("192.0.%d.%d", i/256, i%256)
}

func checkOwn(t *testing.T, answers map[string]*dns.Msg, n int) {
	t.Helper()
	if len(answers) != n {
		t.Errorf("%d names were answered, want %d", len(answers), n)
	}
	for name, m := range answers {
		if len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != ownAddr(name) {
			t.Fatalf("%s: answer %v, want %s", name, m.Answer, ownAddr(name))
		}
	}
}

// TestSharedPorts holds that questions asked at the same time share ports, a
// bounded number each, under ids that differ, and that each gets its answer.
func TestSharedPorts(t *testing.T) {
	const n = 200
	up := newMock(t, together(n, own))
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	checkOwn(t, burst(t, addr, n), n)
	up.mu.Lock()
	defer up.mu.Unlock()
	if k := len(up.from); k < (n+portQueries-1)/portQueries || k > n/8 {
		t.Errorf("%d queries came from %d ports", n, k)
	}
	for from, k := range up.from {
		if k > portQueries {
			t.Errorf("%d queries came from %v, want at most %d", k, from, portQueries)
		}
	}
}

// TestSharedPortsApart holds that the id of one query is none of another on the
// same port, and that what came wrong ends the sharing of a port.
func TestSharedPortsApart(t *testing.T) {
	const n = 40
	var mu sync.Mutex
	var ids []uint16
	up := newMock(t, together(n, func(q []byte, tcp bool, send func([]byte)) {
		mu.Lock()
		ids = append(ids, binary.BigEndian.Uint16(q))
		others := ids[:max(0, len(ids)-1)]
		mu.Unlock()
		for _, id := range others { // waiting or answered
			lie := reply(q, dns.RcodeNameError)
			binary.BigEndian.PutUint16(lie, id)
			send(lie)
		}
		own(q, tcp, send)
	}))
	s, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	checkOwn(t, burst(t, addr, n), n)
	if s.Stats().Mismatched == 0 {
		t.Error("no message was found wrong")
	}
	eventually(t, func() error {
		s.sockets.mu.Lock()
		defer s.sockets.mu.Unlock()
		for _, sock := range s.sockets.all {
			if sock.wrong > 0 {
				return fmt.Errorf("a socket with %d wrong messages is still there", sock.wrong)
			}
		}
		return nil
	})
}

// TestSharedPortFlooded holds that a flood of guesses at a port leads all the
// questions on it to TCP.
func TestSharedPortFlooded(t *testing.T) {
	const n = 20
	up := newMock(t, together(n, func(q []byte, tcp bool, send func([]byte)) {
		if tcp {
			own(q, tcp, send)
			return
		}
		// Ids that are not asked for, or by chance one or two.
		b := reply(q, 0, "forged. 60 IN A 203.0.113.66")
		copy(b[headerLen:], "\x06forged\x00")
		for i := range 100 {
			binary.BigEndian.PutUint16(b, uint16(i)*655)
			send(b)
			if i%20 == 0 {
				time.Sleep(5 * time.Millisecond)
			}
		}
	}))
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	checkOwn(t, burst(t, addr, n), n)
	if _, tcp := up.seen(); tcp != n {
		t.Errorf("TCP was used %d times, want %d", tcp, n)
	}
}

// TestSharedPortRefused holds that where nobody listens all questions on a port
// hear of it, whichever call the kernel tells it to.
func TestSharedPortRefused(t *testing.T) {
	pc, l := listenBoth(t)
	closed := addrPort(pc.LocalAddr())
	pc.Close()
	l.Close()
	up := newMock(t, own)
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{closed, up.addr}})
	begin := time.Now()
	checkOwn(t, burst(t, addr, 100), 100)
	if d := time.Since(begin); d > 250*time.Millisecond { // before hedgeDelay
		t.Logf("it took %v", d)
	}
	s, addr := start(t, Config{Upstreams: []netip.AddrPort{closed}})
	begin = time.Now()
	for name, m := range burst(t, addr, 100) {
		if m.Rcode != dns.RcodeServerFailure {
			t.Errorf("%s: rcode %d", name, m.Rcode)
		}
	}
	if d := time.Since(begin); d > quick {
		t.Errorf("refusals took %v", d)
	}
	wantIdle(t, s)
}

// wantIdle waits until no socket waits for an answer.
func wantIdle(t *testing.T, s *Server) {
	t.Helper()
	eventually(t, func() error {
		s.sockets.mu.Lock()
		defer s.sockets.mu.Unlock()
		if n := len(s.sockets.all) - len(s.sockets.idle); n > 0 {
			return fmt.Errorf("%d sockets are in use", n)
		}
		return nil
	})
}
