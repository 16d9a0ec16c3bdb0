package usernet

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
)

// Limits of an interface's MTU. IPv4 asks every host to take 576 bytes (RFC 791
// section 3.1). The largest MTU leaves the Ethernet header room in a frame of
// 64 KiB, and is a multiple of 16.
const (
	MinMTU     = 576
	MaxMTU     = 65520
	DefaultMTU = MaxMTU

	minMTU6 = 1280 // RFC 8200 section 5

	minMTU4   = 68    // RFC 791 section 3.2, the least that IPv4 works with
	maxMTUTap = 65521 // the most that the kernel lets a TAP have
)

// DefaultIfname is the name of the interface inside.
const DefaultIfname = "tap0"

// The guest's subnets where a Config names none.
var (
	DefaultCIDR  = netip.MustParsePrefix("10.0.2.0/24")
	DefaultCIDR6 = netip.MustParsePrefix("fd75:736e:6574::/64")
)

// A LinkKind is the kind of device that the guest gets.
type LinkKind string

// Kinds of link. The zero value is LinkAuto.
const (
	LinkAuto LinkKind = "auto" // a TAP, or a veth pair where there are no TAPs
	LinkTAP  LinkKind = "tap"  // a TAP, which needs /dev/net/tun
	LinkVeth LinkKind = "veth" // a veth pair, with a packet socket at its far end
)

// An IPv6Mode says when a guest has IPv6.
type IPv6Mode string

// Modes of IPv6. The zero value is IPv6Auto.
const (
	IPv6Auto IPv6Mode = "auto" // addresses always, a default route while the host has one
	IPv6On   IPv6Mode = "on"   // addresses and a default route, always
	IPv6Off  IPv6Mode = "off"  // none
)

// A Configure says who gives the guest's interface its addresses.
type Configure string

// Ways of configuration. The zero value is ConfigureStatic, or ConfigureNone
// with a TapFile, whose namespace is out of reach.
const (
	ConfigureStatic Configure = "static" // usernet, before it is ready
	ConfigureNone   Configure = "none"   // a DHCP client inside
	ConfigureKeep   Configure = "keep"   // whoever made the interface, which is left as it is, even down
)

