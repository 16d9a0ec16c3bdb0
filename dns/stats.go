package dns

import "sync/atomic"

// Stats counts what a Server did.
type Stats struct {
	Queries   uint64 // messages from guests
	Dropped   uint64 // of these: no queries at all, left unanswered
	Malformed uint64 // of these: answered FORMERR or NOTIMP
	Local     uint64 // of these: answered from local records
	Hits      uint64 // of these: answered from the cache
	Overload  uint64 // of these: answered SERVFAIL because too many were waiting
	Forwarded uint64 // of these: the first to bring a question to the upstreams
	Merged    uint64 // of these: asked what was being asked already
	Failed    uint64 // of these: in the end answered SERVFAIL
	Rebound   uint64 // of these: answered without the private addresses that upstreams gave

	UpstreamQueries uint64 // sent to upstreams
	UpstreamErrors  uint64 // that ended in an error, such as a refused port
	Mismatched      uint64 // messages at upstream sockets that answer nothing asked

	InFlight     int // queries waiting for upstreams now
	Streams      int // TCP connections of guests now
	CacheEntries int // answers in the cache now
	CacheBytes   int // and about what they take
}

// counters are the running numbers behind Stats.
type counters struct {
	queries, dropped, malformed, local, hits, overload atomic.Uint64
	forwarded, merged, failed, rebound                 atomic.Uint64
	upstreamQueries, upstreamErrors, mismatched        atomic.Uint64
}

// Stats returns the counts so far.
func (s *Server) Stats() Stats {
	c := &s.stats
	entries, bytes := s.cache.size()
	return Stats{
		Queries:         c.queries.Load(),
		Dropped:         c.dropped.Load(),
		Malformed:       c.malformed.Load(),
		Local:           c.local.Load(),
		Hits:            c.hits.Load(),
		Overload:        c.overload.Load(),
		Forwarded:       c.forwarded.Load(),
		Merged:          c.merged.Load(),
		Failed:          c.failed.Load(),
		Rebound:         c.rebound.Load(),
		UpstreamQueries: c.upstreamQueries.Load(),
		UpstreamErrors:  c.upstreamErrors.Load(),
		Mismatched:      c.mismatched.Load(),
		InFlight:        int(s.inFlight.Load()),
		Streams:         s.streams.count(),
		CacheEntries:    entries,
		CacheBytes:      bytes,
	}
}
