package tap

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/capture"
	"github.com/usernet/usernet/internal/vnet"
)

// ErrGone is returned by Receive when the device behind the descriptor was
// deleted. The kernel answers EBADFD for ever then (drivers/net/tun.c), so the
// caller must stop reading.
var ErrGone = errors.New("tap: the device was deleted")

const (
	// headSize is how much of a packet lands in a view of its own. It holds
	// every IP and TCP header, so that netstack, which copies a whole shared
	// chunk when it pulls up a header, never does so with a 64 KiB one.
	headSize = 128
	// tailSize is the largest chunk that gVisor pools. An IP packet is at
	// most 65535 bytes long, so head and tail together hold any.
	tailSize = 1 << 16
	// copyBreak is the longest tail that is copied out instead of handing
	// the 64 KiB chunk over. netstack accounts the length of a view, not of
	// its chunk: without this a peer that sends small segments could pin a
	// thousand times what its window allows.
	copyBreak = 4 << 10
	// maxViews is how many pieces of one packet are written without
	// allocating. A 64 KiB packet of netstack has at most a few.
	maxViews = 32
	// maxGSO is the largest IP packet (RFC 791).
	maxGSO = 65535
)

// EndpointOptions configures an Endpoint. FD is required.
type EndpointOptions struct {
	// FD is the device: a TAP or a packet socket, non-blocking. The endpoint
	// owns it and closes it in Close.
	FD int
	// MTU is the largest IP packet in bytes that is sent without
	// segmentation offload, 576 to 65520.
	MTU int
	// MAC is the address of the gateway, the source of every frame.
	MAC [6]byte
	// VnetHdr says that every frame on FD is preceded by a virtio-net header
	// and that the device segments and checksums for us. Without it the
	// endpoint offers netstack no offload.
	VnetHdr bool
	// HoldAcks has bare acknowledgements wait a moment for a segment that
	// makes them superfluous. Flush must be called often then.
	HoldAcks bool
}

// Receiver is offered every frame before netstack sees it. eth is the Ethernet
// header and the beginning of the packet, tail the rest (both valid only during
// the call). It reports whether it has consumed the frame.
type Receiver = func(h vnet.Header, eth, tail []byte) bool

// Stats counts what an endpoint has done since it was made.
type Stats struct {
	RxFrames, RxBytes, TxFrames, TxBytes atomic.Uint64
	// RxBad counts frames too short or with offload requests that make no
	// sense; RxChecksum those whose TCP checksum was wrong.
	RxBad, RxChecksum atomic.Uint64
	// AcksHeld counts bare acknowledgements that were kept back, AcksSent
	// those of them that were sent after all.
	AcksHeld, AcksSent atomic.Uint64
	// TxDropped counts frames that the device refused: it was down, deleted
	// or out of memory.
	TxDropped atomic.Uint64
}

// Endpoint is a gVisor link endpoint on a TAP or packet socket. Frames travel
// as up to 64 KiB super-frames in both directions when the device has
// virtio-net headers.
//
// Sending is safe from many goroutines. Receive must be called from one at a
// time.
type Endpoint struct {
	fd       int
	vnetHdr  bool
	holdAcks bool
	recorder capture.Recorder
	mac      [6]byte
	mtu      atomic.Uint32

	receiver Receiver
	resolve  func(tcpip.Address) [6]byte

	// sw, where set, takes the frames that write would write to fd. Were it a
	// function, every frame's header would have to be allocated.
	sw *Switch

	mu         sync.RWMutex // guards following
	dispatcher stack.NetworkDispatcher

	// The frame being received. Only Receive touches them.
	pre  [vnet.Size + header.EthernetMinimumSize]byte
	eth  [header.EthernetMinimumSize + headSize]byte
	head []byte // the part of eth behind the Ethernet header
	tail *buffer.View

	acks ackHolder

	closed atomic.Bool
	stats  Stats
}

var (
	_ stack.LinkEndpoint = (*Endpoint)(nil)
	_ stack.GSOEndpoint  = (*Endpoint)(nil)
)

