package dhcp

import (
	"bytes"
	"context"
	"encoding/hex"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func configRA() ConfigRA {
	return ConfigRA{
		Conn:     newMemConn(),
		Prefix:   prefix("fd75:736e:6574::/64"),
		DNS:      []netip.Addr{addr("fd75:736e:6574::3")},
		Search:   func() []string { return []string{"usernet.internal", "a.example"} },
		MTU:      65520,
		LinkAddr: net.HardwareAddr{0x52, 0x55, 10, 0, 2, 2},
	}
}

// TestAdvertisement compares with bytes written out from the RFCs.
func TestAdvertisement(t *testing.T) {
	full := strings.Join([]string{
		"86 00 0000  40 00 0708  00000000 00000000", // RFC 4861 §4.2: hop limit 64, 1800 s
		"01 01 52550a000202",                        // §4.6.1 source link-layer address
		"05 01 0000 0000fff0",                       // §4.6.4 MTU
		"03 04 40 c0 00015180 00003840 00000000 fd75736e657400000000000000000000",           // §4.6.2 prefix, L and A
		"19 03 0000 00000708 fd75736e657400000000000000000003",                              // RFC 8106 §5.1
		"1f 05 0000 00000708 077573 65726e6574 08696e7465726e616c 00 0161 076578616d706c65", // §5.2
		"00 000000", // end of the name, padding
	}, "")
	tests := []struct {
		name   string
		change func(*ConfigRA)
		router bool
		want   string
	}{
		{"full", func(*ConfigRA) {}, true, full},
		{"no default route", func(*ConfigRA) {}, false, strings.Replace(full, "40 00 0708", "40 00 0000", 1)},
		{"managed", func(c *ConfigRA) { c.Managed = true }, true, strings.Replace(full, "40 00 0708", "40 80 0708", 1)},
		{"other", func(c *ConfigRA) { c.Other = true }, true, strings.Replace(full, "40 00 0708", "40 40 0708", 1)},
		{"a /60, no autoconfiguration", func(c *ConfigRA) { c.Prefix = prefix("fd75:736e:6574::/60") }, true, strings.Replace(full, "40 c0 00015180", "3c 80 00015180", 1)},
		{"for ever", func(c *ConfigRA) { c.ValidLifetime, c.PreferredLifetime = 1<<63-1, 1<<63-1 }, true, strings.Replace(full, "00015180 00003840", "ffffffff ffffffff", 1)},
		{"nothing more", func(c *ConfigRA) { c.DNS, c.Search, c.MTU, c.LinkAddr = nil, nil, 0, nil }, true,
			"86 00 0000  40 00 0708  00000000 00000000" + "03 04 40 c0 00015180 00003840 00000000 fd75736e657400000000000000000000"},
	}
	for _, tt := range tests {
		cfg := configRA()
		tt.change(&cfg)
		a, err := NewAdvertiser(cfg)
		if err != nil {
			t.Fatal(err)
		}
		var search []string
		if a.cfg.Search != nil {
			search = a.cfg.Search()
		}
		want, err := hex.DecodeString(strings.ReplaceAll(tt.want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if got := advertisement(&a.cfg, tt.router, search); !bytes.Equal(got, want) {
			t.Errorf("%s:\n got %x\nwant %x", tt.name, got, want)
		}
	}
}

func TestAdvertisementSize(t *testing.T) {
	var many []string
	for i := range 300 {
		many = append(many, strings.Repeat("a", 1+i%40)+".example")
		cfg := configRA()
		if n := len(advertisement(&cfg, true, many)); n > 1240 || n%8 != 0 {
			t.Fatalf("%d domains: %d bytes", i+1, n)
		}
	}
}

func TestSolicitation(t *testing.T) {
	const from = "fe80::1"
	tests := []struct {
		name string
		b    string
		from string
		want bool
	}{
		{"plain", "85000000 00000000", from, true},
		{"without an address", "85000000 00000000", "::", true},
		{"link address", "85000000 00000000 0101525400000001", from, true},
		{"link address, without an address", "85000000 00000000 0101525400000001", "::", false},
		{"unknown option", "85000000 00000000 fd02525400000001 0000000000000000", from, true},
		{"option of no length", "85000000 00000000 0100525400000001", from, false},
		{"option longer than it", "85000000 00000000 0102525400000001", from, false},
		{"half an option", "85000000 00000000 01", from, false},
		{"code", "85010000 00000000", from, false},
		{"an advertisement", "86000000 00000000", from, false},
		{"short", "85000000 000000", from, false},
		{"empty", "", from, false},
		{"from a group", "85000000 00000000", "ff02::2", false},
		{"from IPv4", "85000000 00000000", "10.0.2.100", false},
	}
	for _, tt := range tests {
		b, err := hex.DecodeString(strings.ReplaceAll(tt.b, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if got := validSolicitation(b, addr(tt.from)); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// sent is an advertisement: when, to whom, and the router lifetime.
type sent struct {
	at       time.Duration
	to       string
	lifetime int
}

// watch returns what conn sends from now on, until it is closed.
func watch(conn *memConn) <-chan sent {
	c := make(chan sent, 1000)
	begin := time.Now()
	go func() {
		defer close(c)
		for {
			select {
			case d := <-conn.out:
				c <- sent{time.Since(begin), d.peer.String(), int(d.b[6])<<8 | int(d.b[7])}
			case <-conn.closed:
				if len(conn.out) == 0 {
					return
				}
			}
		}
	}()
	return c
}

var solicitation = []byte{typeSolicitation, 0, 0, 0, 0, 0, 0, 0}

// TestAdvertiser runs an advertiser for an hour of fake time.
func TestAdvertiser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, err := NewAdvertiser(configRA())
		if err != nil {
			t.Fatal(err)
		}
		conn := a.cfg.Conn.(*memConn)
		ctx, cancel := context.WithCancel(t.Context())
		end := make(chan error, 1)
		got := watch(conn)
		go func() { end <- a.Run(ctx) }()
		expect := func(what string, want sent) {
			t.Helper()
			if s := <-got; s != want {
				t.Errorf("%s: got %v, want %v", what, s, want)
			}
		}
		expect("at the start", sent{0, "ff02::1", 1800})
		expect("again", sent{16 * time.Second, "ff02::1", 1800})
		expect("and again", sent{32 * time.Second, "ff02::1", 1800})

		time.Sleep(time.Second)
		conn.in <- datagram{solicitation, &net.IPAddr{IP: net.ParseIP("fe80::1")}}
		expect("solicited", sent{33 * time.Second, "fe80::1", 1800})
		conn.in <- datagram{solicitation, &net.IPAddr{IP: net.IPv6unspecified}}
		conn.in <- datagram{solicitation, &net.IPAddr{IP: net.IPv6unspecified}}
		expect("solicited without an address", sent{35 * time.Second, "ff02::1", 1800})

		a.SetDefaultRouter(true) // is so already
		a.SetDefaultRouter(false)
		expect("no default route", sent{35 * time.Second, "ff02::1", 0})
		expect("again", sent{51 * time.Second, "ff02::1", 0})
		expect("and again", sent{67 * time.Second, "ff02::1", 0})
		last := 67 * time.Second
		for range 8 {
			s := <-got
			if d := s.at - last; d < minInterval || d > maxInterval || s.to != "ff02::1" {
				t.Errorf("%v after the last: %v", d, s)
			}
			last = s.at
		}
		a.SetDefaultRouter(true)
		expect("default route", sent{last, "ff02::1", 1800})

		cancel()
		if err := <-end; err != nil {
			t.Errorf("Run: %v", err)
		}
		expect("the end", sent{last, "ff02::1", 0})
		if s, ok := <-got; ok {
			t.Errorf("after the end: %v", s)
		}
	})
}

// TestSolicitationFlood solicits for ten seconds as fast as can be.
func TestSolicitationFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, err := NewAdvertiser(configRA())
		if err != nil {
			t.Fatal(err)
		}
		conn := a.cfg.Conn.(*memConn)
		ctx, cancel := context.WithCancel(t.Context())
		end := make(chan error, 1)
		got := watch(conn)
		go func() { end <- a.Run(ctx) }()
		for i := range 10_000 {
			from := &net.IPAddr{IP: net.ParseIP("fe80::1")}
			if i%2 == 0 {
				from.IP = net.IPv6unspecified
			}
			conn.in <- datagram{solicitation, from}
			time.Sleep(time.Millisecond)
		}
		cancel()
		if err := <-end; err != nil {
			t.Errorf("Run: %v", err)
		}
		groups, singles := 0, 0
		for s := range got {
			if s.to == "ff02::1" {
				groups++
			} else {
				singles++
			}
		}
		if groups < 4 || groups > 6 || singles < 100 || singles > 112 {
			t.Errorf("%d advertisements to all, %d to the sender", groups, singles)
		}
	})
}

// TestAdvertiserEnds checks that Run tells when its conn failed.
func TestAdvertiserEnds(t *testing.T) {
	a, err := NewAdvertiser(configRA())
	if err != nil {
		t.Fatal(err)
	}
	a.cfg.Conn.Close()
	if err := a.Run(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "dhcp: read solicitation: ") {
		t.Errorf("Run: %v", err)
	}
}

func TestConfigRA(t *testing.T) {
	tests := map[string]func(*ConfigRA){
		"no conn":          func(c *ConfigRA) { c.Conn = nil },
		"IPv4 prefix":      func(c *ConfigRA) { c.Prefix = prefix("10.0.2.0/24") },
		"MTU":              func(c *ConfigRA) { c.MTU = 1279 },
		"lifetimes":        func(c *ConfigRA) { c.ValidLifetime, c.PreferredLifetime = time.Hour, 2*time.Hour },
		"link address":     func(c *ConfigRA) { c.LinkAddr = c.LinkAddr[:5] },
		"IPv4 name server": func(c *ConfigRA) { c.DNS = []netip.Addr{addr("10.0.2.3")} },
		"name servers":     func(c *ConfigRA) { c.DNS = make([]netip.Addr, 17) },
	}
	for name, change := range tests {
		cfg := configRA()
		change(&cfg)
		if _, err := NewAdvertiser(cfg); err == nil || !strings.HasPrefix(err.Error(), "dhcp: configure router advertisements: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
