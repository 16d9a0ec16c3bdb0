package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// fakeNet is a network of upstreams in memory, for fake time.
type fakeNet struct {
	mu    sync.Mutex
	hosts map[netip.AddrPort]handler // nil: silent; none: refused
	asked []string                   // "N" for upstream 192.0.2.N, in order, with the time
	start time.Time
}

func host(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 53)
}

func (n *fakeNet) dial(_ context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	n.mu.Lock()
	h, ok := n.hosts[addr]
	n.asked = append(n.asked, fmt.Sprintf("%d@%d", addr.Addr().As4()[3], time.Since(n.start).Milliseconds()))
	n.mu.Unlock()
	if !ok {
		return nil, errors.New("connection refused")
	}
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		buf := make([]byte, maxMessage)
		for {
			var q []byte
			var err error
			if network == "tcp" {
				q, err = readFrame(far)
			} else {
				var k int
				k, err = far.Read(buf)
				q = bytes.Clone(buf[:k])
			}
			if err != nil {
				return
			}
			if h == nil {
				continue
			}
			go h(q, network == "tcp", func(b []byte) {
				if network == "tcp" {
					writeFrame(far, b)
				} else {
					far.Write(b)
				}
			})
		}
	}()
	return near, nil
}

// fakeConn is the guest's side in fake time: it hands on what is written.
type fakeConn struct {
	net.PacketConn
	out chan []byte
}

func (c *fakeConn) WriteTo(b []byte, _ net.Addr) (int, error) {
	c.out <- bytes.Clone(b)
	return len(b), nil
}

// bubble is a Server in fake time.
type bubble struct {
	*Server
	*fakeNet
	t *testing.T
}

// inBubble runs f with a Server that asks the first n hosts.
func inBubble(t *testing.T, n int, cfg Config, f func(t *testing.T, b *bubble)) {
	path := t.TempDir() + "/none"
	synctest.Test(t, func(t *testing.T) {
		fake := &fakeNet{hosts: make(map[netip.AddrPort]handler), start: time.Now()}
		for i := range n {
			cfg.Upstreams = append(cfg.Upstreams, host(i+1))
		}
		cfg.Dial = fake.dial
		cfg.ResolvConf = path
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		s.ctx = ctx
		f(t, &bubble{s, fake, t})
		cancel()
		s.tasks.Wait()
		time.Sleep(time.Minute)
		if n := s.inFlight.Load(); n != 0 {
			t.Errorf("%d queries are in flight at the end", n)
		}
		if n := s.lingering.Load(); n != 0 {
			t.Errorf("%d flights linger at the end", n)
		}
	})
}

// send sends a query and returns where the answer will be.
func (b *bubble) send(query []byte) chan []byte {
	c := &fakeConn{out: make(chan []byte, 10)}
	b.handle(query, client{conn: c}, overUDP, new(scratch))
	return c.out
}

// get sends a query and waits for the answer, whose rcode it returns with the
// time that it took.
func (b *bubble) get(query []byte) (*dns.Msg, time.Duration) {
	b.t.Helper()
	begin := time.Now()
	select {
	case msg := <-b.send(query):
		return unpack(b.t, msg), time.Since(begin)
	case <-time.After(time.Minute):
		b.t.Fatal("no answer in a minute")
		return nil, 0
	}
}

// after delays a handler.
func after(d time.Duration, h handler) handler {
	return func(q []byte, tcp bool, send func([]byte)) {
		time.Sleep(d)
		h(q, tcp, send)
	}
}

var fine = answerWith(dns.RcodeSuccess, "a. 0 IN A 192.0.2.1")

