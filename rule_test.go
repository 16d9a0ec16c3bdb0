package usernet

import (
	"errors"
	"net/netip"
	"testing"
)

func TestParseRule(t *testing.T) {
	all := func(p string, proto Protocol) Rule { return Rule{netip.MustParsePrefix(p), 0, 65535, proto} }
	for _, tt := range []struct {
		in   string
		want Rule
		text string // what String makes of it, if not in
	}{
		{"10.0.0.0/8", all("10.0.0.0/8", AnyProtocol), ""},
		{"0.0.0.0/0", all("0.0.0.0/0", AnyProtocol), ""},
		{"192.0.2.7", all("192.0.2.7/32", AnyProtocol), "192.0.2.7/32"},
		{"192.0.2.7/tcp", all("192.0.2.7/32", TCP), "192.0.2.7/32/tcp"},
		{"10.0.0.0/8/UDP", all("10.0.0.0/8", UDP), "10.0.0.0/8/udp"},
		{"10.0.0.0/8/icmp", all("10.0.0.0/8", ICMP), ""},
		{"192.0.2.7:443", Rule{netip.MustParsePrefix("192.0.2.7/32"), 443, 443, AnyProtocol}, "192.0.2.7/32:443"},
		{"10.0.0.0/8:443/tcp", Rule{netip.MustParsePrefix("10.0.0.0/8"), 443, 443, TCP}, ""},
		{"10.0.0.0/8:1-65535/udp", Rule{netip.MustParsePrefix("10.0.0.0/8"), 1, 65535, UDP}, ""},
		{"10.0.0.0/8:80-80", Rule{netip.MustParsePrefix("10.0.0.0/8"), 80, 80, AnyProtocol}, "10.0.0.0/8:80"},
		{"2001:db8::/32", all("2001:db8::/32", AnyProtocol), ""},
		{"2001:db8::1", all("2001:db8::1/128", AnyProtocol), "2001:db8::1/128"},
		{"[2001:db8::/32]", all("2001:db8::/32", AnyProtocol), "2001:db8::/32"},
		{"[2001:db8::/32]:80-90/tcp", Rule{netip.MustParsePrefix("2001:db8::/32"), 80, 90, TCP}, ""},
		{"[2001:db8::]/32:53/udp", Rule{netip.MustParsePrefix("2001:db8::/32"), 53, 53, UDP}, "[2001:db8::/32]:53/udp"},
		{"[::1]:53", Rule{netip.MustParsePrefix("::1/128"), 53, 53, AnyProtocol}, "[::1/128]:53"},
		{"[192.0.2.0/24]:53", Rule{netip.MustParsePrefix("192.0.2.0/24"), 53, 53, AnyProtocol}, "192.0.2.0/24:53"},
	} {
		got, err := ParseRule(tt.in)
		if err != nil || got != tt.want {
			t.Errorf("ParseRule(%q) = %+v, %v, want %+v", tt.in, got, err, tt.want)
			continue
		}
		text := tt.text
		if text == "" {
			text = tt.in
		}
		if got.String() != text {
			t.Errorf("ParseRule(%q).String() = %q, want %q", tt.in, got, text)
		}
	}
	for _, in := range []string{
		"", "/", ":", "[]", "example.com", "example.com:80", "10.0.0.0/33", "10.0.0/8", "10.0.0.1/8", "2001:db8::1/32",
		"10.0.0.0/8:", "10.0.0.0/8:0", "10.0.0.0/8:0-80", "10.0.0.0/8:80-", "10.0.0.0/8:-80", "10.0.0.0/8:90-80", "10.0.0.0/8:65536",
		"10.0.0.0/8:+1", "10.0.0.0/8:1-2-3", "10.0.0.0/8/", "10.0.0.0/8/sctp", "10.0.0.0/8/tcp/udp", "10.0.0.0/8:80/icmp",
		"[2001:db8::/32", "2001:db8::/32]", "2001:db8::/32:80", "[2001:db8::/32]80", "fe80::1%eth0", "::ffff:1.2.3.4", "[::1]/128]:1",
	} {
		if r, err := ParseRule(in); !errors.Is(err, ErrConfig) {
			t.Errorf("ParseRule(%q) = %v, %v, want an ErrConfig", in, r, err)
		}
	}
}

