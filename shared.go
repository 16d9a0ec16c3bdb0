package usernet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/usernet/usernet/dhcp"
	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/tap"
)

// memberOrder is a guest of a shared network, as a worker has to know it. The
// descriptor of its link comes beside it.
type memberOrder struct {
	Number    uint64 // to take it back
	MAC       net.HardwareAddr
	Addrs     []netip.Addr
	AnySource bool
	Isolated  bool
}

// sharedPorts are the guests of a gateway that has many.
type sharedPorts struct {
	sw *tap.Switch

	mu     sync.Mutex // guards following
	guests map[uint64]*sharedPort
}

type sharedPort struct {
	memberOrder
	port *tap.Port
	used []netip.Addr // that sockets are made for inside
}

// newSharedGateway joins the rooms on a switch, whose ports come and go.
func newSharedGateway(c Config, link agent.Link, s seed, h hooks) (*gateway, error) {
	sw, err := tap.NewSwitch(tap.SwitchOptions{
		MTU: link.MTU, MAC: gatewayMAC(c.Addresses().Gateway4), VnetHdr: link.VnetHdr, HoldAcks: true,
	})
	if err != nil {
		return nil, err
	}
	g, err := joinRooms(c, link, s, h, sw, sw.Endpoint)
	if err != nil {
		return nil, err
	}
	g.shared = &sharedPorts{sw: sw, guests: make(map[uint64]*sharedPort)}
	return g, nil
}

var errNotShared = errors.New("this gateway has one guest")

