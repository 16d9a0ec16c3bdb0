package main

import (
	"fmt"
	"slices"
	"strings"
)

// A figure is one line of the table.
type figure struct {
	ID    string `json:"id"`
	Title string `json:"title"`
	How   string `json:"how"`
	Unit  string `json:"unit"`
	Lower bool   `json:"lower_is_better"`
	Goals []goal `json:"goals,omitempty"`
}

// A goal is a bound on usernet's median, relative to something measured in
// the same run or, with against empty, absolute.
type goal struct {
	Against string  `json:"against"`
	Factor  float64 `json:"factor"`
}

// againstBetterPeer in a goal stands for whichever peer did better; any other
// name is a subject's, or with a leading "=" another figure of usernet's own.
const againstBetterPeer = "better peer"

const goalUnit = "" // what an absolute goal is against

// figures lists the table's lines in order.
func figures() []figure {
	var all []figure
	for _, mtu := range []int{65520, 1500} {
		for _, streams := range []int{1, 4} {
			for _, way := range []string{"up", "down"} {
				f := figure{
					ID:    bulkID(way, mtu, streams),
					Title: fmt.Sprintf("bulk TCP %s, MTU %d, %s", way, mtu, plural(streams, "stream")),
					How:   "iperf3", Unit: "Gbit/s",
				}
				switch {
				case mtu == 1500:
					f.Goals = []goal{{againstBetterPeer, 6}, {"=" + bulkID(way, 65520, streams), 0.95}}
				case streams == 1:
					f.Goals = []goal{{againstBetterPeer, 1.3}, {nameLoopback, 0.6}}
				}
				all = append(all, f)
			}
		}
	}
	for _, mtu := range []int{65520, 1500} {
		for _, way := range []string{"up", "down"} {
			all = append(all, figure{
				ID:    "cpu-" + bulkID(way, mtu, 1),
				Title: fmt.Sprintf("CPU per GB %s, MTU %d", way, mtu),
				How:   "utime + stime of the subject's processes", Unit: "s/GB", Lower: true,
				Goals: []goal{{againstBetterPeer, 0.8}},
			})
		}
	}
	atLeastPeer := []goal{{againstBetterPeer, 1}}
	all = append(all,
		figure{ID: "req-1", Title: "requests, 1 connection", How: "wrk -c1, keep-alive, nginx", Unit: "1/s", Goals: atLeastPeer},
		figure{ID: "req-32", Title: "requests, 32 connections", How: "wrk -c32, keep-alive, nginx", Unit: "1/s", Goals: atLeastPeer},
		figure{ID: "conn-16", Title: "connections, 16 clients", How: "wrk -c16, Connection: close", Unit: "1/s", Goals: atLeastPeer},
		figure{ID: "conn-stall", Title: "longest time without a request done, 16 clients", How: "nginx's counter, every 50 ms", Unit: "s", Lower: true, Goals: []goal{{goalUnit, 1}}},
	)
	for _, size := range []int{1400, 200} {
		for _, way := range []string{"up", "down"} {
			all = append(all, figure{
				ID: udpID(way, size), Title: fmt.Sprintf("UDP %s, %d B, received", way, size),
				How: "iperf3 -u -b 0", Unit: "1/s", Goals: atLeastPeer,
			})
		}
	}
	all = append(all,
		figure{ID: "dns-known", Title: "DNS, 1000 names again and again", How: "dnsperf, asking .3", Unit: "1/s", Goals: []goal{{"=dns-direct", 0.8}}},
		figure{ID: "dns-new", Title: "DNS, every name once", How: "dnsperf, asking .3", Unit: "1/s", Goals: []goal{{"=dns-direct", 0.8}}},
		figure{ID: "dns-direct", Title: "DNS, dnsmasq asked directly through the TAP", How: "dnsperf, asking .2", Unit: "1/s"},
		figure{ID: "ping", Title: "ping to the gateway, mean", How: "ping -f", Unit: "µs", Lower: true, Goals: []goal{{nameSlirp, 1.2}}},
		figure{ID: "start", Title: "start: exec until ready", How: "ready-fd; pasta: going into the background", Unit: "ms", Lower: true, Goals: []goal{{goalUnit, 60}}},
		figure{ID: "memory", Title: "memory, idle after start", How: "PSS of all processes", Unit: "MB", Lower: true, Goals: []goal{{goalUnit, 20}}},
		figure{ID: "flow-memory", Title: "memory per idle TCP flow, 2000 flows", How: "PSS difference, but for the first 100", Unit: "KB", Lower: true, Goals: []goal{{goalUnit, 8}}},
		figure{ID: "idle-cpu", Title: "CPU with 1000 idle flows", How: "scheduler's run time", Unit: "%", Lower: true, Goals: []goal{{goalUnit, 0.1}}},
	)
	fastest := []goal{{againstBetterPeer, 1}, {nameLoopback, 0.7}}
	all = append(all,
		figure{ID: inBulkID("up"), Title: "published TCP port, guest sends", How: "iperf3, 1 stream, from the host's loopback", Unit: "Gbit/s", Goals: fastest},
		figure{ID: inBulkID("down"), Title: "published TCP port, guest receives", How: "iperf3, 1 stream, from the host's loopback", Unit: "Gbit/s", Goals: fastest},
		figure{ID: "in-conn-16", Title: "published TCP port, connections, 16 clients", How: "wrk -c16, Connection: close, nginx", Unit: "1/s", Goals: atLeastPeer},
		figure{ID: "in-flow-memory", Title: fmt.Sprintf("memory per idle flow of a published port, %d flows", inIdleFlows), How: "PSS difference", Unit: "KB", Lower: true, Goals: []goal{{goalUnit, 3}}},
		figure{ID: "in-pipes", Title: "pipes that they hold", How: "descriptors", Unit: "", Lower: true, Goals: []goal{{goalUnit, 0}}},
	)
	for _, f := range slices.Clone(all) {
		if f.Unit == "1/s" && !strings.HasPrefix(f.ID, "in-") {
			all = append(all, figure{ID: workID(f.ID), Title: "CPU for one of: " + f.Title, How: "the subject's processes", Unit: "µs", Lower: true})
		}
	}
	for _, way := range []string{"up", "down"} {
		for _, n := range flowCounts {
			all = append(all, figure{
				ID: flowsID(way, n), Title: fmt.Sprintf("bulk TCP %s, %s", way, plural(n, "flow")),
				How: "own load, MTU 65520", Unit: "Gbit/s",
			})
		}
	}
	for _, mtu := range []int{65520, 1500} {
		all = append(all, figure{
			ID: retransID(mtu), Title: fmt.Sprintf("guest's retransmits per GB up, MTU %d", mtu),
			How: "iperf3, 1 stream", Unit: "", Lower: true,
		})
	}
	return all
}

