package dns

import (
	"encoding/binary"
	"sync"
	"time"
)

// Bounds on how long an answer is kept. RFC 2308 §5 finds one to three hours
// sensible for a negative one.
const (
	maxTTL         = 24 * time.Hour
	maxNegativeTTL = time.Hour
)

// entryOverhead is about what an entry takes beside its message and key.
const entryOverhead = 200

// cached is an answer in the cache. Apart from its place in the list it is
// never changed, so that readers may use it after the lock is gone.
type cached struct {
	key    string
	msg    []byte
	end    int      // of the question
	ttls   []uint16 // offsets
	stored time.Duration
	expiry time.Duration

	newer, older *cached // guarded by cache.mu
}

// cost is what the entry counts for against the bound in bytes.
func (e *cached) cost() int {
	return len(e.key) + len(e.msg) + 2*len(e.ttls) + entryOverhead
}

// cache holds answers, at most maxEntries and about maxBytes; the ones not
// used for longest go first. It reads no clock: now comes in.
type cache struct {
	maxEntries int
	maxBytes   int

	mu             sync.Mutex // guards following
	entries        map[string]*cached
	newest, oldest *cached
	bytes          int
}

// get returns the entry for key, nil if there is none that is fresh.
func (c *cache) get(key []byte, now time.Duration) *cached {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[string(key)]
	if e == nil {
		return nil
	}
	if now >= e.expiry {
		c.removeLocked(e)
		return nil
	}
	if c.newest != e {
		c.unlinkLocked(e)
		c.linkLocked(e)
	}
	return e
}

// put stores the answer msg to the query whose key is key and whose question
// ends at end, if it may be kept. It copies what it keeps.
func (c *cache) put(key string, msg []byte, end int, qtype uint16, now time.Duration) {
	if c.maxEntries <= 0 {
		return
	}
	var offsets [64]uint16
	ttl, ttls := lifetime(msg, end, qtype, offsets[:0])
	if ttl <= 0 {
		return
	}
	e := &cached{
		key:    key,
		msg:    append([]byte(nil), msg...),
		end:    end,
		ttls:   append([]uint16(nil), ttls...),
		stored: now,
		expiry: now + ttl,
	}
	if e.cost() > c.maxBytes/8 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.entries[e.key]; old != nil {
		c.removeLocked(old)
	}
	if c.entries == nil {
		c.entries = make(map[string]*cached)
	}
	c.entries[e.key] = e
	c.linkLocked(e)
	c.bytes += e.cost()
	for len(c.entries) > c.maxEntries || c.bytes > c.maxBytes {
		c.removeLocked(c.oldest)
	}
}

// flush forgets everything.
func (c *cache) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries, c.newest, c.oldest, c.bytes = nil, nil, nil, 0
}

// size returns the number of entries and about how many bytes they take.
func (c *cache) size() (entries, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries), c.bytes
}

func (c *cache) removeLocked(e *cached) {
	delete(c.entries, e.key)
	c.unlinkLocked(e)
	c.bytes -= e.cost()
}

func (c *cache) linkLocked(e *cached) {
	e.older, e.newer = c.newest, nil
	if c.newest != nil {
		c.newest.newer = e
	} else {
		c.oldest = e
	}
	c.newest = e
}

func (c *cache) unlinkLocked(e *cached) {
	if e.newer != nil {
		e.newer.older = e.older
	} else {
		c.newest = e.older
	}
	if e.older != nil {
		e.older.newer = e.newer
	} else {
		c.oldest = e.newer
	}
	e.newer, e.older = nil, nil
}

// render appends the answer to out as q's client is to see it: its id and its
// spelling of the name, TTLs less the time spent here.
func (e *cached) render(out []byte, q *query, now time.Duration) []byte {
	start := len(out)
	out = append(out, e.msg...)
	msg := out[start:]
	copy(msg, q.msg[:2])
	copy(msg[headerLen:e.end], q.msg[headerLen:q.end])
	age := uint32((now - e.stored) / time.Second)
	if age == 0 {
		return out
	}
	for _, off := range e.ttls {
		ttl := msg[off : off+4]
		n := binary.BigEndian.Uint32(ttl)
		binary.BigEndian.PutUint32(ttl, n-min(age, n))
	}
	return out
}

// lifetime returns how long the answer msg may be kept, 0 if not at all, and
// appends the offsets of its TTLs to ttls. It decides by RFC 2181 §8 and
// RFC 2308 §5: the smallest TTL of all records counts, since they are given
// out together.
func lifetime(msg []byte, end int, qtype uint16, ttls []uint16) (time.Duration, []uint16) {
	if len(msg) < end || msg[2]&bitTC != 0 || binary.BigEndian.Uint16(msg[4:]) != 1 {
		return 0, nil
	}
	rcode := msg[3] & maskRcode
	if rcode != rcodeSuccess && rcode != rcodeNXDomain {
		return 0, nil
	}
	smallest := uint32(maxTTL / time.Second)
	positive, negative := false, false
	w := walkRecords(msg, end)
	for w.next() {
		switch w.typ {
		case typeOPT:
			// Extended code; options such as cookies are one client's own.
			if msg[w.ttl] != 0 || w.rdLen != 0 {
				return 0, nil
			}
			continue
		case typeTSIG, typeTKEY:
			return 0, nil
		}
		ttl := binary.BigEndian.Uint32(msg[w.ttl:])
		if ttl > 1<<31-1 {
			ttl = 0
		}
		if w.section == answer && (w.typ == qtype || qtype == typeANY) {
			positive = true
		}
		if w.section == authority && w.typ == typeSOA && w.rdLen >= 22 {
			negative = true
			if !positive {
				smallest = min(smallest, binary.BigEndian.Uint32(msg[w.off-4:]))
			}
		}
		smallest = min(smallest, ttl)
		ttls = append(ttls, uint16(w.ttl))
	}
	switch {
	case w.bad || w.off != len(msg):
		return 0, nil
	case rcode == rcodeSuccess && positive:
	case negative:
		smallest = min(smallest, uint32(maxNegativeTTL/time.Second))
	default:
		return 0, nil // a referral, or a negative answer without SOA
	}
	return time.Duration(smallest) * time.Second, ttls
}
