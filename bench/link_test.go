package bench

import (
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/vnet"
)

const (
	ethLen   = header.EthernetMinimumSize
	headSize = 128     // as the TAP's endpoint splits a packet
	tailSize = 1 << 16 // likewise
)

// frame is what the guest sends: headers, and the length of a payload whose
// bytes do not matter.
type frame struct {
	vnet vnet.Header
	head [ethLen + headSize]byte
	n    int // bytes of head, Ethernet header included
	tail int // further bytes of payload
}

// link joins a stack and a guest in memory. It builds packets as the TAP's
// endpoint does, but reads no payload: copying it is the kernel's work.
type link struct {
	mtu      uint32
	mac      [6]byte
	event    int // readable while frames wait
	receiver func(h vnet.Header, eth, tail []byte) bool
	resolve  func(tcpip.Address) [6]byte
	dispatch stack.NetworkDispatcher
	tail     *buffer.View

	// guest is called with the headers and the payload's length of each
	// frame that the stack sends. It must not block, but may send.
	guest func(head []byte, payload int)

	current frame // being received
	count   [8]byte
	one     [8]byte

	mu     sync.Mutex // guards following
	frames []frame
	read   int
}

func newLink(t testing.TB, mtu int, mac [6]byte) *link {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	return &link{mtu: uint32(mtu), mac: mac, event: fd, tail: buffer.NewViewSize(tailSize), guest: func([]byte, int) {}}
}

// lock begins to queue frames for the stack, add queues one, and unlock wakes
// the engine, once for all of them.
func (l *link) lock() (idle bool) {
	l.mu.Lock()
	return l.read == len(l.frames)
}

func (l *link) add() *frame {
	if l.read == len(l.frames) {
		l.frames, l.read = l.frames[:0], 0
	}
	if len(l.frames) < cap(l.frames) {
		l.frames = l.frames[:len(l.frames)+1]
	} else {
		l.frames = append(l.frames, frame{})
	}
	return &l.frames[len(l.frames)-1]
}

func (l *link) unlock(idle bool) {
	some := l.read < len(l.frames)
	l.mu.Unlock()
	if idle && some {
		binary.NativeEndian.PutUint64(l.one[:], 1)
		unix.Write(l.event, l.one[:])
	}
}

// next takes the next frame off the queue.
func (l *link) next(f *frame) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.read == len(l.frames) {
		unix.Read(l.event, l.count[:])
		return false
	}
	*f = l.frames[l.read]
	l.read++
	return true
}

// FD implements forwarder.Link.
func (l *link) FD() int { return l.event }

// Receive implements forwarder.Link.
func (l *link) Receive(max int) (int, error) {
	for n := range max {
		if !l.next(&l.current) {
			return n, nil
		}
		l.deliver(&l.current)
	}
	return max, nil
}

func (l *link) deliver(f *frame) {
	eth := f.head[:f.n]
	if l.receiver(f.vnet, eth, l.tail.AsSlice()[:f.tail]) {
		return
	}
	head := buffer.NewView(f.n - ethLen)
	head.Write(eth[ethLen:])
	var b buffer.Buffer
	b.Append(head)
	if f.tail > 0 {
		l.tail.CapLength(f.tail)
		b.Append(l.tail)
		l.tail = buffer.NewViewSize(tailSize)
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: b})
	l.dispatch.DeliverNetworkPacket(header.IPv4ProtocolNumber, pkt)
	pkt.DecRef()
}

// WriteFrame implements stack.Link.
func (l *link) WriteFrame(_ vnet.Header, parts0, parts1, parts2 []byte) error {
	parts := [...][]byte{parts0, parts1, parts2}
	n := 0
	for _, p := range parts[1:] {
		n += len(p)
	}
	l.guest(parts[0], n)
	return nil
}

// WriteSegment implements stack.Link.
func (l *link) WriteSegment(h vnet.Header, head, payload []byte) error {
	return l.WriteFrame(h, head, payload, nil)
}

// WritePackets implements stack.LinkWriter.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		l.write(pkt)
	}
	return pkts.Len(), nil
}

// WritePacket implements stack.Link.
func (l *link) WritePacket(to tcpip.Address, pkt *stack.PacketBuffer) tcpip.Error {
	l.addHeader(to, pkt)
	l.write(pkt)
	return nil
}

func (l *link) write(pkt *stack.PacketBuffer) {
	views, skip := pkt.AsViewList()
	size := pkt.Size()
	for v := views.Front(); v != nil; v = v.Next() {
		if b := v.AsSlice(); skip < len(b) {
			l.guest(b[skip:], size-(len(b)-skip))
			break
		}
		skip -= v.Size()
	}
}

// SetReceiver implements stack.Link.
func (l *link) SetReceiver(r func(vnet.Header, []byte, []byte) bool, resolve func(tcpip.Address) [6]byte) {
	l.receiver, l.resolve = r, resolve
}

// AddHeader implements stack.NetworkLinkEndpoint.
func (l *link) AddHeader(pkt *stack.PacketBuffer) {
	l.addHeader(pkt.EgressRoute.RemoteAddress, pkt)
}

func (l *link) addHeader(to tcpip.Address, pkt *stack.PacketBuffer) {
	eth := pkt.LinkHeader().Push(ethLen)
	dst := l.resolve(to)
	copy(eth[0:6], dst[:])
	copy(eth[6:12], l.mac[:])
	binary.BigEndian.PutUint16(eth[12:], uint16(pkt.NetworkProtocolNumber))
}

// The rest of stack.Link is constant.

func (l *link) MTU() uint32                      { return l.mtu }
func (l *link) SetMTU(uint32)                    {}
func (l *link) MaxHeaderLength() uint16          { return ethLen }
func (l *link) LinkAddress() tcpip.LinkAddress   { return tcpip.LinkAddress(l.mac[:]) }
func (l *link) SetLinkAddress(tcpip.LinkAddress) {}
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}
func (l *link) GSOMaxSize() uint32                      { return 65535 }
func (l *link) SupportedGSO() stack.SupportedGSO        { return stack.HostGSOSupported }
func (l *link) Attach(d stack.NetworkDispatcher)        { l.dispatch = d }
func (l *link) IsAttached() bool                        { return l.dispatch != nil }
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) SetOnCloseAction(func())                 {}
func (l *link) Close()                                  {}
func (l *link) Held() bool                              { return false }
func (l *link) NotifyHeld(func())                       {}
func (l *link) Recorded() bool                          { return false }
func (l *link) Flush(time.Time)                         {}
func (l *link) Detach()                                 {}
