// Package stack is the guest's side of the network: addresses, ARP/NDP, ICMP, and the TCP, UDP and listener hooks the others plug into.
//
// # What happens to a frame
//
// The link offers every frame to [Stack.receive] first. It learns the sender's
// link address, drops what a guest has no business sending (foreign source
// addresses, frames for other stations), answers ARP, neighbour solicitations
// and echo requests for the gateway's own addresses, and hands datagrams and
// echo requests to the hooks. Only TCP, fragments and oddities go on to
// netstack; reassembled datagrams come back to the same hooks.
//
// All hooks run on the goroutine that receives from the link and must not
// block. Everything that sends may be called from any goroutine.
package stack
