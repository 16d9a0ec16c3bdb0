package usernet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/agent"
)

// An AutoPublish has ports published as they begin to listen inside, at the same
// number on the host, until they stop.
type AutoPublish struct {
	Addr    netip.Addr  // where the host listens; the zero value: on all its addresses
	Include []PortRange // what else is left alone; none: nothing is
	Exclude []PortRange // goes before Include
}

// A PortRange is the ports From to To, both included, of TCP, UDP or, with
// AnyProtocol, both.
type PortRange struct {
	From, To uint16
	Protocol Protocol
}

func (r PortRange) contains(p Protocol, port uint16) bool {
	return r.From <= port && port <= r.To && (r.Protocol == AnyProtocol || r.Protocol == p)
}

// String returns the range as ParseAutoPublish takes it.
func (r PortRange) String() string {
	return strings.TrimPrefix(suffix(r.From, r.To, r.Protocol), ":")
}

// String returns what to publish as ParseAutoPublish takes it.
func (a AutoPublish) String() string {
	var words []string
	if len(a.Include) == 0 {
		words = append(words, "all")
	}
	for _, r := range a.Include {
		words = append(words, r.String())
	}
	for _, r := range a.Exclude {
		words = append(words, "~"+r.String())
	}
	text := strings.Join(words, ",")
	switch {
	case a.Addr.Is6():
		return "[" + a.Addr.String() + "]:" + text
	case a.Addr.IsValid():
		return a.Addr.String() + ":" + text
	}
	return text
}

// ParseAutoPublish parses what to publish as it begins to listen:
//
//	[ADDRESS:]all
//	[ADDRESS:][~]PORT[-END][/tcp|udp],...
//
// What has a ~ is left out. Without any that has none, all others are published.
func ParseAutoPublish(spec string) (*AutoPublish, error) {
	a, why := parseAutoPublish(spec)
	if why == "" {
		why = a.flaw()
	}
	if why != "" {
		return nil, badConfig("publish automatically %q: %s", spec, why)
	}
	return &a, nil
}

func parseAutoPublish(spec string) (a AutoPublish, flaw string) {
	if i := strings.LastIndexByte(spec, ':'); i >= 0 {
		var why string
		if a.Addr, why = parseHostAddr(spec[:i]); why != "" {
			return a, why
		}
		spec = spec[i+1:]
	}
	all := false
	for word := range strings.SplitSeq(spec, ",") {
		word = strings.TrimSpace(word)
		if word == "all" {
			all = true
			continue
		}
		to := &a.Include
		ports, exclude := strings.CutPrefix(word, "~")
		if exclude {
			to = &a.Exclude
		}
		ports, proto, hasProto := strings.Cut(ports, "/")
		r := PortRange{}
		switch {
		case !hasProto:
		case proto == "tcp":
			r.Protocol = TCP
		case proto == "udp":
			r.Protocol = UDP
		default:
			return a, fmt.Sprintf("no protocol %q: there are tcp and udp", proto)
		}
		from, last, why := parseForwardPorts(ports, false)
		if why != "" {
			return a, why
		}
		r.From, r.To = uint16(from), uint16(last)
		*to = append(*to, r)
	}
	if all && len(a.Include) > 0 {
		return a, "all is everything already: leave out the ports, or all"
	}
	return a, ""
}

// flaw says what is wrong, if anything is.
func (a AutoPublish) flaw() string {
	for _, r := range slices.Concat(a.Include, a.Exclude) {
		switch {
		case r.Protocol != AnyProtocol && r.Protocol != TCP && r.Protocol != UDP:
			return fmt.Sprintf("no protocol %v: there are tcp and udp", r.Protocol)
		case r.From == 0:
			return "a port is a number from 1 to 65535"
		case r.From > r.To:
			return fmt.Sprintf("the range ends before it starts: write %d-%d", r.To, r.From)
		}
	}
	// What goes for the address of one port goes for that of all.
	return Forward{Protocol: TCP, Host: netip.AddrPortFrom(a.Addr, 1), Guest: netip.AddrPortFrom(netip.Addr{}, 1)}.flaw()
}

func (c Config) checkPublishAuto() error {
	switch {
	case c.PublishAuto == nil:
		return nil
	case c.TapFile != nil:
		return badConfig("publish automatically: who listens behind an open TAP cannot be seen: give a namespace, or publish ports one by one")
	}
	if why := c.PublishAuto.flaw(); why != "" {
		return badConfig("publish automatically %v: %s", c.PublishAuto, why)
	}
	return nil
}

// wants reports whether a port that listens inside is to be published. UDP
// sockets of clients wait on their ports as those of servers do, so ports that
// are given to clients, and those of DHCP's, have to be named.
func (a *AutoPublish) wants(p Protocol, port uint16, l *agent.Listening) bool {
	in := func(r PortRange) bool { return r.contains(p, port) }
	switch {
	case slices.ContainsFunc(a.Exclude, in):
		return false
	case len(a.Include) > 0:
		return slices.ContainsFunc(a.Include, in)
	}
	return p != UDP || !(l.LocalFrom <= port && port <= l.LocalTo) && !slices.Contains(dhcpPorts, port)
}

var dhcpPorts = []uint16{67, 68, 546, 547}

const (
	// lookEvery is the time between two looks at what listens inside.
	lookEvery = 400 * time.Millisecond
	// retryEvery is the time between two attempts at a port that the host did
	// not give.
	retryEvery = 5 * time.Second
	// maxAuto bounds what a guest can have published: the descriptors are ours.
	maxAuto = 512
)

