package forwarder_test

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/usernet/usernet/forwarder"
)

func policyOf(cfg forwarder.PolicyConfig) *forwarder.Policy {
	cfg.Gateways = []netip.Addr{gateway4, gateway6}
	cfg.Virtual = []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd75:736e:6574::/64")}
	return forwarder.NewPolicy(cfg)
}

func prefixRule(p string) forwarder.Rule {
	return forwarder.Rule{Prefix: netip.MustParsePrefix(p), To: 65535}
}

// TestEverySpelling: an address is judged the same however it is written, and
// each reason is told as such.
func TestEverySpelling(t *testing.T) {
	p := policyOf(forwarder.PolicyConfig{
		Deny:  []forwarder.Rule{prefixRule("203.0.113.0/24")},
		Allow: []forwarder.Rule{prefixRule("0.0.0.0/0"), prefixRule("::/0")},
	})
	p.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.7.7/32"), netip.MustParsePrefix("2001:db8::7/128")})
	for addr, want := range map[string]forwarder.Reason{
		"198.51.100.1": forwarder.Allowed, "2001:db8::1": forwarder.Allowed, "64:ff9b::198.51.100.1": forwarder.Allowed,
		"10.0.2.2": forwarder.DeniedHost, "fd75:736e:6574::2": forwarder.DeniedHost, "::ffff:10.0.2.2": forwarder.DeniedHost,
		"127.0.0.1": forwarder.DeniedHost, "127.8.8.8": forwarder.DeniedHost, "::1": forwarder.DeniedHost, "::ffff:127.0.0.1": forwarder.DeniedHost,
		"64:ff9b::127.0.0.1": forwarder.DeniedHost, "64:ff9b:1::127.0.0.1": forwarder.DeniedHost, "2002:7f00:1::": forwarder.DeniedHost,
		"::ffff:0:127.0.0.1": forwarder.DeniedHost, "::127.0.0.1": forwarder.DeniedHost,
		"192.168.7.7": forwarder.DeniedHost, "2001:db8::7": forwarder.DeniedHost, "64:ff9b::192.168.7.7": forwarder.DeniedHost,
		"10.0.2.77": forwarder.DeniedVirtual, "fd75:736e:6574::77": forwarder.DeniedVirtual,
		"0.0.0.0": forwarder.DeniedSpecial, "0.1.2.3": forwarder.DeniedSpecial, "::": forwarder.DeniedSpecial, "255.255.255.255": forwarder.DeniedSpecial,
		"224.0.0.251": forwarder.DeniedSpecial, "ff02::fb": forwarder.DeniedSpecial, "240.0.0.1": forwarder.DeniedSpecial,
		"169.254.169.254": forwarder.DeniedGuarded, "::ffff:169.254.169.254": forwarder.DeniedGuarded, "64:ff9b::169.254.169.254": forwarder.DeniedGuarded,
		"2002:a9fe:a9fe::1": forwarder.DeniedGuarded, "fe80::a9fe:a9fe": forwarder.DeniedGuarded, "fe80::1%eth0": forwarder.DeniedGuarded,
		"fd00:ec2::254": forwarder.DeniedGuarded, "100.100.100.200": forwarder.DeniedGuarded, "168.63.129.16": forwarder.DeniedGuarded, "192.0.0.192": forwarder.DeniedGuarded,
		"203.0.113.9": forwarder.DeniedRule, "::ffff:203.0.113.9": forwarder.DeniedRule, "64:ff9b::203.0.113.9": forwarder.DeniedRule,
	} {
		for _, proto := range []uint8{forwarder.TCP, forwarder.UDP, forwarder.ICMP} {
			port := uint16(80)
			if proto == forwarder.ICMP {
				port = 0
			}
			to, v := p.Resolve(proto, netip.AddrPortFrom(netip.MustParseAddr(addr), port))
			if v.Reason != want {
				t.Errorf("protocol %d, %s: %v (to be dialled as %v), want reason %d", proto, addr, v, to, want)
			}
		}
	}
	if _, v := p.Resolve(forwarder.TCP, netip.MustParseAddrPort("203.0.113.9:80")); v.String() != "deny 203.0.113.0/24" {
		t.Errorf("the rule is told as %q", v)
	}
}

