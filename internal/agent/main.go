package agent

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/memory"
	"github.com/usernet/usernet/internal/rights"
)

// Names that this binary gives itself, as argv[0].
const (
	agentName   = "usernet-agent"
	cleanerName = "usernet-cleaner"
)

func init() {
	// The agent does everything on one thread, the first: the namespaces are
	// the thread's, and so is the signal at its parent's death. The main
	// goroutine is sure to be on that thread only until init is over.
	if isAgent() {
		runtime.LockOSThread()
	}
}

func isAgent() bool { return len(os.Args) == 1 && os.Args[0] == agentName }

// wired is set when Main was called.
var wired atomic.Bool

// Wired reports whether Main was called, so that this program can be started in
// its other parts.
func Wired() bool { return wired.Load() }

// Main takes over, and does not return, if this process is one that Start has
// started. It has to be the first call in main and in TestMain.
func Main() {
	wired.Store(true)
	var err error
	switch {
	case isAgent():
		err = run()
	case len(os.Args) == 1 && os.Args[0] == cleanerName:
		err = runCleaner()
	default:
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "usernet: agent: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run is the agent's process.
func run() error {
	if err := checkParent(); errors.Is(err, unix.ESRCH) {
		return nil
	} else if err != nil {
		return err
	}
	ignoreSignals()
	name := agentName + "\x00" // it has been executed by a number
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData(name))), 0, 0, 0)
	// What a process of the same user, or of the container, could read of this
	// one by ptrace is nobody's business.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	_ = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	unix.CloseOnExec(socketFD)
	unix.CloseOnExec(netnsFD)

	s, err := newServer()
	if err == nil {
		err = s.serve()
	} else {
		err = send(socketFD, failed(err), nil)
	}
	if errors.Is(err, unix.EPIPE) {
		return nil // nobody is left to hear of it
	}
	return err
}

// checkParent makes sure that this process was started by Start, and that the
// parent has not ended since (ESRCH).
func checkParent() error {
	kind, err := unix.GetsockoptInt(socketFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_SEQPACKET {
		return errors.New("this is a part of usernet that usernet starts by itself: run usernet")
	}
	peer, err := unix.GetsockoptUcred(socketFD, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fmt.Errorf("find parent: %w", err)
	}
	if int(peer.Pid) != os.Getppid() {
		return unix.ESRCH
	}
	return nil
}

// ignoreSignals leaves the end to the parent. A service manager that signals
// every process of a group would otherwise end the agent before its parent.
func ignoreSignals() {
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE)
}

// idleAfter is the silence after which a server gives memory back, in
// milliseconds.
const idleAfter = 200

// A server answers the parent's requests, one by one.
type server struct {
	net     *network
	sockets socketTable
	inside  inside
}

func newServer() (*server, error) {
	n, err := newNetwork()
	if err != nil {
		return nil, err
	}
	return &server{net: n}, nil
}

// serve says that the agent is inside, and answers until the parent says goodbye or
// is gone.
func (s *server) serve() error {
	if err := send(socketFD, reply{}, nil); err != nil {
		return err
	}
	buf := make([]byte, maxMessage)
	used := true
	for {
		if used && !s.readable(idleAfter) {
			// An idle agent lives as long as the container does.
			memory.Trim()
			used = false
		}
		s.await()
		n, err := receive(buf)
		if err != nil || n == 0 {
			s.inside.close()
			return err
		}
		var q request
		if err := decode(buf[:n], 0, &q); err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		used = q.Op != opListening // that comes again and again, and takes little
		answer, fds := s.answer(&q)
		err = send(socketFD, answer, fds)
		rights.Close(fds)
		if q.Op == opBye {
			return nil
		}
		if err != nil {
			s.inside.close()
			return err
		}
	}
}

// readable waits for a request, or for the parent's end.
func (s *server) readable(milliseconds int) bool {
	n, _ := unix.Poll(s.polled(), milliseconds)
	return n > 0
}

func (s *server) polled() []unix.PollFd {
	p := []unix.PollFd{{Fd: socketFD, Events: unix.POLLIN}, {Fd: int32(s.inside.fd), Events: unix.POLLIN}}
	if s.inside.fd == 0 {
		p = p[:1]
	}
	return p
}

// await makes sockets until there is a request.
func (s *server) await() {
	timeout := -1
	for s.inside.fd != 0 {
		p := s.polled()
		n, err := unix.Poll(p, timeout)
		if n == 0 && err == nil {
			debug.FreeOSMemory()
			timeout = -1
		}
		if n <= 0 {
			continue
		}
		if p[1].Revents != 0 {
			s.inside.serve()
			timeout = idleAfter
		}
		if p[0].Revents != 0 {
			return
		}
	}
}

func receive(buf []byte) (int, error) {
	for {
		n, _, flags, _, err := unix.Recvmsg(socketFD, buf, nil, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECONNRESET):
			return 0, nil
		case err == nil && flags&unix.MSG_TRUNC != 0:
			return 0, errors.New("read request: too long")
		}
		return n, err
	}
}

// answer does what is asked. The descriptors are passed on, then closed.
func (s *server) answer(q *request) (reply, []int) {
	var (
		r   reply
		fds []int
		err error
	)
	switch {
	case q.Op == opLink && q.Link != nil:
		var link Link
		if link, err = s.net.openLink(*q.Link); err == nil {
			r.Link, fds = &link, []int{link.FD}
		}
	case q.Op == opConfigure && q.Addresses != nil:
		r.Status, err = s.net.configure(*q.Addresses)
	case q.Op == opSetUp:
		r.Status, err = s.net.setUp()
	case q.Op == opLook:
		r.View, err = s.net.look(q.Name)
	case q.Op == opRoute6:
		err = s.net.setDefaultRoute6(q.On)
	case q.Op == opCutOff:
		r.Count, err = s.net.cutOff()
	case q.Op == opListening:
		r.Listening, err = s.sockets.listening(q.Addrs)
	case q.Op == opSockets:
		var fd int
		if r.Inside, fd, err = s.inside.open(s.net); err == nil {
			fds = []int{fd}
		}
	case q.Op == opBye:
		s.inside.close()
	default:
		err = fmt.Errorf("unknown request %q", q.Op)
	}
	if err != nil {
		return failed(err), nil
	}
	return r, fds
}
