// Package forwarder joins guest flows to host sockets, in both directions.
//
// # One engine
//
// A single goroutine, [Forwarder.Run], owns every flow. It waits on one epoll
// descriptor for the link and for all host sockets, takes frames off the link
// in batches (which calls the Handle methods), lets netstack's goroutines work,
// and then moves bytes. No flow has a goroutine, and no lock is held while a
// system call runs. netstack's notifications arrive on other goroutines; they
// only mark a flow and put it on the run queue.
//
// # TCP
//
//	guest SYN ─ policy ─ connect(host) ─┬ connected  ─ SYN-ACK ─ relay
//	                                    ├ refused    ─ RST
//	                                    ├ unreachable─ ICMP
//	                                    └ no answer  ─ silence, as outside
//
// Bytes cross without a copy in between: upwards the segments that netstack
// holds are the vector of a sendmsg, downwards recv reads into the buffers that
// netstack will send.
//
// Segments of small requests and answers go past netstack while each is the one that is
// expected next, and come back to it with the first that is not. A connection that carries
// much leaves the link for good, see [Inside].
//
// # UDP and echo
//
// One host socket per guest address and port, whatever the destinations
// (endpoint-independent mapping, RFC 4787 §4.1). It takes answers from any
// address that the policy would let the guest reach. Errors that the host's
// kernel reports for it reach the guest as the ICMP messages they were.
package forwarder
