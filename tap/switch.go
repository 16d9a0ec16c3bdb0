package tap

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/vnet"
)

const (
	// maxPorts bounds the ports of a switch.
	maxPorts = 1024
	// maxLearned bounds the link addresses that are learned from frames.
	maxLearned = 1024
	// What one port may send to groups, whose frames are copied for every
	// other port: so many frames and bytes in a second, and half of it at once.
	floodFrames = 1000
	floodBytes  = 16 << 20
)

// SwitchOptions configures a Switch.
type SwitchOptions struct {
	// MTU and VnetHdr are those of every port, MAC and HoldAcks the gateway's,
	// as of EndpointOptions.
	MTU      int
	MAC      [6]byte
	VnetHdr  bool
	HoldAcks bool
}

// PortOptions configures a port. FD and MAC are required.
type PortOptions struct {
	// FD is a device as of EndpointOptions. The switch owns it.
	FD int
	// MAC is the station behind the port.
	MAC [6]byte
	// Addrs are the station's addresses. It may use no others, nor another MAC,
	// unless AnySource is set.
	Addrs []netip.Addr
	// AnySource lets other stations stand behind the port, whose MACs are
	// learned. That of the gateway or of a port is never one of them.
	AnySource bool
	// Isolated keeps it apart from all other ports.
	Isolated bool
	// Gone is called, from the goroutine that receives, when the device was
	// deleted. Nothing is read from it any more.
	Gone func()
}

// SwitchStats counts what became of frames from one port to others.
type SwitchStats struct {
	Forwarded, ForwardedBytes atomic.Uint64
	Flooded                   atomic.Uint64 // frames to groups
	FloodLimited              atomic.Uint64 // those above the bound
	Spoofed                   atomic.Uint64 // a source that is not the port's
	Isolated                  atomic.Uint64 // between ports that are kept apart
	Unknown                   atomic.Uint64 // a destination that no port has
	Refused                   atomic.Uint64 // the other device did not take it
}

// A Switch joins many devices and the gateway into one network. Frames from
// one port to another pass as they are, virtio-net header and all, so that a
// super-frame of 64 KiB costs one read and one write. What is for the gateway
// comes out of it as if it were an Endpoint.
type Switch struct {
	*Endpoint
	stats SwitchStats
	now   func() time.Time

	// mu guards following. It is held for reading while a descriptor is used,
	// so that a closed one's number is not somebody else's yet.
	mu    sync.RWMutex
	ports map[int32]*Port
	macs  map[[6]byte]*Port
	last  int32
	any   int // ports with AnySource

	learnMu sync.Mutex // guards learned
	learned map[[6]byte]*Port

	events [64]unix.EpollEvent
	turn   int // where in events the next turn begins
}

// A Port is one device of a Switch.
type Port struct {
	s     *Switch
	id    int32
	fd    int
	guard guard
	o     PortOptions
	flood bucket
}

// NewSwitch returns a switch without ports. It reads nothing until Receive.
func NewSwitch(o SwitchOptions) (*Switch, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("tap: make switch: %w", err)
	}
	s := &Switch{
		Endpoint: NewEndpoint(EndpointOptions{FD: fd, MTU: o.MTU, MAC: o.MAC, VnetHdr: o.VnetHdr, HoldAcks: o.HoldAcks}),
		now:      time.Now, ports: make(map[int32]*Port), macs: make(map[[6]byte]*Port), learned: make(map[[6]byte]*Port),
	}
	s.Endpoint.sw = s
	return s, nil
}

// ErrMACTaken means that another port, or the gateway, has the link address.
var ErrMACTaken = errors.New("tap: the MAC address is in use on this network")

// Add adds a port. The descriptor is the switch's unless there is an error.
func (s *Switch) Add(o PortOptions) (*Port, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case o.MAC == s.mac || s.macs[o.MAC] != nil:
		return nil, ErrMACTaken
	case len(s.ports) >= maxPorts:
		return nil, fmt.Errorf("tap: add port: there are %d", maxPorts)
	}
	s.last++
	p := &Port{s: s, id: s.last, fd: o.FD, guard: newGuard(o.MAC, o.Addrs), o: o}
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: p.id}
	if err := unix.EpollCtl(s.fd, unix.EPOLL_CTL_ADD, o.FD, &ev); err != nil {
		return nil, fmt.Errorf("tap: add port: %w", err)
	}
	s.ports[p.id], s.macs[o.MAC] = p, p
	if o.AnySource {
		s.any++
	}
	s.learnMu.Lock()
	delete(s.learned, o.MAC)
	s.learnMu.Unlock()
	return p, nil
}