// NewEndpoint returns an endpoint on o.FD. It reads nothing until Receive.
func NewEndpoint(o EndpointOptions) *Endpoint {
	e := &Endpoint{fd: o.FD, vnetHdr: o.VnetHdr, holdAcks: o.HoldAcks, mac: o.MAC}
	e.mtu.Store(uint32(o.MTU))
	e.head = e.eth[header.EthernetMinimumSize:]
	e.tail = buffer.NewViewSize(tailSize)
	return e
}

// SetReceiver sets who is offered frames before netstack, and who knows the
// link address of a guest's IP address. Both must be set before the first
// Receive and must not block.
func (e *Endpoint) SetReceiver(r Receiver, resolve func(tcpip.Address) [6]byte) {
	e.receiver, e.resolve = r, resolve
}

// FD returns the descriptor, for a poller. It stays owned by the endpoint.
func (e *Endpoint) FD() int { return e.fd }

// Recorder is shown every frame. Those between two ports of a switch it sees
// once, as they come in.
func (e *Endpoint) Recorder() *capture.Recorder { return &e.recorder }

// Stats returns the endpoint's live counters.
func (e *Endpoint) Stats() *Stats { return &e.stats }

// Receive reads and delivers frames until the device is empty or max were read,
// and returns how many. Fewer than max means that the device was empty. The
// error is ErrGone or another one that will not go away by itself.
func (e *Endpoint) Receive(max int) (int, error) {
	for n := 0; n < max; n++ {
		size, err := e.readFrame(e.fd)
		switch {
		case err == nil:
			if e.recorder.Active() {
				e.recordReceived(size)
			}
			e.deliver(size)
		case err == unix.EAGAIN:
			return n, nil
		case err == unix.EINTR, err == unix.ENOBUFS, err == unix.ENOMEM:
			// Lost one frame or none; the device itself is well.
		case err == unix.EINVAL:
			// A packet socket had a frame with an offload that the
			// virtio-net header cannot describe. It is gone now.
			e.stats.RxBad.Add(1)
		case err == unix.EBADFD, err == unix.ENETDOWN, err == unix.ENXIO, err == unix.ENODEV:
			// A TAP says EBADFD for ever. A packet socket says
			// ENETDOWN, and once only; the guest cannot set the far
			// end down, so that end was deleted. A TAP that is down
			// just has nothing to read.
			return n, ErrGone
		default:
			return n, fmt.Errorf("tap: read frame: %w", err)
		}
	}
	return max, nil
}

// readFrame reads one frame of fd into pre, eth and tail and returns the number
// of bytes behind the virtio-net header.
func (e *Endpoint) readFrame(fd int) (int, error) {
	const ethLen = header.EthernetMinimumSize
	tail := e.tail.AsSlice()
	iov := [3]unix.Iovec{
		{Base: &e.pre[0], Len: vnet.Size},
		{Base: &e.eth[0], Len: uint64(len(e.eth))},
		{Base: &tail[0], Len: uint64(len(tail))},
	}
	v := iov[:]
	if !e.vnetHdr {
		v = iov[1:]
	}
	// The descriptor never blocks, so the scheduler need not know of the call.
	r, _, errno := unix.RawSyscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(&v[0])), uintptr(len(v)))
	if errno != 0 {
		return 0, errno
	}
	if r == 0 {
		return 0, unix.ENODEV // a socket whose peer has gone
	}
	n := int(r)
	if e.vnetHdr {
		n -= vnet.Size
	}
	if n < ethLen {
		n = 0
	}
	return n, nil
}

