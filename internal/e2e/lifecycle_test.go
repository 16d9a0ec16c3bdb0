package e2e

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// unshareGuest makes a guest as a person at a shell would, with nothing of the
// rig in it.
func unshareGuest(t *testing.T, n *rig.Net, args ...string) *rig.Proc {
	t.Helper()
	rig.NeedTools(t, "unshare")
	p := n.User.Exec(t, rig.Command{Args: append(append([]string{"unshare", "-n"}, args...), "sleep", "600")})
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	host := netnsOf(n.User.PID)
	if !rig.Poll(5*time.Second, func() bool {
		link := netnsOf(p.PID)
		b, _ := os.ReadFile(filepath.Join("/proc", itoa(p.PID), "comm"))
		return link != "" && link != own && link != host && string(b) == "sleep\n"
	}) {
		t.Fatalf("unshare made no namespace: %s", p.Stderr())
	}
	return p
}

func netnsOf(pid int) string {
	link, _ := os.Readlink(filepath.Join("/proc", itoa(pid), "ns/net"))
	return link
}

// netnsPath is the target of usernet for such a guest.
func netnsPath(p *rig.Proc) []string {
	return []string{"--netns", filepath.Join("/proc", itoa(p.PID), "ns/net")}
}

// TestEndBySignal: SIGTERM and SIGINT end usernet with status 0, also with
// transfers under way, and nothing stays.
func TestEndBySignal(t *testing.T) {
	rig.NeedUsernet(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			eachLink(t, func(t *testing.T, w *world) {
				a := w.attach(t)
				// A transfer that does not end by itself.
				talk := rig.Talk{
					Addr:    web(false, rig.Services.Talk),
					Client:  []rig.Step{rig.Receive()},
					Server:  []rig.Step{rig.Send(1<<40, 1)},
					Streams: 4,
				}
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					talk.Do(w.Guest, w.Internet, 8*time.Second)
				}()
				time.Sleep(300 * time.Millisecond)
				a.Signal(sig)
				took := a.WantExit(t, 0, 3*time.Second)
				t.Logf("ended after %v", took)
				w.WantNothingLeft(t, 2*time.Second, "usernet")
				wantNoInterface(t, w)
				<-ended
			})
		})
	}
}

func wantNoInterface(t *testing.T, w *world) {
	t.Helper()
	var out rig.Output
	// The kernel removes a veth pair some time after its namespace's end.
	gone := rig.Poll(5*time.Second, func() bool {
		out = w.Guest.Run(t, "ip", "link", "show", "tap0")
		return out.Code != 0
	})
	if !gone {
		t.Errorf("the interface is still there: %s", out.Stdout)
	}
}

// TestEndByHangup: the exit-fd's other end was the runtime's.
func TestEndByHangup(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		a := w.attach(t)
		time.Sleep(200 * time.Millisecond)
		select {
		case <-a.Done():
			t.Fatal("ended before the hang-up")
		default:
		}
		a.HangUp()
		a.WantExit(t, 0, 2*time.Second)
		w.WantNothingLeft(t, 2*time.Second, "usernet")
	})
}

// TestEndOfContainer: the death of the namespace's process ends usernet,
// although its own TAP keeps the namespace alive.
func TestEndOfContainer(t *testing.T) {
	rig.NeedUsernet(t)
	for _, l := range links {
		for _, how := range []string{"--netns", "--pid"} {
			t.Run(l.name+" "+how, func(t *testing.T) {
				t.Parallel()
				n := rig.New(t, rig.Options{Tun: l.tun})
				guest := unshareGuest(t, n, "-Ur")
				target := netnsPath(guest)
				if how == "--pid" {
					target = []string{"--pid", itoa(guest.PID)}
				}
				a := n.AttachFrom(t, n.User, nil, rig.AttachOptions{Target: target, Flags: l.flags})
				guest.Signal(syscall.SIGKILL)
				took := a.WantExit(t, 0, 2*time.Second)
				t.Logf("ended after %v", took)
				n.WantNothingLeft(t, 2*time.Second, "usernet")
			})
		}
	}
}

