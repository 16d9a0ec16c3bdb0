package dns

import (
	"maps"
	"slices"
	"sync"
	"time"
)

// The timetable of a flight. Clients give up or ask again after 5 s (glibc,
// musl, dig), so that by then they have an answer, be it SERVFAIL.
const (
	hedgeDelay   = 300 * time.Millisecond  // until the next upstream is asked too
	hedgeSpan    = 900 * time.Millisecond  // until all have been asked
	flightTime   = 4750 * time.Millisecond // until SERVFAIL
	betterTime   = time.Second             // to wait for better than a SERVFAIL in hand
	lingerTime   = time.Second             // to see whether a slower upstream lives
	maxLingering = 256                     // flights that may do so
	maxAttempts  = 4 * maxUpstreams        // of one flight, all repetitions included
)

// repeats says when an unanswered query is sent again, for lost datagrams.
var repeats = [...]time.Duration{1100 * time.Millisecond, 2600 * time.Millisecond}

// retries says when, after the first failure, upstreams that have refused or
// cannot be reached are asked again, as long as another is silent: what answers
// on that address may just be starting.
var retries = [...]time.Duration{250 * time.Millisecond, 750 * time.Millisecond, 1750 * time.Millisecond, 3750 * time.Millisecond}

// flight is a question on its way to the upstreams, for one or more clients
// that asked the same at the same time, byte for byte. (To merge them is a
// defence, too: many open questions for one name make a forger's luck,
// RFC 5452 §5.)
type flight struct {
	s         *Server
	ask       string // the query's bytes behind the id
	transport transport
	set       *upstreams
	started   time.Duration

	// From the query, which is gone by now.
	end   int
	qtype uint16
	limit int
	key   string // in the cache; empty: not to be cached

	mu       sync.Mutex // guards following
	clients  []client
	first    [1]client // backs clients: most flights have one
	done     bool      // answered, or being so
	order    []*upstream
	asked    int // of order
	attempts []*attempt
	room     struct { // backs order and attempts
		order    [maxUpstreams]*upstream
		attempts [2]*attempt
		first    attempt
	}
	pending  int    // attempts without result
	kept     []byte // an answer to be bettered
	ede      int
	timer    *time.Timer
	next     time.Duration // when to ask the next upstream
	spacing  time.Duration
	repeat   int
	failed   time.Duration // when the first upstream did, if failing
	failing  bool
	retry    int
	deadline time.Duration
	linger   bool
	answer   []byte // to be delivered on unlock
}

// flights is the table of questions under way.
type flights struct {
	mu    sync.Mutex // guards following
	table [transports]map[string]*flight
}

// all returns the flights of the table.
func (t *flights) all() []*flight {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*flight
	for _, table := range t.table {
		all = slices.AppendSeq(all, maps.Values(table))
	}
	return all
}

// forward asks the upstreams for q on behalf of c, over t.
func (s *Server) forward(q *query, c client, t transport) {
	// The map is asked without making a string of the bytes.
	ask := q.msg[2:]
	s.flights.mu.Lock()
	if f := s.flights.table[t][string(ask)]; f != nil && f.join(c) {
		s.flights.mu.Unlock()
		s.stats.merged.Add(1)
		return
	}
	f := &flight{
		s: s, ask: string(ask), transport: t,
		started: s.now(), end: q.end, qtype: q.qtype, limit: q.size, ede: edeNoReachable,
	}
	if t == overTCP {
		f.limit = maxMessage
	}
	if q.plain {
		f.key = string(q.key())
	}
	f.first[0] = c
	f.clients = f.first[:]
	f.mu.Lock()
	if s.flights.table[t] == nil {
		s.flights.table[t] = make(map[string]*flight)
	}
	s.flights.table[t][f.ask] = f
	s.flights.mu.Unlock()
	s.stats.forwarded.Add(1)
	f.startLocked()
	f.unlock()
}

// join adds c to the flight's clients, unless it is over.
func (f *flight) join(c client) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.done {
		return false
	}
	f.clients = append(f.clients, c)
	return true
}

