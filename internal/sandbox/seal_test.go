package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// attempts are what a sealed process tries. Those that the kernel does not end it
// for return what came of them.
var attempts = map[string]func() error{
	"open":          func() error { return call(unix.SYS_OPENAT, 0, 0, unix.O_RDONLY) },
	"openat2":       func() error { return call(unix.SYS_OPENAT2, 0, 0, 0) },
	"execve":        func() error { return call(unix.SYS_EXECVE, 0, 0, 0) },
	"execveat":      func() error { return call(unix.SYS_EXECVEAT, 0, 0, 0) },
	"ptrace":        func() error { return call(unix.SYS_PTRACE, unix.PTRACE_ATTACH, uintptr(os.Getppid()), 0) },
	"process_vm":    func() error { return call(unix.SYS_PROCESS_VM_READV, uintptr(os.Getppid()), 0, 0) },
	"pidfd_getfd":   func() error { return call(unix.SYS_PIDFD_GETFD, 0, 0, 0) },
	"kill-parent":   func() error { return call(unix.SYS_KILL, uintptr(os.Getppid()), 0, 0) },
	"tgkill-parent": func() error { return call(unix.SYS_TGKILL, uintptr(os.Getppid()), uintptr(os.Getppid()), 0) },
	"fork":          func() error { return call(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0) },
	"clone3":        func() error { return call(unix.SYS_CLONE3, 0, 0, 0) },
	"unshare":       func() error { return call(unix.SYS_UNSHARE, unix.CLONE_NEWUSER, 0, 0) },
	"setns":         func() error { return call(unix.SYS_SETNS, 0, 0, 0) },
	"mount":         func() error { return call(unix.SYS_MOUNT, 0, 0, 0) },
	"bpf":           func() error { return call(unix.SYS_BPF, 0, 0, 0) },
	"io_uring":      func() error { return call(unix.SYS_IO_URING_SETUP, 1, 0, 0) },
	"exec-memory": func() error {
		return call6(unix.SYS_MMAP, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	},
	"exec-protect": func() error { return call(unix.SYS_MPROTECT, 0, 4096, unix.PROT_EXEC) },
	"memfd":        func() error { return call(unix.SYS_MEMFD_CREATE, 0, 0, 0) },
	"dumpable":     func() error { return call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1, 0) },
	"unix":         func() error { return socket(unix.AF_UNIX, unix.SOCK_STREAM, 0) },
	"socketpair":   func() error { return call(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM, 0) },
	"packet":       func() error { return socket(unix.AF_PACKET, unix.SOCK_RAW, 0) },
	"vsock":        func() error { return socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) },
	"raw":          func() error { return socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW) },
	"raw6":         func() error { return socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6) },
	"sctp":         func() error { return socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP) },
	"mptcp":        func() error { return socket(unix.AF_INET, unix.SOCK_STREAM, 262) },
	"listen":       func() error { return call(unix.SYS_LISTEN, 0, 0, 0) },
	"tun-ioctl":    func() error { return call(unix.SYS_IOCTL, 0, unix.TUNSETIFF, 0) },
	"tiocsti":      func() error { return call(unix.SYS_IOCTL, 0, unix.TIOCSTI, 0) },
	"filter-socket": func() error {
		return call6(unix.SYS_SETSOCKOPT, 0, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, 0)
	},
	"ulp":   func() error { return call6(unix.SYS_SETSOCKOPT, 0, unix.IPPROTO_TCP, unix.TCP_ULP, 0) },
	"mark":  func() error { return call6(unix.SYS_SETSOCKOPT, 0, unix.SOL_SOCKET, unix.SO_MARK, 0) },
	"dup":   func() error { return call(unix.SYS_FCNTL, 0, unix.F_DUPFD, 0) },
	"chdir": func() error { return call(unix.SYS_CHDIR, 0, 0, 0) },

	// These are not fatal.
	"netlink": func() error {
		return want(socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE), unix.EAFNOSUPPORT)
	},
	"work": work,
}

// survive are the attempts that a process lives on after.
var survive = map[string]bool{"netlink": true, "work": true}

func call(nr, a, b, c uintptr) error { return call6(nr, a, b, c, 0) }

func call6(nr, a, b, c, d uintptr) error {
	_, _, errno := unix.Syscall6(nr, a, b, c, d, ^uintptr(0), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func socket(domain, kind, protocol int) error {
	fd, err := unix.Socket(domain, kind, protocol)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func want(got error, errno syscall.Errno) error {
	if !errors.Is(got, errno) {
		return fmt.Errorf("got %v, want %w", got, errno)
	}
	return nil
}

// work is what moving packets takes, the Go runtime's share included.
func work() error {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.WriteTo([]byte("x"), conn.LocalAddr()); err != nil {
		return err
	}
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, _, err := conn.ReadFrom(make([]byte, 10)); err != nil {
		return err
	}
	d := net.Dialer{Timeout: 5 * time.Second}
	if c, err := d.Dial("tcp4", "127.0.0.1:1"); err == nil {
		c.Close()
	} else if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	done := make(chan []byte)
	for range 8 { // more threads
		go func() {
			time.Sleep(time.Millisecond)
			b := make([]byte, 1<<20)
			unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
			done <- b
		}()
	}
	for range 8 {
		<-done
	}
	debug.FreeOSMemory()
	return nil
}

const attemptVariable = "USERNET_SANDBOX_ATTEMPT"

func TestMain(m *testing.M) {
	name := os.Getenv(attemptVariable)
	if name == "" {
		os.Exit(m.Run())
	}
	status, err := Seal()
	if err != nil {
		fmt.Println("seal:", err)
		os.Exit(3)
	}
	if status.Missing != "" {
		fmt.Println(status.Missing)
		os.Exit(4)
	}
	if name == "status" {
		json.NewEncoder(os.Stdout).Encode(status)
		os.Exit(0)
	}
	if err := attempts[name](); err != nil {
		fmt.Println(err)
		os.Exit(5)
	}
	os.Exit(0)
}

func sealed(t *testing.T, name string) (string, *os.ProcessState) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{attemptVariable + "=" + name, "GODEBUG=containermaxprocs=0,updatemaxprocs=0", "TZ="}
	out, err := cmd.CombinedOutput()
	var e *exec.ExitError
	if err != nil && !errors.As(err, &e) {
		t.Fatal(err)
	}
	if cmd.ProcessState.ExitCode() == 4 {
		t.Skip(string(out)) // the race detector's run time needs cgo
	}
	return string(out), cmd.ProcessState
}

// TestSealed tries every closed door.
func TestSealed(t *testing.T) {
	for name := range attempts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, state := sealed(t, name)
			if survive[name] {
				if state.ExitCode() != 0 {
					t.Errorf("%v: %s", state, out)
				}
				return
			}
			status := state.Sys().(syscall.WaitStatus)
			if !status.Signaled() || status.Signal() != unix.SIGSYS {
				t.Errorf("it lives on: %v, %s", state, out)
			}
		})
	}
}

// TestFilesClosed: the files are closed twice, by Landlock as well.
func TestFilesClosed(t *testing.T) {
	if LandlockVersion() == 0 {
		t.Skip("the kernel has no Landlock")
	}
	out, state := sealed(t, "status")
	var s Status
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&s); err != nil {
		t.Fatalf("%v: %v: %s", state, err, out)
	}
	if !s.NoNewPrivs || !s.NoCapabilities || !s.NotDumpable || !s.Seccomp || s.Landlock != LandlockVersion() {
		t.Errorf("status %+v", s)
	}
}
