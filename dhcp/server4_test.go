package dhcp

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

// A reply as the tables have it: kind, yiaddr, destination.
type reply struct{ Kind, Addr, To string }

func replyOf(m *dhcpv4.DHCPv4, to *net.UDPAddr) reply {
	if m == nil {
		return reply{}
	}
	return reply{m.MessageType().String(), m.YourIPAddr.String(), to.String()}
}

const (
	discover = dhcpv4.MessageTypeDiscover
	requests = dhcpv4.MessageTypeRequest
	decline  = dhcpv4.MessageTypeDecline
	releases = dhcpv4.MessageTypeRelease
	inform   = dhcpv4.MessageTypeInform
)

// TestStates4 is RFC 2131 §4.3, message by message. In every case guest 1 has
// the lease of .15, and guest 2 was offered .16.
func TestStates4(t *testing.T) {
	const all = "255.255.255.255:68"
	type mods = []dhcpv4.Modifier
	none := reply{}
	nak := reply{"NAK", "0.0.0.0", all}
	tests := []struct {
		name  string
		kind  dhcpv4.MessageType
		guest int
		mods  mods
		after time.Duration
		want  reply
	}{
		{"discover: a new client gets the first unused address", discover, 3, nil, 0, reply{"OFFER", "10.0.2.17", all}},
		{"discover: a client gets what it has", discover, 1, nil, 0, reply{"OFFER", "10.0.2.15", all}},
		{"discover: and what it was offered", discover, 2, nil, 0, reply{"OFFER", "10.0.2.16", all}},
		{"discover: and what it had", discover, 1, nil, 100 * time.Hour, reply{"OFFER", "10.0.2.15", all}},
		{"discover: the wanted address, if it is free", discover, 3, mods{want("10.0.2.25")}, 0, reply{"OFFER", "10.0.2.25", all}},
		{"discover: not somebody else's", discover, 3, mods{want("10.0.2.15")}, 0, reply{"OFFER", "10.0.2.17", all}},
		{"discover: not of another network", discover, 3, mods{want("192.168.1.5")}, 0, reply{"OFFER", "10.0.2.17", all}},
		{"discover: not the gateway", discover, 3, mods{want("10.0.2.2")}, 0, reply{"OFFER", "10.0.2.17", all}},
		{"discover: not the name server", discover, 3, mods{want("10.0.2.3")}, 0, reply{"OFFER", "10.0.2.17", all}},
		{"discover: not the reserved address", discover, 3, mods{want("10.0.2.100")}, 0, reply{"OFFER", "10.0.2.17", all}},
		{"discover: the reserved address for its owner", discover, 100, mods{want("10.0.2.25")}, 0, reply{"OFFER", "10.0.2.100", all}},
		{"discover: rapid commit", discover, 3, mods{option(80)}, 0, reply{"ACK", "10.0.2.17", all}},

		{"selecting: the offer", requests, 2, mods{want("10.0.2.16"), server("10.0.2.2")}, 0, reply{"ACK", "10.0.2.16", all}},
		{"selecting: the offer of another server", requests, 2, mods{want("10.0.2.77"), server("10.0.2.9")}, 0, none},
		{"selecting: what is offered to another client", requests, 3, mods{want("10.0.2.16"), server("10.0.2.2")}, 0, reply{"ACK", "10.0.2.16", all}},
		{"selecting: what another client has", requests, 3, mods{want("10.0.2.15"), server("10.0.2.2")}, 0, nak},
		{"selecting: what another client had", requests, 3, mods{want("10.0.2.15"), server("10.0.2.2")}, 2 * time.Hour, reply{"ACK", "10.0.2.15", all}},
		{"selecting: outside the pool", requests, 3, mods{want("10.0.2.50"), server("10.0.2.2")}, 0, nak},
		{"selecting: the gateway", requests, 3, mods{want("10.0.2.2"), server("10.0.2.2")}, 0, nak},
		{"selecting: the reserved address", requests, 3, mods{want("10.0.2.100"), server("10.0.2.2")}, 0, nak},
		{"selecting: the owner of the reserved address another one", requests, 100, mods{want("10.0.2.20"), server("10.0.2.2")}, 0, nak},

		{"init-reboot: right", requests, 1, mods{want("10.0.2.15")}, 0, reply{"ACK", "10.0.2.15", all}},
		{"init-reboot: another address than the client has", requests, 1, mods{want("10.0.2.20")}, 0, reply{"ACK", "10.0.2.20", all}},
		{"init-reboot: another client's", requests, 3, mods{want("10.0.2.15")}, 0, nak},
		{"init-reboot: another network's", requests, 1, mods{want("192.168.1.5")}, 0, nak},
		{"init-reboot: no record, but free", requests, 3, mods{want("10.0.2.20")}, 0, reply{"ACK", "10.0.2.20", all}},

		{"renewing: right", requests, 1, mods{ciaddr("10.0.2.15")}, 30 * time.Minute, reply{"ACK", "10.0.2.15", "10.0.2.15:68"}},
		{"rebinding: late, but nobody else has it", requests, 1, mods{ciaddr("10.0.2.15")}, 2 * time.Hour, reply{"ACK", "10.0.2.15", "10.0.2.15:68"}},
		{"renewing: another client's", requests, 3, mods{ciaddr("10.0.2.15")}, 0, nak},
		{"rebinding: another network's", requests, 1, mods{ciaddr("192.168.1.5")}, 0, nak},
		{"renewing: no record, but free", requests, 3, mods{ciaddr("10.0.2.20")}, 0, reply{"ACK", "10.0.2.20", "10.0.2.20:68"}},
		{"renewing: with our server identifier", requests, 1, mods{ciaddr("10.0.2.15"), server("10.0.2.2")}, 0, reply{"ACK", "10.0.2.15", "10.0.2.15:68"}},
		{"request for nothing", requests, 1, nil, 0, none},

		{"decline", decline, 1, mods{want("10.0.2.15"), server("10.0.2.2")}, 0, none},
		{"release", releases, 1, mods{ciaddr("10.0.2.15"), server("10.0.2.2")}, 0, none},
		{"inform", inform, 7, mods{ciaddr("10.0.2.77")}, 0, reply{"ACK", "0.0.0.0", "10.0.2.77:68"}},
		{"inform: from another network", inform, 7, mods{ciaddr("192.168.1.5")}, 0, none},
		{"inform: from the gateway", inform, 7, mods{ciaddr("10.0.2.2")}, 0, none},
		{"inform: from the broadcast address", inform, 7, mods{ciaddr("10.0.2.255")}, 0, none},
		{"inform: without an address", inform, 7, nil, 0, none},

		{"a server's message: offer", dhcpv4.MessageTypeOffer, 1, nil, 0, none},
		{"a server's message: ack", dhcpv4.MessageTypeAck, 1, nil, 0, none},
		{"unknown message", dhcpv4.MessageType(77), 1, nil, 0, none},
		{"BOOTP, without a message type", dhcpv4.MessageTypeNone, 1, nil, 0, none},
		{"a relay's message", discover, 3, mods{dhcpv4.WithGatewayIP(net.IPv4(10, 0, 2, 9))}, 0, none},
		{"a link address of 16 bytes", discover, 3, mods{dhcpv4.WithHwAddr(make(net.HardwareAddr, 16))}, 0, none},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newTest4(t)
			if a, _ := lease4(t, s, start, mac(1)); a != addr("10.0.2.15") {
				t.Fatalf("guest 1 got %v", a)
			}
			ask4(t, s, start, message4(t, discover, mac(2)))
			m, to := ask4(t, s, start.Add(tt.after), message4(t, tt.kind, mac(tt.guest), tt.mods...))
			if diff := cmp.Diff(tt.want, replyOf(m, to)); diff != "" {
				t.Errorf("reply (-want +got):\n%s", diff)
			}
			if m == nil {
				return
			}
			if m.TransactionID != (dhcpv4.TransactionID{1, 2, 3, 4}) || !bytes.Equal(m.ClientHWAddr, mac(tt.guest)) {
				t.Errorf("reply is for %v %v", m.TransactionID, m.ClientHWAddr)
			}
			if !m.ServerIdentifier().Equal(net.IPv4(10, 0, 2, 2)) {
				t.Errorf("server identifier %v", m.ServerIdentifier())
			}
			if rapid := tt.kind == discover && m.MessageType() == dhcpv4.MessageTypeAck; rapid != m.Options.Has(dhcpv4.GenericOptionCode(80)) {
				t.Errorf("rapid commit option: %v, want %v", !rapid, rapid)
			}
		})
	}
}

