package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// workerOf asks usernet which process faces the guest.
func workerOf(t *testing.T, w *world) int {
	t.Helper()
	var info struct {
		Sandbox struct {
			WorkerPID int `json:"worker_pid"`
		}
	}
	if err := json.Unmarshal([]byte(mustCtl(t, w, "info", "--json")), &info); err != nil {
		t.Fatal(err)
	}
	return info.Sandbox.WorkerPID
}

// killWorker ends the process that faces the guest, and waits until another one
// does.
func killWorker(t *testing.T, w *world, sig syscall.Signal) {
	t.Helper()
	old := workerOf(t, w)
	if old == 0 {
		t.Fatal("there is no worker")
	}
	began := time.Now()
	if err := syscall.Kill(old, sig); err != nil {
		t.Fatal(err)
	}
	if !rig.Poll(10*time.Second, func() bool { pid := workerOf(t, w); return pid != 0 && pid != old }) {
		t.Fatal("no other worker has come")
	}
	t.Logf("another worker after %v", time.Since(began).Round(time.Millisecond))
}

// waiter is a client that only waits, and says what for.
const waiter = `
import socket, sys
c = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
c.settimeout(20)
print("connected", flush=True)
try: print("got", c.recv(1))
except OSError as e: print("ended:", e, flush=True)
`

// TestWorkerEnds: when the process that faces the guest ends, in whatever way, the
// next one goes on with all that can be kept.
func TestWorkerEnds(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "python3", "dig", "ping", "ip")
	eachLink(t, func(t *testing.T, w *world) {
		w.Guest.ServeOn(t, false)
		port := rig.Services.Talk
		a := w.attach(t, "-p", "8090:"+itoa(port), "-p", "8091:"+itoa(port)+"/udp")
		mustCtl(t, w, "dns", "set", "late.test", "192.0.2.7")
		mustCtl(t, w, "dns", "remove", "host.docker.internal")
		mustCtl(t, w, "forward", "add", "8092:"+itoa(port))
		mustCtl(t, w, "forward", "remove", "f1")

		idle := w.Guest.Exec(t, rig.Command{Args: []string{"python3", "-c", waiter, rig.Web4.String(), itoa(port)}})
		idle.WaitOutput(t, "connected", 10*time.Second)
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSEGV} {
			killWorker(t, w, sig)
			for _, six := range []bool{false, true} {
				talk := rig.Talk{
					Addr:   web(six, port),
					Client: []rig.Step{rig.Send(100000, 1), rig.CloseWrite(), rig.Receive()},
					Server: []rig.Step{rig.Receive(), rig.Send(200000, 2), rig.CloseWrite()},
				}
				r, err := talk.Do(w.Guest, w.Internet, 10*time.Second)
				if err != nil {
					t.Fatal(err)
				}
				wantSame(t, "after "+sig.String(), r[0], 100000, 200000)
			}
		}
		idle.WaitOutput(t, "ended:", 10*time.Second)
		if answers, text := dig(t, w.Guest, w.DNS4, "late.test"); len(answers) != 1 || answers[0] != "192.0.2.7" {
			t.Errorf("a name that was set is lost:\n%s", text)
		}
		if answers, _ := dig(t, w.Guest, w.DNS4, "host.docker.internal"); len(answers) != 0 {
			t.Errorf("a name that was removed is back: %v", answers)
		}
		// The port that was published at the start and removed is free, the
		// other one leads inside.
		for p, open := range map[int]bool{8090: false, 8092: true} {
			talk := rig.Talk{
				Addr:   host(false, p),
				Client: []rig.Step{rig.Send(1000, 1), rig.CloseWrite(), rig.Receive()},
				Server: []rig.Step{rig.Receive(), rig.Send(1000, 2), rig.CloseWrite()},
			}
			r, err := talk.Do(w.Internet, w.Guest, 10*time.Second)
			if ok := err == nil && r[0].Client.Failure == nil && r[0].Client.Got == 1000; ok != open {
				t.Errorf("port %d: open %v, want %v: %v %+v", p, ok, open, err, r)
			}
		}
		var stats struct {
			Process struct {
				Restarts int `json:"worker_restarts"`
			}
		}
		if err := json.Unmarshal([]byte(mustCtl(t, w, "stats", "--json")), &stats); err != nil || stats.Process.Restarts != 2 {
			t.Errorf("%d restarts are counted, want 2 (%v)", stats.Process.Restarts, err)
		}
		// Nothing is left of all of them, and nobody hears of the supervisor's
		// end but by its own.
		a.Signal(syscall.SIGKILL)
		a.WantExit(t, 128+9, time.Second)
		w.WantNothingLeft(t, 2*time.Second, "usernet", "usernet-worker", "usernet-agent")
	})
}

// TestWorkerStopped: a worker that stands still holds up nobody but the guest, and
// goes on when it is let.
func TestWorkerStopped(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	a := w.attach(t)
	pid := workerOf(t, w)
	syscall.Kill(pid, syscall.SIGSTOP)
	if status, _, stderr := ctl(t, w.User, "flows"); status == 0 || !strings.Contains(stderr, "does not answer") {
		t.Errorf("asked for flows: status %d, %s", status, stderr)
	}
	if text := mustCtl(t, w, "info"); !strings.Contains(text, "worker_pid") {
		t.Errorf("info:\n%s", text)
	}
	syscall.Kill(pid, syscall.SIGCONT)
	w.Guest.Must(t, "ping", "-c1", "-W5", w.Gateway4.String())
	mustCtl(t, w, "flows")
	if workerOf(t, w) != pid {
		t.Error("another worker has taken its place")
	}
	syscall.Kill(pid, syscall.SIGSTOP) // and its end does not depend on it
	a.Signal(syscall.SIGTERM)
	a.WantExit(t, 0, 3*time.Second)
	w.WantNothingLeft(t, 2*time.Second, "usernet", "usernet-worker")
}

// TestWorkerSealed: the process that faces the guest has no rights, whoever has
// started it, and cannot be looked into.
func TestWorkerSealed(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	w.attach(t)
	wantSealed(t, workerOf(t, w), w.User, w.Guest)
}

// wantSealed looks at a process that faces guests.
func wantSealed(t *testing.T, pid int, nodes ...*rig.Node) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"NoNewPrivs:\t1", "Seccomp:\t2", "CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000",
		"CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000",
	} {
		// Who is not root has a bounding set that he cannot change; it gives
		// nothing to a process with no_new_privs.
		if !strings.Contains(string(b), want+"\n") && !strings.HasPrefix(want, "CapBnd") {
			t.Errorf("its status has no %q:\n%s", want, b)
		}
	}
	for _, name := range []string{"mem", "maps", "environ", "fd/3"} {
		for _, from := range nodes {
			if o := from.Run(t, "head", "-c1", filepath.Join("/proc", itoa(pid), name)); o.Code == 0 {
				t.Errorf("%s can read its %s", from.Name, name)
			}
		}
	}
}