// TestUnguarded: what is open without the guards, and what is not all the same.
func TestUnguarded(t *testing.T) {
	p := policyOf(forwarder.PolicyConfig{Unguarded: true})
	p.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.7.7/32")})
	for _, tt := range []struct {
		proto uint8
		addr  string
		want  forwarder.Reason
	}{
		{forwarder.TCP, "192.168.7.7:80", forwarder.Allowed},
		{forwarder.TCP, "169.254.169.254:80", forwarder.Allowed},
		{forwarder.TCP, "127.0.0.1:80", forwarder.DeniedHost},
		{forwarder.TCP, "10.0.2.2:80", forwarder.DeniedHost},
		{forwarder.UDP, "239.255.255.250:1900", forwarder.Allowed},
		{forwarder.TCP, "239.255.255.250:1900", forwarder.DeniedSpecial},
		{forwarder.UDP, "[ff02::fb]:5353", forwarder.DeniedSpecial},
		{forwarder.UDP, "255.255.255.255:67", forwarder.DeniedSpecial},
	} {
		if to, v := p.Resolve(tt.proto, netip.MustParseAddrPort(tt.addr)); v.Reason != tt.want {
			t.Errorf("protocol %d, %s: %v (to be dialled as %v), want reason %d", tt.proto, tt.addr, v, to, tt.want)
		}
	}
}

// TestRulesAgainstReference holds the order of rules against a plain reading of
// it, for random rules and destinations.
func TestRulesAgainstReference(t *testing.T) {
	rnd := seeded(t)
	addr := func() netip.Addr {
		if rnd.IntN(2) == 0 {
			return netip.AddrFrom4([4]byte{198, 51, byte(rnd.IntN(2)), byte(rnd.IntN(4))})
		}
		a := netip.MustParseAddr("2001:db8::").As16()
		a[15], a[8] = byte(rnd.IntN(4)), byte(rnd.IntN(2))
		return netip.AddrFrom16(a)
	}
	rule := func() forwarder.Rule {
		a := addr()
		p, _ := a.Prefix(max(0, a.BitLen()-rnd.IntN(70)%(a.BitLen()+1)))
		ru := forwarder.Rule{Prefix: p, To: 65535, Proto: []uint8{forwarder.Any, forwarder.TCP, forwarder.UDP, forwarder.ICMP}[rnd.IntN(4)]}
		if ru.Proto != forwarder.ICMP && rnd.IntN(2) == 0 {
			ru.From = uint16(1 + rnd.IntN(4))
			ru.To = ru.From + uint16(rnd.IntN(3))
		}
		return ru
	}
	any := func(rs []forwarder.Rule, proto uint8, dst netip.AddrPort) bool {
		for _, r := range rs {
			ports := r.From == 0 && r.To == 65535 || proto != forwarder.ICMP && dst.Port() >= r.From && dst.Port() <= r.To
			if (r.Proto == 0 || r.Proto == proto) && ports && r.Prefix.Contains(dst.Addr()) {
				return true
			}
		}
		return false
	}
	for range 3000 {
		var cfg forwarder.PolicyConfig
		for range rnd.IntN(4) {
			cfg.Allow = append(cfg.Allow, rule())
		}
		for range rnd.IntN(4) {
			cfg.Deny = append(cfg.Deny, rule())
		}
		p := policyOf(cfg)
		for range 10 {
			proto, dst := []uint8{forwarder.TCP, forwarder.UDP, forwarder.ICMP}[rnd.IntN(3)], netip.AddrPortFrom(addr(), uint16(1+rnd.IntN(6)))
			if proto == forwarder.ICMP {
				dst = netip.AddrPortFrom(dst.Addr(), 0)
			}
			want := forwarder.Allowed
			switch {
			case any(cfg.Deny, proto, dst):
				want = forwarder.DeniedRule
			case len(cfg.Allow) > 0 && !any(cfg.Allow, proto, dst):
				want = forwarder.DeniedUnlisted
			}
			if _, v := p.Resolve(proto, dst); v.Reason != want {
				t.Fatalf("allow %v, deny %v: protocol %d to %v is %v, want %d", cfg.Allow, cfg.Deny, proto, dst, v, want)
			}
		}
	}
}

