package usernet

import (
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/usernet/usernet/internal/agent"
)

func TestParseAutoPublish(t *testing.T) {
	one := func(port uint16) PortRange { return PortRange{port, port, AnyProtocol} }
	lo := netip.MustParseAddr("127.0.0.1")
	for in, want := range map[string]AutoPublish{
		"all":                       {},
		"~22":                       {Exclude: []PortRange{one(22)}},
		"all,~22,~8000-8999/udp":    {Exclude: []PortRange{one(22), {8000, 8999, UDP}}},
		"80, 3000-3999/tcp,53/udp":  {Include: []PortRange{one(80), {3000, 3999, TCP}, {53, 53, UDP}}},
		"3000-3999,~3306":           {Include: []PortRange{{3000, 3999, AnyProtocol}}, Exclude: []PortRange{one(3306)}},
		"127.0.0.1:all":             {Addr: lo},
		"127.0.0.1:1-65535,~22":     {Addr: lo, Include: []PortRange{{1, 65535, AnyProtocol}}, Exclude: []PortRange{one(22)}},
		"[::1]:8080":                {Addr: netip.IPv6Loopback(), Include: []PortRange{one(8080)}},
		"[fe80::1%lo]:all":          {Addr: netip.MustParseAddr("fe80::1%lo")},
		"0.0.0.0:8080-8081/tcp,~53": {Addr: netip.IPv4Unspecified(), Include: []PortRange{{8080, 8081, TCP}}, Exclude: []PortRange{one(53)}},
	} {
		got, err := ParseAutoPublish(in)
		if err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("ParseAutoPublish(%q) = %+v, %v, want %+v", in, got, err, want)
			continue
		}
		if again, err := ParseAutoPublish(got.String()); err != nil || !reflect.DeepEqual(again, got) {
			t.Errorf("ParseAutoPublish(%q) of %q = %+v, %v", got, in, again, err)
		}
	}
	for in, why := range map[string]string{
		"":             "not a number from 1 to 65535",
		"0":            "not a number from 1 to 65535",
		"65536":        "not a number from 1 to 65535",
		"~":            "not a number from 1 to 65535",
		"~all":         "not a number from 1 to 65535",
		"80,":          "not a number from 1 to 65535",
		"9-8":          "write 8-9",
		"80/icmp":      "there are tcp and udp",
		"all,80":       "all is everything already",
		"host:80":      "not an IP address",
		"::1:80":       "brackets",
		"224.0.0.1:80": "a group's address",
	} {
		if a, err := ParseAutoPublish(in); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), why) {
			t.Errorf("ParseAutoPublish(%q) = %v, %v, want an error with %q", in, a, err, why)
		}
	}
	for _, c := range []Config{
		{TapFile: os.Stdin, PublishAuto: &AutoPublish{}},
		{PID: 1, PublishAuto: &AutoPublish{Include: []PortRange{{0, 1, TCP}}}},
		{PID: 1, PublishAuto: &AutoPublish{Exclude: []PortRange{{2, 1, TCP}}}},
		{PID: 1, PublishAuto: &AutoPublish{Exclude: []PortRange{{1, 1, ICMP}}}},
	} {
		if err := c.Validate(); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "publish automatically") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// TestAutoPublishWants: UDP ports that are a client's more likely than a server's
// have to be named.
func TestAutoPublishWants(t *testing.T) {
	l := &agent.Listening{LocalFrom: 32768, LocalTo: 60999}
	for _, tt := range []struct {
		spec  string
		proto Protocol
		port  uint16
		want  bool
	}{
		{"all", TCP, 22, true},
		{"all", TCP, 40000, true},
		{"all", UDP, 53, true},
		{"all", UDP, 40000, false},
		{"all", UDP, 68, false},
		{"all", TCP, 68, true},
		{"68/udp,40000/udp", UDP, 68, true},
		{"68/udp,40000/udp", UDP, 40000, true},
		{"68/udp,40000/udp", TCP, 40000, false},
		{"~22", TCP, 22, false},
		{"~22", TCP, 23, true},
		{"~22/udp", TCP, 22, true},
		{"8000-8999,~8080", TCP, 8080, false},
		{"8000-8999,~8080", UDP, 8999, true},
		{"8000-8999,~8080", TCP, 9000, false},
	} {
		a, err := ParseAutoPublish(tt.spec)
		if err != nil {
			t.Fatal(err)
		}
		if got := a.wants(tt.proto, tt.port, l); got != tt.want {
			t.Errorf("%s wants %d/%v: %t", tt.spec, tt.port, tt.proto, got)
		}
	}
}
