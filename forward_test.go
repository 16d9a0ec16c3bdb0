package usernet

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func TestParseForward(t *testing.T) {
	host := netip.MustParseAddrPort
	any := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.Addr{}, port) }
	for _, tt := range []struct {
		in   string
		want []Forward
	}{
		{"8080:80", []Forward{{TCP, any(8080), "", any(80), 0}}},
		{"8080:80/tcp", []Forward{{TCP, any(8080), "", any(80), 0}}},
		{"53:5353/UDP", []Forward{{UDP, any(53), "", any(5353), 0}}},
		{"0:80", []Forward{{TCP, any(0), "", any(80), 0}}},
		{":80", []Forward{{TCP, any(0), "", any(80), 0}}},
		{"127.0.0.1:8080:80", []Forward{{TCP, host("127.0.0.1:8080"), "", any(80), 0}}},
		{"127.0.0.1::80", []Forward{{TCP, host("127.0.0.1:0"), "", any(80), 0}}},
		{"0.0.0.0:8080:80", []Forward{{TCP, host("0.0.0.0:8080"), "", any(80), 0}}},
		{"[::1]:8080:80/udp", []Forward{{UDP, host("[::1]:8080"), "", any(80), 0}}},
		{"[fe80::1%lo]:8080:80", []Forward{{TCP, host("[fe80::1%lo]:8080"), "", any(80), 0}}},
		{"[::]::80", []Forward{{TCP, host("[::]:0"), "", any(80), 0}}},
		{"8000-8001:80-81", []Forward{{TCP, any(8000), "", any(80), 0}, {TCP, any(8001), "", any(81), 0}}},
		{":80-81", []Forward{{TCP, any(0), "", any(80), 0}, {TCP, any(0), "", any(81), 0}}},
		{"65535-65535:1-1", []Forward{{TCP, any(65535), "", any(1), 0}}},
		{"unix:/run/x.sock:80", []Forward{{TCP, netip.AddrPort{}, "/run/x.sock", any(80), 0}}},
		{"unix:/run/a:b:80/tcp", []Forward{{TCP, netip.AddrPort{}, "/run/a:b", any(80), 0}}},
		{"8080:80,proxy=v1", []Forward{{TCP, any(8080), "", any(80), 1}}},
		{"[::1]:8080:80/tcp,proxy=v2", []Forward{{TCP, host("[::1]:8080"), "", any(80), 2}}},
		{"unix:/run/a,b:80,proxy=v2", []Forward{{TCP, netip.AddrPort{}, "/run/a,b", any(80), 2}}},
	} {
		got, err := ParseForward(tt.in)
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("ParseForward(%q) = %+v, %v, want %+v", tt.in, got, err, tt.want)
		}
		for _, f := range got {
			again, err := ParseForward(f.String())
			if err != nil || len(again) != 1 || again[0] != f {
				t.Errorf("ParseForward(%q) of %+v = %+v, %v", f.String(), f, again, err)
			}
		}
	}
	for in, why := range map[string]string{
		"":                      "form",
		"80":                    "write 80:80, or :80",
		"8080:":                 "guest's port",
		"8080:0":                "guest's port",
		"8080:65536":            "guest's port",
		"65536:80":              "host's port",
		"-1:80":                 "host's port",
		"+1:80":                 "host's port",
		"a:80":                  "host's port",
		"8001-8000:80-81":       "write 8000-8001",
		"8000-8001:81-80":       "write 80-81",
		"8000-8002:80-81":       "3 ports of the host and 2 of the guest",
		"8000-8001:80":          "2 ports of the host and 1 of the guest",
		"0-1:80-81":             "host's port",
		"8080:80/sctp":          `"sctp"`,
		"8080:80/":              `""`,
		"localhost:8080:80":     "a name will not do",
		"1.2.3:8080:80":         "not an IP address",
		"::1:8080:80":           "brackets",
		"[127.0.0.1]:8080:80":   "brackets",
		"[::1:8080:80":          "not an address",
		"224.0.0.1:8080:80":     "group",
		"[::ffff:1.2.3.4]:1:80": "IPv4",
		"unix:x:80":             "slash",
		"unix:/x":               "missing",
		"unix:/x:":              "guest's port",
		"unix:/x:1-2":           "one port",
		"unix:/x:80/udp":        "guest's port",
		"8080:80/udp,proxy=v1":  "ahead of a connection",
		"8080:80,proxy=v3":      "proxy=v1 or proxy=v2",
		"8080:80,proxy=":        "proxy=v1 or proxy=v2",
		"8080:80,fast":          "no option",
		"unix:/" + strings.Repeat("x", 200) + ":80": "shorter",
	} {
		fs, err := ParseForward(in)
		if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), why) {
			t.Errorf("ParseForward(%q) = %v, %v, want an ErrConfig with %q", in, fs, err, why)
		}
	}
}

