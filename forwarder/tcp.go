package forwarder

import (
	"math"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/usernet/usernet/internal/congestion"
)

// tcpTable holds the TCP flows of a Forwarder.
type tcpTable struct {
	f     *Forwarder
	sizes [len(bufferSizes)]*tcp.Forwarder
	size  int // index of what new flows get
	relay relay

	dials map[stack.TransportEndpointID]*dial
	flows map[*tcpFlow]struct{}
	// draining are flows of which one end has been reset, as the other will be
	// once it has what was sent before, or at the time given.
	draining map[*tcpFlow]time.Time
	// half are flows that are closed in one direction, and since when.
	half map[*tcpFlow]time.Time

	// handing are flows that are being handed over, by the question to their
	// Inside where that was asked.
	handing []*tcpFlow
	asked   map[uint32]*tcpFlow
	cut     []cutFlow

	tracks tracks
	ended  []*tcpFlow // whose endpoints are not gone
	unsure fifo       // flows on the fast path that await an acknowledgement
	spare  [][]byte   // memory for fast paths
	burst  burst

	mu        sync.Mutex                             // guards following
	accepting map[stack.TransportEndpointID]*tcpFlow // handshakes under way
}

// bufferSizes are the buffers of a flow's netstack endpoint, by how many flows
// there are when it begins: few get what fills any link, many share what memory
// a machine can spare for readers that stall. They are limits, an idle flow
// holds none of it. Half the receive buffer is advertised as the window.
var bufferSizes = [...]struct{ flows, receive, send int }{
	{32, 2 << 20, 1 << 20},
	{128, 512 << 10, 512 << 10},
	{1024, 256 << 10, 256 << 10},
	{math.MaxInt, 128 << 10, 128 << 10},
}

func (t *tcpTable) init(f *Forwarder) {
	t.f = f
	for i, b := range bufferSizes {
		t.sizes[i] = tcp.NewForwarder(f.cfg.Netstack, b.receive, 2*f.cfg.MaxDials, t.accept)
	}
	t.setSendBuffer()
	t.dials = make(map[stack.TransportEndpointID]*dial)
	t.flows = make(map[*tcpFlow]struct{})
	t.draining = make(map[*tcpFlow]time.Time)
	t.half = make(map[*tcpFlow]time.Time)
	t.accepting = make(map[stack.TransportEndpointID]*tcpFlow)
	t.asked = make(map[uint32]*tcpFlow)
	t.tracks.flows = make(map[connection]*tcpFlow)
}

// netstack returns what completes the handshake of the next flow.
func (t *tcpTable) netstack() *tcp.Forwarder {
	n := len(t.flows)
	for t.size > 0 && n < bufferSizes[t.size-1].flows/2 {
		t.size--
		t.setSendBuffer()
	}
	for n >= bufferSizes[t.size].flows {
		t.size++
		t.setSendBuffer()
	}
	return t.sizes[t.size]
}

// setSendBuffer sets the send buffer of endpoints to come.
func (t *tcpTable) setSendBuffer() {
	b := bufferSizes[t.size].send
	o := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: b, Max: b}
	if err := t.f.cfg.Netstack.SetTransportProtocolOption(tcp.ProtocolNumber, &o); err != nil {
		t.f.log.Warn("cannot set TCP send buffers", "err", err)
	}
}

// HandleTCP takes a segment that belongs to no flow. It is netstack's handler
// for such segments and reports whether it has consumed it; netstack answers
// the others with a reset.
func (f *Forwarder) HandleTCP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	t := &f.tcp
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize {
		return true
	}
	flags := h.Flags()
	if d := t.dials[id]; d != nil {
		if flags.Contains(header.TCPFlagRst) {
			d.drop()
		}
		return true // a repeated SYN: the answer is still on its way
	}
	if !flags.Contains(header.TCPFlagSyn) || flags&(header.TCPFlagAck|header.TCPFlagRst|header.TCPFlagFin) != 0 {
		return false
	}
	to := netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort)
	if to.Port() == 0 {
		return false
	}
	t.mu.Lock()
	accepting := t.accepting[id] != nil
	t.mu.Unlock()
	if accepting {
		return true // a repeated SYN: the answer is being written
	}
	guest := netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort)
	t.tracks.forget(connection{guest, to})
	server, reversed := f.reversed(to)
	dst, v := server.Addr, Verdict{}
	if !reversed {
		dst, v = f.policy.Resolve(TCP, to)
	} else if dst.IsValid() {
		v = f.policy.denies(TCP, dst)
	}
	if v.Reason != Allowed {
		f.denied(TCP, guest, to, dst, v)
		return t.refuse(id, pkt, f.policy.refusal())
	}
	if len(t.dials) >= f.cfg.MaxDials {
		f.stats.DialsDropped.Add(1)
		return true
	}
	if !reversed {
		server = Server{Addr: dst}
	}
	if server.Path != "" && f.cfg.DialPath != nil {
		t.await(id, pkt, server.Path)
		return true
	}
	fd, errno := f.dialServer(server)
	switch errno {
	case 0:
		return t.establish(id, pkt, fd, -1, 0)
	case unix.EINPROGRESS:
	default:
		f.scarce(errno)
		f.stats.Refused.Add(1)
		return t.refuse(id, pkt, errno)
	}
	d := &dial{t: t, id: id, fd: fd, born: f.clock()}
	slot, err := f.poll.add(fd, flowEvents, d)
	if err != nil {
		unix.Close(fd)
		return t.refuse(id, pkt, unix.ENOMEM)
	}
	d.slot, d.syn = slot, pkt.IncRef()
	t.dials[id] = d
	f.stats.Dialing.Add(1)
	return true
}

