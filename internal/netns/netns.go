// Package netns finds network namespaces and sees them end.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// nameDir holds the bind mounts of `ip netns add`.
const nameDir = "/run/netns"

// A Namespace is an open network namespace. It stays valid until Close, even
// when its processes and paths are gone: the kernel keeps it for the
// descriptor's sake.
type Namespace struct {
	path  string
	dev   uint64
	ino   uint64
	uid   uint32 // creator of the owning user namespace
	net   *os.File
	owner *os.File // owning user namespace; nil where the caller is in it
	pidfd *os.File // process that path names; nil where it names none

	close sync.Once
}

// Open opens the network namespace at path: /proc/PID/ns/net, a bind mount, or
// (without any slash) a name made by `ip netns add`.
func Open(path string) (*Namespace, error) {
	if path == "" {
		return nil, errors.New("netns: open namespace: empty path: give a path such as /proc/PID/ns/net")
	}
	if !strings.Contains(path, "/") {
		path = filepath.Join(nameDir, path)
	}
	ns, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("netns: open %s: %w", path, err)
	}
	return ns, nil
}

// OpenPID opens the network namespace that process pid is in.
func OpenPID(pid int) (*Namespace, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("netns: open namespace of process %d: a process id is a positive number", pid)
	}
	ns, err := open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, fmt.Errorf("netns: open namespace of process %d: %w", pid, err)
	}
	return ns, nil
}

// Path returns the path that the namespace was opened by.
func (n *Namespace) Path() string { return n.path }

// Inode returns the number that the kernel knows the namespace by, the one in
// the brackets of `readlink /proc/PID/ns/net`.
func (n *Namespace) Inode() uint64 { return n.ino }

// File returns the open namespace. It belongs to n.
func (n *Namespace) File() *os.File { return n.net }

// Owner returns the user namespace that owns the network namespace, and whose
// capabilities count in it. It is nil where the calling process is in that
// user namespace already. The file belongs to n.
func (n *Namespace) Owner() *os.File { return n.owner }

// IsOwn reports whether the calling process is in the namespace itself.
func (n *Namespace) IsOwn() bool {
	var own unix.Stat_t
	return unix.Stat("/proc/self/ns/net", &own) == nil && uint64(own.Dev) == n.dev && own.Ino == n.ino
}

// OwnerUID returns the user who made the owning user namespace, as the calling
// process numbers users.
func (n *Namespace) OwnerUID() int { return int(n.uid) }

// Close releases the namespace. A Watch under way goes on.
func (n *Namespace) Close() error {
	n.close.Do(func() {
		for _, f := range []*os.File{n.net, n.owner, n.pidfd} {
			if f != nil {
				f.Close()
			}
		}
	})
	return nil
}

