package forwarder

import (
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// spliceFlow is a client's connection to a published port, joined to a socket
// inside the guest's namespace. Its bytes pass from one kernel to itself: many
// by splice(2) through a pipe, few through the scratch buffer. It holds a pipe
// only while there is something in it.
type spliceFlow struct {
	t        *inboundTable
	port     *inboundPort
	client   netip.AddrPort
	from, to netip.AddrPort // as the guest sees it
	usage
	host     hostEnd
	guest    spliceEnd
	up, down stream // up is from the guest to the host's client

	// by has made the guest's end out of a connection that the guest has begun,
	// under this number; nil where a client has.
	by     *interior
	number uint32

	connecting bool       // the guest has not answered yet
	survivor   *spliceEnd // will be reset when it has taken what it was sent
	waiting    bool       // in the ready queue
	done       bool
}

// spliceEnd is one of the two sockets, which are watched edge-triggered.
type spliceEnd struct {
	fl *spliceFlow
	source
	slot int32
	// What is known to be ready: cleared by the call that finds nothing, set
	// by the event that follows.
	readable, writable bool
	// mixed: there may be more behind a short read, a FIN or urgent data.
	mixed bool
	// failed: the peer has reset the connection, or is gone.
	failed bool
}

// hostEnd is the end that stands for the flow where flows are listed.
type hostEnd struct{ spliceEnd }

// spliceEvents are what a flow's sockets are watched for.
const spliceEvents = flowEvents | unix.EPOLLPRI

// join makes a flow of a client and the socket that was made for it.
func (t *inboundTable) join(d insideDial, fd int) {
	fl := &spliceFlow{t: t, port: d.port, client: d.client, from: d.from, to: d.to, connecting: true}
	fl.born, fl.last = d.born, d.born
	fl.host.spliceEnd = spliceEnd{fl: fl, source: source{fd: d.fd}, slot: -1, writable: true}
	fl.guest = spliceEnd{fl: fl, source: source{fd: fd}, slot: -1}
	fl.down = stream{src: &fl.host.spliceEnd, dst: &fl.guest, open: true, carry: d.preface}
	fl.up = stream{src: &fl.guest, dst: &fl.host.spliceEnd, open: true}
	t.flows[fl] = struct{}{}
	t.connecting[fl] = t.f.now
	fl.port.connecting++
	t.f.sweepIn(detourAfter)
	t.f.stats.TCPActive.Add(1)
	t.f.stats.TCPTotal.Add(1)
	var err error
	if fl.guest.slot, err = t.f.poll.add(fd, spliceEvents, &fl.guest); err == nil {
		fl.host.slot, err = t.f.poll.add(d.fd, spliceEvents, &fl.host)
	}
	if err != nil {
		t.f.log.Warn("a client of a published port is turned away", "err", err)
		fl.abort()
	}
}

// ready implements pollee.
func (e *spliceEnd) ready(events uint32) {
	fl := e.fl
	if events&(unix.EPOLLIN|unix.EPOLLPRI|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.readable = true
	}
	if events&(unix.EPOLLPRI|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.mixed = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.writable = true
	}
	if events&unix.EPOLLERR != 0 {
		e.failed = true
	}
	if fl.connecting && !fl.connected(e, events) {
		return
	}
	fl.makeReady()
}

// connected looks whether the guest has answered.
func (fl *spliceFlow) connected(e *spliceEnd, events uint32) bool {
	switch {
	case e == &fl.host.spliceEnd:
		if e.failed { // the client has lost patience
			fl.abort()
		}
		return false
	case e.failed && !letIn(soError(e.fd)):
		fl.detour()
		return false
	case !e.failed && (events&unix.EPOLLOUT == 0 || events&unix.EPOLLHUP != 0):
		return false
	}
	fl.connecting = false
	fl.port.letIn = fl.t.f.now
	fl.t.settle(fl)
	return true
}

// settle takes a flow out of those that the guest has not answered.
func (t *inboundTable) settle(fl *spliceFlow) {
	if _, ok := t.connecting[fl]; !ok {
		return
	}
	delete(t.connecting, fl)
	if fl.port.connecting--; fl.port.connecting == maxInsideDials/2 && len(t.paused) > 0 {
		t.resume()
	}
}

// lets reports whether the guest has let a port's clients in just now. Those whom
// it does not answer then have found its queue full, and their sockets ask again
// by themselves: another way would find no more room.
func (p *inboundPort) lets(now time.Time) bool { return now.Sub(p.letIn) < crowdTime }

// letIn reports whether the error of a socket that connects is one of after it
// was let in: its peer may have sent something, and shall not be asked again.
func letIn(errno unix.Errno) bool { return errno == unix.ECONNRESET || errno == unix.EPIPE }

const (
	// detourAfter is how long the guest may take to answer a socket in its own
	// namespace: no wire is between the two.
	detourAfter = 250 * time.Millisecond
	// crowdTime is how long instead, where it answers others: its kernel drops
	// the SYNs that it has no room for, and ours sends them again after 1 and 3 s.
	crowdTime = 5 * time.Second
	// detourFor is how long a port's clients are then led another way.
	detourFor = time.Minute
)

// detour leads a client through netstack whom nobody has let in inside. That is
// the last word where nobody listens; but a guest may pass a port's connections
// on, by DNAT to a container of its own, which knows no way back but the TAP.
func (fl *spliceFlow) detour() {
	t, host, from := fl.t, fl.host.fd, fl.from

	if !fl.guest.failed {
		from = netip.AddrPortFrom(from.Addr(), 0) // somebody still answers the other
	}
	c := arrival{host, fl.client, fl.to, fl.down.carry}
	t.f.poll.release(fl.host.slot, host)
	fl.host.slot, fl.host.fd = -1, -1
	fl.finish()
	t.f.stats.TCPTotal.Add(^uint64(0)) // it is counted anew
	better := fl.port
	if !fl.guest.failed && better.lets(t.f.now) {
		better = nil // it is but crowded
	}
	t.f.tcp.dialGuest(c, t.routed(from), better)
}

func (fl *spliceFlow) makeReady() {
	if !fl.waiting && !fl.done {
		fl.waiting = true
		fl.t.f.ready.push(fl)
	}
}

const (
	// spliceQuantum is what one flow may move in each direction of a turn. It
	// costs spliceCost times less than what goes through netstack.
	spliceQuantum = 1 << 20
	spliceCost    = 4
	// maxSplice bounds one splice into a pipe.
	maxSplice = 1 << 20
)

// pump implements mover.
func (fl *spliceFlow) pump() int {
	fl.waiting = false
	if fl.done || fl.connecting || fl.survivor != nil || fl.emptying() {
		return 0
	}
	n := fl.move(&fl.down, spliceQuantum)
	fl.usage.down += uint64(n)
	fl.t.f.stats.BytesDown.Add(uint64(n))
	if !fl.done {
		up := fl.move(&fl.up, spliceQuantum)
		fl.usage.up += uint64(up)
		fl.t.f.stats.BytesUp.Add(uint64(up))
		n += up
	}
	if n > 0 {
		fl.moved(fl.t.f)
	}
	if fl.done {
		return n / spliceCost
	}
	for _, s := range []*stream{&fl.up, &fl.down} {
		if s.src.failed && !s.open {
			// Nothing will be read that would tell.
			fl.reset(s.dst)
			return n / spliceCost
		}
	}
	if fl.up.ready() || fl.down.ready() {
		fl.makeReady()
	}
	return n / spliceCost
}

// stream is one direction of a flow.
type stream struct {
	src, dst *spliceEnd
	open     bool // FIN not yet passed on
	bulk     bool // the last read filled the scratch buffer
	pipe     *pipe
	pending  int    // bytes in pipe
	carry    []byte // what was read and not taken; at most scratchSize
}

// ready reports whether there is something to do at once.
func (s *stream) ready() bool {
	return s.open && s.dst.writable && (s.src.readable || s.pending > 0 || len(s.carry) > 0)
}

// move moves about limit bytes, and returns how many the destination took.
func (fl *spliceFlow) move(s *stream, limit int) (moved int) {
	for moved < limit && s.ready() && !fl.done && fl.survivor == nil {
		switch {
		case s.pending > 0:
			moved += fl.empty(s)
		case len(s.carry) > 0:
			n := fl.send(s, s.carry, false)
			if s.carry = s.carry[n:]; len(s.carry) == 0 {
				s.carry = nil
			}
			moved += n
		case s.bulk:
			fl.fill(s)
		default:
			moved += fl.read(s)
		}
	}
	return moved
}

// read passes on what fits into the scratch buffer.
func (fl *spliceFlow) read(s *stream) int {
	b := fl.t.f.tcp.relay.scratch[:]
	n, errno := s.src.source.read(b, s.src.mixed, fl.t.f.clock())
	switch {
	case errno == unix.EAGAIN:
		s.src.readable = false
		return 0
	case errno != 0:
		fl.reset(s.dst)
		return 0
	case n == 0:
		fl.eof(s)
		return 0
	}
	s.bulk = n == len(b)
	end := false
	switch {
	case s.bulk:
	case !s.src.mixed:
		s.src.readable = false // the next byte is an edge
	default:
		// It leaves with the bytes, in one packet.
		var more int
		more, end = fl.readEnd(s.src, b[n:])
		n += more
	}
	m := fl.send(s, b[:n], end)
	if m < n && s.open {
		s.carry = append([]byte(nil), b[m:n]...)
	}
	if end && m == n {
		fl.eof(s)
	}
	return m
}

// readEnd looks whether an end follows what was read of e.
func (fl *spliceFlow) readEnd(e *spliceEnd, b []byte) (n int, end bool) {
	n, errno := rawRecv(e.fd, b, 0)
	switch {
	case errno == unix.EAGAIN:
		e.readable = false
		return 0, false
	case errno != 0:
		e.failed = true // which the next read does not hear of again
		return 0, false
	}
	return n, n == 0 && !e.failed
}

// send gives b to the destination and returns how much it took. more says that
// something is to follow, which lets the kernel wait for it.
func (fl *spliceFlow) send(s *stream, b []byte, more bool) int {
	flags := 0
	if more {
		flags = unix.MSG_MORE
	}
	n, errno := rawSend(s.dst.fd, b, flags)
	switch errno {
	case 0:
		s.dst.asked = true
		return n
	case unix.EAGAIN:
		s.dst.writable = false
	default:
		fl.failed(s.dst)
	}
	return 0
}

// fill takes what the source holds into a pipe.
func (fl *spliceFlow) fill(s *stream) {
	if errno := s.src.consume(); errno != 0 {
		fl.reset(s.dst)
		return
	}
	p := fl.t.pipes.get()
	if p == nil {
		s.bulk = false
		return
	}
	n, errno := rawSplice(s.src.fd, p.w, maxSplice)
	switch {
	case errno == 0 && n > 0:
		s.pipe, s.pending = p, n
		return
	case errno == 0:
		fl.eof(s)
	case errno == unix.EAGAIN:
		s.bulk = false // read knows more of what splice does not move, as urgent data
	default:
		fl.reset(s.dst)
	}
	fl.t.pipes.put(p)
}

// empty gives what the pipe holds to the destination.
func (fl *spliceFlow) empty(s *stream) int {
	n, errno := rawSplice(s.pipe.r, s.dst.fd, s.pending)
	switch {
	case errno == unix.EAGAIN:
		s.dst.writable = false
		return 0
	case errno != 0 || n == 0:
		fl.failed(s.dst)
		return 0
	}
	if s.pending -= n; s.pending == 0 {
		fl.t.pipes.put(s.pipe)
		s.pipe = nil
	}
	return n
}

// shut forgets what a stream has yet to deliver.
func (fl *spliceFlow) shut(s *stream) {
	s.open, s.carry = false, nil
	if s.pipe != nil {
		fl.t.pipes.drop(s.pipe)
		s.pipe, s.pending = nil, 0
	}
}

// eof passes a FIN on.
func (fl *spliceFlow) eof(s *stream) {
	if s.src.failed {
		fl.reset(s.dst)
		return
	}
	s.open = false
	if !fl.up.open && !fl.down.open {
		fl.end()
		return
	}
	unix.Shutdown(s.dst.fd, unix.SHUT_WR)
	fl.t.half[fl] = fl.t.f.now
}

// failed handles an end that takes no more. What it sent before may still be in
// its socket, and is the other's.
func (fl *spliceFlow) failed(e *spliceEnd) {
	towards, from := &fl.down, &fl.up
	if e == &fl.host.spliceEnd {
		towards, from = from, towards
	}
	fl.shut(towards)
	e.failed, e.mixed, e.readable = true, true, true
	if !from.open {
		fl.reset(from.dst)
		return
	}
	fl.t.half[fl] = fl.t.f.now
	fl.makeReady()
}

// reset resets an end as soon as it has taken what it was sent: a reset
// overtakes what is in the socket's buffer.
func (fl *spliceFlow) reset(e *spliceEnd) {
	if fl.done || fl.survivor != nil {
		return
	}
	fl.shut(&fl.up)
	fl.shut(&fl.down)
	fl.survivor = e
	if unsent(e.fd) == 0 {
		fl.abort()
		return
	}
	fl.t.draining[fl] = fl.t.f.now.Add(drainTime)
	fl.t.f.sweepIn(drainPoll)
}

// abort resets both ends and forgets the flow.
func (fl *spliceFlow) abort() {
	for _, fd := range []int{fl.host.fd, fl.guest.fd} {
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	fl.finish()
}

// finish closes both ends and forgets the flow.
func (fl *spliceFlow) finish() {
	if fl.done {
		return
	}
	fl.done = true
	fl.shut(&fl.up)
	fl.shut(&fl.down)
	t := fl.t
	for _, e := range []*spliceEnd{&fl.host.spliceEnd, &fl.guest} {
		if e.slot >= 0 {
			t.f.poll.remove(e.slot)
		}
		if e.fd >= 0 {
			unix.Close(e.fd)
		}
	}
	delete(t.flows, fl)
	t.settle(fl)
	delete(t.draining, fl)
	delete(t.half, fl)
	t.f.stats.TCPActive.Add(-1)
	fl.release()
}

// describe implements subject.
func (e *hostEnd) describe(to *Flow) {
	fl := e.fl
	to.Proto, to.Inbound, to.State = TCP, fl.by == nil, fl.stateName()
	to.Guest, to.Remote, to.Dialled = fl.to, fl.from, fl.client
	fl.usage.describe(fl.t.f, to)
}

func (fl *spliceFlow) stateName() string {
	switch {
	case fl.connecting:
		return StateAccepting
	case fl.survivor != nil || fl.emptying():
		return StateClosing
	case fl.up.open && fl.down.open:
		return StateEstablished
	case fl.up.open:
		return StateHostClosed
	}
	return StateGuestClosed
}

// kill implements subject.
func (e *hostEnd) kill() { e.fl.abort() }

// pipe is one, with nothing in it when it is in the pool.
type pipe struct{ r, w int }

// pipePool has the pipes of all flows.
type pipePool struct {
	free  []*pipe
	total int
	idle  bool // not used since the last trim
}

const (
	// maxPipes bounds what flows whose destination has stalled can hold.
	// Others do without, by the scratch buffer.
	maxPipes = 128
	// pipeSize times maxPipes stays below what the kernel lets a user have
	// (pipe-user-pages-soft).
	pipeSize = 256 << 10
)

// get returns an empty pipe, or nil if there are too many.
func (p *pipePool) get() *pipe {
	p.idle = false
	if n := len(p.free); n > 0 {
		x := p.free[n-1]
		p.free = p.free[:n-1]
		return x
	}
	if p.total == maxPipes {
		return nil
	}
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC) != nil {
		return nil
	}
	unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	p.total++
	return &pipe{fds[0], fds[1]}
}

// put gives an empty pipe back.
func (p *pipePool) put(x *pipe) { p.free = append(p.free, x) }

// drop gives up a pipe with something in it.
func (p *pipePool) drop(x *pipe) {
	unix.Close(x.r)
	unix.Close(x.w)
	p.total--
}

// trim closes the pipes that nobody needs.
func (p *pipePool) trim() {
	if p.idle {
		p.close()
	}
	p.idle = true
}

func (p *pipePool) close() {
	for _, x := range p.free {
		p.drop(x)
	}
	p.free = nil
}

func rawSplice(from, to, n int) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}

func rawSend(fd int, b []byte, flags int) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(flags|unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL), 0, 0)
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}
