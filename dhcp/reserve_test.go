package dhcp

import (
	"net"
	"net/netip"
	"testing"
	"time"
)

// TestReserve: reservations come and go while the server serves.
func TestReserve(t *testing.T) {
	prefix := netip.MustParsePrefix("10.0.2.0/24")
	at := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 2, n}) }
	mac := func(n byte) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, n} }
	p, err := newPool(prefix, at(15), at(30), nil, at(2))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	one := client{key: "one", mac: mac(1)}
	if got := p.choose(now, one, netip.Addr{}); got != at(15) {
		t.Errorf("before: %v", got)
	}
	p.bind(now, client{key: "other", mac: mac(9)}, at(20), time.Hour)
	for _, r := range []Reservation{{mac(1), at(100)}, {mac(2), at(20)}} {
		if err := p.reserve(r); err != nil {
			t.Error(err)
		}
	}
	if got := p.choose(now, one, at(16)); got != at(100) {
		t.Errorf("a guest with a reservation: %v", got)
	}
	if p.grantable(now, client{key: "other", mac: mac(9)}, at(20)) {
		t.Error("who had a reserved address keeps it")
	}
	for _, r := range []Reservation{{mac(1), at(101)}, {mac(3), at(100)}, {mac(3), at(2)}, {mac(3), netip.MustParseAddr("10.0.3.1")}, {nil, at(102)}} {
		if err := p.reserve(r); err == nil {
			t.Errorf("%v is reserved", r)
		}
	}
	p.bind(now, one, at(100), time.Hour)
	p.unreserve(mac(1))
	p.unreserve(mac(8))
	if n := len(p.leases(now)); n != 0 {
		t.Errorf("%d leases are left", n)
	}
	if err := p.reserve(Reservation{mac(3), at(100)}); err != nil {
		t.Errorf("an address that was given back: %v", err)
	}
}
