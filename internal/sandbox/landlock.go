package sandbox

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fileAccess are the rights that each version of Landlock knows of files
// (include/uapi/linux/landlock.h).
var fileAccess = []uint64{0, 1<<13 - 1, 1<<14 - 1, 1<<15 - 1, 1<<15 - 1, 1<<16 - 1}

// LandlockVersion returns the version of Landlock that the kernel has, 0 if none.
func LandlockVersion() int {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(v)
}

// Read is the right to read files and list directories.
const Read = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR

// CloseFiles leaves of the file system what is in open, with these rights of
// Landlock. What does not exist is left out. Without Landlock it does nothing, and
// returns 0 instead of its version.
func CloseFiles(open map[string]uint64) (version int, err error) {
	if version = LandlockVersion(); version == 0 {
		return 0, nil
	}
	return version, closeFiles(version, open)
}

func closeFiles(version int, open map[string]uint64) error {
	attr := struct{ access uint64 }{fileAccess[min(version, len(fileAccess)-1)]}
	ruleset, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(ruleset))
	for path, access := range open {
		if err := openBeneath(int(ruleset), path, access); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("keep %s open: %w", path, err)
		}
	}
	if err := allThreads(unix.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, 0); err != nil {
		return fmt.Errorf("close the file system: %w", err)
	}
	return nil
}

func openBeneath(ruleset int, path string, access uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var rule [12]byte // a packed struct: access, descriptor
	*(*uint64)(unsafe.Pointer(&rule[0])) = access
	*(*int32)(unsafe.Pointer(&rule[8])) = int32(fd)
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&rule[0])), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
