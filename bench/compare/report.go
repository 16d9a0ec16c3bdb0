package main

import (
	"bufio"
	"bytes"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A report is all that one run found out.
type report struct {
	Date     string            `json:"date"`
	Machine  machine           `json:"machine"`
	Rounds   int               `json:"rounds"`
	Seconds  int               `json:"seconds"`
	Quick    bool              `json:"quick"`
	Subjects []string          `json:"subjects"`
	Args     []string          `json:"usernet_args,omitempty"`
	Versions map[string]string `json:"versions"`
	Sysctls  map[string]string `json:"host_sysctls"`
	Notes    []string          `json:"notes,omitempty"`
	Rows     []row             `json:"rows"`
}

type machine struct {
	Kernel string  `json:"kernel"`
	CPU    string  `json:"cpu"`
	CPUs   int     `json:"cpus"`
	Memory float64 `json:"memory_gb"`
	System string  `json:"system"`
	Load   string  `json:"load_before"`
}

func newReport(opts options, sysctls, versions map[string]string) report {
	return report{
		Date:     time.Now().UTC().Format(time.DateOnly),
		Machine:  thisMachine(),
		Rounds:   opts.Rounds,
		Seconds:  opts.Seconds,
		Quick:    opts.Quick,
		Subjects: opts.Subjects,
		Args:     opts.UsernetArgs,
		Versions: versions,
		Sysctls:  sysctls,
	}
}

func thisMachine() machine {
	m := machine{CPUs: runtime.NumCPU()}
	var name unix.Utsname
	if err := unix.Uname(&name); err == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:]) + " " + unix.ByteSliceToString(name.Machine[:])
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		m.Memory = math.Round(float64(info.Totalram)*float64(info.Unit)/1e8) / 10
	}
	m.CPU = fileValue("/proc/cpuinfo", "model name", ":")
	m.System = strings.Trim(fileValue("/etc/os-release", "PRETTY_NAME", "="), `"`)
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(load), " ")
	}
	return m
}

// fileValue is the value of the first line with a key.
func fileValue(path, key, separator string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		k, v, ok := strings.Cut(lines.Text(), separator)
		if ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// markdown renders a report. Whatever usernet misses stands as plainly as
// what it reaches.
func markdown(r report) string {
	var b strings.Builder
	m := r.Machine
	fmt.Fprintf(&b, "Measured %s on %d × %s, %.0f GB, %s, Linux %s; load before the run %s.\n", r.Date, m.CPUs, m.CPU, m.Memory, m.System, m.Kernel, m.Load)
	fmt.Fprintf(&b, "Medians of %s of %d s, subjects interleaved; ± is half the distance between the extremes. ", plural(r.Rounds, "round"), r.Seconds)
	b.WriteString("Guests in rootless namespaces, servers on the host namespace's loopback")
	fmt.Fprintf(&b, " (tcp_rmem %s, tcp_wmem %s), TCP's default congestion control is %s.\n",
		r.Sysctls["net.ipv4.tcp_rmem"], r.Sysctls["net.ipv4.tcp_wmem"], r.Sysctls[congestionSysctl])
	if r.Quick {
		b.WriteString("A quick run: it says which way things go, not by how much.\n")
	}
	if len(r.Args) > 0 {
		fmt.Fprintf(&b, "usernet's further flags: `%s`.\n", strings.Join(r.Args, " "))
	}
	b.WriteString("\n")
	writeTable(&b, r)
	writeVerdict(&b, r)
	b.WriteString("\nVersions:")
	separator := " "
	for _, name := range sortedKeys(r.Versions) {
		if v := r.Versions[name]; v != "" {
			fmt.Fprintf(&b, "%s%s: %s", separator, name, v)
			separator = "; "
		}
	}
	b.WriteString(".\n")
	if len(r.Notes) > 0 {
		b.WriteString("\nNotes:\n\n")
		for _, n := range r.Notes {
			fmt.Fprintf(&b, "- %s\n", n)
		}
	}
	return b.String()
}

func writeTable(b *strings.Builder, r report) {
	columns := append([]string{nameLoopback}, r.Subjects...)
	fmt.Fprintf(b, "| measure | how | %s | usernet ÷ better peer | goals |\n", strings.Join(columns, " | "))
	fmt.Fprintf(b, "|---|---|%s---|---|\n", strings.Repeat("---:|", len(columns)))
	for _, row := range r.Rows {
		title := row.Title
		if row.Unit != "" {
			title += ", " + row.Unit
		}
		if row.Lower {
			title += " (less is better)"
		}
		fmt.Fprintf(b, "| %s | %s |", title, row.How)
		for _, name := range columns {
			fmt.Fprintf(b, " %s |", cell(row.Samples[name]))
		}
		ratio := ""
		if row.Peer != "" {
			ratio = fmt.Sprintf("%s × %s", format(row.Ratio), row.Peer)
		}
		fmt.Fprintf(b, " %s | %s |\n", ratio, verdicts(row))
	}
}

// cell is a median with its spread.
func cell(samples []float64) string {
	if len(samples) == 0 {
		return "–"
	}
	m := median(samples)
	if len(samples) == 1 || m == 0 {
		return format(m)
	}
	spread := (slices.Max(samples) - slices.Min(samples)) / 2 / m * 100
	return fmt.Sprintf("%s ±%.0f%%", format(m), spread)
}

func verdicts(r row) string {
	var parts []string
	for _, v := range r.Verdicts {
		sign := pick(r.Lower, "≤", "≥")
		word := pick(v.Pass, "pass", "**FAIL**")
		switch {
		case v.Against == goalUnit:
			parts = append(parts, fmt.Sprintf("%s %s %s: %s", sign, format(v.Factor), r.Unit, word))
		case v.Against[0] == '=':
			parts = append(parts, fmt.Sprintf("%s %s × own %s: %s (%s)", sign, format(v.Factor), v.Against[1:], word, format(v.Got)))
		default:
			parts = append(parts, fmt.Sprintf("%s %s × %s: %s (%s)", sign, format(v.Factor), v.Against, word, format(v.Got)))
		}
	}
	return strings.Join(parts, "; ")
}

func writeVerdict(b *strings.Builder, r report) {
	var passed, failed int
	for _, row := range r.Rows {
		for _, v := range row.Verdicts {
			if v.Pass {
				passed++
			} else {
				failed++
			}
		}
	}
	if passed+failed > 0 {
		fmt.Fprintf(b, "\nGoals reached: %d of %d.\n", passed, passed+failed)
	}
}

// format shows three digits, thousands as k.
func format(v float64) string {
	switch abs := math.Abs(v); {
	case v == 0:
		return "0"
	case abs >= 10_000:
		return strconv.FormatFloat(v/1000, 'f', pick(abs >= 100_000, 0, 1), 64) + "k"
	case abs >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case abs >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case abs >= 0.1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'g', 2, 64)
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
