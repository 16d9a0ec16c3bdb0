package dhcp

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv6"
)

// config6 is the network that the tests have: ::100 is reserved for guest 100.
func config6() Config6 {
	return Config6{
		Conn:         newMemConn(),
		Prefix:       prefix("fd75:736e:6574::/64"),
		Gateway:      addr("fd75:736e:6574::2"),
		LinkAddr:     net.HardwareAddr{0x52, 0x55, 10, 0, 2, 2},
		DNS:          []netip.Addr{addr("fd75:736e:6574::3")},
		Search:       func() []string { return []string{"usernet.internal", "example.com"} },
		PoolStart:    addr("fd75:736e:6574::1000"),
		PoolEnd:      addr("fd75:736e:6574::1fff"),
		Reservations: []Reservation{{mac(100), addr("fd75:736e:6574::100")}},
	}
}

func newTest6(t testing.TB, change ...func(*Config6)) *Server6 {
	t.Helper()
	cfg := config6()
	for _, f := range change {
		f(&cfg)
	}
	s, err := New6(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// duid returns the DUID of the n-th guest, type LL.
func duid(n int) []byte { return append([]byte{0, 3, 0, 1}, mac(n)...) }

// serverDUID is the one that config6 leads to.
var serverDUID = []byte{0, 3, 0, 1, 0x52, 0x55, 10, 0, 2, 2}

var linkLocal = addr("fe80::1%tap0")

type opts6 []dhcpv6.Option

func raw6(code dhcpv6.OptionCode, v ...byte) dhcpv6.Option {
	return &dhcpv6.OptionGeneric{OptionCode: code, OptionData: v}
}
func client6(n int) dhcpv6.Option { return raw6(dhcpv6.OptionClientID, duid(n)...) }
func server6(v []byte) dhcpv6.Option {
	return raw6(dhcpv6.OptionServerID, v...)
}

// iana6 makes an IA_NA option with IAID id.
func iana6(id byte, addrs ...string) dhcpv6.Option {
	o := &dhcpv6.OptIANA{IaId: [4]byte{0, 0, 0, id}}
	for _, a := range addrs {
		o.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(a)})
	}
	return o
}

func message6(kind dhcpv6.MessageType, opts ...dhcpv6.Option) []byte {
	m := &dhcpv6.Message{MessageType: kind, TransactionID: dhcpv6.TransactionID{7, 8, 9}}
	for _, o := range opts {
		m.AddOption(o)
	}
	return m.ToBytes()
}

func ask6(t testing.TB, s *Server6, now time.Time, b []byte) *dhcpv6.Message {
	t.Helper()
	r, to := s.handle(now, b, linkLocal)
	if r == nil {
		return nil
	}
	if u := to.(*net.UDPAddr); u.String() != "[fe80::1%tap0]:546" {
		t.Errorf("answer goes to %v", u)
	}
	m, err := dhcpv6.MessageFromBytes(r)
	if err != nil {
		t.Fatalf("answer % x: %v", r, err)
	}
	if m.TransactionID != (dhcpv6.TransactionID{7, 8, 9}) {
		t.Errorf("transaction %v", m.TransactionID)
	}
	if !bytes.Equal(m.Options.ServerID().ToBytes(), s.duid) {
		t.Errorf("server identifier %v", m.Options.ServerID())
	}
	return m
}

// brief is an answer in short: its kind, its status, then each association with
// addresses (0 where the lifetime is) and status.
func brief(m *dhcpv6.Message) string {
	if m == nil {
		return ""
	}
	s := []string{m.MessageType.String()}
	if o := m.Options.Status(); o != nil {
		s = append(s, o.StatusCode.String())
	}
	for _, ia := range m.Options.IANA() {
		t := []string{}
		for _, a := range ia.Options.Addresses() {
			t = append(t, strings.TrimPrefix(a.IPv6Addr.String(), "fd75:736e:6574::"))
			if a.ValidLifetime == 0 {
				t[len(t)-1] += "=0"
			}
		}
		if o := ia.Options.Status(); o != nil {
			t = append(t, o.StatusCode.String())
		}
		s = append(s, "("+strings.Join(t, " ")+")")
	}
	for _, o := range m.Options.IATA() {
		s = append(s, "TA:"+o.Options.Status().StatusCode.String())
	}
	for _, o := range m.Options.IAPD() {
		s = append(s, "PD:"+o.Options.Status().StatusCode.String())
	}
	if m.GetOneOption(dhcpv6.OptionRapidCommit) != nil {
		s = append(s, "rapid")
	}
	return strings.Join(s, " ")
}

