package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// web is the address of the internet's servers.
func web(six bool, port int) string { return at(pick(six, rig.Web4, rig.Web6), port) }

// wantSame checks that each side got what the other sent, to a FIN.
func wantSame(t *testing.T, what string, r rig.Results, up, down int64) {
	t.Helper()
	if r.Client.Failure != nil || r.Server.Failure != nil {
		t.Errorf("%s: client: %v, server: %v", what, r.Client.Failure, r.Server.Failure)
	}
	if r.Server.Got != up || r.Client.Got != down {
		t.Errorf("%s: %d bytes up and %d down, want %d and %d", what, r.Server.Got, r.Client.Got, up, down)
	}
	if r.Server.GotSum != r.Client.SentSum || r.Client.GotSum != r.Server.SentSum {
		t.Errorf("%s: bytes came changed: %+v", what, r)
	}
}

func TestTCPParallelStreams(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		for _, streams := range []int{1, 8, 64} {
			families(t, func(t *testing.T, six bool) {
				size := int64(16<<20) / int64(streams)
				talk := rig.Talk{
					Addr:    web(six, rig.Services.Talk),
					Client:  []rig.Step{rig.Exchange(size, 1)},
					Server:  []rig.Step{rig.Exchange(size, 1000)},
					Streams: streams,
				}
				all, err := talk.Do(w.Guest, w.Internet, 60*time.Second)
				if err != nil {
					t.Fatal(err)
				}
				for i, r := range all {
					wantSame(t, fmt.Sprintf("%d of %d streams", i+1, streams), r, size, size)
				}
			})
		}
	})
}

// TestTCPStreamsOfAllKinds: 512 connections at once of which some end in order,
// some stall and some are reset by either side. Each carries its own bytes,
// whatever becomes of its neighbours.
func TestTCPStreamsOfAllKinds(t *testing.T) {
	w := onTap(t)
	w.attach(t)
	const streams = 128 // of each kind
	const size, part = 60_000, 20_000
	kinds := []struct {
		name           string
		client, server []rig.Step
		up, down       int64
		reset          bool
	}{
		{"exchanges", []rig.Step{rig.Exchange(size, 1)}, []rig.Step{rig.Exchange(size, 1000)}, size, size, false},
		{"stalls",
			[]rig.Step{rig.SendPieces(size, 3, 5000), rig.Sleep(time.Second), rig.CloseWrite(), rig.Receive()},
			[]rig.Step{rig.Sleep(time.Second / 2), rig.Exchange(size, 1000)}, size, size, false},
		// Who resets has heard that all of its own has arrived: what is still in
		// its socket goes with it.
		{"guest resets",
			[]rig.Step{rig.SendPieces(part, 4, 3000), rig.ReceiveN(part), rig.Reset()},
			[]rig.Step{rig.ReceiveN(part), rig.SendPieces(part, 5, 3000), rig.Receive()}, part, part, true},
		{"server resets",
			[]rig.Step{rig.ReceiveN(part), rig.SendPieces(part, 6, 3000), rig.Receive()},
			[]rig.Step{rig.SendPieces(part, 7, 3000), rig.ReceiveN(part), rig.Reset()}, part, part, true},
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, k := range kinds {
		wg.Go(func() {
			talk := rig.Talk{Addr: web(i%2 == 1, rig.Services.Talk), Client: k.client, Server: k.server, Streams: streams}
			all, err := talk.Do(w.Guest, w.Internet, 90*time.Second)
			if err != nil {
				t.Errorf("%s: %v", k.name, err)
				return
			}
			for j, r := range all {
				wantSame(t, fmt.Sprintf("%s, %d of %d", k.name, j+1, streams), r, k.up, k.down)
				if ends := r.Client.End + r.Server.End; k.reset && ends != "reset" {
					t.Errorf("%s, %d of %d: client's end %q, server's %q, want one reset", k.name, j+1, streams, r.Client.End, r.Server.End)
				}
			}
		})
	}
}

// TestTCPEnds: how a connection ends on one side is how the other sees it end.
func TestTCPEnds(t *testing.T) {
	const mib = 1 << 20
	tests := []struct {
		name                 string
		client, server       []rig.Step
		up, down             int64
		clientEnd, serverEnd string
	}{
		{
			"guest closes first", // the answer comes after the guest's FIN
			[]rig.Step{rig.Send(mib, 1), rig.CloseWrite(), rig.Receive()},
			[]rig.Step{rig.Receive(), rig.Sleep(300 * time.Millisecond), rig.Send(10*mib, 2), rig.CloseWrite()},
			mib, 10 * mib, "eof", "eof",
		},
		{
			"server closes first",
			[]rig.Step{rig.Receive(), rig.Sleep(300 * time.Millisecond), rig.Send(10*mib, 1), rig.CloseWrite()},
			[]rig.Step{rig.Send(mib, 2), rig.CloseWrite(), rig.Receive()},
			10 * mib, mib, "eof", "eof",
		},
		{
			"nothing but FINs",
			[]rig.Step{rig.CloseWrite(), rig.Receive()},
			[]rig.Step{rig.Receive(), rig.CloseWrite()},
			0, 0, "eof", "eof",
		},
		{
			"guest resets",
			[]rig.Step{rig.Send(1000, 1), rig.ReceiveN(10), rig.Reset()},
			[]rig.Step{rig.ReceiveN(1000), rig.Send(10, 2), rig.Receive()},
			1000, 10, "", "reset",
		},
		{
			"server resets",
			[]rig.Step{rig.Send(1000, 1), rig.Receive()},
			[]rig.Step{rig.ReceiveN(1000), rig.Reset()},
			1000, 0, "reset", "",
		},
		{
			"server resets while the guest is slow", // what it has sent is the guest's
			[]rig.Step{rig.Sleep(time.Second), rig.Receive()},
			[]rig.Step{rig.Send(700_000, 1), rig.Sleep(500 * time.Millisecond), rig.Reset()},
			0, 700_000, "reset", "",
		},
		{
			"guest resets after its FIN",
			[]rig.Step{rig.Send(1000, 1), rig.CloseWrite(), rig.ReceiveN(10), rig.Reset()},
			[]rig.Step{rig.Receive(), rig.Send(10, 2), rig.Sleep(500 * time.Millisecond)},
			1000, 10, "", "eof",
		},
	}
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				families(t, func(t *testing.T, six bool) {
					talk := rig.Talk{Addr: web(six, rig.Services.Talk), Client: tt.client, Server: tt.server}
					all, err := talk.Do(w.Guest, w.Internet, 30*time.Second)
					if err != nil {
						t.Fatal(err)
					}
					r := all[0]
					wantSame(t, tt.name, r, tt.up, tt.down)
					if r.Client.End != tt.clientEnd || r.Server.End != tt.serverEnd {
						t.Errorf("guest saw the end as %q, server as %q; want %q and %q", r.Client.End, r.Server.End, tt.clientEnd, tt.serverEnd)
					}
				})
			})
		}
	})
}

