package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// TestHTTPThroughGateway: with --host-loopback the gateway's addresses are the
// host's loopback, and a big download arrives unchanged.
func TestHTTPThroughGateway(t *testing.T) {
	rig.NeedTools(t, "curl", "sha256sum")
	const size = 50_000_000
	eachLink(t, func(t *testing.T, w *world) {
		ports := w.Host.ServeOn(t, true, "127.0.0.1", "::1")
		w.attach(t, "--host-loopback")
		families(t, func(t *testing.T, six bool) {
			gateway := pick(six, w.Gateway4, w.Gateway6)
			for seed := range 2 {
				wantDownload(t, w.Guest, at(gateway, ports.HTTP), size, seed)
			}
		})
	})
}

// TestHTTPFromInternet is the same without any loopback in it.
func TestHTTPFromInternet(t *testing.T) {
	rig.NeedTools(t, "curl", "sha256sum")
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t)
		families(t, func(t *testing.T, six bool) {
			wantDownload(t, w.Guest, web(six, rig.Services.HTTP), 20_000_000, 3)
		})
	})
}

// TestHTTPPlain needs no namespace but the guest's: usernet runs on the
// machine itself, and only the machine's loopback is asked.
func TestHTTPPlain(t *testing.T) {
	rig.NeedNamespaces(t)
	rig.NeedTools(t, "curl", "sha256sum")
	if rig.Current().Name == "kernel" {
		t.Skip("there is no host of its own to put a wire into")
	}
	t.Parallel()
	n := rig.New(t, rig.Options{Plain: true})
	ports := n.Host.ServeOn(t, true, "127.0.0.1")
	guest := n.Guest(t)
	n.Attach(t, guest, "--host-loopback")
	wantDownload(t, guest, at(rig.Current().Gateway4, ports.HTTP), 20_000_000, 4)
}

func wantDownload(t *testing.T, n *rig.Node, addr string, size int64, seed int) {
	t.Helper()
	url := fmt.Sprintf("http://%s/data?n=%d&seed=%d", addr, size, seed)
	start := time.Now()
	sum, _, _ := strings.Cut(n.Must(t, "sh", "-c", "curl -sS --fail -m 60 -g '"+url+"' | sha256sum"), " ")
	if want := rig.Sum(size, uint64(seed)); sum != want {
		t.Errorf("%s has the checksum %s, want %s", url, sum, want)
	}
	t.Logf("%d bytes in %v", size, time.Since(start))
}

// TestShortConnections: connections that last for one request. None waits for
// the end of others, and nothing of them stays.
func TestShortConnections(t *testing.T) {
	rig.NeedTools(t, "wrk")
	eachLinkAlone(t, func(t *testing.T, w *world) {
		a := w.attach(t)
		// wrk closes first if the server's FIN comes later than its answer. Its
		// ports would be used up by connections in TIME_WAIT.
		w.Guest.Must(t, "sysctl", "-w", "net.ipv4.tcp_tw_reuse=1", "net.ipv4.ip_local_port_range=1024 65535")
		families(t, func(t *testing.T, six bool) {
			// The first ones make what is then kept: threads, pools.
			shortConnections(t, w, six, 50)
			before := usageOf(t, w, a.PID)
			shortConnections(t, w, six, 1000)
			seconds := pick(testing.Short(), 20, 4)
			if six {
				seconds = pick(testing.Short(), 6, 2)
			}
			rig.CountRequests.On(t, w.Internet, struct{}{})
			out := w.Guest.RunFor(t, time.Minute, "wrk", "-t", "2", "-c", "64", "-d", fmt.Sprint(seconds), "--timeout", "5s",
				"-H", "Connection: close", "http://"+web(six, rig.Services.HTTP)+"/ok")
			perSecond := perSecond(rig.CountRequests.On(t, w.Internet, struct{}{}))
			t.Logf("requests per second: %v\n%s", perSecond, out.Stdout)
			for i, requests := range perSecond {
				// One may be the machine's, which has other things to do.
				if requests == 0 && (i > 0 && perSecond[i-1] == 0 || os.Getenv(perfVariable) != "") {
					t.Errorf("second %d of %d saw no request", i+1, len(perSecond))
				}
			}
			if len(perSecond) < seconds-2 {
				t.Errorf("requests for %d seconds, want %d", len(perSecond), seconds)
			}
			if strings.Contains(out.Stdout, "Socket errors") {
				t.Errorf("wrk met errors:\n%s", out.Stdout)
			}
			wantUsage(t, w, a.PID, before)
		})
	}, false)
}

func shortConnections(t *testing.T, w *world, six bool, n int) {
	t.Helper()
	requests := make([]rig.DialRequest, n)
	for i := range requests {
		requests[i] = rig.DialRequest{Network: "tcp", Addr: web(six, rig.Services.Whoami)}
	}
	failed := 0
	for i, r := range rig.Dials.On(t, w.Guest, requests) {
		if r.Errno != 0 || r.Timeout {
			if failed++; failed < 4 {
				t.Errorf("connection %d of %d: %v after %v: %s", i+1, n, r, r.Took, r.Text)
			}
		}
	}
	if failed > 3 {
		t.Errorf("%d of %d connections failed", failed, n)
	}
}

// perSecond adds up whole seconds.
func perSecond(tenths []int) []int {
	var seconds []int
	for len(tenths) >= 10 {
		sum := 0
		for _, n := range tenths[:10] {
			sum += n
		}
		seconds = append(seconds, sum)
		tenths = tenths[10:]
	}
	return seconds
}

// usage is what a process holds, seen from outside. Of usernet, whose worker lets
// nobody look, files and goroutines are what that says itself.
type usage struct {
	rig.Usage
	Goroutines int
}

func usageOf(t *testing.T, w *world, pid int) usage {
	t.Helper()
	u := usage{Usage: rig.UsageOf.On(t, w.Host, pid)}
	if w.Name == "usernet" {
		var stats struct {
			Process struct {
				Goroutines int `json:"goroutines_now"`
				Files      int `json:"files_now"`
			}
		}
		if err := json.Unmarshal([]byte(mustCtl(t, w, "stats", "--json")), &stats); err != nil || stats.Process.Goroutines == 0 || stats.Process.Files == 0 {
			t.Errorf("no number of goroutines or files: %v", err)
		}
		u.Goroutines, u.Files = stats.Process.Goroutines, stats.Process.Files
	}
	return u
}

// wantUsage checks that a process gives back what it took.
func wantUsage(t *testing.T, w *world, pid int, before usage) {
	t.Helper()
	var after usage
	// The longest timer of a closed connection is below this.
	back := rig.Poll(20*time.Second, func() bool {
		after = usageOf(t, w, pid)
		return after.Files <= before.Files+8 && after.Goroutines <= before.Goroutines+8
	})
	if !back {
		t.Errorf("%d files open and %d goroutines, %d and %d before", after.Files, after.Goroutines, before.Files, before.Goroutines)
	}
	if after.Threads > before.Threads+24 {
		t.Errorf("%d threads, %d before", after.Threads, before.Threads)
	}
	t.Logf("before %+v, after %+v", before, after)
}