// TestFailover holds what comes of upstreams that work, lie dead, refuse or
// fail, and how soon.
func TestFailover(t *testing.T) {
	servFail := answerWith(dns.RcodeServerFailure)
	refused := answerWith(dns.RcodeRefused)
	none := handler(func([]byte, bool, func([]byte)) {}) // silent
	for name, c := range map[string]struct {
		hosts []handler // nil: refuses
		rcode int
		least time.Duration
		most  time.Duration
	}{
		"fine":                       {[]handler{fine}, 0, 0, 0},
		"fine, others not asked":     {[]handler{fine, none}, 0, 0, 0},
		"slow":                       {[]handler{after(4*time.Second, fine)}, 0, 4 * time.Second, 4 * time.Second},
		"too slow":                   {[]handler{after(10*time.Second, fine)}, dns.RcodeServerFailure, 4 * time.Second, 5 * time.Second},
		"dead, fine":                 {[]handler{none, fine}, 0, hedgeDelay, hedgeDelay},
		"dead, dead, fine":           {[]handler{none, none, fine}, 0, 0, time.Second},
		"7 dead, fine":               {[]handler{none, none, none, none, none, none, none, fine}, 0, 0, time.Second},
		"closed, fine":               {[]handler{nil, fine}, 0, 0, 0},
		"all closed":                 {[]handler{nil, nil, nil}, dns.RcodeServerFailure, 0, 0},
		"all dead":                   {[]handler{none, none, none}, dns.RcodeServerFailure, 4 * time.Second, 5 * time.Second},
		"closed, dead":               {[]handler{nil, none}, dns.RcodeServerFailure, 4 * time.Second, 5 * time.Second},
		"SERVFAIL, fine":             {[]handler{servFail, fine}, 0, 0, 0},
		"SERVFAIL, NXDOMAIN":         {[]handler{servFail, answerWith(dns.RcodeNameError)}, dns.RcodeNameError, 0, 0},
		"SERVFAIL, dead":             {[]handler{servFail, none}, dns.RcodeServerFailure, betterTime, betterTime},
		"SERVFAIL, closed":           {[]handler{servFail, nil}, dns.RcodeServerFailure, 0, 0},
		"SERVFAIL alone":             {[]handler{servFail}, dns.RcodeServerFailure, 0, 0},
		"REFUSED alone":              {[]handler{refused}, dns.RcodeRefused, 0, 0},
		"REFUSED by all":             {[]handler{refused, refused}, dns.RcodeRefused, 0, 0},
		"REFUSED, fine":              {[]handler{refused, fine}, 0, 0, 0},
		"NXDOMAIN, fine":             {[]handler{answerWith(dns.RcodeNameError), fine}, dns.RcodeNameError, 0, 0},
		"NODATA, fine":               {[]handler{answerWith(0), fine}, 0, 0, 0},
		"FORMERR, fine":              {[]handler{answerWith(dns.RcodeFormatError), fine}, dns.RcodeFormatError, 0, 0},
		"slow SERVFAIL, slower fine": {[]handler{after(100*time.Millisecond, servFail), after(200*time.Millisecond, fine)}, 0, 300 * time.Millisecond, 300 * time.Millisecond},
		"no upstreams":               {nil, dns.RcodeServerFailure, 0, 0},
	} {
		for _, network := range []string{"udp", "tcp"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				inBubble(t, len(c.hosts), Config{}, func(t *testing.T, b *bubble) {
					for i, h := range c.hosts {
						if h != nil {
							b.hosts[host(i+1)] = h
						}
					}
					var m *dns.Msg
					var took time.Duration
					q := ask("a", dns.TypeA)
					if network == "udp" {
						m, took = b.get(q)
					} else {
						begin := time.Now()
						m = unpack(t, b.getTCP(q))
						took = time.Since(begin)
					}
					if m.Rcode != c.rcode || took < c.least || took > c.most {
						t.Errorf("rcode %d after %v, want %d after %v to %v", m.Rcode, took, c.rcode, c.least, c.most)
					}
				})
			})
		}
	}
}

// TestRefusedIsAskedAgain holds that who refuses is asked again, less and less
// often, as long as another upstream is silent: it may just be starting.
func TestRefusedIsAskedAgain(t *testing.T) {
	silent := handler(func([]byte, bool, func([]byte)) {})
	refused := answerWith(dns.RcodeRefused)
	for name, c := range map[string]struct {
		before handler // nil: refuses the connection
		opens  time.Duration
		most   time.Duration
		rcode  int
		asked  int
	}{
		"closed, soon fine":  {nil, hedgeDelay + 400*time.Millisecond, 1500 * time.Millisecond, dns.RcodeSuccess, 3},
		"closed, later fine": {nil, 3 * time.Second, 4500 * time.Millisecond, dns.RcodeSuccess, 5},
		"closed for good":    {nil, time.Hour, flightTime, dns.RcodeServerFailure, 5},
		"REFUSED, soon fine": {refused, hedgeDelay + 400*time.Millisecond, hedgeDelay + betterTime, dns.RcodeSuccess, 3},
		"REFUSED for good":   {refused, time.Hour, hedgeDelay + betterTime, dns.RcodeRefused, 3},
	} {
		for _, network := range []string{"udp", "tcp"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				inBubble(t, 2, Config{}, func(t *testing.T, b *bubble) {
					b.hosts[host(1)] = silent
					if c.before != nil {
						b.hosts[host(2)] = c.before
					}
					opens := time.AfterFunc(c.opens, func() {
						b.mu.Lock()
						defer b.mu.Unlock()
						b.hosts[host(2)] = fine
					})
					defer opens.Stop()
					begin := time.Now()
					var m *dns.Msg
					if network == "udp" {
						m, _ = b.get(ask("a", dns.TypeA))
					} else {
						m = unpack(t, b.getTCP(ask("a", dns.TypeA)))
					}
					if took := time.Since(begin); m.Rcode != c.rcode || took > c.most {
						t.Errorf("rcode %d after %v, want %d within %v; asked %v", m.Rcode, took, c.rcode, c.most, b.asked)
					}
					asked := 0
					for _, a := range b.asked {
						if a[0] == '2' {
							asked++
						}
					}
					if asked != c.asked {
						t.Errorf("asked %v: the second %d times, want %d", b.asked, asked, c.asked)
					}
				})
			})
		}
	}
}

