package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// quick is less than the time that a question takes for which nobody has an
// answer, and as much more than one takes that somebody has as fits in.
const quick = flightTime - flightTime/8

// patience is how long tests wait for what must come.
const patience = 30 * time.Second

// exchangers are the ways to ask.
var exchangers = map[string]func(testing.TB, netip.AddrPort, []byte, time.Duration) []byte{
	"udp": exchangeUDP, "tcp": exchangeTCP,
}

// TestVerbatim holds that answers pass as the bytes they are, whatever they
// say, even such as no codec would make.
func TestVerbatim(t *testing.T) {
	odd := func(tail string) handler {
		return func(q []byte, _ bool, send func([]byte)) {
			b := append(bytes.Clone(q), tail...)
			b[2] |= bitQR
			send(b)
		}
	}
	q := ask("Example.org", dns.TypeTXT)
	for name, c := range map[string]struct {
		query []byte
		h     handler
	}{
		"address":        {q, answerWith(0, "example.org. 300 IN A 192.0.2.1")},
		"NODATA":         {q, answerWith(0, "ns: example.org. 300 IN SOA a. b. 1 2 3 4 5")},
		"NXDOMAIN":       {q, answerWith(dns.RcodeNameError, "ns: org. 300 IN SOA a. b. 1 2 3 4 5")},
		"REFUSED":        {q, answerWith(dns.RcodeRefused)},
		"SERVFAIL":       {q, answerWith(dns.RcodeServerFailure)},
		"FORMERR":        {q, answerWith(dns.RcodeFormatError)},
		"rcode 15":       {q, answerWith(15)},
		"HTTPS":          {ask("example.org", dns.TypeHTTPS), answerWith(0, `example.org. 60 IN HTTPS 1 . alpn="h2,h3" ipv4hint=192.0.2.1`)},
		"CAA":            {ask("example.org", dns.TypeCAA), answerWith(0, `example.org. 60 IN CAA 0 issue "ca.example.net"`)},
		"NAPTR":          {ask("example.org", dns.TypeNAPTR), answerWith(0, `example.org. 60 IN NAPTR 100 50 "s" "http" "" a.example.org.`)},
		"SRV":            {ask("_a._b.example.org", dns.TypeSRV), answerWith(0, `_a._b.example.org. 60 IN SRV 1 2 3 a.example.org.`)},
		"type 65280":     {ask("example.org", 65280), answerWith(0, `example.org. 60 IN TYPE65280 \# 3 abcdef`)},
		"class CH":       {ask("version.bind", dns.TypeTXT, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), answerWith(0, `version.bind. 0 CH TXT "x"`)},
		"class 4660":     {ask("a", dns.TypeA, func(m *dns.Msg) { m.Question[0].Qclass = 4660 }), answerWith(0)},
		"DO, RRSIG":      {ask("example.org", dns.TypeA, withEDNS(4096, true)), answerWith(0, "example.org. 60 IN A 192.0.2.1", "example.org. 60 IN RRSIG A 8 2 60 20300101000000 20200101000000 1 example.org. AAAA")},
		"root":           {ask(".", dns.TypeNS), answerWith(0, ". 60 IN NS a.root.")},
		"garbage behind": {q, odd("garbage")},
		"cut, as it says itself": {q, func(q []byte, _ bool, send func([]byte)) {
			b := bytes.Clone(q)
			b[2] |= bitQR | bitTC
			copy(b[6:], "\xff\xff\xff\xff\xff\xff")
			send(b)
		}},
		"question in other case": {q, func(q []byte, _ bool, send func([]byte)) {
			b := reply(q, 0, "example.org. 60 IN A 192.0.2.1")
			b[13] ^= 0x20
			send(b)
		}},
		"refusal without question": {q, func(q []byte, _ bool, send func([]byte)) {
			b := bytes.Clone(q[:headerLen])
			b[2], b[3], b[5] = bitQR, rcodeNotImp, 0
			send(b)
		}},
		"unknown option": {ask("example.org", dns.TypeA, func(m *dns.Msg) {
			m.SetEdns0(1232, false)
			m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("x")})
		}), func(q []byte, _ bool, send func([]byte)) { // echoes the query, options and all
			b := bytes.Clone(q)
			b[2] |= bitQR
			send(b)
		}},
		"EDNS version 1": {ask("a", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }), answerWith(dns.RcodeBadVers)},
	} {
		for network, exchange := range exchangers {
			t.Run(name+"/"+network, func(t *testing.T) {
				var mu sync.Mutex
				var sent, asked []byte
				up := newMock(t, func(q []byte, tcp bool, send func([]byte)) {
					c.h(q, tcp, func(b []byte) {
						mu.Lock()
						asked, sent = bytes.Clone(q), bytes.Clone(b)
						mu.Unlock()
						send(b)
					})
				})
				s, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
				for again := range 2 { // the second may be from the cache
					got := exchange(t, addr, c.query, patience)
					mu.Lock()
					want := append(bytes.Clone(c.query[:2]), sent[2:]...)
					if !bytes.Equal(asked[2:], c.query[2:]) {
						t.Errorf("upstream was asked\n%x, want\n%x", asked[2:], c.query[2:])
					}
					mu.Unlock()
					if again == 1 && s.Stats().Hits > 0 {
						// A cached answer has the spelling that was asked for.
						copy(want[headerLen:], c.query[headerLen:skipName(c.query, headerLen)])
					}
					if !bytes.Equal(got, want) {
						t.Errorf("answer\n%x, want\n%x", got, want)
					}
				}
			})
		}
	}
}

