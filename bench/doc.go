// Package bench measures the packet path, alone and side by side with peers.
//
// The benchmarks here drive the real stack and forwarder with a guest that
// lives in the same process and reacts inside the link's callbacks, so that
// neither a TAP nor a guest's kernel is in the figures: what remains is the
// packet path and the system calls on host sockets. Their allocations per
// frame are held by a test. Command compare measures whole programs.
package bench
