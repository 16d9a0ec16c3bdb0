package forwarder

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
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
		// Whoever makes the event may wait for this processor.
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		found = f.poll.wait() > 0 || f.queueLen() > 0
	}
	f.spin.spun(found)
	return found
}

// An activity counts the flows that move something. Where they are many the next event
// is soon there whether the engine waits awake or asleep, and asleep it leaves the
// processor to those who make the event.
type activity struct {
	since       time.Time
	period      uint32 // its number
	now, before int    // flows in this period and in the one before
}

const (
	// activityPeriod is how long flows are counted.
	activityPeriod = time.Millisecond
	// manyFlows is how many flows make spinning vain.
	manyFlows = 8
)

// note counts a flow, which was last counted in the period seen, at now.
func (a *activity) note(seen *uint32, now time.Time) {
	if past := now.Sub(a.since); past >= activityPeriod {
		a.before, a.now = a.now, 0
		if past >= 2*activityPeriod {
			a.before = 0
		}
		a.period++
		a.since = now
	}
	if *seen != a.period {
		*seen = a.period
		a.now++
	}
}

func (a *activity) many() bool { return max(a.now, a.before) >= manyFlows }

// A napper decides whether the engine sleeps in a system call of its own. To park
// its goroutine instead takes five system calls and wakes the runtime's monitor,
// which looks around every 20 µs for a while: a seventh of the time where events come
// thousands of times a second. With one P nobody could wake the engine meanwhile, and
// others wait for napTime at most.
type napper struct {
	allowed bool // there is one P, and nobody else who needs it
	due     bool // the last event came within napTime
}

const (
	// napTime is how long the engine sleeps so.
	napTime = time.Millisecond
	// napStart is how long it takes to find an event that is there.
	napStart = 5 * time.Microsecond
)

// woken notes an event that the engine slept for, for about d.
func (n *napper) woken(d time.Duration) { n.due = n.allowed && d < napTime }

// takeNap waits for events, at the most for napTime.
func (f *Forwarder) takeNap() {
	if f.cfg.Clock != nil {
		f.cfg.Clock.ResumeClock()
	}
	// Whoever can run does so first. Twice, as in turn.
	runtime.Gosched()
	runtime.Gosched()
	if f.queueLen() > 0 {
		return
	}
	start := time.Now()
	if f.nap.due = f.poll.doze(napTime) > 0; !f.nap.due {
		return
	}
	if slept := f.now.Sub(start); slept > napStart {
		f.spin.woken(slept)
	}
}
