package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/usernet/usernet"
)

// slirpType is the plugin of old that put slirp4netns to work. A network of this
// type has what slirp4netns gives by default.
const slirpType = "slirp"

// slirpMTU is what such a network has where its configuration does not say.
const slirpMTU = 1500

// A cniConf is the configuration of a network as its author has written it, with
// what the runtime wants for one container. Fields of others are ignored.
type cniConf struct {
	types.PluginConf
	MTU          *int     `json:"mtu"`
	CIDR         string   `json:"cidr"`
	CIDR6        string   `json:"cidr6"`
	IPv6         cniIPv6  `json:"ipv6"`
	Isolate      bool     `json:"isolate"`
	HostLoopback *bool    `json:"hostLoopback"`
	Allow        []string `json:"allow"`
	Deny         []string `json:"deny"`

	// RuntimeConfig has what the capabilities stand for.
	RuntimeConfig struct {
		PortMappings []cniPort  `json:"portMappings"`
		IPs          []string   `json:"ips"`
		MAC          string     `json:"mac"`
		Aliases      cniAliases `json:"aliases"`
		DNS          *struct {
			Servers  []string `json:"servers"`
			Searches []string `json:"searches"`
			Options  []string `json:"options"`
		} `json:"dns"`
	} `json:"runtimeConfig"`
	// Args are the older way for the same.
	Args struct {
		CNI struct {
			IPs []string `json:"ips"`
			MAC string   `json:"mac"`
		} `json:"cni"`
	} `json:"args"`

	version string          // of CNI, that the result is to have
	prev    *current.Result // of the plugins before this one
	servers []string        // of names, if not the network's own
	config  usernet.Config  // what all of it means
}

// A cniPort is a port to publish.
type cniPort struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// A cniIPv6 is a mode of IPv6, or true or false for on and off.
type cniIPv6 string

func (m *cniIPv6) UnmarshalJSON(b []byte) error {
	var on bool
	if json.Unmarshal(b, &on) == nil {
		*m = cniIPv6(usernet.IPv6Off)
		if on {
			*m = cniIPv6(usernet.IPv6On)
		}
		return nil
	}
	if err := json.Unmarshal(b, (*string)(m)); err != nil {
		return fieldError("ipv6", "neither auto, on nor off")
	}
	return nil
}

// cniAliases are further names of a container: a list, or as Podman has it, one
// for each network.
type cniAliases struct {
	all   []string
	byNet map[string][]string
}

func (a *cniAliases) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &a.all) == nil || json.Unmarshal(b, &a.byNet) == nil {
		return nil
	}
	return fieldError("runtimeConfig.aliases", "not a list of names")
}

// fieldError says what is wrong with a field of a configuration.
func fieldError(field, format string, args ...any) *types.Error {
	return cniErrorf(types.ErrInvalidNetworkConfig, "use field "+field+": "+format, args...)
}

// cniArgs are those of CNI_ARGS that mean something to usernet. Runtimes that
// give others say so with IgnoreUnknown.
type cniArgs struct {
	types.CommonArgs
	IP, MAC                         types.UnmarshallableString
	K8S_POD_NAME, K8S_POD_NAMESPACE types.UnmarshallableString //lint:ignore ST1003 the fields' names are the arguments'
}

// cniName returns the network's name, which skel has found to be a good one.
func cniName(stdin []byte) (string, error) {
	var c struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal(stdin, &c); err != nil {
		return "", decodingError(err)
	}
	return c.Name, nil
}

// parseCNI reads and checks a configuration.
func parseCNI(args *skel.CmdArgs) (*cniConf, error) {
	c := new(cniConf)
	if err := json.Unmarshal(args.StdinData, c); err != nil {
		return nil, decodingError(err)
	}
	if c.IPAM.Type != "" {
		return nil, cniErrorf(types.ErrUnsupportedField, "use field ipam: %q is not asked, usernet gives the addresses itself: leave ipam out, and choose subnets with cidr and cidr6", c.IPAM.Type)
	}
	var err error
	if c.version, err = new(cniversion.ConfigDecoder).Decode(args.StdinData); err != nil {
		return nil, decodingError(err)
	}
	c.CNIVersion = c.version
	err = cniversion.ParsePrevResult(&c.PluginConf)
	if err == nil && c.PrevResult != nil {
		c.prev, err = current.NewResultFromResult(c.PrevResult)
	}
	if err != nil {
		return nil, cniErrorf(types.ErrDecodingFailure, "read prevResult: %s", describe(err))
	}
	if err := c.read(args); err != nil {
		return nil, err
	}
	if err := c.config.Validate(); err != nil {
		return nil, cniError(types.ErrInvalidNetworkConfig, err)
	}
	return c, nil
}

// decodingError tells JSON that is none from values of the wrong kind.
func decodingError(err error) error {
	var (
		own  *types.Error
		kind *json.UnmarshalTypeError
	)
	switch {
	case errors.As(err, &own):
		return own
	case errors.As(err, &kind):
		field := strings.TrimPrefix(kind.Field, "PluginConf.")
		return fieldError(field, "it is a %s, and has to be %s", kind.Value, jsonKind(kind.Type))
	}
	return cniErrorf(types.ErrDecodingFailure, "read configuration: %v", err)
}