// TestKilled: nothing of a usernet that was killed stays.
func TestKilled(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		pidFile := filepath.Join(w.Dir, "usernet.pid")
		a := w.attach(t, "--pid-file", pidFile)
		b, err := os.ReadFile(pidFile)
		if got := strings.TrimSpace(string(b)); err != nil || got != itoa(a.PID) {
			t.Errorf("the PID file says %q, %v; want %d", got, err, a.PID)
		}
		a.Signal(syscall.SIGKILL)
		a.WantExit(t, 128+9, time.Second)
		w.WantNothingLeft(t, 2*time.Second, "usernet")
		wantNoInterface(t, w)
		if !rig.Poll(2*time.Second, func() bool { _, err := os.Stat(pidFile); return os.IsNotExist(err) }) {
			t.Error("the PID file is still there")
		}
		// The guest can be attached to again.
		w.attach(t)
		if r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: web(false, rig.Services.Echo)}); r.Errno != 0 || r.Timeout {
			t.Errorf("after a new start: %v", r)
		}
	})
}

// TestPIDFileAtEnd: the PID file goes with a clean end, too.
func TestPIDFileAtEnd(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	pidFile := filepath.Join(w.Dir, "usernet.pid")
	a := w.attach(t, "--pid-file", pidFile)
	a.Signal(syscall.SIGTERM)
	a.WantExit(t, 0, 3*time.Second)
	if _, err := os.Stat(pidFile); !os.IsNotExist(err) {
		t.Errorf("the PID file is still there: %v", err)
	}
}

// TestNotify: sd_notify's socket learns when the guest can use its network.
func TestNotify(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	path := filepath.Join(w.Dir, "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{Flags: w.flags, Env: []string{"NOTIFY_SOCKET=" + path}})
	c.SetReadDeadline(time.Now().Add(rig.Patience))
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if !strings.Contains(string(b[:n]), "READY=1") {
		t.Errorf("got %q, %v, want READY=1", b[:n], err)
	}
}

// TestInterfaceDeleted: somebody inside deletes the interface. There is
// nothing left to do, and nothing to spin on.
func TestInterfaceDeleted(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		a := w.attach(t)
		w.Guest.Must(t, "ip", "link", "del", "tap0")
		if code, ok := a.Wait(5 * time.Second); !ok || code == 0 {
			t.Errorf("ended: %v, status %d; want a failure", ok, code)
		}
		if got := a.Stderr(); !strings.Contains(got, "tap0") || !strings.Contains(got, "start usernet again") {
			t.Errorf("no word of the interface and of what to do: %s", got)
		}
		w.WantNothingLeft(t, 2*time.Second, "usernet")
	})
}

// TestInterfaceDown: an interface that was down for a while works when it is
// up again; while it is down, usernet rests.
func TestInterfaceDown(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		a := w.attach(t)
		request := rig.DialRequest{Network: "tcp", Addr: web(false, rig.Services.Echo), Timeout: 3 * time.Second}
		for range 5 {
			w.Guest.Must(t, "ip", "link", "set", "tap0", "down")
			w.Guest.Must(t, "ip", "link", "set", "tap0", "up")
		}
		w.Guest.Must(t, "ip", "link", "set", "tap0", "down")
		wantIdle(t, w, a.PID)
		w.Guest.Must(t, "ip", "link", "set", "tap0", "up")
		w.Guest.Must(t, "ip", "route", "replace", "default", "via", w.Gateway4.String())
		var r rig.DialResult
		if !rig.Poll(5*time.Second, func() bool {
			r = rig.Dial.On(t, w.Guest, request)
			return r.Errno == 0 && !r.Timeout
		}) {
			t.Errorf("after the interface was down: %v", r)
		}
	})
}