// flowCounts are the points of the scaling chart.
var flowCounts = []int{1, 100, 1000}

func bulkID(way string, mtu, streams int) string {
	return fmt.Sprintf("bulk-%s-%d-%d", way, mtu, streams)
}

func udpID(way string, size int) string { return fmt.Sprintf("udp-%s-%d", way, size) }

func flowsID(way string, n int) string { return fmt.Sprintf("flows-%s-%d", way, n) }

func retransID(mtu int) string { return fmt.Sprintf("retransmits-%d", mtu) }

// workID names the CPU time that a unit of another figure costs.
func workID(id string) string { return "work-" + id }

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// A row is a figure with what was measured.
type row struct {
	figure
	Samples  map[string][]float64 `json:"samples"`
	Median   map[string]float64   `json:"median"`
	Peer     string               `json:"better_peer,omitempty"`
	Ratio    float64              `json:"ratio,omitempty"` // usernet's median over the better peer's
	Verdicts []verdict            `json:"verdicts,omitempty"`
}

// A verdict is a goal beside what was reached.
type verdict struct {
	goal
	Bound float64 `json:"bound"` // in the figure's unit
	Got   float64 `json:"got"`   // the factor reached; the figure itself for an absolute goal
	Pass  bool    `json:"pass"`
}

// judge turns samples, by figure and subject, into rows with ratios and
// verdicts. Figures without a sample are left out.
func judge(figs []figure, samples map[string]map[string][]float64) []row {
	var rows []row
	medians := map[string]map[string]float64{}
	for _, f := range figs {
		r := row{figure: f, Samples: samples[f.ID], Median: map[string]float64{}}
		for name, s := range r.Samples {
			if len(s) > 0 {
				r.Median[name] = median(s)
			}
		}
		if len(r.Median) > 0 {
			medians[f.ID] = r.Median
			rows = append(rows, r)
		}
	}
	for i := range rows {
		r := &rows[i]
		ours, ok := r.Median[nameUsernet]
		peer, theirs := betterPeer(r.Median, r.Lower)
		if !ok {
			continue
		}
		if peer != "" && theirs != 0 {
			r.Peer, r.Ratio = peer, ours/theirs
		}
		for _, g := range r.Goals {
			base, ok := 1.0, true
			switch {
			case g.Against == goalUnit:
			case g.Against == againstBetterPeer:
				base, ok = theirs, peer != ""
			case g.Against[0] == '=':
				base, ok = medians[g.Against[1:]][nameUsernet]
			default:
				base, ok = r.Median[g.Against]
			}
			if !ok || base == 0 {
				continue
			}
			v := verdict{goal: g, Bound: base * g.Factor, Got: ours / base}
			v.Pass = pick(r.Lower, ours <= v.Bound, ours >= v.Bound)
			r.Verdicts = append(r.Verdicts, v)
		}
	}
	return rows
}

// betterPeer picks the peer whose median is best.
func betterPeer(medians map[string]float64, lower bool) (string, float64) {
	best, value := "", 0.0
	for _, name := range []string{nameSlirp, namePasta, nameRootlessKit} {
		m, ok := medians[name]
		if !ok {
			continue
		}
		if best == "" || pick(lower, m < value, m > value) {
			best, value = name, m
		}
	}
	return best, value
}

func median(samples []float64) float64 {
	s := slices.Sorted(slices.Values(samples))
	mid := len(s) / 2
	if len(s)%2 == 1 {
		return s[mid]
	}
	return (s[mid-1] + s[mid]) / 2
}
