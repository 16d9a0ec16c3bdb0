package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// rootless makes namespaces the way an ordinary user does.
func rootless(options ...string) []string {
	return join(as(userID), []string{"unshare"}, options)
}

// writeMaps writes the id maps of a process's user namespace, as newuidmap does.
func writeMaps(t *testing.T, pid int, text string) {
	t.Helper()
	for _, kind := range []string{"uid", "gid"} {
		path := fmt.Sprintf("/proc/%d/%s_map", pid, kind)
		if err := os.WriteFile(path, []byte(text), 0); err != nil {
			cannot(t, "%v", err)
		}
	}
}

// works attaches, looks at the result from inside, and detaches.
func works(t *testing.T, c *container, prefix []string, order helperOrder) {
	t.Helper()
	order.Link, order.Addresses = testLink(Auto), testAddresses
	a := attach(t, prefix, order).must(t)
	t.Logf("attached in %v: %+v", a.Took, a.Link)
	checkConfigured(t, c, a)
	if err := a.end(); err != nil {
		t.Errorf("helper: %v: %s", err, a.stderr)
	}
	if a.stderr.Len() > 0 {
		t.Errorf("helper said: %s", a.stderr)
	}
	eventually(t, time.Second, "agent gone", func() bool { return !alive(a.Agent) })
	eventually(t, time.Second, "interface gone", func() bool { return !c.hasLink("tap0") })
}

func checkConfigured(t *testing.T, c *container, a *attachment) {
	t.Helper()
	if a.Link.Name != "tap0" || a.Link.MTU != 65520 || !a.Link.VnetHdr || !a.Link.Offload || len(a.Link.MAC) != 6 {
		t.Errorf("link %+v", a.Link)
	}
	if !a.Status.IPv6 || len(a.Status.Warnings) != 0 {
		t.Errorf("status %+v", a.Status)
	}
	has(t, c.run(t, "ip", "addr"), "mtu 65520", "10.0.2.100/24", "fd75:736e:6574::100/64", a.Link.MAC.String(), "127.0.0.1/8", "::1/128")
	hasNot(t, c.run(t, "ip", "addr"), "NO-CARRIER", "state DOWN")
	// The kernel hands even an address that needs no test to a work queue.
	eventually(t, 500*time.Millisecond, "link-local address ready", func() bool {
		return !strings.Contains(c.run(t, "ip", "addr"), "tentative")
	})
	has(t, c.run(t, "ip", "route"), "default via 10.0.2.2 dev tap0")
	has(t, c.run(t, "ip", "-6", "route"), "default via fd75:736e:6574::2 dev tap0")
}

func has(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("no %q in:\n%s", p, text)
		}
	}
}

func hasNot(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if strings.Contains(text, p) {
			t.Errorf("%q in:\n%s", p, text)
		}
	}
}

func TestAttachRootless(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	works(t, c, as(userID), helperOrder{PID: c.pid})
	works(t, c, as(userID), helperOrder{Path: fmt.Sprintf("/proc/%d/ns/net", c.pid)})
}

func TestAttachWithoutRootInMap(t *testing.T) {
	c := startContainer(t, rootless("-Un", "--map-current-user")...)
	works(t, c, as(userID), helperOrder{PID: c.pid})
}

func TestAttachWithoutMap(t *testing.T) {
	c := startContainer(t, rootless("-Un")...)
	works(t, c, as(userID), helperOrder{PID: c.pid})
}

// A container of podman's --userns=keep-id: the user is himself, and root is
// one of his subordinate ids.
func TestAttachKeepID(t *testing.T) {
	needRoot(t)
	for name, maps := range map[string]string{
		"with subordinate root": fmt.Sprintf("0 500000 1000\n%d %d 1\n", userID, userID),
		"alone":                 fmt.Sprintf("%d %d 1\n", userID, userID),
	} {
		t.Run(name, func(t *testing.T) {
			c := startContainer(t, rootless("-Un")...)
			writeMaps(t, c.pid, maps)
			works(t, c, as(userID), helperOrder{PID: c.pid})
		})
	}
}

