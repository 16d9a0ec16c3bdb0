package agent

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
)

// FuzzProtocol: whatever comes in place of a request, a reply or a dial is taken
// or refused, and what is taken is written so that it is understood the same.
func FuzzProtocol(f *testing.F) {
	for _, m := range []any{
		request{Op: opLink, Link: &LinkSpec{Kind: TAP, Name: "tap0", MTU: 65520, MAC: []byte{2, 0, 0, 0, 0, 1}, Offload: true}},
		request{Op: opConfigure, Addresses: &Addresses{Addr4: netip.MustParsePrefix("10.0.2.100/24"), Gateway4: netip.MustParseAddr("10.0.2.2")}},
		request{Op: opRoute6, On: true},
		reply{Error: "no", Errno: 1}, reply{Link: &Link{Kind: Veth, Name: "tap0"}}, reply{View: &View{}, Status: &Status{Warnings: []string{"x"}}},
	} {
		b, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(appendDial(nil, 7, netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("10.0.2.100:80")))
	f.Add(appendDial(nil, 7, netip.MustParseAddrPort("[2001:db8::1]:1"), netip.MustParseAddrPort("[fd00::1]:80")))
	f.Fuzz(func(t *testing.T, b []byte) {
		var q request
		if decode(b, 0, &q) == nil {
			if again, err := json.Marshal(q); err != nil || decode(again, 0, new(request)) != nil {
				t.Errorf("request %q becomes %q, %v", b, again, err)
			}
		}
		var r reply
		if decode(b, 0, &r) == nil {
			if again, err := json.Marshal(r); err != nil || decode(again, 0, new(reply)) != nil {
				t.Errorf("reply %q becomes %q, %v", b, again, err)
			}
			r.clean()
			if strings.ContainsAny(r.Error, "\x1b\r\n") {
				t.Errorf("reply %q is printed as %q", b, r.Error)
			}
			if r.Link != nil && r.Link.check(LinkSpec{Name: r.Link.Name, Kind: r.Link.Kind}, -1) == nil {
				t.Errorf("reply %q is taken without a descriptor", b)
			}
			if r.Listening != nil {
				_ = r.Listening.check()
			}
		}
		if len(b) == dialSize {
			id, from, to := parseDial(b)
			if from.Addr().Is4() == to.Addr().Is4() && !from.Addr().Is4In6() && !to.Addr().Is4In6() {
				i, f, o := parseDial(appendDial(nil, id, from, to))
				if i != id || f != from || o != to {
					t.Errorf("dial %v %v %v becomes %v %v %v", id, from, to, i, f, o)
				}
			}
		}
	})
}
