package e2e

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// handedOver returns how many connections were handed over so far.
func handedOver(t *testing.T, w *world) int {
	t.Helper()
	var stats struct {
		Flows struct {
			HandedOver int `json:"handed_over"`
		}
	}
	if err := json.Unmarshal([]byte(mustCtl(t, w, "stats", "--json")), &stats); err != nil {
		t.Fatal(err)
	}
	return stats.Flows.HandedOver
}

// wantNoRules waits until no connection has a rule of the guest's routing.
func wantNoRules(t *testing.T, w *world) {
	t.Helper()
	var rules string
	if !rig.Poll(30*time.Second, func() bool {
		rules = w.Guest.Must(t, "sh", "-c", "ip rule; ip -6 rule")
		return !strings.Contains(rules, "sport")
	}) {
		t.Errorf("rules of connections that have ended:\n%s", rules)
	}
}

// TestHandover: connections that carry much go on past the interface, and nobody
// can tell by what comes, and how it ends.
func TestHandover(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ip")
	const mib = 1 << 20
	tests := []struct {
		name                 string
		client, server       []rig.Step
		up, down             int64
		clientEnd, serverEnd string
		streams              int
	}{
		{
			"both ways at once",
			[]rig.Step{rig.Exchange(24*mib, 1)}, []rig.Step{rig.Exchange(24*mib, 1000)},
			24 * mib, 24 * mib, "eof", "eof", 1,
		},
		{
			"many at once",
			[]rig.Step{rig.Exchange(6*mib, 1)}, []rig.Step{rig.Exchange(6*mib, 1000)},
			6 * mib, 6 * mib, "eof", "eof", 12,
		},
		{
			"guest closes first",
			[]rig.Step{rig.Send(16*mib, 1), rig.CloseWrite(), rig.Receive()},
			[]rig.Step{rig.Receive(), rig.Sleep(300 * time.Millisecond), rig.Send(24*mib, 2), rig.CloseWrite()},
			16 * mib, 24 * mib, "eof", "eof", 2,
		},
		{
			"server closes first",
			[]rig.Step{rig.Receive(), rig.Sleep(300 * time.Millisecond), rig.Send(16*mib, 1), rig.CloseWrite()},
			[]rig.Step{rig.Send(24*mib, 2), rig.CloseWrite(), rig.Receive()},
			16 * mib, 24 * mib, "eof", "eof", 2,
		},
		{
			"the guest is slow", // and has the most to take when both have closed
			[]rig.Step{rig.ReceiveN(24 * mib), rig.CloseWrite(), rig.Sleep(2 * time.Second), rig.Receive()},
			[]rig.Step{rig.Send(28*mib, 2), rig.CloseWrite(), rig.Receive()},
			0, 28 * mib, "eof", "eof", 2,
		},
		{
			"the server is slow",
			[]rig.Step{rig.Send(32*mib, 1), rig.CloseWrite(), rig.Receive()},
			[]rig.Step{rig.ReceiveN(3 * mib), rig.Sleep(2 * time.Second), rig.Receive(), rig.Send(mib, 2), rig.CloseWrite()},
			32 * mib, mib, "eof", "eof", 2,
		},
		{
			"guest resets",
			[]rig.Step{rig.Send(8*mib, 1), rig.ReceiveN(8 * mib), rig.Reset()},
			[]rig.Step{rig.ReceiveN(8 * mib), rig.Send(8*mib, 2), rig.Receive()},
			8 * mib, 8 * mib, "", "reset", 2,
		},
		{
			"server resets",
			[]rig.Step{rig.ReceiveN(8 * mib), rig.Send(8*mib, 1), rig.Receive()},
			[]rig.Step{rig.Send(8*mib, 2), rig.ReceiveN(8 * mib), rig.Reset()},
			8 * mib, 8 * mib, "reset", "", 2,
		},
	}
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			all := 0
			for _, test := range tests {
				before := handedOver(t, w)
				talk := rig.Talk{Addr: web(six, rig.Services.Talk), Client: test.client, Server: test.server, Streams: test.streams}
				results, err := talk.Do(w.Guest, w.Internet, 120*time.Second)
				if err != nil {
					t.Fatalf("%s: %v", test.name, err)
				}
				for _, r := range results {
					wantSame(t, test.name, r, test.up, test.down)
					if r.Client.End != test.clientEnd || r.Server.End != test.serverEnd {
						t.Errorf("%s: ends %q and %q, want %q and %q", test.name, r.Client.End, r.Server.End, test.clientEnd, test.serverEnd)
					}
				}
				n := handedOver(t, w) - before
				t.Logf("%s: %d of %d", test.name, n, test.streams)
				all += n
			}
			// Each needs a moment in which its guest keeps up.
			if all < 4 {
				t.Errorf("%d connections were handed over", all)
			}
			wantNoRules(t, w)
		})
	})
}