// deliver offers the frame of n bytes in eth and tail to the receiver and then
// to netstack.
func (e *Endpoint) deliver(n int) {
	const ethLen = header.EthernetMinimumSize
	e.stats.RxFrames.Add(1)
	e.stats.RxBytes.Add(uint64(n))
	if n < ethLen+1 {
		e.stats.RxBad.Add(1)
		return
	}
	var h vnet.Header
	if e.vnetHdr {
		h = vnet.Decode(e.pre[:vnet.Size])
		h.GSOType &^= vnet.GSOECN
	}
	headLen := min(n, len(e.eth)) - ethLen
	tailLen := n - ethLen - headLen
	eth := e.eth[:ethLen+headLen]
	tail := e.tail.AsSlice()[:tailLen]

	if e.receiver != nil && e.receiver(h, eth, tail) {
		return
	}
	if h.GSOType == vnet.GSOUDP {
		// netstack would take it for one giant datagram.
		e.stats.RxBad.Add(1)
		return
	}
	proto := header.Ethernet(eth).Type()
	if proto != header.IPv4ProtocolNumber && proto != header.IPv6ProtocolNumber {
		e.stats.RxBad.Add(1)
		return
	}
	if e.vnetHdr && h.Flags&(vnet.NeedsCsum|vnet.DataValid) == 0 && !tcpChecksumValid(proto, eth[ethLen:], tail) {
		// We told netstack that the link verifies checksums, which is
		// true for what the guest's kernel sends but not for frames
		// that a program there made itself.
		e.stats.RxChecksum.Add(1)
		return
	}
	e.mu.RLock()
	d := e.dispatcher
	e.mu.RUnlock()
	if d == nil {
		return
	}

	var b buffer.Buffer
	hv := buffer.NewView(headLen)
	hv.Write(eth[ethLen:])
	b.Append(hv)
	switch {
	case tailLen == 0:
	case tailLen <= copyBreak:
		tv := buffer.NewView(tailLen)
		tv.Write(tail)
		b.Append(tv)
	default:
		e.tail.CapLength(tailLen)
		b.Append(e.tail)
		e.tail = buffer.NewViewSize(tailSize)
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: b})
	d.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}

// tcpChecksumValid verifies the checksum of an unfragmented TCP packet, and
// reports true for everything else: netstack checks that itself.
func tcpChecksumValid(proto tcpip.NetworkProtocolNumber, head, tail []byte) bool {
	var xsum uint16
	var off, length int
	switch proto {
	case header.IPv4ProtocolNumber:
		ip := header.IPv4(head)
		if len(head) < header.IPv4MinimumSize || ip.Protocol() != uint8(header.TCPProtocolNumber) ||
			ip.More() || ip.FragmentOffset() != 0 {
			return true
		}
		off, length = int(ip.HeaderLength()), int(ip.TotalLength())
		if length > len(head)+len(tail) || off > len(head) || length < off {
			return true // malformed, netstack counts it
		}
		xsum = header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(length-off))
	case header.IPv6ProtocolNumber:
		ip := header.IPv6(head)
		if len(head) < header.IPv6MinimumSize || ip.NextHeader() != uint8(header.TCPProtocolNumber) {
			return true
		}
		off = header.IPv6MinimumSize
		length = off + int(ip.PayloadLength())
		if length > len(head)+len(tail) {
			return true
		}
		xsum = header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(length-off))
	}
	if length <= len(head) {
		return checksum.Checksum(head[off:length], xsum) == 0xffff
	}
	var c checksum.Checksumer
	c.Add(head[off:])
	c.Add(tail[:length-len(head)])
	return checksum.Combine(c.Checksum(), xsum) == 0xffff
}

// WriteFrame sends one frame whose bytes, Ethernet header first, are head, a and
// b. h tells the device what to complete; where the link has no virtio-net
// header the caller must have left nothing to complete.
func (e *Endpoint) WriteFrame(h vnet.Header, head, a, b []byte) error {
	var pre [vnet.Size]byte
	var arr [4]unix.Iovec
	n := 0
	if e.vnetHdr {
		h.Encode(pre[:])
		arr[0] = unix.Iovec{Base: &pre[0], Len: vnet.Size}
		n = 1
	}
	for _, p := range [...][]byte{head, a, b} {
		if len(p) > 0 {
			arr[n] = unix.Iovec{Base: &p[0], Len: uint64(len(p))}
			n++
		}
	}
	return e.writev(arr[:n], len(head)+len(a)+len(b))
}

// WriteSegment is WriteFrame for a TCP segment, of which head is all headers. A bare
// acknowledgement may be kept back.
func (e *Endpoint) WriteSegment(h vnet.Header, head, payload []byte) error {
	if e.holdAcks {
		ip := head[header.EthernetMinimumSize:]
		l3 := header.IPv4MinimumSize
		if ip[0]>>4 == 6 {
			l3 = header.IPv6MinimumSize
		}
		if e.acks.hold(e, h, ip[:l3], header.TCP(ip[l3:]), len(payload), len(head)+len(payload), func(frame []byte) { copy(frame, head) }) {
			return nil
		}
	}
	return e.WriteFrame(h, head, payload, nil)
}