// TestNames: a name opens its addresses at its ports for as long as the answer
// is good, within the bounds, and opens nothing that is closed for other reasons.
func TestNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policyOf(forwarder.PolicyConfig{
			HostPorts: []uint16{8080},
			Deny:      []forwarder.Rule{prefixRule("203.0.113.0/24")},
			Names: []forwarder.NameRule{
				{Name: "api.test", From: 443, To: 443, Proto: forwarder.TCP},
				{Name: "*.wild.test", To: 65535},
			},
		})
		p.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.7.7/32")})
		want := func(proto uint8, dst string, want forwarder.Reason) {
			t.Helper()
			if _, v := p.Resolve(proto, netip.MustParseAddrPort(dst)); v.Reason != want {
				t.Errorf("protocol %d to %s: %v, want reason %d", proto, dst, v, want)
			}
		}
		learn := func(name string, ttl time.Duration, addrs ...string) {
			var list []netip.Addr
			for _, a := range addrs {
				list = append(list, netip.MustParseAddr(a))
			}
			p.Learn(name, list, ttl)
		}
		want(forwarder.TCP, "198.51.100.1:443", forwarder.DeniedUnlisted)
		learn("api.test", 0, "198.51.100.1", "2001:db8::1", "::ffff:198.51.100.2")
		want(forwarder.TCP, "198.51.100.1:443", forwarder.Allowed)
		want(forwarder.TCP, "[2001:db8::1]:443", forwarder.Allowed)
		want(forwarder.TCP, "198.51.100.2:443", forwarder.Allowed)
		want(forwarder.TCP, "198.51.100.1:80", forwarder.DeniedUnlisted)
		want(forwarder.UDP, "198.51.100.1:443", forwarder.DeniedUnlisted)
		want(forwarder.ICMP, "198.51.100.1:0", forwarder.DeniedUnlisted)
		want(forwarder.TCP, "198.51.100.3:443", forwarder.DeniedUnlisted)

		// Only names below.
		for i, name := range []string{"wild.test", "evilwild.test", "other.test", ".wild.test"} {
			learn(name, time.Hour, fmt.Sprintf("198.51.101.%d", i))
			want(forwarder.TCP, fmt.Sprintf("198.51.101.%d:1", i), forwarder.DeniedUnlisted)
		}
		learn("a.b.wild.test", time.Hour, "198.51.100.9")
		want(forwarder.ICMP, "198.51.100.9:0", forwarder.Allowed)

		// What no name opens.
		learn("x.wild.test", time.Hour, "169.254.169.254", "fe80::1", "127.0.0.1", "192.168.7.7", "203.0.113.5", "10.0.2.77", "10.0.2.2", "64:ff9b::169.254.169.254", "172.16.0.1")
		want(forwarder.TCP, "169.254.169.254:80", forwarder.DeniedGuarded)
		want(forwarder.TCP, "[64:ff9b::169.254.169.254]:80", forwarder.DeniedGuarded)
		want(forwarder.TCP, "[fe80::1]:80", forwarder.DeniedGuarded)
		want(forwarder.TCP, "127.0.0.1:80", forwarder.DeniedHost)
		want(forwarder.TCP, "192.168.7.7:80", forwarder.DeniedHost)
		want(forwarder.TCP, "203.0.113.5:80", forwarder.DeniedRule)
		want(forwarder.TCP, "10.0.2.77:80", forwarder.DeniedVirtual)
		want(forwarder.TCP, "10.0.2.2:80", forwarder.DeniedHost)
		want(forwarder.TCP, "10.0.2.2:8080", forwarder.Allowed) // by --host-port and by name
		want(forwarder.TCP, "172.16.0.1:80", forwarder.Allowed) // a private network is one to name

		// A TTL of 0 is a minute, one of a week a day.
		time.Sleep(59 * time.Second)
		want(forwarder.TCP, "198.51.100.1:443", forwarder.Allowed)
		learn("api.test", 5*time.Minute, "198.51.100.1")
		learn("api.test", time.Second, "198.51.100.1") // shortens nothing
		learn("api.test", 7*24*time.Hour, "198.51.100.4")
		time.Sleep(2 * time.Second)
		want(forwarder.TCP, "198.51.100.2:443", forwarder.DeniedUnlisted)
		time.Sleep(4 * time.Minute)
		want(forwarder.TCP, "198.51.100.1:443", forwarder.Allowed)
		time.Sleep(23 * time.Hour)
		want(forwarder.TCP, "198.51.100.4:443", forwarder.Allowed)
		want(forwarder.TCP, "198.51.100.1:443", forwarder.DeniedUnlisted)
		time.Sleep(time.Hour)
		want(forwarder.TCP, "198.51.100.4:443", forwarder.DeniedUnlisted)

		// However many names, memory is bounded, and the newest are there.
		for i := range 20000 {
			learn("n.wild.test", time.Duration(i)*time.Millisecond+time.Hour, fmt.Sprintf("172.%d.%d.%d", 16+i>>16, i>>8&255, i&255))
		}
		if n := p.Learned(); n > 4096 {
			t.Errorf("%d addresses are remembered", n)
		}
		want(forwarder.TCP, "172.16.78.31:1", forwarder.Allowed)
	})
}