// unlock gives the lock back and delivers the answer, if there is one now.
func (f *flight) unlock() {
	reply, clients := f.answer, f.clients
	if reply == nil {
		f.mu.Unlock()
		return
	}
	f.answer, f.clients = nil, nil
	f.mu.Unlock()
	f.deliver(reply, clients)
}

// deliver sends reply, which it may change, to clients.
func (f *flight) deliver(reply []byte, clients []client) {
	s := f.s
	s.flights.mu.Lock()
	if s.flights.table[f.transport][f.ask] == f {
		delete(s.flights.table[f.transport], f.ask)
	}
	s.flights.mu.Unlock()
	if s.cfg.NoPrivate && holdsPrivate(reply, f.end) {
		s.stats.rebound.Add(uint64(len(clients)))
		reply = f.ownAnswer(rcodeSuccess, edeFiltered)
	}
	s.tell(reply, f.end)
	// What other upstreams said may not hold for those of now.
	if f.key != "" && f.set == s.upstreams.Load() {
		s.cache.put(f.key, reply, f.end, f.qtype, s.now())
	}
	if reply[3]&maskRcode == rcodeServFail {
		s.stats.failed.Add(uint64(len(clients)))
	}
	reply = truncate(reply, f.end, f.limit)
	for i := range clients {
		clients[i].send(reply)
	}
	s.inFlight.Add(-int64(len(clients)))
}

// startLocked asks the first upstream.
func (f *flight) startLocked() {
	now := f.started
	f.set = f.s.upstreams.Load()
	f.attempts = f.room.attempts[:0]
	var parallel int
	f.order, parallel = f.set.order(f.room.order[:0], f.transport, now)
	if len(f.order) == 0 {
		f.ede = edeNotReady
	}
	f.deadline = now + flightTime
	f.spacing = hedgeDelay
	if n := len(f.order); n > 1 {
		f.spacing = min(hedgeDelay, hedgeSpan/time.Duration(n-1))
	}
	for range parallel {
		f.askNextLocked(now)
	}
	f.settleLocked(now)
}

// extendLocked makes the upstreams of set, which are new, the next to ask.
func (f *flight) extendLocked(set *upstreams, now time.Duration) {
	for _, up := range set.list {
		if !slices.Contains(f.order, up) && len(f.order) < 3*maxUpstreams {
			f.order = append(f.order, up)
		}
	}
	f.askNextLocked(now)
	f.settleLocked(now)
}

// askNextLocked asks the next upstream that can be asked; false if there is none.
func (f *flight) askNextLocked(now time.Duration) bool {
	for !f.done && f.asked < len(f.order) {
		up := f.order[f.asked]
		f.asked++
		if f.askLocked(up, now) {
			f.next = now + f.spacing
			return true
		}
	}
	return false
}

// settleLocked decides what is next: an answer if nothing is left to wait
// for, else when to look again.
func (f *flight) settleLocked(now time.Duration) {
	if f.done {
		return
	}
	if f.pending == 0 && !f.askNextLocked(now) {
		f.finishLocked(nil, now)
		return
	}
	at := f.deadline
	if f.asked < len(f.order) {
		at = min(at, f.next)
	} else if f.repeat < len(repeats) {
		at = min(at, f.started+repeats[f.repeat])
	}
	if f.failing && f.retry < len(retries) {
		at = min(at, f.failed+retries[f.retry])
	}
	if f.timer == nil {
		f.timer = time.AfterFunc(at-now, f.tick)
	} else {
		f.timer.Reset(at - now)
	}
}

// tick is the flight's timer.
func (f *flight) tick() {
	f.mu.Lock()
	defer f.unlock()
	now := f.s.now()
	switch {
	case f.done:
		if now >= f.deadline { // else the timer ran as the answer came
			f.closeLocked(now, true)
		}
		return
	case now >= f.deadline:
		f.finishLocked(nil, now)
		return
	case f.asked < len(f.order):
		if now >= f.next {
			f.askNextLocked(now)
		}
	case f.repeat < len(repeats) && now >= f.started+repeats[f.repeat]:
		f.repeat++
		if f.kept == nil {
			for _, a := range f.attempts[:len(f.attempts):len(f.attempts)] {
				if a.open && a.transport == overUDP && len(f.attempts) < maxAttempts {
					f.askLocked(a.up, now)
				}
			}
		}
	}
	if f.failing && f.retry < len(retries) && now >= f.failed+retries[f.retry] {
		f.retry++
		f.retryLocked(now)
	}
	f.settleLocked(now)
}

