package dns

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"unicode"
)

// Bounds on what is taken from a resolv.conf.
const (
	maxResolvConf = 1 << 20
	maxSearch     = 32
)

// ResolvConf is what a resolv.conf(5) says that matters to us.
type ResolvConf struct {
	Servers []netip.AddrPort
	Search  []string
}

// errNoServers means that a resolv.conf is empty or still being written.
var errNoServers = errors.New("no usable nameserver line")

// ReadResolvConf reads the file at path. It looks at regular files only, and
// at the first MiB of them.
func ReadResolvConf(path string) (ResolvConf, error) {
	// A FIFO must not keep us waiting.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return ResolvConf{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ResolvConf{}, err
	}
	if !info.Mode().IsRegular() {
		return ResolvConf{}, fmt.Errorf("%s is not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxResolvConf))
	if err != nil {
		return ResolvConf{}, err
	}
	rc := parseResolvConf(b)
	if len(rc.Servers) == 0 {
		return ResolvConf{}, fmt.Errorf("read %s: %w", path, errNoServers)
	}
	return rc, nil
}

// parseResolvConf takes what is good and skips the rest, as resolvers do.
func parseResolvConf(b []byte) ResolvConf {
	var rc ResolvConf
	for line := range bytes.Lines(b) {
		if line = bytes.TrimSpace(line); len(line) == 0 || line[0] == '#' || line[0] == ';' {
			continue
		}
		key, rest, _ := bytes.Cut(line, []byte{' '})
		if k, r, ok := bytes.Cut(line, []byte{'\t'}); ok && len(k) < len(key) {
			key, rest = k, r
		}
		switch string(key) {
		case "nameserver":
			if a, ok := parseServer(rest); ok && len(rc.Servers) < maxUpstreams && !slices.Contains(rc.Servers, a) {
				rc.Servers = append(rc.Servers, a)
			}
		case "search", "domain":
			rc.Search = parseSearch(rest) // the last one counts
		}
	}
	return rc
}

// parseServer reads the address of a nameserver line; what follows it is a
// comment to glibc.
func parseServer(rest []byte) (netip.AddrPort, bool) {
	field, _ := firstField(rest)
	if len(field) > 64 { // longest address, and a scope of IFNAMSIZ
		return netip.AddrPort{}, false
	}
	a, err := netip.ParseAddr(string(field))
	if err != nil || a.IsMulticast() || bytes.ContainsFunc(field, unicode.IsControl) {
		return netip.AddrPort{}, false
	}
	switch a = a.Unmap(); a {
	case netip.IPv4Unspecified():
		// Connecting to it means the host itself.
		a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case netip.IPv6Unspecified():
		a = netip.IPv6Loopback()
	}
	return netip.AddrPortFrom(a, 53), true
}

// parseSearch reads the domains of a search or domain line.
func parseSearch(rest []byte) []string {
	var domains []string
	for len(domains) < maxSearch {
		var field []byte
		field, rest = firstField(rest)
		if len(field) == 0 || field[0] == '#' || field[0] == ';' {
			break
		}
		if len(field) > maxName {
			continue
		}
		// "." is how systemd-resolved writes that there are none.
		name := strings.TrimSuffix(string(field), ".")
		if _, err := wireName(name); err == nil && !slices.Contains(domains, name) {
			domains = append(domains, name)
		}
	}
	return domains
}

// firstField cuts the first word off b.
func firstField(b []byte) (field, rest []byte) {
	b = bytes.TrimLeft(b, " \t")
	i := bytes.IndexAny(b, " \t")
	if i < 0 {
		i = len(b)
	}
	return b[:i], b[i:]
}
