package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rig"
)

const (
	piece   = 300_000 // what a transfer carries each way before it rests for a moment
	streams = 4       // of a transfer
)

// transfer is one that takes some time in which it has both ends send and wait: so
// many pieces each way, with a rest after each.
func transfer(addr string, pieces int, rest time.Duration) rig.Talk {
	talk := rig.Talk{Addr: addr, Streams: streams}
	for i := range pieces {
		seed := uint64(100 * i)
		talk.Client = append(talk.Client, rig.Send(piece, seed+1), rig.ReceiveN(piece), rig.Sleep(rest))
		talk.Server = append(talk.Server, rig.ReceiveN(piece), rig.Send(piece, seed+2))
	}
	talk.Client = append(talk.Client, rig.CloseWrite(), rig.Receive())
	talk.Server = append(talk.Server, rig.Receive(), rig.CloseWrite())
	return talk
}

// during has the guest transfer something, and something happen to it when all of
// that is well under way.
func during(t *testing.T, w *world, happen func(), talks ...rig.Talk) []rig.Results {
	t.Helper()
	var work sync.WaitGroup
	var early atomic.Bool
	outcomes := make([][]rig.Results, len(talks))
	for i, talk := range talks {
		work.Go(func() {
			var err error
			if outcomes[i], err = talk.Do(w.Guest, w.Internet, rig.Patience); err != nil {
				t.Error(err)
			}
			early.Store(true)
		})
	}
	started := rig.Poll(10*time.Second, func() bool {
		under := 0
		for _, f := range listFlows(t, w) {
			if f.Protocol == "tcp" && f.Up >= piece && f.Down >= piece {
				under++
			}
		}
		return under >= streams*len(talks) || early.Load()
	})
	switch {
	case !started:
		t.Error("the transfer does not begin")
	case early.Load(): // a slow machine
		t.Log("the transfer has ended before anything could happen to it")
	}
	happen()
	work.Wait()
	return slices.Concat(outcomes...)
}

// intact checks that a transfer has lost nothing.
func intact(t *testing.T, what string, talk rig.Talk, all []rig.Results) {
	t.Helper()
	n := int64(0)
	for _, s := range talk.Client {
		n += s.SendBytes
	}
	for _, r := range all {
		wantSame(t, what, r, n, n)
	}
}

// helperOf finds the process inside the guest's namespace.
func helperOf(t *testing.T, w *world) int {
	t.Helper()
	return processOf(t, w, "usernet-agent")
}