// TestStates6 is RFC 8415 §16 and §18.3, message by message. In every case guest
// 1 has a lease of ::1abc for association 1.
func TestStates6(t *testing.T) {
	const (
		net6    = "fd75:736e:6574::"
		mine    = net6 + "1abc"
		other   = net6 + "1def"
		foreign = "2001:db8::1"
	)
	ours, theirs := server6(serverDUID), server6(duid(77))
	rapid := raw6(dhcpv6.OptionRapidCommit)
	tests := []struct {
		name string
		kind dhcpv6.MessageType
		opts opts6
		want string
	}{
		{"solicit: what the client has", dhcpv6.MessageTypeSolicit, opts6{client6(1), iana6(1)}, "ADVERTISE (1abc)"},
		{"solicit: what it wants", dhcpv6.MessageTypeSolicit, opts6{client6(2), iana6(1, other)}, "ADVERTISE (1def)"},
		{"solicit: reserved", dhcpv6.MessageTypeSolicit, opts6{client6(100), iana6(1, other)}, "ADVERTISE (100)"},
		{"solicit: the reserved one only once", dhcpv6.MessageTypeSolicit, opts6{client6(100), iana6(1), iana6(2, other)}, "ADVERTISE (100) (1def)"},
		{"solicit: rapid commit", dhcpv6.MessageTypeSolicit, opts6{client6(100), iana6(1), rapid}, "REPLY (100) rapid"},
		{"solicit: nothing", dhcpv6.MessageTypeSolicit, opts6{client6(1), rapid}, "ADVERTISE"},
		{"solicit: temporary addresses and prefixes", dhcpv6.MessageTypeSolicit, opts6{client6(100), iana6(1), &dhcpv6.OptIATA{}, &dhcpv6.OptIAPD{}}, "ADVERTISE (100) TA:NoAddrsAvail PD:NoPrefixAvail"},
		{"solicit without a client identifier", dhcpv6.MessageTypeSolicit, opts6{iana6(1)}, ""},
		{"solicit with a server identifier", dhcpv6.MessageTypeSolicit, opts6{client6(1), ours, iana6(1)}, ""},
		{"solicit with 5 associations", dhcpv6.MessageTypeSolicit, opts6{client6(1), iana6(1), iana6(2), iana6(3), iana6(4), iana6(5)}, ""},
		{"solicit with a DUID of 131 bytes", dhcpv6.MessageTypeSolicit, opts6{raw6(dhcpv6.OptionClientID, make([]byte, 131)...), iana6(1)}, ""},
		{"solicit with a DUID of 2 bytes", dhcpv6.MessageTypeSolicit, opts6{raw6(dhcpv6.OptionClientID, 0, 3), iana6(1)}, ""},

		{"request", dhcpv6.MessageTypeRequest, opts6{client6(2), ours, iana6(1, other)}, "REPLY (1def)"},
		{"request: somebody else's", dhcpv6.MessageTypeRequest, opts6{client6(100), ours, iana6(1, mine)}, "REPLY (100)"},
		{"request: of another link", dhcpv6.MessageTypeRequest, opts6{client6(2), ours, iana6(1, foreign)}, "REPLY (NotOnLink)"},
		{"request: no prefixes", dhcpv6.MessageTypeRequest, opts6{client6(2), ours, &dhcpv6.OptIAPD{}}, "REPLY PD:NoPrefixAvail"},
		{"request for another server", dhcpv6.MessageTypeRequest, opts6{client6(2), theirs, iana6(1, other)}, ""},
		{"request without a server identifier", dhcpv6.MessageTypeRequest, opts6{client6(2), iana6(1, other)}, ""},
		{"request without a client identifier", dhcpv6.MessageTypeRequest, opts6{ours, iana6(1, other)}, ""},

		{"renew", dhcpv6.MessageTypeRenew, opts6{client6(1), ours, iana6(1, mine)}, "REPLY (1abc)"},
		{"renew: no record, but free", dhcpv6.MessageTypeRenew, opts6{client6(2), ours, iana6(1, other)}, "REPLY (1def)"},
		{"renew: not free", dhcpv6.MessageTypeRenew, opts6{client6(100), ours, iana6(1, mine)}, "REPLY (100 1abc=0)"},
		{"renew: and one of another link", dhcpv6.MessageTypeRenew, opts6{client6(1), ours, iana6(1, mine, foreign)}, "REPLY (1abc 2001:db8::1=0)"},
		{"renew: no prefixes", dhcpv6.MessageTypeRenew, opts6{client6(1), ours, &dhcpv6.OptIATA{}, &dhcpv6.OptIAPD{}}, "REPLY TA:NoBinding PD:NoBinding"},
		{"renew without a server identifier", dhcpv6.MessageTypeRenew, opts6{client6(1), iana6(1, mine)}, ""},
		{"renew at another server", dhcpv6.MessageTypeRenew, opts6{client6(1), theirs, iana6(1, mine)}, ""},

		{"rebind", dhcpv6.MessageTypeRebind, opts6{client6(1), iana6(1, mine)}, "REPLY (1abc)"},
		{"rebind: another link", dhcpv6.MessageTypeRebind, opts6{client6(1), iana6(1, foreign)}, "REPLY (1abc 2001:db8::1=0)"},
		{"rebind with a server identifier", dhcpv6.MessageTypeRebind, opts6{client6(1), ours, iana6(1, mine)}, ""},

		{"confirm", dhcpv6.MessageTypeConfirm, opts6{client6(1), iana6(1, mine)}, "REPLY Success"},
		{"confirm: another link", dhcpv6.MessageTypeConfirm, opts6{client6(1), iana6(1, mine), iana6(2, foreign)}, "REPLY NotOnLink"},
		{"confirm: no addresses", dhcpv6.MessageTypeConfirm, opts6{client6(1), iana6(1)}, ""},
		{"confirm with a server identifier", dhcpv6.MessageTypeConfirm, opts6{client6(1), ours, iana6(1, mine)}, ""},

		{"release", dhcpv6.MessageTypeRelease, opts6{client6(1), ours, iana6(1, mine)}, "REPLY Success"},
		{"release: not its own", dhcpv6.MessageTypeRelease, opts6{client6(2), ours, iana6(1, mine)}, "REPLY Success (NoBinding)"},
		{"release: no prefixes", dhcpv6.MessageTypeRelease, opts6{client6(1), ours, &dhcpv6.OptIAPD{}}, "REPLY Success PD:NoBinding"},
		{"release without a server identifier", dhcpv6.MessageTypeRelease, opts6{client6(1), iana6(1, mine)}, ""},
		{"decline", dhcpv6.MessageTypeDecline, opts6{client6(1), ours, iana6(1, mine)}, "REPLY Success"},
		{"decline: not its own", dhcpv6.MessageTypeDecline, opts6{client6(1), ours, iana6(1, other)}, "REPLY Success (NoBinding)"},

		{"information request", dhcpv6.MessageTypeInformationRequest, opts6{client6(1)}, "REPLY"},
		{"information request: anonymous", dhcpv6.MessageTypeInformationRequest, opts6{}, "REPLY"},
		{"information request: our server identifier", dhcpv6.MessageTypeInformationRequest, opts6{ours}, "REPLY"},
		{"information request for another server", dhcpv6.MessageTypeInformationRequest, opts6{theirs}, ""},
		{"information request with an association", dhcpv6.MessageTypeInformationRequest, opts6{client6(1), iana6(1)}, ""},

		{"a server's message: advertise", dhcpv6.MessageTypeAdvertise, opts6{client6(1), ours}, ""},
		{"a server's message: reply", dhcpv6.MessageTypeReply, opts6{client6(1), ours}, ""},
		{"reconfigure", dhcpv6.MessageTypeReconfigure, opts6{client6(1), ours}, ""},
		{"a relay's message", dhcpv6.MessageTypeRelayForward, opts6{client6(1)}, ""},
		{"unknown message", dhcpv6.MessageType(99), opts6{client6(1)}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newTest6(t)
			if got := brief(ask6(t, s, start, message6(dhcpv6.MessageTypeRequest, client6(1), ours, iana6(1, mine)))); got != "REPLY (1abc)" {
				t.Fatalf("guest 1 got %s", got)
			}
			m := ask6(t, s, start.Add(time.Minute), message6(tt.kind, tt.opts...))
			if got := brief(m); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if m != nil && m.MessageType == dhcpv6.MessageTypeAdvertise && m.Options.Preference() != 255 {
				t.Errorf("preference %d", m.Options.Preference())
			}
		})
	}
}

