package dhcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Real clients run in namespaces of an ordinary user: the test executes itself
// again in them, with the name of one case in insideVariable. With a directory
// in captureVariable the clients' messages are written there.
const (
	insideVariable  = "USERNET_DHCP_CASE"
	dirVariable     = "USERNET_DHCP_DIR"
	captureVariable = "USERNET_DHCP_CAPTURE"
)

func TestMain(m *testing.M) {
	name := os.Getenv(insideVariable)
	if name == "" {
		os.Exit(m.Run())
	}
	if err := inside(name); err != nil {
		fmt.Println("FAILED:", err)
		os.Exit(1)
	}
}

// clientCase is what happens in the namespaces.
type clientCase struct {
	name  string
	tools []string
	run   func(*guest) error
}

// TestClients runs real clients against the servers.
func TestClients(t *testing.T) {
	for _, c := range clientCases {
		t.Run(c.name, func(t *testing.T) {
			for _, p := range append(c.tools, "ip") {
				if _, err := exec.LookPath(p); err != nil {
					missing(t, "program %s", p)
				}
			}
			t.Parallel()
			outside(t, c.name)
		})
	}
}

// missing skips for want of something that the machine should have.
func missing(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("USERNET_REQUIRE_NETNS") == "1" {
		t.Fatalf("missing: "+format, args...)
	}
	t.Skipf("missing: "+format, args...)
}

// outside runs a case in new namespaces, as an ordinary user.
func outside(t *testing.T, name string) {
	dir, err := os.MkdirTemp("", "usernet-dhcp-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = 1000, 1000
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, uid, gid)); err != nil {
			t.Fatal(err)
		}
	}
	capture := os.Getenv(captureVariable)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Dir = dir
	cmd.Env = []string{
		insideVariable + "=" + name, dirVariable + "=" + dir, captureVariable + "=" + capture,
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "GORACE=atexit_sleep_ms=0",
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS,
		UidMappings:                []syscall.SysProcIDMap{{HostID: uid, Size: 1}},
		GidMappings:                []syscall.SysProcIDMap{{HostID: gid, Size: 1}},
		Credential:                 &syscall.Credential{NoSetGroups: os.Getuid() != 0},
		GidMappingsEnableSetgroups: os.Getuid() == 0,
		Pdeathsig:                  syscall.SIGKILL,
		Setsid:                     true,
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	switch {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EINVAL):
		missing(t, "user namespaces: %v", err)
	case strings.HasPrefix(lastLine(out.String()), "SKIPPED: "):
		t.Skip(lastLine(out.String()))
	case err != nil:
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log("\n" + out.String())
}

func lastLine(s string) string {
	ls := strings.Split(strings.TrimSpace(s), "\n")
	return ls[len(ls)-1]
}

// guest is the namespace of a client, with the servers at the other end.
type guest struct {
	dir string
	lan *lan
	v4  Config4
	v6  Config6
	ra  ConfigRA
	// minLease, if set, replaces the lease time after the check of the config.
	minLease time.Duration

	s4   *Server4
	s6   *Server6
	adv  *Advertiser
	stop func() error
}

// inside is a case in its namespaces.
func inside(name string) error {
	g := &guest{dir: os.Getenv(dirVariable), v4: config4(), v6: config6(), ra: configRA()}
	if err := g.setUp(); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	for _, c := range clientCases {
		if c.name == name {
			err := c.run(g)
			if g.stop != nil {
				err = errors.Join(err, g.stop())
			}
			return err
		}
	}
	return fmt.Errorf("no case %s", name)
}

// setUp makes the mounts and the link: nothing that a client writes to gets out.
func (g *guest) setUp() error {
	if err := errors.Join(g.mounts(), unix.Sethostname([]byte("box"))); err != nil {
		return err
	}
	for _, c := range []string{
		"ip link set lo up",
		"ip link add guest0 address 52:54:00:00:00:64 mtu 65520 type veth peer name far0 mtu 65520",
		"sysctl -qw net.ipv6.conf.far0.disable_ipv6=1",
		"sysctl -qw net.ipv6.conf.guest0.accept_dad=0",
		"ip link set far0 up",
	} {
		if _, err := g.sh(c); err != nil {
			return err
		}
	}
	l, err := openLAN("far0")
	if err != nil {
		return err
	}
	l.capture = os.Getenv(captureVariable)
	g.lan = l
	g.v4.Conn, g.v6.Conn, g.ra.Conn = l.v4, l.v6, l.ra
	for _, r := range []*Reservation{&g.v4.Reservations[0], &g.v6.Reservations[0]} {
		r.LinkAddr = mac(100)
	}
	return nil
}

