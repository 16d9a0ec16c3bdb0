package e2e

import (
	"encoding/json"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// reach tells whether the guest gets through to an address.
func reach(t *testing.T, w *world, network, addr string) bool {
	t.Helper()
	r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: network, Addr: addr, Timeout: 10 * time.Second})
	if r.Timeout {
		t.Errorf("%s %s: no answer at all", network, addr)
	}
	return r.Errno == 0 && !r.Timeout
}

// TestAllowName: the guest reaches the addresses that it was told for a name
// that is allowed, at the ports that are, and nothing else.
func TestAllowName(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ping")
	w := onTap(t)
	startDNS(t, w.Internet, rig.Web4.String(),
		"--host-record=api.example.test,198.51.100.80,2001:db8:80::1",
		"--host-record=other.example.test,198.51.100.81",
		"--cname=alias.example.test,other.example.test",
		"--host-record=wild.test,198.51.100.90", "--host-record=a.b.wild.test,198.51.100.91",
		"--host-record=metadata.wild.test,169.254.169.254",
		"--host-record=loop.wild.test,127.0.0.1",
		"--host-record=denied.wild.test,203.0.113.50")
	w.attach(t, "--dns", rig.Web4.String(),
		"--allow-name", "API.example.test.:7", "--allow-name", "alias.example.test", "--allow-name", "*.wild.test", "--allow-name", "local.test",
		"--allow", "192.0.2.0/24", "--deny", "203.0.113.0/24", "--add-host", "local.test:198.51.100.99")
	look := func(name, kind, want string) {
		t.Helper()
		if got, _ := dig(t, w.Guest, w.DNS4, name, kind); !strings.Contains(strings.Join(got, " "), want) {
			t.Errorf("%s %s: %q", name, kind, got)
		}
	}
	check := func(when string, want map[string]bool) {
		t.Helper()
		for dst, open := range want {
			network, addr, _ := strings.Cut(dst, " ")
			if got := reach(t, w, network, addr); got != open {
				t.Errorf("%s: %s open: %v, want %v", when, dst, got, open)
			}
		}
	}
	check("before any question", map[string]bool{
		"tcp 198.51.100.80:7": false, "udp 198.51.100.80:7": false, "tcp [2001:db8:80::1]:7": false, "tcp 192.0.2.5:7": true,
		"udp 198.51.100.7:53": false, // no way round our DNS server
	})
	look("api.example.test", "A", "198.51.100.80")
	check("after A", map[string]bool{
		"tcp 198.51.100.80:7": true, "udp 198.51.100.80:7": true, "tcp 198.51.100.80:7002": false,
		"tcp [2001:db8:80::1]:7": false, "tcp 198.51.100.81:7": false,
	})
	look("api.example.test", "AAAA", "2001:db8:80::1")
	check("after AAAA", map[string]bool{"tcp [2001:db8:80::1]:7": true, "udp [2001:db8:80::1]:7": true})
	if out := w.Guest.Run(t, "ping", "-c", "1", "-W", "3", "198.51.100.80"); out.Code == 0 {
		t.Error("ping to a name that is allowed at a port")
	}

	look("other.example.test", "A", "198.51.100.81")
	check("after the target of an alias", map[string]bool{"tcp 198.51.100.81:7": false})
	look("alias.example.test", "A", "198.51.100.81")
	check("after the alias", map[string]bool{"tcp 198.51.100.81:7": true, "tcp 198.51.100.81:7002": true})
	w.Guest.Must(t, "ping", "-c", "1", "-W", "3", "198.51.100.81")

	look("wild.test", "A", "198.51.100.90")
	look("a.b.wild.test", "A", "198.51.100.91")
	check("below a wildcard", map[string]bool{"tcp 198.51.100.90:7": false, "tcp 198.51.100.91:7": true})

	look("metadata.wild.test", "A", "169.254.169.254")
	look("loop.wild.test", "A", "127.0.0.1")
	look("denied.wild.test", "A", "203.0.113.50")
	look("local.test", "A", "198.51.100.99")
	check("what a name does not open", map[string]bool{
		"tcp 169.254.169.254:7": false, "tcp " + at(w.Gateway4, 7): false, "tcp 203.0.113.50:7": false, "tcp 198.51.100.99:7": true,
	})

	killWorker(t, w, syscall.SIGKILL)
	check("by the next worker", map[string]bool{
		"tcp 198.51.100.80:7": true, "tcp 198.51.100.80:7002": false, "tcp [2001:db8:80::1]:7": true,
		"tcp 198.51.100.90:7": false, "tcp 198.51.100.91:7": true, "tcp 203.0.113.50:7": false,
	})
}

