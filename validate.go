package usernet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unicode"
)

func (c Config) checkTarget() error {
	var given []string
	if c.NetnsPath != "" {
		given = append(given, "a path")
	}
	if c.PID != 0 {
		given = append(given, "a process")
	}
	if c.TapFile != nil {
		given = append(given, "an open TAP")
	}
	switch {
	case len(given) == 0:
		return badConfig("choose namespace: none given: give its path, a process in it, or an open TAP")
	case len(given) > 1:
		return badConfig("choose namespace: both %s given: give one of them", strings.Join(given, " and "))
	case c.PID < 0:
		return badConfig("choose namespace of process %d: a process id is a positive number", c.PID)
	case strings.ContainsRune(c.NetnsPath, 0):
		return badConfig("choose namespace %q: a path has no zero byte", c.NetnsPath)
	}
	return nil
}

func (c Config) checkKinds() error {
	if err := oneOf("kind of link", c.Link, LinkAuto, LinkTAP, LinkVeth); err != nil {
		return err
	}
	if err := oneOf("mode of IPv6", c.IPv6, IPv6Auto, IPv6On, IPv6Off); err != nil {
		return err
	}
	if err := oneOf("way of configuration", c.Configure, ConfigureStatic, ConfigureNone, ConfigureKeep); err != nil {
		return err
	}
	switch {
	case c.TapFile != nil && c.Link == LinkVeth:
		return badConfig("choose kind of link: an open TAP is no veth pair: leave the kind out")
	case c.TapFile != nil && c.Configure == ConfigureStatic:
		return badConfig("choose way of configuration: the namespace of an open TAP is out of reach: configure it inside, by DHCP or by hand")
	}
	return nil
}

func oneOf[T ~string](noun string, got T, choices ...T) error {
	if slices.Contains(choices, got) {
		return nil
	}
	names := make([]string, len(choices))
	for i, c := range choices {
		names[i] = string(c)
	}
	return badConfig("choose %s %q: there are %s", noun, string(got), listOr(names))
}

// listOr joins words as in "one, two and three".
func listOr(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " and " + words[last]
}

func (c Config) checkInterface() error {
	if err := checkIfname(c.Ifname); err != nil {
		return err
	}
	if c.Ifname == "lo" {
		return badConfig("name interface %q: every namespace has one of that name: choose another", c.Ifname)
	}
	least, most := MinMTU, MaxMTU
	if c.NoGuard {
		least, most = minMTU4, maxMTUTap
	}
	if c.MTU < least || c.MTU > most {
		return badConfig("set MTU %d: choose one from %d to %d", c.MTU, least, most)
	}
	if c.IPv6 == IPv6On && c.MTU < minMTU6 {
		return badConfig("set MTU %d: IPv6 needs %d or more: raise it, or switch IPv6 off", c.MTU, minMTU6)
	}
	if c.MAC == nil {
		return nil
	}
	switch {
	case len(c.MAC) != 6:
		return badConfig("set MAC %v: an Ethernet address has 6 bytes", c.MAC)
	case c.MAC[0]&1 != 0:
		return badConfig("set MAC %v: it is a group's address, not an interface's: make the first byte even, such as 02", c.MAC)
	case !slices.ContainsFunc(c.MAC, func(b byte) bool { return b != 0 }):
		return badConfig("set MAC %v: all zero is no address: choose one such as 02:00:00:00:00:01", c.MAC)
	}
	return nil
}

// maxIfname is the longest name of an interface (IFNAMSIZ less the final zero).
const maxIfname = 15

// checkIfname applies the kernel's rules (dev_valid_name in net/core/dev.c).
func checkIfname(name string) error {
	switch {
	case len(name) > maxIfname:
		return badConfig("name interface %q: %d bytes are too long: the kernel takes %d", name, len(name), maxIfname)
	case name == "" || name == "." || name == "..":
		return badConfig("name interface %q: the kernel does not take that name: choose one such as %s", name, DefaultIfname)
	case strings.ContainsAny(name, "/:%") || strings.ContainsFunc(name, func(r rune) bool {
		// % would have the kernel number the interfaces.
		return unicode.IsSpace(r) || unicode.IsControl(r)
	}):
		return badConfig("name interface %q: the kernel takes no space, slash, colon or percent sign in a name", name)
	}
	return nil
}

// Subnets that a guest may have without hiding a part of the internet from it:
// private ones (RFC 1918, RFC 6598, RFC 4193) and those for tests and examples
// (RFC 2544, RFC 5737, RFC 3849).
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("fc00::/7"),
	netip.MustParsePrefix("2001:db8::/32"),
}

