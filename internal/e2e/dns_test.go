package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// startDNS runs dnsmasq in a node, on one address of that node.
func startDNS(t *testing.T, n *rig.Node, addr string, flags ...string) *rig.Proc {
	t.Helper()
	rig.NeedTools(t, "dnsmasq", "dig")
	// An address that is local by a route alone is not one to dnsmasq.
	if !strings.HasPrefix(addr, "127.") {
		n.Must(t, "ip", "addr", "replace", addr, "dev", "lo")
	}
	args := []string{
		"dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--group=",
		"--pid-file=", "--log-facility=-", "--log-queries", "--cache-size=0",
		"--bind-interfaces", "--listen-address=" + addr, "--local-ttl=1", "--edns-packet-max=4096",
	}
	p := n.Exec(t, rig.Command{Args: append(args, flags...)})
	p.WaitOutput(t, "started", 5*time.Second)
	return p
}

// dig asks server, and returns the answer section's data, sorted, and the
// whole text.
func dig(t *testing.T, n *rig.Node, server netip.Addr, args ...string) (answers []string, text string) {
	t.Helper()
	args = append([]string{"dig", "@" + server.String(), "+time=3", "+tries=2", "+noadditional", "+noauthority"}, args...)
	text = n.Run(t, args...).Stdout
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) >= 5 && !strings.HasPrefix(line, ";") {
			answers = append(answers, strings.Join(fields[4:], " "))
		}
	}
	slices.Sort(answers)
	return answers, text
}

// status finds "NXDOMAIN" and its like in dig's text.
func status(text string) string {
	_, rest, _ := strings.Cut(text, "status: ")
	s, _, _ := strings.Cut(rest, ",")
	return s
}

// bigTXT makes a TXT record of about 20 KiB, which UDP cannot carry.
func bigTXT(name string) (flag string, length int) {
	piece := strings.Repeat("x", 250)
	flag = "--txt-record=" + name
	for range 80 {
		flag += "," + piece
		length += len(piece)
	}
	return flag, length
}

// TestDNS: names are answered over UDP and TCP on both DNS addresses, as the
// host's resolver answers them.
func TestDNS(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		txt, length := bigTXT("big.example.test")
		startDNS(t, w.Internet, rig.Web4.String(), txt,
			"--host-record=www.example.test,198.51.100.80,2001:db8:80::1",
			"--host-record=v4.example.test,198.51.100.81",
			"--cname=alias.example.test,www.example.test",
			"--mx-host=example.test,mail.example.test,10",
			"--srv-host=_x._tcp.example.test,www.example.test,80",
			"--txt-record=short.example.test,hello world",
			"--caa-record=example.test,0,issue,ca.example.test",
			"--dns-rr=example.test,65,000100",
			"--local=/example.test/", "--auth-ttl=60")
		w.attach(t)
		servers := []netip.Addr{w.DNS4, w.DNS6}
		if w.Name == "kernel" {
			servers = []netip.Addr{rig.Web4}
		}
		for _, server := range servers {
			t.Run(server.String(), func(t *testing.T) {
				for _, transport := range []string{"+notcp", "+tcp"} {
					for question, want := range map[string]string{
						"www.example.test A":              "198.51.100.80",
						"www.example.test AAAA":           "2001:db8:80::1",
						"WWW.Example.TEST A":              "198.51.100.80",
						"alias.example.test A":            "198.51.100.80 www.example.test.",
						"example.test MX":                 "10 mail.example.test.",
						"_x._tcp.example.test SRV":        "0 0 80 www.example.test.",
						"short.example.test TXT":          `"hello world"`,
						"example.test CAA":                `0 issue "ca.example.test"`,
						"example.test TYPE65":             "1 .",
						"80.100.51.198.in-addr.arpa. PTR": "www.example.test.",
						"v4.example.test AAAA":            "",
					} {
						got, text := dig(t, w.Guest, server, append(strings.Fields(question), transport)...)
						if strings.Join(got, " ") != want || status(text) != "NOERROR" {
							t.Errorf("%s %s: got %q, %s, want %q", question, transport, got, status(text), want)
						}
					}
					if _, text := dig(t, w.Guest, server, "missing.example.test", transport); status(text) != "NXDOMAIN" {
						t.Errorf("missing name %s: %s, want NXDOMAIN", transport, status(text))
					}
				}
				got, text := dig(t, w.Guest, server, "big.example.test", "TXT", "+bufsize=1232")
				if n := strings.Count(strings.Join(got, ""), "x"); n != length || !strings.Contains(text, "TCP") {
					t.Errorf("big TXT: %d bytes, want %d over TCP", n, length)
				}
				if _, text := dig(t, w.Guest, server, "big.example.test", "TXT", "+noedns", "+ignore"); !strings.Contains(text, " tc ") {
					t.Errorf("big TXT without EDNS is not marked as truncated:\n%s", text)
				}
			})
		}
	})
}

