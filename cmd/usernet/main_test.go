package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/rig"
)

func TestMain(m *testing.M) {
	usernet.AgentMain()
	spacesMain()
	rig.Main(m)
}

// call runs usernet in this process, with nothing on its stdin.
func call(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	status = run(context.Background(), append([]string{"usernet"}, args...), strings.NewReader(""), &out, &err)
	return status, out.String(), err.String()
}

// TestHelp: every command explains itself on stdout, and what is off by default
// is said to be.
func TestHelp(t *testing.T) {
	for _, tt := range []struct {
		args     []string
		want     []string
		attaches bool // and so has --ready-fd
	}{
		{[]string{"--help"}, []string{"--netns", "--host-loopback", "off by default", "Exit status", "usernet run"}, true},
		{[]string{"run", "--help"}, []string{"--keep-id", "--host-loopback", "off by default", "127", "default warn"}, false},
		{[]string{"doctor", "--help"}, []string{"--json", "Exit status"}, false},
		{[]string{"version", "--help"}, []string{"--json"}, false},
		{[]string{"completion", "--help"}, []string{"bash"}, false},
		{[]string{"completion"}, []string{"bash", "completion SHELL"}, false},
		{[]string{"completion", "bash", "--help"}, []string{"source"}, false},
		{[]string{"forward"}, []string{"forward COMMAND", "add"}, false},
		{[]string{"dns", "--help"}, []string{"dns COMMAND", "set"}, false},
		{[]string{"flows", "--help"}, []string{"--json"}, false},
		{[]string{"help"}, []string{"--netns"}, true},
		{[]string{"help", "run"}, []string{"--keep-id"}, false},
	} {
		status, stdout, stderr := call(t, tt.args...)
		if status != exitOK || stderr != "" {
			t.Errorf("usernet %v: status %d, stderr %q", tt.args, status, stderr)
		}
		for _, w := range tt.want {
			if !strings.Contains(strings.Join(strings.Fields(stdout), " "), w) {
				t.Errorf("usernet %v does not mention %q:\n%s", tt.args, w, stdout)
			}
		}
		if strings.Contains(stdout, "--ready-fd") != tt.attaches {
			t.Errorf("usernet %v has the wrong flags:\n%s", tt.args, stdout)
		}
		for line := range strings.Lines(stdout) {
			if len(line) > 100 {
				t.Errorf("usernet %v: a line of %d bytes: %s", tt.args, len(line), line)
			}
		}
	}
}

// TestCompletion: the shells get scripts, and the flags their words.
func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if status, stdout, _ := call(t, "completion", shell); status != exitOK || !strings.Contains(stdout, "usernet") {
			t.Errorf("completion %s: status %d, %d bytes", shell, status, len(stdout))
		}
	}
	for _, tt := range []struct{ args, want string }{
		{"--link ", "veth"},
		{"--ipv6 ", "off"},
		{"run --log-level ", "debug"},
		{"--host-", "--host-loopback"},
		{"ru", "run"},
	} {
		args := append([]string{"__complete"}, strings.Split(tt.args, " ")...)
		if _, stdout, _ := call(t, args...); !strings.Contains(stdout, tt.want) {
			t.Errorf("completion of %q has no %q: %s", tt.args, tt.want, stdout)
		}
	}
}

func TestVersion(t *testing.T) {
	_, plain, _ := call(t, "version")
	_, flag, _ := call(t, "--version")
	_, asJSON, _ := call(t, "version", "--json")
	if !strings.HasPrefix(plain, "usernet ") || strings.Count(plain, "\n") != 1 {
		t.Errorf("version: %q", plain)
	}
	if flag != plain {
		t.Errorf("--version says %q, version says %q", flag, plain)
	}
	if !strings.Contains(asJSON, `"go":"go1.`) {
		t.Errorf("version --json: %q", asJSON)
	}
}