// processOf finds the one process of a name.
func processOf(t *testing.T, w *world, name string) int {
	t.Helper()
	found := w.Leftovers(t, name)
	if len(found) != 1 {
		t.Fatalf("%s: %q", name, found)
	}
	pid, err := strconv.Atoi(strings.Fields(found[0])[0])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// endsWell checks that usernet is at rest, and that it ends when it is told to, with
// nothing left.
func endsWell(t *testing.T, w *world, a *rig.Attach) {
	t.Helper()
	wantIdle(t, w, a.PID)
	a.Signal(syscall.SIGTERM)
	a.WantExit(t, 0, 3*time.Second)
	wantAllGone(t, w)
}

// wantAllGone checks that a usernet which has ended has left nothing: no process,
// no interface, no file, and no connection of its.
func wantAllGone(t *testing.T, w *world) {
	t.Helper()
	w.WantNothingLeft(t, 2*time.Second, "usernet", "usernet-worker", "usernet-agent")
	wantNoInterface(t, w)
	wantHostClean(t, w)
}

// wantHostClean is what of that concerns the host.
func wantHostClean(t *testing.T, w *world) {
	t.Helper()
	var files, sockets string
	if !rig.Poll(5*time.Second, func() bool {
		files = w.User.Must(t, "find", "/run/user/1000", "-type", "s")
		sockets = w.Host.Must(t, "ss", "-Htn", "state", "established")
		return files == "" && sockets == ""
	}) {
		t.Errorf("sockets are left: %s\n%s", files, sockets)
	}
}

// TestKilledDuringTransfer: what docs/security.md promises for the end of each
// process, while it has everything to do.
func TestKilledDuringTransfer(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ss", "find")
	port := rig.Services.Talk
	start := func(t *testing.T, w *world) *rig.Attach {
		w.Guest.ServeOn(t, false)
		return w.attach(t, "-p", "8090:"+itoa(port))
	}
	t.Run("agent", func(t *testing.T) {
		eachLink(t, func(t *testing.T, w *world) {
			a := start(t, w)
			worker := workerOf(t, w)
			talk := transfer(web(false, port), 8, 100*time.Millisecond)
			all := during(t, w, func() {
				syscall.Kill(helperOf(t, w), syscall.SIGKILL)
				a.WaitOutput(t, "the helper process inside the namespace has ended", 5*time.Second)
			}, talk)
			intact(t, "without the agent", talk, all)
			mustCtl(t, w, "forward", "add", "8091:"+itoa(port))
			for _, p := range []int{8090, 8091} {
				in := transfer(host(false, p), 2, time.Millisecond)
				all, err := in.Do(w.Internet, w.Guest, rig.Patience)
				if err != nil {
					t.Errorf("port %d: %v", p, err)
				}
				intact(t, "to port "+itoa(p), in, all)
			}
			alive(t, w, worker)
			endsWell(t, w, a)
		})
	})
	t.Run("worker", func(t *testing.T) {
		cut := []syscall.Errno{syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED} // the last by the agent
		eachLink(t, func(t *testing.T, w *world) {
			a := start(t, w)
			all := during(t, w, func() { killWorker(t, w, syscall.SIGKILL) }, transfer(web(false, port), 100, 100*time.Millisecond))
			for _, r := range all {
				if f := r.Client.Failure; f == nil || !slices.Contains(cut, f.Errno) {
					t.Errorf("the guest saw its connection end so: %v", f)
				}
				if r.Server.Failure == nil {
					t.Error("the server has not seen the end of its connection")
				}
			}
			wantPaths(t, w)
			endsWell(t, w, a)
		})
	})
	t.Run("supervisor", func(t *testing.T) {
		eachLink(t, func(t *testing.T, w *world) {
			a := start(t, w)
			// The guest's kernel is told by nobody: its clients may wait as long as they like.
			talk := rig.Talk{
				Addr: web(false, port), Streams: streams,
				Client: []rig.Step{rig.Send(piece, 1), rig.ReceiveN(1), rig.Sleep(4 * time.Second)},
				Server: []rig.Step{rig.Send(piece, 2), rig.Receive()},
			}
			during(t, w, func() {
				a.Signal(syscall.SIGKILL)
				a.WantExit(t, 128+9, time.Second)
				wantAllGone(t, w)
			}, talk)
			w.attach(t)
			alive(t, w, workerOf(t, w))
		})
	})
}

// TestStoppedDuringTransfer: whichever process stands still for a while, nothing
// that is under way is lost.
func TestStoppedDuringTransfer(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		a := w.attach(t)
		worker := workerOf(t, w)
		for _, p := range []struct {
			name string
			pid  int
		}{{"worker", worker}, {"agent", helperOf(t, w)}, {"supervisor", a.PID}} {
			talk := transfer(web(p.name == "agent", rig.Services.Talk), 6, 100*time.Millisecond)
			all := during(t, w, func() {
				if err := syscall.Kill(p.pid, syscall.SIGSTOP); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Second)
				if err := syscall.Kill(p.pid, syscall.SIGCONT); err != nil {
					t.Error(err)
				}
			}, talk)
			intact(t, p.name+" stopped", talk, all)
		}
		alive(t, w, worker)
		endsWell(t, w, a)
	})
}