// TestSizes holds which client gets how much of a large answer.
func TestSizes(t *testing.T) {
	var many []string
	for i := range 300 {
		many = append(many, fmt.Sprintf("many.example. 60 IN A 10.0.%d.%d", i/250, i%250))
	}
	huge := []string{}
	for range 250 {
		huge = append(huge, "huge.example. 60 IN TXT \""+strings.Repeat("x", 240)+"\"")
	}
	up := newMock(t, func(q []byte, tcp bool, send func([]byte)) {
		m := new(dns.Msg)
		m.Unpack(q)
		rs := many
		if strings.HasPrefix(m.Question[0].Name, "huge") {
			rs = huge
		}
		b := reply(q, 0, rs...)
		if !tcp && len(b) > 4096 {
			b = reply(q, 0)
			b[2] |= bitTC
		} // up to that it disregards what the client can take
		send(b)
	})
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	few := ask("many.example", dns.TypeA)
	check := func(q []byte, network string, tc bool, least, most int) {
		t.Helper()
		b := exchangers[network](t, addr, q, patience)
		m := unpack(t, b)
		if m.Truncated != tc || len(b) < least || len(b) > most {
			t.Errorf("%s: %d bytes, TC %v; want %d to %d bytes, TC %v", network, len(b), m.Truncated, least, most, tc)
		}
	}
	// 4800 bytes: more than the upstream gives by UDP.
	check(few, "udp", true, 12, 512)
	check(few, "tcp", false, 4800, 4900)
	// Now it is cached, for the client that can take it.
	check(few, "udp", true, 450, 512)
	check(ask("many.example", dns.TypeA, withEDNS(65535, false)), "udp", true, 12, 512)
	check(ask("many.example", dns.TypeA, withEDNS(65535, false)), "tcp", false, 4800, 4900)
	check(ask("many.example", dns.TypeA, withEDNS(65535, false)), "udp", false, 4800, 4900)
	check(ask("many.example", dns.TypeA, withEDNS(1232, false)), "udp", true, 1100, 1232)
	check(ask("many.example", dns.TypeA, withEDNS(100, false)), "udp", true, 450, 512)
	check(ask("huge.example", dns.TypeTXT, withEDNS(4096, false)), "udp", true, 12, 512)
	check(ask("huge.example", dns.TypeTXT), "tcp", false, 60000, maxMessage)
}

