package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestParseResolvConf(t *testing.T) {
	for name, c := range map[string]struct {
		text    string
		servers string
		search  string
	}{
		"plain":          {"nameserver 192.0.2.1\n", "192.0.2.1:53", ""},
		"stub":           {"nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n", "127.0.0.53:53", ""},
		"several":        {"nameserver 192.0.2.1\nnameserver 2001:db8::1\n", "192.0.2.1:53 [2001:db8::1]:53", ""},
		"more than 3":    {strings.Repeat("nameserver 192.0.2.1\n", 5) + "nameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n", "192.0.2.1:53 192.0.2.2:53 192.0.2.3:53 192.0.2.4:53", ""},
		"no newline":     {"nameserver 192.0.2.1", "192.0.2.1:53", ""},
		"CRLF":           {"nameserver 192.0.2.1\r\nsearch a.example b.example\r\n", "192.0.2.1:53", "a.example b.example"},
		"tabs, blanks":   {"  nameserver\t 192.0.2.1 \t\n\tsearch  \t a.example\t\tb.example  \n", "192.0.2.1:53", "a.example b.example"},
		"comments":       {"# nameserver 192.0.2.9\n; nameserver 192.0.2.8\nnameserver 192.0.2.1 # first\nsearch a # b\n", "192.0.2.1:53", "a"},
		"scope":          {"nameserver fe80::1%eth0\n", "[fe80::1%eth0]:53", ""},
		"mapped":         {"nameserver ::ffff:192.0.2.1\nnameserver 192.0.2.1\n", "192.0.2.1:53", ""},
		"unspecified":    {"nameserver 0.0.0.0\nnameserver ::\n", "127.0.0.1:53 [::1]:53", ""},
		"bad ones":       {"nameserver\nnameserver x\nnameserver 1.2.3\nnameserver 192.0.2.1:53\nnameserver [::1]\nnameserver 224.0.0.1\nnameservers 192.0.2.3\nnameserver 192.0.2.1\n", "192.0.2.1:53", ""},
		"last search":    {"search a b\ndomain c\n", "", "c"},
		"search options": {"options ndots:5\nsearch a.example. A.example bad..name " + strings.Repeat("x", 300) + "\n", "", "a.example A.example"},
		"many search":    {"search " + strings.Repeat("d ", 10) + manyDomains(100) + "\n", "", "d " + manyDomains(maxSearch-1)},
		"empty":          {"", "", ""},
		"NUL":            {"nameserver \x00\nnameserver 192.0.2.1\n\x00\x00", "192.0.2.1:53", ""},
		"one long line":  {"nameserver " + strings.Repeat("1", 1<<20), "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			rc := parseResolvConf([]byte(c.text))
			var servers []string
			for _, s := range rc.Servers {
				servers = append(servers, s.String())
			}
			if got := strings.Join(servers, " "); got != c.servers {
				t.Errorf("servers %q, want %q", got, c.servers)
			}
			if got := strings.Join(rc.Search, " "); got != c.search {
				t.Errorf("search %q, want %q", got, c.search)
			}
		})
	}
}

func manyDomains(n int) string {
	var s []string
	for i := range n {
		s = append(s, fmt.Sprintf("d%d.example", i))
	}
	return strings.Join(s, " ")
}

func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nsearch a b\noptions ndots:2\n"))
	f.Add([]byte("nameserver fe80::1%eth0\r\n# x\r\n\tdomain\ta.\r\n"))
	f.Add([]byte("nameserver ::ffff:1.2.3.4 # y\nsearch . ;\n\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		rc := parseResolvConf(b)
		if len(rc.Servers) > maxUpstreams || len(rc.Search) > maxSearch {
			t.Fatalf("%d servers, %d domains", len(rc.Servers), len(rc.Search))
		}
		text := ""
		for _, s := range rc.Servers {
			if !s.IsValid() || s.Addr().Is4In6() || s.Addr().IsUnspecified() {
				t.Fatalf("server %v", s)
			}
			text += "nameserver " + s.Addr().String() + "\n"
		}
		for _, d := range rc.Search {
			if _, err := wireName(d); err != nil {
				t.Fatal(err)
			}
		}
		text += "search " + strings.Join(rc.Search, " ") + "\n"
		// What was understood is understood again, written plainly. (A domain
		// may begin like a comment only behind another.)
		again := parseResolvConf([]byte(text))
		if !slices.Equal(again.Servers, rc.Servers) || !slices.Equal(again.Search, rc.Search) {
			t.Fatalf("%q gives %v, then %v", b, rc, again)
		}
	})
}