// TestGuestEndsDuringTransfer: a container that is killed takes its network with it
// in the midst of everything.
func TestGuestEndsDuringTransfer(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ss", "find")
	eachLink(t, func(t *testing.T, w *world) {
		w.Guest.ServeOn(t, false)
		a := w.attach(t, "-p", "8090:"+itoa(rig.Services.Talk))
		talk := rig.Talk{Addr: web(false, rig.Services.Talk), Streams: 8, Client: []rig.Step{rig.Exchange(1<<40, 1)}, Server: []rig.Step{rig.Exchange(1<<40, 2)}}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			talk.Do(w.Guest, w.Internet, rig.Patience) // ends with the guest
		}()
		in := talk
		in.Addr, in.Streams = host(false, 8090), 2
		go in.Do(w.Internet, w.Guest, 5*time.Second)
		if !rig.Poll(10*time.Second, func() bool { return len(listFlows(t, w)) >= 8 }) {
			t.Fatal("the transfer does not begin")
		}
		syscall.Kill(w.Guest.PID, syscall.SIGKILL)
		t.Logf("ended after %v", a.WantExit(t, 0, 2*time.Second))
		<-ended
		w.WantNothingLeft(t, 2*time.Second, "usernet", "usernet-worker", "usernet-agent")
		wantHostClean(t, w)
	})
}

// TestInterfaceChanged: somebody inside sets the interface down and up, gives it
// other MTUs, and takes its addresses away, while it is in use. What was under way
// goes on as soon as it can.
func TestInterfaceChanged(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		a := w.attach(t)
		worker := workerOf(t, w)
		ip := func(args string) { w.Guest.Must(t, append([]string{"ip"}, strings.Fields(args)...)...) }
		addr4, addr6 := w.Guest4.String()+"/24", w.Guest6.String()+"/64"
		routes := func() {
			ip("route replace default via " + w.Gateway4.String())
			ip("-6 route replace default via " + w.Gateway6.String() + " dev tap0")
		}
		mtus := []string{"1280", "9000", "1500", "65520", "1400", "4000"}
		if w.flags[0] == "--link=veth" {
			// The kernel drops what is longer than the MTU of the other end, which
			// is only right as it was made. What begins afterwards works.
			mtus = []string{"65521", "65520"}
		}
		for _, c := range []struct {
			name   string
			change func()
		}{
			{"down and up", func() {
				for range 3 {
					ip("link set tap0 down")
					time.Sleep(100 * time.Millisecond)
					ip("link set tap0 up")
					// Going down has the kernel drop IPv6 addresses.
					ip("-6 addr replace " + addr6 + " dev tap0 nodad")
					routes()
				}
			}},
			{"other MTUs", func() {
				for _, mtu := range mtus {
					ip("link set tap0 mtu " + mtu)
					time.Sleep(100 * time.Millisecond)
				}
			}},
			{"no addresses", func() {
				ip("addr del " + addr4 + " dev tap0")
				ip("-6 addr del " + addr6 + " dev tap0")
				time.Sleep(500 * time.Millisecond)
				ip("addr add " + addr4 + " dev tap0")
				ip("-6 addr add " + addr6 + " dev tap0 nodad")
				routes()
			}},
		} {
			talk4, talk6 := transfer(web(false, rig.Services.Talk), 10, 100*time.Millisecond), transfer(web(true, rig.Services.Talk), 10, 100*time.Millisecond)
			intact(t, c.name, talk4, during(t, w, c.change, talk4, talk6))
		}
		for _, mtu := range []string{"65520", "9000", "1400", "1280"} {
			ip("link set tap0 mtu " + mtu)
			sizes := []int{0, 1200, 1201, 1232, 1352, 1353, 1472, 1473, 8972, 8973, 30000, 65507}
			if w.flags[0] == "--link=veth" {
				sizes = sizes[:4]
			}
			families(t, func(t *testing.T, six bool) {
				for _, f := range rig.EchoUDP.On(t, w.Guest, rig.UDPEcho{Addr: web(six, rig.Services.Echo), Sizes: sizes}) {
					t.Errorf("MTU %s inside: %s", mtu, f)
				}
			})
		}
		alive(t, w, worker)
		wantIdle(t, w, a.PID)
	})
}