// TestOptions4 checks what an answer carries for a parameter request list.
func TestOptions4(t *testing.T) {
	routes := func(c *Config4) { c.Routes = []Route{{Prefix: prefix("192.168.0.0/17")}} }
	tests := []struct {
		name   string
		change func(*Config4)
		kind   dhcpv4.MessageType
		mods   []dhcpv4.Modifier
		want   []byte
	}{
		{"no list: everything", func(*Config4) {}, discover, nil, []byte{1, 3, 6, 12, 15, 26, 28, 51, 53, 54, 58, 59, 119}},
		{"only what is asked for", func(*Config4) {}, discover, []dhcpv4.Modifier{params(3, 6, 250, 6, 3)}, []byte{1, 3, 6, 51, 53, 54, 58, 59}},
		{"a list without length", func(*Config4) {}, discover, []dhcpv4.Modifier{params()}, []byte{1, 3, 6, 12, 15, 26, 28, 51, 53, 54, 58, 59, 119}},
		{"nothing configured", func(c *Config4) { c.DNS, c.Domain, c.Search, c.MTU, c.Hostname = nil, "", nil, 0, "" }, discover,
			[]dhcpv4.Modifier{params(1, 3, 6, 12, 15, 26, 28, 119, 121)}, []byte{1, 3, 28, 51, 53, 54, 58, 59}},
		{"routes", routes, discover, []dhcpv4.Modifier{params(3, 121)}, []byte{1, 3, 51, 53, 54, 58, 59, 121}},
		{"inform: no lease", func(*Config4) {}, inform, []dhcpv4.Modifier{params(6), ciaddr("10.0.2.77")}, []byte{1, 6, 53, 54}},
		{"a client identifier comes back", func(*Config4) {}, discover, []dhcpv4.Modifier{params(3), option(61, 0, 'x')}, []byte{1, 3, 51, 53, 54, 58, 59, 61}},
		{"nak", func(*Config4) {}, requests, []dhcpv4.Modifier{params(3), want("10.0.2.2")}, []byte{53, 54, 56}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m, _ := ask4(t, newTest4(t, tt.change), start, message4(t, tt.kind, mac(1), tt.mods...))
			if m == nil {
				t.Fatal("no answer")
			}
			var got []byte
			for c := range 255 {
				if m.Options.Has(dhcpv4.GenericOptionCode(c)) {
					got = append(got, byte(c))
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("options (-want +got):\n%s", diff)
			}
		})
	}
}