// TestOversizedUDP holds that what an upstream sends beyond the client's limit
// is cut.
func TestOversizedUDP(t *testing.T) {
	var many []string
	for i := range 200 {
		many = append(many, fmt.Sprintf("a. 60 IN A 10.0.0.%d", i))
	}
	up := newMock(t, answerWith(0, many...))
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	for _, c := range []struct{ edns, limit int }{{0, 512}, {512, 512}, {1232, 1232}, {2000, 2000}} {
		q := ask("a", dns.TypeA)
		if c.edns > 0 {
			q = ask("a", dns.TypeA, withEDNS(uint16(c.edns), false))
		}
		for range 2 {
			b := exchangeUDP(t, addr, q, patience)
			if m := unpack(t, b); !m.Truncated || len(b) > c.limit || len(b) < c.limit-50 || (m.IsEdns0() != nil) != (c.edns > 0) {
				t.Errorf("EDNS %d: %d bytes, TC %v, OPT %v", c.edns, len(b), m.Truncated, m.IsEdns0() != nil)
			}
		}
	}
}

// TestLies holds that only the true answer is taken: by id, question and the
// address and port that were asked.
func TestLies(t *testing.T) {
	other, _ := listenBoth(t)
	defer other.Close()
	var up *mock
	ready := make(chan struct{})
	up = newMock(t, func(q []byte, tcp bool, send func([]byte)) {
		<-ready
		lie := func(change func(b []byte)) {
			b := reply(q, 0, "a.example. 60 IN A 203.0.113.66")
			change(b)
			send(b)
		}
		for range 50 {
			lie(func(b []byte) { binary.BigEndian.PutUint16(b, uint16(rand.Uint32())|1) })
		}
		lie(func(b []byte) { b[13] = 'b' })
		lie(func(b []byte) { b[2] &^= bitQR })
		lie(func(b []byte) { b[5] = 0 })
		lie(func(b []byte) { b[7] = 9 })
		send(reply(q, 0, "a.example. 60 IN A 203.0.113.66")[:len(q)+5])
		send(nil)
		send(q[:5])
		if !tcp {
			// The right bytes from a wrong port.
			up.mu.Lock()
			for from := range up.from {
				other.WriteToUDPAddrPort(reply(q, 0, "a.example. 60 IN A 203.0.113.66"), from)
			}
			up.mu.Unlock()
		}
		time.Sleep(50 * time.Millisecond)
		send(reply(q, 0, "a.example. 60 IN A 192.0.2.1"))
		send(reply(q, dns.RcodeNameError)) // late
	})
	close(ready)
	s, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	for network, exchange := range exchangers {
		q := ask("a.example", dns.TypeA, func(m *dns.Msg) { m.CheckingDisabled = network == "udp" })
		q[0] &^= 1 // ids of the mock's lies are odd, some may be right by chance
		m := unpack(t, exchange(t, addr, q, patience))
		if len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "192.0.2.1" {
			t.Errorf("%s: answer %v, want the true one", network, m)
		}
	}
	if n := s.Stats().Mismatched; n < 50 {
		t.Errorf("%d mismatches were counted, want more", n)
	}
}

// TestForgery holds that a flood of guesses is answered by asking over TCP.
func TestForgery(t *testing.T) {
	up := newMock(t, func(q []byte, tcp bool, send func([]byte)) {
		if tcp {
			send(reply(q, 0, "a. 60 IN A 192.0.2.1"))
			return
		}
		b := reply(q, 0, "a. 60 IN A 203.0.113.66")
		id := binary.BigEndian.Uint16(q)
		for i := range 400 {
			binary.BigEndian.PutUint16(b, id+1+uint16(i))
			send(b)
			if i%50 == 0 {
				time.Sleep(5 * time.Millisecond)
			}
		}
	})
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	m := unpack(t, exchangeUDP(t, addr, ask("a", dns.TypeA), patience))
	if len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "192.0.2.1" {
		t.Errorf("answer %v, want the true one", m)
	}
	if _, tcp := up.seen(); tcp == 0 {
		t.Error("TCP was not used")
	}
}

