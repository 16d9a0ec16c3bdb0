package dns

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

func TestLocals(t *testing.T) {
	var l locals
	err := l.set(map[string][]netip.Addr{
		"Host.usernet.internal":     addrs("10.0.2.2", "fd75:736e:6574::2"),
		"host.docker.internal":      addrs("10.0.2.2", "::ffff:10.0.2.2"),
		"four.example.":             addrs("192.0.2.4"),
		"link":                      addrs("fe80::1%eth0"),
		"many." + "x":               slices.Repeat(addrs("192.0.2.7"), 5000),
		"under_score.with-dash.123": addrs("192.0.2.8"),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string // records without owner; "-": not local
	}{
		{"host.usernet.internal", dns.TypeA, "A 10.0.2.2"},
		{"HOST.UserNet.internal", dns.TypeA, "A 10.0.2.2"},
		{"host.usernet.internal", dns.TypeAAAA, "AAAA fd75:736e:6574::2"},
		{"host.usernet.internal", dns.TypeANY, "A 10.0.2.2, AAAA fd75:736e:6574::2"},
		{"host.docker.internal", dns.TypeA, "A 10.0.2.2"},
		{"host.docker.internal", dns.TypeAAAA, ""},
		{"host.docker.internal", dns.TypeHTTPS, ""},
		{"host.docker.internal", dns.TypeMX, ""},
		{"host.docker.internal", 65280, ""},
		{"four.example", dns.TypeA, "A 192.0.2.4"},
		{"link", dns.TypeAAAA, "AAAA fe80::1"},
		{"many.x", dns.TypeA, "A 192.0.2.7"},
		{"2.2.0.10.in-addr.arpa", dns.TypePTR, "PTR host.docker.internal., PTR host.usernet.internal."},
		{"2.2.0.10.IN-ADDR.ARPA", dns.TypePTR, "PTR host.docker.internal., PTR host.usernet.internal."},
		{"2.2.0.10.in-addr.arpa", dns.TypeA, ""},
		{"2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.4.7.5.6.e.6.3.7.5.7.d.f.ip6.arpa", dns.TypePTR, "PTR host.usernet.internal."},
		{"sub.host.docker.internal", dns.TypeA, "-"},
		{"docker.internal", dns.TypeA, "-"},
		{"3.2.0.10.in-addr.arpa", dns.TypePTR, "-"},
		{".", dns.TypeNS, "-"},
	} {
		var q query
		if q.parse(ask(c.name, c.qtype, withEDNS(1232, false))) != accept {
			t.Fatalf("%s: parse fails", c.name)
		}
		b, ok := l.answer(nil, &q)
		if !ok {
			if c.want != "-" {
				t.Errorf("%s %d: not local, want %q", c.name, c.qtype, c.want)
			}
			continue
		}
		m := unpack(t, b)
		var got []string
		for _, rr := range m.Answer {
			text := rr.String()
			got = append(got, strings.ReplaceAll(text[strings.Index(text, "IN\t")+3:], "\t", " "))
			if !strings.EqualFold(rr.Header().Name, dns.Fqdn(c.name)) || rr.Header().Ttl != localTTL {
				t.Errorf("%s %d: record %v: wrong owner or TTL", c.name, c.qtype, rr)
			}
		}
		if s := strings.Join(got, ", "); s != c.want {
			t.Errorf("%s %d: answer %q, want %q", c.name, c.qtype, s, c.want)
		}
		if m.Rcode != dns.RcodeSuccess || !m.Authoritative || !m.RecursionAvailable || m.IsEdns0() == nil {
			t.Errorf("%s %d: header %v, OPT %v", c.name, c.qtype, m.MsgHdr, m.IsEdns0())
		}
	}

	var q query
	q.parse(ask("host.docker.internal", dns.TypeA, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }))
	if _, ok := l.answer(nil, &q); ok {
		t.Error("class CH is answered from local records")
	}
	q.parse(ask("host.docker.internal", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }))
	if b, _ := l.answer(nil, &q); unpack(t, b).Rcode != dns.RcodeBadVers {
		t.Error("EDNS version 1 is not refused")
	}
}