// writev sends one frame of size bytes. A frame is atomic in the kernel, so
// concurrent senders need no lock.
func (e *Endpoint) writev(iov []unix.Iovec, size int) error {
	err := e.write(iov, size)
	if err == nil && e.recorder.Active() {
		e.recordSent(iov)
	}
	return err
}

func (e *Endpoint) write(iov []unix.Iovec, size int) error {
	if e.sw != nil {
		return e.sw.send(iov, size)
	}
	for tries := 0; ; tries++ {
		_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(e.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		switch errno {
		case 0:
			e.stats.TxFrames.Add(1)
			e.stats.TxBytes.Add(uint64(size))
			return nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			// A packet socket whose send buffer is full of frames
			// that the guest's kernel is working on. A moment's
			// patience is cheaper than a retransmission.
			if tries < 20 && waitWritable(e.fd) {
				continue
			}
		}
		e.stats.TxDropped.Add(1)
		return errno
	}
}

// recordSent shows a frame that was sent to the recorder.
func (e *Endpoint) recordSent(iov []unix.Iovec) {
	if e.vnetHdr {
		iov = iov[1:]
	}
	var parts [maxViews][]byte
	n := 0
	for _, v := range iov[:min(len(iov), maxViews)] {
		parts[n] = unsafe.Slice(v.Base, v.Len)
		n++
	}
	e.recorder.Record(false, parts[:n]...)
}

// recordReceived shows the frame of n bytes in eth and tail to the recorder.
func (e *Endpoint) recordReceived(n int) {
	head := e.eth[:min(n, len(e.eth))]
	e.recorder.Record(true, head, e.tail.AsSlice()[:n-len(head)])
}

func waitWritable(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	_, err := unix.Poll(p, 1)
	return err == nil || err == unix.EINTR
}

// WritePackets implements stack.LinkWriter.
func (e *Endpoint) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for i, pkt := range pkts.AsSlice() {
		if err := e.writePacket(pkt); err != nil {
			if i == 0 {
				return 0, &tcpip.ErrNoBufferSpace{}
			}
			return i, nil
		}
	}
	return pkts.Len(), nil
}

// WritePacket sends one packet to a guest, without a link header yet and past
// netstack's queueing discipline.
func (e *Endpoint) WritePacket(to tcpip.Address, pkt *stack.PacketBuffer) tcpip.Error {
	e.addHeader(to, pkt)
	if err := e.writePacket(pkt); err != nil {
		return &tcpip.ErrNoBufferSpace{}
	}
	return nil
}

func (e *Endpoint) writePacket(pkt *stack.PacketBuffer) error {
	if e.holdAcks && pkt.TransportProtocolNumber == header.TCPProtocolNumber && e.acks.holdPacket(e, pkt) {
		return nil
	}
	var pre [vnet.Size]byte
	var arr [maxViews]unix.Iovec
	iov := arr[:0]
	if e.vnetHdr {
		gsoHeader(pkt).Encode(pre[:])
		iov = append(iov, unix.Iovec{Base: &pre[0], Len: vnet.Size})
	}
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		b = b[skip:]
		skip = 0
		iov = append(iov, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
	}
	return e.writev(iov, pkt.Size())
}

// gsoHeader says what netstack left for the device to do in pkt.
func gsoHeader(pkt *stack.PacketBuffer) vnet.Header {
	o := &pkt.GSOOptions
	if o.Type == stack.GSONone {
		return vnet.Header{}
	}
	l3 := header.EthernetMinimumSize + o.L3HdrLen
	h := vnet.Header{HdrLen: uint16(pkt.HeaderSize())}
	if o.NeedsCsum {
		h.Flags = vnet.NeedsCsum
		h.CsumStart = l3
		h.CsumOffset = o.CsumOffset
	}
	if pkt.Data().Size() > int(o.MSS) {
		switch o.Type {
		case stack.GSOTCPv4:
			h.GSOType = vnet.GSOTCPv4
		case stack.GSOTCPv6:
			h.GSOType = vnet.GSOTCPv6
		default:
			panic(fmt.Sprintf("tap: unknown GSO type %v", o.Type))
		}
		h.GSOSize = o.MSS
	}
	return h
}