// flowEvents are what a TCP socket is watched for. Edge-triggered: the relay
// remembers what is ready, so that no flow costs a system call to change its
// mind.
const flowEvents = unix.EPOLLIN | unix.EPOLLPRI | unix.EPOLLOUT | unix.EPOLLRDHUP | 1<<31 // EPOLLET

// dialTCP starts to connect to dst. EINPROGRESS comes with a socket, other
// errors do not.
func (f *Forwarder) dialTCP(dst netip.AddrPort) (int, unix.Errno) {
	fd, errno := rawSocket(family(dst.Addr()), unix.SOCK_STREAM, 0)
	if errno != 0 {
		return -1, errno
	}
	if err := f.cfg.Outbound.Prepare(fd, dst.Addr()); err != nil {
		unix.Close(fd)
		f.log.Warn("outbound address or interface unusable", "dst", dst, "err", err)
		return -1, asErrno(err)
	}
	// Segments go out as the guest sends them, and urgent data stays where
	// it is in the stream.
	setInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	setInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	local := f.onHost(dst.Addr())
	if local {
		congestion.Set(fd, f.congestion)
	}
	var ra rawAddr
	ra.set(dst)
	errno = rawConnect(fd, &ra)
	if errno == unix.EINPROGRESS && local {
		// On this host the handshake took place inside the call. Asking
		// again brings the result without a turn through epoll.
		errno = rawConnect(fd, &ra)
	}
	switch errno {
	case 0, unix.EISCONN:
		return fd, 0
	case unix.EINPROGRESS, unix.EALREADY:
		return fd, unix.EINPROGRESS
	}
	unix.Close(fd)
	return -1, errno
}

// onHost reports whether a is one of this host's addresses.
func (f *Forwarder) onHost(a netip.Addr) bool { return a.IsLoopback() || f.policy.isLocal(a) }

// dial is a connection attempt that the guest waits for. It holds the guest's
// SYN, which is answered when the outcome is known.
type dial struct {
	t    *tcpTable
	id   stack.TransportEndpointID
	syn  *stack.PacketBuffer
	fd   int
	slot int32
	born time.Duration
}

// ready implements pollee: the attempt is over.
func (d *dial) ready(events uint32) {
	if events&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) == 0 {
		return
	}
	t, syn := d.t, d.syn.IncRef()
	defer syn.DecRef()
	slot := d.slot
	if errno := soError(d.fd); errno != 0 {
		d.drop()
		t.f.stats.Refused.Add(1)
		if !t.refuse(d.id, syn, errno) {
			t.reset(d.id, syn)
		}
		return
	}
	delete(t.dials, d.id)
	t.f.stats.Dialing.Add(-1)
	d.syn.DecRef()
	if !t.establish(d.id, syn, d.fd, slot, events) {
		t.reset(d.id, syn)
	}
}

// forget ends the attempt. Its socket stays open.
func (d *dial) forget() {
	delete(d.t.dials, d.id)
	d.t.f.stats.Dialing.Add(-1)
	if d.slot >= 0 {
		d.t.f.poll.remove(d.slot)
	}
	d.syn.DecRef()
}

// drop ends the attempt for good.
func (d *dial) drop() {
	d.forget()
	if d.fd >= 0 {
		unix.Close(d.fd)
	}
}