// getTCP sends query on a stream of its own.
func (b *bubble) getTCP(query []byte) []byte {
	near, far := net.Pipe()
	defer near.Close()
	st := &stream{conn: far, all: &b.streams, out: make(chan []byte, maxPipelined), slots: make(chan struct{}, maxPipelined)}
	b.tasks.Go(func() { b.serveStream(st) })
	if err := writeFrame(near, query); err != nil {
		b.t.Fatal(err)
	}
	msg, err := readFrame(near)
	if err != nil {
		b.t.Fatal(err)
	}
	return msg
}

// TestDeadIsRemembered holds that a dead upstream costs time once, is tried
// again at times without costing any, and gets its place back.
func TestDeadIsRemembered(t *testing.T) {
	inBubble(t, 2, Config{}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = nil
		b.hosts[host(2)] = fine
		q := ask("a", dns.TypeA)
		if _, took := b.get(q); took != hedgeDelay {
			t.Errorf("first query took %v, want %v", took, hedgeDelay)
		}
		time.Sleep(2 * time.Second)
		for range 600 {
			if _, took := b.get(q); took > 0 {
				t.Fatalf("a query took %v although the dead one is known", took)
			}
			time.Sleep(500 * time.Millisecond)
		}
		b.mu.Lock()
		tried := 0
		for _, a := range b.asked {
			if a[0] == '1' {
				tried++
			}
		}
		b.hosts[host(1)] = answerWith(dns.RcodeNameError)
		b.mu.Unlock()
		if tried < 4 || tried > 15 {
			t.Errorf("the dead one was tried %d times in 5 minutes, want 4 to 15", tried)
		}
		for range 300 { // both are asked, and either may be first
			time.Sleep(500 * time.Millisecond)
			b.get(q)
		}
		if m, _ := b.get(q); m.Rcode != dns.RcodeNameError {
			t.Error("the first upstream is back but is not asked first")
		}
	})
}

// TestSlowIsNotDead holds that an upstream that is slower than the hedge keeps
// its place.
func TestSlowIsNotDead(t *testing.T) {
	inBubble(t, 2, Config{}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = after(600*time.Millisecond, answerWith(dns.RcodeNameError))
		b.hosts[host(2)] = after(100*time.Millisecond, fine)
		for range 10 {
			if m, took := b.get(ask("a", dns.TypeA)); m.Rcode != 0 || took != hedgeDelay+100*time.Millisecond {
				t.Fatalf("rcode %d after %v", m.Rcode, took)
			}
			time.Sleep(3 * time.Second)
		}
		b.mu.Lock()
		b.hosts[host(1)] = answerWith(dns.RcodeNameError)
		b.mu.Unlock()
		if m, took := b.get(ask("a", dns.TypeA)); m.Rcode != dns.RcodeNameError || took != 0 {
			t.Errorf("rcode %d after %v: the first upstream lost its place", m.Rcode, took)
		}
	})
}

// TestOneBadNameIsNotDeath holds that a name that an upstream stays silent
// about does not cost it its place, if it answers others.
func TestOneBadNameIsNotDeath(t *testing.T) {
	inBubble(t, 2, Config{}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = func(q []byte, tcp bool, send func([]byte)) {
			if !bytes.Contains(q, []byte("bad")) {
				answerWith(dns.RcodeNameError)(q, tcp, send)
			}
		}
		b.hosts[host(2)] = fine
		out := b.send(ask("bad", dns.TypeA))
		time.Sleep(100 * time.Millisecond)
		b.get(ask("a", dns.TypeA))
		<-out
		time.Sleep(3 * time.Second)
		if m, _ := b.get(ask("a", dns.TypeA)); m.Rcode != dns.RcodeNameError {
			t.Error("the first upstream lost its place")
		}
	})
}