// TestDNSLocalNames: the names of DESIGN's table and those of --add-host are
// answered without asking anybody.
func TestDNSLocalNames(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	upstream := startDNS(t, w.Internet, rig.Web4.String(), "--host-record=www.example.test,198.51.100.80", "--address=/internal/192.0.2.66", "--local=/example.test/")
	w.attach(t, "--add-host", "db.example.test:192.0.2.5", "--add-host", "db.example.test:2001:db8::5", "--add-host", "four.example.test:192.0.2.4")
	for question, want := range map[string]string{
		"host.usernet.internal A":       w.Gateway4.String(),
		"host.usernet.internal AAAA":    w.Gateway6.String(),
		"host.containers.internal A":    w.Gateway4.String(),
		"host.docker.internal A":        w.Gateway4.String(),
		"HOST.Docker.Internal A":        w.Gateway4.String(),
		"gateway.usernet.internal A":    w.Gateway4.String(),
		"gateway.usernet.internal AAAA": w.Gateway6.String(),
		"host.usernet.internal TXT":     "",
		"db.example.test A":             "192.0.2.5",
		"db.example.test AAAA":          "2001:db8::5",
		"four.example.test A":           "192.0.2.4",
		"four.example.test AAAA":        "",
		"five.example.test A":           "NXDOMAIN",
	} {
		got, text := dig(t, w.Guest, w.DNS4, strings.Fields(question)...)
		answer := strings.Join(got, " ")
		if status(text) != "NOERROR" {
			answer = status(text)
		}
		if answer != want {
			t.Errorf("%s: got %q, want %q", question, answer, want)
		}
	}
	if got, _ := dig(t, w.Guest, w.DNS4, "-x", "192.0.2.5"); !slices.Equal(got, []string{"db.example.test."}) {
		t.Errorf("PTR of 192.0.2.5: %q", got)
	}
	if log := upstream.Stdout() + upstream.Stderr(); strings.Contains(log, "internal") || strings.Contains(log, " db.example") || strings.Contains(log, "four.example") {
		t.Errorf("the upstream was asked for local names:\n%s", log)
	}
	// As programs resolve.
	if got := w.Guest.Must(t, "getent", "ahostsv4", "host.docker.internal"); !strings.Contains(got, w.Gateway4.String()) {
		t.Errorf("getent: %q", got)
	}
}

// TestDNSFollowsResolvConf: the servers in the host's resolv.conf are asked,
// also after it has changed, however it was changed.
func TestDNSFollowsResolvConf(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	servers := []string{"198.51.100.51", "198.51.100.52", "198.51.100.53", "2001:db8:53::1", "198.51.100.54"}
	for i, server := range servers {
		startDNS(t, w.Internet, server, fmt.Sprintf("--address=/who.test/192.0.2.%d", i))
	}
	// A resolver of the host's own, as systemd-resolved is one.
	startDNS(t, w.Host, "127.0.0.53", "--address=/who.test/192.0.2.5")
	conf := func(server string) string {
		return "# comment\nsearch example.test\nnameserver " + server + "\noptions ndots:1\n"
	}
	w.Host.WriteEtc(t, "resolv.conf", conf(servers[0]))
	w.attach(t)
	steps := []struct {
		how    string
		change func()
	}{
		{"as it was at the start", func() {}},
		{"replaced by rename", func() { w.Host.WriteEtc(t, "resolv.conf", conf(servers[1])) }},
		{"rewritten in place", func() {
			w.Host.Must(t, "sh", "-c", "printf '"+strings.ReplaceAll(conf(servers[2]), "\n", `\n`)+"' > /etc/resolv.conf")
		}},
		{"replaced by a link", func() {
			w.Host.Must(t, "sh", "-c", "printf 'nameserver "+servers[3]+"\\n' > /run/a.conf && ln -sf /run/a.conf /etc/resolv.conf")
		}},
		{"the link's target replaced", func() {
			w.Host.Must(t, "sh", "-c", "printf 'nameserver "+servers[4]+"\\n' > /run/b.conf && mv /run/b.conf /run/a.conf")
		}},
		{"removed, and back with a resolver on the host's loopback", func() {
			w.Host.Must(t, "rm", "/etc/resolv.conf")
			time.Sleep(100 * time.Millisecond)
			w.Host.WriteEtc(t, "resolv.conf", conf("127.0.0.53"))
		}},
	}
	for i, step := range steps {
		step.change()
		want := fmt.Sprintf("192.0.2.%d", i)
		start := time.Now()
		var got []string
		if !rig.Poll(5*time.Second, func() bool {
			// A name of its own each time: no cache may know it.
			got, _ = dig(t, w.Guest, w.DNS4, fmt.Sprintf("n%d.who.test", time.Now().UnixNano()))
			return slices.Equal(got, []string{want})
		}) {
			t.Errorf("resolv.conf %s: got %q, want %s", step.how, got, want)
		}
		t.Logf("resolv.conf %s: followed after %v", step.how, time.Since(start))
	}
}

