package sandbox

import "golang.org/x/sys/unix"

// allowedSyscalls are those that are allowed whatever their arguments: those on
// descriptors that are open, and the Go runtime's.
var allowedSyscalls = []uint32{
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_CLOSE, unix.SYS_FSTAT,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EVENTFD2, unix.SYS_PPOLL,
	unix.SYS_PIPE2, unix.SYS_SPLICE,
	unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_ACCEPT4, unix.SYS_SHUTDOWN, unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME,
	unix.SYS_SENDTO, unix.SYS_RECVFROM, unix.SYS_SENDMSG, unix.SYS_RECVMSG, unix.SYS_SENDMMSG, unix.SYS_RECVMMSG,
	unix.SYS_GETSOCKOPT,

	unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_GETTIMEOFDAY,
	unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_GETCPU,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK,
	unix.SYS_RESTART_SYSCALL, unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_GETRANDOM,
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
}

// threadFlags are those that the Go runtime makes threads with.
const threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD

// options are the socket options that are set, by level.
var options = []struct {
	level uint32
	names []uint32
}{
	{unix.SOL_SOCKET, []uint32{
		unix.SO_ERROR, unix.SO_BROADCAST, unix.SO_KEEPALIVE, unix.SO_OOBINLINE, unix.SO_LINGER, unix.SO_REUSEADDR,
		unix.SO_RCVBUF, unix.SO_SNDBUF, unix.SO_BINDTODEVICE, unix.SO_RCVTIMEO, unix.SO_PEEK_OFF,
	}},
	{unix.IPPROTO_IP, []uint32{unix.IP_TTL, unix.IP_RECVERR, unix.IP_RECVTTL, unix.IP_PKTINFO, unix.IP_MTU_DISCOVER}},
	{unix.IPPROTO_IPV6, []uint32{
		unix.IPV6_V6ONLY, unix.IPV6_UNICAST_HOPS, unix.IPV6_RECVERR, unix.IPV6_RECVHOPLIMIT, unix.IPV6_RECVPKTINFO,
		unix.IPV6_MTU_DISCOVER,
	}},
	{unix.IPPROTO_TCP, []uint32{
		unix.TCP_NODELAY, unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT, unix.TCP_CONGESTION, unix.TCP_USER_TIMEOUT,
	}},
	{unix.IPPROTO_UDP, []uint32{unix.UDP_GRO, unix.UDP_SEGMENT}},
}

// allowSyscalls ends the process at any system call that moving packets does not
// take.
func allowSyscalls() error {
	f, err := allowFilter(uint32(unix.Getpid()))
	if err != nil {
		return err
	}
	return f.install(unix.SECCOMP_RET_KILL_PROCESS)
}

func allowFilter(pid uint32) (filter, error) {
	f, err := newFilter()
	if err != nil {
		return nil, err
	}
	for _, nr := range append(allowedSyscalls, archSyscalls...) {
		f.judge(nr, unix.SECCOMP_RET_ALLOW)
	}
	allow := func(args ...argument) choice { return choice{args, unix.SECCOMP_RET_ALLOW} }
	oneOf := func(n int, values ...uint32) (choices []choice) {
		for _, v := range values {
			choices = append(choices, allow(is(n, v)))
		}
		return choices
	}
	noExec := argument{2, unix.PROT_EXEC, 0}
	f.judgeArgs(unix.SYS_MMAP, allow(noExec))
	f.judgeArgs(unix.SYS_MPROTECT, allow(noExec))
	f.judgeArgs(unix.SYS_CLONE, oneOf(0, threadFlags, threadFlags|unix.CLONE_SETTLS)...)
	f.judgeArgs(unix.SYS_TGKILL, allow(is(0, pid)))
	// Names of memory areas, for those who read /proc/PID/maps.
	f.judgeArgs(unix.SYS_PRCTL, allow(is(0, unix.PR_SET_VMA)))
	f.judgeArgs(unix.SYS_FCNTL, oneOf(1, unix.F_GETFL, unix.F_SETFL, unix.F_GETFD, unix.F_SETFD, unix.F_SETPIPE_SZ)...)
	f.judgeArgs(unix.SYS_IOCTL, oneOf(1, unix.TIOCINQ, unix.TIOCOUTQ, unix.SIOCGIFINDEX)...)
	f.judgeArgs(unix.SYS_SOCKET, sockets(allow)...)
	var opts []choice
	for _, o := range options {
		for _, name := range o.names {
			opts = append(opts, allow(is(1, o.level), is(2, name)))
		}
	}
	f.judgeArgs(unix.SYS_SETSOCKOPT, opts...)
	return f, nil
}

// sockets are those of TCP, UDP and ICMP. A routing socket is refused instead of
// being fatal: the net package asks the kernel for the names of interfaces, and
// does without.
func sockets(allow func(...argument) choice) []choice {
	choices := []choice{{[]argument{is(0, unix.AF_NETLINK)}, unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)}}
	for _, domain := range []uint32{unix.AF_INET, unix.AF_INET6} {
		for _, k := range []struct {
			kind      uint32
			protocols []uint32
		}{
			{unix.SOCK_STREAM, []uint32{0, unix.IPPROTO_TCP}},
			{unix.SOCK_DGRAM, []uint32{0, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6}},
		} {
			for _, protocol := range k.protocols {
				choices = append(choices, allow(is(0, domain), argument{1, ^uint32(unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC), k.kind}, is(2, protocol)))
			}
		}
	}
	return choices
}
