package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// spellings are addresses that mean the host itself, or may be mistaken for
// it, as an ordinary socket in the guest can dial them. Names of the gateway
// and of the host's interfaces are added by the tests.
func spellings(w *world) []netip.Addr {
	return append(addrs(
		"255.255.255.255", "10.0.2.255", "169.254.1.1", "224.0.0.1",
		"64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1", "::ffff:10.0.2.2", "::ffff:0:127.0.0.1",
	), w.Gateway4, w.Gateway6, w.DNS4, w.DNS6, rig.Host4, rig.Host6)
}

// rawSpellings are those that the guest's own kernel would keep to itself.
func rawSpellings(w *world) []netip.Addr {
	return append(spellings(w), addrs(
		"127.0.0.1", "127.0.0.53", "127.255.255.254", "0.0.0.0", "0.0.0.1", "0.1.2.3",
		"::1", "::", "::ffff:127.0.0.1", "::127.0.0.1", "::ffff:0.0.0.0", "::ffff:100.64.0.2",
	)...)
}

// meansHost tells whether an answer from a can only be the host's.
func meansHost(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsLoopback() || a.IsUnspecified() || a == rig.Host4 || a == rig.Host6
}

func addrs(texts ...string) []netip.Addr {
	list := make([]netip.Addr, len(texts))
	for i, text := range texts {
		list[i] = netip.MustParseAddr(text)
	}
	return list
}

// TestLoopbackClosed: without --host-loopback nothing that listens on the
// host, on any of its addresses, hears from the guest.
func TestLoopbackClosed(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		port := startCanary(t, w).Port
		a := w.attach(t)
		var requests []rig.DialRequest
		for _, addr := range spellings(w) {
			for _, network := range []string{"tcp", "udp"} {
				requests = append(requests, rig.DialRequest{Network: network, Addr: at(addr, port), Timeout: 2 * time.Second})
			}
		}
		for i, r := range rig.Dials.On(t, w.Guest, requests) {
			if r.Errno == 0 && !r.Timeout && requests[i].Network == "tcp" || r.Text == "canary" {
				t.Errorf("%s %s: %v, want it closed", requests[i].Network, requests[i].Addr, r)
			}
		}
		wantQuiet(t, w, "dialled")
		answers := rig.SendFrames.On(t, w.Guest, rig.Frames{
			Interface: "tap0", Gateway: w.Gateway4,
			Source4: w.Guest4, Source6: w.Guest6,
			Destinations: rawSpellings(w), Port: uint16(port),
		})
		for _, answer := range answers {
			// The internet may answer for addresses that are nobody's here.
			kind, from, _ := strings.Cut(answer, " from ")
			if addr := netip.MustParseAddr(from); kind != "echo reply" || meansHost(addr) {
				t.Errorf("raw frames: %s", answer)
			}
		}
		wantQuiet(t, w, "sent in raw frames")
		select {
		case <-a.Done():
			t.Error("usernet has ended")
		default:
		}
	})
}

// TestLoopbackOpen: --host-loopback opens the host's loopback at the gateway's
// addresses.
func TestLoopbackOpen(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		port := startCanary(t, w).Port
		w.attach(t, "--host-loopback")
		for _, addr := range []netip.Addr{w.Gateway4, w.Gateway6} {
			for _, network := range []string{"tcp", "udp"} {
				r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: network, Addr: at(addr, port), Timeout: 3 * time.Second})
				if r.Errno != 0 || r.Timeout || network == "udp" && r.Text != "canary" {
					t.Errorf("%s %v: %v, want it open", network, addr, r)
				}
			}
		}
		var hits []string
		if !rig.Poll(3*time.Second, func() bool {
			hits = append(hits, rig.CanaryHits.On(t, w.Host, struct{}{})...)
			return len(hits) >= 4
		}) {
			t.Errorf("the host heard %q, want 4 visitors", hits)
		}
	})
}