// TestHostNetworkGone: without a network the host's errors come in at once, and
// when it is back everything works without a restart.
func TestHostNetworkGone(t *testing.T) {
	if rig.Current().Name == "kernel" {
		t.Skip("a router's errors are not a host's")
	}
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		request := rig.DialRequest{Network: "tcp", Addr: web(false, rig.Services.Echo), Timeout: 3 * time.Second}
		w.Host.Must(t, "ip", "link", "set", "eth0", "down")
		direct := rig.Dial.On(t, w.User, request)
		r := rig.Dial.On(t, w.Guest, request)
		if direct.Errno != syscall.ENETUNREACH || r.Errno != direct.Errno {
			t.Errorf("without the host's network: %v inside, %v outside", r, direct)
		}
		w.Host.Must(t, "ip", "link", "set", "eth0", "up")
		w.Host.Must(t, "ip", "route", "add", "default", "via", rig.Router4.String())
		if !rig.Poll(3*time.Second, func() bool {
			r = rig.Dial.On(t, w.Guest, request)
			return r.Errno == 0 && !r.Timeout
		}) {
			t.Errorf("when the host's network is back: %v", r)
		}
	})
}

// TestHostIPv6Follows: with --ipv6=auto the guest has a default route while
// the host has one.
func TestHostIPv6Follows(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	w.Host.Must(t, "ip", "-6", "route", "del", "default")
	w.attach(t)
	hasDefault := func() bool {
		return strings.Contains(w.Guest.Run(t, "ip", "-6", "route", "show", "default").Stdout, "default")
	}
	if hasDefault() {
		t.Error("a default route although the host has none")
	}
	w.Host.Must(t, "ip", "-6", "route", "add", "default", "via", rig.Router6.String())
	if !rig.Poll(5*time.Second, hasDefault) {
		t.Error("no default route 5 s after the host got one")
	}
	if r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: web(true, rig.Services.Echo)}); r.Errno != 0 || r.Timeout {
		t.Errorf("IPv6 after the host got it: %v", r)
	}
	w.Host.Must(t, "ip", "-6", "route", "del", "default")
	if !rig.Poll(5*time.Second, func() bool { return !hasDefault() }) {
		t.Error("still a default route 5 s after the host lost its own")
	}
}

// TestFewFiles: a guest that opens more connections than usernet may have
// descriptors cannot bring it down, nor make it spin; when the guest has let go
// of them, everything works again.
func TestFewFiles(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "prlimit")
	w := onTap(t)
	a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{Flags: w.flags, Prefix: []string{"prlimit", "--nofile=96:96"}})
	talk := rig.Talk{
		Addr:    web(false, rig.Services.Talk),
		Client:  []rig.Step{rig.Send(1000, 1), rig.Sleep(3 * time.Second), rig.CloseWrite(), rig.Receive()},
		Server:  []rig.Step{rig.Receive(), rig.CloseWrite()},
		Streams: 300,
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		talk.Do(w.Guest, w.Internet, 12*time.Second) // most of them cannot succeed
	}()
	time.Sleep(1500 * time.Millisecond)
	wantIdle(t, w, a.PID)
	<-ended
	var r rig.DialResult
	if !rig.Poll(15*time.Second, func() bool {
		r = rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: web(false, rig.Services.Echo), Timeout: 2 * time.Second})
		return r.Errno == 0 && !r.Timeout
	}) {
		t.Errorf("after too many connections: %v", r)
	}
	wantNetwork(t, w.Guest, false)
}

// TestManyInstances: several usernets on one host start and end at the same
// time without taking notice of each other.
func TestManyInstances(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	const instances = 8
	guests := make([]*rig.Node, instances)
	for i := range guests {
		guests[i] = w.Net.Guest(t)
	}
	var attached [instances]*rig.Attach
	for round := range 3 {
		var wg sync.WaitGroup
		start := time.Now()
		for i, guest := range guests {
			attached[i] = w.AttachFrom(t, w.User, guest, rig.AttachOptions{Flags: w.flags, NoWait: true})
			wg.Go(func() {
				if !rig.Poll(10*time.Second, func() bool {
					r, err := rig.Dial.Try(guest, rig.DialRequest{Network: "tcp", Addr: web(false, rig.Services.Echo), Timeout: time.Second})
					return err == nil && r.Errno == 0 && !r.Timeout
				}) {
					t.Errorf("round %d: guest %d has no network", round, i)
				}
			})
		}
		wg.Wait()
		t.Logf("%d networks after %v", instances, time.Since(start))
		for _, a := range attached {
			a.Signal(syscall.SIGTERM)
		}
		for _, a := range attached {
			a.WantExit(t, 0, 5*time.Second)
		}
		w.WantNothingLeft(t, 2*time.Second, "usernet")
	}
}
