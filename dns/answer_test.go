package dns

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// told collects what the Answered hook is told.
type told struct {
	mu  sync.Mutex
	all []string
}

func (o *told) answered(name string, addrs []netip.Addr, ttl time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all = append(o.all, fmt.Sprintf("%s%v%v", name, addrs, ttl))
}

func (o *told) take() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := strings.Join(o.all, "; ")
	o.all = nil
	return s
}

// TestAnswered: the hook learns the addresses of the name asked for, by whatever
// chain of aliases, before the guest has them: from upstreams, from the cache,
// and from local records.
func TestAnswered(t *testing.T) {
	for _, tt := range []struct {
		ask     string
		records []string
		want    string
	}{
		{"A.Test.", []string{"a.test. 60 IN A 192.0.2.1", "A.TEST. 50 IN A 192.0.2.2", "b.test. 9 IN A 192.0.2.3"}, "a.test[192.0.2.1 192.0.2.2]50s"},
		{"a.test.", []string{"a.test. 60 IN CNAME b.test.", "b.test. 30 IN CNAME C.test.", "c.test. 40 IN A 192.0.2.1"}, "a.test[192.0.2.1]30s"},
		{"a.test.", []string{"c.test. 40 IN A 192.0.2.1", "b.test. 30 IN CNAME c.test.", "a.test. 60 IN CNAME b.test."}, "a.test[192.0.2.1]30s"},
		{"a.test.", []string{"a.test. 60 IN CNAME b.test.", "b.test. 30 IN CNAME a.test."}, ""},
		{"a.test.", []string{"other.test. 60 IN A 192.0.2.1"}, ""},
		{"a.test.", []string{"a.test. 60 IN AAAA 2001:db8::1"}, "a.test[2001:db8::1]1m0s"},
		{"a.test.", []string{"a.test. 60 IN TXT x"}, ""},
		{`a\.test.`, []string{`a\.test. 60 IN A 192.0.2.1`}, ""}, // one label, not two
	} {
		for _, compress := range []bool{false, true} {
			msg := ask(tt.ask, dns.TypeA)
			m := new(dns.Msg)
			if err := m.Unpack(reply(msg, dns.RcodeSuccess, tt.records...)); err != nil {
				t.Fatal(err)
			}
			m.Compress = compress
			b, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			var o told
			s := &Server{cfg: Config{Answered: o.answered}}
			s.tell(b, len(msg))
			if got := o.take(); got != tt.want {
				t.Errorf("%s %q, compressed %v: told %q, want %q", tt.ask, tt.records, compress, got, tt.want)
			}
		}
	}

	var o told
	m := newMock(t, answerWith(dns.RcodeSuccess, "up.test. 300 IN A 192.0.2.1"))
	_, addr := start(t, Config{
		Upstreams: []netip.AddrPort{m.addr}, Answered: o.answered,
		Records: map[string][]netip.Addr{"local.test": addrs("192.0.2.9")},
	})
	for _, step := range []struct{ name, want string }{
		{"up.test.", "up.test[192.0.2.1]5m0s"},
		{"UP.test.", "up.test[192.0.2.1]5m0s"}, // from the cache
		{"local.test.", "local.test[192.0.2.9]0s"},
	} {
		exchangeUDP(t, addr, ask(step.name, dns.TypeA), 5*time.Second)
		if got := o.take(); got != step.want {
			t.Errorf("%s: told %q, want %q", step.name, got, step.want)
		}
	}
}