// retryLocked asks those again that have failed.
func (f *flight) retryLocked(now time.Duration) {
	waiting := func(up *upstream) bool {
		return slices.ContainsFunc(f.attempts, func(a *attempt) bool { return a.open && a.up == up })
	}
	for _, up := range f.order[:f.asked] {
		if !waiting(up) && len(f.attempts) < maxAttempts {
			f.askLocked(up, now)
		}
	}
}

// noteFailureLocked starts the timetable of retries.
func (f *flight) noteFailureLocked(now time.Duration) {
	if !f.failing {
		f.failing, f.failed = true, now
	}
}

// replyLocked takes the answer msg to a, which stays the caller's.
func (f *flight) replyLocked(a *attempt, msg []byte, now time.Duration) {
	if !a.open {
		return
	}
	f.endLocked(a, true)
	f.s.up(a.up, f.transport, now)
	if f.done {
		return
	}
	switch msg[3] & maskRcode {
	case rcodeServFail, rcodeRefused, rcodeNotImp:
		// As in glibc, these are no answers as long as another upstream
		// may give one.
		for _, b := range f.attempts {
			if b.open && b.up == a.up {
				f.endLocked(b, false)
			}
		}
		if f.kept == nil && len(msg) <= maxQuery {
			f.kept = append([]byte(nil), msg...)
			f.deadline = min(f.deadline, now+betterTime)
		}
		f.noteFailureLocked(now)
		f.askNextLocked(now)
		f.settleLocked(now)
	default:
		f.finishLocked(msg, now)
	}
}

// failLocked takes the failure of a.
func (f *flight) failLocked(a *attempt, err error, now time.Duration) {
	if a.open {
		f.endLocked(a, false)
	}
	f.noteFailureLocked(now)
	f.s.stats.upstreamErrors.Add(1)
	// What is down is to be tried again no later for having been asked again.
	if f.retry == 0 || a.up.health[f.transport].downUntil.Load() == 0 {
		f.s.down(a.up, f.transport, now, err)
	}
}

// finishLocked answers with msg, or what was kept, or SERVFAIL.
func (f *flight) finishLocked(msg []byte, now time.Duration) {
	f.done = true
	silent := msg == nil // or nearly: all that came are refusals
	if silent {
		msg = f.kept
	}
	if msg == nil {
		msg = f.ownAnswer(rcodeServFail, f.ede)
	}
	f.answer = msg
	if f.pending == 0 {
		f.closeLocked(now, false)
		return
	}
	// Whoever answers within lingerTime is only slow.
	if silent || f.s.lingering.Load() >= maxLingering {
		f.closeLocked(now, silent)
		return
	}
	f.linger = true
	f.s.lingering.Add(1)
	f.deadline = now + lingerTime
	f.timer.Reset(lingerTime)
}

// closeLocked ends all attempts. Those that were given time count as failed.
func (f *flight) closeLocked(now time.Duration, failed bool) {
	if f.timer != nil {
		f.timer.Stop()
	}
	for _, a := range f.attempts {
		if !a.open {
			continue
		}
		f.endLocked(a, false)
		if failed && now-a.started >= hedgeDelay && !a.up.health[f.transport].aliveSince(a.started) {
			f.s.down(a.up, f.transport, now, errSilent)
		}
	}
	f.lingeredLocked()
}

// lingeredLocked ends the lingering, if there is any.
func (f *flight) lingeredLocked() {
	if f.linger {
		f.linger = false
		f.timer.Stop()
		f.s.lingering.Add(-1)
	}
}

// ownAnswer returns an answer of our own without records: usually SERVFAIL with
// the reason. (Never NXDOMAIN, which would say that somebody knows.)
func (f *flight) ownAnswer(rcode, ede int) []byte {
	var q query
	msg := append([]byte{0, 0}, f.ask...)
	if q.parse(msg) != accept { // it was before
		q.end = 0
	}
	return q.appendReply(nil, rcode, ede)
}
