package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// usernetRun starts "usernet run" as the ordinary user.
func usernetRun(t *testing.T, n *rig.Net, args ...string) *rig.Proc {
	t.Helper()
	return n.User.Exec(t, rig.Command{
		Args: append([]string{rig.Binary(t), "run"}, args...),
		Env:  []string{"XDG_RUNTIME_DIR=/run/user/1000", "HOME=/tmp"},
	})
}

// TestRunStatus: usernet run ends as its command does.
func TestRunStatus(t *testing.T) {
	rig.NeedUsernet(t)
	for _, l := range links {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			n := rig.New(t, rig.Options{Tun: l.tun})
			for _, tt := range []struct {
				command []string
				code    int
			}{
				{[]string{"true"}, 0},
				{[]string{"sh", "-c", "exit 42"}, 42},
				{[]string{"sh", "-c", "kill -TERM $$"}, 128 + 15},
				{[]string{"sh", "-c", "kill -KILL $$"}, 128 + 9},
				{[]string{"no-such-program"}, 127},
			} {
				p := usernetRun(t, n, append([]string{"--"}, tt.command...)...)
				if code, ok := p.Wait(20 * time.Second); !ok || code != tt.code {
					t.Errorf("%q: ended %v with status %d, want %d\n%s", tt.command, ok, code, tt.code, p.Stderr())
				}
			}
			n.WantNothingLeft(t, 2*time.Second, "usernet")
		})
	}
}

// TestRunNetwork: the command has names, both families, and no more rights.
func TestRunNetwork(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "curl", "ping")
	for _, l := range links {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			n := rig.New(t, rig.Options{Tun: l.tun})
			startDNS(t, n.Internet, rig.Web4.String(), "--host-record=www.example.test,"+rig.Web4.String()+","+rig.Web6.String())
			p := usernetRun(t, n, "--", "sh", "-c", `
set -e
curl -sS -m 10 -4 http://www.example.test/ok
curl -sS -m 10 -6 http://www.example.test/ok
ping -n -c 1 -W 3 www.example.test > /dev/null
grep -v '^#' /etc/resolv.conf | grep nameserver
echo stdout; echo stderr >&2`)
			code, ok := p.Wait(30 * time.Second)
			out := p.Stdout()
			if !ok || code != 0 || !strings.HasPrefix(out, "ok\nok\nnameserver 10.0.2.3") || !strings.HasSuffix(out, "stdout\n") {
				t.Errorf("ended %v with status %d:\n%s\n%s", ok, code, out, p.Stderr())
			}
			// Not even where there is no TAP to be had.
			if p.Stderr() != "stderr\n" {
				t.Errorf("stderr has more than the command's:\n%s", p.Stderr())
			}
			// The caller's own resolv.conf is what it was.
			if text := n.User.Must(t, "cat", "/etc/resolv.conf"); !strings.Contains(text, rig.Web4.String()) {
				t.Errorf("the host's resolv.conf is now:\n%s", text)
			}
		})
	}
}

// TestRunPlain: in a bare shell of an ordinary user, with no namespace around.
func TestRunPlain(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "curl")
	rig.NeedNamespaces(t)
	t.Parallel()
	n := rig.New(t, rig.Options{Plain: true})
	ports := n.Host.ServeOn(t, true, "127.0.0.1")
	p := usernetRun(t, n, "--host-port", itoa(ports.HTTP), "--", "curl", "-sS", "-m", "10", fmt.Sprintf("http://10.0.2.2:%d/ok", ports.HTTP))
	if code, ok := p.Wait(30 * time.Second); !ok || code != 0 || p.Stdout() != "ok\n" {
		t.Errorf("ended %v with status %d: %q\n%s", ok, code, p.Stdout(), p.Stderr())
	}
}

// TestRunSignals: the command gets the signals of usernet run.
func TestRunSignals(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	n := rig.New(t, rig.Options{})
	for _, tt := range []struct {
		sig  syscall.Signal
		trap string
	}{{syscall.SIGTERM, "TERM"}, {syscall.SIGINT, "INT"}, {syscall.SIGHUP, "HUP"}, {syscall.SIGUSR1, "USR1"}} {
		p := usernetRun(t, n, "--", "sh", "-c", "trap 'echo got it; exit 7' "+tt.trap+"; echo waiting; while :; do sleep 0.05; done")
		p.WaitOutput(t, "waiting", 20*time.Second)
		p.Signal(tt.sig)
		p.WantExit(t, 7, 5*time.Second)
		if !strings.Contains(p.Stdout(), "got it") {
			t.Errorf("%v: the command wrote %q", tt.sig, p.Stdout())
		}
	}
	n.WantNothingLeft(t, 2*time.Second, "usernet", "sleep")
}

// TestRunKilled: the command ends with usernet run, and what it has left
// running ends with the command.
func TestRunKilled(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	n := rig.New(t, rig.Options{})
	p := usernetRun(t, n, "--", "sh", "-c", "sleep 611 & echo started; sleep 612")
	p.WaitOutput(t, "started", 20*time.Second)
	p.Signal(syscall.SIGKILL)
	n.WantNothingLeft(t, 3*time.Second, "usernet", "sleep")
	p = usernetRun(t, n, "--", "sh", "-c", "setsid sleep 613 & exit 5")
	p.WantExit(t, 5, 20*time.Second)
	n.WantNothingLeft(t, 3*time.Second, "usernet", "sleep")
}