func TestOptionValues4(t *testing.T) {
	s := newTest4(t, func(c *Config4) {
		c.Routes = []Route{{Prefix: prefix("192.168.129.0/17")}, {prefix("10.9.0.0/16"), addr("10.0.2.9")}}
	})
	m, _ := ask4(t, s, start, message4(t, discover, mac(1)))
	want := map[uint8]string{
		1:   "\xff\xff\xff\x00",
		3:   "\x0a\x00\x02\x02",
		6:   "\x0a\x00\x02\x03",
		12:  "guest",
		15:  "usernet.internal",
		26:  "\xff\xf0",
		28:  "\x0a\x00\x02\xff",
		51:  "\x00\x00\x0e\x10",
		58:  "\x00\x00\x07\x08",
		59:  "\x00\x00\x0c\x4e",
		119: "\x07usernet\x08internal\x00" + "\x04corp\x07example\x03com\x00" + "\xc0\x17",
		121: "\x11\xc0\xa8\x80\x0a\x00\x02\x02" + "\x10\x0a\x09\x0a\x00\x02\x09" + "\x00\x0a\x00\x02\x02",
	}
	for code, v := range want {
		if got := string(m.Options.Get(dhcpv4.GenericOptionCode(code))); got != v {
			t.Errorf("option %d is %q, want %q", code, got, v)
		}
	}
	if got := m.DomainSearch().Labels; !cmp.Equal(got, []string{"usernet.internal", "corp.example.com", "example.com"}) {
		t.Errorf("search list %v", got)
	}
}

