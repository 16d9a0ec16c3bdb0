package rig

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A Proc is a program that a node has started.
type Proc struct {
	Name string
	PID  int

	node           *Node
	stdout, stderr string
	done           chan struct{}
	status         syscall.WaitStatus
}

// Done is closed when the program has ended.
func (p *Proc) Done() <-chan struct{} { return p.done }

// Patience is what a machine with much to do may need for anything: whatever
// waits for something that has to happen waits at least that long.
const Patience = time.Minute

// strict has what comes late be an error: on a machine that has nothing else to do.
var strict = os.Getenv("USERNET_PERF") != ""

// Wait waits for the end of the program, for limit or Patience, whichever is
// longer: its exit status, or 128 + signal.
func (p *Proc) Wait(limit time.Duration) (code int, ok bool) {
	select {
	case <-p.done:
	case <-time.After(max(limit, Patience)):
		return -1, false
	}
	if p.status.Signaled() {
		return 128 + int(p.status.Signal()), true
	}
	return p.status.ExitStatus(), true
}

// WantExit ends the test unless the program ends with code. How long that takes
// is returned, and more than limit an error only where USERNET_PERF is set: it
// says as much of the machine as of the program.
func (p *Proc) WantExit(t testing.TB, code int, limit time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	got, ok := p.Wait(10 * limit)
	took := time.Since(start).Round(time.Millisecond)
	switch {
	case !ok:
		t.Fatalf("%s still runs after %v", p.Name, took)
	case took > limit && !strict:
		t.Logf("%s took %v to end, want at most %v on a machine of its own", p.Name, took, limit)
	case took > limit:
		t.Errorf("%s took %v to end, want at most %v", p.Name, took, limit)
	}
	if got != code {
		t.Errorf("%s ended with status %d, want %d\n%s", p.Name, got, code, tail(p.Stderr(), 2000))
	}
	return took
}

// Signal sends sig; a program that has ended takes no notice.
func (p *Proc) Signal(sig syscall.Signal) { p.node.signal(p.PID, sig) }

// Kill ends the program and waits until it has.
func (p *Proc) Kill() {
	select {
	case <-p.done:
		return
	default:
	}
	p.Signal(syscall.SIGKILL)
	select {
	case <-p.done:
	case <-time.After(Patience):
	}
}

// Stdout is what the program has written so far.
func (p *Proc) Stdout() string { return readText(p.stdout) }

// Stderr is what the program has written so far.
func (p *Proc) Stderr() string { return readText(p.stderr) }

func readText(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func (p *Proc) state() string {
	select {
	case <-p.done:
	default:
		return "running"
	}
	if p.status.Signaled() {
		return p.status.Signal().String()
	}
	return fmt.Sprintf("exit status %d", p.status.ExitStatus())
}

// WaitOutput waits until the program has written text to stdout or stderr.
func (p *Proc) WaitOutput(t testing.TB, text string, limit time.Duration) {
	t.Helper()
	found := func() bool { return strings.Contains(p.Stdout()+p.Stderr(), text) }
	ended := false
	if !Poll(limit, func() bool {
		select {
		case <-p.done:
			ended = true
		default:
		}
		return found() || ended
	}) || !found() {
		t.Fatalf("%s (%s) did not write %q within %v\n%s", p.Name, p.state(), text, max(limit, Patience), tail(p.Stdout()+p.Stderr(), 4000))
	}
}

// Poll calls f until it returns true, at most for limit or Patience, whichever is
// longer.
func Poll(limit time.Duration, f func() bool) bool {
	for deadline := time.Now().Add(max(limit, Patience)); ; time.Sleep(10 * time.Millisecond) {
		if f() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}
