package main

import (
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A longOption is one that the name slirp4netns knows.
type longOption struct {
	name  string
	short byte
	value string // what its value is called; "" takes none
	usage string // "" for names that are kept for old callers
}

// slirpLongOptions are in the order of the help.
var slirpLongOptions = []longOption{
	{"configure", 'c', "", "set the interface up, with address and default route"},
	{"exit-fd", 'e', "FD", "end when the other end of descriptor FD is closed"},
	{"ready-fd", 'r', "FD", "write 1 to descriptor FD when the network can be used"},
	{"mtu", 'm', "MTU", "MTU (default: 1500, largest: 65521)"},
	{"enable-ipv6", '6', "", "serve IPv6, too"},
	{"api-socket", 'a', "PATH", "take requests for forwards at this unix socket"},
	{"cidr", 0, "CIDR", "subnet of the guest (default: 10.0.2.0/24)"},
	{"disable-host-loopback", 0, "", "keep the guest from 127.0.0.1 of the host"},
	{"netns-type", 0, "TYPE", "what names the namespace: path, pid or tapfd (default: pid)"},
	{"userns-path", 0, "PATH", "user namespace that owns the network namespace (found without it)"},
	{"enable-sandbox", 0, "", "drop capabilities, and close the file system but for /etc and /run"},
	{"enable-seccomp", 0, "", "forbid system calls that a network does not need"},
	{"outbound-addr", 0, "ADDR", "send IPv4 from this address of the host, or that of this interface"},
	{"outbound-addr6", 0, "ADDR", "send IPv6 from this address of the host, or that of this interface"},
	{"disable-dns", 0, "", "serve no DNS"},
	{"macaddress", 0, "MAC", "MAC address of the interface (with -c only)"},
	{"target-type", 0, "TYPE", "what is attached to: netns or bess (default: netns)"},
	{"help", 'h', "", "show this help, and exit"},
	{"version", 'v', "", "show the version, and exit"},
	{"no-host-loopback", 0, "", ""},
	{"create-sandbox", 0, "", ""},
}

// A givenOption is an option as it was found on the command line.
type givenOption struct{ name, value string }

// getopt takes arguments apart as getopt_long(3) of the GNU C library does:
// options may follow operands, long ones be abbreviated, short ones bundled.
// The operands keep their order.
func getopt(args []string, known []longOption) (given []givenOption, operands []string, err error) {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--":
			return given, append(operands, args...), nil
		case strings.HasPrefix(arg, "--"):
			name, value, hasValue := strings.Cut(arg[2:], "=")
			o, err := findLong(name, known)
			switch {
			case err != nil:
				return nil, nil, err
			case o.value == "" && hasValue:
				return nil, nil, fmt.Errorf("option '--%s' doesn't allow an argument", o.name)
			case o.value != "" && !hasValue:
				if len(args) == 0 {
					return nil, nil, fmt.Errorf("option '--%s' requires an argument", o.name)
				}
				value, args = args[0], args[1:]
			}
			given = append(given, givenOption{o.name, value})
		case len(arg) > 1 && arg[0] == '-':
			for bundle := arg[1:]; bundle != ""; {
				c := bundle[0]
				bundle = bundle[1:]
				i := slices.IndexFunc(known, func(o longOption) bool { return o.short == c && c != 0 })
				if i < 0 {
					return nil, nil, fmt.Errorf("invalid option -- '%c'", c)
				}
				o := givenOption{name: known[i].name}
				if known[i].value != "" {
					switch {
					case bundle != "":
						o.value, bundle = bundle, ""
					case len(args) > 0:
						o.value, args = args[0], args[1:]
					default:
						return nil, nil, fmt.Errorf("option requires an argument -- '%c'", c)
					}
				}
				given = append(given, o)
			}
		default:
			operands = append(operands, arg)
		}
	}
	return given, operands, nil
}

// findLong finds a long option by its name or a beginning that no other has.
func findLong(name string, known []longOption) (longOption, error) {
	var found []longOption
	for _, o := range known {
		if o.name == name {
			return o, nil
		}
		if strings.HasPrefix(o.name, name) {
			found = append(found, o)
		}
	}
	switch len(found) {
	case 0:
		return longOption{}, fmt.Errorf("unrecognized option '--%s'", name)
	case 1:
		return found[0], nil
	}
	var names strings.Builder
	for _, o := range found {
		fmt.Fprintf(&names, " '--%s'", o.name)
	}
	return longOption{}, fmt.Errorf("option '--%s' is ambiguous; possibilities:%s", name, names.String())
}

// Kinds of what slirp4netns attaches to.
const (
	slirpPID   = "pid"
	slirpPath  = "path"
	slirpTapFD = "tapfd"
	slirpBESS  = "bess"
)