// TestLearnedElsewhere: a policy takes up what another one with the same rules was
// told, for as long as that was good.
func TestLearnedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := forwarder.PolicyConfig{Names: []forwarder.NameRule{{Name: "api.test", From: 443, To: 443}, {Name: "*.wild.test", To: 65535}}}
		var told []forwarder.Learned
		tells := 0
		p := policyOf(cfg)
		p.TellLearned(func(l []forwarder.Learned) { told = append(told, l...); tells++ })
		a, b := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8::1")
		p.Learn("api.test", []netip.Addr{a}, time.Hour)
		p.Learn("x.wild.test", []netip.Addr{b}, 2*time.Hour)
		p.Learn("other.test", []netip.Addr{a}, time.Hour)
		for range 100 {
			p.Learn("api.test", []netip.Addr{a}, time.Hour) // no longer than before
		}
		if tells != 2 {
			t.Errorf("told %d times, want twice", tells)
		}
		// What makes no sense comes from a process that the guest has taken over.
		told = append(told, forwarder.Learned{Addr: b, Rule: 7, Until: time.Now().Add(time.Hour)},
			forwarder.Learned{Addr: b, Rule: -1, Until: time.Now().Add(time.Hour)},
			forwarder.Learned{Addr: netip.MustParseAddr("198.51.100.2"), Until: time.Now().Add(1000 * time.Hour)})

		time.Sleep(30 * time.Minute)
		q := policyOf(cfg)
		q.Restore(told)
		check := func(dst string, want forwarder.Reason) {
			t.Helper()
			if _, v := q.Resolve(forwarder.TCP, netip.MustParseAddrPort(dst)); v.Reason != want {
				t.Errorf("%s: %v, want reason %d", dst, v, want)
			}
		}
		check("198.51.100.1:443", forwarder.Allowed)
		check("198.51.100.1:80", forwarder.DeniedUnlisted)
		check("[2001:db8::1]:80", forwarder.Allowed)
		check("198.51.100.2:443", forwarder.DeniedUnlisted)
		time.Sleep(30 * time.Minute)
		check("198.51.100.1:443", forwarder.DeniedUnlisted)
		check("[2001:db8::1]:80", forwarder.Allowed)
		if n := q.Learned(); n != 2 {
			t.Errorf("%d addresses are remembered, want 2", n)
		}
	})
}

// TestUpstreamRules: name servers are the host's choice, but for rules.
func TestUpstreamRules(t *testing.T) {
	server := netip.MustParseAddrPort("127.0.0.53:53")
	allow := []forwarder.Rule{prefixRule("198.51.100.0/24")}
	names := []forwarder.NameRule{{Name: "a.test", To: 65535}}
	for _, tt := range []struct {
		cfg  forwarder.PolicyConfig
		want bool
	}{
		{forwarder.PolicyConfig{}, true},
		{forwarder.PolicyConfig{Allow: allow}, false},
		{forwarder.PolicyConfig{Names: names}, true},
		{forwarder.PolicyConfig{Names: names, Allow: allow}, true},
		{forwarder.PolicyConfig{Names: names, Deny: []forwarder.Rule{prefixRule("127.0.0.0/8")}}, false},
	} {
		if got := policyOf(tt.cfg).Upstream(server); got != tt.want {
			t.Errorf("%+v: upstream %v", tt.cfg, got)
		}
	}
}
