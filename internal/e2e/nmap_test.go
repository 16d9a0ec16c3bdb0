package e2e

import (
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// TestNmap: a scan of 200 ports, of which some are open, some closed, some
// rejected in several ways and some silent, gives the same from inside as from
// the host.
func TestNmap(t *testing.T) {
	rig.NeedTools(t, "nmap", "nft")
	eachLink(t, func(t *testing.T, w *world) {
		w.Host.Must(t, "sh", "-c", `ip netns exec router nft -f - <<'END'
table inet filter {
	chain forward {
		type filter hook forward priority filter;
		tcp dport 3020-3029 drop
		tcp dport 3040-3049 reject with icmpx host-unreachable
		tcp dport 3060-3069 reject with icmpx admin-prohibited
		tcp dport 3080-3089 reject with tcp reset
		tcp dport 3100-3109 reject with icmpx no-route
	}
}
END`)
		rig.ListenMany.On(t, w.Internet, rig.PortRange{First: 3000, Last: 3199, Step: 3})
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			direct := scan(t, w.User, six)
			inside := scan(t, w.Guest, six)
			if len(direct) != 200 {
				t.Fatalf("%d states from the host, want 200", len(direct))
			}
			counts := make(map[string]int)
			for port, want := range direct {
				counts[want]++
				got := inside[port]
				if got != want && strings.HasPrefix(got, "open") && !opens(t, w.Guest, six, port) {
					// nmap 7.93 sometimes takes an ICMP error that comes at once
					// for success, although no SYN-ACK has come.
					t.Logf("port %s is %q to nmap alone", port, got)
					continue
				}
				if got != want {
					t.Errorf("port %s is %q inside and %q outside", port, got, want)
				}
			}
			t.Logf("states: %v", counts)
		})
	})
}

// opens tells whether a port accepts one of several connections.
func opens(t *testing.T, n *rig.Node, six bool, port string) bool {
	t.Helper()
	addr := net.JoinHostPort(pick(six, rig.Web4, rig.Web6).String(), port)
	for range 5 {
		if r := rig.Dial.On(t, n, rig.DialRequest{Network: "tcp", Addr: addr, Timeout: 3 * time.Second}); r.Errno == 0 && !r.Timeout {
			return true
		}
	}
	return false
}

// scan returns nmap's state of every port, with the reason it gives.
func scan(t *testing.T, n *rig.Node, six bool) map[string]string {
	t.Helper()
	// An ICMP error may count only at the SYN's first retransmission, after a
	// second, as in TestTCPFailures.
	args := []string{
		"nmap", "-sT", "-Pn", "-n", "--unprivileged", "--max-retries", "1", "--min-parallelism", "100",
		"--initial-rtt-timeout", "1800ms", "--min-rtt-timeout", "1800ms", "--max-rtt-timeout", "2s",
		"--reason", "-p", "3000-3199", "-oX", "-",
	}
	if six {
		args = append(args, "-6")
	}
	args = append(args, fmt.Sprint(pick(six, rig.Web4, rig.Web6)))
	out := n.RunFor(t, 100*time.Second, args...).Stdout
	states := make(map[string]string)
	// Ports of a common state are folded into one element, unless there are
	// few of them: ask for the list in any case.
	for _, m := range regexp.MustCompile(`portid="(\d+)"><state state="([a-z|]+)" reason="([a-z-]+)"`).FindAllStringSubmatch(out, -1) {
		states[m[1]] = m[2] + " (" + m[3] + ")"
	}
	for _, m := range regexp.MustCompile(`<extraports state="([a-z|]+)" count="\d+">\s*((?:<extrareasons [^>]*>\s*)*)`).FindAllStringSubmatch(out, -1) {
		for _, r := range regexp.MustCompile(`reason="([a-z-]+)"[^>]*ports="([0-9,-]+)"`).FindAllStringSubmatch(m[2], -1) {
			for _, port := range ports(r[2]) {
				states[port] = m[1] + " (" + r[1] + ")"
			}
		}
	}
	return states
}

// ports expands "1-3,5".
func ports(list string) []string {
	var all []string
	for part := range strings.SplitSeq(list, ",") {
		first, last := 0, 0
		if n, _ := fmt.Sscanf(part, "%d-%d", &first, &last); n < 2 {
			last = first
		}
		for p := first; p <= last; p++ {
			all = append(all, itoa(p))
		}
	}
	return all
}
