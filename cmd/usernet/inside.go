package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// spacesMain takes over, and does not return, if this process is the one that
// startSpaces has started.
func spacesMain() {
	if len(os.Args) < 2 || os.Args[0] != spacesName {
		return
	}
	// The command gets a signal when the thread that forked it ends.
	runtime.LockOSThread()
	i, err := newInside(os.Args[1], os.Args[2:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "usernet:", err)
		os.Exit(exitFailure)
	}
	os.Exit(i.main())
}

// inside is the process in the namespaces.
type inside struct {
	command []string
	orders  *json.Decoder
	events  *json.Encoder
	job     job
	orphan  chan struct{} // closed when usernet has ended
}

func newInside(number string, command []string) (*inside, error) {
	fd, err := strconv.Atoi(number)
	if err != nil {
		return nil, errors.New("this is a part of usernet that usernet starts by itself: run usernet")
	}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || int(peer.Pid) != os.Getppid() {
		return nil, errors.New("this is a part of usernet that usernet starts by itself: run usernet")
	}
	unix.CloseOnExec(fd)
	conn := os.NewFile(uintptr(fd), "usernet")
	return &inside{
		command: command,
		orders:  json.NewDecoder(conn),
		events:  json.NewEncoder(conn),
		orphan:  make(chan struct{}),
	}, nil
}

// main prepares the namespaces, runs the command when it is told to, and
// returns its status.
func (i *inside) main() int {
	// Signals come as orders. What reaches this process directly was meant for
	// a whole group, and usernet passes it on.
	ignored := make(chan os.Signal, 1)
	notify(ignored, append(deadly, unix.SIGWINCH))
	// Daemons of the command become children of this process, not of init.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

	var o order
	if err := i.orders.Decode(&o); err != nil || o.Setup == nil {
		return exitFailure
	}
	m, err := prepareMounts(*o.Setup)
	if err != nil {
		return i.fail(exitFailure, err)
	}
	if i.events.Encode(event{Ready: true}) != nil {
		return exitFailure
	}
	o = order{}
	if err := i.orders.Decode(&o); err != nil || !o.Start {
		return exitFailure
	}
	if o.Setup != nil {
		if m, err = prepareMounts(*o.Setup); err != nil {
			return i.fail(exitFailure, err)
		}
	}
	if err := dropAmbient(); err != nil {
		return i.fail(exitFailure, err)
	}
	if status, err := i.job.start(i.command); err != nil {
		return i.fail(status, err)
	}
	go i.obey()
	go m.keep()
	return i.reap()
}

func (i *inside) fail(status int, err error) int {
	_ = i.events.Encode(event{Error: err.Error(), Status: status})
	return status
}

// dropAmbient leaves the command, under --keep-id, what its network needs.
func dropAmbient() error {
	on, err := unix.PrctlRetInt(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_IS_SET, unix.CAP_SYS_ADMIN, 0, 0)
	if err != nil || on == 0 {
		return nil
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_LOWER, unix.CAP_SYS_ADMIN, 0, 0); err != nil {
		return fmt.Errorf("drop a capability: %w", err)
	}
	return nil
}

// obey follows orders until usernet has ended, and ends everything then.
func (i *inside) obey() {
	for {
		var o order
		if i.orders.Decode(&o) != nil {
			close(i.orphan)
			_ = i.job.process.Kill()
			return
		}
		switch {
		case o.Signal != 0:
			_ = i.job.process.Signal(o.Signal)
		case o.Continue:
			i.job.resume()
		}
	}
}

// reap waits for the command, ends what it leaves running, whose network goes
// now, and returns its status.
func (i *inside) reap() int {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, unix.WUNTRACED, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return exitFailure
		case pid != i.job.process.Pid:
			continue
		case ws.Stopped():
			if !i.job.stopped(ws.StopSignal()) {
				continue
			}
			_ = i.events.Encode(event{Stopped: ws.StopSignal()})
			continue
		}
		i.job.ended()
		i.endRest()
		if ws.Signaled() {
			return signalStatus(ws.Signal())
		}
		return ws.ExitStatus()
	}
}

// Processes that the command has left get so long to end in order, and all
// together so long after they were killed.
const (
	endTimeout  = time.Second
	killedLimit = 5 * time.Second
)

// endRest ends all descendants.
func (i *inside) endRest() {
	if !reapAll() {
		return
	}
	for _, pid := range children() {
		_ = unix.Kill(pid, unix.SIGTERM)
		_ = unix.Kill(pid, unix.SIGCONT)
	}
	for start := time.Now(); reapAll() && time.Since(start) < endTimeout; {
		select {
		case <-i.orphan:
			start = time.Time{} // no more patience
		case <-time.After(5 * time.Millisecond):
		}
	}
	// A killed process leaves its children to us, so it takes several rounds.
	for start := time.Now(); reapAll() && time.Since(start) < killedLimit; {
		for _, pid := range children() {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(time.Millisecond)
	}
}

// reapAll takes ended children in, and reports whether there are others.
func reapAll() bool {
	for {
		pid, err := syscall.Wait4(-1, nil, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return false
		case pid == 0:
			return true
		}
	}
}

// lookCommand finds the program, or says why not and with which status.
func lookCommand(name string) (path string, status int, err error) {
	path, err = exec.LookPath(name)
	switch {
	case err == nil, errors.Is(err, exec.ErrDot): // the user's PATH counts
		return path, 0, nil
	case errors.Is(err, exec.ErrNotFound):
		return "", statusNotFound, fmt.Errorf("run %s: not found in $PATH", name)
	case errors.Is(err, fs.ErrNotExist):
		return "", statusNotFound, fmt.Errorf("run %s: no such file", name)
	case errors.Is(err, fs.ErrPermission):
		return "", statusNotExecutable, fmt.Errorf("run %s: not executable: chmod +x it", name)
	}
	var e *exec.Error
	if errors.As(err, &e) {
		err = e.Err
	}
	return "", statusNotExecutable, fmt.Errorf("run %s: %w", name, err)
}

// startError says why a program that is there does not start.
func startError(name string, err error) (int, error) {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return statusNotExecutable, fmt.Errorf("run %s: %w", name, err)
	}
	switch errno {
	case unix.ENOENT:
		return statusNotFound, fmt.Errorf("run %s: its interpreter is missing: look at its first line", name)
	case unix.ENOEXEC:
		return statusNotExecutable, fmt.Errorf("run %s: %w: a script starts with #! and its interpreter", name, errno)
	}
	return statusNotExecutable, fmt.Errorf("run %s: %w", name, errno)
}

// Statuses of shells for commands that do not start.
const (
	statusNotExecutable = 126
	statusNotFound      = 127
)
