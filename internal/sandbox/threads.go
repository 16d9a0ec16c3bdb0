package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// allThreads makes a system call on every thread of this process. A binary with
// cgo cannot (ENOTSUP).
func allThreads(trap, a1, a2, a3 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, a3, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// NoNewPrivs keeps every exec from gaining rights, which Landlock and seccomp ask
// for. A binary with cgo cannot have it on all threads (ENOTSUP).
func NoNewPrivs() error {
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// DropCapabilities leaves of the capabilities only those in the set keep, as far as
// they are there, and nothing to gain by an exec.
func DropCapabilities(keep uint32) error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&h, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_SETPCAP) != 0 {
		for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
			if c < 32 && keep&(1<<c) != 0 {
				continue
			}
			// EINVAL: the kernel has no such capability.
			if err := allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("drop capability %d: %w", c, err)
			}
		}
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	kept := data[0].Permitted & keep
	set := [2]unix.CapUserData{{Effective: kept, Permitted: kept}}
	err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&set[0])), 0)
	runtime.KeepAlive(&h)
	runtime.KeepAlive(&set)
	if err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}