// MTU implements stack.NetworkLinkEndpoint.
func (e *Endpoint) MTU() uint32 { return e.mtu.Load() }

// SetMTU implements stack.NetworkLinkEndpoint.
func (e *Endpoint) SetMTU(mtu uint32) { e.mtu.Store(mtu) }

// MaxHeaderLength implements stack.NetworkLinkEndpoint.
func (e *Endpoint) MaxHeaderLength() uint16 { return header.EthernetMinimumSize }

// LinkAddress implements stack.NetworkLinkEndpoint.
func (e *Endpoint) LinkAddress() tcpip.LinkAddress { return tcpip.LinkAddress(e.mac[:]) }

// SetLinkAddress implements stack.NetworkLinkEndpoint. The gateway's address is
// fixed for the endpoint's life, guests remember it.
func (e *Endpoint) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities implements stack.NetworkLinkEndpoint. Address resolution is not
// among them: the stack learns the guest's link addresses from its frames, so
// that no packet waits for a neighbour. Nor is transmit checksum offload:
// super-frames ask for it one by one in their GSO options, and for the few
// segments without them netstack's own sum is cheap.
func (e *Endpoint) Capabilities() stack.LinkEndpointCapabilities {
	if e.vnetHdr {
		return stack.CapabilityRXChecksumOffload
	}
	return stack.CapabilityNone
}

// GSOMaxSize implements stack.GSOEndpoint.
func (e *Endpoint) GSOMaxSize() uint32 { return maxGSO }

// SupportedGSO implements stack.GSOEndpoint.
func (e *Endpoint) SupportedGSO() stack.SupportedGSO {
	if e.vnetHdr {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// Attach implements stack.NetworkLinkEndpoint.
func (e *Endpoint) Attach(d stack.NetworkDispatcher) {
	e.mu.Lock()
	e.dispatcher = d
	e.mu.Unlock()
}

// IsAttached implements stack.NetworkLinkEndpoint.
func (e *Endpoint) IsAttached() bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.dispatcher != nil
}

// Wait implements stack.NetworkLinkEndpoint. The endpoint has no goroutines.
func (e *Endpoint) Wait() {}

// ARPHardwareType implements stack.NetworkLinkEndpoint.
func (e *Endpoint) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }

// AddHeader implements stack.NetworkLinkEndpoint.
func (e *Endpoint) AddHeader(pkt *stack.PacketBuffer) {
	e.addHeader(pkt.EgressRoute.RemoteAddress, pkt)
}

func (e *Endpoint) addHeader(to tcpip.Address, pkt *stack.PacketBuffer) {
	eth := pkt.LinkHeader().Push(header.EthernetMinimumSize)
	dst := e.resolve(to)
	copy(eth[0:6], dst[:])
	copy(eth[6:12], e.mac[:])
	eth[12] = byte(pkt.NetworkProtocolNumber >> 8)
	eth[13] = byte(pkt.NetworkProtocolNumber)
}

// ParseHeader implements stack.NetworkLinkEndpoint. Frames are delivered
// without their Ethernet header, there is nothing to parse.
func (e *Endpoint) ParseHeader(*stack.PacketBuffer) bool { return true }

// SetOnCloseAction implements stack.NetworkLinkEndpoint.
func (e *Endpoint) SetOnCloseAction(func()) {}

// Detach lets go of the device: a TAP that is not persistent is gone with its
// last descriptor. The number stays taken, by a device that swallows frames,
// until Close: netstack may still be sending, and must not write into whatever
// file would get the number next.
func (e *Endpoint) Detach() {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return // Close will have to do
	}
	unix.Dup3(null, e.fd, unix.O_CLOEXEC)
	unix.Close(null)
}

// Close implements stack.NetworkLinkEndpoint and closes the device. The caller
// must have stopped everything that sends or receives.
func (e *Endpoint) Close() {
	if e.closed.CompareAndSwap(false, true) {
		unix.Close(e.fd)
	}
}

// Recorded reports whether somebody wants to see all frames.
func (e *Endpoint) Recorded() bool { return e.recorder.Active() }
