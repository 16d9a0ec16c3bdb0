package dns

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// handed is a conn whose datagrams a test hands over, many at once.
type handed struct {
	net.PacketConn // on the loopback, where nothing comes
	ready          chan struct{}
	answers        chan []byte
	take           func(b []byte, from netip.AddrPort)
	done           func()
}

func newHanded(t *testing.T) *handed {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return &handed{PacketConn: pc, ready: make(chan struct{}), answers: make(chan []byte, 1000)}
}

func (c *handed) Handle(take func(b []byte, from netip.AddrPort), done func()) {
	c.take, c.done = take, done
	close(c.ready)
}

func (c *handed) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	return 0, netip.AddrPort{}, net.ErrClosed
}

func (c *handed) WriteToUDPAddrPort(b []byte, _ netip.AddrPort) (int, error) {
	c.answers <- append([]byte(nil), b...)
	return len(b), nil
}

// askAll hands over questions for n0.example and so on at once, with more in
// front of the name where it is even, and returns the answers by name.
func (c *handed) askAll(t *testing.T, n int) map[string]*dns.Msg {
	t.Helper()
	<-c.ready
	from := netip.MustParseAddrPort("10.0.2.100:1000")
	for i := range n {
		c.take(ask(fmt.Sprintf("n%d.%sexample", i, strings.Repeat("long.", 1-i%2)), dns.TypeA), from)
	}
	c.done()
	answers := make(map[string]*dns.Msg)
	timeout := time.After(patience)
	for len(answers) < n {
		select {
		case b := <-c.answers:
			m := unpack(t, b)
			answers[m.Question[0].Name] = m
		case <-timeout:
			t.Fatalf("%d of %d answers came", len(answers), n)
		}
	}
	return answers
}

// TestQueriesHandedOverTogether holds that questions that come at once, of one
// size or of several, all get their answers, and share ports as others do.
func TestQueriesHandedOverTogether(t *testing.T) {
	const n = 300
	up := newMock(t, together(n, own))
	c := newHanded(t)
	start(t, Config{Upstreams: []netip.AddrPort{up.addr}, PacketConns: []net.PacketConn{c}})
	checkOwn(t, c.askAll(t, n), n)
	up.mu.Lock()
	defer up.mu.Unlock()
	for from, k := range up.from {
		if k > portQueries {
			t.Errorf("%d queries came from %v, want at most %d", k, from, portQueries)
		}
	}
}

// TestQueriesHandedOverToNobody holds that where nobody listens queries that
// wait for each other are asked elsewhere, or fail at once.
func TestQueriesHandedOverToNobody(t *testing.T) {
	pc, l := listenBoth(t)
	closed := addrPort(pc.LocalAddr())
	pc.Close()
	l.Close()
	up := newMock(t, own)
	c := newHanded(t)
	start(t, Config{Upstreams: []netip.AddrPort{closed, up.addr}, PacketConns: []net.PacketConn{c}})
	checkOwn(t, c.askAll(t, 100), 100)

	c = newHanded(t)
	s, _ := start(t, Config{Upstreams: []netip.AddrPort{closed}, PacketConns: []net.PacketConn{c}})
	for name, m := range c.askAll(t, 100) {
		if m.Rcode != dns.RcodeServerFailure {
			t.Errorf("%s: rcode %d", name, m.Rcode)
		}
	}
	wantIdle(t, s)
}

// TestQueriesOverBeforeTheyLeave holds that a query that nobody waits for any
// more is not sent, whoever has its socket by then.
func TestQueriesOverBeforeTheyLeave(t *testing.T) {
	silent := newMock(t, func([]byte, bool, func([]byte)) {})
	c := newHanded(t)
	s, _ := start(t, Config{Upstreams: []netip.AddrPort{silent.addr}, PacketConns: []net.PacketConn{c}})
	<-c.ready
	from := netip.MustParseAddrPort("10.0.2.100:1000")
	for i := range 10 {
		c.take(ask(fmt.Sprintf("n%d.example", i), dns.TypeA), from)
	}
	for _, f := range s.flights.all() {
		f.mu.Lock()
		f.finishLocked(nil, s.now())
		f.unlock()
	}
	c.done()
	for range 10 {
		<-c.answers
	}
	if udp, _ := silent.seen(); udp > 1 {
		t.Errorf("%d queries were sent, want only the first", udp)
	}
}
