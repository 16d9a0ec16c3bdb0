package dns

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

func TestParse(t *testing.T) {
	const (
		head  = "\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"
		quest = "\x01a\x00\x00\x01\x00\x01"
		opt   = "\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00"
	)
	at := func(i int, b byte, s string) string { return s[:i] + string([]byte{b}) + s[i+1:] }
	long := strings.Repeat("\x3f"+strings.Repeat("x", 63), 3)
	for name, c := range map[string]struct {
		msg  string
		want verdict
	}{
		"query":                 {head + quest, accept},
		"root":                  {head + "\x00\x00\x02\x00\x01", accept},
		"EDNS":                  {at(11, 1, head) + quest + opt, accept},
		"unknown type, class":   {head + "\x01a\x00\xff\x00\xff\x00", accept},
		"IXFR with SOA":         {at(9, 1, head) + "\x01a\x00\x00\xfb\x00\x01" + "\x00\x00\x06\x00\x01\x00\x00\x00\x00\x00\x00", accept},
		"longest name":          {head + long + "\x3d" + strings.Repeat("x", 61) + "\x00\x00\x01\x00\x01", accept},
		"empty":                 {"", drop},
		"no id":                 {"\x12", drop},
		"half a header":         {head[:11], drop},
		"answer":                {at(2, 0x81, head) + quest, drop},
		"answer, NOTIFY":        {at(2, 0xa0, head) + quest, drop},
		"NOTIFY":                {at(2, 0x20, head) + quest, notImp},
		"UPDATE":                {at(2, 0x28, head) + quest, notImp},
		"reserved opcode":       {at(2, 0x78, head), notImp},
		"no question":           {at(5, 0, head), formErr},
		"question missing":      {head, formErr},
		"two questions":         {at(5, 2, head) + quest + quest, formErr},
		"65535 questions":       {at(4, 0xff, at(5, 0xff, head)) + quest, formErr},
		"name cut":              {head + "\x05ab", formErr},
		"name without end":      {head + "\x01a", formErr},
		"type cut":              {head + "\x01a\x00\x00\x01\x00", formErr},
		"name too long":         {head + long + "\x3e" + strings.Repeat("x", 62) + "\x00\x00\x01\x00\x01", formErr},
		"pointer":               {head + "\xc0\x0c\x00\x01\x00\x01", formErr},
		"pointer after label":   {head + "\x01a\xc0\x0c\x00\x01\x00\x01", formErr},
		"label type 01":         {head + "\x41a\x00\x00\x01\x00\x01", formErr},
		"trailing bytes":        {head + quest + "\x00", formErr},
		"two OPT":               {at(11, 2, head) + quest + opt + opt, formErr},
		"OPT with owner":        {at(11, 1, head) + quest + "\x01a" + opt, formErr},
		"OPT cut":               {at(11, 1, head) + quest + opt[:10], formErr},
		"OPT data cut":          {at(11, 1, head) + quest + at(10, 9, opt), formErr},
		"OPT promised":          {at(11, 1, head) + quest, formErr},
		"65535 records missing": {at(6, 0xff, at(7, 0xff, head)) + quest, formErr},
	} {
		t.Run(name, func(t *testing.T) {
			var q query
			if got := q.parse([]byte(c.msg)); got != c.want {
				t.Errorf("parse(%x) = %v, want %v", c.msg, got, c.want)
			}
		})
	}
}

