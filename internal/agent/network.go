package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/congestion"
)

// minMTU6 is the least MTU of a link that speaks IPv6 (RFC 8200 section 5).
const minMTU6 = 1280

// carrierTimeout bounds the wait for a carrier; the kernel may take its time
// over it, up to a second (net/core/link_watch.c).
const carrierTimeout = 3 * time.Second

// network is the network namespace as seen by the thread that is in it.
type network struct {
	handle   *netlink.Handle
	link     netlink.Link // nil before openLink
	gateway6 netip.Addr
	ipv6     bool
	yield    bool // to default routes of other interfaces

	congestion string // for connections that end in usernet, "" is the namespace's
}

func newNetwork() (*network, error) {
	h, err := newHandle()
	if err != nil {
		return nil, err
	}
	return &network{handle: h, congestion: congestion.Local()}, nil
}

// newHandle opens a netlink socket in the thread's network namespace.
func newHandle() (*netlink.Handle, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := h.SetSocketTimeout(5 * time.Second); err != nil {
		h.Close()
		return nil, fmt.Errorf("set netlink timeout: %w", err)
	}
	return h, nil
}

var errNoLink = errors.New("no link was opened")

// configure sets addresses and routes. What concerns IPv6 alone never fails it.
func (n *network) configure(a Addresses) (*Status, error) {
	if n.link == nil {
		return nil, errNoLink
	}
	status := new(Status)
	n.gateway6, n.yield = a.Gateway6, a.Yield
	n.ipv6 = a.Addr6.IsValid() && n.prepare6(status)
	if err := n.up(); err != nil {
		return nil, err
	}
	if a.Addr4.IsValid() {
		if err := n.addAddress(a.Addr4, 0); err != nil {
			return nil, err
		}
		if err := n.tuneSubnet(netlink.FAMILY_V4, a.Addr4); err != nil {
			status.Warnings = append(status.Warnings, err.Error())
		}
	}
	if a.Gateway4.IsValid() {
		if err := n.addDefault(netlink.FAMILY_V4, a.Gateway4); err != nil {
			return nil, err
		}
	}
	if !n.ipv6 {
		return status, nil
	}
	// Nobody else is on the link: detecting duplicates would cost a second in
	// which the address cannot be used.
	if err := n.addAddress(a.Addr6, unix.IFA_F_NODAD); err != nil {
		n.ipv6 = false
		status.Warnings = append(status.Warnings, "no IPv6: "+err.Error())
		return status, nil
	}
	status.IPv6 = true
	if err := n.tuneSubnet(netlink.FAMILY_V6, a.Addr6); err != nil {
		status.Warnings = append(status.Warnings, err.Error())
	}
	if a.Default6 {
		if err := n.setDefaultRoute6(true); err != nil {
			status.Warnings = append(status.Warnings, "no IPv6 default route: "+err.Error())
		}
	}
	return status, nil
}

// prepare6 readies the interface for static IPv6 before it goes up, and reports
// whether it can have any.
func (n *network) prepare6(status *Status) bool {
	if !n.speaks6(status) {
		return false
	}
	// The link-local address is unique too. Router advertisements, which go to
	// whoever asks, would add a second address and a default route that ages.
	for _, s := range []struct{ name, value string }{{"accept_dad", "0"}, {"accept_ra", "0"}} {
		if err := n.sysctl6(s.name, s.value); err != nil {
			status.Warnings = append(status.Warnings, fmt.Sprintf("cannot set %s: %v", s.name, err))
		}
	}
	return true
}

// speaks6 reports whether the interface has IPv6, and says why not.
func (n *network) speaks6(status *Status) bool {
	why := ""
	value, err := readFile(n.sysctl6Path("disable_ipv6"))
	switch {
	case n.link.Attrs().MTU < minMTU6:
		why = fmt.Sprintf("its MTU is %d, IPv6 needs %d", n.link.Attrs().MTU, minMTU6)
	case errors.Is(err, unix.ENOENT):
		why = "the kernel or the namespace has IPv6 switched off"
	case err == nil && value != "0":
		why = "net.ipv6.conf." + n.link.Attrs().Name + ".disable_ipv6 is set"
	default:
		return true
	}
	status.Warnings = append(status.Warnings, fmt.Sprintf("no IPv6 on %s: %s", n.link.Attrs().Name, why))
	return false
}

func (n *network) sysctl6Path(name string) string {
	return "ipv6/conf/" + n.link.Attrs().Name + "/" + name
}

func (n *network) sysctl6(name, value string) error {
	return writeFile(n.sysctl6Path(name), value)
}

// readFile reads a short file of one line. Like writeFile it goes without
// package os, whose files would start the runtime's poller for nothing.
func readFile(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var b [64]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b[:n])), nil
}

func writeFile(path, value string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(value))
	return err
}

// setUp is all that --configure=none does: programs inside do the rest, by
// DHCP and by what the kernel makes of router advertisements.
func (n *network) setUp() (*Status, error) {
	if n.link == nil {
		return nil, errNoLink
	}
	status := new(Status)
	status.IPv6 = n.speaks6(status)
	return status, n.up()
}