// TestDNSFailure: no answer from outside is a SERVFAIL inside, in time, and one
// working server is enough.
func TestDNSFailure(t *testing.T) {
	rig.NeedUsernet(t)
	tests := []struct {
		name    string
		servers []netip.Addr
		want    string
		within  time.Duration
	}{
		{"refused", []netip.Addr{rig.Web6}, "SERVFAIL", 10 * time.Second},
		{"silent", []netip.Addr{rig.Blackhole4}, "SERVFAIL", 10 * time.Second},
		{"unreachable from the host", []netip.Addr{rig.HostNoRoute4, rig.HostNoRoute6}, "SERVFAIL", 10 * time.Second},
		{"the first of two silent", []netip.Addr{rig.Blackhole4, rig.Web4}, "NOERROR", 4 * time.Second},
		{"the first of two refused", []netip.Addr{rig.Web6, rig.Web4}, "NOERROR", 4 * time.Second},
	}
	t.Parallel()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := onTap(t)
			startDNS(t, w.Internet, rig.Web4.String(), "--address=/who.test/192.0.2.1")
			var flags []string
			for _, s := range tt.servers {
				flags = append(flags, "--dns", s.String())
			}
			w.attach(t, flags...)
			for _, transport := range []string{"+notcp", "+tcp"} {
				start := time.Now()
				_, text := dig(t, w.Guest, w.DNS4, "x.who.test", "+time=20", "+tries=1", transport)
				if took := time.Since(start); status(text) != tt.want || took > tt.within {
					t.Errorf("%s: %q after %v, want %s within %v", transport, status(text), took, tt.want, tt.within)
				}
			}
		})
	}
}

// TestDNSAddressHasOnePort: the DNS address is nothing but a DNS server.
func TestDNSAddressHasOnePort(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		port := startCanary(t, w).Port
		startDNS(t, w.Internet, rig.Web4.String(), "--address=/who.test/192.0.2.1")
		w.attach(t, "--host-loopback")
		for _, a := range []netip.Addr{w.DNS4, w.DNS6} {
			for _, p := range []int{port, 80, 5353, rig.Services.Echo} {
				for _, network := range []string{"tcp", "udp"} {
					r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: network, Addr: at(a, p), Timeout: 2 * time.Second})
					if r.Errno == 0 && !r.Timeout {
						t.Errorf("%s %s: %v", network, at(a, p), r)
					}
				}
			}
		}
		wantQuiet(t, w, "asked the DNS address")
	})
}

// TestNoDNS: with --no-dns the DNS address is not there.
func TestNoDNS(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	startDNS(t, w.Internet, rig.Web4.String(), "--address=/who.test/192.0.2.1")
	w.attach(t, "--no-dns")
	for _, transport := range []string{"+notcp", "+tcp"} {
		if _, text := dig(t, w.Guest, w.DNS4, "x.who.test", "+time=1", "+tries=1", transport); status(text) != "" {
			t.Errorf("%s was answered:\n%s", transport, text)
		}
	}
}
