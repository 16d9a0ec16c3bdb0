package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/usernet/usernet"
)

// A group is a part of the flags under a heading of its own in the help.
type group struct {
	title string
	flags *pflag.FlagSet
}

// networkFlags describe the network that a namespace gets.
type networkFlags struct {
	config usernet.Config
	level  string
	format string
	pcap   string

	levelVar slog.LevelVar // what level says, and what is set later
}

// settle leaves to a shared network what no flag was given for.
func (f *networkFlags) settle(cmd *cobra.Command) {
	c := &f.config
	if !cmd.Flags().Changed("network") {
		return
	}
	if !cmd.Flags().Changed("cidr") {
		c.CIDR = netip.Prefix{}
	}
	if !cmd.Flags().Changed("cidr6") {
		c.CIDR6 = netip.Prefix{}
	}
}

// groups defines the flags.
func (f *networkFlags) groups(defaultLevel string) []group {
	c := &f.config
	link, shared, names, host, egress, logs := newFlagSet(), newFlagSet(), newFlagSet(), newFlagSet(), newFlagSet(), newFlagSet()

	enum(link, &c.Link, "link", usernet.LinkAuto, []usernet.LinkKind{usernet.LinkAuto, usernet.LinkTAP, usernet.LinkVeth},
		"device inside: a TAP, or where there is no /dev/net/tun a veth pair; auto chooses")
	define(link, &c.Ifname, "ifname", "NAME", usernet.DefaultIfname, text, "name of the interface inside")
	define(link, &c.MTU, "mtu", "BYTES", usernet.DefaultMTU, number,
		fmt.Sprintf("MTU, %d to %d; below 1280 there is no IPv6", usernet.MinMTU, usernet.MaxMTU))
	define(link, &c.MAC, "mac", "MAC", nil, mac, "MAC address inside (default: random, locally administered)")
	define(link, &c.CIDR, "cidr", "CIDR", usernet.DefaultCIDR, prefix,
		"IPv4 subnet: the gateway is .2, the DNS server .3, the guest .100 or a DHCP lease from .15 to .30")
	define(link, &c.CIDR6, "cidr6", "CIDR", usernet.DefaultCIDR6, prefix,
		"IPv6 subnet, a /64: the gateway is ::2, the DNS server ::3, the guest ::100")
	link.Var(&guestAddr{c, ""}, "ip", "address of the guest in one of these subnets; repeatable, one of each family")
	enum(link, &c.IPv6, "ipv6", usernet.IPv6Auto, []usernet.IPv6Mode{usernet.IPv6Auto, usernet.IPv6On, usernet.IPv6Off},
		"IPv6: auto gives addresses always, and a default route while the host has one")
	enum(link, &c.Configure, "configure", usernet.ConfigureStatic, []usernet.Configure{usernet.ConfigureStatic, usernet.ConfigureNone},
		"who sets addresses and routes inside: static is usernet, none leaves it to a DHCP client inside")
	offload := toggle{&c.NoOffload}
	link.Var(offload, "offload", "pass packets of up to 64 KiB and leave checksums out; off is slow, and for finding faults only")
	choices(link, "offload", []string{"on", "off"})
	link.Var(toggle{&c.NoHandover}, "handover", "hand connections that carry much over to the guest's kernel, past the interface; off shows all of them to who listens there")
	choices(link, "handover", []string{"on", "off"})

	define(shared, &c.Network, "network", "NAME", "", text,
		"share this network with the other guests of this user that name it: the first starts it with its settings, the last ends it")
	define(shared, &c.Name, "name", "NAME", "", text, "what the other guests find this one by")
	list(shared, &c.Aliases, "alias", "NAME", text, "another name that they find it by; repeatable")
	shared.BoolVar(&c.Isolate, "isolate", false, "keep this guest and the others apart: it reaches the gateway and what is beyond")
	shared.BoolVar(&c.AnySource, "any-source", false,
		"let this guest use other addresses on the network than its own, for guests of its own behind a bridge")
	link.BoolVar(&c.NoDefaultRoute, "no-default-route", false, "set no default routes inside; on a shared network only where there are none")

	list(names, &c.DNS, "dns", "ADDR[:PORT]", usernet.ParseResolver,
		"ask this DNS server; repeatable (default: those of the host's resolv.conf, followed as it changes)")
	list(names, &c.DNSSearch, "dns-search", "DOMAIN", text,
		"search this domain; repeatable (default: those of the host's resolv.conf)")
	list(names, &c.AddHosts, "add-host", "NAME:ADDR", usernet.ParseHost, "answer this name with this address; repeatable")
	names.BoolVar(&c.NoDNS, "no-dns", false, "serve no DNS")

	host.VarP(&publish{&c.Publish}, "publish", "p",
		"publish a port of the guest on the host, without an address on all of its; port 0 is any free one, told on stdout; SPEC,proxy=v1 or v2 tells the server its client by the PROXY protocol; repeatable")
	host.Var(&publishAuto{&c.PublishAuto}, "publish-auto",
		"publish what begins to listen inside, at the same port of the host, until it stops; only these ports, or with ~ all but these: [ADDR:]8000-8999,~8080,5353/udp (default: all)")
	host.Lookup("publish-auto").NoOptDefVal = "all"
	host.BoolVar(&c.HostLoopback, "host-loopback", false,
		"let the guest reach the host's loopback at the gateway's address, and the host's own addresses; off by default")
	list(host, &c.HostPorts, "host-port", "PORT", port,
		"let the guest reach this port of the host only; repeatable; none by default")
	list(host, &c.Reverse, "reverse", "GUESTPORT:[ADDR:]PORT", usernet.ParseReverse,
		"let the guest reach this server of the host at GUESTPORT of the gateway; GUESTPORT:unix:/PATH is a unix socket; repeatable")
	define(host, &c.OutboundAddr, "outbound-addr", "ADDR", netip.Addr{}, address, "send IPv4 from this address of the host")
	define(host, &c.OutboundAddr6, "outbound-addr6", "ADDR", netip.Addr{}, address, "send IPv6 from this address of the host")
	define(host, &c.OutboundInterface, "outbound-if", "NAME", "", text, "send by this interface of the host")

	egress.BoolVar(&c.NoPrivateDNS, "dns-rebind-protection", false,
		"keep private, loopback and link-local addresses in answers of DNS servers from the guest")
	list(egress, &c.Allow, "allow", "RULE", usernet.ParseRule,
		"let the guest reach this, and nothing that no such rule names; repeatable; everything by default")
	list(egress, &c.AllowNames, "allow-name", "NAME", usernet.ParseNameRule,
		"let the guest reach the addresses that it is told for this name, NAME[:PORT[-END]][/tcp|udp|icmp], *.NAME for all below; repeatable")
	list(egress, &c.Deny, "deny", "RULE", usernet.ParseRule,
		"keep the guest from reaching this, whatever is allowed; repeatable")

	enum(logs, &f.level, "log-level", defaultLevel, []string{"debug", "info", "warn", "error"}, "log from this level on")
	enum(logs, &f.format, "log-format", "text", []string{"text", "json"}, "format of the log on stderr")
	define(logs, &f.pcap, "pcap", "FILE", "", text, "write all frames of the guest's link to this file, as pcapng; usernet capture is for some of them, for a while")
	logs.BoolVar(&c.NoSandbox, "no-sandbox", false, "leave the process that faces the guest its rights, for finding faults only")

	return []group{
		{"Network", link},
		{"Shared network", shared},
		{"Names", names},
		{"Host side (SPEC is [ADDR:]HOSTPORT[-END]:GUESTPORT[-END][/tcp|udp], or unix:/PATH:GUESTPORT)", host},
		{"Egress policy (RULE is CIDR[:PORT[-END]][/tcp|udp|icmp], IPv6 with ports as [CIDR]:PORT)", egress},
		{"Log and debugging", logs},
	}
}