// TestPortsAndIDs holds that every query has a port and an id of its own, with
// no pattern (RFC 5452 §9.2).
func TestPortsAndIDs(t *testing.T) {
	up := newMock(t, answerWith(dns.RcodeNameError))
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	c, err := net.Dial("udp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const n = 3000
	b := make([]byte, 512)
	for i := range n {
		c.Write(ask(fmt.Sprintf("n%d", i), dns.TypeA))
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(b); err != nil {
			t.Fatal(err)
		}
	}
	up.mu.Lock()
	defer up.mu.Unlock()
	if len(up.ids) != n {
		t.Errorf("%d queries came, want %d", len(up.ids), n)
	}
	// Among 3000 draws of 65536 ids about 67 repeat, of 28232 ports 154.
	var idBins, portBins [16]int
	ids, steps, repeats := make(map[uint16]bool), make(map[uint16]int), 0
	for i, id := range up.ids {
		if ids[id] {
			repeats++
		}
		ids[id] = true
		idBins[id>>12]++
		if i > 0 {
			steps[id-up.ids[i-1]]++
		}
	}
	for a := range up.from {
		portBins[a.Port()%16]++
	}
	if repeats > 130 {
		t.Errorf("%d of %d ids repeat", repeats, n)
	}
	for step, k := range steps {
		if k > 6 {
			t.Errorf("the difference %d of ids came %d times", step, k)
		}
	}
	if len(up.from) < n-350 {
		t.Errorf("%d ports were used for %d queries", len(up.from), n)
	}
	// Chi squared with 15 degrees of freedom is below 45 but for one time in
	// ten thousand.
	for what, bins := range map[string][16]int{"ids": idBins, "ports": portBins} {
		total, chi := 0, 0.0
		for _, k := range bins {
			total += k
		}
		even := float64(total) / 16
		for _, k := range bins {
			chi += (float64(k) - even) * (float64(k) - even) / even
		}
		if chi > 45 {
			t.Errorf("%s are spread unevenly: %v, chi squared %.1f", what, bins, chi)
		}
	}
}

// TestUpstreamFaults asks upstreams that are closed, silent or half there,
// over real sockets.
func TestUpstreamFaults(t *testing.T) {
	silent, l := listenBoth(t)
	defer silent.Close()
	defer l.Close()
	gone, gl := listenBoth(t)
	closed := addrPort(gone.LocalAddr())
	gone.Close()
	gl.Close()
	good := newMock(t, fine)
	tcpOnly := newMock(t, func(q []byte, tcp bool, send func([]byte)) {
		b := reply(q, 0)
		if tcp {
			b = reply(q, 0, "a. 0 IN A 192.0.2.1")
		} else {
			b[2] |= bitTC
		}
		send(b)
	})
	for name, c := range map[string]struct {
		ups     []netip.AddrPort
		network string
		rcode   int
		tc      bool
		most    time.Duration
	}{
		"closed":             {[]netip.AddrPort{closed}, "udp", dns.RcodeServerFailure, false, quick},
		"closed tcp":         {[]netip.AddrPort{closed}, "tcp", dns.RcodeServerFailure, false, quick},
		"silent":             {[]netip.AddrPort{addrPort(silent.LocalAddr())}, "udp", dns.RcodeServerFailure, false, patience},
		"closed, good":       {[]netip.AddrPort{closed, good.addr}, "udp", 0, false, quick},
		"closed, good tcp":   {[]netip.AddrPort{closed, good.addr}, "tcp", 0, false, quick},
		"silent, good":       {[]netip.AddrPort{addrPort(silent.LocalAddr()), good.addr}, "udp", 0, false, quick},
		"silent, good tcp":   {[]netip.AddrPort{addrPort(silent.LocalAddr()), good.addr}, "tcp", 0, false, quick},
		"TC":                 {[]netip.AddrPort{tcpOnly.addr}, "udp", 0, true, quick},
		"TC, then tcp":       {[]netip.AddrPort{tcpOnly.addr}, "tcp", 0, false, quick},
		"IPv6 without route": {[]netip.AddrPort{netip.MustParseAddrPort("[2001:db8::1%no-such-if]:53"), good.addr}, "udp", 0, false, quick},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, addr := start(t, Config{Upstreams: c.ups})
			begin := time.Now()
			m := unpack(t, exchangers[c.network](t, addr, ask("a", dns.TypeA), patience))
			if took := time.Since(begin); m.Rcode != c.rcode || m.Truncated != c.tc || took > c.most {
				t.Errorf("rcode %d, TC %v after %v; want %d, %v within %v", m.Rcode, m.Truncated, took, c.rcode, c.tc, c.most)
			}
		})
	}
	t.Cleanup(func() {}) // parallel tests end before the sockets close
}