// A Config says what network to give to which namespace. Exactly one of
// NetnsPath, PID and TapFile is required.
type Config struct {
	// NetnsPath is the network namespace's path: /proc/PID/ns/net, a bind
	// mount, or (without a slash) a name made by `ip netns add`.
	NetnsPath string
	// PID is a process in the namespace.
	PID int
	// TapFile is an open TAP (IFF_TAP and IFF_NO_PI) whose other end is the
	// guest's, or a socket of SOCK_SEQPACKET whose packets are frames. New takes it over, and sets IFF_VNET_HDR where that is allowed.
	TapFile *os.File

	Link      LinkKind
	Ifname    string           // default tap0
	MTU       int              // default 65520; below 1280 there is no IPv6
	MAC       net.HardwareAddr // the guest's; default: random, locally administered
	NoOffload bool             // no super-frames, no checksums left to the other end
	// NoHandover keeps all TCP connections on the interface. Otherwise those that
	// carry much leave it: the guest's kernel makes a socket in its namespace
	// their far end, which the worker joins to that of the host.
	NoHandover bool

	CIDR      netip.Prefix // default 10.0.2.0/24
	CIDR6     netip.Prefix // default fd75:736e:6574::/64
	IPv6      IPv6Mode
	Configure Configure

	// Guest4 and Guest6 are the guest's addresses in the subnets; default .100
	// and ::100.
	Guest4, Guest6 netip.Addr

	// Network is the name of a network that the guest shares with others of this
	// user: one subnet, one gateway, and a switch between them. The first starts
	// it with its settings, the last ends it. Subnets that are the zero value are
	// the network's then, of which each has its own. Ports are published for this
	// guest alone.
	Network string
	// Name and Aliases are what the others find the guest by on Network. Two
	// guests may have an alias in common, but not a name.
	Name    string
	Aliases []string
	// Isolate keeps the guest apart from the others on Network.
	Isolate bool
	// AnySource lets the guest use MACs and addresses on Network that are not its
	// own, such as those of guests of its own behind a bridge.
	AnySource bool
	// NoDefaultRoute leaves out default routes. On Network they are left out where
	// there are others already.
	NoDefaultRoute bool

	// DNS are the resolvers to ask, port 0 meaning 53. If there are none, those
	// of ResolvConf are asked, as they change.
	DNS        []netip.AddrPort
	DNSSearch  []string // default: those of ResolvConf
	AddHosts   []Host   // further names that the guest can look up
	NoDNS      bool     // serve no DNS at all
	ResolvConf string   // default /etc/resolv.conf

	// SLAAC leaves IPv6 addresses and routes to the guest's kernel, which makes
	// them of router advertisements, whatever Configure says.
	SLAAC bool

	// HostLoopback opens the host's loopback, and the host's own addresses, to
	// the guest; it finds the host at the gateway's address. HostPorts opens
	// these ports only. By default the host is closed.
	HostLoopback bool
	HostPorts    []uint16
	Reverse      []Reverse // servers of the host at ports of the gateway

	// Deny rules go before Allow rules. Once there is an Allow rule, or one of
	// AllowNames, what none of them names is denied. Link-local addresses, and
	// those where clouds serve credentials, are denied unless an Allow rule
	// that is at least as narrow names them.
	Allow, Deny []Rule
	// AllowNames allow the addresses that the guest gets from the DNS server
	// for a name: for the time to live of the answer, but at least a minute and
	// at most a day. 4096 addresses are remembered. The host's resolvers are
	// asked even if no Allow rule names them.
	AllowNames []NameRule
	// NoPrivateDNS keeps answers of the host's resolvers that hold a private,
	// loopback or link-local address from the guest, which gets an answer with
	// no records instead. AddHosts are not concerned.
	NoPrivateDNS bool
	// NoGuard opens what is closed without a rule, but for the loopback: link-local
	// addresses, those where clouds serve credentials, and the host's own. It
	// also lets the subnets be any, and the MTU what a TAP can have, and has the
	// guest told that a network that it may not reach cannot be reached. NoDNS
	// is silence then, no refusal, OutboundAddr holds for the host's
	// loopback, too, and IPv4 multicast is sent.
	NoGuard bool

	OutboundAddr      netip.Addr // source of IPv4 host sockets
	OutboundAddr6     netip.Addr // source of IPv6 host sockets
	OutboundInterface string     // interface of host sockets

	// Publish are ports of the guest that the host listens on before the
	// network is ready.
	Publish []Forward
	// PublishAuto publishes what listens inside, as long as it does. It needs
	// the namespace, so a TapFile will not do.
	PublishAuto *AutoPublish

	// Capture, if not nil, is written every frame of the guest's link, as pcapng,
	// as far as it keeps up: see Network.Capture.
	Capture io.Writer

	// NoSandbox leaves the process that faces the guest all rights of this one,
	// for debugging.
	NoSandbox bool

	// Cleanup are files to remove in case this process is killed. They exist.
	Cleanup []string

	Logger *slog.Logger // default: discard
}

// A Host is a name that the guest can look up.
type Host struct {
	Name string
	Addr netip.Addr
}

// Addresses are the addresses in the guest's subnets. Those of IPv6 are the zero
// value where there is no IPv6.
type Addresses struct {
	Prefix4            netip.Prefix
	Gateway4           netip.Addr // the host, as the guest knows it
	DNS4               netip.Addr
	Guest4             netip.Addr // where usernet configures the guest
	PoolStart, PoolEnd netip.Addr // what DHCPv4 leases

	Prefix6  netip.Prefix
	Gateway6 netip.Addr
	DNS6     netip.Addr
	Guest6   netip.Addr
}

// Places of the addresses in a subnet: .2, .3 and so on, ::2, ::3, ::100.
const (
	gatewayHost   = 2
	dnsHost       = 3
	poolStartHost = 15
	poolEndHost   = 30
	guestHost     = 100
	guestHost6    = 0x100

	// maxBits4 is the smallest subnet that has a .100.
	maxBits4 = 25
	// bits6 is the only size in which hosts can make addresses of their own
	// (RFC 4862 section 5.5.3, RFC 4291 section 2.5.1).
	bits6 = 64
)