// TestSize4 fills an answer with more than fits and checks that it keeps to the
// size that the client accepts, and what was left out.
func TestSize4(t *testing.T) {
	var many []string
	for i := range 100 {
		many = append(many, strings.Repeat(string(rune('a'+i%26)), 20+i%7)+".example.com")
	}
	s := newTest4(t, func(c *Config4) { c.Search = func() []string { return many } })
	sizes := map[int]int{0: 576, 100: 576, 576: 576, 1000: 1000, 1500: 1500, 9000: 1500}
	for asked, limit := range sizes {
		for _, p := range [][]byte{{119, 3, 6}, {3, 6, 119}} {
			mods := []dhcpv4.Modifier{params(p...)}
			if asked > 0 {
				mods = append(mods, option(57, byte(asked>>8), byte(asked)))
			}
			b, _ := s.handle(start, message4(t, discover, mac(1), mods...), netip.Addr{})
			if len(b)+28 > limit || len(b)+28 < limit-40 {
				t.Errorf("maximum %d, order %v: answer of %d bytes", asked, p, len(b)+28)
			}
			m, err := dhcpv4.FromBytes(b)
			if err != nil {
				t.Fatal(err)
			}
			if n := len(m.DomainSearch().Labels); n < 8 || n >= 100 {
				t.Errorf("maximum %d, order %v: %d domains", asked, p, n)
			}
		}
	}
}

// TestOverload4 sends options in the file and sname fields (RFC 2132 §9.3).
func TestOverload4(t *testing.T) {
	b := message4(t, discover, mac(1), option(52, 3))
	copy(b[108:], []byte{50, 2, 10, 0, 255}) // the address in two pieces
	copy(b[44:], []byte{50, 2, 2, 22, 255})
	m, _ := ask4(t, newTest4(t), start, b)
	if m == nil || !m.YourIPAddr.Equal(net.IPv4(10, 0, 2, 22)) {
		t.Errorf("answer %v", m)
	}
}

// TestMalformed4 has the messages that must be survived without an answer.
func TestMalformed4(t *testing.T) {
	good := message4(t, discover, mac(1))
	change := func(i int, v ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[i:], v)
		return b
	}
	tests := map[string][]byte{
		"empty":                   {},
		"one byte":                {1},
		"BOOTP, 236 bytes":        good[:236],
		"no cookie":               change(236, 0, 0, 0, 0),
		"no end option":           good[:243],
		"only padding":            append(bytes.Clone(good[:240]), make([]byte, 60)...),
		"option longer than it":   append(bytes.Clone(good[:240]), 53, 1, 1, 61, 200, 1),
		"a reply":                 change(0, 2),
		"another kind of link":    change(1, 6),
		"no link address":         change(2, 0),
		"link address of 255":     change(2, 255),
		"client id of 300 bytes":  append(append(bytes.Clone(good[:243]), bytes.Repeat([]byte{61, 150, 150: 7, 151: 7}, 2)...), 255),
		"overload, malformed":     append(append(change(108, bytes.Repeat([]byte{9, 200}, 64)...)[:243], 52, 1, 3), 255),
		"message type of 2 bytes": append(bytes.Clone(good[:240]), 53, 2, 1, 1, 255),
	}
	s := newTest4(t)
	for name, b := range tests {
		if m, _ := ask4(t, s, start, b); m != nil {
			t.Errorf("%s: answer %v", name, m)
		}
	}
	if m, _ := ask4(t, s, start, good); m == nil {
		t.Error("no answer to a good message afterwards")
	}
}

