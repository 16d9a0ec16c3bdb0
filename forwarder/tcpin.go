package forwarder

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// dialGuest leads a client of a published port to the guest through netstack,
// which takes from, the address that the guest sees, for one of its own. If the
// guest lets the client in, detour, unless nil, is a port that this way suits
// better.
func (t *tcpTable) dialGuest(c arrival, from netip.AddrPort, detour *inboundPort) {
	fd, client, to := c.fd, c.client, c.to
	fl := &tcpFlow{t: t, source: source{fd: fd}, client: client, detour: detour, inbound: true, connecting: true, hostWritable: true, upOpen: true, downOpen: true}
	if len(c.preface) > 0 {
		fl.carry, fl.hostReadable = c.preface, true // there is something to do, though not to read
	}
	fl.born = t.f.clock()
	fl.last = fl.born
	var err error
	if fl.slot, err = t.f.poll.add(fd, flowEvents, fl); err != nil {
		t.f.log.Warn("a client of a published port is turned away", "err", err)
		closeWithReset(fd)
		return
	}
	if err := t.connectGuest(fl, from, to); err != nil {
		t.f.log.Debug("cannot reach the guest", "client", client, "guest", to, "err", err)
		fl.done = true
		t.f.poll.remove(fl.slot)
		closeWithReset(fd)
		return
	}
	t.flows[fl] = struct{}{}
	t.f.stats.TCPActive.Add(1)
	t.f.stats.TCPTotal.Add(1)
}

// connectGuest makes the flow's endpoint and has it connect.
func (t *tcpTable) connectGuest(fl *tcpFlow, from, to netip.AddrPort) tcpip.Error {
	ns := t.f.cfg.Netstack
	t.netstack() // settles the size of buffers
	proto := ipv4.ProtocolNumber
	if to.Addr().Is6() {
		proto = ipv6.ProtocolNumber
	}
	ep, err := ns.NewEndpoint(tcp.ProtocolNumber, proto, &fl.wq)
	if err != nil {
		return err
	}
	ep.SocketOptions().SetReuseAddress(true)
	ep.SocketOptions().SetReceiveBufferSize(int64(bufferSizes[t.size].receive), true)
	local := tcpip.FullAddress{Addr: tcpip.AddrFromSlice(from.Addr().AsSlice()), Port: from.Port()}
	for id := range ns.NICInfo() {
		local.NIC = id
	}
	if err = ep.Bind(local); err != nil && local.Port != 0 {
		local.Port = 0 // taken inside: from any other
		err = ep.Bind(local)
	}
	if err != nil {
		ep.Close()
		return err
	}
	// The events are those of a flow of the guest's, once it is open.
	fl.ep = ep
	fl.entry.Init(fl, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	fl.wq.EventRegister(&fl.entry)
	err = ep.Connect(tcpip.FullAddress{NIC: local.NIC, Addr: tcpip.AddrFromSlice(to.Addr().AsSlice()), Port: to.Port()})
	if _, started := err.(*tcpip.ErrConnectStarted); !started && err != nil {
		fl.wq.EventUnregister(&fl.entry)
		ep.Close()
		return err
	}
	fl.connection.guest = to
	if a, err := ep.GetLocalAddress(); err == nil {
		fl.remote = netip.AddrPortFrom(addrOf(a.Addr), a.Port)
	}
	return nil
}

// answered looks whether the guest has answered, and reports whether it let the
// client in.
func (fl *tcpFlow) answered() bool {
	switch tcp.EndpointState(fl.ep.State()) {
	case tcp.StateInitial, tcp.StateBound, tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
		return false
	case tcp.StateError, tcp.StateClose:
		fl.t.f.stats.Refused.Add(1)
		fl.resetHost()
		return false
	}
	fl.connecting = false
	if fl.detour != nil {
		fl.detour.detour = fl.t.f.now.Add(detourFor)
	}
	return true
}

// lostPatience ends a flow whose client has reset the connection before the
// guest has answered.
func (fl *tcpFlow) lostPatience(events uint32) {
	if events&unix.EPOLLERR != 0 {
		fl.ep.Abort()
		fl.resetHost()
	}
}
