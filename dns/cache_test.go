package dns

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// cacheFor returns a cache that was given the answer records to a query for
// www.example.org, and the query.
func cacheFor(t *testing.T, qtype uint16, rcode int, records ...string) (*cache, *query, []byte) {
	t.Helper()
	c := &cache{maxEntries: 100, maxBytes: 1 << 20}
	msg := ask("www.example.org", qtype)
	q := new(query)
	if q.parse(msg) != accept {
		t.Fatal("parse fails")
	}
	answer := reply(msg, rcode, records...)
	c.put(string(q.key()), answer, q.end, qtype, 0)
	return c, q, answer
}

func TestLifetime(t *testing.T) {
	const soa = "ns: example.org. 900 IN SOA a. b. 1 2 3 4 300"
	for name, c := range map[string]struct {
		qtype   uint16
		rcode   int
		records []string
		want    time.Duration
	}{
		"address":             {dns.TypeA, 0, []string{"www.example.org. 60 IN A 192.0.2.1"}, time.Minute},
		"smallest TTL":        {dns.TypeA, 0, []string{"www.example.org. 60 IN A 192.0.2.1", "www.example.org. 50 IN A 192.0.2.2"}, 50 * time.Second},
		"smallest, elsewhere": {dns.TypeA, 0, []string{"www.example.org. 60 IN A 192.0.2.1", "ar: x. 5 IN A 192.0.2.2"}, 5 * time.Second},
		"alias":               {dns.TypeA, 0, []string{"www.example.org. 60 IN CNAME a.", "a. 30 IN A 192.0.2.1"}, 30 * time.Second},
		"alias asked for":     {dns.TypeCNAME, 0, []string{"www.example.org. 60 IN CNAME a."}, time.Minute},
		"any":                 {dns.TypeANY, 0, []string{"www.example.org. 60 IN TXT a"}, time.Minute},
		"TTL 0":               {dns.TypeA, 0, []string{"www.example.org. 0 IN A 192.0.2.1"}, 0},
		"TTL with top bit":    {dns.TypeA, 0, []string{"www.example.org. 4294967295 IN A 192.0.2.1"}, 0},
		"a year":              {dns.TypeA, 0, []string{"www.example.org. 31536000 IN A 192.0.2.1"}, maxTTL},
		"NODATA":              {dns.TypeA, 0, []string{soa}, 300 * time.Second},
		"NXDOMAIN":            {dns.TypeA, dns.RcodeNameError, []string{soa}, 300 * time.Second},
		"SOA's own TTL":       {dns.TypeA, dns.RcodeNameError, []string{"ns: example.org. 9 IN SOA a. b. 1 2 3 4 300"}, 9 * time.Second},
		"negative for a day":  {dns.TypeA, dns.RcodeNameError, []string{"ns: example.org. 86400 IN SOA a. b. 1 2 3 4 86400"}, maxNegativeTTL},
		"alias to nothing":    {dns.TypeA, dns.RcodeNameError, []string{"www.example.org. 60 IN CNAME a.", soa}, time.Minute},
		"positive with SOA":   {dns.TypeA, 0, []string{"www.example.org. 900 IN A 192.0.2.1", "ns: example.org. 900 IN SOA a. b. 1 2 3 4 5"}, 900 * time.Second},
		"NODATA without SOA":  {dns.TypeA, 0, nil, 0},
		"NXDOMAIN, no SOA":    {dns.TypeA, dns.RcodeNameError, nil, 0},
		"referral":            {dns.TypeA, 0, []string{"ns: example.org. 60 IN NS a."}, 0},
		"alias alone":         {dns.TypeA, 0, []string{"www.example.org. 60 IN CNAME a."}, 0},
		"SERVFAIL":            {dns.TypeA, dns.RcodeServerFailure, []string{soa}, 0},
		"REFUSED":             {dns.TypeA, dns.RcodeRefused, []string{soa}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			ch, q, _ := cacheFor(t, c.qtype, c.rcode, c.records...)
			if c.want == 0 {
				if ch.get(q.key(), 0) != nil {
					t.Error("was cached")
				}
				return
			}
			if ch.get(q.key(), c.want-1) == nil {
				t.Errorf("gone before %v", c.want)
			}
			if ch.get(q.key(), c.want) != nil {
				t.Errorf("still there at %v", c.want)
			}
			if n, bytes := ch.size(); n != 0 || bytes != 0 {
				t.Errorf("size() = %d, %d after expiry, want 0, 0", n, bytes)
			}
		})
	}
}

