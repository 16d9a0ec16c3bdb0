package rig

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The addresses of a Net. Host and router are on one link, router and internet
// on another. Web is where the tests look for servers, but every address that
// is not named here has the same ones.
var (
	Host4   = netip.MustParseAddr("100.64.0.2")
	Host6   = netip.MustParseAddr("2001:db8:64::2")
	Router4 = netip.MustParseAddr("100.64.0.1")
	Router6 = netip.MustParseAddr("2001:db8:64::1")
	Web4    = netip.MustParseAddr("198.51.100.7")
	Web6    = netip.MustParseAddr("2001:db8:1::7")

	// The router loses every packet to Blackhole and answers those to the
	// others with the ICMP error of their name.
	Blackhole4   = netip.MustParseAddr("203.0.113.1")
	Blackhole6   = netip.MustParseAddr("2001:db8:bad::1")
	Unreachable4 = netip.MustParseAddr("203.0.113.2")
	Unreachable6 = netip.MustParseAddr("2001:db8:bad::2")
	NoRoute4     = netip.MustParseAddr("203.0.113.3")
	NoRoute6     = netip.MustParseAddr("2001:db8:bad::3")
	Prohibited4  = netip.MustParseAddr("203.0.113.4")
	Prohibited6  = netip.MustParseAddr("2001:db8:bad::4")

	// The host itself knows that it cannot reach these.
	HostUnreachable4 = netip.MustParseAddr("203.0.113.66")
	HostUnreachable6 = netip.MustParseAddr("2001:db8:bad::66")
	HostNoRoute4     = netip.MustParseAddr("203.0.113.67")
	HostNoRoute6     = netip.MustParseAddr("2001:db8:bad::67")
	HostProhibited4  = netip.MustParseAddr("203.0.113.68")
	HostProhibited6  = netip.MustParseAddr("2001:db8:bad::68")
	HostSilent4      = netip.MustParseAddr("100.64.0.5") // on link, but nobody
	HostSilent6      = netip.MustParseAddr("2001:db8:64::5")
)

// Names of the network namespaces for "ip -n" and "ip netns exec" in Net.Host.
const (
	RouterNetns   = "router"
	InternetNetns = "internet"
)

// A hostSetup tells the first node how to shape its namespaces.
type hostSetup struct {
	Dir      string
	Internet int // PID of the node there
	Tun      Tun
	NoPing   bool
}

var setUpHost = NewFunc("rig.setUpHost", func(_ context.Context, s hostSetup) (struct{}, error) {
	return struct{}{}, errors.Join(
		step("mounts", hostMounts(s)),
		step("sysctls of host", hostSysctls(s.NoPing)),
		step("links", hostLinks(s)),
	)
})

func step(what string, err error) error {
	if err != nil {
		return fmt.Errorf("rig: set up %s: %w", what, err)
	}
	return nil
}

// hostSysctls makes the host one on which an ordinary user may ping, or not.
func hostSysctls(noPing bool) error {
	group := "0 0" // as seen in the namespace; nothing else is mapped
	if userID() != 0 {
		group = "0 2147483647"
	}
	if noPing {
		group = "" // is "1 0": nobody
	}
	return sysctl(map[string]string{
		"net.ipv4.ping_group_range":        group,
		"net.ipv6.conf.all.accept_dad":     "0",
		"net.ipv6.conf.default.accept_dad": "0",
		"net.ipv6.conf.default.accept_ra":  "0",
		"net.ipv4.conf.all.rp_filter":      "0",
		"net.ipv4.conf.default.rp_filter":  "0",
	})
}

// farSysctls makes router and internet answer every packet with its error:
// the kernel's rate limits are one error per destination and second.
func farSysctls() error {
	// The limit over all destinations is the namespace's own since Linux 6.13.
	sysctl(map[string]string{"net.ipv4.icmp_msgs_per_sec": "1000000"})
	sysctl(map[string]string{"net.ipv4.icmp_msgs_burst": "1000000"})
	return sysctl(map[string]string{
		"net.ipv4.ip_forward":              "1",
		"net.ipv6.conf.all.forwarding":     "1",
		"net.ipv6.conf.default.accept_dad": "0",
		"net.ipv6.conf.all.accept_dad":     "0",
		"net.ipv4.conf.all.rp_filter":      "0",
		"net.ipv4.conf.default.rp_filter":  "0",
		"net.ipv4.icmp_ratelimit":          "0",
		"net.ipv6.icmp.ratelimit":          "0",
	})
}

