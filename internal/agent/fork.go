package agent

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Descriptors of the agent, besides the standard ones.
const (
	socketFD = 3 // its end of the socket pair
	netnsFD  = 4 // the network namespace to join
	errorFD  = 5 // where the child says which steps failed; exec closes it
	firstFD  = 6 // closed from here on
)

// A step is what the child does between clone and exec.
type step uint32

const (
	stepNone step = iota
	stepDescriptors
	stepJoin
	stepNetwork
	stepSession
	stepBecomeRoot
	stepCapabilities
	stepAmbient
	stepParent
	stepExec

	// Without these the agent can do its work.
	stepAlone
	stepMounts
	stepBinary
	stepRoot
	stepLeave
)

func (s step) String() string {
	switch s {
	case stepDescriptors:
		return "arrange descriptors"
	case stepJoin:
		return "join the owning user namespace"
	case stepNetwork:
		return "join the network namespace"
	case stepSession:
		return "start a session"
	case stepBecomeRoot:
		return "become root in the user namespace"
	case stepCapabilities:
		return "keep capabilities"
	case stepAmbient:
		return "raise ambient capabilities"
	case stepParent:
		return "find the parent alive"
	case stepExec:
		return "execute /proc/self/exe"
	case stepMounts:
		return "make a mount namespace"
	case stepBinary:
		return "mount the binary read-only"
	case stepRoot:
		return "make an empty root"
	case stepLeave:
		return "leave the old root"
	}
	return fmt.Sprintf("step %d", uint32(s))
}

// A failure is what the child writes when a step fails.
type failure struct {
	step  step
	errno syscall.Errno
}

// needed are the capabilities the agent works with: enter and make network
// namespaces, configure links, open packet sockets.
const needed = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW

// A child is everything that the forked process needs, laid out beforehand: it
// can neither allocate nor call anything but the kernel.
type child struct {
	parent uintptr // process id
	user   int     // user namespace to join, or -1
	null   int
	socket int
	netns  int
	stderr int
	errors int
	maxFD  uintptr

	binary  *byte        // its path; nil leaves the agent the host's files
	program unix.Statx_t // what is there
	found   unix.Statx_t
	mounts  [2]uint64 // where a struct mnt_ns_info would go
	exe     uintptr   // descriptor of it, once it is protected
	left    bool      // the host's files

	uidMap *byte
	gidMap *byte
	argv   []*byte
	envv   []*byte

	capHeader unix.CapUserHeader
	capData   [2]unix.CapUserData
	failed    failure
}

// newChild prepares a child called name. The descriptors stay the caller's.
func newChild(name string, env []string) (*child, error) {
	c := &child{parent: uintptr(os.Getpid()), user: -1}
	var err error
	for _, p := range []struct {
		to   **byte
		path string
	}{{&c.uidMap, "/proc/self/uid_map"}, {&c.gidMap, "/proc/self/gid_map"}} {
		if *p.to, err = syscall.BytePtrFromString(p.path); err != nil {
			return nil, err
		}
	}
	if c.argv, err = syscall.SlicePtrFromStrings([]string{name}); err != nil {
		return nil, err
	}
	if c.envv, err = syscall.SlicePtrFromStrings(env); err != nil {
		return nil, err
	}
	c.capHeader.Version = unix.LINUX_CAPABILITY_VERSION_3
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	c.maxFD = uintptr(min(limit.Cur, 1<<16))
	return c, nil
}