// up sets the loopback interface and the link up.
func (n *network) up() error {
	lo, err := n.handle.LinkByName("lo")
	if err == nil {
		err = n.handle.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	if err := n.handle.LinkSetUp(n.link); err != nil {
		return fmt.Errorf("set %s up: %w", n.link.Attrs().Name, err)
	}
	return n.awaitCarrier()
}

// awaitCarrier waits until the kernel sends through the interface. A TAP does at
// once, but the kernel tells a veth pair of its carrier by a work queue, and
// drops what is sent before.
func (n *network) awaitCarrier() error {
	if n.link.Type() != "veth" {
		return nil
	}
	for deadline := time.Now().Add(carrierTimeout); ; time.Sleep(time.Millisecond) {
		l, err := n.handle.LinkByIndex(n.link.Attrs().Index)
		if err != nil {
			return fmt.Errorf("see whether %s is up: %w", n.link.Attrs().Name, err)
		}
		if l.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s does not come up", n.link.Attrs().Name)
		}
	}
}

func (n *network) addAddress(p netip.Prefix, flags int) error {
	addr := &netlink.Addr{IPNet: ipNet(p), Flags: flags}
	if err := n.handle.AddrReplace(n.link, addr); err != nil {
		return fmt.Errorf("add address %v to %s: %w", p, n.link.Attrs().Name, err)
	}
	return nil
}

// tuneSubnet has connections to the gateway use the link's congestion control,
// by the route that the kernel has made for the subnet. They end in usernet,
// whatever lies behind it.
func (n *network) tuneSubnet(family int, p netip.Prefix) error {
	if n.congestion == "" {
		return nil
	}
	r := &netlink.Route{
		LinkIndex: n.link.Attrs().Index, Family: family, Protocol: unix.RTPROT_KERNEL,
		Dst: ipNet(p.Masked()), Congctl: n.congestion,
	}
	if family == netlink.FAMILY_V4 {
		r.Scope, r.Src = netlink.SCOPE_LINK, net.IP(p.Addr().AsSlice())
	} else {
		r.Priority = metric6
	}
	if err := n.handle.RouteReplace(r); err != nil {
		return fmt.Errorf("set congestion control of the route to %v: %w", p.Masked(), err)
	}
	return nil
}

// metric6 is what the kernel gives the route of an address's subnet
// (IP6_RT_PRIO_ADDRCONF).
const metric6 = 256

// addDefault adds a default route. Another one is not ours to replace.
func (n *network) addDefault(family int, gateway netip.Addr) error {
	if n.yield && n.otherDefault(family) {
		return nil
	}
	err := n.handle.RouteAdd(n.defaultRoute(family, gateway))
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EEXIST) {
		found, listErr := n.handle.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_DST)
		for _, r := range found {
			if listErr == nil && r.LinkIndex != n.link.Attrs().Index {
				return fmt.Errorf("the namespace has a default route already, via %v: remove it, or attach without configuring", r.Gw)
			}
		}
		if err = n.handle.RouteReplace(n.defaultRoute(family, gateway)); err == nil {
			return nil
		}
	}
	return fmt.Errorf("add default route via %v: %w", gateway, err)
}

func (n *network) defaultRoute(family int, gateway netip.Addr) *netlink.Route {
	return &netlink.Route{
		LinkIndex: n.link.Attrs().Index,
		Family:    family,
		Protocol:  unix.RTPROT_BOOT,
		Gw:        net.IP(gateway.AsSlice()),
		Congctl:   n.congestion,
	}
}

// otherDefault reports whether there is a default route by another interface.
func (n *network) otherDefault(family int) bool {
	found, err := n.handle.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_DST)
	return err == nil && slices.ContainsFunc(found, func(r netlink.Route) bool {
		return r.LinkIndex != n.link.Attrs().Index && r.Type == unix.RTN_UNICAST
	})
}

// setDefaultRoute6 sets or removes the IPv6 default route.
func (n *network) setDefaultRoute6(on bool) error {
	if n.link == nil {
		return errNoLink
	}
	if !n.ipv6 || !n.gateway6.IsValid() {
		return nil
	}
	if on {
		return n.addDefault(netlink.FAMILY_V6, n.gateway6)
	}
	r := n.defaultRoute(netlink.FAMILY_V6, n.gateway6)
	r.Congctl = ""
	err := n.handle.RouteDel(r)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove default route via %v: %w", n.gateway6, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{
		IP:   net.IP(p.Addr().AsSlice()),
		Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
	}
}

// look reads what an interface is like.
func (n *network) look(name string) (*View, error) {
	l, err := n.handle.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, fmt.Errorf("find %s: %w", name, unix.ENODEV)
	}
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	at := l.Attrs()
	v := &View{Up: at.Flags&net.FlagUp != 0, MAC: at.HardwareAddr, MTU: at.MTU}
	addrs, err := n.handle.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", name, err)
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		bits, _ := a.Mask.Size()
		if ip = ip.Unmap(); ip.IsValid() && !ip.IsLinkLocalUnicast() {
			v.Addrs = append(v.Addrs, netip.PrefixFrom(ip, bits))
		}
	}
	for family, gateway := range map[int]*netip.Addr{netlink.FAMILY_V4: &v.Gateway4, netlink.FAMILY_V6: &v.Gateway6} {
		routes, err := n.handle.RouteList(l, family)
		if err != nil {
			return nil, fmt.Errorf("list routes by %s: %w", name, err)
		}
		for _, r := range routes {
			if r.Dst != nil && !r.Dst.IP.IsUnspecified() || r.Gw == nil {
				continue
			}
			ip, _ := netip.AddrFromSlice(r.Gw)
			*gateway = ip.Unmap()
		}
	}
	return v, nil
}
