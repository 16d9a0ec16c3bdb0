package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// Holdings are connections that a guest keeps open.
type holding struct {
	Addr     string // of an echo server
	TCP, UDP int    // how many to open, or the number of those to use or close
	Both     int    // how many of the UDP sockets talk to a second server, Second
	Second   string
	Workers  int // how many to open at a time; 0 is one after the other
}

// twoServers is a UDP socket that talks to two servers.
type twoServers struct {
	*net.UDPConn
	servers [2]net.Addr
}

// outcome is what became of them, in the order in which they were opened.
type outcome struct {
	Good   int // of all
	Before int // of those before the first failure
	First  string
	Took   time.Duration
}

// kept are the connections of this node.
var kept struct {
	mu       sync.Mutex
	tcp, udp []net.Conn
}

// openFlows opens more connections, and has each carry something.
var openFlows = rig.NewFunc("e2e.openFlows", func(ctx context.Context, h holding) (outcome, error) {
	tcp, first := openAll(ctx, "tcp", h, h.TCP)
	udp, second := openAll(ctx, "udp", h, h.UDP)
	kept.mu.Lock()
	defer kept.mu.Unlock()
	kept.tcp, kept.udp = append(kept.tcp, tcp...), append(kept.udp, udp...)
	first.Good += second.Good
	if first.First == "" {
		first.First, first.Before = second.First, first.Before+second.Before
	}
	first.Took += second.Took
	return first, nil
}).Within(5 * time.Minute)

func openAll(ctx context.Context, network string, h holding, n int) (conns []net.Conn, o outcome) {
	began := time.Now()
	all, failures := make([]net.Conn, n), make([]error, n)
	each(n, h.Workers, func(i int) {
		if network == "udp" && i < h.Both {
			all[i], failures[i] = dialBoth([2]string{h.Addr, h.Second})
		} else {
			all[i], failures[i] = (&net.Dialer{Timeout: 20 * time.Second}).DialContext(ctx, network, h.Addr)
		}
		if failures[i] == nil {
			failures[i] = echo(all[i])
		}
	})
	o.Before = n
	for i, err := range failures {
		switch {
		case err == nil:
			o.Good++
			conns = append(conns, all[i])
			continue
		case all[i] != nil:
			all[i].Close()
		}
		if o.First == "" {
			o.First, o.Before = err.Error(), i
		}
	}
	o.Took = time.Since(began)
	return conns, o
}

func dialBoth(servers [2]string) (net.Conn, error) {
	var c twoServers
	for i, s := range servers {
		a, err := net.ResolveUDPAddr("udp4", s)
		if err != nil {
			return nil, err
		}
		c.servers[i] = a
	}
	var err error
	c.UDPConn, err = net.ListenUDP("udp4", nil)
	return c, err
}

// each calls f for every number below n, some at a time.
func each(n, workers int, f func(i int)) {
	var next atomic.Int64
	var work sync.WaitGroup
	for range max(workers, 1) {
		work.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				f(int(i))
			}
		})
	}
	work.Wait()
}

// echo has a connection carry something of its own there and back. Datagrams may
// be lost.
func echo(c net.Conn) error {
	two, ok := c.(twoServers)
	if !ok {
		return echoOf(c, c.Write, c.Read)
	}
	for _, server := range two.servers {
		write := func(b []byte) (int, error) { return two.WriteTo(b, server) }
		read := func(b []byte) (int, error) {
			n, from, err := two.ReadFrom(b)
			if err == nil && from.String() != server.String() {
				err = fmt.Errorf("%v answers for %v", from, server)
			}
			return n, err
		}
		if err := echoOf(c, write, read); err != nil {
			return err
		}
	}
	return nil
}

func echoOf(c net.Conn, write, read func([]byte) (int, error)) error {
	sent, got := make([]byte, 600), make([]byte, 600)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	_, datagrams := c.LocalAddr().(*net.UDPAddr)
	for try := range 6 {
		wait := 20 * time.Second
		if datagrams {
			wait = time.Second << try / 2
		}
		c.SetDeadline(time.Now().Add(wait))
		if _, err := write(sent); err != nil {
			return err
		}
		n := 0
		for n < len(got) {
			m, err := read(got[n:])
			if datagrams && errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return err
			}
			n += m
		}
		switch {
		case n < len(got):
		case bytes.Equal(sent, got):
			return nil
		default:
			return errors.New("something else came back")
		}
	}
	return errors.New("nothing came back")
}

