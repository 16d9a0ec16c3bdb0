package forwarder

import (
	"runtime"
	"time"
)

// A spinner decides whether the engine looks for the next event for a while
// before it goes to sleep. Being woken costs tens of microseconds where the
// processor sleeps too, which a request and its answer pay four times and which
// is more than all the rest of them. Where events have kept coming that fast,
// staying awake costs less than sleeping, and only there it is tried.
type spinner struct {
	streak  int // events in a row that came soon; below 0: so many to let pass
	penalty int // how many the next vain spin lets pass
}

const (
	// spinTime is how long the engine stays awake at most: about what being
	// woken costs.
	spinTime = 60 * time.Microsecond
	// spinSoon is when an event that woke the engine would have come about in
	// spinTime had nobody been asleep.
	spinSoon = 2 * spinTime
	// spinStreak is how many events in a row must have come soon.
	spinStreak = 16
	// maxPenalty bounds what is lost where spinning never helps: a spin for
	// every so many events.
	maxPenalty = 4096
)

func (s *spinner) due() bool { return s.streak >= spinStreak }

// woken notes an event that the engine slept for, for about d.
func (s *spinner) woken(d time.Duration) {
	switch {
	case s.streak < 0 || d < spinSoon:
		s.streak++
	default:
		s.streak = 0
	}
}

// spun notes whether there was an event to be found.
func (s *spinner) spun(found bool) {
	if found {
		s.penalty = 0
		return
	}
	s.penalty = min(max(2*s.penalty, spinStreak), maxPenalty)
	s.streak = -s.penalty
}

// spinUntilEvent looks for events for a while and reports whether there were any.
func (f *Forwarder) spinUntilEvent() (found bool) {
	for start := time.Now(); !found && time.Since(start) < spinTime; {
		runtime.Gosched()
		found = f.poll.wait() > 0 || f.queueLen() > 0
	}
	f.spin.spun(found)
	return found
}
