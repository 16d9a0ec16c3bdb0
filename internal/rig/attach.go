package rig

import (
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

// An Attach is usernet attached to a guest.
type Attach struct {
	*Proc
	exit *os.File // our end of the exit-fd; closing it hangs up
}

// AttachOptions says how usernet is started.
type AttachOptions struct {
	Flags []string
	// Target replaces "--netns /proc/PID/ns/net".
	Target []string
	// Files are descriptors 5 and up (3 is the ready-fd, 4 the exit-fd).
	Files []*os.File
	// NoWait returns before usernet is ready.
	NoWait bool
	Env    []string
	// Prefix is a command that executes usernet in its own place, such as
	// prlimit.
	Prefix []string
}

// Attach starts usernet as n.User and waits until the guest has its network.
func (n *Net) Attach(t testing.TB, guest *Node, flags ...string) *Attach {
	t.Helper()
	return n.AttachFrom(t, n.User, guest, AttachOptions{Flags: flags})
}

// AttachFrom starts usernet in node from.
func (n *Net) AttachFrom(t testing.TB, from, guest *Node, o AttachOptions) *Attach {
	t.Helper()
	return n.attach(t, Current(), from, guest, o)
}

// AttachSubject starts one of Subjects instead of usernet, for comparisons.
func (n *Net) AttachSubject(t testing.TB, name string, guest *Node, flags ...string) *Attach {
	t.Helper()
	for _, s := range Subjects {
		if s.Name == name {
			return n.attach(t, s, n.User, guest, AttachOptions{Flags: flags})
		}
	}
	t.Fatalf("no subject %q", name)
	return nil
}

func (n *Net) attach(t testing.TB, s Subject, from, guest *Node, o AttachOptions) *Attach {
	t.Helper()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer readyR.Close()
	defer readyW.Close()
	exitR, exitW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer exitR.Close()
	t.Cleanup(func() { exitW.Close() })
	args, env := s.command(t, guest, o)
	if s.Name == "kernel" {
		from = n.Host
	}
	p := from.Exec(t, Command{
		Args:  append(append([]string(nil), o.Prefix...), args...),
		Env:   append(env, o.Env...),
		Files: append([]*os.File{readyW, exitR}, o.Files...),
	})
	a := &Attach{Proc: p, exit: exitW}
	t.Cleanup(func() { p.wantSound(t) })
	readyW.Close()
	if !o.NoWait {
		a.waitReady(t, readyR)
		s.settle(t, guest)
	}
	return a
}

// HangUp closes the last other end of the exit-fd.
func (a *Attach) HangUp() { a.exit.Close() }

// waitReady waits for the "1" on the ready-fd.
func (a *Attach) waitReady(t testing.TB, ready *os.File) {
	t.Helper()
	ready.SetReadDeadline(time.Now().Add(Patience))
	b, err := io.ReadAll(io.LimitReader(ready, 1))
	if err == nil && string(b) == "1" {
		return
	}
	select {
	case <-a.done: // so that its last words are complete
	case <-time.After(2 * time.Second):
	}
	t.Fatalf("%s (%s) is not ready: got %q, %v\n%s", a.Name, a.state(), b, err, tail(a.Stdout()+a.Stderr(), 4000))
}

// wantSound looks for what a Go program says in its last words, or the race
// detector (see Binary) at any time.
func (p *Proc) wantSound(t testing.TB) {
	t.Helper()
	text := p.Stderr()
	for _, bad := range []string{"panic: ", "fatal error: ", "DATA RACE", "[signal SIG"} {
		if i := strings.Index(text, bad); i >= 0 {
			t.Errorf("%s: %s", p.Name, text[max(0, i-200):min(len(text), i+6000)])
			return
		}
	}
}

// WantOneLine ends the test unless stderr is exactly one line that contains all
// of words.
func (p *Proc) WantOneLine(t testing.TB, words ...string) {
	t.Helper()
	text := p.Stderr()
	if strings.Count(text, "\n") != 1 || !strings.HasSuffix(text, "\n") {
		t.Errorf("stderr of %s is not one line:\n%s", p.Name, tail(text, 2000))
	}
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("stderr of %s does not contain %q: %s", p.Name, w, tail(text, 2000))
		}
	}
}
