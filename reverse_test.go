package usernet

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestParseReverse(t *testing.T) {
	a := netip.MustParseAddrPort
	for in, want := range map[string]Reverse{
		"5432:5432":                   {Port: 5432, Host: a("127.0.0.1:5432")},
		"80:127.0.0.1:8080":           {Port: 80, Host: a("127.0.0.1:8080")},
		"80:192.0.2.1:8080":           {Port: 80, Host: a("192.0.2.1:8080")},
		"80:[::1]:8080":               {Port: 80, Host: a("[::1]:8080")},
		"6000:unix:/tmp/.X11-unix/X0": {Port: 6000, HostPath: "/tmp/.X11-unix/X0"},
		"1:unix:/a:b":                 {Port: 1, HostPath: "/a:b"},
	} {
		got, err := ParseReverse(in)
		if err != nil || got != want {
			t.Errorf("ParseReverse(%q) = %+v, %v, want %+v", in, got, err, want)
		}
		if again, err := ParseReverse(got.String()); err != nil || again != got {
			t.Errorf("ParseReverse(%q) = %+v, %v, want %+v", got, again, err, got)
		}
	}
	for in, why := range map[string]string{
		"":                                     "form",
		"80":                                   "form",
		"0:80":                                 "guest's port",
		"65536:80":                             "guest's port",
		"80:":                                  "server's port",
		"80:0":                                 "server's port",
		"80:localhost:80":                      "a name will not do",
		"80:::1:80":                            "brackets",
		"80:0.0.0.0:80":                        "127.0.0.1",
		"80:224.0.0.1:80":                      "no server",
		"80:unix:x":                            "slash",
		"80:unix:/" + strings.Repeat("x", 200): "shorter",
	} {
		if r, err := ParseReverse(in); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), why) {
			t.Errorf("ParseReverse(%q) = %v, %v, want an ErrConfig with %q", in, r, err, why)
		}
	}
	r := Reverse{Port: 80, Host: a("127.0.0.1:80")}
	if err := (Config{PID: 1, Reverse: []Reverse{r, r}}).Validate(); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "already") {
		t.Errorf("the same port twice: %v", err)
	}
}
