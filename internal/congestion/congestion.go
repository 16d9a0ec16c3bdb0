// Package congestion chooses TCP's congestion control where a connection stays
// inside this machine.
package congestion

import (
	"strings"

	"golang.org/x/sys/unix"
)

// Local returns the congestion control for connections that do not leave the
// machine, or "" where the default of the calling thread's network namespace is
// as good. It is always "reno", which every kernel has and lets everybody use.
//
// BBR takes the smallest round trip that it has seen for the path's, and paces
// its sender by that (tcp_bbr.c). Here that is a few microseconds, the queue of
// a TAP or a loopback interface empty, while acknowledgements come for half a
// megabyte at a time: the sender waits most of the time.
func Local() string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err != nil || !strings.HasPrefix(name, "bbr") {
		return ""
	}
	return "reno"
}

// Set sets a socket's congestion control to what Local has returned. What the
// kernel refuses stays as it is.
func Set(fd int, name string) {
	if name != "" {
		_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
	}
}
