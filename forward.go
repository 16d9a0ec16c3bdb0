package usernet

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
)

// A Forward publishes a port of the guest on the host.
type Forward struct {
	Protocol Protocol // TCP or UDP
	// Host is where the host listens. Port 0 is any free one. 0.0.0.0 and ::
	// are all addresses of a family, the zero address those of both.
	Host netip.AddrPort
	// HostPath is where the host listens instead on a unix socket. TCP only.
	HostPath string
	// Guest is where connections go inside. The zero address is the guest's own.
	Guest netip.AddrPort
	// Proxy is the version, 1 or 2, of the PROXY protocol by which the server
	// inside is told the client's address ahead of each connection's own bytes.
	// 0 sends nothing. TCP only.
	Proxy int
}

// ForwardInfo is a Forward that is in effect. Its Host has the port that was
// chosen.
type ForwardInfo struct {
	ID   string
	Auto bool // published because it listens inside (Config.PublishAuto)
	Forward
}

// String returns the forward as ParseForward takes it, but that the address
// inside, which that does not know, is written before its port.
func (f Forward) String() string {
	host := "unix:" + f.HostPath
	if f.HostPath == "" {
		host = portOf(f.Host)
	}
	text := host + ":" + portOf(f.Guest) + "/" + f.Protocol.String()
	if f.Proxy != 0 {
		text += fmt.Sprintf(",proxy=v%d", f.Proxy)
	}
	return text
}

// portOf writes a port, with an address if there is one.
func portOf(a netip.AddrPort) string {
	if a.Addr().IsValid() {
		return a.String()
	}
	return strconv.Itoa(int(a.Port()))
}

// maxUnixPath is how long the path of a unix socket can be (unix(7)).
const maxUnixPath = 107

// flaw says what is wrong with the forward, if anything is.
func (f Forward) flaw() string {
	switch host := f.Host.Addr(); {
	case f.Protocol != TCP && f.Protocol != UDP:
		return fmt.Sprintf("no protocol %v: there are tcp and udp", f.Protocol)
	case f.Proxy < 0 || f.Proxy > 2:
		return fmt.Sprintf("there is no version %d of the PROXY protocol: choose 1 or 2", f.Proxy)
	case f.Proxy != 0 && f.Protocol != TCP:
		return "the PROXY protocol goes ahead of a connection: leave it out for udp, whose server sees the client's address"
	case f.Guest.Port() == 0:
		return "the guest's port is a number from 1 to 65535"
	case f.HostPath != "" && f.Host != netip.AddrPort{}:
		return "a unix socket has no address and port: leave out the one or the other"
	case f.HostPath != "" && f.Protocol != TCP:
		return "a unix socket carries a stream: use tcp"
	case f.HostPath != "" && strings.ContainsRune(f.HostPath, 0):
		return "a path has no zero byte"
	case len(f.HostPath) > maxUnixPath:
		return fmt.Sprintf("the path of a unix socket has at most %d bytes: choose a shorter one", maxUnixPath)
	case host.IsMulticast():
		return fmt.Sprintf("%v is a group's address: choose one of this host's", host)
	case host.Is4In6() || f.Guest.Addr().Is4In6():
		return "an IPv4 address inside an IPv6 one: write it as IPv4"
	}
	switch guest := f.Guest.Addr(); {
	case !guest.IsValid():
	case guest.IsUnspecified(), guest.IsMulticast():
		return fmt.Sprintf("nobody inside has the address %v: leave it out for the guest's own", guest)
	case guest.IsLoopback():
		return fmt.Sprintf("no connection from outside reaches %v inside: leave the address out for the guest's own", guest)
	case guest.Zone() != "":
		return "an address inside has no zone: drop it"
	}
	return ""
}

// check returns the flaw as an error.
func (f Forward) check() error {
	if why := f.flaw(); why != "" {
		return badConfig("publish %v: %s", f, why)
	}
	return nil
}

// checkPublish checks the forwards, each and all.
func (c Config) checkPublish() error {
	type key struct {
		Protocol
		netip.AddrPort
		path string
	}
	seen := make(map[key]bool)
	for _, f := range c.Publish {
		if err := f.check(); err != nil {
			return err
		}
		k := key{f.Protocol, f.Host, f.HostPath}
		if f.Host.Port() == 0 && f.HostPath == "" {
			continue
		}
		if seen[k] {
			return badConfig("publish %v: that port of the host is published already: choose another", f)
		}
		seen[k] = true
	}
	return nil
}

// ParseForward parses what to publish:
//
//	[ADDRESS:]HOSTPORT[-END]:GUESTPORT[-END][/tcp|udp][,proxy=v1|v2]
//	unix:/PATH:GUESTPORT[,proxy=v1|v2]
//
// An IPv6 address is in brackets. Without an address the host listens on all it
// has, of both families. A HOSTPORT of 0 or nothing is any free one. A range
// makes a Forward for each port.
func ParseForward(spec string) ([]Forward, error) {
	fs, why := parseForward(spec)
	for _, f := range fs {
		if why == "" {
			why = f.flaw()
		}
	}
	if why != "" {
		return nil, badConfig("publish %q: %s", spec, why)
	}
	return fs, nil
}

