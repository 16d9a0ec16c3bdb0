package forwarder

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pollee is whoever owns a descriptor that the engine waits for.
type pollee interface {
	// ready is called on the engine with the epoll events of the descriptor.
	ready(events uint32)
}

// poller maps epoll events to their owners. A slot's generation tells a late
// event of a closed descriptor from one of its successor.
type poller struct {
	fd     int
	events [128]unix.EpollEvent
	slots  []slot
	free   []int32
}

type slot struct {
	p   pollee
	gen int32
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("forwarder: create epoll: %w", err)
	}
	return &poller{fd: fd}, nil
}

// add watches fd and returns the slot to give back with remove.
func (p *poller) add(fd int, events uint32, who pollee) (int32, error) {
	var i int32
	if n := len(p.free); n > 0 {
		i = p.free[n-1]
		p.free = p.free[:n-1]
	} else {
		i = int32(len(p.slots))
		p.slots = append(p.slots, slot{})
	}
	s := &p.slots[i]
	s.p = who
	ev := unix.EpollEvent{Events: events, Fd: i, Pad: s.gen}
	if err := epollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		p.remove(i)
		return -1, fmt.Errorf("forwarder: watch descriptor: %w", err)
	}
	return i, nil
}

// remove forgets a slot. Closing the descriptor takes it out of the epoll set.
func (p *poller) remove(i int32) {
	s := &p.slots[i]
	s.p = nil
	s.gen++
	p.free = append(p.free, i)
}

// release forgets a slot whose descriptor lives on.
func (p *poller) release(i int32, fd int) {
	_ = epollCtl(p.fd, unix.EPOLL_CTL_DEL, fd, &unix.EpollEvent{})
	p.remove(i)
}

// wait dispatches pending events. With block it waits up to timeout
// milliseconds (-1 for ever) for the first. It returns the number of events.
func (p *poller) wait(block bool, timeout int) int {
	var n int
	if block {
		var err error
		if n, err = unix.EpollWait(p.fd, p.events[:], timeout); err != nil {
			n = 0 // EINTR: the loop comes back
		}
	} else {
		r, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), 0, 0, 0)
		if errno == 0 {
			n = int(r)
		}
	}
	for i := range p.events[:n] {
		ev := &p.events[i]
		s := &p.slots[ev.Fd]
		if s.p != nil && s.gen == ev.Pad {
			s.p.ready(ev.Events)
		}
	}
	return n
}

func (p *poller) close() { unix.Close(p.fd) }

func epollCtl(epfd, op, fd int, ev *unix.EpollEvent) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epfd), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(ev)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// waker ends a blocking wait from another goroutine.
type waker struct {
	fd       int
	sleeping atomic.Bool
}

func newWaker() (*waker, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("forwarder: create eventfd: %w", err)
	}
	return &waker{fd: fd}, nil
}

// wake makes the engine look at its queue if it sleeps.
func (w *waker) wake() {
	if w.sleeping.Load() && w.sleeping.CompareAndSwap(true, false) {
		one := [8]byte{0: 1}
		unix.RawSyscall(unix.SYS_WRITE, uintptr(w.fd), uintptr(unsafe.Pointer(&one)), 8)
	}
}

// ready implements pollee.
func (w *waker) ready(uint32) {
	var b [8]byte
	unix.RawSyscall(unix.SYS_READ, uintptr(w.fd), uintptr(unsafe.Pointer(&b)), 8)
}

func (w *waker) close() { unix.Close(w.fd) }