func TestLifetimeTruncated(t *testing.T) {
	q := ask("www.example.org", dns.TypeA)
	b := reply(q, 0, "www.example.org. 60 IN A 192.0.2.1")
	b[2] |= bitTC
	if ttl, _ := lifetime(b, len(q), dns.TypeA, nil); ttl != 0 {
		t.Errorf("lifetime = %v with TC, want 0", ttl)
	}
	if ttl, _ := lifetime(append(reply(q, 0, "www.example.org. 60 IN A 192.0.2.1"), 0), len(q), dns.TypeA, nil); ttl != 0 {
		t.Errorf("lifetime = %v with bytes behind the end, want 0", ttl)
	}
}

// TestRender holds that an answer from the cache is the upstream's but for id,
// spelling and age.
func TestRender(t *testing.T) {
	records := []string{"www.example.org. 300 IN CNAME a.example.org.", "a.example.org. 100 IN A 192.0.2.1", "ns: example.org. 200 IN NS b."}
	c, _, answer := cacheFor(t, dns.TypeA, 0, records...)
	var q query
	msg := ask("wWw.Example.ORG", dns.TypeA)
	q.parse(msg)
	e := c.get(q.key(), 0)
	if e == nil {
		t.Fatal("not cached")
	}
	fresh := e.render(nil, &q, time.Second-1)
	want := bytes.Clone(answer)
	copy(want, msg[:2])
	copy(want[headerLen:], msg[headerLen:q.end])
	if !bytes.Equal(fresh, want) {
		t.Errorf("render at once\n%x, want\n%x", fresh, want)
	}
	m := unpack(t, e.render(nil, &q, 42*time.Second+time.Second/2))
	for i, want := range []uint32{258, 58} {
		if got := m.Answer[i].Header().Ttl; got != want {
			t.Errorf("TTL of answer %d after 42 s = %d, want %d", i, got, want)
		}
	}
	if got := m.Ns[0].Header().Ttl; got != 158 {
		t.Errorf("TTL of authority after 42 s = %d, want 158", got)
	}
	if m.Question[0].Name != "wWw.Example.ORG." || m.Id != q.id() {
		t.Errorf("question %v, id %d: not the client's", m.Question[0].Name, m.Id)
	}
	if !bytes.Equal(e.msg, answer) {
		t.Error("rendering changed the entry")
	}
}

// TestCacheBounds fills the cache with more than it may hold.
func TestCacheBounds(t *testing.T) {
	for name, c := range map[string]*cache{
		"entries": {maxEntries: 100, maxBytes: 1 << 30},
		"bytes":   {maxEntries: 1 << 30, maxBytes: 64 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			var first, q query
			for i := range 5000 {
				msg := ask(fmt.Sprintf("n%d.example.org", i), dns.TypeA)
				q.parse(msg)
				c.put(string(q.key()), reply(msg, 0, fmt.Sprintf("n%d.example.org. 60 IN A 192.0.2.1", i)), q.end, q.qtype, 0)
				if i == 0 {
					first.parse(msg)
				}
				// What is used stays.
				if c.get(first.key(), 0) == nil {
					t.Fatalf("the entry in use was dropped at %d", i)
				}
				if n, bytes := c.size(); n > c.maxEntries || bytes > c.maxBytes {
					t.Fatalf("size() = %d, %d; want at most %d, %d", n, bytes, c.maxEntries, c.maxBytes)
				}
			}
			if n, _ := c.size(); n < 50 {
				t.Errorf("only %d entries are left", n)
			}
			if c.get(q.key(), 0) == nil {
				t.Error("the newest entry is gone")
			}
			c.flush()
			if n, bytes := c.size(); n != 0 || bytes != 0 {
				t.Errorf("size() = %d, %d after flush", n, bytes)
			}
			c.put(string(q.key()), reply(q.msg, 0, "n4999.example.org. 60 IN A 192.0.2.1"), q.end, q.qtype, 0)
			if n, _ := c.size(); n != 1 {
				t.Errorf("%d entries after flush and put, want 1", n)
			}
		})
	}
	off := &cache{maxEntries: -1, maxBytes: 1 << 20}
	off.put("k", reply(ask("a", dns.TypeA), 0, "a. 60 IN A 192.0.2.1"), 19, dns.TypeA, 0)
	if n, _ := off.size(); n != 0 {
		t.Error("a cache that is off holds an entry")
	}
}