// slirpOptions is the command line of slirp4netns, understood.
type slirpOptions struct {
	configure, ipv6, noLoopback, noDNS bool
	sandbox, seccomp                   bool
	exitFD, readyFD                    int // -1: none
	mtu                                int
	apiSocket                          string
	cidr                               netip.Prefix
	outbound4, outbound6               netip.Addr
	mac                                net.HardwareAddr
	target                             string // one of the kinds
	pid, tapFD                         int
	path, tapName                      string
	help, version                      bool
	warnings                           []string
}

// A slirpError is a mistake in the arguments.
type slirpError struct {
	text  string
	usage bool // is shown, too
}

func (e *slirpError) Error() string { return e.text }

func slirpUsage(format string, args ...any) error {
	return &slirpError{fmt.Sprintf(format, args...), true}
}

func slirpFailure(format string, args ...any) error {
	return &slirpError{fmt.Sprintf(format, args...), false}
}

// Limits of the MTU that slirp4netns takes.
const (
	slirpDefaultMTU = 1500
	slirpMaxMTU     = 65521
	slirpMinMTU     = 68 // RFC 791
)

// parseSlirp understands the arguments of slirp4netns, of which name is the
// first.
func parseSlirp(name string, args []string) (*slirpOptions, error) {
	given, operands, err := getopt(args, slirpLongOptions)
	if err != nil {
		return nil, slirpUsage("%s: %v", name, err)
	}
	o := &slirpOptions{exitFD: -1, readyFD: -1, mtu: slirpDefaultMTU}
	v := make(map[string]string)
	has := func(name string) bool { _, ok := v[name]; return ok }
	for _, g := range given {
		v[g.name] = g.value
		switch g.name {
		case "help":
			o.help = true
			return o, nil
		case "version":
			o.version = true
			return o, nil
		case "no-host-loopback", "create-sandbox":
			now := map[string]string{"no-host-loopback": "disable-host-loopback", "create-sandbox": "enable-sandbox"}[g.name]
			v[now] = ""
			o.warnings = append(o.warnings, fmt.Sprintf("--%s is deprecated, use --%s instead", g.name, now))
		case "enable-ipv6":
			o.warnings = append(o.warnings, "Support for IPv6 is experimental")
		case "enable-seccomp":
			o.warnings = append(o.warnings, "Support for seccomp is experimental")
		case "outbound-addr", "outbound-addr6":
			o.warnings = append(o.warnings, fmt.Sprintf("Support for --%s is experimental", g.name))
		case "exit-fd", "ready-fd":
			fd, err := strconv.Atoi(g.value)
			if err != nil || fd < 0 {
				return nil, slirpUsage("%s must be a non-negative integer", g.name)
			}
			if g.name == "exit-fd" {
				o.exitFD = fd
			} else {
				o.readyFD = fd
			}
		case "mtu":
			if o.mtu, err = strconv.Atoi(g.value); err != nil || o.mtu <= 0 || o.mtu > slirpMaxMTU {
				return nil, slirpUsage("MTU must be a positive integer (< %d)", slirpMaxMTU+1)
			}
		}
	}
	o.configure, o.ipv6, o.noDNS = has("configure"), has("enable-ipv6"), has("disable-dns")
	o.noLoopback, o.sandbox, o.seccomp = has("disable-host-loopback"), has("enable-sandbox"), has("enable-seccomp")
	o.apiSocket = v["api-socket"]
	if err := o.chooseTarget(v, operands); err != nil {
		return nil, err
	}
	return o, o.chooseRest(v)
}

// chooseTarget looks at what is attached to.
func (o *slirpOptions) chooseTarget(v map[string]string, operands []string) (err error) {
	has := func(name string) bool { _, ok := v[name]; return ok }
	o.target = slirpPID
	if has("netns-type") {
		switch v["netns-type"] {
		case slirpPID, slirpTapFD:
			o.target = v["netns-type"]
		default: // whatever it says
			o.target = slirpPath
		}
	}
	switch t, given := v["target-type"]; {
	case !given || t == "netns":
	case t != slirpBESS:
		return slirpUsage(`--target-type must be either "netns" or "bess"`)
	default:
		for _, name := range []string{"configure", "netns-type", "userns-path"} {
			if has(name) {
				return slirpUsage("--%s conflicts with --target-type=bess", name)
			}
		}
		o.target = slirpBESS
	}
	if has("macaddress") && !o.configure {
		return slirpUsage("--macaddr cannot be specified when --configure or -c is not specified")
	}
	want := 2
	if o.target == slirpTapFD || o.target == slirpBESS {
		want = 1
	}
	switch {
	case len(operands) < want && want == 2 && len(operands) == 1:
		return slirpUsage("TAPNAME is missing")
	case len(operands) < want:
		return slirpUsage("%s is missing", map[string]string{slirpPID: "PID", slirpPath: "PATH", slirpTapFD: "FD", slirpBESS: "PATH"}[o.target])
	case len(operands) > want && o.target == slirpBESS:
		return slirpUsage("too many arguments")
	case len(operands) > want:
		o.warnings = append(o.warnings, "too many arguments")
	}
	if want == 2 {
		o.tapName = operands[1]
	}
	switch o.target {
	case slirpPID:
		if o.pid, err = strconv.Atoi(operands[0]); err != nil || o.pid <= 0 || o.pid > math.MaxInt32 {
			return slirpUsage("PID must be a positive integer")
		}
	case slirpPath:
		o.path = operands[0]
		if _, err := os.Stat(o.path); err != nil {
			return slirpUsage("existing path expected when --netns-type=path: %s", o.path)
		}
	case slirpTapFD:
		if o.tapFD, err = strconv.Atoi(operands[0]); err != nil || o.tapFD < 0 {
			return slirpUsage("TAPFD must a file descriptor")
		}
	case slirpBESS:
		o.path = operands[0]
	}
	if path := v["userns-path"]; path != "" {
		if _, err := os.Stat(path); err != nil {
			return slirpUsage("userns path doesn't exist: %s", path)
		}
	}
	return nil
}

