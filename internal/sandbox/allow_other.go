//go:build !amd64

package sandbox

// archSyscalls are those that only this architecture has.
var archSyscalls []uint32
