package usernet

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var compareAddrs = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{})

func TestAddresses(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	standard := Addresses{
		Prefix4: prefix("10.0.2.0/24"), Gateway4: addr("10.0.2.2"), DNS4: addr("10.0.2.3"), Guest4: addr("10.0.2.100"),
		PoolStart: addr("10.0.2.15"), PoolEnd: addr("10.0.2.30"),
		Prefix6: prefix("fd75:736e:6574::/64"), Gateway6: addr("fd75:736e:6574::2"),
		DNS6: addr("fd75:736e:6574::3"), Guest6: addr("fd75:736e:6574::100"),
	}
	only4 := standard
	only4.Prefix6, only4.Gateway6, only4.DNS6, only4.Guest6 = netip.Prefix{}, netip.Addr{}, netip.Addr{}, netip.Addr{}
	for _, tt := range []struct {
		name   string
		config Config
		want   Addresses
	}{
		{"defaults", Config{}, standard},
		{"IPv6 off", Config{IPv6: IPv6Off}, only4},
		{"MTU too small for IPv6", Config{MTU: 1279}, only4},
		{"least MTU of IPv6", Config{MTU: 1280}, standard},
		{"smallest subnet", Config{CIDR: prefix("192.168.7.128/25"), IPv6: IPv6Off}, Addresses{
			Prefix4: prefix("192.168.7.128/25"), Gateway4: addr("192.168.7.130"), DNS4: addr("192.168.7.131"),
			Guest4: addr("192.168.7.228"), PoolStart: addr("192.168.7.143"), PoolEnd: addr("192.168.7.158"),
		}},
		{"large subnets", Config{CIDR: prefix("10.0.0.0/8"), CIDR6: prefix("2001:db8:0:1::/64")}, Addresses{
			Prefix4: prefix("10.0.0.0/8"), Gateway4: addr("10.0.0.2"), DNS4: addr("10.0.0.3"),
			Guest4: addr("10.0.0.100"), PoolStart: addr("10.0.0.15"), PoolEnd: addr("10.0.0.30"),
			Prefix6: prefix("2001:db8:0:1::/64"), Gateway6: addr("2001:db8:0:1::2"),
			DNS6: addr("2001:db8:0:1::3"), Guest6: addr("2001:db8:0:1::100"),
		}},
	} {
		if diff := cmp.Diff(tt.want, tt.config.Addresses(), compareAddrs); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}

func TestDefaults(t *testing.T) {
	c := Config{PID: 1}.withDefaults()
	want := Config{
		PID: 1, Link: LinkAuto, Ifname: "tap0", MTU: 65520, CIDR: DefaultCIDR, CIDR6: DefaultCIDR6,
		IPv6: IPv6Auto, Configure: ConfigureStatic, ResolvConf: "/etc/resolv.conf",
	}
	if diff := cmp.Diff(want, c, compareAddrs, cmpopts.IgnoreFields(Config{}, "Logger")); diff != "" {
		t.Error(diff)
	}
	if c.Logger == nil {
		t.Error("no logger")
	}
	c.Logger.Error("is discarded")
	if got := (Config{TapFile: os.Stdin}).withDefaults().Configure; got != ConfigureNone {
		t.Errorf("an open TAP is configured: %s", got)
	}
}

func TestValidate(t *testing.T) {
	set := func(f func(*Config)) Config {
		c := Config{NetnsPath: "/proc/1/ns/net"}
		f(&c)
		return c
	}
	for _, tt := range []struct {
		name   string
		config Config
		want   string // part of the error; empty: none
	}{
		{"guest's addresses", set(func(c *Config) {
			c.Guest4, c.Guest6 = netip.MustParseAddr("10.0.2.77"), netip.MustParseAddr("fd75:736e:6574::77")
		}), ""},
		{"guest of another subnet", set(func(c *Config) { c.Guest4 = netip.MustParseAddr("10.0.3.77") }), "give guest the address 10.0.3.77: it is not in its subnet 10.0.2.0/24"},
		{"guest of another family", set(func(c *Config) { c.Guest4 = netip.MustParseAddr("fd00::1") }), "it is not in its subnet 10.0.2.0/24"},
		{"guest is gateway", set(func(c *Config) { c.Guest4 = netip.MustParseAddr("10.0.2.2") }), "the gateway or its DNS server has it"},
		{"guest is DNS6", set(func(c *Config) { c.Guest6 = netip.MustParseAddr("fd75:736e:6574::3") }), "the gateway or its DNS server has it"},
		{"guest is broadcast", set(func(c *Config) { c.Guest4 = netip.MustParseAddr("10.0.2.255") }), "it is that of the subnet"},
		{"guest is network", set(func(c *Config) { c.Guest4 = netip.MustParseAddr("10.0.2.0") }), "it is that of the subnet"},
		{"guest in pool", set(func(c *Config) { c.Guest4 = netip.MustParseAddr("10.0.2.15") }), "DHCP leases those from 10.0.2.15 to 10.0.2.30"},
		{"guest without IPv6", set(func(c *Config) { c.Guest6, c.IPv6 = netip.MustParseAddr("fd75:736e:6574::77"), IPv6Off }), "there is no IPv6"},
		{"guest by DHCP", set(func(c *Config) { c.Guest4, c.Configure = netip.MustParseAddr("10.0.2.77"), ConfigureNone }), "a DHCP client inside finds its own"},
		{"path", set(func(*Config) {}), ""},
		{"process", Config{PID: 1}, ""},
		{"open TAP", Config{TapFile: os.Stdin}, ""},
		{"nothing", Config{}, "none given"},
		{"two", set(func(c *Config) { c.PID = 1 }), "both a path and a process given"},
		{"negative PID", Config{PID: -1}, "positive"},
		{"zero in path", Config{NetnsPath: "a\x00b"}, "zero byte"},

		{"kind of link", set(func(c *Config) { c.Link = "wifi" }), "auto, tap and veth"},
		{"IPv6", set(func(c *Config) { c.IPv6 = "no" }), "auto, on and off"},
		{"configure", set(func(c *Config) { c.Configure = "dhcp" }), "static, none and keep"},
		{"veth is no TAP", Config{TapFile: os.Stdin, Link: LinkVeth}, "no veth pair"},
		{"open TAP cannot be configured", Config{TapFile: os.Stdin, Configure: ConfigureStatic}, "out of reach"},

		{"least MTU", set(func(c *Config) { c.MTU = 576 }), ""},
		{"most MTU", set(func(c *Config) { c.MTU = 65520 }), ""},
		{"small MTU", set(func(c *Config) { c.MTU = 575 }), "from 576 to 65520"},
		{"large MTU", set(func(c *Config) { c.MTU = 65521 }), "from 576 to 65520"},
		{"MTU without IPv6", set(func(c *Config) { c.MTU = 1279; c.IPv6 = IPv6On }), "switch IPv6 off"},
		{"15 bytes", set(func(c *Config) { c.Ifname = "abcdefghijklmno" }), ""},
		{"16 bytes", set(func(c *Config) { c.Ifname = "abcdefghijklmnop" }), "16 bytes are too long"},
		{"umlauts count as bytes", set(func(c *Config) { c.Ifname = "ääääääää" }), "16 bytes"},
		{"slash", set(func(c *Config) { c.Ifname = "a/b" }), "no space, slash"},
		{"newline", set(func(c *Config) { c.Ifname = "a\nb" }), "no space, slash"},
		{"number", set(func(c *Config) { c.Ifname = "tap%d" }), "percent"},
		{"dots", set(func(c *Config) { c.Ifname = ".." }), "such as tap0"},
		{"loopback", set(func(c *Config) { c.Ifname = "lo" }), "choose another"},
		{"MAC", set(func(c *Config) { c.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 1} }), ""},
		{"short MAC", set(func(c *Config) { c.MAC = net.HardwareAddr{2, 0} }), "6 bytes"},
		{"group's MAC", set(func(c *Config) { c.MAC = net.HardwareAddr{255, 255, 255, 255, 255, 255} }), "group"},
		{"zero MAC", set(func(c *Config) { c.MAC = make(net.HardwareAddr, 6) }), "all zero"},

		{"private", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("172.16.0.0/12") }), ""},
		{"for tests", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("203.0.113.0/25") }), ""},
		{"/26", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("10.0.2.0/26") }), "a /25 or larger"},
		{"host bits", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("10.0.2.9/24") }), "write 10.0.2.0/24"},
		{"public", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("192.0.0.0/8") }), "of the internet"},
		{"half public", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("172.0.0.0/11") }), "of the internet"},
		{"everything", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("0.0.0.0/0") }), "of the internet"},
		{"loopback", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("127.0.0.0/24") }), "meaning of their own"},
		{"link-local", set(func(c *Config) { c.CIDR = netip.MustParsePrefix("169.254.0.0/16") }), "meaning of their own"},
		{"IPv6 as IPv4", set(func(c *Config) { c.CIDR = DefaultCIDR6 }), "not one of IPv4"},
		{"IPv4 as IPv6", set(func(c *Config) { c.CIDR6 = DefaultCIDR }), "not one of IPv6"},
		{"mapped as IPv6", set(func(c *Config) { c.CIDR6 = netip.MustParsePrefix("::ffff:10.0.0.0/120") }), "not one of IPv6"},
		{"/48", set(func(c *Config) { c.CIDR6 = netip.MustParsePrefix("fd00::/48") }), "a /64 only"},
		{"link-local IPv6", set(func(c *Config) { c.CIDR6 = netip.MustParsePrefix("fe80::/64") }), "meaning of their own"},
		{"public IPv6", set(func(c *Config) { c.CIDR6 = netip.MustParsePrefix("2600::/64") }), "of the internet"},

		{"DNS", set(func(c *Config) { c.DNS = []netip.AddrPort{netip.MustParseAddrPort("[fe80::1%eth0]:53")} }), ""},
		{"DNS nowhere", set(func(c *Config) { c.DNS = []netip.AddrPort{{}} }), "no address"},
		{"DNS to a group", set(func(c *Config) { c.DNS = []netip.AddrPort{netip.MustParseAddrPort("224.0.0.251:53")} }), "group"},
		{"search", set(func(c *Config) { c.DNSSearch = []string{"example.com", "_x.local."} }), ""},
		{"bad search", set(func(c *Config) { c.DNSSearch = []string{"a..b"} }), "not a domain name"},
		{"long label", set(func(c *Config) { c.DNSSearch = []string{strings.Repeat("a", 64)} }), "not a domain name"},
		{"host", set(func(c *Config) { c.AddHosts = []Host{{"DB.local", netip.IPv6Loopback()}} }), ""},
		{"host without name", set(func(c *Config) { c.AddHosts = []Host{{"", netip.IPv6Loopback()}} }), "not a host name"},
		{"host without address", set(func(c *Config) { c.AddHosts = []Host{{Name: "a"}} }), "no address"},
		{"host with zone", set(func(c *Config) { c.AddHosts = []Host{{"a", netip.MustParseAddr("fe80::1%eth0")}} }), "zone"},
		{"DNS off and on", set(func(c *Config) { c.NoDNS = true; c.DNSSearch = []string{"a"} }), "drop the one or the other"},

		{"host ports", set(func(c *Config) { c.HostPorts = []uint16{1, 65535} }), ""},
		{"host port 0", set(func(c *Config) { c.HostPorts = []uint16{80, 0} }), "from 1 to 65535"},
		{"outbound", set(func(c *Config) {
			c.OutboundAddr, c.OutboundAddr6 = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
		}), ""},
		{"outbound family", set(func(c *Config) { c.OutboundAddr6 = netip.MustParseAddr("192.0.2.1") }), "not an address of IPv6"},
		{"outbound nowhere", set(func(c *Config) { c.OutboundAddr = netip.IPv4Unspecified() }), "no interface can"},
		{"outbound interface", set(func(c *Config) { c.OutboundInterface = "a b" }), "no space"},

		{"rule", set(func(c *Config) { c.Deny = []Rule{{Prefix: DefaultCIDR, To: 65535}} }), ""},
		{"rule without ports", set(func(c *Config) { c.Deny = []Rule{{Prefix: DefaultCIDR}} }), "from 1 to 65535"},
		{"rule without addresses", set(func(c *Config) { c.Allow = []Rule{{To: 65535}} }), "no addresses"},
		{"rule for a protocol", set(func(c *Config) { c.Allow = []Rule{{Prefix: DefaultCIDR, To: 65535, Protocol: 132}} }), "no protocol 132"},
	} {
		err := tt.config.Validate()
		switch {
		case tt.want == "":
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
		case err == nil:
			t.Errorf("%s: no error, want one with %q", tt.name, tt.want)
		case !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "usernet: "):
			t.Errorf("%s: error %q, want one with %q", tt.name, err, tt.want)
		case !errors.Is(err, ErrConfig):
			t.Errorf("%s: not an ErrConfig: %v", tt.name, err)
		}
	}
}