// slirpCIDR is what a subnet looks like before its numbers are looked at.
var slirpCIDR = regexp.MustCompile(`^(([0-9]{1,3}\.){3}[0-9]{1,3})/([0-9]{1,2})$`)

// chooseRest looks at what is understood once the target is.
func (o *slirpOptions) chooseRest(v map[string]string) (err error) {
	if o.mtu < slirpMinMTU {
		return slirpFailure("slirp_new failed: the MTU is %d, IPv4 needs %d", o.mtu, slirpMinMTU)
	}
	o.cidr = netip.MustParsePrefix("10.0.2.0/24")
	if s, ok := v["cidr"]; ok {
		if o.cidr, err = parseSlirpCIDR(s); err != nil {
			return err
		}
	}
	if s, ok := v["macaddress"]; ok {
		if o.mac, err = mac(s); err != nil {
			return slirpFailure("macaddress %q: %v", s, err)
		}
	}
	for _, f := range []struct {
		name string
		six  bool
		to   *netip.Addr
	}{{"outbound-addr", false, &o.outbound4}, {"outbound-addr6", true, &o.outbound6}} {
		if s, ok := v[f.name]; ok {
			if *f.to, ok = slirpSource(s, f.six); !ok {
				return slirpFailure("%s has to be valid %s address or interface name.", f.name, map[bool]string{false: "ipv4", true: "ipv6"}[f.six])
			}
		}
	}
	const maxPath = 108 // sun_path of unix(7), with its final zero
	if len(o.apiSocket) >= maxPath {
		return slirpFailure("the specified API socket path is too long (>= %d)", maxPath)
	}
	return nil
}

func parseSlirpCIDR(s string) (p netip.Prefix, err error) {
	m := slirpCIDR.FindStringSubmatch(s)
	if m == nil {
		return p, slirpFailure("invalid CIDR: %s", s)
	}
	a, err := netip.ParseAddr(m[1])
	if err != nil {
		return p, slirpFailure("invalid CIDR: %s", s)
	}
	bits, _ := strconv.Atoi(m[3])
	if bits < 1 || bits > 25 {
		return p, slirpFailure("invalid CIDR: prefix length needs to be 1-25, got %d", bits)
	}
	p = netip.PrefixFrom(a, bits)
	if p != p.Masked() {
		return p, slirpFailure("invalid CIDR: CIDR needs to be a network address like %v, not like %v", p.Masked(), p)
	}
	return p, nil
}

// slirpSource returns the address that s is, or the first one of a family that
// the interface s has.
func slirpSource(s string, six bool) (netip.Addr, bool) {
	if a, err := netip.ParseAddr(s); err == nil {
		return a, a.Is6() == six && a.Zone() == ""
	}
	iface, err := net.InterfaceByName(s)
	if err != nil {
		return netip.Addr{}, false
	}
	addrs, _ := iface.Addrs()
	for _, n := range addrs {
		if n, ok := n.(*net.IPNet); ok {
			a, _ := netip.AddrFromSlice(n.IP)
			if a = a.Unmap(); a.Is6() == six && !a.IsLinkLocalUnicast() {
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}

// printSlirpHelp writes the help. Programs look for options in it: each is a
// word of its own.
func printSlirpHelp(w io.Writer, name string) {
	fmt.Fprintf(w, "Usage: %s [OPTION]... PID|PATH|FD [TAPNAME]\n", name)
	fmt.Fprintf(w, "Give a network namespace a network, without privileges (usernet in the place of slirp4netns).\n\n")
	for _, o := range slirpLongOptions {
		if o.usage == "" {
			continue
		}
		s := "--" + o.name
		if o.short != 0 {
			s = "-" + string(o.short) + ", " + s
		}
		if o.value != "" {
			s += "=" + o.value
		}
		fmt.Fprintf(w, "%-25s %s\n", s, o.usage)
	}
}