// useFlows has all connections that are kept carry something more, at once.
var useFlows = rig.NewFunc("e2e.useFlows", func(_ context.Context, h holding) (outcome, error) {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	began := time.Now()
	all := append(append([]net.Conn(nil), kept.tcp...), kept.udp...)
	failures := make([]error, len(all))
	each(len(all), h.Workers, func(i int) { failures[i] = echo(all[i]) })
	o := outcome{Before: len(all), Took: time.Since(began)}
	for i, err := range failures {
		if err == nil {
			o.Good++
		} else if o.First == "" {
			o.First, o.Before = fmt.Sprintf("%v: %v", all[i].LocalAddr(), err), i
		}
	}
	return o, nil
}).Within(5 * time.Minute)

// closeFlows closes the first that were opened.
var closeFlows = rig.NewFunc("e2e.closeFlows", func(_ context.Context, h holding) (struct{}, error) {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	for _, k := range []struct {
		conns *[]net.Conn
		n     int
	}{{&kept.tcp, h.TCP}, {&kept.udp, h.UDP}} {
		n := min(k.n, len(*k.conns))
		for _, c := range (*k.conns)[:n] {
			c.Close()
		}
		*k.conns = (*k.conns)[n:]
	}
	return struct{}{}, nil
})

// moreFiles has the nodes of this test have so many descriptors, where that can be,
// and returns how many they have.
func moreFiles(t *testing.T, want uint64) uint64 {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur >= want {
		return limit.Cur
	}
	more := syscall.Rlimit{Cur: want, Max: max(limit.Max, want)}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &more); err != nil {
		more = syscall.Rlimit{Cur: limit.Max, Max: limit.Max}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &more); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) })
	return more.Cur
}

// TestManyFlows: as many flows as one likes at the same time, each of which carries
// its own. USERNET_FLOWS is how many of TCP, and as many of UDP. A process that may
// not have a socket for each has sockets of UDP talk to two servers.
func TestManyFlows(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ping", "dig")
	n := number(t, "USERNET_FLOWS", 300)
	long := os.Getenv("USERNET_FLOWS") != ""
	have := int(moreFiles(t, uint64(2*n+1000)))
	const others = 200 // descriptors that a process has for something else
	sockets := min(n, have-n-others)
	if 2*sockets < n {
		t.Skipf("%d descriptors are not enough for %d flows", have, n)
	}
	both := n - sockets
	if !long {
		both = n / 10
	}
	w := onTap(t)
	second := rig.Web4.Next().String()
	w.Internet.Must(t, "ip", "addr", "add", second, "dev", "lo")
	w.attach(t)
	worker := workerOf(t, w)
	alive(t, w, worker)
	before, files := holdings(t, w, worker), filesOf(t, w)
	h := holding{Addr: web(false, rig.Services.Echo), TCP: n, UDP: sockets, Both: both, Second: net.JoinHostPort(second, strconv.Itoa(rig.Services.Echo)), Workers: 32}
	all := n + sockets
	opened := openFlows.On(t, w.Guest, h)
	if opened.Good != all {
		t.Errorf("%d of %d sockets were opened: %s", opened.Good, all, opened.First)
	}
	var now held
	if !rig.Poll(5*time.Second, func() bool {
		now = holdings(t, w, worker)
		return now.Flows >= all && now.Goroutines <= before.Goroutines+20
	}) {
		t.Errorf("%+v, before %+v", now, before)
	}
	used := useFlows.On(t, w.Guest, h)
	if used.Good != all {
		t.Errorf("%d of %d sockets carried something: %s", used.Good, all, used.First)
	}
	if long {
		time.Sleep(12 * time.Second) // until memory is given back
		now = holdings(t, w, worker)
	}
	t.Logf("%d flows of TCP, %d of UDP by %d sockets: opened in %v, used in %v; idle %+v, before %+v: %.1f KB for each socket", n, sockets+both, sockets, opened.Took, used.Took, now, before, float64(now.Anon-before.Anon)/float64(all))
	closeFlows.On(t, w.Guest, h)
	var after held
	limit := 5 * time.Second
	if long {
		limit = 5 * time.Minute // UDP flows idle for three
	}
	if !rig.Poll(limit, func() bool {
		time.Sleep(100 * time.Millisecond)
		after = holdings(t, w, worker)
		left := before.Flows
		if !long {
			left += sockets
		}
		return after.Goroutines <= before.Goroutines+10 && after.Flows <= left+2 && filesOf(t, w) <= left+files+10 && (!long || after.Anon <= before.Anon+12<<10)
	}) {
		t.Errorf("not everything was given back: %+v, before %+v", after, before)
	}
	t.Logf("after %+v, descriptors %d, before %d: %s", after, filesOf(t, w), files, dropped(t, w))
	alive(t, w, worker)
}