// served is a port that a server inside listens on.
type served struct {
	Protocol
	port uint16
}

// An autoPort is what has become of one.
type autoPort struct {
	four, six bool
	id        string    // of its forward; "": there is none
	retry     time.Time // when to try again; zero: never
}

// autoTable has the ports that listen inside.
type autoTable struct {
	ports  map[served]autoPort
	told   map[served]bool // of what could not be published
	denied bool            // told of ports below 1024
	many   bool            // told that there are too many
	ended  bool
}

// follow publishes what listens inside until ctx is done.
func (p *publisher) follow(ctx context.Context, ready <-chan struct{}) {
	if p.cfg.PublishAuto == nil {
		return
	}
	select {
	case <-ready:
	case <-ctx.Done():
		return
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for !p.auto.ended {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := p.lookInside(ctx); err != nil {
			if ctx.Err() == nil {
				p.log.Warn("ports are no longer published as they begin to listen", "err", err)
			}
			return
		}
	}
}

// lookInside publishes what has begun to listen, and ends what has stopped.
func (p *publisher) lookInside(ctx context.Context) error {
	if p.cfg.PublishAuto == nil {
		return nil
	}
	in, err := p.inbound(Forward{Protocol: TCP, Guest: netip.AddrPortFrom(netip.Addr{}, 1)})
	if err != nil {
		return err
	}
	addrs := []netip.Addr{in.Guest4.Addr()}
	if in.Guest6.IsValid() {
		addrs = append(addrs, in.Guest6.Addr())
	}
	l, err := p.agent.Listening(addrs...)
	if err != nil {
		return err
	}
	p.update(ctx, p.wanted(&l), l.Cut)
	return nil
}

// wanted returns what is to be published.
func (p *publisher) wanted(l *agent.Listening) map[served]autoPort {
	own := p.explicit()
	wanted := make(map[served]autoPort)
	for _, r := range l.Ports {
		four, six := r.Four, r.Six
		if a := p.cfg.PublishAuto.Addr; a.IsValid() {
			four, six = four && a.Is4(), six && a.Is6()
		}
		six = six && p.cfg.hasIPv6()
		for port := int(r.From); port <= int(r.To) && (four || six); port++ {
			s := served{Protocol(r.Proto), uint16(port)}
			if !own[s] && p.cfg.PublishAuto.wants(s.Protocol, s.port, l) {
				wanted[s] = autoPort{four: four, six: six}
			}
		}
	}
	return wanted
}

// explicit returns the guest's ports that were published by hand: where to is
// the user's choice.
func (p *publisher) explicit() map[served]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := make(map[served]bool)
	for _, e := range p.published {
		if !e.Auto {
			m[served{e.Protocol, e.Guest.Port()}] = true
		}
	}
	return m
}

// update makes what is published what is wanted. A forward that was removed by
// hand stays so until its port stops to listen.
func (p *publisher) update(ctx context.Context, wanted map[served]autoPort, cut bool) {
	t := &p.auto
	if t.ports == nil {
		t.ports, t.told = make(map[served]autoPort), make(map[served]bool)
	}
	for s, have := range t.ports {
		if w, ok := wanted[s]; ok && w.four == have.four && w.six == have.six {
			continue
		}
		delete(t.ports, s)
		if have.id != "" && p.remove(have.id) == nil {
			p.log.Info("a port that listened inside is not published any more", "port", s.port, "protocol", s.Protocol)
		}
	}
	now := time.Now()
	for s, w := range wanted {
		have, known := t.ports[s]
		if known && (have.retry.IsZero() || now.Before(have.retry)) {
			continue
		}
		if !known && len(t.ports) >= maxAuto {
			cut = true
			continue
		}
		t.ports[s] = p.addAuto(ctx, s, w, now)
	}
	if cut && !t.many {
		t.many = true
		p.log.Warn("more ports listen inside than are published by themselves", "limit", maxAuto)
	}
}

// addAuto publishes a port, and returns what has become of it.
func (p *publisher) addAuto(ctx context.Context, s served, w autoPort, now time.Time) autoPort {
	addr := p.cfg.PublishAuto.Addr
	switch {
	case addr.IsValid(), w.four && w.six:
	case w.four:
		addr = netip.IPv4Unspecified()
	default:
		addr = netip.IPv6Unspecified()
	}
	f := Forward{Protocol: s.Protocol, Host: netip.AddrPortFrom(addr, s.port), Guest: netip.AddrPortFrom(netip.Addr{}, s.port)}
	info, err := p.open(ctx, ForwardInfo{Forward: f, Auto: true})
	if err == nil {
		w.id = info.ID
		p.log.Info("a port that listens inside is published", "forward", info.ID, "port", s.port, "protocol", s.Protocol)
		return w
	}
	w.retry = now.Add(retryEvery)
	switch t := &p.auto; {
	case errors.Is(err, ErrNotRunning):
		t.ended = true
	case errors.Is(err, unix.EACCES):
		if !t.denied {
			t.denied = true
			p.log.Warn("ports that listen inside are not published where this user may not have them on the host", "err", p.explain(f, err))
		}
	case !t.told[s]:
		t.told[s] = true
		p.log.Warn("a port that listens inside is not published", "err", p.explain(f, err))
	}
	return w
}