// TestTCPUrgent: urgent data arrives, as a part of the stream, whether it comes
// alone or with what is before and after it.
func TestTCPUrgent(t *testing.T) {
	pause := rig.Sleep(50 * time.Millisecond)
	// The rig's readers do not set SO_OOBINLINE: what is still marked urgent
	// when it reaches them is missing.
	all := []rig.Step{rig.Receive()}
	tests := map[string]struct{ sender, reader []rig.Step }{
		"alone":  {[]rig.Step{rig.Send(100, 7), pause, rig.Urgent("abc"), pause, rig.Send(100, 8), rig.CloseWrite()}, all},
		"amidst": {[]rig.Step{rig.Send(100, 7), rig.Urgent("abc"), rig.Send(100, 8), rig.CloseWrite()}, all},
		"last":   {[]rig.Step{rig.Send(100, 7), rig.Send(100, 8), rig.Urgent("abc"), rig.CloseWrite()}, all},
		"answered": { // nothing comes after the mark until all before it was read
			[]rig.Step{rig.Send(100, 7), pause, rig.Urgent("abc"), rig.ReceiveN(1), rig.Send(100, 8), rig.CloseWrite()},
			[]rig.Step{rig.ReceiveN(103), rig.Send(1, 1), rig.Receive()},
		},
	}
	eachLink(t, func(t *testing.T, w *world) {
		if w.Name == "kernel" {
			t.Skip("the kernel's forwarding leaves the mark on")
		}
		w.attach(t)
		for name, tt := range tests {
			t.Run(name, func(t *testing.T) {
				families(t, func(t *testing.T, six bool) {
					talk := rig.Talk{Addr: web(six, rig.Services.Talk), Client: tt.sender, Server: tt.reader, Streams: 20}
					all, err := talk.Do(w.Guest, w.Internet, 10*time.Second)
					if err != nil {
						t.Fatal(err)
					}
					wantUrgent(t, "from the guest", all, func(r rig.Results) (sent, got rig.Result) { return r.Client, r.Server })
					talk.Client, talk.Server = tt.reader, tt.sender
					if all, err = talk.Do(w.Guest, w.Internet, 10*time.Second); err != nil {
						t.Fatal(err)
					}
					wantUrgent(t, "from the server", all, func(r rig.Results) (sent, got rig.Result) { return r.Server, r.Client })
				})
			})
		}
	})
}

