package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/dns"
)

// A path is one way through the packet path. run moves n units over a network
// that is already up, and returns when all of them have arrived.
type path struct {
	name  string
	unit  string
	bytes int // of payload per unit
	start func(t testing.TB) (run func(n int))
	// budget is how many allocations a unit may cost.
	budget float64
}

// paths are the ways that are measured. Budgets have room for what the pools
// lose to the garbage collector, not for another allocation per unit.
var paths = []path{
	{name: "BulkUp", unit: "frames", bytes: 65000, start: bulkUp, budget: 0.9},
	{name: "BulkDown", unit: "frames", bytes: 65000, start: bulkDown, budget: 1.5},
	{name: "Request1", unit: "requests", bytes: 2 * message, start: requests(1), budget: 2.5},
	{name: "Request32", unit: "requests", bytes: 2 * message, start: requests(32), budget: 2.5},
	{name: "Connect", unit: "connections", start: connections(16), budget: 80},
	{name: "UDPUp", unit: "datagrams", bytes: 1400, start: udpUp, budget: 0.1},
	{name: "UDPDown", unit: "datagrams", bytes: 1400, start: udpDown, budget: 0.1},
	{name: "DNSLocal", unit: "queries", start: dnsQueries("host.usernet.internal."), budget: 0.2},
	{name: "DNSCached", unit: "queries", start: dnsQueries("www.example.org."), budget: 0.2},
	{name: "DNSNew", unit: "queries", start: dnsQueries("?.new.example.org."), budget: 6.5},
}

// BenchmarkPath measures every path: time, bytes and allocations per unit.
// GOMAXPROCS is 1, as it is in the command on small machines.
func BenchmarkPath(b *testing.B) {
	for _, p := range paths {
		b.Run(p.name, func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
			run := p.start(b)
			run(100)
			b.SetBytes(int64(p.bytes))
			b.ReportAllocs()
			b.ResetTimer()
			run(b.N)
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), p.unit+"/s")
		})
	}
}

// TestAllocationBudgets fails when a unit of some path costs more allocations
// than it is allowed.
func TestAllocationBudgets(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool forget at random")
	}
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			run := p.start(t)
			run(500)
			const n = 3000
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			run(n)
			runtime.ReadMemStats(&after)
			got := float64(after.Mallocs-before.Mallocs) / n
			t.Logf("%.2f allocations and %.0f bytes per unit", got, float64(after.TotalAlloc-before.TotalAlloc)/n)
			if got > p.budget {
				t.Errorf("%.2f allocations per unit, the budget is %.2f", got, p.budget)
			}
		})
	}
}

// bulkUp sends super-frames of the guest to a host that takes all.
func bulkUp(t testing.TB) func(int) {
	const size = 65000
	port := startHost(t, "sink")
	c := &conn{port: 40000, to: port}
	ready, done := make(chan struct{}), make(chan struct{}, 1)
	var left atomic.Int64
	var end uint32
	push := func() {
		idle := c.n.link.lock()
		for left.Load() > 0 && c.next-c.acked+size <= c.window {
			c.put(c.n.link.add(), header.TCPFlagAck|header.TCPFlagPsh, size)
			if left.Add(-1) == 0 {
				end = c.next
			}
		}
		c.n.link.unlock(idle)
	}
	n := newNetwork(t, 65520, func(_ *network, head []byte, rest int) {
		s, ok := parseTCP(head, rest)
		if !ok {
			return
		}
		if c.take(s) {
			c.send(header.TCPFlagAck, 0)
			close(ready)
			return
		}
		push()
		if end != 0 && c.acked == end {
			end = 0
			done <- struct{}{}
		}
	})
	c.n = n
	n.act(c.connect)
	n.wait(ready)
	return func(count int) {
		left.Store(int64(count))
		// The stack acknowledges the first byte, and the script goes on
		// in the link's callback.
		n.act(func() { c.send(header.TCPFlagAck|header.TCPFlagPsh, 1) })
		n.wait(done)
	}
}

