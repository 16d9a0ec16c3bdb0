package agent

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLook: what Look tells is what ip(8) shows, of any interface.
func TestLook(t *testing.T) {
	for _, kind := range []LinkKind{TAP, Veth} {
		t.Run(string(kind), func(t *testing.T) {
			c := startContainer(t, rootless("-Urn")...)
			a, link := attachHere(t, c, testLink(kind))
			defer unix.Close(link.FD)
			v, err := a.Look("tap0")
			if err != nil || v.Up || len(v.Addrs) > 0 || v.Gateway4.IsValid() {
				t.Errorf("before: %+v, %v", v, err)
			}
			if _, err := a.Configure(*testAddresses); err != nil {
				t.Fatal(err)
			}
			if v, err = a.Look("tap0"); err != nil {
				t.Fatal(err)
			}
			if !v.Up || v.MTU != link.MTU || v.MAC.String() != link.MAC.String() ||
				v.Gateway4 != testAddresses.Gateway4 || v.Gateway6 != testAddresses.Gateway6 ||
				!slices.Contains(v.Addrs, testAddresses.Addr4) || !slices.Contains(v.Addrs, testAddresses.Addr6) || len(v.Addrs) != 2 {
				t.Errorf("after: %+v", v)
			}
			c.run(t, "ip", "addr", "add", "192.0.2.9/28", "dev", "lo")
			if v, err = a.Look("lo"); err != nil || !slices.Contains(v.Addrs, netip.MustParsePrefix("192.0.2.9/28")) || v.Gateway4.IsValid() {
				t.Errorf("lo: %+v, %v", v, err)
			}
			if _, err := a.Look("none"); !errors.Is(err, syscall.ENODEV) || !strings.Contains(err.Error(), "find none") {
				t.Errorf("none: %v", err)
			}
		})
	}
}