func newFlagSet() *pflag.FlagSet {
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.SortFlags = false
	return f
}

// addGroups gives a command its flags, and remembers them for its help.
func addGroups(cmd *cobra.Command, groups []group) {
	for _, g := range groups {
		cmd.Flags().AddFlagSet(g.flags)
		g.flags.VisitAll(func(f *pflag.Flag) {
			if words := f.Annotations[choicesKey]; words != nil {
				_ = cmd.RegisterFlagCompletionFunc(f.Name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
			}
		})
	}
	cmd.SetHelpFunc(func(c *cobra.Command, _ []string) {
		if c != cmd { // one below, which has no flags of its own
			printHelp(c, nil)
			return
		}
		printHelp(cmd, groups)
	})
}

// choicesKey annotates a flag with the words that a shell may complete.
const choicesKey = "usernet_choices"

func choices(f *pflag.FlagSet, name string, words []string) {
	_ = f.SetAnnotation(name, choicesKey, words)
}

// A value is a flag with one value of any type.
type value[T any] struct {
	to    *T
	kind  string
	parse func(string) (T, error)
	text  string
}

// define defines a flag whose value is parsed once, here.
func define[T any](f *pflag.FlagSet, to *T, name, kind string, otherwise T, parse func(string) (T, error), usage string) {
	v := &value[T]{to, kind, parse, ""}
	if v.text = fmt.Sprint(otherwise); v.text == "invalid IP" {
		v.text = ""
	}
	*to = otherwise
	f.Var(v, name, usage)
}

func (v *value[T]) Set(s string) error {
	t, err := v.parse(s)
	if err == nil {
		*v.to, v.text = t, s
	}
	return err
}

func (v *value[T]) String() string { return v.text }
func (v *value[T]) Type() string   { return v.kind }

// enum defines a flag with a few words as values.
func enum[T ~string](f *pflag.FlagSet, to *T, name string, otherwise T, values []T, usage string) {
	words := make([]string, len(values))
	for i, v := range values {
		words[i] = string(v)
	}
	define(f, to, name, strings.Join(words, "|"), otherwise, func(s string) (T, error) {
		if !slices.Contains(words, s) {
			return "", fmt.Errorf("choose one of %s", strings.Join(words, ", "))
		}
		return T(s), nil
	}, usage)
	choices(f, name, words)
}

// A values is a flag that may be repeated, or have several values with commas
// in between.
type values[T any] struct {
	to    *[]T
	kind  string
	parse func(string) (T, error)
}

func list[T any](f *pflag.FlagSet, to *[]T, name, kind string, parse func(string) (T, error), usage string) {
	f.Var(&values[T]{to, kind, parse}, name, usage)
}

func (v *values[T]) Set(s string) error {
	for word := range strings.SplitSeq(s, ",") {
		t, err := v.parse(strings.TrimSpace(word))
		if err != nil {
			return err
		}
		*v.to = append(*v.to, t)
	}
	return nil
}

func (v *values[T]) String() string { return "" }
func (v *values[T]) Type() string   { return v.kind }

// publish is the flag for ports to publish. A unix socket may have a comma in
// its path, so each has a flag of its own.
type publish struct{ to *[]usernet.Forward }

func (p *publish) Set(s string) error {
	fs, err := usernet.ParseForward(s)
	*p.to = append(*p.to, fs...)
	return err
}

func (p *publish) String() string { return "" }
func (p *publish) Type() string   { return "SPEC" }

// publishAuto is the flag for ports to publish as they begin to listen.
type publishAuto struct{ to **usernet.AutoPublish }

func (p *publishAuto) Set(s string) (err error) {
	*p.to, err = usernet.ParseAutoPublish(s)
	return err
}

func (p *publishAuto) String() string { return "" }
func (p *publishAuto) Type() string   { return "PORTS" }

// guestAddr is the flag for the guest's address of either family.
type guestAddr struct {
	to   *usernet.Config
	text string
}

func (g *guestAddr) Set(s string) error {
	a, err := address(s)
	if err != nil {
		return err
	}
	to := &g.to.Guest4
	if a.Is6() {
		to = &g.to.Guest6
	}
	if to.IsValid() {
		return fmt.Errorf("the guest has %v already: give one address of each family", *to)
	}
	*to, g.text = a, s
	return nil
}

func (g *guestAddr) String() string { return g.text }
func (g *guestAddr) Type() string   { return "ADDR" }

// A toggle is a flag with the values on and off that sets its inverse.
type toggle struct{ off *bool }

func (t toggle) Set(s string) error {
	switch s {
	case "on":
		*t.off = false
	case "off":
		*t.off = true
	default:
		return fmt.Errorf("choose one of on, off")
	}
	return nil
}

func (t toggle) String() string {
	if t.off != nil && *t.off {
		return "off"
	}
	return "on"
}

func (t toggle) Type() string { return "on|off" }

func text(s string) (string, error) {
	if s == "" {
		return "", fmt.Errorf("it is empty: is a variable of the shell not set?")
	}
	return s, nil
}

func number(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0, fmt.Errorf("not a number")
	}
	return n, nil
}

func port(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("a port is a number from 1 to 65535")
	}
	return uint16(n), nil
}

func mac(s string) (net.HardwareAddr, error) {
	a, err := net.ParseMAC(s)
	if err != nil || len(a) != 6 {
		return nil, fmt.Errorf("not a MAC address such as 02:00:00:00:00:01")
	}
	return a, nil
}

func prefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("not a subnet such as %v or %v", usernet.DefaultCIDR, usernet.DefaultCIDR6)
	}
	return p, nil
}

func address(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, fmt.Errorf("not an IP address")
	}
	return a, nil
}