// follow starts a Server that follows path.
func follow(t *testing.T, path string) *Server {
	t.Helper()
	s, _ := start(t, Config{ResolvConf: path})
	return s
}

// expect waits until s uses the server 192.0.2.n, or none if n is 0.
func expect(t *testing.T, s *Server, step string, n int) {
	t.Helper()
	want := fmt.Sprintf("192.0.2.%d:53", n)
	if n == 0 {
		want = ""
	}
	var got string
	for begin := time.Now(); time.Since(begin) < time.Minute; time.Sleep(5 * time.Millisecond) {
		got = ""
		if u := s.Upstreams(); len(u) > 0 {
			got = u[0].String()
		}
		if got == want {
			return
		}
	}
	t.Errorf("%s: upstream %q, want %q", step, got, want)
}

// stays holds that s goes on using 192.0.2.n.
func stays(t *testing.T, s *Server, step string, n int) {
	t.Helper()
	time.Sleep(4 * settleTime)
	expect(t, s, step, n)
}

func conf(n int) string { return fmt.Sprintf("nameserver 192.0.2.%d\n", n) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFollowFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	write(t, path, conf(1))
	s := follow(t, path)
	expect(t, s, "at first", 1)

	write(t, path, conf(2))
	expect(t, s, "rewritten", 2)

	write(t, filepath.Join(dir, "tmp"), conf(3))
	must(t, os.Rename(filepath.Join(dir, "tmp"), path))
	expect(t, s, "replaced by rename", 3)

	must(t, os.Truncate(path, 0))
	stays(t, s, "truncated", 3)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	f.WriteString("# half a")
	stays(t, s, "half written", 3)
	f.WriteString(" comment\n" + conf(4))
	expect(t, s, "written", 4)
	f.Close()

	must(t, os.Remove(path))
	stays(t, s, "missing", 4)
	write(t, path, conf(5))
	expect(t, s, "back", 5)

	must(t, os.Remove(path))
	must(t, os.Mkdir(path, 0o755))
	stays(t, s, "a directory", 5)
	must(t, os.Remove(path))
	must(t, syscall.Mkfifo(path, 0o644))
	stays(t, s, "a FIFO", 5)
	must(t, os.Remove(path))
	write(t, path, "x\nnameserver nonsense\n")
	stays(t, s, "nonsense", 5)
	write(t, path, strings.Repeat("# a comment of some length\n", 1<<20/27+1)+conf(7))
	stays(t, s, "over 1 MiB of comments", 5)
	write(t, path, conf(6)+strings.Repeat("nameserver 192.0.2.77\n", 1<<20/22))
	expect(t, s, "1 MiB", 6)
	if os.Getuid() != 0 {
		write(t, path, conf(8))
		expect(t, s, "before", 8)
		must(t, os.Chmod(path, 0))
		stays(t, s, "unreadable", 8)
		must(t, os.Chmod(path, 0o644))
		write(t, path, conf(9))
		expect(t, s, "readable again", 9)
	}
}

func TestFollowLinks(t *testing.T) {
	dir := t.TempDir()
	in := func(parts ...string) string { return filepath.Join(append([]string{dir}, parts...)...) }
	must(t, os.MkdirAll(in("run", "a"), 0o755))
	must(t, os.MkdirAll(in("etc"), 0o755))
	write(t, in("run", "a", "stub.conf"), conf(1))
	must(t, os.Symlink("../run/a/stub.conf", in("etc", "resolv.conf")))
	s := follow(t, in("etc", "resolv.conf"))
	expect(t, s, "at first", 1)

	write(t, in("run", "a", "stub.conf"), conf(2))
	expect(t, s, "target rewritten", 2)

	write(t, in("run", "a", "new"), conf(3))
	must(t, os.Rename(in("run", "a", "new"), in("run", "a", "stub.conf")))
	expect(t, s, "target replaced", 3)

	must(t, os.MkdirAll(in("run", "b"), 0o755))
	write(t, in("run", "b", "stub.conf"), conf(4))
	must(t, os.Symlink(in("run", "b", "stub.conf"), in("etc", "tmp")))
	must(t, os.Rename(in("etc", "tmp"), in("etc", "resolv.conf")))
	expect(t, s, "link replaced by an absolute one", 4)
	write(t, in("run", "b", "stub.conf"), conf(5))
	expect(t, s, "new target rewritten", 5)

	// A directory on the way is a link that moves.
	must(t, os.Symlink("b", in("run", "now")))
	must(t, os.Symlink(in("run", "now", "stub.conf"), in("etc", "tmp")))
	must(t, os.Rename(in("etc", "tmp"), in("etc", "resolv.conf")))
	stays(t, s, "by way of a directory link", 5)
	write(t, in("run", "a", "stub.conf"), conf(6))
	must(t, os.Symlink("a", in("run", "tmp")))
	must(t, os.Rename(in("run", "tmp"), in("run", "now")))
	expect(t, s, "directory link moved", 6)

	// All of the way vanishes and comes back.
	must(t, os.RemoveAll(in("run")))
	stays(t, s, "directory gone", 6)
	must(t, os.MkdirAll(in("run", "now"), 0o755))
	time.Sleep(2 * settleTime)
	write(t, in("run", "now", "stub.conf"), conf(7))
	expect(t, s, "directory back", 7)

	must(t, os.Remove(in("etc", "resolv.conf")))
	must(t, os.Symlink("resolv.conf", in("etc", "resolv.conf")))
	stays(t, s, "a loop", 7)
	must(t, os.Remove(in("etc", "resolv.conf")))
	must(t, os.Symlink("other", in("etc", "resolv.conf")))
	must(t, os.Symlink("resolv.conf", in("etc", "other")))
	stays(t, s, "a loop of two", 7)
	must(t, os.Remove(in("etc", "other")))
	write(t, in("etc", "other"), conf(8))
	expect(t, s, "loop broken", 8)
}

func TestFollowFromNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b", "resolv.conf")
	s := follow(t, path)
	expect(t, s, "at first", 0)
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	write(t, path, conf(1))
	expect(t, s, "made", 1)
}

// TestFollowFast rewrites the file 100 times a second in every way.
func TestFollowFast(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	write(t, path, conf(1))
	s := follow(t, path)
	before := openFiles(t)
	for i := range 150 {
		switch i % 3 {
		case 0:
			write(t, path, conf(2+i%200))
		case 1:
			tmp := filepath.Join(dir, "tmp")
			write(t, tmp, conf(2+i%200))
			must(t, os.Rename(tmp, path))
		case 2:
			target := filepath.Join(dir, fmt.Sprintf("target%d", i))
			write(t, target, conf(2+i%200))
			must(t, os.Remove(path))
			must(t, os.Symlink(target, path))
		}
		time.Sleep(10 * time.Millisecond)
	}
	must(t, os.Remove(path))
	write(t, path, conf(222))
	expect(t, s, "after it all", 222)
	if n := openFiles(t); n > before+2 {
		t.Errorf("%d files are open, %d before", n, before)
	}
}

// TestSearch holds that search domains follow the file, also with fixed
// upstreams, and that changes are told.
func TestSearch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, path, conf(1)+"search a.example\n")
	s, err := New(Config{ResolvConf: path, Upstreams: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.99:53")}})
	must(t, err)
	if got := s.Search(); !slices.Equal(got, []string{"a.example"}) {
		t.Errorf("Search() before Run = %q", got)
	}
	told := make(chan []string, 10)
	s.OnSearchChange(func(search []string) { told <- search })
	run(t, s)
	for _, want := range []string{"b.example c.example", "", "d.example"} {
		write(t, path, conf(1)+"search "+want+"\n")
		select {
		case got := <-told:
			if strings.Join(got, " ") != want || strings.Join(s.Search(), " ") != want {
				t.Errorf("told %q, Search() = %q, want %q", got, s.Search(), want)
			}
		case <-time.After(time.Minute):
			t.Errorf("nothing was told of %q", want)
		}
	}
	write(t, path, conf(2)+"search d.example\n")
	stays(t, s, "fixed", 99)
	if len(told) > 0 {
		t.Errorf("told %q although nothing changed", <-told)
	}
}

// TestFollowServes holds that queries go to the new servers.
func TestFollowServes(t *testing.T) {
	mocks := map[netip.AddrPort]*mock{
		host(1): newMock(t, answerWith(0, "a. 300 IN A 192.0.2.101")),
		host(2): newMock(t, answerWith(0, "a. 300 IN A 192.0.2.102")),
	}
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, path, conf(1))
	s, addr := start(t, Config{
		ResolvConf: path,
		Dial: func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, mocks[addr].addr.String())
		},
	})
	for n := 1; n <= 2; n++ {
		write(t, path, conf(n))
		expect(t, s, "rewritten", n)
		m := unpack(t, exchangeUDP(t, addr, ask("a", dns.TypeA), patience))
		if want := fmt.Sprintf("192.0.2.10%d", n); len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != want {
			t.Errorf("answer %v, want %s", m.Answer, want)
		}
	}
}
