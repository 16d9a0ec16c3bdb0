package netns

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openPidfd pins the process pid. The file is nil, without an error, where the
// kernel or a sandbox has no pidfds: the path has to tell of the end then.
func openPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("no process %d: it has ended, or is in another pid namespace", pid)
	case errors.Is(err, unix.EINVAL):
		return nil, fmt.Errorf("%d is a thread: give its process", pid)
	case err != nil:
		return nil, nil
	}
	// PIDFD_NONBLOCK needs Linux 5.10, fcntl any. Without it os.NewFile leaves
	// the descriptor out of the runtime's poller.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set pidfd non-blocking: %w", err)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", pid)), nil
}

// exited reports whether the process of a pidfd has ended; a nil one has not.
func exited(pidfd *os.File) bool {
	if pidfd == nil {
		return false
	}
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return false
	}
	var over bool
	err = raw.Control(func(fd uintptr) { over = readable(fd) })
	return err == nil && over
}

// waitExit blocks until the process ends (nil) or the file is closed (an error).
func waitExit(pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(readable)
}

// readable reports whether a pidfd polls as readable: its process has ended.
func readable(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n == 1
	}
}

// dup returns a second file for the same process.
func dup(pidfd *os.File) (*os.File, error) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	if err := raw.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, dupErr
	}
	return os.NewFile(uintptr(fd), pidfd.Name()), nil
}

// ownerUID asks for the user who made the user namespace open at fd.
func ownerUID(fd int) (uint32, error) {
	var uid uint32
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.NS_GET_OWNER_UID, uintptr(unsafe.Pointer(&uid)))
	if errno != 0 {
		return 0, errno
	}
	return uid, nil
}