// TestParameters6 checks what a reply carries for an option request option, and
// its lifetimes.
func TestParameters6(t *testing.T) {
	s := newTest6(t)
	dns, search := dhcpv6.OptionDNSRecursiveNameServer, dhcpv6.OptionDomainSearchList
	tests := []struct {
		name        string
		opt         []dhcpv6.Option
		dns, search bool
	}{
		{"all", nil, true, true},
		{"name servers", opts6{dhcpv6.OptRequestedOption(dns)}, true, false},
		{"search list", opts6{dhcpv6.OptRequestedOption(search)}, false, true},
		{"neither", opts6{dhcpv6.OptRequestedOption(dhcpv6.OptionFQDN)}, false, false},
	}
	for _, tt := range tests {
		m := ask6(t, s, start, message6(dhcpv6.MessageTypeInformationRequest, tt.opt...))
		if got := m.Options.DNS(); tt.dns != (len(got) == 1 && got[0].String() == "fd75:736e:6574::3") {
			t.Errorf("%s: name servers %v", tt.name, got)
		}
		var got []string
		if l := m.Options.DomainSearchList(); l != nil {
			got = l.Labels
		}
		if tt.search != cmp.Equal(got, []string{"usernet.internal", "example.com"}) {
			t.Errorf("%s: search list %v", tt.name, got)
		}
		if m.GetOneOption(dhcpv6.OptionInformationRefreshTime) == nil {
			t.Errorf("%s: no refresh time", tt.name)
		}
	}
	m := ask6(t, s, start, message6(dhcpv6.MessageTypeSolicit, client6(100), iana6(1)))
	ia := m.Options.OneIANA()
	a := ia.Options.OneAddress()
	if ia.T1 != 30*time.Minute || ia.T2 != 48*time.Minute || a.PreferredLifetime != time.Hour || a.ValidLifetime != time.Hour {
		t.Errorf("times %v %v %v %v", ia.T1, ia.T2, a.PreferredLifetime, a.ValidLifetime)
	}
}