func wantUrgent(t *testing.T, what string, all []rig.Results, sides func(rig.Results) (sent, got rig.Result)) {
	t.Helper()
	bad := 0
	for _, r := range all {
		if sent, got := sides(r); got.Got != 203 || got.GotSum != sent.SentSum || got.End != "eof" {
			if bad++; bad == 1 {
				t.Errorf("%s: %d bytes arrived, end %q, want 203 and the same: %+v", what, got.Got, got.End, r)
			}
		}
	}
	if bad > 1 {
		t.Errorf("%s: %d of %d streams went wrong", what, bad, len(all))
	}
}

// TestTCPStall: a reader that stops for longer than any buffer lasts loses
// nothing.
func TestTCPStall(t *testing.T) {
	stall := pick(testing.Short(), 10*time.Second, 3*time.Second)
	const size = 32 << 20
	fast := []rig.Step{rig.Send(size, 3), rig.CloseWrite(), rig.Receive()}
	slow := []rig.Step{rig.Sleep(stall), rig.Receive(), rig.CloseWrite()}
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		var wg sync.WaitGroup
		defer wg.Wait()
		for _, tt := range []struct {
			name           string
			six            bool
			client, server []rig.Step
			up, down       int64
		}{
			{"guest reads slowly, v4", false, slow, fast, 0, size},
			{"guest reads slowly, v6", true, slow, fast, 0, size},
			{"server reads slowly, v4", false, fast, slow, size, 0},
			{"server reads slowly, v6", true, fast, slow, size, 0},
		} {
			wg.Go(func() {
				talk := rig.Talk{Addr: web(tt.six, rig.Services.Talk), Client: tt.client, Server: tt.server}
				all, err := talk.Do(w.Guest, w.Internet, stall+40*time.Second)
				if err != nil {
					t.Errorf("%s: %v", tt.name, err)
					return
				}
				wantSame(t, tt.name, all[0], tt.up, tt.down)
			})
		}
	})
}

// TestTCPFailures: a connection fails inside as it fails outside.
func TestTCPFailures(t *testing.T) {
	const closed = 4
	tests := []struct {
		name   string
		v4, v6 netip.Addr
		port   int
		local  bool // the host's own routes are the cause
		// want4 and want6 hold where the guest cannot learn what the host
		// knows: no ICMPv4 error means EACCES.
		want4, want6 []syscall.Errno
	}{
		{name: "refused", v4: rig.Web4, v6: rig.Web6, port: closed},
		{name: "host unreachable", v4: rig.Unreachable4, v6: rig.Unreachable6, port: 80},
		{name: "no route", v4: rig.NoRoute4, v6: rig.NoRoute6, port: 80},
		{name: "prohibited", v4: rig.Prohibited4, v6: rig.Prohibited6, port: 80},
		{name: "host unreachable from the host", v4: rig.HostUnreachable4, v6: rig.HostUnreachable6, port: 80, local: true},
		{name: "no route from the host", v4: rig.HostNoRoute4, v6: rig.HostNoRoute6, port: 80, local: true},
		{name: "nobody on the host's link", v4: rig.HostSilent4, v6: rig.HostSilent6, port: 80},
		{
			name: "prohibited by the host", v4: rig.HostProhibited4, v6: rig.HostProhibited6, port: 80, local: true,
			want4: []syscall.Errno{syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EACCES},
		},
	}
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				if tt.local && w.Name == "kernel" {
					t.Skip("a router's errors are not a host's")
				}
				families(t, func(t *testing.T, six bool) {
					r := rig.DialRequest{Network: "tcp", Addr: at(pick(six, tt.v4, tt.v6), tt.port)}
					direct := rig.Dial.On(t, w.User, r)
					inside := rig.Dial.On(t, w.Guest, r)
					want := pick(six, tt.want4, tt.want6)
					if want == nil {
						want = []syscall.Errno{direct.Errno}
					}
					if direct.Errno == 0 || !slices.Contains(want, inside.Errno) {
						t.Errorf("outside: %v after %v; inside: %v after %v, want %v", direct, direct.Took, inside, inside.Took, want)
					}
					// Generous: an ICMP error that comes while connect still holds
					// the socket counts only at the first retransmission, after a
					// second (tcp_v4_err, sock_owned_by_user).
					if slack := inside.Took - direct.Took; slack > 2*time.Second {
						t.Errorf("took %v inside and %v outside", inside.Took, direct.Took)
					}
					t.Logf("inside: %v after %v, outside after %v", inside, inside.Took, direct.Took)
				})
			})
		}
	})
}

