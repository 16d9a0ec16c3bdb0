// Package agent runs usernet's helper inside a container's user and network namespaces.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/rights"
)

const (
	// startTimeout bounds the time from the fork to the agent's first word.
	startTimeout = 10 * time.Second
	// requestTimeout bounds one request: all of them are a few system calls.
	requestTimeout = 10 * time.Second
	// closeTimeout is how long an agent has to go by itself.
	closeTimeout = time.Second
	// reapTimeout is how long one may take to end that has been killed.
	reapTimeout = 3 * time.Second
)

// Options of an agent. The zero value works.
type Options struct {
	Logger *slog.Logger // nil discards
}

// An Agent is a process of this binary that works inside a network namespace,
// with the rights of the user namespace that owns it. It ends with the process
// that started it, however that ends.
type Agent struct {
	pid  int
	log  *slog.Logger
	done chan struct{} // closed when the process is reaped

	mu   sync.Mutex // guards following; held for a request and its reply
	conn *net.UnixConn
	buf  []byte

	reapMu sync.Mutex // guards reaped
	reaped bool
	exit   syscall.WaitStatus // once done is closed

	words int   // the read end of its standard error
	seen  error // why it sees the host's files, if it does

	closing sync.Once
}

// Start starts the agent of a namespace and waits until it is inside. The
// namespace may be closed after that.
func Start(ctx context.Context, ns *netns.Namespace, o Options) (*Agent, error) {
	a, err := start(ctx, ns, o)
	if err != nil {
		return nil, fmt.Errorf("agent: attach to %s: %w", ns.Path(), explain(err, ns))
	}
	return a, nil
}

