package usernet

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestCheckNetwork(t *testing.T) {
	for _, tt := range []struct {
		c    Config
		want string
	}{
		{Config{Network: "blue"}, ""},
		{Config{Network: "blue.2_x-y", Name: "web", Aliases: []string{"www", "www.example.com"}}, ""},
		{Config{Network: "Blue"}, "lower case"},
		{Config{Network: ".."}, "not a name"},
		{Config{Network: "a/b"}, "not a name"},
		{Config{Network: "a."}, "not a name"},
		{Config{Network: strings.Repeat("a", 64)}, "64 bytes"},
		{Config{Network: "blue", Name: "a.b"}, "not a name"},
		{Config{Network: "blue", Name: "a", Aliases: []string{"a"}}, "already"},
		{Config{Network: "blue", Aliases: []string{"a", "a"}}, "already"},
		{Config{Network: "blue", Aliases: []string{"a b"}}, "not a name"},
		{Config{Network: "blue", Aliases: make([]string, 40)}, "the most"},
		{Config{Network: "blue", Name: "a", NoDNS: true}, "without DNS"},
		{Config{Network: "blue", NoGuard: true}, "slirp4netns"},
		{Config{Name: "a"}, "only on a shared network"},
		{Config{Aliases: []string{"a"}}, "only on a shared network"},
		{Config{Isolate: true}, "shared network"},
		{Config{Network: "blue", CIDR: netip.MustParsePrefix("10.1.0.0/30")}, "too small"},
		{Config{Network: "blue", Guest4: netip.MustParseAddr("10.117.1.9")}, ""},
	} {
		tt.c.PID = 1
		err := tt.c.Validate()
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.c.Network, err, tt.want)
		}
	}
}

func TestChooseSubnets(t *testing.T) {
	four, six, err := Config{Network: "blue"}.chooseSubnets(nil)
	if err != nil || !networks4.Contains(four.Addr()) || !networks6.Contains(six.Addr()) || four.Bits() != 24 || six.Bits() != 64 {
		t.Fatalf("%v, %v, %v", four, six, err)
	}
	again, _, _ := Config{Network: "blue"}.chooseSubnets(nil)
	next, next6, err := Config{Network: "blue"}.chooseSubnets([]netip.Prefix{four})
	if again != four || err != nil || next == four || next6 == six {
		t.Errorf("%v again is %v; beside it %v, %v, %v", four, again, next, next6, err)
	}
	own := netip.MustParsePrefix("10.9.0.0/16")
	if four, _, err := (Config{Network: "blue", CIDR: own}).chooseSubnets(nil); four != own || err != nil {
		t.Errorf("%v, %v", four, err)
	}
	if _, _, err := (Config{Network: "blue", CIDR: own}).chooseSubnets([]netip.Prefix{netip.MustParsePrefix("10.9.3.0/24")}); err == nil {
		t.Error("a clash is none")
	}
	if _, _, err := (Config{Network: "blue"}).chooseSubnets([]netip.Prefix{networks4}); err == nil {
		t.Error("more subnets than there are")
	}
}

func TestReverseZones(t *testing.T) {
	for subnet, want := range map[string][]string{
		"10.117.3.0/24":           {"3.117.10.in-addr.arpa"},
		"10.0.0.0/8":              {"10.in-addr.arpa"},
		"172.16.0.0/14":           {"16.172.in-addr.arpa", "17.172.in-addr.arpa", "18.172.in-addr.arpa", "19.172.in-addr.arpa"},
		"10.1.2.128/25":           nil, // 128 of them, the last 255
		"fd75:736e:6574:1cd::/64": {"d.c.1.0.4.7.5.6.e.6.3.7.5.7.d.f.ip6.arpa"},
	} {
		got := reverseZones(netip.MustParsePrefix(subnet))
		if want == nil {
			if len(got) != 128 || got[0] != "128.2.1.10.in-addr.arpa" || got[127] != "255.2.1.10.in-addr.arpa" {
				t.Errorf("%s: %d, %v", subnet, len(got), got[0])
			}
		} else if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", subnet, got, want)
		}
	}
}

func TestRefuseSettings(t *testing.T) {
	network := Config{Network: "blue", CIDR: netip.MustParsePrefix("10.9.0.0/24"), DNS: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}, HostPorts: []uint16{80}}.withDefaults().hubSettings()
	same := Config{Network: "blue", HostPorts: []uint16{80}}
	for _, tt := range []struct {
		change func(*Config)
		want   string
	}{
		{func(*Config) {}, ""},
		{func(c *Config) { c.CIDR = network.CIDR }, ""},
		{func(c *Config) { c.CIDR = netip.MustParsePrefix("10.8.0.0/24") }, "--cidr is 10.8.0.0/24"},
		{func(c *Config) { c.MTU = 1500 }, "--mtu is 1500"},
		{func(c *Config) { c.HostPorts = nil }, "--host-port is not set, that of the network is 80"},
		{func(c *Config) { c.HostLoopback = true }, "--host-loopback"},
		{func(c *Config) { c.Deny = []Rule{{Prefix: network.CIDR, To: 65535}} }, "--deny is 10.9.0.0/24"},
		{func(c *Config) { c.DNS = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.2:53")} }, "--dns is 192.0.2.2:53"},
		{func(c *Config) { c.IPv6 = IPv6Off }, "--ipv6 is off"},
		{func(c *Config) { c.NoPrivateDNS = true }, "--dns-rebind-protection"},
	} {
		c := same
		tt.change(&c)
		err := network.refuse(c.withDefaults().hubSettings())
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, want %q", err, tt.want)
		}
	}
}
