package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// leased finds the guest's IPv4 address and checks that it is one to lease.
func leased(t *testing.T, guest *rig.Node) {
	t.Helper()
	var text string
	inet := regexp.MustCompile(`inet (10\.0\.2\.\d+)/24`)
	if !rig.Poll(10*time.Second, func() bool {
		text = guest.Must(t, "ip", "addr", "show", "dev", "tap0")
		return inet.MatchString(text)
	}) {
		t.Fatalf("no address:\n%s", text)
	}
	addr := netip.MustParseAddr(inet.FindStringSubmatch(text)[1])
	if addr.Less(netip.MustParseAddr("10.0.2.15")) || netip.MustParseAddr("10.0.2.30").Less(addr) {
		t.Errorf("leased %v, want one from .15 to .30", addr)
	}
}

// TestDHCPClients: every client gets an address, a route, an MTU and a DNS
// server, and the guest a working network.
func TestDHCPClients(t *testing.T) {
	rig.NeedUsernet(t)
	for _, c := range []struct {
		name    string
		tool    string
		mtu     bool // it sets the interface's MTU
		search  bool // it asks for search domains
		command []string
	}{
		{"udhcpc", "udhcpc", false, false, []string{"udhcpc", "-f", "-n", "-q", "-t", "5", "-i", "tap0", "-s", "/etc/udhcpc/default.script"}},
		{"busybox udhcpc", "busybox", false, false, []string{"busybox", "udhcpc", "-f", "-n", "-q", "-t", "5", "-i", "tap0", "-s", "/etc/udhcpc/default.script"}},
		{"dhclient", "dhclient", true, true, []string{"dhclient", "-4", "-1", "-v", "tap0"}},
		{"dhcpcd", "dhcpcd", false, true, []string{"dhcpcd", "-4", "-1", "--debug", "--nodev", "--waitip", "4", "tap0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rig.NeedTools(t, c.tool)
			eachLink(t, func(t *testing.T, w *world) {
				startDNS(t, w.Internet, rig.Web4.String(), "--host-record=www.example.test,"+rig.Web4.String())
				w.Host.WriteEtc(t, "resolv.conf", "nameserver "+rig.Web4.String()+"\nsearch example.test\n")
				w.Guest.WriteEtc(t, "resolv.conf", "# nobody has written this yet\n")
				w.attach(t, "--configure=none", "--mtu", "9000")
				out := w.Guest.RunFor(t, 30*time.Second, c.command...)
				if out.Code != 0 {
					t.Errorf("%s: status %d\n%s%s", c.name, out.Code, out.Stdout, out.Stderr)
				}
				leased(t, w.Guest)
				if got := w.Guest.Must(t, "ip", "route"); !strings.Contains(got, "default via 10.0.2.2") {
					t.Errorf("routes:\n%s", got)
				}
				if got := w.Guest.Must(t, "ip", "link", "show", "tap0"); c.mtu && !strings.Contains(got, "mtu 9000") {
					t.Errorf("the client did not see the MTU:\n%s", got)
				}
				var conf string
				if !rig.Poll(5*time.Second, func() bool {
					conf = w.Guest.Must(t, "cat", "/etc/resolv.conf")
					return strings.Contains(conf, "nameserver 10.0.2.3")
				}) || c.search && !strings.Contains(conf, "example.test") {
					t.Errorf("resolv.conf is\n%s", conf)
				}
				wantNetwork(t, w.Guest, false)
				name := pick(c.search, "www.example.test", "www")
				if got := w.Guest.Run(t, "getent", "ahostsv4", name); !strings.Contains(got.Stdout, rig.Web4.String()) {
					t.Errorf("%s resolves to %q", name, got.Stdout)
				}
			})
		})
	}
}

// networkd runs systemd-networkd without systemd: its user is made another name
// of root's, and a read-only /sys tells it that there is no udev to wait for.
const networkd = `set -e
(echo systemd-network:x:0:0::/:/bin/false; grep -v ^systemd-network: /etc/passwd) > /etc/passwd.new
mv /etc/passwd.new /etc/passwd
mount -o remount,bind,ro /sys
mkdir -p /run/systemd/network /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp
printf '[Match]\nName=tap0\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=yes\n[DHCPv4]\nUseMTU=yes\nUseDomains=yes\n' > /run/systemd/network/50-tap0.network
exec /lib/systemd/systemd-networkd`