// TestMerge holds that equal questions at one time make one query, and that
// each asker gets its answer under its own id.
func TestMerge(t *testing.T) {
	inBubble(t, 1, Config{}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = after(50*time.Millisecond, fine)
		q := ask("a", dns.TypeA)
		var outs []chan []byte
		for i := range 20 {
			q[0], q[1] = byte(i), 7
			outs = append(outs, b.send(q))
		}
		q[0] = 3
		again := b.send(q) // a retransmit
		other := b.send(ask("A", dns.TypeA))
		for i, out := range outs {
			if m := <-out; m[0] != byte(i) || m[1] != 7 {
				t.Errorf("asker %d got id %x", i, m[:2])
			}
		}
		if m := <-again; m[0] != 3 {
			t.Error("the retransmit got no answer of its own")
		}
		if m := unpack(t, <-other); m.Question[0].Name != "A." {
			t.Error("another spelling got the answer to this one")
		}
		if len(b.asked) != 2 {
			t.Errorf("upstream was asked %v, want twice", b.asked)
		}
	})
}

// TestOverload holds the bound on waiting queries.
func TestOverload(t *testing.T) {
	inBubble(t, 1, Config{MaxInFlight: 10}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = after(4*time.Second, fine)
		begin := time.Now()
		var outs []chan []byte
		for i := range 30 {
			outs = append(outs, b.send(ask(fmt.Sprintf("n%d", i%15), dns.TypeA)))
		}
		good, bad := 0, 0
		for i, out := range outs {
			m := unpack(t, <-out)
			switch {
			case m.Rcode == dns.RcodeServerFailure && i >= 10:
				bad++
			case m.Rcode == 0:
				good++
			}
		}
		if good != 10 || bad != 20 || time.Since(begin) != 4*time.Second {
			t.Errorf("%d answered, %d refused after %v; want 10, 20 after 4 s", good, bad, time.Since(begin))
		}
		if m, _ := b.get(ask("a", dns.TypeA)); m.Rcode != 0 {
			t.Error("no answer after the load is gone")
		}
	})
}

// TestCacheAging holds what clients see of TTLs as time goes by.
func TestCacheAging(t *testing.T) {
	inBubble(t, 1, Config{}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = func(q []byte, tcp bool, send func([]byte)) {
			if bytes.Contains(q, []byte("gone")) {
				answerWith(dns.RcodeNameError, "ns: x. 100 IN SOA a. b. 1 2 3 4 20")(q, tcp, send)
			} else {
				answerWith(dns.RcodeSuccess, "a. 100 IN A 192.0.2.1")(q, tcp, send)
			}
		}
		q, gone := ask("a", dns.TypeA), ask("gone", dns.TypeA)
		for range 3 {
			at := len(b.asked)
			b.get(q)
			b.get(gone)
			time.Sleep(19 * time.Second)
			if m, _ := b.get(q); m.Answer[0].Header().Ttl != 81 {
				t.Errorf("TTL after 19 s = %d, want 81", m.Answer[0].Header().Ttl)
			}
			if m, _ := b.get(gone); m.Rcode != dns.RcodeNameError || m.Ns[0].Header().Ttl != 81 {
				t.Errorf("negative answer after 19 s = %v", m)
			}
			if len(b.asked) != at+2 {
				t.Errorf("asked %d times within the TTLs, want 2", len(b.asked)-at)
			}
			time.Sleep(2 * time.Second)
			b.get(gone)
			if len(b.asked) != at+3 {
				t.Error("negative answer outlived its TTL")
			}
			time.Sleep(time.Hour)
		}
	})
}

// TestCookiesAreNotCached asks twice with an option.
func TestCookiesAreNotCached(t *testing.T) {
	inBubble(t, 1, Config{}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = answerWith(dns.RcodeSuccess, "a. 100 IN A 192.0.2.1")
		q := ask("a", dns.TypeA, func(m *dns.Msg) {
			m.SetEdns0(1232, false)
			m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"})
		})
		b.get(q)
		b.get(q)
		if len(b.asked) != 2 {
			t.Errorf("upstream was asked %v, want twice", b.asked)
		}
	})
}

