package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A bench runs the jobs in the host namespace and gathers the samples.
type bench struct {
	opts     options
	work     string
	cred     *syscall.Credential // whom the measured processes run as
	log      *os.File            // their messages
	sysctls  map[string]string
	nextPort int
	nextWeb  int
	flows    flowServer

	jobs    []job
	begin   time.Time
	left    time.Duration // of the estimate
	samples map[string]map[string][]float64
	notes   []string
}

func (b *bench) run(ctx context.Context) error {
	var err error
	if b.jobs, err = selected(jobs(b.opts), b.opts.Only); err != nil {
		return err
	}
	logPath := filepath.Join(b.opts.Out, "compare.log")
	if b.log, err = os.Create(logPath); err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer b.log.Close()
	report := newReport(b.opts, b.sysctls, b.versions(ctx))
	if err := b.startServers(ctx); err != nil {
		return fmt.Errorf("%w (%s)", err, logPath)
	}
	b.warn(report.Machine)
	b.samples = map[string]map[string][]float64{}
	b.begin = time.Now()
	b.left = b.estimate()
	fmt.Fprintf(os.Stderr, "%s on %s, about %s\n", plural(b.opts.Rounds, "round"), strings.Join(b.opts.Subjects, ", "), b.left.Round(10*time.Second))
	for round := range b.opts.Rounds {
		b.round(ctx, round)
		if ctx.Err() != nil {
			b.note("interrupted in round %d", round+1)
			break
		}
	}
	report.Rows = judge(figures(), b.samples)
	report.Notes = b.notes
	return writeReport(report, b.opts.Out)
}

// warn notes what makes the figures of this run unlike those of others.
func (b *bench) warn(m machine) {
	if load, err := strconv.ParseFloat(m.Load, 64); err == nil && load > 0.5 {
		b.note("the machine was busy with something else when the run began (load %s): do not quote these figures", m.Load)
	}
	for _, name := range []string{"GOMAXPROCS", "GOGC", "GOMEMLIMIT", "GODEBUG"} {
		if v := os.Getenv(name); v != "" {
			b.note("usernet ran with %s=%s", name, v)
		}
	}
}

// round runs every job once, each against all subjects in turn, so that what
// slows the machine for a while slows them all.
func (b *bench) round(ctx context.Context, round int) {
	order := rotate(b.opts.Subjects, round)
	for _, j := range b.jobs {
		if b.due(j, round) && ctx.Err() == nil {
			b.runJob(ctx, j, round, order)
		}
	}
}

func (b *bench) due(j job, round int) bool {
	return j.rounds == 0 || round < j.rounds
}

func (b *bench) runJob(ctx context.Context, j job, round int, order []string) {
	if j.loopback {
		order = append([]string{nameLoopback}, order...)
	}
	fmt.Fprintf(os.Stderr, "%6s left, round %d  %-18s", b.left.Round(time.Second), round+1, j.name)
	for _, name := range order {
		if ctx.Err() != nil {
			break
		}
		if !j.suits(name) {
			continue
		}
		s, err := b.runOne(ctx, j, name)
		if err != nil && ctx.Err() == nil {
			fmt.Fprintf(os.Stderr, "  %s failed", name)
			b.note("%s: %s, round %d: %v", name, j.name, round+1, err)
		}
		b.add(name, s)
		fmt.Fprint(os.Stderr, progress(name, s))
		b.left = max(0, b.left-time.Duration(j.seconds*float64(time.Second)))
	}
	fmt.Fprintln(os.Stderr)
}

// runOne starts a subject for the job and ends it afterwards: what one job
// leaves behind, queued data say, must not slow the next one.
func (b *bench) runOne(ctx context.Context, j job, name string) (samples, error) {
	b.awaitIdle(ctx)
	if j.alone != nil {
		return j.alone(ctx, b, name)
	}
	in := loopbackInstance()
	if name != nameLoopback {
		var err error
		if in, err = b.start(ctx, name, j.mtu); err != nil {
			return nil, err
		}
		defer in.stop()
	}
	before, err := in.cpu()
	if err != nil {
		return nil, err
	}
	s, err := j.run(ctx, b, in)
	if err == nil && !in.running() {
		err = errors.New("the subject ended by itself")
	}
	if err != nil {
		return nil, err
	}
	after, err := in.cpu()
	if err != nil {
		return nil, err
	}
	if rate := s[j.name]; in.guest != nil && j.length > 0 && len(rate) == 1 && rate[0] > 0 {
		s[workID(j.name)] = []float64{float64((after - before).Microseconds()) / (rate[0] * float64(j.length))}
	}
	return s, nil
}

// awaitIdle waits for a moment in which the machine does nothing else, for as
// long as the options allow.
func (b *bench) awaitIdle(ctx context.Context) {
	const look = 150 * time.Millisecond
	for end := time.Now().Add(b.opts.Patience); time.Now().Before(end); {
		before := cpuIdle()
		if sleep(ctx, look) != nil {
			return
		}
		idle := cpuIdle() - before
		if idle > look*time.Duration(runtime.NumCPU())*85/100 {
			return
		}
	}
}

func (b *bench) add(name string, s samples) {
	for id, values := range s {
		if b.samples[id] == nil {
			b.samples[id] = map[string][]float64{}
		}
		b.samples[id][name] = append(b.samples[id][name], values...)
	}
}

// note keeps something that the reader of the table must know.
func (b *bench) note(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Fprintln(b.log, text)
	b.notes = append(b.notes, text)
}

// estimate is the time the whole run will take.
func (b *bench) estimate() time.Duration {
	var seconds float64
	for round := range b.opts.Rounds {
		for _, j := range b.jobs {
			if b.due(j, round) {
				seconds += j.seconds * float64(b.subjects(j))
			}
		}
	}
	return time.Duration(seconds * float64(time.Second))
}

// subjects is how many a job is run on.
func (b *bench) subjects(j job) (n int) {
	for _, name := range b.opts.Subjects {
		if j.suits(name) {
			n++
		}
	}
	return n + pick(j.loopback, 1, 0)
}

// progress shows a job's samples in figure order.
func progress(name string, s samples) string {
	var text strings.Builder
	for _, f := range figures() {
		if v := s[f.ID]; len(v) > 0 {
			fmt.Fprintf(&text, " %s", format(median(v)))
		}
	}
	if text.Len() == 0 {
		return ""
	}
	return "  " + name + text.String()
}

func rotate(list []string, by int) []string {
	by %= len(list)
	return slices.Concat(list[by:], list[:by])
}

// writeReport writes the JSON and the table.
func writeReport(r report, dir string) error {
	data, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, jsonFile), append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	text := markdown(r)
	if err := os.WriteFile(filepath.Join(dir, tableFile), []byte(text), 0o644); err != nil {
		return fmt.Errorf("write table: %w", err)
	}
	fmt.Println(text)
	return nil
}