func TestWarnings(t *testing.T) {
	if w := (Config{MTU: 1279}).Warnings(); len(w) != 1 || !strings.Contains(w[0], "1280") {
		t.Errorf("MTU 1279: %q", w)
	}
	for _, c := range []Config{{}, {MTU: 1280}, {MTU: 576, IPv6: IPv6Off}} {
		if w := c.Warnings(); len(w) != 0 {
			t.Errorf("MTU %d, IPv6 %q: %q", c.MTU, c.IPv6, w)
		}
	}
}

func TestRecords(t *testing.T) {
	c := Config{AddHosts: []Host{
		{"DB.", netip.MustParseAddr("192.0.2.1")},
		{"db", netip.MustParseAddr("2001:db8::1")},
		{"host.docker.internal", netip.MustParseAddr("192.0.2.2")},
	}}
	a := c.Addresses()
	gateway := []netip.Addr{a.Gateway4, a.Gateway6}
	want := map[string][]netip.Addr{
		"host.usernet.internal":    gateway,
		"host.containers.internal": gateway,
		"gateway.usernet.internal": gateway,
		"host.docker.internal":     {netip.MustParseAddr("192.0.2.2")},
		"db":                       {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
	}
	if diff := cmp.Diff(want, c.records(), compareAddrs); diff != "" {
		t.Error(diff)
	}
}

func TestParseHost(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"db:192.0.2.1", "db:192.0.2.1"},
		{"db:2001:db8::1", "db:2001:db8::1"},
		{"db:[2001:db8::1]", "db:2001:db8::1"},
		{"db:::ffff:192.0.2.1", "db:192.0.2.1"},
		{"a.b_c-d.:::1", "a.b_c-d.:::1"},
		{"db", ""}, {"db:[::1", ""}, {"db:", ""}, {":1.2.3.4", ""}, {"db:1.2.3", ""}, {"d b:1.2.3.4", ""}, {"-db:1.2.3.4", ""}, {"db:fe80::1%lo", ""},
	} {
		h, err := ParseHost(tt.in)
		switch {
		case tt.want == "":
			if !errors.Is(err, ErrConfig) {
				t.Errorf("ParseHost(%q) = %v, %v, want an ErrConfig", tt.in, h, err)
			}
		case err != nil || h.String() != tt.want:
			t.Errorf("ParseHost(%q) = %v, %v, want %s", tt.in, h, err, tt.want)
		}
	}
}