// bulkDown takes what a host sends without end.
func bulkDown(t testing.TB) func(int) {
	port := startHost(t, "source")
	c := &conn{port: 40000, to: port}
	ready, done := make(chan struct{}), make(chan struct{}, 1)
	var left atomic.Int64
	n := newNetwork(t, 65520, func(_ *network, head []byte, rest int) {
		s, ok := parseTCP(head, rest)
		if !ok {
			return
		}
		if c.take(s) {
			close(ready)
			return
		}
		// An acknowledgement that is held back stops the host's sending
		// between runs.
		if s.payload == 0 || left.Load() <= 0 {
			return
		}
		c.send(header.TCPFlagAck, 0)
		if left.Add(-1) == 0 {
			done <- struct{}{}
		}
	})
	c.n = n
	n.act(c.connect)
	n.wait(ready)
	return func(count int) {
		left.Store(int64(count))
		n.act(func() { c.send(header.TCPFlagAck, 0) })
		n.wait(done)
	}
}

// requests exchanges small messages on some connections at once.
func requests(conns int) func(testing.TB) func(int) {
	return func(t testing.TB) func(int) {
		port := startHost(t, "echo")
		all := make([]*conn, conns)
		ready := make(chan struct{}, conns)
		done := make(chan struct{}, conns)
		var left, waiting atomic.Int64
		n := newNetwork(t, 65520, func(_ *network, head []byte, rest int) {
			s, ok := parseTCP(head, rest)
			if !ok {
				return
			}
			c := all[s.to-40000]
			if c.take(s) {
				c.send(header.TCPFlagAck, 0)
				ready <- struct{}{}
				return
			}
			if s.payload != message {
				return
			}
			if left.Add(-1) >= 0 {
				c.send(header.TCPFlagAck|header.TCPFlagPsh, message)
				return
			}
			c.send(header.TCPFlagAck, 0)
			if waiting.Add(-1) == 0 {
				done <- struct{}{}
			}
		})
		for i := range all {
			all[i] = &conn{n: n, port: uint16(40000 + i), to: port}
			n.act(all[i].connect)
			n.wait(ready)
		}
		return func(count int) {
			active := min(count, conns)
			left.Store(int64(count - active))
			waiting.Store(int64(active))
			for _, c := range all[:active] {
				n.act(func() { c.send(header.TCPFlagAck|header.TCPFlagPsh, message) })
			}
			n.wait(done)
		}
	}
}

// connections opens and closes connections, some at a time. The host closes
// first, as a server does.
func connections(parallel int) func(testing.TB) func(int) {
	return func(t testing.TB) func(int) {
		port := startHost(t, "close")
		const first, ports = 20000, 40000
		all := make([]conn, ports)
		var next atomic.Int64
		var left, open atomic.Int64
		done := make(chan struct{}, 1)
		var n *network
		begin := func() {
			i := int(next.Add(1)) % ports
			all[i] = conn{n: n, port: uint16(first + i), to: port}
			all[i].connect()
		}
		n = newNetwork(t, 65520, func(_ *network, head []byte, rest int) {
			s, ok := parseTCP(head, rest)
			if !ok {
				return
			}
			c := &all[s.to-first]
			if c.take(s) {
				c.send(header.TCPFlagAck, 0)
				return
			}
			if s.flags&header.TCPFlagFin == 0 {
				return
			}
			c.send(header.TCPFlagAck|header.TCPFlagFin, 0)
			if left.Add(-1) >= 0 {
				begin()
			} else if open.Add(-1) == 0 {
				done <- struct{}{}
			}
		})
		return func(count int) {
			active := min(count, parallel)
			left.Store(int64(count - active))
			open.Store(int64(active))
			for range active {
				n.act(begin)
			}
			n.wait(done)
		}
	}
}

const batch = 64

// udpUp sends datagrams of the guest to a host socket.
func udpUp(t testing.TB) func(int) {
	host, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	n := newNetwork(t, 65520, func(*network, []byte, int) {})
	to := netip.AddrPortFrom(gatewayAddr, uint16(host.LocalAddr().(*net.UDPAddr).Port))
	return func(count int) {
		for count > 0 {
			k := min(count, batch)
			idle := n.link.lock()
			for range k {
				putUDP(n.link.add(), 5000, to, nil, 1400)
			}
			n.link.unlock(idle)
			count -= k
			n.drained()
		}
	}
}

