package stack

import (
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// clock is netstack's clock. Netstack asks it six times for a request and its
// answer, which is a tenth of its work; so the time stands still while the
// engine takes one of its turns, which are far shorter than a millisecond, what
// TCP's timers and timestamps are counted in.
type clock struct {
	tcpip.Clock
	base  time.Time
	still atomic.Int64 // nanoseconds from base; 0: the time goes on
}

func newClock() *clock { return &clock{Clock: tcpip.NewStdClock(), base: time.Now()} }

// NowMonotonic implements tcpip.Clock.
func (c *clock) NowMonotonic() tcpip.MonotonicTime { return tcpip.MonotonicTime{}.Add(c.now()) }

// now is the time since the clock was made.
func (c *clock) now() time.Duration {
	if ns := c.still.Load(); ns != 0 {
		return time.Duration(ns)
	}
	return time.Since(c.base)
}

// StopClock has netstack's time stand at now until it is stopped again, or goes
// on with ResumeClock. now must come from time.Now.
func (s *Stack) StopClock(now time.Time) { s.clock.still.Store(int64(now.Sub(s.clock.base))) }

// ResumeClock has netstack's time go on.
func (s *Stack) ResumeClock() { s.clock.still.Store(0) }
