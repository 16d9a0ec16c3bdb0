package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Published ports: the server is in the guest, the client on the host's
// loopback. RootlessKit takes part with the port driver that it has built in,
// which needs no network. slirp4netns is not asked: its forwards go through its TCP stack, at
// a fraction of what the others do.

// inboundPeers are those that have a fast way in.
var inboundPeers = []string{nameUsernet, namePasta, nameRootlessKit, nameLoopback}

// startInbound starts a subject with a published port.
func (b *bench) startInbound(ctx context.Context, name string, port int) (*instance, error) {
	if name == nameLoopback {
		return loopbackInstance(), nil
	}
	return b.start(ctx, name, 65520, port)
}

// inboundJob makes a job whose server is in the guest.
func inboundJob(name, how string, seconds float64, peers []string, run func(ctx context.Context, b *bench, in *instance, port int) (samples, error)) job {
	return job{
		name: name, how: how, peers: peers, rounds: 3, loopback: slices.Contains(peers, nameLoopback), seconds: seconds,
		alone: func(ctx context.Context, b *bench, subject string) (samples, error) {
			port := b.port()
			in, err := b.startInbound(ctx, subject, port)
			if err != nil {
				return nil, err
			}
			defer in.stop()
			return run(ctx, b, in, port)
		},
	}
}

// serveInside starts a server in the guest and waits until it listens.
func (b *bench) serveInside(ctx context.Context, in *instance, port int, name string, args ...string) (stop func(), err error) {
	cmd := b.commandIn(ctx, in.guest, name, args...)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	tables := "/proc/net"
	if in.guest != nil {
		tables = fmt.Sprintf("/proc/%d/net", in.guest.pid)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if listeningIn(tables, port) {
			return stop, nil
		}
		if !alive(cmd.Process.Pid) || time.Now().After(end) {
			stop()
			return nil, fmt.Errorf("start %s: nothing listens on port %d in the guest; see its messages in the log", name, port)
		}
	}
}

func inBulkJob(way string, seconds int) job {
	id := inBulkID(way)
	return inboundJob(id, "iperf3 TCP "+way+", published port", float64(seconds)+1, inboundPeers,
		func(ctx context.Context, b *bench, in *instance, port int) (samples, error) {
			stop, err := b.serveInside(ctx, in, port, "iperf3", "--server", "--one-off", "--port", strconv.Itoa(port))
			if err != nil {
				return nil, err
			}
			defer stop()
			args := []string{"--client", loopback, "--port", strconv.Itoa(port), "--time", strconv.Itoa(seconds), "--json"}
			if way == "up" { // from the guest
				args = append(args, "--reverse")
			}
			out, err := b.output(ctx, loopbackInstance(), grace(seconds), "iperf3", args...)
			r, err := parseIperf(out, err)
			if err != nil {
				return nil, err
			}
			return samples{id: {r.End.Received.Bits / 1e9}}, nil
		})
}

func inConnectionJob(seconds int) job {
	const id = "in-conn-16"
	return inboundJob(id, "wrk -c16, Connection: close, published port", float64(seconds)+1, inboundPeers,
		func(ctx context.Context, b *bench, in *instance, port int) (samples, error) {
			dir, err := os.MkdirTemp(b.work, "nginx-")
			if err == nil && b.cred != nil {
				err = os.Chown(dir, int(b.cred.Uid), int(b.cred.Gid))
			}
			if err == nil {
				err = os.Symlink(filepath.Join(b.work, "www"), filepath.Join(dir, "www"))
			}
			config := filepath.Join(dir, "nginx.conf")
			if err == nil {
				// It is root in the guest, where nobody can become another.
				text := fmt.Appendf([]byte("user root;\nmaster_process off;\n"), nginxConfig, dir, fmt.Sprintf("\t\tlisten %d backlog=4096;\n", port))
				err = os.WriteFile(config, text, 0o644)
			}
			if err != nil {
				return nil, fmt.Errorf("start nginx: %w", err)
			}
			stop, err := b.serveInside(ctx, in, port, "nginx", "-c", config, "-p", dir, "-e", "stderr")
			if err != nil {
				return nil, err
			}
			defer stop()
			rate, err := b.wrk(ctx, loopbackInstance(), port, 16, seconds, "--header", "Connection: close")
			return samples{id: {rate}}, err
		})
}

// inIdleFlows are held when memory is read.
const inIdleFlows = 8000

func inIdleJob() job {
	j := inboundJob("in-idle", plural(inIdleFlows, "idle flow")+" of a published port", 8, []string{nameUsernet},
		func(ctx context.Context, b *bench, in *instance, port int) (samples, error) {
			stop, err := b.serveInside(ctx, in, port, filepath.Join(b.work, selfFile), roleServe, strconv.Itoa(port))
			if err != nil {
				return nil, err
			}
			defer stop()
			// What the first flows bring in for all is not theirs.
			first, err := b.startLoadTo(ctx, loopbackInstance(), net.JoinHostPort(loopback, strconv.Itoa(port)), flowEcho, 100, 0)
			if err != nil {
				return nil, err
			}
			defer first.kill()
			if err := sleep(ctx, settle); err != nil {
				return nil, err
			}
			open := pipes(in.pid)
			before, err := pss(in.pid)
			if err != nil {
				return nil, err
			}
			l, err := b.startLoadTo(ctx, loopbackInstance(), net.JoinHostPort(loopback, strconv.Itoa(port)), flowEcho, inIdleFlows, 0)
			if err != nil {
				return nil, err
			}
			defer l.kill()
			if err := sleep(ctx, 2*settle); err != nil {
				return nil, err
			}
			after, err := pss(in.pid)
			if err != nil {
				return nil, err
			}
			return samples{"in-flow-memory": {float64(after-before) / inIdleFlows / 1024}, "in-pipes": {float64(pipes(in.pid) - open)}}, nil
		})
	j.rounds = 2
	return j
}

// pipes counts the descriptors of pipes that a subject has.
func pipes(root int) (n int) {
	for _, pid := range tree(root) {
		dir := fmt.Sprintf("/proc/%d/fd/", pid)
		fds, err := os.ReadDir(dir)
		if err != nil {
			return -1
		}
		for _, fd := range fds {
			if to, err := os.Readlink(dir + fd.Name()); err == nil && strings.HasPrefix(to, "pipe:") {
				n++
			}
		}
	}
	return n
}

// serveMain is the guest's flow server.
func serveMain(args []string) error {
	if len(args) != 1 {
		return errUsage
	}
	if err := raiseFileLimit(); err != nil {
		return err
	}
	var f flowServer
	if _, err := f.listen(net.JoinHostPort("0.0.0.0", args[0])); err != nil {
		return err
	}
	select {}
}

func inBulkID(way string) string { return "in-bulk-" + way }

// publishArgs are the flags that publish ports on the host's loopback.
func publishArgs(name string, ports []int) (args []string, err error) {
	for _, p := range ports {
		switch name {
		case nameUsernet:
			args = append(args, "--publish", fmt.Sprintf("%s:%d:%[2]d", loopback, p))
		case namePasta:
			args = append(args, "--tcp-ports", fmt.Sprintf("%s/%d", loopback, p))
		case nameRootlessKit:
			args = append(args, "--publish", fmt.Sprintf("%s:%d:%[2]d/tcp", loopback, p))
		default:
			return nil, errors.New("it publishes no ports here")
		}
	}
	if name == namePasta && len(ports) == 0 {
		args = []string{"--tcp-ports", "none"}
	}
	return args, nil
}