func (c Config) checkSubnets() error {
	switch p := c.CIDR; {
	case c.Network != "" && p == netip.Prefix{}:
	case !p.Addr().Is4():
		return badConfig("use subnet %v: it is not one of IPv4: choose one such as %v", p, DefaultCIDR)
	case p.Bits() > maxBits4:
		return badConfig("use subnet %v: too small for gateway, DNS, leases and the guest's .%d: choose a /%d or larger", p, guestHost, maxBits4)
	}
	switch p := c.CIDR6; {
	case c.Network != "" && p == netip.Prefix{}:
	case !p.Addr().Is6() || p.Addr().Is4In6():
		return badConfig("use subnet %v: it is not one of IPv6: choose one such as %v", p, DefaultCIDR6)
	case p.Bits() != bits6:
		return badConfig("use subnet %v: guests make their own addresses in a /%d only: choose one such as %v", p, bits6, DefaultCIDR6)
	}
	for _, p := range []netip.Prefix{c.CIDR, c.CIDR6} {
		if p != p.Masked() {
			return badConfig("use subnet %v: the address has bits beyond /%d: write %v", p, p.Bits(), p.Masked())
		}
		if c.NoGuard || !p.IsValid() {
			continue
		}
		if err := checkPrivate(p); err != nil {
			return err
		}
	}
	return nil
}

func checkPrivate(p netip.Prefix) error {
	for _, q := range private {
		if q.Bits() <= p.Bits() && q.Contains(p.Addr()) {
			return nil
		}
	}
	what := "addresses of the internet, which the guest could not reach then"
	if a := p.Addr(); a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		what = "addresses with a meaning of their own"
	}
	example := DefaultCIDR
	if p.Addr().Is6() {
		example = DefaultCIDR6
	}
	return badConfig("use subnet %v: it overlaps %s: choose a private one such as %v", p, what, example)
}

// checkGuest checks the guest's addresses, if they are not the usual ones.
func (c Config) checkGuest() error {
	a := c.Addresses()
	for _, g := range []struct {
		addr   netip.Addr
		subnet netip.Prefix
		others []netip.Addr
	}{
		{c.Guest4, c.CIDR, []netip.Addr{a.Gateway4, a.DNS4}},
		{c.Guest6, c.CIDR6, []netip.Addr{a.Gateway6, a.DNS6}},
	} {
		switch {
		case !g.addr.IsValid():
		case c.Network != "" && (!g.subnet.IsValid() || c.Configure == ConfigureNone):
			// The network's hub knows better, and its DHCP server gives what it says.
		case c.Configure == ConfigureNone:
			return badConfig("give guest the address %v: a DHCP client inside finds its own: leave out the one or the other", g.addr)
		case g.addr.Is6() && !c.hasIPv6():
			return badConfig("give guest the address %v: there is no IPv6: switch it on, with an MTU of %d or more", g.addr, minMTU6)
		case !g.subnet.Contains(g.addr):
			return badConfig("give guest the address %v: it is not in its subnet %v: choose one there", g.addr, g.subnet)
		case g.addr == g.subnet.Addr() || g.addr.Is4() && g.addr == lastAddr(g.subnet):
			return badConfig("give guest the address %v: it is that of the subnet %v itself: choose another", g.addr, g.subnet)
		case slices.Contains(g.others, g.addr):
			return badConfig("give guest the address %v: the gateway or its DNS server has it: choose another", g.addr)
		case g.addr.Is4() && a.PoolStart.Compare(g.addr) <= 0 && g.addr.Compare(a.PoolEnd) <= 0:
			return badConfig("give guest the address %v: DHCP leases those from %v to %v: choose another", g.addr, a.PoolStart, a.PoolEnd)
		}
	}
	return nil
}

// lastAddr returns the broadcast address of an IPv4 subnet.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])|^uint32(0)>>p.Bits())
	return netip.AddrFrom4(b)
}

func (c Config) checkNames() error {
	if c.NoDNS {
		switch {
		case len(c.DNS) > 0:
			return badConfig("switch DNS off: there are resolvers to ask, %v for one: drop the one or the other", c.DNS[0])
		case len(c.DNSSearch) > 0:
			return badConfig("switch DNS off: there are domains to search, %s for one: drop the one or the other", c.DNSSearch[0])
		case len(c.AddHosts) > 0:
			return badConfig("switch DNS off: there are names to answer, %s for one: drop the one or the other", c.AddHosts[0].Name)
		case len(c.AllowNames) > 0:
			return badConfig("switch DNS off: there are names to allow, %s for one, whose addresses nobody could learn: drop the one or the other", c.AllowNames[0].Name)
		}
	}
	for _, d := range c.DNS {
		if err := checkResolver(d.Addr()); err != nil {
			return err
		}
	}
	for _, d := range c.DNSSearch {
		if !isDomain(d) {
			return badConfig("search domain %q: not a domain name: write one such as example.com", d)
		}
	}
	for _, h := range c.AddHosts {
		if err := h.check(); err != nil {
			return err
		}
	}
	return nil
}

