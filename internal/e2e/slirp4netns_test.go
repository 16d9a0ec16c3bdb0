package e2e

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
func inWorld(t *testing.T, script, program string) map[string]string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a host for the ordinary user of the test")
	}
	rig.NeedTun(t)
	rig.NeedTools(t, "bash", "busybox", "dig", "dnsmasq", "ip", "ncat", "nsenter", "ping", "pgrep", "python3", "setpriv", "socat", "unshare", "newuidmap")
	from, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	// The ordinary user may not be able to read this tree.
	dir := worldDir(t)
	for _, name := range []string{"world.sh", "bess.py", script} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "world.sh"), dir, filepath.Join(dir, script), program)
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", script, err, out)
	}
	checks := make(map[string]string)
	for lines := bufio.NewScanner(strings.NewReader(string(out))); lines.Scan(); {
		if name, ok := strings.CutPrefix(lines.Text(), "ok "); ok {
			checks[name] = ""
		} else if rest, ok := strings.CutPrefix(lines.Text(), "FAIL "); ok {
			name, why, _ := strings.Cut(rest, ":")
			checks[name] = why
		}
	}
	if len(checks) == 0 {
		t.Errorf("%s has checked nothing:\n%s", script, out)
	}
	return checks
}

// differences are the checks that the original does not pass; the reasons
// stand in docs/slirp4netns.md.
var differences = map[string]bool{
	"banner":           true, // it comes when the buffer is full, or never
	"api-list-manual":  true,
	"api-remove-again": true,
	"api-add-ipv6":     true,
	"forward-ipv6":     true,
	"no-tapname":       true, // releases differ in what they say
}

// TestSlirp4netns runs the same checks on the original and on usernet under its
// name.
func TestSlirp4netns(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	t.Run("usernet", func(t *testing.T) {
		t.Parallel()
		for name, why := range inWorld(t, "slirp4netns.sh", asSlirp4netns(t)) {
			if why != "" {
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
	for _, c := range []struct {
		name  string
		tools []string
	}{
		{"podman", []string{"podman", "conmon", "crun"}},
		{"rootlesskit", []string{"rootlesskit"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			rig.NeedTools(t, c.tools...)
			for name, why := range inWorld(t, c.name+".sh", asSlirp4netns(t)) {
				if why != "" {
					t.Errorf("%s:%s", name, why)
				}
			}
		})
	}
}