// TestRules holds what happens to messages that are no plain queries.
func TestRules(t *testing.T) {
	up := newMock(t, fine)
	s, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	q := ask("a", dns.TypeA)
	change := func(f func(b []byte)) []byte {
		b := bytes.Clone(q)
		f(b)
		return b
	}
	for name, c := range map[string]struct {
		msg   []byte
		rcode int // -1: no answer
	}{
		"answer":         {change(func(b []byte) { b[2] |= bitQR }), -1},
		"short":          {q[:11], -1},
		"empty":          {nil, -1},
		"NOTIFY":         {change(func(b []byte) { b[2] |= 4 << 3 }), dns.RcodeNotImplemented},
		"UPDATE":         {change(func(b []byte) { b[2] |= 5 << 3 }), dns.RcodeNotImplemented},
		"zero questions": {change(func(b []byte) { b[5] = 0 })[:headerLen], dns.RcodeFormatError},
		"two questions":  {append(change(func(b []byte) { b[5] = 2 }), q[headerLen:]...), dns.RcodeFormatError},
		"cut":            {q[:len(q)-1], dns.RcodeFormatError},
		"huge":           {append(bytes.Clone(q), make([]byte, 60000)...), dns.RcodeFormatError},
	} {
		wait := patience
		if c.rcode < 0 {
			wait = 100 * time.Millisecond
		}
		b := exchangeUDP(t, addr, c.msg, wait)
		if c.rcode < 0 {
			if b != nil {
				t.Errorf("%s: answer %x, want none", name, b)
			}
			continue
		}
		if m := unpack(t, b); m.Rcode != c.rcode || m.Opcode != int(c.msg[2]>>3&15) || !m.Response || m.Id != binary.BigEndian.Uint16(q) {
			t.Errorf("%s: answer %v, want rcode %d", name, m, c.rcode)
		}
	}
	if udp, _ := up.seen(); udp != 0 {
		t.Errorf("%d of these messages went upstream", udp)
	}
	if st := s.Stats(); st.Queries != 9 || st.Dropped != 3 || st.Malformed != 6 {
		t.Errorf("Stats() = %+v", st)
	}
}