// start forks, and returns when the child has executed the binary anew or has
// failed to. seen is why the agent sees the host's files, if it does. The caller
// has locked its thread, for the child dies with that.
func (c *child) start() (pid int, seen, err error) {
	seen = c.prepareHide()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return 0, nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer unix.Close(pipe[0])
	// The child puts its descriptors at 0 to 5 one by one, so none of them may
	// be there already.
	fds := []*int{&c.null, &c.socket, &c.netns, &c.stderr, &c.errors, &c.user}
	c.errors = pipe[1]
	for i, fd := range fds {
		if *fd < 0 {
			continue
		}
		high, err := unix.FcntlInt(uintptr(*fd), unix.F_DUPFD_CLOEXEC, firstFD)
		if err != nil {
			unix.Close(pipe[1])
			for _, made := range fds[:i] {
				unix.Close(*made)
			}
			return 0, nil, fmt.Errorf("duplicate descriptor: %w", err)
		}
		*fd = high
	}
	unix.Close(pipe[1])

	syscall.ForkLock.Lock()
	id, errno := c.fork()
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(c)
	for _, fd := range fds {
		if *fd >= 0 {
			unix.Close(*fd)
		}
	}
	if errno != 0 {
		return 0, nil, fmt.Errorf("clone: %w", errno)
	}
	pid = int(id)
	failed, err := readFailures(pipe[0], startTimeout)
	if err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_, _ = wait(pid)
		return 0, nil, err
	}
	if failed != nil {
		seen = failed
	}
	return pid, seen, nil
}

// readFailures reads the child's pipe: nothing in it is success. A failure that
// the agent can do with is returned as seen. The container's processes may belong
// to the same user, and stop the child, so there is a limit.
func readFailures(fd int, limit time.Duration) (seen, err error) {
	var f failure
	b := (*[unsafe.Sizeof(f)]byte)(unsafe.Pointer(&f))[:]
	for deadline := time.Now().Add(limit); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return nil, errors.New("the child does not get going: something has stopped it")
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if n <= 0 {
			if err != nil && !errors.Is(err, unix.EINTR) {
				return nil, fmt.Errorf("wait for the child: %w", err)
			}
			continue
		}
		switch n, err := unix.Read(fd, b); {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, fmt.Errorf("read the child's pipe: %w", err)
		case n == 0:
			return seen, nil
		case f.mild():
			seen = &stepError{f.step, f.errno}
		default:
			return nil, &stepError{f.step, f.errno}
		}
	}
}

// mild reports whether the agent can do without the step. It cannot where something
// is used up, for that the container may have brought about, in order to get at the
// host's files. The root of a user namespace may even limit mount namespaces in it.
func (f failure) mild() bool {
	switch f.errno {
	case unix.ENOSPC, unix.EUSERS, unix.EDQUOT, unix.ENOMEM, unix.EAGAIN, unix.EMFILE, unix.ENFILE:
		return false
	}
	return f.step >= stepAlone
}

// stepError tells which step failed before the exec.
type stepError struct {
	step  step
	errno syscall.Errno
}

func (e *stepError) Error() string {
	if e.step == stepAlone {
		return "this kernel has root of a container find all mount namespaces of its user namespace, and so the host's files while the agent leaves them: a newer one does not"
	}
	return e.step.String() + ": " + e.errno.Error()
}

func (e *stepError) Unwrap() error { return e.errno }

// wait reaps the process pid.
func wait(pid int) (syscall.WaitStatus, error) {
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(pid, &status, 0, nil)
		if !errors.Is(err, syscall.EINTR) {
			return status, err
		}
	}
}

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()

// fork clones the process. It returns in the parent only.
//
// The child is a copy with a single thread: whatever lock the other threads
// held stays locked in it for ever, so after the clone there are but raw system
// calls, no allocation, no growing stack (beforeFork has poisoned its bound, so
// that only nosplit functions can be called), no race detector. vfork would be
// quicker, but it shares memory: a process of the user namespace could reach
// through the child into ours.
//
//go:noinline
//go:norace
//go:nocheckptr
func (c *child) fork() (pid uintptr, errno syscall.Errno) {
	beforeFork()
	if runtime.GOARCH == "s390x" { // swaps the first two arguments
		pid, _, errno = syscall.RawSyscall6(syscall.SYS_CLONE, 0, uintptr(syscall.SIGCHLD), 0, 0, 0, 0)
	} else {
		pid, _, errno = syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	}
	if errno != 0 || pid != 0 {
		afterFork()
		return pid, errno
	}
	afterForkInChild()
	c.run()
	return 0, 0 // never
}

