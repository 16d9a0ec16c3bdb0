package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// inherit takes over a descriptor that the caller has opened for us.
func inherit(flag string, fd int) (*os.File, error) {
	if fd <= 2 {
		return nil, usagef("set --%s %d: 0 to 2 are the standard descriptors: choose one from 3 on", flag, fd)
	}
	// What this process has opened by itself is close-on-exec, and what came
	// through the exec cannot be.
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 {
		return nil, usagef("set --%s %d: the descriptor is not open: who starts usernet has to leave it open over the exec", flag, fd)
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "--"+flag), nil
}

// inheritWritable is inherit for a descriptor to write to.
func inheritWritable(flag string, fd int) (*os.File, error) {
	f, err := inherit(flag, fd)
	if err != nil {
		return nil, err
	}
	mode, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil || mode&unix.O_ACCMODE == unix.O_RDONLY {
		return nil, usagef("set --%s %d: the descriptor is open for reading only: pass the pipe's other end", flag, fd)
	}
	return f, nil
}

// signalReady tells whoever waits at the other end of f that the guest can use
// its network.
func signalReady(f *os.File) error {
	defer f.Close()
	if _, err := f.WriteString("1"); err != nil {
		return fmt.Errorf("write to ready-fd: %w", err)
	}
	return nil
}

// waitHangup blocks until nobody holds the other end of f, and returns nil
// then, or until ctx is done. It reads nothing and leaves f's mode alone, for
// others may share it.
func waitHangup(ctx context.Context, f *os.File) error {
	var wake [2]int
	if err := unix.Pipe2(wake[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("watch exit-fd: %w", err)
	}
	defer unix.Close(wake[0])
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		unix.Close(wake[1])
		close(woken)
	})
	defer func() {
		if stop() {
			unix.Close(wake[1])
			return
		}
		<-woken
	}()
	for {
		p := []unix.PollFd{{Fd: int32(f.Fd())}, {Fd: int32(wake[0]), Events: unix.POLLIN}}
		_, err := unix.Poll(p, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("watch exit-fd: %w", err)
		case p[1].Revents != 0:
			return ctx.Err()
		case p[0].Revents != 0:
			return nil
		}
	}
}

// A pidFile is a file with our process id in it.
type pidFile struct {
	path string
	info os.FileInfo
}

// writePIDFile writes path, or what stands there from earlier, anew.
func writePIDFile(path string) (*pidFile, error) {
	// Not blocking, and not following a link: neither a FIFO nor what somebody
	// else has put into a shared directory.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o644)
	if err != nil {
		return nil, pidFileError(path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, pidFileError(path, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("write PID file %s: not a regular file: choose another path", path)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	}
	if err != nil {
		os.Remove(path)
		return nil, pidFileError(path, err)
	}
	return &pidFile{path, info}, nil
}

func pidFileError(path string, err error) error {
	var p *os.PathError
	if errors.As(err, &p) {
		err = p.Err
	}
	hint := ""
	switch {
	case errors.Is(err, unix.ENOENT):
		hint = ": make its directory first"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EROFS):
		hint = ": choose a path where this user may write"
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("write PID file %s: it is a symbolic link: choose another path", path)
	}
	return fmt.Errorf("write PID file %s: %w%s", path, err, hint)
}

// remove removes the file, unless another process has made its own in its place.
func (p *pidFile) remove() {
	if info, err := os.Lstat(p.path); err == nil && os.SameFile(info, p.info) {
		os.Remove(p.path)
	}
}

// untilSignal returns a context that ends with the first signal to end. The
// second one kills: whoever insists shall not have to wait.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	signals := honoured(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	if len(signals) == 0 { // would mean all of them
		return context.WithCancel(ctx)
	}
	ctx, stop := signal.NotifyContext(ctx, signals...)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// honoured leaves out the signals that the caller wants ignored, as nohup does.
func honoured(signals ...syscall.Signal) []os.Signal {
	var out []os.Signal
	for _, s := range signals {
		if !signal.Ignored(s) {
			out = append(out, s)
		}
	}
	return out
}

// notify has c told of those signals, all of which may be ignored.
func notify(c chan<- os.Signal, signals []syscall.Signal) {
	if s := honoured(signals...); len(s) > 0 { // none would mean all
		signal.Notify(c, s...)
	}
}

// notifySystemd sends a state to the service manager, if there is one that
// wants to know: sd_notify(3).
func notifySystemd(state ...string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	// A leading @ stands for the abstract namespace, in Go as in systemd.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(strings.Join(state, "\n"))); err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	return nil
}