// TestSize6 has more domains than fit in the smallest MTU.
func TestSize6(t *testing.T) {
	var many []string
	for range 100 {
		many = append(many, strings.Repeat("a", 30)+".example.com")
	}
	s := newTest6(t, func(c *Config6) { c.Search = func() []string { return many } })
	b, _ := s.handle(start, message6(dhcpv6.MessageTypeSolicit, client6(100), iana6(1)), linkLocal)
	if n := len(b) + 48; n > 1280 || n < 1180 {
		t.Errorf("answer of %d bytes", n)
	}
}

// TestReservation6 finds the link address in all the places where it can be.
func TestReservation6(t *testing.T) {
	m := mac(100)
	eui := netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
	uuid := append([]byte{0, 4}, make([]byte, 16)...)
	tests := []struct {
		name string
		duid []byte
		from netip.Addr
		want bool
	}{
		{"DUID-LL", duid(100), linkLocal, true},
		{"DUID-LLT", append([]byte{0, 1, 0, 1, 9, 9, 9, 9}, m...), linkLocal, true},
		{"DUID-UUID", uuid, linkLocal, false},
		{"DUID-UUID from EUI-64", uuid, eui, true},
		{"DUID-LL goes before the EUI-64", duid(1), eui, false},
		{"DUID-LL of another kind of link", append([]byte{0, 3, 0, 6}, m...), linkLocal, false},
		{"DUID-LL too long", append(duid(100), 1), linkLocal, false},
	}
	for _, tt := range tests {
		s := newTest6(t)
		b, _ := s.handle(start, message6(dhcpv6.MessageTypeSolicit, raw6(dhcpv6.OptionClientID, tt.duid...), iana6(1)), tt.from)
		r, err := dhcpv6.MessageFromBytes(b)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := brief(r) == "ADVERTISE (100)"; got != tt.want {
			t.Errorf("%s: %s", tt.name, brief(r))
		}
	}
}

