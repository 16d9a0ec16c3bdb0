// Package dhcp gives guests their addresses: DHCPv4, DHCPv6 and router advertisements.
//
// [Server4], [Server6] and [Advertiser] are independent of each other. Each is
// made from a config, starts nothing until its Run, and reads from a
// [net.PacketConn] that it then owns. A datagram is parsed into a request, a
// pure function of the request, the lease table and the time decides, and the
// answer is marshalled; only the loop in run.go touches a conn or a clock.
//
// # Whose address is it
//
// The servers are the only ones on their link and say so: a client that asks
// for an address nobody holds gets it, also when there is no record of the
// client (RFC 2131 §4.3.2 wants silence there, for the peace of several servers
// on one wire). So a guest keeps its address over a restart of the network.
//
// A reservation belongs to a link address, lies outside the pool, and nobody
// else can take it. From the pool a client gets, in this order: what it had,
// what it asks for, the first address that nobody had (DHCPv6: by a hash of the
// client, so that it is the same in the next run), the one that is free for the
// longest time. Gateway, DNS and reserved addresses are never in the pool.
//
// # What a hostile guest can do
//
//   - Offers are soft. They are held for ten seconds and only keep two clients
//     apart: the oldest one gives way when nothing else is left, and whoever
//     requests first gets the lease. Any number of DISCOVERs or SOLICITs takes
//     nothing from anyone.
//   - Leases end. A lease that runs is never taken from its client, but while
//     more than half of the pool is taken, leases last two minutes and there is
//     no rapid commit. A pool that was exhausted by invented clients has room
//     again two minutes after they stop. Reservations are outside of this.
//   - A declined address rests for ten minutes, or until nothing else is left.
//   - The table holds at most 1024 addresses, forgotten in the order in which
//     they were last used. Nothing else is kept.
//   - Messages over 2 KiB are dropped; logs are at most one line a second after
//     a burst of twenty; advertisements that answer solicitations are limited
//     to ten a second.
package dhcp
