package e2e

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// alive checks that a network works as it did in the beginning: the process that
// faces the guest is the same, and carries everything that it should.
func alive(t *testing.T, w *world, worker int) {
	t.Helper()
	if now := workerOf(t, w); now != worker {
		t.Errorf("the worker was process %d and is %d", worker, now)
	}
	w.Guest.Must(t, "ping", "-c1", "-W5", w.Gateway4.String())
	for _, six := range []bool{false, true} {
		talk := rig.Talk{
			Addr:   web(six, rig.Services.Talk),
			Client: []rig.Step{rig.Send(300000, 3), rig.CloseWrite(), rig.Receive()},
			Server: []rig.Step{rig.Receive(), rig.Send(300000, 4), rig.CloseWrite()},
		}
		r, err := talk.Do(w.Guest, w.Internet, 20*time.Second)
		if err != nil {
			t.Error(err)
			continue
		}
		wantSame(t, "alive", r[0], 300000, 300000)
	}
	if answers, text := dig(t, w.Guest, w.DNS4, "host.usernet.internal"); len(answers) != 1 {
		t.Errorf("DNS:\n%s", text)
	}
}

// number reads a setting from the environment of a test that can be made longer.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		t.Fatalf("%s=%s is no count", name, text)
	}
	return n
}

// span reads a time from the environment of a test that can be made longer.
func span(t *testing.T, name string) time.Duration {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		t.Fatalf("%s=%s is no time such as 30s", name, text)
	}
	return d
}

// TestMalformedFrames: frames that no kernel would send, over a real interface,
// break nothing. USERNET_FRAMES is how many.
func TestMalformedFrames(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ping", "dig")
	w := onTap(t)
	w.attach(t)
	worker := workerOf(t, w)
	const batch = 20000
	seed := rand.Uint64()
	sent := 0
	for count := number(t, "USERNET_FRAMES", batch); sent < count; seed++ {
		f := rig.Flood{Interface: "tap0", Gateway: w.Gateway4, Count: min(batch, count-sent), Seed: seed}
		n, err := rig.SendFlood.Within(time.Minute).Try(w.Guest, f)
		if err != nil || n == 0 {
			t.Fatalf("seed %d: %d frames, %v", seed, n, err)
		}
		sent += n
	}
	t.Logf("%d frames, seeds up to %d: %s", sent, seed, dropped(t, w))
	alive(t, w, worker)
}

// dropped tells what was not taken.
func dropped(t *testing.T, w *world) string {
	t.Helper()
	var s struct{ Dropped json.RawMessage }
	if err := json.Unmarshal([]byte(mustCtl(t, w, "stats", "--json")), &s); err != nil {
		t.Error(err)
	}
	return string(s.Dropped)
}

// held is what the process that faces the guest has. Its descriptors are nobody's
// to look at, but each flow has one.
type held struct{ Threads, Anon, Goroutines, Flows int } // Anon in KiB

func holdings(t *testing.T, w *world, worker int) (h held) {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(worker) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		for name, to := range map[string]*int{"Threads:": &h.Threads, "RssAnon:": &h.Anon} {
			if f[0] == name {
				*to, _ = strconv.Atoi(f[1])
			}
		}
	}
	var s struct {
		Process struct {
			Goroutines int `json:"goroutines_now"`
		}
		Flows struct {
			TCP     int `json:"tcp_now"`
			UDP     int `json:"udp_now"`
			ICMP    int `json:"icmp_now"`
			Dialing int `json:"dialing_now"`
		}
	}
	if err := json.Unmarshal([]byte(mustCtl(t, w, "stats", "--json")), &s); err != nil {
		t.Fatal(err)
	}
	h.Goroutines, h.Flows = s.Process.Goroutines, s.Flows.TCP+s.Flows.UDP+s.Flows.ICMP+s.Flows.Dialing
	return h
}

// TestSoak mixes all kinds of traffic, good and bad, for the time in
// USERNET_SOAK, and looks afterwards whether everything was given back.
func TestSoak(t *testing.T) {
	rig.NeedUsernet(t)
	length := span(t, "USERNET_SOAK")
	if length == 0 {
		t.Skip("make soak runs it, for as long as one likes")
	}
	rig.NeedTools(t, "ping", "dig")
	w := onTap(t)
	w.Guest.ServeOn(t, false)
	w.attach(t, "-p", "8090:"+itoa(rig.Services.Talk))
	worker := workerOf(t, w)
	alive(t, w, worker)
	time.Sleep(time.Second)
	before := holdings(t, w, worker)
	began := time.Now()
	until := began.Add(length)
	var work sync.WaitGroup
	again := func(f func(n int) error) {
		work.Go(func() {
			for n := 0; time.Now().Before(until); n++ {
				if err := f(n); err != nil {
					t.Errorf("after %v: %v", time.Since(began).Round(time.Millisecond), err)
					return
				}
			}
		})
	}
	steps := func(n int64) (client, server []rig.Step) {
		return []rig.Step{rig.Send(n, 1), rig.CloseWrite(), rig.Receive()}, []rig.Step{rig.Receive(), rig.Send(n, 2), rig.CloseWrite()}
	}
	for _, six := range []bool{false, true} {
		again(func(n int) error {
			talk := rig.Talk{Addr: web(six, rig.Services.Talk), Streams: 1 + n%8}
			talk.Client, talk.Server = steps(int64(1 + n%7*50000))
			_, err := talk.Do(w.Guest, w.Internet, 30*time.Second)
			return err
		})
	}
	again(func(n int) error {
		talk := rig.Talk{Addr: host(false, 8090), Streams: 4}
		talk.Client, talk.Server = steps(100000)
		_, err := talk.Do(w.Internet, w.Guest, 30*time.Second)
		return err
	})
	again(func(n int) error { // clients that go without a word
		talk := rig.Talk{Addr: web(n%2 == 0, rig.Services.Talk), Streams: 20, Client: []rig.Step{rig.Send(1000, 1), rig.Reset()}, Server: []rig.Step{rig.Receive()}}
		// In the flood below, a reset may be lost: nobody repeats it.
		_, _ = talk.Do(w.Guest, w.Internet, 2*time.Second)
		return nil
	})
	again(func(n int) error {
		_, err := rig.SendFlood.Within(time.Minute).Try(w.Guest, rig.Flood{Interface: "tap0", Gateway: w.Gateway4, Count: 2000, Seed: uint64(n)})
		time.Sleep(50 * time.Millisecond)
		return err
	})
	again(func(int) error {
		w.Guest.Run(t, "dig", "+tries=1", "+time=2", "@"+w.DNS4.String(), "www.example.test")
		w.Guest.Run(t, "ping", "-c3", "-i0.2", "-W2", rig.Web4.String())
		return nil
	})
	again(func(int) error {
		mustCtl(t, w, "flows", "--json")
		time.Sleep(200 * time.Millisecond)
		return nil
	})
	work.Wait()
	alive(t, w, worker)
	// What idles too long goes: fragments after a minute, UDP sockets last of all,
	// after three. Then memory does, but for what batches are received into.
	var after held
	if !rig.Poll(5*time.Minute, func() bool {
		time.Sleep(time.Second)
		after = holdings(t, w, worker)
		return after.Goroutines <= before.Goroutines+10 && after.Threads <= 32 && after.Flows <= before.Flows+2 && after.Anon <= before.Anon+12<<10
	}) {
		t.Errorf("not everything was given back: %+v", after)
	}
	t.Logf("before %+v, after %+v: %s", before, after, dropped(t, w))
}