// run is the child: it joins the user namespace, takes what it needs there and
// executes the binary anew, or writes the step that failed and exits.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (c *child) run() {
	// Nobody inside the user namespace may trace this copy of our memory. The
	// exec makes a new one that has none of it.
	syscall.RawSyscall6(syscall.SYS_PRCTL, syscall.PR_SET_DUMPABLE, 0, 0, 0, 0, 0)
	syscall.RawSyscall6(syscall.SYS_PRCTL, syscall.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0, 0)
	errno := c.moveFDs()
	if errno == 0 {
		errno = c.join()
	}
	hide := errno == 0 && c.binary != nil
	if hide {
		if e := c.protectBinary(); e != 0 {
			hide = false
			c.report(e)
		}
	}
	if errno == 0 {
		errno = c.takeRights()
	}
	if errno == 0 && hide {
		if e := c.leaveFiles(); e != 0 {
			c.report(e)
		}
	}
	if errno == 0 {
		errno = c.execute()
	}
	c.report(errno)
	for {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 1, 0, 0)
	}
}

// report tells the parent which step has failed.
//
//go:nosplit
//go:norace
func (c *child) report(errno syscall.Errno) {
	c.failed.errno = errno
	syscall.RawSyscall(syscall.SYS_WRITE, errorFD, uintptr(unsafe.Pointer(&c.failed)), unsafe.Sizeof(c.failed))
}

// moveFDs puts the descriptors where the agent finds them. The originals are all
// above.
//
//go:nosplit
//go:norace
func (c *child) moveFDs() (errno syscall.Errno) {
	c.failed.step = stepDescriptors
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(c.errors), errorFD, unix.O_CLOEXEC); errno != 0 {
		return errno
	}
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(c.null), 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(c.null), 1, 0); errno != 0 {
		return errno
	}
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(c.stderr), 2, 0); errno != 0 {
		return errno
	}
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(c.socket), socketFD, 0); errno != 0 {
		return errno
	}
	_, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(c.netns), netnsFD, 0)
	return errno
}

// join enters the namespaces, and leaves behind what is the caller's. Whoever
// traces the agent finds it in the container's network from the first.
//
//go:nosplit
//go:norace
func (c *child) join() (errno syscall.Errno) {
	if c.user >= 0 {
		c.failed.step = stepJoin
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETNS, uintptr(c.user), unix.CLONE_NEWUSER, 0); errno != 0 {
			return errno
		}
	}
	c.failed.step = stepNetwork
	if _, _, errno = syscall.RawSyscall(unix.SYS_SETNS, netnsFD, unix.CLONE_NEWNET, 0); errno != 0 {
		return errno
	}
	// Whatever else is open belongs to the caller, close-on-exec or not: the
	// write end of a pipe that somebody reads until its end, for example.
	if _, _, errno = syscall.RawSyscall(unix.SYS_CLOSE_RANGE, firstFD, 1<<32-1, 0); errno != 0 {
		for fd := uintptr(firstFD); fd < c.maxFD; fd++ { // before Linux 5.9
			syscall.RawSyscall(syscall.SYS_CLOSE, fd, 0, 0)
		}
	}
	// A session of its own keeps the terminal's signals away: the agent ends
	// when its parent does, not before. Nor does it hold the working directory.
	c.failed.step = stepSession
	if _, _, errno = syscall.RawSyscall(syscall.SYS_SETSID, 0, 0, 0); errno != 0 {
		return errno
	}
	syscall.RawSyscall(syscall.SYS_CHDIR, cstring(pathRoot), 0, 0)
	return 0
}

// takeRights sees to it that the exec keeps the capabilities that the joining
// gave. Root keeps them all, so become root where the user namespace has one:
// also because a user of the host, its root in particular, has no business
// among the container's processes.
//
//go:nosplit
//go:norace
func (c *child) takeRights() (errno syscall.Errno) {
	uid, _, _ := syscall.RawSyscall(syscall.SYS_GETEUID, 0, 0, 0)
	if uid == 0 {
		return 0
	}
	if c.user >= 0 {
		c.failed.step = stepBecomeRoot
		_, _, errno = syscall.RawSyscall(syscall.SYS_SETRESUID, 0, 0, 0)
		if errno == 0 {
			// The group may have no mapping, and setgroups be forbidden: then
			// they stay what they were, which gives no right in there.
			syscall.RawSyscall(syscall.SYS_SETRESGID, 0, 0, 0)
			syscall.RawSyscall(syscall.SYS_SETGROUPS, 0, 0, 0)
			return 0
		}
		if errno != syscall.EINVAL {
			return errno
		}
		// No root. A user whom the namespace knows stays who he is; another one
		// becomes one that it knows, if it knows any.
		if uid == overflowID {
			syscall.RawSyscall(syscall.SYS_SETGROUPS, 0, 0, 0)
			uid = firstID(c.gidMap)
			syscall.RawSyscall(syscall.SYS_SETRESGID, uid, uid, uid)
			uid = firstID(c.uidMap)
			syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid)
		}
	}
	return c.raiseAmbient()
}