// fullDisk mounts a small file system in the Net, for everybody, and returns where,
// and what fills it and makes room again.
func fullDisk(t *testing.T, w *world) (dir string, fill, empty func()) {
	t.Helper()
	dir = filepath.Join(w.Dir, "disk")
	w.User.Must(t, "mkdir", dir)
	w.Host.Must(t, "mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "tmpfs", dir)
	fill = func() {
		w.User.Run(t, "dd", "if=/dev/zero", "of="+filepath.Join(dir, "ballast"), "bs=4k", "count=100", "conv=notrunc", "oflag=append")
	}
	empty = func() { w.User.Must(t, "rm", filepath.Join(dir, "ballast")) }
	return dir, fill, empty
}

// TestDiskFull: a full disk costs what was to be written there, and says so.
func TestDiskFull(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "mount", "dd")
	const full = "no space left on device"
	t.Run("captures", func(t *testing.T) {
		w := onTap(t)
		dir, _, _ := fullDisk(t, w)
		a := w.attach(t, "--pcap", filepath.Join(dir, "all.pcapng"))
		worker := workerOf(t, w)
		talk := transfer(web(false, rig.Services.Talk), 4, 50*time.Millisecond)
		intact(t, "captured", talk, during(t, w, func() {
			a.WaitOutput(t, "frames are no longer written", 5*time.Second)
		}, talk))
		if got := a.Stderr(); !strings.Contains(got, full) || strings.Count(got, "no longer written") != 1 {
			t.Errorf("the log:\n%s", got)
		}
		c := w.User.Exec(t, rig.Command{Args: []string{rig.Binary(t), "capture", "-w", filepath.Join(dir, "more.pcapng")}, Env: []string{runtimeDir}})
		if code, ok := c.Wait(5 * time.Second); !ok || code != 1 || !strings.Contains(c.Stderr(), full) {
			t.Errorf("capture: status %d: %s", code, c.Stderr())
		}
		alive(t, w, worker)
		wantIdle(t, w, a.PID)
	})
	t.Run("capture", func(t *testing.T) {
		w := onTap(t)
		dir, _, _ := fullDisk(t, w)
		a := w.attach(t)
		worker := workerOf(t, w)
		c := w.User.Exec(t, rig.Command{Args: []string{rig.Binary(t), "capture", "-w", filepath.Join(dir, "x.pcapng"), "tcp port " + itoa(rig.Services.Talk)}, Env: []string{runtimeDir}})
		talk := transfer(web(false, rig.Services.Talk), 4, 50*time.Millisecond)
		intact(t, "captured", talk, during(t, w, func() {}, talk))
		if code, ok := c.Wait(5 * time.Second); !ok || code != 1 || !strings.Contains(c.Stderr(), full) || !strings.Contains(c.Stderr(), " dropped\n") {
			t.Errorf("capture: status %d, ended %t: %s", code, ok, c.Stderr())
		}
		alive(t, w, worker)
		wantIdle(t, w, a.PID)
	})
	t.Run("log", func(t *testing.T) {
		w := onTap(t)
		dir, fill, empty := fullDisk(t, w)
		log := filepath.Join(dir, "log")
		a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{
			Flags:  append([]string{"--log-level", "debug"}, w.flags...),
			Prefix: []string{"sh", "-c", `exec "$@" 2>>` + log, "sh"},
		})
		worker := workerOf(t, w)
		fill()
		alive(t, w, worker)
		denied := func() { // says something in the log
			rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: at(w.Gateway4, 9), Timeout: time.Second})
		}
		denied()
		wantIdle(t, w, a.PID)
		empty()
		before := len(w.User.Must(t, "cat", log))
		mustCtl(t, w, "log-level", "info")
		denied()
		if !rig.Poll(5*time.Second, func() bool { return len(w.User.Must(t, "cat", log)) > before }) {
			t.Error("the log does not go on when there is room again")
		}
		a.Signal(syscall.SIGTERM)
		a.WantExit(t, 0, 3*time.Second)
	})
	t.Run("files", func(t *testing.T) {
		w := onTap(t)
		dir, fill, _ := fullDisk(t, w)
		fill()
		pidFile := filepath.Join(dir, "pid")
		a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{Flags: append([]string{"--pid-file", pidFile}, w.flags...), NoWait: true})
		a.WantExit(t, 1, 3*time.Second)
		a.WantOneLine(t, "write PID file", full)
		if o := w.User.Run(t, "test", "-e", pidFile); o.Code == 0 {
			t.Error("an empty PID file is left")
		}
		wantAllGone(t, w)
		// Nobody learns that it is ready, but it is.
		b := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{
			Flags: w.flags, NoWait: true, Prefix: []string{"sh", "-c", `exec "$@" 3>>` + filepath.Join(dir, "ready"), "sh"},
		})
		b.WaitOutput(t, full, 10*time.Second)
		alive(t, w, workerOf(t, w))
	})
}