// TestNetworkd: systemd-networkd gets its addresses of both families.
func TestNetworkd(t *testing.T) {
	rig.NeedUsernet(t)
	if _, err := os.Stat("/lib/systemd/systemd-networkd"); err != nil {
		rig.Missing(t, "systemd-networkd: %v", err)
	}
	eachLink(t, func(t *testing.T, w *world) {
		w.Host.WriteEtc(t, "resolv.conf", "nameserver "+rig.Web4.String()+"\nsearch example.test\n")
		w.attach(t, "--configure=none", "--mtu", "9000")
		w.Guest.Exec(t, rig.Command{Args: []string{"sh", "-c", networkd}, Env: []string{"SYSTEMD_LOG_LEVEL=info", "SYSTEMD_LOG_TARGET=console"}})
		leased(t, w.Guest)
		var lease string
		if !rig.Poll(15*time.Second, func() bool {
			lease = w.Guest.Run(t, "sh", "-c", "cat /run/systemd/netif/leases/*").Stdout
			six := w.Guest.Must(t, "ip", "-6", "addr", "show", "dev", "tap0", "scope", "global")
			return lease != "" && strings.Contains(six, "inet6 fd75:736e:6574:") && !strings.Contains(six, "tentative")
		}) {
			t.Errorf("lease:\n%s\naddresses:\n%s", lease, w.Guest.Must(t, "ip", "addr", "show", "dev", "tap0"))
		}
		for _, want := range []string{"ROUTER=10.0.2.2", "DNS=10.0.2.3", "MTU=9000", "example.test"} {
			if !strings.Contains(lease, want) {
				t.Errorf("the lease has no %s:\n%s", want, lease)
			}
		}
		families(t, func(t *testing.T, six bool) { wantNetwork(t, w.Guest, six) })
	})
}

// TestDHCPv6: a client of DHCPv6 gets an address and a DNS server.
func TestDHCPv6(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "dhclient")
	eachLink(t, func(t *testing.T, w *world) {
		w.Guest.Must(t, "sysctl", "-w", "net.ipv6.conf.default.autoconf=0")
		w.attach(t, "--configure=none")
		// dhclient wants a link-local address that is not tentative.
		if !rig.Poll(10*time.Second, func() bool {
			out := w.Guest.Must(t, "ip", "-6", "addr", "show", "dev", "tap0")
			return strings.Contains(out, "fe80") && !strings.Contains(out, "tentative")
		}) {
			t.Fatal("no link-local address")
		}
		out := w.Guest.RunFor(t, 30*time.Second, "dhclient", "-6", "-1", "-v", "tap0")
		if out.Code != 0 {
			t.Fatalf("dhclient: status %d\n%s%s", out.Code, out.Stdout, out.Stderr)
		}
		var text string
		if !rig.Poll(10*time.Second, func() bool {
			text = w.Guest.Must(t, "ip", "-6", "addr", "show", "dev", "tap0", "scope", "global")
			return strings.Contains(text, "inet6 fd75:736e:6574::") && !strings.Contains(text, "tentative")
		}) {
			t.Errorf("addresses:\n%s", text)
		}
		if got := w.Guest.Must(t, "cat", "/etc/resolv.conf"); !strings.Contains(got, w.DNS6.String()) {
			t.Errorf("resolv.conf is\n%s", got)
		}
		// The default route is the router advertisement's.
		if !rig.Poll(10*time.Second, func() bool {
			return strings.Contains(w.Guest.Must(t, "ip", "-6", "route", "show", "default"), "default")
		}) {
			t.Error("no default route")
		}
		wantNetwork(t, w.Guest, true)
	})
}

// TestSLAAC: from a router advertisement alone the guest gets an address, a
// route, and a DNS server.
func TestSLAAC(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		startDNS(t, w.Internet, rig.Web4.String(), "--host-record=www.example.test,192.0.2.9")
		w.attach(t, "--configure=none", "--mtu", "9000")
		start := time.Now()
		var text string
		if !rig.Poll(10*time.Second, func() bool {
			text = w.Guest.Must(t, "ip", "-6", "addr", "show", "dev", "tap0", "scope", "global")
			return strings.Contains(text, "inet6 fd75:736e:6574:") && !strings.Contains(text, "tentative")
		}) {
			t.Fatalf("no address:\n%s", text)
		}
		t.Logf("an address after %v", time.Since(start))
		if got := w.Guest.Must(t, "ip", "-6", "route", "show", "default"); !strings.Contains(got, "proto ra") {
			t.Errorf("default route: %q", got)
		}
		wantNetwork(t, w.Guest, true)

		ra := rig.AskRouter.On(t, w.Guest, "tap0")
		if ra.MTU != 9000 || ra.Lifetime == 0 || ra.LinkLayerAddress == "" {
			t.Errorf("router advertisement: %+v", ra)
		}
		if want := []netip.Prefix{netip.MustParsePrefix("fd75:736e:6574::/64")}; !slices.Equal(ra.Prefixes, want) || !ra.Autonomous {
			t.Errorf("prefixes: %+v, want %v", ra, want)
		}
		if !slices.Equal(ra.DNS, []netip.Addr{w.DNS6}) {
			t.Fatalf("DNS servers: %v, want %v", ra.DNS, w.DNS6)
		}
		if got, text := dig(t, w.Guest, ra.DNS[0], "www.example.test"); fmt.Sprint(got) != "[192.0.2.9]" {
			t.Errorf("asking %v:\n%s", ra.DNS[0], text)
		}
	})
}
