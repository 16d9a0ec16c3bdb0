package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lockDown gives up what a network that is up does not need. The helper process
// in the namespace keeps what it has.
func (s *slirp) lockDown() error {
	if !s.o.sandbox && !s.o.seccomp {
		return nil
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		if !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("set no_new_privs: %w", err)
		}
		s.log.Warn("this binary was linked with cgo, so it cannot confine itself: build it with CGO_ENABLED=0")
		return nil
	}
	if s.o.sandbox {
		if err := dropCapabilities(); err != nil {
			return fmt.Errorf("create sandbox: %w", err)
		}
		switch err := closeFiles(s.o.apiSocket); {
		case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
			s.log.Warn("the kernel has no Landlock (Linux 5.13), so the file system stays open to this process")
		case err != nil:
			return fmt.Errorf("create sandbox: %w", err)
		}
	}
	if s.o.seccomp {
		if err := forbidSyscalls(); err != nil {
			return fmt.Errorf("enable seccomp: %w", err)
		}
	}
	return nil
}

// allThreads makes a system call on every thread of this process.
func allThreads(trap, a1, a2, a3 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, a3, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// dropCapabilities leaves the capability to listen on low ports, if there is one.
func dropCapabilities() error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&h, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	const keep = 1 << unix.CAP_NET_BIND_SERVICE
	if data[0].Effective&(1<<unix.CAP_SETPCAP) != 0 {
		for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
			if c == unix.CAP_NET_BIND_SERVICE {
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

// Access rights of files since the first version of Landlock
// (include/uapi/linux/landlock.h).
const (
	landlockAll  = 1<<13 - 1
	landlockRead = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
)

// closeFiles leaves of the file system what the resolver's configuration is
// read from, and the directory that the API socket is removed from.
func closeFiles(apiSocket string) error {
	attr := struct{ access uint64 }{landlockAll}
	ruleset, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(ruleset))
	open := map[string]uint64{"/etc": landlockRead, "/run": landlockRead}
	if target, err := filepath.EvalSymlinks("/etc/resolv.conf"); err == nil {
		open[filepath.Dir(target)] = landlockRead
	}
	if apiSocket != "" {
		open[filepath.Dir(apiSocket)] |= unix.LANDLOCK_ACCESS_FS_REMOVE_FILE
	}
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

// System calls that a network which is up has no use for end the process, but
// for those that the Go runtime makes, and takes an error of.
var (
	fatalSyscalls = []uint32{
		unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_PIDFD_GETFD, unix.SYS_PTRACE,
		unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_DELETE_MODULE, unix.SYS_FINIT_MODULE,
		unix.SYS_INIT_MODULE, unix.SYS_CHROOT, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSOPEN,
		unix.SYS_FSPICK, unix.SYS_MOUNT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_PIVOT_ROOT,
		unix.SYS_UMOUNT2, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_SETNS,
		unix.SYS_UNSHARE, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
	}
	failingSyscalls = []uint32{unix.SYS_PRCTL, unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_SEND_SIGNAL}
)

// auditArch is what the kernel calls the processor that this binary is for.
var auditArch = map[string]uint32{
	"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64, "riscv64": unix.AUDIT_ARCH_RISCV64,
	"ppc64le": unix.AUDIT_ARCH_PPC64LE, "s390x": unix.AUDIT_ARCH_S390X,
}

// x32Bit marks the system calls of another calling convention on amd64.
const x32Bit = 0x40000000

// Offsets in struct seccomp_data.
const (
	seccompNumber = 0
	seccompArch   = 4
)

// forbidSyscalls installs a filter for all threads.
func forbidSyscalls() error {
	arch, ok := auditArch[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("there is no filter for %s", runtime.GOARCH)
	}
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	give := func(verdict uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: verdict}
	}
	skipUnless := func(how uint16, k uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | how, K: k, Jf: 1}
	}
	filter := []unix.SockFilter{
		load(seccompArch),
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: arch, Jt: 1},
		give(unix.SECCOMP_RET_KILL_PROCESS),
		load(seccompNumber),
		skipUnless(unix.BPF_JGE, x32Bit), give(unix.SECCOMP_RET_KILL_PROCESS),
	}
	for _, nr := range fatalSyscalls {
		filter = append(filter, skipUnless(unix.BPF_JEQ, nr), give(unix.SECCOMP_RET_KILL_PROCESS))
	}
	for _, nr := range failingSyscalls {
		filter = append(filter, skipUnless(unix.BPF_JEQ, nr), give(unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM)))
	}
	filter = append(filter, give(unix.SECCOMP_RET_ALLOW))
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	switch {
	case errno != 0:
		return errno
	case r != 0:
		return fmt.Errorf("thread %d has a filter of its own", r)
	}
	return nil
}
