package forwarder

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pollee is whoever owns a descriptor that the engine waits for.
type pollee interface {
	// ready is called on the engine with the epoll events of the descriptor.
	ready(events uint32)
}

// watched is a function that is called for a descriptor that is ready.
type watched func()

// ready implements pollee.
func (w watched) ready(uint32) { w() }

// Watch has the engine call ready whenever fd is readable, until stop is called.
// ready must not block, and not call Do. Once stop has returned no call is
// under way; it need not be called after the end of Run.
func (f *Forwarder) Watch(fd int, ready func()) (stop func(), err error) {
	var slot int32
	if cerr := f.Do(context.Background(), func() { slot, err = f.poll.add(fd, unix.EPOLLIN, watched(ready)) }); cerr != nil {
		return nil, fmt.Errorf("forwarder: watch descriptor: %w", cerr)
	}
	if err != nil {
		return nil, err
	}
	return func() { f.Do(context.Background(), func() { f.poll.release(slot, fd) }) }, nil
}

// poller maps epoll events to their owners. A slot's generation tells a late
// event of a closed descriptor from one of its successor.
type poller struct {
	guest  Guest
	fd     int
	outer  outerPoll
	look   func(fd uintptr) bool
	woken  func()    // called when sleep is over, before events are dispatched
	armed  time.Time // when sleep ends by itself; zero: not known
	looks  int       // during the present sleep
	events [128]unix.EpollEvent
	slots  []slot
	free   []int32
}

// outerPoll is an epoll descriptor that the runtime's poller knows. It watches the one
// of a poller while that sleeps. Were that watched by the runtime itself, everybody who
// makes an event, awake or asleep as the engine is, would pay for telling two.
type outerPoll struct {
	fd   int
	file *os.File // the same
	raw  syscall.RawConn
}

func (o *outerPoll) open() error {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("forwarder: create epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return fmt.Errorf("forwarder: prepare epoll: %w", err)
	}
	o.fd, o.file = fd, os.NewFile(uintptr(fd), "forwarder epoll")
	if o.raw, err = o.file.SyscallConn(); err == nil {
		err = o.file.SetDeadline(time.Time{})
	}
	if err != nil {
		o.file.Close()
		return fmt.Errorf("forwarder: watch epoll: %w", err)
	}
	return nil
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
	p := &poller{fd: fd}
	if err := p.outer.open(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	p.look = func(uintptr) bool {
		p.looks++
		return p.doze(0) > 0
	}
	return p, nil
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

// wait dispatches pending events and returns how many there were.
func (p *poller) wait() int { return p.dispatch(p.poll(0)) }

// doze waits up to d, in whole milliseconds, for events, dispatches them and returns
// how many there were. The caller keeps its P: no other goroutine can use it.
func (p *poller) doze(d time.Duration) int {
	n := p.poll(int(d / time.Millisecond))
	if n > 0 {
		p.woken()
	}
	return p.dispatch(n)
}

// poll takes pending events, waits so long for the first, and returns how many
// there are.
func (p *poller) poll(milliseconds int) int {
	r, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), uintptr(milliseconds), 0, 0)
	if errno != 0 {
		return 0 // EINTR: the loop comes back
	}
	return int(r)
}

// dispatch hands over n events that poll has taken.
func (p *poller) dispatch(n int) int {
	if n == 0 {
		return 0
	}
	p.guest.Hold()
	for i := range p.events[:n] {
		ev := &p.events[i]
		s := &p.slots[ev.Fd]
		if s.p != nil && s.gen == ev.Pad {
			s.p.ready(ev.Events)
		}
	}
	p.guest.Flush()
	return n
}

// arm has the next sleep end at t at the latest. Earlier is allowed, so that the
// timer is not set again for each.
func (p *poller) arm(t time.Time) {
	if p.armed.IsZero() || t.Before(p.armed) {
		p.outer.file.SetReadDeadline(t)
		p.armed = t
	}
}

// sleep dispatches events, and waits for the first until the time set with arm
// or for wake; it reports whether it had to. The goroutine is parked: a system
// call that blocks would keep its P until the runtime's monitor takes that away,
// which costs other goroutines time and the monitor its rest.
func (p *poller) sleep() bool {
	p.looks = 0
	ev := unix.EpollEvent{Events: unix.EPOLLIN}
	if err := epollCtl(p.outer.fd, unix.EPOLL_CTL_ADD, p.fd, &ev); err != nil {
		return p.doze(time.Millisecond) > 0 // no memory
	}
	err := p.outer.raw.Read(p.look)
	_ = epollCtl(p.outer.fd, unix.EPOLL_CTL_DEL, p.fd, &ev)
	if err != nil {
		p.armed = time.Time{}
	}
	return err != nil || p.looks > 1
}

// wake ends sleep, the present or the next one. It is for other goroutines.
func (p *poller) wake() { p.outer.file.SetReadDeadline(past) }

var past = time.Unix(1, 0)

func (p *poller) close() {
	unix.Close(p.fd)
	p.outer.file.Close()
}

func epollCtl(epfd, op, fd int, ev *unix.EpollEvent) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epfd), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(ev)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// waker has the engine look at its queue.
type waker struct {
	poll     *poller
	sleeping atomic.Bool
}

// wake makes the engine look at its queue if it sleeps.
func (w *waker) wake() {
	if w.sleeping.Load() && w.sleeping.CompareAndSwap(true, false) {
		w.poll.wake()
	}
}
