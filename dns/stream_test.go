package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func dialTCP(t *testing.T, addr netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(time.Minute))
	t.Cleanup(func() { c.Close() })
	return c
}

// impatient makes a Server's streams end sooner than in life.
func impatient(s *Server) { s.streams.patience = time.Second }

// TestPipelining sends many queries at once and holds that all are answered,
// the quick ones before the slow, also after the client has shut its side.
func TestPipelining(t *testing.T) {
	up := newMock(t, func(q []byte, tcp bool, send func([]byte)) {
		if bytes.Contains(q, []byte("slow")) {
			time.Sleep(300 * time.Millisecond)
		}
		answerWith(0, "a. 0 IN A 192.0.2.1")(q, tcp, send)
	})
	_, addr := start(t, Config{
		Upstreams: []netip.AddrPort{up.addr},
		Records:   map[string][]netip.Addr{"here": addrs("192.0.2.9")},
	})
	c := dialTCP(t, addr)
	var all []byte
	const n = 100
	for i := range n {
		q := ask([]string{"slow", "here", fmt.Sprintf("n%d", i)}[i%3], dns.TypeA)
		binary.BigEndian.PutUint16(q, uint16(i))
		all = append(binary.BigEndian.AppendUint16(all, uint16(len(q))), q...)
	}
	go func() {
		// In pieces that end anywhere.
		for len(all) > 0 {
			k := min(len(all), 701)
			if _, err := c.Write(all[:k]); err != nil {
				return
			}
			all = all[k:]
		}
		c.CloseWrite()
	}()
	seen := make(map[uint16]bool)
	var first uint16
	for i := range n {
		b, err := readFrame(c)
		if err != nil {
			t.Fatalf("after %d answers: %v", i, err)
		}
		m := unpack(t, b)
		if m.Rcode != 0 || len(m.Answer) != 1 || seen[m.Id] {
			t.Errorf("answer %v", m)
		}
		if seen[m.Id] = true; i == 0 {
			first = m.Id
		}
	}
	if first%3 == 0 {
		t.Error("a slow query kept others waiting")
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: %v, want EOF", err)
	}
}

// TestStreamsEnd holds that streams that do nothing, or too slowly, or nonsense
// are closed in time.
func TestStreamsEnd(t *testing.T) {
	if streamPatience > 10*time.Second {
		t.Error("streams may be idle for more than 10 s")
	}
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{newMock(t, fine).addr}}, impatient)
	q := ask("a", dns.TypeA)
	framed := append([]byte{0, byte(len(q))}, q...)
	for name, c := range map[string]struct {
		play func(c *net.TCPConn)
		most time.Duration
	}{
		"idle": {func(*net.TCPConn) {}, 30 * time.Second},
		"idle after a query": {func(c *net.TCPConn) {
			c.Write(framed)
			readFrame(c)
		}, 30 * time.Second},
		"a byte at a time": {func(c *net.TCPConn) {
			for i := range framed {
				if _, err := c.Write(framed[i : i+1]); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		}, 30 * time.Second},
		"length 0":     {func(c *net.TCPConn) { c.Write([]byte{0, 0}) }, 30 * time.Second},
		"length 11":    {func(c *net.TCPConn) { c.Write(append([]byte{0, 11}, q[:11]...)) }, 30 * time.Second},
		"an answer":    {func(c *net.TCPConn) { c.Write(append([]byte{0, byte(len(q))}, reply(q, 0)...)) }, 30 * time.Second},
		"half a frame": {func(c *net.TCPConn) { c.Write(framed[:10]); c.CloseWrite() }, 30 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := dialTCP(t, addr)
			begin := time.Now()
			done := make(chan struct{})
			go func() { defer close(done); c.play(conn) }()
			io.Copy(io.Discard, conn)
			if took := time.Since(begin); took > c.most {
				t.Errorf("open for %v, want at most %v", took, c.most)
			}
			conn.Close()
			<-done
		})
	}
}

// TestManyStreams opens more connections than are allowed: those that do
// nothing give way.
func TestManyStreams(t *testing.T) {
	s, addr := start(t, Config{Records: map[string][]netip.Addr{"here": addrs("192.0.2.9")}})
	for range 300 {
		dialTCP(t, addr)
	}
	if m := unpack(t, exchangeTCP(t, addr, ask("here", dns.TypeA), patience)); len(m.Answer) != 1 {
		t.Errorf("answer %v", m)
	}
	if n := s.Stats().Streams; n > maxStreams {
		t.Errorf("%d streams are open, want at most %d", n, maxStreams)
	}
}