// samePort sends and receives 2 MiB again and again from one port, with a pause
// where a server takes the port that the other end has.
const samePort = `
import socket, sys
addr, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in addr else socket.AF_INET
for i in range(8):
    c = socket.socket(family)
    c.settimeout(60)
    c.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    c.bind(("", 4444))
    c.connect((addr, port))
    def turn():
        got, b = 0, b"x" * 65536
        for _ in range(16):
            c.sendall(b)
            n = 0
            while n < len(b): n += len(c.recv(1 << 20)) or sys.exit("EOF")
    for _ in range(4): turn()
    s = socket.socket(family)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", port))
    s.listen()
    s.close()
    turn()
    # Nothing stays behind that would keep the port: the reset that ends it.
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    c.close()
print("done")
`

// TestHandoverPorts: connections that were handed over keep no port from others,
// neither the guest's nor that of the far end.
func TestHandoverPorts(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "python3", "ip")
	w := onTap(t)
	w.attach(t)
	for _, six := range []bool{false, true} {
		before := handedOver(t, w)
		addr := pick(six, rig.Web4, rig.Web6)
		p := w.Guest.Exec(t, rig.Command{Args: []string{"python3", "-c", samePort, addr.String(), itoa(rig.Services.Echo)}})
		p.WantExit(t, 0, 2*time.Minute)
		if n := handedOver(t, w) - before; n == 0 {
			t.Errorf("no connection was handed over of 8")
		}
	}
	wantNoRules(t, w)
}

// TestHandoverNot: a connection stays where it is if it is wanted there, or could
// not live elsewhere.
func TestHandoverNot(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "curl", "nft", "ip")
	const size = 20 << 20
	download := func(t *testing.T, w *world, want bool, args ...string) {
		t.Helper()
		before := handedOver(t, w)
		defer func() {
			t.Helper()
			if n := handedOver(t, w) - before; n > 0 != want {
				t.Errorf("%d connections were handed over, want any: %v", n, want)
			}
		}()
		url := "http://" + web(false, rig.Services.HTTP) + "/data?n=" + itoa(size) + "&seed=1"
		// The first connection may be over before the way inside is open, and each
		// needs a moment in which its guest keeps up.
		for range 20 {
			got := w.Guest.Must(t, append([]string{"curl", "-sS", "-m", "60", "-o", "/dev/null", "-w", "%{size_download}", url}, args...)...)
			if got != itoa(size) {
				t.Errorf("%s bytes, want %d", got, size)
			}
			if !want || handedOver(t, w) > before {
				return
			}
		}
	}
	t.Run("off", func(t *testing.T) {
		w := onTap(t)
		w.attach(t, "--handover=off")
		download(t, w, false)
		if rules := w.Guest.Must(t, "ip", "rule"); strings.Contains(rules, "fwmark") {
			t.Errorf("rules:\n%s", rules)
		}
	})
	for hook, rule := range map[string]string{"input": "iifname lo drop", "output": "oifname lo drop"} {
		t.Run(hook, func(t *testing.T) {
			w := onTap(t)
			w.attach(t)
			w.Guest.Must(t, "nft", "add table inet t; add chain inet t c { type filter hook "+hook+" priority 0; }; add rule inet t c "+rule)
			download(t, w, false)
			wantNoRules(t, w)
		})
	}
	t.Run("elsewhere", func(t *testing.T) {
		w := onTap(t)
		w.attach(t)
		download(t, w, true)
		download(t, w, false, "--interface", "tap0")
		wantNoRules(t, w)
		capture := w.User.Exec(t, rig.Command{Args: []string{rig.Binary(t), "capture", "-w", w.Dir + "/frames"}, Env: []string{runtimeDir}})
		if !rig.Poll(10*time.Second, func() bool { return w.User.Run(t, "test", "-s", w.Dir+"/frames").Code == 0 }) {
			t.Fatal("no capture")
		}
		download(t, w, false)
		capture.Kill()
	})
}