// filesOf is how many descriptors the process that faces the guest has.
func filesOf(t *testing.T, w *world) int {
	t.Helper()
	var s struct {
		Process struct {
			Files int `json:"files_now"`
		}
	}
	if err := json.Unmarshal([]byte(mustCtl(t, w, "stats", "--json")), &s); err != nil {
		t.Fatal(err)
	}
	return s.Process.Files
}

// TestDescriptorsExhausted: when there are no descriptors left, new connections are
// refused, the others live on, and what ends makes room for new ones. The log says
// so, and not too often.
func TestDescriptorsExhausted(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "prlimit", "ping", "dig")
	w := onTap(t)
	a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{Flags: w.flags, Prefix: []string{"prlimit", "--nofile=128:128"}})
	worker := workerOf(t, w)
	h := holding{Addr: web(false, rig.Services.Echo), TCP: 300}
	opened := openFlows.On(t, w.Guest, h)
	if opened.Good < 30 || opened.Good > 127 || opened.Before != opened.Good || !strings.Contains(opened.First, "refused") {
		t.Errorf("%+v, want some and then none", opened)
	}
	// Datagrams come to nothing without a descriptor, and without a word for each.
	rig.BurstUDP.On(t, w.Guest, rig.UDPBurst{Addr: web(false, rig.Services.Echo), Sockets: 200, Each: 1, Size: 10})
	w.Guest.Must(t, "ping", "-c1", "-W5", w.Gateway4.String())
	if answers, text := dig(t, w.Guest, w.DNS4, "host.usernet.internal"); len(answers) != 1 {
		t.Errorf("DNS:\n%s", text)
	}
	if used := useFlows.On(t, w.Guest, h); used.Good != opened.Good {
		t.Errorf("%d of %d carry on: %s", used.Good, opened.Good, used.First)
	}
	wantIdle(t, w, a.PID)
	const room = 20
	closeFlows.On(t, w.Guest, holding{TCP: room})
	if !rig.Poll(5*time.Second, func() bool { return holdings(t, w, worker).Flows <= opened.Good-room+1 }) {
		t.Error("what is closed does not end")
	}
	again := openFlows.On(t, w.Guest, holding{Addr: h.Addr, TCP: room})
	if again.Good < room-2 { // a datagram may have taken one
		t.Errorf("after %d were closed: %+v", room, again)
	}
	if used := useFlows.On(t, w.Guest, h); used.Good != opened.Good-room+again.Good {
		t.Errorf("%d carry on: %s", used.Good, used.First)
	}
	if n := strings.Count(a.Stderr(), "descriptors"); n < 1 || n > 3 || strings.Count(a.Stderr(), "\n") > 20 {
		t.Errorf("%d words about descriptors in the log:\n%s", n, a.Stderr())
	}
	closeFlows.On(t, w.Guest, holding{TCP: 1000})
	if !rig.Poll(5*time.Second, func() bool { return holdings(t, w, worker).Flows <= 10 }) {
		t.Error("what is closed does not end")
	}
	alive(t, w, worker)
}