// TestTCPBlackhole: what is not answered outside is not answered inside, and
// hinders nothing else.
func TestTCPBlackhole(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		var requests []rig.DialRequest
		for i := range 200 {
			a := pick(i%2 == 1, rig.Blackhole4, rig.Blackhole6)
			requests = append(requests, rig.DialRequest{Network: "tcp", Addr: at(a, 1000+i), Timeout: 4 * time.Second})
		}
		var wg sync.WaitGroup
		var lost []rig.DialResult
		wg.Go(func() {
			var err error
			if lost, err = rig.Dials.Try(w.Guest, requests); err != nil {
				t.Error(err)
			}
		})
		// Meanwhile:
		for range 10 {
			time.Sleep(200 * time.Millisecond)
			for _, six := range []bool{false, true} {
				r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: web(six, rig.Services.Whoami)})
				if r.Errno != 0 || r.Timeout || r.Took > 2*time.Second {
					t.Errorf("%s: %v after %v while others hang", web(six, 0), r, r.Took)
				}
			}
		}
		wg.Wait()
		for i, r := range lost {
			if !r.Timeout {
				t.Errorf("%s: %v after %v, want a timeout", requests[i].Addr, r, r.Took)
			}
		}
	})
}

// TestTCPSamePorts: a guest may use the port of a connection that the server
// has closed at once, without waiting for anybody's TIME_WAIT.
func TestTCPSamePorts(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			for i := range 10 {
				var r rig.DialResult
				rig.Poll(2*time.Second, func() bool {
					r = rig.ReadAll.On(t, w.Guest, rig.DialRequest{
						Network: "tcp",
						Addr:    web(six, rig.Services.Whoami),
						Source:  at(pick(six, w.Guest4, w.Guest6), 40001),
						Timeout: 5 * time.Second,
					})
					// The guest's own last ACK may still be on its way.
					return r.Errno != syscall.EADDRINUSE
				})
				if r.Errno != 0 || r.Timeout || r.Took > 2*time.Second {
					t.Fatalf("connection %d from the same port: %v after %v: %s", i+1, r, r.Took, r.Text)
				}
			}
		})
	})
}

// TestTCPFewPorts: a guest that has few ports uses each of them again as soon
// as the server has closed its last connection.
func TestTCPFewPorts(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		w.Guest.Must(t, "sysctl", "-w", "net.ipv4.ip_local_port_range=40000 40127")
		families(t, func(t *testing.T, six bool) {
			m := rig.Many{Addr: web(six, rig.Services.Whoami), Count: 1000, Workers: 16}
			rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: m.Addr}) // resolves neighbours
			r := rig.ReadMany.On(t, w.Guest, m)
			if r.Good != m.Count || r.Slow > m.Count/500 {
				t.Errorf("of %d connections %d were good, %d slow, errors: %v", m.Count, r.Good, r.Slow, r.Errors)
			}
			t.Logf("%+v", r)
		})
	})
}

// TestTCPAgreesWithHost: the server sees the host's address, and the guest may
// connect from any of its ports to any other.
func TestTCPAgreesWithHost(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			r := rig.ReadAll.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: web(six, rig.Services.Whoami)})
			seen, err := netip.ParseAddrPort(r.Text)
			if want := pick(six, rig.Host4, rig.Host6); err != nil || seen.Addr() != want {
				t.Errorf("the server saw %q, want the address %v", r.Text, want)
			}
		})
	})
}
