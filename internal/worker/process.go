package worker

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// name is what the worker is called, as argv[0].
const name = "usernet-worker"

// socketFD is the worker's end of the socket.
const socketFD = 3

// A Process is a running worker. It ends with the process that has started it,
// however that ends.
type Process struct {
	*Conn
	pid    int
	done   chan struct{}
	state  *os.ProcessState // once done
	kill   func()
	stderr words
}

// ErrNoSockets is the error of Start where there is no way to speak with a worker:
// a caller's sandbox may forbid socketpair(2), or, as that of GNU Guix does, have
// it do nothing and report success.
var ErrNoSockets = errors.New("there are no socket pairs")

// Start starts a worker, which waits to be told what to do. Serve has to be called.
func Start() (*Process, error) {
	p, err := start()
	if err != nil {
		return nil, fmt.Errorf("worker: start: %w", err)
	}
	return p, nil
}

func start() (*Process, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoSockets, err)
	}
	if kind, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_TYPE); err != nil || kind != unix.SOCK_SEQPACKET {
		return nil, ErrNoSockets // and what is in fds was there before
	}
	theirs := os.NewFile(uintptr(fds[1]), "worker's end")
	defer theirs.Close()
	conn, err := unixConn(fds[0])
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer null.Close()
	words, stderr, err := os.Pipe()
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer stderr.Close()
	p := &Process{Conn: newConn(conn, MaxFromWorker, writeTimeout), done: make(chan struct{})}
	started := make(chan error)
	go p.own(started, &os.ProcAttr{
		Dir: "/", Env: environment(), Files: []*os.File{null, null, stderr, theirs},
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true},
	}, words)
	if err := <-started; err != nil {
		conn.Close()
		words.Close()
		return nil, err
	}
	return p, nil
}

// own starts the process and reaps it. The kernel kills the child when the thread
// that forked it ends (PR_SET_PDEATHSIG), so this goroutine keeps one for it.
func (p *Process) own(started chan<- error, attr *os.ProcAttr, words io.ReadCloser) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	proc, err := os.StartProcess("/proc/self/exe", []string{name}, attr)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w: mount /proc", err)
		}
		started <- err
		return
	}
	p.pid = proc.Pid
	p.kill = func() { _ = proc.Kill() }
	var read sync.WaitGroup
	read.Go(func() {
		_, _ = io.Copy(&p.stderr, words)
		words.Close()
	})
	started <- nil
	p.state, _ = proc.Wait()
	read.Wait()
	close(p.done)
}

// PID returns the worker's process.
func (p *Process) PID() int { return p.pid }

// Done is closed when the worker has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Kill ends the worker and waits until it has.
func (p *Process) Kill() {
	p.kill()
	<-p.done
}

// End says how the worker has ended, once it has, and what it had to say.
func (p *Process) End() (how, words string) {
	how = "it is not known how"
	if p.state != nil {
		how = p.state.String()
	}
	return how, p.stderr.text()
}

// Violated reports whether the kernel has ended the worker for a system call that
// it may not make.
func (p *Process) Violated() bool {
	if p.state == nil {
		return false
	}
	status, ok := p.state.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGSYS
}

// words keeps the beginning of what is written: of a crash, that is the cause.
type words struct {
	mu sync.Mutex // guards following
	b  []byte
}

const maxWords = 16 << 10

// Write implements io.Writer.
func (w *words) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b = append(w.b, b[:min(len(b), maxWords-len(w.b))]...)
	return len(b), nil
}

func (w *words) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.TrimSpace(string(w.b))
}

// environment is all that the worker inherits: one processor, a small heap, and
// what is said to the Go runtime otherwise.
func environment() []string {
	// Without TZ the time zone would be read from a file.
	env := []string{"GODEBUG=containermaxprocs=0,updatemaxprocs=0", "TZ="}
	for _, v := range []struct{ name, otherwise string }{
		{"GOMAXPROCS", "1"}, {"GOGC", ""}, {"GOMEMLIMIT", ""}, {"GORACE", ""}, {"GOTRACEBACK", ""},
	} {
		value, ok := os.LookupEnv(v.name)
		if !ok || value == "" {
			value = v.otherwise
		}
		if value != "" {
			env = append(env, v.name+"="+value)
		}
	}
	return env
}

// Main takes over, and does not return, if this process is one that Start has
// started: serve is given the connection, and its return ends the process.
func Main(serve func(*Conn) error) {
	if len(os.Args) != 1 || os.Args[0] != name {
		return
	}
	err := run(serve)
	if err != nil {
		fmt.Fprintf(os.Stderr, "usernet: worker: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(serve func(*Conn) error) error {
	kind, err := unix.GetsockoptInt(socketFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_SEQPACKET {
		return errors.New("this is a part of usernet that usernet starts by itself: run usernet")
	}
	unix.CloseOnExec(socketFD)
	peer, err := unix.GetsockoptUcred(socketFD, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fmt.Errorf("find parent: %w", err)
	}
	// The exec of a binary with capabilities has cleared it.
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	if int(peer.Pid) != os.Getppid() {
		return nil // it has ended
	}
	// The end is the parent's to decide, not that of whoever signals the group.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE)
	conn, err := unixConn(socketFD)
	if err != nil {
		return err
	}
	return serve(newConn(conn, MaxToWorker, 0))
}

// unixConn makes a connection of a socket, which it takes over.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "worker")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	c, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("the socket is a %T", conn)
	}
	return c, nil
}
