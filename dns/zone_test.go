package dns

import (
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// TestZones: in a zone there is what there is a record of, and what stands above
// that.
func TestZones(t *testing.T) {
	var l locals
	if err := l.setZones([]string{"Usernet.internal.", "3.117.10.in-addr.arpa"}); err != nil {
		t.Fatal(err)
	}
	if err := l.set(map[string][]netip.Addr{"web.blue.usernet.internal": addrs("10.117.3.100"), "web": addrs("10.117.3.100")}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string // rcode, or - for a name that is not local
	}{
		{"web.blue.usernet.internal", dns.TypeA, "NOERROR"},
		{"WEB.blue.UserNet.internal", dns.TypeMX, "NOERROR"},
		{"blue.usernet.internal", dns.TypeA, "NOERROR"},
		{"usernet.internal", dns.TypeSOA, "NOERROR"},
		{"db.blue.usernet.internal", dns.TypeA, "NXDOMAIN"},
		{"a.web.blue.usernet.internal", dns.TypeAAAA, "NXDOMAIN"},
		{"red.usernet.internal", dns.TypeA, "NXDOMAIN"},
		{"100.3.117.10.in-addr.arpa", dns.TypePTR, "NOERROR"},
		{"101.3.117.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{"100.4.117.10.in-addr.arpa", dns.TypePTR, "-"},
		{"web", dns.TypeA, "NOERROR"},
		{"db", dns.TypeA, "-"},
		{"internal", dns.TypeA, "-"},
		{"xusernet.internal", dns.TypeA, "-"},
		{".", dns.TypeNS, "-"},
	} {
		var q query
		if q.parse(ask(c.name, c.qtype, withEDNS(1232, false))) != accept {
			t.Fatalf("%s: parse fails", c.name)
		}
		got := "-"
		if b, ok := l.answer(nil, &q); ok {
			var m dns.Msg
			if err := m.Unpack(b); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if got = dns.RcodeToString[m.Rcode]; !m.Authoritative || m.Rcode != 0 && len(m.Answer) > 0 {
				t.Errorf("%s: %v", c.name, &m)
			}
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	if l.setZones([]string{"a..b"}) == nil {
		t.Error("a zone that is no name")
	}
}
