package rig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nodeVariable marks the environment of a node and carries its role.
const nodeVariable = "USERNET_RIG_NODE"

// keeper is the role of the first node of a Net: orphans become its children,
// and it kills them at the end.
const keeper = "keeper"

// Main is for TestMain: it runs the tests, or where this process was started
// as a node, serves as one. It does not return.
func Main(m *testing.M) {
	role := os.Getenv(nodeVariable)
	if role == "" {
		os.Exit(runTests(m))
	}
	os.Unsetenv(nodeVariable)
	if err := serveNode(role); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A server is the node's side of the link.
type server struct {
	link *link
	mu   sync.Mutex
	proc map[int]*os.Process
}

func serveNode(role string) error {
	l, err := newLink(os.NewFile(3, "rig"))
	if err != nil {
		return err
	}
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
	if role == keeper {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("rig: become subreaper: %w", err)
		}
		defer killDescendants()
	}
	s := &server{link: l, proc: make(map[int]*os.Process)}
	for {
		var r request
		files, err := l.receive(&r)
		if err != nil {
			return nil // the test has closed its end, or is gone
		}
		switch {
		case r.Call != nil:
			go s.call(r.ID, r.Call)
		case r.Start != nil:
			go s.start(r.ID, r.Start, files)
		case r.Signal != nil:
			s.signal(r.ID, r.Signal)
		}
	}
}

// call runs a registered function and answers with what it returned.
func (s *server) call(id uint64, r *callRequest) {
	sink := &fileSink{}
	ctx, cancel := context.WithTimeout(context.WithValue(context.Background(), fileSinkKey{}, sink), r.Timeout)
	defer cancel()
	answer := response{ID: id}
	f := functions[r.Name]
	if f == nil {
		answer.Err = newError(fmt.Errorf("rig: no function %q", r.Name))
		s.link.send(answer, nil)
		return
	}
	out, err := f(ctx, r.Arg)
	answer.Err = newError(err)
	if err == nil {
		answer.Result, err = json.Marshal(out)
		answer.Err = newError(err)
	}
	if err := s.link.send(answer, sink.files); err != nil {
		s.link.send(response{ID: id, Err: newError(err)}, nil)
	}
	closeFiles(sink.files)
}

// start runs a program and answers when it runs and when it has ended.
func (s *server) start(id uint64, r *startRequest, files []*os.File) {
	cmd, err := startCommand(r, files)
	closeFiles(files)
	if err != nil {
		s.link.send(response{ID: id, Err: newError(err)}, nil)
		return
	}
	s.mu.Lock()
	s.proc[cmd.Process.Pid] = cmd.Process
	s.mu.Unlock()
	s.link.send(response{ID: id, PID: cmd.Process.Pid}, nil)
	cmd.Wait()
	s.mu.Lock()
	delete(s.proc, cmd.Process.Pid)
	s.mu.Unlock()
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	s.link.send(response{ID: id, PID: cmd.Process.Pid, Exited: true, Status: uint32(status)}, nil)
}

// signal answers with ESRCH when the process has ended.
func (s *server) signal(id uint64, r *signalRequest) {
	s.mu.Lock()
	p := s.proc[r.PID]
	s.mu.Unlock()
	err := error(syscall.ESRCH)
	if p != nil {
		err = p.Signal(syscall.Signal(r.Signal))
		if errors.Is(err, os.ErrProcessDone) {
			err = syscall.ESRCH
		}
	}
	s.link.send(response{ID: id, Err: newError(err)}, nil)
}

// startCommand starts r's program with files as its descriptors from 0 up.
func startCommand(r *startRequest, files []*os.File) (*exec.Cmd, error) {
	if len(files) < 3 || len(r.Args) == 0 {
		return nil, errors.New("rig: start needs a program, stdin, stdout, and stderr")
	}
	cmd := exec.Command(r.Args[0], r.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = files[0], files[1], files[2]
	cmd.ExtraFiles = files[3:]
	cmd.Env = append(os.Environ(), r.Env...)
	cmd.Dir = r.Dir
	cmd.SysProcAttr = r.attributes()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("rig: start %s: %w", r.Args[0], err)
	}
	return cmd, nil
}

// killDescendants ends everything below this process. Nodes and programs die
// with their parents; this finds the orphans, which have become our children.
func killDescendants() {
	for range 200 {
		children := childrenOf(os.Getpid())
		if len(children) == 0 {
			return
		}
		for _, pid := range children {
			unix.Kill(pid, unix.SIGKILL)
			unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// childrenOf lists the processes whose parent is pid.
func childrenOf(pid int) []int {
	var children []int
	for p, parent := range parents() {
		if parent == pid {
			children = append(children, p)
		}
	}
	return children
}

// parents maps every process to its parent, zombies left out.
func parents() map[int]int {
	m := make(map[int]int)
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended since
		}
		// "PID (NAME) STATE PPID …", where NAME may contain anything.
		text := string(b)
		fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
		if len(fields) < 2 || fields[0] == "Z" || fields[0] == "X" {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		m[pid], _ = strconv.Atoi(fields[1])
	}
	return m
}
