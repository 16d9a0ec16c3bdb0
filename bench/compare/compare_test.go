package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseStat(t *testing.T) {
	const line = "42 (a) R (b) S 7 42 42 0 -1 4194560 1 0 0 0 150 50 3 4 20 0 5 0 100 1 1"
	got, err := parseStat([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	if want := (stat{state: 'S', parent: 7, cpu: 2 * time.Second}); got != want {
		t.Errorf("parseStat = %+v, want %+v", got, want)
	}
	for _, bad := range []string{"", "1 (x) S", "1 (x) S a 1 1 0 -1 0 0 0 0 0 x y 0 0"} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("parseStat(%q) reports no error", bad)
		}
	}
}

func TestParseIdle(t *testing.T) {
	got, err := parseIdle([]byte("cpu  100 0 50 250 50 0 0 0 0 0\ncpu0 1 2 3 4 5\n"))
	if err != nil || got != 3*time.Second {
		t.Errorf("parseIdle = %s, %v, want 3s", got, err)
	}
	if _, err := parseIdle([]byte("intr 1")); err == nil {
		t.Error("parseIdle of something else reports no error")
	}
}

func TestParsePSS(t *testing.T) {
	const rollup = "55d0-7ffd ---p 00000000 00:00 0 [rollup]\nRss:   9000 kB\nPss:   1234 kB\nPss_Anon: 99 kB\n"
	got, err := parsePSS([]byte(rollup))
	if err != nil || got != 1234*1024 {
		t.Errorf("parsePSS = %d, %v, want %d", got, err, 1234*1024)
	}
	if _, err := parsePSS([]byte("Rss: 1 kB\n")); err == nil {
		t.Error("parsePSS without Pss reports no error")
	}
}