// TestCaptured4 answers messages of real clients.
func TestCaptured4(t *testing.T) {
	for name, b := range captured(t, "dhcp4") {
		s := newTest4(t)
		lease4(t, s, start, mac(100))
		q, err := parse4(b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		m, _ := ask4(t, s, start, b)
		silent := q.kind == releases || q.kind == decline
		if silent != (m == nil) {
			t.Errorf("%s, a %v: answer %v", name, q.kind, m)
		} else if m != nil && addr4(m.YourIPAddr) != addr("10.0.2.100") {
			t.Errorf("%s, a %v: got %v", name, q.kind, m.YourIPAddr)
		}
	}
}

// TestLeaseTime4 has a client that asks for another lease time.
func TestLeaseTime4(t *testing.T) {
	for asked, want := range map[uint32]time.Duration{0: time.Hour, 1: 2 * time.Minute, 600: 10 * time.Minute, 7200: time.Hour, 1<<32 - 1: time.Hour} {
		_, d := lease4(t, newTest4(t), start, mac(1), option(51, byte(asked>>24), byte(asked>>16), byte(asked>>8), byte(asked)))
		if d != want {
			t.Errorf("asked for %d s: %v, want %v", asked, d, want)
		}
	}
}

// TestDeclined4 checks that a declined address rests, that it is used again
// when nothing else is left, and that a reserved one stays its owner's.
func TestDeclined4(t *testing.T) {
	s := newTest4(t, func(c *Config4) { c.PoolEnd = addr("10.0.2.16") })
	declines := func(n int, a netip.Addr) {
		ask4(t, s, start, message4(t, decline, mac(n), want(a.String()), server("10.0.2.2")))
	}
	a, _ := lease4(t, s, start, mac(1))
	declines(2, a) // not its own
	if b, _ := lease4(t, s, start, mac(1)); b != a {
		t.Fatalf("got %v after somebody else declined %v", b, a)
	}
	declines(1, a)
	if b, _ := lease4(t, s, start, mac(1), want("10.0.2.15")); b != addr("10.0.2.16") {
		t.Errorf("after declining %v got %v", a, b)
	}
	if m, _ := ask4(t, s, start, message4(t, requests, mac(3), want(a.String()))); m.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("request for a declined address: %v", m.MessageType())
	}
	if b, _ := lease4(t, s, start, mac(3)); b != a {
		t.Errorf("with nothing else left, got %v", b)
	}
	ask4(t, s, start, message4(t, decline, mac(3), want(a.String()), server("10.0.2.2")))
	if m, _ := ask4(t, s, start.Add(restTime), message4(t, requests, mac(4), want(a.String()))); m.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("request after its rest: %v", m.MessageType())
	}

	r, _ := lease4(t, s, start, mac(100))
	declines(100, r)
	if b, _ := lease4(t, s, start, mac(100)); b != r {
		t.Errorf("reserved address was declined; then got %v", b)
	}
}

// TestMemory4 checks that a client gets its former address as long as there are
// others, and that the one unused for longest goes first.
func TestMemory4(t *testing.T) {
	s := newTest4(t)
	now := start
	for n := range 16 {
		now = now.Add(time.Second)
		a, _ := lease4(t, s, now, mac(n))
		if n == 2 {
			ask4(t, s, now, message4(t, releases, mac(2), ciaddr(a.String()), server("10.0.2.2")))
		}
	}
	if a, _ := lease4(t, s, now, mac(2)); a != addr("10.0.2.17") {
		t.Errorf("after its release guest 2 got %v", a)
	}
	now = now.Add(2 * time.Hour) // all have ended
	if a, _ := lease4(t, s, now, mac(20)); a != addr("10.0.2.15") {
		t.Errorf("a new guest got %v, not what was unused for longest", a)
	}
	if a, _ := lease4(t, s, now, mac(5)); a != addr("10.0.2.20") {
		t.Errorf("guest 5 came back and got %v", a)
	}
}