// join takes a guest in, whose descriptor is the gateway's if there is no error.
// It reports whether that guest was there before.
func (g *gateway) join(o memberOrder, fd int, gone func()) (again bool, err error) {
	s := g.shared
	if s == nil {
		return false, errNotShared
	}
	if len(o.MAC) != 6 {
		return false, errors.New("the MAC address is none of Ethernet")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.guests[o.Number] != nil {
		return true, nil
	}
	p := &sharedPort{memberOrder: o}
	p.port, err = s.sw.Add(tap.PortOptions{
		FD: fd, MAC: [6]byte(o.MAC), Addrs: o.Addrs, AnySource: o.AnySource, Isolated: o.Isolated, Gone: gone,
	})
	if err != nil {
		return false, err
	}
	s.guests[o.Number] = p
	for _, a := range o.Addrs {
		g.stack.SetNeighbor(a, [6]byte(o.MAC))
		var err error
		if a.Is4() {
			err = g.dhcp4.Reserve(dhcp.Reservation{LinkAddr: o.MAC, Addr: a})
		} else if g.dhcp6 != nil {
			err = g.dhcp6.Reserve(dhcp.Reservation{LinkAddr: o.MAC, Addr: a})
		}
		if err != nil {
			g.log.Warn("a DHCP client of this member will not find its address", "address", a, "err", err)
		}
	}
	return false, nil
}

// leave takes back all that a guest has.
func (g *gateway) leave(ctx context.Context, number uint64) {
	s := g.shared
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.guests[number]
	if p == nil {
		return
	}
	delete(s.guests, number)
	s.sw.Remove(p.port)
	for _, a := range p.used {
		_ = g.fwd.DropInside(ctx, a)
	}
	g.dhcp4.Unreserve(p.MAC)
	if g.dhcp6 != nil {
		g.dhcp6.Unreserve(p.MAC)
	}
	if flows, err := g.fwd.Flows(ctx); err == nil {
		for _, f := range flows {
			if slices.Contains(p.Addrs, f.Guest.Addr()) {
				_ = g.fwd.KillFlow(ctx, f.ID)
			}
		}
	}
	for _, a := range p.Addrs {
		g.stack.ForgetNeighbor(a)
	}
}

// insideOrder says for which of a guest's addresses sockets can be had inside.
type insideOrder struct {
	Member uint64
	Inside agent.Inside
	Own    []netip.Addr
}

// openMember uses the way into one of many guests.
func (g *gateway) openMember(ctx context.Context, o insideOrder, fd int) error {
	in := agent.NewSockets(fd, o.Inside)
	s := g.shared
	if s == nil {
		in.Close()
		return errNotShared
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.guests[o.Member]
	if p == nil {
		in.Close()
		return errors.New("no such member")
	}
	p.used = o.Own
	return g.fwd.UseInside(ctx, inside{in}, o.Own...)
}

// stats counts what passes between guests.
func (s *sharedPorts) stats() *SwitchStats {
	c := s.sw.SwitchStats()
	return &SwitchStats{
		Members: s.sw.Ports(), Forwarded: c.Forwarded.Load(), ForwardedBytes: c.ForwardedBytes.Load(),
		Flooded: c.Flooded.Load(), FloodLimited: c.FloodLimited.Load(), Spoofed: c.Spoofed.Load(),
		Isolated: c.Isolated.Load(), Unknown: c.Unknown.Load(), Refused: c.Refused.Load(),
	}
}

// remoteMember is a guest of a shared network. Its link lives longer than a worker.
type remoteMember struct {
	memberOrder
	fd   int
	gone func() // called when the link is
}

// addMember has this worker, and those that follow, serve a guest, whose link's
// descriptor is r's if there is no error. It returns where the guest shall look
// names up.
func (r *remote) addMember(ctx context.Context, o memberOrder, fd int, gone func()) (number uint64, search []string, err error) {
	r.mu.Lock()
	if r.members == nil {
		r.mu.Unlock()
		return 0, nil, ErrNotRunning
	}
	r.last++
	o.Number = r.last
	r.members[o.Number] = &remoteMember{o, fd, gone}
	r.mu.Unlock()
	for {
		// A worker that has begun meanwhile knows it already.
		err = r.call(ctx, opMember, o, &search, fd)
		if !errors.Is(err, ErrNotRunning) || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		r.dropMember(o.Number)
		return 0, nil, err
	}
	return o.Number, search, nil
}

// removeMember gives a guest's link up.
func (r *remote) removeMember(number uint64) {
	if m := r.dropMember(number); m != nil {
		closeFD(m.fd)
	}
}

func (r *remote) dropMember(number uint64) *remoteMember {
	r.mu.Lock()
	m, w := r.members[number], r.current
	delete(r.members, number)
	r.mu.Unlock()
	if w != nil {
		_ = w.Note(opLeave, number)
	}
	return m
}

// openMember passes the way into a guest on. The next worker needs another one:
// answers for this one may be under way.
func (r *remote) openMember(ctx context.Context, o insideOrder, fd int) error {
	defer closeFD(fd)
	return r.call(ctx, opOpenMember, o, nil, fd)
}

// forget takes a published port back, without waiting for the worker.
func (r *remote) forget(id uint64) {
	r.mu.Lock()
	p, w := r.ports[id], r.current
	delete(r.ports, id)
	var number uint64
	if p != nil {
		number = p.id
	}
	r.mu.Unlock()
	if p == nil {
		return
	}
	closeAll(p.fds)
	if w != nil {
		_ = w.Note(opUnpublish, number)
	}
}

// noteRecord has this worker, and those that follow, answer a name, without
// waiting. None takes the name back.
func (r *remote) noteRecord(name string, addrs []netip.Addr) {
	r.keepRecord(name, addrs)
	r.mu.Lock()
	w := r.current
	r.mu.Unlock()
	if w != nil {
		tellRecord(w, name, addrs)
	}
}

func tellRecord(w *incarnation, name string, addrs []netip.Addr) {
	if len(addrs) == 0 {
		_ = w.Note(opRemRecord, name)
		return
	}
	_ = w.Note(opSetRecord, recordOrder{name, addrs})
}

// tellRecords tells a worker which names have changed since it was started.
func tellRecords(w *incarnation, before, now map[string][]netip.Addr) {
	for name := range before {
		if _, ok := now[name]; !ok {
			tellRecord(w, name, nil)
		}
	}
	for name, addrs := range now {
		if !slices.Equal(addrs, before[name]) {
			tellRecord(w, name, addrs)
		}
	}
}
