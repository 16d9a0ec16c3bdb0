package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// asSlirp4netns makes a name for the binary under which it is slirp4netns.
func asSlirp4netns(t *testing.T) string {
	t.Helper()
	dir := worldDir(t)
	path := filepath.Join(dir, "slirp4netns")
	if err := os.Symlink(rig.Binary(t), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// worldDir is a directory that everybody may look into. What others than root
// own in it goes with it.
func worldDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "world")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// inWorld runs a script of testdata where world.sh prepares its place, and
// returns what its checks say: "" or what went wrong, by name.
func inWorld(t *testing.T, script string, args ...string) map[string]string {
	t.Helper()
	checks := make(map[string]string)
	out := runInWorld(t, script, args...)
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(line, "\n")
		if name, ok := strings.CutPrefix(line, "ok "); ok {
			checks[name] = ""
		} else if rest, ok := strings.CutPrefix(line, "FAIL "); ok {
			name, why, _ := strings.Cut(rest, ":")
			checks[name] = why
		}
	}
	if len(checks) == 0 {
		t.Errorf("%s has checked nothing:\n%s", script, out)
	}
	return checks
}

// runInWorld runs a script of testdata where world.sh prepares its place, and
// returns what it says.
func runInWorld(t *testing.T, script string, args ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a host for the ordinary user of the test")
	}
	rig.NeedTun(t)
	rig.NeedTools(t, "bash", "busybox", "dig", "dnsmasq", "ip", "ncat", "nsenter", "ping", "pgrep", "python3", "setpriv", "socat", "unshare", "newuidmap")
	// The ordinary user may not be able to read this tree.
	dir := worldDir(t)
	files, err := filepath.Glob("testdata/*.*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	args = append([]string{dir, filepath.Join(dir, script)}, args...)
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "world.sh"), args...)
	timer := time.AfterFunc(10*time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// differences are the checks that the original does not pass; the reasons
// stand in docs/slirp4netns.md.
var differences = map[string]bool{
	"banner":           true, // it comes when the buffer is full, or never
	"api-list-manual":  true,
	"api-remove-again": true,
	"api-add-ipv6":     true,
	"forward-ipv6":     true,
	"forward-ipv6-udp": true,
	"no-tapname":       true, // releases differ in what they say
	"dhcp-more":        true,
	"ping-unreachable": true,
	"udp-refused":      true,

	// It may die of it, by what it has to say and when.
	"broken-pipe":       true,
	"broken-pipe-lives": true,
}

// TestSlirp4netns runs the same checks on the original and on usernet under its
// name.
func TestSlirp4netns(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	t.Run("usernet", func(t *testing.T) {
		t.Parallel()
		// The race detector brings cgo, with which usernet cannot confine itself.
		race := strings.Contains(os.Getenv("USERNET_RIG_BUILD"), "-race")
		for name, why := range inWorld(t, "slirp4netns.sh", asSlirp4netns(t)) {
			if why != "" && (name != "locked" || !race) {
				t.Errorf("%s:%s", name, why)
			}
		}
	})
	t.Run("original", func(t *testing.T) {
		t.Parallel()
		rig.NeedTools(t, "slirp4netns")
		original, err := exec.LookPath("slirp4netns")
		if err != nil {
			t.Fatal(err)
		}
		for name, why := range inWorld(t, "slirp4netns.sh", original) {
			if why != "" && !differences[name] {
				t.Errorf("the original differs in %s:%s", name, why)
			}
		}
	})
}

// TestSlirp4netnsClients runs programs that spawn slirp4netns.
func TestSlirp4netnsClients(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	dir := worldDir(t)
	// A newer RootlessKit than the system's is the release that
	// testdata/rootlesskit names.
	newKit := sync.OnceValues(func() (string, error) {
		path := filepath.Join(dir, "rootlesskit")
		cmd := exec.CommandContext(t.Context(), "go", "build", "-o", path, "github.com/rootless-containers/rootlesskit/v3/cmd/rootlesskit")
		cmd.Dir = "testdata/rootlesskit"
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%w\n%s", err, out)
		}
		return path, nil
	})
	podman := []string{"podman", "conmon", "crun"}
	docker := []string{"dockerd", "docker", "containerd", "iptables", "rootlesskit"}
	for _, c := range []struct {
		name, script string
		args         []string // besides the program
		tools        []string
		kit          bool // the newer one
	}{
		{"podman row", "podman.sh", []string{"row"}, podman, false},
		{"docker", "docker.sh", nil, docker, false},
		{"docker on rootlesskit v3", "docker.sh", nil, docker, true},
		{"podman ports", "podman.sh", []string{"ports"}, podman, false},
		{"podman pods", "podman.sh", []string{"pods"}, podman, false},
		{"podman options", "podman.sh", []string{"options"}, podman, false},
		{"rootlesskit", "rootlesskit.sh", nil, []string{"rootlesskit", "rootlessctl"}, false},
		{"rootlesskit v3", "rootlesskit.sh", nil, []string{"rootlessctl"}, true},
		{"buildkit", "buildkit.sh", nil, []string{"rootlesskit"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath("buildkitd"); c.name == "buildkit" && err != nil {
				t.Skip("BuildKit is not installed, and takes longer to build than all tests to run")
			}
			rig.NeedTools(t, c.tools...)
			args := append([]string{asSlirp4netns(t)}, c.args...)
			if c.kit {
				path, err := newKit()
				if err != nil {
					rig.Missing(t, "cannot build RootlessKit: %v", err)
				}
				args = append(args, path)
			}
			for name, why := range inWorld(t, c.script, args...) {
				if why != "" {
					t.Errorf("%s:%s", name, why)
				}
			}
		})
	}
}

// TestPodmanSpeed: what a container gets, beside what it gets from the original.
// It takes three minutes of a machine that has nothing else to do.
func TestPodmanSpeed(t *testing.T) {
	if os.Getenv(perfVariable) == "" {
		t.Skipf("takes long: set %s to measure", perfVariable)
	}
	rig.NeedUsernet(t)
	rig.NeedTools(t, "podman", "conmon", "crun", "iperf3", "slirp4netns")
	original, err := exec.LookPath("slirp4netns")
	if err != nil {
		t.Fatal(err)
	}
	usernet := asSlirp4netns(t)
	rates := make(map[string][]float64) // by what is measured, and program
	out := runInWorld(t, "speed.sh", "5", "3", original, usernet)
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 4 && f[0] == "speed" {
			rate, err := strconv.ParseFloat(f[3], 64)
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			rates[f[1]+f[2]] = append(rates[f[1]+f[2]], rate/1e9)
		}
	}
	median := func(what string) float64 {
		v := rates[what]
		if len(v) == 0 {
			t.Fatalf("no figures for %s:\n%s", what, out)
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	for _, what := range []string{"out", "in", "published-in", "published-out"} {
		ours, theirs := median(what+usernet), median(what+original)
		t.Logf("%-14s %6.2f Gbit/s, slirp4netns %5.2f: %.1f times", what, ours, theirs, ours/theirs)
		if os.Getenv(perfVariable) == "1" && ours < 1.5*theirs {
			t.Errorf("%s: not one and a half times as fast", what)
		}
	}
}