// refuse tells the guest why its SYN got no connection. It reports false where
// a reset says it best, which is netstack's to send.
func (t *tcpTable) refuse(id stack.TransportEndpointID, syn *stack.PacketBuffer, errno unix.Errno) bool {
	switch errno {
	case unix.ETIMEDOUT:
		return true
	case unix.ECONNREFUSED:
		return false
	}
	remote := addrOf(id.LocalAddress)
	typ, code, ok := t.f.icmpFor(remote, errno)
	if !ok {
		return false
	}
	t.f.guest.SendICMPError(ICMPError{
		Type: typ, Code: code, Guest: addrOf(id.RemoteAddress), Remote: remote,
		Proto: TCP, L4: syn.TransportHeader().Slice()[:8],
	})
	return true
}

// reset answers a SYN with a reset: accept finds no flow for it.
func (t *tcpTable) reset(id stack.TransportEndpointID, syn *stack.PacketBuffer) {
	t.netstack().HandlePacket(id, syn)
}

// establish makes a flow of a connected socket and lets netstack answer the
// guest's SYN. slot is the socket's place in the poller, or -1; events are what
// the poller said with it.
func (t *tcpTable) establish(id stack.TransportEndpointID, syn *stack.PacketBuffer, fd int, slot int32, events uint32) bool {
	fl := &tcpFlow{t: t, source: source{fd: fd}, slot: slot, hostReadable: events&^unix.EPOLLOUT != 0, hostWritable: true, upOpen: true, downOpen: true}
	fl.connection = connection{
		netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort),
		netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort),
	}
	fl.offer.set(syn)
	fl.hostHup = events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0
	fl.urgent = events&unix.EPOLLPRI != 0
	fl.born = t.f.clock()
	fl.last = fl.born
	if slot >= 0 {
		t.f.poll.slots[slot].p = fl
	} else {
		var err error
		if fl.slot, err = t.f.poll.add(fd, flowEvents, fl); err != nil {
			closeWithReset(fd)
			return false
		}
	}
	t.tracks.add(fl, header.TCP(syn.TransportHeader().Slice()))
	t.mu.Lock()
	t.accepting[id] = fl
	t.mu.Unlock()
	if !t.netstack().HandlePacket(id, syn) {
		t.mu.Lock()
		delete(t.accepting, id)
		t.mu.Unlock()
		t.tracks.remove(fl)
		t.f.poll.remove(fl.slot)
		closeWithReset(fd)
		return false
	}
	t.flows[fl] = struct{}{}
	t.f.stats.TCPActive.Add(1)
	t.f.stats.TCPTotal.Add(1)
	return true
}

// accept completes the guest's handshake. Netstack runs it on a goroutine of
// its own, for the microseconds until the guest's ACK.
func (t *tcpTable) accept(r *tcp.ForwarderRequest) {
	id := r.ID()
	t.mu.Lock()
	fl := t.accepting[id]
	t.mu.Unlock()
	if fl == nil {
		r.Complete(true)
		return
	}
	ep, err := r.CreateEndpoint(&fl.wq)
	r.Complete(false)
	t.mu.Lock()
	delete(t.accepting, id)
	t.mu.Unlock()
	if err == nil {
		fl.accepted = ep
	}
	fl.notify(evAccepted)
}

// keepAliveAfter is how long a flow that is closed in one direction may be
// silent before its ends are asked whether they still exist. An end that does
// not answers with a reset, so no half-closed flow outlives both its programs,
// and none is cut off that waits for a slow answer.
const keepAliveAfter = 60 * time.Second

// drainPoll is how often a flow that waits to be reset is looked at.
const drainPoll = 5 * time.Millisecond

// sweep resets what has drained, and has what stays half-closed watched.
func (t *tcpTable) sweep() {
	for fl, since := range t.half {
		if t.f.now.Sub(since) >= sweepEvery {
			fl.keepAlive()
			delete(t.half, fl)
		}
	}
	for fl, deadline := range t.draining {
		late := t.f.now.After(deadline)
		switch {
		case fl.aborted && (late || fl.hostDrained()):
			fl.resetHost()
		case !fl.aborted && (late || fl.drained()):
			fl.ep.Abort()
			fl.finish()
		}
	}
	if len(t.draining) > 0 {
		t.f.sweepIn(drainPoll)
	}
	t.sweepHands()
	t.sweepFast()
	t.sweepEnded()
}

func (t *tcpTable) close() {
	for _, d := range t.dials {
		d.drop()
	}
	for fl := range t.flows {
		fl.kill()
	}
}

func asErrno(err error) unix.Errno {
	if e, ok := err.(unix.Errno); ok {
		return e
	}
	return unix.EIO
}
