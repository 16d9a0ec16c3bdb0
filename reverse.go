package usernet

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
)

// A Reverse is a port of the gateway, in both families, at which the guest
// reaches one server of the host: the hole in what is closed otherwise. TCP
// only. Deny rules hold for it all the same.
type Reverse struct {
	Port uint16 // of the gateway
	// Host is where the server listens, HostPath instead a unix socket.
	Host     netip.AddrPort
	HostPath string
}

// String returns r as ParseReverse takes it.
func (r Reverse) String() string {
	if r.HostPath != "" {
		return fmt.Sprintf("%d:unix:%s", r.Port, r.HostPath)
	}
	return fmt.Sprintf("%d:%v", r.Port, r.Host)
}

// flaw says what is wrong with it, if anything is.
func (r Reverse) flaw() string {
	switch {
	case r.Port == 0:
		return "the gateway's port is a number from 1 to 65535"
	case r.HostPath != "" && r.Host != netip.AddrPort{}:
		return "a unix socket has no address and port: leave out the one or the other"
	case strings.ContainsRune(r.HostPath, 0):
		return "a path has no zero byte"
	case len(r.HostPath) > maxUnixPath:
		return fmt.Sprintf("the path of a unix socket has at most %d bytes: choose a shorter one", maxUnixPath)
	case r.HostPath != "":
		return ""
	case r.Host.Port() == 0:
		return "the server's port is a number from 1 to 65535"
	}
	switch a := r.Host.Addr(); {
	case !a.IsValid(), a.IsUnspecified(), a.IsMulticast():
		return fmt.Sprintf("no server has the address %v: write 127.0.0.1 for the host's loopback", a)
	case a.Is4In6():
		return "an IPv4 address inside an IPv6 one: write it as IPv4"
	case a.Zone() != "":
		return "an address with a zone cannot be used here: choose another of that server's"
	}
	return ""
}

// checkReverse checks them, each and all.
func (c Config) checkReverse() error {
	seen := make(map[uint16]bool)
	for _, r := range c.Reverse {
		why := r.flaw()
		if why == "" && seen[r.Port] {
			why = "that port of the gateway leads somewhere already: choose another"
		}
		if why != "" {
			return badConfig("reverse %v: %s", r, why)
		}
		seen[r.Port] = true
	}
	return nil
}

// ParseReverse parses GUESTPORT:[ADDR:]PORT or GUESTPORT:unix:/PATH. An IPv6
// address is in brackets; without an address it is 127.0.0.1.
func ParseReverse(spec string) (Reverse, error) {
	r, why := parseReverse(spec)
	if why == "" {
		why = r.flaw()
	}
	if why != "" {
		return Reverse{}, badConfig("reverse %q: %s", spec, why)
	}
	return r, nil
}

func parseReverse(spec string) (r Reverse, flaw string) {
	guest, to, ok := strings.Cut(spec, ":")
	if !ok {
		return r, "not of the form GUESTPORT:[ADDR:]PORT or GUESTPORT:unix:/PATH"
	}
	port, ok := parsePort(guest)
	if !ok {
		return r, fmt.Sprintf("guest's port: %q is not a number from 1 to 65535", guest)
	}
	r.Port = uint16(port)
	if path, ok := strings.CutPrefix(to, "unix:"); ok {
		if !filepath.IsAbs(path) {
			return r, fmt.Sprintf("%q: the path of a unix socket starts with a slash", path)
		}
		r.HostPath = path
		return r, ""
	}
	addr := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if i := strings.LastIndexByte(to, ':'); i >= 0 {
		var why string
		if addr, why = parseHostAddr(to[:i]); why != "" {
			return r, why
		}
		to = to[i+1:]
	}
	if port, ok = parsePort(to); !ok {
		return r, fmt.Sprintf("server's port: %q is not a number from 1 to 65535", to)
	}
	r.Host = netip.AddrPortFrom(addr, uint16(port))
	return r, ""
}
