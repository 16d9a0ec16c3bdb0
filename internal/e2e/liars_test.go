package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/usernet/usernet/internal/rig"
)

// A resolvChange is something that happens to /etc/resolv.conf.
type resolvChange struct{ How, Text string }

// changeResolv makes it happen.
var changeResolv = rig.NewFunc("e2e.changeResolv", func(_ context.Context, c resolvChange) (struct{}, error) {
	const path = "/etc/resolv.conf"
	replace := func(made error) error {
		if made != nil {
			return made
		}
		return os.Rename(path+".new", path)
	}
	var err error
	switch c.How {
	case "renamed":
		err = replace(os.WriteFile(path+".new", []byte(c.Text), 0o644))
	case "linked":
		target := fmt.Sprintf("/run/resolv.%d", time.Now().UnixNano())
		if err = os.WriteFile(target, []byte(c.Text), 0o644); err == nil {
			err = replace(os.Symlink(target, path+".new"))
		}
	case "rewritten": // what a link leads to, too
		err = os.WriteFile(path, []byte(c.Text), 0o644)
	case "emptied":
		err = os.Truncate(path, 0)
	case "deleted":
		err = os.Remove(path)
	}
	return struct{}{}, err
})

// watchesOf counts the inotify watches of a process.
var watchesOf = rig.NewFunc("e2e.watches", func(_ context.Context, pid int) (int, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	n := 0
	for _, f := range files {
		b, _ := os.ReadFile(f)
		n += strings.Count(string(b), "inotify wd:")
	}
	return n, err
})

// TestResolvConfReplacedOften: whatever happens to resolv.conf, however often,
// queries are answered, by those that it named last.
func TestResolvConfReplacedOften(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	servers := []string{"198.51.100.51", "198.51.100.52"}
	for i, server := range servers {
		startDNS(t, w.Internet, server, fmt.Sprintf("--address=/who.test/192.0.2.%d", i))
	}
	conf := func(i int) string { return "nameserver " + servers[i%2] + "\n" }
	w.Host.WriteEtc(t, "resolv.conf", conf(0))
	a := w.attach(t)
	worker := workerOf(t, w)
	names := 0
	ask := func() string {
		names++
		answers, text := dig(t, w.Guest, w.DNS4, fmt.Sprintf("n%d.who.test", names))
		if len(answers) != 1 {
			t.Errorf("question %d: %s", names, text)
			return ""
		}
		return answers[0]
	}
	ask()
	files := func() int { return handlesOf.On(t, w.Host, a.PID)[0] }
	before, watches := files(), watchesOf.On(t, w.Host, a.PID)
	if watches == 0 {
		t.Error("resolv.conf is not watched")
	}
	change := func(how, text string) { changeResolv.On(t, w.Host, resolvChange{how, text}) }
	for round := range 10 {
		// Nine that may come too fast for each to be seen.
		for i, how := range []string{"renamed", "rewritten", "linked", "rewritten", "linked", "renamed", "emptied", "deleted", "renamed"} {
			change(how, conf(round+i))
			if i%3 == 2 {
				ask()
			}
		}
		how := []string{"renamed", "rewritten", "linked"}[round%3]
		change(how, conf(round))
		want := fmt.Sprintf("192.0.2.%d", round%2)
		if !rig.Poll(5*time.Second, func() bool { return ask() == want }) {
			t.Fatalf("round %d: what resolv.conf says when it was %s is not in force", round, how)
		}
		// What comes now says nothing.
		change([]string{"emptied", "deleted"}[round%2], "")
		time.Sleep(100 * time.Millisecond)
		if got := ask(); got != want {
			t.Errorf("round %d: without a server in resolv.conf %s answers, want %s", round, got, want)
		}
		change("renamed", "# nothing\n")
	}
	change("renamed", conf(0))
	if !rig.Poll(5*time.Second, func() bool { return files() <= before+1 && watchesOf.On(t, w.Host, a.PID) <= watches }) {
		t.Errorf("%d descriptors and %d watches, %d and %d before", files(), watchesOf.On(t, w.Host, a.PID), before, watches)
	}
	wantIdle(t, w, a.PID)
	alive(t, w, worker)
}

// TestResolvConfUnwatched: where the user has no inotify left, resolv.conf is
// followed all the same.
func TestResolvConfUnwatched(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	servers := []string{"198.51.100.51", "198.51.100.52"}
	for i, server := range servers {
		startDNS(t, w.Internet, server, fmt.Sprintf("--address=/who.test/192.0.2.%d", i))
	}
	if o := w.Host.Run(t, "sysctl", "-w", "user.max_inotify_instances=0"); o.Code != 0 {
		rig.Missing(t, "limit of inotify instances: %s", o.Stderr)
	}
	w.Host.WriteEtc(t, "resolv.conf", "nameserver "+servers[0]+"\n")
	a := w.attach(t)
	a.WaitOutput(t, "cannot watch resolv.conf", 5*time.Second)
	for i := range 4 {
		w.Host.WriteEtc(t, "resolv.conf", "nameserver "+servers[i%2]+"\n")
		if !rig.Poll(5*time.Second, func() bool {
			answers, _ := dig(t, w.Guest, w.DNS4, fmt.Sprintf("n%d.who.test", time.Now().UnixNano()))
			return len(answers) == 1 && answers[0] == fmt.Sprintf("192.0.2.%d", i%2)
		}) {
			t.Fatalf("change %d is not followed", i)
		}
	}
	wantIdle(t, w, a.PID)
}