// TestLogReaderGone: who reads the log may go, or stop reading. Nobody else notices.
func TestLogReaderGone(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	for _, how := range []string{"gone", "stopped"} {
		t.Run(how, func(t *testing.T) {
			w := onTap(t)
			r, p, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			unix.FcntlInt(r.Fd(), unix.F_SETPIPE_SZ, 4096)
			a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{
				Flags: append([]string{"--log-level", "debug"}, w.flags...), Files: []*os.File{p},
				Prefix: []string{"sh", "-c", `exec "$@" 1>&5 2>&5 5>&-`, "sh"},
			})
			p.Close()
			worker := workerOf(t, w)
			if how == "gone" {
				r.Close()
			}
			for i := range 60 { // each of which is worth a line
				mustCtl(t, w, "forward", "add", itoa(9000+i)+":80")
			}
			if how == "stopped" {
				if n, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ); err != nil || n < 3500 {
					t.Errorf("%d bytes are in the pipe, %v: nothing is stuck", n, err)
				}
			}
			alive(t, w, worker)
			endsWell(t, w, a)
		})
	}
}

// TestAgentStopped: nobody waits long for an agent that stands still.
func TestAgentStopped(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ss", "find")
	w := onTap(t)
	w.Guest.ServeOn(t, false)
	a := w.attach(t, "-p", "8090:"+itoa(rig.Services.Talk))
	const limit = 9500 * time.Millisecond // an agent has 10 s to answer
	stopAgents := func() {
		for _, line := range w.Leftovers(t, "usernet-agent") {
			pid, _ := strconv.Atoi(strings.Fields(line)[0])
			syscall.Kill(pid, syscall.SIGSTOP)
		}
	}
	stopAgents()
	began := time.Now()
	killWorker(t, w, syscall.SIGKILL)
	if took := time.Since(began); took > limit {
		t.Errorf("another worker takes %v", took)
	}
	a.WaitOutput(t, "faster way", 5*time.Second)
	wantPaths(t, w)
	a.Signal(syscall.SIGTERM)
	a.WantExit(t, 0, 3*time.Second)
	b := w.attach(t)
	stopAgents()
	// Which the agent is asked to do as well.
	w.Host.Must(t, "ip", "-6", "route", "del", "default")
	time.Sleep(200 * time.Millisecond)
	b.Signal(syscall.SIGTERM)
	if took := b.WantExit(t, 0, 3*time.Second); took > limit {
		t.Errorf("the end takes %v", took)
	}
	wantAllGone(t, w)
}

// wantPaths checks that transfers work from the guest and, by port 8090, to it.
func wantPaths(t *testing.T, w *world) {
	t.Helper()
	for _, to := range []struct {
		addr         string
		from, server *rig.Node
	}{{web(false, rig.Services.Talk), w.Guest, w.Internet}, {host(false, 8090), w.Internet, w.Guest}} {
		talk := transfer(to.addr, 2, time.Millisecond)
		all, err := talk.Do(to.from, to.server, rig.Patience)
		if err != nil {
			t.Error(err)
		}
		intact(t, "to "+to.addr, talk, all)
	}
}