// TestDiscoverFlood4 sends many DISCOVERs of invented clients. They must take
// neither addresses nor memory.
func TestDiscoverFlood4(t *testing.T) {
	s := newTest4(t)
	held, _ := lease4(t, s, start, mac(1))
	n := 100_000
	if testing.Short() {
		n = 5_000
	}
	b := message4(t, discover, mac(0))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	now := start
	for i := range n {
		now = now.Add(10 * time.Microsecond)
		copy(b[28:], mac(1000+i))
		if i%2 == 1 { // half of them rapid
			s.handle(now, message4(t, discover, mac(1000+i), option(80)), netip.Addr{})
			continue
		}
		s.handle(now, b, netip.Addr{})
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 1<<20 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
	if len(s.pool.byAddr) > 16 || len(s.pool.byClient) > 16 {
		t.Errorf("%d entries by address, %d by client", len(s.pool.byAddr), len(s.pool.byClient))
	}
	if a, _ := lease4(t, s, now, mac(2)); !a.IsValid() {
		t.Error("a new client gets nothing")
	}
	if a, _ := lease4(t, s, now, mac(100)); a != addr("10.0.2.100") {
		t.Errorf("the owner of the reservation got %v", a)
	}
	if m, _ := ask4(t, s, now, message4(t, requests, mac(1), ciaddr(held.String()))); m == nil || m.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("renewal of %v: %v", held, m)
	}
}

// TestOfferDuringFlood4 lets an offer be pushed out before it is requested.
func TestOfferDuringFlood4(t *testing.T) {
	s := newTest4(t)
	offer, _ := ask4(t, s, start, message4(t, discover, mac(1)))
	for i := range 1000 {
		ask4(t, s, start, message4(t, discover, mac(1000+i)))
	}
	m, _ := ask4(t, s, start, message4(t, requests, mac(1), want(offer.YourIPAddr.String()), server("10.0.2.2")))
	if m == nil || m.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("the request got %v", m)
	}
}

// TestLeaseFlood4 has invented clients that take leases. They must not take the
// leases of others, and the pool must be back soon after.
func TestLeaseFlood4(t *testing.T) {
	s := newTest4(t)
	held, _ := lease4(t, s, start, mac(1))
	got := 0
	for i := range 5000 {
		if a, d := lease4(t, s, start, mac(1000+i)); a.IsValid() {
			got++
			if a == held || (got > 9 && d > scarceLease) {
				t.Fatalf("client %d got %v for %v", got, a, d)
			}
		}
	}
	if got != 15 {
		t.Errorf("%d clients got leases, want 15", got)
	}
	if s.Stats().Exhausted == 0 {
		t.Error("no client was counted as left without an address")
	}
	if a, _ := lease4(t, s, start, mac(100)); a != addr("10.0.2.100") {
		t.Errorf("the owner of the reservation got %v", a)
	}
	if a, _ := lease4(t, s, start, mac(2)); a.IsValid() {
		t.Errorf("a new client got %v, which somebody has", a)
	}
	if a, _ := lease4(t, s, start.Add(scarceLease), mac(2)); !a.IsValid() {
		t.Error("two minutes later a new client gets nothing")
	}
}

// BenchmarkLease4 takes clients through DISCOVER and REQUEST.
func BenchmarkLease4(b *testing.B) {
	s := newTest4(b)
	d := message4(b, discover, mac(1))
	r := message4(b, requests, mac(1), want("10.0.2.15"), server("10.0.2.2"))
	b.ReportAllocs()
	for b.Loop() {
		s.handle(start, d, netip.Addr{})
		s.handle(start, r, netip.Addr{})
	}
}

