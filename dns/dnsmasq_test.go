package dns

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// dig asks addr with dig and returns what it prints without the lines that
// differ from one asking to the next.
func dig(t *testing.T, addr netip.AddrPort, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("dig")
	if err != nil {
		if os.Getenv("USERNET_REQUIRE_NETNS") != "" {
			t.Fatal("dig is not installed")
		}
		t.Skip("dig is not installed")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	args = append([]string{"-r", "@" + addr.Addr().String(), "-p", strconv.Itoa(int(addr.Port())), "+tries=1", "+timeout=8"}, args...)
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		t.Errorf("dig %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return changing.ReplaceAllString(string(out), "")
}

var changing = regexp.MustCompile(`(?m)^;; (Query time|SERVER|WHEN|MSG SIZE).*\n|^; <<>>.*\n|, id: \d+|^; \(1 server found\)\n|^; COOKIE: .*\n`)

// TestDig holds that dig sees the same through the server as directly, from a
// real resolver, for all kinds of records and options, asked twice: from the
// upstream, and from the cache where there is one.
func TestDig(t *testing.T) {
	var hosts strings.Builder
	for i := range 300 {
		fmt.Fprintf(&hosts, "10.1.%d.%d many.example.org\n", i/250, i%250)
	}
	file := filepath.Join(t.TempDir(), "hosts")
	write(t, file, hosts.String())
	long := strings.Repeat("x", 250)
	// TTLs do not run down in dnsmasq's own records.
	up := startDnsmasq(t,
		"--local-ttl=0", "--addn-hosts="+file, "--domain=example.org",
		"--host-record=www.example.org,192.0.2.1,2001:db8::1",
		"--cname=alias.example.org,www.example.org",
		"--mx-host=example.org,mail.example.org,10",
		"--srv-host=_sip._tcp.example.org,www.example.org,5060,1,2",
		"--txt-record=txt.example.org,one,two",
		"--txt-record=long.example.org,"+strings.TrimSuffix(strings.Repeat(long+",", 16), ","),
		"--ptr-record=1.2.0.192.in-addr.arpa,www.example.org",
		"--naptr-record=naptr.example.org,100,10,s,http,,_http._tcp.example.org",
		"--caa-record=example.org,0,issue,ca.example.net",
		"--dns-rr=raw.example.org,65280,01:23:ab",
		"--dns-rr=svc.example.org,65,0001000001000302683200",
		"--auth-server=ns.example.net,lo", "--auth-zone=zone.example.net,127.0.0.0/8",
		"--local=/example.org/",
	)
	_, addr := start(t, Config{Upstreams: []netip.AddrPort{up}})
	for _, args := range []string{
		"www.example.org A", "www.example.org AAAA", "alias.example.org A", "alias.example.org CNAME",
		"example.org MX", "_sip._tcp.example.org SRV", "txt.example.org TXT",
		"long.example.org TXT", "long.example.org TXT +bufsize=4096", "long.example.org TXT +tcp", "long.example.org TXT +noedns",
		"many.example.org A +bufsize=512", "many.example.org A +bufsize=1232", "many.example.org A +tcp",
		"many.example.org A +ignore +bufsize=1232", "many.example.org A +ignore +noedns",
		"-x 192.0.2.1", "naptr.example.org NAPTR", "example.org CAA", "raw.example.org TYPE65280", "svc.example.org HTTPS",
		"www.example.org ANY +notcp", "www.example.org ANY", "www.example.org MX", "nothing.example.org A",
		"version.bind CH TXT", "www.example.org A +dnssec", "www.example.org A +cdflag", "www.example.org A +noad",
		"www.example.org A +norec", "www.example.org A +nocookie", "www.example.org A +subnet=192.0.2.0/24",
		"www.example.org A +ednsopt=65001:abcd", "www.example.org A +edns=1 +noednsneg", "www.example.org A +noedns",
		"WwW.eXample.ORG A", "www.example.org A +tcp", "www.elsewhere.net A", "zone.example.net SOA",
		"www.example.org A +nsid +expire",
	} {
		t.Run(args, func(t *testing.T) {
			want := dig(t, up, strings.Fields(args)...)
			for range 2 {
				got := dig(t, addr, strings.Fields(args)...)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("dig %s (-directly +through):\n%s", args, diff)
				}
			}
		})
	}
}

// TestDigLocal holds what dig makes of our own answers.
func TestDigLocal(t *testing.T) {
	_, addr := start(t, Config{
		Records: map[string][]netip.Addr{"host.usernet.internal": addrs("10.0.2.2", "fd75:736e:6574::2")},
	})
	for args, want := range map[string]string{
		"host.usernet.internal A +short":              "10.0.2.2\n",
		"host.usernet.internal AAAA +short":           "fd75:736e:6574::2\n",
		"host.usernet.internal MX +short":             "",
		"-x 10.0.2.2 +short":                          "host.usernet.internal.\n",
		"-x fd75:736e:6574::2 +short":                 "host.usernet.internal.\n",
		"host.usernet.internal A +tcp +short +dnssec": "10.0.2.2\n",
	} {
		if got := dig(t, addr, strings.Fields(args)...); got != want {
			t.Errorf("dig %s: %q, want %q", args, got, want)
		}
	}
	out := dig(t, addr, "example.org", "A")
	if !strings.Contains(out, "status: SERVFAIL") || !strings.Contains(out, "EDE: 14") {
		t.Errorf("without upstreams dig says:\n%s", out)
	}
	for _, warning := range []string{"Warning", "WARNING", "malformed", "unexpected"} {
		if out := dig(t, addr, "host.usernet.internal", "A"); strings.Contains(out, warning) {
			t.Errorf("dig warns:\n%s", out)
		}
	}
}
