package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// A Filter chooses frames. Its language is a part of pcap-filter(7):
//
//	filter    = and { ("or" | "||") and }
//	and       = not { ("and" | "&&") not }
//	not       = ("not" | "!") not | "(" filter ")" | primitive
//	primitive = protocol [place] | place
//	protocol  = "tcp" | "udp" | "icmp" | "arp" | "ip" | "ip6"
//	place     = ["src" | "dst"] ("host" ADDR | "net" CIDR | "port" N | "portrange" N-N)
//
// Without src or dst either end will do. icmp is that of IPv4 and of IPv6, ip is
// IPv4. Only the first fragment of a packet has ports. The addresses of ARP are
// those that it is about.
type Filter struct {
	text string
	root node // nil: all frames
}

// String returns the filter as it was parsed.
func (f *Filter) String() string { return f.text }

// matches reports whether the filter chooses a packet.
func (f *Filter) matches(p *packet) bool { return f.root == nil || f.root.matches(p) }

// node is a part of a filter.
type node interface{ matches(*packet) bool }

type (
	either struct{ a, b node }
	both   struct{ a, b node }
	not    struct{ a node }
	// etherType and protocols are what a protocol's name stands for.
	etherType uint16
	protocols [2]uint8
	subnet    struct {
		prefix   netip.Prefix
		src, dst bool
	}
	ports struct {
		from, to uint16
		src, dst bool
	}
)

func (n either) matches(p *packet) bool    { return n.a.matches(p) || n.b.matches(p) }
func (n both) matches(p *packet) bool      { return n.a.matches(p) && n.b.matches(p) }
func (n not) matches(p *packet) bool       { return !n.a.matches(p) }
func (n etherType) matches(p *packet) bool { return p.kind == uint16(n) }
func (n protocols) matches(p *packet) bool {
	return p.proto != 0 && (p.proto == n[0] || p.proto == n[1])
}
func (n subnet) matches(p *packet) bool {
	return n.src && n.prefix.Contains(p.src) || n.dst && n.prefix.Contains(p.dst)
}
func (n ports) matches(p *packet) bool {
	in := func(port uint16) bool { return n.from <= port && port <= n.to }
	return p.hasPorts && (n.src && in(p.srcPort) || n.dst && in(p.dstPort))
}

// Bounds of a filter.
const (
	maxFilter = 4096
	maxDepth  = 100 // of brackets, and of nots
)

// ParseFilter parses a filter. That of no words chooses all frames.
func ParseFilter(text string) (*Filter, error) {
	f := &Filter{text: strings.TrimSpace(text)}
	if len(f.text) > maxFilter {
		return nil, fmt.Errorf("filter: %d bytes are too long: %d is the most", len(f.text), maxFilter)
	}
	p := parser{words: split(f.text)}
	if len(p.words) == 0 {
		return f, nil
	}
	var err error
	if f.root, err = p.filter(); err == nil && len(p.words) > 0 {
		err = fmt.Errorf("%q: join conditions by and, or or", p.words[0])
	}
	if err != nil {
		return nil, fmt.Errorf("filter %q: %w", f.text, err)
	}
	return f, nil
}

// split makes words: brackets and the signs for and, or and not stand alone.
func split(text string) []string {
	for _, sign := range []string{"(", ")", "&&", "||", "!"} {
		text = strings.ReplaceAll(text, sign, " "+sign+" ")
	}
	return strings.Fields(text)
}

// parser is a filter that is being read.
type parser struct {
	words []string
	depth int
}

// next takes a word off.
func (p *parser) next() string {
	if len(p.words) == 0 {
		return ""
	}
	w := p.words[0]
	p.words = p.words[1:]
	return w
}

// take takes a word off if it is one of these.
func (p *parser) take(words ...string) (string, bool) {
	for _, w := range words {
		if len(p.words) > 0 && strings.EqualFold(p.words[0], w) {
			p.next()
			return w, true
		}
	}
	return "", false
}

func (p *parser) filter() (node, error) {
	n, err := p.and()
	for err == nil {
		if _, ok := p.take("or", "||"); !ok {
			break
		}
		var m node
		m, err = p.and()
		n = either{n, m}
	}
	return n, err
}

func (p *parser) and() (node, error) {
	n, err := p.not()
	for err == nil {
		if _, ok := p.take("and", "&&"); !ok {
			break
		}
		var m node
		m, err = p.not()
		n = both{n, m}
	}
	return n, err
}

func (p *parser) not() (node, error) {
	if p.depth++; p.depth > maxDepth {
		return nil, errors.New("it is nested too deep")
	}
	defer func() { p.depth-- }()
	if _, ok := p.take("not", "!"); ok {
		n, err := p.not()
		return not{n}, err
	}
	if _, ok := p.take("("); ok {
		n, err := p.filter()
		if _, ok := p.take(")"); err == nil && !ok {
			err = errors.New("a bracket is not closed")
		}
		return n, err
	}
	return p.primitive()
}

// names are what protocols are called.
var names = map[string]node{
	"tcp": protocols{protoTCP, protoTCP}, "udp": protocols{protoUDP, protoUDP}, "icmp": protocols{protoICMP, protoICMPv6},
	"arp": etherType(typeARP), "ip": etherType(typeIPv4), "ip6": etherType(typeIPv6),
}

// places are how the rest of a primitive begins.
var places = []string{"src", "dst", "host", "net", "portrange", "port"}

func (p *parser) primitive() (node, error) {
	w, ok := p.take("tcp", "udp", "icmp", "arp", "ip6", "ip")
	if !ok {
		return p.place()
	}
	n := names[w]
	for _, begin := range places {
		if len(p.words) > 0 && strings.EqualFold(p.words[0], begin) {
			m, err := p.place()
			return both{n, m}, err
		}
	}
	return n, nil
}

func (p *parser) place() (node, error) {
	src, dst := true, true
	if _, ok := p.take("src"); ok {
		dst = false
	} else if _, ok := p.take("dst"); ok {
		src = false
	}
	word := p.next()
	switch strings.ToLower(word) {
	case "host":
		text := p.next()
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			return nil, fmt.Errorf("host %q: it is not an IP address", text)
		}
		a = a.Unmap()
		return subnet{netip.PrefixFrom(a, a.BitLen()), src, dst}, nil
	case "net":
		text := p.next()
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("net %q: it is not a subnet such as 10.0.2.0/24", text)
		}
		return subnet{prefix.Masked(), src, dst}, nil
	case "port":
		text := p.next()
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("port %q: it is not a number from 0 to 65535", text)
		}
		return ports{uint16(port), uint16(port), src, dst}, nil
	case "portrange":
		text := p.next()
		first, last, _ := strings.Cut(text, "-")
		from, err1 := strconv.ParseUint(first, 10, 16)
		to, err2 := strconv.ParseUint(last, 10, 16)
		if err1 != nil || err2 != nil || from > to {
			return nil, fmt.Errorf("portrange %q: it is not a range such as 8000-8010", text)
		}
		return ports{uint16(from), uint16(to), src, dst}, nil
	case "":
		return nil, errors.New("it ends where a condition should follow")
	}
	return nil, fmt.Errorf("%q: there are tcp, udp, icmp, arp, ip, ip6, host ADDR, net CIDR, port N and portrange N-N, with src or dst before the last four, and, or, not and brackets", word)
}
