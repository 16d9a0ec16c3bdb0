package sandbox

import "golang.org/x/sys/unix"

// System calls that a process which parses no packets has no use for. Those with
// which it replaces a worker that has crashed are not among them: execve, what a
// worker shuts itself in with (prctl), and what signals are sent with.
var fatalSyscalls = []uint32{
	unix.SYS_EXECVEAT, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_PIDFD_GETFD, unix.SYS_PTRACE,
	unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_DELETE_MODULE, unix.SYS_FINIT_MODULE,
	unix.SYS_INIT_MODULE, unix.SYS_CHROOT, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSOPEN,
	unix.SYS_FSPICK, unix.SYS_MOUNT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_PIVOT_ROOT,
	unix.SYS_UMOUNT2, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_SETNS,
	unix.SYS_UNSHARE, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
}

// ForbidSyscalls has these end the process, whichever thread makes them.
func ForbidSyscalls() error {
	f, err := newFilter()
	if err != nil {
		return err
	}
	for _, nr := range fatalSyscalls {
		f.judge(nr, unix.SECCOMP_RET_KILL_PROCESS)
	}
	return f.install(unix.SECCOMP_RET_ALLOW)
}
