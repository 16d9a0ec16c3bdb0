package sandbox

import "golang.org/x/sys/unix"

// archSyscalls are those that only this architecture has.
var archSyscalls = []uint32{unix.SYS_EPOLL_WAIT, unix.SYS_POLL, unix.SYS_ARCH_PRCTL}
