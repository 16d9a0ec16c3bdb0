package dns

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// TestSocketsAreReused holds that sockets serve one question after the other,
// each from another port, undisturbed by what came late, and go when idle.
func TestSocketsAreReused(t *testing.T) {
	up := newMock(t, func(q []byte, tcp bool, send func([]byte)) {
		m := new(dns.Msg)
		m.Unpack(q)
		send(reply(q, 0, m.Question[0].Name+" 0 IN A 192.0.2.1"))
		for range 5 {
			send(reply(q, dns.RcodeNameError))
		}
	})
	s, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	exchangeUDP(t, addr, ask("a", dns.TypeA), patience)
	files := openFiles(t)
	const n = 500
	for i := range n {
		m := unpack(t, exchangeUDP(t, addr, ask(fmt.Sprintf("n%d", i), dns.TypeA), patience))
		if m.Rcode != 0 || len(m.Answer) != 1 {
			t.Fatalf("query %d: %v", i, m)
		}
	}
	s.sockets.mu.Lock()
	made := s.sockets.serial
	s.sockets.mu.Unlock()
	up.mu.Lock()
	ports := len(up.from)
	up.mu.Unlock()
	if ports < n*95/100 {
		t.Errorf("%d queries came from %d ports", n, ports)
	}
	t.Logf("%d sockets were made for %d queries", made, n)
	eventually(t, func() error {
		s.sockets.mu.Lock()
		idle, waiting := len(s.sockets.idle), len(s.sockets.all)-len(s.sockets.idle)
		s.sockets.mu.Unlock()
		if files := openFiles(t) - files; idle+waiting > 0 || files > 0 {
			return fmt.Errorf("%d sockets idle, %d waiting, %d files more than before", idle, waiting, files)
		}
		return nil
	})
}

// TestSocketsSaved holds that under load most questions need no new socket.
func TestSocketsSaved(t *testing.T) {
	up := newMock(t, fine)
	s, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}})
	for i := range 500 {
		exchangeUDP(t, addr, ask(fmt.Sprintf("n%d", i), dns.TypeA), patience)
	}
	s.sockets.mu.Lock()
	defer s.sockets.mu.Unlock()
	if made := s.sockets.serial; made > 50 {
		t.Errorf("%d sockets were made for 500 queries", made)
	}
}

func TestZoneIndex(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no IPv6: %v", err)
	}
	defer unix.Close(fd)
	for zone, want := range map[string]uint32{"lo": 1, "7": 7} {
		if got, err := zoneIndex(fd, zone); got != want || err != nil {
			t.Errorf("zoneIndex(%q) = %d, %v; want %d", zone, got, err, want)
		}
	}
	for _, zone := range []string{"no-such-if", "", strings.Repeat("x", 100)} {
		if got, err := zoneIndex(fd, zone); err == nil {
			t.Errorf("zoneIndex(%q) = %d, want an error", zone, got)
		}
	}
}

// TestEverythingAtOnce changes all that can change while queries flow; it is
// for the race detector.
func TestEverythingAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, path, conf(1))
	mocks := make(map[netip.AddrPort]netip.AddrPort)
	for i, h := range []handler{
		fine, answerWith(dns.RcodeServerFailure),
		answerWith(0, "a. 300 IN A 192.0.2.1"),
		func([]byte, bool, func([]byte)) {},
	} {
		mocks[host(i+1)] = newMock(t, h).addr
	}
	followed, addr1 := start(t, Config{ResolvConf: path, CacheEntries: 20,
		Dial: func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, mocks[addr].String())
		}})
	fixed, addr2 := start(t, Config{ResolvConf: path, CacheEntries: 20,
		Upstreams: []netip.AddrPort{mocks[host(4)], mocks[host(2)], mocks[host(1)]}})

	var tasks sync.WaitGroup
	var answers atomic.Int64
	end := time.Now().Add(2 * time.Second)
	loop := func(f func(i int)) {
		tasks.Go(func() {
			for i := 0; time.Now().Before(end); i++ {
				f(i)
			}
		})
	}
	for _, addr := range []netip.AddrPort{addr1, addr2} {
		for range 4 {
			loop(func(i int) {
				if exchangeUDP(t, addr, ask(fmt.Sprintf("n%d.example", i%50), dns.TypeA), patience) != nil {
					answers.Add(1)
				}
			})
		}
		loop(func(i int) {
			c, err := net.DialTimeout("tcp", addr.String(), time.Second)
			if err != nil {
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			writeFrame(c, ask(fmt.Sprintf("n%d.example", i%7), dns.TypeA))
			if i%3 > 0 {
				if _, err := readFrame(c); err == nil {
					answers.Add(1)
				}
			}
		})
	}
	for _, s := range []*Server{followed, fixed} {
		loop(func(i int) {
			s.SetRecord(fmt.Sprintf("n%d.example", i%10), addrs("192.0.2.1")...)
			s.RemoveRecord(fmt.Sprintf("n%d.example", (i+5)%10))
			s.Stats()
			s.Search()
			s.Upstreams()
			s.Records()
			time.Sleep(time.Millisecond)
		})
	}
	loop(func(i int) {
		write(t, path, conf(1+i%4)+conf(1+(i+1)%4)+fmt.Sprintf("search d%d\n", i%3))
		time.Sleep(20 * time.Millisecond)
	})
	tasks.Wait()
	if answers.Load() < 100 {
		t.Errorf("only %d answers came", answers.Load())
	}
	if n := followed.Stats().InFlight + fixed.Stats().InFlight; n > 100 {
		t.Errorf("%d in flight at the end", n)
	}
}

// TestLogIsBounded holds that neither flapping upstreams nor hostile queries
// fill the log.
func TestLogIsBounded(t *testing.T) {
	var lines atomic.Int64
	var flip atomic.Int64
	up := newMock(t, fine)
	_, addr := start(t, Config{
		Upstreams: []netip.AddrPort{up.addr},
		Logger:    slog.New(slog.NewTextHandler(counter{&lines}, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Permit: func(netip.AddrPort) error {
			if flip.Add(1)%2 == 0 {
				return io.EOF
			}
			return nil
		},
		Dial: func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
			if flip.Load()%3 == 0 {
				return nil, io.EOF
			}
			return new(net.Dialer).DialContext(ctx, network, addr.String())
		},
	})
	for i := range 1000 {
		exchangeUDP(t, addr, ask(fmt.Sprintf("n%d", i), dns.TypeA), patience)
		exchangeUDP(t, addr, []byte("nonsense, but long enough"), 0)
	}
	if n := lines.Load(); n > 100 {
		t.Errorf("%d lines were logged", n)
	}
}

type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) {
	c.n.Add(1)
	return len(p), nil
}
