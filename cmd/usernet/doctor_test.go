package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/usernet/usernet/internal/rig"
)

// findings of one run of the doctor, by name.
type findings map[string]finding

func consult(t *testing.T, n *rig.Node, status int) (report, findings) {
	t.Helper()
	out := n.Run(t, rig.Binary(t), "doctor", "--json")
	if out.Code != status || out.Stderr != "" {
		t.Errorf("doctor: status %d, want %d, stderr %q", out.Code, status, out.Stderr)
	}
	var r report
	if err := json.Unmarshal([]byte(out.Stdout), &r); err != nil {
		t.Fatalf("doctor --json: %v\n%s", err, out.Stdout)
	}
	byName := make(findings)
	for _, f := range r.Findings {
		byName[f.Name] = f
		if f.Verdict != good && f.Advice == "" {
			t.Errorf("nothing is said about what to do: %+v", f)
		}
	}
	return r, byName
}

func (f findings) want(t *testing.T, name string, v verdict, advice string) {
	t.Helper()
	if got := f[name]; got.Verdict != v || !strings.Contains(got.Advice, advice) {
		t.Errorf("%s: %+v, want %s and advice with %q", name, got, v, advice)
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	t.Run("well", func(t *testing.T) {
		t.Parallel()
		n := rig.New(t, rig.Options{})
		r, f := consult(t, n.User, exitOK)
		if !r.Works {
			t.Error("usernet does not work")
		}
		for _, name := range []string{"user namespaces", "/dev/net/tun", "TAP", "veth", "ping", "resolv.conf"} {
			f.want(t, name, good, "")
		}
		if out := n.User.Must(t, rig.Binary(t), "doctor"); !strings.Contains(out, "usernet can work here.") {
			t.Errorf("the plain report:\n%s", out)
		}
		n.WantNothingLeft(t, quickly, "usernet")
	})
	t.Run("no TAP", func(t *testing.T) {
		t.Parallel()
		for _, tt := range []struct {
			tun    rig.Tun
			advice string
		}{{rig.TunMissing, "modprobe tun"}, {rig.TunClosed, "/dev/net/tun"}} {
			n := rig.New(t, rig.Options{Tun: tt.tun})
			r, f := consult(t, n.User, exitOK)
			if !r.Works {
				t.Error("usernet does not work")
			}
			f.want(t, "/dev/net/tun", poor, tt.advice)
			f.want(t, "TAP", poor, "/dev/net/tun")
			f.want(t, "veth", good, "")
		}
	})
	t.Run("no user namespaces", func(t *testing.T) {
		t.Parallel()
		n := rig.New(t, rig.Options{})
		n.Host.Must(t, "sh", "-c", "echo 0 >/proc/sys/user/max_user_namespaces")
		r, f := consult(t, n.User, exitFailure)
		if r.Works {
			t.Error("usernet works")
		}
		f.want(t, "user namespaces", bad, "sysctl")
	})
	t.Run("no pings, no names", func(t *testing.T) {
		t.Parallel()
		n := rig.New(t, rig.Options{})
		n.Host.Must(t, "rm", "/etc/resolv.conf")
		// A new network namespace lets nobody ping.
		_, f := consult(t, n.GuestOf(t, n.User, rig.Spaces{User: true, UID: 1000, GID: 1000, Net: true}), exitOK)
		f.want(t, "ping", poor, "ping_group_range")
		f.want(t, "resolv.conf", poor, "--dns")
	})
}

func TestCheckResolvConf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	for _, tt := range []struct {
		content string
		verdict verdict
		found   string
	}{
		{"# nothing\n", poor, "names no server"},
		{"nameserver 192.0.2.1\nnameserver 2001:db8::1 # two\n", good, "192.0.2.1, 2001:db8::1"},
		{"nameserver\n", poor, "names no server"},
	} {
		if err := os.WriteFile(path, []byte(tt.content), 0o644); err != nil {
			t.Fatal(err)
		}
		if f := checkResolvConf(path); f.Verdict != tt.verdict || !strings.Contains(f.Found, tt.found) {
			t.Errorf("%q: %+v", tt.content, f)
		}
	}
}