// lie is the address that the liar gives out.
const lie = "203.0.113.66"

// startLiar starts a DNS server that does not serve: in a way that the first label
// of the name names.
var startLiar = rig.NewFunc("e2e.liar", func(_ context.Context, addr string) (struct{}, error) {
	at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 53))
	c, err := net.ListenUDP("udp4", at)
	if err != nil {
		return struct{}{}, err
	}
	other, err := net.ListenUDP("udp4", &net.UDPAddr{IP: at.IP})
	if err != nil {
		return struct{}{}, err
	}
	go func() {
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDP(b)
			if err != nil {
				continue // an ICMP error of an earlier answer
			}
			q := new(dns.Msg)
			if q.Unpack(b[:n]) == nil && len(q.Question) == 1 {
				go answerWithLie(q, c, other, from)
			}
		}
	}()
	return struct{}{}, nil
})

// lies are what it does.
var lies = []string{
	"silent", "slow", "wrong-id", "wrong-question", "wrong-type", "wrong-source", "cut", "cut-question", "cut-record",
	"records-missing", "oversized", "nxdomain-for-another",
}

func answerWithLie(q *dns.Msg, c, other *net.UDPConn, from *net.UDPAddr) {
	m := new(dns.Msg)
	m.SetReply(q)
	record := func(name string) *dns.A {
		h := dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 600}
		return &dns.A{Hdr: h, A: net.ParseIP(lie)}
	}
	name := q.Question[0].Name
	m.Answer = []dns.RR{record(name)}
	cut := -1
	how, _, _ := strings.Cut(name, ".")
	switch how {
	case "silent":
		return
	case "slow":
		time.Sleep(2 * time.Second)
	case "wrong-id":
		m.Id++
	case "wrong-question":
		m.Question[0].Name = "another.test."
	case "wrong-type":
		m.Question[0].Qtype = dns.TypeAAAA
	case "wrong-source":
		c = other
	case "cut":
		cut = 5
	case "cut-question":
		cut = 20
	case "cut-record":
		cut = len(name) + 12 + 4 + 15
	case "records-missing":
		m.Answer = nil
		m.Ns = []dns.RR{record(name)}
	case "oversized":
		for range 2500 {
			m.Answer = append(m.Answer, record(name))
		}
		m.Id++
	case "nxdomain-for-another":
		m.SetRcode(q, dns.RcodeNameError)
		m.Question[0].Name = "another.test."
	}
	m.Compress = true
	b, err := m.Pack()
	if err != nil {
		return
	}
	if how == "records-missing" {
		b[7] = 200 // answers that are not there
	}
	if cut >= 0 && cut < len(b) {
		b = b[:cut]
	}
	c.WriteToUDP(b, from)
}

// TestDNSLies: a server that says what cannot be true has said nothing. Another one
// is asked soon, and where there is none the guest learns that nobody knows.
func TestDNSLies(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	startDNS(t, w.Internet, rig.Web4.String(), "--address=/lies.test/192.0.2.1", "--address=/bank.test/192.0.2.2")
	const addr = "198.51.100.66"
	w.Internet.Must(t, "ip", "addr", "replace", addr, "dev", "lo")
	startLiar.On(t, w.Internet, addr)
	var work sync.WaitGroup
	defer work.Wait()
	for _, alone := range []bool{true, false} {
		guest := w.Net.Guest(t)
		flags := []string{"--dns", addr}
		if !alone {
			flags = append(flags, "--dns", rig.Web4.String())
		}
		w.Attach(t, guest, append(flags, w.flags...)...)
		ask := func(name string) (answer, rcode string, took time.Duration) {
			start := time.Now()
			answers, text := dig(t, guest, w.DNS4, name, "+time=30", "+tries=1")
			return strings.Join(answers, " "), status(text), time.Since(start)
		}
		for _, how := range lies {
			work.Go(func() {
				answer, rcode, took := ask(how + ".lies.test")
				wantAnswer, want := "192.0.2.1", "NOERROR"
				switch {
				case alone && how == "slow":
					wantAnswer = lie
				case alone:
					wantAnswer, want = "", "SERVFAIL"
				}
				if answer != wantAnswer || rcode != want || !alone && took > 4*time.Second {
					t.Errorf("%s, alone %t: %s %s after %v, want %s %s", how, alone, rcode, answer, took, want, wantAnswer)
				}
				if alone {
					return
				}
				// Nothing of a lie has stayed, neither for this name nor for another.
				for name, want := range map[string]string{how + ".lies.test": "192.0.2.1", how + ".bank.test": "192.0.2.2"} {
					if answer, _, _ := ask(name); answer != want {
						t.Errorf("%s: then %s is %q, want %q", how, name, answer, want)
					}
				}
			})
		}
	}
}