// TestLocalsLarge holds that the largest answers are still messages.
func TestLocalsLarge(t *testing.T) {
	var l locals
	records := make(map[string][]netip.Addr)
	var many []netip.Addr
	for i := range maxAddrs {
		many = append(many, netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}))
	}
	records["many"] = many
	label := strings.Repeat("x", 60)
	for i := range 300 {
		records[strings.Join([]string{label, label, label, label[:40], string(rune('a'+i%26)) + string(rune('a'+i/26))}, ".")] = many[:1]
	}
	if err := l.set(records); err != nil {
		t.Fatal(err)
	}
	var q query
	q.parse(ask("many", dns.TypeA))
	b, _ := l.answer(nil, &q)
	if m := unpack(t, b); len(m.Answer) != maxAddrs {
		t.Errorf("%d addresses, want %d", len(m.Answer), maxAddrs)
	}
	q.parse(ask("0.0.51.198.in-addr.arpa", dns.TypeANY))
	b, _ = l.answer(nil, &q)
	if m := unpack(t, b); len(b) > maxMessage || len(m.Answer) < 100 {
		t.Errorf("%d bytes with %d names", len(b), len(m.Answer))
	}
}

func TestLocalsRefuse(t *testing.T) {
	for _, name := range []string{
		"", ".", "..", "a..b", ".a", strings.Repeat("x", 64), "a b", "a\x00", "a\\.b", "ä",
		strings.Repeat(strings.Repeat("x", 63)+".", 4) + "x",
	} {
		var l locals
		if err := l.set(map[string][]netip.Addr{name: addrs("192.0.2.1")}); err == nil {
			t.Errorf("set(%q) succeeds", name)
		}
	}
	if _, err := New(Config{Records: map[string][]netip.Addr{"a": {{}}}}); err == nil || !strings.HasPrefix(err.Error(), "dns: ") {
		t.Errorf("New with an invalid address = %v", err)
	}
}

// TestRecordsAtRunTime changes the records of a Server that is asked.
func TestRecordsAtRunTime(t *testing.T) {
	s, addr := start(t, Config{
		Upstreams: []netip.AddrPort{newMock(t, answerWith(dns.RcodeNameError)).addr},
		Records:   map[string][]netip.Addr{"a.internal": addrs("192.0.2.1")},
	})
	get := func(name string) (int, int) {
		m := unpack(t, exchangeUDP(t, addr, ask(name, dns.TypeA), patience))
		return m.Rcode, len(m.Answer)
	}
	check := func(step, name string, rcode, n int) {
		t.Helper()
		if r, got := get(name); r != rcode || got != n {
			t.Errorf("%s: %s has rcode %d and %d addresses, want %d and %d", step, name, r, got, rcode, n)
		}
	}
	check("at first", "a.internal", dns.RcodeSuccess, 1)
	check("at first", "b.internal", dns.RcodeNameError, 0)
	if err := s.SetRecord("B.internal.", addrs("192.0.2.2", "192.0.2.3")...); err != nil {
		t.Fatal(err)
	}
	check("after adding", "b.internal", dns.RcodeSuccess, 2)
	if err := s.SetRecord("b.internal", addrs("192.0.2.4")...); err != nil {
		t.Fatal(err)
	}
	check("after replacing", "b.internal", dns.RcodeSuccess, 1)
	for _, more := range []string{"192.0.2.4", "192.0.2.5"} { // what is there already stays one
		if _, err := s.AddRecord("B.internal", addrs(more)...); err != nil {
			t.Fatal(err)
		}
	}
	check("after adding to it", "b.internal", dns.RcodeSuccess, 2)
	if all, err := s.AddRecord("c.internal", addrs("192.0.2.6")...); err != nil || len(all) != 1 {
		t.Errorf("AddRecord of a new name: %v, %v", all, err)
	}
	check("after adding", "c.internal", dns.RcodeSuccess, 1)
	if _, err := s.AddRecord("c.internal", netip.Addr{}); err == nil {
		t.Error("AddRecord of no address succeeds")
	}
	if !s.RemoveRecord("c.internal") {
		t.Error("RemoveRecord does not know what was added")
	}
	want := map[string][]netip.Addr{"a.internal": addrs("192.0.2.1"), "b.internal": addrs("192.0.2.4", "192.0.2.5")}
	if diff := cmp.Diff(want, s.Records(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("Records (-want +got):\n%s", diff)
	}
	if !s.RemoveRecord("A.internal") || s.RemoveRecord("a.internal") {
		t.Error("RemoveRecord is wrong about what was there")
	}
	check("after removing", "a.internal", dns.RcodeNameError, 0)
	if err := s.SetRecord("b.internal"); err != nil {
		t.Fatal(err)
	}
	check("after emptying", "b.internal", dns.RcodeNameError, 0)
	if err := s.SetRecord("bad name", addrs("192.0.2.1")...); err == nil {
		t.Error("SetRecord of a bad name succeeds")
	}
}
