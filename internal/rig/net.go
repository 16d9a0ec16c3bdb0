package rig

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Tun says what programs find at /dev/net/tun.
type Tun int

// The states of /dev/net/tun that machines have.
const (
	TunOpen    Tun = iota // as on the machine, which must be open to all
	TunClosed             // opening it is refused with EACCES
	TunMissing            // there is no such file
)

// Options shapes a Net.
type Options struct {
	Tun Tun
	// NoPing leaves the host as the kernel makes one: no ordinary user may
	// open a ping socket.
	NoPing bool
	// Plain makes no namespaces: Host and User are the machine itself, as an
	// ordinary user. There is no Internet then, and only the machine's
	// loopback may be sent to.
	Plain bool
	// Root makes the Net's root the real one. Only root can ask for it.
	Root bool
}

// A Net is a small world for one test: a host in which usernet runs, and the
// internet that it reaches. See the package comment for a picture.
type Net struct {
	// Host acts in the host's network namespace with all rights over it.
	Host *Node
	// User acts there as an ordinary user, uid 1000, without any.
	User *Node
	// Internet acts where every address is served.
	Internet *Node
	// Dir belongs to the ordinary user and is at the same place for all.
	Dir string
}

// ping finds out that a node answers.
var ping = NewFunc("rig.ping", func(context.Context, struct{}) (int, error) { return os.Getpid(), nil })

// New makes a Net that ends with the test.
func New(t testing.TB, o Options) *Net {
	t.Helper()
	if o.Root && os.Geteuid() != 0 {
		Missing(t, "root")
	}
	if !o.Plain {
		NeedNamespaces(t)
	}
	if o.Tun == TunOpen {
		NeedTun(t)
	}
	dir, err := makeDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeDir(t, dir) })
	n := &Net{Dir: dir}
	spaces := Spaces{User: true, Net: true, Mount: true, Drop: dropUID()}
	switch {
	case o.Plain:
		spaces = Spaces{Drop: dropUID()}
	case o.Root:
		spaces = Spaces{Net: true, Mount: true}
	}
	if n.Host, err = startRoot("host", dir, spaces); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Host.close)
	if _, err := ping.Try(n.Host, struct{}{}); err != nil {
		t.Fatalf("start node host: %v\n%s", err, readText(filepath.Join(dir, "host.log")))
	}
	n.User = n.Host
	if o.Plain {
		return n
	}
	n.Internet = n.Host.Node(t, "internet", Spaces{Net: true})
	setUpHost.On(t, n.Host, hostSetup{Dir: dir, Internet: n.Internet.PID, Tun: o.Tun, NoPing: o.NoPing})
	if o.Root {
		n.User = n.Host.Node(t, "user", Spaces{Drop: dropUID()})
	} else {
		n.User = n.Host.Node(t, "user", Spaces{User: true, UID: 1000, GID: 1000})
	}
	startServers.On(t, n.Internet, servers{})
	return n
}

// Guest makes a namespace as an ordinary user's "unshare -Urn" does, with a
// mount namespace, so that DHCP clients can write to its /etc and /run.
func (n *Net) Guest(t testing.TB) *Node {
	t.Helper()
	return n.GuestOf(t, n.User, Spaces{User: true, Net: true, Mount: true})
}

// GuestOf makes a guest's namespace below another node.
func (n *Net) GuestOf(t testing.TB, parent *Node, spaces Spaces) *Node {
	t.Helper()
	g := parent.Node(t, "guest", spaces)
	if spaces.Mount {
		setUpGuest.On(t, g, guestSetup{Dir: n.Dir})
	}
	return g
}

// NetnsPath is the path of a node's network namespace.
func (n *Node) NetnsPath() string { return fmt.Sprintf("/proc/%d/ns/net", n.PID) }

// Leftovers lists the processes of this Net that run a program of one of these
// names.
func (n *Net) Leftovers(t testing.TB, names ...string) []string {
	t.Helper()
	return listProcesses.On(t, n.Host, names)
}

// WantNothingLeft ends the test if such a process is still there after limit or Patience.
func (n *Net) WantNothingLeft(t testing.TB, limit time.Duration, names ...string) {
	t.Helper()
	var left []string
	if !Poll(limit, func() bool { left = n.Leftovers(t, names...); return len(left) == 0 }) {
		t.Errorf("still running after %v:\n%s", max(limit, Patience), strings.Join(left, "\n"))
	}
}

// listProcesses finds programs by name among the caller's descendants.
var listProcesses = NewFunc("rig.processes", func(_ context.Context, names []string) ([]string, error) {
	tree := parents()
	var found []string
	for pid := range tree {
		if !descends(tree, pid, os.Getpid()) {
			continue
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		line := strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
		first, _, _ := strings.Cut(line, " ")
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		exe = strings.TrimSuffix(exe, " (deleted)")
		// An agent's binary has no path, but it is called usernet-agent.
		if slices.Contains(names, filepath.Base(exe)) || slices.ContainsFunc(names, func(name string) bool {
			return filepath.Base(first) == name || strings.HasPrefix(first, name+"-")
		}) {
			found = append(found, fmt.Sprintf("%d %s (%s)", pid, line, exe))
		}
	}
	slices.Sort(found)
	return found, nil
})

func descends(tree map[int]int, pid, ancestor int) bool {
	for range len(tree) {
		parent, ok := tree[pid]
		if !ok {
			return false
		}
		if parent == ancestor {
			return true
		}
		pid = parent
	}
	return false
}

// dropUID is the ordinary uid that root's tests use: the first free one from
// 61000, where no distribution gives any out. Other users stay what they are.
func dropUID() int {
	if os.Geteuid() != 0 {
		return 0
	}
	return freeUID()
}

// makeDir makes a directory for the ordinary user.
func makeDir() (string, error) {
	dir, err := os.MkdirTemp("", "usernet-rig-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	if uid := dropUID(); uid != 0 {
		if err := os.Chown(dir, uid, uid); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// removeDir removes what makeDir made, and nothing that may still be mounted
// below it.
func removeDir(t testing.TB, dir string) {
	if err := os.Remove(filepath.Join(dir, etcMount)); err != nil && !os.IsNotExist(err) {
		t.Errorf("leave %s alone: %v", dir, err)
		return
	}
	os.RemoveAll(dir)
}
