package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

var fail = NewFunc("rig.test.fail", func(_ context.Context, path string) (string, error) {
	b, err := os.ReadFile(path)
	return string(b), err
})

// TestFunc: results and errors come back as what they are.
func TestFunc(t *testing.T) {
	n := New(t, Options{Plain: true})
	path := filepath.Join(n.Dir, "file")
	if err := os.WriteFile(path, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := fail.On(t, n.User, path); got != "text" {
		t.Errorf("got %q, want %q", got, "text")
	}
	if _, err := fail.Try(n.User, path+"2"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("got %v, want ENOENT", err)
	}
	if _, err := fail.Try(n.User, "/etc/shadow"); !errors.Is(err, syscall.EACCES) {
		t.Errorf("got %v, want EACCES: the node has rights", err)
	}
}

// TestProgram: output and status of programs, and signals to them.
func TestProgram(t *testing.T) {
	n := New(t, Options{Plain: true})
	out := n.User.Run(t, "sh", "-c", "echo out; echo err >&2; exit 3")
	if want := (Output{"out\n", "err\n", 3}); out != want {
		t.Errorf("got %+v, want %+v", out, want)
	}
	p := n.User.Exec(t, Command{Args: []string{"sleep", "100"}})
	p.Signal(syscall.SIGTERM)
	p.WantExit(t, 128+15, time.Second)
	if _, err := n.User.TryExec(Command{Args: []string{"/nonexistent"}}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("got %v, want ENOENT", err)
	}
}

// TestNothingStays: what a test has started ends with it, also what has taken
// care to outlive its parent.
func TestNothingStays(t *testing.T) {
	var programs, nodes []int
	t.Run("start", func(t *testing.T) {
		n := New(t, Options{})
		g := n.Guest(t)
		nodes = []int{n.Host.PID, n.User.PID, n.Internet.PID, g.PID}
		g.Must(t, "sh", "-c", "setsid sleep 1234 & exit 0")
		n.User.Exec(t, Command{Args: []string{"sleep", "1234"}})
		if !Poll(time.Minute, func() bool {
			programs = nil
			tree := parents()
			for pid := range tree {
				if commandLine(pid) == "sleep 1234" && descends(tree, pid, os.Getpid()) {
					programs = append(programs, pid)
				}
			}
			return len(programs) >= 2
		}) {
			t.Errorf("only %d of 2 programs run", len(programs))
		}
	})
	for _, pid := range append(nodes, programs...) {
		if !Poll(time.Minute, func() bool { _, alive := parents()[pid]; return !alive }) {
			t.Errorf("process %d is still there: %s", pid, commandLine(pid))
		}
	}
}

// TestTopology: from the host everything answers but what must not.
func TestTopology(t *testing.T) {
	n := New(t, Options{Tun: TunClosed})
	for addr, want := range map[string]string{
		"198.51.100.7:7":                 "connected",
		"8.8.8.8:7":                      "connected",
		"[2001:db8:1::7]:7":              "connected",
		"[2600::1]:7":                    "connected",
		"198.51.100.7:4":                 "ECONNREFUSED",
		"[2001:db8:1::7]:4":              "ECONNREFUSED",
		"203.0.113.1:7":                  "timeout",
		"[2001:db8:bad::1]:7":            "timeout",
		"203.0.113.2:7":                  "EHOSTUNREACH",
		"203.0.113.3:7":                  "ENETUNREACH",
		"203.0.113.4:7":                  "EHOSTUNREACH",
		"[2001:db8:bad::4]:7":            "EACCES",
		"203.0.113.68:7":                 "EACCES",
		"[2001:db8:bad::67]:7":           "ENETUNREACH",
		HostUnreachable4.String() + ":7": "EHOSTUNREACH",
	} {
		if got := Dial.On(t, n.User, DialRequest{Network: "tcp", Addr: addr, Timeout: 2 * time.Second}); got.String() != want {
			t.Errorf("%s: %v, want %s", addr, got, want)
		}
	}
	if _, err := fail.Try(n.User, "/dev/net/tun"); !errors.Is(err, syscall.EACCES) {
		t.Errorf("open /dev/net/tun: %v, want EACCES", err)
	}
	if id := n.User.Must(t, "id", "-u"); strings.TrimSpace(id) != "1000" {
		t.Errorf("the user's id is %s", id)
	}
}

func commandLine(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}