// TestHostPort: --host-port opens that port and no other.
func TestHostPort(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		open := startCanary(t, w).Port
		closed := rig.StartCanary.On(t, w.Host, rig.Canary{}).Port
		w.attach(t, "--host-port", itoa(open))
		for _, addr := range []netip.Addr{w.Gateway4, w.Gateway6} {
			for _, network := range []string{"tcp", "udp"} {
				r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: network, Addr: at(addr, open), Timeout: 3 * time.Second})
				if r.Errno != 0 || r.Timeout {
					t.Errorf("%s %v, open port: %v", network, addr, r)
				}
				r = rig.Dial.On(t, w.Guest, rig.DialRequest{Network: network, Addr: at(addr, closed), Timeout: 2 * time.Second})
				if r.Errno == 0 && !r.Timeout {
					t.Errorf("%s %v, closed port: %v", network, addr, r)
				}
			}
		}
	})
}

// startCanary starts the canary on the host and sees that it is alive.
func startCanary(t *testing.T, w *world) rig.Canary {
	t.Helper()
	c := rig.StartCanary.On(t, w.Host, rig.Canary{})
	for _, addr := range addrs("127.0.0.1", "127.9.9.9", "::1", rig.Host4.String(), rig.Host6.String()) {
		for _, network := range []string{"tcp", "udp"} {
			r := rig.Dial.On(t, w.User, rig.DialRequest{Network: network, Addr: at(addr, c.Port), Timeout: 2 * time.Second})
			if r.Errno != 0 || r.Timeout {
				t.Fatalf("the canary is not at %s %v: %v", network, addr, r)
			}
		}
	}
	// A connection is counted some time after it is made.
	var hits []string
	if !rig.Poll(5*time.Second, func() bool {
		hits = append(hits, rig.CanaryHits.On(t, w.Host, struct{}{})...)
		return len(hits) >= 10
	}) {
		t.Fatalf("the canary counted %q, want 10 visitors", hits)
	}
	return c
}

// wantQuiet checks that the canary has not been reached.
func wantQuiet(t *testing.T, w *world, how string) {
	t.Helper()
	for _, hit := range rig.CanaryHits.On(t, w.Host, struct{}{}) {
		t.Errorf("%s: the host's listener was reached: %s", how, hit)
	}
}

// TestReverse: a port of the gateway leads to one server of the host, on the
// loopback or a unix socket; the loopback itself stays closed, and deny rules
// hold.
func TestReverse(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "socat")
	w := onTap(t)
	whoami := w.User.ServeOn(t, true, "127.0.0.1").Whoami
	dir := shortDir(t)
	socket := filepath.Join(dir, "socket")
	w.User.Exec(t, rig.Command{Args: []string{"socat", "UNIX-LISTEN:" + socket + ",fork,unlink-early", "SYSTEM:echo over a unix socket"}})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	w.attach(t, "--reverse", fmt.Sprintf("4000:%d", whoami), "--reverse", "4001:unix:"+socket,
		"--reverse", "4002:unix:"+dir+"/nobody", "--reverse", fmt.Sprintf("4003:127.0.0.2:%d", whoami),
		"--deny", "127.0.0.2/32")
	families(t, func(t *testing.T, six bool) {
		gateway := pick(six, netip.MustParseAddr("10.0.2.2"), netip.MustParseAddr("fd75:736e:6574::2"))
		ask := func(port int) rig.DialResult {
			return rig.ReadAll.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: at(gateway, port)})
		}
		if r := ask(4000); !strings.HasPrefix(r.Text, "127.0.0.1:") {
			t.Errorf("the server on the loopback: %v", r)
		}
		if r := ask(4001); r.Text != "over a unix socket\n" {
			t.Errorf("the server on a unix socket: %v", r)
		}
		if r := ask(4002); r.Errno != syscall.ECONNREFUSED {
			t.Errorf("a unix socket that is not there: %v, want a refusal", r)
		}
		for _, port := range []int{4003, whoami} {
			if r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: at(gateway, port)}); r.Errno == 0 {
				t.Errorf("port %d is closed, yet: %v", port, r)
			}
		}
	})
}