// The agent of a caller who is a stranger to the user namespace is somebody whom
// it knows; above all it is not the host's root.
func TestAttachAsRootToRootless(t *testing.T) {
	needRoot(t)
	for name, test := range map[string]struct {
		options []string
		maps    string
		uid     int
	}{
		"root in map":      {[]string{"-Urn"}, "", userID},
		"no root in map":   {[]string{"-Un", "--map-current-user"}, "", userID},
		"subordinate root": {[]string{"-Un"}, "0 500000 1000\n47000 47000 1\n", 500000},
		"stranger in map":  {[]string{"-Un"}, " 1000 500123 10\n", 500123},
		"no map":           {[]string{"-Un"}, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			c := startContainer(t, rootless(test.options...)...)
			if test.maps != "" {
				writeMaps(t, c.pid, test.maps)
			}
			works(t, c, nil, helperOrder{PID: c.pid})
			a := attach(t, nil, helperOrder{PID: c.pid}).must(t)
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.Agent))
			if err != nil {
				t.Fatal(err)
			}
			has(t, string(b), fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d\n", test.uid, test.uid, test.uid, test.uid),
				fmt.Sprintf("Gid:\t%d\t%d\t%d\t%d\n", test.uid, test.uid, test.uid, test.uid), "NoNewPrivs:\t1\n")
		})
	}
}

func TestAttachAsRootInside(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	works(t, c, join(as(userID), within(c.pid, "-U")), helperOrder{PID: c.pid})
}

func TestAttachNested(t *testing.T) {
	c := startContainer(t, rootless("-Ur", "unshare", "-Urn")...)
	works(t, c, as(userID), helperOrder{PID: c.pid})
}

func TestAttachHostOwned(t *testing.T) {
	needRoot(t)
	c := startContainer(t, "unshare", "-n")
	works(t, c, nil, helperOrder{PID: c.pid})
}

func TestAttachNamed(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("usernet-test-%d", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		cannot(t, "ip netns add: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", name).Run() })
	c := startContainer(t, "ip", "netns", "exec", name)
	works(t, c, nil, helperOrder{Path: name})
	works(t, c, nil, helperOrder{Path: "/run/netns/" + name})
}

func TestRefusals(t *testing.T) {
	needRoot(t)
	rootOwned := startContainer(t, "unshare", "-n")
	userOwned := startContainer(t, rootless("-Urn")...)
	dir, err := os.MkdirTemp("/tmp", "usernet-agent-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "ns")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	mounted := func(pid int) []string {
		return []string{"unshare", "-m", "sh", "-c", fmt.Sprintf(`mount --bind /proc/%d/ns/net %s && exec "$0" "$@"`, pid, file)}
	}
	inside := startContainer(t, rootless("-Ur")...)
	for _, test := range []struct {
		name   string
		prefix []string
		order  helperOrder
		want   []string
	}{
		{"another user's process", as(otherUserID), helperOrder{PID: userOwned.pid},
			[]string{"permission denied", "belongs to uid 47000", "as that user or as root"}},
		{"another user's namespace", join(mounted(userOwned.pid), as(otherUserID)), helperOrder{Path: file},
			[]string{"join the owning user namespace", "belongs to uid 47000, this is uid 47001", "as that user or as root"}},
		{"root's namespace", join(mounted(rootOwned.pid), as(userID)), helperOrder{Path: file},
			[]string{"join the network namespace", "run usernet as root"}},
		{"outside of the own user namespace", join(mounted(rootOwned.pid), as(userID), within(inside.pid, "-U")), helperOrder{Path: file},
			[]string{"outside of the one this process is in", "where the namespace was made"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := attach(t, test.prefix, test.order)
			t.Log(a.Err)
			has(t, a.Err, test.want...)
			hasNot(t, a.Err, "\n")
			if err := a.end(); err != nil {
				t.Error(err)
			}
		})
	}
}