// mounts gives the case an /etc of links to the old one, with a resolv.conf and
// users of its own, and an empty /run and /var/lib.
func (g *guest) mounts() error {
	old := filepath.Join(g.dir, "old")
	etc := filepath.Join(g.dir, "etc")
	err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		os.Mkdir(old, 0o755), os.Mkdir(etc, 0o755),
		unix.Mount("/etc", old, "", unix.MS_BIND|unix.MS_REC, ""),
		unix.Mount("tmpfs", etc, "tmpfs", 0, "mode=755"),
	)
	if err != nil {
		return fmt.Errorf("mount /etc: %w", err)
	}
	own := map[string]string{
		"resolv.conf": "# empty\n",
		"hostname":    "box\n",
		"machine-id":  "0123456789abcdef0123456789abcdef\n",
		// All users that clients would like to become are root: it is the
		// only one in this namespace.
		"passwd": "root:x:0:0:root:/root:/bin/sh\nsystemd-network:x:0:0::/:/usr/sbin/nologin\n",
		"group":  "root:x:0:\nsystemd-network:x:0:\n",
	}
	names, err := os.ReadDir(old)
	for _, e := range names {
		if _, ok := own[e.Name()]; !ok {
			err = errors.Join(err, os.Symlink(filepath.Join(old, e.Name()), filepath.Join(etc, e.Name())))
		}
	}
	for name, text := range own {
		err = errors.Join(err, os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644))
	}
	err = errors.Join(err,
		unix.Mount(etc, "/etc", "", unix.MS_BIND, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"),
		unix.Mount("tmpfs", "/var/lib", "tmpfs", 0, "mode=755"),
		unix.Mount("proc", "/proc", "proc", 0, ""),
	)
	for _, d := range []string{"/var/lib/dhcp", "/var/lib/dhcpcd"} {
		err = errors.Join(err, os.Mkdir(d, 0o755))
	}
	return err
}

// serve starts the servers with the configs as they are now. A case that has no
// use for IPv6, or for its router, clears the prefix.
func (g *guest) serve() error {
	log := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelDebug}))
	g.v4.Logger, g.v6.Logger, g.ra.Logger = log, log, log
	var tasks []func(context.Context) error
	var err error
	if g.s4, err = New4(g.v4); err != nil {
		return err
	}
	tasks = append(tasks, g.s4.Run)
	if g.minLease > 0 {
		g.s4.cfg.LeaseTime = g.minLease
	}
	if g.v6.Prefix.IsValid() {
		if g.s6, err = New6(g.v6); err != nil {
			return err
		}
		if g.minLease > 0 {
			g.s6.cfg.LeaseTime = g.minLease
		}
		tasks = append(tasks, g.s6.Run)
	}
	if g.ra.Prefix.IsValid() {
		if g.adv, err = NewAdvertiser(g.ra); err != nil {
			return err
		}
		tasks = append(tasks, g.adv.Run)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ends := make(chan error, len(tasks))
	for _, run := range tasks {
		go func() { ends <- run(ctx) }()
	}
	g.stop = func() error {
		cancel()
		var err error
		for range tasks {
			err = errors.Join(err, <-ends)
		}
		g.stop = nil
		return err
	}
	return nil
}

// sh runs a command of the shell and prints it with what it says.
func (g *guest) sh(line string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", line)
	cmd.Dir = g.dir
	cmd.WaitDelay = 100 * time.Millisecond // daemons keep the pipe open
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	fmt.Printf("$ %s\n%s", line, out.String())
	if err != nil {
		err = fmt.Errorf("%s: %w", line, err)
	}
	return out.String(), err
}

// patience is what a machine with much to do may need for anything.
const patience = 30 * time.Second

// wait runs a command until its output has all of the texts, for limit or
// patience, whichever is longer.
func (g *guest) wait(limit time.Duration, line string, texts ...string) error {
	deadline := time.Now().Add(max(limit, patience))
	for {
		out, _ := exec.Command("sh", "-c", line).CombinedOutput()
		var lacks []string
		for _, s := range texts {
			if !strings.Contains(string(out), s) {
				lacks = append(lacks, s)
			}
		}
		if len(lacks) == 0 {
			fmt.Printf("$ %s\n%s", line, out)
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: no %q in:\n%s", line, lacks, out)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// leased checks that exactly these addresses are leased.
func leased(ls []Lease, addrs ...string) error {
	var got []string
	for _, l := range ls {
		if !l.Offered {
			got = append(got, l.Addr.String())
		}
	}
	if g, w := strings.Join(got, " "), strings.Join(addrs, " "); g != w {
		return fmt.Errorf("leases %q, want %q", g, w)
	}
	return nil
}

// file writes a file into the case's directory and returns its path.
func (g *guest) file(name, text string) string {
	path := filepath.Join(g.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		panic(err)
	}
	return path
}

// onlyIPv4 leaves out the IPv6 servers.
func (g *guest) onlyIPv4() { g.v6.Prefix, g.ra.Prefix = netip.Prefix{}, netip.Prefix{} }

// first returns the first error.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