// TestLogRate4 checks that a guest cannot fill the log.
func TestLogRate4(t *testing.T) {
	var b bytes.Buffer
	s := newTest4(t, func(c *Config4) {
		c.Logger = slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	for i := range 10_000 {
		now := start.Add(time.Duration(i) * time.Millisecond)
		lease4(t, s, now, mac(i))
		s.handle(now, []byte("junk"), netip.Addr{})
	}
	if n := strings.Count(b.String(), "\n"); n < 20 || n > 31 {
		t.Errorf("%d lines in 10 s", n)
	}
	if !strings.Contains(b.String(), "suppressed=") {
		t.Error("the log does not say that lines are missing")
	}
}

// TestRun4 runs the server on fake time: a lease is seen, and ends.
func TestRun4(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest4(t)
		conn := s.cfg.Conn.(*memConn)
		ctx, cancel := context.WithCancel(t.Context())
		end := make(chan error, 1)
		go func() { end <- s.Run(ctx) }()

		from := &net.UDPAddr{IP: net.IPv4zero, Port: 68}
		conn.in <- datagram{make([]byte, 4000), from} // dropped for its length
		conn.in <- datagram{message4(t, discover, mac(1)), from}
		<-conn.out
		if l := s.Leases(); len(l) != 1 || !l[0].Offered {
			t.Errorf("after the offer: %+v", l)
		}
		begin := time.Now()
		conn.in <- datagram{message4(t, requests, mac(1), want("10.0.2.15"), server("10.0.2.2"), option(12, []byte("box")...)), from}
		<-conn.out
		wantLease := []Lease{{
			Addr: addr("10.0.2.15"), LinkAddr: mac(1), Client: append([]byte{1}, mac(1)...), Hostname: "box",
			Start: begin, Expires: begin.Add(time.Hour),
		}}
		if diff := cmp.Diff(wantLease, s.Leases(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("leases (-want +got):\n%s", diff)
		}
		time.Sleep(time.Hour - time.Second)
		if l := s.Leases(); len(l) != 1 {
			t.Errorf("a second before the end: %+v", l)
		}
		time.Sleep(time.Second)
		if l := s.Leases(); len(l) != 0 {
			t.Errorf("after the end: %+v", l)
		}
		cancel()
		if err := <-end; err != nil {
			t.Errorf("Run: %v", err)
		}
		if _, _, err := conn.ReadFrom(nil); err != net.ErrClosed {
			t.Errorf("the conn is not closed: %v", err)
		}
	})
}

// TestRunEnds checks that Run tells when its conn failed.
func TestRunEnds(t *testing.T) {
	s := newTest4(t)
	s.cfg.Conn.Close()
	if err := s.Run(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "dhcp: read message: ") {
		t.Errorf("Run: %v", err)
	}
}

func TestConfig4(t *testing.T) {
	tests := map[string]func(*Config4){
		"no conn":                  func(c *Config4) { c.Conn = nil },
		"no prefix":                func(c *Config4) { c.Prefix = netip.Prefix{} },
		"gateway elsewhere":        func(c *Config4) { c.Gateway = addr("10.0.3.2") },
		"pool elsewhere":           func(c *Config4) { c.PoolEnd = addr("10.0.3.2") },
		"pool backwards":           func(c *Config4) { c.PoolEnd = addr("10.0.2.10") },
		"pool without an end":      func(c *Config4) { c.PoolEnd = netip.Addr{} },
		"reserved elsewhere":       func(c *Config4) { c.Reservations[0].Addr = addr("10.0.3.1") },
		"reserved gateway":         func(c *Config4) { c.Reservations[0].Addr = c.Gateway },
		"reserved broadcast":       func(c *Config4) { c.Reservations[0].Addr = addr("10.0.2.255") },
		"reserved for nobody":      func(c *Config4) { c.Reservations[0].LinkAddr = nil },
		"reserved twice":           func(c *Config4) { c.Reservations = append(c.Reservations, Reservation{mac(3), addr("10.0.2.100")}) },
		"two for one":              func(c *Config4) { c.Reservations = append(c.Reservations, Reservation{mac(100), addr("10.0.2.101")}) },
		"MTU":                      func(c *Config4) { c.MTU = 70000 },
		"lease time":               func(c *Config4) { c.LeaseTime = time.Second },
		"IPv6 name server":         func(c *Config4) { c.DNS = []netip.Addr{addr("fd00::3")} },
		"IPv6 route":               func(c *Config4) { c.Routes = []Route{{Prefix: prefix("fd00::/64")}} },
		"route by an IPv6 address": func(c *Config4) { c.Routes = []Route{{prefix("10.9.0.0/16"), addr("fd00::3")}} },
	}
	for name, change := range tests {
		cfg := config4()
		change(&cfg)
		if _, err := New4(cfg); err == nil || !strings.HasPrefix(err.Error(), "dhcp: configure DHCPv4: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