// TestSameAddress6 checks that a client gets the same address from a server that
// does not know it.
func TestSameAddress6(t *testing.T) {
	solicit := message6(dhcpv6.MessageTypeSolicit, client6(5), iana6(9))
	a, b := brief(ask6(t, newTest6(t), start, solicit)), brief(ask6(t, newTest6(t), start, solicit))
	if a != b || !strings.HasPrefix(a, "ADVERTISE (1") {
		t.Errorf("got %s, then %s", a, b)
	}
}

// TestStateless6 has a server without addresses.
func TestStateless6(t *testing.T) {
	s := newTest6(t, func(c *Config6) { c.PoolStart, c.PoolEnd, c.Reservations = netip.Addr{}, netip.Addr{}, nil })
	if got := brief(ask6(t, s, start, message6(dhcpv6.MessageTypeSolicit, client6(1), iana6(1)))); got != "ADVERTISE (NoAddrsAvail)" {
		t.Errorf("solicit: %s", got)
	}
	if got := brief(ask6(t, s, start, message6(dhcpv6.MessageTypeInformationRequest))); got != "REPLY" {
		t.Errorf("information request: %s", got)
	}
}

func TestRandomDUID(t *testing.T) {
	none := func(c *Config6) { c.LinkAddr = nil }
	a, b := newTest6(t, none), newTest6(t, none)
	if len(a.duid) != 18 || bytes.Equal(a.duid, b.duid) {
		t.Errorf("DUIDs %x and %x", a.duid, b.duid)
	}
}

// TestMalformed6 has the messages that must be survived without an answer.
func TestMalformed6(t *testing.T) {
	s := newTest6(t)
	good := message6(dhcpv6.MessageTypeSolicit, client6(1), iana6(1))
	tests := map[string][]byte{
		"empty":                   {},
		"header only":             good[:4],
		"cut":                     good[:len(good)-1],
		"half an option":          append(bytes.Clone(good), 0, 1, 0),
		"association of 3 bytes":  message6(dhcpv6.MessageTypeSolicit, client6(1), raw6(dhcpv6.OptionIANA, 1, 2, 3)),
		"address of 3 bytes":      message6(dhcpv6.MessageTypeSolicit, client6(1), raw6(dhcpv6.OptionIANA, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 3, 1, 2, 3)),
		"odd option request":      message6(dhcpv6.MessageTypeSolicit, client6(1), raw6(dhcpv6.OptionORO, 1)),
		"associations in another": message6(dhcpv6.MessageTypeSolicit, client6(1), nested(120)),
	}
	for name, b := range tests {
		r, _ := s.handle(start, b, linkLocal)
		if name != "associations in another" && r != nil {
			t.Errorf("%s: answer % x", name, r)
		}
	}
	for _, from := range []string{"fd75:736e:6574::100", "::", "::1", "10.0.2.100", "ff02::1"} {
		if r, _ := s.handle(start, good, addr(from)); r != nil {
			t.Errorf("answer to %s", from)
		}
	}
	if ask6(t, s, start, good) == nil {
		t.Error("no answer to a good message afterwards")
	}
}

// TestCaptured6 answers messages of real clients, on the address that guest 100
// has without privacy.
func TestCaptured6(t *testing.T) {
	for name, b := range captured(t, "dhcp6") {
		r, _ := newTest6(t).handle(start, b, addr("fe80::5054:ff:fe00:64"))
		m, err := dhcpv6.MessageFromBytes(r)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		released := b[0] == byte(dhcpv6.MessageTypeRelease)
		if n := len(m.Options.IANA()); n > 0 && !released && !strings.Contains(brief(m), "(100") {
			t.Errorf("%s: %s", name, brief(m))
		}
	}
}