func TestParseResolver(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"192.0.2.1", "192.0.2.1:53"},
		{"192.0.2.1:5353", "192.0.2.1:5353"},
		{"2001:db8::1", "[2001:db8::1]:53"},
		{"[2001:db8::1]", "[2001:db8::1]:53"},
		{"[2001:db8::1]:5353", "[2001:db8::1]:5353"},
		{"fe80::1%eth0", "[fe80::1%eth0]:53"},
		{"::ffff:192.0.2.1", "192.0.2.1:53"},
		{"", ""}, {"localhost", ""}, {"[::1", ""}, {"::1]", ""}, {"[]", ""}, {"[", ""}, {"192.0.2.1:", ""}, {"192.0.2.1:0", ""}, {"192.0.2.1:65536", ""}, {"0.0.0.0", ""}, {"::", ""}, {"ff02::fb", ""},
	} {
		a, err := ParseResolver(tt.in)
		switch {
		case tt.want == "":
			if !errors.Is(err, ErrConfig) {
				t.Errorf("ParseResolver(%q) = %v, %v, want an ErrConfig", tt.in, a, err)
			}
		case err != nil || a.String() != tt.want:
			t.Errorf("ParseResolver(%q) = %v, %v, want %s", tt.in, a, err, tt.want)
		}
	}
}