// drained waits until the engine has taken all frames.
func (n *network) drained() {
	for {
		n.link.mu.Lock()
		empty := n.link.read == len(n.link.frames)
		n.link.mu.Unlock()
		if empty {
			return
		}
		runtime.Gosched()
	}
}

// udpDown has a host socket send datagrams to the guest.
func udpDown(t testing.TB) func(int) {
	host, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	var arrived atomic.Int64
	n := newNetwork(t, 65520, func(_ *network, head []byte, rest int) {
		// Runs of datagrams come as one frame.
		arrived.Add(int64((len(head) - ethLen - ipLen - udpLen + rest + 1399) / 1400))
	})
	to := netip.AddrPortFrom(gatewayAddr, uint16(host.LocalAddr().(*net.UDPAddr).Port))
	idle := n.link.lock()
	putUDP(n.link.add(), 5000, to, nil, 10)
	n.link.unlock(idle)
	_, flow, err := host.ReadFromUDPAddrPort(make([]byte, 10))
	if err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, 1400)
	return func(count int) {
		for count > 0 {
			k := min(count, batch)
			want := arrived.Load() + int64(k)
			for range k {
				if _, err := host.WriteToUDPAddrPort(payload, flow); err != nil {
					t.Fatal(err)
				}
			}
			for end := time.Now().Add(time.Second); arrived.Load() < want; runtime.Gosched() {
				if time.Now().After(end) {
					t.Fatalf("%d datagrams are lost", want-arrived.Load())
				}
			}
			count -= k
		}
	}
}

// dnsQueries asks for one name, 64 times at once; where it has a question mark,
// for another each time.
func dnsQueries(name string) func(testing.TB) func(int) {
	return func(t testing.TB) func(int) {
		query := new(mdns.Msg).SetQuestion(name, mdns.TypeA)
		wire, err := query.Pack()
		if err != nil {
			t.Fatal(err)
		}
		var left, open atomic.Int64
		done := make(chan struct{}, 1)
		to := netip.AddrPortFrom(dnsAddr, 53)
		other := bytes.IndexByte(wire, '?')
		ask := func(n *network, port uint16) {
			if other >= 0 {
				wire[other] = byte(port) // all that wait at the same time differ
			}
			idle := n.link.lock()
			putUDP(n.link.add(), port, to, wire, len(wire))
			n.link.unlock(idle)
		}
		n := newNetwork(t, 65520, func(n *network, head []byte, _ int) {
			port := binary.BigEndian.Uint16(head[ethLen+ipLen+2:])
			if left.Add(-1) >= 0 {
				ask(n, port)
			} else if open.Add(-1) == 0 {
				done <- struct{}{}
			}
		})
		startDNS(t, n)
		return func(count int) {
			active := min(count, batch)
			left.Store(int64(count - active))
			open.Store(int64(active))
			for i := range active {
				ask(n, uint16(6000+i))
			}
			n.wait(done)
		}
	}
}

// answerNames answers every question with one address: for a new name for now
// only, for others for long.
func answerNames(conn *net.UDPConn) {
	b := make([]byte, 512)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		ttl := byte(200)
		if bytes.Contains(b[:n], []byte("\x03new")) {
			ttl = 0
		}
		b[2], b[3], b[7] = b[2]|0x80, 0x80, 1
		answer := append(b[:n], 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, ttl, 0, 4, 192, 0, 2, 7)
		conn.WriteToUDPAddrPort(answer, from)
	}
}

// startDNS serves DNS to the guest, with an upstream on the host's loopback.
func startDNS(t testing.TB, n *network) {
	t.Helper()
	upstream, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { upstream.Close() })
	go answerNames(upstream)
	conn, err := n.stk.ListenPacket(netip.AddrPortFrom(dnsAddr, 53))
	if err != nil {
		t.Fatal(err)
	}
	server, err := dns.New(dns.Config{
		PacketConns: []net.PacketConn{conn},
		Upstreams:   []netip.AddrPort{upstream.LocalAddr().(*net.UDPAddr).AddrPort()},
		Records:     map[string][]netip.Addr{"host.usernet.internal": {gatewayAddr}},
		Watch:       n.fwd.Watch,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("dns: %v", err)
		}
	})
}