// reader takes a connection's bytes, first as fast as it can and then slowly, and
// says how it ends.
const reader = `
import socket, sys, time
c = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)
c.sendall(b"GET /data?n=40000000000&seed=1 HTTP/1.0\r\nHost: x\r\n\r\n")
got, said = 0, False
try:
    while True:
        b = c.recv(1 << 16)
        if not b: break
        got += len(b)
        if got > 8 << 20:
            if not said: print("reading", flush=True)
            said = True
        if got > 512 << 20: time.sleep(0.01)
    print("ended: EOF", flush=True)
except OSError as e: print("ended:", e, flush=True)
`

// TestHandoverEnds: what becomes of such a connection when somebody else ends it.
func TestHandoverEnds(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "python3", "ip")
	w := onTap(t)
	a := w.attach(t)
	start := func() *rig.Proc {
		t.Helper()
		before := handedOver(t, w)
		p := w.Guest.Exec(t, rig.Command{Args: []string{"python3", "-c", reader, rig.Web4.String(), itoa(rig.Services.HTTP)}})
		p.WaitOutput(t, "reading", 30*time.Second)
		if !rig.Poll(time.Minute, func() bool { return handedOver(t, w) > before }) {
			t.Fatal("the connection was not handed over")
		}
		return p
	}
	p := start()
	list := listFlows(t, w)
	if len(list) != 1 || list[0].State != "established" || list[0].Remote != web(false, rig.Services.HTTP) || list[0].Down < 8<<20 {
		t.Fatalf("flows: %+v", list)
	}
	mustCtl(t, w, "flows", "kill", list[0].ID)
	p.WaitOutput(t, "ended: [Errno 104]", 10*time.Second)
	wantNoRules(t, w)

	// What is cut off is not taken for the end.
	p = start()
	killWorker(t, w, syscall.SIGKILL)
	p.WaitOutput(t, "ended: [Errno 104]", 10*time.Second)
	wantNoRules(t, w)

	// Without the helper inside it goes on.
	p = start()
	agents := w.User.Must(t, "pgrep", "-P", itoa(a.PID), "-f", "usernet-agent")
	w.User.Must(t, "kill", "-KILL", strings.TrimSpace(agents))
	before := listFlows(t, w)[0].Down
	if !rig.Poll(30*time.Second, func() bool { return listFlows(t, w)[0].Down > before+8<<20 }) {
		t.Error("the connection stands still")
	}

	a.Signal(syscall.SIGKILL)
	p.WaitOutput(t, "ended: [Errno 104]", 10*time.Second)
}

// TestHandoverNetwork: connections of the guests of a shared network are handed
// over too, and those of one that comes back in the place of another.
func TestHandoverNetwork(t *testing.T) {
	rig.NeedTools(t, "ip")
	s := newShared(t)
	const mib = 1 << 20
	first := s.join(t, "blue", "first") // keeps the network
	total := func() (stats struct {
		Flows struct {
			HandedOver int `json:"handed_over"`
		}
	}) {
		t.Helper()
		p := s.usernet(t, "stats", "--json", "--netns", first.guest.NetnsPath())
		if err := json.Unmarshal([]byte(p.stdout), &stats); err != nil {
			t.Fatalf("stats: %v: %s", err, p.stderr)
		}
		return stats
	}
	for _, six := range []bool{false, true} {
		m := s.join(t, "blue", "second")
		before := total().Flows.HandedOver
		for range 10 { // the first may be over before the way inside is open
			talk := rig.Talk{
				Addr:   web(six, rig.Services.Talk),
				Client: []rig.Step{rig.Exchange(24*mib, 1)}, Server: []rig.Step{rig.Exchange(24*mib, 1000)},
			}
			all, err := talk.Do(m.guest, s.Internet, 120*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			wantSame(t, "both ways at once", all[0], 24*mib, 24*mib)
			if total().Flows.HandedOver > before {
				break
			}
		}
		if total().Flows.HandedOver == before {
			t.Error("no connection was handed over")
		}
		m.Signal(syscall.SIGTERM)
		m.WantExit(t, 0, time.Minute)
	}
}