// TestPlain holds what may be answered from the cache, and that everything
// that can change the answer changes the key.
func TestPlain(t *testing.T) {
	base := ask("www.example.org", dns.TypeA)
	variants := map[string][]byte{
		"base":     base,
		"type":     ask("www.example.org", dns.TypeAAAA),
		"class":    ask("www.example.org", dns.TypeA, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }),
		"name":     ask("www.example.com", dns.TypeA),
		"no RD":    ask("www.example.org", dns.TypeA, func(m *dns.Msg) { m.RecursionDesired = false }),
		"CD":       ask("www.example.org", dns.TypeA, func(m *dns.Msg) { m.CheckingDisabled = true }),
		"AD":       ask("www.example.org", dns.TypeA, func(m *dns.Msg) { m.AuthenticatedData = true }),
		"EDNS":     ask("www.example.org", dns.TypeA, withEDNS(1232, false)),
		"EDNS, DO": ask("www.example.org", dns.TypeA, withEDNS(1232, true)),
	}
	keys := make(map[string]string)
	for name, msg := range variants {
		var q query
		if q.parse(msg) != accept || !q.plain {
			t.Errorf("%s: not plain", name)
		}
		if other, ok := keys[string(q.key())]; ok {
			t.Errorf("%s and %s have the same key", name, other)
		}
		keys[string(q.key())] = name
	}
	var q query
	if q.parse(ask("WWW.eXample.ORG", dns.TypeA)); keys[string(q.key())] != "base" {
		t.Error("letter case changes the key")
	}
	if q.parse(ask("www.example.org", dns.TypeA, withEDNS(4096, false))); keys[string(q.key())] != "EDNS" {
		t.Error("payload size changes the key")
	}

	option := func(o dns.EDNS0) func(*dns.Msg) {
		return func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().Option = append(m.IsEdns0().Option, o) }
	}
	for name, msg := range map[string][]byte{
		"cookie": ask("a", dns.TypeA, option(&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"})),
		"client subnet": ask("a", dns.TypeA, option(&dns.EDNS0_SUBNET{
			Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{192, 0, 2, 0}})),
		"unknown option": ask("a", dns.TypeA, option(&dns.EDNS0_LOCAL{Code: 65001, Data: []byte{1}})),
		"EDNS version 1": ask("a", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }),
		"EDNS Z bits":    ask("a", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetZ(1) }),
		"Z bit":          ask("a", dns.TypeA, func(m *dns.Msg) { m.Zero = true }),
		"TC bit":         ask("a", dns.TypeA, func(m *dns.Msg) { m.Truncated = true }),
		"AXFR":           ask("a", dns.TypeAXFR),
		"TKEY":           ask("a", dns.TypeTKEY),
		"other record":   ask("a", dns.TypeA, func(m *dns.Msg) { m.Extra = append(m.Extra, &dns.NULL{Hdr: dns.RR_Header{Name: "."}}) }),
	} {
		if q.parse(msg) != accept || q.plain {
			t.Errorf("%s: plain, want not", name)
		}
	}
}

func TestTruncate(t *testing.T) {
	q := ask("example.org", dns.TypeTXT, withEDNS(1232, true))
	plain := ask("example.org", dns.TypeTXT)
	txt := func(n int) []string {
		var rs []string
		for i := range n {
			rs = append(rs, fmt.Sprintf("example.org. 60 IN TXT \"%03d %s\"", i, strings.Repeat("x", 80)))
		}
		return rs
	}
	for name, c := range map[string]struct {
		query   []byte
		records []string
		limit   int
		tc      bool
		answers int
		ns      int
		opt     bool
	}{
		"fits":               {q, txt(5), 1232, false, 5, 0, true},
		"cut":                {q, txt(20), 1232, true, 12, 0, true},
		"cut, no EDNS":       {plain, txt(20), 512, true, 4, 0, false},
		"tiny":               {q, txt(20), 60, true, 0, 0, true},
		"additional dropped": {q, append(txt(5), "ar: example.org. 60 IN TXT \""+strings.Repeat("y", 200)+"\""), 600, false, 5, 0, true},
		"authority dropped":  {q, append(txt(5), "ns: example.org. 60 IN TXT \""+strings.Repeat("y", 200)+"\""), 600, true, 5, 0, true},
		"authority kept":     {q, append(txt(1), "ns: example.org. 60 IN NS a.example.org.", "ar: a.example.org. 60 IN TXT \""+strings.Repeat("y", 200)+"\""), 300, false, 1, 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			msg := reply(c.query, 0, c.records...)
			var p query
			p.parse(c.query)
			got := truncate(msg, p.end, c.limit)
			if len(got) > c.limit {
				t.Errorf("%d bytes, want at most %d", len(got), c.limit)
			}
			m := unpack(t, got)
			if m.Truncated != c.tc || len(m.Answer) != c.answers || len(m.Ns) != c.ns || (m.IsEdns0() != nil) != c.opt {
				t.Errorf("truncate to %d: TC %v, %d answers, %d authority, OPT %v; want %v, %d, %d, %v",
					c.limit, m.Truncated, len(m.Answer), len(m.Ns), m.IsEdns0() != nil, c.tc, c.answers, c.ns, c.opt)
			}
		})
	}
}

