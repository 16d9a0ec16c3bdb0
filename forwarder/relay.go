package forwarder

import (
	"errors"
	"io"
	"math"
	"net/netip"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Events of a flow that other goroutines raise.
const (
	evReadable = 1 << iota // the guest sent data or a FIN
	evWritable             // the guest took data
	evHup                  // the guest's end failed or is closed
	evAccepted             // the handshake is over
	evQueued               // the flow is on the run queue
)

// tcpFlow is a connection of the guest and its host socket. Up is from guest to
// host, down the other way. Only the engine touches it, but for ev, wq and,
// until evAccepted is raised, accepted.
type tcpFlow struct {
	t *tcpTable
	connection
	ep       tcpip.Endpoint
	accepted tcpip.Endpoint
	wq       waiter.Queue
	entry    waiter.Entry
	ev       atomic.Uint32
	source   // the host socket
	slot     int32
	usage

	// What is known to be ready. A flag is cleared before or by the call
	// that finds nothing, and set by the event that follows.
	guestReadable, guestWritable bool
	hostReadable, hostWritable   bool
	// hostHup: the host will send no more, so a short read says nothing
	// about the FIN behind it.
	hostHup bool
	// urgent: the host has sent urgent data. Even in line, a read ends before
	// its mark, and one that starts there fails with EAGAIN while a signal is
	// pending (tcp_recvmsg_locked): neither says that there is no more.
	urgent bool
	// hostReset and aborted: the host or the guest has reset the connection.
	hostReset, aborted bool

	upOpen, downOpen bool // FIN not yet passed on in that direction
	bulk             bool // the last read from the host filled the scratch buffer
	waiting          bool // in the ready queue
	done             bool

	// inbound: client has come in by a published port; connecting is set
	// until the guest has answered its SYN.
	client              netip.AddrPort
	inbound, connecting bool
	detour              *inboundPort // of [tcpTable.dialGuest]

	// offer is what the guest's SYN has offered, hand what has been done to hand
	// the flow over.
	offer offer
	hand  hand
	track track // guarded by tracks.mu
	fast  fastPath

	// carry is what was read from the host and did not fit into the guest's
	// send buffer; at most scratchSize.
	carry []byte
}

// NotifyEvent implements waiter.EventListener. Netstack calls it with locks of
// the endpoint held.
func (fl *tcpFlow) NotifyEvent(m waiter.EventMask) {
	var ev uint32
	if m&waiter.ReadableEvents != 0 {
		ev |= evReadable
	}
	if m&waiter.WritableEvents != 0 {
		ev |= evWritable
	}
	if m&(waiter.EventHUp|waiter.EventErr) != 0 {
		ev |= evHup
	}
	fl.notify(ev)
}

// notify raises ev and queues the flow.
func (fl *tcpFlow) notify(ev uint32) {
	if fl.ev.Or(ev|evQueued)&evQueued == 0 {
		fl.t.f.enqueue(fl)
	}
}

// ready implements pollee for the host socket.
func (fl *tcpFlow) ready(events uint32) {
	if events&(unix.EPOLLIN|unix.EPOLLPRI|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		fl.hostReadable = true
	}
	if events&unix.EPOLLPRI != 0 {
		fl.urgent = true
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		fl.hostHup = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		fl.hostWritable = true
	}
	if !fl.plain() {
		fl.leaveFast()
	}
	if fl.connecting {
		fl.lostPatience(events)
		return
	}
	fl.t.f.makeReady(fl)
}

// take takes in what other goroutines have raised.
func (fl *tcpFlow) take() {
	ev := fl.ev.Swap(0)
	if fl.done {
		if ev&evAccepted != 0 && fl.accepted != nil {
			fl.accepted.Abort()
		}
		return
	}
	if ev&evAccepted != 0 {
		if fl.accepted == nil {
			fl.resetHost() // the guest went away during its handshake
			return
		}
		fl.ep = fl.accepted
		fl.t.f.guest.Established()
		fl.entry.Init(fl, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
		fl.wq.EventRegister(&fl.entry)
		ev |= evReadable | evWritable
	}
	if ev&evReadable != 0 {
		fl.guestReadable = true
	}
	if ev&evWritable != 0 {
		fl.guestWritable = true
	}
	if fl.connecting && !fl.answered() {
		return
	}
	if ev&evHup != 0 && fl.guestGone() {
		fl.downOpen, fl.guestReadable = false, true
		fl.pumpUp(math.MaxInt)
		if !fl.done {
			fl.drainHost()
		}
		return
	}
	fl.t.f.makeReady(fl)
}

// guestGone reports whether the guest's end was reset or timed out. An endpoint
// whose both FINs are acknowledged is closed too, and may still hold data that
// the host has yet to take; only its error tells the two apart.
func (fl *tcpFlow) guestGone() bool {
	switch tcp.EndpointState(fl.ep.State()) {
	case tcp.StateError:
		return true
	case tcp.StateClose:
		fl.aborted = fl.aborted || fl.ep.LastError() != nil
		return fl.aborted
	}
	return false
}

// pump implements mover.
func (fl *tcpFlow) pump() int {
	fl.waiting = false
	if fl.ep == nil || fl.done || fl.connecting || fl.hand.state == handAsked {
		return 0
	}
	up, down := fl.pumpUp(flowQuantum), 0
	waits := fl.hand.state == handWaits
	if !fl.done && !waits {
		down = fl.pumpDown(flowQuantum)
	}
	n := up + down
	if n > 0 {
		fl.moved(fl.t.f)
		if !fl.done {
			fl.t.consider(fl, up, down)
		}
	}
	if fl.upOpen && fl.guestReadable && fl.hostWritable || fl.downOpen && fl.hostReadable && fl.guestWritable && !waits {
		fl.t.f.makeReady(fl)
	}
	return n
}

// relay is the working memory of all flows.
type relay struct {
	iov     vector
	scratch [scratchSize]byte
	header  [stampedSize]byte
	msg     unix.Msghdr
	discard discard
	small   bytesPayload
	large   sockPayload
}

const (
	// scratchSize is how much is read from a host socket on the chance that
	// it is all there is: one copy of a small answer is cheaper than asking
	// for its length first.
	scratchSize = 16 << 10
	// superPayload is what netstack puts into a full super-frame.
	superPayload = math.MaxUint16 - header.TCPTotalHeaderMaximumSize - 1
	// maxRead bounds one read from a host socket into netstack's buffers.
	maxRead = 2 * superPayload
)

// pumpUp sends what the guest has sent to the host, until about limit bytes are
// moved, and returns how many were.
func (fl *tcpFlow) pumpUp(limit int) (moved int) {
	r := &fl.t.relay
	v := &r.iov
	for moved < limit && fl.upOpen && fl.guestReadable && fl.hostWritable {
		fl.guestReadable = false
		v.reset()
		_, err := fl.ep.Read(v, tcpip.ReadOptions{Peek: true})
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return
		case *tcpip.ErrClosedForReceive:
			if fl.guestGone() {
				fl.upOpen = false
				fl.drainHost()
				return
			}
			fl.guestFIN()
			return
		default:
			fl.upOpen = false
			fl.drainHost()
			return
		}
		full := v.full
		r.msg.Iov, r.msg.Iovlen = &v.iov[0], uint64(v.n)
		n, errno := rawSendmsg(fl.fd, &r.msg)
		switch errno {
		case 0:
		case unix.EAGAIN:
			fl.guestReadable, fl.hostWritable = true, false
			return
		default:
			fl.hostFailed()
			return
		}
		fl.sentUp(n)
		moved += n
		r.discard = discard(n)
		fl.ep.Read(&r.discard, tcpip.ReadOptions{})
		if n < v.size {
			// The socket's buffer is full; EPOLLOUT will say when
			// it is not.
			fl.guestReadable, fl.hostWritable = true, false
			return
		}
		if full || finReceived(fl.ep) {
			fl.guestReadable = true
		}
	}
	return moved
}

// sentUp notes that the host has been sent n bytes.
func (fl *tcpFlow) sentUp(n int) {
	fl.t.f.stats.BytesUp.Add(uint64(n))
	fl.up += uint64(n)
	fl.asked = true
}

// finReceived reports whether the guest's FIN has arrived, whose notification
// may have come with that of the last data.
func finReceived(ep tcpip.Endpoint) bool {
	switch tcp.EndpointState(ep.State()) {
	case tcp.StateCloseWait, tcp.StateLastAck, tcp.StateClosing, tcp.StateTimeWait, tcp.StateError, tcp.StateClose:
		return true
	}
	return false
}

// guestFIN passes the guest's FIN on.
func (fl *tcpFlow) guestFIN() {
	fl.upOpen = false
	if fl.downOpen {
		unix.Shutdown(fl.fd, unix.SHUT_WR)
		fl.halfClosed()
		return
	}
	fl.finish()
}

// hostFIN passes the host's FIN on.
func (fl *tcpFlow) hostFIN() {
	fl.leaveFast()
	fl.downOpen = false
	fl.ep.Shutdown(tcpip.ShutdownWrite)
	if fl.upOpen {
		fl.halfClosed()
		return
	}
	fl.finish()
}

// halfClosed notes that one direction has ended. Mostly the other ends at once;
// where it does not, sweep calls keepAlive.
func (fl *tcpFlow) halfClosed() { fl.t.half[fl] = fl.t.f.now }

// keepAlive has both kernels probe their ends from now on.
func (fl *tcpFlow) keepAlive() {
	const secs = int(keepAliveAfter / time.Second)
	setInt(fl.fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, secs)
	setInt(fl.fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, secs/4)
	setInt(fl.fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4)
	setInt(fl.fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	idle := tcpip.KeepaliveIdleOption(keepAliveAfter)
	interval := tcpip.KeepaliveIntervalOption(keepAliveAfter / 4)
	fl.ep.SetSockOpt(&idle)
	fl.ep.SetSockOpt(&interval)
	fl.ep.SetSockOptInt(tcpip.KeepaliveCountOption, 4)
	fl.ep.SocketOptions().SetKeepAlive(true)
}

// pumpDown sends what the host has sent to the guest, until about limit bytes are
// moved, and returns how many were.
func (fl *tcpFlow) pumpDown(limit int) (moved int) {
	for moved < limit && fl.downOpen && fl.hostReadable && fl.guestWritable {
		var n int
		var errno unix.Errno
		switch {
		case len(fl.carry) > 0:
			n = fl.writeSmall(fl.carry)
			fl.carry = fl.carry[n:]
			if len(fl.carry) == 0 {
				fl.carry = nil
			}
		case fl.bulk:
			n, errno = fl.readBulk()
		default:
			n, errno = fl.readSmall()
		}
		if fl.done {
			return
		}
		moved += n
		fl.t.f.stats.BytesDown.Add(uint64(n))
		fl.down += uint64(n)
		switch errno {
		case 0:
		case unix.EAGAIN:
			fl.hostReadable = fl.urgent && queued(fl.fd) > 0
		default:
			fl.hostFailed()
			return
		}
	}
	return moved
}

// readSmall reads what fits into the scratch buffer and passes it on.
func (fl *tcpFlow) readSmall() (int, unix.Errno) {
	b := fl.t.relay.scratch[:]
	n, errno := fl.source.read(b, fl.hostHup || fl.urgent, fl.t.f.clock())
	if errno != 0 {
		return 0, errno
	}
	if n == 0 {
		fl.hostEOF()
		return 0, 0
	}
	fl.bulk = n == len(b)
	if !fl.bulk && !fl.hostHup && !fl.urgent {
		fl.hostReadable = false // the next byte is an edge
	}
	m := fl.writeSmall(b[:n])
	if m < n && !fl.done {
		fl.carry = append([]byte(nil), b[m:n]...)
		fl.hostReadable = true // there is more to do, though not to read
	}
	return m, 0
}

// readBulk has netstack read from the socket into the buffers that it will
// send. It asks for no more than the socket is known to hold, because netstack
// forgets what it has read so far when a read fails.
func (fl *tcpFlow) readBulk() (int, unix.Errno) {
	if errno := fl.consume(); errno != 0 {
		return 0, errno
	}
	q := min(queued(fl.fd), maxRead)
	if q < scratchSize {
		fl.bulk = false
		return 0, 0
	}
	if q > superPayload {
		q -= q % superPayload // the rest would make a small frame of its own
	}
	p := &fl.t.relay.large
	*p = sockPayload{fd: fl.fd, left: q}
	n, err := fl.ep.Write(p, tcpip.WriteOptions{})
	fl.written(err)
	if p.errno != 0 {
		return int(n), p.errno
	}
	if err == nil && int(n) < q {
		fl.guestWritable = false
	}
	return int(n), 0
}

// writeSmall sends b to the guest and returns how much of it that was.
func (fl *tcpFlow) writeSmall(b []byte) int {
	fl.enterFast()
	if fl.fast.on {
		if fl.sendFast(b) {
			return len(b)
		}
		fl.leaveFast()
	}
	return fl.writeEndpoint(b)
}

// writeEndpoint gives b to the guest's endpoint and returns how much it took.
func (fl *tcpFlow) writeEndpoint(b []byte) int {
	p := &fl.t.relay.small
	p.b = b
	n, err := fl.ep.Write(p, tcpip.WriteOptions{})
	p.b = nil
	fl.written(err)
	if err == nil && int(n) < len(b) {
		fl.guestWritable = false
	}
	return int(n)
}

// written handles the error of an endpoint's Write.
func (fl *tcpFlow) written(err tcpip.Error) {
	switch err.(type) {
	case nil:
	case *tcpip.ErrWouldBlock:
		fl.guestWritable = false
	default:
		fl.resetHost() // the guest's end is gone
	}
}

// hostEOF handles the end of what the host sends.
func (fl *tcpFlow) hostEOF() {
	fl.hostReadable = false
	if fl.hostReset {
		fl.resetGuest()
		return
	}
	fl.hostFIN()
}

// hostFailed handles an error of the host socket. What the host sent before it
// failed may still be in the socket, and is the guest's.
func (fl *tcpFlow) hostFailed() {
	fl.leaveFast()
	fl.upOpen = false
	if fl.hostReset || !fl.downOpen {
		fl.resetGuest()
		return
	}
	fl.hostReset, fl.hostHup, fl.hostReadable = true, true, true
	fl.t.f.makeReady(fl)
}

// drainTime is how long the guest gets to take what the host sent before a reset.
const drainTime = 10 * time.Second

// resetGuest resets the guest's end, as soon as it has taken what is queued for it.
func (fl *tcpFlow) resetGuest() {
	fl.leaveFast()
	fl.upOpen, fl.downOpen = false, false
	if fl.drained() {
		fl.ep.Abort()
		fl.finish()
		return
	}
	fl.t.draining[fl] = fl.t.f.now.Add(drainTime)
	fl.t.f.sweepIn(drainPoll)
}

// drained reports whether the guest has acknowledged all that netstack has for it.
// Netstack tells nobody how full a send buffer is, only whether it has room: one of
// one byte has it when it is empty.
func (fl *tcpFlow) drained() bool {
	o := fl.ep.SocketOptions()
	size := o.GetSendBufferSize()
	o.SetSendBufferSize(1, false)
	defer o.SetSendBufferSize(size, false)
	return fl.ep.Readiness(waiter.WritableEvents) != 0
}

// drainHost resets the host's end after the guest's is gone, as soon as the host
// has what the guest sent before: it was acknowledged, and a reset would
// discard what is still queued here.
func (fl *tcpFlow) drainHost() {
	if fl.done {
		return
	}
	fl.aborted, fl.downOpen = true, false
	if fl.hostDrained() {
		fl.resetHost()
		return
	}
	if _, ok := fl.t.draining[fl]; !ok {
		fl.t.draining[fl] = fl.t.f.now.Add(drainTime)
		fl.t.f.sweepIn(drainPoll)
	}
}

// hostDrained reports whether the host has all that the guest has sent.
func (fl *tcpFlow) hostDrained() bool { return !fl.upOpen && unsent(fl.fd) == 0 }

// resetHost resets the host's end and forgets the flow.
func (fl *tcpFlow) resetHost() {
	if fl.done {
		return
	}
	unix.SetsockoptLinger(fl.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	fl.finish()
}

// finish closes both ends and forgets the flow.
func (fl *tcpFlow) finish() {
	if fl.done {
		return
	}
	fl.leaveFast()
	fl.done = true
	fl.t.keep(fl)
	fl.t.untrack(fl)
	if fl.ep != nil {
		fl.wq.EventUnregister(&fl.entry)
		fl.ep.Close()
	}
	fl.t.f.poll.remove(fl.slot)
	unix.Close(fl.fd)
	delete(fl.t.flows, fl)
	delete(fl.t.draining, fl)
	delete(fl.t.half, fl)
	fl.carry = nil
	fl.t.f.stats.TCPActive.Add(-1)
}

// vector collects pieces of memory for one sendmsg.
type vector struct {
	iov  [maxVector]unix.Iovec
	n    int
	size int
	full bool
}

const (
	maxVector = 64
	// maxGather bounds one sendmsg; beyond it a socket takes no more at once
	// anyway.
	maxGather = 512 << 10
)

var errFull = errors.New("forwarder: no more room")

func (v *vector) reset() { v.n, v.size, v.full = 0, 0, false }

// Write implements io.Writer by remembering b. The memory stays valid while
// nobody else reads from the endpoint.
func (v *vector) Write(b []byte) (int, error) {
	if v.n == len(v.iov) || v.size >= maxGather {
		v.full = true
		return 0, errFull
	}
	if len(b) > 0 {
		v.iov[v.n] = unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
		v.n++
		v.size += len(b)
	}
	return len(b), nil
}

// discard is a writer that takes so many bytes and no more.
type discard int

func (d *discard) Write(b []byte) (int, error) {
	if n := int(*d); len(b) > n {
		*d = 0
		return n, errFull
	}
	*d -= discard(len(b))
	return len(b), nil
}

// bytesPayload is a tcpip.Payloader over a slice.
type bytesPayload struct{ b []byte }

func (p *bytesPayload) Len() int { return len(p.b) }

func (p *bytesPayload) Read(b []byte) (int, error) {
	n := copy(b, p.b)
	p.b = p.b[n:]
	return n, nil
}

// sockPayload is a tcpip.Payloader that reads from a socket that holds at least
// left bytes.
type sockPayload struct {
	fd    int
	left  int
	errno unix.Errno
}

func (p *sockPayload) Len() int { return p.left }

func (p *sockPayload) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, errno := rawRecv(p.fd, b, 0)
	if errno == 0 && n > 0 {
		p.left -= n
		return n, nil
	}
	// Cannot happen while the engine alone reads the socket. Were it to,
	// netstack would drop what was read before: the flow must not go on.
	if p.errno = errno; errno == 0 || errno == unix.EAGAIN {
		p.errno = unix.ECONNABORTED
	}
	return 0, io.ErrUnexpectedEOF
}

func addrOf(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return addr
}