// TestLoop holds that the server does not ask itself.
func TestLoop(t *testing.T) {
	var log lockedBuffer
	pc, l := listenBoth(t)
	s, err := New(Config{
		PacketConns: []net.PacketConn{pc}, Listeners: []net.Listener{l},
		Upstreams:  []netip.AddrPort{addrPort(pc.LocalAddr())},
		ResolvConf: t.TempDir() + "/none",
		Logger:     slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	m := unpack(t, exchangeUDP(t, addrPort(pc.LocalAddr()), ask("a", dns.TypeA), time.Second))
	if m.Rcode != dns.RcodeServerFailure || s.Stats().UpstreamQueries != 0 {
		t.Errorf("rcode %d after %d upstream queries; want SERVFAIL and none", m.Rcode, s.Stats().UpstreamQueries)
	}
	if !strings.Contains(log.String(), "server itself") {
		t.Errorf("log says %q", log.String())
	}
	// A loop by way of another server ends with the first question.
	a, al := listenBoth(t)
	_, b := start(t, Config{Upstreams: []netip.AddrPort{addrPort(a.LocalAddr())}})
	sa, err := New(Config{
		PacketConns: []net.PacketConn{a}, Listeners: []net.Listener{al},
		Upstreams: []netip.AddrPort{b}, ResolvConf: t.TempDir() + "/none",
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, sa)
	m = unpack(t, exchangeUDP(t, b, ask("a", dns.TypeA), patience))
	if n := sa.Stats().UpstreamQueries; m.Rcode != dns.RcodeServerFailure || n > 10 {
		t.Errorf("rcode %d after %d upstream queries; want SERVFAIL and few", m.Rcode, n)
	}
}

// TestNested holds that the host's resolver may have the address that guests
// know for ours, as it does when the host is itself in such a network.
func TestNested(t *testing.T) {
	up := newMock(t, fine)
	pc, l := listenBoth(t)
	l.Close()
	inner := alias{pc, up.pc.LocalAddr()}
	s, err := New(Config{PacketConns: []net.PacketConn{inner}, Upstreams: []netip.AddrPort{up.addr}, ResolvConf: t.TempDir() + "/none"})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	if m := unpack(t, exchangeUDP(t, addrPort(pc.LocalAddr()), ask("a", dns.TypeA), patience)); m.Rcode != 0 {
		t.Errorf("answer %v", m)
	}
}

// alias is a conn of a network in memory, that says it has another address.
type alias struct {
	net.PacketConn
	addr net.Addr
}

func (a alias) LocalAddr() net.Addr { return a.addr }

// TestIPv6Upstream asks an upstream on ::1.
func TestIPv6Upstream(t *testing.T) {
	pc, err := net.ListenPacket("udp6", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6 loopback: %v", err)
	}
	defer pc.Close()
	go func() {
		b := make([]byte, 512)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(reply(b[:n], 0, "a. 0 IN A 192.0.2.1"), from)
		}
	}()
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{addrPort(pc.LocalAddr())}})
	for range 5 {
		if m := unpack(t, exchangeUDP(t, addr, ask("a", dns.TypeA), patience)); len(m.Answer) != 1 {
			t.Errorf("answer %v", m)
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestManyWaiting holds the bound over real sockets, that what is known is
// answered meanwhile, and that nothing stays open.
func TestManyWaiting(t *testing.T) {
	release := make(chan struct{})
	up := newMock(t, func(q []byte, overTCP bool, send func([]byte)) {
		<-release
		fine(q, overTCP, send)
	})
	s, addr := start(t, Config{
		Upstreams: []netip.AddrPort{up.addr},
		Records:   map[string][]netip.Addr{"here": addrs("192.0.2.9")},
	})
	exchangeUDP(t, addr, ask("here", dns.TypeA), patience) // it runs
	fds, routines := openFiles(t), runtime.NumGoroutine()
	var conns []net.Conn
	for range 10 {
		c, err := net.Dial("udp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	for i := range 1000 {
		conns[i%10].Write(ask(fmt.Sprintf("n%d", i), dns.TypeA))
		// No faster than the socket's buffer holds.
		for s.Stats().Queries < uint64(max(i-40, 0)) {
			time.Sleep(100 * time.Microsecond)
		}
	}
	if m := unpack(t, exchangeUDP(t, addr, ask("here", dns.TypeA), patience)); len(m.Answer) != 1 {
		t.Errorf("local name under load: %v", m)
	}
	if n := s.Stats().InFlight; n != 512 {
		t.Errorf("%d in flight, want 512", n)
	}
	close(release)
	rcodes := make(map[int]int)
	for _, c := range conns {
		c.SetReadDeadline(time.Now().Add(patience))
		b := make([]byte, 512)
		for range 100 {
			n, err := c.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			rcodes[unpack(t, b[:n]).Rcode]++
		}
	}
	if rcodes[0] != 512 || rcodes[dns.RcodeServerFailure] != 488 {
		t.Errorf("rcodes %v, want 512 answers and 488 SERVFAIL", rcodes)
	}
	eventually(t, func() error {
		if n := openFiles(t) - 10; n > fds {
			return fmt.Errorf("%d files are open, %d before", n, fds)
		}
		if n := runtime.NumGoroutine(); n > routines+5 {
			return fmt.Errorf("%d goroutines, %d before", n, routines)
		}
		return nil
	})
}

func openFiles(t *testing.T) int {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// eventually waits for f to be content.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Error(err)
}

// TestPlainPacketConn uses conns that have nothing but net.PacketConn, as
// those of a stack in memory.
func TestPlainPacketConn(t *testing.T) {
	up := newMock(t, fine)
	pc, l := listenBoth(t)
	l.Close()
	s, err := New(Config{
		PacketConns: []net.PacketConn{struct{ net.PacketConn }{pc}},
		Upstreams:   []netip.AddrPort{up.addr}, ResolvConf: t.TempDir() + "/none",
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	if m := unpack(t, exchangeUDP(t, addrPort(pc.LocalAddr()), ask("a", dns.TypeA), patience)); len(m.Answer) != 1 {
		t.Errorf("answer %v", m)
	}
}

// TestBind holds that the hook prepares all sockets to upstreams.
func TestBind(t *testing.T) {
	var mu sync.Mutex
	calls := make(map[netip.AddrPort]int)
	up := newMock(t, fine)
	_, addr := start(t, Config{
		Upstreams: []netip.AddrPort{up.addr},
		Bind: func(fd int, remote netip.AddrPort) error {
			mu.Lock()
			calls[remote]++
			mu.Unlock()
			return unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 77}})
		},
	})
	for _, exchange := range exchangers {
		if m := unpack(t, exchange(t, addr, ask("a", dns.TypeA), patience)); len(m.Answer) != 1 {
			t.Errorf("answer %v", m)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if calls[up.addr] != 2 {
		t.Errorf("Bind was called %v, want twice for %v", calls, up.addr)
	}
	up.mu.Lock()
	defer up.mu.Unlock()
	for from := range up.from {
		if from.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 77}) {
			t.Errorf("query came from %v", from)
		}
	}
}

// TestRunFails holds that Run ends with an error when a conn is lost.
func TestRunFails(t *testing.T) {
	pc, l := listenBoth(t)
	s, err := New(Config{PacketConns: []net.PacketConn{pc}, Listeners: []net.Listener{l}, ResolvConf: t.TempDir() + "/none"})
	if err != nil {
		t.Fatal(err)
	}
	pc.Close()
	if err := s.Run(context.Background()); !errors.Is(err, net.ErrClosed) || !strings.HasPrefix(err.Error(), "dns: ") {
		t.Errorf("Run() = %v, want an error that wraps net.ErrClosed", err)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, a := range []netip.AddrPort{{}, netip.MustParseAddrPort("0.0.0.0:53"), netip.MustParseAddrPort("[::]:53"), netip.MustParseAddrPort("224.0.0.1:53")} {
		if _, err := New(Config{Upstreams: []netip.AddrPort{a}, ResolvConf: t.TempDir() + "/none"}); err == nil {
			t.Errorf("New with upstream %v succeeds", a)
		}
	}
	s, err := New(Config{Upstreams: []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("::ffff:192.0.2.1"), 0)}, ResolvConf: t.TempDir() + "/none"})
	if err != nil || len(s.Upstreams()) != 1 || s.Upstreams()[0].String() != "192.0.2.1:53" {
		t.Errorf("Upstreams() = %v, %v; want 192.0.2.1:53", s.Upstreams(), err)
	}
}
