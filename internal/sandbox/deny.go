package sandbox

import "golang.org/x/sys/unix"

// System calls that a process which parses no packets has no use for end it, but
// for those that the Go runtime makes, and takes an error of. Execve is not among
// them: it is how a worker that has crashed is replaced.
var (
	fatalSyscalls = []uint32{
		unix.SYS_EXECVEAT, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_PIDFD_GETFD, unix.SYS_PTRACE,
		unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_DELETE_MODULE, unix.SYS_FINIT_MODULE,
		unix.SYS_INIT_MODULE, unix.SYS_CHROOT, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSOPEN,
		unix.SYS_FSPICK, unix.SYS_MOUNT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_PIVOT_ROOT,
		unix.SYS_UMOUNT2, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_SETNS,
		unix.SYS_UNSHARE, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
	}
	failingSyscalls = []uint32{unix.SYS_PRCTL, unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_SEND_SIGNAL}
)

// ForbidSyscalls forbids these for all threads.
func ForbidSyscalls() error {
	f, err := newFilter()
	if err != nil {
		return err
	}
	for _, nr := range fatalSyscalls {
		f.judge(nr, unix.SECCOMP_RET_KILL_PROCESS)
	}
	for _, nr := range failingSyscalls {
		f.judge(nr, unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM))
	}
	return f.install(unix.SECCOMP_RET_ALLOW)
}
