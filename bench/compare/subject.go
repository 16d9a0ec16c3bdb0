package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The subjects. Loopback is no network for a guest but the machine's limit:
// client and server in the host namespace.
const (
	nameUsernet  = "usernet"
	nameSlirp    = "slirp4netns"
	namePasta    = "pasta"
	nameLoopback = "loopback"
	// nameRootlessKit publishes ports, and makes its guests itself.
	nameRootlessKit = "rootlesskit"
)

const startTimeout = 10 * time.Second

// An instance is one running subject with its guest.
type instance struct {
	name    string
	guest   *guest // nil for loopback
	gateway string
	dns     string
	pid     int           // the subject's first process
	cmd     *exec.Cmd     // nil where the subject put itself into the background
	took    time.Duration // from before exec until it said that it is ready
}

// loopbackInstance reaches the servers without any subject.
func loopbackInstance() *instance {
	return &instance{name: nameLoopback, gateway: loopback, dns: loopback}
}

// start makes a guest and connects it with the named subject, which publishes
// ports of the guest on the host's loopback.
func (b *bench) start(ctx context.Context, name string, mtu int, publish ...int) (*instance, error) {
	ports, err := publishArgs(name, publish)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	if name == nameRootlessKit {
		in, err := b.startRootlessKit(ctx, ports)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
		return in, nil
	}
	g, err := b.startGuest(ctx)
	if err != nil {
		return nil, err
	}
	in := &instance{name: name, guest: g, gateway: gatewayAddr, dns: dnsAddr}
	switch name {
	case nameUsernet:
		args := []string{
			"--netns", fmt.Sprintf("/proc/%d/ns/net", g.pid), "--ready-fd", "3",
			"--host-loopback", "--dns", loopback, "--mtu", strconv.Itoa(mtu),
		}
		args = append(args, ports...)
		err = b.startWithReadyFD(ctx, in, b.opts.Usernet, append(args, b.opts.UsernetArgs...))
	case nameSlirp:
		args := []string{"--configure", "--mtu", strconv.Itoa(mtu), "--ready-fd", "3", strconv.Itoa(g.pid), "tap0"}
		err = b.startWithReadyFD(ctx, in, b.opts.Slirp, args)
	case namePasta:
		err = b.startPasta(ctx, in, mtu, ports)
	default:
		err = fmt.Errorf("no subject is called %q", name)
	}
	if err != nil {
		g.stop()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return in, nil
}

// startWithReadyFD starts a subject that stays in the foreground and writes a
// byte to file descriptor 3 once the guest can use the network.
func (b *bench) startWithReadyFD(ctx context.Context, in *instance, binary string, args []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := b.command(ctx, binary, args...)
	cmd.ExtraFiles = []*os.File{w}
	begin := time.Now()
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	if err := r.SetReadDeadline(begin.Add(startTimeout)); err != nil {
		return err
	}
	_, err = r.Read(make([]byte, 1))
	in.took = time.Since(begin)
	if err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return fmt.Errorf("it was never ready: %w; see its messages in the log", err)
	}
	in.cmd, in.pid = cmd, cmd.Process.Pid
	return nil
}

// startPasta starts pasta, which says that it is ready by going into the
// background.
func (b *bench) startPasta(ctx context.Context, in *instance, mtu int, ports []string) error {
	id := strconv.Itoa(b.port())
	pidFile := filepath.Join(b.work, "pasta-"+id+".pid")
	args := []string{
		"--quiet", "--config-net", "--ipv4-only",
		"--interface", uplinkName, "--ns-ifname", "tap0", "--mtu", strconv.Itoa(mtu),
		"--address", guestAddr, "--netmask", "24", "--gateway", gatewayAddr, "--dns-forward", dnsAddr,
		"--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none",
		"--pid", pidFile, "--log-file", filepath.Join(b.work, "pasta-"+id+".log"),
	}
	args = append(append(args, ports...), strconv.Itoa(in.guest.pid))
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	cmd := b.command(ctx, b.opts.Pasta, args...)
	begin := time.Now()
	err := cmd.Run()
	in.took = time.Since(begin)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return err
	}
	in.pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
	return err
}

// startRootlessKit starts a guest under RootlessKit, without a network.
func (b *bench) startRootlessKit(ctx context.Context, ports []string) (*instance, error) {
	state := filepath.Join(b.work, "rootlesskit-"+strconv.Itoa(b.port()))
	args := append([]string{"--state-dir", state, "--net=none", "--port-driver=builtin"}, ports...)
	cmd := b.command(ctx, b.opts.RootlessKit, append(args, filepath.Join(b.work, selfFile), roleGuest, b.opts.Congestion)...)
	cmd.Env = append(os.Environ(), "HOME="+b.work, "XDG_RUNTIME_DIR="+b.work)
	begin := time.Now()
	g, err := runGuest(cmd)
	if err != nil {
		return nil, err
	}
	in := &instance{name: nameRootlessKit, guest: g, cmd: cmd, pid: cmd.Process.Pid, took: time.Since(begin)}
	text, err := os.ReadFile(filepath.Join(state, "child_pid"))
	if err == nil {
		g.pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
	}
	if err != nil {
		in.stop()
		return nil, err
	}
	return in, nil
}

// stop ends the subject and its guest.
func (in *instance) stop() {
	if in.guest == nil {
		return
	}
	unix.Kill(in.pid, unix.SIGTERM)
	for end := time.Now().Add(2 * time.Second); alive(in.pid) && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	unix.Kill(in.pid, unix.SIGKILL)
	if in.cmd != nil {
		in.cmd.Wait()
	} else {
		// An orphan becomes a child of process 1, which this is.
		unix.Wait4(in.pid, nil, 0, nil)
	}
	in.guest.stop()
}

// running tells whether the subject survived so far.
func (in *instance) running() bool {
	return in.guest == nil || alive(in.pid)
}

// tools are the Debian packages whose programs do the measuring.
var tools = []string{"iperf3", "wrk", "nginx", "dnsperf", "dnsmasq-base", "iputils-ping"}

// versions asks the subjects and the tools who they are.
func (b *bench) versions(ctx context.Context) map[string]string {
	all := map[string]string{}
	for _, name := range b.opts.Subjects {
		switch name {
		case nameUsernet:
			all[name] = strings.TrimSpace(version(ctx, b.opts.Usernet, "version") + " " + b.opts.Built)
		case nameSlirp:
			all[name] = version(ctx, b.opts.Slirp, "--version")
		case nameRootlessKit:
			all[name] = version(ctx, b.opts.RootlessKit, "--version")
		case namePasta:
			all[name] = version(ctx, b.opts.Pasta, "--version")
			// Debian's build does not know its own version.
			if v := packageVersion(ctx, "passt"); strings.Contains(all[name], "unknown") && v != "" {
				all[name] = "passt " + v
			}
		}
	}
	for _, name := range tools {
		if v := packageVersion(ctx, name); v != "" {
			all[name] = v
		}
	}
	return all
}

// version is the first line of what a program says, or nothing.
func version(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return ""
	}
	return firstLine(out)
}

func packageVersion(ctx context.Context, name string) string {
	return version(ctx, "dpkg-query", "--show", "--showformat", "${Version}", name)
}
