package agent

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestConfigureWithoutIPv6(t *testing.T) {
	for name, test := range map[string]struct {
		conf, why string
		mtu       int
	}{
		"switched off everywhere":     {conf: "all", why: "disable_ipv6 is set", mtu: 65520},
		"switched off for interfaces": {conf: "default", why: "disable_ipv6 is set", mtu: 65520},
		"MTU too small":               {why: "its MTU is 576, IPv6 needs 1280", mtu: 576},
	} {
		for _, kind := range []LinkKind{TAP, Veth} {
			t.Run(name+" "+string(kind), func(t *testing.T) {
				c := startContainer(t, rootless("-Urn")...)
				if test.conf != "" {
					c.run(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/"+test.conf+"/disable_ipv6")
				}
				spec := testLink(kind)
				spec.MTU = test.mtu
				a, link := attachHere(t, c, spec)
				defer unix.Close(link.FD)
				status, err := a.Configure(*testAddresses)
				if err != nil {
					t.Fatal(err)
				}
				if status.IPv6 || len(status.Warnings) != 1 {
					t.Errorf("%+v", status)
				}
				has(t, strings.Join(status.Warnings, "\n"), "no IPv6 on tap0: ", test.why)
				has(t, c.run(t, "ip", "addr"), "10.0.2.100/24", "127.0.0.1/8")
				has(t, c.run(t, "ip", "route"), "default via 10.0.2.2 dev tap0")
				hasNot(t, c.run(t, "ip", "addr", "show", "tap0"), "inet6")
				if err := a.SetDefaultRoute6(true); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestSetDefaultRoute6(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(Auto))
	defer unix.Close(link.FD)
	if err := a.SetDefaultRoute6(true); err != nil { // nothing configured yet
		t.Error(err)
	}
	addresses := *testAddresses
	addresses.Default6 = false
	if _, err := a.Configure(addresses); err != nil {
		t.Fatal(err)
	}
	route := "default via fd75:736e:6574::2 dev tap0"
	hasNot(t, c.run(t, "ip", "-6", "route"), "default")
	for range 2 {
		for range 2 { // setting what is set changes nothing
			if err := a.SetDefaultRoute6(true); err != nil {
				t.Fatal(err)
			}
			if got := c.run(t, "ip", "-6", "route"); strings.Count(got, route) != 1 {
				t.Errorf("on: %s", got)
			}
		}
		for range 2 {
			if err := a.SetDefaultRoute6(false); err != nil {
				t.Fatal(err)
			}
			hasNot(t, c.run(t, "ip", "-6", "route"), "default")
		}
	}
}

// Without configuration the interface is up, and the rest is for programs
// inside: an address from a router advertisement is welcome.
func TestSetUp(t *testing.T) {
	for _, kind := range []LinkKind{TAP, Veth} {
		t.Run(string(kind), func(t *testing.T) {
			c := startContainer(t, rootless("-Urn")...)
			a, link := attachHere(t, c, testLink(kind))
			defer unix.Close(link.FD)
			status, err := a.SetUp()
			if err != nil || !status.IPv6 || len(status.Warnings) != 0 {
				t.Errorf("%+v, %v", status, err)
			}
			out := c.run(t, "ip", "addr")
			has(t, out, "127.0.0.1/8", "BROADCAST,MULTICAST,UP,LOWER_UP", "inet6 fe80::")
			hasNot(t, out, "10.0.2.", "fd75")
			if got := c.run(t, "cat", "/proc/sys/net/ipv6/conf/tap0/accept_ra"); got != "1\n" {
				t.Errorf("accept_ra = %s", got)
			}
		})
	}
}

func TestConfigureTwice(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(Auto))
	defer unix.Close(link.FD)
	for range 2 {
		if status, err := a.Configure(*testAddresses); err != nil || !status.IPv6 {
			t.Errorf("%+v, %v", status, err)
		}
	}
}

func TestConfigureNeedsLink(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	ns, err := helperOrder{PID: c.pid}.open()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	a, err := Start(t.Context(), ns, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := a.Configure(*testAddresses); err == nil {
		t.Error("configured nothing")
	}
	if _, err := a.SetUp(); err == nil {
		t.Error("set nothing up")
	}
	if err := a.SetDefaultRoute6(true); err == nil {
		t.Error("routed to nothing")
	}
}

// Somebody else's default route is neither replaced nor joined.
func TestConfigureOtherRoute(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	c.run(t, "sh", "-c", `ip link add eth0 type veth peer name eth1 && ip addr add 10.9.0.1/24 dev eth0 &&
		ip link set eth0 up && ip link set eth1 up && ip route add default via 10.9.0.2`)
	a, link := attachHere(t, c, testLink(Auto))
	defer unix.Close(link.FD)
	_, err := a.Configure(*testAddresses)
	if err == nil {
		t.Fatal("configured")
	}
	t.Log(err)
	has(t, err.Error(), "default route already", "10.9.0.2", "remove it")
}
