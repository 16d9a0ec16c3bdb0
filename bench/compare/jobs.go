package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A job runs one tool against one subject and yields samples of one or more
// figures.
type job struct {
	name     string
	how      string
	mtu      int      // of the guest's device
	peers    []string // who else, and usernet, can do it; nil: all that give a guest a network
	loopback bool     // is worth running without any subject, too
	rounds   int      // at most so many; 0: all
	seconds  float64  // for the estimate
	length   int      // of the load in seconds, where it has a rate of units
	run      func(ctx context.Context, b *bench, in *instance) (samples, error)
	alone    func(ctx context.Context, b *bench, name string) (samples, error) // instead, for a job that starts the subject itself
}

// suits tells whether a subject can do the job.
func (j job) suits(name string) bool {
	if j.peers == nil {
		return name != nameRootlessKit // whose guests have no network by itself
	}
	return slices.Contains(j.peers, name)
}

// samples are values by figure.
type samples map[string][]float64

// The files with the names to ask for.
const (
	knownNames = "known"
	newNames   = "new"
)

// jobs lists everything there is to run, in order.
func jobs(opts options) []job {
	sec := opts.Seconds
	all := []job{startJob(opts), idleJob(opts)}
	for _, mtu := range []int{65520, 1500} {
		for _, streams := range []int{1, 4} {
			for _, way := range []string{"up", "down"} {
				all = append(all, bulkJob(way, mtu, streams, sec))
			}
		}
	}
	all = append(all,
		requestJob(1, sec), requestJob(32, sec), connectionJob(pick(opts.Quick, 5, 20)),
		udpJob("up", 1400, sec), udpJob("down", 1400, sec), udpJob("up", 200, sec), udpJob("down", 200, sec),
		dnsJob("dns-known", knownNames, sec), dnsJob("dns-new", newNames, sec), dnsJob("dns-direct", knownNames, sec),
		pingJob(),
	)
	all = append(all, inBulkJob("up", sec), inBulkJob("down", sec), inConnectionJob(sec), inIdleJob())
	for _, way := range []string{"up", "down"} {
		for _, n := range flowCounts {
			all = append(all, flowsJob(way, n, opts))
		}
	}
	return all
}

// selected keeps the jobs that -only names.
func selected(all []job, only []string) ([]job, error) {
	if len(only) == 0 {
		return all, nil
	}
	var chosen []job
	used := map[string]bool{}
	for _, j := range all {
		for _, o := range only {
			if strings.HasPrefix(j.name, o) {
				chosen = append(chosen, j)
				used[o] = true
				break
			}
		}
	}
	for _, o := range only {
		if !used[o] {
			return nil, fmt.Errorf("no job's name begins with %q", o)
		}
	}
	return chosen, nil
}

// output runs a tool in the guest with a time limit.
func (b *bench) output(ctx context.Context, in *instance, limit time.Duration, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := b.commandIn(ctx, in.guest, name, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return out, fmt.Errorf("%s: not done after %s", name, limit)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out, fmt.Errorf("%s: %w: %s", name, err, lastLine(out))
	}
	return out, err
}

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

func grace(seconds int) time.Duration {
	return time.Duration(seconds)*time.Second + 10*time.Second
}

// iperfResult is the part of iperf3's JSON that counts.
type iperfResult struct {
	Error string `json:"error"`
	End   struct {
		Sent     iperfSum `json:"sum_sent"`
		Received iperfSum `json:"sum_received"`
		UDP      struct {
			Seconds float64 `json:"seconds"`
			Packets int64   `json:"packets"`
			Lost    int64   `json:"lost_packets"`
		} `json:"sum"`
	} `json:"end"`
}

type iperfSum struct {
	Bytes       float64 `json:"bytes"`
	Bits        float64 `json:"bits_per_second"`
	Retransmits float64 `json:"retransmits"`
}

func (b *bench) iperf(ctx context.Context, in *instance, seconds int, args ...string) (iperfResult, error) {
	port, stop, err := b.startIperf(ctx)
	if err != nil {
		return iperfResult{}, err
	}
	defer stop()
	args = append([]string{"--client", in.gateway, "--port", strconv.Itoa(port), "--time", strconv.Itoa(seconds), "--json"}, args...)
	out, err := b.output(ctx, in, grace(seconds), "iperf3", args...)
	return parseIperf(out, err)
}

