// Command compare measures usernet side by side with the peers installed on this machine.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// options are the settings of one run. They travel from the command line to
// the process inside the host namespace as a JSON file.
type options struct {
	Quick       bool
	Rounds      int
	Seconds     int
	Only        []string
	Subjects    []string
	Usernet     string
	UsernetArgs []string
	Slirp       string
	Pasta       string
	RootlessKit string
	Out         string
	Congestion  string // of TCP in all namespaces; "": the machine's
	UID         int
	Patience    time.Duration
	Built       string // what the usernet binary was built from, for the report
}

const usage = `usage: compare [flags]

Measures bulk transfer, requests, connections, datagrams, published ports, DNS, ping, start time,
memory and idle CPU of usernet, slirp4netns and pasta, interleaved, and published ports
of RootlessKit's builtin driver, with guests in rootless namespaces and every server on the loopback of a network namespace of its
own: no packet leaves the machine. Writes compare.md, compare.json and two charts.

`

func main() {
	// The children ask for a signal at the death of the thread that forked
	// them: keep that thread.
	runtime.LockOSThread()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case roleHost:
			os.Exit(exitCode(hostMain(os.Args[2:])))
		case roleGuest:
			os.Exit(exitCode(guestMain(os.Args[2:])))
		case roleServe:
			os.Exit(exitCode(serveMain(os.Args[2:])))
		case roleLoad:
			os.Exit(exitCode(loadMain(os.Args[2:])))
		}
	}
	os.Exit(exitCode(run(os.Args[1:])))
}

func exitCode(err error) int {
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2
	}
	fmt.Fprintf(os.Stderr, "compare: %v\n", err)
	return 1
}

var errUsage = errors.New("usage")

// parseOptions reads the command line.
func parseOptions(args []string) (opts options, chart, list bool, err error) {
	var only, subjects, usernetArgs string
	flags := flag.NewFlagSet("compare", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	flags.BoolVar(&opts.Quick, "quick", false, "one short round, three and a half minutes; says which way things go, not by how much")
	flags.IntVar(&opts.Rounds, "rounds", 0, "interleaved rounds whose medians are shown (default 5, quick 1)")
	flags.IntVar(&opts.Seconds, "seconds", 0, "length of one transfer (default 2, quick 1)")
	flags.StringVar(&only, "only", "", "comma-separated job names or their beginnings (see -list)")
	flags.BoolVar(&list, "list", false, "list the jobs and exit")
	flags.StringVar(&subjects, "subjects", "usernet,slirp4netns,pasta,rootlesskit", "comma-separated subjects; those not installed are left out")
	flags.StringVar(&opts.Usernet, "usernet", "", "the usernet binary (default: built from ./cmd/usernet)")
	flags.StringVar(&usernetArgs, "usernet-args", "", "further space-separated flags for usernet")
	flags.StringVar(&opts.Slirp, "slirp4netns", "slirp4netns", "the slirp4netns binary")
	flags.StringVar(&opts.Pasta, "pasta", "pasta", "the pasta binary")
	flags.StringVar(&opts.RootlessKit, "rootlesskit", "", "the rootlesskit binary (default: version 3, built from the e2e tests' module)")
	flags.StringVar(&opts.Out, "out", filepath.Join("bench", "results"), "directory for the results")
	flags.StringVar(&opts.Congestion, "congestion", "", "TCP's congestion control in all namespaces, such as reno (default: the machine's)")
	flags.IntVar(&opts.UID, "uid", 1000, "uid and gid that everything is dropped to when this is run as root")
	flags.DurationVar(&opts.Patience, "patience", 0, "before each sample, wait up to so long until the machine does nothing else")
	flags.BoolVar(&chart, "chart", true, "draw the charts (downloads the chart module's dependencies the first time)")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return opts, false, false, err
		}
		return opts, false, false, errUsage
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "compare: unexpected argument %q\n", flags.Arg(0))
		return opts, false, false, errUsage
	}
	if opts.Rounds == 0 {
		opts.Rounds = pick(opts.Quick, 1, 5)
	}
	if opts.Seconds == 0 {
		opts.Seconds = pick(opts.Quick, 1, 2)
	}
	opts.Only = splitList(only)
	opts.Subjects = splitList(subjects)
	opts.UsernetArgs = strings.Fields(usernetArgs)
	return opts, chart, list, nil
}

