// Package rig is the test rig: network namespaces made as an ordinary user,
// and the programs, servers and clients that run in them.
//
// # Design
//
// A test binary whose TestMain calls [Main] can be executed again as a node: a
// helper process that lives in a namespace and does there what the test asks
// for over a socket pair: start a program, or call a Go function that was
// registered with [NewFunc]. A test is therefore written in one place,
// although it acts in several namespaces:
//
//	 guest (G)              host (H)                router (R)            internet (W)
//	tap0 10.0.2.100 ─TAP─ usernet, uid 1000 ─veth─ 100.64.0.1 ─veth─ every address answers
//	real clients           own resolv.conf         broken addresses     echo, sink, HTTP …
//
// H, R, W, and their mount namespace belong to one user namespace whose root
// is an ordinary uid outside; a second one below it holds usernet, without
// privileges, and the guests' are below that. No packet ever leaves.
//
// Nothing outlives its test: every process dies with the node that started it,
// every node with its parent, and the first one kills whatever else was left
// to it when the test closes its socket.
package rig
