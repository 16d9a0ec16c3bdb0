package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/usernet/usernet/internal/rig"
)

// pingFrom runs ping(8) and returns what it says.
func pingFrom(t *testing.T, n *rig.Node, args ...string) string {
	t.Helper()
	out := n.Run(t, append([]string{"ping", "-n", "-i", "0.2"}, args...)...)
	return out.Stdout + out.Stderr
}

// TestPing: echo requests of all sizes are answered by those they are for.
func TestPing(t *testing.T) {
	rig.NeedTools(t, "ping")
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			for _, to := range []string{
				pick(six, w.Gateway4, w.Gateway6).String(),
				pick(six, rig.Web4, rig.Web6).String(),
			} {
				for _, size := range []string{"0", "56", "1452", "1473", "9000", "65400"} {
					text := pingFrom(t, w.Guest, "-c", "2", "-W", "3", "-s", size, to)
					if w.Name == "kernel" && strings.Contains(text, "mtu") {
						text = pingFrom(t, w.Guest, "-c", "2", "-W", "3", "-s", size, to)
					}
					if !strings.Contains(text, " 0% packet loss") || strings.Contains(text, "wrong data byte") {
						t.Errorf("ping -s %s %s:\n%s", size, to, text)
					}
				}
			}
		})
	})
}

// TestPingFailures: an echo request that meets an error outside brings that
// error in, from the one who reported it.
func TestPingFailures(t *testing.T) {
	rig.NeedTools(t, "ping")
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			unreachable := pick(six, rig.Unreachable4, rig.Unreachable6).String()
			text := pingFrom(t, w.Guest, "-c", "3", "-i", "1", "-W", "2", unreachable)
			if !regexp.MustCompile(`(Destination Host Unreachable|No route)`).MatchString(text) {
				t.Errorf("ping %s:\n%s", unreachable, text)
			}
			if router := pick(six, rig.Router4, rig.Router6).String(); !strings.Contains(strings.ToLower(text), "from "+router) {
				t.Errorf("ping %s: the error is not from %s:\n%s", unreachable, router, text)
			}
			nobody := pick(six, rig.Blackhole4, rig.Blackhole6).String()
			if text := pingFrom(t, w.Guest, "-c", "2", "-W", "1", nobody); !strings.Contains(text, "100% packet loss") || strings.Contains(text, "nreachable") {
				t.Errorf("ping %s:\n%s", nobody, text)
			}
		})
	})
}

// TestPingTTL: counting the TTL up shows the gateway, then the host's router,
// then the destination, as traceroute does.
func TestPingTTL(t *testing.T) {
	rig.NeedTools(t, "ping")
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			to := pick(six, rig.Web4, rig.Web6).String()
			from := regexp.MustCompile(`(?i)from ([0-9a-f.:]+?):? icmp_seq=\d+ (time to live exceeded|time exceeded: hop limit)`)
			var hops []string
			for ttl := 1; ttl <= 5; ttl++ {
				text := pingFrom(t, w.Guest, "-c", "1", "-W", "3", "-t", fmt.Sprint(ttl), to)
				if strings.Contains(text, "bytes from "+to) {
					hops = append(hops, to)
					break
				}
				m := from.FindStringSubmatch(text)
				if m == nil {
					t.Fatalf("TTL %d: neither an answer nor an error:\n%s", ttl, text)
				}
				hops = append(hops, m[1])
			}
			want := fmt.Sprint([]string{
				pick(six, w.Gateway4, w.Gateway6).String(),
				pick(six, rig.Router4, rig.Router6).String(),
				to,
			})
			if got := fmt.Sprint(hops); got != want {
				t.Errorf("hops are %v, want %v", got, want)
			}
		})
	})
}

// TestPingForbidden: where the host does not let an ordinary user ping, the
// gateway answers for itself and nobody else, and the log says why.
func TestPingForbidden(t *testing.T) {
	rig.NeedTools(t, "ping")
	rig.NeedUsernet(t)
	t.Parallel()
	w := newWorld(t, rig.Options{NoPing: true})
	a := w.attach(t)
	families(t, func(t *testing.T, six bool) {
		gateway := pick(six, w.Gateway4, w.Gateway6).String()
		if text := pingFrom(t, w.Guest, "-c", "2", "-W", "3", gateway); !strings.Contains(text, " 0% packet loss") {
			t.Errorf("ping %s:\n%s", gateway, text)
		}
		to := pick(six, rig.Web4, rig.Web6).String()
		if text := pingFrom(t, w.Guest, "-c", "2", "-W", "1", to); strings.Contains(text, "bytes from "+to) {
			t.Errorf("ping %s was answered, by whom?\n%s", to, text)
		}
	})
	if got := strings.Count(a.Stderr(), "ping_group_range"); got != 1 {
		t.Errorf("the log has %d lines about ping_group_range, want 1:\n%s", got, a.Stderr())
	}
}