// jsonKind says in JSON's words what a Go type is.
func jsonKind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Pointer:
		return jsonKind(t.Elem())
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a string"
	case reflect.Slice, reflect.Array:
		return "an array"
	case reflect.Struct, reflect.Map:
		return "an object"
	}
	return "a whole number"
}

// read makes a Config of the fields.
func (c *cniConf) read(args *skel.CmdArgs) error {
	u := &c.config
	// A path, if none is asked for: GC and STATUS are about no container.
	u.NetnsPath = "/proc/self/ns/net"
	if args.Netns != "" {
		u.NetnsPath = args.Netns
	}
	u.Ifname = args.IfName
	u.IPv6 = usernet.IPv6Mode(c.IPv6)
	if c.Type != slirpType {
		u.Network, u.Isolate = c.Name, c.Isolate
	} else { // each container has a network of its own
		u.MTU, u.HostLoopback = slirpMTU, true
		if c.IPv6 == "" {
			u.IPv6 = usernet.IPv6Off
		}
	}
	if c.MTU != nil {
		if u.MTU = *c.MTU; u.MTU == 0 {
			return fieldError("mtu", "0: choose one from %d to %d", usernet.MinMTU, usernet.MaxMTU)
		}
	}
	if c.HostLoopback != nil {
		u.HostLoopback = *c.HostLoopback
	}
	var err error
	if c.CIDR != "" {
		if u.CIDR, err = prefix(c.CIDR); err != nil {
			return fieldError("cidr", "%q: %v", c.CIDR, err)
		}
	}
	if c.CIDR6 != "" {
		if u.CIDR6, err = prefix(c.CIDR6); err != nil {
			return fieldError("cidr6", "%q: %v", c.CIDR6, err)
		}
	}
	if u.Allow, err = parseList("allow", c.Allow, usernet.ParseRule); err != nil {
		return err
	}
	if u.Deny, err = parseList("deny", c.Deny, usernet.ParseRule); err != nil {
		return err
	}
	if err := c.readRuntime(args); err != nil {
		return err
	}
	if err := c.readDNS(); err != nil {
		return err
	}
	return c.readPorts()
}

// parseList parses every word of a list.
func parseList[T any](field string, words []string, parse func(string) (T, error)) ([]T, error) {
	var list []T
	for _, w := range words {
		v, err := parse(w)
		if err != nil {
			return nil, fieldError(field, "%s", describe(err))
		}
		list = append(list, v)
	}
	return list, nil
}

// readRuntime reads names, and addresses, which come in one of three ways.
func (c *cniConf) readRuntime(args *skel.CmdArgs) error {
	var a cniArgs
	if err := types.LoadArgs(args.Args, &a); err != nil {
		return cniErrorf(types.ErrInvalidEnvironmentVariables, "read CNI_ARGS: %v", err)
	}
	if c.config.Network != "" {
		c.readNames(args.ContainerID, strings.ToLower(string(a.K8S_POD_NAME)), a.K8S_POD_NAMESPACE != "")
	}
	ips, macText := c.RuntimeConfig.IPs, c.RuntimeConfig.MAC
	if len(ips) == 0 {
		ips = c.Args.CNI.IPs
	}
	if len(ips) == 0 && a.IP != "" {
		ips = strings.Split(string(a.IP), ",")
	}
	if macText == "" {
		macText = c.Args.CNI.MAC
	}
	if macText == "" {
		macText = string(a.MAC)
	}
	if macText != "" {
		m, err := mac(macText)
		if err != nil {
			return fieldError("mac", "%q: %v", macText, err)
		}
		c.config.MAC = m
	}
	for _, ip := range ips {
		if err := c.readIP(ip); err != nil {
			return err
		}
	}
	return nil
}