// Addresses returns the addresses that c gives to gateway, DNS server and guest.
// Of a Network whose subnets are not set there are none.
func (c Config) Addresses() Addresses {
	c = c.withDefaults()
	var a Addresses
	if c.CIDR.IsValid() {
		a = Addresses{
			Prefix4:   c.CIDR,
			Gateway4:  addrIn(c.CIDR, gatewayHost),
			DNS4:      addrIn(c.CIDR, dnsHost),
			Guest4:    c.Guest4,
			PoolStart: addrIn(c.CIDR, poolStartHost),
			PoolEnd:   addrIn(c.CIDR, poolEndHost),
		}
		setDefault(&a.Guest4, addrIn(c.CIDR, guestHost))
	}
	if c.hasIPv6() && c.CIDR6.IsValid() {
		a.Prefix6 = c.CIDR6
		a.Gateway6 = addrIn(c.CIDR6, gatewayHost)
		a.DNS6 = addrIn(c.CIDR6, dnsHost)
		a.Guest6 = c.Guest6
		setDefault(&a.Guest6, addrIn(c.CIDR6, guestHost6))
	}
	return a
}

// addrIn returns the address number n of a subnet with more than n addresses.
func addrIn(p netip.Prefix, n uint16) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	b[len(b)-1] |= byte(n)
	b[len(b)-2] |= byte(n >> 8)
	a, _ := netip.AddrFromSlice(b)
	return a
}

// hasIPv6 reports whether the guest has IPv6. The receiver has its defaults.
func (c Config) hasIPv6() bool { return c.IPv6 != IPv6Off && c.MTU >= minMTU6 }

// withDefaults returns c with every default written in.
func (c Config) withDefaults() Config {
	setDefault(&c.Link, LinkAuto)
	setDefault(&c.Ifname, DefaultIfname)
	setDefault(&c.MTU, DefaultMTU)
	if c.Network == "" {
		setDefault(&c.CIDR, DefaultCIDR)
		setDefault(&c.CIDR6, DefaultCIDR6)
	}
	setDefault(&c.IPv6, IPv6Auto)
	setDefault(&c.ResolvConf, "/etc/resolv.conf")
	if c.TapFile != nil {
		setDefault(&c.Configure, ConfigureNone)
	}
	setDefault(&c.Configure, ConfigureStatic)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Warnings tells of settings that c has no effect with or that work otherwise
// than one may expect.
func (c Config) Warnings() []string {
	c = c.withDefaults()
	var w []string
	if c.MTU < minMTU6 && c.IPv6 != IPv6Off {
		w = append(w, fmt.Sprintf("no IPv6: it needs an MTU of %d, this one is %d", minMTU6, c.MTU))
	}
	if len(c.Allow)+len(c.AllowNames) > 0 {
		for _, r := range c.Deny {
			if r.Prefix.Bits() == 0 && r.allPorts() && r.Protocol == AnyProtocol {
				w = append(w, fmt.Sprintf("deny %v closes all of it, whatever is allowed: leave it out, for what no allow rule names is closed anyway", r))
			}
		}
	}
	return w
}

// records are the names that the DNS server answers by itself.
func (c Config) records() map[string][]netip.Addr {
	a := c.Addresses()
	gateway := []netip.Addr{a.Gateway4}
	if a.Gateway6.IsValid() {
		gateway = append(gateway, a.Gateway6)
	}
	builtin := map[string][]netip.Addr{
		"host.usernet.internal":    gateway,
		"host.containers.internal": gateway,
		"host.docker.internal":     gateway,
		"gateway.usernet.internal": gateway,
	}
	own := make(map[string][]netip.Addr)
	for _, h := range c.AddHosts {
		name := strings.ToLower(strings.TrimSuffix(h.Name, "."))
		own[name] = append(own[name], h.Addr)
	}
	for name, addrs := range builtin {
		if _, ok := own[name]; !ok {
			own[name] = addrs
		}
	}
	return own
}

// ErrConfig is what errors.Is finds in the errors about a Config itself, as
// opposed to those about the system it meets.
var ErrConfig = errors.New("usernet: bad configuration")

// A configError says what is wrong with a setting and what to do about it.
type configError struct{ text string }

func (e *configError) Error() string        { return "usernet: " + e.text }
func (e *configError) Is(target error) bool { return target == ErrConfig }

func badConfig(format string, args ...any) error {
	return &configError{fmt.Sprintf(format, args...)}
}

// Validate checks what can be checked without looking at the system. Its errors
// say what to do, and errors.Is(err, ErrConfig) holds for them.
func (c Config) Validate() error {
	c = c.withDefaults()
	for _, check := range []func() error{
		c.checkTarget, c.checkKinds, c.checkInterface, c.checkNetwork, c.checkSubnets, c.checkGuest, c.checkNames, c.checkHostSide, c.checkRules, c.checkPublish, c.checkPublishAuto,
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}