func start(ctx context.Context, ns *netns.Namespace, o Options) (*Agent, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !wired.Load() {
		// The new process would do what this one does, and start another.
		return nil, errors.New("this program does not begin with usernet.AgentMain: call it first in main")
	}
	conn, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer null.Close()
	// Whoever stops the agent, or has its descriptors, must not have anybody wait.
	var words [2]int
	if err := unix.Pipe2(words[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		conn.Close()
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer unix.Close(words[1])
	c, err := newChild(agentName, environment())
	if err != nil {
		conn.Close()
		unix.Close(words[0])
		return nil, err
	}
	c.null, c.socket, c.netns, c.stderr = int(null.Fd()), int(theirs.Fd()), int(ns.File().Fd()), words[1]
	if owner := ns.Owner(); owner != nil {
		c.user = int(owner.Fd())
	}

	a := &Agent{log: o.Logger, done: make(chan struct{}), conn: conn, buf: make([]byte, maxMessage), words: words[0]}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	started := make(chan error)
	go a.own(c, started)
	if err := <-started; err != nil {
		conn.Close()
		return nil, err
	}
	theirs.Close() // or its end would never be seen
	if err := a.hello(ctx); err != nil {
		conn.Close()
		a.end(0)
		return nil, a.blame(err)
	}
	if a.seen != nil && c.user >= 0 {
		a.log.Info("the helper process inside the namespace sees the host's files", "why", a.seen)
	}
	return a, nil
}

// own starts the child and reaps it. The kernel kills the child when the thread
// that forked it ends (PR_SET_PDEATHSIG), so this goroutine keeps one for it.
func (a *Agent) own(c *child, started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, seen, err := c.start()
	a.pid, a.seen = pid, seen
	started <- err
	if err != nil {
		unix.Close(a.words)
		return
	}
	// Wait first without reaping: until then the number is the agent's, and
	// kill may use it.
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	a.reapMu.Lock()
	a.exit, _ = wait(pid)
	a.reaped = true
	a.reapMu.Unlock()
	a.log.Debug("agent ended", "pid", pid, "status", int(a.exit))
	b := make([]byte, maxMessage)
	if n, _ := unix.Read(a.words, b); n > 0 {
		a.log.Warn("the helper process inside the namespace has left a message", "words", string(b[:n]))
	}
	unix.Close(a.words)
	close(a.done)
}

// end waits until the agent has ended, and kills it if that takes longer than
// grace. It gives up on one that a process of the container traces, and so keeps
// for itself even when it is dead.
func (a *Agent) end(grace time.Duration) {
	timer := time.AfterFunc(grace, a.kill)
	defer timer.Stop()
	select {
	case <-a.done:
	case <-time.After(grace + reapTimeout):
		a.log.Warn("the helper process inside the namespace has been killed, but somebody who traces it keeps it", "pid", a.pid)
	}
}

// blame says more of an agent that has ended with nothing said.
func (a *Agent) blame(err error) error {
	select {
	case <-a.done:
		if errors.Is(err, errEnded) && a.exit.Signaled() && a.exit.Signal() == syscall.SIGSYS {
			return fmt.Errorf("%w: a filter of system calls has killed it: have that let mount, umount2 and pivot_root through, or fail", err)
		}
	default:
	}
	return err
}

// SeesFiles tells why the agent sees the host's files; nil: it does not.
func (a *Agent) SeesFiles() error { return a.seen }

func (a *Agent) kill() {
	a.reapMu.Lock()
	defer a.reapMu.Unlock()
	if !a.reaped {
		_ = syscall.Kill(a.pid, syscall.SIGKILL)
	}
}

// hello waits until the agent says that it is inside the namespace.
func (a *Agent) hello(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = a.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := a.conn.SetReadDeadline(time.Now().Add(startTimeout)); err != nil {
		return err
	}
	r, fds, err := a.receive()
	rights.Close(fds)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	return r.err()
}

func (r *reply) err() error {
	if r.Error == "" {
		return nil
	}
	return &remoteError{r.Error, r.Errno}
}

// PID returns the agent's process.
func (a *Agent) PID() int { return a.pid }

// Done is closed when the agent has ended.
func (a *Agent) Done() <-chan struct{} { return a.done }

// OpenLink makes the link and hands over its far end.
func (a *Agent) OpenLink(spec LinkSpec) (Link, error) {
	r, fds, err := a.call(&request{Op: opLink, Link: &spec})
	if err == nil {
		if r.Link == nil || len(fds) != 1 {
			err = errors.New("the answer has no link")
		} else if err = r.Link.check(spec, fds[0]); err != nil {
			err = fmt.Errorf("the answer has a bad link: %w", err)
		}
		if err != nil {
			rights.Close(fds)
		}
	}
	if err != nil {
		return Link{}, fmt.Errorf("agent: open link: %w", err)
	}
	r.Link.FD = fds[0]
	return *r.Link, nil
}

// Configure gives the opened link its addresses and routes and sets it up, as
// well as the loopback interface. Where the namespace has no IPv6 the status
// says so; the rest is done.
func (a *Agent) Configure(addresses Addresses) (Status, error) {
	return a.status("configure link", &request{Op: opConfigure, Addresses: &addresses})
}

// SetUp sets the opened link and the loopback interface up and leaves addresses
// to programs inside.
func (a *Agent) SetUp() (Status, error) {
	return a.status("set link up", &request{Op: opSetUp})
}

func (a *Agent) status(verb string, q *request) (Status, error) {
	r, fds, err := a.call(q)
	rights.Close(fds)
	if err == nil && r.Status == nil {
		err = errors.New("the answer has no status")
	}
	if err != nil {
		return Status{}, fmt.Errorf("agent: %s: %w", verb, err)
	}
	return *r.Status, nil
}

// Look tells what an interface is like that may not be the agent's. If there is
// none of the name, errors.Is(err, syscall.ENODEV).
func (a *Agent) Look(name string) (View, error) {
	r, fds, err := a.call(&request{Op: opLook, Name: name})
	rights.Close(fds)
	if err == nil && r.View == nil {
		err = errors.New("the answer has no view")
	}
	if err != nil {
		return View{}, fmt.Errorf("agent: look at interface: %w", err)
	}
	return *r.View, nil
}

// SetDefaultRoute6 sets or removes the IPv6 default route that Configure knows.
// Without IPv6 in the namespace it does nothing.
func (a *Agent) SetDefaultRoute6(on bool) error {
	_, fds, err := a.call(&request{Op: opRoute6, On: on})
	rights.Close(fds)
	if err != nil {
		return fmt.Errorf("agent: set IPv6 default route: %w", err)
	}
	return nil
}

// Close ends the agent. Links that were opened stay with their owners.
func (a *Agent) Close() error {
	a.closing.Do(func() {
		// What is being asked need not be answered any more.
		_ = a.conn.SetDeadline(time.Now().Add(closeTimeout))
		_, fds, _ := a.callWithin(closeTimeout, &request{Op: opBye})
		rights.Close(fds)
		a.mu.Lock()
		a.conn.Close()
		a.mu.Unlock()
		a.end(closeTimeout)
	})
	return nil
}

// call sends a request and waits for its reply.
func (a *Agent) call(q *request) (*reply, []int, error) {
	return a.callWithin(requestTimeout, q)
}

func (a *Agent) callWithin(limit time.Duration, q *request) (*reply, []int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return nil, nil, ended(err)
	}
	raw, err := a.conn.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var sendErr error
	err = raw.Write(func(fd uintptr) bool {
		sendErr = send(int(fd), q, nil)
		return !errors.Is(sendErr, unix.EAGAIN)
	})
	if err = errors.Join(err, sendErr); err != nil {
		return nil, nil, ended(err)
	}
	r, fds, err := a.receive()
	if err != nil {
		// A late answer must not pass for that of the next request.
		a.conn.Close()
		return nil, nil, err
	}
	if err := r.err(); err != nil {
		rights.Close(fds)
		return nil, nil, err
	}
	return r, fds, nil
}

// receive reads one reply. The agent lives among the container's processes, so
// what it says is checked like anything from there.
func (a *Agent) receive() (*reply, []int, error) {
	control := make([]byte, unix.CmsgSpace(maxFDs*4))
	n, controlN, flags, _, err := a.conn.ReadMsgUnix(a.buf, control)
	fds, fdErr := rights.Decode(control[:controlN])
	if err != nil {
		rights.Close(fds) // beside nothing
		return nil, nil, ended(err)
	}
	if fdErr != nil {
		return nil, nil, fmt.Errorf("read descriptors: %w", fdErr)
	}
	r := new(reply)
	if err := decode(a.buf[:n], flags, r); err != nil {
		rights.Close(fds)
		return nil, nil, fmt.Errorf("read answer: %w", err)
	}
	r.clean()
	return r, fds, nil
}

// errEnded is io.EOF too.
var errEnded = fmt.Errorf("the agent process has ended: %w", io.EOF)

// ended names what the errors of a closed socket mean.
func ended(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return errEnded
	case errors.Is(err, net.ErrClosed):
		return errors.New("the agent is closed")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("the agent does not answer")
	}
	return err
}

