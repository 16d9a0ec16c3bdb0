package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// BenchmarkHandle measures what a reader does between two system calls.
func BenchmarkHandle(b *testing.B) {
	for name, q := range map[string][]byte{
		"local":  ask("host.usernet.internal", dns.TypeA),
		"nodata": ask("host.usernet.internal", dns.TypeAAAA, withEDNS(1232, false)),
		"cached": ask("example.org", dns.TypeA, withEDNS(1232, false)),
	} {
		b.Run(name, func(b *testing.B) {
			s, w, c := handleSetup(b)
			b.ReportAllocs()
			for b.Loop() {
				s.handle(q, c, overUDP, w)
			}
		})
	}
}

// TestHandleAllocs holds the budget: what we know ourselves costs nothing.
func TestHandleAllocs(t *testing.T) {
	s, w, c := handleSetup(t)
	for name, q := range map[string][]byte{
		"local":   ask("Host.usernet.internal", dns.TypeA, withEDNS(1232, true)),
		"reverse": ask("2.2.0.10.in-addr.arpa", dns.TypePTR),
		"cached":  ask("EXAMPLE.org", dns.TypeA, withEDNS(1232, false)),
	} {
		if n := testing.AllocsPerRun(100, func() { s.handle(q, c, overUDP, w) }); n != 0 {
			t.Errorf("%s: handle allocates %v times, want 0", name, n)
		}
	}
}

// handleSetup returns a Server that runs nowhere and has a local name and a
// cached one.
func handleSetup(t testing.TB) (*Server, *scratch, client) {
	s, err := New(Config{
		ResolvConf: t.TempDir() + "/none",
		Records:    map[string][]netip.Addr{"host.usernet.internal": addrs("10.0.2.2")},
	})
	if err != nil {
		t.Fatal(err)
	}
	var q query
	msg := ask("example.org", dns.TypeA, withEDNS(1232, false))
	if q.parse(msg) != accept {
		t.Fatal("parse fails")
	}
	s.cache.put(string(q.key()), reply(msg, 0, "example.org. 300 IN A 192.0.2.1"), q.end, q.qtype, s.now())
	return s, &scratch{out: make([]byte, 0, maxMessage)}, client{conn: nowhere{}}
}

// nowhere is a PacketConn that takes everything.
type nowhere struct{ net.PacketConn }

func (nowhere) WriteTo(b []byte, _ net.Addr) (int, error) { return len(b), nil }

// BenchmarkDnsperf measures queries per second with dnsperf: of a dnsmasq,
// and of a Server that asks that dnsmasq, for names that may be cached, that
// may not (TTL 0), and that it knows itself. Give -benchtime=1x.
func BenchmarkDnsperf(b *testing.B) {
	if _, err := exec.LookPath("dnsperf"); err != nil {
		b.Skip("dnsperf is not installed")
	}
	const names = 1000
	var hosts, records []string
	local := make(map[string][]netip.Addr)
	for i := range names {
		hosts = append(hosts, fmt.Sprintf("192.0.2.%d n%d.example.org", i%250+1, i))
		records = append(records, fmt.Sprintf("n%d.example.org A", i))
		local[fmt.Sprintf("n%d.example.org", i)] = addrs("192.0.2.1")
	}
	dir := b.TempDir()
	write(b, filepath.Join(dir, "hosts"), strings.Join(hosts, "\n")+"\n")
	queries := filepath.Join(dir, "queries")
	write(b, queries, strings.Join(records, "\n")+"\n")
	cached := startDnsmasq(b, "--addn-hosts="+filepath.Join(dir, "hosts"), "--local-ttl=300")
	uncached := startDnsmasq(b, "--addn-hosts="+filepath.Join(dir, "hosts"), "--local-ttl=0")
	_, hit := start(b, Config{Upstreams: []netip.AddrPort{cached}})
	_, miss := start(b, Config{Upstreams: []netip.AddrPort{uncached}})
	_, own := start(b, Config{Upstreams: []netip.AddrPort{cached}, Records: local})
	for _, c := range []struct {
		name string
		addr netip.AddrPort
	}{{"dnsmasq", cached}, {"hit", hit}, {"miss", miss}, {"local", own}} {
		b.Run(c.name, func(b *testing.B) {
			var rate float64
			before := cpuTime(b)
			for b.Loop() {
				rate += dnsperf(b, c.addr, queries)
			}
			b.ReportMetric(rate/float64(b.N), "queries/s")
			// Ours, whatever else the machine does; of dnsmasq it is none.
			used := cpuTime(b) - before
			b.ReportMetric(used.Seconds()*1e6/(rate*dnsperfSeconds), "cpu-us/query")
		})
	}
}

// cpuTime returns what this process has used.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// dnsperfSeconds is how long one run of dnsperf takes.
const dnsperfSeconds = 3

var dnsperfRate = regexp.MustCompile(`Queries per second:\s+([0-9.]+)`)

func dnsperf(b *testing.B, addr netip.AddrPort, queries string) float64 {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "dnsperf", "-s", addr.Addr().String(), "-p", strconv.Itoa(int(addr.Port())),
		"-d", queries, "-l", strconv.Itoa(dnsperfSeconds), "-c", "4", "-q", "100").CombinedOutput()
	m := dnsperfRate.FindSubmatch(out)
	if err != nil || m == nil {
		b.Fatalf("dnsperf: %v\n%s", err, out)
	}
	if strings.Contains(string(out), "SERVFAIL") {
		b.Fatalf("dnsperf saw failures:\n%s", out)
	}
	rate, _ := strconv.ParseFloat(string(m[1]), 64)
	return rate
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// startDnsmasq runs a dnsmasq of our own on loopback that asks nobody.
func startDnsmasq(t testing.TB, flags ...string) netip.AddrPort {
	t.Helper()
	path, err := exec.LookPath("dnsmasq")
	if err != nil {
		if os.Getenv("USERNET_REQUIRE_NETNS") != "" {
			t.Fatal("dnsmasq is not installed")
		}
		t.Skip("dnsmasq is not installed")
	}
	pc, l := listenBoth(t)
	addr := addrPort(pc.LocalAddr())
	pc.Close()
	l.Close()
	args := append([]string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--no-daemon",
		"--listen-address=127.0.0.1", "--bind-interfaces", "--port=" + strconv.Itoa(int(addr.Port())),
		"--pid-file=", "--log-facility=-", "--cache-size=10000",
	}, flags...)
	cmd := exec.Command(path, args...)
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 100 {
		if c, err := net.DialTimeout("tcp", addr.String(), time.Second); err == nil {
			c.Close()
			return addr
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("dnsmasq does not start: %s", out.String())
	return addr
}