// FuzzParseRule: what is accepted is written so that it is understood the same.
func FuzzParseRule(f *testing.F) {
	for _, s := range []string{
		"10.0.0.0/8", "192.0.2.7:443/tcp", "[2001:db8::/32]:8000-8999/udp", "[2001:db8::]/32:53", "::/0/icmp", "[::1%lo]:1", "1.2.3.4:0-65535",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err != nil {
			if !errors.Is(err, ErrConfig) {
				t.Errorf("ParseRule(%q): not an ErrConfig: %v", s, err)
			}
			return
		}
		again, err := ParseRule(r.String())
		if err != nil || again != r {
			t.Errorf("ParseRule(%q) = %+v, written as %q and understood as %+v, %v", s, r, r, again, err)
		}
	})
}

func TestParseNameRule(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want NameRule
		text string // what String makes of it, if not in
	}{
		{"api.example.com", NameRule{"api.example.com", 0, 65535, AnyProtocol}, ""},
		{"API.Example.com.:443", NameRule{"api.example.com", 443, 443, AnyProtocol}, "api.example.com:443"},
		{"*.example.com:8000-8999/tcp", NameRule{"*.example.com", 8000, 8999, TCP}, ""},
		{"db_1.example.com/ICMP", NameRule{"db_1.example.com", 0, 65535, ICMP}, "db_1.example.com/icmp"},
		{"localhost:1/udp", NameRule{"localhost", 1, 1, UDP}, ""},
		{"xn--bcher-kva.example", NameRule{"xn--bcher-kva.example", 0, 65535, AnyProtocol}, ""},
	} {
		got, err := ParseNameRule(tt.in)
		if err != nil || got != tt.want {
			t.Errorf("ParseNameRule(%q) = %+v, %v, want %+v", tt.in, got, err, tt.want)
			continue
		}
		text := tt.text
		if text == "" {
			text = tt.in
		}
		if got.String() != text {
			t.Errorf("ParseNameRule(%q).String() = %q, want %q", tt.in, got, text)
		}
	}
	for _, in := range []string{
		"", ".", "*", "*.", "*.*.example.com", "a*.example.com", "api.*.com", "api example.com", "192.0.2.1", "2001:db8::1", "[::1]:80",
		"bücher.example", "a..b", "-a.example", "a:0", "a:80-", "a:90-80", "a:65536", "a/sctp", "a:80/icmp", "a/tcp/udp", "https://api.example.com",
	} {
		if r, err := ParseNameRule(in); !errors.Is(err, ErrConfig) {
			t.Errorf("ParseNameRule(%q) = %v, %v, want an ErrConfig", in, r, err)
		}
	}
}

// FuzzParseNameRule: what is accepted is written so that it is understood the
// same.
func FuzzParseNameRule(f *testing.F) {
	for _, s := range []string{"api.example.com", "*.example.com:443/tcp", "a_b.example.:8000-8999/udp", "X/icmp"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseNameRule(s)
		if err != nil {
			if !errors.Is(err, ErrConfig) {
				t.Errorf("ParseNameRule(%q): not an ErrConfig: %v", s, err)
			}
			return
		}
		again, err := ParseNameRule(r.String())
		if err != nil || again != r {
			t.Errorf("ParseNameRule(%q) = %+v, written as %q and understood as %+v, %v", s, r, r, again, err)
		}
	})
}

// FuzzParseHost: likewise for names with addresses, and resolvers.
func FuzzParseHost(f *testing.F) {
	for _, s := range []string{"db.test:192.0.2.5", "db.test:2001:db8::5", "db.test:[2001:db8::5]", "192.0.2.1:53", "[::1]:53", "fe80::1%eth0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if h, err := ParseHost(s); err == nil {
			if again, err := ParseHost(h.String()); err != nil || again != h {
				t.Errorf("ParseHost(%q) = %+v, written as %q and understood as %+v, %v", s, h, h, again, err)
			}
		} else if !errors.Is(err, ErrConfig) {
			t.Errorf("ParseHost(%q): not an ErrConfig: %v", s, err)
		}
		if a, err := ParseResolver(s); err == nil {
			if again, err := ParseResolver(a.String()); err != nil || again != a {
				t.Errorf("ParseResolver(%q) = %v, again %v, %v", s, a, again, err)
			}
		} else if !errors.Is(err, ErrConfig) {
			t.Errorf("ParseResolver(%q): not an ErrConfig: %v", s, err)
		}
	})
}