func TestHasListener(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1
   1: 0100007F:1F41 0100007F:C350 01 00000000:00000000 00:00000000 00000000  1000        0 2 1
`
	for port, want := range map[int]bool{8000: true, 8001: false, 8002: false} {
		if got := hasListener([]byte(table), port); got != want {
			t.Errorf("hasListener(%d) = %v, want %v", port, got, want)
		}
	}
}

func TestToolOutput(t *testing.T) {
	tests := []struct {
		tool string
		out  string
		want float64
	}{
		{"wrk", "  32 requests in 1.00s, 1.00MB read\nRequests/sec:  71234.56\nTransfer/sec:     17.03MB\n", 71234.56},
		{"dnsperf", "  Run time (s):         1.000157\n  Queries per second:   104321.5\n\n", 104321.5},
		{"ping", "2 packets transmitted, 2 received\nrtt min/avg/max/mdev = 0.002/0.022/1.288/0.022 ms, ipg/ewma 0.042/0.046 ms\n", 0.022},
	}
	patterns := map[string]func([]byte) (float64, error){
		"wrk":     func(b []byte) (float64, error) { return firstFloat(wrkRate, b) },
		"dnsperf": func(b []byte) (float64, error) { return firstFloat(dnsperfRate, b) },
		"ping":    func(b []byte) (float64, error) { return firstFloat(pingMean, b) },
	}
	for _, tt := range tests {
		got, err := patterns[tt.tool]([]byte(tt.out))
		if err != nil || got != tt.want {
			t.Errorf("%s: %v, %v, want %v", tt.tool, got, err, tt.want)
		}
		if _, err := patterns[tt.tool]([]byte("something else")); err == nil {
			t.Errorf("%s: unknown output reports no error", tt.tool)
		}
	}
}

func TestParseIperf(t *testing.T) {
	const good = `{"end":{"sum":{"seconds":2,"packets":10,"lost_packets":4},
		"sum_sent":{"bytes":8,"bits_per_second":80,"retransmits":3},"sum_received":{"bytes":7,"bits_per_second":70}}}`
	r, err := parseIperf([]byte(good), nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.End.Received.Bits != 70 || r.End.Sent.Retransmits != 3 || r.End.UDP.Packets-r.End.UDP.Lost != 6 {
		t.Errorf("parseIperf = %+v", r)
	}
	if _, err := parseIperf([]byte(`{"error":"unable to connect"}`), nil); err == nil || !strings.Contains(err.Error(), "unable to connect") {
		t.Errorf("parseIperf of a refusal: %v", err)
	}
}

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		in   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(tt.in); got != tt.want {
			t.Errorf("median(%v) = %v, want %v", tt.in, got, tt.want)
		}
	}
}

func TestJudge(t *testing.T) {
	figs := []figure{
		{ID: "fast", Goals: []goal{{againstBetterPeer, 1.3}, {nameLoopback, 0.6}}},
		{ID: "again", Goals: []goal{{"=fast", 0.95}}},
		{ID: "slow", Lower: true, Goals: []goal{{nameSlirp, 1.2}, {goalUnit, 5}}},
		{ID: "absent", Goals: []goal{{goalUnit, 1}}},
	}
	rows := judge(figs, map[string]map[string][]float64{
		"fast":  {nameUsernet: {14, 12, 13}, nameSlirp: {5}, namePasta: {8, 10, 12}, nameLoopback: {25}},
		"again": {nameUsernet: {12}},
		"slow":  {nameUsernet: {6}, nameSlirp: {6}, namePasta: {4}},
	})
	if len(rows) != 3 {
		t.Fatalf("judge yields %d rows, want 3", len(rows))
	}
	if r := rows[0]; r.Peer != namePasta || r.Ratio != 1.3 || !r.Verdicts[0].Pass || r.Verdicts[1].Pass {
		t.Errorf("fast: %+v", r)
	}
	if r := rows[1]; r.Peer != "" || len(r.Verdicts) != 1 || r.Verdicts[0].Pass {
		t.Errorf("again: 12 of 13 must miss 0.95: %+v", r)
	}
	if r := rows[2]; r.Peer != namePasta || r.Ratio != 1.5 || !r.Verdicts[0].Pass || r.Verdicts[1].Pass {
		t.Errorf("slow: %+v", r)
	}
}

func TestFormat(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0084: "0.0084", 0.456: "0.46", 12.34: "12.3", 456.7: "457", 3437: "3437", 71234: "71.2k", 143210: "143k"} {
		if got := format(v); got != want {
			t.Errorf("format(%v) = %q, want %q", v, got, want)
		}
	}
}

func TestMarkdown(t *testing.T) {
	r := report{
		Date: "2026-01-02", Rounds: 3, Seconds: 2, Subjects: []string{nameUsernet, namePasta},
		Machine:  machine{Kernel: "6.18 x86_64", CPU: "Some CPU", CPUs: 2, Memory: 4, System: "Some Linux", Load: "0.10"},
		Sysctls:  map[string]string{"net.ipv4.tcp_rmem": "1 2 3", "net.ipv4.tcp_wmem": "4 5 6", congestionSysctl: "cubic"},
		Versions: map[string]string{"wrk": "4.1", "pasta": "2025", "nothing": ""},
		Notes:    []string{"something odd"},
		Rows: judge([]figure{{ID: "ping", Title: "ping", How: "ping -f", Unit: "µs", Lower: true, Goals: []goal{{againstBetterPeer, 1}, {goalUnit, 50}}}},
			map[string]map[string][]float64{"ping": {nameUsernet: {40, 44}, namePasta: {21}}}),
	}
	const want = `Measured 2026-01-02 on 2 × Some CPU, 4 GB, Some Linux, Linux 6.18 x86_64; load before the run 0.10.
Medians of 3 rounds of 2 s, subjects interleaved; ± is half the distance between the extremes. Guests in rootless namespaces, servers on the host namespace's loopback (tcp_rmem 1 2 3, tcp_wmem 4 5 6), TCP's default congestion control is cubic.

| measure | how | loopback | usernet | pasta | usernet ÷ better peer | goals |
|---|---|---:|---:|---:|---|---|
| ping, µs (less is better) | ping -f | – | 42.0 ±5% | 21.0 | 2.00 × pasta | ≤ 1.00 × better peer: **FAIL** (2.00); ≤ 50.0 µs: pass |

Goals reached: 1 of 2.

Versions: pasta: 2025; wrk: 4.1.

Notes:

- something odd
`
	if diff := cmp.Diff(want, markdown(r)); diff != "" {
		t.Errorf("markdown (-want +got):\n%s", diff)
	}
}

func TestFiguresAndJobs(t *testing.T) {
	ids := map[string]bool{}
	for _, f := range figures() {
		if ids[f.ID] {
			t.Errorf("two figures are called %q", f.ID)
		}
		ids[f.ID] = true
	}
	for _, f := range figures() {
		for _, g := range f.Goals {
			if strings.HasPrefix(g.Against, "=") && !ids[g.Against[1:]] {
				t.Errorf("%s: its goal is against the unknown figure %q", f.ID, g.Against)
			}
		}
	}
	all := jobs(options{Rounds: 5, Seconds: 2})
	for _, j := range all {
		if j.length > 0 && !ids[workID(j.name)] {
			t.Errorf("%s has a length, but no figure is called %q", j.name, workID(j.name))
		}
	}
	if _, err := selected(all, []string{"bulk-up", "no such job"}); err == nil {
		t.Error("an unknown job is not refused")
	}
	some, err := selected(all, []string{"req", "ping"})
	if err != nil || len(some) != 3 {
		t.Errorf("selected yields %d jobs, %v, want 3", len(some), err)
	}
	for _, tt := range []struct {
		opts  options
		limit time.Duration
	}{
		{options{Rounds: 5, Seconds: 2}, 22 * time.Minute},
		{options{Rounds: 1, Seconds: 1, Quick: true}, 220 * time.Second},
	} {
		tt.opts.Subjects = []string{nameUsernet, nameSlirp, namePasta, nameRootlessKit}
		b := &bench{opts: tt.opts, jobs: jobs(tt.opts)}
		if got := b.estimate(); got > tt.limit {
			t.Errorf("estimate(%+v) = %s, more than %s", tt.opts, got, tt.limit)
		}
	}
}

func TestRotate(t *testing.T) {
	if diff := cmp.Diff([]string{"b", "c", "a"}, rotate([]string{"a", "b", "c"}, 4)); diff != "" {
		t.Error(diff)
	}
}

func TestParseOptions(t *testing.T) {
	opts, _, _, err := parseOptions([]string{"-quick", "-only", "req,ping", "-usernet-args", "--link=tap --no-dns"})
	if err != nil {
		t.Fatal(err)
	}
	if opts.Rounds != 1 || opts.Seconds != 1 || len(opts.Only) != 2 || len(opts.UsernetArgs) != 2 {
		t.Errorf("parseOptions = %+v", opts)
	}
	if _, _, _, err := parseOptions([]string{"surplus"}); exitCode(err) != 2 {
		t.Errorf("a surplus argument: %v", err)
	}
}

// TestFlows runs the flow server and the load's client side against each other.
func TestFlows(t *testing.T) {
	var f flowServer
	addr, err := f.listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns, err := dialFlows(addr, 40, flowEcho)
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	up, err := dialFlows(addr, 1, flowUp)
	if err != nil {
		t.Fatal(err)
	}
	defer up[0].Close()
	if _, err := up[0].Write(flowZeros[:]); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for f.received.Load() != flowBuffer {
		if err := sleep(ctx, time.Millisecond); err != nil {
			t.Fatalf("received %d of %d bytes", f.received.Load(), flowBuffer)
		}
	}
}
