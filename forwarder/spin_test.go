package forwarder

import (
	"testing"
	"time"
)

// TestSpinBacksOff: the engine stays awake only where events have come soon, and
// hardly ever where that did not help.
func TestSpinBacksOff(t *testing.T) {
	var s spinner
	for range spinStreak - 1 {
		s.woken(time.Microsecond)
	}
	if s.due() {
		t.Fatal("spins too early")
	}
	s.woken(spinSoon)
	for range spinStreak {
		if s.due() {
			t.Fatal("one late event does not end the streak")
		}
		s.woken(time.Microsecond)
	}
	for range 100 {
		if !s.due() {
			t.Fatal("does not go on while it helps")
		}
		s.spun(true)
	}
	const events = 1 << 20
	spins := 0
	for range events {
		if s.due() {
			spins++
			s.spun(false)
		}
		s.woken(time.Microsecond)
	}
	if spins == 0 || spins > events/1000 {
		t.Errorf("%d vain spins for %d events", spins, events)
	}
	for i := 0; !s.due(); i++ {
		if i > 2*maxPenalty {
			t.Fatal("does not try again")
		}
		s.woken(time.Microsecond)
	}
	s.spun(true)
	s.spun(false)
	if s.penalty != spinStreak {
		t.Errorf("after a success the penalty is %d", s.penalty)
	}
}

// TestManyFlowsAreCounted: of the last moments, each once.
func TestManyFlowsAreCounted(t *testing.T) {
	var a activity
	seen := make([]uint32, 2*manyFlows)
	now := time.Unix(1000, 0)
	note := func(n int) {
		for i := range n {
			a.note(&seen[i], now)
			a.note(&seen[i], now)
		}
	}
	for _, step := range []struct {
		after time.Duration
		flows int
		many  bool
	}{
		{0, manyFlows - 1, false},
		{activityPeriod / 2, manyFlows - 1, false},
		{activityPeriod / 2, manyFlows, true},
		{activityPeriod, 1, true},
		{activityPeriod, 1, false},
		{activityPeriod, 2 * manyFlows, true},
		{time.Hour, 1, false},
	} {
		now = now.Add(step.after)
		note(step.flows)
		if a.many() != step.many {
			t.Errorf("after %+v: many is %v", step, a.many())
		}
	}
}