func run(args []string) error {
	opts, chart, list, err := parseOptions(args)
	if err != nil {
		return err
	}
	if list {
		for _, j := range jobs(opts) {
			fmt.Printf("%-18s %s\n", j.name, j.how)
		}
		return nil
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	root, err := moduleRoot()
	if err != nil {
		return err
	}
	if !filepath.IsAbs(opts.Out) {
		opts.Out = filepath.Join(root, opts.Out)
	}
	if err := os.MkdirAll(opts.Out, 0o755); err != nil {
		return fmt.Errorf("make results directory: %w", err)
	}
	work, err := makeWorkDir(opts)
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := findSubjects(ctx, &opts, root, work); err != nil {
		return err
	}
	config, err := json.Marshal(opts)
	if err != nil {
		return fmt.Errorf("encode options: %w", err)
	}
	if err := os.WriteFile(filepath.Join(work, optionsFile), config, 0o644); err != nil {
		return fmt.Errorf("write options: %w", err)
	}
	started := time.Now()
	if err := runInHostNamespace(ctx, work); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "took %s\n", time.Since(started).Round(time.Second))
	if chart {
		if err := drawCharts(ctx, root, opts.Out); err != nil {
			fmt.Fprintf(os.Stderr, "compare: %v (the figures are complete without it)\n", err)
		}
	}
	return nil
}

// findSubjects resolves the binaries, builds usernet when no path was given,
// and drops the subjects that are not there.
func findSubjects(ctx context.Context, opts *options, root, work string) error {
	var found []string
	for _, name := range opts.Subjects {
		var err error
		switch name {
		case nameUsernet:
			if opts.Usernet == "" {
				opts.Usernet = filepath.Join(work, "usernet")
				opts.Built, err = buildUsernet(ctx, root, opts.Usernet)
			} else {
				opts.Usernet, err = absBinary(opts.Usernet)
			}
		case nameSlirp:
			opts.Slirp, err = absBinary(opts.Slirp)
		case namePasta:
			opts.Pasta, err = absBinary(opts.Pasta)
		case nameRootlessKit:
			if opts.RootlessKit == "" {
				opts.RootlessKit = filepath.Join(work, "rootlesskit")
				err = buildRootlessKit(ctx, root, opts.RootlessKit)
			} else {
				opts.RootlessKit, err = absBinary(opts.RootlessKit)
			}
		default:
			fmt.Fprintf(os.Stderr, "compare: no subject is called %q\n", name)
			return errUsage
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "compare: leaving %s out: %v\n", name, err)
			continue
		}
		found = append(found, name)
	}
	if len(found) == 0 {
		return errors.New("find subjects: none is installed")
	}
	opts.Subjects = found
	return nil
}

// buildUsernet builds the command as a release would be and says from what.
func buildUsernet(ctx context.Context, root, target string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", target, "./cmd/usernet")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build usernet: %w: %s", err, firstLine(out))
	}
	git := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--tags")
	git.Dir = root
	out, err := git.Output()
	if err != nil {
		return "unknown revision", nil
	}
	return strings.TrimSpace(string(out)), nil
}

// buildRootlessKit builds the release that the end-to-end tests run, too.
func buildRootlessKit(ctx context.Context, root, target string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", target, "github.com/rootless-containers/rootlesskit/v3/cmd/rootlesskit")
	cmd.Dir = filepath.Join(root, "internal", "e2e", "testdata", "rootlesskit")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build rootlesskit: %w: %s", err, firstLine(out))
	}
	return nil
}

func absBinary(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// makeWorkDir makes a scratch directory that the measured processes may write
// to, with a copy of this program in it: what "go run" builds is unreachable
// for another uid.
func makeWorkDir(opts options) (string, error) {
	work, err := os.MkdirTemp("", "usernet-compare-")
	if err != nil {
		return "", fmt.Errorf("make work directory: %w", err)
	}
	if err := fillWorkDir(work, opts); err != nil {
		os.RemoveAll(work)
		return "", err
	}
	return work, nil
}

func fillWorkDir(work string, opts options) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("read own binary: %w", err)
	}
	if err := os.WriteFile(filepath.Join(work, selfFile), self, 0o755); err != nil {
		return fmt.Errorf("copy own binary: %w", err)
	}
	if err := os.Chmod(work, 0o755); err != nil {
		return fmt.Errorf("open work directory: %w", err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(work, opts.UID, opts.UID); err != nil {
			return fmt.Errorf("give work directory away: %w", err)
		}
	}
	return nil
}

// moduleRoot is the directory of the go.mod above the current directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find module: %w", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("find module: no go.mod here or above: run this inside the source tree")
		}
		dir = parent
	}
}

// drawCharts runs the chart command. It is a module of its own, so that the
// fonts and renderers it needs are no dependency of usernet.
func drawCharts(ctx context.Context, root, out string) error {
	cmd := exec.CommandContext(ctx, "go", "run", ".", filepath.Join(out, jsonFile), out)
	cmd.Dir = filepath.Join(root, "bench", "compare", "chart")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("draw charts: %w", err)
	}
	return nil
}

func pick[T any](cond bool, yes, no T) T {
	if cond {
		return yes
	}
	return no
}

func splitList(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

func firstLine(out []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}