// TestPermit holds that nothing is sent where the policy forbids it.
func TestPermit(t *testing.T) {
	var forbidden netip.AddrPort
	permit := func(a netip.AddrPort) error {
		if a == forbidden || !forbidden.IsValid() {
			return errors.New("denied")
		}
		return nil
	}
	inBubble(t, 2, Config{Permit: permit}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)], b.hosts[host(2)] = fine, fine
		m, took := b.get(ask("a", dns.TypeA, withEDNS(1232, false)))
		if m.Rcode != dns.RcodeServerFailure || took != 0 || len(b.asked) != 0 {
			t.Errorf("rcode %d after %v, asked %v; want SERVFAIL at once", m.Rcode, took, b.asked)
		}
		if ede, ok := m.IsEdns0().Option[0].(*dns.EDNS0_EDE); !ok || ede.InfoCode != dns.ExtendedErrorCodeProhibited {
			t.Errorf("extended error = %v, want Prohibited", m.IsEdns0())
		}
		forbidden = host(1)
		if m, took := b.get(ask("a", dns.TypeA)); m.Rcode != 0 || took != 0 || len(b.asked) != 1 || b.asked[0][0] != '2' {
			t.Errorf("rcode %d after %v, asked %v", m.Rcode, took, b.asked)
		}
	})
}

// TestRedirect holds that who waits for upstreams of old is answered by the new.
func TestRedirect(t *testing.T) {
	inBubble(t, 1, Config{}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = nil
		b.hosts[host(2)] = fine
		out := b.send(ask("a", dns.TypeA))
		time.Sleep(time.Second)
		begin := time.Now()
		b.setUpstreams([]netip.AddrPort{host(2)})
		if m := unpack(t, <-out); m.Rcode != 0 || time.Since(begin) != 0 {
			t.Errorf("rcode %d after %v", m.Rcode, time.Since(begin))
		}
	})
}

// TestFlush holds that what old upstreams said does not outlive them.
func TestFlush(t *testing.T) {
	inBubble(t, 1, Config{}, func(t *testing.T, b *bubble) {
		b.hosts[host(1)] = after(100*time.Millisecond, answerWith(dns.RcodeSuccess, "a. 100 IN A 192.0.2.1"))
		b.hosts[host(2)] = after(time.Second, answerWith(dns.RcodeNameError))
		b.get(ask("a", dns.TypeA))
		late := b.send(ask("late", dns.TypeA))
		b.setUpstreams([]netip.AddrPort{host(2)})
		if m := unpack(t, <-late); m.Rcode != 0 {
			t.Error("the old upstream's answer under way was lost")
		}
		for _, name := range []string{"a", "late"} {
			if m, _ := b.get(ask(name, dns.TypeA)); m.Rcode != dns.RcodeNameError {
				t.Errorf("%s: the old answer is still given", name)
			}
		}
	})
}

// TestOrder holds in which order upstreams are asked as they fail and return.
func TestOrder(t *testing.T) {
	u := makeUpstreams([]netip.AddrPort{host(1), host(2), host(3), host(4)}, nil)
	names := func(ups []*upstream) string {
		var s string
		for _, up := range ups {
			s += fmt.Sprint(up.addr.Addr().As4()[3])
		}
		return s
	}
	check := func(now time.Duration, want string, wantParallel int) {
		t.Helper()
		got, parallel := u.order(nil, overUDP, now)
		if names(got) != want || parallel != wantParallel {
			t.Errorf("order at %v = %s, %d; want %s, %d", now, names(got), parallel, want, wantParallel)
		}
	}
	check(0, "1234", 1)
	u.list[0].health[overUDP].fail(0)
	check(time.Second, "2341", 1)
	check(minRest, "2134", 2) // a probe
	check(minRest, "2341", 1) // only one
	u.list[0].health[overUDP].fail(minRest)
	check(2*minRest, "2341", 1)
	for _, up := range u.list[1:] {
		up.health[overUDP].fail(2 * minRest)
	}
	check(2*minRest+1, "1234", 4)
	u.list[2].health[overUDP].succeed(2*minRest + 2)
	check(2*minRest+2, "3124", 1)
	for range 100 {
		u.list[0].health[overUDP].fail(time.Hour)
	}
	if until := time.Duration(u.list[0].health[overUDP].downUntil.Load()); until != time.Hour+maxRest {
		t.Errorf("rests until %v, want %v", until, time.Hour+maxRest)
	}
	again := makeUpstreams([]netip.AddrPort{host(9), host(1)}, u)
	if again.list[1] != u.list[0] {
		t.Error("health is lost with the set")
	}
}
