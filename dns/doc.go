// Package dns answers guests' queries from local records and from the host's resolvers.
//
// # Design
//
// A query is answered where it was read, by the goroutine that read it, if a
// local record or the cache has the answer: no hand-over, no allocation. What
// neither has becomes a flight, which asks the upstreams: first one, then,
// while it stays silent, the next beside it. A question leaves from a random
// UDP port, which it shares only with others asked at the same time, and one
// event loop watches them all through an epoll descriptor, so a miss costs no
// goroutine. Where the conns and the configuration allow, the reader and that
// loop are both the goroutine that moves the guests' other traffic.
//
//	guest conn ─► reader ─► parse ─► local records ─┐
//	                          │      cache ─────────┼─► answer
//	                          ▼                     │
//	                        flight ─► upstreams ─► event loop
//
// Messages are relayed as the bytes they came in: nothing is decoded and
// encoded again. An answer differs from the upstream's only in its id and,
// coming from the cache, in its TTLs and the letter case of the question. It
// is cut, with TC set, where the client said that it cannot take more.
package dns
