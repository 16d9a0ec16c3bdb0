package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ProcessName is what a hub calls itself, as argv[0]. Its arguments are base and
// name of its place.
const ProcessName = "usernet-hub"

// Limits of patience.
const (
	startTime = 10 * time.Second // for a hub to listen
	endTime   = 5 * time.Second  // for a hub that ends to be gone
)

// ErrNoHub means that nobody serves the network.
var ErrNoHub = errors.New("hub: there is no such network")

// Connect connects to the hub of a place.
func Connect(p Place) (*Conn, error) {
	// The path of a socket may be 107 bytes long, that of a directory longer.
	dir, err := unix.Open(p.Dir(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, ErrNoHub
	}
	if err != nil {
		return nil, fmt.Errorf("hub: open %s: %w", p.Dir(), err)
	}
	defer unix.Close(dir)
	u, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: socketPath(dir)})
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTDIR):
		return nil, ErrNoHub
	case err != nil:
		return nil, fmt.Errorf("hub: connect: %w", err)
	}
	c := newConn(u)
	if _, err := c.peer(); err != nil {
		c.Close()
		return nil, fmt.Errorf("hub: connect: what listens at %s is no hub of ours: %w", p.path(sockName), err)
	}
	return c, nil
}

func socketPath(dir int) string { return "/proc/self/fd/" + strconv.Itoa(dir) + "/" + sockName }

// ConnectOrStart connects to the hub of a place, and starts it if there is none:
// a process of this binary that outlives this one.
func ConnectOrStart(ctx context.Context, p Place, env []string) (*Conn, error) {
	for began := time.Now(); ; {
		c, err := Connect(p)
		if !errors.Is(err, ErrNoHub) {
			return c, err
		}
		err = start(ctx, p, env)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, unix.ENOENT) && time.Since(began) < startTime:
			// A hub that has ended has taken the directory with it.
		case err != nil:
			if c, again := Connect(p); again == nil {
				return c, nil
			}
			return nil, err
		case time.Since(began) > startTime:
			return nil, errors.New("hub: start: it ends again and again: see its log beside its socket")
		}
	}
}

// start starts a hub unless somebody else has meanwhile.
func start(ctx context.Context, p Place, env []string) error {
	if err := p.Make(); err != nil {
		return err
	}
	f, err := p.lock(startName, startTime)
	if err != nil {
		return fmt.Errorf("hub: start: %w", err)
	}
	defer f.Close()
	if c, err := Connect(p); err == nil {
		c.Close()
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// What this process was given by its caller is none of the hub's: a pipe
	// that somebody waits at would never see its end.
	_ = unix.CloseRange(3, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC)
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	log, err := os.OpenFile(p.path(logName), os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{ProcessName, p.base, p.name}
	cmd.Dir = "/"
	cmd.Env = env
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("hub: start: %w", err)
	}
	go cmd.Wait()
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(startTime)); err != nil {
		return err
	}
	b, err := io.ReadAll(r)
	switch {
	case err != nil:
		return fmt.Errorf("hub: start: it does not say that it is ready: %w", err)
	case string(b) == ready:
		return nil
	case len(b) == 0:
		return fmt.Errorf("hub: start: it has ended: see %s", p.path(logName))
	}
	return fmt.Errorf("hub: start: %s", b)
}

// ready is what a hub says to who has started it; all else is an error.
const ready = "ready"

// readyFD is where it says so.
const readyFD = 3

// A Listener is a hub's hold of its place.
type Listener struct {
	p    Place
	lock *os.File
	l    *net.UnixListener
}

// Listen takes the place that this process was started for, and says so.
func Listen(p Place) (*Listener, error) {
	var st unix.Stat_t
	if unix.Fstat(readyFD, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, errors.New("this is a part of usernet that usernet starts by itself: run usernet")
	}
	unix.CloseOnExec(readyFD)
	told := os.NewFile(readyFD, "ready")
	defer told.Close()
	l, err := listen(p)
	if err != nil {
		fmt.Fprint(told, err)
		return nil, err
	}
	fmt.Fprint(told, ready)
	return l, nil
}

func listen(p Place) (*Listener, error) {
	lock, err := p.lock(lockName, endTime)
	if err != nil {
		return nil, err
	}
	_ = unix.Unlink(p.path(sockName))
	dir, err := unix.Open(p.Dir(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		lock.Close()
		return nil, err
	}
	defer unix.Close(dir)
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: socketPath(dir)})
	unix.Umask(old)
	if err != nil {
		lock.Close()
		return nil, err
	}
	l.SetUnlinkOnClose(false) // by a path that will mean something else
	return &Listener{p, lock, l}, nil
}

// Accept returns the next connection of this user and network namespace, and the
// process at its other end.
func (l *Listener) Accept() (c *Conn, pid int, err error) {
	for {
		u, err := l.l.AcceptUnix()
		if err != nil {
			return nil, 0, err
		}
		c := newConn(u)
		pid, err := c.peer()
		if err == nil {
			return c, pid, nil
		}
		_ = c.Send(map[string]string{"error": "the hub of this network does not know this process: " + err.Error()})
		c.Close()
	}
}

// Close lets nobody in any more, and gives the place up. Who has connected and
// was not answered comes again.
func (l *Listener) Close() {
	_ = unix.Unlink(l.p.path(sockName))
	l.l.Close()
	l.p.remove()
	l.lock.Close()
}