func (c Config) checkHostSide() error {
	if slices.Contains(c.HostPorts, 0) {
		return badConfig("open host port 0: a port is a number from 1 to 65535")
	}
	if err := c.checkReverse(); err != nil {
		return err
	}
	for _, o := range []struct {
		addr   netip.Addr
		fits   bool
		family string
	}{
		{c.OutboundAddr, c.OutboundAddr.Is4(), "IPv4"},
		{c.OutboundAddr6, c.OutboundAddr6.Is6() && !c.OutboundAddr6.Is4In6(), "IPv6"},
	} {
		switch {
		case !o.addr.IsValid():
		case !o.fits:
			return badConfig("send from %v: not an address of %s: choose one of this host's", o.addr, o.family)
		case o.addr.IsUnspecified() || o.addr.IsMulticast():
			return badConfig("send from %v: no interface can have that address: choose one of this host's", o.addr)
		}
	}
	if c.OutboundInterface != "" {
		if err := checkIfname(c.OutboundInterface); err != nil {
			return err
		}
	}
	return nil
}

func (c Config) checkRules() error {
	for _, rules := range [][]Rule{c.Deny, c.Allow} {
		for _, r := range rules {
			if why := r.flaw(); why != "" {
				return badConfig("apply rule %v: %s", r, why)
			}
		}
	}
	for _, r := range c.AllowNames {
		if why := r.flaw(); why != "" {
			return badConfig("allow name %v: %s", r, why)
		}
	}
	return nil
}

func checkResolver(a netip.Addr) error {
	switch {
	case !a.IsValid():
		return badConfig("ask DNS server: no address given")
	case a.IsUnspecified():
		return badConfig("ask DNS server %v: nobody has that address: one on this host is 127.0.0.1 or ::1", a)
	case a.IsMulticast():
		return badConfig("ask DNS server %v: it is a group's address: give that of one server", a)
	}
	return nil
}

func (h Host) check() error {
	switch a := h.Addr; {
	case !isDomain(h.Name):
		return badConfig("add host %q: not a host name: letters, digits, hyphens and dots make one", h.Name)
	case !a.IsValid():
		return badConfig("add host %s: no address given", h.Name)
	case a.Zone() != "":
		return badConfig("add host %s: address %v has a zone, which means nothing to the guest: drop it", h.Name, a)
	}
	return nil
}

// isDomain reports whether s is a domain name as hosts have them: RFC 1123
// section 2.1, and the underscore that is met in practice.
func isDomain(s string) bool {
	const maxName, maxLabel = 253, 63 // RFC 1035 section 2.3.4
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > maxName {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > maxLabel || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, b := range []byte(label) {
			switch {
			case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z', '0' <= b && b <= '9', b == '-', b == '_':
			default:
				return false
			}
		}
	}
	return true
}

// ParseHost parses NAME:ADDRESS; an IPv6 address may be in brackets.
func ParseHost(s string) (Host, error) {
	name, addr, ok := strings.Cut(s, ":")
	if !ok || name == "" || addr == "" {
		return Host{}, badConfig("add host %q: not of the form NAME:ADDRESS", s)
	}
	a, err := netip.ParseAddr(unbracket(addr))
	if err != nil {
		return Host{}, badConfig("add host %q: %q is not an IP address", s, addr)
	}
	h := Host{Name: name, Addr: a.Unmap()}
	return h, h.check()
}

// unbracket returns what is in the brackets of s, or s without a pair of them.
func unbracket(s string) string {
	if len(s) > 1 && s[0] == '[' && s[len(s)-1] == ']' {
		return s[1 : len(s)-1]
	}
	return s
}

// ParseResolver parses ADDRESS or ADDRESS:PORT; an IPv6 address with a port is
// in brackets.
func ParseResolver(s string) (netip.AddrPort, error) {
	const port = 53
	p, err := netip.ParseAddrPort(s)
	if err != nil {
		a, err := netip.ParseAddr(unbracket(s))
		if err != nil {
			return netip.AddrPort{}, badConfig("ask DNS server %q: not of the form ADDRESS[:PORT], such as 192.0.2.53 or [2001:db8::53]:5353; a name will not do", s)
		}
		p = netip.AddrPortFrom(a, port)
	}
	if p.Port() == 0 {
		return netip.AddrPort{}, badConfig("ask DNS server %q: a port is a number from 1 to 65535", s)
	}
	p = netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	return p, checkResolver(p.Addr())
}

// String returns the host as ParseHost takes it.
func (h Host) String() string { return fmt.Sprintf("%s:%v", h.Name, h.Addr) }