// TestTruncateEverySize cuts one message to every size and to nonsense.
func TestTruncateEverySize(t *testing.T) {
	q := ask("example.org", dns.TypeMX, withEDNS(1232, true))
	whole := reply(q, 0, "example.org. 60 IN MX 10 a.example.org.", "example.org. 60 IN MX 20 b.example.org.",
		"ns: example.org. 60 IN NS c.example.org.", "ar: a.example.org. 60 IN A 192.0.2.1", "ar: a.example.org. 60 IN AAAA 2001:db8::1")
	var p query
	p.parse(q)
	for limit := headerLen; limit < len(whole); limit++ {
		got := truncate(append([]byte(nil), whole...), p.end, limit)
		if len(got) > limit {
			t.Fatalf("truncate to %d gives %d bytes", limit, len(got))
		}
		unpack(t, got)
		for cut := headerLen; cut < len(whole); cut++ {
			if got := truncate(append([]byte(nil), whole[:cut]...), p.end, limit); len(got) > max(limit, headerLen) {
				t.Fatalf("truncate %d bytes to %d gives %d", cut, limit, len(got))
			}
		}
	}
}

func TestMatches(t *testing.T) {
	q := ask("Example.org", dns.TypeA)
	good := reply(q, 0, "example.org. 60 IN A 192.0.2.1")
	id := binary.BigEndian.Uint16(q)
	var p query
	p.parse(q)
	change := func(f func([]byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	for name, c := range map[string]struct {
		msg  []byte
		want bool
	}{
		"same":                {good, true},
		"other case":          {change(func(b []byte) { b[13] ^= 0x20 }), true},
		"id":                  {change(func(b []byte) { b[0] ^= 1 }), false},
		"query":               {change(func(b []byte) { b[2] &^= bitQR }), false},
		"opcode":              {change(func(b []byte) { b[2] |= 0x20 }), false},
		"name":                {change(func(b []byte) { b[13] ^= 1 }), false},
		"type":                {change(func(b []byte) { b[p.end-3] ^= 1 }), false},
		"type as if a letter": {change(func(b []byte) { b[p.end-3] ^= 0x20 }), false},
		"class":               {change(func(b []byte) { b[p.end-1] ^= 1 }), false},
		"two questions":       {change(func(b []byte) { b[5] = 2 }), false},
		"short":               {good[:p.end-1], false},
		"records cut off":     {good[:len(good)-1], false},
		"so it says":          {change(func(b []byte) { b[2] |= bitTC })[:len(good)-1], true},
		"more than it has":    {change(func(b []byte) { b[7]++ }), false},
		"header":              {good[:headerLen], false},
		"refusal, header":     {append([]byte{b0(id), b1(id), 0x81, 0x85}, make([]byte, 8)...), true},
		"success, header":     {append([]byte{b0(id), b1(id), 0x81, 0x80}, make([]byte, 8)...), false},
		"NXDOMAIN, header":    {append([]byte{b0(id), b1(id), 0x81, 0x83}, make([]byte, 8)...), false},
	} {
		if got := matches(c.msg, string(q[2:]), p.end, id); got != c.want {
			t.Errorf("%s: matches = %v, want %v", name, got, c.want)
		}
	}
}

func b0(id uint16) byte { return byte(id >> 8) }
func b1(id uint16) byte { return byte(id) }

// TestReply compares answers of our own with what a known codec makes of them.
func TestReply(t *testing.T) {
	var p query
	p.parse(ask("example.org", dns.TypeA, withEDNS(1232, true), func(m *dns.Msg) { m.CheckingDisabled = true }))
	m := unpack(t, p.appendReply(nil, rcodeServFail, edeNoReachable))
	want := dns.MsgHdr{Id: p.id(), Response: true, RecursionDesired: true, RecursionAvailable: true, CheckingDisabled: true, Rcode: dns.RcodeServerFailure}
	if diff := cmp.Diff(want, m.MsgHdr); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	opt := m.IsEdns0()
	if opt == nil || !opt.Do() || opt.UDPSize() != ourPayload || len(opt.Option) != 1 {
		t.Fatalf("OPT = %v, want DO, our size and one option", opt)
	}
	if ede, ok := opt.Option[0].(*dns.EDNS0_EDE); !ok || ede.InfoCode != dns.ExtendedErrorCodeNoReachableAuthority {
		t.Errorf("option = %v, want the extended error", opt.Option[0])
	}
	if m := unpack(t, p.appendReply(nil, rcodeBadVers, edeNone)); m.Rcode != dns.RcodeBadVers {
		t.Errorf("rcode = %d, want BADVERS", m.Rcode)
	}
}

// messages are good and bad ones, as seeds.
func messages() [][]byte {
	q := ask("www.example.org", dns.TypeA, withEDNS(1232, true))
	answer := reply(q, 0, "www.example.org. 60 IN CNAME a.example.org.", "a.example.org. 30 IN A 192.0.2.1",
		"ns: example.org. 60 IN NS ns.example.org.", "ar: ns.example.org. 60 IN AAAA 2001:db8::1")
	negative := reply(q, dns.RcodeNameError, "ns: example.org. 900 IN SOA a. b. 1 2 3 4 300")
	head := func(counts ...uint16) []byte {
		b := []byte{0x12, 0x34, 0x81, 0x80}
		for _, c := range counts {
			b = binary.BigEndian.AppendUint16(b, c)
		}
		return b
	}
	loop := append(head(1, 1, 0, 0), "\x01a\x00\x00\x01\x00\x01\xc0\x13\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x01\x02\x03\x04"...)
	self := append(head(1, 1, 0, 0), "\xc0\x0c\x00\x01\x00\x01"...)
	overrun := append(head(1, 1, 0, 0), "\x01a\x00\x00\x01\x00\x01\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\xff\xff\x01"...)
	many := append(head(1, 65535, 65535, 65535), "\x01a\x00\x00\x01\x00\x01"...)
	for len(many) < maxMessage-11 {
		many = append(many, "\x00\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x00"...)
	}
	labels := append(head(1, 1, 0, 0), "\x01a\x00\x00\x01\x00\x01"...)
	labels = append(labels, bytes.Repeat([]byte("\x01a"), 300)...)
	return [][]byte{
		q, answer, negative, loop, self, overrun, many, labels, q[:20], answer[:40], head(1, 0, 0, 0), nil,
		ask(".", dns.TypeANY), ask("a", dns.TypeIXFR, withEDNS(0, false)),
		[]byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x00\xff\x18\x00\x03"),
	}
}

// FuzzQuery holds that what is taken for a query is one, and that all our
// answers to it are messages.
func FuzzQuery(f *testing.F) {
	for _, m := range messages() {
		f.Add(m)
	}
	s, w, _ := handleSetup(f)
	f.Fuzz(func(t *testing.T, msg []byte) {
		before := bytes.Clone(msg)
		var q query
		switch q.parse(msg) {
		case drop:
			return
		case accept:
			m := new(dns.Msg)
			if err := m.Unpack(msg); err == nil && len(m.Question) != 1 {
				t.Errorf("accepted %d questions", len(m.Question))
			}
			if out, ok := s.locals.answer(w.out[:0], &q); ok {
				checkReply(t, truncate(out, q.end, minPayload), &q)
			}
			if e := s.cache.get(q.key(), 0); e != nil && q.plain {
				checkReply(t, truncate(e.render(w.out[:0], &q, time.Hour), q.end, minPayload), &q)
			}
		}
		for _, rcode := range []int{rcodeFormErr, rcodeServFail, rcodeNotImp} {
			checkReply(t, q.appendReply(w.out[:0], rcode, edeNotReady), &q)
		}
		if !bytes.Equal(msg, before) {
			t.Error("the query was changed")
		}
	})
}

func checkReply(t *testing.T, b []byte, q *query) {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		t.Fatalf("answer %x to %x: %v", b, q.msg, err)
	}
	if !m.Response || m.Id != q.id() || len(b) > minPayload {
		t.Fatalf("answer %x to %x is none", b, q.msg)
	}
}

// FuzzAnswer holds that no answer makes the walkers hang, panic or write where
// they should not, and that what is cached can be rendered.
func FuzzAnswer(f *testing.F) {
	for _, m := range messages() {
		f.Add(m, uint16(512), uint32(1))
	}
	f.Fuzz(func(t *testing.T, msg []byte, limit uint16, age uint32) {
		if len(msg) < headerLen || len(msg) > maxMessage {
			return
		}
		// The question as the flight knows it, from the answer itself.
		ask := bytes.Clone(msg)
		ask[2], ask[3] = bitRD, 0
		var q query
		if end := skipName(ask, headerLen); end > 0 && end+4 <= len(ask) {
			ask = ask[:end+4]
			clear(ask[6:headerLen])
		}
		if q.parse(ask) != accept {
			return
		}
		if !matches(msg, string(ask[2:]), q.end, q.id()) {
			return
		}
		start := time.Now()
		c := cache{maxEntries: 10, maxBytes: 1 << 20}
		c.put(string(q.key()), msg, q.end, q.qtype, 0)
		if e := c.get(q.key(), 0); e != nil {
			if got := e.render(nil, &q, 0); !bytes.Equal(got[2:], msg[2:]) && !bytes.EqualFold(got[2:q.end], msg[2:q.end]) {
				t.Errorf("render(%x) = %x", msg, got)
			}
			got := e.render(nil, &q, time.Duration(age)*time.Second)
			if len(got) != len(msg) {
				t.Errorf("render changes the length from %d to %d", len(msg), len(got))
			}
		}
		countSOA(msg, &q)
		if got := truncate(bytes.Clone(msg), q.end, int(max(limit, minPayload))); len(got) > max(int(limit), minPayload) {
			t.Errorf("truncate to %d gives %d bytes", limit, len(got))
		}
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("took %v", d)
		}
	})
}

// TestHostileAnswers holds the time that the worst messages take.
func TestHostileAnswers(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("TEST_SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for _, msg := range messages() {
		for range 50 {
			b := bytes.Clone(msg)
			for range rnd.IntN(4) {
				if len(b) > 0 {
					b[rnd.IntN(len(b))] = byte(rnd.Uint32())
				}
			}
			if len(b) < headerLen {
				continue
			}
			start := time.Now()
			lifetime(b, headerLen, typeA, nil)
			truncate(b, headerLen, minPayload)
			if d := time.Since(start); d > 10*time.Millisecond {
				t.Logf("%d bytes took %v", len(b), d)
				if d > 10*time.Second {
					t.Fail()
				}
			}
		}
	}
}
