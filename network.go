package usernet

import (
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
)

// networkDomain is what the names of members end in, behind that of their network.
const networkDomain = "usernet.internal"

// Limits of what a member can be called.
const (
	maxNetworkName = 63
	maxMemberName  = 63
	maxAliases     = 32
)

// checkNetwork checks what c says of a shared network.
func (c Config) checkNetwork() error {
	if c.Network == "" {
		switch {
		case c.Name != "":
			return badConfig("name the guest %q: only on a shared network does a guest have a name: name that too", c.Name)
		case len(c.Aliases) > 0:
			return badConfig("use alias %q: only on a shared network does a guest have aliases: name that too", c.Aliases[0])
		case c.Isolate, c.AnySource:
			return badConfig("isolate the guest, or trust it: that is about the others on a shared network: name that too")
		}
		return nil
	}
	if err := CheckNetworkName(c.Network); err != nil {
		return err
	}
	if c.Name != "" {
		if why := nameFlaw(c.Name, maxMemberName); why != "" || strings.Contains(c.Name, ".") {
			return badConfig("name the guest %q: not a name such as web: lower-case letters, digits, hyphens and underscores make one, at most %d", c.Name, maxMemberName)
		}
	}
	if len(c.Aliases) > maxAliases {
		return badConfig("use %d aliases: %d are the most", len(c.Aliases), maxAliases)
	}
	for i, a := range c.Aliases {
		switch {
		case nameFlaw(a, 253) != "":
			return badConfig("use alias %q: not a name such as web or db.example: lower-case letters, digits, hyphens, underscores and dots make one", a)
		case a == c.Name || slices.Contains(c.Aliases[:i], a):
			return badConfig("use alias %q: the guest has that name already: leave it out", a)
		}
	}
	switch {
	case c.NoGuard || c.Configure == ConfigureKeep:
		return badConfig("join network %s: settings of slirp4netns do not go with it", c.Network)
	case c.NoDNS && (c.Name != "" || len(c.Aliases) > 0):
		return badConfig("name the guest %q: without DNS nobody can look that up: drop the one or the other", slices.Concat([]string{c.Name}, c.Aliases)[0])
	}
	return nil
}

// CheckNetworkName checks the name of a shared network.
func CheckNetworkName(name string) error {
	if why := nameFlaw(name, maxNetworkName); why != "" {
		return badConfig("join network %q: %s", name, why)
	}
	return nil
}

// nameFlaw says what is wrong with a name in DNS that is written in lower case.
func nameFlaw(name string, longest int) string {
	switch {
	case name == "":
		return "a network has a name: is a variable of the shell not set?"
	case len(name) > longest:
		return fmt.Sprintf("%d bytes are too long: %d are the most", len(name), longest)
	case name != strings.ToLower(name):
		return "write it in lower case: names in DNS do not tell capital letters apart"
	case !isDomain(name) || strings.HasSuffix(name, "."):
		return "not a name such as web: letters, digits, hyphens, underscores and dots make one"
	}
	return ""
}

// zones are the domains that hold nothing but what c and the members are called.
func (c Config) zones() []string {
	if c.Network == "" {
		return nil
	}
	zones := []string{networkDomain}
	a := c.Addresses()
	for _, p := range []netip.Prefix{a.Prefix4, a.Prefix6} {
		if p.IsValid() {
			zones = append(zones, reverseZones(p)...)
		}
	}
	return zones
}

// reverseZones returns the domains of the addresses in a subnet: several where it
// ends within a label.
func reverseZones(p netip.Prefix) []string {
	step, format, domain := 8, "%d.", "in-addr.arpa"
	if p.Addr().Is6() {
		step, format, domain = 4, "%x.", "ip6.arpa"
	}
	labels := (p.Bits() + step - 1) / step
	b := p.Masked().Addr().AsSlice()
	digit := func(i int) int {
		if step == 8 {
			return int(b[i])
		}
		return int(b[i/2]) >> (4 * (1 - i%2)) & 15
	}
	var zones []string
	for n := range 1 << (labels*step - p.Bits()) {
		name := domain
		for i := range labels {
			d := digit(i)
			if i == labels-1 {
				d |= n
			}
			name = fmt.Sprintf(format, d) + name
		}
		zones = append(zones, name)
	}
	return zones
}

// Subnets that shared networks get unless they ask for others: 256 of each
// family, so that a guest may be on several.
var (
	networks4 = netip.MustParsePrefix("10.117.0.0/16")
	networks6 = netip.MustParsePrefix("fd75:736e:6574:100::/56")
)

// chooseSubnets returns what c asks for, or what a network of its name has if it
// does not: the first pair from a place of its own on that overlaps none of taken.
func (c Config) chooseSubnets(taken []netip.Prefix) (four, six netip.Prefix, err error) {
	free := func(p netip.Prefix) bool {
		return !slices.ContainsFunc(taken, p.Overlaps)
	}
	for _, p := range []netip.Prefix{c.CIDR, c.CIDR6} {
		if p.IsValid() && !free(p) {
			i := slices.IndexFunc(taken, p.Overlaps)
			return four, six, fmt.Errorf("use subnet %v: another network of this user has %v: choose another, or leave it out", p, taken[i])
		}
	}
	h := fnv.New32a()
	h.Write([]byte(c.Network))
	start := h.Sum32()
	for i := range uint32(256) {
		n := byte(start + i)
		b4, b6 := networks4.Addr().As4(), networks6.Addr().As16()
		b4[2], b6[7] = n, n
		four, six = netip.PrefixFrom(netip.AddrFrom4(b4), 24), netip.PrefixFrom(netip.AddrFrom16(b6), 64)
		if c.CIDR.IsValid() {
			four = c.CIDR
		}
		if c.CIDR6.IsValid() {
			six = c.CIDR6
		}
		if free(four) && free(six) {
			return four, six, nil
		}
	}
	return four, six, fmt.Errorf("choose a subnet: those of %v are all in use: name one", networks4)
}