func open(path string) (*Namespace, error) {
	n := &Namespace{path: path}
	if err := n.init(); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

func (n *Namespace) init() error {
	// The process is pinned before its namespace is opened: were the number
	// reused in between, the pidfd would say that its process has ended.
	pid := pathPID(n.path)
	if pid != 0 {
		pidfd, err := openPidfd(pid)
		if err != nil {
			return err
		}
		n.pidfd = pidfd
	}
	// O_NONBLOCK, because the path could as well name a FIFO.
	fd, err := unix.Open(n.path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return n.explainOpen(pid, err)
	}
	n.net = os.NewFile(uintptr(fd), n.path)
	if err := checkType(fd); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	n.dev, n.ino = uint64(st.Dev), st.Ino
	if exited(n.pidfd) {
		return fmt.Errorf("process %d has ended: start the container anew and give its new process", pid)
	}
	return n.findOwner()
}

// findOwner asks the kernel for the user namespace that owns n.
func (n *Namespace) findOwner() error {
	fd, err := unix.IoctlRetInt(int(n.net.Fd()), unix.NS_GET_USERNS)
	if errors.Is(err, unix.EPERM) {
		return errors.New("its user namespace lies outside of the one this process is in: run usernet where the namespace was made")
	}
	if err != nil {
		return fmt.Errorf("find the owning user namespace: %w", err)
	}
	unix.CloseOnExec(fd) // the ioctl sets it already; cheap to be sure
	n.owner = os.NewFile(uintptr(fd), "user namespace of "+n.path)
	uid, err := ownerUID(fd)
	if err != nil {
		return fmt.Errorf("find the user of the owning user namespace: %w", err)
	}
	n.uid = uid

	var theirs, ours unix.Stat_t
	if err := unix.Fstat(fd, &theirs); err != nil {
		return err
	}
	if err := unix.Stat("/proc/self/ns/user", &ours); err != nil {
		return fmt.Errorf("find this process's user namespace: /proc/self/ns/user: %w: is /proc mounted?", err)
	}
	if ours.Dev == theirs.Dev && ours.Ino == theirs.Ino {
		n.owner.Close()
		n.owner = nil
	}
	return nil
}

// explainOpen says why path cannot be opened and what to do about it.
func (n *Namespace) explainOpen(pid int, err error) error {
	if pid != 0 && exited(n.pidfd) {
		return fmt.Errorf("process %d has ended: start the container anew and give its new process", pid)
	}
	switch {
	case errors.Is(err, unix.ENOENT) && pid != 0:
		return fmt.Errorf("%w: process %d lives but /proc does not show it: mount /proc of its pid namespace, without hidepid", err, pid)
	case errors.Is(err, unix.ENOENT) && filepath.Dir(n.path) == nameDir:
		return fmt.Errorf("%w: `ip netns list` shows the names there are; a path needs a slash", err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w: give the path of a running container's namespace, such as /proc/PID/ns/net", err)
	case errors.Is(err, fs.ErrPermission) && pid != 0:
		return fmt.Errorf("%w: process %d belongs to %s: run usernet as that user or as root", err, pid, processOwner(pid))
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: run usernet as the user who made the namespace, or as root", err)
	}
	return err
}

// checkType refuses everything that is not a network namespace.
func checkType(fd int) error {
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil {
		// nsfs is the only file system that knows the request.
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0 {
			return errors.New("not a network namespace but an empty file: its bind mount is gone, or is in another mount namespace; make the namespace anew")
		}
		return errors.New("not a network namespace: give a path such as /proc/PID/ns/net, or a bind mount of one")
	}
	if kind != unix.CLONE_NEWNET {
		return fmt.Errorf("a %s namespace, not a network namespace: the path of a process's one ends in /ns/net", typeName(kind))
	}
	return nil
}

func typeName(kind int) string {
	switch kind {
	case unix.CLONE_NEWUSER:
		return "user"
	case unix.CLONE_NEWNS:
		return "mount"
	case unix.CLONE_NEWPID:
		return "pid"
	case unix.CLONE_NEWIPC:
		return "ipc"
	case unix.CLONE_NEWUTS:
		return "uts"
	case unix.CLONE_NEWCGROUP:
		return "cgroup"
	case unix.CLONE_NEWTIME:
		return "time"
	}
	return "different"
}

// pathPID returns the process that a path below /proc names by its number, or 0.
// A thread counts as its process only where it is the first one: the others may
// end earlier, and then the path goes, which the comparison of paths sees.
func pathPID(path string) int {
	parts := strings.Split(filepath.Clean(path), "/")
	if len(parts) != 5 || parts[0] != "" || parts[1] != "proc" || parts[3] != "ns" {
		return 0
	}
	pid, err := strconv.Atoi(parts[2])
	if err != nil || pid <= 0 {
		return 0
	}
	return pid
}

// processOwner names the user of a process for an error message.
func processOwner(pid int) string {
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil {
		return "another user"
	}
	if int(st.Uid) == os.Geteuid() {
		return "this user, but to a user namespace that is not (or is not dumpable)"
	}
	return fmt.Sprintf("uid %d", st.Uid)
}

// Enter moves the calling thread into the network namespace open at fd. The
// caller has locked the thread and is allowed to.
func Enter(fd int) error { return vnetns.Set(vnetns.NsHandle(fd)) }