// parseIperf prefers iperf3's own words to its exit status.
func parseIperf(out []byte, runErr error) (iperfResult, error) {
	var r iperfResult
	if err := json.Unmarshal(out, &r); err != nil {
		if runErr != nil {
			return r, runErr
		}
		return r, fmt.Errorf("parse iperf3's answer: %w", err)
	}
	if r.Error != "" {
		return r, fmt.Errorf("iperf3: %s", r.Error)
	}
	return r, runErr
}

func bulkJob(way string, mtu, streams, seconds int) job {
	id := bulkID(way, mtu, streams)
	return job{
		name: id, how: "iperf3 TCP " + way, mtu: mtu, loopback: mtu == 65520, seconds: float64(seconds) + 0.5,
		run: func(ctx context.Context, b *bench, in *instance) (samples, error) {
			args := []string{"--parallel", strconv.Itoa(streams)}
			if way == "down" {
				args = append(args, "--reverse")
			}
			before, err := in.cpu()
			if err != nil {
				return nil, err
			}
			r, err := b.iperf(ctx, in, seconds, args...)
			if err != nil {
				return nil, err
			}
			after, err := in.cpu()
			if err != nil {
				return nil, err
			}
			gb := r.End.Received.Bytes / 1e9
			if gb == 0 {
				return nil, errors.New("iperf3: nothing arrived")
			}
			s := samples{id: {r.End.Received.Bits / 1e9}}
			if in.guest != nil && streams == 1 {
				s["cpu-"+id] = []float64{(after - before).Seconds() / gb}
				if way == "up" {
					s[retransID(mtu)] = []float64{r.End.Sent.Retransmits / gb}
				}
			}
			return s, nil
		},
	}
}

// cpu is the subject's CPU time so far; loopback has no subject.
func (in *instance) cpu() (time.Duration, error) {
	if in.guest == nil {
		return 0, nil
	}
	return cpuTime(in.pid)
}

func udpJob(way string, size, seconds int) job {
	id := udpID(way, size)
	return job{
		name: id, how: "iperf3 -u -b 0 " + way, mtu: 65520, seconds: float64(seconds) + 0.6, length: seconds,
		run: func(ctx context.Context, b *bench, in *instance) (samples, error) {
			args := []string{"--udp", "--bitrate", "0", "--length", strconv.Itoa(size)}
			if way == "down" {
				args = append(args, "--reverse")
			}
			r, err := b.iperf(ctx, in, seconds, args...)
			if err != nil {
				return nil, err
			}
			u := r.End.UDP
			if u.Seconds == 0 {
				return nil, errors.New("iperf3: no summary")
			}
			return samples{id: {float64(u.Packets-u.Lost) / u.Seconds}}, nil
		},
	}
}

var (
	wrkRate     = regexp.MustCompile(`(?m)^Requests/sec:\s+([0-9.]+)`)
	wrkErrors   = regexp.MustCompile(`(?m)^\s*Socket errors: (.*)$`)
	dnsperfRate = regexp.MustCompile(`(?m)Queries per second:\s+([0-9.]+)`)
	pingMean    = regexp.MustCompile(`(?m)^rtt min/avg/max/mdev = [0-9.]+/([0-9.]+)/`)
)

// firstFloat is the first group of a pattern in a tool's output.
func firstFloat(pattern *regexp.Regexp, out []byte) (float64, error) {
	m := pattern.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("no %q in the answer: %s", pattern, lastLine(out))
	}
	return strconv.ParseFloat(string(m[1]), 64)
}

func (b *bench) wrk(ctx context.Context, in *instance, port, connections, seconds int, args ...string) (float64, error) {
	args = append([]string{
		"--threads", "1", "--connections", strconv.Itoa(connections), "--duration", strconv.Itoa(seconds) + "s", "--timeout", "10s",
	}, args...)
	args = append(args, fmt.Sprintf("http://%s:%d/small", in.gateway, port))
	out, err := b.output(ctx, in, grace(seconds), "wrk", args...)
	if err != nil {
		return 0, err
	}
	if m := wrkErrors.FindSubmatch(out); m != nil {
		b.note("%s: wrk -c%d: socket errors: %s", in.name, connections, m[1])
	}
	return firstFloat(wrkRate, out)
}