// socketPair returns the two ends of the control socket.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "agent")
	theirs := os.NewFile(uintptr(fds[1]), "agent's end")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		theirs.Close()
		return nil, nil, fmt.Errorf("socket pair is a %T", conn)
	}
	return unixConn, theirs, nil
}

// environment is all that the agent inherits: a small heap on one processor,
// and what a test binary built for coverage or with the race detector reads.
func environment() []string {
	env := []string{"GOMAXPROCS=1", "GOGC=25", "GODEBUG=containermaxprocs=0,updatemaxprocs=0"}
	for _, name := range []string{"GOCOVERDIR", "GORACE", "GOTRACEBACK"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// explain tells what to do about a refusal.
func explain(err error, ns *netns.Namespace) error {
	var s *stepError
	switch isStep := errors.As(err, &s); {
	case isStep && s.step == stepJoin && errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: that one belongs to uid %d, this is uid %d: run usernet as that user or as root", err, ns.OwnerUID(), os.Geteuid())
	case isStep && s.step == stepMounts && errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w: user.max_mnt_namespaces or user.max_ipc_namespaces is used up, or the container has lowered its own: without them it could see files of the host", err)
	case isStep && s.step == stepExec && errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: the namespace's root is another user there: make the binary executable for all (chmod a+rx)", err)
	case isStep && s.step == stepExec && errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: mount /proc", err)
	case isStep && s.step == stepNetwork && errors.Is(err, unix.EPERM) && ns.Owner() == nil:
		return fmt.Errorf("%w: the namespace belongs to the user namespace this process is in: run usernet as root there (CAP_SYS_ADMIN and CAP_NET_ADMIN)", err)
	}
	return err
}
