package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

const (
	// readyTimeout bounds the time until a container can use its network.
	readyTimeout = 20 * time.Second
	// stopTimeout is how long a daemon has to end by itself, and again after it
	// was killed.
	stopTimeout = 5 * time.Second
)

// A process is one by its number, and by when it has started: numbers are used
// again.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in ticks since boot
}

// processOf returns the process that has a number now.
func processOf(pid int) process {
	// "PID (NAME) STATE PPID …", where NAME may contain anything.
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	text := string(b)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	const start = 19 // the 22nd of all (proc_pid_stat(5))
	if len(fields) <= start {
		return process{}
	}
	ticks, err := strconv.ParseUint(fields[start], 10, 64)
	if err != nil {
		return process{}
	}
	return process{pid, ticks}
}

// open pins the process; the descriptor is -1 if it has ended.
func (p process) open() (pidfd int, err error) {
	if p.PID <= 0 {
		return -1, nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL): // a thread has the number
		return -1, nil
	case err != nil:
		return -1, err
	}
	if processOf(p.PID) != p || ended(fd, 0) {
		unix.Close(fd)
		return -1, nil
	}
	return fd, nil
}

// ended waits until the process of a pidfd has ended, and reports whether.
func ended(pidfd int, within time.Duration) bool {
	deadline := time.Now().Add(within)
	for {
		left := max(time.Until(deadline), 0)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if n > 0 || err == nil || !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// alive reports whether the process has not ended.
func (p process) alive() bool {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err != nil
	}
	unix.Close(fd)
	return true
}

// stop ends the process, and waits for that.
func (p process) stop() error {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err
	}
	defer unix.Close(fd)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		if ended(fd, stopTimeout) {
			return nil
		}
	}
	return errors.New("it does not end")
}

// findDaemon finds the process that was started with this control socket, which
// is in dir. Elsewhere, that may be another directory's path.
func findDaemon(dir, socket string) process {
	var here, there unix.Stat_t
	if unix.Stat(dir, &here) != nil {
		return process{}
	}
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		b, _ := os.ReadFile(path)
		args := strings.Split(string(b), "\x00")
		if i := slices.Index(args, "--api-socket"); i < 0 || i+1 == len(args) || args[i+1] != socket {
			continue
		}
		proc := filepath.Dir(path)
		if unix.Stat(proc+"/root"+dir, &there) == nil && there.Dev == here.Dev && there.Ino == here.Ino {
			pid, _ := strconv.Atoi(filepath.Base(proc))
			return processOf(pid)
		}
	}
	return process{}
}

// startDaemon starts usernet with flags and waits until it is ready. It lives on
// when this process ends, and holds nothing of it. What it has to say goes to a
// file. started is called at once. On failure nothing of it is left but the file.
func startDaemon(ctx context.Context, flags []string, runtimeDir, log string, started func(process) error) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	out, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return cniErrorf(types.ErrIOFailure, "write log: %v", err)
	}
	defer out.Close()
	ready, theirs, err := os.Pipe()
	if err != nil {
		return cniErrorf(types.ErrIOFailure, "make pipe: %v", err)
	}
	defer ready.Close()
	defer theirs.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{"usernet", "--ready-fd", "3", "--log-level", "warn"}, flags...)
	cmd.Env = daemonEnv(os.Environ(), runtimeDir)
	cmd.Dir = "/"
	cmd.Stderr = out // a file, so that nobody has to stay to copy it; the others are /dev/null
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start usernet: %w", err)
	}
	theirs.Close()
	over := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(over)
	}()
	kill := func() {
		_ = cmd.Process.Kill()
		<-over
	}
	if err := started(processOf(cmd.Process.Pid)); err != nil {
		kill()
		return err
	}
	stop := context.AfterFunc(ctx, func() { ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	switch b, err := io.ReadAll(io.LimitReader(ready, 1)); {
	case err == nil && len(b) == 1:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		kill()
		return cniErrorf(types.ErrTryAgainLater, "start usernet: it is not ready after %v: %s", readyTimeout, lastWords(log))
	}
	// It has closed the descriptor, so it is about to end.
	select {
	case <-over:
	case <-time.After(stopTimeout):
		kill()
	}
	code := uint(cniFailed)
	if cmd.ProcessState.ExitCode() == exitUsage {
		code = types.ErrInvalidNetworkConfig
	}
	return cniErrorf(code, "%s", lastWords(log))
}

// lastWords returns the error in a daemon's log.
func lastWords(log string) string {
	b, _ := os.ReadFile(log)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for _, line := range slices.Backward(lines) {
		if text, ok := strings.CutPrefix(line, "usernet: "); ok {
			return text
		}
	}
	if last := lines[len(lines)-1]; last != "" {
		return "it said last: " + last
	}
	return "it said nothing"
}

// daemonEnv leaves out what is meant for this process: the runtime's orders, and
// what a service manager wants to know of the runtime. Daemons of one network
// meet in the runtime directory.
func daemonEnv(env []string, runtimeDir string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return strings.HasPrefix(name, "CNI_") || strings.HasPrefix(name, "LISTEN_") ||
			slices.Contains([]string{"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "XDG_RUNTIME_DIR"}, name)
	})
	return append(env, "XDG_RUNTIME_DIR="+runtimeDir)
}

// closeOnExecAll keeps what the runtime may have left open from the daemon.
func closeOnExecAll() error {
	err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		return nil
	}
	entries, err := os.ReadDir("/proc/self/fd") // before Linux 5.11
	if err != nil {
		return fmt.Errorf("list descriptors: %w", err)
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}