// label is what a guest may be named.
var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$`)

// readNames finds out what the others on the network know the container by: what
// the runtime calls it, or its id. A pod's name is not its alone where there are
// namespaces of pods, so it is an alias then, which several may have.
func (c *cniConf) readNames(id, pod string, shared bool) {
	names := []string{pod, strings.ToLower(id), strings.ToLower(id[:min(12, len(id))])}
	if shared {
		names[0] = ""
	}
	if i := slices.IndexFunc(names, label.MatchString); i >= 0 {
		c.config.Name = names[i]
	}
	aliases := slices.Concat(c.RuntimeConfig.Aliases.all, c.RuntimeConfig.Aliases.byNet[c.Name])
	if shared && pod != "" {
		aliases = append(aliases, pod)
	}
	for _, a := range aliases {
		if a = strings.ToLower(a); a != c.config.Name && !slices.Contains(c.config.Aliases, a) {
			c.config.Aliases = append(c.config.Aliases, a)
		}
	}
}

// readIP takes an address for the container, with or without its subnet's length.
func (c *cniConf) readIP(ip string) error {
	text, bits, hasBits := strings.Cut(ip, "/")
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" {
		return fieldError("ips", "%q: not an IP address such as 10.0.2.50 or 10.0.2.50/24", ip)
	}
	addr = addr.Unmap()
	to, subnet := &c.config.Guest4, c.config.Addresses().Prefix4
	if addr.Is6() {
		to, subnet = &c.config.Guest6, c.config.Addresses().Prefix6
	}
	switch n, err := strconv.Atoi(bits); {
	case !hasBits:
	case err != nil:
		return fieldError("ips", "%q: not an IP address such as 10.0.2.50 or 10.0.2.50/24", ip)
	case subnet.IsValid() && n != subnet.Bits():
		return fieldError("ips", "%q: the network is %v: write /%d, or leave the length out", ip, subnet, subnet.Bits())
	}
	if to.IsValid() {
		return fieldError("ips", "%q: the container has %v already: give one address of each family", ip, *to)
	}
	*to = addr
	return nil
}

// readDNS reads which servers answer for names that are not the network's own.
func (c *cniConf) readDNS() error {
	servers, err := parseList("dns", c.DNS.Nameservers, usernet.ParseResolver)
	if err != nil {
		return err
	}
	if d := c.RuntimeConfig.DNS; d != nil && len(d.Servers) > 0 {
		own, err := parseList("runtimeConfig.dns", d.Servers, usernet.ParseResolver)
		if err != nil {
			return err
		}
		if c.config.Network == "" {
			servers = own
		} else { // the network's server asks the same for all: this container asks others itself
			for _, s := range own {
				c.servers = append(c.servers, s.Addr().String())
			}
		}
	}
	// Some name the network's own server, for containers to ask. It does not ask
	// itself.
	own := c.config.Addresses()
	servers = slices.DeleteFunc(servers, func(s netip.AddrPort) bool { return s.Addr() == own.DNS4 || s.Addr() == own.DNS6 })
	c.config.DNS, c.config.DNSSearch = servers, c.DNS.Search
	if c.config.Network == "" {
		c.config.DNSSearch = c.search()
	}
	return nil
}

// search are the domains to search.
func (c *cniConf) search() []string {
	if d := c.RuntimeConfig.DNS; d != nil && len(d.Searches) > 0 {
		return d.Searches
	}
	return c.DNS.Search
}

// options are those of resolv.conf; they are the runtime's to write.
func (c *cniConf) options() []string {
	if d := c.RuntimeConfig.DNS; d != nil && len(d.Options) > 0 {
		return d.Options
	}
	return c.DNS.Options
}

// readPorts reads what to publish.
func (c *cniConf) readPorts() error {
	const field = "runtimeConfig.portMappings"
	for _, p := range c.RuntimeConfig.PortMappings {
		f := usernet.Forward{Protocol: usernet.TCP}
		switch strings.ToLower(p.Protocol) {
		case "", "tcp":
		case "udp":
			f.Protocol = usernet.UDP
		default:
			return fieldError(field, "no protocol %q: there are tcp and udp", p.Protocol)
		}
		for _, port := range []struct {
			name   string
			number int
		}{{"hostPort", p.HostPort}, {"containerPort", p.ContainerPort}} {
			if port.number < 1 || port.number > 65535 {
				return fieldError(field, "%s %d: a port is a number from 1 to 65535", port.name, port.number)
			}
		}
		var host netip.Addr
		if p.HostIP != "" {
			var err error
			if host, err = address(strings.Trim(p.HostIP, "[]")); err != nil {
				return fieldError(field, "hostIP %q: %v", p.HostIP, err)
			}
		}
		f.Host = netip.AddrPortFrom(host.Unmap(), uint16(p.HostPort))
		f.Guest = netip.AddrPortFrom(netip.Addr{}, uint16(p.ContainerPort))
		c.config.Publish = append(c.config.Publish, f)
	}
	return nil
}

// flags are those of the command line that say the same.
func (c *cniConf) flags() []string {
	u := c.config
	var flags []string
	add := func(name string, value any) {
		if s := fmt.Sprint(value); s != "" {
			flags = append(flags, "--"+name, s)
		}
	}
	if u.MTU != 0 {
		add("mtu", u.MTU)
	}
	add("mac", u.MAC)
	if u.CIDR.IsValid() {
		add("cidr", u.CIDR)
	}
	if u.CIDR6.IsValid() {
		add("cidr6", u.CIDR6)
	}
	add("ipv6", u.IPv6)
	add("network", u.Network)
	add("name", u.Name)
	for _, a := range u.Aliases {
		add("alias", a)
	}
	if u.Isolate {
		flags = append(flags, "--isolate")
	}
	for _, a := range []netip.Addr{u.Guest4, u.Guest6} {
		if a.IsValid() {
			add("ip", a)
		}
	}
	if u.HostLoopback {
		flags = append(flags, "--host-loopback")
	}
	for _, r := range u.Allow {
		add("allow", r)
	}
	for _, r := range u.Deny {
		add("deny", r)
	}
	for _, s := range u.DNS {
		add("dns", s)
	}
	for _, d := range u.DNSSearch {
		add("dns-search", d)
	}
	for _, f := range u.Publish {
		add("publish", f)
	}
	return flags
}