// TestNoPrivate: with the filter a private address from upstream never reaches
// the guest, in whatever record it comes; everything else does.
func TestNoPrivate(t *testing.T) {
	for record, private := range map[string]bool{
		"a.test. 60 IN A 192.0.2.1": false, "a.test. 60 IN AAAA 2001:db8::1": false, "a.test. 60 IN TXT 10.0.0.1": false,
		"a.test. 60 IN A 10.1.2.3": true, "a.test. 60 IN A 127.0.0.1": true, "a.test. 60 IN A 0.0.0.0": true, "a.test. 60 IN A 169.254.169.254": true,
		"a.test. 60 IN A 192.168.1.1": true, "a.test. 60 IN A 172.31.0.1": true, "a.test. 60 IN A 172.32.0.1": false, "a.test. 60 IN A 100.127.0.1": true,
		"a.test. 60 IN AAAA ::1": true, "a.test. 60 IN AAAA ::": true, "a.test. 60 IN AAAA fe80::1": true, "a.test. 60 IN AAAA fd00::1": true,
		"a.test. 60 IN AAAA ::ffff:10.0.0.1": true, "a.test. 60 IN AAAA 64:ff9b::10.0.0.1": true, "a.test. 60 IN AAAA 64:ff9b::192.0.2.1": false,
		`a.test. 60 IN HTTPS 1 . alpn="h2" ipv4hint="192.0.2.1"`:          false,
		`a.test. 60 IN HTTPS 1 . ipv4hint="192.0.2.1,10.0.0.1"`:           true,
		`a.test. 60 IN SVCB 1 b.test. ipv6hint="2001:db8::1,fd00::1"`:     true,
		`a.test. 60 IN HTTPS 1 . alpn="h2,h3" port="443"`:                 false,
		`a.test. 60 IN CNAME b.test.` + "\n" + `b.test. 60 IN A 10.0.0.1`: true,
	} {
		m := newMock(t, answerWith(dns.RcodeSuccess, strings.Split(record, "\n")...))
		s, addr := start(t, Config{Upstreams: []netip.AddrPort{m.addr}, NoPrivate: true, Records: map[string][]netip.Addr{"local.test": addrs("10.0.0.1")}})
		for _, exchange := range []func(testing.TB, netip.AddrPort, []byte, time.Duration) []byte{exchangeUDP, exchangeTCP, exchangeUDP} {
			got := unpack(t, exchange(t, addr, ask("a.test.", dns.TypeA, withEDNS(1232, false)), 5*time.Second))
			if got.Rcode != dns.RcodeSuccess || (len(got.Answer) == 0) != private {
				t.Errorf("%s: %s with %d records, want it filtered: %v", record, dns.RcodeToString[got.Rcode], len(got.Answer), private)
			}
		}
		if n := s.Stats().Rebound; (n == 3) != private {
			t.Errorf("%s: %d counted", record, n)
		}
		if got := unpack(t, exchangeUDP(t, addr, ask("local.test.", dns.TypeA), 5*time.Second)); len(got.Answer) != 1 {
			t.Errorf("a local record is filtered: %v", got)
		}
		if got := unpack(t, exchangeTCP(t, addr, ask("a.test.", dns.TypeAXFR), 5*time.Second)); got.Rcode != dns.RcodeRefused {
			t.Errorf("a zone transfer: %s, want REFUSED", dns.RcodeToString[got.Rcode])
		}
	}
}

// FuzzAddresses: no answer makes the readers of addresses hang, panic, or find
// what the library does not.
func FuzzAddresses(f *testing.F) {
	for _, m := range messages() {
		f.Add(m)
	}
	for _, records := range [][]string{
		{"a.test. 60 IN CNAME b.test.", "b.test. 60 IN A 10.0.0.1"},
		{`a.test. 60 IN HTTPS 1 . ipv4hint="192.0.2.1,10.0.0.1"`},
		{"a.test. 60 IN AAAA 64:ff9b::10.0.0.1", "a.test. 1 IN A 192.0.2.1"},
	} {
		f.Add(reply(ask("a.test.", dns.TypeA), dns.RcodeSuccess, records...))
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		if len(msg) < headerLen || len(msg) > maxMessage {
			return
		}
		end := skipName(msg, headerLen) + 4
		if end < headerLen || end > len(msg) {
			return
		}
		before := bytes.Clone(msg)
		start := time.Now()
		var got []netip.Addr
		s := &Server{cfg: Config{Answered: func(_ string, addrs []netip.Addr, _ time.Duration) { got = addrs }}}
		s.tell(msg, end)
		private := holdsPrivate(msg, end)
		if !bytes.Equal(msg, before) {
			t.Error("the answer was changed")
		}
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("took %v", d)
		}
		m := new(dns.Msg)
		if m.Unpack(msg) != nil || len(m.Question) != 1 {
			return
		}
		all := make(map[netip.Addr]bool)
		for _, rr := range m.Answer {
			var a netip.Addr
			switch rr := rr.(type) {
			case *dns.A:
				a, _ = netip.AddrFromSlice(rr.A.To4())
			case *dns.AAAA:
				a, _ = netip.AddrFromSlice(rr.AAAA.To16())
			}
			if a.IsValid() {
				all[a.Unmap()] = true
				if isPrivate(a) && !private && len(m.Answer) < 100 {
					t.Errorf("%v passes the filter", a)
				}
			}
		}
		for _, a := range got {
			if !all[a.Unmap()] {
				t.Errorf("%v is in no record", a)
			}
		}
	})
}