func requestJob(connections, seconds int) job {
	id := fmt.Sprintf("req-%d", connections)
	return job{
		name: id, how: fmt.Sprintf("wrk -c%d", connections), mtu: 65520, loopback: true, seconds: float64(seconds) + 0.2, length: seconds,
		run: func(ctx context.Context, b *bench, in *instance) (samples, error) {
			rate, err := b.wrk(ctx, in, b.webPort(), connections, seconds)
			return samples{id: {rate}}, err
		},
	}
}

func connectionJob(seconds int) job {
	return job{
		name: "conn-16", how: "wrk -c16, Connection: close", mtu: 65520, rounds: 3, seconds: float64(seconds) + 0.2, length: seconds,
		run: func(ctx context.Context, b *bench, in *instance) (samples, error) {
			port := b.webPort()
			watch := watchRequests(ctx, port)
			rate, err := b.wrk(ctx, in, port, 16, seconds, "--header", "Connection: close")
			stall := watch()
			return samples{"conn-16": {rate}, "conn-stall": {stall.Seconds()}}, err
		},
	}
}

// watchRequests watches nginx's counter until the returned function is called,
// which tells the longest time in which it stood still.
func watchRequests(ctx context.Context, port int) (stop func() time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	result := make(chan time.Duration)
	go func() {
		const interval = 50 * time.Millisecond
		var longest time.Duration
		var last int64
		changed := time.Now()
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for started := false; ; {
			select {
			case <-ctx.Done():
				result <- longest
				return
			case <-tick.C:
			}
			n, err := requestsServed(ctx, port)
			if err != nil {
				continue
			}
			now := time.Now()
			// Asking is a request, too. Before the first request and
			// after the last one nothing is due.
			if n > last+1 {
				if started {
					longest = max(longest, now.Sub(changed)-interval)
				}
				started, changed = started || last > 0, now
			}
			last = n
		}
	}()
	return func() time.Duration {
		cancel()
		return <-result
	}
}

func dnsJob(id, names string, seconds int) job {
	return job{
		name: id, how: "dnsperf", mtu: 65520, seconds: float64(seconds) + 0.3, length: seconds,
		run: func(ctx context.Context, b *bench, in *instance) (samples, error) {
			server := pick(id == "dns-direct", in.gateway, in.dns)
			out, err := b.output(ctx, in, grace(seconds), "dnsperf", "-s", server,
				"-d", filepath.Join(b.work, names), "-l", strconv.Itoa(seconds), "-c", "1", "-T", "1", "-t", "2")
			if err != nil {
				return nil, err
			}
			rate, err := firstFloat(dnsperfRate, out)
			return samples{id: {rate}}, err
		},
	}
}

func pingJob() job {
	return job{
		name: "ping", how: "ping -f", mtu: 65520, seconds: 1.1,
		run: func(ctx context.Context, b *bench, in *instance) (samples, error) {
			out, err := b.output(ctx, in, grace(1), "ping", "-f", "-q", "-w", "1", in.gateway)
			if err != nil {
				return nil, err
			}
			ms, err := firstFloat(pingMean, out)
			return samples{"ping": {ms * 1000}}, err
		},
	}
}

func flowsJob(way string, n int, opts options) job {
	id := flowsID(way, n)
	window := time.Duration(opts.Seconds) * time.Second
	return job{
		name: id, how: plural(n, "flow") + " of own load", mtu: 65520, loopback: true, rounds: 2, seconds: window.Seconds() + 1,
		run: func(ctx context.Context, b *bench, in *instance) (samples, error) {
			ctx, cancel := context.WithTimeout(ctx, window+30*time.Second)
			defer cancel()
			kind := pick(way == "up", byte(flowUp), byte(flowDown))
			l, err := b.startLoad(ctx, in, kind, n, window)
			if err != nil {
				return nil, err
			}
			defer l.kill()
			var bytes int64
			if way == "up" {
				bytes, err = b.countUpload(l, window)
			} else {
				bytes, err = l.number()
			}
			return samples{id: {float64(bytes) * 8 / 1e9 / window.Seconds()}}, err
		},
	}
}

// countUpload counts at the receiving end, which is this process.
func (b *bench) countUpload(l *load, window time.Duration) (int64, error) {
	counted := make(chan int64)
	go func() {
		time.Sleep(rampUp)
		before := b.flows.received.Load()
		time.Sleep(window)
		counted <- b.flows.received.Load() - before
	}()
	_, err := l.number()
	return <-counted, err
}
