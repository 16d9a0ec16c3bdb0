package agent

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Root of the container's user namespace may trace the agent, if it can name it,
// and do through it whatever the agent could. So the agent gets no files: between
// clone and exec, while nobody can look into it, the child leaves for an empty
// mount namespace. All that is left is
//
//   - the root, an empty tmpfs but for dev/net/tun,
//   - the working directory, which is /proc/sys/net as a mount that leads
//     nowhere else, and shows the sysctls of the network namespace,
//   - the binary, as a mount of its own that cannot be written. Else somebody
//     could keep /proc/AGENT/exe, and write to the file when nobody executes it
//     any more.
//
// System V IPC stays behind as well.

// sysctlDir is where the agent works: sysctls of the network have paths from here.
const sysctlDir = "/proc/sys/net/"

// Where the root of an agent shall be, and what is in it. The paths are C strings.
const (
	pathRoot    = "/\x00"
	pathAbove   = "/..\x00" // what is mounted on the root
	pathHere    = ".\x00"
	pathSelf    = "/proc/self/exe\x00"
	pathMounts  = "/proc/self/ns/mnt\x00"
	pathSysctl  = "/proc/sys/net\x00"
	pathTun     = "/dev/net/tun\x00"
	pathNone    = "\x00"
	newDev      = "dev\x00"
	newNet      = "dev/net\x00"
	newTun      = "dev/net/tun\x00"
	typeTmpfs   = "tmpfs\x00"
	optionsRoot = "size=4k,nr_inodes=8,mode=755\x00"
)

// nextMounts is NS_MNT_GET_NEXT of include/uapi/linux/nsfs.h. What it is to read has
// 16 bytes, and an architecture's own bits for that are those of any such request.
const nextMounts = unix.TUNGETIFF&0xe0000000 | 16<<16 | 0xb7<<8 | 11

// cstring is where a constant C string is.
//
//go:nosplit
//go:norace
func cstring(s string) uintptr { return uintptr(unsafe.Pointer(unsafe.StringData(s))) }

// prepareHide finds out what hiding takes.
func (c *child) prepareHide() error {
	if c.user < 0 {
		return errors.New("usernet is in the user namespace that owns the network namespace: who may trace its agent may trace usernet as well")
	}
	if dynamic() {
		return errors.New("this binary was linked with cgo, so it needs files to begin with: build it with CGO_ENABLED=0")
	}
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := unix.Statx(unix.AT_FDCWD, "/proc/self/exe", 0, unix.STATX_INO, &c.program); err != nil {
		return fmt.Errorf("look at the binary: %w", err)
	}
	// The namespace's own limit is for its root to set, this one is not.
	if limit, err := readFile("/proc/sys/user/max_mnt_namespaces"); err == nil && limit == "0" {
		return errors.New("user.max_mnt_namespaces is 0")
	}
	c.binary, err = syscall.BytePtrFromString(path)
	return err
}

// dynamic reports whether the kernel has loaded an interpreter for this program.
func dynamic() bool {
	const base = 7 // AT_BASE
	vector, err := unix.Auxv()
	for _, v := range vector {
		if v[0] == base && v[1] != 0 {
			return true
		}
	}
	return err != nil
}