// Remove removes a port and closes its device.
func (s *Switch) Remove(p *Port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeLocked(p)
}

func (s *Switch) removeLocked(p *Port) {
	if s.ports[p.id] != p {
		return
	}
	// Closing alone would not do: others hold the same open file.
	_ = unix.EpollCtl(s.fd, unix.EPOLL_CTL_DEL, p.fd, nil)
	unix.Close(p.fd)
	delete(s.ports, p.id)
	delete(s.macs, p.o.MAC)
	if p.o.AnySource {
		s.any--
	}
	s.learnMu.Lock()
	for mac, q := range s.learned {
		if q == p {
			delete(s.learned, mac)
		}
	}
	s.learnMu.Unlock()
}

// Ports returns how many ports there are.
func (s *Switch) Ports() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.ports)
}

// SwitchStats returns the live counters of what passes between ports.
func (s *Switch) SwitchStats() *SwitchStats { return &s.stats }

// Receive reads up to max frames off the ports, in turns, and delivers them:
// see Endpoint.Receive. A port whose device was deleted is no error.
func (s *Switch) Receive(max int) (int, error) {
	r, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(s.fd), uintptr(unsafe.Pointer(&s.events[0])), uintptr(len(s.events)), 0, 0, 0)
	ready := int(r)
	if errno != 0 || ready <= 0 {
		return 0, nil
	}
	s.turn++
	total := 0
	for i := range ready {
		left := ready - i
		quantum := (max - total + left - 1) / left
		if quantum == 0 {
			break
		}
		n, err := s.receiveFrom(s.events[(s.turn+i)%ready].Fd, quantum)
		total += n
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// receiveFrom reads up to max frames of one port.
func (s *Switch) receiveFrom(id int32, max int) (int, error) {
	for n := 0; n < max; n++ {
		s.mu.RLock()
		p := s.ports[id]
		if p == nil {
			s.mu.RUnlock()
			return n, nil
		}
		size, err := s.readFrame(p.fd)
		if err == nil && s.recorder.Active() {
			s.recordReceived(size)
		}
		ours := err == nil && s.pass(p, size)
		s.mu.RUnlock()
		switch {
		case ours:
			s.deliver(size)
		case err == nil, err == unix.EINTR, err == unix.ENOBUFS, err == unix.ENOMEM:
		case err == unix.EAGAIN:
			return n, nil
		case err == unix.EINVAL: // see Endpoint.Receive
			s.Endpoint.stats.RxBad.Add(1)
		case err == unix.EBADFD, err == unix.ENETDOWN, err == unix.ENXIO, err == unix.ENODEV:
			s.gone(p)
			return n, nil
		default:
			return n, fmt.Errorf("tap: read frame: %w", err)
		}
	}
	return max, nil
}

// gone stops reading a port whose device was deleted.
func (s *Switch) gone(p *Port) {
	s.mu.RLock()
	if s.ports[p.id] == p {
		_ = unix.EpollCtl(s.fd, unix.EPOLL_CTL_DEL, p.fd, nil)
	}
	s.mu.RUnlock()
	if p.o.Gone != nil {
		p.o.Gone()
	}
}

// pass sends the frame of n bytes that was read from p to the ports that it is
// for, and reports whether it is for the gateway too.
func (s *Switch) pass(p *Port, n int) bool {
	const ethLen = header.EthernetMinimumSize
	if n < ethLen+1 {
		return true // to be counted
	}
	eth := s.eth[:min(n, len(s.eth))]
	dst, src := [6]byte(eth[0:6]), [6]byte(eth[6:12])
	if p.o.AnySource {
		if src[0]&1 != 0 || src == s.mac || !s.learn(src, p) {
			s.stats.Spoofed.Add(1)
			return false
		}
	} else if !p.guard.permits(eth) {
		s.stats.Spoofed.Add(1)
		return false
	}
	if dst == s.mac {
		return true
	}
	if dst[0]&1 != 0 {
		s.floodFrom(p, n)
		return true
	}
	q := s.macs[dst]
	if q == nil && s.any > 0 {
		s.learnMu.Lock()
		q = s.learned[dst]
		s.learnMu.Unlock()
	}
	switch {
	case q == nil && s.any > 0:
		s.floodUnknown(p, n)
	case q == nil:
		s.stats.Unknown.Add(1)
	case q == p:
		// Its own kernel delivers what is for itself.
	case p.o.Isolated || q.o.Isolated:
		s.stats.Isolated.Add(1)
	default:
		s.forward(q, n)
	}
	return false
}

// forward writes the frame that was read last to port q.
func (s *Switch) forward(q *Port, n int) {
	var arr [3]unix.Iovec
	iov := arr[:0]
	if s.vnetHdr {
		iov = append(iov, unix.Iovec{Base: &s.pre[0], Len: vnet.Size})
	}
	head := min(n, len(s.eth))
	iov = append(iov, unix.Iovec{Base: &s.eth[0], Len: uint64(head)})
	if n > head {
		iov = append(iov, unix.Iovec{Base: &s.tail.AsSlice()[0], Len: uint64(n - head)})
	}
	// Nobody waits for a slow receiver here: others' frames are behind this one.
	if writeFrame(q.fd, iov) != nil {
		s.stats.Refused.Add(1)
		return
	}
	s.stats.Forwarded.Add(1)
	s.stats.ForwardedBytes.Add(uint64(n))
}

// floodFrom writes the frame that was read last to all ports but p.
func (s *Switch) floodFrom(p *Port, n int) {
	if p.o.Isolated {
		s.stats.Isolated.Add(1)
		return
	}
	if !p.flood.take(s.now(), n) {
		s.stats.FloodLimited.Add(1)
		return
	}
	s.stats.Flooded.Add(1)
	for _, q := range s.ports {
		if q != p && !q.o.Isolated {
			s.forward(q, n)
		}
	}
}

// floodUnknown writes the frame that was read last to the ports that stations
// may stand behind that were not heard of yet.
func (s *Switch) floodUnknown(p *Port, n int) {
	if p.o.Isolated || !p.flood.take(s.now(), n) {
		s.stats.FloodLimited.Add(1)
		return
	}
	for _, q := range s.ports {
		if q != p && q.o.AnySource && !q.o.Isolated {
			s.forward(q, n)
		}
	}
}

// learn notes that the station mac is behind p, and reports whether it can be.
func (s *Switch) learn(mac [6]byte, p *Port) bool {
	if q := s.macs[mac]; q != nil {
		return q == p
	}
	s.learnMu.Lock()
	defer s.learnMu.Unlock()
	if s.learned[mac] == p {
		return true
	}
	if len(s.learned) >= maxLearned {
		for old := range s.learned { // any one
			delete(s.learned, old)
			break
		}
	}
	s.learned[mac] = p
	return true
}

// send writes a frame of the gateway to the ports that it is for.
func (s *Switch) send(iov []unix.Iovec, size int) error {
	first := iov[0]
	if s.vnetHdr {
		first = iov[1]
	}
	dst := *(*[6]byte)(unsafe.Pointer(first.Base))
	st := &s.Endpoint.stats
	s.mu.RLock()
	defer s.mu.RUnlock()
	var err error = unix.EHOSTUNREACH
	if dst[0]&1 != 0 {
		err = nil
		for _, p := range s.ports {
			_ = writeFrame(p.fd, iov)
		}
	} else if p := s.portOf(dst); p != nil {
		err = writeFrame(p.fd, iov)
		for tries := 0; err == unix.EAGAIN && tries < 20 && waitWritable(p.fd); tries++ {
			err = writeFrame(p.fd, iov)
		}
	}
	if err != nil {
		st.TxDropped.Add(1)
		return err
	}
	st.TxFrames.Add(1)
	st.TxBytes.Add(uint64(size))
	return nil
}

// portOf finds the port that a station is behind.
func (s *Switch) portOf(mac [6]byte) *Port {
	if p := s.macs[mac]; p != nil || s.any == 0 {
		return p
	}
	s.learnMu.Lock()
	defer s.learnMu.Unlock()
	return s.learned[mac]
}

func writeFrame(fd int, iov []unix.Iovec) error {
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}

// Detach lets go of all devices.
func (s *Switch) Detach() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.ports {
		s.removeLocked(p)
	}
}

// Close implements stack.NetworkLinkEndpoint and closes all devices.
func (s *Switch) Close() {
	s.Detach()
	s.Endpoint.Close()
}

// A bucket bounds how much passes.
type bucket struct {
	frames, bytes float64
	last          time.Time
}

// take takes one frame of n bytes out, if there is room.
func (b *bucket) take(now time.Time, n int) bool {
	passed := 0.5
	if !b.last.IsZero() {
		passed = now.Sub(b.last).Seconds()
	}
	b.last = now
	b.frames = min(floodFrames/2, b.frames+passed*floodFrames)
	b.bytes = min(floodBytes/2, b.bytes+passed*floodBytes)
	if b.frames < 1 || b.bytes < float64(n) {
		return false
	}
	b.frames--
	b.bytes -= float64(n)
	return true
}