func TestPublishIsChecked(t *testing.T) {
	a := netip.MustParseAddrPort
	ok := Forward{Protocol: TCP, Host: a("127.0.0.1:8080"), Guest: a("10.0.2.100:80")}
	other := func(change func(*Forward)) Forward { f := ok; change(&f); return f }
	for _, tt := range []struct {
		name    string
		publish []Forward
		flaw    string
	}{
		{"one", []Forward{ok}, ""},
		{"another protocol", []Forward{ok, other(func(f *Forward) { f.Protocol = UDP })}, ""},
		{"another address", []Forward{ok, other(func(f *Forward) { f.Host = a("127.0.0.2:8080") })}, ""},
		{"any port twice", []Forward{{TCP, netip.AddrPort{}, "", ok.Guest, 0}, {TCP, netip.AddrPort{}, "", ok.Guest, 0}}, ""},
		{"twice", []Forward{ok, other(func(f *Forward) { f.Guest = a("10.0.2.100:81") })}, "published already"},
		{"no protocol", []Forward{{Host: ok.Host, Guest: ok.Guest}}, "no protocol any"},
		{"icmp", []Forward{other(func(f *Forward) { f.Protocol = ICMP })}, "no protocol icmp"},
		{"no guest port", []Forward{other(func(f *Forward) { f.Guest = a("10.0.2.100:0") })}, "guest's port"},
		{"loopback inside", []Forward{other(func(f *Forward) { f.Guest = a("127.0.0.1:80") })}, "no connection from outside"},
		{"nobody inside", []Forward{other(func(f *Forward) { f.Guest = a("0.0.0.0:80") })}, "nobody inside"},
		{"path and port", []Forward{other(func(f *Forward) { f.HostPath = "/x" })}, "one or the other"},
	} {
		err := Config{PID: 1, Publish: tt.publish}.Validate()
		switch {
		case tt.flaw == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.flaw != "" && (!errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), tt.flaw)):
			t.Errorf("%s: %v, want an ErrConfig with %q", tt.name, err, tt.flaw)
		}
	}
}

// FuzzParseForward: what is accepted is valid, and written so that it is
// understood the same.
func FuzzParseForward(f *testing.F) {
	for _, s := range []string{
		"8080:80", "127.0.0.1:8000-8010:80-90/udp", "[::1]::80", "unix:/run/x:80", ":1", "0:1-3", "[fe80::1%lo]:1:1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		fs, err := ParseForward(s)
		if err != nil {
			if !errors.Is(err, ErrConfig) {
				t.Errorf("ParseForward(%q): not an ErrConfig: %v", s, err)
			}
			return
		}
		if len(fs) > 16 {
			fs = fs[:16]
		}
		for _, f := range fs {
			again, err := ParseForward(f.String())
			if err != nil || len(again) != 1 || again[0] != f {
				t.Errorf("ParseForward(%q) = %+v, written as %q and understood as %+v, %v", s, f, f, again, err)
			}
		}
	})
}