// protectBinary moves the child into a mount namespace of its own, and opens the
// binary there in a way that nobody can write to it. That has to be as the
// caller, who can reach it for sure.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (c *child) protectBinary() (errno syscall.Errno) {
	// For a moment the new namespace has the host's files, and belongs to the
	// container's user namespace already. From Linux 6.12 on until that was mended, root
	// there could walk from its own mount namespace to all the others.
	c.failed.step = stepAlone
	own, _, errno := syscall.RawSyscall6(syscall.SYS_OPENAT, atCWD, cstring(pathMounts), unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	_, _, errno = syscall.RawSyscall(syscall.SYS_IOCTL, own, nextMounts, uintptr(unsafe.Pointer(&c.mounts)))
	if errno == 0 || errno == syscall.ENOENT {
		return syscall.EXDEV
	}
	c.failed.step = stepMounts
	_, _, errno = syscall.RawSyscall(syscall.SYS_UNSHARE, unix.CLONE_NEWNS|unix.CLONE_NEWIPC, 0, 0)
	if errno == syscall.EINVAL { // no CONFIG_IPC_NS
		_, _, errno = syscall.RawSyscall(syscall.SYS_UNSHARE, unix.CLONE_NEWNS, 0, 0)
	}
	if errno != 0 {
		return errno
	}
	// What is unmounted outside goes here too, but nothing gets out.
	if errno = mount(0, cstring(pathRoot), 0, unix.MS_SLAVE|unix.MS_REC, 0); errno != 0 {
		return errno
	}
	c.failed.step = stepBinary
	binary := uintptr(unsafe.Pointer(c.binary))
	if errno = mount(binary, binary, 0, unix.MS_BIND, 0); errno != 0 {
		return errno
	}
	if errno = mount(0, binary, 0, unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, 0); errno != 0 {
		return errno
	}
	fd, _, errno := syscall.RawSyscall6(syscall.SYS_OPENAT, atCWD, binary, unix.O_PATH|unix.O_CLOEXEC, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if _, _, errno = syscall.RawSyscall6(unix.SYS_STATX, fd, cstring(pathNone), unix.AT_EMPTY_PATH, unix.STATX_INO, uintptr(unsafe.Pointer(&c.found)), 0); errno != 0 {
		return errno
	}
	if c.found.Ino != c.program.Ino || c.found.Dev_major != c.program.Dev_major || c.found.Dev_minor != c.program.Dev_minor {
		return syscall.ESTALE // another one has taken its place
	}
	c.exe = fd
	return 0
}

// leaveFiles makes the new root and enters it. That has to be as the user who will
// be the agent, since one whom the user namespace does not know could make no
// file. What the user namespace has no id for at all goes without a TAP.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (c *child) leaveFiles() (errno syscall.Errno) {
	c.failed.step = stepRoot
	sysctl := cstring(pathSysctl)
	mount(sysctl, sysctl, 0, unix.MS_BIND|unix.MS_REC, 0)
	dir, _, noDir := syscall.RawSyscall6(syscall.SYS_OPENAT, atCWD, sysctl, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0, 0, 0)
	// The process's root is below what is mounted on it, so that all else is where
	// it was until the very end.
	if errno = mount(cstring(typeTmpfs), cstring(pathRoot), cstring(typeTmpfs), unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, cstring(optionsRoot)); errno != 0 {
		return errno
	}
	if _, _, errno = syscall.RawSyscall(syscall.SYS_CHDIR, cstring(pathAbove), 0, 0); errno != 0 {
		return errno
	}
	c.placeTun()
	c.failed.step = stepLeave
	if _, _, errno = syscall.RawSyscall(syscall.SYS_PIVOT_ROOT, cstring(pathHere), cstring(pathHere), 0); errno != 0 {
		return errno
	}
	c.left = true
	if _, _, errno = syscall.RawSyscall(unix.SYS_UMOUNT2, cstring(pathHere), unix.MNT_DETACH, 0); errno != 0 {
		return errno
	}
	mount(0, cstring(pathRoot), 0, unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, 0)
	if noDir == 0 {
		syscall.RawSyscall(syscall.SYS_FCHDIR, dir, 0, 0)
	}
	return 0
}

// placeTun puts the TUN device into the new root, if there is one.
//
//go:nosplit
//go:norace
func (c *child) placeTun() {
	syscall.RawSyscall(unix.SYS_MKDIRAT, atCWD, cstring(newDev), 0o755)
	syscall.RawSyscall(unix.SYS_MKDIRAT, atCWD, cstring(newNet), 0o755)
	syscall.RawSyscall6(unix.SYS_MKNODAT, atCWD, cstring(newTun), syscall.S_IFREG, 0, 0, 0)
	if mount(cstring(pathTun), cstring(newTun), 0, unix.MS_BIND, 0) != 0 {
		syscall.RawSyscall(unix.SYS_UNLINKAT, atCWD, cstring(newTun), 0)
	}
}

// mount is mount(2).
//
//go:nosplit
//go:norace
func mount(source, target, kind, flags, data uintptr) syscall.Errno {
	_, _, errno := syscall.RawSyscall6(syscall.SYS_MOUNT, source, target, kind, flags, data, 0)
	return errno
}
