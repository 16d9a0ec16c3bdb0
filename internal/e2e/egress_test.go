package e2e

import (
	"net/netip"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// denied are addresses where clouds serve credentials. The rig's internet
// answers there as everywhere.
var denied = addrs("169.254.169.254", "169.254.170.2", "169.254.42.42", "fd00:ec2::254")

// TestMetadataDenied: what a guest has no business with is closed by default,
// at once rather than silently, and can be opened by name.
func TestMetadataDenied(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		for _, a := range denied {
			r := rig.Dial.On(t, w.User, rig.DialRequest{Network: "tcp", Addr: at(a, rig.Services.Echo), Timeout: 3 * time.Second})
			if r.Errno != 0 || r.Timeout {
				t.Fatalf("%v is not served: %v", a, r)
			}
		}
		w.attach(t)
		for _, a := range denied {
			for _, network := range []string{"tcp", "udp"} {
				// An ICMP error that comes while connect still holds the
				// socket counts only when it comes again, with the next
				// SYN a second later (tcp_v4_err in net/ipv4/tcp_ipv4.c).
				r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: network, Addr: at(a, rig.Services.Echo), Timeout: 10 * time.Second})
				if r.Errno == 0 || r.Timeout {
					t.Errorf("%s %v: %v after %v, want an error", network, a, r, r.Took)
				}
			}
		}
		guest := w.Net.Guest(t)
		w.Attach(t, guest, append([]string{"--allow", "169.254.169.254/32", "--allow", "0.0.0.0/0"}, w.flags...)...)
		for a, open := range map[netip.Addr]bool{denied[0]: true, rig.Web4: true, denied[1]: false} {
			r := rig.Dial.On(t, guest, rig.DialRequest{Network: "tcp", Addr: at(a, rig.Services.Echo), Timeout: 3 * time.Second})
			if got := r.Errno == 0 && !r.Timeout; got != open {
				t.Errorf("%v with --allow 169.254.169.254/32: %v, want open: %v", a, r, open)
			}
		}
	})
}

// TestDeny: --deny closes a network and a port, and nothing else.
func TestDeny(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	w.attach(t, "--deny", "198.51.100.0/24", "--deny", "192.0.2.0/24:7/tcp")
	for addr, open := range map[string]bool{
		"198.51.100.9:7":    false,
		"198.51.101.9:7":    true,
		"192.0.2.9:7":       false,
		"192.0.2.9:7002":    true,
		"[2001:db8:1::7]:7": true,
	} {
		r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: addr, Timeout: 3 * time.Second})
		if got := r.Errno == 0 && !r.Timeout; got != open {
			t.Errorf("tcp %s: %v, want open: %v", addr, r, open)
		}
	}
	if r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "udp", Addr: "192.0.2.9:7", Timeout: 3 * time.Second}); r.Errno != 0 || r.Timeout {
		t.Errorf("udp 192.0.2.9:7: %v, want it open", r)
	}
}