func sysctl(values map[string]string) error {
	for name, value := range values {
		if value == "" {
			continue
		}
		path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// hostLinks makes the router's namespace, both wires, and all routes.
func hostLinks(s hostSetup) error {
	internet, err := netns.GetFromPid(s.Internet)
	if err != nil {
		return err
	}
	defer internet.Close()
	router, err := newNamespace()
	if err != nil {
		return err
	}
	defer router.Close()
	for name, ns := range map[string]netns.NsHandle{RouterNetns: router, InternetNetns: internet} {
		if err := nameNamespace(name, ns); err != nil {
			return err
		}
		if err := within(ns, farSysctls); err != nil {
			return err
		}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	r, err := netlink.NewHandleAt(router, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := netlink.NewHandleAt(internet, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer w.Close()
	return errors.Join(
		wire(h, "eth0", router, "host0"),
		wire(r, "web0", internet, "eth0"),
		address(h, "eth0", "100.64.0.2/29", "2001:db8:64::2/64"),
		address(r, "host0", "100.64.0.1/29", "2001:db8:64::1/64"),
		address(r, "web0", "100.64.1.1/30", "2001:db8:65::1/64"),
		address(w, "eth0", "100.64.1.2/30", "2001:db8:65::2/64"),
		up(h, "lo"), up(r, "lo"), up(w, "lo"),
		defaultRoutes(h, "eth0", "100.64.0.1", "2001:db8:64::1"),
		defaultRoutes(r, "web0", "100.64.1.2", "2001:db8:65::2"),
		gateway(w, "eth0", "100.64.0.0/29", "100.64.1.1"),
		gateway(w, "eth0", "2001:db8:64::/64", "2001:db8:65::1"),
		everything(w),
		broken(r, Blackhole4, Blackhole6, unix.RTN_BLACKHOLE),
		broken(r, Unreachable4, Unreachable6, unix.RTN_UNREACHABLE),
		broken(r, NoRoute4, NoRoute6, unix.RTN_THROW),
		broken(r, Prohibited4, Prohibited6, unix.RTN_PROHIBIT),
		broken(h, HostUnreachable4, HostUnreachable6, unix.RTN_UNREACHABLE),
		broken(h, HostNoRoute4, HostNoRoute6, unix.RTN_THROW),
		broken(h, HostProhibited4, HostProhibited6, unix.RTN_PROHIBIT),
	)
}

// newNamespace makes a network namespace with no process in it.
func newNamespace() (netns.NsHandle, error) {
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return -1, err
	}
	defer old.Close()
	ns, err := netns.New()
	if err != nil {
		runtime.UnlockOSThread()
		return -1, err
	}
	return ns, restore(old)
}

// within runs f on a thread that is in ns.
func within(ns netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer old.Close()
	if err := netns.Set(ns); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	return errors.Join(f(), restore(old))
}

// restore brings the locked thread back. One that cannot come back must never
// run anything else: it stays locked, and the node fails.
func restore(old netns.NsHandle) error {
	if err := netns.Set(old); err != nil {
		return err
	}
	runtime.UnlockOSThread()
	return nil
}

// nameNamespace gives ns the name that ip(8) knows it by.
func nameNamespace(name string, ns netns.NsHandle) error {
	path := "/run/netns/" + name
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return err
	}
	return unix.Mount(fmt.Sprintf("/proc/self/fd/%d", int(ns)), path, "", unix.MS_BIND, "")
}

func wire(near *netlink.Handle, name string, far netns.NsHandle, peer string) error {
	return step("wire "+name, near.LinkAdd(&netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: name, MTU: 1500},
		PeerName:      peer,
		PeerNamespace: netlink.NsFd(int(far)),
	}))
}

func up(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	return h.LinkSetUp(l)
}

func address(h *netlink.Handle, name string, prefixes ...string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	for _, prefix := range prefixes {
		a, err := netlink.ParseAddr(prefix)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(l, a); err != nil {
			return step("address "+prefix, err)
		}
	}
	return h.LinkSetUp(l)
}

func defaultRoutes(h *netlink.Handle, name, via4, via6 string) error {
	return errors.Join(gateway(h, name, "0.0.0.0/0", via4), gateway(h, name, "::/0", via6))
}

func gateway(h *netlink.Handle, name, prefix, via string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	_, dst, err := net.ParseCIDR(prefix)
	if err != nil {
		return err
	}
	return step("route "+prefix, h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Gw: net.ParseIP(via)}))
}

// everything makes every address that has no better route a local one. It has
// to be in the main table: the local one is looked at first, and would take
// the answers too.
func everything(h *netlink.Handle) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, prefix := range []string{"0.0.0.0/0", "::/0"} {
		_, dst, err := net.ParseCIDR(prefix)
		if err != nil {
			return err
		}
		err = h.RouteAdd(&netlink.Route{
			LinkIndex: lo.Attrs().Index, Dst: dst,
			Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_MAIN, Scope: netlink.SCOPE_HOST,
		})
		if err != nil {
			return step("route of everything "+prefix, err)
		}
	}
	return nil
}

// broken adds a route of a type that carries nothing.
func broken(h *netlink.Handle, addr4, addr6 netip.Addr, kind int) error {
	for _, a := range []netip.Addr{addr4, addr6} {
		dst := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		if err := h.RouteAdd(&netlink.Route{Dst: dst, Type: kind}); err != nil {
			return step("route to "+a.String(), err)
		}
	}
	return nil
}

// freeUID is the first uid from 61000 that /etc/passwd does not know.
var freeUID = sync.OnceValue(func() int {
	taken := make(map[int]bool)
	if f, err := os.Open("/etc/passwd"); err == nil {
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if fields := strings.Split(s.Text(), ":"); len(fields) > 2 {
				if uid, err := strconv.Atoi(fields[2]); err == nil {
					taken[uid] = true
				}
			}
		}
	}
	uid := 61000
	for taken[uid] {
		uid++
	}
	return uid
})
