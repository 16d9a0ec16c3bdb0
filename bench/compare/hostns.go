package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The names under which this program starts itself again, and its files in
// the work directory.
const (
	roleHost  = "@host"
	roleGuest = "@guest"
	roleLoad  = "@load"
	roleServe = "@serve"

	selfFile    = "compare"
	optionsFile = "options.json"
	jsonFile    = "compare.json"
	tableFile   = "compare.md"
)

// Addresses. The gateway and DNS addresses are those that all subjects give a
// guest; the uplink is a black hole that pasta takes for the way out.
const (
	gatewayAddr = "10.0.2.2"
	dnsAddr     = "10.0.2.3"
	guestAddr   = "10.0.2.100"
	loopback    = "127.0.0.1"

	uplinkName  = "up0"
	uplinkAddr  = "192.0.2.2/24"
	uplinkRoute = "192.0.2.1"
)

// runInHostNamespace runs the comparison in a child that is process 1 of new
// PID, mount and network namespaces: nothing it sends can leave the machine,
// and whatever it started dies with it.
func runInHostNamespace(ctx context.Context, work string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(work, selfFile), roleHost, work)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if os.Geteuid() != 0 {
		// An ordinary user stays who he is; the capabilities that the setting
		// up needs go no further than the child.
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		attr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE}
	}
	cmd.SysProcAttr = attr
	// Interrupted, the child writes what it has so far.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return errors.New("the run failed")
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("start in a namespace of its own: %w", err)
	}
	return nil
}

// hostMain is process 1 of the host namespace.
func hostMain(args []string) error {
	if len(args) != 1 {
		return errUsage
	}
	work := args[0]
	config, err := os.ReadFile(filepath.Join(work, optionsFile))
	if err != nil {
		return fmt.Errorf("read options: %w", err)
	}
	var opts options
	if err := json.Unmarshal(config, &opts); err != nil {
		return fmt.Errorf("decode options: %w", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := prepareMounts(work, opts.UID); err != nil {
		return err
	}
	if err := prepareNetwork(); err != nil {
		return err
	}
	if err := setCongestion(opts.Congestion); err != nil {
		return err
	}
	sysctls, err := prepareSysctls()
	if err != nil {
		return err
	}
	if err := raiseFileLimit(); err != nil {
		return err
	}
	b := &bench{opts: opts, work: work, nextPort: firstPort, sysctls: sysctls}
	if os.Geteuid() == 0 {
		b.cred = &syscall.Credential{Uid: uint32(opts.UID), Gid: uint32(opts.UID)}
	} else if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		// This thread is the one that starts all children.
		return fmt.Errorf("keep capabilities from children: %w", err)
	}
	return b.run(ctx)
}

// prepareMounts gives the new PID namespace its /proc, and the subjects that
// read it a resolv.conf that names the local dnsmasq.
func prepareMounts(work string, uid int) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	resolv := filepath.Join(work, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver "+loopback+"\n"), 0o644); err != nil {
		return fmt.Errorf("write resolv.conf: %w", err)
	}
	target, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil {
		return fmt.Errorf("find resolv.conf: %w", err)
	}
	if err := unix.Mount(resolv, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount resolv.conf: %w", err)
	}
	if os.Geteuid() != 0 {
		return nil // has the ids that the machine gives him
	}
	// RootlessKit wants further ids for its guests.
	ids := filepath.Join(work, "subids")
	if err := os.WriteFile(ids, fmt.Appendf(nil, "%d:100000:65536\n", uid), 0o644); err != nil {
		return fmt.Errorf("write subordinate ids: %w", err)
	}
	for _, path := range []string{"/etc/subuid", "/etc/subgid"} {
		if err := unix.Mount(ids, path, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("mount %s: %w", path, err)
		}
	}
	return nil
}

// prepareNetwork brings up loopback and an uplink that leads nowhere.
func prepareNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	// pasta sends an echo request for the gateway to the gateway's own
	// address instead of mapping it to loopback as it does TCP and UDP.
	if err := addAddr(lo, gatewayAddr+"/32"); err != nil {
		return err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: uplinkName}, PeerName: "up1"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add uplink: %w", err)
	}
	for _, name := range []string{uplinkName, "up1"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find uplink: %w", err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring uplink up: %w", err)
		}
	}
	if err := addAddr(veth, uplinkAddr); err != nil {
		return err
	}
	route := &netlink.Route{Gw: net.ParseIP(uplinkRoute)}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}

func addAddr(link netlink.Link, cidr string) error {
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return fmt.Errorf("parse %s: %w", cidr, err)
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add %s to %s: %w", cidr, link.Attrs().Name, err)
	}
	return nil
}

// prepareSysctls opens ports and pings to the ordinary user and returns what
// the report has to state. The TCP buffers stay as the kernel has them: pasta's
// upload, which collapses when a receiver's window outgrows the sender's
// buffer, was no steadier with other limits; its retransmits are in the table.
func prepareSysctls() (map[string]string, error) {
	pingGroups := "0 2147483647"
	if os.Geteuid() != 0 {
		pingGroups = fmt.Sprintf("%[1]d %[1]d", os.Getgid()) // the only one mapped
	}
	set := [][2]string{
		{"net.ipv4.ping_group_range", pingGroups},
		{"net.ipv4.ip_unprivileged_port_start", "0"},
	}
	for _, kv := range set {
		if err := os.WriteFile(sysctlPath(kv[0]), []byte(kv[1]), 0o644); err != nil {
			return nil, fmt.Errorf("set %s: %w", kv[0], err)
		}
	}
	values := map[string]string{}
	for _, name := range []string{"net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem", "net.core.rmem_max", "net.core.wmem_max", congestionSysctl} {
		if v, err := os.ReadFile(sysctlPath(name)); err == nil {
			values[name] = strings.Join(strings.Fields(string(v)), " ")
		}
	}
	return values, nil
}

const congestionSysctl = "net.ipv4.tcp_congestion_control"

// setCongestion sets the namespace's default.
func setCongestion(name string) error {
	if name == "" {
		return nil
	}
	if err := os.WriteFile(sysctlPath(congestionSysctl), []byte(name), 0o644); err != nil {
		return fmt.Errorf("set %s to %s: %w: net.ipv4.tcp_allowed_congestion_control names those that every namespace may have", congestionSysctl, name, err)
	}
	return nil
}

func sysctlPath(name string) string {
	return "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
}

// raiseFileLimit lets every process started from here have as many files as
// the hard limit allows, as the container runtimes do.
func raiseFileLimit() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read file limit: %w", err)
	}
	limit.Cur = limit.Max
	// The syscall package's call, so that it is not undone in children.
	raised := syscall.Rlimit{Cur: limit.Cur, Max: limit.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised); err != nil {
		return fmt.Errorf("raise file limit: %w", err)
	}
	return nil
}