func parseForward(spec string) (fs []Forward, flaw string) {
	rest, proxy, why := cutProxy(spec)
	if why != "" {
		return nil, why
	}
	fs, flaw = parseListen(rest)
	for i := range fs {
		fs[i].Proxy = proxy
	}
	return fs, flaw
}

// cutProxy takes ,proxy=v1 or v2 off the end. The path of a unix socket may have
// a comma.
func cutProxy(spec string) (rest string, version int, flaw string) {
	const option = ",proxy="
	i := strings.LastIndex(spec, option)
	if i < 0 {
		if i = strings.LastIndexByte(spec, ','); i >= 0 && !strings.Contains(spec[i:], ":") {
			return "", 0, fmt.Sprintf("no option %q: there is proxy=v1 and proxy=v2", spec[i+1:])
		}
		return spec, 0, ""
	}
	switch value := spec[i+len(option):]; value {
	case "v1":
		return spec[:i], 1, ""
	case "v2":
		return spec[:i], 2, ""
	default:
		return "", 0, fmt.Sprintf("no version %q of the PROXY protocol: choose proxy=v1 or proxy=v2", value)
	}
}

func parseListen(spec string) (fs []Forward, flaw string) {
	const form = "not of the form [ADDRESS:]HOSTPORT[-END]:GUESTPORT[-END][/tcp|udp][,proxy=v1|v2] or unix:/PATH:GUESTPORT"
	if rest, ok := strings.CutPrefix(spec, "unix:"); ok {
		return parseUnixForward(rest)
	}
	rest, word, hasProto := strings.Cut(spec, "/")
	proto := TCP
	if hasProto {
		switch strings.ToLower(word) {
		case "tcp":
		case "udp":
			proto = UDP
		default:
			return nil, fmt.Sprintf("no protocol %q: there are tcp and udp", word)
		}
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		if _, _, why := parseForwardPorts(rest, false); why == "" {
			return nil, fmt.Sprintf("it takes two ports, the host's and the guest's: write %s:%s, or :%s for any free one", rest, rest, rest)
		}
		return nil, form
	}
	host, guest := rest[:i], rest[i+1:]
	var addr netip.Addr
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		var why string
		if addr, why = parseHostAddr(host[:i]); why != "" {
			return nil, why
		}
		host = host[i+1:]
	}
	from, to, why := parseForwardPorts(guest, false)
	if why != "" {
		return nil, "guest's port: " + why
	}
	first, last, why := parseForwardPorts(host, true)
	switch {
	case why != "":
		return nil, "host's port: " + why
	case first != 0 && last-first != to-from:
		return nil, fmt.Sprintf("%d ports of the host and %d of the guest: make the ranges equal", last-first+1, to-from+1)
	}
	for i := 0; i <= to-from; i++ {
		port := 0
		if first != 0 {
			port = first + i
		}
		fs = append(fs, Forward{
			Protocol: proto,
			Host:     netip.AddrPortFrom(addr, uint16(port)),
			Guest:    netip.AddrPortFrom(netip.Addr{}, uint16(from+i)),
		})
	}
	return fs, ""
}

// parseHostAddr parses the address to listen on.
func parseHostAddr(s string) (netip.Addr, string) {
	inner, bracketed := strings.CutPrefix(s, "[")
	if bracketed {
		var ok bool
		if inner, ok = strings.CutSuffix(inner, "]"); !ok {
			return netip.Addr{}, fmt.Sprintf("%q is not an address of this host", s)
		}
	}
	a, err := netip.ParseAddr(inner)
	switch {
	case err != nil:
		return a, fmt.Sprintf("%q is not an IP address: a name will not do, and an IPv6 address is in brackets", s)
	case bracketed != a.Is6():
		return a, fmt.Sprintf("%q: an IPv6 address is in brackets, and no other", s)
	}
	return a, ""
}

// parseUnixForward parses /PATH:GUESTPORT.
func parseUnixForward(s string) ([]Forward, string) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return nil, "the guest's port is missing: write unix:/PATH:GUESTPORT"
	}
	path, port := s[:i], strings.TrimSuffix(s[i+1:], "/tcp")
	if !filepath.IsAbs(path) {
		return nil, fmt.Sprintf("%q: the path of a unix socket starts with a slash", path)
	}
	from, to, why := parseForwardPorts(port, false)
	switch {
	case why != "":
		return nil, "guest's port: " + why
	case from != to:
		return nil, "a unix socket leads to one port, not to a range"
	}
	return []Forward{{Protocol: TCP, HostPath: path, Guest: netip.AddrPortFrom(netip.Addr{}, uint16(from))}}, ""
}

// parseForwardPorts parses PORT[-END]. With free nothing, and 0, is 0.
func parseForwardPorts(s string, free bool) (from, to int, flaw string) {
	if free && (s == "" || s == "0") {
		return 0, 0, ""
	}
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, ok1 := parsePort(first)
	b, ok2 := parsePort(last)
	switch {
	case !ok1 || !ok2:
		return 0, 0, fmt.Sprintf("%q is not a number from 1 to 65535, nor a range such as 8000-8010", s)
	case a > b:
		return 0, 0, fmt.Sprintf("the range ends before it starts: write %d-%d", b, a)
	}
	return a, b, ""
}

func parsePort(s string) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return int(n), err == nil && n > 0
}