// overflowID is what the kernel shows for a user who is not in the map
// (/proc/sys/kernel/overflowuid; nobody changes it).
const overflowID = 65534

// atCWD is AT_FDCWD, whose sign does not fit.
const atCWD = ^uintptr(-unix.AT_FDCWD - 1)

// firstID reads the first id of a map, or what no map has: ^0.
//
//go:nosplit
//go:norace
func firstID(path *byte) uintptr {
	var b [32]byte
	fd, _, errno := syscall.RawSyscall6(syscall.SYS_OPENAT, atCWD, uintptr(unsafe.Pointer(path)), syscall.O_RDONLY, 0, 0, 0)
	if errno != 0 {
		return ^uintptr(0)
	}
	n, _, errno := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&b)), unsafe.Sizeof(b))
	syscall.RawSyscall(syscall.SYS_CLOSE, fd, 0, 0)
	if errno != 0 || n == 0 || n > unsafe.Sizeof(b) {
		return ^uintptr(0)
	}
	id, digits := uintptr(0), 0
	for i := uintptr(0); i < n; i++ {
		switch {
		case b[i] >= '0' && b[i] <= '9':
			id = id*10 + uintptr(b[i]-'0')
			digits++
		case digits > 0:
			return id
		}
	}
	return ^uintptr(0)
}

// raiseAmbient makes the exec keep the needed capabilities, for nobody but root
// does by itself.
//
//go:nosplit
//go:norace
func (c *child) raiseAmbient() (errno syscall.Errno) {
	c.failed.step = stepCapabilities
	if _, _, errno = syscall.RawSyscall(syscall.SYS_CAPGET, uintptr(unsafe.Pointer(&c.capHeader)), uintptr(unsafe.Pointer(&c.capData)), 0); errno != 0 {
		return errno
	}
	keep := c.capData[0].Permitted & needed
	c.capData[0].Inheritable |= keep
	if _, _, errno = syscall.RawSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(&c.capHeader)), uintptr(unsafe.Pointer(&c.capData)), 0); errno != 0 {
		return errno
	}
	c.failed.step = stepAmbient
	for i := uintptr(0); i < 32; i++ {
		if keep&(1<<i) == 0 {
			continue
		}
		if _, _, errno = syscall.RawSyscall6(syscall.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, i, 0, 0, 0); errno != 0 {
			return errno
		}
	}
	return 0
}

// execute executes the binary anew.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (c *child) execute() (errno syscall.Errno) {
	// The change of credentials has cleared the signal, so set it again; then
	// look whether the parent went in the meantime.
	c.failed.step = stepParent
	syscall.RawSyscall6(syscall.SYS_PRCTL, syscall.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0, 0)
	if parent, _, _ := syscall.RawSyscall(syscall.SYS_GETPPID, 0, 0, 0); parent != c.parent {
		return syscall.ESRCH
	}
	c.failed.step = stepExec
	argv, envv := uintptr(unsafe.Pointer(&c.argv[0])), uintptr(unsafe.Pointer(&c.envv[0]))
	if c.left {
		_, _, errno = syscall.RawSyscall6(unix.SYS_EXECVEAT, c.exe, cstring(pathNone), argv, envv, unix.AT_EMPTY_PATH, 0)
		return errno
	}
	syscall.RawSyscall(syscall.SYS_CHDIR, cstring(pathRoot), 0, 0)
	syscall.RawSyscall(syscall.SYS_CHDIR, cstring(pathSysctl), 0, 0)
	_, _, errno = syscall.RawSyscall(syscall.SYS_EXECVE, cstring(pathSelf), argv, envv)
	return errno
}
