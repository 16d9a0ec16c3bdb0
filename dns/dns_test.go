package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// start runs a Server for cfg, tweaked, on loopback and returns it and its
// address, the same for UDP and TCP.
func start(t testing.TB, cfg Config, tweaks ...func(*Server)) (*Server, netip.AddrPort) {
	t.Helper()
	pc, l := listenBoth(t)
	cfg.PacketConns = append(cfg.PacketConns, pc)
	cfg.Listeners = append(cfg.Listeners, l)
	if cfg.ResolvConf == "" {
		cfg.ResolvConf = t.TempDir() + "/none"
	}
	if cfg.Logger == nil && testing.Verbose() {
		cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, tweak := range tweaks {
		tweak(s)
	}
	run(t, s)
	return s, addrPort(pc.LocalAddr())
}

// run runs s until the test ends.
func run(t testing.TB, s *Server) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run() = %v, want nil", err)
			}
		case <-time.After(time.Minute):
			t.Error("Run does not end")
		}
		if n := s.inFlight.Load(); n != 0 {
			t.Errorf("after Run %d queries are in flight", n)
		}
		if n := s.lingering.Load(); n != 0 {
			t.Errorf("after Run %d flights linger", n)
		}
	})
}

// listenBoth returns a UDP and a TCP listener on the same loopback port.
func listenBoth(t testing.TB) (*net.UDPConn, *net.TCPListener) {
	t.Helper()
	for range 50 {
		l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		pc, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: l.Addr().(*net.TCPAddr).Port})
		if err == nil {
			return pc, l
		}
		l.Close()
	}
	t.Fatal("found no port that is free for UDP and TCP")
	return nil, nil
}

// mock is an upstream whose answers a test decides on.
type mock struct {
	addr netip.AddrPort
	pc   *net.UDPConn
	l    *net.TCPListener

	mu   sync.Mutex
	udp  int // queries seen
	tcp  int
	from map[netip.AddrPort]int
	ids  []uint16
}

// handler gets a query and sends any number of messages as answers.
type handler func(query []byte, overTCP bool, send func([]byte))

// newMock starts an upstream on loopback.
func newMock(t testing.TB, h handler) *mock {
	t.Helper()
	m := &mock{from: make(map[netip.AddrPort]int)}
	m.pc, m.l = listenBoth(t)
	m.addr = addrPort(m.pc.LocalAddr())
	var tasks sync.WaitGroup
	tasks.Go(func() {
		buf := make([]byte, maxMessage)
		for {
			n, from, err := m.pc.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			q := append([]byte(nil), buf[:n]...)
			m.mu.Lock()
			m.udp++
			m.from[from]++
			m.ids = append(m.ids, binary.BigEndian.Uint16(q))
			m.mu.Unlock()
			tasks.Go(func() { h(q, false, func(b []byte) { m.pc.WriteToUDPAddrPort(b, from) }) })
		}
	})
	tasks.Go(func() {
		for {
			c, err := m.l.Accept()
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(time.Minute))
				for {
					q, err := readFrame(c)
					if err != nil {
						return
					}
					m.mu.Lock()
					m.tcp++
					m.mu.Unlock()
					h(q, true, func(b []byte) { writeFrame(c, b) })
				}
			})
		}
	})
	t.Cleanup(func() {
		m.pc.Close()
		m.l.Close()
		tasks.Wait()
	})
	return m
}

// seen returns how many queries came over UDP and TCP.
func (m *mock) seen() (udp, tcp int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.udp, m.tcp
}

func readFrame(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

func writeFrame(w io.Writer, b []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	return err
}

// ask makes a query message.
func ask(name string, qtype uint16, change ...func(*dns.Msg)) []byte {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), qtype)
	for _, f := range change {
		f(m)
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func withEDNS(size uint16, do bool) func(*dns.Msg) {
	return func(m *dns.Msg) { m.SetEdns0(size, do) }
}

// reply makes an answer to query out of records in zone-file format. A record
// may have a section in front: "ns: " or "ar: ".
func reply(query []byte, rcode int, records ...string) []byte {
	q, m := new(dns.Msg), new(dns.Msg)
	if err := q.Unpack(query); err != nil {
		panic(err)
	}
	m.SetRcode(q, rcode)
	m.RecursionAvailable = true
	m.Compress = true
	if o := q.IsEdns0(); o != nil {
		m.SetEdns0(4096, o.Do())
	}
	for _, r := range records {
		section := &m.Answer
		if s, ok := strings.CutPrefix(r, "ns: "); ok {
			r, section = s, &m.Ns
		} else if s, ok := strings.CutPrefix(r, "ar: "); ok {
			r, section = s, &m.Extra
		}
		rr, err := dns.NewRR(r)
		if err != nil {
			panic(err)
		}
		*section = append(*section, rr)
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// answerWith makes a handler that always gives the same records.
func answerWith(rcode int, records ...string) handler {
	return func(q []byte, _ bool, send func([]byte)) { send(reply(q, rcode, records...)) }
}

// exchangeUDP sends query to addr and returns the answer, nil if none comes in time.
func exchangeUDP(t testing.TB, addr netip.AddrPort, query []byte, wait time.Duration) []byte {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(query); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(wait))
	b := make([]byte, maxMessage)
	n, err := c.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// exchangeTCP is exchangeUDP over a TCP connection of its own.
func exchangeTCP(t testing.TB, addr netip.AddrPort, query []byte, wait time.Duration) []byte {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr.String(), wait)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(wait))
	if err := writeFrame(c, query); err != nil {
		t.Fatal(err)
	}
	b, err := readFrame(c)
	if err != nil {
		t.Logf("read answer: %v", err)
		return nil
	}
	return b
}

// unpack decodes an answer that must be a good one.
func unpack(t testing.TB, b []byte) *dns.Msg {
	t.Helper()
	if b == nil {
		t.Fatal("no answer")
	}
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		t.Fatalf("unpack answer %x: %v", b, err)
	}
	return m
}

func addrs(list ...string) []netip.Addr {
	var as []netip.Addr
	for _, s := range list {
		as = append(as, netip.MustParseAddr(s))
	}
	return as
}
