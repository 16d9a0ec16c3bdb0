package agent

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestConnMessage(t *testing.T) {
	for _, want := range []Conn{
		{},
		{
			Guest: netip.MustParseAddrPort("10.0.2.100:40000"), Remote: netip.MustParseAddrPort("192.0.2.1:80"),
			Sent: 1<<32 - 1, Received: 2, SendWindow: 3, ReceiveWindow: 4, Timestamp: 5, MSS: 65480,
			Scaled: true, Timestamps: true, SACK: true, SendScale: 14, ReceiveScale: 6,
		},
		{
			Guest: netip.MustParseAddrPort("[fd75:736e:6574::100]:40000"), Remote: netip.MustParseAddrPort("[2001:db8::1]:443"),
			Sent: 1, Timestamps: true,
		},
	} {
		b := appendConn(nil, 77, &want)
		if len(b) != adoptSize {
			t.Fatalf("%d bytes, want %d", len(b), adoptSize)
		}
		if !want.Guest.IsValid() {
			want.Guest, want.Remote = netip.MustParseAddrPort("[::]:0"), netip.MustParseAddrPort("[::]:0")
		}
		if id, got := parseConn(b); id != 77 || got != want {
			t.Errorf("read %d %+v, want %+v", id, got, want)
		}
	}
}

// TestAdoptNone: what is no connection of the namespace's is not made one.
func TestAdoptNone(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(TAP))
	defer unix.Close(link.FD)
	if _, err := a.Configure(*testAddresses); err != nil {
		t.Fatal(err)
	}
	s, err := a.Sockets()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i, conn := range []Conn{
		{Guest: netip.MustParseAddrPort("10.0.2.100:40000"), Remote: netip.MustParseAddrPort("192.0.2.1:80")},
		{Guest: netip.MustParseAddrPort("[fd75:736e:6574::100]:40000"), Remote: netip.MustParseAddrPort("[2001:db8::1]:80")},
	} {
		if err := s.Adopt(uint32(i), &conn); err != nil {
			t.Fatal(err)
		}
		s.await(t, func(id uint32, fd int, errno unix.Errno) {
			if id != uint32(i) || fd >= 0 || errno != unix.ENOENT {
				t.Errorf("answer %d %d %v, want %d, none and %v", id, fd, errno, i, unix.ENOENT)
			}
		})
		if err := s.Release(uint32(i)); err != nil {
			t.Fatal(err)
		}
	}
	if rules := c.run(t, "ip", "rule") + c.run(t, "ip", "-6", "rule"); strings.Contains(rules, "sport") {
		t.Errorf("rules:\n%s", rules)
	}
}