// denials are the counters of what the policy has closed.
func denials(t *testing.T, w *world) map[string]int {
	t.Helper()
	var s struct{ Denied map[string]int }
	if err := json.Unmarshal([]byte(mustCtl(t, w, "stats", "--json")), &s); err != nil {
		t.Fatal(err)
	}
	return s.Denied
}

// TestDenialsAreTold: each denial is counted by its reason, in the statistics and
// the metrics, and the log names destination and rule, a few times a minute.
func TestDenialsAreTold(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	a := w.attach(t, "--log-level", "info", "--deny", "203.0.113.0/24", "--deny", "198.51.100.0/24:9/tcp", "--allow", "0.0.0.0/0")
	before := denials(t, w)
	for dst, reason := range map[string]string{
		"203.0.113.77:80":             "rule",
		"198.51.100.7:9":              "rule",
		"169.254.169.254:80":          "metadata",
		at(w.Gateway4, 22):            "host",
		"[2001:db8:1::7]:7":           "unlisted",
		"10.0.2.77:80":                "",
		"[fd75:736e:6574::1:77]:1234": "",
	} {
		rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: dst, Timeout: 2 * time.Second})
		now := denials(t, w)
		if reason != "" && now[reason] <= before[reason] {
			t.Errorf("%s: not counted as %q: %v, before %v", dst, reason, now, before)
		}
		before = now
	}
	for _, line := range [][]string{
		{"dst=203.0.113.77:80", `why="deny 203.0.113.0/24"`},
		{"dst=198.51.100.7:9", `why="deny 198.51.100.0/24:9/tcp"`},
		{"dst=169.254.169.254:80", "metadata"},
		{"dst=10.0.2.2:22", "address=127.0.0.1:22", "the host is closed"},
		{"dst=[2001:db8:1::7]:7", "no allow rule"},
	} {
		found := false
		for l := range strings.Lines(a.Stderr()) {
			all := strings.Contains(l, "denied")
			for _, word := range line {
				all = all && strings.Contains(l, word)
			}
			found = found || all
		}
		if !found {
			t.Errorf("no line of the log has %q:\n%s", line, a.Stderr())
		}
	}
	// However many more, the log stays short and the counts are exact.
	var many []rig.DialRequest
	for i := range 200 {
		dst := netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i%100)})
		many = append(many, rig.DialRequest{Network: "tcp", Addr: at(dst, 1000+i), Timeout: 5 * time.Second})
	}
	rig.Dials.On(t, w.Guest, many)
	if now := denials(t, w); now["rule"] < before["rule"]+200 {
		t.Errorf("%d denials counted for 200 connections", now["rule"]-before["rule"])
	}
	if n := strings.Count(a.Stderr(), "msg=denied"); n < 5 || n > 40 {
		t.Errorf("%d lines in the log", n)
	}
	metrics := w.User.Must(t, "sh", "-c", "curl -sf --unix-socket /run/user/1000/usernet/*.sock http://usernet/metrics")
	if !strings.Contains(metrics, "usernet_denied_total{reason=\"rule\"} ") {
		t.Errorf("metrics:\n%s", metrics)
	}
}

// TestRebindProtection: a name of the internet cannot lead the guest's programs
// into private networks, if that is asked for.
func TestRebindProtection(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	startDNS(t, w.Internet, rig.Web4.String(),
		"--host-record=good.example.test,198.51.100.80", "--host-record=rebind.example.test,10.1.2.3", "--host-record=six.example.test,fd00::1",
		"--host-record=loop.example.test,127.0.0.1", "--cname=alias.example.test,rebind.example.test")
	w.attach(t, "--dns", rig.Web4.String(), "--dns-rebind-protection", "--add-host", "local.test:10.1.2.3")
	for question, want := range map[string]string{
		"good.example.test A": "198.51.100.80", "rebind.example.test A": "", "six.example.test AAAA": "", "loop.example.test A": "",
		"alias.example.test A": "", "local.test A": "10.1.2.3", "host.docker.internal A": w.Gateway4.String(),
	} {
		for _, transport := range []string{"+notcp", "+tcp"} {
			got, text := dig(t, w.Guest, w.DNS4, append(strings.Fields(question), transport)...)
			if strings.Join(got, " ") != want || status(text) != "NOERROR" {
				t.Errorf("%s %s: %q, %s, want %q", question, transport, got, status(text), want)
			}
		}
	}
	if n := denials(t, w)["private_dns"]; n != 8 {
		t.Errorf("%d answers counted, want 8", n)
	}
	other := w.Net.Guest(t)
	w.Attach(t, other, append([]string{"--dns", rig.Web4.String(), "--api-socket", "none"}, w.flags...)...)
	if got, _ := dig(t, other, w.DNS4, "rebind.example.test", "A"); len(got) != 1 {
		t.Errorf("without protection: %q", got)
	}
}
