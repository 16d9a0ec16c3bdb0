package e2e

import (
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// TestUDPSizes: datagrams of all sizes come back as they were sent, in
// fragments where the link is smaller.
func TestUDPSizes(t *testing.T) {
	sizes := []int{0, 1, 2, 512, 1400, 1452, 1453, 1472, 1473, 2960, 4096, 8972, 8973, 16000, 32768, 60000, 65472, 65507}
	eachLink(t, func(t *testing.T, w *world) {
		for _, mtu := range []string{"1500", "65520"} {
			t.Run("mtu "+mtu, func(t *testing.T) {
				guest := w.Net.Guest(t)
				w.Attach(t, guest, append([]string{"--mtu", mtu}, w.flags...)...)
				families(t, func(t *testing.T, six bool) {
					sizes := sizes
					if six { // whose packets may be a header longer
						sizes = append(slices.Clone(sizes), 65508, 65527)
					}
					failed := rig.EchoUDP.On(t, guest, rig.UDPEcho{Addr: web(six, rig.Services.Echo), Sizes: sizes})
					for _, f := range failed {
						t.Error(f)
					}
				})
			})
		}
	})
}

// TestUDPFailures: the ICMP error that a datagram meets outside comes in.
func TestUDPFailures(t *testing.T) {
	tests := []struct {
		name   string
		v4, v6 netip.Addr
		port   int
		local  bool
		want4  []syscall.Errno
	}{
		{name: "port unreachable", v4: rig.Web4, v6: rig.Web6, port: 4},
		{name: "host unreachable", v4: rig.Unreachable4, v6: rig.Unreachable6, port: 80},
		{name: "no route", v4: rig.NoRoute4, v6: rig.NoRoute6, port: 80},
		{name: "prohibited", v4: rig.Prohibited4, v6: rig.Prohibited6, port: 80},
		{name: "host unreachable from the host", v4: rig.HostUnreachable4, v6: rig.HostUnreachable6, port: 80, local: true},
		{name: "no route from the host", v4: rig.HostNoRoute4, v6: rig.HostNoRoute6, port: 80, local: true},
		{
			name: "prohibited by the host", v4: rig.HostProhibited4, v6: rig.HostProhibited6, port: 80, local: true,
			want4: []syscall.Errno{syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EACCES},
		},
	}
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				if w.Name == "kernel" && (tt.local || tt.name == "prohibited") {
					t.Skip("a router's errors are not a host's")
				}
				families(t, func(t *testing.T, six bool) {
					r := rig.DialRequest{Network: "udp", Addr: at(pick(six, tt.v4, tt.v6), tt.port), Timeout: 3 * time.Second}
					direct := rig.Dial.On(t, w.User, r)
					inside := rig.Dial.On(t, w.Guest, r)
					want := tt.want4
					if six || want == nil {
						want = []syscall.Errno{direct.Errno}
					}
					if direct.Errno == 0 || !slices.Contains(want, inside.Errno) {
						t.Errorf("outside: %v; inside: %v, want %v", direct, inside, want)
					}
				})
			})
		}
	})
}

// TestUDPSurvivesErrors: an error from one destination does not end what goes
// to others, or to the same one when that is back.
func TestUDPSurvivesErrors(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			source := at(pick(six, w.Guest4, w.Guest6), 40002)
			for range 3 {
				dead := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "udp", Addr: web(six, 4), Source: source, Timeout: 2 * time.Second})
				if dead.Errno != syscall.ECONNREFUSED {
					t.Errorf("closed port: %v, want ECONNREFUSED", dead)
				}
				live := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "udp", Addr: web(six, rig.Services.Echo), Source: source, Timeout: 2 * time.Second})
				if live.Text != "hello" {
					t.Errorf("open port after a closed one: %v", live)
				}
			}
		})
	})
}

// TestUDPMapping: all servers see one guest socket as the same host socket,
// and empty datagrams arrive.
func TestUDPMapping(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			other := pick(six, netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8:77::1"))
			seen := rig.MapUDP.On(t, w.Guest, rig.UDPMapping{
				Source: at(pick(six, w.Guest4, w.Guest6), 0),
				Addrs:  []string{web(six, rig.Services.Whoami), at(other, rig.Services.Whoami), web(six, rig.Services.Whoami)},
			})
			from, err := netip.ParseAddrPort(seen[0])
			if err != nil || from.Addr() != pick(six, rig.Host4, rig.Host6) {
				t.Fatalf("the server saw %q, want the host's address", seen[0])
			}
			if seen[1] != seen[0] || seen[2] != seen[0] {
				t.Errorf("servers saw %q, want the same thrice", seen)
			}
		})
	})
}

// TestUDPManySockets: hundreds of flows at once, of datagrams with and without
// bytes, and silence afterwards.
func TestUDPManySockets(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		a := w.attach(t)
		families(t, func(t *testing.T, six bool) {
			for _, size := range []int{0, 1200} {
				r := rig.UDPBurst{Addr: web(six, rig.Services.Echo), Sockets: 300, Each: 10, Size: size}
				back := rig.BurstUDP.On(t, w.Guest, r)
				// The kernel may drop datagrams of such a burst; a broken flow
				// would lose all of its ten.
				if want := r.Sockets * r.Each * 98 / 100; back < want {
					t.Errorf("%d of %d datagrams of %d bytes came back, want at least %d", back, r.Sockets*r.Each, size, want)
				}
			}
		})
		wantIdle(t, w, a.PID)
	})
}

// wantIdle checks that a process does not spin.
func wantIdle(t *testing.T, w *world, pid int) {
	t.Helper()
	var used time.Duration
	if !rig.Poll(10*time.Second, func() bool {
		before := rig.UsageOf.On(t, w.Host, pid)
		time.Sleep(time.Second)
		used = rig.UsageOf.On(t, w.Host, pid).CPU - before.CPU
		return used <= 50*time.Millisecond
	}) {
		t.Errorf("used %v of processor time in a second of silence", used)
	}
}