// nested returns an association in an association, n times.
func nested(n int) dhcpv6.Option {
	o := &dhcpv6.OptIANA{}
	if n > 0 {
		o.Options.Add(nested(n - 1))
	}
	return o
}

// TestSolicitFlood6 has invented clients, half of which take leases.
func TestSolicitFlood6(t *testing.T) {
	s := newTest6(t)
	if got := brief(ask6(t, s, start, message6(dhcpv6.MessageTypeSolicit, client6(1), iana6(1, "fd75:736e:6574::1abc"), raw6(dhcpv6.OptionRapidCommit)))); got != "REPLY (1abc) rapid" {
		t.Fatal(got)
	}
	for i := range 5000 {
		opts := opts6{client6(1000 + i), iana6(1)}
		if i%2 == 0 {
			opts = append(opts, raw6(dhcpv6.OptionRapidCommit))
		}
		ask6(t, s, start, message6(dhcpv6.MessageTypeSolicit, opts...))
		ask6(t, s, start, message6(dhcpv6.MessageTypeRequest, client6(20000+i), server6(serverDUID), iana6(1)))
	}
	if n := len(s.pool.byAddr); n > maxEntries+1 || len(s.pool.byClient) != n {
		t.Errorf("%d entries by address, %d by client", n, len(s.pool.byClient))
	}
	if got := brief(ask6(t, s, start, message6(dhcpv6.MessageTypeSolicit, client6(100), iana6(1)))); got != "ADVERTISE (100)" {
		t.Errorf("the owner of the reservation got %s", got)
	}
	if got := brief(ask6(t, s, start, message6(dhcpv6.MessageTypeRenew, client6(1), server6(serverDUID), iana6(1, "fd75:736e:6574::1abc")))); got != "REPLY (1abc)" {
		t.Errorf("renewal: %s", got)
	}
	if got := brief(ask6(t, s, start.Add(scarceLease), message6(dhcpv6.MessageTypeSolicit, client6(2), iana6(1)))); !strings.HasPrefix(got, "ADVERTISE (1") {
		t.Errorf("a new client two minutes later got %s", got)
	}
}

func TestRun6(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest6(t)
		conn := s.cfg.Conn.(*memConn)
		ctx, cancel := context.WithCancel(t.Context())
		end := make(chan error, 1)
		go func() { end <- s.Run(ctx) }()

		from := &net.UDPAddr{IP: net.ParseIP("fe80::1"), Port: 546}
		conn.in <- datagram{message6(dhcpv6.MessageTypeSolicit, client6(100), iana6(1), raw6(dhcpv6.OptionRapidCommit)), from}
		d := <-conn.out
		if d.peer.String() != "[fe80::1]:546" {
			t.Errorf("answer to %v", d.peer)
		}
		if l := s.Leases(); len(l) != 1 || l[0].Addr != addr("fd75:736e:6574::100") || !bytes.Equal(l[0].Client, duid(100)) || l[0].Offered {
			t.Errorf("leases %+v", l)
		}
		time.Sleep(time.Hour)
		if l := s.Leases(); len(l) != 0 {
			t.Errorf("after the end: %+v", l)
		}
		cancel()
		if err := <-end; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestConfig6(t *testing.T) {
	tests := map[string]func(*Config6){
		"no conn":              func(c *Config6) { c.Conn = nil },
		"no prefix":            func(c *Config6) { c.Prefix = netip.Prefix{} },
		"IPv4 prefix":          func(c *Config6) { c.Prefix = prefix("10.0.2.0/24") },
		"IPv4 name server":     func(c *Config6) { c.DNS = []netip.Addr{addr("10.0.2.3")} },
		"pool elsewhere":       func(c *Config6) { c.PoolEnd = addr("fd00::1") },
		"reserved name server": func(c *Config6) { c.Reservations[0].Addr = c.DNS[0] },
		"lease time":           func(c *Config6) { c.LeaseTime = time.Second },
	}
	for name, change := range tests {
		cfg := config6()
		change(&cfg)
		if _, err := New6(cfg); err == nil || !strings.HasPrefix(err.Error(), "dhcp: configure DHCPv6: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