// TestSlowReader holds that a client that asks for much and reads nothing is
// cut off, with bounded memory, while others are served.
func TestSlowReader(t *testing.T) {
	var huge []string
	for range 250 {
		huge = append(huge, "huge. 60 IN TXT \""+strings.Repeat("x", 240)+"\"")
	}
	s, addr := start(t, Config{
		Upstreams: []netip.AddrPort{newMock(t, answerWith(0, huge...)).addr},
		Records:   map[string][]netip.Addr{"here": addrs("192.0.2.9")},
	}, impatient)
	q := ask("huge", dns.TypeTXT)
	if b := exchangeTCP(t, addr, q, patience); len(b) < 60000 {
		t.Fatalf("%d bytes", len(b))
	}
	frames := bytes.Repeat(append([]byte{0, byte(len(q))}, q...), 2000)
	for range 8 {
		c := dialTCP(t, addr)
		go c.Write(frames)
	}
	time.Sleep(300 * time.Millisecond)
	// A stream is cut off by the answer that takes it past its share.
	if n := s.streams.unsent.Load(); n > maxUnsent+8*(fairUnsent+math.MaxUint16) {
		t.Errorf("%d bytes are waiting for slow readers", n)
	}
	if m := unpack(t, exchangeTCP(t, addr, ask("here", dns.TypeA), patience)); len(m.Answer) != 1 {
		t.Errorf("answer %v", m)
	}
	eventually(t, func() error {
		if n := s.Stats().Streams; n > 0 {
			return fmt.Errorf("%d streams are still open", n)
		}
		if n := s.streams.unsent.Load(); n != 0 {
			return fmt.Errorf("%d bytes are unsent with no streams", n)
		}
		return nil
	})
}

// TestTransfer relays zone transfers: answers of many messages.
func TestTransfer(t *testing.T) {
	const soa = "z. 60 IN SOA a. b. 7 2 3 4 5"
	up := newMock(t, func(q []byte, tcp bool, send func([]byte)) {
		m := new(dns.Msg)
		m.Unpack(q)
		switch {
		case !tcp:
			answerWith(dns.RcodeRefused)(q, tcp, send)
		case m.Question[0].Name == "refused.":
			answerWith(dns.RcodeRefused)(q, tcp, send)
		case m.Question[0].Qtype == dns.TypeIXFR:
			answerWith(0, soa)(q, tcp, send)
		default:
			send(reply(q, 0, soa, "z. 60 IN NS a."))
			var texts []string
			for range 200 {
				texts = append(texts, "z. 60 IN TXT \""+strings.Repeat("x", 240)+"\"")
			}
			for range 60 {
				send(reply(q, 0, texts...))
			}
			send(reply(q, 0, soa))
		}
	})
	s, addr := start(t, Config{Upstreams: []netip.AddrPort{up.addr}}, impatient)
	records := func(name string, qtype uint16, n int) int {
		c := dialTCP(t, addr)
		q := ask(name, qtype)
		if qtype == dns.TypeIXFR {
			q = ask(name, qtype, func(m *dns.Msg) { m.SetIxfr("z.", 7, "a.", "b.") })
		}
		writeFrame(c, q)
		total := 0
		for range n {
			b, err := readFrame(c)
			if err != nil {
				t.Fatalf("%s %d after %d records: %v", name, qtype, total, err)
			}
			total += len(unpack(t, b).Answer)
		}
		writeFrame(c, ask("refused", dns.TypeAXFR)) // the stream goes on
		if b, err := readFrame(c); err != nil || unpack(t, b).Rcode != dns.RcodeRefused {
			t.Errorf("%s %d: next query: %v", name, qtype, err)
		}
		return total
	}
	if n := records("z", dns.TypeAXFR, 62); n != 12003 {
		t.Errorf("AXFR gives %d records, want 12003", n)
	}
	if n := records("z", dns.TypeIXFR, 1); n != 1 {
		t.Errorf("IXFR gives %d records, want 1", n)
	}
	eventually(t, func() error {
		if n := s.Stats().InFlight; n != 0 {
			return fmt.Errorf("%d in flight", n)
		}
		return nil
	})
	// A client that leaves in the middle.
	c := dialTCP(t, addr)
	writeFrame(c, ask("z", dns.TypeAXFR))
	readFrame(c)
	c.Close()
	eventually(t, func() error {
		if st := s.Stats(); st.InFlight+st.Streams != 0 {
			return fmt.Errorf("%d in flight, %d streams", st.InFlight, st.Streams)
		}
		return nil
	})
	_, lone := start(t, Config{})
	if m := unpack(t, exchangeTCP(t, lone, ask("z", dns.TypeAXFR), patience)); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("AXFR without upstream: rcode %d", m.Rcode)
	}
}
